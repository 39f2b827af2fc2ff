r"""Construction of plans: a solver adds rows to a :class:`Tape`, which computes all weights together.

A row is a solver step (:meth:`Tape.move`), an exact forward step with fresh noise (:meth:`Tape.diffuse`), or any affine
combination (:meth:`Tape.append`). One call of :func:`weights` serves all solver steps of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scoresde.noise.brownian import Span
from scoresde.plan.rows import Row, Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import DATA, LAM, NOISE, Prediction, Variable
from scoresde.solvers.quadrature import Point, constant, spread, transfer, weights


@dataclass(frozen=True)
class _Move:
    """A solver step, before its weights are computed."""

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
    """The step whose noise is one draw: its two rows, κ of the path's clock exp(2κλ), and the lap."""

    source: int
    row: int
    kappa: float
    lap: int


class Tape:
    """The rows of a plan under construction.

    Arguments:
        sde: The process.
        t: Start time: a number, a float64 tensor (), or (B,) for one grid per sample.
        evaluates: Whether the network is evaluated at the start, default True.

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
        """Return the index of a new normal; it may be the increment of a Brownian path over `span`."""
        if span is not None:
            self._given[self._draws] = replace(span, lap=self._laps)
        self._draws += 1
        return self._draws - 1

    @property
    def draws(self) -> int:
        """Number of normals."""
        return self._draws

    def along(self, s: Weight, t: Weight, kappa: float) -> Span:
        """Interval from time s to t in the clock exp(2κλ): κ is η² for data prediction and −1 for noise prediction."""
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
        """Add a solver step from row `source` to time `t`.

        Arguments:
            source: Row of the state at the start of the step.
            t: Target time.
            nodes: Rows whose predictions are interpolated, nearest first. Nodes at an infinite u, or at the time of a
                nearer node, are dropped. In a step to σ = 0, only the nearest node is used, with data prediction and
                no noise, if η > 0 or u is infinite there.
            evaluates: Whether the network is evaluated at the new state, default True.
            prediction: Prediction to interpolate. In a step from α = 0, data prediction replaces noise prediction; if
                η > 0, it replaces every prediction.
            variable: Variable of the interpolating polynomial.
            eta: Noise level η of the step: a number, a float64 tensor (), or (B,) for one per sample.
            moments: Moments of the kernel, see :func:`weights`.
            noise: Pairs (draw, factor); the factors multiply the standard deviation. The default is one new draw if
                η > 0.
            through: Rows of stages inside this step, in time order, whose normals are used again: each covers the part
                of the step that ends at its stage, and a new normal covers the last part.
            node: Index of the grid time whose final state the new row is.
            note: Label for printing.

        Returns:
            Index of the new row.
        """
        if not nodes:
            raise ValueError("`nodes` must hold at least one evaluated row, got none; use `nodes=[source]`.")
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
        """Record the interval of each new normal: from the end of the last known normal, or `source`, to `row`."""
        for draw, _ in noise:
            if draw in self._legs:
                source = self._legs[draw].row
            elif prediction in (DATA, NOISE) and not isinstance(eta, Tensor):
                self._legs[draw] = _Leg(source, row, eta**2 if prediction is DATA else -1.0, self._laps)

    def spans(self, points: Point | None = None) -> tuple[Span | None, ...]:
        """Interval of a Brownian path for each draw, in the clock of the path; None for fresh noise."""
        if not self._legs and not self._given:
            return ()
        points = self._points() if points is None else points
        plain = points.t.ndim == 1 and not any(isinstance(row.t, Tensor) for row in self._rows)
        spans = [self._given.get(k) for k in range(self._draws)]
        # If η differs between steps, no clock is exact for all of them, but one path needs one clock.
        varies = len({leg.kappa for leg in self._legs.values() if leg.kappa > 0}) > 1
        for k, leg in self._legs.items():
            kappa = 1.0 if varies and leg.kappa > 0 else leg.kappa
            ends = (2 * kappa * points.lam[[leg.source, leg.row]]).exp().detach()
            a, b = ends.tolist() if plain else ends
            spans[k] = Span(a, b, _clock(kappa), leg.lap)
        return tuple(spans)

    def _apart(self, nodes: Sequence[int]) -> list[int]:
        distinct: list[int] = []
        for k in nodes:
            if not any(_close(self._rows[k].t, self._rows[j].t) for j in distinct):
                distinct.append(k)
        return distinct

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
        """Add an exact forward step up to time t, with the standard deviation of the noise multiplied by `factor`.

        With a `span` the noise is the increment of the path over it; without one, a new lap of the path begins.
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
        """Add a row with the given terms: any affine combination of earlier rows and normals."""
        self._rows.append(Row(t, tuple(x), tuple(d), tuple(z), evaluates, node, note))
        return len(self._rows) - 1

    def evaluate(self, row: int) -> int:
        """Evaluate the network at an existing row, and return the row."""
        self._rows[row] = replace(self._rows[row], evaluates=True)
        return row

    def time(self, row: int) -> Weight:
        """Time of a row."""
        return self._rows[row].t

    def paste(
        self, source: int, rows: Sequence[Row], spans: Sequence[Span | None], *, evaluates: bool, node: int
    ) -> int:
        """Append complete rows whose row 0 is `source`; the last one gets `evaluates` and `node`."""
        first = len(self._rows) - 1
        draws = [self.draw(span) for span in spans]
        for row in rows:
            x, d = (tuple((first + k if k else source, w) for k, w in terms) for terms in (row.x, row.d))
            self._rows.append(replace(row, x=x, d=d, z=tuple((draws[k], w) for k, w in row.z), node=None))
        self._rows[-1] = replace(self._rows[-1], evaluates=evaluates, node=node)
        return len(self._rows) - 1

    def plan(self, name: str = "", order: int | None = None) -> Plan:
        """Compute all weights and return the folded plan."""
        points = self._points()
        return Plan(tuple(self.rows(points)), name, order, repr(self.sde), self.spans(points)).folded()

    def rows(self, points: Point | None = None) -> list[Row]:
        """Rows with their weights, before folding."""
        rows = list(self._rows)
        points = self._points() if points is None else points
        finite = _finite(points.lam)
        usable = {v: _finite(v.of(points.lam, points.t)) for v in {move.variable for move in self._moves}}
        groups: dict[Any, list[_Move]] = {}
        for move in self._moves:
            nodes = tuple(k for k in move.nodes if usable[move.variable][k]) or move.nodes[:1]
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
        eta = _stack_etas([m.eta for m in moves], source.t.ndim)
        W = weights(
            first.prediction,
            first.variable,
            eta,
            source,
            target,
            nodes,
            self.sde.inverse_lam,
            first.moments,
        )
        phi = transfer(first.prediction, eta, source, target)
        if first.ends:
            ends = [source, *(points[[m.ends[i] for m in moves]] for i in range(len(first.ends)))]
            f = first.prediction
            stds = [spread(f, eta, a, b) * transfer(f, eta, b, target) for a, b in pairwise(ends)]
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
        states = tuple((k, w) for k, w in x.items() if bool((w.detach() != 0).any() if isinstance(w, Tensor) else w))
        constant_term = one if move.prediction.offset is not None else 0.0
        return replace(self._rows[move.row], x=states, d=tuple(of_d), z=z, one=constant_term)


