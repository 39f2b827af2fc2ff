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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser, _check_denoiser
from scoresde.gaussian import Gaussian, check_gaussian
from scoresde.grids import check_grid, quadratic_vp
from scoresde.noise import Noise
from scoresde.paths import PathNoise
from scoresde.plan import Plan, run
from scoresde.sampling import default_solver
from scoresde.sde import SDE
from scoresde.solvers.base import Solver
from scoresde.unrolled import Unrolled, unroll

WHAT = ("times", "asked", "weights")
_STREAM = 0x666974
_ROUND = 25  # iterations between two evaluations of the held-out errors
_PATIENCE = 3  # rounds without improvement before the fit stops
_CANDIDATES = 10  # candidates for each initial state near a fork
_PILOT = 30  # evaluations of the plan that locates the forks


def fit(
    rule: Plan | Solver,
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    *,
    grid: Tensor | Sequence[float] | None = None,
    what: Sequence[str] | None = None,
    gaussian: Gaussian | None = None,
    teacher: Plan | Tensor | None = None,
    held_out: int | None = None,
    forks: float = 0.0,
    steps: int = 300,
    robust: float = 1.0,
    seed: int = 0,
    noise: Noise | int | None = None,
    batch: int | None = None,
    grad: str = "full",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    progress: bool | str = False,
    **cond: Any,
) -> Plan:
    """Fit the coefficients of a plan to a model.

    Arguments:
        rule: Plan; or a solver, whose weights follow the times and are corrected by the fit.
        model: Denoiser; its parameters do not change.
        shape_or_x: Shape (B, *event) of the trajectories, held-out ones included; or their initial states, at T with
            `gaussian`, otherwise at the first time of the plan.
        grid: Times from noise to data, for a solver.
        what: Parts to fit, of ``"times"`` (of the states), ``"asked"`` (times of the evaluations) and ``"weights"``; by
            default all; for stochastic plans the last two, and their noise is not changed.
        gaussian: Gaussian whose flow carries the initial states from T to the first time of the plan, which is then
            fitted with the other times. Run the result with ``start=gaussian``.
        teacher: Fine plan from T (without `gaussian`, from the first time of the plan), or its results, (B, *event); by
            default the default solver with 200 evaluations. The teacher of a stochastic plan must draw the same
            normals. A coarse plan cannot reproduce all of their effect, so its samples have slightly less variance.
        held_out: Number of trajectories that are not fitted and decide when to stop; by default a third.
        forks: Fraction of the trajectories that start where the flow forks, for the tails of the error: the one of ten
            candidates with the largest :func:`stretch`. The candidates are drawn, so this needs a shape.
        steps: Largest number of iterations.
        robust: Multiple of the median error up to which errors count as squares, and above as logarithms: a small one
            fits the median, a large one the mean square.
        seed: Seed of the initial states.
        noise: Normals of a stochastic plan, by default from `seed`; ``Noise(seed, path=True)`` to follow a teacher with
            another grid on the same Brownian paths.
        batch: Number of trajectories in memory at once, by default all.
        grad: Gradients, ``"full"``, or ``"checkpoint"`` for the memory of one evaluation at the cost of a second pass.
        dtype: Dtype of the states, if a shape is given.
        device: Device of the states, if a shape is given; by default the model's.
        progress: True for a progress bar on an interactive terminal; ``"always"`` for one on any output.
        **cond: Conditions of the network; tensors have a row for each trajectory.

    Returns:
        A plan with its origin in ``plan.meta``. The geometric mean of its held-out errors is at most that of `rule`.

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [0.2], [1.0]]), std=0.2)
        >>> start = ss.VelocityAB(2).plan(model.sde, ss.karras(model.sde, 4))
        >>> plan = fit(start, model, (96, 1), dtype=torch.float64, steps=50)
        >>> errors = plan.meta["held_out"]
        >>> plan.nfe, errors["after"]["mean_log"] < 0.2 * errors["before"]["mean_log"]
        (4, True)
    """
    check.conditions(cond, fit)
    _check_denoiser(model)
    check.choice("grad", grad, ("full", "checkpoint"))
    check.integer("steps", steps, least=1)
    check.number("robust", robust, above=0)
    check.number("forks", forks, least=0, most=1)
    sde = model.sde
    if gaussian is not None:
        check_gaussian("gaussian", gaussian, sde)
    table = _Table(rule, sde, grid, what, gaussian is not None)
    x = _starts(shape_or_x, table, model, gaussian, seed, dtype, device)
    if forks:
        if isinstance(shape_or_x, Tensor) or isinstance(teacher, Tensor) or table.plan.stochastic:
            raise ValueError(
                "`forks` draws initial states for a deterministic plan: give a shape, and no tensor as `teacher`; or "
                "select initial states with ss.fitting.stretch."
            )
        again = (_starts(shape_or_x, table, model, gaussian, seed, dtype, device, k) for k in range(1, _CANDIDATES))
        x = _forked(table, model, [x, *again], forks, gaussian is not None, cond)
    n = len(x) // 3 if held_out is None else check.integer("held_out", held_out, least=1)
    if not 0 < n < len(x):
        raise ValueError(f"`held_out` must be in 1 … {len(x) - 1} for {len(x)} trajectories, got {n}; use more.")
    source = noise if isinstance(noise, Noise) else Noise(seed).fork(_STREAM + 1) if noise is None else Noise(noise)
    _check_teacher(teacher, table, source)
    truth, teacher_name = _truth(teacher, table, model, x, gaussian, source, cond)
    normals = PathNoise(source, table.plan.spans) if source.path and table.plan.stochastic else source
    drawn = [normals.like(x, k) for k in range(table.start.z.shape[1])]
    rows = _Rows(model, x, truth, drawn, gaussian, cond, batch or len(x), grad)
    train, held = range(n, len(x)), range(n)

    before = {"train": rows.errors(table.start, train), "held_out": rows.errors(table.start, held)}
    best, best_held, stale = table.start, before["held_out"], 0
    with _Bar(table.name, steps, progress) as bar:
        spent = 0
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
            bar.update(spent, train=_mean_log(scale), held=_mean_log(error))
            if not math.isfinite(_mean_log(scale)):
                break
    after = {"train": rows.errors(best, train), "held_out": best_held}
    meta = {
        "scoresde": importlib.metadata.version("scoresde"),
        "from": table.name,
        "sde": repr(sde),
        "teacher": teacher_name,
        "what": list(table.what),
        "gaussian start": gaussian is not None,
        "iterations": spent,
        "robust": robust,
        "forks": forks,
        "seed": seed,
        "trajectories": {"train": len(train), "held_out": len(held)},
        "levels": [float(t) for t in table.levels_of(best)],
        **{k: {"before": _summary(before[k]), "after": _summary(after[k])} for k in ("train", "held_out")},
    }
    if best is table.start:
        return replace(table.plan, meta=meta)
    on_path = "asked" not in table.what
    return best.plan(table.plan, on_path=on_path, name=f"{table.plan.name}, fitted", order=None, meta=meta)


