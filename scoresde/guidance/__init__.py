r"""Guidance: denoisers made from denoisers.

A score that is tilted towards a condition, :math:`\nabla\log p(x) + s\,(\nabla\log p(x \mid c) - \nabla\log p(x))`,
is one of data predictions with the same weights, because the score is an affine function of the data prediction. So
every rule here answers ``x0`` and works under every solver, plan and backend unchanged. Knows no solver.
"""

from scoresde.guidance.base import Scale
from scoresde.guidance.differences import AutoGuidance, ClassifierFree, Compose, Given
from scoresde.guidance.gradients import ClassifierGuidance
from scoresde.guidance.limits import Clamp, DynamicThreshold
from scoresde.guidance.rules import APG, Momentum, Rescale, Rule, ZeroStar, linear, plus_plus

__all__ = [
    "APG",
    "AutoGuidance",
    "Clamp",
    "ClassifierFree",
    "ClassifierGuidance",
    "Compose",
    "DynamicThreshold",
    "Given",
    "Momentum",
    "Rescale",
    "Rule",
    "Scale",
    "ZeroStar",
    "linear",
    "plus_plus",
]
