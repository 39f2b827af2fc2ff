r"""Laying the rows of a plan: down by the formula, up by the exact forward transition, or by hand.

A rule says which rows there are and what they read; all weights are then computed at once, one call of the quadrature
for all legs of a kind. A grid may go up as well as down: a down leg is solved, an up leg is the exact forward
transition with fresh noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde.paths import Span
from scoresde.plan import Plan, Row, Weight
from scoresde.quadrature import DATA, LAM, NOISE, Point, Prediction, Variable, constant, spread, transfer, weights
from scoresde.sde import SDE


@dataclass(frozen=True)
class _Move:
    """A row whose weights are still to be computed."""

    row: int
    source: int
    nodes: tuple[int, ...]
    prediction: Prediction
    variable: Variable
    eta: Weight
    moments: tuple[str | float, ...] | None
    draws: tuple[tuple[int, float], ...]
    ends: tuple[int, ...]


@dataclass(frozen=True)
class _Leg:
    """Which leg a draw is the noise of: its rows, κ of its path's clock exp(2κλ), and the lap."""

    source: int
    row: int
    kappa: float
    lap: int


class Tape:
    """Rows in the making.

    Arguments:
        sde: The process.
        t: Time of the start: a number, a float64 tensor (), or (B,) for one grid a sample.
        evaluates: Whether the network is asked at the start.

    Example:
        >>> import scoresde as ss
        >>> tape = Tape(ss.VP(), 1.0)
        >>> a = tape.move(0, 0.5, nodes=[0])
        >>> b = tape.move(a, 0.0, nodes=[a], evaluates=False)
        >>> tape.plan("two steps of DDIM", order=1).nfe
        2
    """

    def __init__(self, sde: SDE, t: Weight, *, evaluates: bool = True) -> None:
        self.sde = sde
        self._rows: list[Row] = [Row(t, evaluates=evaluates, node=0, note="start")]
        self._moves: list[_Move] = []
        self._draws = 0
        self._laps = 0
        self._legs: dict[int, _Leg] = {}
        self._given: dict[int, Span] = {}
        self._drawn: dict[int, int] = {}

    def draw(self, span: Span | None = None) -> int:
        """The number of a fresh normal; `span` says which stretch of a Brownian path it may stand for."""
        if span is not None:
            self._given[self._draws] = replace(span, lap=self._laps)
        self._draws += 1
        return self._draws - 1

    @property
    def draws(self) -> int:
        """How many normals there are."""
        return self._draws

    def along(self, s: Weight, t: Weight, kappa: float) -> Span:
        """The stretch from time s to t in the clock exp(2κλ): η² for legs of data, −1 for legs of noise."""
        start, end = (
            (2 * kappa * self.sde.lam(torch.as_tensor(v, dtype=torch.float64))).exp().detach() for v in (s, t)
        )
        return Span(start if start.ndim else float(start), end if end.ndim else float(end), _clock(kappa))

    def move(
        self,
        source: int,
        t: Weight,
        nodes: Sequence[int],
        *,
        evaluates: bool = True,
        prediction: Prediction = DATA,
        variable: Variable = LAM,
        eta: Weight = 0.0,
        moments: Sequence[str | float] | None = None,
        noise: Sequence[tuple[int, float]] | None = None,
        through: Sequence[int] = (),
        node: int | None = None,
        note: str = "",
    ) -> int:
        """Go from the state `source` to time t by the formula.

        Arguments:
            source: Row of the state that the leg starts from.
            t: Where to.
            nodes: Rows whose evaluations are interpolated, nearest first. Into σ = 0 nothing is extrapolated in λ,
                which is infinite there, nor with noise: the nearest alone is used. Nodes at an infinite u are left out,
                and so are those at the time of a nearer one, as a grid that goes up and down may have.
            evaluates: Whether the network is asked at the new state.
            prediction: What is interpolated; from α = 0, where noise says nothing, data instead of noise, and on legs
                with η > 0 data instead of anything.
            variable: In what.
            eta: η of the leg: a number, a float64 tensor (), or (B,) for one a sample.
            moments: See :func:`scoresde.quadrature.weights`.
            noise: (draw, factor) of normals that share the leg's standard deviation; a fresh one by default if η > 0.
            through: Stages of this leg, in their order in time, whose normals are carried on to t: each stands for the
                part of the leg that it ends, and a fresh one for the rest.
            node: Number of the grid time this settles.
            note: For the reader.

        Returns:
            The new row.
        """
        if not nodes:
            raise ValueError("`nodes` must name at least one evaluated row, such as the leg's own start.")
        nodes = self._apart(nodes)
        last = _is_clean(self.sde, t)
        if last and (_noisy(eta) or variable.infinite):
            nodes, prediction, eta, noise, through = nodes[:1], DATA, 0.0, (), ()
        if (prediction.silent or _noisy(eta)) and _is_silent(self.sde, self._rows[source].t):
            prediction = DATA
        if _noisy(eta) and noise is None:
            noise = [*((self._drawn[k], 1.0) for k in through), (self.draw(), 1.0)]
        row = len(self._rows)
        if noise:
            self._drawn[row] = noise[-1][0]
        self._place(noise or (), source, row, prediction, eta)
        self._rows.append(Row(t, evaluates=evaluates, node=node, note=note))
        self._moves.append(
            _Move(
                row,
                source,
                tuple(nodes),
                prediction,
                variable,
                eta,
                None if moments is None or len(nodes) == 1 else tuple(moments),
                tuple(noise or ()),
                (*through, row) if through and _noisy(eta) else (),
            )
        )
        return row

    def _place(
        self, noise: Sequence[tuple[int, float]], source: int, row: int, prediction: Prediction, eta: Weight
    ) -> None:
        """Note which leg a fresh normal is the noise of: what the normals drawn before it leave of this one."""
        for draw, _ in noise:
            if draw in self._legs:
                source = self._legs[draw].row
            elif prediction in (DATA, NOISE) and not isinstance(eta, Tensor):
                self._legs[draw] = _Leg(source, row, eta**2 if prediction is DATA else -1.0, self._laps)

    def spans(self, points: Point | None = None) -> tuple[Span | None, ...]:
        """The legs of the draws, in the clocks of their paths."""
        if not self._legs and not self._given:
            return ()
        points = self._points() if points is None else points
        plain = points.t.ndim == 1 and not any(isinstance(row.t, Tensor) for row in self._rows)
        spans = [self._given.get(k) for k in range(self._draws)]
        # Where η differs from leg to leg there is no clock in which all are exact, and one path needs one clock.
        varies = len({leg.kappa for leg in self._legs.values() if leg.kappa > 0}) > 1
        for k, leg in self._legs.items():
            kappa = 1.0 if varies and leg.kappa > 0 else leg.kappa
            ends = (2 * kappa * points.lam[[leg.source, leg.row]]).exp().detach()
            a, b = ends.tolist() if plain else ends
            spans[k] = Span(a, b, _clock(kappa), leg.lap)
        return tuple(spans)

    def _apart(self, nodes: Sequence[int]) -> list[int]:
        kept: list[int] = []
        for k in nodes:
            if not any(_close(self._rows[k].t, self._rows[j].t) for j in kept):
                kept.append(k)
        return kept

    def diffuse(
        self,
        source: int,
        t: Weight,
        *,
        evaluates: bool = True,
        node: int | None = None,
        factor: float = 1.0,
        span: Span | None = None,
    ) -> int:
        """Go up to time t by the forward process, with fresh noise, `factor` times as much as belongs there.

        With a `span` it is the noise of that stretch, and what was solved below it does not count as solved before.
        """
        self._laps += span is None
        s = self._rows[source].t
        a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
        scale: Weight
        std: Weight
        scale, std = self.sde.transition(a, b)
        if not isinstance(s, Tensor) and not isinstance(t, Tensor):
            scale, std = float(scale), float(std)
        return self.append(
            t,
            x=[(source, scale)],
            z=[(self.draw(span), factor * std)],
            evaluates=evaluates,
            node=node,
            note="forward noise",
        )

    def append(
        self,
        t: Weight,
        *,
        x: Sequence[tuple[int, Weight]] = (),
        d: Sequence[tuple[int, Weight]] = (),
        z: Sequence[tuple[int, Weight]] = (),
        evaluates: bool = True,
        node: int | None = None,
        note: str = "",
    ) -> int:
        """Add a row by hand: any affine combination."""
        self._rows.append(Row(t, tuple(x), tuple(d), tuple(z), evaluates, node, note))
        return len(self._rows) - 1

    def evaluate(self, row: int) -> int:
        """Ask the network at a row after all."""
        self._rows[row] = replace(self._rows[row], evaluates=True)
        return row

    def time(self, row: int) -> Weight:
        """Time of a row."""
        return self._rows[row].t

    def paste(
        self, source: int, rows: Sequence[Row], spans: Sequence[Span | None], *, evaluates: bool, node: int
    ) -> int:
        """Lay rows that are complete, and count from a start that is `source`; the last settles `node`."""
        first = len(self._rows) - 1
        draws = [self.draw(span) for span in spans]
        for row in rows:
            x, d = (tuple((first + k if k else source, w) for k, w in terms) for terms in (row.x, row.d))
            self._rows.append(replace(row, x=x, d=d, z=tuple((draws[k], w) for k, w in row.z), node=None))
        self._rows[-1] = replace(self._rows[-1], evaluates=evaluates, node=node)
        return len(self._rows) - 1

    def plan(self, name: str = "", order: int | None = None) -> Plan:
        """Compute all weights and return the table, folded."""
        points = self._points()
        return Plan(tuple(self.rows(points)), name, order, repr(self.sde), self.spans(points)).folded()

    def rows(self, points: Point | None = None) -> list[Row]:
        """The rows as they were laid, with their weights."""
        rows = list(self._rows)
        points = self._points() if points is None else points
        finite = _finite(points.lam)
        seen = {v: _finite(v.of(points.lam, points.t)) for v in {move.variable for move in self._moves}}
        groups: dict[Any, list[_Move]] = {}
        for move in self._moves:
            nodes = tuple(k for k in move.nodes if seen[move.variable][k]) or move.nodes[:1]
            if nodes != move.nodes:
                move = replace(move, nodes=nodes, moments=None)
            ends = (finite[move.source], finite[move.row])
            size = (len(move.nodes), len(move.draws), len(move.ends))
            key = (move.prediction, move.variable, _noisy(move.eta), move.moments, size, ends)
            groups.setdefault(key, []).append(move)
        for moves in groups.values():
            for move, row in zip(moves, self._fill(moves, points), strict=True):
                rows[move.row] = row
        return rows

    def _points(self) -> Point:
        """Time, λ, α and σ of every row, (R,) or (R, B)."""
        times = [row.t for row in self._rows]
        if any(isinstance(t, Tensor) for t in times):
            tensors = [t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64) for t in times]
            t = torch.stack(torch.broadcast_tensors(*(v.double() for v in tensors)))
        else:
            t = torch.tensor(times, dtype=torch.float64)
        flat = t.reshape(-1)
        return Point(t, *(fn(flat).reshape(t.shape) for fn in (self.sde.lam, self.sde.alpha, self.sde.sigma)))

    def _fill(self, moves: list[_Move], points: Point) -> list[Row]:
        first = moves[0]
        source, target = (points[[getattr(m, name) for m in moves]] for name in ("source", "row"))
        nodes = points[torch.tensor([m.nodes for m in moves])]
        eta = _together([m.eta for m in moves], source.t.ndim)
        W = weights(
            first.prediction,
            first.variable,
            eta,
            source,
            target,
            nodes,
            self.sde._t_of_lam,
            first.moments,
        )
        phi = transfer(first.prediction, eta, source, target)
        if first.ends:
            ends = [source, *(points[[m.ends[i] for m in moves]] for i in range(len(first.ends)))]
            of = first.prediction
            stds = [spread(of, eta, a, b) * transfer(of, eta, b, target) for a, b in pairwise(ends)]
        else:
            stds = [spread(first.prediction, eta, source, target)] * len(first.draws)
        std = torch.stack(stds, 1) if stds else phi.new_zeros(len(moves), 0, *phi.shape[1:])
        of_d = W * first.prediction.q(nodes.alpha, nodes.sigma)
        of_x = W * first.prediction.p(nodes.alpha, nodes.sigma)
        if first.prediction is DATA:
            of_x = torch.zeros_like(of_x)
        _check_finite(first, source, target, phi, std.sum(1), of_x.sum(1), of_d.sum(1))
        one = torch.zeros_like(phi)
        if first.prediction.offset is not None:
            one = constant(first.prediction, eta, source, target, nodes, W)
        plain = phi.ndim == 1 and not any(isinstance(w, Tensor) for m in moves for w in (self._rows[m.row].t, m.eta))
        if plain:
            columns = [v.tolist() for v in (phi, of_x, of_d, std, one)]
        else:
            columns = [list(phi), *([list(w) for w in v] for v in (of_x, of_d, std)), list(one)]
        return [
            self._row(
                move, factor, list(zip(move.nodes, wx, strict=True)), list(zip(move.nodes, wd, strict=True)), s, c
            )
            for move, factor, wx, wd, s, c in zip(moves, *columns, strict=True)
        ]

    def _row(self, move: _Move, phi: Weight, of_x: list[Any], of_d: list[Any], std: list[Any], one: Weight) -> Row:
        x: dict[int, Weight] = {move.source: phi}
        if move.prediction is not DATA:
            for k, w in of_x:
                x[k] = x[k] + w if k in x else w
        z = tuple((k, factor * w) for (k, factor), w in zip(move.draws, std, strict=True))
        kept = tuple((k, w) for k, w in x.items() if bool((w.detach() != 0).any() if isinstance(w, Tensor) else w))
        constant_term = one if move.prediction.offset is not None else 0.0
        return replace(self._rows[move.row], x=kept, d=tuple(of_d), z=z, one=constant_term)


