"""The defaults of :func:`solve`: which solver and which grid a model gets that comes without either.

The choice follows what the network predicts, the number of evaluations, and whether the model is exact. Each case is a
function that :func:`recommend` calls; the page "Which solver" has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.analysis.moments import amplification
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.grids.spacings import flow_time, log_noise, quadratic_vp
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.sampling.few_steps import verdict
from scoresde.solvers.deterministic import UniPC, VelocityAB, with_corrector
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver
from scoresde.solvers.single_step import SingleStep

GridMaker = Callable[..., Tensor]

BOUND = 6.0
"""Largest amplification of a network's errors by a default plan, in units of that of DDIM on the same grid."""


@checked
@dataclass(frozen=True)
class Recommendation:
    """A solver and a grid for a model and a budget.

    Arguments:
        solver: Solver.
        grid: Function ``grid(sde, steps, *, t_start, t_end)`` that makes the times.
        why: Reason of the choice, one sentence.
    """

    solver: Solver
    grid: GridMaker
    why: str

    def __repr__(self) -> str:
        grid = getattr(self.grid, "__name__", "grid")
        if isinstance(self.grid, partial):
            grid = f"{self.grid.func.__name__}({fields(**self.grid.keywords)})"
        return f"Recommendation(solver={self.solver!r}, grid={grid}, why={self.why!r})"


@checked
def recommend(nfe: int, model: AbstractDenoiser | None = None) -> Recommendation:
    """The solver and the grid of :func:`solve` when neither is given, with the reason.

    The choice follows the network at the end of a chain of wrappers, ``model.kind``, so that guidance changes nothing.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser; None for a model that predicts x₀, v or the velocity.

    Example:
        >>> import torch, scoresde as ss
        >>> net = ss.Denoiser(lambda x, t: torch.zeros_like(x), ss.VP(), predicts="v")
        >>> choice = ss.sampling.recommend(8, net)
        >>> choice.solver
        with_corrector(solver=VelocityAB(order=2))
        >>> [round(t, 2) for t in choice.grid(net.sde, 4).tolist()]
        [1.0, 0.5, 0.29, 0.12, 0.0]
    """
    choice = _choice(nfe, model)
    if model is None or not isinstance(bound := bounded(nfe, model), Bounded):
        return choice
    _, steps = bound.for_nfe(nfe, clean=True)
    solver = bound.choose(model.sde, choice.grid(model.sde, steps))
    if solver == choice.solver:
        return choice
    why = (
        f"{choice.solver!r} would multiply the network's errors too much on this process, or give data of a wrong "
        f"standard deviation, so {solver!r} takes its place."
    )
    return Recommendation(solver, choice.grid, why)


def _choice(nfe: int, model: AbstractDenoiser | None) -> Recommendation:
    """The choice before its plan is checked."""
    check.integer("nfe", nfe, at_least=1)
    kind = None if model is None else model.kind
    if kind is not None and kind.predicts in ("eps", "score"):
        return _of_noise(nfe)
    return _of_exact(nfe) if kind is not None and kind.exact else _of_data(nfe)


_NOISE: tuple[tuple[int, str, float, float, float | None], ...] = (
    (25, "tau", 0.2, 2.0, 7.0),
    (18, "lam", 0.2, 2.0, 4.0),
    (13, "lam", 0.2, 1.75, 4.0),
    (6, "lam", 0.07, 1.0, None),
    (1, "lam", 0.2, 1.0, None),
)
"""Smallest number of evaluations, variable of the velocity, and scale, exponent and power of the grid."""


def _of_noise(nfe: int) -> Recommendation:
    """Few steps are even in λ down to a small noise level; from 13 on they are shorter at T, and denser near data."""
    variable, scale, exponent, power = next(row[1:] for row in _NOISE if nfe >= row[0])
    return Recommendation(
        _velocity(nfe, variable=variable),
        partial(log_noise, scale=scale, exponent=exponent, power=power),
        "The x₀ of an ε-network has σ/α times its error, so the grid has no long step at high noise, and the velocity, "
        "which has less of this error near data, is interpolated and corrected by the next evaluation.",
    )


