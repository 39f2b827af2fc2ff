"""PSNR and SSIM against their definitions, window by window."""

from __future__ import annotations

import math

import pytest
import torch

import scoresde as ss
from scoresde.metrics import psnr, ssim

X = ss.Noise(1).uniform((2, 3, 14, 17), draw=0, dtype=torch.float64)
Y = (X + 0.2 * ss.Noise(2).normal((2, 3, 14, 17), draw=0, dtype=torch.float64)).clamp(0, 1)


def test_psnr_is_the_ratio_in_decibels() -> None:
    for i, value in enumerate(psnr(X, Y, (0.0, 1.0))):
        mean = (
            sum((a - b) ** 2 for a, b in zip(X[i].flatten().tolist(), Y[i].flatten().tolist(), strict=True))
            / X[i].numel()
        )
        assert float(value) == pytest.approx(-10 * math.log10(mean), rel=1e-12)
    assert torch.allclose(psnr(2 * X - 1, 2 * Y - 1), psnr(X, Y, (0.0, 1.0)))
    assert bool(psnr(X, X).isinf().all())


def test_ssim_is_the_mean_over_windows() -> None:
    weights = [[math.exp(-((a - 5) ** 2 + (b - 5) ** 2) / 4.5) for b in range(11)] for a in range(11)]
    w = torch.tensor(weights, dtype=torch.float64)
    w = w / w.sum()
    c1, c2 = 1e-4, 9e-4
    for i, value in enumerate(ssim(X, Y, (0.0, 1.0))):
        terms = []
        for c in range(3):
            for r in range(14 - 10):
                for s in range(17 - 10):
                    p, q = X[i, c, r : r + 11, s : s + 11], Y[i, c, r : r + 11, s : s + 11]
                    mp, mq = (w * p).sum(), (w * q).sum()
                    vp, vq = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum()
                    cov = (w * (p - mp) * (q - mq)).sum()
                    terms.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
        assert float(value) == pytest.approx(float(sum(terms)) / len(terms), rel=1e-10)


def test_ssim_of_an_image_with_itself_is_one_and_of_grey_images_too() -> None:
    assert torch.allclose(ssim(X, X), torch.ones(2, dtype=torch.float64))
    assert torch.allclose(ssim(X[:, 0], X[:, 0]), torch.ones(2, dtype=torch.float64))
    assert float(ssim(X, 1 - X, (0.0, 1.0)).max()) < 0, "the structure is reversed"


def test_ranges_and_windows_are_checked() -> None:
    with pytest.raises(ValueError, match="`value_range` must be"):
        psnr(X, Y, (1.0, 0.0))
    with pytest.raises(ValueError, match="`size` must be odd"):
        ssim(X, Y, size=15)
    with pytest.raises(ValueError, match="`size` must be odd"):
        ssim(X, Y, size=4)
