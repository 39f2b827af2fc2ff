"""Log-densities against exact ones: on every process, with every trace, alone and in company."""

from __future__ import annotations

import math
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from instances import SDES
from per_sample import MODELS, X
from torch import Tensor, distributed, nn

import scoresde as ss
from scoresde._numerics import legendre
from scoresde.denoisers.base import Counter
from scoresde.denoisers.distributed import unwrap_ddp
from scoresde.likelihood import FlowDensity, Probes, Tolerance
from scoresde.likelihood.flow import RelativeFlow
from scoresde.likelihood.trace import AUTODIFF, jacobian_products

F64 = torch.float64
TIGHT = Tolerance(rtol=1e-7, atol=1e-7)
CLOSE = Tolerance(rtol=1e-6, atol=1e-6)
DOUBLE = ss.Start(dtype=F64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return ss.Noise(seed).normal(shape, 0, dtype=F64)


def mixture(D: int, sde: ss.SDE, std: float = 0.3, K: int = 6) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, normal(K, D), weights=[1.0 + k for k in range(K)], std=std)


def own_error(mix: ss.GaussianMixture, found: ss.LogProb, x: Tensor) -> Tensor:
    """What is wrong beside the prior, whose error at T is known here."""
    return found.value + mix.log_prob(found.latent, mix.sde.T) - found.prior - mix.log_prob(x)


FLOW2, FLOW32 = mixture(2, ss.Flow()), mixture(32, ss.Flow())
X2, X32 = FLOW2.sample(16, seed=1), FLOW32.sample(12, seed=1)


# The value.


@pytest.mark.parametrize("D", [2, 32])
@pytest.mark.parametrize("std", [0.3, 0.1])
def test_exact_traces_give_mixtures_to_a_ten_thousandth_of_a_nat(D: int, std: float) -> None:
    mix = mixture(D, ss.Flow(), std)  # whose prior is exact: α(T) = 0
    x = torch.cat([mix.sample(3, seed=1), mix.sample(2, seed=3) + 0.05 * normal(2, D, seed=5)])
    found = ss.log_prob(mix, x, tolerance=TIGHT)
    assert (found.value - mix.log_prob(x)).abs().max() < 1e-4
    assert bool((found.standard_error == 0).all())


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "Cosine", "EDM", "Trig", "Discrete", "Shifted", "two functions"])
def test_every_process_gives_the_same_density_once_the_prior_is_set_right(name: str) -> None:
    mix = FLOW2.under(SDES[name])
    found = ss.log_prob(mix, X2[:3], tolerance=CLOSE)
    bound = 1e-4 if name != "two functions" else 2e-3  # whose σ(t_min) is large: the leg below is of fourth order in it
    assert own_error(mix, found, X2[:3]).abs().max() < bound, name


def test_the_same_denoiser_on_other_processes_gives_the_same_density() -> None:
    home = ss.log_prob(FLOW2, X2[:4], tolerance=CLOSE).value
    for sde in (ss.VP(), ss.VE(), ss.EDM(), ss.Trig()):
        model = ss.denoisers.Rescheduled(FLOW2, sde)
        found = ss.log_prob(model, X2[:4], tolerance=CLOSE)
        shift = FLOW2.under(sde).log_prob(found.latent, sde.T) - found.prior
        assert (found.value + shift - home).abs().max() < 2e-5, sde


def test_densities_integrate_to_one() -> None:
    mix = ss.GaussianMixture(ss.Flow(), [[-1.0], [0.5]], weights=[1, 2], std=[0.2, 0.4])
    grid = torch.linspace(-4, 4, 321, dtype=F64)[:, None]
    value = ss.log_prob(mix, grid, tolerance=CLOSE).value
    assert abs(float(torch.trapezoid(value.exp(), grid[:, 0])) - 1) < 1e-4


def test_a_gaussian_at_rest_costs_next_to_nothing_and_is_exact() -> None:
    cov = torch.diag(torch.tensor([0.5, 2.0, 1.0], dtype=F64)) + 0.2
    for gauss in (
        ss.GaussianMixture(ss.VP(), normal(1, 3), cov=cov[None]),
        ss.GaussianMixture(ss.VP(), normal(1, 3), factor=normal(1, 3, 1), std=0.4),
        ss.GaussianMixture(ss.VP(), normal(1, 3), std=normal(1, 3, seed=4).abs() + 0.1),
    ):
        x = gauss.sample(5, seed=0)
        found = ss.log_prob(gauss, x, reference=gauss, tolerance=Tolerance(steps=1))
        assert (found.value - gauss.log_prob(x)).abs().max() < 1e-9
        assert int(found.nfe.max()) == 1 + 7 + 4


