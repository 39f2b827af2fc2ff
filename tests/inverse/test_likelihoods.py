"""Likelihoods that are not Gaussian: densities, their smoothing, their gradients, and posteriors by quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.inverse import (
    DDNM,
    DPS,
    MMPS,
    TMPD,
    Censored,
    Counts,
    DiffPIR,
    EntrywiseMeasurement,
    Laplace,
    Mask,
    Matrix,
    Measurement,
    Operator,
    PiGDM,
    Rounded,
    StudentT,
    daps,
    ddrm,
    posterior,
    red_diff,
    stack,
)
from scoresde.inverse.likelihoods import log_interval

F64 = torch.float64
VP = ss.VP()
ONE = Mask(torch.tensor([True]))
Make = Callable[[Any, Tensor], EntrywiseMeasurement]
KINDS: dict[str, Make] = {
    "Laplace": lambda A, y: Laplace(A, y, 0.4),
    "StudentT": lambda A, y: StudentT(A, y, 0.3, df=3.0),
    "Cauchy": lambda A, y: StudentT(A, y, 0.3, df=1.0),
    "Rounded": lambda A, y: Rounded(A, y, 0.5, 0.3),
    "saturated": lambda A, y: Rounded(A, y, 0.5, 0.3, low=-1.0, high=1.0),
    "Censored": lambda A, y: Censored(A, y, 0.3, low=-0.7, high=0.9),
    "above only": lambda A, y: Censored(A, y, 0.3, high=0.9),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def outcomes(kind: str) -> tuple[Tensor, Tensor]:
    """Points y and weights of a rule that sums or integrates over all outcomes."""
    if kind in ("Rounded", "saturated"):
        y = torch.arange(-60, 61, dtype=F64) * 0.5 if kind == "Rounded" else torch.arange(-2, 3, dtype=F64) * 0.5
        return y, torch.ones_like(y)
    wide = kind in ("StudentT", "Cauchy")
    low, high = (
        (-math.inf if kind == "above only" else -0.7, 0.9) if kind in ("Censored", "above only") else (-1e9, 1e9)
    )
    if wide or kind == "Laplace":  # y = sinh v, for heavy tails
        v = torch.linspace(-22, 22, 40_001, dtype=F64)
        return v.sinh(), v.cosh() * (v[1] - v[0])
    lower = max(low, -8.0)
    n = 20_000
    y = lower + (torch.arange(n, dtype=F64) + 0.5) * (high - lower) / n
    w = torch.full_like(y, (high - lower) / n)
    ends = [(v, 1.0) for v in (low, high) if math.isfinite(v)]
    return torch.cat([y, torch.tensor([v for v, _ in ends], dtype=F64)]), torch.cat(
        [w, torch.ones(len(ends), dtype=F64)]
    )


@each_kind
def test_the_density_integrates_to_one(kind: str) -> None:
    y, w = outcomes(kind)
    seen = KINDS[kind](ONE, y[:, None])
    for u in (-1.3, 0.2, 0.85):
        x = torch.full((len(y), 1), u, dtype=F64)
        tolerance = 1e-6 if kind != "Laplace" else 1e-5  # the rule meets a kink
        assert float((seen.log_prob(x).exp() * w).sum()) == pytest.approx(1, abs=tolerance)
        assert float((seen.smoothed(x, 0.5).exp() * w).sum()) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("kind", ["Laplace", "StudentT"])
def test_the_density_is_that_of_torch(kind: str) -> None:
    y, x = torch.linspace(-3, 3, 9, dtype=F64)[:, None], torch.zeros(9, 1, dtype=F64)
    law: Any = {
        "Laplace": torch.distributions.Laplace(0.0, torch.tensor(0.4, dtype=F64)),
        "StudentT": torch.distributions.StudentT(torch.tensor(3.0, dtype=F64), 0.0, 0.3),
    }[kind]
    torch.testing.assert_close(KINDS[kind](ONE, y).log_prob(x), law.log_prob(y)[:, 0], rtol=1e-6, atol=1e-6)


@each_kind
@pytest.mark.parametrize("v", [1e-8, 0.01, 0.3, 4.0])
def test_the_smoothed_density_is_the_mean_over_a_gaussian(kind: str, v: float) -> None:
    y = torch.tensor([[-1.0], [-0.5], [0.5], [1.0]], dtype=F64)
    seen = KINDS[kind](ONE, y)
    m = torch.tensor([[-0.9], [0.3], [0.6], [1.7]], dtype=F64)
    z = torch.linspace(-9, 9, 60_001, dtype=F64)
    u = m + math.sqrt(v) * z
    logs = seen.log_density(y, u) - 0.5 * z**2 - 0.5 * math.log(2 * math.pi) + math.log(float(z[1] - z[0]))
    torch.testing.assert_close(seen.smoothed(m, v), logs.logsumexp(1), rtol=1e-5, atol=1e-6)


@each_kind
def test_gradients_are_finite_and_those_of_differences(kind: str) -> None:
    y = torch.tensor([[-1.0], [-0.5], [0.5], [1.0], [0.0]], dtype=F64)
    seen = KINDS[kind](ONE, y)
    for far in (0.37, 30.0, -400.0):
        for function in (seen.log_prob, lambda u: seen.smoothed(u, 0.2)):
            u = torch.full((5, 1), far, dtype=F64, requires_grad=True)
            (slope,) = torch.autograd.grad(function(u).sum(), u)
            h = 1e-6 * max(1.0, abs(far))
            with torch.no_grad():
                numeric = (function(u + h) - function(u - h)) / (2 * h)
            torch.testing.assert_close(slope[:, 0], numeric, rtol=1e-4, atol=1e-5)


def test_the_probability_of_an_interval_keeps_its_digits_in_the_tails() -> None:
    mpmath = pytest.importorskip("mpmath")
    mpmath.mp.dps = 60
    for a, b in ((-0.5, 0.5), (7.0, 7.5), (-30.5, -30.0), (20.0, 20.001), (-3.0, math.inf), (-math.inf, -12.0)):
        exact = mpmath.log(mpmath.ncdf(b) - mpmath.ncdf(a)) if a < 0 else mpmath.log(mpmath.ncdf(-a) - mpmath.ncdf(-b))
        ours = log_interval(torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64))
        assert float(ours) == pytest.approx(float(exact), rel=1e-10, abs=1e-12)


# Posteriors on a grid.


def by_quadrature(prior: ss.GaussianMixture, seen: Measurement) -> tuple[float, float]:
    """Mean and standard deviation of the posterior of one number."""
    x = torch.linspace(-8, 8, 16_001, dtype=F64)[:, None]
    w = (prior.log_prob(x) + seen.log_prob(x)).softmax(0)
    mean = float(w @ x[:, 0])
    return mean, math.sqrt(float(w @ (x[:, 0] - mean) ** 2))


@each_kind
@pytest.mark.parametrize("method", [PiGDM, TMPD], ids=lambda m: m.__name__)
def test_moment_methods_sample_the_posterior_of_a_normal_number(kind: str, method: Any) -> None:
    """Both use the exact p(x₀ | x_t) of a normal x₀, so only the solver and the number of samples leave an error."""
    prior = ss.GaussianMixture(VP, torch.zeros(1, 1), std=1.0)
    seen = KINDS[kind](ONE, torch.tensor([[1.0]], dtype=F64))
    mean, std = by_quadrature(prior, seen)
    x = ss.sample(method(prior, seen), (4000, 1), ss.VelocityAB(3), steps=60, seed=0, start=ss.Start(dtype=F64))
    assert float(x.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(4000))
    assert float(x.std()) == pytest.approx(std, rel=0.05)


@each_kind
def test_moment_methods_are_exact_where_the_clean_number_is_normal_given_the_noisy_one(kind: str) -> None:
    prior, t = ss.GaussianMixture(VP, torch.zeros(1, 1), std=0.8), 0.4
    seen = KINDS[kind](ONE, torch.tensor([[0.5]], dtype=F64))
    x = prior.sample(5, t, seed=1)
    z = torch.linspace(-10, 10, 40_001, dtype=F64)
    variance = 1 / (1 / 0.64 + (VP.alpha(t) / VP.sigma(t)) ** 2)
    x0 = prior.x0(x, t) + math.sqrt(variance) * z
    w = (seen.log_density(seen.y, x0) - 0.5 * z**2).softmax(1)
    exact = (w * x0).sum(1, keepdim=True)
    torch.testing.assert_close(PiGDM(prior, seen, data_std=0.8).x0(x, t), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(TMPD(prior, seen).x0(x, t), exact, rtol=1e-5, atol=1e-5)


def test_a_normal_likelihood_written_entry_by_entry_is_the_normal_measurement() -> None:
    class Normal(EntrywiseMeasurement):
        smooth = True

        def log_density(self, y: Tensor, u: Tensor) -> Tensor:
            return self.smoothed_density(y, u, torch.zeros(()))

        def smoothed_density(self, y: Tensor, u: Tensor, variance: Tensor) -> Tensor:
            v = 0.09 + variance
            return -0.5 * (y - u) ** 2 / v - 0.5 * (2 * math.pi * v).log()

    A = Mask(torch.tensor([True, False, True]))
    y = torch.tensor([[0.3, -0.2]], dtype=F64)
    prior = ss.GaussianMixture(VP, torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), std=0.5)
    x = prior.sample(4, 0.4, seed=0)
    for make in (DPS, PiGDM, TMPD):
        a, b = make(prior, Normal(A, y)).x0(x, 0.4), make(prior, Measurement(A, y, 0.3)).x0(x, 0.4)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# Rows, lists, simulation, refusals.


@each_kind
def test_samples_may_have_masks_and_scales_of_their_own(kind: str) -> None:
    mask = Mask(torch.tensor([[True, False, True], [False, True, False]]), (3,))
    y = torch.tensor([[0.5, -0.5], [1.0, 7.0]], dtype=F64)
    prior = ss.GaussianMixture(VP, torch.randn(3, 3, generator=torch.Generator().manual_seed(0)), std=0.5)
    seen, x = KINDS[kind](mask, y), prior.sample(2, 0.4, seed=0)
    for i, index in enumerate(([0, 2], [1])):
        alone = KINDS[kind](Matrix(torch.eye(3, dtype=F64)[index]), y[i : i + 1, : len(index)])
        torch.testing.assert_close(seen.log_prob(x)[i : i + 1], alone.log_prob(x[i : i + 1]))
        at = torch.tensor([i])
        torch.testing.assert_close(seen.rows(at).log_prob(x[at]), seen.log_prob(x)[at])
        for make in (DPS, TMPD):
            torch.testing.assert_close(make(prior, seen).x0(x, 0.4)[at], make(prior, alone).x0(x[at], 0.4))
    each = Laplace(
        Mask(torch.tensor([True, True, True])), torch.zeros(2, 3), torch.tensor([[0.1, 0.2, 0.3], [1.0, 2.0, 3.0]])
    )
    torch.testing.assert_close(each.rows(torch.tensor([1])).log_prob(x[1:]), each.log_prob(x)[1:])


def test_a_list_may_mix_kinds_of_noise() -> None:
    prior = ss.GaussianMixture(VP, torch.zeros(1, 2), std=1.0)
    a = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[0.4]]), 0.3)
    b = Rounded(Mask(torch.tensor([False, True])), torch.tensor([[0.5]]), 0.5, 0.2)
    x = prior.sample(5, 0.4, seed=0)
    both = stack([a, b])
    torch.testing.assert_close(both.log_prob(x), a.log_prob(x) + b.log_prob(x))
    assert DPS(prior, [a, b]).x0(x, 0.4).isfinite().all()
    assert both.simulate(x, seed=0).shape == (5, 2)
    assert torch.equal(both.rows(torch.tensor([1, 2])).log_prob(x[1:3]), both.log_prob(x)[1:3])
    with pytest.raises(TypeError, match=r"needs Gaussian noise.*got Rounded"):
        MMPS(prior, [a, b])
    assert daps(prior, [a, b], (2, 2), 3, seed=0).x.isfinite().all()
    run = ss.steering.steer(prior, ss.inverse.Likelihood([a, b]), (1, 2), particles=50, seed=0)
    assert run.x.isfinite().all()


@each_kind
def test_simulated_values_follow_the_density(kind: str) -> None:
    u, n = 0.35, 40_000
    drawn = KINDS[kind](ONE, torch.tensor([[0.5]], dtype=F64)).simulate(torch.full((n, 1), u, dtype=F64), seed=0)[:, 0]
    y, w = outcomes(kind)
    p = KINDS[kind](ONE, y[:, None]).log_prob(torch.full((len(y), 1), u, dtype=F64)).exp() * w
    for edge in (-0.71, -0.1, 0.3, 0.6, 0.89):
        exact = float(p[y <= edge].sum())
        found = float((drawn <= edge).double().mean())
        assert found == pytest.approx(exact, abs=4 * math.sqrt(0.25 / n) + 1e-3)


def test_counts_are_simulated_by_their_density() -> None:
    rate = torch.tensor([[0.0], [0.3], [4.0], [900.0]], dtype=F64).repeat_interleave(20_000, 0)
    y = Counts(ONE, torch.zeros(1, 1)).simulate(rate, seed=0).reshape(4, -1)
    mean = torch.tensor([0.0, 0.3, 4.0, 900.0], dtype=F64)
    assert bool(((y.mean(1) - mean).abs() <= 4 * (mean / 20_000).sqrt() + 1e-12).all())
    torch.testing.assert_close(y.var(1), mean, rtol=0.05, atol=1e-12)
    zero = float((y[1] == 0).double().mean())
    assert zero == pytest.approx(math.exp(-0.3), abs=0.014)


def test_methods_that_need_gaussian_noise_say_so() -> None:
    prior = ss.GaussianMixture(VP, torch.zeros(1, 1), std=1.0)
    seen = StudentT(ONE, torch.tensor([[0.3]]), 0.2)
    calls: list[Any] = [MMPS, DDNM, DiffPIR, posterior]
    for method in calls:
        with pytest.raises(TypeError, match=r"needs Gaussian noise.*got StudentT.*DPS, PiGDM and TMPD"):
            method(prior, seen)
    with pytest.raises(TypeError, match=r"needs Gaussian noise.*got StudentT"):
        ddrm(prior, seen, (2, 1), 3)
    assert daps(prior, seen, (2, 1), 3, langevin=5, seed=0).x.isfinite().all()
    assert red_diff(prior, seen, (2, 1), 5, seed=0).x.isfinite().all()
    wide = StudentT(Matrix(torch.ones(2, 2)), torch.zeros(1, 2), 0.2)
    with pytest.raises(TypeError, match="PiGDM with StudentT needs an operator with A Aᵀ = g I"):
        PiGDM(ss.GaussianMixture(VP, torch.zeros(1, 2), std=1.0), wide)
    with pytest.raises(TypeError, match="`operator` must be Linear"):
        TMPD(prior, StudentT(Operator(torch.square, (1,)), torch.zeros(1, 1), 0.2))
    for make in (lambda: Laplace(ONE, torch.zeros(1, 1), 0.0), lambda: Censored(ONE, torch.zeros(1, 1), -1.0)):
        with pytest.raises(ValueError, match="must be finite and above 0"):
            make()
    with pytest.raises(ValueError, match="`low` must be less than `high`, got 1 and 0"):
        Rounded(ONE, torch.zeros(1, 1), 0.5, 0.1, low=1.0, high=0.0)
    with pytest.raises(ValueError, match=r"`scale` of shape \(2,\) does not broadcast"):
        Laplace(ONE, torch.zeros(1, 1), torch.ones(2))
