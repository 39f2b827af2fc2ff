r"""Unrolled plans: each evaluated state as a linear combination of the start, denoised states and normals.

.. math:: x_r = A_r\,x_0 + \sum_{k<r} B_{rk}\,d_k + \sum_j C_{rj}\,z_j + e_r

All other states are eliminated by substitution. The strictly lower triangular matrix B then describes the solver:
fitting, parallel sampling and the analysis of linear denoisers use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.plan.rows import Row, Weight
from scoresde.plan.table import Plan

_ROUNDING = 1e-15  # weights this small are rounding errors of sums that cancel


@dataclass(frozen=True)
class Unrolled:
    """Coefficients of a plan with n evaluations, float64 on the CPU; the last row is the result.

    Arguments:
        t: Times of the n evaluations and of the result.
        x: Coefficients A of the start, (n + 1,).
        d: Coefficients B of the denoised states, (n + 1, n), strictly lower triangular.
        z: Coefficients C of the normals, (n + 1, draws).
        one: Constants e, (n + 1,).
        start: Start time; it may differ from the time of the first evaluation.
    """

    t: tuple[Weight, ...]
    x: Tensor
    d: Tensor
    z: Tensor
    one: Tensor
    start: Weight

    @property
    def nfe(self) -> int:
        """Number of evaluations."""
        return len(self.t) - 1

    def state(self, r: int, x: Tensor, said: Sequence[Tensor], drawn: Sequence[Tensor] = ()) -> Tensor:
        """Compute state r from the start, the earlier denoised states and the normals.

        Arguments:
            r: Index of the state; n is the result.
            x: Initial state, (B, *event).
            said: Denoised states, at least 0 … r − 1.
            drawn: Normals, all of them or none; none by default.
        """
        out = self.x[r].to(x) * x
        k = min(r, self.nfe)
        if k:
            out = out + torch.einsum("k,k...->...", self.d[r, :k].to(x), torch.stack(list(said[:k])))
        if len(drawn):
            out = out + torch.einsum("k,k...->...", self.z[r].to(x), torch.stack(list(drawn)))
        if bool(self.one[r] != 0):
            out = out + self.one[r].to(x)
        return out

    def plan(self, like: Plan, *, on_path: bool = True, **changes: Any) -> Plan:
        """Convert back to a plan.

        Arguments:
            like: Plan whose name, order, process and spans are copied.
            on_path: Whether every state is a node; otherwise only the first and the last are. Default True.
            **changes: Fields of the new plan that replace the copied ones.
        """
        begins = float(self.start)
        shift = int(begins != float(self.t[0]))  # the first evaluation is at another time: repeat the start in row 1
        rows = [Row(begins, node=0, note="start")] if shift else []
        for r, t in enumerate(self.t):
            first, last = r == 0 and not shift, r == self.nfe
            x, *d = (w if abs(w) > _ROUNDING else 0.0 for w in (float(self.x[r]), *self.d[r].tolist()))
            draws = [(k, w) for k, w in enumerate(self.z[r].tolist()) if w]
            rows.append(
                Row(
                    float(t),
                    x=() if first or not x else ((0, x),),
                    d=tuple((k + shift, w) for k, w in enumerate(d) if w),
                    z=tuple(draws),
                    evaluates=not last,
                    node=(r if on_path else min(r, 1)) if on_path or first or last else None,
                    note="start" if first else "",
                    one=float(self.one[r]),
                )
            )
        return Plan(
            tuple(rows), **{"name": like.name, "order": like.order, "sde": like.sde, "spans": like.spans, **changes}
        )


def unroll(plan: Plan) -> Unrolled:
    """Eliminate the states of a plan; differentiable in weights that are float64 tensors ()."""
    evaluated = [r for r, row in enumerate(plan.rows) if row.evaluates]
    n, draws = len(evaluated), plan.draws
    place = {r: 1 + i for i, r in enumerate(evaluated)}
    unit = torch.eye(2 + n + draws, dtype=torch.float64)
    states: list[Tensor] = [unit[0]]
    for r, row in enumerate(plan.rows[1:], start=1):
        for w in (row.t, row.one, *(w for column in (row.x, row.d, row.z) for _, w in column)):
            if isinstance(w, Tensor) and w.ndim:
                raise ValueError(f"row {r} has a number for each sample; make one plan for each sample's grid.")
        terms = [w * states[k] for k, w in row.x]
        terms += [w * unit[place[k]] for k, w in row.d]
        terms += [w * unit[1 + n + k] for k, w in row.z]
        states.append(sum(terms, row.one * unit[-1]))
    table = torch.stack([states[r] for r in (*evaluated, len(plan.rows) - 1)])
    t = tuple(plan.rows[r].t for r in (*evaluated, len(plan.rows) - 1))
    x, d, z, one = table[:, 0], table[:, 1 : 1 + n], table[:, 1 + n : -1], table[:, -1]
    return Unrolled(t, x, d, z, one, plan.rows[0].t)
