"""Fitted plans: better where they were not fitted, exact where they must be, and plans like any other."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.analysis.moments import point_mass_defect
from scoresde.fitting.fit import fit
from scoresde.fitting.trajectories import expansion
from scoresde.plan.matrices import unroll
from scoresde.plan.run import run


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(sde: ss.SDE | None = None) -> ss.GaussianMixture:
    return ss.GaussianMixture(ss.VP() if sde is None else sde, 0.6 * normals(6, 8, seed=5), std=0.2)


MODEL = mixture()
SDE = MODEL.sde
START = ss.Gaussian.of(SDE, MODEL.mean(), MODEL.covariance())
RULES: dict[str, Any] = {
    "multistep": ss.VelocityAB(3),
    "corrector": ss.UniPC(2),
    "single": ss.solvers.DPMSolver(3),
    "Heun": ss.EDMHeun(),
    "Euler": ss.solvers.Euler(),
}


@cache
def ends(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Starts at T and where the flow brings them."""
    x = START.sample(n, SDE.T, seed=seed)
    return x, ss.sample(MODEL, x, ss.VelocityAB(3), steps=200)


def median(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).flatten(1).square().mean(1).sqrt().median())


# A plan solved for its states.


@pytest.mark.parametrize("name", RULES)
def test_an_unrolled_plan_is_the_plan(name: str) -> None:
    plan = RULES[name].plan(SDE, ss.grids.karras(SDE, 6))
    x, _ = ends(4)
    again = unroll(plan).plan(plan)
    assert again.nfe == plan.nfe
    assert torch.allclose(run(again, MODEL.x0, x), run(plan, MODEL.x0, x), atol=1e-12)


def test_an_unrolled_stochastic_plan_draws_the_same() -> None:
    plan = ss.DPMSolverPP(2).plan(SDE, ss.grids.ancestral(SDE, ss.grids.karras(SDE, 6)))
    x, noise = ends(4)[0], ss.Noise(1)
    assert torch.allclose(run(unroll(plan).plan(plan), MODEL.x0, x, noise), run(plan, MODEL.x0, x, noise), atol=1e-12)


# What a fit buys.


def test_a_fit_holds_on_fresh_samples() -> None:
    x, truth = ends(96)
    fresh, target = ends(256, seed=1)
    begun = ss.VelocityAB(3).plan(SDE, ss.grids.quadratic_vp(SDE, 5))
    plan = fit(begun, MODEL, x, teacher=truth, steps=50)
    gain = median(ss.sample(MODEL, fresh, plan), target) / median(ss.sample(MODEL, fresh, begun), target)
    assert plan.nfe == 5 and gain < 1 / 8
    errors = plan.meta["held_out"]
    assert errors["after"]["median"] / errors["before"]["median"] == pytest.approx(gain, rel=1.0), "as it says"


def test_the_gaussian_start_is_fitted_with_it() -> None:
    x, truth = ends(96)
    fresh, target = ends(256, seed=1)
    begun = ss.VelocityAB(2).plan(SDE, ss.grids.quadratic_vp(SDE, 4, t_start=0.5))
    plan = fit(begun, MODEL, x, start=START, teacher=truth, steps=100)
    assert plan.times[0] != 0.5 and plan.meta["gaussian start"]
    without = median(ss.sample(MODEL, fresh, begun, start=START), target)
    assert median(ss.sample(MODEL, fresh, plan, start=START), target) < without / 8


def test_the_first_evaluation_may_be_asked_at_another_time() -> None:
    x, truth = ends(96)
    begun = ss.VelocityAB(2).plan(SDE, ss.grids.quadratic_vp(SDE, 4, t_start=0.5))
    plan = fit(begun, MODEL, x, start=START, teacher=truth, what=("network_times",), steps=10)
    assert plan.times[0] == 0.5 and not plan.rows[0].evaluates and plan.rows[1].t != 0.5
    found = (ss.sample(MODEL, x[:32], plan, start=START) - truth[:32]).square().mean(1).sqrt()
    assert float(found.median()) == pytest.approx(plan.meta["held_out"]["after"]["median"], rel=0.2)
    again = fit(plan, MODEL, x, start=START, teacher=truth, steps=25)
    assert again.meta["held_out"]["before"] == pytest.approx(plan.meta["held_out"]["after"]), "taken up where it was"
    assert again.meta["held_out"]["after"]["mean_log"] < 0.5 * again.meta["held_out"]["before"]["mean_log"]


