r"""Plans: a sampler as a table of coefficients, and the loop that runs it.

Each row computes one state from earlier rows, and may evaluate the denoiser D at this state:

.. math:: x_r = \sum_k a_{rk} x_k + \sum_k b_{rk} d_k + \sum_k c_{rk} z_k, \qquad
          d_r = D(x_r, t_r) \approx E[x_0 \mid x_r].

Stages, history and correctors are rows like any other. :mod:`scoresde.solvers.tape` computes the coefficients.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde import _files as files
from scoresde._doors import checked, constant
from scoresde.noise.brownian import Span
from scoresde.plan.folding import fold, is_plain
from scoresde.plan.rows import (
    Line,
    Row,
    Weight,
    as_number,
    compile_rows,
    derivatives,
    last_uses,
    merge,
    nonzero,
    validate,
)

_COLUMNS = ("x", "d", "z")

_PROGRAMS = 16  # largest number of networks whose conversions a plan keeps in its weights

_FOLDED = 20  # largest number of rows that a notebook shows unfolded


@checked
@dataclass(frozen=True)
class Plan:
    """A table of rows: row 0 is the start, the last row is the result.

    ``print(plan)`` shows the table; a notebook shows it as HTML.

    Arguments:
        rows: Rows of the table.
        name: Name of the solver that made the plan.
        order: Order of convergence that the solver declares.
        sde: ``repr`` of the process.
        spans: Interval of a Brownian path for each draw, or None for a draw of fresh noise.
        meta: Numbers and strings that say where the table came from, such as how it was fitted; saved with the plan.

    Attributes:
        nfe: Number of network evaluations.
        draws: Number of standard normals drawn for each element of the state.
        plain: Whether all times and weights are floats: no number per sample, and none that requires grad.
        evaluation_times: Times of the evaluations, in their order.
    """

    rows: tuple[Row, ...]
    name: str = ""
    order: int | None = None
    sde: str = ""
    spans: tuple[Span | None, ...] = field(default=(), repr=False)
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    nfe: int = field(init=False, repr=False, compare=False)
    draws: int = field(init=False, repr=False, compare=False)
    plain: bool = field(init=False, repr=False, compare=False)
    evaluation_times: tuple[Weight, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        validate(self.rows)
        times = tuple(row.t for row in self.rows if row.evaluates)
        object.__setattr__(self, "nfe", len(times))
        object.__setattr__(self, "draws", 1 + max((k for row in self.rows for k, _ in row.z), default=-1))
        object.__setattr__(self, "plain", is_plain(self.rows))
        object.__setattr__(self, "evaluation_times", times)

    @property
    def program(self) -> tuple[Line, ...]:
        """Rows prepared for the loop, for evaluations that return denoised states."""
        return self.program_of(None, None)

    @constant  # a compiled run does not guard its numbers
    def program_of(self, p: tuple[float, ...] | None, q: tuple[float, ...] | None) -> tuple[Line, ...]:
        """Rows prepared for the loop, for evaluations that return outputs F of a network.

        Arguments:
            p: Coefficient of the state in the denoised state, one for each evaluation; None for 0.
            q: Coefficient of the output, one for each evaluation; None for 1.
        """
        programs: dict[object, tuple[Line, ...]] = self.__dict__.setdefault("_programs", {})
        if (p, q) not in programs:
            if len(programs) >= _PROGRAMS:
                programs.clear()
            programs[p, q] = compile_rows(*fold(self.rows, p, q)) if self.plain else compile_rows(self.rows)
        return programs[p, q]

    @property
    def stochastic(self) -> bool:
        """Whether the plan draws noise."""
        return self.draws > 0

    @property
    def times(self) -> list[Weight]:
        """Times of the nodes, which are the grid of the plan."""
        return [row.t for row in self.rows if row.node is not None]

    @cached_property
    def amplification(self) -> float:
        r"""Largest factor by which the result multiplies errors of the denoised states.

        With all other states eliminated, the result is linear in the denoised states, so that errors of at most δ in
        each of them move it by at most

        .. math:: \delta \sum_k |w_k|, \qquad x_n = A\,x_0 + \sum_k w_k\,d_k + \sum_j C_j z_j.

        The weights of a run to data sum to about 1. The factor is then about 1 if no weight is negative, and large if
        the plan takes differences of denoised states. Of a plan with a grid for each sample, the largest factor counts.
        :func:`amplification` has the factors of the intermediate states, and of errors of other
        predictions.
        """
        weights = (torch.as_tensor(w, dtype=torch.float64) for w in derivatives(self.rows, {})[1])
        return float(sum((w.detach().abs() for w in weights), torch.zeros((), dtype=torch.float64)).max())

    @cached_property
    def verdicts(self) -> dict[Hashable, str | None]:
        """What :func:`solve` found in the plan when it last ran it, by the process and the scale of the data."""
        return {}

    @property
    def memory(self) -> int:
        """Largest number of states and denoised states that are stored between two rows."""
        rows = fold(self.rows)[0] if self.plain else self.rows
        of_x, of_d = last_uses(rows)
        alive = [
            sum(of_x[k] > r for k in range(r + 1)) + sum(rows[k].evaluates and of_d[k] > r for k in range(r + 1))
            for r in range(len(rows))
        ]
        return max(alive)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{self.name or 'plan'}: {self.nfe} evaluations, {len(self.rows)} rows"
        head += f", order {self.order}" if self.order is not None else ""
        head += f", {self.draws} draws" if self.stochastic else ""
        return "\n".join([head, *(_line(r, row) for r, row in enumerate(self.rows))])

    def _repr_html_(self) -> str:
        """The printed table for a notebook; a table of more than 20 rows is folded, with `meta` below it."""
        head, *_ = str(self).split("\n", 1)
        rows = [["row", "t", "", *_COLUMNS, "one", ""], *(_cells(r, row) for r, row in enumerate(self.rows))]
        table = "".join(_html_row(cells, "td" if r else "th") for r, cells in enumerate(rows))
        origin = "".join(f"<br>{escape(k)}: {escape(str(v))}" for k, v in self.meta.items())
        title = f"<b>{escape(head)}</b>" + (f"<br>{escape(self.sde)}" if self.sde else "")
        if len(self.rows) > _FOLDED:
            return f"<details><summary>{title}</summary><table>{table}</table>{origin}</details>"
        return f"<div>{title}<table>{table}</table>{origin}</div>"

    @checked
    def join(self, other: Plan) -> Plan:
        """Append another plan, whose row 0 merges with the last row of this plan.

        Arguments:
            other: Plan that starts where this plan ends, for the same process.
        """
        last, first = self.rows[-1], other.rows[0]
        end, start = as_number(last.t), as_number(first.t)
        if end != start:
            raise ValueError(f"`other` must start where this plan ends, at t = {end:g}, but starts at {start:g}.")
        if self.sde != other.sde:
            raise ValueError(f"the plans are for different processes: {self.sde} and {other.sde}; use one `sde`.")
        shift, nodes = len(self.rows) - 1, max((row.node for row in self.rows if row.node is not None), default=0)
        draws = self.draws
        joint = replace(last, evaluates=last.evaluates or first.evaluates)
        tail = [
            replace(
                row,
                x=tuple((k + shift, w) for k, w in row.x),
                d=tuple((k + shift, w) for k, w in row.d),
                z=tuple((k + draws, w) for k, w in row.z),
                node=None if row.node is None else row.node + nodes,
            )
            for row in other.rows[1:]
        ]
        orders = [o for o in (self.order, other.order) if o is not None]
        name = self.name if self.name == other.name else f"{self.name} + {other.name}"
        fresh: tuple[Span | None, ...] = (None,) * (draws - len(self.spans))
        laps = max((span.lap for span in self.spans if span), default=0)
        spans = tuple(span and replace(span, lap=span.lap + laps) for span in other.spans)
        parts = [dict(plan.meta) for plan in (self, other)]
        return Plan(
            (*self.rows[:-1], joint, *tail),
            name,
            min(orders, default=None),
            self.sde,
            (*self.spans, *fresh, *spans),
            meta={"joined": parts} if any(parts) else {},
        )

    def folded(self) -> Plan:
        """Remove each row that is not evaluated and that only one other row uses, by substitution.

        A node is removed only if the row that uses it has no denoised terms, as on a grid that goes up and down.
        """
        rows: list[Row | None] = list(self.rows)
        readers: dict[int, list[int]] = {}
        for r, row in enumerate(self.rows):
            for k, _ in row.x:
                readers.setdefault(k, []).append(r)
        for k in reversed(range(1, len(self.rows) - 1)):
            inner, by = rows[k], readers.get(k, [])
            if inner is None or inner.evaluates or len(by) != 1:
                continue
            outer = rows[by[0]]
            assert outer is not None
            if inner.node is not None and outer.d:  # hooks and trajectories need the corrected state
                continue
            w = dict(outer.x)[k]
            rows[by[0]] = replace(
                outer,
                x=merge([(j, v) for j, v in outer.x if j != k], inner.x, w),
                d=merge(outer.d, inner.d, w),
                z=merge(outer.z, inner.z, w),
                one=outer.one + w * inner.one,
            )
            for j, _ in inner.x:
                readers[j] = sorted({by[0], *(r for r in readers[j] if r != k)})
            rows[k] = None
        remaining = [r for r, row in enumerate(rows) if row is not None]
        place = {old: new for new, old in enumerate(remaining)}
        moved = [
            replace(row, x=tuple((place[k], w) for k, w in row.x), d=tuple((place[k], w) for k, w in row.d))
            for row in rows
            if row is not None
        ]
        return replace(self, rows=tuple(moved))

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain numbers and strings; :meth:`from_dict` restores the plan exactly."""
        return {
            "scoresde": 1,
            "name": self.name,
            "order": self.order,
            "sde": self.sde,
            "rows": [
                {
                    "t": as_number(row.t),
                    **{c: [[k, as_number(w)] for k, w in getattr(row, c)] for c in "xdz" if getattr(row, c)},
                    **({"one": as_number(row.one)} if nonzero(row.one) else {}),
                    **({"evaluates": True} if row.evaluates else {}),
                    **({} if row.node is None else {"node": row.node}),
                    **({"note": row.note} if row.note else {}),
                }
                for row in self.rows
            ],
            **({"spans": [span and span.to_list() for span in self.spans]} if any(self.spans) else {}),
            **({"meta": dict(self.meta)} if self.meta else {}),
        }

    @classmethod
    @checked
    def from_dict(cls, table: Mapping[str, Any]) -> Plan:
        """Make a plan from a table.

        Arguments:
            table: Output of :meth:`to_dict`.
        """
        if table.get("scoresde") != 1:
            raise ValueError(f"`table` must come from `to_dict`, in format 1, got format {table.get('scoresde')!r}.")
        _refuse_unknown(table, _ENTRIES, "`table`")
        for r, row in enumerate(table["rows"]):
            _refuse_unknown(row, _FIELDS, f"row {r}")
        rows = [
            Row(
                t=_number(row["t"]),
                **{c: tuple((int(k), _number(w)) for k, w in row.get(c, ())) for c in "xdz"},
                evaluates=bool(row.get("evaluates", False)),
                node=None if row.get("node") is None else int(row["node"]),
                note=str(row.get("note", "")),
                one=_number(row.get("one", 0.0)),
            )
            for row in table["rows"]
        ]
        spans = tuple(span and Span(*span) for span in table.get("spans", ()))
        return cls(tuple(rows), table["name"], table["order"], table["sde"], spans, meta=table.get("meta", {}))

    @checked
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan to a JSON file with a checksum, atomically: an error leaves the old file.

        Arguments:
            path: Path of the file.
        """
        files.write(path, self.to_json().encode())

    def to_json(self) -> str:
        """The text of the file that :meth:`save` writes."""
        table = json.loads(json.dumps(self.to_dict()))
        return json.dumps({**table, "sha256": _checksum(table)}, indent=1) + "\n"

    @classmethod
    @checked
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that :meth:`save` wrote; all numbers are exact. A file without a checksum gives a warning.

        Arguments:
            path: Path of the file.
        """
        data = Path(path).read_bytes()
        try:
            table = dict(json.loads(data.decode()))
            given = table.pop("sha256", None)
            if given not in (None, _checksum(table)):
                raise ValueError("its contents do not match their checksum")
            plan = cls.from_dict(table)
        except Exception as error:  # a forged file can raise anything: RecursionError, OverflowError, TypeError
            raise ValueError(
                f"`path` {path} is not a plan that `save` wrote, or is damaged ({error!r}); copy it again from its "
                f"source, or make the plan again."
            ) from error
        if given is None:
            warnings.warn(
                f"{path} has no checksum, so that damage would not be noticed; if the plan is right, save it again.",
                stacklevel=check.levels_to_user(),
            )
        return plan


