"""A sampler as one table of numbers: rows, the table, the loop that runs it, and its matrices."""

from scoresde.plan.matrices import Unrolled, pull_back, unroll
from scoresde.plan.paused import Paused, begin, resume, tell
from scoresde.plan.rows import Row
from scoresde.plan.run import Pause, Step, Update, pauses, run, steps, updates
from scoresde.plan.table import Plan

__all__ = [
    "Pause",
    "Paused",
    "Plan",
    "Row",
    "Step",
    "Unrolled",
    "Update",
    "begin",
    "pauses",
    "pull_back",
    "resume",
    "run",
    "steps",
    "tell",
    "unroll",
    "updates",
]
