"""Rows of a run as one Triton kernel each, where that is possible; :func:`run` adds the terms one by one elsewhere."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from scoresde.noise.keyed import Ahead, Laid, Noise
from scoresde.plan.rows import Line, as_number


@functools.cache
def _kernel() -> ModuleType | str:
    """The module of the kernel, or the reason why it cannot be imported."""
    try:
        return importlib.import_module("scoresde.plan.kernel")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        return 'triton is not installed; pip install "scoresde[triton]"'


def refusal(x: Tensor) -> str:
    """Reason why updates of a state are not fused; empty if they are.

    Arguments:
        x: State, (B, *event).
    """
    if x.dtype != torch.float32:
        return f"the kernel of an update is for float32, and the states are {str(x.dtype)[6:]}"
    kernel = _kernel()
    if isinstance(kernel, str):
        return kernel
    if x.device.type != ("cpu" if kernel.INTERPRETED else "cuda"):
        return f"the kernel of an update needs states on CUDA, and these are on {x.device.type}"
    return ""


class Fused:
    """Sum of a row in one pass over memory, for states of one shape.

    Arguments:
        x: State of the run, (B, *event).
        noise: Source of the normals, as :func:`scoresde.plan.run.normals_of` makes it.
    """

    def __init__(self, x: Tensor, noise: object) -> None:
        self._kernel = _kernel() if not refusal(x) and _is_plain(x) else None
        self._layout = _layout(x)
        source = noise.noise if isinstance(noise, Ahead) else None
        self._keys: tuple[Tensor, ...] | None = None
        if self._kernel is not None and self._layout is not None and isinstance(source, Noise):
            laid = source if isinstance(source, Laid) else Laid(source, len(x), x.device)
            key_low, key_high, low, high = laid.words
            self._keys = (low, high, key_low, key_high)

    def sum_of(self, line: Line, saved: list[Tensor], noise: object, like: Tensor, in_place: bool) -> Tensor | None:
        """Compute the state of a row, or None if this row cannot be fused.

        Arguments:
            line: Row whose weights are floats.
            saved: States and evaluations of the run, by index.
            noise: Source of the normals of the run.
            like: A state of the run.
            in_place: Whether the memory of the first term may hold the result.
        """
        kernel = self._kernel
        if not isinstance(kernel, ModuleType) or self._layout is None:
            return None
        terms = [(saved[k], as_number(w)) for k, w in line.terms]
        draws = [(k, as_number(w)) for k, w in line.draws]
        if draws and self._keys is None:  # a source of the user, or Brownian paths
            terms += [(noise.like(like, k), w) for k, w in draws]  # type: ignore[attr-defined]
            draws = []
        shape, strides = self._layout
        for term, _ in terms:
            fits = term.shape == shape and term.stride() == strides and term.device == like.device
            if not (fits and term.dtype == torch.float32 and _is_plain(term)):
                return None
        out = terms[0][0] if in_place else torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
        one = as_number(line.one)
        kernel.add(out, terms[: kernel.TERMS], one, draws[: kernel.DRAWS], self._keys or ())
        terms, draws = terms[kernel.TERMS :], draws[kernel.DRAWS :]
        while terms or draws:
            some = [(out, 1.0), *terms[: kernel.TERMS - 1]]
            kernel.add(out, some, 0.0, draws[: kernel.DRAWS], self._keys or ())
            terms, draws = terms[kernel.TERMS - 1 :], draws[kernel.DRAWS :]
        return out


def _layout(x: Tensor) -> tuple[torch.Size, tuple[int, ...]] | None:
    """Shape and strides of a state that the kernel can read: contiguous or channels_last; None for others."""
    last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    fits = x.ndim > 0 and x.numel() < (1 << 30) * max(1, len(x)) and (x.is_contiguous() or last)
    return (x.shape, x.stride()) if fits else None


def _is_plain(x: Tensor) -> bool:
    """Whether no derivative and no transform follows the tensor."""
    followed = x.requires_grad and torch.is_grad_enabled()
    return type(x) is Tensor and not followed and forward_ad.unpack_dual(x).tangent is None
