"""Posterior samplers against the exact posterior of a mixture, and against their papers' loops."""

from __future__ import annotations

import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.denoisers.base import Given
from scoresde.grids.zigzags import renoised, repaint
from scoresde.guidance.classifier import ClassifierGuidance
from scoresde.inverse.denoisers import DDNM, DPS, MMPS, TMPD, DiffPIR, PiGDM, dps_scale
from scoresde.inverse.exact import log_evidence, posterior
from scoresde.inverse.likelihoods import Counts
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Blur, Downsample, FourierMask, Grey, Linear, Mask, Matrix, Operator
from scoresde.inverse.particles import twisted_smc
from scoresde.inverse.replacement import Replacement
from scoresde.inverse.samplers import daps, ddrm, red_diff
from scoresde.noise.streams import Stream
from scoresde.solvers.rule import Solver

F64 = torch.float64
DOUBLE = ss.Start(dtype=F64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def mixture(sde: ss.SDE, D: int = 4, K: int = 3) -> ss.GaussianMixture:
    return ss.GaussianMixture(
        sde, 1.5 * rand(K, D), weights=torch.arange(1.0, K + 1), std=0.3, factor=0.5 * rand(K, D, 2, seed=1)
    )


def gaussian(sde: ss.SDE, D: int = 4) -> ss.GaussianMixture:
    return mixture(sde, D, 1)


VP = ss.VP()
A = Matrix(rand(2, 4, seed=2))
SEEN = Measurement(A, rand(1, 2, seed=3), 0.4)
FIRST_TWO = Mask(torch.tensor([True, True, False, False]))
KNOWN = Measurement(FIRST_TWO, rand(1, 2, seed=3), 0.0)
MEASUREMENTS = {
    "matrix": SEEN,
    "mask": Measurement(FIRST_TWO, rand(1, 2, seed=3), 0.2),
    "exact mask": KNOWN,
    "blur": Measurement(Blur(torch.tensor([0.2, 0.5, 0.3]), (4,)), rand(1, 4, seed=4), 0.3),
    "down-sampling": Measurement(Downsample(2, (4,), dims=1), rand(1, 2, seed=3), 0.05),
    "function": Measurement(Linear(lambda x: x.cumsum(1)[:, 1:], (4,)), rand(1, 3, seed=3), 1.0),
}

# The exact posterior.


@pytest.mark.parametrize("name", [n for n in MEASUREMENTS if n != "exact mask"])
def test_the_posterior_is_prior_times_likelihood_over_evidence(name: str) -> None:
    prior, seen = mixture(VP), MEASUREMENTS[name]
    x = rand(20, 4, seed=7)
    truth = prior.log_prob(x) + seen.log_prob(x) - log_evidence(prior, seen)
    torch.testing.assert_close(posterior(prior, seen).log_prob(x), truth, rtol=1e-9, atol=1e-8)


def test_the_posterior_is_what_importance_weights_say() -> None:
    prior = mixture(VP)
    x = prior.sample(200_000, seed=0)
    log_w = SEEN.log_prob(x)
    w = log_w.softmax(0)
    truth, size = posterior(prior, SEEN), float(1 / w.square().sum())
    mean = w @ x
    sd = truth.covariance().diagonal().sqrt()
    assert float(((mean - truth.mean()) / sd).abs().max()) < 4 / math.sqrt(size)
    evidence = float(log_w.logsumexp(0)) - math.log(len(x))
    assert evidence == pytest.approx(float(log_evidence(prior, SEEN)), abs=4 / math.sqrt(size))


def test_an_exact_measurement_is_met_by_every_sample() -> None:
    x = posterior(mixture(VP), KNOWN).sample(50, seed=0)
    torch.testing.assert_close(x[:, :2], KNOWN.y.expand(50, 2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow()], ids=repr)
def test_the_posterior_as_a_denoiser_is_the_h_transform(sde: ss.SDE) -> None:
    """score(x_t | y) = score(x_t) + ∇ log p(y | x_t), with p(y | x_t) a mixture of Gaussians written out here."""
    prior, t = mixture(sde), 0.3 * sde.T
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    x = prior.sample(5, t, seed=1).requires_grad_()
    M = A.matrix()
    logs = []
    for mu, C in zip(prior.means, prior.component_covariances(), strict=True):
        gain = alpha * C @ torch.linalg.inv(alpha**2 * C + sigma**2 * torch.eye(4, dtype=F64))
        mean, cov = mu + (x - alpha * mu) @ gain.mT, C - alpha * gain @ C
        law = torch.distributions.MultivariateNormal(
            mean @ M.mT, M @ cov @ M.mT + SEEN.std**2 * torch.eye(2, dtype=F64)
        )
        logs.append(law.log_prob(SEEN.y))
    log_h = (prior.responsibilities(x, t).log() + torch.stack(logs, 1)).logsumexp(1)
    (h,) = torch.autograd.grad(log_h.sum(), x)
    x = x.detach()
    torch.testing.assert_close(posterior(prior, SEEN).score(x, t), prior.score(x, t) + h, rtol=1e-7, atol=1e-7)


def test_the_posterior_of_a_posterior_is_that_of_both_measurements() -> None:
    prior, other = mixture(VP), MEASUREMENTS["mask"]
    x = rand(9, 4, seed=5)
    one = posterior(posterior(prior, SEEN), other)
    torch.testing.assert_close(one.log_prob(x), posterior(posterior(prior, other), SEEN).log_prob(x))


# Methods that are exact somewhere.


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Flow()], ids=repr)
@pytest.mark.parametrize("name", ["matrix", "mask", "blur", "function"])
def test_moment_matching_is_exact_for_a_gaussian(sde: ss.SDE, name: str) -> None:
    prior, seen = gaussian(sde), MEASUREMENTS[name]
    exact = posterior(prior, seen)
    for t in (0.05, 0.5, 0.95):
        x = exact.sample(6, t * sde.T, seed=2)
        ours = MMPS(prior, seen).x0(x, t * sde.T)
        torch.testing.assert_close(ours, exact.x0(x, t * sde.T), rtol=1e-7, atol=1e-7)
    t = torch.linspace(0.1, 0.9, 6, dtype=F64) * sde.T
    torch.testing.assert_close(MMPS(prior, seen).x0(x, t), exact.x0(x, t), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow()], ids=repr)
