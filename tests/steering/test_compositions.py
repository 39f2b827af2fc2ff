"""Products, mixtures and powers of models against closed forms and integrals on a grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.steering import Composition, Resampling, Reward, mixture, power, product, sample_composition

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)
A = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.5]], dtype=F64), std=0.5)
B = ss.GaussianMixture(ss.VP(), torch.tensor([[0.8, 0.0], [-1.0, 1.5]], dtype=F64), std=0.7, weights=[0.7, 0.3])
AXIS = torch.linspace(-6, 6, 301, dtype=F64)
POINTS = torch.cartesian_prod(AXIS, AXIS)
AREA = float(AXIS[1] - AXIS[0]) ** 2


def integrals(log: Tensor) -> tuple[float, Tensor, Tensor]:
    """log Z, mean and variances of a density on the plane, by sums over a grid."""
    w = log.softmax(0)[:, None]
    mean = (w * POINTS).sum(0)
    return float(log.logsumexp(0)) + math.log(AREA), mean, (w * (POINTS - mean).square()).sum(0)


@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow(), ss.VE()], ids=lambda sde: type(sde).__name__)
@pytest.mark.parametrize("beta", [0.5, 1.5])
def test_powers_of_a_gaussian_are_exact_with_few_steps(sde: ss.SDE, beta: float) -> None:
    """All steps are exact for isotropic Gaussian data, so Z is unbiased with 8 steps and 30 particles."""
    std, dims = 0.6, 2
    model = ss.GaussianMixture(sde, torch.zeros(1, dims, dtype=F64), std=std)
    start = ss.Start(dtype=F64, data_std=std)
    run = sample_composition(power(model, beta), (600, dims), 8, particles=30, start=start, seed=0)
    log_z = dims * (0.5 * (1 - beta) * math.log(2 * math.pi * std**2) - 0.5 * math.log(beta))
    ratio = (run.log_z - log_z).exp()
    assert float((ratio.mean() - 1).abs() / ratio.std()) * 600**0.5 < 3.5
    square = run.merged().mean(torch.square)[0]
    torch.testing.assert_close(square, torch.full_like(square, std**2 / beta), rtol=0.06, atol=0)


@pytest.mark.parametrize(
    ("composition", "log_density"),
    [
        (product([A, B]), lambda a, b: a + b),
        (product([A, B], [1.5, -0.5]), lambda a, b: 1.5 * a - 0.5 * b),
        (mixture([A, B], [1, 3]), lambda a, b: torch.logaddexp(a + math.log(0.25), b + math.log(0.75))),
        (Composition([A, B], lambda log: log.logsumexp(0) + log[0]), lambda a, b: torch.logaddexp(a, b) + a),
        (power(A, 1.5), lambda a, b: 1.5 * a),
    ],
    ids=["product", "guidance", "mixture", "mixture times a model", "power"],
)
def test_compositions_of_mixtures(composition: Composition, log_density: object) -> None:
    """log Z to four standard errors between eight runs, whose weights have heavy tails, and 0.05 for the steps."""
    log_z, mean, variance = integrals(log_density(A.log_prob(POINTS, 0.0), B.log_prob(POINTS, 0.0)))  # type: ignore[operator]
    run = sample_composition(composition, (8, 2), 60, particles=1000, start=DOUBLE, seed=1).merged()
    assert float(run.log_z_error) < 0.15, "the test has power"
    assert float(run.log_z) == pytest.approx(log_z, abs=4 * float(run.log_z_error) + 0.05)
    assert float(((run.mean()[0] - mean) / variance.sqrt()).abs().max()) < 0.1
    second = run.mean(lambda x: (x - mean).square())[0]
    torch.testing.assert_close(second, variance, rtol=0.1, atol=0)


def test_a_sum_of_scores_does_not_sample_the_product() -> None:
    """What the weights are for: the same steps without them are far off."""
    _, mean, variance = integrals(A.log_prob(POINTS, 0.0) + B.log_prob(POINTS, 0.0))
    never = Resampling(threshold=0.0)
    plain = sample_composition(product([A, B]), (1, 2), 60, particles=2000, start=DOUBLE, resample=never, seed=2)
    error = (plain.x[0].mean(0) - mean) / variance.sqrt()
    assert float(error.norm()) > 0.2, "the weighted particles are within 0.1, as tested above"


def test_the_mixture_needs_no_weights() -> None:
    run = sample_composition(mixture([A, B]), (1, 2), 60, particles=1000, start=DOUBLE, seed=3)
    assert float(run.ess.min()) > 950
    assert float(run.log_z) == pytest.approx(0, abs=0.03)


def test_small_variances_are_exact_in_the_limit_of_many_steps() -> None:
    model = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2, dtype=F64), std=0.6)
    errors = []
    for steps in (20, 40, 80):
        run = sample_composition(
            power(model, 0.5), (10, 2), steps, particles=400, variance="small", start=DOUBLE, seed=4
        ).merged()
        errors.append(abs(float(run.mean(torch.square).mean()) / 0.72 - 1))
    assert errors[1] < 0.75 * errors[0] and errors[2] < 0.75 * errors[1]


def test_a_reward_tilts_a_composition() -> None:
    tilt = torch.tensor([0.8, -0.5], dtype=F64)
    log = 0.5 * A.log_prob(POINTS, 0.0) + 0.5 * B.log_prob(POINTS, 0.0) + POINTS @ tilt
    log_z, mean, variance = integrals(log)
    reward = Reward(lambda x: x @ tilt)
    run = sample_composition(
        product([A, B], [0.5, 0.5]), (8, 2), 50, particles=800, potential=reward, start=DOUBLE, seed=5
    ).merged()
    assert float(run.log_z_error) < 0.15, "the test has power"
    assert float(run.log_z) == pytest.approx(log_z, abs=4 * float(run.log_z_error) + 0.05)
    assert float(((run.mean()[0] - mean) / variance.sqrt()).abs().max()) < 0.1


def test_problems_are_keyed_by_the_seed() -> None:
    whole = sample_composition(product([A, B]), (3, 2), 6, particles=5, start=DOUBLE, seed=6)
    part = sample_composition(product([A, B]), (1, 2), 6, particles=5, start=DOUBLE, seed=ss.Noise(6, offset=2))
    torch.testing.assert_close(part.x[0], whole.x[2], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(part.log_z[0], whole.log_z[2], rtol=1e-10, atol=1e-10)
    assert whole.nfe == 12 and whole.calls == 12, "two models, six steps"


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="`powers` must have a positive sum, got -1"):
        product([A, B], [1, -2])
    with pytest.raises(ValueError, match="`powers` must have one entry for each of 2 models, got 1"):
        product([A, B], [1])
    with pytest.raises(ValueError, match="`weights` must have one entry for each of 2 models, got 3"):
        mixture([A, B], [1, 1, 1])
    with pytest.raises(ValueError, match=r"`models\[1\]` is on"):
        product([A, B.under(ss.Flow())])
    with pytest.raises(ValueError, match=r"`log_density` must map \(2, 1\) to \(1,\), got \(2, 1\)"):
        sample_composition(Composition([A, B], lambda log: log), (1, 2), 3)
    flow = A.under(ss.Flow())
    with pytest.raises(ValueError, match="`grid` must start where alpha > 0"):
        sample_composition(power(flow, 2.0), (1, 2), [1.0, 0.5, 0.0])
    start = ss.Gaussian(ss.VP(), torch.zeros(2), torch.ones(2))
    with pytest.raises(ValueError, match="`start` must have no Gaussian"):
        sample_composition(power(A, 2.0), (1, 2), 3, start=start)
