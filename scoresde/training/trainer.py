"""A training loop with averaged weights, hooks, mixed precision, several processes and exact resuming."""

from __future__ import annotations

import copy
import inspect
import math
import time
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked, checked_with, words
from scoresde.denoisers.base import AbstractDenoiser, Condition
from scoresde.training import fingerprint
from scoresde.training.checkpoint import Checkpoints
from scoresde.training.data_order import Data, DataOrder, Loader, parts, size, stream
from scoresde.training.describe import describe
from scoresde.training.draws import Draws
from scoresde.training.ema import EMA, PowerEMA
from scoresde.training.first_batch import check_first_batch
from scoresde.training.hooks import Hook, ProgressBar, Record, Row
from scoresde.training.identity import differences, identity, keep_own_options, loss_identity
from scoresde.training.known import know_vectors
from scoresde.training.losses import DSM
from scoresde.training.sharding import (
    State,
    make_accelerator,
    prepare_sharding,
    shard_optimiser,
    shard_state,
    whole,
)
from scoresde.training.update import Update

if TYPE_CHECKING:
    from accelerate import Accelerator

_PATIENCE = 100  # largest number of consecutive skipped steps


# Hints for the keywords of other libraries.
WORDS = words("""
batch_size train_batch_size bs: use `batch`
optimizer optim: use `optimiser`, an optimiser of torch.optim
lr learning_rate weight_decay betas: use `optimiser`, as in torch.optim.Adam(loss.parameters(), lr=...)
scheduler lr_scheduler: use `update`, as in update=ss.training.Update(schedule=...)
warmup warmup_steps: use `update`, as in update=ss.training.Update(warmup=...)
grad_clip clip gradient_clip_val max_grad_norm: use `update`, as in update=ss.training.Update(clip=...)
accumulate gradient_accumulate_every gradient_accumulation_steps accumulate_grad_batches: use `update`, as in \
update=ss.training.Update(accumulate=...)
logger loggers log_dir tensorboard: use `hooks`, as in hooks=[ss.training.TensorBoard(folder)]
callback callbacks hook: use `hooks`, a list of ss.training.Hook
epochs num_epochs max_epochs n_epochs steps num_steps max_steps train_num_steps: the length of a run belongs to \
Trainer.fit(steps)
dataset dataloader train_dataloader train_dataset loader: use `data`
model net network: use `loss`, as in ss.DSM(model)
ema_decay: use `ema`
amp fp16 mixed_precision: use `precision`
device devices gpus strategy: use `accelerator`, an accelerate.Accelerator
checkpoint_dir output_dir save_dir ckpt_dir results_folder default_root_dir: use `folder`
save_every checkpoint_every: use `hooks`, as in hooks=[ss.training.Checkpoints(folder, every=...)]
num_workers workers: use `data`, as in data=ss.training.Loader(data, workers=...)
log_every_n_steps log_interval: use `log_every`
generator random_state: use `seed`
""")
LENGTHS = words("""
epochs num_epochs max_epochs n_epochs: use `steps`, the step at which to stop
num_steps n_steps max_steps iterations n_iters: use `steps`
""")
NETWORK_TIMES = ("t", "time", "timestep", "timesteps", "sigma", "noise_labels")  # second argument of networks
METHODS = {"train": "fit(steps)", "run": "fit(steps)", "step": "fit(steps)", "load": "resume()", "restore": "resume()"}