def test_the_isotropic_methods_are_exact_for_isotropic_data(sde: ss.SDE) -> None:
    prior = ss.GaussianMixture(sde, torch.zeros(1, 4), std=0.7)
    t = 0.4 * sde.T
    for name, seen in MEASUREMENTS.items():
        exact = posterior(prior, seen)
        x = prior.sample(6, t, seed=2)
        for through in (True, False):
            ours = PiGDM(prior, seen, data_std=0.7, through_net=through).x0(x, t)
            torch.testing.assert_close(ours, exact.x0(x, t), rtol=1e-7, atol=1e-7, msg=f"{name}, {through}")
        if name in ("mask", "down-sampling"):
            torch.testing.assert_close(TMPD(prior, seen).x0(x, t), exact.x0(x, t), rtol=1e-7, atol=1e-7)


def test_moment_matching_uses_the_covariance_that_the_denoiser_implies() -> None:
    prior, t = mixture(VP), 0.4
    x = prior.sample(3, t, seed=2)
    M, gain = A.matrix(), VP.sigma(t) ** 2 / VP.alpha(t)
    rows, small = [], []
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z: prior.x0(z[None], t)[0], x[i])
        V, x0 = gain * jacobian, prior.x0(x[i : i + 1], t)[0]
        r = SEEN.y[0] - M @ x0
        rows.append(x0 + V @ M.mT @ torch.linalg.solve(M @ V @ M.mT + SEEN.std**2 * torch.eye(2, dtype=F64), r))
        diagonal = (M @ V @ M.mT).sum(1).clamp_min(0) + SEEN.std**2
        small.append(x0 + V @ M.mT @ (r / diagonal))
    torch.testing.assert_close(MMPS(prior, SEEN).x0(x, t), torch.stack(rows), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(TMPD(prior, SEEN).x0(x, t), torch.stack(small), rtol=1e-7, atol=1e-8)


def test_moment_matching_solves_also_what_is_no_covariance() -> None:
    """A network that is a little wrong is so by σ²/α times as much in V: neither symmetric nor positive."""
    W, t, x = -rand(4, 4, seed=5), 0.6, rand(5, 4, seed=6)
    model = ss.Denoiser(lambda x, t: x @ W.mT.to(x), VP, predicts="x0")
    M, V = A.matrix(), VP.sigma(t) ** 2 / VP.alpha(t) * W.mT
    S = M @ V @ M.mT + SEEN.std**2 * torch.eye(2, dtype=F64)
    assert float(torch.linalg.eigvals(S).real.min()) < 0
    x0 = x @ W.mT
    truth = x0 + torch.linalg.solve(S, (SEEN.y - x0 @ M.mT).mT).mT @ M @ V.mT
    torch.testing.assert_close(MMPS(model, SEEN, 2).x0(x, t), truth, rtol=1e-4, atol=1e-4)


def test_an_exact_method_samples_the_posterior() -> None:
    prior = gaussian(VP)
    exact = posterior(prior, SEEN)
    x = ss.sample(MMPS(prior, SEEN), (4000, 4), ss.UniPC(3), steps=25, seed=0, start=DOUBLE)
    assert ss.metrics.moments(exact.sample(4000, seed=1), x).max_z < 4


def test_a_network_under_a_posterior_keeps_a_graph_only_if_the_state_has_one() -> None:
    prior = mixture(VP)
    x = prior.sample(3, 0.5, seed=0)
    for model in (DPS(prior, SEEN), PiGDM(prior, SEEN), MMPS(prior, SEEN), TMPD(prior, SEEN)):
        assert not model.x0(x, 0.5).requires_grad
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model.x0(leaf, 0.5).sum(), leaf)
        e = 1e-6 * torch.ones_like(x)
        with torch.no_grad():
            numeric = float((model.x0(x + e, 0.5) - model.x0(x - e, 0.5)).sum()) / 2e-6
        assert float(slope.sum()) == pytest.approx(numeric, rel=1e-5), type(model).__name__


