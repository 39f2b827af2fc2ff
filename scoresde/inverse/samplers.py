r"""Posterior samplers that change the update, the noise or the number of states, not only the denoiser.

Each takes a denoiser, a :class:`Measurement` and a grid. The result carries no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.start import draw_start
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import quadratic_vp
from scoresde.guidance.classifier import Graph, before_silence, gradient
from scoresde.inverse.denoisers import isotropic_variance
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, Mask
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE
from scoresde.sampling.solve import sample
from scoresde.solvers.deterministic import DPMSolverPP
from scoresde.solvers.rule import Solver

Grid = int | Tensor | Sequence[float]

_START, _STEPS, _CHOICES, _FINAL = range(4)  # streams of a seed


@dataclass(frozen=True, eq=False)
class Replacement:
    r"""Inpainting by replacement: a hook that sets the known entries to a noised measurement at every node.

    .. math:: x_t \leftarrow m\,(\alpha_t y + \sigma_t z) + (1 - m)\,x_t

    At σ = 0 the known entries equal y, with every solver. The unknown entries depend on the known ones only through
    the noisy state, so the two parts may disagree; the grid of :func:`repaint` repeats steps to reduce this error.

    Arguments:
        sde: The process.
        measurement: Measurement with a :class:`Mask`; `std` is not used.
        seed: Seed of z, or a :class:`Noise`.
        fresh: Draw a new z at every node; False uses the same z at all nodes.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, appendix I.2

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> seen = ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), torch.tensor([[0.5]]), std=0)
        >>> x = ss.sample(prior, (3, 2), steps=10, seed=0, hook=ss.inverse.Replacement(prior.sde, seen, seed=1))
        >>> x[:, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """

    sde: SDE
    measurement: Measurement
    seed: int | Noise | None = None
    fresh: bool = True
    _noise: Noise = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.measurement.operator, Mask):
            raise TypeError(
                f"`measurement` must have a Mask as its operator, got {type(self.measurement.operator).__name__}; use "
                f"DDNM for other linear operators."
            )
        object.__setattr__(self, "_noise", _as_noise(self.seed).fork(_STEPS))

    def __call__(self, node: int, t: Any, x: Tensor) -> Tensor:
        """Replace the known entries of the state."""
        mask = self.measurement.operator
        assert isinstance(mask, Mask)
        alpha, sigma = (check.expand(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        known = mask.adjoint(self.measurement.data(x)).expand_as(x)
        z = self._noise.like(x, node if self.fresh else 0)
        return torch.where(mask.mask, alpha * known + sigma * z, x)


@torch.no_grad()
def ddrm(
    model: AbstractDenoiser,
    measurement: Measurement,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 20,
    *,
    eta: float = 0.85,
    eta_b: float = 1.0,
    seed: int | Noise | None = None,
    **cond: Any,
) -> Tensor:
    r"""Denoising diffusion restoration (DDRM): DDIM in the singular coordinates of A, each with its own noise level.

    A coordinate with singular value d > 0 has :math:`\bar y = u^T y / d` and :math:`n = \alpha_s\,\mathrm{std}/d`; a
    coordinate in the null space of A is unseen:

    .. math::
        x_s = \begin{cases}
        \alpha_s D + \sigma_s(\sqrt{1-\eta^2}\,\varepsilon + \eta z) & \text{unseen} \\
        \alpha_s D + \sigma_s(\sqrt{1-\eta^2}\,\alpha_s(\bar y - D)/n + \eta z) & \sigma_s < n \\
        \alpha_s((1-\eta_b) D + \eta_b\bar y) + \sqrt{\sigma_s^2 - \eta_b^2 n^2}\,z & \sigma_s \ge n
        \end{cases}

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator; `std` may be 0.
        shape_or_x: Shape (B, *event), or a state at the first time.
        grid: Decreasing times, or a number of steps.
        eta: Stochasticity η in [0, 1], without effect where σ_s ≥ n.
        eta_b: Weight η_b of the measurement where σ_s ≥ n, in [0, 1].
        seed: Seed of the noise, or a :class:`Noise`.
        **cond: Conditions for the network.

    Returns:
        Samples, (B, *event).

    References:
        | Denoising Diffusion Restoration Models (Kawar et al., 2022), arXiv:2201.11793
    """
    sde, times, noise = _prepare(model, measurement, grid, seed)
    check.conditions(cond, ddrm)
    check.number("eta", eta, at_least=0, at_most=1)
    check.number("eta_b", eta_b, at_least=0, at_most=1)
    d, of_state, to_state, of_data = measurement.linear.spectrum()
    std, steps = measurement.std, noise.fork(_STEPS)
    alpha, sigma = sde.alpha(times[0]), sde.sigma(times[0])
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
        d = d.to(x)
        y = of_data(measurement.data(x)) / d
    else:
        x = draw_start(model, shape_or_x, times[0], noise, 1.0, torch.float32, None)
        d = d.to(x)
        y = of_data(measurement.data(x)) / d
        left = sigma**2 - (alpha * std / d) ** 2
        c = of_state(x)
        x = x + to_state(torch.where(left > 0, alpha * y + left.clamp_min(0).sqrt() * c / sigma, c) - c)
    c_eps = math.sqrt(1 - eta**2)
    for k, (t, s) in enumerate(pairwise(times)):
        x0 = model.x0(x, t, **cond)
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        z = steps.like(x, k)
        eps = (x - sde.alpha(t) * x0) / sde.sigma(t)
        x = alpha * x0 + sigma * (c_eps * eps + eta * z)
        n = alpha * std / d
        seen, z_seen = of_state(x0), of_state(z)
        sharp = alpha * ((1 - eta_b) * seen + eta_b * y) + (sigma**2 - (eta_b * n) ** 2).clamp_min(0).sqrt() * z_seen
        tiny = torch.finfo(x.dtype).tiny
        blunt = alpha * seen + sigma * (c_eps * alpha * (y - seen) / n.clamp_min(tiny) + eta * z_seen)
        x = x + to_state(torch.where(sigma >= n, sharp, blunt) - of_state(x))
    return x


@torch.no_grad()
def daps(
    model: AbstractDenoiser,
    measurement: Measurement,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 20,
    *,
    steps: int = 5,
    solver: Solver | None = None,
    data_std: float = 1.0,
    seed: int | Noise | None = None,
    **cond: Any,
) -> Tensor:
    r"""Decoupled annealing (DAPS): at each noise level, solve to data, sample given y, and add noise again.

    .. math:: \hat x_0 = \text{flow}(x_t), \qquad
              x_0 \sim N(x_0; \hat x_0, r^2 I)\, N(y; A x_0, \mathrm{std}^2 I), \qquad
              x_s = \alpha_s x_0 + \sigma_s z, \qquad r^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}

    The distribution of x₀ given y is Gaussian for a linear A and is sampled exactly; the paper runs Langevin dynamics.
    ``data_std=math.inf`` gives the paper's r = σ/α; use it only if σ/α is not much larger than the data.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator and std > 0.
        shape_or_x: Shape (B, *event), or a state at the first time.
        grid: Decreasing times, or a number of noise levels.
        steps: Number of steps of each inner solve; all of them together take about ``steps`` × levels evaluations.
        solver: Solver of the inner solves; by default DPM-Solver++ of order 2.
        data_std: Standard deviation s of the data.
        seed: Seed of the noise, or a :class:`Noise`.
        **cond: Conditions for the network.

    Returns:
        Samples, (B, *event).

    References:
        | Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing (Zhang et al., 2025),
          arXiv:2407.01521, algorithm 1
    """
    check.conditions(cond, daps)
    sde, times, noise = _prepare(model, measurement, grid, seed)
    std, A = measurement.noisy("daps"), measurement.linear
    inner_solver = DPMSolverPP(2) if solver is None else solver
    draws = noise.fork(_STEPS)
    x = draw_start(model, shape_or_x, times[0], noise, 1.0, torch.float32, None)
    for k, (t, s) in enumerate(pairwise(times)):
        inner = quadratic_vp(sde, steps if t > sde.t_min else 1, t_start=t)
        x0 = sample(model, x, inner_solver, grid=inner, **cond)
        ratio = sde.sigma(t) / max(sde.alpha(t), 1e-12)
        var = ratio**2 if data_std == math.inf else isotropic_variance(sde, t, data_std)
        # Matheron's rule: a prior sample, corrected with the residual of its own simulated measurement.
        drawn = x0 + math.sqrt(var) * draws.like(x, 3 * k)
        r = measurement.residual(drawn)
        r = r + std * draws.normal(r.shape, 3 * k + 1, dtype=r.dtype, device=r.device)
        x0 = drawn + var * A.adjoint(A.solve(r, var, std**2))
        x = sde.alpha(s) * x0 + sde.sigma(s) * draws.like(x, 3 * k + 2)
    return x


def red_diff(
    model: AbstractDenoiser,
    measurement: Measurement,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 100,
    *,
    lr: float = 0.1,
    weight: float = 0.25,
    seed: int | Noise | None = None,
    **cond: Any,
) -> Tensor:
    r"""Regularisation by denoising (RED-diff): Adam on a state μ, with one step for each time of the grid.

    .. math:: \nabla_\mu \tfrac12\lVert y - A(\mu)\rVert^2 + w\,\frac{\sigma}{\alpha}\,(\varepsilon_\theta(x_t) -
              \varepsilon), \qquad x_t = \alpha\mu + \sigma\varepsilon

    is the gradient in μ. The result is an optimum, not a posterior sample: its variance comes from the noise in the
    optimisation, not from the posterior.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with any differentiable operator; `weight` replaces `std`, which is not used.
        shape_or_x: Initial state, or shape (B, *event) to start from A⁺y (from 0 if A is not linear).
        grid: Decreasing times, or a number of steps; a time with σ = 0 is skipped.
        lr: Learning rate of Adam.
        weight: Weight w of the regulariser.
        seed: Seed of ε, or a :class:`Noise`.
        **cond: Conditions for the network.

    Returns:
        Optimised states, (B, *event).

    References:
        | A Variational Perspective on Solving Inverse Problems with Diffusion Models (Mardani et al., 2024),
          arXiv:2305.04391, algorithm 1
    """
    check.conditions(cond, red_diff)
    sde, times, noise = _prepare(model, measurement, grid, seed)
    draws = noise.fork(_STEPS)
    if isinstance(shape_or_x, Tensor):
        mu = check.state("x", shape_or_x).detach().clone()
    else:
        mu = torch.zeros(tuple(shape_or_x), device=measurement.y.device)
        if isinstance(measurement.operator, Linear):
            mu = mu + measurement.operator.pinv(measurement.data(mu))
    adam = torch.optim.Adam([mu.requires_grad_()], lr=lr, betas=(0.9, 0.99))
    for k, t in enumerate(t for t in times if sde.sigma(t) > 0):
        with torch.no_grad():
            t = before_silence(sde, t)
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            eps = draws.like(mu, k)
            fit = gradient(lambda m: 0.5 * measurement.residual(m).flatten(1).square().sum(1), mu, measurement)
            mu.grad = fit + weight * sigma / alpha * (model.eps(alpha * mu + sigma * eps, t, **cond) - eps)
        adam.step()
    return mu.detach()


@dataclass(frozen=True)
class Particles:
    """Weighted samples from sequential Monte Carlo.

    Arguments:
        x: Particles, (N, *event).
        log_weights: Normalised log-weights, (N,).
        ess: Effective sample size at every time of the grid, before resampling.
        log_evidence: Estimate of log p(y) in nats; its exponential is unbiased for the discretised prior.
    """

    x: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    ess: list[float]
    log_evidence: float

    def resampled(self, seed: int | Noise | None = None) -> Tensor:
        """Resample N particles with equal weights, (N, *event)."""
        return self.x[systematic(self.log_weights, _as_noise(seed).fork(_FINAL), 0)]


@torch.no_grad()
def twisted_smc(
    model: AbstractDenoiser,
    measurement: Measurement,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid = 50,
    *,
    data_std: float = 1.0,
    threshold: float = 0.5,
    seed: int | Noise | None = None,
    **cond: Any,
) -> Particles:
    r"""Twisted diffusion sampler: sequential Monte Carlo with guided proposals.

    With the DDPM step :math:`p(x_s \mid x_t) = N(m, v)` and the twist :math:`\tilde p(y \mid x_t) = N(y; A D,
    \mathrm{std}^2 + r^2 A A^T)`,

    .. math:: x_s \sim q = N\!\left(m + c_0\tfrac{\sigma^2}{\alpha}\nabla\log\tilde p(y \mid x_t),\, v\right), \qquad
              w \mathrel{*}= \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)}\,\frac{\tilde p(y \mid x_s)}{\tilde p(y \mid x_t)}

    and :math:`\tilde p = p(y \mid x_0)` at the last time. The result is exact for the discretised prior as N grows, for
    any twist. All particles are samples of one posterior.

    Arguments:
        model: Denoiser of the prior.
        measurement: Measurement with a linear operator, one y and std > 0.
        shape_or_x: Shape (N, *event), or particles at the first time.
        grid: Decreasing times, or a number of steps.
        data_std: Standard deviation s of the data in r², see :class:`PiGDM`.
        threshold: Fraction in [0, 1]; the particles are resampled when the effective sample size is below this × N.
        seed: Seed of the noise, or a :class:`Noise`.
        **cond: Conditions for the network.

    References:
        | Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023),
          arXiv:2306.17775, algorithm 1
    """
    check.conditions(cond, twisted_smc)
    sde, times, noise = _prepare(model, measurement, grid, seed)
    std, A = measurement.noisy("twisted_smc"), measurement.linear
    if len(measurement.y) != 1:
        raise ValueError(f"`y` must be one measurement, (1, *out), for all particles, got {len(measurement.y)} rows.")
    check.number("threshold", threshold, at_least=0, at_most=1)
    d, _, _, of_data = A.spectrum()
    unseen = math.prod(A.out) - len(d)  # dimensions of y outside the range of A
    steps, choices = noise.fork(_STEPS), noise.fork(_CHOICES)
    x = draw_start(model, shape_or_x, times[0], noise, 1.0, torch.float32, None)
    d = d.to(x)

    def log_twist(x0: Tensor, variance: float) -> Tensor:
        r = measurement.residual(x0)
        seen = of_data(r)
        total = std**2 + variance * d**2
        outside = (r.flatten(1).square().sum(1) - seen.square().sum(1)).clamp_min(0) if unseen else 0.0
        energy = (seen**2 / total + (2 * math.pi * total).log()).sum(1) + outside / std**2
        return -0.5 * (energy + unseen * math.log(2 * math.pi * std**2))

    def evaluate(x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Data prediction, log-twist and the gradient of the log-twist."""
        variance = isotropic_variance(sde, t, data_std)
        graph = Graph(model, x, before_silence(sde, t), cond)
        slope = graph.pull(gradient(lambda x0: log_twist(x0, variance), graph.x0, model))
        x0 = graph.x0.detach()
        return x0, log_twist(x0, variance), slope

    x0, twist, slope = evaluate(x, times[0])
    log_w, log_z, ess = twist, 0.0, []
    for k, (t, s) in enumerate(pairwise(times)):
        ess.append(_effective(log_w))
        if ess[-1] < threshold * len(x):
            log_z += _log_mean(log_w)
            rows = systematic(log_w, choices, k)
            x, x0, twist, slope = x[rows], x0[rows], twist[rows], slope[rows]
            log_w = torch.zeros_like(log_w)
        c_t, c_0, v = sde.posterior(s, t)
        mean = c_t * x + c_0 * x0
        if v == 0:  # a step to σ = 0 is deterministic, so p/q = 1
            x, log_pq = mean, torch.zeros_like(twist)
        else:
            u = before_silence(sde, t)
            shift = c_0 * sde.sigma(u) ** 2 / sde.alpha(u) * slope
            z = steps.like(x, k)
            x = mean + shift + math.sqrt(v) * z
            log_pq = -(0.5 * shift**2 / v + shift * z / math.sqrt(v)).flatten(1).sum(1)
        if k == len(times) - 2:
            new = measurement.log_prob(x)
        else:
            x0, new, slope = evaluate(x, s)
        log_w = log_w + log_pq + new - twist
        twist = new
    ess.append(_effective(log_w))
    log_z += _log_mean(log_w)
    return Particles(x, log_w.log_softmax(0), ess, log_z)


