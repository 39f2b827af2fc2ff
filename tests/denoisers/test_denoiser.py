"""Denoisers: what a network predicts is said once, and every other prediction follows to the last digits."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import mpmath as mp
import pytest
import torch
from instances import EXACT, SDES, inner_times
from torch import Tensor, nn

import scoresde as ss
from scoresde.denoisers.base import Shared

ALL = pytest.mark.parametrize("sde", SDES.values(), ids=SDES.keys())
KINDS = ("eps", "score", "x0", "v", "velocity")
SIGMA_DATA = 0.7
# α = 0 at T: predictions that say nothing of the data there are refused.
SILENT = {name for name, sde in SDES.items() if sde.alpha(sde.T) == 0}
REFUSED = {name: {"eps", "score"} for name in SILENT} | {"Polynomial": {"eps", "score", "velocity"}}
Coefs = tuple[Tensor, Tensor]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return ss.Noise(seed).normal(shape, 0, dtype=dtype)


def column(c: Tensor, x: Tensor) -> Tensor:
    return c.reshape(-1, *[1] * (x.ndim - 1))


def form(kind: str, sde: ss.SDE, t: Tensor, s: float = SIGMA_DATA) -> Coefs:
    """The definition of each prediction, a x0 + b ε, written out once more."""
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    root = (alpha**2 * s**2 + sigma**2).sqrt()
    return {
        "eps": (zero, one),
        "score": (zero, -1 / sigma),
        "x0": (one, zero),
        "v": (-sigma, alpha),
        "velocity": (sde.alpha_dot(t), sde.sigma_dot(t)),
        # F = (x0 − c_skip x) / c_out with EDM's c_skip = α s²/root², c_out = σ s/root.
        "F": (sigma / (s * root), -alpha * s / root),
    }[kind]


def size_of_terms(sde: ss.SDE, t: Tensor, have: Coefs, want: Coefs, x: Tensor, out: Tensor) -> Tensor:
    """Size of the numbers that are added to turn one prediction into another.

    Rounding is a fraction of these, not of their sum: near data, ε from x0 is the difference of two large numbers over
    a small σ, whoever computes it. Tolerances below are 1e-12 of it.
    """
    (ha, hb), (wa, wb) = have, want
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    det = (alpha * hb - sigma * ha).abs()
    of_x, of_out = ((wa * hb).abs() + (wb * ha).abs()) / det, ((wb * alpha).abs() + (wa * sigma).abs()) / det
    return column(of_x, x) * x.abs() + column(of_out, x) * out.abs()


def make(net: Callable[..., Tensor], sde: ss.SDE, kind: str, **keywords: object) -> ss.Denoiser:
    if kind == "F":
        keywords = {"precondition": ss.Preconditioning(SIGMA_DATA), "time": "t", **keywords}
    return ss.Denoiser(net, sde, predicts=kind, **keywords)  # type: ignore[arg-type]


def sources(name: str) -> list[str]:
    return [k for k in (*KINDS, "F") if k not in REFUSED.get(name, ())]


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    means = [[-1.0, 0.5, 2.0], [1.0, -0.5, 0.0], [0.2, 2.0, -1.0]]
    return ss.GaussianMixture(sde, means, std=[0.3, 0.5, 0.2], weights=[1.0, 2.0, 3.0])


class Recorder:
    """A network that stores its arguments and returns zeros."""

    def __init__(self) -> None:
        self.x: Tensor
        self.t: Tensor

    def __call__(self, x: Tensor, t: Tensor, **cond: object) -> Tensor:
        self.x, self.t, self.cond = x, t, cond
        return torch.zeros_like(x)


# Parametrisations.


@pytest.mark.parametrize("name", SDES)
def test_every_prediction_from_every_other(name: str) -> None:
    sde = SDES[name]
    t = inner_times(sde, 9)
    x0, eps = normal(9, 2, 3, seed=1), normal(9, 2, 3, seed=2)
    x = sde.perturb(x0, t, eps)
    says = {k: sum(column(c, x) * z for c, z in zip(form(k, sde, t), (x0, eps), strict=True)) for k in (*KINDS, "F")}
    for have in sources(name):
        out = says[have]
        model = make(lambda x, t, out=out: out, sde, have)
        for want in KINDS:
            size = size_of_terms(sde, t, form(have, sde, t), form(want, sde, t), x, out)
            got = getattr(model, want)(x, t)
            assert float(((got - says[want]).abs() / size).max()) < 1e-12, (sde, have, want)
            one = make(lambda x, t, out=out: out[4:5], sde, have)  # a number gives what its entry of a vector gives
            row = getattr(one, want)(x[4:5], t[4].item())
            assert float(((row - says[want][4]).abs() / size[4]).max()) < 1e-12, (sde, have, want, t[4])


@pytest.mark.parametrize("name", SDES)
def test_round_trips(name: str) -> None:
    sde = SDES[name]
    t = inner_times(sde, 9)
    x, out = normal(9, 4, seed=1), normal(9, 4, seed=2)
    kinds = [k for k in sources(name) if k != "F"]
    for have in kinds:
        for via in kinds:
            there = getattr(make(lambda x, t: out, sde, have), via)(x, t)
            back = getattr(make(lambda x, t, there=there: there, sde, via), have)(x, t)
            first, second = form(have, sde, t), form(via, sde, t)
            # What the first leg rounds, the second leg multiplies.
            size = size_of_terms(sde, t, second, first, x, size_of_terms(sde, t, first, second, x, out))
            assert float(((back - out).abs() / size).max()) < 1e-12, (sde, have, via)


@pytest.mark.parametrize("name", SDES)
def test_every_parametrisation_of_an_exact_denoiser_gives_the_same_x0(name: str) -> None:
    sde = SDES[name]
    mix = mixture(sde)
    for t in [*inner_times(sde, 3).tolist(), *([] if name in SILENT else [sde.T])]:
        x = mix.sample(8, t, seed=3)
        clock = torch.full((8,), t, dtype=torch.float64)
        want = mix.x0(x, t)
        for kind in sources(name):
            alpha, sigma = sde.alpha(t), sde.sigma(t)
            if kind == "F":  # by hand, with the formulas of the EDM paper
                square = alpha**2 * SIGMA_DATA**2 + sigma**2
                out = (want - alpha * SIGMA_DATA**2 / square * x) / (sigma * SIGMA_DATA / square**0.5)
            else:
                out = getattr(mix, kind)(x, t)
            seen = Recorder()
            got = make(lambda x, t, out=out, seen=seen: seen(x, t) + out, sde, kind).x0(x, t)
            size = size_of_terms(sde, clock, form(kind, sde, clock), form("x0", sde, clock), x, out)
            assert float(((got - want).abs() / (size + want.abs())).max()) < 1e-11, (sde, kind, t)
            if kind == "F":
                assert torch.allclose(seen.x, x / square**0.5, rtol=1e-14), "the network sees a state of unit scale"
            else:
                assert torch.equal(seen.x, x)


@pytest.mark.parametrize("name", SDES)
def test_what_the_network_predicts_is_returned_bit_by_bit(name: str) -> None:
    sde = SDES[name]
    x, out = normal(5, 3), normal(5, 3, seed=1)
    ends = (0.0, sde.T)  # also where no other prediction exists
    for kind in [k for k in sources(name) if k != "F"]:
        model = make(lambda x, t: out, sde, kind)
        for t in (*inner_times(sde, 3).tolist(), *ends, inner_times(sde, 5)):
            assert torch.equal(getattr(model, kind)(x, t), out), (sde, kind, t)


# What the network is told.

DISCRETE = SDES["Discrete"]
CLOCKS: dict[str, tuple[ss.SDE, object, Callable[[Tensor], Tensor]]] = {
    "t": (ss.VP(), "t", lambda t: t),
    "default": (ss.VP(), None, lambda t: t),
    "index": (DISCRETE, "index", lambda t: t - 1),
    "default of a list": (DISCRETE, None, lambda t: t - 1),
    "nearest index": (DISCRETE, "nearest_index", lambda t: (t - 1).round()),
    "sigma": (ss.VE(), "sigma", lambda t: ss.VE().sigma(t)),
    "log sigma": (ss.EDM(), "log_sigma", lambda t: t.log()),
    "function": (ss.VP(), lambda t: 999 * t, lambda t: 999 * t),
    "constant function": (ss.VP(), lambda t: 7, lambda t: torch.full_like(t, 7)),
}


@pytest.mark.parametrize("case", CLOCKS)
@pytest.mark.parametrize("net_dtype", [None, torch.bfloat16, torch.float64])
def test_time_reaches_the_network_in_float32_whatever_the_network_computes_in(
    case: str, net_dtype: torch.dtype | None
) -> None:
    sde, time, label = CLOCKS[case]
    seen = Recorder()
    model = ss.Denoiser(seen, sde, predicts="eps", time=time)  # type: ignore[arg-type]
    if net_dtype is not None:
        net = Scaled(net_dtype)
        net.seen = seen
        model = ss.Denoiser(net, sde, predicts="eps", time=time)  # type: ignore[arg-type]
    vector = torch.tensor([0.2513, 0.5, 0.9984, 1.0], dtype=torch.float64) * sde.T
    want = label(vector).float()
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(4, 3, dtype=dtype)
        model.x0(x, vector)
        assert seen.t.dtype == torch.float32 and torch.equal(seen.t, want), "float64 times lose nothing before the net"
        model.x0(x, vector.float())
        assert torch.allclose(seen.t, label(vector.float().double()).float(), rtol=1e-6)
        for i, t in enumerate(vector.tolist()):
            for form_of_t in (t, torch.tensor(t, dtype=torch.float64)):
                model.x0(x, form_of_t)
                assert seen.t.shape == (4,) and seen.t.dtype == torch.float32
                assert torch.equal(seen.t, want[i].expand(4)), (case, t)


def test_half_precision_would_have_rounded_the_label() -> None:
    assert torch.tensor(998.39).bfloat16().item() == 1000.0
    seen = Recorder()
    net = Scaled(torch.bfloat16)
    net.seen = seen
    ss.Denoiser(net, DISCRETE, predicts="eps").x0(torch.ones(1, 3), 999.39)
    assert seen.t.item() == pytest.approx(998.39, rel=1e-7)


@pytest.mark.parametrize("name", ["VP", "VE", "EDM", "two functions"])
def test_preconditioning_tells_a_quarter_of_the_log_noise(name: str) -> None:
    sde = SDES[name]
    seen = Recorder()
    model = ss.Denoiser(seen, sde, predicts="F", precondition=ss.Preconditioning())
    t = inner_times(sde, 6)
    model.x0(torch.ones(6, 2), t)
    assert torch.allclose(seen.t.double(), (sde.sigma(t) / sde.alpha(t)).log() / 4, rtol=1e-6, atol=1e-6)
    assert seen.t.dtype == torch.float32
    # Another prediction keeps the scaled input and the clock, and reads the output its own way.
    model = ss.Denoiser(seen, sde, predicts="eps", precondition=ss.Preconditioning(0.5))
    x = normal(6, 2)
    assert torch.allclose(model.x0(x, t), x / sde.alpha(t)[:, None], rtol=1e-12)
    assert torch.allclose(seen.x, x / (sde.alpha(t) ** 2 / 4 + sde.sigma(t) ** 2).sqrt()[:, None], rtol=1e-12)


# Precision.


class Scaled(nn.Module):
    """x times one parameter, in a dtype of its own; remembers what it was given."""

    def __init__(self, dtype: torch.dtype, value: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value, dtype=dtype))
        self.seen: Recorder | None = None
        self.given: torch.dtype | None = None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.seen is not None:
            self.seen(x, t)
        self.given = x.dtype
        return x * self.weight


@pytest.mark.parametrize("state", [torch.float32, torch.float64])
@pytest.mark.parametrize("net_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_network_computes_in_its_own_dtype_and_nothing_else_does(
    net_dtype: torch.dtype, state: torch.dtype
) -> None:
    net = Scaled(net_dtype)
    for name in ("VP", "VE", "Flow", "Discrete"):
        sde = SDES[name]
        kind = "v" if name == "Flow" else "eps"
        model = ss.Denoiser(net, sde, predicts=kind)
        x = normal(64, 3, dtype=state)
        for t in inner_times(sde, 5).tolist():
            with torch.no_grad():
                got = model.x0(x, t)
            assert got.dtype == state and net.given == net_dtype
            # The same coefficients, applied in float64 to what the network returned, to rounding of the state.
            out = x.to(net_dtype).double()
            a, s = sde.alpha(t), sde.sigma(t)
            want = (x.double() - s * out) / a if kind == "eps" else (a * x.double() - s * out) / (a * a + s * s)
            size = (x.abs() + s * out.abs()) / a
            tolerance = 1e-6 if state == torch.float32 else 1e-14
            assert float(((got - want).abs() / size).max()) < tolerance, (sde, t)


@pytest.mark.parametrize("name", ["VP", "Discrete", "Flow", "EDM"])
def test_a_bfloat16_network_adds_its_own_rounding_and_no_more(name: str) -> None:
    # A network that is exact in bfloat16 (its state has few digits) gives the float32 result to 1e-5.
    sde = SDES[name]
    x = normal(64, 3, dtype=torch.float32).bfloat16().float()
    for t in inner_times(sde, 9).tolist():
        half, full = (ss.Denoiser(Scaled(d), sde, predicts="v").x0(x, t) for d in (torch.bfloat16, torch.float32))
        assert torch.allclose(half, full, rtol=1e-5, atol=1e-6), (sde, t)


def precise(name: str, t: float) -> tuple[mp.mpf, mp.mpf, mp.mpf, mp.mpf]:
    """α, σ, α̇, σ̇ in high precision."""
    oracle = EXACT[name]
    alpha, sigma = oracle(mp.mpf(t))
    dot = [mp.diff(lambda s, i=i: oracle(s)[i], mp.mpf(t), h=mp.mpf(t) * mp.mpf(10) ** -20) for i in (0, 1)]
    return alpha, sigma, dot[0], dot[1]


@pytest.mark.parametrize("name", EXACT)
def test_coefficients_equal_high_precision_arithmetic(name: str) -> None:
    sde = SDES[name]
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    kinds = sources(name)
    # σ̇ of VP is a small difference near T, and a process made of f and g has only its quadrature to take it from.
    tolerance = 1e-10 if name == "VP by drift" else 1e-12
    with mp.workdps(60):
        s = mp.mpf(SIGMA_DATA)
        for k in range(13):
            t = float(sde.T * 10 ** (-6 + k / 2)) * (0.97 if k == 12 else 1.0)
            alpha, sigma, adot, sdot = precise(name, t)
            square = alpha**2 * s**2 + sigma**2
            det = alpha * sdot - sigma * adot
            want = {  # x0 = c_skip x + c_out out
                "eps": (1 / alpha, -sigma / alpha),
                "score": (1 / alpha, sigma**2 / alpha),
                "x0": (mp.mpf(0), mp.mpf(1)),
                "v": (alpha / (alpha**2 + sigma**2), -sigma / (alpha**2 + sigma**2)),
                "velocity": (sdot / det, -sigma / det),
                "F": (alpha * s**2 / square, sigma * s / mp.sqrt(square)),
            }
            for kind in kinds:
                got = (
                    make(lambda x, t: zero, sde, kind).x0(one, t).item(),
                    make(lambda x, t: one, sde, kind).x0(zero, t).item(),
                )
                for g, w in zip(got, want[kind], strict=True):
                    assert abs(mp.mpf(g) - w) <= tolerance * abs(w), (name, kind, t)
            seen = Recorder()
            make(seen, sde, "F").x0(one, t)
            assert abs(mp.mpf(seen.x.item()) * mp.sqrt(square) - 1) < 1e-12, (name, t)


# Shapes.


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 2, 3), (6, 1, 2, 3), (6, 1, 2, 2, 3)])
@pytest.mark.parametrize("name", ["VP", "VE", "Flow", "Discrete", "two functions"])
def test_states_of_any_shape_with_one_time_or_one_for_each_row(name: str, shape: tuple[int, ...]) -> None:
    sde = SDES[name]
    x, out = normal(*shape), normal(*shape, seed=1)
    t = 0.4 * sde.T
    mixed = torch.linspace(0.1, 0.9, 6, dtype=torch.float64) * sde.T
    for kind in sources(name):
        model = make(lambda x, t: out, sde, kind)
        for want in KINDS:
            fn = getattr(model, want)
            number = fn(x, t)
            assert number.shape == shape
            assert torch.allclose(fn(x, torch.tensor(t, dtype=torch.float64)), number, rtol=1e-12), (kind, want)
            assert torch.allclose(fn(x, torch.full((6,), t, dtype=torch.float64)), number, rtol=1e-12), (kind, want)
            rows = []
            for i, s in enumerate(mixed.tolist()):
                row = make(lambda x, t, i=i: out[i : i + 1], sde, kind)
                rows.append(getattr(row, want)(x[i : i + 1], s))
            assert torch.allclose(fn(x, mixed), torch.cat(rows), rtol=1e-11, atol=1e-12), (kind, want)
        assert torch.equal(model(x, t), model.x0(x, t)), "calling a denoiser denoises"


def test_empty_single_and_strided_batches() -> None:
    for kind in ("eps", "x0", "F"):
        model = make(lambda x, t: x * t.reshape(-1, 1), ss.VP(), kind)
        for t in (0.5, torch.tensor(0.5)):
            assert model.x0(torch.zeros(0, 3), t).shape == (0, 3)
        assert model.x0(torch.zeros(0, 3), torch.zeros(0)).shape == (0, 3)
        x = normal(3, 4).T
        t = torch.linspace(0.2, 0.8, 4, dtype=torch.float64)
        assert not x.is_contiguous()
        assert torch.equal(model.x0(x, t), model.x0(x.contiguous(), t))
        assert torch.allclose(model.x0(x, t)[2:3], model.x0(x[2:3], t[2:3]), rtol=1e-14)
        assert model.x0(x.float(), t).dtype == torch.float32, "a float64 time does not change the state's dtype"


# Learned variances.


@pytest.mark.parametrize("shape", [(5, 1), (5, 4), (5, 3, 2, 2), (5, 4, 2, 2), (5, 5, 3), (5, 1, 2, 2, 2)])
def test_learned_variance_is_split_off_and_kept(shape: tuple[int, ...]) -> None:
    # Half of the channels, however many there are; no look-up of "3 colours".
    mean, variance = normal(*shape, seed=1), normal(*shape, seed=2)
    calls = []

    def net(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.cat([mean, variance], dim=1)

    x = normal(*shape)
    model = ss.Denoiser(net, DISCRETE, predicts="eps", learned_variance=True)
    plain = ss.Denoiser(lambda x, t: mean, DISCRETE, predicts="eps")
    for kind in KINDS:
        assert torch.equal(getattr(model, kind)(x, 300.0), getattr(plain, kind)(x, 300.0))
    calls.clear()
    x0, kept = model.x0_and_variance(x, 300.0)
    assert calls == [5], "one evaluation gives both"
    assert torch.equal(x0, plain.x0(x, 300.0)) and torch.equal(kept, variance)
    out, kept = model.output(x, 300.0)
    assert torch.equal(out, mean) and torch.equal(kept, variance)
    assert plain.output(x, 300.0)[1] is None


# Ends.

# Where α(T) = 0. A velocity says nothing there if its slope of α is 0 too, as on the second-degree polynomial.
WITHOUT_SIGNAL = {
    "Flow": ss.Flow(),
    "Trig": ss.Trig(),
    "Cosine": ss.Cosine(T=1.0),
    "zero SNR": SDES["Discrete zero SNR"],
}


@pytest.mark.parametrize("name", WITHOUT_SIGNAL)
def test_without_signal_x0_and_v_and_velocity_work_and_eps_and_score_are_refused(name: str) -> None:
    sde = WITHOUT_SIGNAL[name]
    for kind in ("eps", "score"):
        with pytest.raises(ValueError, match=rf"`predicts`='{kind}' does not determine the data where α.*smaller `T`"):
            ss.Denoiser(Recorder(), sde, predicts=kind)
    x0, eps = normal(4, 3, seed=1), normal(4, 3, seed=2)
    T = sde.T
    x = sde.perturb(x0, T, eps)
    assert torch.equal(x, sde.sigma(T) * eps)
    vector = torch.full((4,), T, dtype=torch.float64)
    for kind in ("x0", "v", "F"):
        out = make(Recorder(), sde, kind).target(x0, T, eps)
        for t in (T, vector, vector[0]):
            model = make(lambda x, t, out=out: out, sde, kind)
            assert torch.allclose(model.x0(x, t), x0, rtol=1e-12, atol=1e-12), (sde, kind)
            assert torch.allclose(model.eps(x, t), eps, rtol=1e-12, atol=1e-12), (sde, kind)
            assert torch.allclose(model.score(x, t), -eps / sde.sigma(T), rtol=1e-12, atol=1e-12), (sde, kind)


@pytest.mark.parametrize(
    "name",
    [
        "Flow",
        "Trig",
        "Cosine to the end",
        "Discrete zero SNR",
        "Shifted",
    ],
)
def test_without_signal_a_velocity_network_works(name: str) -> None:
    sde = SDES[name]
    x0, eps = normal(4, 3, seed=1), normal(4, 3, seed=2)
    x = sde.perturb(x0, sde.T, eps)
    out = make(Recorder(), sde, "velocity").target(x0, sde.T, eps)
    model = make(lambda x, t: out, sde, "velocity")
    for t in (sde.T, torch.full((4,), sde.T, dtype=torch.float64)):
        assert torch.allclose(model.x0(x, t), x0, rtol=1e-12, atol=1e-12), sde
        assert torch.allclose(model.v(x, t), -sde.sigma(sde.T) * x0, rtol=1e-12, atol=1e-12), sde


def test_a_velocity_that_vanishes_without_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="'velocity' does not determine the data where α = 0"):
        ss.Denoiser(Recorder(), SDES["Polynomial"], predicts="velocity")
    ss.Denoiser(Recorder(), ss.processes.Polynomial(n=2.0, T=0.99), predicts="velocity")


def test_preconditioning_without_signal_needs_a_finite_clock() -> None:
    with pytest.raises(ValueError, match=r"`time` must be given.*log\(σ/α\) / 4, is infinite"):
        ss.Denoiser(Recorder(), ss.Flow(), predicts="F", precondition=ss.Preconditioning())
    model = ss.Denoiser(Recorder(), ss.Flow(), predicts="F", precondition=ss.Preconditioning(), time="sigma")
    assert bool(model.x0(torch.ones(2, 3), 1.0).isfinite().all())


@pytest.mark.parametrize("name", SDES)
def test_without_noise_x0_is_the_state_and_eps_is_not_to_be_had(name: str) -> None:
    sde = SDES[name]
    x, out = normal(4, 3), normal(4, 3, seed=1)
    zeros = torch.zeros(4, dtype=torch.float64)
    for kind in [k for k in sources(name) if k not in ("x0", "velocity")]:
        model = make(lambda x, t: out, sde, kind)
        for t in (0.0, zeros):
            assert torch.allclose(model.x0(x, t), x, rtol=1e-15), (sde, kind)
    model = make(lambda x, t: out, sde, "x0")
    for t in (0.0, zeros):
        assert torch.equal(model.x0(x, t), out)
    for fn in (model.eps, model.score):
        with pytest.raises(ValueError, match=r"not defined at t = 0.0, where alpha = 1.0 and sigma = -?0.0.*t_min"):
            fn(x, 0.0)


@pytest.mark.parametrize("name", SDES)
def test_no_number_for_a_time_gives_nan_without_a_word(name: str) -> None:
    # An infinite or indefinite coefficient is an error where the time is a number, which costs nothing to look at.
    sde = SDES[name]
    x, out = normal(4, 3), normal(4, 3, seed=1)
    told = []
    for kind in sources(name):
        model = make(lambda x, t: out, sde, kind)
        for t in (0.0, sde.T):
            for want in KINDS:
                try:
                    got = getattr(model, want)(x, t)
                except ValueError as error:
                    told.append(str(error))
                else:
                    assert bool(got.isfinite().all()), (sde, kind, want, t)
    assert told and all("not defined at t" in message for message in told)


# Training targets.


@pytest.mark.parametrize("name", SDES)
def test_a_network_that_returns_the_target_has_the_data_as_its_x0(name: str) -> None:
    sde = SDES[name]
    t = inner_times(sde, 9)
    x0, eps = normal(9, 2, 3, seed=1), normal(9, 2, 3, seed=2)
    x = sde.perturb(x0, t, eps)
    for kind in sources(name):
        out = make(Recorder(), sde, kind).target(x0, t, eps)
        a, b = (column(c, x0) for c in form(kind, sde, t))
        assert torch.allclose(out, a * x0 + b * eps, rtol=1e-12, atol=1e-12), (sde, kind)
        size = size_of_terms(sde, t, form(kind, sde, t), form("x0", sde, t), x, out)
        got = make(lambda x, t, out=out: out, sde, kind).x0(x, t)
        assert float(((got - x0).abs() / (size + x0.abs())).max()) < 1e-12, (sde, kind)
        for i in (0, 8):
            row = make(Recorder(), sde, kind).target(x0[i : i + 1], t[i].item(), eps[i : i + 1])
            assert torch.allclose(row[0], out[i], rtol=1e-12), (sde, kind)


def test_sigma_data_is_one_number_for_target_and_sampling() -> None:
    sde = ss.EDM()
    x0, eps = normal(4, 3, seed=1), normal(4, 3, seed=2)
    x, t = sde.perturb(x0, 0.8, eps), 0.8
    targets, x0s, inputs = [], [], []
    for s in (0.5, 1.3):
        seen = Recorder()
        model = ss.Denoiser(seen, sde, predicts="F", precondition=ss.Preconditioning(s))
        targets.append(model.target(x0, t, eps))
        x0s.append(model.x0(x, t))
        inputs.append(seen.x)
        assert torch.allclose(model.x0(x, t), s**2 / (s**2 + t**2) * x, rtol=1e-12)
        assert torch.allclose(targets[-1], (x0 - s**2 / (s**2 + t**2) * x) * (s**2 + t**2) ** 0.5 / (t * s), rtol=1e-12)
    for pair in (targets, x0s, inputs):
        assert not torch.allclose(*pair, rtol=0.05)
    for s in (0.5, 1.3):  # they stay each other's inverse
        model = ss.Denoiser(Recorder(), sde, predicts="F", precondition=ss.Preconditioning(s))
        out = model.target(x0, t, eps)
        twin = ss.Denoiser(lambda x, t, out=out: out, sde, predicts="F", precondition=ss.Preconditioning(s))
        assert torch.allclose(twin.x0(x, t), x0, rtol=1e-12, atol=1e-12)


def test_targets_of_unit_data_have_unit_scale_with_preconditioning() -> None:
    # EDM chose c_skip and c_out for it; the numbers of this process are no exception.
    n = 20_000
    for name in ("VP", "EDM", "two functions"):
        sde = SDES[name]
        x0, eps = SIGMA_DATA * normal(n, 1, seed=1), normal(n, 1, seed=2)
        for t in inner_times(sde, 4).tolist():
            out = make(Recorder(), sde, "F").target(x0, t, eps)
            assert abs(out.std().item() - 1) < 5 / n**0.5, (sde, t)


# The reverse family.


@ALL
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, 1.7])
def test_reverse_drift_is_the_textbooks(sde: ss.SDE, eta: float) -> None:
    mix = mixture(sde)
    reverse = ss.denoisers.Reverse(mix, eta)
    t = inner_times(sde, 7)
    x = mix.sample(7, 0.5 * sde.T, seed=0)
    score = mix.score(x, t)
    f, g2 = sde.f(t)[:, None], sde.g2(t)[:, None]
    terms = (f * x, (1 + eta**2) / 2 * g2 * score)
    size = terms[0].abs() + terms[1].abs() + (sde.alpha_dot(t)[:, None] * mix.x0(x, t)).abs()
    assert float(((reverse.drift(x, t) - (terms[0] - terms[1])).abs() / size).max()) < 1e-9, sde
    assert torch.allclose(reverse.drift(x, t), terms[0] - terms[1], rtol=1e-7, atol=1e-7)
    model = ss.Denoiser(lambda x, _: mix.x0(x, t), sde, predicts="x0")  # through a network, the same
    assert float(((ss.denoisers.Reverse(model, eta).drift(x, t) - (terms[0] - terms[1])).abs() / size).max()) < 1e-9, (
        sde
    )
    assert torch.allclose(torch.as_tensor(reverse.diffusion(t)), eta * sde.g(t), rtol=1e-14)
    for i in (0, 6):
        s = t[i].item()
        drift, row = reverse.drift(x[i : i + 1], s), reverse.drift(x, t)[i]
        assert float(((drift - row).abs() / size[i]).max()) < 1e-12, (sde, s)
        assert isinstance(reverse.diffusion(s), float) and math.isclose(reverse.diffusion(s), eta * sde.g(s))


@pytest.mark.parametrize("name", ["Flow", "Trig", "Cosine to the end"])
def test_the_flow_is_finite_where_no_signal_is_left(name: str) -> None:
    sde = SDES[name]
    mix = mixture(sde)
    x = normal(5, 3)
    drift = ss.denoisers.Reverse(mix, 0.0).drift(x, sde.T)
    assert bool(drift.isfinite().all())
    assert torch.allclose(drift, sde.alpha_dot(sde.T) * mix.mean() + sde.sigma_dot(sde.T) * x, rtol=1e-9), (
        "there x0 is the mean of the data and x is ε"
    )
    before = ss.denoisers.Reverse(mix, 0.0).drift(x, sde.T * (1 - 1e-7))
    assert torch.allclose(drift, before, rtol=1e-4, atol=1e-4), "and it is the limit"
    for eta in (0.0, 1.0):  # the noise of the SDE is infinite there, that of the ODE is none
        assert ss.denoisers.Reverse(mix, eta).diffusion(sde.T) == (math.inf if eta else 0.0)
        vector = ss.denoisers.Reverse(mix, eta).diffusion(torch.full((2,), sde.T))
        assert vector.tolist() == [math.inf if eta else 0.0] * 2
    with pytest.raises(ValueError, match="not defined at t"):
        ss.denoisers.Reverse(mix, 1.0).drift(x, sde.T)


@ALL
def test_flow_of_one_gaussian_moves_along_the_drift(sde: ss.SDE) -> None:
    cov = torch.tensor([[1.0, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.3]], dtype=torch.float64)
    gauss = ss.GaussianMixture(sde, [[1.0, -0.5, 0.2]], cov=cov[None])
    x = normal(4, 3)
    for t in inner_times(sde, 4)[1:].tolist():
        h = 1e-5 * t
        slope = (8 * (gauss.flow(x, t, t + h) - gauss.flow(x, t, t - h))) / (12 * h)
        slope = slope - (gauss.flow(x, t, t + 2 * h) - gauss.flow(x, t, t - 2 * h)) / (12 * h)
        drift = ss.denoisers.Reverse(gauss, 0.0).drift(x, t)
        assert torch.allclose(slope, drift, rtol=1e-6, atol=1e-9 / h * x.abs().max().item() * 1e-6), (sde, t)


# Another schedule.


def new_processes(old: str) -> list[str]:
    """All of them; one where inverting λ of the old one is a search through quadratures."""
    return ["EDM"] if old == "VP by drift" else list(SDES)


@pytest.mark.parametrize("old", SDES)
def test_a_rescheduled_exact_denoiser_is_the_exact_denoiser_of_the_new_process(old: str) -> None:
    trained = mixture(SDES[old])
    last = SDES[old].lam(SDES[old].T)
    for name in new_processes(old):
        sde = SDES[name]
        moved, exact = ss.denoisers.Rescheduled(trained, sde), mixture(sde)
        t = inner_times(sde, 5)
        x = exact.sample(5, 0.3 * sde.T, seed=0)
        reach = sde.lam(t) >= last  # noisier than the old process ever was: see the next test
        got, want = moved.x0(x, t), exact.x0(x, t)
        assert bool(got.isfinite().all()), (old, name)
        assert torch.allclose(got[reach], want[reach], rtol=1e-8, atol=1e-8), (old, name)
        middle = float(t[2])
        assert torch.allclose(moved.x0(x, middle), exact.x0(x, middle), rtol=1e-8, atol=1e-8), (old, name)


@pytest.mark.parametrize("old", SDES)
def test_rescheduling_is_finite_and_right_at_both_ends(old: str) -> None:
    trained = mixture(SDES[old])
    begin = SDES[old]
    for name in new_processes(old):
        sde = SDES[name]
        moved = ss.denoisers.Rescheduled(trained, sde)
        x = normal(3, 3)
        for t in (0.0, torch.zeros(3, dtype=torch.float64)):
            assert torch.allclose(moved.x0(x, t), x, rtol=1e-12), (old, name)
        # Noisier than the old process at its T, it is asked at T for the state at the same noise.
        lam = max(sde.lam(sde.T), begin.lam(begin.T))
        u = begin.t_of_lam(lam)
        want = trained.x0(x * (begin.sigma(u) / sde.sigma(sde.T)), u)
        for t in (sde.T, torch.full((3,), sde.T, dtype=torch.float64)):
            assert torch.allclose(moved.x0(x, t), want, rtol=1e-7, atol=1e-7), (old, name)


def test_rescheduling_keeps_conditions_dtype_and_the_chain_of_modules() -> None:
    net = Scaled(torch.float32)
    seen = {}

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor, t: Tensor, **cond: object) -> Tensor:
            seen.update(cond)
            return self.inner(x, t)

    moved = ss.denoisers.Rescheduled(ss.Denoiser(Wrapped(), ss.VP(), predicts="eps"), ss.EDM())
    assert moved.x0(torch.ones(2, 3), 1.0, label="cat").dtype == torch.float32
    assert seen == {"label": "cat"}
    assert [p is net.weight for p in moved.parameters()] == [True]
    assert moved.sde == ss.EDM()


# Errors of the network and of its conditions.


def test_a_network_that_is_not_finite_is_named_with_time_and_sample() -> None:
    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((t > 0.5).reshape(-1, *[1] * (x.ndim - 1)), torch.full_like(x, math.nan), x)

    model = ss.Denoiser(net, ss.VP(), predicts="eps", check_finite=True)
    for shape in ((3,), (3, 2), (3, 2, 2)):
        x = torch.ones(shape)
        assert bool(model.x0(x, 0.25).isfinite().all())
        with pytest.raises(ValueError, match=r"not finite at t = 0.75, first in sample 0"):
            model.x0(x, 0.75)
        with pytest.raises(ValueError, match=r"not finite at t = 0.875, first in sample 2"):
            model.x0(x, torch.tensor([0.125, 0.25, 0.875]))
    silent = ss.Denoiser(net, ss.VP(), predicts="eps")
    assert bool(silent.x0(torch.ones(3, 2), 0.75).isnan().all()), "off in the hot path"


def test_conditions_pass_through_as_they_are() -> None:
    seen = Recorder()
    model = ss.Denoiser(seen, ss.VP(), predicts="eps")
    rows, one, number, table = torch.zeros(4, 7), torch.ones(1, 5), torch.tensor(3.0), torch.zeros(9, 2)
    tree = {"text": [rows, (one, None)], "scale": number, "name": "cat", "guidance": 7.5, "table": Shared(table)}

    def check_tree(got: Any) -> None:
        assert got["text"][0] is rows and got["text"][1][1] is None and got["scale"] is number
        assert got["name"] == "cat" and got["guidance"] == 7.5 and got["table"] is table
        assert torch.equal(got["text"][1][0], one.expand(4, 5)), "one row stands for every sample"

    for kind in KINDS:
        getattr(model, kind)(torch.ones(4, 2), 0.5, context=tree, label=None)
        check_tree(seen.cond["context"])
        assert seen.cond["label"] is None
    ss.denoisers.Reverse(model).drift(torch.ones(4, 2), 0.5, context=tree)
    assert set(seen.cond) == {"context"}
    check_tree(seen.cond["context"])


x23 = torch.zeros(2, 3)
VP = ss.VP()


def fine(x: Tensor, t: Tensor, **cond: object) -> Tensor:
    return x


def denoise(net: object, **keywords: object) -> Tensor:
    return ss.Denoiser(net, VP, **{"predicts": "eps", **keywords}).x0(x23, 0.5)  # type: ignore[arg-type]


BAD = {
    "no prediction": (lambda: ss.Denoiser(fine, VP), TypeError, "predicts"),  # type: ignore[call-arg]
    "unknown prediction": (
        lambda: denoise(fine, predicts="noise"),
        ValueError,
        "`predicts` must be one of 'eps'.*'noise'",
    ),
    "F without its scaling": (lambda: denoise(fine, predicts="F"), ValueError, "give `precondition`"),
    "number as preconditioning": (
        lambda: denoise(fine, predicts="F", precondition=0.5),
        TypeError,
        r"`precondition` must be Preconditioning\(sigma_data\)",
    ),
    "sigma_data not positive": (lambda: ss.Preconditioning(0.0), ValueError, "`sigma_data`.*above 0"),
    "network not callable": (lambda: denoise(3), TypeError, "`net` must be a module or a function.*got 3"),
    "process and network exchanged": (lambda: ss.Denoiser(VP, fine, predicts="eps"), TypeError, "`net` must be"),  # type: ignore[arg-type]
    "class as process": (lambda: ss.Denoiser(fine, ss.VP, predicts="eps"), TypeError, "`sde` must be an SDE"),  # type: ignore[arg-type]
    "unknown clock": (lambda: denoise(fine, time="timestep"), ValueError, "`time` must be one of 't', 'index'"),
    "index of a continuous process": (lambda: denoise(fine, time="index"), ValueError, "needs a process with indices"),
    "clock of another shape": (
        lambda: denoise(fine, time=lambda t: torch.zeros(3)),
        ValueError,
        r"`time` must map times to labels of the same shape, got \(3,\)",
    ),
    "tuple": (lambda: denoise(lambda x, t: (x, x)), TypeError, "must return a tensor, got tuple; unpack it"),
    "nothing": (lambda: denoise(lambda x, t: None), TypeError, "must return a tensor, got NoneType"),
    "another shape": (
        lambda: denoise(lambda x, t: x[:, :2]),
        ValueError,
        r"shape \(2, 2\) where \(2, 3\).*check the net",
    ),
    "twice the channels": (
        lambda: denoise(lambda x, t: torch.cat([x, x], 1)),
        ValueError,
        r"\(2, 6\) where \(2, 3\).*`learned_variance`=True",
    ),
    "variance that is not there": (
        lambda: denoise(fine, learned_variance=True),
        ValueError,
        r"\(2, 3\) where \(2, 6\) was expected",
    ),
    "variance of a state without channels": (
        lambda: ss.Denoiser(fine, VP, predicts="eps", learned_variance=True).x0(torch.zeros(2), 0.5),
        ValueError,
        "`learned_variance` needs channels",
    ),
    "variance not asked for": (
        lambda: ss.Denoiser(fine, VP, predicts="eps").x0_and_variance(x23, 0.5),
        ValueError,
        "`x0_and_variance` needs a denoiser with `learned_variance`=True, got False",
    ),
    "condition of another length": (
        lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23, 0.5, label=torch.zeros(3)),
        ValueError,
        "condition `label` has 3 rows and the state has 2",
    ),
    "condition inside a tree": (
        lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23, 0.5, context={"a": [torch.zeros(5, 2)]}),
        ValueError,
        "condition `context` has 5 rows",
    ),
    "wrong number of times": (
        lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23, torch.ones(3) / 2),
        ValueError,
        "`t` has 3 entries and the state has 2 rows",
    ),
    "time outside": (lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23, 1.5), ValueError, r"\[0, 1\].*got 1.5"),
    "half state": (lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23.half(), 0.5), TypeError, "float16"),
    "integer state": (lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23.int(), 0.5), TypeError, "int32"),
    "complex state": (lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23 + 0j, 0.5), TypeError, "view_as_real"),
    "scalar state": (lambda: ss.Denoiser(fine, VP, predicts="eps").x0(x23[0, 0], 0.5), ValueError, "scalar"),
    "noise of another shape": (
        lambda: ss.Denoiser(fine, VP, predicts="eps").target(x23, 0.5, torch.zeros(2, 1)),
        ValueError,
        r"`eps` must have the shape of `x0`, \(2, 3\)",
    ),
    "negative eta": (lambda: ss.denoisers.Reverse(mixture(VP), -1.0), ValueError, "`eta`.*at least 0"),
    "reverse of a network": (
        lambda: ss.denoisers.Reverse(fine),
        TypeError,
        "`denoiser` must be a denoiser.*got the function",
    ),  # type: ignore[arg-type]
    "rescheduled network": (lambda: ss.denoisers.Rescheduled(fine, VP), TypeError, "`model` must be a denoiser"),  # type: ignore[arg-type]
    "rescheduled to nothing": (lambda: ss.denoisers.Rescheduled(mixture(VP), "vp"), TypeError, "`sde` must be an SDE"),  # type: ignore[arg-type]
    "no x0": (
        lambda: type("Mine", (ss.denoisers.AbstractDenoiser,), {})(VP).x0(x23, 0.5),
        NotImplementedError,
        "Mine must define `x0",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


# As a module.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.dropout(self.linear(torch.cat([x, t[:, None].to(x.dtype)], dim=1)))


def small(sde: ss.SDE | None = None, **keywords: object) -> ss.Denoiser:
    torch.manual_seed(0)
    return ss.Denoiser(Net(), sde or ss.VP(), **{"predicts": "eps", **keywords}).eval()  # type: ignore[arg-type]


def test_a_denoiser_is_a_module() -> None:
    model = small()
    assert {name for name, _ in model.named_parameters()} == {"net.linear.weight", "net.linear.bias"}
    assert set(model.state_dict()) == {"net.linear.weight", "net.linear.bias"}
    model.train()
    assert model.net.dropout.training
    model.eval()
    assert not model.net.dropout.training
    assert "predicts='eps'" in repr(model) and "VP(" in repr(model) and "<Net, 15 parameters>" in repr(model)
    model.to(torch.float64)
    x = normal(2, 3)
    assert model.net.linear.weight.dtype == torch.float64
    want = model.x0(x, 0.5)
    other = small().double()
    with torch.no_grad():
        other.net.linear.weight.zero_()
    assert not torch.equal(other.x0(x, 0.5), want)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.x0(x, 0.5), want)
    assert model.to("meta").net.linear.weight.device.type == "meta"


CLOCKED = {
    "plain": (ss.VP(), {}),
    "named clock": (ss.VP(), {"time": "sigma"}),
    "preconditioned": (ss.EDM(), {"predicts": "F", "precondition": ss.Preconditioning()}),
    "index": (SDES["Discrete"], {"time": "nearest_index"}),
    "function": (ss.VP(), {"time": torch.sqrt}),
}


@pytest.mark.parametrize("case", CLOCKED)
def test_copies_and_pickles_are_equal_and_apart(case: str) -> None:
    sde, keywords = CLOCKED[case]
    model = small(sde, **keywords)
    x, t = normal(2, 3, dtype=torch.float32), 0.5 * sde.T
    want = model.x0(x, t)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
        pickle.loads(pickle.dumps(ss.denoisers.Rescheduled(model, ss.Flow()))).model,
    ):
        assert torch.equal(twin.x0(x, t), want)
        assert twin.sde == model.sde and twin.sde is not None
        with torch.no_grad():
            twin.net.linear.weight.add_(1.0)
        assert not torch.equal(twin.x0(x, t), want)
        assert torch.equal(model.x0(x, t), want), "the copy has parameters of its own"


@pytest.mark.parametrize("kind", [*KINDS, "F"])
def test_gradients_flow_to_the_state_and_to_the_parameters(kind: str) -> None:
    sde = ss.VP()
    model = make(Net(), sde, kind).eval().double()
    x = normal(3, 3).requires_grad_()
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    weight = normal(3, 3, seed=1)
    (of_x,) = torch.autograd.grad((model.x0(x, t) * weight).sum(), x)
    h = 1e-6
    for i, j in ((0, 0), (1, 2), (2, 1)):
        step = torch.zeros(3, 3, dtype=torch.float64)
        step[i, j] = h
        with torch.no_grad():
            slope = ((model.x0(x + step, t) - model.x0(x - step, t)) * weight).sum() / (2 * h)
        assert math.isclose(of_x[i, j], slope, rel_tol=1e-6, abs_tol=1e-8), kind
    bias = model.net.linear.bias
    (of_bias,) = torch.autograd.grad((model.x0(x, t) * weight).sum(), bias)
    clock = t
    (ha, hb), alpha, sigma = form(kind, sde, clock), sde.alpha(t), sde.sigma(t)
    of_out = -sigma / (alpha * hb - sigma * ha)  # x0 = … + of_out · out, and the bias adds to out
    assert torch.allclose(of_bias, (of_out[:, None] * weight).sum(0), rtol=1e-9)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_results_are_the_same_where_gradients_are_off(mode: type) -> None:
    for name in ("VP", "VP by hand", "Flow"):
        sde = SDES[name]
        for kind in sources(name):
            model = make(Net(), sde, kind).eval()
            x = normal(3, 3, dtype=torch.float32)
            for t in (0.4, torch.full((3,), 0.4)):
                want = [getattr(model, k)(x, t) for k in KINDS]
                with mode():
                    got = [getattr(model, k)(x, t) for k in KINDS]
                    again = [getattr(model, k)(x, t) for k in KINDS]
                for a, b, c in zip(want, got, again, strict=True):
                    assert a.requires_grad and not b.requires_grad
                    assert torch.equal(a, b) and torch.equal(b, c)
