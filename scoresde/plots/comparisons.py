"""Pictures of measurements: errors against cost, orders, losses, calibration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.analysis.orders import Order
from scoresde.analysis.work import Work
from scoresde.plots.canvas import FAINT, array, axes_or_new
from scoresde.training.losses import LossByNoise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["calibration", "loss_by_noise", "orders", "work_precision"]


@checked
def work_precision(table: Sequence[Work], of: str = "median", ax: Axes | None = None) -> Axes:
    """Plot error against the number of evaluations, a curve for each solver and grid.

    Arguments:
        table: Result of ``ss.analysis.work_precision``.
        of: Error to plot, ``"median"`` or ``"rmse"``.
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.3)
        >>> table = ss.analysis.work_precision([ss.DDIM(), ss.UniPC(2)], mix, nfes=(5, 10), n=16)
        >>> len(ss.plots.work_precision(table).lines)
        2
    """
    check.choice("of", of, ("median", "rmse"))
    if not table:
        raise ValueError("`table` must hold at least one row of `ss.analysis.work_precision`, it is empty.")
    ax = axes_or_new(ax)
    several = len({row.grid for row in table}) > 1
    for solver, grid in dict.fromkeys((row.solver, row.grid) for row in table):
        rows = sorted((r for r in table if (r.solver, r.grid) == (solver, grid)), key=lambda r: r.nfe)
        label = f"{solver}, {grid}" if several else solver
        ax.plot([r.nfe for r in rows], [getattr(r, of) for r in rows], marker=".", label=label)
    ax.set(xscale="log", yscale="log", xlabel="evaluations of the network", ylabel=f"{of} error")
    counts = sorted({row.nfe for row in table})
    ax.set_xticks(counts[:: max(1, len(counts) // 8)], [str(n) for n in counts[:: max(1, len(counts) // 8)]])
    ax.minorticks_off()
    ax.legend(fontsize=7)
    return ax


@checked
def orders(table: Order | Mapping[str, Order], ax: Axes | None = None) -> Axes:
    """Plot error against the number of steps, with the measured order of each solver.

    Arguments:
        table: Result of ``ss.analysis.convergence_order``, or a mapping from names to such results.
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.5)
        >>> measured = {"DDIM": ss.analysis.convergence_order(ss.DDIM(), mix, n=4)}
        >>> ss.plots.orders(measured).get_xlabel()
        'steps'
    """
    named = {"": table} if isinstance(table, Order) else dict(table)
    ax = axes_or_new(ax)
    for k, (name, order) in enumerate(named.items()):
        label = f"{name}: {order.slope:.2f}, declared {order.declared}".removeprefix(": ")
        ax.plot(order.steps, order.errors, marker="o", color=f"C{k}", label=label)
        first, last = order.steps[0], order.steps[-1]
        exact = order.errors[0] * (first / last) ** order.declared
        ax.plot([first, last], [order.errors[0], exact], color=FAINT, ls="--", lw=0.8, zorder=0)
    ax.set(xscale="log", yscale="log", xlabel="steps", ylabel="median error")
    steps = sorted({n for order in named.values() for n in order.steps})
    ax.set_xticks(steps, [str(n) for n in steps])
    ax.minorticks_off()
    ax.legend(fontsize=8)
    return ax


@checked
def loss_by_noise(loss: LossByNoise | Sequence[Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Plot the mean error of a network against the noise level, λ = log(α/σ).

    Arguments:
        loss: Collector of errors, such as ``dsm.levels``, or the rows of its method `read`.
        ax: Axes to draw into, by default new ones.
    """
    rows = loss.read(reset=False) if isinstance(loss, LossByNoise) else list(loss)
    rows = [row for row in rows if row["count"]]
    if not rows:
        raise ValueError(
            "`loss` holds no finite errors since it was last read; train for some steps, or `loss.add(t, error)`."
        )
    ax = axes_or_new(ax)
    ax.plot([row["lam"] for row in rows], [row["error"] for row in rows], marker=".")
    ax.set(xlabel="λ = log(α/σ): noise on the left, data on the right", ylabel="mean error", yscale="log")
    return ax


@checked
def calibration(ranks: Tensor, level: float = 0.95, ax: Axes | None = None) -> Axes:
    r"""Plot the distribution of the ranks of the truth; if the posterior is right, it is on the diagonal.

    The band holds the whole curve of N uniform ranks with probability at least `level`:

    .. math:: |F_N(u) - u| \le \sqrt{\frac{\log(2 / (1 - \text{level}))}{2N}}

    A curve above the diagonal on the left and below it on the right tells of posteriors that are too narrow.

    Arguments:
        ranks: Result of ``ss.metrics.ranks``, (N,) or (N, D) with a curve for each entry.
        level: Probability of the band.
        ax: Axes to draw into, by default new ones.

    References:
        | Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018),
          arXiv:1804.06788
        | Massart, The Tight Constant in the Dvoretzky-Kiefer-Wolfowitz Inequality (1990)

    Example:
        >>> import torch, scoresde as ss
        >>> ranks = ss.metrics.ranks(torch.zeros(64, 2), torch.zeros(64, 9, 2), seed=0)
        >>> len(ss.plots.calibration(ranks).lines)
        3
    """
    check.number("level", level, above=0, below=1)
    if ranks.ndim not in (1, 2) or len(ranks) == 0:
        raise ValueError(f"`ranks` must have shape (N,) or (N, D) with N > 0, got {tuple(ranks.shape)}.")
    N = len(ranks)
    ax = axes_or_new(ax, (4.5, 4.5))
    band = math.sqrt(math.log(2 / (1 - level)) / (2 * N))
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    low, high = array((u - band).clamp(0, 1)), array((u + band).clamp(0, 1))
    ax.fill_between(array(u), low, high, color="0.85", zorder=0, label=f"{level:.0%} band")
    ax.plot([0, 1], [0, 1], color=FAINT, lw=0.8, zorder=1)
    columns = ranks.reshape(N, -1).T
    for k, column in enumerate(columns):
        at = torch.cat([torch.zeros(1), column.detach().cpu().double().sort().values, torch.ones(1)])
        steps = torch.cat([torch.arange(N + 1) / N, torch.ones(1)])
        ax.step(array(at), array(steps), where="post", lw=1.2, label=f"entry {k}" if len(columns) > 1 else "ranks")
    ax.set(xlabel="rank of the truth", ylabel="share of ranks below", xlim=(0, 1), ylim=(0, 1), aspect="equal")
    if len(columns) <= 10:
        ax.legend(fontsize=7)
    return ax
