"""Learned variances, the mean squared score and interpolation with conditions that belong to the denoiser."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import scoresde as ss

SDE = ss.VP()


def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return torch.cat([0.3 * x + 0.1 * label[:, None], label[:, None].expand_as(x)], 1)


MODEL = ss.Denoiser(net, SDE, predicts="eps", learned_variance=True)
LABEL = torch.tensor([-1.0, 0.0, 1.0])


def test_conditions_reach_the_variance_and_samples_do_not_depend_on_the_batch() -> None:
    method = ss.sampling.LearnedVariance()
    whole = ss.solve(MODEL.given(label=LABEL), (3, 4), method, steps=6, seed=0)
    assert whole.nfe == whole.calls == 6 and whole.times[-1] == 0.0 and whole.seed == 0
    for i, (label, variance) in enumerate(zip(LABEL, ("small", None, "large"), strict=True)):
        seed = ss.Noise(0, offset=i)
        alone = ss.sample(MODEL.given(label=label[None]), (1, 4), method, steps=6, seed=seed)
        torch.testing.assert_close(alone, whole.x[i : i + 1])
        if variance is not None:
            plain = ss.Denoiser(lambda x, t, c=label: 0.3 * x + 0.1 * c, SDE, predicts="eps")
            table = ss.sample(plain, (1, 4), ss.DDPM(variance), steps=6, seed=seed)
            torch.testing.assert_close(alone, table, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_every_step() -> None:
    label = LABEL.clone().requires_grad_()
    x = ss.Noise(0).normal((3, 4), 0, dtype=torch.float64)

    def loss(label: Tensor, grad: str) -> Tensor:
        return ss.sample(MODEL.given(label=label), x, ss.sampling.LearnedVariance(), steps=5, seed=1, grad=grad).sum()

    (gradient,) = torch.autograd.grad(loss(label, "full"), label)
    step = 1e-3 * torch.ones(3)
    difference = loss(LABEL + step, "off") - loss(LABEL - step, "off")
    assert float(gradient.sum()) == pytest.approx(float(difference) / 2e-3, rel=1e-3)


def test_the_mean_squared_score_and_interpolation_use_the_conditions_of_the_model() -> None:
    def shifted(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return (x - label[:, None]) / 2

    model = ss.Denoiser(shifted, SDE, predicts="x0").given(label=LABEL)
    data = ss.Noise(0).normal((3, 4), 0)
    grid = ss.grids.karras(SDE, 4)
    value = ss.sampling.mean_squared_score(model, data, grid, seed=1)
    x = SDE.perturb(data, float(grid[0]), ss.Noise(1).like(data, 0))
    assert float(value[0]) == pytest.approx(float(model.score(x, float(grid[0])).square().mean()), rel=1e-6)
    path = ss.sampling.interpolate(model, data, data.flip(0), 3, ss.DPMSolverPP(2), steps=20)
    for i in range(3):
        row = torch.tensor([i])
        alone = ss.sampling.interpolate(model.rows(row), data[row], data.flip(0)[row], 3, ss.DPMSolverPP(2), steps=20)
        torch.testing.assert_close(alone[:, 0], path[:, i], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["learned", "learned_range"])
def test_both_learned_variances_of_diffusers_give_the_steps_of_its_scheduler(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    scheduler = scheduling_ddpm.DDPMScheduler(variance_type=kind, clip_sample=False)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    scheduler.one = scheduler.one.double()
    z = [ss.Noise(8).normal((2, 3, 2), i, dtype=torch.float64) for i in range(2)]
    monkeypatch.setattr(ss.Noise, "like", lambda self, x, i: z[i])

    def unet(x: Tensor, t: Tensor) -> Tensor:
        r = (3 * x).sin() if kind == "learned_range" else (0.01 + 0.001 * x).square()
        return torch.cat([0.3 * x.cos(), r], 1)

    model = ss.interop.from_diffusers(unet, {**scheduler.config, "trained_betas": scheduler.betas.double()})
    x = ss.Noise(0).normal((2, 3, 2), 0, dtype=torch.float64)
    for index in (999, 500, 2):
        grid = model.sde.t_of_index(torch.tensor([index, index - 1, index - 2]))  # type: ignore[attr-defined]
        ours = ss.solve(model, x, ss.sampling.LearnedVariance(), grid=grid).x
        theirs = x
        for i in (0, 1):
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, i=i, **k: z[i])
            theirs = scheduler.step(unet(theirs, torch.tensor(0.0)), index - i, theirs).prev_sample
        assert float((ours - theirs).abs().max()) < 1e-11 * float(x.abs().max()), index  # rounding of 1 − ᾱ


def test_the_logarithm_of_a_variance_and_the_variance_itself_are_the_same() -> None:
    def model(kind: str) -> ss.Denoiser:
        def net(x: Tensor, t: Tensor) -> Tensor:
            log_v = -3 + x.sin()
            return torch.cat([0.3 * x, log_v if kind == "log" else log_v.exp()], 1)

        return ss.Denoiser(net, SDE, predicts="eps", learned_variance=kind)

    x = ss.Noise(0).normal((3, 4), 0, dtype=torch.float64)
    method = ss.sampling.LearnedVariance()
    a, b = (ss.sample(model(kind), x, method, steps=5, seed=1) for kind in ("log", "value"))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"`learned_variance` must be one of 'range', 'log', 'value', got 'raw'"):
        model("raw")


def labelled(kind: str | bool = True) -> ss.Denoiser:
    def net(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        y = label.reshape(-1, *[1] * (x.ndim - 1)).to(x)
        return torch.cat([0.3 * x + 0.1 * y, -1 + 0.2 * y + 0 * x if kind == "log" else (x + y).sin()], 1)

    return ss.Denoiser(net, SDE, predicts="eps", learned_variance=kind)


X = ss.Noise(3).normal((3, 4), 0, dtype=torch.float64)


def wrappers() -> dict[str, tuple[ss.denoisers.AbstractDenoiser, int]]:
    base, null = labelled(), {"label": 0.0}
    given = base.given(label=LABEL)
    return {
        "two passes": (ss.ClassifierFree(given, 3.0, null=null), 2),
        "one pass": (ss.ClassifierFree(given, 3.0, null=null, one_forward=True), 2),
        "scales of samples": (ss.ClassifierFree(given, torch.tensor([0.0, 1.0, 3.0]), null=null), 2),
        "given outside": (ss.ClassifierFree(base, 3.0, null=null).given(label=LABEL), 2),
        "scale 1": (ss.ClassifierFree(given, 1.0, null=null), 1),
        "scale 0": (ss.ClassifierFree(given, 0.0, null=null), 2),
        "interval": (ss.ClassifierFree(given, 3.0, null=null, interval=(0.9, 1.0)), 1),
        "rule": (ss.ClassifierFree(given, 3.0, null=null, rule=ss.guidance.Rescale()), 2),
        "classifier": (ss.guidance.ClassifierGuidance(given, lambda x, t: -x.square().sum(1)), 1),
        "classifier of x0": (ss.guidance.ClassifierGuidance(given, lambda x: -x.square().sum(1), sees="x0"), 1),
        "weak model": (ss.guidance.AutoGuidance(given, base.given(label=-LABEL), 2.0), 2),
        "composed": (ss.guidance.Compose(base.given(label=0 * LABEL), [given, base.given(label=-LABEL)], [2, 1]), 3),
        "clamped": (ss.guidance.Clamp(ss.ClassifierFree(given, 3.0, null=null)), 2),
        "threshold": (ss.guidance.DynamicThreshold(given), 1),
        "other process": (ss.denoisers.Rescheduled(given, ss.Cosine()), 1),
        "posterior": (
            ss.inverse.DPS(given, ss.inverse.Measurement(ss.inverse.Mask(torch.arange(4) < 2), X[:, :2], std=1.0)),
            1,
        ),
    }


@pytest.mark.parametrize("name", wrappers())
def test_guidance_keeps_the_variance_of_the_branch_with_the_condition(name: str) -> None:
    model, evaluations = wrappers()[name]
    counter = ss.denoisers.Counter()
    mean, variance = model.counted(counter).x0_and_variance(X, 0.4)
    torch.testing.assert_close(mean, model.x0(X, 0.4), rtol=1e-12, atol=1e-12)
    assert counter.states == 3 * evaluations and not variance.requires_grad
    if name != "other process":  # whose network sees a rescaled state
        assert torch.equal(variance, labelled().given(label=LABEL).x0_and_variance(X, 0.4)[1])
    index = torch.tensor([2, 0])
    torch.testing.assert_close(model.rows(index).x0_and_variance(X[index], 0.4)[1], variance[index])
    whole = ss.sample(model, X, ss.sampling.LearnedVariance(), steps=4, seed=2)
    assert whole.isfinite().all() and float((whole - ss.sample(model, X, ss.DDPM(), steps=4, seed=2)).abs().max()) > 0


def test_a_scale_of_one_is_the_conditional_sampler_and_guidance_moves_the_mean_only() -> None:
    given = labelled().given(label=LABEL)
    method = ss.sampling.LearnedVariance()
    plain = ss.sample(given, X, method, steps=5, seed=0)
    guided = ss.sample(ss.ClassifierFree(given, 1.0, null={"label": 0.0}), X, method, steps=5, seed=0)
    assert torch.equal(guided, plain)
    elbos = [
        ss.elbo(m, X, grid=ss.grids.karras(SDE, 5, t_end=0.01), variance="learned", seed=0).value
        for m in (given, ss.guidance.Clamp(given, -1e9, 1e9))
    ]
    assert torch.equal(elbos[0], elbos[1])


def test_a_wrapper_without_a_learned_variance_says_so() -> None:
    fixed = ss.Denoiser(lambda x, t, label: x, SDE, predicts="eps").given(label=LABEL)
    guided = ss.ClassifierFree(fixed, 2.0, null={"label": 0.0})
    with pytest.raises(ValueError, match="ClassifierFree predicts no variance; make the denoiser with"):
        guided.x0_and_variance(X, 0.4)
    moved = ss.denoisers.Rescheduled(labelled("log").given(label=LABEL), ss.Cosine())
    with pytest.raises(ValueError, match="the network returns the variance of a step of its own process"):
        moved.x0_and_variance(X, 0.4)
