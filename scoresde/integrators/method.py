"""What all ways of solving share: a problem, what to watch, and one `Solution`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, Condition, Counter, Wrapped
from scoresde.denoisers.start import Start
from scoresde.integrators.dense import Path
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.folding import Outputs
from scoresde.plan.run import Hook, Step
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE

GRADS = ("off", "full", "checkpoint", "adjoint", "reversible")


@checked
@dataclass(frozen=True)
class Watch:
    """What to observe in a run, and what to change on the way.

    Arguments:
        callback: Function of a :class:`~scoresde.plan.run.Step`, called at every node of the grid.
        hook: Function ``(node, t, x) -> x``, called at every node before the network is evaluated there; its result
            replaces the state.
        save_at: Times whose states to keep in ``Solution.trajectory``, or ``"all"``.
        save_device: Device of the kept states.
        progress: Whether to show a progress bar in an interactive terminal; ``"always"`` shows it everywhere.
        transitions: Whether to keep mean, standard deviation and log-density of every step in
            ``Solution.transitions``, see :func:`transitions`.
    """

    callback: Callable[[Step], None] | None = None
    hook: Hook | None = None
    save_at: str | Sequence[float] = ()
    save_device: torch.device | str = "cpu"
    progress: bool | str = False
    transitions: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.save_at, str):
            check.choice("save_at", self.save_at, ("all",))
        if not isinstance(self.progress, bool):
            check.choice("progress", self.progress, ("always",))


def as_watch(watch: Watch | Callable[[Step], None] | bool | None) -> Watch:
    """A :class:`Watch` from what users give: True for a progress bar, or a function to call at every node."""
    if watch is None or isinstance(watch, bool):
        return Watch(progress=bool(watch))
    if isinstance(watch, Watch):
        return watch
    if not callable(watch):
        raise TypeError(f"`watch` must be a Watch, a function of a Step or True for a bar, got {type(watch).__name__}.")
    return Watch(callback=watch)


@dataclass(frozen=True)
class Stats:
    """Cost of each sample, tensors (B,) on the CPU.

    Arguments:
        steps: Number of accepted steps.
        rejected: Number of rejected steps.
        nfe: Number of evaluations of the denoiser.
        finished: Whether the sample reached the end within its budget.
    """

    steps: Tensor
    rejected: Tensor
    nfe: Tensor
    finished: Tensor


@dataclass(frozen=True, eq=False)
class Solution:
    """Result of a run, whatever the method.

    Arguments:
        x: Final states, (B, *event).
        nfe: Number of function evaluations: states that went through the network, divided by the batch size and rounded
            up. Every forward pass counts: both of guidance, those of correctors and of rejected steps.
        calls: Number of forward passes of the network, one after another.
        times: Times of the grid; for methods with error control, the two ends.
        trajectory: Kept states by time, see :class:`Watch`.
        seed: Seed of the run's noise.
        plan: Table that was run, if the method is a plan.
        stats: Cost of each sample, if each has steps of its own.
        path: Function of time that interpolates the solution, for methods with dense output.
        transitions: Gaussian transition of every step, see :class:`Watch`.
        companion: Second state of a reversible method, needed to run it back.
        log_prob: Log-densities of the samples, if the method computes them.

    Attributes:
        sde: Process of the model, or None if the solution was made by hand.
    """

    x: Tensor = field(repr=False)
    nfe: int
    calls: int
    times: list[Any] = field(repr=False)
    trajectory: dict[float, Tensor] = field(default_factory=dict, repr=False)
    seed: int | tuple[int, ...] | None = None
    plan: Plan | None = field(default=None, repr=False)
    stats: Stats | None = field(default=None, repr=False)
    path: Path | None = field(default=None, repr=False)
    transitions: tuple[Any, ...] = field(default=(), repr=False)
    companion: Tensor | None = field(default=None, repr=False)
    log_prob: Any = field(default=None, repr=False)
    sde: SDE | None = field(default=None, init=False, repr=False)


class Checkpointed(Wrapped):
    """A denoiser whose evaluations are made again in the backward pass, which saves their memory."""

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        out: Tensor = checkpoint(lambda y: self.model.x0(y, t, **cond), x, use_reentrant=False)
        return out

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        inner = self.model.outputs_at(times, x, **cond)
        if inner is None:
            return None
        evaluate = inner.evaluate

        def again(x: Tensor, n: int) -> Tensor:
            out: Tensor = checkpoint(lambda y: evaluate(y, n), x, use_reentrant=False)
            return out

        return replace(inner, evaluate=again)


@dataclass(frozen=True)
class Problem:
    """What a method has to solve; made by :func:`solve`.

    Arguments:
        model: Denoiser; `counter` counts its evaluations, except for plans, which count their rows.
        shape_or_x: Shape (B, *event) of the samples, or their initial states.
        t_start: First time, None for the method's default.
        t_end: Last time; where σ = 0 there, the result is the denoised state.
        noise: Noise of the run.
        start: Distribution of the initial state.
        watch: Observation of the run.
        grad: Gradient mode.
        plan: Table to run, for methods that run a plan.
        times: Grid, for methods that step on a given grid.
        counter: Counter of network evaluations.
    """

    model: AbstractDenoiser
    shape_or_x: Sequence[int] | Tensor
    t_start: float | None = None
    t_end: float = 0.0
    noise: Noise = field(default_factory=Noise)
    start: Start = field(default_factory=Start)
    watch: Watch = field(default_factory=Watch)
    grad: str = "off"
    plan: Plan | None = None
    times: Tensor | None = None
    counter: Counter = field(default_factory=Counter)

    @property
    def steps(self) -> Noise:
        """Noise of the steps, a stream of its own."""
        return self.noise.fork(Stream.STEPS)

    def draw(self, t: float | Tensor) -> Tensor:
        """The initial state at time `t`."""
        return self.start.draw(self.model, self.shape_or_x, t, self.noise)

    def denoise(self, x: Tensor, t: Any) -> Tensor:
        """Data prediction under the problem's gradient mode."""
        return (Checkpointed(self.model) if self.grad == "checkpoint" else self.model).x0(x, t)

    def solution(self, x: Tensor, times: list[Any], **fields: Any) -> Solution:
        """A :class:`Solution` with its counts and seed; warns if `x` is not finite."""
        if "transitions" not in fields:  # they have warned, with the time
            check.warn_unless_finite(x)
        nfe = -(-self.counter.states // max(1, len(x)))
        out = Solution(x, nfe, self.counter.calls, times, seed=self.noise.seed, **fields)
        object.__setattr__(out, "sde", self.model.sde)
        return out


class Method:
    """A way of solving. A subclass is a frozen dataclass that writes :meth:`run`."""

    grads: ClassVar[tuple[str, ...]] = ("off", "full")
    """Gradient modes that the method supports."""

    watches: ClassVar[tuple[str, ...]] = ()
    """Fields of :class:`Watch` that the method supports."""

    grid: ClassVar[str] = ""
    """What the method wants of the grid options of ``solve``: ``"plan"``, ``"times"``, or nothing."""

    to_data: ClassVar[bool] = True
    """Whether the grid of a method with ``grid = "times"`` may end where σ = 0; otherwise it ends at ``sde.t_min``."""

    def run(self, problem: Problem) -> Solution:
        """Solve a problem.

        Arguments:
            problem: Model, initial state, interval and noise.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `run(problem)`, which returns a Solution.")
