"""The loop of a run never waits for the device: no copies, no reading back, no tensors of the host between evaluations.

Tensors on the device "meta" hold no numbers, so reading one back raises an error, and every operation between the
devices shows in the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import scoresde as ss
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.guidance import (
    APG,
    AutoGuidance,
    Clamp,
    Compose,
    DynamicThreshold,
    Momentum,
    Rescale,
    ZeroStar,
    plus_plus,
)
from scoresde.noise.streams import Stream
from scoresde.plan import run
from scoresde.solvers.rule import Solver

B, EVENT = 4, (3, 2, 2)
VP = ss.VP()
GRID = ss.grids.karras(VP, 6)


class Boundary(TorchDispatchMode):
    """Operations that touch the host: all between devices, and since the first evaluation all with a host tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self.copies_inside: list[str] = []
        self.inside: list[str] = []
        self.running = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            (self.copies_inside if self.running else self.copies).append(str(func))
        if self.running and "cpu" in devices:
            self.inside.append(str(func))
        return out


def watched(device: str = "meta") -> tuple[Boundary, Callable[..., Tensor]]:
    """The watch, and a network on the device that starts it."""
    boundary, layer = Boundary(), torch.nn.Conv2d(3, 3, 1, device=device).requires_grad_(False)

    def net(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        boundary.running = True
        assert x.device.type == t.device.type == device and x.dtype == t.dtype == torch.float32
        return layer(x) + t[:, None, None, None]

    return boundary, net


def solvers() -> dict[str, Solver]:
    """Every solver of the library that needs no argument."""
    out = {}
    for name in dir(ss.solvers):
        make = getattr(ss.solvers, name)
        if not callable(make) or name in ("Solver", "Universal"):
            continue
        try:
            made = make()
        except TypeError:  # a class or a function that needs arguments
            continue
        if isinstance(made, Solver):
            out[name] = made
    return out


SOLVERS = solvers()


def test_there_are_solvers_to_look_at() -> None:
    assert len(SOLVERS) > 40 and {"DDIM", "UniPC", "VelocityAB", "EulerMaruyama", "EDMHeun"} <= set(SOLVERS)


@pytest.mark.parametrize("predicts", ["eps", "velocity"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_of_a_network_touches_the_host_once_before_its_first_evaluation(name: str, predicts: str) -> None:
    boundary, net = watched()
    model = ss.Denoiser(net, VP, predicts=predicts)
    plan = SOLVERS[name].plan(VP, GRID)
    with boundary:
        out = run(plan, model, torch.empty(B, *EVENT, device="meta"), ss.Noise(0) if plan.stochastic else None)
    assert out.device.type == "meta" and boundary.running
    assert boundary.inside == [], "no tensor of the host while the run lasts"
    assert len(boundary.copies) == 1, "the times of all evaluations, in one tensor"


LABEL = torch.zeros(B, 1, device="meta")


def guided(model: AbstractDenoiser, scale: Any = 2.0, **options: Any) -> AbstractDenoiser:
    return ss.ClassifierFree(model, scale, null={"label": 0.0}, **options).given(label=LABEL)


SCALES: dict[str, Any] = {
    "a number": 2.0,
    "one number a sample": torch.ones(B, device="meta"),
    "a function": lambda t: 1.0 + t,
    "CFG++": plus_plus(VP, GRID, 0.6),
}
WRAPPERS: dict[str, Callable[[AbstractDenoiser], AbstractDenoiser]] = {
    "conditions": lambda m: m.given(label=LABEL),
    **{f"scale: {name}": lambda m, s=s: guided(m, s) for name, s in SCALES.items()},  # type: ignore[misc]
    **{
        f"{rule!r}, {one_forward}": lambda m, r=rule, o=one_forward: guided(m, rule=r, one_forward=o)  # type: ignore[misc]
        for rule in (Rescale(), Rescale(of="v"), APG(), APG(0.5, 1.0), Momentum(), ZeroStar(), ZeroStar(0.8))
        for one_forward in (False, True)
    },
    "interval": lambda m: guided(m, interval=(0.2, 0.6)),
    "linear, one forward": lambda m: guided(m, one_forward=True),
    "AutoGuidance": lambda m: AutoGuidance(m, m, 2.0),
    "Compose": lambda m: Compose(m, [m.given(label=LABEL)], [1.5]),
    "Clamp": lambda m: Clamp(m),
    "DynamicThreshold": lambda m: DynamicThreshold(m),
    "Rescheduled": lambda m: ss.denoisers.Rescheduled(m, ss.Flow()),
}


@pytest.mark.parametrize("noise", [ss.Noise(range(B)), ss.Noise(0, indices=[3, 1, 7, 5])], ids=["seeds", "indices"])
def test_seeds_and_indices_of_samples_are_moved_before_the_first_evaluation(noise: ss.Noise) -> None:
    boundary, net = watched()
    plan = ss.EulerMaruyama().plan(VP, GRID)
    with boundary:
        run(plan, ss.Denoiser(net, VP, predicts="eps"), torch.empty(B, *EVENT, device="meta"), noise)
    assert boundary.inside == []
    x = torch.ones(B, 2)
    first = run(plan, lambda x, t: x, x, noise)
    assert torch.equal(first[2:3], run(plan, lambda x, t: x, x[2:3], noise[[2]])), "and they are the same numbers"


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_and_guidance_never_wait(name: str) -> None:
    boundary, net = watched()
    model = WRAPPERS[name](ss.Denoiser(net, VP, predicts="eps"))
    plan = ss.DPMSolverPP(2).plan(model.sde, ss.grids.uniform_t(model.sde, 4, t_start=0.9))
    x = torch.empty(B, *EVENT, device="meta")
    for first in (True, False):
        boundary.running, boundary.copies = False, []
        with boundary:
            run(plan, model, x)
        assert len(boundary.copies) <= 2, "the times of all evaluations, in one tensor for each branch"
        assert boundary.copies_inside == []
        if first:  # numbers of the process may still be computed, on the host alone
            boundary.inside = []
    assert boundary.inside == []


@pytest.mark.parametrize("name", SOLVERS)
def test_no_run_reads_a_number_on_the_cpu(name: str) -> None:
    read: list[str] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            if boundary.running and any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "is_nonzero")):
                read.append(str(func))
            return func(*args, **(kwargs or {}))

    boundary, net = watched("cpu")
    model = ss.Denoiser(net, VP, predicts="eps")
    plan = SOLVERS[name].plan(VP, GRID)
    x = ss.Noise(0).normal((B, *EVENT), 0)
    with Reads():
        assert bool(run(plan, model, x, ss.Noise(0).fork(Stream.STEPS) if plan.stochastic else None).isfinite().all())
        read.pop()  # of this assertion
    assert read == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA reports its waits, and there is no CUDA here")
@pytest.mark.parametrize("name", SOLVERS)
def test_cuda_reports_no_wait(name: str) -> None:
    _, net = watched("cuda")
    model = ss.Denoiser(net, VP, predicts="eps")
    plan = SOLVERS[name].plan(VP, GRID)
    x = ss.Noise(0).normal((B, *EVENT), 0, device="cuda")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(plan, model, x, ss.Noise(0) if plan.stochastic else None)
    finally:
        torch.cuda.set_sync_debug_mode(before)


# The arithmetic of a run behind a network: the conversion of its output lies in the weights of the rows.


def passes(plan: ss.Plan, predicts: str) -> int:
    """Number of operations on states in a run, besides the network."""
    seen: list[str] = []

    class Passes(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.shape == (B, *EVENT):
                seen.append(str(func))
            return out

    x = torch.ones(B, *EVENT)
    model = ss.Denoiser(lambda x, t: x, VP, predicts=predicts)
    with Passes():
        run(plan, model, x)
    return len(seen)


@pytest.mark.parametrize(
    ("solver", "predicts", "row"),
    [
        (ss.DDIM(), "eps", 2),  # a state and an output
        (ss.DDIM(), "x0", 2),
        (ss.DPMSolverPP(2), "x0", 3),
        (ss.VelocityAB(3), "eps", 5),  # the sum f, a state and three of the sums
        (ss.solvers.DPMSolver(2, kind="multi"), "eps", 3),  # noise from noise: no conversion at all
    ],
    ids=repr,
)
def test_a_row_costs_no_more_passes_than_by_hand(solver: Solver, predicts: str, row: int) -> None:
    steps = {n: solver.plan(VP, ss.grids.uniform_lam(VP, n)) for n in (10, 20)}
    assert (passes(steps[20], predicts) - passes(steps[10], predicts)) / 10 <= row


@pytest.mark.parametrize("predicts", ["eps", "score", "x0", "v", "velocity", "F"])
@pytest.mark.parametrize(
    "name", ["DDIM", "DDPM", "UniPC", "VelocityAB", "EDMHeun", "DPMSolver", "SDEDPMSolverPP", "PNDM"]
)
def test_weights_with_the_conversion_give_the_same_run(name: str, predicts: str) -> None:
    scaling = ss.Preconditioning(0.5) if predicts == "F" else None
    mix = torch.nn.Linear(3, 3, dtype=torch.float64)
    net = lambda x, t: torch.tanh(mix(x.movedim(1, -1)).movedim(-1, 1)) * (1 + t[:, None, None, None])  # noqa: E731
    model = ss.Denoiser(net, VP, predicts=predicts, precondition=scaling)
    plan = SOLVERS[name].plan(VP, GRID)
    x = ss.Noise(1).normal((B, *EVENT), 0, dtype=torch.float64)
    seen: dict[str, list[Tensor | None]] = {"folded": [], "plain": []}
    folded = run(plan, model.x0, x, ss.Noise(0), callback=lambda step: seen["folded"].append(step.x0))
    plain = run(plan, lambda x, t: model.x0(x, t), x, ss.Noise(0), callback=lambda step: seen["plain"].append(step.x0))
    # Rounding of float64, times 1/α = 150 at T and the weights of a few rows.
    torch.testing.assert_close(folded, plain, rtol=1e-11, atol=1e-11)
    for a, b in zip(seen["folded"], seen["plain"], strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_guidance_and_another_process_lie_in_the_weights_too() -> None:
    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.tanh(x) * (1 + t * label)[:, None, None, None]

    inner = ss.Denoiser(net, VP, predicts="eps").given(label=torch.linspace(0, 1, B, dtype=torch.float64))
    x = ss.Noise(1).normal((B, *EVENT), 0, dtype=torch.float64)
    scales: tuple[Any, ...] = (0.0, 1.0, 3.0, torch.linspace(0, 2, B, dtype=torch.float64), lambda t: 1 + 2 * t)
    models = [ss.ClassifierFree(inner, scale, null={"label": 0.5}) for scale in scales]
    models.append(ss.ClassifierFree(inner, 2.0, null={"label": 0.5}, interval=(0.2, 0.6)))
    for guided in (*models, ss.denoisers.Rescheduled(models[2], ss.Flow())):
        counter = ss.denoisers.Counter()
        plan = ss.DPMSolverPP(2).plan(guided.sde, ss.grids.uniform_t(guided.sde, 5, t_start=0.9))
        model = guided.counted(counter)
        assert model.outputs_at(plan.evaluation_times, x) is not None  # type: ignore[arg-type]
        folded = run(plan, model, x)
        calls, counter.calls = counter.calls, 0
        plain = run(plan, lambda x, t, m=model: m.x0(x, t), x)  # type: ignore[misc]
        torch.testing.assert_close(folded, plain, rtol=1e-11, atol=1e-11)
        assert calls == counter.calls


def test_a_subclass_that_changes_its_predictions_keeps_its_changes() -> None:
    class Halved(ss.Denoiser):
        def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
            return super().x0(x, t, **cond) / 2

    class Clipped(ss.Denoiser):
        def output(self, x: Tensor, t: float | Tensor, **cond: Any) -> tuple[Tensor, Tensor | None]:
            out, variance = super().output(x, t, **cond)
            return out.clamp(-1, 1), variance

    plan, x = ss.DDIM().plan(VP, GRID), torch.full((2, 3), 5.0)
    for kind in (Halved, Clipped):
        model = kind(lambda x, t: x, VP, predicts="eps")
        assert torch.equal(run(plan, model.x0, x), run(plan, lambda x, t, m=model: m.x0(x, t), x))  # type: ignore[misc]
    model = ss.Denoiser(lambda x, t: x, VP, predicts="eps")
    model.x0 = lambda x, t: 0 * x  # type: ignore[method-assign]
    assert torch.equal(run(plan, model, x), torch.zeros(2, 3))


@pytest.mark.parametrize("predicts", ["eps", "x0"])
@pytest.mark.parametrize("name", ["UniPC", "SDEDPMSolverPP", "VelocityAB", "DDPM"])
def test_the_state_keeps_the_layout_of_its_memory(name: str, predicts: str) -> None:
    seen = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return x * 0.5

    x = ss.Noise(0).normal((2, 3, 4, 4), 0)
    model, plan = ss.Denoiser(net, VP, predicts=predicts), SOLVERS[name].plan(VP, GRID)
    out = run(plan, model, x.to(memory_format=torch.channels_last), ss.Noise(0))
    assert all(seen) and out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, run(plan, model, x, ss.Noise(0))), "and no number changes"
