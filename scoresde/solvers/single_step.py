"""Single-step solvers without history: exponential Runge–Kutta in λ."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.solvers.interpolants import DATA, LAM, Prediction, Variable
from scoresde.solvers.rule import Eta, Solver, check_eta, eta_at, varies
from scoresde.solvers.tape import Leg, Tape

_FRACTIONS: dict[int, tuple[float, ...]] = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}
_READS = {1: (0,), 2: (0, 1), 3: (0, 2)}


@checked
@dataclass(frozen=True, repr=False)
class SingleStep(Solver):
    r"""Exponential Runge–Kutta in λ, of order 1, 2 or 3, with the nodes of DPM-Solver.

    Let i be the start of the step, and s, s₂ the stages at fractions r₁ < r₂ of the step in λ. With two stages the rows
    interpolate {i}; {i, s}. With three they interpolate {i}; {i, s}; {i, s₂}.

    Arguments:
        stages: Number of evaluations per step: 1, 2 or 3.
        prediction: Prediction to interpolate.
        variable: Variable of the interpolating polynomial.
        r: Fractions of the stages after the first; by default ½, or ⅓ and ⅔.
        reads: Nodes of the last row, out of i (0), s (1), s₂ (2). All three give the Taylor form of order 3; s alone
            gives DPM-2. By default i and the last stage.
        moments: Moments of the last row, see :func:`weights`; None is exact.
        eta: Stochasticity: 0 for the flow, 1 for the reverse SDE, any other number, or a function of the time at the
            end of a step. Each stage draws the noise of its sub-interval; later stages reuse that noise (SEEDS).

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), arXiv:2206.00927
    """

    stages: int = 2
    prediction: Prediction = DATA
    variable: Variable = LAM
    r: tuple[float, ...] = ()
    reads: tuple[int, ...] = ()
    moments: tuple[str | float, ...] | None = None
    eta: Eta = 0.0

    def __post_init__(self) -> None:
        check_eta("eta", self.eta)
        if check.integer("stages", self.stages, at_least=1) > 3:
            raise ValueError(f"`stages` must be 1, 2 or 3, got {self.stages}.")
        object.__setattr__(self, "r", tuple(self.r))
        object.__setattr__(self, "reads", tuple(self.reads))
        if not set(self.reads) <= set(range(self.stages)):
            raise ValueError(f"`reads` must contain stage numbers from 0 to {self.stages - 1}, got {self.reads}.")
        r = self.fractions
        if len(r) != self.stages - 1 or not all(0 < a < 1 for a in r) or sorted(set(r)) != list(r):
            raise ValueError(f"`r` must contain {self.stages - 1} increasing fractions in (0, 1), got {r}.")

    @property
    def fractions(self) -> tuple[float, ...]:
        """Fractions of the stages after the first."""
        return self.r or _FRACTIONS[self.stages]

    @property
    def order(self) -> int:
        """Order of convergence; it is 3 only if the last stage is at the fraction 2/3, for any `reads`."""
        return 2 if self.stages == 3 and not math.isclose(self.fractions[-1], 2 / 3) else self.stages

    @property
    def weak_order(self) -> int:
        """With noise at most 2 for any number of stages, because each sub-interval uses one Gaussian increment."""
        return min(self.order, 2) if self.eta else self.order

    @property
    def memoryless(self) -> bool:
        return not varies(self.eta)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        s, eta = tape.time(leg.row), eta_at(self.eta, leg.t, tape.sde)
        nodes = stages = leg.history[:1]
        if tape.finite(s, leg.t):
            for r in self.fractions:
                stage = tape.move(
                    leg.row,
                    tape.between(s, leg.t, r),
                    stages[:2],
                    through=stages[1:],
                    prediction=self.prediction,
                    variable=self.variable,
                    eta=eta,
                    note="stage",
                )
                stages = [*stages, stage]
            nodes = [stages[k] for k in self.reads or _READS[self.stages]]
        new = tape.move(
            leg.row,
            leg.t,
            nodes,
            through=stages[1:],
            prediction=self.prediction,
            variable=self.variable,
            eta=eta,
            moments=self.moments if len(nodes) == 2 and self.stages == 2 else None,
            evaluates=leg.evaluates,
            node=leg.node,
        )
        return new, [new]
