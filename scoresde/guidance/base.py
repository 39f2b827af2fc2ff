"""What all guidance shares: denoisers made from one other, and scales that may depend on sample and time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser

Scale = float | Tensor | Callable[[Any], Any]


def scale_at(scale: Scale, t: Any, x: Tensor, name: str = "scale") -> Any:
    """A number, or a tensor that multiplies the state."""
    value = scale(t) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return check.number(name, value)
    if value.ndim > 1:
        raise ValueError(f"`{name}` must be a number or of shape (B,), got shape {tuple(value.shape)}.")
    return check.expand(value, x, name)


def check_scale(scale: Any, name: str = "scale") -> Scale:
    """A scale as it was given, if it is one."""
    if not isinstance(scale, Tensor) and not callable(scale):
        check.number(name, scale)
    return scale  # type: ignore[no-any-return]


def check_model(model: Any, name: str = "model") -> AbstractDenoiser:
    """The model, if it is a denoiser."""
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`{name}` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    return model


def same_process(model: AbstractDenoiser, other: AbstractDenoiser, name: str) -> None:
    """Refuse a model on another process."""
    if repr(model.sde) != repr(other.sde):
        raise ValueError(
            f"`{name}` is on {other.sde!r} and the model on {model.sde!r}; ss.Rescheduled({name}, model.sde) puts it "
            f"on the same process."
        )


class Wrapped(AbstractDenoiser):
    """A denoiser made from one other."""

    def __init__(self, model: AbstractDenoiser) -> None:
        super().__init__()
        self.model = check_model(model)
        self.sde = model.sde
