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
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.gaussian import Gaussian, check_gaussian
from scoresde.fitting.table import Table
from scoresde.fitting.trajectories import (
    _STREAM,
    CANDIDATES,
    Trajectories,
    check_teacher,
    draw_starts,
    forked,
    teacher_ends,
)
from scoresde.noise.brownian import PathNoise
from scoresde.noise.keyed import Noise
from scoresde.plan.table import Plan
from scoresde.solvers.rule import Solver

_ROUND = 25  # iterations between two evaluations of the held-out errors

_PATIENCE = 3  # rounds without improvement before the fit stops


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
        >>> start = ss.VelocityAB(2).plan(model.sde, ss.grids.karras(model.sde, 4))
        >>> plan = fit(start, model, (96, 1), dtype=torch.float64, steps=50)
        >>> errors = plan.meta["held_out"]
        >>> plan.nfe, errors["after"]["mean_log"] < 0.2 * errors["before"]["mean_log"]
        (4, True)
    """
    check.conditions(cond, fit)
    check_model(model)
    check.choice("grad", grad, ("full", "checkpoint"))
    check.integer("steps", steps, at_least=1)
    check.number("robust", robust, above=0)
    check.number("forks", forks, at_least=0, at_most=1)
    sde = model.sde
    if gaussian is not None:
        check_gaussian("gaussian", gaussian, sde)
    table = Table(rule, sde, grid, what, gaussian is not None)
    x = draw_starts(shape_or_x, table, model, gaussian, seed, dtype, device)
    if forks:
        if isinstance(shape_or_x, Tensor) or isinstance(teacher, Tensor) or table.plan.stochastic:
            raise ValueError(
                "`forks` draws initial states for a deterministic plan: give a shape, and no tensor as `teacher`; or "
                "select initial states with ss.fitting.stretch."
            )
        again = (draw_starts(shape_or_x, table, model, gaussian, seed, dtype, device, k) for k in range(1, CANDIDATES))
        x = forked(table, model, [x, *again], forks, gaussian is not None, cond)
    n = len(x) // 3 if held_out is None else check.integer("held_out", held_out, at_least=1)
    if not 0 < n < len(x):
        raise ValueError(f"`held_out` must be in 1 … {len(x) - 1} for {len(x)} trajectories, got {n}; use more.")
    source = noise if isinstance(noise, Noise) else Noise(seed).fork(_STREAM + 1) if noise is None else Noise(noise)
    check_teacher(teacher, table, source)
    truth, teacher_name = teacher_ends(teacher, table, model, x, gaussian, source, cond)
    normals = PathNoise(source, table.plan.spans) if source.path and table.plan.stochastic else source
    drawn = [normals.like(x, k) for k in range(table.start.z.shape[1])]
    rows = Trajectories(model, x, truth, drawn, gaussian, cond, batch or len(x), grad)
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


def _mean_log(errors: Tensor) -> float:
    """Geometric mean; infinite if an error is not finite."""
    return float(errors.clamp_min(1e-30).log().mean().exp()) if bool(errors.isfinite().all()) else math.inf


def _summary(errors: Tensor) -> dict[str, float]:
    q = errors.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=errors.dtype)).tolist()
    rmse = float(errors.square().mean().sqrt())
    return {"mean_log": _mean_log(errors), "median": q[0], "rmse": rmse, "q90": q[1], "q99": q[2]}


def _descend(table: Table, rows: Trajectories, which: range, delta: float, steps: int) -> int:
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
