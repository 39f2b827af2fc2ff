"""Rows of a plan: their format, their validation, and their compiled form for the loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Weight = float | Tensor

Terms = tuple[tuple[int, Weight], ...]


@dataclass(frozen=True)
class Row:
    """One row of a plan.

    Arguments:
        t: Time of the state.
        x: Pairs (row, weight) of the earlier states in the sum.
        d: Pairs (row, weight) of the earlier denoised states in the sum.
        z: Pairs (draw, weight) of the standard normals in the sum.
        evaluates: Whether the network is evaluated at this state, default False.
        node: Index of the grid time whose final state this is; None for stages and predicted states.
        note: Label for printing.
        one: Constant added to every element of the state.
    """

    t: Weight
    x: Terms = ()
    d: Terms = ()
    z: Terms = ()
    evaluates: bool = False
    node: int | None = None
    note: str = ""
    one: Weight = 0.0


def validate(rows: tuple[Row, ...]) -> None:
    """Raise an error unless the rows form a table: finite numbers, and each sum over earlier rows."""
    if not rows:
        raise ValueError("`rows` must not be empty: row 0 is the start.")
    if rows[0].x or rows[0].d or rows[0].z:
        raise ValueError("row 0 is the start; its `x`, `d` and `z` must be empty.")
    for r, row in enumerate(rows):
        if not isinstance(row.t, Tensor) and not (math.isfinite(row.t) and row.t >= 0):
            raise ValueError(f"row {r} has the time {row.t}; `t` must be finite and not negative.")
        if r and not (row.x or row.d or row.z):
            raise ValueError(f"row {r} has no terms; only row 0 may have empty `x`, `d` and `z`.")
        if not isinstance(row.one, Tensor) and not math.isfinite(row.one):
            raise ValueError(f"row {r} adds the constant {row.one}; `one` must be finite.")
        for column in "xdz":
            terms: Terms = getattr(row, column)
            for k, w in terms:
                if k < 0 or (column != "z" and k >= r):
                    raise ValueError(f"row {r} uses {column}[{k}]; use earlier rows only, and no negative index.")
                if column == "d" and not rows[k].evaluates:
                    raise ValueError(f"row {r} uses d[{k}], but row {k} does not evaluate; set its `evaluates`.")
                if not isinstance(w, Tensor) and not math.isfinite(w):
                    raise ValueError(f"row {r} has the weight {w} on {column}[{k}]; it must be finite.")
            if len({k for k, _ in terms}) < len(terms):
                raise ValueError(f"row {r} has an entry of `{column}` twice; add its weights.")


def last_uses(rows: tuple[Row, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Last row that uses each x and each d, or its own row if none does; the result is used at the end."""
    of_x, of_d = list(range(len(rows))), list(range(len(rows)))
    for r, row in enumerate(rows):
        for k, _ in row.x:
            of_x[k] = r
        for k, _ in row.d:
            of_d[k] = r
    of_x[-1] = len(rows)
    return tuple(of_x), tuple(of_d)


def merge(outer: Iterable[tuple[int, Weight]], inner: Terms, w: Weight) -> Terms:
    """The terms of `outer`, plus `w` times those of `inner`."""
    sums: dict[int, Weight] = dict(outer)
    for k, v in inner:
        sums[k] = sums[k] + w * v if k in sums else w * v
    return tuple(sums.items())


def derivatives(
    rows: tuple[Row, ...], gain: Mapping[int, Weight]
) -> tuple[list[Weight], list[Weight], dict[int, Weight]]:
    r"""Derivatives of the last state by every x, d and z, if evaluations are linear: :math:`d_r = g_r x_r + \delta_r`.

    Arguments:
        rows: Rows of a plan, which are visited once, from the last to the first.
        gain: Gain g of each row that evaluates; a row without one has 0, so that its d does not depend on its x.
    """
    of_x: list[Weight] = [0.0] * len(rows)
    of_d: list[Weight] = [0.0] * len(rows)
    of_z: dict[int, Weight] = {}
    of_x[-1] = 1.0
    for r in reversed(range(len(rows))):
        row, a = rows[r], of_x[r]
        if r in gain:
            a = of_x[r] = a + gain[r] * of_d[r]
        for k, w in row.x:
            of_x[k] = of_x[k] + w * a
        for k, w in row.d:
            of_d[k] = of_d[k] + w * a
        for k, w in row.z:
            of_z[k] = of_z.get(k, 0.0) + w * a
    return of_x, of_d, of_z