def test_a_reference_sets_the_prior_right() -> None:
    mix = mixture(8, ss.EDM())
    x = mix.sample(6, seed=1)
    fit = ss.GaussianMixture(mix.sde, mix.mean()[None], cov=mix.covariance()[None])
    gap = []
    for reference in (None, fit):
        found = ss.log_prob(mix, x, reference=reference, tolerance=CLOSE)
        assert own_error(mix, found, x).abs().max() < 2e-4
        gap.append(float((found.prior - mix.log_prob(found.latent, mix.sde.T)).abs().max()))
    assert gap[1] < gap[0] / 100


def test_the_end_at_t_min_is_corrected_or_left() -> None:
    mix, t = mixture(2, ss.VP(), std=0.2), 0.007
    truncated = mix.log_prob(X2, t) - mix.log_prob(X2)
    found = ss.log_prob(mix, X2, t_min=t, tolerance=TIGHT)
    error = own_error(mix, found, X2).abs().max()
    assert error < truncated.abs().max() / 20, "it matters, and the last leg takes it out"
    assert found.truncation.abs().max() > error
    finer = own_error(mix, ss.log_prob(mix, X2, t_min=t / 4, tolerance=TIGHT), X2).abs().max()
    assert finer < error / 8, "the faster the earlier"
    noised = mix.sample(6, t, seed=3)
    left = ss.log_prob(mix, noised, t_min=t, to_zero=False, tolerance=TIGHT)
    exact = mix.log_prob(noised, t) - mix.log_prob(left.latent, 1.0) + left.prior
    assert (left.value - exact).abs().max() < 1e-5 and bool((left.truncation == 0).all())


def test_the_default_smallest_time_leaves_little_in_the_tails() -> None:
    mix, away = mixture(2, ss.VP(), std=0.1), normal(4, 2, seed=5)
    x = mix.sample(4, seed=3) + 0.6 * away / away.norm(dim=1, keepdim=True)
    error = own_error(mix, ss.log_prob(mix, x, tolerance=CLOSE), x).abs().max()
    coarse = own_error(mix, ss.log_prob(mix, x, t_min=mix.sde.t_min, tolerance=CLOSE), x).abs().max()
    assert coarse > 5 * error, "the process's own t_min leaves more"


def test_a_network_is_evaluated_where_it_was_trained() -> None:
    times = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        times.append(float(t.min()))
        return FLOW2.x0(x, t)

    ss.log_prob(ss.Denoiser(net, ss.Flow(), predicts="x0"), X2[:2])
    assert min(times) >= ss.Flow().t_min * (1 - 1e-6)


@pytest.mark.parametrize(("D", "std", "far"), [(2, 0.3, 1.2), (2, 0.1, 0.6), (32, 0.3, 1.2)])
def test_the_log_density_is_right_in_the_tails(D: int, std: float, far: float) -> None:
    """Errors of the state count there by the score, which is large, and one of the 32-D flows is narrow inside a step.

    Without the correction by the score the errors are up to 1e-3, and without the defect in the middle up to 1e-2.
    """
    mix = ss.GaussianMixture(ss.VP(), normal(6, D), std=std)
    away = normal(12, D, seed=5)
    x = mix.sample(12, seed=1) + far * away / away.norm(dim=1, keepdim=True)
    assert own_error(mix, ss.log_prob(mix, x), x).abs().max() < 1e-4


