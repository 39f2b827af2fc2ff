"""Cost of noise keyed by sample: ``Noise.normal`` against ``torch.randn``, whose numbers depend on the batch.

    python experiments/noise_cost.py            # a minute
    python experiments/noise_cost.py --quick    # seconds, for CI

Both draw each shape and dtype in turn, and the table compares the medians of their times; also on CUDA if available.
The script writes the table as CSV and as Markdown.

Measured in one thread of a shared 2-core machine (AMD EPYC, torch 2.13), as a multiple of the time of torch.randn:

    shape              float32   float64   remark
    (16, 3, 32, 32)    1.8       0.7       6.2 ns per number in float32, randn 3.5
    (64, 3072)         1.5       0.7
    (1024, 1024)       1.4       0.6
    (4096, 2)          6.9       2.3       each row computes four numbers and uses two
    (1, 4)             4.5       7.4       21 µs in float32

Beside other jobs on both cores, the ratios in float32 were 2.0, 1.9, 1.5, 7.3 and 4.3, with ten rounds in int64
arithmetic of torch (version 0.1.0) 5.8, 6.5, 6.2, 18.6 and 37.6.

A step of a stochastic solver without a network takes 21 µs with fresh normals and 0.86 ms with a Brownian path on
(1, 4), and 0.33 ms and 5.5 ms on (16, 3, 32, 32): 42 and 17 times as much, because the path descends a binary tree.

Fresh normals are cheap compared with a network that takes some milliseconds. In float64, log, sin and cos are torch's:
with more threads than idle cores they take up to 100 times longer on this machine. Give torch as many threads as idle
cores.
Nothing was measured on a GPU, where the same numbers come from elementwise operations of torch.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import scoresde as ss

SHAPES = [(1, 4), (16, 3, 32, 32), (64, 3072), (4096, 2), (1024, 1024)]
STEPS = 20  # of the stochastic solver on a Brownian path
COLUMNS = ("device", "dtype", "shape", "randn_us", "noise_us", "ns_per_number", "ratio")


@dataclass
class Options:
    """Options of the command line."""

    repeats: int = 300
    seconds: float = 4.0  # limit for each line of the table
    threads: int = 1  # torch.randn uses one on a CPU, as the integer arithmetic of Noise.normal does
    out: Path = Path(__file__).parent / "out"


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: str, options: Options) -> tuple[float, float]:
    """Median seconds of torch.randn and of Noise.normal, called in turn under the same load of the machine."""
    noise = ss.Noise(0)
    calls = (
        lambda: torch.randn(shape, dtype=dtype, device=device),
        lambda: noise.normal(shape, 0, dtype=dtype, device=device),
    )
    # The time of one thread does not include other processes.
    now = time.thread_time if device == "cpu" and options.threads == 1 else time.perf_counter

    def clock(call: Callable[[], object]) -> float:
        start = now()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        return now() - start

    warm = max(sum(map(clock, calls)) for _ in range(2))
    repeats = max(5, min(options.repeats, int(options.seconds / max(warm, 1e-6))))
    randn, keyed = zip(*([clock(call) for call in calls] for _ in range(repeats)), strict=True)
    return statistics.median(randn), statistics.median(keyed)


def brownian(shape: tuple[int, ...], options: Options) -> tuple[float, float]:
    """Median seconds of a stochastic step without a network: with fresh normals, and with a Brownian path."""
    x = torch.ones(shape)
    plan = ss.SDEDPMSolverPP(2).plan(ss.VP(), ss.grids.karras(ss.VP(), STEPS))

    def clock(seed: int, path: bool) -> float:
        start = time.thread_time()
        ss.plan.run(plan, lambda x, t: x, x, ss.Noise(seed, path=path))
        return (time.thread_time() - start) / STEPS

    clock(0, True), clock(0, False)
    fresh, path = zip(*([clock(k, False), clock(k, True)] for k in range(max(3, options.repeats // 20))), strict=True)
    return statistics.median(fresh), statistics.median(path)


def main(options: Options) -> list[tuple]:
    torch.set_num_threads(options.threads)
    rows = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.float64):
            for shape in SHAPES:
                randn, keyed = measure(shape, dtype, device, options)
                numbers = 1e6 * randn, 1e6 * keyed, 1e9 * keyed / math.prod(shape), keyed / randn
                rows.append((device, str(dtype)[6:], shape, *numbers))
    cells = [
        (device, dtype, "×".join(map(str, shape)), *(f"{number:.1f}" for number in numbers))
        for device, dtype, shape, *numbers in rows
    ]
    width = [max(len(row[i]) for row in (COLUMNS, *cells)) for i in range(len(COLUMNS))]
    print("\n".join("  ".join(c.rjust(w) for c, w in zip(row, width, strict=True)) for row in (COLUMNS, *cells)))
    for shape in SHAPES[:2]:
        fresh, path = brownian(shape, options)
        print(
            f"A stochastic step of {'×'.join(map(str, shape))} without a network: {1e6 * fresh:.0f} µs with fresh "
            f"normals, {1e6 * path:.0f} µs with a Brownian path, {path / fresh:.1f} times as much."
        )
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "noise_cost.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *cells])
    lines = [COLUMNS, ("---",) * len(COLUMNS), *cells]
    (options.out / "noise_cost.md").write_text("".join(f"| {' | '.join(row)} |\n" for row in lines))
    return rows


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few repeats, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(repeats=20, seconds=0.3)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
