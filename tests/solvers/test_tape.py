"""Laying rows: what every leg must be exact on, where rules change at the ends, and whole grids of tensors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from instances import BY_DRIFT, SDES
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import point_mass_defect
from scoresde.plan.rows import Row
from scoresde.plan.run import run
from scoresde.plan.table import Plan
from scoresde.solvers.interpolants import (
    DATA,
    LAM,
    NOISE,
    RHO,
    TAU,
    TIME,
    VELOCITY,
    Prediction,
    V,
    Variable,
    edm_prediction,
)
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver
from scoresde.solvers.single_step import SingleStep
from scoresde.solvers.tape import Tape

ALL = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
F = edm_prediction(0.5)
VARIABLES = (LAM, RHO, TAU, TIME)
VP, FLOW = ss.VP(), ss.Flow()


@st.composite
def zigzags(draw: st.DrawFn, *, ups: bool = True) -> list[float]:
    """Fractions of T from 1 down to 0 or above, with legs that go up in between."""
    grid, t = [1.0], 1.0
    for _ in range(draw(st.integers(1, 6))):
        t *= draw(st.floats(0.2, 0.9))
        grid.append(t)
        if ups and draw(st.booleans()):
            t += draw(st.floats(0.1, 0.8)) * (1 - t)
            grid.append(t)
    grid.append(t * draw(st.sampled_from([0.0, 0.3])))
    return grid


def on(sde: ss.SDE, fractions: list[float]) -> Tensor:
    """A grid of a process that crowds at data, as grids do; it may go up."""
    return ss.grids.zigzag([sde.T * f**2 for f in fractions])


# Exactness. With data in one point x0 the denoiser is a constant, so data, noise along the flow, and velocity along the
# flow are constants too, and no leg has anything to get wrong: mean and variance are those of the marginal.


def rounding(plan: Plan, sde: ss.SDE, x0: float, prediction: Prediction) -> float:
    """What the last digit of every product in the table may add up to, relative to the state: 1e-15 on most grids, but
    random ones have nodes that nearly meet."""
    signal = [sde.alpha(float(row.t)) for row in plan.rows]
    size = [math.hypot(a * x0, sde.sigma(float(row.t))) for a, row in zip(signal, plan.rows, strict=True)]
    sums = size[:1]
    for r, row in enumerate(plan.rows[1:], start=1):
        terms = [*(abs(w) * sums[k] for k, w in row.x), *(abs(w * x0) for _, w in row.d), *(abs(w) for _, w in row.z)]
        if prediction is NOISE:  # α_t/α_s, which is large from T, has been taken off the weight of x_s
            terms += [signal[r] / signal[k] * size[k] for k, _ in row.x if signal[k] > 0]
        sums.append(sum(terms))
    return torch.finfo(torch.float64).eps * max(a / b for a, b in zip(sums, size, strict=True))


EXACT = [(DATA, 0.0), (DATA, 0.5), (DATA, 1.0), (NOISE, 0.0), (VELOCITY, 0.0)]


@ALL
@settings(max_examples=12)
@given(
    zigzags(),
    st.sampled_from(EXACT),
    st.sampled_from(VARIABLES),
    st.integers(1, 4),
    st.sampled_from([0, 0, 2, 3]),
)
def test_on_a_point_of_data_every_leg_is_exact(
    sde: ss.SDE,
    fractions: list[float],
    of: tuple[Prediction, float],
    variable: Variable,
    order: int,
    corrector: int,
) -> None:
    grid, (prediction, eta) = on(sde, fractions), of
    slow = sde is BY_DRIFT  # its λ is a quadrature, and the inverse of that takes a second a leg
    variable = TAU if variable is TIME and slow else variable
    rule: Solver = Multistep(order, prediction, variable, corrector, eta=eta)
    plan = rule.plan(sde, grid)
    assert point_mass_defect(plan, sde, x0=1.7) < 1e-12 + 20 * rounding(plan, sde, 1.7, prediction), (rule, grid)
    if eta == 0 and not slow:
        rule = SingleStep(min(order, 3), prediction, variable)
        plan = rule.plan(sde, grid)
        assert point_mass_defect(plan, sde, x0=-0.4) < 1e-12 + 20 * rounding(plan, sde, 0.4, prediction), (rule, grid)


@ALL
@pytest.mark.parametrize("variant", ["bh1", "bh2", "exact"])
def test_published_moments_are_exact_on_a_point_too(sde: ss.SDE, variant: str) -> None:
    grid = on(sde, [1.0, 0.8, 0.5, 0.6, 0.3, 0.1, 0.0])
    for prediction in (DATA, NOISE):
        plan = ss.UniPC(2, variant, prediction).plan(sde, grid)
        assert point_mass_defect(plan, sde, x0=0.7) < 1e-12 + 20 * rounding(plan, sde, 0.7, prediction), prediction


def test_the_defect_shows_what_is_wrong() -> None:
    plan = ss.solvers.DEIS(3).plan(VP, ss.grids.karras(VP, 8))
    assert point_mass_defect(plan, VP) < 1e-13
    for r in (2, 5, len(plan) - 1):
        row = plan.rows[r]
        k, w = row.d[0]
        wrong = replace(row, d=((k, w + 1e-6), *row.d[1:]))
        assert point_mass_defect(replace(plan, rows=(*plan.rows[:r], wrong, *plan.rows[r + 1 :])), VP) > 1e-8
    noisy = Multistep(1, eta=1.0).plan(VP, [1.0, 0.5, 0.2])
    louder = replace(noisy, rows=(*noisy.rows[:2], replace(noisy.rows[2], z=((1, noisy.rows[2].z[0][1] * 1.001),))))
    assert point_mass_defect(noisy, VP) < 1e-13 and point_mass_defect(louder, VP) > 1e-5
    # Adding the same normal again is not adding a fresh one.
    same = replace(noisy, rows=(*noisy.rows[:2], replace(noisy.rows[2], z=((0, noisy.rows[2].z[0][1]),))))
    assert point_mass_defect(same, VP) > 1e-2
    assert point_mass_defect(ss.solvers.Euler().plan(VP, ss.grids.karras(VP, 8)), VP) > 1e-3
    assert point_mass_defect(plan, ss.EDM(T=1.0)) > 1e-2, "a plan belongs to its process"


def gaussian_defect(plan: Plan, sde: ss.SDE, s: float) -> float:
    """Relative error of the variance at every node on data N(0, s²), whose denoiser is linear."""
    width = 1 + plan.draws
    states: list[Tensor] = []
    denoised: list[Tensor] = []
    worst = 0.0
    for r, row in enumerate(plan.rows):
        alpha, sigma = sde.alpha(float(row.t)), sde.sigma(float(row.t))
        total = (alpha * s) ** 2 + sigma**2
        x = torch.zeros(width, dtype=torch.float64)
        if r == 0:
            x[0] = total**0.5
        for k, w in row.x:
            x = x + w * states[k]
        for k, w in row.d:
            x = x + w * denoised[k]
        for k, w in row.z:
            x[1 + k] += w
        states.append(x)
        denoised.append(alpha * s**2 / total * x)
        if row.node is not None:
            worst = max(worst, abs(float(x.square().sum()) / total - 1))
    return worst


@ALL
@settings(max_examples=8)
@given(
    zigzags(),
    st.sampled_from([(V, 1.0), (F, 0.5), (edm_prediction(2.0), 2.0)]),
    st.sampled_from(VARIABLES),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.5, 1.0]),
)
def test_on_its_own_gaussian_the_rotated_predictions_are_exact(
    sde: ss.SDE, fractions: list[float], of: tuple[Prediction, float], variable: Variable, order: int, eta: float
) -> None:
    # v and F vanish on data of standard deviation 1 and sigma_data: what is left is the transfer and the noise.
    grid, (prediction, s) = on(sde, [0.95 * f for f in fractions[:-1]] + [0.3 * fractions[-2]]), of
    variable = TAU if variable is TIME and sde is BY_DRIFT else variable
    plan = Multistep(order, prediction, variable, eta=eta).plan(sde, grid)
    assert gaussian_defect(plan, sde, s) < 1e-12 + 40 * rounding(plan, sde, s, prediction), grid


@pytest.mark.parametrize(
    ("prediction", "eta"),
    [(p, eta) for p in (NOISE, VELOCITY, V, F) for eta in (0.0, 0.5, 1.0) if (p, eta) not in EXACT],
    ids=str,
)
def test_where_a_leg_cannot_be_exact_mean_and_variance_converge(prediction: Prediction, eta: float) -> None:
    # v turns along the flow, and with noise so do ε and the velocity. No Monte Carlo: the weak error itself.
    first, last = VP.t_of_lam(-3.0), VP.t_of_lam(2.0)
    for order in (1, 2, 3):
        coarse, fine = (
            point_mass_defect(
                Multistep(order, prediction, eta=eta).plan(
                    VP, ss.analysis.orders.uneven_lam(VP, n, t_start=first, t_end=last)
                ),
                VP,
            )
            for n in (40, 80)
        )
        assert math.log2(coarse / fine) > 0.95 * min(order, 2), order


# What `move`, `diffuse` and `append` write.


def only(tape: Tape, row: int) -> Row:
    """One row of the tape's plan; nothing in these tests is folded."""
    return tape.plan().rows[row]


