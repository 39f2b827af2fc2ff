"""Training: losses, weightings, distributions of times, EMA, checkpoints, and a trainer with hooks."""

from scoresde.training import checkpoint, times, weightings
from scoresde.training.checkpoint import Checkpoints
from scoresde.training.data_order import Loader
from scoresde.training.draws import Draws, drop_condition
from scoresde.training.ema import EMA, PowerEMA, Snapshot, reconstruct, swapped
from scoresde.training.hooks import Hook, Preview, ProgressBar, Record
from scoresde.training.loggers import TensorBoard, WandB
from scoresde.training.losses import DSM, HybridVLB, LossByNoise, Terms, sliced_score_matching
from scoresde.training.trainer import Trainer
from scoresde.training.update import Update
from scoresde.training.validation import Validation

__all__ = [
    "DSM",
    "EMA",
    "Checkpoints",
    "Draws",
    "Hook",
    "HybridVLB",
    "Loader",
    "LossByNoise",
    "PowerEMA",
    "Preview",
    "ProgressBar",
    "Record",
    "Snapshot",
    "TensorBoard",
    "Terms",
    "Trainer",
    "Update",
    "Validation",
    "WandB",
    "checkpoint",
    "drop_condition",
    "reconstruct",
    "sliced_score_matching",
    "swapped",
    "times",
    "weightings",
]
