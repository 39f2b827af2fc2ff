"""Times below those of training: a network extrapolates there, and an exact denoiser does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss

SDES = {"VP": ss.VP(), "EDM": ss.EDM(), "Flow": ss.Flow(t_min=0.01), "Discrete": ss.Discrete([0.2] * 50)}
EACH = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())


def network(x: Tensor, time: Tensor) -> Tensor:
    return 0.5 * x


def model(sde: ss.SDE) -> ss.Denoiser:
    return ss.Denoiser(network, sde, predicts="x0")


def to_zero(sde: ss.SDE, last: float) -> list[float]:
    return [sde.T, sde.T / 2, last * sde.t_min, 0.0]


BELOW: dict[str, Callable[[Any], Any]] = {
    "grid": lambda m: ss.sample(m, (2, 3), ss.DDIM(), grid=to_zero(m.sde, 0.3), seed=0),
    "guided": lambda m: ss.sample(ss.guidance.Clamp(m), (2, 3), ss.DDIM(), grid=to_zero(m.sde, 0.3), seed=0),
    "t_end": lambda m: ss.sample(m, (2, 3), ss.EDMHeun(), steps=3, t_end=0.3 * m.sde.t_min, seed=0),
    "adaptive": lambda m: ss.sample(m, (2, 3), ss.Adaptive(), t_end=0.3 * m.sde.t_min, seed=0),
    "encode": lambda m: ss.encode(m, torch.ones(2, 3), steps=3, t_start=0.3 * m.sde.t_min),
    "plan": lambda m: ss.sample(m, (2, 3), ss.DDIM().plan(m.sde, to_zero(m.sde, 0.3)), seed=0),
    "log_prob": lambda m: ss.log_prob(m, torch.ones(2, 3), t_min=0.3 * m.sde.t_min),
    "elbo": lambda m: ss.elbo(m, torch.ones(2, 3), t_min=0.3 * m.sde.t_min, grid="continuous", seed=0),
}
INSIDE: dict[str, Callable[[Any], Any]] = {
    "default": lambda m: ss.sample(m, (2, 3), seed=0),
    "karras": lambda m: ss.sample(m, (2, 3), grid=ss.grids.karras, steps=50, seed=0),
    "at t_min": lambda m: ss.sample(m, (2, 3), ss.DDIM(), grid=to_zero(m.sde, 1.0), seed=0),
    "almost t_min": lambda m: ss.sample(m, (2, 3), ss.DDIM(), grid=to_zero(m.sde, 0.95), seed=0),
    "end at t_min": lambda m: ss.sample(m, (2, 3), ss.EDMHeun(), steps=3, t_end=m.sde.t_min, seed=0),
    "last step below, not evaluated": lambda m: ss.sample(
        m, (2, 3), ss.DDIM(), grid=[m.sde.T, m.sde.T / 2, m.sde.t_min, 0.3 * m.sde.t_min], seed=0
    ),
    "encode": lambda m: ss.encode(m, torch.ones(2, 3), steps=3),
    "adaptive": lambda m: ss.sample(m, (2, 3), ss.Adaptive(), seed=0),
}


@EACH
@pytest.mark.parametrize("name", BELOW)
def test_evaluations_below_the_times_of_training_warn(sde: ss.SDE, name: str) -> None:
    expected = (
        rf"evaluated at t = {0.3 * sde.t_min:.3g}, below t_min = {sde.t_min:.3g}.*trained on \[t_min, T\].*smaller"
    )
    with pytest.warns(UserWarning, match=expected):
        BELOW[name](model(sde))


@EACH
@pytest.mark.parametrize("name", INSIDE)
def test_other_runs_do_not_warn(sde: ss.SDE, name: str) -> None:
    INSIDE[name](model(sde))


@pytest.mark.parametrize("name", ["grid", "guided", "t_end", "adaptive", "encode", "plan", "log_prob"])
def test_exact_denoisers_are_defined_at_all_times(name: str) -> None:
    """There they are right: N(0, s²) is carried to N(0, s²) whatever the last positive time."""
    BELOW[name](ss.GaussianMixture(ss.VP(), torch.zeros(1, 3), std=1.0))


def test_a_smaller_t_min_is_the_fix() -> None:
    grid = to_zero(ss.VP(), 0.3)
    ss.sample(ss.Denoiser(network, ss.VP(t_min=grid[-2]), predicts="x0"), (2, 3), ss.DDIM(), grid=grid, seed=0)
