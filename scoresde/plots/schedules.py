"""Pictures of processes and grids."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plots.canvas import array, axes_or_new, figure_or_new
from scoresde.processes.sde import SDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["grid", "schedule"]


@checked
def schedule(sde: SDE | Sequence[SDE], points: int = 200, figure: Figure | None = None) -> Figure:
    r"""Plot a process, or several: α and σ, then λ = log(α/σ), then f and g.

    .. math:: dx = f(t)\,x\,dt + g(t)\,dw, \qquad x_t = \alpha_t x_0 + \sigma_t z

    The horizontal axis is t/T, so that processes with different T can be compared.

    Arguments:
        sde: Process, or a list of processes.
        points: Number of times.
        figure: Figure to draw into, by default a new one.

    Example:
        >>> import scoresde as ss
        >>> len(ss.plots.schedule([ss.VP(), ss.Flow()]).axes)
        3
    """
    sdes = [sde] if isinstance(sde, SDE) else list(sde)
    check.integer("points", points, at_least=2)
    figure = figure_or_new(figure, (11, 3.2))
    levels, ratio, terms = figure.subplots(1, 3)
    for k, process in enumerate(sdes):
        # Without the two ends, where λ and f may be infinite.
        t = torch.linspace(process.t_min, process.T, points + 1, dtype=torch.float64)[:-1]
        u, name, colour = array(t / process.T), repr(process), f"C{k}"
        levels.plot(u, array(process.alpha(t)), color=colour, label=f"α, {name}")
        levels.plot(u, array(process.sigma(t)), color=colour, ls="--", label=f"σ, {name}")
        ratio.plot(u, array(process.lam(t)), color=colour, label=name)
        terms.plot(u, array(process.f(t)), color=colour, label=f"f, {name}")
        terms.plot(u, array(process.g(t)), color=colour, ls="--", label=f"g, {name}")
    for ax, title in ((levels, "α and σ"), (ratio, "λ = log(α/σ)"), (terms, "f and g")):
        ax.set(title=title, xlabel="t / T")
        ax.legend(fontsize=7)
    if max(process.sigma(process.T) for process in sdes) > 10:
        levels.set_yscale("symlog", linthresh=1.0)
    terms.set_yscale("symlog", linthresh=1.0)
    figure.tight_layout()
    return figure


@checked
def grid(
    times: Tensor | Sequence[float] | Mapping[str, Tensor | Sequence[float]],
    sde: SDE | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Plot the times of a grid as marks on a line, or of several grids as one line each.

    Arguments:
        times: Times, (N + 1,), or a mapping from names to times.
        sde: Process. With it the axis is λ = log(α/σ), where most solvers take their steps; times with an infinite λ
            are left out.
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import scoresde as ss
        >>> sde = ss.VP()
        >>> both = {"karras": ss.grids.karras(sde, 10), "uniform in λ": ss.grids.uniform_lam(sde, 10)}
        >>> ss.plots.grid(both, sde).get_xlabel()
        'λ = log(α/σ)'
    """
    named = dict(times) if isinstance(times, Mapping) else {"": times}
    ax = axes_or_new(ax, (7, 0.9 + 0.5 * len(named)))
    for k, (_, values) in enumerate(named.items()):
        at = [float(t) for t in torch.as_tensor(values, dtype=torch.float64).detach().flatten()]
        at = at if sde is None else [sde.lam(t) for t in at]
        at = [value for value in at if math.isfinite(value)]
        ax.axhline(-k, color="0.85", lw=0.8, zorder=0)
        ax.plot(at, [-k] * len(at), "|", ms=16, mew=1.4, color=f"C{k}")
    ax.set(yticks=[-k for k in range(len(named))], yticklabels=list(named), ylim=(0.6 - len(named), 0.6))
    ax.set_xlabel("t" if sde is None else "λ = log(α/σ)")
    if sde is None:
        ax.invert_xaxis()  # steps go from left to right
    return ax
