r"""Denoisers that approximate the posterior mean given a measurement; they work with every solver.

With :math:`D = E[x_0 \mid x_t]` and the likelihood of a measurement y, Tweedie's formula gives exactly

.. math:: E[x_0 \mid x_t, y] = D + \frac{\sigma^2}{\alpha}\nabla_{x_t}\log p(y \mid x_t), \qquad
          p(y \mid x_t) = \int p(y \mid x_0)\, p(x_0 \mid x_t)\, dx_0

The methods differ in their approximation of p(x₀ | x_t). They differentiate through the network unless their
description states otherwise. Where α/σ < 10⁻³, the gradient is evaluated at the time where α/σ = 10⁻³.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields, short
from scoresde.denoisers.base import AbstractDenoiser, Condition, Wrapped
from scoresde.grids.grid import check_grid
from scoresde.guidance.classifier import Graph, before_silence, gradient
from scoresde.guidance.scale import Scale, check_scale, scale_at
from scoresde.inverse.covariance import whitened_operator
from scoresde.inverse.krylov import minimal_residual
from scoresde.inverse.likelihoods import EntrywiseMeasurement
from scoresde.inverse.linearized import Linearized
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, ScaledIsometry, linear_operator
from scoresde.inverse.stacked import Seen, check_measurement
from scoresde.processes.sde import SDE, TimeT


class PosteriorDenoiser(Wrapped):
    """Base of denoisers that approximate E[x_0 | x_t, y]; a subclass writes ``x0(x, t, **cond)``.

    The measurement may hold one y for each sample. It then follows the samples under every method that evaluates some
    samples of a batch, such as ``ss.Adaptive``. A subclass with other attributes of this kind adds their names to
    `per_sample`.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement, or a list of several.

    Example:
        >>> import torch, scoresde as ss
        >>> class RobustDPS(ss.inverse.PosteriorDenoiser):
        ...     # Guidance by the sum of absolute residuals, with one step size for each sample.
        ...     per_sample = (*ss.inverse.PosteriorDenoiser.per_sample, "step")
        ...     def __init__(self, model, measurement, step):
        ...         super().__init__(model, measurement)
        ...         self.step = step
        ...     def x0(self, x, t, **cond):
        ...         with torch.enable_grad():
        ...             x = x.detach().requires_grad_()
        ...             x0 = self.model.x0(x, t, **cond)
        ...             distance = self.measurement.residual(x0).abs().sum()
        ...             (slope,) = torch.autograd.grad(distance, x)
        ...         return x0.detach() - self.step[:, None] * slope
        >>> prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> first = ss.inverse.Mask(torch.tensor([True, False]))
        >>> y = torch.tensor([[-1.0], [0.0], [1.0]])
        >>> model = RobustDPS(prior, ss.inverse.Measurement(first, y, std=0.1), step=torch.full((3,), 0.2))
        >>> ss.sample(model, (3, 2), ss.Adaptive(), seed=0).shape
        torch.Size([3, 2])
    """

    per_sample: ClassVar[tuple[str, ...]] = ("measurement",)

    measurement: Measurement

    def __init__(self, model: AbstractDenoiser, measurement: Seen) -> None:
        super().__init__(model)
        self.measurement = check_measurement(measurement)


class LinearPosteriorDenoiser(PosteriorDenoiser):
    """Base of posterior denoisers for linear operators and Gaussian noise.

    `measurement` becomes that of ``measurement.whitened()``, whose `std` is a number: for noise of another kind, the
    operator and y are multiplied by W with W Σ Wᵀ = I.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator.

    Example:
        >>> import scoresde as ss
        >>> class Landweber(ss.inverse.LinearPosteriorDenoiser):
        ...     def x0(self, x, t, **cond):
        ...         x0 = self.model.x0(x, t, **cond)
        ...         return x0 + 0.5 * self.A.adjoint(self.measurement.residual(x0))
    """

    entrywise: ClassVar[bool] = False
    """Whether the method has a formula for noise that is not Gaussian and independent between entries."""

    linearizes: ClassVar[bool] = False
    """Whether the method takes other operators than linear ones, linearised at the data prediction."""

    def __init__(self, model: AbstractDenoiser, measurement: Seen) -> None:
        super().__init__(model, measurement)
        seen, linear = self.measurement, isinstance(self.measurement.operator, Linear)
        if self.linearizes and not linear and not isinstance(seen, EntrywiseMeasurement):
            seen.require_noise(type(self).__name__)
            return
        if not (self.entrywise and isinstance(self.measurement, EntrywiseMeasurement) and self.measurement.smooth):
            self.measurement = self.measurement.whitened()
        linear_operator(self.measurement.operator)

    @property
    def A(self) -> Linear:
        """The operator."""
        seen = self.measurement
        return linear_operator(seen.operator) if isinstance(seen, EntrywiseMeasurement) else seen.linear

    def system(self, x0: Tensor) -> tuple[Linear, Tensor, float]:
        """Linear operator, residual y − A(x0) and standard deviation of the noise of a measurement, at `x0`.

        For an operator that is not linear these are its derivative at `x0`, and the residual of itself.

        Arguments:
            x0: Data prediction, (B, *event).
        """
        seen = self.measurement
        if isinstance(seen.operator, Linear):
            return self.A, seen.residual(x0), seen.require_noise(type(self).__name__)
        tangent, r = Linearized(seen.operator, x0), seen.residual(x0)
        if seen.covariance is None:
            return tangent, r, seen.require_noise(type(self).__name__)
        operator, index = whitened_operator(tangent, seen.covariance)
        return operator, seen.covariance.whiten(r)[:, index], 1.0


@checked
class DPS(PosteriorDenoiser):
    r"""Diffusion posterior sampling: p(x₀ | x_t) is approximated by a point mass at D.

    .. math:: \nabla\log p(y \mid x_t) \approx \nabla_{x_t}\log p(y \mid x_0 = D(x_t))
              = -\frac{1}{2\,\mathrm{std}^2}\nabla_{x_t}\lVert y - A(D(x_t))\rVert^2

    for any differentiable A. For :class:`Counts`, the Poisson likelihood replaces the
    Gaussian one. The guidance is too strong, and stiff, where the standard deviation of p(x₀ | x_t) exceeds `std`.
    The published algorithm adds :math:`x_s \mathrel{-}= \zeta\,\nabla_{x_t}\lVert y - A(D)\rVert` after each DDPM
    step. To reproduce it, use ``norm=True`` and ``scale=dps_scale(sde, grid, zeta)`` with ``ss.DDPM()`` on the same
    grid; the denoiser is then :math:`D - \mathrm{scale}\,\nabla\lVert y - A(D)\rVert`.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with any differentiable operator.
        scale: Guidance scale: a number, (B,), or a function of t.
        norm: Use the gradient of the norm; `std` is then not used.

    References:
        | Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023), arXiv:2209.14687,
          algorithm 1
    """

    per_sample = (*PosteriorDenoiser.per_sample, "scale")

    def __init__(self, model: AbstractDenoiser, measurement: Seen, scale: Scale = 1.0, *, norm: bool = False) -> None:
        super().__init__(model, measurement)
        if not norm:
            self.measurement.require_likelihood("DPS without `norm`=True")
        self.scale = check_scale(scale)
        self.norm = norm

    def extra_repr(self) -> str:
        return fields(scale=self.scale, norm=self.norm)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        check.state("x", x)
        gain = scale_at(self.scale, t, x)
        t = before_silence(self.sde, t)
        graph = Graph(self.model, x, t, cond)

        def fit(x0: Tensor) -> Tensor:
            return -self.measurement.residual(x0).flatten(1).norm(dim=1) if self.norm else self.measurement.log_prob(x0)

        slope = graph.pull(gradient(fit, graph.x0, self))
        if not self.norm:
            gain = gain * tweedie_gain(self.sde, t, x)
        return graph.release(graph.x0 + gain * slope)


@checked
def dps_scale(sde: SDE, grid: Tensor | Sequence[float], zeta: float) -> Callable[[float | Tensor], float]:
    r"""Scale for :class:`DPS` with ``norm=True``: each DDPM step then moves by ζ times the gradient.

    A DDPM step t → s multiplies D by :math:`c_0 = \alpha_s (1 - e^{2(\lambda_t - \lambda_s)})`, so the scale is
    :math:`\zeta / c_0`. It is defined at the start times of the steps only, and it diverges as the steps become small.

    Arguments:
        sde: The process.
        grid: Decreasing times, (N + 1,).
        zeta: ζ, 0.3 to 1 in the paper.

    Returns:
        The scale as a function of t.

    References:
        | Diffusion Posterior Sampling for General Noisy Inverse Problems (Chung et al., 2023), arXiv:2209.14687
    """
    times = check_grid(sde, grid).tolist()
    scales: dict[float, float] = {t: zeta / sde.posterior(s, t)[1] for t, s in pairwise(times)}

    def scale(t: float | Tensor) -> float:
        at = float(t)
        if at not in scales:
            raise ValueError(
                f"`dps_scale` is defined at the {len(scales)} start times of its grid only, got t = {at!r}; use the "
                f"same grid in `sample`."
            )
        return scales[at]

    return scale


@checked
class PiGDM(LinearPosteriorDenoiser):
    r"""Pseudo-inverse guidance: p(x₀ | x_t) is approximated by the isotropic Gaussian N(D, r² I).

    .. math:: \nabla\log p(y \mid x_t) \approx \left(\frac{\partial D}{\partial x_t}\right)^T A^T
              (r^2 A A^T + \mathrm{std}^2)^{-1}(y - A D), \qquad
              r^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}

    The result is exact for data N(0, s² I). An operator that is not linear is linearised at D, or, as in the paper, the
    residual is that of a generalised inverse h⁺ of the operator h, with :math:`h(h^+(h(x))) = h(x)`, and y is exact:

    .. math:: \nabla\log p(y \mid x_t) \approx \left(\frac{\partial D}{\partial x_t}\right)^T
              \frac{h^+(y) - h^+(h(D))}{r^2}

    This needs no derivative of h, which may be a quantisation, or the compression of an image.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator, whose `std` may be 0; with any operator and `pinv`; or with a
            differentiable one and std > 0.
        data_std: Standard deviation s of the data.
        through_net: Differentiate through the network; False uses ∂D/∂x_t = r² α/σ² and needs no backward pass.
        pinv: Generalised inverse h⁺ of the operator, a function (B, *out) to (B, *event); `std` is then not used.

    References:
        | Pseudoinverse-Guided Diffusion Models for Inverse Problems (Song et al., 2023),
          https://openreview.net/forum?id=9_gsMA8MRKQ
    """

    entrywise = True
    linearizes = True

    def __init__(
        self,
        model: AbstractDenoiser,
        measurement: Seen,
        *,
        data_std: float = 1.0,
        through_net: bool = True,
        pinv: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if pinv is None:
            super().__init__(model, measurement)
        else:
            PosteriorDenoiser.__init__(self, model, measurement)
        self.pinv = pinv
        seen = self.measurement
        if pinv is None and isinstance(seen, EntrywiseMeasurement) and not isinstance(self.A, ScaledIsometry):
            raise TypeError(
                f"PiGDM with {type(seen).__name__} needs an operator with A Aᵀ = g I, such as Mask, Downsample or "
                f"Grey, got {type(self.A).__name__}: with others the entries of A x₀ given x_t are dependent; use TMPD "
                f"or DPS."
            )
        self.data_std = check.number("data_std", data_std, above=0)
        self.through_net = through_net

    def extra_repr(self) -> str:
        inverse = "" if self.pinv is None else f", pinv={short(self.pinv)}"
        return f"data_std={short(self.data_std)}, through_net={self.through_net}{inverse}"

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        check.state("x", x)
        variance = isotropic_variance(self.sde, t, self.data_std)
        if not self.through_net:
            x0 = self.model.x0(x, t, **cond)
            return x0 + check.expand(variance, x) * self._pull(x0, variance)
        t = before_silence(self.sde, t)
        graph = Graph(self.model, x, t, cond)
        return graph.release(graph.x0 + tweedie_gain(self.sde, t, x) * graph.pull(self._pull(graph.x0, variance)))

    def _pull(self, x0: Tensor, variance: float | Tensor) -> Tensor:
        seen = self.measurement
        if self.pinv is not None:
            difference: Tensor = self.pinv(seen.data(x0)) - self.pinv(seen.operator(x0))
            return check.match("pinv(y)", difference, "x0", x0) / check.expand(variance, x0)
        if isinstance(seen, EntrywiseMeasurement):
            A = self.A
            assert isinstance(A, ScaledIsometry)
            v = check.expand(variance, x0) * A.gram
            v = v.reshape(-1, *[1] * len(A.out)) if isinstance(v, Tensor) and v.ndim else v
            return A.adjoint(gradient(lambda u: seen.smoothed(u, v), A(x0), self))
        if seen.covariance is None and seen.std == 0:
            return self.A.pinv(seen.residual(x0)) / check.expand(variance, x0)
        operator, r, std = self.system(x0)
        return operator.adjoint(operator.solve(r, check.expand(variance, r), std**2))


@checked
class MMPS(LinearPosteriorDenoiser):
    r"""Moment matching: p(x₀ | x_t) is approximated by a Gaussian with the covariance V from the denoiser's Jacobian.

    .. math:: E[x_0 \mid x_t, y] \approx D + V A^T (A V A^T + \mathrm{std}^2)^{-1} (y - A D), \qquad
              V = \mathrm{Cov}[x_0 \mid x_t] = \frac{\sigma^2}{\alpha}\frac{\partial D}{\partial x_t}

    The result is exact for a Gaussian prior. A Krylov method solves the linear system; each of its iterations costs one
    backward pass through the network, and one more follows. At high noise the V of a network is neither symmetric nor
    positive definite, and conjugate gradients may diverge. The method here minimises the residual, which never grows.
    An operator that is not linear is linearised at D.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a differentiable operator and std > 0.
        iterations: Number of Krylov iterations; rank(A V Aᵀ) + 1 are enough.

    References:
        | Learning Diffusion Priors from Observations by Expectation Maximization (Rozet et al., 2024),
          arXiv:2405.13712
        | Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024), arXiv:2310.06721
    """

    linearizes = True

    def __init__(self, model: AbstractDenoiser, measurement: Seen, iterations: int = 5) -> None:
        super().__init__(model, measurement)
        if not isinstance(self.measurement, EntrywiseMeasurement):
            self.measurement.require_noise(type(self).__name__)
        self.iterations = check.integer("iterations", iterations, at_least=1)

    def extra_repr(self) -> str:
        return fields(iterations=self.iterations)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        check.state("x", x)
        t = before_silence(self.sde, t)
        graph = Graph(self.model, x, t, cond)
        gain = tweedie_gain(self.sde, t, x)
        A, r, std = self._equation(graph.x0)

        def covariance(u: Tensor) -> Tensor:
            """V Aᵀ u, computed as (σ²/α)(∂D/∂x_t)ᵀ Aᵀ u: V is symmetric for an exact denoiser."""
            out: Tensor = gain * graph.pull(A.adjoint(u))
            return out

        return graph.release(graph.x0 + covariance(self._solve(A, graph.x0, covariance, r, std)))

    def _equation(self, x0: Tensor) -> tuple[Linear, Tensor, float]:
        """Operator, residual and standard deviation of the linear system."""
        return self.system(x0)

    def _solve(self, A: Linear, x0: Tensor, covariance: Callable[[Tensor], Tensor], r: Tensor, std: float) -> Tensor:
        """Solution u of (std² + A V Aᵀ) u = y − A D, so that V Aᵀ u is the shift of the data prediction."""
        return minimal_residual(lambda u: std**2 * u + A(covariance(u)), r, self.iterations)


@checked
class TMPD(MMPS):
    r"""Tweedie moment projection: as :class:`MMPS`, with A V Aᵀ replaced by the diagonal of its row sums.

    .. math:: E[x_0 \mid x_t, y] \approx D + V A^T\, \frac{y - A D}{\mathrm{std}^2 + A V A^T \mathbf{1}}

    The cost is two backward passes. Negative row sums are set to 0. The result is exact for a Gaussian prior only if
    A V Aᵀ is diagonal, as for a mask and independent data. Otherwise the row sums are an approximation, and its error
    stays with any number of steps: for two numbers of correlation 0.85 that are both measured, the mean of the samples
    is off by 0.3 of the posterior's standard deviation. There :class:`MMPS` is exact.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a differentiable operator and std > 0; linearised at D if it is not linear.

    References:
        | Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024), arXiv:2310.06721
    """

    entrywise = True

    def __init__(self, model: AbstractDenoiser, measurement: Seen) -> None:
        super().__init__(model, measurement)
        self.measurement = check_measurement(measurement)  # row sums depend on the scale of each entry of y

    def extra_repr(self) -> str:
        return ""

    def _equation(self, x0: Tensor) -> tuple[Linear, Tensor, float]:
        seen = self.measurement
        linear = isinstance(seen.operator, Linear)
        A = self.A if linear else Linearized(seen.operator, x0)
        r = x0 if isinstance(seen, EntrywiseMeasurement) else seen.residual(x0)
        return A, r, 0.0  # the noise has a variance for each entry

    def _solve(self, A: Linear, x0: Tensor, covariance: Callable[[Tensor], Tensor], r: Tensor, std: float) -> Tensor:
        seen, u = self.measurement, self.measurement.operator(x0)
        noise = seen.covariance
        ones = torch.ones_like(u) if noise is None else noise.ones(u)
        diagonal = A(covariance(ones)).clamp_min(0)
        if isinstance(seen, EntrywiseMeasurement):
            return gradient(lambda u: seen.smoothed(u, diagonal), u, self)
        return r / (seen.std**2 + diagonal) if noise is None else noise.solve_plus(diagonal, r)


@checked
class MPGD(PosteriorDenoiser):
    r"""Manifold preserving guidance: a gradient step on the data prediction, and a projection to the data's manifold.

    .. math:: D' = \Pi\left(D - c\,\nabla_D\,\tfrac12\lVert y - A(D)\rVert^2\right)

    The gradient is with respect to D, not to x_t, so no backward pass through the network is needed. Without Π, c = 1
    and A Aᵀ = I this is :class:`DDNM`. The paper's Π is an autoencoder, ``lambda x: decode(encode(x))``.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with any differentiable operator; `std` is not used, except with `likelihood`.
        scale: Step size c: a number, (B,), or a function of t.
        project: Projection Π, a function of states, by default none.
        likelihood: Whether to ascend the log-likelihood log p(y | D) instead, for noise of any kind.

    References:
        | Manifold Preserving Guided Diffusion (He et al., 2024), arXiv:2311.16424, algorithms 1 and 2
    """

    per_sample = (*PosteriorDenoiser.per_sample, "scale")

    def __init__(
        self,
        model: AbstractDenoiser,
        measurement: Seen,
        scale: Scale = 1.0,
        *,
        project: Callable[[Tensor], Tensor] | None = None,
        likelihood: bool = False,
    ) -> None:
        super().__init__(model, measurement)
        if likelihood:
            self.measurement.require_likelihood("MPGD with `likelihood`=True")
        self.scale, self.project, self.likelihood = check_scale(scale), project, likelihood

    def extra_repr(self) -> str:
        return fields(scale=self.scale, project=self.project, likelihood=self.likelihood)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        x0 = self.model.x0(check.state("x", x), t, **cond)
        seen = self.measurement

        def fit(z: Tensor) -> Tensor:
            return seen.log_prob(z) if self.likelihood else -0.5 * seen.residual(z).flatten(1).square().sum(1)

        out: Tensor = x0 + scale_at(self.scale, t, x) * gradient(fit, x0, self)
        return out if self.project is None else check.match("project(x0)", self.project(out), "x0", x0)


class DDNM(LinearPosteriorDenoiser):
    r"""Null-space projection: y determines the component in the row space of A, the network the null space.

    .. math:: D' = A^+ y + (I - A^+ A)\, D

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator; `std` is not used, and noise in y stays in the result.

    References:
        | Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model (Wang et al., 2023), arXiv:2212.00490
    """

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        x0 = self.model.x0(x, t, **cond)
        return x0 + self.A.pinv(self.measurement.residual(x0))


@checked
class DiffPIR(LinearPosteriorDenoiser):
    r"""Plug-and-play restoration: the proximal point of the data prediction under the measurement's likelihood.

    .. math:: D' = \arg\min_z \lVert y - A z\rVert^2 + \kappa\lVert z - D\rVert^2
              = D + A^T(A A^T + \kappa)^{-1}(y - A D), \qquad
              \kappa = \lambda\,\mathrm{std}^2\,\frac{\alpha^2}{\sigma^2}

    The published sampler is this denoiser with ``ss.DDIM()`` on the grid ``renoised(sde, times, zeta)``.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator; `std` may be 0.
        weight: Weight λ of the prior.

    References:
        | Denoising Diffusion Models for Plug-and-Play Image Restoration (Zhu et al., 2023), arXiv:2305.08995,
          algorithm 1
    """

    def __init__(self, model: AbstractDenoiser, measurement: Seen, weight: float = 1.0) -> None:
        super().__init__(model, measurement)
        self.weight = check.number("weight", weight, above=0)

    def extra_repr(self) -> str:
        return fields(weight=self.weight)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        A = self.A
        x0 = self.model.x0(x, t, **cond)
        r = self.measurement.residual(x0)
        if self.measurement.std == 0:
            return x0 + A.pinv(r)
        alpha, sigma = (check.expand(fn(t), r) for fn in (self.sde.alpha, self.sde.sigma))
        # Both sides are multiplied by σ², so that σ = 0 needs no special case.
        kappa = self.weight * self.measurement.require_noise("DiffPIR") ** 2 * alpha**2
        return x0 + check.expand(self.sde.sigma(t), x) ** 2 * A.adjoint(A.solve(r, sigma**2, kappa))


def isotropic_variance(sde: SDE, t: TimeT, data_std: float) -> TimeT:
    r"""Variance of x₀ given x_t for data N(0, s² I), :math:`\sigma^2 s^2 / (\alpha^2 s^2 + \sigma^2)`."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return sigma**2 * data_std**2 / (alpha**2 * data_std**2 + sigma**2)


def tweedie_gain(sde: SDE, t: float | Tensor, x: Tensor) -> float | Tensor:
    """σ²/α, the factor that maps ∇log p(y | x_t) to a shift of the data prediction."""
    return check.expand(sde.sigma(t) ** 2 / sde.alpha(t), x)
