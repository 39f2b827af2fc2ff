"""Pictures of a run: its states from noise to data."""

from __future__ import annotations

import math
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.integrators.method import Solution
from scoresde.plots.canvas import FAINT, array, axes_or_new, figure_or_new, is_image, show_tiles, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["animate", "trajectory"]

DENSE = 40  # number of times that are read from a solution with dense output


@checked
def trajectory(
    solution: Solution,
    count: int = 8,
    columns: int = 8,
    value_range: tuple[float, float] = (-1.0, 1.0),
    ax: Axes | None = None,
) -> Axes:
    """Plot how samples go from noise to data.

    Points (B, 2) are drawn as paths in the plane, numbers (B, 1) as curves over time, and images as a line for each
    sample, with time from left to right.

    Arguments:
        solution: Result of ``ss.solve`` with ``watch=ss.Watch(save_at="all")``, or of a method with dense output.
        count: Number of samples to draw; of points and numbers sixteen times as many.
        columns: Number of images in a line.
        value_range: Values of black and of white.
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.1)
        >>> run = ss.solve(mix, (16, 2), nfe=10, seed=0, watch=ss.Watch(save_at="all"))
        >>> len(ss.plots.trajectory(run).lines)
        18
    """
    check.integer("count", count, at_least=1)
    check.integer("columns", columns, at_least=2)
    times, states = _states(solution)
    event = tuple(states.shape[2:])
    if is_image(event) and event[-2] > 1:
        picked = torch.linspace(0, len(times) - 1, min(columns, len(times))).round().long()
        strip = states[picked, :count].transpose(0, 1).flatten(0, 1)
        picture = tiles(strip, len(picked), value_range)
        ax = axes_or_new(ax, (6.0, 0.5 + 6.0 * picture.shape[0] / picture.shape[1]))
        show_tiles(ax, picture)
        width = event[-1] + 1
        ax.set(xticks=[width * (k + 0.5) for k in range(len(picked))], xticklabels=[f"{times[k]:.3g}" for k in picked])
        ax.tick_params(length=0)
        ax.set_xlabel("t")
        return ax
    states = states[:, : 16 * count]
    ax = axes_or_new(ax)
    if event == (2,):
        ax.plot(array(states[:, :, 0]), array(states[:, :, 1]), color=FAINT, lw=0.6, zorder=1)
        for k, label in ((0, f"t = {times[0]:.3g}"), (-1, f"t = {times[-1]:.3g}")):
            ax.plot(array(states[k, :, 0]), array(states[k, :, 1]), ".", ms=5, label=label, zorder=2)
        ax.legend(fontsize=8)
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    elif math.prod(event) == 1:
        ax.plot(times, array(states.flatten(1)), color="C0", lw=0.7, alpha=0.6)
        ax.set(xlabel="t", ylabel="x")
        ax.invert_xaxis()
    else:
        raise ValueError(
            f"`solution` must hold points (2,), numbers or images with 1 or 3 channels, got events of shape {event}."
        )
    return ax


@checked
def animate(
    solution: Solution,
    path: str | PathLike[str],
    draw: Callable[[Tensor, Axes], object] | None = None,
    seconds: float = 4.0,
    dpi: int = 80,
) -> Path:
    """Write an animation of a run as a GIF, with a frame for each kept state.

    Arguments:
        solution: Result of ``ss.solve`` with ``watch=ss.Watch(save_at="all")``, or of a method with dense output.
        path: File to write, ``run.gif``.
        draw: Function that draws the states (B, *event) of one time into axes, by default :func:`samples`.
        seconds: Length of the animation; the last frame stays for another second.
        dpi: Number of pixels in an inch; the figure has 4 inches a side.

    Returns:
        Path of the file.
    """
    from scoresde.plots.sample_sets import samples

    check.number("seconds", seconds, above=0)
    target = Path(path)
    if target.suffix != ".gif":
        raise ValueError(f"`path` must end in .gif, got {str(path)!r}.")
    times, states = _states(solution)
    figure = figure_or_new(None, (4.0, 4.0))
    ax = figure.subplots()
    from matplotlib.animation import PillowWriter

    fps = max(1, round(len(times) / seconds))
    flat = states[-1].flatten(1)
    ends = (float(flat.min()), float(flat.max()))
    room = 0.3 * (ends[1] - ends[0]) + 1e-6
    writer = PillowWriter(fps=fps)
    with writer.saving(figure, str(target), dpi):
        for k in [*range(len(times)), *[len(times) - 1] * fps]:
            ax.clear()
            if draw is None:
                samples(states[k], ax=ax)
                if tuple(states.shape[2:]) == (2,):
                    ax.set(xlim=(ends[0] - room, ends[1] + room), ylim=(ends[0] - room, ends[1] + room))
            else:
                draw(states[k], ax)
            ax.set_title(f"t = {times[k]:.3g}", fontsize=9)
            writer.grab_frame()
    import matplotlib.pyplot as pyplot

    pyplot.close(figure)
    return target


def _states(solution: Solution) -> tuple[list[float], Tensor]:
    """Times from noise to data, and the states at them, (times, B, *event)."""
    kept = dict(solution.trajectory)
    if not kept and solution.path is not None:
        first, last = float(solution.times[0]), float(solution.times[-1])
        # The path ends where the error control does; from there one evaluation leads to the data.
        near = last if solution.sde is None else max(last, solution.sde.t_min)
        for t in torch.linspace(first, near, DENSE, dtype=torch.float64).tolist():
            kept[t] = solution.path(t)
        kept[last] = solution.x
    if len(kept) < 2:
        raise ValueError(
            "`solution` has kept no states on the way; run `ss.solve(..., watch=ss.Watch(save_at='all'))`, "
            "and give its result."
        )
    times = sorted(kept, reverse=True)
    return times, torch.stack([kept[t].detach().cpu() for t in times])
