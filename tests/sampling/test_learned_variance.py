"""Learned variances, the mean squared score and interpolation with conditions that belong to the denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import scoresde as ss

SDE = ss.VP()


def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.cat([0.3 * x + 0.1 * label[:, None], label[:, None].expand_as(x)], 1)


MODEL = ss.Denoiser(net, SDE, predicts="eps", learned_variance=True)
LABEL = torch.tensor([-1.0, 0.0, 1.0])


def test_conditions_reach_the_variance_and_samples_do_not_depend_on_the_batch() -> None:
    method = ss.sampling.LearnedVariance()
    whole = ss.solve(MODEL.given(label=LABEL), (3, 4), method, steps=6, seed=0)
    assert whole.nfe == whole.calls == 6 and whole.times[-1] == 0.0 and whole.seed == 0
    for i, (label, variance) in enumerate(zip(LABEL, ("small", None, "large"), strict=True)):
        seed = ss.Noise(0, offset=i)
        alone = ss.sample(MODEL.given(label=label[None]), (1, 4), method, steps=6, seed=seed)
        torch.testing.assert_close(alone, whole.x[i : i + 1])
        if variance is not None:
            plain = ss.Denoiser(lambda x, t, c=label: 0.3 * x + 0.1 * c, SDE, predicts="eps")
            table = ss.sample(plain, (1, 4), ss.DDPM(variance), steps=6, seed=seed)
            torch.testing.assert_close(alone, table, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_every_step() -> None:
    label = LABEL.clone().requires_grad_()
    x = ss.Noise(0).normal((3, 4), 0, dtype=torch.float64)

    def loss(label: Tensor, grad: str) -> Tensor:
        return ss.sample(MODEL.given(label=label), x, ss.sampling.LearnedVariance(), steps=5, seed=1, grad=grad).sum()

    (gradient,) = torch.autograd.grad(loss(label, "full"), label)
    step = 1e-3 * torch.ones(3)
    difference = loss(LABEL + step, "off") - loss(LABEL - step, "off")
    assert float(gradient.sum()) == pytest.approx(float(difference) / 2e-3, rel=1e-3)


def test_the_mean_squared_score_and_interpolation_use_the_conditions_of_the_model() -> None:
    def shifted(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return (x - label[:, None]) / 2

    model = ss.Denoiser(shifted, SDE, predicts="x0").given(label=LABEL)
    data = ss.Noise(0).normal((3, 4), 0)
    grid = ss.grids.karras(SDE, 4)
    value = ss.sampling.mean_squared_score(model, data, grid, seed=1)
    x = SDE.perturb(data, float(grid[0]), ss.Noise(1).like(data, 0))
    assert float(value[0]) == pytest.approx(float(model.score(x, float(grid[0])).square().mean()), rel=1e-6)
    path = ss.sampling.interpolate(model, data, data.flip(0), 3, ss.DPMSolverPP(2), steps=20)
    for i in range(3):
        row = torch.tensor([i])
        alone = ss.sampling.interpolate(model.rows(row), data[row], data.flip(0)[row], 3, ss.DPMSolverPP(2), steps=20)
        torch.testing.assert_close(alone[:, 0], path[:, i], rtol=1e-4, atol=1e-5)
