"""Single-step rules: each leg has stages of its own and remembers nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan import Weight
from scoresde.quadrature import DATA, LAM, NOISE, Prediction, Variable
from scoresde.sde import SDE
from scoresde.solvers.base import Eta, Solver, between, check_eta, eta_at, said
from scoresde.tape import Tape


@dataclass(frozen=True, repr=False)
class SingleStep(Solver):
    r"""Exponential Runge–Kutta in λ, of order 1, 2 or 3: DPM-Solver's pattern of nodes.

    With i the start of the leg and s, s₂ stages at fractions r₁ < r₂ of it in λ: order 2 reads {i}; {i, s}, order 3
    reads {i}; {i, s}; {i, s₂}.

    Arguments:
        order: 1, 2 or 3.
        prediction: What is interpolated.
        variable: In what.
        r: Fractions of the stages, one for order 2 and two for order 3; by default ½, or ⅓ and ⅔.
        reads: Which of i (0), s (1), s₂ (2) the last row interpolates; all three make the Taylor form of order 3, s
            alone is DPM-2.
        moments: Of the last row, see :func:`scoresde.quadrature.weights`; None is exact.
        eta: 1 for the reverse SDE, 0 for the flow, any other number or a function of the time where a leg ends. Each
            stage draws the noise of its own part of the leg, which the later ones carry on: SEEDS.
        label: Name of the plans.
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
        if check.integer("order", self.order, least=1) > 3:
            raise ValueError(f"`order` must be 1, 2 or 3, got {self.order}.")
        default = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}[self.order]
        object.__setattr__(self, "r", tuple(self.r) or default)
        object.__setattr__(self, "reads", tuple(self.reads) or {1: (0,), 2: (0, 1), 3: (0, 2)}[self.order])
        if not set(self.reads) <= set(range(self.order)):
            raise ValueError(f"`reads` must name stages 0 … {self.order - 1}, got {self.reads}.")
        if len(self.r) != self.order - 1 or not all(0 < a < 1 for a in self.r) or sorted(set(self.r)) != list(self.r):
            raise ValueError(f"`r` must be {self.order - 1} increasing fractions inside (0, 1), got {self.r}.")

    def __repr__(self) -> str:
        eta = f", eta={said(self.eta)}" if self.eta else ""
        return f"{self.label or 'SingleStep'}(order={self.order}, {self.prediction} in {self.variable}{eta})"

    @property
    def declared_order(self) -> int:
        """Order of convergence; order 3 needs its last stage at 2/3, whatever the last row reads."""
        return 2 if self.order == 3 and not math.isclose(self.r[-1], 2 / 3) else self.order

    @property
    def weak_order(self) -> int:
        """With noise at most 2, whatever the number of stages: one normal a part of a leg says no more."""
        return min(self.declared_order, 2) if self.eta else self.declared_order

    @property
    def stages(self) -> int:
        """Evaluations that one leg costs; a leg into σ = 0 costs one."""
        return self.order

    @property
    def _forgets(self) -> bool:
        return not callable(self.eta)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        start = history[0]
        eta = eta_at(self.eta, t)
        how: dict[str, Any] = {"prediction": self.prediction, "variable": self.variable, "eta": eta}
        nodes, stages = [start], [start]
        if finite_leg(tape.sde, tape.time(now), t):
            for r in self.r:
                at = between(tape.sde, tape.time(now), t, r)
                stages.append(tape.move(now, at, stages[:2], through=stages[1:], **how, note="stage"))
            nodes = [stages[k] for k in self.reads]
        moments = self.moments if len(nodes) == 2 and self.order == 2 else None
        new = tape.move(now, t, nodes, **how, through=stages[1:], moments=moments, evaluates=asks, node=node)
        return new, [new]


def finite_leg(sde: SDE, s: Weight, t: Weight) -> bool:
    """Whether stages can be put at fractions of the leg in λ."""
    for v in (s, t):
        lam = sde.lam(v.detach() if isinstance(v, Tensor) else v)
        if not (bool(lam.isfinite().all()) if isinstance(lam, Tensor) else math.isfinite(lam)):
            return False
    return True


