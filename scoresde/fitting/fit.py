r"""Fit the coefficients of a plan to a model: gradient descent on the distance from a fine solve.

A plan of n evaluations that is exact on one-point data has three parts: the times of its states, the times at which the
network is evaluated there, and in each row r weights that sum to one,

.. math:: x_r = \frac{\sigma_r}{\sigma_0} x_0 + \Big(\alpha_r - \frac{\sigma_r\alpha_0}{\sigma_0}\Big)
          \sum_{k<r} w_{rk}\, D(x_k, \tau_k), \qquad \sum_k w_{rk} = 1.

L-BFGS fits all parts together on a fixed set of trajectories and preserves this form. There are about n(n + 3)/2
numbers, so some dozens of trajectories suffice. Held-out trajectories decide when to stop.

The loss is robust. With e the distance of a sample from the result of the teacher,

.. math:: \tfrac12 \operatorname{mean} \log(e^2 + \delta^2), \qquad
          \delta = \mathrm{robust}\cdot\operatorname{median} e,

where each round updates δ. Samples near the boundary of two basins do not dominate the loss, and samples with tiny
errors do not make it rough. Where the flow forks, a small early error becomes a large final error: to reduce the tails
of the error, fit on trajectories of which some start there (`forks`).

References:
    | Bespoke Non-Stationary Solvers (Shaul et al., 2024), arXiv:2403.01329
    | Learning to Discretize Denoising Diffusion ODEs (Tong et al., 2024), arXiv:2405.15506
    | S4S: Solving for a Diffusion Model Solver (Frankel et al., 2025), arXiv:2502.17423
"""

from __future__ import annotations

import importlib.metadata
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._progress import Bar
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian, check_gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start, as_start
from scoresde.fitting.clocks import hides_time
from scoresde.fitting.descent import lbfgs_round
from scoresde.fitting.starts import begin_plans
from scoresde.fitting.table import Table
from scoresde.fitting.trajectories import (
    CANDIDATES,
    Trajectories,
    check_teacher,
    draw_starts,
    forked,
    teacher_ends,
)
from scoresde.noise.brownian import PathNoise
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.matrices import Unrolled
from scoresde.plan.table import Plan
from scoresde.solvers.rule import Solver

_ROUND = 25  # iterations between two evaluations of the held-out errors

_PATIENCE = 3  # rounds without improvement before the fit stops

_TRIED, _TRIAL = 3, 8  # starts that are fitted before one is chosen, and iterations of each


@checked
@dataclass(frozen=True)
class Split:
    """Division of the trajectories of a fit.

    Arguments:
        held_out: Number of trajectories that are not fitted and decide when to stop; by default a third.
        forks: Fraction of the trajectories that start where the flow forks, for the tails of the error: the one of ten
            candidates with the largest :func:`expansion`. The candidates are drawn, so this needs a shape.
    """

    held_out: int | None = None
    forks: float = 0.0

    def __post_init__(self) -> None:
        check.number("forks", self.forks, at_least=0, at_most=1)
        if self.held_out is not None:
            check.integer("held_out", self.held_out, at_least=1)

    def sizes(self, n: int) -> tuple[range, range]:
        """Numbers of the fitted and of the held-out trajectories, of n."""
        held = n // 3 if self.held_out is None else self.held_out
        if not 0 < held < n:
            raise ValueError(f"`held_out` must be in 1 … {n - 1} for {n} trajectories, got {held}; use more.")
        return range(held, n), range(held)


@checked
@dataclass(frozen=True)
class Descent:
    """Loss and memory of a fit.

    Arguments:
        robust: Multiple of the median error up to which errors count as squares, and above as logarithms: a small one
            fits the median, a large one the mean square.
        batch: Number of trajectories in memory at once, by default all.
        grad: Gradients, ``"full"``, or ``"checkpoint"`` for the memory of one evaluation at the cost of a second pass.
    """

    robust: float = 1.0
    batch: int | None = None
    grad: str = "full"

    def __post_init__(self) -> None:
        check.number("robust", self.robust, above=0)
        check.choice("grad", self.grad, ("full", "checkpoint"))
        if self.batch is not None:
            check.integer("batch", self.batch, at_least=1)


