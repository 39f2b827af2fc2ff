"""Figures of plans; every function takes and returns matplotlib axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from scoresde import _checks as check
from scoresde.analysis.moments import Numbers, as_directions, response, stability
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE


def plot_response(plans: Sequence[Plan], sde: SDE, spectrum: Numbers | None = None, ax: Any = None) -> Any:
    """Plot the gain against the standard deviation of the data, a curve for each plan; return the axes.

    Arguments:
        plans: Plans to plot.
        sde: Process of the plans.
        spectrum: Variances of the data, by default from 10⁻⁴ to 10².
        ax: Axes to draw into, by default new ones.
    """
    c = torch.logspace(-4, 2, 61, dtype=torch.float64) if spectrum is None else as_directions(spectrum)[0]
    ax = _axes(ax)
    for plan in plans:
        ax.plot(c.sqrt().tolist(), response(plan, sde, c).gain.tolist(), label=f"{plan.name}, {plan.nfe}")
    ax.axhline(1.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xscale="log", xlabel="standard deviation of the data", ylabel="deviation / exact deviation")
    ax.legend(fontsize=8)
    return ax


def plot_stability(plans: Sequence[Plan], sde: SDE, variance: float = 1.0, ax: Any = None) -> Any:
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
        t = [float(row.t) for row in plan.rows if row.evaluates]
        lam = [sde.lam(v) for v in t]
        points = [(x, y) for x, y in zip(lam, stability(plan, sde, variance).sensitivity[0].tolist(), strict=True)
                  if math.isfinite(x)]  # fmt: skip
        ax.plot(*zip(*points, strict=True), marker=".", label=f"{plan.name}, {plan.nfe}")
    ax.axhline(0.0, color="0.7", lw=0.8, zorder=0)
    ax.set(xlabel="λ of the evaluation", ylabel="∂ result / ∂ evaluation")
    ax.legend(fontsize=8)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots()[1]
