"""Noise of every kind against exact posteriors, quadrature and one-by-one evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.inverse import (
    DDNM,
    DPS,
    MMPS,
    TMPD,
    Blur,
    DiffPIR,
    Downsample,
    Linear,
    Mask,
    Matrix,
    Measurement,
    Operator,
    PiGDM,
    daps,
    ddrm,
    log_evidence,
    posterior,
    red_diff,
    stack,
    twisted_smc,
)

F64 = torch.float64
VP = ss.VP()
D = 4


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def covariance(n: int, seed: int = 0) -> Tensor:
    F = rand(n, n, seed=seed)
    return 0.2 * F @ F.mT + 0.1 * torch.eye(n, dtype=F64)


def mixture(K: int = 3) -> ss.GaussianMixture:
    return ss.GaussianMixture(VP, 1.5 * rand(K, D), std=0.3, factor=0.5 * rand(K, D, 2, seed=1))


OPERATORS: dict[str, Linear] = {
    "matrix": Matrix(rand(3, D, seed=2)),
    "mask": Mask(torch.tensor([True, False, True, True])),
    "down-sampling": Downsample(2, (D,), dims=1),
    "blur": Blur(torch.tensor([0.2, 0.5, 0.3]), (D,)),
    "function": Linear(lambda x: x.cumsum(1)[:, 1:], (D,)),
}


def stds(A: Linear) -> Tensor:
    return torch.linspace(0.2, 0.9, math.prod(A.out), dtype=F64)


def noises(A: Linear) -> dict[str, dict[str, Tensor]]:
    return {"std of each entry": {"std": stds(A)}, "covariance": {"cov": covariance(math.prod(A.out), 5)}}


CASES = [(name, noise) for name in OPERATORS for noise in ("std of each entry", "covariance")]
each_case = pytest.mark.parametrize(("name", "noise"), CASES)


def seen_of(name: str, noise: str, rows: int = 1) -> Measurement:
    A = OPERATORS[name]
    return Measurement(A, rand(rows, *A.out, seed=3), **noises(A)[noise])  # type: ignore[arg-type]


def sigma_of(seen: Measurement) -> Tensor:
    """Covariance of the noise as a matrix, from the arguments."""
    assert seen.covariance is not None
    matrix = seen.covariance.matrix
    return seen.covariance.std.flatten().square().diag() if matrix is None else matrix[0]


# Likelihood and exact posterior.


@each_case
def test_the_likelihood_is_the_normal_density(name: str, noise: str) -> None:
    seen, x = seen_of(name, noise), rand(6, D, seed=7)
    law = torch.distributions.MultivariateNormal(seen.operator(x), sigma_of(seen))
    torch.testing.assert_close(seen.log_prob(x), law.log_prob(seen.y))
    white = seen.whitened()
    assert white.std == 1.0
    torch.testing.assert_close(white.log_prob(x), seen.log_prob(x))


@each_case
def test_the_posterior_is_prior_times_likelihood_over_evidence(name: str, noise: str) -> None:
    prior, seen, x = mixture(), seen_of(name, noise), rand(20, D, seed=7)
    truth = prior.log_prob(x) + seen.log_prob(x) - log_evidence(prior, seen)
    torch.testing.assert_close(posterior(prior, seen).log_prob(x), truth, rtol=1e-9, atol=1e-8)


def test_a_gaussian_has_the_posterior_of_the_information_form() -> None:
    prior, seen = mixture(1), seen_of("matrix", "covariance")
    A, C, S = OPERATORS["matrix"].matrix(), prior.covariance(), sigma_of(seen)
    precision = torch.linalg.inv(C) + A.mT @ torch.linalg.inv(S) @ A
    exact = posterior(prior, seen)
    torch.testing.assert_close(torch.linalg.inv(exact.covariance()), precision, rtol=1e-7, atol=1e-7)
    mean = torch.linalg.solve(precision, torch.linalg.solve(C, prior.mean()) + A.mT @ torch.linalg.solve(S, seen.y[0]))
    torch.testing.assert_close(exact.mean(), mean, rtol=1e-8, atol=1e-8)


# Methods.


@each_case
def test_methods_that_are_exact_for_gaussians_stay_exact(name: str, noise: str) -> None:
    seen, t = seen_of(name, noise), 0.4
    prior = mixture(1)
    x = prior.sample(5, t, seed=2)
    exact = posterior(prior, seen).x0(x, t)
    torch.testing.assert_close(MMPS(prior, seen).x0(x, t), exact, rtol=1e-6, atol=1e-6)
    plain = ss.GaussianMixture(VP, torch.zeros(1, D), std=0.7)
    exact = posterior(plain, seen).x0(x, t)
    for through in (True, False):
        ours = PiGDM(plain, seen, data_std=0.7, through_net=through).x0(x, t)
        torch.testing.assert_close(ours, exact, rtol=1e-7, atol=1e-7)
    if name in ("mask", "down-sampling"):
        torch.testing.assert_close(TMPD(plain, seen).x0(x, t), exact, rtol=1e-7, atol=1e-7)


@each_case
def test_proximal_and_projected_predictions_solve_their_equations(name: str, noise: str) -> None:
    prior, seen, t = mixture(), seen_of(name, noise), 0.4
    x = prior.sample(5, t, seed=2)
    A, W, x0 = OPERATORS[name].matrix(), torch.linalg.inv(sigma_of(seen)), prior.x0(x, t)
    kappa = 2.0 * (VP.alpha(t) / VP.sigma(t)) ** 2
    truth = torch.linalg.solve(A.mT @ W @ A + kappa * torch.eye(D, dtype=F64), (seen.y @ W @ A + kappa * x0).mT).mT
    torch.testing.assert_close(DiffPIR(prior, seen, 2.0).x0(x, t), truth, rtol=1e-6, atol=1e-6)
    root = torch.linalg.cholesky(W).mT  # weighted least squares
    truth = x0 + (seen.y - x0 @ A.mT) @ (torch.linalg.pinv(root @ A) @ root).mT
    torch.testing.assert_close(DDNM(prior, seen).x0(x, t), truth, rtol=1e-7, atol=1e-7)
    push = DPS(prior, seen).x0(x, t) - x0
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(seen.log_prob(prior.x0(leaf, t)).sum(), leaf)
    torch.testing.assert_close(push, VP.sigma(t) ** 2 / VP.alpha(t) * slope, rtol=1e-9, atol=1e-9)


@each_case
def test_samplers_depend_on_the_noise_only_through_whitened_values(name: str, noise: str) -> None:
    """The same problem, written with W A, W y and std 1 by hand, has the same samples."""
    seen, prior = seen_of(name, noise), mixture()
    white = seen.whitened()
    by_hand = Measurement(Matrix(white.linear.matrix()), white.y, 1.0)
    z = VP.prior().sample((6, D), ss.Noise(0), dtype=F64)
    for sampler in (ddrm, twisted_smc):
        a, b = (sampler(prior, m, z, 5, seed=1).x for m in (seen, by_hand))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    runs = [twisted_smc(prior, m, z, 5, seed=1).log_evidence for m in (seen, by_hand)]
    assert runs[0] == pytest.approx(runs[1] + float(white.log_volume), abs=1e-6)


@each_case
def test_the_middle_step_of_daps_is_a_draw_from_its_gaussian(name: str, noise: str) -> None:
    seen, mu, t = seen_of(name, noise), rand(D, seed=8), 0.3
    model = ss.Denoiser(lambda x, t: mu.expand_as(x), VP, predicts="x0")
    x = daps(model, seen, torch.zeros(4000, D, dtype=F64), [t, 0.0], steps=1, data_std=0.8, seed=0).x
    var = 1 / (1 / 0.8**2 + (VP.alpha(t) / VP.sigma(t)) ** 2)
    exact = posterior(ss.GaussianMixture(VP, mu[None], std=math.sqrt(var)), seen)
    assert ss.metrics.moments(exact.sample(4000, seed=1), x).max_z < 4


def test_the_optimum_of_red_diff_weighs_entries_by_their_precision() -> None:
    A = Mask(torch.tensor([True, True, False, False]))
    std = torch.tensor([0.2, 0.6], dtype=F64)
    prior, seen = ss.GaussianMixture(VP, torch.zeros(1, D), std=1.0), Measurement(A, rand(1, 2, seed=3), std)
    grid = torch.linspace(0.5, 0.3, 200, dtype=F64).tolist()
    x = red_diff(prior, seen, torch.zeros(100, D, dtype=F64), grid, lr=0.03, weight=0.5, seed=0).x
    weight = std**-2 / (std**-2).mean()
    pull = 0.5 * sum(VP.sigma(t) ** 2 for t in grid[-50:]) / 50
    torch.testing.assert_close(x.mean(0)[:2], seen.y[0] * weight / (weight + pull), rtol=0.1, atol=0.02)


# Entries that were not measured, and masks of each sample.

METHODS: dict[str, Callable[[Any, Any], Any]] = {
    "DPS": DPS,
    "PiGDM": PiGDM,
    "MMPS": MMPS,
    "TMPD": TMPD,
    "DDNM": DDNM,
    "DiffPIR": DiffPIR,
}


@pytest.mark.parametrize("name", OPERATORS)
def test_an_entry_of_infinite_std_was_not_measured(name: str) -> None:
    """Same as the operator without this row, in every method; its value may be NaN."""
    A, prior, t = OPERATORS[name], mixture(), 0.4
    std, y = stds(A), rand(1, *A.out, seed=3)
    keep = torch.arange(len(std)) != 1
    less = Measurement(Matrix(A.matrix()[keep]), y[:, keep], std[keep])
    y, std = torch.where(keep, y, torch.nan), torch.where(keep, std, torch.inf)
    seen = Measurement(A, y, std)
    x = prior.sample(5, t, seed=2)
    torch.testing.assert_close(seen.log_prob(x), less.log_prob(x))
    torch.testing.assert_close(log_evidence(prior, seen), log_evidence(prior, less))
    torch.testing.assert_close(posterior(prior, seen).log_prob(x), posterior(prior, less).log_prob(x))
    for method, make in METHODS.items():
        a, b = make(prior, seen).x0(x, t), make(prior, less).x0(x, t)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=method)
    for sampler in (ddrm, daps, twisted_smc):
        a, b = (sampler(prior, m, (6, D), 4, seed=1) for m in (seen, less))
        assert a.x.isfinite().all()
        if sampler is not daps:
            torch.testing.assert_close(a.x, b.x, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_mask_of_each_sample_equals_one_by_one(name: str) -> None:
    A, prior, t, B = OPERATORS[name], mixture(), 0.4, 5
    M = math.prod(A.out)
    missing = torch.arange(B * M).reshape(B, M) % torch.tensor([2, 3, 7, 11, 5])[:, None] == 1
    seen = Measurement(A, rand(B, M, seed=3), torch.where(missing, torch.inf, 0.2 + 0.1 * torch.arange(M, dtype=F64)))
    x = prior.sample(B, t, seed=2)
    each = [seen.rows(torch.tensor([i])) for i in range(B)]
    torch.testing.assert_close(log_evidence(prior, seen), torch.cat([log_evidence(prior, one) for one in each]))
    torch.testing.assert_close(seen.log_prob(x), torch.cat([m.log_prob(x[i : i + 1]) for i, m in enumerate(each)]))
    for method, make in METHODS.items():
        if method == "DDNM" and name not in ("mask", "down-sampling"):
            continue
        whole = make(prior, seen).x0(x, t)
        parts = [make(prior, one).x0(x[i : i + 1], t) for i, one in enumerate(each)]
        torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-6, atol=1e-6, msg=method)
        two = make(prior, seen).rows(torch.tensor([3, 1])).x0(x[[3, 1]], t)
        torch.testing.assert_close(two, whole[[3, 1]], rtol=1e-6, atol=1e-6, msg=method)
    if name in ("mask", "down-sampling"):
        whole = ddrm(prior, seen, (B, D), 4, seed=0, start=ss.Start(dtype=F64)).x
        for i, one in enumerate(each):
            part = ddrm(prior, one, (1, D), 4, seed=ss.Noise(0, offset=i), start=ss.Start(dtype=F64)).x
            torch.testing.assert_close(part, whole[i : i + 1], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="must be one measurement"):
        posterior(prior, seen)


def test_masks_of_each_sample_take_a_std_of_each_entry() -> None:
    mask = Mask(torch.tensor([[True, False, True, True], [False, True, False, False]]), (D,))
    field = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)  # std of each site
    seen = Measurement(mask, rand(2, 3), mask(field.expand(2, D)))
    x = rand(2, D, seed=7)
    one = Measurement(Mask(torch.tensor([False, True, False, False])), seen.y[1:, :1], 0.2)
    torch.testing.assert_close(seen.log_prob(x)[1:], one.log_prob(x[1:]))
    torch.testing.assert_close(MMPS(mixture(), seen).x0(x, 0.4)[1:], MMPS(mixture(), one).x0(x[1:], 0.4))


# Several measurements.


def test_several_measurements_are_one_after_another() -> None:
    prior = mixture()
    parts = [
        Measurement(OPERATORS["mask"], rand(1, 3, seed=3), 0.4),
        Measurement(OPERATORS["blur"], rand(1, D, seed=4), stds(OPERATORS["blur"])),
        Measurement(OPERATORS["matrix"], rand(1, 3, seed=5), cov=covariance(3, 5)),
    ]
    x, t = rand(9, D, seed=5), 0.4
    chain = prior
    for part in parts:
        chain = posterior(chain, part)
    torch.testing.assert_close(posterior(prior, parts).log_prob(x), chain.log_prob(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(stack(parts).log_prob(x), sum(part.log_prob(x) for part in parts))
    gauss = mixture(1)
    torch.testing.assert_close(MMPS(gauss, parts, 8).x0(x, t), posterior(gauss, parts).x0(x, t), rtol=1e-6, atol=1e-6)
    for k in (2, 3):
        for make in METHODS.values():
            assert make(prior, parts[:k]).x0(x, t).isfinite().all()
        for sampler in (ddrm, daps, red_diff, twisted_smc):
            assert sampler(prior, parts[:k], (4, D), 4, seed=0).x.isfinite().all()
    assert isinstance(stack([parts[0], parts[0]]).std, float), "equal numbers stay a number"


def test_several_measurements_follow_the_samples() -> None:
    mask = Mask(torch.arange(5 * D).reshape(5, D) % torch.tensor([2, 3, 4, 2, 5])[:, None] == 0, (D,))
    both = [
        Measurement(mask, rand(5, *mask.out), 0.3),
        Measurement(OPERATORS["matrix"], rand(1, 3), stds(OPERATORS["matrix"])),
    ]
    seen, prior, x = stack(both), mixture(), rand(5, D, seed=1)
    whole = MMPS(prior, seen, 8).x0(x, 0.4)
    for i in range(5):
        at = torch.tensor([i])
        one = stack([part.rows(at) for part in both])
        torch.testing.assert_close(seen.rows(at).log_prob(x[at]), one.log_prob(x[at]))
        torch.testing.assert_close(log_evidence(prior, seen)[at], log_evidence(prior, one))
        torch.testing.assert_close(posterior(mixture(1), one).x0(x[at], 0.4), MMPS(mixture(1), one, 8).x0(x[at], 0.4))
        torch.testing.assert_close(MMPS(prior, one, 8).x0(x[at], 0.4), whole[at], rtol=1e-6, atol=1e-6)


def test_simulated_measurements_have_the_noise_that_was_given() -> None:
    for name, noise in CASES[:4]:
        seen = seen_of(name, noise)
        x0 = rand(1, D, seed=7).expand(20_000, D)
        r = (seen.simulate(x0, seed=0) - seen.operator(x0)).flatten(1)
        exact = torch.distributions.MultivariateNormal(torch.zeros(r.shape[1], dtype=F64), sigma_of(seen))
        torch.manual_seed(0)
        assert ss.metrics.moments(exact.sample((20_000,)), r).max_z < 4
        torch.testing.assert_close(seen.simulate(x0[:3], seed=0), seen.simulate(x0, seed=0)[:3])


def test_errors_name_what_is_wrong() -> None:
    A, y, prior = OPERATORS["matrix"], rand(1, 3), mixture()
    zero = Measurement(A, y, torch.tensor([0.1, 0.0, 0.3]))
    assert posterior(prior, zero).mean().isfinite().all(), "the exact posterior accepts exact entries"
    for call in (lambda: MMPS(prior, zero), lambda: DDNM(prior, zero), lambda: ddrm(prior, zero, (2, D), 3)):
        with pytest.raises(ValueError, match="`std` is 0 for some entries of y and not for others"):
            call()
    with pytest.raises(ValueError, match=r"`std` must be greater than 0 for DPS.*, got 0 for some entries"):
        DPS(prior, zero)
    for std, cov in ((None, None), (0.1, torch.eye(3))):
        with pytest.raises(ValueError, match="give the noise in one way"):
            Measurement(A, y, std, cov=cov)
    with pytest.raises(ValueError, match=r"`std` of shape \(2,\) does not broadcast to the output.*\(3,\)"):
        Measurement(A, y, torch.ones(2))
    with pytest.raises(ValueError, match="`std` must not be negative, got -1"):
        Measurement(A, y, torch.tensor([0.1, -1.0, 0.3]))
    with pytest.raises(ValueError, match=r"`cov` must have shape \(3, 3\)"):
        Measurement(A, y, cov=torch.eye(2))
    with pytest.raises(ValueError, match="`cov` must be symmetric"):
        Measurement(A, y, cov=torch.eye(3) + torch.ones(3, 3).triu(1))
    with pytest.raises(ValueError, match="`cov` must be positive definite, its smallest eigenvalue"):
        Measurement(A, y, cov=torch.ones(3, 3))
    with pytest.raises(ValueError, match="at least one measurement"):
        MMPS(prior, [])
    with pytest.raises(ValueError, match="of states of one shape"):
        stack([Measurement(A, y, 0.1), Measurement(Mask(torch.tensor([True, False])), torch.zeros(1, 1), 0.1)])
    with pytest.raises(TypeError, match="`operator` must be Linear"):
        DiffPIR(prior, [Measurement(A, y, 0.1), Measurement(Operator(torch.square, (D,)), rand(1, D), 0.1)])


def test_an_entry_of_y_that_is_not_finite_needs_an_infinite_std() -> None:
    both, y = ss.inverse.Mask(torch.tensor([True, True])), torch.tensor([[0.5, torch.nan]])
    noises: list[dict[str, Tensor | float]] = [
        {"std": 0.1},
        {"std": torch.tensor([torch.inf, 0.1])},
        {"cov": torch.eye(2)},
    ]
    for noise in noises:
        with pytest.raises(ValueError, match=r"`y` is not finite in 1 entries, the first is y\[0, 1\].*std=inf"):
            Measurement(both, y, **noise)  # type: ignore[arg-type]
    assert bool(Measurement(both, y, torch.tensor([0.1, torch.inf])).log_prob(torch.zeros(1, 2)).isfinite())
