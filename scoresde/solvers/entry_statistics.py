r"""DPM-Solver-v3 with statistics for each entry of a state, as published: the weights of a plan are then tensors.

With the integrals L, S and B of l, s and :math:`e^{-S} b`, a step that interpolates
:math:`g = e^{-S} f - B` through its nodes is

.. math::
    x_t = \frac{\alpha_t}{\alpha_s} e^{L_s - L_t}\,x_s - \alpha_t e^{-L_t} \int_{\lambda_s}^{\lambda_t} e^{L + S}
    \Big(B + \sum_j \ell_j(\lambda)\, g_j\Big)\,d\lambda.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import LEGENDRE_NODES, LEGENDRE_WEIGHTS, Spline, lagrange
from scoresde.processes.sde import SDE
from scoresde.solvers.quadrature import Point
from scoresde.solvers.rule import Solver
from scoresde.solvers.statistics import Statistics, damped, rate_spline, slope_spline
from scoresde.solvers.tape import Leg, Tape


@checked
@dataclass(frozen=True, eq=False, repr=False)
class EntryStatistics:
    """Tables of l, s and b over λ for each entry of a state, as :class:`Statistics` has for all entries.

    Arguments:
        lam: Increasing values of λ, (K,).
        l: Values of l(λ), (K, *event).
        s: Values of s(λ), (K, *event).
        b: Values of b(λ), (K, *event).

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, eqs. 5 to 11
    """

    lam: Tensor
    l: Tensor  # noqa: E741
    s: Tensor
    b: Tensor

    def __post_init__(self) -> None:
        for name in ("lam", "l", "s", "b"):
            value = getattr(self, name).detach().double().cpu()
            if not bool(value.isfinite().all()):
                raise ValueError(f"`{name}` must be finite; remove the values of λ at which it is not.")
            object.__setattr__(self, name, value)
        shapes = [tuple(v.shape) for v in (self.l, self.s, self.b)]
        fits = self.l.ndim > 1 and len({(len(self.lam), *shapes[0][1:]), *shapes}) == 1
        if self.lam.ndim != 1 or len(self.lam) < 2 or not fits:
            raise ValueError(
                f"`lam` must have shape (K,) with K >= 2, and `l`, `s` and `b` the shape (K, *event), got "
                f"{tuple(self.lam.shape)} and {', '.join(map(str, shapes))}."
            )
        if not bool((self.lam.diff() > 0).all()):
            raise ValueError("`lam` must increase strictly; sort the values and remove repeated ones.")

    def __repr__(self) -> str:
        return f"EntryStatistics(<{len(self.lam)} × {self.event} values {self._digest}>)"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EntryStatistics):
            return NotImplemented
        return all(torch.equal(getattr(self, name), getattr(other, name)) for name in ("lam", "l", "s", "b"))

    def __hash__(self) -> int:
        return hash((EntryStatistics, self._digest))

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of a state without the batch."""
        return tuple(self.l.shape[1:])

    @checked
    def mean(self) -> Statistics:
        """Statistics for all entries, by the means of the tables over the entries."""
        l, s, b = (tuple(v.flatten(1).mean(1).tolist()) for v in (self.l, self.s, self.b))  # noqa: E741
        return Statistics(tuple(self.lam.tolist()), l, s, b)

    @cached_property
    def splines(self) -> tuple[Spline, Spline, Spline]:
        """Splines of l, s and :math:`e^{-S} b`."""
        s = rate_spline(self.lam, self.s)
        return slope_spline(self.lam, self.l), s, damped(Spline(self.lam, self.b), s)

    @cached_property
    def _digest(self) -> str:
        tables = torch.cat([v.flatten() for v in (self.lam, self.l, self.s, self.b)])
        return hashlib.sha256(tables.numpy().tobytes()).hexdigest()[:8]


