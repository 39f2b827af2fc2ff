"""Error of posterior samples for every kind of measurement noise, and for many observations of one parameter.

    python experiments/measurements.py [--quick]

The first part draws a state from a mixture in two dimensions, measures it with each kind of noise, and samples the
posterior with DPS, PiGDM, TMPD and MMPS where they accept the noise. The exact posterior is a mixture for Gaussian
noise, and otherwise comes from a fine grid. The second part composes the posterior of n observations from those of the
single ones, with GAUSS, JAC and FNPE, for a Gaussian, a mixture and a uniform prior; the exact posterior has a closed
form. Both print the sliced 2-Wasserstein distance to the exact posterior, divided by the posterior's standard deviation
per coordinate, and the floor: that of as many exact samples. Results go to experiments/out.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.inverse import Measurement, TallPosterior

F64 = torch.float64
SDE = ss.VP()
DOUBLE = ss.Start(dtype=F64)
OUT = Path(__file__).parent / "out"
EYE = inverse.Mask(torch.tensor([True, True]))
MEANS = torch.tensor([[-1.0, 0.3], [1.0, -0.2], [0.2, 1.2]], dtype=F64)


def draw(k: int, *shape: int) -> Tensor:
    return ss.Noise(5).normal(shape, k, dtype=F64)


def distance(x: Tensor, y: Tensor) -> float:
    """Sliced W2 over the standard deviation of y per coordinate."""
    x = x.nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3)
    return ss.metrics.sliced_w2(x, y, 64) / math.sqrt(float(y.var(0).mean()))


# Kinds of noise.

PRIOR = ss.GaussianMixture(SDE, MEANS, std=0.4)
KINDS: dict[str, Callable[[Tensor], Measurement]] = {
    "one std": lambda y: Measurement(EYE, y, 0.5),
    "std of each entry": lambda y: Measurement(EYE, y, torch.tensor([0.2, 0.9])),
    "covariance": lambda y: Measurement(EYE, y, cov=torch.tensor([[0.5, 0.4], [0.4, 0.5]])),
    "second not measured": lambda y: Measurement(EYE, y, torch.tensor([0.3, torch.inf])),
    "Laplace": lambda y: inverse.Laplace(EYE, y, 0.4),
    "Student, ν = 2": lambda y: inverse.StudentT(EYE, y, 0.4, df=2.0),
    "rounded to 1": lambda y: inverse.Rounded(EYE, y, 1.0, 0.2),
    "censored above 0.5": lambda y: inverse.Censored(EYE, y, 0.3, high=0.5),
    "counts": lambda y: inverse.Counts(inverse.Operator(lambda x: 4 * (x + 3), (2,)), y),
}
METHODS: dict[str, tuple[Any, Any]] = {
    "DPS": (inverse.DPS, ss.DDPM()),
    "PiGDM": (lambda model, seen: inverse.PiGDM(model, seen, data_std=0.9), ss.VelocityAB(3)),
    "TMPD": (inverse.TMPD, ss.VelocityAB(3)),
    "MMPS": (inverse.MMPS, ss.VelocityAB(3)),
}


def on_grid(seen: Measurement, n: int, seed: int, points: int = 500) -> Tensor:
    """Samples of the posterior from its values on a grid, uniform in the cells."""
    edge = torch.linspace(-4, 4, points, dtype=F64)
    x = torch.cartesian_prod(edge, edge)
    noise = ss.Noise(seed)
    cells = (PRIOR.log_prob(x) + seen.log_prob(x)).softmax(0).cumsum(0)
    rows = torch.searchsorted(cells, noise.uniform((n, 1), 0, dtype=F64)[:, 0]).clamp_max(len(x) - 1)
    return x[rows] + (edge[1] - edge[0]) * (noise.uniform((n, 2), 1, dtype=F64) - 0.5)


def kinds_of_noise(n: int, steps: int, states: int) -> dict[str, dict[str, float]]:
    """Error of every method for every kind of noise, the mean over some states."""
    table: dict[str, dict[str, float]] = {}
    for kind, make in KINDS.items():
        found: dict[str, list[float]] = {}
        for k in range(states):
            theta = PRIOR.sample(1, seed=20 + k)
            seen = make(make(torch.zeros(1, 2, dtype=F64)).simulate(theta, seed=30 + k))
            exact, other = (on_grid(seen, n, seed) for seed in (1, 2))
            found.setdefault("floor", []).append(distance(other, exact))
            for name, (method, solver) in METHODS.items():
                try:
                    model = method(PRIOR, seen)
                except TypeError:  # the method has no formula for this noise
                    found.setdefault(name, []).append(math.nan)
                    continue
                many = steps * 4 if name == "DPS" else steps
                x = ss.sample(model, (n, 2), solver, steps=many, seed=3, start=DOUBLE)
                found.setdefault(name, []).append(distance(x, exact))
        table[kind] = {name: sum(values) / len(values) for name, values in found.items()}
        print(f"{kind:22}", "  ".join(f"{name} {value:.2f}" for name, value in table[kind].items()), flush=True)
    return table


# Many observations.


class Single(ss.denoisers.AbstractDenoiser):
    """Posterior of θ given one observation N(x_o; θ, s²), from the exact denoiser of the prior on a VE process.

    The state and the observation together are a normal density of θ with precision α²/σ² + 1/s².
    """

    def __init__(self, prior: ss.denoisers.AbstractDenoiser, s: float) -> None:
        super().__init__(SDE)
        self.prior, self.s = prior, s

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        alpha, sigma = (torch.as_tensor(fn(t), dtype=F64).reshape(-1, 1) for fn in (self.sde.alpha, self.sde.sigma))
        precision = (alpha / sigma) ** 2 + self.s**-2
        mean = (alpha / sigma**2 * x + cond["x_o"] / self.s**2) / precision
        return self.prior.x0(mean, precision.rsqrt().flatten().expand(len(x)))


def truncated(mean: Tensor, std: float, n: int, seed: int) -> Tensor:
    """Samples of a normal distribution in [−1, 1]², by inversion."""
    low, high = (torch.special.ndtr((edge - mean) / std) for edge in (-1.0, 1.0))
    u = ss.Noise(seed).uniform((n, 2), 0, dtype=F64)
    return mean + std * torch.special.ndtri(low + (high - low) * u)


def case(prior: str, n: int, s: float, samples: int) -> tuple[Any, dict[str, Tensor], Any, Callable[[int], Tensor]]:
    """Model, observations, prior and exact samples for n observations θ + s noise."""
    wide = ss.EDM(T=1e4, t_min=1e-6)
    if prior == "uniform":
        rows = torch.tensor([[0.7, -0.4]], dtype=F64) + s * draw(1, n, 2)
        box = torch.distributions.Independent(torch.distributions.Uniform(-torch.ones(2), torch.ones(2)), 1)
        model = Single(inverse.as_prior(wide, box), s)
        return model, {"x_o": rows}, box, lambda seed: truncated(rows.mean(0), s / math.sqrt(n), samples, seed)
    law = PRIOR if prior == "mixture" else ss.GaussianMixture(SDE, torch.zeros(1, 2), std=1.0)
    rows = law.sample(1, seed=4) + s * draw(1, n, 2)
    exact = inverse.posterior(law, [Measurement(EYE, row[None], s) for row in rows])
    return Single(law.under(wide), s), {"x_o": rows}, law, lambda seed: exact.sample(samples, seed=seed)


def annealed(tall: TallPosterior, samples: int, n: int, levels: int) -> Tensor:
    """Langevin steps at falling noise levels, for scores that are not those of a diffusion."""
    grid = ss.grids.karras(SDE, levels).tolist()[:-1]
    x = SDE.sigma(grid[0]) / math.sqrt(n) * draw(7, samples, 2)
    for k, t in enumerate(grid):
        x = ss.sampling.langevin(tall, x, t, 0.3 * SDE.sigma(t) ** 2 / n, 10, seed=k).clamp(-1e6, 1e6)
    return x


def many_observations(samples: int, steps: int, numbers: list[int]) -> dict[tuple[str, str], list[float]]:
    """Error of every method by the number of observations."""
    table: dict[tuple[str, str], list[float]] = {}
    for prior in ("Gaussian", "mixture", "uniform"):
        for n in numbers:
            model, observations, law, exact = case(prior, n, 1.0, samples)
            truth = exact(1)
            row = {"floor": distance(exact(2), truth)}
            for method in inverse.tall.METHODS:
                if method != "gauss" and n > 30:  # many evaluations of each single posterior
                    row[method] = math.nan
                    continue
                began = time.perf_counter()
                tall = TallPosterior(model, observations, law, method=method, samples=200, steps=12)
                if method == "fnpe":
                    x = annealed(tall, samples, n, steps)
                else:
                    x = ss.sample(tall, (samples, 2), ss.VelocityAB(3), steps=steps, seed=3, start=DOUBLE)
                row[method] = distance(x, truth)
                print(
                    f"{prior:9} n = {n:2}  {method:5} {row[method]:7.2f}  {time.perf_counter() - began:5.1f} s",
                    flush=True,
                )
            for name, value in row.items():
                table.setdefault((prior, name), []).append(value)
    return table


# Tables and figure.


def cell(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}" if value < 100 else "diverges"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def figure(noise: dict[str, dict[str, float]], tall: dict[tuple[str, str], list[float]], numbers: list[int]) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    picture, axes = plt.subplots(1, 4, figsize=(14, 3.8), width_ratios=(1.5, 1, 1, 1))
    for k, name in enumerate(("DPS", "PiGDM", "TMPD", "MMPS", "floor")):
        values = [noise[kind].get(name, math.nan) for kind in noise]
        axes[0].plot(range(len(noise)), values, "osD^_"[k], color=f"C{k}" if name != "floor" else "black", label=name)
    axes[0].set_xticks(range(len(noise)), list(noise), rotation=35, ha="right", fontsize=7)
    axes[0].set_ylim(bottom=0)
    axes[0].set_title("kinds of noise: sliced W2, relative", fontsize=9)
    axes[0].legend(fontsize=7)
    for ax, prior in zip(axes[1:], ("Gaussian", "mixture", "uniform"), strict=True):
        for name in (*inverse.tall.METHODS, "floor"):
            style = "k--" if name == "floor" else "o-"
            ax.loglog(numbers, [min(v, 30) for v in tall[prior, name]], style, ms=4, label=name)
        ax.set_xlabel("observations")
        ax.set_title(f"{prior} prior", fontsize=9)
    axes[1].legend(fontsize=7)
    picture.tight_layout()
    picture.savefig(OUT / "measurements.svg")
    plt.close(picture)


def main(quick: bool) -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    n, steps, states, numbers = (60, 8, 1, [2, 4]) if quick else (300, 20, 2, [2, 8, 30, 90])
    noise = kinds_of_noise(n, steps, states)
    tall = many_observations(n, steps, numbers)
    names = ["floor", *METHODS]
    text = markdown(["noise", *names], [[kind, *(cell(row[name]) for name in names)] for kind, row in noise.items()])
    lines = [[prior, name, *map(cell, values)] for (prior, name), values in tall.items()]
    text += "\n" + markdown(["prior", "method", *(f"n = {k}" for k in numbers)], lines)
    print("\n" + text)
    (OUT / "measurements.md").write_text(text)
    figure(noise, tall, numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small, for CI")
    main(parser.parse_args().quick)
