"""Estimators of sbi: with the exact score inside, our solvers and densities give the exact posterior."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import scoresde as ss

pytest.importorskip("sbi", reason="sbi is not installed")

from sbi.diagnostics import run_sbc
from sbi.inference.posteriors.base_posterior import NeuralPosterior
from sbi.inference.posteriors.vector_field_posterior import VectorFieldPosterior
from sbi.neural_nets.estimators.flowmatching_estimator import FlowMatchingEstimator
from sbi.neural_nets.estimators.score_estimator import (
    ConditionalScoreEstimator,
    SubVPScoreEstimator,
    VEScoreEstimator,
    VPScoreEstimator,
)
from sbi.utils import BoxUniform

# A linear-Gaussian task: θ ~ N(0, I), x = A θ + noise. The posterior is N(K x, C), known in closed form.
A = torch.tensor([[1.0, 0.5], [0.0, 0.8]], dtype=torch.float64)
C = torch.linalg.inv(torch.eye(2, dtype=torch.float64) + A.T @ A / 0.3**2)
K = C @ A.T / 0.3**2
PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
X_O = torch.tensor([0.7, -0.4])


def exact(x_o: Tensor = X_O) -> MultivariateNormal:
    return MultivariateNormal(K @ x_o.double(), C)


class Ideal(nn.Module):
    """The network inside an estimator of sbi whose output is then exact, for the posterior N(K x, C) on the z-scale.

    sbi makes its score of the network's output n as −(α/σ) n minus the score of a Gaussian; this is solved for n.
    """

    def __init__(self, kind: str, shift: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.kind, self.shift, self.scale = kind, shift.double(), scale.double()
        self.mean_0, self.std_0 = torch.zeros(2), torch.ones(2)
        self.noise_scale = 1e-3
        self.one = nn.Parameter(torch.ones(()))  # sbi reads the device of the first parameter

    def forward(self, z: Tensor, x_o: Tensor, t: Tensor) -> Tensor:
        z, x_o, t = z.double(), x_o.double(), t.double()[:, None]
        mean, cov = (x_o @ K.T - self.shift) / self.scale, C / self.scale[:, None] / self.scale
        if self.kind == "flow":
            alpha, sigma = 1 - t, t + self.noise_scale
            root = ((alpha * self.std_0) ** 2 + t**2 + 1e-6).sqrt()
        else:  # the time that sbi gives to the network is σ
            sigma = t
            alpha = {"vp": (1 - t**2).sqrt(), "subvp": (1 - t).sqrt(), "ve": torch.ones_like(t)}[self.kind]
            root = ((alpha * self.std_0) ** 2 + sigma**2).sqrt()
        theta = z * root + alpha * self.mean_0
        total = alpha[..., None] ** 2 * cov + sigma[..., None] ** 2 * torch.eye(2, dtype=torch.float64)
        score = -torch.linalg.solve(total, (theta - alpha * mean)[..., None])[..., 0]
        if self.kind == "flow":
            x0 = (theta + sigma**2 * score) / alpha.clamp_min(1e-9)
            x0 = torch.where(alpha < 1e-9, mean, x0)
            velocity = -sigma * score - x0
            out = (velocity + self.mean_0) / (1 + self.std_0**2).sqrt()
        else:
            out = -(score + (theta - alpha * self.mean_0) / root**2) * sigma / alpha
        return (out * self.one.double()).float()


def estimator(kind: str, *, composed: bool = False) -> Any:
    """An exact estimator, z-scored inside, or outside if `composed`."""
    shift, scale = torch.tensor([0.2, -0.5]), torch.tensor([0.4, 0.7])
    apart = (shift, scale) if composed else (torch.zeros(2), torch.ones(2))
    net = Ideal(kind, *apart)
    sizes: dict[str, Any] = {"net": net, "input_shape": torch.Size([2]), "condition_shape": torch.Size([2])}
    if not composed:
        net.mean_0, net.std_0 = shift, scale
        sizes |= {"mean_0": shift, "std_0": scale}
    made = {"vp": VPScoreEstimator, "subvp": SubVPScoreEstimator, "ve": VEScoreEstimator, "flow": FlowMatchingEstimator}
    own = made[kind](**sizes)
    if composed:
        own._theta_shift.copy_(shift)
        own._theta_scale.copy_(scale)
        own._compose_standardization.fill_(True)
    return own


KINDS = ("vp", "subvp", "ve", "flow")


@pytest.mark.parametrize("kind", KINDS)
def test_the_process_and_the_prediction_are_those_of_sbi(kind: str) -> None:
    own = estimator(kind)
    model = ss.interop.from_sbi(own)
    assert isinstance(model, ss.Denoiser)
    u = torch.linspace(0.02, 0.98, 9, dtype=torch.float64)
    t = u * model.sde.T
    theirs = t if model.time is None else model.time(t)  # type: ignore[operator]
    scale = 1 + own.noise_scale if kind == "flow" else 1.0
    for ours, fn in ((model.sde.alpha, own.mean_t_fn), (model.sde.sigma, own.std_fn)):
        if kind == "flow" and fn == own.mean_t_fn:
            assert torch.allclose(scale * model.sde.alpha(t), 1 - theirs)  # sbi's function stops at 0.99
        else:
            assert torch.allclose(scale * ours(t), fn(theirs).squeeze(-1).double(), rtol=1e-5)
    assert (model.sde.T, theirs[-1] < own.t_max) == (model.sde.T, True)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)) * model.sde.sigma(model.sde.T)
    rows = X_O.expand(9, 2)
    if kind != "flow":
        score = own.score(input=x, condition=rows, t=theirs.float())
        assert torch.allclose(model.score(x, t.float(), x_o=rows), score, rtol=1e-4, atol=1e-4)
    else:
        assert torch.allclose(model.velocity(x, t.float(), x_o=rows), own(scale * x, rows, theirs.float()), atol=1e-5)


@pytest.mark.parametrize("composed", [False, True], ids=["z-scored inside", "composed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_data_prediction_is_that_of_the_exact_posterior(kind: str, composed: bool) -> None:
    model = ss.interop.from_sbi(estimator(kind, composed=composed), X_O)
    assert isinstance(model, ss.denoisers.Given)
    card = model.model.card  # type: ignore[union-attr]
    scale = card.scale if composed else ss.data.Standardize(torch.zeros(2), torch.ones(2))
    assert card is not None and scale is not None and (card.event, card.conditions) == ((2,), ("x_o",))
    cov = C / scale.std.double()[:, None] / scale.std.double()
    truth = ss.Gaussian.of(model.sde, scale(exact().mean[None].float())[0].double(), cov)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    for u in (0.01, 0.1, 0.5, 0.9):
        t = u * model.sde.T
        state = model.sde.perturb(truth.sample(8, seed=0).float(), t, x)
        # The network's float32 output is amplified by σ/α.
        assert torch.allclose(
            model.x0(state, t), truth.x0(state, t), atol=2e-5 * (1 + model.sde.sigma(t) / model.sde.alpha(t))
        )


@pytest.mark.parametrize("kind", KINDS)
def test_few_evaluations_give_the_exact_posterior(kind: str) -> None:
    """With the exact score only the solver errs; its moments are compared with those of sbi's own sampler."""
    own, n = estimator(kind), 4000
    ours = ss.interop.sbi_posterior(own, PRIOR, nfe=16).set_default_x(X_O)
    theta = ours.sample((n,), seed=0).double()
    truth = exact()
    assert theta.shape == (n, 2)
    z = torch.linalg.solve_triangular(truth.scale_tril, (theta - truth.mean).T, upper=False).T
    noise = 4 / math.sqrt(n)  # four standard errors of a mean; the variance of a square is 2
    assert float(z.mean(0).abs().max()) < noise
    assert float((torch.cov(z.T) - torch.eye(2)).abs().max()) < math.sqrt(2) * noise