def test_a_tape_writes_rows_in_order() -> None:
    tape = Tape(VP, 1.0)
    a = tape.move(0, 0.6, nodes=[0], evaluates=False, note="predict")
    b = tape.move(0, 0.6, nodes=[0], node=1)
    c = tape.append(0.3, x=[(a, 0.5), (b, 0.5)], d=[(b, 0.25)], z=[(tape.draw(), 2.0)])
    d = tape.append(0.1, x=[(a, 1.0), (c, 1.0)], evaluates=False, node=2, note="end")
    assert (a, b, c, d) == (1, 2, 3, 4)
    assert [tape.time(k) for k in range(5)] == [1.0, 0.6, 0.6, 0.3, 0.1]
    rows = tape.plan("mine", order=7).rows
    assert rows[0] == Row(1.0, evaluates=True, node=0, note="start")
    assert (rows[a].evaluates, rows[a].node, rows[a].note) == (False, None, "predict")
    assert rows[a].x == rows[b].x and rows[a].d == rows[b].d
    assert rows[c] == Row(0.3, ((a, 0.5), (b, 0.5)), ((b, 0.25),), ((0, 2.0),), True)
    assert rows[d] == Row(0.1, ((a, 1.0), (c, 1.0)), node=2, note="end")
    plan = tape.plan("mine", order=7)
    assert (plan.name, plan.order, plan.sde) == ("mine", 7, repr(VP))


