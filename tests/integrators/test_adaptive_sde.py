"""Error control for each sample: unbiased where the published method is not, and each sample by itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from per_sample import MODELS, X
from torch import Tensor

import scoresde as ss
from scoresde.integrators import AdaptiveSDE
from scoresde.noise.keyed import Noise

F64 = torch.float64
LOOSE = AdaptiveSDE(rtol=0.05, atol=0.05, longest=0.5)


def gotta_go_fast(
    model: ss.GaussianMixture, x: Tensor, end: float, tol: float, noise: Noise, h: float = 0.01, r: float = 0.9
) -> tuple[Tensor, Tensor]:
    """Jolicoeur-Martineau et al. (2021), arXiv:2105.14080, algorithm 1, re-typed, with eps_rel = eps_abs = tol.

    The step of each sample is its own; a rejected step draws its noise again. Returns the state and the rejections.
    """
    sde = model.sde
    t, step = torch.full((len(x),), sde.T, dtype=F64), torch.full((len(x),), h, dtype=F64)
    before, rejected, draw = x, torch.zeros(len(x), dtype=torch.int64), 0

    def drift(x: Tensor, t: Tensor) -> Tensor:
        return sde.f(t)[:, None] * x - sde.g2(t)[:, None] * model.score(x, t)

    while bool((t > end).any()):
        step = torch.minimum(step, t - end)
        z, s, dt = noise.like(x, draw), (t - step).clamp_min(end), step[:, None]
        draw += 1
        x1 = x - dt * drift(x, t) + dt.sqrt() * sde.g(t)[:, None] * z
        far = x - dt * drift(x1, s) + dt.sqrt() * sde.g(s)[:, None] * z
        x2 = (x1 + far) / 2
        delta = (tol * torch.maximum(x1.abs(), before.abs())).clamp_min(tol)
        error = ((x1 - x2) / delta).square().mean(1).sqrt()
        moving = t > end
        good = (error <= 1) & moving
        x, before = torch.where(good[:, None], x2, x), torch.where(good[:, None], x1, before)
        t = torch.where(good, s, t)
        rejected += (moving & ~good).long()
        step = (0.9 * step * error.clamp_min(1e-12) ** -r).clamp_min(1e-6)
    return x, rejected


def test_unbiased_where_redrawn_noise_is_biased() -> None:
    n, model = 2000, ss.GaussianMixture(ss.VP(), [[0.0]], std=0.5)
    end = 0.02
    std = math.hypot(0.5 * model.sde.alpha(end), model.sde.sigma(end))
    x, se = Noise(0).normal((n, 1), 0, dtype=F64), 1 / math.sqrt(2 * n)
    theirs = []
    for tol in (0.3, 0.1):
        y, rejected = gotta_go_fast(model, x, end, tol, Noise(1))
        theirs.append(float(y.std()) / std - 1)
        assert float(rejected.double().mean()) > 1
    assert theirs[0] > 8 * se and theirs[1] > 8 * se, "standard errors off, at any tolerance"
    assert theirs[1] > theirs[0] - 2 * se, "and no better at a tighter one"
    ours = []
    for tol in (0.05, 0.02):
        run = ss.solve(model, x, AdaptiveSDE(rtol=tol, atol=tol, longest=0.5), seed=1, t_end=end)
        ours.append(float(run.x.std()) / std - 1)
        assert run.stats is not None and float(run.stats.rejected.double().mean()) > 1
        assert abs(float(run.x.mean())) < 4 * std / n**0.5
    assert abs(ours[1]) < 3 * se and abs(ours[1]) < abs(ours[0]) / 2, ours


PROCESSES = [ss.VP(), ss.SubVP(), ss.VE(), ss.Cosine(), ss.EDM(), ss.Flow(), ss.Trig()]


@pytest.mark.parametrize("sde", PROCESSES, ids=lambda sde: type(sde).__name__)
def test_the_longest_step_of_the_default_makes_gaussian_data_two_percent_too_narrow_at_most(sde: ss.SDE) -> None:
    """A run without rejection is SA-Solver's predictor with one node and corrector with two, on equal steps in λ."""
    start = sde.T if sde.alpha(sde.T) > 0 else 0.999 * sde.T
    first, last = sde.lam(start), sde.lam(sde.t_min)
    found = {}
    for h in (AdaptiveSDE().longest, 0.5):
        lam = torch.linspace(first, last, math.ceil((last - first) / h) + 1, dtype=F64)
        grid = torch.cat([torch.tensor([start], dtype=F64), sde.t_of_lam(lam[1:]), torch.zeros(1, dtype=F64)])
        plan = ss.solvers.SASolver(1, 2, 1.0).plan(sde, grid)
        found[h] = [std / exact - 1 for std, exact in ss.analysis.gaussian_stds(plan, sde, [1.0, 0.6, 0.3, 0.1])]
    assert all(-0.02 < error < 0 for error in found[AdaptiveSDE().longest]), found
    assert all(-0.14 < error < -0.11 for error in found[0.5]), found


