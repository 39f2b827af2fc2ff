"""Advantages and losses against closed forms: gradients, minimisers, and the step that a preference loss sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

import scoresde as ss
from scoresde import policies

F64 = torch.float64


# Advantages.


def test_advantages_have_mean_zero_and_deviation_one_in_each_group() -> None:
    rewards = ss.Noise(0).normal((1, 12), 0, dtype=F64)[0] * 3 + 1
    groups = torch.tensor([5, 0, 5, 2, 0, 2, 5, 0, 2, 5, 0, 2])
    for g in (0, 2, 5):
        some = groups == g
        plain = policies.advantages(rewards, groups)[some]
        scaled = policies.advantages(rewards, groups, scale="group", epsilon=0.0)[some]
        assert torch.allclose(plain, rewards[some] - rewards[some].mean())
        assert torch.allclose(scaled, plain / rewards[some].std(correction=0))
    of_batch = policies.advantages(rewards, groups, scale="batch", epsilon=0.0)
    assert float(of_batch.square().mean()) == pytest.approx(1)
    per_step = policies.advantages(torch.stack([rewards, 2 * rewards]), groups)
    assert torch.allclose(per_step[1], 2 * per_step[0])


def test_equal_rewards_and_groups_of_one_have_no_advantage() -> None:
    rewards = torch.tensor([2.0, 2.0, 7.0])
    out = policies.advantages(rewards, torch.tensor([0, 0, 1]), scale="group")
    assert torch.equal(out, torch.zeros(3))


def test_the_reward_to_go_pays_for_later_steps_only() -> None:
    kl = ss.Noise(0).uniform((4, 3), 0, dtype=F64)
    rewards = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    out = policies.reward_to_go(rewards, kl, 0.5)
    for s in range(4):
        assert torch.allclose(out[s], rewards - 0.5 * kl[s + 1 :].sum(0))


# The policy gradient, against the exact gradient of the objective.


class Bent(nn.Module):
    """Data prediction a·tanh(x) + b: its divergence from a reference depends on the state."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([a, b], dtype=F64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.theta[0] * x.tanh() + self.theta[1]
        return out


SDE = ss.VP()
GRID = torch.tensor([0.8, 0.6, 0.4, 0.2], dtype=F64)


def objective(theta: Tensor, reference: Tensor, beta: float) -> Tensor:
    """E[r(x)] − β Σ E KL_s of DDPM's three steps from x = 0.4, r(x) = sin 2x, by sums over grids of states."""
    plan, x = ss.DDPM().plan(SDE, GRID), torch.linspace(-8, 8, 1601, dtype=F64)
    law, penalty = None, torch.zeros((), dtype=F64)
    for row in plan.rows[1:]:
        ((_, a),), ((_, b),), ((_, c),) = row.x, row.d, row.z
        start = torch.tensor([0.4], dtype=F64) if law is None else x
        mean, theirs = (a * start + b * (p[0] * start.tanh() + p[1]) for p in (theta, reference))
        weight = torch.ones(1, dtype=F64) if law is None else law
        penalty = penalty + (weight * (mean - theirs) ** 2).sum() / (2 * c**2)
        density = torch.exp(-0.5 * ((x - mean[:, None]) / c) ** 2) / (c * math.sqrt(2 * math.pi))
        law = weight @ density * (x[1] - x[0])
    assert law is not None
    return (law * (2 * x).sin()).sum() - beta * penalty


def test_the_loss_has_the_gradient_of_the_objective_with_reward_to_go_alone() -> None:
    """−S ∇L = ∇J at the parameters of the rollout. With the final reward alone it is another vector."""
    beta, n = 0.7, 400_000
    theta, reference = torch.tensor([0.9, 0.3], dtype=F64, requires_grad=True), torch.tensor([-0.6, -0.2], dtype=F64)
    (exact,) = torch.autograd.grad(objective(theta, reference, beta), [theta])
    model = ss.Denoiser(Bent(0.9, 0.3), SDE, predicts="x0")
    fixed = ss.Denoiser(Bent(-0.6, -0.2), SDE, predicts="x0")
    run = policies.rollout(model, torch.full((n, 1), 0.4, dtype=F64), ss.DDPM(), grid=GRID, seed=0)
    with torch.no_grad():
        theirs = policies.replay(run, fixed)
    new = policies.replay(run, model)
    ratio, kl = policies.log_ratio(new, run.at()), policies.step_kl(new, theirs)
    reward = (2 * run.x[:, 0]).sin()
    found = {}
    for name, gain in (("to go", policies.reward_to_go(reward, kl, beta)), ("final", reward)):
        loss = policies.grpo_loss(ratio, policies.advantages(gain), kl=kl, beta=beta)
        (grad,) = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        found[name] = -len(run.rows) * grad
    assert torch.allclose(found["to go"], exact, atol=0.02), (found, exact)
    assert float((found["final"] - exact).abs().max()) > 0.1


