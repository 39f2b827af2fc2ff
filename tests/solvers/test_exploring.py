"""Solvers made for reinforcement learning: published updates, marginals by exact moments, orders."""

from __future__ import annotations

import math
from itertools import pairwise

import published as pub
import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis import exact_moments, point_mass_defect, weak_order
from scoresde.plan.run import run
from scoresde.solvers import CPS, FlowSDE, ReverseEuler, Solver

F64 = torch.float64
SDES: dict[str, ss.SDE] = {"VP": ss.VP(), "Flow": ss.Flow(), "EDM": ss.EDM(), "VE": ss.VE(), "Trig": ss.Trig()}
NOISE = ss.Noise(3)


def half(t: Tensor) -> Tensor:
    return 0.5 + 0.3 * t


def root(t: Tensor) -> Tensor:
    return 0.8 * t.sqrt()


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]], std=[0.5, 0.4, 0.6], weights=[1.0, 2.0, 1.5])


def start(n: int = 4) -> Tensor:
    return ss.Noise(0).normal((n, 2), 0, dtype=F64)


def close(a: Tensor, b: Tensor, limit: float = 1e-12) -> bool:
    return float((a - b).abs().max() / b.abs().max()) < limit


@pytest.mark.parametrize("a", [0.7, 1.3])
@pytest.mark.parametrize("first", [1.0, 0.97])
def test_flow_sde_is_the_published_update_on_the_flow(a: float, first: float) -> None:
    model, grid = mixture(ss.Flow()), torch.tensor([first, 0.9, 0.66, 0.4, 0.17, 0.0], dtype=F64)
    x, z = start(), [NOISE.like(start(), k) for k in range(5)]
    ours = run(FlowSDE(a).plan(model.sde, grid), model.x0, x, NOISE)
    assert close(ours, pub.flow_sde(model.x0, x, grid, a, z))


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("eta", [0.3, 0.8, 1.0])
def test_cps_is_the_published_update_on_every_process(name: str, eta: float) -> None:
    sde = SDES[name]
    model, grid = mixture(sde), ss.grids.quadratic_vp(sde, 5, t_start=0.9 * sde.T)
    x, z = start() * sde.sigma(0.9 * sde.T), [NOISE.like(start(), k) for k in range(5)]
    ours = run(CPS(eta).plan(sde, grid), model.x0, x, NOISE)
    assert close(ours, pub.cps(model.x0, x, grid, sde.alpha, sde.sigma, eta, z))


def test_cps_without_old_noise_is_consistency_sampling_and_without_fresh_noise_ddim() -> None:
    for sde in SDES.values():
        grid = ss.grids.quadratic_vp(sde, 6)
        for ours, known in ((CPS(1.0), ss.solvers.ConsistencySampling()), (CPS(0.0), ss.DDIM())):
            assert ours.plan(sde, grid).rows == known.plan(sde, grid).rows


def inner(sde: ss.SDE) -> Tensor:
    """A grid between finite λ."""
    lam = torch.tensor([-2.2, -1.0, -0.6, 0.1, 1.2, 2.0], dtype=F64)
    return sde.t_of_lam(lam)


@pytest.mark.parametrize("name", SDES)
def test_flow_sde_is_the_reverse_sde_of_constant_eta_on_every_process(name: str) -> None:
    """s² = a² g²/2, so η = a/√2."""
    model = mixture(SDES[name])
    plans = [s.plan(model.sde, inner(model.sde)) for s in (FlowSDE(0.9), ss.EulerMaruyama(0.9 / math.sqrt(2)))]
    x = start() * model.sde.sigma(float(inner(model.sde)[0]))
    ours, known = (run(plan, model.x0, x, NOISE) for plan in plans)
    assert close(ours, known)


@pytest.mark.parametrize("name", SDES)
def test_a_step_is_the_drift_and_the_diffusion_of_the_reverse_sde(name: str) -> None:
    """x + [v − s²/2 · score] h + s √(−h) z, with the model's own velocity and score."""
    model = mixture(SDES[name])
    sde = model.sde
    s, t = 0.6 * sde.T, 0.55 * sde.T
    x, g = start() * sde.sigma(s), 0.5 + 0.3 * s
    ours = run(ReverseEuler(half).plan(sde, torch.tensor([s, t], dtype=F64)), model.x0, x, NOISE)
    mean = x + (model.velocity(x, s) - 0.5 * g**2 * model.score(x, s)) * (t - s)
    assert close(ours, mean + g * math.sqrt(s - t) * NOISE.like(x, 0))


@pytest.mark.parametrize("solver", [FlowSDE(1.4), ReverseEuler(half), ReverseEuler(root)], ids=repr)
@pytest.mark.parametrize("name", ["VP", "Flow"])
def test_the_marginals_are_those_of_the_process_for_any_diffusion(solver: Solver, name: str) -> None:
    """Noise without its drift, as in a public flow-matching sampler, has weak order 0: here it is 1."""
    order = weak_order(solver, SDES[name], steps=(80, 160))
    assert abs(order.slope - 1) < 0.2, order


