"""Grids: the times that a solver steps through, as float64 tensors."""

from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import NoReturn as _NoReturn

from scoresde._names import hint as _hint
from scoresde._names import meant_grid as _meant_grid
from scoresde.grids.foreign import from_scheduler, from_sigmas
from scoresde.grids.grid import check_grid, window
from scoresde.grids.published import NoiseLevels, published
from scoresde.grids.spacings import (
    beta_quantile,
    cosine,
    exponential,
    flow_time,
    index_grid,
    karras,
    log_noise,
    polyexponential,
    power_t,
    quadratic_vp,
    shifted,
    uniform_lam,
    uniform_t,
)
from scoresde.grids.zigzags import ancestral, churn, renoised, repaint, restart, zigzag

__all__ = [
    "NoiseLevels",
    "ancestral",
    "beta_quantile",
    "check_grid",
    "churn",
    "cosine",
    "exponential",
    "flow_time",
    "from_scheduler",
    "from_sigmas",
    "index_grid",
    "karras",
    "log_noise",
    "polyexponential",
    "power_t",
    "published",
    "quadratic_vp",
    "renoised",
    "repaint",
    "restart",
    "shifted",
    "uniform_lam",
    "uniform_t",
    "window",
    "zigzag",
]


if not _TYPE_CHECKING:  # a type checker shall see that there is no such attribute

    def __getattr__(name: str) -> _NoReturn:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}{_hint(_meant_grid(name))}", name=name)
