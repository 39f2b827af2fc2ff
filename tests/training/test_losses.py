"""Losses: unbiased for any weighting and density, smallest at the truth, and the papers' own where those exist."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from instances import SDES
from test_package import NoFloat64
from torch import Tensor, nn

import scoresde as ss
from scoresde.training import times as T
from scoresde.training import weightings as W
from scoresde.training.draws import Draws, drop_condition
from scoresde.training.losses import HybridVLB, LossByNoise, sliced_score_matching

NAMES = "simple x0 v velocity edm likelihood min_snr soft_min_snr p2 sigmoid".split()
PROPOSALS: dict[str, T.Times] = {
    "uniform": T.Uniform(),
    "mode": T.Mode(0.8),
    "cosine": T.CosineTimes(),
    "likelihood": T.LikelihoodImportance(),
    "stratified": T.Stratified(T.Mode(-0.5)),
    "loss-aware": T.LossAware(bins=8),
}
SIGMA_DATA = 0.5
PRECONDITION = ss.Preconditioning(SIGMA_DATA)


def predictions(sde: ss.SDE) -> list[str]:
    out = []
    for kind in ("eps", "score", "x0", "v", "velocity", "F"):
        try:
            denoiser(sde, kind, lambda x, t: x)
            out.append(kind)
        except ValueError:
            assert sde.alpha(sde.T) == 0
    return out


def denoiser(sde: ss.SDE, kind: str, net: Callable[..., Tensor]) -> ss.Denoiser:
    precondition = PRECONDITION if kind == "F" else None
    return ss.Denoiser(net, sde, predicts=kind, precondition=precondition, time="t")


class Exact(nn.Module):
    """What a perfect network returns for a mixture, plus a constant that is learned."""

    def __init__(self, mix: ss.GaussianMixture, kind: str) -> None:
        super().__init__()
        self.mix, self.kind = mix, kind
        self.bias = nn.Parameter(torch.zeros(mix.event, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = self.t.to(x.dtype)  # in full precision, which a network does not receive
        if self.kind != "F":
            return getattr(self.mix, self.kind)(x, t) + self.bias
        alpha, sigma = (c[:, None] for c in (self.mix.sde.alpha(t), self.mix.sde.sigma(t)))
        root = (alpha**2 * SIGMA_DATA**2 + sigma**2).sqrt()
        x = x * root  # undo c_in
        x0 = self.mix.x0(x, t)
        return (x0 - alpha * SIGMA_DATA**2 / root**2 * x) / (sigma * SIGMA_DATA / root) + self.bias


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, [[-1.0, 0.5], [1.0, -0.3]], std=[0.3, 0.5], weights=[1.0, 2.0])


# Weightings.


@pytest.mark.parametrize("process", ["VP", "VE", "EDM", "SubVP", "Cosine", "two functions", "Shifted VP"])
def test_weights_are_the_published_ones_on_the_published_errors(process: str) -> None:
    sde = SDES[process]
    t = sde.t_min + (sde.T - sde.t_min) * torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    snr, one = (alpha / sigma) ** 2, torch.ones_like(t)
    cases: list[tuple[Any, str, Tensor]] = [
        ("simple", "eps", one),
        ("x0", "x0", one),
        ("v", "v", one),
        ("velocity", "velocity", one),
        ("edm", "F", one),
        ("edm", "x0", ((sigma / alpha) ** 2 + SIGMA_DATA**2) / (sigma / alpha * SIGMA_DATA) ** 2),
        ("likelihood", "score", sde.g2(t)),
        ("likelihood", "eps", sde.g2(t) / sigma**2),
        ("min_snr", "x0", snr.clamp_max(5)),
        ("min_snr", "eps", (5 / snr).clamp_max(1)),
        (W.MinSNR(3.0), "x0", snr.clamp_max(3)),
        ("soft_min_snr", "x0", 1 / (1 / snr + 1 / 4)),
        ("p2", "eps", 1 / (1 + snr)),
        (W.P2(2.0, 0.5), "eps", (2 + snr) ** -0.5),
        ("sigmoid", "eps", (2 - snr.log()).sigmoid()),
        (W.Sigmoid(math.log(4.0)), "x0", W.SoftMinSNR(4.0)(sde, t)),
    ]
    if process in ("VP", "Cosine"):
        cases += [("min_snr", "v", snr.clamp_max(5) / (snr + 1)), ("v", "x0", snr + 1)]
    x = ss.Noise(0).normal((9, 2), 0, dtype=torch.float64)
    for weighting, kind, expected in cases:
        model = denoiser(sde, kind, lambda x, t: 0.3 * x)
        loss = ss.DSM(model, W.On("F", SIGMA_DATA) if weighting == "edm" else weighting)
        weight = loss.at(x, t, torch.ones_like(x)).weight
        assert torch.allclose(weight, expected, rtol=1e-9), (weighting, kind, weight, expected)


@pytest.mark.parametrize("process", SDES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_losses_are_finite_at_both_ends(process: str, dtype: torch.dtype) -> None:
    sde = SDES[process]
    ends = torch.tensor([sde.t_min, sde.T], dtype=dtype)
    x, eps = torch.ones(2, 3, dtype=dtype), torch.full((2, 3), -0.7, dtype=dtype)
    slow = isinstance(sde, ss.processes.FromDrift)  # a quadrature in every coefficient
    for kind in predictions(sde):
        for weighting in (None, "likelihood") if slow else (None, *NAMES):
            terms = ss.DSM(denoiser(sde, kind, lambda x, t: 0.1 * x), weighting).at(x, ends, eps)
            assert bool(terms.loss.isfinite().all() & (terms.weight >= 0).all()), (kind, weighting, terms)


def test_the_weight_on_what_is_predicted_is_exactly_one() -> None:
    for process in ("VP", "Discrete", "Flow", "two functions"):
        sde = SDES[process]
        for kind in predictions(sde):
            loss = ss.DSM(denoiser(sde, kind, lambda x, t: torch.zeros_like(x)))
            weight = loss.terms(torch.ones(64, 2)).weight
            if kind != "score":
                assert torch.equal(weight, torch.ones(64)), (process, kind)
    precise = ss.DSM(denoiser(ss.VP(), "score", lambda x, t: x)).terms(torch.ones(9, 2))
    assert torch.allclose(precise.weight, ss.VP().sigma(precise.t) ** 2)


@pytest.mark.parametrize("weighting", [None, "velocity", "v"])
def test_on_straight_lines_it_is_flow_matching(weighting: str | None) -> None:
    sde, noise = ss.Flow(), ss.Noise(4)
    net = nn.Linear(3, 3)
    x = noise.normal((64, 3), 9)
    t = sde.t_min + (sde.T - sde.t_min) * noise.uniform((64,), 0)
    eps = noise.normal((64, 3), 1)
    expected = (net((1 - t)[:, None] * x + t[:, None] * eps) - (eps - x)).square()
    loss = ss.DSM(ss.Denoiser(lambda x, t: net(x), sde, predicts="velocity"), weighting)
    if weighting != "v":
        assert torch.equal(loss(x, noise), expected.mean(1).mean())
    else:  # v = α ε − σ x0 has an error (α² + σ²) times that of ε − x0
        scale = (t**2 + (1 - t) ** 2) ** 2
        assert torch.allclose(loss(x, noise), (scale[:, None] * expected).mean(), rtol=1e-5)


def test_it_is_ddpms_and_edms_loss_written_out() -> None:
    net = nn.Sequential(nn.Linear(4, 16), nn.SiLU(), nn.Linear(16, 4)).double()
    noise, betas = ss.Noise(1), ss.processes.betas("linear", 50)
    x, eps = noise.normal((32, 4), 7, dtype=torch.float64), noise.normal((32, 4), 1, dtype=torch.float64)
    u = noise.uniform((32,), 0, dtype=torch.float64)
    step = (u * 50).long()  # label 0 … 49
    bar = (1 - betas).cumprod(0)[step][:, None]
    seen: list[Tensor] = []

    def recorded(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return net(x)

    ddpm = (net(bar.sqrt() * x + (1 - bar).sqrt() * eps) - eps).square().mean()
    loss = ss.DSM(ss.Denoiser(recorded, ss.Discrete(betas), predicts="eps"), "simple")
    assert torch.allclose(loss(x, noise), ddpm, rtol=1e-12) and torch.equal(seen[0].long(), step)

    edm = ss.EDM(t_min=1e-9, T=1e9)
    sigma = (-1.2 + 1.2 * torch.special.ndtri(u))[:, None].exp()
    s = SIGMA_DATA
    skip, out = s**2 / (sigma**2 + s**2), sigma * s / (sigma**2 + s**2).sqrt()
    y = x + sigma * eps
    D = skip * y + out * net(y / (sigma**2 + s**2).sqrt())
    written = ((sigma**2 + s**2) / (sigma * s) ** 2 * (D - x) ** 2).mean()
    model = ss.Denoiser(lambda x, t: net(x), edm, predicts="F", precondition=PRECONDITION)
    for weighting in ("edm", None):
        assert torch.allclose(ss.DSM(model, weighting, T.LogNormalSigma())(x, noise), written, rtol=1e-8)


def test_sigma_data_is_given_once() -> None:
    for s in (0.5, 2.0):
        model = ss.Denoiser(lambda x, t: x, ss.EDM(), predicts="F", precondition=ss.Preconditioning(s))
        loss = ss.DSM(model, "edm", T.LogNormalSigma())
        assert torch.equal(loss.terms(torch.ones(8, 2)).weight, torch.ones(8)), "in the weight as in the network"


# Expectations.


@pytest.mark.parametrize("process", ["VP", "Flow", "EDM"])
def test_the_loss_does_not_depend_on_what_times_are_drawn_from(process: str) -> None:
    """Data 0, ε = 1 and a network that returns v = 0: the error of v is α², and the loss ∫ p(t) w(t) α² dt."""
    sde = SDES[process]
    node, weight = np.polynomial.legendre.leggauss(20)
    edges = torch.linspace(math.log(sde.t_min), math.log(sde.T), 65, dtype=torch.float64)
    log_t = (edges[:-1, None] + edges.diff()[:, None] * torch.from_numpy((node + 1) / 2)).flatten()
    dt = (edges.diff()[:, None] * torch.from_numpy(weight / 2)).flatten() * log_t.exp()
    u = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    zero, one = torch.zeros(len(u), 1, dtype=torch.float64), torch.ones(len(u), 1, dtype=torch.float64)
    p = T.LogNormalSigma(-0.5, 0.8)
    for name in NAMES:
        w = W.named(name, SIGMA_DATA)
        t = log_t.exp()
        exact = float((p.density(sde, t) * w(sde, t) / W.sensitivity("v", sde, t) * sde.alpha(t) ** 2 * dt).sum())
        for word, q in {"itself": None, **PROPOSALS}.items():
            loss = ss.DSM(denoiser(sde, "v", lambda x, t: torch.zeros_like(x)), w, p, proposal=q).eval()
            terms = loss.at(zero, (q or p).icdf(sde, u), one)
            assert float(terms.loss.mean()) == pytest.approx(exact, rel=1e-3), (name, word)


def test_the_loss_of_a_mixture_is_its_exact_expectation() -> None:
    """For the exact denoiser, E|error of x0|² is the posterior variance; here by quadrature over x in one dimension."""
    sde = ss.VP()
    mix = ss.GaussianMixture(sde, [[-1.0], [1.5]], std=[0.4, 0.2])
    t0 = 0.3
    grid = torch.linspace(-6, 6, 20_001, dtype=torch.float64)[:, None]
    density = mix.log_prob(grid, t0).exp()
    second = float(mix.covariance() + mix.mean() ** 2)
    lowest = second - float((density * mix.x0(grid, t0)[:, 0] ** 2).sum() * (grid[1] - grid[0]))
    n = 40_000
    x = mix.sample(n, seed=1)
    eps = ss.Noise(2).normal((n, 1), 0, dtype=torch.float64)
    terms = ss.DSM(mix, "x0").at(x, torch.full((n,), t0, dtype=torch.float64), eps)
    assert abs(float(terms.loss.mean()) - lowest) < 4 * float(terms.loss.std()) / n**0.5


@pytest.mark.parametrize("process", ["VP", "EDM", "Flow", "Discrete"])
def test_the_gradient_vanishes_at_the_exact_denoiser(process: str) -> None:
    """Whatever is predicted, however weighted and drawn: the minimiser is the conditional mean."""
    sde, n = SDES[process], 1000
    mix = mixture(sde)
    x, noise = mix.sample(n, seed=1), ss.Noise(2)
    worst = []
    for i, kind in enumerate(predictions(sde)):
        net = Exact(mix, kind)
        for j, weighting in enumerate((None, *NAMES, W.Uncertainty("simple").double())):
            proposal = None if process == "Discrete" else list(PROPOSALS.values())[(i + j) % len(PROPOSALS)]
            loss = ss.DSM(denoiser(sde, kind, net), weighting, proposal=proposal)
            density = loss.proposal or loss.times
            net.t = density.sample(sde, n, noise.fork(j), dtype=torch.float64)
            eps = noise.fork(100 + j).normal((n, 2), 0, dtype=torch.float64)
            sides = []
            for side in (1.0, -1.0):  # a sample's loss is quadratic in the bias: this difference is its slope, exactly
                net.bias.data = torch.tensor([side, -0.5 * side], dtype=torch.float64)
                sides.append(loss.at(x, net.t, eps).loss.detach())
            slope = (sides[0] - sides[1]) / 2
            worst.append(float(slope.mean().abs() / (slope.std() / n**0.5)))
            assert worst[-1] < 4, (kind, weighting)
    assert max(worst) > 1, "the errors are those of chance, not of nothing"


def test_the_truth_has_the_lowest_loss_and_training_finds_it() -> None:
    """A linear network on Gaussian data: the least squares solution of ε given x_t at one time is known."""
    sde, t0, s = ss.VP(), 0.5, 0.7
    alpha, sigma = sde.alpha(t0), sde.sigma(t0)
    net = nn.Linear(1, 1, bias=False).double()
    loss = ss.DSM(ss.Denoiser(lambda x, t: net(x), sde, predicts="eps"))
    noise = ss.Noise(0)
    x, eps = s * noise.normal((20_000, 1), 0, dtype=torch.float64), noise.normal((20_000, 1), 1, dtype=torch.float64)
    optimiser = torch.optim.LBFGS(net.parameters(), max_iter=20)

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss.at(x, torch.full((20_000,), t0, dtype=torch.float64), eps).loss.mean()
        value.backward()
        return value

    optimiser.step(closure)
    assert net.weight.item() == pytest.approx(sigma / (alpha**2 * s**2 + sigma**2), rel=0.02)


# Randomness, devices, dtypes.


def test_noise_is_the_global_generators_or_yours() -> None:
    loss = ss.DSM(denoiser(ss.VP(), "eps", lambda x, t: 0.5 * x))
    x = torch.ones(6, 2)
    torch.manual_seed(0)
    a, b = loss(x), loss(x)
    torch.manual_seed(0)
    assert torch.equal(loss(x), a) and not torch.equal(a, b)
    state = torch.get_rng_state()
    whole = loss.terms(x, 7).loss
    assert torch.equal(loss.terms(x, ss.Noise(7)).loss, whole)
    parts = [loss.terms(x[k : k + 2], ss.Noise(7, offset=k)).loss for k in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole), "a row's noise is its own"
    shards = [loss.terms(x[k : k + 3], Draws(torch.Generator().manual_seed(1), first=k, total=6)).loss for k in (0, 3)]
    assert torch.equal(torch.cat(shards), loss.terms(x, Draws(torch.Generator().manual_seed(1))).loss)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_under_autocast_only_the_network_is_rounded(half: torch.dtype) -> None:
    torch.manual_seed(0)
    net = nn.Linear(16, 16)
    by_drift = ss.SDE.from_drift(lambda t: -0.05 - 9.95 * t, lambda t: (0.1 + 19.9 * t).sqrt())
    for sde in (ss.VP(), by_drift):
        model = ss.Denoiser(lambda x, t: net(x), sde, predicts="v", precondition=PRECONDITION, time="t")
        loss = ss.DSM(model, "min_snr")
        x = torch.randn(256, 16)
        full = loss.terms(x, 3)
        with torch.autocast("cpu", dtype=half):
            mixed = loss.terms(x, 3)
        assert mixed.loss.dtype == torch.float32
        assert torch.equal(mixed.t, full.t) and torch.equal(mixed.weight, full.weight)
        assert torch.allclose(mixed.loss.mean(), full.loss.mean(), rtol=3e-3)
        assert not torch.equal(mixed.loss, full.loss), "autocast was on"


@pytest.mark.parametrize("process", ["EDM", "Flow", "Discrete"])
def test_a_step_needs_no_float64_on_the_device_and_never_waits(process: str) -> None:
    sde = SDES[process]
    x, label = torch.ones(4, 3, device="meta"), torch.zeros(4, dtype=torch.long, device="meta")
    net = nn.Linear(3, 3, device="meta")

    def called(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return net(x)

    cases = [(weighting, None) for weighting in ("edm", "likelihood", "p2", W.Uncertainty())]
    cases += [("min_snr", proposal) for proposal in PROPOSALS.values() if not isinstance(sde, ss.Discrete)]
    for k, (weighting, proposal) in enumerate(cases):
        loss = ss.DSM(denoiser(sde, "v", called), weighting, proposal=proposal, drop=0.5, null={"label": 3})
        loss = copy.deepcopy(loss).to("meta")
        with NoFloat64():
            value = loss(x, 3 if k % 4 == 0 else None, label=label)
            assert value.device.type == "meta" and value.dtype == torch.float32
            value.backward()


def test_the_loss_has_the_networks_parameters_and_compiles_to_no_surprise() -> None:
    net = nn.Linear(2, 2)
    model = ss.Denoiser(Plain(net), ss.VP(), predicts="eps")
    names = dict(ss.DSM(model).named_parameters())
    assert list(names) == ["model.net.net.weight", "model.net.net.bias"]
    assert len(list(ss.DSM(model, W.Uncertainty()).parameters())) == 4
    assert set(ss.DSM(model).state_dict()) == set(names), "nothing but the model is saved"
    stateful = ss.DSM(model, proposal=T.Stratified(T.LossAware()))
    assert {"learned_times.moment", "learned_times.count"} <= set(stateful.state_dict())


class Plain(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        return self.net(x)


def test_a_denoiser_that_is_no_network_is_scored_on_its_x0() -> None:
    mix = mixture(ss.VP())
    noise = ss.Noise(0)
    x = mix.sample(512, seed=3)
    terms = ss.DSM(mix, "simple").terms(x, noise)
    t = terms.t
    x_t = ss.VP().perturb(x, t, noise.normal(x.shape, 1, dtype=torch.float64))
    error = (mix.eps(x_t, t) - noise.normal(x.shape, 1, dtype=torch.float64)).square().mean(1)
    assert torch.allclose(terms.loss, error, rtol=1e-6)


# Learned weights and variances.


def test_learned_uncertainty_settles_at_the_loss() -> None:
    sde = ss.VP()
    balance = W.Uncertainty("simple", features=16)
    t = T.Uniform().sample(sde, 512, 0)
    expected = (0.2 + t).square()
    optimiser = torch.optim.Adam(balance.parameters(), lr=0.05)
    for _ in range(400):
        optimiser.zero_grad()
        balance(expected, sde, t).mean().backward()
        optimiser.step()
    assert float((balance.log_loss(sde, t).detach().exp() / expected).log().abs().mean()) < 0.05
    loss = ss.DSM(denoiser(sde, "eps", lambda x, t: 0.1 * x), W.Uncertainty("simple"))
    plain = ss.DSM(denoiser(sde, "eps", lambda x, t: 0.1 * x), "simple")
    assert torch.allclose(loss(torch.ones(4, 2), 0), plain(torch.ones(4, 2), 0)), "u = 0 at first"


def test_a_proposal_weighs_the_whole_of_a_balanced_loss() -> None:
    balance, q = W.Uncertainty("simple"), T.Mode(0.8)
    nn.init.constant_(balance.linear.bias, 0.7)
    terms = ss.DSM(denoiser(ss.VP(), "eps", lambda x, t: 0.1 * x), balance, proposal=q).terms(torch.ones(64, 2), 0)
    ratio = T.Uniform().density(ss.VP(), terms.t) / q.density(ss.VP(), terms.t)
    assert torch.allclose(terms.loss, ratio * (terms.error * math.exp(-0.7) + 0.7), rtol=1e-5)


def test_learned_times_observe_the_loss_that_does_not_depend_on_them() -> None:
    """Data 1, a network that returns 0, weight t: where losses are t, draws must tend to √E[t² | bin]."""
    q = T.LossAware(bins=8, mix=0.1)
    loss = ss.DSM(denoiser(ss.Flow(), "x0", lambda x, t: torch.zeros_like(x)), lambda sde, t: t, proposal=q)
    for step in range(100):
        loss(torch.ones(256, 1), step)
    root = (((torch.arange(8) + 0.5) / 8) ** 2 + 1 / (12 * 8**2)).sqrt()
    assert torch.allclose(q.shares(), 0.9 * root / root.sum() + 0.1 / 8, rtol=0.05)
    count = q.count.clone()
    loss.eval()(torch.ones(256, 1))
    assert torch.equal(q.count, count), "an evaluation teaches nothing"


@pytest.mark.parametrize("base", [T.Uniform(), T.Mode(1.29), T.Mode(-0.9), T.CosineTimes()], ids=repr)
def test_learned_times_have_the_smallest_variance_on_any_base(base: T.Times) -> None:
    """Data 1, a network that returns 0, weight t: the best probabilities of the bins are known for every base."""
    sde, K = ss.Flow(), 8
    q = T.LossAware(base, bins=K, mix=1e-3)
    loss = ss.DSM(denoiser(sde, "x0", lambda x, t: torch.zeros_like(x)), lambda sde, t: t, proposal=q)
    for step in range(100):
        loss(torch.ones(256, 1), step)
    t = base.icdf(sde, (torch.arange(1000 * K, dtype=torch.float64) + 0.5) / (1000 * K))
    ell = T.Uniform().density(sde, t) * t / base.density(sde, t)  # the loss under `base`
    root = ell.square().reshape(K, -1).mean(1).sqrt()
    assert torch.allclose(q.shares().double(), root / root.sum(), rtol=0.05, atol=2e-3)
    second = loss.eval().terms(torch.ones(40_000, 1, dtype=torch.float64), 7).loss.square().mean()
    assert float(second) == pytest.approx(float(root.mean() ** 2), rel=0.02), "(Σ r_k/K)², the smallest second moment"


@pytest.mark.parametrize("process", ["Discrete", "VP"])
def test_the_bound_is_the_kl_of_its_gaussians(process: str) -> None:
    sde = ss.Discrete(ss.processes.betas("linear", 40)) if process == "Discrete" else ss.VP()
    N = 40
    frac = 0.3
    model = ss.Denoiser(
        lambda x, t: torch.cat([0.2 * x, torch.full_like(x, 2 * frac - 1)], 1),
        sde,
        predicts="eps",
        learned_variance=True,
    )
    loss = HybridVLB(model, N)
    x, x0 = (ss.Noise(k).normal((3, 2), 0, dtype=torch.float64) for k in (1, 2))
    t = torch.tensor([1, 2, 30], dtype=torch.float64) * sde.T / N
    got = loss.bound(x, t, x0, torch.full_like(x, 2 * frac - 1))
    x_t = torch.randn(3, 2, dtype=torch.float64)
    for k, step in ((1, 2), (2, 30)):
        s = float(t[k] - sde.T / N)
        c_t, c_0, small = sde.posterior(s, float(t[k]))
        large = sde.transition(s, float(t[k]))[1] ** 2
        if isinstance(sde, ss.Discrete):
            assert large == pytest.approx(float(sde.beta(step)), rel=1e-9)
            assert small == pytest.approx(float(sde.posterior_variance(step)), rel=1e-9)
        std = math.exp(frac * math.log(large) + (1 - frac) * math.log(small)) ** 0.5
        true, learned = (
            torch.distributions.Normal(c_t * x_t[k] + c_0 * z[k], d) for z, d in ((x, small**0.5), (x0, std))
        )
        assert float(got[k]) == pytest.approx(float(torch.distributions.kl_divergence(true, learned).mean()), rel=1e-9)
    large = sde.transition(0.0, float(t[0]))[1] ** 2
    small = sde.posterior(float(t[0]), float(t[1]))[2]
    std = math.exp(frac * math.log(large) + (1 - frac) * math.log(small)) ** 0.5
    nll = -torch.distributions.Normal(x0[0], std).log_prob(x[0]).mean()
    assert float(got[0]) == pytest.approx(float(nll), rel=1e-9)


def test_the_bound_trains_the_variance_and_leaves_the_mean() -> None:
    mean, variance = (nn.Parameter(torch.tensor(0.1)) for _ in range(2))
    model = ss.Denoiser(
        lambda x, t: torch.cat([mean * x, variance.expand_as(x)], 1),
        ss.Discrete(ss.processes.betas("linear", 20)),
        predicts="eps",
        learned_variance=True,
    )
    x = torch.ones(32, 2)
    grads = {}
    for vlb in (0.0, 1e-3):
        loss = HybridVLB(model, vlb=vlb)(x, 0)
        grads[vlb] = torch.autograd.grad(loss, (mean, variance), allow_unused=True)
    assert torch.equal(grads[0.0][0], grads[1e-3][0]) and float(grads[1e-3][1]) != 0
    t, eps = torch.full((32,), 7.0), torch.randn(32, 2)
    none, some = (HybridVLB(model, vlb=vlb).at(x, t, eps).loss.detach() for vlb in (0.0, 1e-3))
    x0 = model.x0(model.sde.perturb(x, t, eps), t).detach()
    bound = HybridVLB(model).bound(x, t, x0, torch.full_like(x, 0.1))
    assert torch.allclose(some - none, 1e-3 * 20 * bound, rtol=1e-3, atol=1e-6), "λ N times a step's term"
    with pytest.raises(ValueError, match="HybridVLB"):
        ss.DSM(model)
    with pytest.raises(ValueError, match="learned_variance=True"):
        HybridVLB(denoiser(ss.VP(), "eps", lambda x, t: x))  # type: ignore[arg-type]


def test_sliced_score_matching_is_fishers_divergence_but_for_a_constant() -> None:
    mix = mixture(ss.VP())
    n = 20_000
    x = mix.sample(n, seed=1)
    matrix = torch.tensor([[-1.0, 0.4], [0.1, -2.0]], dtype=torch.float64, requires_grad=True)
    loss = sliced_score_matching(lambda x: x @ matrix.T, x, 0, projections=4)
    truth = mix.score(x, 0.0)
    fisher = 0.5 * (x @ matrix.T - truth).square().sum(1).mean() - 0.5 * truth.square().sum(1).mean()
    assert loss.item() == pytest.approx(fisher.item(), abs=0.06)
    (got,) = torch.autograd.grad(loss, matrix)
    expected = matrix.detach() @ (x.T @ x / n) + torch.eye(2, dtype=torch.float64)
    assert torch.allclose(got, expected, atol=0.04), "smallest at minus the inverse second moment"


# Conditions and logs.


def test_conditions_are_dropped_together_and_at_the_given_rate() -> None:
    n = 4000
    cond = {"label": torch.arange(n), "text": torch.ones(n, 3, 2), "keep": torch.ones(n), "flag": 3}
    out = drop_condition(cond, 0.3, {"label": -1, "text": torch.zeros(3, 2)}, 0)
    gone = out["label"] == -1
    assert torch.equal((out["text"] == 0).all(dim=(1, 2)), gone) and torch.equal(
        out["label"][~gone], cond["label"][~gone]
    )
    assert out["keep"] is cond["keep"] and out["flag"] == 3
    assert abs(int(gone.sum()) - 0.3 * n) < 4 * (n * 0.3 * 0.7) ** 0.5
    assert drop_condition(cond, 0.0, {"label": -1}) == cond
    seen: list[Tensor] = []

    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(label)
        return x

    ss.DSM(denoiser(ss.VP(), "eps", net), drop=1.0, null={"label": 10})(torch.ones(3, 2), label=torch.arange(3))
    assert seen[0].tolist() == [10, 10, 10]


def test_a_condition_may_have_one_row_or_no_batch_axis() -> None:
    seen: list[dict[str, Tensor]] = []

    def net(x: Tensor, t: Tensor, **cond: Tensor) -> Tensor:
        seen.append(cond)
        return 0.5 * x

    n, table = 4000, torch.randn(7, 3)
    one, rows = {"label": torch.tensor([3])}, {"label": torch.full((n,), 3)}
    shared = {"table": ss.denoisers.base.Shared(table)}
    x = torch.ones(n, 2)
    for drop in (0.0, 0.25):
        loss = ss.DSM(denoiser(ss.VP(), "eps", net), drop=drop, null={"label": 10})
        values = [loss(x, 5, **label, **shared) for label in (one, rows)]
        assert torch.equal(values[0], values[1])
        first, second = seen[-2:]
        assert torch.equal(first["label"], second["label"]) and len(first["label"]) == n
        assert first["table"] is table and second["table"] is table
    share = float((seen[-1]["label"] == 10).double().mean())
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / n) ** 0.5, "each sample is dropped by itself"
    assert drop_condition(one, 1.0, {"label": 10})["label"].tolist() == [10]
    assert drop_condition(one, 1.0, {"label": 10}, rows=2)["label"].tolist() == [10, 10]
    pair = {"label": torch.arange(3), "text": {"a": torch.ones(1, 2), "b": torch.ones(3, 4)}}
    out = drop_condition(pair, 1.0, {"label": 9, "text": 0.0})
    assert out["text"]["a"].shape == (3, 2) and out["text"]["b"].shape == (3, 4)
    variance = ss.Denoiser(
        lambda x, t, **cond: torch.cat([net(x, t, **cond), x], 1), ss.VP(), predicts="eps", learned_variance=True
    )
    assert torch.equal(HybridVLB(variance)(x, 5, **one, **shared), HybridVLB(variance)(x, 5, **rows, **shared))
    with pytest.raises(TypeError, match="a `Shared` condition has no rows to drop"):
        ss.DSM(denoiser(ss.VP(), "eps", net), drop=0.5, null={"table": 0.0})(x, **shared)
    with pytest.raises(ValueError, match="condition `label` has 3 rows and the state has 4000"):
        ss.DSM(denoiser(ss.VP(), "eps", net))(x, label=torch.arange(3))


def test_losses_are_logged_by_noise_level() -> None:
    sde = ss.VP()
    log = LossByNoise(sde, bins=4)
    t = T.Uniform().sample(sde, 1000, 0)
    error = torch.where(t < 0.5, 1.0, 3.0)
    error[7] = math.nan
    log.add(t[:500], error[:500])
    log.add(t[500:], error[500:])
    rows = log.read()
    assert sum(row["count"] for row in rows) == 999 and sum(row["bad"] for row in rows) == 1
    for row in rows:
        near = sde.t_of_lam(row["lam"])
        assert row["error"] == pytest.approx(1.0 if near < 0.4 else 3.0, abs=0.5) or 0.4 < near < 0.6
    assert log.read() == []
    loss = ss.DSM(denoiser(sde, "eps", lambda x, t: torch.zeros_like(x)))
    loss(torch.ones(50, 2))
    loss.eval()(torch.ones(50, 2))
    assert sum(row["count"] for row in loss.levels.read()) == 50


def test_errors_name_the_argument_and_the_fix() -> None:
    model = denoiser(ss.VP(), "eps", lambda x, t: x)
    for error, match, bad in (
        (TypeError, "must be a denoiser", lambda: ss.DSM(nn.Linear(1, 1))),
        (ValueError, "did you mean 'min_snr'", lambda: ss.DSM(model, "min-snr")),
        (TypeError, "`times` must be a density", lambda: ss.DSM(model, times=0.5)),
        (ValueError, "as `proposal`", lambda: ss.DSM(model, times=T.LossAware())),
        (ValueError, "as `proposal`", lambda: ss.DSM(model, times=T.Stratified(T.LossAware()))),
        (ValueError, "needs `null`", lambda: ss.DSM(model, drop=0.1)),
        (ValueError, "names label", lambda: ss.DSM(model, drop=0.1, null={"label": 1})(torch.ones(2, 2))),
        (TypeError, "float32 or float64", lambda: ss.DSM(model)(torch.ones(2, 2).half())),
        (ValueError, "one row for each sample", lambda: drop_condition(
            {"a": torch.ones(2), "b": torch.ones(3)}, 0.5, {"a": 0, "b": 0})),
    ):  # fmt: skip
        with pytest.raises(error, match=match):
            bad()


def test_conditions_in_the_wrong_place_are_refused() -> None:
    model = ss.Denoiser(lambda x, t, label: x * label[:, None], ss.VP(), predicts="eps")
    label = torch.ones(4)
    with pytest.raises(TypeError, match=r"`model` has fixed conditions.*loss\(x, label=label\)"):
        ss.DSM(model.given(label=label))
    with pytest.raises(TypeError, match=r"`noise` must be a seed.*loss\(x, label=label\)"):
        ss.DSM(model)(torch.zeros(4, 2), label)
