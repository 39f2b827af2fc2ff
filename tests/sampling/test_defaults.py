"""The default solver and the counts of a run, seen through every wrapper of a network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.denoisers import AbstractDenoiser
from scoresde.sampling import default_solver, recommend

f64 = torch.float64
VP = ss.VP()
MIX = ss.GaussianMixture(VP, torch.tensor([[-1.0, 0.2], [1.0, -0.4], [0.3, 0.9]]), std=0.2)
B = 5


def net(x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
    out = MIX.eps(x.double(), t.double())
    return out if label is None else out + 0.05 * label.reshape(-1, 1)


EPS = ss.Denoiser(net, VP, predicts="eps")
SEEN = ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), torch.tensor([[0.5]]), std=0.2)
LABEL = torch.linspace(-1, 1, B, dtype=f64)

# Wrapper of the ε-network, and the forward passes that one evaluation of it takes.
WRAPPERS: dict[str, tuple[Callable[[], AbstractDenoiser], int]] = {
    "plain": (lambda: EPS, 1),
    "given": (lambda: EPS.given(label=LABEL), 1),
    "classifier-free": (lambda: ss.ClassifierFree(EPS, 2.0, null={"label": 0.0}).given(label=LABEL), 2),
    "in one forward": (
        lambda: ss.ClassifierFree(EPS, 2.0, null={"label": 0.0}, one_forward=True).given(label=LABEL),
        2,
    ),
    "given inside": (lambda: ss.guidance.Clamp(EPS.given(label=LABEL), -2.0, 2.0), 1),
    "autoguidance": (lambda: ss.guidance.AutoGuidance(EPS, EPS.given(label=0 * LABEL), 1.5), 2),
    "classifier": (lambda: ss.guidance.ClassifierGuidance(EPS, lambda x, t: -x.square().sum(1), 0.1), 1),
    "threshold": (lambda: ss.guidance.DynamicThreshold(EPS, limit=2.0), 1),
    "another process": (lambda: ss.denoisers.Rescheduled(EPS, ss.VP(beta_max=15.0)), 1),
    "DPS": (lambda: ss.inverse.DPS(EPS, SEEN), 1),
    "MMPS": (lambda: ss.inverse.MMPS(EPS, SEEN), 1),
    "PiGDM": (lambda: ss.inverse.PiGDM(EPS, SEEN), 1),
    "DDNM": (lambda: ss.inverse.DDNM(EPS, SEEN), 1),
    "two wrappers": (lambda: ss.guidance.Clamp(ss.inverse.DPS(EPS.given(label=LABEL), SEEN)), 1),
}
EACH = pytest.mark.parametrize("name", WRAPPERS)


@EACH
@pytest.mark.parametrize("nfe", [2, 5, 10, 25])
def test_a_wrapper_does_not_hide_what_the_network_predicts(name: str, nfe: int) -> None:
    model = WRAPPERS[name][0]()
    assert model.kind.predicts == "eps" and not model.kind.exact
    assert model.kind.sde == VP, "the process that the network was trained on"
    assert repr(default_solver(nfe, model)) == repr(default_solver(nfe, EPS))
    assert recommend(nfe, model).why == recommend(nfe, EPS).why != recommend(nfe, MIX).why


@EACH
def test_every_forward_pass_of_the_network_is_counted(name: str) -> None:
    make, passes = WRAPPERS[name]
    run = ss.solve(make(), (B, 2), ss.UniPC(2), nfe=6, seed=0, start=ss.Start(dtype=f64))
    assert run.plan is not None and run.plan.nfe == 6
    assert run.nfe == 6 * passes, "states through the network, for each sample"
    assert run.calls == (6 if "one" in name else 6 * passes)


def test_counts_hold_for_correctors_and_for_runs_one_after_another() -> None:
    corrector = ss.sampling.LangevinCorrector(snr=0.1, steps=2, seed=1)
    for _ in range(2):
        run = ss.solve(EPS, (B, 2), ss.DDIM(), steps=5, seed=0, watch=ss.Watch(hook=corrector))
        assert (run.nfe, run.calls) == (5 + 2 * 4, 5 + 2 * 4), "no correction of the start, nor at data"


@pytest.mark.parametrize("nfe", [5, 20])
def test_guidance_of_an_eps_network_gets_the_smaller_error_by_default(nfe: int) -> None:
    guided = ss.ClassifierFree(EPS, 2.0, null={"label": 0.0}).given(label=LABEL)
    start = ss.Noise(3).normal((B, 2), 0, dtype=f64)
    fine = ss.sample(guided, start, ss.DPMSolverPP(2), steps=400)
    other = recommend(nfe)
    gap = {
        name: float((ss.sample(guided, start, solver, nfe=nfe, grid=grid) - fine).norm(dim=1).median())
        for name, solver, grid in (("default", None, None), ("that of v-networks", other.solver, other.grid))
    }
    assert gap["default"] < gap["that of v-networks"], gap
