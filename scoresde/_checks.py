"""Checks of arguments: types, shapes, dtypes and ranges.

Errors name the argument, the value, what is allowed and the fix. The values of arguments are checked only on the CPU: a
check on another device would synchronise. Results are checked once, at the end of a run, on any device.
"""

from __future__ import annotations

import difflib
import inspect
import math
import sys
import warnings
from collections.abc import Iterable, Mapping
from numbers import Real

import numpy as np
import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)

OUTSIDE = 1e-6  # tolerance for a time outside [0, T], relative to T: float32 rounding


def number(
    name: str,
    value: object,
    *,
    above: float = -math.inf,
    below: float = math.inf,
    at_least: float = -math.inf,
    at_most: float = math.inf,
) -> float:
    """Return `value` as a finite float inside (above, below) and [at_least, at_most]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        got = f"{value!r} ({type(value).__name__})" if isinstance(value, str | bool) else type(value).__name__
        raise TypeError(f"`{name}` must be a number, got {got}.")
    out = float(value)
    bounds = {"above": above, "below": below, "at least": at_least, "at most": at_most}
    if not (math.isfinite(out) and above < out < below and at_least <= out <= at_most):
        allowed = " and ".join(f"{word} {b:g}" for word, b in bounds.items() if math.isfinite(b))
        raise ValueError(f"`{name}` must be {('finite and ' + allowed) if allowed else 'finite'}, got {value}.")
    return out


def is_integer(value: object) -> bool:
    """Whether `value` is an integer of Python, of NumPy, or a tensor with one; a bool is none."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or isinstance(value, type):
        return False
    if isinstance(value, Tensor):
        return not (value.ndim or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
    return not (isinstance(value, np.ndarray) and value.ndim)


def integer(name: str, value: object, *, at_least: int = 0) -> int:
    """Return `value` as an int of at least `at_least`; reject floats and booleans."""
    if not is_integer(value):
        if isinstance(value, Tensor):
            kind = f"{str(value.dtype)[6:]} tensor of shape {tuple(value.shape)}"
            raise TypeError(f"`{name}` must be an integer, got a {kind}; pass a single int.")
        raise TypeError(f"`{name}` must be an integer, got {value!r} ({type(value).__name__}).")
    out = int(value.__index__())  # type: ignore[attr-defined]
    if out < at_least:
        raise ValueError(f"`{name}` must be at least {at_least}, got {out}.")
    return out


def choice(name: str, value: object, allowed: tuple[str, ...], elsewhere: Mapping[str, str] | None = None) -> str:
    """Return `value` if it is one of `allowed`; `elsewhere` has our words for those of other libraries."""
    if value not in allowed:
        ours = (elsewhere or {}).get(str(value))
        near = [ours] if ours else difflib.get_close_matches(str(value), allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}{hint}")
    return str(value)


def gradient_mode(grad: object, allowed: tuple[str, ...]) -> str:
    """Return the gradient mode `grad`; raise an error if inference mode would drop the gradient."""
    mode = choice("grad", grad, allowed)
    if mode != "off" and torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"`grad`={mode!r} records a gradient, which torch.inference_mode() drops; leave this context, or give "
            f"`grad`='off', which records nothing without it."
        )
    return mode


def dtype(name: str, value: object) -> torch.dtype:
    """Return `value` if it is float32 or float64."""
    if not isinstance(value, torch.dtype) or value not in FLOATS:
        hint = f"write torch.{value}" if isinstance(value, str) else "draw, then cast"
        raise TypeError(f"`{name}` must be torch.float32 or torch.float64, got {value!r}; {hint}.")
    return value


def device(name: str, value: object) -> torch.device:
    """Return a device, from a device or its name."""
    if isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)  # type: ignore[call-overload, no-any-return]
    except (RuntimeError, TypeError):
        got = f"{value!r} ({type(value).__name__})" if isinstance(value, str | Real) else type(value).__name__
        raise ValueError(f"`{name}` must be a device such as 'cpu' or 'cuda:0', got {got}.") from None


