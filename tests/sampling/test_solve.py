"""From a model to samples and back: what every argument does, and that nothing else happens."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from instances import BY_DRIFT, SDES
from torch import Tensor, nn

import scoresde as ss
from scoresde.plan.run import Step
from scoresde.plan.table import Plan
from scoresde.sampling.defaults import default_grid, default_solver
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.rule import Solver

VP = ss.VP()
ALL = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def ring(sde: ss.SDE) -> ss.GaussianMixture:
    angle = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
    return ss.GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), std=0.3)


MIX = ring(VP)
LINEAR = ss.Denoiser(lambda x, t: 0.3 * x, VP, predicts="x0")  # elementwise, and cheap
START = ss.Noise(0).normal((6, 2), 0, dtype=torch.float64)


class Recorder(ss.denoisers.AbstractDenoiser):
    """A denoiser that remembers when it was asked, of what and with which conditions."""

    def __init__(self, model: ss.denoisers.AbstractDenoiser) -> None:
        super().__init__(model.sde)
        self.model = model
        self.times: list[Any] = []
        self.states: list[Tensor] = []
        self.received: list[dict[str, Any]] = []

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        self.times.append(t)
        self.states.append(x)
        self.received.append(cond)
        return self.model.x0(x, t)


class Net(nn.Module):
    """A small network that takes a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 16), nn.Linear(16, 2)
        for i, p in enumerate(self.parameters()):
            p.data = 0.5 * ss.Noise(i).normal(tuple(p.shape), 0)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, t: Tensor, shift: Any = 0.0) -> Tensor:
        self.seen.append(x.dtype)
        out: Tensor = self.last(torch.tanh(self.first(torch.cat([x, t.to(x)[:, None]], dim=1))))
        return out + shift


# How many legs, how many evaluations, which times.

RULES: dict[str, Solver] = {
    "DDIM": ss.DDIM(),
    "DPMSolverPP": ss.DPMSolverPP(2),
    "UniPC": ss.UniPC(3),
    "VelocityAB": ss.VelocityAB(3),
    "DPMSolver": ss.solvers.DPMSolver(3),
    "DPMSolver fast": ss.solvers.DPMSolver(kind="fast"),
    "EDMHeun": ss.EDMHeun(),
    "RungeKutta4": ss.solvers.RungeKutta4(),
    "PNDM": ss.solvers.PNDM(),
    "PECE": ss.solvers.with_corrector(ss.solvers.DEIS(2), reevaluate=True),
    "self-start": ss.VelocityAB(3, start="self"),
    "noisy": Multistep(2, eta=1.0),
}
EACH_RULE = pytest.mark.parametrize("name", RULES)


@EACH_RULE
@pytest.mark.parametrize("grid", [None, ss.grids.uniform_t])
def test_n_steps_are_n_legs(name: str, grid: Any) -> None:
    for n in (1, 2, 3, 8, 20):
        rule = ss.solvers.DPMSolver(kind="fast").for_nfe(3 * n - 2)[0] if "fast" in name else RULES[name]
        found = ss.solve(LINEAR, START, rule, steps=n, grid=grid, seed=0)
        assert len(found.times) == n + 1
        assert (found.times[0], found.times[-1]) == (1.0, 0.0)
        assert found.nfe == found.plan.nfe


@EACH_RULE
@pytest.mark.parametrize("t_end", [0.0, 0.05])
def test_a_budget_of_evaluations_is_never_exceeded(name: str, t_end: float) -> None:
    rule = RULES[name]
    for nfe in (*range(1, 14), 17, 24):
        recorder = Recorder(LINEAR)
        least = {"EDMHeun": 2, "DPMSolver": 3, "RungeKutta4": 4}.get(name, 1) if t_end > 0 else 1
        if nfe < least:
            with pytest.raises(ValueError, match=f"needs at least {least} evaluations, `nfe` = {nfe} is too small"):
                ss.solve(recorder, START[:1], rule, nfe=nfe, t_end=t_end, seed=0)
            continue
        found = ss.solve(recorder, START[:1], rule, nfe=nfe, t_end=t_end, seed=0)
        assert len(recorder.times) == found.nfe <= nfe
        if name in ("DDIM", "DPMSolverPP", "UniPC", "VelocityAB", "noisy"):
            assert found.nfe == nfe, "a rule of one stage spends all of it"
        assert found.nfe > nfe - 4, "and no rule leaves a leg unspent"


