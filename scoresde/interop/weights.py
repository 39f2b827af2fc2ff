"""Weights of other code bases loaded into a network, without pickles, with a report of what did not fit."""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from scoresde._doors import checked

Weights = Mapping[str, Tensor]
Convert = Callable[[Weights], Weights]

_WRAPPERS = ("module.", "_orig_mod.")  # prefixes of DistributedDataParallel and torch.compile, which say nothing
_ENTRIES = ("state_dict", "model_state_dict", "model", "net", "params", "params_ema", "ema")
_SHOWN = 4


@checked
@dataclass(frozen=True)
class LoadReport:
    """Result of :func:`load_weights`; it prints what did not fit.

    Arguments:
        loaded: Names of the loaded tensors.
        missing: Names of tensors of the network that the weights do not have.
        unexpected: Names of weights that the network does not have.
        shapes: Names of tensors with other shapes, with the network's shape and that of the weights.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every tensor of the network was loaded and no weight was left over."""
        return not (self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded"]
        for what, names in (("missing in the weights", self.missing), ("unknown to the network", self.unexpected)):
            if names:
                lines.append(f"{len(names)} {what}: {_some(names)}")
        if self.shapes:
            texts = [
                f"{name} {list(ours)} in the network, {list(theirs)} in the weights"
                for name, ours, theirs in self.shapes
            ]
            lines.append(f"{len(texts)} of another shape: {_some(texts)}")
        near = _nearest(self.missing, self.unexpected)
        if near:
            lines.append(f"perhaps {near[1]} is {near[0]}; `convert`=renamed(...) renames")
        return "; ".join(lines) + "."


@checked
def load_weights(
    net: nn.Module,
    weights: Weights | str | os.PathLike[str],
    *,
    entry: str | None = None,
    convert: Convert | Sequence[Convert] = (),
    strict: bool = True,
) -> LoadReport:
    """Load weights into a network from a file or a dictionary; files are read as tensors only, never as pickles.

    A prefix of ``DistributedDataParallel`` or ``torch.compile`` on all names is dropped. If the file holds more than
    the weights, `entry` names the part, such as ``"ema"``. The exponential moving average of score_sde, whose entry has
    a list ``shadow_params``, gets the names of the network's parameters in their order; buffers come from the entry
    ``model`` beside it.

    Arguments:
        net: Network; it keeps its dtype and its device.
        weights: ``.safetensors`` file, file of ``torch.save``, or dictionary of tensors.
        entry: Name of the part with the weights, dots for deeper parts; by default found if there is only one.
        convert: Function, or functions in turn, from names and tensors to new ones, such as :func:`without_prefix`.
        strict: Whether to raise an error, and load nothing, unless all names and shapes fit.

    Returns:
        A report with the names that were loaded, missing, unknown, or of another shape.

    Example:
        >>> import torch, scoresde as ss
        >>> net = torch.nn.Linear(2, 1)
        >>> saved = {"module.ema.weight": torch.ones(1, 2), "module.ema.bias": torch.zeros(1)}
        >>> print(ss.interop.load_weights(net, saved, convert=ss.interop.without_prefix("ema.")))
        2 tensors loaded.
    """
    if not isinstance(net, nn.Module):
        raise TypeError(f"`net` must be a module, got {type(net).__name__}.")
    content = weights if isinstance(weights, Mapping) else _read(Path(weights))
    named = _drop_wrappers(_select(content, entry, net))
    for function in (convert,) if callable(convert) else convert:
        named = function(named)
    own = {k: v for k, v in net.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    shapes = {
        k: (tuple(own[k].shape), tuple(named[k].shape)) for k in named if k in own and own[k].shape != named[k].shape
    }
    fitting = {k: v for k, v in named.items() if k in own and k not in shapes}
    report = LoadReport(
        tuple(sorted(fitting)),
        tuple(sorted(set(own) - set(named))),
        tuple(sorted(set(named) - set(own))),
        tuple((k, *shapes[k]) for k in sorted(shapes)),
    )
    if strict and not report.fits:
        raise ValueError(f"the weights do not fit {type(net).__name__}: {report} Give strict=False to load what fits.")
    with torch.no_grad():
        for name, value in fitting.items():
            own[name].copy_(value)
    return report


@checked
def without_prefix(prefix: str) -> Convert:
    """Converter that keeps the names that begin with a prefix, and drops the prefix.

    Arguments:
        prefix: Prefix with its dot, such as ``"model."`` of exports of EDM or ``"model.diffusion_model."`` of LDM.
    """
    return lambda weights: {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}


@checked
def with_prefix(prefix: str) -> Convert:
    """Converter that puts a prefix before every name, such as ``"model."`` for a network inside EDM's preconditioning.

    Arguments:
        prefix: Prefix with its dot.
    """
    return lambda weights: {prefix + k: v for k, v in weights.items()}


@checked
def renamed(names: Mapping[str, str]) -> Convert:
    """Converter that replaces parts of names: whole components between dots, the longest first.

    Arguments:
        names: Old parts and new parts, such as ``{"norm1": "norm", "blocks.0": "stem"}``.
    """
    ordered = sorted(names.items(), key=lambda item: -len(item[0]))

    def rename(name: str) -> str:
        text = f".{name}."
        for old, new in ordered:
            text = text.replace(f".{old}.", f".{new}.")
        return text.strip(".")

    return lambda weights: {rename(k): v for k, v in weights.items()}


def _read(path: Path) -> Mapping[str, object]:
    if not path.is_file():
        raise FileNotFoundError(f"`weights` is {str(path)!r}, which is no file.")
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError("a .safetensors file needs the package safetensors: pip install safetensors.") from error
        return cast(Mapping[str, object], load_file(path))
    try:
        return cast(Mapping[str, object], torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{str(path)!r} holds pickled objects, not only tensors, and may run code when it is read. Load it where "
            f"it was made and save net.state_dict() with torch.save or safetensors."
        ) from error


def _is_weights(value: object) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def _select(content: object, entry: str | None, net: nn.Module) -> Weights:
    """The weights inside the content of a file."""
    if entry is None and _is_weights(content):
        return cast(Weights, content)
    if not isinstance(content, Mapping):
        raise ValueError(f"`weights` must hold a dictionary of tensors, got {type(content).__name__}.")
    if entry is None:
        found = [name for name in content if _is_weights(content[name]) or _shadow(content[name])]
        usual = [name for name in _ENTRIES if name in found]
        if len(found) != 1 and len(usual) != 1:
            raise ValueError(
                f"`weights` has the entries {', '.join(map(str, content))}; give `entry`, the one with the weights."
            )
        entry = str((found if len(found) == 1 else usual)[0])
    part: object = content
    for name in [entry] if entry in content else entry.split("."):
        if not isinstance(part, Mapping) or name not in part:
            raise ValueError(
                f"`entry` is {entry!r}, which `weights` does not have, only {_some([*map(str, content)])}."
            )
        part = part[name]
    if _shadow(part):
        return _of_shadows(cast(Mapping[str, Sequence[Tensor]], part)["shadow_params"], content.get("model"), net)
    if not _is_weights(part):
        raise ValueError(f"the entry {entry!r} of `weights` is no dictionary of tensors.")
    return cast(Weights, part)


def _shadow(part: object) -> bool:
    return isinstance(part, Mapping) and isinstance(part.get("shadow_params"), list | tuple)


def _of_shadows(shadows: Sequence[Tensor], model: object, net: nn.Module) -> Weights:
    """Averages of score_sde, which lists the parameters that require grad in their order."""
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    if len(names) != len(shadows):
        raise ValueError(
            f"`weights` has a list of {len(shadows)} averages, and the network {len(names)} parameters with gradients."
        )
    rest = _drop_wrappers(cast(Weights, model)) if _is_weights(model) else {}
    return {**rest, **dict(zip(names, shadows, strict=True))}


def _drop_wrappers(weights: Weights) -> Weights:
    for prefix in _WRAPPERS * 2:  # one may be around the other
        if all(name.startswith(prefix) for name in weights):
            weights = {name[len(prefix) :]: value for name, value in weights.items()}
    return weights


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _nearest(missing: Sequence[str], unexpected: Sequence[str]) -> tuple[str, str] | None:
    for name in missing[:20]:
        near = difflib.get_close_matches(name, unexpected, n=1, cutoff=0.6)
        if near:
            return name, near[0]
    return None
