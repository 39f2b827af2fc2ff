r"""Seeds in, noise out: sample i is the same sample in any batch, order, chunk or rank.

Every number is a pure function of (seed, sample index, draw, position), the counter-based generator Philox-4x32-10
in vectorised torch; nothing is stored and torch's global generator is never touched. Uniform words become normals by
Box–Muller, :math:`z = \sqrt{-2\log u}\,(\cos 2\pi v, \sin 2\pi v)`.

References:
    | Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), doi:10.1145/2063384.2063405
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde import _checks as check

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_Transform = Callable[[tuple[Tensor, ...], torch.dtype], Tensor]
_BLOCK = 1 << 15  # counters at a time: the working set stays in a core's cache


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Arguments:
        counter: Four int64 tensors of 32-bit words, shapes that broadcast.
        key: Two of the same.

    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = (c.clone() for c in torch.broadcast_tensors(*counter))
    k0, k1 = key
    m0, m1 = _MULTIPLIERS
    for _ in range(10):
        # int64 products wrap modulo 2⁶⁴, which keeps both halves of the unsigned 64-bit product.
        p0, p1 = c0.mul_(m0), c2.mul_(m1)
        hi0, hi1 = (p0 >> 32).bitwise_and_(_MASK), (p1 >> 32).bitwise_and_(_MASK)
        lo0, lo1 = p0.bitwise_and_(_MASK), p1.bitwise_and_(_MASK)
        c0 = hi1.bitwise_xor_(c1).bitwise_xor_(k0)
        c2 = hi0.bitwise_xor_(c3).bitwise_xor_(k1)
        c1, c3 = lo1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


@dataclass(frozen=True, eq=False)
class Noise:
    """A source of normal and uniform numbers keyed by (seed, sample index, draw).

    Row b of any draw belongs to global sample ``offset + b``, or to ``indices[b]``, or, when `seed` is a sequence, to
    sample 0 of ``seed[b]``. A sampler that works on samples 64 … 127 of a run makes ``Noise(seed, offset=64)`` and
    gets the same numbers as one that works on all of them.

    Arguments:
        seed: An integer in [0, 2⁶⁴), or one for each row. None takes a fresh seed from the operating system, which
            ``noise.seed`` then tells.
        offset: Global index of the first row.
        indices: Global index of each row, instead of `offset`.

    Example:
        >>> import torch
        >>> whole = Noise(7).normal((4, 3), draw=0)
        >>> torch.equal(whole[2:], Noise(7, offset=2).normal((2, 3), draw=0))
        True
    """

    seed: int | tuple[int, ...] | None = None
    offset: int = 0
    indices: tuple[int, ...] | None = field(default=None, repr=False)

    def __init__(
        self,
        seed: int | Sequence[int] | Tensor | None = None,
        *,
        offset: int = 0,
        indices: Sequence[int] | Tensor | None = None,
    ) -> None:
        if seed is None:
            seed = secrets.randbits(63)
        if isinstance(seed, Tensor):
            seed = seed.tolist()
        if isinstance(indices, Tensor):
            indices = indices.tolist()
        many = isinstance(seed, Sequence)
        if many and (offset or indices is not None):
            raise ValueError(
                "`seed` gives each row its own stream, so `offset` and `indices` have no meaning; drop them."
            )
        if indices is not None and offset:
            raise ValueError("`indices` already says which sample each row is; drop `offset`.")
        for value in seed if isinstance(seed, Sequence) else (seed,):
            if check.integer("seed", value) >= 1 << 64:
                raise ValueError(f"`seed` must lie in [0, 2**64), got {value}.")
        for value in indices if indices is not None else (offset,):
            check.integer("indices" if indices is not None else "offset", value)
        object.__setattr__(self, "seed", tuple(seed) if isinstance(seed, Sequence) else int(seed))
        object.__setattr__(self, "offset", int(offset))
        object.__setattr__(self, "indices", None if indices is None else tuple(int(i) for i in indices))

    def fork(self, stream: int) -> Noise:
        """An independent source with the same rows: for probes, data or paths beside the sampler's own draws.

        Arguments:
            stream: Any integer that is not negative; equal numbers give equal sources.
        """
        check.integer("stream", stream)
        seeds = (self.seed,) if isinstance(self.seed, int) else (self.seed or ())
        keys = tuple(_mix(s, stream) for s in seeds)
        return Noise(
            keys[0] if isinstance(self.seed, int) else keys,
            offset=self.offset,
            indices=self.indices,
        )

    def __getitem__(self, rows: Sequence[int] | Tensor | slice) -> Noise:
        """The source of some of the rows, by position: for chunks, and when finished samples leave a batch."""
        if isinstance(rows, Tensor):
            rows = rows.nonzero()[:, 0].tolist() if rows.dtype == torch.bool else rows.tolist()
        if isinstance(rows, slice):
            if rows.stop is None or rows.stop < 0 or (rows.start or 0) < 0:
                raise ValueError(f"`rows` must be a slice with ends that are not negative, got {rows}.")
            rows = range(rows.start or 0, rows.stop, rows.step or 1)
        if isinstance(self.seed, tuple):
            return Noise([self.seed[r] for r in rows])
        if self.indices is not None:
            return Noise(self.seed, indices=[self.indices[r] for r in rows])
        return Noise(self.seed, indices=[self.offset + r for r in rows])

    def normal(
        self,
        shape: Sequence[int],
        draw: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers of shape (B, *event).

        Arguments:
            shape: (B, *event).
            draw: Which draw, in [0, 2³²); each gives fresh numbers.
            dtype: float32 or float64, the same numbers to rounding.
            device: Where; the same numbers to float rounding everywhere.
        """
        return self._fill(_box_muller, shape, draw, dtype, device)

    def uniform(
        self,
        shape: Sequence[int],
        draw: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Uniform numbers in (0, 1), of shape (B, *event); the arguments of :meth:`normal`."""
        return self._fill(_uniforms, shape, draw, dtype, device)

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Standard normal numbers with the shape, dtype and device of `x`."""
        check.state("x", x)
        return self.normal(x.shape, draw, dtype=x.dtype, device=x.device)

    def _fill(
        self,
        words_to_numbers: _Transform,
        shape: Sequence[int],
        draw: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        if dtype not in check.FLOATS:
            raise TypeError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}; draw, then cast.")
        if check.integer("draw", draw) > _MASK:
            raise ValueError(f"`draw` must lie in [0, 2**32), got {draw}; `fork` gives further streams.")
        if len(shape) == 0:
            raise ValueError("`shape` must be (B, *event), got (); a single number is shape (1,).")
        rows, n = int(shape[0]), math.prod(shape[1:])
        out = torch.empty((rows, n), dtype=dtype, device=device)
        if out.numel() == 0:
            return out.reshape(tuple(shape))
        blocks = -(-n // 4)
        key, index = self._keys(rows, out.device)
        words_draw = torch.full((1, 1), draw, dtype=torch.int64, device=device)
        across = min(blocks, _BLOCK)
        down = max(1, _BLOCK // across) if out.device.type == "cpu" else rows
        for r in range(0, rows, down):
            part = slice(r, min(r + down, rows))
            for b in range(0, blocks, across):
                block = torch.arange(b, min(b + across, blocks), dtype=torch.int64, device=device)[None]
                counter = (block, words_draw, index[0][part], index[1][part])
                words = philox(counter, (key[0][part], key[1][part]))
                numbers = words_to_numbers(words, dtype)
                stop = min(4 * (b + block.shape[1]), n)
                out[part, 4 * b : stop] = numbers[:, : stop - 4 * b]
        return out.reshape(tuple(shape))

    def _keys(self, rows: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Key and sample index of each row, as 32-bit halves of shape (rows, 1) or (1, 1)."""
        given = (
            len(self.seed) if isinstance(self.seed, tuple) else len(self.indices) if self.indices is not None else rows
        )
        if given != rows:
            name = "seed" if isinstance(self.seed, tuple) else "indices"
            raise ValueError(f"`{name}` has {given} entries and the state has {rows} rows; give one for each row.")
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed or 0,)
        if isinstance(self.seed, tuple):
            index = torch.zeros((1,), dtype=torch.int64)
        elif self.indices is not None:
            index = torch.tensor(self.indices, dtype=torch.int64)
        else:
            index = torch.arange(self.offset, self.offset + rows, dtype=torch.int64)
        lo = torch.tensor([s & _MASK for s in seeds], dtype=torch.int64)
        hi = torch.tensor([s >> 32 for s in seeds], dtype=torch.int64)
        k0, k1, i0, i1 = (w[:, None].expand(rows, 1).to(device) for w in (lo, hi, index & _MASK, index >> 32))
        return (k0, k1), (i0, i1)


def _mix(seed: int, stream: int) -> int:
    """A 64-bit seed for a stream of a seed: Philox once, with a counter that no draw uses."""
    words = [torch.tensor([w], dtype=torch.int64) for w in (stream & _MASK, stream >> 32 & _MASK, _MASK, _MASK)]
    key = tuple(torch.tensor([w], dtype=torch.int64) for w in (seed & _MASK, seed >> 32))
    lo, hi, *_ = philox((words[0], words[1], words[2], words[3]), (key[0], key[1]))
    return int(lo) | int(hi) << 32


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A 32-bit word as a number in (0, 1): the middle of one of 2³² cells."""
    return (word.to(dtype) + 0.5) * 2.0**-32


def _uniforms(words: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    top = 1.0 - 2.0**-24 if dtype == torch.float32 else 1.0
    return torch.stack([_unit(w, dtype).clamp_max_(top) for w in words], dim=-1).flatten(1)


def _box_muller(words: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    w0, w1, w2, w3 = words
    pairs = []
    for radius, angle in ((w0, w1), (w2, w3)):
        # −log u, from u or from 1 − u, whichever is small: float32 keeps both ends of the radius.
        low = _unit(radius, dtype).log_().neg_()
        high = torch.log1p(-_unit(_MASK - radius, dtype)).neg_()
        r = torch.where(radius < 1 << 31, low, high).mul_(2).sqrt_()
        phi = _unit(angle, dtype).mul_(2 * math.pi)
        pairs += [r * phi.cos(), r * phi.sin()]
    return torch.stack(pairs, dim=-1).flatten(1)
