"""Everything that takes time can show a bar: for each step, when it is asked to, and nothing otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde import inverse, steering
from scoresde._progress import Bar, each

MIX = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), std=0.3)
SEEN = inverse.Measurement(inverse.Mask(torch.tensor([True, False])), torch.tensor([[0.5]]), std=0.1)
PLAN = ss.DDIM().plan(MIX.sde, ss.grids.karras(MIX.sde, 4))

RUNS: dict[str, Callable[[Any], object]] = {
    "sample": lambda p: ss.sample(MIX, (4, 2), steps=3, seed=0, watch=ss.Watch(progress=p)),
    "Adaptive": lambda p: ss.sample(MIX, (4, 2), ss.Adaptive(rtol=0.1), seed=0, watch=ss.Watch(progress=p)),
    "log_prob": lambda p: ss.log_prob(MIX, torch.zeros(2, 2), tolerance=ss.likelihood.Tolerance(steps=3), progress=p),
    "fit": lambda p: ss.fit(PLAN, MIX, (6, 2), steps=2, progress=p),
    "ddrm": lambda p: inverse.ddrm(MIX, SEEN, (4, 2), 3, seed=0, progress=p),
    "daps": lambda p: inverse.daps(MIX, SEEN, (4, 2), 3, steps=1, seed=0, progress=p),
    "red_diff": lambda p: inverse.red_diff(MIX, SEEN, (4, 2), 3, seed=0, progress=p),
    "steering": lambda p: steering.steer(
        MIX, steering.Reward(lambda x: x[:, 0]), (1, 2), grid=3, particles=4, seed=0, progress=p
    ),
    "twisted SMC": lambda p: inverse.twisted_smc(MIX, SEEN, (4, 2), 3, seed=0, progress=p),
    "composition": lambda p: steering.sample_composition(
        steering.product([MIX, MIX]), (1, 2), 3, particles=4, seed=0, progress=p
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", RUNS)
def test_a_bar_is_shown_on_request(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    RUNS[name](False)
    assert capfd.readouterr().err == ""
    RUNS[name]("always")
    assert "%|" in capfd.readouterr().err


def test_the_bar_ends_full_and_long_texts_are_cut(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(each(range(3), "always", "a" * 60)) == [0, 1, 2]
    shown = capfd.readouterr().err
    assert "3/3" in shown and "a" * 37 + "..." in shown and "a" * 38 not in shown
    with Bar(False, 3, "nothing") as bar:
        bar.to(2)
    assert capfd.readouterr().err == ""
