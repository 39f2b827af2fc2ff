"""A training loop with averaged weights, previews, mixed precision, several processes and exact resuming."""

from __future__ import annotations

import copy
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.training.checkpoint import Checkpoints
from scoresde.training.data_order import DataOrder, batches, parts, size, stream
from scoresde.training.draws import Draws
from scoresde.training.ema import EMA, PowerEMA
from scoresde.training.losses import DSM
from scoresde.training.sharding import spread_optimiser, spread_state, whole

if TYPE_CHECKING:
    from accelerate import Accelerator

Preview = Callable[[nn.Module, int], Any]

Unpack = Callable[[Any], tuple[Tensor, dict[str, Any]]]

_PATIENCE = 100  # largest number of consecutive skipped steps


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

    Arguments:
        loss: Loss, a :class:`DSM` or a module ``loss(x, noise, **cond)`` that returns a scalar.
        data: Tensor (N, *event), a dictionary with the data as ``"x"`` and conditions by name, or a data set.
        optimiser: Optimiser of ``loss.parameters()``; by default Adam with learning rate 2e-4.
        batch: Number of samples per step, over all processes and parts.
        accumulate: Number of parts of a process's rows, which are evaluated one after another to save memory.
        ema: Average of the weights of ``loss.model``, or the decay of an :class:`EMA`; None for no average.
        warmup: Number of steps over which the learning rate rises linearly to its value.
        schedule: Function of the step that returns a factor of the learning rate.
        clip: Largest norm of the gradient; None for no limit.
        nonfinite: Action if the gradient is not finite: ``"raise"`` an error, or ``"skip"`` the step and count it.
        precision: Precision of the network, ``"no"``, ``"bf16"`` or ``"fp16"``; the loss has the dtype of the data.
        folder: Folder of the checkpoints; None for no checkpoints.
        save_every: Number of steps between checkpoints; `fit` also saves at its end.
        keep: Number of checkpoints to keep.
        log_every: Number of steps between entries of `history`.
        preview: Function ``preview(model, step)``. The first process calls it without gradients, with the averaged
            weights; under FSDP on a whole copy of the model.
        preview_every: Number of steps between previews.
        tensorboard: Folder of the TensorBoard logs; None for no logs.
        progress: Whether to show a progress bar; None shows it only in an interactive terminal.
        unpack: Function that converts a batch to data and conditions, ``(x, {name: condition})``.
        workers: Number of processes that load from a data set; `resume` does not replay their random transforms.
        seed: Seed of data order, times and noise.
        accelerator: Accelerator to use instead of ``Accelerator(mixed_precision=precision)``.

    Example:
        >>> import torch, scoresde as ss
        >>> class Net(torch.nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> model = ss.Denoiser(Net(2, 2), ss.VP(), predicts="eps")
        >>> trainer = Trainer(ss.DSM(model), torch.randn(64, 2), batch=16, progress=False)
        >>> history = trainer.fit(5)
        >>> trainer.step
        5
    """

    def __init__(
        self,
        loss: nn.Module,
        data: Any,
        optimiser: torch.optim.Optimizer | None = None,
        *,
        batch: int = 128,
        accumulate: int = 1,
        ema: EMA | PowerEMA | float | None = 0.9999,
        warmup: int = 0,
        schedule: Callable[[int], float] | None = None,
        clip: float | None = 1.0,
        nonfinite: str = "raise",
        precision: str = "no",
        folder: str | Path | None = None,
        save_every: int = 1000,
        keep: int = 3,
        log_every: int = 50,
        preview: Preview | None = None,
        preview_every: int = 1000,
        tensorboard: str | Path | None = None,
        progress: bool | None = None,
        unpack: Unpack | None = None,
        workers: int = 0,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.accelerator = _accelerator(check.choice("precision", precision, ("no", "bf16", "fp16")), accelerator)
        if isinstance(loss, AbstractDenoiser):
            raise TypeError("`loss` must be a loss such as DSM(model), got the denoiser itself.")
        self.loss = loss
        self.model: nn.Module = getattr(loss, "model", loss)
        if not any(p.requires_grad for p in loss.parameters()):
            raise ValueError("`loss` has no parameters to train; its network must be an nn.Module, not a function.")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.accumulate = check.integer("accumulate", accumulate, at_least=1)
        if check.integer("batch", batch, at_least=1) % (self.world * accumulate):
            raise ValueError(
                f"`batch`={batch} must be a multiple of {self.world} processes times `accumulate`={accumulate}."
            )
        self.data, self.order = data, DataOrder(size(data), batch, check.integer("seed", seed))
        self.clip = math.inf if clip is None else check.number("clip", clip, above=0)
        self.nonfinite = check.choice("nonfinite", nonfinite, ("raise", "skip"))
        self.warmup, self.schedule = check.integer("warmup", warmup), schedule
        self.save_every, self.log_every, self.preview_every = (
            check.integer(name, value, at_least=1)
            for name, value in (("save_every", save_every), ("log_every", log_every), ("preview_every", preview_every))
        )
        self.checkpoints = None if folder is None else Checkpoints(Path(folder), keep)
        self.preview, self.progress, self.unpack, self.workers = preview, progress, unpack or _unpack, workers
        self.tensorboard = tensorboard
        self.step = self.skipped = self._skipped_in_a_row = 0
        self.history: list[dict[str, float]] = []

        self._sharded = _sharded(self.accelerator, loss)
        # One process alone cannot evaluate a sharded model, so previews use a whole copy.
        self._preview_model = copy.deepcopy(self.model) if self._sharded and preview is not None else self.model
        optimiser = torch.optim.Adam(loss.parameters(), 2e-4) if optimiser is None else optimiser
        optimised = {id(p) for group in optimiser.param_groups for p in group["params"]}
        if not any(id(p) in optimised for p in loss.parameters()):
            raise ValueError("`optimiser` has none of the parameters of `loss`; construct it with loss.parameters().")
        self._wrapped: nn.Module
        self._wrapped, self.optimiser = self.accelerator.prepare(loss, optimiser)
        # Accelerate's optimiser searches the disk for packages at every step; without a scaler it has no other effect.
        self._inner = self.optimiser if self.accelerator.scaler is not None else self.optimiser.optimizer
        self._rates = [float(group["lr"]) for group in self.optimiser.param_groups]
        self._parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.ema = EMA(self.model, ema) if isinstance(ema, (int, float)) else ema
        self._generator = torch.Generator(self.accelerator.device)

    def fit(self, steps: int) -> list[dict[str, float]]:
        """Train up to step `steps` of the run, and return the history.

        Arguments:
            steps: Total number of optimiser steps, counted from the beginning of the run.
        """
        from tqdm import tqdm

        check.integer("steps", steps)
        self._wrapped.train()
        main = self.accelerator.is_main_process
        hidden = True if not main or self.progress is False else None if self.progress is None else False
        writer = _writer(self.tensorboard, self.step) if main and self.tensorboard is not None else nullcontext()
        rows = parts(self.order, self.step, self.rank, self.world, self.accumulate)
        pin = self.accelerator.device.type == "cuda"
        source = batches(self.data, rows, workers=self.workers, pin=pin)
        saved, since, total = self.step, time.perf_counter(), torch.zeros((), device=self.accelerator.device)
        first = self.step
        with tqdm(total=steps, initial=self.step, disable=hidden, unit="step") as bar, writer as log:
            while self.step < steps:
                value, norm = self._train_step(source)
                total += value
                bar.update()
                if self.step % self.log_every == 0 or self.step == steps:
                    n = self.step - first
                    mean = float(self.accelerator.reduce(total / n, "mean"))
                    speed = n * self.order.batch / (time.perf_counter() - since)
                    self._record(mean, norm, speed, log)
                    bar.set_postfix(loss=f"{mean:.4g}", samples_per_s=f"{speed:.0f}")
                    first, since, total = self.step, time.perf_counter(), torch.zeros_like(total)
                if self.preview is not None and self.step % self.preview_every == 0:
                    self._show()
                if self.checkpoints is not None and self.step % self.save_every == 0:
                    saved = self.save()
        if self.checkpoints is not None and saved != self.step:
            self.save()
        return self.history

    def _train_step(self, source: Iterator[Any]) -> tuple[Tensor, float]:
        """Make one optimiser step; return its loss (on the device) and the norm of its gradient."""
        total = torch.zeros((), device=self.accelerator.device)
        self._set_rate()
        self._inner.zero_grad()
        n = self.order.batch // (self.world * self.accumulate)
        for m in range(self.accumulate):
            x, cond = self.unpack(_to(next(source), self.accelerator.device))
            self._generator.manual_seed(stream(self.order.seed, "noise", self.step))
            noise = Draws(self._generator, (m * self.world + self.rank) * n, self.order.batch)
            last = m == self.accumulate - 1
            with nullcontext() if last else self.accelerator.no_sync(self._wrapped):
                with self.accelerator.autocast():
                    value = self._wrapped(x, noise, **cond) / self.accumulate
                self.accelerator.backward(value)
            total += value.detach()
        self.accelerator.unscale_gradients()
        norm = float(whole(nn.utils.clip_grad_norm_(self._parameters, self.clip)))
        self._update(total, norm)
        self.step += 1
        return total, norm

    def _update(self, loss: Tensor, norm: float) -> None:
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
        if (self.nonfinite == "raise" and not scaled) or self._skipped_in_a_row > _PATIENCE:
            levels = self.loss.levels.read() if isinstance(self.loss, DSM) else []
            where = ", ".join(f"{row['lam']:.2g}" for row in levels if row["bad"])
            raise FloatingPointError(
                f"the loss is {float(loss):g} and the norm of its gradient {norm:g} at step {self.step}"
                + (f"; the errors are not finite near λ = {where}" if where else "")
                + "; the weights are unchanged. Check the data and the learning rate, or give "
                f"`nonfinite`='skip' (at most {_PATIENCE} steps in a row)."
            )

    def _set_rate(self) -> None:
        factor = min(1.0, (self.step + 1) / self.warmup) if self.warmup else 1.0
        factor *= 1.0 if self.schedule is None else self.schedule(self.step)
        for group, rate in zip(self.optimiser.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _record(self, loss: float, norm: float, speed: float, log: Any) -> None:
        rate = float(self.optimiser.param_groups[0]["lr"])
        row = {"step": self.step, "loss": loss, "norm": norm, "rate": rate, "skipped": self.skipped, "speed": speed}
        self.history.append(row)
        levels = self.loss.levels.read() if isinstance(self.loss, DSM) else []
        if log is not None:
            for name, value in row.items():
                if name != "step":
                    log.add_scalar(f"train/{name}", value, self.step)
            for level in levels:
                log.add_scalar(f"error/lam {level['lam']:+.1f}", level["error"], self.step)

    def _show(self) -> None:
        """Call the preview in evaluation mode, with the averaged weights."""
        main = self.accelerator.is_main_process
        if self.preview is None or not (main or self._sharded):
            return
        average: AbstractContextManager[Any] = nullcontext() if self.ema is None else self.ema.swapped()
        training = self.model.training
        self._preview_model.eval()
        try:
            with average, torch.no_grad():
                if self._sharded:
                    weights = whole(self.model.state_dict())
                    self._preview_model.to(self.accelerator.device).load_state_dict(weights)
                if main:
                    self.preview(self._preview_model, self.step)
        finally:
            self.model.train(training)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; every process must call this method."""
        from accelerate.utils import gather_object

        scaler = self.accelerator.scaler
        return {
            "run": self._identity(),
            "step": self.step,
            "skipped": self.skipped,
            "loss": whole(dict(self.loss.state_dict())),
            "ema": None if self.ema is None else whole(self.ema.state_dict()),
            "optimiser": whole(self.optimiser.state_dict()),
            "scaler": None if scaler is None else scaler.state_dict(),
            "rng": gather_object([_rng_state()]),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load a :meth:`state_dict`; the state of another run raises an error."""
        mine, theirs = self._identity(), dict(state["run"])
        changed = [name for name in mine if mine[name] != theirs.get(name)]
        if changed:
            settings = ", ".join(f"{name} {theirs.get(name)} (here {mine[name]})" for name in changed)
            raise ValueError(f"the checkpoint is of another run, with {settings}; give the trainer the same settings.")
        self.loss.load_state_dict(spread_state(state["loss"], self.loss.state_dict()))
        self.optimiser.load_state_dict(spread_optimiser(state["optimiser"], self.optimiser))
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.skipped = int(state["step"]), int(state["skipped"])
        _set_rng_state(state["rng"][self.rank])

    def save(self) -> int:
        """Write a checkpoint and return its step."""
        if self.checkpoints is None:
            raise ValueError("`folder` is None, so there are no checkpoints; give `folder` to save them.")
        state = self.state_dict()
        if self.accelerator.is_main_process:
            self.checkpoints.save(self.step, state)
        self.accelerator.wait_for_everyone()
        return self.step

    def resume(self) -> bool:
        """Load the newest intact checkpoint of the folder; return False if there is none."""
        if self.checkpoints is None:
            raise ValueError("`folder` is None, so there are no checkpoints; give `folder` to resume.")
        newest = self.checkpoints.latest()
        if newest is not None:
            self.load_state_dict(newest[1])
        return newest is not None

    def _identity(self) -> dict[str, Any]:
        """Settings that must be equal to resume a run."""
        return {
            "seed": self.order.seed,
            "batch": self.order.batch,
            "samples": self.order.n,
            "processes": self.world,
            "average": type(self.ema).__name__,
            "precision": str(self.accelerator.mixed_precision),
            "process": repr(getattr(self.model, "sde", None)),
            "predicts": str(getattr(self.model, "predicts", None)),
        }


def _accelerator(precision: str, given: Accelerator | None) -> Accelerator:
    if given is not None:
        if precision != "no":
            raise ValueError(f"`accelerator` sets the precision itself; remove `precision`={precision!r}.")
        if given.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`accelerator` must not accumulate gradients, got {given.gradient_accumulation_steps} steps; give "
                f"the trainer `accumulate`={given.gradient_accumulation_steps} instead."
            )
        return given
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("Trainer needs accelerate and safetensors: pip install 'scoresde[train]'.") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    kinds = (getattr(torch, kind, None) for kind in ("cuda", "xpu", "npu", "mlu", "musa", "hpu"))
    # Without a GPU, accelerate ignores that several processes were launched, unless `cpu` is set.
    cpu = launched > 1 and not any(kind is not None and kind.is_available() for kind in kinds)
    out = Accelerator(mixed_precision=precision, cpu=cpu)
    if out.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched and accelerate sees {out.num_processes}: each would train separately. "
            f"Give `accelerator`=Accelerator(...), or launch one process."
        )
    return out


def _sharded(accelerator: Accelerator, loss: nn.Module) -> bool:
    """Return whether the weights will be sharded (FSDP), and if so prepare the loss and the plugin."""
    if str(accelerator.distributed_type) != "DistributedType.FSDP":
        return False
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP must be version 2, which keeps weights by name: set `fsdp_version: 2` in accelerate's configuration,"
            " `accelerate launch --use_fsdp --fsdp_version 2`, or FullyShardedDataParallelPlugin(fsdp_version=2)."
        )
    from accelerate.utils import broadcast

    for w in loss.state_dict().values():  # all processes start from the weights of the first
        w.copy_(broadcast(w.to(accelerator.device)))
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None  # it would cast data and loss to half precision; autocast does not
    return True


def _unpack(batch: Any) -> tuple[Tensor, dict[str, Any]]:
    if isinstance(batch, Tensor):
        return batch, {}
    if isinstance(batch, Mapping) and "x" in batch:
        return batch["x"], {str(name): value for name, value in batch.items() if name != "x"}
    raise TypeError(
        f"a batch must be a tensor or a dictionary with the key 'x', got {type(batch).__name__}; for other batches "
        f"give `unpack`, as in `unpack=lambda batch: (batch[0], {{'label': batch[1]}})`."
    )


def _to(batch: Any, device: torch.device) -> Any:
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, batch)


def _writer(folder: str | Path, step: int) -> AbstractContextManager[Any]:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step + 1)


def _rng_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (data transforms may use it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def _set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
