"""The tools that measure solvers, measured: orders, flows, defects, residuals and budgets with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import point_mass_defect
from scoresde.analysis.orders import Order, convergence_order, exact_flow, order_residuals
from scoresde.analysis.work import work_precision
from scoresde.plan.rows import Row
from scoresde.plan.run import run
from scoresde.plan.table import Plan
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver

F64 = {"dtype": torch.float64}
VP = ss.VP()
CLEAR = {"t_start": VP.t_of_lam(-2.5), "t_end": VP.t_of_lam(2.0)}


def gaussian(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, [[0.4, -0.7]], std=torch.tensor([[0.3, 1.7]], **F64))


def two(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, [[1.0, -0.5], [-1.2, 0.3]], std=[0.5, 0.4], weights=[1.0, 2.0])


@dataclass(frozen=True)
class Spoiled(Solver):
    """A rule whose plans have one kind of weight changed."""

    rule: Solver
    change: Callable[[Row], Row]

    @property
    def order(self) -> int:
        return self.rule.order

    def plan(self, sde: ss.SDE, times: Any, *, up: str = "diffuse") -> Plan:
        plan = self.rule.plan(sde, times, up=up)
        return replace(plan, rows=tuple(self.change(row) for row in plan.rows))


def slanted(row: Row) -> Row:
    """A tenth of the slope left out, as a wrong factor in a formula does: the weights keep their sum."""
    if len(row.d) < 2:
        return row
    (a, u), (b, v) = row.d
    return replace(row, d=((a, u + 0.1 * v), (b, 0.9 * v)))


def heavy(row: Row) -> Row:
    """One weight a thousandth too large."""
    return replace(row, d=tuple((k, 1.001 * w) for k, w in row.d))


# Orders.


@pytest.mark.parametrize(
    ("rule", "known"),
    [(ss.DDIM(), 1), (ss.DPMSolverPP(2), 2), (ss.solvers.DPMSolver(3), 3), (ss.solvers.ETDRK4(), 4)],
    ids=str,
)
def test_known_orders_are_measured(rule: Solver, known: int) -> None:
    found = convergence_order(rule, gaussian(VP), **CLEAR)
    assert abs(found.slope - known) < 0.2 and found.declared == known


def test_the_slope_is_the_regression_over_all_numbers_of_steps_and_prints() -> None:
    found = convergence_order(ss.DDIM(), gaussian(VP), steps=(20, 30, 70, 100))
    line = np.polyfit(np.log(found.steps), np.log(found.errors), 1)
    assert math.isclose(found.slope, -line[0], rel_tol=1e-10)
    assert str(Order(1.987, 2, (10, 20), (1e-2, 2.5e-3))) == (
        "order 1.99 (declared 2); error by steps 10: 1.00e-02, 20: 2.50e-03"
    )


def test_an_error_is_the_median_distance_to_the_flow() -> None:
    x = ss.Noise(3).normal((5, 2), 0, dtype=torch.float64)
    model = gaussian(VP)
    found = convergence_order(ss.DDIM(), model, steps=(10, 20), grid=ss.grids.karras, x=x, **CLEAR)
    plan = ss.DDIM().plan(VP, ss.grids.karras(VP, 20, **CLEAR))
    gaps = (run(plan, model.x0, x) - model.flow(x, CLEAR["t_start"], CLEAR["t_end"])).norm(dim=1)
    assert math.isclose(found.errors[1], sorted(gaps.tolist())[2], rel_tol=1e-10)


def test_wrong_weights_cost_an_order_or_all_of_them() -> None:
    model = gaussian(VP)
    assert abs(convergence_order(Spoiled(ss.DPMSolverPP(2), slanted), model, **CLEAR).slope - 1) < 0.2
    assert abs(convergence_order(Spoiled(ss.DDIM(), heavy), model, steps=(400, 800), **CLEAR).slope) < 0.7
    assert abs(convergence_order(Spoiled(ss.solvers.ETDRK4(), heavy), model, **CLEAR).slope) < 0.1


def test_a_model_of_ones_own_is_measured_on_ones_own_points() -> None:
    exact = two(VP)
    x = ss.Noise(0).normal((8, 1, 2), 0, dtype=torch.float64)

    class Mine(ss.denoisers.AbstractDenoiser):
        """Knows no `event`."""

        def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
            return exact.x0(x.flatten(1), t).reshape(x.shape)

    truth = exact_flow(exact, 100)(x.flatten(1), CLEAR["t_start"], CLEAR["t_end"]).reshape(x.shape)
    options: dict[str, Any] = {"steps": (40, 80), "x": x, "reference": lambda x, s, t: truth, **CLEAR}
    found = convergence_order(ss.solvers.DPMSolver(2), Mine(VP), **options)
    assert abs(found.slope - 2) < 0.2 and found.errors[1] < 1e-3


@pytest.mark.parametrize("sde", [ss.Flow(), ss.Trig(), ss.VE(), ss.Cosine(T=1.0)], ids=lambda s: type(s).__name__)
def test_there_is_a_window_by_default_on_every_process(sde: ss.SDE) -> None:
    found = convergence_order(ss.solvers.DPMSolver(2), gaussian(sde), steps=(60, 120), n=4)
    assert abs(found.slope - 2) < 0.25, found


MODEL = two(VP)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "one number of steps": (
        lambda: convergence_order(ss.DDIM(), MODEL, steps=(40,)),
        ValueError,
        r"`steps` must hold at least two different numbers, to fit a slope, got \(40,\)",
    ),
    "one number twice": (lambda: convergence_order(ss.DDIM(), MODEL, steps=(40, 40)), ValueError, "at least two"),
    "an end in data": (
        lambda: convergence_order(ss.DDIM(), MODEL, t_end=0.0),
        ValueError,
        "`t_end` must be a time with α > 0 and σ > 0, got 0",
    ),
    "a start without signal": (
        lambda: convergence_order(ss.DDIM(), two(ss.Flow()), t_start=1.0),
        ValueError,
        "`t_start` must be a time with α > 0 and σ > 0, got 1",
    ),
    "an exact rule": (
        lambda: convergence_order(
            ss.DDIM(), MODEL, steps=(1, 2), reference=lambda x, s, t: run(ss.DDIM().plan(VP, [s, t]), MODEL.x0, x)
        ),
        ValueError,
        "`solver` has no error on this `model`",
    ),
    "a rule that draws": (
        lambda: convergence_order(Multistep(1, eta=1.0), MODEL, reference=lambda x, s, t: x),
        ValueError,
        "the plan draws 40 normals; give it a `noise`",
    ),
    "a flow into data": (
        lambda: exact_flow(MODEL)(torch.zeros(1, 2, **F64), 1.0, 0.0),
        ValueError,
        "`s` and `t` must be times with σ > 0",
    ),
    "residuals of noise": (
        lambda: order_residuals(Multistep(1, eta=1.0).plan(VP, [1.0, 0.5, 0.1]), VP),
        ValueError,
        "`plan` draws noise; order conditions are for deterministic plans",
    ),
    "no points": (lambda: work_precision([ss.DDIM()], MODEL, n=0), ValueError, "`n` must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_say_what_is_wrong(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


# The flow.


@pytest.mark.parametrize(("s", "t"), [(1.0, 0.05), (0.7, 0.2), (0.05, 0.9)])
def test_the_flow_of_a_mixture_is_that_of_scipy(s: float, t: float) -> None:
    x = ss.Noise(0).normal((3, 2), 0, dtype=torch.float64)

    def slope(u: float, y: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(y.reshape(3, 2))
        alpha, sigma = VP.alpha(u), VP.sigma(u)
        score = (alpha * MODEL.x0(state, u) - state) / sigma**2
        return (VP.f(u) * state - 0.5 * VP.g2(u) * score).numpy().ravel()

    theirs = solve_ivp(slope, (s, t), x.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    ours = exact_flow(MODEL, 200)(x, s, t)
    assert np.allclose(ours.numpy().ravel(), theirs, rtol=1e-7, atol=1e-7)


def test_the_flow_of_one_gaussian_is_closed_and_starts_anywhere() -> None:
    sde = ss.Flow()
    one = gaussian(sde)
    x = ss.Noise(0).normal((3, 2), 0, dtype=torch.float64)
    assert torch.equal(exact_flow(one, 1)(x, 1.0, 0.1), one.flow(x, 1.0, 0.1))
    # the same Gaussian as a mixture of two equal ones has no closed form here, and α(1) = 0
    same = ss.GaussianMixture(sde, one.means.expand(2, 2), std=torch.tensor([[0.3, 1.7]] * 2, **F64))
    assert torch.allclose(exact_flow(same, 150)(x, 1.0, 0.1), one.flow(x, 1.0, 0.1), rtol=1e-7, atol=1e-7)
    there = exact_flow(same, 150)(x, 0.1, 1.0)
    assert torch.allclose(there, one.flow(x, 0.1, 1.0), rtol=1e-7, atol=1e-7)


# Defects on one point of data.


def test_a_defect_is_what_is_computed_by_hand() -> None:
    a, b = 0.9, 0.4
    rows = (Row(a, evaluates=True, node=0), Row(b, x=((0, 0.5),), d=((0, 0.2),), z=((0, 0.3),), node=1))
    plan, point = Plan(rows), 0.7
    mean = 0.5 * VP.alpha(a) * point + 0.2 * point
    std = math.hypot(0.5 * VP.sigma(a), 0.3)
    size = math.hypot(VP.alpha(b) * point, VP.sigma(b))
    known = max(abs(mean - VP.alpha(b) * point), abs(std - VP.sigma(b))) / size
    assert math.isclose(point_mass_defect(plan, VP), known, rel_tol=1e-12)
    other = 2.0
    mean = (0.5 * VP.alpha(a) + 0.2) * other
    size = math.hypot(VP.alpha(b) * other, VP.sigma(b))
    known = max(abs(mean - VP.alpha(b) * other), abs(std - VP.sigma(b))) / size
    assert math.isclose(point_mass_defect(plan, VP, x0=other), known, rel_tol=1e-12)
    moved = Plan((rows[0], replace(rows[1], one=0.5)))
    assert point_mass_defect(moved, VP) != point_mass_defect(plan, VP)
    stage = Plan((rows[0], replace(rows[1], node=None), Row(a, x=((0, 1.0),), node=1)))
    assert point_mass_defect(stage, VP) == 0, "a stage need not be on the path"


def test_the_defect_of_an_euler_step_is_its_own() -> None:
    s, t = 0.6, 0.5
    plan = ss.solvers.Euler().plan(VP, [s, t])
    # dx/dt = σ̇/σ x + (α̇ − σ̇ α/σ) d, by finite differences of α and σ
    dot = [(fn(s + 1e-6) - fn(s - 1e-6)) / 2e-6 for fn in (VP.alpha, VP.sigma)]
    alpha, sigma, h = VP.alpha(s), VP.sigma(s), t - s
    mean = (alpha + h * dot[0]) * 0.7
    std = sigma + h * dot[1]
    size = math.hypot(VP.alpha(t) * 0.7, VP.sigma(t))
    known = max(abs(mean - VP.alpha(t) * 0.7), abs(std - VP.sigma(t))) / size
    assert math.isclose(point_mass_defect(plan, VP), known, rel_tol=1e-6) and known > 1e-3


@pytest.mark.parametrize(
    "rule",
    [ss.DDIM(), ss.UniPC(3), ss.solvers.DPMSolver(3), ss.VelocityAB(3), ss.solvers.DEIS(3), Multistep(2, eta=1.0)],
    ids=str,
)
def test_exponential_rules_have_none_and_a_wrong_weight_shows(rule: Solver) -> None:
    for grid in (ss.grids.karras(VP, 7), ss.grids.ancestral(VP, ss.grids.karras(VP, 7))):
        assert point_mass_defect(rule.plan(VP, grid), VP) < 1e-12
        assert point_mass_defect(Spoiled(rule, heavy).plan(VP, grid), VP) > 1e-4


# Order conditions.


def test_residuals_of_ddim_are_known_in_closed_form() -> None:
    times = torch.tensor([1.0, 0.6, 0.3, 0.1], **F64)
    found = order_residuals(ss.DDIM().plan(VP, times), VP, degree=2)
    h = VP.lam(times).diff()
    assert found.shape == (3, 3)
    assert float(found[:, 0].abs().max()) < 1e-13
    # the leg leaves −∫ e^{−(h − u)} uⁿ/n! du
    first = h - 1 + (-h).exp()
    second = h**2 / 2 - first
    assert torch.allclose(found[:, 1], -first / h**2, rtol=1e-12)
    assert torch.allclose(found[:, 2], -second / h**3, rtol=1e-12)


def test_residuals_vanish_below_the_order_and_not_at_it() -> None:
    times = ss.grids.karras(VP, 8, t_end=0.05)
    for order in (1, 2, 3):
        found = order_residuals(Multistep(order).plan(VP, times), VP)[order - 1 :]  # after the ramp
        assert float(found[:, :order].abs().max()) < 1e-12, order
        assert float(found[:, order].abs().min()) > 1e-3, order
    single = order_residuals(ss.DPMSolverPP(2, kind="single", form="exact").plan(VP, times), VP)
    assert float(single[:, :2].abs().max()) < 1e-12 < float(single[:, 2].abs().min())


def test_residuals_show_which_condition_a_wrong_weight_breaks() -> None:
    times = ss.grids.karras(VP, 8, t_end=0.05)
    good = order_residuals(Multistep(2).plan(VP, times), VP)[1:]
    bad = order_residuals(Spoiled(Multistep(2), slanted).plan(VP, times), VP)[1:]
    assert float(good[:, :2].abs().max()) < 1e-12
    assert float(bad[:, 0].abs().max()) < 1e-12 and float(bad[:, 1].abs().min()) > 1e-3
    worse = order_residuals(Spoiled(Multistep(2), heavy).plan(VP, times), VP)
    assert float(worse[:, 0].abs().min()) > 1e-5
    published = order_residuals(ss.DPMSolverPP(3, form="published").plan(VP, times), VP)[2:]
    assert float(published[:, :2].abs().max()) < 1e-12 and float(published[:, 2].abs().min()) > 1e-3


@pytest.mark.parametrize(
    "rule", [ss.UniPC(3), ss.solvers.DPMSolver(3), ss.VelocityAB(3), ss.solvers.RungeKutta4()], ids=str
)
def test_residuals_are_those_of_each_step_by_itself(rule: Solver) -> None:
    """Each step and each n alone, with the integral as a sum: ∫ e^{u − h} uⁿ/n! du = Σ_k (−1)^k h^{n−k}/(n−k)!."""
    plan, degree = rule.plan(VP, ss.grids.karras(VP, 5, t_end=0.05)), 2
    lam = [VP.lam(float(row.t)) for row in plan.rows]
    alpha = [VP.alpha(float(row.t)) for row in plan.rows]
    nodes = [r for r, row in enumerate(plan.rows) if row.node is not None]

    def integral(h: float, n: int) -> float:
        whole = sum((-1) ** k * h ** (n - k) / math.factorial(n - k) for k in range(n + 1))
        return whole - (-1) ** n * math.exp(-h)

    found = order_residuals(plan, VP, degree)
    for i, (s, t) in enumerate(pairwise(nodes)):
        for n in range(degree + 1):
            x = {r: alpha[r] * integral(lam[r] - lam[s], n) for r in nodes if r <= s}
            d = [(u - lam[s]) ** n / math.factorial(n) for u in lam]
            for r in range(1, t + 1):
                if r not in x:
                    x[r] = sum(w * x[k] for k, w in plan.rows[r].x) + sum(w * d[k] for k, w in plan.rows[r].d)
            h = lam[t] - lam[s]
            want = (x[t] - alpha[t] * integral(h, n)) / (alpha[t] * h ** (n + 1))
            assert math.isclose(float(found[i, n]), want, rel_tol=1e-9, abs_tol=1e-11), (i, n)


def test_residuals_of_the_leg_into_data_are_not_a_number() -> None:
    found = order_residuals(ss.DDIM().plan(VP, [1.0, 0.5, 0.0]), VP)
    assert found[0].isfinite().all() and found[1].isnan().all()


# Work and precision.

RULES = [ss.DDIM(), ss.DPMSolverPP(2), ss.EDMHeun(), ss.VelocityAB(3, start="self")]


def test_budgets_are_spent_and_buy_precision() -> None:
    x = ss.Noise(0).normal((16, 2), 0, dtype=torch.float64)
    truth = MODEL.x0(exact_flow(MODEL, 150)(x, 1.0, VP.t_min), VP.t_min)
    found = work_precision(RULES, MODEL, nfes=(7, 13, 25), x=x, truth=truth)
    assert [(w.solver, w.grid) for w in found] == [(repr(r), "karras") for r in RULES for _ in range(3)]
    for i, rule in enumerate(RULES):
        rows = found[3 * i : 3 * i + 3]
        assert [w.nfe for w in rows] == [7, 13, 25], rule
        assert rows[0].median > rows[1].median > rows[2].median > 0, rule
        assert all(w.rmse > 0 for w in rows)
    assert found[5].median < found[2].median / 3, "order two beats order one at 25 calls"


def test_work_is_measured_from_no_signal_to_no_noise() -> None:
    found = work_precision([ss.DPMSolverPP(2)], two(ss.Flow()), (ss.grids.quadratic_vp,), (6, 24), n=8)
    assert [w.nfe for w in found] == [6, 24] and found[1].median < found[0].median / 4


def test_an_entry_is_the_error_of_the_run_it_names() -> None:
    x = ss.Noise(5).normal((6, 2), 0, dtype=torch.float64)
    truth = torch.zeros(6, 2, **F64)
    window = {"t_start": 0.8, "t_end": 0.1}
    (work,) = work_precision([ss.DDIM()], MODEL, (ss.grids.uniform_lam,), (4,), x=x, truth=truth, **window)
    gap = run(ss.DDIM().plan(VP, ss.grids.uniform_lam(VP, 4, **window)), MODEL.x0, x).norm(dim=1)
    assert work.nfe == 4 and work.grid == "uniform_lam"
    assert math.isclose(work.median, sorted(gap.tolist())[2], rel_tol=1e-12)
    assert math.isclose(work.rmse, float((gap**2).mean()) ** 0.5, rel_tol=1e-12)


def test_states_to_start_from_are_those_of_a_sampler() -> None:
    """The prior at the first time, from the stream of starts, in float64."""
    truth = torch.zeros(6, 2, **F64)
    (work,) = work_precision([ss.DDIM()], MODEL, (ss.grids.uniform_lam,), (4,), truth=truth, n=6, seed=3)
    plan = ss.DDIM().plan(VP, ss.grids.uniform_lam(VP, 4))
    gap = ss.sample(MODEL, (6, 2), plan, seed=3, start=ss.Start(dtype=torch.float64)).norm(dim=1)
    assert math.isclose(work.median, sorted(gap.tolist())[2], rel_tol=1e-12)


@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow(), ss.VE(), ss.EDM(), ss.Trig()], ids=lambda s: type(s).__name__)
def test_the_truth_at_data_is_where_the_flow_ends(sde: ss.SDE) -> None:
    """On one Gaussian it is known: the point's whitened coordinates stay."""
    model = gaussian(sde)
    found = work_precision([ss.solvers.DPMSolver(3)], model, (ss.grids.uniform_lam,), (30, 240), n=8)
    assert found[1].median < found[0].median / 10 and found[1].median < 2e-3, found


def test_budgets_that_no_leg_fits_are_left_out_and_grids_may_be_partial() -> None:
    grid = partial(ss.grids.karras, rho=5.0)
    truth = torch.zeros(4, 2, **F64)
    found = work_precision([ss.solvers.RungeKutta4()], MODEL, (grid,), (3, 9), n=4, truth=truth, t_end=0.05)
    assert [w.nfe for w in found] == [8]
    assert "karras" in found[0].grid
