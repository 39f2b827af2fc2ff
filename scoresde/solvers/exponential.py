r"""Exponential Runge–Kutta methods given by φ-functions: RES of order 3 and the method of Krogstad of order 4.

.. math:: x_i = \Phi(c_i) x_s + \alpha_i h \sum_j a_{ij}(h)\, d_j, \qquad
          \varphi_k(z) = \int_0^1 e^{(1-\theta)z}\,\frac{\theta^{k-1}}{(k-1)!}\,d\theta

The stages are at fractions c_i of the step in λ, and d is the data prediction. Solvers whose stages interpolate need
no φ-functions; see :class:`SingleStep`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._numerics import legendre
from scoresde.plan.rows import Weight
from scoresde.solvers.rule import Solver, between
from scoresde.solvers.single_step import finite_leg
from scoresde.solvers.tape import Tape

Phi = Mapping[tuple[int, float], float]


def phi(k: int, z: Tensor) -> Tensor:
    """φ_k(z) for k ≥ 1 by Gauss–Legendre quadrature, exact to rounding and without cancellation."""
    node, weight = legendre()
    return ((1 - node) * z[..., None]).exp().mul(node ** (k - 1) / math.factorial(k - 1)) @ weight


@dataclass(frozen=True, eq=False)
class ExponentialTableau:
    """Tableau of an exponential Runge–Kutta method; its coefficients are sums of φ_k(−c h).

    Arguments:
        c: Fractions of the stages after the first, in λ.
        a: Coefficients of the stages after the first, one row for each of these stages and one for the result:
            ``{(k, c): factor}`` is Σ factor · φ_k(−c h). The first stage's coefficient makes constant data exact.
        order: Order of convergence.
        name: Name of the method.
    """

    c: tuple[float, ...]
    a: tuple[tuple[Phi, ...], ...]
    order: int
    name: str

    def __post_init__(self) -> None:
        sizes = [len(row) for row in self.a]
        if sizes != [*range(len(self.c)), len(self.c)]:
            raise ValueError(f"`a` must have rows of {[*range(len(self.c)), len(self.c)]} entries, got {sizes}.")


def res3(c2: float = 0.5, c3: float = 1.0) -> ExponentialTableau:
    """Return the three-stage tableau of RES, of order 3 for any 0 < c2, c3 ≤ 1 with c2 ≠ 2/3 and c2 ≠ c3."""
    for name, c in (("c2", c2), ("c3", c3)):
        check.number(name, c, above=0, at_most=1)
    if math.isclose(c2, 2 / 3):
        raise ValueError("`c2` must not be 2/3, where the weights of order 3 are undefined; choose another value.")
    gamma = c3 * (3 * c3 - 2) / (c2 * (2 - 3 * c2))
    total = gamma * c2 + c3
    a32 = {(2, c2): gamma * c2, (2, c3): c3**2 / c2}
    return ExponentialTableau(
        (c2, c3), ((), (a32,), ({(2, 1.0): gamma / total}, {(2, 1.0): 1 / total})), 3, f"RES-3({c2:g}, {c3:g})"
    )


KROGSTAD4 = ExponentialTableau(
    (0.5, 0.5, 1.0),
    (
        (),
        ({(2, 0.5): 1.0},),
        ({}, {(2, 1.0): 2.0}),
        (
            {(2, 1.0): 2.0, (3, 1.0): -4.0},
            {(2, 1.0): 2.0, (3, 1.0): -4.0},
            {(2, 1.0): -1.0, (3, 1.0): 4.0},
        ),
    ),
    4,
    "Krogstad-4",
)


@dataclass(frozen=True, repr=False)
class ExponentialRungeKutta(Solver):
    """An exponential Runge–Kutta method on the data prediction; a step with infinite λ at one end has no stages.

    Arguments:
        tableau: Coefficients of the method.
        label: Name of the solver in its plans.
    """

    tableau: ExponentialTableau = KROGSTAD4
    label: str = ""

    def __repr__(self) -> str:
        return f"{self.label or 'ExponentialRungeKutta'}({self.tableau.name})"

    @property
    def declared_order(self) -> int:
        return self.tableau.order

    @property
    def stages(self) -> int:
        return 1 + len(self.tableau.c)

    @property
    def _forgets(self) -> bool:
        return True

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s, sde = tape.time(now), tape.sde
        if not finite_leg(sde, s, t):
            new = tape.move(now, t, history[:1], evaluates=asks, node=node, note="one stage")
            return new, [new]
        plain = not (isinstance(s, Tensor) or isinstance(t, Tensor))
        a, b = (v if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64) for v in (s, t))
        h = sde.lam(b) - sde.lam(a)
        evaluated = [history[0]]
        for i, row in enumerate(self.tableau.a):
            last = i == len(self.tableau.c)
            c = 1.0 if last else self.tableau.c[i]
            time = t if c == 1 else between(sde, s, t, c)
            at = time if isinstance(time, Tensor) else torch.tensor(time, dtype=torch.float64)
            later = [sum((w * phi(k, -r * h) for (k, r), w in terms.items()), torch.zeros_like(h)) for terms in row]
            first = c * phi(1, -c * h) - sum(later, torch.zeros_like(h))
            scale = sde.alpha(at) * h
            weights: list[Any] = [scale * w for w in (first, *later)]
            keep: Any = sde.sigma(at) / sde.sigma(a)
            if plain:
                weights, keep = [float(w) for w in weights], float(keep)
            d = [(k, w) for k, w in zip(evaluated, weights, strict=True) if isinstance(w, Tensor) or w]
            new = tape.append(
                time,
                x=[(now, keep)],
                d=d,
                evaluates=asks if last else True,
                node=node if last else None,
                note="" if last else "stage",
            )
            evaluated.append(new)
        return new, [new]
