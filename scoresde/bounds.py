r"""Variational bounds, bits per dimension, and distances between models over time.

With λ = log(α/σ), E|x_0 − d(x_t)|² is all that the bounds need. On a grid T = t_N > … > t_1 > 0, with the posterior
variances as the model's,

.. math::
    \log p(x_0) \ge \underbrace{E\log N(x_0; d(x_{t_1}), \tfrac{\sigma_1^2}{\alpha_1^2} I)}_{\text{reconstruction}}
    - \underbrace{\tfrac12\sum_{k\ge2}(e^{2\lambda_{k-1}} - e^{2\lambda_k})\,E|x_0 - d(x_{t_k})|^2}_{\text{consistency}}
    - \underbrace{\mathrm{KL}(q(x_T|x_0)\,\|\,p_T)}_{\text{prior}},

and in continuous time the sum is :math:`\int e^{2\lambda} E|x_0 - d|^2\,d\lambda`. The same integral of the squared
distance of two models, :math:`|d_a - d_b|^2`, is the relative entropy of their reverse SDEs (Girsanov).

References:
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
    | Variational Diffusion Models (Kingma et al., 2021), arXiv:2107.00630
    | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.data import Standardize
from scoresde.denoiser import AbstractDenoiser, Denoiser
from scoresde.discrete import Discrete
from scoresde.grids import check_grid
from scoresde.noise import Noise
from scoresde.quadrature import legendre
from scoresde.sde import SDE

_EPS, _TIMES, _DECODER, _DEQUANTISE = 3, 4, 5, 6  # streams of a seed
VARIANCES = ("small", "large", "learned")


@dataclass(frozen=True)
class Elbo:
    """A lower bound on log p(x) and its three terms: value = reconstruction − consistency − prior.

    Arguments:
        value: In nats, in the scale that x was given in, (B,).
        standard_error: Of `value`, from independent repeats, (B,).
        reconstruction: E log p(x_0 | x at the first time), (B,); the log-determinant of a scale is in here.
        consistency: The relative entropies of the steps, summed, (B,).
        prior: The relative entropy of q(x_T | x_0) and the prior, (B,).
        nfe: Evaluations of the network for each sample.
    """

    value: Tensor
    standard_error: Tensor = field(repr=False)
    reconstruction: Tensor = field(repr=False)
    consistency: Tensor = field(repr=False)
    prior: Tensor = field(repr=False)
    nfe: int


def elbo(
    model: AbstractDenoiser,
    x: Tensor,
    *,
    grid: Tensor | Sequence[float] | None = None,
    continuous: bool | None = None,
    n_times: int = 32,
    repeats: int = 4,
    variance: str = "small",
    levels: int = 0,
    interval: tuple[float, float] = (-1.0, 1.0),
    control: bool | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    data_std: float = 1.0,
    t_min: float | None = None,
    scale: Standardize | None = None,
    grad: str = "off",
    **cond: Any,
) -> Elbo:
    r"""The variational bound of each sample in nats: on a grid of times, or in continuous time.

    Times are stratified and drawn by importance: in continuous time evenly in
    :math:`\tfrac12\log(1 + s^2e^{2\lambda})`, in which the loss of Gaussian data of deviation s is constant; on
    a grid by the steps' lengths in it.

    Arguments:
        model: A denoiser.
        x: Data, (B, *event).
        grid: Times from T down to a positive one, for the bound of that many steps. By default a :class:`Discrete`
            process' own steps, N … 1.
        continuous: The continuous-time bound down to `t_min`; by default unless there is a grid or β list.
        n_times: Times for each sample and repeat; from the number of steps on, each step is taken once.
        repeats: Independent estimates, whose scatter is the standard error; evaluations are repeats (n_times + 1).
        variance: Of the model's steps on a grid: ``"small"``, that of the posterior given x_0, ``"large"``, that of the
            forward step, or ``"learned"``, between the two as a network with ``learned_variance`` says.
        levels: 0 for a density of x. Otherwise x lies on the middles of this many bins of `interval`, and the last
            step is the mass of its bin, the outermost reaching to infinity: the bound is then on a probability.
        interval: What the bins divide.
        control: Estimate only what sets the model apart from the Gaussian N(0, s²), whose loss is known. That takes
            most of the noise out where data fills its space, and adds noise where it sits on few values; by default it
            is used unless there are `levels`.
        seed: Of times and noise: an integer, one for each sample, or a :class:`Noise`.
        data_std: s, for the prior at T and the choice of times.
        t_min: Where continuous time ends, by default that of the process.
        scale: The map that the model's data went through; its log-determinant is added and `x` is given before it.
        grad: ``"off"`` or ``"full"``.
        **cond: Conditions, handed to the network.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.3)
        >>> x = mix.sample(4, seed=0)
        >>> bound = ss.elbo(mix, x, seed=0)
        >>> bool((bound.value < mix.log_prob(x) + 3 * bound.standard_error).all())
        True
    """
    check.conditions(cond, elbo)
    check.state("x", x)
    check.choice("grad", grad, ("off", "full"))
    check.choice("variance", variance, VARIANCES)
    R, s = check.integer("repeats", repeats, least=1), check.number("data_std", data_std, above=0)
    check.integer("n_times", n_times, least=1)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    sde = _sde_of(model)
    z = x if scale is None else scale(x)
    control = (not levels if control is None else bool(control)) and variance != "learned"
    steps = _Steps.of(sde, grid, continuous, t_min, s)
    if steps.times is None and variance != "small":
        raise ValueError(f"`variance`={variance!r} is of steps on a grid; in continuous time they all agree.")
    with torch.set_grad_enabled(grad == "full"):
        draws = steps.draw(n_times, R, noise.fork(_TIMES), z)
        source, decoder = noise.fork(_EPS), noise.fork(_DECODER)
        sums = [z.new_zeros(len(z)) for _ in range(R)]
        for i, (r, t, weight, k) in enumerate(draws):
            x_t = sde.perturb(z, t, source.like(z, i))
            sums[r] = sums[r] + weight * _step_loss(model, sde, z, x_t, t, k, steps, variance, control, cond)
        consistency, t = torch.stack(sums), steps.first
        consistency = consistency + steps.known(z, variance, control)
        decoded = []
        for r in range(R):
            x_1 = sde.perturb(z, t, decoder.like(z, r))
            if levels:
                decoded.append(_decode_bins(sde, z, model.x0(x_1, t, **cond), t, levels, interval))
            else:
                apart = _apart(model, z, x_1, t, s, control, cond)
                if control:
                    apart = apart + _expected(sde, _square(z), math.prod(z.shape[1:]), t, s)
                decoded.append(_decode(sde, z, apart, t))
        reconstruction = torch.stack(decoded)
        prior = _prior_gap(sde, z, s)
    if scale is not None and not levels:
        reconstruction = reconstruction + scale.log_det(x)
    total = reconstruction - consistency - prior
    error = total.detach().std(0) / R**0.5 if R > 1 else torch.full_like(prior, math.nan)
    return Elbo(total.mean(0), error, reconstruction.mean(0), consistency.mean(0), prior, len(draws) + R)


def _sde_of(model: AbstractDenoiser) -> SDE:
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`model` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    return model.sde


# r, the repeat; t, (B,) or a number; weight, (B,) or a number; k, the step on the grid, (B,) or a number.
_Draw = tuple[int, Any, Any, Any]


@dataclass(frozen=True)
class _Steps:
    """Where time is cut, and the variable u = ½ log(1 + s²e^{2λ}) in which draws are even."""

    sde: SDE
    s: float
    first: float
    times: Tensor | None  # increasing, t_1 … t_N, float64; None in continuous time

    @classmethod
    def of(cls, sde: SDE, grid: Any, continuous: bool | None, t_min: float | None, s: float) -> _Steps:
        if grid is not None and continuous:
            raise ValueError("`grid` is for the bound on steps; drop it, or `continuous`.")
        if grid is None and not isinstance(sde, Discrete):
            if continuous is False:
                raise ValueError(f"`grid` must say the steps of a bound on {type(sde).__name__}, which has none.")
            continuous = True
        if continuous:
            return cls(sde, s, sde.t_min if t_min is None else check.number("t_min", t_min, above=0, below=sde.T), None)
        if t_min is not None:
            raise ValueError("`t_min` is for continuous time; a grid ends where its last time says.")
        if grid is None:
            assert isinstance(sde, Discrete)
            times = torch.arange(1, sde.N + 1, dtype=torch.float64)
        else:
            times = check_grid(sde, grid).flip(0)
            if float(times[0]) == 0 or float(times[-1]) != sde.T:
                raise ValueError(
                    f"`grid` must run from T = {sde.T:g} to a positive time, where the last step, the decoder, starts; "
                    f"got {float(times[-1]):g} to {float(times[0]):g}."
                )
        return cls(sde, s, float(times[0]), times)

    def u(self, t: float) -> float:
        """½ log(1 + s²e^{2λ}), 0 where α = 0."""
        return 0.5 * math.log1p((self.s * self.sde.alpha(t) / self.sde.sigma(t)) ** 2)

    def known(self, x: Tensor, variance: str, control: bool) -> Tensor:
        """What all steps cost by their variances, and with `control` what they would cost N(0, s²), (B,)."""
        size = math.prod(x.shape[1:])
        if self.times is None:
            node, weight = legendre()
            u_T, u_1 = self.u(self.sde.T), self.u(self.first)
            u = u_T + node * (u_1 - u_T)
            t = self.sde._t_of_lam(0.5 * (torch.expm1(2 * u) / self.s**2).log()).clamp(0.0, self.sde.T)
            coefficient = weight * (u_1 - u_T) * (2 * u).exp() / self.s**2
            spare = 0.0
        elif variance == "learned":
            return x.new_zeros(len(x))
        else:
            s, t = self.times[:-1], self.times[1:]
            _, c_0, small = self.sde.posterior(s, t)
            v = small if variance == "small" else self.sde.transition(s, t)[1] ** 2
            coefficient = c_0**2 / (2 * v)
            spare = float((small / v - 1 - (small / v).log()).sum()) * size / 2
        if not control:
            return x.new_full((len(x),), spare)
        of_square = float((coefficient * _expected(self.sde, 1.0, 0, t, self.s)).sum())
        of_size = float((coefficient * _expected(self.sde, 0.0, size, t, self.s)).sum())
        return of_square * _square(x) + (of_size + spare)

    def draw(self, n: int, repeats: int, noise: Noise, x: Tensor) -> list[_Draw]:
        """Times with weights: Σ weight · loss over a repeat's draws is unbiased for the sum or integral of the loss."""
        shifts = noise.uniform((len(x), repeats), 0, dtype=x.dtype, device=x.device)
        if self.times is not None and n >= len(self.times) - 1:
            steps = range(1, len(self.times))
            return [(r, float(self.times[k]), 1.0, k) for r in range(repeats) for k in steps]
        if self.times is None:
            u_T, span = self.u(self.sde.T), self.u(self.first) - self.u(self.sde.T)
            strata = torch.arange(n, dtype=x.dtype, device=x.device)[:, None, None]
            u = u_T + (strata + shifts) / n * span  # (n, B, repeats)
            t = self.sde._t_of_lam(0.5 * (torch.expm1(2 * u) / self.s**2).log()).clamp(0.0, self.sde.T)
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


