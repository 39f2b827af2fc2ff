"""The diagnosis of a denoiser names the mistake that was made, and passes what is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from instances import SDES
from torch import Tensor, nn

import scoresde as ss

KINDS = ("eps", "score", "x0", "v", "velocity")
FEW = pytest.mark.parametrize("name", ["VP", "EDM", "Flow", "Discrete"])
# What a process of which the prediction says nothing at T, or another prediction says the same, cannot be tested on.
REFUSED = {n: {"eps", "score"} for n, sde in SDES.items() if sde.alpha(sde.T) == 0} | {
    "Polynomial": {"eps", "score", "velocity"}
}
TWINS = {"EDM": {"eps", "velocity"}}
MEANS = ss.Noise(1).normal((6, 8), 0, dtype=torch.float64)


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    """Clusters with room between them, as data has."""
    return ss.GaussianMixture(sde, MEANS, std=0.05)


def data(n: int = 16) -> Tensor:
    return mixture(ss.VP()).sample(n, seed=0, dtype=torch.float32)


def exact(
    sde: ss.SDE, kind: str, time_of_label: Callable[[Tensor], Tensor] = lambda label: label
) -> Callable[..., Tensor]:
    """A perfect network of one prediction, whose label is some function of time."""
    mix = mixture(sde)
    sigma_data = float(mix.covariance().diag().mean().sqrt())

    def net(x: Tensor, label: Tensor, **cond: object) -> Tensor:
        # All rows are asked at one time; labels that no training ever gave are taken to the nearest that one did.
        t = float(time_of_label(label[0].double()).nan_to_num(0.0).clamp(1e-4 * sde.T, sde.T * (1 - 1e-4)))
        if kind != "F":
            return getattr(mix, kind)(x, t)
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        square = alpha**2 * sigma_data**2 + sigma**2
        x = square**0.5 * x.double()  # the state before the preconditioning scaled it
        return ((mix.x0(x, t) - alpha * sigma_data**2 / square * x) * square**0.5 / (sigma * sigma_data)).float()

    return net


def kinds(name: str) -> list[str]:
    return [k for k in KINDS if k not in REFUSED.get(name, ())]


@pytest.mark.parametrize("name", SDES)
def test_a_right_denoiser_passes(name: str) -> None:
    sde = SDES[name]
    said = ["velocity"] if name == "VP by drift" else kinds(name)  # each inversion of λ is a search through quadratures
    for n, kind in zip((16, 64, 16, 64, 16), said, strict=False):
        model = ss.Denoiser(exact(sde, kind), sde, predicts=kind, time="t")
        found = ss.check_denoiser(model, data(n))
        assert found and found.ok, (sde, kind, str(found))
        assert (found.best.predicts, found.best.sign, found.best.time) == (kind, 1, "as declared"), (sde, kind)
        assert found.declared == found.best and found.declared.error < 0.6
        assert str(found).startswith("The declaration is right"), (sde, kind)
        assert "standard deviation" not in str(found), "nothing to say about data of unit scale"


@pytest.mark.parametrize("name", ["VP", "EDM", "two functions"])
def test_a_right_preconditioned_denoiser_passes(name: str) -> None:
    sde = SDES[name]
    s = float(mixture(sde).covariance().diag().mean().sqrt())
    model = ss.Denoiser(exact(sde, "F"), sde, predicts="F", precondition=ss.Preconditioning(s), time="t")
    assert ss.check_denoiser(model, data()).ok
    wrong = ss.Denoiser(exact(sde, "F"), sde, predicts="x0", precondition=ss.Preconditioning(s), time="t")
    found = ss.check_denoiser(wrong, data())
    assert not found and str(found).startswith("The network looks like predicts='F'; it was declared predicts='x0'")


@FEW
def test_a_wrong_prediction_is_named(name: str) -> None:
    sde = SDES[name]
    for kind in kinds(name):
        for said in kinds(name):
            if said == kind or {said, kind} == TWINS.get(name):
                continue
            found = ss.check_denoiser(ss.Denoiser(exact(sde, kind), sde, predicts=said, time="t"), data())
            assert not found, (sde, kind, said)
            expect = {kind} | (TWINS[name] if kind in TWINS.get(name, ()) else set())
            assert found.best.predicts in expect and found.best.sign == 1, (sde, kind, said, str(found))
            assert found.best.time == "as declared"
            assert f"looks like predicts='{found.best.predicts}'; it was declared predicts='{said}'" in str(found)
            assert found.declared.error > 1.5 * found.best.error


@FEW
def test_a_flipped_sign_is_named(name: str) -> None:
    sde = SDES[name]
    for kind in kinds(name):
        net = exact(sde, kind)
        model = ss.Denoiser(lambda x, t, net=net: -net(x, t), sde, predicts=kind, time="t")
        found = ss.check_denoiser(model, data())
        assert not found, (sde, kind)
        assert f"looks like predicts='{kind}', with the opposite sign; it was declared" in str(found), (sde, kind)


# What the network was trained with, as a function that gives its time back, and what it was declared with.
SCALES: dict[str, tuple[ss.SDE, Callable[[Tensor], Tensor], object, set[str]]] = {
    "999 t": (ss.VP(), lambda u: u / 999, "t", {"lambda t: 999 * t", "lambda t: 1000 * t"}),
    "1000 t": (ss.Flow(), lambda u: u / 1000, "t", {"lambda t: 999 * t", "lambda t: 1000 * t"}),
    "t, not 999 t": (ss.VP(), lambda u: u, lambda t: 999 * t, {"'t'"}),
    "index, not t": (SDES["Discrete"], lambda u: u + 1, lambda t: t / 1000, {"'index'", "'t'", "lambda t: 1 * t"}),
    "t / N, not index": (SDES["Discrete"], lambda u: 1000 * u, None, {"lambda t: t / 1000"}),
    "sigma, not log sigma": (
        ss.EDM(),
        lambda u: u,
        "log_sigma",
        {"'t'", "'sigma'"},  # the same thing on this process
    ),
    "log sigma, not sigma": (ss.EDM(), lambda u: u.exp(), "sigma", {"'log_sigma'"}),
    "sigma, not t": (ss.VE(), lambda u: ss.VE().t_of_sigma(u.clamp(0, 50)), "t", {"'sigma'"}),
    "t backwards": (ss.Flow(), lambda u: 1 - u, "t", {"lambda t: 1 - t"}),
    "a quarter of log sigma": (ss.EDM(), lambda u: (4 * u).exp(), "t", {"lambda t: -sde.lam(t) / 4"}),
}


@pytest.mark.parametrize("case", SCALES)
def test_a_wrong_time_scale_is_named(case: str) -> None:
    sde, back, said, names = SCALES[case]
    kind = "velocity" if isinstance(sde, ss.Flow) else "eps"
    model = ss.Denoiser(exact(sde, kind, back), sde, predicts=kind, time=said)  # type: ignore[arg-type]
    found = ss.check_denoiser(model, data())
    assert not found, case
    assert found.best.time in names and found.best.sign == 1, (case, str(found))
    assert f"time={found.best.time}; it was declared" in str(found)


def test_of_factors_about_equally_good_the_usual_one_is_named() -> None:
    found = ss.check_denoiser(ss.Denoiser(exact(ss.VP(), "eps", lambda u: u / 999.6), ss.VP(), predicts="eps"), data())
    errors = {r.time: r.error for r in found.readings if (r.predicts, r.sign) == ("eps", 1)}
    assert 0.95 < errors["lambda t: 999 * t"] / errors["lambda t: 1000 * t"] < 1.05
    assert found.best.time == "lambda t: 1000 * t"


def test_two_mistakes_at_once_are_named() -> None:
    net = exact(ss.VP(), "score", lambda u: u / 999)
    found = ss.check_denoiser(ss.Denoiser(lambda x, t: -net(x, t), ss.VP(), predicts="eps"), data())
    assert not found
    assert "predicts='score', with the opposite sign, time=lambda t: 999 * t" in str(found) or "1000 * t" in str(found)
    assert (found.best.predicts, found.best.sign) == ("score", -1)


UNTRAINED = {
    "zeros": lambda x, t: torch.zeros_like(x),
    "a constant": lambda x, t: torch.full_like(x, 0.7),
    "the state": lambda x, t: x,
    "noise": lambda x, t: ss.Noise(5).like(x, 0),
}


@pytest.mark.parametrize("case", UNTRAINED)
@pytest.mark.parametrize("name", ["VP", "EDM", "Flow"])
def test_an_untrained_network_is_told(name: str, case: str) -> None:
    for kind in kinds(name):
        found = ss.check_denoiser(ss.Denoiser(UNTRAINED[case], SDES[name], predicts=kind), data())
        assert not found, (name, kind, str(found))
        assert "hardly better than a linear guess" in str(found) and "untrained" in str(found), (name, kind)
        assert found.best.error > 0.95


def test_a_network_of_random_weights_is_told() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 8))
    for kind in KINDS:
        model = ss.Denoiser(lambda x, t: body(torch.cat([x, t[:, None]], 1)), ss.VP(), predicts=kind)
        found = ss.check_denoiser(model, data(64))
        assert not found and "untrained" in str(found), (kind, str(found))


def test_a_network_that_is_not_finite_is_told() -> None:
    found = ss.check_denoiser(ss.Denoiser(lambda x, t: x * math.nan, ss.VP(), predicts="eps"), data())
    assert not found and "not finite" in str(found)


@pytest.mark.parametrize("factor", [0.1, 20.0, 127.5])
def test_data_off_scale_is_told(factor: float) -> None:
    model = ss.Denoiser(exact(ss.VP(), "eps"), ss.VP(), predicts="eps")
    scale = float(data(64).double().std(correction=0)) * factor
    found = ss.check_denoiser(model, factor * data(64))
    assert not found
    assert f"standard deviation {scale:.3g} where 1 is assumed" in str(found) and "Standardize.fit" in str(found)
    s = float(mixture(ss.EDM()).covariance().diag().mean().sqrt())
    preconditioned = ss.Denoiser(
        exact(ss.EDM(), "F"), ss.EDM(), predicts="F", precondition=ss.Preconditioning(s), time="t"
    )
    assert f"where {s:.3g} is assumed" in str(ss.check_denoiser(preconditioned, factor * data(64)))


def test_a_network_a_little_off_passes_and_a_margin_can_be_set() -> None:
    net = exact(ss.VP(), "eps")
    noisy = ss.Denoiser(lambda x, t: 1.02 * net(x, t) + 0.02 * ss.Noise(3).like(x, 0), ss.VP(), predicts="eps")
    found = ss.check_denoiser(noisy, data(64))
    assert found
    twisted = ss.Denoiser(exact(ss.VP(), "v"), ss.VP(), predicts="velocity")
    assert not ss.check_denoiser(twisted, data(64))
    assert ss.check_denoiser(twisted, data(64), margin=1e6), "with a margin that forgives all"


def test_conditions_reach_the_network() -> None:
    net = exact(ss.VP(), "eps")
    seen = []

    def conditional(x: Tensor, t: Tensor, *, label: Tensor, scale: float) -> Tensor:
        seen.append((label, scale))
        return net(x, t) * scale

    label = torch.arange(16)
    model = ss.Denoiser(conditional, ss.VP(), predicts="eps")
    assert ss.check_denoiser(model.given(label=label, scale=1.0), data())
    assert all(one is label and scale == 1.0 for one, scale in seen)
    assert not ss.check_denoiser(model.given(label=label).given(scale=0.0), data())
    with pytest.raises(ValueError, match="condition `label` has 5 rows"):
        ss.check_denoiser(model.given(label=torch.arange(5), scale=1.0), data())


def test_it_is_repeatable_leaves_no_trace_and_lists_every_reading() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.weight * exact(ss.VP(), "eps")(x, t)

    model = ss.Denoiser(Net(), ss.VP(), predicts="eps")
    state, x = torch.get_rng_state(), data()
    before = x.clone()
    first, second = ss.check_denoiser(model, x), ss.check_denoiser(model, x)
    assert first == second and first != ss.check_denoiser(model, x, seed=1)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, before)
    assert model.net.weight.grad is None and model.training and model.time is None
    errors = [r.error for r in first.readings]
    assert errors == sorted(errors) and errors[0] == first.best.error
    assert {(r.predicts, r.sign) for r in first.readings} == {(k, s) for k in KINDS for s in (1, -1)}


def test_a_network_that_refuses_labels_is_not_asked_again() -> None:
    # A table of labels knows 0 … N − 1 and nothing else.
    sde = SDES["Discrete"]
    net = exact(sde, "eps", lambda u: u + 1)

    def table(x: Tensor, label: Tensor) -> Tensor:
        if bool((label < 0).any() | (label > 999).any()):
            raise IndexError("index out of range in self")
        return net(x, label)

    found = ss.check_denoiser(ss.Denoiser(table, sde, predicts="eps"), data())
    assert found and "'log_sigma'" not in {r.time for r in found.readings}
    with pytest.raises(IndexError):  # as declared, its errors are the user's to see
        ss.check_denoiser(ss.Denoiser(table, sde, predicts="eps", time=lambda t: 2 * t), data())


def test_states_of_images_and_learned_variances() -> None:
    sde = SDES["Discrete"]
    flat = exact(sde, "eps", lambda u: u + 1)

    def net(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([flat(x.flatten(1), t).reshape(x.shape), torch.zeros_like(x)], dim=1)

    x = data().reshape(16, 2, 2, 2)
    assert ss.check_denoiser(ss.Denoiser(net, sde, predicts="eps", learned_variance=True), x)
    found = ss.check_denoiser(ss.Denoiser(net, sde, predicts="v", learned_variance=True), x)
    assert "looks like predicts='eps'" in str(found)


MODEL = ss.Denoiser(lambda x, t: x, ss.VP(), predicts="eps")
BAD = {
    "a network": (
        lambda: ss.check_denoiser(nn.Identity(), data()),
        TypeError,
        "`model` must be a Denoiser.*got Identity",
    ),  # type: ignore[arg-type]
    "an exact denoiser": (lambda: ss.check_denoiser(mixture(ss.VP()), data()), TypeError, "got GaussianMixture"),  # type: ignore[arg-type]
    "one datum": (lambda: ss.check_denoiser(MODEL, data(1)), ValueError, "at least 2 samples"),
    "no data": (lambda: ss.check_denoiser(MODEL, data(0)), ValueError, "at least 2 samples"),
    "nan": (lambda: ss.check_denoiser(MODEL, data() * math.nan), ValueError, "`x` must be a finite batch"),
    "integers": (lambda: ss.check_denoiser(MODEL, data().int()), TypeError, "int32"),
    "list": (lambda: ss.check_denoiser(MODEL, [1.0]), TypeError, r"got \[1.0\]"),  # type: ignore[arg-type]
    "no margin": (lambda: ss.check_denoiser(MODEL, data(), margin=0.0), ValueError, "`margin`.*above 0"),
    "negative seed": (lambda: ss.check_denoiser(MODEL, data(), seed=-1), ValueError, "`seed`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