def test_the_stretch_is_that_of_the_flow() -> None:
    plan = ss.VelocityAB(3).plan(SDE, ss.grids.quadratic_vp(SDE, 60))
    one = ss.GaussianMixture(SDE, torch.zeros(1, 8), std=2.0)  # whose flow is a factor
    x = SDE.prior().sample((3, 8), ss.Noise(0), dtype=torch.float64)
    factor = float(one.flow(torch.ones(1, 8, dtype=torch.float64), SDE.T, 0.0)[0, 0])
    assert torch.allclose(expansion(one, x, plan), torch.full((3,), factor, dtype=torch.float64), rtol=1e-3)
    two = ss.GaussianMixture(SDE, torch.tensor([[-1.0], [1.0]]), std=0.1)
    far, between = expansion(two, torch.tensor([[1.5], [0.0]], dtype=torch.float64), plan)
    assert between > 10 * far


def test_forks_serve_the_tails() -> None:
    begun = ss.VelocityAB(3).plan(SDE, ss.grids.quadratic_vp(SDE, 5))
    how: dict[str, Any] = {"steps": 25, "start": ss.Start(dtype=torch.float64), "seed": 1}
    plain, forked = (
        fit(begun, MODEL, (120, 8), split=ss.fitting.Split(forks=share), descent=ss.fitting.Descent(robust=10.0), **how)
        for share in (0.0, 0.5)
    )
    assert forked.meta["forks"] == 0.5
    starts = [plan.meta["held_out"]["before"]["rmse"] for plan in (plain, forked)]
    assert starts[1] > 1.2 * starts[0], "harder trajectories"
    labels = normals(120, 1, seed=3)
    seen = []

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        seen.append(len(x) == len(shift))
        return MODEL.x0(x.double(), t.double()).to(x)

    model = ss.Denoiser(net, SDE, predicts="x0").given(shift=labels)
    fit(begun, model, (120, 8), split=ss.fitting.Split(forks=0.25), steps=1)
    assert all(seen), "each with its own condition"


@pytest.mark.parametrize("what", [("times",), ("network_times",), ("weights",), ("times", "weights")], ids=" ".join)
@pytest.mark.parametrize("kind", ["plan", "rule"])
def test_each_part_is_fitted_alone(kind: str, what: tuple[str, ...]) -> None:
    x, truth = ends(96, seed=1)
    rule, grid = ss.DPMSolverPP(2), ss.grids.karras(SDE, 5)
    begun = rule.plan(SDE, grid)
    how: dict[str, Any] = {"teacher": truth, "what": what, "steps": 30}
    plan = fit(begun, MODEL, x, **how) if kind == "plan" else fit(rule, MODEL, x, grid=grid, **how)
    errors = plan.meta["held_out"]
    assert errors["after"]["mean_log"] < 0.9 * errors["before"]["mean_log"]
    a, b = unroll(begun), unroll(plan)
    if "times" not in what and "network_times" not in what:
        assert [float(t) for t in a.t] == pytest.approx([float(t) for t in b.t], abs=1e-12)
    if "weights" not in what and "times" not in what:
        assert torch.allclose(a.d, b.d, atol=1e-14)
    if kind == "rule" and what == ("times",):
        exact = rule.plan(SDE, torch.tensor(plan.meta["levels"], dtype=torch.float64))
        assert torch.allclose(unroll(exact).d, b.d, atol=1e-9), "still that rule, on another grid"


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("what", [("weights",), ("network_times", "weights")], ids=" ".join)
def test_every_rule_can_be_fitted(name: str, what: tuple[str, ...]) -> None:
    x, truth = ends(96)
    rule, legs = RULES[name].for_nfe(5)
    plan = rule.plan(SDE, ss.grids.karras(SDE, legs))
    fitted = fit(plan, MODEL, x, teacher=truth, what=what, steps=25)
    errors = fitted.meta["held_out"]
    assert fitted.nfe == plan.nfe and errors["after"]["mean_log"] < 0.8 * errors["before"]["mean_log"]


