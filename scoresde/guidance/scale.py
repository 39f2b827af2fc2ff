"""Scales of guidance: numbers, one number for each sample, or functions of time."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from scoresde import _checks as check

Scale = float | Tensor | Callable[[float | Tensor], float | Tensor]
"""A number, a tensor (B,), or a function of time that returns either."""


def scale_at(scale: Scale, t: float | Tensor, x: Tensor, name: str = "scale") -> float | Tensor:
    """Value of a scale at time `t`: a number, or a tensor that broadcasts to the state."""
    value = scale(t) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return check.number(name, value)
    if value.ndim > 1:
        raise ValueError(f"`{name}` must be a number or of shape (B,), got shape {tuple(value.shape)}.")
    return check.expand(value[0] if value.shape == (1,) else value, x, name)  # one entry is for all samples


def check_scale(scale: object, name: str = "scale") -> Scale:
    """Return `scale`; raise an error unless it is a number, a tensor or a function of t."""
    if isinstance(scale, Tensor) or callable(scale):
        return scale
    check.number(name, scale)
    return scale  # type: ignore[return-value]
