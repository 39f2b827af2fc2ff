"""Cost of one evaluation of a Gaussian mixture, for each kind of covariance.

    python experiments/mixture_cost.py            # half a minute
    python experiments/mixture_cost.py --quick    # seconds, for CI

Samplers evaluate ``x0``, with one time for all rows or one for each row; tests evaluate ``score`` and ``log_prob``. The
table shows medians over repeats, which are interleaved, so that all run under the same load of the machine; also on
CUDA if available. The script writes the table as CSV.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import scoresde as ss

SIZES = [(192, 20, 1024), (2, 8, 256)]  # dimension of an event, number of components, batch size
KINDS = ("iso", "diag", "low rank 8", "full")
COLUMNS = ("device", "D", "K", "B", "covariance", "x0_ms", "x0_each_row_ms", "score_ms", "log_prob_ms")


@dataclass
class Options:
    """Options of the command line."""

    repeats: int = 30
    seconds: float = 2.0  # limit for each line of the table
    threads: int = torch.get_num_threads()
    out: Path = Path(__file__).parent / "out"


def mixture(kind: str, size: int, components: int) -> ss.GaussianMixture:
    draw = lambda *shape: ss.Noise(0).normal(shape, 0, dtype=torch.float64)  # noqa: E731
    means = draw(components, size)
    if kind == "iso":
        return ss.GaussianMixture(ss.VP(), means, std=0.3)
    if kind == "diag":
        return ss.GaussianMixture(ss.VP(), means, std=draw(components, size).abs() + 0.1)
    if kind == "full":
        root = draw(components, size, size) / size**0.5
        return ss.GaussianMixture(ss.VP(), means, cov=root @ root.mT + 0.01 * torch.eye(size))
    return ss.GaussianMixture(ss.VP(), means, std=0.1, factor=draw(components, size, min(8, size)))


def clock(call: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(kind: str, sizes: tuple[int, int, int], device: str, options: Options) -> list[float]:
    """Median milliseconds of each column."""
    size, components, batch = sizes
    mix = mixture(kind, size, components)
    x = mix.sample(batch, 0.5, seed=0).to(device)
    mix = mix.to(device)
    t = torch.linspace(0.1, 0.9, batch, dtype=torch.float64, device=device)
    calls = (lambda: mix.x0(x, 0.5), lambda: mix.x0(x, t), lambda: mix.score(x, 0.5), lambda: mix.log_prob(x, 0.5))
    warm = max(sum(clock(call, device) for call in calls) for _ in range(2))
    repeats = max(3, min(options.repeats, int(options.seconds / warm)))
    samples = [[clock(call, device) for call in calls] for _ in range(repeats)]
    return [1e3 * statistics.median(column) for column in zip(*samples, strict=True)]


def main(options: Options) -> list[tuple[str, ...]]:
    torch.set_num_threads(options.threads)
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for sizes in SIZES:
            for kind in KINDS:
                ms = measure(kind, sizes, device, options)
                rows.append((device, *map(str, sizes), kind, *(f"{value:.2f}" for value in ms)))
    width = [max(len(row[i]) for row in (COLUMNS, *rows)) for i in range(len(COLUMNS))]
    print("\n".join("  ".join(c.rjust(w) for c, w in zip(row, width, strict=True)) for row in (COLUMNS, *rows)))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "mixture_cost.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return rows


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few repeats, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(repeats=3, seconds=0.2)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
