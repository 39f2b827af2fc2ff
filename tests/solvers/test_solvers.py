"""Solvers: each is the published update to rounding, of the order it declares, finite at both ends.

The solvers are those of ``experiments/orders.py``, written as a user writes them; a new solver is a new line there.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import published as pub
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import point_mass_defect
from scoresde.analysis.orders import Order, convergence_order, exact_flow, weak_order
from scoresde.analysis.orders import uneven_lam as uneven
from scoresde.plan.run import run
from scoresde.plan.run import steps as run_steps
from scoresde.plan.table import Plan
from scoresde.solvers import deterministic
from scoresde.solvers.interpolants import DATA, NOISE, VELOCITY
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.pndm import PNDM, NoiseCombination
from scoresde.solvers.quadrature import weights
from scoresde.solvers.rule import Solver
from scoresde.solvers.runge_kutta import Tableau

F64 = {"dtype": torch.float64}


def _experiment(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "experiments" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", path)
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


orders = _experiment("orders")
rule: Callable[[str], Solver] = orders.rule
RULES: list[str] = orders.catalogue()
FIVE: dict[str, ss.SDE] = orders.PROCESSES
EACH_RULE = pytest.mark.parametrize("text", RULES)


def test_every_solver_of_the_catalogue_is_in_the_list() -> None:
    written = " ".join([*RULES, "DPMSolverPP(kind='fast')"])
    for name, fn in inspect.getmembers(deterministic, inspect.isfunction):
        if inspect.signature(fn).return_annotation == "Solver" and not name.startswith("_"):
            assert f"{name}(" in written, f"add {name} to `catalogue` in experiments/orders.py"


# ---------------------------------------------------------------------------------------------------------------------
# 1. Agreement with the published updates, re-typed in published.py
# ---------------------------------------------------------------------------------------------------------------------

UNDER: dict[str, ss.SDE] = {"VP": ss.VP(), "Flow": ss.Flow(T=0.99), "EDM": ss.EDM(), "VE": ss.VE()}
# α and σ once more, for the oracles alone.
BY_HAND: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "VP": (lambda t: math.exp(-0.05 * t - 4.975 * t**2), lambda t: math.sqrt(-math.expm1(-0.1 * t - 9.95 * t**2))),
    "Flow": (lambda t: 1 - t, lambda t: t),
    "EDM": (lambda t: 1.0, lambda t: t),
    "VE": (lambda t: 1.0, lambda t: 0.01 * math.sqrt(math.expm1(2 * t * math.log(5000.0)))),
}


def three(sde: ss.SDE) -> ss.GaussianMixture:
    """Three Gaussians in the plane."""
    means = [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]]
    return ss.GaussianMixture(sde, means, std=[0.5, 0.4, 0.6], weights=[1.0, 2.0, 1.5])


def graded(sde: ss.SDE, legs: int, end: str = "lam") -> Tensor:
    """Uneven in λ from T to λ = 2, and then to σ = 0 if `end` is "zero"."""
    u = torch.linspace(0, 1, legs + 1, dtype=torch.float64)
    u = u + 0.3 * u * (1 - u) + 0.05 * (7 * u).sin() * u * (1 - u)
    first = sde.lam(sde.T)
    times = sde.t_of_lam(first + (2.0 - first) * u)
    times[0] = sde.T
    return torch.cat([times, times.new_zeros(1)]) if end == "zero" else times


@cache
def problem(name: str, end: str) -> tuple[ss.GaussianMixture, Tensor, Tensor]:
    """Model, start and grid."""
    model = three(UNDER[name])
    x = model.sde.sigma(model.sde.T) * ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)
    return model, x, graded(model.sde, 6, end)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def both(solver: Solver, oracle: Any, name: str, end: str, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    model, x, grid = problem(name, end)
    ours = run(solver.plan(model.sde, grid), model.x0, x)
    return ours, oracle(model.x0, x, grid, *BY_HAND[name], **options)


FORMS = {"mid": "dpmsolver", "exact": "taylor"}
VAN_DER_HOUWEN = Tableau(((8 / 15,), (1 / 4, 5 / 12)), (1 / 4, 0, 3 / 4), 3, "van der Houwen")
Pair = tuple[Solver, Any, dict[str, Any]]


def pairs() -> list[Pair]:
    """(rule, published update, its options), for grids that end at λ = 2 and at σ = 0."""
    out: list[Pair] = [(ss.DDIM(), oracle, {}) for oracle in (pub.ddim, pub.dpm_solver_1, pub.dpmpp_1)]
    for form, kind in FORMS.items():
        for r in (0.5, 0.3, 0.7):
            o = {"r1": r, "solver_type": kind}
            out.append((ss.solvers.DPMSolver(2, form=form, r=(r,)), pub.dpm_solver_2, o))
            out.append((ss.DPMSolverPP(2, kind="single", form=form, r=(r,)), pub.dpmpp_2s, o))
        for r1, r2 in ((1 / 3, 2 / 3), (0.4, 0.8), (0.25, 2 / 3)):
            o = {"r1": r1, "r2": r2, "solver_type": kind}
            out.append((ss.solvers.DPMSolver(3, form=form, r=(r1, r2)), pub.dpm_solver_3, o))
            out.append((ss.DPMSolverPP(3, kind="single", form=form, r=(r1, r2)), pub.dpmpp_3s, o))
        o = {"solver_type": kind}
        out.append((ss.solvers.DPMSolver(2, kind="multi", form=form), pub.dpm_solver_2m, o))
        out.append((ss.DPMSolverPP(2, form=form), pub.dpmpp_2m, o))
        out.append((ss.solvers.DPMSolver(3, kind="multi", form=form), pub.dpm_solver_3m, {**o, "second_derivative": 2}))
        out.append((ss.DPMSolverPP(3, form=form), pub.dpmpp_3m, {**o, "second_derivative": 2}))
    out.append((ss.solvers.DPMSolver(3, kind="multi", form="published"), pub.dpm_solver_3m, {}))
    out.append((ss.DPMSolverPP(3, form="published"), pub.dpmpp_3m, {}))
    for p in (1, 2, 3, 4):
        for variant, published in (("bh1", "bh1"), ("bh2", "bh2"), ("exact", "vary_coeff")):
            for prediction in (DATA, NOISE):
                for corrector in (True, False):
                    o = {"order": p, "variant": published, "prediction": prediction.name, "corrector": corrector}
                    out.append((ss.UniPC(p, variant, prediction, corrector), pub.unipc, {**o, **FULL_END}))
        out.append((ss.solvers.LMS(p), pub.lms, {"order": p}))
        out.append((ss.solvers.DEIS(p, "rho"), pub.deis_rhoab, {"degree": p - 1}))
        out.append((ss.solvers.DEIS(p, "t"), pub.deis_tab, {"degree": p - 1}))
        out.append((ss.solvers.DEIS(p, "lam"), pub.deis_lamab, {"order": p}))
        out.append((ss.solvers.IPNDM(p), pub.ipndm, {"order": p}))
    out += [(ss.EDMHeun(step), pub.edm_heun, {"step": step}) for step in (1.0, 0.5, 2 / 3, 0.8)]
    out.append((ss.solvers.DPM2(), pub.dpm_2, {}))
    tableaux = [rule(f"RungeKutta({name})").tableau for name in ("EULER", "HEUN", "KUTTA3", "RALSTON3", "HEUN3")]
    tableaux += [VAN_DER_HOUWEN, rule("RungeKutta(SSP3)").tableau, rule("RungeKutta(RK4)").tableau]
    for tableau, name in zip(tableaux, pub.RHO_RK, strict=True):
        out.append((ss.solvers.DEISRungeKutta(tableau), pub.deis_rhork, {"method": name}))
    out.append((ss.solvers.PNDM(), pub.pndm, {}))
    out.append((replace(ss.solvers.PLMS(), improved=True), pub.plms, {}))
    out += [(ss.solvers.AcceleratedDDIM(gam), pub.gradient_estimation, {"gam": gam}) for gam in (1.0, 1.5, 2.0)]
    out += [(ss.solvers.RES(2, c2=c2), pub.res_2s, {"c2": c2}) for c2 in (0.5, 0.3)]
    out += [(ss.solvers.RES(3, c2, c3), pub.res_3s, {"c2": c2, "c3": c3}) for c2, c3 in ((0.5, 1.0), (0.4, 0.8))]
    out.append((ss.solvers.ETDRK4(), pub.etd_rk4, {"kind": "krogstad"}))
    return out


FULL_END = {"lower_order_final": False}  # ours lowers the order into σ = 0 alone


def label(pair: Pair) -> str:
    return f"{pair[0]!r}-{pair[1].__name__}-" + "-".join(str(v) for v in pair[2].values())


def differs_at_zero(pair: Pair) -> bool:
    """The two kinds of last leg that are ours on purpose; each has its own test below."""
    corrected_noise = pair[1] is pub.unipc and pair[2]["prediction"] == "noise" and pair[2]["corrector"]
    return corrected_noise or (pair[1] is pub.deis_tab and pair[2]["degree"] > 0)


@pytest.mark.parametrize("pair", pairs(), ids=label)
def test_a_rule_is_the_published_update(pair: Pair) -> None:
    # 1e-12 is some hundred roundings; the largest measured is 2e-14.
    for name in UNDER:
        for end in ("lam",) if differs_at_zero(pair) else ("lam", "zero"):
            ours, theirs = both(pair[0], pair[1], name, end, pair[2])
            assert relative(ours, theirs) < 1e-12, (name, end)


@pytest.mark.parametrize("nfe", range(1, 11))
@pytest.mark.parametrize(
    "solver", [ss.solvers.DPMSolver(kind="fast"), ss.DPMSolverPP(kind="fast")], ids=["noise", "data"]
)
def test_fast_is_the_published_mixture_and_spends_the_budget(solver: Solver, nfe: int) -> None:
    prediction = "noise" if solver.prediction is NOISE else "data"
    for name, sde in UNDER.items():
        mixture, legs = solver.for_nfe(nfe, clean=False)
        model, grid = three(sde), graded(sde, legs)
        plan = mixture.plan(sde, grid)
        x = sde.sigma(sde.T) * ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)
        theirs = pub.dpm_solver_fast(model.x0, x, grid, *BY_HAND[name], steps=nfe, prediction=prediction)
        assert plan.nfe == nfe
        # Few legs are up to 6 long in λ, and noise prediction multiplies roundings by e⁶.
        assert relative(run(plan, model.x0, x), theirs) < 1e-11, name


@pytest.mark.parametrize("variant", ["bh1", "bh2", "exact"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_noise_unipc_into_data_returns_the_denoised_prediction(order: int, variant: str) -> None:
    """The network is evaluated at the predicted state x_p, never at the corrected x_c. The published last step removes
    the noise of x_p from x_c, which adds (x_c − x_p)/α to D(x_p): a state that no denoiser returned.
    """
    published = "vary_coeff" if variant == "exact" else variant
    for name in UNDER:
        model, x, grid = problem(name, "zero")
        inputs: list[Tensor] = []

        def record(x: Tensor, t: float, model: ss.GaussianMixture = model, inputs: list[Tensor] = inputs) -> Tensor:
            inputs.append(x)
            return model.x0(x, t)

        ours = run(ss.UniPC(order, variant, NOISE).plan(model.sde, grid), record, x)
        options = {"order": order, "variant": published, "prediction": "noise", **FULL_END}
        theirs = pub.unipc(model.x0, x, grid, *BY_HAND[name], trajectory=True, **options)
        s = float(grid[-2])
        gap = (theirs[-2] - inputs[-1]) / model.sde.alpha(s)
        assert relative(ours, model.x0(inputs[-1], s)) < 1e-12, name
        assert relative(theirs[-1] - ours, gap) < 1e-9, name  # a difference of near numbers
        assert float(gap.abs().max()) > 1e-5, "else the test shows nothing"


@pytest.mark.parametrize("order", [2, 3, 4])
def test_deis_in_t_integrates_the_last_leg_exactly(order: int) -> None:
    """Under VP and VE, ρ has a root at t = 0, which spoils a quadrature in t, the oracle's by 1e-7. Ours is in ρ."""
    for name, sde in UNDER.items():
        grid = graded(sde, 6, "zero")
        nodes = grid[:-1].flip(0)[:order].tolist()
        row = ss.solvers.DEIS(order, "t").plan(sde, grid).rows[-1]
        for j, (k, w) in enumerate(row.d):

            def basis(rho: float, j: int = j, sde: ss.SDE = sde, nodes: list[float] = nodes) -> float:
                t = sde.t_of_lam(-math.log(rho)) if rho > 0 else 0.0
                return math.prod((t - s) / (nodes[j] - s) for s in nodes if s != nodes[j])

            weight, _ = quad(basis, sde.sigma(nodes[0]) / sde.alpha(nodes[0]), 0.0, epsabs=0, epsrel=1e-12)
            assert float(grid[k]) == nodes[j]
            assert math.isclose(w, -weight * sde.alpha(nodes[j]) / sde.sigma(nodes[j]), rel_tol=1e-11), sde
        # Everything before that leg is the published rule.
        model, x = three(sde), sde.sigma(sde.T) * ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)
        before = [s.x for s in run_steps(ss.solvers.DEIS(order, "t").plan(sde, grid), model.x0, x)][-2]
        theirs = pub.deis_tab(model.x0, x, grid, *BY_HAND[name], degree=order - 1, trajectory=True)[-2]
        assert relative(before, theirs) < 1e-12, name