def test_a_row_of_ddim_in_every_prediction_is_one_row() -> None:
    want = (VP.sigma(0.3) / VP.sigma(0.6), VP.alpha(0.3) - VP.alpha(0.6) * VP.sigma(0.3) / VP.sigma(0.6))
    for prediction in (DATA, NOISE, VELOCITY):
        tape = Tape(VP, 0.6)
        row = only(tape, tape.move(0, 0.3, nodes=[0], prediction=prediction))
        assert (dict(row.x)[0], dict(row.d)[0]) == pytest.approx(want, rel=1e-12)


def test_moves_may_start_at_one_row_and_read_others() -> None:
    tape = Tape(VP, 0.9)
    a = tape.move(0, 0.7, nodes=[0])
    b = tape.move(a, 0.5, nodes=[a, 0], prediction=NOISE)
    row = only(tape, b)
    assert [k for k, _ in row.d] == [a, 0] and {k for k, _ in row.x} == {a, 0}
    # ε = (x − α d)/σ: each node's x and d have weights in that proportion, after Φ is taken off the start's.
    phi = VP.alpha(0.5) / VP.alpha(0.7)
    of_x, of_d = dict(row.x), dict(row.d)
    assert -of_d[0] / of_x[0] == pytest.approx(VP.alpha(0.9), rel=1e-12)
    assert -of_d[a] / (of_x[a] - phi) == pytest.approx(VP.alpha(0.7), rel=1e-12)
    assert point_mass_defect(tape.plan(), VP) < 1e-13