def test_sbi_s_own_sampler_agrees_with_more_evaluations() -> None:
    own, n = estimator("vp"), 1000
    torch.manual_seed(0)
    theirs = VectorFieldPosterior(own, PRIOR).sample((n,), x=X_O, steps=200, show_progress_bars=False).double()
    ours = ss.interop.sbi_posterior(own, PRIOR, nfe=16).sample((n,), x=X_O, seed=0).double()
    truth = exact()
    errors = []
    for theta in (theirs, ours):
        z = torch.linalg.solve_triangular(truth.scale_tril, (theta - truth.mean).T, upper=False).T
        errors.append(float((torch.cov(z.T) - torch.eye(2)).norm() + z.mean(0).norm()))
    assert errors[1] < errors[0] + 0.05 and max(errors) < 0.3, errors  # 0.1 is the noise of 1000 samples


def of_the_flow(own: Any, theta: Tensor) -> Tensor:
    """Log-density of the exact flow that starts from the base of sbi instead of the marginal at T, in closed form."""
    sde = ss.interop.from_sbi(own).sde
    shift, scale = own.from_z(torch.zeros(1, 2))[0].double(), own._theta_scale[0].double()
    z, mean, cov = (theta - shift) / scale, (exact().mean - shift) / scale, C / scale[:, None] / scale
    end = ss.Gaussian.of(sde, mean, cov).flow(z, 0.0, sde.T)
    alpha, sigma = sde.alpha(sde.T), sde.sigma(sde.T)
    mean_0, std_0 = (v.double().expand(2) for v in (own.mean_0, own.std_0))
    base = MultivariateNormal(alpha * mean_0, torch.diag(alpha**2 * std_0**2 + sigma**2))
    marginal = MultivariateNormal(alpha * mean, alpha**2 * cov + sigma**2 * torch.eye(2))
    return exact().log_prob(theta) - marginal.log_prob(end) + base.log_prob(end)


