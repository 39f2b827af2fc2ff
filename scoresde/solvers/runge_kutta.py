"""Explicit Runge–Kutta methods on the probability flow, by Butcher tableau."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plan.rows import Terms, Weight
from scoresde.solvers.interpolants import DATA, NOISE, Prediction
from scoresde.solvers.naming import constructor
from scoresde.solvers.quadrature import Point
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Leg, Tape


@checked
@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau: the coefficients of a Runge–Kutta method.

    Arguments:
        a: Rows of the lower triangle: row i has i + 1 entries, for stage i + 1.
        b: Weights of the result.
        order: Order of convergence.
        name: Name of the method.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int
    name: str = ""

    def __post_init__(self) -> None:
        if [len(row) for row in self.a] != list(range(1, len(self.b))):
            raise ValueError(
                f"`a` must be a lower triangle with rows of 1 … {len(self.b) - 1} entries, got "
                f"{[len(row) for row in self.a]}."
            )
        if not math.isclose(sum(self.b), 1.0, rel_tol=1e-12):
            raise ValueError(f"`b` must sum to 1, got {sum(self.b)}.")

    @property
    def c(self) -> tuple[float, ...]:
        """Fractions of the stages: the sums of the rows of `a`."""
        return (0.0, *(sum(row) for row in self.a))

    def __repr__(self) -> str:
        return next((name for name, known in TABLEAUX.items() if known == self), None) or constructor(self)


EULER = Tableau((), (1.0,), 1, "Euler")

HEUN = Tableau(((1.0,),), (0.5, 0.5), 2, "Heun")

MIDPOINT = Tableau(((0.5,),), (0.0, 1.0), 2, "midpoint")

RALSTON = Tableau(((2 / 3,),), (0.25, 0.75), 2, "Ralston")

KUTTA3 = Tableau(((0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3, "Kutta-3")

HEUN3 = Tableau(((1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3, "Heun-3")

RALSTON3 = Tableau(((0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9), 3, "Ralston-3")

SSP3 = Tableau(((1.0,), (0.25, 0.25)), (1 / 6, 1 / 6, 2 / 3), 3, "SSP-3")

RK4 = Tableau(((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4, "RK4")

TABLEAUX = {
    "EULER": EULER,
    "HEUN": HEUN,
    "MIDPOINT": MIDPOINT,
    "RALSTON": RALSTON,
    "KUTTA3": KUTTA3,
    "HEUN3": HEUN3,
    "RALSTON3": RALSTON3,
    "SSP3": SSP3,
    "RK4": RK4,
}
"""The tableaux of this module by name."""


def second_order(alpha: float) -> Tableau:
    """Return the tableau of order 2 with its second stage at `alpha` in (0, 1]: ½ midpoint, ⅔ Ralston, 1 Heun."""
    check.number("alpha", alpha, above=0, at_most=1)
    return Tableau(((alpha,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)), 2, f"second-order({alpha:g})")


@checked
@dataclass(frozen=True, repr=False)
class RungeKutta(Solver):
    r"""A Runge–Kutta method on the probability flow.

    With a prediction f, the method solves :math:`dy/dc = \pm f` for :math:`y = x/N`, where N is the scale and c the
    clock of the prediction; for noise this is EDM's :math:`d(x/\alpha)/d(\sigma/\alpha) = \varepsilon`. Without a
    prediction, the method solves dx/dt or dx/dλ.

    Arguments:
        tableau: Coefficients of the method.
        prediction: Prediction that defines the scale and the clock; None for dx/dt or dx/dλ.
        clock: Time variable if `prediction` is None: ``"t"`` or ``"lam"``.

    References:
        | Solving Ordinary Differential Equations I (Hairer, Nørsett and Wanner, 1993)
    """

    tableau: Tableau = HEUN
    prediction: Prediction | None = NOISE
    clock: str = "t"

    memoryless: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check.choice("clock", self.clock, ("t", "lam"))
        if self.prediction == DATA:
            raise ValueError("`prediction` must not be DATA, whose clock is infinite at σ = 0; use SingleStep.")

    @property
    def order(self) -> int:
        """Order of the tableau."""
        return self.tableau.order

    @property
    def stages(self) -> int:
        return len(self.tableau.b)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        times, evaluates, node = (tape.time(leg.row), leg.t), leg.evaluates, leg.node
        of_noise = self.prediction is None or self.prediction == NOISE
        if any(map(tape.no_noise, times)) or (of_noise and any(map(tape.no_signal, times))):
            # The slope is undefined at σ = 0 and, for the noise and the plain flow, at α = 0.
            f = self.prediction or DATA
            new = tape.move(
                leg.row, leg.t, leg.history[:1], prediction=f, evaluates=evaluates, node=node, note="one stage"
            )
            return new, [new]
        step = _TableauStep(tape, leg, self)
        stages = leg.history[:1]
        for i, row in enumerate(self.tableau.a, start=1):
            x, d = step.combine(leg.row, stages, row, i)
            stages.append(tape.append(step.times[i], x=x, d=d, note="stage"))
        x, d = step.combine(leg.row, stages, self.tableau.b, len(self.tableau.c))
        new = tape.append(leg.t, x=x, d=d, evaluates=evaluates, node=node)
        return new, [new]


class _TableauStep:
    """One step of a tableau: the times of its stages, and its slopes as combinations of x and d."""

    def __init__(self, tape: Tape, leg: Leg, solver: RungeKutta) -> None:
        sde, prediction, clock, tableau = tape.sde, solver.prediction, solver.clock, solver.tableau
        rows = [(i, [(j, a) for j, a in enumerate(row) if a]) for i, row in enumerate(tableau.a, start=1)]
        # slope j: the first stage i that uses this slope only, and its coefficient a_ij
        self.only_slope = {terms[0][0]: (i, terms[0][1]) for i, terms in reversed(rows) if len(terms) == 1}
        s, t = tape.ends(leg)
        fraction = torch.tensor([*tableau.c, 1.0], dtype=torch.float64).reshape(-1, *[1] * s.t.ndim)
        if prediction is None and clock == "t":
            times, h = s.t + fraction * (t.t - s.t), t.t - s.t
        else:
            to, back = (prediction.clock, prediction.lam_of_clock) if prediction else (_same, _same)
            first, last = to(s.lam), to(t.lam)
            h = last - first
            inner = sde.inverse_lam(back(first + fraction * h)).clamp(0.0, sde.T)
            times = torch.where(fraction == 0, s.t, torch.where(fraction == 1, t.t, inner))
        at = Point.of(sde, times)
        if prediction is None:
            flat = times.reshape(-1)
            dot_alpha, dot_sigma, g2 = (fn(flat).reshape(times.shape) for fn in (sde.alpha_dot, sde.sigma_dot, sde.g2))
            rate = torch.ones_like(times) if clock == "t" else -2 * at.sigma**2 / g2  # dt/dλ
            p = rate * dot_sigma / at.sigma
            q = rate * (dot_alpha - dot_sigma * at.alpha / at.sigma)
            scale = torch.ones_like(times)
        else:
            p, q = prediction.p(at.alpha, at.sigma), prediction.q(at.alpha, at.sigma)
            scale = prediction.scale(at.alpha, at.sigma)
            if bool((q > 0).all()):  # dy/dc = ±f, and the sign is that of −q
                h = -h
        self.h = tape.number(h)
        self.times, self.scale, self.p, self.q = (tape.numbers(v) for v in (times, scale, p, q))

    def combine(self, row: int, stages: list[int], a: tuple[float, ...], at: int) -> tuple[Terms, Terms]:
        """Return x_at = N_at (x_row/N_0 + h Σ a_j f_j) as terms of x and d.

        If a stage uses one slope only, x_i = N_i (x_row/N_0 + h a_ij f_j), then f_j is computed from x_i where this
        loses no accuracy. The result then needs one term less, and d_j need not be stored.
        """
        n = self.scale[at]
        x = {row: n / self.scale[0]}
        d: dict[int, Weight] = {}
        for j, (stage, a_j) in enumerate(zip(stages, a, strict=True)):
            i, a_ij = self.only_slope.get(j, (at, 0.0))
            if a_j and i < len(stages) and abs(a_j) <= abs(a_ij):
                share = a_j / a_ij
                terms = [(row, -n / self.scale[0] * share), (stages[i], n / self.scale[i] * share)]
            elif a_j:
                w = n * self.h * a_j
                terms = [(stage, w * self.p[j])]
                d[stage] = w * self.q[j]
            else:
                continue
            for k, v in terms:
                x[k] = x[k] + v if k in x else v
        return tuple(x.items()), tuple(d.items())


def _same(lam: Tensor) -> Tensor:
    return lam
