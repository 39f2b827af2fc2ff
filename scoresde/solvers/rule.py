"""The base class of the solvers: a frozen object that builds a plan from a process and a grid, without a network."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, TypeGuard

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian
from scoresde.grids.zigzags import Zigzag
from scoresde.noise.brownian import Span
from scoresde.plan.rows import Row, Weight
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.naming import Call, name_of
from scoresde.solvers.tape import Leg, Tape


@checked
@dataclass(frozen=True)
class EtaWithin:
    r"""Stochasticity of steps that end in an interval of σ/α; all other steps are deterministic.

    A function of time belongs to one process. This is the same noise level on every process.

    Arguments:
        eta: Noise level η inside the interval.
        low: Lowest σ/α at the end of a stochastic step.
        high: Highest σ/α at the end of a stochastic step.

    Example:
        >>> import scoresde as ss
        >>> noise = ss.solvers.EtaWithin(1.0, low=0.5, high=25.0)
        >>> grid = ss.grids.karras(ss.EDM(), 20)
        >>> ss.SDEDPMSolverPP(2, eta=noise).plan(ss.EDM(), grid).draws, int(((grid >= 0.5) & (grid <= 25)).sum())
        (9, 9)
    """

    eta: float = 1.0
    low: float = 0.5
    high: float = 25.0

    def __post_init__(self) -> None:
        check.number("eta", self.eta, at_least=0)
        check.number("low", self.low, at_least=0)
        if not self.high > self.low:
            raise ValueError(f"`high` must be above `low` = {self.low:g}, got {self.high}; both are values of σ/α.")

    def at(self, sde: SDE, t: Weight) -> Weight:
        """η of a step that ends at `t`: a number, or a tensor like `t`.

        Arguments:
            sde: Process.
            t: Time at the end of the step.
        """
        if not isinstance(t, Tensor):
            return self.eta if self.low * sde.alpha(t) <= sde.sigma(t) <= self.high * sde.alpha(t) else 0.0
        alpha, sigma = sde.alpha(t.detach()), sde.sigma(t.detach())
        return torch.where((self.low * alpha <= sigma) & (sigma <= self.high * alpha), self.eta, 0.0).double()


Eta = float | EtaWithin | Callable[[Weight], Weight]
"""Stochasticity η: a number, an :class:`EtaWithin`, or a function of time. The time is a number, or a tensor if the
grid is one."""


@dataclass(frozen=True, repr=False)
class Solver:
    """Base class of the solvers.

    A subclass defines :meth:`leg`, which adds the rows of one step to a :class:`Tape`, and `order`. It may also define
    `weak_order`, `stages`, `memoryless`, :meth:`for_nfe` and :meth:`after_noise`. The first three and `order` are class
    attributes, fields or properties. :meth:`plan` handles the grid, steps that go up in time, and the last step.

    Arguments:
        made_by: Call of the function that made the solver, for its name; None by default.

    Attributes:
        order: Order of convergence, an integer; required.
        weak_order: Order of convergence in distribution, by default `order`.
        stages: Number of function evaluations per step, 1 by default; a step into σ = 0 may need only one.
        memoryless: Whether no step reads the history and all steps have one form, so that they can be computed in one
            batch, with tensors of times; False by default.
        own_times: Whether the solver has times of its own, so that no grid may be given; False by default.

    Example:
        A solver of order 2 that evaluates the network at the middle of each step in λ, and steps with that prediction:

        >>> from dataclasses import dataclass
        >>> import scoresde as ss
        >>> from scoresde.solvers import Leg, Solver, Tape
        >>> @dataclass(frozen=True)
        ... class Middle(Solver):
        ...     order = 2
        ...     stages = 2
        ...     fraction: float = 0.5
        ...     def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        ...         nodes, s = leg.history[:1], tape.time(leg.row)
        ...         if tape.finite(s, leg.t):  # there is no middle in a step into σ = 0
        ...             nodes = [tape.move(leg.row, tape.between(s, leg.t, self.fraction), nodes)]
        ...         new = tape.move(leg.row, leg.t, nodes, evaluates=leg.evaluates, node=leg.node)
        ...         return new, [new]
        >>> print(Middle().plan(ss.Flow(), [0.9, 0.5, 0.0]))
        Middle(fraction=0.5): 3 evaluations, 4 rows, order 2
           0  t=0.9      eval  start, node 0
           1  t=0.75     eval  x[0:+0.8333]  d[0:+0.1667]
           2  t=0.5      eval  x[0:+0.5556]  d[1:+0.4444]   node 1
           3  t=0              d[2:+1]   node 2
        >>> data = ss.GaussianMixture(ss.VP(), [[0.3, -0.5]], cov=[[[1.2, 0.4], [0.4, 0.5]]])
        >>> abs(ss.analysis.convergence_order(Middle(), data).slope - Middle().order) < 0.2
        True
        >>> ss.sample(data, (8, 2), Middle(), nfe=15, seed=0).shape
        torch.Size([8, 2])
    """

    own_times: ClassVar[bool] = False

    made_by: Call | None = field(default=None, kw_only=True, repr=False)

    if TYPE_CHECKING:  # plain attributes, which a subclass replaces by its own, by fields or by properties

        @property
        def order(self) -> int: ...
        @property
        def stages(self) -> int: ...
        @property
        def memoryless(self) -> bool: ...
    else:
        stages = 1
        memoryless = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if not hasattr(cls, "order") and "order" not in inspect.get_annotations(cls):
            raise TypeError(
                f"{cls.__name__} must define `order`, its order of convergence: a class attribute, a field or a "
                f"property, an integer."
            )

    def __repr__(self) -> str:
        return name_of(self)

    @property
    def name(self) -> str:
        """Name of the plans that the solver builds: the call that makes it, which is unique to its options."""
        return repr(self)

    @property
    def weak_order(self) -> int:
        """Order of convergence in distribution; without noise it equals `order`."""
        return self.order

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return a solver and the largest number of steps (at least 1) that `nfe` evaluations allow.

        Arguments:
            nfe: Number of function evaluations, at least 1.
            clean: Whether the grid ends at σ = 0.
        """
        check.integer("nfe", nfe, at_least=1)
        return self, max(1, (nfe - 1) // self.stages + 1 if clean else nfe // self.stages)

    @checked
    def suited(self, model: AbstractDenoiser, nfe: int, gaussian: Gaussian | None = None) -> Solver:
        """Return the solver with the options that it takes from a model; by default it takes none.

        Arguments:
            model: Denoiser.
            nfe: Number of steps.
            gaussian: Gaussian of the start, if there is one.
        """
        return self

    @checked
    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Build the plan for a grid.

        Arguments:
            sde: Process.
            times: Grid from noise to data: a float64 tensor (N + 1,), which may require grad, or (N + 1, B) for one
                grid per sample. It decreases, unless it is a zigzag, as made by ``ss.grids.zigzag``.
            up: Steps that go up in time: ``"diffuse"`` adds exact forward noise in a zigzag, ``"solve"`` is the solver
                (inversion).
        """
        grid, solved = _check_times(sde, times, check.choice("up", up, ("diffuse", "solve")))
        plain = not isinstance(grid[0], Tensor)
        computed = self._batched_steps(sde, grid, solved) if self.memoryless and plain else {}
        tape = Tape(sde, grid[0], evaluates=solved[0], grid=() if computed else grid)
        row, history = 0, [0]
        for i, t in enumerate(grid[1:]):
            leg = Leg(row, history, t, i + 1 < len(solved) and solved[i + 1], i + 1)
            if i in computed:
                row = tape.paste(row, *computed[i], evaluates=leg.evaluates, node=i + 1)
                history = [row]
            elif solved[i]:
                result = self.leg(tape, leg)
                if not (isinstance(result, tuple) and len(result) == 2):
                    raise TypeError(f"`leg` of {type(self).__name__} must return (row, history), got {result!r}.")
                row, history = result
            else:
                row = tape.diffuse(row, t, evaluates=leg.evaluates, node=i + 1)
                history = self.after_noise(tape, row, history)
        return tape.plan(self.name, self.order)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        """Add the rows of one step to the tape.

        Arguments:
            tape: Tape that receives the rows.
            leg: The step: its first row, the history, the target time, whether the network is evaluated there, and the
                number of the node.

        Returns:
            The row of the new state, and the new history.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define `leg(tape, leg)`, which adds the rows of one step and returns "
            f"(row, history); the documentation of Solver has an example."
        )

    def after_noise(self, tape: Tape, row: int, history: list[int]) -> list[int]:
        """Return the history after fresh noise is added: by default the new row alone.

        Arguments:
            tape: Tape that holds the rows.
            row: Row of the state with fresh noise.
            history: Evaluated rows before the noise, newest first.
        """
        return [row]

    def to_dict(self) -> dict[str, object]:
        """The call that makes the solver, for JSON; :meth:`from_dict` restores an equal solver.

        Example:
            >>> import scoresde as ss
            >>> ss.UniPC(3).to_dict()
            {'solver': 'UniPC(order=3)'}
        """
        from scoresde.solvers.dictionary import to_dict

        return to_dict(self)

    @staticmethod
    def from_dict(table: Mapping[str, object]) -> Solver:
        """Make a solver from a dictionary.

        Arguments:
            table: Output of :meth:`to_dict`.
        """
        from scoresde.solvers.dictionary import from_dict

        return from_dict(table)

    def _batched_steps(
        self, sde: SDE, grid: list[Weight], solved: list[bool]
    ) -> dict[int, tuple[list[Row], list[Span | None]]]:
        """Rows and noise spans of all steps between finite λ, computed as one step with a batch of times."""
        t = torch.tensor(grid, dtype=torch.float64)
        finite = sde.lam(t).isfinite().tolist()
        indices = [i for i, down in enumerate(solved) if down and finite[i] and finite[i + 1]]
        if len(indices) < 2:
            return {}
        start, end = t[indices], t[[i + 1 for i in indices]]
        tape = Tape(sde, start, grid=[start, end])
        self.leg(tape, Leg(0, [0], end, True, 1))
        columns = zip(*(_unbatch(row, len(indices)) for row in tape.rows()[1:]), strict=True)
        spans = tape.spans() or (None,) * tape.draws
        return {
            i: (list(rows), [_span_of(span, k) for span in spans])
            for k, (i, rows) in enumerate(zip(indices, columns, strict=True))
        }


