r"""Distances between sets of features: of images, the features of a network that classifies them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.metrics.pairs import CHUNK, as_pair

__all__ = ["PrecisionRecall", "frechet", "kid", "precision_recall"]


@checked
def frechet(x: Tensor, y: Tensor) -> float:
    r"""Fréchet distance between the Gaussians of two sets of features; with features of Inception it is the FID.

    .. math::
        d^2 = |m_x - m_y|^2 + \mathrm{tr}\left( C_x + C_y - 2 (C_x^{1/2} C_y C_x^{1/2})^{1/2} \right)

    This is the squared Wasserstein-2 distance of two Gaussians with the sample means m and covariances C. Two finite
    sets from one distribution have a distance of about :math:`c (1/N + 1/M)` with a constant c of the order of D tr C,
    so compare values of equal N and M only, and with the floor, ``compare(frechet, x, y)``.

    Arguments:
        x: Features, (N, *event); the event is flattened to D numbers.
        y: Features, (M, *event).

    References:
        | GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), arXiv:1706.08500

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> round(frechet(x, 3 * x + 5), 9)  # means 0 and 5, standard deviations √2 and 3√2
        33.0
    """
    x, y = as_pair(x, y)
    (mean_x, root_x), (mean_y, root_y) = _gaussian(x), _gaussian(y)
    # The trace of (C_x^½ C_y C_x^½)^½ is the sum of the singular values of R_x R_yᵀ, without the root of a rounding.
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return max(0.0, float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross))


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of samples, and a matrix R such that RᵀR is their covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


@checked
def kid(x: Tensor, y: Tensor) -> float:
    r"""Kernel distance between two sets of features, unbiased; with features of Inception it is the KID.

    .. math::
        d = E\,k(x, x') + E\,k(y, y') - 2 E\,k(x, y), \qquad k(a, b) = \left( a^\top b / D + 1 \right)^3

    No sample is paired with itself, so that the mean is exactly zero under equal distributions, for any N and M, and
    about half of the values are then negative. ``compare(kid, x, y)`` has the floor.

    Arguments:
        x: Features, (N, *event); the event is flattened to D numbers.
        y: Features, (M, *event).

    References:
        | Demystifying MMD GANs (Bińkowski et al., 2018), arXiv:1801.01401

    Example:
        >>> import torch
        >>> kid(torch.tensor([[0.0], [0.0]]), torch.tensor([[1.0], [1.0]]))
        7.0
    """
    x, y = as_pair(x, y, centred=False)
    N, M, D = len(x), len(y), x.shape[1]

    def total(a: Tensor, b: Tensor) -> float:
        """Sum of the kernel over all pairs."""
        rows = max(1, CHUNK // len(b))
        return sum(float((part @ b.T / D + 1).pow(3).sum()) for part in a.split(rows))

    def own(a: Tensor) -> float:
        """Sum of the kernel over the pairs of a sample with itself."""
        return float((a.square().sum(1) / D + 1).pow(3).sum())

    within = (total(x, x) - own(x)) / (N * (N - 1)) + (total(y, y) - own(y)) / (M * (M - 1))
    return within - 2 * total(x, y) / (N * M)


@dataclass(frozen=True)
class PrecisionRecall:
    """How two sets of samples overlap: quality and variety of the samples apart.

    Arguments:
        precision: Share of the samples that lie in the data's neighbourhoods.
        recall: Share of the data that lies in the samples' neighbourhoods.
        density: Mean number of neighbourhoods of data around a sample, divided by k; about 1 for equal sets.
        coverage: Share of the data whose neighbourhood holds a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float

    def __str__(self) -> str:
        return (
            f"precision {self.precision:.3f}, recall {self.recall:.3f}, density {self.density:.3f}, "
            f"coverage {self.coverage:.3f}"
        )


@checked
def precision_recall(data: Tensor, samples: Tensor, k: int = 5) -> PrecisionRecall:
    r"""Precision, recall, density and coverage of samples, from the distances to the k-th neighbour.

    The neighbourhood B(x) of x is the ball up to the k-th nearest other point of the set of x.

    .. math::
        \text{precision} = \frac1M \sum_j 1\Big[y_j \in \bigcup_i B(x_i)\Big], \qquad
        \text{recall} = \frac1N \sum_i 1\Big[x_i \in \bigcup_j B(y_j)\Big]

    .. math::
        \text{density} = \frac1{kM} \sum_{ij} 1[y_j \in B(x_i)], \qquad
        \text{coverage} = \frac1N \sum_i 1\big[\exists j: y_j \in B(x_i)\big]

    The values depend on N, M and k: compare them at equal numbers, and beside those of two sets of data. The coverage
    of equal sets is about 1 − 2⁻ᵏ for N = M.

    Arguments:
        data: Features of the data x, (N, *event), N > k.
        samples: Features of the samples y, (M, *event), M > k.
        k: Number of the neighbour: 3 in the paper on precision and recall, 5 in that on density and coverage.

    References:
        | Improved Precision and Recall Metric (Kynkäänniemi et al., 2019), arXiv:1904.06991
        | Reliable Fidelity and Diversity Metrics (Naeem et al., 2020), arXiv:2002.09797

    Example:
        >>> import torch
        >>> x = torch.arange(100.0)[:, None]
        >>> print(precision_recall(x, x[:50] + 0.4, k=1))  # half of the data is missed
        precision 1.000, recall 0.510, density 2.000, coverage 0.510
    """
    check.integer("k", k, at_least=1)
    x, y = as_pair(data, samples)
    if k >= min(len(x), len(y)):
        raise ValueError(f"`k` must be less than the number of samples in each set, {len(x)} and {len(y)}, got {k}.")
    radius_x, radius_y = _to_neighbour(x, k), _to_neighbour(y, k)
    rows = max(1, CHUNK // len(x))
    hits, near, covered = 0, 0, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    found = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for part, radius in zip(y.split(rows), radius_y.split(rows), strict=True):
        d = torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist")
        inside = d <= radius_x
        hits += int(inside.any(1).sum())
        near += int(inside.sum())
        covered |= inside.any(0)
        found |= (d <= radius[:, None]).any(0)
    share = [float(mask.double().mean()) for mask in (found, covered)]
    return PrecisionRecall(hits / len(y), share[0], near / (k * len(y)), share[1])


def _to_neighbour(x: Tensor, k: int) -> Tensor:
    """Distance of each sample to its k-th nearest other sample, (N,)."""
    parts = [
        torch.cdist(part, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(k + 1, dim=1).values
        for part in x.split(max(1, CHUNK // len(x)))
    ]
    return torch.cat(parts)