def systematic(log_weights: Tensor, noise: Noise, draw: int) -> Tensor:
    """Systematic resampling: row indices (N,) int64, where a row of weight w appears ⌊N w⌋ or ⌈N w⌉ times."""
    n = len(log_weights)
    u = noise.uniform((1, 1), draw, dtype=torch.float64)[0].to(log_weights.device)
    places = (torch.arange(n, device=log_weights.device) + u) / n
    edges = log_weights.double().softmax(0).cumsum(0)
    return torch.searchsorted(edges / edges[-1], places).clamp_max(n - 1)


def _effective(log_w: Tensor) -> float:
    return float((2 * log_w.double().logsumexp(0) - (2 * log_w.double()).logsumexp(0)).exp())


def _log_mean(log_w: Tensor) -> float:
    return float(log_w.double().logsumexp(0)) - math.log(len(log_w))


def _prepare(
    model: AbstractDenoiser, measurement: Measurement, grid: Grid, seed: int | Noise | None
) -> tuple[SDE, list[float], Noise]:
    sde = check_model(model).sde
    if not isinstance(measurement, Measurement):
        raise TypeError(f"`measurement` must be Measurement(operator, y, std), got {type(measurement).__name__}.")
    times = quadratic_vp(sde, grid) if isinstance(grid, int) else check_grid(sde, grid)
    return sde, times.tolist(), _as_noise(seed)


def _as_noise(seed: int | Noise | None) -> Noise:
    return seed if isinstance(seed, Noise) else Noise(seed)
