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
_BLOCK = 1 << 14  # counters at a time on a CPU: they stay in a core's cache, and torch in one thread for the integers
_AHEAD = 1 << 15  # numbers that are drawn ahead
_DEVICE_BLOCK = 1 << 22  # and on other devices: the working set stays within a few hundred MB
_Transform = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Philox-4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Arguments:
        counter: Four int64 tensors of 32-bit words, shapes that broadcast.
        key: Two of the same, with as many axes as the counter.

    Returns:
        Two int64 tensors, words (0, 2) and words (1, 3), the pair along a new first axis.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    even, odd = torch.stack((c0, c2)), torch.stack((c1, c3))
    product = torch.empty_like(even)
    turn = torch.arange(10, device=c0.device).reshape(10, *[1] * c0.ndim)
    keys = torch.stack([(k + turn * weyl) & _MASK for k, weyl in zip(key, _WEYL, strict=True)], dim=1)
    for k in keys:
        # int64 products wrap modulo 2⁶⁴, which keeps both halves of the unsigned 64-bit product: the upper one is mixed
        # into the other words, the lower one becomes a word whose upper half is masked off when it is next mixed.
        torch.mul(even[0], _MULTIPLIERS[0], out=product[1])
        torch.mul(even[1], _MULTIPLIERS[1], out=product[0])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(k).bitwise_and_(_MASK)
        odd, product = product, odd
    return even, odd.bitwise_and_(_MASK)


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
        path: Give the stochastic legs of a plan increments of one Brownian path a sample, whatever the number of
            steps, instead of fresh normals; see :mod:`scoresde.paths` for what that costs.

    Example:
        >>> import torch
        >>> whole = Noise(7).normal((4, 3), draw=0)
        >>> torch.equal(whole[2:], Noise(7, offset=2).normal((2, 3), draw=0))
        True
    """

    seed: int | tuple[int, ...] | None = None
    offset: int = 0
    indices: tuple[int, ...] | None = field(default=None, repr=False)
    path: bool = False

    def __init__(
        self,
        seed: int | Sequence[int] | Tensor | None = None,
        *,
        offset: int = 0,
        indices: Sequence[int] | Tensor | None = None,
        path: bool = False,
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
            _word("seed", value, 64)
        for value in indices if indices is not None else (offset,):
            _word("indices" if indices is not None else "offset", value, 63)
        object.__setattr__(self, "seed", tuple(int(s) for s in seed) if isinstance(seed, Sequence) else int(seed))
        object.__setattr__(self, "offset", int(offset))
        object.__setattr__(self, "indices", None if indices is None else tuple(int(i) for i in indices))
        object.__setattr__(self, "path", bool(path))

    def fork(self, stream: int) -> Noise:
        """An independent source with the same rows: for probes, data or paths beside the sampler's own draws.

        Arguments:
            stream: Any integer in [0, 2⁶⁴); equal numbers give equal sources.
        """
        _word("stream", stream, 64)
        keys = _mix((self.seed,) if isinstance(self.seed, int) else (self.seed or ()), stream)
        return Noise(
            keys[0] if isinstance(self.seed, int) else keys,
            offset=self.offset,
            indices=self.indices,
            path=self.path,
        )

    def __getitem__(self, rows: Sequence[int] | Tensor | slice) -> Noise:
        """The source of some of the rows, by position: for chunks, and when finished samples leave a batch."""
        if isinstance(rows, Tensor):
            rows = rows.nonzero()[:, 0].tolist() if rows.dtype == torch.bool else rows.tolist()
        if isinstance(rows, slice):
            if rows.stop is None or rows.stop < 0 or (rows.start or 0) < 0:
                raise ValueError(f"`rows` must be a slice with ends that are not negative, got {rows}.")
            rows = range(rows.start or 0, rows.stop, rows.step or 1)
        if not isinstance(rows, Sequence):
            raise TypeError(f"`rows` must be a list, a tensor or a slice of positions, got {rows!r}; one row is [row].")
        for row in rows:
            check.integer("rows", row)
        if isinstance(self.seed, tuple):
            return Noise([self.seed[r] for r in rows], path=self.path)
        if self.indices is not None:
            return Noise(self.seed, indices=[self.indices[r] for r in rows], path=self.path)
        return Noise(self.seed, indices=[self.offset + r for r in rows], path=self.path)

    def normal(
        self,
        shape: Sequence[int],
        draw: int | Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Standard normal numbers of shape (B, *event).

        Arguments:
            shape: (B, *event).
            draw: Which draw, in [0, 2³²); each gives fresh numbers. One for each row as an int64 tensor (B,).
            dtype: float32 or float64, the same numbers to rounding.
            device: Where; the same numbers to float rounding everywhere.
        """
        return self._fill(_box_muller, shape, draw, dtype, device)

    def normals(
        self,
        shape: Sequence[int],
        draws: Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Several draws in one call, (L, B, *event): for states so small that a call costs more than its numbers.

        Arguments:
            shape: (B, *event).
            draws: Which draws, int64, (L,) or (L, B).
            dtype: float32 or float64.
            device: Where.
        """
        rows, n = shape[0], math.prod(shape[1:])
        k0, k1, i0, i1 = (w[None] for w in self._keys(rows, torch.device(device)))
        block = torch.arange(-(-n // 4), device=device)[None, None]
        draw = draws.to(device).reshape(len(draws), rows if draws.shape[1:] == (rows,) else 1, 1)
        z = _numbers(_box_muller, (block, draw, i0, i1), (k0, k1), dtype)
        return z[..., :n].expand(-1, rows, -1).reshape(len(draws), *shape)

    def uniform(
        self,
        shape: Sequence[int],
        draw: int | Tensor,
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
        draw: int | Tensor,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Tensor:
        check.dtype("dtype", dtype)
        if not isinstance(draw, Tensor):
            _word("draw", draw, 32, "; `fork` gives further streams")
        if not isinstance(shape, Sequence) or len(shape) == 0:
            raise ValueError(f"`shape` must be (B, *event), got {shape!r}; a single number is shape (1,).")
        rows, *event = (check.integer("shape", size) for size in shape)
        n = math.prod(event)
        out = torch.empty((rows, n), dtype=dtype, device=device)
        per_row: tuple[Tensor, ...] = self._keys(rows, out.device)
        if out.numel() == 0:
            return out.reshape(tuple(shape))
        blocks = -(-n // 4)
        if isinstance(draw, Tensor):
            per_row = (*per_row, draw.to(out.device).reshape(rows, 1))
        else:
            per_row = (*per_row, torch.full((1, 1), draw, dtype=torch.int64, device=device))
        at_once = _BLOCK if out.device.type == "cpu" else _DEVICE_BLOCK
        across = min(blocks, at_once)
        down = max(1, at_once // across)
        for r in range(0, rows, down):
            part = slice(r, min(r + down, rows))
            k0, k1, i0, i1, words_draw = (w if len(w) == 1 else w[part] for w in per_row)
            for b in range(0, blocks, across):
                block = torch.arange(b, min(b + across, blocks), device=device)[None]
                numbers = _numbers(words_to_numbers, (block, words_draw, i0, i1), (k0, k1), dtype)
                stop = min(4 * (b + block.shape[1]), n)
                out[part, 4 * b : stop] = numbers[:, : stop - 4 * b]
        return out.reshape(tuple(shape))

    def _keys(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Key and sample index of each row, as 32-bit halves of shape (rows, 1), or (1, 1) for a key shared by all."""
        given = (
            len(self.seed) if isinstance(self.seed, tuple) else len(self.indices) if self.indices is not None else rows
        )
        if given != rows:
            name = "seed" if isinstance(self.seed, tuple) else "indices"
            raise ValueError(f"`{name}` has {given} entries and the state has {rows} rows; give one for each row.")
        # What one number says is made on the device: to copy it there would make a GPU wait.
        if isinstance(self.seed, tuple):
            halves = torch.tensor([_halves(s) for s in self.seed], dtype=torch.int64, device=device)
            lo, hi = halves.reshape(-1, 2).unbind(1)
            index = torch.zeros_like(lo)
        else:
            lo, hi = (torch.full((1,), w, dtype=torch.int64, device=device) for w in _halves(self.seed or 0))
            if self.indices is not None:
                index = torch.tensor(self.indices, dtype=torch.int64, device=device)
            else:
                index = torch.arange(self.offset, self.offset + rows, device=device)
        return lo[:, None], hi[:, None], (index & _MASK)[:, None], (index >> 32)[:, None]


class Ahead:
    """A source whose draws are asked for in order: several in one call, where a call costs more than its numbers.

    Arguments:
        noise: The source.
        draws: How many draws there are.
    """

    def __init__(self, noise: Noise, draws: int) -> None:
        self._noise, self._draws = noise, draws
        self._first: int | None = None
        self._chunk: Tensor | None = None

    def like(self, x: Tensor, draw: int) -> Tensor:
        """:meth:`Noise.like`; not to be changed in place."""
        check.state("x", x)
        many = min(self._draws, _AHEAD // max(1, x.numel()))
        if many < 2:
            return self._noise.like(x, draw)
        first = draw - draw % many
        if self._chunk is None or self._first != first:
            draws = torch.arange(first, min(first + many, self._draws))
            self._first, self._chunk = first, self._noise.normals(x.shape, draws, dtype=x.dtype, device=x.device)
        return self._chunk[draw - first]


def _numbers(
    words_to_numbers: _Transform,
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Four numbers of each counter, along its last axis."""
    words = philox(counter, key)
    numbers = torch.empty((*words[0].shape[1:], 2, 2), dtype=dtype, device=words[0].device)
    for i, pair in enumerate(words_to_numbers(*words, dtype)):
        numbers[..., i] = pair.movedim(0, -1)
    return numbers.flatten(-3)


def _word(name: str, value: int, bits: int, fix: str = "") -> None:
    if check.integer(name, value) >= 1 << bits:
        raise ValueError(f"`{name}` must lie in [0, 2**{bits}), got {value}{fix}.")


def _halves(seed: int) -> tuple[int, int]:
    return seed & _MASK, seed >> 32


def _mix(seeds: Sequence[int], stream: int) -> list[int]:
    """A 64-bit seed for a stream of each seed: Philox once, with a counter that no draw uses."""
    lo, hi = torch.tensor([_halves(seed) for seed in seeds], dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
    counter = torch.tensor([*_halves(stream), _MASK, _MASK], device="cpu").reshape(4, 1).expand(4, len(lo))
    even, odd = philox((counter[0], counter[1], counter[2], counter[3]), (lo, hi))
    return [a | b << 32 for a, b in zip(even[0].tolist(), odd[0].tolist(), strict=True)]


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """A 32-bit word as a number in (0, 1): the middle of one of 2³² cells."""
    return word.to(dtype).add_(0.5).mul_(2.0**-32)


def _uniforms(even: Tensor, odd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = 1.0 - 2.0**-24 if dtype == torch.float32 else 1.0
    return _unit(even, dtype).clamp_max_(top), _unit(odd, dtype).clamp_max_(top)


def _box_muller(radius: Tensor, angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # log u, from u or from 1 − u, whichever is small: float32 keeps both ends of the radius.
    small = _unit(torch.minimum(radius, _MASK - radius), dtype)
    log = torch.where(radius < 1 << 31, small.log(), small.neg().log1p_())
    r = log.mul_(-2).sqrt_()
    phi = _unit(angle, dtype).mul_(2 * math.pi)
    return phi.cos().mul_(r), phi.sin().mul_(r)
