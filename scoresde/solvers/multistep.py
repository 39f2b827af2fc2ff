"""Multistep solvers: each step interpolates the evaluations of the current and of earlier steps.

DPM-Solver(++) 2M and 3M, UniPC, DEIS, SA-Solver and velocity Adams–Bashforth are settings of :class:`Multistep`. It
chooses the nodes of the predictor and of the corrector. :func:`scoresde.solvers.quadrature.weights` computes the
weights of both, among them those of UniPC's corrector (UniC), whose first node is the new evaluation; `moments`
selects UniPC's B(h). A printed plan shows the weights in the rows "predict" and "correct".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plan.rows import Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import DATA, LAM, Prediction, Variable
from scoresde.solvers.quadrature import noisy
from scoresde.solvers.rule import Eta, Solver, check_eta, eta_at
from scoresde.solvers.single_step import SingleStep
from scoresde.solvers.tape import Leg, Tape

Moments = tuple[str | float, ...] | None


@checked
@dataclass(frozen=True, repr=False)
class Multistep(Solver):
    r"""Exponential Adams method: a predictor with the last `nodes` evaluations, and an optional corrector.

    .. math:: x_t = \Phi x_s + \sum_{j<p} W_j f_{i-j}

    Arguments:
        nodes: Number of nodes of the predictor.
        prediction: Prediction to interpolate.
        variable: Variable of the interpolating polynomial.
        corrector: Number of nodes of the corrector, including the new one; 0 for no corrector.
        reevaluate: Whether to evaluate the network again at the corrected state (PECE) or not (PEC).
        eta: Stochasticity: 0 for the flow, 1 for the reverse SDE, any other number, or a function of the time at the
            end of a step. Predictor and corrector use the same noise.
        moments: Moments of rows with two nodes, see :func:`weights`; None is exact.
        start: Treatment of the first steps: ``"ramp"`` raises the order step by step, as published; ``"self"`` uses
            single steps of full order. With fewer steps than `nodes`, the ramp ends at the order of that many nodes,
            and the plan declares this order: ``UniPC(9)`` in 4 steps is ``UniPC(4)``.
        final: Number of nodes of a step into σ = 0; 0 for as many as in other steps. With 1 the result is the newest
            data prediction, which is more accurate than an extrapolation if the step is long.

    References:
        | Exponential Integrators (Hochbruck and Ostermann, 2010), Acta Numerica 19
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models (Lu et al., 2022), arXiv:2211.01095
    """

    nodes: int = 2
    prediction: Prediction = DATA
    variable: Variable = LAM
    corrector: int = 0
    reevaluate: bool = False
    eta: Eta = 0.0
    moments: Moments = None
    start: str = "ramp"
    final: int = 0

    def __post_init__(self) -> None:
        check.integer("nodes", self.nodes, at_least=1)
        check.integer("corrector", self.corrector)
        check.integer("final", self.final)
        check.choice("start", self.start, ("ramp", "self"))
        check_eta("eta", self.eta)
        if self.start == "self" and self.nodes > 3:
            raise ValueError(f"`start`='self' requires at most 3 nodes, got {self.nodes}; use `start`='ramp'.")

    @property
    def order(self) -> int:
        """Order of the predictor, or min(nodes + 1, corrector) with a corrector.

        With ``start="ramp"`` the low-order first steps reduce the accuracy of orders above 2.
        """
        return self.corrected(self.nodes)

    @property
    def weak_order(self) -> int:
        """With noise at most 2 for any number of nodes, because each step uses one Gaussian increment."""
        return min(self.order, 2) if self.eta else self.order

    @property
    def stages(self) -> int:
        return 2 if self.corrector and self.reevaluate else 1

    def corrected(self, order: int) -> int:
        """Order with the corrector, if the predictor has order `order`."""
        return min(order + 1, self.corrector) if self.corrector else order

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return a solver and its number of steps, see :meth:`Solver.for_nfe`.

        The last step needs no new evaluation. With ``start="self"`` each of the first `nodes` − 1 steps costs `nodes`
        evaluations; if `nfe` is too small for further steps, the returned solver has ``start="ramp"``.
        """
        after = check.integer("nfe", nfe, at_least=1) - 1
        if self.start == "self":
            steps = self.nodes + (after - self.nodes * (self.nodes - 1)) // self.stages
            if steps > self.nodes:
                return self, steps
        solver = replace(self, start="ramp") if self.start == "self" else self
        return solver, 1 + after // self.stages

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        plan, steps = super().plan(sde, times, up=up), len(times) - 1
        short = self.start == "ramp" and steps < self.nodes
        return replace(plan, order=self.corrected(steps)) if short else plan

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        if self.start == "self" and len(leg.history) < self.nodes and leg.evaluates:
            single = SingleStep(self.nodes, prediction=self.prediction, variable=self.variable, eta=self.eta)
            new, _ = single.leg(tape, leg)
            return new, [new, *leg.history][: self.nodes]
        eta = eta_at(self.eta, leg.t, tape.sde)
        noise = [(tape.draw(), 1.0)] if noisy(eta) else None
        correct = self.corrector > 0 and leg.evaluates

        def move(nodes: list[int], *, evaluates: bool, node: int | None, note: str) -> int:
            return tape.move(
                leg.row,
                leg.t,
                nodes,
                evaluates=evaluates,
                prediction=self.prediction,
                variable=self.variable,
                eta=eta,
                moments=self.moments_of(len(nodes)),
                noise=noise,
                node=node,
                note=note,
            )

        if correct:
            predicted = move(leg.history[: self.nodes], evaluates=True, node=None, note="predict")
            nodes = [predicted, *leg.history][: self.corrector]
            new = move(nodes, evaluates=self.reevaluate, node=leg.node, note="correct")
            evaluated = new if self.reevaluate else predicted
        else:
            count = self.final if self.final and tape.no_noise(leg.t) else self.nodes
            evaluated = new = move(leg.history[:count], evaluates=leg.evaluates, node=leg.node, note="")
        history = [evaluated, *leg.history][: max(self.nodes, self.corrector)] if leg.evaluates else leg.history
        return new, history

    def moments_of(self, nodes: int) -> Moments:
        """Moments of a row with `nodes` nodes: `moments` for two nodes, or if it has one entry per node; else exact."""
        return self.moments if nodes == 2 or len(self.moments or ()) == nodes else None

    def after_noise(self, tape: Tape, row: int, history: list[int]) -> list[int]:
        """Return the history after fresh noise: rows at other times if the prediction is the data, else none.

        Other predictions diverge if the history crosses fresh noise.
        """
        if self.prediction != DATA:
            return [row]
        t = _float64(tape.time(row))
        earlier = [k for k in history if not torch.equal(_float64(tape.time(k)), t)]
        return [row, *earlier][: max(self.nodes, self.corrector)]


def _float64(t: Weight) -> Tensor:
    return torch.as_tensor(t, dtype=torch.float64)
