"""Densities of times: they integrate to one, their quantiles are theirs, and batches cover them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from instances import SDES

import scoresde as ss
from scoresde.training import times as T
from scoresde.training.draws import Draws

DENSITIES: dict[str, T.Times] = {
    "uniform": T.Uniform(),
    "logit-normal": T.LogitNormal(0.3, 0.8),
    "mode": T.Mode(1.29),
    "mode of ends": T.Mode(-0.6),
    "cosine": T.CosineTimes(),
    "log-normal sigma": T.LogNormalSigma(-0.5, 1.0),
    "likelihood": T.LikelihoodImportance(0.7),
    "stratified": T.Stratified(T.LogitNormal()),
}


def learned(seed: int = 0) -> T.LossAware:
    density = T.LossAware(T.Mode(0.5), bins=8)
    sde = ss.VP()
    t = density.base.sample(sde, 4000, seed, dtype=torch.float64)
    density.observe(sde, t, 3 * t**2)
    return density


ALL = {**DENSITIES, "loss-aware": learned(), "loss-aware, fresh": T.LossAware()}


def gauss(n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(n)
    return torch.from_numpy((node + 1) / 2), torch.from_numpy(weight / 2)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("process", ["VP", "EDM", "VE", "Flow", "Discrete zero SNR", "Shifted", "two functions"])
def test_a_density_is_the_slope_of_its_share_and_quantiles_invert_it(name: str, process: str) -> None:
    density, sde = ALL[name], SDES[process]
    u = torch.linspace(0.003, 0.997, 101, dtype=torch.float64)
    t = density.icdf(sde, u)
    assert bool((t.diff() > 0).all()) and float(t[0]) >= sde.t_min and float(t[-1]) <= sde.T
    assert torch.allclose(density.cdf(sde, t), u, atol=1e-9)
    for end, share in ((sde.t_min, 0.0), (sde.T, 1.0)):
        at = torch.tensor([end], dtype=torch.float64)
        assert density.cdf(sde, at).item() == pytest.approx(share, abs=1e-9)
    # p(t) dt/du = 1, the derivative by a difference that does not step over a kink of a β list or of a bin.
    h = 1e-7
    slope = (density.icdf(sde, u + h) - density.icdf(sde, u - h)) / (2 * h)
    got = density.density(sde, t) * slope
    good = (got - 1).abs() < 1e-5
    assert float(good.double().mean()) > (0.85 if isinstance(sde, ss.Discrete) else 0.98), got
    ends = density.density(sde, torch.tensor([sde.t_min, sde.T], dtype=torch.float64))
    assert bool((ends.isfinite() & (ends >= 0)).all())


@pytest.mark.parametrize("name", ALL)
def test_densities_integrate_to_one_by_quadrature(name: str) -> None:
    sde = ss.VP()
    node, weight = gauss()
    edges = torch.linspace(math.log(sde.t_min), math.log(sde.T), 33, dtype=torch.float64)
    if isinstance(ALL[name], T.LossAware):  # panels between its kinks
        bins = len(ALL[name].moment)
        u = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        edges = torch.cat([edges, ALL[name].base.icdf(sde, u).log()]).sort().values
    total = 0.0
    for a, b in itertools.pairwise(edges.tolist()):
        t = (a + (b - a) * node).exp()
        total += float((ALL[name].density(sde, t) * t * weight).sum() * (b - a))
    assert total == pytest.approx(1, abs=2e-6)


def test_the_published_forms() -> None:
    flow, u = ss.Flow(t_min=1e-12), torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    twin = T.LogNormalSigma(0.3, 0.8).icdf(flow, u)
    assert torch.allclose(T.LogitNormal(0.3, 0.8).icdf(flow, u), twin, atol=1e-9), "on straight lines they are one"
    edm = ss.EDM(t_min=1e-9, T=1e9)
    z = torch.special.ndtri(u)
    assert torch.allclose(T.LogNormalSigma().icdf(edm, u), (-1.2 + 1.2 * z).exp(), rtol=1e-9)
    s = 1.29
    mode = 1 - u - s * ((math.pi / 2 * u).cos() ** 2 - 1 + u)  # as printed, from noise down to data
    assert torch.allclose(T.Mode(s).icdf(flow, 1 - u), mode, atol=1e-9)
    assert torch.allclose(T.CosineTimes().icdf(flow, u), 1 - 1 / ((math.pi / 2 * u).tan() + 1), atol=1e-9)
    vp = ss.VP()
    lam = torch.linspace(vp.lam(vp.T), vp.lam(vp.t_min), 21, dtype=torch.float64).flip(0)
    even = T.LikelihoodImportance(math.inf).icdf(vp, torch.linspace(0, 1, 21, dtype=torch.float64))
    assert torch.allclose(vp.lam(even), lam, atol=1e-8), "without the data's size: even in λ"
    wide = T.LikelihoodImportance(1e6).density(vp, even[1:-1])
    assert torch.allclose(wide, T.LikelihoodImportance(math.inf).density(vp, even[1:-1]), rtol=1e-6)


def test_steps_are_those_of_a_discrete_process() -> None:
    sde = SDES["Discrete"]
    t = T.Steps(1000).sample(sde, 20_000, 0)
    assert torch.equal(t, t.round()) and t.min() == 1 and t.max() == 1000
    counts = t.long().bincount(minlength=1001)[1:].double()
    assert float(((counts - 20) ** 2 / 20).sum()) < 1000 + 5 * math.sqrt(2000), "χ² of equal shares"


@pytest.mark.parametrize("name", ALL)
def test_draws_follow_the_share(name: str) -> None:
    sde, n = ss.VP(), 20_000
    t = ALL[name].sample(sde, n, 7, dtype=torch.float64)
    share = ALL[name].cdf(sde, t).sort().values
    ks = (share - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max() * math.sqrt(n)
    assert float(ks) < 1.95, "Kolmogorov–Smirnov, 0.1 %"


# Batches.


def strata(t: torch.Tensor, density: T.Times, sde: ss.SDE) -> list[int]:
    return sorted((density.cdf(sde, t.double()) * len(t)).floor().long().clamp(0, len(t) - 1).tolist())


@pytest.mark.parametrize("n", [1, 7, 64])
def test_a_stratified_batch_has_one_time_in_each_stratum(n: int) -> None:
    sde, density = ss.VP(), T.Stratified(T.LogNormalSigma(-0.5, 1.0))
    for source in (3, ss.Noise(3), Draws(torch.Generator().manual_seed(3))):
        u = density.uniforms(n, ss.training.draws.source_of(source), torch.float64, "cpu")
        shift = u.min()  # all N lie at one offset within their strata
        assert sorted((u - shift + 0.5 / n).mul(n).floor().long().tolist()) == list(range(n))
    assert strata(density.sample(sde, n, 3, dtype=torch.float64), density, sde) == list(range(n))


@pytest.mark.parametrize("keyed", [True, False])
def test_ranks_cover_the_strata_of_the_whole_batch(keyed: bool) -> None:
    sde, world, n = ss.Flow(), 4, 8
    density = T.Stratified(T.LogitNormal(), total=world * n if keyed else None)
    parts = []
    for rank in range(world):
        generator = torch.Generator().manual_seed(5)
        noise = ss.Noise(5, offset=rank * n) if keyed else Draws(generator, rank * n, world * n)
        parts.append(density.sample(sde, n, noise, dtype=torch.float64))
    t = torch.cat(parts)
    assert strata(t, density, sde) == list(range(world * n))
    whole = ss.Noise(5) if keyed else Draws(torch.Generator().manual_seed(5))
    assert torch.allclose(t, density.sample(sde, world * n, whole, dtype=torch.float64), atol=1e-12)


def test_each_row_of_a_stratified_batch_alone_is_uniform() -> None:
    first = torch.stack([T.Stratified().sample(ss.Flow(), 8, seed, dtype=torch.float64) for seed in range(800)])
    share = T.Uniform().cdf(ss.Flow(), first)[:, [0, 5]].sort(0).values
    ks = (share - (torch.arange(800, dtype=torch.float64)[:, None] + 0.5) / 800).abs().max() * math.sqrt(800)
    assert float(ks) < 1.95


def test_stratification_lowers_the_variance_of_a_mean() -> None:
    sde = ss.Flow()
    means = {
        name: torch.stack([density.sample(sde, 32, seed, dtype=torch.float64).square().mean() for seed in range(100)])
        for name, density in {"even": T.Stratified(), "free": T.Uniform()}.items()
    }
    assert float(means["even"].var()) < 0.05 * float(means["free"].var())


# What learns.


def test_loss_aware_times_tend_to_the_root_of_the_second_moment() -> None:
    sde, density = ss.Flow(), T.LossAware(bins=16, mix=0.1)
    even = torch.full((16,), 1 / 16)
    assert torch.equal(density.shares(), even)
    for step in range(60):
        t = density.sample(sde, 256, step)
        density.observe(sde, t, t)
    root = (((torch.arange(16) + 0.5) / 16) ** 2 + 1 / (12 * 16**2)).sqrt()  # √E[t² | bin]
    expected = 0.9 * root / root.sum() + 0.1 / 16
    assert torch.allclose(density.shares(), expected, rtol=0.05)
    twin = T.LossAware(bins=16, mix=0.1)
    twin.load_state_dict(density.state_dict())
    assert torch.equal(twin.sample(sde, 9, 1), density.sample(sde, 9, 1))


def test_loss_aware_times_pass_over_what_is_not_finite() -> None:
    density = T.LossAware(bins=2, warmup=1)
    density.observe(ss.Flow(), torch.tensor([0.2, 0.7, 0.9]), torch.tensor([1.0, math.nan, 2.0]))
    assert density.moment.tolist() == [1.0, 4.0] and density.count.tolist() == [1.0, 1.0]


def test_errors_name_the_argument_and_the_fix() -> None:
    for bad in (
        lambda: T.Mode(2.0),
        lambda: T.Steps(0),
        lambda: T.LogitNormal(0.0, 0.0),
        lambda: T.LossAware(mix=0.0),
        lambda: T.LikelihoodImportance(-1.0),
    ):
        with pytest.raises(ValueError, match="must be"):
            bad()
    with pytest.raises(ValueError, match="λ\\(T\\) = −∞"):
        T.LikelihoodImportance(math.inf).sample(ss.Flow(), 2)
    with pytest.raises(ValueError, match="no probability inside the range"):
        T.LogNormalSigma(300.0, 0.1).sample(ss.EDM(), 2)
    with pytest.raises(ValueError, match="one seed and an `offset`"):
        T.Stratified().sample(ss.VP(), 2, ss.Noise([1, 2]))
    with pytest.raises(ValueError, match="must cover rows"):
        Draws(None, 4, 6).normal((4, 2), 0)
