r"""Brownian paths as pure functions of the seed: one path per sample, for any number of steps.

A path has W(0) = 0. Its values at the powers :math:`16^k` form a stationary chain with one normal per link,

.. math:: w_k = W(16^k)/4^k, \qquad w_{k\pm1} = \tfrac14 (w_k + \sqrt{15}\, z),

started at k = 0. Between two powers, each interval [a, b] is halved in log t, at :math:`g = \sqrt{ab}`, by one normal
(Lévy's construction: a tent, linear on [a, g] and on [g, b]). The smallest intervals are leaves; on a leaf,

.. math:: W(t) = \frac{(b-t)\,W(a) + (t-a)\,W(b)}{b-a} + \sqrt{\frac{(t-a)(b-t)}{b-a}}\; z.

So W(t) is normal with variance :math:`|t|` at every t. Increments between times in different leaves have exactly the
joint law of Brownian motion. The relative resolution of time is constant, :math:`2^{-depth}` of log 16, as clocks like
:math:`e^{2\lambda}` need. The normal z of a leaf is that of the next tent, so paths of all depths agree at the ends of
their leaves. Each normal is keyed by its position, so values do not depend on earlier calls. A value costs depth + 1
normals and the links from k = 0, less those shared with the previous value, for which about ten states are cached.

References:
    | Scalable Gradients for Stochastic Differential Equations (Li et al., 2020), arXiv:2001.01328
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream

_BASE, _DEEPEST = 16.0, 31

_ENOUGH = 12  # smallest depth for a plan: leaves of 0.00034 in λ for the clocks exp(±2λ)

_CELLS = 200  # 16^±200 = 10^±240

_AT_ONCE = 1 << 16  # numbers drawn in one call on a CPU

_DEVICE_AT_ONCE = 1 << 24  # numbers drawn in one call on other devices, where the overhead of a call is larger

_CACHED = 6  # levels whose normals are cached, because the next value is likely to share them


@checked
@dataclass(frozen=True)
class Span:
    """The interval of a Brownian path whose normalised increment is one draw of a plan.

    Arguments:
        start: Start in the time of the path, a number or (B,).
        end: End in the time of the path, a number or (B,); may lie before `start`.
        path: Name of the path; paths with different names are independent.
        lap: Number of earlier returns of the plan to higher noise; each lap uses an independent path.
    """

    start: float | Tensor
    end: float | Tensor
    path: str
    lap: int = 0

    def to_list(self) -> list[float | str | int]:
        """Return plain numbers and strings, from which ``Span(*list)`` restores the span."""
        return [float(self.start), float(self.end), self.path, self.lap]


class _Place(NamedTuple):
    """Position of times: t = sign · 16^cell · 16^u with u in [0, 1); tensors of one shape, sign 0 at 0."""

    sign: Tensor
    cell: Tensor
    u: Tensor

    def leaf(self, depth: int) -> Tensor:
        """Return a different integer for each leaf, and 0 at t = 0."""
        inside: Tensor = (self.u * 2**depth).long() + ((self.cell + _CELLS) << depth) + 1
        return inside * self.sign.long()


@checked
class BrownianPath:
    r"""A Brownian path for each sample and each number of a state, on (−∞, ∞) with W(0) = 0.

    Arguments:
        noise: Source of the normals, with its seed and rows.
        shape: Shape of the state, (B, *event).
        dtype: Dtype of the values, float32 or float64.
        device: Device of the values.
        depth: Number of halvings between two powers of 16, in [0, 31]; a leaf is :math:`2^{-depth}` of log 16 wide.

    Example:
        >>> import torch
        >>> W = BrownianPath(Noise(0), (4, 3), dtype=torch.float64)
        >>> torch.allclose(W(0.2, 0.5) + W(0.5, 3.0), W(0.2, 3.0))
        True
    """

    def __init__(
        self,
        noise: Noise,
        shape: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        depth: int = _DEEPEST,
    ) -> None:
        if check.integer("depth", depth) > _DEEPEST:
            raise ValueError(f"`depth` must lie in [0, {_DEEPEST}], got {depth}.")
        self.noise = noise
        self.shape = tuple(check.integer("shape", n) for n in shape)
        self.dtype, self.device, self.depth = dtype, torch.device(device), depth
        self._forks: dict[int, Noise] = {}
        self._values: dict[float, Tensor] = {}
        self._ends: tuple[tuple[int, int], Tensor, Tensor] | None = None
        self._recent: list[tuple[tuple[int, int], Tensor]] = []

    def __repr__(self) -> str:
        return f"BrownianPath({self.noise!r}, {self.shape}, dtype={self.dtype}, depth={self.depth})"

    def __call__(self, s: float | Tensor, t: float | Tensor) -> Tensor:
        """Compute W(t) − W(s), of the shape of the state; `s` and `t` are numbers or (B,)."""
        z = self.normal(s, t)
        if not isinstance(s, Tensor) and not isinstance(t, Tensor):
            return z.mul_(math.sqrt(abs(t - s)))
        return z * check.expand((t - torch.as_tensor(s, dtype=torch.float64)).abs().sqrt().to(z), z)

    def normal(self, s: float | Tensor, t: float | Tensor) -> Tensor:
        """Compute the normalised increment (W(t) − W(s))/√|t − s|, standard normal."""
        check.timelike("s", s)
        check.timelike("t", t)
        if isinstance(s, Tensor) or isinstance(t, Tensor):
            s, t = (torch.as_tensor(v, dtype=torch.float64).detach().cpu().expand(self.shape[0]) for v in (s, t))
            return self.between(s, t, self.unit(s), self.unit(t))
        if t < s:
            return self.normal(t, s).neg_()
        self._check_leaves(*(torch.tensor([v], dtype=torch.float64) for v in (s, t)))
        of_s, of_t = (math.sqrt(abs(v / (t - s))) for v in (s, t))
        start = self.unit(s)  # evaluated first: it may be cached from the previous step, and W(t) may evict it
        return self.unit(t).mul(of_t).sub_(start, alpha=of_s)

    def between(self, s: Tensor, t: Tensor, unit_s: Tensor, unit_t: Tensor) -> Tensor:
        """Compute :meth:`normal` from given values of :meth:`unit`; times are (B,)."""
        self._check_leaves(s, t)
        length = (t - s).abs()
        of_s, of_t = (check.expand((v / length).abs().sqrt().to(unit_s), unit_s) for v in (s, t))
        return of_t * unit_t - of_s * unit_s

    @checked
    def unit(self, t: float | Tensor, rows: Sequence[int] | None = None) -> Tensor:
        r"""Compute W(t)/√\|t\|, standard normal; 0 at t = 0.

        Arguments:
            t: Time, a number or one for each row.
            rows: Positions of the rows, if `t` has times for some rows only.
        """
        if isinstance(t, Tensor):
            some = range(self.shape[0]) if rows is None else rows
            return self._by_rows(t.detach().cpu().double().expand(len(some)), some)
        if t not in self._values:  # cache two values: the next step starts where this one ends
            if len(self._values) == 2:
                del self._values[next(iter(self._values))]
            self._values[t] = self._unit(t)
        return self._values[t]

    def _check_leaves(self, s: Tensor, t: Tensor) -> None:
        same = (_placed(s).leaf(self.depth) == _placed(t).leaf(self.depth)).nonzero()
        if len(same):
            row = int(same[0])
            where = f" in sample {row}" if len(s) > 1 else ""
            raise ValueError(
                f"`s` = {float(s[row])!r} and `t` = {float(t[row])!r} lie in one leaf of this path{where}; use a "
                f"longer interval, or a path deeper than `depth`={self.depth} (at most {_DEEPEST})."
            )

    def _unit(self, t: float) -> Tensor:
        place = _placed(torch.tensor([t], dtype=torch.float64))
        sign, cell = int(place.sign), int(place.cell)
        if sign == 0:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        left, right, *heights = torch.cat(_weights(place.u, self.depth))[:, 0].tolist()
        if self._ends is None or self._ends[0] != (sign, cell):
            self._ends = ((sign, cell), *self._end_values(sign, cell, None))
        out: Tensor = (self._ends[1] * left).add_(self._ends[2], alpha=right)
        for z, height in zip(self._tents(sign, cell, _nodes(place.u, self.depth)), heights, strict=True):
            out.add_(z, alpha=height)
        return out

    def _tents(self, sign: int, cell: int, nodes: Tensor) -> Iterator[Tensor]:
        """Yield the normals of the intervals around a time, level by level; cached normals come first."""
        stream = self._stream(sign, cell)
        keys = [(stream, node) for node in nodes[:, 0].tolist()]
        shared = next((i for i, (key, _) in enumerate(self._recent) if key != keys[i]), len(self._recent))
        del self._recent[shared:]
        yield from [z for _, z in self._recent]
        fresh = iter(keys[shared:])
        for chunk in self._normals(stream, None, nodes[shared:]):
            for z, key in zip(chunk, fresh, strict=False):  # `fresh` last: zip drops no key at the end of a chunk
                if len(self._recent) < _CACHED:
                    self._recent.append((key, z.clone() if len(chunk) > 1 else z))
                yield z

    def _by_rows(self, t: Tensor, some: Sequence[int]) -> Tensor:
        out = torch.zeros((len(some), *self.shape[1:]), dtype=self.dtype, device=self.device)
        place = _placed(t)
        cells = torch.stack((place.sign.long(), place.cell), 1)
        for sign, cell in cells[place.sign != 0].unique(dim=0).tolist():
            at = ((place.sign == sign) & (place.cell == cell)).nonzero()[:, 0]
            rows = [some[i] for i in at.tolist()]
            weights = torch.cat(_weights(place.u[at], self.depth)).to(self.device, self.dtype)
            chunks = self._normals(self._stream(sign, cell), rows, _nodes(place.u[at], self.depth))
            normals = (z for chunk in chunks for z in chunk)
            part = torch.zeros_like(out[: len(rows)])
            for w, z in zip(weights, itertools.chain(self._end_values(sign, cell, rows), normals), strict=True):
                part.addcmul_(z, w.reshape(-1, *[1] * (z.ndim - 1)))
            out[at.to(self.device)] = part
        return out

    def _end_values(self, sign: int, cell: int, rows: list[int] | None) -> tuple[Tensor, Tensor]:
        """Compute w at both ends of a cell, along the chain from k = 0."""
        outer = cell + 1 if cell >= 0 else cell
        anchor = _CELLS if sign > 0 else 4 * _CELLS
        draws = torch.arange(abs(outer) + 1)[:, None]
        links = (
            z for chunk in self._normals(Stream.SPINE, rows, anchor + (draws if outer > 0 else -draws)) for z in chunk
        )
        inner = here = next(links)
        for z in links:
            inner, here = here, (here + math.sqrt(_BASE - 1) * z) / 4
        return (inner, here) if cell >= 0 else (here, inner)

    def _stream(self, sign: int, cell: int) -> int:
        return 2 * (cell + _CELLS) + (sign > 0) + 1

    def _normals(self, stream: int, rows: list[int] | None, draws: Tensor) -> Iterator[Tensor]:
        """Yield the normals of a stream for draws (L, 1) or (L, B), in chunks (l, B, *event) of one call each."""
        if stream not in self._forks:
            self._forks[stream] = self.noise.fork(stream)
        noise = self._forks[stream] if rows is None else self._forks[stream][rows]
        shape = (self.shape[0] if rows is None else len(rows), *self.shape[1:])
        numbers = _AT_ONCE if self.device.type == "cpu" else _DEVICE_AT_ONCE
        at_once = max(1, numbers // max(1, math.prod(shape)))
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        for d in draws.split(at_once) if len(draws) else ():
            if at_once > 1:
                yield noise.normals(shape, d, **like)
            else:
                yield noise.normal(shape, int(d) if d.numel() == 1 else d[0], **like)[None]


class PathNoise:
    """The normals of a plan as increments of Brownian paths; draws without a span are fresh normals.

    The two closest times of the plan set the depth of the paths, at least 12.

    Arguments:
        noise: Source of the normals, with its seed and rows.
        spans: Span of each draw, or None.
    """

    def __init__(self, noise: Noise, spans: Sequence[Span | None]) -> None:
        if not any(spans):
            raise ValueError(
                "`noise` has path=True, but no step of this plan uses a Brownian path: paths are for steps with "
                "eta > 0 that interpolate data or noise; use Noise(seed) without `path`."
            )
        self._noise = noise
        self._spans = spans
        self._paths: dict[tuple[str, int], BrownianPath] = {}

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Return the standard normals of a draw, with the shape, dtype and device of `x`."""
        span = self._spans[draw] if draw < len(self._spans) else None
        if span is None:
            return self._noise.like(x, draw)
        key = (span.path, span.lap)
        if key not in self._paths:
            name = hashlib.sha256(f"{span.path}, lap {span.lap}".encode()).digest()
            stream = self._noise.fork(int.from_bytes(name[:8], "little"))
            ends = [t for s in self._spans if s and (s.path, s.lap) == key for t in (s.start, s.end)]
            times = [torch.as_tensor(t, dtype=torch.float64).detach().cpu() for t in ends]
            depth = depth_for(torch.stack(torch.broadcast_tensors(*times)))
            self._paths[key] = BrownianPath(stream, x.shape, dtype=x.dtype, device=x.device, depth=depth)
        return self._paths[key].normal(span.start, span.end)