_ENTRIES = {"scoresde", "name", "order", "sde", "rows", "spans", "meta"}

_FIELDS = {"t", "x", "d", "z", "one", "evaluates", "node", "note"}


def _checksum(table: Mapping[str, object]) -> str:
    return files.digest(json.dumps(table, sort_keys=True))


def _refuse_unknown(entries: Mapping[str, object], known: set[str], where: str) -> None:
    if unknown := sorted(set(entries) - known):
        raise ValueError(f"{where} has unknown entries {', '.join(unknown)}; allowed are {', '.join(sorted(known))}.")


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a time or a weight must be a number, got {value!r}")
    return float(value)


def _cells(r: int, row: Row) -> list[str]:
    """Entries of a row of the printed table: row, t, evaluation, x, d, z, one and note."""
    columns = [" ".join(f"{k}:{_short(w)}" for k, w in getattr(row, column)) for column in _COLUMNS]
    one = _short(row.one) if nonzero(row.one) else ""
    note = ", ".join([*([row.note] if row.note else []), *([] if row.node is None else [f"node {row.node}"])])
    return [str(r), _short(row.t, sign=""), "eval" if row.evaluates else "", *columns, one, note]


def _html_row(cells: list[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag} style='text-align:left'>{escape(c)}</{tag}>" for c in cells) + "</tr>"


def _line(r: int, row: Row) -> str:
    number, t, evaluates, *columns, note = _cells(r, row)
    terms = [f"{name}[{terms}]" for name, terms in zip((*_COLUMNS, "one"), columns, strict=True) if terms]
    return "  ".join([f"{number:>4}  t={t:<7}", f"{evaluates:4}", *terms]) + (f"   {note}" if note else "")


def _short(w: Weight, sign: str = "+") -> str:
    if isinstance(w, Tensor) and w.ndim:
        return f"<{'×'.join(map(str, w.shape))} values>"
    return f"{as_number(w):{sign}.4g}"
