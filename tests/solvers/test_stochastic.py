"""Stochastic solvers: each is the published update with the same normals, of the weak order it declares, exact
where theory says exact, and its noise belongs to the sample, not to the batch."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import published as pub
import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis.moments import exact_moments, point_mass_defect
from scoresde.analysis.orders import weak_order
from scoresde.plan.run import run
from scoresde.plan.run import steps as run_steps
from scoresde.plan.table import Plan
from scoresde.solvers import stochastic
from scoresde.solvers.ancestral import Ancestral, Churn, Posterior, TwoStage
from scoresde.solvers.interpolants import DATA, NOISE, RHO, VELOCITY, Prediction
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.reverse_sde import ReverseSDE
from scoresde.solvers.rule import Solver
from scoresde.solvers.single_step import SingleStep
from scoresde.solvers.stochastic import er_sde_scale

F64 = {"dtype": torch.float64}
FIVE: dict[str, ss.SDE] = {"VP": ss.VP(), "VE": ss.VE(), "Cosine": ss.Cosine(), "EDM": ss.EDM(), "Flow": ss.Flow()}


def wave(t: Any) -> Any:
    """Stochasticity that changes with time, for numbers and tensors."""
    return 0.9 + 0.3 * (torch.cos(t) if isinstance(t, Tensor) else math.cos(t))


def sde_scale(rho: Tensor) -> Tensor:
    return rho**2


# Every function of the catalogue, and the rules that are none of them.
RULES: list[Solver] = [
    *(ss.DDIM(eta) for eta in (0.5, 1.0, wave)),
    *(ss.DDPM(v) for v in ("small", "large")),
    ss.solvers.EulerAncestral(),
    *(ss.solvers.DPM2Ancestral(eta) for eta in (1.0, 0.5)),
    *(ss.solvers.DPMPP2SAncestral(eta) for eta in (1.0, wave)),
    Ancestral(ss.DPMSolverPP(3, kind="single", form="exact")),
    Ancestral(ss.DPMSolverPP(2)),
    *(ss.solvers.DPMPPSDE(eta, r) for eta, r in ((1.0, 0.5), (0.5, 0.5), (1.0, 0.3))),
    ss.solvers.DPMPPSDE(one_path=False),
    ss.solvers.EDMStochastic(s_churn=8.0, s_noise=1.0),
    Churn(ss.DDIM(), 8.0),
    Churn(ss.DPMSolverPP(2), 8.0),
    *(ss.EulerMaruyama(eta, clock) for eta, clock in ((1.0, "t"), (1.0, "lam"), (wave, "t"))),
    *(ss.solvers.StochasticHeun(eta, clock) for eta, clock in ((1.0, "t"), (1.0, "lam"), (0.5, "t"))),
    ss.solvers.ReverseDiffusion(),
    *(
        ss.solvers.SDEDPMSolver(p, form)
        for p, form in ((1, "mid"), (2, "mid"), (2, "exact"), (3, "mid"), (3, "published"))
    ),
    *(ss.SDEDPMSolverPP(p, form) for p, form in ((1, "mid"), (2, "mid"), (2, "exact"), (3, "mid"), (3, "published"))),
    ss.SDEDPMSolverPP(3, "exact", eta=wave, start="self"),
    ss.solvers.SASolver(),
    *(ss.solvers.SASolver(p, c, 1.0) for p, c in ((1, 0), (2, 0), (4, 0), (1, 2), (2, 2), (3, 4), (4, 4))),
    ss.solvers.SASolver(3, 4, 1.0, NOISE),
    ss.solvers.SASolver(3, 4, wave),
    ss.solvers.SASolver(3, 4, 1.0, pece=True),
    ss.solvers.SASolver(2, 2, 1.0, form="end"),
    *(ss.solvers.SEEDS(p, prediction) for p in (1, 2, 3) for prediction in (NOISE, DATA)),
    ss.solvers.SEEDS(3, DATA, "exact", (0.25, 0.7), wave),
    *(ss.solvers.ERSDE(p) for p in (1, 2, 3)),
    ss.solvers.ERSDE(3, form="published"),
    ss.solvers.ERSDE(2, sde_scale),
    Multistep(2, VELOCITY, eta=1.0),
    Multistep(2, DATA, RHO, eta=0.7),
    SingleStep(2, VELOCITY, eta=1.0),
]
EACH_RULE = pytest.mark.parametrize("solver", RULES, ids=lambda s: f"{s!r}".replace(" ", ""))


def test_every_stochastic_solver_is_in_the_list() -> None:
    names = {repr(rule).split("(")[0].split("[")[0] for rule in RULES} | {"ConsistencySampling"}
    for name, fn in inspect.getmembers(stochastic, inspect.isfunction):
        if inspect.signature(fn).return_annotation == "Solver" and fn.__module__ == stochastic.__name__:
            assert name in names or name.startswith("_"), name


# ---------------------------------------------------------------------------------------------------------------------
# 1. Agreement with the published updates, with the same normals
# ---------------------------------------------------------------------------------------------------------------------

UNDER: dict[str, ss.SDE] = {"VP": ss.VP(), "Flow": ss.Flow(T=0.99), "EDM": ss.EDM(), "VE": ss.VE()}
# α and σ once more, for the oracles alone.
BY_HAND: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "VP": (lambda t: math.exp(-0.05 * t - 4.975 * t**2), lambda t: math.sqrt(-math.expm1(-0.1 * t - 9.95 * t**2))),
    "Flow": (lambda t: 1 - t, lambda t: t),
    "EDM": (lambda t: 1.0, lambda t: t),
    "VE": (lambda t: 1.0, lambda t: 0.01 * math.sqrt(math.expm1(2 * t * math.log(5000.0)))),
}
DRAWN = ss.Noise(3)


@cache
def problem(name: str, end: str) -> tuple[ss.GaussianMixture, Tensor, Tensor]:
    """Three Gaussians in the plane, a start, and a grid that is uneven in λ and ends at σ = 0 if `end` is "zero"."""
    sde = UNDER[name]
    means = [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]]
    model = ss.GaussianMixture(sde, means, std=[0.5, 0.4, 0.6], weights=[1.0, 2.0, 1.5])
    u = torch.tensor([0.0, 0.21, 0.37, 0.59, 0.83, 1.0], **F64)
    first = sde.lam(sde.T)
    grid = sde.t_of_lam(first + (2.0 - first) * u)
    grid[0] = sde.T
    x = sde.sigma(sde.T) * ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)
    return model, x, torch.cat([grid, grid.new_zeros(1)]) if end == "zero" else grid


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def normals(x: Tensor, n: int = 30) -> list[Tensor]:
    return [DRAWN.like(x, k) for k in range(n)]


Pair = tuple[Solver, Any, dict[str, Any]]
NOT_TO_ZERO = (pub.sde_dpm_solver, pub.seeds_1, pub.seeds_2, pub.seeds_3, pub.reverse_diffusion)


def pairs() -> Iterator[Pair]:
    """(rule, published update, its options)."""
    for eta in (0.3, 1.0):
        yield ss.DDIM(eta), pub.ddim, {"eta": eta}
    yield ss.DDPM(), pub.ddpm, {}
    yield ss.DDPM("large"), pub.ddpm, {"variance": "large"}
    for o in ({"eta": 1.0, "s_noise": 1.0}, {"eta": 0.6, "s_noise": 1.01}):
        yield ss.solvers.EulerAncestral(**o), pub.euler_ancestral, o
        yield ss.solvers.DPM2Ancestral(**o), pub.dpm_2_ancestral, o
        yield ss.solvers.DPMPP2SAncestral(**o), pub.dpmpp_2s_ancestral, o
    for form, kind in (("mid", "midpoint"), ("exact", "heun")):
        yield ss.SDEDPMSolverPP(2, form, eta=0.6), pub.dpmpp_2m_sde, {"eta": 0.36, "solver_type": kind}
        yield ss.solvers.SDEDPMSolver(2, form), pub.sde_dpm_solver, {"solver_type": kind}
    yield ss.solvers.SDEDPMSolver(1), pub.sde_dpm_solver, {"order": 1}
    for eta in (0.6, 1.0):
        yield ss.SDEDPMSolverPP(3, "exact", eta=eta), pub.dpmpp_3m_sde, {"eta": eta**2, "second_derivative": 2}
        yield ss.SDEDPMSolverPP(3, "published", eta=eta), pub.dpmpp_3m_sde, {"eta": eta**2}
    full = {"lower_order_final": False}  # ours lowers the order into σ = 0 alone
    for p, c in ((1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (1, 2), (2, 3), (3, 3), (3, 4), (4, 4), (4, 2)):
        for prediction in (DATA, NOISE):
            o = {"predictor": p, "corrector": c, "tau": 0.7, "prediction": prediction.name, **full}
            yield ss.solvers.SASolver(p, c, 0.7, prediction), pub.sa_solver, o
    for p, c in ((1, 2), (3, 4)):
        o = {"predictor": p, "corrector": c, "mode": "PECE", **full}
        yield ss.solvers.SASolver(p, c, 1.0, pece=True), pub.sa_solver, o
    yield ss.solvers.SASolver(3, 4, wave), pub.sa_solver, {"tau": wave, **full}
    yield (
        ss.solvers.SASolver(2, 2, 1.0, form="end"),
        pub.sa_solver,
        {"predictor": 2, "corrector": 2, "rescaled": True, **full},
    )
    for prediction in (NOISE, DATA):
        known = {"prediction": prediction.name}
        yield ss.solvers.SEEDS(1, prediction), pub.seeds_1, known
        for form, kind in (("mid", "a"), ("exact", "b")):
            o = {**known, "kind": kind}
            yield ss.solvers.SEEDS(2, prediction, form), pub.seeds_2, o
            yield ss.solvers.SEEDS(2, prediction, form, (0.3,)), pub.seeds_2, {**o, "c2": 0.3}
            yield ss.solvers.SEEDS(3, prediction, form), pub.seeds_3, o
            yield ss.solvers.SEEDS(3, prediction, form, (0.25, 0.7)), pub.seeds_3, {**o, "c2": 0.25, "c3": 0.7}
    for p in (1, 2, 3):
        for scale, phi in (("sde_5", er_sde_scale), ("sde", sde_scale)):
            yield ss.solvers.ERSDE(p, phi), pub.er_sde, {"order": p, "scale": scale, "corrected": True}
    yield ss.solvers.ERSDE(3, form="published"), pub.er_sde, {"order": 3}
    yield ss.solvers.ReverseDiffusion(), pub.reverse_diffusion, {}


def label(pair: Pair) -> str:
    return f"{pair[0]!r}-{pair[1].__name__}-" + "-".join(getattr(v, "__name__", str(v)) for v in pair[2].values())


def has_no_last_leg(pair: Pair) -> bool:
    """The re-typed SA-Solver returns noise, not data, from its leg into σ = 0 where it predicts noise."""
    return pair[1] in NOT_TO_ZERO or (pair[1] is pub.sa_solver and pair[2].get("prediction") == "noise")


@pytest.mark.parametrize("pair", list(pairs()), ids=label)
def test_a_rule_is_the_published_update(pair: Pair) -> None:
    solver, oracle, options = pair
    for i, name in enumerate(UNDER):
        model, x, grid = problem(name, "lam" if i % 2 or has_no_last_leg(pair) else "zero")
        ours = run(solver.plan(model.sde, grid), model.x0, x, DRAWN)
        theirs = oracle(model.x0, x, grid, *BY_HAND[name], z=normals(x), **options)
        assert relative(ours, theirs) < 1e-12, name


@pytest.mark.parametrize("eta", [1.0, 0.5])
@pytest.mark.parametrize("name", UNDER)
def test_euler_maruyama_is_the_published_update(name: str, eta: float) -> None:
    model, x, grid = problem(name, "lam")
    sde = model.sde
    ours = run(ss.EulerMaruyama(eta).plan(sde, grid), model.x0, x, DRAWN)
    theirs = pub.euler_maruyama(model.x0, x, grid, *BY_HAND[name], z=normals(x), f=sde.f, g2=sde.g2, eta=eta)
    assert relative(ours, theirs) < 1e-12


@pytest.mark.parametrize(("eta", "r"), [(1.0, 0.5), (0.6, 0.3)])
@pytest.mark.parametrize("name", UNDER)
def test_dpmpp_sde_is_the_published_update_with_normals_of_one_path_in_rho(name: str, eta: float, r: float) -> None:
    model, x, grid = problem(name, "zero")
    rho = [model.sde.sigma(u) / model.sde.alpha(u) for u in grid.tolist()]
    z, paired = normals(x), []
    for i, (a, b) in enumerate(pairwise(rho)):
        share = (a - a ** (1 - r) * b**r) / (a - b)
        paired += [z[2 * i], share**0.5 * z[2 * i] + (1 - share) ** 0.5 * z[2 * i + 1]]
    options = {"eta": eta, "r": r, "s_noise": 1.01}
    for one_path, given in ((True, paired), (False, z)):
        ours = run(ss.solvers.DPMPPSDE(**options, one_path=one_path).plan(model.sde, grid), model.x0, x, DRAWN)
        assert relative(ours, pub.dpmpp_sde(model.x0, x, grid, *BY_HAND[name], z=given, **options)) < 1e-12


@pytest.mark.parametrize("second", [True, False])
@pytest.mark.parametrize("name", UNDER)
def test_edm_stochastic_is_the_published_update_with_all_four_knobs(name: str, second: bool) -> None:
    model, x, grid = problem(name, "zero")
    rho = [model.sde.sigma(u) / model.sde.alpha(u) for u in grid.tolist()]
    low, high = 0.9 * rho[-2], 0.99 * rho[0]
    knobs = {"s_churn": 2.0, "s_noise": 1.003}
    solver = ss.solvers.EDMStochastic(**knobs, s_tmin=low, s_tmax=high, solver=None if second else ss.DDIM())
    raised = iter(normals(x))
    z = [
        next(raised) if low <= r <= high else 0 * x for r in rho[:-1]
    ]  # a draw for each churn, none where there is none
    o = {"s_min": low, "s_max": high, "second_order": second, **knobs}
    plan = solver.plan(model.sde, grid)
    assert plan.draws == len(rho) - 2
    assert (
        relative(run(plan, model.x0, x, DRAWN), pub.edm_stochastic(model.x0, x, grid, *BY_HAND[name], z=z, **o)) < 1e-12
    )


# ---------------------------------------------------------------------------------------------------------------------
# 2. Weak order, from exact moments
# ---------------------------------------------------------------------------------------------------------------------


def window(sde: ss.SDE, reach: float = 1.0) -> dict[str, float]:
    return {"t_start": sde.t_of_lam(-reach), "t_end": sde.t_of_lam(reach)}


# Their error is a difference of two terms, or starts as one of higher order: they need smaller steps.
LATE = ("SASolver", "SEEDS", "ERSDE(order=3", "SDEDPMSolver", "Churn", "Ancestral", "SingleStep")
LATER = ("SASolver", "Churn(solver=DPMSolverPP", "SDEDPMSolverPP(order=3")


@EACH_RULE
def test_the_weak_order_is_the_declared_one(solver: Solver) -> None:
    legs = (30, 60)
    if repr(solver).startswith(LATE):
        legs = (240, 480) if repr(solver).startswith(LATER) else (80, 160)
    order = weak_order(solver, FIVE["VP"], steps=legs, **window(FIVE["VP"]))
    assert order.declared == solver.weak_order
    assert abs(order.slope - solver.weak_order) < 0.15, order


KNOWS_TIME = [s for s in RULES if isinstance(s, ReverseSDE) or repr(s).startswith("ReverseDiffusion")]
KNOWS_TIME += [s for s in RULES if getattr(s, "eta", None) is wave and s not in KNOWS_TIME]
KNOWS_TIME += [s for s in RULES if getattr(s, "variance", "small") == "large"]  # which knows α


@pytest.mark.parametrize("name", [name for name in FIVE if name != "VP"])
@pytest.mark.parametrize("solver", KNOWS_TIME, ids=repr)
def test_the_weak_order_of_rules_that_know_the_time_is_the_declared_one_on_every_process(
    solver: Solver, name: str
) -> None:
    legs = (240, 480) if isinstance(solver, Multistep) else (40, 80)
    order = weak_order(solver, FIVE[name], steps=legs, **window(FIVE[name]))
    assert abs(order.slope - solver.weak_order) < 0.15, order


@pytest.mark.parametrize("solver", [s for s in RULES if s not in KNOWS_TIME], ids=repr)
def test_a_rule_that_knows_lam_alone_has_the_same_moments_over_alpha_on_every_process(solver: Solver) -> None:
    """So it has the weak order of VP on all of them."""
    lam = torch.tensor([-2.2, -1.0, -0.6, 0.1, 1.2, 2.0], **F64)
    all_moments = {}
    for name, sde in FIVE.items():
        moments = exact_moments(solver.plan(sde, sde.t_of_lam(lam)), sde, mean=0.3, spectrum=[0.3, 2.0])
        all_moments[name] = torch.stack(
            [moments.mean / sde.alpha(moments.t), moments.variance / sde.alpha(moments.t) ** 2]
        )
    for name, value in all_moments.items():
        assert relative(value, all_moments["VP"]) < 1e-11, name


@pytest.mark.parametrize("prediction", [DATA, NOISE])
@pytest.mark.parametrize(("p", "form", "start"), [(1, "mid", "ramp"), (2, "mid", "self"), (3, "mid", "self")])
def test_the_drift_of_multistep_rules_has_the_order_of_the_rule_without_noise(
    prediction: Prediction, p: int, form: str, start: str
) -> None:
    maker = ss.SDEDPMSolverPP if prediction is DATA else ss.solvers.SDEDPMSolver
    order = weak_order(maker(p, form, eta=0.5, start=start), FIVE["VP"], steps=(80, 160), of="drift", eta=0.5)
    assert abs(order.slope - p) < 0.15, order


def test_trap_the_third_order_of_public_sde_code() -> None:
    """Public 3M SDE has half the second derivative, drift of order 2; with diffusers' sign in it, order 1."""
    sde, eta, errors = FIVE["VP"], 0.5, []
    variance, first, last = 2.0, sde.t_of_lam(-2.5), sde.t_of_lam(2.0)
    v = [sde.alpha(u) ** 2 * variance + sde.sigma(u) ** 2 for u in (first, last)]
    exact = (v[1] / v[0]) ** ((1 + eta**2) / 2) * (sde.alpha(first) / sde.alpha(last)) ** eta**2
    x = torch.ones(1, 1, **F64)

    def D(x: Tensor, t: float) -> Tensor:
        return sde.alpha(t) * variance / (sde.alpha(t) ** 2 * variance + sde.sigma(t) ** 2) * x

    for n in (80, 160):
        t = ss.analysis.orders.uneven_lam(sde, n, t_start=first, t_end=last)
        theirs = pub.dpmpp_3m_sde(D, x, t, *BY_HAND["VP"], z=[0 * x] * n, eta=eta**2, diffusers_sign=True)
        errors.append(abs(float(theirs) - exact))
    assert abs(math.log2(errors[0] / errors[1]) - 1) < 0.15, errors
    ours = weak_order(ss.SDEDPMSolverPP(3, eta=eta, start="self"), sde, steps=(80, 160), of="drift", eta=eta)
    printed = weak_order(ss.SDEDPMSolverPP(3, "published", eta, "self"), sde, steps=(80, 160), of="drift", eta=eta)
    assert abs(ours.slope - 3) < 0.15 and abs(printed.slope - 2) < 0.15, (ours, printed)
    assert ours.errors[1] < 0.2 * printed.errors[1] < 0.01 * errors[1]


