"""Plans run in parallel in time: the sequential result, in fewer calls one after another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import sampling


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
    plan, how = PLANS[name], {"seed": 3, "dtype": torch.float64}
    done = ss.sample(MODEL, (5, 8), plan, **how)
    exact = sampling.solve(MODEL, (5, 8), plan, tol=1e-12, window=window, **how)
    assert (exact.x - done).abs().max() < 1e-9 and exact.sweeps <= plan.nfe, "never more sweeps than rows"
    rough = sampling.solve(MODEL, (5, 8), plan, tol=1e-3, window=window, **how)
    assert (rough.x - done).square().mean().sqrt() < 5e-3
    assert rough.sweeps <= exact.sweeps and rough.sweeps < (0.75 if window is None else 1) * plan.nfe
    assert rough.nfe <= rough.sweeps * (window or plan.nfe)


def test_a_window_of_one_row_is_the_sequential_run() -> None:
    plan = PLANS["UniPC"]
    run = sampling.solve(MODEL, (5, 8), plan, tol=0.1, window=1, seed=0, dtype=torch.float64)
    assert run.sweeps == run.nfe == plan.nfe
    assert torch.allclose(run.x, ss.sample(MODEL, (5, 8), plan, seed=0, dtype=torch.float64), atol=1e-12)


def test_zero_tolerance_ends() -> None:
    plan = PLANS["DDIM"]
    run = sampling.solve(MODEL, (3, 8), plan, tol=0.0, seed=0)
    assert run.sweeps <= plan.nfe
    assert torch.allclose(run.x, ss.sample(MODEL, (3, 8), plan, seed=0), atol=1e-4)


def test_conditions_paths_and_starts_are_those_of_solve() -> None:
    asked: list[tuple[int, ...]] = []

    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        asked.append(tuple(x.shape))
        return MODEL.x0(x.double(), t.double()).to(x) + shift

    model = ss.Denoiser(net, SDE, predicts="x0")
    plan, shift = PLANS["ancestral"], normals(5, 8).float()
    run = sampling.solve(model, (5, 8), plan, tol=1e-6, seed=1, shift=shift)
    assert len(asked) == run.sweeps and asked[0] == (5 * plan.nfe, 8)
    assert torch.allclose(run.x, ss.sample(model, (5, 8), plan, seed=1, shift=shift), atol=1e-3)
    start = ss.Gaussian.of(SDE, MODEL.mean(), MODEL.covariance())
    later = ss.DPMSolverPP(2).plan(SDE, ss.grids.karras(SDE, 20, t_start=0.5))
    a = sampling.solve(MODEL, (5, 8), later, tol=1e-6, seed=1, start=start).x
    assert torch.allclose(a, ss.sample(MODEL, (5, 8), later, seed=1, start=start), atol=1e-3)
    noise = ss.Noise(2, path=True)
    sde_plan = ss.SDEDPMSolverPP(2).plan(SDE, GRID)
    a = sampling.solve(MODEL, (5, 8), sde_plan, tol=1e-6, seed=noise).x
    assert torch.allclose(a, ss.sample(MODEL, (5, 8), sde_plan, seed=noise), atol=1e-3)


def test_bad_input_is_refused() -> None:
    with pytest.raises(TypeError, match="`plan`"):
        sampling.solve(MODEL, (5, 8), ss.DDIM())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`window`"):
        sampling.solve(MODEL, (5, 8), PLANS["DDIM"], window=0)
