r"""Normals with a drift: how a proposal moves the particles of any plan, and what it costs in weight.

A plan is a function of its start and of its normals z. A proposal shifts them, :math:`z = \zeta + u` with
:math:`\zeta \sim N(0, I)` and u a function of the past, and the weight of the plan against the proposal is

.. math:: \frac{N(z; 0, I)}{N(z; u, I)} = \exp\left(-u^T\zeta - \tfrac12 |u|^2\right).

This holds for rows with several normals, for normals that several rows share, and for stages: no transition density is
needed. If guidance adds v to the score, the best small shift of a normal with weight c is u = c v: it tilts the new
state by :math:`e^{v^T x}`, to first order in v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise.keyed import Noise
from scoresde.plan.run import Normals, normals_of
from scoresde.plan.table import Plan


class Grouped:
    """Normals of P populations of N particles: those of particle n of problem p belong to sample p, at place n.

    A problem then has the same numbers in a batch of any size, and a particle in a population of any size.

    Arguments:
        source: Normals keyed by problem.
        shape: Pair (P, N).
    """

    def __init__(self, source: Normals, shape: tuple[int, int]) -> None:
        self._source, self._shape = source, shape

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Return the normals of a draw, with the shape (P N, *event), dtype and device of `x`."""
        return self._source.like(x.unflatten(0, self._shape), draw).flatten(0, 1)


class Driven:
    """Normals of the rows of a plan, shifted towards a proposal.

    Arguments:
        plan: Plan.
        noise: Noise of the steps, keyed by problem.
        shape: Pair (P, N).
    """

    def __init__(self, plan: Plan, noise: Noise, shape: tuple[int, int]) -> None:
        source = normals_of(plan, noise)
        assert source is not None
        self._plan, self._source = plan, Grouped(source, shape)
        self._first: dict[int, int] = {}  # first row that uses a draw
        self._last: dict[int, int] = {}
        for r, row in enumerate(plan.rows):
            for k, _ in row.z:
                self._first.setdefault(k, r)
                self._last[k] = r
        self._shifts: dict[int, Tensor] = {}  # u of draws that come
        self._drawn: dict[int, Tensor] = {}  # z of draws that a later row uses again
        self._log_ratio: Tensor | None = None

    def like(self, x: Tensor, draw: int) -> Tensor:
        """The shifted normals of a draw; its first use changes the weights."""
        if draw in self._drawn:
            return self._drawn[draw]
        z = self._source.like(x, draw)
        u = self._shifts.pop(draw, None)
        if u is not None:
            cost = -(u.double() * (z.double() + 0.5 * u.double())).flatten(1).sum(1)
            self._log_ratio = cost if self._log_ratio is None else self._log_ratio + cost
            z = z + u
        if self._last[draw] > self._first[draw]:
            self._drawn[draw] = z
        return z

    def steer(self, row: int, slope: Tensor | None) -> None:
        """Set the shifts of the normals after an evaluation, up to the next one.

        Arguments:
            row: Evaluated row.
            slope: Score that guidance adds, (P N, *event); None for no shift.
        """
        for k in [k for k in self._drawn if self._last[k] <= row]:
            del self._drawn[k]
        if slope is None:
            return
        for r in range(row + 1, len(self._plan.rows)):
            for k, w in self._plan.rows[r].z:
                if self._first[k] == r:
                    self._shifts[k] = check.expand(w, slope, "weight") * slope
            if self._plan.rows[r].evaluates:
                break

    def take(self) -> Tensor | None:
        """Logarithm of the weight that the shifts have cost since the last call, (P N,); None for nothing."""
        cost, self._log_ratio = self._log_ratio, None
        return cost

    def select(self, index: Tensor) -> None:
        """Keep what belongs to the parents of resampled particles."""
        self._drawn = {k: z[index] for k, z in self._drawn.items()}


def added_score(alpha: float, sigma: float, move: Tensor) -> Tensor:
    """Score that corresponds to a change of the data prediction, α δ / σ²."""
    return alpha / sigma**2 * move if sigma > 0 else torch.zeros_like(move)
