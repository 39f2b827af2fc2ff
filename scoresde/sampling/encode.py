"""From data to its code along the probability flow, and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked_with, words
from scoresde._names import hint, meant_by
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.gaussian import Gaussian, check_gaussian
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import quadratic_vp
from scoresde.integrators.method import Method, Watch
from scoresde.plan.run import Step
from scoresde.sampling.memo import made, written
from scoresde.sampling.solve import WORDS as SAMPLING
from scoresde.sampling.solve import GridMaker, solve
from scoresde.solvers.deterministic import DPMSolverPP
from scoresde.solvers.rule import Solver

DEFAULT_STEPS = 50

_SAMPLES_ONLY = (
    "batch_size num_samples n_samples num_images n shape size x x_T x_t x0 noise latents init image z device dtype"
).split()
WORDS = {name: hint for name, hint in SAMPLING.items() if name not in _SAMPLES_ONLY} | words("""
seed generator rng random_state manual_seed: the solver must be deterministic, so there is nothing to draw
nfe: use `steps`
""")


@checked_with(WORDS, own=["solver"])
def encode(
    model: AbstractDenoiser,
    x: Tensor,
    solver: Solver | Method | None = None,
    *,
    steps: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    start: Gaussian | None = None,
    watch: Watch | Callable[[Step], None] | bool | None = None,
    grad: str = "off",
) -> Tensor:
    """Map data to noise along the probability flow (inversion); :func:`decode` maps back, up to the solver's order.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)``.
        x: Data, (B, *event).
        solver: Deterministic solver, by default DPM-Solver++ with exact single steps of order 3; or a method such as
            ``ss.Adaptive()``.
        steps: Number of steps, by default 50. Methods with error control choose their own.
        grid: Times from noise to data that end at a positive time, or a grid maker; used in reverse order.
        t_start: Time of the data, by default ``sde.t_min``.
        t_end: Time of the code, by default T.
        start: Gaussian whose flow carries the code on from `t_end` to T.
        watch: Observation of the run, as in :func:`solve`.
        grad: Gradient mode, as in :func:`solve`.

    Returns:
        Code, (B, *event).

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, section 5.4
    """
    check_model(model)
    check.state("x", x)
    check.window(model.sde.T, t_start, t_end)
    clean, noisy = _ends(model, t_start, t_end)
    if isinstance(solver, Method) and not solver.grid:
        _refuse_grid(solver, steps, grid)
        z = solve(model, x, solver, t_start=clean, t_end=noisy, watch=watch, grad=grad).x
        last = noisy
    else:
        times = _both_ways(model, steps, grid, t_start, t_end)
        last = float(times[0])
        if isinstance(solver, Method) and solver.grid == "times":
            z = solve(model, x, solver, grid=times.flip(0), watch=watch, grad=grad).x
        else:
            plan = written(_rule(model, solver, times), model.sde, times.flip(0), up="solve")
            z = solve(model, x, plan, watch=watch, grad=grad).x
    return z if start is None else check_gaussian("start", start, model.sde).flow(z, last, model.sde.T)


@checked_with(WORDS, own=["solver"])
def decode(
    model: AbstractDenoiser,
    z: Tensor,
    solver: Solver | Method | None = None,
    *,
    steps: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
    start: Gaussian | None = None,
    watch: Watch | Callable[[Step], None] | bool | None = None,
    grad: str = "off",
) -> Tensor:
    """Map noise back to data along the probability flow: the inverse of :func:`encode`, with the same arguments.

    The times mean the same in both functions: `t_start` is the time of the data and `t_end` the time of the code.
    Therefore ``decode(model, encode(model, x, t_end=0.4), t_end=0.4)`` is x. For :func:`sample` the same code starts at
    ``t_start=0.4``.

    Arguments:
        model: Denoiser.
        z: Code, (B, *event).
        solver: Deterministic solver or method, as in :func:`encode`.
        steps: Number of steps, by default 50.
        grid: Times from noise to data that end at a positive time, or a grid maker.
        t_start: Time of the data, by default ``sde.t_min``.
        t_end: Time of the code, by default T.
        start: Gaussian whose flow carries a code at T to `t_end`.
        watch: Observation of the run, as in :func:`solve`.
        grad: Gradient mode, as in :func:`solve`.

    Returns:
        Data, (B, *event).
    """
    check_model(model)
    check.state("z", z)
    clean, noisy = _ends(model, t_start, t_end)
    if isinstance(solver, Method) and not solver.grid:
        _refuse_grid(solver, steps, grid)
        return solve(model, z, solver, t_start=noisy, t_end=clean, start=start, watch=watch, grad=grad).x
    times = _both_ways(model, steps, grid, t_start, t_end)
    if isinstance(solver, Method) and solver.grid == "times":
        return solve(model, z, solver, grid=times, start=start, watch=watch, grad=grad).x
    plan = written(_rule(model, solver, times), model.sde, times)
    return solve(model, z, plan, start=start, watch=watch, grad=grad).x


def _refuse_grid(solver: Method, steps: int | None, grid: object) -> None:
    for name, value in (("steps", steps), ("grid", grid)):
        if value is not None:
            raise TypeError(
                f"`{name}` has no meaning with {type(solver).__name__}, which chooses its own steps; drop it."
            )


def _ends(model: AbstractDenoiser, t_start: float | None, t_end: float | None) -> tuple[float, float]:
    """Times of data and of its code."""
    sde = model.sde
    noisy = t_end if t_end is not None else sde.T if sde.alpha(sde.T) > 0 else sde.T * (1 - 1e-3)
    return sde.t_min if t_start is None else t_start, noisy


def _both_ways(
    model: AbstractDenoiser,
    steps: int | None,
    grid: Tensor | Sequence[float] | GridMaker | None,
    t_start: float | None,
    t_end: float | None,
) -> Tensor:
    """A grid from noise to data that can be run in both directions."""
    sde = model.sde
    clean, noisy = _ends(model, t_start, t_end)
    if grid is None or callable(grid):
        maker = quadratic_vp if grid is None else grid
        count = DEFAULT_STEPS if steps is None else check.integer("steps", steps, at_least=1)
        times = made(maker, sde, count, (("t_start", noisy), ("t_end", clean)))
    elif t_start is not None or t_end is not None or steps is not None:
        raise ValueError("`grid` has its own ends; drop `steps`, `t_start` and `t_end`.")
    else:
        times = check_grid(sde, grid)
    last = float(times[-1])
    if sde.sigma(last) == 0:
        raise ValueError(
            f"`grid` must end at a positive time, because a code exists only where σ > 0; it ends at {last:g}. Use for "
            f"example ss.grids.karras(sde, n, t_end=sde.t_min)."
        )
    return torch.as_tensor(times)


def _rule(model: AbstractDenoiser, solver: object, times: Tensor) -> Solver:
    """The solver, if it can run both ways."""
    if solver is None:
        return DPMSolverPP(3, kind="single", form="exact")
    if not isinstance(solver, Solver):
        raise TypeError(
            f"`solver` must be a solver such as DPMSolverPP(), which can run both ways, got {solver!r:.80}"
            f"{hint(meant_by(solver)) or '.'}"
        )
    if written(solver, model.sde, times).stochastic:
        raise ValueError(
            f"`solver` must be deterministic, otherwise decoding does not invert encoding; {solver} draws noise. Use a "
            f"solver without noise, such as DPMSolverPP(2), or eta=0."
        )
    return solver
