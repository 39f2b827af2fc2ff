"""Denoisers of some samples, conditions that belong to a denoiser, counts, and the end of a chain of wrappers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.denoisers import AbstractDenoiser, Rescheduled, Wrapped
from scoresde.denoisers.base import Counter, Shared
from scoresde.guidance import (
    APG,
    AutoGuidance,
    Clamp,
    ClassifierFree,
    ClassifierGuidance,
    Compose,
    DynamicThreshold,
    Momentum,
    Rescale,
    ZeroStar,
)

F64 = torch.float64
SDE = ss.VP()
B = 6
X = ss.Noise(0).normal((B, 3), 0, dtype=F64)
LABEL = torch.linspace(-1.0, 1.0, B, dtype=F64)
TEXT = ss.Noise(1).normal((B, 3), 0, dtype=F64)
SCALE = torch.linspace(0.5, 4.0, B, dtype=F64)
TABLE = torch.linspace(0.5, 1.5, 3, dtype=F64)  # shared by all samples
COND: dict[str, Any] = {"label": LABEL, "text": {"tokens": TEXT}, "table": Shared(TABLE)}
TIMES = torch.linspace(0.2, 0.8, B, dtype=F64)
INDICES = {
    "some": torch.tensor([4, 1]),
    "one": torch.tensor([3]),
    "repeated": torch.tensor([2, 2, 5]),
    "permuted": torch.tensor([5, 4, 3, 2, 1, 0]),
}


def elementwise(x: Tensor, t: Tensor, label: Tensor, text: dict[str, Tensor], table: Tensor) -> Tensor:
    """A network whose result for a sample does not depend on the batch, to the bit."""
    assert table is TABLE and len(label) == len(text["tokens"]) == len(x)
    return 0.3 * x + label[:, None] * table + 0.1 * text["tokens"] * x * x + 0.2 * t[:, None].to(x.dtype)


NET = ss.Denoiser(elementwise, SDE, predicts="v")
WEAK = ss.Denoiser(lambda x, t, **cond: 0.5 * elementwise(x, t, **cond), SDE, predicts="x0")


class Towards:
    """A log-likelihood with a target for each sample."""

    def __init__(self, target: Tensor) -> None:
        self.target = target

    def rows(self, index: Tensor) -> Towards:
        return Towards(self.target[index])

    def __call__(self, x: Tensor, *t: object) -> Tensor:
        return -0.5 * (x - self.target).square().sum(1)


class Twice(Wrapped):
    """A wrapper of one's own, with a value for each sample."""

    per_sample = ("gain",)

    def __init__(self, model: AbstractDenoiser, gain: Tensor) -> None:
        super().__init__(model)
        self.gain = gain

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        return self.gain[:, None] * self.model.x0(x, t, **cond)


def free(model: AbstractDenoiser, scale: Any = SCALE, **options: Any) -> ClassifierFree:
    return ClassifierFree(model, scale, **{"null": {"label": 0.0, "text": {"tokens": torch.zeros(3)}}, **options})


