"""The anchored score residual: exact on Gaussian data, on mixtures of its nominal order after a fine start."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde.plan import run
from scoresde.solvers import AnchoredResidual

F64: dict[str, Any] = {"dtype": torch.float64}
PROCESSES = [ss.VP(), ss.EDM(), ss.Flow(), ss.Cosine(), ss.Trig()]


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("nodes", [1, 3, 4])
def test_any_number_of_steps_is_exact_on_one_gaussian(sde: ss.SDE, nodes: int) -> None:
    """Also with one mean for each sample, as under conditions, and from α = 0: the first evaluation gives the mean."""
    x = ss.Noise(0).normal((4, 3), 0, **F64) * sde.sigma(sde.T)
    for shift in (0.0, 3.0):
        gaussian = ss.GaussianMixture(sde, [[1.5 + shift, -0.5, 0.3]], std=0.7).component()
        for times in ([sde.T, 0.0], [sde.T, sde.t_of_lam(0.0), 0.0], ss.grids.uniform_t(sde, 7)):
            plan = AnchoredResidual(0.7, nodes).plan(sde, times)
            gap = run(plan, gaussian.x0, x) - gaussian.flow(x, sde.T, 0.0)
            assert float(gap.abs().max()) < 1e-10, (times, shift)
        grid = torch.stack([ss.grids.uniform_t(sde, n)[[0, 2, 3, -1]] for n in (4, 5, 6, 7)], 1)
        gap = run(AnchoredResidual(0.7, nodes).plan(sde, grid), gaussian.x0, x) - gaussian.flow(x, sde.T, 0.0)
        assert float(gap.abs().max()) < 1e-10, "one grid for each sample"


def median_errors(nodes: int, steps: tuple[int, ...], halvings: int, seed: int) -> list[float]:
    """Errors with equal steps in λ, the first of which is halved towards the start so many times."""
    angle = torch.arange(5) * (math.tau / 5)
    sde = ss.VP()
    model = ss.GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), std=0.4)
    x = ss.Noise(seed).normal((16, 2), 0, **F64)
    truth = ss.analysis.exact_flow(model)(x, sde.t_of_lam(-2.0), sde.t_of_lam(1.5))
    errors = []
    for n in steps:
        lam = torch.linspace(-2.0, 1.5, n + 1, **F64)
        first = -2.0 + 3.5 / n * 2.0 ** torch.arange(-halvings, 0, **F64)
        plan = AnchoredResidual(0.8, nodes).plan(sde, sde.t_of_lam(torch.cat([lam[:1], first, lam[1:]])))
        errors.append(float((run(plan, model.x0, x) - truth).norm(dim=1).median()))
    return errors


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_the_order_is_the_number_of_nodes_after_short_first_steps(nodes: int, seed: int) -> None:
    coarse, fine = median_errors(nodes, (64, 128), halvings=10, seed=seed)
    assert abs(math.log2(coarse / fine) - nodes) < 0.25, (coarse, fine)


@pytest.mark.parametrize("seed", range(3))
def test_equal_steps_have_order_two_in_the_end(seed: int) -> None:
    """The first step has one node, so its error is of order h²; it exceeds the rest from about 60 steps on."""
    coarse, fine = median_errors(5, (64, 128), halvings=0, seed=seed)
    assert abs(math.log2(coarse / fine) - 2) < 0.25, (coarse, fine)


def test_a_step_to_data_keeps_the_order_of_its_nodes() -> None:
    """∫ s² (c + s²)^{−(p+1)/2} λ^k dλ to λ = ∞ is finite: the last weights are those of the limit."""
    sde = ss.EDM()
    rule = AnchoredResidual(0.5, 3)
    times = [80.0, 5.0, 1.0, 0.3]
    exact = rule.plan(sde, [*times, 0.0]).rows[-1]
    near = rule.plan(sde, [*times, 1e-9]).rows[-1]
    for ours, limit in ((exact.x, near.x), (exact.d, near.d)):
        assert [k for k, _ in ours] == [k for k, _ in limit]
        for (_, a), (_, b) in zip(ours, limit, strict=True):
            assert math.isclose(a, b, rel_tol=1e-7, abs_tol=1e-9), (exact, near)
