"""Checks of grids, and windows of grids."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.processes.sde import SDE


@checked
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
    slack = check.OUTSIDE * sde.T  # times outside by float32 rounding are clamped
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


def make_grid(
    sde: SDE,
    steps: int,
    t_start: float | None,
    t_end: float,
    spacing: Callable[[float, float, Tensor], Tensor],
    t_min: float | None = None,
    *,
    reaches_zero: bool,
) -> Tensor:
    """Make a grid of times from `t_start` to `t_end`.

    Arguments:
        sde: The process.
        steps: Number of steps.
        t_start: First time, or None for T.
        t_end: Last time.
        spacing: Function (first, last, u) that maps u in [0, 1] to times from `first` to `last`.
        t_min: Last positive time if the grid ends at σ = 0, or None for ``sde.t_min``.
        reaches_zero: Whether `spacing` can end at σ = 0; otherwise the last step goes from `t_min` to `t_end`.
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE such as VP(), got {type(sde).__name__}.")
    N = check.integer("steps", steps, at_least=1)
    start = sde.T if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
    end = check.number("t_end", t_end, at_least=0, below=start)
    if reaches_zero or sde.sigma(end) > 0:
        if t_min is not None and t_min != end:
            raise ValueError(f"`t_min` = {t_min:g} is used only if `t_end` is 0, got `t_end` = {end:g}; drop it.")
        times = [spacing(start, end, _ramp(N))]
    else:
        last = sde.t_min if t_min is None else t_min
        if N > 1 and not end < check.number("t_min", last, above=0) < start:
            raise ValueError(
                f"`t_min` must lie between `t_end` = {end:g} and `t_start` = {start:g}, got {last:g}; "
                f"give one in between."
            )
        times = [spacing(start, last, _ramp(N - 1)), _ramp(0)] if N > 1 else [_ramp(1)]
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


def inner_times(a: float, b: float, u: Tensor) -> Tensor:
    """Numbers from a to b, linear in u."""
    return a + (b - a) * u


def lam_ends(sde: SDE, a: float, b: float) -> tuple[float, float]:
    """λ(a) and λ(b); if λ(a) = −∞, λ at a slightly smaller time, which networks can distinguish from pure noise."""
    lam = sde.lam(a)
    return lam if math.isfinite(lam) else sde.lam(max(a * (1 - 1e-3), (a + b) / 2)), sde.lam(b)


def times_of_lam(sde: SDE, lam: Tensor) -> Tensor:
    """Times in [0, T] of values of λ; values outside the range of the process go to its ends."""
    return sde.inverse_lam(lam.clamp(sde.lam(sde.T), sde.lam(0.0))).clamp(0.0, sde.T)


@checked
def window(
    sde: SDE, times: Tensor | Sequence[float], t_start: float | None = None, t_end: float | None = None
) -> Tensor:
    """The part of a grid between two times, with these two times as its ends.

    Arguments:
        sde: The process.
        times: Grid, (N + 1,).
        t_start: New first time, default that of the grid; a larger one adds a step.
        t_end: New last time, default that of the grid; a smaller one adds a step.

    Example:
        >>> import scoresde as ss
        >>> window(ss.Flow(), [1.0, 0.6, 0.3, 0.0], 0.8, 0.1).tolist()
        [0.8, 0.6, 0.3, 0.1]
    """
    grid = check_grid(sde, times)
    start = float(grid[0]) if t_start is None else check.number("t_start", t_start, above=0, at_most=sde.T)
    end = check.number("t_end", float(grid[-1]) if t_end is None else t_end, at_least=0, below=start)
    inner = grid[(grid < start) & (grid > end)]
    return check_grid(sde, torch.cat([grid.new_tensor([start]), inner, grid.new_tensor([end])]))