def test_without_a_number_there_are_twenty_legs_and_the_default_rule_fits_them() -> None:
    found = ss.solve(MIX, START, seed=0)
    assert len(found.times) == 21 and found.nfe == 20
    assert found.plan.name == repr(default_solver(20, MIX))
    for nfe in (1, 2, 3, 4, 5, 10, 40):
        found = ss.solve(MIX, START, nfe=nfe, seed=0)
        assert found.nfe == nfe and found.plan.name == repr(default_solver(nfe, MIX))
        assert found.x.isfinite().all()
    noisy = ss.Denoiser(lambda x, t: torch.zeros_like(x), VP, predicts="eps")
    assert repr(default_solver(10, noisy)) != repr(default_solver(10, MIX)), (
        "networks of noise have a rule of their own"
    )


@pytest.mark.parametrize("rule", [ss.DDIM(), ss.UniPC(3), ss.solvers.DPMSolver(2), Multistep(2, eta=1.0)], ids=str)
def test_a_grid_of_ones_own_is_the_builders_to_the_bit(rule: Solver) -> None:
    for builder in (ss.grids.karras, ss.grids.uniform_lam, ss.grids.quadratic_vp):
        built = ss.sample(MIX, START, rule, steps=7, grid=builder, seed=1)
        times = builder(VP, 7)
        assert torch.equal(ss.sample(MIX, START, rule, grid=times, seed=1), built)
        assert torch.equal(ss.sample(MIX, START, rule, grid=times.tolist(), seed=1), built)
        assert torch.equal(ss.sample(MIX, START, rule, grid=tuple(times.tolist()), seed=1), built)
    assert torch.equal(ss.sample(MIX, START, rule, steps=7, grid=default_grid(7, MIX, rule), seed=1),
                       ss.sample(MIX, START, rule, steps=7, seed=1)), "the default grid"  # fmt: skip


def test_a_zigzag_may_be_given_as_a_grid() -> None:
    times = ss.grids.ancestral(VP, ss.grids.karras(VP, 10))
    found = ss.solve(MIX, START, ss.DDIM(), grid=times, seed=0)
    assert found.plan.stochastic and found.nfe == 10
    assert not torch.equal(found.x, ss.sample(MIX, START, ss.DDIM(), grid=times, seed=1))


# Windows.

GAUSSIAN = ss.GaussianMixture(VP, torch.tensor([[0.3, -0.5]]), cov=torch.tensor([[[1.2, 0.4], [0.4, 0.5]]]))


@pytest.mark.parametrize(("t_start", "t_end"), [(1.0, 0.3), (0.6, 0.1), (0.35, 0.02), (None, 0.2)])
def test_a_run_starts_and_ends_where_it_is_told(t_start: float | None, t_end: float) -> None:
    # The flow of a Gaussian is known between any two times.
    found = ss.solve(GAUSSIAN, START, ss.DPMSolverPP(3, kind="single"), steps=60, t_start=t_start, t_end=t_end)
    first = 1.0 if t_start is None else t_start
    assert (found.times[0], found.times[-1]) == (first, t_end)
    assert torch.allclose(found.x, GAUSSIAN.flow(START, first, t_end), atol=1e-4)


def test_an_edit_keeps_what_its_start_leaves() -> None:
    data = MIX.sample(64, t=0.0, seed=0)
    kept = []
    for t in (0.05, 0.5, 1.0):
        noisy = VP.perturb(data, t, ss.Noise(1).like(data, 0))
        out = ss.sample(MIX, noisy, ss.DPMSolverPP(2), steps=20, t_start=t)
        kept.append(float((out - data).norm(dim=1).mean()))
    assert kept[0] < 0.3 and kept[2] > 1.0
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.parametrize(
    "rule",
    [
        ss.DDIM(),
        ss.EDMHeun(),
        ss.solvers.DPM2(),
        ss.solvers.DPMSolver(3),
        ss.DPMSolverPP(2, kind="single"),
        ss.solvers.RungeKutta4(),
    ],
    ids=str,
)
def test_a_run_in_two_parts_is_one_run_to_the_bit(rule: Solver) -> None:
    times = ss.grids.karras(VP, 9)
    whole = ss.sample(MIX, START, rule, grid=times)
    half = ss.sample(MIX, START, rule, grid=times[:5])
    assert torch.equal(ss.sample(MIX, half, rule, grid=times[4:]), whole)