# Methods against their papers' loops.


def draws(seed: int, x: Tensor) -> Any:
    """The normals that a plan reads."""
    return lambda k: ss.Noise(seed).fork(Stream.STEPS).like(x, k)


def test_dps_is_the_published_algorithm() -> None:
    prior, grid = mixture(VP), ss.grids.uniform_t(VP, 12)
    start = VP.prior().sample((5, 4), ss.Noise(0), dtype=F64)
    z, x, k = draws(3, start), start, 0
    for t, s in pairwise(grid.tolist()):
        leaf = x.clone().requires_grad_()
        x0 = prior.x0(leaf, t)
        (slope,) = torch.autograd.grad((SEEN.y - A(x0)).norm(dim=1).sum(), leaf)
        c_t, c_0, v = VP.posterior(s, t)
        x = c_t * x + c_0 * x0.detach() - 0.5 * slope
        if v:
            x, k = x + math.sqrt(v) * z(k), k + 1
    model = DPS(prior, Measurement(A, SEEN.y, 0.0), dps_scale(VP, grid, 0.5), norm=True)
    ours = ss.sample(model, start, ss.DDPM(), grid=grid, seed=3)
    torch.testing.assert_close(ours, x, rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="`dps_scale` is defined at the 12 start times of its grid"):
        model.x0(start, 0.123)


def test_dps_is_the_gradient_of_the_likelihood_at_the_mean() -> None:
    prior = mixture(VP)
    x = prior.sample(5, 0.4, seed=0)
    ours = DPS(prior, SEEN, 0.8).x0(x, 0.4)
    same = ClassifierGuidance(prior, SEEN.log_prob, 0.8, sees="x0").x0(x, 0.4)
    torch.testing.assert_close(ours, same)
    bent = Operator(lambda x: x.square().sum(1, keepdim=True), (4,))
    assert DPS(prior, Measurement(bent, torch.ones(1, 1), 1.0)).x0(x, 0.4).isfinite().all()


