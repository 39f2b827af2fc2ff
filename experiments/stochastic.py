"""Error of stochastic samplers: distance to exact samples against the number of evaluations.

    python experiments/stochastic.py
    python experiments/stochastic.py --quick    # seconds, for CI
    python experiments/stochastic.py --gaussian 0.6    # only the exact standard deviation on Gaussian data of 0.6

The data are two mixtures with exact samples (a ring of eight modes in 2-D, ten anisotropic Gaussians in 32-D), under
VP. For every stochastic solver, two deterministic ones and diffusers' schedulers on a list of a thousand β, the script
measures the sliced Wasserstein-2 and energy distances between samples and exact ones at each budget, from the same
seeds. The floor is the distance between two sets of exact samples of that size: its mean over pairs, and its maximum. A
distance within the floor is not significant with this number of samples.

The script writes a CSV, a table and a figure. With ``--gaussian`` it computes the standard deviation of each solver's
result on Gaussian data instead, from the coefficients, for every process on the default grid with 10, 20 and 40 steps.
"""

from __future__ import annotations

import argparse
import csv
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from work_precision import anisotropic, beta_list, ring

import scoresde as ss
from scoresde import metrics
from scoresde.solvers.interpolants import DATA

PROBLEMS: dict[str, Callable[[ss.SDE], ss.GaussianMixture]] = {"ring 2-D": ring, "anisotropic 32-D": anisotropic}
SDE = ss.VP()


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 2000
    nfes: str = "10,20,50,100"
    floors: int = 4  # number of sets of exact samples
    seed: int = 0
    gaussian: float = 0.0  # standard deviation of Gaussian data; 0 for the mixtures
    out: Path = Path(__file__).parent / "out"
    quick: bool = False


def solvers(quick: bool) -> dict[str, ss.solvers.Solver]:
    some = {
        "DDIM (no noise)": ss.DDIM(),
        "VelocityAB-3 (no noise)": ss.VelocityAB(3),
        "DDPM": ss.DDPM(),
        "SDE-DPM-Solver++ 2M": ss.SDEDPMSolverPP(2),
    }
    if quick:
        return some
    return some | {
        "DDPM, large variance": ss.DDPM("large"),
        "DDIM(η = 0.5)": ss.DDIM(0.5),
        "Euler–Maruyama in t": ss.EulerMaruyama(),
        "Euler–Maruyama in λ": ss.EulerMaruyama(clock="lam"),
        "reverse diffusion": ss.solvers.ReverseDiffusion(),
        "stochastic Heun in λ": ss.solvers.StochasticHeun(clock="lam"),
        "Euler ancestral": ss.solvers.EulerAncestral(),
        "DPM2 ancestral": ss.solvers.DPM2Ancestral(),
        "DPM++ 2S ancestral": ss.solvers.DPMPP2SAncestral(),
        "DPM++ SDE": ss.solvers.DPMPPSDE(),
        "EDM churn": ss.solvers.EDMStochastic(),
        "SDE-DPM-Solver 2M": ss.solvers.SDEDPMSolver(2),
        "SDE-DPM-Solver++ 1": ss.SDEDPMSolverPP(1),
        "SDE-DPM-Solver++ 3M": ss.SDEDPMSolverPP(3),
        "SDE-DPM-Solver++ 2M, η = 0.5": ss.SDEDPMSolverPP(2, eta=0.5),
        "SA-Solver": ss.solvers.SASolver(),
        "SA-Solver 3-4, τ = 1": ss.solvers.SASolver(3, 4, 1.0),
        "SEEDS-2, data": ss.solvers.SEEDS(2, DATA),
        "SEEDS-3": ss.solvers.SEEDS(3),
        "ER-SDE 2": ss.solvers.ERSDE(2),
        "ER-SDE 3": ss.solvers.ERSDE(3),
    }


def ours(model: ss.GaussianMixture, n: int, options: Options) -> Iterator[tuple[str, int, Tensor]]:
    shape = (options.samples, *model.event)
    start = ss.Start(data_std=float(model.covariance().diagonal().mean().sqrt()), dtype=torch.float64)
    for name, solver in solvers(options.quick).items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*is inaccurate with so few steps")  # the table shows it
            solution = ss.solve(model, shape, solver, nfe=n, seed=options.seed, start=start)
        yield name, solution.nfe, solution.x


