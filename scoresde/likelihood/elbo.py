r"""Variational bounds, bits per dimension, and distances between models over time.

Let d be the denoiser and λ = log(α/σ). On a grid T = t_N > … > t_1 > 0, for a model with the posterior variances,

.. math::
    \log p(x_0) \ge \underbrace{E\log N(x_0; d(x_{t_1}), \tfrac{\sigma_1^2}{\alpha_1^2} I)}_{\text{reconstruction}}
    - \underbrace{\tfrac12\sum_{k\ge2}(e^{2\lambda_{k-1}} - e^{2\lambda_k})\,E|x_0 - d(x_{t_k})|^2}_{\text{consistency}}
    - \underbrace{\mathrm{KL}(q(x_T|x_0)\,\|\,p_T)}_{\text{prior}},

and in continuous time the sum is :math:`\int e^{2\lambda} E|x_0 - d|^2\,d\lambda`. The same integral of the squared
distance of two models, :math:`|d_a - d_b|^2`, is the KL divergence between their reverse SDEs (Girsanov).

References:
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
    | Variational Diffusion Models (Kingma et al., 2021), arXiv:2107.00630
    | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde.data import Standardize, bin_width
from scoresde.denoisers.base import AbstractDenoiser, Counter
from scoresde.denoisers.modes import check_ready, warn_untrained
from scoresde.denoisers.network import log_variance
from scoresde.grids.grid import check_grid
from scoresde.likelihood.confidence import Uncertain
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.processes.discrete import Discrete
from scoresde.processes.sde import SDE

VARIANCES = ("small", "large", "learned")


@checked
@dataclass(frozen=True)
class MonteCarlo:
    """Number and kind of the draws of a bound.

    Arguments:
        n_times: Number of times for each sample and repeat; a grid of at most this many steps uses each step once.
        repeats: Number of independent estimates, for the standard error; the cost is repeats (n_times + 1) evaluations.
        control: True for the control variate N(0, s²), whose loss is known: only the difference is estimated. This
            removes most of the noise if the data fills its space, and adds noise if it has few values. The default is
            true without `bins`; a learned variance never uses it.
    """

    n_times: int = 32
    repeats: int = 4
    control: bool | None = None

    def __post_init__(self) -> None:
        check.integer("n_times", self.n_times, at_least=1)
        check.integer("repeats", self.repeats, at_least=1)


@checked
@dataclass(frozen=True)
class Bins:
    """Bins of discrete data: `levels` bins that divide an interval.

    Arguments:
        levels: Number of bins, such as 256 for bytes.
        interval: Interval that the bins divide.
    """

    levels: int
    interval: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        check.integer("levels", self.levels, at_least=1)

    @property
    def width(self) -> float:
        """Width of a bin."""
        return bin_width(self.levels, self.interval)


@dataclass(frozen=True)
class Elbo(Uncertain):
    """A lower bound on log p(x) and its three terms: value = reconstruction − consistency − prior.

    Arguments:
        value: Bound in nats, in the scale of the given x, (B,).
        standard_error: Standard error of `value`, from independent repeats, (B,). With few repeats it is uncertain
            itself; use :meth:`interval`.
        reconstruction: Mean of log p(x_0 | x at the first time), (B,); it includes the log-determinant of `scale`.
        consistency: Sum of the KL divergences of the steps, (B,).
        prior: KL divergence between q(x_T | x_0) and the prior, (B,).
        nfe: Number of function evaluations for each sample.
        degrees: Degrees of freedom of `standard_error`: the number of repeats minus 1.
    """

    value: Tensor
    standard_error: Tensor = field(repr=False)
    reconstruction: Tensor = field(repr=False)
    consistency: Tensor = field(repr=False)
    prior: Tensor = field(repr=False)
    nfe: int
    degrees: float = math.nan


@checked
def elbo(
    model: AbstractDenoiser,
    x: Tensor,
    *,
    grid: Tensor | Sequence[float] | str | None = None,
    monte_carlo: MonteCarlo | None = None,
    variance: str = "small",
    bins: Bins | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    data_std: float = 1.0,
    t_min: float | None = None,
    scale: Standardize | None = None,
    grad: str = "off",
) -> Elbo:
    r"""Variational lower bound on log p(x) of each sample, in nats, on a grid of times or in continuous time.

    Times are stratified and drawn by importance sampling. In continuous time they are uniform in
    :math:`u = \tfrac12\log(1 + s^2e^{2\lambda})`, in which the loss of Gaussian data of standard deviation s is
    constant; on a grid the probability of a step is proportional to its length in u.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)``.
        x: Data, (B, *event).
        grid: Times from T down to a positive time, for the bound on this grid; or ``"continuous"`` for the bound in
            continuous time down to `t_min`. The default is continuous time, but for a :class:`Discrete` process its own
            steps, N … 1.
        monte_carlo: Number of times and repeats, as a :class:`MonteCarlo`.
        variance: Variance of the model's steps on a grid: ``"small"``, of the posterior given x_0; ``"large"``, of the
            forward step; or ``"learned"``, that of a network with ``learned_variance``.
        bins: Bins for a bound on a probability, as a :class:`Bins`; None for a density. x must lie on the middles of
            the bins. The last step is the probability of the bin of x; the outermost bins extend to infinity.
        seed: Seed of times and noise: an integer, one for each sample, or a :class:`Noise`.
        data_std: Standard deviation s of the data, for the prior at T and the choice of times.
        t_min: End of continuous time, by default that of the process.
        scale: Map from `x` to the data of the model; its log-determinant is added to a density.
        grad: Gradients, ``"off"`` or ``"full"``.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
        | Variational Diffusion Models (Kingma et al., 2021), arXiv:2107.00630

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.3)
        >>> x = mix.sample(4, seed=0)
        >>> bound = ss.elbo(mix, x, seed=0)
        >>> bool((bound.value < mix.log_prob(x) + 3 * bound.standard_error).all())
        True
    """
    check_ready(model)
    check.state("x", x)
    check.gradient_mode(grad, ("off", "full"))
    check.choice("variance", variance, VARIANCES)
    s = check.number("data_std", data_std, above=0)
    plan = MonteCarlo() if monte_carlo is None else monte_carlo
    R = plan.repeats
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    sde, counter = model.sde, Counter()
    counted = model.counted(counter)
    z = x if scale is None else scale(x)
    control = (bins is None if plan.control is None else bool(plan.control)) and variance != "learned"
    steps = Steps.of(sde, grid, t_min, s)
    warn_untrained(model, sde.t_min if t_min is None else t_min)
    if steps.times is None and variance != "small":
        raise ValueError(f"`variance`={variance!r} needs a grid: continuous time has only one variance; give `grid`.")
    with torch.set_grad_enabled(grad == "full"):
        source = noise.fork(Stream.DIFFUSED)
        sums, finite = [z.new_zeros(len(z)) for _ in range(R)], check.Finite("the terms of the bound")
        for i, (r, t, weight, k) in enumerate(steps.draw(plan.n_times, R, noise.fork(Stream.TIMES), z)):
            x_t = sde.perturb(z, t, source.like(z, i))
            term = _step_loss(counted, z, x_t, t, k, steps, variance, control)
            finite.add(term, t)
            sums[r] = sums[r] + weight * term
        consistency = torch.stack(sums) + steps.known(z, variance, control)
        reconstruction = _reconstruction(counted, z, steps, bins, control, noise.fork(Stream.DECODER), R)
        prior = _prior_gap(sde, z, s)
        finite.add(reconstruction.sum(0), steps.first)
        finite.add(prior, sde.T)
    finite.warn()
    if scale is not None and bins is None:
        reconstruction = reconstruction + scale.log_det(x)
    total = reconstruction - consistency - prior
    error = total.detach().std(0) / R**0.5 if R > 1 else torch.full_like(prior, math.nan)
    nfe = -(-counter.states // max(1, len(x)))
    return Elbo(total.mean(0), error, reconstruction.mean(0), consistency.mean(0), prior, nfe, R - 1)


# (repeat, time, weight, step on the grid); all but the repeat are numbers or (B,); the step may be None.
_Draw = tuple[int, Any, Any, Any]


@dataclass(frozen=True)
class Steps:
    """The steps of a bound, and the variable u = ½ log(1 + s²e^{2λ}) in which times are drawn uniformly."""

    sde: SDE
    s: float
    first: float
    times: Tensor | None  # increasing, t_1 … t_N, float64; None in continuous time

    @classmethod
    def of(cls, sde: SDE, grid: Tensor | Sequence[float] | str | None, t_min: float | None, s: float) -> Steps:
        if isinstance(grid, str):
            check.choice("grid", grid, ("continuous",))
        if isinstance(grid, str) or (grid is None and not isinstance(sde, Discrete)):
            return cls(sde, s, sde.t_min if t_min is None else check.number("t_min", t_min, above=0, below=sde.T), None)
        if t_min is not None:
            raise ValueError("`t_min` is for continuous time; a grid ends at its last time. Drop `t_min`.")
        if grid is None:
            assert isinstance(sde, Discrete)
            times = torch.arange(1, sde.N + 1, dtype=torch.float64)
        else:
            times = check_grid(sde, grid).flip(0)
            if float(times[0]) == 0 or float(times[-1]) != sde.T:
                raise ValueError(
                    f"`grid` must run from T = {sde.T:g} to a positive time, where the last step, the decoder, starts, "
                    f"got {float(times[-1]):g} to {float(times[0]):g}."
                )
        return cls(sde, s, float(times[0]), times)

    def u(self, t: float) -> float:
        """½ log(1 + s²e^{2λ}), 0 where α = 0."""
        return 0.5 * math.log1p((self.s * self.sde.alpha(t) / self.sde.sigma(t)) ** 2)

    def known(self, x: Tensor, variance: str, control: bool) -> Tensor:
        """Known part of the sum over steps, (B,): terms of the variances and, with `control`, the loss of N(0, s²)."""
        size = math.prod(x.shape[1:])
        if self.times is None:
            node, weight = legendre()
            u_T, u_1 = self.u(self.sde.T), self.u(self.first)
            u = u_T + node * (u_1 - u_T)
            t = self.sde.inverse_lam(0.5 * (torch.expm1(2 * u) / self.s**2).log()).clamp(0.0, self.sde.T)
            coefficient = weight * (u_1 - u_T) * (2 * u).exp() / self.s**2
            constant = 0.0
        elif variance == "learned":
            return x.new_zeros(len(x))
        else:
            s, t = self.times[:-1], self.times[1:]
            _, c_0, small = self.sde.posterior(s, t)
            v = small if variance == "small" else self.sde.transition(s, t)[1] ** 2
            coefficient = c_0**2 / (2 * v)
            constant = float((small / v - 1 - (small / v).log()).sum()) * size / 2
        if not control:
            return x.new_full((len(x),), constant)
        of_square = float((coefficient * _expected(self.sde, 1.0, 0, t, self.s)).sum())
        of_size = float((coefficient * _expected(self.sde, 0.0, size, t, self.s)).sum())
        return of_square * squared_norm(x) + (of_size + constant)

    def draw(self, n: int, repeats: int, noise: Noise, x: Tensor) -> list[_Draw]:
        """Times with weights: for each repeat Σ weight · loss is unbiased for the sum or integral of the loss."""
        shifts = noise.uniform((len(x), repeats), 0, dtype=x.dtype, device=x.device)
        if self.times is not None and n >= len(self.times) - 1:
            steps = range(1, len(self.times))
            return [(r, float(self.times[k]), 1.0, k) for r in range(repeats) for k in steps]
        if self.times is None:
            u_T, span = self.u(self.sde.T), self.u(self.first) - self.u(self.sde.T)
            strata = torch.arange(n, dtype=x.dtype, device=x.device)[:, None, None]
            u = u_T + (strata + shifts) / n * span  # (n, B, repeats)
            t = self.sde.inverse_lam(0.5 * (torch.expm1(2 * u) / self.s**2).log()).clamp(0.0, self.sde.T)
            weight = span / n * (2 * u).exp() / self.s**2  # e^{2λ}dλ = (1 + s²e^{2λ})/s² du
            return [(r, t[j, :, r], weight[j, :, r], None) for r in range(repeats) for j in range(n)]
        length = -torch.tensor([self.u(float(t)) for t in self.times], dtype=torch.float64).diff()
        p = (length / length.sum()).to(x)
        edges, times = p.cumsum(0)[:-1].contiguous(), self.times.to(x)
        out: list[_Draw] = []
        for r in range(repeats):
            for j in range(n):
                k = torch.searchsorted(edges, (j + shifts[:, r]) / n) + 1
                out.append((r, times[k], 1 / (n * p[k - 1]), k))
        return out


def squared_norm(d: Tensor) -> Tensor:
    """Squared norm of each sample, (B,)."""
    return d.square().flatten(1).sum(1)


def _square_error(model: AbstractDenoiser, x0: Tensor, x_t: Tensor, t: Any, s: float, control: bool) -> Tensor:
    """|x_0 − d|², (B,); `control` subtracts the same for the denoiser of N(0, s²), whose mean is known."""
    square_error = squared_norm(x0 - model.x0(x_t, t))
    if not control:
        return square_error
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    gain = check.expand(alpha * s**2 / (alpha**2 * s**2 + sigma**2), x0)
    return square_error - squared_norm(x0 - gain * x_t)


def _expected(sde: SDE, square: Any, size: int, t: Any, s: float) -> Any:
    r"""E|x_0 − d_G|² over ε for the denoiser of N(0, s²): (σ⁴|x_0|² + α²σ²s⁴D) / (α²s² + σ²)²."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return (sigma**4 * square + alpha**2 * sigma**2 * s**4 * size) / (alpha**2 * s**2 + sigma**2) ** 2


