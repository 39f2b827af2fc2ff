"""Error of steering by particles: moments and log Z against closed forms, by particles, proposal, twist and rule.

    python experiments/steering.py            # about three minutes on one idle core
    python experiments/steering.py --quick    # seconds, for CI

The prior is a Gaussian mixture, and the log-potential linear or quadratic, so that the target is a mixture too, with
known moments and log Z. Every setting is run as many independent problems of one batch. The script prints, for each
target, twist, proposal and number of particles, the root mean square over the problems of the error of the mean
(divided by the target's standard deviations) and of log Z, and the accuracy of a classifier two-sample test (C2ST)
between draws from the largest runs and exact samples. Then come the rules of resampling with the error of Z that single
runs report, and products and powers of models with their weights and without. It writes the tables and a figure. The
steps are 50 of SDE-DPM-Solver++ 2M.

RESULT (complete in docs/steering.md)
    Errors of log Z with 1600 particles: linear reward in 16 dimensions 0.026, with the gradient as proposal 0.009;
    measurement in 16 dimensions, twist of the denoised state 0.66, annealed 0.16, closed form 0.07.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

import scoresde as ss
from scoresde import inverse
from scoresde.steering import (
    Potential,
    Resampling,
    Reward,
    Smoothed,
    Steered,
    power,
    product,
    sample_composition,
    steer,
)

F64 = torch.float64
SDE = ss.VP()
DOUBLE = ss.Start(dtype=F64)
RULES = ("systematic", "stratified", "residual", "multinomial", "never")


@dataclass
class Options:
    """Options of the command line."""

    particles: str = "25,100,400,1600"
    dims: str = "2,16"
    problems: int = 16
    steps: int = 50
    samples: int = 1000  # of the classifier test
    out: Path = Path(__file__).parent / "out"


@dataclass
class Target:
    """A potential with the exact target."""

    name: str
    prior: ss.GaussianMixture
    exact: ss.GaussianMixture
    log_z: float
    potentials: dict[str, Potential]  # by the name of the twist


def prior_of(dims: int) -> ss.GaussianMixture:
    means = 1.2 * ss.Noise(3).normal((4, dims), 0, dtype=F64) / math.sqrt(dims) * math.sqrt(2)
    return ss.GaussianMixture(SDE, means, std=torch.tensor([0.3, 0.5, 0.4, 0.6], dtype=F64), weights=[4, 3, 2, 1])


def linear(dims: int) -> Target:
    """Reward a·x: component k moves by C a."""
    prior = prior_of(dims)
    a = 1.5 * ss.Noise(4).normal((1, dims), 0, dtype=F64)[0] / math.sqrt(dims) * math.sqrt(2)
    C = prior.component_covariances()
    move = C @ a
    log_w = prior.weights.log() + prior.means @ a + 0.5 * (move @ a)
    exact = ss.GaussianMixture(SDE, prior.means + move, cov=C, weights=log_w.softmax(0))
    reward = Reward(lambda x: x @ a.to(x))
    return Target(f"linear, {dims}-D", prior, exact, float(log_w.logsumexp(0)), {"reward of x̂₀": reward})


def quadratic(dims: int) -> Target:
    """Reward −|Ax − y|²/2τ², a measurement of half of the entries."""
    prior = prior_of(dims)
    seen = torch.arange(dims) % 2 == 0
    mask, tau = inverse.Mask(seen), 0.3
    y = prior.sample(1, seed=5)[:, seen]
    measurement = inverse.Measurement(mask, y, tau)
    reward = Reward(measurement.log_prob)
    return Target(
        f"quadratic, {dims}-D",
        prior,
        inverse.posterior(prior, measurement),
        float(inverse.log_evidence(prior, measurement)),
        {
            "reward of x̂₀": reward,
            "the same, annealed": Reward(measurement.log_prob, anneal=lambda t: (1 - t) ** 2),
            "16 points": Smoothed(reward),
            "closed form": inverse.Likelihood(measurement),
        },
    )


def errors(run: Steered, target: Target) -> tuple[float, float]:
    """Root mean square errors of the mean and of log Z."""
    sd = target.exact.covariance().diagonal().sqrt()
    mean = ((run.mean() - target.exact.mean()) / sd).square().mean().sqrt()
    log_z = (run.log_z - target.log_z).square().mean().sqrt()
    return float(mean), float(log_z)


def c2st(run: Steered, target: Target, n: int) -> float:
    """Accuracy of a classifier between one particle system's draws and exact samples."""
    drawn = run.merged().resampled(seed=1)[0]
    drawn = drawn[torch.arange(n) * len(drawn) // n]
    return ss.metrics.c2st(drawn, target.exact.sample(n, seed=2), folds=3, steps=min(150, n))


def steered(target: Target, twist: str, particles: int, options: Options, **given: Any) -> Steered:
    return steer(
        target.prior,
        target.potentials[twist],
        (options.problems, *target.prior.event),
        particles=particles,
        grid=options.steps,
        seed=0,
        start=DOUBLE,
        **given,
    )


def by_particles(options: Options) -> list[list[str]]:
    """Errors by target, twist, proposal and number of particles."""
    counts = [int(n) for n in options.particles.split(",")]
    rows = []
    for make in (linear, quadratic):
        for dims in map(int, options.dims.split(",")):
            target = make(dims)
            floor = c2st_floor(target, options.samples)
            for twist in target.potentials:
                for proposal in (None, "gradient"):
                    cells = []
                    for n in counts:
                        run = steered(target, twist, n, options, proposal=proposal)
                        cells.append(errors(run, target))
                    score = c2st(run, target, options.samples)
                    rows.append(
                        [target.name, twist, proposal or "none"]
                        + [f"{mean:.3f}" for mean, _ in cells]
                        + [f"{log_z:.3f}" for _, log_z in cells]
                        + [f"{score:.2f}", f"{floor:.2f}"]
                    )
                    print("  ".join(rows[-1]), flush=True)
    return rows


def c2st_floor(target: Target, n: int) -> float:
    return ss.metrics.c2st(target.exact.sample(n, seed=3), target.exact.sample(n, seed=2), folds=3, steps=min(150, n))


def by_rule(options: Options) -> list[list[str]]:
    """Errors of every rule of resampling, and the ratio of reported to actual standard errors of Z."""
    rows = []
    n = int(options.particles.split(",")[1])
    for target, twist in ((linear(2), "reward of x̂₀"), (quadratic(2), "16 points")):
        for rule in RULES:
            resample = Resampling(threshold=0.0) if rule == "never" else Resampling(rule)
            more = Options(**{**vars(options), "problems": 8 * options.problems})
            run = steered(target, twist, n, more, resample=resample)
            mean, log_z = errors(run, target)
            z = (run.log_z - run.log_z.mean()).exp()
            reported = float((z.square() * run.z_variance.nan_to_num(1.0)).mean().clamp_min(0).sqrt())
            rows.append([target.name, rule, f"{mean:.3f}", f"{log_z:.3f}", f"{reported / float(z.std()):.2f}"])
            print("  ".join(rows[-1]), flush=True)
    return rows


def by_composition(options: Options) -> list[list[str]]:
    """Products and powers against an integral over the plane, by steps, with weights and without."""
    axis = torch.linspace(-6, 6, 301, dtype=F64)
    points = torch.cartesian_prod(axis, axis)
    a = prior_of(2)
    b = ss.GaussianMixture(SDE, torch.tensor([[0.8, 0.0], [-1.0, 1.5]], dtype=F64), std=0.7, weights=[0.7, 0.3])
    log_a, log_b = a.log_prob(points), b.log_prob(points)
    cases = {
        "product of two models": (product([a, b]), log_a + log_b),
        "guidance of scale 2": (product([a, b], [2.0, -1.0]), 2 * log_a - log_b),
        "power 0.5": (power(a, 0.5), 0.5 * log_a),
        "power 2": (power(a, 2.0), 2 * log_a),
    }
    rows = []
    n = int(options.particles.split(",")[-2])
    for name, (composition, log) in cases.items():
        w = log.softmax(0)[:, None]
        mean = (w * points).sum(0)
        sd = (w * (points - mean).square()).sum(0).sqrt()
        log_z = float(log.logsumexp(0)) + 2 * math.log(float(axis[1] - axis[0]))
        for steps in (options.steps // 2, options.steps, 2 * options.steps):
            runs = [
                sample_composition(
                    composition, (options.problems // 2, 2), steps, particles=n, start=DOUBLE, seed=0, resample=rule
                )
                for rule in (Resampling(), Resampling(threshold=0.0))
            ]
            with_weights = runs[0].merged()
            plain = runs[1].x.flatten(0, 1).mean(0)
            error = float(((with_weights.mean()[0] - mean) / sd).square().mean().sqrt())
            without = float(((plain - mean) / sd).square().mean().sqrt())
            rows.append(
                [name, str(steps), f"{without:.3f}", f"{error:.3f}", f"{float(with_weights.log_z) - log_z:+.3f}"]
            )
            print("  ".join(rows[-1]), flush=True)
    return rows


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows]) + "\n"


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    counts = options.particles.split(",")
    particles = by_particles(options)
    head = ["target", "twist", "proposal", *(f"mean, N = {n}" for n in counts), *(f"log Z, {n}" for n in counts)]
    text = table([*head, "C2ST", "floor"], particles)
    text += "\n" + table(["target", "rule", "mean", "log Z", "reported / actual error of Z"], by_rule(options))
    text += "\n" + table(
        ["composition", "steps", "mean, no weights", "mean", "error of log Z"], by_composition(options)
    )
    print("\n" + text)
    (options.out / "steering.md").write_text(text)
    draw(particles, [int(n) for n in counts], options.out / "steering.png")


def draw(rows: list[list[str]], counts: list[int], path: Path) -> None:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError:
        print("no matplotlib, no figure; pip install 'scoresde[plot]'")
        return
    targets = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = plt.subplots(2, len(targets), figsize=(3.2 * len(targets), 5.6), sharex=True, squeeze=False)
    colour: Callable[[int], Any] = plt.get_cmap("tab10")
    for column, target in enumerate(targets):
        own = [row for row in rows if row[0] == target]
        twists = list(dict.fromkeys(row[1] for row in own))
        for row in own:
            style = {"none": "o--", "gradient": "s-"}[row[2]]
            for line, first in ((0, 3), (1, 3 + len(counts))):
                values = [float(v) for v in row[first : first + len(counts)]]
                label = f"{row[1]}, {row[2]}"
                axes[line][column].loglog(counts, values, style, color=colour(twists.index(row[1])), ms=4, label=label)
        guide = torch.tensor(counts, dtype=F64)
        for line in (0, 1):
            axes[line][column].loglog(counts, (guide[0] / guide).sqrt() * 0.5, ":", color="grey", lw=1)
        axes[0][column].set_title(target, fontsize=9)
        axes[1][column].set_xlabel("particles")
    axes[0][0].set_ylabel("error of the mean / sd")
    axes[1][0].set_ylabel("error of log Z")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, ncol=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    for option in fields(Options):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=None)
    given = vars(parser.parse_args())
    quick = given.pop("quick")
    small = {"particles": "8,16", "dims": "2", "problems": 2, "steps": 5, "samples": 20} if quick else {}
    main(Options(**{**small, **{name: value for name, value in given.items() if value is not None}}))
