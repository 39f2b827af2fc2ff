"""Fits with 24 trajectories and 40 iterations on networks that diffusers' code trained, beside diffusers' schedulers.

    python experiments/interop/fitted_networks.py          # 8 minutes on an idle core, without the training
    python experiments/interop/fitted_networks.py --quick  # seconds, for CI

Two UNets are trained on MNIST by the loop of diffusers' examples. For each of them and each number of evaluations the
script runs ``ss.fit(n, model, x, teacher=fine, steps=40)`` with 24 initial states x and the ends of a fine solve from
them; the fit chooses its start among several plans. The fitted plan, the default and the common schedulers of diffusers
with all their grids then run from 24 other states. The error of a sample is its distance per pixel to a fine solve of
the same network; the table has the median over the samples, the root mean square, and both as ratios to the smallest
error of diffusers' schedulers, each measure by itself.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import partial

import torch
from _judging import from_command_line, write
from _schedulers import peers, run
from _trained import QUICK, Recipe, diffusers_network, scheduler
from torch import Tensor

import scoresde as ss

COMMON = ("DDIM", "2M", "3M", "UniPC-2", "UniPC-2 bh1", "UniPC-3", "DEIS-2")
HEAD = (
    "| network | evaluations | best of diffusers | median; RMSE | default / best | fit / best | fit: median; RMSE "
    "| the fit began from | iterations | seconds |"
)


@dataclass
class Options:
    """Options of the command line."""

    kinds: str = "epsilon, linear;v, cosine"
    nfes: str = "5,8"
    samples: int = 24
    trajectories: int = 24
    steps: int = 40
    fine: int = 150
    quick: bool = False


def measures(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Median and root mean square of the distances per pixel; infinite if a sample is not finite."""
    gap = (x.double() - truth).flatten(1).square().mean(1).sqrt().nan_to_num(nan=math.inf)
    return float(gap.median()), float(gap.square().mean().sqrt())


def best_of_diffusers(
    kind: str, net: torch.nn.Module, x: Tensor, truth: Tensor, n: int, quick: bool
) -> tuple[str, float, float]:
    """Name of the scheduler with the smallest median, and the smallest of both errors."""
    found = []
    for peer in [p for p in peers(kind) if p.solver in COMMON][:: 20 if quick else 1]:
        try:
            y, calls = run(net, peer.made(kind), peer.calls(n), x)
        except (IndexError, AssertionError, ValueError, RuntimeError):  # too few steps for this scheduler
            continue
        if calls <= n:
            found.append((str(peer), *measures(y, truth)))
    median, rmse = (min(found, key=lambda row, k=k: row[k]) for k in (1, 2))
    return median[0], median[1], rmse[2]


def rows(kind: str, options: Options) -> list[str]:
    """Rows of the table for a network."""
    net = diffusers_network(kind, QUICK if options.quick else Recipe())
    model = ss.interop.from_diffusers(net, scheduler(kind))
    x = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * model.sde.sigma(model.sde.T)
    fine = partial(ss.sample, model, solver=ss.VelocityAB(2), grid=ss.grids.power_t(model.sde, options.fine, 1.5))
    x, to_fit = x[: options.samples], x[-options.trajectories :]
    truth, teacher = fine(x).double(), fine(to_fit)
    lines = []
    for n in map(int, options.nfes.split(",")):
        name, median, rmse = best_of_diffusers(kind, net, x, truth, n, options.quick)
        default = measures(ss.sample(model, x, nfe=n), truth)
        began = time.process_time()
        plan = ss.fit(n, model, to_fit, teacher=teacher, steps=options.steps)
        spent = time.process_time() - began
        fitted = measures(ss.sample(model, x, plan), truth)
        lines.append(
            f"| {kind} | {n} | {name} | {median:.3g}; {rmse:.3g} | {default[0] / median:.2f}; {default[1] / rmse:.2f} "
            f"| {fitted[0] / median:.2f}; {fitted[1] / rmse:.2f} | {fitted[0]:.3g}; {fitted[1]:.3g} "
            f"| `{plan.meta['from']}` | {plan.meta['iterations']} | {spent:.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main(options: Options) -> str:
    torch.set_num_threads(1)
    kinds = options.kinds.split(";")[: 1 if options.quick else None]
    lines = [HEAD, "|:--|--:|:--|--:|--:|--:|--:|:--|--:|--:|"]
    return write("fitted_networks", [*lines, *(line for kind in kinds for line in rows(kind, options))])


if __name__ == "__main__":
    small = {"nfes": "2", "samples": 4, "trajectories": 3, "steps": 1, "fine": 8}
    main(from_command_line(Options, __doc__.splitlines()[0], small))
