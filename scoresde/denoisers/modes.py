"""What a run should know of its network: whether it is in training mode, and at which times it was not trained."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from numbers import Real

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.network import Denoiser


def check_ready(model: object) -> AbstractDenoiser:
    """Return `model`; raise an error unless it is a denoiser, and warn of what changes its predictions silently.

    These are a network in training mode, and a class-conditional network of this library without a label.

    Arguments:
        model: Denoiser of a run.
    """
    denoiser = check_model(model)
    active = [(name, module) for name, module in denoiser.named_modules() if module.training and _is_active(module)]
    if active:
        name, module = active[0]
        more = f" and {len(active) - 1} more" if len(active) > 1 else ""
        warnings.warn(
            f"the network is in training mode, which changes its predictions: `{name}` is {module!r:.60}{more}; call "
            f"eval() on the network before the run, and train() after it.",
            stacklevel=check.levels_to_user(),
        )
    if "label" not in denoiser.conditions and takes_label(denoiser):
        warnings.warn(
            "the network takes class labels and none is given, so it uses its index of no class, which only condition "
            "dropout trains, as in DSM(model, drop=0.1, null={'label': classes}); fix the classes by "
            "model.given(label=y), or say that you mean no class by model.given(label=torch.tensor(classes)).",
            stacklevel=check.levels_to_user(),
        )
    return denoiser


def warn_untrained(model: AbstractDenoiser, t: float) -> None:
    """Warn if a run evaluates a network clearly below the times of its training, [t_min, T].

    There the network extrapolates. Exact denoisers, such as mixtures, and others without a network are defined at all
    positive times. Times within 10 % of t_min pass: some published grids end there.

    Arguments:
        model: Denoiser of the run.
        t: Smallest positive time at which it is evaluated.
    """
    t_min = model.sde.t_min
    if not 0 < t < 0.9 * t_min or not any(isinstance(module, Denoiser) for module in model.modules()):
        return
    warnings.warn(
        f"the network is evaluated at t = {t:.3g}, below t_min = {t_min:.3g}, and networks are trained on [t_min, T]: "
        f"its predictions there are extrapolations; use a grid whose last positive time is at least t_min, such as "
        f"ss.grids.quadratic_vp, or make the process with a smaller `t_min` if the network was trained there.",
        stacklevel=check.levels_to_user(),
    )


def takes_label(model: AbstractDenoiser) -> bool:
    """Whether a denoiser has a class-conditional network of this library, itself or inside.

    Arguments:
        model: Denoiser.
    """
    return classes_of(model) is not None


def classes_of(model: AbstractDenoiser) -> int | None:
    """Number of classes of a class-conditional network of this library, itself or inside; None for other networks.

    Arguments:
        model: Denoiser.
    """
    found = (_classes(module) for module in model.modules())
    return next((classes for classes in found if classes is not None), None)


def wrong_null(model: AbstractDenoiser, null: Mapping[str, object]) -> int | None:
    """Number of classes if the null value of ``label`` is a number that is no index of no class; else None.

    Arguments:
        model: Denoiser.
        null: Null conditions by name.
    """
    label = null.get("label")
    if isinstance(label, bool) or not isinstance(label, Real):
        return None  # a tensor would have to be read from its device
    classes = classes_of(model)
    return None if classes is None or label == classes else classes


def _classes(module: nn.Module) -> int | None:
    condition = getattr(module.net, "condition", None) if isinstance(module, Denoiser) else None
    embedding = sys.modules.get("scoresde.nn.embedding")  # if it is not loaded, the network is not of this library
    known = embedding is not None and isinstance(condition, embedding.Conditioning)
    classes: int | None = condition.classes if known and condition is not None else None
    return classes


def _is_active(module: nn.Module) -> bool:
    """Whether a module acts differently in training mode."""
    if isinstance(module, _DropoutNd):
        return module.p > 0
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return bool(module.track_running_stats)
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    if isinstance(module, nn.RReLU) or type(module).__name__ == "_SpectralNorm":
        return True
    rate = getattr(module, "drop_prob", None)  # stochastic depth, as in timm
    return isinstance(rate, int | float) and rate > 0
