"""The defaults of :func:`solve`: which solver and which grid a model gets that comes without either.

The choice follows what the network predicts, the number of evaluations, and whether the model is exact or a sample is a
vector. Each case is a function that :func:`recommend` calls; the page "Which solver" has the measurements.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.analysis.moments import amplification
from scoresde.denoisers.base import AbstractDenoiser, Given, Wrapped
from scoresde.denoisers.network import Denoiser
from scoresde.grids.spacings import flow_time, log_noise, quadratic_vp, uniform_lam
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.sampling.few_steps import verdict
from scoresde.solvers.deterministic import UniPC, VelocityAB, with_corrector
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver
from scoresde.solvers.single_step import SingleStep
from scoresde.solvers.universal import Universal, unit_of

GridMaker = Callable[..., Tensor]

BOUND = 6.0
"""Largest amplification of a network's errors by a default plan, in units of that of DDIM on the same grid."""


@checked
@dataclass(frozen=True)
class Recommendation:
    """A solver and a grid for a model and a budget.

    Arguments:
        solver: Solver.
        grid: Function ``grid(sde, steps, *, t_start, t_end)`` that makes the times; None for a solver that has its own.
        why: Reason of the choice, one sentence.
    """

    solver: Solver
    grid: GridMaker | None
    why: str

    def __repr__(self) -> str:
        grid = "None" if self.grid is None else getattr(self.grid, "__name__", "grid")
        if isinstance(self.grid, partial):
            grid = f"{self.grid.func.__name__}({fields(**self.grid.keywords)})"
        return f"Recommendation(solver={self.solver!r}, grid={grid}, why={self.why!r})"


class _Rule(NamedTuple):
    """A solver for any number of steps, its grid, and the reason."""

    solver: Solver
    grid: GridMaker
    why: str


@checked
def recommend(nfe: int, model: AbstractDenoiser | None = None, event: Sequence[int] | None = None) -> Recommendation:
    """The solver and the grid of :func:`solve` when neither is given, with the reason.

    The choice follows the network at the end of a chain of wrappers, ``model.kind``. Guidance and other wrappers change
    nothing, except that a rule replaces the :class:`Universal` plan; conditions by ``model.given`` keep it.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser; None for a model that predicts x₀, v or the velocity.
        event: Shape of one sample; by default that of ``model.gaussian``, if the model knows it. :func:`solve` takes it
            from the shape of the samples.

    Example:
        >>> import torch, scoresde as ss
        >>> net = ss.Denoiser(lambda x, t: torch.zeros_like(x), ss.VP(), predicts="v")
        >>> choice = ss.sampling.recommend(8, net)
        >>> choice.solver
        with_corrector(solver=VelocityAB(order=2))
        >>> [round(t, 2) for t in choice.grid(net.sde, 4).tolist()]
        [1.0, 0.5, 0.29, 0.12, 0.0]
        >>> ss.sampling.recommend(6, net, event=(2,)).solver
        Universal(data_std=1.0, predicts='data', start='prior')
    """
    if (table := fitted(nfe, model, event)) is not None:
        return table
    choice = _choice(nfe, model, event)
    if model is None or not isinstance(bound := bounded(nfe, model, event), Bounded):
        return Recommendation(*choice)
    _, steps = bound.for_nfe(nfe, clean=True)
    solver = bound.choose(model.sde, choice.grid(model.sde, steps))
    if solver == choice.solver:
        return Recommendation(*choice)
    why = (
        f"{choice.solver!r} would multiply the network's errors too much on this process, or give data of a wrong "
        f"standard deviation, so {solver!r} takes its place."
    )
    return Recommendation(solver, choice.grid, why)


def _choice(nfe: int, model: AbstractDenoiser | None, event: Sequence[int] | None = None) -> _Rule:
    """The rule and the grid, before the plan is checked."""
    check.integer("nfe", nfe, at_least=1)
    kind = None if model is None else model.kind
    vector = _is_vector(model, event)
    if kind is not None and kind.predicts in ("eps", "score"):
        return _of_noise_of_vectors(nfe) if vector and nfe >= 3 else _of_noise(nfe)
    exact = kind is not None and kind.exact
    if not (exact or vector):
        return _of_data(nfe)
    if _is_x0_network(model) and nfe > _TABLES["x0"]:
        return _of_data_of_vectors(nfe)
    return _of_vectors(nfe, exact)


