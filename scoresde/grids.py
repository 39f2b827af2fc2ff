r"""At which times: grids from noise to data, as float64 tensors on the CPU.

A grid of N steps is N + 1 times, strictly decreasing from ``t_start`` (by default T) to ``t_end`` (by default 0, where
the last step returns E[x_0 | x]; a positive ``t_end`` stops there with its noise still in). Both ends are the given
numbers to the bit. Grids that are even in λ or in a power of ρ = σ/α cannot reach σ = 0: their last step but one is at
``t_min`` and the last goes from there to 0, so N steps are N steps and N evaluations for a one-stage method.

Knows processes; knows nothing of solvers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.discrete import Discrete
from scoresde.sde import SDE, Shifted


def check_grid(sde: SDE, times: Tensor | Sequence[float]) -> Tensor:
    """A user's own grid, checked: at least two times in [0, T], strictly decreasing.

    Arguments:
        sde: The process whose times these are.
        times: Tensor or list of N + 1 times.

    Returns:
        The grid, float64 on the CPU.
    """
    grid = torch.as_tensor(times)
    if grid.is_complex() or grid.dtype == torch.bool:
        raise TypeError(f"`times` must be real numbers, got {str(grid.dtype)[6:]}.")
    if grid.is_floating_point() and grid.dtype not in check.FLOATS:
        raise TypeError(f"`times` must be float32 or float64, got {str(grid.dtype)[6:]}: half precision repeats times.")
    grid = grid.detach().cpu().double()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"`times` must be a list of at least 2 times, got shape {tuple(grid.shape)}.")
    outside = ~((grid >= 0) & (grid <= sde.T))
    if outside.any():
        i = int(outside.nonzero()[0, 0])
        raise ValueError(f"`times` must lie in [0, T] = [0, {sde.T:g}], got {grid[i].item():g} at index {i}.")
    rises = grid.diff() >= 0
    if rises.any():
        i = int(rises.nonzero()[0, 0]) + 1
        if grid[i] == grid[i - 1]:
            raise ValueError(f"`times` repeats a time at index {i} (t = {grid[i].item():g}); drop one of the two.")
        raise ValueError(
            f"`times` must decrease from noise to data, but rises at index {i} (from {grid[i - 1].item():g} to "
            f"{grid[i].item():g}); give times.flip(0) if your grid runs from data to noise."
        )
    return grid


def _grid(
    sde: SDE,
    steps: int,
    t_start: float | None,
    t_end: float,
    rule: Callable[[float, float, Tensor], Tensor],
    t_min: float | None = None,
    *,
    reaches_zero: bool,
) -> Tensor:
    """Lay `steps` steps: rule(first, last, u) maps u from 0 to 1 to times from first to last."""
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE such as VP(), got {type(sde).__name__}.")
    N = check.integer("steps", steps, least=1)
    start = sde.T if t_start is None else check.number("t_start", t_start, above=0, most=sde.T)
    end = check.number("t_end", t_end, least=0, below=start)
    if reaches_zero or sde.sigma(end) > 0:
        if t_min is not None and t_min != end:
            raise ValueError(
                f"`t_min` = {t_min:g} is where the step to `t_end` = 0 starts; with `t_end` = {end:g} drop it."
            )
        times = [rule(start, end, _ramp(N))]
    else:
        last = sde.t_min if t_min is None else t_min
        if N > 1 and not end < check.number("t_min", last, above=0) < start:
            raise ValueError(f"`t_min` must lie between `t_end` = {end:g} and `t_start` = {start:g}, got {last:g}.")
        times = [rule(start, last, _ramp(N - 1)) if N > 1 else torch.tensor([start]), torch.tensor([end])]
    grid = torch.cat([t.double() for t in times])
    grid[0], grid[-1] = start, end
    if len(times) == 2 and N > 1:
        grid[-2] = last
    rises = (~(grid.diff() < 0)).nonzero()
    if len(rises):
        i = int(rises[0, 0]) + 1
        raise ValueError(
            f"{N} `steps` between {start:g} and {end:g} leave no room between floats: times {grid[i - 1].item()!r} and "
            f"{grid[i].item()!r} at index {i}; take fewer steps or a longer interval."
        )
    return grid


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n + 1, dtype=torch.float64)


def _between(a: float, b: float, u: Tensor) -> Tensor:
    return a + (b - a) * u


def uniform_t(sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    """Even steps in t.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        t_start: First time, by default T. Less, to start from a noised image (SDEdit).
        t_end: Last time; 0 ends with the denoised state.

    Example:
        >>> uniform_t(Flow(), 4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _grid(sde, steps, t_start, t_end, _between, reaches_zero=True)


def power_t(sde: SDE, steps: int, exponent: float = 2.0, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Even steps in :math:`t^{1/\mathrm{exponent}}`: 2 is the quadratic grid of DDIM, 1 is :func:`uniform_t`.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        exponent: The larger, the denser at data.
        t_start: First time, by default T.
        t_end: Last time; 0 ends with the denoised state.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, appendix D.2
    """
    k = check.number("exponent", exponent, above=0)
    rule = lambda a, b, u: _between(a ** (1 / k), b ** (1 / k), u) ** k  # noqa: E731
    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def uniform_lam(
    sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0, t_min: float | None = None
) -> Tensor:
    r"""Even steps in :math:`\lambda = \log(\alpha/\sigma)`, then one from `t_min` to 0.

    Where α(t_start) = 0, λ is −∞ and is counted from 0.999 t_start instead; the grid still starts at t_start. Also known
    as the exponential grid, since σ/α falls by one factor at each step.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        t_start: First time, by default T.
        t_end: Last time; positive, it is reached in even steps.
        t_min: Last positive time when ``t_end`` is 0, by default ``sde.t_min``.

    References:
        | DPM-Solver (Lu et al., 2022), arXiv:2206.00927
    """
    return polyexponential(sde, steps, 1.0, t_start=t_start, t_end=t_end, t_min=t_min)


def polyexponential(
    sde: SDE,
    steps: int,
    rho: float = 1.0,
    *,
    t_start: float | None = None,
    t_end: float = 0.0,
    t_min: float | None = None,
) -> Tensor:
    r"""Steps in λ that follow a power, :math:`\lambda_i = \lambda_{end} - (1-u_i)^\rho(\lambda_{end} - \lambda_{start})`.

    ρ = 1 is geometric in σ/α: :func:`uniform_lam`, also known as the exponential grid.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        rho: Power; above 1 denser at data.
        t_start: First time, by default T.
        t_end: Last time; positive, it is reached by the rule.
        t_min: Last positive time when ``t_end`` is 0, by default ``sde.t_min``.
    """
    power = check.number("rho", rho, above=0)

    def rule(a: float, b: float, u: Tensor) -> Tensor:
        first, last = _finite_lam(sde, a), sde.lam(b)
        return _times_of_lam(sde, last - (1 - u) ** power * (last - first))

    return _grid(sde, steps, t_start, t_end, rule, t_min, reaches_zero=False)


exponential = uniform_lam


def karras(
    sde: SDE,
    steps: int,
    rho: float = 7.0,
    *,
    t_start: float | None = None,
    t_end: float = 0.0,
    t_min: float | None = None,
) -> Tensor:
    r"""Karras' grid: even steps in :math:`(\sigma/\alpha)^{1/\rho}`, then one from `t_min` to 0.

    .. math:: \varrho_i = \left(\varrho_{start}^{1/\rho} + u_i(\varrho_{end}^{1/\rho} - \varrho_{start}^{1/\rho})\right)^\rho,
              \qquad \varrho = \sigma/\alpha

    On :class:`EDM` these are the σ of the paper, with ``steps`` its number of them.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        rho: The larger, the denser at data.
        t_start: First time, by default T.
        t_end: Last time; positive, it is reached by the rule.
        t_min: Last positive time when ``t_end`` is 0, by default ``sde.t_min``.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          eq. 5
    """
    power = check.number("rho", rho, above=0)

    def rule(a: float, b: float, u: Tensor) -> Tensor:
        first, last = (math.exp(-lam / power) for lam in (_finite_lam(sde, a), sde.lam(b)))
        return _times_of_lam(sde, -power * _between(first, last, u).log())

    return _grid(sde, steps, t_start, t_end, rule, t_min, reaches_zero=False)


def _finite_lam(sde: SDE, t: float) -> float:
    """λ(t), or the λ of the last time before it that floats and networks can tell from pure noise."""
    lam = sde.lam(t)
    return lam if math.isfinite(lam) else sde.lam(t * (1 - 1e-3))


def _times_of_lam(sde: SDE, lam: Tensor) -> Tensor:
    return sde._t_of_lam(lam.clamp(sde.lam(sde.T), sde.lam(0.0))).clamp(0.0, sde.T)


def beta_quantile(
    sde: SDE, steps: int, a: float = 0.6, b: float = 0.6, *, t_start: float | None = None, t_end: float = 0.0
) -> Tensor:
    """Times at the quantiles of a Beta(a, b) distribution: dense at both ends when a and b are below 1.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        a: First shape; below 1 makes the data end dense.
        b: Second shape; below 1 makes the noise end dense.
        t_start: First time, by default T.
        t_end: Last time; 0 ends with the denoised state.

    References:
        | Beta Sampling is All You Need (Lee et al., 2024), arXiv:2407.12173
    """
    check.number("a", a, above=0)
    check.number("b", b, above=0)
    rule = lambda first, last, u: _between(last, first, _beta_inverse(1 - u, a, b))  # noqa: E731
    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def cosine(sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Even steps of an angle, :math:`t = t_{end} + (t_{start} - t_{end})\cos^2(\pi u/2)`; the Beta(½, ½) quantiles.

    Arguments:
        sde: The process.
        steps: How many steps; the grid has one more time.
        t_start: First time, by default T.
        t_end: Last time; 0 ends with the denoised state.
    """
    rule = lambda first, last, u: _between(last, first, (math.pi / 2 * (1 - u)).sin() ** 2)  # noqa: E731
    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def shifted(sde: SDE, steps: int, shift: float, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Times of `sde` at even steps of the clock of ``Shifted(sde, shift)``.

    On :class:`Flow`, :math:`t = s u / (1 + (s - 1) u)` for even u, as resolution-dependent flow models are sampled.

    Arguments:
        sde: The process the network was trained on.
        steps: How many steps; the grid has one more time.
        shift: At least 1; the larger, the denser at noise.
        t_start: First time, by default T.
        t_end: Last time; 0 ends with the denoised state.

    References:
        | Scaling Rectified Flow Transformers (Esser et al., 2024), arXiv:2403.03206, eq. 23
    """
    clock = Shifted(sde, shift)

    def rule(a: float, b: float, u: Tensor) -> Tensor:
        ends = []
        for t in (a, b):
            lam = sde.lam(t) + math.log(shift)
            ends.append(t if math.isinf(lam) else sde.t_of_lam(lam))
        return clock.base_time(_between(ends[0], ends[1], u).clamp(0, clock.T))

    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def index_grid(sde: Discrete, steps: int, spacing: str = "linspace") -> Tensor:
    """Times of a subset of a discrete process' indices, then 0: what a network trained on them has seen.

    ==========  =========================================================================================
    spacing     indices, with N labels and n steps
    ==========  =========================================================================================
    linspace    round(linspace(0, N − 1, n)), from the top: both ends are in
    leading     i · ⌊N/n⌋ for i < n: the first is 0, the last is not N − 1
    trailing    round(N − i · N/n) − 1 for i < n: the last is N − 1, the first is not 0
    ==========  =========================================================================================

    Arguments:
        sde: A discrete process.
        steps: How many steps, at most N; each starts at an index, the last ends at t = 0.
        spacing: One of the above.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), arXiv:2305.08891, table 2
    """
    if not isinstance(sde, Discrete):
        raise TypeError(f"`sde` must be a Discrete process, which has indices, got {type(sde).__name__}.")
    check.choice("spacing", spacing, ("linspace", "leading", "trailing"))
    n, N = check.integer("steps", steps, least=1), sde.N
    if n > N:
        raise ValueError(
            f"`steps` must be at most the {N} indices of the process, got {n}; `uniform_t` takes any number."
        )
    i = torch.arange(n, dtype=torch.int64)
    # Integer arithmetic throughout: a float step loses or repeats an index for some n.
    if spacing == "linspace":
        index = (2 * i * (N - 1) + (n - 1)) // (2 * (n - 1)) if n > 1 else torch.tensor([N - 1])
        index = index.flip(0) if n > 1 else index
    elif spacing == "leading":
        index = (i * (N // n)).flip(0)
    else:
        index = (2 * (N * n - i * N) + n) // (2 * n) - 1
    return check_grid(sde, torch.cat([(index + 1).double(), torch.zeros(1, dtype=torch.float64)]))


def window(sde: SDE, times: Tensor | Sequence[float], t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    """The part of a grid between two times, whose ends are put in: start and stop anywhere on any grid.

    Arguments:
        sde: The process.
        times: A grid.
        t_start: New first time, by default the grid's own.
        t_end: New last time; below the grid's own it adds a step.
    """
    grid = check_grid(sde, times)
    start = float(grid[0]) if t_start is None else check.number("t_start", t_start, above=0, most=sde.T)
    end = check.number("t_end", t_end, least=0, below=start)
    inner = grid[(grid < start) & (grid > end)]
    return check_grid(sde, torch.cat([grid.new_tensor([start]), inner, grid.new_tensor([end])]))


def _beta_inverse(q: Tensor, a: float, b: float) -> Tensor:
    """Quantiles of Beta(a, b), by bisection."""
    lo, hi = torch.zeros_like(q), torch.ones_like(q)
    for _ in range(64):
        mid = (lo + hi) / 2
        below = _beta_cdf(mid, a, b) < q
        lo, hi = torch.where(below, mid, lo), torch.where(below, hi, mid)
    return (lo + hi) / 2


def _beta_cdf(x: Tensor, a: float, b: float) -> Tensor:
    """Regularised incomplete beta function, by its continued fraction (DLMF 8.17.22)."""
    flip = x > (a + 1) / (a + b + 2)
    y = torch.where(flip, 1 - x, x)
    p, q = (
        torch.where(flip, u, v) for u, v in ((torch.tensor(b), torch.tensor(a)), (torch.tensor(a), torch.tensor(b)))
    )
    p, q = p.double(), q.double()
    fraction = torch.ones_like(y)
    for m in range(60, 0, -1):
        odd = -(p + m - 1) * (p + q + m - 1) * y / ((p + 2 * m - 2) * (p + 2 * m - 1))
        even = m * (q - m) * y / ((p + 2 * m - 1) * (p + 2 * m))
        fraction = 1 + odd / (1 + even / fraction)
    log_beta = torch.lgamma(p) + torch.lgamma(q) - torch.lgamma(p + q)
    value = (p * y.log() + q * torch.log1p(-y) - log_beta).exp() / (p * fraction)
    value = torch.where(y == 0, torch.zeros_like(y), value)
    return torch.where(flip, 1 - value, value)


__all__ = [
    "beta_quantile",
    "check_grid",
    "cosine",
    "exponential",
    "index_grid",
    "karras",
    "polyexponential",
    "power_t",
    "shifted",
    "uniform_lam",
    "uniform_t",
    "window",
]
