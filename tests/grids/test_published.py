"""Grids from tables of noise levels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde.grids import NoiseLevels, published

SD = ss.Discrete(ss.processes.betas("scaled_linear", 1000, beta_start=0.00085, beta_end=0.012))

# Table 3 of the paper, typed again.
TABLES = {
    "ays-sd15": "14.615 6.475 3.861 2.697 1.886 1.396 0.963 0.652 0.399 0.152 0.029",
    "ays-sdxl": "14.615 6.315 3.771 2.181 1.342 0.862 0.555 0.380 0.234 0.113 0.029",
    "ays-if": "160.41 8.081 3.315 1.885 1.207 0.785 0.553 0.293 0.186 0.030 0.006",
    "ays-svd": "700.00 54.5 15.886 7.977 4.248 1.789 0.981 0.403 0.173 0.034 0.002",
}


def sde_of(name: str) -> ss.SDE:
    if name == "ays-svd":
        return ss.EDM(T=700.0)
    return ss.Discrete(ss.processes.betas("cosine", 1000)) if name == "ays-if" else SD


def rho(sde: ss.SDE, times: torch.Tensor) -> torch.Tensor:
    return (-sde.lam(times)).exp()


@pytest.mark.parametrize("name", TABLES)
def test_ten_steps_are_the_published_levels(name: str) -> None:
    table = torch.tensor([float(v) for v in TABLES[name].split()], dtype=torch.float64)
    sde = sde_of(name)
    grid = published(name)(sde, 10)
    assert len(grid) == 11 and grid[-1] == 0
    torch.testing.assert_close(rho(sde, grid[1:-1]), table[1:-1], rtol=1e-9, atol=0.0)
    torch.testing.assert_close(rho(sde, grid[:1]), table[:1], rtol=1e-3, atol=0.0)  # T itself where it is that level
    whole = published(name)(sde, 10, t_end=float(sde.t_of_lam(-math.log(table[-1]))))
    torch.testing.assert_close(rho(sde, whole[1:]), table[1:], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("steps", [4, 20, 33])
def test_other_numbers_of_steps_are_log_linear(steps: int) -> None:
    for name, text in TABLES.items():
        table, sde = np.array([float(v) for v in text.split()]), sde_of(name)
        places = np.linspace(0, len(table) - 1, steps + 1)
        expected = np.exp(np.interp(places, np.arange(len(table)), np.log(table)))
        found = rho(sde, published(name)(sde, steps)[1:-1]).numpy()
        np.testing.assert_allclose(found, expected[1:-1], rtol=1e-9)


def test_the_indices_are_those_of_diffusers() -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    for name, key in (("ays-sd15", "StableDiffusion"), ("ays-sdxl", "StableDiffusionXL")):
        tables = schedulers.AysSchedules
        grid = published(name)(SD, 10)
        index = torch.tensor(tables[f"{key}Timesteps"], dtype=torch.float64)
        assert float((SD.index_of_t(grid[:-1]) - index).abs().max()) < 1, "theirs are rounded"
        # theirs end at 0 too
        found = [round(v, 3) for v in rho(SD, grid[:-1]).tolist()]
        assert found == tables[f"{key}Sigmas"][:-1]


def test_a_window_keeps_the_shape_of_the_table() -> None:
    maker = published("ays-sd15")
    start, end = float(SD.t_of_lam(-math.log(3.861))), float(SD.t_of_lam(-math.log(0.399)))
    grid = maker(SD, 6, t_start=start, t_end=end)
    torch.testing.assert_close(rho(SD, grid), rho(SD, maker(SD, 10)[2:9]), rtol=1e-6, atol=0.0)
    assert maker(SD, 3, t_start=start)[0] == start


def test_it_is_a_grid_of_every_solve() -> None:
    model = ss.GaussianMixture(SD, [[-1.0, 0.5], [1.0, -0.5]], std=0.3)
    for options in ({"steps": 7}, {"nfe": 7}, {"steps": 5, "t_end": 30.0}):
        x = ss.sample(model, (8, 2), ss.DPMSolverPP(2), grid=published("ays-sdxl"), seed=0, **options)
        assert x.isfinite().all()
    assert repr(published("ays-sdxl")) == "published('ays-sdxl')"
    assert NoiseLevels([3.0, 1.0])(ss.EDM(T=3.0), 1).tolist() == [3.0, 0.0]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match=r"`name` must be one of 'ays-sd15', .*did you mean 'ays-sd15'"):
        published("ays-sd1")
    with pytest.raises(ValueError, match=r"the first of `levels`, 700, is above σ/α = 14\.6.* at T; use the process"):
        published("ays-svd")(SD, 10)
    with pytest.raises(ValueError, match="`levels` must be at least two decreasing noise levels"):
        NoiseLevels([1.0, 2.0])
    with pytest.raises(ValueError, match=r"`levels\[1\]` must be finite and above 0, got 0"):
        NoiseLevels([1.0, 0.0])
