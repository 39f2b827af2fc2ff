"""Log-densities by the probability flow, compared with RK45 in t and one probe.

    python experiments/likelihood.py            # a minute
    python experiments/likelihood.py --quick    # ten seconds, for CI

The baseline is score_sde's: state and log-determinant in one vector, scipy's RK45 with rtol = atol = 1e-5, from
t = 1e-3 to 1, and two network calls in each right-hand side, for the drift and for its divergence. It solves the whole
batch as one equation, or each sample alone. `ss.log_prob`, whose samples have steps of their own, is run at several
tolerances, and its calls at the error of the baseline are interpolated. The data are mixtures whose density at t_min is
known, so all errors are exact. The error of the prior at T, the same for all methods, is subtracted. A *call* is a pass
of one sample through the network, forward or for one product with its Jacobian. The lean RK45 shares the forward pass
between drift and divergence, which score_sde does not. The script writes its three tables as CSV.

Calls at equal error, with exact traces (batch 32, one thread, 54 s of CPU time in all):

                        baseline: calls, error      log_prob     / RK45    / lean RK45
    2 numbers           each sample  229  2.0e-5       106        0.46        0.61
    2 numbers, sharp    each sample  292  5.6e-5       139        0.47        0.63
    32 numbers          each sample 2777  1.4e-3       840        0.30        0.31
    32 numbers, sharp   each sample 3083  1.3e-3      1038        0.34        0.35
    32 numbers, 8 axes  each sample 3007  1.3e-3       915        0.30        0.31
    2 numbers           whole batch  248  1.8e-5       106        0.43        0.57
    2 numbers, sharp    whole batch  320  7.9e-5       135        0.42        0.56
    32 numbers          whole batch 3536  3.5e-3       746        0.21        0.22
    32 numbers, sharp   whole batch 3740  2.0e-3      1016        0.27        0.28
    32 numbers, 8 axes  whole batch 4148  1.4e-2       743        0.18        0.18

Equal steps for all samples take 0.29 to 0.98 of the calls of RK45, the most on the sharp data in the plane. The time
of `log_prob` is 0.25 to 0.49 of that of RK45 for each sample; both were run as one batch, beside other work. In two
dimensions the calls of the lean RK45 are not halved: a step takes 19 calls, seven for the state and twelve for four
traces, and fewer traces cost more in accuracy than they save.

Points in the plane far from the data, at four (std 0.3) and six (std 0.1) standard deviations from a sample:

                                       calls     rms error    largest error (nats)
    std 0.3   RK45 in t, 1e-5           268       1.9e-4         9.3e-4
              log_prob, 1e-5            162       8.0e-7         2.5e-6
              RK45, as many calls       162       7.3e-3         2.7e-2
    std 0.1   RK45 in t, 1e-5           476       1.3e-3         4.0e-3
              log_prob, 1e-5            288       5.9e-6         2.0e-5
              RK45, as many calls       288       9.9e-2         3.2e-1
              log_prob, down to σ = 0   291       3.1e-5         1.7e-4

At equal cost (4 steps, and as many probes as this cost allows) the error is smaller than that of one plain probe by the
factor

                         rademacher   orthogonal   hutch++   orthogonal | hutch++ with a Gaussian reference
    32 numbers              4.6          6.5        18.1              2.8 | 151
    32 numbers, sharp       4.8          7.0        18.2              2.0 | 116
    32 numbers, 8 axes      3.9          6.5         3.9              6.7 | 4.6

A Gaussian with the data's covariance as control variate makes plain probes worse on most mixtures: near data the
posterior has one component, while the reference subtracts the variance between components. It improves the prior.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import scoresde as ss
from scoresde.integrators import Control, DormandPrince, integrate
from scoresde.likelihood import Probes, Tolerance, jacobian_products

F64 = torch.float64
T_MIN = 1e-3


@dataclass
class Options:
    """Options of the command line."""

    batch: int = 32
    repeats: int = 8
    threads: int = 1
    out: Path = Path(__file__).parent / "out"


def mixtures() -> dict[str, ss.GaussianMixture]:
    def draw(seed: int, *shape: int) -> Tensor:
        return ss.Noise(seed).normal(shape, 0, dtype=F64)

    fade = 1 / torch.arange(1.0, 9.0, dtype=F64)
    return {
        "2 numbers": ss.GaussianMixture(ss.VP(), draw(0, 6, 2), std=0.3),
        "2 numbers, sharp": ss.GaussianMixture(ss.VP(), draw(0, 6, 2), std=0.1),
        "32 numbers": ss.GaussianMixture(ss.VP(), draw(0, 6, 32), std=0.3),
        "32 numbers, sharp": ss.GaussianMixture(ss.VP(), draw(0, 6, 32), std=0.1),
        "32 numbers, 8 axes": ss.GaussianMixture(
            ss.VP(), 0.7 * draw(0, 4, 32), factor=draw(1, 4, 32, 8) * fade, std=0.1
        ),
    }


@dataclass
class Densities:
    """Log-densities by one method on one mixture."""

    value: Tensor
    latent: Tensor
    prior: Tensor
    calls: float  # per sample
    seconds: float


def baseline(model: ss.GaussianMixture, x: Tensor, tolerance: float, probe: Tensor | None) -> Densities:
    """Log-densities as in score_sde, with an exact trace if `probe` is None."""
    B, D = x.shape
    calls = 0
    vectors = torch.eye(D, dtype=F64)[:, None].expand(D, B, D) if probe is None else probe[None]

    def rhs(t: float, flat: np.ndarray) -> np.ndarray:
        nonlocal calls
        y = torch.from_numpy(flat[: B * D]).reshape(B, D)
        drift = model.velocity(y, t)
        products = jacobian_products(lambda z: model.velocity(z, t), y)(vectors)
        calls += 2 + len(vectors)
        return np.concatenate([drift.numpy().ravel(), (products * vectors).sum((0, 2)).numpy()])

    start = time.process_time()
    flat = np.concatenate([x.numpy().ravel(), np.zeros(B)])
    end = torch.from_numpy(solve_ivp(rhs, (T_MIN, 1.0), flat, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1])
    z = end[: B * D].reshape(B, D)
    prior = -0.5 * (z.square().sum(1) + D * math.log(2 * math.pi))
    return Densities(prior + end[B * D :], z, prior, calls, time.process_time() - start)


def ours(model: ss.GaussianMixture, x: Tensor, **options: Any) -> Densities:
    start = time.process_time()
    result = ss.log_prob(model, x, t_min=T_MIN, to_zero=False, **options)
    seconds = time.process_time() - start
    calls = float((result.nfe + result.products).double().mean())
    return Densities(result.value, result.latent, result.prior, calls, seconds)


def each_sample(model: ss.GaussianMixture, x: Tensor, tolerance: float) -> Densities:
    """The same as `baseline` on one sample at a time: scipy's control of the steps, for all samples in one batch."""
    D = x.shape[1]
    vectors = torch.eye(D, dtype=F64)[:, None]

    def rhs(t: Tensor, y: tuple[Tensor, ...], rows: Tensor | None) -> Tensor:
        z = y[0][:, :D]
        drift = model.velocity(z, t)
        v = vectors.expand(D, *z.shape)
        trace = (jacobian_products(lambda z: model.velocity(z, t), z)(v) * v).sum((0, 2))
        return torch.cat([drift, trace[:, None]], 1)

    control = Control(tolerance, tolerance, factors=(0.2, 10.0), balance=False, max_nfe=100_000)
    start = time.process_time()
    run = integrate(rhs, torch.cat([x, torch.zeros_like(x[:, :1])], 1), T_MIN, 1.0, DormandPrince(), control)
    z, log_det = run.y[0][:, :D], run.y[0][:, D]
    prior = -0.5 * (z.square().sum(1) + D * math.log(2 * math.pi))
    calls = (2 + D) * float(run.stats.nfe.double().mean())
    return Densities(prior + log_det, z, prior, calls, time.process_time() - start)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def own_error(mix: ss.GaussianMixture, run: Densities, exact: Tensor) -> Tensor:
    """Error of a run, without that of its prior."""
    return run.value + mix.log_prob(run.latent, 1.0) - run.prior - exact


