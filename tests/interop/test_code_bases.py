"""Networks of other code bases: stand-ins with their calling conventions and an exact mixture inside."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde import interop

f64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.5], [1.0, -0.5], [0.2, 1.2]])


def mixture(sde: ss.SDE, shift: float = 0.0) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, MEANS + shift, std=0.3)


class Foreign(nn.Module):
    """Base of the stand-ins: an exact denoiser of x₀ + σ ε in float64, for images (B, 2, 1, 1) or vectors (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)  # so that they have a dtype and a device
        self.exact = [mixture(ss.EDM(T=1e7), shift) for shift in (0.0, 0.7)]

    def clean(self, x: Tensor, sigma: Tensor, shift: Tensor | None = None) -> Tensor:
        """E[x0 given x0 + σ ε = x]; rows with shift = 1 have the other data."""
        flat = x.detach().double().flatten(1)
        sigma = sigma.double().flatten().expand(len(x))
        out = self.exact[0].x0(flat, sigma)
        if shift is not None:
            out = torch.where(shift.reshape(-1, 1).bool(), self.exact[1].x0(flat, sigma), out)
        return (out.reshape(x.shape) * self.scale.double()).to(x.dtype)


class EDMPrecond(Foreign):
    """EDM: net(x, σ, class_labels=one-hot, force_fp32=False, **model_kwargs), with σ in a batch and float32 inside."""

    label_dim, sigma_min, sigma_max, sigma_data, img_channels = 2, 0.0, float("inf"), 0.5, 2
    use_fp16 = False

    def forward(
        self, x: Tensor, sigma: Tensor, class_labels: Any = None, force_fp32: bool = False, **model_kwargs: Any
    ) -> Tensor:
        assert set(model_kwargs) <= {"augment_labels"}
        x, sigma = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        labels = torch.zeros([1, self.label_dim]) if class_labels is None else class_labels.to(torch.float32)
        return self.clean(x, sigma, labels.reshape(-1, self.label_dim)[:, 1])


class VEPrecond(EDMPrecond):
    label_dim, sigma_min, sigma_max = 2, 0.02, 100.0


class IDDPMPrecond(EDMPrecond):
    """Its network has labels M − 1 − (index of the nearest of M levels)."""

    sigma_min, sigma_max = 0.0064, 156.0


class EDM2Precond(EDMPrecond):
    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        class_labels: Any = None,
        force_fp32: bool = False,
        return_logvar: bool = False,
        **unet_kwargs: Any,
    ) -> Any:  # type: ignore[override]
        out = super().forward(x, sigma, class_labels)
        return (out, torch.zeros(len(x), 1, 1, 1)) if return_logvar else out


class GuidedUNet(Foreign):
    """Guided diffusion: net(x, timesteps, y=None) with indices; twice the channels."""

    def __init__(
        self, N: int = 1000, rescaled: bool = False, learned: bool = True, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.sde = ss.Discrete(torch.linspace(0.1 / N, 20 / N, N, dtype=f64))
        self.rescaled, self.learned, self.dtype = rescaled, learned, dtype
        self.labels: list[float] = []

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        h = x.type(self.dtype)
        self.labels.append(float(timesteps[0]))
        t = timesteps.double() * (self.sde.N / 1000 if self.rescaled else 1) + 1
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (self.sde.alpha(t), self.sde.sigma(t)))
        x0 = self.clean(h.double() / alpha, sigma / alpha, y)
        eps = ((h.double() - alpha * x0) / sigma).to(x.dtype)
        return torch.cat([eps, torch.zeros_like(eps)], dim=1) if self.learned else eps


class NCSNpp(Foreign):
    """score_sde: net(x, labels); labels 999 t and the noise (VP), or labels σ and the score (VE)."""

    def __init__(self, kind: str, N: int | None = None) -> None:
        super().__init__()
        self.kind, self.N = kind, N

    def forward(self, x: Tensor, time_cond: Tensor) -> Tensor:
        label, wide = time_cond.double(), x.double()
        if self.kind == "ve":
            sigma = label if self.N is None else 0.01 * 5000 ** ((self.N - 1 - label) / (self.N - 1))
            sigma = sigma.reshape(-1, 1, 1, 1)
            return ((self.clean(wide, sigma) - wide) / sigma**2).to(x.dtype)
        if self.N is not None:
            sde: ss.SDE = ss.Discrete(torch.linspace(0.1 / self.N, 20 / self.N, self.N, dtype=f64))
            t = label + 1
        else:
            sde, t = (ss.VP() if self.kind == "vp" else ss.SubVP()), (label / 999).clamp(0, 1)
        alpha, sigma = (c.reshape(-1, 1, 1, 1) for c in (sde.alpha(t), sde.sigma(t)))
        return ((wide - alpha * self.clean(wide / alpha, sigma / alpha)) / sigma).to(x.dtype)