def _square(d: Tensor) -> Tensor:
    return d.square().flatten(1).sum(1)


def _apart(
    model: AbstractDenoiser, x0: Tensor, x_t: Tensor, t: Any, s: float, control: bool, cond: dict[str, Any]
) -> Tensor:
    """|x_0 − d|², with `control` less the same of the Gaussian N(0, s²), whose expectation is known, (B,)."""
    apart = _square(x0 - model.x0(x_t, t, **cond))
    if not control:
        return apart
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    gain = check.expand(alpha * s**2 / (alpha**2 * s**2 + sigma**2), x0)
    return apart - _square(x0 - gain * x_t)


def _expected(sde: SDE, square: Any, size: int, t: Any, s: float) -> Any:
    r"""E|x_0 − d_G|² over ε: (σ⁴|x_0|² + α²σ²s⁴D) / (α²s² + σ²)²."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    return (sigma**4 * square + alpha**2 * sigma**2 * s**4 * size) / (alpha**2 * s**2 + sigma**2) ** 2


def _step_loss(
    model: AbstractDenoiser,
    sde: SDE,
    x0: Tensor,
    x_t: Tensor,
    t: Any,
    k: Any,
    steps: _Steps,
    variance: str,
    control: bool,
    cond: dict[str, Any],
) -> Tensor:
    """What a step costs beyond what is known of it, (B,)."""
    if steps.times is None:
        return _apart(model, x0, x_t, t, steps.s, control, cond)
    s: Any = float(steps.times[k - 1]) if isinstance(k, int) else steps.times.to(x0)[k - 1]
    _, c_0, small = sde.posterior(s, t)
    large = sde.transition(s, t)[1] ** 2
    if variance != "learned":
        v = small if variance == "small" else large
        apart = _apart(model, x0, x_t, t, steps.s, control, cond)
        return apart.mul(c_0**2 / (2 * v))
    if not isinstance(model, Denoiser):
        raise TypeError(
            f"`variance`='learned' needs a Denoiser with learned_variance=True, got {type(model).__name__}."
        )
    d, share = model.x0_and_variance(x_t, t, **cond)
    lo, hi, c = (torch.as_tensor(check.expand(v, x0)).to(x0) for v in (small, large, c_0))
    excess = (share + 1) / 2 * (hi / lo).log()  # log of the model's variance over the posterior's
    terms = (-excess).exp() * (1 + (c * (x0 - d)) ** 2 / lo) - 1 + excess
    return 0.5 * terms.flatten(1).sum(1)


def _decode(sde: SDE, x0: Tensor, apart: Tensor, t: float) -> Tensor:
    """Log N(x_0; d, σ²/α²) of |x_0 − d|²."""
    rho = sde.sigma(t) / sde.alpha(t)
    return -0.5 * apart / rho**2 - math.prod(x0.shape[1:]) * (math.log(rho) + 0.5 * math.log(2 * math.pi))


def _decode_bins(sde: SDE, x0: Tensor, d: Tensor, t: float, levels: int, interval: tuple[float, float]) -> Tensor:
    """Log of the Gaussian's mass in the bin of each entry."""
    step = bin_width(levels, interval)
    bins = (x0 - interval[0]) / step - 0.5
    if x0.device.type == "cpu" and bool(((bins - bins.round()).abs() > 1e-2).any()):
        raise ValueError(
            f"`x` must lie on the middles of {levels} bins of {interval}, as `dequantize(..., middle=True)` puts it."
        )
    rho = sde.sigma(t) / sde.alpha(t)
    below, above = (x0 - d - step / 2) / rho, (x0 - d + step / 2) / rho
    # On the side where both tails are small, so that their difference keeps its digits.
    flip = below + above > 0
    below, above = torch.where(flip, -above, below), torch.where(flip, -below, above)
    first, last = bins.round() <= 0, bins.round() >= levels - 1
    open_below, open_above = torch.where(flip, last, first), torch.where(flip, first, last)
    log_above = torch.where(open_above, 0.0, torch.special.log_ndtr(above))
    log_below = torch.where(open_below, -math.inf, torch.special.log_ndtr(below))
    return (log_above + torch.log1p(-(log_below - log_above).exp().clamp_max(1 - 1e-7))).flatten(1).sum(1)


