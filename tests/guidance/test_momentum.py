"""The running sum of Momentum belongs to the run, not to the object that runs share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.guidance import Momentum

VP = ss.VP()
STARTS = [ss.Noise(k).normal((2, 3), 0) for k in range(4)]
SOLVERS = {"DDIM": ss.DDIM(), "UniPC": ss.UniPC(2), "SDE": ss.SDEDPMSolverPP(2)}


def guided(rule: Momentum, barrier: threading.Barrier | None = None) -> ss.ClassifierFree:
    def net(x: Tensor, time: Tensor, label: Tensor) -> Tensor:
        if barrier is not None:
            barrier.wait(timeout=30)  # every thread makes this evaluation before any makes the next one
        return (x - label[:, None]).tanh()

    model = ss.Denoiser(net, VP, predicts="x0").given(label=torch.ones(2))
    return ss.ClassifierFree(model, 3.0, null={"label": 0.0}, rule=rule)


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS.keys())
def test_threads_that_share_the_rule_do_not_mix_their_sums(solver: ss.solvers.Solver) -> None:
    def run(x: Tensor, model: ss.ClassifierFree) -> Tensor:
        return ss.sample(model, x, solver, steps=5, seed=0)

    want = [run(x, guided(Momentum())) for x in STARTS]
    assert not torch.equal(want[0], ss.sample(guided(Momentum(beta=0.0)), STARTS[0], solver, steps=5, seed=0))
    shared = guided(Momentum(), threading.Barrier(len(STARTS)))
    with ThreadPoolExecutor(len(STARTS)) as pool:
        got = list(pool.map(lambda x: run(x, shared), STARTS))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_run_inside_a_run_leaves_the_sum_of_the_outer_one() -> None:
    model = guided(Momentum())
    want = ss.sample(model, STARTS[0], ss.DDIM(), steps=5)
    inner: list[Tensor] = []

    def preview(step: ss.plan.Step) -> None:
        inner.append(ss.sample(model, STARTS[1], ss.DDIM(), steps=5))

    assert torch.equal(ss.sample(model, STARTS[0], ss.DDIM(), steps=5, watch=preview), want)
    assert all(torch.equal(x, ss.sample(guided(Momentum()), STARTS[1], ss.DDIM(), steps=5)) for x in inner)


def test_threads_that_call_one_denoiser_by_hand_are_told() -> None:
    model = guided(Momentum())
    with ThreadPoolExecutor(1) as pool:
        pool.submit(model.x0, STARTS[0], 0.9).result()
    with pytest.raises(RuntimeError, match=r"two threads call one Momentum.*its own Momentum"):
        model.x0(STARTS[0], 0.5)
    model.x0(STARTS[0], 0.95)  # a new loop starts at a larger time
    assert bool(model.x0(STARTS[0], 0.5).isfinite().all())


def test_a_rule_inside_the_rule_starts_afresh_too() -> None:
    nested = Momentum(Momentum(beta=-0.3))
    want = ss.sample(guided(Momentum(Momentum(beta=-0.3))), STARTS[0], ss.DDIM(), steps=5)
    for _ in range(2):
        assert torch.equal(ss.sample(guided(nested), STARTS[0], ss.DDIM(), steps=5), want)
    assert nested._last is None and nested.rule._last is None, "no run writes into the shared object"
