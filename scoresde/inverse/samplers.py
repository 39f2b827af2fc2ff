r"""Posterior samplers that are more than a denoiser: they change the update, the noise or the number of states.

All take a denoiser, a :class:`Measurement` and a grid, and draw from a :class:`Noise`. None differentiates for the
caller: they run without a graph of their own.
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
from scoresde.denoiser import AbstractDenoiser
from scoresde.grids import check_grid, quadratic_vp
from scoresde.guidance.base import check_model
from scoresde.guidance.gradients import Graph, before_silence, gradient
from scoresde.inverse.denoisers import isotropic_variance
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, Mask
from scoresde.noise import Noise
from scoresde.sampling import _start, sample
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.solvers.catalogue import DPMSolverPP

Grid = int | Tensor | Sequence[float]
_START, _STEPS, _CHOICES, _FINAL = range(4)  # streams of a seed


@dataclass(frozen=True, eq=False)
class Replacement:
    r"""Inpainting by replacement, as a hook: at every node the known part is put to what it would be at that time.

    .. math:: x_t \leftarrow m\,(\alpha_t y + \sigma_t z) + (1 - m)\,x_t

    At σ = 0 that is y itself, so under every solver known pixels are exact at the end. What is unknown is only told
    of the known part at its own noise level; :func:`repaint`'s grid gives it time to agree.

    Arguments:
        sde: The process.
        measurement: Of a :class:`Mask`; `std` is not used.
        seed: Of z; a seed or a :class:`Noise`.
        fresh: Whether every node has its own z, or all of them one.

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
                f"`measurement` must be of a Mask: only there are the known numbers themselves part of the state, got "
                f"{type(self.measurement.operator).__name__}; DDNM replaces what any linear operator saw."
            )
        object.__setattr__(self, "_noise", _source(self.seed).fork(_STEPS))

    def __call__(self, node: int, t: Any, x: Tensor) -> Tensor:
        """The state with its known part replaced."""
        mask = self.measurement.operator
        assert isinstance(mask, Mask)
        alpha, sigma = (check.expand(fn(t), x) for fn in (self.sde.alpha, self.sde.sigma))
        known = mask.adjoint(self.measurement.data(x)).expand_as(x)
        z = self._noise.like(x, node if self.fresh else 0)
        return torch.where(mask.mask, alpha * known + sigma * z, x)


