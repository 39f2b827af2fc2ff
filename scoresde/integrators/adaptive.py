r"""Error control with a step of its own for every sample.

Each sample has its own time and its own step; all take their steps together, one batched call of the network at a time,
and leave the batch when they arrive. What a sample becomes, and what it costs, does not depend on its neighbours.

A step's error e is measured in units of the tolerance, as a root mean square over the numbers of a sample,

.. math:: E = \left\|\frac{e}{\mathrm{atol} + \mathrm{rtol}\,\max(|y_s|, |y_t|)}\right\|, \qquad
          h' = \kappa\, h\, E_n^{-\beta_1/q} E_{n-1}^{-\beta_2/q} E_{n-2}^{-\beta_3/q},

with :math:`(\beta_1, \beta_2, \beta_3) = (P + I + D, -(P + 2D), D)`. Times, steps and weights are float64 on the CPU;
the norms are read back from the device once a step, and nothing else is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.distributed import refuse_ddp
from scoresde.integrators.embedded import Adams, Frame, Pair, Past, State, Weigh, advance, beside, polynomial

Field = Callable[[Tensor, State, "Tensor | None"], State]
"""Slopes ``field(u, y, rows)``: u (b,) float64 on the CPU, y of b rows, `rows` which samples they are, None for all."""

_LEAST, _MOST = 0.2, 4.0  # how much a step may change

_ENOUGH = 1e-14  # a step this small, relative to the clock, goes nowhere

_BROKEN = 1e-6  # and one this small that is still not finite will not be


class SolverError(RuntimeError):
    """A solve that cannot go on.

    Arguments:
        reason: What happened.
        t: Time that the worst sample had reached.
        dt: The step it tried.
        nfe: Evaluations spent on it.
        worst_sample: Its number in the batch.
        finite: Whether its slopes were finite.
    """

    def __init__(self, reason: str, *, t: float, dt: float, nfe: int, worst_sample: int, finite: bool) -> None:
        super().__init__(
            f"{reason} Sample {worst_sample} was at t = {t:g}, tried a step of {dt:.3g} and had spent {nfe} "
            f"evaluations; its slopes were {'' if finite else 'not '}finite."
        )
        self.t = t
        self.dt = dt
        self.nfe = nfe
        self.worst_sample = worst_sample
        self.finite = finite


@dataclass(frozen=True)
class Adaptive:
    """A rule that chooses its own steps: hand it to ``ss.solve``, ``ss.sample``, ``ss.encode`` or ``ss.decode``.

    Arguments:
        pair: What a step is. The default evaluates the network once a step.
        rtol: Tolerance relative to the size of a number, for each step.
        atol: Absolute tolerance for each step, in units of x/(α + σ): those of data at data, of noise at noise.
        max_nfe: Evaluations that a sample may spend.
        on_limit: ``"raise"`` a :class:`SolverError` there, or ``"return"`` what there is: the rest of the way is taken
            in one step of first order, and the solution's ``finished`` says for whom it was not needed.
        pid: Gains (P, I, D) of the control; (0, 1, 0) is the elementary one.
        safety: Factor κ on every new step.
        first_step: First step in the pair's clock, by default found at the price of one evaluation.
        dense: Keep every step, so that the solution can be asked at any time; two states for each step.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> solution = ss.solve(mix, (4, 1), ss.Adaptive(rtol=1e-3, atol=1e-3), seed=0)
        >>> solution.x.shape, bool(solution.stats.finished.all())
        (torch.Size([4, 1]), True)

    References:
        | Digital filters in adaptive time-stepping (Söderlind, 2003)
        | torchode: A Parallel ODE Solver for PyTorch (Lienen & Günnemann, 2022), arXiv:2210.12375
    """

    pair: Pair = field(default_factory=Adams)
    rtol: float = 1e-3
    atol: float = 1e-3
    max_nfe: int = 1000
    on_limit: str = "raise"
    pid: tuple[float, float, float] = (0.2, 0.7, 0.0)
    safety: float = 0.8
    first_step: float | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.pair, Pair):
            raise TypeError(f"`pair` must be a pair such as pairs.Adams() or pairs.DPM23(), got {self.pair!r:.80}.")
        check.number("rtol", self.rtol, at_least=0)
        check.number("atol", self.atol, at_least=0)
        if self.rtol + self.atol == 0:
            raise ValueError("`rtol` and `atol` must not both be 0: no step has no error.")
        check.integer("max_nfe", self.max_nfe, at_least=1)
        check.choice("on_limit", self.on_limit, ("raise", "return"))
        if len(self.pid) != 3:
            raise ValueError(f"`pid` must be three gains (P, I, D), got {self.pid}.")
        check.number("safety", self.safety, above=0, at_most=1)
        if self.first_step is not None:
            check.number("first_step", self.first_step, above=0)


@dataclass(frozen=True)
class Stats:
    """What each sample cost, tensors (B,) on the CPU.

    Arguments:
        steps: Steps taken.
        rejected: Steps tried in vain.
        nfe: Evaluations spent.
        finished: Whether it arrived within ``max_nfe``.
    """

    steps: Tensor
    rejected: Tensor
    nfe: Tensor
    finished: Tensor


@dataclass(frozen=True, eq=False)
class Path:
    """A solution between its steps: the polynomial through values and slopes of the m nodes around.

    Its local error is as h^{2m}; a method of order p has as many nodes as keep its order.

    Arguments:
        u: Nodes of each sample in the order they were reached, (n, B); NaN after its last.
        place: Where the node is in `y` and `f`, (n, B).
        y: States at nodes, (N, *event).
        f: Slopes at nodes, (N, *event).
        nodes: How many to use.
        rate: dy/du in units of f, at u.
        frame: How x and t are made of y and u, if they are.
    """

    u: Tensor
    place: Tensor
    y: Tensor
    f: Tensor
    nodes: int
    rate: Callable[[Tensor], Tensor]
    frame: Frame | None = None

    def __call__(self, t: float | Tensor) -> Tensor:
        """The state at time t, a number or (B,), inside the interval that was solved."""
        if self.frame is None:
            raise ValueError("this path is of a plain equation, which has a clock and no time; use `at`.")
        B = self.u.shape[1]
        at = self.frame.u(check.time(t, self.frame.sde.T).to("cpu", torch.float64).expand(B))
        y = self.at(at)
        scale = beside(self.frame.scale(at), y)
        return y * scale.reshape(-1, *[1] * (y.ndim - 1))

    def at(self, u: Tensor) -> Tensor:
        """The state y at clock u, (B,)."""
        count = self.u.isfinite().sum(0)
        last = self.u.gather(0, (count - 1)[None])[0]
        sign = (last - self.u[0]).sign()
        slack = 1e-9 * (1 + self.u[0].abs())
        beyond = ((u - last) * sign > slack) | ((self.u[0] - u) * sign > slack)
        if bool(beyond.any()):
            i = int(beyond.nonzero()[0, 0])
            raise ValueError(
                f"the path of sample {i} runs from u = {float(self.u[0, i]):g} to {float(last[i]):g}, "
                f"not to {float(u[i]):g}."
            )
        k = ((u - self.u) * sign >= 0).sum(0).sub(1).clamp_min(0)
        k = torch.minimum(k, (count - 2).clamp_min(0))
        first = k - (self.nodes - 2) // 2
        if self.nodes % 2:  # the odd node is the nearer one
            rows = torch.arange(len(k))
            before, after = (k - 1).clamp_min(0), torch.minimum(k + 2, count - 1)
            first = first - ((u - self.u[before, rows]).abs() < (u - self.u[after, rows]).abs()).long()
        first = torch.minimum(first, count - self.nodes).clamp_min(0)
        index = torch.minimum(first + torch.arange(self.nodes)[:, None], count - 1)
        of_y, of_f = _hermite(self.u.gather(0, index), u)
        of_f = of_f * self.rate(self.u.gather(0, index))
        place = self.place.gather(0, index)
        out: Any = 0.0
        for where, a, b in zip(place.to(self.y.device), of_y, of_f, strict=True):
            wide = (-1, *[1] * (self.y.ndim - 1))
            out = (
                out + beside(a, self.y).reshape(wide) * self.y[where] + beside(b, self.y).reshape(wide) * self.f[where]
            )
        return out  # type: ignore[no-any-return]


def _hermite(nodes: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of values and of slopes in the polynomial that takes both at `nodes`, (m, B); twins count once."""
    m = len(nodes)
    same = torch.stack(
        [(nodes[:i] == nodes[i]).any(0) if i else torch.zeros_like(u, dtype=torch.bool) for i in range(m)]
    )
    of_y, of_f = [], []
    for i in range(m):
        basis, slope = torch.ones_like(u), torch.zeros_like(u)
        for j in range(m):
            if j != i:
                gap = torch.where(same[j] | same[i], 1.0, nodes[i] - nodes[j])
                basis = basis * torch.where(same[j], 1.0, (u - nodes[j]) / gap)
                slope = slope + torch.where(same[j], 0.0, 1 / gap)
        square = torch.where(same[i], 0.0, basis**2)
        of_y.append(square * (1 - 2 * slope * (u - nodes[i])))
        of_f.append(square * (u - nodes[i]))
    return torch.stack(of_y), torch.stack(of_f)