class Velocity(Foreign):
    """Velocity towards the data at u, where the state is u x0 + (1 − u) ε."""

    def velocity(self, x: Tensor, u: Tensor, y: Tensor | None) -> Tensor:
        u = u.double().reshape(-1, 1, 1, 1).clamp(1e-6, 1 - 1e-6)
        x0 = self.clean(x.double() / u, (1 - u) / u, y)
        return ((x0 - x.double()) / (1 - u)).to(x.dtype)


class MetaWrapper(Velocity):
    """flow_matching: ModelWrapper.forward(x, t, **extras), data at 1."""

    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return self.velocity(x, t, extras.get("label"))


class TorchCFM(Velocity):
    """torchcfm: UNetModelWrapper.forward(t, x, y=None), data at 1."""

    def forward(self, t: Tensor, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.velocity(x, t, y)


class KWrapper(Foreign):
    """k-diffusion: wrapper(input, sigma, **extra_args) with σ (B,), of the discrete and of the continuous wrappers."""

    def __init__(self, levels: bool) -> None:
        super().__init__()
        if levels:
            self.register_buffer("sigmas", torch.linspace(math.log(0.03), math.log(14.6), 1000).exp())

    def __getattr__(self, name: str) -> Any:
        if name in ("sigma_min", "sigma_max") and "sigmas" in self._buffers:
            return self._buffers["sigmas"][0 if name == "sigma_min" else -1]
        return super().__getattr__(name)

    def forward(self, input: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        assert sigma.shape == (len(input),)
        return self.clean(input, sigma, extra_args.get("class_cond"))


ADAPTERS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], ss.Denoiser], str]] = {
    "EDMPrecond": (EDMPrecond, interop.from_edm, "class_labels"),
    "VEPrecond": (VEPrecond, interop.from_edm, "class_labels"),
    "iDDPMPrecond": (IDDPMPrecond, interop.from_edm, "class_labels"),
    "EDM2": (EDM2Precond, interop.from_edm, "class_labels"),
    "guided diffusion": (GuidedUNet, interop.from_guided_diffusion, "y"),
    "guided diffusion, rescaled": (
        lambda: GuidedUNet(400, rescaled=True),
        lambda net: interop.from_guided_diffusion(net, diffusion_steps=400, rescale_timesteps=True),
        "y",
    ),
    "improved diffusion": (
        lambda: GuidedUNet(learned=False),
        lambda net: interop.from_guided_diffusion(net, learn_sigma=False),
        "y",
    ),
    "DDPM": (
        lambda: GuidedUNet(learned=False),
        lambda net: interop.from_ddpm(net, torch.linspace(1e-4, 0.02, 1000, dtype=f64)),
        "y",
    ),
    "score_sde vp": (lambda: NCSNpp("vp"), lambda net: interop.from_score_sde(net, "vp"), ""),
    "score_sde subvp": (lambda: NCSNpp("subvp"), lambda net: interop.from_score_sde(net, "subvp"), ""),
    "score_sde ve": (lambda: NCSNpp("ve"), lambda net: interop.from_score_sde(net, "ve"), ""),
    "score_sde vp, discrete": (
        lambda: NCSNpp("vp", 1000),
        lambda net: interop.from_score_sde(net, "vp", discrete=1000),
        "",
    ),
    "flow_matching": (MetaWrapper, lambda net: interop.from_flow(net, data_at=1), "label"),
    "torchcfm": (TorchCFM, lambda net: interop.from_flow(net, data_at=1), "y"),
    "k-diffusion, discrete": (lambda: KWrapper(True), interop.from_kdiffusion, "class_cond"),
    "k-diffusion, continuous": (lambda: KWrapper(False), interop.from_kdiffusion, "class_cond"),
}


def made(name: str) -> tuple[nn.Module, ss.Denoiser]:
    make, adapt, _ = ADAPTERS[name]
    net = make()
    return net, adapt(net)


def truth(sde: ss.SDE, x: Tensor, t: float, shift: float = 0.0) -> Tensor:
    return mixture(sde, shift).x0(x.double().flatten(1), t).reshape(x.shape)


def inside(sde: ss.SDE) -> list[float]:
    """Times from little to much noise; integers for β lists, as those networks are trained."""
    times = [sde.t_of_lam(lam) for lam in (1.0, 0.0, -1.0)]
    return [float(round(t)) for t in times] if isinstance(sde, ss.Discrete) else times