def test_clipping_stops_the_gradient_beyond_the_bounds_only() -> None:
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.5]] * 2, dtype=F64)
    log_ratio = ratio.log().requires_grad_()
    gain = torch.tensor([[1.0], [-1.0]], dtype=F64).expand(2, 4)
    loss = policies.grpo_loss(log_ratio, gain, clip=0.2, clip_high=0.3)
    value = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.3) * gain).mean()
    assert torch.allclose(loss, value)
    (grad,) = torch.autograd.grad(loss, [log_ratio])
    moved = torch.tensor([[False, False, False, True], [True, False, False, False]])
    assert torch.equal(grad == 0, moved)
    assert torch.allclose(grad[~moved], (-gain * ratio / 8)[~moved])


def test_the_mean_over_elements_is_a_root_of_the_ratio() -> None:
    log_ratio = torch.tensor([[0.4, -0.8]], dtype=F64)
    gain = torch.tensor([1.0, 2.0], dtype=F64)
    whole, mean = (policies.grpo_loss(log_ratio / k, gain, clip=9.0, elements=n) for k, n in ((4, 1), (1, 4)))
    assert torch.equal(whole, mean)


# DiffusionNFT.


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_the_minimum_of_the_nft_loss_is_the_stated_prediction(prediction: str) -> None:
    """At one state x_t, with x₀ at quantiles of its posterior under the old model: the gradient vanishes there."""
    sde, t, b, n = ss.Flow(), 0.6, 0.5, 4000
    old = ss.GaussianMixture(sde, [[-1.0], [1.5]], std=[0.4, 0.3])
    fine = torch.linspace(-6, 6, 200_001, dtype=F64)
    log = old.log_prob(fine[:, None]) - 0.5 * ((0.2 - sde.alpha(t) * fine) / sde.sigma(t)) ** 2
    x = fine[torch.searchsorted(log.softmax(0).cumsum(0), (torch.arange(n, dtype=F64) + 0.5) / n)][:, None]
    state = torch.full_like(x, 0.2)
    eps, times = (state - sde.alpha(t) * x) / sde.sigma(t), torch.full((n,), t, dtype=F64)
    reward = torch.sigmoid(2 * x[:, 0])
    v_old, v = (old.convert("x0", d, prediction, state, t) for d in (old.x0(state, t), x))
    assert torch.allclose(v.mean(0), v_old[0], atol=1e-3), "the old model is exact"
    best = v_old[0] + ((2 * reward - 1)[:, None] * (v - v_old)).mean(0) / b
    weighted = (reward[:, None] * v).mean(0) / reward.mean()
    assert torch.allclose(best, v_old[0] + 2 / b * reward.mean() * (weighted - v_old[0]), atol=5e-3)

    class At(ss.denoisers.AbstractDenoiser):
        def __init__(self, value: Tensor) -> None:
            super().__init__(sde)
            self.value = nn.Parameter(value.clone())

        def x0(self, x: Tensor, t: float | Tensor, **cond: object) -> Tensor:
            return self.convert(prediction, self.value.expand_as(x), "x0", x, t)

    def gradient(value: Tensor) -> float:
        model = At(value)
        loss = policies.nft_loss(model, old, x, times, eps, reward, strength=b, prediction=prediction)
        (grad,) = torch.autograd.grad(loss, [model.value])
        return float(grad)

    assert abs(gradient(best)) < 1e-12
    assert gradient(best + 0.1) == pytest.approx(2 * b**2 * 0.1, rel=1e-6)


def test_optimality_is_half_at_no_advantage_and_saturates() -> None:
    out = policies.optimality(torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0]), 2.0)
    assert out.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


# Preferences.


