"""Grids that go up are made on purpose: any other grid that rises is an error."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.grids.zigzags import Zigzag

VP = ss.VP()
MIX = ss.GaussianMixture(VP, [[-1.0], [1.0]], std=0.3)
MISTYPED = [1.0, 0.5, 0.7, 0.2, 0.0]
KARRAS = ss.grids.karras(VP, 6)
MAKERS: dict[str, Callable[[], Tensor]] = {
    "ancestral": lambda: ss.grids.ancestral(VP, KARRAS, 0.7),
    "no noise": lambda: ss.grids.ancestral(VP, KARRAS, 0.0),
    "churn": lambda: ss.grids.churn(VP, KARRAS, 2.0),
    "restart": lambda: ss.grids.restart(VP, KARRAS, 0.2, 0.7),
    "renoised": lambda: ss.grids.renoised(VP, KARRAS, 0.3),
    "repaint": lambda: ss.grids.repaint(VP, KARRAS, 2, 2),
    "marked": lambda: ss.grids.zigzag(MISTYPED),
    "each sample": lambda: ss.grids.zigzag([[1.0, 0.9], [0.5, 0.4], [0.8, 0.45], [0.3, 0.2]]),
}
RISING = {
    "list": MISTYPED,
    "tuple": tuple(MISTYPED),
    "tensor": torch.tensor(MISTYPED, dtype=torch.float64),
    "each sample": torch.tensor([[1.0, 1.0], [0.5, 0.6], [0.7, 0.7], [0.2, 0.2]], dtype=torch.float64),
}


@pytest.mark.parametrize("form", RISING)
@pytest.mark.parametrize("solver", [ss.DDIM(), ss.UniPC(2), ss.EDMHeun(), ss.EulerMaruyama(), ss.DDPM()], ids=repr)
def test_a_mistyped_grid_is_refused_with_the_fix(solver: ss.solvers.Solver, form: str) -> None:
    expected = r"`times` rises at index 2, from t = .*0.5.* to .*0.7.*ss.grids.zigzag\(times\)"
    with pytest.raises(ValueError, match=expected):
        solver.plan(VP, RISING[form])
    with pytest.raises(ValueError, match=expected):
        ss.sample(MIX, (2, 1), solver, grid=RISING[form])


@pytest.mark.parametrize("name", MAKERS)
def test_makers_mark_their_grids_and_copies_and_parts_stay_marked(name: str) -> None:
    grid = MAKERS[name]()
    for form in (grid, grid[1:], copy.deepcopy(grid), pickle.loads(pickle.dumps(grid)), torch.stack([grid, grid], 1)):
        assert isinstance(form, Zigzag)
    plan = ss.DDIM().plan(VP, grid)
    rises = bool((grid.diff(dim=0) > 0).any())
    assert plan.stochastic == rises
    loaded = ss.Plan.from_dict(plan.to_dict()) if grid.ndim == 1 else plan
    assert loaded == plan, "a saved plan is a table, which needs no mark"
    weights = [w for row in plan.rows for _, w in (*row.x, *row.d, *row.z)]
    assert not any(isinstance(w, Zigzag) for w in (*weights, *plan.times))


def test_a_marked_grid_is_the_exact_forward_transition() -> None:
    """One step down, one up: the mean shrinks by α_t/α_s and the variance is that of the transition."""
    marked = ss.grids.zigzag(MISTYPED)
    plan = ss.DDIM().plan(VP, marked)
    scale, std = VP.transition(0.5, 0.7)
    row = next(row for row in plan.rows if row.t == 0.7)
    assert row.z[0][1] == pytest.approx(std, rel=1e-13)
    alone = ss.DDIM().plan(VP, [1.0, 0.5]).rows[1]
    assert dict(row.x)[0] == pytest.approx(scale * dict(alone.x)[0], rel=1e-13)


def test_gradients_reach_the_times_of_a_marked_grid() -> None:
    times = torch.tensor(MISTYPED, dtype=torch.float64, requires_grad=True)
    rows = ss.DDIM().plan(VP, ss.grids.zigzag(times)).rows
    (slope,) = torch.autograd.grad(sum(w for row in rows for _, w in row.z), times)
    assert bool((slope[1:3] != 0).all())