def _prior_gap(sde: SDE, x0: Tensor, s: float) -> Tensor:
    """KL(N(αx_0, σ²) ‖ N(0, α²s² + σ²)) at T, (B,)."""
    alpha, sigma = sde.alpha(sde.T), sde.sigma(sde.T)
    ratio = sigma**2 / (alpha**2 * s**2 + sigma**2)
    gap = math.prod(x0.shape[1:]) * (ratio - 1 - math.log(ratio))
    return 0.5 * (gap + _square(x0) * (alpha**2 * ratio / sigma**2))


# Bits.


def bin_width(levels: int, interval: tuple[float, float]) -> float:
    """Width of one of `levels` equal bins of `interval`."""
    low, high = (check.number("interval", edge) for edge in interval)
    if high <= low:
        raise ValueError(f"`interval` must be (low, high) with low < high, got {interval}.")
    return (high - low) / check.integer("levels", levels, least=2)


def bits_per_dim(
    nats: Tensor,
    dims: int,
    levels: int | None = None,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    density: bool = True,
) -> Tensor:
    r"""Bits per dimension of data that has `levels` values, from nats.

    .. math:: b = -\frac{\log p(x) + D\log w}{D\log 2}, \qquad w = \frac{\text{high} - \text{low}}{\text{levels}}

    A bin is w wide in the scale of the density, so its probability is about p w^D: 256 bins of (−1, 1) give the 7 bits
    that code for images adds by hand, and any other scale its own number.

    Arguments:
        nats: log p(x), (B,): a density in the scale where the bins divide `interval`.
        dims: D, numbers in an event.
        levels: Number of values of a number of the data, 256 for bytes; needed where `nats` is a density.
        interval: What the bins divide; integers scaled as v/127.5 − 1 have bins that divide (−1 − 1/255, 1 + 1/255).
        density: False where `nats` is already a probability, as of :func:`elbo` with `levels`: nothing is added.

    Example:
        >>> import torch
        >>> bits_per_dim(torch.zeros(1), 3072, levels=256)
        tensor([7.])
    """
    check.integer("dims", dims, least=1)
    if not density:
        return -nats / (dims * math.log(2))
    if levels is None:
        raise TypeError(
            "`levels` must say how many values a number of the data has, 256 for bytes and 17 for scikit-learn's "
            "digits: a density has no bits without. Where `nats` is a probability already, give `density`=False."
        )
    return -(nats / dims + math.log(bin_width(levels, interval))) / math.log(2)


