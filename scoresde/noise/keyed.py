r"""Reproducible random numbers: sample i is the same in any batch, order, chunk or rank.

Every number is a pure function of (seed, sample index, draw, position), computed by the counter-based generator
Philox-4x32-10 in vectorised torch. There is no state, and torch's global generator is not used. Box–Muller maps
uniform words to normals, :math:`z = \sqrt{-2\log u}\,(\cos 2\pi v, \sin 2\pi v)`.

References:
    | Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), doi:10.1145/2063384.2063405
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked

_MASK = 0xFFFFFFFF

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)

_WEYL = (0x9E3779B9, 0xBB67AE85)

_BLOCK = 1 << 14  # counters per call on a CPU: they fit a core's cache, and torch uses one thread for the integers

_AHEAD = 1 << 15  # numbers that `Ahead` draws in one call

_DEVICE_BLOCK = 1 << 22  # counters per call on other devices: a working set of a few hundred MB

_Transform = Callable[[Tensor, Tensor, torch.dtype], tuple[Tensor, Tensor]]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compute Philox-4x32-10: four 32-bit words from a 128-bit counter and a 64-bit key.

    Arguments:
        counter: Four int64 tensors of 32-bit words, shapes that broadcast.
        key: Two int64 tensors of 32-bit words, with as many axes as the counter.

    Returns:
        Two int64 tensors, words (0, 2) and words (1, 3), each pair stacked along a new first axis.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    even, odd = torch.stack((c0, c2)), torch.stack((c1, c3))
    product = torch.empty_like(even)
    rounds = torch.arange(10, device=c0.device).reshape(10, *[1] * c0.ndim)
    keys = torch.stack([(k + rounds * weyl) & _MASK for k, weyl in zip(key, _WEYL, strict=True)], dim=1)
    for k in keys:
        # int64 products wrap modulo 2⁶⁴, so both halves of the unsigned 64-bit product are correct. The upper half is
        # mixed into the other words. The lower half becomes a word; the next round masks the bits above it.
        torch.mul(even[0], _MULTIPLIERS[0], out=product[1])
        torch.mul(even[1], _MULTIPLIERS[1], out=product[0])
        torch.bitwise_right_shift(product, 32, out=even)
        even.bitwise_xor_(odd).bitwise_xor_(k).bitwise_and_(_MASK)
        odd, product = product, odd
    return even, odd.bitwise_and_(_MASK)


@checked
@dataclass(frozen=True, eq=False)
class Noise:
    """A source of normal and uniform numbers keyed by (seed, sample index, draw).

    Row b of a draw belongs to the global sample ``offset + b`` or ``indices[b]``. If `seed` is a sequence, row b
    belongs to sample 0 of ``seed[b]``. A rank that computes samples 64 … 127 of a run uses ``Noise(seed, offset=64)``
    and gets the same numbers as one that computes all samples.

    Arguments:
        seed: Seed, an integer in [0, 2⁶⁴) or one for each row. None takes a fresh seed from the operating system;
            ``noise.seed`` holds this seed.
        offset: Global index of the first row, default 0.
        indices: Global index of each row, instead of `offset`.
        path: Whether the stochastic steps of a plan use increments of one Brownian path per sample, the same for any
            number of steps, instead of fresh normals; :mod:`scoresde.noise.brownian` describes the cost.

    Example:
        >>> import torch
        >>> whole = Noise(7).normal((4, 3), draw=0)
        >>> torch.equal(whole[2:], Noise(7, offset=2).normal((2, 3), draw=0))
        True
    """

    seed: int | tuple[int, ...] | None = None
    offset: int = 0
    indices: tuple[int, ...] | None = None
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
            raise ValueError("`seed` has one entry for each row, so `offset` and `indices` have no meaning; drop them.")
        if indices is not None and offset:
            raise ValueError("`indices` already gives the sample of each row; drop `offset`.")
        for value in seed if isinstance(seed, Sequence) else (seed,):
            _word("seed", value, 64)
        for value in indices if indices is not None else (offset,):
            _word("indices" if indices is not None else "offset", value, 63)
        object.__setattr__(self, "seed", tuple(int(s) for s in seed) if isinstance(seed, Sequence) else int(seed))
        object.__setattr__(self, "offset", int(offset))
        object.__setattr__(self, "indices", None if indices is None else tuple(int(i) for i in indices))
        object.__setattr__(self, "path", bool(path))

    def __repr__(self) -> str:
        parts = [f"<{len(self.seed)} seeds>" if isinstance(self.seed, tuple) else str(self.seed)]
        parts += [f"offset={self.offset}"] * (self.offset > 0)
        parts += [f"indices=<{len(self.indices)}>"] if self.indices is not None else []
        return f"Noise({', '.join(parts + ['path=True'] * self.path)})"

    @checked
    def fork(self, stream: int) -> Noise:
        """Return an independent source with the same rows, for probes, data or paths.

        Arguments:
            stream: Number of the source, an integer in [0, 2⁶⁴); equal numbers give equal sources.
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
        """Return the source of some rows, given by position, for a chunk or for the unfinished samples of a batch."""
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
        """Draw standard normal numbers of shape (B, *event).

        Arguments:
            shape: Shape of the result, (B, *event).
            draw: Index of the draw, in [0, 2³²), or an int64 tensor (B,). Each index gives fresh numbers.
            dtype: Dtype of the result, float32 or float64; the numbers agree to rounding.
            device: Device of the result; the numbers on all devices agree to rounding.
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
        """Draw several times in one call, (L, B, *event): faster for small states.

        Arguments:
            shape: Shape of one draw, (B, *event).
            draws: Indices of the draws, int64, (L,) or (L, B).
            dtype: Dtype of the result, float32 or float64.
            device: Device of the result.
        """
        check.dtype("dtype", dtype)
        device = check.device("device", device)
        if not isinstance(draws, Tensor) or draws.is_floating_point() or draws.is_complex() or draws.ndim not in (1, 2):
            raise TypeError("`draws` must be an integer tensor (L,) or (L, B), as torch.arange(L).")
        rows, *event = check.shape("shape", shape)
        n = math.prod(event)
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
        """Draw uniform numbers in (0, 1), of shape (B, *event), with the arguments of :meth:`normal`."""
        return self._fill(_uniforms, shape, draw, dtype, device)

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Draw standard normal numbers with the shape, dtype and device of `x`."""
        check.state("x", x)
        if isinstance(draw, Tensor) and draw.is_floating_point():
            raise TypeError(f"`draw` must be an integer, got a {str(draw.dtype)[6:]} tensor.")
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
        device = check.device("device", device)
        if not isinstance(draw, Tensor):
            _word("draw", draw, 32, "; use `fork` for more streams")
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
        limit = _BLOCK if out.device.type == "cpu" else _DEVICE_BLOCK
        width = min(blocks, limit)
        height = max(1, limit // width)
        for r in range(0, rows, height):
            part = slice(r, min(r + height, rows))
            k0, k1, i0, i1, words_draw = (w if len(w) == 1 else w[part] for w in per_row)
            for b in range(0, blocks, width):
                block = torch.arange(b, min(b + width, blocks), device=device)[None]
                numbers = _numbers(words_to_numbers, (block, words_draw, i0, i1), (k0, k1), dtype)
                stop = min(4 * (b + block.shape[1]), n)
                out[part, 4 * b : stop] = numbers[:, : stop - 4 * b]
        return out.reshape(tuple(shape))

    def _keys(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return key and index of each row, as 32-bit halves of shape (rows, 1), or (1, 1) for a shared key."""
        given = (
            len(self.seed) if isinstance(self.seed, tuple) else len(self.indices) if self.indices is not None else rows
        )
        if given != rows:
            name = "seed" if isinstance(self.seed, tuple) else "indices"
            raise ValueError(f"`{name}` has {given} entries and the state has {rows} rows; give one for each row.")
        # Single numbers become tensors on the device: a copy from the host would block a GPU.
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


def as_noise(seed: int | Sequence[int] | Tensor | Noise | None) -> Noise:
    """Return `seed` if it is a :class:`Noise`, otherwise the :class:`Noise` of this seed."""
    return seed if isinstance(seed, Noise) else Noise(seed)


class Laid(Noise):
    """A source whose seeds and indices lie on a device, so that no draw copies a number from the host.

    A CUDA graph reads them anew at every replay: :meth:`load` gives it the seeds of another run.

    Arguments:
        noise: Source of the numbers.
        rows: Number of rows of the states.
        device: Device of the states.
    """

    def __init__(self, noise: Noise, rows: int, device: torch.device) -> None:
        for name in ("seed", "offset", "indices", "path"):
            object.__setattr__(self, name, getattr(noise, name))
        keys = tuple(word.expand(rows, 1).clone() for word in noise._keys(rows, device))
        object.__setattr__(self, "words", keys)

    def load(self, noise: Noise) -> None:
        """Take the seeds and indices of another source.

        Arguments:
            noise: Source of as many rows.
        """
        words: tuple[Tensor, Tensor, Tensor, Tensor] = vars(self)["words"]
        for mine, new in zip(words, noise._keys(len(words[0]), words[0].device), strict=True):
            mine.copy_(new)

    def _keys(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        words: tuple[Tensor, Tensor, Tensor, Tensor] = vars(self)["words"]
        if len(words[0]) != rows:
            raise ValueError(f"the source was laid for {len(words[0])} rows and the state has {rows}; lay it again.")
        return words


class Ahead:
    """A source for draws in increasing order: for small states, one call computes several draws.

    Arguments:
        noise: Source of the numbers.
        draws: Number of draws in total.
    """

    def __init__(self, noise: Noise, draws: int) -> None:
        self._noise, self._draws = noise, draws
        self._chunk: tuple[int, Tensor] | None = None

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Return :meth:`Noise.like`; do not change the result in place."""
        check.state("x", x)
        many = min(self._draws, _AHEAD // max(1, x.numel()))
        if many < 2:
            return self._noise.like(x, draw)
        first = draw - draw % many
        chunk = self._chunk  # one attribute, so that threads which share the source agree
        if chunk is None or chunk[0] != first:
            draws = torch.arange(first, min(first + many, self._draws), device=x.device)
            chunk = first, self._noise.normals(x.shape, draws, dtype=x.dtype, device=x.device)
            self._chunk = chunk
        return chunk[1][draw - first]


def _numbers(
    words_to_numbers: _Transform,
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> Tensor:
    """Compute four numbers of each counter, along its last axis."""
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
    """Compute a 64-bit seed from each seed and `stream`, by Philox with a counter that no draw uses."""
    lo, hi = torch.tensor([_halves(seed) for seed in seeds], dtype=torch.int64, device="cpu").reshape(-1, 2).unbind(1)
    counter = torch.tensor([*_halves(stream), _MASK, _MASK], device="cpu").reshape(4, 1).expand(4, len(lo))
    even, odd = philox((counter[0], counter[1], counter[2], counter[3]), (lo, hi))
    return [a | b << 32 for a, b in zip(even[0].tolist(), odd[0].tolist(), strict=True)]


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Map a 32-bit word to (0, 1): the midpoint of one of 2³² cells."""
    return word.to(dtype).add_(0.5).mul_(2.0**-32)


def _uniforms(even: Tensor, odd: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = 1.0 - 2.0**-24 if dtype == torch.float32 else 1.0
    return _unit(even, dtype).clamp_max_(top), _unit(odd, dtype).clamp_max_(top)


def _box_muller(radius: Tensor, angle: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Compute log u from the smaller of u and 1 − u, so that float32 is accurate at both ends of the radius.
    small = _unit(torch.minimum(radius, _MASK - radius), dtype)
    log = torch.where(radius < 1 << 31, small.log(), small.neg().log1p_())
    r = log.mul_(-2).sqrt_()
    phi = _unit(angle, dtype).mul_(2 * math.pi)
    return phi.cos().mul_(r), phi.sin().mul_(r)