@pytest.mark.parametrize("solver", [ss.DDIM(0.6), ss.solvers.SEEDS(2)], ids=repr)
def test_samples_agree_with_the_exact_moments(solver: Solver) -> None:
    sde, n = ss.VP(), 200_000
    model = ss.GaussianMixture(sde, torch.tensor([[0.4]]), std=0.5)
    plan = solver.plan(sde, ss.grids.karras(sde, 6, t_end=0.05))
    exact = exact_moments(plan, sde, mean=0.4, spectrum=0.25)
    x = ss.sample(model, model.sample(n, sde.T, seed=1, dtype=torch.float32), plan, seed=5).double()
    assert abs(float(x.mean()) - float(exact.mean)) < 4 * float(exact.variance) ** 0.5 / n**0.5
    assert abs(float(x.var()) / float(exact.variance) - 1) < 4 * (2 / n) ** 0.5


def test_moments_are_those_of_the_matrix_of_a_plan() -> None:
    """Feed unit vectors through the real loop: what comes out is the matrix."""
    sde, c = ss.Flow(), 1.7
    plan = ss.solvers.SASolver(3, 4, wave).plan(sde, [1.0, 0.8, 0.55, 0.3, 0.1])
    width = 1 + plan.draws

    def D(x: Tensor, t: float) -> Tensor:
        return sde.alpha(t) * c / (sde.alpha(t) ** 2 * c + sde.sigma(t) ** 2) * x

    class Units(ss.Noise):
        def like(self, x: Tensor, draw: int) -> Tensor:
            return torch.eye(width, **F64)[1 + draw][None]

    row = run(plan, D, torch.eye(width, **F64)[:1], Units(0))
    moments = exact_moments(plan, sde, spectrum=c)
    assert float(moments.variance) == pytest.approx(float(row.square().sum()), rel=1e-13)
    assert float(moments.of_start) == pytest.approx(float(row[0, 0]), rel=1e-13)
    assert torch.equal(moments.path[-1][3], moments.variance) and moments.path[-1][:2] == (4, 0.1)


