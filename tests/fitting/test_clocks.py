"""Networks that hide their time from autograd: a fit says so, and fits what it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.fitting.clocks import hides_time

SDE = ss.Discrete(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
MIX = ss.GaussianMixture(SDE, torch.tensor([[-1.0], [0.2], [1.0]]), std=0.2)
PLAN = ss.VelocityAB(2).plan(SDE, ss.grids.karras(SDE, 4))
X = ss.Noise(0).normal((6, 1), 0, dtype=torch.float64)
TIMES = [float(row.t) for row in PLAN.rows if row.evaluates]


def exact(x: Tensor, index: Tensor, **cond: Tensor) -> Tensor:
    return MIX.eps(x, index.double() + 1)


class Detached(nn.Module):
    """A module that reads its time as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.scale * MIX.eps(x, float(label[0]) + 1)


class Own(ss.denoisers.AbstractDenoiser):
    """A denoiser without a network."""

    def __init__(self, rounds: bool) -> None:
        super().__init__(SDE)
        self.rounds = rounds

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float64)
        return MIX.x0(x, t.round() if self.rounds else t)


def scaled(time: Any) -> ss.Denoiser:
    def net(x: Tensor, label: Tensor) -> Tensor:
        return (x * label[:, None] / 1000).tanh()

    return ss.Denoiser(net, SDE, predicts="F", precondition=ss.Preconditioning(0.7), time=time)


HIDDEN: dict[str, Callable[[], ss.denoisers.AbstractDenoiser]] = {
    "nearest index": lambda: ss.Denoiser(exact, SDE, predicts="eps", time="nearest_index"),
    "rounded inside": lambda: ss.Denoiser(lambda x, k: exact(x, k.round()), SDE, predicts="eps"),
    "a number": lambda: ss.Denoiser(Detached(), SDE, predicts="eps"),
    "preconditioned": lambda: scaled("nearest_index"),
    "guided": lambda: ss.ClassifierFree(
        ss.Denoiser(exact, SDE, predicts="eps", time="nearest_index").given(label=torch.ones(len(X))),
        2.0,
        null={"label": 0.0},
    ),
    "without a network": lambda: Own(True),
}
SEEN: dict[str, Callable[[], ss.denoisers.AbstractDenoiser]] = {
    "index": lambda: ss.Denoiser(exact, SDE, predicts="eps"),
    "preconditioned": lambda: scaled("index"),
    "independent of time": lambda: ss.Denoiser(lambda x, k: 0.5 * x, SDE, predicts="x0"),
    "mixture": lambda: MIX,
    "without a network": lambda: Own(False),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_rounded_and_detached_labels_are_found(name: str) -> None:
    assert hides_time(HIDDEN[name](), X, TIMES)


@pytest.mark.parametrize("name", SEEN)
def test_other_denoisers_pass(name: str) -> None:
    assert not hides_time(SEEN[name](), X, TIMES)


def test_a_fit_to_rounded_labels_fits_levels_and_weights_and_gains() -> None:
    model = HIDDEN["nearest index"]()
    options: dict[str, Any] = {"start": ss.Start(dtype=torch.float64), "steps": 8, "teacher": TEACHER}
    with pytest.warns(UserWarning, match="autograd sees no derivative: .*nearest_index.*only the levels of the states"):
        plan = ss.fit(PLAN, model, (24, 1), **options)
    assert plan.meta["what"] == ["times", "weights"]
    evaluated = [[row.t for row in p.rows if row.evaluates] for p in (plan, PLAN)]
    assert evaluated[0] == pytest.approx(evaluated[1]), "the times of the evaluations stay"
    assert plan.meta["levels"][1:-1] != pytest.approx(evaluated[0][1:]), "and the levels of the states move"
    errors = plan.meta["held_out"]
    assert errors["after"]["mean_log"] < 0.9 * errors["before"]["mean_log"]
    for what in (("network_times",), ("network_times", "weights")):
        with pytest.raises(
            ValueError, match=r"cannot be fitted; give `what`=\('times', 'weights'\), or make the labels"
        ):
            ss.fit(PLAN, model, (24, 1), what=what, **options)


TEACHER = ss.DPMSolverPP(2).plan(SDE, ss.grids.quadratic_vp(SDE, 20))
