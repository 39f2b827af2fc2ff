"""Guidance: denoisers made from denoisers, whose data prediction is moved towards a condition."""

from scoresde.guidance.classifier import ClassifierGuidance
from scoresde.guidance.classifier_free import AutoGuidance, ClassifierFree, Compose
from scoresde.guidance.rules import APG, Momentum, Rescale, Rule, ZeroStar, linear, plus_plus
from scoresde.guidance.scale import Scale
from scoresde.guidance.thresholds import Clamp, DynamicThreshold

__all__ = [
    "APG",
    "AutoGuidance",
    "Clamp",
    "ClassifierFree",
    "ClassifierGuidance",
    "Compose",
    "DynamicThreshold",
    "Momentum",
    "Rescale",
    "Rule",
    "Scale",
    "ZeroStar",
    "linear",
    "plus_plus",
]
