"""Likelihoods as potentials: posteriors and evidences of any measurement, under any stochastic rule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import exact_moments
from scoresde.inverse import (
    Censored,
    Counts,
    Likelihood,
    Mask,
    Matrix,
    Measurement,
    Operator,
    StudentT,
    log_evidence,
    posterior,
    twisted_smc,
)
from scoresde.steering import steer

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)
SDE = ss.VP()
NORMAL = ss.GaussianMixture(SDE, torch.zeros(1, 1, dtype=F64), std=1.0)
MIX = ss.GaussianMixture(SDE, torch.tensor([[-1.0], [0.8]], dtype=F64), std=[0.4, 0.3], weights=[0.4, 0.6])
ALL = Mask(torch.tensor([True]))
RULES = [ss.SDEDPMSolverPP(2), ss.DDPM(), ss.solvers.SASolver(), ss.solvers.SEEDS(2), ss.EulerMaruyama()]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__ + str(rule)[:12])
def test_the_evidence_is_unbiased_under_every_rule_for_a_batch_of_measurements(rule: ss.solvers.Solver) -> None:
    """The samples of a plan for N(0, 1) are N(0, v), so p(y) = N(y; 0, v + std²), for y of each problem."""
    plan = rule.plan(SDE, ss.grids.karras(SDE, 16))
    v = float(exact_moments(plan, SDE).variance)
    y = torch.tensor([[0.7], [-0.4]], dtype=F64).repeat(300, 1)
    seen = Likelihood(Measurement(ALL, y, std=0.5))
    run = steer(NORMAL, seen, (600, 1), plan, particles=16, proposal="gradient", seed=0, start=DOUBLE)
    exact = torch.distributions.Normal(0.0, (v + 0.25) ** 0.5).log_prob(y[:, 0])
    ratio = (run.log_z - exact).exp()
    for part in (ratio[::2], ratio[1::2]):
        assert float((part.mean() - 1).abs() / part.std()) * 300**0.5 < 3.5


@pytest.mark.parametrize("rule", [None, ss.SDEDPMSolverPP(2), ss.DDPM()], ids=["default", "multistep", "DDPM"])
def test_twisted_smc_takes_any_rule(rule: ss.solvers.Solver | None) -> None:
    prior = ss.GaussianMixture(SDE, torch.tensor([[-1.0, 0.5], [1.0, -0.3]], dtype=F64), std=0.5)
    seen = Measurement(Matrix(torch.tensor([[1.0, 0.5]], dtype=F64)), torch.tensor([[0.8]], dtype=F64), 0.4)
    exact = posterior(prior, seen)
    run = twisted_smc(prior, seen, (2000, 2), 60, solver=rule, seed=1, start=DOUBLE)
    w = run.log_weights.exp()
    sd = exact.covariance().diagonal().sqrt()
    mean = w @ run.x
    assert float(((mean - exact.mean()) / sd).abs().max()) < 0.12
    torch.testing.assert_close(w @ (run.x - exact.mean()).square(), sd**2, rtol=0.15, atol=0)
    assert run.log_evidence == pytest.approx(float(log_evidence(prior, seen)), abs=0.08)
    assert len(run.ess) == 61 and run.x.shape == (2000, 2)


def test_twisted_smc_under_a_plan_is_steering() -> None:
    seen = Measurement(ALL, torch.tensor([[0.4]], dtype=F64), 0.3)
    plan = ss.DDPM().plan(SDE, ss.grids.karras(SDE, 8))
    a = twisted_smc(MIX, seen, (20, 1), solver=plan, seed=2, start=DOUBLE)
    b = steer(MIX, Likelihood(seen), (1, 1), plan, particles=20, proposal="gradient", seed=2, start=DOUBLE)
    assert torch.equal(a.x, b.x[0]) and a.log_evidence == float(b.log_z)


square = Operator(lambda x: x.square(), (1,))
rate = Operator(lambda x: 4 * (x + 2.5), (1,))
LIKELIHOODS: dict[str, Any] = {
    "a square": Measurement(square, torch.tensor([[0.6]], dtype=F64), 0.3),
    "counts": Counts(rate, torch.tensor([[12.0]], dtype=F64)),
    "Student": StudentT(ALL, torch.tensor([[0.2]], dtype=F64), 0.2, 3.0),
    "censored": Censored(ALL, torch.tensor([[0.5]], dtype=F64), 0.2, high=0.5),
    "two": [
        Measurement(square, torch.tensor([[0.6]], dtype=F64), 0.5),
        Measurement(ALL, torch.ones(1, 1).double(), 1.0),
    ],
}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        *((name, "steer") for name in LIKELIHOODS),
        ("counts", "steer, no proposal"),
        ("a square", "twisted_smc"),
        ("Student", "twisted_smc"),
    ],
)
def test_any_likelihood_gives_its_posterior_and_evidence(name: str, how: str) -> None:
    """Against an integral over the line. The slack is four standard deviations, measured over ten seeds: 0.05 for
    log p(y) from `twisted_smc`, 0.03 from `steer`, and 0.05 of the posterior's own for the mean."""
    potential = Likelihood(LIKELIHOODS[name])
    line = torch.linspace(-5, 5, 4001, dtype=F64)[:, None]
    log = MIX.log_prob(line) + potential.log_value(line)
    log_z = float(log.logsumexp(0)) + math.log(float(line[1] - line[0]))
    density = log.softmax(0)
    mean, second = (float(density @ v) for v in (line[:, 0], line[:, 0] ** 2))
    sd = math.sqrt(second - mean**2)
    if how == "twisted_smc":
        one = twisted_smc(MIX, LIKELIHOODS[name], (1000, 1), 50, seed=3, start=DOUBLE)
        w, x, found = one.log_weights.exp(), one.x[:, 0], one.log_evidence
    else:
        proposal = "gradient" if how == "steer" else None
        run = steer(MIX, potential, (1, 1), particles=1000, proposal=proposal, grid=50, seed=3, start=DOUBLE)
        w, x, found = run.log_weights[0].exp(), run.x[0, :, 0], float(run.log_z)
    assert found == pytest.approx(log_z, abs=0.2 if how == "twisted_smc" else 0.12)
    assert float(w @ x) == pytest.approx(mean, abs=0.2 * sd)
    assert float(w @ x**2) == pytest.approx(second, rel=0.15)


