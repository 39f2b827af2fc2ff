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
from typing import ClassVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde.solvers.naming import constructor
from scoresde.solvers.quadrature import Point
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Leg, Tape

Phi = Mapping[tuple[int, float], float]


def phi(k: int, z: Tensor) -> Tensor:
    """φ_k(z) for k ≥ 1 by Gauss–Legendre quadrature, exact to rounding and without cancellation."""
    node, weight = legendre()
    return ((1 - node) * z[..., None]).exp().mul(node ** (k - 1) / math.factorial(k - 1)) @ weight


@checked
@dataclass(frozen=True)
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

    def __hash__(self) -> int:
        return hash((self.c, self.order, self.name))  # `a` holds dictionaries

    def __repr__(self) -> str:
        return "KROGSTAD4" if self == KROGSTAD4 else constructor(self)


def res3(c2: float = 0.5, c3: float = 1.0) -> ExponentialTableau:
    """Return the three-stage tableau of RES, of order 3 for any 0 < c2, c3 ≤ 1 with c2 ≠ 2/3 and c2 ≠ c3."""
    for name, c in (("c2", c2), ("c3", c3)):
        check.number(name, c, above=0, at_most=1)
    if math.isclose(c2, 2 / 3):
        raise ValueError("`c2` must not be 2/3, where the weights of order 3 are undefined; choose another value.")
    if math.isclose(c2, c3):
        raise ValueError(f"`c2` and `c3` must differ, because order 3 needs three different times, got {c2:g} twice.")
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


@checked
@dataclass(frozen=True, repr=False)
class ExponentialRungeKutta(Solver):
    """An exponential Runge–Kutta method on the data prediction; a step with infinite λ at one end has no stages.

    Arguments:
        tableau: Coefficients of the method.

    References:
        | Exponential Integrators (Hochbruck and Ostermann, 2010), Acta Numerica 19
    """

    tableau: ExponentialTableau = KROGSTAD4

    memoryless: ClassVar[bool] = True

    @property
    def order(self) -> int:
        """Order of the tableau."""
        return self.tableau.order

    @property
    def stages(self) -> int:
        return 1 + len(self.tableau.c)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        start = tape.time(leg.row)
        if not tape.finite(start, leg.t):
            new = tape.move(leg.row, leg.t, leg.history[:1], evaluates=leg.evaluates, node=leg.node, note="one stage")
            return new, [new]
        s, t = tape.ends(leg)
        h, nodes = t.lam - s.lam, leg.history[:1]
        for c, row in zip(self.tableau.c, self.tableau.a, strict=False):
            time = leg.t if c == 1 else tape.between(start, leg.t, c)
            x, d = self._terms(s, tape.at(time), h, c, row)
            nodes.append(tape.append(time, x=[(leg.row, x)], d=_with_weight(nodes, d), note="stage"))
        x, d = self._terms(s, t, h, 1.0, self.tableau.a[-1])
        new = tape.append(leg.t, x=[(leg.row, x)], d=_with_weight(nodes, d), evaluates=leg.evaluates, node=leg.node)
        return new, [new]

    def _terms(self, s: Point, at: Point, h: Tensor, c: float, row: tuple[Phi, ...]) -> tuple[Tensor, list[Tensor]]:
        """Coefficient of the state at s, and of the evaluations, for a state at the fraction c of a step h in λ."""
        zero = torch.zeros_like(h)
        later = [sum((w * phi(k, -r * h) for (k, r), w in terms.items()), zero) for terms in row]
        first = c * phi(1, -c * h) - sum(later, zero)
        return at.sigma / s.sigma, [at.alpha * h * w for w in (first, *later)]


def _with_weight(nodes: list[int], weights: list[Tensor]) -> list[tuple[int, Tensor]]:
    """Terms of a row; evaluations that no sample uses are left out."""
    return [(k, w) for k, w in zip(nodes, weights, strict=True) if bool((w != 0).any())]