def test_the_density_changes_along_any_path_as_its_score_says() -> None:
    """Along a path that is no solution at all, the integral is the exact difference of two log-densities."""
    mix = mixture(3, ss.VP())
    cov = torch.diag(torch.tensor([0.5, 2.0, 1.0], dtype=F64)) + 0.2
    y, away = normal(4, 3, seed=1), normal(4, 3, seed=2)
    for gaussian in (
        ss.Gaussian(mix.sde, torch.zeros(3), torch.ones(3, dtype=F64)),
        ss.Gaussian.of(mix.sde, mix.mean(), cov),
    ):
        flow = RelativeFlow.make(mix, Counter(), gaussian, y, 0.1, 0.7)
        exact = Probes().draw(y, ss.Noise(0))

        def log_q(c: float, y: Tensor, flow: RelativeFlow = flow) -> Tensor:
            at = flow.at(c, y)
            t = float(flow.time(torch.tensor([c], dtype=F64)))
            return mix.log_prob(at.state(y), t) + at.log_det()

        nodes, weights = (v.tolist() for v in legendre(32))
        span = flow.last - flow.first
        total = torch.zeros(4, dtype=F64)
        for u, weight in zip(nodes, weights, strict=True):
            c = torch.full((4,), flow.first + u * span, dtype=F64)
            here = flow.trace(y + u**2 * away, c, exact)
            total = total + weight * span * here.along(2 * u * away / span)[0]
        difference = log_q(flow.first, y) - log_q(flow.last, y + away)
        assert torch.allclose(total, difference, rtol=0, atol=1e-8)


