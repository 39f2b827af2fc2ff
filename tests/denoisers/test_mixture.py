"""Exact denoisers: they are the ground truth of everything else, so they are held against arithmetic of 50 digits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import mpmath as mp
import pytest
import torch
from instances import SDES, inner_times
from torch import Tensor
from torch import distributions as D
from torch.func import hessian, jacrev, jvp, vmap

import scoresde as ss
from scoresde.denoisers.mixture import squared_distances

ALL = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
f64 = torch.float64
WEIGHTS = [1.0, 2.0, 0.5]
MEANS = torch.tensor([[-1.0, 0.5, 2.0], [1.0, -0.5, 0.0], [0.2, 2.0, -1.0]], dtype=f64)
ROOT = torch.tensor(  # any three matrices
    [
        [[0.5, 0.0, 0.2], [0.1, 0.3, 0.0], [-0.2, 0.1, 0.4]],
        [[0.2, 0.1, 0.0], [0.0, 0.6, 0.1], [0.3, 0.0, 0.5]],
        [[0.4, -0.1, 0.1], [0.2, 0.2, 0.3], [0.0, 0.1, 0.3]],
    ],
    dtype=f64,
)
COVARIANCES: dict[str, dict[str, object]] = {
    "one std": {"std": 0.3},
    "std of each component": {"std": [0.3, 0.1, 0.6]},
    "std of each entry": {"std": ROOT.abs()[:, 0] + 0.1},
    "full": {"cov": ROOT @ ROOT.mT},
    "low rank": {"factor": ROOT[:, :, :2], "std": [0.3, 0.1, 0.2]},
    "rank 1": {"factor": ROOT[:, :, :1], "std": 0.05},
}
KINDS = pytest.mark.parametrize("kind", COVARIANCES)


def make(sde: ss.SDE, kind: str, **keywords: object) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, MEANS, weights=WEIGHTS, **{**COVARIANCES[kind], **keywords})  # type: ignore[arg-type]


def covariances(kind: str) -> Tensor:
    """C_k by their definition."""
    given = COVARIANCES[kind]
    eye = torch.eye(3, dtype=f64)
    std = torch.as_tensor(given.get("std", 0.0), dtype=f64)
    if "cov" in given:
        return given["cov"]  # type: ignore[return-value]
    if "factor" in given:
        factor: Tensor = given["factor"]  # type: ignore[assignment]
        return factor @ factor.mT + (std.expand(3) ** 2)[:, None, None] * eye
    return torch.diag_embed(std**2) if std.ndim == 2 else (std.expand(3) ** 2)[:, None, None] * eye


def reference(kind: str, alpha: float, sigma: float) -> D.MixtureSameFamily:
    """The marginal, by torch.distributions."""
    weights = torch.tensor(WEIGHTS, dtype=f64)
    cov = alpha**2 * covariances(kind) + sigma**2 * torch.eye(3, dtype=f64)
    return D.MixtureSameFamily(D.Categorical(weights / weights.sum()), D.MultivariateNormal(alpha * MEANS, cov))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return ss.Noise(seed).normal(shape, 0, dtype=f64)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference of any row, in units of that row's length."""
    a, b = a.flatten(1), b.flatten(1)
    return float(((a - b).norm(dim=1) / b.norm(dim=1).clamp_min(1e-300)).max())


# Against automatic differentiation and torch.distributions.


@ALL
@KINDS
def test_score_is_the_gradient_of_log_prob(sde: ss.SDE, kind: str) -> None:
    mix = make(sde, kind)
    times = torch.cat([torch.tensor([1e-9, 1e-6, 1e-3], dtype=f64) * sde.T, inner_times(sde, 5)])
    x = torch.cat([mix.sample(3, float(t), seed=i) for i, t in enumerate(times)]).requires_grad_()
    t = times.repeat_interleave(3)
    (gradient,) = torch.autograd.grad(mix.log_prob(x, t).sum(), x)
    score = mix.score(x.detach(), t)
    assert relative(score, gradient) < 1e-10, sde
    for i in (0, 12, 23):  # and with the time as a number
        assert relative(mix.score(x[i : i + 1].detach(), t[i].item()), score[i : i + 1]) < 1e-12, sde


@KINDS
@pytest.mark.parametrize("name", ["VP", "SubVP", "VE", "EDM", "Flow", "Discrete", "two functions"])
def test_log_prob_equals_torch_distributions(name: str, kind: str) -> None:
    sde = SDES[name]
    mix = make(sde, kind)
    for t in [*inner_times(sde, 5).tolist(), sde.T]:
        law = reference(kind, sde.alpha(t), sde.sigma(t))
        x = torch.cat([mix.sample(20, t, seed=0), 3 * normal(20, 3) * (1 + sde.sigma(t))])
        assert torch.allclose(mix.log_prob(x, t), law.log_prob(x), rtol=1e-10, atol=1e-10), (sde, t)
        joint = law.component_distribution.log_prob(x[:, None]) + law.mixture_distribution.probs.log()
        assert torch.allclose(mix.responsibilities(x, t), joint.softmax(1), rtol=1e-9, atol=1e-14), (sde, t)
        assert torch.allclose(mix.responsibilities(x, t).sum(1), torch.ones(40, dtype=f64), rtol=1e-14)
    data = mix.sample(20, seed=1)
    assert torch.allclose(mix.log_prob(data), reference(kind, 1.0, 0.0).log_prob(data), rtol=1e-9, atol=1e-9)


