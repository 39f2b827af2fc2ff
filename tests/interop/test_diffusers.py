"""Our plans against the schedulers of diffusers: the same steps where those are right, and where not, who converges.

Both run on the same times of the same discrete process, with the exact denoiser of a mixture in float64. The
schedulers keep their levels or their states in float32, which is all that 1e-5 allows for.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde.analysis.orders import exact_flow
from scoresde.analysis.orders import uneven_lam as uneven
from scoresde.grids.spacings import index_grid
from scoresde.plan.run import run
from scoresde.plan.table import Plan
from scoresde.solvers.interpolants import DATA, NOISE, VELOCITY
from scoresde.solvers.rule import Solver
from scoresde.solvers.runge_kutta import HEUN, RungeKutta
from scoresde.solvers.single_step import SingleStep

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own deprecations

F64 = {"dtype": torch.float64}
LINEAR = ss.Discrete(ss.processes.betas("linear", 1000))
EVERY = torch.arange(1000) + 1.0  # the time of each label
START = ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)


def three(sde: ss.SDE) -> ss.GaussianMixture:
    means = [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]]
    return ss.GaussianMixture(sde, means, std=[0.5, 0.4, 0.6], weights=[1.0, 2.0, 1.5])


MODEL = three(LINEAR)


def noise(model: ss.denoisers.AbstractDenoiser, x: Tensor, t: float) -> Tensor:
    alpha, sigma = model.sde.alpha(t), model.sde.sigma(t)
    return (x - alpha * model.x0(x, t)) / sigma


def scheduler(name: str, steps: int, **config: Any) -> Any:
    """A scheduler on our β list, with ᾱ in float64 instead of float32."""
    made = getattr(diffusers, f"{name}Scheduler")(trained_betas=list(LINEAR.betas), **config)
    made.alphas_cumprod = LINEAR.alpha(EVERY.double()) ** 2
    if not config.get("set_alpha_to_one", True):
        made.final_alpha_cumprod = made.alphas_cumprod[0]
    made.set_timesteps(steps)
    if isinstance(getattr(made, "sigmas", None), Tensor):  # ρ = σ/α at the same labels, unrounded
        levels = torch.cat([(1 / made.alphas_cumprod - 1).sqrt().flip(0), made.sigmas.new_zeros(1)])
        nearest = (levels - made.sigmas.double()[:, None]).abs().argmin(1)
        made.sigmas = levels[nearest]
    return made


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---------------------------------------------------------------------------------------------------------------------
# 1. The same steps
# ---------------------------------------------------------------------------------------------------------------------

FULL = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}  # ends at label 0, which is our t = 1
CLEAN = {"final_sigmas_type": "zero"}  # ends at our t = 0
UNCLIPPED = {"clip_sample": False}
Case = tuple[str, dict[str, Any], Solver, float]  # name, configuration, our rule, where it ends


def same_steps() -> list[Case]:
    out: list[Case] = []
    for spacing in ("leading", "trailing"):
        out.append(("DDIM", {"timestep_spacing": spacing, **UNCLIPPED}, ss.DDIM(), 0.0))
    out.append(("DDIM", {"set_alpha_to_one": False, **UNCLIPPED}, ss.DDIM(), 1.0))
    dpm = "DPMSolverMultistep"
    for kind, ours in (("dpmsolver++", ss.DPMSolverPP), ("dpmsolver", ss.solvers.DPMSolver)):
        for theirs, form in (("midpoint", "mid"), ("heun", "exact")):
            config = {"algorithm_type": kind, "solver_type": theirs}
            out.append((dpm, {**config, **FULL}, ours(2, kind="multi", form=form), 1.0))
            if kind == "dpmsolver++":
                out.append((dpm, {**config, **CLEAN}, ours(2, kind="multi", form=form), 0.0))
        out.append((dpm, {"algorithm_type": kind, "solver_order": 1, **FULL}, ss.DDIM(), 1.0))
        config = {"algorithm_type": kind, "solver_order": 3}
        out.append((dpm, {**config, **FULL}, ours(3, kind="multi", form="published"), 1.0))
    for p in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            for prediction in (DATA, NOISE):
                config = {"solver_order": p, "solver_type": variant, "predict_x0": prediction is DATA}
                out.append(("UniPCMultistep", {**config, **FULL}, ss.UniPC(p, variant, prediction), 1.0))
        none = list(range(20))
        config = {"solver_order": p, "disable_corrector": none}
        out.append(("UniPCMultistep", {**config, **FULL}, ss.UniPC(p, corrector=False), 1.0))
        config = {"solver_order": p, "lower_order_final": False}
        out.append(("DEISMultistep", config, ss.solvers.DEIS(p, "lam"), 1.0))
    for p in (1, 2):  # only the last step is of order 1, as ours
        out.append(("UniPCMultistep", {"solver_order": p, **CLEAN}, ss.UniPC(p), 0.0))
    out.append(
        ("PNDM", {"skip_prk_steps": True, "set_alpha_to_one": False}, replace(ss.solvers.PLMS(), improved=True), 1.0)
    )
    out.append(("PNDM", {"skip_prk_steps": False, "set_alpha_to_one": False}, ss.solvers.PNDM(), 1.0))
    out.append(("EulerDiscrete", {}, ss.DDIM(), 0.0))
    out.append(("EulerDiscrete", {"final_sigmas_type": "sigma_min"}, ss.DDIM(), 1.0))
    out.append(("HeunDiscrete", {}, ss.EDMHeun(), 0.0))
    out.append(("KDPM2Discrete", {}, ss.solvers.DPM2(), 0.0))
    out.append(("LMSDiscrete", {}, ss.solvers.LMS(4), 0.0))
    return out


def name(case: Case) -> str:
    values = [str(v) for v in case[1].values() if not isinstance(v, list)]
    return " ".join([case[0], *values, f"to {case[3]:g}"])


def over_alpha(made: Any) -> bool:
    """Whether its states are x/α, of noise levels σ/α."""
    return float(made.init_noise_sigma) != 1


def labels(made: Any) -> list[int]:
    """The labels it goes through, without those of its stages."""
    return [int(k) for k in getattr(made, "_timesteps", made.timesteps) if k == round(float(k))]


def follow(made: Any, model: ss.denoisers.AbstractDenoiser, x: Tensor) -> Tensor:
    """Run a scheduler on the exact noise of a model."""
    scaled = over_alpha(made)
    t, state = float(made.timesteps[0]) + 1, x
    if scaled:
        state = x / model.sde.alpha(t)
    for k in made.timesteps:
        t = float(k) + 1
        if not getattr(made, "state_in_first_order", True) and hasattr(made, "sigmas_interpol"):
            # DPM-2 asks between two labels, at a level in float32 and a label by interpolation: here at the level
            t = model.sde.t_of_lam(-math.log(float(made.sigmas_interpol[made.step_index])))
        eps = noise(model, model.sde.alpha(t) * state if scaled else state, t)
        state = made.step(eps, k, state).prev_sample.double()
    return state


@pytest.mark.parametrize("case", same_steps(), ids=name)
def test_a_plan_takes_the_steps_of_the_scheduler(case: Case) -> None:
    kind, config, rule, end = case
    made = scheduler(kind, 10, **config)
    times = sorted({*(k + 1.0 for k in labels(made)), end}, reverse=True)
    theirs = follow(made, MODEL, START)
    ours = run(rule.plan(LINEAR, times), MODEL.x0, START)
    if over_alpha(made):
        theirs = LINEAR.alpha(end) * theirs
    assert relative(theirs, ours) < 1e-5


@pytest.mark.parametrize(("kind", "eta"), [("DDPM", 1.0), ("DDIM", 1.0), ("DDIM", 0.4)])
def test_ancestral_steps_on_the_same_normals(kind: str, eta: float, monkeypatch: pytest.MonkeyPatch) -> None:
    made = scheduler(kind, 10, timestep_spacing="leading", **UNCLIPPED)
    z = [ss.Noise(1).normal((4, 2), k, dtype=torch.float64) for k in range(10)]
    state = START
    for j, k in enumerate(made.timesteps.tolist()):
        eps = noise(MODEL, state, k + 1.0)
        if kind == "DDIM":
            state = made.step(eps, k, state, eta=eta, variance_noise=z[j]).prev_sample
        else:
            module = inspect.getmodule(type(made))
            monkeypatch.setattr(module, "randn_tensor", lambda *args, j=j, **kwargs: z[j])
            state = made.step(eps, k, state).prev_sample
    zigzag = ss.grids.ancestral(LINEAR, index_grid(LINEAR, 10, "leading"), eta)
    ours = run(ss.DDIM().plan(LINEAR, zigzag), MODEL.x0, START, ss.Noise(1))
    assert relative(state, ours) < 1e-5


SINGLE = [
    (kind, prediction, order, theirs)
    for kind, prediction in (("dpmsolver++", DATA), ("dpmsolver", NOISE))
    for order, theirs in ((2, "midpoint"), (2, "heun"), (3, "heun"))
]


@pytest.mark.parametrize(("kind", "prediction", "order", "theirs"), SINGLE)
def test_single_steps_with_their_stages_at_labels(kind: str, prediction: Any, order: int, theirs: str) -> None:
    config = {"algorithm_type": kind, "solver_order": order, "solver_type": theirs, **FULL}
    made = scheduler("DPMSolverSinglestep", 12, **config)
    times = [*(float(k) + 1 for k in made.timesteps), 1.0]
    plan: Plan | None = None
    for i in range(0, 12, order):  # each step has its own fractions, so its own rule
        lam = [LINEAR.lam(t) for t in times[i : i + order + 1]]
        r = tuple((v - lam[0]) / (lam[-1] - lam[0]) for v in lam[1:-1])
        form = {"moments": ("exact", "mid")} if theirs == "midpoint" else {"reads": tuple(range(order))}
        step = SingleStep(order, prediction, r=r, **form).plan(LINEAR, [times[i], times[i + order]])
        plan = step if plan is None else plan.join(step)
    assert plan is not None and plan.nfe == 12
    assert relative(follow(made, MODEL, START), run(plan, MODEL.x0, START)) < 1e-5


@pytest.mark.parametrize(("kind", "rule"), [("EDMEuler", ss.DDIM()), ("EDMDPMSolverMultistep", ss.DPMSolverPP(2))])
def test_edm_schedulers_on_the_output_of_the_network(kind: str, rule: Solver) -> None:
    sde, steps, data = ss.EDM(), 12, 0.5
    made = getattr(diffusers, f"{kind}Scheduler")(sigma_min=0.002, sigma_max=80.0, sigma_data=data)
    made.set_timesteps(steps)
    grid = ss.grids.karras(sde, steps, t_min=0.002)
    torch.testing.assert_close(made.sigmas.double(), grid, rtol=1e-5, atol=0)  # theirs is a 7th power in float32
    made.sigmas = grid
    model, x = three(sde), 80.0 * START
    ours = run(rule.plan(sde, grid), model.x0, x)
    for k, s in zip(made.timesteps, grid.tolist(), strict=False):
        skip, out = data**2 / (s**2 + data**2), s * data / math.hypot(s, data)
        x = made.step((model.x0(x, s) - skip * x) / out, k, x).prev_sample.double()
    assert relative(x, ours) < 1e-5


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("FlowMatchEuler", ss.DDIM()), ("FlowMatchHeun", RungeKutta(HEUN, VELOCITY)), ("UniPCMultistep", ss.UniPC(2))],
)
def test_flow_schedulers_on_the_velocity(kind: str, rule: Solver) -> None:
    sde = ss.Flow()
    multi = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if kind == "UniPCMultistep" else {}
    made = getattr(diffusers, f"{kind}{'' if multi else 'Discrete'}Scheduler")(**multi)
    made.set_timesteps(10)
    sigmas = made.sigmas.tolist()  # σ is our time; UniPC starts at 1 − 1e-6, for it divides by α
    model, x = three(sde), START
    ours = run(rule.plan(sde, sorted(set(sigmas), reverse=True)), model.x0, x)
    for k, s in zip(made.timesteps, sigmas, strict=False):
        x = made.step((x - model.x0(x, s)) / s, k, x).prev_sample.double()
    assert relative(x, ours) < 1e-5


def test_ipndm_on_its_own_angle() -> None:
    sde = ss.Trig()
    made = diffusers.IPNDMScheduler()
    made.set_timesteps(12)
    sigma = (torch.linspace(1, 0, 13, dtype=torch.float64) * math.pi / 2).sin() ** 2
    made.betas, made.alphas = sigma, (1 - sigma**2).sqrt()
    times = [
        sde.t_of_lam(math.log(a / b)) for a, b in zip(made.alphas.tolist()[1:], sigma.tolist()[1:], strict=True) if b
    ]
    made.set_begin_index(1)  # at α = 0 it leaves the data out
    model, x = three(sde), START
    ours = run(ss.solvers.IPNDM(4).plan(sde, [*times, 0.0]), model.x0, x)
    for k, t in zip(made.timesteps[1:], times, strict=True):
        v = sde.alpha(t) * noise(model, x, t) - sde.sigma(t) * model.x0(x, t)
        x = made.step(v, k, x).prev_sample.double()
    assert relative(x, ours) < 1e-5


# ---------------------------------------------------------------------------------------------------------------------
# 2. Where they are not right: what differs, and who converges to the exact flow
# ---------------------------------------------------------------------------------------------------------------------


@cache
def truth() -> Tensor:
    """Where START flows to by label 0."""
    return exact_flow(MODEL, 300)(START, 1000.0, 1.0)


@pytest.mark.parametrize(("kind", "rule"), [("dpmsolver++", ss.DPMSolverPP), ("dpmsolver", ss.solvers.DPMSolver)])
def test_their_third_order_multistep_is_of_order_two(kind: str, rule: Any) -> None:
    """It takes half of the second derivative. All history is exact here, so no start is to blame."""
    sde = ss.VP()
    model = ss.GaussianMixture(sde, [[0.4, -0.7]], std=torch.tensor([[0.3, 1.7]], **F64))
    first, last = sde.t_of_lam(-2.5), sde.t_of_lam(2.0)
    start = sde.sigma(first) * ss.Noise(0).normal((64, 2), 0, dtype=torch.float64)  # the orders are those of a median
    exact = model.flow(start, first, last)
    errors: list[list[float]] = [[], []]
    for n in (80, 160):
        grid = uneven(sde, n, t_start=first, t_end=last)
        times = grid.tolist()
        states = [model.flow(start, first, t) if t != first else start for t in times[:3]]
        made = diffusers.DPMSolverMultistepScheduler(solver_order=3, algorithm_type=kind, **FULL)
        made.set_timesteps(n)
        made.sigmas = (-sde.lam(grid)).exp()
        for i in (0, 1):
            made._step_index = i
            eps = noise(model, states[i], times[i])
            made.model_outputs[i + 1] = made.convert_model_output(eps, sample=states[i])
        made._step_index, made.lower_order_nums, x = 2, 2, states[2]
        for k, t in zip(made.timesteps[2:], times[2:], strict=False):
            x = made.step(noise(model, x, t), k, x).prev_sample.double()
        ours = run(rule(3, kind="multi", form="exact", start="self").plan(sde, grid), model.x0, start)
        for distances, end in zip(errors, (x, ours), strict=True):
            distances.append(float((end - exact).norm(dim=1).median()))
    theirs, mine = (math.log2(a / b) for a, b in errors)
    assert abs(theirs - 2) < 0.2 and mine > 2.8, errors
    assert errors[0][1] > 4 * errors[1][1]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_their_bh1_is_not_a_number_at_data(order: int) -> None:
    """B(h) = h is infinite on the step into σ = 0, and times 0 there. Ours returns the data prediction."""
    made = scheduler("UniPCMultistep", 10, solver_order=order, solver_type="bh1", final_sigmas_type="zero")
    assert not follow(made, MODEL, START).isfinite().any()
    gaps = []
    for n in (20, 80):
        times = [float(k) + 1 for k in scheduler("UniPCMultistep", n).timesteps]
        ours = run(ss.UniPC(order, "bh1").plan(LINEAR, [*times, 0.0]), MODEL.x0, START)
        gaps.append(relative(ours, MODEL.x0(truth(), 1.0)))
    assert gaps[1] < gaps[0] / 3, gaps


@pytest.mark.parametrize("order", [2, 3])
def test_their_unipc_needs_lower_orders_before_data(order: int) -> None:
    """Without them it has no result; ours lowers the order where there is a reason, into σ = 0 alone."""
    config = {"solver_order": order, "lower_order_final": False, "final_sigmas_type": "zero"}
    made = scheduler("UniPCMultistep", 10, **config)
    try:  # at order 3 it solves a singular system: linear algebra raises, or returns what is no number
        assert not follow(made, MODEL, START).isfinite().any()
    except RuntimeError:
        assert order == 3
    times = [float(k) + 1 for k in made.timesteps]
    plan = ss.UniPC(order).plan(LINEAR, [*times, 0.0])
    assert run(plan, MODEL.x0, START).isfinite().all()
    assert [len(row.d) for row in plan.rows[-2:]] == [order + 1, 1], "the last corrected row, and the one into data"


def test_their_trailing_labels_are_ours_or_one_too_many() -> None:
    """They count a float step: where that rounds there is one label too many, and it is −1."""
    made = diffusers.DPMSolverMultistepScheduler(timestep_spacing="trailing")
    for n in range(1, 1001):
        made.set_timesteps(n)
        times = index_grid(LINEAR, n, "trailing")
        assert len(times) == n + 1 and times[-1] == 0
        if len(made.timesteps) != n:
            assert len(made.timesteps) == n + 1 and int(made.timesteps[-1]) == -1
        else:
            assert (made.timesteps + 1 - times[:-1]).abs().max() <= 1, "halves are rounded after its float step"


def test_their_ddim_does_not_go_to_the_next_label() -> None:
    """It goes to k − ⌊N/n⌋, which is not the grid's next label for even labels from 999 to 0: no steps converge."""
    theirs, ours = [], []
    for n in (60, 120, 240):
        made = scheduler("DDIM", n, timestep_spacing="linspace", set_alpha_to_one=False, **UNCLIPPED)
        times = [k + 1.0 for k in labels(made)]
        theirs.append(relative(follow(made, MODEL, START), truth()))
        ours.append(relative(run(ss.DDIM().plan(LINEAR, times), MODEL.x0, START), truth()))
    limits = [2 * errors[2] - errors[1] for errors in (theirs, ours)]  # without the part of order 1
    assert limits[0] > 0.005 > 20 * abs(limits[1]), (theirs, ours)
    assert all(abs(math.log2(a / b) - 1) < 0.1 for a, b in pairwise(ours)), ours


