"""Checkpoints: files that are written atomically, have a checksum, and contain no code.

**The format.** A checkpoint is one safetensors file, ``step-000012000.safetensors``:

* Its tensors are the tensors of the state. A tensor's name is its position in the state, with dots, as in
  ``loss.model.net.weight`` or ``ema.weights.net.weight``, so that any reader of safetensors finds the weights. If two
  positions have the same name with dots, the second one ends in ``~2``.
* Its metadata are three strings: ``format`` is ``"scoresde checkpoint 1"``; ``tree`` is JSON with all other values
  (numbers, strings, nesting), in which ``{"__tensor__": name}`` stands for a tensor, ``{"__tuple__": [...]}`` for a
  tuple and ``{"__pairs__": [[key, value], ...]}`` for a dictionary with integer keys; ``sha256`` is a checksum of the
  tree and of all tensors.

The state of a run is :meth:`Trainer.state_dict`: ``run``, ``step``, ``skipped``, ``loss``, ``ema``, ``optimiser``,
``scaler`` and ``rng``. A file is written under a temporary name, flushed to the disk and then renamed, so that a file
under its final name is complete. Nothing is unpickled. While a run trains, its folder has a file ``.lock`` that names
the machine and the process, and no other process writes checkpoints there.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde import _files as files
from scoresde._doors import checked
from scoresde.training.hooks import Hook, Record
from scoresde.training.sharding import State

if TYPE_CHECKING:
    from scoresde.training.trainer import Trainer

FORMAT = "scoresde checkpoint 1"

_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


class CheckpointError(RuntimeError):
    """The file is missing, damaged or not a checkpoint of this library; the message contains the fix."""


def save(path: str | os.PathLike[str], state: object) -> None:
    """Write a state atomically: at any moment `path` is the old file or the complete new file.

    Arguments:
        path: Path of the file; its folder must exist.
        state: Nested dictionaries, lists and tuples of tensors, numbers, strings and None.
    """
    from safetensors.torch import save as serialise

    tensors: dict[str, Tensor] = {}
    try:
        tree = json.dumps(_pack(state, "", tensors))
    except RecursionError:
        raise ValueError("`state` is nested too deeply, or contains itself; it cannot be saved.") from None
    files.write(path, serialise(tensors, {"format": FORMAT, "tree": tree, "sha256": _digest(tree, tensors)}))


@checked
def load(path: str | os.PathLike[str]) -> Any:
    """Read a state onto the CPU; a missing, damaged or foreign file raises a :class:`CheckpointError`.

    Arguments:
        path: Path of the file.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; check the path, or start a new run.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} was not written by this library (its format is {meta.get('format')!r}, not {FORMAT!r}); "
                    f"load weights of other programs with net.load_state_dict(safetensors.torch.load_file(path))."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            tree = meta["tree"]
            intact = meta.get("sha256") == _digest(tree, tensors)
            names: list[str] = []
            state = _unpack(json.loads(tree), tensors, names)
    except CheckpointError:
        raise
    except PermissionError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); change its permissions.") from error
    except Exception as error:  # a forged file can raise anything: RecursionError, MemoryError, TypeError
        raise CheckpointError(
            f"{path} is truncated, damaged or not a safetensors file ({error!r}); delete it and continue from the "
            f"previous checkpoint."
        ) from error
    if not intact:
        raise CheckpointError(
            f"{path} is damaged: its contents do not match their checksum; delete it and continue from the previous "
            f"checkpoint, or copy it again from its source."
        )
    if twice := sorted(name for name, count in Counter(names).items() if count > 1):
        raise CheckpointError(
            f"{path} was saved by version 0.1.0, which stored only one of two tensors with the name {twice[0]!r}; the "
            f"other is lost. Load the rest with safetensors.torch.load_file(path), or save the run again."
        )
    return state


