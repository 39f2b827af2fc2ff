r"""Tolerances, and the rule for the lengths of steps.

The error e of a step is measured in units of the tolerance, as a root mean square over the numbers of a sample. A step
with E ≤ 1 is accepted. The length h of the next one follows from E,

.. math:: E = \left\|\frac{e}{\mathrm{atol} + \mathrm{rtol}\,\max(|y_s|, |y_t|)}\right\|, \qquad
          h' = \kappa\, h\, E_n^{-\beta_1/q} E_{n-1}^{-\beta_2/q} E_{n-2}^{-\beta_3/q},

with :math:`(\beta_1, \beta_2, \beta_3) = (P + I + D, -(P + 2D), D)` and q the power of h in the error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked


@checked
@dataclass(frozen=True)
class Control:
    """Tolerances, and the rule for the length of the next step.

    Arguments:
        rtol: Relative tolerance of a step.
        atol: Absolute tolerance of a step.
        pid: Gains (P, I, D) of the control.
        safety: Factor κ of every new length.
        factors: Smallest and largest factor between a length and the next.
        first_step: Length of the first step; None estimates it with one evaluation.
        lengths: Length that is not reduced further, and largest length of a step.
        balance: Whether the last two steps before the end have equal lengths.
        lattice: Number of possible ends of steps in a unit of the clock; 0 for any end.
        max_nfe: Number of evaluations that a sample may use.
        limit: Name and value of that limit in the :class:`SolverError` that is raised there, by default `max_nfe`; None
            stops the sample there instead.
        steps: Number of equal steps without error control; 0 controls the error.
    """

    rtol: float
    atol: float
    pid: tuple[float, float, float] = (0.0, 1.0, 0.0)
    safety: float = 0.9
    factors: tuple[float, float] = (0.2, 4.0)
    first_step: float | None = None
    lengths: tuple[float, float] = (0.0, math.inf)
    balance: bool = True
    lattice: float = 0.0
    max_nfe: int = 1000
    limit: str | None = ""
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("rtol", "atol", "lattice"):
            check.number(name, getattr(self, name), at_least=0)
        check.number("safety", self.safety, above=0)
        if self.first_step is not None:
            check.number("first_step", self.first_step, above=0)
        check.integer("max_nfe", self.max_nfe, at_least=1)
        check.integer("steps", self.steps)

    def land(self, s: Tensor, h: Tensor, end: Tensor) -> Tensor:
        """End of a step of length about h.

        Arguments:
            s: Start of the step, (b,).
            h: Length, (b,), positive.
            end: End of the interval, (b,), on either side of `s`.
        """
        left, sign = (end - s).abs(), (end - s).sign()
        if self.balance:
            h = torch.where(left < 1.1 * h, left, torch.where(left < 2 * h, left / 2, h))
        else:
            h = torch.where(left <= h * (1 + 1e-6), left, h)
        if not self.lattice:
            return torch.where(h >= left, end, s + sign * h)
        forward = sign * s
        place = torch.maximum(((forward + h) * self.lattice).round(), (forward * self.lattice).floor() + 1)
        t = sign * place / self.lattice
        return torch.where((end - t) * sign < 1e-9 * (1 + end.abs()), end, t)

    def factor(self, E: Tensor, earlier: Tensor, power: Tensor | float) -> Tensor:
        """Factor between the length of a step and the next one.

        Arguments:
            E: Error of the step, (b,); up to 1 the step is accepted.
            earlier: Errors of the two accepted steps before it, (2, b).
            power: Exponent of the length in the error.
        """
        p, i, d = self.pid
        E = E.clamp_min(1e-10)
        after = E ** (-(p + i + d) / power) * earlier[0] ** ((p + 2 * d) / power) * earlier[1] ** (-d / power)
        again = (self.safety * E ** (-1 / power)).clamp(self.factors[0], 0.9)
        return torch.where(E <= 1, (self.safety * after).clamp(*self.factors), again)
