"""Which posterior sampler is right, and by how much: every method against the exact posterior of a mixture.

    python experiments/posteriors.py            # some minutes
    python experiments/posteriors.py --quick    # seconds, for CI

The prior is a mixture, so the posterior is one too and is sampled exactly. Errors are in units of the posterior's
spread: sliced W2 over the root mean variance, and the differences of means and of standard deviations likewise. "floor"
is what two exact sample sets of that size measure. Nothing is tuned for a case: each method has its defaults, DPS its
published step with zeta = 0.3, twisted SMC as many particles as the others have samples. Writes a table as CSV and
Markdown, and a figure.

RESULT (--samples 500 --dims 2,32; five minutes on one core; all of it in docs/posteriors.md)
    Median sliced W2 over 15 cases at 20 and 100 evaluations: floor 0.10; exact h-transform 0.11, 0.10; twisted SMC
    0.30, 0.17; MMPS 0.50, 0.50; DiffPIR 0.84, 0.46; DDRM 0.66, 0.70; PiGDM 0.75, 0.78; DPS 1.66, 1.47. Only the
    h-transform and twisted SMC approach the floor as evaluations and particles grow.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.inverse import DDNM, DPS, MMPS, TMPD, DiffPIR, Measurement, PiGDM

SDE = ss.VP()
COLUMNS = ("D", "operator", "std", "method", "NFE", "SW2", "mean", "spread")
Sampler = Callable[[ss.GaussianMixture, Measurement, int, int], Tensor]


@dataclass
class Options:
    """What can be set from the command line."""

    samples: int = 1000
    dims: str = "2,32,192"
    nfes: str = "20,100"
    stds: str = "0.05,0.3,1.0"
    out: Path = Path(__file__).parent / "out"


def plain(make: Callable[[ss.GaussianMixture, Measurement], ss.AbstractDenoiser]) -> Sampler:
    """A denoiser under the same solver as all others."""

    def sampler(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
        return ss.sample(make(prior, seen), (n, *prior.event), ss.DPMSolverPP(2), nfe=nfe, seed=1, dtype=torch.float64)

    return sampler


def dps(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    grid = ss.grids.quadratic_vp(SDE, nfe)
    model = DPS(prior, seen, inverse.dps_scale(SDE, grid, 0.3), norm=True)
    return ss.sample(model, (n, *prior.event), ss.DDPM(), grid=grid, seed=1, dtype=torch.float64)


def diffpir(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    grid = inverse.renoised(SDE, ss.grids.quadratic_vp(SDE, nfe), 0.3)
    return ss.sample(DiffPIR(prior, seen), (n, *prior.event), ss.DDIM(), grid=grid, seed=1, dtype=torch.float64)


def repaint(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    grid = inverse.repaint(SDE, ss.grids.quadratic_vp(SDE, max(2, nfe // 5)), 1, 5)
    hook = inverse.Replacement(SDE, seen, seed=2)
    return ss.sample(prior, (n, *prior.event), ss.DDPM(), grid=grid, seed=1, hook=hook, dtype=torch.float64)


def start(prior: ss.GaussianMixture, n: int) -> Tensor:
    return SDE.prior().sample((n, *prior.event), ss.Noise(1), dtype=torch.float64)


METHODS: dict[str, Sampler] = {
    "exact h-transform": plain(inverse.posterior),
    "MMPS": plain(MMPS),
    "TMPD": plain(TMPD),
    "PiGDM": plain(PiGDM),
    "PiGDM, no gradient": plain(lambda prior, seen: PiGDM(prior, seen, through_net=False)),
    "DPS (published)": dps,
    "DiffPIR": diffpir,
    "DDNM": plain(DDNM),
    "DDRM": lambda prior, seen, n, nfe: inverse.ddrm(prior, seen, start(prior, n), nfe, seed=1),
    "DAPS": lambda prior, seen, n, nfe: inverse.daps(prior, seen, start(prior, n), nfe // 5, steps=5, seed=1),
    "RED-diff": lambda prior, seen, n, nfe: inverse.red_diff(prior, seen, (n, *prior.event), nfe, seed=1).double(),
    "twisted SMC": lambda prior, seen, n, nfe: inverse.twisted_smc(prior, seen, start(prior, n), nfe, seed=1).resampled(
        1
    ),
    "RePaint": repaint,
}


def prior_of(D: int) -> ss.GaussianMixture:
    """Five low-rank components, about unit variance."""
    draw = lambda k, *shape: ss.Noise(7).normal(shape, k, dtype=torch.float64)  # noqa: E731
    r = min(D, 4)
    return ss.GaussianMixture(SDE, 0.8 * draw(0, 5, D), std=0.2, factor=draw(1, 5, D, r) * 0.5 / math.sqrt(r))


def operators(D: int) -> dict[str, inverse.Linear]:
    half = torch.arange(D) % 2 == 0
    kernel = torch.tensor([0.25, 0.5, 0.25]) if D > 2 else torch.tensor([1.0])
    M = max(1, D // 4)
    rows = ss.Noise(8).normal((M, D), 0, dtype=torch.float64) / math.sqrt(D)
    all_of_them = {"mask": inverse.Mask(half), "low rank": inverse.Matrix(rows)}
    return all_of_them if D == 2 else {**all_of_them, "blur": inverse.Blur(kernel, (D,))}


def errors(x: Tensor, y: Tensor, spread: float) -> tuple[float, float, float]:
    """Sliced W2, distance of means and of standard deviations, per coordinate and over the spread."""
    x = x.nan_to_num(1e6, 1e6, -1e6)
    size = math.sqrt(x.shape[1])
    mean = float((x.mean(0) - y.mean(0)).norm()) / size
    std = float((x.std(0) - y.std(0)).norm()) / size
    return ss.metrics.sliced_w2(x, y, 64) / spread, mean / spread, std / spread


def main(options: Options) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for D in map(int, options.dims.split(",")):
        prior = prior_of(D)
        truth = prior.sample(1, seed=11)
        for name, A in operators(D).items():
            for std in map(float, options.stds.split(",")):
                y = A(truth)
                seen = Measurement(A, y + std * ss.Noise(12).like(y, 0), std)
                exact = inverse.posterior(prior, seen)
                y, z = (exact.sample(options.samples, seed=s) for s in (2, 3))
                spread = math.sqrt(float(exact.covariance().diagonal().mean()))

                def report(method: str, nfe: str, x: Tensor, y: Tensor = y, spread: float = spread) -> None:
                    rows.append((str(D), name, f"{std:g}", method, nfe, *(f"{e:.3g}" for e in errors(x, y, spread))))  # noqa: B023

                report("floor", "-", z)
                for method, sampler in METHODS.items():
                    if method == "RePaint" and name != "mask":
                        continue
                    for nfe in map(int, options.nfes.split(",")):
                        report(method, str(nfe), sampler(prior, seen, options.samples, nfe))
                print("\n".join("  ".join(f"{c:>18}" for c in row) for row in rows[-1:]), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "posteriors.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    summary = summarise(rows)
    print(summary)
    (options.out / "posteriors.md").write_text(summary + "\n")
    draw(rows, options.out / "posteriors.svg")
    return rows


def summarise(rows: list[tuple[str, ...]]) -> str:
    """Median and largest sliced W2 over all cases, as a table in Markdown."""
    cells: dict[tuple[str, str], list[list[float]]] = {}
    for row in rows:
        cells.setdefault((row[3], row[4]), []).append([float(v) for v in row[5:]])
    lines = ["| method | NFE | median SW2 | largest SW2 | median mean error | median spread error |"]
    lines += ["|---|---|---|---|---|---|"]
    for (method, nfe), values in cells.items():
        v = torch.tensor(values)
        middle = v.median(0).values
        lines.append(
            f"| {method} | {nfe} | {middle[0]:.2f} | {v[:, 0].max():.2f} | {middle[1]:.2f} | {middle[2]:.2f} |"
        )
    return "\n".join(lines)


def draw(rows: list[tuple[str, ...]], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    figure, axes = plt.subplots(figsize=(8, 4.5))
    names = [n for n in METHODS if any(row[3] == n for row in rows)]
    floor = torch.tensor([float(row[5]) for row in rows if row[3] == "floor"]).median()
    for nfe in sorted({row[4] for row in rows if row[4] != "-"}, key=int):
        values = [[float(row[5]) for row in rows if row[3] == n and row[4] == nfe] for n in names]
        middle = [float(torch.tensor(v).median()) for v in values]
        axes.semilogx(middle, range(len(names)), "o", label=f"{nfe} evaluations")
    axes.axvline(float(floor), color="grey", linestyle="--", label="floor")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("sliced W2 to the exact posterior, over its spread; median over cases")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(samples=200, dims="2,8", nfes="10", stds="0.3")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
