"""Scales of guidance: numbers, one number for each sample, or functions of time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from scoresde import _checks as check

Scale = float | Tensor | Callable[[float | Tensor], float | Tensor]
"""A number, a tensor (B,), or a function of time that returns either. The time is a number, or has one for each sample;
the function may be written for either, as ``lambda t: 3.0 if 0.2 < t < 0.7 else 1.0`` or with ``torch.where``."""


def scale_at(scale: Scale, t: float | Tensor, x: Tensor, name: str = "scale") -> float | Tensor:
    """Value of a scale at time `t`: a number, or a tensor that broadcasts to the state."""
    value = _at_time(scale, t) if callable(scale) else scale
    if not isinstance(value, Tensor):
        return check.number(name, value)
    if value.ndim > 1:
        raise ValueError(f"`{name}` must be a number or of shape (B,), got shape {tuple(value.shape)}.")
    return check.expand(value[0] if value.shape == (1,) else value, x, name)  # one entry is for all samples


def _at_time(scale: Callable[[float | Tensor], float | Tensor], t: float | Tensor) -> float | Tensor:
    """Value of a function of time that was written for a number or for a tensor, at a time that is either."""
    if not isinstance(t, Tensor):
        try:
            return scale(t)
        except (TypeError, AttributeError):  # written for tensors, as with torch.where or t.clamp
            value = scale(torch.tensor(t, dtype=torch.float64, device="cpu"))
            plain = not isinstance(value, Tensor) or (value.ndim == 0 and value.device.type == "cpu")
            return float(value) if plain and not torch.as_tensor(value).requires_grad else value
    try:
        return scale(t)
    except RuntimeError as error:
        if t.ndim == 0 or "Boolean value of Tensor" not in str(error):
            raise
    # written for a number, as with `3.0 if t < 0.7 else 1.0`: one call for each sample
    values = [torch.as_tensor(scale(s), dtype=torch.float64) for s in t.tolist()]
    return torch.stack([v if v.ndim == 0 else v[i if len(v) > 1 else 0] for i, v in enumerate(values)]).to(t)


def check_scale(scale: object, name: str = "scale") -> Scale:
    """Return `scale`; raise an error unless it is a number, a tensor or a function of t."""
    if isinstance(scale, Tensor) or callable(scale):
        return scale
    check.number(name, scale)
    return scale  # type: ignore[return-value]