# What stays.


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow(), ss.Trig(), ss.Cosine()], ids=repr)
def test_it_stays_exact_on_one_point_and_in_order(sde: ss.SDE) -> None:
    model = mixture(sde)
    begun = ss.VelocityAB(2).plan(sde, ss.grids.karras(sde, 4))
    for what in (("times", "weights"), None):
        plan = fit(begun, model, (48, 8), start=ss.Start(dtype=torch.float64), what=what, steps=25)
        assert plan.meta["held_out"]["after"]["mean_log"] < 0.7 * plan.meta["held_out"]["before"]["mean_log"]
        assert point_mass_defect(plan, sde) < 1e-12
        levels = torch.tensor(plan.meta["levels"])
        assert bool((levels.diff() < 0).all()) and levels[0] == sde.T and levels[-1] == 0
        assert all(0.9 * sde.t_min <= row.t <= sde.T for row in plan.rows if row.evaluates)


def test_a_fit_may_end_early_and_go_up() -> None:
    grid = ss.grids.karras(SDE, 4, t_end=0.05)
    plan = fit(ss.VelocityAB(2), MODEL, (48, 8), grid=grid, start=ss.Start(dtype=torch.float64), steps=25)
    assert plan.times[-1] == 0.05 and point_mass_defect(plan, SDE) < 1e-12
    data = MODEL.sample(48, seed=0)
    up = ss.DPMSolverPP(3, kind="single").plan(SDE, ss.grids.karras(SDE, 4, t_end=SDE.t_min).flip(0), up="solve")
    code = ss.encode(MODEL, data, steps=100)
    fitted = fit(up, MODEL, data, teacher=code, what=("network_times", "weights"), steps=25)
    assert fitted.meta["held_out"]["after"]["mean_log"] < 0.3 * fitted.meta["held_out"]["before"]["mean_log"]


def test_it_is_never_worse_and_seeded() -> None:
    x, truth = ends(96)
    begun = ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 4))
    best = fit(begun, MODEL, x, teacher=truth, steps=25)
    assert unroll(best).d.equal(unroll(fit(begun, MODEL, x, teacher=truth, steps=25)).d)
    done = ss.sample(MODEL, x, best)  # a teacher that the plan already is
    same = fit(best, MODEL, x, teacher=done, what=("weights",), steps=5)
    assert same.rows == best.rows, "nothing to gain, nothing lost"


def test_it_is_saved_with_where_it_comes_from(tmp_path: Path) -> None:
    x, truth = ends(96)
    plan = fit(ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 4)), MODEL, x, teacher=truth, steps=10)
    plan.save(tmp_path / "plan.json")
    again = ss.Plan.load(tmp_path / "plan.json")
    assert again == plan and again.meta == plan.meta
    assert again.meta["scoresde"] == ss.__version__ and again.meta["sde"] == repr(SDE)
    assert again.meta["from"].startswith("VelocityAB") and again.meta["teacher"] == "given"


def test_stochastic_plans_keep_their_noise() -> None:
    grid = ss.grids.ancestral(SDE, ss.grids.karras(SDE, 6))
    begun = ss.DDIM().plan(SDE, grid)
    down = [
        torch.linspace(float(a), float(b), 20, dtype=torch.float64)[1:] if b < a else b[None] for a, b in pairwise(grid)
    ]
    teacher = ss.solvers.DPMSolver(3).plan(SDE, torch.cat([grid[:1], *down]))
    assert teacher.draws == begun.draws
    plan = fit(begun, MODEL, (96, 8), teacher=teacher, start=ss.Start(dtype=torch.float64), steps=50)
    errors = plan.meta["held_out"]
    assert errors["after"]["mean_log"] < 0.5 * errors["before"]["mean_log"]
    assert torch.allclose(unroll(plan).z, unroll(begun).z) and point_mass_defect(plan, SDE) < 1e-12