def timelike(name: str, value: object) -> None:
    """Raise an error unless `value` is a number or a tensor; for the loop, where :func:`time` is called later."""
    if not isinstance(value, float | Tensor | Real):
        raise TypeError(
            f"`{name}` must be a number or a tensor of shape () or (B,), got {type(value).__name__}"
            f"{of_array(name, value)}."
        )


def of_array(name: str, value: object, *, indices: bool = False) -> str:
    """The fix, for an error, of an array or a list where a tensor is needed; empty for other values."""
    if not isinstance(value, (np.ndarray, list, tuple)):  # a union of types is not traced by torch.compile
        return ""
    if indices:
        return f"; use torch.as_tensor({name})"
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.ndim > 2:
        return f"; {of_bytes(f'torch.from_numpy({name})', value.shape)}"
    return f"; use torch.as_tensor({name}, dtype=torch.float32)"


def of_bytes(name: str, size: tuple[int, ...]) -> str:
    """The fix, for an error, of bytes where floats are needed; they are images in most cases.

    Arguments:
        name: Expression that is a tensor of these bytes.
        size: Shape of the tensor.
    """
    order = channels_first(name, size, (1, 3))
    return f"use {name}.float(), or {name} / 127.5 - 1 for images with values 0 … 255{order}"


def channels_first(name: str, size: tuple[int, ...], channels: tuple[int, ...]) -> str:
    """The fix, for an error, of images (B, H, W, C) or other data whose channels are the last axis; else empty.

    Arguments:
        name: Name of the data.
        size: Shape of the data.
        channels: Numbers of channels that the data may have.
    """
    n = len(size)
    if n < 3 or size[-1] not in channels or size[1] in channels:
        return ""
    return f"; channels come first: {name}.permute({', '.join(map(str, (0, n - 1, *range(1, n - 1))))})"


def shape(name: str, value: object) -> tuple[int, ...]:
    """Return a shape (B, *event) as a tuple of integers."""
    if isinstance(value, np.ndarray) and (value.ndim != 1 or value.dtype.kind not in "iu"):
        raise TypeError(
            f"`{name}` must be a state, a torch.Tensor, or a shape (B, *event), got a NumPy array of shape "
            f"{value.shape}{of_array(name, value)}."
        )
    if not isinstance(value, Iterable) or isinstance(value, str) or not len(out := tuple(value)):
        raise ValueError(f"`{name}` must be a state or a shape (B, *event), got {value!r}.")
    return tuple(integer("shape", n) for n in out)


