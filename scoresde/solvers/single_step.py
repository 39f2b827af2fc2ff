"""Single-step solvers without history: exponential Runge–Kutta in λ, and Butcher tableaux on the probability flow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from scoresde import _checks as check
from scoresde.plan.rows import Weight
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import DATA, LAM, Prediction, Variable
from scoresde.solvers.rule import Eta, Solver, between, check_eta, eta_at, said
from scoresde.solvers.tape import Tape


@dataclass(frozen=True, repr=False)
class SingleStep(Solver):
    r"""Exponential Runge–Kutta in λ, of order 1, 2 or 3, with the nodes of DPM-Solver.

    Let i be the start of the step, and s, s₂ the stages at fractions r₁ < r₂ of the step in λ. With order 2 the rows
    interpolate {i}; {i, s}. With order 3 they interpolate {i}; {i, s}; {i, s₂}.

    Arguments:
        order: Number of evaluations per step: 1, 2 or 3.
        prediction: Prediction to interpolate.
        variable: Variable of the interpolating polynomial.
        r: Fractions of the stages, one for order 2 and two for order 3; by default ½, or ⅓ and ⅔.
        reads: Nodes of the last row, out of i (0), s (1), s₂ (2). All three give the Taylor form of order 3; s alone
            gives DPM-2.
        moments: Moments of the last row, see :func:`weights`; None is exact.
        eta: Stochasticity: 0 for the flow, 1 for the reverse SDE, any other number, or a function of the time at the
            end of a step. Each stage draws the noise of its sub-interval; later stages reuse that noise (SEEDS).
        label: Name of the solver in its plans.
    """

    order: int = 2
    prediction: Prediction = DATA
    variable: Variable = LAM
    r: tuple[float, ...] = ()
    reads: tuple[int, ...] = ()
    moments: tuple[str | float, ...] | None = None
    eta: Eta = 0.0
    label: str = ""

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        if check.integer("order", self.order, at_least=1) > 3:
            raise ValueError(f"`order` must be 1, 2 or 3, got {self.order}.")
        default = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}[self.order]
        object.__setattr__(self, "r", tuple(self.r) or default)
        object.__setattr__(self, "reads", tuple(self.reads) or {1: (0,), 2: (0, 1), 3: (0, 2)}[self.order])
        if not set(self.reads) <= set(range(self.order)):
            raise ValueError(f"`reads` must contain stage numbers from 0 to {self.order - 1}, got {self.reads}.")
        if len(self.r) != self.order - 1 or not all(0 < a < 1 for a in self.r) or sorted(set(self.r)) != list(self.r):
            raise ValueError(f"`r` must contain {self.order - 1} increasing fractions in (0, 1), got {self.r}.")

    def __repr__(self) -> str:
        eta = f", eta={said(self.eta)}" if self.eta else ""
        return f"{self.label or 'SingleStep'}(order={self.order}, {self.prediction} in {self.variable}{eta})"

    @property
    def declared_order(self) -> int:
        """Order of convergence; it is 3 only if the last stage is at the fraction 2/3, for any `reads`."""
        return 2 if self.order == 3 and not math.isclose(self.r[-1], 2 / 3) else self.order

    @property
    def weak_order(self) -> int:
        """With noise at most 2 for any number of stages, because each sub-interval uses one Gaussian increment."""
        return min(self.declared_order, 2) if self.eta else self.declared_order

    @property
    def stages(self) -> int:
        return self.order

    @property
    def _forgets(self) -> bool:
        return not callable(self.eta)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        start = history[0]
        eta = eta_at(self.eta, t)
        options: dict[str, Any] = {"prediction": self.prediction, "variable": self.variable, "eta": eta}
        nodes, stages = [start], [start]
        if finite_leg(tape.sde, tape.time(now), t):
            for r in self.r:
                at = between(tape.sde, tape.time(now), t, r)
                stages.append(tape.move(now, at, stages[:2], through=stages[1:], **options, note="stage"))
            nodes = [stages[k] for k in self.reads]
        moments = self.moments if len(nodes) == 2 and self.order == 2 else None
        new = tape.move(now, t, nodes, **options, through=stages[1:], moments=moments, evaluates=asks, node=node)
        return new, [new]


def finite_leg(sde: SDE, s: Weight, t: Weight) -> bool:
    """Whether λ is finite at both ends of a step, so that stages can lie between them."""
    for v in (s, t):
        lam = sde.lam(v.detach() if isinstance(v, Tensor) else v)
        if not (bool(lam.isfinite().all()) if isinstance(lam, Tensor) else math.isfinite(lam)):
            return False
    return True