@dataclass(frozen=True, eq=False)
class Run:
    """What :func:`integrate` returns.

    Arguments:
        y: The state where each sample got to.
        u: Where that is, (B,): the end, unless the limit was reached.
        f: Slopes at the newest two nodes, the newest first.
        nodes: Where those are, (2, B); NaN where there is none.
        calls: Calls of the field.
        stats: What each sample cost.
        path: The solution of ``y[0]`` between, if it was asked for.
    """

    y: State
    u: Tensor
    f: tuple[State, State]
    nodes: Tensor
    calls: int
    stats: Stats
    path: Path | None


def integrate(
    field: Field,
    y: Tensor | State,
    start: float | Tensor,
    end: float | Tensor,
    rule: Adaptive,
    *,
    weigh: Weigh = polynomial,
    unit: Callable[[Tensor], Tensor] | None = None,
    frame: Frame | None = None,
) -> Run:
    """Integrate dy/du = field(u, y, rows) with error control for each sample, in either direction.

    Arguments:
        field: The slopes, see :data:`Field`: a tuple as long as the state.
        y: A tensor (B, ...), or several that go together, of which the first alone steers the steps.
        start: Where to start, a number or (B,).
        end: Where to end, likewise.
        rule: Pair, tolerances and limits.
        weigh: Weights of slopes, where a step is not their plain integral.
        unit: What a y of size one is worth in units of the tolerance, at u; by default 1.
        frame: Of a process: lets errors and the path speak of times.
    """
    loop = _Loop(field, (y,) if isinstance(y, Tensor) else tuple(y), start, end, rule, weigh, unit, frame)
    while len(loop.rows):
        loop.step()
    return loop.result()