def _step_loss(
    model: AbstractDenoiser, x0: Tensor, x_t: Tensor, t: Any, k: Any, steps: Steps, variance: str, control: bool
) -> Tensor:
    """Loss of a step without the part that :meth:`Steps.known` returns, (B,)."""
    if steps.times is None:
        return _square_error(model, x0, x_t, t, steps.s, control)
    s: Any = float(steps.times[k - 1]) if isinstance(k, int) else steps.times.to(x0)[k - 1]
    _, c_0, small = model.sde.posterior(s, t)
    large = model.sde.transition(s, t)[1] ** 2
    if variance != "learned":
        v = small if variance == "small" else large
        return _square_error(model, x0, x_t, t, steps.s, control).mul(c_0**2 / (2 * v))
    d, output = model.x0_and_variance(x_t, t)
    lo, hi, c = (torch.as_tensor(check.expand(v, x0)).to(x0) for v in (small, large, c_0))
    excess = log_variance(model.kind.variance or "range", output, lo, hi) - lo.log()
    terms = (-excess).exp() * (1 + (c * (x0 - d)) ** 2 / lo) - 1 + excess
    return 0.5 * terms.flatten(1).sum(1)


def _reconstruction(
    model: AbstractDenoiser, x0: Tensor, steps: Steps, bins: Bins | None, control: bool, noise: Noise, repeats: int
) -> Tensor:
    """Log-probability of x_0 given the state at the first time, (repeats, B)."""
    sde, t = model.sde, steps.first
    out = []
    for r in range(repeats):
        x_1 = sde.perturb(x0, t, noise.like(x0, r))
        if bins is not None:
            out.append(_decode_bins(sde, x0, model.x0(x_1, t), t, bins))
            continue
        square_error = _square_error(model, x0, x_1, t, steps.s, control)
        if control:
            square_error = square_error + _expected(sde, squared_norm(x0), math.prod(x0.shape[1:]), t, steps.s)
        out.append(_decode(sde, x0, square_error, t))
    return torch.stack(out)


