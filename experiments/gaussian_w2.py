"""Exact Wasserstein errors of every fixed-step sampler on Gaussian textures, with the error split into its parts.

    python experiments/gaussian_w2.py            # a minute on one core; needs scikit-image
    python experiments/gaussian_w2.py --quick    # seconds, for CI; without scikit-image on a made-up spectrum
    python experiments/gaussian_w2.py --spectrum cifar10.npy    # the published table, from the authors' file

The setting is that of Diffusion models for Gaussian distributions: Exact solutions and Wasserstein errors (Pierret &
Galerne, 2025), arXiv:2405.14250: VP with linear β, Gaussian data, the exact score. On such data a plan maps every
eigenvalue of the covariance to the variance of its result, so W2 is exact: no samples, no network.

The data are stationary Gaussian textures on a torus. Their covariance has the eigenvalues |û(k)|²/M of a grey image u
with M pixels: `brick`, `grass` and `gravel` of scikit-image, cut to 64 × 64. Errors are in per cent of the root of the
total variance, as a root mean square over the three textures:

* *truncation*: the marginal at time ε against the data. No sampler changes it.
* *initialisation*: the exact reverse SDE, or flow, from N(0, σ_T²) instead of the marginal at T, at time ε.
* *discretisation*: the sampler started from the marginal at T, against the marginal at time ε.
* *total*: the sampler started from N(0, σ_T²), against the data.

Tables are for the paper's grid (equal steps in t, down to ε = 1e-3) and for the library's quadratic grid down to σ = 0.
With --spectrum, the script prints W2 for the paper's six schemes, with its numbers of steps, beside its numbers.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import scoresde as ss
from scoresde import analysis, solvers
from scoresde.solvers import DATA, Leg, Multistep, Prediction, Solver, Tape

SDE = ss.VP()
TEXTURES = ("brick", "grass", "gravel")


@dataclass
class Options:
    """Options of the command line."""

    size: int = 64
    nfes: str = "50,250,500,1000"
    few: str = "10,20,50,250"
    epsilon: float = 1e-3
    spectrum: str = ""
    out: Path = Path(__file__).parent / "out"
    quick: bool = False


# Two schemes of the paper that are no published solvers of their own.


def _minus_inverse_alpha(lam: Tensor) -> Tensor:
    return -(1 + (-2 * lam).exp()).sqrt()


SCORE = Prediction(
    "score",
    scale=lambda alpha, sigma: alpha,
    p=lambda alpha, sigma: torch.hypot(alpha, sigma) / sigma**2,
    q=lambda alpha, sigma: -alpha * torch.hypot(alpha, sigma) / sigma**2,
    clock=_minus_inverse_alpha,
    lam_of_clock=lambda c: -torch.log(c**2 - 1) / 2,
    slope=lambda c: (1 - c**2) / c,
    needs_signal=True,
)
"""The score of a variance-preserving process, up to its sign."""


@dataclass(frozen=True, repr=False)
class ListedDDPM(Solver):
    """DDPM's step with β = g² Δt, as for a list of β, on the continuous score."""

    order: ClassVar[int] = 1

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        s, t = tape.ends(leg)
        beta = tape.sde.g2(s.t) * (s.t - t.t)
        pull, root = beta / s.sigma**2, (1 - beta).sqrt()
        z = [(tape.draw(tape.span(tape.time(leg.row), leg.t, -1.0)), beta.sqrt())]
        x, d = [(leg.row, (1 - pull) / root)], [(leg.history[0], pull * s.alpha / root)]
        new = tape.append(leg.t, x=x, d=d, z=z, evaluates=leg.evaluates, node=leg.node)
        return new, [new]


