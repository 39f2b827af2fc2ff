r"""Exponential Runge–Kutta methods given by φ-functions: RES and the fourth-order method of Krogstad.

.. math:: x_i = \Phi(c_i) x_s + \alpha_i h \sum_j a_{ij}(h)\, d_j, \qquad
          \varphi_k(z) = \int_0^1 e^{(1-\theta)z}\,\frac{\theta^{k-1}}{(k-1)!}\,d\theta

at fractions c_i of the leg in λ, for the data prediction. Interpolating rules need no φ-functions
(:class:`~scoresde.solvers.singlestep.SingleStep`); these are the methods whose stages do more than interpolate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan import Weight
from scoresde.quadrature import legendre
from scoresde.solvers.base import Solver, between
from scoresde.solvers.singlestep import finite_leg
from scoresde.tape import Tape

Phi = Mapping[tuple[int, float], float]


def phi(k: int, z: Tensor) -> Tensor:
    """φ_k(z) for k ≥ 1, by Gauss–Legendre: exact to rounding and free of cancellation at any z."""
    node, weight = legendre()
    return ((1 - node) * z[..., None]).exp().mul(node ** (k - 1) / math.factorial(k - 1)) @ weight


@dataclass(frozen=True, eq=False)
class ExponentialTableau:
    """Coefficients as sums of φ_k(−c h).

    Arguments:
        c: Fractions of the stages after the first, in λ.
        a: For each stage after the first, and for the result, the coefficients of the stages after the first:
            ``{(k, c): factor}`` stands for Σ factor · φ_k(−c h). The first stage takes what makes constant data exact.
        order: The order it has.
        name: What it is called.
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
    """The three-stage method of RES, of order 3 for any 0 < c2, c3 ≤ 1 with 3 c2 ≠ 2 (or c3 = 2/3)."""
    for name, c in (("c2", c2), ("c3", c3)):
        check.number(name, c, above=0, most=1)
    if math.isclose(c2, 2 / 3):
        raise ValueError("`c2` = 2/3 leaves the weights of order 3 undefined; take another.")
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
    """An exponential Runge–Kutta method on the data prediction; its stages at a leg into σ = 0 are left out.

    Arguments:
        tableau: The coefficients.
        label: Name of the plans.
    """

    tableau: ExponentialTableau = KROGSTAD4
    label: str = ""

    def __repr__(self) -> str:
        return f"{self.label or 'ExponentialRungeKutta'}({self.tableau.name})"

    @property
    def declared_order(self) -> int:
        """Order of the tableau."""
        return self.tableau.order

    @property
    def stages(self) -> int:
        """Evaluations that one leg costs; a leg into σ = 0 costs one."""
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
        asked = [history[0]]
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
            d = [(k, w) for k, w in zip(asked, weights, strict=True) if isinstance(w, Tensor) or w]
            new = tape.append(
                time,
                x=[(now, keep)],
                d=d,
                evaluates=asks if last else True,
                node=node if last else None,
                note="" if last else "stage",
            )
            asked.append(new)
        return new, [new]
