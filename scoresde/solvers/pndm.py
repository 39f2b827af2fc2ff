r"""Solvers that extrapolate the noise prediction with fixed coefficients, such as PNDM.

Each step is a DDIM step whose noise is a combination of noise predictions:

.. math:: x_t = \frac{\alpha_t}{\alpha_s} x_s + \left(\sigma_t - \frac{\alpha_t}{\alpha_s}\sigma_s\right)\sum_j a_j\,
          \varepsilon_{i-j}, \qquad \textstyle\sum_j a_j = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plan.rows import Weight
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Leg, Tape

ADAMS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams–Bashforth coefficients for equal steps: orders 1 to 4, newest prediction first."""


@checked
@dataclass(frozen=True, repr=False)
class NoiseCombination(Solver):
    """DDIM with a fixed combination of the last noise predictions.

    Arguments:
        coefficients: Rows of coefficients, newest prediction first. Row k applies when the history has k + 1
            predictions, and the last row applies to every longer history.
        order: Order of convergence; at most 2 for the coefficients of equal steps on other grids.
        improved: Whether the first step is a pseudo improved Euler step. That step uses the mean of the noise at its
            two ends and costs one more evaluation.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), arXiv:2202.09778
    """

    coefficients: tuple[tuple[float, ...], ...] = ADAMS
    order: int = 2
    improved: bool = False

    def __post_init__(self) -> None:
        for row in self.coefficients:
            if abs(sum(row) - 1) > 1e-12:
                raise ValueError(f"`coefficients` must have rows that sum to 1, got {row}.")

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return a solver and its number of steps; with `improved` the first step costs two evaluations."""
        if not self.improved:
            return super().for_nfe(nfe, clean=clean)
        check.integer("nfe", nfe, at_least=1)
        return (self, nfe - 1) if nfe > 2 else (replace(self, improved=False), nfe)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        history, a = leg.history, self.coefficients[min(len(leg.history), len(self.coefficients)) - 1]
        nodes = history[: len(a)]
        if tape.no_signal(tape.time(leg.row)):
            nodes, a = history[:1], (1.0,)
        elif self.improved and len(history) == 1 and not tape.no_noise(leg.t):
            predicted = noise_step(tape, stage_of(leg, leg.t), history, (1.0,))
            nodes, a = [leg.row, predicted], (0.5, 0.5)
        new = noise_step(tape, leg, nodes, a)
        return new, ([new, *history][: len(self.coefficients)] if leg.evaluates else history)


def noise_step(tape: Tape, leg: Leg, nodes: list[int], a: tuple[float, ...]) -> int:
    """Add a DDIM step with the noise Σ a_j ε_j of `nodes`; return the new row."""
    note = "" if leg.node is not None else "stage"
    if nodes == [leg.row]:  # DDIM's two forms agree only for the noise of the first row
        return tape.move(leg.row, leg.t, nodes, evaluates=leg.evaluates, node=leg.node, note=note)
    s, t = tape.ends(leg)
    ratio = t.alpha / s.alpha
    factor = t.sigma - ratio * s.sigma
    x, d = {leg.row: ratio}, {}
    for k, c in zip(nodes, a, strict=True):
        at = tape.at(tape.time(k))
        w = factor * c / at.sigma
        x[k] = x[k] + w if k in x else w
        d[k] = -w * at.alpha
    return tape.append(leg.t, x=list(x.items()), d=list(d.items()), evaluates=leg.evaluates, node=leg.node, note=note)


def stage_of(leg: Leg, t: Weight) -> Leg:
    """The step to a stage at time t, where the network is evaluated."""
    return replace(leg, t=t, evaluates=True, node=None)


@checked
@dataclass(frozen=True, repr=False)
class PNDM(Solver):
    r"""PNDM: three pseudo Runge–Kutta steps, then Adams–Bashforth steps on the noise.

    A pseudo Runge–Kutta step is RK4 with DDIM steps to its stages, at the middle and the end of the step in t. It
    costs four evaluations. The Adams coefficients are those of equal steps, so the order on other grids is 2.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), arXiv:2202.09778
    """

    order: ClassVar[int] = 2

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return PNDM and its number of steps, or PLMS with an improved Euler start if `nfe` is at most 12."""
        check.integer("nfe", nfe, at_least=1)
        return (self, nfe - 9) if nfe > 12 else NoiseCombination(improved=True).for_nfe(nfe, clean=clean)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        s, history = tape.time(leg.row), leg.history
        if len(history) > 3 or tape.no_noise(leg.t) or tape.no_signal(s):
            row = ADAMS[min(len(history), 4) - 1]
            new = noise_step(tape, leg, history[: len(row)], row)
        else:
            mid = (s + leg.t) / 2
            one = noise_step(tape, stage_of(leg, mid), history[:1], (1.0,))
            two = noise_step(tape, stage_of(leg, mid), [one], (1.0,))
            three = noise_step(tape, stage_of(leg, leg.t), [two], (1.0,))
            new = noise_step(tape, leg, [history[0], one, two, three], (1 / 6, 1 / 3, 1 / 3, 1 / 6))
        return new, ([new, *history][:4] if leg.evaluates else history)
