r"""Time grids from noise to data, as float64 tensors on the CPU.

A grid of N steps has N + 1 strictly decreasing times, from ``t_start`` (default T) to ``t_end`` (default 0). Both ends
are exactly the given numbers. A step to 0 returns E[x_0 | x]; with a positive ``t_end`` the result still contains the
noise of that time. Grids with equal steps in λ or in a power of ρ = σ/α cannot reach σ = 0: N − 1 steps end at
``t_min``, and the last step goes from there to 0. Zigzag grids also go up, where fresh noise is added.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.grids.grid import check_grid, inner_times, lam_ends, make_grid, times_of_lam
from scoresde.processes.derived import Shifted
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import VP
from scoresde.processes.sde import SDE


@checked
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
    return make_grid(sde, steps, t_start, t_end, inner_times, reaches_zero=True)


@checked
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
    spacing = lambda a, b, u: inner_times(a ** (1 / k), b ** (1 / k), u) ** k  # noqa: E731
    return make_grid(sde, steps, t_start, t_end, spacing, reaches_zero=True)


@checked
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


@checked
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

    def spacing(a: float, b: float, u: Tensor) -> Tensor:
        first, last = lam_ends(sde, a, b)
        return times_of_lam(sde, last - (1 - u) ** power * (last - first))

    return make_grid(sde, steps, t_start, t_end, spacing, t_min, reaches_zero=False)


exponential = uniform_lam


@checked
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

    def spacing(a: float, b: float, u: Tensor) -> Tensor:
        first, last = (math.exp(-lam / power) for lam in lam_ends(sde, a, b))
        return times_of_lam(sde, -power * inner_times(first, last, u).log())

    return make_grid(sde, steps, t_start, t_end, spacing, t_min, reaches_zero=False)


@checked
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

    def spacing(a: float, b: float, u: Tensor) -> Tensor:
        first, last = (clock.t_of_lam(max(lam, clock.lam(clock.T))) ** 0.5 for lam in lam_ends(sde, a, b))
        return times_of_lam(sde, clock.lam(inner_times(first, last, u) ** 2))

    return make_grid(sde, steps, t_start, t_end, spacing, t_min, reaches_zero=False)


@checked
def flow_time(
    sde: SDE,
    steps: int,
    exponent: float = 1.0,
    shift: float = 1.0,
    *,
    t_start: float | None = None,
    t_end: float = 0.0,
    t_min: float | None = None,
) -> Tensor:
    r"""Equal steps in a root of the flow time :math:`\tau = \sigma/(s\alpha + \sigma)`, on any process.

    .. math:: \tau_i^{1/k} = (1 - u_i)\,\tau_{start}^{1/k} + u_i\,\tau_{end}^{1/k}

    With exponent k = 1 and shift s = 1 on :class:`Flow` this is :func:`uniform_t`. At high noise τ hardly moves, so a
    process with little signal at T, such as a cosine schedule, spends no steps there.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        exponent: Exponent k; a larger one makes the grid denser near data.
        shift: Shift s > 0; a larger one makes the grid denser near noise.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.
        t_min: Smallest last positive time if `t_end` is 0, default ``sde.t_min``.
    """
    back = math.log(check.number("shift", shift, above=0))
    tau = lambda lam: torch.sigmoid(-lam - back)  # noqa: E731
    lam_of_tau = lambda c: torch.log1p(-c) - c.log() - back  # noqa: E731
    return _even_in(sde, steps, tau, lam_of_tau, exponent, t_start, t_end, t_min)


@checked
def log_noise(
    sde: SDE,
    steps: int,
    scale: float = 0.4,
    exponent: float = 1.0,
    power: float | None = None,
    *,
    t_start: float | None = None,
    t_end: float = 0.0,
    t_min: float | None = None,
) -> Tensor:
    r"""Equal steps in a root of :math:`c = \log(1 + \varrho/\varrho_0)` with the noise level ϱ = σ/α.

    .. math:: c_i^{1/k} = (1 - u_i)\,c_{start}^{1/k} + u_i\,c_{end}^{1/k}

    At noise levels above the scale ϱ₀ these are equal steps in λ, so that no step is long where an ε-network multiplies
    its errors by σ/α. Below it they are equal steps in the noise level. With a finite power p the logarithm becomes
    :math:`p\,((1 + \varrho/\varrho_0)^{1/p} - 1)`, which makes the steps at high noise shorter: for a small scale and
    k = 1 they are those of :func:`karras`.

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        scale: Noise level ϱ₀ below which the steps are equal in ϱ.
        exponent: Exponent k; a larger one makes the grid denser near data.
        power: Power p, None for the logarithm; a smaller one makes the grid denser at high noise.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.
        t_min: Smallest last positive time if `t_end` is 0, default ``sde.t_min``.
    """
    near = math.log(check.number("scale", scale, above=0))
    root = None if power is None else check.number("power", power, above=0)
    clock = lambda lam: _bent(torch.nn.functional.softplus(-lam - near, threshold=60), root)  # noqa: E731
    lam_of_clock = lambda c: -(torch.expm1(_straight(c, root)).log() + near)  # noqa: E731
    return _even_in(sde, steps, clock, lam_of_clock, exponent, t_start, t_end, t_min)


def _bent(c: Tensor, power: float | None) -> Tensor:
    """The logarithm c of a number as a power of it, p (exp(c/p) − 1), or c itself."""
    return c if power is None else power * torch.expm1(c / power)


def _straight(c: Tensor, power: float | None) -> Tensor:
    """Inverse of :func:`_bent`."""
    return c if power is None else power * torch.log1p(c / power)


def _even_in(
    sde: SDE,
    steps: int,
    clock: Callable[[Tensor], Tensor],
    lam_of_clock: Callable[[Tensor], Tensor],
    exponent: float,
    t_start: float | None,
    t_end: float,
    t_min: float | None,
) -> Tensor:
    """Equal steps in a root of a clock c(λ) that is 0 at data, with a last positive time of at least `t_min`."""
    k = check.number("exponent", exponent, above=0)

    def ends(a: float, b: float) -> tuple[float, float]:
        lam = torch.tensor([sde.lam(a), *lam_ends(sde, a, b)], dtype=torch.float64, device="cpu")
        at, near, last = clock(lam).tolist()
        return at if math.isfinite(at) else near, last

    def spacing(a: float, b: float, u: Tensor) -> Tensor:
        first, last = (c ** (1 / k) for c in ends(a, b))
        return times_of_lam(sde, lam_of_clock(inner_times(first, last, u) ** k))

    start = sde.T if t_start is None else t_start
    if check.integer("steps", steps, at_least=1) > 1 and 0 < start <= sde.T and t_end == 0 and sde.sigma(0.0) == 0:
        first = torch.tensor(ends(start, 0.0)[0], dtype=torch.float64, device="cpu")
        even = float(times_of_lam(sde, lam_of_clock(first / steps**k)))
        least = sde.t_min if t_min is None else check.number("t_min", t_min, above=0)
        t_min = max(even, least) if 0 < least < start else even
    return make_grid(sde, steps, t_start, t_end, spacing, t_min, reaches_zero=False)


@checked
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
    spacing = lambda first, last, u: inner_times(last, first, beta_inverse(1 - u, a, b))  # noqa: E731
    return make_grid(sde, steps, t_start, t_end, spacing, reaches_zero=True)


@checked
def cosine(sde: SDE, steps: int, *, t_start: float | None = None, t_end: float = 0.0) -> Tensor:
    r"""Equal steps of an angle: :math:`t = t_{end} + (t_{start} - t_{end})\cos^2(\pi u/2)`, quantiles of Beta(½, ½).

    Arguments:
        sde: The process.
        steps: Number of steps; the grid has one more time.
        t_start: First time, default T.
        t_end: Last time, default 0, which gives the denoised state.
    """
    spacing = lambda first, last, u: inner_times(last, first, (math.pi / 2 * (1 - u)).sin() ** 2)  # noqa: E731
    return make_grid(sde, steps, t_start, t_end, spacing, reaches_zero=True)


@checked
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

    def spacing(a: float, b: float, u: Tensor) -> Tensor:
        ends = []
        for t in (a, b):
            lam = sde.lam(t) + math.log(shift)
            ends.append(t if math.isinf(lam) else sde.t_of_lam(lam))
        return clock.base_time(inner_times(ends[0], ends[1], u).clamp(0, clock.T))

    return make_grid(sde, steps, t_start, t_end, spacing, reaches_zero=True)


@checked
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

    Returns:
        Times, (steps + 1,).

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), arXiv:2305.08891, table 2
    """
    if not isinstance(sde, Discrete):
        raise TypeError(f"`sde` must be a Discrete process, because only these have indices, got {type(sde).__name__}.")
    check.choice("spacing", spacing, ("linspace", "leading", "trailing"))
    n, N = check.integer("steps", steps, at_least=1), sde.N
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


def beta_inverse(q: Tensor, a: float, b: float) -> Tensor:
    """Quantiles of the distribution Beta(a, b).

    Arguments:
        q: Probabilities, float64.
        a: First shape parameter.
        b: Second shape parameter.
    """
    from scipy.special import betaincinv  # here, because the import takes long

    return torch.from_numpy(np.asarray(betaincinv(a, b, q.numpy())))