def test_the_closed_twist_is_exact_for_isotropic_data() -> None:
    """log p(y | x_t) of N(0, s² I), with noise of every kind of covariance."""
    s, t = 0.7, 0.35
    prior = ss.GaussianMixture(SDE, torch.zeros(1, 3, dtype=F64), std=s)
    A = torch.tensor([[1.0, 0.5, 0.0], [0.2, -1.0, 0.4]], dtype=F64)
    y = torch.tensor([[0.3, -0.8]], dtype=F64)
    x = prior.sample(5, t, seed=4)
    noises: list[dict[str, Any]] = [
        {"std": 0.3},
        {"std": torch.tensor([0.2, 0.6])},
        {"cov": torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)},
    ]
    v = s**2 * SDE.sigma(t) ** 2 / (SDE.alpha(t) ** 2 * s**2 + SDE.sigma(t) ** 2)
    for noise in noises:
        potential = Likelihood(Measurement(Matrix(A), y, **noise), data_std=s)
        cov = noise["cov"] if "cov" in noise else torch.eye(2).double() * torch.as_tensor(noise["std"]).double() ** 2
        x0 = prior.x0(x, t)
        exact = torch.distributions.MultivariateNormal(x0 @ A.mT, cov + v * A @ A.mT).log_prob(y)
        torch.testing.assert_close(potential.twist(x, x0, t, SDE), exact)


def test_several_measurements_need_several_problems() -> None:
    two = Measurement(ALL, torch.zeros(2, 1, dtype=F64), 0.5)
    with pytest.raises(ValueError, match=r"`y` must be one measurement, .* got 2 rows; `steering.steer`"):
        twisted_smc(MIX, two, (4, 1), 3)
    run = steer(MIX, Likelihood(two), (2, 1), particles=4, grid=3, seed=0)
    assert run.x.shape == (2, 4, 1)
    assert isinstance(run.x, Tensor)
