"""Grids of the default for ε-networks, judged at many numbers of evaluations: on trained networks and on mixtures.

    python experiments/interop/noise_grids.py                          # 13 to 24 evaluations; minutes of one core
    python experiments/interop/noise_grids.py --nfes 26,32,40,50       # 25 and more
    python experiments/interop/noise_grids.py --quick                  # seconds, for CI

At one number of evaluations, which grid has the smallest error on a network is partly chance. So the script prints the
geometric mean over several numbers: of the median error per pixel on ε-networks that diffusers' loops trained on MNIST
(from 8 states, to a fine solve of the same network), and of the median error on seven mixtures whose ε has a smooth
error of 1 %. Both are divided by the error of the first row, which was the default before. A last table has an ε that
does not depend on x, whose integral is known: nothing later reduces an error of the first steps there.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from _judging import from_command_line, write
from defaults import Network as Trained
from defaults import Options as Defaults
from torch import Tensor

import scoresde as ss
from scoresde.denoisers.base import AbstractDenoiser

sys.path.append(str(Path(__file__).parents[1]))
from _problems import FOR_EPS, PROBLEMS, PROCESSES, Network, solved

MIXTURES = (
    ("ring 2-D", "VP"),
    ("ring 2-D", "EDM"),
    ("anisotropic 32-D", "VP"),
    ("anisotropic 32-D", "EDM"),
    ("few 6-D", "scaled linear"),
    ("tree 16-D", "VP"),
    ("tree 16-D", "cosine"),
)
CORRECTED = {
    "λ": ss.solvers.with_corrector(ss.VelocityAB(2, variable="lam")),
    "τ": ss.solvers.with_corrector(ss.VelocityAB(2)),
    "τ, 3": ss.solvers.with_corrector(ss.VelocityAB(3)),
}


@dataclass
class Options:
    """Options of the command line."""

    nfes: str = "14,15,17,20,22"
    kinds: str = "epsilon, linear;epsilon, scaled linear;epsilon, sigmoid;epsilon, quadratic"
    samples: int = 8
    fine: int = 400
    quick: bool = False


Pair = tuple[str, float, float, float | None]  # variable of the velocity; scale, exponent and power of log_noise


def pairs(nfe: int) -> list[Pair]:
    """Solvers and grids to compare; the first was the default before."""
    before: Pair = ("λ", 0.3, 1.75, None) if nfe < 25 else ("τ, 3", 0.1, 1.0, None)
    return [
        before,
        *((variable, 0.2, k, p) for k, p in ((1.75, 4.0), (2.0, 4.0), (2.0, 7.0)) for variable in ("λ", "τ")),
    ]


def plan(pair: Pair, sde: ss.SDE, nfe: int) -> ss.Plan:
    """The plan of a pair."""
    variable, scale, exponent, power = pair
    return CORRECTED[variable].plan(sde, ss.grids.log_noise(sde, nfe, scale, exponent, power))


def mean_error(model: AbstractDenoiser, x: Tensor, fine: Tensor, pair: Pair, budgets: list[int]) -> float:
    """Geometric mean over the budgets of the median error per entry."""
    logs = []
    for nfe in budgets:
        end = ss.plan.run(plan(pair, model.sde, nfe), model.x0, x)
        logs.append((end.double() - fine).flatten(1).square().mean(1).sqrt().median().log())
    return float(torch.stack(logs).mean().exp())


def constant_error(pair: Pair, nfe: int) -> float:
    """Relative error for ε = 1/(1 + ϱ/5), whose end is the integral of ε over ϱ = σ/α."""
    sde = ss.VP()
    eps = lambda x, t: x * 0 + (1 / (1 + sde.sigma(t) / sde.alpha(t) / 5))[:, None]  # noqa: E731
    model = ss.Denoiser(eps, sde, predicts="eps")
    exact = -5 * math.log1p(sde.sigma(sde.T) / sde.alpha(sde.T) / 5)
    end = ss.plan.run(plan(pair, sde, nfe), model.x0, torch.zeros(1, 1, dtype=torch.float64))
    return abs(float(end) / exact - 1)


def main(options: Options) -> str:
    torch.set_num_threads(1)
    budgets = [int(n) for n in options.nfes.split(",")][: 2 if options.quick else None]
    every = pairs(budgets[0])[: 2 if options.quick else None]
    columns: dict[str, list[float]] = {}
    some = slice(0, 1 if options.quick else None)
    with torch.no_grad():
        for kind in options.kinds.split(";")[some]:
            settings = Defaults(options.samples, options.fine, quick=options.quick)
            network = Trained(kind, settings, jury=None)  # type: ignore[arg-type]
            judge = partial(mean_error, network.model, network.x, network.fine)
            columns[kind] = [judge(pair, budgets) for pair in every]
        ratios = []
        for name, process in MIXTURES[some]:
            model = Network((PROBLEMS | FOR_EPS)[name](PROCESSES[process]), "eps", 0.01)
            judge = partial(mean_error, model, *solved(model, 32, 0))
            errors = [judge(pair, budgets) for pair in every]
            ratios.append(torch.tensor(errors) / errors[0])
        table = torch.stack(ratios)
        means, worst = table.log().mean(0).exp(), table.amax(0)
        lost = [[constant_error(pair, nfe) for nfe in budgets] for pair in every]
    head = ["variable", "scale", "exponent", "power", *columns, "mixtures, mean; largest", "ε without x, largest"]
    lines = ["| " + " | ".join(head) + " |", "| --- " + "| ---: " * (len(head) - 1) + "|"]
    for i, pair in enumerate(every):
        cells = [str(v) if v is not None else "–" for v in pair]
        cells += [f"{errors[i]:.4f} ({errors[i] / errors[0]:.2f})" for errors in columns.values()]
        cells += [f"{means[i]:.2f}; {worst[i]:.2f}", f"{max(lost[i]):.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return write("noise_grids", [f"evaluations: {', '.join(map(str, budgets))}", "", *lines])


if __name__ == "__main__":
    main(from_command_line(Options, __doc__.splitlines()[0], {"samples": 4, "fine": 8}))
