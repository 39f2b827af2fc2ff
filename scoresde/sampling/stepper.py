"""A sampler step by step, for loops that call the network themselves, and several samplers in one call of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.predictions import PREDICTIONS
from scoresde.denoisers.start import Start, as_start
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.plan.paused import Paused, begin, resume, tell
from scoresde.plan.rows import Weight
from scoresde.plan.run import Normals
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.sampling.few_steps import warn_of_few_steps
from scoresde.sampling.solve import event_of, plan_for
from scoresde.solvers.rule import Solver


@checked
class Stepper:
    """A run of a plan that the caller drives: it gives states to evaluate, and is told what the network returned.

    The result equals that of :func:`scoresde.plan.run.run` with the same function to the bit, and that of a run of the
    model to rounding. :class:`~scoresde.plan.paused.Paused` is the same as a value that does not change.

    Arguments:
        plan: Plan to run.
        x: Initial state, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.
        predicts: Prediction that :meth:`tell` receives: ``"x0"`` for denoised states, or ``"eps"``, ``"score"``,
            ``"v"``, ``"velocity"`` or ``"F"`` for the output of a network.
        sde: Process of the network; required unless `predicts` is ``"x0"``.
        sigma_data: Standard deviation of the data, for ``"F"``.

    Example:
        >>> import torch, scoresde as ss
        >>> plan = ss.UniPC(2).plan(ss.VP(), [1.0, 0.6, 0.3, 0.0])
        >>> stepper = ss.sampling.Stepper(plan, torch.ones(2, 3))
        >>> while not stepper.done:
        ...     x, t = stepper.ask()
        ...     stepper.tell(0.5 * x)  # the denoised state
        >>> stepper.x.shape, stepper.nfe
        (torch.Size([2, 3]), 3)
    """

    def __init__(
        self,
        plan: Plan,
        x: Tensor,
        noise: Noise | Normals | None = None,
        *,
        predicts: str = "x0",
        sde: SDE | None = None,
        sigma_data: float = 1.0,
    ) -> None:
        self.run: Paused = begin(plan, x, noise)
        self.predicts = check.choice("predicts", predicts, PREDICTIONS)
        self.sigma_data = check.number("sigma_data", sigma_data, above=0)
        if sde is None and predicts != "x0":
            raise ValueError(f"`sde` must be the process of the network if `predicts` is {predicts!r}, got None.")
        self._form = None if sde is None else AbstractDenoiser(sde)
        self._asked: Paused | None = None

    @classmethod
    def of(
        cls,
        model: AbstractDenoiser,
        shape_or_x: Sequence[int] | Tensor,
        solver: Solver | Plan | None = None,
        *,
        steps: int | None = None,
        nfe: int | None = None,
        grid: Tensor | Sequence[float] | Callable[..., Tensor] | None = None,
        t_start: float | None = None,
        t_end: float = 0.0,
        seed: int | Sequence[int] | Noise | None = None,
        start: Start | Gaussian | None = None,
        predicts: str = "x0",
    ) -> Stepper:
        """The stepper of what :func:`sample` runs with the same arguments.

        The model sets the process and the initial state. The caller evaluates it, or what replaces it.

        Arguments:
            model: Denoiser.
            shape_or_x: Shape (B, *event) to start from the prior, or a state (B, *event) at the first time.
            solver: Solver, plan, or None for :func:`default_solver`.
            steps: Number of steps of the grid, by default 20.
            nfe: Budget of evaluations, instead of `steps`.
            grid: Times, or a function that makes them.
            t_start: First time, by default T.
            t_end: Last time, by default 0.
            seed: Seed of the samples: an integer, one integer for each sample, or a :class:`Noise`.
            start: Distribution, dtype and device of the initial state.
            predicts: Prediction that :meth:`tell` receives, by default the denoised state; ``model.kind.predicts`` is
                that of the network.
        """
        plan = plan_for(check_ready(model), solver, steps, nfe, grid, t_start, t_end, event=event_of(shape_or_x))
        warn_of_few_steps(plan, model.sde, as_start(start).data_std)
        noise = as_noise(seed)
        x = as_start(start).draw(model, shape_or_x, plan.rows[0].t, noise)
        steps_noise = noise.fork(Stream.STEPS) if plan.stochastic else None
        scale = float(getattr(model, "data_scale", 1.0))
        return cls(plan, x, steps_noise, predicts=predicts, sde=model.sde, sigma_data=scale)

    def __repr__(self) -> str:
        where = "done" if self.done else f"at t={self.t}" if not isinstance(self.t, Tensor) else "at times of samples"
        return f"Stepper({self.run.plan.name or 'plan'}, {self.nfe} of {self.run.plan.nfe} evaluations, {where})"

    @property
    def done(self) -> bool:
        """Whether the run is at its end, so that `x` is the result."""
        return self.run.done

    @property
    def x(self) -> Tensor:
        """State to evaluate, or the result, (B, *event)."""
        return self.run.x

    @property
    def t(self) -> Weight:
        """Time of the state: a number, or one number for each sample."""
        return self.run.t

    @property
    def nfe(self) -> int:
        """Number of evaluations so far."""
        return self.run.nfe

    @property
    def form(self) -> str:
        """Prediction and process of the outputs that :meth:`tell` receives."""
        return self.predicts if self._form is None else f"{self.predicts} of {self._form.sde!r}"

    def ask(self) -> tuple[Tensor, Weight]:
        """Return the state to evaluate and its time; equal until :meth:`tell` is called."""
        if self.done:
            raise ValueError(f"the run is done after {self.nfe} evaluations; its result is `x`.")
        self._asked = self.run
        return self.run.x, self.run.t

    def tell(self, output: Tensor) -> None:
        """Continue to the next evaluation or to the end.

        Arguments:
            output: Output of the network at :meth:`ask`, in the prediction `predicts`, (B, *event).
        """
        if not self.done and self._asked is not self.run:
            raise ValueError(
                f"`tell` needs the output of evaluation {self.nfe + 1}, and `ask` has not been called since evaluation "
                f"{self.nfe}, so this may be a late or repeated output; call `ask`, and evaluate what it returns."
            )
        x, t = self.ask()
        out = check.match("output", output, "x", x)
        if self.predicts != "x0":
            assert self._form is not None
            out = self._form.convert(self.predicts, out, "x0", x, t, self.sigma_data)
        self.run = tell(self.run, out)
        if self.done:
            check.warn_unless_finite(self.x)

    def state_dict(self) -> dict[str, Tensor]:
        """The run as tensors alone, for ``torch.save`` or safetensors; see :meth:`Paused.state_dict`."""
        return self.run.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue the run of a :meth:`state_dict`, with the plan of this stepper.

        Arguments:
            state: Output of :meth:`state_dict`.
        """
        own = None if type(self.run.noise) is Noise else self.run.noise
        self.run = resume(self.run.plan, state, own)