def _clock(kappa: float) -> str:
    return f"exp({2 * kappa!r} lam)"


def _close(a: Weight, b: Weight) -> bool:
    """Whether two times are one but for rounding, for any sample."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return math.isclose(a, b, rel_tol=1e-9)
    u, v = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    return bool(((u - v).abs() <= 1e-9 * v.abs()).any())


def _noisy(eta: Weight) -> bool:
    return isinstance(eta, Tensor) or eta > 0


def _together(etas: list[Weight], ndim: int) -> Weight:
    """One number for all legs, or a tensor of one for each."""
    if not any(isinstance(eta, Tensor) for eta in etas) and len(set(etas)) == 1:
        return etas[0]
    eta = torch.stack(torch.broadcast_tensors(*(torch.as_tensor(e, dtype=torch.float64) for e in etas)))
    return eta[:, None] if eta.ndim < ndim else eta


def _finite(values: Tensor) -> list[bool]:
    """Whether each row of (R,) or (R, B) is finite."""
    seen: list[bool] = values.detach().isfinite().reshape(len(values), -1).all(1).tolist()
    return seen


def _check_finite(move: _Move, s: Point, t: Point, *coefficients: Tensor) -> None:
    good = torch.stack([c.detach().isfinite() for c in coefficients]).all(0)
    if not bool(good.all()):
        i = tuple((~good).nonzero()[0].tolist())
        why = (
            "it starts at σ = 0, where the flow has no speed; start at a positive time such as `sde.t_min`"
            if bool(s.sigma[i] == 0)
            else "noise cannot be added while solving towards noise; take eta = 0, or let the leg diffuse instead"
            if _noisy(move.eta) and bool(t.t[i] > s.t[i])
            else "with a grid a sample, let all samples start where α = 0 or end where σ = 0 together, or none of them"
            if s.t.ndim == 2
            else f"interpolation of {move.prediction} in {move.variable} has no limit there"
        )
        start, end = (float(point.t[i].detach()) for point in (s, t))
        raise ValueError(f"the leg from t = {start:g} to {end:g} has no finite weights: {why}.")


def _is_clean(sde: SDE, t: Weight) -> bool:
    """Whether σ(t) = 0: the last step into data."""
    if isinstance(t, Tensor):
        return bool((sde.sigma(t.detach()) == 0).all())
    return t == 0 and sde.sigma(0.0) == 0


def _is_silent(sde: SDE, t: Weight) -> bool:
    """Whether α(t) = 0: nothing of the data is left."""
    if isinstance(t, Tensor):
        return bool((sde.alpha(t.detach()) == 0).all())
    return t == sde.T and sde.alpha(t) == 0