class _Loop:
    """The samples on their way; tensors (b,) on the CPU beside states of b rows."""

    def __init__(
        self,
        field: Field,
        y: State,
        start: float | Tensor,
        end: float | Tensor,
        rule: Adaptive,
        weigh: Weigh,
        unit: Callable[[Tensor], Tensor] | None,
        frame: Frame | None,
    ) -> None:
        first = check.state("y", y[0])
        least = 8 * torch.finfo(first.dtype).eps
        if rule.rtol + rule.atol < least:
            raise ValueError(
                f"`rtol` + `atol` must be at least {least:.1e} for a state of {str(first.dtype)[6:]}, got "
                f"{rule.rtol + rule.atol:g}; use a float64 state."
            )
        self.field, self.rule, self.weigh, self.unit, self.frame = field, rule, weigh, unit, frame
        self.pair = rule.pair
        self.size = B = len(first)
        self.y = y
        self.u, self.end = (
            torch.as_tensor(v, dtype=torch.float64, device="cpu").expand(B).clone() for v in (start, end)
        )
        self.sign = (self.end - self.u).sign()
        self.rows = torch.arange(B)
        self.calls = 0
        self.e = torch.ones(2, B, dtype=torch.float64)
        steps, rejected, nfe = torch.zeros(3, B, dtype=torch.long)
        self.stats = Stats(steps, rejected, nfe, torch.zeros(B, dtype=torch.bool))
        self.done: list[tuple[Tensor, State, Tensor, Past]] = []
        self.record: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        if B == 0:
            self.past = Past([self.u] * 2, [y] * 2, torch.zeros(0, dtype=torch.long))
            return
        f = self.ask(self.u, y)
        self.memory = max(2, self.pair.memory)
        self.past = Past([self.u] * self.memory, [f] * self.memory, torch.ones(B, dtype=torch.long))
        self.note(torch.ones(B, dtype=torch.bool))
        self.h = self.first_step(f)
        self.leave(self.u == self.end)

    def ask(self, u: Tensor, y: State, rows: Tensor | None = None) -> State:
        """Slopes of some of the samples, by default of all that are on their way."""
        self.calls += 1
        rows = self.rows if rows is None else rows
        self.stats.nfe[rows] += 1
        f = self.field(u, y, rows.to(y[0].device, non_blocking=True) if len(rows) < self.size else None)
        f = (f,) if isinstance(f, Tensor) else f
        if len(f) != len(y) or any(a.shape != b.shape for a, b in zip(f, y, strict=True)):
            raise ValueError(
                f"`field` must return slopes of the shapes of the state, {[tuple(a.shape) for a in y]}, got "
                f"{[tuple(a.shape) for a in f]}."
            )
        return f

    def tolerance(self, u: Tensor, *sizes: Tensor) -> Tensor:
        """atol + rtol max |y|, in units of y."""
        atol = torch.full_like(u, self.rule.atol)
        if self.unit is not None:
            atol = atol / self.unit(u)
        y = sizes[0].abs()
        for other in sizes[1:]:
            y = torch.maximum(y, other.abs())
        return y.mul_(self.rule.rtol).add_(_wide(beside(atol, y), y))

    def first_step(self, f: State) -> Tensor:
        """Hairer's guess: from the sizes of the state, of its slope, and of the change of that over a small step."""
        far = (self.end - self.u).abs()
        if self.rule.first_step is not None:
            return torch.full_like(far, self.rule.first_step).minimum(far)
        with torch.no_grad():
            y0, f0 = self.y[0].detach(), f[0].detach()
            tol = self.tolerance(self.u, y0)
            pace = float(self.rate(self.u).abs().mean())
            d0, d1 = _back(_rms(y0 / tol), pace * _rms(f0 / tol))
            self.refuse(~d1.isfinite(), "The slope at the start is not finite.", torch.zeros_like(far))
            h = torch.where(d1 > 1e-10, 0.01 * d0 / d1, 1e-3 * far).clamp_min(1e-8).minimum(0.01 * far)
            step = torch.where(h > 0, self.u + self.sign * h, self.u)
            small = advance(self.y, self.weigh(self.u, step, self.u[None]), [f])
            f1 = self.ask(step, small)[0].detach()
            (d2,) = _back(_rms((f1 - f0) / tol))
        d2 = pace * d2 / h.clamp_min(1e-300)
        power = 2 if self.pair.memory > 1 else self.pair.order
        guess = (0.01 / torch.maximum(d1, d2).clamp_min(1e-15)) ** (1 / power)
        return torch.minimum(torch.minimum(100 * h, guess), far)

    def rate(self, u: Tensor) -> Tensor:
        """dy/du in units of the slope."""
        return torch.ones_like(u) if self.frame is None else self.frame.rate(u)

    def step(self) -> None:
        """All samples try a step; those that arrive, or may spend no more, leave."""
        s, pair, rule = self.u, self.pair, self.rule
        if self.limit():
            return
        left = (self.end - s).abs()
        h = torch.where(left < 1.1 * self.h, left, torch.where(left < 2 * self.h, left / 2, self.h))
        t = torch.where(h >= left, self.end, s + self.sign * h)
        y, f, error, power = pair.attempt(self.ask, self.weigh, s, t, self.y, self.past)
        with torch.no_grad():
            ratio = _rms(error.detach() / self.tolerance(t, self.y[0].detach(), y[0].detach()))
            (E,) = _back(ratio)
        E = torch.where(E.isfinite(), E, math.inf)
        ok = E <= 1
        self.refuse(
            ~ok & (h <= torch.where(E.isfinite(), _ENOUGH, _BROKEN) * torch.maximum(s.abs(), self.end.abs())),
            "The step became too small: the tolerance cannot be met.",
            t - s,
            E.isfinite(),
        )
        p, i, d = rule.pid
        E = E.clamp_min(1e-10)
        after = E ** (-(p + i + d) / power) * self.e[0] ** ((p + 2 * d) / power) * self.e[1] ** (-d / power)
        again = (rule.safety * E ** (-1 / power)).clamp(_LEAST, 0.9)
        self.h = h * torch.where(ok, (rule.safety * after).clamp(_LEAST, _MOST), again)
        self.e = torch.where(ok, torch.stack([E, self.e[0]]), self.e)
        self.stats.steps[self.rows[ok]] += 1
        self.stats.rejected[self.rows[~ok]] += 1
        self.take(ok, t, y, f)
        self.note(ok)
        self.leave(ok & (t == self.end))

    def take(self, ok: Tensor, t: Tensor, y: State, f: State | None) -> None:
        """Move the samples whose step was good."""
        if not bool(ok.any()):
            return
        every = bool(ok.all())
        if f is None:
            if every:
                f = self.ask(t, y)
            else:
                good = ok.nonzero()[:, 0]
                at = good.to(y[0].device, non_blocking=True)
                part = self.ask(t[good], tuple(v[at] for v in y), self.rows[good])
                f = tuple(old.index_copy(0, at, new) for old, new in zip(self.past.f[0], part, strict=True))
        where = ok.to(y[0].device, non_blocking=True)

        def choose(new: State, old: State) -> State:
            if every:
                return new
            return tuple(torch.where(_wide(where, a), a, b) for a, b in zip(new, old, strict=True))

        past = self.past
        self.past = Past(
            [torch.where(ok, a, b) for a, b in zip([t, *past.u[:-1]], past.u, strict=True)],
            [choose(a, b) for a, b in zip([f, *past.f[:-1]], past.f, strict=True)],
            torch.where(ok, (past.count + 1).clamp_max(self.memory), past.count),
        )
        self.y = choose(y, self.y)
        self.u = torch.where(ok, t, self.u)

    def note(self, ok: Tensor) -> None:
        """Keep the new nodes for the path."""
        if self.rule.dense and bool(ok.any()):
            at = ok.nonzero()[:, 0]
            there = at.to(self.y[0].device, non_blocking=True)
            self.record.append((self.rows[at], self.u[at], self.y[0][there], self.past.f[0][0][there]))

    def limit(self) -> bool:
        """Whether every sample had to leave; those that may spend no more do, or raise."""
        over = self.stats.nfe[self.rows] + self.pair.calls > self.rule.max_nfe
        if not bool(over.any()):
            return False
        if self.rule.on_limit == "raise":
            self.refuse(over, f"`max_nfe` = {self.rule.max_nfe} evaluations were not enough.", self.sign * self.h)
        self.leave(over)
        return not len(self.rows)

    def leave(self, who: Tensor) -> None:
        """Samples leave the batch."""
        if not bool(who.any()):
            return
        self.stats.finished[self.rows[who]] = self.u[who] == self.end[who]
        self.done.append(self.part(who))
        stay = ~who
        if not bool(stay.any()):
            self.rows = self.rows[:0]
            return
        self.rows, self.y, self.u, self.past = self.part(stay)
        self.end, self.sign, self.h, self.e = self.end[stay], self.sign[stay], self.h[stay], self.e[:, stay]

    def part(self, who: Tensor) -> tuple[Tensor, State, Tensor, Past]:
        """The chosen rows of everything."""
        if bool(who.all()):
            return self.rows, self.y, self.u, self.past
        at = who.nonzero()[:, 0]
        there = at.to(self.y[0].device, non_blocking=True)
        past = Past(
            [u[at] for u in self.past.u],
            [tuple(v[there] for v in f) for f in self.past.f],
            self.past.count[at],
        )
        return self.rows[at], tuple(v[there] for v in self.y), self.u[at], past

    def refuse(self, bad: Tensor, reason: str, dt: Tensor, finite: Tensor | None = None) -> None:
        """Raise about the first of the bad samples."""
        if not bool(bad.any()):
            return
        i = int(bad.nonzero()[0, 0])
        here, there = self.u[i : i + 1], self.u[i : i + 1] + dt[i]
        if self.frame is not None:
            here, there = self.frame.t(here), self.frame.t(there)
        row = int(self.rows[i])
        known = finite is not None
        slopes = bool(finite[i]) if known and finite is not None else bool(self.past.f[0][0][i].isfinite().all())
        raise SolverError(
            reason,
            t=float(here),
            dt=float(there - here),
            nfe=int(self.stats.nfe[row]),
            worst_sample=row,
            finite=slopes,
        )

    def result(self) -> Run:
        """Everybody back in order."""
        if not self.done:
            self.done.append((self.rows, self.y, self.u, self.past))
        order = torch.cat([rows for rows, *_ in self.done]).argsort()
        there = order.to(self.y[0].device)

        def join(parts: Sequence[State]) -> State:
            return tuple(torch.cat(pieces)[there] for pieces in zip(*parts, strict=True))

        pasts = [past for *_, past in self.done]
        count = torch.cat([past.count for past in pasts])[order]
        nodes = torch.stack([torch.cat([past.u[j] for past in pasts])[order] for j in range(2)])
        nodes[1, count < 2] = math.nan
        return Run(
            y=join([y for _, y, _, _ in self.done]),
            u=torch.cat([u for _, _, u, _ in self.done])[order],
            f=(join([past.f[0] for past in pasts]), join([past.f[1] for past in pasts])),
            nodes=nodes,
            calls=self.calls,
            stats=self.stats,
            path=self.path() if self.rule.dense else None,
        )

    def path(self) -> Path:
        """The record as a table."""
        rows, u, y, f = (torch.cat(column) for column in zip(*self.record, strict=True))
        seen = torch.zeros(self.size, dtype=torch.long)
        number = []
        for part, *_ in self.record:
            number.append(seen[part])
            seen[part] += 1
        table = torch.full((int(seen.max()), self.size), math.nan, dtype=torch.float64)
        place = torch.zeros(table.shape, dtype=torch.long)
        at = (torch.cat(number), rows)
        table[at] = u
        place[at] = torch.arange(len(u))
        nodes, frame = 2 if self.pair.order <= 3 else 3, self.frame
        if frame is not None and frame.in_lam:  # y is smoother in the prediction's own clock
            frame = replace(frame, in_lam=False)
            table = frame.prediction.clock(table)
        return Path(table, place, y, f, nodes, frame.rate if frame is not None else torch.ones_like, frame)