PAPER: dict[str, Solver] = {
    "EM": ss.EulerMaruyama(),
    "EI": Multistep(1, SCORE, eta=1.0),
    "DDPM": ListedDDPM(),
    "Euler": solvers.Euler(),
    "Heun": solvers.Heun(),
    "RK4": solvers.RungeKutta4(),
}
STOCHASTIC: dict[str, Solver] = {
    "Euler–Maruyama in t (EM)": ss.EulerMaruyama(),
    "Euler–Maruyama in λ": ss.EulerMaruyama(clock="lam"),
    "exponential, score (EI)": PAPER["EI"],
    "DDPM": ss.DDPM(),
    "DDPM, large variance": ss.DDPM("large"),
    "DDIM(η = 0.5)": ss.DDIM(0.5),
    "reverse diffusion": solvers.ReverseDiffusion(),
    "stochastic Heun in λ": solvers.StochasticHeun(clock="lam"),
    "DPM2 ancestral": solvers.DPM2Ancestral(),
    "DPM++ 2S ancestral": solvers.DPMPP2SAncestral(),
    "DPM++ SDE": solvers.DPMPPSDE(),
    "EDM churn": solvers.EDMStochastic(),
    "SDE-DPM-Solver 2M": solvers.SDEDPMSolver(2),
    "SDE-DPM-Solver++ 1": ss.SDEDPMSolverPP(1),
    "SDE-DPM-Solver++ 2M": ss.SDEDPMSolverPP(2),
    "SDE-DPM-Solver++ 3M": ss.SDEDPMSolverPP(3),
    "SA-Solver": solvers.SASolver(),
    "SA-Solver 3-4, τ = 1": solvers.SASolver(3, 4, 1.0),
    "SEEDS-2, data": solvers.SEEDS(2, DATA),
    "SEEDS-3": solvers.SEEDS(3),
    "ER-SDE 2": solvers.ERSDE(2),
    "ER-SDE 3": solvers.ERSDE(3),
}
DETERMINISTIC: dict[str, Solver] = {
    "Euler in t": solvers.Euler(),
    "Heun in t": solvers.Heun(),
    "midpoint in t": solvers.Midpoint(),
    "RK4 in t": solvers.RungeKutta4(),
    "DDIM": ss.DDIM(),
    "accelerated DDIM": solvers.AcceleratedDDIM(),
    "EDM Heun": ss.EDMHeun(),
    "DPM2": solvers.DPM2(),
    "DPM-Solver 2S": solvers.DPMSolver(2),
    "DPM-Solver 3S": solvers.DPMSolver(3),
    "DPM-Solver++ 2S": ss.DPMSolverPP(2, kind="single"),
    "DPM-Solver++ 2M": ss.DPMSolverPP(2),
    "DPM-Solver++ 3M": ss.DPMSolverPP(3),
    "UniPC-2": ss.UniPC(2),
    "UniPC-3": ss.UniPC(3),
    "DEIS tAB-3": solvers.DEIS(3),
    "LMS": solvers.LMS(),
    "iPNDM": solvers.IPNDM(),
    "RES-3": solvers.RES(3),
    "ETD RK4": solvers.ETDRK4(),
    "VelocityAB-2": ss.VelocityAB(2),
    "VelocityAB-3": ss.VelocityAB(3),
}
SHOWN = (
    "Euler–Maruyama in t (EM)",
    "exponential, score (EI)",
    "DDPM",
    "SDE-DPM-Solver++ 2M",
    "Heun in t",
    "DDIM",
    "DPM-Solver++ 2M",
    "UniPC-3",
    "VelocityAB-3",
)


# Spectra.


@dataclass(frozen=True)
class Data:
    """Eigenvalues of one or more covariances.

    Arguments:
        spectrum: Eigenvalues, (K,).
        weight: Multiplicity of each divided by the total variance of its covariance, (K,); then errors are relative.
        count: Number of covariances.
    """

    spectrum: Tensor
    weight: Tensor
    count: int

    def w2(self, std: Tensor, true_std: Tensor) -> float:
        """Root mean square over the covariances of the W2 distance of centred Gaussians."""
        return math.sqrt(float((self.weight * (std - true_std).square()).sum()) / self.count)


