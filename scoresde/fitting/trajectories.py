"""The trajectories of a fit: their initial states, their teacher and their errors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.gaussian import Gaussian
from scoresde.fitting.table import Table
from scoresde.grids.spacings import quadratic_vp
from scoresde.noise.keyed import Noise
from scoresde.plan.matrices import Unrolled
from scoresde.plan.run import run
from scoresde.plan.table import Plan
from scoresde.sampling.solve import default_solver

_STREAM = 0x666974

CANDIDATES = 10  # candidates for each initial state near a fork

_PILOT = 30  # evaluations of the plan that locates the forks


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
    check_model(model)
    if plan.stochastic:
        raise ValueError("`plan` must be deterministic, but it draws noise; use a deterministic solver such as DDIM.")
    delta = Noise(seed).fork(_STREAM + 2).like(check.state("x", x), 0)
    delta = check.number("size", size, above=0) * x.square().mean().sqrt() * delta
    with torch.no_grad():
        up, down = (run(plan, lambda y, t: model.x0(y, t, **cond), x + side * delta) for side in (1, -1))
    ratio: Tensor = (up - down).flatten(1).norm(dim=1) / (2 * delta).flatten(1).norm(dim=1)
    return ratio


def forked(
    table: Table, model: AbstractDenoiser, candidates: list[Tensor], share: float, whole: bool, cond: dict[str, Any]
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


@dataclass
class Trajectories:
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


def draw_starts(
    shape_or_x: Any,
    table: Table,
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


def check_teacher(teacher: Plan | Tensor | None, table: Table, noise: Noise) -> None:
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


def teacher_ends(
    teacher: Plan | Tensor | None,
    table: Table,
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
