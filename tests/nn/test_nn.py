"""Networks: what holds for any of them over a list of instances; clocks; the bound of a VAE where it is exact."""

from __future__ import annotations

import doctest
import importlib
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scoresde as ss
from scoresde.nn.blocks import Attention, GroupNorm, Residual
from scoresde.nn.embedding import Conditioning, Fourier, Sinusoidal
from scoresde.nn.mlp import MLP
from scoresde.nn.unet import UNet
from scoresde.nn.vae import VAE, Independent

B = 3
SMALL: dict[str, Any] = {"width": 8, "multipliers": (1, 2), "blocks": 1, "heads": 2, "attention": (1,)}
LABELS = torch.tensor([0, 4, 5])  # of five classes, the last being none

# A network, the shape of an event, and the conditions it takes.
NETS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "MLP": (lambda seed=0: MLP(4, hidden=12, depth=2, seed=seed), (4,), {}),
    "MLP with all conditions": (
        lambda seed=0: MLP(6, hidden=12, depth=1, classes=5, context=3, out_features=12, seed=seed),
        (3, 2),
        {"label": LABELS, "context": torch.linspace(-1, 1, 9).reshape(3, 3)},
    ),
    "UNet": (lambda seed=0: UNet(1, **SMALL, seed=seed), (1, 6, 8), {}),
    "UNet on signals": (lambda seed=0: UNet(2, **SMALL, dims=1, seed=seed), (2, 9), {}),
    "UNet with all conditions": (
        lambda seed=0: UNet(3, **SMALL, classes=5, image_condition=2, dropout=0.1, out_channels=6, seed=seed),
        (3, 5, 4),
        {"label": LABELS, "image": torch.linspace(-1, 1, 120).reshape(3, 2, 5, 4)},
    ),
}
ALL = pytest.mark.parametrize("name", NETS)


