r"""Guidance: denoisers that change or combine the predictions of other denoisers.

The guided score is :math:`\nabla\log p(x) + s\,(\nabla\log p(x \mid c) - \nabla\log p(x))`. The score is an affine
function of the data prediction, so the guided data prediction has the same form. Every class here defines ``x0`` and
therefore works with every solver, plan and backend.
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
