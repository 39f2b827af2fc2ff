"""States on disk that survive: atomic, checksummed, without code.

A checkpoint is one safetensors file. Its tensors are those of the state; everything else (numbers, texts, nesting) is
JSON in its metadata, beside a SHA-256 of all of it. Writing goes to a temporary file that is synchronised to the disk
and renamed, so that under its name a file is whole or not there. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check

FORMAT = "scoresde checkpoint 1"
_TENSOR, _TUPLE, _PAIRS = "__tensor__", "__tuple__", "__pairs__"


class CheckpointError(RuntimeError):
    """A file that is no whole checkpoint of this library; the message says what to do."""


def save(path: str | os.PathLike[str], state: Any) -> None:
    """Write a state so that under `path` there is the old file or the whole new one, at any moment.

    Arguments:
        path: Where; the folder must exist.
        state: Dictionaries, lists and tuples of tensors, numbers, texts and None.
    """
    from safetensors.torch import save as serialise

    target = Path(path)
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "", tensors))
    data = serialise(tensors, {"format": FORMAT, "tree": tree, "sha256": _digest(tree, tensors)})
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the name, too, is on the disk only when its folder is
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: str | os.PathLike[str]) -> Any:
    """Read a state back, on the CPU; a truncated, damaged or foreign file raises a :class:`CheckpointError`.

    Arguments:
        path: The file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}; check the name, or start without one.")
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            if meta.get("format") != FORMAT:
                raise CheckpointError(
                    f"{path} was not written by this library (its format is {meta.get('format')!r}, not {FORMAT!r}); "
                    f"weights of other programs go into the network with net.load_state_dict(safetensors...load_file)."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dictionary)
            tree = meta["tree"]
            whole = meta.get("sha256") == _digest(tree, tensors)
    except CheckpointError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated, damaged or no safetensors file ({error}); delete it and go on from the checkpoint "
            f"before it."
        ) from error
    if not whole:
        raise CheckpointError(
            f"{path} is damaged: its contents do not match their checksum; delete it and go on from the checkpoint "
            f"before it, or copy it again from where it came."
        )
    return _unpack(json.loads(tree), tensors)


@dataclass(frozen=True)
class Checkpoints:
    """The last few checkpoints of a run, in a folder.

    Arguments:
        folder: Where; made if it does not exist.
        keep: How many of the newest to keep.
    """

    folder: Path
    keep: int = 3

    def __post_init__(self) -> None:
        check.integer("keep", self.keep, least=1)
        object.__setattr__(self, "folder", Path(self.folder))

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:09d}.safetensors"

    def steps(self) -> list[int]:
        """Steps that have a file, in order."""
        found = (re.fullmatch(r"step-(\d+)\.safetensors", file.name) for file in self.folder.glob("step-*.safetensors"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: Any) -> Path:
        """Write the state of a step, then delete the oldest; later steps, of a run that was left, are not counted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save(self.path(step), state)
        for old in [earlier for earlier in self.steps() if earlier <= step][: -self.keep]:
            self.path(old).unlink(missing_ok=True)
        for torn in self.folder.glob(".step-*.tmp"):  # of a process that was killed while it wrote
            torn.unlink(missing_ok=True)
        return self.path(step)

    def latest(self) -> tuple[int, Any] | None:
        """The newest step that is whole and its state; None if there is none. Warns of each that is not."""
        for step in reversed(self.steps()):
            try:
                return step, load(self.path(step))
            except CheckpointError as error:
                warnings.warn(f"passed over a checkpoint: {error}", stacklevel=2)
        return None


def _pack(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The state as JSON, its tensors set aside under their place in it."""
    if isinstance(value, Tensor):
        name = name or "tensor"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}.{k}" if name else str(k), tensors) for k, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if isinstance(value, Mapping):
        inner = {key: _pack(item, f"{name}.{key}" if name else str(key), tensors) for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("__") for key in inner):
            return inner
        if not all(isinstance(key, (str, int)) for key in inner):
            raise TypeError(f"`state` has keys at {name!r} that are neither texts nor integers: {list(inner)}.")
        return {_PAIRS: [[key, item] for key, item in inner.items()]}
    raise TypeError(
        f"`state` holds a {type(value).__name__} at {name!r}; a checkpoint holds tensors, numbers, texts and None in "
        f"dictionaries, lists and tuples, and no objects."
    )


def _unpack(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, list):
        return [_unpack(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if _TENSOR in tree:
        return tensors[tree[_TENSOR]]
    if _TUPLE in tree:
        return tuple(_unpack(item, tensors) for item in tree[_TUPLE])
    if _PAIRS in tree:
        return {key: _unpack(item, tensors) for key, item in tree[_PAIRS]}
    return {key: _unpack(item, tensors) for key, item in tree.items()}


def _digest(tree: str, tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256(tree.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