@checked
def load_statistics(
    folder: str | Path, sde: SDE, *, t_start: float | None = None, t_end: float | None = None
) -> EntryStatistics:
    """Load statistics in the format of DPM-Solver-v3's public code: ``l.npz``, and ``sb.npz`` with s and b.

    The files hold arrays (K, *event) at K values of λ that are even from the first time to the last one. The files do
    not contain the times, so give those with which the statistics were computed.

    Arguments:
        folder: Folder of the two files.
        sde: Process of the model.
        t_start: First time, by default T.
        t_end: Last time, by default ``sde.t_min``, which is the first step of a :class:`Discrete` process.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268
    """
    import numpy as np

    check.window(sde.T, t_start, t_end)
    found: dict[str, Tensor] = {}
    for file, names in (("l.npz", ("l",)), ("sb.npz", ("s", "b"))):
        path = Path(folder) / file
        if not path.is_file():
            raise FileNotFoundError(f"`folder` must hold l.npz and sb.npz, but {path} does not exist.")
        with np.load(path, allow_pickle=False) as arrays:
            for name in names:
                if name not in arrays:
                    raise ValueError(f"{path} must hold an array {name!r}, it has {sorted(arrays)}.")
                found[name] = torch.from_numpy(arrays[name]).double()
    ends = (sde.T if t_start is None else t_start, sde.t_min if t_end is None else t_end)
    lam = torch.linspace(sde.lam(ends[0]), sde.lam(ends[1]), len(found["l"]), dtype=torch.float64)
    return EntryStatistics(lam, found["l"], found["s"], found["b"])


@checked
@dataclass(frozen=True, repr=False)
class EntryMultistep(Solver):
    """DPM-Solver-v3 with statistics for each entry; its plans run on states of one shape only.

    Arguments:
        statistics: Tables of l, s and b.
        nodes: Number of nodes of the predictor.
        corrector: Number of nodes of the corrector, including the new one; 0 for no corrector.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, algorithms 1 and 2
    """

    statistics: EntryStatistics
    nodes: int = 3
    corrector: int = 0

    def __post_init__(self) -> None:
        check.integer("nodes", self.nodes, at_least=1)
        check.integer("corrector", self.corrector)

    @property
    def order(self) -> int:
        """Order of the predictor, or min(nodes + 1, corrector) with a corrector, as of :class:`Multistep`."""
        return min(self.nodes + 1, self.corrector) if self.corrector else self.nodes

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        if not tape.plain:
            raise ValueError("statistics for each entry need a grid of numbers; use `statistics.mean()` for others.")
        history = leg.history[: self.nodes]
        if not (self.corrector and leg.evaluates):
            new = self._move(tape, leg, history, evaluates=leg.evaluates, node=leg.node)
            return new, [new, *leg.history][: max(self.nodes, self.corrector)]
        predicted = self._move(tape, leg, history, evaluates=True, node=None, note="predict")
        nodes = [predicted, *leg.history][: self.corrector]
        new = self._move(tape, leg, nodes, evaluates=False, node=leg.node, note="correct")
        return new, [predicted, *leg.history][: max(self.nodes, self.corrector)]

    def _move(
        self, tape: Tape, leg: Leg, nodes: Sequence[int], *, evaluates: bool, node: int | None, note: str = ""
    ) -> int:
        """Add a row that interpolates g; the data prediction at infinite λ."""
        usable = [k for k in nodes if bool(tape.at(tape.time(k)).lam.isfinite())]
        if not usable or not tape.finite(tape.time(leg.row), leg.t):
            return tape.move(leg.row, leg.t, nodes[:1], evaluates=evaluates, node=node, note=note)
        points = [tape.at(tape.time(k)) for k in usable]
        phi, of_x, of_d, one = self._weights(*tape.ends(leg), points)
        x = {leg.row: phi}
        for k, w in zip(usable, of_x, strict=True):
            x[k] = x[k] + w if k in x else w
        return tape.append(
            leg.t,
            x=[(k, w[None]) for k, w in x.items()],
            d=[(k, w[None]) for k, w in zip(usable, of_d, strict=True)],
            one=one[None],
            evaluates=evaluates,
            node=node,
            note=note,
        )

    def _weights(self, s: Point, t: Point, nodes: Sequence[Point]) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        """Weights of x_s, of the nodes' x and d, and the constant, each of the shape of an event."""
        l, s_of, b = self.statistics.splines  # noqa: E741
        h = t.lam - s.lam
        lam = s.lam + h * LEGENDRE_NODES
        mass = h * LEGENDRE_WEIGHTS
        end = l.integral(t.lam)
        kernel = -t.alpha * (l.integral(lam) - end + s_of.integral(lam)).exp()
        basis = lagrange(lam[None], torch.stack([p.lam for p in nodes])[None])[0]  # (k, Q)
        W = torch.tensordot(basis * mass, kernel, dims=1)
        one = torch.tensordot(mass, kernel * b.integral(lam), dims=1)
        of_x, of_d = [], []
        for w, p in zip(W, nodes, strict=True):
            scale = w * (-s_of.integral(p.lam)).exp()
            of_x.append(scale * (1 - l(p.lam)) / p.alpha)
            of_d.append(-scale)
            one = one - w * b.integral(p.lam)
        return t.alpha / s.alpha * (l.integral(s.lam) - end).exp(), of_x, of_d, one
