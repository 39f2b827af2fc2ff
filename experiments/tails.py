"""Tails of the error of short plans on data with several modes: where they come from, and what reduces them.

    python experiments/tails.py            # 5 minutes on an idle core
    python experiments/tails.py --quick    # seconds, for CI

The data are the 32-dimensional mixture of ``work_precision.py`` under VP; 4096 initial states are solved and compared
with a fine solve. A sample is astray if its most probable component differs from that of the fine solve. The script
first measures the expansion of the flow at the initial states, and how much of it belongs to samples that go astray. It
then evaluates solvers with 5 to 60 evaluations, and plans fitted with a Gaussian start: under two losses, on random
trajectories, and on sets of which half start where the flow forks.

The script writes a table.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from work_precision import PROBLEMS

import scoresde as ss

NAME = "anisotropic 32-D"
COLUMNS = "| median | q90 | q99 | RMSE | astray | RMSE of the others |"


@dataclass
class Options:
    """Options of the command line."""

    fresh: int = 4096
    fine: int = 150
    trajectories: int = 192  # for fits; others have four times as many
    steps: int = 200
    budgets: str = "5,10,15,30,60"
    fitted: str = "5,10"
    seed: int = 1
    out: Path = Path(__file__).parent / "out"


class Fresh:
    """Initial states that no fit uses, the result of a fine solve, and its most probable components."""

    def __init__(self, options: Options) -> None:
        self.sde = ss.VP()
        self.model = PROBLEMS[NAME](self.sde)
        self.x = self.sde.prior().sample((options.fresh, 32), ss.Noise(options.seed), dtype=torch.float64)
        self.truth = ss.sample(self.model, self.x, self.plan(options.fine))
        self.home = self.model.responsibilities(self.truth).argmax(1)

    def plan(self, n: int) -> ss.Plan:
        return ss.VelocityAB(3).plan(self.sde, ss.grids.quadratic_vp(self.sde, n))

    def astray(self, y: Tensor) -> Tensor:
        return self.model.responsibilities(y).argmax(1) != self.home

    def row(self, words: str, plan: ss.Plan, start: ss.Gaussian | None = None) -> str:
        y = ss.sample(self.model, self.x, plan, start=start)
        e, lost = (y - self.truth).square().mean(1).sqrt(), self.astray(y)
        q = e.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=e.dtype)).tolist()
        rmse, others = (float(v.square().mean().sqrt()) for v in (e, e[~lost]))
        cells = " | ".join(f"{v:.2e}" for v in (*q, rmse))
        return f"| {words} | {cells} | {float(lost.double().mean()):.2%} | {others:.2e} |"


def main(options: Options) -> None:
    torch.set_num_threads(1)
    fresh = Fresh(options)
    sde, model = fresh.sde, fresh.model
    growth = ss.fitting.expansion(model, fresh.x, fresh.plan(30))
    q = growth.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=growth.dtype)).tolist()
    lost = fresh.astray(ss.sample(model, fresh.x, fresh.plan(5)))
    among = float((growth[lost] > q[1]).double().mean()) if lost.any() else float("nan")
    lines = [
        "# Tails",
        "",
        f"The flow expands the neighbourhood of an initial state by {q[0]:.2f} in the median, {q[1]:.2f} at 90 % and "
        f"{q[2]:.1f} at 99 %. Of the samples that go astray with 5 evaluations, {among:.0%} are among the 10 % with "
        f"the largest expansion.",
        "",
        f"| solver | NFE {COLUMNS}",
        "|:--|--:|--:|--:|--:|--:|--:|--:|",
    ]
    print("\n".join(lines), flush=True)

    def note(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    solvers = {"VelocityAB-3": ss.VelocityAB(3), "DPM-Solver++ 2M": ss.DPMSolverPP(2), "EDM Heun": ss.EDMHeun()}
    for name, solver in solvers.items():
        for n in map(int, options.budgets.split(",")):
            within, steps = solver.for_nfe(n)
            note(fresh.row(f"{name} | {n}", within.plan(sde, ss.grids.power_t(sde, steps))))
    gaussian = ss.Gaussian.of(sde, model.mean(), model.covariance())
    t = gaussian.start_time(model, 0.01)
    for line in ("", f"| fitted on | loss | NFE {COLUMNS} s |", "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|"):
        note(line)
    for n in map(int, options.fitted.split(",")):
        initial = ss.VelocityAB(3).plan(sde, ss.grids.power_t(sde, n, t_start=t))
        note(fresh.row(f"not fitted | | {n}", initial, gaussian) + " |")
        for forks, times, robust in ((0.0, 1, 1.0), (0.0, 4, 10.0), (0.5, 1, 10.0), (0.5, 4, 1.0), (0.5, 4, 10.0)):
            began = time.perf_counter()
            plan = ss.fit(
                initial,
                model,
                (times * options.trajectories, 32),
                start=ss.Start(gaussian=gaussian, dtype=torch.float64),
                split=ss.fitting.Split(forks=forks),
                descent=ss.fitting.Descent(robust=robust),
                steps=options.steps,
                seed=options.seed + 1,
            )
            spent = time.perf_counter() - began
            kind = f"{times * options.trajectories}, " + ("half at forks" if forks else "random")
            note(fresh.row(f"{kind} | robust {robust:g} | {n}", plan, gaussian) + f" {spent:.0f} |")
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "tails.md").write_text("\n".join(lines) + "\n")


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(fresh=256, fine=60, trajectories=24, steps=2, budgets="5,10", fitted="5")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