@checked
def fit(
    solver: Plan | Solver | int,
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    grid: Tensor | Sequence[float] | None = None,
    what: Sequence[str] | None = None,
    teacher: Plan | Tensor | None = None,
    start: Start | Gaussian | None = None,
    split: Split | None = None,
    descent: Descent | None = None,
    steps: int = 300,
    seed: int | Noise = 0,
    progress: bool | str = False,
) -> Plan:
    """Fit the coefficients of a plan to a model.

    Arguments:
        solver: Plan to begin from; a solver, whose weights follow the times and are corrected by the fit; or a number
            of evaluations. The fit then begins from the default plan, two others on the network's own times and the
            universal plan, and goes on with the one that is best after some iterations; iterations that this one does
            not need go to the next best.
        model: Denoiser; its parameters do not change. Conditions belong to it, as in ``model.given(label=y)``, with one
            row for each trajectory.
        shape_or_x: Shape (B, *event) of the trajectories, held-out ones included; or their initial states, at T with
            a Gaussian start, otherwise at the first time of the plan.
        grid: Times from noise to data, for a solver.
        what: Parts to fit, of ``"times"`` (of the states), ``"network_times"`` (of the evaluations) and ``"weights"``;
            by default all; for stochastic plans the last two, and their noise is not changed. If the network hides its
            time from autograd, by rounded or detached labels, the times of the evaluations stay where they are, and
            the default is the levels of the states and the weights, with a warning.
        teacher: Fine plan from T (without a Gaussian start, from the first time of the plan), or its results,
            (B, *event); by default the default solver with 200 evaluations. The teacher of a stochastic plan must draw
            the same normals. A coarse plan cannot reproduce all of their effect, so its samples have slightly less
            variance.
        start: Scale, dtype and device of the initial states; or a Gaussian whose flow carries them from T to the first
            time of the plan, which is then fitted with the other times. Run the result with the same ``start``.
        split: Held-out and forking trajectories, as a :class:`Split`.
        descent: Loss and memory, as a :class:`Descent`.
        steps: Largest number of iterations.
        seed: Seed of the initial states and of a stochastic plan's normals. ``Noise(seed, path=True)`` lets a
            stochastic plan follow a teacher with another grid on the same Brownian paths.
        progress: True for a progress bar on an interactive terminal; ``"always"`` for one on any output.

    Returns:
        A plan with its origin in ``plan.meta``. The geometric mean of its held-out errors is at most that of `solver`.
        ``plan.meta["far"]`` counts the held-out samples that end farther from the teacher than half a standard
        deviation of its results: those that end in another basin, before and after the fit.

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [0.2], [1.0]]), std=0.2)
        >>> start = ss.VelocityAB(2).plan(model.sde, ss.grids.karras(model.sde, 4))
        >>> plan = fit(start, model, (96, 1), start=ss.Start(dtype=torch.float64), steps=50)
        >>> errors = plan.meta["held_out"]
        >>> plan.nfe, errors["after"]["mean_log"] < 0.2 * errors["before"]["mean_log"]
        (4, True)
    """
    check_ready(model)
    if torch.is_inference_mode_enabled():
        raise RuntimeError("a fit needs gradients, which torch.inference_mode() drops; leave this context.")
    check.integer("steps", steps, at_least=1)
    start, split, descent = as_start(start), split or Split(), descent or Descent()
    gaussian = start.gaussian and check_gaussian("start", start.gaussian, model.sde)
    solvers: list[Plan | Solver] = [solver] if isinstance(solver, Plan | Solver) else []
    if not solvers:
        if grid is not None:
            raise ValueError("`grid` has no meaning if `solver` is a number of evaluations; drop it.")
        solvers = [*begin_plans(check.integer("solver", solver, at_least=1), model, gaussian)]
    own = Noise(seed.seed) if isinstance(seed, Noise) else Noise(seed)
    tables = [Table(s, model.sde, grid, what, gaussian is not None) for s in solvers]
    table = tables[0]
    x = draw_starts(shape_or_x, table, model, start, own)
    if what is None or set(what) & {"times", "network_times"}:
        still, parts = _what_may_move(table, model, x, what)
        if still:
            tables = [Table(s, model.sde, grid, parts, gaussian is not None, still=True) for s in solvers]
            table = tables[0]
    if split.forks:
        if isinstance(shape_or_x, Tensor) or isinstance(teacher, Tensor) or table.plan.stochastic:
            raise ValueError(
                "`forks` draws initial states for a deterministic plan: give a shape, and no tensor as `teacher`; or "
                "select initial states with ss.fitting.expansion."
            )
        again = (draw_starts(shape_or_x, table, model, start, own, k) for k in range(1, CANDIDATES))
        x = forked(table, model, [x, *again], split.forks, gaussian is not None)
    train, held = split.sizes(len(x))
    source = seed if isinstance(seed, Noise) else own.fork(Stream.FITTED_NOISE)
    check_teacher(teacher, table, source)
    truth, teacher_name = teacher_ends(teacher, table, model, x, gaussian, source)
    rows = Trajectories(model, x, truth, _normals(table.plan, source, x), gaussian, descent.batch, descent.grad)
    tried: dict[str, list[float]] = {}
    if len(tables) > 1:
        tables, tried = _best_starts(tables, rows, train, descent.robust)
    found: list[_Found] = []
    with Bar(progress, steps, f"fit {tables[0].name}") as bar:
        while tables and (not found or found[-1].spent < steps):
            spent = found[-1].spent if found else 0
            found.append(_rounds(tables.pop(0), rows, (train, held), descent.robust, (spent, steps), bar))
    spent = found[-1].spent
    winner = min(found, key=lambda f: _mean_log(f.held_out))
    table, best, before = winner.table, winner.best, winner.before
    after = {"train": rows.errors(best, train), "held_out": winner.held_out}
    meta = {
        "scoresde": importlib.metadata.version("scoresde"),
        "from": table.name,
        "sde": repr(model.sde),
        "teacher": teacher_name,
        "what": list(table.what),
        "gaussian start": gaussian is not None,
        "iterations": spent,
        "robust": descent.robust,
        "forks": split.forks,
        "seed": own.seed,
        "trajectories": {"train": len(train), "held_out": len(held)},
        "levels": [float(t) for t in table.levels_of(best)],
        **({"tried": tried, "fitted": {f.table.name: _mean_log(f.held_out) for f in found}} if tried else {}),
        "far": {"before": rows.far(before["held_out"]), "after": rows.far(after["held_out"])},
        **{k: {"before": _summary(before[k]), "after": _summary(after[k])} for k in ("train", "held_out")},
    }
    if best is table.start:
        return replace(table.plan, meta=meta)
    on_path = "network_times" not in table.what
    plan = best.plan(table.plan, on_path=on_path)
    return replace(plan, name=f"{table.plan.name}, fitted", order=None, meta=meta)