def state(name: str, x: object) -> Tensor:
    """Check a state (B, *event) of float32 or float64 and return it."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"`{name}` must be a torch.Tensor of shape (B, *event), got {type(x).__name__}{of_array(name, x)}."
        )
    if x.dtype not in FLOATS:
        if x.is_complex():
            fix = f"use torch.view_as_real(`{name}`), which has the real and imaginary parts as a last axis"
        elif not x.is_floating_point():
            fix = of_bytes(f"`{name}`", tuple(x.shape))
        else:
            fix = f"use `{name}`.float(); the input of a network in half precision is cast automatically"
        raise TypeError(f"`{name}` must be float32 or float64, got {str(x.dtype)[6:]}: {fix}.")
    if x.ndim == 0:
        raise ValueError(f"`{name}` must have shape (B, *event), got a scalar tensor; use `{name}`[None].")
    return x


def looks_like_images(x: Tensor) -> bool:
    """Whether data are images (N, 1 or 3, H, W) with values from −1 to 1, within 1 %."""
    low, high = _range_of_images(x)
    return -1.01 <= low < -0.5 and high <= 1.01


def unscaled_images(x: Tensor) -> str:
    """What images (N, 1 or 3, H, W) on 0 … 1 or on 0 … 255 look like, and the fix; else empty."""
    low, high = _range_of_images(x)
    for last, least, fix in ((1, 0.0, "2 * x - 1"), (255, 32.0, "x / 127.5 - 1")):
        if 0 <= low < high and least < high <= 1.01 * last:
            return f"looks like images on 0 … {last}: use {fix}, which has values from −1 to 1"
    return ""


def _range_of_images(x: Tensor) -> tuple[float, float]:
    """Smallest and largest value of images (N, 1 or 3, H, W), where H and W are at least 4; NaN for other data."""
    if x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 4 or not len(x) or not x.is_floating_point():
        return math.nan, math.nan
    return float(x.min()), float(x.max())


def match(name: str, x: object, other: str, like: Tensor) -> Tensor:
    """Check that the state `x` has the shape and device of `like` and return it."""
    x = state(name, x)
    if x.shape != like.shape:
        raise ValueError(
            f"`{name}` must have the shape of `{other}`, {tuple(like.shape)}, got {tuple(x.shape)}; "
            f"states do not broadcast."
        )
    if x.device != like.device:
        raise ValueError(f"`{name}` is on {x.device} and `{other}` on {like.device}; move one of them.")
    return x


def real(name: str, value: object) -> Tensor:
    """Return a float, a scalar tensor or a (B,) tensor as a tensor; plain numbers become float64 on the CPU."""
    if isinstance(value, Tensor):
        if value.dtype not in FLOATS:
            fix = (
                f"half precision rounds 0.998 to 1: use `{name}`.float()"
                if value.is_floating_point()
                else "an index is not a time: use `Discrete.t_of_index`"
            )
            raise TypeError(f"`{name}` must be float32 or float64, got {str(value.dtype)[6:]} ({fix}).")
        if value.ndim > 1:
            raise ValueError(
                f"`{name}` must be a number, a scalar tensor or of shape (B,), got shape {tuple(value.shape)}."
            )
        return value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"`{name}` must be a number or a tensor of shape () or (B,), got {type(value).__name__}"
            f"{of_array(name, value)}."
        )
    return torch.tensor(float(value), dtype=torch.float64)


def time(t: object, T: float, name: str = "t") -> Tensor:
    """Return a time as a tensor in [0, T]; clamp rounding errors at the ends."""
    slack = OUTSIDE * T
    if isinstance(t, float):  # fast path: no comparison of tensors
        if not -slack <= t <= T + slack:
            raise _outside(name, t, T)
        return torch.tensor(min(max(t, 0.0), T), dtype=torch.float64)
    out = real(name, t)
    if out.device.type == "cpu" and not torch.compiler.is_compiling():
        inside = (out >= -slack) & (out <= T + slack)
        if not bool(inside.all()):
            raise _outside(name, out.detach().reshape(-1)[~inside.reshape(-1)][0].item(), T)
    return out.clamp(0.0, T)


def window(T: float, t_start: object, t_end: object) -> None:
    """Raise an error unless both ends of a run are numbers in [0, T], or None."""
    for name, value in (("t_start", t_start), ("t_end", t_end)):
        if value is not None and not isinstance(value, Tensor):
            number(name, value, at_least=0, at_most=T * (1 + OUTSIDE))


def _outside(name: str, bad: float, T: float) -> ValueError:
    return ValueError(
        f"`{name}` must lie in [0, {T:g}] (0 is data, {T:g} is noise), got {bad:g}; "
        f"for later times, make the process with a larger `T`."
    )


def expand(c: float | Tensor, x: Tensor, name: str = "t") -> float | Tensor:
    """Reshape a coefficient, a number, () or (B,), to broadcast with a state (B, *event); (1, *event) does already."""
    if not isinstance(c, Tensor):
        return c
    if c.ndim == 0:
        return c.to(x.dtype) if c.device == x.device else c.to(x)
    if c.ndim > 1 and c.shape == (1, *x.shape[1:]):
        return c.to(x)
    if c.shape[0] != x.shape[0]:
        raise ValueError(
            f"`{name}` has {c.shape[0]} entries and the state has {x.shape[0]} rows; "
            f"give one number, or one entry for each row."
        )
    if c.device != x.device:
        raise ValueError(f"`{name}` is on {c.device} and the state on {x.device}; move `{name}` with .to(x.device).")
    return c.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1))


def levels_to_user() -> int:
    """Number of calls from the caller of this function to the first one outside the package, for warnings."""
    frame, level = inspect.currentframe(), 0
    package = __name__.partition(".")[0]
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, level = frame.f_back, level + 1
    return max(level, 1)


def writes(x: Tensor) -> int:
    """Number of writes into the memory of `x`; −1 where torch does not count them: inference mode and compilation."""
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


def protected(x: Tensor) -> Tensor:
    """A copy of a tensor whose writes are not counted, in inference mode; otherwise `x` itself."""
    return x.clone() if not torch.compiler.is_compiling() and x.is_inference() else x


def refuse_writes(x: Tensor, before: int, who: str, function: object, *, what: str = "state", copy: str = "x") -> None:
    """Raise an error if a function wrote into `x`; the counter of the tensor tells, without a look at its values.

    Arguments:
        x: Tensor that the function received.
        before: Result of :func:`writes` before the call.
        who: Role of the function.
        function: The function, or None.
        what: Name of the tensor.
        copy: The tensor in the words of the function.
    """
    if before < 0 or writes(x) == before:
        return
    name = who if function is None else f"{who} {getattr(function, '__name__', type(function).__name__)}"
    raise RuntimeError(
        f"{name} wrote into the {what} that it received, which changes the samples and the caller's own tensor; write "
        f"into a copy, {copy}.clone(), or use operations that return new tensors, such as x * 2 for x.mul_(2)."
    )


class Finite:
    """Record of which samples have finite results, written without waiting for the device and read once, at the end.

    Arguments:
        what: Name of the results, such as "the samples".
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._bad: list[Tensor] = []
        self._times: list[float | Tensor | None] = []

    def add(self, values: Tensor, t: float | Tensor | None = None) -> None:
        """Record results of all samples.

        Arguments:
            values: Results, (B, ...).
            t: Time at which they were computed, a number, () or (B,); None if it is not known.
        """
        if values.device.type != "meta" and not torch.compiler.is_compiling():
            bad = ~values.detach().isfinite()
            self._bad.append(bad.reshape(len(bad), -1).any(1) if len(bad) else bad.reshape(0))
            self._times.append(t)

    def problem(self) -> str | None:
        """Description of the first sample that is not finite, with the first time of that; None if all are finite."""
        if not self._bad or (self._bad[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            return None
        bad = torch.stack(self._bad)
        if not bool(bad.any()):
            return None
        row = int(bad.any(0).nonzero()[0, 0])
        t = self._times[int(bad[:, row].nonzero()[0, 0])]
        if isinstance(t, Tensor):
            t = float(t[row] if t.ndim else t)
        found = f"{self.what} are not all finite: {int(bad.any(0).sum())} of {bad.shape[1]}, the first is sample {row}"
        if t is None:
            return f"{found}; Denoiser(..., check_finite=True) or a callback gives the time."
        return f"{found}, at t = {t:g}; evaluate the model there, and check its input and weights."

    def warn(self) -> None:
        """Warn, in the name of the caller outside this library, if a result is not finite."""
        problem = self.problem()
        if problem is not None:
            level, frame = 1, sys._getframe()
            while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "scoresde":
                level, frame = level + 1, frame.f_back
            warnings.warn(problem, stacklevel=level)

    def require(self) -> None:
        """Raise an error if a result is not finite."""
        problem = self.problem()
        if problem is not None:
            raise ValueError(problem)


def warn_unless_finite(x: Tensor, what: str = "the samples") -> None:
    """Warn if results of samples are not finite.

    Arguments:
        x: Results, (B, ...).
        what: Name of the results.
    """
    finite = Finite(what)
    finite.add(x)
    finite.warn()
