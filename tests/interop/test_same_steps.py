"""The table of schedulers: rows that say "equal" are equal, and every scheduler is in the table or has a reason."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import scoresde as ss

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own deprecations

ROOT = Path(__file__).parents[2]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments" / "interop"), *sys.path])
    import same_steps

    return same_steps


@pytest.mark.parametrize(
    ("name", "options", "step"),
    [
        ("DDIM", {"clip_sample": False}, {"eta": 1.0}),
        ("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}, {}),
        ("DPMSolverMultistep", {"solver_order": 2}, {}),
        ("DPMSolverSDE", {}, {}),
        ("EulerDiscrete", {}, {}),
        ("FlowMatchEulerDiscrete", {"shift": 3.0}, {}),
        ("KDPM2AncestralDiscrete", {}, {}),
        ("TCD", {"clip_sample": False}, {"eta": 0.3}),
        ("UniPCMultistep", {}, {}),
    ],
)
def test_rows_that_say_equal_are_equal(name: str, options: Any, step: Any, table: Any) -> None:
    (row,) = (r for r in table.rows() if (r.name, r.options, r.step) == (name, options, step))
    # Float32 rounds by 6e-8. Ten steps, with weights up to 16 on differences of predictions, give 1e-5.
    assert row.equal and table.measure(row) < 1e-5


def test_the_comparison_sees_another_solver_another_grid_and_other_normals(
    table: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    euler = next(r for r in table.rows() if r.name == "EulerDiscrete")
    assert table.measure(replace(euler, solver=ss.solvers.Euler())) > 1e-3
    assert table.measure(replace(euler, grid=lambda sde, made: ss.grids.karras(sde, 10))) > 1e-3
    noisy = next(r for r in table.rows() if r.name == "EulerAncestralDiscrete")
    monkeypatch.setattr(table.Normals, "like", lambda self, x, draw: torch.zeros_like(x))
    assert table.measure(noisy) > 1e-3


def test_every_scheduler_is_in_the_table_or_has_a_reason(table: Any) -> None:
    rows, others = {row.name for row in table.rows()}, set(table.UNMATCHED)
    installed = {name.removesuffix("Scheduler") for name in dir(diffusers) if name.endswith("Scheduler")}
    installed -= {name for name in installed if name.startswith("Flax")}
    assert not rows & others and installed <= rows | others


def test_the_page_has_the_rows_of_the_script(table: Any) -> None:
    page = (ROOT / "docs" / "schedulers.md").read_text()
    for row in table.rows():
        assert f"| {' | '.join(table.columns(row))} | " in page
    for name, reason in table.UNMATCHED.items():
        assert f"| {name} | {reason} |" in page