def test_photons_guide_by_the_gradient_of_their_likelihood() -> None:
    prior, t = mixture(VP), 0.4
    rates = Operator(lambda x: 3 * (x[:, :3] + 4), (4,))
    x0 = prior.sample(5, seed=1)
    y = torch.poisson(rates(x0), generator=torch.Generator().manual_seed(0))
    seen = Counts(rates, y)
    truth = torch.distributions.Poisson(rates(x0)).log_prob(y).sum(1)
    torch.testing.assert_close(seen.log_prob(x0), truth)
    x = VP.alpha(t) * x0 + VP.sigma(t) * rand(5, 4, seed=2)
    slope = torch.empty_like(x)
    for i in range(4):
        e = torch.zeros(4, dtype=F64)
        e[i] = 1e-5
        slope[:, i] = (seen.log_prob(prior.x0(x + e, t)) - seen.log_prob(prior.x0(x - e, t))) / 2e-5
    push = DPS(prior, seen, 0.7).x0(x, t) - prior.x0(x, t)
    torch.testing.assert_close(push, 0.7 * VP.sigma(t) ** 2 / VP.alpha(t) * slope, rtol=1e-6, atol=1e-7)
    assert DPS(prior, seen, norm=True).x0(x, t).isfinite().all()
    # Beyond zero rates the gradient is finite and leads back; log p is continuous there.
    dark = torch.full((5, 4), -50.0, dtype=F64).requires_grad_()
    (back,) = torch.autograd.grad(seen.log_prob(dark).sum(), dark)
    assert back.isfinite().all() and bool((back[:, :3] > 0).all())
    edge = torch.tensor([[seen.floor / 3 - 4]], dtype=F64).expand(5, 4)
    torch.testing.assert_close(seen.log_prob(edge - 1e-9), seen.log_prob(edge + 1e-9), rtol=1e-6, atol=1e-6)


def test_methods_for_gaussian_noise_refuse_photons() -> None:
    prior, seen = mixture(VP), Counts(A, torch.tensor([[3.0, 0.0]]))
    calls: list[Any] = [PiGDM, MMPS, TMPD, DDNM, DiffPIR, posterior]
    for method in calls:
        with pytest.raises(TypeError, match="needs Gaussian noise"):
            method(prior, seen)
    with pytest.raises(TypeError, match="needs Gaussian noise"):
        ddrm(prior, seen, (2, 4), 3)
    for sampler in (daps, twisted_smc):
        assert sampler(prior, seen, (2, 4), 3, seed=0).x.isfinite().all()
    with pytest.raises(ValueError, match="`y` must be counts, at least 0, got -1"):
        Counts(A, torch.tensor([[3.0, -1.0]]))


@pytest.mark.parametrize("zeta", [0.0, 0.3])
def test_diffpir_is_the_published_algorithm(zeta: float) -> None:
    prior, times = mixture(VP), ss.grids.uniform_t(VP, 8)
    start = VP.prior().sample((5, 4), ss.Noise(0), dtype=F64)
    z, x, k, M = draws(3, start), start, 0, A.matrix()
    for t, s in pairwise(times.tolist()):
        x0 = prior.x0(x, t)
        kappa = 2.0 * SEEN.std**2 * (VP.alpha(t) / VP.sigma(t)) ** 2
        x0 = torch.linalg.solve(M.mT @ M + kappa * torch.eye(4, dtype=F64), (SEEN.y @ M + kappa * x0).mT).mT
        eps = (x - VP.alpha(t) * x0) / VP.sigma(t)
        x = VP.alpha(s) * x0 + VP.sigma(s) * math.sqrt(1 - zeta) * eps
        if zeta and s > 0:
            x, k = x + VP.sigma(s) * math.sqrt(zeta) * z(k), k + 1
    model = DiffPIR(prior, SEEN, weight=2.0)
    ours = ss.sample(model, start, ss.DDIM(), grid=renoised(VP, times, zeta), seed=3)
    torch.testing.assert_close(ours, x, rtol=1e-6, atol=1e-6)
    assert DiffPIR(prior, SEEN).x0(x, 0.0).isfinite().all()


