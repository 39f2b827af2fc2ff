"""From data to its code along the probability flow, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian, check_gaussian
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import quadratic_vp
from scoresde.integrators.adaptive import Adaptive
from scoresde.sampling.solve import GridMaker, solve
from scoresde.solvers.deterministic import DPMSolverPP
from scoresde.solvers.rule import Solver


def encode(
    model: AbstractDenoiser,
    x: Tensor,
    solver: Solver | Adaptive | None = None,
    *,
    steps: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    start: Gaussian | None = None,
    **options: Any,
) -> Tensor:
    """Run the probability flow from data to noise, with the same rules: :func:`decode` takes it back at their order.

    Arguments:
        model: A denoiser.
        x: Data, (B, *event).
        solver: A deterministic rule, by default DPM-Solver++ with exact single steps of order 3, or :class:`Adaptive`.
        steps: Number of legs, by default 50; :class:`Adaptive` chooses its own.
        grid: Times from noise to data, ending at a positive time, or a grid maker; used the other way round.
        t_start: Time of the data, by default ``sde.t_min``.
        t_end: Time of the code, by default T.
        start: A :class:`Gaussian` whose flow carries the code from `t_end` on to T.
        **options: Those of :func:`solve` that say nothing about grids.
    """
    _no_budget(options)
    if isinstance(solver, Adaptive):
        clean, noisy = _ends(model, t_start, t_end)
        options |= {"steps": steps, "grid": grid, "t_start": clean, "t_end": noisy}
        return solve(model, check.state("x", x), solver, **options).x
    rule, times = _both_ways(model, solver, steps, grid, t_start, t_end)
    plan = rule.plan(model.sde, times.flip(0), up="solve")
    z = solve(model, check.state("x", x), plan, **options).x
    return z if start is None else check_gaussian("start", start, model.sde).flow(z, float(times[0]), model.sde.T)


def decode(
    model: AbstractDenoiser,
    z: Tensor,
    solver: Solver | Adaptive | None = None,
    *,
    steps: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    **options: Any,
) -> Tensor:
    """Run the probability flow from noise back to data: the inverse of :func:`encode`, with the same arguments.

    They mean the same both ways: `t_start` is the time of the data and `t_end` that of the code, so that
    ``decode(model, encode(model, x, t_end=0.4), t_end=0.4)`` is x. For :func:`sample` the code would start at
    ``t_start=0.4``.
    """
    _no_budget(options)
    if isinstance(solver, Adaptive):
        clean, noisy = _ends(model, t_start, t_end)
        options |= {"steps": steps, "grid": grid, "t_start": noisy, "t_end": clean}
        return solve(model, check.state("z", z), solver, **options).x
    rule, times = _both_ways(model, solver, steps, grid, t_start, t_end)
    return solve(model, check.state("z", z), rule.plan(model.sde, times), **options).x


def _no_budget(options: dict[str, Any]) -> None:
    if "nfe" in options:
        raise TypeError("`nfe` is a budget for sampling; encode and decode count `steps`, the same number both ways.")


def _ends(model: AbstractDenoiser, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    """Times of data and of its code."""
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`model` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    sde = model.sde
    noisy = t_end if t_end is not None else sde.T if sde.alpha(sde.T) > 0 else sde.T * (1 - 1e-3)
    return sde.t_min if t_start is None else t_start, noisy


def _both_ways(
    model: AbstractDenoiser,
    solver: Solver | None,
    steps: int | None,
    grid: Any,
    t_start: float | None,
    t_end: float | None,
) -> tuple[Solver, Tensor]:
    clean, noisy = _ends(model, t_start, t_end)
    if not (solver is None or isinstance(solver, Solver)):
        raise TypeError(f"`solver` must be a rule such as DPMSolverPP(), which can run both ways, got {solver!r:.80}.")
    sde = model.sde
    steps = 50 if steps is None else check.integer("steps", steps, at_least=1)
    if grid is None or callable(grid):
        maker = quadratic_vp if grid is None else grid
        times = maker(sde, steps, t_start=noisy, t_end=clean)
    elif t_start is not None or t_end is not None:
        raise ValueError("`grid` already says where to start and end; drop `t_start` and `t_end`.")
    else:
        times = check_grid(sde, grid)
    if sde.sigma(float(times[-1])) == 0:
        raise ValueError(
            f"`grid` must end at a positive time, where there is noise to see, for a code of data; it ends at "
            f"{float(times[-1]):g}, as in ss.grids.karras(sde, n, t_end=sde.t_min)."
        )
    if solver is None:
        return DPMSolverPP(3, kind="single", form="exact"), times
    if solver.plan(sde, times).stochastic:
        raise ValueError(
            f"`solver` must be deterministic, or what is decoded is not what was encoded; {solver} draws noise. Take a "
            f"rule without, as DPMSolverPP(2), or eta=0."
        )
    return solver, times