@checked_with(WORDS, own=["hooks"])
class Trainer:
    """Train a loss on data; an interrupted run can be resumed exactly.

    Data order, times and noise depend only on (seed, step), and each process uses its rows of the whole batch. Without
    dropout and learned times, the number of processes and of accumulated parts therefore changes only rounding. To
    continue a run, start the same script and call ``resume``; on a CPU all bits agree with an uninterrupted run. The
    same script runs on several processes under ``torchrun`` or ``accelerate launch``, with whole weights on each
    process (DDP) or sharded weights (FSDP 2). Its core is this loop::

        for step in range(steps):
            x = data[order.rows(step)].to(device)
            optimiser.zero_grad()
            value = loss(x)
            value.backward()
            torch.nn.utils.clip_grad_norm_(loss.parameters(), 1.0)
            optimiser.step()
            ema.update()

    If the data are vectors, a tensor (N, D), the trainer writes their Gaussian into ``model.card``; ``ss.sample`` takes
    the scale of the data from it.

    Arguments:
        loss: Loss, a :class:`DSM` or a module ``loss(x, noise, **cond)`` that returns a scalar.
        data: Tensor (N, *event), a dictionary with the data as ``"x"`` and conditions by name, a data set, a torch
            DataLoader, or a :class:`Loader` with options of loading.
        optimiser: Optimiser of ``loss.parameters()``; by default Adam with learning rate 2e-4.
        batch: Number of samples per step, over all processes and parts; by default that of a DataLoader, else 128.
        ema: Average of the weights of ``loss.model``, or the decay of an :class:`EMA`; None for no average.
        update: Options of the update: warm-up and schedule of the learning rate, clipping, accumulation.
        precision: Precision of the network, ``"no"``, ``"bf16"`` or ``"fp16"``; the loss has the dtype of the data.
        folder: Folder of the checkpoints, short for the hook ``Checkpoints(folder)``; None for no checkpoints.
        hooks: Hooks, called in this order: :class:`Preview`, :class:`TensorBoard`, :class:`WandB`,
            :class:`Checkpoints`, :class:`ProgressBar`, or your own :class:`Hook`. Checkpoints are called last. A
            progress bar for interactive terminals is added if there is none.
        log_every: Number of steps between entries of `history`.
        seed: Seed of data order, times and noise.
        accelerator: Accelerator to use instead of ``Accelerator(mixed_precision=precision)``.

    Example:
        >>> import torch, scoresde as ss
        >>> from scoresde.training import Preview, Update
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> model = ss.Denoiser(Net(2, 2), ss.VP(), predicts="eps")
        >>> preview = Preview(lambda model, step: print("preview at step", step), every=4)
        >>> trainer = Trainer(ss.DSM(model), torch.randn(64, 2), batch=16, update=Update(warmup=2), hooks=[preview])
        >>> history = trainer.fit(5)
        preview at step 4
        >>> trainer.step
        5
    """

    def __init__(
        self,
        loss: nn.Module,
        data: Data | Loader,
        optimiser: torch.optim.Optimizer | None = None,
        *,
        batch: int | None = None,
        ema: EMA | PowerEMA | float | None = 0.9999,
        update: Update | None = None,
        precision: str = "no",
        folder: str | Path | None = None,
        hooks: Sequence[Hook] = (),
        log_every: int = 50,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        check.choice("precision", precision, ("no", "bf16", "fp16"))
        self.accelerator = make_accelerator(precision, accelerator)
        self.loss, self.model = loss, _model_of(loss)
        self.update = Update() if update is None else update
        if not isinstance(self.update, Update):
            raise TypeError(f"`update` must be Update(warmup=..., clip=...), got {type(update).__name__}.")
        self.hooks = _ordered(hooks, folder)
        self.checkpoints = next((hook for hook in self.hooks if isinstance(hook, Checkpoints)), None)
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.loader = data if isinstance(data, Loader) else Loader(data)
        batch = self.loader.batch_size(batch)
        if batch % (self.world * self.update.accumulate):
            raise ValueError(
                f"`batch`={batch} must be a multiple of {self.world} processes times `accumulate`="
                f"{self.update.accumulate}."
            )
        self.order = DataOrder(size(self.loader.data), batch, check.integer("seed", seed))
        know_vectors(self.model, self.loader)
        self.log_every = check.integer("log_every", log_every, at_least=1)
        self.step = self.skipped = self._skipped_in_a_row = 0
        self.newest: tuple[int, int] | None = None  # the newest checkpoint of the folder, if it is of this run
        self.history: list[Row] = []
        self._fitting = self._examined = self._trained = False

        optimiser = _optimiser_of(loss, optimiser)
        self._loss_identity = loss_identity(loss)
        self.sharded = prepare_sharding(self.accelerator, loss)
        # One process alone cannot evaluate a sharded model, so hooks evaluate a whole copy.
        self.evaluated_loss: nn.Module | None = loss
        if self.sharded:
            self.evaluated_loss = copy.deepcopy(loss) if any(hook.evaluates for hook in self.hooks) else None
        self._wrapped: nn.Module
        self._wrapped, self.optimiser = self.accelerator.prepare(loss, optimiser)
        # Accelerate's optimiser searches the disk for packages at every step; without a scaler it has no other effect.
        self._inner = self.optimiser if self.accelerator.scaler is not None else self.optimiser.optimizer
        self.rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self._parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.ema = EMA(self.model, ema) if isinstance(ema, (int, float)) else ema
        self._generator = torch.Generator(self.accelerator.device)
        self._called = [
            hook for hook in self.hooks if self.is_main or hook.every_process or (self.sharded and hook.evaluates)
        ]

    def __repr__(self) -> str:
        hooks = ", ".join(describe(hook) for hook in self.hooks)
        return (
            f"Trainer({describe(self.loss)}, {self.order.n} samples, step={self.step},\n"
            f"        batch={self.order.batch}, ema={self.ema}, {self.update}, hooks=[{hooks}])"
        )

    @property
    def is_main(self) -> bool:
        """Whether this is the first process."""
        return bool(self.accelerator.is_main_process)

    if not TYPE_CHECKING:  # a type checker shall see that there is no such attribute

        def __getattr__(self, name: str) -> NoReturn:
            hint = f"; use {METHODS[name]}" if name in METHODS else ""
            raise AttributeError(f"'Trainer' object has no attribute {name!r}{hint}.")

    @checked_with(LENGTHS)
    def fit(self, steps: int) -> list[Row]:
        """Train up to step `steps` of the run, and return the history.

        Arguments:
            steps: Total number of optimiser steps, counted from the beginning of the run.
        """
        check.integer("steps", steps)
        if self._trained and steps <= self.step:  # a finished run that is resumed is usual
            warnings.warn(
                f"`steps`={steps} is reached, the run is at step {self.step}, so fit does nothing: `steps` counts from "
                f"the beginning of the run; to train {steps} more, call fit({self.step + steps}).",
                stacklevel=check.levels_to_user(),
            )
        self._wrapped.train()
        rows = parts(self.order, self.step, self.rank, self.world, self.update.accumulate)
        source = self.loader.batches(rows, self.accelerator.device)
        with ExitStack() as stack:
            for hook in self._called:
                stack.callback(hook.close)
                hook.on_start(self, steps)
            self._fitting = True
            stack.callback(setattr, self, "_fitting", False)
            first, since, applied, last = self.step, time.perf_counter(), 0, 0.0
            total = torch.zeros((), device=self.accelerator.device)
            measured: Row = {}
            while self.step < steps:
                loss, norm = self._train_step(source)
                if math.isfinite(norm):  # skipped steps have no loss that a mean could hold
                    total, applied, last = total + loss, applied + 1, norm
                for hook in self._called:
                    measured = {**measured, **hook.measure(self, steps)}
                if measured or self.step % self.log_every == 0 or self.step == steps:
                    speed = (self.step - first) * self.order.batch / (time.perf_counter() - since)
                    if applied:
                        self._log(float(self.accelerator.reduce(total / applied, "mean")), last, speed, measured)
                        first, since, applied, total = self.step, time.perf_counter(), 0, torch.zeros_like(total)
                        measured = {}
                record = Record(self.step, steps, loss, norm)
                for hook in self._called:
                    hook.on_step(self, record)
        return self.history

    def _train_step(self, source: Iterator[tuple[Tensor, dict[str, Condition]]]) -> tuple[Tensor, float]:
        """Make one optimiser step; return its loss (on the device) and the norm of its gradient."""
        total = torch.zeros((), device=self.accelerator.device)
        factor = self.update.factor(self.step)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self._inner.zero_grad()
        count = self.update.accumulate
        n = self.order.batch // (self.world * count)
        for m in range(count):
            x, cond = next(source)
            self._examine(x, cond)
            self._generator.manual_seed(stream(self.order.seed, "noise", self.step))
            noise = Draws(self._generator, (m * self.world + self.rank) * n, self.order.batch)
            with nullcontext() if m == count - 1 else self.accelerator.no_sync(self._wrapped):
                with self.accelerator.autocast():
                    value = self._wrapped(x, noise, **cond) / count
                self.accelerator.backward(value)
            total += value.detach()
        self.accelerator.unscale_gradients()
        norm = self._clip()
        self._apply(total, norm)
        self.step, self._trained = self.step + 1, True
        return total, norm

    def _clip(self) -> float:
        """Scale the gradient down to the largest norm; return its norm."""
        limit = self.update.largest_norm
        if not hasattr(nn.utils, "get_total_norm"):  # torch < 2.6
            return float(whole(nn.utils.clip_grad_norm_(self._parameters, limit)))
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        read = float(whole(norm))
        if not read + 2e-6 <= limit:  # torch adds 1e-6; a factor of 1 would cost a pass over all gradients
            nn.utils.clip_grads_with_norm_(self._parameters, limit, norm)
        return read

    def _examine(self, x: Tensor, cond: dict[str, Condition]) -> None:
        """Check the first batch of this trainer."""
        if not self._examined and self.is_main and isinstance(self.loss, DSM) and isinstance(x, Tensor):
            check_first_batch(self.loss.model, x, cond)
        if isinstance(self.loss, DSM):
            self.loss.unlabelled = False  # one warning is enough
        self._examined = True

    def _apply(self, loss: Tensor, norm: float) -> None:
        """Update the weights and the average if the gradient, equal on all processes, is finite; else skip or raise."""
        if math.isfinite(norm):
            self._inner.step()
            if self.ema is not None:
                self.ema.update()
            self._skipped_in_a_row = 0
            return
        scaled = self.accelerator.scaler is not None and bool(loss.isfinite())
        if scaled:  # the gradient overflows in fp16: the wrapped optimiser skips the step and lowers the scale
            self.optimiser.step()
        self.skipped += 1
        self._skipped_in_a_row += 1
        if (self.update.nonfinite == "raise" and not scaled) or self._skipped_in_a_row > _PATIENCE:
            where = ", ".join(f"{row['lam']:.2g}" for row in self._levels() if row["bad"])
            raise FloatingPointError(
                f"the loss is {float(loss):g} and the norm of its gradient {norm:g} at step {self.step}"
                + (f"; the errors are not finite near λ = {where}" if where else "")
                + "; the weights are unchanged. Check the data and the learning rate, or give "
                f"`update`=Update(nonfinite='skip') (at most {_PATIENCE} steps in a row)."
            )

    def _levels(self) -> list[Row]:
        return self.loss.levels.read() if isinstance(self.loss, DSM) else []

    def _log(self, loss: float, norm: float, speed: float, measured: Row) -> None:
        rate = float(self.optimiser.param_groups[0]["lr"])
        row = {"step": self.step, "loss": loss, "norm": norm, "rate": rate, "skipped": self.skipped, "speed": speed}
        self.history.append(row := {**row, **measured})
        levels = self._levels()
        for hook in self._called:
            hook.on_log(self, row, levels)

    @property
    def ema_model(self) -> nn.Module:
        """Copy of the model with the averaged weights, in evaluation mode: the model to sample from after training.

        Each access makes a new copy. With sharded weights, every process must access it, as :meth:`averaged`.
        """
        with self.averaged() as model:
            return copy.deepcopy(model).requires_grad_(False)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Context with the model in evaluation mode, with the averaged weights; afterwards all is as before.

        With sharded weights, every process must enter the context, and the model is a whole copy, which exists only if
        a hook has `evaluates`.
        """
        if self.evaluated_loss is None:
            raise RuntimeError(
                "the weights are sharded, and the trainer has no whole copy of the model; call `averaged` from a hook "
                "whose class has `evaluates` = True."
            )
        average: AbstractContextManager[object] = nullcontext() if self.ema is None else self.ema.swapped()
        evaluated = _model_of(self.evaluated_loss)
        modes = [(module, module.training) for module in evaluated.modules()]
        try:
            with average:
                if self.sharded:
                    weights = whole(dict(self.loss.state_dict()))
                    self.evaluated_loss.to(self.accelerator.device).load_state_dict(weights)
                yield evaluated.eval()
        finally:
            for module, training in modes:
                module.training = training

    def state_dict(self) -> State:
        """Everything that the rest of the run depends on; every process must call this method."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "run": self.identity,
            "step": self.step,
            "skipped": self.skipped,
            "loss": whole(dict(self.loss.state_dict())),
            "ema": None if self.ema is None else whole(self.ema.state_dict()),
            "optimiser": whole(self.optimiser.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": gather_object([fingerprint.rng_state()]),
        }

    @checked
    def load_state_dict(self, state: State, changes: Collection[str] = ()) -> None:
        """Load a :meth:`state_dict`; the state of another run raises an error that names the settings that differ.

        Arguments:
            state: State of the run.
            changes: Names of the settings that may differ, as in :meth:`resume`.
        """
        changed = differences(self.identity, dict(state["run"]), changes)
        loss = shard_state(state["loss"], self.loss.state_dict())
        missing, _ = self.loss.load_state_dict(loss, strict="loss" not in changed)
        if missing := [name for name in missing if name.startswith("model.")]:
            raise ValueError(
                f"the checkpoint has no weights for {', '.join(missing)}; give the trainer the same network."
            )
        if "optimiser" not in changed:
            own = [dict(group) for group in self.optimiser.param_groups]
            self.optimiser.load_state_dict(shard_optimiser(state["optimiser"], self.optimiser))
            keep_own_options(self.optimiser.param_groups, own, changed)
        if self.ema is not None:
            if changed & {"average", "ema.stds"}:
                self.ema.restart()
            else:
                own_ema = self.ema.state_dict()
                kept = {name: own_ema[name] for name in ("decay", "warmup") if f"ema.{name}" in changed}
                self.ema.load_state_dict({**state["ema"], **kept})
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped, self._trained = int(state["step"]), int(state["skipped"]), False
        if self.rank < len(state["rng"]):
            fingerprint.set_rng_state(state["rng"][self.rank])

    def save(self) -> Path:
        """Write a checkpoint and return its path; every process must call this method."""
        if self.checkpoints is None:
            raise ValueError("`folder` is None, so there are no checkpoints; give `folder` to save them.")
        if not self._fitting:
            self.checkpoints.check_free(self)
        state, path = self.state_dict(), self.checkpoints.path(self.step)
        if self.is_main:
            self.checkpoints.save(self.step, state, alone=self.newest is None)
        self.accelerator.wait_for_everyone()
        self.newest = self.checkpoints.newest() or (self.step, 0)
        for hook in self._called:
            hook.on_save(self, path)
        return path

    @checked
    def resume(self, changes: Collection[str] = ()) -> bool:
        """Load the newest intact checkpoint of the folder; return False if there is none.

        The settings must be those of the checkpoint: seed, batch, data, network, loss, average, update, optimiser and
        number of processes. Else an error names what differs.

        Arguments:
            changes: Names of the settings that may differ, such as ``["update.clip"]``, or ``["update"]`` for all of
                that group. The run then goes on with the new ones. An average or an optimiser of another kind starts
                anew, from the loaded weights.
        """
        if self.checkpoints is None:
            raise ValueError("`folder` is None, so there are no checkpoints; give `folder` to resume.")
        newest = self.checkpoints.latest()
        if newest is not None:
            self.load_state_dict(newest[1], changes)
            self.newest = self.checkpoints.newest() or (self.step, 0)
        return newest is not None

    @property
    def identity(self) -> State:
        """Settings that must be equal to resume a run, by name."""
        return identity(self, self._loss_identity, self._data_fingerprint)

    @cached_property
    def _data_fingerprint(self) -> str:
        return self.loader.fingerprint()


def _model_of(loss: nn.Module) -> nn.Module:
    """Model of a loss, whose weights are averaged."""
    if isinstance(loss, AbstractDenoiser):
        raise TypeError("`loss` must be a loss such as DSM(model), got the denoiser itself.")
    names = list(inspect.signature(loss.forward).parameters)
    if names[1:2] and names[1] in NETWORK_TIMES:
        raise TypeError(
            f"`loss` must be a loss such as DSM(model), got {type(loss).__name__}, whose forward has the arguments of "
            f"a network, {', '.join(names)}; make model = Denoiser(net, sde, predicts=...), and give DSM(model)."
        )
    if not any(p.requires_grad for p in loss.parameters()):
        raise ValueError("`loss` has no parameters to train; its network must be an nn.Module, not a function.")
    model = getattr(loss, "model", loss)
    assert isinstance(model, nn.Module)
    return model


def _optimiser_of(loss: nn.Module, optimiser: torch.optim.Optimizer | None) -> torch.optim.Optimizer:
    if optimiser is None:
        return torch.optim.Adam(loss.parameters(), 2e-4)
    optimised = {id(p) for group in optimiser.param_groups for p in group["params"]}
    if not any(id(p) in optimised for p in loss.parameters()):
        raise ValueError("`optimiser` has none of the parameters of `loss`; construct it with loss.parameters().")
    return optimiser


def _ordered(hooks: Sequence[Hook], folder: str | Path | None) -> tuple[Hook, ...]:
    """Hooks in the order of their calls: checkpoints last, so that they contain what the other hooks changed."""
    if isinstance(hooks, Hook):
        raise TypeError(f"`hooks` must be a list of hooks, got one hook; write hooks=[{hooks!r}].")
    out = list(hooks)
    for hook in out:
        if not isinstance(hook, Hook):
            raise TypeError(f"`hooks` must be hooks such as Preview(function), got {describe(hook)}.")
    if folder is not None:
        out.append(Checkpoints(folder))
    if sum(isinstance(hook, Checkpoints) for hook in out) > 1:
        raise ValueError("`hooks` has Checkpoints more than once, or `folder` was given as well; give one of them.")
    if not any(isinstance(hook, ProgressBar) for hook in out):
        out.insert(0, ProgressBar())
    return tuple(sorted(out, key=lambda hook: isinstance(hook, Checkpoints)))