def test_ddrm_is_the_published_algorithm_pixel_by_pixel() -> None:
    prior, seen, times = mixture(VP), MEASUREMENTS["mask"], ss.grids.uniform_t(VP, 9).tolist()
    start = VP.prior().sample((5, 4), ss.Noise(0), dtype=F64)
    x, eta, eta_b = start, 0.7, 0.9
    noise = ss.Noise(3).fork(Stream.STEPS)
    for k, (t, s) in enumerate(pairwise(times)):
        x0, z = prior.x0(x, t), noise.like(x, k)
        alpha, sigma = VP.alpha(s), VP.sigma(s)
        out = torch.empty_like(x)
        for i in range(4):
            if i >= 2:
                eps = (x[:, i] - VP.alpha(t) * x0[:, i]) / VP.sigma(t)
                mean, std = alpha * x0[:, i] + math.sqrt(1 - eta**2) * sigma * eps, eta * sigma
            elif sigma < alpha * seen.std:
                away = (seen.y[:, i] - x0[:, i]) / seen.std
                mean, std = alpha * x0[:, i] + math.sqrt(1 - eta**2) * sigma * away, eta * sigma
            else:
                mean = alpha * ((1 - eta_b) * x0[:, i] + eta_b * seen.y[:, i])
                std = math.sqrt(sigma**2 - (eta_b * alpha * seen.std) ** 2)
            out[:, i] = mean + std * z[:, i]
        x = out
    torch.testing.assert_close(ddrm(prior, seen, start, times, eta=eta, eta_b=eta_b, seed=3).x, x)
    exact = ddrm(prior, KNOWN, (5, 4), 6, seed=0).x
    torch.testing.assert_close(exact[:, :2], KNOWN.y.float().expand(5, 2))
    dense = Measurement(Matrix(FIRST_TWO.matrix()), seen.y, seen.std)
    torch.testing.assert_close(ddrm(prior, dense, start, times, eta=eta, eta_b=eta_b, seed=3).x, x)


def test_the_middle_step_of_daps_is_a_draw_from_its_gaussian() -> None:
    mu, t = rand(4, seed=8), 0.3
    model = ss.Denoiser(lambda x, t: mu.expand_as(x), VP, predicts="x0")
    x = daps(model, SEEN, torch.zeros(20_000, 4, dtype=F64), [t, 0.0], steps=1, data_std=0.8, seed=0).x
    var = 1 / (1 / 0.8**2 + (VP.alpha(t) / VP.sigma(t)) ** 2)
    exact = posterior(ss.GaussianMixture(VP, mu[None], std=math.sqrt(var)), SEEN)
    assert ss.metrics.moments(exact.sample(20_000, seed=1), x).max_z < 4


def test_red_diff_finds_the_balance_of_fit_and_prior() -> None:
    prior, seen = ss.GaussianMixture(VP, torch.zeros(1, 4), std=1.0), MEASUREMENTS["mask"]
    grid = torch.linspace(0.5, 0.3, 200, dtype=F64).tolist()
    x = red_diff(prior, seen, torch.zeros(100, 4, dtype=F64), grid, lr=0.03, weight=0.5, seed=0).x
    # ε_θ(x) = σ x for N(0, I) under VP, so on average (σ/α)(ε_θ − ε) is σ² μ.
    pull = 0.5 * sum(VP.sigma(t) ** 2 for t in grid[-50:]) / 50
    torch.testing.assert_close(x.mean(0)[:2], seen.y[0] / (1 + pull), rtol=0.1, atol=0.02)
    assert float(x.mean(0)[2:].abs().max()) < 0.05
    assert not x.requires_grad


def test_weighted_particles_reach_posterior_and_evidence() -> None:
    prior = mixture(VP, 2)
    seen = Measurement(Matrix(torch.tensor([[1.0, 0.5]], dtype=F64)), torch.tensor([[0.8]], dtype=F64), 0.5)
    exact = posterior(prior, seen)
    runs = [
        twisted_smc(prior, seen, VP.prior().sample((1000, 2), ss.Noise(s), dtype=F64), 40, seed=s) for s in range(4)
    ]
    truth = float(log_evidence(prior, seen))
    estimates = [run.log_evidence for run in runs]
    assert sum(estimates) / 4 == pytest.approx(truth, abs=0.1)
    x = torch.cat([run.resampled(0) for run in runs])
    sd = exact.covariance().diagonal().sqrt()
    assert float(((x.mean(0) - exact.mean()) / sd).abs().max()) < 0.1
    torch.testing.assert_close(torch.cov(x.mT), exact.covariance(), rtol=0.15, atol=0.05)
    assert all(1 <= e <= 1000 + 1e-6 for run in runs for e in run.ess) and len(runs[0].ess) == 41
    guided = min(runs[0].ess)
    assert guided > 100, "guided particles stay alive"