# Linear in λ over all of the grid, so that the tables of ours say what the functions of the oracle say.
LINES = {"l": (0.6, -0.05), "s": (-0.5, 0.03), "b": (0.2, 0.02)}


def of_lines(*names: str) -> tuple[ss.solvers.Statistics, dict[str, Callable[[Any], Any]]]:
    knots = torch.linspace(-8, 8, 65, dtype=torch.float64).tolist()
    zero = (0.0, 0.0)
    lines = {name: LINES[name] if name in names else zero for name in LINES}
    table = {name: tuple(a + b * u for u in knots) for name, (a, b) in lines.items()}
    functions = {name: lambda u, a=a, b=b: a + b * u for name, (a, b) in lines.items()}
    return ss.solvers.Statistics(tuple(knots), **table), functions


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("name", UNDER)
def test_dpm_solver_v3_is_the_published_update(name: str, order: int) -> None:
    statistics, functions = of_lines("l", "s")
    ours, theirs = both(
        ss.solvers.DPMSolverV3(statistics, order, corrector=False),
        pub.dpm_solver_v3,
        name,
        "lam",
        {"order": order, **functions},
    )
    assert relative(ours, theirs) < 1e-12
    if order == 1:  # a corrector through both ends, which on more nodes takes divided differences for derivatives
        options = {"order": 1, "corrector": True, "c_pseudo": True, **functions}
        ours, theirs = both(ss.solvers.DPMSolverV3(statistics, 1), pub.dpm_solver_v3, name, "lam", options)
        assert relative(ours, theirs) < 1e-12
    statistics, functions = of_lines("l", "s", "b")
    solver = ss.solvers.DPMSolverV3(statistics, order, corrector=False)
    ours, theirs = both(solver, pub.dpm_solver_v3, name, "lam", {"order": order, **functions})
    assert relative(ours, theirs) < 1e-3, "our ∫ e^{−S} b is that of a table"