def _wide(v: Tensor, x: Tensor) -> Tensor:
    return v.reshape(-1, *[1] * (x.ndim - 1))


def _rms(v: Tensor) -> Tensor:
    return v.square().flatten(1).mean(1).sqrt() if v.ndim > 1 else v.abs()


def _back(*values: Tensor) -> Tensor:
    """To the host, at once."""
    return torch.stack(values).to("cpu", torch.float64)


@dataclass(frozen=True, eq=False)
class AdaptiveSolution:
    """What an adaptive solve returns.

    Arguments:
        x: The result, (B, *event).
        nfe: Calls of the network, each for all samples that were still on their way.
        stats: What each sample cost.
        path: The solution at any time, ``path(t)`` for t a number or (B,), if the rule is ``dense``.
        trajectory: States at the times that were asked for, by time.
        seed: The seed of the start.
    """

    x: Tensor
    nfe: int
    stats: Stats
    path: Path | None = field(repr=False)
    trajectory: dict[float, Tensor] = field(default_factory=dict, repr=False)
    seed: int | tuple[int, ...] | None = None


def slope(model: AbstractDenoiser, frame: Frame, u: float, y: Tensor, t: float | None = None, **cond: Any) -> Tensor:
    """dy/du of the probability flow at one clock for all samples, with y = x/N.

    Arguments:
        model: A denoiser.
        frame: What y and u are.
        u: The clock, a number.
        y: The state, (B, *event).
        t: The time there, if it is known.
        **cond: Conditions, handed to the network.
    """
    at = frame.point(torch.tensor([u], dtype=torch.float64))
    N, p, q = (float(fn(at.alpha, at.sigma)) for fn in (frame.prediction.scale, frame.prediction.p, frame.prediction.q))
    rate = float(frame.rate(torch.tensor([u], dtype=torch.float64)))
    d = model.x0(y * N, float(at.t) if t is None else t, **cond)
    return torch.add(y * (rate * p * N), d, alpha=rate * q)