def awake(net: nn.Module) -> nn.Module:
    """The network with weights in the layers that start at zero, as a step of training puts there."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in net.parameters():
            if not p.any():
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return net.eval()


def state(event: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return ss.Noise(0).normal((B, *event), 0, dtype=dtype)


TIME = torch.tensor([0.01, 0.4, 0.98])


@ALL
def test_a_fresh_network_predicts_zero_in_the_shape_and_dtype_of_the_state(name: str) -> None:
    make, event, cond = NETS[name]
    out = make()(state(event), TIME, **cond)
    factor = 2 if "all conditions" in name else 1
    assert torch.equal(out, torch.zeros(B, factor * event[0], *event[1:]))


@ALL
def test_a_gradient_reaches_every_parameter_and_the_state(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()), state(event).requires_grad_()
    net(x, TIME, **cond).square().sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    assert x.grad is not None and bool(x.grad.ne(0).all())


@ALL
def test_the_first_steps_of_training_wake_every_parameter(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = make(), state(event)
    before = {k: p.detach().clone() for k, p in net.named_parameters()}
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        out = net(x, TIME, **cond)
        optimiser.zero_grad()
        (out - torch.linspace(-1, 1, out.numel()).reshape(out.shape)).square().mean().backward()
        optimiser.step()
    assert [k for k, p in net.named_parameters() if torch.equal(p, before[k])] == []


@ALL
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()).double(), state(event, torch.float64)
    whole = net(x, TIME, **cond)
    for i in range(B):
        alone = net(x[i : i + 1], TIME[i : i + 1], **{k: v[i : i + 1] for k, v in cond.items()})
        assert torch.allclose(whole[i], alone[0], rtol=0, atol=1e-12), i
        assert not torch.allclose(whole[i], whole[i - 1], atol=1e-3), "and samples are not alike"
    assert net(x[:0], TIME[:0], **{k: v[:0] for k, v in cond.items()}).shape == (0, *whole.shape[1:])


@ALL
def test_every_form_of_a_time_is_the_same_time(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()), state(event)
    expected = net(x, torch.full((B,), 0.25), **cond)
    for time in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((B,), 0.25, dtype=torch.float64)):
        assert torch.equal(net(x, time, **cond), expected), time
    assert not torch.allclose(net(x, 0.26, **cond), expected, atol=1e-4), "and another time is another function"
    for bad in (torch.zeros(B + 1), torch.zeros(B, 1)):
        with pytest.raises(ValueError, match="`time` must be"):
            net(x, bad, **cond)


@ALL
def test_every_condition_matters(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()), state(event)
    out = net(x, TIME, **cond)
    for key, value in cond.items():
        other = {**cond, key: value.flip(0)}
        assert not torch.allclose(net(x, TIME, **other)[0], out[0], atol=1e-4), key


@ALL
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # torch's own, where jvp is first used
def test_derivatives_of_every_kind_agree(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()).double(), state(event, torch.float64).requires_grad_()
    v = ss.Noise(0).normal(x.shape, 1, dtype=torch.float64)

    def f(y: Tensor) -> Tensor:
        return net(y, TIME, **cond)

    forward = torch.func.jvp(f, (x.detach(),), (v,))[1]
    h = 1e-5
    assert torch.allclose(forward, (f(x + h * v) - f(x - h * v)) / (2 * h), rtol=1e-6, atol=1e-8)
    w = torch.ones_like(forward)
    (back,) = torch.autograd.grad(f(x), x, w, create_graph=True)
    assert torch.allclose((back * v).sum(), forward.sum(), rtol=1e-10)
    (twice,) = torch.autograd.grad(back.square().sum(), x)
    assert bool(twice.isfinite().all() and twice.any()), "as sliced score matching needs"


@pytest.mark.parametrize("name", [name for name in NETS if "all" in name])
def test_compiles_as_one_graph(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()), state(event)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, TIME, **cond), net(x, TIME, **cond), rtol=1e-5, atol=1e-5)


@ALL
@torch.no_grad()
def test_half_precision_outside_or_inside_stays_near_float32(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()), state(event)
    exact = awake(make()).double()(x.double(), TIME, **cond)
    scale = exact.abs().max()
    assert torch.allclose(net(x, TIME, **cond).double(), exact, rtol=0, atol=float(2e-6 * scale))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(x, TIME, **cond)
    net.bfloat16()
    half = net(x, TIME, **cond)
    for out in (mixed, half):
        assert out.dtype == torch.float32, "the dtype of the state"
        assert bool((out - exact).abs().max() < 0.03 * scale), "a few units of bfloat16, 2⁻⁸"
    assert net(x.bfloat16(), TIME, **cond).dtype == torch.bfloat16


@ALL
def test_mixed_precision_trains_with_finite_gradients_in_float32(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()).train(), state(event)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, TIME, **cond)
    out.square().mean().backward()
    for key, p in net.named_parameters():
        assert p.grad is not None and p.grad.dtype == torch.float32 and bool(p.grad.isfinite().all()), key


@ALL
def test_a_seed_makes_the_weights_and_a_state_dict_carries_them(name: str) -> None:
    make, event, cond = NETS[name]
    first, second, other = make(seed=3), make(seed=3), make(seed=4)
    a, b, c = (net.state_dict() for net in (first, second, other))
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    awake(first)
    other.eval().load_state_dict(first.state_dict())
    x = state(event)
    assert torch.equal(first(x, TIME, **cond), other(x, TIME, **cond))


def test_without_a_seed_the_global_generator_decides() -> None:
    nets = []
    with torch.random.fork_rng(devices=[]):
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            nets.append(MLP(2, hidden=4).first.weight)
    assert torch.equal(nets[0], nets[1]) and not torch.equal(nets[0], nets[2])


@ALL
def test_needs_no_device_to_wait(name: str) -> None:
    make, event, cond = NETS[name]
    on = {k: v.to("meta") for k, v in cond.items()}
    with torch.device("meta"):
        net = make()
        assert all(p.device.type == "meta" for p in net.state_dict().values())
        for time in (0.3, torch.empty(B)):
            assert net(torch.empty(B, *event), time, **on).device.type == "meta"


@ALL
def test_serves_a_denoiser_under_every_clock(name: str) -> None:
    make, event, cond = NETS[name]
    discrete = ss.Discrete(ss.processes.betas("linear", 1000))
    clocks = [*(("t", ss.VP()), ("sigma", ss.EDM())), *((c, discrete) for c in ("index", "nearest_index", "log_sigma"))]
    for clock, sde in clocks:
        model = ss.Denoiser(awake(make()), sde, predicts="x0", time=clock, learned_variance="all" in name)
        x = state(event, torch.float64)
        for t in (sde.T, 0.3 * sde.T, torch.linspace(0, sde.T, B)):
            out = model.x0(x, t, **cond)
            assert out.shape == x.shape and out.dtype == torch.float64 and bool(out.isfinite().all()), (clock, t)


# Conditions.


@pytest.mark.parametrize("name", ["MLP with all conditions", "UNet with all conditions"])
def test_no_label_is_the_class_beyond_the_last(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = awake(make()), state(event)
    rest = {k: v for k, v in cond.items() if k != "label"}
    none = net(x, TIME, **rest)
    for label in (None, 5, torch.tensor(5), torch.tensor([5]), torch.full((B,), 5, dtype=torch.int32)):
        assert torch.equal(net(x, TIME, label=label, **rest), none), label
    assert not torch.allclose(net(x, TIME, label=4, **rest), none, atol=1e-4)
    for bad in (
        6,
        -1,
        torch.tensor([0, 1, 6]),
        torch.tensor([0, -1, 1]),
        torch.zeros(2, dtype=torch.long),
        torch.zeros(B, 1, dtype=torch.long),
    ):
        with pytest.raises(ValueError, match="`label` must"):
            net(x, TIME, label=bad, **rest)
    for bad in (0.0, torch.zeros(B), torch.zeros(B, dtype=torch.bool), "cat"):
        with pytest.raises(TypeError, match="`label` must be"):
            net(x, TIME, label=bad, **rest)


@ALL
def test_a_condition_it_was_not_made_for_is_refused(name: str) -> None:
    make, event, cond = NETS[name]
    net, x = make(), state(event)
    takes = "context" if isinstance(net, MLP) else "image"
    extra = {"label": LABELS, takes: torch.zeros(B, 1, *([] if takes == "context" else event[1:]))}
    for key, value in extra.items():
        if key not in cond:
            with pytest.raises(ValueError, match=f"`{key}` was given to a network without"):
                net(x, TIME, **{key: value})
    if takes in cond:
        with pytest.raises(ValueError, match=f"`{takes}` is missing"):
            net(x, TIME)


def test_one_image_serves_all_samples_and_must_lie_on_the_grid() -> None:
    make, event, cond = NETS["UNet with all conditions"]
    net, x, image = awake(make()), state(event), cond["image"]
    assert torch.equal(net(x, TIME, image=image[:1]), net(x, TIME, image=image[:1].expand(B, -1, -1, -1)))
    for bad in (image[:2], image[:, :1], image[..., :3]):
        with pytest.raises(ValueError, match="`image` must be"):
            net(x, TIME, image=bad)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (16, 9)])
def test_a_unet_takes_every_size_of_grid(size: tuple[int, int]) -> None:
    net = awake(UNet(1, width=8, multipliers=(1, 1, 1), blocks=1, attention=(), heads=1, seed=0))
    x = ss.Noise(0).normal((2, 1, *size), 0)
    assert net(x, 0.5).shape == x.shape
    # Every position sees every other, through the attention in the middle.
    x.requires_grad_()
    net(x, 0.5)[0, 0, 0, 0].backward()
    assert x.grad is not None and bool(x.grad[0].all()) and not bool(x.grad[1].any())


def test_a_state_of_another_shape_is_refused() -> None:
    for net, x in ((UNet(1, **SMALL), state((2, 4, 4))), (UNet(1, **SMALL), state((1, 4))), (MLP(3), state((4,)))):
        with pytest.raises(ValueError, match="`x` must be"):
            net(x, 0.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet(1, dims=3), "`dims` must be 1"),
        (lambda: UNet(0), "`channels` must be at least 1"),
        (lambda: UNet(1, multipliers=()), "`multipliers` must have an entry"),
        (lambda: UNet(1, attention=(3,)), "`attention` must hold levels from 0 to 2, got 3"),
        (lambda: UNet(1, width=6, multipliers=(1,), attention=()), "`heads` must divide the 6 channels"),
        (lambda: UNet(1, dropout=1.0), "`dropout` must be"),
        (lambda: MLP(2, classes=0), "`classes` must be at least 1"),
        (lambda: Sinusoidal(7), "`features` must be even"),
        (lambda: Fourier(8, scale=0.0), "`scale` must be"),
        (lambda: VAE(1, 2, dims=3), "`dims` must be 0"),
        (lambda: VAE(1, 2, std=0.0), "`std` must be"),
        (lambda: VAE(1, 2)(torch.zeros(2, 1, 7, 8)), "each a multiple of 2, got shape"),
    ],
)
def test_a_bad_argument_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# Parts.


def test_a_fresh_branch_adds_nothing_and_two_branches_are_divided_by_the_root_of_two() -> None:
    net, x = UNet(1, **SMALL, dims=1, seed=0), ss.Noise(0).normal((2, 16, 7), 0)
    parts = [m for m in net.modules() if isinstance(m, (Residual, Attention))]
    same = [m for m in parts if isinstance(m, Attention) or isinstance(m.skip, nn.Identity)]
    for part in same:
        y = x[:, : part.last.out_channels]
        args = (y,) if isinstance(part, Attention) else (y, torch.ones(2, 32))
        assert torch.equal(part(*args), y * math.sqrt(0.5))
    assert len(same) >= 5


def test_a_condition_without_effect_leaves_the_block_as_it_is() -> None:
    told, plain = awake(Residual(1, 4, 8, condition=3)), awake(Residual(1, 4, 8))
    told.load_state_dict(plain.state_dict(), strict=False)
    x = ss.Noise(0).normal((2, 4, 5), 0)
    with torch.no_grad():
        told.film.weight.zero_()
        told.film.bias.zero_()
    assert torch.equal(told(x, torch.ones(2, 3)), plain(x))


def test_dropout_acts_in_training_alone() -> None:
    make, event, cond = NETS["UNet with all conditions"]
    net, x = awake(make()), state(event)
    for training in (True, False):
        net.train(training)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            assert torch.equal(net(x, TIME, **cond), net(x, TIME, **cond)) is not training


@torch.no_grad()
def test_statistics_and_softmax_are_those_of_float32() -> None:
    x = ss.Noise(0).normal((32, 8, 5, 5), 0).bfloat16()  # enough rows for near ties of two logits
    norm = GroupNorm(8)
    assert norm.num_groups == 2, "of four channels each"
    assert torch.equal(norm.bfloat16()(50 + x), GroupNorm(8)((50 + x).float()).bfloat16())
    net = Attention(2, 8, 2).bfloat16()
    net.qkv.weight.normal_(0, 8, generator=torch.Generator().manual_seed(0))  # logits of thousands
    net.last.weight.copy_(torch.eye(8).reshape(8, 8, 1, 1))
    net.qkv.bias.zero_()
    net.last.bias.zero_()

    def by_hand(dtype: torch.dtype) -> Tensor:
        q, k, v = net.qkv(net.norm(x)).reshape(32, 3, 2, 4, 25).to(dtype).unbind(1)
        h = (v @ (q.mT @ k / 2).softmax(-1).mT).reshape(x.shape)
        return (x.to(dtype) + h).double() / math.sqrt(2)

    exact = by_hand(torch.float64)
    least = 2**-7 * float(exact.abs().max())
    assert torch.allclose(net(x).double(), exact, rtol=0, atol=least)
    assert not torch.allclose(by_hand(torch.bfloat16), exact, rtol=0, atol=4 * least)


def test_attention_does_not_know_the_order_of_positions() -> None:
    net, x = awake(Attention(1, 8, 2)).double(), ss.Noise(0).normal((2, 8, 7), 0, dtype=torch.float64)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    assert torch.allclose(net(x[..., order]), net(x)[..., order], rtol=0, atol=1e-13)


# Clocks: a network reads the noise level from the label it is told, whichever it is.

DISCRETE = ss.Discrete(ss.processes.betas("linear", 1000))
CLOCKS: dict[str, tuple[ss.SDE, Callable[[Tensor], Tensor]]] = {
    "t": (ss.VP(), lambda t: t),
    "index": (DISCRETE, DISCRETE.index_of_t),
    "log σ/α / 4": (ss.VP(), lambda t: -ss.VP().lam(t) / 4),
    "σ": (ss.EDM(), ss.EDM().sigma),
    "log σ": (ss.EDM(), ss.EDM().log_sigma),
}


def reading_error(embed: Callable[[Tensor], Tensor], name: str) -> float:
    """Median error of λ read linearly off the features, at times that were not fitted, relative to its spread.

    Near the first labels λ is steep, and a linear reading misses it by more.
    """
    sde, clock = CLOCKS[name]
    u = torch.linspace(0, 1, 3001, dtype=torch.float64)  # a fit to random times would be extrapolated at the ends
    t = sde.t_of_sigma(0.005 * 8000**u) if isinstance(sde, ss.EDM) else sde.T * (1e-3 + (1 - 1e-3) * u)
    A = F.pad(embed(clock(t).float()).double(), (0, 1), value=1.0)
    y = sde.lam(t)
    held = torch.arange(3001) % 3 == 1
    fit = ~held
    gram = A[fit].mT @ A[fit] + 3e-3 * torch.eye(A.shape[1], dtype=torch.float64)
    w = torch.linalg.solve(gram, A[fit].mT @ y[fit])
    return float((A[held] @ w - y[held]).abs().median() / y[held].std())


@pytest.mark.parametrize("name", CLOCKS)
def test_every_clock_is_read(name: str) -> None:
    assert reading_error(Sinusoidal(64), name) < 0.005
    for seed in range(3):
        assert reading_error(Fourier(64, seed=seed), name) < 0.005


def test_one_ladder_of_raw_labels_does_not_read_them_all() -> None:
    def ladder(fastest: float) -> Callable[[Tensor], Tensor]:
        omega = torch.logspace(-4, 0, 32) * fastest
        return lambda c: torch.cat([(c[:, None] * omega).sin(), (c[:, None] * omega).cos()], dim=1)

    assert reading_error(ladder(1.0), "index") < 0.015 < reading_error(ladder(1.0), "t")
    assert reading_error(ladder(1e3), "t") < 0.015 < reading_error(ladder(1e3), "index")


@pytest.mark.parametrize("embed", [Sinusoidal(32), Fourier(32)])
def test_embeddings_are_frozen_bounded_and_keep_float32(embed: nn.Module) -> None:
    labels = torch.tensor([-1e4, -3.0, 0.0, 1e-5, 0.5, 999.0, 1e5])
    out = embed(labels)
    assert out.shape == (7, 32) and bool((out.abs() <= 1).all()) and list(embed.parameters()) == []
    half = embed.bfloat16()(labels)
    assert half.dtype == torch.float32 and torch.equal(half, out), "a cast network is told the same times"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(embed(labels), out)
    assert torch.equal(Fourier(32).omega, Fourier(32, seed=0).omega)
    assert not torch.equal(Fourier(32).omega, Fourier(32, seed=1).omega)


def test_conditioning_is_public_for_networks_of_ones_own() -> None:
    part = Conditioning(Sinusoidal(8), 5, classes=2)
    assert part(torch.zeros(4, 1, 2, 2), 0.5, label=1).shape == (4, 5)


# Training.


def test_an_mlp_learns_the_exact_denoiser_of_a_mixture() -> None:
    sde = ss.VP()
    ring = torch.view_as_real(torch.polar(torch.tensor(1.5), torch.arange(6) * math.pi / 3))
    mix = ss.GaussianMixture(sde, ring, std=0.15)
    net = MLP(2, hidden=64, seed=0)
    model = ss.Denoiser(net, sde, predicts="eps")

    def batch(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        x0, noise = mix.sample(n, seed=seed, dtype=torch.float32), ss.Noise(seed)
        return x0, 1e-3 + (sde.T - 1e-3) * noise.uniform((n,), 0), noise.like(x0, 1)

    def losses() -> tuple[float, float]:
        x0, t, eps = batch(10_000, 999)
        x = sde.perturb(x0, t, eps)
        with torch.no_grad():
            return tuple(float((e - eps).square().mean()) for e in (model.eps(x, t), mix.eps(x, t)))  # type: ignore[return-value]

    start, least = losses()
    optimiser = torch.optim.Adam(net.parameters())
    steps = 300
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        x0, t, eps = batch(256, step)
        loss = (model.output(sde.perturb(x0, t, eps), t)[0] - model.target(x0, t, eps)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    end, _ = losses()
    assert abs(start - 1) < 0.02 and 0.2 < least < 0.22, "from zero, which knows nothing, towards what can be known"
    assert least < end < least + 0.05 * (start - least)


# The bound.


def test_densities_and_divergences_are_those_of_torch() -> None:
    noise = ss.Noise(0)
    mean, log_var, x = (noise.normal((5, 3, 2), draw, dtype=torch.float64) for draw in range(3))
    q = Independent(mean, log_var)
    truth = torch.distributions.Independent(torch.distributions.Normal(mean, (log_var / 2).exp()), 2)
    unit = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(mean), 1.0), 2)
    assert torch.allclose(q.log_prob(x), truth.log_prob(x), rtol=1e-13)
    assert torch.allclose(q.kl(), torch.distributions.kl_divergence(truth, unit), rtol=1e-12)
    assert torch.equal(q.sample(x), mean + (log_var / 2).exp() * x)
    assert torch.equal(q.sample(noise), q.sample(noise.like(mean, 0)))
    near = Independent(torch.zeros(1, 1), torch.full((1, 1), 1e-3))
    assert torch.allclose(near.kl(), torch.tensor(2.5e-7), rtol=1e-3), "no digits lost near N(0, I), in float32"


def linear_gaussian(std: float = 0.5) -> tuple[VAE, Tensor, Tensor, torch.distributions.Distribution]:
    """p(x | z) = N(Wz + c, s²), whose posterior has independent entries; 50 data, log p(x), and p(z | x)."""
    vae = VAE(3, 2, dims=0, std=std).double()
    W = torch.tensor([[1.0, 0.5], [2.0, -0.5], [-1.0, -0.5]], dtype=torch.float64)  # orthogonal columns
    c = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    precision = 1 + W.square().sum(0) / std**2
    vae.decoder, vae.encoder = (nn.Linear(a, b).double().requires_grad_(False) for a, b in ((2, 3), (3, 4)))
    with torch.no_grad():
        vae.decoder.weight.copy_(W)
        vae.decoder.bias.copy_(c)
        vae.encoder.weight.copy_(torch.cat([W.mT / (std**2 * precision[:, None]), torch.zeros(2, 3)]))
        vae.encoder.bias.copy_(torch.cat([-W.mT @ c / (std**2 * precision), -precision.log()]))
    marginal = torch.distributions.MultivariateNormal(c, W @ W.mT + std**2 * torch.eye(3, dtype=torch.float64))
    x = vae.sample((50, 3), seed=0, noisy=True).double()
    q = vae.encode(x)
    exact = torch.distributions.Independent(torch.distributions.Normal(q.mean, (q.log_var / 2).exp()), 1)
    return vae, x, marginal.log_prob(x), exact


def test_the_bound_is_the_likelihood_where_the_encoder_is_exact() -> None:
    vae, x, log_p, _ = linear_gaussian()
    assert torch.allclose(vae.importance_bound(x, 1, ss.Noise(0)), log_p, rtol=0, atol=1e-12)
    elbo = torch.stack([vae.elbo(x, ss.Noise(k)).elbo for k in range(400)])
    z = (elbo.mean(0) - log_p) / (elbo.std(0) / 20)
    assert bool((z.abs() < 5).all()) and abs(float(z.mean())) * math.sqrt(len(z)) < 4


def test_the_bound_falls_short_by_the_divergence_of_the_posteriors() -> None:
    vae, x, log_p, exact = linear_gaussian()
    vae.encoder.bias += torch.tensor([0.3, -0.2, 0.8, 0.4], dtype=torch.float64)
    q = vae.encode(x)
    wrong = torch.distributions.Independent(torch.distributions.Normal(q.mean, (q.log_var / 2).exp()), 1)
    gap = torch.distributions.kl_divergence(wrong, exact)
    elbo = torch.stack([vae.elbo(x, ss.Noise(k)).elbo for k in range(400)])
    tighter = [vae.importance_bound(x, k, ss.Noise(7)).mean() for k in (1, 8, 256)]
    error = elbo.std(0) / 20
    assert bool(((elbo.mean(0) - (log_p - gap)).abs() < 5 * error).all()) and bool((elbo.mean(0) < log_p).all())
    assert tighter[0] < tighter[1] < tighter[2] < log_p.mean() + 0.02
    assert log_p.mean() - tighter[2] < 0.1 * gap.mean()


VAES: dict[str, tuple[Callable[..., VAE], tuple[int, ...], tuple[int, ...]]] = {
    "images": (lambda **kw: VAE(2, 3, width=8, blocks=1, **kw), (2, 6, 4), (3, 3, 2)),
    "signals": (lambda **kw: VAE(1, 2, dims=1, width=8, multipliers=(1, 1, 2), blocks=1, **kw), (1, 8), (2, 2)),
    "vectors": (lambda **kw: VAE(5, 2, dims=0, width=8, **kw), (5,), (2,)),
}


@pytest.mark.parametrize("name", VAES)
def test_a_vae_encodes_decodes_samples_and_bounds(name: str) -> None:
    make, event, latent = VAES[name]
    vae, x = make(seed=0), state(event)
    q = vae.encode(x)
    assert q.mean.shape == q.log_var.shape == (B, *latent) == vae.latent_shape(x.shape)
    assert bool((q.kl() == 0).all()), "a fresh encoder says N(0, I)"
    bound = vae.elbo(x, ss.Noise(0))
    assert torch.allclose(bound.elbo, bound.reconstruction - bound.kl) and bound.elbo.shape == (B,)
    unit = torch.distributions.Independent(torch.distributions.Normal(torch.zeros_like(x), 1.0), len(event))
    assert torch.allclose(bound.elbo, unit.log_prob(x), rtol=1e-6), "and a fresh decoder too"
    awake(vae)
    new = vae.sample((B, *event), seed=5)
    assert new.shape == x.shape and torch.allclose(
        vae.sample((2, *event), seed=ss.Noise(5, offset=1)), new[1:], atol=1e-5
    )
    assert torch.equal(vae(x, ss.Noise(1)).elbo, vae.elbo(x, ss.Noise(1)).elbo)
    noisy = vae.sample((B, *event), seed=5, noisy=True)
    assert torch.allclose(noisy, new + ss.Noise(5).normal(x.shape, 1) * vae.std, atol=1e-6)
    (-vae.elbo(x, ss.Noise(1)).elbo.mean()).backward()
    assert [k for k, p in vae.named_parameters() if p.grad is None or not bool(p.grad.any())] == []
    alone = vae.elbo(x[1:2], ss.Noise(1, offset=1)).elbo
    assert torch.allclose(vae.elbo(x, ss.Noise(1)).elbo[1:2], alone, rtol=1e-5)


@pytest.mark.parametrize("name", VAES)
def test_a_vae_compiles_casts_and_is_saved(name: str) -> None:
    make, event, latent = VAES[name]
    vae, x, eps = awake(make(std=0.3, seed=0)), state(event), ss.Noise(0).normal((B, *latent), 0)
    bound = vae.elbo(x, eps)
    torch._dynamo.reset()
    compiled = torch.compile(vae.elbo, backend="eager", fullgraph=True)(x, eps)
    assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(bound, compiled, strict=True))
    other = make(std=0.3, seed=1).eval()
    other.load_state_dict(vae.state_dict())
    assert torch.equal(other.elbo(x, eps).elbo, bound.elbo)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = vae.elbo(x, eps)
    half = vae.bfloat16().elbo(x, eps)
    for terms in (mixed, half):
        for ours, exact in zip(terms, bound, strict=True):
            assert ours.dtype == torch.float32 and torch.allclose(ours, exact, rtol=0.06, atol=0.06)


def test_the_decoders_scale_is_learned_or_given() -> None:
    x = 0.2 * state((4,))
    given = VAE(4, 1, dims=0, std=0.25)
    assert given.std == 0.25 and "log_std" not in given.state_dict()
    vae = VAE(4, 1, dims=0, seed=0)
    with torch.no_grad():
        vae.log_std.fill_(-1.0)  # the best is the root mean square of what the decoder leaves
    (-vae.elbo(x, ss.Noise(0)).elbo.mean()).backward()
    s2 = math.exp(-2.0)
    assert vae.log_std.grad.item() == pytest.approx(4 - float(x.square().sum(1).mean()) / s2, rel=1e-5)


# What is written about them.

MODULES = [importlib.import_module(f"scoresde.nn.{name}") for name in ("embedding", "blocks", "mlp", "unet", "vae")]


def test_counts_of_parameters_are_as_written() -> None:
    written = re.findall(r"``(\w+\([^`]*\))`` has ([\d,]+\d)", " ".join((c.__doc__ or "") for c in (MLP, UNet, VAE)))
    assert len(written) >= 6
    for call, count in written:
        with torch.device("meta"):
            net = eval(call, {"MLP": MLP, "UNet": UNet, "VAE": VAE})
        assert f"{sum(p.numel() for p in net.parameters()):,}" == count, call


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__)
def test_examples_in_docstrings(module: Any) -> None:
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
