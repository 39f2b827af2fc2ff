"""Annealed Langevin dynamics as a solver."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plan.rows import Weight
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Leg, Tape


@checked
@dataclass(frozen=True, repr=False)
class AnnealedLangevin(Solver):
    r"""Annealed Langevin dynamics (NCSN): `n` Langevin steps at each noise level of the grid.

    .. math:: x' = x + \tfrac{a}{2}\nabla\log p_t(x) + \sqrt{a}\,z, \qquad a = r\,\sigma_t^2

    Between two levels x/α does not change. If the grid ends at σ = 0, the result is E[x_0 | x] at the last level with
    σ > 0 (the denoising step); otherwise the solver runs `n` steps at the last time too.

    Arguments:
        n: Number of steps at each level.
        r: Step size a in units of σ². The paper's ε is r σ_L² at the last level: 2e-5 with σ_L = 0.01 is r = 0.2.

    References:
        | Generative Modeling by Estimating Gradients of the Data Distribution (Song & Ermon, 2019), arXiv:1907.05600,
          algorithm 1
        | Adversarial score matching and improved sampling for image generation (Jolicoeur-Martineau et al., 2021),
          arXiv:2009.05475, on the denoising step
    """

    n: int = 10
    r: float = 0.2

    order: ClassVar[int] = 0  # the error does not vanish with more levels, only with more and smaller steps at each

    def __post_init__(self) -> None:
        check.integer("n", self.n, at_least=1)
        check.number("r", self.r, above=0, below=4)

    @property
    def stages(self) -> int:
        """Number of evaluations at each level."""
        return self.n

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return the solver and its number of steps: each of N levels before σ = 0, or of N + 1, costs n evaluations.

        The evaluation of the denoising step is one more.
        """
        levels = (check.integer("nfe", nfe, at_least=1) - clean) // self.n
        return self, max(1, levels if clean else levels - 1)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        row, s = leg.row, tape.time(leg.row)
        for _ in range(self.n - 1):
            row = self._step(tape, row, s)
        if tape.no_noise(leg.t):
            row = self._step(tape, row, s)
            alpha = tape.at(leg.t).alpha
            row = tape.append(leg.t, d=[(row, alpha)], evaluates=False, node=leg.node, note="denoise")
        elif leg.evaluates:
            row = self._step(tape, row, leg.t, node=leg.node)
        else:
            for _ in range(self.n):
                row = self._step(tape, row, leg.t)
            row = self._step(tape, row, leg.t, evaluates=False, node=leg.node)
        return row, [row]

    def _step(self, tape: Tape, row: int, t: Weight, *, evaluates: bool = True, node: int | None = None) -> int:
        """Append one Langevin step at the level of `row`, followed by a rescaling to the level of t."""
        if tape.no_signal(tape.time(row)):
            T = tape.sde.T
            raise ValueError(f"the grid starts at t = {T:g}, where α = 0 and x/α is undefined; start at a smaller t.")
        s = tape.at(tape.time(row))
        scale = tape.at(t).alpha / s.alpha
        return tape.append(
            t,
            x=[(row, scale * (1 - self.r / 2))],
            d=[(row, scale * self.r / 2 * s.alpha)],
            z=[(tape.draw(), scale * math.sqrt(self.r) * s.sigma)],
            evaluates=evaluates,
            node=node,
            note="Langevin",
        )
