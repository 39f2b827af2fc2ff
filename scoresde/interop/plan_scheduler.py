"""A scheduler of diffusers that runs a plan; this module imports diffusers, so :func:`to_diffusers` imports it late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import diffusers
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.grids.foreign import from_sigmas
from scoresde.interop.diffusers_schedules import read_schedule, replaced
from scoresde.interop.normals import Drawn
from scoresde.interop.schedulers import GridMaker, grid_of, solver_of
from scoresde.interop.timetable import (
    Timetable,
    base_of,
    labels_of,
    times_of_base,
    times_of_labels,
    timetable_of,
)
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.paused import Paused, begin, tell
from scoresde.plan.run import Normals
from scoresde.plan.table import Plan
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import Flow
from scoresde.solvers.rule import Solver


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """Output of a step.

    Arguments:
        prev_sample: State for the next evaluation of the network, or the result.
        pred_original_sample: Denoised state.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class PlanScheduler(SchedulerMixin, ConfigMixin):
    """A scheduler of diffusers that runs a solver or a plan; made by :func:`to_diffusers`.

    Arguments:
        solver: Solver, or the text of the call that makes it.
        plan: Plan, or its dictionary; instead of `solver`.
        grid: Name of a function of ``ss.grids``, or a function, for the times.
        seed: Seed of the noise, as that of ``ss.sample``, or None for the pipeline's `generator`.
        clip: Largest absolute value of the denoised state, or None.
        scheduler_class: Name of the scheduler that is replaced.
        **schedule: Configuration of that scheduler.
    """

    config_name = "scheduler_config.json"  # type: ignore[assignment]

    def __init__(
        self,
        solver: Solver | str | None = None,
        plan: Plan | Mapping[str, object] | None = None,
        grid: str | GridMaker | None = None,
        seed: int | None = None,
        clip: float | None = None,
        scheduler_class: str | None = None,
        **schedule: object,
    ) -> None:
        if solver is None and plan is None:
            solver = "DPMSolverPP(order=2)"
        self.solver = solver_of(solver) if isinstance(solver, str) else solver
        self.plan = plan if isinstance(plan, Plan) or plan is None else Plan.from_dict(plan)
        self.grid_maker = None if grid is None else grid_of(grid)
        self.noise: Noise | None = None if seed is None else Noise(seed).fork(Stream.STEPS)
        self.clip = None if clip is None else check.number("clip", clip, above=0)
        if not (self.solver is None or isinstance(self.solver, Solver)) or (self.solver and self.plan):
            raise TypeError("`solver` must be a solver such as UniPC(3), or `plan` a plan; give one of the two.")
        self.register_to_config(  # type: ignore[no-untyped-call]
            **schedule,
            solver=None if self.solver is None else repr(self.solver),
            plan=None if self.plan is None else self.plan.to_dict(),
            grid=getattr(grid, "__name__", grid),
            seed=seed,
            clip=clip,
            scheduler_class=scheduler_class,
        )
        self.schedule = read_schedule(self._configuration())
        if self.schedule.adapt is not None:
            raise ValueError(
                f"`scheduler` is a {scheduler_class}, which changes the output of the network in a way of its own; use "
                f"ss.interop.from_diffusers(net, scheduler) and ss.sample."
            )
        self.sde = self.schedule.sde
        self._form = AbstractDenoiser(self.sde)
        if self.plan is not None and self.plan.sde not in ("", repr(self.sde)):
            raise ValueError(f"`plan` was written for {self.plan.sde}, and the scheduler is on {self.sde!r}.")
        self.num_inference_steps: int | None = None
        self._table: Timetable | None = None
        self._begin_index: int | None = None
        self._run: Paused | None = None
        self._position = 0
        self._generator: torch.Generator | list[torch.Generator] | None = None

    @classmethod
    def from_config(  # type: ignore[override]
        cls, config: Mapping[str, object], return_unused_kwargs: bool = False, **kwargs: object
    ) -> PlanScheduler | tuple[PlanScheduler, dict[str, object]]:
        """A scheduler from its configuration, or from that of another scheduler.

        Arguments:
            config: Configuration.
            return_unused_kwargs: Whether to return a pair with a dictionary, which is empty.
            **kwargs: Entries that replace those of the configuration.
        """
        given = {**config, **kwargs}
        public = {k: v for k, v in given.items() if not k.startswith("_")}
        name = given.get("_class_name")
        if name not in (None, cls.__name__):
            public["scheduler_class"] = name
        made = cls(**public)  # type: ignore[arg-type]
        return (made, {}) if return_unused_kwargs else made

    def _configuration(self) -> dict[str, object]:
        """Configuration of the scheduler that is replaced; pipelines may have changed it."""
        return dict(replaced(self.config))

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))

    # The grid -------------------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Write the plan of a run.

        Arguments:
            num_inference_steps: Number of steps of the grid; a plan checks it against its own.
            device: Device of `timesteps`.
            timesteps: Labels of the network, instead of a number of steps; the last step leads to σ = 0.
            sigmas: Noise levels instead of a number of steps: σ/α of discrete processes, for other processes those that
                the pipeline's own scheduler takes.
            mu: Shift of a flow for the resolution.
        """
        given = next((v for v in (sigmas, timesteps) if v is not None), None)
        count = num_inference_steps if given is None else sum(float(v) > 0 or given is timesteps for v in given)
        if self.plan is not None:
            self._table = timetable_of(self.sde, self.plan, count)
        else:
            assert self.solver is not None
            if count is None:
                raise ValueError("`num_inference_steps` must be given, or `timesteps`, or `sigmas`.")
            self._table = timetable_of(self.sde, self.solver, self._times(count, timesteps, sigmas, mu))
        self.num_inference_steps = count if count is not None else self._table.steps
        self.timesteps = labels_of(self.schedule, self._table.evaluated).to(device or "cpu")
        self._begin_index = self._run = None
        self._position = 0

    def _times(
        self, steps: int, labels: Sequence[float] | None, levels: Sequence[float] | None, mu: float | None
    ) -> Tensor:
        """Times of the steps and of the end: of the grid, of what the caller gave, or of the replaced scheduler."""
        if self.grid_maker is not None:
            return self.grid_maker(self.sde, steps)
        end = torch.zeros(1, dtype=torch.float64)
        if labels is not None and levels is None and isinstance(self.sde, Discrete | Flow):
            return torch.cat([times_of_labels(self.schedule, torch.as_tensor(labels, dtype=torch.float64)), end])
        if levels is not None and isinstance(self.sde, Discrete):
            return from_sigmas(self.sde, [*(float(v) for v in levels if v > 0), 0.0])
        options = {k: v for k, v in (("timesteps", labels), ("sigmas", levels)) if v is not None}
        return times_of_base(self.schedule, base_of(self._configuration(), diffusers), steps, mu, options)

    @property
    def table(self) -> Timetable:
        """Plan of the run, its times, and where it may start."""
        if self._table is None:
            raise ValueError("the scheduler has no plan yet; call `set_timesteps` first.")
        return self._table

    @property
    def order(self) -> int:
        """Number of evaluations in a step, so that step i starts at ``timesteps[i * order]``."""
        return 1 if self._table is None else self._table.stages

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the evaluations and of the end: σ of a flow, σ/α of other processes."""
        t = torch.tensor([*self.table.evaluated, self.table.end], dtype=torch.float64)
        levels = self.sde.sigma(t) if isinstance(self.sde, Flow) else (-self.sde.lam(t)).exp()
        return levels.float()

    @property
    def alphas_cumprod(self) -> Tensor:
        """α² at the labels of a discrete process, (N,)."""
        if not isinstance(self.sde, Discrete):
            raise AttributeError(f"`alphas_cumprod` belongs to discrete processes, and this one is {self.sde!r}.")
        return (self.sde.alpha(torch.arange(1, self.sde.N + 1, dtype=torch.float64)) ** 2).float()

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the initial state: 1 for discrete processes and flows, else that of the noise."""
        if isinstance(self.sde, Discrete | Flow):
            return 1.0
        first = self.sde.T if self._table is None else self._table.evaluated[0]
        return self.sde.prior(
            first, std=self.schedule.precondition.sigma_data if self.schedule.precondition else 1.0
        ).std

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start the run in the middle.

        Arguments:
            begin_index: Index into ``timesteps`` of the first evaluation.
        """
        self._begin_index = begin_index

    @property
    def begin_index(self) -> int | None:
        """Index of the first evaluation, if it was set."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """Index of the next evaluation; None before the first step."""
        return None if self._run is None else self._position

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Index of a label in ``timesteps``; where it occurs twice, the one at which a step starts.

        Arguments:
            timestep: Label.
            schedule_timesteps: Labels to search instead of ``timesteps``.
        """
        table = self.table
        labels = self.timesteps if schedule_timesteps is None else schedule_timesteps
        found = (labels.cpu() == torch.as_tensor(timestep).cpu()).nonzero()[:, 0].tolist()
        if not found:
            raise ValueError(f"`timestep` must be one of `timesteps`, got {float(timestep):g}.")
        return int(next((j for j in found if j in table.starts), found[0]))

    # The step -------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """Input of the network: the state, scaled for networks with EDM's preconditioning.

        Arguments:
            sample: State.
            timestep: Label.
        """
        scaling = self.schedule.precondition
        if scaling is None:
            return sample
        at = self._position if self._run is not None or timestep is None else self._first(timestep)
        t = self.table.evaluated[at]
        return sample * scaling.c_in(self.sde.alpha(t), self.sde.sigma(t))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> PlanSchedulerOutput | tuple[Tensor, ...]:
        """Continue the run with the output of the network; see :func:`scoresde.plan.paused.tell`.

        Arguments:
            model_output: Output of the network at `sample`; of twice the channels, the first half is used.
            timestep: Label of the state.
            sample: State. The run continues from it, also if it is not the one that the last step returned, as in
                inpainting.
            eta: Stochasticity; it belongs to the solver here, so other values than 0 must equal the solver's.
            use_clipped_model_output: Ignored.
            generator: Generator of the noise, unless the scheduler has a `seed`.
            return_dict: Whether to return an object instead of a tuple.
        """
        if eta and eta != getattr(self.solver, "eta", None):
            raise ValueError(
                f"`eta` belongs to the solver: use to_diffusers(ss.DDIM(eta={eta:g}), ...), got eta={eta:g}."
            )
        self._generator = generator
        if self._run is None:
            self._start(timestep, sample)
        else:
            self._follow(sample)
        run = self._run
        assert run is not None
        out = model_output.to(run.x.dtype)
        if out.ndim > 1 and out.shape[1] == 2 * run.x.shape[1]:
            out = out.chunk(2, dim=1)[0]
        scale = 1.0 if self.schedule.precondition is None else self.schedule.precondition.sigma_data
        x0 = self._form.convert(self.schedule.predicts, self.schedule.sign * out, "x0", run.x, run.t, scale)
        if self.clip is not None:
            x0 = x0.clamp(-self.clip, self.clip)
        run = tell(run, x0)
        state = run.x.to(sample.dtype)
        self._run, self._position = run, self._position + 1
        denoised = x0.to(sample.dtype)
        return PlanSchedulerOutput(state, denoised) if return_dict else (state, denoised)

    def _first(self, timestep: float | Tensor) -> int:
        return self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index

    def _start(self, timestep: float | Tensor, sample: Tensor) -> None:
        first = self._first(timestep)
        plan = self.table.plan_from(first)
        keyed = self.noise is not None or not plan.stochastic
        noise = self.noise if keyed else Drawn(plan, partial(self._draw, sample.dtype))
        self._run, self._position = _begin(plan, sample, noise), first

    def _draw(self, dtype: torch.dtype, x: Tensor, number: int, s: float, t: float) -> Tensor:
        """Normals from the generator of the current step, drawn in the precision of the pipeline."""
        z: Tensor = randn_tensor(x.shape, generator=self._generator, device=x.device, dtype=dtype)
        return z.to(x.dtype)

    def _follow(self, sample: Tensor) -> None:
        """Continue from the state of the caller, who may have changed it, without the rounding to its precision."""
        assert self._run is not None
        x = self._run.x
        if sample.dtype != x.dtype:
            sample = x + (sample.to(x.dtype) - x.to(sample.dtype).to(x.dtype))  # exactly x if nothing was changed
        self._run = replace(self._run, x=sample)

    # The process ----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """State α x + σ n at the times of labels.

        Arguments:
            original_samples: Data, (B, *event).
            noise: Standard normals of the same shape.
            timesteps: Labels, (B,) or one for all.
        """
        alpha, sigma = self._coefficients(timesteps, original_samples)
        return alpha * original_samples + sigma * noise

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """The same as :meth:`add_noise`, under its name for flows.

        Arguments:
            sample: Data, (B, *event).
            timestep: Labels, (B,) or one for all.
            noise: Standard normals of the same shape.
        """
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Training target of v-prediction, α n − σ x; for flows the velocity n − x.

        Arguments:
            sample: Data, (B, *event).
            noise: Standard normals of the same shape.
            timesteps: Labels, (B,) or one for all.
        """
        if isinstance(self.sde, Flow):
            return noise - sample
        alpha, sigma = self._coefficients(timesteps, sample)
        return alpha * noise - sigma * sample

    def _coefficients(self, labels: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        known = None if self._table is None else (self.timesteps, self._table.evaluated)
        t = times_of_labels(self.schedule, labels.detach().cpu().double().reshape(-1), known)
        shape = (-1, *[1] * (like.ndim - 1))
        alpha, sigma = (c.to(like.device, like.dtype).reshape(shape) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        return alpha, sigma


def _begin(plan: Plan, sample: Tensor, noise: Noise | Normals | None) -> Paused:
    """Start a run at the state that the network was evaluated at."""
    if not plan.rows[0].evaluates:
        raise ValueError(
            f"{plan.name} adds noise before its first evaluation, which a pipeline has made already; use a solver "
            f"without noise before its first evaluation."
        )
    x = sample if sample.dtype in check.FLOATS else sample.float()
    return begin(plan, x, noise)
