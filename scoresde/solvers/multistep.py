"""Multistep solvers: each step interpolates the evaluations of the current and of earlier steps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan.rows import Weight
from scoresde.solvers.interpolants import DATA, LAM, Prediction, Variable
from scoresde.solvers.rule import Eta, Solver, check_eta, eta_at, said
from scoresde.solvers.single_step import SingleStep
from scoresde.solvers.tape import Tape

Moments = tuple[str | float, ...] | None


@dataclass(frozen=True, repr=False)
class Multistep(Solver):
    r"""Exponential Adams method: a predictor with the last `order` evaluations, and an optional corrector.

    .. math:: x_t = \Phi x_s + \sum_{j<p} W_j f_{i-j}

    Arguments:
        order: Number of nodes of the predictor.
        prediction: Prediction to interpolate.
        variable: Variable of the interpolating polynomial.
        corrector: Number of nodes of the corrector, including the new one; 0 for no corrector.
        reevaluate: Whether to evaluate the network again at the corrected state (PECE) or not (PEC).
        eta: Stochasticity: 0 for the flow, 1 for the reverse SDE, any other number, or a function of the time at the
            end of a step. Predictor and corrector use the same noise.
        moments: Moments of rows with two nodes, see :func:`weights`; None is exact.
        start: Treatment of the first steps: ``"ramp"`` raises the order step by step, as published; ``"self"`` uses
            single steps of full order.
        label: Name of the solver in its plans.
    """

    order: int = 2
    prediction: Prediction = DATA
    variable: Variable = LAM
    corrector: int = 0
    reevaluate: bool = False
    eta: Eta = 0.0
    moments: Moments = None
    start: str = "ramp"
    label: str = ""

    def __post_init__(self) -> None:
        check.integer("order", self.order, at_least=1)
        check.integer("corrector", self.corrector)
        check.choice("start", self.start, ("ramp", "self"))
        check_eta("eta", self.eta)
        if self.start == "self" and self.order > 3:
            raise ValueError(f"`start`='self' requires `order` of at most 3, got {self.order}; use `start`='ramp'.")

    def __repr__(self) -> str:
        parts = [f"order={self.order}", f"{self.prediction} in {self.variable}"]
        parts += [f"corrector={self.corrector}"] if self.corrector else []
        parts += [f"eta={said(self.eta)}"] if self.eta else []
        return f"{self.label or 'Multistep'}({', '.join(parts)})"

    @property
    def declared_order(self) -> int:
        """Order of the predictor, or min(order + 1, corrector) with a corrector.

        With ``start="ramp"`` the low-order first steps reduce the accuracy of orders above 2.
        """
        return self._corrected(self.order)

    @property
    def weak_order(self) -> int:
        """With noise at most 2 for any number of nodes, because each step uses one Gaussian increment."""
        return min(self.declared_order, 2) if self.eta else self.declared_order

    @property
    def stages(self) -> int:
        return 2 if self.corrector and self.reevaluate else 1

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return a solver and its number of steps, see :meth:`Solver.for_nfe`.

        The last step needs no new evaluation. With ``start="self"`` each of the first `order` − 1 steps costs `order`
        evaluations; if `nfe` is too small for further steps, the returned solver has ``start="ramp"``.
        """
        after = check.integer("nfe", nfe, at_least=1) - 1
        if self.start == "self":
            steps = self.order + (after - self.order * (self.order - 1)) // self.stages
            if steps > self.order:
                return self, steps
        solver = replace(self, start="ramp") if self.start == "self" else self
        return solver, 1 + after // self.stages

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        if self.start == "self" and len(history) < self.order and asks:
            single = SingleStep(self.order, prediction=self.prediction, variable=self.variable, eta=self.eta)
            new, _ = single._leg(tape, now, history, t, asks, node)
            return new, [new, *history][: self.order]
        nodes = history[: self.order]
        eta = eta_at(self.eta, t)
        noise = [(tape.draw(), 1.0)] if isinstance(eta, Tensor) or eta > 0 else None
        correct = self.corrector > 0 and asks

        def move(nodes: list[int], *, evaluates: bool, node: int | None, note: str) -> int:
            return tape.move(
                now,
                t,
                nodes,
                evaluates=evaluates,
                prediction=self.prediction,
                variable=self.variable,
                eta=eta,
                moments=self.moments if len(nodes) == 2 else self._many(len(nodes)),
                noise=noise,
                node=node,
                note=note,
            )

        new = move(nodes, evaluates=asks, node=None if correct else node, note="predict" if correct else "")
        evaluated = new
        if correct:
            new = move([evaluated, *history][: self.corrector], evaluates=self.reevaluate, node=node, note="correct")
            evaluated = new if self.reevaluate else evaluated
        length = max(self.order, self.corrector)
        return new, ([evaluated, *history][:length] if asks else history)

    def _corrected(self, order: int) -> int:
        """Order with the corrector, if the predictor has order `order`."""
        return min(order + 1, self.corrector) if self.corrector else order

    def _many(self, nodes: int) -> Moments:
        """Moments of a row with more than two nodes: None (exact), unless `moments` has one entry per node."""
        return self.moments if self.moments is not None and len(self.moments) == nodes > 2 else None

    def _after_noise(self, tape: Tape, now: int, history: list[int]) -> list[int]:
        if self.prediction is not DATA:
            return [now]  # other predictions diverge if the history crosses fresh noise
        current = _plain(tape.time(now))
        return [now, *(k for k in history if _plain(tape.time(k)) != current)][: max(self.order, self.corrector)]


def _plain(t: Weight) -> object:
    return tuple(t.detach().reshape(-1).tolist()) if isinstance(t, torch.Tensor) else t
