"""Posteriors of many observations against closed forms of Gaussians, mixtures and truncated normals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.inverse import Matrix, Measurement, TallPosterior, UniformPrior, as_prior, posterior, stack

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)
D = 3


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, rand(1, D), std=0.5, factor=0.7 * rand(1, D, 2, seed=1))


def observed(prior: ss.GaussianMixture, n: int, std: float = 0.8) -> list[Measurement]:
    """Observations x_j = M θ + noise of one θ."""
    A = Matrix(torch.eye(D, dtype=F64) + 0.3 * rand(D, D, seed=2))
    theta = prior.sample(1, seed=3)
    return [Measurement(A, A(theta) + std * rand(1, D, seed=10 + j), std) for j in range(n)]


# Gaussians: exact for any number of observations, at every time, on every process.


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow()], ids=repr)
@pytest.mark.parametrize("n", [1, 2, 10, 90])
def test_both_compositions_are_exact_for_gaussians(sde: ss.SDE, n: int) -> None:
    prior = gaussian(sde)
    seen = observed(prior, n)
    exact = posterior(prior, stack(seen))
    single = [posterior(prior, one) for one in seen]
    covariances = torch.stack([one.covariance() for one in single])
    models = [
        TallPosterior(single, None, prior, covariances=covariances),
        TallPosterior(single, None, prior, covariances=covariances[:1]),
        TallPosterior(single, None, prior, method="jac"),
    ]
    for model in models if n < 90 else models[:1]:
        for t in (0.02, 0.3, 0.8):
            x = exact.sample(4, t * sde.T, seed=2)
            torch.testing.assert_close(model.x0(x, t * sde.T), exact.x0(x, t * sde.T), rtol=1e-6, atol=1e-6)
        t = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=F64) * sde.T
        torch.testing.assert_close(model.x0(x, t), exact.x0(x, t), rtol=1e-6, atol=1e-6)


def test_samples_of_ninety_observations_have_the_moments_of_the_closed_form() -> None:
    prior = gaussian(ss.VP())
    seen = observed(prior, 90)
    exact = posterior(prior, stack(seen))
    single = [posterior(prior, one) for one in seen]
    model = TallPosterior(single, None, prior, covariances=single[0].covariance()[None])
    x = ss.sample(model, (1000, D), ss.VelocityAB(3), steps=30, seed=0, start=DOUBLE)
    assert ss.metrics.moments(exact.sample(1000, seed=1), x).max_z < 4


def test_langevin_steps_sample_the_composition_of_geffner() -> None:
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, D), std=1.0)
    for n in (2, 10):
        seen = observed(prior, n)
        exact = posterior(prior, stack(seen))
        model = TallPosterior([posterior(prior, one) for one in seen], None, prior, method="fnpe")
        grid = ss.grids.karras(prior.sde, 20)
        x = ss.sample(model, (400, D), ss.solvers.AnnealedLangevin(30, r=0.6 / n), grid=grid, seed=0, start=DOUBLE)
        sd = exact.covariance().diagonal().sqrt()
        assert float(((x.mean(0) - exact.mean()) / sd).abs().max()) < 0.25
        torch.testing.assert_close(x.std(0), sd, rtol=0.2, atol=0.0)


def test_covariances_from_samples_are_near_the_exact_ones() -> None:
    prior = gaussian(ss.VP())
    seen = observed(prior, 4)
    exact, single = posterior(prior, stack(seen)), [posterior(prior, one) for one in seen]
    model = TallPosterior(single, None, prior, samples=2000, steps=15)
    x = exact.sample(5, 0.4, seed=2)
    sd = exact.covariance().diagonal().sqrt()
    assert float(((model.x0(x, 0.4) - exact.x0(x, 0.4)) / sd).abs().max()) < 0.1


# A mixture as the prior.


@pytest.mark.parametrize("n", [2, 10])
@pytest.mark.parametrize("method", ["gauss", "jac"])
def test_a_mixture_as_the_prior(n: int, method: str) -> None:
    """The Gaussian approximation leaves an error; experiments/measurements.py measures it."""
    sde = ss.VP()
    means = torch.tensor([[-1.0, 0.3], [1.0, -0.2], [0.2, 1.2]], dtype=F64)
    prior = ss.GaussianMixture(sde, means, std=0.4)
    A, theta = Matrix(torch.eye(2, dtype=F64)), prior.sample(1, seed=3)
    seen = [Measurement(A, theta + rand(1, 2, seed=10 + j), 1.0) for j in range(n)]
    exact, single = posterior(prior, stack(seen)), [posterior(prior, one) for one in seen]
    covariances = torch.stack([one.covariance() for one in single])
    model = TallPosterior(single, None, prior, method=method, covariances=covariances)
    x = ss.sample(model, (800, 2), ss.VelocityAB(3), steps=30, seed=0, start=DOUBLE)
    sd = exact.covariance().diagonal().sqrt()
    assert x.isfinite().all()
    assert float(((x.mean(0) - exact.mean()) / sd).abs().max()) < (0.35 if n == 2 or method == "jac" else 0.6)
    assert float((x.std(0) / sd).min()) > 0.7 and float((x.std(0) / sd).max()) < 1.3
    x = exact.sample(5, 1e-4, seed=2)  # the error vanishes at the end
    torch.testing.assert_close(model.x0(x, 1e-4), exact.x0(x, 1e-4), rtol=1e-4, atol=1e-4)


# Bounded priors.


def truncated(mean: Tensor, std: Tensor, low: float, high: float) -> Tensor:
    """Mean of a normal distribution in an interval, by a fine grid."""
    z = torch.linspace(low, high, 100_001, dtype=F64)
    return ((-0.5 * ((z - mean[..., None]) / std[..., None]) ** 2).softmax(-1) * z).sum(-1)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow()], ids=repr)
def test_the_uniform_denoiser_is_a_truncated_normal_everywhere(sde: ss.SDE) -> None:
    prior = UniformPrior(sde, torch.tensor([-1.0]), torch.tensor([2.0]))
    x = torch.tensor([[-0.9], [0.3], [1.9], [2.4], [-5.0]], dtype=F64)
    for t in (0.05, 0.5, 0.95):
        alpha, sigma = sde.alpha(t * sde.T), sde.sigma(t * sde.T)
        exact = truncated(x / alpha, torch.full_like(x, sigma / alpha), -1.0, 2.0)
        torch.testing.assert_close(prior.x0(x, t * sde.T), exact, rtol=1e-5, atol=1e-4)
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(prior.log_prob(leaf, t * sde.T).sum(), leaf)
        torch.testing.assert_close(prior.score(x, t * sde.T), slope, rtol=1e-6, atol=1e-6)
    for t in (0.0, 1e-6, 0.5 * sde.T, sde.T):  # far outside, at both ends
        for far in (-1e6, 0.0, 50.0, 1e6):
            out = prior.x0(torch.full((1, 1), far, dtype=F64), t)
            assert bool(out.isfinite().all()) and -1 <= float(out) <= 2
    assert float(prior.covariance()) == pytest.approx(9 / 12) and float(prior.mean()) == 0.5
    assert float(prior.log_prob(torch.tensor([[0.0]], dtype=F64))) == pytest.approx(-math.log(3))
    inside = prior.sample(1000, seed=0)
    assert bool(((inside >= -1) & (inside <= 2)).all())


class Bounded(ss.denoisers.AbstractDenoiser):
    """Posterior of one number from U(−1, 1), given N(x; θ, s²), as a denoiser: a truncated normal."""

    def __init__(self, sde: ss.SDE, s: float) -> None:
        super().__init__(sde)
        self.s = s

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        alpha, sigma = (torch.as_tensor(fn(t), dtype=F64).reshape(-1, 1) for fn in (self.sde.alpha, self.sde.sigma))
        # The product with the likelihood is a normal density of precision p: the box at the noise level of p.
        p = (alpha / sigma) ** 2 + self.s**-2
        mean = (alpha / sigma**2 * x + cond["x_o"] / self.s**2) / p
        box = UniformPrior(EDM, torch.full((1,), -1.0), torch.full((1,), 1.0))
        return box.x0(mean, p.rsqrt().flatten().expand(len(x)))


EDM = ss.EDM(T=1e4, t_min=1e-6)


@pytest.mark.parametrize("n", [2, 10, 90])
@pytest.mark.parametrize("method", ["gauss", "jac", "fnpe"])
def test_a_uniform_prior_gives_numbers_and_the_posterior(n: int, method: str) -> None:
    """At n = 90 the Gaussian approximation puts the mean off by about 0.6 of the posterior's standard deviation."""
    sde, s = ss.VP(), 0.7
    rows = 0.6 + s * rand(n, 1, seed=4)
    box = torch.distributions.Independent(torch.distributions.Uniform(-torch.ones(1), torch.ones(1)), 1)
    model = TallPosterior(Bounded(sde, s), {"x_o": rows}, box, method=method, samples=200, steps=8)
    for x in (-1e4, -3.0, 0.0, 3.0, 1e4):
        for t in (1e-3, 0.3, 1.0):
            assert bool(model.x0(torch.full((2, 1), x, dtype=F64), t).isfinite().all())
    z = torch.linspace(-1, 1, 20_001, dtype=F64)
    w = (-0.5 * n * ((z - rows.mean()) / s) ** 2).softmax(0)
    mean = float(w @ z)
    std = math.sqrt(float(w @ (z - mean) ** 2))
    if method == "fnpe" or (method, n) == ("jac", 90):
        return
    x = ss.sample(model, (300, 1), ss.VelocityAB(3), steps=12, seed=0, start=DOUBLE)
    assert abs(float(x.mean()) - mean) < (0.35 if n < 90 else 0.9) * std
    assert float(x.std()) == pytest.approx(std, rel=0.2 if n < 90 else 0.4)