@pytest.mark.parametrize("std", [1.0, 0.1])
@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow()], ids=lambda sde: type(sde).__name__)
def test_the_default_keeps_the_standard_deviation_of_gaussian_data(sde: ss.SDE, std: float) -> None:
    model = ss.GaussianMixture(sde, torch.zeros(1, 64, dtype=F64), std=std)
    n = 50
    x = ss.sample(model, (n, 64), AdaptiveSDE(), seed=0, start=ss.Start(data_std=std, dtype=F64))
    se = 1 / math.sqrt(2 * 64 * n)
    assert abs(float(x.square().mean().sqrt()) / std - 1) < 0.02 + 3 * se


DOUBLE = ss.Start(dtype=F64)
MIX = ss.GaussianMixture(ss.VP(), [[-1.0, 0.5], [1.0, 0.0]], std=0.2)


@pytest.mark.parametrize("seed", range(2))
def test_the_error_on_the_path_is_proportional_to_a_tolerance_that_limits_the_steps(seed: int) -> None:
    """Where `longest` limits them, it is not: the error then falls more slowly than the tolerance."""
    wide = ss.GaussianMixture(ss.VP(), [[-1.0, 0.5], [1.0, 0.0]], std=0.5)

    def go(tol: float) -> Tensor:
        rule = AdaptiveSDE(rtol=tol, atol=tol, longest=2.0)
        return ss.sample(wide, (96, 2), rule, seed=seed, start=DOUBLE, t_end=0.2)

    truth = go(0.003)
    coarse, fine = (float((go(tol) - truth).norm(dim=1).median()) for tol in (0.06, 0.015))
    expected = (0.06 - 0.003) / (0.015 - 0.003)  # errors that are proportional, seen from the run called the truth
    assert 0.65 * expected < coarse / fine < 1.5 * expected, (coarse, fine)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("sde", [ss.VP(), ss.VE(), ss.Flow()], ids=lambda sde: type(sde).__name__)
def test_moments_of_a_gaussian(sde: ss.SDE, eta: float) -> None:
    model = ss.GaussianMixture(sde, [[0.3, -0.2]], std=0.5)
    n, end = 1000, sde.t_of_lam(2.0)
    x = ss.sample(model, (n, 2), AdaptiveSDE(eta, rtol=0.02, atol=0.02), seed=0, t_end=end, start=DOUBLE)
    std = math.hypot(0.5 * sde.alpha(end), sde.sigma(end))
    se = 1 / math.sqrt(n)
    assert ((x.std(0) / std - 1).abs() < 4 * se / 2**0.5 + 1.5 * 0.02).all()
    assert ((x.mean(0) - sde.alpha(end) * model.mean()).abs() < 4 * se * std + 0.01).all()


def test_each_sample_by_itself() -> None:
    def go(n: int, offset: int) -> Any:
        return ss.solve(MIX, (n, 2), LOOSE, seed=Noise(3, offset=offset), start=DOUBLE)

    whole = go(64, 0)
    assert len(set(whole.stats.nfe.tolist())) > 3, "steps differ between samples"
    for n, offset in ((1, 63), (7, 7)):
        part = go(n, offset)
        assert torch.allclose(part.x, whole.x[offset : offset + n], rtol=0, atol=1e-10)
        assert torch.equal(part.stats.nfe, whole.stats.nfe[offset : offset + n])


