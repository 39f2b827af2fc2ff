r"""Distances between two sets of samples, and their noise floors.

Every metric takes samples `x` of shape (N, *event) and `y` of shape (M, *event), flattens the events and returns a
number. Two finite sets from one distribution also have a nonzero distance, so it must be compared with its noise floor.
:func:`compare` measures the floor with random labels of the pooled samples; :func:`moments` returns standard errors.
A test can then state that samples are indistinguishable from exact samples,

.. math:: d(x, y) \le q_{95}\{ d(x', y') : (x', y') \text{ a random split of } x \cup y \}.

Sums are taken in float64 on the CPU and in the dtype of the samples elsewhere. The results depend only on the samples
and on `seed`; torch's global generator is not used.
"""

from scoresde.metrics.calibration import ranks
from scoresde.metrics.classifier import c2st
from scoresde.metrics.comparison import Comparison, compare
from scoresde.metrics.distances import energy_distance, mmd_rbf, sliced_w2, w2_1d
from scoresde.metrics.features import PrecisionRecall, frechet, kid, precision_recall
from scoresde.metrics.images import psnr, ssim
from scoresde.metrics.sample_moments import Moments, moments

__all__ = [
    "Comparison",
    "Moments",
    "PrecisionRecall",
    "c2st",
    "compare",
    "energy_distance",
    "frechet",
    "kid",
    "mmd_rbf",
    "moments",
    "precision_recall",
    "psnr",
    "ranks",
    "sliced_w2",
    "ssim",
    "w2_1d",
]
