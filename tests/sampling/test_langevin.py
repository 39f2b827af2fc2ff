"""Langevin dynamics: its bias on a Gaussian is a formula, and samples do not depend on the rest of the batch."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.noise.keyed import Noise
from scoresde.plan.run import run
from scoresde.sampling.langevin import LangevinCorrector, langevin
from scoresde.solvers.langevin import AnnealedLangevin

F64 = torch.float64
GAUSSIAN = ss.GaussianMixture(ss.VP(), torch.zeros(1, 64), std=0.5)
T = 0.3
V = (0.5 * GAUSSIAN.sde.alpha(T)) ** 2 + GAUSSIAN.sde.sigma(T) ** 2


def affine(step: float) -> tuple[float, float]:
    """The two coefficients of one step on the Gaussian, a of x and b of z, read off two runs with one seed."""
    x = GAUSSIAN.sample(3, T, seed=0)
    one, two = (langevin(GAUSSIAN, x * k, T, step, seed=1) for k in (1, 2))
    a = (two - one) / x
    b = (one - a * x) / Noise(1).like(x, 0)
    assert a.std() < 1e-9 and b.std() < 1e-9
    return float(a.mean()), float(b.mean())


@pytest.mark.parametrize("step", [0.4, 0.1, 0.01])
def test_the_bias_of_a_step_is_the_formula(step: float) -> None:
    a, b = affine(step)
    assert a == pytest.approx(1 - step / V, rel=1e-10) and b == pytest.approx(math.sqrt(2 * step), rel=1e-9)
    after = a**2 * V + b**2
    assert after - V == pytest.approx(step**2 / V, rel=1e-6)
    assert b**2 / (1 - a**2) == pytest.approx(V / (1 - step / (2 * V)), rel=1e-9), "its own stationary variance"


def test_the_marginal_is_invariant_as_the_step_vanishes() -> None:
    def bias(step: float) -> float:
        a, b = affine(step)
        return b**2 / (1 - a**2) / V - 1

    steps = [0.08, 0.04, 0.02, 0.01]
    biases = [bias(step) for step in steps]
    slopes = [math.log2(x / y) for x, y in pairwise(biases)]
    assert all(abs(slope - 1) < 0.1 for slope in slopes) and biases[-1] < 0.02


def long_run(x: Tensor, v: float, **options: Any) -> float:
    """Relative bias of the variance after a corrector has worked for long."""
    gaussian = ss.GaussianMixture(ss.VP(), torch.zeros(1, x.shape[1]), std=0.5)
    return float(LangevinCorrector(seed=2, model=gaussian, **options)(1, T, x).square().mean() / v - 1)


@pytest.mark.parametrize("D", [2, 64])
def test_the_corrector_has_the_documented_bias(D: int) -> None:
    x = math.sqrt(V) * Noise(7).normal((50_000 // D, D), 0, dtype=F64)
    se = 4 * math.sqrt(2 / x.numel())
    sigma2 = GAUSSIAN.sde.sigma(T) ** 2
    for r in (0.4, 0.1):
        step = r / 2 * sigma2
        assert abs(long_run(x, V, r=r, steps=int(4 * V / step)) - (1 / (1 - step / (2 * V)) - 1)) < se, r
    # |score|² = |x|²/V², so ε = 2 snr² V (1 + O(1/√D)): a bias of 1/(1 − snr²) and one of p/ε.
    for snr in (0.3, 0.2) if D == 64 else ():
        want = (1 + 2 / D) / (1 - snr**2) - 1
        assert abs(long_run(x, V, snr=snr, steps=int(1.5 / snr**2)) - want) < se + 0.004, snr
    if D == 2:
        assert long_run(x, V, snr=0.16) == pytest.approx(long_run(x, V, r=4 * 0.16**2)), "in few dimensions"


def test_the_corrector_keeps_a_mixture_in_the_plane() -> None:
    mix = ss.GaussianMixture(ss.VP(), [[-1.0, 0.0], [1.0, 0.0]], std=0.3)
    t = mix.sde.t_of_lam(1.0)
    start = mix.sample(20_000, t, seed=0)
    x = LangevinCorrector(seed=1, steps=100, model=mix)(1, t, start)
    truth = mix.sample(20_000, t, seed=3)
    assert float(x.abs().max()) < 1.2 * float(truth.abs().max())
    for moment in (lambda y: y.square().mean(0), lambda y: y.abs().mean(0)):
        assert torch.allclose(moment(x), moment(truth), rtol=0.04), "1/(1 − snr²), and what the draws differ by"
    far = torch.full((1, 100), 1e-9, dtype=F64)  # where the score vanishes steps are bounded too
    wide = ss.GaussianMixture(ss.VP(), torch.zeros(1, 100), std=1.0)
    assert float(LangevinCorrector(seed=0).bind(wide)(1, T, far).abs().max()) < 10


@pytest.mark.parametrize("steps", [1, 2])
def test_each_sample_has_its_own_step(steps: int) -> None:
    mix = ss.GaussianMixture(ss.VP(), Noise(3).normal((2, 50), 0), std=0.2)

    def go(n: int, offset: int) -> Tensor:
        watch = ss.Watch(hook=LangevinCorrector(0.2, steps=steps, seed=Noise(5, offset=offset)))
        start = ss.Start(dtype=F64)
        return ss.sample(mix, (n, 50), ss.DDIM(), steps=8, seed=Noise(0, offset=offset), start=start, watch=watch)

    whole = go(64, 0)
    assert torch.allclose(go(1, 63), whole[63:], rtol=0, atol=1e-12)
    assert torch.allclose(go(7, 7), whole[7:14], rtol=0, atol=1e-12)
    x = mix.sample(2, T, seed=0)
    corrector = LangevinCorrector(0.2, seed=0, model=mix)
    score, z = mix.score(x, T), Noise(0).like(x, 1)
    epsilon = 2 * (0.2 * 50**0.5 / score.norm(dim=1))[:, None] ** 2
    assert torch.allclose(corrector(1, T, x), x + epsilon * score + (2 * epsilon).sqrt() * z)


def test_the_corrector_works_after_the_predictor_and_not_at_the_ends() -> None:
    times: list[float] = []

    class Noted(ss.denoisers.AbstractDenoiser):
        def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
            times.append(float(t))
            return GAUSSIAN.x0(x, t)

    model = Noted(GAUSSIAN.sde)
    grid = ss.grids.karras(model.sde, 4).tolist()
    corrector = LangevinCorrector(seed=1, steps=2)
    solution = ss.solve(model, (2, 64), ss.DDIM(), grid=grid, seed=0, watch=ss.Watch(hook=corrector))
    assert times == [grid[0], *(t for t in grid[1:-1] for _ in range(3))]
    assert solution.nfe == solution.calls == len(times), "evaluations of the corrector are counted"
    times.clear()
    corrector = LangevinCorrector(seed=1, start=True)
    ss.sample(model, (2, 64), ss.DDIM(), grid=grid, seed=0, watch=ss.Watch(hook=corrector))
    assert times == [t for t in grid[:-1] for _ in range(2)]


def test_the_corrector_evaluates_the_model_that_is_solved_or_its_own() -> None:
    net = ss.Denoiser(lambda x, t, shift: GAUSSIAN.x0(x, t.to(x)) + shift[:, None], GAUSSIAN.sde, predicts="x0")
    one, two = (net.given(shift=torch.tensor(shift)) for shift in ([0.5, -0.5], [0.0, 0.0]))

    def go(corrector: LangevinCorrector) -> ss.Solution:
        return ss.solve(one, (2, 64), ss.DDIM(), steps=5, seed=0, watch=ss.Watch(hook=corrector))

    bound, own, other = (go(LangevinCorrector(seed=1, model=model)) for model in (None, one, two))
    assert torch.equal(bound.x, own.x) and not torch.equal(bound.x, other.x)
    assert (bound.nfe, own.nfe, other.nfe) == (9, 5, 5)
    x = torch.zeros(2, 64)
    assert torch.equal(
        langevin(one, x, T, 0.1, seed=1)[1:],
        langevin(one.rows(torch.tensor([1])), x[1:], T, 0.1, seed=Noise(1, offset=1)),
    )
    with pytest.raises(ValueError, match="the corrector has no `model`"):
        LangevinCorrector()(1, T, x)


def test_correcting_helps_a_coarse_predictor() -> None:
    mix = ss.GaussianMixture(ss.VE(), torch.zeros(1, 16), std=1.0)
    grid = ss.grids.uniform_lam(mix.sde, 6, t_end=mix.sde.t_of_sigma(0.1))

    def error(watch: ss.Watch | None = None) -> float:
        x = ss.sample(mix, (2000, 16), ss.DDIM(), grid=grid, seed=0, watch=watch)
        return abs(float(x.var()) / (1 + 0.1**2) - 1)

    plain, corrected = error(), error(ss.Watch(hook=LangevinCorrector(0.4, steps=15, seed=1)))
    assert corrected < plain / 2, (plain, corrected)


# Annealed dynamics.


def test_annealed_dynamics_is_algorithm_1() -> None:
    """Song & Ermon (2019), algorithm 1, re-typed: x + (a_i/2) score + √a_i z with a_i = ε σ_i²/σ_L²."""
    mix = ss.GaussianMixture(ss.VE(sigma_max=20.0), [[-1.0, 0.0], [1.0, 0.5]], std=0.1)
    sigmas, eps, n = [10.0, 3.0, 1.0, 0.3], 0.01, 4
    times = [mix.sde.t_of_sigma(s) for s in sigmas]
    x = start = 10 * Noise(0).normal((5, 2), 0, dtype=F64)
    noise, draw = Noise(1), 0
    for t, sigma in zip(times, sigmas, strict=True):
        a = eps * sigma**2 / sigmas[-1] ** 2
        for _ in range(n):
            x = x + a / 2 * mix.score(x, t) + math.sqrt(a) * noise.like(x, draw)
            draw += 1
    rule = AnnealedLangevin(n, r=eps / sigmas[-1] ** 2)
    plan = rule.plan(mix.sde, torch.tensor(times, dtype=F64))
    assert (run(plan, mix.x0, start, noise) - x).abs().max() < 1e-11
    assert plan.nfe == n * len(times)
    to_data = rule.plan(mix.sde, torch.tensor([*times, 0.0], dtype=F64))
    assert (run(to_data, mix.x0, start, noise) - mix.x0(x, times[-1])).abs().max() < 1e-11
    assert to_data.nfe == n * len(times) + 1


@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow(), ss.Cosine()], ids=lambda sde: type(sde).__name__)
def test_annealed_dynamics_depends_on_the_process_through_its_levels_alone(sde: ss.SDE) -> None:
    mix = ss.GaussianMixture(ss.VE(), [[1.0, -0.5], [-1.0, 0.0]], std=0.2)
    lam = torch.linspace(-3, 3, 12, dtype=F64)

    def end(model: ss.GaussianMixture) -> Tensor:
        grid = model.sde.t_of_lam(lam)
        x = model.sde.sigma(float(grid[0])) * Noise(0).normal((5, 2), 0, dtype=F64)
        y = run(AnnealedLangevin(3, 0.1).plan(model.sde, grid), model.x0, x, Noise(1))
        return y / model.sde.alpha(float(grid[-1]))

    assert (end(mix) - end(mix.under(sde))).abs().max() < 1e-9


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="x/α is undefined; start at a smaller t"):
        AnnealedLangevin().plan(ss.Flow(), [1.0, 0.5, 0.0])
    with pytest.raises(ValueError, match="`snr`"):
        LangevinCorrector(snr=0.0)
    with pytest.raises(TypeError, match="`model` must be a denoiser"):
        LangevinCorrector(model=GAUSSIAN.sde)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`r`"):
        AnnealedLangevin(r=4.0)