@pytest.mark.parametrize(("slope", "s", "prediction"), [(0.0, -1.0, NOISE), (1.0, 0.0, DATA)], ids=str)
def test_statistics_of_no_model_are_noise_and_data(slope: float, s: float, prediction: Any) -> None:
    statistics = ss.solvers.Statistics((-8.0, 8.0), (slope, slope), (s, s))
    for name in UNDER:
        model, x, grid = problem(name, "lam")
        for order in (1, 2, 3):
            ours = run(ss.solvers.DPMSolverV3(statistics, order).plan(model.sde, grid), model.x0, x)
            known = Multistep(order, prediction, corrector=order + 1)
            assert relative(ours, run(known.plan(model.sde, grid), model.x0, x)) < 1e-12, (name, order)


@pytest.mark.parametrize("name", UNDER)
def test_estimated_statistics_of_one_gaussian_are_its_own(name: str) -> None:
    """D is linear: l = σ²/(α²c² + σ²) = 1/(1 + c²e^{2λ}), and f = −l m, so that s = d log l/dλ and b = 0."""
    sde, width = UNDER[name], 0.8
    mean = torch.linspace(-2, 2, 16, **F64)
    model = ss.GaussianMixture(sde, mean[None], std=width)
    ends = {"t_start": sde.t_of_lam(-3.0), "t_end": sde.t_of_lam(2.0)}
    statistics = ss.fitting.estimate_statistics(model, model.sample(64, t=0.0, seed=0), n=7, **ends)
    lam = torch.tensor(statistics.lam, **F64)
    power = width**2 * (2 * lam).exp()
    assert torch.allclose(torch.tensor(statistics.l, **F64), 1 / (1 + power), rtol=1e-9)
    # df/dλ is by differences at both ends and between tabled l elsewhere; the ridge counts where f is small
    inner = slice(1, 4)
    assert torch.allclose(torch.tensor(statistics.s, **F64)[inner], (-2 * power / (1 + power))[inner], atol=0.1)
    assert max(map(abs, statistics.b)) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# 2. Order
