"""Pictures in one line, with matplotlib: each function draws into the axes that it is given, and returns them."""

from scoresde.plots.comparisons import calibration, loss_by_noise, orders, work_precision
from scoresde.plots.fields import field
from scoresde.plots.plans import plan, response, stability
from scoresde.plots.runs import animate, trajectory
from scoresde.plots.sample_sets import samples
from scoresde.plots.schedules import grid, schedule

__all__ = [
    "animate",
    "calibration",
    "field",
    "grid",
    "loss_by_noise",
    "orders",
    "plan",
    "response",
    "samples",
    "schedule",
    "stability",
    "trajectory",
    "work_precision",
]
