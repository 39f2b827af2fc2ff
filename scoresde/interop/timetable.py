"""Times, labels and places to start, of a plan that runs as a scheduler of diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from scoresde.grids.foreign import from_scheduler
from scoresde.interop.diffusers_schedules import Schedule
from scoresde.plan.rows import as_number
from scoresde.plan.table import Plan
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import Flow
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Solver


class Base(Protocol):
    """A scheduler of diffusers whose times are used."""

    def set_timesteps(self, **options: object) -> None:
        """Compute its labels and levels."""


@dataclass(frozen=True)
class Timetable:
    """A plan, and at which of its evaluations a run may start.

    Arguments:
        sde: Process.
        plan: Plan from the first time on.
        solver: Solver that made it, None for a given plan.
        times: Times of the grid, float64.
        evaluated: Times of the evaluations.
        starts: Time of the grid, by its index, for each evaluation at which a step starts.
    """

    sde: SDE
    plan: Plan
    solver: Solver | None
    times: Tensor
    evaluated: tuple[float, ...]
    starts: Mapping[int, int]

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.times) - 1

    @property
    def end(self) -> float:
        """Time of the result."""
        return float(self.times[-1])

    @property
    def stages(self) -> int:
        """Number k of evaluations in a step if step i starts at evaluation k · i, otherwise 1."""
        place = {i: j for j, i in self.starts.items()}
        k = place.get(1, 1)
        return k if all(place.get(i) == k * i for i in range(self.steps)) else 1

    def plan_from(self, first: int) -> Plan:
        """The plan of a run that starts at an evaluation.

        Arguments:
            first: Index of the evaluation.
        """
        if first == 0:
            return self.plan
        if first not in self.starts:
            raise ValueError(
                f"a run cannot start at evaluation {first}, in the middle of a step; steps start at evaluations "
                f"{', '.join(map(str, sorted(self.starts)))}."
            )
        if any(j != i * self.stages for j, i in self.starts.items()):
            raise ValueError(
                f"{self.plan.name} has steps with different numbers of evaluations, and pipelines that start in the "
                f"middle count on equal ones; use another solver there."
            )
        i = self.starts[first]
        if self.solver is None:
            return _tail(self.plan, i)
        plan = self.solver.plan(self.sde, self.times[i:])
        if _evaluated(plan) != self.evaluated[first:]:
            raise ValueError(
                f"{self.solver} started at step {i} evaluates the network at other times than those of this run; use a "
                f"solver with the same stages in every step."
            )
        return plan


def timetable_of(sde: SDE, method: Solver | Plan, grid: Tensor | int | None) -> Timetable:
    """Timetable of a solver on a grid, or of a plan.

    Arguments:
        sde: Process.
        method: Solver or plan.
        grid: Times; for a plan its expected number of steps, or None.
    """
    if isinstance(method, Plan):
        plan, solver = method, None
        times = torch.tensor([as_number(t) for t in plan.times], dtype=torch.float64)
        if grid is not None and grid not in (len(times) - 1, plan.nfe):
            raise ValueError(
                f"`num_inference_steps` must be {len(times) - 1}, the number of steps of the plan, got {grid}."
            )
    else:
        assert isinstance(grid, Tensor)
        plan, solver, times = method.plan(sde, grid), method, grid
    starts = {e: i for e, i, at_node in step_starts(plan, times) if at_node}
    return Timetable(sde, plan, solver, times, _evaluated(plan), starts)


def step_starts(plan: Plan, times: Tensor) -> list[tuple[int, int, bool]]:
    """The first evaluation of each step, as triples of its number, the step, and whether it is at the step's time.

    It is at another time if noise is added first, and in the middle of the rows where a corrector follows it.

    Arguments:
        plan: Plan.
        times: Times of its grid.
    """
    grid = times.tolist()
    found: list[tuple[int, int, bool]] = []
    count, last = 0, None
    for row in plan.rows[:-1]:
        t = as_number(row.t)
        if row.evaluates:
            count, last = count + 1, t
        if row.node is not None and row.node == len(found) < len(grid) - 1:
            found.append((count - (last == t), row.node, last == t == grid[row.node]))
    return found


def _evaluated(plan: Plan) -> tuple[float, ...]:
    return tuple(as_number(row.t) for row in plan.rows if row.evaluates)


def _tail(plan: Plan, node: int) -> Plan:
    """The rows of a plan from a node on, if no later row uses an earlier one."""
    first = next(r for r, row in enumerate(plan.rows) if row.node == node)
    rows = [replace(plan.rows[first], x=(), d=(), z=(), one=0.0)]
    for row in plan.rows[first + 1 :]:
        if any(k < first for k, _ in (*row.x, *row.d)):
            raise ValueError(
                f"the plan cannot start at step {node}: a later row uses what was evaluated before; give a solver."
            )
        x, d = (tuple((k - first, w) for k, w in terms) for terms in (row.x, row.d))
        rows.append(replace(row, x=x, d=d))
    return replace(plan, rows=tuple(rows))


def base_of(config: Mapping[str, object], library: ModuleType) -> Base:
    """The scheduler of diffusers whose times are used.

    Arguments:
        config: Its configuration, with the name of its class.
        library: The module ``diffusers``.
    """
    flow = "shift" in config and "beta_schedule" not in config
    name = str(config.get("_class_name") or ("FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"))
    made = getattr(library, name)
    known = inspect.signature(made.__init__).parameters
    base: Base = made(**{k: v for k, v in config.items() if k in known})
    return base


def times_of_base(
    schedule: Schedule, base: Base, steps: int | None, mu: float | None, options: Mapping[str, object]
) -> Tensor:
    """Times of a scheduler of diffusers, and of its end; see :func:`scoresde.grids.foreign.from_scheduler`.

    Arguments:
        schedule: Process and labels.
        base: The scheduler.
        steps: Number of steps, or None if `options` determine it.
        mu: Shift of a flow for the resolution.
        options: Options of its ``set_timesteps``, instead of a number of steps.
    """
    accepted = inspect.signature(base.set_timesteps).parameters
    given = options if mu is None else {**options, "mu": mu}
    for name in given:
        if name not in accepted:
            raise ValueError(f"`{name}` has no meaning with {type(base).__name__}, whose times are used; drop it.")
    if options:
        base.set_timesteps(**given)
    return from_scheduler(schedule.sde, None if options else steps, base, mu=mu)


def labels_of(schedule: Schedule, times: Sequence[float]) -> Tensor:
    """Labels of times, for the network: int64 if all are whole numbers, otherwise float32.

    Arguments:
        schedule: Process and labels.
        times: Times.
    """
    t = torch.tensor(times, dtype=torch.float64)
    clock = schedule.time
    if isinstance(schedule.sde, Discrete):
        labels = schedule.sde.index_of_t(t)
    elif clock is None:
        labels = -schedule.sde.lam(t) / 4
    elif clock == "sigma":
        labels = schedule.sde.sigma(t)
    else:
        labels = clock(t) if callable(clock) else t
    labels = torch.as_tensor(labels, dtype=torch.float64)
    whole = isinstance(schedule.sde, Discrete) and bool((labels == labels.round()).all())
    return labels.long() if whole else labels.float()


def times_of_labels(schedule: Schedule, labels: Tensor, known: tuple[Tensor, Sequence[float]] | None = None) -> Tensor:
    """Times of labels, (n,) float64; the inverse of :func:`labels_of`.

    Arguments:
        schedule: Process and labels.
        labels: Labels, (n,) float64.
        known: Labels of a run and their times, for clocks without a simple inverse.
    """
    if isinstance(schedule.sde, Discrete):
        return (labels + 1).clamp(0.0, schedule.sde.T)
    ends = labels_of(schedule, [0.0, schedule.sde.T]).double() if callable(schedule.time) else None
    if isinstance(schedule.sde, Flow) and ends is not None:  # labels of flows are linear in time
        return ((labels - ends[0]) / (ends[1] - ends[0]) * schedule.sde.T).clamp(0.0, schedule.sde.T)
    if known is None:
        raise ValueError("the times of these labels are known after `set_timesteps` only; call it first.")
    gaps = (labels[:, None] - known[0].cpu().double()[None]).abs()
    return torch.tensor(known[1], dtype=torch.float64)[gaps.argmin(1)]
