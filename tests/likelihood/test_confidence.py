"""Standard errors from few repeats: intervals contain the exact value as often as they claim."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.likelihood import Elbo, Estimate, LogProb, MonteCarlo, Probes, Tolerance, denoiser_error, student_quantile

F64 = torch.float64
MEANS = torch.randn(3, 12, generator=torch.Generator().manual_seed(5), dtype=F64)
MIX = ss.GaussianMixture(ss.Flow(), MEANS, std=0.5)
X = MIX.sample(200, seed=1)


def inside(found: LogProb | Elbo | Estimate, exact: Tensor, level: float) -> Tensor:
    low, high = found.interval(level)
    return ((low <= exact) & (exact <= high)).double()


def test_quantiles_are_those_of_the_closed_forms() -> None:
    for p in (0.6, 0.9, 0.975, 0.999):
        assert student_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-12)
        two = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
        assert student_quantile(p, 2) == pytest.approx(two, rel=1e-12)
        normal = float(torch.special.ndtri(torch.tensor(p, dtype=F64)))
        assert student_quantile(p, math.inf) == pytest.approx(normal, rel=1e-12)
        assert student_quantile(p, 1e9) == pytest.approx(normal, rel=1e-7)


def test_intervals_of_bounds_contain_the_mean_as_often_as_they_claim() -> None:
    mean = ss.elbo(MIX, X, monte_carlo=MonteCarlo(n_times=32, repeats=16), seed=100).value
    for repeats in (2, 4):
        few = MonteCarlo(n_times=4, repeats=repeats)
        found = [ss.elbo(MIX, X, monte_carlo=few, seed=seed) for seed in range(3)]
        assert all(f.degrees == repeats - 1 for f in found)
        for level in (0.9, 0.99):
            hits = torch.cat([inside(f, mean, level) for f in found])
            assert abs(float(hits.mean()) - level) < 4 * math.sqrt(level * (1 - level) / len(hits)), (repeats, level)


@pytest.mark.parametrize("n", [3, 8])
def test_intervals_of_mean_errors_contain_the_mean_as_often_as_they_claim(n: int) -> None:
    other, times, level = ss.GaussianMixture(ss.Flow(), torch.zeros(1, 12, dtype=F64), std=1.0), [0.3, 0.6], 0.95
    truth = denoiser_error(other, MIX, MIX.sample(10000, seed=3), times, seed=9).value
    found = [denoiser_error(other, MIX, MIX.sample(n, seed=500 + s), times, seed=s) for s in range(150)]
    hits = torch.stack([inside(f, truth, level) for f in found]).mean(0)
    normal = torch.stack([((f.value - truth).abs() < 1.96 * f.standard_error).double() for f in found]).mean(0)
    # each error is a sum of few squares, whose skewness costs some per cent
    assert bool((hits > level - 0.03 - 4 * math.sqrt(level * (1 - level) / 150)).all()) and bool((hits > normal).all())


@pytest.mark.parametrize(("n", "distribution"), [(2, "orthogonal"), (4, "rademacher"), (8, "gaussian")])
def test_intervals_of_few_probes_are_wider_than_normal_ones(n: int, distribution: str) -> None:
    three, level = Tolerance(steps=3), 0.95
    exact = ss.log_prob(MIX, X, tolerance=three)
    assert exact.degrees == math.inf and torch.equal(exact.interval()[0], exact.value)
    found = ss.log_prob(MIX, X, probes=Probes("hutchinson", n, distribution), tolerance=three, seed=0)
    assert found.degrees == n - 1
    hits = float(inside(found, exact.value, level).mean())
    normal = float(((found.value - exact.value).abs() < 1.96 * found.standard_error).double().mean())
    # the estimates are skewed: the docstring of Uncertain says how much that costs
    assert hits > 0.87 - 4 * math.sqrt(0.87 * 0.13 / len(X)) and hits > normal
    assert level - hits < 0.6 * (level - normal) + 0.02


def test_one_repeat_knows_no_error() -> None:
    single = ss.log_prob(MIX, X[:2], probes=Probes("hutchinson", 1), tolerance=Tolerance(steps=2), seed=0)
    low, high = single.interval()
    assert single.degrees == 0 and bool((low == -math.inf).all()) and bool((high == math.inf).all())
    every = Probes("hutchinson", 12)  # all directions of a basis
    exact = ss.log_prob(MIX, X[:2], probes=every, tolerance=Tolerance(steps=2), seed=0)
    assert exact.degrees == math.inf and torch.equal(*exact.interval())
    with pytest.raises(ValueError, match="`level` must be finite and above 0 and below 1"):
        exact.interval(1.0)


def test_few_samples_raise_the_floor_of_moments() -> None:
    n, repeats, seen = 8, 200, []
    for seed in range(repeats):
        z = ss.Noise(seed).normal((2 * n, 3), 0, dtype=F64)
        seen.append(ss.metrics.moments(z[:n], z[n:]))
    assert seen[0].degrees == n - 1
    beyond = sum(s.max_z > s.z_floor for s in seen) / repeats
    many = student_quantile((1 + 0.95 ** (1 / 9)) / 2, math.inf)
    assert beyond < 0.05 + 4 * math.sqrt(0.05 * 0.95 / repeats) < sum(s.max_z > many for s in seen) / repeats