def theirs(model: ss.GaussianMixture, n: int, options: Options) -> Iterator[tuple[str, int, Tensor]]:
    try:
        import diffusers as d
    except ImportError:
        return
    d.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")
    karras = {"use_karras_sigmas": True}
    table: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
        "DDPM": (d.DDPMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, {}),
        "DDIM(η = 1)": (d.DDIMScheduler, {"clip_sample": False, "timestep_spacing": "trailing"}, {"eta": 1.0}),
        "Euler ancestral": (d.EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}, {}),
        "DPM2 ancestral": (d.KDPM2AncestralDiscreteScheduler, karras, {}),
        "DPM++ SDE": (d.DPMSolverSDEScheduler, {**karras, "noise_sampler_seed": options.seed}, {}),
        "SDE-DPM-Solver++ 2M": (d.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", **karras}, {}),
        "SA-Solver": (d.SASolverScheduler, karras, {}),
    }
    if options.quick:
        table = {name: table[name] for name in ("DDPM", "SDE-DPM-Solver++ 2M")}
    sde = model.sde
    prior = sde.prior(std=float(model.covariance().diagonal().mean().sqrt()))
    for name, (cls, settings, how) in table.items():
        scheduler = cls(trained_betas=beta_list(sde), **settings)
        scheduler.set_timesteps((n + 1) // 2 if name in ("DPM2 ancestral", "DPM++ SDE") else n)
        x = prior.sample((options.samples, *model.event), ss.Noise(options.seed), dtype=torch.float64)
        counts_in_rho = name in ("Euler ancestral", "DPM2 ancestral", "DPM++ SDE")
        if counts_in_rho:
            x = x / sde.alpha(sde.T)
        if "SDE" not in cls.__name__ or name == "SDE-DPM-Solver++ 2M":
            how = {**how, "generator": torch.Generator().manual_seed(options.seed)}
        sigmas = getattr(scheduler, "sigmas", None)
        spent = 0
        for i, label in enumerate(scheduler.timesteps):
            if sigmas is None:
                t = (float(label) + 1) * (sde.T / len(scheduler.betas))
            else:
                lam = -math.log(level(scheduler, i, label))
                t = sde.t_of_lam(min(sde.lam(1e-6), max(sde.lam(sde.T), lam)))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                x = scheduler.step(model.eps(scheduler.scale_model_input(x, label), t), label, x, **how).prev_sample
            spent += 1
        yield f"diffusers {name}", spent, x.double()


def level(scheduler: Any, i: int, label: Tensor) -> float:
    """σ/α of the evaluation number i of a scheduler; schedulers with two stages give it by a fractional label."""
    if type(scheduler).__name__ not in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        return float(scheduler.sigmas[i])
    log_rho = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).double().log() / 2
    low = min(int(label), len(log_rho) - 2)
    return float((log_rho[low] + (label - low) * (log_rho[low + 1] - log_rho[low])).exp())


DISTANCES = {"sliced W2": partial(metrics.sliced_w2, n_projections=256), "energy": metrics.energy_distance}


PROCESSES = {cls.__name__: cls() for cls in (ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.EDM, ss.Flow, ss.Trig)}


def gaussian(options: Options) -> Path:
    """Table of standard deviations on Gaussian data."""
    counts = (10, 20, 40)
    lines = [f"# Standard deviation on Gaussian data of {options.gaussian:g}: {counts} steps", ""]
    lines += ["| solver |" + "".join(f" {name} |" for name in PROCESSES), "|:--|" + "--:|" * len(PROCESSES)]
    for name, solver in solvers(options.quick).items():
        cells = []
        for sde in PROCESSES.values():
            plans = [solver.plan(sde, ss.grids.quadratic_vp(sde, n)) for n in counts]
            found = [ss.analysis.gaussian_stds(plan, sde, [options.gaussian])[0][0] for plan in plans]
            cells.append(" / ".join(f"{v:.3g}" for v in found))
        lines.append(f"| {name} |" + "".join(f" {cell} |" for cell in cells))
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "stochastic-gaussian.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def main(options: Options) -> Path:
    torch.set_grad_enabled(False)
    if options.gaussian:
        return gaussian(options)
    budgets = [int(n) for n in options.nfes.split(",")]
    rows: list[dict[str, Any]] = []
    lines = ["# Stochastic samplers against exact samples", "", f"{options.samples} samples; VP.", ""]
    for problem, make in PROBLEMS.items():
        model = make(SDE)
        sets = [model.sample(options.samples, seed=100 + k) for k in range(options.floors)]
        pairs = list(combinations(sets, 2))
        floor = {}
        for word, distance in DISTANCES.items():
            values = [distance(x, y) for x, y in pairs]
            floor[word] = (sum(values) / len(values), max(values))
        for n in tqdm(budgets, desc=problem, disable=None):
            for side in (ours, theirs):
                for name, spent, x in side(model, n, options):
                    values = {word: distance(x, sets[0]) for word, distance in DISTANCES.items()}
                    rows.append({"problem": problem, "solver": name, "budget": n, "spent": spent, **values})
        lines += [f"## {problem}", ""]
        for word, (mean, largest) in floor.items():
            lines += [f"{word}; floor {mean:.4f}, at most {largest:.4f}", ""]
            lines += ["| solver |" + "".join(f" {n} |" for n in budgets), "|:--|" + "--:|" * len(budgets)]
            names = dict.fromkeys(row["solver"] for row in rows if row["problem"] == problem)
            for name in names:
                values = {r["budget"]: r[word] for r in rows if r["problem"] == problem and r["solver"] == name}
                cells = "".join(f" {values[n]:.4f} |" if n in values else " – |" for n in budgets)
                lines.append(f"| {name} |{cells}")
            lines.append("")
    text = "\n".join(lines)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "stochastic.md").write_text(text + "\n")
    with (options.out / "stochastic.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    page = options.out / "stochastic.png"
    draw(rows, page)
    print(f"\nfigure: {page}")
    return page


def draw(rows: list[dict[str, Any]], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PROBLEMS), figsize=(12, 4.5), squeeze=False)
    shown = (
        "DDPM",
        "Euler–Maruyama in t",
        "DPM++ SDE",
        "EDM churn",
        "SDE-DPM-Solver++ 2M",
        "SEEDS-2, data",
        "ER-SDE 3",
    )
    for ax, problem in zip(axes.flat, PROBLEMS, strict=True):
        for name in dict.fromkeys(row["solver"] for row in rows):
            points = [(r["budget"], r["sliced W2"]) for r in rows if r["problem"] == problem and r["solver"] == name]
            peer, labelled = name.startswith("diffusers"), name in shown
            style: dict[str, Any] = (
                {"label": name, "marker": "."} if labelled else {"color": "C3" if peer else "0.8", "lw": 0.7}
            )
            ax.plot(*zip(*points, strict=True), ls="--" if peer else "-", **style)
        ax.set(xscale="log", yscale="log", title=problem, xlabel="evaluations")
    axes[0, 0].set_ylabel("sliced W2 to exact samples")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few solvers, budgets and samples, for CI")
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(samples=300, nfes="10", floors=2)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