def test_moments_of_the_prior_start_and_wrong_arguments() -> None:
    sde = ss.VP()
    plan = ss.DDIM().plan(sde, ss.grids.karras(sde, 8, t_end=0.1))
    prior = exact_moments(plan, sde, mean=1.0, start="prior")
    assert float(prior.path[0][2]) == 0.0 and float(prior.path[0][3]) == pytest.approx(sde.sigma(1.0) ** 2)
    with pytest.raises(ValueError, match="`start` must be one of 'marginal', 'prior'"):
        exact_moments(plan, sde, start="noise")
    with pytest.raises(ValueError, match="variances of at least 0, got -1"):
        exact_moments(plan, sde, spectrum=-1.0)
    many = ss.DDIM().plan(sde, torch.tensor([[1.0, 0.9], [0.4, 0.5], [0.1, 0.1]], **F64))
    with pytest.raises(ValueError, match="a number for each sample"):
        exact_moments(many, sde)


# ---------------------------------------------------------------------------------------------------------------------
# 3. Exactness
# ---------------------------------------------------------------------------------------------------------------------


def random_grid(sde: ss.SDE, seed: int, end: float) -> Tensor:
    u = ss.Noise(seed).uniform((1, 7), 0, dtype=torch.float64)[0].sort(descending=True).values
    return torch.cat([u.new_tensor([sde.T]), sde.T * u, u.new_tensor([end])])