def texture(u: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the covariance of a stationary texture, and how often each occurs, without the mean."""
    values = torch.fft.rfft2(u - u.mean()).abs().square() / u.numel()
    often = torch.full_like(values, 2.0)
    often[:, [0, -1]] = 1.0
    often[0, 0] = 0.0
    return values.flatten(), often.flatten()


def images(options: Options) -> dict[str, Tensor]:
    """Grey textures in [−1, 1]; of scikit-image, or without it, in a quick run, two made-up ones."""
    try:
        from skimage import data
    except ImportError:
        if not options.quick:
            raise SystemExit("needs scikit-image: pip install scikit-image") from None
        print("no scikit-image: noise and a smooth field instead of textures")
        noise = ss.Noise(0).normal((options.size, options.size), 0, dtype=torch.float64)
        return {"noise": noise / 4, "smooth": (noise.cumsum(0) - noise.cumsum(1)) / 50}
    cut = slice(0, options.size)
    return {name: torch.from_numpy(getattr(data, name)()[cut, cut] / 127.5 - 1) for name in TEXTURES}


def textures(options: Options) -> Data:
    spectra, weights = [], []
    for u in images(options).values():
        values, often = texture(u)
        spectra.append(values)
        weights.append(often / (often * values).sum())
    return Data(torch.cat(spectra), torch.cat(weights), len(spectra))


# Errors.


@dataclass(frozen=True)
class Errors:
    """Errors of one plan.

    Arguments:
        discretisation: W2 to the marginal at the last time, started from the marginal at T.
        total: W2 to the data, started from N(0, σ_T²).
        seconds: CPU time of the plan and of one response.
        nfe: Number of evaluations.
    """

    discretisation: float
    total: float
    seconds: float
    nfe: int


def errors(solver: Solver, grid: Tensor, data: Data) -> Errors:
    begin = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few steps, which the table shows
        plan = solver.plan(SDE, grid)
    total = analysis.response(plan, SDE, data.spectrum, start="prior")
    seconds = time.process_time() - begin
    alone = analysis.response(plan, SDE, data.spectrum)
    discretisation = data.w2(alone.variance.sqrt(), alone.true_variance.sqrt())
    return Errors(discretisation, data.w2(total.variance.sqrt(), data.spectrum.sqrt()), seconds, plan.nfe)


def continuous(data: Data, t: float) -> dict[str, float]:
    """Errors that no sampler changes: truncation at time t, and initialisation of the exact SDE and flow."""
    c = data.spectrum
    (a, s), (a_T, s_T) = ((SDE.alpha(v), SDE.sigma(v)) for v in (t, SDE.T))
    here, there = a**2 * c + s**2, a_T**2 * c + s_T**2
    pull = (a_T / a) * here / there  # covariance of x_t and x_T, over the variance of x_T
    flow, sde = here / there * s_T**2, here + pull**2 * (s_T**2 - there)
    true = here.sqrt()
    return {
        "truncation": data.w2(true, c.sqrt()),
        "initialisation, SDE": data.w2(sde.sqrt(), true),
        "initialisation, flow": data.w2(flow.sqrt(), true),
    }


Grid = Callable[[int], Tensor]


def uniform(options: Options) -> Grid:
    return lambda steps: ss.grids.uniform_t(SDE, steps, t_end=options.epsilon)


def quadratic(steps: int) -> Tensor:
    return ss.grids.quadratic_vp(SDE, steps)


def sweep(grid: Grid, nfes: list[int], data: Data, clean: bool, quick: bool) -> dict[str, list[Errors]]:
    """Errors of all samplers at all budgets."""
    rules = {**STOCHASTIC, **DETERMINISTIC}
    if quick:
        rules = {name: rules[name] for name in SHOWN}
    found: dict[str, list[Errors]] = {}
    for name, rule in rules.items():
        for nfe in nfes:
            solver, steps = rule.for_nfe(nfe, clean=clean)
            found.setdefault(name, []).append(errors(solver, grid(steps), data))
    return found


# Tables.


def shown(value: float) -> str:
    """Three digits, and no more than two after the point."""
    if not math.isfinite(value) or value > 1e4:
        return "diverges"
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.0995 else f"{value:.1g}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def table(found: dict[str, list[Errors]], nfes: list[int], parts: bool) -> str:
    head = ["sampler", *(f"NFE {n}" for n in nfes)]
    head += [*(f"discretisation, {n}" for n in (nfes[0], nfes[-1])), "ms"] if parts else ["ms"]
    lines = []
    for name, row in found.items():
        cells = [shown(100 * e.total) for e in row]
        if parts:
            cells += [shown(100 * e.discretisation) for e in (row[0], row[-1])]
        lines.append([name, *cells, " / ".join(f"{1e3 * e.seconds:.0f}" for e in (row[0], row[-1]))])
    return markdown(head, lines)


def draw(panels: dict[str, dict[str, list[Errors]]], page: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.8), sharey=True)
    for ax, (title, found) in zip(axes, panels.items(), strict=True):
        for name in SHOWN:
            style = "--" if name in STOCHASTIC else "-"
            row = [e for e in found[name] if e.total < 10]
            ax.loglog([e.nfe for e in row], [100 * e.total for e in row], style, marker=".", label=name)
        ax.set(title=title, xlabel="function evaluations")
    axes[0].set_ylabel("W2, % of the data's")
    axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(page, dpi=90)
    plt.close(figure)


# The published table.

# Values for ε = 1e-3, started from p_T and from N(0, I), with 50, 250, 500 and 1000 times.
PUBLISHED: dict[str, tuple[tuple[float, float], ...]] = {
    "EM": ((4.68, 4.68), (0.70, 0.70), (0.40, 0.40), (0.27, 0.27)),
    "EI": ((2.91, 2.91), (0.67, 0.67), (0.41, 0.41), (0.29, 0.29)),
    "DDPM": ((6.74, 6.74), (1.00, 1.00), (0.53, 0.53), (0.32, 0.32)),
    "Euler": ((1.73, 1.79), (0.42, 0.48), (0.27, 0.32), (0.21, 0.25)),
    "Heun": ((0.58, 0.59), (0.13, 0.15), (0.16, 0.18), (0.17, 0.19)),
    "RK4": ((2.60, 2.60), (0.09, 0.12), (0.15, 0.17), (0.17, 0.19)),
}


def published(path: Path) -> str:
    """The paper's table for ε = 1e-3, by plans: n times for a budget of n, and n/4 for RK4.

    The published row of Heun is that of n times, so of 2n − 2 evaluations.
    """
    c = torch.from_numpy(np.load(path)).double().clamp_min(0)
    lines, worst = [], 0.0
    for name, solver in PAPER.items():
        cells = []
        for n, numbers in zip((50, 250, 500, 1000), PUBLISHED[name], strict=True):
            plan = solver.plan(SDE, ss.grids.uniform_t(SDE, n // (4 if name == "RK4" else 1) - 1, t_end=1e-3))
            for start, number in zip(("marginal", "prior"), numbers, strict=True):
                variance = analysis.response(plan, SDE, c, start=start).variance
                value = float((variance.sqrt() - c.sqrt()).square().sum().sqrt())
                worst = max(worst, abs(value - number))
                cells.append(f"{value:.2f} ({number:.2f})")
        lines.append([name, *cells])
    fewer = PAPER["Heun"].plan(SDE, ss.grids.uniform_t(SDE, 24, t_end=1e-3))
    gap = analysis.response(fewer, SDE, c).variance.sqrt() - c.sqrt()
    head = ["scheme", *(f"{n}, {start}" for n in (50, 250, 500, 1000) for start in ("p_T", "N(0, I)"))]
    text = f"{markdown(head, lines)}\n\nlargest difference from the published numbers: {worst:.4f}"
    return f"{text}\nHeun with 25 times, so 48 evaluations, from p_T: {float(gap.square().sum().sqrt()):.2f}"


def main(options: Options) -> dict[str, list[Errors]]:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.spectrum:
        print(published(Path(options.spectrum)))
        return {}
    begin = time.process_time()
    data = textures(options)
    nfes, few = ([int(n) for n in v.split(",")] for v in (options.nfes, options.few))
    fixed = {name: f"{100 * value:.2g} %" for name, value in continuous(data, options.epsilon).items()}
    paper = sweep(uniform(options), nfes, data, clean=False, quick=options.quick)
    ours = sweep(quadratic, few, data, clean=True, quick=options.quick)
    text = (
        f"{markdown(list(fixed), [list(fixed.values())])}\n\nEqual steps in t down to {options.epsilon:g}:\n\n"
        f"{table(paper, nfes, parts=True)}\n\nQuadratic grid down to σ = 0:\n\n{table(ours, few, parts=False)}\n\n"
        f"{time.process_time() - begin:.0f} s of CPU\n"
    )
    print(text)
    (options.out / "gaussian-w2.md").write_text(text)
    panels = {f"equal steps in t, to {options.epsilon:g}": paper, "quadratic grid, to σ = 0": ours}
    draw(panels, options.out / "gaussian-w2.png")
    return paper


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small, for CI")
    options = Options(**vars(parser.parse_args()))
    if options.quick:
        options.size, options.nfes, options.few = 16, "20", "10"
    return options


if __name__ == "__main__":
    main(parse())