@pytest.mark.parametrize("predicts", ["x0", "velocity"])
def test_a_network_whose_score_is_no_gradient_has_the_density_of_its_own_flow(predicts: str) -> None:
    """An error of x0 that does not vanish with the noise is divided by σ² in the score: with it, 2 nats were wrong."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)

    def net(x: Tensor, t: Tensor) -> Tensor:
        t = t.to(x)[:, None]
        x0, error = FLOW2.x0(x, t[:, 0]), 0.05 * (x @ turn).tanh()
        return x0 + error if predicts == "x0" else (x - x0) / t + error

    model = ss.Denoiser(net, ss.Flow(), predicts=predicts)
    truth, found = (ss.log_prob(model, X2[:3], tolerance=Tolerance(rtol=tol, atol=tol)).value for tol in (1e-7, 1e-4))
    assert (found - truth).abs().max() < 2e-3


def test_a_scale_adds_its_log_determinant() -> None:
    x = 5 + 3 * X2
    scale = ss.data.Standardize(torch.full((2,), 5.0, dtype=F64), torch.full((2,), 3.0, dtype=F64))
    eight = Tolerance(steps=8)
    plain, scaled = ss.log_prob(FLOW2, X2, tolerance=eight), ss.log_prob(FLOW2, x, scale=scale, tolerance=eight)
    assert torch.allclose(scaled.value, plain.value - 2 * math.log(3), rtol=0, atol=1e-9)
    solution = ss.solve(FLOW2, (4, 2), FlowDensity(tolerance=eight, scale=scale), seed=0, start=DOUBLE)
    drawn, density = solution.x, solution.log_prob
    assert torch.allclose(
        density.value, ss.log_prob(FLOW2, drawn, scale=scale, tolerance=TIGHT).value, rtol=0, atol=5e-3
    )


def test_samples_come_with_the_density_that_is_found_for_them() -> None:
    for D, model in ((2, FLOW2), (32, FLOW32)):
        solution = ss.solve(model, (3, D), FlowDensity(tolerance=TIGHT), seed=3, start=DOUBLE)
        x, found = solution.x, solution.log_prob
        assert (found.value - model.log_prob(x)).abs().max() < 1e-4
        assert torch.equal(found.latent, ss.Noise(3).fork(0).normal((3, D), 0, dtype=F64)), "the start of ss.sample"
        again = ss.sample(model, found.latent, FlowDensity(Probes("hutchinson", n=1), TIGHT))
        assert torch.allclose(again, x, atol=1e-9)


def test_flow_density_follows_start_and_end() -> None:
    mix, t = mixture(2, ss.VP()), 0.05
    found = ss.solve(mix, (4, 2), FlowDensity(tolerance=TIGHT), t_end=t, seed=1, start=DOUBLE)
    again = ss.log_prob(mix, found.x, t_min=t, to_zero=False, tolerance=TIGHT)
    assert torch.allclose(found.log_prob.value, again.value, rtol=0, atol=1e-5)
    assert bool((found.log_prob.truncation == 0).all()) and found.times == [1.0, t]
    wide = ss.solve(mix, (4, 2), FlowDensity(), seed=1, start=ss.Start(data_std=3.0, dtype=F64))
    deviation = math.hypot(3 * mix.sde.alpha(1.0), mix.sde.sigma(1.0))
    assert torch.allclose(wide.log_prob.latent, deviation * found.log_prob.latent / math.hypot(*scales(mix.sde)))
    gauss = ss.Gaussian.of(mix.sde, mix.mean(), mix.covariance())
    reference = ss.GaussianMixture(mix.sde, mix.mean()[None], cov=mix.covariance()[None])
    by_start = ss.solve(mix, (4, 2), FlowDensity(), seed=1, start=ss.Start(gaussian=gauss, dtype=F64))
    for same in (gauss, reference):
        density = ss.solve(mix, (4, 2), FlowDensity(reference=same), seed=1, start=DOUBLE)
        assert torch.allclose(density.x, by_start.x, rtol=0, atol=1e-12)
        assert torch.allclose(density.log_prob.value, by_start.log_prob.value, rtol=0, atol=1e-11)
    state = by_start.log_prob.latent
    assert torch.allclose(ss.sample(mix, state, FlowDensity(reference=gauss)), by_start.x, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="`data_std` has no meaning with `reference`"):
        ss.solve(mix, (4, 2), FlowDensity(reference=gauss), start=ss.Start(data_std=2.0))
    with pytest.raises(ValueError, match="`t_min` has no meaning with a `t_end`"):
        ss.solve(mix, (4, 2), FlowDensity(t_min=0.01), t_end=0.1)


def scales(sde: ss.SDE) -> tuple[float, float]:
    return sde.alpha(sde.T), sde.sigma(sde.T)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_algebra_of_a_gaussian_is_exact_to_rounding(dtype: torch.dtype) -> None:
    D, eps = 12, torch.finfo(dtype).eps
    U, c = torch.linalg.qr(normal(D, D))[0], normal(D, seed=3).square() + 1e-3
    sde, mean, event = ss.VP(), normal(3, 4, seed=2), (3, 4)
    gaussians = {
        "diagonal": ss.Gaussian(sde, mean, c.reshape(event)),
        "full": ss.Gaussian(sde, mean, c, U),
        "low rank": ss.Gaussian(sde, mean, c[:5], U[:, :5], rest=0.3),
        "component": ss.GaussianMixture(sde, mean[None], factor=(U[:, :5] * c[:5].sqrt())[None], std=0.4).component(),
    }
    alpha, sigma = torch.tensor([1.0, 0.6, 0.0], dtype=F64), torch.tensor([0.0, 0.8, 1.0], dtype=F64)
    x, z = normal(3, *event, seed=5), normal(3, *event, seed=6)
    eye = torch.eye(D, dtype=F64).reshape(D, *event)
    for name, gauss in gaussians.items():
        data = gauss.marginal(1.0, 0.0)
        root = (data.state(eye) - gauss.mean).flatten(1)
        cov = alpha[:, None, None] ** 2 * (root @ root.mT) + sigma[:, None, None] ** 2 * torch.eye(D, dtype=F64)
        marginal = gauss.to(dtype).marginal(alpha, sigma)
        truth = torch.logdet(cov) / 2
        assert (marginal.log_det().double() - truth).abs().max() < 100 * eps, name
        back = marginal.whiten(marginal.state(z.to(dtype))).double()
        assert (back - z).abs().max() < 1e4 * eps, name
        density = torch.distributions.MultivariateNormal(alpha[:, None] * mean.flatten().to(F64), cov)
        mahalanobis = marginal.whiten(x.to(dtype)).double().square().flatten(1).sum(1)
        log_p = -0.5 * mahalanobis - marginal.log_det().double() - D / 2 * math.log(2 * math.pi)
        assert ((log_p - density.log_prob(x.flatten(1))) / log_p).abs().max() < 1e4 * eps, name


def test_any_shape_any_dtype_and_no_rows() -> None:
    image = ss.GaussianMixture(ss.VP(), normal(2, 2, 3, 2), std=0.5)
    x = image.sample(3, seed=0)
    flat = ss.GaussianMixture(ss.VP(), normal(2, 2, 3, 2).flatten(1), std=0.5)
    two = Tolerance(steps=2)
    found = ss.log_prob(image, x, tolerance=two)
    assert found.latent.shape == x.shape
    assert torch.allclose(found.value, ss.log_prob(flat, x.flatten(1), tolerance=two).value, atol=1e-10)
    for chunk in (1, 5):
        chunked = ss.log_prob(image, x, probes=Probes(chunk=chunk), tolerance=two)
        assert torch.allclose(chunked.value, found.value, atol=1e-10)
    single = ss.log_prob(image, x.float(), tolerance=two)
    assert single.value.dtype == torch.float32 and (single.value - found.value).abs().max() < 1e-3
    assert ss.log_prob(image, x[:0]).value.shape == (0,)
    solution = ss.solve(FLOW2, (5, 2), FlowDensity(), seed=0)  # α(T) = 0, in float32
    drawn, density = solution.x, solution.log_prob
    assert drawn.dtype == torch.float32 and (density.value - FLOW2.log_prob(drawn)).abs().max() < 1e-2
    assert (ss.log_prob(FLOW2, drawn).value - FLOW2.log_prob(drawn)).abs().max() < 1e-2


# The trace.


@pytest.mark.parametrize("autodiff", AUTODIFF)
def test_products_and_traces_are_those_of_the_jacobian(autodiff: str) -> None:
    A = normal(6, 6, seed=5)
    f = lambda x: torch.sin(x @ A.T)  # noqa: E731
    x = normal(3, 6, seed=6)
    J = torch.stack([torch.func.jacrev(f)(row) for row in x])
    v = normal(4, 3, 6, seed=7)
    out = jacobian_products(f, x, autodiff=autodiff)(v)
    matrix = J if autodiff == "forward" else J.mT
    assert torch.allclose(out, torch.einsum("bij,kbj->kbi", matrix, v))
    trace = torch.einsum("bii->b", J)
    exact = Probes(autodiff=autodiff, chunk=2).draw(x, ss.Noise(0))
    estimates, value = exact.with_value(f, x)
    assert torch.allclose(estimates[0], trace) and torch.allclose(value, f(x))
    many = Probes("hutchinson", 6, "orthogonal", autodiff).draw(x, ss.Noise(0))
    assert torch.allclose(many(f, x).mean(0), trace), "all of a basis is the trace"
    assert many.standard_error(many(f, x)).abs().max() == 0


@pytest.mark.parametrize("how", ["rademacher", "gaussian", "orthogonal", "hutch++"])
def test_estimates_are_unbiased_and_know_their_error(how: str) -> None:
    M = normal(12, 12, seed=8)
    f = lambda x: x @ M  # noqa: E731
    x = torch.zeros(4000, 12, dtype=F64)
    probes = Probes("hutch++", 6) if how == "hutch++" else Probes("hutchinson", 6, how)
    div = probes.draw(x, ss.Noise(1))
    estimates = div(f, x)
    mean, scatter = estimates.mean(0), estimates.mean(0).std()
    assert abs(float(mean.mean() - M.trace())) < 4 * scatter / 4000**0.5
    claimed = div.standard_error(estimates).square().mean().sqrt()
    assert abs(float(claimed / scatter) - 1) < 0.1
    assert div.products(x) == 6


def test_hutch_finds_a_trace_of_low_rank() -> None:
    U = normal(20, 2, seed=9)
    f = lambda x: x @ (U @ U.T)  # noqa: E731
    x = normal(5, 20)
    div = Probes("hutch++", 9).draw(x, ss.Noise(1))
    assert torch.allclose(div(f, x), (U @ U.T).trace())


@pytest.mark.parametrize(
    "probes",
    [Probes("hutchinson", 16), Probes("hutchinson", 16, "rademacher"), Probes("hutch++", 12)],
    ids=["orthogonal", "rademacher", "hutch++"],
)
def test_probes_are_right_within_their_error(probes: Probes) -> None:
    six = Tolerance(steps=6)
    exact = ss.log_prob(FLOW32, X32, tolerance=six).value
    found = [ss.log_prob(FLOW32, X32, probes=probes, seed=seed, tolerance=six) for seed in range(4)]
    again = ss.log_prob(FLOW32, X32, probes=probes, seed=3, tolerance=six)
    assert torch.equal(found[3].value, again.value), "the same seed, the same number"
    error = torch.stack([f.value - exact for f in found])
    standard = torch.stack([f.standard_error for f in found])
    assert abs(float(error.sum())) < 3 * float(standard.square().sum().sqrt())
    if probes.kind == "hutch++":
        return  # with four directions left, each sample's own error is no more than a guess
    z = error / standard
    # Few probes have the tails of Student's t, and the traces are skewed: single seeds have a mean square up to 6.
    assert (z.abs() < 3).double().mean() > 0.9 and z.square().mean() < 3


def test_errors_fall_as_the_root_of_independent_probes_and_faster_for_orthogonal_ones() -> None:
    x = FLOW32.sample(64, seed=2)
    three = Tolerance(steps=3)
    exact = ss.log_prob(FLOW32, x, tolerance=three).value
    rms: dict[tuple[str, int], float] = {}
    for kind in ("rademacher", "orthogonal"):
        for n in (4, 16):
            how = Probes("hutchinson", n, kind)
            runs = [ss.log_prob(FLOW32, x, probes=how, seed=seed, tolerance=three).value for seed in range(4)]
            rms[kind, n] = float((torch.stack(runs) - exact).square().mean().sqrt())
    assert 1.6 < rms["rademacher", 4] / rms["rademacher", 16] < 2.5
    expected = 2 * math.sqrt((1 - 4 / 32) / (1 - 16 / 32))
    assert 0.8 * expected < rms["orthogonal", 4] / rms["orthogonal", 16] < 1.25 * expected
    single = ss.log_prob(FLOW32, X32[:2], probes=Probes("hutchinson", 1), seed=0, tolerance=Tolerance(steps=2))
    assert bool(single.standard_error.isnan().all()), "one probe cannot tell"


def test_probes_belong_to_samples() -> None:
    options: dict[str, Any] = {"probes": Probes("hutchinson", 3), "tolerance": Tolerance(rtol=1e-4, atol=1e-4)}
    whole = ss.log_prob(FLOW32, X32[:5], seed=7, **options).value
    parts = [ss.log_prob(FLOW32, X32[2:5], seed=ss.Noise(7, offset=2), **options).value]
    assert torch.allclose(torch.cat(parts), whole[2:], rtol=0, atol=1e-9)


# The steps.


def test_a_hard_sample_changes_no_other_and_costs_them_nothing() -> None:
    easy, hard = X2[:8], torch.tensor([[3.0, -2.5]], dtype=F64)
    mix = mixture(2, ss.Flow(), std=0.05)
    together = ss.log_prob(mix, torch.cat([easy, hard]))
    apart = [ss.log_prob(mix, x) for x in (easy, hard)]
    for name in ("value", "nfe", "products"):
        rows = torch.cat([getattr(found, name) for found in apart])
        assert torch.allclose(getattr(together, name).double(), rows.double(), rtol=0, atol=1e-8), name
    assert len(set(together.nfe.tolist())) > 1, "each took its own steps"


class Counting(ss.denoisers.AbstractDenoiser):
    """Counts rows that were evaluated; a product with the Jacobian is not one."""

    def __init__(self, model: ss.denoisers.AbstractDenoiser) -> None:
        super().__init__(model.sde)
        self.model, self.sizes = model, list[int]()

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        self.sizes.append(len(x))
        return self.model.x0(x, t)


def test_the_cost_is_counted() -> None:
    for options in (
        {"tolerance": Tolerance(rtol=1e-4, atol=1e-4)},
        {"tolerance": Tolerance(steps=3)},
        {"tolerance": Tolerance(steps=3), "to_zero": False},
        {"tolerance": Tolerance(steps=3), "probes": Probes("hutchinson", 2, "rademacher", "loop")},
    ):
        model = Counting(FLOW2)
        found = ss.log_prob(model, X2, **options)
        assert int(found.nfe.sum()) == sum(model.sizes)
        assert bool((found.products == 2 * (found.products // 2)).all())
    model = Counting(FLOW2)
    found = ss.solve(model, X2, FlowDensity(tolerance=Tolerance(rtol=1e-4, atol=1e-4)))
    assert int(found.log_prob.nfe.sum()) == sum(model.sizes) and found.calls == len(model.sizes)
    assert found.nfe == math.ceil(sum(model.sizes) / 16) and bool(found.stats.finished.all())


def test_both_evaluations_of_guidance_are_counted() -> None:
    sizes: list[int] = []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        sizes.append(len(x))
        return FLOW2.x0(x, t.to(x)) + 0.1 * label[:, None]

    model = ss.Denoiser(net, ss.Flow(), predicts="x0")
    guided = ss.ClassifierFree(model, torch.tensor([1.5, 2.0], dtype=F64), null={"label": 0.0})
    for autodiff in AUTODIFF:
        sizes.clear()
        found = ss.log_prob(
            guided.given(label=torch.tensor([1.0, -1.0])),
            X2[:2],
            probes=Probes(autodiff=autodiff),
            tolerance=Tolerance(steps=2),
        )
        assert found.nfe.tolist() == [2 * (1 + 13 + 8)] * 2
        assert autodiff == "forward" or sum(sizes) == int(found.nfe.sum())


def test_tolerances_and_steps_are_kept_to() -> None:
    errors = [
        float(own_error(FLOW32, ss.log_prob(FLOW32, X32, tolerance=Tolerance(rtol=tol, atol=tol)), X32).abs().max())
        for tol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    steps = [
        float((ss.log_prob(FLOW2, X2, tolerance=Tolerance(steps=n)).value - FLOW2.log_prob(X2)).abs().max())
        for n in (6, 12, 24)
    ]
    assert steps[0] > 8 * steps[1] > 64 * steps[2], "of order four or better"


@pytest.mark.parametrize("probes", ["exact", "hutchinson", Probes("hutchinson", 2, "rademacher", "forward")], ids=str)
def test_equal_steps_read_nothing_back(probes: Probes | str) -> None:
    net = nn.Linear(4, 4, device="meta")  # a device without numbers: to read one raises an error
    model = ss.Denoiser(lambda x, t: net(x) * t[:, None].to(x), ss.Flow(), predicts="x0")
    x, two = torch.zeros(3, 4, device="meta"), Tolerance(steps=2)
    assert ss.log_prob(model, x, probes=probes, tolerance=two, seed=0).value.shape == (3,)
    drawn = ss.sample(model, (3, 4), FlowDensity(probes, two), seed=0, start=ss.Start(device="meta"))
    assert drawn.device.type == "meta"


def test_a_solve_that_cannot_go_on_says_where() -> None:
    with pytest.raises(ss.SolverError, match=r"`max_nfe` = 30 evaluations were not enough.*Sample 0 was at t ="):
        ss.log_prob(FLOW2, X2, tolerance=Tolerance(max_nfe=30))
    broken = ss.Denoiser(lambda x, t: x / (t[:, None] < 0.5).to(x), ss.Flow(), predicts="x0")
    with pytest.raises(ss.SolverError, match=r"The slopes are not finite.*Sample \d+ was at t = 0\..*not finite"):
        ss.log_prob(broken, X2)


# Derivatives.


@pytest.mark.parametrize(
    ("autodiff", "tolerance"), [*((how, Tolerance(steps=2)) for how in AUTODIFF), ("reverse", TIGHT)]
)
def test_the_density_is_differentiable_in_data_and_parameters(autodiff: str, tolerance: Tolerance) -> None:
    net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2)).to(F64)
    for i, p in enumerate(net.parameters()):
        p.data = 0.3 * normal(*p.shape, seed=i)
    model = ss.Denoiser(lambda x, t: FLOW2.x0(x, t) + 0.1 * t[:, None] * net(x), ss.Flow(), predicts="x0")
    x = X2[:2].clone().requires_grad_()
    weight = next(net.parameters())
    how: dict[str, Any] = {"probes": Probes(autodiff=autodiff), "tolerance": tolerance}
    value = ss.log_prob(model, x, grad="full", **how).value
    assert not ss.log_prob(model, x, tolerance=Tolerance(steps=1)).value.requires_grad
    by_x, by_weight = torch.autograd.grad(value.sum(), [x, weight])
    h = 1e-5 if tolerance.steps else 1e-3  # steps that are chosen change with the data, within the tolerance
    for tensor, slope in ((x, by_x), (weight, by_weight)):
        with torch.no_grad():
            for index in ((0, 0), (1, 1)):
                old, ends = float(tensor[index]), []
                for side in (h, -h):
                    tensor[index] = old + side
                    ends.append(float(ss.log_prob(model, x, **how).value.sum()))
                tensor[index] = old
                assert abs((ends[0] - ends[1]) / (2 * h) - float(slope[index])) < (1e-6 if tolerance.steps else 1e-3)


# Several ranks.


class Net(nn.Module):
    """Has a buffer, which a wrapped forward pass waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(2, dtype=F64))
        self.register_buffer("scale", torch.ones(1, dtype=F64))
        self.mix = ss.GaussianMixture(ss.Flow(), [[-1.0, 0.0], [1.0, 0.5]], std=0.1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.mix.x0(x, t.double()) * self.w * self.scale
        return out


def on_rank(rank: int, store: str) -> None:
    wait = timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=wait)
    try:
        model = ss.Denoiser(nn.parallel.DistributedDataParallel(Net()), ss.Flow(), predicts="x0")
        x = torch.full((1, 2), 0.1 if rank else 3.0, dtype=F64)
        found = ss.log_prob(model, x)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
        distributed.all_gather(counts, found.nfe)
        assert counts[0] != counts[1], "they took different numbers of steps"
        model.x0(x, 0.5)  # the wrapper is still there, and the ranks are still in step
    finally:
        distributed.destroy_process_group()


