"""The base class of the solvers: a frozen object that builds a plan from a process and a grid, without a network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Row, Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.tape import Tape

Eta = float | Callable[[Any], Any]
"""Stochasticity η: a number, or a function of time. The time is a number, or a tensor if the grid is one."""


@dataclass(frozen=True)
class Solver:
    """Base class of the solvers. A subclass defines one step in ``_leg``; `plan` handles the grid."""

    @property
    def name(self) -> str:
        """Name of the plans that the solver builds."""
        return repr(self)

    @property
    def declared_order(self) -> int:
        """Order of convergence, which the tests measure."""
        raise NotImplementedError(f"{type(self).__name__} must define the property `declared_order`, an integer.")

    @property
    def weak_order(self) -> int:
        """Order of convergence in distribution; without noise it equals `declared_order`."""
        return self.declared_order

    @property
    def stages(self) -> int:
        """Number of function evaluations per step; a step into σ = 0 needs only one."""
        return 1

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return a solver and the largest number of steps (at least 1) that `nfe` evaluations allow.

        Arguments:
            nfe: Number of function evaluations, at least 1.
            clean: Whether the grid ends at σ = 0.
        """
        check.integer("nfe", nfe, at_least=1)
        return self, max(1, (nfe - 1) // self.stages + 1 if clean else nfe // self.stages)

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Build the plan for a grid.

        Arguments:
            sde: Process.
            times: Grid from noise to data: a float64 tensor (N + 1,), which may require grad, or (N + 1, B) for one
                grid per sample.
            up: Steps that go up in time: ``"diffuse"`` adds exact forward noise, ``"solve"`` is the solver (inversion).
        """
        grid, legs = _check_times(sde, times, check.choice("up", up, ("diffuse", "solve")))
        tape = Tape(sde, grid[0], evaluates=legs[0])
        history: list[int] = [0]
        now = 0
        computed = self._batched_steps(sde, grid, legs) if self._forgets and not isinstance(grid[0], Tensor) else {}
        for i, t in enumerate(grid[1:]):
            last = i == len(legs) - 1
            evaluates = not last and legs[i + 1]
            if i in computed:
                now = tape.paste(now, *computed[i], evaluates=evaluates, node=i + 1)
                history = [now]
            elif legs[i]:
                result = self._leg(tape, now, history, t, evaluates, i + 1)
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise TypeError(f"`_leg` of {type(self).__name__} must return (row, history), got {result!r}.")
                now, history = result
            else:
                now = tape.diffuse(now, t, evaluates=evaluates, node=i + 1)
                history = self._after_noise(tape, now, history)
        return tape.plan(self.name, self.declared_order)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        """Add the rows of one step from row `now` to time t.

        Arguments:
            tape: Tape that receives the rows.
            now: Row of the state at the start of the step.
            history: Evaluated rows, newest first; the first is at the time of `now`.
            t: Time at the end of the step.
            asks: Whether the network is evaluated at the new state.
            node: Index in the grid of the time `t`.

        Returns:
            The row of the new state, and the new history.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `_leg(tape, now, history, t, asks, node)`, which adds the rows of "
            f"one step and returns (row, history); docs/howto/own-solver.md has an example."
        )

    @property
    def _forgets(self) -> bool:
        """Whether every step has the same form and needs no history, so that all steps can be computed in one batch."""
        return False

    def _batched_steps(
        self, sde: SDE, grid: list[Any], legs: list[bool]
    ) -> dict[int, tuple[list[Row], list[Span | None]]]:
        """Rows and noise spans of all steps between finite λ, computed as one step with a batch of times."""
        t = torch.tensor(grid, dtype=torch.float64)
        finite = sde.lam(t).isfinite().tolist()
        indices = [i for i, solved in enumerate(legs) if solved and finite[i] and finite[i + 1]]
        if len(indices) < 2:
            return {}
        tape = Tape(sde, t[indices])
        self._leg(tape, 0, [0], t[[i + 1 for i in indices]], True, 1)
        columns = zip(*(_unbatch(row, len(indices)) for row in tape.rows()[1:]), strict=True)
        spans = tape.spans() or (None,) * tape.draws
        return {
            i: (list(rows), [_span_of(span, k) for span in spans])
            for k, (i, rows) in enumerate(zip(indices, columns, strict=True))
        }

    def _after_noise(self, tape: Tape, now: int, history: list[int]) -> list[int]:
        """Return the history after fresh noise is added: by default the new row alone."""
        return [now]