@pytest.mark.parametrize("name", MODELS)
def test_data_of_each_sample_follow_it(name: str) -> None:
    rule = AdaptiveSDE(rtol=0.05, atol=0.05, longest=0.5)
    whole = ss.solve(MODELS[name](slice(None)), X, rule, seed=3)
    assert whole.stats is not None and len(set(whole.stats.nfe.tolist())) > 1
    for i in range(len(X)):
        one = ss.solve(MODELS[name](slice(i, i + 1)), X[i : i + 1], rule, seed=Noise(3, offset=i))
        assert torch.allclose(one.x, whole.x[i : i + 1], rtol=0, atol=1e-12)
        assert one.stats is not None and one.stats.nfe[0] == whole.stats.nfe[i]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_gradients_flow_through_the_steps(eta: float) -> None:
    net = torch.nn.Linear(2, 2).double()
    net.weight.data = torch.tensor([[0.3, -0.2], [0.1, 0.5]], dtype=F64)
    model = ss.Denoiser(lambda x, t: net(x), ss.VP(), predicts="x0")
    x, rule = X.clone().requires_grad_(), AdaptiveSDE(eta, rtol=1e3, atol=1e3)  # steps that do not depend on the net
    found = []
    for grad in ("full", "checkpoint"):
        out = ss.sample(model, x, rule, seed=0, grad=grad, t_end=0.2)
        found.append(torch.autograd.grad(out.square().sum(), (x, net.weight)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert not ss.sample(model, x, rule, seed=0, t_end=0.2).requires_grad
    values, h = [], 1e-3
    for sign in (1, -1):
        net.weight.data[0, 1] += sign * h
        values.append(float(ss.sample(model, X, rule, seed=0, t_end=0.2).square().sum()))
        net.weight.data[0, 1] -= sign * h
    assert abs((values[0] - values[1]) / (2 * h) / float(found[0][1][0, 1]) - 1) < 1e-5


def test_counts_are_those_of_the_network() -> None:
    sizes: list[int] = []

    class Noted(ss.denoisers.AbstractDenoiser):
        def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
            sizes.append(len(x))
            assert len(cond["label"]) == len(x)
            return MIX.x0(x, t)

    run = ss.solve(Noted(MIX.sde).given(label=torch.arange(16)), (16, 2), LOOSE, seed=0)
    assert run.stats is not None
    assert run.calls == len(sizes) and int(run.stats.nfe.sum()) == sum(sizes) and run.nfe == math.ceil(sum(sizes) / 16)
    assert torch.equal(run.stats.nfe, 2 + run.stats.steps + run.stats.rejected)
    assert sizes[-2] < 16, "samples that are done leave"
    before = torch.get_rng_state()
    again = ss.solve(MIX, (16, 2), LOOSE, seed=0)
    assert torch.equal(again.x, run.x) and torch.equal(torch.get_rng_state(), before)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="both be 0"):
        AdaptiveSDE(rtol=0.0, atol=0.0)
    with pytest.raises(ValueError, match="`t_start` = 1 has α = 0"):
        ss.sample(ss.GaussianMixture(ss.Flow(), [[-1.0, 0.5]], std=0.2), (2, 2), AdaptiveSDE(), t_start=1.0)
    with pytest.raises(ss.SolverError, match=r"`max_steps` = 5 attempts were not enough.*had used 6 evaluations"):
        ss.sample(MIX, (2, 2), AdaptiveSDE(max_steps=5), seed=0)
    broken = ss.Denoiser(lambda x, t: torch.where(t[:, None] < 0.5, torch.nan, 0.3 * x), ss.VP(), predicts="x0")
    with pytest.raises(ss.SolverError, match=r"Sample 0 was at t = 0\.[56].*not finite"):
        ss.sample(broken, (2, 2), AdaptiveSDE(), seed=0)