@pytest.mark.parametrize("composed", [False, True], ids=["z-scored inside", "composed"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_log_density_is_that_of_the_exact_flow(kind: str, composed: bool) -> None:
    """A signal is left at T, and sbi's base is not the marginal there, so the exact density is about 0.1 nats away."""
    own = estimator(kind, composed=composed)
    theta = exact().mean + 0.3 * torch.tensor([[0.0, 0.0], [1.0, 0.5], [-1.0, 1.0], [0.2, -2.0]], dtype=torch.float64)
    posterior = ss.interop.sbi_posterior(own, PRIOR)
    value = posterior.log_prob(theta.float(), x=X_O)
    assert value.dtype == torch.float32 and value.shape == (4,)
    assert torch.allclose(value.double(), of_the_flow(own, theta), atol=1e-3)
    assert torch.allclose(value.double(), exact().log_prob(theta), atol=1e-3 if kind == "flow" else 0.3)


def test_the_log_density_is_that_of_sbi_with_fewer_digits() -> None:
    own = estimator("vp")
    theta = exact().mean.float() + torch.tensor([[0.0, 0.0], [0.3, 0.15], [-0.3, 0.3]])
    theirs = VectorFieldPosterior(own, PRIOR).log_prob(theta, x=X_O, ode_kwargs={"exact": True})
    assert torch.allclose(ss.interop.sbi_posterior(own, PRIOR).log_prob(theta, x=X_O), theirs, atol=0.02)


def test_samples_keep_to_the_support_of_the_prior() -> None:
    edge = exact().mean[0]
    prior = BoxUniform(torch.tensor([float(edge), -5.0]), torch.tensor([5.0, 5.0]))
    posterior = ss.interop.sbi_posterior(estimator("flow"), prior, nfe=12).set_default_x(X_O)
    assert isinstance(posterior, VectorFieldPosterior) and isinstance(posterior, NeuralPosterior)
    theta = posterior.sample((300,), seed=1)
    assert theta.shape == (300, 2) and bool((theta[:, 0] >= edge).all())
    truth = exact()
    half = float(truth.mean[0] + truth.covariance_matrix[0, 0].sqrt() * math.sqrt(2 / math.pi))  # of a half-normal
    assert abs(float(theta[:, 0].mean()) - half) < 4 * float(truth.covariance_matrix[0, 0].sqrt()) * 0.6 / math.sqrt(
        300
    )
    with pytest.warns(UserWarning, match="prior"):
        free = posterior.sample((300,), seed=1, reject_outside_prior=False)
    assert 0.35 < float((free[:, 0] >= edge).double().mean()) < 0.65
    value = posterior.log_prob(torch.stack([theta[0], theta[0] - torch.tensor([3.0, 0.0])]))
    assert torch.isfinite(value[0]) and value[1] == -math.inf


def test_samples_depend_on_the_seed_alone() -> None:
    posterior = ss.interop.sbi_posterior(estimator("flow"), PRIOR, nfe=6).set_default_x(X_O)
    whole = posterior.sample((10,), seed=3)
    assert torch.equal(whole, posterior.sample((2, 5), seed=3).reshape(10, 2))
    assert torch.allclose(whole, posterior.sample((10,), seed=3, max_sampling_batch_size=4, reject_outside_prior=False))
    torch.manual_seed(5)
    first = posterior.sample((3,))
    torch.manual_seed(5)
    assert torch.equal(first, posterior.sample((3,))) and not torch.equal(first, posterior.sample((3,)))
    assert posterior.sample(seed=3).shape == (2,)


def test_a_batch_of_observations_has_one_posterior_each() -> None:
    posterior = ss.interop.sbi_posterior(estimator("vp"), PRIOR, nfe=12)
    x = torch.tensor([[0.7, -0.4], [-1.0, 1.0], [0.0, 0.0]])
    theta = posterior.sample_batched((400,), x, seed=0)
    assert theta.shape == (400, 3, 2)
    for n in range(3):
        truth = exact(x[n])
        error = (theta[:, n].double().mean(0) - truth.mean) / truth.variance.sqrt()
        assert float(error.abs().max()) < 4 / 20 + 0.05, n
    one_by_one = posterior.sample_batched((400,), x, seed=0, reject_outside_prior=False, max_sampling_batch_size=100)
    assert torch.allclose(theta, one_by_one, atol=1e-5)


def test_the_diagnostics_of_sbi_accept_the_posterior() -> None:
    posterior = ss.interop.sbi_posterior(estimator("flow"), PRIOR, nfe=10)
    torch.manual_seed(0)
    theta = PRIOR.sample((100,))
    x = theta @ A.T.float() + 0.3 * torch.randn(100, 2)
    ranks, dap = run_sbc(theta, x, posterior, num_posterior_samples=100, show_progress_bar=False)
    assert ranks.shape == (100, 2) and dap.shape == (100, 2)
    # Ranks of an exact posterior are uniform: the mean of 100 has a standard error of 2.9.
    assert float((ranks.double().mean(0) - 50).abs().max()) < 4 * 2.9


def test_a_posterior_of_sbi_is_taken_over() -> None:
    theirs = VectorFieldPosterior(estimator("ve"), PRIOR).set_default_x(X_O)
    ours = ss.interop.sbi_posterior(theirs, nfe=40)
    assert ours.prior is PRIOR and torch.equal(ours.default_x, theirs.default_x)
    assert ours.sample((5,), seed=0).shape == (5, 2)
    other = ss.interop.sbi_posterior(theirs, solver=ss.Adaptive())
    assert torch.allclose(other.sample((5,), seed=0), ours.sample((5,), seed=0), atol=0.05)


class Steep(ConditionalScoreEstimator):
    """An estimator with a process of its own."""

    def mean_t_fn(self, times: Tensor) -> Tensor:
        return (1 - 0.9 * times**2)[:, None]

    def std_fn(self, times: Tensor) -> Tensor:
        return (0.01 + times)[:, None]

    def drift_fn(self, input: Tensor, times: Tensor) -> Tensor:
        return input

    def diffusion_fn(self, input: Tensor, times: Tensor) -> Tensor:
        return input


def test_an_estimator_with_functions_of_its_own_has_its_own_process() -> None:
    own = Steep(Ideal("ve", torch.zeros(2), torch.ones(2)), torch.Size([2]), torch.Size([2]))
    sde = ss.interop.from_sbi(own).sde
    assert sde.alpha(0.5) == pytest.approx(0.775) and sde.sigma(0.5) == pytest.approx(0.51)


def test_what_is_no_diffusion_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`estimator` must be a score or flow-matching estimator of sbi.*got Linear"):
        ss.interop.from_sbi(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="`prior` must be given"):
        ss.interop.sbi_posterior(estimator("vp"))
    with pytest.raises(ValueError, match=r"`x_o` must be one observation of shape \(2,\), got \(3, 2\).*independent"):
        ss.interop.from_sbi(estimator("vp"), torch.zeros(3, 2))
    posterior = ss.interop.sbi_posterior(estimator("vp"), PRIOR)
    with pytest.raises(ValueError, match="independent observations"):
        posterior.sample((2,), x=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="`x` must be observations"):
        posterior.sample_batched((2,), torch.zeros(3, 5))
    with pytest.raises(TypeError, match="steps"):
        posterior.sample((2,), x=X_O, steps=10)
