"""What is computed from a table against what happens when it is run."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
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
    gain, _, noise, _ = solve_directions(ss.plan.unroll(plan), SDE, SPECTRUM)
    alpha, sigma = SDE.alpha(1.0), SDE.sigma(1.0)
    variance = gain**2 * (alpha**2 * SPECTRUM + sigma**2) + noise.square().sum(1)
    assert torch.allclose(found.variance, variance, rtol=1e-9)
    assert torch.allclose(found.mean, found.true_mean, atol=0.05) and float(found.mean[0]) == pytest.approx(
        0.3, abs=1e-3
    )


MANY = {
    "DDIM": ss.DDIM(),
    "UniPC": ss.UniPC(3),
    "DPM-Solver-3": ss.solvers.DPMSolver(3),
    "EDM Heun": ss.EDMHeun(),
    "DEIS": ss.solvers.DEIS(3),
    "SDE-DPM-Solver++": ss.SDEDPMSolverPP(2),
    "DDPM": ss.DDPM(),
    "SA-Solver": ss.solvers.SASolver(),
    "EDM stochastic": ss.solvers.EDMStochastic(),
    "SEEDS": ss.solvers.SEEDS(3),
    "Euler–Maruyama": ss.EulerMaruyama(),
}


def by_rows(plan: ss.Plan, mean: float, c: float) -> list[tuple[float, float, float]]:
    """Mean and variance of each state, row by row: D is m + g (x − α m), and all normals are independent.

    The third number is the sum of the absolute values of what is added, by which rounding is measured.
    """
    t = [float(row.t) for row in plan.rows]
    alpha, sigma = [SDE.alpha(u) for u in t], [SDE.sigma(u) for u in t]
    x, d = [np.zeros(2 + plan.draws) for _ in t], {}
    x[0][:2] = alpha[0] * mean, math.hypot(alpha[0] * math.sqrt(c), sigma[0])
    size, of_d = [float(np.abs(x[0]).max()) for _ in t], {}
    for r, row in enumerate(plan.rows):
        if r:
            x[r] = sum((w * x[k] for k, w in row.x), 0 * x[r]) + sum((w * d[k] for k, w in row.d), 0 * x[r])
            size[r] = sum(abs(w) * size[k] for k, w in row.x) + sum(abs(w) * of_d[k] for k, w in row.d)
            x[r][0] += row.one
            for k, w in row.z:
                x[r][2 + k] += w
        if row.evaluates:
            gain = alpha[r] * c / (alpha[r] ** 2 * c + sigma[r] ** 2)
            d[r] = gain * x[r]
            d[r][0] += mean - gain * alpha[r] * mean
            of_d[r] = gain * size[r] + abs(mean - gain * alpha[r] * mean)
    return [(float(v[0]), float(v[1:] @ v[1:]), max(1.0, bound)) for v, bound in zip(x, size, strict=True)]


@pytest.mark.parametrize("name", MANY)
def test_moments_are_those_of_the_rows(name: str) -> None:
    for grid in (GRID, ss.grids.ancestral(SDE, GRID)):
        plan = MANY[name].plan(SDE, grid)
        nodes = [r for r, row in enumerate(plan.rows) if row.node is not None]
        found = analysis.exact_moments(plan, SDE, mean=[0.3, -0.5, 2.0], spectrum=[0.2, 0.0, 9.0])
        for k, (mean, c) in enumerate([(0.3, 0.2), (-0.5, 0.0), (2.0, 9.0)]):
            want = by_rows(plan, mean, c)
            for r, (node, t, means, variances) in zip(nodes, found.path, strict=True):
                assert (node, t) == (plan.rows[r].node, plan.rows[r].t)
                size = want[r][2]
                assert float(means[k]) == pytest.approx(want[r][0], abs=2e-14 * size)
                assert float(variances[k]) == pytest.approx(want[r][1], abs=2e-14 * size**2)


@pytest.mark.parametrize("name", MANY)
def test_a_defect_is_that_of_the_rows(name: str) -> None:
    plan, x0 = MANY[name].plan(SDE, GRID), 1.3
    gaps = []
    for row, (mean, variance, _) in zip(plan.rows[1:], by_rows(plan, x0, 0.0)[1:], strict=True):
        if row.node is not None:
            alpha, sigma = SDE.alpha(float(row.t)), SDE.sigma(float(row.t))
            gaps.append(max(abs(mean - alpha * x0), abs(math.sqrt(variance) - sigma)) / math.hypot(alpha * x0, sigma))
    assert analysis.point_mass_defect(plan, SDE, x0=x0) == pytest.approx(max(gaps), rel=1e-12, abs=1e-13)


def test_constants_of_the_rows_move_the_mean_alone() -> None:
    plan = PLANS["SDE-DPM-Solver++"]
    last = plan.rows[-1]
    moved = replace(plan, rows=(*plan.rows[:-1], replace(last, one=0.25)))
    a, b = (analysis.exact_moments(p, SDE, mean=0.3, spectrum=SPECTRUM) for p in (plan, moved))
    assert torch.allclose(b.mean, a.mean + 0.25, rtol=1e-14) and torch.equal(b.variance, a.variance)


def test_moments_are_differentiable_in_the_weights() -> None:
    plan = PLANS["UniPC"]

    def variance(factor: Tensor) -> Tensor:
        rows = [replace(row, d=tuple((k, factor * w) for k, w in row.d)) for row in plan.rows]
        return analysis.exact_moments(replace(plan, rows=tuple(rows)), SDE, spectrum=SPECTRUM).variance.sum()

    factor = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(variance(factor), factor)
    h = 1e-5
    high, low = (float(variance(factor.detach() + e)) for e in (h, -h))
    assert float(slope) == pytest.approx((high - low) / (2 * h), rel=1e-8)


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


COSINE = ss.Discrete(ss.processes.betas("cosine", 100))


@pytest.mark.parametrize("predicts", ["x0", "eps", "score", "v", "velocity", "F"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow(T=0.95), COSINE], ids=["VP", "EDM", "Flow", "Discrete"])
def test_amplification_is_the_move_of_every_state_by_the_worst_errors_of_a_network(sde: ss.SDE, predicts: str) -> None:
    plan = ss.UniPC(3).plan(sde, ss.grids.quadratic_vp(sde, 5))
    scaled = {"precondition": ss.denoisers.Preconditioning(0.5)} if predicts == "F" else {}

    def states(errors: list[float]) -> Tensor:
        given, seen = iter(errors), []

        def denoise(x: Tensor, t: Any) -> Tensor:
            seen.append(x)
            error = next(given)
            exact, off = (
                ss.Denoiser(lambda x, t, v=v: torch.full_like(x, v), sde, predicts=predicts, **scaled).x0(x, t)
                for v in (0.0, error)
            )
            return 0.3 + off - exact  # the same for every x

        seen.append(run(plan, denoise, torch.ones(1, 1, dtype=torch.float64)))
        return torch.cat(seen).reshape(-1)

    n, delta = plan.nfe, 0.01
    clean = states([0.0] * n)
    each = torch.stack([states([delta * (j == k) for j in range(n)]) - clean for k in range(n)])  # (n, n + 1)
    found = analysis.amplification(plan, sde, predicts, sigma_data=0.5)
    torch.testing.assert_close(each.abs().sum(0) / delta, found, rtol=1e-6, atol=1e-6)
    worst = [delta * float(sign) for sign in each[:, -1].sign()]
    torch.testing.assert_close((states(worst) - clean)[-1] / delta, found[-1], rtol=1e-6, atol=1e-6)


def test_differences_of_predictions_at_almost_pure_noise_amplify_errors() -> None:
    """A step of the default grid is fifteen times as long as the one before, and weights grow with this ratio."""
    sde = ss.Discrete(ss.processes.betas("cosine", 1000))
    plan = ss.VelocityAB(3).plan(sde, ss.grids.quadratic_vp(sde, 8))
    assert [round(w, 1) for _, w in plan.rows[3].d] == [1.8, -16.8, 15.3]
    factors = analysis.amplification(plan, sde)
    assert float(factors[3]) > 30 and float(factors[-1]) == pytest.approx(plan.amplification, rel=1e-12)
    assert float(analysis.amplification(ss.VelocityAB(2).plan(sde, plan.times), sde).max()) < 3
    assert float(analysis.amplification(plan, sde, "eps")[3]) > 1e5  # σ/α is 20000 at the start


def test_errors_of_eps_where_there_is_no_data_have_no_bound() -> None:
    plan = ss.DDIM().plan(ss.Flow(), [1.0, 0.5, 0.0])
    assert analysis.amplification(plan, ss.Flow(), "eps").tolist() == [0.0, math.inf, 0.5 / 0.5]
    assert analysis.amplification(plan, ss.Flow(), "velocity").tolist() == [0.0, 0.5, 0.5]
    with pytest.raises(ValueError, match="`predicts`"):
        analysis.amplification(plan, ss.Flow(), "noise")
    with pytest.raises(ValueError, match="`sigma_data`"):
        analysis.amplification(plan, ss.Flow(), "F", sigma_data=0.0)


def test_more_steps_come_closer() -> None:
    for solver in (ss.DDIM(), ss.SDEDPMSolverPP(2)):
        errors = [analysis.weak_error(solver.plan(SDE, ss.grids.karras(SDE, n)), SDE, SPECTRUM) for n in (10, 20, 40)]
        assert errors[0] > 1.5 * errors[1] > 2.2 * errors[2], (solver, errors)


def test_figures_are_drawn() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    ax = plots.response([PLANS["DDIM"], PLANS["ancestral"]], SDE)
    assert len(ax.lines) == 3
    assert len(plots.stability([PLANS["DDIM"], PLANS["UniPC"]], SDE).lines) == 3


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`spectrum`"):
        analysis.response(PLANS["DDIM"], SDE, [-1.0])
    with pytest.raises(ValueError, match="draws noise"):
        analysis.flow_error(PLANS["ancestral"], SDE, 1.0)