@checked
@dataclass(frozen=True)
class Checkpoints(Hook):
    """The newest checkpoints of a run, in one folder; a hook that writes them at intervals and at the end of `fit`.

    Arguments:
        folder: Folder of the files; it is created.
        every: Number of steps between checkpoints.
        keep: Number of checkpoints to keep.
        overwrite: Whether a run that does not resume deletes the checkpoints of the run in the folder, when it saves
            its first one; by default it is refused.
    """

    every_process: ClassVar[bool] = True

    folder: str | Path
    every: int = 1000
    keep: int = 3
    overwrite: bool = False
    _lock: files.Lock = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check.integer("every", self.every, at_least=1)
        check.integer("keep", self.keep, at_least=1)
        object.__setattr__(self, "folder", Path(self.folder))
        object.__setattr__(self, "_lock", files.Lock(Path(self.folder) / ".lock"))

    def __repr__(self) -> str:
        overwrite = ", overwrite=True" if self.overwrite else ""
        return f"Checkpoints({str(self.folder)!r}, every={self.every}, keep={self.keep}{overwrite})"

    def on_start(self, trainer: Trainer, steps: int) -> None:
        if trainer.is_main:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        self.check_free(trainer)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        self._lock.beat()
        if record.step % self.every == 0 or record.step == record.steps:
            trainer.save()

    def path(self, step: int) -> Path:
        """Path of the file of a step."""
        return Path(self.folder) / f"step-{step:09d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a file, in increasing order."""
        names = (
            re.fullmatch(r"step-(\d+)\.safetensors", file.name) for file in Path(self.folder).glob("step-*.safetensors")
        )
        return sorted(int(match[1]) for match in names if match)

    def newest(self) -> tuple[int, int] | None:
        """Step of the newest file, and the time when it was written, in nanoseconds; None if there is no file."""
        steps = self.steps()
        return (steps[-1], self.path(steps[-1]).stat().st_mtime_ns) if steps else None

    def check_free(self, trainer: Trainer) -> None:
        """Raise an error if the folder has checkpoints of another run, unless they are to be overwritten.

        Arguments:
            trainer: Trainer that will save here.
        """
        if trainer.newest is not None:
            if trainer.is_main and self.newest() not in (None, trainer.newest):
                raise FileExistsError(
                    f"another run wrote to {self.folder} after this one; use another folder, or continue that run "
                    f"with trainer.resume()."
                )
        elif not self.overwrite and (steps := self.steps()):
            raise FileExistsError(
                f"{self.folder} has the checkpoints of a run, up to step {steps[-1]}; continue it with "
                f"trainer.resume(), use another folder, or replace the run with "
                f"hooks=[Checkpoints({str(self.folder)!r}, overwrite=True)]."
            )

    def save(self, step: int, state: object, *, alone: bool = False) -> Path:
        """Write the state of a step, and delete all but the newest `keep` of the files up to this step.

        Arguments:
            step: Number of the step.
            state: State, as in :func:`save`.
            alone: Whether to delete the files of all other steps first.
        """
        folder, held = Path(self.folder), self._lock.held
        folder.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            for other in self.steps() if alone else []:
                self.path(other).unlink(missing_ok=True)
            save(self.path(step), state)
            for old in [earlier for earlier in self.steps() if earlier <= step][: -self.keep]:
                self.path(old).unlink(missing_ok=True)
            files.remove_torn(folder)
        finally:
            if not held:
                self._lock.release()
        return self.path(step)

    def close(self) -> None:
        self._lock.release()

    def latest(self) -> tuple[int, State] | None:
        """Return the newest intact step and its state, or None; a damaged file gives a warning."""
        for step in reversed(self.steps()):
            try:
                return step, load(self.path(step))
            except CheckpointError as error:
                warnings.warn(f"skipped a checkpoint: {error}", stacklevel=check.levels_to_user())
        return None


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    """Convert a state to JSON values; store its tensors in `tensors`, named by their position in the state."""
    if isinstance(value, Tensor):
        name = _unused(name or "tensor", tensors)
        tensors[name] = value.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}.{k}" if name else str(k), tensors) for k, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, Mapping):
        if not all(isinstance(key, (str, int)) for key in value):
            raise TypeError(f"`state` has keys at {name!r} that are neither strings nor integers: {list(value)}.")
        pairs = [(key, _pack(item, f"{name}.{key}" if name else str(key), tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return dict(pairs)
        return {_PAIRS: [list(pair) for pair in pairs]}
    raise TypeError(
        f"`state` has a {type(value).__name__} at {name!r}; only tensors, numbers, strings and None in dictionaries, "
        f"lists and tuples can be saved; convert the object first."
    )


def _unused(name: str, tensors: Mapping[str, Tensor]) -> str:
    """The name, or with a number if another position has it: both {"a.b": x} and {"a": {"b": x}} give "a.b"."""
    names = itertools.chain([name], (f"{name}~{k}" for k in itertools.count(2)))
    return next(free for free in names if free not in tensors and free != "__metadata__")


def _unpack(tree: object, tensors: Mapping[str, Tensor], names: list[str]) -> object:
    """Inverse of `_pack`; append the names of the tensors to `names`."""
    if isinstance(tree, list):
        return [_unpack(item, tensors, names) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        names.append(tree[_TENSOR])
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(_unpack(item, tensors, names) for item in tree[_TUPLE])
    if _PAIRS in tree:
        return {key: _unpack(item, tensors, names) for key, item in tree[_PAIRS]}
    return {key: _unpack(item, tensors, names) for key, item in tree.items()}


def _digest(tree: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