WRAPPERS: dict[str, Callable[[AbstractDenoiser], AbstractDenoiser]] = {
    "nothing": lambda model: model,
    "Rescheduled": lambda model: Rescheduled(model, ss.EDM()),
    "ClassifierFree": free,
    "ClassifierFree, one forward": lambda model: free(model, one_forward=True),
    "ClassifierFree, one number": lambda model: free(model, 2.0),
    "ClassifierFree, interval": lambda model: free(model, interval=(0.3, 0.6)),
    "ClassifierFree, function of time": lambda model: free(model, lambda t: 1 + 2 * t),
    "ClassifierFree, function of time and sample": lambda model: free(model, lambda t: SCALE * (1 + t)),
    "ClassifierFree, null of each sample": lambda model: free(model, null={"text": {"tokens": -TEXT}}),
    "ClassifierFree, null of each sample, one forward": lambda model: free(
        model, null={"text": {"tokens": -TEXT}}, one_forward=True
    ),
    "ClassifierFree, Rescale": lambda model: free(model, rule=Rescale(0.5)),
    "ClassifierFree, APG": lambda model: free(model, rule=APG(0.3, norm=0.5)),
    "ClassifierFree, ZeroStar": lambda model: free(model, rule=ZeroStar(0.7)),
    "AutoGuidance": lambda model: AutoGuidance(model, WEAK.given(**COND), SCALE),
    "Compose": lambda model: Compose(
        model,
        [model.given(label=-LABEL), model.given(text={"tokens": 2 * TEXT}), WEAK.given(**COND)],
        [SCALE, -0.5, lambda t: SCALE * t],
    ),
    "Clamp": lambda model: Clamp(model, -0.4, 0.4),
    "DynamicThreshold": lambda model: DynamicThreshold(model, 0.7, 0.1),
    "ClassifierGuidance": lambda model: ClassifierGuidance(model, Towards(TEXT), SCALE),
    "ClassifierGuidance of x0": lambda model: ClassifierGuidance(model, Towards(TEXT), SCALE, sees="x0"),
    "ClassifierGuidance of x0, short": lambda model: ClassifierGuidance(
        model, Towards(TEXT), SCALE, sees="x0", through_net=False
    ),
    "of one's own": lambda model: Twice(model, SCALE),
    "nested": lambda model: Clamp(AutoGuidance(free(Twice(model, SCALE)), free(WEAK.given(**COND), 0.5), SCALE), -2, 2),
    "nested, one forward": lambda model: free(
        Compose(Twice(model, SCALE), [Rescheduled(model, SDE)], [SCALE]), one_forward=True
    ),
}
PLACES: dict[str, Callable[[Any], AbstractDenoiser]] = {
    "inside": lambda wrap: wrap(NET.given(label=LABEL, text={"tokens": TEXT}, shared={"table": TABLE})),
    "outside": lambda wrap: wrap(NET).given(label=LABEL, text={"tokens": TEXT}, shared={"table": TABLE}),
}
ALL = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def models(wrap: Any, place: str) -> AbstractDenoiser:
    if place == "outside" and wrap is WRAPPERS["Compose"]:  # a condition of an expert replaces that of the call
        wrap = lambda model: Compose(model, [Twice(model, LABEL), WEAK], [SCALE, -0.5])  # noqa: E731
    return PLACES[place](wrap)


@ALL
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_the_denoiser_of_some_samples_is_that_of_all_to_the_bit(wrap: Any, place: str, index: Tensor) -> None:
    model = models(wrap, place)
    some = model.rows(index)
    for t in (0.4, TIMES):
        part = t[index] if isinstance(t, Tensor) else t
        for kind in ("x0", "eps", "velocity"):
            whole, rows = getattr(model, kind)(X, t), getattr(some, kind)(X[index], part)
            assert torch.equal(rows, whole[index]), kind
        first = some.rows(torch.tensor([0])).x0(X[index[:1]], part[:1] if isinstance(part, Tensor) else part)
        assert torch.equal(first, some.x0(X[index], part)[:1]), "the rows of rows"


@ALL
def test_conditions_inside_and_outside_are_the_same(wrap: Any) -> None:
    if wrap is WRAPPERS["Compose"]:
        wrap = lambda model: Compose(model, [Twice(model, LABEL), Clamp(model)], [SCALE, -0.5])  # noqa: E731
    inside, outside, called = models(wrap, "inside"), models(wrap, "outside"), wrap(NET)
    assert torch.equal(inside.x0(X, 0.4), outside.x0(X, 0.4))
    assert torch.equal(inside.x0(X, 0.4), called.x0(X, 0.4, **COND))
    assert set(inside.conditions) == set(outside.conditions) == set(COND)
    assert called.conditions == {}


