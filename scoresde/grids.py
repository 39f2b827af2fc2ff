r"""Time grids from noise to data, as float64 tensors on the CPU.

A grid of N steps has N + 1 strictly decreasing times, from ``t_start`` (default T) to ``t_end`` (default 0). Both ends
are exactly the given numbers. A step to 0 returns E[x_0 | x]; with a positive ``t_end`` the result still contains the
noise of that time. Grids with equal steps in λ or in a power of ρ = σ/α cannot reach σ = 0: N − 1 steps end at
``t_min``, and the last step goes from there to 0. Zigzag grids also go up, where fresh noise is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.discrete import Discrete
from scoresde.sde import SDE, VP, Shifted


def check_grid(sde: SDE, times: Tensor | Sequence[float]) -> Tensor:
    """Check that a user's grid has at least two times in [0, T] and is strictly decreasing.

    Arguments:
        sde: The process.
        times: Tensor or list of N + 1 times.

    Returns:
        Grid, float64 on the CPU.
    """
    if not isinstance(times, Tensor):
        # `as_tensor` would make the list float32.
        numbers = [check.number(f"times[{i}]", t) for i, t in enumerate(times)]
        times = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if times.dtype not in check.FLOATS:
        reason = "half precision merges times" if times.is_floating_point() else "an index is not a time"
        raise TypeError(f"`times` must be float32 or float64, got {str(times.dtype)[6:]}: {reason}.")
    grid = times.detach().cpu().double()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(f"`times` must have one axis of at least 2 times, got shape {tuple(grid.shape)}.")
    slack = check._OUTSIDE * sde.T  # times outside by float32 rounding are clamped
    outside = ~((grid >= -slack) & (grid <= sde.T + slack))
    if outside.any():
        i = int(outside.nonzero()[0, 0])
        raise ValueError(f"`times` must lie in [0, T] = [0, {sde.T:g}], got {grid[i].item():g} at index {i}.")
    grid = grid.clamp(0.0, sde.T)
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
    """Make a grid of `steps` steps; rule(first, last, u) maps u in [0, 1] to times from first to last."""
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE such as VP(), got {type(sde).__name__}.")
    N = check.integer("steps", steps, least=1)
    start = sde.T if t_start is None else check.number("t_start", t_start, above=0, most=sde.T)
    end = check.number("t_end", t_end, least=0, below=start)
    if reaches_zero or sde.sigma(end) > 0:
        if t_min is not None and t_min != end:
            raise ValueError(f"`t_min` = {t_min:g} is used only if `t_end` is 0, got `t_end` = {end:g}; drop it.")
        times = [rule(start, end, _ramp(N))]
    else:
        last = sde.t_min if t_min is None else t_min
        if N > 1 and not end < check.number("t_min", last, above=0) < start:
            raise ValueError(
                f"`t_min` must lie between `t_end` = {end:g} and `t_start` = {start:g}, got {last:g}; "
                f"give one in between."
            )
        times = [rule(start, last, _ramp(N - 1)), _ramp(0)] if N > 1 else [_ramp(1)]
    grid = torch.cat(times)
    grid[0], grid[-1] = start, end
    if len(times) == 2:
        grid[-2] = last
    rises = (~(grid.diff() < 0)).nonzero()
    if len(rises):
        i = int(rises[0, 0]) + 1
        raise ValueError(
            f"{N} `steps` between {start:g} and {end:g} are too many for float64: times {grid[i - 1].item()!r} and "
            f"{grid[i].item()!r} at index {i} do not decrease; take fewer steps or a longer interval."
        )
    return grid


def _ramp(n: int) -> Tensor:
    return torch.linspace(0, 1, n + 1, dtype=torch.float64, device="cpu")


def _between(a: float, b: float, u: Tensor) -> Tensor:
    return a + (b - a) * u


def uniform_t(sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    """Grid with equal steps in t.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        t_start: First time, default T; a smaller one starts from a noised image (SDEdit).
        t_end: Last time, default 0, which gives the denoised state.

    Example:
        >>> import scoresde as ss
        >>> uniform_t(ss.Flow(), 4).tolist()
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    return _grid(sde, steps, t_start, t_end, _between, reaches_zero=True)


