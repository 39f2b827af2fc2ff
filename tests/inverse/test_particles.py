"""Twisted SMC and moment projection against the exact posterior of Gaussians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import exact_moments
from scoresde.inverse import MMPS, TMPD, Mask, Measurement, log_evidence, posterior, twisted_smc
from scoresde.inverse.particles import Particles

F64 = torch.float64
SEEN = Measurement(Mask(torch.tensor([True, False])), torch.tensor([[0.7]], dtype=F64), std=0.5)
DOUBLE = ss.Start(dtype=F64)


def runs(prior: ss.GaussianMixture, steps: int, variance: str, n: int = 2000, seeds: int = 3) -> list[Particles]:
    return [twisted_smc(prior, SEEN, (n, 2), steps, variance=variance, start=DOUBLE, seed=s) for s in range(seeds)]


def moments(found: list[Particles], about: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean, and mean square about a point, over all runs."""
    w = torch.stack([run.log_weights.exp()[:, None] for run in found])
    x = torch.stack([run.x for run in found])
    return (w * x).sum(1).mean(0), (w * (x - about) ** 2).sum(1).mean(0)


@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("std", [1.0, 0.5])
def test_particles_have_the_variance_of_the_posterior_with_few_steps(sde: ss.SDE, std: float) -> None:
    """The steps are exact for isotropic Gaussian data, up to the last one and the noise of the particles: the standard
    error of a variance from 6000 particles is 2 %, and resampling makes them dependent, so 8 % are four of them."""
    prior = ss.GaussianMixture(sde, torch.zeros(1, 2, dtype=F64), std=std)
    exact = posterior(prior, SEEN)
    sd = exact.covariance().diagonal().sqrt()
    found = runs(prior, 20, "optimal")
    mean, square = moments(found, exact.mean())
    assert float((square / sd**2 - 1).abs().max()) < 0.08
    assert float(((mean - exact.mean()) / sd).abs().max()) < 0.06
    assert sum(run.log_evidence for run in found) / 3 == pytest.approx(float(log_evidence(prior, SEEN)), abs=0.02)


def test_steps_of_ddpm_lose_variance_in_the_particles_as_in_samples_of_the_prior() -> None:
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2, dtype=F64), std=1.0)
    grid = {n: ss.grids.quadratic_vp(prior.sde, n) for n in (20, 40, 160)}
    kept = {n: float(exact_moments(ss.DDPM().plan(prior.sde, g), prior.sde).variance) for n, g in grid.items()}
    assert kept[40] == pytest.approx(0.86, abs=0.005) and kept[160] == pytest.approx(0.96, abs=0.005)
    _, square = moments(runs(prior, 20, "small"), posterior(prior, SEEN).mean())
    assert float(square[1]) == pytest.approx(kept[20], abs=0.08), "the direction that y does not see"
    assert kept[20] < 0.76


def test_the_variance_follows_clusters_that_are_narrower_than_the_data() -> None:
    means = torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.3, -1.2]], dtype=F64)
    prior = ss.GaussianMixture(ss.VP(), means, std=0.5)
    exact = posterior(prior, SEEN)
    sd = exact.covariance().diagonal().sqrt()
    mean, square = moments(runs(prior, 20, "optimal"), exact.mean())
    assert float((square / sd**2 - 1).abs().max()) < 0.1
    assert float(((mean - exact.mean()) / sd).abs().max()) < 0.1


def test_the_variance_of_the_steps_is_checked() -> None:
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2, dtype=F64), std=1.0)
    with pytest.raises(ValueError, match="`variance` must be one of 'optimal', 'small', got 'large'"):
        twisted_smc(prior, SEEN, (4, 2), 3, variance="large")


def test_row_sums_are_exact_for_a_gaussian_only_if_they_are_a_diagonal() -> None:
    """And what remains does not depend on the steps: it is not an error of the sampler."""
    both = Measurement(Mask(torch.tensor([True, True])), torch.tensor([[0.7, -0.2]], dtype=F64), std=0.3)
    mean = torch.zeros(1, 2, dtype=F64)
    independent = ss.GaussianMixture(ss.VP(), mean, cov=torch.diag(torch.tensor([1.0, 0.5], dtype=F64))[None])
    correlated = ss.GaussianMixture(ss.VP(), mean, cov=torch.tensor([[[1.0, 0.6], [0.6, 0.5]]], dtype=F64))
    errors = {}
    for name, prior in (("independent", independent), ("correlated", correlated)):
        exact, x = posterior(prior, both), prior.sample(6, 0.4, seed=2)
        torch.testing.assert_close(MMPS(prior, both).x0(x, 0.4), exact.x0(x, 0.4), rtol=1e-10, atol=1e-10)
        size = exact.covariance().trace().sqrt()
        for steps in (40, 160):
            ours, best = (
                ss.sample(model, (400, 2), ss.VelocityAB(3), steps=steps, seed=1, start=DOUBLE)
                for model in (TMPD(prior, both), exact)
            )
            errors[name, steps] = float((ours - best).mean(0).norm() / size)
    assert errors["independent", 40] < 1e-10
    assert errors["correlated", 40] == pytest.approx(0.3, abs=0.02)
    assert errors["correlated", 160] == pytest.approx(errors["correlated", 40], rel=0.02)
