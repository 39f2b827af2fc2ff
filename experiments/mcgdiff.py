"""Table of MCGDiff: posterior samplers on a mixture of 25 Gaussians, with the exact posterior and its floor.

    python experiments/mcgdiff.py            # eight minutes on one core
    python experiments/mcgdiff.py --published    # the paper's number of steps and its table beside ours
    python experiments/mcgdiff.py --quick    # seconds, for CI

The problem is that of Monte Carlo guided Diffusion for Bayesian linear inverse problems (Cardoso et al., 2023),
arXiv:2308.07983. The prior has 25 Gaussians of unit variance with means (8i, 8j, 8i, 8j, ...), i, j = -2 ... 2, and
weights from squared normals. A has singular values from U(0, 1) and random singular vectors, the noise has the largest
of them times U(0, 1) as standard deviation. The script prints, for every size (d_x, d_y), the sliced W2 distance with
100 directions between the samples of each method and exact samples of the posterior, in the units of the data: mean
over the tasks ± its standard error. "Floor" is the distance of two exact sets.

Nothing is tuned. Each method with an argument for the standard deviation of the data gets the prior's, and each one
starts from the noised moments of the prior. All take 100 evaluations, twisted SMC with as many particles as samples.

`--published` prints the table of the paper (20 steps, means over 20 tasks with intervals of 95 %) beside the
same numbers of this library: 20 evaluations, other random tasks, and the mean of W1 over 100 directions.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.inverse import DDNM, DPS, MMPS, MPGD, TMPD, DiffPIR, Measurement, PiGDM

SDE = ss.VP()
EXACT = "exact h-transform, `posterior`"


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 250
    nfe: int = 100
    sizes: str = "8:1,8:2,8:4,80:1,80:2,80:4,800:1,800:2,800:4"
    tasks: str = "8,4,2"  # number of tasks with d_x up to 10, up to 100, and above
    published: bool = False
    out: Path = Path(__file__).parent / "out"


# Sliced Wasserstein distances that the paper prints, in the order of the sizes.
PAPER = {
    "MCGDiff": "1.43 ± 0.55, 0.49 ± 0.24, 0.38 ± 0.25, 1.39 ± 0.45, 0.67 ± 0.24, 0.28 ± 0.14, 2.40 ± 1.00, "
    "1.31 ± 0.60, 0.47 ± 0.19",
    "DDRM": "5.88 ± 1.16, 5.20 ± 1.32, 2.51 ± 1.29, 5.64 ± 1.10, 7.07 ± 1.35, 7.81 ± 1.48, 7.44 ± 1.15, "
    "8.95 ± 1.12, 8.39 ± 1.48",
    "DPS": "4.86 ± 1.01, 5.79 ± 1.96, 3.48 ± 1.52, 4.98 ± 1.14, 5.10 ± 1.23, 4.28 ± 1.26, 6.49 ± 1.16, "
    "6.88 ± 1.01, 5.51 ± 1.18",
    "RNVP": "9.43 ± 0.99, 8.93 ± 1.29, 6.71 ± 1.54, 6.86 ± 0.88, 7.79 ± 1.50, 7.95 ± 1.61, 7.74 ± 1.34, "
    "8.75 ± 1.02, 7.81 ± 1.63",
}
PUBLISHED = {"samples": 400, "nfe": 20, "tasks": "20,10,2"}


@dataclass(frozen=True)
class Task:
    """A prior and a measurement of one sample of it.

    Arguments:
        prior: Prior.
        seen: Measurement.
        std: Standard deviation of the prior, the root of its mean variance.
        samples: Number of samples.
        nfe: Number of evaluations.
    """

    prior: ss.GaussianMixture
    seen: Measurement
    std: float
    samples: int
    nfe: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.samples, self.prior.event[0]

    @property
    def start(self) -> ss.Start:
        return ss.Start(data_std=self.std, dtype=torch.float64)


def orthogonal(noise: ss.Noise, rows: int, columns: int, draw: int) -> Tensor:
    """Matrix with orthonormal columns, uniform."""
    q, r = torch.linalg.qr(noise.normal((rows, columns), draw, dtype=torch.float64))
    out: Tensor = q * r.diagonal().sign()
    return out


def task(d_x: int, d_y: int, seed: int, options: Options) -> Task:
    """Task number `seed` of a size."""
    noise = ss.Noise(seed)
    pair = 8 * torch.cartesian_prod(torch.arange(-2, 3), torch.arange(-2, 3)).double()
    means = pair.repeat(1, d_x // 2)
    weights = noise.normal((25,), 0, dtype=torch.float64).square()
    prior = ss.GaussianMixture(SDE, means, weights=weights, std=1.0)
    s = noise.uniform((d_y,), 1, dtype=torch.float64).sort(descending=True).values
    A = (orthogonal(noise, d_y, d_y, 2) * s) @ orthogonal(noise, d_x, d_y, 3).T
    std = float(s[0] * noise.uniform((1,), 4, dtype=torch.float64))
    truth = prior.sample(1, seed=noise.fork(5))
    seen = Measurement(inverse.Matrix(A), truth @ A.T + std * noise.normal((1, d_y), 6, dtype=torch.float64), std)
    centred = pair - prior.weights @ pair
    variance = 1 + float((prior.weights @ centred.square()).mean())
    return Task(prior, seen, math.sqrt(variance), options.samples, options.nfe)


# The methods.

Sampler = Callable[[Task], Tensor]


def plain(make: Callable[[Task], ss.denoisers.AbstractDenoiser]) -> Sampler:
    """Sample a posterior denoiser with DPM-Solver++ 2M."""
    return lambda k: ss.sample(make(k), k.shape, ss.DPMSolverPP(2), nfe=k.nfe, seed=1, start=k.start)


def dps(k: Task) -> Tensor:
    grid = ss.grids.quadratic_vp(SDE, k.nfe)
    model = DPS(k.prior, k.seen, inverse.dps_scale(SDE, grid, 0.3), norm=True)
    return ss.sample(model, k.shape, ss.DDPM(), grid=grid, seed=1, start=k.start)


def dps_likelihood(k: Task) -> Tensor:
    return ss.sample(DPS(k.prior, k.seen), k.shape, ss.DDPM(), nfe=k.nfe, seed=1, start=k.start)


def diffpir(k: Task) -> Tensor:
    grid = ss.grids.renoised(SDE, ss.grids.quadratic_vp(SDE, k.nfe), 0.3)
    return ss.sample(DiffPIR(k.prior, k.seen), k.shape, ss.DDIM(), grid=grid, seed=1, start=k.start)


def ddrm(k: Task) -> Tensor:
    return inverse.ddrm(k.prior, k.seen, k.shape, k.nfe, start=k.start, seed=1).x


def daps(k: Task) -> Tensor:
    run = inverse.daps(k.prior, k.seen, k.shape, k.nfe // 5, steps=5, data_std=k.std, start=k.start, seed=1)
    return run.x


def twisted(k: Task) -> Tensor:
    return inverse.twisted_smc(k.prior, k.seen, k.shape, k.nfe, data_std=k.std, start=k.start, seed=1).resampled(1)


METHODS: dict[str, Sampler] = {
    EXACT: plain(lambda k: inverse.posterior(k.prior, k.seen)),
    "`twisted_smc`": twisted,
    "`MMPS`": plain(lambda k: MMPS(k.prior, k.seen)),
    "`TMPD`": plain(lambda k: TMPD(k.prior, k.seen)),
    "`PiGDM`": plain(lambda k: PiGDM(k.prior, k.seen, data_std=k.std)),
    "`PiGDM`, no gradient": plain(lambda k: PiGDM(k.prior, k.seen, data_std=k.std, through_net=False)),
    "`ddrm`": ddrm,
    "`DiffPIR`": diffpir,
    "`daps`": daps,
    "`DPS`, published step": dps,
    "`DPS`, the likelihood's gradient": dps_likelihood,
    "`MPGD`": plain(lambda k: MPGD(k.prior, k.seen)),
    "`DDNM`": plain(lambda k: DDNM(k.prior, k.seen)),
}


# Methods beside those of the paper.
FEW = (
    "`twisted_smc`",
    "`MMPS`",
    "`TMPD`",
    "`PiGDM`",
    "`ddrm`",
    "`DiffPIR`",
    "`daps`",
    "`DPS`, published step",
    "`DDNM`",
)


def distance(x: Tensor, y: Tensor, order: int = 2) -> float:
    """Sliced distance: of order 2 in the library's definition, of order 1 as mean of W1 over 100 directions."""
    x = x.double().nan_to_num(1e3, 1e3, -1e3).clamp(-1e3, 1e3)
    if order == 2:
        return ss.metrics.sliced_w2(x, y, 100)
    directions = torch.nn.functional.normalize(ss.Noise(0).normal((x.shape[1], 100), 0, dtype=torch.float64), dim=0)
    a, b = (v.double() @ directions for v in (x, y))
    return float((a.sort(0).values - b.sort(0).values).abs().mean())