def test_the_start_is_drawn_from_the_marginal_at_its_own_time() -> None:
    def start(**options: Any) -> Tensor:
        seen: list[Tensor] = []
        options = {"steps": 2, "seed": 3, "watch": lambda step: seen.append(step.x), **options}
        ss.sample(MIX, (4, 2), ss.DDIM(), **options)
        return seen[0].double()

    unit = start() / math.hypot(VP.alpha(1.0), VP.sigma(1.0))
    assert float(unit.std()) > 0.3
    for t in (0.5, 0.3):
        with pytest.warns(UserWarning, match=f"at t = {t:g} the signal-to-noise ratio is .*too high"):
            early = start(t_start=t)
        assert torch.allclose(early, unit * math.hypot(VP.alpha(t), VP.sigma(t)), rtol=1e-5)
        with pytest.warns(UserWarning, match="too high for a Gaussian prior"):
            wide = start(t_start=t, start=ss.Start(data_std=3.0))
        assert torch.allclose(wide, unit * math.hypot(3 * VP.alpha(t), VP.sigma(t)), rtol=1e-5)
    with pytest.warns(UserWarning, match="too high for a Gaussian prior"):
        assert torch.equal(start(steps=None, grid=[0.5, 0.3, 0.0]), start(t_start=0.5))
    edm = ring(ss.EDM())
    x = ss.solve(edm, (1000, 2), ss.DDIM(), steps=1, seed=0, watch=ss.Watch(save_at="all")).trajectory[80.0]
    assert 70 < float(x.std()) < 90


def test_dtype_and_device_of_a_start_that_is_drawn() -> None:
    assert ss.sample(MIX, (2, 2), steps=3, seed=0).dtype == torch.float32
    assert ss.sample(MIX, (2, 2), steps=3, seed=0, start=ss.Start(dtype=torch.float64)).dtype == torch.float64
    assert ss.sample(MIX, START, steps=3).dtype == torch.float64, "a state keeps its own"
    model = ss.Denoiser(Net().to("meta"), VP, predicts="v")
    assert ss.sample(model, (2, 2), steps=3, seed=0).device.type == "meta", "where the network is"
    plain = ss.Denoiser(lambda x, t: x, VP, predicts="v")
    assert ss.sample(plain, (2, 2), steps=3, seed=0, start=ss.Start(device="meta")).device.type == "meta"


# Seeds.


@pytest.mark.parametrize("rule", [ss.DDIM(), Multistep(2, eta=1.0)], ids=str)
@pytest.mark.parametrize("event", [(2,), (3, 5)])
def test_sample_i_is_the_same_in_every_batch(rule: Solver, event: tuple[int, ...]) -> None:
    kwargs: dict[str, Any] = {"steps": 5, "seed": 11}
    all_of_them = ss.sample(LINEAR, (64, *event), rule, **kwargs)
    for n in (1, 7):
        # Nothing but elementwise arithmetic: to the bit, noise and all.
        assert torch.equal(ss.sample(LINEAR, (n, *event), rule, **kwargs), all_of_them[:n])
    tail = ss.sample(LINEAR, (3, *event), rule, steps=5, seed=ss.Noise(11, offset=61))
    assert torch.equal(tail, all_of_them[61:]), "on another rank"
    some = ss.sample(LINEAR, (2, *event), rule, steps=5, seed=ss.Noise(11, indices=[40, 3]))
    assert torch.equal(some, all_of_them[[40, 3]])
    if event == (2,):
        whole = ss.sample(MIX, (64, 2), rule, start=ss.Start(dtype=torch.float64), **kwargs)
        for n in (1, 7):
            part = ss.sample(MIX, (n, 2), rule, start=ss.Start(dtype=torch.float64), **kwargs)
            assert torch.allclose(part, whole[:n], rtol=1e-12, atol=1e-12)


def test_a_seed_for_each_sample() -> None:
    rule = Multistep(1, eta=1.0)
    out = ss.sample(MIX, (3, 2), rule, steps=5, seed=[7, 8, 7], start=ss.Start(dtype=torch.float64))
    assert torch.equal(out[0], out[2]) and not torch.equal(out[0], out[1])
    with pytest.raises(ValueError, match="`seed` has 2 entries and the state has 3 rows"):
        ss.sample(MIX, (3, 2), rule, steps=5, seed=[7, 8])


