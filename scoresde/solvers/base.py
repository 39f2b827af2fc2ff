"""What a rule is: something frozen that writes a plan for a process and a grid. It never sees a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.paths import Span
from scoresde.plan import Plan, Row, Weight
from scoresde.sde import SDE
from scoresde.tape import Tape

Eta = float | Callable[[Any], Any]
"""Stochasticity: a number, or a function of time, which takes a number (or a tensor, where times are tensors)."""


@dataclass(frozen=True)
class Solver:
    """A frozen rule. A subclass lays one leg in ``_leg``; grids, up legs and the end are handled here."""

    @property
    def name(self) -> str:
        """What the plans it writes are called."""
        return repr(self)

    @property
    def declared_order(self) -> int:
        """The order of convergence it claims, which the tests measure."""
        raise NotImplementedError(f"{type(self).__name__} must define the property `declared_order`, an integer.")

    @property
    def weak_order(self) -> int:
        """The order it claims for the law of its result; without noise that of convergence."""
        return self.declared_order

    @property
    def stages(self) -> int:
        """Evaluations that one leg costs; a leg into σ = 0 costs one."""
        return 1

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """A rule and a number of legs that spend a budget of evaluations, or as much of it as whole legs can.

        Arguments:
            nfe: The budget.
            clean: Whether the grid ends at σ = 0.
        """
        check.integer("nfe", nfe, least=1)
        return self, max(1, (nfe - 1) // self.stages + 1 if clean else nfe // self.stages)

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Write the table for a grid.

        Arguments:
            sde: The process.
            times: From noise to data; a float64 tensor (N + 1,), which may require grad, or (N + 1, B) for one grid a
                sample. Legs that go up in time add fresh noise, exactly.
            up: ``"diffuse"``, or ``"solve"`` to solve legs that go up like those that go down: encoding.
        """
        grid, legs = _legs(sde, times, check.choice("up", up, ("diffuse", "solve")))
        tape = Tape(sde, grid[0], evaluates=legs[0])
        history: list[int] = [0]
        now = 0
        ready = self._side_by_side(sde, grid, legs) if self._forgets and not isinstance(grid[0], Tensor) else {}
        for i, t in enumerate(grid[1:]):
            last = i == len(legs) - 1
            asks = not last and legs[i + 1]
            if i in ready:
                now = tape.paste(now, *ready[i], evaluates=asks, node=i + 1)
                history = [now]
            elif legs[i]:
                laid = self._leg(tape, now, history, t, asks, i + 1)
                if not (isinstance(laid, tuple) and len(laid) == 2):
                    raise TypeError(f"`_leg` of {type(self).__name__} must return (row, history), got {laid!r}.")
                now, history = laid
            else:
                now = tape.diffuse(now, t, evaluates=not last and legs[i + 1], node=i + 1)
                history = self._after_noise(tape, now, history)
        return tape.plan(self.name, self.declared_order)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        """Lay one solved leg from row `now` to time t.

        Arguments:
            tape: Where to.
            now: Row of the state the leg starts from.
            history: Evaluated rows, newest first; the first is at the time of `now`.
            t: Where the leg ends.
            asks: Whether the network is to be asked at the new node.
            node: Number of the new node.

        Returns:
            The new state's row and the new history.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `_leg(tape, now, history, t, asks, node)`, which lays one leg and "
            f"returns its last row and the history; the page on a solver of your own has one."
        )

    @property
    def _forgets(self) -> bool:
        """Whether each leg is laid by itself, and in one way, so that all can be laid at once."""
        return False

    def _side_by_side(
        self, sde: SDE, grid: list[Any], legs: list[bool]
    ) -> dict[int, tuple[list[Row], list[Span | None]]]:
        """The rows, and spans of their draws, of legs between finite λ: one is laid, as if each were a sample."""
        t = torch.tensor(grid, dtype=torch.float64)
        finite = sde.lam(t).isfinite().tolist()
        which = [i for i, solved in enumerate(legs) if solved and finite[i] and finite[i + 1]]
        if len(which) < 2:
            return {}
        tape = Tape(sde, t[which])
        self._leg(tape, 0, [0], t[[i + 1 for i in which]], True, 1)
        columns = zip(*(_columns(row, len(which)) for row in tape.rows()[1:]), strict=True)
        spans = tape.spans() or (None,) * tape.draws
        return {
            i: (list(rows), [_at(span, k) for span in spans])
            for k, (i, rows) in enumerate(zip(which, columns, strict=True))
        }

    def _after_noise(self, tape: Tape, now: int, history: list[int]) -> list[int]:
        """What is remembered across fresh noise: nothing, unless a rule knows better."""
        return [now]


def _legs(sde: SDE, times: Any, up: str) -> tuple[list[Weight], list[bool]]:
    """The times, as numbers or tensors, and whether each leg is solved."""
    grid = times if isinstance(times, Tensor) else torch.as_tensor(times, dtype=torch.float64)
    if grid.dtype != torch.float64:
        raise TypeError(f"`times` must be a float64 grid, got {str(grid.dtype)[6:]}; the grid makers give one.")
    if grid.ndim not in (1, 2) or len(grid) < 2:
        raise ValueError(f"`times` must have shape (N + 1,) or (N + 1, B) with N >= 1, got {tuple(grid.shape)}.")
    plain = grid.detach()
    outside = ~((plain >= 0) & (plain <= sde.T)).reshape(len(grid), -1).all(1)
    if outside.any():
        i = int(outside.nonzero()[0, 0])
        raise ValueError(f"`times` must lie in [0, T] = [0, {sde.T:g}], but time {i} does not ({plain[i].tolist()}).")
    step = plain.diff(dim=0).reshape(len(grid) - 1, -1)
    down, rising = (step < 0).all(1), (step > 0).all(1)
    if not bool((down | rising).all()):
        i = int((~(down | rising)).nonzero()[0, 0]) + 1
        raise ValueError(f"`times` repeats a time at index {i} (t = {plain[i].tolist()}); drop one of the two.")
    solved = [True] * (len(grid) - 1) if up == "solve" else down.tolist()
    if not solved[0] or not solved[-1]:
        raise ValueError(
            "`times` must start and end with a leg towards data; give times.flip(0) if your grid runs from data to "
            "noise, or use `encode`."
        )
    if grid.ndim == 2 or grid.requires_grad:
        return list(grid), solved
    return grid.tolist(), solved


def _columns(row: Row, n: int) -> list[Row]:
    """A row with a weight a sample as a row for each."""

    def numbers(w: Weight) -> list[float]:
        return w.tolist() if isinstance(w, Tensor) and w.ndim else [float(w)] * n

    t, one = numbers(row.t), numbers(row.one)
    x, d, z = ([(k, numbers(w)) for k, w in terms] for terms in (row.x, row.d, row.z))
    return [
        replace(
            row,
            t=t[i],
            x=tuple((k, w[i]) for k, w in x if w[i]),
            d=tuple((k, w[i]) for k, w in d),
            z=tuple((k, w[i]) for k, w in z),
            one=one[i],
        )
        for i in range(n)
    ]


def _at(span: Span | None, i: int) -> Span | None:
    """The span of one leg of many."""
    return span and replace(span, start=float(span.start[i]), end=float(span.end[i]))


def check_eta(name: str, eta: Eta) -> Eta:
    """Refuse what is neither a function nor a number of at least 0."""
    return eta if callable(eta) else check.number(name, eta, least=0)


def said(value: Any) -> str:
    """A number, a function's name, or anything else, as a rule's name shows it."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:g}" if isinstance(value, float) else repr(value)


