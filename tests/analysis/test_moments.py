"""What is computed from a table against what happens when it is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import analysis, plots
from scoresde.analysis.moments import solve_directions
from scoresde.plan.run import run

SDE = ss.VP()
GRID = ss.grids.karras(SDE, 8)
SPECTRUM = torch.tensor([0.01, 0.25, 1.0, 9.0], dtype=torch.float64)
PLANS: dict[str, Any] = {
    "DDIM": ss.DDIM().plan(SDE, GRID),
    "UniPC": ss.UniPC(2).plan(SDE, GRID),
    "single steps": ss.solvers.DPMSolver(3).plan(SDE, GRID),
    "ancestral": ss.DDIM().plan(SDE, ss.grids.ancestral(SDE, GRID)),
    "SDE-DPM-Solver++": ss.SDEDPMSolverPP(2).plan(SDE, GRID),
}


def gaussian(mean: Tensor | None = None) -> ss.Gaussian:
    return ss.Gaussian(SDE, torch.zeros(4) if mean is None else mean, SPECTRUM)


@pytest.mark.parametrize("name", PLANS)
def test_the_triangular_system_gives_the_exact_moments(name: str) -> None:
    plan = PLANS[name]
    found = analysis.response(plan, SDE, SPECTRUM, mean=0.3)
    gain, _, noise, _ = solve_directions(analysis.unroll(plan), SDE, SPECTRUM)
    alpha, sigma = SDE.alpha(1.0), SDE.sigma(1.0)
    variance = gain**2 * (alpha**2 * SPECTRUM + sigma**2) + noise.square().sum(1)
    assert torch.allclose(found.variance, variance, rtol=1e-9)
    assert torch.allclose(found.mean, found.true_mean, atol=0.05) and float(found.mean[0]) == pytest.approx(
        0.3, abs=1e-3
    )


@pytest.mark.parametrize("name", PLANS)
def test_the_response_is_what_samples_show(name: str) -> None:
    plan, model = PLANS[name], gaussian(torch.full((4,), 0.5))
    x = ss.sample(model, model.sample(20_000, 1.0, seed=0), plan, seed=1)
    found = analysis.response(plan, SDE, SPECTRUM, mean=0.5)
    assert torch.allclose(x.var(0), found.variance, rtol=0.06)
    assert torch.allclose(x.mean(0), found.mean, atol=0.07)


@pytest.mark.parametrize("name", ["DDIM", "UniPC", "single steps"])
def test_the_distance_from_the_flow_is_that_of_a_run(name: str) -> None:
    plan, model = PLANS[name], gaussian()
    x = model.sample(20_000, 1.0, seed=0)
    gap = (run(plan, model.x0, x) - model.flow(x, 1.0, 0.0)).square().mean().sqrt()
    assert analysis.flow_error(plan, SDE, SPECTRUM) == pytest.approx(float(gap), rel=0.05)


@pytest.mark.parametrize("name", ["DDIM", "UniPC", "single steps"])
def test_sensitivities_are_derivatives(name: str) -> None:
    plan, model = PLANS[name], gaussian()
    n = plan.nfe
    errors = torch.zeros(n, 1, 4, dtype=torch.float64, requires_grad=True)

    def result(x: Tensor, errors: Tensor) -> Tensor:
        k = iter(range(n))
        return run(plan, lambda y, t: model.x0(y, t) + errors[next(k)], x)

    x = model.sample(1, 1.0, seed=0).requires_grad_(True)
    of_x, of_d = torch.autograd.grad(result(x, errors).sum(), (x, errors))
    found = analysis.stability(plan, SDE, SPECTRUM)
    assert torch.allclose(of_d[:, 0].mT, found.sensitivity, atol=1e-10)
    flow = SPECTRUM / (SDE.alpha(1.0) ** 2 * SPECTRUM + SDE.sigma(1.0) ** 2)
    assert torch.allclose(of_x[0], found.amplification * flow.sqrt(), atol=1e-10)
    assert bool((found.largest >= found.amplification.abs() - 1e-12).all()) and found.noise.shape == (4,)


def test_more_steps_come_closer() -> None:
    for solver in (ss.DDIM(), ss.SDEDPMSolverPP(2)):
        errors = [analysis.weak_error(solver.plan(SDE, ss.grids.karras(SDE, n)), SDE, SPECTRUM) for n in (10, 20, 40)]
        assert errors[0] > 1.5 * errors[1] > 2.2 * errors[2], (solver, errors)


def test_figures_are_drawn() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = plots.plot_response([PLANS["DDIM"], PLANS["ancestral"]], SDE)
    assert len(ax.lines) == 3
    assert len(plots.plot_stability([PLANS["DDIM"], PLANS["UniPC"]], SDE).lines) == 3


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`spectrum`"):
        analysis.response(PLANS["DDIM"], SDE, [-1.0])
    with pytest.raises(ValueError, match="draws noise"):
        analysis.flow_error(PLANS["ancestral"], SDE, 1.0)