Curve = list[tuple[float, float, float]]
"""Error, calls and seconds of runs of one method."""


def curve(mix: ss.GaussianMixture, runs: list[Densities], exact: Tensor) -> Curve:
    return [(rms(own_error(mix, run, exact)), run.calls, run.seconds) for run in runs]


def read(points: Curve, column: int, at: float, where: int = 0) -> float:
    """One column of a curve where another has the value `at`, by interpolation of logarithms; NaN outside."""
    table = np.log(np.array(sorted(points, key=lambda point: point[where])))
    return math.exp(np.interp(math.log(at), table[:, where], table[:, column], math.nan, math.nan))


def with_tolerances(mix: ss.GaussianMixture, x: Tensor, options: Options) -> list[Densities]:
    tolerances = (1e-3, 1e-4, 1e-5) if len(x) < 8 else (1e-2, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
    return [ours(mix, x, tolerance=Tolerance(rtol=tol, atol=tol)) for tol in tolerances]


def at_equal_error(name: str, mix: ss.GaussianMixture, options: Options) -> list[tuple[str, ...]]:
    """Exact traces: the recipe at 1e-5, and what `log_prob` needs for the same error."""
    x = mix.sample(options.batch, T_MIN, seed=1)
    exact, D = mix.log_prob(x, T_MIN), x.shape[1]
    recipes = {"whole batch": baseline(mix, x, 1e-5, None), "each sample": each_sample(mix, x, 1e-5)}
    own = curve(mix, with_tolerances(mix, x, options), exact)
    numbers = (4, 8, 16) if options.batch < 8 else (4, 5, 6, 8, 10, 12, 16, 20)
    equal = curve(mix, [ours(mix, x, tolerance=Tolerance(steps=n)) for n in numbers], exact)
    rows = []
    for kind, recipe in recipes.items():
        error = rms(own_error(mix, recipe, exact))
        calls, seconds, of_equal = (read(*job, error) for job in ((own, 1), (own, 2), (equal, 1)))
        lean = recipe.calls * (1 + D) / (2 + D)
        numbers_of_row = (calls / recipe.calls, calls / lean, of_equal / recipe.calls, seconds / recipe.seconds)
        cells = (f"{recipe.calls:.0f}", f"{error:.1e}", f"{calls:.0f}", *(f"{v:.2f}" for v in numbers_of_row))
        rows.append((name, kind, *cells))
    return rows


def tails(std: float, options: Options) -> list[tuple[str, ...]]:
    """Points far from the data in the plane: four and six standard deviations of a component from a sample."""
    mix = mixtures()["2 numbers" if std == 0.3 else "2 numbers, sharp"]
    away = ss.Noise(5).normal((options.batch, 2), 0, dtype=F64)
    away = (4 if std == 0.3 else 6) * std * away / away.norm(dim=1, keepdim=True)
    x, clean = (mix.sample(options.batch, t, seed=3) + away for t in (T_MIN, 0.0))
    exact = mix.log_prob(x, T_MIN)
    recipes = {tol: each_sample(mix, x, tol) for tol in (0.1, 1e-2, 1e-3, 1e-4, 1e-5)}
    error = {tol: own_error(mix, run, exact).abs() for tol, run in recipes.items()}
    rows = []

    def add(method: str, calls: float, e: Tensor) -> None:
        rows.append((f"std {std}", method, f"{calls:.0f}", f"{rms(e):.1e}", f"{float(e.max()):.1e}"))

    for tol in (1e-4, 1e-5):
        add(f"RK45 in t, {tol:g}", recipes[tol].calls, error[tol])
        run = ours(mix, x, tolerance=Tolerance(rtol=tol, atol=tol))
        e = own_error(mix, run, exact).abs()
        add(f"log_prob, {tol:g}", run.calls, e)
        points = [(rms(error[t]), recipes[t].calls, float(error[t].max())) for t in recipes]
        same = ["" if math.isnan(v := read(points, k, run.calls, 1)) else f"{v:.1e}" for k in (0, 2)]
        rows.append((f"std {std}", "RK45 in t, as many calls", f"{run.calls:.0f}", *same))
    found = ss.log_prob(mix, clean)
    run = Densities(found.value, found.latent, found.prior, float((found.nfe + found.products).double().mean()), 0.0)
    add("log_prob, 1e-05, down to σ = 0", run.calls, own_error(mix, run, mix.log_prob(clean)).abs())
    return rows


def at_equal_cost(name: str, mix: ss.GaussianMixture, options: Options) -> list[tuple[str, ...]]:
    """Probes: root mean square errors against the exact trace, over seeds, with at most the calls of the baseline."""
    x = mix.sample(options.batch, T_MIN, seed=1)
    D, steps = x.shape[1], 4
    truth = ours(mix, x, tolerance=Tolerance(steps=24)).value
    probes = [ss.Noise(seed).fork(9).like(x, 0).sign() for seed in range(options.repeats)]
    plain = [baseline(mix, x, 1e-5, probe) for probe in probes]
    base_error, base_calls = rms(torch.stack([run.value - truth for run in plain])), plain[0].calls
    rows = [(name, "one probe, RK45 in t", f"{base_calls:.0f}", f"{base_error:.2f}", "")]
    fit = ss.GaussianMixture(mix.sde, mix.mean()[None], cov=mix.covariance()[None])
    nodes = 4 * steps
    n = min(int((base_calls - (6 * steps + 1 + nodes)) // nodes), D)
    rademacher, orthogonal = Probes("hutchinson", n, "rademacher"), Probes("hutchinson", n)
    kinds: dict[str, tuple[Probes, ss.GaussianMixture | None]] = {
        "rademacher": (rademacher, None),
        "orthogonal": (orthogonal, None),
        "hutch++": (Probes("hutch++", n), None),
        "orthogonal, Gaussian reference": (orthogonal, fit),
        "hutch++, Gaussian reference": (Probes("hutch++", n), fit),
    }
    for kind, (how, reference) in kinds.items():
        run = partial(ours, mix, x, probes=how, reference=reference, tolerance=Tolerance(steps=steps))
        runs = [run(seed=seed) for seed in range(options.repeats)]
        shift = 0.0 if reference is None else mix.log_prob(runs[0].latent, 1.0) - runs[0].prior
        shift0 = 0.0 if reference is None else mix.log_prob(plain[0].latent, 1.0) - plain[0].prior
        error = rms(torch.stack([run.value + shift - truth - shift0 for run in runs]))
        rows.append(
            (
                name,
                f"{n} {kind}",
                f"{runs[0].calls:.0f}",
                f"{error:.2f}",
                f"{base_error / error:.1f}",
            )
        )
    return rows


def show(title: str, columns: tuple[str, ...], rows: list[tuple[str, ...]], file: Path) -> None:
    width = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    print(f"\n{title}")
    print("\n".join("  ".join(c.rjust(w) for c, w in zip(row, width, strict=True)) for row in (columns, *rows)))
    with file.open("w", newline="") as out:
        csv.writer(out).writerows([columns, *rows])


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    warm_up = Tolerance(steps=1)  # torch imports some modules at the first use
    ours(mixtures()["2 numbers"], torch.zeros(1, 2, dtype=F64), tolerance=warm_up)
    exact, probes = [], []
    quick = options.batch < 8
    far = [row for std in ((0.3,) if quick else (0.3, 0.1)) for row in tails(std, options)]
    for name, mix in mixtures().items():
        if quick and name not in ("2 numbers", "32 numbers"):
            continue
        exact += at_equal_error(name, mix, options)
        if "32" in name:
            probes += at_equal_cost(name, mix, options)
    columns = (
        "data",
        "RK45 in t",
        "calls",
        "error",
        "log_prob",
        "/ RK45",
        "/ lean RK45",
        "steps / RK45",
        "time / RK45",
    )
    show("Exact traces, at equal error (nats, rms over samples)", columns, exact, options.out / "likelihood_exact.csv")
    columns = ("data", "method", "calls", "rms error", "largest")
    show("Tails in the plane (nats)", columns, far, options.out / "likelihood_tails.csv")
    columns = ("data", "method", "calls", "error", "times smaller")
    show("Probes, at equal cost (nats, rms)", columns, probes, options.out / "likelihood_probes.csv")


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few samples and repeats, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(batch=4, repeats=1)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
