"""Explicit Runge–Kutta methods on the probability flow, by Butcher tableau."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan.rows import Weight
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import DATA, NOISE, Prediction
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Tape


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


EULER = Tableau((), (1.0,), 1, "Euler")

HEUN = Tableau(((1.0,),), (0.5, 0.5), 2, "Heun")

MIDPOINT = Tableau(((0.5,),), (0.0, 1.0), 2, "midpoint")

RALSTON = Tableau(((2 / 3,),), (0.25, 0.75), 2, "Ralston")

KUTTA3 = Tableau(((0.5,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), 3, "Kutta-3")

HEUN3 = Tableau(((1 / 3,), (0.0, 2 / 3)), (0.25, 0.0, 0.75), 3, "Heun-3")

RALSTON3 = Tableau(((0.5,), (0.0, 0.75)), (2 / 9, 1 / 3, 4 / 9), 3, "Ralston-3")

SSP3 = Tableau(((1.0,), (0.25, 0.25)), (1 / 6, 1 / 6, 2 / 3), 3, "SSP-3")

RK4 = Tableau(((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), 4, "RK4")


def second_order(alpha: float) -> Tableau:
    """Return the tableau of order 2 with its second stage at `alpha` in (0, 1]: ½ midpoint, ⅔ Ralston, 1 Heun."""
    check.number("alpha", alpha, above=0, at_most=1)
    return Tableau(((alpha,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)), 2, f"second-order({alpha:g})")


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
        label: Name of the solver in its plans.
    """

    tableau: Tableau = HEUN
    prediction: Prediction | None = NOISE
    clock: str = "t"
    label: str = ""

    def __post_init__(self) -> None:
        check.choice("clock", self.clock, ("t", "lam"))
        if self.prediction is DATA:
            raise ValueError("`prediction` must not be DATA, whose clock is infinite at σ = 0; use SingleStep.")

    def __repr__(self) -> str:
        equation = f"dx/d{self.clock}" if self.prediction is None else str(self.prediction)
        return f"{self.label or 'RungeKutta'}({self.tableau.name or 'tableau'}, {equation})"

    @property
    def declared_order(self) -> int:
        return self.tableau.order

    @property
    def stages(self) -> int:
        return len(self.tableau.b)

    @property
    def _forgets(self) -> bool:
        return True

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s = tape.time(now)
        if not self._defined(tape.sde, s, t):
            # The slope is undefined at σ = 0 and, for the noise and the plain flow, at α = 0.
            plain: dict[str, Any] = {} if self.prediction is None else {"prediction": self.prediction}
            new = tape.move(now, t, history[:1], **plain, evaluates=asks, node=node, note="one stage")
            return new, [new]
        step = _TableauStep(tape.sde, self.prediction, self.clock, s, t, self.tableau)
        stages = [history[0]]
        for i, row in enumerate(self.tableau.a, start=1):
            x, d = step.combine(now, stages, row, i)
            stages.append(tape.append(step.times[i], x=x, d=d, note="stage"))
        x, d = step.combine(now, stages, self.tableau.b, len(self.tableau.c))
        new = tape.append(t, x=x, d=d, evaluates=asks, node=node)
        return new, [new]

    def _defined(self, sde: SDE, s: Weight, t: Weight) -> bool:
        ends = [float(v.detach().reshape(-1)[0]) if isinstance(v, Tensor) else v for v in (s, t)]
        clean = min(sde.sigma(v) for v in ends) == 0
        silent = min(sde.alpha(v) for v in ends) == 0
        return not clean and not (silent and (self.prediction is NOISE or self.prediction is None))


class _TableauStep:
    """One step of a tableau: the times of its stages, and its slopes as combinations of x and d."""

    def __init__(
        self, sde: SDE, prediction: Prediction | None, clock: str, s: Weight, t: Weight, tableau: Tableau
    ) -> None:
        rows = [(i, [(j, a) for j, a in enumerate(row) if a]) for i, row in enumerate(tableau.a, start=1)]
        # slope j: the first stage i that uses this slope only, and its coefficient a_ij
        self.only_slope = {terms[0][0]: (i, terms[0][1]) for i, terms in reversed(rows) if len(terms) == 1}
        a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
        self.plain = not (isinstance(s, Tensor) or isinstance(t, Tensor))
        fraction = torch.tensor([*tableau.c, 1.0], dtype=torch.float64).reshape(-1, *[1] * a.ndim)
        if prediction is None and clock == "t":
            time, h = a + fraction * (b - a), b - a
        else:
            to, back = (
                (prediction.clock, prediction.lam_of_clock) if prediction else ((lambda lam: lam), (lambda lam: lam))
            )
            first, last = to(sde.lam(a)), to(sde.lam(b))
            h = last - first
            flat = sde.inverse_lam(back(first + fraction * h)).clamp(0.0, sde.T)
            time = torch.where(fraction == 0, a, torch.where(fraction == 1, b, flat))
        shape = time.shape
        alpha, sigma = (fn(time.reshape(-1)).reshape(shape) for fn in (sde.alpha, sde.sigma))
        if prediction is None:
            rate = torch.ones_like(time) if clock == "t" else 1 / _lam_dot(sde, time)
            dot_a, dot_s = (fn(time.reshape(-1)).reshape(shape) for fn in (sde.alpha_dot, sde.sigma_dot))
            p, q, scale = rate * dot_s / sigma, rate * (dot_a - dot_s * alpha / sigma), torch.ones_like(time)
        else:
            p, q = prediction.p(alpha, sigma), prediction.q(alpha, sigma)
            scale = prediction.scale(alpha, sigma)
            # dy/dc = κ f; κ = ±1 follows from the sign of q.
            kappa = -1.0 if bool((q.detach() > 0).all()) else 1.0
            h = kappa * h
        self.h, self.scale, self.p, self.q = (self._numbers(v) for v in (h, scale, p, q))
        self.times = self._numbers(time)

    def _numbers(self, v: Tensor) -> Any:
        return v.tolist() if self.plain else v

    def combine(self, now: int, stages: list[int], row: tuple[float, ...], at: int) -> tuple[Any, Any]:
        """Return x_at = N_at (x_now/N_0 + h Σ a_j f_j) as terms of x and d.

        If a stage uses one slope only, x_i = N_i (x_now/N_0 + h a_ij f_j), then f_j is computed from x_i where this
        loses no accuracy. The row then needs one term less, and d_j need not be stored.
        """
        n = self.scale[at]
        x: dict[int, Any] = {now: n / self.scale[0]}
        d: dict[int, Any] = {}
        for j, (stage, a) in enumerate(zip(stages, row, strict=True)):
            i, a_ij = self.only_slope.get(j, (at, 0.0))
            if a and i < len(stages) and abs(a) <= abs(a_ij):
                terms = [(now, -n / self.scale[0] * (a / a_ij)), (stages[i], n / self.scale[i] * (a / a_ij))]
            elif a:
                w = n * self.h * a
                terms = [(stage, w * self.p[j])]
                d[stage] = w * self.q[j]
            else:
                continue
            for k, v in terms:
                x[k] = x[k] + v if k in x else v
        return list(x.items()), list(d.items())


def _lam_dot(sde: SDE, t: Tensor) -> Tensor:
    flat = t.reshape(-1)
    return (-sde.g2(flat) / (2 * sde.sigma(flat) ** 2)).reshape(t.shape)
