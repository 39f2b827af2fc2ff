"""A run that the caller drives is the run of the loop: to the bit, wherever it is stopped, and in any company."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import scoresde as ss
from scoresde.plan import Plan, begin, resume, run, tell
from scoresde.solvers import Solver, Statistics
from scoresde.solvers.ancestral import Churn, Restart

VP = ss.VP()
START = ss.Noise(0).normal((3, 5), 0, dtype=torch.float64)
NOISE = ss.Noise(1)


def network(x: Tensor, t: Any) -> Tensor:
    """Something that is no linear function of the state and knows its time."""
    return torch.sin(x) * 0.8 - 0.3 * (t[:, None] if isinstance(t, Tensor) and t.ndim else t)


def catalogue() -> Iterator[Solver]:
    """Every function of the catalogue with its defaults, and other options, orders and mechanisms of noise."""
    for name in dir(ss.solvers):
        function = getattr(ss.solvers, name)
        if inspect.isfunction(function) and inspect.signature(function).return_annotation == "Solver":
            parameters = inspect.signature(function).parameters.values()
            if all(p.default is not p.empty for p in parameters):
                yield function()
    yield ss.solvers.DPMSolverV3(Statistics((-6.0, 0.0, 7.0), (0.9, 0.5, 0.1), (-0.2, -0.5, -0.1), (0.1, 0.2, 0.3)))
    yield ss.solvers.with_corrector(ss.solvers.DEIS(2), reevaluate=True)
    yield ss.DDIM(1.0)
    yield ss.DPMSolverPP(3, kind="single", form="exact")
    yield ss.SDEDPMSolverPP(3, "exact", eta=0.7, start="self")
    yield ss.solvers.SASolver(3, 4, pece=True)
    yield Churn(ss.DPMSolverPP(2), 8.0)
    yield Restart(ss.EDMHeun(), 0.2, 0.5, 2)


RULES = list(catalogue())
EACH_RULE = pytest.mark.parametrize("rule", RULES, ids=lambda s: f"{s!r}".replace(" ", ""))


def drive(stepper: ss.sampling.Stepper) -> Tensor:
    while not stepper.done:
        x, t = stepper.ask()
        stepper.tell(network(x, t))
    return stepper.x


def test_the_catalogue_is_whole() -> None:
    assert len(RULES) > 35
    assert sum(rule.plan(VP, ss.grids.karras(VP, 6)).stochastic for rule in RULES) > 12


@EACH_RULE
@pytest.mark.parametrize("noise", [NOISE, ss.Noise([3, 2**64 - 1, 5])], ids=["one seed", "seeds"])
def test_stepping_is_running_to_the_bit(rule: Solver, noise: ss.Noise) -> None:
    plan = rule.plan(VP, ss.grids.karras(VP, 7))
    stepper = ss.sampling.Stepper(plan, START, noise)
    result = drive(stepper)
    assert torch.equal(result, run(plan, network, START, noise))
    assert stepper.nfe == plan.nfe


@pytest.mark.parametrize("rule", [r for r in RULES if not isinstance(r, Restart)], ids=repr)  # which needs one grid
def test_times_of_each_sample(rule: Solver) -> None:
    plan = rule.plan(VP, torch.stack([ss.grids.karras(VP, 7, t_start=t) for t in (1.0, 0.8, 0.5)], dim=1))
    result = drive(ss.sampling.Stepper(plan, START, NOISE))
    assert torch.equal(result, run(plan, network, START, NOISE))


@EACH_RULE
def test_a_run_is_kept_and_resumed_anywhere(rule: Solver, tmp_path: Path) -> None:
    plan = rule.plan(VP, ss.grids.karras(VP, 6))
    whole = run(plan, network, START, NOISE)
    paused = begin(plan, START, NOISE)
    for k in range(plan.nfe):
        save_file(paused.state_dict(), tmp_path / f"{k}.safetensors")
        before = {name: value.clone() for name, value in paused.state_dict().items()}
        x0 = network(paused.x, paused.t)
        after = tell(paused, x0)
        assert torch.equal(tell(paused, x0).x, after.x), "the same value again"
        assert all(torch.equal(v, before[n]) for n, v in paused.state_dict().items()), "the old value is unchanged"
        paused = resume(Plan.from_dict(plan.to_dict()), load_file(tmp_path / f"{k}.safetensors"))
        paused = tell(paused, x0)
    assert paused.done and torch.equal(paused.x, whole)
    assert torch.equal(resume(plan, paused.state_dict()).x, whole)


@pytest.mark.parametrize("rule", [ss.SDEDPMSolverPP(2), ss.solvers.SEEDS(3)])
def test_brownian_paths_are_resumed(rule: Solver) -> None:
    plan, noise = rule.plan(VP, ss.grids.karras(VP, 5)), ss.Noise(4, indices=[7, 2, 2], path=True)
    paused = begin(plan, START, noise)
    while not paused.done:
        paused = tell(resume(plan, paused.state_dict()), network(paused.x, paused.t))
    assert torch.equal(paused.x, run(plan, network, START, noise))


@pytest.mark.parametrize("solver", [None, ss.UniPC(3), ss.DDIM(1.0), ss.SDEDPMSolverPP(2)], ids=repr)
def test_the_stepper_of_a_model_is_sample(solver: Solver | None) -> None:
    model = ss.GaussianMixture(VP, [[-1.0, 0.5], [1.0, 0.0]], std=0.2)
    stepper = ss.sampling.Stepper.of(model, (5, 2), solver, nfe=9, seed=3)
    while not stepper.done:
        stepper.tell(model.x0(*stepper.ask()))
    assert torch.equal(stepper.x, ss.sample(model, (5, 2), solver, nfe=9, seed=3))


@pytest.mark.parametrize("predicts", ["x0", "eps", "score", "v", "velocity", "F"])
@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow(T=0.99), ss.EDM()], ids=repr)
def test_outputs_of_networks_are_converted(predicts: str, sde: ss.SDE) -> None:
    precondition = ss.Preconditioning(0.7) if predicts == "F" else None
    model = ss.Denoiser(lambda x, t: torch.sin(x), sde, predicts=predicts, precondition=precondition)
    plan = ss.SDEDPMSolverPP(2).plan(sde, ss.grids.karras(sde, 5))
    stepper = ss.sampling.Stepper(plan, START, NOISE, predicts=predicts, sde=sde, sigma_data=model.data_scale)
    while not stepper.done:
        x, t = stepper.ask()
        stepper.tell(model.output(x, t)[0])
    assert torch.equal(stepper.x, run(plan, lambda x, t: model.x0(x, t), START, NOISE))
    options: dict[str, Any] = {"steps": 4, "seed": 1, "start": ss.Start(dtype=torch.float64)}
    stepper = ss.sampling.Stepper.of(model, (3, 5), ss.UniPC(2), predicts=model.kind.predicts, **options)
    while not stepper.done:
        stepper.tell(model.output(*stepper.ask())[0])
    # `sample` converts in the weights of the rows: rounding of float64, times 1/α = 150 and states of several hundred.
    torch.testing.assert_close(stepper.x, ss.sample(model, (3, 5), ss.UniPC(2), **options), rtol=1e-8, atol=1e-6)


def test_requests_at_different_steps_share_calls_of_the_network() -> None:
    model = ss.GaussianMixture(VP, torch.randn(6, 3, generator=torch.Generator().manual_seed(0)).double(), std=0.3)
    options: list[dict[str, Any]] = [
        {"shape_or_x": (2, 3), "solver": ss.UniPC(3), "steps": 7, "seed": [11, 12]},
        {"shape_or_x": (1, 3), "solver": ss.DDIM(1.0), "steps": 4, "seed": 9},
        {"shape_or_x": (3, 3), "solver": ss.EDMHeun(), "steps": 3, "seed": ss.Noise(5, offset=40)},
    ]
    start = ss.Start(dtype=torch.float64)
    alone = [ss.sample(model, start=start, **o) for o in options]
    waiting, requests, calls, seen = list(options), [], 0, 0
    while waiting or not all(r.done for r in requests):
        if waiting and calls % 2 == 0:  # requests come while others run
            requests.append(ss.sampling.Stepper.of(model, start=start, **waiting.pop(0)))
        batch = ss.sampling.gather(requests)
        assert batch is not None
        expected = [i for i, r in enumerate(requests) if not r.done for _ in range(len(r.x))]
        assert batch.index.tolist() == expected
        batch.tell(model.x0(batch.x, batch.t))
        calls, seen = calls + 1, seen + len(batch.x)
    assert ss.sampling.gather(requests) is None
    assert calls < sum(r.nfe for r in requests) and seen == sum(r.nfe * len(r.x) for r in requests)
    for request, x in zip(requests, alone, strict=True):  # the sums of the mixture round by the size of the batch
        torch.testing.assert_close(request.x, x, rtol=1e-12, atol=1e-12)


def test_a_stepper_goes_back_to_a_kept_state() -> None:
    stepper = ss.sampling.Stepper(ss.DDIM(1.0).plan(VP, ss.grids.karras(VP, 6)), START, NOISE)
    stepper.tell(network(*stepper.ask()))
    kept = stepper.state_dict()
    first = drive(stepper)
    stepper.load_state_dict(kept)
    assert stepper.nfe == 1 and torch.equal(drive(stepper), first)


def test_mistakes_are_named() -> None:
    plan = ss.DDIM().plan(VP, [1.0, 0.5, 0.0])
    stepper = ss.sampling.Stepper(plan, START)
    kept = stepper.state_dict()
    stepper.ask()
    with pytest.raises(ValueError, match=r"`output` must have the shape of `x`, \(3, 5\), got \(3, 1\)"):
        stepper.tell(START[:, :1])
    drive(stepper)
    with pytest.raises(ValueError, match="the run is done after 2 evaluations; its result is `x`"):
        stepper.ask()
    with pytest.raises(ValueError, match="done"):
        tell(stepper.run, START)
    with pytest.raises(ValueError, match="`noise`"):
        begin(ss.DDIM(1.0).plan(VP, [1.0, 0.5, 0.0]), START)
    with pytest.raises(ValueError, match="`sde` must be the process"):
        ss.sampling.Stepper(plan, START, predicts="eps")
    with pytest.raises(TypeError, match="`plan` must be a Plan"):
        begin(ss.DDIM(), START)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`plan` has another table"):
        resume(ss.DDIM().plan(VP, [1.0, 0.4, 0.0]), kept)
    with pytest.raises(ValueError, match="`state` must come from `state_dict`"):
        resume(plan, {"x": START})
    other = ss.sampling.Stepper(plan, START[:, :2])
    with pytest.raises(ValueError, match=r"number 1 has \(2,\)"):
        ss.sampling.gather([ss.sampling.Stepper(plan, START), other])


def test_noise_that_is_not_keyed_must_come_back() -> None:
    class Fixed:
        def like(self, x: Tensor, draw: int) -> Tensor:
            return torch.full_like(x, draw)

    plan = ss.DDIM(1.0).plan(VP, [1.0, 0.5, 0.0])
    kept = begin(plan, START, Fixed()).state_dict()
    with pytest.raises(ValueError, match="noise` of its own"):
        resume(plan, kept)
    paused = resume(plan, kept, Fixed())
    while not paused.done:
        paused = tell(paused, network(paused.x, paused.t))
    assert torch.equal(paused.x, run(plan, network, START, Fixed()))


def test_outputs_that_are_late_or_repeated_are_refused() -> None:
    model = ss.GaussianMixture(ss.VP(), [[-1.0, 0.5], [1.0, 0.0]], std=0.2)
    one, two = (ss.sampling.Stepper.of(model, (2, 2), steps=4, seed=k) for k in range(2))
    with pytest.raises(ValueError, match="`ask` has not been called"):
        one.tell(one.x)
    batch = ss.sampling.gather([one, two])
    assert batch is not None
    output = model.x0(batch.x, batch.t)
    batch.tell(output)
    with pytest.raises(ValueError, match=r"moved on since `gather`.*gather the steppers again"):
        batch.tell(output)
    with pytest.raises(ValueError, match="late or repeated"):
        one.tell(output[:2])
    assert (one.nfe, two.nfe) == (1, 1)


def test_steppers_of_two_networks_are_not_gathered() -> None:
    vp, flow = ss.VP(), ss.Flow()
    plan = ss.DDIM().plan(vp, [1.0, 0.5, 0.0])
    first = ss.sampling.Stepper(plan, torch.ones(1, 2), predicts="eps", sde=vp)
    for other in (
        ss.sampling.Stepper(plan, torch.ones(1, 2)),
        ss.sampling.Stepper(plan, torch.ones(1, 2), predicts="eps", sde=flow),
    ):
        with pytest.raises(ValueError, match=r"number 1 receives .*number 0 receives eps of VP"):
            ss.sampling.gather([first, other])


def test_a_stepper_warns_of_what_sample_warns_of() -> None:
    stepper = ss.sampling.Stepper(ss.DDIM().plan(VP, [1.0, 0.5, 0.0]), START)
    stepper.ask()
    stepper.tell(START)
    x, _ = stepper.ask()
    broken = x.clone()
    broken[1] = float("nan")
    with pytest.warns(UserWarning, match=r"the samples are not all finite.*the first is sample 1"):
        stepper.tell(broken)
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Dropout(0.5))
    model = ss.Denoiser(lambda x, t: net(x), VP, predicts="eps")
    model.inside = net
    with pytest.warns(UserWarning, match="training mode"):
        ss.sampling.Stepper.of(model, (3, 5), steps=3, seed=0)