@ALL
@KINDS
def test_every_prediction_is_consistent_with_the_score(sde: ss.SDE, kind: str) -> None:
    mix = make(sde, kind)
    t = inner_times(sde, 6)
    x = mix.sample(6, 0.3 * sde.T, seed=0)
    alpha, sigma, adot, sdot = (fn(t)[:, None] for fn in (sde.alpha, sde.sigma, sde.alpha_dot, sde.sigma_dot))
    score, x0, eps = mix.score(x, t), mix.x0(x, t), mix.eps(x, t)
    assert relative(eps, -sigma * score) < 1e-13, sde
    tweedie = (x + sigma**2 * score) / alpha
    scale = (x.norm(dim=1) + (sigma**2 * score).norm(dim=1))[:, None] / alpha
    assert float(((x0 - tweedie).abs() / scale).max()) < 1e-13, sde
    for got, a, b in ((mix.v(x, t), -sigma, alpha), (mix.velocity(x, t), adot, sdot)):
        size = (a * x0).abs() + (b * eps).abs()
        assert float(((got - (a * x0 + b * eps)).abs() / size).max()) < 1e-12, sde
    if kind in ("std of each entry", "low rank"):
        for name in ("x0", "eps", "score", "v", "velocity"):
            fn = getattr(mix, name)
            assert relative(fn(x[4:5], t[4].item()), fn(x, t)[4:5]) < 1e-11, (sde, name)
            assert relative(fn(x, t[4]), fn(x, t[4].expand(6))) < 1e-12, (sde, name)


def test_without_noise_it_is_the_data() -> None:
    x = make(ss.VP(), "full").sample(5, seed=0)
    for kind in COVARIANCES:
        for name in ("VP", "Flow", "Discrete"):
            mix = make(SDES[name], kind)
            y = x.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(mix.log_prob(y, 0.0).sum(), y)
            for t in (0.0, torch.zeros(5, dtype=f64)):
                assert relative(mix.score(x, t), gradient) < 1e-10, (name, kind)
                assert torch.allclose(mix.x0(x, t), x, rtol=1e-12), (name, kind)
                assert torch.equal(mix.eps(x, t), torch.zeros_like(x))


def test_points_and_planes_are_allowed_without_noise() -> None:
    # Data without a density: x0 is still the nearest datum, or the nearest plane's.
    points = ss.GaussianMixture(ss.VP(), MEANS, std=0.0)
    assert torch.allclose(points.x0(MEANS + 0.1, 0.0), MEANS, rtol=1e-12)
    far = 1e6 * normal(9, 3)
    assert torch.equal(points.x0(far, 0.0), MEANS[torch.cdist(far, MEANS).argmin(1)])
    plane = ss.GaussianMixture(ss.VP(), MEANS[:1], factor=torch.eye(3, dtype=f64)[None, :, :2])
    x = MEANS[:1] + torch.tensor([[0.3, -0.7, 25.0]], dtype=f64)
    assert torch.allclose(plane.x0(x, 0.0), MEANS[:1] + torch.tensor([[0.3, -0.7, 0.0]], dtype=f64), rtol=1e-12)
    for mix in (points, plane):
        with pytest.raises(ValueError, match=r"not defined at t = 0.0"):
            ss.denoisers.Reverse(mix, 1.0).drift(MEANS, 0.0)


# Against 50 digits.


@dataclass
class Hard:
    """A mixture, a time and states where cancellation threatens; `slack` is what rounding of the *input* costs."""

    sde: ss.SDE
    t: float
    keywords: dict[str, object]
    x: Tensor
    slack: float = 1e-12

    def mix(self) -> ss.GaussianMixture:
        return ss.GaussianMixture(self.sde, **self.keywords)  # type: ignore[arg-type]


def matrix(rows: Tensor) -> mp.matrix:
    return mp.matrix([[mp.mpf(v) for v in row] for row in rows.tolist()])


def truth(case: Hard) -> tuple[list[mp.mpf], list[list[mp.mpf]], list[list[mp.mpf]]]:
    """log_prob, score and x0 by their definitions: determinants and inverses of the covariances as they were given."""
    means = torch.as_tensor(case.keywords["means"], dtype=f64)
    K, size = means.shape
    alpha, sigma = mp.mpf(case.sde.alpha(case.t)), mp.mpf(case.sde.sigma(case.t))
    weights = [mp.mpf(w) for w in case.keywords.get("weights", [1.0] * K)]  # type: ignore[attr-defined]
    std = torch.as_tensor(case.keywords.get("std", 0.0), dtype=f64)
    logs, scores, x0s = [], [], []
    parts = []
    for k in range(K):
        if "cov" in case.keywords:
            cov = matrix(torch.as_tensor(case.keywords["cov"])[k])
        elif "factor" in case.keywords:
            factor = matrix(torch.as_tensor(case.keywords["factor"])[k])
            cov = factor * factor.T + mp.mpf(std.expand(K)[k].item()) ** 2 * mp.eye(size)
        elif std.ndim == 2:
            cov = mp.diag([mp.mpf(s) ** 2 for s in std[k].tolist()])
        else:
            cov = mp.mpf(std.expand(K)[k].item()) ** 2 * mp.eye(size)
        whole = alpha**2 * cov + sigma**2 * mp.eye(size)
        parts.append((weights[k] / sum(weights), matrix(means[k : k + 1]).T, cov, whole**-1, mp.det(whole)))
    for row in case.x:
        x = matrix(row[None]).T
        terms, gradients, guesses = [], [], []
        for weight, mean, cov, inverse, det in parts:
            d = x - alpha * mean
            pull = inverse * d
            terms.append(mp.log(weight) - (d.T * pull)[0] / 2 - mp.log(det) / 2 - size * mp.log(2 * mp.pi) / 2)
            gradients.append(-pull)
            guesses.append(mean + alpha * cov * pull)
        top = max(terms)
        r = [mp.exp(v - top) for v in terms]
        logs.append(top + mp.log(sum(r)))
        scores.append([sum(p * g[i] for p, g in zip(r, gradients, strict=True)) / sum(r) for i in range(size)])
        x0s.append([sum(p * g[i] for p, g in zip(r, guesses, strict=True)) / sum(r) for i in range(size)])
    return logs, scores, x0s


