"""The set-up that all posterior samplers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, Counter
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.modes import check_ready
from scoresde.denoisers.start import Start, as_start
from scoresde.grids.grid import check_grid
from scoresde.grids.spacings import quadratic_vp
from scoresde.integrators.method import Problem
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.stacked import Seen, check_measurement
from scoresde.noise.keyed import Noise

Grid = int | Tensor | Sequence[float]
"""A number of steps on the grid of ``grids.quadratic_vp``, or decreasing times."""

Seed = int | Sequence[int] | Noise | None


def make_problem(
    model: AbstractDenoiser,
    measurement: Seen,
    shape_or_x: Sequence[int] | Tensor,
    grid: Grid,
    start: Start | Gaussian | None,
    seed: Seed,
) -> tuple[Problem, Measurement, list[float]]:
    """Check the arguments of a posterior sampler; return its problem, its measurement and the times of its grid.

    Arguments:
        model: Denoiser of the prior; the model of the problem counts its evaluations.
        measurement: Measurement, or a list of several.
        shape_or_x: Shape (B, *event), or a state at the first time.
        grid: Decreasing times, or a number of steps.
        start: Distribution, dtype and device of the initial state.
        seed: Seed of the noise, or a :class:`Noise`.
    """
    sde = check_ready(model).sde
    seen = check_measurement(measurement)
    count = 1 if isinstance(grid, Tensor | Sequence) else check.integer("grid", grid, at_least=1)
    times = check_grid(sde, grid) if isinstance(grid, Tensor | Sequence) else quadratic_vp(sde, count)
    counter = Counter()
    problem = Problem(
        model.counted(counter),
        shape_or_x,
        noise=seed if isinstance(seed, Noise) else Noise(seed),
        start=as_start(start),
        counter=counter,
    )
    return problem, seen, times.tolist()
