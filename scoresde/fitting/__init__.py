"""Plans and grids fitted to a model."""

from scoresde.fitting.fit import fit
from scoresde.fitting.grids import align_your_steps, equal_error, gaussian_grid, gits
from scoresde.fitting.trajectories import stretch

__all__ = [
    "align_your_steps",
    "equal_error",
    "fit",
    "gaussian_grid",
    "gits",
    "stretch",
]
