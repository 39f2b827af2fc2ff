"""Log-densities by the probability flow, compared with RK45 in t on the whole batch and one probe.

    python experiments/likelihood.py            # two minutes
    python experiments/likelihood.py --quick    # half a minute, for CI

The baseline is score_sde's: state and log-determinant in one vector, scipy's RK45 with rtol = atol = 1e-5, from
t = 1e-3 to 1, and two network calls in each right-hand side, for the drift and for its divergence. It is compared with
`ss.log_prob` at several tolerances. The data are mixtures whose density at t_min is known, so all errors are exact. The
error of the prior at T, the same for all methods, is subtracted and shown separately. A *call* is a pass of one sample
through the network, forward or for one product with its Jacobian. The script writes both tables as CSV.

Measured (batch 64, 8 seeds, one thread; on a machine with other load, so only the ratios of times are meaningful):

                         calls / baseline     time / baseline     error of baseline and ours (nats)
    2 numbers                   0.53                0.83              1.6e-5, 4.5e-6
    2 numbers, sharp            0.47                1.09              6.1e-5, 4.8e-5
    32 numbers                  0.25                0.16              3.8e-3, 1.5e-3
    32 numbers, sharp           0.35                0.28              1.1e-3, 7.3e-4
    32 numbers, 8 axes          0.19                0.30              7.2e-3, 6.6e-3

Equal steps for all samples need more calls: 0.3 to 1.3 of the baseline at no larger error, but for a third more on the
sharp data in the plane. The error of the prior at T is 3e-3 to 2e-2 nats, larger than that of either solver.

At equal cost (5 steps, and as many probes as this cost allows) the error is smaller than that of one plain probe by the
factor

                         rademacher   orthogonal   hutch++   orthogonal | hutch++ with a Gaussian reference
    32 numbers              4.3          5.9        13.7              2.7 | 13.8
    32 numbers, sharp       4.2          5.3         8.8              1.7 | 27.0
    32 numbers, 8 axes      4.6          8.5         4.6              5.9 | 4.4

A Gaussian with the data's covariance as control variate makes plain probes worse on mixtures: near data the posterior
has one component, while the reference subtracts the variance between components. The reference improves the prior.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import scoresde as ss
from scoresde.likelihood import Probes, Tolerance, jacobian_products

F64 = torch.float64
T_MIN = 1e-3


@dataclass
class Options:
    """Options of the command line."""

    batch: int = 64
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

    start = time.perf_counter()
    flat = np.concatenate([x.numpy().ravel(), np.zeros(B)])
    end = torch.from_numpy(solve_ivp(rhs, (T_MIN, 1.0), flat, rtol=tolerance, atol=tolerance, method="RK45").y[:, -1])
    z = end[: B * D].reshape(B, D)
    prior = -0.5 * (z.square().sum(1) + D * math.log(2 * math.pi))
    return Densities(prior + end[B * D :], z, prior, calls, time.perf_counter() - start)


def ours(model: ss.GaussianMixture, x: Tensor, **options: Any) -> Densities:
    start = time.perf_counter()
    result = ss.log_prob(model, x, t_min=T_MIN, to_zero=False, **options)
    seconds = time.perf_counter() - start
    calls = float((result.nfe + result.products).double().mean())
    return Densities(result.value, result.latent, result.prior, calls, seconds)


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def at_equal_error(name: str, mix: ss.GaussianMixture, options: Options) -> list[tuple[str, ...]]:
    """Exact traces: the baseline, and our cheapest run that is at least as accurate."""
    x = mix.sample(options.batch, T_MIN, seed=1)
    exact = mix.log_prob(x, T_MIN)

    def errors(run: Densities) -> tuple[float, float]:
        gap = mix.log_prob(run.latent, 1.0) - run.prior
        return rms(run.value + gap - exact), rms(gap)

    runs: dict[str, Callable[[], Densities]] = {
        f"tolerance {tol:g}": partial(ours, mix, x, tolerance=Tolerance(rtol=tol, atol=tol))
        for tol in (1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6)
    }
    runs |= {
        f"{n} steps": partial(ours, mix, x, tolerance=Tolerance(steps=n)) for n in (4, 5, 6, 8, 10, 12, 16, 20, 30)
    }
    base = baseline(mix, x, 1e-5, None)
    base_error, gap = errors(base)
    rows = [(name, "RK45 in t", f"{base.calls:.0f}", f"{base_error:.1e}", "", f"{base.seconds:.2f}", "", f"{gap:.1e}")]
    for kind in ("tolerance", "steps"):
        done = {name: go() for name, go in runs.items() if kind in name}
        good = {name: run for name, run in done.items() if errors(run)[0] <= base_error}
        pick = min(good, key=lambda k: good[k].calls) if good else min(done, key=lambda k: errors(done[k])[0])
        best = done[pick]
        rows.append(
            (
                name,
                pick,
                f"{best.calls:.0f}",
                f"{errors(best)[0]:.1e}",
                f"{best.calls / base.calls:.2f}",
                f"{best.seconds:.2f}",
                f"{best.seconds / base.seconds:.2f}",
                f"{errors(best)[1]:.1e}",
            )
        )
    return rows


def at_equal_cost(name: str, mix: ss.GaussianMixture, options: Options) -> list[tuple[str, ...]]:
    """Probes: root mean square errors against the exact trace, over seeds, with at most the calls of the baseline."""
    x = mix.sample(options.batch, T_MIN, seed=1)
    D, steps = x.shape[1], 5
    truth = ours(mix, x, tolerance=Tolerance(steps=24)).value
    probes = [ss.Noise(seed).fork(9).like(x, 0).sign() for seed in range(options.repeats)]
    plain = [baseline(mix, x, 1e-5, probe) for probe in probes]
    base_error, base_calls = rms(torch.stack([run.value - truth for run in plain])), plain[0].calls
    rows = [(name, "one probe, RK45 in t", f"{base_calls:.0f}", f"{base_error:.2f}", "")]
    fit = ss.GaussianMixture(mix.sde, mix.mean()[None], cov=mix.covariance()[None])
    nodes = 3 * steps
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
    for name, mix in mixtures().items():
        exact += at_equal_error(name, mix, options)
        if "32" in name:
            probes += at_equal_cost(name, mix, options)
    columns = ("data", "method", "calls", "error", "/ baseline", "seconds", "/ baseline", "prior's error")
    show("Exact traces, at equal error (nats, rms over samples)", columns, exact, options.out / "likelihood_exact.csv")
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