@checked
@dataclass(frozen=True, eq=False)
class Gathered:
    """The states of several steppers as one batch for the network; made by :func:`gather`.

    Arguments:
        x: States, (B, *event), those of one stepper after those of another.
        t: Time of each state, (B,); float64 on the CPU, in the dtype of `x` on other devices.
        index: Number of the stepper that each state belongs to, int64 (B,), to select conditions.
        steppers: The steppers that are not done.
        runs: Their runs at the moment of :func:`gather`.
    """

    x: Tensor
    t: Tensor
    index: Tensor
    steppers: tuple[Stepper, ...]
    runs: tuple[Paused, ...]

    def tell(self, output: Tensor) -> None:
        """Give each stepper its rows of the output of the network.

        Arguments:
            output: Output of the network at `x` and `t`, (B, *event).
        """
        check.match("output", output, "x", self.x)
        for i, (stepper, run) in enumerate(zip(self.steppers, self.runs, strict=True)):
            if stepper.run is not run:
                raise ValueError(
                    f"stepper {i} of this batch has moved on since `gather`, so `output` belongs to an earlier state; "
                    f"gather the steppers again."
                )
        parts = output.split([len(stepper.x) for stepper in self.steppers])
        for stepper, part in zip(self.steppers, parts, strict=True):
            stepper.tell(part)


@checked
def gather(steppers: Sequence[Stepper]) -> Gathered | None:
    """Collect the states of several steppers for one call of the network; None if all are done.

    The steppers may have different solvers, numbers of steps and progress. Their noise is that of their own samples, so
    the company of a request does not change its result beyond the rounding of the network.

    Arguments:
        steppers: Steppers, with states of one event shape, dtype and device; those that are done are left out.

    Example:
        Two requests, the second of which comes later and takes fewer steps:

        >>> import torch, scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> requests = [ss.sampling.Stepper.of(model, (4, 1), steps=6, seed=0)]
        >>> calls = 0
        >>> while batch := ss.sampling.gather(requests):
        ...     batch.tell(model.x0(batch.x, batch.t))
        ...     calls += 1
        ...     if calls == 2:
        ...         requests.append(ss.sampling.Stepper.of(model, (2, 1), ss.UniPC(2), steps=3, seed=1))
        >>> calls, [request.nfe for request in requests]
        (6, [6, 3])
    """
    active = [(i, stepper) for i, stepper in enumerate(steppers) if not stepper.done]
    if not active:
        return None
    first, form = active[0][1].x, active[0][1].form
    for i, stepper in active:
        if stepper.form != form:
            raise ValueError(
                f"`steppers` must be of one network; number {i} receives {stepper.form}, and number {active[0][0]} "
                f"receives {form}. Gather them in separate batches."
            )
        x = stepper.x
        if (x.shape[1:], x.dtype, x.device) != (first.shape[1:], first.dtype, first.device):
            raise ValueError(
                f"`steppers` must have states of one shape, dtype and device; number {i} has {tuple(x.shape[1:])}, "
                f"{x.dtype}, {x.device}, and number {active[0][0]} {tuple(first.shape[1:])}, {first.dtype}, "
                f"{first.device}; gather them in separate batches."
            )
    sizes = torch.tensor([len(stepper.x) for _, stepper in active])
    t = torch.cat([torch.as_tensor(s.t, dtype=torch.float64).detach().cpu().expand(len(s.x)) for _, s in active])
    index = torch.tensor([i for i, _ in active]).repeat_interleave(sizes)
    if first.device.type != "cpu":
        t, index = t.to(first), index.to(first.device)
    for _, stepper in active:
        stepper.ask()
    x, chosen = torch.cat([s.x for _, s in active]), tuple(s for _, s in active)
    return Gathered(x, t, index, chosen, tuple(s.run for s in chosen))