def _what_may_move(
    table: Table, model: AbstractDenoiser, x: Tensor, what: Sequence[str] | None
) -> tuple[bool, tuple[str, ...]]:
    """Whether the times of the evaluations must stay because the network hides its time; and the parts to fit."""
    times = [float(t) for t in table.start.t[:-1]]
    times = times if len(times) > 1 else [times[0], times[0] / 2]
    if not hides_time(model, x, times):
        return False, table.what
    reason = (
        "the network changes with its time, but autograd sees no derivative: its time labels are rounded or detached, "
        "as with time='nearest_index' or float(time), so the times of the evaluations cannot be fitted"
    )
    if what is not None and "network_times" in what:
        raise ValueError(
            f"{reason}; give `what`=('times', 'weights'), or make the labels differentiable, as time='index' does."
        )
    moves = table.solver is None and table.levels.may_move
    parts = ("times", "weights") if moves and not table.plan.stochastic else ("weights",)
    if what is None:
        warnings.warn(
            f"{reason}, and only {'the levels of the states and ' * (len(parts) > 1)}the weights are; time='index' "
            f"gives labels between the steps.",
            stacklevel=check.levels_to_user(),
        )
    return True, parts if what is None else tuple(what)


def _best_starts(
    tables: Sequence[Table], rows: Trajectories, train: range, robust: float
) -> tuple[list[Table], dict[str, list[float]]]:
    """The tables with the smallest errors, sorted by their errors after some iterations; and the errors of all."""
    first = [rows.errors(table.start, train) for table in tables]
    tried = {table.name: [_mean_log(e)] for table, e in zip(tables, first, strict=True)}
    order = sorted(range(len(tables)), key=lambda i: _mean_log(first[i]))
    scores: dict[int, float] = {}
    for i in order[:_TRIED]:
        _descend(tables[i], rows, train, max(robust * float(first[i].median()), 1e-12), _TRIAL)
        scores[i] = _mean_log(rows.errors(tables[i].now(detach=True), train))
        tried[tables[i].name].append(scores[i])
    return [tables[i] for i in sorted(scores, key=lambda i: scores[i])], tried


