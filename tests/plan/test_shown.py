"""States that a run shows stay as they were shown, and no function of the caller changes the run through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.plan.run import run, steps

VP = ss.VP()
GRID = ss.grids.karras(VP, 6)
START = ss.Noise(0).normal((3, 2), 0, dtype=torch.float64)
RULES = {
    "DDIM": ss.DDIM(),
    "DPM-Solver++(2M)": ss.DPMSolverPP(2),
    "UniPC": ss.UniPC(3),
    "Heun": ss.EDMHeun(),
    "SDE": ss.SDEDPMSolverPP(2),
    "ancestral": ss.solvers.Ancestral(ss.DDIM()),
}
EACH = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
MODES = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
EACH_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())


def network(x: Tensor, t: Any) -> Tensor:
    return (x * 0.7).tanh()


@EACH
@EACH_MODE
def test_states_that_a_callback_keeps_are_never_written_again(rule: ss.solvers.Solver, mode: Callable[[], Any]) -> None:
    plan, noise = rule.plan(VP, GRID), ss.Noise(1)
    want = [step.x.clone() for step in steps(plan, network, START, noise)]
    kept: list[Tensor] = []
    hooked: list[Tensor] = []

    def hook(node: int, t: Any, x: Tensor) -> Tensor:
        hooked.append(x)
        return x

    with mode():
        run(plan, network, START, noise, callback=lambda step: kept.append(step.x), overwrite=True)
        yielded = [step.x for step in steps(plan, network, START, noise, overwrite=True)]
        run(plan, network, START, noise, hook=hook, overwrite=True)
    for states in (kept, yielded, hooked):
        assert len(states) == len(want)
        assert all(torch.equal(a, b) for a, b in zip(states, want, strict=True))


def writes_of_a_hook(node: int, t: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0.5
    return x


def writes_of_a_network(x: Tensor, t: Any) -> Tensor:
    return x.mul_(0.7).tanh()


def test_a_function_that_writes_into_a_state_is_refused() -> None:
    plan = RULES["DPM-Solver++(2M)"].plan(VP, GRID)
    with pytest.raises(RuntimeError, match=r"`hook` writes_of_a_hook wrote into the state .* x.clone\(\)"):
        run(plan, network, START.clone(), hook=writes_of_a_hook)
    with pytest.raises(RuntimeError, match=r"`callback` .* wrote into the state .* step.x.clone\(\)"):
        run(plan, network, START.clone(), callback=lambda step: step.x.zero_())
    with pytest.raises(RuntimeError, match=r"`denoise` writes_of_a_network wrote into the state"):
        run(plan, writes_of_a_network, START.clone())
    loop = steps(plan, network, START.clone())
    next(loop).x.zero_()
    with pytest.raises(RuntimeError, match="between two steps wrote into the state"):
        next(loop)


@EACH
def test_inference_mode_counts_no_writes_so_functions_get_copies(rule: ss.solvers.Solver) -> None:
    """There the samples equal those of functions that write into copies of their own."""
    plan, noise = rule.plan(VP, GRID), ss.Noise(1)

    def hook(node: int, t: Any, x: Tensor) -> Tensor:
        return writes_of_a_hook(node, t, x.clone())

    want = run(plan, network, START, noise, hook=hook)
    net = ss.Denoiser(writes_of_a_network, VP, predicts="x0")
    with torch.inference_mode():
        x = START.clone()  # a tensor without a counter
        got = run(plan, net.x0, x, noise, hook=writes_of_a_hook, callback=lambda step: step.x.zero_())
    assert torch.equal(got, want) and torch.equal(x, START)


NETWORKS: dict[str, Callable[..., Tensor]] = {
    "input": lambda x, time, label: x.mul_(2),
    "condition": lambda x, time, label: x * label.fill_(0)[:, None],
    "tree": lambda x, time, label: x * label["a"].fill_(0)[:, None],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_writes_into_its_inputs_is_named(name: str) -> None:
    class Writer(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor, label: Any) -> Tensor:
            return NETWORKS[name](x, time, label)

    label = torch.ones(3, dtype=torch.float64)
    model = ss.Denoiser(Writer(), VP, predicts="x0").given(label={"a": label} if name == "tree" else label)
    what = "state" if name == "input" else "condition `label`"
    for use in (
        lambda: ss.sample(model, START.clone(), steps=3),
        lambda: ss.sample(model, START.clone(), ss.Adaptive()),
        lambda: ss.encode(model, START.clone(), steps=3),
        lambda: ss.elbo(model, START.clone(), seed=0),
        lambda: ss.DSM(ss.Denoiser(Writer(), VP, predicts="x0"))(START.clone(), label=model.conditions["label"]),
    ):
        with pytest.raises(RuntimeError, match=f"`net` Writer wrote into the {what}.*clone"):
            use()
    with pytest.raises(RuntimeError, match="in-place"):  # torch's own error: the divergence needs a derivative
        ss.log_prob(model, START.clone())


def test_networks_that_write_into_a_copy_are_left_alone() -> None:
    """With a preconditioning or in another dtype, the input of the network is not the state."""

    def net(x: Tensor, time: Tensor) -> Tensor:
        return x.mul_(0.5)

    scaled = ss.Denoiser(net, ss.EDM(), predicts="F", precondition=ss.Preconditioning(0.5))
    assert bool(ss.sample(scaled, (2, 3), steps=3, seed=0).isfinite().all())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own import
def test_the_check_of_writes_survives_compilation_and_transforms() -> None:
    model = ss.Denoiser(lambda x, time: (x * 0.7).tanh(), VP, predicts="x0")
    fast = torch.compile(lambda x: model.x0(x, 0.5), backend="eager", fullgraph=True)
    assert torch.equal(fast(START), model.x0(START, 0.5))
    rows = torch.vmap(lambda row: model.x0(row[None], 0.5)[0])(START)
    assert torch.equal(rows, model.x0(START, 0.5))
    value, slope = torch.func.jvp(lambda x: model.x0(x, 0.5), (START,), (torch.ones_like(START),))
    assert torch.allclose(slope, 0.7 * (1 - value**2), rtol=1e-12)
