"""Rules with few steps: exact standard deviations on Gaussian data, and the warning of `solve`."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace
from functools import cache

import pytest
import torch

import scoresde as ss
from scoresde.analysis.moments import gaussian_stds, response
from scoresde.sampling.few_steps import verdict, warn_of_few_steps
from scoresde.solvers import stochastic
from scoresde.solvers.rule import EtaWithin, Solver

PROCESSES: dict[str, ss.SDE] = {
    cls.__name__: cls() for cls in (ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.EDM, ss.Flow, ss.Trig)
}
COUNTS = (10, 20, 40)


def defaults() -> dict[str, Solver]:
    """Every stochastic function of the catalogue, called without arguments, and rules that take noise by an option."""
    rules: dict[str, Solver] = {"DDIM(1)": ss.DDIM(1.0), "Euler–Maruyama in λ": ss.EulerMaruyama(clock="lam")}
    for name, fn in inspect.getmembers(stochastic, inspect.isfunction):
        if (
            name[0] != "_"
            and inspect.signature(fn).return_annotation == "Solver"
            and fn.__module__ == stochastic.__name__
        ):
            rules[name] = fn()
    return rules


DEFAULTS = defaults()
# Rules whose error on Gaussian data is at most c/N from 10 steps on, on every process: those of first order lose the
# variance of x0 given x in every step, and no step adds noise that a later one fails to remove.
BEARING = (
    "DDIM(1)",
    "DDPM",
    "DPM2Ancestral",
    "DPMPP2SAncestral",
    "DPMPPSDE",
    "EDMStochastic",
    "ERSDE",
    "EulerAncestral",
    "SASolver",
)


@cache
def plan_of(rule: str, process: str, steps: int) -> ss.Plan:
    sde = PROCESSES[process]
    return DEFAULTS[rule].plan(sde, ss.grids.quadratic_vp(sde, steps))


def warned(plan: ss.Plan, sde: ss.SDE) -> bool:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_few_steps(plan, sde)
    return bool(caught)


@pytest.mark.parametrize("rule", BEARING)
def test_the_error_of_a_default_is_at_most_of_first_order_from_ten_steps_on(rule: str) -> None:
    """|std/exact - 1| <= c/N. DDPM has the largest c of the list, 3.4 at std 0.6; data of 0.05 are a detail of a size
    that ten steps do not resolve, and there the largest c is 9.7."""
    for process, sde in PROCESSES.items():
        for steps in COUNTS:
            plan = plan_of(rule, process, steps)
            stds = torch.tensor([1.0, 0.6, 0.3, 0.05], dtype=torch.float64)
            largest = torch.tensor([4.0, 4.0, 4.5, 10.0], dtype=torch.float64) / steps
            found = ss.analysis.exact_moments(plan, sde, spectrum=stds**2).variance.sqrt()
            assert bool(((found / stds - 1).abs() <= largest).all()), (process, steps, found / stds)
            assert not warned(plan, sde), (process, steps)


@pytest.mark.parametrize("rule", [rule for rule in DEFAULTS if rule != "ConsistencySampling"])
def test_a_rule_that_cannot_bear_its_steps_says_so(rule: str) -> None:
    """Of standard deviations that the check does not try; 6/N is the bound of the second-order extrapolation."""
    for process, sde in PROCESSES.items():
        for steps in COUNTS:
            plan = plan_of(rule, process, steps)
            if warned(plan, sde):
                assert steps < 40, (process, steps)
                continue
            stds = torch.tensor([0.8, 0.6, 0.3, 0.1, 0.03, 0.007, 0.0], dtype=torch.float64)
            found = ss.analysis.exact_moments(plan, sde, spectrum=stds**2).variance.sqrt()
            assert bool(((found / stds - 1).abs()[1:3] <= 6 / steps).all()), (process, steps, found / stds)
            assert bool((found - stds <= 0.3).all()), (process, steps, found)


def test_rules_that_amplify_noise_are_told_from_those_that_do_not() -> None:
    bad = {rule for rule in DEFAULTS for name, sde in PROCESSES.items() if warned(plan_of(rule, name, 10), sde)}
    assert bad == {
        "Euler–Maruyama in λ",
        "EulerMaruyama",  # VE
        "ReverseDiffusion",  # VE, EDM and Flow
        "SDEDPMSolver",
        "SDEDPMSolverPP",  # SubVP, Flow and Trig
        "SEEDS",
        "StochasticHeun",  # VE and EDM
    }


def test_sa_solver_of_many_nodes_warns_and_the_default_does_not() -> None:
    sde = ss.SubVP()
    grid = ss.grids.quadratic_vp(sde, 10)
    many = ss.solvers.SASolver(3, 4, 1.0).plan(sde, grid)
    assert float(ss.analysis.exact_moments(many, sde, spectrum=0.36).variance.sqrt()) > 5
    assert warned(many, sde)
    assert not warned(ss.solvers.SASolver().plan(sde, grid), sde)


def test_the_standard_deviations_are_those_of_the_exact_moments() -> None:
    stds = [1.3, 0.6, 0.05, 0.0]
    for name, sde in (item for item in PROCESSES.items() if item[0] in ("VP", "VE", "Flow")):
        for solver in (*DEFAULTS.values(), ss.UniPC(3), ss.VelocityAB(3)):
            for window in ({}, {"t_start": 0.6 * sde.T}, {"t_start": 0.7 * sde.T, "t_end": 0.2 * sde.T}):
                plan = solver.plan(sde, ss.grids.quadratic_vp(sde, 5, **window))
                exact = response(plan, sde, [s**2 for s in stds])
                found, truth = (
                    torch.tensor(v, dtype=torch.float64) for v in zip(*gaussian_stds(plan, sde, stds), strict=True)
                )
                torch.testing.assert_close(found, exact.variance.sqrt(), rtol=1e-9, atol=1e-9, msg=f"{name} {solver}")
                torch.testing.assert_close(truth, exact.true_variance.sqrt(), rtol=1e-12, atol=1e-12)


def test_the_worst_sample_counts_if_each_has_its_own_grid() -> None:
    sde = ss.VP()
    grids = [ss.grids.quadratic_vp(sde, 6), ss.grids.uniform_lam(sde, 6)]
    for solver in (ss.DDPM(), ss.solvers.SASolver(3, 4, 1.0)):
        [(found, exact)] = gaussian_stds(solver.plan(sde, torch.stack(grids, 1)), sde, [0.5])
        alone = [gaussian_stds(solver.plan(sde, grid), sde, [0.5])[0][0] for grid in grids]
        assert found == pytest.approx(max(alone, key=lambda v: abs(v - exact)), rel=1e-9)


def test_solve_and_sample_warn_with_the_number_and_show_the_line_of_the_user() -> None:
    model = ss.GaussianMixture(ss.SubVP(), torch.zeros(1, 2), std=0.5)
    for call in (ss.sample, ss.solve):
        with pytest.warns(
            UserWarning, match=r"SASolver\(.*is inaccurate with so few steps: after these 10 evaluations"
        ) as all_:
            call(model, (2, 2), ss.solvers.SASolver(3, 4, 1.0), steps=10, seed=0)
        assert all_[0].filename == __file__
    with pytest.warns(UserWarning, match="few steps"):
        ss.solve(model, (2, 2), ss.sampling.Parallel(ss.solvers.SASolver(3, 4, 1.0)), steps=10, seed=0)
    with pytest.warns(UserWarning, match="few steps"):
        ss.sampling.Stepper.of(model, (2, 2), ss.solvers.SASolver(3, 4, 1.0), steps=10, seed=0)


def test_solve_does_not_warn_of_rules_that_bear_their_steps() -> None:
    model = ss.GaussianMixture(ss.SubVP(), torch.zeros(1, 2), std=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rule in BEARING:
            ss.sample(model, (2, 2), DEFAULTS[rule], steps=10, seed=0)
        ss.sample(model, (2, 2), ss.solvers.ConsistencySampling(), steps=2, seed=0)
        ss.sample(model, (2, 2), ss.UniPC(3), steps=20, seed=0)
        ss.sample(model, (2, 2), ss.DDIM(), steps=1, seed=0)  # the way of distilled networks
        corrector = ss.sampling.LangevinCorrector(seed=1)  # the plan does not know what a hook does
        ss.sample(model, (2, 2), ss.solvers.SEEDS(), steps=10, seed=0, watch=ss.Watch(hook=corrector))
        # A quarter of the standard deviation of the data: the same plan on data that are ten times as wide.
        ss.sample(model, (2, 2), ss.SDEDPMSolverPP(2), steps=20, seed=0, start=ss.Start(data_std=0.5))


SOUND: dict[str, Solver] = {
    "DDIM": ss.DDIM(),
    "DPM-Solver-2M": ss.solvers.DPMSolver(2, kind="multi"),
    "DPM-Solver-3": ss.solvers.DPMSolver(3),
    "DEIS": ss.solvers.DEIS(3),
    "LMS": ss.solvers.LMS(),
    "IPNDM": ss.solvers.IPNDM(),
    "RES": ss.solvers.RES(3),
    "ETDRK4": ss.solvers.ETDRK4(),
    **{f"VelocityAB-{p}": ss.VelocityAB(p) for p in (1, 2, 3, 4)},
}
COSINE = ss.Discrete(ss.processes.betas("cosine", 1000))


@pytest.mark.parametrize("rule", SOUND)
def test_deterministic_rules_that_bear_four_steps_do_not_warn(rule: str) -> None:
    """On the default grid: the error of data of std 1 is at most 2/N, and there is no warning."""
    for sde in (*PROCESSES.values(), COSINE):
        for steps in (4, 5, 6, 8, 10, 20):
            plan = SOUND[rule].plan(sde, ss.grids.quadratic_vp(sde, steps))
            assert not warned(plan, sde), (sde, steps)
            found = float(ss.analysis.exact_moments(plan, sde).variance.sqrt())
            assert abs(found - 1) <= 2.0 / steps, (sde, steps, found)


def test_deterministic_rules_that_extrapolate_too_far_warn() -> None:
    """By the exact standard deviation of a direction that the check does not try."""
    sub, edm = ss.SubVP(), ss.EDM()
    cases: list[tuple[Solver, ss.SDE, int, bool]] = [
        (ss.UniPC(3), sub, 10, True),
        (ss.UniPC(4), edm, 10, True),
        (ss.solvers.DPMSolverPP(3), sub, 8, True),
        (ss.EDMHeun(), edm, 5, True),
        (ss.solvers.Euler(), ss.VE(), 6, True),
        (ss.UniPC(3), sub, 20, False),
        (ss.EDMHeun(), edm, 10, False),
        (ss.DPMSolverPP(2), edm, 10, False),
    ]
    for solver, sde, steps, bad in cases:
        plan = solver.plan(sde, ss.grids.quadratic_vp(sde, steps))
        assert warned(plan, sde) == bad, (solver, sde, steps)
        found = ss.analysis.exact_moments(plan, sde, spectrum=torch.tensor([0.9, 0.6, 0.02]) ** 2).variance.sqrt()
        wider = float((found - torch.tensor([0.9, 0.6, 0.02])).max())
        assert (wider > 0.2) == bad, (solver, sde, steps, found)


@pytest.mark.parametrize("predicts", ["velocity", "eps"])
def test_the_defaults_warn_only_where_the_result_is_bad(predicts: str) -> None:
    """With at least three evaluations; the only such results: ε-networks on cosine lists of β with few steps."""
    bad = set()
    for name, sde in {**PROCESSES, "Discrete cosine": COSINE}.items():
        if predicts == "eps" and sde.alpha(sde.T) < 1e-12:
            continue  # ε does not determine the data there
        net = ss.Denoiser(lambda x, t: x, sde, predicts=predicts)
        for nfe in (*range(1, 13), 16, 20):
            plan = ss.sampling.plan_for(net, nfe=nfe)
            found = float(ss.analysis.exact_moments(plan, sde).variance.sqrt())
            if warned(plan, sde):
                assert abs(found - 1) > 0.25, (name, nfe, found)
                bad.add((name, nfe))
            assert warned(plan, sde) or nfe < 3 or found < 1.25, (name, nfe, found)
    assert bad == ({("Discrete cosine", nfe) for nfe in (3, 4)} if predicts == "eps" else set())


def test_a_run_that_ends_in_noise_is_measured_by_the_noise() -> None:
    """Two percent of σ = 80 are 1.6 times the standard deviation of the data."""
    sde = ss.EDM()
    model = ss.GaussianMixture(sde, torch.zeros(1, 2), std=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ss.encode(model, torch.ones(2, 2), ss.DDIM(), steps=30)
        ss.sample(model, (2, 2), ss.DDIM(), steps=4, t_end=20.0, seed=0)


def test_solve_warns_of_deterministic_plans_and_does_not_advise_less_noise() -> None:
    model = ss.GaussianMixture(ss.SubVP(), torch.zeros(1, 2), std=0.5)
    with pytest.warns(
        UserWarning, match=r"UniPC\(.*is inaccurate with so few steps.*a lower order or another solver"
    ) as all_:
        ss.sample(model, (2, 2), ss.UniPC(3), steps=10, grid=ss.grids.quadratic_vp, seed=0)
    assert all_[0].filename == __file__


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_within_an_interval_of_noise_levels_is_the_same_on_every_process(name: str) -> None:
    sde = PROCESSES[name]
    rho = torch.tensor([20.0, 9.0, 4.0, 2.0, 1.0, 0.5, 0.2, 0.1], dtype=torch.float64)
    grid = sde.t_of_lam(-rho.log())
    for solver in (ss.SDEDPMSolverPP(1, eta=EtaWithin(0.8, 0.4, 5.0)), ss.DDIM(EtaWithin(0.8, 0.4, 5.0))):
        rows = [row for row in solver.plan(sde, grid).rows if row.node]
        assert [bool(row.z) for row in rows] == [0.4 <= r <= 5 for r in rho.tolist()[1:]]
    by_time = ss.SDEDPMSolverPP(1, eta=lambda t: 0.8 if 0.4 <= sde.sigma(t) / sde.alpha(t) <= 5 else 0.0)
    a, b = (s.plan(sde, grid).rows for s in (ss.SDEDPMSolverPP(1, eta=EtaWithin(0.8, 0.4, 5.0)), by_time))
    assert [(r.x, r.d, r.z) for r in a] == [(r.x, r.d, r.z) for r in b]


def test_noise_within_an_interval_follows_the_grid_of_each_sample() -> None:
    sde = ss.VP()
    solver = ss.SDEDPMSolverPP(2, eta=EtaWithin(1.0, 0.5, 25.0))
    grids = [ss.grids.quadratic_vp(sde, 6), ss.grids.uniform_lam(sde, 6)]
    [both] = gaussian_stds(solver.plan(sde, torch.stack(grids, 1)), sde, [0.5])
    alone = [gaussian_stds(solver.plan(sde, grid), sde, [0.5])[0] for grid in grids]
    assert both[0] == pytest.approx(max(alone, key=lambda v: abs(v[0] - v[1]))[0], rel=1e-9)


def test_an_interval_is_checked() -> None:
    with pytest.raises(ValueError, match=r"`high` must be above `low` = 2, got 1"):
        EtaWithin(1.0, 2.0, 1.0)
    with pytest.raises(ValueError, match="`eta` must be finite and at least 0, got -1"):
        EtaWithin(-1.0)


def test_a_fitted_plan_is_judged_by_its_fit() -> None:
    sde = ss.SubVP()
    plan = ss.UniPC(3).plan(sde, ss.grids.quadratic_vp(sde, 10))
    assert verdict(plan, sde) is not None
    fitted = replace(plan, order=None, meta={"held_out": {"before": 1.0, "after": 0.1}})
    assert verdict(fitted, sde) is None and verdict(replace(fitted, meta={}), sde) is not None
