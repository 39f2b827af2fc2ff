r"""A plan solved for its states: each evaluated state, and the result, from the start and what the network said.

.. math:: x_r = A_r\,x_0 + \sum_{k<r} B_{rk}\,d_k + \sum_j C_{rj}\,z_j + e_r

Stages, history and correctors have been substituted. Any plan is one lower triangle B, which is what it costs to fit
it, to run its rows at once, and to see what it does to data on which d is linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scoresde.plan import Plan, Row, Weight

_ROUNDING = 1e-15  # what is left where weights cancel


@dataclass(frozen=True)
class Unrolled:
    """The table of n evaluations, float64 on the CPU; its last row is the result.

    Arguments:
        t: Times at which the network is asked, and that of the result; n + 1 of them.
        x: A, (n + 1,).
        d: B, (n + 1, n), strictly lower triangular.
        z: C, (n + 1, draws).
        one: e, (n + 1,).
        start: Time of the start, which may be another than the one at which the network is asked first.
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
        """State r, from the start, the denoised states before it and the normals.

        Arguments:
            r: Which; n is the result.
            x: Start, (B, *event).
            said: Denoised states 0 … r − 1 at least.
            drawn: All normals.
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
        """A plan again.

        Arguments:
            like: Where name, order and process come from.
            on_path: Whether every state is one of its time, a node; otherwise only the first and the last are.
            **changes: Other fields.
        """
        begins = float(self.start)
        apart = int(begins != float(self.t[0]))  # asked first at another time: a row that repeats the start
        rows = [Row(begins, node=0, note="start")] if apart else []
        for r, t in enumerate(self.t):
            first, last = r == 0 and not apart, r == self.nfe
            x, *d = (w if abs(w) > _ROUNDING else 0.0 for w in (float(self.x[r]), *self.d[r].tolist()))
            draws = [(k, w) for k, w in enumerate(self.z[r].tolist()) if w]
            rows.append(
                Row(
                    float(t),
                    x=() if first or not x else ((0, x),),
                    d=tuple((k + apart, w) for k, w in enumerate(d) if w),
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
    """Solve a plan for its states; differentiable in its weights, if they are float64 tensors ()."""
    asks = [r for r, row in enumerate(plan.rows) if row.evaluates]
    n, draws = len(asks), plan.draws
    place = {r: 1 + i for i, r in enumerate(asks)}
    unit = torch.eye(2 + n + draws, dtype=torch.float64)
    states: list[Tensor] = [unit[0]]
    for r, row in enumerate(plan.rows[1:], start=1):
        for w in (row.t, row.one, *(w for column in (row.x, row.d, row.z) for _, w in column)):
            if isinstance(w, Tensor) and w.ndim:
                raise ValueError(f"row {r} has a number for each sample; make one plan of each sample's own grid.")
        terms = [w * states[k] for k, w in row.x]
        terms += [w * unit[place[k]] for k, w in row.d]
        terms += [w * unit[1 + n + k] for k, w in row.z]
        states.append(sum(terms, row.one * unit[-1]))
    table = torch.stack([states[r] for r in (*asks, len(plan.rows) - 1)])
    t = tuple(plan.rows[r].t for r in (*asks, len(plan.rows) - 1))
    x, d, z, one = table[:, 0], table[:, 1 : 1 + n], table[:, 1 + n : -1], table[:, -1]
    return Unrolled(t, x, d, z, one, plan.rows[0].t)
