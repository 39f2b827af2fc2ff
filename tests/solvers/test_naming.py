"""Names of solvers: different options print differently, equal ones alike, as the call that makes the solver."""

from __future__ import annotations

import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.solvers import (
    DATA,
    LAM,
    LOG1P_RHO,
    NOISE,
    RHO,
    TAU,
    VELOCITY,
    EtaWithin,
    Leg,
    Prediction,
    Solver,
    Tape,
    V,
    deterministic,
)
from scoresde.solvers import edm_prediction as edm
from scoresde.solvers import stochastic as stochastic_module
from scoresde.solvers.naming import show

TABLES = ((-1.0, 0.0, 1.0), (0.9, 0.5, 0.1), (-0.5, -0.3, -0.2))
LONG = tuple(float(k) for k in range(20))


def half(t: Any) -> Any:
    return 0.5 + 0.0 * t


def wave(t: Any) -> Any:
    return 0.9 + 0.1 * t


def line(a: float) -> Callable[[Any], Any]:
    def eta(t: Any) -> Any:
        return a + 0.1 * t

    return eta


def square(rho: Tensor) -> Tensor:
    return rho**2


class Slope:
    """A function with a state."""

    def __init__(self, a: float) -> None:
        self.a = a

    def __call__(self, t: Any) -> Any:
        return self.a * t


ETAS: list[Any] = [0.0, 0.5, 0.5000001, 1.0, half, wave, line(0.5), line(0.6), lambda t: 0.5, lambda t: 0.6, Slope(1.0)]
ETAS += [Slope(2.0), partial(pow, 0.5), partial(pow, 0.7), EtaWithin(), EtaWithin(0.5), EtaWithin(high=5.0)]
TABLEAUX = [ss.solvers.HEUN, ss.solvers.RK4, ss.solvers.Tableau(((0.4,),), (-0.25, 1.25), 2)]
STATISTICS = [
    ss.solvers.Statistics(*TABLES),
    ss.solvers.Statistics(*TABLES, b=(0.1, 0.1, 0.2)),
    ss.solvers.Statistics(LONG, LONG, LONG),
    ss.solvers.Statistics(LONG, LONG, tuple(v + 1 for v in LONG)),
]
ENTRIES = [ss.solvers.EntryStatistics(torch.arange(3.0), *torch.full((3, 3, 2), v)) for v in (0.1, 0.2)]
ORDERS, STARTS, CLOCKS = [1, 2, 3], ["ramp", "self"], ["t", "lam"]
PREDICTIONS = [DATA, NOISE]