def test_noise_is_drawn_once_and_may_be_shared() -> None:
    tape = Tape(VP, 0.9)
    a = tape.move(0, 0.7, nodes=[0], eta=1.0)
    b = tape.move(a, 0.5, nodes=[a], eta=0.5)
    k = tape.draw()
    c = tape.move(b, 0.3, nodes=[b], eta=1.0, noise=[(k, 1.0)])
    d = tape.move(b, 0.3, nodes=[c, b], eta=1.0, noise=[(k, 1.0)], node=4)
    e = tape.move(d, 0.1, nodes=[c], eta=1.0, noise=[(0, 0.6), (k, 0.8)], evaluates=False)
    plan = tape.plan()
    assert [row.z[0][0] for row in plan.rows[1:5]] == [0, 1, 2, 2]
    assert plan.rows[c].z == plan.rows[d].z, "predictor and corrector add the same noise"
    std = VP.sigma(0.1) * math.sqrt(-math.expm1(-2 * (VP.lam(0.1) - VP.lam(0.3))))
    assert plan.rows[e].z == ((0, pytest.approx(0.6 * std)), (2, pytest.approx(0.8 * std)))
    small = math.sqrt(-math.expm1(-2 * 0.25 * (VP.lam(0.5) - VP.lam(0.7))))
    assert plan.rows[b].z[0][1] == pytest.approx(VP.sigma(0.5) * small)
    quiet = Tape(VP, 0.9)
    assert only(quiet, quiet.move(0, 0.7, nodes=[0])).z == ()
    assert not quiet.plan().stochastic


def test_diffusing_is_the_forward_transition_with_fresh_noise() -> None:
    for sde, t in ((VP, 0.4), (ss.EDM(), 30.0), (FLOW, 0.4)):
        tape = Tape(sde, t)
        up = sde.T * 0.7
        a = tape.diffuse(0, up, node=1)
        b = tape.diffuse(a, sde.T, evaluates=False)
        scale, std = sde.transition(t, up)
        row = only(tape, a)
        assert row == Row(up, x=((0, scale),), z=((0, std),), evaluates=True, node=1, note="forward noise")
        assert only(tape, b).z[0][0] == 1
        assert all(type(w) is float for _, w in (*row.x, *row.z))
    with pytest.raises(ValueError, match="`s` must not lie after `t`"):
        Tape(VP, 0.5).diffuse(0, 0.4)


# The ends.


@pytest.mark.parametrize("variable", VARIABLES, ids=str)
@pytest.mark.parametrize("prediction", [DATA, NOISE, VELOCITY, V, F], ids=str)
def test_the_step_into_data_is_finite_and_its_result_has_no_noise(prediction: Prediction, variable: Variable) -> None:
    for sde in (VP, ss.EDM(), FLOW):
        for eta in (0.0, 1.0):
            tape = Tape(sde, 0.8 * sde.T)
            a = tape.move(0, 0.5 * sde.T, nodes=[0], prediction=prediction, eta=eta)
            b = tape.move(a, 0.0, nodes=[a, 0], prediction=prediction, variable=variable, eta=eta, evaluates=False)
            row = only(tape, b)
            assert row.z == (), "no noise is added there"
            if (prediction, eta) in EXACT:
                assert point_mass_defect(tape.plan(), sde) < 1e-13
            if eta > 0 or variable is LAM:
                assert (row.x, row.d) == ((), ((a, 1.0),)), "the denoised state, and nothing extrapolated"


def test_from_pure_noise_noise_prediction_says_nothing_so_data_is_used() -> None:
    for eta in (0.0, 0.5, 1.0):
        rows = []
        for prediction in (NOISE, DATA):
            tape = Tape(FLOW, 1.0)
            rows.append(only(tape, tape.move(0, 0.6, nodes=[0], prediction=prediction, eta=eta)))
        assert rows[0] == rows[1]
        assert dict(rows[0].d)[0] == pytest.approx(0.4, rel=1e-12), "α_t E[x0]"
    # Later legs are of noise again, and may read what was evaluated there: ε = x/σ, without a word about data.
    tape = Tape(FLOW, 1.0)
    a = tape.move(0, 0.6, nodes=[0], prediction=NOISE)
    row = only(tape, tape.move(a, 0.4, nodes=[a, 0], prediction=NOISE, variable=TAU))
    assert dict(row.d)[0] == 0.0 and dict(row.x)[0] != 0.0
    assert point_mass_defect(tape.plan(), FLOW) < 1e-13


@pytest.mark.parametrize("prediction", [VELOCITY, V, F], ids=str)
@pytest.mark.parametrize("sde", [FLOW, ss.Trig(), ss.Cosine(T=1.0)], ids=repr)
def test_with_noise_legs_from_no_signal_are_of_data(prediction: Prediction, sde: ss.SDE) -> None:
    tape = Tape(sde, 1.0)
    a = tape.move(0, 0.6, nodes=[0], prediction=prediction, eta=1.0)
    row = only(tape, a)
    assert row.x == () and dict(row.d)[0] == pytest.approx(sde.alpha(0.6), rel=1e-12)
    assert row.z[0][1] == pytest.approx(sde.sigma(0.6), rel=1e-12)


