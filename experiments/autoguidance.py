"""Autoguidance on a tree of Gaussians in the plane, with exact numbers: likelihood, outliers, coverage.

    python experiments/autoguidance.py            # three minutes on one core
    python experiments/autoguidance.py --quick    # seconds, for CI: the samples are poor

The problem is that of the 2-D example in Guiding a Diffusion Model with a Bad Version of Itself (Karras et al., 2024),
arXiv:2406.02507. The data of a class are thin branches: a stem that forks six times, so 127 branches on seven levels,
each a chain of Gaussians. Two classes grow from one root in opposite directions. The tree is our own, from the
description: a GaussianMixture, so the density is known.

Three small networks (EDM's preconditioning, σ_data = 0.5, P_mean = −2.3, P_std = 1.5) are trained by denoising score
matching: the main model of one class (4 hidden layers of 64), a guide of the same class (4 of 32, stopped early), and
a model of both classes, which classifier-free guidance (CFG) takes as the model without condition. All sample with
32 Heun steps from σ = 5 to 0.002, and then to 0, from the same exact draws at σ = 5. The table has:

* *log-likelihood*: mean of log p(x) under the true density of the class, and its standard error; the median;
* *outside*: share of samples whose density is below the 1 % quantile of true samples;
* *twigs*: share of the 64 last branches that get at least half of the samples that they should;
* *imbalance*: total variation between the shares of the 127 branches and the true shares;
* *sliced W2* to other true samples.

The row "true samples" is the floor, and "exact score" is the error of the solver alone.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange

import scoresde as ss
from scoresde.denoisers import AbstractDenoiser, Preconditioning

SDE = ss.EDM(T=5.0)
LEVELS, BEADS = 7, 6  # levels of branches, Gaussians in a branch


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 8192
    early: int = 512  # steps of the guide
    batch: int = 2048
    rate: float = 5e-3
    data: int = 1_000_000
    samples: int = 10_000
    exact: int = 1000  # samples of the exact score
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


# The tree.


@dataclass(frozen=True)
class Branch:
    """A branch of the tree: from its root in a direction, with a length, a thickness and a share of the data."""

    level: int
    x: float
    y: float
    angle: float
    length: float

    @property
    def tip(self) -> tuple[float, float]:
        return self.x + self.length * math.cos(self.angle), self.y + self.length * math.sin(self.angle)

    @property
    def thickness(self) -> float:
        return 0.03 * 0.75**self.level

    @property
    def share(self) -> float:
        return 0.5**self.level / LEVELS


def grow(angle: float, draws: Tensor) -> list[Branch]:
    """All branches of a class, the stem first; `draws` (127, 2) are normals for lengths and angles."""
    branches = [Branch(0, 0.0, 0.0, angle, 0.5)]
    for parent in branches:
        if parent.level + 1 == LEVELS:
            break
        for side in (1, -1):
            longer, turn = draws[len(branches)].tolist()
            length = 0.5 * 0.78 ** (parent.level + 1) * (1 + 0.15 * longer)
            direction = parent.angle + side * 0.75 * 0.85**parent.level * (1 + 0.2 * turn)
            branches.append(Branch(parent.level + 1, *parent.tip, direction, length))
    return branches


def mixture(branches: list[Branch]) -> tuple[Tensor, Tensor, Tensor]:
    """Means, covariances and weights of the beads of branches."""
    means, covariances, weights = [], [], []
    for b in branches:
        along = torch.tensor([math.cos(b.angle), math.sin(b.angle)], dtype=torch.float64)
        across = torch.stack([-along[1], along[0]])
        root = torch.tensor([b.x, b.y], dtype=torch.float64)
        spread = b.length / (2 * BEADS)
        covariance = spread**2 * torch.outer(along, along) + b.thickness**2 * torch.outer(across, across)
        for k in range(BEADS):
            means.append(root + (k + 0.5) / BEADS * b.length * along)
            covariances.append(covariance)
            weights.append(b.share / BEADS)
    return torch.stack(means), torch.stack(covariances), torch.tensor(weights, dtype=torch.float64)


def trees(seed: int = 0) -> tuple[ss.GaussianMixture, ss.GaussianMixture]:
    """Densities of the first class and of both; both together have mean 0 and standard deviation ½ on each axis."""
    draws = ss.Noise(seed).normal((2, 2**LEVELS - 1, 2), 0, dtype=torch.float64)
    classes = [mixture(grow(angle, d)) for angle, d in zip((math.pi / 4, 5 * math.pi / 4), draws, strict=True)]
    means, covariances, weights = (torch.cat(parts) for parts in zip(*classes, strict=True))
    whole = ss.GaussianMixture(SDE, means, weights=weights, cov=covariances)
    centre, scale = whole.mean(), 0.5 / whole.covariance().diagonal().sqrt()
    means, covariances = (means - centre) * scale, covariances * torch.outer(scale, scale)
    n = len(weights) // 2
    one = ss.GaussianMixture(SDE, means[:n], weights=weights[:n], cov=covariances[:n])
    return one, ss.GaussianMixture(SDE, means, weights=weights, cov=covariances)


# The networks.


class Net(nn.Module):
    """A multilayer perceptron of the scaled state, the scaled log of the noise level, and 1."""

    def __init__(self, hidden: int, layers: int = 4) -> None:
        super().__init__()
        widths = [4] + [hidden] * layers
        parts: list[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [nn.Linear(a, b), nn.SiLU()]
        self.layers = nn.Sequential(*parts, nn.Linear(hidden, 2))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        level = time.reshape(-1, 1).expand(len(x), 1).to(x)
        out: Tensor = self.layers(torch.cat([x, level, torch.ones_like(level)], 1))
        return out


def train(data: Tensor, hidden: int, steps: int, seed: int, options: Options) -> ss.Denoiser:
    """A denoiser trained for `steps` of the schedule of the whole run, with averaged weights."""
    torch.manual_seed(seed)
    model = ss.Denoiser(Net(hidden), SDE, predicts="F", precondition=Preconditioning(0.5))
    loss = ss.DSM(model, "edm", ss.training.times.LogNormalSigma(-2.3, 1.5))
    optimiser = torch.optim.Adam(loss.parameters(), options.rate, betas=(0.9, 0.99))
    ema = ss.EMA(model, 0.995)
    generator = torch.Generator().manual_seed(seed)
    for step in trange(steps, desc=f"{hidden} wide", disable=None):
        optimiser.param_groups[0]["lr"] = options.rate * (1 - step / options.steps)
        optimiser.zero_grad()
        x = data[torch.randint(len(data), (options.batch,), generator=generator)]
        loss(x, ss.training.Draws(generator)).backward()
        optimiser.step()
        ema.update()
    model.load_state_dict(ema.weights)
    return model.eval()


def sample(model: AbstractDenoiser, start: Tensor) -> Tensor:
    grid = ss.grids.karras(SDE, 32, t_min=0.002)
    with torch.no_grad():
        return ss.sample(model, start, ss.EDMHeun(), grid=grid).double()


# Exact numbers.


@dataclass(frozen=True)
class Judge:
    """Numbers of samples from the density of a class.

    Arguments:
        truth: Density.
        fresh: True samples to compare with.
        low: Logarithm of the density below which a sample is outside: the 1 % quantile of true samples.
    """

    truth: ss.GaussianMixture
    fresh: Tensor
    low: float

    @classmethod
    def of(cls, truth: ss.GaussianMixture, n: int) -> Judge:
        fresh = truth.sample(n, seed=11)
        return cls(truth, fresh, float(truth.log_prob(truth.sample(10 * n, seed=12)).quantile(0.01)))

    def shares(self, x: Tensor) -> Tensor:
        """Share of the samples in each branch, (127,): each sample is in its most probable one."""
        branch = self.truth.responsibilities(x).unflatten(1, (-1, BEADS)).sum(2).argmax(1)
        return torch.bincount(branch, minlength=2**LEVELS - 1).double() / len(x)

    def expected(self) -> Tensor:
        return self.truth.weights.reshape(-1, BEADS).sum(1)

    def row(self, x: Tensor) -> dict[str, float]:
        log_p = self.truth.log_prob(x)
        shares, expected = self.shares(x), self.expected()
        twigs = slice(2 ** (LEVELS - 1) - 1, None)
        return {
            "log-likelihood": float(log_p.mean()),
            "error": float(log_p.std()) / math.sqrt(len(x)),
            "median": float(log_p.median()),
            "outside": float((log_p < self.low).double().mean()),
            "twigs": float((shares[twigs] >= 0.5 * expected[twigs]).double().mean()),
            "imbalance": float((shares - expected).abs().sum()) / 2,
            "sliced W2": ss.metrics.sliced_w2(x, self.fresh[: len(x)]),
        }


def table(rows: dict[str, dict[str, float]]) -> str:
    head = ["samples", "log-likelihood", "median", "outside", "twigs", "imbalance", "sliced W2"]
    lines = [head, ["---"] * len(head)]
    for name, r in rows.items():
        cells = [f"{r['log-likelihood']:.2f} ± {r['error']:.2f}", f"{r['median']:.2f}", f"{100 * r['outside']:.1f} %"]
        cells += [f"{100 * r['twigs']:.0f} %", f"{r['imbalance']:.3f}", f"{r['sliced W2']:.4f}"]
        lines.append([name, *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def draw(shown: dict[str, Tensor], low: float, truth: ss.GaussianMixture, page: Path) -> None:
    """Samples of the whole tree and of a part; those that are outside are red."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    middle = truth.means[-BEADS * 2 ** (LEVELS - 2) :].mean(0)
    figure, axes = plt.subplots(2, len(shown), figsize=(2.4 * len(shown), 5), squeeze=False)
    for column, (name, x) in zip(axes.T, shown.items(), strict=True):
        x = x[:5000]
        outside = truth.log_prob(x) < low
        for ax in column:
            ax.scatter(*x[~outside].T, s=0.6, color="0.25", linewidths=0)
            ax.scatter(*x[outside].T, s=2, color="C3", linewidths=0)
            ax.set(xticks=[], yticks=[], aspect="equal")
        column[0].set(title=name, xlim=(-0.5, 1.5), ylim=(-0.5, 1.5))
        column[1].set(
            xlim=tuple(middle[0] + torch.tensor([-0.3, 0.3])), ylim=tuple(middle[1] + torch.tensor([-0.3, 0.3]))
        )
    figure.tight_layout()
    figure.savefig(page, dpi=75)
    plt.close(figure)