# ---------------------------------------------------------------------------------------------------------------------


class Gaussian(ss.denoisers.AbstractDenoiser):
    """One Gaussian with independent entries, of widths that the window of the orders passes one by one."""

    mean = torch.tensor([0.4, -0.7, 0.2, 1.0, -0.3], **F64)
    variance = torch.tensor([0.3, 0.6, 1.0, 1.7, 3.0], **F64) ** 2
    event = (5,)

    def __init__(self, sde: ss.SDE) -> None:
        super().__init__(sde)

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return self.mean + gain * (x - alpha * self.mean)

    def flow(self, x: Tensor, s: float, t: float) -> Tensor:
        a, b = ((self.sde.alpha(u) ** 2 * self.variance + self.sde.sigma(u) ** 2).sqrt() for u in (s, t))
        return self.sde.alpha(t) * self.mean + b / a * (x - self.sde.alpha(s) * self.mean)


class Pairs(ss.denoisers.AbstractDenoiser):
    """Independent entries, each the mixture of N(±μ, s²): an exact mixture of 32 Gaussians that is cheap to ask."""

    mean = torch.tensor([1.0, 0.5, 1.5, 0.8, 0.3], **F64)
    variance = torch.tensor([0.6, 0.4, 0.8, 0.3, 1.0], **F64) ** 2
    event = (5,)

    def __init__(self, sde: ss.SDE) -> None:
        super().__init__(sde)

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        total = alpha**2 * self.variance + sigma**2
        lean = self.mean * torch.tanh(alpha * self.mean / total * x)
        return (alpha * self.variance * x + sigma**2 * lean) / total


def test_the_two_problems_are_exact() -> None:
    sde, t = ss.VP(), 0.3
    x = ss.Noise(0).normal((16, 5), 0, dtype=torch.float64)
    one = ss.GaussianMixture(sde, Gaussian.mean[None], std=Gaussian.variance[None].sqrt())
    torch.testing.assert_close(Gaussian(sde).x0(x, t), one.x0(x, t), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Gaussian(sde).flow(x, 1.0, t), one.flow(x, 1.0, t), rtol=1e-12, atol=1e-12)
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], **F64)] * 5)
    many = ss.GaussianMixture(sde, signs * Pairs.mean, std=Pairs.variance.sqrt().expand(32, 5))
    torch.testing.assert_close(Pairs(sde).x0(x, t), many.x0(x, t), rtol=1e-12, atol=1e-12)


@cache
def flow_of_pairs(name: str) -> Callable[[Tensor, float, float], Tensor]:
    reference: Callable[[Tensor, float, float], Tensor] = orders.once(exact_flow(Pairs(FIVE[name]), 1000))
    return reference


# With ρ (EDM's t) as variable, equal-step coefficients or half a third-order term the next term of the error is large,
# as at order 5: these need smaller steps. Their errors are still 1e-10 and more, rounding is below 1e-13.
LATE = ["DEIS(4, 't')", "DEIS(4, 'rho')", "LMS(4)", "IPNDM(3)", "IPNDM(4)", "PLMS()", "PNDM()"]
LATE += [text for text in RULES if "published" in text or "(5, " in text or "V3" in text]
# On a linear denoiser the middle of a leg in ρ, τ or (EDM, Flow) t gives one order more: dy/dρ = ρ y/(c + ρ²).
LINEAR = {"EDMHeun(alpha=0.5)": 3, "DEISRungeKutta(MIDPOINT)": 3}
LINEAR_IN_T = {("Midpoint(clock='t')", "EDM"): 3, ("Midpoint(clock='t')", "Flow"): 3}
# A corrector makes its own order of a predictor's, but one more at most.
CORRECTED = {
    "Multistep(2, DATA, corrector=5, start='self')": 3,
    "Multistep(2, NOISE, corrector=5, start='self', reevaluate=True)": 3,
    "Multistep(3, DATA, corrector=2, start='self')": 2,
    "Multistep(1, DATA, corrector=3, reevaluate=True)": 2,
    "with_corrector(DPMSolverPP(3, form='published', start='self'), 2)": 2,
}
KNOWS_TIME = [text for text in RULES if "'t'" in text or text == "PNDM()"]
KNOWS_ALPHA = [text for text in RULES if "clock='lam'" in text]  # the flow of x, which is not that of x/α
OTHERS = [(text, name) for text in KNOWS_TIME for name in FIVE if name != "VP"]
OTHERS += [(text, name) for text in KNOWS_ALPHA for name in ("VE", "EDM", "Flow")]  # Cosine has the α of VP at equal λ


