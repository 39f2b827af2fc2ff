r"""Reproducible random numbers: sample i is the same in any batch, order, chunk or rank.

Every number is a pure function of (seed, sample index, draw, position), computed by the counter-based generator
Philox-4x32-7 of :mod:`scoresde.noise.philox`. There is no state, and torch's global generator is not used. Box–Muller
maps uniform words to normals, :math:`z = \sqrt{-2\log u}\,(\cos\varphi, \sin\varphi)`.

References:
    | Parallel Random Numbers: As Easy as 1, 2, 3 (Salmon et al., 2011), doi:10.1145/2063384.2063405
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.numbers import DeviceRows, HostRows, numbers_of, on_device, on_host
from scoresde.noise.philox import MASK, Words, few

_FEW = 3  # counters that plain Python computes sooner than NumPy

_AHEAD = 1 << 15  # numbers that `Ahead` draws in one call


@checked
@dataclass(frozen=True, eq=False)
class Noise:
    """A source of normal and uniform numbers keyed by (seed, sample index, draw).

    Row b of a draw belongs to the global sample ``offset + b`` or ``indices[b]``. If `seed` is a sequence, row b
    belongs to sample 0 of ``seed[b]``. A rank that computes samples 64 … 127 of a run uses ``Noise(seed, offset=64)``
    and gets the same numbers as one that computes all samples.

    On a CPU the numbers of a sample are equal to the bit in any batch, order, chunk or rank. A GPU, ``torch.compile``
    and the other dtype use the same integers, but round log, sin and cos otherwise: there they are equal to rounding.

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
        return self._fill(shape, draw, dtype, device, normal=True)

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
        each = draws.reshape(len(draws), -1).expand(len(draws), rows).reshape(-1, 1)
        return self._numbers(rows, math.prod(event), each, dtype, device, (len(draws), rows, *event), normal=True)

    def uniform(
        self,
        shape: Sequence[int],
        draw: int | Tensor,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw uniform numbers in (0, 1), of shape (B, *event), with the arguments of :meth:`normal`."""
        return self._fill(shape, draw, dtype, device, normal=False)

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Draw standard normal numbers with the shape, dtype and device of `x`."""
        check.state("x", x)
        if isinstance(draw, Tensor) and draw.is_floating_point():
            raise TypeError(f"`draw` must be an integer, got a {str(draw.dtype)[6:]} tensor.")
        return self.normal(x.shape, draw, dtype=x.dtype, device=x.device)

    def _fill(
        self, shape: Sequence[int], draw: int | Tensor, dtype: torch.dtype, device: torch.device | str, *, normal: bool
    ) -> Tensor:
        check.dtype("dtype", dtype)
        device = check.device("device", device)
        plain = isinstance(draw, int) and not isinstance(draw, bool) and 0 <= draw <= MASK
        if not (plain or isinstance(draw, Tensor)):
            _word("draw", draw, 32, "; use `fork` for more streams")
        if not isinstance(shape, Sequence) or len(shape) == 0:
            raise ValueError(f"`shape` must be (B, *event), got {shape!r}; a single number is shape (1,).")
        rows, *event = (check.integer("shape", size) for size in shape)
        n = math.prod(event)
        each = draw.reshape(rows, 1) if isinstance(draw, Tensor) else draw
        return self._numbers(rows, n, each, dtype, device, (rows, *event), normal=normal)

    def _numbers(
        self,
        rows: int,
        n: int,
        draw: int | Tensor,
        dtype: torch.dtype,
        device: torch.device,
        shape: Sequence[int],
        *,
        normal: bool,
    ) -> Tensor:
        """Compute n numbers of each row; `draw` is a number, or (R, 1) with R a multiple of `rows`."""
        given = len(self.seed) if isinstance(self.seed, tuple) else rows if self.indices is None else len(self.indices)
        if given != rows:
            name = "seed" if isinstance(self.seed, tuple) else "indices"
            raise ValueError(f"`{name}` has {given} entries and the state has {rows} rows; give one for each row.")
        if device.type != "cpu" or torch.compiler.is_compiling():
            return on_device(self._device_rows(rows, draw, device), n, dtype, normal=normal).reshape(shape)
        blocks = -(-n // 4)
        if isinstance(draw, Tensor) or isinstance(self, Laid) or not 0 < rows * blocks <= _FEW:
            return on_host(self._host_rows(rows, draw), n, dtype, normal=normal).reshape(shape)
        index = (0,) * rows if isinstance(self.seed, tuple) else self.indices or range(self.offset, self.offset + rows)
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed or 0,) * rows
        counters = [(b, draw, i & MASK, i >> 32) for i in index for b in range(blocks)]
        packed = np.array(few(counters, [seed for seed in seeds for _ in range(blocks)]), np.uint64)
        numbers = numbers_of(packed.reshape(2, rows, blocks), dtype, normal=normal)
        return torch.from_numpy((numbers if n == 4 * blocks else numbers[:, :n].copy()).reshape(shape))

    def _host_rows(self, rows: int, draw: int | Tensor) -> HostRows:
        key, sample = self._host_keys(rows)
        if not isinstance(draw, Tensor):
            return HostRows(np.full((1, 1), draw, np.uint64), sample, key)
        draws = draw.cpu().numpy().astype(np.uint64)
        repeat = (1, len(draws) // max(1, rows), 1)
        return HostRows(draws, np.tile(sample, repeat), key if key.shape[1] == 1 else np.tile(key, repeat))

    def _host_keys(self, rows: int) -> tuple[Words, Words]:
        if isinstance(self.seed, tuple):
            index = np.zeros(rows, np.uint64)
        elif self.indices is not None:
            index = np.array(self.indices, np.uint64)
        else:
            index = np.arange(self.offset, self.offset + rows, dtype=np.uint64)
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed or 0,)
        return _halves(np.array(seeds, np.uint64)), _halves(index)

    def _keys(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return key and index of each row, as 32-bit halves of shape (rows, 1), or (1, 1) for a shared key."""
        # Single numbers become tensors on the device: a copy from the host would block a GPU.
        if isinstance(self.seed, tuple):
            halves = [(s & MASK, s >> 32) for s in self.seed]
            lo, hi = torch.tensor(halves, dtype=torch.int64, device=device).reshape(-1, 2).unbind(1)
            index = torch.zeros_like(lo)
        else:
            seed = self.seed or 0
            lo, hi = (torch.full((1,), w, dtype=torch.int64, device=device) for w in (seed & MASK, seed >> 32))
            if self.indices is not None:
                index = torch.tensor(self.indices, dtype=torch.int64, device=device)
            else:
                index = torch.arange(self.offset, self.offset + rows, device=device)
        return lo[:, None], hi[:, None], (index & MASK)[:, None], (index >> 32)[:, None]

    def _device_rows(self, rows: int, draw: int | Tensor, device: torch.device) -> DeviceRows:
        lo, hi, low, high = self._keys(rows, device)
        if not isinstance(draw, Tensor):
            draws = torch.full((1, 1), draw, dtype=torch.int64, device=device)
            return DeviceRows(draws, low, high, lo, hi)
        repeat = len(draw) // max(1, rows)
        low, high, *key = (w if len(w) == 1 < rows else w.repeat(repeat, 1) for w in (low, high, lo, hi))
        return DeviceRows(draw.to(device), low, high, *key)


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

    Attributes:
        words: Lower and upper half of the seed, and of the index, of each row: int64 (rows, 1).
    """

    words: tuple[Tensor, Tensor, Tensor, Tensor]

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
        for mine, new in zip(self.words, noise._keys(len(self.words[0]), self.words[0].device), strict=True):
            mine.copy_(new)

    def _host_keys(self, rows: int) -> tuple[Words, Words]:
        lo, hi, low, high = (word.numpy().astype(np.uint64) for word in self._keys(rows, torch.device("cpu")))
        return np.stack((lo, hi)), np.stack((low, high))

    def _keys(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if len(self.words[0]) != rows:
            laid = len(self.words[0])
            raise ValueError(f"the source was laid for {laid} rows and the state has {rows}; lay it again.")
        return self.words


class Ahead:
    """A source for draws in increasing order: for small states, one call computes several draws.

    Arguments:
        noise: Source of the numbers.
        draws: Number of draws in total.
    """

    def __init__(self, noise: Noise, draws: int) -> None:
        self.noise, self._draws = noise, draws
        self._chunk: tuple[int, Tensor] | None = None

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Return :meth:`Noise.like`; do not change the result in place."""
        check.state("x", x)
        many = min(self._draws, _AHEAD // max(1, x.numel()))
        if many < 2:
            return self.noise.like(x, draw)
        first = draw - draw % many
        chunk = self._chunk  # one attribute, so that threads which share the source agree
        if chunk is None or chunk[0] != first:
            draws = torch.arange(first, min(first + many, self._draws), device=x.device)
            chunk = first, self.noise.normals(x.shape, draws, dtype=x.dtype, device=x.device)
            self._chunk = chunk
        return chunk[1][draw - first]


def _word(name: str, value: int, bits: int, fix: str = "") -> None:
    if check.integer(name, value) >= 1 << bits:
        raise ValueError(f"`{name}` must lie in [0, 2**{bits}), got {value}{fix}.")


def _halves(numbers: Words) -> Words:
    """Lower and upper halves of 64-bit numbers, (2, R, 1)."""
    return np.stack((numbers & np.uint64(MASK), numbers >> np.uint64(32)))[..., None]


def _mix(seeds: Sequence[int], stream: int) -> list[int]:
    """Compute a 64-bit seed from each seed and `stream`, by Philox with a counter that no draw uses."""
    counter = (stream & MASK, stream >> 32, MASK, MASK)
    return few([counter] * len(seeds), seeds)[0]