# Known pixels.

WITH_ARGUMENTS = {
    "Churn": lambda: ss.solvers.Churn(ss.EDMHeun(), 40.0),
    "DPMSolverV3": lambda: ss.solvers.DPMSolverV3(
        ss.solvers.Statistics((-6.0, 0.0, 7.0), (0.9, 0.5, 0.1), (-0.2, -0.5, -0.1), (0.1, 0.2, 0.3))
    ),
    "Restart": lambda: ss.solvers.Restart(ss.EDMHeun(), 0.1, 0.3),
    "with_corrector": lambda: ss.solvers.with_corrector(ss.solvers.DEIS(3)),
}


def catalogue() -> list[Solver]:
    """Every solver that the package names, with its defaults if it has them; names of equal solvers count once."""
    solvers = []
    for name in ss.solvers.__all__:
        thing = getattr(ss.solvers, name)
        is_class = inspect.isclass(thing) and issubclass(thing, Solver) and thing is not Solver
        if is_class or (inspect.isfunction(thing) and inspect.signature(thing).return_annotation == "Solver"):
            parameters = inspect.signature(thing).parameters.values()
            if name in WITH_ARGUMENTS or all(p.default is not p.empty for p in parameters):
                solvers.append(WITH_ARGUMENTS.get(name, thing)())
    solvers += [ss.DPMSolverPP(3, kind="single"), ss.DDPM("large"), ss.solvers.Ancestral(ss.DPMSolverPP(2))]
    return list({repr(solver): solver for solver in solvers}.values())


CATALOGUE = catalogue()


def test_the_catalogue_misses_no_solver_in_daily_use() -> None:
    names = {repr(solver).split("(")[0].split("[")[0] for solver in CATALOGUE}
    assert len(CATALOGUE) >= 43
    assert {"DDIM", "DDPM", "DPMSolverPP", "EDMHeun", "EulerMaruyama", "SDEDPMSolverPP", "UniPC", "VelocityAB"} <= names


@pytest.mark.parametrize("solver", CATALOGUE, ids=lambda s: f"{s!r}".replace(" ", ""))
def test_known_pixels_are_exact_at_the_end_under_every_solver(solver: Solver) -> None:
    for sde in (VP, ss.Flow(T=0.99), ss.EDM()):
        prior = mixture(sde)
        hook = Replacement(sde, KNOWN, seed=1)
        x = ss.sample(prior, (3, 4), solver, steps=8, seed=0, watch=ss.Watch(hook=hook), start=DOUBLE)
        assert torch.equal(x[:, :2], KNOWN.y.expand(3, 2)), sde
        assert x.isfinite().all() and not torch.equal(x[0, 2:], x[1, 2:])
    x = ss.sample(DDNM(mixture(VP), KNOWN), (3, 4), solver, steps=8, seed=0, start=DOUBLE)
    torch.testing.assert_close(x[:, :2], KNOWN.y.expand(3, 2), rtol=1e-10, atol=1e-10)


def test_a_sampler_without_nodes_of_its_own_refuses_replacement_and_takes_the_denoiser() -> None:
    with pytest.raises(ValueError, match="`hook` of `watch` has no meaning with Adaptive"):
        ss.sample(mixture(VP), (3, 4), ss.Adaptive(), watch=ss.Watch(hook=Replacement(VP, KNOWN, seed=1)))
    x = ss.sample(DDNM(mixture(VP), KNOWN), (3, 4), ss.Adaptive(), seed=0, start=DOUBLE)
    torch.testing.assert_close(x[:, :2], KNOWN.y.expand(3, 2), rtol=1e-12, atol=1e-12)


def test_repaint_goes_back_and_agrees_better() -> None:
    grid = ss.grids.uniform_t(VP, 6)
    a = grid.tolist()
    assert repaint(VP, grid, 2, 2).tolist() == [*a[:3], a[0], *a[1:5], a[2], *a[3:]]
    assert torch.equal(repaint(VP, grid, 3, 1), grid)
    prior = gaussian(VP)
    exact = posterior(prior, KNOWN)
    errors = []
    for resample in (1, 8):
        times = repaint(VP, ss.grids.quadratic_vp(VP, 30), 3, resample)
        hook = Replacement(VP, KNOWN, seed=1)
        x = ss.sample(prior, (500, 4), ss.DDPM(), grid=times, seed=0, watch=ss.Watch(hook=hook), start=DOUBLE)
        errors.append(float((x.mean(0) - exact.mean()).norm()))
    assert errors[1] < 0.6 * errors[0], "how far off it stays is measured in experiments/posteriors.py"


