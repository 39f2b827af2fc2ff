"""Add noise to data, sample with three solvers and the exact score, and compare with exact samples.

    python experiments/ring.py
    python experiments/ring.py --quick    # seconds, for CI

The data are a ring of eight Gaussians of unequal weight, whose score is known in closed form under every process. Each
process has four comparisons, and each distance has its noise floor, the distance between two sets of exact samples:

* forward: noised data with samples of the exact marginal;
* DDPM's sampler with 200 evaluations, DPM-Solver++ 2M with 20 and the default with 10: samples with data.

The script writes a figure and a table. Measured with 1000 samples, in 14 s on 2 cores: 14 of the 16 distances are below
the 95 % quantile of their floor, and 2 are above it with p = 0.02 (by chance alone, 1 of 16 is). With 200 evaluations
the samples of DDPM's sampler are slightly too narrow: standard deviation 0.097 instead of 0.1 in each mode.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import scoresde as ss
from scoresde import metrics

METRIC = partial(metrics.sliced_w2, n_projections=128)
PROCESSES: dict[str, ss.SDE] = {"VP": ss.VP(), "VE": ss.VE(), "EDM": ss.EDM(), "Flow": ss.Flow()}


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 1000
    calls: int = 200
    permutations: int = 50
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


def ring(sde: ss.SDE) -> ss.GaussianMixture:
    angle = torch.arange(8) * (math.pi / 4)
    means = torch.stack([angle.cos(), angle.sin()], dim=1)
    return ss.GaussianMixture(sde, means, std=0.1, weights=torch.arange(1.0, 9.0))


def main(options: Options) -> Path:
    rows, pictures = [], {}
    for k, (name, sde) in enumerate(tqdm(PROCESSES.items(), desc="processes", disable=None)):
        model = ring(sde)
        n, middle = options.samples, sde.t_of_lam(0.0)
        data, fresh = model.sample(n, seed=10 * k + 1), model.sample(n, seed=10 * k + 2)
        noised = sde.perturb(data, middle, ss.Noise(10 * k + 3).like(data, 0))
        start = ss.Start(data_std=0.5**0.5, dtype=torch.float64)
        sample = partial(ss.sample, model, (n, 2), seed=options.seed + k, start=start)
        zigzag = ss.grids.ancestral(sde, ss.grids.quadratic_vp(sde, options.calls))
        sets = {
            f"DDPM, {options.calls} calls": sample(ss.DDIM(), grid=zigzag),
            "DPM-Solver++ 2M, 20 calls": sample(ss.DPMSolverPP(2), nfe=20),
            "default, 10 calls": sample(nfe=10),
        }
        pairs = {
            "forward": (noised, model.sample(n, middle, seed=10 * k + 4)),
            **{k: (x, fresh) for k, x in sets.items()},
        }
        for word, (x, y) in pairs.items():
            result = metrics.compare(METRIC, x, y, n_permutations=options.permutations)
            rows.append((name, word, result.value, result.floor, result.floor_high, result.p_value))
        pictures[name] = (
            model,
            sde,
            middle,
            {"data": data, f"noised to t = {middle:.3g}, exact score": noised, **sets},
        )
    options.out.mkdir(parents=True, exist_ok=True)
    table = [f"{'process':8} {'set':26} {'sliced W2':>9} {'floor':>7} {'95 %':>7} {'p':>6}"]
    table += [f"{name:8} {word:26} {v:9.4f} {f:7.4f} {h:7.4f} {p:6.2f}" for name, word, v, f, h, p in rows]
    table += [f"p below 0.05: {sum(row[-1] < 0.05 for row in rows)} of {len(rows)}; by chance alone, 1 of 20"]
    text = "\n".join(table)
    print(text)
    (options.out / "ring.txt").write_text(text + "\n")
    page = options.out / "ring.png"
    draw(pictures, page)
    print(f"\nfigure: {page}")
    return page


def draw(pictures: dict[str, tuple], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(pictures), 5, figsize=(13.5, 2.8 * len(pictures)), squeeze=False)
    for row, (name, (model, sde, middle, clouds)) in zip(axes, pictures.items(), strict=True):
        for ax, (title, cloud) in zip(row, clouds.items(), strict=True):
            noised = title.startswith("noised")
            ax.scatter(*cloud.T, s=2, alpha=0.4, linewidths=0)
            reach = 2.2 * sde.alpha(middle) + 1.5 * sde.sigma(middle) if noised else 1.6
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
            ax.set_title(title, fontsize=9)
            if noised:
                side = torch.linspace(-0.9 * reach, 0.9 * reach, 13, dtype=torch.float64)
                points = torch.cartesian_prod(side, side)
                ax.quiver(*points.T, *model.score(points, middle).T, color="0.25", width=0.004)
        row[0].set_ylabel(name)
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small sizes, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(samples=400, calls=40, permutations=20)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
