r"""Words of the counter-based generator Philox-4x32-7: four 32-bit words from a 128-bit counter and a 64-bit key.

Seven rounds are the fewest that pass all tests of BigCrush, as its authors report; their usual ten cost a third more.
There are three implementations of the same words: :func:`philox` in torch runs on every device, and inside
``torch.compile`` as part of the kernel of an update; :func:`words` in NumPy is for CPUs; :func:`few` in plain Python is
for one to three counters, where the overhead of a call of NumPy or torch exceeds the arithmetic. The optional kernel of
``scoresde.plan.kernel`` computes the same words in Triton.

References:
    | Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), doi:10.1145/2063384.2063405, table 2
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MASK = 0xFFFFFFFF

ROUNDS = 7

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)

_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = npt.NDArray[np.uint64]

_M0, _M1 = (np.uint64(m) for m in _MULTIPLIERS)
_BOTH = np.array(_MULTIPLIERS, np.uint64).reshape(2, 1, 1)
_STEPS = np.array([[r * w & MASK for w in _WEYL] for r in range(ROUNDS)], np.uint64).reshape(ROUNDS, 2, 1, 1)
_HALF, _LOW = np.uint64(32), np.uint64(MASK)

_WIDE = 32  # columns from which the first rounds are cheaper apart


Four = tuple[Tensor, Tensor, Tensor, Tensor]


def philox(counter: Four, key: tuple[Tensor, Tensor]) -> Four:
    """Compute Philox-4x32-7 in torch.

    Arguments:
        counter: Four int64 tensors of 32-bit words, shapes that broadcast.
        key: Two int64 tensors of 32-bit words, shapes that broadcast with the counter.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for r in range(ROUNDS):
        # int64 products wrap modulo 2⁶⁴, so both halves of the unsigned 64-bit product are correct.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        r0, r1 = (k0 + r * _WEYL[0]) & MASK, (k1 + r * _WEYL[1]) & MASK
        c0, c1 = ((p1 >> 32) ^ (c1 ^ r0)) & MASK, p1 & MASK
        c2, c3 = ((p0 >> 32) ^ (c3 ^ r1)) & MASK, p0 & MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3


def words(block: Words, draw: Words, index: Words, key: Words, scratch: Words | None = None) -> Words:
    """Compute Philox-4x32-7 of a counter (block, draw, index) for rows and columns, in NumPy.

    Arguments:
        block: First word of each column, (1, N).
        draw: Second word, (R, 1) or (1, 1).
        index: Third and fourth word of each row, (2, R, 1).
        key: Two words of the key, (2, R, 1) or (2, 1, 1).
        scratch: Memory of at least 6 R N words, which holds the result too; by default new memory.

    Returns:
        Words 0 and 1, and words 2 and 3, as the high and the low half of 64 bits, (2, R, N).
    """
    keys = (key + _STEPS) & _LOW
    shape = (3, 2, index.shape[1], block.shape[1])
    even, odd, product = np.empty(shape, np.uint64) if scratch is None else scratch[: math.prod(shape)].reshape(shape)
    if block.shape[1] < _WIDE:
        even[0], even[1], odd[0], odd[1] = block, index[0], draw, index[1]
        done = 0
    else:
        _two_rounds(block, draw, index, keys, even, odd)
        done = 2
    for k in keys[done:-1]:
        np.multiply(even, _BOTH, out=product)
        np.right_shift(product[::-1], _HALF, out=even)
        odd ^= k
        even ^= odd
        even &= _LOW  # the upper halves of `odd` are not cleared
        odd, product = product[::-1], odd
    np.multiply(even, _BOTH, out=product)
    odd ^= keys[-1]
    odd <<= _HALF
    odd ^= product[::-1]
    result: Words = odd
    return result


def _two_rounds(block: Words, draw: Words, index: Words, keys: Words, even: Words, odd: Words) -> None:
    """Fill in words (0, 2) and (1, 3) after two rounds, most of which are products of a row or of a column alone."""
    (a0, a1), (b0, b1) = keys[:2]
    of_column, of_row = block * _M0, index[0] * _M1
    next_row = ((of_row >> _HALF) ^ draw ^ a0) * _M0
    mixed = odd[0]
    np.bitwise_xor(of_column >> _HALF, index[1] ^ a1, out=mixed)
    mixed *= _M1
    np.right_shift(mixed, _HALF, out=even[0])
    even[0] ^= of_row & _LOW ^ b0
    np.bitwise_xor(of_column & _LOW, (next_row >> _HALF) ^ b1, out=even[1])
    odd[1] = next_row


def few(counters: Iterable[tuple[int, int, int, int]], seeds: Iterable[int]) -> tuple[list[int], list[int]]:
    """Compute Philox-4x32-7 of some counters, in Python.

    Arguments:
        counters: Counters of four words.
        seeds: Key of each counter, 64 bits.

    Returns:
        Words 0 and 1, and words 2 and 3, as the high and the low half of 64 bits.
    """
    first, second = [], []
    (m0, m1), (w0, w1), mask = _MULTIPLIERS, _WEYL, MASK
    for (c0, c1, c2, c3), seed in zip(counters, seeds, strict=True):
        k0, k1 = seed & mask, seed >> 32
        for _ in range(ROUNDS):
            p0, p1 = c0 * m0, c2 * m1
            c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & mask, p0 >> 32 ^ c3 ^ k1, p0 & mask
            k0, k1 = k0 + w0 & mask, k1 + w1 & mask
        first.append(c0 << 32 | c1)
        second.append(c2 << 32 | c3)
    return first, second