def test_ddnm_meets_what_any_operator_saw() -> None:
    prior = mixture(VP)
    for seen in MEASUREMENTS.values():
        x0 = DDNM(prior, seen).x0(rand(5, 4), 0.5)
        range_part = seen.linear.pinv(seen.data(x0))
        torch.testing.assert_close(seen.linear.pinv(seen.operator(x0)), range_part.expand(5, 4), rtol=1e-9, atol=1e-9)


# Rows, processes, wrong input.


def test_each_sample_may_have_its_own_measurement() -> None:
    prior, y = mixture(VP), rand(6, 2, seed=9)
    x = prior.sample(6, 0.4, seed=0)
    for make in (DPS, PiGDM, MMPS, TMPD, DDNM, DiffPIR):
        whole = make(prior, Measurement(A, y, 0.3)).x0(x, 0.4)
        parts = [make(prior, Measurement(A, y[r], 0.3)).x0(x[r], 0.4) for r in (slice(0, 2), slice(2, 6))]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="`y` has 6 rows and the state has 3"):
        DDNM(prior, Measurement(A, y, 0.3)).x0(x[:3], 0.4)


@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.EDM(), ss.Flow(), ss.Trig(), ss.Cosine()], ids=repr)
def test_every_method_is_finite_on_every_process(sde: ss.SDE) -> None:
    prior, seen = mixture(sde), Measurement(A, SEEN.y, 0.5)
    models = [PiGDM(prior, seen), MMPS(prior, seen), TMPD(prior, seen), DDNM(prior, seen), DiffPIR(prior, seen)]
    for model in models:
        x = ss.sample(model, (3, 4), steps=6, seed=0)
        assert x.dtype == torch.float32 and x.isfinite().all() and float(x.abs().max()) < 50, type(model).__name__
    for x in (
        ddrm(prior, seen, (3, 4), 6, seed=0).x,
        daps(prior, seen, (3, 4), 4, steps=2, seed=0).x,
        red_diff(prior, seen, (3, 4), 10, seed=0).x,
        twisted_smc(prior, seen, (8, 4), 6, seed=0).x,
    ):
        assert x.shape[1:] == (4,) and x.isfinite().all() and float(x.abs().max()) < 50


@pytest.mark.parametrize("op", [Grey, Downsample, Blur, FourierMask, Mask], ids=lambda op: op.__name__)
def test_pictures_keep_their_axes(op: Any) -> None:
    event = (3, 4, 4)
    operator: Linear = {
        Grey: lambda: Grey(event),
        Downsample: lambda: Downsample(2, event),
        Blur: lambda: Blur(torch.full((3, 3), 1 / 9), event),
        FourierMask: lambda: FourierMask(rand(4, 4) > 0, event),
        Mask: lambda: Mask(rand(4, 4) > 0, event),
    }[op]()
    prior = ss.GaussianMixture(VP, 0.3 * rand(1, *event), std=0.8)
    y = operator(prior.sample(1, seed=0))
    seen = Measurement(operator, y + 0.2 * rand(*y.shape), 0.2)
    exact, x = posterior(prior, seen), prior.sample(3, 0.4, seed=1)
    t = torch.tensor([0.2, 0.4, 0.8], dtype=F64)
    for time in (0.4, t):
        torch.testing.assert_close(MMPS(prior, seen, 10).x0(x, time), exact.x0(x, time), rtol=1e-7, atol=1e-7)
        # Isotropic about any mean: D carries the mean.
        ours = PiGDM(prior, seen, data_std=0.8).x0(x, time)
        torch.testing.assert_close(ours, exact.x0(x, time), rtol=1e-7, atol=1e-7)
        for make in (DPS, TMPD, DDNM, DiffPIR):
            assert make(prior, seen).x0(x, time).shape == x.shape
    for out in (
        ddrm(prior, seen, (2, *event), 4, seed=0).x,
        daps(prior, seen, (2, *event), 3, steps=2, seed=0).x,
        red_diff(prior, seen, (2, *event), 4, seed=0).x,
        twisted_smc(prior, seen, (4, *event), 4, seed=0).x,
    ):
        assert out.shape[1:] == event and out.isfinite().all()


