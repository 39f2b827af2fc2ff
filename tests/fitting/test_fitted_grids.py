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
from scoresde._numerics import legendre
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


COMMON = (ss.grids.karras, ss.grids.uniform_lam, ss.grids.quadratic_vp)


def gaussian_bound(grid: Tensor, c: float) -> Tensor:
    """Bound of the step from the first time of `grid` to each later one, for Gaussian data of variance c (eq. 14)."""
    v = (-2 * SDE.lam(grid)).exp()

    def integral(v: Tensor) -> Tensor:
        return 0.5 * (((v + c) / v).log() / c**2 - 1 / (c * v) + 1 / (v * (first + c)))

    first = v[0]
    return c**2 * (integral(first) - integral(v[1:]))


@pytest.mark.parametrize("std", [0.3, 1.0])
def test_align_your_steps_finds_the_smallest_bound_of_gaussian_data(std: float) -> None:
    model, c = ss.GaussianMixture(SDE, torch.zeros(1, 4, dtype=torch.float64), std=std), std**2
    fine = ss.grids.uniform_lam(SDE, 40)
    cost = torch.full((40, 40), torch.inf, dtype=torch.float64)
    for i in range(39):
        cost[i, i + 1 :] = gaussian_bound(fine[i:-1], c)

    def bound(grid: Tensor) -> float:
        return sum(float(gaussian_bound(grid[i : i + 2], c)) for i in range(len(grid) - 2))

    for steps in (5, 9):
        best = bound(torch.cat([fine[_cheapest(cost, steps - 1)], fine[-1:]]))
        found = bound(fitting.align_your_steps(model, model.sample(2000, seed=0), steps, fine=40))
        assert best <= found < 1.02 * best, "2000 samples know the integrals to about 1 %"
        assert found < 0.6 * min(bound(maker(SDE, steps)) for maker in COMMON)


def klub(model: Any, grid: Tensor, data: Tensor, nodes: int = 8) -> float:
    """Monte Carlo estimate of the bound (eq. 10), with paths of its own for each time."""
    u, w = legendre(nodes)
    lam, total = SDE.lam(grid[:-1]), 0.0
    for i in range(len(lam) - 1):
        for k, (at, weight) in enumerate(zip(lam[i] + (lam[i + 1] - lam[i]) * u, w, strict=True)):
            rho, first = float((-at).exp()), float((-lam[i]).exp())
            y = data + rho * normals(*data.shape, seed=2 * (nodes * i + k))
            z = y + (first**2 - rho**2) ** 0.5 * normals(*data.shape, seed=2 * (nodes * i + k) + 1)
            t, s = float(SDE.inverse_lam(at)), float(grid[i])
            gap = model.x0(SDE.alpha(t) * y, t) - model.x0(SDE.alpha(s) * z, s)
            total += float(weight * (lam[i + 1] - lam[i]) * (2 * at).exp() * gap.square().sum(1).mean())
    return total


@pytest.mark.parametrize("dims", [2, 8])
def test_align_your_steps_is_worth_something_to_stochastic_solvers(dims: int) -> None:
    model = MODEL if dims == 8 else ss.GaussianMixture(SDE, normals(5, 2, seed=3), std=0.1)
    data, steps, rule = model.sample(256, seed=0), 8, ss.SDEDPMSolverPP(2)
    entropy = float(-model.log_prob(model.sample(4000, seed=9)).mean())

    def excess(grid: Tensor) -> float:
        """Negative log-likelihood of samples above that of the data: the comparison of table 4."""
        x = ss.sample(model, (1000, dims), rule, grid=grid, seed=3, start=ss.Start(dtype=torch.float64))
        return abs(float(-model.log_prob(x).mean()) - entropy)

    grid = fitting.align_your_steps(model, data, steps)
    assert klub(model, grid, data) < 0.5 * min(klub(model, maker(SDE, steps), data) for maker in COMMON)
    assert excess(grid) < 0.5 * min(excess(maker(SDE, steps)) for maker in COMMON)


def test_the_end_of_the_bound_can_be_chosen() -> None:
    grid = fitting.align_your_steps(MODEL, MODEL.sample(64, seed=0), 6, fine=24, t_min=0.02)
    assert float(grid[-2]) == 0.02 and float(grid[-1]) == 0.0


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="`steps`"):
        fitting.gits(MODEL, (4, 8), 30, fine=10)
    with pytest.raises(ValueError, match="`spectrum`"):
        fitting.gaussian_grid(SDE, 5, [-1.0])
