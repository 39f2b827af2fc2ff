"""Guidance: exact on a mixture with labels, bit for bit where it should be nothing, under every solver."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.denoisers.base import Given
from scoresde.guidance.classifier import ClassifierGuidance
from scoresde.guidance.classifier_free import AutoGuidance, ClassifierFree, Compose
from scoresde.guidance.rules import APG, Momentum, Rescale, ZeroStar, plus_plus
from scoresde.guidance.thresholds import Clamp, DynamicThreshold

F64 = torch.float64
MEANS = torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.0, -1.0], [2.0, 0.0]], dtype=F64)
WEIGHTS = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=F64)
LABELS = [0, 0, 1, 2]  # of the components
EVERYTHING = 3  # the null label


class Labelled(ss.denoisers.AbstractDenoiser):
    """A mixture whose components have labels: under a label it is the components of that label."""

    def __init__(self, sde: ss.SDE) -> None:
        super().__init__(sde)
        self.calls = list[int]()

        def part(*labels: int) -> ss.GaussianMixture:
            rows = [k for k, label in enumerate(LABELS) if label in labels]
            return ss.GaussianMixture(sde, MEANS[rows], weights=WEIGHTS[rows], std=0.4)

        self.parts = nn.ModuleList([part(0), part(1), part(2), part(0, 1, 2)])

    def part(self, label: int) -> ss.GaussianMixture:
        mix = self.parts[label]
        assert isinstance(mix, ss.GaussianMixture)
        return mix

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        self.calls.append(len(x))
        label = cond["label"]
        label = label["class"] if isinstance(label, dict) else label
        out = torch.zeros_like(x)
        for k in label.unique().tolist():
            rows = (label.expand(len(x)) == k).nonzero()[:, 0]
            out[rows] = self.part(k).x0(x[rows], t[rows] if isinstance(t, Tensor) and t.ndim else t)
        return out


VP = Labelled(ss.VP())
X = VP.part(EVERYTHING).sample(6, 0.4, seed=0)
LABEL = torch.tensor([0, 1, 2, 0, 1, 2])
NULL = {"label": EVERYTHING}


def guided(scale: Any, model: ss.denoisers.AbstractDenoiser = VP, **options: Any) -> ClassifierFree:
    return ClassifierFree(model, scale, null=NULL, **options)


SOLVERS: list[Any] = [
    ss.DDIM(),
    ss.UniPC(3),
    ss.solvers.DPMSolver(2),
    ss.VelocityAB(3),
    ss.EDMHeun(),
    ss.DDPM(),
    ss.solvers.SASolver(),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_scale_one_is_the_conditional_model_and_zero_the_unconditional_to_the_bit(solver: Any) -> None:
    start = ss.Start(dtype=F64)
    run = lambda model, **cond: ss.sample(model.given(**cond), (6, 2), solver, steps=6, seed=1, start=start)  # noqa: E731
    assert torch.equal(run(guided(1.0), label=LABEL), run(VP, label=LABEL))
    assert torch.equal(run(guided(0.0), label=LABEL), run(VP, label=torch.full((6,), EVERYTHING)))
    assert not torch.equal(run(guided(1.5), label=LABEL), run(VP, label=LABEL))
    per_sample = torch.tensor([1.0, 0.0] * 3)
    mixed = run(guided(per_sample), label=LABEL)
    assert torch.equal(mixed[::2], run(VP, label=LABEL)[::2])
    assert torch.equal(mixed[1::2], run(VP, label=torch.full((6,), EVERYTHING))[1::2])


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow(), ss.SubVP()], ids=repr)
@pytest.mark.parametrize("scale", [-1.0, 0.3, 2.0, 7.5])
def test_the_tilted_score_is_that_of_automatic_differentiation(sde: ss.SDE, scale: float) -> None:
    model = Labelled(sde)
    t = 0.3 * sde.T
    x = model.part(EVERYTHING).sample(5, t, seed=3).requires_grad_()
    base, tilted = model.part(EVERYTHING), model.part(0)
    log_p = base.log_prob(x, t) + scale * (tilted.log_prob(x, t) - base.log_prob(x, t))
    (truth,) = torch.autograd.grad(log_p.sum(), x)
    ours = guided(scale, model).score(x.detach(), t, label=torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)
    experts = Compose(Given(model, label=torch.tensor([EVERYTHING])), [Given(model, label=torch.tensor([0]))], [scale])
    torch.testing.assert_close(experts.score(x.detach(), t), truth, rtol=1e-10, atol=1e-10)


def test_a_product_of_experts_with_a_negative_one_is_the_tilted_density() -> None:
    x, t, w = X.clone().requires_grad_(), 0.4, (1.2, -0.7)
    base = VP.part(EVERYTHING)
    log_p = base.log_prob(x, t)
    for k, weight in zip((1, 2), w, strict=True):
        log_p = log_p + weight * (VP.part(k).log_prob(x, t) - base.log_prob(x, t))
    (truth,) = torch.autograd.grad(log_p.sum(), x)
    model = Compose(Given(VP, label=torch.tensor([3])), [Given(VP, label=torch.tensor([k])) for k in (1, 2)], list(w))
    torch.testing.assert_close(model.score(X, t), truth, rtol=1e-10, atol=1e-10)


def test_one_forward_is_two_in_one_batch() -> None:
    model = Labelled(ss.VP())
    calls: dict[bool, list[int]] = {}
    out = {}
    for one in (False, True):
        model.calls.clear()
        out[one] = guided(2.5, model, one_forward=one).x0(X, 0.4, label=LABEL)
        calls[one] = list(model.calls)
    torch.testing.assert_close(out[True], out[False], rtol=1e-12, atol=1e-12)
    assert calls == {False: [6, 6], True: [12]}
    model.calls.clear()
    guided(1.0, model).x0(X, 0.4, label=LABEL)
    guided(0.0, model).x0(X, 0.4, label=LABEL)
    assert model.calls == [6, 6], "nothing is asked that is not used"


@pytest.mark.parametrize("one", [False, True])
def test_conditions_are_trees_and_times_may_be_one_a_sample(one: bool) -> None:
    tree = {"label": {"class": LABEL}}
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    ours = ClassifierFree(VP, 3.0, null={"label": {"class": torch.tensor([3])}}, one_forward=one).x0(X, t, **tree)
    rows = [guided(3.0).x0(X[i : i + 1], float(t[i]), label=LABEL[i : i + 1]) for i in range(6)]
    torch.testing.assert_close(ours, torch.cat(rows), rtol=1e-12, atol=1e-12)
    broadcast = ClassifierFree(VP, 3.0, null={"label": 3}, one_forward=one).x0(X, t, **tree)
    assert torch.equal(ours, broadcast), "one null value stands for every leaf"


def test_a_batch_may_be_split_anywhere() -> None:
    s = torch.tensor([1.0, 2.0, 3.0, 0.5, 4.0, 0.0])

    def part(rows: slice) -> Tensor:
        noise = ss.Noise(5, offset=rows.start)
        model = guided(s[rows]).given(label=LABEL[rows])
        return ss.sample(model, (rows.stop - rows.start, 2), ss.DDPM(), steps=5, seed=noise)

    whole = part(slice(0, 6))
    torch.testing.assert_close(whole, torch.cat([part(slice(0, 1)), part(slice(1, 4)), part(slice(4, 6))]))


def test_a_scale_may_be_a_function_of_time_and_an_interval_is_one() -> None:
    step = guided(lambda t: 3.0 if 0.2 <= t <= 0.6 else 1.0)
    interval = guided(3.0, interval=(0.2, 0.6))
    for t in (0.1, 0.2, 0.4, 0.6, 0.8):
        assert torch.equal(step.x0(X, t, label=LABEL), interval.x0(X, t, label=LABEL))
    t = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9], dtype=F64)
    many = interval.x0(X, t, label=LABEL)
    each = torch.cat([step.x0(X[i : i + 1], float(t[i]), label=LABEL[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(many, each, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "velocity"])
def test_rescaled_guidance_has_the_spread_of_the_conditional_model(prediction: str) -> None:
    x = torch.cat([X, X.flip(0)], 1).reshape(6, 4)
    mix = ss.GaussianMixture(ss.VP(), MEANS.repeat(1, 2), std=0.4)
    weak = ss.GaussianMixture(ss.VP(), MEANS.repeat(1, 2) * 0.5, std=0.8)
    full = AutoGuidance(mix, weak, 4.0, rule=Rescale(1.0, prediction))
    of = lambda model: getattr(model, "x0" if prediction == "x0" else prediction)(x, 0.4)  # noqa: E731
    torch.testing.assert_close(of(full).std(1), of(mix).std(1), rtol=1e-9, atol=1e-9)
    none = AutoGuidance(mix, weak, 4.0, rule=Rescale(0.0, prediction)).x0(x, 0.4)
    torch.testing.assert_close(none, AutoGuidance(mix, weak, 4.0).x0(x, 0.4), rtol=1e-9, atol=1e-9)


def test_projected_guidance_splits_the_difference() -> None:
    plain = guided(4.0).x0(X, 0.4, label=LABEL)
    torch.testing.assert_close(guided(4.0, rule=APG(eta=1.0)).x0(X, 0.4, label=LABEL), plain)
    strong = VP.x0(X, 0.4, label=LABEL)
    move = guided(4.0, rule=APG(eta=0.0)).x0(X, 0.4, label=LABEL) - strong
    assert float((move * strong).sum(1).abs().max()) < 1e-12, "nothing along the prediction"
    short = guided(4.0, rule=APG(eta=1.0, norm=1e-3)).x0(X, 0.4, label=LABEL) - strong
    torch.testing.assert_close(short.norm(dim=1), torch.full((6,), 3e-3, dtype=F64))


def test_momentum_is_the_published_loop_and_begins_anew_with_every_run() -> None:
    sde, beta, eta, norm, scale = VP.sde, -0.6, 0.3, 0.8, 4.0
    grid = ss.grids.uniform_t(sde, 7)
    x = start = sde.prior().sample((6, 2), ss.Noise(0), dtype=F64)
    average = torch.zeros_like(x)
    for t, s in pairwise(grid.tolist()):
        c, u = VP.x0(x, t, label=LABEL), VP.x0(x, t, label=torch.full((6,), EVERYTHING))
        average = c - u + beta * average
        delta = average * (norm / average.norm(dim=1, keepdim=True)).clamp_max(1)
        unit = c / c.norm(dim=1, keepdim=True)
        parallel = (delta * unit).sum(1, keepdim=True) * unit
        x0 = c + (scale - 1) * (delta - parallel + eta * parallel)
        x = sde.alpha(s) * x0 + sde.sigma(s) * (x - sde.alpha(t) * x0) / sde.sigma(t)
    model = guided(scale, rule=Momentum(APG(eta, norm), beta))
    run = lambda: ss.sample(model.given(label=LABEL), start, ss.DDIM(), grid=grid)  # noqa: E731
    torch.testing.assert_close(run(), x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run(), x, rtol=1e-9, atol=1e-9)
    none = guided(scale, rule=Momentum(APG(eta, norm), 0.0))
    plain = ss.sample(guided(scale, rule=APG(eta, norm)).given(label=LABEL), start, ss.DDIM(), grid=grid)
    torch.testing.assert_close(ss.sample(none.given(label=LABEL), start, ss.DDIM(), grid=grid), plain)
    for t in (0.5, 0.7):  # the second is a later time: as of a run that starts
        fresh = guided(scale, rule=Momentum(APG(eta, norm), beta)).x0(X, t, label=LABEL)
        torch.testing.assert_close(model.x0(X, t, label=LABEL), fresh)


def test_momentum_refuses_what_has_no_order() -> None:
    model = guided(4.0, rule=Momentum())
    with pytest.raises(TypeError, match="`t` must be one time for all samples, because Momentum sums"):
        model.x0(X, torch.linspace(0.1, 0.9, 6), label=LABEL)
    with pytest.raises(RuntimeError, match="Momentum changes with every evaluation, so its gradient would be wrong"):
        model.x0(X.clone().requires_grad_(), 0.4, label=LABEL)
    with pytest.raises(ValueError, match="`beta` must be finite and above -1 and below 1, got -1"):
        Momentum(beta=-1)
    with pytest.raises(TypeError, match="`rule` must be a rule such as APG"):
        Momentum(-0.5)  # type: ignore[arg-type]


def test_zero_star_fits_the_weak_velocity_first() -> None:
    model = Labelled(ss.Flow())
    star = guided(3.0, model, rule=ZeroStar(zero_above=0.9))
    v_c, v_u = model.velocity(X, 0.5, label=LABEL), model.velocity(X, 0.5, label=torch.full((6,), 3))
    gamma = (v_c * v_u).sum(1, keepdim=True) / (v_u * v_u).sum(1, keepdim=True)
    torch.testing.assert_close(star.velocity(X, 0.5, label=LABEL), -2 * gamma * v_u + 3 * v_c)
    assert float(star.velocity(X, 0.95, label=LABEL).abs().max()) < 1e-12
    t = torch.tensor([0.5, 0.95] * 3, dtype=F64)
    torch.testing.assert_close(star.velocity(X, t, label=LABEL)[::2], star.velocity(X, 0.5, label=LABEL)[::2])


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow()], ids=repr)
@pytest.mark.parametrize("lam", [0.2, 0.6, 1.0])
def test_cfg_plus_plus_is_ddim_with_a_scale_of_its_grid(sde: ss.SDE, lam: float) -> None:
    model = Labelled(sde)
    grid = ss.grids.uniform_t(sde, 7)
    x = start = sde.prior().sample((6, 2), ss.Noise(0), dtype=F64)
    for t, s in pairwise(grid.tolist()):  # algorithm 2: denoise with guidance, renoise without
        c, u = model.x0(x, t, label=LABEL), model.x0(x, t, label=torch.full((6,), EVERYTHING))
        x = sde.alpha(s) * (u + lam * (c - u)) + sde.sigma(s) * (x - sde.alpha(t) * u) / sde.sigma(t)
    ours = ss.sample(guided(plus_plus(sde, grid, lam), model).given(label=LABEL), start, ss.DDIM(), grid=grid)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)
    scale = plus_plus(sde, grid, lam)
    times = (grid[:-1] + grid[1:]) / 2
    torch.testing.assert_close(scale(times), torch.tensor([scale(float(t)) for t in grid[:-1]], dtype=F64))
    with pytest.raises(ValueError, match="must decrease from noise to data"):
        plus_plus(sde, ss.grids.ancestral(sde, grid), lam)


# Gradients.


def log_label(k: int) -> Any:
    """The exact noise-aware classifier: log p(label = k | x_t)."""
    prior = math.log(sum(w for w, label in zip(WEIGHTS.tolist(), LABELS, strict=True) if label == k))
    return lambda x, t: VP.part(k).log_prob(x, t) + prior - VP.part(EVERYTHING).log_prob(x, t)


def test_the_exact_classifier_makes_the_unconditional_model_conditional() -> None:
    base = VP.part(EVERYTHING)
    model = ClassifierGuidance(base, log_label(1))
    torch.testing.assert_close(model.x0(X, 0.4), VP.part(1).x0(X, 0.4), rtol=1e-9, atol=1e-9)
    a = ss.sample(model, (8, 2), ss.UniPC(2), steps=10, seed=0, start=ss.Start(dtype=F64))
    b = ss.sample(VP.part(1), (8, 2), ss.UniPC(2), steps=10, seed=0, start=ss.Start(dtype=F64))
    torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)
    assert not a.requires_grad


def test_the_gradient_is_with_respect_to_the_noisy_state() -> None:
    base = VP.part(EVERYTHING)
    t, alpha, sigma = 0.4, base.sde.alpha(0.4), base.sde.sigma(0.4)
    loss = lambda x0: -(x0 - 1).square().sum(1)  # noqa: E731
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(base.x0(x, t)).sum(), x)
    expected = base.x0(X, t) + 0.7 * sigma**2 / alpha * slope
    with torch.no_grad():
        ours = ClassifierGuidance(base, loss, 0.7, sees="x0").x0(X, t)
        short = ClassifierGuidance(base, loss, 0.7, sees="x0", through_net=False).x0(X, t)
    torch.testing.assert_close(ours, expected)
    x0 = base.x0(X, t)
    torch.testing.assert_close(short, x0 + 0.7 * sigma**2 / alpha**2 * -2 * (x0 - 1))
    (through,) = torch.autograd.grad(ClassifierGuidance(base, loss, 0.7, sees="x0").x0(x, t).sum(), x)
    step = 1e-6 * torch.ones_like(X)
    plus, minus = (ClassifierGuidance(base, loss, 0.7, sees="x0").x0(X + s, t).sum() for s in (step, -step))
    assert float(through.sum()) == pytest.approx(float(plus - minus) / 2e-6, rel=1e-6)


def test_a_gradient_that_is_not_there_is_missed_aloud() -> None:
    class Silent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 2)

        @torch.no_grad()
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.net(x)  # type: ignore[no-any-return]

    constant = ss.Denoiser(lambda x, t: torch.zeros_like(x), ss.VP(), predicts="x0")
    for model in (ss.Denoiser(Silent(), ss.VP(), predicts="eps"), constant):  # x0 of the first depends on x beside it
        with pytest.raises(ValueError, match=r"the network has no gradient.*no_grad"):
            ClassifierGuidance(Given(model), lambda x0: x0.sum(1), sees="x0").x0(torch.ones(2, 2), 0.5)
    with pytest.raises(ValueError, match="`log_prob` has no gradient"):
        ClassifierGuidance(VP.part(0), lambda x, t: x.detach().sum(1)).x0(X, 0.4)
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.inference_mode\(\) forbids"):
        ClassifierGuidance(VP.part(0), log_label(1)).x0(X, 0.4)
    with pytest.raises(ValueError, match=r"one number for each row, \(6,\), got \(6, 2\)"):
        ClassifierGuidance(VP.part(0), lambda x, t: x).x0(X, 0.4)


def test_a_classifier_may_know_a_condition_that_the_network_does_not() -> None:
    base = VP.part(EVERYTHING)
    each = lambda x, t, label: torch.stack([log_label(k)(x, t) for k in range(3)])[label, torch.arange(len(x))]  # noqa: E731
    model = ClassifierGuidance(base, each, known=["label"])
    torch.testing.assert_close(model.x0(X, 0.4, label=LABEL), VP.x0(X, 0.4, label=LABEL), rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="the condition label is missing: `known` lists it"):
        model.x0(X, 0.4)


# Limits.


def test_thresholds_are_those_of_each_sample() -> None:
    model = ss.Denoiser(lambda x, t: x, ss.EDM(), predicts="x0", time="t")
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=F64) * torch.arange(1, 6).reshape(
        5, 1, 1, 1
    )
    for q in (0.5, 0.9, 0.995, 1.0):
        s = x.abs().flatten(1).quantile(q, dim=1).clamp_min(1.0)[:, None, None, None]
        ours = DynamicThreshold(model, q).x0(x, 1.0)
        torch.testing.assert_close(ours, x.clamp(-s, s) / s)
        torch.testing.assert_close(DynamicThreshold(model, q).x0(x[2:3], 1.0), ours[2:3])
    assert torch.equal(DynamicThreshold(model).x0(0.1 * x[:1], 1.0), 0.1 * x[:1]), "data within limits stays"
    assert torch.equal(Clamp(model, -0.5, 2.0).x0(x, 1.0), x.clamp(-0.5, 2.0))


# Wrong input.


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="condition `label` has 4 rows and the state has 6"):
        guided(2.0).x0(X, 0.4, label=LABEL[:4])
    with pytest.raises(ValueError, match="`scale` has 4 entries and the state has 6 rows"):
        guided(torch.ones(4)).x0(X, 0.4, label=LABEL)
    with pytest.raises(ValueError, match=r"`scale` must be a number or of shape \(B,\)"):
        guided(torch.ones(6, 2)).x0(X, 0.4, label=LABEL)
    with pytest.raises(ValueError, match="the condition label is missing"):
        guided(2.0).x0(X, 0.4)
    with pytest.raises(TypeError, match="`null` must be a dictionary of null conditions"):
        ClassifierFree(VP, 2.0, null={})
    with pytest.raises(ValueError, match=r"`null` of `label` has shape \(5,\)"):
        ClassifierFree(VP, 2.0, null={"label": torch.zeros(5)}).x0(X, 0.4, label=LABEL)
    with pytest.raises(ValueError, match="`null` of `label` must be a tree like the condition: "):
        ClassifierFree(VP, 2.0, null={"label": {"other": 3}}).x0(X, 0.4, label={"class": LABEL})
    with pytest.raises(ValueError, match="`one_forward` needs a tensor with one row for each sample"):
        ClassifierFree(VP, 2.0, null={"label": None}, one_forward=True).x0(X, 0.4, label=LABEL)
    with pytest.raises(ValueError, match="`interval"):
        guided(2.0, interval=(0.5, 0.2))
    with pytest.raises(ValueError, match="on the same process"):
        AutoGuidance(VP, Labelled(ss.EDM()), 2.0)
    with pytest.raises(ValueError, match="`weights` must have one entry for each of 1 experts"):
        Compose(VP, [VP], [1.0, 2.0])
    with pytest.raises(TypeError, match="`model` must be a denoiser"):
        Clamp(lambda x, t: x)  # type: ignore[arg-type]
