r"""Rows rewritten for the output of a network, so that a run reads each evaluation once.

A denoised state is linear in the output F of its network, :math:`d_k = p_k x_k + q_k F_k`. A row may therefore use F
itself, with the conversion in its weights. Many rows, such as those of Adams–Bashforth rules, use an earlier state and
its denoised state in one ratio only. The run then stores the sum of both,

.. math:: f_k = F_k + c_k x_k, \qquad a\,x_k + b\,d_k = (a + b\,p_k - b\,q_k c_k)\,x_k + b\,q_k f_k,

with the c for which most of the weights on x_k vanish. Both changes are exact; they save passes over the state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from scoresde.plan.rows import Row, Weight

_ROUNDING = 1e-14  # size of a sum, relative to its terms, below which it is a rounding error


@dataclass(frozen=True, eq=False)
class Outputs:
    """A denoiser as a linear function of the output of a network, :math:`D(x, t_n) = p_n x + q_n F(x, n)`.

    ``AbstractDenoiser.outputs`` makes it before a run, which then evaluates F alone.

    Arguments:
        p: Coefficient of the state, one number for each evaluation.
        q: Coefficient of the output, one number for each evaluation.
        evaluate: Function F of a state (B, *event) and the number n of the evaluation.
    """

    p: tuple[float, ...]
    q: tuple[float, ...]
    evaluate: Callable[[Tensor, int], Tensor]


def is_plain(rows: Sequence[Row]) -> bool:
    """Whether all times and weights are floats: no number per sample, and none that requires grad."""
    numbers = ([row.t, row.one, *(w for c in (row.x, row.d, row.z) for _, w in c)] for row in rows)
    return not any(isinstance(w, Tensor) for line in numbers for w in line)


def fold(
    rows: tuple[Row, ...], p: Sequence[float] | None = None, q: Sequence[float] | None = None
) -> tuple[tuple[Row, ...], tuple[float, ...]]:
    """Rewrite rows whose numbers are floats for outputs F instead of denoised states.

    Arguments:
        rows: Rows of a plan.
        p: Coefficient of the state in the denoised state, one for each evaluation; by default 0.
        q: Coefficient of the output, one for each evaluation; by default 1, so that the output is the denoised state.

    Returns:
        Rows whose `d` names stored sums f, and the coefficient c of every row, 0 where F itself is stored.
    """
    evaluated = [r for r, row in enumerate(rows) if row.evaluates]
    of_state = dict(zip(evaluated, p or [0.0] * len(evaluated), strict=True))
    of_output = dict(zip(evaluated, q or [1.0] * len(evaluated), strict=True))
    weights = [dict(row.x) for row in rows]
    uses: dict[int, list[tuple[int, float, float]]] = {}
    for r, row in enumerate(rows):
        for k, b in row.d:
            uses.setdefault(k, []).append((r, _number(weights[r].get(k, 0.0)), _number(b)))
    mixes = [0.0] * len(rows)
    outputs: list[list[tuple[int, Weight]]] = [[] for _ in rows]
    for k, users in uses.items():
        mixes[k] = c = _mix(users, of_state[k], of_output[k])
        for r, a, b in users:
            w = _sum(a, b * of_state[k], -b * of_output[k] * c)
            if w:
                weights[r][k] = w
            else:
                weights[r].pop(k, None)
            if b * of_output[k]:
                outputs[r].append((k, b * of_output[k]))
    order = [{k: i for i, (k, _) in enumerate(row.d)} for row in rows]
    return (
        tuple(
            replace(row, x=tuple(weights[r].items()), d=tuple(sorted(outputs[r], key=lambda kw: order[r][kw[0]])))
            for r, row in enumerate(rows)
        ),
        tuple(mixes),
    )


def _mix(users: list[tuple[int, float, float]], p: float, q: float) -> float:
    """The coefficient c with the fewest passes: one for the sum, and one for every weight on the state that is left."""
    best, fewest = 0.0, _left(users, p, q, 0.0)
    if fewest < 2 or q == 0:
        return best
    for _, a, b in users:
        c = (a + b * p) / (b * q) if b else 0.0
        passes = 1 + _left(users, p, q, c)
        if passes < fewest:
            best, fewest = c, passes
    return best


def _left(users: list[tuple[int, float, float]], p: float, q: float, c: float) -> int:
    return sum(_sum(a, b * p, -b * q * c) != 0 for _, a, b in users)


def _sum(*terms: float) -> float:
    """The sum of numbers, 0 where it is a rounding error."""
    total = sum(terms)
    return total if abs(total) > _ROUNDING * max(map(abs, terms)) else 0.0


def _number(w: Weight) -> float:
    assert not isinstance(w, Tensor)
    return w
