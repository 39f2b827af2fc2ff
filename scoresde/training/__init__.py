"""Training: losses, weightings, densities of times, EMA, checkpoints, and a trainer that survives."""

from scoresde.training import times, weightings
from scoresde.training.draws import Draws, drop_condition
from scoresde.training.losses import DSM, HybridVLB, LossByNoise, Terms, sliced_score_matching

__all__ = [
    "DSM",
    "Draws",
    "HybridVLB",
    "LossByNoise",
    "Terms",
    "drop_condition",
    "sliced_score_matching",
    "times",
    "weightings",
]