def _check_times(sde: SDE, times: Any, up: str) -> tuple[list[Weight], list[bool]]:
    """Return the times, as numbers or tensors, and for each step whether the solver applies."""
    grid = times if isinstance(times, Tensor) else torch.as_tensor(times, dtype=torch.float64)
    if grid.dtype != torch.float64:
        raise TypeError(f"`times` must have dtype float64, got {str(grid.dtype)[6:]}; use `times.double()`.")
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
        raise ValueError(f"`times` repeats a time at index {i} (t = {plain[i].tolist()}); remove one of the two.")
    solved = [True] * (len(grid) - 1) if up == "solve" else down.tolist()
    if not solved[0] or not solved[-1]:
        raise ValueError(
            "`times` must decrease in its first and last steps. Use `times.flip(0)` if the grid goes from data to "
            "noise; use `encode` for inversion."
        )
    if grid.ndim == 2 or grid.requires_grad:
        return list(grid), solved
    return grid.tolist(), solved


def _unbatch(row: Row, n: int) -> list[Row]:
    """Split a row with n weights per term into n rows."""

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


def _span_of(span: Span | None, i: int) -> Span | None:
    """The noise span of step i of a batch."""
    if span is None:
        return None
    assert isinstance(span.start, Tensor) and isinstance(span.end, Tensor)
    return replace(span, start=float(span.start[i]), end=float(span.end[i]))


def check_eta(name: str, eta: Eta) -> Eta:
    """Return `eta` if it is a function or a number of at least 0, else raise an error."""
    return eta if callable(eta) else check.number(name, eta, at_least=0)


def said(value: Any) -> str:
    """Format a number, a function or any other value for the name of a solver."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return f"{value:g}" if isinstance(value, float) else repr(value)


def eta_at(eta: Eta, t: Weight, name: str = "eta") -> Weight:
    """Evaluate η for a step that ends at t. η is constant within a step, since any value preserves the marginals."""
    value = eta(t) if callable(eta) else eta
    if isinstance(value, Tensor) and (isinstance(t, Tensor) or value.requires_grad):
        return value
    return check.number(name, float(value), at_least=0)


def on_leg(s: Weight, t: Weight, formula: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> tuple[Any, ...]:
    """Evaluate `formula` at two times; return numbers if both times are numbers, and tensors otherwise."""
    a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
    values = formula(a, b)
    if isinstance(s, Tensor) or isinstance(t, Tensor) or any(v.requires_grad for v in values):
        return values
    return tuple(float(v) for v in values)


def ends_clean(sde: SDE, t: Weight) -> bool:
    """Whether σ(t) = 0 for at least one sample."""
    return bool((sde.sigma(t.detach()) == 0).any()) if isinstance(t, Tensor) else sde.sigma(t) == 0


def starts_silent(sde: SDE, s: Weight) -> bool:
    """Whether α(s) = 0 for at least one sample."""
    return bool((sde.alpha(s.detach()) == 0).any()) if isinstance(s, Tensor) else sde.alpha(s) == 0


def between(sde: SDE, s: Weight, t: Weight, r: float) -> Weight:
    """Time at the fraction r between s and t, measured in λ."""
    if isinstance(s, Tensor) or isinstance(t, Tensor):
        a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
        lam = sde.lam(a) + r * (sde.lam(b) - sde.lam(a))
        return sde.t_of_lam(lam)
    lam_s = sde.lam(s)
    return sde.t_of_lam(lam_s + r * (sde.lam(t) - lam_s))