def flow(
    model: AbstractDenoiser,
    x: Tensor,
    s: float,
    t: float,
    rule: Adaptive | None = None,
    *,
    denoise: Callable[..., Tensor] | None = None,
    **cond: Any,
) -> AdaptiveSolution:
    """Follow the probability flow from time s to time t, with error control for each sample.

    Where σ(t) = 0 steps are controlled down to ``sde.t_min``; the rest is one step that extrapolates the slope and asks
    nothing, to E[x_0 | x] corrected by how it was changing.

    Arguments:
        model: A denoiser.
        x: State at time s, (B, *event).
        s: Where to start.
        t: Where to end.
        rule: Pair, tolerances and limits.
        denoise: What to ask instead of ``model.x0``, with the same arguments.
        **cond: Conditions, handed to the network; tensors with a row for each sample lose rows as samples finish.
    """
    rule = Adaptive() if rule is None else rule
    refuse_ddp(model)
    check.state("x", x)
    sde, pair = model.sde, rule.pair
    frame = Frame(sde, pair.prediction, pair.in_lam)
    start, end = (check.number(name, v, at_least=0, at_most=sde.T) for name, v in (("s", s), ("t", t)))
    if sde.sigma(start) == 0:
        raise ValueError(
            f"`s` = {s:g} has no noise to see; start at a positive time such as `sde.t_min` = {sde.t_min:g}."
        )
    if min(sde.alpha(start), sde.alpha(end)) == 0 and (pair.in_lam or pair.prediction.silent):
        raise ValueError(
            f"{pair!r:.60} cannot start or end where α = 0, as {type(sde).__name__} does at T = {sde.T:g}; take a "
            f"pair of velocities in their own clock, such as the default, or another time, such as {0.999 * sde.T:g}."
        )
    clean = sde.sigma(end) == 0
    stop = min(sde.t_min, start) if clean else end
    one = torch.ones(len(x), dtype=torch.float64)
    ask = model.x0 if denoise is None else denoise

    def slopes(u: Tensor, y: State, rows: Tensor | None) -> State:
        at = frame.point(u)
        N, p, q = (fn(at.alpha, at.sigma) for fn in (frame.prediction.scale, frame.prediction.p, frame.prediction.q))
        scale, of_x, of_d = beside(torch.stack([N, p, q]), x)
        state = y[0] * _wide(scale, x)
        time = at.t if x.device.type == "cpu" else beside(at.t, x)
        d = ask(state, time, **(cond if rows is None else _rows(cond, rows, len(x))))
        return (_wide(of_x, x) * state + _wide(of_d, x) * d,)

    def unit(u: Tensor) -> Tensor:
        lam = u if frame.in_lam else frame.prediction.lam_of_clock(u)
        one, rho = torch.ones_like(lam), (-lam).exp()
        return frame.prediction.scale(one, rho) / (1 + rho)

    u, v = frame.u(start * one), frame.u(stop * one)
    y = x / _wide(beside(frame.scale(u), x), x)
    plain = pair.prediction.name == "velocity"
    run = integrate(slopes, y, u, v, rule, weigh=frame.weigh, unit=None if plain else unit, frame=frame)
    return AdaptiveSolution(_arrive(frame, run, end, clean), run.calls, run.stats, run.path)


