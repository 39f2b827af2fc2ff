"""Error of posterior samplers: every method against the exact posterior of a mixture.

    python experiments/posteriors.py            # 15 minutes on one idle core; resumes an interrupted run
    python experiments/posteriors.py --quick    # seconds, for CI

The prior is a Gaussian mixture, so the posterior is one too and can be sampled exactly. For every method and number of
evaluations the script measures the sliced W2 distance to exact samples and the differences of means and of standard
deviations, all divided by the posterior's root mean variance, and the accuracy of a classifier two-sample test (C2ST),
which is ½ if the two sets are indistinguishable. "floor" compares two sets of exact samples. Nothing is tuned for a
case: each method has its defaults, DPS its published step with zeta = 0.3, and twisted SMC its published variance and
as many particles as the other methods have samples. Further rows give twisted SMC fewer and more particles, from which
the same number of samples is drawn. In 192 dimensions, 30 and 300 evaluations are left out. The script writes every
number as CSV, the tables and a figure.

RESULT (15 minutes on one core; complete in docs/posteriors.md)
    Median sliced W2 over 15 cases in 2 and 32 dimensions at 10, 30 and 100 evaluations: floor 0.10; exact h-transform
    0.14, 0.11, 0.10; twisted SMC 0.59, 0.22, 0.17 and with 2500 particles 0.13; MMPS 0.50, 0.50, 0.50; DiffPIR 1.01,
    0.75, 0.46. C2ST at 100: 0.49, 0.48, 0.56 (0.53), 0.61, 0.68. Only the first two reach the floor.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.inverse import DDNM, DPS, MMPS, TMPD, DiffPIR, Measurement, PiGDM

SDE = ss.VP()
DOUBLE = ss.Start(dtype=torch.float64)
Sampler = Callable[[ss.GaussianMixture, Measurement, int, int], Tensor]


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 500
    dims: str = "2,32,192"
    nfes: str = "10,30,100"
    stds: str = "0.05,0.3,1.0"
    particles: str = "100,2500"
    finest: int = 300  # number of evaluations of the methods in FALLING, except in 192 dimensions
    out: Path = Path(__file__).parent / "out"


class Row(NamedTuple):
    """Errors of one method on one case; the floor has 0 evaluations."""

    D: int
    operator: str
    std: float
    samples: int
    method: str
    particles: int
    nfe: int
    sw2: float
    mean: float
    deviation: float
    c2st: float


# The methods.


def plain(make: Callable[[ss.GaussianMixture, Measurement], ss.denoisers.AbstractDenoiser]) -> Sampler:
    """Sample a posterior denoiser with DPM-Solver++ 2M."""

    def sampler(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
        return ss.sample(make(prior, seen), (n, *prior.event), ss.DPMSolverPP(2), nfe=nfe, seed=1, start=DOUBLE)

    return sampler


def dps(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    grid = ss.grids.quadratic_vp(SDE, nfe)
    model = DPS(prior, seen, inverse.dps_scale(SDE, grid, 0.3), norm=True)
    return ss.sample(model, (n, *prior.event), ss.DDPM(), grid=grid, seed=1, start=DOUBLE)


def diffpir(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    grid = ss.grids.renoised(SDE, ss.grids.quadratic_vp(SDE, nfe), 0.3)
    return ss.sample(DiffPIR(prior, seen), (n, *prior.event), ss.DDIM(), grid=grid, seed=1, start=DOUBLE)


def repaint(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    grid = ss.grids.repaint(SDE, ss.grids.quadratic_vp(SDE, max(2, nfe // 5)), 1, 5)
    watch = ss.Watch(hook=inverse.Replacement(SDE, seen, seed=2))
    return ss.sample(prior, (n, *prior.event), ss.DDPM(), grid=grid, seed=1, start=DOUBLE, watch=watch)


def start(prior: ss.GaussianMixture, n: int) -> Tensor:
    return SDE.prior().sample((n, *prior.event), ss.Noise(1), dtype=torch.float64)


def ddrm(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    return inverse.ddrm(prior, seen, start(prior, n), nfe, seed=1).x


def daps(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    return inverse.daps(prior, seen, start(prior, n), nfe // 5, steps=5, seed=1).x


def red_diff(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    return inverse.red_diff(prior, seen, (n, *prior.event), nfe, seed=1).x.double()


def twisted(prior: ss.GaussianMixture, seen: Measurement, n: int, nfe: int) -> Tensor:
    return inverse.twisted_smc(prior, seen, start(prior, n), nfe, variance="small", seed=1).resampled(1)


EXACT, TWISTED = "exact h-transform, `posterior`", "`twisted_smc`"
METHODS: dict[str, Sampler] = {
    EXACT: plain(inverse.posterior),
    TWISTED: twisted,
    "`MMPS`": plain(MMPS),
    "`TMPD`": plain(TMPD),
    "`PiGDM`": plain(PiGDM),
    "`PiGDM`, no gradient": plain(lambda prior, seen: PiGDM(prior, seen, through_net=False)),
    "`DiffPIR`": diffpir,
    "`ddrm`": ddrm,
    "`daps`": daps,
    "RePaint": repaint,
    "`DDNM`": plain(DDNM),
    "`DPS`, published step": dps,
    "`red_diff`, an optimum": red_diff,
}


FALLING = (EXACT, "`DiffPIR`", "`daps`")  # methods that improve beyond the largest budget


# The cases.


def prior_of(D: int) -> ss.GaussianMixture:
    """Prior with five low-rank components and about unit variance."""
    draw = lambda k, *shape: ss.Noise(7).normal(shape, k, dtype=torch.float64)  # noqa: E731
    r = min(D, 4)
    return ss.GaussianMixture(SDE, 0.8 * draw(0, 5, D), std=0.2, factor=draw(1, 5, D, r) * 0.5 / math.sqrt(r))


def operators(D: int) -> dict[str, inverse.Linear]:
    """A mask, a matrix of low rank and, except in two dimensions, a blur."""
    half = torch.arange(D) % 2 == 0
    M = max(1, D // 4)
    rows = ss.Noise(8).normal((M, D), 0, dtype=torch.float64) / math.sqrt(D)
    both: dict[str, inverse.Linear] = {"mask": inverse.Mask(half), "low rank": inverse.Matrix(rows)}
    return both if D == 2 else {**both, "blur": inverse.Blur(torch.tensor([0.25, 0.5, 0.25]), (D,))}


def runs(options: Options, D: int, operator: str) -> Iterator[tuple[str, int, int]]:
    """Method, number of particles and number of evaluations of each run on a case; the floor is first."""
    nfes = [int(n) for n in options.nfes.split(",")]
    if D > 100:
        nfes = [nfes[0], nfes[-1]]
    yield "floor", options.samples, 0
    for method in METHODS:
        if method != "RePaint" or operator == "mask":
            yield from ((method, options.samples, nfe) for nfe in nfes)
    for particles in map(int, options.particles.split(",")):
        yield TWISTED, particles, nfes[-1]
    if D <= 100:
        yield from ((method, options.samples, options.finest) for method in FALLING)
        yield TWISTED, particles, options.finest


def errors(x: Tensor, y: Tensor, scale: float) -> tuple[float, float, float, float]:
    """Sliced W2, differences of means and of standard deviations, per coordinate and divided by `scale`; and C2ST."""
    x = x.nan_to_num(1e6, 1e6, -1e6).clamp(-1e6, 1e6)
    size = math.sqrt(x.shape[1])
    mean = float((x.mean(0) - y.mean(0)).norm()) / size
    std = float((x.std(0) - y.std(0)).norm()) / size
    c2st = ss.metrics.c2st(x, y, folds=3, steps=200)
    return ss.metrics.sliced_w2(x, y, 64) / scale, mean / scale, std / scale, c2st


@dataclass(frozen=True)
class Case:
    """A prior and a measurement of one sample of it."""

    D: int
    operator: str
    std: float
    prior: ss.GaussianMixture
    seen: Measurement

    def row(self, options: Options, method: str, particles: int, nfe: int) -> Row:
        """Errors of a method, on the same number of samples for every number of particles."""
        exact = inverse.posterior(self.prior, self.seen)
        if method == "floor":
            x = exact.sample(particles, seed=3)
        else:
            x = METHODS[method](self.prior, self.seen, particles, nfe)
        drawn = x[torch.arange(options.samples) * particles // options.samples]
        scale = math.sqrt(float(exact.covariance().diagonal().mean()))
        values = errors(drawn, exact.sample(options.samples, seed=2), scale)
        return Row(self.D, self.operator, self.std, options.samples, method, particles, nfe, *values)


def cases(options: Options) -> Iterator[Case]:
    """Cases of every dimension, operator and noise level."""
    for D in map(int, options.dims.split(",")):
        prior = prior_of(D)
        truth = prior.sample(1, seed=11)
        for name, A in operators(D).items():
            for std in map(float, options.stds.split(",")):
                y = A(truth)
                yield Case(D, name, std, prior, Measurement(A, y + std * ss.Noise(12).like(y, 0), std))


def measured(path: Path) -> dict[tuple[Any, ...], Row]:
    """Rows that an earlier run wrote."""
    if not path.is_file():
        return {}
    of = get_type_hints(Row).values()
    with path.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    rows = [Row(*(kind(word) for kind, word in zip(of, line, strict=True))) for line in lines]
    return {row[:7]: row for row in rows}


def main(options: Options) -> list[Row]:
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "posteriors.csv"
    known, rows = measured(path), []
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if not known:
            writer.writerow(Row._fields)
        for case in cases(options):
            for method, particles, nfe in runs(options, case.D, case.operator):
                key = (case.D, case.operator, case.std, options.samples, method, particles, nfe)
                if key not in known:
                    known[key] = case.row(options, method, particles, nfe)
                    words = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in known[key]]
                    writer.writerow(words)
                    file.flush()
                    print("  ".join(f"{word:>10}" for word in words), flush=True)
                rows.append(known[key])
    text = tables(rows, options)
    print("\n" + text)
    (options.out / "posteriors.md").write_text(text)
    draw(rows, options)
    return rows


# Tables and figure.


def pick(rows: list[Row], **fields: Any) -> list[Row]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in fields.items())]


def middle(rows: list[Row], error: str) -> float:
    """Median of an error over the cases."""
    values = sorted(getattr(row, error) for row in rows)
    half = len(values) // 2
    return math.nan if not values else values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2


def cell(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}" if value < 1e3 else "diverges"


def table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def tables(rows: list[Row], options: Options) -> str:
    """Sliced W2 by number of evaluations and noise level, the other errors, and the effect of more particles."""
    nfes = [int(n) for n in options.nfes.split(",")]
    stds = [float(s) for s in options.stds.split(",")]
    last = nfes[-1]
    sides = [[r for r in rows if r.D <= 100], [r for r in rows if r.D > 100]]
    few, many = ([r for r in side if r.particles == options.samples] for side in sides)

    def at(name: str, nfe: int) -> dict[str, Any]:
        return {"method": name, "nfe": 0 if name == "floor" else nfe}

    lines, others = [], []
    for name in ("floor", *METHODS):
        values = [middle(pick(few, **at(name, nfe)), "sw2") for nfe in (*nfes, options.finest)]
        values += [middle(pick(few, **at(name, last), std=std), "sw2") for std in stds]
        values += [max((r.sw2 for r in pick(few + many, **at(name, last))), default=math.nan)]
        values += [middle(pick(many, **at(name, nfe)), "sw2") for nfe in (nfes[0], last)]
        lines.append([name, *map(cell, values)])
        values = [middle(pick(side, **at(name, last)), error) for side in (few, many) for error in Row._fields[8:]]
        others.append([name, *map(cell, values)])
    head = [f"NFE {n}" for n in (*nfes, options.finest)] + [f"std {s:g}" for s in stds] + ["largest"]
    text = table(["method", *head, *(f"192-D, {n}" for n in (nfes[0], last))], lines)
    text += "\n" + table(["method", "mean", "std", "C2ST", "192-D: mean", "std", "C2ST"], others)

    lines = []
    for name, particles, nfe in sorted({r[4:7] for r in rows if r.method in ("floor", EXACT, TWISTED)}):
        picked = [pick(side, method=name, particles=particles, nfe=nfe) for side in sides]
        values = [middle(side, error) for side in picked for error in ("sw2", "c2st")]
        values += [middle(pick(picked[1], std=stds[0]), "sw2")]
        lines.append([name, str(particles) if name == TWISTED else "", str(nfe or ""), *map(cell, values)])
    head = [
        "method",
        "particles",
        "NFE",
        "sliced W2",
        "C2ST",
        "192-D: sliced W2",
        "C2ST",
        f"sliced W2, std {stds[0]:g}",
    ]
    return text + "\n" + table(head, lines)


def draw(rows: list[Row], options: Options) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    figure, axes = plt.subplots(1, 3, figsize=(11.5, 4.6), width_ratios=(1, 1, 0.8))
    few = [r for r in rows if r.D <= 100]
    own = pick(few, particles=options.samples)
    marks = "osD^v<>pPXh*d"
    for ax, error, word in zip(axes, ("sw2", "c2st"), ("sliced W2, relative", "C2ST"), strict=False):
        for k, name in enumerate(METHODS):
            nfes = sorted({r.nfe for r in pick(own, method=name)})
            values = [min(middle(pick(own, method=name, nfe=n), error), 10) for n in nfes]
            ax.semilogx(
                nfes, values, marks[k] + "-", color=plt.get_cmap("tab20")(k), ms=4, lw=1, label=name.replace("`", "")
            )
        ax.axhline(middle(pick(own, method="floor"), error), color="black", linestyle="--", label="floor")
        ax.set_xlabel("evaluations")
        ax.set_title(f"{word}, median of {len(pick(own, method='floor'))} cases", fontsize=9)
    axes[0].set_yscale("log")
    for nfe in sorted({r.nfe for r in pick(few, method=TWISTED)}):
        rows_of = pick(few, method=TWISTED, nfe=nfe)
        numbers = sorted({r.particles for r in rows_of})
        values = [middle(pick(rows_of, particles=n), "c2st") for n in numbers]
        axes[2].semilogx(numbers, values, "o-", ms=4, lw=1, label=f"{nfe} evaluations")
    axes[2].axhline(middle(pick(own, method="floor"), "c2st"), color="black", linestyle="--")
    axes[2].set_xlabel("particles")
    axes[2].set_title("C2ST of twisted_smc", fontsize=9)
    axes[2].legend(fontsize=7)
    figure.tight_layout(rect=(0, 0, 0.84, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="center right", fontsize=7)
    figure.savefig(options.out / "posteriors.svg")
    plt.close(figure)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(samples=100, dims="8", nfes="10", stds="0.3", particles="50", finest=20)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
