"""Reading the folder of a saved model; :mod:`scoresde.denoisers.saving` writes it and has the format.

**Security.** Reading runs no code of the folder: it holds JSON and safetensors, and nothing is unpickled or evaluated.
The one thing that a folder can ask for is a class of networks. It is imported only from ``scoresde``, ``diffusers``,
``torch.nn`` or a package that the caller allows, and called only if it is a subclass of ``torch.nn.Module``. Its
arguments may still ask for a network that does not fit into memory. Allow a package only if you would run its code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoresde import _build
from scoresde._doors import checked
from scoresde._printing import short
from scoresde.data import Standardize
from scoresde.denoisers import clocks
from scoresde.denoisers.base import check_sde
from scoresde.denoisers.card import Card
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.network import Clock, Denoiser, Preconditioning
from scoresde.denoisers.saving import EXTRAS, FILES, FORMAT, MANIFEST, OPERATORS, PLAN, WEIGHTS, digest, probes
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.rule import Solver

_SHOWN = 4  # names of tensors that an error lists

Contents = dict[str, Any]


@checked
class LoadError(RuntimeError):
    """The folder is missing, damaged or not a saved model; the message has its path and the fix.

    Arguments:
        message: Text of the error.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)


@checked
def load(
    folder: str | os.PathLike[str],
    *,
    net: Callable[..., Tensor] | None = None,
    sde: SDE | None = None,
    time: Clock | None = None,
    allow: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Read a model that ``model.save(folder)`` wrote: the same weights in the same dtype, in evaluation mode.

    The card of the model, ``model.card``, has the solver, the scale and whatever else was saved. No code of the folder
    is run; the module has more about security.

    Arguments:
        folder: Path of the folder.
        net: Network that receives the weights; by default it is built as the folder says. That of an adapter, such as
            :func:`from_edm`, may be given bare, without the adapter.
        sde: Process, for a folder whose process is defined by code; its α and σ are compared.
        time: Time input of the network, for a folder whose time is a function; its values are compared.
        allow: Packages, in addition to ``scoresde``, ``diffusers`` and ``torch.nn``, whose networks may be imported.
        device: Device of the model, and of its card's Gaussian.

    Example:
        >>> import tempfile, torch, scoresde as ss
        >>> model = ss.Denoiser(ss.nn.MLP(2, hidden=8), ss.VP(), predicts="eps")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = model.save(f"{folder}/moons", card=ss.denoisers.Card(solver=ss.UniPC(2), nfe=8))
        ...     again = ss.load(path)
        >>> samples = [ss.sample(m, (4, 2), again.card.solver, nfe=again.card.nfe, seed=0) for m in (model, again)]
        >>> torch.equal(*samples)
        True
    """
    path = Path(folder)
    body = _manifest(path)
    for name, expected in body["files"].items():
        _check_file(path, name, expected)
    try:
        process = _process(body["process"], sde)
        weights = _read(path, WEIGHTS)
        network = _network(body["network"], net, allow, weights.keys())
        _load_weights(network, weights, path)
        scaling = body["precondition"]
        model = Denoiser(
            network,
            process,
            predicts=body["predicts"],
            precondition=None if scaling is None else Preconditioning(scaling["sigma_data"]),
            time=_clock(body["time"], time, process),
            learned_variance=body["learned_variance"],
            check_finite=body["check_finite"],
            shared=tuple(body["shared"]),
        )
        model.card = _card(body["card"], process, path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"there is no entry {error}" if isinstance(error, KeyError) else error
        raise LoadError(f"{path} cannot be loaded: {reason}") from error
    if model.card.gaussian is not None and torch.device(device).type != "mps":  # which has no float64
        model.card.gaussian.to(device)
    return model.eval().to(device)


def _manifest(path: Path) -> Contents:
    """The dictionary of a folder, checked against its own checksum."""
    file = path / MANIFEST
    if not path.is_dir():
        raise LoadError(f"there is no folder {path}; check the path, or use from_pretrained for a name on the Hub.")
    if not file.is_file():
        found = ", ".join(sorted(entry.name for entry in path.iterdir())[:_SHOWN]) or "nothing"
        raise LoadError(
            f"{path} is not a saved model: it has no {MANIFEST} (found: {found}); write the folder with "
            f"model.save(folder). Checkpoints of a training run are read by Trainer."
        )
    try:
        manifest = json.loads(file.read_bytes())
        version = manifest["format"]
        body = {name: value for name, value in manifest.items() if name != "sha256"}
        intact = manifest.get("sha256") == digest(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{file} is damaged or was not written by model.save ({error!r}); copy the folder again."
        ) from error
    if version != FORMAT:
        raise LoadError(f"{file} has the format {version!r}, this version reads {FORMAT!r}; update scoresde.")
    if not intact:
        raise LoadError(
            f"{file} does not match its checksum: it is damaged or was edited; copy the folder again, or load it and "
            f"save it anew to change it."
        )
    if not isinstance(body.get("files"), dict) or not {WEIGHTS} <= set(body["files"]) <= set(FILES) - {MANIFEST}:
        raise LoadError(f"{file} does not list {WEIGHTS} and other files of the format; copy the folder again.")
    return body


def _check_file(path: Path, name: str, expected: object) -> None:
    file = path / name
    if not file.is_file():
        raise LoadError(f"{file} is missing; copy the whole folder again.")
    total = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            total.update(block)
    if total.hexdigest() != expected:
        raise LoadError(
            f"{file} does not match its checksum in {MANIFEST}: it is damaged, or belongs to another save that was "
            f"interrupted; copy the folder again, or save the model again."
        )


def _read(path: Path, name: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path / name)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path / name} is not a safetensors file ({error}); copy the folder again.") from error


def _process(entry: Contents, given: SDE | None) -> SDE:
    if "given" not in entry:
        process = SDE.from_dict(entry)
        if given is not None and given != process:
            raise ValueError(
                f"`sde` is {given!r}, but the network was trained on {process!r}; load without `sde`, and move the "
                f"model with ss.denoisers.Rescheduled(model, sde)."
            )
        return process
    if given is None:
        raise ValueError(f"its process is defined by code, {entry['given']}; give it as load(folder, sde=...).")
    check_sde(given)
    same = entry["T"] == given.T and math.isclose(given.t_min, entry["t_min"], rel_tol=1e-9)
    if not same or not all(
        math.isclose(value, fn(t), rel_tol=1e-6, abs_tol=1e-12)
        for t, *pair in entry["values"]
        for value, fn in zip(pair, (given.alpha, given.sigma), strict=True)
    ):
        raise ValueError(
            f"`sde` is {given!r}, which has other values of T, t_min, α or σ than the process of the model, "
            f"{entry['given']}; rebuild that one."
        )
    return given


def _clock(entry: object, given: Clock | None, sde: SDE) -> str | Clock | None:
    if not isinstance(entry, Mapping) or "given" not in entry:
        if given is not None:
            raise ValueError("`time` was given, but the folder holds the network's time; load without `time`.")
        if not isinstance(entry, Mapping):
            return entry if entry is None else str(entry)
        written = clocks.from_dict(entry)
        if written is not None:
            return written
        return functools.partial(OPERATORS[entry["operator"]], float(entry["number"]))
    if given is None:
        raise ValueError(f"the network's time is a function, {entry['given']}; give it as load(folder, time=...).")
    labels = torch.as_tensor(given(torch.tensor(probes(sde), dtype=torch.float64))).detach().double()
    saved = torch.tensor(entry["values"], dtype=torch.float64)
    if not torch.allclose(labels.expand(saved.shape), saved, rtol=1e-5, atol=1e-9):
        raise ValueError(
            f"`time` is another function than that of the model: it maps the times {_numbers(probes(sde))} to "
            f"{_numbers(labels.tolist())}, the model's to {_numbers(entry['values'])}."
        )
    return given


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)


def _network(
    entry: Contents, given: Callable[..., Tensor] | None, allow: Sequence[str], names: Collection[str]
) -> nn.Module:
    if given is not None:
        if not isinstance(given, nn.Module):
            raise TypeError(f"`net` must be a module, which receives the weights, got {type(given).__name__}.")
        if names and {name.replace("_orig_mod.", "") for name in given.state_dict()} == set(names):
            return given
        return _build.construct(entry, allow, given)
    missing = _build.unknown(entry)
    if missing is not None:
        raise ValueError(
            f"it does not say how to build its network, {missing}; give the network as load(folder, net=...), "
            f"or save with `build`."
        )
    return _build.construct(entry, allow)


def _load_weights(net: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into a network, which takes their dtypes."""
    own = net.state_dict()
    names = {name.replace("_orig_mod.", ""): name for name in own}  # where a network is compiled
    saved = {names.get(name, name): value for name, value in saved.items()}
    wrong = [
        *(f"{name} is missing" for name in own.keys() - saved.keys()),
        *(f"{name} is unknown" for name in saved.keys() - own.keys()),
        *(
            f"{name} is {tuple(saved[name].shape)} instead of {tuple(own[name].shape)}"
            for name in own.keys() & saved.keys()
            if own[name].shape != saved[name].shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise ValueError(
            f"the weights in {path / WEIGHTS} do not fit {short(net)}: {'; '.join(sorted(wrong)[:_SHOWN])}{more}; "
            f"build the network with the arguments that it was trained with."
        )
    dtypes = {tensor.dtype for tensor in saved.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        net.to(dtypes.pop())  # buffers that are not saved too
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if name in saved and tensor.dtype != saved[name].dtype:
            tensor.data = tensor.data.to(saved[name].dtype)
    net.load_state_dict(saved)


def _card(entry: Contents, sde: SDE, path: Path) -> Card:
    tensors = _read(path, EXTRAS) if entry["scale"] or entry["gaussian"] else {}
    scale = gaussian = solver = None
    if entry["scale"]:
        scale = Standardize(tensors["scale.mean"], tensors["scale.std"], entry["scale"]["target"])
    if entry["gaussian"]:
        matrices = [tensors[f"gaussian.axes.{i}"] for i in range(entry["gaussian"]["axes"])]
        axes = (matrices or None) if entry["gaussian"]["separable"] else matrices[0]
        gaussian = Gaussian(
            sde, tensors["gaussian.mean"], tensors["gaussian.spectrum"], axes, entry["gaussian"]["rest"]
        )
    if entry["solver"]:
        solver = Plan.load(path / PLAN) if "plan" in entry["solver"] else Solver.from_dict(entry["solver"])
    return Card(
        solver=solver,
        nfe=entry["nfe"],
        event=entry["event"],
        conditions=entry["conditions"],
        scale=scale,
        gaussian=gaussian,
        licence=entry["licence"],
        notes=entry["notes"],
    )