# exact for one point: data rules, and those that end legs by the forward transition
EXPONENTIAL = [
    s
    for s in RULES
    if not isinstance(s, ReverseSDE)
    and repr(s).split("(")[0] not in ("ReverseDiffusion", "SDEDPMSolver", "SDEDPMSolver[published]")
    and getattr(s, "prediction", DATA) is DATA
    and getattr(s, "variance", "small") == "small"
]


@pytest.mark.parametrize("solver", EXPONENTIAL, ids=repr)
def test_a_point_comes_out_exactly(solver: Solver) -> None:
    for i, sde in enumerate(FIVE.values()):
        assert point_mass_defect(solver.plan(sde, random_grid(sde, i, 0.0)), sde) < 1e-12, sde
    zigzag = ss.grids.zigzag([1.0, 0.6, 0.8, 0.5, 0.2, 0.35, 0.1, 0.0])
    assert point_mass_defect(solver.plan(ss.VP(), zigzag), ss.VP()) < 1e-12


@pytest.mark.parametrize("maker", [ss.DDIM, ss.solvers.EulerAncestral], ids=lambda f: f.__name__)
def test_the_variance_of_the_noise_of_ddim_goes_as_eta_squared(maker: Any) -> None:
    sde = ss.VP()
    grid = ss.grids.karras(sde, 10)

    def noise(eta: float) -> list[float]:
        return [sum(w**2 for _, w in row.z) for row in maker(eta).plan(sde, grid).rows[1:]]

    whole = noise(1.0)
    assert whole[-1] == 0.0 and min(whole[:-1]) > 0
    for eta in (0.1, 0.5, 0.9):
        for v, full in zip(noise(eta), whole, strict=True):
            assert v == pytest.approx(eta**2 * full, rel=1e-14)