def pair() -> tuple[ss.GaussianMixture, ss.GaussianMixture, Tensor, Tensor, Tensor]:
    sde = ss.VP()
    model, reference = (ss.GaussianMixture(sde, [[m, 0.5], [1.0, -0.3]], std=0.4) for m in (-0.6, -1.0))
    x = ss.Noise(0).normal((2, 5, 2), 0, dtype=F64)
    return model, reference, x[0], x[1], ss.Noise(1).normal((5, 2), 0, dtype=F64)


def test_without_training_every_preference_has_the_loss_of_a_coin() -> None:
    model, _, chosen, rejected, eps = pair()
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    loss = policies.dpo_loss(model, model, chosen, rejected, t, eps, strength=100.0)
    assert float(loss) == pytest.approx(math.log(2), abs=1e-14)


def test_the_dpo_loss_is_that_of_the_mean_log_ratio_of_a_step() -> None:
    """E over x_s of q(x_s | x_t, x₀) of log p_θ/p_ref of DDPM's step, with its own weight."""
    model, reference, chosen, rejected, eps = pair()
    sde, s, t, beta_t = model.sde, 0.5, 0.6, 3.0
    row = ss.DDPM().plan(sde, [t, s]).rows[1]
    ((_, a),), ((_, b),), ((_, c),) = row.x, row.d, row.z
    gains = []
    for x in (chosen, rejected):
        x_t = sde.perturb(x, t, eps)
        truth, ours, theirs = (a * x_t + b * d for d in (x, model.x0(x_t, t), reference.x0(x_t, t)))
        gains.append(((truth - theirs) ** 2 - (truth - ours) ** 2).sum(1) / (2 * c**2))
    want = -logsigmoid(beta_t * (gains[0] - gains[1])).mean()
    of_eps = float(b) * sde.sigma(t) / sde.alpha(t)
    times = torch.full((5,), t, dtype=F64)
    for prediction, weight in (("x0", float(b)), ("eps", of_eps)):
        strength = beta_t * weight**2 / (2 * float(c) ** 2)
        loss = policies.dpo_loss(
            model, reference, chosen, rejected, times, eps, strength=strength, prediction=prediction
        )
        assert torch.allclose(loss, want, rtol=1e-9), prediction


def test_a_preference_moves_the_model_towards_the_chosen_sample() -> None:
    sde = ss.VP()
    net = nn.Linear(1, 1).double()
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)  # type: ignore[func-returns-value]
    model = ss.Denoiser(lambda x, t: net(torch.ones_like(x)), sde, predicts="x0")
    reference = ss.Denoiser(lambda x, t: torch.zeros_like(x), sde, predicts="x0")
    chosen = torch.ones(4, 1, dtype=F64)
    t, eps = torch.full((4,), 0.5, dtype=F64), torch.zeros(4, 1, dtype=F64)
    policies.dpo_loss(model, reference, chosen, -chosen, t, eps, strength=1.0, prediction="x0").backward()
    assert net.bias.grad is not None
    assert float(net.bias.grad) == pytest.approx(-0.5 * 4)  # −σ(0) · d/dm [(m+1)² − (m−1)²]


def test_errors_name_the_argument() -> None:
    model, reference, chosen, rejected, eps = pair()
    t = torch.full((5,), 0.5, dtype=F64)
    with pytest.raises(ValueError, match=r"`reward` must lie in \[0, 1\], got 2.0"):
        policies.nft_loss(model, reference, chosen, t, eps, torch.full((5,), 2.0))
    other = ss.GaussianMixture(ss.Flow(), [[0.0, 0.0]], std=1.0)
    with pytest.raises(ValueError, match="both need one process"):
        policies.dpo_loss(model, other, chosen, rejected, t, eps, strength=1.0)
    with pytest.raises(ValueError, match="give `kl` and `beta` > 0 together"):
        policies.grpo_loss(torch.zeros(2, 3), torch.zeros(3), beta=0.1)
    with pytest.raises(ValueError, match=r"`log_ratio` must have shape \(S, B\)"):
        policies.grpo_loss(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match="`groups` must be 3 integers"):
        policies.advantages(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"must have shapes \(B,\) and \(S, B\)"):
        policies.reward_to_go(torch.zeros(3), torch.zeros(3, 2), 0.1)
