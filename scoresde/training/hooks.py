"""Hooks of the trainer: previews, a progress bar, and the base class for hooks of one's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.training.describe import describe

if TYPE_CHECKING:
    from tqdm import tqdm

    from scoresde.training.trainer import Trainer

Row = dict[str, float]


@dataclass(frozen=True)
class Record:
    """One finished step of the optimiser.

    Arguments:
        step: Number of steps since the beginning of the run.
        steps: Step at which :meth:`Trainer.fit` ends.
        loss: Mean loss of the rows of this process, a scalar on the device; ``float(loss)`` waits for the device.
        norm: Norm of the gradient before clipping.
    """

    step: int
    steps: int
    loss: Tensor
    norm: float


class Hook:
    """Base class of hooks; a subclass overrides the methods that it needs. Here every method does nothing.

    :meth:`Trainer.fit` calls the hooks in their order, and :class:`Checkpoints` last. Only the first process calls a
    hook, unless its class has `every_process` or `evaluates`. A checkpoint does not contain the state of hooks.

    Example:
        >>> import torch, scoresde as ss
        >>> from scoresde.training import Hook, PowerEMA
        >>> class Snapshots(Hook):
        ...     every_process = True  # because a snapshot gathers sharded weights
        ...
        ...     def __init__(self, every):
        ...         self.every, self.list = every, []
        ...
        ...     def on_step(self, trainer, record):
        ...         if record.step % self.every == 0:
        ...             self.list += trainer.ema.snapshot()
        >>> model = ss.Denoiser(ss.nn.MLP(2, seed=0), ss.VP(), predicts="eps")
        >>> hook, average = Snapshots(every=2), PowerEMA(model, stds=(0.1,))
        >>> trainer = ss.Trainer(ss.DSM(model), torch.randn(64, 2), batch=16, ema=average, hooks=[hook])
        >>> history = trainer.fit(4)
        >>> [snapshot.t for snapshot in hook.list]
        [2, 4]
    """

    every_process: ClassVar[bool] = False
    """Whether all processes call the hook, because it saves or gathers tensors that are sharded."""

    evaluates: ClassVar[bool] = False
    """Whether the hook uses :meth:`Trainer.averaged`. If the weights are sharded, all processes then call the hook, and
    the trainer keeps a whole copy of the model for it."""

    def on_start(self, trainer: Trainer, steps: int) -> None:
        """Called when :meth:`Trainer.fit` begins, which ends at step `steps`."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Called after each step."""

    def measure(self, trainer: Trainer, steps: int) -> Row:
        """Called after each step, before ``on_log``: return numbers for ``trainer.history``, or an empty dictionary.

        A step with numbers has a row in the history, whatever `log_every` is. With several processes, all must return
        the same names at the same steps (`every_process`).
        """
        return {}

    def on_log(self, trainer: Trainer, row: Row, levels: Sequence[Row]) -> None:
        """Called with each new row of ``trainer.history``, and the mean errors by noise level since the last one."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """Called when a checkpoint was written."""

    def close(self) -> None:
        """Called when :meth:`Trainer.fit` ends, also after an error."""


@checked
@dataclass(frozen=True)
class Preview(Hook):
    """A function of the model with the averaged weights, called at intervals: to draw samples, or to measure errors.

    Arguments:
        function: Function ``function(model, step)``. The first process calls it without gradients, in evaluation mode;
            under FSDP `model` is a whole copy.
        every: Number of steps between calls.
    """

    evaluates: ClassVar[bool] = True

    function: Callable[[nn.Module, int], object]
    every: int = 1000

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"`function` must be a function (model, step), got {type(self.function).__name__}.")
        check.integer("every", self.every, at_least=1)

    def __repr__(self) -> str:
        return f"Preview({describe(self.function)}, every={self.every})"

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if record.step % self.every == 0:
            with trainer.averaged() as model, torch.no_grad():
                if trainer.is_main:
                    self.function(model, record.step)


@checked
@dataclass
class ProgressBar(Hook):
    """A progress bar with the loss and the speed; a trainer without one adds ``ProgressBar()``.

    Arguments:
        show: Whether to show the bar; None shows it only in an interactive terminal.
    """

    show: bool | None = None
    _bar: tqdm | None = field(default=None, init=False, repr=False, compare=False)

    def on_start(self, trainer: Trainer, steps: int) -> None:
        from tqdm import tqdm

        hidden = None if self.show is None else not self.show
        self._bar = tqdm(total=steps, initial=trainer.step, disable=hidden, unit="step")

    def on_step(self, trainer: Trainer, record: Record) -> None:
        assert self._bar is not None
        self._bar.update()

    def on_log(self, trainer: Trainer, row: Row, levels: Sequence[Row]) -> None:
        assert self._bar is not None
        self._bar.set_postfix(loss=f"{row['loss']:.4g}", samples_per_s=f"{row['speed']:.0f}", refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
