"""Grids of other libraries: on them our plans take the steps of their schedulers."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import interop
from scoresde.plan.run import run

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own deprecations

START = ss.Noise(0).normal((4, 2), 0, dtype=torch.float64)


def three(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]], std=[0.5, 0.4, 0.6])


@pytest.mark.parametrize("sde", [ss.VP(), ss.EDM(), ss.Flow(), ss.Discrete(ss.processes.betas("linear", 1000))])
def test_sigmas_are_noise_over_signal(sde: ss.SDE) -> None:
    levels = torch.tensor([10.0, 2.5, 1.0, 0.1], dtype=torch.float64)
    grid = ss.grids.from_sigmas(sde, [*levels.tolist(), 0.0])
    assert grid[-1] == 0 and torch.allclose((-sde.lam(grid[:-1])).exp(), levels, rtol=1e-12)
    largest = math.exp(-sde.lam(sde.T))
    assert ss.grids.from_sigmas(sde, torch.tensor([largest, 1.0]))[0] == pytest.approx(sde.T, rel=1e-6)


def test_bad_sigmas_are_named() -> None:
    with pytest.raises(ValueError, match="`sigmas` must be at most 80, the level σ/α of EDM at T = 80, got 100"):
        ss.grids.from_sigmas(ss.EDM(), [100.0, 1.0])
    with pytest.raises(ValueError, match="none of them negative"):
        ss.grids.from_sigmas(ss.EDM(), [1.0, -1.0])
    with pytest.raises(ValueError, match="rises"):
        ss.grids.from_sigmas(ss.EDM(), [1.0, 2.0])
    with pytest.raises(TypeError, match="`scheduler` must be a scheduler of diffusers, got dict"):
        ss.grids.from_scheduler(ss.VP(), 5, {})
    scheduler = diffusers.DDIMInverseScheduler()
    with pytest.raises(ValueError, match="runs from the data to noise"):
        ss.grids.from_scheduler(interop.sde_from_diffusers(scheduler), 5, scheduler)


SPACINGS = ("linspace", "leading", "trailing")
REMAPS: dict[str, dict[str, Any]] = {
    "labels": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
FIRST_ORDER: dict[str, dict[str, Any]] = {
    "EulerDiscrete": {},
    "DPMSolverMultistep": {"solver_order": 1},
    "DPMSolverSinglestep": {"solver_order": 1},
    "UniPCMultistep": {"solver_order": 1, "disable_corrector": list(range(20))},
    "DEISMultistep": {"solver_order": 1},
    "LMSDiscrete": {},
}


def first_order() -> list[tuple[str, str, str, str]]:
    out = []
    for name, config in FIRST_ORDER.items():
        takes = set(inspect.signature(getattr(diffusers, f"{name}Scheduler")).parameters)
        for spacing in SPACINGS if "timestep_spacing" in takes else ("linspace",):
            for remap, more in REMAPS.items():
                for end in ("zero", "sigma_min") if "final_sigmas_type" in takes else ("",):
                    if set(more) <= takes and config is not None:
                        out.append((name, spacing, remap, end))
    return out


def levels_of(made: Any) -> Tensor:
    return made.sigmas.double()


@pytest.mark.parametrize(("name", "spacing", "remap", "end"), first_order())
def test_ddim_on_the_grid_takes_the_steps_of_a_first_order_scheduler(
    name: str, spacing: str, remap: str, end: str
) -> None:
    config = {**FIRST_ORDER[name], **REMAPS[remap]}
    if "timestep_spacing" in getattr(diffusers, f"{name}Scheduler")().config:
        config["timestep_spacing"] = spacing
    if end:
        config["final_sigmas_type"] = end
    made = getattr(diffusers, f"{name}Scheduler")(**config)
    sde = interop.sde_from_diffusers(made)
    grid = ss.grids.from_scheduler(sde, 8, made)
    made.set_timesteps(8)
    sigmas = levels_of(made)
    assert len(grid) == len(sigmas.unique()), "a last step between equal levels is none"
    assert float(grid[-1]) == (0 if end == "zero" or name == "LMSDiscrete" else 1)
    model = three(sde)
    over = float(made.init_noise_sigma) != 1  # states are x/α
    first = sde.alpha(float(grid[0]))
    state = START / first if over else START
    for i, label in enumerate(made.timesteps):
        t = sde.t_of_lam(-math.log(float(sigmas[i])))
        alpha, sigma = sde.alpha(t), sde.sigma(t)
        x = alpha * state if over else state
        eps = (x - alpha * model.x0(x, t)) / sigma
        state = (
            made.step(eps, label, state).prev_sample.double()
            if name != "LMSDiscrete"
            else made.step(eps, label, state, order=1).prev_sample.double()
        )
    theirs = state * sde.alpha(float(grid[-1])) if over else state
    ours = run(ss.DDIM().plan(sde, grid), model.x0, START)
    # Levels of theirs are float32, near the data of differences of 1 and ᾱ.
    assert float((theirs - ours).norm() / ours.norm()) < 2e-4


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", ["DDIM", "DDPM", "TCD", "CogVideoXDDIM", "LCM"])
def test_labels_are_times_minus_one(name: str, spacing: str) -> None:
    config = {"timestep_spacing": spacing} if name not in ("LCM", "TCD") else {}
    made = getattr(diffusers, f"{name}Scheduler")(**config)
    sde = interop.sde_from_diffusers(made)
    grid = ss.grids.from_scheduler(sde, 10, made)
    made.set_timesteps(10)
    assert (grid[:-1] - 1).tolist() == made.timesteps.tolist()
    assert grid[-1] == (1 if name == "TCD" else 0), "the last step of TCD goes to label 0"
    if "set_alpha_to_one" in made.config:
        at_label = getattr(diffusers, f"{name}Scheduler")(**config, set_alpha_to_one=False)
        end = ss.grids.from_scheduler(sde, 10, at_label)[-1]
        assert end == (0 if name == "LCM" else 1), "the last step of LCM returns the data prediction"


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("remap", REMAPS)
def test_stages_of_a_step_are_no_nodes(name: str, spacing: str, remap: str) -> None:
    config = {"timestep_spacing": spacing, **REMAPS[remap]}
    made = getattr(diffusers, f"{name}Scheduler")(**config)
    sde = interop.sde_from_diffusers(made)
    grid = ss.grids.from_scheduler(sde, 8, made)
    made.set_timesteps(8)
    assert len(grid) == 9 and grid[-1] == 0
    levels = (-sde.lam(grid[:-1])).exp()
    theirs = made.sigmas.double().unique().flip(0)[:-1]
    assert torch.allclose(levels, theirs, rtol=1e-3)
    if remap == "labels" and name == "HeunDiscrete" and spacing != "linspace":
        assert (grid[:-1] - 1).tolist() == made.timesteps[::2].tolist()


def test_pndm_repeats_a_label_and_adds_stages() -> None:
    for skip in (True, False):
        made = diffusers.PNDMScheduler(skip_prk_steps=skip)
        sde = interop.sde_from_diffusers(made)
        grid = ss.grids.from_scheduler(sde, 10, made)
        assert grid.tolist() == [*range(901, 0, -100)] if grid[-1] == 1 and len(grid) == 10 else False


FLOWS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("FlowMatchEulerDiscrete", {}, {}),
    "shift": ("FlowMatchEulerDiscrete", {"shift": 3.0}, {}),
    "dynamic": ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}, {"mu": 0.9}),
    "dynamic, linear": (
        "FlowMatchEulerDiscrete",
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"mu": 0.9},
    ),
    "terminal": ("FlowMatchEulerDiscrete", {"shift_terminal": 0.1}, {}),
    "karras": ("FlowMatchEulerDiscrete", {"use_karras_sigmas": True}, {}),
    "exponential": ("FlowMatchEulerDiscrete", {"use_exponential_sigmas": True}, {}),
    "beta": ("FlowMatchEulerDiscrete", {"use_beta_sigmas": True}, {}),
    "inverted": ("FlowMatchEulerDiscrete", {"invert_sigmas": True}, {}),
    "Heun": ("FlowMatchHeunDiscrete", {"shift": 2.0}, {}),
    "map": ("FlowMapEulerDiscrete", {"shift": 2.0}, {}),
    "UniPC": (
        "UniPCMultistep",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {},
    ),
    "DPM": (
        "DPMSolverMultistep",
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
        {},
    ),
}


@pytest.mark.parametrize("case", FLOWS)
def test_times_of_flows_are_their_sigmas(case: str) -> None:
    name, config, more = FLOWS[case]
    made = getattr(diffusers, f"{name}Scheduler")(**config)
    sde = interop.sde_from_diffusers(made)
    before = made.timesteps.clone()
    grid = ss.grids.from_scheduler(sde, 6, made, **more)
    assert torch.equal(made.timesteps, before), "the scheduler of the user is not changed"
    made.set_timesteps(6, **more)
    sigmas = made.sigmas.double()
    want = (1 - sigmas if case == "inverted" else sigmas).unique().flip(0)
    assert len(grid) == 7 and torch.equal(grid, want)
    assert torch.equal(ss.grids.from_scheduler(sde, None, made), want)


def test_levels_and_angles_of_the_others() -> None:
    made = diffusers.EDMEulerScheduler()
    model = interop.from_diffusers(lambda x, t: x, made)
    grid = ss.grids.from_scheduler(model, 10, made)
    assert torch.allclose(grid, ss.grids.karras(ss.EDM(), 10), rtol=1e-5) and float(grid[0]) == pytest.approx(80)
    made = diffusers.CMStochasticIterativeScheduler()
    assert len(ss.grids.from_scheduler(interop.sde_from_diffusers(made), 10, made)) == 11
    made = diffusers.IPNDMScheduler()
    grid = ss.grids.from_scheduler(ss.processes.Trig(), 10, made)
    made.set_timesteps(10)
    assert torch.equal(grid[:-1], made.timesteps.double()) and grid[-1] == 0
    made = diffusers.SCMScheduler()
    grid = ss.grids.from_scheduler(interop.sde_from_diffusers(made), 2, made)
    assert grid.tolist() == pytest.approx([1.0, math.sin(1.3) / (math.sin(1.3) + math.cos(1.3)), 0.0], abs=1e-5)
    made = diffusers.DDPMWuerstchenScheduler()
    grid = ss.grids.from_scheduler(interop.sde_from_diffusers(made), 10, made)
    assert torch.allclose(grid[1:], torch.linspace(0.9, 0, 10).double(), atol=1e-6)
    made = diffusers.ScoreSdeVeScheduler()
    sde = interop.sde_from_diffusers(made)
    grid = ss.grids.from_scheduler(sde, 10, made)
    made.set_timesteps(10)
    made.set_sigmas(10)
    assert torch.allclose(grid[:-1], made.sigmas.double(), rtol=1e-5) and grid[-1] == 0


def test_a_grid_of_a_scheduler_is_an_option_of_sample() -> None:
    made = diffusers.DDIMScheduler(timestep_spacing="trailing")
    sde = interop.sde_from_diffusers(made)
    x = ss.sample(three(sde), (2, 2), ss.DDIM(), grid=ss.grids.from_scheduler(sde, 5, made), seed=0)
    want = ss.sample(three(sde), (2, 2), ss.DDIM(), grid=ss.grids.index_grid(sde, 5, "trailing"), seed=0)
    assert torch.equal(x, want)