def legs_for(text: str) -> tuple[int, int]:
    """Single steps have small errors early; rules with history need more legs for their starts to be forgotten."""
    return (160, 320) if text in LATE else (40, 80) if rule(text).stages > 1 else (80, 160)


def measured(text: str, model: Any, reference: Any) -> Order:
    order: Order = orders.measure(rule(text), model, reference, legs_for(text), 8)
    return order


@EACH_RULE
def test_the_order_on_an_exact_mixture_is_the_declared_one(text: str) -> None:
    order = measured(text, Pairs(FIVE["VP"]), flow_of_pairs("VP"))
    assert abs(order.slope - rule(text).order) < 0.2, order


@EACH_RULE
def test_the_order_on_one_gaussian_is_the_declared_one(text: str) -> None:
    model = Gaussian(FIVE["VP"])
    order = measured(text, model, model.flow)
    assert abs(order.slope - LINEAR.get(text, rule(text).order)) < 0.2, order


@pytest.mark.parametrize(("text", "known"), CORRECTED.items())
def test_the_order_of_any_corrector_on_any_predictor_is_the_declared_one(text: str, known: int) -> None:
    assert rule(text).order == known
    order = orders.measure(rule(text), Pairs(FIVE["VP"]), flow_of_pairs("VP"), (80, 160), 8)
    assert abs(order.slope - known) < 0.2, order


@pytest.mark.parametrize(("text", "name"), OTHERS)
def test_the_order_of_rules_that_know_more_than_lam_is_the_declared_one_on_every_process(text: str, name: str) -> None:
    """The other rules have the states of VP on every process, by the next test, and so its orders."""
    model = Gaussian(FIVE[name])
    order = measured(text, model, model.flow)
    assert abs(order.slope - LINEAR_IN_T.get((text, name), rule(text).order)) < 0.2, order


def at_equal_lam(sde: ss.SDE, end: str) -> Tensor:
    lam = torch.tensor([-3.8, -2.9, -2.2, -1.0, -0.6, 0.1, 1.2, 2.0], **F64)
    times = sde.t_of_lam(lam)
    return torch.cat([times, times.new_zeros(1)]) if end == "zero" else times


@pytest.mark.parametrize("text", [text for text in RULES if text not in KNOWS_TIME])
def test_a_rule_that_knows_lam_alone_has_the_same_states_over_alpha_on_every_process(text: str) -> None:
    solver = rule(text)
    names = ("VP", "Cosine") if text in KNOWS_ALPHA else tuple(FIVE)
    for end in ("lam", "zero"):
        states = {}
        for name, sde in ((name, FIVE[name]) for name in names):
            grid = at_equal_lam(sde, end)
            start = sde.alpha(float(grid[0])) * 50.0 * ss.Noise(0).normal((4, 5), 0, dtype=torch.float64)
            x = run(solver.plan(sde, grid), Pairs(sde).x0, start)
            states[name] = x / sde.alpha(float(grid[-1]))
        for name, y in states.items():
            assert relative(y, states["VP"]) < 1e-12, (name, end)