def around(means: Tensor, width: float, n: int = 6) -> Tensor:
    return means[torch.arange(n) % len(means)] + width * normal(n, means.shape[1], seed=7)


TWINS = 1e3 + torch.tensor([[0.0, 0.0], [1e-6, 0.0], [0.0, -1e-6]], dtype=f64)
FAR = 1e6 + MEANS
TINY = ss.VP().t_of_sigma(1e-6)
AXIS = torch.tensor([[[0.5], [0.25], [-1.0]], [[1.0], [0.0], [0.5]], [[0.125], [2.0], [0.25]]], dtype=f64)
EPS = 2.0**-52
HARD: dict[str, Hard] = {
    "plain": Hard(ss.VP(), 0.3, {"means": MEANS, "cov": ROOT @ ROOT.mT, "weights": WEIGHTS}, around(MEANS, 0.5)),
    "between two": Hard(ss.EDM(), 0.5, {"means": MEANS, "std": 0.2}, MEANS.mean(0) + 0.1 * normal(4, 3)),
    "near duplicates": Hard(ss.EDM(), 1e-6, {"means": TWINS, "std": 0.0}, around(TWINS, 1e-6)),
    "near duplicates of low rank": Hard(
        ss.EDM(), 1e-6, {"means": TWINS, "factor": torch.ones(3, 2, 1, dtype=f64) / 2}, around(TWINS, 1e-6), 1e-9
    ),
    "near duplicates, full": Hard(
        ss.EDM(), 1e-6, {"means": TWINS, "cov": 1e-12 * torch.eye(2, dtype=f64).expand(3, 2, 2)}, around(TWINS, 1e-6)
    ),
    "far from the origin": Hard(ss.EDM(), 1e-6, {"means": FAR, "std": 1e-3}, around(FAR, 1e-3)),
    "far from the origin, full": Hard(ss.EDM(), 0.01, {"means": FAR, "cov": ROOT @ ROOT.mT}, around(FAR, 0.5)),
    "far from the origin, low rank": Hard(
        ss.EDM(), 0.01, {"means": FAR, "factor": ROOT[:, :, :1], "std": 0.1}, around(FAR, 0.5)
    ),
    # α μ rounds to 1e6 · 2⁻⁵³ where α ≠ 1, whoever computes it; the noise is 0.3.
    "far from the origin, rounded": Hard(
        ss.VP(), 0.1, {"means": FAR, "std": 0.1}, ss.VP().alpha(0.1) * FAR + 0.2 * normal(3, 3), 1e6 * EPS / 0.3 * 40
    ),
    # Likewise 2 · 2⁻⁵³ against a noise of 1e-6.
    "tiny sigma": Hard(ss.VP(), TINY, {"means": MEANS, "std": 0.1}, around(MEANS, 0.1), 1e-12),
    "tiny sigma, points": Hard(ss.VP(), TINY, {"means": MEANS, "std": 0.0}, around(MEANS, 1e-6), 2 * EPS / 1e-6 * 40),
    "tiny sigma, entries": Hard(
        ss.Flow(), 1e-6, {"means": MEANS, "std": ROOT.abs()[:, 0]}, around(MEANS, 0.1), 2 * EPS / 1e-6 * 40
    ),
    # Thin: the data has no width beside one axis, x lies at noise distance from it.
    "thin": Hard(
        ss.EDM(),
        1e-6,
        {"means": MEANS, "factor": AXIS},
        MEANS + AXIS[..., 0] * 0.7 + 1e-6 * normal(3, 3),
        2 * EPS / 1e-6 * 40,
    ),
    "thin under VP": Hard(
        ss.VP(),
        ss.VP().t_of_sigma(1e-4),
        {"means": MEANS, "factor": AXIS},
        MEANS + AXIS[..., 0] * 0.7 + 1e-4 * normal(3, 3),
        2 * EPS / 1e-4 * 40,
    ),
    # An eigenvalue 0 of a full covariance is only known to rounding of the largest, 4 · 2⁻⁵² against 1e-6.
    "thin, full": Hard(
        ss.EDM(),
        1e-3,
        {"means": MEANS, "cov": AXIS @ AXIS.mT},
        MEANS + AXIS[..., 0] * 0.7 + 1e-3 * normal(3, 3),
        4 * EPS / 1e-6 * 40,
    ),
    "off every component": Hard(ss.VP(), 0.01, {"means": MEANS, "std": 0.1}, 1e3 * normal(3, 3)),
    "weights of many magnitudes": Hard(
        ss.VP(), 0.5, {"means": MEANS, "std": 0.1, "weights": [1e-200, 1.0, 1e200]}, around(MEANS, 0.5)
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_hard_cases_equal_high_precision_arithmetic(name: str) -> None:
    case = HARD[name]
    mix, x = case.mix(), case.x
    with mp.workdps(50):
        logs, scores, x0s = truth(case)
        got = mix.log_prob(x, case.t), mix.score(x, case.t), mix.x0(x, case.t)
        for i in range(len(x)):
            # log p is a sum of terms, the largest of which may cancel against the log-determinant.
            size = abs(logs[i]) + sum(abs(mp.log(mp.mpf(case.sde.sigma(case.t)))) for _ in range(x.shape[1])) + 1
            assert abs(mp.mpf(got[0][i].item()) - logs[i]) < case.slack * size, (name, "log_prob", i)
            for word, tensor, want in (("score", got[1], scores[i]), ("x0", got[2], x0s[i])):
                off = mp.norm([mp.mpf(v) - w for v, w in zip(tensor[i].tolist(), want, strict=True)])
                assert off < case.slack * mp.norm(want), (name, word, i)
    vector = torch.full((len(x),), case.t, dtype=f64)
    assert relative(mix.score(x, vector), got[1]) < 1e-9
    assert relative(mix.x0(x, vector), got[2]) < 1e-12


def test_squares_are_never_expanded() -> None:
    # Two data 1e-6 apart, 1e3 from the origin: expanding |x − μ|² leaves no digit of their difference.
    squares = squared_distances(TWINS, TWINS)
    want = torch.tensor([[0, 1, 1], [1, 0, 2], [1, 2, 0]], dtype=f64) * 1e-12
    assert torch.allclose(squares, want, rtol=1e-6, atol=0.0)
    naive = TWINS.square().sum(1)[:, None] + TWINS.square().sum(1) - 2 * TWINS @ TWINS.mT
    assert float((naive - want).abs().max()) > 1e-10
    assert torch.allclose(
        squared_distances(TWINS, TWINS, torch.tensor([1.0, 0.5, 0.0], dtype=f64))[1:].sqrt(),
        torch.stack([(TWINS[1] - 0.5 * TWINS).norm(dim=1), TWINS[2].norm().expand(3)]),
        rtol=1e-12,
    )


# The pieces of the computation are an implementation's, not a result's.


@pytest.mark.parametrize("chunk", [1, 40, 1 << 30])
@KINDS
def test_results_do_not_depend_on_how_the_components_are_grouped(
    kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix = make(ss.VP(), kind)
    x, t = mix.sample(7, 0.3, seed=0), torch.linspace(0.01, 0.9, 7, dtype=f64)
    want = [getattr(mix, k)(x, s) for k in ("x0", "score", "log_prob", "responsibilities") for s in (0.3, t)]
    empirical = ss.denoisers.Empirical(ss.VP(), normal(30, 3))
    also = [getattr(empirical, k)(x, s) for k in ("x0", "log_prob") for s in (0.3, t)]
    monkeypatch.setattr("scoresde.denoisers.mixture._CHUNK", chunk)
    got = [getattr(mix, k)(x, s) for k in ("x0", "score", "log_prob", "responsibilities") for s in (0.3, t)]
    again = [getattr(empirical, k)(x, s) for k in ("x0", "log_prob") for s in (0.3, t)]
    for a, b in zip(got + again, want + also, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("event", [(1,), (6,), (2, 3), (1, 3, 2), (1, 1, 2, 3)])
def test_events_of_any_shape(event: tuple[int, ...]) -> None:
    n = math.prod(event)
    means, std = normal(4, n), normal(4, n, seed=1).abs() + 0.1
    flat = ss.GaussianMixture(ss.VP(), means, std=std)
    mix = ss.GaussianMixture(ss.VP(), means.reshape(4, *event), std=std.reshape(4, *event))
    x, t = flat.sample(5, 0.4, seed=0), torch.linspace(0.1, 0.9, 5, dtype=f64)
    shaped = x.reshape(5, *event)
    assert torch.equal(mix.sample(5, 0.4, seed=0), shaped)
    assert torch.equal(mix.means, means.reshape(4, *event)) and mix.mean().shape == event
    for s in (0.4, t):
        assert torch.equal(mix.log_prob(shaped, s), flat.log_prob(x, s))
        assert torch.equal(mix.x0(shaped, s).flatten(1), flat.x0(x, s))
        assert torch.equal(mix.score(shaped, s).flatten(1), flat.score(x, s))
    empirical = ss.denoisers.Empirical(ss.VP(), means.reshape(4, *event))
    assert torch.equal(empirical.data, means.reshape(4, *event))
    assert empirical.x0(shaped, t).shape == (5, *event)
    assert empirical.sample(3, 0.1, seed=0).shape == (3, *event)
    assert mix.x0(shaped[:0], 0.4).shape == (0, *event) and mix.log_prob(shaped[:0], 0.4).shape == (0,)
    assert torch.allclose(mix.x0(shaped[2:3], t[2:3]), mix.x0(shaped, t)[2:3], rtol=1e-12)
    strided = shaped.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
    assert torch.allclose(mix.x0(strided, 0.4), mix.x0(shaped, 0.4).flip(0), rtol=1e-12)


@KINDS
def test_states_in_float32_are_answered_in_float32_and_computed_in_float64(kind: str) -> None:
    mix = make(ss.EDM(), kind)
    x = mix.sample(6, 0.01, seed=0, dtype=torch.float32)
    assert x.dtype == torch.float32
    t = torch.full((6,), 0.01)
    for name in ("x0", "eps", "score", "v", "velocity", "log_prob", "responsibilities"):
        fn = getattr(mix, name)
        for s in (0.01, t, t[0]):
            got = fn(x, s)
            assert got.dtype == torch.float32
            wide = fn(x.double(), s.double() if isinstance(s, Tensor) else s)
            assert torch.allclose(got, wide.float(), rtol=1e-6), name
    narrow = make(ss.EDM(), kind).to(torch.float32)  # a module like others: it can be cast, at its cost in digits
    assert narrow.means.dtype == torch.float32
    assert torch.allclose(narrow.x0(x, 0.01), mix.x0(x, 0.01), rtol=1e-4, atol=1e-4)


# Samples.


def ks(sample: Tensor, cdf: Callable[[Tensor], Tensor]) -> float:
    """Kolmogorov's statistic √n sup |F_n − F|; above 2.3 once in twenty thousand."""
    x = sample.sort().values
    n = len(x)
    steps = torch.arange(n + 1, dtype=f64) / n
    F = cdf(x)
    return float(torch.maximum((steps[1:] - F).max(), (F - steps[:-1]).max())) * n**0.5


@KINDS
@pytest.mark.parametrize("name", ["VP", "EDM", "Flow"])
def test_samples_have_the_exact_marginals_along_any_direction(name: str, kind: str) -> None:
    sde = SDES[name]
    mix = make(sde, kind)
    weights = torch.tensor(WEIGHTS, dtype=f64) / sum(WEIGHTS)
    directions = torch.cat([torch.eye(3, dtype=f64), normal(3, 3, seed=5)])
    for t in (0.0, 0.4):
        x = mix.sample(8000, t, seed=11)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        for u in directions:
            mean = alpha * MEANS @ u
            std = (alpha**2 * torch.einsum("i,kij,j->k", u, covariances(kind), u) + sigma**2 * (u @ u)).sqrt()
            cdf = lambda y, m=mean, s=std: D.Normal(m, s).cdf(y[:, None]) @ weights  # noqa: E731
            assert ks(x @ u, cdf) < 2.3, (sde, t, u)
            assert ks(1.1 * (x @ u), cdf) > 2.3 or ks(x @ u + 0.2, cdf) > 2.3, "the test sees a tenth"


@KINDS
def test_moments_are_those_of_the_definition_and_of_samples(kind: str) -> None:
    mix = make(ss.VP(), kind)
    w = torch.tensor(WEIGHTS, dtype=f64) / sum(WEIGHTS)
    mean = w @ MEANS
    cov = torch.einsum("k,kij->ij", w, covariances(kind) + MEANS[:, :, None] * MEANS[:, None]) - mean[:, None] * mean
    assert torch.allclose(mix.weights, w, rtol=1e-14) and torch.equal(mix.means, MEANS)
    assert torch.allclose(mix.component_covariances(), covariances(kind), rtol=1e-12, atol=1e-14)
    assert torch.allclose(mix.mean(), mean, rtol=1e-13)
    assert torch.allclose(mix.covariance(), cov, rtol=1e-12, atol=1e-14)
    n = 20_000
    x = mix.sample(n, seed=1)
    scale = cov.diag().sqrt()
    assert float(((x.mean(0) - mean).abs() / scale).max()) < 5 / n**0.5
    assert float(((x.T.cov() - cov).abs() / (scale[:, None] * scale)).max()) < 5 * 2 / n**0.5


@KINDS
def test_a_sample_depends_on_its_seed_and_its_index_alone(kind: str) -> None:
    mix = make(ss.VP(), kind)
    before = torch.get_rng_state()
    whole = mix.sample(9, 0.3, seed=4)
    assert torch.equal(mix.sample(5, 0.3, seed=4), whole[:5])
    assert torch.equal(mix.sample(4, 0.3, seed=ss.Noise(4, offset=5)), whole[5:])
    assert torch.equal(mix.sample(2, 0.3, seed=ss.Noise(4, indices=[8, 1])), whole[[8, 1]])
    assert torch.equal(mix.sample(9, 0.3, seed=4), whole)
    assert not torch.equal(mix.sample(9, 0.3, seed=5), whole)
    assert not torch.equal(mix.sample(2, 0.3), mix.sample(2, 0.3)), "without a seed, a fresh one"
    assert mix.sample(0, seed=0).shape == (0, 3)
    empirical = ss.denoisers.Empirical(ss.VP(), MEANS)
    assert torch.equal(empirical.sample(5, 0.3, seed=4), empirical.sample(9, 0.3, seed=4)[:5])
    assert torch.equal(torch.get_rng_state(), before), "the global generator is untouched"
    assert not torch.allclose(
        ss.Noise(4).normal((9, 3), 3, dtype=f64), (whole - ss.VP().alpha(0.3) * MEANS.mean(0)) / ss.VP().sigma(0.3)
    ), "and a sampler that starts at the same seed draws other numbers"


# The flow of one Gaussian.

ONE: dict[str, dict[str, object]] = {
    "one std": {"std": 0.3},
    "std of each entry": {"std": ROOT.abs()[:1, 0]},
    "full": {"cov": (ROOT @ ROOT.mT)[:1]},
    "low rank": {"factor": ROOT[:1, :, :2], "std": 0.2},
    "thin": {"factor": ROOT[:1, :, :1]},
}


@pytest.mark.parametrize("name", SDES)
@pytest.mark.parametrize("kind", ONE)
def test_flow_is_a_group_and_carries_each_marginal_to_the_next(name: str, kind: str) -> None:
    sde = SDES[name]
    gauss = ss.GaussianMixture(sde, MEANS[:1], **ONE[kind])  # type: ignore[arg-type]
    x = normal(4, 3)
    r, s, t = (u * sde.T for u in (0.1, 0.4, 0.8))
    assert torch.allclose(gauss.flow(x, s, s), x, rtol=1e-12, atol=1e-12)
    # On the way to little noise what is off the data shrinks, and its digits with it: compare in the wide direction.
    there = gauss.flow(gauss.flow(x, r, s), s, t)
    assert torch.allclose(there, gauss.flow(x, r, t), rtol=1e-10, atol=1e-10 * there.abs().max().item()), sde
    assert torch.allclose(gauss.flow(gauss.flow(x, r, t), t, r), x, rtol=1e-9, atol=1e-9), sde
    # It is affine, so N(α_s μ, S_s) goes to N(α_t μ, S_t) exactly when mean and A S_s Aᵀ do.
    origin = sde.alpha(r) * MEANS[:1]
    assert torch.allclose(gauss.flow(origin, r, t), sde.alpha(t) * MEANS[:1], rtol=1e-11, atol=1e-12)
    A = (gauss.flow(origin + torch.eye(3, dtype=f64), r, t) - gauss.flow(origin, r, t)).T
    C = gauss.component_covariances()[0]
    S = [sde.alpha(u) ** 2 * C + sde.sigma(u) ** 2 * torch.eye(3, dtype=f64) for u in (r, t)]
    assert torch.allclose(A @ S[0] @ A.T, S[1], rtol=1e-9, atol=1e-9 * S[1].abs().max().item()), sde
    assert gauss.flow(x.float(), r, t).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "kind"),
    [("VP", "full"), ("VE", "low rank"), ("EDM", "one std"), ("Flow", "full"), ("two functions", "std of each entry")],
)
def test_flow_equals_a_fine_integration_of_the_reverse_drift(name: str, kind: str) -> None:
    sde = SDES[name]
    gauss = ss.GaussianMixture(sde, MEANS[:1], **ONE[kind])  # type: ignore[arg-type]
    field = ss.denoisers.Reverse(gauss, 0.0).drift
    start, end = sde.t_of_lam(-1.5), sde.t_of_lam(1.5)
    x = y = gauss.sample(4, start, seed=0)
    times = torch.linspace(start, end, 81, dtype=f64).tolist()
    for s, t in pairwise(times):
        h, m = t - s, (s + t) / 2
        a = field(y, s)
        b = field(y + h / 2 * a, m)
        c = field(y + h / 2 * b, m)
        y = y + h / 6 * (a + 2 * b + 2 * c + field(y + h * c, t))
    assert torch.allclose(gauss.flow(x, start, end), y, rtol=1e-5, atol=1e-6), sde
    assert not torch.allclose(x, y, rtol=0.1)


# The same data elsewhere.


@KINDS
def test_under_another_process_it_is_the_same_data(kind: str) -> None:
    mix = make(ss.VP(), kind)
    x = mix.sample(5, 0.3, seed=0)
    want = mix.x0(x, 0.3)
    for name in ("EDM", "Flow", "Discrete"):
        moved, fresh = mix.under(SDES[name]), make(SDES[name], kind)
        t = 0.3 * SDES[name].T
        assert moved.sde is SDES[name]
        assert torch.equal(moved.x0(x, t), fresh.x0(x, t))
        assert torch.equal(moved.log_prob(x, t), fresh.log_prob(x, t))
        assert torch.equal(moved.sample(4, t, seed=1), fresh.sample(4, t, seed=1))
    assert mix.sde == ss.VP() and torch.equal(mix.x0(x, 0.3), want)
    empirical = ss.denoisers.Empirical(ss.VP(), MEANS)
    assert torch.equal(empirical.under(ss.EDM()).x0(x, 2.0), ss.denoisers.Empirical(ss.EDM(), MEANS).x0(x, 2.0))


def test_a_mixture_is_a_module_and_copies() -> None:
    for mix in (make(ss.VP(), "full"), make(ss.VP(), "std of each entry"), ss.denoisers.Empirical(ss.VP(), MEANS)):
        x = normal(4, 3)
        twin = copy.deepcopy(mix)
        assert torch.equal(twin.x0(x, 0.3), mix.x0(x, 0.3))
        assert list(mix.parameters()) == []
        other = type(mix)(ss.VP(), 2 * MEANS, **({} if isinstance(mix, ss.denoisers.Empirical) else {"std": 1.0}))  # type: ignore[arg-type]
        assert not torch.equal(other.x0(x, 0.3), mix.x0(x, 0.3))
        assert torch.equal(mix(x, 0.3), mix.x0(x, 0.3))
    data = MEANS.clone()
    mix = ss.GaussianMixture(ss.VP(), data, std=0.1)
    want = mix.x0(x, 0.3)
    data.add_(1.0)
    assert torch.equal(mix.x0(x, 0.3), want), "the data is the mixture's own"


# Derivatives.


# torch.func imports torch's own scripted formulas.
SCRIPT = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")


@SCRIPT
@KINDS
def test_transforms_of_torch_func_go_through(kind: str) -> None:
    mix = make(ss.VP(), kind)
    x, v = mix.sample(5, 0.4, seed=0), normal(5, 3, seed=1)
    t = 0.4
    log_p = lambda y: mix.log_prob(y[None], t)[0]  # noqa: E731
    score = lambda y: mix.score(y[None], t)[0]  # noqa: E731
    x0 = lambda y: mix.x0(y[None], t)[0]  # noqa: E731
    assert torch.allclose(vmap(score)(x), mix.score(x, t), rtol=1e-12)
    assert torch.allclose(vmap(jacrev(log_p))(x), mix.score(x, t), rtol=1e-10)
    curvature = vmap(hessian(log_p))(x)
    assert torch.allclose(curvature, vmap(jacrev(score))(x), rtol=1e-9, atol=1e-11)
    assert torch.allclose(curvature, curvature.mT, rtol=1e-9, atol=1e-11)
    # Second-order Tweedie: the Jacobian of x0 is α/σ² times the posterior covariance, so positive definite.
    a, s = ss.VP().alpha(t), ss.VP().sigma(t)
    J = vmap(jacrev(x0))(x)
    assert torch.allclose(J, (torch.eye(3, dtype=f64) + s**2 * curvature) / a, rtol=1e-9, atol=1e-11)
    assert bool((torch.linalg.eigvalsh((J + J.mT) / 2) > 0).all())
    value, tangent = jvp(lambda y: mix.score(y, t), (x,), (v,))
    assert torch.allclose(value, mix.score(x, t), rtol=1e-12)
    assert torch.allclose(tangent, torch.einsum("bij,bj->bi", curvature, v), rtol=1e-9, atol=1e-11)
    h = 1e-5
    slope = (mix.score(x + h * v, t) - mix.score(x - h * v, t)) / (2 * h)
    assert torch.allclose(tangent, slope, rtol=1e-6, atol=1e-7)
    y = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: mix.x0(y, t), (y,))
    assert torch.autograd.gradgradcheck(lambda y: mix.log_prob(y, t), (y,))


def test_gradients_with_respect_to_time_flow_through() -> None:
    # Fokker–Planck: ∂p/∂t = −∇·(velocity p), so ∂ log p/∂t = −∇·velocity − velocity · score.
    for name in ("VP", "EDM", "Flow", "two functions"):
        mix = make(SDES[name], "full")
        x = mix.sample(1, 0.3 * mix.sde.T, seed=0)
        t = torch.tensor(0.3 * mix.sde.T, dtype=f64, requires_grad=True)
        (of_time,) = torch.autograd.grad(mix.log_prob(x, t).sum(), t)
        s = t.item()
        J = torch.autograd.functional.jacobian(lambda y, m=mix, s=s: m.velocity(y, s)[0], x)[:, 0]
        want = -J.trace() - (mix.velocity(x, s) * mix.score(x, s)).sum()
        assert torch.allclose(of_time, want, rtol=1e-9), name


@SCRIPT
@pytest.mark.parametrize("name", ["VP", "Flow"])
def test_transforms_of_torch_func_go_through_the_velocity(name: str) -> None:
    mix = make(SDES[name], "full")
    x = mix.sample(3, 0.4, seed=0)
    for fn in (mix.velocity, ss.denoisers.Reverse(mix).drift):
        value, _ = jvp(lambda y, fn=fn: fn(y, 0.4), (x,), (x,))
        assert torch.allclose(value, fn(x, 0.4))
        assert vmap(jacrev(lambda y, fn=fn: fn(y[None], 0.4)[0]))(x).shape == (3, 3, 3)


# The optimal denoiser of a finite data set.


@ALL
def test_empirical_is_the_mixture_of_points(sde: ss.SDE) -> None:
    data = normal(12, 2, 3)
    empirical = ss.denoisers.Empirical(sde, data)
    points = ss.GaussianMixture(sde, data, std=0.0)
    thin = ss.GaussianMixture(sde, data, std=1e-9)
    t = inner_times(sde, 6)
    x = empirical.sample(6, 0.2 * sde.T, seed=0)
    for s in (t, t[2].item()):
        assert torch.allclose(empirical.x0(x, s), points.x0(x, s), rtol=1e-10, atol=1e-12), sde
        assert torch.allclose(empirical.x0(x, s), thin.x0(x, s), rtol=1e-6, atol=1e-6), sde
        assert torch.allclose(empirical.log_prob(x, s), points.log_prob(x, s), rtol=1e-10), sde
        assert torch.allclose(empirical.responsibilities(x, s), points.responsibilities(x, s), rtol=1e-6, atol=1e-12)
    alpha, sigma = (c[:, None] for c in (sde.alpha(t), sde.sigma(t)))
    size = (x.norm(dim=(1, 2)) + (alpha[:, 0] * data.norm(dim=(1, 2)).max()))[:, None, None] / sigma[..., None]
    assert float(((empirical.eps(x, t) - points.eps(x, t)).abs() / size).max()) < 1e-12, sde


def test_empirical_log_prob_equals_brute_force() -> None:
    sde = ss.VP()
    data = normal(7, 3)
    empirical = ss.denoisers.Empirical(sde, data)
    for t in (1e-4, 0.02, 0.5, 1.0):
        x = empirical.sample(4, t, seed=0)
        with mp.workdps(50):
            alpha, sigma = mp.mpf(sde.alpha(t)), mp.mpf(sde.sigma(t))
            for i, row in enumerate(x.tolist()):
                terms = [
                    mp.exp(
                        -sum((mp.mpf(a) - alpha * mp.mpf(b)) ** 2 for a, b in zip(row, d, strict=True)) / 2 / sigma**2
                    )
                    for d in data.tolist()
                ]
                want = mp.log(sum(terms) / 7) - 3 * mp.log(sigma * mp.sqrt(2 * mp.pi))
                got = mp.mpf(empirical.log_prob(x, t)[i].item())
                assert abs(got - want) < 1e-10 * (1 + abs(want)), t
        y = x.requires_grad_()
        (gradient,) = torch.autograd.grad(empirical.log_prob(y, t).sum(), y)
        assert relative(empirical.score(x.detach(), t), gradient) < 1e-9, t


def test_empirical_without_noise_is_the_nearest_datum() -> None:
    data = normal(20, 5)
    empirical = ss.denoisers.Empirical(ss.VP(), data)
    x = data[[3, 11, 7]] + 0.05 * normal(3, 5, seed=1)
    nearest = data[torch.cdist(x, data).argmin(1)]
    assert torch.equal(nearest, data[[3, 11, 7]])
    for t in (0.0, torch.zeros(3, dtype=f64), ss.VP().t_of_sigma(1e-9)):
        assert torch.allclose(empirical.x0(x, t), nearest, rtol=1e-7), t
    assert torch.equal(empirical.responsibilities(x, 0.0).argmax(1), torch.tensor([3, 11, 7]))
    far = 1e8 * normal(4, 5, seed=2)
    assert bool(empirical.x0(far, 0.0).isfinite().all())


def test_near_duplicate_data_far_from_the_origin_are_told_apart() -> None:
    # At a noise of a third of their distance; by expanding the squares the answer is off by its whole size.
    sde = ss.EDM()
    sigma = 3e-7
    empirical = ss.denoisers.Empirical(sde, TWINS)
    case = Hard(sde, sigma, {"means": TWINS, "std": 0.0}, around(TWINS, sigma))
    with mp.workdps(50):
        logs, _, x0s = truth(case)
    got = empirical.x0(case.x, sigma) - 1e3
    want = torch.tensor([[float(v - 1000) for v in row] for row in x0s], dtype=f64)
    assert torch.allclose(got, want, rtol=1e-6, atol=4e-13), "4e-13 is the spacing of numbers there"
    assert torch.allclose(
        empirical.log_prob(case.x, sigma), torch.tensor([float(v) for v in logs], dtype=f64), rtol=1e-9
    )
    shares = empirical.responsibilities(case.x, sigma)
    nearest = (case.x[:, None] - TWINS).square().sum(-1).argmin(1)  # these differences are exact
    assert torch.equal(shares.argmax(1), nearest)


x23 = torch.zeros(2, 3)
VP = ss.VP()
COV = torch.eye(3).expand(3, 3, 3)


def gm(**keywords: object) -> ss.GaussianMixture:
    return ss.GaussianMixture(VP, **{"means": MEANS, **keywords})  # type: ignore[arg-type]


BAD = {
    "no covariance": (lambda: gm(), ValueError, "covariances in one way"),
    "two covariances": (lambda: gm(std=0.1, cov=COV), ValueError, "covariances in one way"),
    "factor of a covariance": (lambda: gm(cov=COV, factor=COV), ValueError, "drop `factor`"),
    "process and means exchanged": (lambda: ss.GaussianMixture(MEANS, VP, std=1.0), TypeError, "`sde` must be an SDE"),  # type: ignore[arg-type]
    "means in a row": (
        lambda: gm(means=[1.0, 2.0], std=0.1),
        ValueError,
        r"`means` must have shape \(K, \*event\).*\(2,\)",
    ),
    "no means": (lambda: gm(means=torch.zeros(0, 3), std=0.1), ValueError, r"`means`.*\(0, 3\)"),
    "nan in the means": (lambda: gm(means=[[math.nan]], std=0.1), ValueError, "`means` must be finite, got nan"),
    "complex means": (lambda: gm(means=MEANS + 0j, std=0.1), TypeError, "`means` must be real numbers, got complex128"),
    "weights too few": (lambda: gm(std=0.1, weights=[1.0, 2.0]), ValueError, "`weights` must be 3 positive numbers"),
    "weight 0": (lambda: gm(std=0.1, weights=[1.0, 0.0, 1.0]), ValueError, "`weights` must be 3 positive numbers"),
    "weight infinite": (lambda: gm(std=0.1, weights=[1.0, math.inf, 1.0]), ValueError, "`weights` must be finite"),
    "negative std": (lambda: gm(std=-0.1), ValueError, "`std` must not be negative, got -0.1"),
    "std of another shape": (lambda: gm(std=[0.1, 0.2]), ValueError, r"`std` must be a number, \(3,\) or \(3, 3\)"),
    "covariance of another shape": (lambda: gm(cov=torch.eye(3)), ValueError, r"`cov` must have shape \(3, 3, 3\)"),
    "covariance not symmetric": (
        lambda: gm(cov=COV.triu() + torch.ones(3, 3).triu(1)),
        ValueError,
        "must be symmetric",
    ),
    "covariance not positive": (lambda: gm(cov=-COV), ValueError, "semidefinite, its smallest eigenvalue is -1"),
    "factor of another shape": (
        lambda: gm(factor=torch.ones(3, 2, 1)),
        ValueError,
        r"`factor` must have shape \(3, 3, r\)",
    ),
    "factor too wide": (lambda: gm(factor=torch.ones(3, 3, 4)), ValueError, "r <= 3"),
    "std of entries beside a factor": (
        lambda: gm(factor=torch.ones(3, 3, 1), std=torch.ones(3, 3)),
        ValueError,
        "`std` with `factor`",
    ),
    "state of another event": (lambda: gm(std=1.0).x0(torch.zeros(2, 4), 0.5), ValueError, r"\(B, 3\), got \(2, 4\)"),
    "integer state": (lambda: gm(std=1.0).score(x23.int(), 0.5), TypeError, "int32"),
    "list as state": (lambda: gm(std=1.0).log_prob([1.0], 0.5), TypeError, "got list"),  # type: ignore[arg-type]
    "time outside": (lambda: gm(std=1.0).x0(x23, 1.5), ValueError, r"\[0, 1\].*got 1.5"),
    "time outside, in a vector": (lambda: gm(std=1.0).score(x23, torch.tensor([0.5, 2.0])), ValueError, "got 2"),
    "wrong number of times": (lambda: gm(std=1.0).x0(x23, torch.ones(3) / 2), ValueError, "3 entries.*2 rows"),
    "samples as float": (lambda: gm(std=1.0).sample(2.0), TypeError, "`n` must be an integer"),  # type: ignore[arg-type]
    "negative number of samples": (lambda: gm(std=1.0).sample(-1), ValueError, "`n` must be at least 0"),
    "flow of many": (lambda: gm(std=1.0).flow(x23, 0.5, 0.1), ValueError, "1 component, this mixture has 3"),
    "another process that is none": (lambda: gm(std=1.0).under("vp"), TypeError, "`sde` must be an SDE"),  # type: ignore[arg-type]
    "velocity where it is infinite": (lambda: gm(std=1.0).velocity(x23, 0.0), ValueError, "not defined at t = 0.0"),
    "no data": (
        lambda: ss.denoisers.Empirical(VP, torch.zeros(0, 3)),
        ValueError,
        r"`data` must have shape \(N, \*event\)",
    ),
    "data in a row": (lambda: ss.denoisers.Empirical(VP, [1.0, 2.0]), ValueError, r"`data`.*got \(2,\)"),
    "infinite data": (lambda: ss.denoisers.Empirical(VP, [[math.inf]]), ValueError, "`data` must be finite, got inf"),
    "process of data": (lambda: ss.denoisers.Empirical(MEANS, VP), TypeError, "`sde` must be an SDE"),  # type: ignore[arg-type]
    "density of points": (
        lambda: ss.denoisers.Empirical(VP, MEANS).log_prob(x23, 0.0),
        ValueError,
        r"`t` must have σ\(t\) > 0",
    ),
    "score of points": (
        lambda: ss.denoisers.Empirical(VP, MEANS).score(x23, 0.0),
        ValueError,
        "not defined at t = 0.0",
    ),
    "list as state of data": (lambda: ss.denoisers.Empirical(VP, MEANS).x0([1.0], 0.5), TypeError, "got list"),  # type: ignore[arg-type]
    "state of another event of data": (
        lambda: ss.denoisers.Empirical(VP, MEANS).x0(torch.zeros(2, 4), 0.5),
        ValueError,
        r"\(2, 4\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
