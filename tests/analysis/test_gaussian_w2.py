"""W2 errors on Gaussian data against recursions of the published schemes, closed forms and forward moments."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import analysis

SDE = ss.VP()
GRID = ss.grids.uniform_t(SDE, 30, t_end=1e-3)
SPECTRUM = torch.tensor([0.0, 1e-4, 0.3, 1.0, 50.0], dtype=torch.float64)
EXPERIMENTS = str(Path(__file__).parents[2] / "experiments")


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [EXPERIMENTS, *sys.path])
    import gaussian_w2

    return gaussian_w2


def by_recursion(scheme: str, variance: Tensor) -> Tensor:
    """Variances after all steps of a scheme on the exact score −x/v: one line of Pierret & Galerne for each step."""
    for s, t in zip(GRID[:-1].tolist(), GRID[1:].tolist(), strict=True):
        v = SDE.alpha(s) ** 2 * SPECTRUM + SDE.sigma(s) ** 2
        rate = SDE.beta(s) * (s - t)
        grown = SDE.alpha(t) / SDE.alpha(s)
        if scheme == "EM":
            variance = (1 + rate / 2 - rate / v) ** 2 * variance + rate
        elif scheme == "EI":
            variance = (1 + (grown - 1) * (1 - 2 / v)) ** 2 * variance + grown**2 - 1
        elif scheme == "DDPM":
            variance = (1 - rate / v) ** 2 / (1 - rate) * variance + rate
        else:
            variance = (1 + rate / 2 * (1 - 1 / v)) ** 2 * variance
    return variance


@pytest.mark.parametrize("scheme", ["EM", "EI", "DDPM", "Euler"])
def test_the_schemes_of_the_paper_are_its_recursions(table: Any, scheme: str) -> None:
    plan = table.PAPER[scheme].plan(SDE, GRID)
    alpha, sigma = SDE.alpha(1.0), SDE.sigma(1.0)
    for start, first in (("prior", 0 * SPECTRUM + sigma**2), ("marginal", alpha**2 * SPECTRUM + sigma**2)):
        found = analysis.response(plan, SDE, SPECTRUM, start=start)
        torch.testing.assert_close(found.variance, by_recursion(scheme, first), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("start", ["prior", "marginal"])
@pytest.mark.parametrize(
    "solver", [ss.UniPC(3), ss.solvers.SEEDS(3), ss.solvers.SASolver(3, 4, 1.0), ss.EDMHeun(), ss.solvers.DPMPPSDE()]
)
def test_the_response_is_the_last_of_the_exact_moments(solver: Any, start: str) -> None:
    plan = solver.plan(SDE, ss.grids.quadratic_vp(SDE, 7))
    rows = [replace(row, one=0.1 * r) if r else row for r, row in enumerate(plan.rows)]
    for p in (plan, replace(plan, rows=tuple(rows))):
        forward = analysis.exact_moments(p, SDE, mean=[0.3], spectrum=SPECTRUM, start=start)
        found = analysis.response(p, SDE, SPECTRUM, mean=0.3, start=start)
        torch.testing.assert_close(found.mean, forward.mean, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(found.variance, forward.variance, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "solver"), [("SDE", ss.SDEDPMSolverPP(2)), ("flow", ss.DPMSolverPP(2))])
def test_errors_of_initialisation_are_those_of_fine_plans(table: Any, name: str, solver: Any) -> None:
    plan = solver.plan(SDE, ss.grids.uniform_t(SDE, 200, t_end=0.9))
    for c in (0.3, 50.0):
        data = table.Data(torch.tensor([c], dtype=torch.float64), torch.ones(1, dtype=torch.float64), 1)
        prior, alone = (analysis.response(plan, SDE, [c], start=start) for start in ("prior", "marginal"))
        true = alone.true_variance
        error = (true + prior.variance - alone.variance).sqrt() - true.sqrt()  # without that of the steps
        assert float(error.abs()) == pytest.approx(table.continuous(data, 0.9)[f"initialisation, {name}"], rel=1e-2)


def test_the_spectrum_of_a_texture_is_that_of_its_covariance(table: Any) -> None:
    u = torch.rand(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, often = table.texture(u)
    centred = u - u.mean()
    shifts = [torch.roll(centred, (i, j), (0, 1)).flatten() for i in range(4) for j in range(4)]
    every = torch.linalg.eigvalsh(torch.stack(shifts).T @ torch.stack(shifts) / 16)
    counted = torch.cat([v.repeat(int(n)) for v, n in zip(values, often, strict=True)]).sort().values
    torch.testing.assert_close(counted, every.sort().values[1:], rtol=1e-9, atol=1e-12)
    data = table.Data(values, often / (often * values).sum(), 1)
    assert data.w2(2 * values.sqrt(), values.sqrt()) == pytest.approx(1.0)
    assert math.isclose(float((often * values).sum()), float(centred.square().sum()))