# Function → options → values. Every value makes another solver than every other combination of values.
CATALOGUE: dict[str, dict[str, list[Any]]] = {
    "DDIM": {"eta": ETAS},
    "Euler": {"clock": CLOCKS},
    "Heun": {"clock": CLOCKS},
    "Midpoint": {"clock": CLOCKS},
    "RungeKutta4": {"clock": CLOCKS},
    "EDMHeun": {"alpha": [1.0, 0.5, 2 / 3, 0.6666667]},
    "DPM2": {},
    "DEISRungeKutta": {"tableau": TABLEAUX},
    "DPMSolver": {"order": [2, 3], "kind": ["single", "multi"], "form": ["mid", "exact"]},
    "DPMSolverPP": {"order": [2, 3], "kind": ["multi"], "form": ["mid", "exact"], "start": STARTS},
    "UniPC": {
        "order": ORDERS,
        "form": ["bh2", "bh1", "exact"],
        "prediction": PREDICTIONS,
        "corrector": [True, False],
        "start": STARTS,
    },
    "with_corrector": {
        "solver": [ss.DPMSolverPP(2), ss.VelocityAB(3)],
        "order": [2, 5],
        "reevaluate": [False, True],
    },
    "DEIS": {"order": ORDERS, "variable": ["t", "rho", "lam"], "start": STARTS},
    "LMS": {"order": ORDERS},
    "RES": {"order": [3], "c2": [0.5, 0.4], "c3": [1.0, 0.8]},
    "ETDRK4": {},
    "VelocityAB": {"order": ORDERS, "start": STARTS, "variable": ["tau", "lam"]},
    "Universal": {"data_std": [None, 0.7], "predicts": [None, "noise"], "start": ["prior", "gaussian"]},
    "AnchoredResidual": {"std": [0.5, 0.6], "nodes": [3, 4], "power": [2.5, 2.0]},
    "EntryMultistep": {"statistics": ENTRIES, "nodes": [2, 3], "corrector": [0, 3]},
    "DPMSolverV3": {"statistics": STATISTICS, "order": ORDERS, "corrector": [True, False], "start": STARTS},
    "PLMS": {},
    "IPNDM": {"order": [1, 2, 3, 4]},
    "AcceleratedDDIM": {"gamma": [2.0, 1.5]},
    "DDPM": {"variance": ["small", "large"]},
    "EulerAncestral": {"eta": ETAS, "s_noise": [1.0, 1.01]},
    "DPM2Ancestral": {"eta": ETAS, "s_noise": [1.0, 1.01]},
    "DPMPP2SAncestral": {"eta": ETAS, "s_noise": [1.0, 1.01]},
    "DPMPPSDE": {"eta": ETAS, "r": [0.5, 0.3], "s_noise": [1.0, 1.01], "one_path": [True, False]},
    "EDMStochastic": {
        "s_churn": [0.0, 40.0],
        "s_tmin": [0.0, 0.05],
        "s_tmax": [50.0, math.inf],
        "s_noise": [1.0, 1.003],
        "solver": [None, ss.DDIM()],
    },
    "ConsistencySampling": {},
    "EulerMaruyama": {"eta": ETAS, "clock": CLOCKS},
    "StochasticHeun": {"eta": ETAS, "clock": CLOCKS},
    "ReverseDiffusion": {},
    "SDEDPMSolver": {"order": ORDERS, "form": ["mid", "exact"], "eta": ETAS, "start": STARTS},
    "SDEDPMSolverPP": {"order": ORDERS, "form": ["mid", "exact"], "eta": ETAS, "start": STARTS},
    "SASolver": {
        "predictor": ORDERS,
        "corrector": [0, 2, 4],
        "tau": ETAS,
        "prediction": PREDICTIONS,
        "pece": [False, True],
        "form": ["exact", "end"],
    },
    "SEEDS": {"order": [3], "prediction": PREDICTIONS, "form": ["mid", "exact"], "r": [(), (0.2, 0.4)], "eta": ETAS},
    "ERSDE": {"order": ORDERS, "phi": [stochastic_module.er_sde_scale, square, lambda rho: rho**2, lambda rho: rho**3]},
    "FlowSDE": {"noise_level": [0.0, 0.7, 1.0]},
    "CPS": {"noise_level": [0.0, 0.5, 1.0]},
    "ReverseEuler": {"diffusion": [half, wave, line(0.5), line(0.6), Slope(1.0), Slope(2.0)]},
    # Classes.
    "Multistep": {
        "nodes": ORDERS,
        "prediction": [DATA, NOISE, VELOCITY, V, edm(0.5), edm(0.5 + 1e-9), *(s.prediction() for s in STATISTICS)],
        "variable": [LAM, RHO, TAU, LOG1P_RHO],
        "corrector": [0, 3],
        "reevaluate": [False, True],
        "moments": [None, ("exact", "mid"), ("exact", 0.5)],
    },
    "SingleStep": {"stages": [3], "r": [(), (0.2, 0.4)], "reads": [(), (0, 1, 2)], "eta": ETAS},
    "RungeKutta": {"tableau": TABLEAUX, "prediction": [NOISE, VELOCITY, None], "clock": CLOCKS},
    "ExponentialRungeKutta": {"tableau": [ss.solvers.KROGSTAD4, ss.solvers.RES(3).tableau]},
    "NoiseCombination": {
        "coefficients": [((1.0,),), ((1.0,), (1.5, -0.5))],
        "order": [1, 2],
        "improved": [False, True],
    },
    "PNDM": {},
    "AnnealedLangevin": {"n": [1, 5], "r": [0.2, 0.21]},
    "Posterior": {"eta": [1.0, 0.5, half], "s_noise": [1.0, 1.01]},
    "Ancestral": {"solver": [ss.DDIM(), ss.DPMSolverPP(2), ss.UniPC(3)], "eta": ETAS, "s_noise": [1.0, 1.01]},
    "Churn": {"solver": [ss.DDIM(), ss.UniPC(3)], "s_churn": [0.0, 8.0], "s_tmin": [0.0, 0.1], "steps": [None, 9]},
    "Restart": {"solver": [ss.DDIM(), ss.UniPC(3)], "low": [0.1, 0.2], "high": [0.5, 0.6], "repeats": [1, 2]},
    "Mixed": {"orders": [(3, 1), (3, 2)], "prediction": PREDICTIONS},
    "PublishedThree": {"nodes": [3], "prediction": PREDICTIONS, "eta": ETAS},
    "TwoStage": {"eta": ETAS, "r": [0.5, 0.3]},
    "ReverseSDE": {"eta": ETAS, "clock": CLOCKS, "heun": [False, True]},
    "ExtendedReverse": {"nodes": [3], "phi": [square, lambda rho: rho], "published": [False, True]},
    "GivenDiffusion": {"diffusion": [None, half, wave, Slope(2.0)]},
    "Preserving": {"noise_level": [0.0, 0.5, 1.0]},
    "SongPredictor": {},
    "Consistency": {},
}