def test_seeds_repeat_and_the_start_shares_nothing_with_the_rows() -> None:
    rule = Multistep(1, eta=1.0)
    a, b, c = (ss.solve(MIX, (3, 2), rule, steps=4, seed=s) for s in (5, 5, 6))
    assert torch.equal(a.x, b.x) and not torch.equal(a.x, c.x)
    assert (a.seed, c.seed) == (5, 6)
    fresh = [ss.solve(MIX, (3, 2), rule, steps=4) for _ in range(2)]
    assert isinstance(fresh[0].seed, int) and fresh[0].seed != fresh[1].seed
    assert torch.equal(ss.sample(MIX, (3, 2), rule, steps=4, seed=fresh[0].seed), fresh[0].x), "it is told"
    # Given the start, another seed still gives another path; without noise it gives the same.
    paths = [ss.sample(MIX, START, rule, steps=4, seed=s) for s in (0, 1)]
    assert not torch.equal(*paths)
    assert torch.equal(*(ss.sample(MIX, START, ss.DDIM(), steps=4, seed=s) for s in (0, 1)))
    first = a.plan.rows[1].z[0][0]
    drawn = ss.Noise(5).fork(0).normal((3, 2), 0), ss.Noise(5).fork(1).normal((3, 2), first)
    assert not torch.equal(*drawn)


def test_no_generator_but_ones_own_is_touched() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    for seed in (0, None):
        ss.sample(MIX, (3, 2), Multistep(1, eta=1.0), steps=4, seed=seed)
        z = ss.encode(MIX, START, steps=4)
        ss.decode(MIX, z, steps=4)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()  # noqa: NPY002


# Looking on, and interfering.


def test_callbacks_and_hooks_see_every_node() -> None:
    seen: list[Step] = []
    nodes: list[tuple[int, float]] = []

    def look(node: int, t: Any, x: Tensor) -> Tensor:
        nodes.append((node, t))
        return x

    found = ss.solve(MIX, START, ss.solvers.DPMSolver(2), steps=5, watch=ss.Watch(callback=seen.append, hook=look))
    assert [s.t for s in seen] == found.times and nodes == list(enumerate(found.times))
    assert [s.nfe for s in seen] == [1, 3, 5, 7, 9, 9]
    assert torch.equal(seen[0].x, START) and torch.equal(seen[-1].x, found.x)
    for step in seen[:-1]:
        assert step.x0 is not None and torch.equal(step.x0, MIX.x0(step.x, step.t))


def test_a_hook_that_replaces_known_numbers_holds_them_exactly() -> None:
    known = torch.tensor(0.25, dtype=torch.float64)

    def inpaint(node: int, t: float, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, 0] = VP.alpha(t) * known + VP.sigma(t) * ss.Noise(9).like(x, node)[:, 0]
        return x

    for rule in (ss.DDIM(), ss.UniPC(3), Multistep(2, eta=1.0)):
        out = ss.sample(MIX, START, rule, steps=8, watch=ss.Watch(hook=inpaint), seed=0)
        assert bool((out[:, 0] == known).all())
        assert bool((out[:, 1] != ss.sample(MIX, START, rule, steps=8, seed=0)[:, 1]).all())


