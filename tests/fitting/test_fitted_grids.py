"""Computed grids against common ones, on data whose flow is known."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from instances import SDES
from torch import Tensor

import scoresde as ss
from scoresde import analysis, fitting
from scoresde.fitting.grids import _cheapest


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SDE = ss.VP()
MODEL = ss.GaussianMixture(SDE, 0.6 * normals(6, 8, seed=5), std=0.2)
SPECTRUM = torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)


def test_the_cheapest_path_is_the_cheapest() -> None:
    cost = normals(8, 8, seed=1).abs().triu(1)
    cost[cost == 0] = torch.inf
    for steps in (1, 3, 7):
        paths = [(0, *inner, 7) for inner in itertools.combinations(range(1, 7), steps - 1)]
        best = min(paths, key=lambda path: sum(float(cost[a, b]) for a, b in itertools.pairwise(path)))
        assert tuple(_cheapest(cost, steps).tolist()) == best


@pytest.mark.parametrize("rule", [ss.DDIM(), ss.DPMSolverPP(2), ss.VelocityAB(3)], ids=repr)
def test_the_gaussian_grid_beats_the_common_ones(rule: Any) -> None:
    grid = fitting.gaussian_grid(SDE, 8, SPECTRUM, solver=rule)
    found = analysis.flow_error(rule.plan(SDE, grid), SDE, SPECTRUM)
    for maker in (ss.grids.karras, ss.grids.uniform_lam, ss.grids.quadratic_vp):
        common = analysis.flow_error(rule.plan(SDE, maker(SDE, 8)), SDE, SPECTRUM)
        assert found < 0.9 * common, (maker, found, common)


def test_the_gaussian_grid_of_a_stochastic_rule() -> None:
    rule = ss.SDEDPMSolverPP(2)
    grid = fitting.gaussian_grid(SDE, 8, SPECTRUM, solver=rule)
    errors = [analysis.weak_error(rule.plan(SDE, g), SDE, SPECTRUM) for g in (grid, ss.grids.karras(SDE, 8))]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("name", ["VP", "EDM", "Flow", "Cosine", "Trig"])
def test_every_maker_gives_a_grid_of_any_process(name: str) -> None:
    model = MODEL.under(SDES[name])
    sde = model.sde
    for grid in (
        fitting.gaussian_grid(sde, 5, SPECTRUM),
        fitting.gits(model, (8, 8), 5, fine=24),
        fitting.equal_error(model, (8, 8), 5, fine=24),
        fitting.align_your_steps(model, MODEL.sample(8, seed=0), 5, fine=24),
    ):
        assert ss.grids.check_grid(sde, grid).shape == (6,) and grid[0] == sde.T and grid[-1] == 0


def test_they_are_worth_something() -> None:
    x = SDE.prior().sample((128, 8), ss.Noise(1), dtype=torch.float64)
    truth = ss.sample(MODEL, x, ss.VelocityAB(3), steps=200)

    def error(grid: Tensor) -> float:
        return float((ss.sample(MODEL, x, ss.DDIM(), grid=grid) - truth).flatten(1).norm(dim=1).median())

    common = min(
        error(maker(SDE, 8))
        for maker in (ss.grids.karras, ss.grids.uniform_lam, ss.grids.quadratic_vp, ss.grids.uniform_t)
    )
    spectrum = ss.Gaussian.of(SDE, MODEL.mean(), MODEL.covariance()).spectrum
    told = fitting.gaussian_grid(SDE, 8, spectrum, solver=ss.DDIM())
    assert error(told) < 0.7 * min(error(maker(SDE, 8)) for maker in (ss.grids.karras, ss.grids.uniform_lam))
    assert error(fitting.gits(MODEL, (32, 8), 8)) < 1.1 * common
    assert error(fitting.equal_error(MODEL, (32, 8), 8)) < 1.1 * common


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`steps`"):
        fitting.gits(MODEL, (4, 8), 30, fine=10)
    with pytest.raises(ValueError, match="`spectrum`"):
        fitting.gaussian_grid(SDE, 5, [-1.0])