def stretch(
    model: AbstractDenoiser, x: Tensor, plan: Plan, *, size: float = 0.02, seed: int = 0, **cond: Any
) -> Tensor:
    r"""Expansion of the flow around each initial state, (B,).

    .. math:: \frac{|F(x + \delta) - F(x - \delta)|}{2\,|\delta|}

    in one random direction, where F is the result of a plan. If the data has basins, it is large for the few samples
    between two of them, which no short plan solves accurately and which dominate the root mean square error.

    Arguments:
        model: Denoiser.
        x: Initial states of the plan, (B, *event).
        plan: Deterministic plan of some thirty evaluations.
        size: Root mean square of δ, relative to that of all initial states.
        seed: Seed of the directions.
        **cond: Conditions of the network.
    """
    _check_denoiser(model)
    if plan.stochastic:
        raise ValueError("`plan` must be deterministic, but it draws noise; use a deterministic solver such as DDIM.")
    delta = Noise(seed).fork(_STREAM + 2).like(check.state("x", x), 0)
    delta = check.number("size", size, above=0) * x.square().mean().sqrt() * delta
    with torch.no_grad():
        up, down = (run(plan, lambda y, t: model.x0(y, t, **cond), x + side * delta) for side in (1, -1))
    ratio: Tensor = (up - down).flatten(1).norm(dim=1) / (2 * delta).flatten(1).norm(dim=1)
    return ratio


