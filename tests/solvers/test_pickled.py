"""Solvers, plans and what goes with them, pickled and deep-copied: equal, and with equal results in another process."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from instances import SDES
from test_naming import CATALOGUE, solvers_of
from torch import Tensor

import scoresde as ss
from scoresde.solvers import Solver

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
CODE = re.compile(r"<lambda|<eta|<function|functools\.partial")  # options that the caller wrote as a nameless function


def copies(value: Any) -> list[Any]:
    return [make(value) for make in COPIES.values()]


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_solver_is_equal_to_its_copies(name: str) -> None:
    made = 0
    for solver in solvers_of(name):
        if CODE.search(repr(solver)):
            continue
        for again in copies(solver):
            assert repr(again) == repr(solver) and type(again) is type(solver)
            assert again == solver or "Slope(" in repr(solver), solver  # an object of the caller, without equality
        made += 1
    assert made


STATISTICS = ss.solvers.Statistics((-1.0, 0.0, 1.0), (0.9, 0.5, 0.1), (-0.5, -0.3, -0.2), (0.1, 0.1, 0.2))
PARAMETERS: list[Any] = [
    *(ss.solvers.DATA, ss.solvers.NOISE, ss.solvers.VELOCITY, ss.solvers.V, ss.solvers.edm_prediction(0.7)),
    *(
        ss.solvers.LAM,
        ss.solvers.RHO,
        ss.solvers.TAU,
        ss.solvers.LOG1P_RHO,
        ss.solvers.TIME,
        ss.solvers.HEUN,
        STATISTICS.prediction(),
    ),
]


@pytest.mark.parametrize("value", PARAMETERS, ids=str)
def test_predictions_and_variables(value: Any) -> None:
    for again in copies(value):
        assert again == value and repr(again) == repr(value)


def test_predictions_are_equal_if_their_numbers_are() -> None:
    edm = ss.solvers.edm_prediction
    assert edm(0.5) == edm(0.5) != edm(0.6)
    table = ((-1.0, 1.0), (0.9, 0.1), (-0.5, -0.2))
    assert ss.solvers.Statistics(*table).prediction() == ss.solvers.Statistics(*table).prediction()
    assert ss.solvers.Statistics(*table).prediction() != STATISTICS.prediction()


PLANNED = [ss.UniPC(3), ss.SDEDPMSolverPP(2), ss.VelocityAB(3), ss.EDMHeun(), ss.solvers.DPMSolverV3(STATISTICS)]


@pytest.mark.parametrize("solver", PLANNED, ids=repr)
def test_copies_make_the_same_plan(solver: Solver) -> None:
    grid = ss.grids.karras(ss.VP(), 5)
    plan = solver.plan(ss.VP(), grid)
    for again in copies(solver):
        assert again.plan(ss.VP(), grid) == plan
    for again in copies(plan):
        assert again == plan and again.sde == plan.sde


GRID = ss.grids.karras(ss.VP(), 6)
GRIDS: list[Tensor] = [GRID, ss.grids.churn(ss.VP(), GRID, 2.0), ss.grids.restart(ss.VP(), GRID, 0.1, 0.5)]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: type(grid).__name__)
def test_grids(grid: Tensor) -> None:
    for again in copies(grid):
        assert type(again) is type(grid) and torch.equal(again, grid)
        assert ss.DDIM().plan(ss.VP(), again) == ss.DDIM().plan(ss.VP(), grid)


def decay(t: Tensor) -> Tensor:
    return torch.exp(-3 * t**2)


def growth(t: Tensor) -> Tensor:
    return torch.sin(1.2 * t) + t**3


def rate(t: Tensor) -> Tensor:
    return -0.05 - 9.95 * t


def spread(t: Tensor) -> Tensor:
    return (0.1 + 19.9 * t).sqrt()


BY_LAMBDAS = ("two functions", "VP by hand", "VP by drift")  # replaced by functions with names, as pickles need
PROCESSES = {name: sde for name, sde in SDES.items() if name not in BY_LAMBDAS}
PROCESSES |= {"by functions": ss.SDE.from_functions(decay, growth), "by drift": ss.SDE.from_drift(rate, spread)}


@pytest.mark.parametrize("name", PROCESSES)
def test_processes(name: str) -> None:
    sde = PROCESSES[name]
    t = sde.T * torch.linspace(0.01, 1, 9, dtype=torch.float64)
    for again in copies(sde):
        assert again == sde and repr(again) == repr(sde) and hash(again) == hash(sde)
        assert torch.equal(again.alpha(t), sde.alpha(t)) and torch.equal(again.sigma(t), sde.sigma(t))


OPTIONS: list[Any] = [
    *(ss.sampling.Start(data_std=0.5), ss.sampling.Watch(save_at=[0.5], progress=True), ss.Preconditioning(0.7)),
    *(ss.guidance.APG(), ss.guidance.ZeroStar(), ss.guidance.Rescale(0.5), ss.guidance.linear),
    *(ss.Adaptive(), ss.integrators.AdaptiveSDE(), ss.integrators.Reversible(), ss.integrators.TorchDiffEq()),
    *(ss.sampling.Parallel(), ss.sampling.LearnedVariance(), ss.likelihood.Tolerance()),
]


@pytest.mark.parametrize("value", OPTIONS, ids=lambda value: getattr(value, "__name__", type(value).__name__))
def test_options(value: Any) -> None:
    for again in copies(value):
        assert again == value and repr(again) == repr(value)


def test_noise_draws_the_same_numbers() -> None:
    for noise in (ss.Noise(3, offset=2), ss.Noise([5, 6]), ss.Noise(4, indices=[7, 1]), ss.Noise()):
        for again in copies(noise):
            assert torch.equal(again.normal((2, 3), draw=1), noise.normal((2, 3), draw=1))
    model = ss.GaussianMixture(ss.VP(), torch.eye(3), std=0.3)
    for again in copies(ss.Noise(8, path=True)):
        draws = [ss.sample(model, (2, 3), ss.DDPM(), steps=5, seed=seed) for seed in (again, ss.Noise(8, path=True))]
        assert torch.equal(*draws)


def network(classes: int | None = None) -> ss.Denoiser:
    net = ss.nn.MLP(3, hidden=8, seed=0, classes=classes)
    net.last.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    return ss.Denoiser(net, ss.VP(), predicts="eps")


def mixture() -> ss.GaussianMixture:
    return ss.GaussianMixture(ss.VP(), torch.eye(3), std=0.3)


def guided(rule: Any = None) -> ss.ClassifierFree:
    options = {} if rule is None else {"rule": rule}
    return ss.ClassifierFree(network(classes=3).given(label=torch.tensor([0, 2])), 2.0, null={"label": 3}, **options)


DENOISERS: dict[str, Callable[[], Any]] = {
    "Denoiser": network,
    "GaussianMixture": mixture,
    "Gaussian": lambda: ss.Gaussian.estimate(ss.VP(), mixture().sample(50, seed=0), "full"),
    "Empirical": lambda: ss.denoisers.Empirical(ss.VP(), torch.eye(3)),
    "Rescheduled": lambda: ss.denoisers.Rescheduled(network(), ss.Flow()),
    "Clamp": lambda: ss.guidance.Clamp(network()),
    "AutoGuidance": lambda: ss.guidance.AutoGuidance(network(), mixture(), 2.0),
    "ClassifierFree": guided,
    "ClassifierFree, APG": lambda: guided(ss.guidance.APG()),
    "ClassifierFree, momentum": lambda: guided(ss.guidance.Momentum()),
    "Compose": lambda: ss.guidance.Compose(network(), [mixture()], [0.5]),
}


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_and_guidance_sample_alike(name: str) -> None:
    model = DENOISERS[name]()
    expected = ss.sample(model, (2, 3), ss.UniPC(2), steps=4, seed=0)
    for again in copies(model):
        assert torch.equal(ss.sample(again, (2, 3), ss.UniPC(2), steps=4, seed=0), expected)
    if name == "Gaussian":
        for again in copies(ss.sampling.Start(gaussian=model)):
            draws = [ss.sample(mixture(), (2, 3), steps=4, start=s, seed=0) for s in (again.gaussian, model)]
            assert torch.equal(*draws)


def test_a_solution_is_whole() -> None:
    solution = ss.solve(mixture(), (2, 3), ss.DDPM(), steps=3, seed=0, watch=ss.sampling.Watch(save_at="all"))
    for again in copies(solution):
        assert torch.equal(again.x, solution.x) and again.trajectory.keys() == solution.trajectory.keys()
        assert all(torch.equal(again.trajectory[t], x) for t, x in solution.trajectory.items())
        assert again.nfe == solution.nfe


def test_another_process_reads_them(tmp_path: Path) -> None:
    solvers = [ss.UniPC(3), ss.solvers.SEEDS(2), ss.VelocityAB(2), ss.solvers.DPMSolverV3(STATISTICS)]
    tables = [solver.plan(ss.VP(), GRID) for solver in solvers]
    (tmp_path / "solvers").write_bytes(pickle.dumps((solvers, ss.VP(), GRIDS[1], tables)))
    code = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    solvers, sde, grid, tables = pickle.load(file)
import scoresde as ss
assert all(s.plan(sde, ss.grids.karras(sde, 6)) == plan for s, plan in zip(solvers, tables))
print(*solvers, type(grid).__name__, sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "solvers")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == [*map(repr, solvers), "Zigzag"]