@ALL
@pytest.mark.parametrize("place", PLACES)
def test_one_row_stands_for_all_samples(wrap: Any, place: str) -> None:
    one, all_rows = (
        {"label": LABEL[n], "text": {"tokens": TEXT[n]}, "table": Shared(TABLE)}
        for n in (torch.tensor([2]), torch.full((B,), 2))
    )
    if wrap is WRAPPERS["Compose"]:
        wrap = lambda model: Compose(model, [Twice(model, LABEL)], [SCALE])  # noqa: E731
    make = (lambda c: wrap(NET.given(**c))) if place == "inside" else (lambda c: wrap(NET).given(**c))
    assert torch.equal(make(one).x0(X, 0.4), make(all_rows).x0(X, 0.4))
    index = INDICES["some"]
    assert torch.equal(make(one).rows(index).x0(X[index], 0.4), make(all_rows).x0(X, 0.4)[index])


def test_the_sum_of_momentum_is_selected_with_the_samples() -> None:
    index = INDICES["permuted"][:4]
    model = free(NET, rule=Momentum(APG(0.3), -0.6)).given(**COND)
    first = model.x0(X, 0.6)
    some = model.rows(index)
    whole = model.x0(X, 0.4)
    assert torch.equal(some.x0(X[index], 0.4), whole[index])
    fresh = free(NET, rule=Momentum(APG(0.3), -0.6)).given(**COND)
    assert torch.equal(fresh.x0(X, 0.6), first) and not torch.equal(fresh.rows(index).x0(X[index], 0.4), whole[:4])


def test_a_rule_may_be_one_function() -> None:
    halfway = lambda model, x, t, strong, weak, scale: (strong + weak) / 2  # noqa: E731
    model = free(NET, rule=halfway).given(**COND)
    assert torch.equal(model.rows(INDICES["some"]).x0(X[INDICES["some"]], 0.4), model.x0(X, 0.4)[INDICES["some"]])


@pytest.mark.parametrize("one", [False, True])
def test_a_shared_condition_reaches_the_network_as_it_is(one: bool) -> None:
    seen = []

    def net(x: Tensor, t: Tensor, label: Tensor, table: Tensor) -> Tensor:
        seen.append((len(x), tuple(label.shape), table))
        return x * label[:, None]

    guided = free(ss.Denoiser(net, SDE, predicts="x0"), null={"label": 0.0}, one_forward=one)
    model = guided.given(label=torch.ones(1, dtype=F64), shared={"table": TABLE})
    out = model.x0(X, 0.4)
    assert [entry[:2] for entry in seen] == ([(2 * B, (2 * B,))] if one else [(B, (B,))] * 2)
    assert all(table is TABLE for *_, table in seen)
    torch.testing.assert_close(out, SCALE[:, None] * X)


def test_a_shared_condition_may_have_a_null_value() -> None:
    def net(x: Tensor, t: Tensor, table: Tensor) -> Tensor:
        return x * table

    model = free(ss.Denoiser(net, SDE, predicts="x0"), 2.0, null={"table": torch.zeros(3, dtype=F64)})
    torch.testing.assert_close(model.given(shared={"table": TABLE}).x0(X, 0.4), 2 * X * TABLE)
    both = free(ss.Denoiser(net, SDE, predicts="x0"), 2.0, null={"table": torch.zeros(3)}, one_forward=True)
    with pytest.raises(ValueError, match="`one_forward` needs a tensor with one row for each sample"):
        both.given(shared={"table": TABLE}).x0(X, 0.4)


def test_conditions_of_the_wrong_length_are_named() -> None:
    for place in PLACES:
        model = free(NET).given(**COND) if place == "outside" else free(NET.given(**COND))
        with pytest.raises(ValueError, match="condition `label` has 6 rows and the state has 4"):
            model.x0(X[:4], 0.4)
    with pytest.raises(ValueError, match=r"the condition caption is missing.*guided.given\(caption=...\)"):
        free(NET, null={"caption": 0.0}).given(**COND).x0(X, 0.4)