def test_the_docs_show_the_orders_of_every_rule() -> None:
    page = (Path(__file__).parents[2] / "docs" / "orders.md").read_text()
    rows = {}
    for line in page.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`†")] = (int(cells[1]), [float(c) for c in cells[2:7]], int(cells[7]))
    assert list(rows) == RULES, "run experiments/orders.py"
    for text, (declared, slopes, stages) in rows.items():
        assert (declared, stages) == (rule(text).order, rule(text).stages), text
        assert all(abs(slope - declared) < 0.2 for slope in slopes), text


@dataclass(frozen=True, repr=False)
class Fast(Solver):
    """The published mixture for any number of legs."""

    mixture: Solver
    tail: int

    order = 2

    def plan(self, sde: ss.SDE, times: Any, *, up: str = "diffuse") -> Plan:
        solver, legs = self.mixture.for_nfe(
            3 * (len(times) - 2 - (self.tail == 0)) + self.tail + 3 * (self.tail == 0), clean=False
        )
        assert legs == len(times) - 1
        return solver.plan(sde, times, up=up)


@pytest.mark.parametrize("name", ["DPMSolver", "DPMSolverPP"])
@pytest.mark.parametrize(("tail", "known"), [(0, 2), (1, 2), (2, 3)])
def test_the_last_step_of_fast_costs_it_its_third_order(name: str, tail: int, known: int) -> None:
    """nfe = 0 or 1 mod 3 ends with a leg of order 1, whose error is h²; nfe = 2 mod 3 with one of order 2."""
    model = Gaussian(FIVE["VP"])
    fast = rule(f"{name}(kind='fast')")
    order = measured_fast(Fast(fast, tail), model)
    assert abs(order.slope - known) < 0.2, order
    assert fast.for_nfe(9 + tail, clean=False)[0].order == known
    assert fast.order == 2, "of a budget that is not known yet"
    assert fast.for_nfe(9 + tail)[0].order == 2, "into σ = 0 the last steps have order 1"


def measured_fast(solver: Solver, model: Gaussian) -> Order:
    first, last = (model.sde.t_of_lam(lam) for lam in orders.WINDOW)
    return convergence_order(solver, model, steps=(80, 160), t_start=first, t_end=last, reference=model.flow, n=8)


@pytest.mark.parametrize(("form", "known"), [("exact", 3), ("published", 2)])
def test_er_sde_without_noise_has_the_weak_order_of_its_order(form: str, known: int) -> None:
    for scale in (1.0, 3.0):
        solver = ss.solvers.ERSDE(3, lambda rho, scale=scale: scale * rho, form)
        assert solver.weak_order == solver.order == known
    ends = {"t_start": ss.VP().t_of_lam(-1.0), "t_end": ss.VP().t_of_lam(1.0)}
    order = weak_order(orders.Started(solver, 2), ss.VP(), steps=(160, 320), **ends)
    assert abs(order.slope - known) < 0.2, order
    assert ss.solvers.ERSDE(3, lambda rho: rho**1.001, form).weak_order == 2


# ---------------------------------------------------------------------------------------------------------------------
# 3. Ends
# ---------------------------------------------------------------------------------------------------------------------

START = ss.Noise(1).normal((2, 5), 0, dtype=torch.float64)


class Recorder:
    """A denoiser that records the times and the results of its evaluations."""

    def __init__(self, model: ss.denoisers.AbstractDenoiser) -> None:
        self.model = model
        self.times: list[Any] = []
        self.results: list[Tensor] = []

    def __call__(self, x: Tensor, t: Any) -> Tensor:
        self.times.append(t)
        self.results.append(self.model.x0(x, t))
        return self.results[-1]


def extrapolates_into_data(solver: Solver) -> bool:
    """Whether the last leg reads several evaluations: noise by fixed coefficients, or in a variable finite at σ = 0."""
    if isinstance(solver, NoiseCombination):
        return len(solver.coefficients) > 1
    return isinstance(solver, PNDM) or (
        isinstance(solver, Multistep) and solver.nodes > 1 and not solver.variable.infinite
    )


@EACH_RULE
def test_the_last_step_into_data_returns_the_denoised_state(text: str) -> None:
    solver = rule(text)
    for sde in FIVE.values():
        plan = solver.plan(sde, ss.grids.karras(sde, 6))
        recorder = Recorder(Gaussian(sde))
        x = run(plan, recorder, sde.sigma(sde.T) * START)
        if extrapolates_into_data(solver):
            assert len(plan.rows[-1].d) > 1, sde
        else:
            assert relative(x, recorder.results[-1]) < 1e-12, sde


WITHOUT_SIGNAL = {
    "Trig": ss.Trig(),
    "no terminal SNR": ss.Discrete(ss.processes.zero_terminal_snr(ss.processes.betas("linear", 100))),
}


@EACH_RULE
def test_samples_are_finite_at_any_number_of_steps(text: str) -> None:
    solver = rule(text)
    for name, sde in {**FIVE, **WITHOUT_SIGNAL}.items():
        for n in (1, 2, 3, 4, 12, 50) if name == "VP" else (1, 3):
            x = run(solver.plan(sde, ss.grids.karras(sde, n)), Gaussian(sde).x0, sde.sigma(sde.T) * START)
            assert x.isfinite().all(), (name, n)


# On a point of data its noise and its velocity are constant along the flow; v, F, what statistics leave and the slope
# of x are not.
EXPONENTIAL = [text for text in RULES if getattr(rule(text), "prediction", DATA) in (DATA, NOISE, VELOCITY)]
ZIGZAG = [1.0, 0.72, 0.81, 0.5, 0.55, 0.31, 0.12, 0.2, 0.03]


@pytest.mark.parametrize("text", EXPONENTIAL)
def test_on_a_point_of_data_every_exponential_rule_is_exact(text: str) -> None:
    for name, sde in FIVE.items():
        grid = [sde.t_of_lam(2.0 - 5.0 * u) for u in ZIGZAG]
        down = [t for t, s in zip(grid, [math.inf, *grid], strict=False) if t < s]
        for times in (grid, down) if name == "VP" else (grid,):
            plan = rule(text).plan(sde, ss.grids.zigzag(times))
            assert point_mass_defect(plan, sde) < 1e-12, (name, len(times))


@EACH_RULE
def test_the_first_legs_do_not_depend_on_how_many_follow(text: str) -> None:
    """Public code lowers the order at the end if there are fewer than ten steps, or fifteen; results jump there."""
    sde, solver = ss.VP(), rule(text)
    grid, x = ss.grids.karras(sde, 12), START
    long, short = (
        [step.x for step in run_steps(solver.plan(sde, times), Gaussian(sde).x0, x)] for times in (grid, grid[:8])
    )
    for k, (a, b) in enumerate(zip(long, short[:-1], strict=False)):  # the last one of a plan is not corrected
        assert relative(a, b) < 1e-12, k


# ---------------------------------------------------------------------------------------------------------------------
# 4. Cost
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("c2", "c3"), [(0.5, 0.5), (1.0, 1.0), (0.3, 0.3)])
def test_res_of_order_three_needs_two_different_stages(c2: float, c3: float) -> None:
    with pytest.raises(ValueError, match="`c2` and `c3` must differ, because order 3 needs three different times"):
        ss.solvers.RES(3, c2, c3)


@EACH_RULE
def test_a_run_evaluates_the_network_where_its_plan_does_and_never_at_data(text: str) -> None:
    sde = ss.VP()
    for end in ("lam", "zero"):
        plan = rule(text).plan(sde, graded(sde, 5, end))
        recorder = Recorder(Gaussian(sde))
        run(plan, recorder, START)
        assert recorder.times == [row.t for row in plan.rows if row.evaluates], end
        assert len(recorder.times) == plan.nfe, end
        assert min(recorder.times) > 0


@pytest.mark.parametrize(
    "solver", [ss.UniPC(3), ss.solvers.DEIS(3), ss.VelocityAB(3), ss.solvers.DPMSolver(3)], ids=str
)
def test_a_long_plan_takes_no_more_quadratures_than_a_short_one(
    solver: Solver, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    for legs in (10, 500):
        calls: list[int] = []

        def counted(*args: Any, calls: list[int] = calls) -> Tensor:
            calls.append(1)
            return weights(*args)

        monkeypatch.setattr("scoresde.solvers.tape.weights", counted)
        solver.plan(ss.VP(), ss.grids.karras(ss.VP(), legs))
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 8, counts


ISOTROPIC = ss.Gaussian(ss.VP(), torch.zeros(5), torch.full((5,), 1.3**2))


@pytest.mark.parametrize(
    "solver", [ss.DDIM(), ss.UniPC(3), ss.solvers.DPMSolver(3), ss.VelocityAB(3), ss.solvers.DEIS(3)], ids=str
)
def test_a_gaussian_start_replaces_the_first_evaluation_and_is_as_accurate(solver: Solver) -> None:
    """The analytic first step of other code evaluates the Gaussian in place of the network; here its flow takes the
    whole step. The two differ by the error of one step, and the flow has none on Gaussian data.
    """
    sde = ss.VP()
    grid = ss.grids.uniform_lam(sde, 8, t_end=0.05)
    recorder = Recorder(ISOTROPIC)
    start = ISOTROPIC.flow(START, 1.0, float(grid[1]))
    shorter = run(solver.plan(sde, grid[1:]), recorder, start)
    assert torch.equal(ss.sample(ISOTROPIC, START, solver, grid=grid[1:], start=ISOTROPIC), shorter)
    whole = solver.plan(sde, grid)
    assert len(recorder.times) == whole.nfe - solver.stages and sde.T not in recorder.times
    exact = ISOTROPIC.flow(START, 1.0, float(grid[-1]))
    other = run(whole, ISOTROPIC.x0, START)
    assert relative(shorter, exact) < 1.02 * relative(other, exact)
    assert relative(shorter, other) < 0.02 * relative(other, exact)


def unlike(texts: list[str]) -> list[str]:
    """One rule of each kind that spends a budget in its own way."""
    kinds: dict[Any, str] = {}
    for text in texts:
        kinds.setdefault(spending(rule(text)), text)
    return list(kinds.values())


def spending(solver: Solver) -> tuple[Any, ...]:
    """All that the number of evaluations depends on."""
    stage = solver.nodes if getattr(solver, "start", "") == "self" else None
    plain = type(solver).for_nfe is Solver.for_nfe
    names = ("start", "reevaluate", "improved")
    return (plain or type(solver), solver.stages, stage, *(getattr(solver, name, None) for name in names))


@pytest.mark.parametrize("clean", [True, False], ids=["to data", "to noise"])
@pytest.mark.parametrize("n", [1, 3])
def test_annealed_langevin_spends_its_budget_but_for_less_than_a_level(n: int, clean: bool) -> None:
    sde, solver = ss.VP(t_min=0.01), ss.solvers.AnnealedLangevin(n)

    def cost(steps: int) -> int:
        grid = ss.grids.uniform_lam(sde, steps, t_start=0.9, t_end=0.0 if clean else 0.01)
        return solver.plan(sde, grid).nfe

    for nfe in range(n + 1 if clean else 2 * n, 31):
        same, steps = solver.for_nfe(nfe, clean=clean)
        assert same == solver
        assert cost(steps) <= nfe < cost(steps + 1), nfe


BUDGETED = [
    *unlike(RULES),
    "DPMSolver(kind='fast')",
    "with_corrector(DPMSolverPP(3, start='self'), reevaluate=True)",
    "NoiseCombination(improved=True)",
]


@pytest.mark.parametrize("clean", [True, False], ids=["to data", "to noise"])
@pytest.mark.parametrize("text", BUDGETED)
def test_a_budget_is_spent_but_for_less_than_a_leg(text: str, clean: bool) -> None:
    sde, solver = ss.VP(), rule(text)
    costs: dict[Solver, list[int]] = {}

    def cost(solver: Solver, legs: int) -> int:
        known = costs.setdefault(solver, [0])
        for n in range(len(known), legs + 1):
            known.append(solver.plan(sde, graded(sde, n - 1, "zero") if clean and n > 1 else ends(n)).nfe)
        return known[legs]

    def ends(n: int) -> Tensor:
        return torch.tensor([1.0, 0.0], **F64) if clean else graded(sde, n)

    for nfe in range(1 if clean else solver.stages, 41):
        spends, legs = solver.for_nfe(nfe, clean=clean)
        if "fast" in text:  # it has a leg for each of its orders, and one more of order 1 would cost 1
            assert spends.plan(sde, graded(sde, legs - 1, "zero") if clean and legs > 1 else ends(legs)).nfe == nfe
        else:
            assert cost(spends, legs) <= nfe < cost(spends, legs + 1), nfe


def test_every_rule_spends_a_budget_in_one_of_these_ways() -> None:
    kinds = {spending(rule(text)) for text in BUDGETED}
    assert {spending(rule(text)) for text in RULES} <= kinds


def test_a_budget_below_one_leg_is_refused() -> None:
    model = Gaussian(ss.VP())
    with pytest.raises(ValueError, match=r"needs at least 4 evaluations, `nfe` = 3 is too small a budget"):
        ss.sample(model, (2, 5), ss.solvers.RungeKutta4(), nfe=3, t_end=0.1, seed=0)
    assert ss.solve(model, (2, 5), ss.solvers.RungeKutta4(), nfe=3, seed=0).nfe == 1, "one leg into data costs one"


# ---------------------------------------------------------------------------------------------------------------------
# 5. There and back
# ---------------------------------------------------------------------------------------------------------------------

# A leg there and the same leg back: h^(p+1) and (−h)^(p+1) times one constant cancel if p is even: those gain one.
# So do corrected rules whose last leg is not corrected, and rules with history, whose constants see the steps reversed.
BACK = {
    "DDIM()": 1,
    "EDMHeun()": 3,
    "DPMSolver(2, kind='single', form='exact')": 3,
    "DPMSolverPP(3, kind='single', form='exact')": 3,
    "RES(3)": 3,
    "DPMSolverPP(3, kind='multi', form='exact', start='self')": 3,
    "UniPC(2, 'bh2', DATA, start='self')": 3,
    "VelocityAB(3, start='self')": 3,
    "DEIS(3, 't', start='self')": 3,
}


@pytest.mark.parametrize(("text", "known"), BACK.items())
def test_what_is_encoded_is_decoded_at_the_order_of_the_rule(text: str, known: int) -> None:
    model = Gaussian(ss.VP())
    first, last = (model.sde.t_of_lam(lam) for lam in orders.WINDOW)
    data = model.flow(ss.Noise(0).normal((8, 5), 0, dtype=torch.float64), 1.0, last)
    gaps = []
    for legs in (40, 80):
        grid = uneven(model.sde, legs, t_start=first, t_end=last)
        code = ss.encode(model, data, rule(text), grid=grid)
        assert relative(code, model.flow(data, last, first)) < 0.3, "a code is where the flow ends"
        gaps.append((ss.decode(model, code, rule(text), grid=grid) - data).norm(dim=1).median())
    assert abs(float((gaps[0] / gaps[1]).log2()) - known) < 0.25, gaps


# ---------------------------------------------------------------------------------------------------------------------
# 6. Known traps of public code
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DPMSolver", "DPMSolverPP"])
def test_trap_multistep_three_as_printed_is_of_order_two(name: str) -> None:
    """The second derivative is twice the divided difference; public code leaves the two out."""
    model = Gaussian(ss.VP())
    slopes, errors = [], []
    for form in ("published", "exact"):
        started = orders.Started(rule(f"{name}(3, kind='multi', form={form!r})"), 2)  # no blame on the start
        order = orders.measure(started, model, model.flow, (160, 320), 8)
        slopes.append(order.slope)
        errors.append(order.errors[-1])
    assert abs(slopes[0] - 2) < 0.2 and abs(slopes[1] - 3) < 0.2, slopes
    assert errors[0] > 5 * errors[1]


@pytest.mark.parametrize("order", [2, 3])
def test_trap_the_public_corrector_with_varying_coefficients_is_of_order_one(order: int) -> None:
    """It reads a leftover loop index and drops the last row. With all rows it is our "exact", of order p + 1."""
    model = Gaussian(ss.VP())
    first, last = (model.sde.t_of_lam(lam) for lam in orders.WINDOW)
    x = START
    errors: dict[bool, list[float]] = {True: [], False: []}
    for legs in (80, 160):
        grid = uneven(model.sde, legs, t_start=first, t_end=last)
        states = [model.flow(x, first, float(t)) for t in grid]
        for bug, gaps in errors.items():
            options = {"order": order, "variant": "vary_coeff", "published_bug": bug, **FULL_END}
            y = pub.unipc(model.x0, x, grid, *BY_HAND["VP"], start=states[:order], **options)
            gaps.append(float((y - states[-1]).norm(dim=1).median()))
    assert abs(math.log2(errors[True][0] / errors[True][1]) - 1) < 0.2, errors
    assert abs(math.log2(errors[False][0] / errors[False][1]) - order - 1) < 0.2, errors
    ours = orders.measure(rule(f"UniPC({order}, 'exact', start='self')"), model, model.flow, (80, 160), 8)
    assert abs(ours.slope - order - 1) < 0.2, ours
    assert ours.errors[-1] < 1e-2 * errors[True][-1]


@pytest.mark.parametrize("order", [3, 4])
def test_trap_coefficients_of_equal_steps_leave_order_two_on_an_uneven_grid(order: int) -> None:
    """Karras' grid is uneven in ρ, where iPNDM extrapolates. The same nodes with the weights of their grid keep it."""
    model = Gaussian(ss.EDM())
    first, last = (model.sde.t_of_lam(lam) for lam in orders.WINDOW)
    pair = [
        convergence_order(
            orders.Started(solver, 3),
            model,
            steps=(160, 320),
            t_start=first,
            t_end=last,
            reference=model.flow,
            grid=ss.grids.karras,
            n=8,
        )
        for solver in (ss.solvers.IPNDM(order), ss.solvers.LMS(order))
    ]
    assert abs(pair[0].slope - 2) < 0.2 and pair[0].declared == 2, pair
    assert abs(pair[1].slope - order) < 0.2 and pair[1].declared == order, pair
    assert pair[0].errors[-1] > 5 * pair[1].errors[-1]
    even = ss.grids.uniform_t(model.sde, 12, t_end=1.0)
    alike = [
        run(solver.plan(model.sde, even), model.x0, 80.0 * START)
        for solver in (ss.solvers.IPNDM(order), ss.solvers.LMS(order))
    ]
    assert relative(*alike) < 1e-12, "on equal steps the two are one"