def _forked(
    table: _Table, model: AbstractDenoiser, candidates: list[Tensor], share: float, whole: bool, cond: dict[str, Any]
) -> Tensor:
    """Initial states; in a fraction `share` of the rows, the candidate with the largest :func:`stretch`."""
    x, sde = candidates[0].clone(), model.sde
    start, end = sde.T if whole else float(table.start.start), float(table.start.t[-1])
    pilot = default_solver(_PILOT, model).plan(sde, quadratic_vp(sde, _PILOT, t_start=start, t_end=end))
    places = [i for i in range(len(x)) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)]
    rows = tree_map(lambda c: c[places] if _of_each(c, len(x)) else c, cond)
    expansion = torch.stack([stretch(model, c[places], pilot, **rows) for c in candidates])
    for i, k in zip(places, expansion.argmax(0).tolist(), strict=True):
        x[i] = candidates[k][i]
    return x


def _of_each(c: Any, size: int) -> bool:
    """Whether a condition has a row for each trajectory."""
    return isinstance(c, Tensor) and c.ndim > 0 and len(c) == size


def _mean_log(errors: Tensor) -> float:
    """Geometric mean; infinite if an error is not finite."""
    return float(errors.clamp_min(1e-30).log().mean().exp()) if bool(errors.isfinite().all()) else math.inf


def _summary(errors: Tensor) -> dict[str, float]:
    q = errors.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=errors.dtype)).tolist()
    rmse = float(errors.square().mean().sqrt())
    return {"mean_log": _mean_log(errors), "median": q[0], "rmse": rmse, "q90": q[1], "q99": q[2]}


