r"""Posteriors as denoisers: methods that put another posterior mean in the place of the network's.

With :math:`D = E[x_0 \mid x_t]` and a likelihood of the state, Tweedie's formula gives

.. math:: E[x_0 \mid x_t, y] = D + \frac{\sigma^2}{\alpha}\nabla_{x_t}\log p(y \mid x_t), \qquad
          p(y \mid x_t) = \int p(y \mid x_0)\, p(x_0 \mid x_t)\, dx_0

exactly; the methods differ in what they take for p(x₀ | x_t), and each runs under every solver. Gradients go through
the network unless it is said otherwise; where α/σ < 10⁻³ they are asked for at the time where it is 10⁻³.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser
from scoresde.grids import check_grid
from scoresde.guidance.base import Scale, Wrapped, check_scale, scale_at
from scoresde.guidance.gradients import Graph, before_silence, gradient
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, least_residual
from scoresde.sde import SDE


class _Posterior(Wrapped):
    """A denoiser and a measurement."""

    def __init__(self, model: AbstractDenoiser, measurement: Measurement) -> None:
        super().__init__(model)
        if not isinstance(measurement, Measurement):
            raise TypeError(f"`measurement` must be Measurement(operator, y, std), got {type(measurement).__name__}.")
        self.measurement = measurement


class _LinearPosterior(_Posterior):
    """The same where the operator is linear."""

    def __init__(self, model: AbstractDenoiser, measurement: Measurement) -> None:
        super().__init__(model, measurement)
        measurement.linear  # noqa: B018  # raises at the door

    @property
    def A(self) -> Linear:
        return self.measurement.linear


class DPS(_Posterior):
    r"""Diffusion posterior sampling: x₀ is taken to be D, with no spread.

    .. math:: \nabla\log p(y \mid x_t) \approx \nabla_{x_t}\log p(y \mid x_0 = D(x_t))
              = -\frac{1}{2\,\mathrm{std}^2}\nabla_{x_t}\lVert y - A(D(x_t))\rVert^2

    for any differentiable A; of :class:`~scoresde.inverse.measurements.Counts` it is their likelihood. That is the
    paper's approximation; its spread being 0, the pull towards y is too strong and stiff wherever p(x₀ | x_t) is wide
    beside `std`. What the paper runs is a step of fixed length,
    :math:`x_s \mathrel{-}= \zeta\,\nabla_{x_t}\lVert y - A(D)\rVert`, after each of DDPM's: with ``norm=True`` the
    denoiser is :math:`D - \mathrm{scale}\,\nabla\lVert y - A(D)\rVert`, and ``scale=dps_scale(sde, grid, zeta)`` under
    ``ss.DDPM()`` on that grid is the published algorithm.

    Arguments:
        model: The prior's denoiser.
        measurement: Its operator need not be linear.
        scale: A number, (B,), or a function of t.
        norm: Use the gradient of the norm; `std` is then not needed.

    References:
        | Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023), arXiv:2209.14687,
          algorithm 1
    """

    def __init__(
        self, model: AbstractDenoiser, measurement: Measurement, scale: Scale = 1.0, *, norm: bool = False
    ) -> None:
        super().__init__(model, measurement)
        if not norm:
            measurement.likely("DPS without `norm`=True")
        self.scale = check_scale(scale)
        self.norm = norm

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """Approximate posterior mean, E[x_0 | x_t, y]."""
        gain = scale_at(self.scale, t, x)
        t = before_silence(self.sde, t)
        graph = Graph(self.model, x, t, cond)

        def fit(x0: Tensor) -> Tensor:
            return -self.measurement.residual(x0).flatten(1).norm(dim=1) if self.norm else self.measurement.log_prob(x0)

        slope = graph.pull(gradient(fit, graph.x0, self))
        if not self.norm:
            gain = gain * _tweedie(self.sde, t, x)
        return graph.release(graph.x0 + gain * slope)


def dps_scale(sde: SDE, grid: Tensor | Sequence[float], zeta: float) -> Callable[[Any], float]:
    r"""The scale with which :class:`DPS` with ``norm=True`` under DDPM's steps moves ζ along the gradient.

    A step t → s holds :math:`c_0 D`, so the scale is :math:`\zeta / c_0`,
    :math:`c_0 = \alpha_s (1 - e^{2(\lambda_t - \lambda_s)})`: it belongs to the grid, and grows without bound as legs
    get short.

    Arguments:
        sde: The process.
        grid: A grid that goes down.
        zeta: ζ, 0.3 to 1 in the paper.
    """
    times = check_grid(sde, grid).tolist()
    scales: dict[float, float] = {t: zeta / sde.posterior(s, t)[1] for t, s in pairwise(times)}

    def of_t(t: Any) -> float:
        at = float(t)
        if at not in scales:
            raise ValueError(
                f"the scale is known at the {len(scales)} times of its grid; t = {at!r} is not one of them."
            )
        return scales[at]

    return of_t


class PiGDM(_LinearPosterior):
    r"""Pseudo-inverse guidance: p(x₀ | x_t) is taken to be isotropic.

    .. math:: \nabla\log p(y \mid x_t) \approx \left(\frac{\partial D}{\partial x_t}\right)^T A^T
              (r^2 A A^T + \mathrm{std}^2)^{-1}(y - A D), \qquad
              r^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}

    With data of standard deviation s and no structure, N(0, s² I), it is exact.

    Arguments:
        model: The prior's denoiser.
        measurement: Linear; `std` may be 0.
        data_std: s.
        through_net: False takes ∂D/∂x_t = r² α/σ², which spares the backward pass.

    References:
        | Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023),
          https://openreview.net/forum?id=9_gsMA8MRKQ
    """

    def __init__(
        self, model: AbstractDenoiser, measurement: Measurement, *, data_std: float = 1.0, through_net: bool = True
    ) -> None:
        super().__init__(model, measurement)
        self.data_std = check.number("data_std", data_std, above=0)
        self.through_net = through_net

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """Approximate posterior mean, E[x_0 | x_t, y]."""
        variance = isotropic_variance(self.sde, t, self.data_std)
        if not self.through_net:
            x0 = self.model.x0(x, t, **cond)
            return x0 + check.expand(variance, x) * self._pull(x0, variance)
        t = before_silence(self.sde, t)
        graph = Graph(self.model, x, t, cond)
        return graph.release(graph.x0 + _tweedie(self.sde, t, x) * graph.pull(self._pull(graph.x0, variance)))

    def _pull(self, x0: Tensor, variance: Any) -> Tensor:
        A = self.A
        r = self.measurement.residual(x0)
        if self.measurement.std == 0:
            return A.pinv(r) / check.expand(variance, x0)
        return A.adjoint(A.solve(r, check.expand(variance, r), self.measurement.std**2))


class MMPS(_LinearPosterior):
    r"""Moment matching: p(x₀ | x_t) is taken to be Gaussian with the covariance that the denoiser itself implies.

    .. math:: E[x_0 \mid x_t, y] \approx D + V A^T (A V A^T + \mathrm{std}^2)^{-1} (y - A D), \qquad
              V = \mathrm{Cov}[x_0 \mid x_t] = \frac{\sigma^2}{\alpha}\frac{\partial D}{\partial x_t}

    Each iteration of the Krylov solve costs one backward pass through the network. For a Gaussian prior it is exact. A
    network's V is neither symmetric nor positive where noise is high, and conjugate gradients may then diverge; the
    solve is one by least residuals, after which (A V Aᵀ + std²) u is never further from y − A D than 0 is.

    Arguments:
        model: The prior's denoiser.
        measurement: Linear, std > 0.
        iterations: Of the solve; a rank that V A^T has is reached in as many.

    References:
        | Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024),
          arXiv:2405.13712
        | Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024), arXiv:2310.06721
    """

    def __init__(self, model: AbstractDenoiser, measurement: Measurement, iterations: int = 5) -> None:
        super().__init__(model, measurement)
        measurement.noisy(type(self).__name__)
        self.iterations = check.integer("iterations", iterations, least=1)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """Approximate posterior mean, E[x_0 | x_t, y]."""
        t = before_silence(self.sde, t)
        graph = Graph(self.model, x, t, cond)
        gain = _tweedie(self.sde, t, x)
        A = self.A

        def spread(u: Tensor) -> Tensor:
            """V Aᵀ u; V is symmetric for a true posterior."""
            out: Tensor = gain * graph.pull(A.adjoint(u))
            return out

        return graph.release(graph.x0 + spread(self._solve(self.measurement.residual(graph.x0), spread)))

    def _solve(self, r: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
        A = self.A
        variance = self.measurement.std**2
        return least_residual(lambda u: variance * u + A(spread(u)), r, self.iterations)


class TMPD(MMPS):
    r"""Tweedie moment projection with a diagonal in the place of A V Aᵀ: its row sums.

    .. math:: E[x_0 \mid x_t, y] \approx D + V A^T\, \frac{y - A D}{\mathrm{std}^2 + A V A^T \mathbf{1}}

    Two backward passes. Where rows of A V Aᵀ sum to less than nothing, 0 is taken.

    Arguments:
        model: The prior's denoiser.
        measurement: Linear, std > 0.

    References:
        | Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024), arXiv:2310.06721
    """

    def __init__(self, model: AbstractDenoiser, measurement: Measurement) -> None:
        super().__init__(model, measurement)

    def _solve(self, r: Tensor, spread: Callable[[Tensor], Tensor]) -> Tensor:
        A = self.A
        return r / (self.measurement.std**2 + A(spread(torch.ones_like(r))).clamp_min(0))


class DDNM(_LinearPosterior):
    r"""The range of A from the measurement, its null space from the network; y is taken for exact.

    .. math:: D' = A^+ y + (I - A^+ A)\, D

    Arguments:
        model: The prior's denoiser.
        measurement: Linear; `std` is not used: noise in y stays in the result.

    References:
        | Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model (Wang et al., 2023), arXiv:2212.00490
    """

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The network's data prediction, made to agree with the measurement."""
        x0 = self.model.x0(x, t, **cond)
        return x0 + self.A.pinv(self.measurement.residual(x0))