def test_a_later_condition_replaces_an_earlier_one() -> None:
    model = NET.given(**COND)
    other = -LABEL
    want = NET.x0(X, 0.4, **{**COND, "label": other})
    assert torch.equal(model.given(label=other).x0(X, 0.4), want)
    assert torch.equal(model.x0(X, 0.4, label=other), want)
    assert model.given(label=other).conditions["label"] is other


# The end of a chain.


@ALL
@pytest.mark.parametrize("place", PLACES)
def test_the_network_at_the_end_is_seen_through_every_wrapper(wrap: Any, place: str) -> None:
    model = models(wrap, place)
    for chain in (model, model.rows(INDICES["some"]), model.counted(Counter())):
        assert chain.kind == ss.denoisers.base.Kind("v", SDE, exact=False)
    exact = ss.GaussianMixture(SDE, MEANS, std=0.4)
    for end in (exact, ss.denoisers.Empirical(SDE, MEANS), ss.Gaussian.estimate(SDE, exact.sample(9, seed=0))):
        assert Clamp(Rescheduled(end, ss.EDM())).kind.exact
        assert Clamp(Rescheduled(end, ss.EDM())).kind.sde is SDE


MEANS = [[1.0, 0.0, 0.0], [0.0, 1.0, -1.0]]

COUNTS = {  # calls of the network and states in one evaluation
    "nothing": (1, B),
    "Rescheduled": (1, B),
    "ClassifierFree": (2, 2 * B),
    "ClassifierFree, one forward": (1, 2 * B),
    "ClassifierFree, Rescale": (2, 2 * B),
    "AutoGuidance": (2, 2 * B),
    "Clamp": (1, B),
    "DynamicThreshold": (1, B),
    "ClassifierGuidance": (1, B),
    "ClassifierGuidance of x0": (1, B),
    "ClassifierGuidance of x0, short": (1, B),
    "of one's own": (1, B),
    "nested": (4, 4 * B),
    "nested, one forward": (2, 4 * B),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", COUNTS)
def test_evaluations_of_the_network_are_counted(name: str, place: str) -> None:
    model, counter = models(WRAPPERS[name], place), Counter()
    counted = model.counted(counter)
    assert torch.equal(counted.x0(X, 0.4), model.x0(X, 0.4))
    assert (counter.calls, counter.states) == COUNTS[name]
    for kind in ("eps", "score", "v", "velocity"):
        getattr(counted, kind)(X, 0.4)
    assert (counter.calls, counter.states) == tuple(5 * n for n in COUNTS[name])
    index = INDICES["some"]
    some = counted.rows(index)
    assert torch.equal(some.x0(X[index], 0.4), model.x0(X, 0.4)[index])
    calls, states = COUNTS[name]
    assert (counter.calls, counter.states) == (6 * calls, 5 * states + states * len(index) // B)


def test_a_scale_of_one_or_zero_costs_one_evaluation() -> None:
    for scale in (0.0, 1.0):
        counter = Counter()
        free(NET, scale).given(**COND).counted(counter).x0(X, 0.4)
        assert (counter.calls, counter.states) == (1, B)
    assert repr(counter) == f"Counter(calls=1, states={B})"


def test_counting_leaves_the_denoiser_as_it_is() -> None:
    model, counter = free(NET).given(**COND), Counter()
    counted = model.counted(counter)
    model.x0(X, 0.4)
    assert counter.calls == 0
    assert isinstance(model.model, ClassifierFree) and model.model.model is NET
    other = Counter()
    counted.counted(other).x0(X, 0.4)
    assert counter.calls == other.calls == 2, "two counters count the same run"


def test_a_variance_is_counted_and_conditioned() -> None:
    wide = lambda x, t, label: torch.cat([x * label[:, None], x], 1)  # noqa: E731
    model = ss.Denoiser(wide, SDE, predicts="x0", learned_variance=True).given(label=LABEL)
    counter = Counter()
    mean, variance = model.counted(counter).x0_and_variance(X, 0.4)
    assert torch.equal(mean, X * LABEL[:, None]) and torch.equal(variance, X) and counter.calls == 1
    index = INDICES["some"]
    assert torch.equal(model.rows(index).x0_and_variance(X[index], 0.4)[0], mean[index])


def test_a_denoiser_of_ones_own_expands_its_conditions() -> None:
    class Own(AbstractDenoiser):
        def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
            cond = ss.denoisers.expand_conditions(cond, len(x))
            return elementwise(x, torch.as_tensor(t).expand(len(x)), **cond)

    one = {"label": LABEL[:1], "text": {"tokens": TEXT[:1]}}
    model = Own(SDE).given(**one, shared={"table": TABLE})
    assert torch.equal(model.x0(X, 0.4)[1:2], model.rows(torch.tensor([1])).x0(X[1:2], 0.4))


# Text.

TEXTS: dict[str, Any] = {
    "network": NET,
    "module": ss.Denoiser(
        torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(50)]),
        SDE,
        predicts="F",
        precondition=ss.Preconditioning(),
    ),
    "clock": ss.Denoiser(elementwise, SDE, predicts="eps", time=lambda t: 999 * t),
    **{f"wrapper {name}": models(wrap, "outside") for name, wrap in WRAPPERS.items()},
    "momentum": free(NET, rule=Momentum(APG())),
    "counted": free(NET).counted(Counter()),
    "mixture": ss.GaussianMixture(SDE, torch.randn(100, 50), std=0.3),
    "empirical": ss.denoisers.Empirical(SDE, torch.randn(100, 50)),
    "gaussian": ss.Gaussian.of(SDE, torch.zeros(50), torch.eye(50)),
    "functions": ss.SDE.from_functions(lambda t: 1 - t, lambda t: t),
    "drift": ss.SDE.from_drift(lambda t: -t, lambda t: (2 * t) ** 0.5),
    "network on functions": ss.Denoiser(elementwise, ss.SDE.from_functions(lambda t: 1 - t, lambda t: t), predicts="v"),
    "discrete": ss.Discrete(ss.processes.betas("linear")),
    "noise": ss.Noise(7, offset=3),
    "noise of many": ss.Noise(range(1000)),
    "noise of rows": ss.Noise(0, indices=range(1000)),
    "path": ss.noise.BrownianPath(ss.Noise(range(1000)), (1000, 3)),
    "standardize": ss.data.Standardize.fit(torch.randn(1000, 3, 40, 40), "entry"),
    "standardize channels": ss.data.Standardize.fit(torch.randn(1000, 3, 4, 4), "channel"),
    "reverse": ss.denoisers.Reverse(free(NET)),
    "start": ss.Start(gaussian=ss.Gaussian.of(SDE, torch.zeros(50), torch.eye(50))),
}


