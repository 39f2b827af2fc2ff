"""Training: losses, weightings, distributions of times, EMA, checkpoints and a trainer."""

from scoresde.training import checkpoint, times, weightings
from scoresde.training.draws import Draws, drop_condition
from scoresde.training.ema import EMA, PowerEMA, Snapshot, reconstruct, swapped
from scoresde.training.losses import DSM, HybridVLB, LossByNoise, Terms, sliced_score_matching
from scoresde.training.trainer import Trainer

__all__ = [
    "DSM",
    "EMA",
    "Draws",
    "HybridVLB",
    "LossByNoise",
    "PowerEMA",
    "Snapshot",
    "Terms",
    "Trainer",
    "checkpoint",
    "drop_condition",
    "reconstruct",
    "sliced_score_matching",
    "swapped",
    "times",
    "weightings",
]
