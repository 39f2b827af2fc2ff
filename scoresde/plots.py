"""Figures of plans; every function takes and returns matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.analysis import moments
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["response", "stability"]


@checked
def response(plans: Sequence[Plan], sde: SDE, spectrum: moments.Numbers | None = None, ax: Axes | None = None) -> Axes:
    """Plot the gain against the standard deviation of the data, a curve for each plan; return the axes.

    Arguments:
        plans: Plans to plot.
        sde: Process of the plans.
        spectrum: Variances of the data, by default from 10⁻⁴ to 10².
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import scoresde as ss
        >>> sde = ss.VP()
        >>> plans = [solver.plan(sde, ss.grids.karras(sde, 10)) for solver in (ss.DDIM(), ss.UniPC())]
        >>> ss.plots.response(plans, sde).get_xlabel()
        'standard deviation of the data'
    """
    c = torch.logspace(-4, 2, 61, dtype=torch.float64) if spectrum is None else moments.as_directions(spectrum)[0]
    ax = _axes(ax)
    for plan in plans:
        gain = moments.response(plan, sde, c).gain
        ax.plot(c.sqrt().tolist(), gain.tolist(), label=f"{plan.name}, {plan.nfe}")
    ax.axhline(1.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xscale="log", xlabel="standard deviation of the data", ylabel="deviation / exact deviation")
    ax.legend(fontsize=8)
    return ax


@checked
def stability(plans: Sequence[Plan], sde: SDE, variance: float = 1.0, ax: Axes | None = None) -> Axes:
    """Plot the sensitivity of the result to each evaluation, a curve for each plan; return the axes.

    Arguments:
        plans: Plans to plot.
        sde: Process of the plans.
        variance: Variance of the data in the direction of the plot.
        ax: Axes to draw into, by default new ones.
    """
    check.number("variance", variance, at_least=0)
    ax = _axes(ax)
    for plan in plans:
        lam = [sde.lam(float(row.t)) for row in plan.rows if row.evaluates]
        sensitivity = moments.stability(plan, sde, variance).sensitivity[0].tolist()
        points = [(x, y) for x, y in zip(lam, sensitivity, strict=True) if math.isfinite(x)]
        ax.plot(*zip(*points, strict=True), marker=".", label=f"{plan.name}, {plan.nfe}")
    ax.axhline(0.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="λ of the evaluation", ylabel="∂ result / ∂ evaluation")
    ax.legend(fontsize=8)
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]
