"""UNets that diffusers trained on MNIST: the same steps as its schedulers.

    python experiments/interop/diffusers_unet.py            # minutes on two cores
    python experiments/interop/diffusers_unet.py --quick    # seconds, for CI

The script trains three networks by the loop of diffusers' examples (ε on linear β, v on cosine β, flow matching). It
loads each with `ss.interop.from_diffusers`. From the same states at T it then prints the largest difference of the
final images between schedulers of diffusers and the solver of ours that takes the same steps, on the scheduler's own
times (`ss.grids.from_scheduler`), relative to the largest pixel. `same_steps.py` does so for every scheduler, and
`defaults.py` compares our defaults with the schedulers of diffusers.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from _judging import from_command_line, write
from _schedulers import run
from _trained import QUICK, Recipe, diffusers_network, scheduler
from torch import Tensor

import scoresde as ss

KINDS = ("epsilon, linear", "v, cosine", "velocity, flow")

# The pairs that take the same steps with the defaults of both; the page of schedulers has the options for the others.
SOLVERS: dict[str, tuple[str, ss.solvers.Solver]] = {
    "DDIM": ("DDIMScheduler", ss.DDIM()),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", ss.DPMSolverPP(2)),
    "UniPC-2": ("UniPCMultistepScheduler", ss.UniPC(2)),
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", ss.DDIM()),
}


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 10
    quick: bool = False


def made(kind: str, name: str) -> Any:
    """A scheduler of diffusers for a network of this kind."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options of one scheduler that another does not have
        return getattr(diffusers, SOLVERS[name][0]).from_config(scheduler(kind).config)


def same_steps(kind: str, net: torch.nn.Module, x: Tensor, steps: int = 10) -> list[str]:
    """Rows: a scheduler, our solver, and the difference of their final images."""
    rows = []
    for name, (_, solver) in SOLVERS.items():
        if ("Flow" in name) != ("flow" in kind):
            continue
        own = made(kind, name)
        model = ss.interop.from_diffusers(net, own)
        ends, _ = run(net, own, steps, x)
        grid = ss.grids.from_scheduler(model, steps, own)
        ours = ss.sample(model, x.double(), solver, grid=grid)
        gap = float((ours - ends).abs().max() / ends.abs().max())
        rows.append(f"| {kind} | {name} | `{solver!r}` | {gap:.1e} |")
    return rows


def main(options: Options) -> str:
    x = torch.randn(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    lines = ["| network | diffusers | ours | largest relative difference |", "| --- | --- | --- | ---: |"]
    for kind in KINDS:
        net = diffusers_network(kind, QUICK if options.quick else Recipe())
        lines += same_steps(kind, net, x, options.steps)
    return write("diffusers_unet", lines)


if __name__ == "__main__":
    main(from_command_line(Options, __doc__.splitlines()[0], {"steps": 10}))