def test_nodes_where_the_variable_is_infinite_are_left_out() -> None:
    rows = []
    for nodes in ([1, 0], [1]):
        tape = Tape(FLOW, 1.0)
        a = tape.move(0, 0.6, nodes=[0])
        rows.append(only(tape, tape.move(a, 0.4, nodes=nodes, moments=("exact", "mid"))))
    assert rows[0] == rows[1], "λ = −∞ at the start"
    tape = Tape(FLOW, 1.0)
    a = tape.move(0, 0.6, nodes=[0])
    assert len(only(tape, tape.move(a, 0.4, nodes=[a, 0], variable=TAU)).d) == 2, "τ = 1 there"


def test_nodes_at_one_time_are_one_node_the_nearest() -> None:
    for again in (0.7, 0.7 * (1 + 1e-15)):
        tape = Tape(VP, 0.9)
        a = tape.move(0, 0.7, nodes=[0])
        b = tape.move(a, 0.5, nodes=[a], evaluates=False)
        c = tape.diffuse(b, again)
        d = tape.move(c, 0.4, nodes=[c, a, 0])
        # The turning point is folded into the noise, which so becomes row 2.
        assert (d, [k for k, _ in tape.plan().rows[-1].d]) == (4, [2, 0])


def test_a_grid_may_come_back_to_its_own_times() -> None:
    grid = ss.grids.restart(VP, ss.grids.karras(VP, 8), 0.2, 0.6, repeats=3)
    for rule in (ss.UniPC(3), ss.DPMSolverPP(3), ss.VelocityAB(3), Multistep(2, eta=1.0)):
        plan = rule.plan(VP, grid)
        assert max(abs(w) for row in plan.rows for _, w in row.d) < 100
    assert point_mass_defect(ss.UniPC(3).plan(VP, grid), VP) < 1e-12


def test_history_is_dropped_across_fresh_noise_unless_it_is_of_data() -> None:
    grid = ss.grids.zigzag([1.0, 0.8, 0.6, 0.4, 0.5, 0.3, 0.2, 0.0])
    for prediction, n_nodes in ((DATA, 2), (NOISE, 1), (VELOCITY, 1)):
        plan = Multistep(2, prediction).plan(VP, grid)
        after = next(r for r, row in enumerate(plan.rows) if row.t == 0.5)
        reader = next(row for row in plan.rows if row.t == 0.3)
        assert dict(reader.d).keys() >= {after}
        assert len(reader.d) == n_nodes, prediction
        assert len(next(row for row in plan.rows if row.t == 0.2).d) == 2, "and builds up again"


# What is refused, and why.


def bad(grid: list[float], *, up: str = "diffuse", rule: Solver | None = None, sde: ss.SDE = FLOW) -> Any:
    return lambda: (rule or Multistep(2)).plan(sde, torch.tensor(grid, dtype=torch.float64), up=up)