def _is_vector(model: AbstractDenoiser | None, event: Sequence[int] | None) -> bool:
    """Whether a sample has one axis."""
    if event is None and model is not None and model.gaussian is not None:
        event = model.gaussian.event
    return event is not None and len(event) == 1


def _is_x0_network(model: AbstractDenoiser | None) -> bool:
    """Whether the model ends in a network that predicts x₀; x₀ of other denoisers is taken to have no such error."""
    while isinstance(model, Wrapped):
        model = model.model
    return isinstance(model, Denoiser) and model.predicts == "x0"


_TABLES = {"data": 6, "noise": 8, "x0": 5}
"""Largest number of evaluations of the universal plans that are defaults, for each kind; the smallest is 3."""


def fitted(
    nfe: int, model: AbstractDenoiser | None = None, event: Sequence[int] | None = None
) -> Recommendation | None:
    """The universal plan, if it is the default: few evaluations of an exact model, or of a network of vectors.

    A model that does not know the Gaussian of its data is taken to have data of standard deviation 1, or that of
    :class:`Preconditioning`.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser; None for a model that predicts x₀, v or the velocity.
        event: Shape of one sample.
    """
    check.integer("nfe", nfe, at_least=1)
    kind = None if model is None else model.kind
    predicts = "noise" if kind is not None and kind.predicts in ("eps", "score") else "data"
    exact = kind is not None and kind.exact
    most = _TABLES["x0" if _is_x0_network(model) else predicts]
    if not (exact or _is_vector(model, event)) or not 3 <= nfe <= most:
        return None
    inner = model
    while isinstance(inner, Given):
        inner = inner.model
    if isinstance(inner, Wrapped):  # guidance and posteriors, on which the tables were not judged
        return None
    gaussian = None if inner is None else inner.gaussian
    if exact and (gaussian is None or not gaussian.spectrum.any()):  # data of one point has no scale
        return None
    std = float(getattr(inner, "data_scale", 1.0)) if gaussian is None else unit_of(gaussian.spectrum)
    return Recommendation(
        Universal(std, predicts),
        None,
        "With few evaluations of an exact model, or of a network of vectors, a table that was fitted to random "
        "mixtures with errors like those of networks is more accurate than a rule.",
    )


_NOISE: tuple[tuple[int, str, float, float, float | None], ...] = (
    (25, "tau", 0.2, 2.0, 7.0),
    (18, "lam", 0.2, 2.0, 4.0),
    (13, "lam", 0.2, 2.0, 7.0),
    (8, "log1p_rho", 0.07, 1.0, None),
    (6, "lam", 0.07, 1.0, None),
    (1, "lam", 0.2, 1.0, None),
)
"""Smallest number of evaluations, variable of the velocity, and scale, exponent and power of the grid."""


def _of_noise(nfe: int) -> _Rule:
    """Few steps are even in λ down to a small noise level; from 13 on they are shorter at T, and denser near data."""
    variable, scale, exponent, power = next(row[1:] for row in _NOISE if nfe >= row[0])
    return _Rule(
        _velocity(nfe, final=int(variable == "log1p_rho"), variable=variable),
        partial(log_noise, scale=scale, exponent=exponent, power=power),
        "The x₀ of an ε-network has σ/α times its error, so the grid has no long step at high noise, and the velocity, "
        "which has less of this error near data, is interpolated and corrected by the next evaluation.",
    )


def _of_data(nfe: int) -> _Rule:
    """Few steps are even in the flow time, slightly denser at high noise; many are denser near data."""
    exponent, shift = (1.0, 1.2) if nfe <= 8 else (1.25, 1.4) if nfe < 15 else (1.5, 1.0)
    where = "even in the flow time" if exponent == 1 else f"even in the flow time to the power of 1/{exponent:g}"
    newest = nfe <= 6 or 8 < nfe < 15
    return _Rule(
        _velocity(nfe, final=1 if newest else 0),
        partial(flow_time, exponent=exponent, shift=shift),
        f"The network is reliable at high noise, so few evaluations are spent there: the steps are {where}, and the "
        "velocity, which changes least along them, is interpolated and corrected.",
    )