class DiffPIR(_LinearPosterior):
    r"""Plug-and-play: the data prediction is moved to the nearest state that fits the measurement.

    .. math:: D' = \arg\min_z \lVert y - A z\rVert^2 + \kappa\lVert z - D\rVert^2
              = D + A^T(A A^T + \kappa)^{-1}(y - A D), \qquad
              \kappa = \lambda\,\mathrm{std}^2\,\frac{\alpha^2}{\sigma^2}

    The published sampler is this denoiser under ``ss.DDIM()`` on the grid ``renoised(sde, times, zeta)``.

    Arguments:
        model: The prior's denoiser.
        measurement: Linear; `std` may be 0.
        weight: λ, of the prior.

    References:
        | Denoising Diffusion Models for Plug-and-Play Image Restoration (Zhu et al., 2023), arXiv:2305.08995,
          algorithm 1
    """

    def __init__(self, model: AbstractDenoiser, measurement: Measurement, weight: float = 1.0) -> None:
        super().__init__(model, measurement)
        self.weight = check.number("weight", weight, above=0)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The proximal point of the data prediction."""
        A = self.A
        x0 = self.model.x0(x, t, **cond)
        r = self.measurement.residual(x0)
        if self.measurement.std == 0:
            return x0 + A.pinv(r)
        alpha, sigma = (check.expand(fn(t), r) for fn in (self.sde.alpha, self.sde.sigma))
        # Both sides times σ², so that σ = 0 is no exception: then the system is κ alone.
        kappa = self.weight * self.measurement.std**2 * alpha**2
        return x0 + check.expand(self.sde.sigma(t), x) ** 2 * A.adjoint(A.solve(r, sigma**2, kappa))


def renoised(sde: SDE, times: Tensor | Sequence[float], zeta: float) -> Tensor:
    r"""A zigzag on which a share ζ of the noise variance at every time is fresh: DiffPIR's, and DDIM's as it writes it.

    .. math:: x_s = \alpha_s D + \sigma_s(\sqrt{1 - \zeta}\,\varepsilon + \sqrt{\zeta}\,z)

    Each leg is solved to the time where σ/α is :math:`\sqrt{1-\zeta}` times what it is at s, and noise added back.

    Arguments:
        sde: The process.
        times: A grid that goes down.
        zeta: In [0, 1); 0 returns the grid.
    """
    grid = check_grid(sde, times)
    zeta = check.number("zeta", zeta, least=0, below=1)
    if zeta == 0:
        return grid
    lam = sde.lam(grid) - 0.5 * math.log1p(-zeta)
    out = [grid[:1]]
    for i in range(1, len(grid)):
        below = grid[i : i + 1]
        if bool(lam[i].isfinite()):
            low = sde.t_of_lam(lam[i].clamp_max(sde.lam(0.0)))
            below = torch.stack([low, grid[i]]) if low < grid[i] and i < len(grid) - 1 else below
        out.append(below)
    return torch.cat(out)


def isotropic_variance(sde: SDE, t: Any, data_std: float) -> Any:
    r"""Variance of x₀ given x_t for data N(0, s² I): :math:`\sigma^2 s^2 / (\alpha^2 s^2 + \sigma^2)`."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return sigma**2 * data_std**2 / (alpha**2 * data_std**2 + sigma**2)


def _tweedie(sde: SDE, t: Any, x: Tensor) -> Any:
    """σ²/α, what turns a score into a data prediction."""
    return check.expand(sde.sigma(t) ** 2 / sde.alpha(t), x)
