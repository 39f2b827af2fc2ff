"""Posterior methods with operators that are not linear, and MPGD."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.inverse import (
    DDNM,
    MMPS,
    MPGD,
    TMPD,
    Counts,
    Mask,
    Matrix,
    Measurement,
    Operator,
    PiGDM,
    daps,
)
from scoresde.inverse.linearized import Linearized
from scoresde.inverse.samplers import adjusted_langevin

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)
SDE = ss.VP()
PRIOR = ss.GaussianMixture(SDE, torch.tensor([[-1.0, 0.5, 0.2], [1.0, 0.0, -0.4]], dtype=F64), std=0.5)
A = torch.tensor([[1.0, 0.5, 0.0], [0.2, -1.0, 0.4]], dtype=F64)
Y = torch.tensor([[0.3, -0.8]], dtype=F64)
SHIFT = torch.tensor([0.4, -0.1], dtype=F64)
NOISES: list[dict[str, Any]] = [
    {"std": 0.3},
    {"std": torch.tensor([0.2, 0.6])},
    {"cov": torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64)},
]


def affine(x: Tensor) -> Tensor:
    return x @ A.mT.to(x) + SHIFT.to(x)


def test_a_linearised_operator_has_the_jacobian_of_each_row() -> None:
    operator = Operator(lambda x: torch.stack([x[:, 0] ** 2, x[:, 1] * x[:, 2]], dim=1), (3,))
    x, u, v = (PRIOR.sample(4, seed=s) for s in (0, 1, 2))
    tangent = Linearized(operator, x)
    J = torch.stack([torch.autograd.functional.jacobian(lambda z: operator(z[None])[0], row) for row in x])
    torch.testing.assert_close(tangent(u), (J @ u[..., None])[..., 0])
    w = v[:, :2]
    torch.testing.assert_close(tangent.adjoint(w), (J.mT @ w[..., None])[..., 0])
    rows = tangent.rows(torch.tensor([2]))
    torch.testing.assert_close(rows(u[2:3]), tangent(u)[2:3])


@pytest.mark.parametrize("noise", NOISES, ids=["number", "each entry", "covariance"])
@pytest.mark.parametrize("method", [MMPS, TMPD, PiGDM])
def test_an_affine_operator_is_a_linear_one_with_another_y(method: Any, noise: dict[str, Any]) -> None:
    x = PRIOR.sample(5, 0.4, seed=3)
    curved = method(PRIOR, Measurement(Operator(affine, (3,)), Y, **noise))
    straight = method(PRIOR, Measurement(Matrix(A), Y - SHIFT, **noise))
    torch.testing.assert_close(curved.x0(x, 0.4), straight.x0(x, 0.4), rtol=1e-7, atol=1e-9)
    part = curved.rows(torch.tensor([1, 3])).x0(x[[1, 3]], 0.4)
    torch.testing.assert_close(part, curved.x0(x, 0.4)[[1, 3]])


@pytest.mark.parametrize("method", [MMPS, PiGDM, TMPD])
def test_a_slightly_curved_operator_gives_its_posterior(method: Any) -> None:
    """Against an integral over the line; all three are exact for a Gaussian prior and a linear operator.

    The curvature shifts the mean by 0.064 standard deviations (200,000 samples), and the draws by 1/√20000 = 0.007.
    """
    prior = ss.GaussianMixture(SDE, torch.zeros(1, 1, dtype=F64), std=1.0)
    operator = Operator(lambda x: x + 0.1 * x.square(), (1,))
    seen = Measurement(operator, torch.tensor([[0.7]], dtype=F64), 0.4)
    line = torch.linspace(-5, 5, 2001, dtype=F64)[:, None]
    density = (prior.log_prob(line) + seen.log_prob(line)).softmax(0)
    mean = float(density @ line[:, 0])
    sd = math.sqrt(float(density @ (line[:, 0] - mean) ** 2))
    x = ss.sample(method(prior, seen), (20_000, 1), ss.VelocityAB(3), steps=30, seed=4, start=DOUBLE)
    assert abs(float(x.mean()) - mean) < (0.064 + 4 * 0.007) * sd
    assert float(x.std()) == pytest.approx(sd, rel=0.06)


def test_a_generalised_inverse_replaces_the_operator_of_pigdm() -> None:
    x = PRIOR.sample(5, 0.4, seed=5)
    linear = Matrix(A)
    exact = PiGDM(PRIOR, Measurement(linear, Y, std=0.0))
    given = PiGDM(PRIOR, Measurement(Operator(linear, (3,)), Y, std=0.0), pinv=linear.pinv)
    torch.testing.assert_close(given.x0(x, 0.4), exact.x0(x, 0.4))
    steps = Measurement(Operator(lambda z: (4 * z).round() / 4, (3,)), torch.tensor([[0.75, 0.0, -0.25]]).double(), 0.0)
    model = PiGDM(PRIOR, steps, pinv=lambda y: y)  # has no derivative
    found = ss.sample(model, (50, 3), ss.DDPM(), steps=40, seed=6, start=DOUBLE)
    assert float((found - steps.y).abs().mean()) < 0.25
    with pytest.raises(ValueError, match=r"`pinv\(y\)` must have the shape of `x0`"):
        PiGDM(PRIOR, steps, pinv=lambda y: y[:, :1]).x0(x, 0.4)


def test_mpgd_is_a_gradient_step_on_the_data_prediction() -> None:
    x = PRIOR.sample(5, 0.4, seed=7)
    mask = Measurement(Mask(torch.tensor([True, False, True])), Y, std=0.2)
    torch.testing.assert_close(MPGD(PRIOR, mask).x0(x, 0.4), DDNM(PRIOR, mask).x0(x, 0.4))
    d = PRIOR.x0(x, 0.4)
    curved = Measurement(Operator(lambda z: z[:, :2] ** 2, (3,)), Y, std=0.2)
    slope = torch.zeros_like(d)
    slope[:, :2] = 2 * d[:, :2] * (Y - d[:, :2] ** 2)
    torch.testing.assert_close(MPGD(PRIOR, curved, 0.3).x0(x, 0.4), d + 0.3 * slope)
    torch.testing.assert_close(MPGD(PRIOR, curved, 0.04, likelihood=True).x0(x, 0.4), d + slope)
    scale = torch.linspace(0, 1, 5, dtype=F64)
    torch.testing.assert_close(MPGD(PRIOR, curved, scale).x0(x, 0.4), d + scale[:, None] * slope)
    flat = MPGD(PRIOR, mask, project=lambda z: z * torch.tensor([1.0, 1.0, 0.0]).to(z))
    assert float(flat.x0(x, 0.4)[:, 2].abs().max()) == 0
    counts = Counts(Operator(lambda z: 3 * (z[:, :2] + 4), (3,)), torch.tensor([[12.0, 9.0]]).double())
    assert MPGD(PRIOR, counts, 0.1, likelihood=True).x0(x, 0.4).isfinite().all()


def test_mpgd_needs_no_gradient_of_the_network() -> None:
    class Detached(torch.nn.Module):
        @torch.no_grad()
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return 0.5 * x

    model = MPGD(ss.Denoiser(Detached(), SDE, predicts="x0"), Measurement(Matrix(A), Y, std=0.2), 0.5)
    assert ss.sample(model, (3, 3), steps=4, seed=0).isfinite().all()


# DAPS.


def test_adjusted_langevin_samples_its_target() -> None:
    """A curved likelihood on the line, against an integral; 2000 chains of 150 steps."""
    seen = Measurement(Operator(lambda x: x**2, (1,)), torch.tensor([[0.9]], dtype=F64), 0.3)
    centre, variance = torch.full((2000, 1), 0.6, dtype=F64), 0.5
    x = adjusted_langevin(seen, centre, variance, 150, ss.Noise(8))[:, 0]
    line = torch.linspace(-4, 4, 2001, dtype=F64)[:, None]
    density = (seen.log_prob(line) - (line[:, 0] - 0.6) ** 2 / (2 * variance)).softmax(0)
    positive = x[x > 0]  # chains seldom cross between the two modes
    density = density * (line[:, 0] > 0)
    density = density / density.sum()
    mean = float(density @ line[:, 0])
    sd = math.sqrt(float(density @ (line[:, 0] - mean) ** 2))
    assert abs(float(positive.mean()) - mean) < 0.1 * sd
    assert float(positive.std()) == pytest.approx(sd, rel=0.1)


def test_daps_with_langevin_steps_is_daps_with_exact_ones() -> None:
    """The same linear operator, once known as such, and once as any function: means and deviations of 1500 samples."""
    exact = daps(PRIOR, Measurement(Matrix(A), Y - SHIFT, std=0.3), (1500, 3), 6, steps=3, seed=9, start=DOUBLE).x
    curved = Measurement(Operator(affine, (3,)), Y, std=0.3)
    found = daps(PRIOR, curved, (1500, 3), 6, steps=3, langevin=50, seed=9, start=DOUBLE).x
    sd = exact.std(0)
    assert float(((found.mean(0) - exact.mean(0)) / sd).abs().max()) < 0.13, "a standard error of 0.037"
    torch.testing.assert_close(found.std(0), sd, rtol=0.1, atol=0)


def test_daps_takes_other_noise_than_gaussian() -> None:
    counts = Counts(Operator(lambda z: 20 * (z[:, :1] + 3), (3,)), torch.tensor([[80.0]], dtype=F64))
    x = daps(PRIOR, counts, (200, 3), 8, steps=3, langevin=30, seed=10, start=DOUBLE).x
    assert float((x[:, 0] > 0).double().mean()) > 0.9, "the counts say that the first entry is near 1"
    again = daps(PRIOR, counts, (1, 3), 8, steps=3, langevin=30, seed=ss.Noise(10, offset=7), start=DOUBLE).x
    torch.testing.assert_close(again[0], x[7], rtol=1e-9, atol=1e-9)
