"""Every scheduler of diffusers that samples a network without noise, with every grid and the options that matter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from _trained import scheduler
from torch import Tensor

warnings.filterwarnings("ignore", module="diffusers")
diffusers.utils.logging.set_verbosity_error()

SPACINGS = {name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")}
SIGMAS = {name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}
EVERY = {**SPACINGS, **SIGMAS}
LU = {"lu": {"use_lu_lambdas": True}}

# Class, options of the solver, and grids that the class has.
DISCRETE: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "DDIM": ("DDIMScheduler", {"clip_sample": False}, SPACINGS),
    "Euler": ("EulerDiscreteScheduler", {}, SIGMAS),
    "Heun": ("HeunDiscreteScheduler", {}, EVERY),
    "KDPM2": ("KDPM2DiscreteScheduler", {}, {**SPACINGS, "karras": SIGMAS["karras"]}),
    "LMS": ("LMSDiscreteScheduler", {}, EVERY),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}, SPACINGS),
    "2M": ("DPMSolverMultistepScheduler", {"solver_order": 2}, {**EVERY, **LU}),
    "2M heun": ("DPMSolverMultistepScheduler", {"solver_order": 2, "solver_type": "heun"}, EVERY),
    "2M, order 2 to the end": ("DPMSolverMultistepScheduler", {"solver_order": 2, "lower_order_final": False}, EVERY),
    "2M, Euler at the end": ("DPMSolverMultistepScheduler", {"solver_order": 2, "euler_at_final": True}, EVERY),
    "3M": ("DPMSolverMultistepScheduler", {"solver_order": 3}, {**EVERY, **LU}),
    "3M, order 3 to the end": ("DPMSolverMultistepScheduler", {"solver_order": 3, "lower_order_final": False}, EVERY),
    "2S": ("DPMSolverSinglestepScheduler", {"solver_order": 2}, SIGMAS),
    "3S": ("DPMSolverSinglestepScheduler", {"solver_order": 3}, SIGMAS),
    "UniPC-2": ("UniPCMultistepScheduler", {"solver_order": 2}, EVERY),
    "UniPC-2 bh1": ("UniPCMultistepScheduler", {"solver_order": 2, "solver_type": "bh1"}, EVERY),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}, EVERY),
    "UniPC-3 bh1": ("UniPCMultistepScheduler", {"solver_order": 3, "solver_type": "bh1"}, EVERY),
    "UniPC-3, order 3 to the end": (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "lower_order_final": False},
        SPACINGS,
    ),
    "UniPC-4": ("UniPCMultistepScheduler", {"solver_order": 4}, EVERY),
    "UniPC-2 noise": ("UniPCMultistepScheduler", {"solver_order": 2, "predict_x0": False}, SPACINGS),
    "DEIS-2": ("DEISMultistepScheduler", {"solver_order": 2}, EVERY),
    "DEIS-3": ("DEISMultistepScheduler", {"solver_order": 3}, EVERY),
}
SHIFTS = {f"shift {shift:g}": {"shift": shift} for shift in (1.0, 2.0, 3.0, 5.0)}
FLOW_SHIFTS = {name: {"flow_shift": value["shift"]} for name, value in SHIFTS.items()}
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW: dict[str, tuple[str, dict[str, Any], dict[str, dict[str, Any]]]] = {
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}, {**SHIFTS, **SIGMAS}),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}, SHIFTS),
    "2M": ("DPMSolverMultistepScheduler", {**_FLOW, "solver_order": 2}, FLOW_SHIFTS),
    "3M": ("DPMSolverMultistepScheduler", {**_FLOW, "solver_order": 3}, FLOW_SHIFTS),
    "UniPC-2": ("UniPCMultistepScheduler", {**_FLOW, "solver_order": 2}, FLOW_SHIFTS),
    "UniPC-2 bh1": ("UniPCMultistepScheduler", {**_FLOW, "solver_order": 2, "solver_type": "bh1"}, FLOW_SHIFTS),
    "UniPC-3": ("UniPCMultistepScheduler", {**_FLOW, "solver_order": 3}, FLOW_SHIFTS),
    "UniPC-4": ("UniPCMultistepScheduler", {**_FLOW, "solver_order": 4}, FLOW_SHIFTS),
    "DEIS-2": ("DEISMultistepScheduler", {**_FLOW, "solver_order": 2}, FLOW_SHIFTS),
    "DEIS-3": ("DEISMultistepScheduler", {**_FLOW, "solver_order": 3}, FLOW_SHIFTS),
}
TWO_STAGES = ("Heun", "KDPM2", "FlowMatchHeun")


@dataclass(frozen=True)
class Peer:
    """A scheduler of diffusers with its options.

    Arguments:
        solver: Name of the solver.
        grid: Name of the grid.
        cls: Name of the class.
        options: Options of the class, without those of the network's own scheduler.
    """

    solver: str
    grid: str
    cls: str
    options: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        return f"{self.solver}, {self.grid}"

    def made(self, kind: str) -> Any:
        """The scheduler for a network of this kind.

        Arguments:
            kind: Name of the network's schedule.
        """
        own = dict(scheduler(kind).config)
        own.pop("_use_default_values", None)  # `from_config` drops what is named there, also if it is given anew
        if "flow" in kind:
            own = {"num_train_timesteps": own["num_train_timesteps"]}
        return getattr(diffusers, self.cls).from_config({**own, **dict(self.options)})

    def calls(self, budget: int) -> int:
        """Number of steps for a budget of evaluations."""
        return (budget + 1) // 2 if self.solver in TWO_STAGES else budget


def peers(kind: str) -> Iterator[Peer]:
    """All schedulers for a network of this kind."""
    for solver, (cls, options, grids) in (FLOW if "flow" in kind else DISCRETE).items():
        for grid, more in grids.items():
            yield Peer(solver, grid, cls, tuple({**options, **more}.items()))


@torch.no_grad()
def run(net: torch.nn.Module, own: Any, steps: int, x: Tensor) -> tuple[Tensor, int]:
    """The loop of diffusers' pipelines: samples and the number of evaluations.

    Arguments:
        net: Network.
        own: Scheduler.
        steps: Number of steps.
        x: Normals, (B, *event).
    """
    own.set_timesteps(steps)
    x = x * getattr(own, "init_noise_sigma", 1.0)
    for t in own.timesteps:
        scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        x = own.step(net(scaled, t).sample, t, x).prev_sample
    return x, len(own.timesteps)
