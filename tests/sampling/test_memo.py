"""Plans that are written once: equal calls write nothing, and no call gets the plan of another one."""

from __future__ import annotations

import gc
import inspect
import math
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.sampling import few_steps, memo
from scoresde.sampling.few_steps import warn_of_few_steps
from scoresde.sampling.memo import LONGEST, STORED, Unknown, made, value_of, written
from scoresde.solvers import Solver, Tape, deterministic, stochastic
from tests.instances import SDES

F64 = torch.float64
GRID = torch.tensor([0.99, 0.6, 0.3, 0.1, 0.0], dtype=F64)


@pytest.fixture(autouse=True)
def _empty() -> None:
    for stored in (memo._write, memo._make):
        stored.cache_clear()


@pytest.fixture
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the plans that are written during a test."""
    names: list[str] = []
    plan = Tape.plan

    def count(self: Tape, name: str, order: int) -> ss.Plan:
        names.append(name)
        return plan(self, name, order)

    monkeypatch.setattr(Tape, "plan", count)
    return names


def mixture(sde: ss.SDE | None = None) -> ss.GaussianMixture:
    """A new model on a new process."""
    return ss.GaussianMixture(ss.Cosine() if sde is None else sde, torch.tensor([[-1.0], [1.0]]), std=0.3)


def catalogue() -> dict[str, Solver]:
    """Every solver of the library that a call without arguments makes."""
    found: dict[str, Solver] = {}
    for module in (deterministic, stochastic):
        for name, make in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(make)
            needs = any(p.default is p.empty for p in signature.parameters.values())
            if name[0] != "_" and signature.return_annotation == "Solver" and not needs:
                found[name] = make()
    return found


SOLVERS, AGAIN = catalogue(), catalogue()

CALLS: dict[str, Callable[[], Any]] = {
    "default": lambda: ss.sample(mixture(), (2, 1), nfe=10, seed=0),
    "grid maker": lambda: ss.sample(mixture(), (2, 1), ss.UniPC(3), steps=7, grid=ss.grids.karras, t_end=0.01, seed=0),
    "partial": lambda: ss.sample(mixture(), (2, 1), ss.DDIM(1.0), steps=7, grid=partial(ss.grids.karras, rho=3.0)),
    "times": lambda: ss.sample(mixture(ss.VP()), (2, 1), ss.DPMSolverPP(2), grid=GRID, seed=0),
    "list": lambda: ss.sample(mixture(ss.VP()), (2, 1), ss.SDEDPMSolverPP(order=2), grid=GRID.tolist(), seed=0),
    "discrete": lambda: ss.sample(mixture(ss.Discrete([0.01] * 999 + [0.5])), (2, 1), nfe=7, seed=0),
    "stepper": lambda: ss.sampling.Stepper.of(mixture(), (2, 1), nfe=7, seed=0),
    "encode": lambda: ss.encode(mixture(), torch.zeros(2, 1), ss.DDIM(), steps=4),
    "decode": lambda: ss.decode(mixture(), torch.zeros(2, 1), ss.DPMSolverPP(2), steps=4),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_second_call_writes_nothing(name: str, tapes: list[str]) -> None:
    first = CALLS[name]()
    assert tapes, "the first call writes"
    tapes.clear()
    makers = memo._make.cache_info().misses
    second = CALLS[name]()
    assert tapes == [] and memo._make.cache_info().misses == makers
    if isinstance(first, Tensor) and name != "partial":
        assert torch.equal(first, second)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_stored_plan_is_the_plan_of_the_solver(name: str) -> None:
    solver = SOLVERS[name]
    for process in ("VP", "Discrete", "Shifted"):
        sde = SDES[process]
        grid = ss.grids.uniform_lam(sde, 5)
        plan = written(solver, sde, grid)
        assert written(AGAIN[name], sde, grid.clone()) is plan, "a new solver with equal options"
        fresh = solver.plan(sde, grid)
        assert plan == fresh and str(plan) == str(fresh) and plan.sde == fresh.sde


def test_different_calls_get_different_plans() -> None:
    near = GRID.clone()
    near[2] = math.nextafter(near[2].item(), 1.0)
    zigzag = ss.grids.ancestral(ss.VP(), GRID)
    etas = (0.0, 0.5, 1.0, ss.solvers.EtaWithin(1.0, 0.5, 25.0), ss.solvers.EtaWithin(1.0, 0.5, 24.0))
    calls: list[tuple[Solver, ss.SDE, Tensor, str]] = [
        *((ss.SDEDPMSolverPP(order=2, eta=eta), ss.VP(), GRID, "diffuse") for eta in etas),
        *((ss.UniPC(order), ss.VP(), GRID, "diffuse") for order in (1, 2, 3)),
        *((ss.DDIM(), sde, GRID, "diffuse") for name, sde in SDES.items() if sde.T == 1.0),
        (ss.DDIM(), ss.VP(beta_max=19.0), GRID, "diffuse"),
        (ss.DDIM(), ss.VP(t_min=0.01), GRID, "diffuse"),
        (ss.DDIM(), ss.VP(), near, "diffuse"),
        (ss.DDIM(), ss.VP(), zigzag, "diffuse"),
        (ss.DDIM(), ss.VP(), zigzag, "solve"),
    ]
    for _ in range(2):
        for solver, sde, times, up in calls:
            got, want = written(solver, sde, times, up), solver.plan(sde, times, up=up)
            assert got == want and got.name == want.name and got.sde == want.sde, (solver, sde)


@dataclass(frozen=True)
class Scaled(ss.SDE):
    """A process of the user that holds a tensor."""

    rate: Tensor

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.rate.to(t) * t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t


def test_values_that_change_in_place_never_give_a_stale_plan() -> None:
    rate, level = torch.tensor(3.0, dtype=F64), [0.5]
    by_functions = ss.SDE.from_functions(lambda t: torch.exp(-rate.to(t) * t), lambda t: t)
    noisy = ss.SDEDPMSolverPP(order=2, eta=lambda t: level[0])
    cases: dict[str, tuple[Solver, ss.SDE]] = {
        "functions": (ss.DDIM(), by_functions),
        "field": (ss.DDIM(), Scaled(rate)),
        "shifted": (ss.DDIM(), ss.processes.Shifted(by_functions, 1.0)),
        "eta": (noisy, ss.VP()),
    }
    before = {name: written(*case, GRID) for name, case in cases.items()}
    rate.fill_(2.0)
    level[0] = 0.25
    for name, (solver, sde) in cases.items():
        after = written(solver, sde, GRID)
        assert after == solver.plan(sde, GRID) and after != before[name], name
    assert memo._write.cache_info().currsize == 0


def test_a_grid_maker_of_the_user_is_called_each_time() -> None:
    ends = [0.5]

    def maker(sde: ss.SDE, steps: int, **window: float) -> Tensor:
        return torch.tensor([0.99, ends[0], 0.0], dtype=F64)

    plans = []
    for ends[0] in (0.5, 0.4):
        plans.append(ss.sampling.plan_for(mixture(), steps=2, grid=maker))
    assert [plan.times[1] for plan in plans] == [0.5, 0.4]


def test_a_grid_that_the_caller_changes_is_not_the_stored_one() -> None:
    first = made(ss.grids.karras, ss.VP(), 5)
    want = first.clone()
    first.zero_()
    assert torch.equal(made(ss.grids.karras, ss.VP(), 5), want)


def test_tables_that_need_gradients_are_written_anew() -> None:
    times = GRID[:-1].clone().requires_grad_()
    for _ in range(2):
        weight = written(ss.DDIM(), ss.VP(), times).rows[2].x[0][1]
        assert isinstance(weight, Tensor)
        (slope,) = torch.autograd.grad(weight, times)
        assert float(slope.abs().sum()) > 0
    a, b = (written(ss.DDIM(), ss.VP(), GRID[:, None].expand(-1, 3).clone()) for _ in range(2))
    assert a is not b, "one grid for each sample"
    assert memo._write.cache_info().currsize == 0


def test_memory_is_bounded() -> None:
    for k in range(3 * STORED):
        written(ss.DDIM(), ss.VP(), made(ss.grids.uniform_t, ss.VP(), 2, (("t_end", k / 1000),)))
    assert memo._write.cache_info().currsize == memo._make.cache_info().currsize == STORED
    long = [written(ss.DDIM(), ss.VP(), made(ss.grids.uniform_t, ss.VP(), LONGEST)) for _ in range(2)]
    assert long[0] is not long[1]


def test_nothing_of_the_caller_stays_alive() -> None:
    def make() -> list[weakref.ref[Any]]:
        model = mixture(Scaled(torch.tensor(3.0)))
        eta = lambda t: 0.5  # noqa: E731
        maker = lambda sde, steps, **window: GRID  # noqa: E731
        solver = ss.SDEDPMSolverPP(order=2, eta=eta)
        plan = ss.UniPC(2).plan(ss.VP(), ss.grids.karras(ss.VP(), 4))
        ss.sample(model, (2, 1), solver, steps=4, grid=maker, seed=0)
        ss.sample(mixture(ss.VP()), (2, 1), plan, seed=0)
        return [weakref.ref(thing) for thing in (model, model.sde, eta, maker, solver, plan)]

    alive = make()
    gc.collect()
    assert [ref() for ref in alive] == [None] * len(alive)


def test_every_call_warns_of_too_few_steps() -> None:
    plan = ss.EDMHeun().plan(ss.VP(), ss.grids.karras(ss.VP(), 3))
    for sde, std in ((ss.VP(), 1.0), (ss.VP(), 1.0), (ss.VP(beta_max=19.0), 1.0), (ss.VP(), 0.5), (ss.VP(), 1.0)):
        assert few_steps.verdict(plan, sde, std) == few_steps._known(plan, sde, std)
    for sde in (ss.VP(), ss.VP(), ss.VP()):
        with pytest.warns(UserWarning, match="is inaccurate with so few steps"):
            warn_of_few_steps(plan, sde)
    good = ss.DDIM().plan(ss.VP(), ss.grids.uniform_lam(ss.VP(), 30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan in (good, good):
            warn_of_few_steps(plan, ss.VP())


UNKNOWN: dict[str, object] = {
    "tensor": torch.zeros(2),
    "list": [1.0],
    "function of the user": lambda t: t,
    "method": "abc".upper,
    "process of the user": Scaled(torch.tensor(1.0)),
    "partial of a function of the user": partial(lambda a, b: a, 1.0),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_thing_that_may_change_has_no_value(name: str) -> None:
    for thing in (UNKNOWN[name], (1.0, UNKNOWN[name]), partial(ss.grids.karras, rho=UNKNOWN[name])):
        with pytest.raises(Unknown):
            value_of(thing)


def test_equal_numbers_of_different_types_are_different_values() -> None:
    things = [1, 1.0, True, "1", None, (1,), (1.0,), (True,), ((1.0,),), ()]
    values = [value_of(thing) for thing in things]
    assert len(set(values)) == len(things)


def test_a_function_that_was_executed_from_a_text_has_no_module_and_no_value() -> None:
    space: dict[str, Any] = {}
    exec("def square(x): return x * x", space)
    assert space["square"].__module__ is None
    with pytest.raises(Unknown):
        value_of(space["square"])
