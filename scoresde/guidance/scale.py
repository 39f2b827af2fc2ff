"""Base class and argument checks of guidance; a scale may depend on the sample and on time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from scoresde import _checks as check

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
