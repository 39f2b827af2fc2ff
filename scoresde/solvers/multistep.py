"""Multistep rules: each leg interpolates through the evaluations of earlier ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan import Weight
from scoresde.quadrature import DATA, LAM, Prediction, Variable
from scoresde.solvers.base import Eta, Solver, check_eta, eta_at, said
from scoresde.solvers.singlestep import SingleStep
from scoresde.tape import Tape

Moments = tuple[str | float, ...] | None


@dataclass(frozen=True, repr=False)
class Multistep(Solver):
    r"""Exponential Adams: predict through the last `order` evaluations, correct through the new one.

    .. math:: x_t = \Phi x_s + \sum_{j<p} W_j f_{i-j}

    Arguments:
        order: Nodes of the predictor.
        prediction: What is interpolated.
        variable: In what.
        corrector: Nodes of the corrector, the new one included; 0 for none.
        reevaluate: Ask the network again at the corrected state (PECE) instead of keeping the prediction's (PEC).
        eta: 1 for the reverse SDE, 0 for the flow, any other number or a function of the time where a leg ends; the
            normals of predictor and corrector are shared.
        moments: Of two-node rows, see :func:`scoresde.quadrature.weights`; None is exact.
        start: ``"ramp"`` raises the order leg by leg, as published; ``"self"`` starts with single steps of full order.
        label: Name of the plans.
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
        check.integer("order", self.order, least=1)
        check.integer("corrector", self.corrector)
        check.choice("start", self.start, ("ramp", "self"))
        check_eta("eta", self.eta)
        if self.start == "self" and self.order > 3:
            raise ValueError(f"`start`='self' has single steps up to order 3, got order {self.order}; use 'ramp'.")

    def __repr__(self) -> str:
        parts = [f"order={self.order}", f"{self.prediction} in {self.variable}"]
        parts += [f"corrector={self.corrector}"] if self.corrector else []
        parts += [f"eta={said(self.eta)}"] if self.eta else []
        return f"{self.label or 'Multistep'}({', '.join(parts)})"

    @property
    def declared_order(self) -> int:
        """Order of the corrected method: a corrector's, or the predictor's and one more, whichever is less.

        From a cold start the ramp costs the orders above 2 some accuracy.
        """
        return self._corrected(self.order)

    @property
    def weak_order(self) -> int:
        """With noise at most 2, whatever the number of nodes: one normal a leg says no more."""
        return min(self.declared_order, 2) if self.eta else self.declared_order

    @property
    def stages(self) -> int:
        """Evaluations that one leg costs; a leg into σ = 0 costs one."""
        return 2 if self.corrector and self.reevaluate else 1

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """A rule and a number of legs that spend a budget.

        The last leg reads what is known and asks nothing, whether or not it ends at σ = 0. A start with single steps
        costs `order` evaluations on each of `order` − 1 legs; a budget that leaves no leg after them starts by a ramp.
        """
        after = check.integer("nfe", nfe, least=1) - 1
        if self.start == "self":
            legs = self.order + (after - self.order * (self.order - 1)) // self.stages
            if legs > self.order:
                return self, legs
        rule = replace(self, start="ramp") if self.start == "self" else self
        return rule, 1 + after // self.stages

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
        asked = new
        if correct:
            new = move([asked, *history][: self.corrector], evaluates=self.reevaluate, node=node, note="correct")
            asked = new if self.reevaluate else asked
        keep = max(self.order, self.corrector)
        return new, ([asked, *history][:keep] if asks else history)

    def _corrected(self, order: int) -> int:
        """The order that the corrector makes of a predictor's."""
        return min(order + 1, self.corrector) if self.corrector else order

    def _many(self, nodes: int) -> Moments:
        """Moments of rows with more than two nodes: exact, unless a factor is given for them by name."""
        return self.moments if self.moments is not None and len(self.moments) == nodes > 2 else None

    def _after_noise(self, tape: Tape, now: int, history: list[int]) -> list[int]:
        if self.prediction is not DATA:
            return [now]  # noise-prediction multistep across fresh noise diverges
        here = _plain(tape.time(now))
        return [now, *(k for k in history if _plain(tape.time(k)) != here)][: max(self.order, self.corrector)]


def _plain(t: Weight) -> object:
    return tuple(t.detach().reshape(-1).tolist()) if isinstance(t, torch.Tensor) else t
