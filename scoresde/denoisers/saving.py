"""A denoiser as a folder that can be shared: weights in safetensors, everything else in JSON; nothing is pickled.

**The format**, ``"scoresde model 1"``. The folder has up to four files:

* ``model.safetensors``: the weights of the network, ``net.state_dict()`` under its own names and in its own dtypes.
* ``scoresde.json``: how to build the network, the process, the prediction, the network's time and the card, as one
  dictionary. ``files`` has the SHA-256 of each other file, and ``sha256`` that of the dictionary itself.
* ``extras.safetensors``: tensors of the card's scale and Gaussian, if there are any.
* ``plan.json``: the card's plan, if there is one.

A new folder is written under a temporary name and then renamed, so it is complete or does not exist. In a folder that
exists, files are replaced one by one, ``scoresde.json`` last; a reader detects a half-replaced folder by the checksums.
The checksums detect damage. They are no signature: anyone who can write the folder can write new ones.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from scoresde import _build, _files
from scoresde.denoisers import clocks
from scoresde.denoisers.card import Card
from scoresde.denoisers.network import Denoiser
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE

FORMAT = "scoresde model 1"
MANIFEST, WEIGHTS, EXTRAS, PLAN = "scoresde.json", "model.safetensors", "extras.safetensors", "plan.json"
FILES = (MANIFEST, WEIGHTS, EXTRAS, PLAN)
"""Names of the files of a saved model."""

OPERATORS = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "truediv": operator.truediv}
"""Operators of a network's time that is a ``partial`` of one of them, such as ``partial(mul, 999)``."""


def save_model(
    model: Denoiser,
    folder: str | os.PathLike[str],
    *,
    card: Card | None = None,
    build: _build.Build | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a denoiser to a folder; the function behind :meth:`Denoiser.save`.

    Arguments:
        model: Denoiser, a network with its process.
        folder: Path of the folder.
        card: Facts that a user of the weights needs beside them.
        build: Import path and arguments of the network's class.
        overwrite: Whether to replace the files in a folder that is not empty.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not overwrite)):
        raise FileExistsError(
            f"`folder` {path} exists and is not an empty folder; give `overwrite`=True to replace it."
        )
    files = contents(model, card=card, build=build)
    if path.is_dir() and any(path.iterdir()):
        _files.remove_torn(path)
        for name in set(FILES) - set(files):
            (path / name).unlink(missing_ok=True)
        for name in sorted(files, key=MANIFEST.__eq__):
            _files.write(path / name, files[name])
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        fresh.mkdir()
        for name, data in files.items():
            _files.write(fresh / name, data)
        os.replace(fresh, path)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return path