def _normals(plan: Plan, noise: Noise, x: Tensor) -> list[Tensor]:
    """All normals that a plan draws, (B, *event) each."""
    source = PathNoise(noise, plan.spans) if noise.path and plan.stochastic else noise
    return [source.like(x, k) for k in range(plan.draws)]


@dataclass(frozen=True)
class _Found:
    """The best table of a fit from one start.

    Arguments:
        table: Table of the start.
        best: Table with the smallest held-out error.
        before: Errors of the start.
        held_out: Held-out errors of the best table.
        spent: Number of iterations of the whole fit so far.
    """

    table: Table
    best: Unrolled
    before: dict[str, Tensor]
    held_out: Tensor
    spent: int


def _rounds(
    table: Table, rows: Trajectories, sets: tuple[range, range], robust: float, count: tuple[int, int], bar: Bar
) -> _Found:
    """Rounds of L-BFGS until the held-out error stops falling, from the first number of iterations to the second."""
    (train, held), (spent, steps) = sets, count
    before = {"train": rows.errors(table.start, train), "held_out": rows.errors(table.start, held)}
    best, best_held, stale = table.start, before["held_out"], 0
    scale = before["train"]
    while spent < steps and stale < _PATIENCE:
        delta = robust * float(scale.median())
        spent += _descend(table, rows, train, max(delta, 1e-12), min(_ROUND, steps - spent))
        now = table.now(detach=True)
        scale, error = rows.errors(now, train), rows.errors(now, held)
        gained = _mean_log(error) < 0.998 * _mean_log(best_held)
        if _mean_log(error) < _mean_log(best_held):
            best, best_held = now, error
        stale = 0 if gained else stale + 1
        bar.to(spent, train=f"{_mean_log(scale):.2e}", held=f"{_mean_log(error):.2e}")
        if not math.isfinite(_mean_log(scale)):
            break
    return _Found(table, best, before, best_held, spent)


def _mean_log(errors: Tensor) -> float:
    """Geometric mean; infinite if an error is not finite."""
    return float(errors.clamp_min(1e-30).log().mean().exp()) if bool(errors.isfinite().all()) else math.inf


def _summary(errors: Tensor) -> dict[str, float]:
    q = errors.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=errors.dtype)).tolist()
    rmse = float(errors.square().mean().sqrt())
    return {"mean_log": _mean_log(errors), "median": q[0], "rmse": rmse, "q90": q[1], "q99": q[2]}


def _descend(table: Table, rows: Trajectories, which: range, delta: float, steps: int) -> int:
    """Run a round of L-BFGS; return its number of iterations."""

    def losses() -> Iterator[Callable[[], Tensor]]:
        for part in rows.parts(which):
            yield lambda part=part: (  # type: ignore[misc]
                0.5 * (rows.error(table.now(), part) ** 2 + delta**2).log().sum() / len(which)
            )

    return lbfgs_round(table.parameters, losses, steps)
