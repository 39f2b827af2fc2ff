"""Plans run in parallel in time: the sequential result, with fewer forward passes one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.sampling import Parallel


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MODEL = ss.GaussianMixture(ss.VP(), 0.6 * normals(6, 8, seed=5), std=0.2)
SDE = MODEL.sde
GRID = ss.grids.karras(SDE, 30)
PLANS: dict[str, Any] = {
    "DDIM": ss.DDIM().plan(SDE, GRID),
    "DPM-Solver++ 2M": ss.DPMSolverPP(2).plan(SDE, GRID),
    "UniPC": ss.UniPC(3).plan(SDE, GRID),
    "single steps": ss.solvers.DPMSolver(3).plan(SDE, GRID[::3]),
    "Heun in t": ss.solvers.Heun().plan(SDE, GRID[:-1:2]),
    "ancestral": ss.DDIM().plan(SDE, ss.grids.ancestral(SDE, GRID)),
}


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("name", PLANS)
def test_it_is_the_sequential_result(name: str, window: int | None) -> None:
    plan, options = PLANS[name], {"seed": 3, "start": ss.Start(dtype=torch.float64)}
    sequential = ss.sample(MODEL, (5, 8), plan, **options)
    exact = ss.solve(MODEL, (5, 8), Parallel(plan, tol=1e-12, window=window), **options)
    assert (exact.x - sequential).abs().max() < 1e-9 and exact.calls <= plan.nfe, "never more sweeps than rows"
    rough = ss.solve(MODEL, (5, 8), Parallel(plan, tol=1e-3, window=window), **options)
    assert (rough.x - sequential).square().mean().sqrt() < 5e-3
    assert rough.calls <= exact.calls and rough.calls < (0.75 if window is None else 1) * plan.nfe
    assert rough.nfe <= rough.calls * (window or plan.nfe)


def test_a_window_of_one_row_is_the_sequential_run() -> None:
    plan, start = PLANS["UniPC"], ss.Start(dtype=torch.float64)
    run = ss.solve(MODEL, (5, 8), Parallel(plan, tol=0.1, window=1), seed=0, start=start)
    assert run.calls == run.nfe == plan.nfe
    assert torch.allclose(run.x, ss.sample(MODEL, (5, 8), plan, seed=0, start=start), atol=1e-12)


def test_zero_tolerance_ends() -> None:
    plan = PLANS["DDIM"]
    run = ss.solve(MODEL, (3, 8), Parallel(plan, tol=0.0), seed=0)
    assert run.calls <= plan.nfe
    assert torch.allclose(run.x, ss.sample(MODEL, (3, 8), plan, seed=0), atol=1e-4)


def test_a_solver_gets_its_grid_from_solve() -> None:
    by_solver = ss.solve(MODEL, (3, 8), Parallel(ss.DPMSolverPP(2), tol=1e-6), grid=GRID, seed=0)
    assert by_solver.plan == PLANS["DPM-Solver++ 2M"] and by_solver.times == by_solver.plan.times
    default = ss.solve(MODEL, (3, 8), Parallel(tol=1e-6), nfe=20, seed=0)
    assert default.plan is not None and default.plan.nfe == 20
    assert torch.allclose(default.x, ss.sample(MODEL, (3, 8), nfe=20, seed=0), atol=1e-4)


def test_conditions_paths_and_starts_are_those_of_solve() -> None:
    shapes: list[tuple[int, ...]] = []

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return MODEL.x0(x.double(), t.double()).to(x) + shift

    plan, shift = PLANS["ancestral"], normals(5, 8).float()
    model = ss.Denoiser(net, SDE, predicts="x0").given(shift=shift)
    run = ss.solve(model, (5, 8), Parallel(plan, tol=1e-6), seed=1)
    assert len(shapes) == run.calls and shapes[0] == (5 * plan.nfe, 8)
    assert run.nfe == -(-sum(shape[0] for shape in shapes) // 5)
    assert torch.allclose(run.x, ss.sample(model, (5, 8), plan, seed=1), atol=1e-3)
    start = ss.Gaussian.of(SDE, MODEL.mean(), MODEL.covariance())
    later = ss.DPMSolverPP(2).plan(SDE, ss.grids.karras(SDE, 20, t_start=0.5))
    a = ss.sample(MODEL, (5, 8), Parallel(later, tol=1e-6), seed=1, start=start)
    assert torch.allclose(a, ss.sample(MODEL, (5, 8), later, seed=1, start=start), atol=1e-3)
    noise = ss.Noise(2, path=True)
    sde_plan = ss.SDEDPMSolverPP(2).plan(SDE, GRID)
    a = ss.sample(MODEL, (5, 8), Parallel(sde_plan, tol=1e-6), seed=noise)
    assert torch.allclose(a, ss.sample(MODEL, (5, 8), sde_plan, seed=noise), atol=1e-3)


@pytest.mark.parametrize("size", [1, 3])
def test_what_belongs_to_samples_is_repeated_in_every_wrapper(size: int) -> None:
    net = ss.Denoiser(lambda x, t, label: MODEL.x0(x, t.to(x)) + label[:, None], SDE, predicts="x0")
    scale = torch.linspace(1.5, 2.5, size, dtype=torch.float64)
    guided = ss.ClassifierFree(net, scale, null={"label": 0.0}).given(label=0.1 * torch.arange(1.0, 1 + size))
    plan, start = PLANS["DPM-Solver++ 2M"], ss.Start(dtype=torch.float64)
    run = ss.solve(guided, (size, 8), Parallel(plan, tol=1e-9), seed=0, start=start)
    assert torch.allclose(run.x, ss.sample(guided, (size, 8), plan, seed=0, start=start), atol=1e-6)


def test_states_without_event_axes() -> None:
    model = ss.Denoiser(lambda x, t: 0.5 * x, SDE, predicts="x0")
    run = ss.solve(model, (5,), Parallel(PLANS["DDIM"], tol=1e-6), seed=0)
    assert torch.allclose(run.x, ss.sample(model, (5,), PLANS["DDIM"], seed=0), atol=1e-4)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="`solver`"):
        Parallel("DDIM")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`window`"):
        Parallel(PLANS["DDIM"], window=0)
    with pytest.raises(ValueError, match="`grad` must be one of 'off' with Parallel"):
        ss.sample(MODEL, (5, 8), Parallel(), grad="full")