# Networks, conditions, wrong input.


def network() -> ss.Denoiser:
    def net(x: Tensor, t: Tensor, x_o: Tensor) -> Tensor:
        wide = t.to(x)[:, None]
        return 0.6 * x * (1 - 0.5 * wide) + 0.3 * x_o.to(x) + 0.1 * (x + x_o.to(x)).tanh()

    return ss.Denoiser(net, ss.VP(), predicts="x0")


@pytest.mark.parametrize("method", ["gauss", "jac", "fnpe"])
def test_a_network_with_a_condition_equals_a_list_of_denoisers(method: str) -> None:
    rows, prior = rand(3, 2, seed=4), ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
    covariances = 0.4 * torch.eye(2, dtype=F64)[None]
    net = network()
    one = TallPosterior(net, {"x_o": rows}, prior, method=method, covariances=covariances)
    many = TallPosterior(
        [net.given(x_o=row[None]) for row in rows], None, prior, method=method, covariances=covariances
    )
    x = rand(5, 2, seed=5)
    for t in (0.4, torch.linspace(0.1, 0.9, 5, dtype=F64)):
        torch.testing.assert_close(one.x0(x, t), many.x0(x, t), rtol=1e-6, atol=1e-6)
        part = one.rows(torch.tensor([3])).x0(x[3:4], t[3:4] if isinstance(t, Tensor) else t)
        torch.testing.assert_close(part, one.x0(x, t)[3:4], rtol=1e-6, atol=1e-6)
    run = ss.solve(one, (4, 2), ss.VelocityAB(2), steps=5, seed=0)
    assert run.x.isfinite().all() and run.x.shape == (4, 2) and not run.x.requires_grad
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(one.x0(leaf, 0.4).sum(), leaf)
    e = 1e-6 * torch.ones_like(x)
    with torch.no_grad():
        numeric = (one.x0(x + e, 0.4) - one.x0(x - e, 0.4)).sum() / 2e-6
    assert float(slope.sum()) == pytest.approx(float(numeric), rel=1e-5)
    assert "n=3" in repr(one)


