"""Hooks that log the training elsewhere: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoresde._doors import checked
from scoresde.training.hooks import Hook, Row

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter
    from wandb import Run

    from scoresde.training.trainer import Trainer


@checked
@dataclass
class TensorBoard(Hook):
    """Logs for TensorBoard: every row of ``trainer.history``, and the mean errors by noise level.

    Arguments:
        folder: Folder of the logs.
    """

    folder: str | Path
    _writer: SummaryWriter | None = field(default=None, init=False, repr=False, compare=False)

    def on_start(self, trainer: Trainer, steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.folder), purge_step=trainer.step + 1)

    def on_log(self, trainer: Trainer, row: Row, levels: Sequence[Row]) -> None:
        assert self._writer is not None
        for name, value in _scalars(row, levels).items():
            self._writer.add_scalar(name, value, trainer.step)

    def images(self, x: Tensor, step: int, name: str = "samples") -> None:
        """Log images; call this during :meth:`Trainer.fit`, in the function of a :class:`Preview`.

        Arguments:
            x: Images, (B, C, height, width), with values in [-1, 1] and C = 1 or 3; other values are clipped.
            step: Number of the step.
            name: Name in TensorBoard.
        """
        if self._writer is None:
            raise RuntimeError("`images` needs open logs: call it during `Trainer.fit`, as in the function of Preview.")
        self._writer.add_images(name, _bytes(x), step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@dataclass
class WandB(Hook):
    """Logs for Weights & Biases: every row of ``trainer.history``, the mean errors by noise level, and the settings.

    It needs ``pip install wandb``. A run that resumes also continues there, with the same id: the file ``wandb-id`` in
    the folder of the checkpoints holds it. Weights & Biases ignores rows of steps that it already has, so the steps
    after the last checkpoint, which are computed again, have one row each.

    Arguments:
        project: Name of the project.
        id: Id of the run; by default a new one, or that of the run that is resumed.
        options: Other arguments of ``wandb.init``, such as ``{"name": "one", "mode": "offline"}``.
    """

    project: str
    id: str | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    _trainer: Trainer | None = field(default=None, init=False, repr=False, compare=False)
    _resumed: bool = field(default=False, init=False, repr=False, compare=False)
    _run: Run | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        fixed = sorted({"project", "id", "resume", "config"} & set(self.options))
        if fixed:
            raise ValueError(
                f"`options` has {', '.join(fixed)}, which WandB sets itself; give `project` and `id` as arguments, and "
                f"add to the settings with hook.run.config.update(...)."
            )

    def on_start(self, trainer: Trainer, steps: int) -> None:
        try:
            import wandb  # noqa: F401, an error now, not at the first row
        except ImportError as error:
            raise ImportError("the hook WandB needs the package wandb: pip install wandb.") from error
        self._trainer, self._resumed = trainer, trainer.newest is not None

    @property
    def run(self) -> Run:
        """Run of Weights & Biases, during :meth:`Trainer.fit`, to log anything else.

        It begins at its first use, after the folder of the checkpoints was accepted.
        """
        if self._run is None:
            import wandb

            if self._trainer is None:
                raise RuntimeError("`run` exists during `Trainer.fit` only; use it in hooks and previews.")
            self._run = wandb.init(
                project=self.project,
                id=self._choose_id(self._trainer),
                resume="allow",
                config=self._trainer.identity,
                allow_val_change=True,  # of settings that `resume(changes=...)` names
                **self.options,
            )
        return self._run

    def _choose_id(self, trainer: Trainer) -> str:
        """Id of a run: that given, that of the resumed run, or a new one, which is then written."""
        file = None if trainer.checkpoints is None else Path(trainer.checkpoints.folder) / "wandb-id"
        if self.id is None:
            known = self._resumed and file is not None and file.is_file()
            self.id = file.read_text().strip() if known and file is not None else secrets.token_hex(6)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{self.id}\n")
        return self.id

    def on_log(self, trainer: Trainer, row: Row, levels: Sequence[Row]) -> None:
        self.run.log(_scalars(row, levels), step=trainer.step)

    def images(self, x: Tensor, step: int, name: str = "samples") -> None:
        """Log images; call this during :meth:`Trainer.fit`, in the function of a :class:`Preview`.

        Arguments:
            x: Images, (B, C, height, width), with values in [-1, 1] and C = 1 or 3; other values are clipped.
            step: Number of the step.
            name: Name at Weights & Biases.
        """
        import wandb
        from PIL import Image

        pixels = _bytes(x).permute(0, 2, 3, 1).numpy()
        pictures = [Image.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]
        self.run.log({name: [wandb.Image(picture) for picture in pictures]}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
        self._run = self._trainer = None


def _scalars(row: Row, levels: Sequence[Row]) -> dict[str, float]:
    """Numbers of a row of the history and of the levels, by the names that the loggers show."""
    rows = {"validation/loss" if k == "validation" else f"train/{k}": v for k, v in row.items() if k != "step"}
    return {**rows, **{f"error/lam {level['lam']:+.1f}": level["error"] for level in levels}}


def _bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes on the CPU."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise ValueError(f"`x` must be images (B, C, height, width) with 1 or 3 channels, got shape {tuple(x.shape)}.")
    return ((x.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu()