def test_trajectories_hold_what_was_asked_for() -> None:
    times = ss.grids.karras(VP, 6).tolist()
    seen: list[Step] = []
    found = ss.solve(MIX, START, grid=times, watch=ss.Watch(save_at="all", callback=seen.append))
    assert list(found.trajectory) == times
    for step in seen:
        assert torch.equal(found.trajectory[step.t], step.x)
    assert torch.equal(found.trajectory[0.0], found.x)
    some = ss.solve(MIX, START, grid=times, watch=ss.Watch(save_at=[times[4], times[1]]))
    assert list(some.trajectory) == [times[1], times[4]]
    assert torch.equal(some.trajectory[times[4]], found.trajectory[times[4]])
    assert ss.solve(MIX, START, grid=times).trajectory == {}
    meta = ss.solve(MIX, START, grid=times, watch=ss.Watch(save_at="all", save_device="meta"))
    assert all(x.device.type == "meta" for x in meta.trajectory.values()) and meta.x.device.type == "cpu"
    with pytest.raises(ValueError, match=r"`save_at` must name times of the grid, got 0.33; the nearest is 0\.\d"):
        ss.solve(MIX, START, grid=times, watch=ss.Watch(save_at=[times[1], 0.33]))
    with pytest.raises(ValueError, match="`save_at` must be one of 'all', got 'last'"):
        ss.solve(MIX, START, grid=times, watch=ss.Watch(save_at="last"))
    many = torch.tensor([[1.0, 0.9], [0.5, 0.4], [0.0, 0.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="each sample has its own times here; use `callback`"):
        ss.solve(MIX, START[:2], grid=many, watch=ss.Watch(save_at="all"))


def test_progress_is_quiet_unless_somebody_watches(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for progress in (False, True):
        ss.sample(MIX, START, steps=4, watch=ss.Watch(progress=progress))
        assert capsys.readouterr() == ("", "")
    found = ss.solve(MIX, START, ss.solvers.DPMSolver(2), steps=4, watch=ss.Watch(progress="always"))
    out, err = capsys.readouterr()
    assert out == "" and f"{found.nfe}/{found.nfe}" in err and "DPMSolver" in err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ss.sample(MIX, START, steps=4, watch=True)
    assert "4/4" in capsys.readouterr().err


def test_samples_that_are_not_finite_do_not_go_unsaid() -> None:
    broken = ss.Denoiser(lambda x, t: x / 0, VP, predicts="x0")
    with pytest.warns(UserWarning, match="not all finite"):
        assert not ss.sample(broken, START, steps=3).isfinite().all()


# Gradients.


def test_gradients_off_full_and_checkpointed() -> None:
    results = {}
    for grad in ("off", "full", "checkpoint"):
        net = Net().double()
        shift = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        x = START.clone().requires_grad_()
        out = ss.sample(ss.Denoiser(net, VP, predicts="v").given(shift=shift), x, ss.UniPC(2), steps=4, grad=grad)
        calls = len(net.seen)
        assert calls == 4
        if grad == "off":
            assert not out.requires_grad and out.grad_fn is None
            assert all(p.grad is None for p in net.parameters())
        else:
            out.square().sum().backward()
            assert len(net.seen) == (8 if grad == "checkpoint" else 4), "a checkpoint is paid by a second pass"
            grads = [x.grad, shift.grad, *(p.grad for p in net.parameters())]
            results[grad] = grads
        values = results.setdefault("values", [])
        values.append(out.detach())
    assert all(torch.equal(v, results["values"][0]) for v in results["values"])
    assert all(torch.equal(a, b) for a, b in zip(results["full"], results["checkpoint"], strict=True))
    assert all(bool(g.any()) for g in results["full"])


def test_gradients_are_right_also_for_a_start_that_is_drawn() -> None:
    net = Net().double()
    model = ss.Denoiser(net, VP, predicts="v")

    def loss() -> Tensor:
        options: dict[str, Any] = {"steps": 3, "seed": 0, "grad": "full"}
        return ss.sample(model, (2, 2), Multistep(2, eta=0.5), **options).square().sum()

    loss().backward()
    p = net.last.bias
    got = p.grad.clone()
    for i in range(2):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p[i] += sign * 1e-6
                ends.append(float(loss()))
                p[i] -= sign * 1e-6
        assert float(got[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-6)


def test_gradients_in_the_times_come_through_a_grid() -> None:
    times = torch.tensor([1.0, 0.6, 0.2, 0.05], dtype=torch.float64, requires_grad=True)
    out = ss.sample(MIX, START, ss.DPMSolverPP(2), grid=times, grad="full")
    (got,) = torch.autograd.grad(out.sum(), times)
    ends = []
    for sign in (1, -1):
        moved = times.detach() + sign * torch.tensor([0, 1e-6, 0, 0], dtype=torch.float64)
        ends.append(float(ss.sample(MIX, START, ss.DPMSolverPP(2), grid=moved).sum()))
    assert float(got[1]) == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5)


def test_sampling_leaves_the_callers_gradient_mode_as_it_was() -> None:
    for mode in (True, False):
        with torch.set_grad_enabled(mode):
            ss.sample(MIX, START, steps=2)
            assert torch.is_grad_enabled() is mode
            with pytest.raises(TypeError):
                ss.sample(MIX, START, steps=2, watch=ss.Watch(hook=lambda node, t, x: None))  # type: ignore[arg-type, return-value]
            assert torch.is_grad_enabled() is mode


# What the network is asked.


@EACH_RULE
def test_the_network_is_asked_exactly_what_the_plan_says(name: str) -> None:
    rule, nfe = RULES[name], 13
    recorder = Recorder(MIX)
    found = ss.solve(recorder, START, rule, nfe=nfe, seed=0)
    assert recorder.times == [row.t for row in found.plan.rows if row.evaluates]
    assert len(recorder.times) == found.nfe == found.plan.nfe
    assert all(x.shape == START.shape and x.dtype == START.dtype for x in recorder.states)


def test_a_plan_runs_as_it_is() -> None:
    plan = ss.UniPC(2).plan(VP, ss.grids.karras(VP, 6))
    found = ss.solve(MIX, START, plan)
    assert found.plan is plan and found.times == plan.times
    assert torch.equal(found.x, ss.sample(MIX, START, ss.UniPC(2), grid=ss.grids.karras(VP, 6)))
    for extra in ({"steps": 6}, {"nfe": 6}, {"grid": ss.grids.karras}, {"t_start": 0.5}, {"t_end": 0.1}):
        with pytest.raises(ValueError, match="a plan has its own grid; drop `steps`"):
            ss.solve(MIX, START, plan, **extra)
    with pytest.warns(UserWarning, match=r"the plan was written for VP.*, the model is on EDM"):
        ss.sample(ring(ss.EDM()), START, plan)
    assert torch.equal(ss.sample(MIX, START, Plan(plan.rows)), found.x), "a plan by hand belongs to none"


def test_conditions_go_to_the_network() -> None:
    recorder = Recorder(MIX)
    label = torch.arange(6)
    ss.sample(recorder.given(label=label, text=["a"] * 6), START, steps=3)
    assert all(c["label"] is label and c["text"] == ["a"] * 6 for c in recorder.received)
    assert len(recorder.received) == 3
    model = ss.Denoiser(Net(), VP, predicts="v")
    moved = ss.sample(model.given(shift=torch.ones(6, 1)), START.float(), steps=3)
    assert not torch.equal(moved, ss.sample(model, START.float(), steps=3))
    with pytest.raises(ValueError, match="condition `shift` has 2 rows and the state has 6"):
        ss.sample(model.given(shift=torch.ones(2, 1)), START.float(), steps=3)
    one = ss.sample(model.given(shift=torch.ones(1, 1)), START.float(), steps=3)
    assert torch.equal(one, moved), "one row is expanded to all rows"
    table = torch.ones(2, 1, 1)  # no batch axis: it reaches the network as it is
    shared = ss.Denoiser(lambda x, t, table: x + table.sum(0), VP, predicts="v").given(shared={"table": table})
    assert ss.sample(shared, START, steps=3).shape == START.shape
    z = ss.encode(recorder.given(label=label), START, steps=3)
    ss.decode(recorder.given(label=label), z, steps=3)
    assert all(c["label"] is label for c in recorder.received)


def test_networks_run_in_their_own_dtype_and_states_do_not() -> None:
    want = ss.sample(ss.Denoiser(Net(), VP, predicts="v"), START.float(), ss.UniPC(3), steps=6)
    for dtype, tolerance in ((torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)):
        net = Net().to(dtype)
        out = ss.sample(ss.Denoiser(net, VP, predicts="v"), START.float(), ss.UniPC(3), steps=6)
        assert set(net.seen) == {dtype} and out.dtype == torch.float32
        assert torch.allclose(out, want, atol=tolerance)


# The ends.

FINITE = {"default": None, "UniPC": ss.UniPC(3), "DPMSolver": ss.solvers.DPMSolver(3), "noisy": Multistep(2, eta=1.0)}


@ALL
@pytest.mark.parametrize("name", FINITE)
def test_samples_are_finite_at_every_number_of_steps(sde: ss.SDE, name: str) -> None:
    model = ring(sde)
    counts = (1, 3) if sde is BY_DRIFT else (1, 2, 3, 5) if name == "DPMSolver" else (1, 2, 4, 11, 50)
    for n in counts:
        found = ss.solve(model, (8, 2), FINITE[name], steps=n, seed=n)
        assert found.x.isfinite().all(), n
        # Single steps of noise from α near 0 are large when there are few of them.
        assert float(found.x.abs().max()) < 10 or name == "DPMSolver", "and where data is"


@ALL
def test_into_no_noise_the_result_is_the_denoised_state(sde: ss.SDE) -> None:
    model = ring(sde)
    for rule in (ss.DDIM(), ss.DPMSolverPP(3), ss.UniPC(2), Multistep(2, eta=1.0)):
        recorder = Recorder(model)
        out = ss.sample(recorder, (4, 2), rule, steps=4, seed=0, start=ss.Start(dtype=torch.float64))
        assert torch.equal(out, model.x0(recorder.states[-1], recorder.times[-1]))


# There and back.


@pytest.mark.parametrize(
    ("sde", "rule", "order"),
    [
        (VP, ss.DDIM(), 1),
        (VP, ss.DPMSolverPP(2), 2),
        (VP, ss.EDMHeun(), 2),
        (VP, None, 3),
        (ss.EDM(), None, 3),
        (ss.Flow(), ss.DPMSolverPP(2), 2),
        (ss.Flow(), None, 3),
    ],
    ids=str,
)
def test_decode_of_encode_returns_data_at_the_order_of_the_method(sde: ss.SDE, rule: Solver | None, order: int) -> None:
    model = ring(sde)
    data = model.sample(16, t=0.0, seed=0)
    ends = {"t_start": sde.t_of_lam(2.5), "t_end": sde.t_of_lam(-2.0)}
    gaps = []
    for n in (24, 48):
        z = ss.encode(model, data, rule, steps=n, **ends)
        gaps.append(float((ss.decode(model, z, rule, steps=n, **ends) - data).norm(dim=1).median()))
    # Back and forth the errors of even orders cancel, so it may be better than the order.
    assert math.log2(gaps[0] / gaps[1]) > order - 0.25, gaps
    back = ss.analysis.exact_flow(model, 60)(z, ends["t_end"], ends["t_start"])
    assert float((back - data).norm(dim=1).median()) < 0.2 * 10 ** (1 - order), "the code is where the flow leads from"


@pytest.mark.parametrize("sde", [VP, ss.Flow(), ss.VE()], ids=lambda s: type(s).__name__)
def test_codes_span_the_whole_process_by_default(sde: ss.SDE) -> None:
    model = ring(sde)
    data = model.sample(16, t=0.0, seed=0)
    seen: list[Step] = []
    z = ss.encode(model, data, watch=ss.Watch(callback=seen.append))
    times = [s.t for s in seen]
    assert times == sorted(times) and times[0] == sde.t_min and times[-1] >= 0.99 * sde.T
    back = ss.decode(model, z)
    assert float((back - data).norm(dim=1).median()) < 0.02


def test_encoding_takes_the_grid_that_decoding_takes() -> None:
    times = ss.grids.karras(VP, 12, t_end=0.01)
    data = MIX.sample(4, t=0.0, seed=0)
    z = ss.encode(MIX, data, ss.DDIM(), grid=times)
    assert torch.equal(z, ss.encode(MIX, data, ss.DDIM(), grid=ss.grids.karras, steps=12, t_start=0.01))
    assert torch.equal(z, ss.encode(MIX, data, ss.DDIM(), grid=times.tolist()))
    back = ss.decode(MIX, z, ss.DDIM(), grid=times)
    assert torch.equal(back, ss.sample(MIX, z, ss.DDIM(), grid=times)), "decoding is sampling from a code"


# What is refused.

Call = Callable[[], Any]
BAD: dict[str, tuple[Call, type[Exception], str]] = {
    "steps and nfe": (lambda: ss.sample(MIX, START, steps=3, nfe=3), ValueError, "give one of `steps`"),
    "steps and grid": (lambda: ss.sample(MIX, START, steps=3, grid=[1.0, 0.0]), ValueError, "give one of `steps`"),
    "nfe and grid": (lambda: ss.sample(MIX, START, nfe=3, grid=[1.0, 0.0]), ValueError, "give one of `steps`"),
    "grid and t_start": (
        lambda: ss.sample(MIX, START, grid=[1.0, 0.0], t_start=0.5),
        ValueError,
        "`grid` has its own ends; .*`grids.window`",
    ),
    "grid and t_end": (lambda: ss.sample(MIX, START, grid=[1.0, 0.0], t_end=0.5), ValueError, "has its own ends"),
    "no steps": (lambda: ss.sample(MIX, START, steps=0), ValueError, "`steps` must be at least 1, got 0"),
    "half a step": (lambda: ss.sample(MIX, START, steps=2.5), TypeError, "`steps` must be an integer"),  # type: ignore[arg-type]
    "no evaluations": (lambda: ss.sample(MIX, START, ss.DDIM(), nfe=0), ValueError, "`nfe` must be at least 1, got 0"),
    "a budget too small": (
        lambda: ss.sample(MIX, START, ss.solvers.RungeKutta4(), nfe=3, t_end=0.1),
        ValueError,
        "RungeKutta4.* needs at least 4 evaluations, `nfe` = 3 is too small a budget",
    ),
    "a grid the wrong way": (lambda: ss.sample(MIX, START, grid=[0.1, 1.0]), ValueError, r"times.flip\(0\)"),
    "a grid that repeats": (
        lambda: ss.sample(MIX, START, grid=[1.0, 0.5, 0.5, 0.0]),
        ValueError,
        r"repeats a time at index 2 \(t = 0.5\)",
    ),
    "a grid past T": (lambda: ss.sample(MIX, START, grid=[2.0, 0.0]), ValueError, r"must lie in \[0, T\]"),
    "a grid by name": (lambda: ss.sample(MIX, START, grid="karras"), TypeError, "`grid` must be times or a grid maker"),  # type: ignore[arg-type]
    "a start past T": (lambda: ss.sample(MIX, START, t_start=2.0), ValueError, "`t_start` must be .*at most 1, got 2"),
    "an end past the start": (lambda: ss.sample(MIX, START, t_start=0.5, t_end=0.6), ValueError, "`t_end` must be"),
    "a network for a model": (lambda: ss.sample(Net(), START), TypeError, "`model` must be a denoiser.*got Net"),  # type: ignore[arg-type]
    "a rule by name": (lambda: ss.sample(MIX, START, "unipc"), TypeError, "`solver` must be a solver.*'unipc'"),  # type: ignore[arg-type]
    "a rule not called": (lambda: ss.sample(MIX, START, ss.UniPC), TypeError, r"call it, UniPC\(\)"),  # type: ignore[arg-type]
    "a number for a shape": (lambda: ss.sample(MIX, 4), ValueError, r"a state or a shape \(B, \*event\), got 4"),  # type: ignore[arg-type]
    "an empty shape": (lambda: ss.sample(MIX, ()), ValueError, r"a shape \(B, \*event\), got \(\)"),
    "a shape of floats": (lambda: ss.sample(MIX, (4.0, 2)), TypeError, "`shape` must be an integer"),  # type: ignore[arg-type]
    "a negative shape": (lambda: ss.sample(MIX, (-4, 2)), ValueError, "`shape` must be at least 0"),
    "a half state": (lambda: ss.sample(MIX, START.half()), TypeError, "`x` must be float32 or float64"),
    "an integer state": (lambda: ss.sample(MIX, torch.zeros(2, 2, dtype=torch.int64)), TypeError, "int64"),
    "a seed that is none": (lambda: ss.sample(MIX, (2, 2), seed="a"), TypeError, "`seed` must be an integer"),
    "gradients by halves": (lambda: ss.sample(MIX, START, grad="half"), ValueError, "`grad` must be one of 'off'"),
    "progress sometimes": (
        lambda: ss.sample(MIX, START, watch=ss.Watch(progress="auto")),
        ValueError,
        "`progress` must be one of",
    ),
    "a shape at many times": (
        lambda: ss.sample(MIX, (2, 2), grid=torch.tensor([[1.0, 0.9], [0.1, 0.1]], dtype=torch.float64)),
        ValueError,
        "have no common prior; give a state",
    ),
    "a misspelt option": (lambda: ss.sample(MIX, START, stpes=3), TypeError, "unexpected keyword argument 'stpes'"),
    "a code from no noise": (
        lambda: ss.encode(MIX, START, t_start=0.0),
        ValueError,
        "must end at a positive time, because a code exists only where",
    ),
    "a code on a grid to data": (lambda: ss.encode(MIX, START, grid=[1.0, 0.5, 0.0]), ValueError, "positive time"),
    "a code that goes nowhere": (
        lambda: ss.encode(MIX, START, t_start=0.5, t_end=0.5),
        ValueError,
        "`t_end` must be .*below 0.5",
    ),
    "a code by noise": (
        lambda: ss.encode(MIX, START, Multistep(1, eta=1.0)),
        ValueError,
        "`solver` must be deterministic.*draws noise. Use a solver without",
    ),
    "a code by a plan": (
        lambda: ss.encode(MIX, START, ss.DDIM().plan(VP, [1.0, 0.5])),  # type: ignore[arg-type]
        TypeError,
        "`solver` must be a solver.*which can run both ways",
    ),
    "a code with two grids": (
        lambda: ss.encode(MIX, START, grid=[1.0, 0.5], t_end=0.9),
        ValueError,
        "`grid` has its own ends; drop `steps`, `t_start` and `t_end`",
    ),
    "a code by a budget": (lambda: ss.encode(MIX, START, nfe=5), TypeError, "unexpected keyword argument 'nfe'"),
    "a code of a network": (lambda: ss.encode(Net(), START), TypeError, "`model` must be a denoiser"),  # type: ignore[arg-type]
    "a code of a shape": (lambda: ss.encode(MIX, (2, 2)), TypeError, "`x` must be a torch.Tensor"),  # type: ignore[arg-type]
    "a decoded shape": (lambda: ss.decode(MIX, (2, 2)), TypeError, "`z` must be a torch.Tensor"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_say_what_is_wrong_and_how_to_mend_it(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