PLAIN: list[tuple[Callable[[Any], Solver], Solver]] = [
    (lambda eta: ss.DDIM(eta), ss.DDIM()),
    (lambda eta: ss.solvers.EulerAncestral(eta), ss.DDIM()),
    (lambda eta: ss.solvers.DPM2Ancestral(eta), ss.solvers.DPM2()),
    (lambda eta: ss.solvers.DPMPP2SAncestral(eta), ss.DPMSolverPP(2, kind="single")),
    (lambda eta: ss.EulerMaruyama(eta), ss.solvers.Euler()),
    (lambda eta: ss.solvers.StochasticHeun(eta), ss.solvers.Heun()),
    (lambda eta: ss.solvers.SDEDPMSolver(2, eta=eta), ss.solvers.DPMSolver(2, kind="multi")),
    (lambda eta: ss.SDEDPMSolverPP(2, eta=eta), ss.DPMSolverPP(2)),
    (lambda eta: ss.SDEDPMSolverPP(3, eta=eta), ss.DPMSolverPP(3)),
    (lambda eta: ss.SDEDPMSolverPP(3, "published", eta=eta), Multistep(1)),
    (lambda eta: ss.solvers.SASolver(2, 3, eta), ss.solvers.with_corrector(ss.DPMSolverPP(2, form="exact"))),
    (lambda eta: ss.solvers.SEEDS(3, eta=eta), ss.solvers.DPMSolver(3)),
    (lambda eta: ss.solvers.SEEDS(2, DATA, "exact", eta=eta), ss.solvers.RES(2)),
    (lambda _: ss.solvers.EDMStochastic(0.0), ss.EDMHeun()),
]


@pytest.mark.parametrize("i", range(len(PLAIN)))
def test_without_noise_a_rule_is_the_deterministic_one_to_the_bit(i: int) -> None:
    stochastic_rule, plain = PLAIN[i]
    if plain == Multistep(1):
        plain = type(stochastic_rule(0.0))(3, DATA)
    for sde in (ss.VP(), ss.EDM()):
        grid = ss.grids.karras(sde, 7)
        without = stochastic_rule(0.0).plan(sde, grid)
        assert without.draws == 0
        assert without.rows == plain.plan(sde, grid).rows


@pytest.mark.parametrize(
    "maker", [pair[0] for pair in PLAIN[:9] if pair[1] not in (ss.solvers.Euler(), ss.solvers.Heun())]
)
def test_a_function_that_is_0_is_the_deterministic_rule(maker: Any) -> None:
    grid = ss.grids.karras(ss.VP(), 5)
    assert same_tables(maker(lambda t: 0.0).plan(ss.VP(), grid), maker(0.0).plan(ss.VP(), grid), 1e-12)


@pytest.mark.parametrize("maker", [pair[0] for pair in PLAIN[:-1]])
def test_a_function_that_is_constant_is_the_number(maker: Any) -> None:
    grid = ss.grids.karras(ss.VP(), 5)
    for a, b in zip(maker(lambda t: 0.7).plan(ss.VP(), grid).rows, maker(0.7).plan(ss.VP(), grid).rows, strict=True):
        assert a == b