def _descend(table: _Table, rows: _Rows, which: range, delta: float, steps: int) -> int:
    """Run a round of L-BFGS; return its number of iterations."""
    optimiser = torch.optim.LBFGS(
        table.knobs, max_iter=steps, history_size=40, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure() -> float:
        total = 0.0
        gradients = [torch.zeros_like(k) for k in table.knobs]
        for part in rows.parts(which):
            with torch.enable_grad():
                e = rows.error(table.now(), part)
                loss = 0.5 * (e**2 + delta**2).log().sum() / len(which)
                parts = torch.autograd.grad(loss, table.knobs, allow_unused=True)
            total += float(loss.detach())
            for g, p in zip(gradients, parts, strict=True):
                g += 0 if p is None else p
        good = math.isfinite(total) and all(bool(g.isfinite().all()) for g in gradients)
        for k, g in zip(table.knobs, gradients, strict=True):
            k.grad = g if good else torch.zeros_like(g)
        return total if good else 1e6

    saved = [k.detach().clone() for k in table.knobs]
    optimiser.step(closure)
    if not all(bool(k.isfinite().all()) for k in table.knobs):
        with torch.no_grad():
            for k, value in zip(table.knobs, saved, strict=True):
                k.copy_(value)
    state: dict[str, Any] = next(iter(optimiser.state.values()), {})
    return max(1, int(state.get("n_iter", 1)))


@dataclass
class _Rows:
    """Trajectories: initial states, results of the teacher, conditions; and the errors of a table on them."""

    model: AbstractDenoiser
    x: Tensor
    truth: Tensor
    drawn: list[Tensor]
    gaussian: Gaussian | None
    cond: dict[str, Any]
    batch: int
    grad: str

    def parts(self, which: range) -> Iterator[slice]:
        """Slices of at most `batch` rows."""
        for a in range(which.start, which.stop, self.batch):
            yield slice(a, min(a + self.batch, which.stop))

    def errors(self, table: Unrolled, which: range) -> Tensor:
        """Error of each sample, (B,), float64 on the CPU."""
        with torch.no_grad():
            return torch.cat([self.error(table, part) for part in self.parts(which)])

    def error(self, table: Unrolled, part: slice) -> Tensor:
        """Distance from the teacher, root mean square over the entries of a state."""
        gap = self.run(table, part).double() - self.truth[part]
        return (gap.flatten(1).square().mean(1) + 1e-36).sqrt().to("cpu")

    def run(self, table: Unrolled, part: slice) -> Tensor:
        cond = tree_map(lambda c: c[part] if _of_each(c, len(self.x)) else c, self.cond)
        x, sde = self.x[part], self.model.sde
        if self.gaussian is not None:
            x = self.gaussian.flow(x, sde.T, table.start)

        def predict(y: Tensor, t: Any) -> Tensor:
            return self.model.x0(y, t, **cond)

        denoised: list[Tensor] = []
        drawn = [z[part] for z in self.drawn]
        for r in range(table.nfe):
            y = table.state(r, x, denoised, drawn)
            t = table.t[r]
            if isinstance(t, Tensor) and not t.requires_grad:
                t = float(t)
            grads = self.grad == "checkpoint" and torch.is_grad_enabled()
            denoised.append(checkpoint(predict, y, t, use_reentrant=False) if grads else predict(y, t))
        return table.state(table.nfe, x, denoised, drawn)


@dataclass(frozen=True)
class _TimedTable(Unrolled):
    """A table whose evaluation times may differ from the times of its states.

    Arguments:
        levels: Times of the states, (n + 1,).
    """

    levels: Tensor


class _Table:
    """A plan as a function of its trainable tensors, the knobs."""

    def __init__(self, rule: Plan | Solver, sde: SDE, grid: Any, what: Sequence[str] | None, starts_free: bool) -> None:
        self.sde = sde
        self.rule: Solver | None = None
        if isinstance(rule, Plan):
            if grid is not None:
                raise ValueError("`rule` is a plan, which has its own grid; drop `grid`.")
            self.plan = rule
        elif isinstance(rule, Solver):
            if grid is None or callable(grid):
                raise ValueError("`grid` must be given as times if `rule` is a solver, as in grid=ss.karras(sde, 5).")
            self.rule, grid = rule, check_grid(sde, grid)
            self.plan = rule.plan(sde, grid)
        else:
            raise TypeError(f"`rule` must be a Plan or a solver such as UniPC(), got {type(rule).__name__}.")
        self.name = self.plan.name or "plan"
        self.start = unroll(self.plan)
        if self.start.nfe == 0:
            raise ValueError("`rule` must evaluate the network at least once: there is nothing to fit.")
        times = [float(self.start.start), *(float(t) for t in self.start.t[1:])]
        known = self.plan.meta.get("levels", ())
        if len(known) == len(times):  # the plan was fitted before
            times = [*known]
        self.what = self._parts(what)
        for word in self.what:
            check.choice("what", word, WHAT)
        moved = grid.tolist() if self.rule is not None else times
        lam = sde.lam(torch.tensor(times[:-1], dtype=torch.float64))
        # evaluate at no larger λ than in training, unless the plan does
        self.max_lam = max(sde.lam(sde.t_min), float(lam.max()))
        self.levels = _Levels(sde, moved, "times" in self.what, starts_free, self.max_lam)
        if "times" in self.what and self.plan.stochastic:
            raise ValueError("`what` must not hold 'times' for a stochastic plan: its noise depends on its times.")
        n = self.start.nfe
        self.base = torch.tensor(times, dtype=torch.float64)
        gaps = sde.lam(torch.tensor([float(t) for t in self.start.t[:-1]], dtype=torch.float64)) - lam
        self.shifts = torch.where(gaps.isfinite(), gaps, 0.0)
        self.weights = torch.zeros(n + 1, n, dtype=torch.float64)
        self.mask = torch.ones(n + 1, n, dtype=torch.float64).tril(-1)
        self.knobs = list(self.levels.knobs)
        self.knobs += [self.shifts] if "asked" in self.what else []
        self.knobs += [self.weights] if "weights" in self.what and n > 1 else []
        if not self.knobs:
            raise ValueError(f"`what`={list(self.what)} leaves nothing to fit; evaluations of the plan: {n}.")
        for knob in self.knobs:
            knob.requires_grad_(True)

    def _parts(self, what: Sequence[str] | None) -> tuple[str, ...]:
        if what is not None:
            return tuple(what)
        return WHAT[1:] if self.plan.stochastic else WHAT

    def now(self, *, detach: bool = False) -> Unrolled:
        """The table at the current knobs."""
        if detach:
            with torch.no_grad():
                return self._now()
        return self._now()

    def levels_of(self, table: Unrolled) -> Any:
        """Times of the states of a table."""
        return table.levels if isinstance(table, _TimedTable) else table.t

    def _now(self) -> Unrolled:
        times = self.levels()
        if self.rule is not None and "times" in self.what:
            u = unroll(self.rule.plan(self.sde, times))
            levels = torch.stack([torch.as_tensor(t, dtype=torch.float64) for t in u.t])
            x, d = u.x, u.d
        elif "times" in self.what:
            levels, x, d = times, *self._moved(times)
        else:
            levels, x, d = self.base, self.start.x, self.start.d
        size = self.sde.alpha(levels) - x * self.sde.alpha(levels[:1])
        w = self.weights * self.mask
        w = (w - w.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True).clamp_min(1)) * self.mask
        first = levels[0] if levels.requires_grad else float(levels[0])
        return _TimedTable(
            self._network_times(levels), x, d + size[:, None] * w, self.start.z, self.start.one, first, levels
        )

    def _moved(self, times: Tensor) -> tuple[Tensor, Tensor]:
        """Initial weights rescaled to other times, so that each row stays exact on one-point data."""
        (a, s), (a0, s0) = ((self.sde.alpha(t), self.sde.sigma(t)) for t in (times, self.base))
        shrink = torch.where(s0 > 0, s / torch.where(s0 > 0, s0, 1.0), 1.0)
        x = self.start.x * shrink * (s0[0] / s[0])
        old, new = a0 - s0 / s0[0] * a0[0], a - s / s[0] * a[0]
        return x, self.start.d * torch.where(old != 0, new / torch.where(old != 0, old, 1.0), 1.0)[:, None]

    def _network_times(self, levels: Tensor) -> tuple[Any, ...]:
        if "asked" not in self.what and not bool(self.shifts.any()):
            return tuple(levels)
        lam = self.sde.lam(levels[:-1])
        moves = lam.detach().isfinite()
        shifted = torch.where(moves, lam, 0.0) + self.shifts
        t = self.sde._t_of_lam(shifted.clamp(self.sde.lam(self.sde.T), self.max_lam)).clamp(0.0, self.sde.T)
        return (*torch.where(moves, t, levels[:-1]), levels[-1])


