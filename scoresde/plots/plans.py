"""Pictures of plans: the table itself, and what it does to data of a given scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.analysis import moments
from scoresde.plan.rows import Weight
from scoresde.plan.table import Plan
from scoresde.plots.canvas import FAINT, axes_or_new, figure_or_new
from scoresde.processes.sde import SDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plan", "response", "stability"]


@checked
def plan(plan: Plan, figure: Figure | None = None) -> Figure:
    r"""Plot the table of a plan: which state and which evaluation feeds which row, with what weight.

    .. math:: x_r = \sum_k a_{rk} x_k + \sum_k b_{rk} d_k + \sum_k c_{rk} z_k

    A panel for each of a, b and, if the plan draws noise, c. Lines are rows of the table, columns are the terms of the
    sum. Red weights are positive and blue ones negative. Of one weight for each sample, the mean is shown.

    Arguments:
        plan: Plan to plot.
        figure: Figure to draw into, by default a new one.

    Example:
        >>> import scoresde as ss
        >>> table = ss.UniPC(3).plan(ss.VP(), ss.grids.karras(ss.VP(), 5))
        >>> [ax.get_title() for ax in ss.plots.plan(table).axes]
        ['weights of the states x', 'weights of the evaluations d']
    """
    rows = plan.rows
    titles = {"x": "weights of the states x", "d": "weights of the evaluations d", "z": "weights of the noise z"}
    columns = {name: title for name, title in titles.items() if name != "z" or plan.stochastic}
    side = min(2.2 + 0.32 * len(rows), 8.0)
    figure = figure_or_new(figure, (side * len(columns), side))
    panels = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for ax, (name, title) in zip(panels, columns.items(), strict=True):
        used = sorted({k for row in rows for k, _ in getattr(row, name)})
        weights = torch.zeros(len(rows), len(used), dtype=torch.float64)
        for r, row in enumerate(rows):
            for k, w in getattr(row, name):
                weights[r, used.index(k)] = _number(w)
        largest = float(weights.abs().max()) if used else 1.0
        image = torch.where(weights == 0, torch.nan, weights)  # what is not used stays white
        ax.imshow(image.numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, aspect="auto")
        if len(rows) <= 14:
            for r, c in weights.nonzero().tolist():
                w = float(weights[r, c])
                ink = "white" if abs(w) > 0.6 * largest else "black"
                ax.text(c, r, f"{w:.2g}", ha="center", va="center", fontsize=7, color=ink)
        every = max(1, len(used) // 12)
        ax.set(title=title, xlabel=f"{name}[k]", xticks=range(0, len(used), every), xticklabels=used[::every])
    every = max(1, len(rows) // 14)
    labels = [f"{r}  t={_number(row.t):.3g}" for r, row in enumerate(rows)]
    panels[0].set(yticks=range(0, len(rows), every), yticklabels=labels[::every])
    figure.suptitle(f"{plan.name or 'plan'}: {plan.nfe} evaluations")
    figure.tight_layout()
    return figure


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
    ax = axes_or_new(ax)
    for plan in plans:
        gain = moments.response(plan, sde, c).gain
        ax.plot(c.sqrt().tolist(), gain.tolist(), label=f"{plan.name}, {plan.nfe}")
    ax.axhline(1.0, color=FAINT, lw=0.8, zorder=0)
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
    ax = axes_or_new(ax)
    for plan in plans:
        lam = [sde.lam(float(row.t)) for row in plan.rows if row.evaluates]
        sensitivity = moments.stability(plan, sde, variance).sensitivity[0].tolist()
        points = [(x, y) for x, y in zip(lam, sensitivity, strict=True) if math.isfinite(x)]
        ax.plot(*zip(*points, strict=True), marker=".", label=f"{plan.name}, {plan.nfe}")
    ax.axhline(0.0, color=FAINT, lw=0.8, zorder=0)
    ax.set(xlabel="λ of the evaluation", ylabel="∂ result / ∂ evaluation")
    ax.legend(fontsize=8)
    return ax


def _number(w: Weight) -> float:
    """A weight or a time; of one number per sample, the mean."""
    return float(torch.as_tensor(w, dtype=torch.float64).detach().mean())
