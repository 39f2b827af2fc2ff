"""The formulas of the theory page that are often written wrong."""

from __future__ import annotations

import math

import pytest
import torch

import scoresde as ss

F64 = torch.float64
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
BAR = (1 - BETAS).cumprod(0)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("i", [1, 400, 999])
def test_the_standard_deviation_of_ddim_has_eta_and_the_variance_its_square(eta: float, i: int) -> None:
    sde = ss.Discrete(BETAS)
    plan = ss.DDIM(eta).plan(sde, [i + 1.0, float(i)])  # index i is the time i + 1
    ((_, weight),) = plan.rows[-1].z
    before, after = BAR[i], BAR[i - 1]
    wanted = eta * math.sqrt((1 - after) / (1 - before)) * math.sqrt(1 - before / after)
    assert float(weight) == pytest.approx(wanted, rel=1e-9)


def test_the_betas_of_ddpm_and_of_its_limit() -> None:
    betas = ss.processes.betas("linear", 1000)
    assert float(betas[0]) == pytest.approx(1e-4) and float(betas[-1]) == pytest.approx(0.02)
    vp = ss.VP()
    assert vp.g2(0.0) == pytest.approx(1000 * 1e-4) and vp.g2(1.0) == pytest.approx(1000 * 0.02)


def test_the_flow_has_half_of_the_score_and_the_reverse_sde_all_of_it() -> None:
    """The flow keeps the variance of Gaussian data on its course; with the whole score it would not."""
    sde, c = ss.VP(), 0.25
    model = ss.GaussianMixture(sde, torch.zeros(1, 1, dtype=F64), std=c**0.5)
    x, t = torch.tensor([[0.7]], dtype=F64), 0.4
    velocity = model.velocity(x, t)
    half = sde.f(t) * x - 0.5 * sde.g2(t) * model.score(x, t)
    assert torch.allclose(velocity, half, rtol=1e-10)
    variance = lambda s: sde.alpha(s) ** 2 * c + sde.sigma(s) ** 2  # noqa: E731
    slope = (variance(t + 1e-5) - variance(t - 1e-5)) / 2e-5
    assert float(2 * velocity / x) == pytest.approx(slope / variance(t), rel=1e-6)


@pytest.mark.parametrize(("kind", "left"), [("linear", 0.0064), ("scaled_linear", 0.068)])
def test_a_little_signal_is_left_at_the_end(kind: str, left: float) -> None:
    sde = ss.Discrete(ss.processes.betas(kind, 1000))
    assert sde.alpha(sde.T) == pytest.approx(left, rel=0.02)


@pytest.mark.parametrize("solver", [ss.DDPM(), ss.DDIM(1.0), ss.solvers.EulerAncestral()])
def test_the_last_ancestral_step_draws_nothing(solver: ss.solvers.Solver) -> None:
    plan = solver.plan(ss.Discrete(BETAS), [1000.0, 600.0, 200.0, 1.0, 0.0])
    assert any(row.z for row in plan.rows[:-1])
    assert not plan.rows[-1].z
    assert [float(w) for _, w in plan.rows[-1].d] == pytest.approx([1.0]), "the result is the newest denoised state"


def test_third_order_needs_the_exact_second_moment() -> None:
    model = ss.GaussianMixture(ss.VP(), torch.tensor([[0.3, -0.5]]), cov=torch.tensor([[[1.2, 0.4], [0.4, 0.5]]]))
    exact = ss.analysis.convergence_order(ss.DPMSolverPP(3), model, n=8)
    printed = ss.analysis.convergence_order(ss.DPMSolverPP(3, form="published"), model, n=8)
    assert exact.slope == pytest.approx(3, abs=0.25)
    assert printed.slope == pytest.approx(2, abs=0.25)


def test_the_diffusion_of_variance_exploding_belongs_to_its_time() -> None:
    ve, edm, t = ss.VE(), ss.EDM(), 0.6
    r = ve.sigma_max / ve.sigma_min
    assert ve.g2(t) == pytest.approx((ve.sigma_min * r**t) ** 2 * 2 * math.log(r), rel=1e-9)
    assert edm.g2(t) == pytest.approx(2 * t)