def dequantize(
    images: Tensor,
    levels: int,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    seed: int | Sequence[int] | Noise | None = None,
    draw: int = 0,
    middle: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integers 0 … levels − 1 as numbers spread evenly over their bins of `interval`.

    Arguments:
        images: Integers, (B, *event).
        levels: How many values there are.
        interval: What the bins divide.
        seed: An integer, one for each sample, or a :class:`Noise`.
        draw: Which draw of it.
        middle: The middle of each bin instead, without noise.
        dtype: float32 or float64.
    """
    if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex():
        raise TypeError("`images` must be a tensor of integers 0 … levels − 1.")
    width = bin_width(levels, interval)
    if images.device.type == "cpu" and images.numel() and not 0 <= int(images.min()) <= int(images.max()) < levels:
        raise ValueError(f"`images` must lie in 0 … {levels - 1}, got {int(images.min())} … {int(images.max())}.")
    noise = (seed if isinstance(seed, Noise) else Noise(seed)).fork(_DEQUANTISE)
    shape = tuple(images.shape)
    where = 0.5 if middle else noise.uniform(shape, draw, dtype=dtype, device=images.device)
    return interval[0] + width * (images.to(dtype) + where)


def dequantized_bits(
    log_density: Callable[[Tensor], Tensor],
    images: Tensor,
    levels: int,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    n: int = 1,
    seed: int | Sequence[int] | Noise | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    r"""Bits per dimension of integers under a density: an upper bound that falls to the truth as n grows.

    .. math:: b_n = -\frac{1}{D\log 2}\left(\log\frac1n\sum_{k=1}^n p(x^{(k)}) + D\log w\right), \qquad
              x^{(k)} \sim U(\text{bin})

    n = 1 is uniform dequantisation, n > 1 its importance-weighted bound, which is never looser on average.

    Arguments:
        log_density: log p of a batch in nats, (B, *event) to (B,), as ``lambda x: ss.log_prob(model, x).value``.
        images: Integers, (B, *event).
        levels: How many values there are.
        interval: What the bins divide, in the scale of the density.
        n: How many points in each bin.
        seed: Of the points.
        dtype: Of the points.

    Returns:
        Bits per dimension, (B,), and their standard errors, (B,), nan for n = 1.

    References:
        | Flow++ (Ho et al., 2019), arXiv:1902.00275
        | Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
    """
    noise, dims = seed if isinstance(seed, Noise) else Noise(seed), math.prod(images.shape[1:])
    logs = torch.stack(
        [
            log_density(dequantize(images, levels, interval, seed=noise, draw=k, dtype=dtype))
            for k in range(check.integer("n", n, least=1))
        ]
    )
    bits = bits_per_dim(logs.logsumexp(0) - math.log(n), dims, levels, interval)
    if n == 1:
        return bits, torch.full_like(bits, math.nan)
    relative = (logs - logs.amax(0)).exp()
    return bits, relative.std(0) / relative.mean(0) / n**0.5 / (dims * math.log(2))


# Two models over time.


@dataclass(frozen=True)
class Estimate:
    """A mean over samples and its standard error.

    Arguments:
        value: The mean.
        standard_error: Of the mean, from the scatter over samples.
        nfe: Evaluations of each model for each sample.
    """

    value: Tensor
    standard_error: Tensor
    nfe: int


def denoiser_error(
    model: AbstractDenoiser,
    exact: AbstractDenoiser,
    data: Tensor,
    ts: Sequence[float] | Tensor,
    *,
    prediction: str = "eps",
    seed: int | Sequence[int] | Noise | None = None,
    **cond: Any,
) -> Estimate:
    """Mean squared difference per number of two denoisers' predictions on noised data, at some times.

    Arguments:
        model: A denoiser.
        exact: Another on the same process, such as the exact one.
        data: Data, (B, *event), B ≥ 2.
        ts: Times.
        prediction: What to compare: ``"eps"``, ``"x0"``, ``"score"``, ``"v"`` or ``"velocity"``.
        seed: Of the noise.
        **cond: Conditions, handed to `model`.

    Returns:
        An :class:`Estimate` with an entry for each time.
    """
    check.conditions(cond, denoiser_error)
    check.choice("prediction", prediction, ("eps", "x0", "score", "v", "velocity"))
    _same_process(model, exact)
    noise = (seed if isinstance(seed, Noise) else Noise(seed)).fork(_EPS)
    means, errors = [], []
    with torch.no_grad():
        for i, t in enumerate(float(t) for t in ts):
            x_t = model.sde.perturb(data, t, noise.like(data, i))
            a, b = getattr(model, prediction)(x_t, t, **cond), getattr(exact, prediction)(x_t, t)
            each = _square(a - b) / math.prod(data.shape[1:])
            means.append(each.mean())
            errors.append(each.std() / len(data) ** 0.5)
    return Estimate(torch.stack(means), torch.stack(errors), len(means))


def path_kl(
    model: AbstractDenoiser,
    other: AbstractDenoiser,
    data: Tensor,
    *,
    eta: float = 1.0,
    n_times: int = 32,
    data_std: float = 1.0,
    t_min: float | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    **cond: Any,
) -> Estimate:
    r"""Relative entropy of the paths of two models' reverse SDEs, in nats, from T to t_min.

    .. math:: \mathrm{KL} = \frac{(1+\eta^2)^2}{8\eta^2}\int g^2\,E|s_a - s_b|^2\,dt
              = \frac{(1+\eta^2)^2}{4\eta^2}\int e^{2\lambda}\,E|d_a - d_b|^2\,d\lambda

    The expectation is over noised data, which is the law of `model`'s paths if its score is that of `data`; its end
    bounds the relative entropy of the samples.

    Arguments:
        model: A denoiser, a.
        other: Another on the same process, b.
        data: Data, (B, *event), B ≥ 2.
        eta: η of the SDEs; the ODE, 0, has none.
        n_times: Times for each datum, even in :math:`\tfrac12\log(1 + s^2e^{2\lambda})`.
        data_std: s.
        t_min: Where paths end, by default that of the process.
        seed: Of times and noise.
        **cond: Conditions, handed to both.

    References:
        | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258, theorem 1
    """
    check.conditions(cond, path_kl)
    check.number("eta", eta, above=0)
    check.integer("n_times", n_times, least=1)
    sde = _same_process(model, other)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    source = noise.fork(_EPS)
    steps = _Steps.of(sde, None, True, t_min, check.number("data_std", data_std, above=0))
    total = data.new_zeros(len(data))
    with torch.no_grad():
        for i, (_, t, weight, _) in enumerate(steps.draw(n_times, 1, noise.fork(_TIMES), data)):
            x_t = sde.perturb(data, t, source.like(data, i))
            total = total + weight * _square(model.x0(x_t, t, **cond) - other.x0(x_t, t, **cond))
    total = (1 + eta**2) ** 2 / (4 * eta**2) * total
    return Estimate(total.mean(), total.std() / len(data) ** 0.5, n_times)


def _same_process(a: AbstractDenoiser, b: AbstractDenoiser) -> SDE:
    if _sde_of(a) != _sde_of(b):
        raise ValueError(f"the models are on different processes, {a.sde!r} and {b.sde!r}; use Rescheduled for one.")
    return a.sde
