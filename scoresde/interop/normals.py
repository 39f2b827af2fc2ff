"""Normals of a plan that come from another program: from torch's generators, or from functions of noise levels."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from scoresde.plan.rows import as_number
from scoresde.plan.table import Plan


class Drawn:
    """The normals of a plan from a function; a draw is kept for all rows that use it.

    Arguments:
        plan: Plan of the run.
        draw: Function of a state, the number of the draw, and the levels from and to which its step leads.
        scale: Factor on the normals.
    """

    def __init__(self, plan: Plan, draw: Callable[[Tensor, int, float, float], Tensor], scale: float = 1.0) -> None:
        self._draw, self._scale = draw, scale
        self._spans: dict[int, tuple[float, float]] = {}
        self._kept: dict[int, Tensor] = {}
        start = as_number(plan.rows[0].t)
        self._uses = [0] * plan.draws
        for row in plan.rows[1:]:
            for k, _ in row.z:
                self._spans.setdefault(k, (start, as_number(row.t)))
                self._uses[k] += 1
            if row.node is not None:
                start = as_number(row.t)

    def like(self, x: Tensor, draw: int) -> Tensor:
        """Return the normals of a draw, with the shape, dtype and device of `x`."""
        z = self._kept.pop(draw, None)
        if z is None:
            z = self._draw(x, draw, *self._spans[draw])
            z = z if self._scale == 1.0 else self._scale * z
        self._uses[draw] -= 1
        if self._uses[draw] > 0:
            self._kept[draw] = z
        return z
