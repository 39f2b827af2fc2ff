"""Rollouts and replays: normalised densities, equal to the bit at equal parameters, rows and samples in parts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

import scoresde as ss
from scoresde import policies
from scoresde.denoisers.base import Counter
from scoresde.solvers import CPS, FlowSDE, Multistep, ReverseEuler, Solver

F64 = torch.float64


def half(t: Tensor) -> Tensor:
    return 0.5 + 0.3 * t


POLICIES: list[Solver] = [
    ss.DDPM(),
    ss.DDPM("large"),
    ss.DDIM(0.6),
    FlowSDE(),
    CPS(),
    ReverseEuler(half),
    ss.EulerMaruyama(),
    ss.SDEDPMSolverPP(2),
    Multistep(3, eta=0.7),
]
EACH = pytest.mark.parametrize("solver", POLICIES, ids=lambda s: f"{s!r}".replace(" ", ""))


class Net(nn.Module):
    """A network whose results depend on every parameter."""

    def __init__(self, size: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.layers = nn.Sequential(nn.Linear(size + 1, 32), nn.SiLU(), nn.Linear(32, size))
        for p in self.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x, t.to(x)[:, None]], 1))
        return out


def network(seed: int = 0, size: int = 3) -> ss.Denoiser:
    return ss.Denoiser(Net(size, seed), ss.Flow(), predicts="velocity")


@EACH
def test_the_density_of_every_step_integrates_to_one(solver: Solver) -> None:
    """On a grid in one dimension. A public log-probability of CPS is −(x − m)², whose integral is √π for any std."""
    model = ss.GaussianMixture(ss.Flow(), [[-1.0], [1.5]], std=[0.4, 0.2])
    run = policies.rollout(model, torch.full((1, 1), 0.3, dtype=F64), solver, steps=5, seed=0)
    assert len(run.rows) == 4
    for k, step in enumerate(run.at()):
        std = float(step.std)
        grid = float(step.mean) + std * torch.linspace(-9, 9, 2001, dtype=F64)
        density = []
        for x in grid.split(2001):
            states = [s.x.expand(len(x), 1) for s in run.transitions]
            states[run.rows[k] - 1] = x[:, None]
            start = run.start.expand(len(x), 1)
            (again,) = ss.sampling.transitions(run.plan, model, start, states=states, rows=[run.rows[k]])
            assert again.log_prob is not None
            density.append(again.log_prob.exp())
        assert float(torch.trapezoid(torch.cat(density), grid)) == pytest.approx(1, abs=1e-12)
    public = torch.trapezoid((-((grid - float(step.mean)) ** 2)).exp(), grid)
    assert abs(float(public) - 1) > 0.3, "the public form is no density"


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_replay_equals_its_rollout_bit_by_bit(solver: Solver, dtype: torch.dtype) -> None:
    model = network()
    if dtype == F64:
        model = model.double()
    x = ss.Noise(1).normal((7, 3), 0, dtype=dtype)
    run = policies.rollout(model, x, solver, steps=6, seed=2)
    for rows in (None, run.rows[:1], run.rows[2:4], run.rows[::-1]):
        again = policies.replay(run, model, rows)
        for new, old in zip(again, run.at(rows), strict=True):
            assert new.mean.requires_grad and not old.mean.requires_grad
            assert new.log_prob is not None and old.log_prob is not None
            assert torch.equal(new.mean, old.mean) and torch.equal(new.log_prob, old.log_prob)
        ratio, kl = policies.log_ratio(again, run.at(rows)), policies.step_kl(again, run.at(rows))
        assert torch.equal(ratio, torch.zeros_like(ratio)) and torch.equal(kl, torch.zeros_like(kl))


@EACH
def test_a_rollout_has_the_samples_of_the_sampler_and_the_densities_of_torch(solver: Solver) -> None:
    model, other = network().double(), network(1).double()
    run = policies.rollout(model, (5, 3), solver, steps=6, seed=2, start=ss.Start(dtype=F64))
    plain = ss.sample(model, (5, 3), solver, steps=6, seed=2, start=ss.Start(dtype=F64))
    assert torch.allclose(run.x, plain, rtol=1e-12, atol=1e-12)
    again, theirs = policies.replay(run, model), policies.replay(run, other)
    for a, b in zip(again, theirs, strict=True):
        p, q = (Normal(s.mean, torch.as_tensor(s.std, dtype=F64)) for s in (a, b))
        assert torch.allclose(a.kl(b), kl_divergence(p, q).sum(1), rtol=1e-10)
        ratio = (p.log_prob(a.x) - q.log_prob(a.x)).sum(1)
        assert torch.allclose(a.log_ratio(b), ratio, rtol=1e-9, atol=1e-9)


def test_the_log_ratio_of_a_large_state_is_exact_in_float32() -> None:
    """Its relative error is that of one sum of small terms; the difference of two log-densities loses digits."""
    n = 65536
    z = ss.Noise(0).normal((3, 2, n), 0, dtype=F64)
    x, mean, shift = z[0], 0.1 * z[1], 1e-4 * z[2]
    std = 0.3

    def step(dtype: torch.dtype, mean: Tensor) -> ss.sampling.Transition:
        log_prob = Normal(mean, std).log_prob(x).sum(1)
        return ss.sampling.Transition(0.5, x.to(dtype), mean.to(dtype), std, log_prob.to(dtype))

    # the states of float32 are the data, so that only the arithmetic is compared
    x, mean, new = (v.float().double() for v in (x, mean, mean + shift))
    exact = step(F64, new).log_ratio(step(F64, mean))
    ours = step(torch.float32, new).log_ratio(step(torch.float32, mean)).double()
    a, b = step(torch.float32, new).log_prob, step(torch.float32, mean).log_prob
    assert a is not None and b is not None
    assert float((ours - exact).abs().max()) < 1e-5 < 1e-3 < float(((a - b).double() - exact).abs().max())


@EACH
def test_rows_need_only_their_own_evaluations(solver: Solver) -> None:
    model, counter = network(), Counter()
    run = policies.rollout(model, (4, 3), solver, steps=8, seed=0)
    row = run.rows[5]
    policies.replay(run, model.counted(counter), [row])
    assert counter.calls == len({k for k, _ in run.plan.rows[row].d}) <= 3


def test_gradients_of_parts_sum_to_that_of_the_whole() -> None:
    model = network().double()
    run = policies.rollout(model, (9, 3), FlowSDE(), steps=7, seed=0, start=ss.Start(dtype=F64))
    weights = ss.Noise(5).normal((len(run.rows), 9), 0, dtype=F64)
    where = {row: k for k, row in enumerate(run.rows)}

    def gradient(losses: list[Tensor]) -> Tensor:
        model.zero_grad()
        for loss in losses:
            loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def total(part: policies.Rollout, rows: tuple[int, ...], index: Tensor) -> Tensor:
        steps = policies.replay(part, model, rows)
        return sum((s.log_prob * weights[where[r], index]).sum() for r, s in zip(rows, steps, strict=True))  # type: ignore[operator, return-value, misc]

    whole = gradient([total(run, run.rows, torch.arange(9))])
    for samples in (None, 4):
        parts = list(policies.minibatches(run, 2, samples, seed=3))
        pairs = sorted((r, int(i)) for rows, index in parts for r in rows for i in index)
        assert pairs == [(r, i) for r in run.rows for i in range(9)]
        assert torch.allclose(gradient([total(run[index], rows, index) for rows, index in parts]), whole, rtol=1e-10)


def test_some_samples_of_a_rollout_with_their_conditions() -> None:
    net = nn.Linear(4, 3).double()
    model = ss.Denoiser(lambda x, t, y: net(torch.cat([x, y[:, None]], 1)), ss.VP(), predicts="x0")
    y = torch.arange(6, dtype=F64)
    run = policies.rollout(model.given(y=y), (6, 3), steps=5, seed=0, start=ss.Start(dtype=F64))
    index = torch.tensor([4, 1])
    part, given = run[index], model.given(y=y).rows(index)
    assert torch.equal(part.x, run.x[index]) and torch.equal(part.log_prob, run.log_prob[:, index])
    assert torch.allclose(policies.log_ratio(policies.replay(part, given), part.at()), torch.zeros(4, 2, dtype=F64))
    assert len(run[1:3]) == 2 and torch.equal(run[[0]].start, run.start[:1])


def dropped() -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5))


def normed() -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(3))


@pytest.mark.parametrize("inner", [dropped, normed])
def test_layers_that_would_part_replay_and_rollout_are_named(inner: Callable[[], nn.Module]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner()

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            out: Tensor = self.inner(x)
            return out

    model = ss.Denoiser(Wrapped(), ss.VP(), predicts="x0")
    model.train()
    with pytest.warns(UserWarning, match="in training mode, which changes its predictions: `net.inner.0`"):
        policies.rollout(model, (2, 3), steps=3, seed=0)
    run = policies.rollout(model.eval(), (2, 3), steps=3, seed=0)
    assert torch.equal(policies.log_ratio(policies.replay(run, model), run.at()), torch.zeros(2, 2))
    with pytest.warns(UserWarning, match="in training mode"):
        again = policies.replay(run, model.train())
    assert not torch.equal(policies.log_ratio(again, run.at()), torch.zeros(2, 2))


def test_the_sum_of_step_divergences_is_that_of_the_paths() -> None:
    """E Σ KL_s under p is E_p log p(path)/q(path), the latter with more noise, of zero mean difference."""
    model = ss.GaussianMixture(ss.VP(), [[0.3]], std=0.5)
    other = ss.GaussianMixture(ss.VP(), [[0.5]], std=0.5)
    run = policies.rollout(model, (20_000, 1), steps=8, seed=1, start=ss.Start(dtype=F64))
    theirs = policies.replay(run, other)
    kl, ratio = policies.step_kl(run.at(), theirs).sum(0), policies.log_ratio(run.at(), theirs).sum(0)
    gap = kl - ratio
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / math.sqrt(len(gap))
    assert float(kl.std()) < 1e-10, "the shift of the mean is the same in all states"


def test_errors_name_the_argument_and_the_fix() -> None:
    model = network()
    run = policies.rollout(model, (2, 3), steps=4, seed=0)
    with pytest.raises(ValueError, match=r"draws no noise.*FlowSDE"):
        policies.rollout(model, (2, 3), ss.UniPC(2), steps=4)
    with pytest.raises(ValueError, match="`rows` must be rows with noise, 1, 2, 3, got 4"):
        policies.replay(run, model, [4])
    with pytest.raises(ValueError, match="give its `states`"):
        next(ss.sampling.transitions(run.plan, model, run.start, ss.Noise(0), rows=[1]))
    with pytest.raises(TypeError, match=r"one is \[i\]"):
        run[0]  # type: ignore[index]
    with pytest.raises(ValueError, match="has no density"):
        run.transitions[-1].kl(run.transitions[-1])
    other = policies.rollout(model, (2, 3), CPS(), steps=4, seed=0)
    with pytest.raises(ValueError, match="give both one plan"):
        policies.log_ratio(run.at(), other.at())
    with pytest.raises(ValueError, match="give the same rows twice"):
        policies.log_ratio(run.at(), run.at()[:1])


def test_the_words_of_other_doors_get_the_fix() -> None:
    mix = ss.GaussianMixture(ss.VP(), torch.zeros(1, 1), std=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'nfe'; use `steps`"):
        policies.rollout(mix, (2, 1), nfe=5)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'eta'; it belongs to the solver"):
        policies.rollout(mix, (2, 1), eta=1.0)  # type: ignore[call-arg]
