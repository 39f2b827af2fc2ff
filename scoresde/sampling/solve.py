"""From a denoiser to samples: `sample`, and `solve`, which also returns what the run did."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked, checked_with, words
from scoresde._progress import Bar
from scoresde.denoisers.base import CONDITIONS, AbstractDenoiser, Counter
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready, warn_untrained
from scoresde.denoisers.start import Start, as_start
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import quadratic_vp
from scoresde.integrators.method import GRADS, Checkpointed, Method, Problem, Solution, Watch, as_watch
from scoresde.noise.keyed import Noise
from scoresde.plan.run import Step, run
from scoresde.plan.table import Plan
from scoresde.sampling.defaults import bounded, default_grid, fitted
from scoresde.sampling.few_steps import warn_of_few_steps
from scoresde.sampling.memo import made, written
from scoresde.sampling.transitions import transitions
from scoresde.solvers.rule import Solver

# Hints for the keywords of other libraries.
WORDS = CONDITIONS | words("""
num_steps n_steps num_inference_steps num_timesteps timesteps N: use `steps`, a number, or `grid`, a list of times
sigmas: use `grid`, as in grid=ss.grids.from_sigmas(sde, sigmas)
sigma_min sigma_max rho: use `grid`, as in grid=ss.grids.karras(sde, steps, rho)
generator rng random_state manual_seed: use `seed`, an integer or a Noise
sampler method scheduler algorithm: use `solver`, as in ss.UniPC(3)
eta s_churn s_noise order: it belongs to the solver, as in ss.DDIM(eta=1.0)
rtol atol tol: error control is a solver, as in ss.Adaptive(rtol=1e-3)
batch_size num_samples n_samples num_images n: the first number of `shape_or_x` is the number of samples
shape size x x_T x_t x0 noise latents init image z: use `shape_or_x`, a shape (B, *event) or a state
eps epsilon t_min: use `t_end`, the last time
T t_max: use `t_start`, the first time
device dtype: use `start`, as in start=ss.Start(device=..., dtype=...)
temperature: use `start`, as in start=ss.Start(data_std=...)
callback callbacks hook: use `watch`, as in watch=ss.Watch(callback=...)
progress progress_bar verbose disable tqdm: use `watch`, as in watch=True
trajectory return_trajectory save_intermediates save_at: use `watch` of ss.solve, as in watch=ss.Watch(save_at="all")
no_grad requires_grad: use `grad`, as in grad="full"
clip_denoised clamp: thresholds are denoisers, as in ss.guidance.Clamp(model)
corrector n_corrector snr: use `watch`, as in watch=ss.Watch(hook=ss.sampling.LangevinCorrector(snr))
""")

GridMaker = Callable[..., Tensor]
DEFAULT_STEPS = 20


@checked_with(WORDS, own=["shape_or_x"])
def sample(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | Method | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    seed: int | Sequence[int] | Noise | None = None,
    start: Start | Gaussian | None = None,
    watch: Watch | Callable[[Step], None] | bool | None = None,
    grad: str = "off",
) -> Tensor:
    """Draw samples: :func:`solve` with the same arguments, of which only the samples are returned.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)``.
        shape_or_x: Shape (B, *event) to start from the prior, or a state (B, *event) at `t_start`.
        solver: Solver, plan, other method, or None for :func:`default_solver`.
        steps: Number of steps of the grid, by default 20.
        nfe: Budget of evaluations, instead of `steps`.
        grid: Times, or a function that makes them, such as ``ss.grids.karras``.
        t_start: First time, by default T.
        t_end: Last time, by default 0.
        seed: Seed of the samples: an integer, one integer for each sample, or a :class:`Noise`.
        start: Distribution, dtype and device of the initial state.
        watch: True for a progress bar, a function of a :class:`Step`, or a :class:`Watch`.
        grad: Gradient mode.

    Returns:
        Samples, (B, *event).

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> x = ss.sample(mix, (4, 1), steps=10, seed=0)
        >>> bool(((x.abs() - 1).abs() < 0.5).all())
        True
    """
    return solve(
        model,
        shape_or_x,
        solver,
        steps=steps,
        nfe=nfe,
        grid=grid,
        t_start=t_start,
        t_end=t_end,
        seed=seed,
        start=start,
        watch=watch,
        grad=grad,
    ).x


@checked_with(WORDS, own=["shape_or_x"])
def solve(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    solver: Solver | Plan | Method | None = None,
    *,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    seed: int | Sequence[int] | Noise | None = None,
    start: Start | Gaussian | None = None,
    watch: Watch | Callable[[Step], None] | bool | None = None,
    grad: str = "off",
) -> Solution:
    """Run a sampler; return samples and diagnostics.

    Arguments:
        model: Denoiser. Conditions belong to it, as in ``model.given(label=y)``.
        shape_or_x: Shape (B, *event) to start from the prior at `t_start`, or a state (B, *event) at `t_start`.
        solver: Solver such as ``ss.UniPC(3)``; a :class:`Plan`, which has its own grid; a :class:`Method`, such as
            ``ss.Adaptive()`` or those of ``ss.integrators``; or None for :func:`default_solver`.
        steps: Number of steps of the grid, by default 20. A solver with k stages costs about k evaluations a step.
        nfe: Budget of evaluations of the denoiser, instead of `steps`. The run never exceeds it.
        grid: Times from noise to data, or a function that makes them, such as ``ss.grids.karras``; by default that of
            :func:`default_grid`. Times that also rise are a ``ss.grids.zigzag``. Methods with error control choose
            their own times.
        t_start: First time, by default T.
        t_end: Last time. Where σ = 0, as at the default of 0, the result is the denoised state.
        seed: Seed of the samples: an integer, one integer for each sample, a :class:`Noise`, or None for a fresh one,
            which the solution tells.
        start: Scale, dtype and device of the initial state, as a :class:`Start`; or a :class:`Gaussian`, whose flow
            leads from T to the first time without an evaluation (a given state is then one at T).
        watch: True for a progress bar; a function that is called with a :class:`Step` at every node of the grid; or a
            :class:`Watch`, which can also keep trajectories and transitions, and change the state by a hook.
        grad: Gradient mode: ``"off"``; ``"full"`` to differentiate through every evaluation; ``"checkpoint"`` for the
            same with the memory of one evaluation and twice the time. Some methods have ``"adjoint"`` or
            ``"reversible"``.

    Returns:
        A :class:`Solution`: samples, number of evaluations, trajectory, plan, seed.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> solution = ss.solve(mix, (4, 1), ss.UniPC(2), nfe=10, seed=0, watch=ss.Watch(save_at="all"))
        >>> solution.nfe, len(solution.trajectory)
        (10, 11)
    """
    check_ready(model)
    method = solver if isinstance(solver, Method) else Tabulated(solver)
    watch = as_watch(watch)
    _check_support(method, watch, check.gradient_mode(grad, GRADS))
    plan = times = None
    if method.grid == "plan":
        solver, event, gaussian = getattr(method, "solver", None), event_of(shape_or_x), as_start(start).gaussian
        if solver is None and grid is None and watch.hook is not None:  # a hook cannot change the run of a table
            grid = default_grid(nfe or steps or DEFAULT_STEPS, model, event=event)
        plan = plan_for(model, solver, steps, nfe, grid, t_start, t_end, gaussian, event)
        if watch.hook is None:  # a hook may correct the states
            warn_of_few_steps(plan, model.sde, as_start(start).data_std)
    elif method.grid == "times":
        times = _times_for(model, method, steps, nfe, grid, t_start, t_end)
    else:
        given = {"steps": steps, "nfe": nfe, "grid": grid}
        for name in (name for name, value in given.items() if value is not None):
            raise TypeError(
                f"`{name}` has no meaning with {type(method).__name__}, which chooses its own steps; drop it."
            )
    warn_untrained(model, _lowest_time(plan, times, t_start, t_end))
    counter = Counter()
    problem = Problem(
        model if isinstance(method, Tabulated) else model.counted(counter),  # Tabulated counts by itself
        shape_or_x,
        t_start,
        t_end,
        noise=seed if isinstance(seed, Noise) else Noise(seed),
        start=as_start(start),
        watch=watch,
        grad=grad,
        plan=plan,
        times=times,
        counter=counter,
    )
    with torch.set_grad_enabled(grad != "off"):
        return method.run(problem)


@dataclass(frozen=True)
class Tabulated(Method):
    """The method of solvers and plans: run the table of the problem row by row.

    Arguments:
        solver: Solver or plan that the table comes from.
    """

    grads = ("off", "full", "checkpoint")
    watches = ("callback", "hook", "save_at", "save_device", "progress", "transitions")
    grid = "plan"

    solver: Solver | Plan | None = None

    def run(self, problem: Problem) -> Solution:
        plan, watch, counter = problem.plan, problem.watch, problem.counter
        assert plan is not None
        noise = problem.steps if plan.stochastic else None
        first = plan.rows[0].t
        # A network alone is evaluated once a row: the rows are counted, and the loop pays for no counter.
        direct = watch.hook is None and not watch.transitions and problem.grad == "off" and problem.model.is_leaf
        model = problem.model if direct else problem.model.counted(counter)
        if watch.transitions:
            if watch != Watch(transitions=True) or problem.grad == "checkpoint":
                raise ValueError(
                    "`transitions` already keeps every state of the run; drop the other fields of `watch`, and "
                    "`grad`='checkpoint'."
                )
            rows = tuple(transitions(plan, model, problem.draw(first), noise))
            return problem.solution(rows[-1].x, plan.times, plan=plan, transitions=rows)
        save = _save_times(plan, watch.save_at)
        trajectory: dict[float, Tensor] = {}
        hook = watch.hook
        if hook is not None and hasattr(hook, "bind"):
            hook = hook.bind(model)

        def observe(step: Step) -> None:
            if save is not None and (not save or float(step.t) in save):
                ends = (
                    plan.rows[0].t,
                    plan.rows[-1].t,
                )  # there the state is the caller's: the given one, or the result
                trajectory[float(step.t)] = step.x.to(watch.save_device, copy=step.t in ends)
            if watch.callback is not None:
                watch.callback(step)
            bar.to(step.nfe)

        observed = save is not None or watch.callback is not None or bool(watch.progress)
        denoise = Checkpointed(model) if problem.grad == "checkpoint" else model
        with Bar(watch.progress, plan.nfe, plan.name, "eval") as bar:
            # The start is drawn in the call, so that only the run holds it.
            x = run(plan, denoise, problem.draw(first), noise, hook=hook, callback=observe if observed else None)
        if direct:
            counter.calls, counter.states = plan.nfe, plan.nfe * len(x)
        return problem.solution(x, plan.times, plan=plan, trajectory=trajectory)


@checked
def plan_for(
    model: AbstractDenoiser,
    solver: Solver | Plan | None = None,
    steps: int | None = None,
    nfe: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float = 0.0,
    gaussian: Gaussian | None = None,
    event: Sequence[int] | None = None,
) -> Plan:
    """The plan that :func:`solve` runs with the same arguments.

    Arguments:
        model: Denoiser.
        solver: Solver, plan, or None for :func:`default_solver`.
        steps: Number of steps, by default 20.
        nfe: Budget of evaluations, instead of `steps`.
        grid: Times, (N + 1,), or a function that makes them.
        t_start: First time, by default T.
        t_end: Last time.
        gaussian: Gaussian of the start, if there is one.
        event: Shape of one sample; by default that of ``model.gaussian``.
    """
    if isinstance(solver, Plan):
        if steps is not None or nfe is not None or grid is not None or t_start is not None or t_end != 0.0:
            raise ValueError("a plan has its own grid; drop `steps`, `nfe`, `grid`, `t_start` and `t_end`.")
        if solver.sde and solver.sde != repr(model.sde):
            warnings.warn(
                f"the plan was written for {solver.sde}, the model is on {model.sde!r}.",
                stacklevel=check.levels_to_user(),
            )
        return solver
    if solver is not None and not isinstance(solver, Solver):
        raise _not_a_solver(solver)
    if solver is not None and solver.own_times and grid is not None:
        raise ValueError(f"{solver!r} has its own times for each number of evaluations; drop `grid`, and give `nfe`.")
    if isinstance(grid, str):
        raise TypeError(f"`grid` must be times or a grid maker such as ss.grids.karras, got {grid!r}.")
    has_times = grid is not None and not callable(grid)
    if (steps is not None) + (nfe is not None) + has_times > 1:
        raise ValueError("give one of `steps` (a number), `nfe` (a budget of evaluations) and `grid` (times).")
    if grid is not None and not callable(grid):
        if t_start is not None or t_end != 0.0:
            raise ValueError("`grid` has its own ends; drop `t_start` and `t_end`, or cut it with `grids.window`.")
        rule = bounded(len(grid) - 1, model, event) if solver is None else solver
        rule = rule.suited(model, len(grid) - 1, gaussian)
        return written(rule, model.sde, torch.as_tensor(grid, dtype=torch.float64))
    count = DEFAULT_STEPS if steps is None else check.integer("steps", steps, at_least=1)
    budget = count if nfe is None else check.integer("nfe", nfe, at_least=1)
    if solver is None and grid is None and t_start is None and t_end == 0 and gaussian is None:
        table = fitted(budget, model, event)
        solver = None if table is None else table.solver
    rule = bounded(budget, model, event) if solver is None else solver
    if nfe is not None:
        rule, count = rule.for_nfe(nfe, clean=model.sde.sigma(t_end) == 0)
    rule = rule.suited(model, count, gaussian)
    maker = default_grid(budget, model, solver, event) if grid is None else grid
    plan = written(rule, model.sde, _make(model, maker, count, t_start, t_end))
    if nfe is not None and plan.nfe > nfe:
        raise ValueError(f"{rule} needs at least {plan.nfe} evaluations, `nfe` = {nfe} is too small a budget.")
    return plan


def event_of(shape_or_x: Sequence[int] | Tensor) -> tuple[int, ...]:
    """Shape of one sample of a shape (B, *event) or of states (B, *event).

    Arguments:
        shape_or_x: Shape or states.
    """
    if isinstance(shape_or_x, Tensor):
        return tuple(shape_or_x.shape[1:])
    return tuple(shape_or_x)[1:] if isinstance(shape_or_x, Sequence) else ()


def _make(model: AbstractDenoiser, grid: GridMaker, steps: int, t_start: float | None, t_end: float | None) -> Tensor:
    """A grid of `steps` steps by a grid maker."""
    window: dict[str, float] = {} if t_start is None else {"t_start": t_start}
    if t_end:
        window["t_end"] = t_end
    return made(grid, model.sde, steps, tuple(window.items()))


def _times_for(
    model: AbstractDenoiser,
    method: Method,
    steps: int | None,
    nfe: int | None,
    grid: Tensor | Sequence[float] | GridMaker | None,
    t_start: float | None,
    t_end: float,
) -> Tensor:
    """The grid of a method that steps on given times; it may rise."""
    if nfe is not None:
        raise TypeError(f"`nfe` has no meaning with {type(method).__name__}; give `steps` or `grid`.")
    if grid is None or callable(grid):
        count = DEFAULT_STEPS if steps is None else check.integer("steps", steps, at_least=1)
        maker = quadratic_vp if grid is None else grid  # these methods step in t or λ, as SDE solvers do
        return _make(model, maker, count, t_start, t_end or (0.0 if method.to_data else model.sde.t_min))
    if steps is not None or t_start is not None or t_end != 0.0:
        raise ValueError("`grid` has its own ends; drop `steps`, `t_start` and `t_end`.")
    times = torch.as_tensor(grid, dtype=torch.float64)
    rising = len(times) > 1 and bool(times[0] < times[-1])
    return check_grid(model.sde, times.flip(0)).flip(0) if rising else check_grid(model.sde, times)


def _lowest_time(plan: Plan | None, times: Tensor | None, t_start: float | None, t_end: float) -> float:
    """Smallest positive time at which a run evaluates the network, as far as it is given; infinity if it is not."""
    if plan is not None:
        given = [torch.as_tensor(row.t).detach().min().item() for row in plan.rows if row.evaluates]
    else:
        given = [t for t in (t_start, t_end) if t is not None] if times is None else times.detach().tolist()
    return min((t for t in given if t > 0), default=math.inf)


def _check_support(method: Method, watch: Watch, grad: str) -> None:
    """Refuse gradient modes and observations that a method does not have."""
    name = type(method).__name__ if not isinstance(method, Tabulated) else "a solver or plan"
    if grad not in method.grads:
        raise ValueError(f"`grad` must be one of {', '.join(map(repr, method.grads))} with {name}, got {grad!r}.")
    plain = Watch()
    for field in ("callback", "hook", "save_at", "progress", "transitions"):
        if field not in method.watches and getattr(watch, field) != getattr(plain, field):
            raise ValueError(f"`{field}` of `watch` has no meaning with {name}; drop it.")


def _not_a_solver(solver: object) -> TypeError:
    named = callable(solver) and hasattr(solver, "__name__")
    hint = f"call it, {getattr(solver, '__name__', '')}()" if named else "as in ss.DDIM()"
    got = repr(solver) if isinstance(solver, str | int) else type(solver).__name__
    return TypeError(f"`solver` must be a solver such as UniPC(), a Plan, a Method or None, got {got}; {hint}.")


def _save_times(plan: Plan, save_at: str | Sequence[float]) -> set[float] | None:
    """Times whose states are kept: None for none, empty for all."""
    if save_at and any(isinstance(t, Tensor) and t.ndim for t in plan.times):
        raise ValueError("`save_at` names times, and each sample has its own times here; use `callback`.")
    if isinstance(save_at, str):
        return set()
    requested = {float(t) for t in save_at}
    if not requested:
        return None
    times = [float(t) for t in plan.times]
    for t in requested:
        if t not in times:
            nearest = min(times, key=lambda s: abs(s - t))
            raise ValueError(f"`save_at` must name times of the grid, got {t!r}; the nearest is {nearest!r}.")
    return requested