def as_number(w: Weight) -> float:
    """A weight or a time as a float; raise an error for one number per sample."""
    if not isinstance(w, Tensor):
        return w
    if w.ndim:
        raise ValueError("the plan has a number for each sample; make one plan for each sample, from its own grid.")
    return float(w.detach())


def nonzero(w: Weight) -> bool:
    """Whether a weight may differ from 0: tensors are not read."""
    return isinstance(w, Tensor) or w != 0


class Line(NamedTuple):
    """A row prepared for the loop, which stores x_r at index 2r and d_r at index 2r + 1 of one list.

    Arguments:
        t: Time of the state.
        node: Index of the node, or None.
        evaluates: Whether the network is evaluated at the state.
        shown: Whether callers see the state: at nodes and at the end.
        terms: Pairs (index, weight) of the states and denoised states in the sum.
        draws: Pairs (draw, weight) of the normals in the sum.
        one: Constant of the sum.
        plain: Whether all weights are floats.
        lerp: Whether the first two weights sum to 1, so that their terms are one interpolation.
        keep_x: Whether a later row uses the state.
        keep_d: Whether a later row uses the denoised state.
        drop: Indices to free after the sum.
        reuse: Whether the memory of the first state in the sum may hold the result.
        mix: Number c of the sum F + c x that is stored instead of the output F of the evaluation.
        tail: Terms after the first one, or after the first two if their weights sum to 1.
    """

    t: Weight
    node: int | None
    evaluates: bool
    shown: bool
    terms: Terms
    draws: Terms
    one: Weight
    plain: bool
    lerp: bool
    keep_x: bool
    keep_d: bool
    drop: tuple[int, ...]
    reuse: bool
    mix: float = 0.0
    tail: Terms = ()


def compile_rows(rows: tuple[Row, ...], mixes: Sequence[float] = ()) -> tuple[Line, ...]:
    """Prepare the rows for the loop.

    Arguments:
        rows: Rows of the plan.
        mixes: Number c of every row, see :class:`Line`; by default 0.
    """
    of_x, of_d = last_uses(rows)
    drop: list[list[int]] = [[] for _ in range(len(rows) + 1)]
    for k, row in enumerate(rows):
        if of_x[k] > k:
            drop[of_x[k]].append(2 * k)
        if row.evaluates and of_d[k] > k:
            drop[of_d[k]].append(2 * k + 1)
    lines = []
    for r, row in enumerate(rows):
        plain = not any(isinstance(w, Tensor) for c in (row.x, row.d, row.z, ((0, row.one),)) for _, w in c)
        terms = (*((2 * k, w) for k, w in row.x), *((2 * k + 1, w) for k, w in row.d))
        lerp = plain and len(terms) > 1 and abs(as_number(terms[0][1]) + as_number(terms[1][1]) - 1) < 1e-15
        lines.append(
            Line(
                t=row.t,
                node=row.node,
                evaluates=row.evaluates,
                shown=row.node is not None or r == len(rows) - 1,
                terms=terms,
                draws=row.z,
                one=row.one,
                plain=plain,
                lerp=lerp,
                keep_x=of_x[r] > r,
                keep_d=of_d[r] > r,
                drop=tuple(drop[r]),
                # the memory of the start belongs to the caller
                reuse=bool(row.x) and row.x[0][0] > 0 and 2 * row.x[0][0] in drop[r],
                mix=mixes[r] if mixes else 0.0,
                tail=terms[1 + lerp :],
            )
        )
    return tuple(lines)


def with_ones(program: tuple[Line, ...], index: int) -> tuple[Line, ...]:
    """Replace the constant of each row by a term of the vector of ones, which the loop stores at `index`."""

    def changed(line: Line) -> Line:
        one = ((index, line.one),)
        return line._replace(terms=line.terms + one, tail=line.tail + one if line.terms else (), one=0.0)

    return tuple(changed(line) if nonzero(line.one) else line for line in program)