def _check_times(sde: SDE, times: Tensor | Sequence[float], up: str) -> tuple[list[Weight], list[bool]]:
    """Return the times, as numbers or tensors, and for each step whether the solver applies."""
    grid = times if isinstance(times, Tensor) else torch.as_tensor(times, dtype=torch.float64)
    meant = isinstance(grid, Zigzag)
    grid = grid.as_subclass(Tensor)
    if grid.dtype != torch.float64:
        raise TypeError(f"`times` must have dtype float64, got {str(grid.dtype)[6:]}; use `times.double()`.")
    if grid.ndim not in (1, 2) or len(grid) < 2:
        raise ValueError(f"`times` must have shape (N + 1,) or (N + 1, B) with N >= 1, got {tuple(grid.shape)}.")
    plain = grid.detach()
    outside = ~((plain >= 0) & (plain <= sde.T)).reshape(len(grid), -1).all(1)
    if outside.any():
        i = int(outside.nonzero()[0, 0])
        raise ValueError(f"`times` must lie in [0, T] = [0, {sde.T:g}], but time {i} does not ({plain[i].tolist()}).")
    step = plain.diff(dim=0).reshape(len(grid) - 1, -1)
    down, rising = (step < 0).all(1), (step > 0).all(1)
    if not bool((down | rising).all()):
        i = int((~(down | rising)).nonzero()[0, 0]) + 1
        raise ValueError(f"`times` repeats a time at index {i} (t = {plain[i].tolist()}); remove one of the two.")
    solved = [True] * (len(grid) - 1) if up == "solve" else down.tolist()
    if not solved[0] or not solved[-1]:
        raise ValueError(
            "`times` must decrease in its first and last steps. Use `times.flip(0)` if the grid goes from data to "
            "noise; use `encode` for inversion."
        )
    if not all(solved) and not meant:
        i = solved.index(False) + 1
        low, high = plain[i - 1].tolist(), plain[i].tolist()
        raise ValueError(
            f"`times` rises at index {i}, from t = {low} to {high}; a grid goes down, from noise to data. A step up "
            f"adds fresh noise: if you mean it, give ss.grids.zigzag(times); otherwise correct the time."
        )
    return list(grid) if grid.ndim == 2 or grid.requires_grad else grid.tolist(), solved