def test_ranks_with_different_numbers_of_steps_do_not_wait_for_each_other(tmp_path: Path) -> None:
    store, here = str(tmp_path / "store"), Path(__file__).parent
    paths = [str(here), str(here.parent)]
    code = f"import sys; sys.path[:0] = {paths!r}; import test_flow as t; t.on_rank(1, {store!r})"
    other = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    try:
        on_rank(0, store)
        assert other.wait(timeout=60) == 0, other.communicate()[1]
    finally:
        other.kill()
        other.communicate()


def test_a_model_that_is_not_wrapped_is_left_as_it_is() -> None:
    model = ss.Denoiser(nn.Linear(2, 2), ss.VP(), predicts="eps")
    assert unwrap_ddp(model) is model


# The door.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probes": "exakt"}, "did you mean 'exact'"),
        ({"probes": {"kind": "exakt"}}, "did you mean 'exact'"),
        ({"probes": {"kind": "hutch++", "n": 2}}, "`n` must be at least 3"),
        ({"probes": {"kind": "hutch++", "n": 9}}, "no less than an exact trace"),
        ({"probes": {"kind": "hutchinson", "distribution": "sign"}}, "`distribution` must be one of"),
        ({"probes": {"n": 4}}, "`n` has no meaning with `kind`='exact'"),
        ({"probes": {"kind": "hutch++", "distribution": "gaussian"}}, "`distribution` has no meaning"),
        ({"tolerance": {"steps": 0}}, "`steps` must be at least 1"),
        ({"tolerance": {"rtol": 0.0}}, "`rtol` must be"),
        ({"tolerance": {"rtol": 1e-3, "steps": 3}}, "`rtol` has no meaning with `steps`"),
        ({"grad": "on"}, "`grad` must be one of"),
        ({"t_min": 1.0}, "`t_min` must be"),
        ({"reference": FLOW2}, "`reference` must be one Gaussian"),
        ({"reference": ss.GaussianMixture(ss.Flow(), [[0.0, 0.0]], std=0.0)}, "positive definite"),
        ({"reference": ss.GaussianMixture(ss.Flow(), [[0.0]], std=1.0)}, "events of shape"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    def density() -> None:
        for name, group in (("probes", Probes), ("tolerance", Tolerance)):
            if isinstance(options.get(name), dict):
                options[name] = group(**options[name])
        ss.log_prob(FLOW2, X2, **options)

    with pytest.raises(ValueError, match=message.replace("+", r"\+")):
        density()


@pytest.mark.parametrize("name", MODELS)
def test_data_of_each_sample_follow_it(name: str) -> None:
    how: dict[str, Any] = {"tolerance": Tolerance(rtol=1e-4, atol=1e-4)}
    whole = ss.log_prob(MODELS[name](slice(None)), X, **how)
    assert len(set(whole.nfe.tolist())) > 1
    for i in range(len(X)):
        one = ss.log_prob(MODELS[name](slice(i, i + 1)), X[i : i + 1], **how)
        assert abs(float(one.value[0] / whole.value[i]) - 1) < 1e-12
        assert one.nfe[0] == whole.nfe[i] and one.products[0] == whole.products[i]


def test_rows_of_conditions_follow_their_samples() -> None:
    def net(x: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        return FLOW2.x0(x - (1 - t.to(x))[:, None] * shift, t.to(x)) + shift

    model = ss.Denoiser(net, ss.Flow(), predicts="x0")
    shift = normal(16, 2, seed=11)
    found = ss.log_prob(model.given(shift=shift), X2 + shift, tolerance=CLOSE)
    assert (found.value - FLOW2.log_prob(X2)).abs().max() < 1e-3, "the network gets its time in float32"