def _clock(kappa: float) -> str:
    return f"exp({2 * kappa!r} lam)"


def _close(a: Weight, b: Weight) -> bool:
    """Whether two times are equal up to rounding, for any sample."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return math.isclose(a, b, rel_tol=1e-9)
    u, v = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    return bool(((u - v).abs() <= 1e-9 * v.abs()).any())


def _noisy(eta: Weight) -> bool:
    return isinstance(eta, Tensor) or eta > 0


def _stack_etas(etas: list[Weight], ndim: int) -> Weight:
    """One η for all steps, or a tensor with one entry per step."""
    if not any(isinstance(eta, Tensor) for eta in etas) and len(set(etas)) == 1:
        return etas[0]
    eta = torch.stack(torch.broadcast_tensors(*(torch.as_tensor(e, dtype=torch.float64) for e in etas)))
    return eta[:, None] if eta.ndim < ndim else eta


def _finite(values: Tensor) -> list[bool]:
    """Whether each row of (R,) or (R, B) is finite."""
    finite: list[bool] = values.detach().isfinite().reshape(len(values), -1).all(1).tolist()
    return finite


def _check_finite(move: _Move, s: Point, t: Point, *coefficients: Tensor) -> None:
    good = torch.stack([c.detach().isfinite() for c in coefficients]).all(0)
    if not bool(good.all()):
        i = tuple((~good).nonzero()[0].tolist())
        why = (
            "it starts at σ = 0, where the velocity is undefined; start at a positive time such as `sde.t_min`"
            if bool(s.sigma[i] == 0)
            else "a solver step towards noise cannot add noise; set `eta` = 0, or use `up='diffuse'`"
            if _noisy(move.eta) and bool(t.t[i] > s.t[i])
            else "with one grid per sample, all samples or none must start at α = 0, and all or none must end at σ = 0"
            if s.t.ndim == 2
            else f"interpolation of {move.prediction} in {move.variable} has no limit there; change one of the two"
        )
        start, end = (float(point.t[i].detach()) for point in (s, t))
        raise ValueError(f"the step from t = {start:g} to {end:g} has no finite weights: {why}.")


def _is_clean(sde: SDE, t: Weight) -> bool:
    """Whether σ(t) = 0: no noise is left."""
    if isinstance(t, Tensor):
        return bool((sde.sigma(t.detach()) == 0).all())
    return t == 0 and sde.sigma(0.0) == 0


def _is_silent(sde: SDE, t: Weight) -> bool:
    """Whether α(t) = 0: no data is left."""
    if isinstance(t, Tensor):
        return bool((sde.alpha(t.detach()) == 0).all())
    return t == sde.T and sde.alpha(t) == 0
