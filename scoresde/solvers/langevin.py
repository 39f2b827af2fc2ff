"""Annealed Langevin dynamics as a solver."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from scoresde import _checks as check
from scoresde.plan.rows import Weight
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Tape


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

    def __post_init__(self) -> None:
        check.integer("n", self.n, at_least=1)
        check.number("r", self.r, above=0, below=4)

    def __repr__(self) -> str:
        return f"AnnealedLangevin(n={self.n}, r={self.r:g})"

    @property
    def declared_order(self) -> int:
        """Order 0: the error does not vanish with more levels, only with more and smaller steps at each level."""
        return 0

    @property
    def stages(self) -> int:
        """Number of evaluations at each level."""
        return self.n

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        sde, s = tape.sde, tape.time(now)
        sigma = sde.sigma(t)
        clean = bool((sigma == 0).all()) if isinstance(sigma, Tensor) else sigma == 0
        for _ in range(self.n - 1):
            now = self._step(tape, now, s)
        if clean:
            now = self._step(tape, now, s)
            now = tape.append(t, d=[(now, sde.alpha(t))], evaluates=False, node=node, note="denoise")
        elif asks:
            now = self._step(tape, now, t, node=node)
        else:
            now = self._step(tape, now, t)
            for _ in range(self.n - 1):
                now = self._step(tape, now, t)
            now = self._step(tape, now, t, evaluates=False, node=node)
        return now, [now]

    def _step(self, tape: Tape, now: int, t: Weight, *, evaluates: bool = True, node: int | None = None) -> int:
        """Append one Langevin step at the level of row `now`, followed by a rescaling to the level of t."""
        sde, s = tape.sde, tape.time(now)
        alpha, sigma = sde.alpha(s), sde.sigma(s)
        if not isinstance(alpha, Tensor) and alpha == 0:
            raise ValueError(f"the grid starts at t = {s:g}, where α = 0 and x/α is undefined; start at a smaller t.")
        scale = sde.alpha(t) / alpha
        return tape.append(
            t,
            x=[(now, scale * (1 - self.r / 2))],
            d=[(now, scale * self.r / 2 * alpha)],
            z=[(tape.draw(), scale * math.sqrt(self.r) * sigma)],
            evaluates=evaluates,
            node=node,
            note="Langevin",
        )