def main(options: Options) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    begin = time.process_time()
    truth, both = trees()
    one, all_ = (density.sample(options.data, seed=1).float() for density in (truth, both))
    model = train(one, 64, options.steps, options.seed, options)
    guide = train(one, 32, options.early, options.seed + 1, options)
    free = train(all_, 64, options.steps, options.seed + 2, options)
    trained = time.process_time() - begin
    start = truth.sample(options.samples, SDE.T, seed=3)
    judge = Judge.of(truth, options.samples)
    found = {
        "true samples": truth.sample(options.samples, seed=4),
        "exact score": sample(truth, start[: options.exact]),
        "main model": sample(model, start.float()),
        "guide alone": sample(guide, start.float()),
    }
    for scale in (2.0, 3.0, 4.0):
        found[f"autoguidance, {scale:g}"] = sample(ss.guidance.AutoGuidance(model, guide, scale), start.float())
    for scale in (1.5, 2.0, 4.0):
        found[f"CFG, {scale:g}"] = sample(ss.guidance.AutoGuidance(model, free, scale), start.float())
    rows = {name: judge.row(x) for name, x in found.items()}
    text = f"{table(rows)}\n\n{trained:.0f} s of CPU to train, {time.process_time() - begin:.0f} s in all\n"
    print(text)
    (options.out / "autoguidance.md").write_text(text)
    names = {
        "true samples": "true",
        "main model": "main model",
        "CFG, 4": "CFG, 4",
        "autoguidance, 3": "autoguidance, 3",
    }
    draw({title: found[name] for name, title in names.items()}, judge.low, truth, options.out / "autoguidance.png")
    return rows


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(steps=30, early=10, batch=128, data=2000, samples=100, exact=20)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