def _of_data(nfe: int) -> Recommendation:
    """Few steps are even in the flow time, slightly denser at high noise; many are denser near data."""
    exponent, shift = (1.0, 1.2) if nfe <= 8 else (1.25, 1.4) if nfe < 15 else (1.5, 1.0)
    where = "even in the flow time" if exponent == 1 else f"even in the flow time to the power of 1/{exponent:g}"
    newest = nfe <= 6 or 8 < nfe < 15
    return Recommendation(
        _velocity(nfe, final=1 if newest else 0),
        partial(flow_time, exponent=exponent, shift=shift),
        f"The network is reliable at high noise, so few evaluations are spent there: the steps are {where}, and the "
        "velocity, which changes least along them, is interpolated and corrected.",
    )


def _of_exact(nfe: int) -> Recommendation:
    return Recommendation(
        _velocity(nfe, order=2 if nfe < 15 else 3, final=1 if nfe <= 6 else 0),
        partial(flow_time, exponent=1.5),
        "An exact model has no error that a step could amplify, so the steps become short near data, even in the flow "
        "time to the power of 2/3, and the velocity is interpolated and corrected.",
    )


def _velocity(nfe: int, order: int = 2, final: int = 0, variable: str = "tau") -> Solver:
    """Velocity Adams–Bashforth with a corrector, or DDIM for budgets that leave no room for it."""
    rule = VelocityAB(order, final=final, variable=variable)
    return with_corrector(rule) if nfe >= (2 if variable == "lam" else 3) else VelocityAB(1)


@checked
def default_solver(nfe: int, model: AbstractDenoiser | None = None) -> Solver:
    """The solver of :func:`solve` when none is given: that of :func:`recommend`.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
    """
    return recommend(nfe, model).solver


@checked
def default_grid(nfe: int, model: AbstractDenoiser | None = None, solver: Solver | None = None) -> GridMaker:
    """The grid of :func:`solve` when none is given: that of :func:`recommend`.

    Solvers that draw noise or step in t or λ without an exponential integrator need short steps at high noise; their
    default is ``grids.quadratic_vp``.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
        solver: Solver that runs on the grid, by default :func:`default_solver`.
    """
    exponential = solver is None or (isinstance(solver, Multistep | SingleStep) and solver.eta == 0)
    return _choice(nfe, model).grid if exponential else quadratic_vp


@dataclass(frozen=True, repr=False)
class Bounded(Solver):
    """A solver whose plans are replaced by those of lower order where they amplify errors.

    The plan of the first solver is taken that multiplies errors of the network by at most `bound` times as much as DDIM
    on the same grid, and that gives Gaussian data the right standard deviation; else the plan of DDIM.

    Arguments:
        solver: Multistep solver.
        predicts: Prediction of the network.
        bound: Bound of the amplification.
    """

    solver: Multistep
    predicts: str = "x0"
    bound: float = BOUND

    @property
    def order(self) -> int:
        return self.solver.order

    def __repr__(self) -> str:
        return repr(self.solver)

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        return self, self.solver.for_nfe(nfe, clean=clean)[1]

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        return self.choose(sde, times, up=up).plan(sde, times, up=up)

    def choose(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Solver:
        """The solver whose plan is taken.

        Arguments:
            sde: Process.
            times: Grid.
            up: Steps that go up in time, as in :meth:`plan`.
        """
        plan, lowest = self.solver.plan(sde, times, up=up), VelocityAB(1)
        if plan.nfe > _LONG or not _single(plan):
            return self.solver
        first = lowest.plan(sde, times, up=up)
        most = self.bound * float(amplification(first, sde, self.predicts).max())
        for rule in (self.solver, *_lower(self.solver)):
            plan = rule.plan(sde, times, up=up)
            if float(amplification(plan, sde, self.predicts).max()) <= most and verdict(plan, sde) is None:
                return rule
        return lowest


def bounded(nfe: int, model: AbstractDenoiser) -> Solver:
    """The default solver for a budget; on a network, with bounded amplification of the network's errors.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
    """
    solver = _choice(nfe, model).solver
    return Bounded(solver, model.kind.predicts) if isinstance(solver, Multistep) and not model.kind.exact else solver


_LONG = 100  # evaluations above which steps are so short that a plan is not checked


def _single(plan: Plan) -> bool:
    """Whether the times of a plan are numbers."""
    return not any(isinstance(t, torch.Tensor) for t in plan.times)


def _lower(solver: Multistep) -> list[Solver]:
    """Solvers of lower order, the highest first."""
    return [VelocityAB(2), UniPC(2, "exact")] if solver.nodes > 2 or solver.prediction.name == "velocity" else []