@pytest.mark.parametrize("thing", TEXTS.values(), ids=TEXTS)
def test_it_prints_in_a_few_lines_without_addresses(thing: Any) -> None:
    text = repr(thing)
    assert "0x" not in text and len(text.splitlines()) <= 3 and len(text) < 900, text
    assert type(thing).__name__ in text or "counted" in str(type(thing)).lower()


def test_texts() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    model = ss.Denoiser(net, ss.EDM(), predicts="eps")
    inner = "Denoiser(net=<Sequential, 12 parameters>, sde=EDM(T=80.0, t_min=0.002), predicts='eps')"
    assert repr(model) == inner
    guided = ClassifierFree(model.given(label=torch.zeros(4)), 3.0, null={"label": 10}, one_forward=True)
    assert repr(guided) == (
        "ClassifierFree(scale=3, null={'label': 10}, one_forward=True, "
        f"model=Given(label=<4 float32>, model={inner}))"
    )
    assert repr(Clamp(model)) == f"Clamp(low=-1, high=1, model={inner})"
    assert repr(ss.Noise(7)) == "Noise(7)" and repr(ss.Noise(7, offset=2, path=True)) == "Noise(7, offset=2, path=True)"
    assert repr(ss.Noise([1, 2])) == "Noise(<2 seeds>)" and repr(ss.Noise(0, indices=[5])) == "Noise(0, indices=<1>)"
