"""Captured runs: inputs with memory of their own, and the samples of `sample` for every seed, state and condition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.noise.keyed import Laid, Noise
from scoresde.sampling import Profile, capture, profile

VP = ss.VP()
SHAPE = (4, 2)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def network(classes: int | None = None) -> ss.nn.MLP:
    return ss.nn.MLP(2, hidden=8, depth=1, classes=classes, seed=0).eval()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", [None, ss.UniPC(2), ss.SDEDPMSolverPP(2), ss.DDPM()], ids=repr)
def test_each_seed_and_state_gives_the_samples_of_sample(solver: Any, device: str) -> None:
    model = ss.Denoiser(network().to(device), VP, predicts="v")
    sampler = capture(model, SHAPE, solver, steps=4)
    assert sampler.mode == ("graph" if device == "cuda" else "eager") and sampler.nfe == 4
    assert bool(sampler.reason) == (device != "cuda")
    results = {seed: sampler(seed) for seed in (0, 7, 2**63 + 5)}
    for seed, x in results.items():
        torch.testing.assert_close(x, ss.sample(model, SHAPE, solver, steps=4, seed=seed), rtol=1e-5, atol=1e-5)
    many = Noise([3, 1, 4, 1])
    torch.testing.assert_close(sampler(many), ss.sample(model, SHAPE, solver, steps=4, seed=many), rtol=1e-5, atol=1e-5)
    rank = Noise(7, offset=2)
    assert torch.equal(sampler(rank)[:2], results[7][2:]), "sample i is sample i"
    x = torch.full(SHAPE, 0.3, device=device)
    torch.testing.assert_close(sampler(7, x=x), ss.sample(model, x, solver, steps=4, seed=7), rtol=1e-5, atol=1e-5)
    assert torch.equal(x, torch.full(SHAPE, 0.3, device=device)), "the caller's state stays"
    assert torch.equal(results[7], sampler(7)), "results are not overwritten by later runs"


def test_conditions_are_inputs() -> None:
    net = network(classes=3)
    base = ss.Denoiser(net, VP, predicts="v")
    plan = ss.DDIM().plan(VP, ss.grids.uniform_t(VP, 3))
    a, b = torch.tensor([0, 1, 2, 0]), torch.tensor([2, 2, 1, 0])
    guided = ss.ClassifierFree(base, 2.0, null={"label": 3})
    for make in (base.given, guided.given, lambda label: ss.guidance.Clamp(guided.given(label=label))):
        sampler = capture(make(label=a), SHAPE, plan)
        assert torch.equal(sampler(1), ss.sample(make(label=a), SHAPE, plan, seed=1))
        assert torch.equal(sampler(1, label=b), ss.sample(make(label=b), SHAPE, plan, seed=1))
        assert torch.equal(sampler(1), ss.sample(make(label=b), SHAPE, plan, seed=1)), "it stays"
        assert torch.equal(sampler(1, label=a[:1]), ss.sample(make(label=a[:1]), SHAPE, plan, seed=1)), "one for all"
    assert torch.equal(a, torch.tensor([0, 1, 2, 0])), "the caller's tensors stay"


def test_shared_conditions_and_trees_are_inputs() -> None:
    def net(x: Tensor, t: Tensor, table: Tensor, text: dict[str, Tensor]) -> Tensor:
        return x * table.mean() + text["a"] * t[:, None]

    model = ss.Denoiser(net, VP, predicts="v", shared=("table",))
    one = {"table": torch.ones(7), "text": {"a": torch.ones(4, 2)}}
    two = {"table": torch.full((7,), 0.5), "text": {"a": torch.zeros(4, 2)}}
    sampler = capture(model.given(**one), SHAPE, steps=3)
    for cond in (one, two):
        assert torch.equal(sampler(0, **cond), ss.sample(model.given(**cond), SHAPE, steps=3, seed=0))


@pytest.mark.parametrize("solver", [ss.DPMSolverPP(2), ss.EulerMaruyama()], ids=repr)
def test_a_compiled_run_follows_its_inputs(solver: ss.solvers.Solver) -> None:
    torch.compiler.reset()
    model = ss.Denoiser(network(classes=3).requires_grad_(False), VP, predicts="v")
    given = model.given(label=torch.tensor([0, 1, 2, 0]))
    sampler = capture(given, SHAPE, solver, steps=3, compile="eager")
    assert sampler.mode == "compiled"
    for seed in (0, 1):
        torch.testing.assert_close(sampler(seed), ss.sample(given, SHAPE, solver, steps=3, seed=seed))
    other = torch.tensor([2, 2, 2, 1])
    torch.testing.assert_close(
        sampler(1, label=other), ss.sample(model.given(label=other), SHAPE, solver, steps=3, seed=1)
    )
    torch.compiler.reset()


def test_a_rule_with_memory_starts_afresh_in_every_run() -> None:
    base = ss.Denoiser(network(classes=3), VP, predicts="v").given(label=torch.tensor([0, 1, 2, 0]))
    guided = ss.ClassifierFree(base, 2.0, null={"label": 3}, rule=ss.guidance.Momentum())
    sampler = capture(guided, SHAPE, steps=3)
    for seed in (0, 1, 0):
        assert torch.equal(sampler(seed), ss.sample(guided, SHAPE, steps=3, seed=seed))


def test_seeds_on_the_device_are_seeds() -> None:
    laid = Laid(Noise(3), 4, torch.device("cpu"))
    assert torch.equal(laid.normal((4, 5), 2), Noise(3).normal((4, 5), 2))
    for noise in (Noise(2**64 - 1, offset=2**40), Noise([1, 2, 3, 4]), Noise(5, indices=[3, 2, 1, 0])):
        laid.load(noise)
        assert torch.equal(laid.normal((4, 5), 2), noise.normal((4, 5), 2))
        assert torch.equal(laid.normals((4, 5), torch.arange(3)), noise.normals((4, 5), torch.arange(3)))
    with pytest.raises(ValueError, match="laid for 4 rows and the state has 5"):
        laid.normal((5, 5), 0)


def test_what_does_not_fit_the_captured_run_is_refused() -> None:
    model = ss.Denoiser(network(classes=3), VP, predicts="v").given(label=torch.tensor([0, 1, 2, 0]))
    sampler = capture(model, SHAPE, steps=2)
    with pytest.raises(ValueError, match=r"`y` is no condition of the captured model.*label"):
        sampler(0, y=torch.zeros(4))
    with pytest.raises(ValueError, match=r"`label` must have the shape \(4,\).*capture the model again"):
        sampler(0, label=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"`x` must have the shape"):
        sampler(0, x=torch.zeros(5, 2))
    with pytest.raises(ValueError, match=r"path=True"):
        sampler(Noise(0, path=True))
    assert "on CUDA" in sampler.reason and "eager" in repr(sampler)
    assert capture(model, SHAPE, steps=2, graph=False).reason == "`graph` is False"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph needs CUDA, and there is none here")
def test_a_network_that_waits_is_not_captured() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return x * float(x.mean())

    sampler = capture(ss.Denoiser(net, VP, predicts="v"), SHAPE, steps=2, start=ss.Start(device="cuda"))
    assert sampler.mode == "eager" and "cannot be captured" in sampler.reason
    assert bool(sampler(0).isfinite().all())


def test_the_profile_says_what_pays() -> None:
    model = ss.Denoiser(network(), VP, predicts="v")
    for wrapped in (model, ss.guidance.Clamp(model)):
        found = profile(wrapped, SHAPE, ss.DDPM(), steps=3, repeats=1)
        assert found.nfe == 3 and min(found.total, found.network, found.update, found.host) > 0
        assert found.graph is None and "CUDA" in found.reason and "no CUDA graph was measured" in str(found)
    small = Profile(10, "cuda", total=4.0, network=3.0, update=1.0, host=4.0, graph=1.0)
    assert small.network_share == 0.75 and "4.00 times as fast: use ss.sampling.capture" in str(small)
    large = Profile(10, "cuda", total=100.0, network=98.6, update=1.4, host=4.0, graph=99.0)
    assert "the network is 98.6 % of the run" in str(large) and "not worth it" in str(large)
