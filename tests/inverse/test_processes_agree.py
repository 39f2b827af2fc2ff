"""What belongs to one process is refused by a model on another one, also if both end at the same T."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import scoresde as ss

VP, FLOW = ss.VP(), ss.Flow()
MODEL = ss.GaussianMixture(VP, torch.zeros(1, 2), std=1.0)
OTHER = ss.GaussianMixture(FLOW, torch.zeros(1, 2), std=1.0)
SEEN = ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), torch.tensor([[0.5]]), std=0)


@pytest.mark.parametrize("solver", [None, ss.DDPM(), ss.UniPC(2)], ids=repr)
def test_replacement_of_another_process_is_refused(solver: Any) -> None:
    assert VP.T == FLOW.T
    hook = ss.inverse.Replacement(FLOW, SEEN, seed=0)
    with pytest.raises(ValueError, match=r"`hook` is a Replacement on Flow\(.*model is on VP\(.*model.sde"):
        ss.sample(MODEL, (3, 2), solver, steps=4, seed=0, watch=ss.Watch(hook=hook))
    equal = ss.inverse.Replacement(ss.VP(), SEEN, seed=0)
    x = ss.sample(MODEL, (3, 2), solver, steps=4, seed=0, watch=ss.Watch(hook=equal))
    assert torch.equal(x[:, 0], torch.full((3,), 0.5))


def test_a_corrector_with_a_model_of_another_process_is_refused() -> None:
    corrector = ss.sampling.LangevinCorrector(model=OTHER, seed=0)
    with pytest.raises(ValueError, match=r"`corrector\.model` is on Flow"):
        ss.sample(MODEL, (3, 2), steps=4, seed=0, watch=ss.Watch(hook=corrector))


def test_a_solution_of_another_process_is_not_inverted() -> None:
    rule = ss.integrators.Reversible()
    times = ss.grids.quadratic_vp(VP, 8, t_start=0.9, t_end=0.1)
    x = MODEL.sample(4, t=0.9, seed=0)
    solution = ss.solve(MODEL, x, rule, grid=times)
    assert solution.sde == VP
    assert torch.allclose(rule.invert(MODEL, solution).x, x, atol=1e-5)
    with pytest.raises(ValueError, match=r"`solution` is of a model on VP\(.*`model` is on Flow"):
        rule.invert(OTHER, solution)


def test_a_gaussian_of_another_process_is_refused_by_codes_too() -> None:
    start = ss.Gaussian(FLOW, torch.zeros(2), torch.ones(2))
    x = MODEL.sample(4, seed=0)
    for use in (
        lambda: ss.encode(MODEL, x, steps=4, start=start),
        lambda: ss.decode(MODEL, x, steps=4, start=start),
        lambda: ss.sample(MODEL, x, steps=4, start=ss.Start(gaussian=start)),
    ):
        with pytest.raises(ValueError, match=r"`start` is a Gaussian under Flow.*model is on VP"):
            use()
