"""torch.compile traces runs, denoisers and losses as one graph, and does so once for states of one shape."""

from __future__ import annotations

import functools
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import scoresde as ss
from scoresde.noise.keyed import Laid
from scoresde.plan import run

VP = ss.VP()
GRID = ss.grids.karras(VP, 3)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def mlp(**options: Any) -> ss.nn.MLP:
    return ss.nn.MLP(2, hidden=8, depth=1, seed=0, **options).requires_grad_(False).eval()


def traced_once(function: Callable[..., Tensor], *batches: tuple[Any, ...], tol: float = 1e-4) -> None:
    """One graph without a break serves all batches, with the results of the function itself."""
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for batch in batches:
        # The fusions of a trace change roundings, which 1/α = 150 at T multiplies.
        torch.testing.assert_close(compiled(*batch), function(*batch), rtol=tol, atol=tol)
    assert backend.frame_count == 1, "no recompilation"


def states(*shape: int, n: int = 2) -> list[tuple[Tensor]]:
    return [(ss.Noise(i).normal(shape or (4, 2), 0),) for i in range(n)]


@pytest.mark.parametrize("predicts", ["eps", "F"])
def test_denoisers_at_numbers_and_tensors(predicts: str) -> None:
    scaling = ss.Preconditioning(0.5) if predicts == "F" else None
    model = ss.Denoiser(mlp(), VP, predicts=predicts, precondition=scaling)
    traced_once(lambda x: model.x0(x, 0.37), *states())
    times = [torch.linspace(0.1, 0.9 - i / 10, 4) for i in range(2)]
    traced_once(model.x0, *((x, t) for (x,), t in zip(states(), times, strict=True)))


@pytest.mark.parametrize(
    "solver",
    [ss.DDIM(), ss.UniPC(3), ss.VelocityAB(3), ss.SDEDPMSolverPP(2), ss.EulerMaruyama()],
    ids=lambda s: repr(s).partition("(")[0],
)
def test_runs_with_the_network_inside(solver: ss.solvers.Solver) -> None:
    model, plan = ss.Denoiser(mlp(), VP, predicts="eps"), solver.plan(VP, GRID)
    noise = ss.Noise(0) if plan.stochastic else None
    traced_once(lambda x: run(plan, model.x0, x, noise), *states(), tol=1e-3)


def test_a_run_with_one_draw_and_runs_of_large_states() -> None:
    one = ss.Plan((ss.plan.Row(1.0), ss.plan.Row(0.5, x=((0, 0.9),), z=((0, 0.2),))))
    traced_once(lambda x: run(one, lambda x, t: x, x, ss.Noise(0)), *states())
    torch.compiler.reset()
    plan = ss.EulerMaruyama().plan(VP, GRID)
    traced_once(lambda x: run(plan, lambda x, t: 0.5 * x, x, ss.Noise(0)), *states(2, 3, 128, 128, n=1))


def test_runs_of_wrappers_and_of_functions() -> None:
    plan = ss.DPMSolverPP(2).plan(VP, GRID)
    net = mlp(classes=3)
    model = ss.Denoiser(net, VP, predicts="eps").given(label=torch.tensor([0, 1, 2, 0]))
    guided = ss.ClassifierFree(model, 2.0, null={"label": 3})
    for denoise in (guided, ss.guidance.Clamp(guided), lambda x, t: 0.5 * x):
        torch.compiler.reset()
        traced_once(lambda x, d=denoise: run(plan, d, x), *states(), tol=1e-3)  # type: ignore[misc]


def test_the_unet_and_a_run_of_it() -> None:
    net = ss.nn.UNet(1, width=8, multipliers=(1, 2), blocks=1, attention=(), seed=0).requires_grad_(False).eval()
    model, plan = ss.Denoiser(net, VP, predicts="velocity"), ss.DDIM().plan(VP, ss.grids.uniform_t(VP, 2))
    traced_once(net, *((x, torch.full((2,), 0.5)) for (x,) in states(2, 1, 8, 8)))
    torch.compiler.reset()
    traced_once(lambda x: run(plan, model, x), *states(2, 1, 8, 8), tol=1e-3)


def test_the_loss_and_its_gradient() -> None:
    net = mlp().requires_grad_(True).train()
    loss = ss.DSM(ss.Denoiser(net, VP, predicts="v"), "min_snr")
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    for (x,) in states(n=2):
        grads = []
        for evaluate in (loss, compiled):
            net.zero_grad()
            value = evaluate(x, ss.Noise(3))
            value.backward()
            grads.append(torch.cat([w.grad.flatten() for w in net.parameters() if w.grad is not None]))
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)
    assert backend.frame_count == 1


@functools.cache
def no_compiler() -> str:
    """Why inductor cannot run here, or nothing."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        return "inductor needs a C++ compiler, and there is none here"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    return "" if header.is_file() else "inductor needs the headers of Python, and they are not here"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_inductor_runs_a_plan() -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    model, plan = ss.Denoiser(mlp(), VP, predicts="eps"), ss.DPMSolverPP(2).plan(VP, GRID)
    compiled = torch.compile(lambda x: run(plan, model.x0, x), fullgraph=True)
    (x,) = states()[0]
    torch.testing.assert_close(compiled(x), run(plan, model.x0, x), rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_inductor_makes_one_pass_of_an_update() -> None:
    if reason := no_compiler():
        pytest.skip(reason)
    from torch._inductor import metrics

    rows = (ss.plan.Row(1.0, evaluates=True), ss.plan.Row(0.5, x=((0, 0.9),), d=((0, 0.3),), z=((0, 0.2),), one=0.1))
    plan, d = ss.Plan(rows), torch.ones(4, 6)
    x, source = ss.Noise(1).normal((4, 6), 0), Laid(ss.Noise(0), 4, torch.device("cpu"))
    compiled = torch.compile(lambda x: run(plan, lambda x, t: d, x, source), fullgraph=True)
    metrics.reset()
    torch.testing.assert_close(compiled(x), 0.9 * x + 0.3 * d + 0.2 * ss.Noise(0).normal((4, 6), 0) + 0.1)
    assert metrics.generated_kernel_count == 1, "with the normals inside"
