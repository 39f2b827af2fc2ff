"""Plans that are fitted to the covariance of the data alone, beside the default and the universal plan.

    python experiments/fitted_to_data.py          # a minute on an idle core; the digits network is trained once
    python experiments/fitted_to_data.py --quick  # seconds, for CI

``ss.fitting.fit_to_data(n, gaussian)`` fits the universal table to random mixtures that have the covariance of the
data. No network is evaluated. The problems are an exact 192-dimensional mixture of low rank, with its exact
covariance, and a v-network of 8 × 8 digits, with the covariance of the training images. The error of a sample is its
distance to a fine solve of the same model, as a root mean square over its entries; the table has the median over the
samples and the root mean square. The same states at T are used for all plans.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _cases import Case, cases

import scoresde as ss

Pair = tuple[float, float]


@dataclass
class Options:
    """Options of the command line."""

    problems: str = "low rank 192-D,digits"
    nfes: str = "5,8,10"
    samples: int = 64
    steps: int = 40
    out: Path = Path(__file__).parent / "out"
    quick: bool = False


def row(case: Case, n: int, options: Options) -> str:
    """Errors of the default, and their ratios to it of the universal plan and of both fits."""
    default = case.errors(None, nfe=n)
    cells = [f"{default[0]:.3g}; {default[1]:.3g}"]
    small = {"problems": 2, "trajectories": 4} if options.quick else {}
    spent = 0.0
    for start in (None, case.gaussian):
        word = "gaussian" if start else "prior"
        began = time.process_time()
        plan = ss.fitting.fit_to_data(n, case.gaussian, start=word, steps=options.steps, **small)
        spent += time.process_time() - began
        for found in (case.errors(ss.solvers.Universal(), start=start, nfe=n), case.errors(plan, start=start)):
            cells.append("; ".join(f"{e / d:.2f}" for e, d in zip(found, default, strict=True)))
    return f"| {case.name} | {n} | {' | '.join(cells)} | {spent / 2:.0f} |"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    columns = [f"{what}{how} / default" for how in ("", ", Gaussian start") for what in ("universal", "fitted to data")]
    lines = [
        f"| problem | evaluations | default: median; RMSE | {' | '.join(columns)} | seconds |",
        f"|:--|--:|--:|{'--:|' * len(columns)}--:|",
    ]
    for case in cases(tuple(options.problems.split(",")), options.out, options.samples):
        for n in map(int, options.nfes.split(",")):
            lines.append(row(case, n, options))
            print(lines[-1], flush=True)
    text = "\n".join(lines)
    (options.out / ("fitted_to_data_quick.md" if options.quick else "fitted_to_data.md")).write_text(text + "\n")
    print(text)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(problems="ring 2-D", nfes="5", samples=4, steps=1)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