def depth_for(times: Tensor) -> int:
    """Compute the depth, in [12, 31], at which different times, (R,) or (R, B), lie in different leaves."""
    place = _placed(times.reshape(len(times), -1))
    gap = (place.cell + place.u).sort(0).values.diff(dim=0)
    gap = gap[gap > 2.0**-_DEEPEST]
    return int(gap.min().log2().neg().ceil().clamp(_ENOUGH, _DEEPEST)) if len(gap) else _ENOUGH


def _placed(t: Tensor) -> _Place:
    size = t.abs()
    if not bool(((size == 0) | (size > 1e-240) & (size < 1e240)).all()):
        bad = t[~((size == 0) | (size > 1e-240) & (size < 1e240))][0]
        raise ValueError(f"`t` must be 0 or have an absolute value between 1e-240 and 1e240, got {float(bad)!r}.")
    cell = (torch.frexp(size).exponent.long() - 1).div(4, rounding_mode="floor")
    cell = torch.where(size == 0, 0, cell)
    u = torch.where(size == 0, 0.0, (size / _BASE ** cell.double()).log2() / 4)
    return _Place(t.sign(), cell, u.clamp_max(1 - 2.0**-53))


def _nodes(u: Tensor, depth: int) -> Tensor:
    """Compute the index of the interval around each position, one per level, (depth + 1, n)."""
    level = torch.arange(depth + 1)[:, None]
    return (1 << level) + (u * 2.0 ** level.double()).long()


def _weights(u: Tensor, depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute weights in W(t)/√t: of w at both ends of the cell, (1, n), and of the normals, (depth + 1, n)."""
    scale = 2.0 ** torch.arange(depth + 1, dtype=torch.float64)[:, None]
    i = (u * scale).floor()
    t = _BASE**u
    a, g, b = (_BASE ** ((i + part) / scale) for part in (0.0, 0.5, 1.0))
    below, above = (t - a).clamp_min_(0), (b - t).clamp_min_(0)
    # Given W(a) and W(b), W(g) has standard deviation √((g − a)(b − g)/(b − a)); its tent is linear on both sides.
    heights = ((g - a) * (b - g) / (b - a)).sqrt() * torch.minimum(below / (g - a), above / (b - g))
    heights[-1] = (below * above / (b - a))[-1].sqrt()
    size = t.rsqrt()
    return above[:1] / (_BASE - 1) * size, 4 * below[:1] / (_BASE - 1) * size, heights * size
