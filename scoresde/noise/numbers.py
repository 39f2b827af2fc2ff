r"""Uniform and normal numbers from the words of Philox, for rows that each have a key and an index.

Four numbers belong to each counter. Box–Muller takes u from words (1, 0) and φ from words (3, 2). u is rounded to
float32 in both precisions, as on a GPU: two numbers in 10⁷ have a radius below 0.001, where its digits would be lost.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from scoresde.noise.philox import MASK, Four, Words, philox, words

BLOCK = 1 << 15  # counters per call on a CPU: 1.5 MB of words, whose memory the allocator keeps

DEVICE_BLOCK = 1 << 22  # counters per call on other devices: a working set of a few hundred MB

TURN = 2 * math.pi * 2.0**-32  # an angle for each signed word

CELL = 2.0**-32

TOP = 1.0 - 2.0**-24  # largest float32 below 1

_F32, _SIGNED, _UNSIGNED = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.uint32)
_PAIR32, _PAIR64 = np.dtype(np.uint64), np.dtype(np.complex128)
_HALF, _CELL, _MINUS_TWO, _TURN, _TOP = (np.float32(v) for v in (0.5, CELL, -2.0, TURN, TOP))

Array = npt.NDArray[Any]  # of float32 or float64, or of pairs of them

Pair = tuple[Array, Array]


class HostRows(NamedTuple):
    """Draw, index and key of each row, in 32-bit words.

    Arguments:
        draw: Number of the draw, (R, 1) or (1, 1).
        sample: Index of the sample, lower half first, (2, R, 1).
        key: Seed, lower half first, (2, R, 1) or (2, 1, 1).
    """

    draw: Words
    sample: Words
    key: Words

    def part(self, rows: slice) -> HostRows:
        """Some of the rows."""
        draw = self.draw if len(self.draw) == 1 else self.draw[rows]
        key = self.key if self.key.shape[1] == 1 else self.key[:, rows]
        return HostRows(draw, self.sample[:, rows], key)


def on_host(rows: HostRows, n: int, dtype: torch.dtype, *, normal: bool) -> Tensor:
    """Compute n numbers of each row on the CPU, (R, n).

    Arguments:
        rows: Draw, index and key of each row.
        n: Numbers of a row.
        dtype: Dtype of the result.
        normal: Whether the numbers are normal or uniform.
    """
    size, blocks = rows.sample.shape[1], -(-n // 4)
    out = torch.empty((size, n), dtype=dtype, device="cpu")
    if out.numel() == 0:
        return out
    target = out.numpy()
    width = min(blocks, BLOCK)
    height = max(1, BLOCK // width)
    scratch = np.empty(6 * width * min(height, size), np.uint64)  # new memory in every turn would cost page faults
    for r in range(0, size, height):
        part = slice(r, min(r + height, size))
        some = rows.part(part)
        for b in range(0, blocks, width):
            block = np.arange(b, min(b + width, blocks), dtype=np.uint64)[None]
            packed, into = words(block, *some, scratch), target[part, 4 * b : 4 * (b + width)]
            if into.shape[1] == 4 * block.shape[1]:
                numbers_of(packed, dtype, normal=normal, out=into)
            else:
                into[...] = numbers_of(packed, dtype, normal=normal)[:, : into.shape[1]]
    return out


def numbers_of(packed: Words, dtype: torch.dtype, *, normal: bool, out: Array | None = None) -> Array:
    """Compute the numbers of packed words, (2, R, N), as an array (R, 4 N), which may be given."""
    double = dtype == torch.float64
    first, second = _normals(packed, double=double) if normal else _uniforms(packed, double=double)
    pair = _PAIR64 if double else _PAIR32  # two numbers at a time
    pairs = np.empty((packed.shape[1], 2 * packed.shape[2]), pair) if out is None else out.view(pair)
    pairs[:, 0::2], pairs[:, 1::2] = first.view(pair), second.view(pair)
    return pairs.view(first.dtype) if out is None else out


def _normals(packed: Words, *, double: bool) -> Pair:
    radius = packed[0].view(_UNSIGNED).astype(_F32)
    radius += _HALF
    radius *= _CELL
    if double:  # torch is faster than NumPy in float64
        return _precise(torch.from_numpy(radius).double(), torch.from_numpy(packed[1].view(_SIGNED)).double())
    np.log(radius, out=radius)
    radius *= _MINUS_TWO
    np.sqrt(radius, out=radius)
    angle = packed[1].view(_SIGNED).astype(_F32)
    angle *= _TURN
    sine = np.sin(angle)
    np.cos(angle, out=angle)
    angle *= radius
    sine *= radius
    return angle, sine


def _precise(u: Tensor, angle: Tensor) -> Pair:
    radius = u.log_().mul_(-2).sqrt_()
    angle = angle.mul_(TURN)
    sine = angle.sin().mul_(radius)
    return angle.cos_().mul_(radius).numpy(), sine.numpy()


def _uniforms(packed: Words, *, double: bool) -> Pair:
    if double:
        fine = packed.view(_UNSIGNED).astype(np.float64)
        fine += 0.5
        fine *= CELL
        return fine[0], fine[1]
    u = packed.view(_UNSIGNED).astype(np.float32)
    u += _HALF
    u *= _CELL
    np.minimum(u, _TOP, out=u)
    return u[0], u[1]


class DeviceRows(NamedTuple):
    """Draw, index and key of each row as int64 tensors (R, 1), or (1, 1) for a number that all rows share.

    Arguments:
        draw: Number of the draw.
        low: Lower half of the index of the sample.
        high: Upper half of the index of the sample.
        key_low: Lower half of the seed.
        key_high: Upper half of the seed.
    """

    draw: Tensor
    low: Tensor
    high: Tensor
    key_low: Tensor
    key_high: Tensor

    def part(self, rows: slice) -> DeviceRows:
        """Some of the rows."""
        return DeviceRows(*(word if len(word) == 1 else word[rows] for word in self))

    def words(self, block: Tensor) -> Four:
        """Words of Philox of blocks that broadcast with (R, 1)."""
        return philox((block, self.draw, self.low, self.high), (self.key_low, self.key_high))


def on_device(rows: DeviceRows, n: int, dtype: torch.dtype, *, normal: bool) -> Tensor:
    """Compute n numbers of each row on the device of the rows, (R, n), by elementwise operations of torch.

    Arguments:
        rows: Draw, index and key of each row.
        n: Numbers of a row.
        dtype: Dtype of the result.
        normal: Whether the numbers are normal or uniform.
    """
    size, blocks, device = len(rows.low), -(-n // 4), rows.low.device
    if torch.compiler.is_compiling():
        return by_position(rows, n, dtype, normal=normal)
    width = max(1, min(blocks, DEVICE_BLOCK))
    height = max(1, DEVICE_BLOCK // width)
    parts = [rows.part(slice(r, min(r + height, size))) for r in range(0, size, height)]
    steps = [(b, min(b + width, blocks)) for b in range(0, blocks, width)]
    if not parts or not steps:
        return torch.empty((size, n), dtype=dtype, device=device)
    done = [
        torch.cat([_four(torch.arange(*step, device=device)[None], part, dtype, normal=normal) for step in steps], 1)
        if len(steps) > 1
        else _four(torch.arange(*steps[0], device=device)[None], part, dtype, normal=normal)
        for part in parts
    ]
    out = done[0] if len(done) == 1 else torch.cat(done)
    return out if n == 4 * blocks else out[:, :n].contiguous()


def _four(block: Tensor, rows: DeviceRows, dtype: torch.dtype, *, normal: bool) -> Tensor:
    """Four numbers of each counter, (R, 4 N)."""
    c0, c1, c2, c3 = rows.words(block)
    first, second = torch.stack((c1, c0), -1), torch.stack((c3, c2), -1)
    if not normal:
        return _uniform(torch.cat((first, second), -1).flatten(1), dtype)
    radius, angle = _polar(first, second, dtype)
    return torch.cat((radius * angle.cos(), radius * angle.sin()), -1).flatten(1)


def by_position(rows: DeviceRows, n: int, dtype: torch.dtype, *, normal: bool) -> Tensor:
    """Compute the numbers of :func:`on_device` position by position, for compilers.

    Four times as many integers are computed, but all operations have one shape, so that a compiler makes them and the
    update which uses the numbers one pass over memory.

    Arguments:
        rows: Draw, index and key of each row.
        n: Numbers of a row.
        dtype: Dtype of the result.
        normal: Whether the numbers are normal or uniform.
    """
    position = torch.arange(n, device=rows.low.device)[None]
    c0, c1, c2, c3 = rows.words(position >> 2)
    odd, later = (position & 1) == 1, (position & 2) == 2
    first, second = torch.where(odd, c0, c1), torch.where(odd, c2, c3)
    if not normal:
        return _uniform(torch.where(later, second, first), dtype)
    radius, angle = _polar(first, second, dtype)
    return radius * torch.where(later, angle.sin(), angle.cos())


def _polar(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Radius and angle of two normals."""
    u = first.to(torch.float32).add(0.5).mul(CELL).to(dtype)
    return u.log().mul(-2).sqrt(), ((second + (1 << 31) & MASK) - (1 << 31)).to(dtype).mul(TURN)


def _uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    u = word.to(dtype).add(0.5).mul(CELL)
    return u.clamp_max(TOP) if dtype == torch.float32 else u