def test_third_order_deis_converges_where_theirs_cancels_in_float32() -> None:
    """Its weights are differences of antiderivatives of log σ, rounding on short steps. Ours are quadratures."""
    theirs, ours = [], []
    for n in (50, 200, 400):
        made = diffusers.DEISMultistepScheduler(
            solver_order=3, trained_betas=list(LINEAR.betas), lower_order_final=False
        )
        made.set_timesteps(n)
        times = [*(float(k) + 1 for k in made.timesteps), 1.0]
        theirs.append(relative(follow(made, MODEL, START), truth()))
        ours.append(relative(run(ss.solvers.DEIS(3, "lam").plan(LINEAR, times), MODEL.x0, START), truth()))
    assert ours[0] > 10 * ours[1] > 50 * ours[2], ours
    assert ours[2] < 1e-4
    assert theirs[2] > 10 * ours[2], "how large its error is depends on the machine; that rounding is in it does not"


@pytest.mark.parametrize("n", [10, 20, 50])
def test_their_karras_levels_evaluate_at_another_noise(n: int) -> None:
    """Labels are rounded, levels are not: the network is evaluated at a σ/α that the state does not have."""
    made = diffusers.DPMSolverMultistepScheduler(trained_betas=list(LINEAR.betas), use_karras_sigmas=True)
    made.set_timesteps(n)
    at_label = (-LINEAR.lam(made.timesteps.double() + 1)).exp()
    gap = (at_label / made.sigmas[:-1].double() - 1).abs().max()
    assert float(gap) > 0.01
    times = ss.grids.karras(LINEAR, n)
    evaluated_at: list[float] = []
    plan = ss.DPMSolverPP(2).plan(LINEAR, times)
    run(plan, lambda x, t: evaluated_at.append(t) or MODEL.x0(x, t), START)  # type: ignore[func-returns-value]
    ours = torch.tensor([math.exp(-LINEAR.lam(t)) for t in evaluated_at])
    torch.testing.assert_close(ours.float(), made.sigmas[:-1], rtol=2e-4, atol=0)