class _Levels:
    """Times that decrease for any values of their knobs, the first λ and the logarithms of gaps in λ."""

    def __init__(self, sde: SDE, times: Sequence[float], free: bool, first: bool, max_lam: float) -> None:
        self.sde = sde
        self.times = torch.tensor(times, dtype=torch.float64)
        self.knobs: list[Tensor] = []
        if not free:
            return
        if not bool((self.times.diff() < 0).all()):
            raise ValueError(
                "`what` must not hold 'times' for a plan whose times do not all decrease, such as one with stages at "
                "the time of the next node; give a solver and its `grid` instead, or drop 'times'."
            )
        lam = sde.lam(self.times)
        self.no_signal = not bool(lam[0].isfinite())
        if self.no_signal and first:
            raise ValueError("`gaussian` needs a plan whose first time has α > 0, as with t_start=0.9 * sde.T.")
        inner = lam[int(self.no_signal) :]
        if not bool(inner[-1].isfinite()):  # the last time has σ = 0: stay within the times of training
            room = (inner[-2] - inner[0]) / max(1, len(inner) - 2)
            inner = torch.cat([inner[:-1], torch.maximum(inner.new_tensor(max_lam), inner[-2] + 0.05 * room)[None]])
        self.low, self.end = sde.lam(sde.T), float(inner[-1])
        self.head, self.gaps = inner[:1].clone(), inner.diff().log()
        if first or self.no_signal:
            self.knobs.append(self.head)
        self.knobs += [self.gaps] if len(self.gaps) > 1 else []

    def __call__(self) -> Tensor:
        if not self.knobs:
            return self.times
        head = self.head.clamp(max(self.low, self.end - 40.0), self.end - 1.0)
        share = self.gaps.softmax(0) + 1e-4  # no two times coincide
        lam = torch.cat([head, head + (self.end - head) * (share / share.sum()).cumsum(0)[:-1]])
        t = self.sde._t_of_lam(lam).clamp(0.0, self.sde.T)
        fixed = self.no_signal or not self.head.requires_grad
        return (
            torch.cat([self.times[:1], t if self.no_signal else t[1:], self.times[-1:]])
            if fixed
            else torch.cat([t, self.times[-1:]])
        )