def _unbatch(row: Row, n: int) -> list[Row]:
    """Split a row with n weights per term into n rows."""

    def numbers(w: Weight) -> list[float]:
        return torch.as_tensor(w, dtype=torch.float64).expand(n).tolist()

    t, one = numbers(row.t), numbers(row.one)
    x, d, z = ([(k, numbers(w)) for k, w in terms] for terms in (row.x, row.d, row.z))
    return [
        replace(
            row,
            t=t[i],
            x=tuple((k, w[i]) for k, w in x if w[i]),
            d=tuple((k, w[i]) for k, w in d),
            z=tuple((k, w[i]) for k, w in z),
            one=one[i],
        )
        for i in range(n)
    ]


def _span_of(span: Span | None, i: int) -> Span | None:
    """The noise span of step i of a batch."""
    if span is None:
        return None
    assert isinstance(span.start, Tensor) and isinstance(span.end, Tensor)
    return replace(span, start=float(span.start[i]), end=float(span.end[i]))


def check_eta(name: str, eta: Eta) -> Eta:
    """Return `eta` if it is a function, an :class:`EtaWithin` or a number of at least 0, else raise an error."""
    return eta if varies(eta) else check.number(name, eta, at_least=0)


def varies(eta: Eta) -> TypeGuard[EtaWithin | Callable[[Weight], Weight]]:
    """Whether η may differ between steps."""
    return isinstance(eta, EtaWithin) or callable(eta)


def eta_at(eta: Eta, t: Weight, sde: SDE) -> Weight:
    """Evaluate η for a step that ends at t. η is constant within a step, since any value preserves the marginals."""
    value = eta.at(sde, t) if isinstance(eta, EtaWithin) else eta(t) if callable(eta) else eta
    if isinstance(value, Tensor) and (isinstance(t, Tensor) or value.requires_grad):
        return value
    return check.number("eta", float(value), at_least=0)
