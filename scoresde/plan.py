r"""Plans: a sampler as a table of coefficients, and the loop that runs it.

Each row computes one state from earlier rows, and may evaluate the denoiser D at this state:

.. math:: x_r = \sum_k a_{rk} x_k + \sum_k b_{rk} d_k + \sum_k c_{rk} z_k, \qquad
          d_r = D(x_r, t_r) \approx E[x_0 \mid x_r].

Stages, history and correctors are rows like any other. :mod:`scoresde.tape` computes the coefficients.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise import Ahead, Noise
from scoresde.paths import PathNoise, Span

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


@dataclass(frozen=True)
class Plan:
    """A table of rows: row 0 is the start, the last row is the result.

    Arguments:
        rows: Rows of the table.
        name: Name of the solver that made the plan.
        order: Order of convergence that the solver declares.
        sde: ``repr`` of the process.
        spans: Interval of a Brownian path for each draw, or None for a draw of fresh noise.
        meta: Numbers and strings that describe how the plan was fitted; they are saved with the plan.
    """

    rows: tuple[Row, ...]
    name: str = ""
    order: int | None = None
    sde: str = ""
    spans: tuple[Span | None, ...] = field(default=(), repr=False)
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, kw_only=True)
    _last_use: tuple[tuple[int, ...], tuple[int, ...]] = field(init=False, repr=False, compare=False)
    _program: tuple[_Line, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        _validate(self.rows)
        object.__setattr__(self, "_last_use", _last_uses(self.rows))
        object.__setattr__(self, "_program", _compiled(self.rows, *self._last_use))

    @property
    def nfe(self) -> int:
        """Number of network evaluations."""
        return sum(row.evaluates for row in self.rows)

    @property
    def draws(self) -> int:
        """Number of standard normals drawn for each element of the state."""
        return 1 + max((k for row in self.rows for k, _ in row.z), default=-1)

    @property
    def stochastic(self) -> bool:
        """Whether the plan draws noise."""
        return self.draws > 0

    @property
    def times(self) -> list[Weight]:
        """Times of the nodes, which are the grid of the plan."""
        return [row.t for row in self.rows if row.node is not None]

    @property
    def memory(self) -> int:
        """Largest number of states and denoised states that are stored between two rows."""
        of_x, of_d = self._last_use
        alive = [
            sum(of_x[k] > r for k in range(r + 1)) + sum(self.rows[k].evaluates and of_d[k] > r for k in range(r + 1))
            for r in range(len(self.rows))
        ]
        return max(alive)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        head = f"{self.name or 'plan'}: {self.nfe} evaluations, {len(self.rows)} rows"
        head += f", order {self.order}" if self.order is not None else ""
        head += f", {self.draws} draws" if self.stochastic else ""
        return "\n".join([head, *(_line(r, row) for r, row in enumerate(self.rows))])

    def join(self, other: Plan) -> Plan:
        """Append `other`, which starts where this plan ends: its row 0 merges with the last row of this plan."""
        last, first = self.rows[-1], other.rows[0]
        end, start = _number(last.t), _number(first.t)
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
        return Plan(
            (*self.rows[:-1], joint, *tail), name, min(orders, default=None), self.sde, (*self.spans, *fresh, *spans)
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
                x=_merge([(j, v) for j, v in outer.x if j != k], inner.x, w),
                d=_merge(outer.d, inner.d, w),
                z=_merge(outer.z, inner.z, w),
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
        return Plan(tuple(moved), self.name, self.order, self.sde, self.spans)

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain numbers and strings; :meth:`from_dict` restores the plan exactly."""
        return {
            "scoresde": 1,
            "name": self.name,
            "order": self.order,
            "sde": self.sde,
            "rows": [
                {
                    "t": _number(row.t),
                    **{c: [[k, _number(w)] for k, w in getattr(row, c)] for c in "xdz" if getattr(row, c)},
                    **({"one": _number(row.one)} if _nonzero(row.one) else {}),
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
    def from_dict(cls, table: Mapping[str, Any]) -> Plan:
        """Make a plan from the output of :meth:`to_dict`."""
        if table.get("scoresde") != 1:
            raise ValueError(f"`table` must come from `to_dict`, in format 1, got format {table.get('scoresde')!r}.")
        rows = [
            Row(
                t=row["t"],
                **{c: tuple((int(k), float(w)) for k, w in row.get(c, ())) for c in "xdz"},
                evaluates=row.get("evaluates", False),
                node=row.get("node"),
                note=row.get("note", ""),
                one=row.get("one", 0.0),
            )
            for row in table["rows"]
        ]
        spans = tuple(span and Span(*span) for span in table.get("spans", ()))
        return cls(tuple(rows), table["name"], table["order"], table["sde"], spans, meta=table.get("meta", {}))

    def save(self, path: str | Path) -> None:
        """Write the plan to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that :meth:`save` wrote; all numbers are exact."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text()))
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"`path` {path} is not a plan that `save` wrote, or is incomplete: {error!r}.") from error


def _validate(rows: tuple[Row, ...]) -> None:
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


def _last_uses(rows: tuple[Row, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Last row that uses each x and each d, or its own row if none does; the result is used at the end."""
    of_x, of_d = list(range(len(rows))), list(range(len(rows)))
    for r, row in enumerate(rows):
        for k, _ in row.x:
            of_x[k] = r
        for k, _ in row.d:
            of_d[k] = r
    of_x[-1] = len(rows)
    return tuple(of_x), tuple(of_d)


def _merge(outer: Any, inner: Terms, w: Weight) -> Terms:
    sums: dict[int, Weight] = dict(outer)
    for k, v in inner:
        sums[k] = sums[k] + w * v if k in sums else w * v
    return tuple(sums.items())


def _line(r: int, row: Row) -> str:
    def terms(column: str) -> str:
        inside = " ".join(f"{k}:{_short(w)}" for k, w in getattr(row, column))
        return f"{column}[{inside}]" if inside else ""

    parts = [f"{r:4d}  t={_short(row.t, sign=''):<7}", "eval" if row.evaluates else "    "]
    parts += [t for t in (terms("x"), terms("d"), terms("z")) if t]
    parts += [f"one[{_short(row.one)}]"] if _nonzero(row.one) else []
    tail = ", ".join([*([row.note] if row.note else []), *([] if row.node is None else [f"node {row.node}"])])
    return "  ".join(parts) + (f"   {tail}" if tail else "")


def _short(w: Weight, sign: str = "+") -> str:
    if isinstance(w, Tensor) and w.ndim:
        return f"<{len(w)} values>"
    return f"{_number(w):{sign}.4g}"


def _number(w: Weight) -> float:
    if not isinstance(w, Tensor):
        return w
    if w.ndim:
        raise ValueError("the plan has a number for each sample; make one plan for each sample, from its own grid.")
    return float(w.detach())


def _nonzero(w: Weight) -> bool:
    return isinstance(w, Tensor) or w != 0


Denoise = Callable[[Tensor, Any], Tensor]
Hook = Callable[[int, Any, Tensor], Tensor]


class Step(NamedTuple):
    """State of a run at a node.

    Arguments:
        node: Index of the node; −1 for a last row that is not a node.
        t: Time of the node.
        x: State, (B, *event).
        x0: Denoised state, or None where the network is not evaluated.
        nfe: Number of function evaluations so far.
    """

    node: int
    t: Any
    x: Tensor
    x0: Tensor | None
    nfe: int


def run(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noise: Noise | None = None,
    *,
    hook: Hook | None = None,
    callback: Callable[[Step], None] | None = None,
    overwrite: bool = False,
) -> Tensor:
    """Run a plan and return its last state; :func:`steps` also yields the states at the nodes.

    Arguments:
        plan: Plan to run.
        denoise: Denoiser D(x, t), a function of a state (B, *event) and a time.
        x: Initial state, (B, *event).
        noise: Source of the normals; required if the plan is stochastic.
        hook: Function ``(node, t, x) -> x``, called at every node before the network is evaluated.
        callback: Function of a :class:`Step`, called at every node after the evaluation.
        overwrite: Whether to reuse the memory of a state that no later row uses, which saves allocations. `denoise`
            must then return new memory, and no function may store a reference to its input.
    """
    loop = _loop(plan, denoise, x, noise, hook, overwrite, callback is not None)
    del x  # otherwise this reference holds the memory of the initial state
    while True:
        try:
            step = next(loop)
        except StopIteration as end:
            result: Tensor = end.value
            return result
        assert callback is not None
        callback(step)
        del step


def steps(
    plan: Plan,
    denoise: Denoise,
    x: Tensor,
    noise: Noise | None = None,
    *,
    hook: Hook | None = None,
    overwrite: bool = False,
) -> Generator[Step, None, Tensor]:
    """Run a plan and yield a :class:`Step` at every node; the last one holds the result, which is also returned.

    A state is freed once no later row uses it. The loop copies no tensor to the host.
    """
    return _loop(plan, denoise, x, noise, hook, overwrite, True)


def _loop(
    plan: Plan, denoise: Denoise, x: Tensor, noise: Noise | None, hook: Hook | None, overwrite: bool, watched: bool
) -> Generator[Step, None, Tensor]:
    if plan.stochastic and noise is None:
        raise ValueError(f"the plan draws {plan.draws} normals; give it a `noise`, as in Noise(seed).")
    source: Noise | Ahead | PathNoise | None = noise
    if plan.stochastic and isinstance(noise, Noise) and noise.path:
        source = PathNoise(noise, plan.spans)
    elif plan.stochastic and type(noise) is Noise:  # a subclass of Noise is evaluated draw by draw
        source = Ahead(noise, plan.draws)
    saved: list[Any] = [None] * (2 * len(plan.rows))  # x_r at 2r, d_r at 2r + 1
    overwrite = overwrite and not torch.is_grad_enabled()
    nfe, shape = 0, x.shape
    for r, line in enumerate(plan._program):
        if r:
            combine = _add_numbers if line.plain else _add_tensors
            x = combine(line, saved, source, x, overwrite and line.reuse)
            for k in line.drop:
                saved[k] = None
        if hook is not None and line.node is not None:
            x = hook(line.node, line.t, x)
            if not isinstance(x, Tensor):
                raise TypeError(f"`hook` must return a state, got {type(x).__name__}; end it with `return x`.")
            if x.shape != shape:
                raise ValueError(f"`hook` must return a state of shape {tuple(shape)}, got {tuple(x.shape)}.")
        x0 = None
        if line.evaluates:
            x0 = denoise(x, _moved(line.t, x) if isinstance(line.t, Tensor) else line.t)
            nfe += 1
            if line.keep_d:
                saved[2 * r + 1] = x0
        if line.keep_x:
            saved[2 * r] = x
        if watched and line.shown:
            yield Step(-1 if line.node is None else line.node, line.t, x, x0, nfe)
    return x


class _Line(NamedTuple):
    """A row prepared for the loop: its terms in one list, and the entries to free after the sum."""

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


def _compiled(rows: tuple[Row, ...], of_x: tuple[int, ...], of_d: tuple[int, ...]) -> tuple[_Line, ...]:
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
        lines.append(
            _Line(
                t=row.t,
                node=row.node,
                evaluates=row.evaluates,
                shown=row.node is not None or r == len(rows) - 1,
                terms=terms,
                draws=row.z,
                one=row.one,
                plain=plain,
                lerp=plain and len(terms) > 1 and abs(_number(terms[0][1]) + _number(terms[1][1]) - 1) < 1e-15,
                keep_x=of_x[r] > r,
                keep_d=of_d[r] > r,
                drop=tuple(drop[r]),
                # the memory of the start belongs to the caller
                reuse=bool(row.x) and row.x[0][0] > 0 and 2 * row.x[0][0] in drop[r],
            )
        )
    return tuple(lines)


def _add_numbers(
    line: _Line, saved: list[Any], noise: Noise | Ahead | PathNoise | None, like: Tensor, in_place: bool
) -> Tensor:
    """Compute Σ a x + Σ b d + Σ c z + one, in place on a new tensor or on the first state."""
    terms = line.terms
    out: Any = None
    if terms:
        (k, w), terms = terms[0], terms[1:]
        out = saved[k]
        if line.lerp:
            (k, w), terms = terms[0], terms[1:]
            out = out.lerp_(saved[k], w) if in_place else torch.lerp(out, saved[k], w)
        else:
            out = out.mul_(w) if in_place else out * w
    for k, w in terms:
        out.add_(saved[k], alpha=w)
    for k, w in line.draws:
        z = noise.like(like, k)  # type: ignore[union-attr]
        out = z * w if out is None else out.add_(z, alpha=w)
    if line.one:
        out.add_(line.one)
    return out  # type: ignore[no-any-return]


def _add_tensors(
    line: _Line, saved: list[Any], noise: Noise | Ahead | PathNoise | None, like: Tensor, in_place: bool
) -> Tensor:
    """Compute the same sum if a weight is a tensor: one number per sample, or a weight that requires grad."""
    out: Any = None
    for k, w in line.terms:
        out = _add(out, saved[k], w)
    for k, w in line.draws:
        assert noise is not None
        out = _add(out, noise.like(like, k), w)
    if _nonzero(line.one):
        out = out + (check.expand(_moved(line.one, out), out, "weight") if isinstance(line.one, Tensor) else line.one)
    return out  # type: ignore[no-any-return]


def _moved(w: Any, x: Tensor) -> Any:
    """Move one number per sample to the device and dtype of `x`."""
    return w.to(x) if isinstance(w, Tensor) and w.ndim and w.device != x.device else w


def _add(out: Tensor | None, term: Tensor, w: Weight) -> Tensor:
    if isinstance(w, Tensor):
        scaled = check.expand(_moved(w, term), term, "weight") * term
        return scaled if out is None else out + scaled
    return term * w if out is None else out.add_(term, alpha=w)
