r"""Construction of plans: a solver adds rows to a :class:`Tape`, which computes all weights together.

A row is a solver step (:meth:`Tape.move`), an exact forward step with fresh noise (:meth:`Tape.diffuse`), or any affine
combination (:meth:`Tape.append`). One call of :func:`weights` serves all solver steps of a kind.

Times are numbers, or float64 tensors if the grid needs a gradient or has one time per sample. Coefficients are float64
tensors in both cases; :meth:`Tape.plan` turns them into numbers if the times are numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.grids.grid import times_of_lam
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Row, Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import DATA, LAM, NOISE, RHO, Prediction, Variable
from scoresde.solvers.quadrature import Point, constant, noise_std, noisy, transfer, weights


@dataclass(frozen=True)
class Leg:
    """One step of a solver.

    Arguments:
        row: Row of the state at the start of the step.
        history: Evaluated rows, newest first; the first is at the time of `row`.
        t: Time at the end of the step: a number, or a float64 tensor () or (B,) if the grid is a tensor of such times.
        evaluates: Whether the network is evaluated at the new state.
        node: Index in the grid of the time `t`.
    """

    row: int
    history: list[int]
    t: Weight
    evaluates: bool
    node: int | None


class _Move(NamedTuple):
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
class _Increment:
    """The interval of one draw: its two rows, κ of the path's clock exp(2κλ), and the lap."""

    source: int
    row: int
    kappa: float
    lap: int