BAD = {
    "no nodes": (lambda: Tape(VP, 1.0).move(0, 0.5, nodes=[]), "`nodes` must hold at least one evaluated row"),
    "a node that is not evaluated": (
        lambda: (t := Tape(VP, 1.0, evaluates=False), t.move(0, 0.5, nodes=[0]), t.plan()),
        "row 0 does not evaluate",
    ),
    "starting at data": (
        bad([0.0, 0.5], up="solve"),
        r"from t = 0 to 0.5 has no finite weights: it starts at σ = 0.*start at a positive time such as `sde.t_min`",
    ),
    "noise on the way up": (
        bad([0.1, 0.5], up="solve", rule=Multistep(1, eta=1.0)),
        "from t = 0.1 to 0.5 .*a solver step towards noise cannot add noise; set `eta` = 0",
    ),
    "ends of some samples": (
        bad([[1.0, 1.0], [0.5, 0.4], [0.0, 0.1]]),  # type: ignore[list-item]
        "from t = 0.5 to 0 .*all samples or none must start at α = 0, and all or none must end at σ = 0",
    ),
    "starts of some samples": (
        bad([[1.0, 0.9], [0.5, 0.4], [0.2, 0.1]], rule=Multistep(1, NOISE)),  # type: ignore[list-item]
        "from t = 1 to 0.5 .*all samples or none",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_legs_without_weights_say_which_and_why(case: str) -> None:
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# Whole grids: long ones, tensors with gradients, one for each sample.


@pytest.mark.parametrize("rule", [ss.DDIM(), ss.solvers.DPMSolver(2), SingleStep(3, VELOCITY, TAU)], ids=str)
def test_a_long_plan_is_its_legs_one_by_one(rule: Solver) -> None:
    legs = 1000 // rule.stages
    grid = ss.grids.quadratic_vp(VP, legs, t_end=1e-3)
    plan = rule.plan(VP, grid)
    assert len(plan) == rule.stages * legs + 1
    assert plan.nfe == rule.stages * legs
    for i in (0, 1, legs // 2, legs - 1):
        alone = rule.plan(VP, grid[i : i + 2])
        at = rule.stages * i
        for row, part in zip(plan.rows[at + 1 :], alone.rows[1:], strict=False):
            assert row.t == part.t and row.note == part.note
            for column in ("x", "d"):
                whole, one = dict(getattr(row, column)), dict(getattr(part, column))
                assert whole == pytest.approx({k + at: w for k, w in one.items()}, rel=1e-14)
    assert point_mass_defect(plan, VP) < 1e-12


def test_a_long_multistep_plan_is_its_tail_on_the_same_history() -> None:
    grid = ss.grids.karras(VP, 1000)
    plan = ss.DPMSolverPP(3).plan(VP, grid)
    assert len(plan) == 1001
    for i in (500, 998):
        tail = ss.DPMSolverPP(3).plan(VP, grid[i - 2 : i + 2]).rows[-1]
        row = plan.rows[i + 1]
        assert dict(row.d) == pytest.approx({k + i - 2: w for k, w in tail.d}, rel=1e-13)
        assert dict(row.x) == pytest.approx({k + i - 2: w for k, w in tail.x}, rel=1e-13)


START = ss.Noise(0).normal((3, 2), 0, dtype=torch.float64)


def network(x: Tensor, t: Any) -> Tensor:
    time = t[:, None] if isinstance(t, Tensor) and t.ndim else t
    return torch.sin(x) * 0.8 - 0.3 * time


GRADED = {
    "UniPC": (ss.UniPC(3), [1.0, 0.8, 0.5, 0.3, 0.1]),
    "into data": (ss.UniPC(2), [1.0, 0.8, 0.5, 0.3, 0.0]),
    "VelocityAB from no signal": (ss.VelocityAB(3), [1.0, 0.8, 0.5, 0.3, 0.0]),
    "DEIS in t": (ss.solvers.DEIS(3), [1.0, 0.8, 0.5, 0.3, 0.1]),
    "of v": (Multistep(2, V, RHO), [1.0, 0.8, 0.5, 0.1]),
    "single steps": (ss.solvers.DPMSolver(3), [1.0, 0.7, 0.3, 0.0]),
    "tableau": (ss.solvers.RungeKutta4(), [0.9, 0.7, 0.3]),
    "with noise": (Multistep(2, eta=0.7), [1.0, 0.8, 0.5, 0.3, 0.0]),
    "zigzag": (ss.DPMSolverPP(2), [1.0, 0.6, 0.8, 0.4, 0.5, 0.2, 0.0]),
}


@pytest.mark.parametrize("case", GRADED)
@pytest.mark.parametrize("sde", [VP, FLOW], ids=repr)
def test_gradients_in_the_times_equal_finite_differences(sde: ss.SDE, case: str) -> None:
    rule, grid = GRADED[case]
    inner = torch.tensor(grid[1:-1], dtype=torch.float64)

    def result(inner: Tensor) -> Tensor:
        times = torch.cat([torch.tensor(grid[:1]).double(), inner, torch.tensor(grid[-1:], dtype=torch.float64)])
        times = ss.grids.zigzag(times) if case == "zigzag" else times
        return run(rule.plan(sde, times), network, START, ss.Noise(1)).flatten()

    got = torch.autograd.functional.jacobian(result, inner)
    steps = 1e-5 * torch.eye(len(inner), dtype=torch.float64)
    with torch.no_grad():
        want = torch.stack([(result(inner + e) - result(inner - e)) / 2e-5 for e in steps], dim=1)
    assert float((got - want).abs().max()) < 1e-6 * float(want.abs().max())
    assert bool((want.abs().max(0).values > 1e-4).all()), "every time matters"


PER_SAMPLE = torch.tensor(
    [[1.0, 0.9, 0.95], [0.7, 0.5, 0.6], [0.4, 0.35, 0.2], [0.3, 0.2, 0.1], [0.1, 0.05, 0.01]], dtype=torch.float64
)


@pytest.mark.parametrize("end", [None, 0.0])
@pytest.mark.parametrize(
    "rule",
    [
        ss.UniPC(3),
        ss.solvers.DEIS(3),
        ss.VelocityAB(3),
        ss.solvers.DPMSolver(3),
        ss.solvers.LMS(),
        ss.solvers.PNDM(),
        ss.EDMHeun(),
        ss.solvers.RungeKutta4("lam"),
        Multistep(2, V, TIME, corrector=3),
        Multistep(2, F, RHO, eta=0.5),
        Multistep(3, eta=1.0),
    ],
    ids=str,
)
def test_a_grid_for_each_sample_is_the_plan_of_each(rule: Solver, end: float | None) -> None:
    times = PER_SAMPLE if end is None else torch.cat([PER_SAMPLE, torch.full((1, 3), end, dtype=torch.float64)])
    plan = rule.plan(VP, times)
    for b in range(3):
        alone = rule.plan(VP, times[:, b].tolist())
        assert len(alone) == len(plan)
        for row, part in zip(plan.rows, alone.rows, strict=True):
            assert (row.evaluates, row.node, row.note) == (part.evaluates, part.node, part.note)
            assert torch.as_tensor(row.t).expand(3)[b].item() == pytest.approx(part.t, rel=1e-13, abs=1e-300)
            for column in ("x", "d", "z"):
                many = {k: torch.as_tensor(w).expand(3)[b].item() for k, w in getattr(row, column)}
                one = dict(getattr(part, column))
                size = max((abs(w) for w in one.values()), default=0.0)
                assert {k: w for k, w in many.items() if k in one} == pytest.approx(one, rel=1e-11, abs=1e-13 * size)
                assert all(many[k] == 0 for k in many.keys() - one.keys()), "a number that is 0 is left out"


def test_a_zigzag_for_each_sample_is_the_zigzag_of_each() -> None:
    times = ss.grids.zigzag([[1.0, 0.9], [0.5, 0.4], [0.8, 0.45], [0.3, 0.2], [0.0, 0.0]])
    plan = ss.DPMSolverPP(2).plan(VP, times)
    for b in range(2):
        alone = ss.DPMSolverPP(2).plan(VP, times[:, b])
        got = run(plan, network, START[:2], ss.Noise(0))[b]
        assert torch.allclose(got, run(alone, network, START[b : b + 1], ss.Noise(0)[[b]])[0], rtol=1e-12)


@pytest.mark.parametrize(
    "rule",
    [
        ss.UniPC(3),
        ss.solvers.DPMSolver(3),
        ss.solvers.RungeKutta4(),
        ss.solvers.PNDM(),
        ss.solvers.LMS(),
        Multistep(2, V, eta=1.0),
    ],
    ids=str,
)
def test_a_plan_made_of_numbers_holds_numbers(rule: Solver) -> None:
    for grid in ([1.0, 0.7, 0.6, 0.3, 0.0], ss.grids.zigzag([1.0, 0.6, 0.7, 0.3, 0.0])):
        for row in rule.plan(VP, grid).rows:
            assert type(row.t) is float
            assert all(type(w) is float for column in (row.x, row.d, row.z) for _, w in column)
    times = torch.tensor([1.0, 0.6, 0.3], dtype=torch.float64, requires_grad=True)
    rows = rule.plan(VP, times).rows
    assert all(isinstance(w, Tensor) and w.dtype == torch.float64 for row in rows for _, w in row.x)


def test_predictions_of_one_name_are_not_one_prediction() -> None:
    near = edm_prediction(0.5 + 1e-9)
    assert near.name != F.name, "all digits are printed"
    tape = Tape(VP, 0.9)
    a = tape.move(0, 0.5, nodes=[0], prediction=replace(V, name=F.name))
    b = tape.move(0, 0.5, nodes=[0], prediction=F)
    plan = tape.plan()
    assert plan.rows[a].d != plan.rows[b].d
