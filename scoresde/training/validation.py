"""Validation loss: the loss of the averaged weights on other data, always at the same times and noise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.keyed import Noise
from scoresde.training.data_order import Data, Loader, size
from scoresde.training.hooks import Hook, Row
from scoresde.training.losses import DSM

if TYPE_CHECKING:
    from scoresde.training.trainer import Trainer


@checked
@dataclass(frozen=True)
class Validation(Hook):
    """Loss of the averaged weights on validation data, in ``trainer.history`` as ``"validation"``, and in TensorBoard.

    Times and noise depend only on `seed` and the number of the sample, so that losses at different steps differ by the
    weights alone. Times are drawn from p, also if the trained loss has a `proposal`. All processes share the work.

    Arguments:
        data: Data that is not trained on, in the form of the trainer's data.
        every: Number of steps between measurements; there is one more at the end of ``fit``.
        batch: Number of samples that are evaluated at once; by default that of the trainer.
        seed: Seed of times and noise.

    Example:
        >>> import torch, scoresde as ss
        >>> from scoresde.training import Validation
        >>> model = ss.Denoiser(ss.nn.MLP(2, seed=0), ss.VP(), predicts="eps")
        >>> validation = Validation(torch.randn(100, 2), every=2)
        >>> trainer = ss.Trainer(ss.DSM(model), torch.randn(64, 2), batch=16, hooks=[validation])
        >>> [row["step"] for row in trainer.fit(5) if "validation" in row]
        [2, 4, 5]
    """

    every_process: ClassVar[bool] = True
    evaluates: ClassVar[bool] = True

    data: Data | Loader
    every: int = 1000
    batch: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.data if isinstance(self.data, Loader) else Loader(self.data))
        check.integer("every", self.every, at_least=1)
        if self.batch is not None:
            check.integer("batch", self.batch, at_least=1)
        Noise(self.seed)

    def __repr__(self) -> str:
        return f"Validation({self.data!r}, every={self.every}, batch={self.batch}, seed={self.seed})"

    def measure(self, trainer: Trainer, steps: int) -> Row:
        if trainer.step % self.every and trainer.step != steps:
            return {}
        return {"validation": self.loss(trainer)}

    @torch.no_grad()
    def loss(self, trainer: Trainer) -> float:
        """Mean loss of the validation data with the averaged weights; every process must call this method.

        Arguments:
            trainer: Trainer with the loss and the weights.
        """
        assert isinstance(self.data, Loader)
        accelerator, n = trainer.accelerator, size(self.data.data)
        rows = list(torch.arange(n).split(self.batch or trainer.order.batch))[trainer.rank :: trainer.world]
        total = torch.zeros((), device=accelerator.device)
        with trainer.averaged(), _evaluated(trainer.evaluated_loss) as loss, accelerator.autocast():
            for index, (x, cond) in zip(rows, self.data.batches(iter(rows), accelerator.device), strict=True):
                value: Tensor = loss(x, Noise(self.seed, offset=int(index[0])), **cond)
                total += value * (len(index) / n)
        return float(accelerator.reduce(total, "sum"))


@contextmanager
def _evaluated(loss: nn.Module | None) -> Iterator[nn.Module]:
    """A loss in evaluation mode, with times from p; afterwards all is as before."""
    assert loss is not None
    modes = [(module, module.training) for module in loss.modules()]
    proposal = loss.proposal if isinstance(loss, DSM) else None
    try:
        loss.eval()
        if isinstance(loss, DSM):
            loss.proposal = None  # it changes during the run
        yield loss
    finally:
        if isinstance(loss, DSM):
            loss.proposal = proposal
        for module, training in modes:
            module.training = training