def _starts(
    shape_or_x: Any,
    table: _Table,
    model: AbstractDenoiser,
    gaussian: Gaussian | None,
    seed: int,
    dtype: Any,
    device: Any,
    draw: int = 0,
) -> Tensor:
    if isinstance(shape_or_x, Tensor):
        return check.state("x", shape_or_x).detach()
    shape = tuple(check.integer("shape", k) for k in shape_or_x)
    noise = Noise(seed).fork(_STREAM)
    noise = noise.fork(draw) if draw else noise
    where = device if device is not None else next((p.device for p in model.parameters()), torch.device("cpu"))
    if gaussian is not None:
        return gaussian.carry(noise.normal(shape, 0, dtype=dtype, device=where), model.sde.T)
    prior = model.sde.prior(float(table.start.start))
    return prior.sample(shape, noise, dtype=dtype, device=where)


def _check_teacher(teacher: Plan | Tensor | None, table: _Table, noise: Noise) -> None:
    """Reject a plan or teacher of another process, and normals that the plan does not draw."""
    of = repr(table.sde)
    for name, plan in (("rule", table.plan), ("teacher", teacher)):
        if isinstance(plan, Plan) and plan.sde and plan.sde != of:
            raise ValueError(f"`{name}` was written for {plan.sde} and not for the model's {of}; make a new plan.")
    if not isinstance(teacher, Plan) or not teacher.stochastic:
        return
    if not table.plan.stochastic:
        raise ValueError("`teacher` draws noise that the plan does not, so a fit would be its mean; use one without.")
    if not noise.path and teacher.draws != table.plan.draws:
        raise ValueError(
            f"`teacher` draws {teacher.draws} normals and the plan {table.plan.draws}, which are unrelated; "
            f"give noise=Noise(seed, path=True), so that both use the same Brownian paths."
        )


def _truth(
    teacher: Plan | Tensor | None,
    table: _Table,
    model: AbstractDenoiser,
    x: Tensor,
    gaussian: Gaussian | None,
    noise: Noise,
    cond: dict[str, Any],
) -> tuple[Tensor, str]:
    if isinstance(teacher, Tensor):
        return check.match("teacher", teacher, "x", x).detach().double(), "given"
    sde, start, end = model.sde, float(table.start.start), float(table.start.t[-1])
    if teacher is None:
        if table.plan.stochastic:
            raise ValueError("`teacher` must be given for a stochastic plan: a fine plan that draws the same normals.")
        times = quadratic_vp(sde, 200, t_start=sde.T if gaussian is not None else start, t_end=end)
        teacher = default_solver(200, model).plan(sde, times)
    if float(teacher.rows[-1].t) != end:
        raise ValueError(f"`teacher` must end where the plan ends, at {end:g}, got {float(teacher.rows[-1].t):g}.")
    with torch.no_grad():
        out = run(teacher, lambda y, t: model.x0(y, t, **cond), x, noise if teacher.stochastic else None)
    if not bool(out.isfinite().all()):
        raise ValueError(
            "the results of `teacher` are not all finite; Denoiser(..., check_finite=True) names the time."
        )
    return out.double(), f"{teacher.name}, {teacher.nfe} evaluations"


class _Bar:
    """A progress bar over iterations, if it is enabled."""

    def __init__(self, name: str, steps: int, progress: bool | str) -> None:
        self._bar: Any = None
        if not isinstance(progress, bool):
            check.choice("progress", progress, ("always",))
        if progress:
            from tqdm import tqdm

            self._bar = tqdm(total=steps, desc=f"fit {name}", disable=False if progress == "always" else None)

    def __enter__(self) -> _Bar:
        return self

    def update(self, spent: int, **errors: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix({k: f"{v:.2e}" for k, v in errors.items()}, refresh=False)
            self._bar.update(spent - self._bar.n)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


__all__ = ["fit", "stretch"]
