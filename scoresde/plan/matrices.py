r"""Unrolled plans: each evaluated state as a linear combination of the start, denoised states and normals.

.. math:: x_r = A_r\,x_0 + \sum_{k<r} B_{rk}\,d_k + \sum_j C_{rj}\,z_j + e_r

All other states are eliminated: the loop runs the plan on unit vectors. The strictly lower triangular matrix B then
describes the solver: fitting, parallel sampling and the analysis of linear denoisers use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde._doors import checked
from scoresde.plan.rows import Row, Weight, derivatives
from scoresde.plan.run import run
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

    def state(self, r: int, x: Tensor, denoised: Sequence[Tensor], normals: Sequence[Tensor] = ()) -> Tensor:
        """Compute state r from the start, the earlier denoised states and the normals.

        Arguments:
            r: Index of the state; n is the result.
            x: Initial state, (B, *event).
            denoised: Denoised states, at least 0 … r − 1.
            normals: All normals of the plan, or none; default none.
        """
        out = self.x[r].to(x) * x
        k = min(r, self.nfe)
        if k:
            out = out + torch.einsum("k,k...->...", self.d[r, :k].to(x), torch.stack(list(denoised[:k])))
        if len(normals):
            out = out + torch.einsum("k,k...->...", self.z[r].to(x), torch.stack(list(normals)))
        if bool(self.one[r] != 0):
            out = out + self.one[r].to(x)
        return out

    def plan(self, like: Plan, *, on_path: bool = True) -> Plan:
        """Convert back to a plan.

        Arguments:
            like: Plan whose name, order, process, spans and origin are copied.
            on_path: Whether every state is a node; otherwise only the first and the last are. Default True.
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
        return replace(like, rows=tuple(rows))


@checked
def pull_back(plan: Plan, gains: Sequence[Weight]) -> tuple[Weight, dict[int, Weight]]:
    r"""Derivatives of the result by the start and by each normal, if every evaluation is linear: :math:`d_r = g_r x_r`.

    The rows are visited once, from the last to the first, in plain numbers: this is much cheaper than a run.

    Arguments:
        plan: Plan with n evaluations.
        gains: Gains g of the evaluations, in their order, n numbers or tensors (B,).
    """
    evaluated = (r for r, row in enumerate(plan.rows) if row.evaluates)
    of_x, _, of_z = derivatives(plan.rows, dict(zip(evaluated, gains, strict=True)))
    return of_x[0], of_z


class UnitNormals:
    """Normals that are unit vectors: draw k is 1 at entry `first` + k of the last axis, and 0 elsewhere.

    Arguments:
        first: Entry of draw 0.
    """

    def __init__(self, first: int) -> None:
        self.first = first

    def like(self, x: Tensor, draw: int) -> Tensor:
        """The unit vector of a draw, repeated to the shape of `x`."""
        z = torch.zeros_like(x)
        z[..., self.first + draw] = 1.0
        return z


@checked
def unroll(plan: Plan) -> Unrolled:
    """Eliminate the states of a plan; differentiable in weights that are float64 tensors ().

    The plan runs on unit vectors: the start, each denoised state, each normal and the constant have one entry each.

    Arguments:
        plan: Plan with the same numbers for all samples.

    Example:
        >>> import scoresde as ss
        >>> table = unroll(ss.DPMSolverPP(2).plan(ss.VP(), [1.0, 0.6, 0.3, 0.0]))
        >>> table.nfe, tuple(table.d.shape), bool((table.d.triu() == 0).all())
        (3, (4, 3), True)
    """
    for r, row in enumerate(plan.rows):
        for w in (row.t, row.one, *(w for column in (row.x, row.d, row.z) for _, w in column)):
            if isinstance(w, Tensor) and w.ndim:
                raise ValueError(f"row {r} has a number for each sample; make one plan for each sample's grid.")
    n = plan.nfe
    unit = torch.eye(2 + n + plan.draws, dtype=torch.float64, device="cpu")
    evaluated: list[Tensor] = []

    def denoise(x: Tensor, t: Weight) -> Tensor:
        evaluated.append(x)
        return unit[len(evaluated)][None]

    result = run(plan, denoise, unit[:1], UnitNormals(1 + n), ones=unit[-1:])
    table = torch.cat([*evaluated, result])
    t = (*(row.t for row in plan.rows if row.evaluates), plan.rows[-1].t)
    return Unrolled(t, table[:, 0], table[:, 1 : 1 + n], table[:, 1 + n : -1], table[:, -1], plan.rows[0].t)
