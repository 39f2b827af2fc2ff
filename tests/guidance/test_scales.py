"""Scales as functions of time: written for a number or for a tensor, they work under every solver."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.guidance.scale import scale_at

VP = ss.VP()
LABEL = torch.tensor([0.2, 1.0, 3.0])
X = ss.Noise(0).normal((3, 2), 0)
EACH = torch.tensor([2.0, 3.0, 4.0])
SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    # written for a number, and the same written for a tensor
    "predicate": (
        lambda t: 3.0 if 0.2 < t < 0.7 else 1.0,
        lambda t: torch.where((t > 0.2) & (t < 0.7), 3.0, 1.0),
    ),
    "ramp": (lambda t: min(3.0, 1 + 4 * t), lambda t: (1 + 4 * t).clamp(max=3.0)),
    "each sample": (
        lambda t: EACH if t < 0.5 else 1.0,
        lambda t: torch.where(torch.as_tensor(t) < 0.5, EACH, 1.0),
    ),
}
METHODS: dict[str, Any] = {
    "DDIM": ss.DDIM(),
    "UniPC": ss.UniPC(2),
    "Heun": ss.EDMHeun(),
    "SDE": ss.SDEDPMSolverPP(2),
    "Adaptive": ss.Adaptive(),
    "AdaptiveSDE": ss.integrators.AdaptiveSDE(rtol=0.3, atol=0.3, longest=0.5),
    "Parallel": ss.sampling.Parallel(ss.DDIM(), tol=0.0),
    "torchdiffeq": ss.integrators.TorchDiffEq(),
    "torchsde": ss.integrators.TorchSDE(),
    "each time": ss.DDIM().plan(
        VP, torch.tensor([[1.0, 1.0, 1.0], [0.6, 0.5, 0.9], [0.1, 0.3, 0.2], [0.0, 0.0, 0.0]], dtype=torch.float64)
    ),
}


def guided(scale: Any, kind: str) -> ss.denoisers.AbstractDenoiser:
    model = ss.Denoiser(lambda x, time, label: (x - 0.3 * label[:, None]).tanh(), VP, predicts="x0")
    given = model.given(label=LABEL)
    if kind == "classifier-free":
        return ss.ClassifierFree(given, scale, null={"label": 0.0})
    if kind == "compose":
        return ss.guidance.Compose(model.given(label=torch.zeros(3)), [given], [scale])
    return ss.guidance.ClassifierGuidance(given, lambda x, t: -x.square().sum(1), scale)


CASES = [
    *itertools.product(METHODS, SCALES, ["classifier-free"]),
    *itertools.product(["DDIM", "each time"], SCALES, ["compose", "classifier"]),
]


@pytest.mark.parametrize(("method", "name", "kind"), CASES)
def test_a_scale_for_numbers_is_a_scale_for_tensors(method: str, name: str, kind: str) -> None:
    results = [
        ss.sample(guided(scale, kind), X, METHODS[method], seed=0, steps=4 if method in STEPPED else None)
        for scale in SCALES[name]
    ]
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


STEPPED = ("DDIM", "UniPC", "Heun", "SDE", "Parallel")
TIMES: dict[str, Any] = {
    "float": 0.4,
    "scalar": torch.tensor(0.4),
    "one": torch.tensor([0.4]),
    "each": torch.tensor([0.1, 0.4, 0.9]),
}


@pytest.mark.parametrize(("name", "time"), list(itertools.product(SCALES, TIMES)))
def test_the_value_is_that_of_each_time(name: str, time: str) -> None:
    t = TIMES[time]
    x = X[:1] if time == "one" and name != "each sample" else X
    for scale in SCALES[name]:
        if time == "one" and name == "each sample":
            continue
        value = torch.as_tensor(scale_at(scale, t, x)).flatten().expand(len(x))
        each = torch.as_tensor(t).expand(len(x)).tolist()
        want = [torch.as_tensor(SCALES[name][0](s), dtype=torch.float32).expand(3)[i] for i, s in enumerate(each)]
        assert torch.allclose(value.float(), torch.stack(want), rtol=1e-5)


def test_rows_of_a_predicate_are_those_of_the_samples() -> None:
    model = guided(SCALES["each sample"][0], "classifier-free")
    t = torch.tensor([0.1, 0.4, 0.9])
    index = torch.tensor([2, 0])
    whole = model.x0(X, t)
    assert torch.allclose(model.rows(index).x0(X[index], t[index]), whole[index], rtol=1e-5)


def test_a_learned_scale_keeps_its_gradient_and_errors_of_the_function_pass() -> None:
    weight = torch.tensor(2.0, requires_grad=True)
    value = scale_at(lambda t: torch.where(t > 0.2, weight, 1.0), 0.4, X)
    assert isinstance(value, Tensor)
    assert float(torch.autograd.grad(value, weight)[0]) == 1.0
    with pytest.raises(TypeError, match="unsupported operand"):
        scale_at(lambda t: t + "a", 0.4, X)
    with pytest.raises(RuntimeError, match="size"):
        scale_at(lambda t: t * torch.ones(5), torch.ones(3), X)
