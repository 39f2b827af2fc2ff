"""Nothing is kept alive: models, plans, trainers and open files are freed when their users let go of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde import _numerics

sys.path.append(str(Path(__file__).parents[1] / "experiments"))

import leaks


@pytest.mark.parametrize("make", leaks.CALLS.values(), ids=leaks.CALLS)
def test_nothing_outlives_its_users(make: Callable[[int], list[Any]]) -> None:
    if make is leaks.trained:
        pytest.importorskip("accelerate")
    cached = _numerics.legendre.cache_info().currsize
    made, alive, growth = leaks.measure(make, 5)
    assert made >= 10 and alive == [] and growth < 20
    assert _numerics.legendre.cache_info().currsize <= cached + 2


def test_a_leak_would_be_noticed() -> None:
    kept: list[Any] = []

    def leak(k: int) -> list[Any]:
        kept.append(leaks.network())
        return kept[-1:]

    made, alive, growth = leaks.measure(leak, 5)
    assert made == 5 and alive == ["Denoiser"] * 5 and growth >= 20


def test_files_leave_no_open_descriptor(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("needs /proc to count open files")
    plan, folder = ss.DDIM().plan(ss.VP(), [1.0, 0.5]), ss.training.Checkpoints(tmp_path, keep=1)

    def once(k: int) -> None:
        plan.save(tmp_path / "plan.json")
        ss.Plan.load(tmp_path / "plan.json")
        folder.save(k, {"w": torch.ones(2)})
        folder.latest()

    once(0)
    before = len(os.listdir(descriptors))
    for k in range(1, 20):
        once(k)
    assert len(os.listdir(descriptors)) == before and len(list(tmp_path.iterdir())) == 2