def test_their_levels_are_products_in_float32() -> None:
    made = diffusers.DDPMScheduler(trained_betas=list(LINEAR.betas))
    exact = 1 - np.prod(1 - np.longdouble(LINEAR.betas[0]))
    theirs = float(1 - made.alphas_cumprod[0].double())
    assert abs(LINEAR.sigma(1.0) ** 2 / float(exact) - 1) < 1e-12
    assert abs(theirs / float(exact) - 1) < 2**-24 / float(exact), "a float32 unit below 1, in units of 1e-4"
    zero = diffusers.DPMSolverMultistepScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    zero.set_timesteps(10)
    assert math.isfinite(float(zero.sigmas[0])), "where no signal is left it has some"
    ours = ss.Discrete(ss.processes.zero_terminal_snr(ss.processes.betas("linear", 1000)))
    assert ours.alpha(1000.0) == 0 and ours.lam(1000.0) == -math.inf


def test_their_flow_shift_is_applied_twice_at_the_data_end() -> None:
    """The lowest level is shifted when the scheduler is made and again with the grid."""
    shift = 3.0

    def shifted(s: float) -> float:
        return shift * s / (1 + (shift - 1) * s)

    made = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    made.set_timesteps(10)
    once, twice = shifted(0.001), shifted(shifted(0.001))
    assert math.isclose(float(made.sigmas[-2]), twice, rel_tol=1e-5) and twice > 2.9 * once
    ours = ss.grids.shifted(ss.Flow(), 9, shift, t_end=once)
    assert float((made.sigmas[:-1] - ours).abs().max()) > 5e-3
    made.sigma_min = 0.001
    made.set_timesteps(10)
    torch.testing.assert_close(made.sigmas[:-1].double(), ours, rtol=1e-5, atol=1e-6)
