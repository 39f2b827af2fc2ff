"""Options of the update of the weights in each step of the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from scoresde import _checks as check
from scoresde.training.describe import describe


@dataclass(frozen=True)
class Update:
    """Update of the weights: the learning rate over time, and how the gradient is computed, clipped and checked.

    Arguments:
        warmup: Number of steps over which the learning rate rises linearly to its value.
        schedule: Function of the step that returns a factor of the learning rate, finite and at least 0. It may depend
            on nothing else, so that a resumed run has the same rates.
        clip: Largest norm of the gradient; None for no limit.
        accumulate: Number of parts of a process's rows, which are evaluated one after another to save memory.
        nonfinite: Action if the gradient is not finite: ``"raise"`` an error, or ``"skip"`` the step and count it. The
            history then has the means over the other steps; an interval without any has no row.

    Example:
        >>> update = Update(warmup=4, schedule=lambda step: 0.5 if step >= 100 else 1.0)
        >>> [update.factor(step) for step in (0, 1, 3, 50, 100)]
        [0.25, 0.5, 1.0, 1.0, 0.5]
    """

    warmup: int = 0
    schedule: Callable[[int], float] | None = None
    clip: float | None = 1.0
    accumulate: int = 1
    nonfinite: str = "raise"

    def __post_init__(self) -> None:
        check.integer("warmup", self.warmup)
        if not (self.schedule is None or callable(self.schedule)):
            raise TypeError(f"`schedule` must be a function of the step, got {type(self.schedule).__name__}.")
        if self.clip is not None:
            check.number("clip", self.clip, above=0)
        check.integer("accumulate", self.accumulate, at_least=1)
        check.choice("nonfinite", self.nonfinite, ("raise", "skip"))

    def __repr__(self) -> str:
        schedule = "" if self.schedule is None else f", schedule={describe(self.schedule)}"
        return (
            f"Update(warmup={self.warmup}{schedule}, clip={self.clip}, accumulate={self.accumulate}, "
            f"nonfinite={self.nonfinite!r})"
        )

    def factor(self, step: int) -> float:
        """Factor of the learning rate in the step after `step` steps."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.schedule is None:
            return rise
        value: object = self.schedule(step)
        try:
            factor = float(value)  # type: ignore[arg-type]
        except (TypeError, ValueError) as error:
            raise TypeError(f"`schedule` must return a number, got {value!r} at step {step}.") from error
        if not (math.isfinite(factor) and factor >= 0):
            raise ValueError(
                f"`schedule` must return a factor of the learning rate, finite and at least 0, got {factor:g} at step "
                f"{step}; the weights are unchanged."
            )
        return rise * factor

    @property
    def largest_norm(self) -> float:
        """Norm above which the gradient is scaled down; infinite without a limit."""
        return math.inf if self.clip is None else self.clip
