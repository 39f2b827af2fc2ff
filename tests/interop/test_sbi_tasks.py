"""The tasks of experiments/interop/_sbi_tasks.py: each exact posterior is that of its simulator."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import scoresde as ss


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "experiments" / "interop"), *sys.path])
    import _sbi_tasks

    return _sbi_tasks


def noise(name: str, theta: Tensor, x: Tensor) -> Tensor:
    """Noise of the simulator at parameters and observations, (N, K); its law does not depend on θ."""
    if name == "two_moons":
        a, b = theta.T
        p = x - torch.stack([0.25 - (a + b).abs() / math.sqrt(2), (b - a) / math.sqrt(2)], 1)
        return torch.stack([(p.norm(dim=1) - 0.1) / 0.01, torch.atan2(p[:, 1], p[:, 0])], 1)
    if name == "slcp":
        z = (x.reshape(-1, 4, 2) - theta[:, None, :2]) / theta[:, None, 2:4].square()
        rho = theta[:, None, 4].tanh()
        return torch.cat([z[..., 0], (z[..., 1] - rho * z[..., 0]) / (1 - rho.square()).sqrt()], 1)
    return x - theta


def features(r: Tensor) -> Tensor:
    return torch.cat([r, r.square(), (r.abs() + 1e-3).log()], 1)


@pytest.mark.parametrize("name", ["two_moons", "slcp", "gaussian_linear", "gaussian_mixture"])
def test_exact_posterior_leaves_the_joint_distribution_unchanged(tasks: ModuleType, name: str) -> None:
    """If x is simulated and θ' is drawn from p(θ | x), then (θ', x) has the law of (θ, x), and so has its noise."""
    task = next(task for task in tasks.TASKS if task.name == name)
    few = {"draws": 30_000} if name == "slcp" else {}
    n, m = (300, 16) if few else (1500, 16)
    theta, x = task.simulations(100_000, seed=3)
    generator = torch.Generator().manual_seed(4)
    samples = torch.stack([task.posterior(row, m, generator, **few) for row in x[:n]])
    assert task.inside(samples.flatten(0, 1)).all(), name
    r = noise(name, samples.flatten(0, 1), x[:n].repeat_interleave(m, 0))
    each = torch.cat([features(r), samples.flatten(0, 1)], 1).reshape(n, m, -1).mean(1)
    expected = torch.cat([features(noise(name, theta, x)), theta], 1).mean(0)
    z = (each.mean(0) - expected) / (each.std(0) / math.sqrt(n))
    assert (z.abs() < 4.5).all(), f"{name}: {z}"


def test_linear_posterior_is_that_of_the_closed_form(tasks: ModuleType) -> None:
    x = torch.linspace(-0.5, 0.5, 10)
    prior = ss.GaussianMixture(ss.VP(), torch.zeros(1, 10), std=math.sqrt(0.1))
    seen = ss.inverse.Measurement(ss.inverse.Mask(torch.ones(10, dtype=torch.bool)), x[None], std=math.sqrt(0.1))
    exact = ss.inverse.posterior(prior, seen)
    samples = tasks.gaussian_linear_posterior(x, 50_000, torch.Generator().manual_seed(0)).double()
    error = samples.mean(0) - exact.mean()
    torch.testing.assert_close(error, torch.zeros(10, dtype=torch.float64), rtol=0, atol=0.005)  # five standard errors
    torch.testing.assert_close(torch.cov(samples.T), exact.component_covariances()[0], rtol=0, atol=0.0016)


def test_slcp_has_the_mean_and_the_covariance_of_its_definition(tasks: ModuleType) -> None:
    theta = torch.tensor([0.5, -1.0, 1.2, -0.8, 0.7])
    x = tasks.slcp(theta.expand(30_000, 5), torch.Generator().manual_seed(0)).reshape(-1, 2)
    first, second, rho = 1.2**2, 0.8**2, math.tanh(0.7)
    cov = torch.tensor([[first**2, rho * first * second], [rho * first * second, second**2]])
    torch.testing.assert_close(x.mean(0), theta[:2], rtol=0, atol=0.03)  # five standard errors
    torch.testing.assert_close(torch.cov(x.T), cov, rtol=0.04, atol=0)
