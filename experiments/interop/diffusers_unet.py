"""UNets that diffusers trained on MNIST: the same steps as its schedulers, and our default beside its best.

    python experiments/interop/diffusers_unet.py            # minutes on two cores
    python experiments/interop/diffusers_unet.py --quick    # seconds, for CI

The script trains three networks by the loop of diffusers' examples (ε on linear β, v on cosine β, flow matching), and
loads each with `ss.interop.from_diffusers`. From the same states at T it then prints

- the largest difference of the final images between schedulers of diffusers and the solver of ours that takes the same
  steps, on the scheduler's own times (`ss.grids.from_scheduler`), relative to the largest pixel
  (`same_steps.py` does so for every scheduler);
- the distance to a fine solve and the Fréchet distance of our default at 10 evaluations, and of diffusers' schedulers
  at 10, 20 and 50, each with its default spacing and "trailing". The best of them in hindsight is marked.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import torch
from _judging import from_command_line, judge, table, write
from _mnist import Judge, load
from _trained import QUICK, Recipe, diffusers_network, scheduler
from torch import Tensor

import scoresde as ss

# The pairs that take the same steps with the defaults of both; the page of schedulers has the options for the others.
SAME = ("DDIM", "DPM-Solver++(2M)", "UniPC-2", "FlowMatchEuler")

KINDS = ("epsilon, linear", "v, cosine", "velocity, flow")

DISCRETE: dict[str, tuple[str, dict[str, Any], ss.solvers.Solver]] = {
    "DDIM": ("DDIMScheduler", {}, ss.DDIM()),
    "Euler": ("EulerDiscreteScheduler", {}, ss.DDIM()),
    "Heun": ("HeunDiscreteScheduler", {}, ss.EDMHeun()),
    "DPM-Solver++(2M)": ("DPMSolverMultistepScheduler", {}, ss.DPMSolverPP(2)),
    "DPM-Solver++(3M)": ("DPMSolverMultistepScheduler", {"solver_order": 3}, ss.DPMSolverPP(3)),
    "UniPC-2": ("UniPCMultistepScheduler", {}, ss.UniPC(2)),
    "UniPC-3": ("UniPCMultistepScheduler", {"solver_order": 3}, ss.UniPC(3)),
    "DEIS": ("DEISMultistepScheduler", {}, ss.solvers.DEIS(2)),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}, ss.solvers.PLMS()),
}
FLOW: dict[str, tuple[str, dict[str, Any], ss.solvers.Solver]] = {
    "FlowMatchEuler": ("FlowMatchEulerDiscreteScheduler", {}, ss.DDIM()),
    "FlowMatchHeun": ("FlowMatchHeunDiscreteScheduler", {}, ss.solvers.Heun()),
}


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 64
    fine: int = 200
    quick: bool = False


def made(kind: str, name: str, spacing: str | None = None) -> Any:
    """A scheduler of diffusers for a network of this kind."""
    base = scheduler(kind)
    cls, options, _ = {**DISCRETE, **FLOW}[name]
    given = {**options, **({} if spacing is None else {"timestep_spacing": spacing})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # options of one scheduler that another does not have
        return getattr(diffusers, cls).from_config({**base.config, **given})


@torch.no_grad()
def theirs(net: torch.nn.Module, own: Any, steps: int, x: Tensor) -> tuple[Tensor, int]:
    """The loop of diffusers' pipelines: samples and the number of evaluations."""
    own.set_timesteps(steps)
    x = x * getattr(own, "init_noise_sigma", 1.0)
    for t in own.timesteps:
        scaled = own.scale_model_input(x, t) if hasattr(own, "scale_model_input") else x
        x = own.step(net(scaled, t).sample, t, x).prev_sample
    return x, len(own.timesteps)


def same_steps(kind: str, net: torch.nn.Module, x: Tensor, steps: int = 10) -> list[str]:
    """Rows: a scheduler, our solver, and the difference of their final images."""
    rows = []
    for name in SAME:
        if (name in FLOW) != ("flow" in kind):
            continue
        solver = {**DISCRETE, **FLOW}[name][2]
        own = made(kind, name)
        model = ss.interop.from_diffusers(net, own)
        ends, _ = theirs(net, own, steps, x)
        grid = ss.grids.from_scheduler(model, steps, own)
        ours = ss.sample(model, x.double(), solver, grid=grid)
        gap = float((ours - ends).abs().max() / ends.abs().max())
        rows.append(f"| {kind} | {name} | `{solver!r}` | {gap:.1e} |")
    return rows


def beside(kind: str, net: torch.nn.Module, x: Tensor, fine: int, jury: Judge) -> str:
    """Our default at 10 evaluations, and diffusers' schedulers at 10, 20 and 50."""
    model = ss.interop.from_diffusers(net, scheduler(kind))
    reference = ss.sample(model, x, ss.UniPC(3), steps=fine)
    samplers: list[tuple[str, int, Callable[[], Tensor]]] = [("default", 10, partial(ss.sample, model, x, nfe=10))]
    for name in FLOW if "flow" in kind else DISCRETE:
        for spacing in (None,) if "flow" in kind else (None, "trailing"):
            for budget in (10, 20, 50):
                steps = (budget + 1) // 2 if "Heun" in name else budget
                calls = theirs(lambda x, t: NOTHING, made(kind, name, spacing), steps, x[:1])[1]
                draw = partial(theirs, net, made(kind, name, spacing), steps, x)
                label = name if spacing is None else f"{name}, {spacing}"
                samplers.append((label, calls, lambda draw=draw: draw()[0]))
    rows = judge(samplers, reference, jury)
    kept = [rows[0]]
    for budget in (10, 20, 50):
        at = [row for row in rows[1:] if budget - 1 <= row.nfe <= budget + 1]
        by_error, by_frechet = (min(at, key=lambda row, k=key: getattr(row, k)) for key in ("error", "frechet"))
        kept.append(replace(by_error, name=f"{by_error.name} (smallest error of {len(at)})"))
        kept.append(replace(by_frechet, name=f"{by_frechet.name} (smallest Fréchet distance of {len(at)})"))
    return table(kept)


class NOTHING:
    """An output without a network, to count calls."""

    sample = torch.zeros(1, 1, 28, 28)


def main(options: Options) -> str:
    data = load()
    jury = Judge(data, steps=20 if options.quick else 600)
    x = torch.randn(options.samples, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    lines = ["| network | diffusers | ours | largest relative difference |", "| --- | --- | --- | ---: |"]
    judged = []
    for kind in KINDS:
        net = diffusers_network(kind, QUICK if options.quick else Recipe())
        lines += same_steps(kind, net, x[:4])
        judged += ["", f"{kind}:", "", beside(kind, net, x, options.fine, jury)]
    floor = f"floor of the Fréchet distance at {options.samples} samples: {jury.floor(options.samples)}"
    return write("diffusers_unet", [*lines, *judged, "", floor])


if __name__ == "__main__":
    main(from_command_line(Options, __doc__.splitlines()[0], {"samples": 4, "fine": 10}))