def contents(model: Denoiser, *, card: Card | None = None, build: _build.Build | None = None) -> dict[str, bytes]:
    """The files of a saved model, by name.

    Arguments:
        model: Denoiser, a network with its process.
        card: Facts that a user of the weights needs beside them; by default ``model.card``.
        build: Import path and arguments of the network's class; by default as recorded.
    """
    from safetensors.torch import save

    if type(model) is not Denoiser:
        raise TypeError(
            f"only a Denoiser can be saved, got {type(model).__name__}, whose code a folder cannot hold; save the "
            f"Denoiser inside, and make the {type(model).__name__} again after ss.load."
        )
    card = card or model.card or Card()
    net = _bare(model.net)
    described, extras, plan = _describe_card(card, model, net)
    files = {WEIGHTS: save(_tensors(net), {"format": "pt"})}
    if extras:
        files[EXTRAS] = save(extras, {"format": "pt"})
    if plan is not None:
        files[PLAN] = plan.encode()
    body: dict[str, object] = {
        "format": FORMAT,
        "network": _build.check_build(build) if build is not None else _build.describe(net) or _unknown(net),
        "process": _describe_process(model.sde),
        "predicts": model.predicts,
        "precondition": model.precondition and {"sigma_data": float(model.precondition.sigma_data)},
        "time": _describe_clock(model),
        "learned_variance": model.learned_variance,
        "check_finite": bool(model.check_finite),
        "shared": list(model.shared),
        "card": described,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    manifest = {**body, "sha256": digest(body)}
    files[MANIFEST] = (json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
    return files


def digest(body: Mapping[str, object]) -> str:
    """SHA-256 of a dictionary of JSON values.

    Arguments:
        body: Dictionary.
    """
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return _files.digest(text)


def probes(sde: SDE) -> list[float]:
    """Times at which functions that a folder cannot hold are compared.

    Arguments:
        sde: Process.
    """
    return [sde.t_min, *(sde.T * k / 7 for k in range(1, 7)), sde.T]


def _bare(net: object) -> nn.Module:
    """The network out of ``DistributedDataParallel`` and ``torch.compile``."""
    while isinstance(net, nn.parallel.DistributedDataParallel | nn.parallel.DataParallel):
        net = net.module
    net = getattr(net, "_orig_mod", net)
    if not isinstance(net, nn.Module):
        raise TypeError(
            f"`net` must be a module to be saved, got the function {getattr(net, '__name__', type(net).__name__)}, "
            f"whose weights no file can hold; write it as a torch.nn.Module."
        )
    if "_built_with" in vars(net) and callable(inside := getattr(net, "net", None)):
        _bare(inside)  # that of an adapter
    return net


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    state = net.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the network's state has a {type(value).__name__} at {name!r}; only tensors can be saved.")
        if value.device.type == "meta":
            raise ValueError(f"the network's tensor {name!r} is on the device meta, where it has no values.")
    # A copy of each: tensors that share memory cannot be written as they are. A network inside may be compiled.
    return {
        name.replace("_orig_mod.", ""): value.detach().to("cpu", copy=True).contiguous()
        for name, value in state.items()
    }


def _unknown(net: nn.Module) -> dict[str, object]:
    """A network whose arguments are not known; the one who loads it gives it."""
    return {"class": _build.path_of(type(net))}


def _describe_process(sde: SDE) -> dict[str, object]:
    try:
        return sde.to_dict()
    except TypeError:
        values = [[t, sde.alpha(t), sde.sigma(t)] for t in probes(sde)]
        return {"given": repr(sde), "T": float(sde.T), "t_min": float(sde.t_min), "values": values}


def _describe_clock(model: Denoiser) -> object:
    time = model.time
    if time is None or isinstance(time, str):
        return time
    if isinstance(time, functools.partial) and not time.keywords and len(time.args) == 1:
        names = [name for name, function in OPERATORS.items() if function is time.func]
        if names and isinstance(time.args[0], int | float) and not isinstance(time.args[0], bool):
            return {"operator": names[0], "number": time.args[0]}
    if (written := clocks.to_dict(time)) is not None:
        return written
    t = torch.tensor(probes(model.sde), dtype=torch.float64)
    labels = torch.as_tensor(time(t)).detach().double().expand(t.shape)
    return {"given": getattr(time, "__name__", type(time).__name__), "values": labels.tolist()}


def _describe_card(
    card: Card, model: Denoiser, net: nn.Module
) -> tuple[dict[str, object], dict[str, Tensor], str | None]:
    """The card as JSON, its tensors, and the text of its plan."""
    if not isinstance(card, Card):
        raise TypeError(f"`card` must be a Card, got {type(card).__name__}.")
    tensors: dict[str, Tensor] = {}
    plan = card.solver.to_json() if isinstance(card.solver, Plan) else None
    if isinstance(card.solver, Plan) and card.solver.sde != repr(model.sde):
        raise ValueError(f"`card` has a plan for {card.solver.sde}, and the model is on {model.sde!r}.")
    scale = gaussian = None
    if card.scale is not None:
        tensors |= {"scale.mean": card.scale.mean, "scale.std": card.scale.std}
        scale = {"target": float(card.scale.target)}
    if card.gaussian is not None:
        if card.gaussian.sde != model.sde:
            raise ValueError(f"`card` has a Gaussian on {card.gaussian.sde!r}, and the model is on {model.sde!r}.")
        mean, spectrum, axes, rest = card.gaussian.arguments
        matrices = [axes] if isinstance(axes, Tensor) else axes or []
        tensors |= {"gaussian.mean": mean, "gaussian.spectrum": spectrum}
        tensors |= {f"gaussian.axes.{i}": matrix for i, matrix in enumerate(matrices)}
        gaussian = {"axes": len(matrices), "separable": not isinstance(axes, Tensor), "rest": rest}
    solver = None if card.solver is None else {"plan": PLAN} if plan is not None else dict(card.solver.to_dict())
    described: dict[str, object] = {
        "solver": solver,
        "nfe": card.nfe,
        "event": None if card.event is None else list(card.event),
        "conditions": list(_build.conditions(net) if card.conditions is None else card.conditions),
        "scale": scale,
        "gaussian": gaussian,
        "licence": card.licence,
        "notes": card.notes,
    }
    return described, {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, plan