def eta_at(eta: Eta, t: Weight, name: str = "eta") -> Weight:
    """Stochasticity of a leg that ends at t. Any value keeps the marginals, so within a leg it may be constant."""
    value = eta(t) if callable(eta) else eta
    if isinstance(value, Tensor) and (isinstance(t, Tensor) or value.requires_grad):
        return value
    return check.number(name, float(value), least=0)


def on_leg(s: Weight, t: Weight, formula: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Weights of a row by hand: numbers if both times are numbers, else tensors."""
    a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
    values = formula(a, b)
    if isinstance(s, Tensor) or isinstance(t, Tensor) or any(v.requires_grad for v in values):
        return values
    return tuple(float(v) for v in values)


def ends_clean(sde: SDE, t: Weight) -> bool:
    """Whether σ(t) = 0, for any sample."""
    return bool((sde.sigma(t.detach()) == 0).any()) if isinstance(t, Tensor) else sde.sigma(t) == 0


def starts_silent(sde: SDE, s: Weight) -> bool:
    """Whether α(s) = 0, for any sample."""
    return bool((sde.alpha(s.detach()) == 0).any()) if isinstance(s, Tensor) else sde.alpha(s) == 0


def between(sde: SDE, s: Weight, t: Weight, r: float) -> Weight:
    """The time at a fraction r of the way from s to t in λ."""
    if isinstance(s, Tensor) or isinstance(t, Tensor):
        a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
        lam = sde.lam(a) + r * (sde.lam(b) - sde.lam(a))
        return sde.t_of_lam(lam)
    lam_s = sde.lam(s)
    return sde.t_of_lam(lam_s + r * (sde.lam(t) - lam_s))
