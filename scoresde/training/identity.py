"""Identity of a run: the settings that must be equal when it resumes, and how they differ."""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.training import fingerprint
from scoresde.training.describe import describe
from scoresde.training.ema import EMA, PowerEMA
from scoresde.training.losses import DSM
from scoresde.training.sharding import State

if TYPE_CHECKING:
    from scoresde.training.trainer import Trainer

_IMPLEMENTATION = {"params", "param_names", "lr", "initial_lr", "foreach", "fused", "capturable", "differentiable"}


def loss_identity(loss: nn.Module) -> State:
    """Settings of a loss and its network, by name; sharding changes the names of classes, so call this before.

    Arguments:
        loss: Loss with its network.
    """
    text = describe(loss) if isinstance(loss, DSM) else type(loss).__name__
    return {
        "network": fingerprint.of_network(loss),
        "loss": re.sub(r"<\w+, [\d,]+ parameters>", "<network>", text),
        "loss.weights": fingerprint.of_weighting(loss),
    }


def identity(trainer: Trainer, loss: State, data: str) -> State:
    """Settings of a run by name: numbers, texts and lists of them.

    Arguments:
        trainer: Trainer of the run.
        loss: Output of :func:`loss_identity`.
        data: Fingerprint of the data.
    """
    model, update, ema = trainer.model, trainer.update, trainer.ema
    return {
        "seed": trainer.order.seed,
        "batch": trainer.order.batch,
        "samples": trainer.order.n,
        "data": data,
        "processes": trainer.world,
        "precision": str(trainer.accelerator.mixed_precision),
        "process": repr(getattr(model, "sde", None)),
        "predicts": str(getattr(model, "predicts", None)),
        **loss,
        "average": type(ema).__name__,
        "ema.decay": ema.decay if isinstance(ema, EMA) else None,
        "ema.warmup": ema.warmup if isinstance(ema, EMA) else None,
        "ema.stds": list(ema.stds) if isinstance(ema, PowerEMA) else None,
        "update.warmup": update.warmup,
        "update.schedule": fingerprint.of_schedule(update.schedule),
        "update.clip": update.clip,
        "update.accumulate": update.accumulate,
        "update.nonfinite": update.nonfinite,
        "optimiser": type(trainer.optimiser.optimizer).__name__,
        "optimiser.lr": list(trainer.rates),
        **_options(trainer.optimiser.param_groups),
    }


def _options(groups: list[State]) -> State:
    names = sorted({name for group in groups for name in group} - _IMPLEMENTATION)
    return {f"optimiser.{name}": [_plain(group.get(name)) for group in groups] for name in names}


def _plain(value: object) -> object:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else describe(value)


def differences(mine: State, theirs: State, changes: Collection[str] = ()) -> set[str]:
    """Return the names of the settings that differ; raise an error for those that may not.

    Arguments:
        mine: Settings of this trainer.
        theirs: Settings in a checkpoint.
        changes: Names of settings that may differ; ``"update"`` stands for all ``"update.…"``.
    """
    names = dict.fromkeys((*mine, *theirs))
    if isinstance(changes, str):
        raise TypeError(f"`changes` must be a list of names, got the text {changes!r}; write changes=[{changes!r}].")
    known = {*names, *(name.partition(".")[0] for name in names)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"`changes` has {', '.join(map(repr, unknown))}; the settings are {', '.join(sorted(known))}.")
    if "network" not in theirs:  # of version 0.1.0
        unchecked = sorted(set(mine) - set(theirs))
        names = {name: None for name in names if name in theirs}
        warnings.warn(
            f"the checkpoint is of an earlier version, which did not store {', '.join(unchecked)}; make sure that they "
            f"are as before.",
            stacklevel=check.levels_to_user(),
        )
    # Versions of torch add options to optimisers.
    both = [name for name in names if not name.startswith("optimiser.") or (name in mine and name in theirs)]
    changed = {name for name in both if not _equal(mine.get(name), theirs.get(name))}
    if "data" in changed and _same_kind(str(mine["data"]), str(theirs["data"])):
        changed.remove("data")
    refused = [name for name in names if name in changed and not {name, name.partition(".")[0]} & set(changes)]
    if refused:
        settings = ", ".join(_difference(name, theirs.get(name), mine.get(name)) for name in refused)
        raise ValueError(
            f"the checkpoint is of another run, with {settings}; give the trainer the same settings, or go on with the "
            f"new ones on purpose with trainer.resume(changes={refused!r})."
        )
    return changed


def _equal(a: object, b: object) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):  # other machines round differently
        return a == b or math.isclose(a, b, rel_tol=1e-6) or (math.isnan(a) and math.isnan(b))
    return a == b


def _same_kind(mine: str, theirs: str) -> bool:
    """Whether two fingerprints have the same type, and only one has more: samples loaded by workers are not read."""
    a, b = mine.split(" "), theirs.split(" ")
    return a[0] == b[0] and len(a) != len(b)


def _difference(name: str, theirs: object, mine: object) -> str:
    if isinstance(theirs, list) and isinstance(mine, list):
        pairs = itertools.zip_longest(theirs, mine, fillvalue="nothing")
        theirs, mine = next((a, b) for a, b in pairs if not _equal(a, b))
    theirs, mine = (f"[{a[0]}, …]" if isinstance(a, list) and len(a) > 4 else a for a in (theirs, mine))
    return f"{name} {theirs} (here {mine})"


def keep_own_options(groups: list[State], own: Sequence[Mapping[str, object]], changed: set[str]) -> None:
    """Give an optimiser that was loaded its own options back where they were changed on purpose.

    Arguments:
        groups: Groups of parameters of the optimiser.
        own: Options of each group before loading.
        changed: Names of the settings that differ.
    """
    for group, options in zip(groups, own, strict=True):
        group.update({name: value for name, value in options.items() if f"optimiser.{name}" in changed})