def states(sde: ss.SDE, t: float, n: int = 6) -> Tensor:
    return mixture(sde).sample(n, t, seed=0).float().reshape(n, 2, 1, 1)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_data_is_that_of_the_mixture(name: str) -> None:
    _, model = made(name)
    for t in inside(model.sde):
        x = states(model.sde, t)
        assert torch.allclose(model.x0(x, t).double(), truth(model.sde, x, t), rtol=1e-3, atol=1e-3)
    diagnosis = ss.check_denoiser(model, mixture(model.sde).sample(64, seed=1).float().reshape(64, 2, 1, 1))
    assert diagnosis, diagnosis.message


@pytest.mark.parametrize("name", [name for name, (*_, cond) in ADAPTERS.items() if cond])
def test_class_labels_are_conditions(name: str) -> None:
    _, model = made(name)
    cond = ADAPTERS[name][2]
    y = torch.tensor([0, 1, 0, 1, 1, 0])
    t = inside(model.sde)[1]
    x = states(model.sde, t)
    want = torch.where(y.reshape(-1, 1, 1, 1).bool(), truth(model.sde, x, t, 0.7), truth(model.sde, x, t))
    given = model.given(**{cond: y})
    assert torch.allclose(given.x0(x, t).double(), want, rtol=1e-3, atol=1e-3)
    index = torch.tensor([1, 4])
    assert torch.allclose(given.rows(index).x0(x[index], t), given.x0(x, t)[index], atol=1e-6)
    if cond == "class_labels":  # one-hot, as there, with their other arguments
        hot = nn.functional.one_hot(y, 2).float()
        assert (
            torch.equal(model.given(class_labels=hot, augment_labels=torch.zeros(6, 9)).x0(x, t), given.x0(x, t))
            or name == "EDM2"
        )
    guided = ss.ClassifierFree(given, 2.0, null={cond: torch.zeros(1, dtype=torch.long)})
    assert torch.allclose(guided.x0(x, t).double(), 2 * want - truth(model.sde, x, t), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_samples_are_those_of_the_data(name: str) -> None:
    _, model = made(name)
    x = ss.sample(model, (64, 2, 1, 1), steps=12, seed=0)
    gaps = (x.flatten(1)[:, None] - MEANS).norm(dim=-1).min(1).values
    assert float(gaps.mean()) < 0.8


def test_edm_levels_are_those_that_the_network_allows() -> None:
    assert interop.from_edm(EDMPrecond()).sde == ss.EDM()
    assert interop.from_edm(VEPrecond(), sigma_max=200.0).sde == ss.EDM(T=100.0, t_min=0.02)
    assert interop.from_edm(IDDPMPrecond()).sde == ss.EDM(T=80.0, t_min=0.0064)
    net = EDM2Precond()
    model = interop.from_edm(net)
    x = states(model.sde, 1.0)
    assert torch.equal(model.given(return_logvar=True).x0(x, 1.0), model.x0(x, 1.0))
    with pytest.raises(ValueError, match=r"`class_labels` are class numbers.*unconditional"):
        interop.from_edm(lambda x, sigma, class_labels=None: x).given(class_labels=torch.tensor([1])).x0(x, 1.0)


def test_kdiffusion_levels_are_those_of_the_wrapper() -> None:
    sde = interop.from_kdiffusion(KWrapper(True)).sde
    assert (sde.T, sde.t_min) == pytest.approx((14.6, 0.03), rel=1e-4)
    assert interop.from_kdiffusion(KWrapper(False), sigma_max=160.0).sde == ss.EDM(T=160.0)


def test_labels_of_guided_diffusion() -> None:
    net, model = made("guided diffusion, rescaled")
    for t, label in ((1.0, 0.0), (401.0 - 1, 399 * 2.5), (0.5, 0.0)):
        net.labels.clear()
        model.x0(torch.zeros(1, 2, 1, 1), t)
        assert net.labels == [pytest.approx(label)]
    x0, variance = model.x0_and_variance(torch.zeros(2, 2, 1, 1), 100.0)
    assert model.kind.variance == "range" and not variance.any()


def test_respacing_has_the_labels_of_their_rule() -> None:
    sde = ss.Discrete(ss.processes.betas("linear", 1000))
    assert interop.respaced(sde, "ddim25").tolist() == [*(i + 1.0 for i in range(960, -1, -40)), 0]
    grid = interop.respaced(sde, "10,15,20")
    assert len(grid) == 46 and grid[0] == 1000 and grid[-2] == 1
    # Sections of 334, 333 and 333 labels, each with both of its ends.
    labels = (grid[:-1] - 1).flip(0).long().tolist()
    assert labels[0] == 0 and labels[9] == 333 and labels[10] == 334 and labels[24] == 666 and labels[25] == 667
    assert torch.equal(interop.respaced(sde, "250"), interop.respaced(sde, [250])) and len(set(labels)) == 45
    for bad, message in (("ddim999", "whole stride"), ("2000", "2000 labels in a section of 1000")):
        with pytest.raises(ValueError, match=message):
            interop.respaced(sde, bad)


def test_a_noisy_classifier_guides_to_its_class() -> None:
    """With exact likelihoods of two classes, guidance of the whole mixture is the model of one class."""
    sde = ss.Discrete(torch.linspace(1e-4, 0.02, 1000, dtype=f64))
    both = ss.GaussianMixture(sde, torch.tensor([[-1.0, 0.0], [1.5, 0.5]], dtype=f64), std=0.4)
    ones = [ss.GaussianMixture(sde, m[None], std=0.4) for m in torch.tensor([[-1.0, 0.0], [1.5, 0.5]], dtype=f64)]
    seen: list[float] = []

    def classifier(x: Tensor, timesteps: Tensor) -> Tensor:
        seen.append(float(timesteps[0]))
        t = float(timesteps[0]) + 1
        return torch.stack([one.log_prob(x, t) for one in ones], dim=1)

    x, t, y = both.sample(5, 300.0, seed=0), 300.0, torch.tensor([0, 1, 1, 0, 1])
    guided = ss.guidance.ClassifierGuidance(both, interop.Classifier(classifier, sde), known=["y"]).given(y=y)
    want = torch.where(y[:, None] == 1, ones[1].x0(x, t), ones[0].x0(x, t))
    assert torch.allclose(guided.x0(x, t), want, rtol=1e-6, atol=1e-6) and seen[-1] == 299
    with pytest.raises(TypeError, match="`sde` must be a Discrete process"):
        interop.Classifier(classifier, ss.VP())  # type: ignore[arg-type]


def test_levels_of_score_sde_count_from_the_top() -> None:
    model = interop.from_score_sde(NCSNpp("ve", 1000), "ve", discrete=1000)
    for index in (0, 500, 990):
        sigma = 0.01 * 5000 ** (index / 999)
        t = min(float(model.sde.t_of_sigma(sigma)), 1.0)
        x = sigma * ss.Noise(0).normal((3, 2, 1, 1), 0)
        want = mixture(ss.EDM(T=60.0)).x0(x.double().flatten(1), sigma).reshape(x.shape)
        assert torch.allclose(model.x0(x, t).double(), want, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="no meaning for kind='subvp'"):
        interop.from_score_sde(NCSNpp("vp"), "subvp", discrete=1000)


def test_the_cosine_scheduler_of_flow_matching() -> None:
    sde = ss.processes.Trig()
    exact = mixture(sde)
    net = lambda x, t: -exact.velocity(x, 1 - t.double())  # noqa: E731
    model = interop.from_flow(net, data_at=1, sde=sde)
    x = exact.sample(4, 0.5, seed=0)
    assert torch.allclose(model.x0(x, 0.5), exact.x0(x, 0.5), rtol=1e-9)
    with pytest.raises(ValueError, match="`sde` must have T = 1"):
        interop.from_flow(net, data_at=1, sde=ss.EDM())


@pytest.mark.parametrize("name", ADAPTERS)
def test_half_precision_compiled_and_moved(name: str) -> None:
    net, model = made(name)
    t = inside(model.sde)[1]
    x, cond = states(model.sde, t), ADAPTERS[name][2]
    given = model.given(**{cond: torch.tensor([0, 1, 0, 1, 1, 0])}) if cond else model
    want = given.x0(x, t)
    compiled = ADAPTERS[name][1](torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    assert torch.allclose(compiled.x0(x, t), model.x0(x, t), rtol=1e-5, atol=1e-5)
    given.to(torch.bfloat16)
    half = given.x0(x, t)
    assert half.dtype == torch.float32
    # bfloat16 has 8 bits: errors of 1/256 of the state, and of x/α where the data is recovered from the noise.
    size = float(x.abs().max()) * (1 if model.predicts == "x0" else 1 / model.sde.alpha(t))
    assert float((half - want).abs().max()) < 0.03 * max(size, 1.0)
    if (model.predicts == "x0" and "EDM" in name) or "Precond" in name:
        assert torch.allclose(half, want, rtol=1e-5, atol=1e-5), "such networks cast for themselves"
