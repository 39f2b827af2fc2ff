"""Bounds lie below the density, their terms are the textbook's, and bits are counted from the bins."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from instances import SDES

import scoresde as ss

F64 = torch.float64
ROOT = torch.tensor([[1.0, 0.3], [0.0, 0.5]], dtype=F64)


def mixture(sde: ss.SDE, D: int = 2) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, ss.Noise(0).normal((4, D), 0, dtype=F64), std=0.3)


def standard_normal(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, torch.zeros(1, 2, dtype=F64), std=1.0)


# The bounds.


@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "Cosine", "EDM", "Flow", "Trig", "Shifted"])
def test_the_continuous_bound_lies_below_the_density(name: str) -> None:
    mix = mixture(SDES[name])
    x = mix.sample(64, seed=1)
    bound = ss.elbo(mix, x, monte_carlo=ss.likelihood.MonteCarlo(n_times=12, repeats=8), seed=0)
    assert bool((bound.value < mix.log_prob(x) + 5 * bound.standard_error).all()), name
    gap, error = (mix.log_prob(x) - bound.value).mean(), float(bound.standard_error.square().mean().sqrt()) / 8
    assert gap > -3 * error, "on average over the data, too"
    assert torch.allclose(bound.value, bound.reconstruction - bound.consistency - bound.prior)
    assert bound.nfe == 8 * 13


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_discrete_bound_lies_below_the_density(variance: str) -> None:
    mix = mixture(ss.Discrete(ss.processes.betas("linear", 1000)))
    x = mix.sample(64, seed=1)
    bound = ss.elbo(mix, x, variance=variance, monte_carlo=ss.likelihood.MonteCarlo(n_times=12, repeats=8), seed=0)
    assert bool((bound.value < mix.log_prob(x) + 5 * bound.standard_error).all())


def test_the_bound_of_a_gaussian_closes_as_steps_grow() -> None:
    mix = standard_normal(ss.VP())
    x = 1.5 * mix.sample(20, seed=1)
    gaps = []
    for n in (8, 32, 128):
        bound = ss.elbo(
            mix,
            x,
            grid=ss.grids.uniform_lam(mix.sde, n, t_end=1e-5),
            monte_carlo=ss.likelihood.MonteCarlo(n_times=n, repeats=1),
            seed=0,
        )
        gaps.append(mix.log_prob(x) - bound.value)
        assert bool((gaps[-1] > 0).all())
    means = [float(gap.mean()) for gap in gaps]
    assert means[0] > 3 * means[1] > 9 * means[2], "as one over the steps"
    limit = ss.elbo(mix, x, t_min=1e-6, monte_carlo=ss.likelihood.MonteCarlo(n_times=4), seed=0)
    assert (mix.log_prob(x) - limit.value).abs().max() < 5e-3


def test_importance_sampled_times_are_unbiased_and_quiet() -> None:
    sde = ss.Discrete(ss.processes.betas("cosine", 60))
    mix = mixture(sde)
    x = mix.sample(200, seed=1)
    every = ss.elbo(mix, x, monte_carlo=ss.likelihood.MonteCarlo(n_times=60, repeats=4), seed=0)
    some = ss.elbo(mix, x, monte_carlo=ss.likelihood.MonteCarlo(n_times=6, repeats=8), seed=1)
    difference = (every.value - some.value).mean()
    error = (every.standard_error.square() + some.standard_error.square()).mean().sqrt() / 200**0.5
    assert abs(float(difference)) < 4 * float(error)
    gaussian = standard_normal(ss.VP())
    found = ss.elbo(gaussian, gaussian.sample(20, seed=2), seed=0)
    assert float(found.standard_error.max()) < 2e-3, "what a Gaussian loses is known, and even in u"


def test_the_three_terms_are_those_of_the_textbook() -> None:
    """Written with betas, posterior means and variances, for one datum and many draws."""
    sde = ss.Discrete(ss.processes.betas("linear", 12, beta_start=0.02, beta_end=0.5))
    mix = mixture(sde)
    x = mix.sample(1, seed=1).expand(4000, 2)
    found = {
        kind: ss.elbo(mix, x, variance=kind, monte_carlo=ss.likelihood.MonteCarlo(repeats=1), seed=0)
        for kind in ("small", "large")
    }
    for kind, bound in found.items():
        total = torch.zeros((), dtype=F64)
        for t in range(2, 13):
            x_t = sde.q_sample(x, t, ss.Noise(5).like(x, t))
            d = mix.x0(x_t, float(t))
            apart = (sde.posterior_mean(x_t, x, t) - sde.posterior_mean(x_t, d, t)).square().sum(1)
            v, w = sde.posterior_variance(t), sde.posterior_variance(t) if kind == "small" else sde.beta(t)
            kl = 0.5 * (2 * (v / w - 1 + math.log(w / v)) + apart / w)  # type: ignore[arg-type, operator]
            total = total + kl.mean()
        scatter = float(bound.consistency.std()) / 4000**0.5
        assert abs(float(bound.consistency.mean() - total)) < 6 * scatter, kind
    a = float(sde.alpha_bar(12))
    prior = 0.5 * (2 * (1 - a - 1 - math.log(1 - a)) + a * x[0].square().sum())
    assert torch.allclose(found["small"].prior[0], prior)
    rho2 = (1 - sde.alpha_bar(1)) / sde.alpha_bar(1)
    x_1 = sde.q_sample(x, 1, ss.Noise(6).like(x, 0))
    decoder = torch.distributions.Normal(mix.x0(x_1, 1.0), rho2**0.5).log_prob(x).sum(1)
    assert abs(float((found["small"].reconstruction - decoder).mean())) < 6 * float(decoder.std()) / 4000**0.5


def test_learned_variances_run_from_small_to_large() -> None:
    sde = ss.Discrete(ss.processes.betas("linear", 20, beta_start=0.01, beta_end=0.3))
    mix = ss.GaussianMixture(sde, [[[-0.5]], [[0.5]]], std=0.3)
    x = mix.sample(256, seed=1)
    for share, kind in ((-1.0, "small"), (1.0, "large")):
        net = lambda x, t, s=share: torch.cat([mix.x0(x, t.double() + 1), torch.full_like(x, s)], dim=1)  # noqa: E731
        model = ss.Denoiser(net, sde, predicts="x0", learned_variance=True)
        learned, fixed = (ss.elbo(m, x, variance=v, seed=0) for m, v in ((model, "learned"), (mix, kind)))
        z = (learned.value - fixed.value).sum() / (learned.standard_error**2 + fixed.standard_error**2).sum().sqrt()
        assert abs(float(z)) < 4, kind
    with pytest.raises(ValueError, match="predicts no variance; make the denoiser with `learned_variance`=True"):
        ss.elbo(mix, x, variance="learned")


def test_a_bound_has_its_seed_its_scale_and_its_gradient() -> None:
    mix = mixture(ss.VP())
    x = mix.sample(6, seed=1)
    few: dict[str, Any] = {"monte_carlo": ss.likelihood.MonteCarlo(n_times=4), "seed": 3}
    whole = ss.elbo(mix, x, **few)
    assert torch.equal(whole.value, ss.elbo(mix, x, **few).value)
    part = ss.elbo(mix, x[2:], monte_carlo=ss.likelihood.MonteCarlo(n_times=4), seed=ss.Noise(3, offset=2))
    assert torch.allclose(part.value, whole.value[2:], atol=1e-10)
    scale = ss.data.Standardize(torch.full((2,), 5.0, dtype=F64), torch.full((2,), 3.0, dtype=F64))
    assert torch.allclose(ss.elbo(mix, 5 + 3 * x, scale=scale, **few).value, whole.value - 2 * math.log(3), atol=1e-9)
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ss.elbo(mix, y, grad="full", **few).value.sum(), y)
    step = torch.zeros_like(x)
    step[0, 0] = 1e-5
    ends = [float(ss.elbo(mix, x + s * step, **few).value[0]) for s in (1, -1)]
    assert abs((ends[0] - ends[1]) / 2e-5 - float(slope[0, 0])) < 1e-4 * abs(float(slope[0, 0])) + 1e-5
    assert bool(
        ss.elbo(mix, x, monte_carlo=ss.likelihood.MonteCarlo(n_times=2, repeats=1)).standard_error.isnan().all()
    )


# Bits.


def test_the_mass_of_bins_is_a_probability() -> None:
    """Data of two values out of eight, each half of the time."""
    sde = ss.Discrete(ss.processes.betas("linear", 100, beta_end=0.2))
    middles = ss.data.dequantize(torch.arange(8)[:, None], 8, middle=True, dtype=F64)
    data = ss.denoisers.Empirical(sde, middles[[2, 5]])
    bound = ss.elbo(
        data,
        middles,
        bins=ss.likelihood.Bins(levels=8),
        monte_carlo=ss.likelihood.MonteCarlo(n_times=30, repeats=24),
        seed=0,
    )
    mass = bound.value.exp()
    assert bool((bound.reconstruction <= 0).all()) and float(mass[[0, 1, 3, 4, 6, 7]].sum()) < 1e-6
    assert bool(((bound.value[[2, 5]] - math.log(0.5)).abs() < 5 * bound.standard_error[[2, 5]] + 0.02).all())
    assert float(bound.standard_error[[2, 5]].max()) < 0.4
    with pytest.raises(ValueError, match="must lie on the middles of 8 bins"):
        ss.elbo(data, middles + 0.03, bins=ss.likelihood.Bins(levels=8))


def test_the_offset_is_that_of_the_bins() -> None:
    assert float(ss.likelihood.bits_from_nats(torch.zeros(()), 3072, 256)) == 7.0
    assert float(ss.likelihood.bits_from_nats(torch.zeros(()), 5, 256, (0.0, 1.0))) == 8.0
    assert float(ss.likelihood.bits_from_nats(torch.zeros(()), 5, 32, (-1.0, 1.0))) == 4.0
    assert float(ss.likelihood.bits_from_nats(torch.tensor(-6 * math.log(2.0)), 6, density=False)) == pytest.approx(1.0)
    # uniform integers are worth log₂ levels bits on any scale
    for low, high in ((-1.0, 1.0), (0.0, 255.0), (-3.0, 5.0)):
        nats = torch.full((1,), -4 * math.log(high - low))
        assert float(ss.likelihood.bits_from_nats(nats, 4, 16, (low, high))) == pytest.approx(4.0, abs=1e-6)


def test_dequantisation_fills_the_bins_and_bounds_the_truth() -> None:
    images = torch.arange(16).reshape(4, 4)
    x = torch.stack([ss.data.dequantize(images, 16, (-1.0, 1.0), seed=1, draw=k, dtype=F64) for k in range(50)])
    assert torch.equal(((x + 1) * 8).floor().long(), images.expand(50, 4, 4))
    assert torch.allclose(ss.data.dequantize(images, 16, middle=True, dtype=F64), (images.to(F64) + 0.5) / 8 - 1)
    normal = torch.distributions.Normal(0.0, 0.3)
    log_density = lambda x: normal.log_prob(x).sum(1)  # noqa: E731
    mass = (normal.cdf((images + 1) / 8 - 1.0) - normal.cdf(images / 8 - 1.0)).double()
    truth = -mass.log2().mean(1)
    loose = torch.stack(
        [ss.likelihood.dequantized_bits(log_density, images, 16, seed=s, dtype=F64)[0] for s in range(30)]
    ).mean(0)
    bits, error = ss.likelihood.dequantized_bits(log_density, images, 16, n=400, seed=0, dtype=F64)
    assert bool(((bits - truth).abs() < 5 * error + 1e-3).all())
    assert bool((loose > truth - 1e-3).all()) and float((loose - truth).max()) > 0.05, "one point is a bound"


# Two models.


def test_denoisers_are_compared_over_time() -> None:
    mix = mixture(ss.VP())
    x = mix.sample(300, seed=1)
    off = ss.Denoiser(lambda x, t: mix.eps(x, t.double()) + 0.1, ss.VP(), predicts="eps")
    found = ss.likelihood.denoiser_error(off, mix, x, [0.1, 0.5, 0.9], seed=0)
    assert torch.allclose(found.value, torch.full((3,), 0.01, dtype=F64), atol=1e-6) and found.nfe == 3
    assert float(found.standard_error.max()) < 1e-6, "times are told in float32"
    assert float(ss.likelihood.denoiser_error(mix, mix, x, [0.5]).value) == 0
    in_x0 = ss.likelihood.denoiser_error(off, mix, x, [0.5], prediction="x0", seed=0).value
    assert torch.allclose(
        in_x0, 0.01 * torch.tensor([ss.VP().sigma(0.5) / ss.VP().alpha(0.5)]).double() ** 2, rtol=1e-5
    )
    with pytest.raises(ValueError, match="the models have different processes"):
        ss.likelihood.denoiser_error(mix, mixture(ss.Flow()), x, [0.5])


def test_path_entropy_is_girsanovs() -> None:
    """Noise predictions a constant δ apart: KL = ∫ D δ² dλ; and the clock does not matter."""
    for sde in (ss.VP(), ss.EDM(), ss.Trig()):
        mix = mixture(sde)
        x = mix.sample(64, seed=1)
        off = ss.Denoiser(lambda x, t, m=mix: m.x0(x, t) + 0.1, sde, predicts="x0")
        t_min = sde.t_of_lam(1.0)
        found = ss.likelihood.path_kl(mix, off, x, t_min=t_min, n_times=64, seed=0)
        lam = torch.linspace(max(sde.lam(sde.T), -12.0), 1.0, 4001, dtype=F64)
        exact = torch.trapezoid((2 * lam).exp() * 2 * 0.01, lam)
        assert abs(float(found.value - exact)) < 5e-3 * float(exact), sde
    twice = ss.likelihood.path_kl(mix, off, x, t_min=t_min, n_times=64, seed=0, eta=2.0)
    assert torch.allclose(twice.value, 25 / 16 * found.value)


# Between data.


def test_interpolation_goes_round_the_sphere_between_the_data() -> None:
    mix = standard_normal(ss.VP())
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=F64), torch.tensor([[0.0, 1.0], [2.0, 0.0]], dtype=F64)
    path = ss.sampling.interpolate(mix, a, b, 3, steps=40)
    assert path.shape == (3, 2, 2)
    assert (path[0] - a).abs().max() < 2e-3 and (path[-1] - b).abs().max() < 2e-3
    half = math.sqrt(0.5)
    middle = torch.tensor([[half, half], [2 * half, 2 * half]], dtype=F64)
    assert (path[1] - middle).abs().max() < 2e-3, "the flow of a standard normal is the identity"


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, 3.0])
def test_slerp_is_the_great_circle_at_any_angle(angle: float) -> None:
    a = torch.tensor([[2.0, 0.0]], dtype=F64)
    b = torch.tensor([[2 * math.cos(angle), 2 * math.sin(angle)]], dtype=F64)
    for w in (0.0, 0.25, torch.tensor([1.0])):
        at = float(w) * angle
        expected = torch.tensor([[2 * math.cos(at), 2 * math.sin(at)]], dtype=F64)
        assert torch.allclose(ss.sampling.slerp(a, b, w), expected, rtol=0, atol=1e-12)


# The door.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variance": "large"}, "`variance`='large' needs a grid"),
        ({"grid": "steps"}, "`grid` must be one of 'continuous', got 'steps'"),
        ({"grid": "continuous", "variance": "large"}, "`variance`='large' needs a grid"),
        ({"grid": [1.0, 0.5, 0.0]}, "from T = 1 to a positive time"),
        ({"grid": [0.9, 0.5]}, "from T = 1 to a positive time"),
        ({"grid": [1.0, 0.5], "t_min": 0.1}, "`t_min` is for continuous time"),
        ({"grid": [1.0, 0.5], "variance": "huge"}, "`variance` must be one of"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    mix = mixture(ss.VP())
    with pytest.raises(ValueError, match=message):
        ss.elbo(mix, torch.zeros(2, 2, dtype=F64), **options)


def test_draws_and_bins_are_checked() -> None:
    with pytest.raises(ValueError, match="`n_times` must be at least 1"):
        ss.likelihood.MonteCarlo(n_times=0)
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        ss.likelihood.MonteCarlo(repeats=0)
    with pytest.raises(ValueError, match="`levels` must be at least 1"):
        ss.likelihood.Bins(0)
    with pytest.raises(ValueError, match="low < high"):
        ss.likelihood.bits_from_nats(torch.zeros(1), 3, 256, (1.0, -1.0))
    with pytest.raises(TypeError, match="tensor of integers"):
        ss.data.dequantize(torch.zeros(2, 3), 256)
    with pytest.raises(ValueError, match=r"must lie in 0 … 3, got 0 … 4"):
        ss.data.dequantize(torch.arange(5)[None], 4)
