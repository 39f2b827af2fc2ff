"""Ranks of the truth are uniform under the exact posterior, and not under a wrong one."""

from __future__ import annotations

import pytest
import torch

import scoresde as ss
from scoresde.metrics import ranks


def kolmogorov(r: torch.Tensor) -> float:
    """Largest gap between the share of ranks below u and u, times √N."""
    r = r.flatten().sort().values
    n = torch.arange(1, len(r) + 1) / len(r)
    return float(torch.maximum((n - r).abs(), (n - 1 / len(r) - r).abs()).max()) * len(r) ** 0.5


def gaussian(scale: float, M: int = 7) -> torch.Tensor:
    """Ranks with θ ~ N(0, 1), y = θ + N(0, 1), and samples of N(y/2, scale/2), exact for scale = 1."""
    theta, noise = (ss.Noise(0).normal((2000, 1), draw=k, dtype=torch.float64) for k in (0, 1))
    draws = ss.Noise(0).normal((2000, M, 1), draw=2, dtype=torch.float64)
    return ranks(theta, (theta + noise)[:, None] / 2 + (scale / 2) ** 0.5 * draws)


def test_exact_posteriors_have_uniform_ranks_for_few_samples_too() -> None:
    assert kolmogorov(gaussian(1.0)) < 1.63  # 1 % level of the Kolmogorov distribution
    assert kolmogorov(gaussian(1.0, M=1)) < 1.63


def test_narrow_and_wide_posteriors_are_found() -> None:
    narrow, wide = gaussian(0.5), gaussian(2.0)
    assert kolmogorov(narrow) > 2 and kolmogorov(wide) > 2
    assert float((narrow - 0.5).abs().mean()) > 0.25 > float((wide - 0.5).abs().mean())


def test_ties_are_broken_evenly() -> None:
    tied = ranks(torch.zeros(4000, 1), torch.zeros(4000, 5, 1))
    assert kolmogorov(tied) < 1.63


def test_shapes_must_fit() -> None:
    with pytest.raises(ValueError, match="`samples` must have shape"):
        ranks(torch.zeros(4, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="must be finite"):
        ranks(torch.zeros(1, 1), torch.full((1, 3, 1), torch.nan))
