"""The exact optimum of a reward with a penalty, and what a sampler with memory can reach of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import policies
from scoresde.plan.matrices import pull_back

F64 = torch.float64


@pytest.mark.parametrize("std", [0.5, 0.0])
def test_a_tilted_mixture_is_the_law_with_the_exponential_weight(std: float) -> None:
    """Moments by self-normalised weights on a grid, in two dimensions; a component may be flat in a direction."""
    cov = torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[std**2 + 0.05, 0.0], [0.0, 0.4]]], dtype=F64)
    mix = ss.GaussianMixture(ss.VP(), [[-1.0, 0.3], [0.8, -0.5]], cov=cov, weights=[1.0, 2.0])
    b = torch.tensor([0.7, -0.4], dtype=F64)
    A = torch.tensor([[0.6, 0.2], [0.2, -0.3]], dtype=F64)
    law, log_z = policies.tilted(mix, b, A)
    line = torch.linspace(-7, 7, 701, dtype=F64)
    x = torch.cartesian_prod(line, line)
    log = mix.log_prob(x) + x @ b - 0.5 * ((x @ A) * x).sum(1)
    assert log_z == pytest.approx(float(log.logsumexp(0)) + 2 * math.log(0.02), abs=1e-9)
    assert torch.allclose(law.log_prob(x), log - log_z, atol=1e-8)


def test_a_point_mass_moves_its_weight_alone() -> None:
    mix = ss.GaussianMixture(ss.VP(), [[-1.0], [2.0]], std=0.0)
    law, log_z = policies.tilted(mix, torch.tensor([1.0]), torch.tensor([[0.5]]))
    logs = torch.tensor([-1.0 - 0.25, 2.0 - 1.0], dtype=F64)
    assert torch.allclose(law.weights, logs.softmax(0))
    assert torch.equal(law.means, mix.means)
    assert log_z == pytest.approx(float(logs.logsumexp(0)) - math.log(2))


def test_a_law_without_integral_is_refused() -> None:
    mix = ss.GaussianMixture(ss.VP(), [[0.0]], std=1.0)
    assert policies.tilted(mix, quadratic=torch.tensor([[-0.9]]))[0].covariance()[0, 0] == pytest.approx(10)
    with pytest.raises(ValueError, match="use a larger β"):
        policies.tilted(mix, quadratic=torch.tensor([[-1.1]]))


SAMPLERS = {
    "DDPM": ss.DDPM(),
    "DDIM(0.3)": ss.DDIM(0.3),
    "FlowSDE": ss.solvers.FlowSDE(),
    "CPS(0.1)": ss.solvers.CPS(0.1),
}


def best_shifts(plan: ss.Plan, sde: ss.SDE, c: float, k: float) -> tuple[float, float]:
    """Optimum of E[k x] − Σ KL over policies, for Gaussian data of variance c, as shifts of the means of the rows.

    A shift δ_s of row s moves the result by g_s δ_s and costs δ_s²/(2 s_s²), so that δ_s = k g_s s_s². Returned are the
    shift of the result and the value of the optimum. Shifts that depend on the state are not better, since the reward
    is linear.
    """
    levels = [(sde.alpha(float(r.t)), sde.sigma(float(r.t))) for r in plan.rows if r.evaluates]
    _, of_z = pull_back(plan, [a * c / (a**2 * c + s**2) for a, s in levels])
    shift = sum(k * float(w) ** 2 for w in of_z.values())  # w is g_s s_s
    return shift, k * shift / 2


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("sde", [ss.VP(), ss.Flow()], ids=repr)
def test_the_share_of_the_start_is_what_a_policy_cannot_move(name: str, sde: ss.SDE) -> None:
    c, k = 0.25, 1.3
    plan = SAMPLERS[name].plan(sde, ss.grids.uniform_t(sde, 30))
    (share,) = policies.start_share(plan, sde, [c])
    shift, value = best_shifts(plan, sde, c, k)
    variance = float(ss.analysis.exact_moments(plan, sde, mean=0.0, spectrum=[c], start="marginal").variance)
    assert shift == pytest.approx((1 - share) * variance * k, rel=1e-9)
    law, log_z = policies.tilted(
        ss.GaussianMixture(sde, [[0.0]], std=math.sqrt(variance)), torch.tensor([k], dtype=F64)
    )
    assert float(law.mean()) == pytest.approx(variance * k, rel=1e-9)
    assert value == pytest.approx((1 - share) * log_z, rel=1e-9)


def test_samplers_that_forget_have_no_share_and_ddim_has_all() -> None:
    sde = ss.VP()
    grid = ss.grids.uniform_t(sde, 50)
    assert policies.start_share(ss.DDPM().plan(sde, grid), sde, [0.01, 1.0]) == pytest.approx([0, 0], abs=2e-4)
    assert policies.start_share(ss.solvers.CPS(1.0).plan(sde, grid), sde, [0.01, 1.0]) == pytest.approx(
        [0, 0], abs=1e-9
    )
    assert policies.start_share(ss.DDIM().plan(sde, grid), sde, [0.01, 1.0]) == [1.0, 1.0]
    shares = [policies.start_share(ss.DDIM(eta).plan(sde, grid), sde, [0.25])[0] for eta in (0.1, 0.3, 0.6, 1.0)]
    assert shares == sorted(shares, reverse=True)


def test_the_reverse_process_of_the_tilted_mixture_reaches_the_bound() -> None:
    """J = E[r] − KL(paths) of its denoiser is log Z, up to the steps; no other denoiser has more."""
    sde = ss.VP()
    mix = ss.GaussianMixture(sde, [[-1.0], [1.2]], std=[0.5, 0.3])
    law, log_z = policies.tilted(mix, torch.tensor([0.8]))

    def value(model: ss.GaussianMixture) -> Tensor:
        run = policies.rollout(model, (4000, 1), steps=60, seed=0, start=ss.Start(dtype=F64))
        kl = policies.step_kl(run.at(), policies.replay(run, mix)).sum(0)
        return 0.8 * run.x[:, 0] - kl

    best, none = value(law), value(mix)
    error = 4 * float(best.std()) / math.sqrt(4000)
    assert abs(float(best.mean()) - log_z) < error + 0.02
    assert float(none.mean()) < log_z - 0.1


class Shifted(ss.denoisers.Wrapped):
    """A denoiser plus one learned number for each time."""

    def __init__(self, model: ss.denoisers.AbstractDenoiser, times: list[float]) -> None:
        super().__init__(model)
        self.times = times
        self.shift = torch.nn.Parameter(torch.zeros(len(times), dtype=F64))

    def x0(self, x: Tensor, t: float | Tensor, **cond: object) -> Tensor:
        return self.model.x0(x, t) + self.shift[self.times.index(float(t))]


def test_policy_gradients_reach_the_law_with_the_exponential_weight() -> None:
    """Gaussian data and a linear reward: the policy class has the optimum, whose mean and value are known."""
    sde, c, slope, beta = ss.VP(), 0.25, 0.6, 0.5
    base = ss.GaussianMixture(sde, [[0.2]], std=c**0.5)
    grid = torch.tensor([1.0, 0.7, 0.45, 0.25, 0.1, 0.02], dtype=F64)
    plan = ss.SDEDPMSolverPP(2).plan(sde, grid)
    model = Shifted(base, grid.tolist())
    optimiser = torch.optim.Adam([model.shift], 0.05)
    for update in range(120):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - update / 120)
        run = policies.rollout(model, (512, 1), plan, seed=update, start=ss.Start(dtype=F64))
        with torch.no_grad():
            theirs = policies.replay(run, base)
        returns = policies.reward_to_go(slope * run.x[:, 0], policies.step_kl(run.at(), theirs), beta)
        new = policies.replay(run, model)
        loss = policies.grpo_loss(
            policies.log_ratio(new, run.at()),
            policies.advantages(returns),
            kl=policies.step_kl(new, theirs),
            beta=beta,
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    shift, best = best_shifts(plan, sde, c, slope / beta)
    untrained = ss.analysis.exact_moments(plan, sde, mean=0.2, spectrum=[c], start="prior")
    with torch.no_grad():
        run = policies.rollout(model, (20_000, 1), plan, seed=999, start=ss.Start(dtype=F64))
        value = slope * run.x[:, 0] - beta * policies.step_kl(run.at(), policies.replay(run, base)).sum(0)
    noise = 4 * float(run.x.std()) / math.sqrt(20_000)
    assert abs(float(run.x.mean()) - float(untrained.mean) - shift) < 0.03 * shift + noise
    bound = slope * float(untrained.mean) + beta * best
    assert bound - 0.03 * beta * best - slope * noise < float(value.mean()) < bound + slope * noise
    assert abs(shift - c * slope / beta) < 0.06 * c * slope / beta, "close to the shift of p exp(r/β)/Z itself"