def power_t(sde: SDE, steps: int, exponent: float = 2.0, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Equal steps in :math:`t^{1/\mathrm{exponent}}`: 2 is the quadratic grid of DDIM, 1 is :func:`uniform_t`.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        exponent: Exponent; a larger one makes the grid denser near data.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, appendix D.2
    """
    k = check.number("exponent", exponent, above=0)
    rule = lambda a, b, u: _between(a ** (1 / k), b ** (1 / k), u) ** k  # noqa: E731
    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def uniform_lam(
    sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0, t_min: float | None = None
) -> Tensor:
    r"""Equal steps in :math:`\lambda = \log(\alpha/\sigma)`, then one step from `t_min` to 0.

    If λ = −∞ at t_start, the steps use λ at 0.999 t_start or at the middle of the interval, whichever time is larger;
    the first time remains t_start. Another name is the exponential grid: σ/α decreases by the same factor in each step.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        t_start: First time, default T.
        t_end: Last time, default 0; if it is positive, omit `t_min`.
        t_min: Last positive time if `t_end` is 0, default ``sde.t_min``.

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
    r"""Grid that follows a power in λ, then one step from `t_min` to 0.

    .. math:: \lambda_i = \lambda_{end} - (1-u_i)^\rho(\lambda_{end} - \lambda_{start})

    With ρ = 1 the grid is geometric in σ/α: :func:`uniform_lam`, the exponential grid.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        rho: Exponent ρ; above 1 the grid is denser near data.
        t_start: First time, default T.
        t_end: Last time, default 0; if it is positive, omit `t_min`.
        t_min: Last positive time if `t_end` is 0, default ``sde.t_min``.
    """
    power = check.number("rho", rho, above=0)

    def rule(a: float, b: float, u: Tensor) -> Tensor:
        first, last = _lam_ends(sde, a, b)
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
    r"""Grid of Karras et al.: equal steps in :math:`(\sigma/\alpha)^{1/\rho}`, then one step from `t_min` to 0.

    .. math:: \varrho_i = \left(\varrho_{start}^{1/\rho}
              + u_i(\varrho_{end}^{1/\rho} - \varrho_{start}^{1/\rho})\right)^\rho, \qquad \varrho = \sigma/\alpha

    On :class:`EDM` the times are the σ of the paper, and `steps` is its N.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        rho: Exponent; a larger one makes the grid denser near data.
        t_start: First time, default T.
        t_end: Last time, default 0; if it is positive, omit `t_min`.
        t_min: Last positive time if `t_end` is 0, default ``sde.t_min``.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          eq. 5
    """
    power = check.number("rho", rho, above=0)

    def rule(a: float, b: float, u: Tensor) -> Tensor:
        first, last = (math.exp(-lam / power) for lam in _lam_ends(sde, a, b))
        return _times_of_lam(sde, -power * _between(first, last, u).log())

    return _grid(sde, steps, t_start, t_end, rule, t_min, reaches_zero=False)


def _lam_ends(sde: SDE, a: float, b: float) -> tuple[float, float]:
    """λ(a) and λ(b); if λ(a) = −∞, λ at a slightly smaller time, which networks can distinguish from pure noise."""
    lam = sde.lam(a)
    return lam if math.isfinite(lam) else sde.lam(max(a * (1 - 1e-3), (a + b) / 2)), sde.lam(b)


def _times_of_lam(sde: SDE, lam: Tensor) -> Tensor:
    return sde._t_of_lam(lam.clamp(sde.lam(sde.T), sde.lam(0.0))).clamp(0.0, sde.T)


def quadratic_vp(
    sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0, t_min: float | None = None
) -> Tensor:
    r"""Quadratic grid of the linear VP process, mapped to any process through λ.

    .. math:: \lambda_i = \lambda^{VP}(\tau_i), \qquad
              \sqrt{\tau_i} = (1 - u_i)\sqrt{\tau_{start}} + u_i\sqrt{\tau_{end}}

    where ``VP()`` has the λ of the ends at τ_start and τ_end. It is dense near data and not sparse near noise.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        t_start: First time, default T.
        t_end: Last time, default 0; if it is positive, omit `t_min`.
        t_min: Last positive time if `t_end` is 0, default ``sde.t_min``.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, appendix D.2
    """
    clock = VP(T=4.0)

    def rule(a: float, b: float, u: Tensor) -> Tensor:
        first, last = (clock.t_of_lam(max(lam, clock.lam(clock.T))) ** 0.5 for lam in _lam_ends(sde, a, b))
        return _times_of_lam(sde, clock.lam(_between(first, last, u) ** 2))

    return _grid(sde, steps, t_start, t_end, rule, t_min, reaches_zero=False)


def beta_quantile(
    sde: SDE, steps: int, a: float = 0.6, b: float = 0.6, *, t_start: float | None = None, t_end: float = 0.0
) -> Tensor:
    """Times at the quantiles of a Beta(a, b) distribution: dense at both ends if a and b are below 1.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        a: First shape parameter; below 1 the grid is dense near data.
        b: Second shape parameter; below 1 the grid is dense near noise.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.

    References:
        | Beta Sampling is All You Need (Lee et al., 2024), arXiv:2407.12173
    """
    check.number("a", a, above=0)
    check.number("b", b, above=0)
    rule = lambda first, last, u: _between(last, first, _beta_inverse(1 - u, a, b))  # noqa: E731
    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def cosine(sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Equal steps of an angle: :math:`t = t_{end} + (t_{start} - t_{end})\cos^2(\pi u/2)`, quantiles of Beta(½, ½).

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.
    """
    rule = lambda first, last, u: _between(last, first, (math.pi / 2 * (1 - u)).sin() ** 2)  # noqa: E731
    return _grid(sde, steps, t_start, t_end, rule, reaches_zero=True)


def shifted(sde: SDE, steps: int, shift: float, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Times of `sde` at equal steps in the time of ``Shifted(sde, shift)``.

    On :class:`Flow`, :math:`t = s u / (1 + (s - 1) u)` with equal steps in u, as for flow models at high resolution.

    Arguments:
        sde: The process the network was trained on.
        steps: Number of steps; the grid has one more time.
        shift: Shift s, at least 1; a larger one makes the grid denser near noise.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.

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
    """Times of a subset of the indices of a discrete process, then 0.

    ==========  =========================================================================================
    spacing     indices, with N labels and n steps
    ==========  =========================================================================================
    linspace    round(linspace(0, N − 1, n)), decreasing: both ends are included; N − 1 if n = 1
    leading     i · ⌊N/n⌋ for i < n: the first is 0, the last is not N − 1
    trailing    round(N − i · N/n) − 1 for i < n: the last is N − 1, the first is not 0
    ==========  =========================================================================================

    Halves are rounded to even, as in NumPy.

    Arguments:
        sde: A discrete process.
        steps: Number of steps, at most N; each starts at an index, and the last one ends at t = 0.
        spacing: Spacing from the table, default ``"linspace"``.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), arXiv:2305.08891, table 2
    """
    if not isinstance(sde, Discrete):
        raise TypeError(f"`sde` must be a Discrete process, because only these have indices, got {type(sde).__name__}.")
    check.choice("spacing", spacing, ("linspace", "leading", "trailing"))
    n, N = check.integer("steps", steps, least=1), sde.N
    if n > N:
        raise ValueError(
            f"`steps` must be at most the {N} indices of the process, got {n}; `uniform_t` accepts any number."
        )
    # Integers only: a float step skips or repeats an index for some n.
    if spacing == "linspace":
        index = [_nearest(i * (N - 1), n - 1) for i in range(n - 1, 0, -1)] + [0 if n > 1 else N - 1]
    elif spacing == "leading":
        index = [i * (N // n) for i in range(n - 1, -1, -1)]
    else:
        index = [_nearest(i * N, n) - 1 for i in range(n, 0, -1)]
    return check_grid(sde, torch.tensor([*(i + 1 for i in index), 0], dtype=torch.float64, device="cpu"))


def _nearest(a: int, b: int) -> int:
    """The integer nearest to a/b; the even one of two."""
    whole, rest = divmod(a, b)
    return whole + (2 * rest > b or (2 * rest == b and whole % 2 == 1))


def window(
    sde: SDE, times: Tensor | Sequence[float], t_start: float | None = None, t_end: float | None = None
) -> Tensor:
    """The part of a grid between two times, with these two times as its ends.

    Arguments:
        sde: The process.
        times: A grid.
        t_start: New first time, default that of the grid; a larger one adds a step.
        t_end: New last time, default that of the grid; a smaller one adds a step.
    """
    grid = check_grid(sde, times)
    start = float(grid[0]) if t_start is None else check.number("t_start", t_start, above=0, most=sde.T)
    end = check.number("t_end", float(grid[-1]) if t_end is None else t_end, least=0, below=start)
    inner = grid[(grid < start) & (grid > end)]
    return check_grid(sde, torch.cat([grid.new_tensor([start]), inner, grid.new_tensor([end])]))


def ancestral(sde: SDE, times: Tensor | Sequence[float], eta: float = 1.0) -> Tensor:
    r"""Zigzag grid of ancestral solvers: each step goes below its target time, then fresh noise is added up to it.

    .. math:: \varrho_{down}^2 = \varrho_t^2\left(1 - \eta^2\left(1 - \varrho_t^2/\varrho_s^2\right)\right),
              \qquad \varrho = \sigma/\alpha

    On this grid, DDIM is DDIM(η), which is DDPM for η = 1; other solvers become their ancestral version. If the bracket
    is not positive, the step goes down to data.

    Arguments:
        sde: The process.
        times: A grid.
        eta: Noise level η, at least 0; 0 returns the grid unchanged.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, eq. 16
    """
    grid = check_grid(sde, times)
    eta = check.number("eta", eta, least=0)
    lam = sde.lam(grid)
    left = 1 + eta**2 * torch.expm1(2 * (lam[:-1] - lam[1:]))
    down = lam[1:] - 0.5 * left.clamp_min(0).log()
    below = _times_of_lam(sde, torch.where(left > 0, down, torch.full_like(down, math.inf)))
    out = [grid[:1]]
    for low, end in zip(below, grid[1:], strict=True):
        out.append(torch.stack([low, end]) if low < end else end[None])
    return torch.cat(out)


def churn(
    sde: SDE, times: Tensor | Sequence[float], s_churn: float, s_tmin: float = 0.0, s_tmax: float = math.inf
) -> Tensor:
    r"""Zigzag grid with churn: before each step but the first, fresh noise multiplies ρ = σ/α by 1 + γ.

    .. math:: \gamma = \min(s_{churn}/N, \sqrt2 - 1) \quad\text{where}\quad s_{tmin} \le \varrho \le s_{tmax}

    No time is raised above T.

    Arguments:
        sde: The process.
        times: A grid of N steps.
        s_churn: Amount of fresh noise over the whole grid.
        s_tmin: Lowest ρ at which noise is added.
        s_tmax: Highest ρ at which noise is added.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          algorithm 2
    """
    grid = check_grid(sde, times)
    gamma = min(check.number("s_churn", s_churn, least=0) / (len(grid) - 1), math.sqrt(2) - 1)
    lam = sde.lam(grid)
    up = _times_of_lam(sde, lam - math.log1p(gamma))
    out = [grid[:1]]
    for i in range(1, len(grid)):
        inside = i < len(grid) - 1 and s_tmin <= math.exp(-float(lam[i])) <= s_tmax and up[i] > grid[i]
        out.append(torch.stack([grid[i], up[i]]) if inside else grid[i : i + 1])
    return torch.cat(out)


def restart(sde: SDE, times: Tensor | Sequence[float], low: float, high: float, repeats: int = 1) -> Tensor:
    """Zigzag grid with restarts: from time `low`, add noise up to `high` and solve down again, `repeats` times.

    Arguments:
        sde: The process.
        times: A grid; its times nearest to `low` and `high` are the ends of the interval.
        low: Time at which noise is added.
        high: Time up to which noise is added.
        repeats: Number of repetitions, default 1.

    References:
        | Restart Sampling for Improving Generative Processes (Xu et al., 2023), arXiv:2306.14878
    """
    grid = check_grid(sde, times)
    check.integer("repeats", repeats)
    a, b = (
        int((grid - check.number(name, t, least=0, most=sde.T)).abs().argmin())
        for name, t in (("high", high), ("low", low))
    )
    if a >= b:
        raise ValueError(f"`high` must lie above `low` by at least one step of the grid, got {high:g} and {low:g}.")
    if b == len(grid) - 1:
        raise ValueError(f"`low` must lie above the end of the grid by at least one step, got {low:g}.")
    return torch.cat([grid[: b + 1], grid[a : b + 1].repeat(repeats), grid[b + 1 :]])


def _beta_inverse(q: Tensor, a: float, b: float) -> Tensor:
    """Quantiles x of Beta(a, b), by Newton's method for log x, or for log(1 − x) in the upper part."""
    split = (a + 1) / (a + b + 2)  # the continued fraction converges up to here
    value, _ = _log_beta_cdf(torch.tensor([math.log(split)], dtype=torch.float64, device="cpu"), a, b)
    upper = q.log() > value
    mass = torch.where(upper, 1 - q, q).log()
    log_x = limit = torch.where(upper, q.new_tensor(1 - split).log(), q.new_tensor(split).log())
    for _ in range(100):
        pairs = (_log_beta_cdf(log_x, *shapes) for shapes in ((a, b), (b, a)))
        value, slope = (torch.where(upper, high, low) for low, high in zip(*pairs, strict=True))
        step = torch.where(mass == -math.inf, math.inf, (value - mass) / slope)
        log_x = torch.minimum(log_x - step, limit)
        if bool((step.abs() < 1e-9)[mass.isfinite()].all()):  # convergence is quadratic
            break
    return torch.where(upper, -torch.expm1(log_x), log_x.exp())


def _log_beta_cdf(log_x: Tensor, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Log of the regularised incomplete beta function and its slope in log x, by continued fraction (DLMF 8.17.22)."""
    x = log_x.exp()
    fraction = torch.ones_like(x)
    for m in range(20 + int(3 * math.sqrt(max(a, b))), 0, -1):
        odd = (a + m - 1) * (a + b + m - 1) / ((a + 2 * m - 2) * (a + 2 * m - 1))
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m))
        fraction = 1 - odd * x / (1 + even * x / fraction)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    value = a * log_x + b * torch.log1p(-x) - log_beta - math.log(a) - fraction.log()
    return value, a * fraction / (1 - x)


__all__ = [
    "ancestral",
    "beta_quantile",
    "check_grid",
    "churn",
    "cosine",
    "exponential",
    "index_grid",
    "karras",
    "polyexponential",
    "power_t",
    "quadratic_vp",
    "restart",
    "shifted",
    "uniform_lam",
    "uniform_t",
    "window",
]
