"""Base class and argument checks of guidance; a scale may depend on the sample and on time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser

Scale = float | Tensor | Callable[[Any], Any]


def scale_at(scale: Scale, t: Any, x: Tensor, name: str = "scale") -> Any:
    """Value of a scale at time `t`: a number, or a tensor that broadcasts to the state."""
    value = scale(t) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return check.number(name, value)
    if value.ndim > 1:
        raise ValueError(f"`{name}` must be a number or of shape (B,), got shape {tuple(value.shape)}.")
    return check.expand(value, x, name)


def check_scale(scale: Any, name: str = "scale") -> Scale:
    """Return `scale`; raise an error unless it is a number, a tensor or a function of t."""
    if not isinstance(scale, Tensor) and not callable(scale):
        check.number(name, scale)
    return scale  # type: ignore[no-any-return]


def check_model(model: Any, name: str = "model") -> AbstractDenoiser:
    """Return `model`; raise an error unless it is a denoiser."""
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`{name}` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    return model


def same_process(model: AbstractDenoiser, other: AbstractDenoiser, name: str) -> None:
    """Raise an error if `other` is on another process than `model`."""
    if repr(model.sde) != repr(other.sde):
        raise ValueError(
            f"`{name}` is on {other.sde!r} and the model is on {model.sde!r}; use ss.Rescheduled({name}, model.sde) to "
            f"put both on the same process."
        )


class Wrapped(AbstractDenoiser):
    """Base class of a denoiser that changes the prediction of another one."""

    def __init__(self, model: AbstractDenoiser) -> None:
        super().__init__()
        self.model = check_model(model)
        self.sde = model.sde
