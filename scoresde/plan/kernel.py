r"""A row of a plan as one Triton kernel: one pass over memory, with the normals drawn inside.

.. math:: x = \sum_k w_k y_k + \sum_k c_k z_k + e

The weights are arguments of the kernel, so that all rows with the same number of terms and of normals share one
compilation. A normal is a function of its seed, sample, draw and position (:mod:`scoresde.noise.keyed`): the kernel
computes the integers of Philox-4x32-7 that all other implementations compute, and Box–Muller in float32. The module
needs the optional extra ``triton``; :mod:`scoresde.plan.fused` imports it when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from scoresde.noise.numbers import CELL, TURN
from scoresde.noise.philox import ROUNDS

TERMS = 6  # states and outputs that one launch adds

DRAWS = 2  # normals that one launch draws

_GROUPS = 256  # groups of four numbers of a program; Philox makes four at a time

_CELL, _TURN, _ROUNDS = tl.constexpr(CELL), tl.constexpr(TURN), tl.constexpr(ROUNDS)


@triton.jit  # type: ignore[untyped-decorator]
def _normals(block, draw, low, high, key_low, key_high, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Four normals of each counter, (ROWS, 4 WIDTH)."""
    zero = tl.zeros((ROWS, WIDTH), tl.uint32)
    c0, c1, c2, c3 = tl.philox_impl(
        zero + block, zero + draw, zero + low, zero + high, zero + key_low, zero + key_high, _ROUNDS
    )
    near = tl.sqrt(-2.0 * tl.log((c1.to(tl.float32) + 0.5) * _CELL))
    far = tl.sqrt(-2.0 * tl.log((c0.to(tl.float32) + 0.5) * _CELL))
    phi = c3.to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    psi = c2.to(tl.int32, bitcast=True).to(tl.float32) * _TURN
    cosines = tl.join(near * tl.cos(phi), far * tl.cos(psi))
    sines = tl.join(near * tl.sin(phi), far * tl.sin(psi))
    # (ROWS, WIDTH, 2, 2) with the axes (first or second word, cosine or sine); numbers go cosine, cosine, sine, sine.
    return tl.reshape(tl.permute(tl.join(cosines, sines), (0, 1, 3, 2)), (ROWS, 4 * WIDTH))


@triton.jit(do_not_specialize=["draws"])  # type: ignore[untyped-decorator]
def _row(  # type: ignore[no-untyped-def]
    out, terms, weights, one, draws, stds, keys, sizes, LAST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute ROWS rows and 4 WIDTH columns of the sum; LAST says that channels are last in memory."""
    rows, n, area, chunks = sizes
    program = tl.program_id(0)
    row = program // chunks * ROWS + tl.arange(0, ROWS)[:, None]
    first = program % chunks * WIDTH
    column = 4 * first + tl.arange(0, 4 * WIDTH)[None, :]
    place = column % area * (n // area) + column // area if LAST else column
    inside = (row < rows) & (column < n)
    at = row.to(tl.int64) * n + place
    total = tl.zeros((ROWS, 4 * WIDTH), tl.float32) + one
    for k in tl.static_range(len(terms)):
        total += weights[k] * tl.load(terms[k] + at, mask=inside)
    if len(draws) > 0:
        block = (first + tl.arange(0, WIDTH)[None, :]).to(tl.uint32)
        low = tl.load(keys[0] + row, mask=row < rows, other=0).to(tl.uint32)
        high = tl.load(keys[1] + row, mask=row < rows, other=0).to(tl.uint32)
        key_low = tl.load(keys[2] + row, mask=row < rows, other=0).to(tl.uint32)
        key_high = tl.load(keys[3] + row, mask=row < rows, other=0).to(tl.uint32)
        for k in tl.static_range(len(draws)):
            total += stds[k] * _normals(block, draws[k].to(tl.uint32), low, high, key_low, key_high, ROWS, WIDTH)
    tl.store(out + at, total, mask=inside)


INTERPRETED = not isinstance(_row, triton.runtime.JITFunction)  # then tensors lie on the CPU


def add(
    out: Tensor,
    terms: Sequence[tuple[Tensor, float]],
    one: float = 0.0,
    draws: Sequence[tuple[int, float]] = (),
    keys: Sequence[Tensor] = (),
) -> Tensor:
    """Write Σ w y + Σ c z + one to `out`, float32 of shape (B, *event), and return it.

    Arguments:
        out: Memory of the result, which may be that of a term.
        terms: Tensors with the shape and strides of `out`, at most `TERMS`, with their weights.
        one: Constant.
        draws: Numbers of the draws in the stream, at most `DRAWS`, with the weights of their normals.
        keys: Lower and upper half of the index, and of the seed, of each row, int64 (B, 1); needed for draws.
    """
    rows = len(out)
    n = out.numel() // max(1, rows)
    if not out.numel():
        return out
    last = out.ndim == 4 and not out.is_contiguous()
    area = out.shape[2] * out.shape[3] if last else n
    width = min(_GROUPS, triton.next_power_of_2(-(-n // 4)))
    height = _GROUPS // width
    chunks = -(-n // (4 * width))
    y, w = [tensor for tensor, _ in terms], [float(weight) for _, weight in terms]
    d, c = [draw for draw, _ in draws], [float(weight) for _, weight in draws]
    with torch.cuda.device_of(out):
        _row[(-(-rows // height) * chunks,)](
            out, tuple(y), tuple(w), float(one), tuple(d), tuple(c), tuple(keys), (rows, n, area, chunks),
            LAST=last, ROWS=height, WIDTH=width,
        )  # fmt: skip
    return out