@dataclass(frozen=True)
class Tableau:
    """An explicit Butcher tableau, checked on construction.

    Arguments:
        a: Rows of the lower triangle: row i has i + 1 entries, for stage i + 1.
        b: Weights of the result.
        order: The order it has.
        name: What it is called.
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
        """Abscissae, the sums of the rows."""
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
    """The family of two-stage tableaux with the second stage at `alpha`: ½ midpoint, ⅔ Ralston, 1 Heun."""
    check.number("alpha", alpha, above=0, most=1)
    return Tableau(((alpha,),), (1 - 1 / (2 * alpha), 1 / (2 * alpha)), 2, f"second-order({alpha:g})")


@dataclass(frozen=True, repr=False)
class RungeKutta(Solver):
    r"""A Butcher tableau on the probability flow.

    With a prediction, on :math:`y = x/N` in the prediction's own clock c, where :math:`dy/dc = \pm f`: for noise that
    is EDM's :math:`d(x/\alpha)/d(\sigma/\alpha) = \varepsilon`. Without one, on dx/dt or dx/dλ as they stand.

    Arguments:
        tableau: The tableau.
        prediction: Whose clock and scale; None for the plain flow.
        clock: Of the plain flow: ``"t"`` or ``"lam"``.
        label: Name of the plans.
    """

    tableau: Tableau = HEUN
    prediction: Prediction | None = NOISE
    clock: str = "t"
    label: str = ""

    def __post_init__(self) -> None:
        check.choice("clock", self.clock, ("t", "lam"))
        if self.prediction is DATA:
            raise ValueError("`prediction` must not be DATA: its clock is infinite at data; use SingleStep.")

    def __repr__(self) -> str:
        where = f"dx/d{self.clock}" if self.prediction is None else str(self.prediction)
        return f"{self.label or 'RungeKutta'}({self.tableau.name or 'tableau'}, {where})"

    @property
    def declared_order(self) -> int:
        """Order of the tableau."""
        return self.tableau.order

    @property
    def stages(self) -> int:
        """Evaluations that one leg costs; a leg into σ = 0 costs one."""
        return len(self.tableau.b)

    @property
    def _forgets(self) -> bool:
        return True

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s = tape.time(now)
        if not self._defined(tape.sde, s, t):
            # A stage would be asked where nothing is known: without noise, or without signal.
            plain: dict[str, Any] = {} if self.prediction is None else {"prediction": self.prediction}
            new = tape.move(now, t, history[:1], **plain, evaluates=asks, node=node, note="one stage")
            return new, [new]
        legs = _Legs(tape.sde, self.prediction, self.clock, s, t, self.tableau)
        stages = [history[0]]
        for i, row in enumerate(self.tableau.a, start=1):
            x, d = legs.combine(now, stages, row, i)
            stages.append(tape.append(legs.times[i], x=x, d=d, note="stage"))
        x, d = legs.combine(now, stages, self.tableau.b, len(self.tableau.c))
        new = tape.append(t, x=x, d=d, evaluates=asks, node=node)
        return new, [new]

    def _defined(self, sde: SDE, s: Weight, t: Weight) -> bool:
        ends = [float(v.detach().reshape(-1)[0]) if isinstance(v, Tensor) else v for v in (s, t)]
        clean = min(sde.sigma(v) for v in ends) == 0
        silent = min(sde.alpha(v) for v in ends) == 0
        return not clean and not (silent and (self.prediction is NOISE or self.prediction is None))


class _Legs:
    """One leg of a tableau: where the stages are and what a slope is, as combinations of x and d."""

    def __init__(
        self, sde: SDE, prediction: Prediction | None, clock: str, s: Weight, t: Weight, tableau: Tableau
    ) -> None:
        lone = [(i, [(j, a) for j, a in enumerate(row) if a]) for i, row in enumerate(tableau.a, start=1)]
        self.seen = {terms[0][0]: (i, terms[0][1]) for i, terms in reversed(lone) if len(terms) == 1}
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
            flat = sde._t_of_lam(back(first + fraction * h)).clamp(0.0, sde.T)
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
            # dy/dc = κ f: both move the weight of d at a fixed state by the same amount, up to a constant.
            kappa = -1.0 if bool((q.detach() > 0).all()) else 1.0
            h = kappa * h
        self.h, self.scale, self.p, self.q = (self._numbers(v) for v in (h, scale, p, q))
        self.times = self._numbers(time)

    def _numbers(self, v: Tensor) -> Any:
        return v.tolist() if self.plain else v

    def combine(self, now: int, stages: list[int], row: tuple[float, ...], at: int) -> tuple[Any, Any]:
        """x_at = N_at (x_now/N_0 + h Σ a_j f_j), as terms of x and d.

        A slope that alone made a stage, N_i (x_now/N_0 + h a_ij f_j), is read off that stage's state where this costs
        no accuracy: one term less, and d_j need not be kept.
        """
        n = self.scale[at]
        x: dict[int, Any] = {now: n / self.scale[0]}
        d: dict[int, Any] = {}
        for j, (stage, a) in enumerate(zip(stages, row, strict=True)):
            i, lone = self.seen.get(j, (at, 0.0))
            if a and i < len(stages) and abs(a) <= abs(lone):
                terms = [(now, -n / self.scale[0] * (a / lone)), (stages[i], n / self.scale[i] * (a / lone))]
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