def _decode(sde: SDE, x0: Tensor, square_error: Tensor, t: float) -> Tensor:
    """Log N(x_0; d, σ²/α²) from |x_0 − d|²."""
    rho = sde.sigma(t) / sde.alpha(t)
    return -0.5 * square_error / rho**2 - math.prod(x0.shape[1:]) * (math.log(rho) + 0.5 * math.log(2 * math.pi))


def _decode_bins(sde: SDE, x0: Tensor, d: Tensor, t: float, bins: Bins) -> Tensor:
    """Log-probability of the bins of x_0 under N(d, σ²/α²), (B,)."""
    step = bins.width
    number = (x0 - bins.interval[0]) / step - 0.5
    if x0.device.type == "cpu" and bool(((number - number.round()).abs() > 1e-2).any()):
        raise ValueError(
            f"`x` must lie on the middles of {bins.levels} bins of {bins.interval}, as after "
            f"`dequantize(..., middle=True)`."
        )
    rho = sde.sigma(t) / sde.alpha(t)
    below, above = (x0 - d - step / 2) / rho, (x0 - d + step / 2) / rho
    # Use the side where both tails are small: their difference loses no digits.
    flip = below + above > 0
    below, above = torch.where(flip, -above, below), torch.where(flip, -below, above)
    first, last = number.round() <= 0, number.round() >= bins.levels - 1
    open_below, open_above = torch.where(flip, last, first), torch.where(flip, first, last)
    log_above = torch.where(open_above, 0.0, torch.special.log_ndtr(above))
    log_below = torch.where(open_below, -math.inf, torch.special.log_ndtr(below))
    return (log_above + torch.log1p(-(log_below - log_above).exp().clamp_max(1 - 1e-7))).flatten(1).sum(1)


def _prior_gap(sde: SDE, x0: Tensor, s: float) -> Tensor:
    """KL(N(αx_0, σ²) ‖ N(0, α²s² + σ²)) at T, (B,)."""
    alpha, sigma = sde.alpha(sde.T), sde.sigma(sde.T)
    ratio = sigma**2 / (alpha**2 * s**2 + sigma**2)
    gap = math.prod(x0.shape[1:]) * (ratio - 1 - math.log(ratio))
    return 0.5 * (gap + squared_norm(x0) * (alpha**2 * ratio / sigma**2))
