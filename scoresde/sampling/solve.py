"""From a model to samples, and back: `sample`, `solve`, `encode`, `decode`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.network import Denoiser
from scoresde.denoisers.start import draw_start
from scoresde.grids.spacings import quadratic_vp
from scoresde.integrators.adaptive import Adaptive, AdaptiveSolution, flow
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.run import Hook, Step, run
from scoresde.plan.table import Plan
from scoresde.sampling.transitions import Transition
from scoresde.sampling.transitions import transitions as row_transitions
from scoresde.solvers.deterministic import DPMSolverPP, VelocityAB
from scoresde.solvers.rule import Solver

GridMaker = Callable[..., Tensor]

DEFAULT_STEPS = 20


@dataclass(frozen=True)
class Solution:
    """What a solve returns.

    Arguments:
        x: The result, (B, *event).
        nfe: Evaluations of the network.
        times: Times of the nodes.
        trajectory: States at the times that were asked for, on the device that was asked for, by time.
        plan: The table that was run.
        seed: The seed of its noise.
        transitions: The Gaussian transition of every row after the start, if they were asked for.
    """

    x: Tensor
    nfe: int
    times: list[Any]
    trajectory: dict[float, Tensor] = field(repr=False)
    plan: Plan = field(repr=False)
    seed: int | tuple[int, ...] | None
    transitions: tuple[Transition, ...] = field(default=(), repr=False)


def sample(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | Adaptive | None = None,
    **options: Any,
) -> Tensor:
    """Draw samples.

    Arguments:
        model: A denoiser.
        shape_or_x: Shape (B, *event) to start from the prior, or a state to start from at `t_start`.
        solver: A rule, a plan, :class:`Adaptive`, or None for the default.
        **options: Those of :func:`solve`.

    Returns:
        (B, *event).

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> x = ss.sample(mix, (4, 1), steps=10, seed=0)
        >>> bool(((x.abs() - 1).abs() < 0.5).all())
        True
    """
    return solve(model, shape_or_x, solver, **options).x


@overload
def solve(
    model: AbstractDenoiser, shape_or_x: Sequence[int] | Tensor, solver: Adaptive, **options: Any
) -> AdaptiveSolution: ...


@overload
def solve(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | None = None,
    **options: Any,
) -> Solution: ...


def solve(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | Adaptive | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    data_std: float = 1.0,
    start: Gaussian | None = None,
    hook: Hook | None = None,
    callback: Callable[[Step], None] | None = None,
    progress: bool | str = False,
    save_at: str | Sequence[float] = (),
    save_device: torch.device | str = "cpu",
    grad: str = "off",
    overwrite: bool = False,
    transitions: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **cond: Any,
) -> Solution | AdaptiveSolution:
    """Solve from noise to data, with everything that can be said about it.

    Arguments:
        model: A denoiser.
        shape_or_x: Shape (B, *event) to start from the prior at `t_start`, or a state at `t_start`.
        solver: A rule, a :class:`Plan` (whose grid is its own), None for :func:`default_solver`, or
            :class:`Adaptive`, which chooses its own steps: it takes no `steps`, `nfe`, `grid`,
            `hook`, `callback`, `progress`, `overwrite` or `transitions`, any times in `save_at`, and returns an
            :class:`AdaptiveSolution`.
        steps: Number of legs of the grid; a rule with k stages spends about k evaluations on each. By default 20.
        nfe: Instead: a budget of evaluations, which the rule turns into legs and never exceeds.
        grid: Times, or a grid maker such as ``ss.grids.karras``; by default :func:`quadratic_vp`.
        seed: An integer, one for each sample, a :class:`Noise`, or None for a fresh one (told by the solution).
        t_start: Where to start, by default T.
        t_end: Where to end; 0 returns the denoised state.
        data_std: Standard deviation of the data, for the prior.
        start: A :class:`Gaussian` whose flow goes from T to `t_start`, or to where the plan starts, without an
            evaluation; a state is then one at T.
        hook: ``(node, t, x) -> x`` at every node, before the network is asked there.
        callback: Called with a :class:`Step` at every node.
        progress: Show a bar if the terminal is interactive; ``"always"`` shows it wherever it is.
        save_at: Times of the grid whose states to keep, or ``"all"``.
        save_device: Where to keep them.
        grad: ``"off"``, ``"full"`` to differentiate through every evaluation, ``"checkpoint"`` to do so with the memory
            of one, at the price of a second pass.
        overwrite: Make states in the memory of those they replace, see :func:`run`: for networks that
            keep no reference to their input.
        transitions: Keep mean, standard deviation and log-density of every step, see
            :func:`transitions`; with ``grad="full"`` they carry gradients to the network.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given; by default the model's.
        **cond: Conditions, handed to the network.
    """
    check.choice("grad", grad, ("off", "full", "checkpoint"))
    check.conditions(cond, solve)
    if isinstance(solver, Adaptive):
        given: dict[str, Any] = {"steps": steps, "nfe": nfe, "grid": grid, "hook": hook, "callback": callback}
        given |= {"progress": progress or None, "overwrite": overwrite or None, "transitions": transitions or None}
        refused = [name for name, value in given.items() if value is not None]
        if refused:
            raise TypeError(f"`{refused[0]}` has no meaning with Adaptive, which chooses its own steps; drop it.")
        source = seed if isinstance(seed, Noise) else Noise(seed)
        first = model.sde.T if t_start is None else t_start
        with torch.set_grad_enabled(grad != "off"):
            x = draw_start(model, shape_or_x, first, source, data_std, dtype, device, start)
            found = _controlled(model, x, solver, first, t_end, save_at, save_device, _denoise(model, {}, grad), cond)
        return replace(found, seed=source.seed)
    plan = _plan(model, solver, steps, nfe, grid, t_start, t_end)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    kept: dict[float, Tensor] = {}
    wanted = _wanted(plan, save_at)

    def seen(step: Step) -> None:
        if wanted is not None and (not wanted or float(step.t) in wanted):
            kept[float(step.t)] = step.x.to(save_device)
        if callback is not None:
            callback(step)
        bar.update(step)

    watched = wanted is not None or callback is not None or bool(progress)
    if transitions and (watched or hook is not None or grad == "checkpoint"):
        raise ValueError(
            "`transitions` has every state of the run; drop `hook`, `callback`, `save_at` and `progress`, and "
            "`grad`='checkpoint'."
        )

    with torch.set_grad_enabled(grad != "off"), _Bar(plan, progress) as bar:
        begin = (model, shape_or_x, plan.rows[0].t, noise, data_std, dtype, device, start)
        draws = noise.fork(Stream.STEPS) if plan.stochastic else None
        made: tuple[Transition, ...] = ()
        if transitions:
            made = tuple(row_transitions(plan, model, draw_start(*begin), draws, **cond))
            x = made[-1].x
        else:
            x = run(
                plan,
                _denoise(model, cond, grad),
                draw_start(*begin),  # here, so that nothing but the run holds it
                draws,
                hook=hook,
                callback=seen if watched else None,
                overwrite=overwrite,
            )
    check.warn_unless_finite(x)
    return Solution(x, plan.nfe, plan.times, kept, plan, noise.seed, made)


def default_solver(nfe: int, model: AbstractDenoiser | None = None) -> Solver:
    """The rule that is used when none is named.

    Velocity Adams–Bashforth of an order that rises with the budget, on a grid quadratic in VP time: of all pairs of a
    rule and a grid the nearest to the best of each case (see the page on work and precision). Unless a network predicts
    noise: its data prediction at high noise is its error divided by α, which velocity rules weigh more than
    :func:`DPMSolverPP` of order 2 does.

    Arguments:
        nfe: How many evaluations there are.
        model: The denoiser.
    """
    if isinstance(model, Denoiser) and model.predicts in ("eps", "score"):
        return DPMSolverPP(order=1 if nfe < 3 else 2)
    return VelocityAB(order=1 if nfe < 3 else 2 if nfe < 7 else 3 if nfe < 12 else 4)


def _plan(
    model: AbstractDenoiser,
    solver: Solver | Plan | None,
    steps: int | None,
    nfe: int | None,
    grid: Any,
    t_start: float | None,
    t_end: float,
) -> Plan:
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`model` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    if isinstance(solver, Plan):
        if steps is not None or nfe is not None or grid is not None or t_start is not None or t_end != 0.0:
            raise ValueError("a plan has its own grid; drop `steps`, `nfe`, `grid`, `t_start` and `t_end`.")
        if solver.sde and solver.sde != repr(model.sde):
            warnings.warn(f"the plan was written for {solver.sde}, the model is on {model.sde!r}.", stacklevel=4)
        return solver
    if solver is not None and not isinstance(solver, Solver):
        hint = (
            f"call it, {solver.__name__}()" if callable(solver) and hasattr(solver, "__name__") else "as in ss.DDIM()"
        )
        got = repr(solver) if isinstance(solver, str | int) else type(solver).__name__
        raise TypeError(f"`solver` must be a rule such as UniPC(), a Plan or None, got {got}; {hint}.")
    if isinstance(grid, str):
        raise TypeError(f"`grid` must be times or a grid maker such as ss.grids.karras, got {grid!r}.")
    given = grid is not None and not callable(grid)
    if (steps is not None) + (nfe is not None) + given > 1:
        raise ValueError("give one of `steps` (legs of the grid), `nfe` (a budget of evaluations) and `grid` (times).")
    if given:
        if t_start is not None or t_end != 0.0:
            raise ValueError("`grid` already says where to start and end; `grids.window` cuts a grid.")
        rule = default_solver(len(grid) - 1, model) if solver is None else solver
        return rule.plan(model.sde, torch.as_tensor(grid, dtype=torch.float64))
    legs = DEFAULT_STEPS if steps is None else check.integer("steps", steps, at_least=1)
    if nfe is not None:
        check.integer("nfe", nfe, at_least=1)
        rule = default_solver(nfe, model) if solver is None else solver
        rule, legs = rule.for_nfe(nfe, clean=model.sde.sigma(t_end) == 0)
    else:
        rule = default_solver(legs, model) if solver is None else solver
    maker: GridMaker = quadratic_vp if grid is None else grid
    window: dict[str, float] = {} if t_start is None else {"t_start": t_start}
    if t_end != 0.0:
        window["t_end"] = t_end
    plan = rule.plan(model.sde, maker(model.sde, legs, **window))
    if nfe is not None and plan.nfe > nfe:
        raise ValueError(f"{rule} needs at least {plan.nfe} evaluations, `nfe` = {nfe} is too small a budget.")
    return plan


def _controlled(
    model: AbstractDenoiser,
    x: Tensor,
    rule: Adaptive,
    t_start: float,
    t_end: float,
    save_at: str | Sequence[float],
    save_device: torch.device | str,
    denoise: Callable[..., Tensor],
    cond: dict[str, Any],
) -> AdaptiveSolution:
    if isinstance(save_at, str):
        raise ValueError("`save_at` must be times with Adaptive: each sample has steps of its own.")
    found = flow(model, x, t_start, t_end, replace(rule, dense=True) if save_at else rule, denoise=denoise, **cond)
    if not save_at:
        return found
    assert found.path is not None
    kept = {float(t): found.path(float(t)).to(save_device) for t in save_at}
    return replace(found, trajectory=kept, path=found.path if rule.dense else None)


def _denoise(model: AbstractDenoiser, cond: dict[str, Any], grad: str) -> Callable[..., Tensor]:
    if grad == "checkpoint":
        return lambda x, t, **more: checkpoint(lambda y: model.x0(y, t, **cond, **more), x, use_reentrant=False)
    if not cond:
        return model.x0
    return lambda x, t: model.x0(x, t, **cond)


def _wanted(plan: Plan, save_at: str | Sequence[float]) -> set[float] | None:
    """Times to keep: None for none, empty for all."""
    if save_at and any(isinstance(t, Tensor) and t.ndim for t in plan.times):
        raise ValueError("`save_at` names times, and each sample has its own here; use `callback`.")
    if isinstance(save_at, str):
        check.choice("save_at", save_at, ("all",))
        return set()
    wanted = {float(t) for t in save_at}
    if not wanted:
        return None
    have = [float(t) for t in plan.times]
    for t in wanted:
        if t not in have:
            nearest = min(have, key=lambda s: abs(s - t))
            raise ValueError(f"`save_at` must name times of the grid, got {t!r}; the nearest is {nearest!r}.")
    return wanted


class _Bar:
    """A progress bar over nodes, or nothing."""

    def __init__(self, plan: Plan, progress: bool | str) -> None:
        self._bar: Any = None
        if not isinstance(progress, bool):
            check.choice("progress", progress, ("always",))
        if progress:
            from tqdm import tqdm

            self._bar = tqdm(
                total=plan.nfe, desc=plan.name, unit="call", disable=False if progress == "always" else None
            )

    def __enter__(self) -> _Bar:
        return self

    def update(self, step: Step) -> None:
        if self._bar is not None:
            self._bar.update(step.nfe - self._bar.n)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