def distances(k: Task, published: bool) -> dict[str, float]:
    """Sliced distance of every method; the floor is first."""
    exact, order = inverse.posterior(k.prior, k.seen), 1 if published else 2
    truth = exact.sample(k.samples, seed=2)
    found = {"floor": distance(exact.sample(k.samples, seed=3), truth, order)}
    found["prior"] = distance(k.prior.sample(k.samples, seed=4), truth, order)
    for name in FEW if published else METHODS:
        if name == EXACT and k.shape[1] > 100:
            continue  # full covariances of 800 dimensions take too long
        found[name] = distance(METHODS[name](k), truth, order)
    return found


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error."""
    v = torch.tensor(values, dtype=torch.float64)
    return float(v.mean()), float(v.std()) / math.sqrt(len(v)) if len(v) > 1 else math.nan


def cell(values: list[float], factor: float = 1.0) -> str:
    """Mean and `factor` standard errors."""
    if not values:
        return "–"
    mean, error = interval(values)
    error *= factor
    if mean > 99.5:
        return "diverges"
    return f"{mean:.2f}" if math.isnan(error) else f"{mean:.2f} ± {error:.2f}"


def table(found: dict[str, dict[str, list[float]]], published: bool) -> str:
    """Markdown: methods in the rows, sizes in the columns."""
    head = ["method", *(size.replace(":", " / ") for size in found)]
    names, factor = (("floor", "prior", *FEW), 1.96) if published else (("floor", "prior", *METHODS), 1.0)
    lines = [[name, *(cell(values.get(name, []), factor) for values in found.values())] for name in names]
    if published:
        sizes = Options().sizes.split(",")
        for name, text in PAPER.items():
            printed = dict(zip(sizes, text.split(", "), strict=True))
            lines.append([f"the paper: {name}", *(printed.get(size, "") for size in found)])
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def draw(shown: dict[str, Tensor], truth: Tensor, page: Path) -> None:
    """First two coordinates of the samples of one task."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    figure, axes = plt.subplots(2, 4, figsize=(10, 5.2), sharex=True, sharey=True)
    for ax, (name, x) in zip(axes.flat, shown.items(), strict=False):
        ax.scatter(*truth[:, :2].T, s=3, color="0.75", linewidths=0)
        if name != "exact":
            ax.scatter(*x[:, :2].T, s=3, color="C0", alpha=0.6, linewidths=0)
        ax.set(title=name.replace("`", ""), xlim=(-22, 22), ylim=(-22, 22), xticks=[-16, 0, 16], yticks=[-16, 0, 16])
        ax.title.set_fontsize(9)
    figure.tight_layout()
    figure.savefig(page, dpi=80)
    plt.close(figure)