@checked
class Tape:
    """The rows of a plan under construction.

    Arguments:
        sde: The process.
        t: Start time: a number, a float64 tensor (), or (B,) for one grid per sample.
        evaluates: Whether the network is evaluated at the start, default True.
        grid: Times whose λ, α and σ are computed in one batch when :meth:`at` needs the first; none by default.

    Example:
        >>> import scoresde as ss
        >>> tape = Tape(ss.VP(), 1.0)
        >>> a = tape.move(0, 0.5, nodes=[0])
        >>> b = tape.move(a, 0.0, nodes=[a], evaluates=False)
        >>> tape.plan("two steps of DDIM", order=1).nfe
        2
    """

    def __init__(self, sde: SDE, t: Weight, *, evaluates: bool = True, grid: Sequence[Weight] = ()) -> None:
        if not isinstance(t, Tensor):
            check.number("t", t, at_least=0)
        self.sde = sde
        self._rows: list[Row] = [Row(t, evaluates=evaluates, node=0, note="start")]
        self._moves: list[_Move] = []
        self._appended: list[int] = []
        self._grid = list(grid)
        self._points: dict[float, tuple[Weight, Point]] = {}
        self._draws = 0
        self._laps = 0
        self._increments: dict[int, _Increment] = {}
        self._given: dict[int, Span] = {}
        self._drawn: dict[int, int] = {}

    # Times.

    @property
    def plain(self) -> bool:
        """Whether the times are numbers, so that the plan will hold numbers."""
        return not isinstance(self._rows[0].t, Tensor)

    @checked
    def time(self, row: int) -> Weight:
        """Time of a row."""
        return self._rows[row].t

    def at(self, t: Weight) -> Point:
        """Return a time with its λ, α and σ: fields `t`, `lam`, `alpha` and `sigma`, float64 tensors () or (B,)."""
        key = _key(t)
        if key not in self._points:
            times = [*self._grid, t]
            self._grid = []
            for time, point in zip(times, self._points_of(times).unbind(), strict=True):
                self._points[_key(time)] = (time, point)  # with the tensor, so that no other gets its id
        return self._points[key][1]

    def ends(self, leg: Leg) -> tuple[Point, Point]:
        """Return the two times of a step with their λ, α and σ, see :meth:`at`."""
        return self.at(self.time(leg.row)), self.at(leg.t)

    def finite(self, s: Weight, t: Weight) -> bool:
        """Whether λ is finite at both times for all samples, so that stages can lie between them."""
        return not any(self.no_noise(v) or self.no_signal(v) for v in (s, t))

    def no_noise(self, t: Weight, *, every: bool = False) -> bool:
        """Whether σ(t) = 0, the time of data, for at least one sample, or for every sample."""
        if isinstance(t, Tensor):
            zero = self.at(t).sigma == 0
            return bool(zero.all() if every else zero.any())
        return t == 0 and self.sde.sigma(0.0) == 0

    def no_signal(self, t: Weight, *, every: bool = False) -> bool:
        """Whether α(t) = 0, pure noise, for at least one sample, or for every sample."""
        if isinstance(t, Tensor):
            zero = self.at(t).alpha == 0
            return bool(zero.all() if every else zero.any())
        return t == self.sde.T and self.sde.alpha(t) == 0

    def between(self, s: Weight, t: Weight, r: float) -> Weight:
        """Return the time at the fraction r between s and t, measured in λ."""
        start = self.at(s).lam
        return self.t_of_lam(start + r * (self.at(t).lam - start))

    def t_of_lam(self, lam: Tensor) -> Weight:
        """Return the time at which λ = `lam`, in [0, T]; a number if the times of the tape are numbers."""
        return self.number(times_of_lam(self.sde, lam))

    def number(self, value: Tensor) -> Weight:
        """Return a tensor as a number if the times of the tape are numbers and it needs no gradient."""
        return float(value) if self.plain and not value.requires_grad else value

    def numbers(self, values: Tensor) -> list[Weight]:
        """Return the entries of a tensor along its first axis, as numbers where :meth:`number` does."""
        return values.tolist() if self.plain and not values.requires_grad else list(values)

    def distinct(self, rows: Sequence[int]) -> list[int]:
        """Drop each row whose time is that of an earlier one, up to rounding."""
        out: list[int] = []
        for k in rows:
            if not any(_close(self._rows[k].t, self._rows[j].t) for j in out):
                out.append(k)
        return out

    def _points_of(self, times: Sequence[Weight]) -> Point:
        """Times with their λ, α and σ, (R,) or (R, B)."""
        if any(isinstance(t, Tensor) for t in times):
            tensors = (torch.as_tensor(t, dtype=torch.float64) for t in times)
            return Point.of(self.sde, torch.stack(torch.broadcast_tensors(*tensors)))
        return Point.of(self.sde, torch.tensor(times, dtype=torch.float64))

    # Normals.

    @checked
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

    def span(self, s: Weight, t: Weight, kappa: float) -> Span:
        """Return the interval from time s to t in the clock exp(2κλ) of a Brownian path.

        Arguments:
            s: Start time.
            t: End time.
            kappa: Exponent κ: η² for data prediction, −1 for noise prediction.
        """
        start, end = (self.number((2 * kappa * self.at(v).lam.detach()).exp()) for v in (s, t))
        return Span(start, end, _clock(kappa))

    def spans(self, points: Point | None = None) -> tuple[Span | None, ...]:
        """Interval of a Brownian path for each draw, in the clock of the path; None for fresh noise."""
        if not self._increments and not self._given:
            return ()
        spans = [self._given.get(k) for k in range(self._draws)]
        if not self._increments:
            return tuple(spans)
        points = self._points_of([row.t for row in self._rows]) if points is None else points
        # If η differs between steps, no clock is exact for all of them, but one path needs one clock.
        varies = len({i.kappa for i in self._increments.values() if i.kappa > 0}) > 1
        numbers = all(not isinstance(row.t, Tensor) for row in self._rows)
        for k, i in self._increments.items():
            kappa = 1.0 if varies and i.kappa > 0 else i.kappa
            ends = (2 * kappa * points.lam[[i.source, i.row]]).exp().detach()
            a, b = ends.tolist() if numbers else ends
            spans[k] = Span(a, b, _clock(kappa), i.lap)
        return tuple(spans)

    # Rows.

    @checked
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
                no noise, if η > 0 or u is infinite there, unless the kernel of the prediction decays.
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
        nodes = self.distinct(nodes)
        random = noisy(eta)
        if (prediction.needs_signal or random) and self.no_signal(self._rows[source].t, every=True):
            prediction = DATA
        if (random or variable.infinite) and self.no_noise(t, every=True):
            if prediction.decays and not random:
                variable, moments = RHO, None
            else:
                nodes, prediction, eta, noise, through, random = nodes[:1], DATA, 0.0, (), (), False
        self._check_source(source)
        if random and noise is None:
            noise = [*((self._drawn[k], 1.0) for k in through), (self.draw(), 1.0)]
        row = self.append(t, evaluates=evaluates, node=node, note=note)
        if noise:
            self._drawn[row] = noise[-1][0]
            self._record(noise, source, row, prediction, eta)
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
                (*through, row) if through and random else (),
            )
        )
        return row

    def _check_source(self, source: int) -> None:
        if not 0 <= source < len(self._rows):
            raise ValueError(f"`source` must be the number of a row, 0 … {len(self._rows) - 1}, got {source}.")

    def _record(
        self, noise: Sequence[tuple[int, float]], source: int, row: int, prediction: Prediction, eta: Weight
    ) -> None:
        """Record the interval of each new normal: from the end of the last known normal, or `source`, to `row`."""
        for draw, _ in noise:
            if draw in self._increments:
                source = self._increments[draw].row
            elif prediction in (DATA, NOISE) and not isinstance(eta, Tensor):
                kappa = eta**2 if prediction == DATA else -1.0
                self._increments[draw] = _Increment(source, row, kappa, self._laps)

    @checked
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
        self._check_source(source)
        self._laps += span is None
        scale, std = self.sde.transition(self._rows[source].t, t)
        z = [(self.draw(span), factor * std)]
        return self.append(t, x=[(source, scale)], z=z, evaluates=evaluates, node=node, note="forward noise")

    @checked
    def append(
        self,
        t: Weight,
        *,
        x: Sequence[tuple[int, Weight]] = (),
        d: Sequence[tuple[int, Weight]] = (),
        z: Sequence[tuple[int, Weight]] = (),
        one: Weight = 0.0,
        evaluates: bool = True,
        node: int | None = None,
        note: str = "",
    ) -> int:
        """Add a row with the given terms: any affine combination of earlier rows, normals and a constant."""
        if not isinstance(t, Tensor):
            check.number("t", t, at_least=0)
        row = len(self._rows)
        self._rows.append(Row(t, tuple(x), tuple(d), tuple(z), evaluates, node, note, one))
        if x or d or z:
            self._appended.append(row)
        return row

    def paste(
        self, source: int, rows: Sequence[Row], spans: Sequence[Span | None], *, evaluates: bool, node: int
    ) -> int:
        """Append complete rows whose row 0 is `source`; the last one gets `evaluates` and `node`."""
        first = len(self._rows) - 1
        draws = [self.draw(span) for span in spans]
        for row in rows:
            last = row is rows[-1]
            x, d = (tuple((first + k if k else source, w) for k, w in terms) for terms in (row.x, row.d))
            z = tuple((draws[k], w) for k, w in row.z)
            evaluated, place = (evaluates, node) if last else (row.evaluates, None)
            self._rows.append(Row(row.t, x, d, z, evaluated, place, row.note, row.one))
        return len(self._rows) - 1

    # Plans.

    @checked
    def plan(self, name: str = "", order: int | None = None) -> Plan:
        """Compute all weights and return the folded plan."""
        points = self._points_of([row.t for row in self._rows])
        return Plan(tuple(self.rows(points)), name, order, repr(self.sde), self.spans(points)).folded()

    def rows(self, points: Point | None = None) -> list[Row]:
        """Rows with their weights, before folding."""
        rows = list(self._rows)
        points = self._points_of([row.t for row in rows]) if points is None else points
        finite = _finite(points.lam)
        usable = {v: _finite(v.of(points.lam, points.t)) for v in {move.variable for move in self._moves}}
        groups: dict[tuple[object, ...], list[_Move]] = {}
        for move in self._moves:
            nodes = tuple(k for k in move.nodes if usable[move.variable][k]) or move.nodes[:1]
            if nodes != move.nodes:
                move = move._replace(nodes=nodes, moments=None)
            ends = (finite[move.source], finite[move.row])
            size = (len(move.nodes), len(move.draws), len(move.ends))
            key = (move.prediction, move.variable, noisy(move.eta), move.moments, size, ends)
            groups.setdefault(key, []).append(move)
        for moves in groups.values():
            for move, row in zip(moves, self._fill(moves, points), strict=True):
                rows[move.row] = row
        self._as_numbers(rows)
        return rows

    def _as_numbers(self, rows: list[Row]) -> None:
        """Replace tensors in appended rows by numbers, if all times are numbers and no gradient is needed."""
        weights = [w for r in self._appended for terms in (rows[r].x, rows[r].d, rows[r].z) for _, w in terms]
        tensors = [w for w in weights if isinstance(w, Tensor) and not w.ndim and not w.requires_grad]
        if not tensors or any(isinstance(row.t, Tensor) for row in rows):
            return
        numbers = dict(zip(map(id, tensors), torch.stack(tensors).tolist(), strict=True))
        for r in self._appended:
            x, d, z = (tuple((k, numbers.get(id(w), w)) for k, w in c) for c in (rows[r].x, rows[r].d, rows[r].z))
            rows[r] = replace(rows[r], x=x, d=d, z=z)

    def _fill(self, moves: list[_Move], points: Point) -> list[Row]:
        """Rows of moves of one kind."""
        first = moves[0]
        f = first.prediction
        source, target = points[[m.source for m in moves]], points[[m.row for m in moves]]
        nodes = points[torch.tensor([m.nodes for m in moves])]
        eta = _stack_etas([m.eta for m in moves], source.t.ndim)
        W = weights(f, first.variable, eta, source, target, nodes, self.sde.inverse_lam, first.moments)
        phi = transfer(f, eta, source, target)
        ends = [source, *(points[[m.ends[i] for m in moves]] for i in range(len(first.ends)))]
        if first.ends:
            stds = [noise_std(f, eta, a, b) * transfer(f, eta, b, target) for a, b in pairwise(ends)]
        else:
            stds = [noise_std(f, eta, source, target)] * len(first.draws)
        std = torch.stack(stds, 1) if stds else phi.new_zeros(len(moves), 0, *phi.shape[1:])
        of_d = W * f.q(nodes.alpha, nodes.sigma)
        of_x = torch.zeros_like(W) if f == DATA else W * f.p(nodes.alpha, nodes.sigma)
        _check_finite(first, source, target, phi, std.sum(1), of_x.sum(1), of_d.sum(1))
        one = torch.zeros_like(phi) if f.offset is None else constant(f, eta, source, target, nodes, W)
        columns = (phi, of_x, of_d, std, one)
        if any(v.requires_grad for v in columns) or any(isinstance(self._rows[m.row].t, Tensor) for m in moves):
            lists = [list(phi), *([list(w) for w in v] for v in (of_x, of_d, std)), list(one)]
        else:
            lists = [v.tolist() for v in columns]
        return [self._row(*values) for values in zip(moves, *lists, strict=True)]

    def _row(
        self, move: _Move, phi: Weight, of_x: list[Weight], of_d: list[Weight], std: list[Weight], one: Weight
    ) -> Row:
        x = {move.source: phi}
        if move.prediction != DATA:
            for k, w in zip(move.nodes, of_x, strict=True):
                x[k] = x[k] + w if k in x else w
        row = self._rows[move.row]
        return Row(
            row.t,
            x=tuple((k, w) for k, w in x.items() if (bool((w != 0).any()) if isinstance(w, Tensor) else w)),
            d=tuple(zip(move.nodes, of_d, strict=True)),
            z=tuple((k, factor * w) for (k, factor), w in zip(move.draws, std, strict=True)),
            evaluates=row.evaluates,
            node=row.node,
            note=row.note,
            one=0.0 if move.prediction.offset is None else one,
        )


def _key(t: Weight) -> float:
    return id(t) if isinstance(t, Tensor) else t


def _clock(kappa: float) -> str:
    return f"exp({2 * kappa!r} lam)"


def _close(a: Weight, b: Weight) -> bool:
    """Whether two times are equal up to rounding, for any sample."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return math.isclose(a, b, rel_tol=1e-9)
    u, v = (torch.as_tensor(t, dtype=torch.float64).detach() for t in (a, b))
    return bool(((u - v).abs() <= 1e-9 * v.abs()).any())


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
            if noisy(move.eta) and bool(t.t[i] > s.t[i])
            else "with one grid per sample, all samples or none must start at α = 0, and all or none must end at σ = 0"
            if s.t.ndim == 2
            else f"interpolation of {move.prediction} in {move.variable} has no limit there; change one of the two"
        )
        start, end = (float(point.t[i].detach()) for point in (s, t))
        raise ValueError(f"the step from t = {start:g} to {end:g} has no finite weights: {why}.")
