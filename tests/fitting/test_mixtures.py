"""Batches of mixtures: equal to the exact denoisers, whatever they are merged with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import scoresde as ss
from scoresde.fitting.mixtures import Bends, Mixtures, Problems, Waves, from_spectrum, merge
from scoresde.fitting.universal import Group, descend, errors, mean_log
from scoresde.solvers.universal import tables

F64 = torch.float64


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def random_mixtures(p: int, k: int, d: int, seed: int = 1) -> Mixtures:
    return Mixtures(
        normals(p, k, seed=seed).softmax(1), normals(p, k, d, seed=seed + 1), normals(p, k, d).square() + 0.01
    )


def problems(p: int, k: int, d: int, predicts: str = "v") -> Problems:
    waves = Waves.draw(p, d, predicts=predicts, size=torch.full((p,), 0.1, dtype=F64), drift=0.5, seed=d)
    return Problems.of(random_mixtures(p, k, d, seed=k), 50.0, waves)


def test_posterior_means_and_moments_are_those_of_the_exact_denoiser() -> None:
    m, y = random_mixtures(2, 4, 3), 2 * normals(2, 7, 3, seed=8)
    for i in range(2):
        sde = ss.EDM()  # α = 1, σ = t
        own = ss.GaussianMixture(sde, m.means[i], weights=m.weights[i], cov=torch.diag_embed(m.variances[i]))
        assert torch.allclose(m.x0(y, torch.tensor(0.7, dtype=F64))[i], own.x0(y[i], 0.7), atol=1e-12)
        assert torch.allclose(m.mean()[i], own.mean())
        assert torch.allclose(m.covariance()[i], own.covariance())
        assert torch.allclose(m.variance()[i], own.covariance().diagonal())
    assert torch.allclose(m.scaled(torch.tensor([2.0, 3.0])).centred().mean(), torch.zeros(2, 3, dtype=F64), atol=1e-14)


def test_padding_changes_nothing() -> None:
    parts = [problems(2, 3, 5), problems(1, 6, 2, "eps")]
    both = merge(parts)
    y, s = both.draw(4, seed=0), torch.tensor(0.8, dtype=F64)
    assert torch.allclose(both.x0(y / 50, s)[:2, :, :5], parts[0].x0(y[:2] / 50, s), atol=1e-12)
    assert torch.allclose(both.x0(y / 50, s)[2:, :, :2], parts[1].x0(y[2:, :, :2] / 50, s), atol=1e-12)
    assert not bool(both.x0(y, s)[2:, :, 2:].any()) and not bool(y[2:, :, 2:].any())
    x = both.x0(y, s)
    assert torch.allclose(both.error(x, 0 * x)[2], x[2, :, :2].square().mean(1).sqrt())


def test_the_end_of_the_flow_of_a_gaussian_is_exact() -> None:
    c = torch.tensor([[4.0, 1.0, 0.1]], dtype=F64)
    one = Problems.of(Mixtures(torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, 3, dtype=F64), c[:, None]), 100.0)
    y = one.draw(6, seed=3)
    assert torch.allclose(one.end(y, last=1e-4, steps=400), y * (c / (c + 1e4)).sqrt()[:, None], rtol=1e-5, atol=1e-6)


def test_a_spectrum_gives_its_variances() -> None:
    c = torch.tensor([9.0, 1.0, 0.3, 0.01], dtype=F64)
    m = from_spectrum(c, n=40, seed=3)
    assert torch.allclose(m.variance().mean(0), c, rtol=0.05)
    assert bool((m.variances > 0).all())


def test_bends_vanish_at_both_ends() -> None:
    c = torch.tensor([[4.0, 1.0, 0.1]], dtype=F64)
    bends = Bends.draw(c, strength=torch.ones(1, dtype=F64), reach=1.0, drift=0.3, seed=0)
    y = normals(1, 5, 3)
    sizes = [float(bends(y * s, torch.tensor(s, dtype=F64)).norm()) for s in (1e-4, 1.0, 1e4)]
    assert sizes[0] < 1e-3 * sizes[1] and sizes[2] < 1e-2 * sizes[1]


def test_a_descent_lowers_the_errors_on_problems_it_has_not_seen() -> None:
    train, held, fresh = (Group.draw(problems(3, 4, 4), 8, seed=i) for i in range(3))
    begun = tables("data")[4].scaled(2.0)  # levels for other data
    fitted, score = descend(begun, [train], [held], steps=20)
    before, after = (torch.cat(errors(t, [fresh])).log().mean() for t in (begun, fitted))
    assert after < before - 0.3 and torch.allclose(fitted.weights[1:].sum(1), torch.ones(4, dtype=F64))
    assert bool((fitted.levels.diff() < 0).all()) and score < float(torch.cat(errors(begun, [held])).log().mean())


def test_the_share_of_squares_and_the_penalty_do_what_they_say() -> None:
    train = [Group.draw(problems(3, 4, 2), 12, seed=0)]
    begun = tables("data")[4]
    assert abs(mean_log([torch.tensor([[1.0, 7.0]])], squares=1.0) - math.log(5)) < 1e-6
    plain, tails, small = (
        descend(begun, train, train, steps=15, **how)[0] for how in ({}, {"squares": 1.0}, {"penalty": 0.3})
    )
    rms = [mean_log(errors(t, train), squares=1.0) for t in (plain, tails)]
    assert rms[1] < rms[0]
    assert mean_log(errors(plain, train)) < mean_log(errors(tails, train))
    assert small.weights.square().sum() < plain.weights.square().sum()


def test_a_gaussian_start_carries_the_states_along_the_flow() -> None:
    m = random_mixtures(1, 3, 2)
    group = Group.draw(Problems.of(m, 50.0), 5, seed=0, gaussian=True)
    own = ss.Gaussian.of(ss.EDM(), m.mean()[0], m.covariance()[0])
    table = tables("gaussian")[4]
    level = float(table.levels[0])
    y = own.flow(group.y[0], 50.0, level)
    expected = table.run(lambda v, s: m.x0(v[None], s)[0], y, table.levels[0])
    assert torch.allclose(group.run(table)[0], expected, atol=1e-8)