def test_ddpm_on_all_1000_steps_is_the_textbook_posterior() -> None:
    for sde in (ss.Discrete(ss.processes.betas("linear", 1000)), ss.Discrete(ss.processes.betas("cosine", 1000))):
        plan = ss.DDPM().plan(sde, torch.arange(1000, -1, -1, dtype=torch.float64))
        one, zero = torch.ones(1000, 1, **F64), torch.zeros(1000, 1, **F64)
        t = torch.arange(1000, 0, -1)
        of_x, of_d = sde.posterior_mean(one, zero, t)[:, 0], sde.posterior_mean(zero, one, t)[:, 0]
        std = torch.as_tensor(sde.posterior_variance(t), **F64).sqrt()
        ours = [
            (dict(row.x).get(r, 0.0), row.d[0][1], row.z[0][1] if row.z else 0.0) for r, row in enumerate(plan.rows[1:])
        ]
        for mine, textbook in zip(torch.tensor(ours, **F64).unbind(1), (of_x, of_d, std), strict=True):
            torch.testing.assert_close(mine, textbook, rtol=1e-11, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Variances that come from the model
# ---------------------------------------------------------------------------------------------------------------------


def test_the_optimal_variance_is_exact_for_isotropic_gaussian_data() -> None:
    c = 0.36
    for sde in FIVE.values():
        grid = ss.grids.karras(sde, 4, t_start=0.999 * sde.T, t_end=0.02 * sde.T)

        def square(t: Any, sde: ss.SDE = sde) -> Any:
            return 1 / (sde.alpha(t) ** 2 * c + sde.sigma(t) ** 2)

        moments = exact_moments(ss.DDPM("optimal", square).plan(sde, grid), sde, mean=0.5, spectrum=c)
        t = moments.t
        assert float(moments.variance) == pytest.approx(sde.alpha(t) ** 2 * c + sde.sigma(t) ** 2, rel=1e-12)
        assert float(moments.mean) == pytest.approx(0.5 * sde.alpha(t), rel=1e-12)
        small = exact_moments(ss.DDPM().plan(sde, grid), sde, spectrum=c)
        assert abs(float(small.variance / moments.variance) - 1) > 0.01, "else the test shows nothing"


def test_the_mean_squared_score_is_the_input_of_the_optimal_variance() -> None:
    sde, c = ss.VP(), 0.36
    model = ss.GaussianMixture(sde, torch.zeros(1, 8), std=c**0.5)
    data = c**0.5 * ss.Noise(0).normal((4000, 8), 0)
    grid = ss.grids.karras(sde, 5)
    estimate = ss.sampling.mean_squared_score(model, data, grid, seed=1)
    exact = 1 / (sde.alpha(grid[:-1]) ** 2 * c + sde.sigma(grid[:-1]) ** 2)
    torch.testing.assert_close(estimate, exact, rtol=0.03, atol=0.0)
    by_leg = ss.DDPM("optimal", estimate).plan(sde, grid)
    assert by_leg.draws == 4, "none at σ = 0"


def test_a_learned_variance_lies_between_the_small_and_the_large_one() -> None:
    sde = ss.Discrete(ss.processes.betas("linear", 1000))
    grid = ss.grids.index_grid(sde, 5)

    def model(r: float) -> ss.Denoiser:
        def net(x: Tensor, t: Tensor) -> Tensor:
            return torch.cat([0.3 * x, torch.full_like(x, r)], 1)

        return ss.Denoiser(net, sde, predicts="eps", learned_variance=True)

    x = ss.Noise(0).normal((3, 2, 4), 0, dtype=torch.float64)
    for r, kind in ((-1.0, "small"), (1.0, "large")):
        table = ss.sample(model(r), x, ss.DDPM(kind).plan(sde, grid), seed=4)
        learned = ss.solve(model(r), x, ss.sampling.LearnedVariance(), grid=grid, seed=4)
        assert relative(learned.x, table) < 1e-12 and learned.nfe == learned.calls == len(grid) - 1
        from_noise = ss.sample(model(r), (3, 2, 4), ss.sampling.LearnedVariance(), grid=grid, seed=4)
        assert relative(from_noise, ss.sample(model(r), (3, 2, 4), ss.DDPM(kind).plan(sde, grid), seed=4)) < 1e-5
    with pytest.raises(ValueError, match=r"use sampling\.LearnedVariance"):
        ss.DDPM("learned")


# ---------------------------------------------------------------------------------------------------------------------
# 5. Noise belongs to the sample
# ---------------------------------------------------------------------------------------------------------------------


@EACH_RULE
def test_a_sample_is_the_same_in_every_batch(solver: Solver) -> None:
    sde = ss.VP()
    model = ss.GaussianMixture(sde, torch.tensor([[0.4, -0.2], [-0.5, 0.3]]), std=0.3)
    plan = solver.plan(sde, ss.grids.karras(sde, 5))
    x = ss.Noise(8).normal((64, 2), 0, dtype=torch.float64)
    whole = ss.sample(model, x, plan, seed=7)
    for rows in (slice(3, 4), slice(0, 7), slice(41, 64)):
        part = ss.sample(model, x[rows], plan, seed=ss.Noise(7, offset=rows.start))
        assert relative(part, whole[rows]) < 1e-13, rows


def test_the_noise_of_a_sample_is_the_same_to_the_bit_on_every_rank() -> None:
    sde = ss.VP()
    plan = ss.solvers.SEEDS(3).plan(sde, ss.grids.karras(sde, 5, t_end=0.01))

    def noise_alone(rows: int, offset: int) -> Tensor:
        drawn = ss.Noise(7, offset=offset).fork(1)
        return torch.stack([drawn.normal((rows, 3), k) for k in range(plan.draws)])

    whole = noise_alone(64, 0)
    for ranks in (2, 3):
        size = -(-64 // ranks)
        parts = [noise_alone(min(size, 64 - k), k) for k in range(0, 64, size)]
        assert torch.equal(torch.cat(parts, 1), whole)


def test_trap_a_sample_does_not_see_its_batch_mates() -> None:
    """Step sizes and errors from norms over the batch make a sample depend on who else is in it."""
    sde = ss.VP()
    model = ss.GaussianMixture(sde, torch.tensor([[0.4], [-0.5]]), std=0.3)
    x = torch.tensor([[0.3], [1.0], [1e6]], **F64)
    for solver in (ss.EulerMaruyama(), ss.solvers.StochasticHeun(), ss.solvers.ERSDE()):
        a = ss.sample(model, x[:2], solver, steps=6, seed=0)
        b = ss.sample(model, x, solver, steps=6, seed=0)[:2]
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


# ---------------------------------------------------------------------------------------------------------------------
# 6. Ends
# ---------------------------------------------------------------------------------------------------------------------


class One(ss.denoisers.AbstractDenoiser):
    """Gaussian data of deviation 0.01: what noise is left at the end shows."""

    event = (2,)

    def __init__(self, sde: ss.SDE) -> None:
        super().__init__(sde)

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        return alpha * 1e-4 / (alpha**2 * 1e-4 + sigma**2) * x


@EACH_RULE
def test_every_number_of_steps_ends_finite_and_without_noise(solver: Solver) -> None:
    """One and two steps crash public rules; in some the noise of the last step is left in, or taken out wrongly."""
    for sde, steps in zip((*FIVE.values(), ss.VP()), (1, 2, 3, 50, 5, 1), strict=True):
        plan = solver.plan(sde, ss.grids.karras(sde, steps))
        assert not plan.rows[-1].z, "no noise at σ = 0"
        results: list[Tensor] = []

        def record(x: Tensor, t: float, sde: ss.SDE = sde, results: list[Tensor] = results) -> Tensor:
            results.append(One(sde).x0(x, t))
            return results[-1]

        x = run(plan, record, sde.sigma(sde.T) * ss.Noise(0).normal((2, 2), 0, dtype=torch.float64), ss.Noise(1))
        assert bool(x.isfinite().all())
        assert len(results) == plan.nfe
        torch.testing.assert_close(x, results[-1], rtol=1e-12, atol=1e-300)


def test_trap_the_steps_of_euler_maruyama_are_those_of_its_grid() -> None:
    """Public code steps by T/N along times that end before 0; weights here come from the times themselves."""
    sde, t = ss.VP(), [1.0, 0.7, 0.1]
    for row, s, u in zip(ss.EulerMaruyama().plan(sde, t).rows[1:], t, t[1:], strict=False):
        assert row.z[0][1] == pytest.approx(sde.g(s) * math.sqrt(s - u), rel=1e-13)
        assert row.d[0][1] == pytest.approx(sde.g2(s) * sde.alpha(s) / sde.sigma(s) ** 2 * (s - u), rel=1e-13)


def test_trap_no_normal_is_spent_where_no_noise_is_added() -> None:
    """Public churn draws where γ = 0, which moves the stream of everything after."""
    sde = ss.EDM()
    grid = ss.grids.karras(sde, 10)
    assert ss.solvers.EDMStochastic(s_churn=0.0).plan(sde, grid).draws == 0
    inside = sum(0.05 <= t <= 50 for t in grid.tolist())
    assert ss.solvers.EDMStochastic().plan(sde, grid).draws == inside
    assert ss.solvers.SASolver(tau=lambda t: 1.0 if 0.05 < t < 50 else 0.0).plan(sde, grid).stochastic


@EACH_RULE
def test_a_plan_may_start_without_signal(solver: Solver) -> None:
    for legs in (1, 3):  # weights that are not finite are refused
        assert len(solver.plan(ss.Flow(), ss.grids.karras(ss.Flow(), legs))) > legs


def test_the_process_may_start_without_signal() -> None:
    for sde in (ss.Flow(), ss.Cosine(T=1.0), ss.Trig()):
        for solver in (
            ss.DDIM(1.0),
            ss.solvers.DPMPPSDE(),
            ss.solvers.SEEDS(2),
            ss.solvers.ERSDE(2),
            ss.EulerMaruyama(),
            ss.solvers.DPM2Ancestral(),
        ):
            assert point_mass_defect(solver.plan(sde, [sde.T, 0.5]), sde) < 1e-12, (sde, solver)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Composition
# ---------------------------------------------------------------------------------------------------------------------


def same_tables(a: Plan, b: Plan, rel: float = 1e-9) -> bool:
    return len(a.rows) == len(b.rows) and all(
        [k for k, _ in getattr(p, c)] == [k for k, _ in getattr(q, c)]
        and all(math.isclose(v, w, rel_tol=rel) for (_, v), (_, w) in zip(getattr(p, c), getattr(q, c), strict=True))
        for p, q in zip(a.rows, b.rows, strict=True)
        for c in "xdz"
    )


def test_ancestral_rules_are_the_rules_on_a_zigzag_grid() -> None:
    sde = ss.VP()
    grid = ss.grids.karras(sde, 6)
    for rule in (ss.solvers.DPM2(), ss.DPMSolverPP(2, kind="single"), ss.DPMSolverPP(2)):
        zigzag = rule.plan(sde, ss.grids.ancestral(sde, grid, 0.7))
        assert same_tables(Ancestral(rule, 0.7).plan(sde, grid), zigzag), rule
    assert same_tables(Ancestral(ss.DDIM(), 0.7).plan(sde, grid), ss.DDIM(0.7).plan(sde, grid))


@pytest.mark.parametrize("nfe", [1, 2, 5, 9])
def test_a_budget_is_not_exceeded(nfe: int) -> None:
    model = One(ss.VP())
    fast = ss.DPMSolverPP(kind="fast")
    for solver in (
        ss.DDPM(),
        ss.solvers.DPM2Ancestral(),
        ss.solvers.SEEDS(3),
        ss.solvers.EDMStochastic(),
        Ancestral(fast),
        ss.solvers.SASolver(pece=True),
    ):
        spent = ss.solve(model, (1, 2), solver, nfe=nfe, seed=0).nfe
        assert nfe - solver.stages < spent <= nfe, solver


def test_churn_is_the_rule_on_a_zigzag_grid() -> None:
    sde = ss.EDM()
    grid = ss.grids.karras(sde, 6)
    ours = ss.solvers.EDMStochastic(2.0, 0.1, 20.0, 1.0).plan(sde, grid)
    assert same_tables(ours, ss.EDMHeun().plan(sde, ss.grids.churn(sde, grid, 2.0, 0.1, 20.0)))


def test_the_nodes_of_a_plan_are_those_of_its_grid() -> None:
    grid = ss.grids.karras(ss.VP(), 6)
    for solver in (
        ss.solvers.DPM2Ancestral(),
        ss.solvers.DPMPPSDE(),
        ss.solvers.SEEDS(3),
        ss.DDIM(1.0),
        ss.solvers.ConsistencySampling(),
    ):
        assert solver.plan(ss.VP(), grid).times == grid.tolist(), solver
    raised = ss.solvers.EDMStochastic().plan(ss.VP(), grid)
    assert [row.node for row in raised.rows if row.node is not None] == list(range(7))


def test_restart_repeats_its_steps_as_often_as_given() -> None:
    sde = ss.EDM()
    grid = ss.grids.karras(sde, 8)
    plan = ss.solvers.Restart(ss.EDMHeun(), 0.5, 5.0, repeats=2).plan(sde, grid)
    assert plan.rows == ss.EDMHeun().plan(sde, ss.grids.restart(sde, grid, 0.5, 5.0, 2)).rows
    assert plan.draws == 2 and plan.nfe > ss.EDMHeun().plan(sde, grid).nfe
    order = weak_order(ss.solvers.Restart(ss.EDMHeun(), sde.t_of_lam(0.5), sde.t_of_lam(-0.5), 2), sde, steps=(40, 80))
    assert abs(order.slope - 2) < 0.15, order


def test_consistency_sampling_jumps_to_data_and_back() -> None:
    plan = ss.solvers.ConsistencySampling().plan(ss.Flow(), [1.0, 0.6, 0.2, 0.0])
    assert [(row.d, row.z) for row in plan.rows[1:]] == [
        (((0, 0.4),), ((0, 0.6),)),
        (((1, 0.8),), ((1, 0.2),)),
        (((2, 1.0),), ()),
    ]
    assert point_mass_defect(plan, ss.Flow()) < 1e-15


def test_each_sample_may_have_its_own_grid() -> None:
    sde = ss.VP()
    grids = torch.stack([ss.grids.karras(sde, 5, rho=rho) for rho in (3.0, 7.0)], 1)
    x = ss.Noise(0).normal((2, 3), 0, dtype=torch.float64)
    model = ss.GaussianMixture(sde, torch.zeros(1, 3), std=0.5)
    for solver in (
        ss.DDIM(wave),
        ss.solvers.SEEDS(3, eta=wave),
        ss.solvers.SASolver(2, 2, wave),
        ss.solvers.DPMPPSDE(),
        ss.solvers.EDMStochastic(4.0, 0.0, math.inf),
    ):
        both = run(solver.plan(sde, grids), model.x0, x, DRAWN)
        for b in range(2):
            alone = run(solver.plan(sde, grids[:, b]), model.x0, x[b : b + 1], ss.Noise(3, offset=b))
            assert relative(both[b : b + 1], alone) < 1e-11, solver


def test_stochasticity_can_be_fitted() -> None:
    """A gradient with respect to η, against a difference."""
    sde = ss.VP()
    grid = ss.grids.karras(sde, 4, t_end=0.05)

    def variance(eta: Tensor) -> Tensor:
        plan = ss.SDEDPMSolverPP(2, eta=lambda t: eta * (1 + t)).plan(sde, grid)
        return exact_moments(plan, sde, spectrum=0.3).variance[0]

    eta = torch.tensor(0.8, **F64, requires_grad=True)
    (slope,) = torch.autograd.grad(variance(eta), eta)
    h = 1e-5
    difference = (variance(torch.tensor(0.8 + h, **F64)) - variance(torch.tensor(0.8 - h, **F64))) / (2 * h)
    assert float(slope) == pytest.approx(float(difference), rel=1e-6)


def test_nothing_of_a_trajectory_is_lost_by_rows_that_are_merged() -> None:
    sde = ss.VP()
    plan = ss.solvers.DPMPP2SAncestral().plan(sde, ss.grids.karras(sde, 4))
    assert len(plan.rows) == 2 * 4, "a stage and a node a leg, the last a node alone; the turn is merged"
    model = ss.GaussianMixture(sde, torch.zeros(1, 2), std=0.5)
    seen = [s.t for s in run_steps(plan, model.x0, torch.ones(1, 2, **F64), ss.Noise(0))]
    assert seen == plan.times


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda: ss.DDIM(-0.1), "`eta` must be finite and at least 0, got -0.1"),
        (lambda: ss.DDPM("smal"), "`variance` must be one of .*did you mean 'small'"),
        (lambda: ss.DDPM("optimal"), "`score_square`, .* must be given for `variance`='optimal'"),
        (lambda: Posterior(0.5, "large"), "`variance`='large' requires `eta` = 1, got 0.5"),
        (lambda: ss.solvers.EDMStochastic(s_tmin=2.0, s_tmax=1.0), "`s_tmax` must be at least `s_tmin` = 2, got 1"),
        (lambda: ss.EulerMaruyama(clock="tau"), "`clock` must be one of 't', 'lam'"),
        (
            lambda: ss.DDPM("optimal", torch.ones(2)).plan(ss.VP(), ss.grids.karras(ss.VP(), 4)),
            "per step, got 2 for step 3",
        ),
        (lambda: ss.solvers.Restart(ss.DDIM(), 0.2, 0.5).for_nfe(9), "`nfe` = 9 cannot be .* give `steps`"),
        (lambda: ss.solvers.SEEDS(4), "`order` must be one of 1, 2, 3, got 4"),
        (lambda: ss.solvers.ERSDE(4), "`order` must be one of 1, 2, 3, got 4"),
        (lambda: ss.SDEDPMSolverPP(2, "published"), "`order` must be one of 3, got 2"),
        (lambda: TwoStage(r=1.0), "`r` must be .*below 1"),
        (lambda: ss.DDIM(lambda t: -1.0).plan(ss.VP(), [1.0, 0.5]), "`eta` must be finite and at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_refused(bad: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bad()
