"""A plan as a policy: its transitions are those of the loop, and their densities those of torch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal

import scoresde as ss
from scoresde.noise.keyed import Noise
from scoresde.plan.rows import Row
from scoresde.plan.run import run, steps
from scoresde.plan.table import Plan
from scoresde.sampling.transitions import transitions
from scoresde.solvers.multistep import Multistep

F64 = torch.float64


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.layers(torch.cat([x, t.to(x)[:, None]], 1))
        return out


NET = Net()
MODEL = ss.Denoiser(NET, ss.VP(), predicts="x0")
X = Noise(0).normal((6, 2), 0, dtype=F64)
RULES = [Multistep(1, eta=1.0), Multistep(2, eta=0.7), Multistep(3, eta=1.0)]


def plan_of(rule: Multistep, end: float = 0.0) -> ss.Plan:
    return rule.plan(MODEL.sde, ss.grids.karras(MODEL.sde, 6, t_end=end))


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("path", [False, True], ids=["fresh", "path"])
def test_states_are_those_of_the_loop(rule: Multistep, path: bool) -> None:
    plan = plan_of(rule)
    noise = Noise(1, path=path)
    with torch.no_grad():
        seen = [step.x for step in steps(plan, MODEL.x0, X, noise)][1:]
        went = [step.x for step in transitions(plan, MODEL, X, noise)]
    assert len(seen) == len(went)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(seen, went, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_densities_are_those_of_torch(rule: Multistep) -> None:
    for step in transitions(plan_of(rule), MODEL, X, Noise(1)):
        if step.log_prob is None:
            assert step.std == 0 and torch.equal(step.x, step.mean)
        else:
            truth = Normal(step.mean, torch.as_tensor(step.std, dtype=F64)).log_prob(step.x).sum(1)
            assert torch.allclose(step.log_prob, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_the_gradient_of_a_log_density_is_that_of_differences(rule: Multistep) -> None:
    plan = plan_of(rule, end=0.01)
    states = [step.x for step in transitions(plan, MODEL, X, Noise(1))]

    def total() -> Tensor:
        return sum(s.log_prob.sum() for s in transitions(plan, MODEL, X, states=states) if s.log_prob is not None)  # type: ignore[return-value, misc]

    assert all(not s.x.requires_grad for s in transitions(plan, MODEL, X, Noise(1)))
    weight = NET.layers[2].weight
    (grad,) = torch.autograd.grad(total(), [weight])
    for i, j in ((0, 0), (1, 7)):
        values = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                weight[i, j] += h
                values.append(float(total()))
                weight[i, j] -= h
        assert float(grad[i, j]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-5)


def test_an_earlier_run_has_the_density_it_had() -> None:
    plan = plan_of(RULES[1])
    first = list(transitions(plan, MODEL, X, Noise(1)))
    again = list(transitions(plan, MODEL, X, states=[s.x for s in first]))
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.mean, b.mean)
        assert (a.log_prob is None) == (b.log_prob is None)
    assert torch.equal(first[-1].x, run(plan, MODEL.x0, X, Noise(1)).detach()) or torch.allclose(
        first[-1].x, run(plan, MODEL.x0, X, Noise(1)).detach(), atol=1e-12
    )


def test_the_gradient_of_a_reward_is_the_score_function_estimate() -> None:
    """E[∇ log p · R] = ∇ E[R]: one step of the SDE on one Gaussian, R = the state, against its closed form."""

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mu = nn.Parameter(torch.tensor(0.3, dtype=F64))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.mu.expand_as(x)

    net = Shift()
    model = ss.Denoiser(net, ss.VP(), predicts="x0")
    plan = Multistep(1, eta=1.0).plan(model.sde, torch.tensor([0.8, 0.3], dtype=F64))
    n = 100_000
    (step,) = transitions(plan, model, torch.zeros(n, 1, dtype=F64), Noise(0))
    assert step.log_prob is not None
    reward = step.x[:, 0] - step.x.mean()
    (estimate,) = torch.autograd.grad((step.log_prob * reward).mean(), [net.mu])
    weight = plan.rows[1].d[0][1]
    assert abs(float(estimate) - weight) < 4 * 1.5 * abs(weight) / n**0.5


def test_plans_without_densities_are_refused() -> None:
    pece = Multistep(2, corrector=2, reevaluate=True, eta=1.0).plan(MODEL.sde, ss.grids.karras(MODEL.sde, 4))
    with pytest.raises(ValueError, match="shared with other rows"):
        list(transitions(pece, MODEL, X, Noise(0)))
    plan = plan_of(RULES[0])
    with pytest.raises(ValueError, match="either `noise`"):
        list(transitions(plan, MODEL, X))
    with pytest.raises(ValueError, match="one entry for each of 6 transitions"):
        list(transitions(plan, MODEL, X, states=[X]))


def test_a_solution_keeps_its_transitions_when_asked() -> None:
    model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), std=0.2)
    found = ss.solve(model, (5, 2), ss.DDPM(), steps=6, seed=3, watch=ss.Watch(transitions=True))
    plain = ss.solve(model, (5, 2), ss.DDPM(), steps=6, seed=3)
    torch.testing.assert_close(found.x, plain.x, rtol=1e-6, atol=1e-6)
    assert plain.transitions == () and torch.equal(found.transitions[-1].x, found.x)
    for step in found.transitions:
        if step.log_prob is not None:
            normal = torch.distributions.Normal(step.mean, torch.as_tensor(step.std))
            torch.testing.assert_close(step.log_prob, normal.log_prob(step.x).sum(1), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="drop the other fields of `watch`"):
        ss.solve(model, (5, 2), ss.DDPM(), steps=6, watch=ss.Watch(transitions=True, save_at="all"))


def test_rows_of_any_kind_have_the_formula_of_their_row() -> None:
    """A stage, a constant, a row of noise alone, and a row without noise: mean = Σ a x + Σ b d + e, std = |c|."""
    rows = (
        Row(1.0, evaluates=True, node=0),
        Row(0.7, x=((0, 0.5),), d=((0, 0.3),), z=((0, -0.4),), one=0.25, evaluates=True),
        Row(0.5, z=((1, 2.0),), one=-1.0, node=1),
        Row(0.2, x=((2, 0.5), (0, 0.1)), d=((1, 0.2),), node=2),
    )
    plan, noise = Plan(rows), Noise(4)
    z = [noise.like(X, k) for k in (0, 1)]
    with torch.no_grad():
        found = list(transitions(plan, MODEL, X, noise))
        d0 = MODEL.x0(X, 1.0)
        means = [0.5 * X + 0.3 * d0 + 0.25, torch.full_like(X, -1.0)]
        states = [means[0] - 0.4 * z[0], means[1] + 2.0 * z[1]]
        means.append(0.5 * states[1] + 0.1 * X + 0.2 * MODEL.x0(states[0], 0.7))
        states.append(means[2])
    assert [step.t for step in found] == [0.7, 0.5, 0.2] and [step.std for step in found] == [0.4, 2.0, 0.0]
    for step, mean, state in zip(found, means, states, strict=True):
        assert torch.allclose(step.mean, mean, rtol=1e-13, atol=1e-14)
        assert torch.allclose(step.x, state, rtol=1e-13, atol=1e-14)
    assert [step.log_prob is None for step in found] == [False, False, True]


def test_conditions_belong_to_the_denoiser() -> None:
    model = ss.Denoiser(lambda x, t, shift: x + shift[:, None], ss.VP(), predicts="x0")
    shift = torch.arange(6, dtype=F64)
    plan = plan_of(RULES[0])
    found = [step.x for step in transitions(plan, model.given(shift=shift), X, Noise(1))]
    want = run(plan, lambda x, t: x + shift[:, None], X, Noise(1))
    assert torch.allclose(found[-1], want, rtol=1e-12)
    with pytest.raises(TypeError, match="unexpected keyword argument 'shift'"):
        next(transitions(plan, model, X, Noise(1), shift=shift))  # type: ignore[call-arg]


def test_states_are_freed_as_in_the_loop() -> None:
    plan = Multistep(3, eta=1.0).plan(MODEL.sde, ss.grids.karras(MODEL.sde, 8))
    alive: list[weakref.ref[Tensor]] = []
    at_network = []
    gc.collect()
    gc.freeze()  # what other tests left behind, so that the collections below look at this run alone

    def net(x: Tensor, t: Tensor) -> Tensor:
        gc.collect()
        at_network.append(sum(ref() is not None for ref in alive))
        alive.append(weakref.ref(out := 0.5 * x))
        return out

    with torch.no_grad():
        for step in transitions(plan, ss.Denoiser(net, MODEL.sde, predicts="x0"), torch.ones(2, 7), Noise(0)):
            alive.append(weakref.ref(step.x))
            alive.append(weakref.ref(step.mean))
            del step
    assert max(at_network) <= plan.memory


def test_per_sample_grids_have_deviations_of_their_own() -> None:
    times = torch.tensor([[1.0, 0.9], [0.6, 0.5], [0.3, 0.2]], dtype=F64)
    found = list(transitions(RULES[0].plan(MODEL.sde, times), MODEL, X[:2], Noise(1)))
    for b in range(2):
        alone = list(transitions(RULES[0].plan(MODEL.sde, times[:, b]), MODEL, X[b : b + 1], Noise(1)[[b]]))
        for step, one in zip(found, alone, strict=True):
            assert torch.allclose(step.x[b], one.x[0], rtol=1e-12)
            assert step.log_prob is not None and one.log_prob is not None
            assert torch.allclose(step.log_prob[b], one.log_prob[0], rtol=1e-10)
