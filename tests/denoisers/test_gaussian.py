"""The Gaussian start: exact on one Gaussian, and worth evaluations on a mixture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from instances import SDES
from torch import Tensor

import scoresde as ss
from scoresde.denoisers.gaussian import Gaussian
from scoresde.noise.streams import Stream
from scoresde.plan.run import run

D = 6


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MEAN = 0.3 * normals(D)
ROOT = normals(D, D, seed=1) / 2
COV = ROOT @ ROOT.mT
AXES = torch.linalg.qr(normals(D, 2, seed=2))[0]
LOW = torch.tensor([2.0, 0.5], dtype=torch.float64)
STD = torch.linspace(0.1, 2.0, D, dtype=torch.float64)

# A Gaussian, and the same as a mixture of one component.
PAIRS: dict[str, tuple[Any, Any]] = {
    "full": (lambda sde: Gaussian.of(sde, MEAN, COV), lambda sde: ss.GaussianMixture(sde, MEAN[None], cov=COV[None])),
    "diagonal": (
        lambda sde: Gaussian(sde, MEAN, STD**2),
        lambda sde: ss.GaussianMixture(sde, MEAN[None], std=STD[None]),
    ),
    "low rank": (
        lambda sde: Gaussian(sde, MEAN, LOW, AXES, rest=0.09),
        lambda sde: ss.GaussianMixture(sde, MEAN[None], factor=(AXES * (LOW - 0.09).sqrt())[None], std=0.3),
    ),
}


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
def test_it_is_a_mixture_of_one(sde: ss.SDE, kind: str) -> None:
    mine, exact = (make(sde) for make in PAIRS[kind])
    s, t = 0.9 * sde.T, 0.2 * sde.T
    x = exact.sample(5, s, seed=0)
    assert torch.allclose(mine.x0(x, s), exact.x0(x, s), atol=1e-10)
    assert torch.allclose(mine.flow(x, s, t), exact.flow(x, s, t), rtol=1e-9, atol=1e-10)
    assert torch.allclose(mine.flow(mine.flow(x, s, t), t, s), x, rtol=1e-9, atol=1e-9), "exactly back"
    each = torch.tensor([s, t, s, t, s], dtype=torch.float64)
    assert torch.allclose(mine.flow(x, each, t)[0], mine.flow(x, s, t)[0]), "a time a sample"


def test_equal_normals_are_one_trajectory() -> None:
    sde = ss.VP()
    start = Gaussian.of(sde, MEAN, COV)
    z = normals(4, D, seed=3)
    assert torch.allclose(start.flow(start.carry(z, 1.0), 1.0, 0.3), start.carry(z, 0.3), atol=1e-12)
    x = start.sample(40_000, 0.0, seed=0)
    assert torch.allclose(x.mean(0), MEAN, atol=0.03) and torch.allclose(x.mT.cov(), COV, atol=0.08)


def test_the_flow_is_differentiable_in_its_times() -> None:
    start = Gaussian.of(ss.VP(), MEAN, COV)
    x = normals(2, D, seed=4)
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: start.flow(x, 1.0, t), (t,))


@pytest.mark.parametrize("kind", ["full", "diagonal", "separable", "low rank"])
def test_estimates_recover_the_covariance(kind: str) -> None:
    sde, shape = ss.VP(), (2, 3, 4)
    bases = [torch.linalg.qr(normals(n, n, seed=n))[0] for n in shape]
    spectrum = torch.linspace(0.2, 3.0, 24, dtype=torch.float64).reshape(shape)
    axes = None if kind == "diagonal" else bases
    truth = Gaussian(sde, torch.ones(shape), spectrum, axes)
    found = Gaussian.estimate(sde, truth.sample(100_000, seed=1), kind, rank=24)
    x = truth.sample(8, 0.7, seed=2)
    assert (found.flow(x, 0.7, 0.1) - truth.flow(x, 0.7, 0.1)).abs().max() < 0.06
    assert torch.allclose(found.spectrum, truth.spectrum, rtol=0.12)


def test_it_is_cast_and_moved_like_any_module() -> None:
    half = Gaussian.of(ss.VP(), MEAN, COV).float()
    assert half.mean.dtype == torch.float32
    x = normals(3, D).float()
    assert torch.allclose(half.flow(x, 1.0, 0.2), Gaussian.of(ss.VP(), MEAN, COV).flow(x, 1.0, 0.2), atol=1e-4)


def test_the_kind_is_chosen_by_what_the_data_can_tell() -> None:
    sde = ss.VP()
    assert Gaussian.estimate(sde, normals(100, 5)).spectrum.shape == (5,)
    assert not Gaussian.estimate(sde, normals(20, 3, 8, 8))._flat, "separable"
    low = Gaussian.estimate(sde, normals(20, 50), rank=10)
    assert low.rest > 0 and low.spectrum.shape == (50,)
    assert math.isclose(float(low.spectrum.sum()), float(normals(20, 50).var(0).sum()), rel_tol=1e-9), (
        "no variance lost"
    )


def mixture() -> ss.GaussianMixture:
    return ss.GaussianMixture(ss.VP(), 0.6 * normals(6, 8, seed=5), std=0.2)


def paid_and_foretold(model: ss.GaussianMixture, t: float, seed: int) -> tuple[Tensor, float]:
    """Errors of trajectories that start near time t, (64,), and the root mean square that is foretold for them."""
    start = Gaussian.of(model.sde, model.mean(), model.covariance())
    times, errors = start.skip_errors(model, points=64, seed=seed)
    k = int((times - t).abs().argmin())
    z = ss.Noise(seed).fork(Stream.GAUSSIAN).normal((64, 8), 1, dtype=torch.float64)  # the same as in skip_errors

    def end(t: float) -> Tensor:
        plan = ss.VelocityAB(3).plan(model.sde, ss.grids.karras(model.sde, 100, t_start=t))
        return run(plan, model.x0, start.carry(z, t))

    return (end(float(times[k])) - end(1.0)).square().mean(1).sqrt(), float(errors[k])


@pytest.mark.parametrize("seed", range(3))
def test_the_cost_of_a_start_is_foretold_near_a_gaussian(seed: int) -> None:
    model = ss.GaussianMixture(ss.VP(), 0.1 * normals(6, 8, seed=5), std=0.2)
    paid, foretold = paid_and_foretold(model, 0.2, seed)
    assert foretold == pytest.approx(float(paid.square().mean().sqrt()), rel=0.06)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("t", [0.6, 0.4])
def test_with_separate_modes_the_typical_cost_is_a_part_of_the_foretold_one(t: float, seed: int) -> None:
    paid, foretold = paid_and_foretold(mixture(), t, seed)
    assert 1.5 < foretold / float(paid.median()) < 5


def test_errors_of_a_start_grow_and_give_its_time() -> None:
    model = mixture()
    start = Gaussian.of(model.sde, model.mean(), model.covariance())
    assert bool((start.skip_errors(model, points=64)[1].diff() > 0).all())
    loose, tight = (start.start_time(model, tol) for tol in (1e-2, 1e-3))
    assert 0.3 < loose < tight < 1.0
    one = ss.GaussianMixture(model.sde, MEAN[None], cov=COV[None])
    assert Gaussian.of(one.sde, MEAN, COV).start_time(one) == pytest.approx(one.sde.t_min), (
        "of one Gaussian it knows everything"
    )


def test_a_start_buys_accuracy() -> None:
    model = mixture()
    start = Gaussian.of(model.sde, model.mean(), model.covariance())
    x = start.sample(64, model.sde.T, seed=1)
    truth = ss.sample(model, x, ss.VelocityAB(3), steps=200)
    plain = (
        (ss.sample(model, x, ss.VelocityAB(3), nfe=6, grid=ss.grids.quadratic_vp) - truth)
        .flatten(1)
        .norm(dim=1)
        .median()
    )
    begun = ss.sample(
        model, x, ss.VelocityAB(3), nfe=6, grid=ss.grids.quadratic_vp, t_start=start.start_time(model), start=start
    )
    assert (begun - truth).flatten(1).norm(dim=1).median() < 0.75 * plain


def test_solve_starts_from_it() -> None:
    model = mixture()
    start = Gaussian.of(model.sde, model.mean(), model.covariance())
    plan = ss.VelocityAB(2).plan(model.sde, ss.grids.karras(model.sde, 10, t_start=0.5))
    drawn = ss.sample(model, (5, 8), plan, seed=3, start=ss.Start(gaussian=start, dtype=torch.float64))
    z = ss.Noise(3).fork(0).normal((5, 8), 0, dtype=torch.float64)
    assert torch.allclose(drawn, run(plan, model.x0, start.carry(z, 0.5)))
    assert torch.allclose(drawn, ss.sample(model, start.carry(z, 1.0), plan, start=start)), "a state is one at T"


def test_stochastic_plans_start_from_its_marginal() -> None:
    one = ss.GaussianMixture(ss.VP(), MEAN[None], cov=COV[None])
    start = Gaussian.of(one.sde, MEAN, COV)
    plan = ss.SDEDPMSolverPP(2).plan(one.sde, ss.grids.karras(one.sde, 12, t_start=0.5))
    x = ss.sample(one, (20_000, len(MEAN)), plan, seed=0, start=ss.Start(gaussian=start, dtype=torch.float64))
    found = ss.analysis.response(plan, one.sde, start.spectrum)
    assert plan.stochastic and torch.allclose((x - MEAN).square().sum(1).mean(), found.variance.sum(), rtol=0.03)
    assert torch.allclose(x.mean(0), MEAN, atol=0.05)


def test_codes_live_at_T() -> None:
    one = ss.GaussianMixture(ss.VP(), MEAN[None], cov=COV[None])
    start = Gaussian.of(one.sde, MEAN, COV)
    x = one.sample(4, seed=0)
    code = ss.encode(one, x, t_end=0.5, start=start)
    assert (code - one.flow(x, one.sde.t_min, one.sde.T)).abs().max() < 1e-4
    assert (ss.decode(one, code, t_end=0.5, start=start) - x).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Gaussian(ss.VP(), torch.zeros(3), torch.ones(2)), "`spectrum`"),
        (lambda: Gaussian(ss.VP(), torch.zeros(3), torch.ones(2), torch.ones(4, 2)), "`axes`"),
        (lambda: Gaussian(ss.VP(), torch.zeros(3), -torch.ones(3)), "at least 0"),
        (lambda: Gaussian.estimate(ss.VP(), torch.zeros(1, 3)), "at least 2 samples"),
        (lambda: Gaussian.estimate(ss.VP(), torch.zeros(9, 3), "dct"), "`kind`"),
        (lambda: Gaussian(ss.VP(), torch.zeros(3), torch.ones(3)).flow(torch.zeros(1, 4), 1.0, 0.5), "`x`"),
    ],
)
def test_bad_input_is_refused(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()
