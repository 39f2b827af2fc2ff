"""The trajectories of a fit: their initial states, their teacher and their errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.start import Start
from scoresde.fitting.table import Table
from scoresde.grids.spacings import quadratic_vp
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.matrices import Unrolled
from scoresde.plan.run import run
from scoresde.plan.table import Plan
from scoresde.sampling.defaults import default_solver

CANDIDATES = 10  # candidates for each initial state near a fork

_PILOT = 30  # evaluations of the plan that locates the forks


@checked
def expansion(model: AbstractDenoiser, x: Tensor, plan: Plan, *, size: float = 0.02, seed: int = 0) -> Tensor:
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
    """
    check_model(model)
    if plan.stochastic:
        raise ValueError("`plan` must be deterministic, but it draws noise; use a deterministic solver such as DDIM.")
    delta = Noise(seed).fork(Stream.FITTED_SHIFTS).like(check.state("x", x), 0)
    delta = check.number("size", size, above=0) * x.square().mean().sqrt() * delta
    with torch.no_grad():
        up, down = (run(plan, model.x0, x + side * delta) for side in (1, -1))
    check.warn_unless_finite(torch.stack([up, down], 1), "the results of `plan`")
    ratio: Tensor = (up - down).flatten(1).norm(dim=1) / (2 * delta).flatten(1).norm(dim=1)
    return ratio


def forked(table: Table, model: AbstractDenoiser, candidates: list[Tensor], share: float, whole: bool) -> Tensor:
    """Initial states; in a fraction `share` of the rows, the candidate with the largest :func:`expansion`."""
    x, sde = candidates[0].clone(), model.sde
    start, end = sde.T if whole else float(table.start.start), float(table.start.t[-1])
    pilot = default_solver(_PILOT, model).plan(sde, quadratic_vp(sde, _PILOT, t_start=start, t_end=end))
    places = [i for i in range(len(x)) if int((i + 1) * share + 1e-9) > int(i * share + 1e-9)]
    some = model.rows(torch.tensor(places))
    pulled = torch.stack([expansion(some, c[places], pilot) for c in candidates])
    for i, k in zip(places, pulled.argmax(0).tolist(), strict=True):
        x[i] = candidates[k][i]
    return x


@dataclass
class Trajectories:
    """Trajectories: initial states, results of the teacher, normals; and the errors of a table on them."""

    model: AbstractDenoiser
    x: Tensor
    truth: Tensor
    normals: list[Tensor]
    gaussian: Gaussian | None
    batch: int | None
    grad: str

    def parts(self, which: range) -> Iterator[slice]:
        """Slices of at most `batch` rows."""
        size = self.batch or max(1, len(which))
        for a in range(which.start, which.stop, size):
            yield slice(a, min(a + size, which.stop))

    def errors(self, table: Unrolled, which: range) -> Tensor:
        """Error of each sample, (B,), float64 on the CPU."""
        with torch.no_grad():
            return torch.cat([self.error(table, part) for part in self.parts(which)])

    def far(self, errors: Tensor) -> int:
        """Number of errors above half the standard deviation of the teacher's results, per entry."""
        spread = (self.truth - self.truth.mean(0)).square().mean().sqrt()
        return int((errors > 0.5 * float(spread)).sum())

    def error(self, table: Unrolled, part: slice) -> Tensor:
        """Distance from the teacher, root mean square over the entries of a state."""
        gap = self.run(table, part).double() - self.truth[part]
        return (gap.flatten(1).square().mean(1) + 1e-36).sqrt().to("cpu")

    def run(self, table: Unrolled, part: slice) -> Tensor:
        model = self.model.rows(torch.arange(part.start, part.stop))
        x, sde = self.x[part], self.model.sde
        if self.gaussian is not None:
            x = self.gaussian.flow(x, sde.T, table.start)

        denoised: list[Tensor] = []
        normals = [z[part] for z in self.normals]
        for r in range(table.nfe):
            y = table.state(r, x, denoised, normals)
            t = table.t[r]
            if isinstance(t, Tensor) and not t.requires_grad:
                t = float(t)
            grads = self.grad == "checkpoint" and torch.is_grad_enabled()
            denoised.append(checkpoint(model.x0, y, t, use_reentrant=False) if grads else model.x0(y, t))
        return table.state(table.nfe, x, denoised, normals)


def draw_starts(
    shape_or_x: Sequence[int] | Tensor, table: Table, model: AbstractDenoiser, start: Start, noise: Noise, draw: int = 0
) -> Tensor:
    """Initial states, (B, *event): at T with a Gaussian start, otherwise at the first time of the table."""
    if isinstance(shape_or_x, Tensor):
        return check.state("x", shape_or_x).detach()
    noise = noise.fork(Stream.FITTED)
    noise = noise.fork(draw) if draw else noise
    first = float(table.start.start) if start.gaussian is None else model.sde.T
    return start.draw(model, shape_or_x, first, noise)


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
            f"give seed=Noise(seed, path=True), so that both use the same Brownian paths."
        )


def teacher_ends(
    teacher: Plan | Tensor | None,
    table: Table,
    model: AbstractDenoiser,
    x: Tensor,
    gaussian: Gaussian | None,
    noise: Noise,
) -> tuple[Tensor, str]:
    """Results of the teacher in float64, and its name."""
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
        out = run(teacher, model.x0, x, noise if teacher.stochastic else None)
    finite = check.Finite("the results of `teacher`")
    finite.add(out)
    finite.require()
    return out.double(), f"{teacher.name}, {teacher.nfe} evaluations"