class NoiseWithoutDrift(Solver):
    """Euler on the flow, plus noise, without the drift that makes up for it."""

    order = 1

    def leg(self, tape: ss.solvers.Tape, leg: ss.solvers.Leg) -> tuple[int, list[int]]:
        s, t = tape.ends(leg)
        h, pull = t.t - s.t, tape.sde.sigma_dot(s.t) / s.sigma
        d = [(leg.history[0], h * (tape.sde.alpha_dot(s.t) - pull * s.alpha))]
        z = [(tape.draw(), s.t.sqrt() * (-h).sqrt())]
        new = tape.append(leg.t, x=[(leg.row, 1 + h * pull)], d=d, z=z, evaluates=leg.evaluates, node=leg.node)
        return new, [new]


def test_trap_noise_without_drift_widens_the_samples() -> None:
    sde, grid = ss.Flow(), torch.linspace(0.95, 0.05, 200, dtype=F64)
    widened, ours = (
        exact_moments(s.plan(sde, grid), sde, mean=0.3, spectrum=[1.0], start="marginal")
        for s in (NoiseWithoutDrift(), ReverseEuler(lambda t: t.sqrt()))
    )
    truth = sde.alpha(0.05) ** 2 + sde.sigma(0.05) ** 2
    assert float(widened.variance) > 1.25 * truth
    assert abs(float(ours.variance) / truth - 1) < 0.01


def cps_variance(times: list[float], eta: float, c: float) -> float:
    """Variance of CPS on N(0, c) under the flow, started at the marginal: one recursion of numbers."""
    old, new = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
    v = (1 - times[0]) ** 2 * c + times[0] ** 2
    for s, t in pairwise(times):
        gain = (1 - s) * c / ((1 - s) ** 2 * c + s**2)
        of_x = (1 - t) * gain + t * old * (1 - (1 - s) * gain) / s
        v = of_x**2 * v + (t * new) ** 2
    return v


@pytest.mark.parametrize("eta", [0.2, 0.5, 0.8])
def test_cps_preserves_coefficients_and_not_variances(eta: float) -> None:
    """Exact for one point. On a Gaussian it is too narrow, and more steps do not mend it, as they mend DDIM(η)."""
    sde, c = ss.Flow(), 1.0
    grid = torch.linspace(0.99, 0.05, 51, dtype=F64)
    assert float(point_mass_defect(CPS(eta).plan(sde, grid), sde)) < 1e-12
    found = exact_moments(CPS(eta).plan(sde, grid), sde, mean=0.0, spectrum=[c], start="marginal")
    assert float(found.variance) == pytest.approx(cps_variance(grid.tolist(), eta, c), rel=1e-10)
    truth = 0.95**2 * c + 0.05**2
    few, many = (1 - cps_variance([0.99 - 0.94 * k / n for k in range(n + 1)], eta, c) / truth for n in (2000, 20000))
    assert many > 0.02 and abs(few - many) < 0.1 * many
    ddim = [
        exact_moments(ss.DDIM(eta).plan(sde, grid), sde, mean=0.0, spectrum=[c], start="marginal")
        for grid in (grid, torch.linspace(0.99, 0.05, 201, dtype=F64))
    ]
    coarse, fine = (abs(1 - float(m.variance) / truth) for m in ddim)
    assert fine < 0.35 * coarse


def test_ddim_eta_with_the_share_of_cps_is_the_same_step() -> None:
    """η′ = sin(πη/2)/√(1 − e^{−2h}): DDIM(η) has the noise of CPS divided by that of the step."""
    sde = ss.VP()
    grid = inner(sde)
    h = float(sde.lam(float(grid[1])) - sde.lam(float(grid[0])))
    eta = math.sin(0.3 * math.pi / 2) / math.sqrt(-math.expm1(-2 * h))
    for a, b in zip(CPS(0.3).plan(sde, grid[:2]).rows[1:], ss.DDIM(eta).plan(sde, grid[:2]).rows[1:], strict=True):
        for ours, theirs in ((a.x, b.x), (a.d, b.d), (a.z, b.z)):
            assert all(abs(float(u) - float(v)) < 1e-12 for (_, u), (_, v) in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("solver", [FlowSDE(), ReverseEuler(half), CPS(0.5)], ids=repr)
def test_every_step_has_one_evaluation_and_at_most_one_normal_of_its_own(solver: Solver) -> None:
    for sde in SDES.values():
        plan = solver.plan(sde, ss.grids.quadratic_vp(sde, 8))
        assert plan.nfe == 8 and plan.draws == 7 and len(plan) == 9
        assert plan.rows[-1].z == () and plan.rows[-1].d == ((7, 1.0),)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"`noise_level` must be .* at most 1"):
        CPS(1.1)
    with pytest.raises(ValueError, match=r"`diffusion` must be finite and at least 0, got -1"):
        ReverseEuler(lambda t: -1.0).plan(ss.VP(), [0.5, 0.1])
    with pytest.raises(ValueError, match="drop `noise_level`"):
        ss.solvers.GivenDiffusion(half, 0.5)