def main(options: Options) -> dict[str, dict[str, list[float]]]:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", ".*not all finite")  # the table shows it
    begin = time.process_time()
    counts = [int(n) for n in options.tasks.split(",")]
    found: dict[str, dict[str, list[float]]] = {}
    for size in options.sizes.split(","):
        d_x, d_y = map(int, size.split(":"))
        for seed in range(counts[0] if d_x <= 10 else counts[1] if d_x <= 100 else counts[2]):
            for name, value in distances(task(d_x, d_y, seed, options), options.published).items():
                found.setdefault(size, {}).setdefault(name, []).append(value)
        means = "  ".join(f"{name.replace('`', '')} {interval(v)[0]:.2f}" for name, v in found[size].items())
        print(f"{size:6} {time.process_time() - begin:4.0f} s  {means}", flush=True)
    text = f"{table(found, options.published)}\n\n{time.process_time() - begin:.0f} s of CPU\n"
    print("\n" + text)
    (options.out / ("mcgdiff-published.md" if options.published else "mcgdiff.md")).write_text(text)
    if options.published:
        return found
    k = task(8, 1, 0, options)
    names = ("`twisted_smc`", "`MMPS`", "`TMPD`", "`PiGDM`", "`ddrm`", "`DPS`, published step", "`daps`")
    truth = inverse.posterior(k.prior, k.seen).sample(k.samples, seed=2)
    draw({"exact": truth, **{name: METHODS[name](k) for name in names}}, truth, options.out / "mcgdiff.png")
    return found


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    parser.add_argument("--published", action="store_true", help="the paper's number of steps, and its table")
    if parser.parse_known_args()[0].published:
        defaults = Options(**PUBLISHED)
    for name, value in vars(defaults).items():
        if name != "published":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(samples=50, nfe=10, sizes="8:1", tasks="1,1,1")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
