"""Error against the number of function evaluations, for lists of solvers and grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.analysis.orders import event_of, exact_flow
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.start import Start
from scoresde.grids.spacings import karras
from scoresde.noise.keyed import Noise
from scoresde.plan.run import run
from scoresde.solvers.rule import Solver


@dataclass(frozen=True)
class Work:
    """Error of one solver on one grid at one budget.

    Arguments:
        solver: Name of the solver.
        grid: Name of the function that makes the grid.
        nfe: Number of function evaluations.
        median: Median error over the initial states.
        rmse: Root of the mean squared error.
    """

    solver: str
    grid: str
    nfe: int
    median: float
    rmse: float


@checked
def work_precision(
    solvers: Sequence[Solver],
    model: AbstractDenoiser,
    grids: Sequence[Callable[..., Tensor]] = (karras,),
    nfes: Sequence[int] = (5, 6, 8, 10, 12, 15, 20, 30, 50),
    *,
    x: Tensor | None = None,
    truth: Tensor | None = None,
    n: int = 256,
    seed: int = 0,
    t_start: float | None = None,
    t_end: float = 0.0,
    t_min: float | None = None,
) -> list[Work]:
    """Error against number of evaluations, for solvers × grids × budgets.

    Arguments:
        solvers: Solvers to compare.
        model: Denoiser.
        grids: Functions that make the grids.
        nfes: Budgets of function evaluations.
        x: Initial states at `t_start`, (B, *event) in float64; by default `n` samples of the prior with the shape
            ``model.event``.
        truth: Exact results from `x`, by default from :func:`exact_flow`.
        n: Number of initial states.
        seed: Seed of the initial states.
        t_start: First time of the grids, by default T.
        t_end: Last time of the grids.
        t_min: Last positive time of grids that end at 0, by default that of each function in `grids`.
    """
    sde = model.sde
    check.window(sde.T, t_start, t_end)
    limits = {"t_start": t_start, "t_end": t_end or None, "t_min": t_min}
    options = {name: t for name, t in limits.items() if t is not None}
    check.integer("n", n, at_least=1)
    start = sde.T if t_start is None else t_start
    if x is None:
        x = Start(dtype=torch.float64).draw(model, (n, *event_of(model)), start, Noise(seed))
    if truth is None:
        near = t_end if sde.sigma(t_end) > 0 else sde.t_of_lam(min(sde.lam(sde.t_min) + 3.0, sde.lam(1e-6 * sde.T)))
        truth = exact_flow(model)(x, start, near)
        if t_end != near:
            truth = model.x0(truth, near)
    rows = []
    for solver in solvers:
        for maker in grids:
            for nfe in nfes:
                rule, steps = solver.for_nfe(nfe, clean=sde.sigma(t_end) == 0)
                plan = rule.plan(sde, maker(sde, steps, **options))
                if plan.nfe > nfe:
                    continue
                with torch.no_grad():
                    gap = (run(plan, model.x0, x) - truth).flatten(1).norm(dim=1)
                check.warn_unless_finite(gap, f"the errors of {rule!r}")
                rmse = float(gap.square().mean().sqrt())
                rows.append(
                    Work(repr(solver), getattr(maker, "__name__", repr(maker)), plan.nfe, float(gap.median()), rmse)
                )
    return rows