def solvers_of(name: str) -> list[Solver]:
    options = CATALOGUE[name]
    make = getattr(ss.solvers, name)
    return [make(**dict(zip(options, values, strict=True))) for values in itertools.product(*options.values())]


def test_the_whole_catalogue_is_here() -> None:
    for name in ss.solvers.__all__:
        value = getattr(ss.solvers, name)
        solver = inspect.isclass(value) and issubclass(value, Solver) and value is not Solver
        published = inspect.isfunction(value) and inspect.signature(value).return_annotation == "Solver"
        assert (name in CATALOGUE) == (solver or published), name
    for module in (deterministic, stochastic_module):
        for name, fn in inspect.getmembers(module, inspect.isfunction):
            if inspect.signature(fn).return_annotation == "Solver" and not name.startswith("_"):
                assert name in CATALOGUE, name


@pytest.mark.parametrize("name", CATALOGUE)
def test_different_options_print_differently_and_equal_ones_alike(name: str) -> None:
    first, again = solvers_of(name), solvers_of(name)
    assert [repr(s) for s in first] == [repr(s) for s in again]
    texts = [repr(s) for s in first]
    assert len(set(texts)) == len(texts)
    assert not [text for text in texts if re.search(r"0x[0-9a-f]{6}|<function|object at|\n", text)]


def test_no_two_functions_print_one_text() -> None:
    texts = [repr(s) for name in CATALOGUE for s in solvers_of(name)[:3]]
    assert len(set(texts)) == len(texts) - 4, "Euler and Heun in t and λ are their stochastic versions with η = 0"


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_text_is_the_call(name: str) -> None:
    names = {**vars(ss.solvers), "inf": math.inf, "replace": replace, "half": half, "wave": wave, "square": square}
    for solver in solvers_of(name):
        text = repr(solver)
        if "<" not in text and "Slope" not in text and "functools" not in text:
            assert repr(eval(text, dict(names))) == text
            assert eval(text, dict(names)) == solver, text


