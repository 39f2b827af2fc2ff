"""A model that returns NaN: every function that evaluates a model says so, and names the sample."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import analysis, denoisers, fitting, integrators, inverse, likelihood, policies, sampling, steering

F64 = torch.float64
SDE = ss.VP()
MIX = ss.GaussianMixture(SDE, torch.tensor([[-1.0, 0.5, 0.0], [1.0, -0.5, 0.3]], dtype=F64), std=0.4)
B, SICK = 6, 3
X, Z = MIX.sample(B, seed=1), ss.Noise(4).normal((B, 3), 0, dtype=F64)
FIVE, SHORT = ss.grids.karras(SDE, 5), ss.grids.karras(SDE, 3)


class Sick(denoisers.Wrapped):
    """The exact model, with NaN in some rows at times below a limit."""

    per_sample = ("sick",)

    def __init__(self, sick: Tensor, below: float = 2.0) -> None:
        super().__init__(MIX)
        self.sick, self.below = sick, below

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        out = self.model.x0(x, t, **cond)
        time = torch.as_tensor(t, dtype=F64).expand(len(x))
        return torch.where((self.sick & (time < self.below))[:, None], math.nan, out)


NONE, ALL = torch.zeros(B, dtype=torch.bool), torch.ones(B, dtype=torch.bool)
ONE = torch.arange(B) == SICK


def measured(rows: int = B) -> inverse.Measurement:
    mask = inverse.Mask(torch.tensor([True, False, False]))
    return inverse.Measurement(mask, torch.zeros(rows, 1, dtype=F64), std=0.5)


Call = Callable[[denoisers.AbstractDenoiser], Any]


def sampled(method: Any = None, steps: int | None = 4, **options: Any) -> Call:
    return lambda m: ss.sample(m, Z, method, steps=steps, seed=0, **options)


def under(wrapper: Callable[[denoisers.AbstractDenoiser], denoisers.AbstractDenoiser]) -> Call:
    return lambda m: ss.sample(wrapper(m), Z, steps=4, seed=0)


def learned(m: denoisers.AbstractDenoiser) -> Tensor:
    class Wide(denoisers.Wrapped):
        def x0_and_variance(self, x: Tensor, t: Any, **cond: Any) -> tuple[Tensor, Tensor]:
            return self.model.x0(x, t), torch.zeros_like(x)

    return ss.sample(Wide(m), Z, sampling.LearnedVariance(), steps=4, seed=0)


REWARD, PARTICLES = steering.Reward(lambda x: x[:, 0]), Z[:, None].expand(B, 3, 3)
KEEP = ss.Watch(transitions=True)
eight, steps = likelihood.Tolerance(steps=8), {"options": {"step_size": 0.5}}
bytes_ = torch.arange(3 * B).reshape(B, 3) % 8

CALLS: dict[str, Call] = {
    "sampling.sample": sampled(),
    "sampling.solve": lambda m: ss.solve(m, Z, ss.DDPM(), steps=4, seed=0).x,
    "sampling.solve, transitions": lambda m: ss.solve(m, Z, ss.DDPM(), steps=4, seed=0, watch=KEEP).x,
    "sampling.capture": lambda m: sampling.capture(m, Z.shape, steps=4, start=ss.Start(dtype=F64))(0, x=Z),
    "sampling.LangevinCorrector": sampled(ss.DDPM(), watch=ss.Watch(hook=sampling.LangevinCorrector(seed=1))),
    "sampling.LearnedVariance": learned,
    "sampling.Parallel": sampled(sampling.Parallel(ss.DDPM(), window=3)),
    "sampling.encode": lambda m: ss.encode(m, X, steps=4),
    "sampling.decode": lambda m: ss.decode(m, Z, steps=4),
    "sampling.interpolate": lambda m: sampling.interpolate(m, X, X.flip(0), 3, steps=4).transpose(0, 1),
    "sampling.langevin": lambda m: sampling.langevin(m, X, 0.2, 0.01, n=3, seed=0),
    "sampling.transitions": lambda m: [*sampling.transitions(ss.DDPM().plan(SDE, FIVE), m, Z, ss.Noise(0))][-1].x,
    "policies.rollout": lambda m: policies.rollout(m, Z, steps=4, seed=0).x,
    "policies.replay": lambda m: policies.replay(policies.rollout(MIX, Z, steps=4, seed=0), m)[-1].mean,
    "sampling.mean_squared_score": lambda m: sampling.mean_squared_score(m, X, FIVE),
    "integrators.Adaptive": sampled(ss.Adaptive(), None),
    "integrators.AdaptiveSDE": sampled(integrators.AdaptiveSDE(), None),
    "integrators.Reversible": sampled(integrators.Reversible()),
    "integrators.TorchDiffEq, adaptive": sampled(integrators.TorchDiffEq(), None),
    "integrators.TorchDiffEq, fixed": sampled(integrators.TorchDiffEq("rk4", **steps), None),
    "integrators.TorchDiffEq, implicit": sampled(integrators.TorchDiffEq("implicit_adams", **steps), None),
    "integrators.TorchSDE, srk": sampled(integrators.TorchSDE(steps=5), None),
    "integrators.TorchSDE, euler": sampled(integrators.TorchSDE("euler", steps=5), None),
    "integrators.TorchSDE, adaptive": sampled(integrators.TorchSDE(adaptive=True), None),
    "integrators.flow": lambda m: integrators.flow(m, X, 0.1, 0.5).x,
    "likelihood.log_prob": lambda m: ss.log_prob(m, X).value,
    "likelihood.log_prob, fixed": lambda m: ss.log_prob(m, X, tolerance=eight).value,
    "likelihood.log_prob, probes": lambda m: ss.log_prob(m, X, probes="hutchinson", tolerance=eight, seed=0).value,
    "likelihood.FlowDensity": sampled(likelihood.FlowDensity(), None),
    "likelihood.FlowDensity, fixed": lambda m: ss.solve(m, Z, likelihood.FlowDensity(tolerance=eight)).log_prob.value,
    "likelihood.elbo": lambda m: ss.elbo(m, X, seed=0).value,
    "likelihood.elbo, grid": lambda m: ss.elbo(m, X, grid=FIVE[:-1], seed=0).value,
    "likelihood.denoiser_error": lambda m: likelihood.denoiser_error(m, MIX, X, [0.1, 0.2], seed=0),
    "likelihood.denoiser_error, exact": lambda m: likelihood.denoiser_error(MIX, m, X, [0.1, 0.2], seed=0),
    "likelihood.path_kl": lambda m: likelihood.path_kl(m, MIX, X, seed=0),
    "likelihood.path_kl, other": lambda m: likelihood.path_kl(MIX, m, X, seed=0),
    "likelihood.dequantized_bits": lambda m: likelihood.dequantized_bits(
        lambda x: ss.log_prob(m, x, tolerance=eight).value, bytes_, 8, n=2, seed=0
    ),
    "likelihood.bits_per_dim": lambda m: ss.bits_per_dim(m, bytes_, 8, tolerance=eight, seed=0),
    "fitting.fit": lambda m: fitting.fit(ss.DDIM(), m, Z, grid=SHORT),
    "fitting.gits": lambda m: fitting.gits(m, Z, 4, fine=12),
    "fitting.equal_error": lambda m: fitting.equal_error(m, Z, 4, fine=12),
    "fitting.align_your_steps": lambda m: fitting.align_your_steps(m, X, 4, fine=12),
    "fitting.estimate_statistics": lambda m: fitting.estimate_statistics(m, X, n=6),
    "fitting.estimate_entry_statistics": lambda m: fitting.estimate_entry_statistics(m, X, n=6).l,
    "fitting.expansion": lambda m: fitting.expansion(m, Z, ss.DDIM().plan(SDE, FIVE)),
    "analysis.convergence_order": lambda m: analysis.convergence_order(
        ss.DDIM(), m, steps=(5, 10), t_end=0.1, x=Z, reference=lambda x, s, t: x
    ),
    "analysis.exact_flow": lambda m: analysis.exact_flow(m, 20)(Z, 1.0, 0.1),
    "analysis.work_precision": lambda m: analysis.work_precision([ss.DDIM()], m, nfes=(5,), x=Z, truth=Z),
    "inverse.ddrm": lambda m: inverse.ddrm(m, measured(), Z, 4, seed=0).x,
    "inverse.daps": lambda m: inverse.daps(m, measured(), Z, 4, seed=0).x,
    "inverse.red_diff": lambda m: inverse.red_diff(m, measured(), Z, 4, seed=0).x,
    "inverse.twisted_smc": lambda m: inverse.twisted_smc(m, measured(1), Z, 4, seed=0),
    "inverse.Replacement": sampled(ss.DDIM(), watch=ss.Watch(hook=inverse.Replacement(SDE, measured(), seed=0))),
    "inverse.DPS": under(lambda m: inverse.DPS(m, measured())),
    "inverse.PiGDM": under(lambda m: inverse.PiGDM(m, measured())),
    "inverse.MMPS": under(lambda m: inverse.MMPS(m, measured())),
    "inverse.MPGD": under(lambda m: inverse.MPGD(m, measured())),
    "inverse.TMPD": under(lambda m: inverse.TMPD(m, measured())),
    "inverse.DDNM": under(lambda m: inverse.DDNM(m, measured())),
    "inverse.TallPosterior": under(lambda m: inverse.TallPosterior([m, m], None, m, method="jac")),
    "inverse.DiffPIR": under(lambda m: inverse.DiffPIR(m, measured())),
    "steering.steer": lambda m: steering.steer(m, REWARD, PARTICLES, ss.DDPM(), particles=3, grid=4, seed=0),
    "steering.steer, gradient": lambda m: steering.steer(
        MIX, REWARD, PARTICLES, ss.DDPM(), particles=3, proposal=m, grid=4, seed=0
    ),
    "steering.power": lambda m: steering.sample_composition(steering.power(m, 1.5), PARTICLES, 4, particles=3, seed=0),
    "guidance.Clamp": under(ss.guidance.Clamp),
    "guidance.DynamicThreshold": under(ss.guidance.DynamicThreshold),
    "guidance.ClassifierGuidance": under(lambda m: ss.guidance.ClassifierGuidance(m, lambda x, t: -x.square().sum(1))),
    "guidance.AutoGuidance": under(lambda m: ss.guidance.AutoGuidance(m, MIX, 2.0)),
    "guidance.AutoGuidance, weak": under(lambda m: ss.guidance.AutoGuidance(MIX, m, 2.0)),
    "guidance.Compose": under(lambda m: ss.guidance.Compose(m, [MIX], [0.5])),
    "denoisers.Rescheduled": under(lambda m: denoisers.Rescheduled(m, ss.Cosine())),
}

# Results that depend on all samples.
TOGETHER = {"integrators.TorchSDE, adaptive"}

# Public names with a model that evaluate none by themselves.
OTHER = {
    "sampling.default_grid": "reads its kind",
    "sampling.default_solver": "reads its kind",
    "sampling.recommend": "reads its kind",
    "sampling.plan_for": "reads its process and kind",
    "policies.nft_loss": "a loss, which is not finite where its network is not",
    "policies.dpo_loss": "a loss, which is not finite where its network is not",
    "sampling.Captured": "made by capture",
    "sampling.profile": "measures times",
    "denoisers.Wrapped": "a base",
    "denoisers.Given": "passes the call on",
    "denoisers.check_denoiser": "reports it in its message",
    "integrators.Problem": "a record",
    "integrators.Method": "a base",
    "guidance.linear": "a rule",
    "guidance.plus_plus": "a rule",
    "integrators.ReverseSDE": "the equation of TorchSDE",
    "inverse.PosteriorDenoiser": "a base",
    "inverse.LinearPosteriorDenoiser": "a base",
    "guidance.ClassifierFree": "needs a network with conditions, below",
}


def outcome(call: Call, model: denoisers.AbstractDenoiser) -> tuple[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = call(model)
        except (ValueError, integrators.SolverError) as error:
            return f"error: {error}", None
    return "; ".join(f"warning: {w.message}" for w in caught), result


def test_the_list_holds_every_public_name_that_takes_a_model() -> None:
    listed = {name.split(",")[0] for name in CALLS} | set(OTHER)
    users = (fitting, analysis, policies, steering, inverse)
    for folder in (sampling, integrators, likelihood, *users, denoisers, ss.guidance):
        for name in folder.__all__:
            value = getattr(folder, name)
            if not callable(value) or getattr(value, "__module__", "") == "typing":
                continue
            method = inspect.isclass(value) and issubclass(value, integrators.Method)
            try:
                takes = "model" in inspect.signature(value).parameters
            except (ValueError, TypeError):
                continue
            full = f"{folder.__name__.removeprefix('scoresde.')}.{name}"
            assert not (takes or method) or full in listed, full


@pytest.mark.parametrize("name", CALLS)
def test_a_model_that_returns_nan_is_reported_with_the_sample(name: str) -> None:
    call = CALLS[name]
    said, healthy = outcome(call, Sick(NONE))
    assert not said, said
    for sick, below, first in ((ALL, 2.0, 0), (ONE, 2.0, SICK), (ONE, 0.3, SICK)):
        said, result = outcome(call, Sick(sick, below))
        assert f"sample {first}" in said.lower() and "finite" in said, (below, said)
        if isinstance(result, Tensor) and len(result) == B and name not in TOGETHER:
            finite = result[sick].isfinite().reshape(int(sick.sum()), -1).all(1)
            assert not bool(finite.any()), "no result where the model has none"
            torch.testing.assert_close(result[~sick], healthy[~sick], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["likelihood.elbo", "likelihood.path_kl", "sampling.transitions", "sampling.mean_squared_score"]
)
def test_the_time_is_named_where_it_is_known(name: str) -> None:
    said, _ = outcome(CALLS[name], Sick(ONE, 0.3))
    time = float(said.split("t = ")[1].split(";")[0])
    assert 0 < time < 0.3


def test_the_warning_points_to_the_callers_line() -> None:
    with pytest.warns(UserWarning, match="1 of 6, the first is sample 3") as caught:
        ss.sample(Sick(ONE), Z, steps=2)
    assert [w.filename for w in caught] == [__file__]


def test_guidance_without_a_classifier() -> None:
    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return torch.where((label == 1)[:, None], math.nan, 0.5 * x)

    guided = ss.ClassifierFree(ss.Denoiser(net, SDE, predicts="x0"), 2.0, null={"label": 0})
    with pytest.warns(UserWarning, match="1 of 6, the first is sample 3"):
        ss.sample(guided.given(label=ONE.long()), Z, steps=3)


def test_a_check_of_a_network_reports_it() -> None:
    network = ss.Denoiser(lambda x, t: math.nan * x, SDE, predicts="eps")
    found = ss.check_denoiser(network, X)
    assert not found and "not finite" in found.message


def test_metrics_refuse_samples_that_are_not_finite() -> None:
    sick = X.clone()
    sick[SICK, 1] = math.nan
    for metric in (ss.metrics.sliced_w2, ss.metrics.energy_distance, ss.metrics.mmd_rbf, ss.metrics.frechet):
        for pair in ((sick, X), (X, sick)):
            with pytest.raises(ValueError, match="finite"):
                metric(*pair)
    for refuse in (ss.metrics.c2st, ss.metrics.moments):
        with pytest.raises(ValueError, match="finite"):
            refuse(sick, X)
    with pytest.raises(ValueError, match="finite"):
        ss.metrics.compare(ss.metrics.energy_distance, sick, X)
    with pytest.raises(ValueError, match="finite"):
        ss.metrics.w2_1d(sick[:, 1], X[:, 1])
