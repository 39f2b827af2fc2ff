"""Universal plans: the same result under every process and on every scale, and exact where a plan must be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import point_mass_defect
from scoresde.solvers import Universal
from scoresde.solvers.universal import FOLDER, PREDICTS, UniversalTable, tables, unit_of, write_plan

PROCESSES = [ss.VP(), ss.Cosine(), ss.EDM(), ss.Flow(), ss.Trig(), ss.Discrete(ss.processes.betas("cosine", 1000))]
KINDS = (*PREDICTS, "gaussian")
F64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def gaussian(sde: ss.SDE, std: float = 1.0) -> ss.Gaussian:
    return ss.Gaussian(sde, torch.zeros(4, dtype=F64), std**2 * torch.tensor([3.0, 0.8, 0.15, 0.05], dtype=F64))


# The tables.


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_tables_and_say_where_they_come_from(kind: str) -> None:
    page = FOLDER / f"{kind}.json"
    assert page.stat().st_size < 40_000
    raw = json.loads(page.read_text())["tables"]
    assert sorted(map(int, raw)) == sorted(tables(kind)) == [*range(3, 13), 15]
    for n, table in tables(kind).items():
        assert table.nfe == n and "experiments/universal.py" in raw[str(n)]["made by"]
        assert bool((table.levels.diff() < 0).all()) and bool((table.network_levels > 0).all())
        assert torch.allclose(table.weights[1:].sum(1), torch.ones(n, dtype=F64), atol=1e-12)
        assert not bool(table.weights.triu().any()), "only earlier evaluations"
        again = UniversalTable.from_dict(table.to_dict())
        assert torch.allclose(again.weights, table.weights, atol=1e-5), "six digits"


# The plans.


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("nfe", [4, 8])
def test_the_plan_of_every_process_is_the_table(sde: ss.SDE, nfe: int) -> None:
    model = gaussian(sde)
    c = model.spectrum
    x = sde.sigma(sde.T) * normals(3, 4)
    table = tables("data")[nfe]
    # the same table by hand, where the denoised state of Gaussian data is linear
    alpha = sde.alpha(sde.T)
    first = torch.tensor(sde.sigma(sde.T) / alpha if alpha else 1e12, dtype=F64)
    end = table.run(lambda y, s: c / (c + s.square()) * y, x / sde.sigma(sde.T) * first, first)
    plan = Universal(predicts="data").plan(sde, ss.grids.uniform_t(sde, nfe))
    assert plan.nfe == nfe
    # t_of_lam of float64 times; the discrete process interpolates its table
    assert torch.allclose(ss.sample(model, x, plan), end, atol=1e-6)


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
@pytest.mark.parametrize("start", ["prior", "gaussian"])
def test_a_point_is_found_exactly(sde: ss.SDE, start: str) -> None:
    plan = Universal(start=start).plan(sde, ss.grids.uniform_t(sde, 5))
    assert abs(point_mass_defect(plan, sde)) < 1e-12


def test_rows_scale_to_the_time_of_the_network() -> None:
    sde = ss.VP()
    plan = Universal().plan(sde, ss.grids.uniform_t(sde, 6))
    (alpha_T, sigma_T) = sde.alpha(sde.T), sde.sigma(sde.T)
    for i, row in enumerate(plan.rows[2:], 2):
        (source, a) = row.x[0] if row.x else (0, 0.0)
        if source:  # the state of the row before, on the scale of the time at which the network is evaluated
            before = plan.rows[source]
            assert source == i - 1 and row.evaluates and not before.evaluates and row.node is None
            assert a == pytest.approx(sde.alpha(row.t) / sde.alpha(before.t), rel=1e-12)
            continue
        # every other row sends (α_T m + σ_T z, m, …, m) to α(t) m + a σ_T z, at the noise level of its time
        assert a * alpha_T + sum(w for _, w in row.d) == pytest.approx(sde.alpha(row.t), abs=1e-12)
        assert a * sigma_T == pytest.approx(sde.sigma(row.t), rel=1e-9, abs=1e-12)


def test_data_of_twice_the_scale_takes_twice_the_levels() -> None:
    one, two = ss.EDM(), ss.EDM(T=160.0, t_min=0.004)
    x = 80.0 * normals(5, 4)
    a = ss.sample(gaussian(one), x, Universal(data_std=1.0), nfe=6)
    b = ss.sample(gaussian(two, 2.0), 2 * x, Universal(data_std=2.0), nfe=6)
    assert torch.allclose(b, 2 * a, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_a_gaussian_start_is_exact(sde: ss.SDE) -> None:
    model, x = gaussian(sde), sde.sigma(sde.T) * normals(6, 4)
    solution = ss.solve(model, x, Universal(), nfe=5, start=model)
    assert solution.plan is not None
    first = float(solution.plan.rows[0].t)
    assert first < sde.T and not solution.plan.rows[0].x
    on_the_way = model.flow(x, sde.T, first)
    assert torch.allclose(ss.sample(model, on_the_way, solution.plan), solution.x, atol=1e-9), "the flow is the start"
    error = (solution.x - model.flow(x, sde.T, 0.0)).square().mean().sqrt()
    assert float(error) < 0.1, "of data of standard deviation 1"


# What it takes from the model.


def test_the_unit_of_white_data_is_its_deviation_and_scales() -> None:
    assert unit_of(torch.full((5,), 4.0)) == pytest.approx(2.0)
    c = torch.tensor([9.0, 1.0, 0.1])
    assert unit_of(49 * c) == pytest.approx(7 * unit_of(c), rel=1e-3)  # of the grid of levels
    assert unit_of(torch.tensor([100.0] + [0.01] * 99)) > 3 * math.sqrt(1.0099), "few directions hold the variance"
    with pytest.raises(ValueError, match="`spectrum` is 0 in all directions"):
        unit_of(torch.zeros(3))


def test_it_reads_the_model(tmp_path: Path) -> None:
    sde = ss.VP()
    net = ss.nn.MLP(4, hidden=8, depth=1)
    model = ss.Denoiser(net, sde, predicts="eps")
    grid = ss.grids.uniform_t(sde, 5)
    assert model.gaussian is None
    assert Universal().suited(model, 5) == Universal(predicts="noise")
    data = gaussian(sde, 3.0)
    model.card = ss.denoisers.Card(gaussian=data)
    unit = unit_of(data.spectrum)
    assert Universal().suited(model, 5) == Universal(unit, "noise")
    model.save(tmp_path / "model")
    loaded = ss.load(tmp_path / "model")
    wrapped = ss.guidance.Clamp(loaded)
    assert Universal().suited(wrapped, 5) == Universal(unit, "noise"), "saved with the model, seen through wrappers"
    x = sde.sigma(sde.T) * normals(3, 4).float()
    by_hand = Universal(unit, "noise").plan(sde, grid)
    assert torch.equal(ss.sample(loaded, x, Universal(), nfe=5), ss.sample(loaded, x, by_hand))


def test_mixtures_know_their_gaussian() -> None:
    mix = ss.GaussianMixture(ss.VP(), 0.6 * normals(6, 3), std=0.2)
    found = mix.gaussian
    assert found is not None and torch.allclose(found.mean, mix.mean())
    assert torch.allclose(found.spectrum.sort().values, torch.linalg.eigvalsh(mix.covariance()))
    assert gaussian(ss.VP()).gaussian is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: Universal().plan(ss.VP(), ss.grids.uniform_t(ss.VP(), 20)),
            r"has tables for 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 15 evaluations, got 20",
        ),
        (
            lambda: Universal().plan(ss.VP(), [1.0, 0.7, 0.4, 0.1]),
            "`times` must end at the data, t = 0, for Universal, got 0.1",
        ),
        (lambda: Universal(data_std=0.0), "`data_std` must be finite and above 0"),
        (lambda: Universal(start="T"), "`start` must be"),
        (lambda: Universal(predicts="eps"), "`predicts` must be"),
    ],
)
def test_mistakes_are_named(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


# What it buys.


def test_it_beats_the_default_on_data_that_it_has_not_seen() -> None:
    model = ss.GaussianMixture(ss.VP(), 0.7 * normals(5, 6, seed=41), std=0.15)
    x = model.sde.prior().sample((128, 6), ss.Noise(2), dtype=F64)
    truth = ss.sample(model, x, ss.VelocityAB(3), steps=200)

    def median(y: Tensor) -> float:
        return float((y - truth).square().mean(1).sqrt().median())

    default = median(ss.sample(model, x, ss.VelocityAB(2), nfe=5, grid=ss.grids.quadratic_vp))
    assert median(ss.sample(model, x, Universal(), nfe=5)) < 0.6 * default


def test_plans_are_plans() -> None:
    sde = ss.VP()
    plan = write_plan(tables("data")[5].scaled(0.5), sde, sde.T)
    assert ss.Plan.from_dict(plan.to_dict()) == plan
    assert ss.solvers.Solver.from_dict(Universal(0.5).to_dict()) == Universal(0.5)


@pytest.mark.parametrize("grid", [ss.grids.karras, [1.0, 0.5, 0.2, 0.1, 0.01, 0.0]])
def test_a_grid_is_refused_as_the_times_are_fitted(grid: Any) -> None:
    model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.2)
    nfe = 5 if callable(grid) else None
    with pytest.raises(ValueError, match="has its own times"):
        ss.sample(model, (2, 1), Universal(), nfe=nfe, grid=grid, seed=0)