def _arrive(frame: Frame, run: Run, end: float, clean: bool) -> Tensor:
    """From where samples got to, to the end: over what is left to σ = 0, or for those that spent all they could."""
    (y,), u, f = run.y, run.u, run.f
    one = torch.ones_like(u)
    if clean and frame.in_lam:  # infinite there: the state is the data prediction itself
        at = frame.point(u)
        N, p, q = (fn(at.alpha, at.sigma) for fn in (frame.prediction.scale, frame.prediction.p, frame.prediction.q))
        of_y, of_f = beside(torch.stack([-p * N / q, 1 / q]), y)
        return _wide(of_y, y) * y + _wide(of_f, y) * f[0][0]
    v = frame.u(end * one)
    if clean or not bool(run.stats.finished.all()):
        w = torch.stack([frame.weigh(u, v, u[None])[0], torch.zeros_like(u)])
        if clean:
            known = run.stats.finished & run.nodes[1].isfinite()
            both = frame.weigh(u, v, torch.stack([u, torch.where(known, run.nodes[1], u + 1)]))
            w = torch.where(known, both, w)
        (y,) = advance((y,), w, f)
    return y * _wide(beside(frame.scale(v), y), y)


def _rows(cond: dict[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """The conditions of some of the samples."""

    def choose(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == size and size > 1:
            return leaf[rows.to(leaf.device, non_blocking=True)]
        return leaf

    return {name: tree_map(choose, tree) for name, tree in cond.items()}
