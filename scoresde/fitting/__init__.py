"""Plans and grids fitted to a model."""

from scoresde.fitting.fit import Descent, Split, fit
from scoresde.fitting.grids import align_your_steps, equal_error, gaussian_grid, gits
from scoresde.fitting.statistics import estimate_entry_statistics, estimate_statistics
from scoresde.fitting.trajectories import expansion
from scoresde.fitting.without_model import fit_to_data

__all__ = [
    "Descent",
    "Split",
    "align_your_steps",
    "equal_error",
    "estimate_entry_statistics",
    "estimate_statistics",
    "expansion",
    "fit",
    "fit_to_data",
    "gaussian_grid",
    "gits",
]
