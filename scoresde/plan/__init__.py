"""A sampler as one table of numbers: rows, the table, the loop that runs it, and its matrices."""

from scoresde.plan.matrices import Unrolled, unroll
from scoresde.plan.rows import Row
from scoresde.plan.run import Step, Update, run, steps, updates
from scoresde.plan.table import Plan

__all__ = [
    "Plan",
    "Row",
    "Step",
    "Unrolled",
    "Update",
    "run",
    "steps",
    "unroll",
    "updates",
]