def _of_data_of_vectors(nfe: int) -> _Rule:
    """Steps that are even in λ, and the newest data prediction."""
    return _Rule(
        _velocity(nfe, variable="lam"),
        uniform_lam,
        "The x₀ of an x₀-network keeps its error where the noise ends, so many steps are taken there, even in λ, and "
        "the result is its newest x₀.",
    )


def _of_vectors(nfe: int, exact: bool) -> _Rule:
    """Steps that are short near data; the result of fewer than 18 evaluations is the newest data prediction."""
    order = 2 if nfe < 12 else 3 if nfe < _SHORT else 4
    reason = (
        "An exact model has no error that a step could amplify"
        if exact
        else "Vectors often lie near thin sets, such as curves"
    )
    return _Rule(
        _velocity(nfe, order=order, final=int(nfe < _SHORT)),
        partial(flow_time, exponent=1.5),
        f"{reason}, so the steps become short near data, even in the flow time to the power of 2/3, and the velocity "
        "is interpolated and corrected.",
    )


def _of_noise_of_vectors(nfe: int) -> _Rule:
    """Steps that are short near data; the velocity in a variable that is −λ at high noise and ρ near data."""
    return _Rule(
        _velocity(nfe, order=2 if nfe < 13 else 3, final=int(nfe < _SHORT), variable="log1p_rho"),
        partial(log_noise, scale=0.3, exponent=1.75) if nfe < 9 else quadratic_vp,
        "Vectors often lie near thin sets, so the steps become short near data, and the velocity is interpolated in "
        "log(1 + σ/α), in which a step at high noise multiplies errors of an ε-network little.",
    )


_SHORT = 18  # evaluations from which the last step is so short that the velocity is extrapolated to the data


def _velocity(nfe: int, order: int = 2, final: int = 0, variable: str = "tau") -> Solver:
    """Velocity Adams–Bashforth with a corrector, or DDIM for budgets that leave no room for it."""
    rule = VelocityAB(order, final=final, variable=variable)
    return with_corrector(rule) if nfe >= (3 if variable == "tau" else 2) else VelocityAB(1)


@checked
def default_solver(nfe: int, model: AbstractDenoiser | None = None, event: Sequence[int] | None = None) -> Solver:
    """The solver of :func:`solve` when none is given: that of :func:`recommend`.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
        event: Shape of one sample.
    """
    return recommend(nfe, model, event).solver


@checked
def default_grid(
    nfe: int,
    model: AbstractDenoiser | None = None,
    solver: Solver | None = None,
    event: Sequence[int] | None = None,
) -> GridMaker:
    """The grid of :func:`solve` for a solver that is given without one, and of the default rule.

    Solvers that draw noise or step in t or λ without an exponential integrator need short steps at high noise; their
    default is ``grids.quadratic_vp``.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
        solver: Solver that runs on the grid, by default the default rule.
        event: Shape of one sample.
    """
    exponential = solver is None or (isinstance(solver, Multistep | SingleStep) and solver.eta == 0)
    return _choice(nfe, model, event).grid if exponential else quadratic_vp


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


def bounded(nfe: int, model: AbstractDenoiser, event: Sequence[int] | None = None) -> Solver:
    """The default rule for a budget; on a network, with bounded amplification of the network's errors.

    Arguments:
        nfe: Number of evaluations.
        model: Denoiser.
        event: Shape of one sample.
    """
    solver = _choice(nfe, model, event).solver
    return Bounded(solver, model.kind.predicts) if isinstance(solver, Multistep) and not model.kind.exact else solver


_LONG = 100  # evaluations above which steps are so short that a plan is not checked


def _single(plan: Plan) -> bool:
    """Whether the times of a plan are numbers."""
    return not any(isinstance(t, torch.Tensor) for t in plan.times)


def _lower(solver: Multistep) -> list[Solver]:
    """Solvers of lower order, the highest first."""
    if solver.nodes <= 2 and solver.prediction.name != "velocity":
        return []
    kept = [
        with_corrector(VelocityAB(k, final=solver.final, variable=solver.variable.name))
        for k in range(solver.nodes - 1, 1, -1)
        if solver.prediction.name == "velocity" and solver.corrector
    ]
    return [*kept, VelocityAB(2), UniPC(2, "exact")]