def repaint(sde: SDE, times: Tensor | Sequence[float], jump: int = 10, resample: int = 10) -> Tensor:
    """RePaint's zigzag: every `jump` legs are gone through `resample` times, with noise added back in between.

    With :class:`Replacement` as hook, under ``ss.DDPM()``, it is RePaint; from data (σ = 0) there is no way back up.

    Arguments:
        sde: The process.
        times: A grid that goes down.
        jump: How many legs to go back.
        resample: How often each stretch is gone through; 1 returns the grid.

    References:
        | RePaint: Inpainting Using Denoising Diffusion Probabilistic Models (Lugmayr et al., 2022), arXiv:2201.09865
    """
    grid = check_grid(sde, times)
    check.integer("jump", jump, least=1)
    check.integer("resample", resample, least=1)
    out = [grid[:1]]
    last = len(grid) - 1
    for i in range(0, last, jump):
        down = grid[i + 1 : min(i + jump, last) + 1]
        back = 0 if i + jump >= last else resample - 1
        out += [down, *([grid[i : i + 1], down] * back)]
    return torch.cat(out)


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
    r"""Denoising diffusion restoration: DDIM in the singular coordinates of A, each with its own noise.

    For a coordinate that A sees with singular value d, with :math:`\bar y = u^T y / d` and :math:`n = \alpha_s\,
    \mathrm{std}/d`:

    .. math::
        x_s = \begin{cases}
        \alpha_s D + \sigma_s(\sqrt{1-\eta^2}\,\varepsilon + \eta z) & \text{unseen} \\
        \alpha_s D + \sigma_s(\sqrt{1-\eta^2}\,\alpha_s(\bar y - D)/n + \eta z) & \sigma_s < n \\
        \alpha_s((1-\eta_b) D + \eta_b\bar y) + \sqrt{\sigma_s^2 - \eta_b^2 n^2}\,z & \sigma_s \ge n
        \end{cases}

    Arguments:
        model: The prior's denoiser.
        measurement: Linear; `std` may be 0.
        shape_or_x: Shape (B, *event), or a state at the grid's first time.
        grid: Times that go down, or a number of legs.
        eta: η.
        eta_b: η_b.
        seed: Of its noise.
        **cond: Conditions, handed to the network.

    Returns:
        (B, *event).

    References:
        | Denoising Diffusion Restoration Models (Kawar et al., 2022), arXiv:2201.11793
    """
    sde, times, noise = _ready(model, measurement, grid, seed)
    check.conditions(cond, ddrm)
    check.number("eta", eta, least=0, most=1)
    check.number("eta_b", eta_b, least=0, most=1)
    d, of_state, to_state, of_data = measurement.linear.spectrum()
    std, steps = measurement.std, noise.fork(_STEPS)
    alpha, sigma = sde.alpha(times[0]), sde.sigma(times[0])
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
        d = d.to(x)
        y = of_data(measurement.data(x)) / d
    else:
        x = _start(model, shape_or_x, times[0], noise, 1.0, torch.float32, None)
        d = d.to(x)
        y = of_data(measurement.data(x)) / d
        left = sigma**2 - (alpha * std / d) ** 2
        c = of_state(x)
        x = x + to_state(torch.where(left > 0, alpha * y + left.clamp_min(0).sqrt() * c / sigma, c) - c)
    keep = math.sqrt(1 - eta**2)
    for k, (t, s) in enumerate(pairwise(times)):
        x0 = model.x0(x, t, **cond)
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        z = steps.like(x, k)
        eps = (x - sde.alpha(t) * x0) / sde.sigma(t)
        x = alpha * x0 + sigma * (keep * eps + eta * z)
        n = alpha * std / d
        seen, z_seen = of_state(x0), of_state(z)
        sharp = alpha * ((1 - eta_b) * seen + eta_b * y) + (sigma**2 - (eta_b * n) ** 2).clamp_min(0).sqrt() * z_seen
        tiny = torch.finfo(x.dtype).tiny
        blunt = alpha * seen + sigma * (keep * alpha * (y - seen) / n.clamp_min(tiny) + eta * z_seen)
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
    r"""Decoupled annealing: at each noise level solve to data, sample around that with the measurement, noise again.

    .. math:: \hat x_0 = \text{flow}(x_t), \qquad
              x_0 \sim N(x_0; \hat x_0, r^2 I)\, N(y; A x_0, \mathrm{std}^2 I), \qquad
              x_s = \alpha_s x_0 + \sigma_s z, \qquad r^2 = \frac{\sigma^2 s^2}{\alpha^2 s^2 + \sigma^2}

    The middle step is Gaussian for a linear A and is sampled exactly here, where the paper runs Langevin dynamics; the
    paper's r = σ/α is ``data_std=math.inf``, which an exact sample bears only where σ/α is of the size of the data.

    Arguments:
        model: The prior's denoiser.
        measurement: Linear, std > 0.
        shape_or_x: Shape (B, *event), or a state at the grid's first time.
        grid: Noise levels that go down, or how many.
        steps: Legs of each inner solve; the evaluations are their product with the grid's.
        solver: Of the inner solves; by default DPM-Solver++ of order 2.
        data_std: s, the data's standard deviation.
        seed: Of its noise.
        **cond: Conditions, handed to the network.

    Returns:
        (B, *event).

    References:
        | Improving Diffusion Inverse Problem Solving with Decoupled Noise Annealing (Zhang et al., 2025),
          arXiv:2407.01521, algorithm 1
    """
    check.conditions(cond, daps)
    sde, times, noise = _ready(model, measurement, grid, seed)
    std, A = measurement.noisy("daps"), measurement.linear
    rule = DPMSolverPP(2) if solver is None else solver
    draws = noise.fork(_STEPS)
    x = _start(model, shape_or_x, times[0], noise, 1.0, torch.float32, None)
    for k, (t, s) in enumerate(pairwise(times)):
        inner = quadratic_vp(sde, steps if t > sde.t_min else 1, t_start=t)
        x0 = sample(model, x, rule, grid=inner, **cond)
        ratio = sde.sigma(t) / max(sde.alpha(t), 1e-12)
        var = ratio**2 if data_std == math.inf else isotropic_variance(sde, t, data_std)
        # Matheron's rule: a draw from the prior part, moved by what it and its own measurement miss.
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
    r"""Regularisation by denoising: one state that fits the measurement and that the network cannot improve.

    .. math:: \nabla_\mu \tfrac12\lVert y - A(\mu)\rVert^2 + w\,\frac{\sigma}{\alpha}\,(\varepsilon_\theta(x_t) -
              \varepsilon), \qquad x_t = \alpha\mu + \sigma\varepsilon

    followed by Adam, once for each time of the grid. It is a variational fit of a point: an optimum, not a sample; its
    spread is that of the noise in the optimisation and says nothing of the posterior's.

    Arguments:
        model: The prior's denoiser.
        measurement: Any differentiable operator; `std` is not used, `weight` is in its place.
        shape_or_x: Shape (B, *event) to start from A⁺y, or from zero if A is not linear; or the start.
        grid: Times that go down, or how many; a last one at σ = 0 is left out.
        lr: Of Adam.
        weight: w.
        seed: Of ε.
        **cond: Conditions, handed to the network.

    Returns:
        (B, *event).

    References:
        | A Variational Perspective on Solving Inverse Problems with Diffusion Models (Mardani et al., 2024),
          arXiv:2305.04391, algorithm 1
    """
    check.conditions(cond, red_diff)
    sde, times, noise = _ready(model, measurement, grid, seed)
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
    """What sequential Monte Carlo returns.

    Arguments:
        x: States, (N, *event).
        log_weights: Their normalised log-weights, (N,).
        ess: Effective sample size at every time of the grid, before resampling.
        log_evidence: Estimate of log p(y), in nats; its exponential is unbiased for the discretised prior.
    """

    x: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    ess: list[float]
    log_evidence: float

    def resampled(self, seed: int | Noise | None = None) -> Tensor:
        """As many states with equal weights, (N, *event)."""
        return self.x[systematic(self.log_weights, _source(seed).fork(_FINAL), 0)]


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
    r"""Twisted diffusion sampler: particles that are guided, weighted by what the guidance got wrong, and resampled.

    With DDPM's steps :math:`p(x_s \mid x_t) = N(m, v)` and the twist :math:`\tilde p(y \mid x_t) = N(y; A D,
    \mathrm{std}^2 + r^2 A A^T)`,

    .. math:: x_s \sim q = N\!\left(m + c_0\tfrac{\sigma^2}{\alpha}\nabla\log\tilde p(y \mid x_t),\, v\right), \qquad
              w \mathrel{*}= \frac{p(x_s \mid x_t)}{q(x_s \mid x_t)}\,\frac{\tilde p(y \mid x_s)}{\tilde p(y \mid x_t)}

    and :math:`\tilde p = p(y \mid x_0)` at the end: exact for the discretised prior as the number of particles grows,
    whatever the twist. All particles are samples of one posterior.

    Arguments:
        model: The prior's denoiser.
        measurement: Linear, one y, std > 0.
        shape_or_x: Shape (N, *event) of the particles, or their states at the grid's first time.
        grid: Times that go down, or a number of legs.
        data_std: Of the twist, see :class:`PiGDM`.
        threshold: Resample when fewer than this share of the particles are effective.
        seed: Of its noise.
        **cond: Conditions, handed to the network.

    References:
        | Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023),
          arXiv:2306.17775, algorithm 1
    """
    check.conditions(cond, twisted_smc)
    sde, times, noise = _ready(model, measurement, grid, seed)
    std, A = measurement.noisy("twisted_smc"), measurement.linear
    if len(measurement.y) != 1:
        raise ValueError(f"`y` must be one measurement, (1, *out), for all particles; got {len(measurement.y)} rows.")
    check.number("threshold", threshold, least=0, most=1)
    d, _, _, of_data = A.spectrum()
    unseen = math.prod(A.out) - len(d)
    steps, choices = noise.fork(_STEPS), noise.fork(_CHOICES)
    x = _start(model, shape_or_x, times[0], noise, 1.0, torch.float32, None)
    d = d.to(x)

    def log_twist(x0: Tensor, variance: float) -> Tensor:
        r = measurement.residual(x0)
        seen = of_data(r)
        total = std**2 + variance * d**2
        beside = (r.flatten(1).square().sum(1) - seen.square().sum(1)).clamp_min(0) if unseen else 0.0
        energy = (seen**2 / total + (2 * math.pi * total).log()).sum(1) + beside / std**2
        return -0.5 * (energy + unseen * math.log(2 * math.pi * std**2))

    def look(x: Tensor, t: float) -> tuple[Tensor, Tensor, Tensor]:
        """Data prediction, log-twist and its gradient."""
        variance = isotropic_variance(sde, t, data_std)
        graph = Graph(model, x, before_silence(sde, t), cond)
        slope = graph.pull(gradient(lambda x0: log_twist(x0, variance), graph.x0, model))
        x0 = graph.x0.detach()
        return x0, log_twist(x0, variance), slope

    x0, twist, slope = look(x, times[0])
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
        if v == 0:  # into data the step is the data prediction: nothing to choose, nothing to weigh
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
            x0, new, slope = look(x, s)
        log_w = log_w + log_pq + new - twist
        twist = new
    ess.append(_effective(log_w))
    log_z += _log_mean(log_w)
    return Particles(x, log_w.log_softmax(0), ess, log_z)