def test_stochastic_plans_follow_their_paths() -> None:
    rule, noise = ss.SDEDPMSolverPP(2), ss.Noise(3, path=True)
    begun, teacher = (rule.plan(SDE, ss.grids.karras(SDE, n)) for n in (8, 80))
    plan = fit(begun, MODEL, (96, 8), teacher=teacher, seed=noise, start=ss.Start(dtype=torch.float64), steps=25)
    errors = plan.meta["held_out"]
    assert errors["after"]["mean_log"] < 0.8 * errors["before"]["mean_log"] and plan.spans == begun.spans


# Networks.


class Net(nn.Module):
    """A network in float32 with a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        centres = torch.stack([torch.full((4,), -0.7), torch.full((4,), 0.7)]) + (
            0 if shift is None else shift[:1, None]
        )
        alpha, sigma = (v[:, None] for v in (SDE.alpha(t), SDE.sigma(t)))
        r = (x[:, None] * centres * (alpha / (alpha**2 * 0.05 + sigma**2))[:, None]).sum(-1).softmax(1)
        mean = r @ centres
        return self.scale * (mean + alpha * 0.05 / (alpha**2 * 0.05 + sigma**2) * (x - alpha * mean))


def test_networks_are_fitted_to_and_left_alone() -> None:
    net = Net()
    model = ss.Denoiser(net, SDE, predicts="x0")
    begun = ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 4))
    plans = [
        fit(begun, model, (48, 4), steps=20, **how)
        for how in ({}, {"descent": ss.fitting.Descent(grad="checkpoint", batch=16)})
    ]
    assert net.scale.grad is None
    for plan in plans:
        assert plan.meta["held_out"]["after"]["mean_log"] < 0.5 * plan.meta["held_out"]["before"]["mean_log"]
    conditioned = fit(begun, model.given(shift=torch.full((48,), 0.1)), (48, 4), steps=5)
    assert conditioned.meta["held_out"]["before"] != plans[0].meta["held_out"]["before"], "the condition is handed on"


def test_checkpointing_keeps_the_memory_of_one_evaluation() -> None:
    wide = nn.Sequential(nn.Linear(4, 512), nn.Tanh(), nn.Linear(512, 4)).requires_grad_(False)
    model = ss.Denoiser(lambda x, t: wide(x), SDE, predicts="x0")
    kept: dict[str, list[int]] = {"full": [], "checkpoint": []}
    for grad, sizes in kept.items():

        def saved(x: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(x.numel() if x.shape[-1:] == (512,) else 0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(saved, lambda x: x):
            fit(
                ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 6)),
                model,
                (12, 4),
                steps=1,
                descent=ss.fitting.Descent(grad=grad),
            )
    wanted = {grad: max(sizes, default=0) for grad, sizes in kept.items()}
    assert wanted == {"full": 8 * 512, "checkpoint": 0}, "no activation is held from one evaluation to the next"


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    x, truth = ends(96)
    fit(ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 3)), MODEL, x, teacher=truth, steps=5, progress="always")
    shown = capsys.readouterr().err
    assert "train=" in shown and "held=" in shown


PLAN = ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 4))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: fit(PLAN, MODEL, (9, 8), grid=ss.grids.karras(SDE, 4)), "drop `grid`"),
        (lambda: fit(ss.UniPC(), MODEL, (9, 8)), "`grid` must be given"),
        (lambda: fit(PLAN, MODEL, (9, 8), what=("time",)), "`what`"),
        (lambda: fit(PLAN, MODEL, (9, 8), what=()), "leaves nothing to fit"),
        (lambda: fit(PLAN, MODEL, (1, 8)), "`held_out`"),
        (lambda: fit(PLAN, MODEL, ends(9)[0], split=ss.fitting.Split(forks=0.5)), "`forks`"),
        (lambda: expansion(MODEL, ends(9)[0], ss.DDPM().plan(SDE, ss.grids.karras(SDE, 4))), "draws noise"),
        (lambda: fit(replace(PLAN, rows=PLAN.rows), MODEL, (9, 8), teacher=torch.zeros(3, 8)), "`teacher`"),
        (
            lambda: fit(ss.EDMHeun().plan(SDE, ss.grids.karras(SDE, 4)), MODEL, (9, 8), what=("times",)),
            "do not all decrease",
        ),
        (lambda: fit(ss.DDIM(), MODEL, (9, 8), grid=ss.grids.ancestral(SDE, ss.grids.karras(SDE, 4))), "decrease"),
        (
            lambda: fit(ss.DDIM().plan(SDE, ss.grids.ancestral(SDE, ss.grids.karras(SDE, 4))), MODEL, (9, 8)),
            "`teacher`",
        ),
    ],
)
def test_bad_input_is_refused(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


# From where a fit begins.


def test_a_number_of_evaluations_begins_from_the_best_of_several_plans() -> None:
    x, truth = ends(48)
    fresh, target = ends(128, seed=1)
    plan = fit(5, MODEL, x, teacher=truth, steps=15)
    tried = plan.meta["tried"]
    assert len(tried) >= 4 and plan.nfe == 5
    scores = {name: values[-1] for name, values in tried.items() if len(values) == 2}
    assert len(scores) == 3 and plan.meta["from"] == min(scores, key=lambda name: scores[name])
    first = {name: values[0] for name, values in tried.items()}
    assert set(scores) == set(sorted(first, key=lambda name: first[name])[:3]), "the best few are tried"
    begun = ss.UniPC(2).plan(SDE, ss.grids.uniform_t(SDE, 5))
    assert median(ss.sample(MODEL, fresh, plan), target) < 0.25 * median(ss.sample(MODEL, fresh, begun), target)


def test_iterations_that_the_first_start_does_not_need_go_to_the_next() -> None:
    x, truth = ends(48)
    plan = fit(2, MODEL, x, teacher=truth, steps=150)
    fitted = plan.meta["fitted"]
    assert len(fitted) > 1 and plan.meta["iterations"] <= 150
    assert plan.meta["from"] == min(fitted, key=lambda name: fitted[name])
    assert plan.meta["held_out"]["after"]["mean_log"] == min(fitted.values()) < max(fitted.values())
    short = fit(2, MODEL, x, teacher=truth, steps=1)
    assert list(short.meta["fitted"]) == [short.meta["from"]], "and none are left"


@pytest.mark.parametrize("sde", [ss.Flow(), ss.Cosine(), ss.EDM()], ids=repr)
def test_fits_begin_from_the_universal_plan_on_every_process(sde: ss.SDE) -> None:
    model = mixture(sde)
    x = sde.sigma(sde.T) * normals(24, 8, seed=3)
    begun = ss.solvers.Universal(0.8).plan(sde, ss.grids.uniform_t(sde, 5))
    plan = fit(begun, model, x, steps=10)
    errors = plan.meta["held_out"]
    assert errors["after"]["mean_log"] < errors["before"]["mean_log"]
    assert abs(point_mass_defect(plan, sde)) < 1e-9
    found = (
        (ss.sample(model, x[:8], begun) - ss.sample(model, x[:8], ss.VelocityAB(3), steps=200)).square().mean(1).sqrt()
    )
    assert float(found.log().mean().exp()) == pytest.approx(errors["before"]["mean_log"], rel=0.2), (
        "begins where it said"
    )


def test_a_gaussian_start_has_starts_of_its_own() -> None:
    x, truth = ends(24)
    plan = fit(4, MODEL, x, start=START, teacher=truth, steps=5)
    assert plan.nfe == 4 and len(plan.meta["tried"]) == 2 and plan.times[0] < SDE.T


def test_samples_in_another_basin_are_counted() -> None:
    x, truth = ends(24)
    moved = truth.clone()
    moved[:3] += 10.0  # three of the held-out samples
    begun = ss.VelocityAB(3).plan(SDE, ss.grids.quadratic_vp(SDE, 20))
    plan = fit(begun, MODEL, x, teacher=moved, what=("weights",), steps=1)
    assert plan.meta["far"]["before"] == 3
    assert fit(begun, MODEL, x, teacher=truth, what=("weights",), steps=1).meta["far"]["before"] == 0
