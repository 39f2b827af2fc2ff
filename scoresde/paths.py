r"""Brownian paths as pure functions: one path a sample, whatever the number of steps.

A path is W(0) = 0 and its values at the powers :math:`16^k`, a stationary chain with one normal a link,

.. math:: w_k = W(16^k)/4^k, \qquad w_{k\pm1} = \tfrac14 (w_k + \sqrt{15}\, z),

anchored at k = 0, and between two of them Lévy's construction: a sum of tents, one normal a level. So time has the same
relative resolution everywhere, :math:`2^{-32}` of a cell, which clocks like :math:`e^{2\lambda}` need. Each normal is
keyed by its place in the tree: nothing depends on what was asked before, and nothing grows. A value costs about 35
keyed normals, which is what a leg on a path costs over one with fresh noise.

References:
    | Scalable Gradients for Stochastic Differential Equations (Li et al., 2020), arXiv:2001.01328
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise import Noise

_BASE, _DEPTH = 16.0, 32
_WIDTH = math.sqrt(_BASE - 1)  # of a cell [A, 16 A], in units of √A of the path
_CELLS = 200  # 16^±200 = 10^±240
_AT_ONCE = 1 << 16  # numbers drawn in one call
_SPINE = 0  # stream of the chain; those of the cells follow


@dataclass(frozen=True)
class Span:
    """The part of a path that one draw of a plan is the normalised increment of.

    Arguments:
        start: Where it starts, in the path's own time; a number, or (B,).
        end: Where it ends; it may lie before `start`.
        path: Which path; different names are independent paths.
        lap: How often the plan has gone back up before: a stretch that is solved again has noise of its own.
    """

    start: Any
    end: Any
    path: str
    lap: int = 0

    def to_list(self) -> list[Any]:
        """Plain numbers and strings; ``Span(*list)`` gives it back."""
        return [float(self.start), float(self.end), self.path, self.lap]


class BrownianPath:
    r"""A Brownian path for each sample and each number of a state, on (−∞, ∞) with W(0) = 0.

    Arguments:
        noise: Whose seed and rows.
        shape: (B, *event).
        dtype: float32 or float64.
        device: Where.

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
    ) -> None:
        self.noise = noise
        self.shape = tuple(check.integer("shape", n) for n in shape)
        self.dtype, self.device = dtype, torch.device(device)
        self._forks: dict[int, Noise] = {}
        self._recent: dict[float, Tensor] = {}

    def __call__(self, s: float | Tensor, t: float | Tensor) -> Tensor:
        """W(t) − W(s), of the shape of the state; `s` and `t` are numbers or (B,)."""
        a, b = (_rounded_all(torch.as_tensor(v, dtype=torch.float64).reshape(-1)) for v in (s, t))
        return self._scaled(self.normal(s, t), (b - a).abs().sqrt())

    def normal(self, s: float | Tensor, t: float | Tensor) -> Tensor:
        """The increment over its standard deviation, (W(t) − W(s))/√|t − s|: exactly standard normal."""
        if not isinstance(s, Tensor) and not isinstance(t, Tensor):
            a, b = _rounded(s), _rounded(t)
            if a == b:
                raise ValueError(f"`s` = {s!r} and `t` = {t!r} are one time of this path; ask for a longer stretch.")
            if b < a:
                return self.normal(t, s).neg_()
            of_s, of_t = (math.sqrt(abs(c / (b - a))) for c in (a, b))
            return self.unit(t).mul(of_t).sub_(self.unit(s), alpha=of_s)
        s, t = (torch.as_tensor(v, dtype=torch.float64).detach().cpu().expand(self.shape[0]) for v in (s, t))
        return self.between(s, t, self.unit(s), self.unit(t))

    def between(self, s: Tensor, t: Tensor, unit_s: Tensor, unit_t: Tensor) -> Tensor:
        """:meth:`normal` from values of :meth:`unit` that are already known; times are (B,)."""
        a, b = _rounded_all(s), _rounded_all(t)
        if bool((a == b).any()):
            row = int((a == b).nonzero()[0])
            raise ValueError(f"`s` and `t` are one time of this path in sample {row}, {float(s[row])!r}.")
        of_s, of_t = (check.expand((c / (b - a)).abs().sqrt().to(unit_s), unit_s) for c in (a, b))
        return of_t * unit_t - of_s * unit_s

    def unit(self, t: float | Tensor, rows: Sequence[int] | None = None) -> Tensor:
        r"""W(t)/√\|t\|, standard normal; 0 at 0.

        Arguments:
            t: A number, or one time for each row.
            rows: Which rows, if `t` has times for some of them only.
        """
        if isinstance(t, Tensor):
            some = range(self.shape[0]) if rows is None else rows
            return self._by_rows(t.detach().cpu().expand(len(some)), some)
        if t not in self._recent:  # the next leg starts where this one ends: two values are kept
            if len(self._recent) == 2:
                del self._recent[next(iter(self._recent))]
            self._recent[t] = self._unit(t)
        return self._recent[t]

    def _by_rows(self, t: Tensor, some: Sequence[int]) -> Tensor:
        out = torch.zeros((len(some), *self.shape[1:]), dtype=self.dtype, device=self.device)
        homes = [_home(c) for c in t.tolist()]
        for sign, cell in sorted({(sign, cell) for sign, cell, _ in homes if sign}):
            at = [i for i, home in enumerate(homes) if home[:2] == (sign, cell)]
            out[at] = self._inside(sign, cell, [homes[i][2] for i in at], [some[i] for i in at])
        return out

    def _unit(self, t: float) -> Tensor:
        sign, cell, place = _home(t)
        if sign == 0:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return self._inside(sign, cell, [place], None)

    def _inside(self, sign: int, cell: int, places: list[int], rows: list[int] | None) -> Tensor:
        """W/√t of some rows, or of all, at places of a cell: one for all or one for each, in units of 2⁻³²."""
        place = torch.tensor(places)
        left, right = self._ends(sign, cell, rows)
        u = place.double() * 2.0**-_DEPTH
        size = (1 + (_BASE - 1) * u).rsqrt()
        level = torch.arange(_DEPTH)[:, None]
        below = _DEPTH - level
        node = (1 << level) + (place >> below)
        part = (place & ((1 << below) - 1)).double() * 2.0 ** -below.double()
        tent = 1 - (2 * part - 1).abs()
        height = _WIDTH / 2 * 2.0 ** (-level.double() / 2) * tent * size
        deepest = int((tent > 0).any(1).sum())  # a dyadic place has nothing below it
        out = self._scaled(left, (1 - u) * size) + self._scaled(right, 4 * u * size)
        height = height[:deepest].to(self.device, self.dtype)
        for z in self._normals(2 * (cell + _CELLS) + (sign > 0) + 1, rows, node[:deepest]):
            for level_z, w in zip(z, height[: len(z)], strict=True):
                out.addcmul_(level_z, w.reshape(-1, *[1] * (out.ndim - 1)))
            height = height[len(z) :]
        return out

    def _ends(self, sign: int, cell: int, rows: list[int] | None) -> tuple[Tensor, Tensor]:
        """w at both ends of a cell, from the anchor outwards."""
        outer = cell + 1 if cell >= 0 else cell
        anchor = _CELLS if sign > 0 else 4 * _CELLS
        draws = torch.arange(abs(outer) + 1)[:, None]
        links = itertools.chain.from_iterable(self._normals(_SPINE, rows, anchor + (draws if outer > 0 else -draws)))
        inner = here = next(links)
        for z in links:
            inner, here = here, (here + _WIDTH * z) / 4
        return (inner, here) if cell >= 0 else (here, inner)

    def _normals(self, stream: int, rows: list[int] | None, draws: Tensor) -> Iterator[Tensor]:
        """Normals of a stream for draws (L, 1) or (L, B), in chunks (l, B, *event) of as many as are worth one call."""
        if stream not in self._forks:
            self._forks[stream] = self.noise.fork(stream)
        noise = self._forks[stream] if rows is None else self._forks[stream][rows]
        shape = (self.shape[0] if rows is None else len(rows), *self.shape[1:])
        at_once = max(1, _AT_ONCE // max(1, math.prod(shape)))
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        for d in draws.split(at_once) if len(draws) else ():
            yield (
                noise.normals(shape, d, **like)
                if at_once > 1
                else noise.normal(shape, d[0].expand(shape[0]), **like)[None]
            )

    def _scaled(self, x: Tensor, w: Tensor) -> Tensor:
        return x * float(w) if len(w) == 1 else x * check.expand(w.to(self.device, self.dtype), x)


class PathNoise:
    """The normals of a plan as increments of paths; draws without a span are fresh.

    Arguments:
        noise: Whose seed and rows.
        spans: The span of each draw, or None.
    """

    def __init__(self, noise: Noise, spans: Sequence[Span | None]) -> None:
        if not any(spans):
            raise ValueError(
                "no leg of this plan has a place on a Brownian path: paths are for legs with eta > 0 that interpolate "
                "data or noise; take Noise(seed) without `path`."
            )
        self._noise = noise
        self._spans = spans
        self._paths: dict[tuple[str, int], BrownianPath] = {}

    def like(self, x: Tensor, draw: int) -> Tensor:
        """The standard normals of a draw, with the shape, dtype and device of `x`."""
        span = self._spans[draw] if draw < len(self._spans) else None
        if span is None:
            return self._noise.like(x, draw)
        key = (span.path, span.lap)
        if key not in self._paths:
            name = hashlib.sha256(f"{span.path}, lap {span.lap}".encode()).digest()
            stream = self._noise.fork(int.from_bytes(name[:8], "little"))
            self._paths[key] = BrownianPath(stream, x.shape, dtype=x.dtype, device=x.device)
        return self._paths[key].normal(span.start, span.end)


def _home(t: float) -> tuple[int, int, int]:
    """Sign, cell and place of a time: |t| = 16^cell (1 + 15 place / 2³²), to rounding."""
    if t == 0:
        return 0, 0, 0
    size = abs(t)
    cell = (math.frexp(size)[1] - 1) // 4
    if not abs(cell) < _CELLS:
        raise ValueError(f"`t` must be 0 or of a size between 1e-240 and 1e240, got {t!r}.")
    place = round((size / _BASE**cell - 1) / (_BASE - 1) * 2**_DEPTH)
    if place == 1 << _DEPTH:
        cell, place = cell + 1, 0
    return (1 if t > 0 else -1), cell, place


def _rounded(t: float) -> float:
    """The time that stands for `t` in a path: off by at most 2⁻³³ of its cell."""
    sign, cell, place = _home(t)
    return sign * _BASE**cell * (1 + (_BASE - 1) * place * 2.0**-_DEPTH)


def _rounded_all(t: Tensor) -> Tensor:
    return torch.tensor([_rounded(c) for c in t.tolist()], dtype=torch.float64)