def test_an_observation_that_widens_the_prior_does_not_break_the_product() -> None:
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
    wide = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.05)
    for method in ("gauss", "jac"):
        model = TallPosterior([wide] * 20, None, prior, method=method, covariances=wide.covariance()[None])
        x = ss.sample(model, (50, 2), steps=10, seed=0)
        assert float(x.std()) < 3.5


def test_priors_from_distributions_have_their_moments() -> None:
    sde, d = ss.VP(), torch.distributions
    cov = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    normals = d.MultivariateNormal(torch.tensor([[0.0, 1.0], [2.0, 0.0]]), cov)
    laws = [
        d.MultivariateNormal(torch.tensor([0.5, 1.0]), cov),
        d.Independent(d.Normal(torch.tensor([0.5, 1.0]), torch.tensor([0.3, 2.0])), 1),
        d.Independent(d.Uniform(torch.tensor([0.0, -1.0]), torch.tensor([1.0, 3.0])), 1),
        d.MixtureSameFamily(d.Categorical(torch.tensor([0.25, 0.75])), normals),
    ]
    for law in laws:
        ours: Any = as_prior(sde, law)
        torch.testing.assert_close(ours.mean().float(), law.mean)
        torch.testing.assert_close(ours.covariance().diagonal().float(), law.variance)
        x = law.sample((5,))
        torch.testing.assert_close(ours.log_prob(x, 0.0), law.log_prob(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"`prior` must be a denoiser, or a torch distribution.*got Gamma"):
        as_prior(sde, d.Gamma(torch.ones(2), torch.ones(2)))
    with pytest.raises(ValueError, match="`prior` is on"):
        as_prior(sde, ss.GaussianMixture(ss.EDM(), torch.zeros(1, 2), std=1.0))


def test_errors_name_what_is_wrong() -> None:
    prior, net = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0), network()
    rows = rand(3, 2)
    for observations, text in (
        ({}, "`observations` must name the conditions"),
        (None, "`observations` must name the conditions"),
        ({"x_o": rows, "z": rows[:2]}, "one number of rows"),
    ):
        with pytest.raises(ValueError, match=text):
            TallPosterior(net, observations, prior)
    with pytest.raises(TypeError, match=r"`observations`\['x_o'\] must be a tensor"):
        TallPosterior(net, {"x_o": 3.0}, prior)  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="`observations` must be None with a list"):
        TallPosterior([prior], {"x_o": rows}, prior)
    with pytest.raises(ValueError, match="a list of at least one"):
        TallPosterior([], None, prior)
    with pytest.raises(ValueError, match="`method` must be one of 'gauss', 'jac', 'fnpe', got 'auto'"):
        TallPosterior(net, {"x_o": rows}, prior, method="auto")
    with pytest.raises(ValueError, match=r"`covariances` must have shape \(3, 2, 2\) or \(1, 2, 2\)"):
        TallPosterior(net, {"x_o": rows}, prior, covariances=torch.eye(2)[None].expand(2, 2, 2))
    with pytest.raises(ValueError, match="`prior_covariance` must be given"):
        TallPosterior(net, {"x_o": rows}, ss.Denoiser(lambda x, t: 0.5 * x, ss.VP(), predicts="x0"))
    with pytest.raises(ValueError, match="`samples` must be at least 6 for 2 entries, got 4"):
        TallPosterior(net, {"x_o": rows}, prior, samples=4)
    with pytest.raises(ValueError, match="with low < high"):
        UniformPrior(ss.VP(), torch.ones(2), torch.zeros(2))