class Detached(torch.nn.Module):
    """A network whose output has no graph, as under torch.no_grad()."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(4, 4)

    @torch.no_grad()
    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def test_a_network_that_cannot_be_differentiated_is_named_by_every_method_that_needs_it() -> None:
    model = ss.Denoiser(Detached(), VP, predicts="eps")  # its data prediction depends on x outside the network
    x = torch.zeros(3, 4)
    for method in (DPS, PiGDM, MMPS, TMPD):
        with pytest.raises(ValueError, match=r"the network has no gradient.*no_grad"):
            method(model, SEEN).x0(x, 0.4)
    with pytest.raises(ValueError, match=r"the network has no gradient.*no_grad"):
        twisted_smc(model, SEEN, (3, 4), 3)
    for method in (DDNM, DiffPIR):
        assert method(model, SEEN).x0(x, 0.4).isfinite().all()
    assert PiGDM(model, SEEN, through_net=False).x0(x, 0.4).isfinite().all()
    with torch.no_grad():  # the caller's mode has no effect
        assert not MMPS(mixture(VP), SEEN).x0(x, 0.4).requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) forbids"):
        MMPS(mixture(VP), SEEN).x0(x, 0.4)


def test_conditions_and_measurements_of_another_batch_are_named() -> None:
    model = ss.Denoiser(lambda x, t, label: 0.1 * label[:, None] * x, VP, predicts="x0")
    with pytest.raises(ValueError, match="condition `label` has 2 rows and the state has 3"):
        ss.sample(DDNM(model.given(label=torch.ones(2)), SEEN), (3, 4), steps=2)
    two = Measurement(A, rand(2, 2), 0.3)
    for method in (DPS, PiGDM, MMPS, TMPD, DDNM, DiffPIR):
        with pytest.raises(ValueError, match="`y` has 2 rows and the state has 3"):
            ss.sample(method(mixture(VP), two), (3, 4), steps=2)
    for sampler in (ddrm, daps, red_diff):
        with pytest.raises(ValueError, match="`y` has 2 rows and the state has 3"):
            sampler(mixture(VP), two, (3, 4), 3)
    hook = Replacement(VP, Measurement(FIRST_TWO, rand(2, 2), 0.0), seed=0)
    with pytest.raises(ValueError, match="`y` has 2 rows and the state has 3"):
        ss.sample(mixture(VP), (3, 4), steps=2, watch=ss.Watch(hook=hook))


def test_errors_name_what_is_wrong() -> None:
    prior = mixture(VP)
    for call in (
        lambda: DPS(prior, KNOWN),
        lambda: MMPS(prior, KNOWN),
        lambda: TMPD(prior, KNOWN),
        lambda: daps(prior, KNOWN, (2, 4), 3),
        lambda: twisted_smc(prior, KNOWN, (2, 4), 3),
    ):
        with pytest.raises(ValueError, match=r"`std` must be greater than 0 for .*, got 0; give the noise level of y"):
            call()
    with pytest.raises(TypeError, match="`measurement` must have a Mask as its operator"):
        Replacement(VP, SEEN)
    with pytest.raises(TypeError, match="`operator` must be Linear"):
        DDNM(prior, Measurement(Operator(torch.square, (4,)), torch.zeros(1, 4), 0.1))
    with pytest.raises(TypeError, match="`measurement` must be Measurement"):
        DDNM(prior, A)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`mixture` must be a GaussianMixture"):
        posterior(Given(prior), SEEN)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`measurement` is for states of shape \(4,\), `mixture` has shape \(3,\)"):
        posterior(mixture(VP, 3), SEEN)
    with pytest.raises(ValueError, match="`y` must be one measurement"):
        posterior(prior, Measurement(A, rand(2, 2), 0.3))
    with pytest.raises(ValueError, match=r"`x` must have the operator's shape \(B, 4\), got \(2, 5\)"):
        DDNM(mixture(VP, 5), SEEN).x0(torch.zeros(2, 5), 0.5)