def systematic(log_weights: Tensor, noise: Noise, draw: int) -> Tensor:
    """Rows chosen in proportion to their weights, each floor or ceil of N w times, (N,) int64."""
    n = len(log_weights)
    u = noise.uniform((1, 1), draw, dtype=torch.float64)[0].to(log_weights.device)
    places = (torch.arange(n, device=log_weights.device) + u) / n
    edges = log_weights.double().softmax(0).cumsum(0)
    return torch.searchsorted(edges / edges[-1], places).clamp_max(n - 1)


def _effective(log_w: Tensor) -> float:
    return float((2 * log_w.double().logsumexp(0) - (2 * log_w.double()).logsumexp(0)).exp())


def _log_mean(log_w: Tensor) -> float:
    return float(log_w.double().logsumexp(0)) - math.log(len(log_w))


def _ready(
    model: AbstractDenoiser, measurement: Measurement, grid: Grid, seed: int | Noise | None
) -> tuple[SDE, list[float], Noise]:
    sde = check_model(model).sde
    if not isinstance(measurement, Measurement):
        raise TypeError(f"`measurement` must be Measurement(operator, y, std), got {type(measurement).__name__}.")
    times = quadratic_vp(sde, grid) if isinstance(grid, int) else check_grid(sde, grid)
    return sde, times.tolist(), _source(seed)


def _source(seed: int | Noise | None) -> Noise:
    return seed if isinstance(seed, Noise) else Noise(seed)