TEXTS: dict[str, Callable[[], Solver]] = {
    "DDIM()": lambda: ss.DDIM(),
    "DDIM(eta=0.5)": lambda: ss.DDIM(0.5),
    "DDIM(eta=half)": lambda: ss.DDIM(half),
    "DDIM(eta=1)": lambda: ss.DDIM(1),
    "UniPC(order=3)": lambda: ss.UniPC(),
    "UniPC(order=2, form='bh1')": lambda: ss.UniPC(2, "bh1"),
    "UniPC(order=2, prediction=NOISE, corrector=False)": lambda: ss.UniPC(2, "bh2", NOISE, False),
    "DPMSolverPP(order=2)": lambda: ss.DPMSolverPP(2),
    "DPMSolverPP(order=3, form='exact', start='self')": lambda: ss.DPMSolverPP(3, form="exact", start="self"),
    "with_corrector(solver=VelocityAB(order=2))": lambda: ss.solvers.with_corrector(ss.VelocityAB(2)),
    "replace(PLMS(), improved=True)": lambda: replace(ss.solvers.PLMS(), improved=True),
    "replace(DPMSolver(order=3, kind='fast'), orders=(3, 2, 1))": lambda: ss.solvers.DPMSolver(kind="fast").for_nfe(6)[
        0
    ],
    "Multistep(nodes=3, prediction=V, variable=TIME)": lambda: ss.solvers.Multistep(3, V, ss.solvers.TIME),
    "Multistep(prediction=edm_prediction(0.5))": lambda: ss.solvers.Multistep(2, edm(0.5)),
    "DEISRungeKutta(tableau=RK4)": lambda: ss.solvers.DEISRungeKutta(ss.solvers.RK4),
    "Ancestral(solver=DPMSolverPP(order=2), eta=0.5)": lambda: ss.solvers.Ancestral(ss.DPMSolverPP(2), 0.5),
    "SDEDPMSolverPP(order=2, eta=0.5)": lambda: ss.SDEDPMSolverPP(2, eta=0.5),
    "Euler(clock='lam')": lambda: ss.EulerMaruyama(0.0, "lam"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_what_solvers_print(text: str) -> None:
    assert repr(TEXTS[text]()) == text


def test_a_plan_has_the_name_of_its_solver() -> None:
    grid = ss.grids.karras(ss.VP(), 4)
    for solver in (
        ss.UniPC(2, "bh1"),
        ss.solvers.EDMStochastic(),
        ss.solvers.EDMStochastic(0.0),
        ss.solvers.DPM2Ancestral(0.0),
        ss.solvers.Restart(ss.DDIM(), 0.1, 0.5),
    ):
        assert solver.plan(ss.VP(), grid).name == repr(solver)


def test_a_solver_that_is_changed_does_not_print_as_the_call_that_made_it() -> None:
    changed = replace(ss.UniPC(2), corrector=0)
    assert repr(changed) == "replace(UniPC(order=2), corrector=0)"
    assert repr(replace(changed, corrector=3)) == "UniPC(order=2)"
    corrected = ss.solvers.with_corrector(ss.UniPC(2, corrector=False), 4)
    assert repr(corrected) == "with_corrector(solver=UniPC(order=2, corrector=False), order=4)"


def test_a_solver_of_ones_own_prints_its_fields() -> None:
    @dataclass(frozen=True)
    class Mine(Solver):
        order = 1
        width: float = 0.5

        def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
            new = tape.move(leg.row, leg.t, leg.history[:1], evaluates=leg.evaluates, node=leg.node)
            return new, [new]

    assert repr(Mine(0.25)).endswith("Mine(width=0.25)")
    assert Mine(0.25).plan(ss.VP(), [1.0, 0.5]).name == repr(Mine(0.25))
    assert Mine(0.25) == Mine(0.25) != Mine(0.5)
    with pytest.raises(TypeError, match="Orderless must define `order`, its order of convergence"):

        class Orderless(Solver):
            pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (1, "1"),
        (True, "True"),
        (0.1, "0.1"),
        (1e300, "1e+300"),
        (math.inf, "inf"),
        ("self", "'self'"),
        (None, "None"),
        ((0.5,), "(0.5,)"),
        ([1.0, 2.5], "(1, 2.5)"),
        (torch.tensor([1.0, 2.5]), "(1, 2.5)"),
        (half, "half"),
        (Slope(2.0), "Slope(a=2)"),
    ],
)
def test_texts_of_options(value: object, text: str) -> None:
    assert show(value) == text


def test_long_tables_print_as_a_digest() -> None:
    a, b = show(LONG), show((*LONG[:-1], 19.5))
    assert re.fullmatch(r"<20 values [0-9a-f]{8}>", a) and re.fullmatch(r"<20 values [0-9a-f]{8}>", b) and a != b


def test_predictions_print_as_constants() -> None:
    assert [repr(p) for p in (DATA, NOISE, VELOCITY, V)] == ["DATA", "NOISE", "VELOCITY", "V"]
    assert repr(replace(DATA, name="F(2)")) == "F(2)" and isinstance(DATA, Prediction)
