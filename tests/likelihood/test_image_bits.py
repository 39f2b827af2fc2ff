"""Bits per dimension in one call, against the probability of the bins of an exact model."""

from __future__ import annotations

import math

import pytest
import torch

import scoresde as ss

F64 = torch.float64
MODEL = ss.GaussianMixture(ss.VP(), torch.tensor([[-0.4, 0.3], [0.5, -0.2]], dtype=F64), std=0.15)
IMAGES = MODEL.sample(24, seed=0).add(1).mul(4).floor().long().clamp(0, 7)  # eight levels on (−1, 1)
TOLERANCE = ss.likelihood.Tolerance(rtol=1e-5, atol=1e-5)


def exact_bits() -> torch.Tensor:
    """Bits of the probability of each bin."""
    low = IMAGES.double() / 4 - 1
    mass = torch.zeros(len(IMAGES), dtype=F64)
    for mean in MODEL.means:
        normal = torch.distributions.Normal(mean, torch.tensor(0.15, dtype=F64))
        mass += 0.5 * (normal.cdf(low + 0.25) - normal.cdf(low)).prod(1)
    return -mass.log2() / 2


def test_many_points_in_a_bin_give_the_bits_of_its_probability() -> None:
    bits = ss.bits_per_dim(MODEL, IMAGES[:6], 8, interval=(-1.0, 1.0), n=60, tolerance=TOLERANCE, seed=0, dtype=F64)
    assert bool(((bits.value - exact_bits()[:6]).abs() < 5 * bits.standard_error + 5e-3).all())
    assert bits.degrees == 59


def test_one_point_is_a_bound_on_average() -> None:
    bits = ss.bits_per_dim(MODEL, IMAGES, 8, interval=(-1.0, 1.0), tolerance=TOLERANCE, seed=0, dtype=F64)
    points = ss.data.dequantize(IMAGES, 8, seed=0, dtype=F64)
    by_hand = -(MODEL.log_prob(points) / 2 + math.log(0.25)) / math.log(2)
    assert torch.allclose(bits.value, by_hand, atol=5e-3)
    assert bits.mean > float(exact_bits().mean())
    assert bits.mean_error == pytest.approx(float(bits.value.std()) / 24**0.5)
    assert bits.interval()[1].isinf().all()


def test_batches_do_not_change_the_bits() -> None:
    whole = ss.bits_per_dim(MODEL, IMAGES[:5], 8, seed=3)
    parts = ss.bits_per_dim(MODEL, IMAGES[:5], 8, batch=2, seed=3)
    assert torch.allclose(whole.value, parts.value, atol=1e-5)


def test_bytes_have_256_levels_with_black_at_minus_one() -> None:
    images = torch.tensor([[0, 255], [128, 3]], dtype=torch.uint8)
    edge = 1 + 1 / 255
    known = ss.bits_per_dim(MODEL, images, seed=0)
    told = ss.bits_per_dim(MODEL, images, 256, interval=(-edge, edge), seed=0)
    assert torch.equal(known.value, told.value)
    middles = ss.data.dequantize(images, 256, (-edge, edge), middle=True, dtype=F64)
    assert torch.allclose(middles, images.to(F64) / 127.5 - 1)


def test_it_says_what_it_did() -> None:
    text = str(ss.bits_per_dim(MODEL, IMAGES[:4], 8, n=3, seed=0))
    assert "mean of 4 images with 8 levels: 3 points in each bin" in text and "exact trace" in text
    alone = str(ss.bits_per_dim(MODEL, IMAGES[:1], 8, seed=0))
    assert "±" not in alone and "one image, so no standard error: image with 8 levels" in alone
    wide = ss.GaussianMixture(ss.VP(), torch.zeros(1, 300), std=0.5)
    image = torch.full((2, 300), 4)
    short = ss.likelihood.Tolerance(steps=4)
    assert "hutchinson" in str(ss.bits_per_dim(wide, image, 8, tolerance=short, seed=0)), "beyond 256 dimensions"


def test_scaled_images_and_unknown_levels_are_refused() -> None:
    with pytest.raises(TypeError, match="undo the scaling"):
        ss.bits_per_dim(MODEL, IMAGES.float())
    with pytest.raises(TypeError, match=r"`levels` must be given for torch\.int64"):
        ss.bits_per_dim(MODEL, IMAGES)
    with pytest.raises(ValueError, match=r"must lie in 0 … 3"):
        ss.bits_per_dim(MODEL, IMAGES, 4)
