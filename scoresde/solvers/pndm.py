r"""Solvers that extrapolate the noise prediction with fixed coefficients, such as PNDM.

Each step is a DDIM step whose noise is a combination of noise predictions:

.. math:: x_t = \frac{\alpha_t}{\alpha_s} x_s + \left(\sigma_t - \frac{\alpha_t}{\alpha_s}\sigma_s\right)\sum_j a_j\,
          \varepsilon_{i-j}, \qquad \textstyle\sum_j a_j = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.plan.rows import Weight
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Tape

ADAMS: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Adams–Bashforth coefficients for equal steps: orders 1 to 4, newest prediction first."""


@dataclass(frozen=True, repr=False)
class NoiseCombination(Solver):
    """DDIM with a fixed combination of the last noise predictions.

    Arguments:
        coefficients: Rows of coefficients, newest prediction first. Row k applies when the history has k + 1
            predictions, and the last row applies to every longer history.
        order: Order of convergence; at most 2 for the coefficients of equal steps on other grids.
        improved: Whether the first step is a pseudo improved Euler step. That step uses the mean of the noise at its
            two ends and costs one more evaluation.
        label: Name of the solver in its plans.
    """

    coefficients: tuple[tuple[float, ...], ...] = ADAMS
    order: int = 2
    improved: bool = False
    label: str = ""

    def __post_init__(self) -> None:
        for row in self.coefficients:
            if abs(sum(row) - 1) > 1e-12:
                raise ValueError(f"`coefficients` must have rows that sum to 1, got {row}.")

    def __repr__(self) -> str:
        return f"{self.label or 'NoiseCombination'}({len(self.coefficients)} terms)"

    @property
    def declared_order(self) -> int:
        return self.order

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return a solver and its number of steps; with `improved` the first step costs two evaluations."""
        if not self.improved:
            return super().for_nfe(nfe, clean=clean)
        check.integer("nfe", nfe, at_least=1)
        return (self, nfe - 1) if nfe > 2 else (replace(self, improved=False), nfe)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        nodes, a = history, self.coefficients[min(len(history), len(self.coefficients)) - 1]
        if tape.sde.alpha(_number(tape.time(now))) == 0:
            a = (1.0,)
        elif self.improved and len(history) == 1 and tape.sde.sigma(_number(t)) > 0:
            predicted = noise_leg(tape, now, history, (1.0,), t, True, None, "stage")
            nodes, a = [now, predicted], (0.5, 0.5)
        new = noise_leg(tape, now, nodes[: len(a)], a, t, asks, node)
        return new, ([new, *history][: len(self.coefficients)] if asks else history)


def noise_leg(
    tape: Tape,
    now: int,
    nodes: list[int],
    a: tuple[float, ...],
    t: Weight,
    evaluates: bool,
    node: int | None,
    note: str = "",
) -> int:
    """Add a DDIM step from `now` to t with the noise Σ a_j ε_j of `nodes`; return the new row."""
    if nodes == [now]:  # DDIM's two forms agree only for the noise of `now`
        return tape.move(now, t, nodes, evaluates=evaluates, node=node, note=note)
    sde, s = tape.sde, tape.time(now)
    ratio = _f(sde.alpha, t) / _f(sde.alpha, s)
    factor = _f(sde.sigma, t) - ratio * _f(sde.sigma, s)
    x: dict[int, Any] = {now: ratio}
    d: dict[int, Any] = {}
    for k, c in zip(nodes, a, strict=True):
        sigma = _f(sde.sigma, tape.time(k))
        x[k] = x.get(k, 0.0) + factor * c / sigma
        d[k] = -factor * c * _f(sde.alpha, tape.time(k)) / sigma
    return tape.append(t, x=list(x.items()), d=list(d.items()), evaluates=evaluates, node=node, note=note)


@dataclass(frozen=True, repr=False)
class PNDM(Solver):
    r"""PNDM: three pseudo Runge–Kutta steps, then Adams–Bashforth steps on the noise.

    A pseudo Runge–Kutta step is RK4 with DDIM steps to its stages, at the middle and the end of the step in t. It
    costs four evaluations. The Adams coefficients are those of equal steps, so the order on other grids is 2.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), arXiv:2202.09778
    """

    def __repr__(self) -> str:
        return "PNDM()"

    @property
    def declared_order(self) -> int:
        """Order of convergence on any grid."""
        return 2

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return PNDM and its number of steps, or PLMS with an improved Euler start if `nfe` is at most 12."""
        check.integer("nfe", nfe, at_least=1)
        return (self, nfe - 9) if nfe > 12 else NoiseCombination(improved=True, label="PLMS").for_nfe(nfe, clean=clean)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        s = tape.time(now)
        if len(history) > 3 or tape.sde.sigma(_number(t)) == 0 or tape.sde.alpha(_number(s)) == 0:
            row = ADAMS[min(len(history), 4) - 1]
            new = noise_leg(tape, now, history[: len(row)], row, t, asks, node)
        else:
            mid = (s + t) / 2
            one = noise_leg(tape, now, history[:1], (1.0,), mid, True, None, "stage")
            two = noise_leg(tape, now, [one], (1.0,), mid, True, None, "stage")
            three = noise_leg(tape, now, [two], (1.0,), t, True, None, "stage")
            mean = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
            new = noise_leg(tape, now, [history[0], one, two, three], mean, t, asks, node)
        return new, ([new, *history][:4] if asks else history)


def _number(t: Weight) -> float:
    return float(t.detach().reshape(-1)[0]) if isinstance(t, Tensor) else t


def _f(fn: Any, t: Weight) -> Any:
    return fn(t.reshape(-1)).reshape(t.shape) if isinstance(t, torch.Tensor) else fn(t)
