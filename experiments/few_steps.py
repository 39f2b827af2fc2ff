"""Standard deviations of deterministic solvers with few steps on Gaussian data, exact, from the coefficients.

    python experiments/few_steps.py            # about three minutes
    python experiments/few_steps.py --quick    # seconds, for CI

Each deterministic solver writes its plan for every process, grid and number of steps. On Gaussian data a plan is a
number: the result has the standard deviation of the data, times a ratio. The script prints a table for each grid: the
smallest and the largest ratio over the processes and the standard deviations 1, 0.6, 0.3 and 0.05 of the data, and in
brackets the number of processes for which `sample` warns. A ratio below 1 is a loss of detail, which every first-order
rule has with few steps; one above 1 is an error that the plan amplifies. Then it lists the cases with the largest
ratios, and those in which the default solver warns, and writes all numbers to a CSV.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import scoresde as ss
from scoresde.sampling.few_steps import warn_of_few_steps

STDS = (1.0, 0.6, 0.3, 0.05)
STEPS = (4, 5, 6, 8, 10, 15, 20, 40)
GRIDS = {"default": ss.grids.quadratic_vp, "karras": ss.grids.karras, "uniform_lam": ss.grids.uniform_lam}
PROCESSES: dict[str, ss.SDE] = {
    **{cls.__name__: cls() for cls in (ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.EDM, ss.Flow, ss.Trig)},
    "Cosine to the end": ss.Cosine(T=1.0),
    "Polynomial": ss.processes.Polynomial(n=2.0),
    "Discrete linear": ss.Discrete(ss.processes.betas("linear", 1000)),
    "Discrete cosine": ss.Discrete(ss.processes.betas("cosine", 1000)),
    "Discrete zero SNR": ss.Discrete(ss.processes.zero_terminal_snr(ss.processes.betas("scaled_linear", 1000))),
}
SOLVERS = """
DDIM()  Euler()  Heun()  Midpoint()  RungeKutta4()  EDMHeun()  DPM2()  DEISRungeKutta(RK4)  DPMSolver(2)  DPMSolver(3)
DPMSolver(2,kind="multi")  DPMSolver(3,kind="multi")  DPMSolverPP(2)  DPMSolverPP(3)  DPMSolverPP(2,kind="single")
DPMSolverPP(3,kind="single")  UniPC(1)  UniPC(2)  UniPC(3)  UniPC(4)  UniPC(3,"bh1")  UniPC(3,prediction=NOISE)
DEIS(2)  DEIS(3)  DEIS(4)  LMS(2)  LMS(3)  LMS(4)  VelocityAB(2)  VelocityAB(3)  VelocityAB(4)  RES(2)  RES(3)
ETDRK4()  PNDM()  PLMS()  IPNDM(3)  IPNDM(4)  AcceleratedDDIM()
""".split()


@dataclass
class Options:
    """Options of the command line."""

    grids: str = ",".join(GRIDS)
    every: int = 1
    worst: int = 20  # number of cases that are listed
    out: Path = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Case:
    """Result of one plan: the ratio of the standard deviations for each of `STDS`."""

    grid: str
    process: str
    solver: str
    steps: int
    nfe: int
    ratios: tuple[float, ...]
    amplification: float
    warns: bool


def measure(solver: ss.solvers.Solver, name: str, grid: str, process: str, steps: int) -> Case:
    sde = PROCESSES[process]
    plan = solver.plan(sde, GRIDS[grid](sde, steps))
    ratios = tuple(found / exact for found, exact in ss.analysis.gaussian_stds(plan, sde, STDS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_few_steps(plan, sde)
    return Case(grid, process, name, steps, plan.nfe, ratios, plan.amplification, bool(caught))


def cases(options: Options) -> Iterator[Case]:
    solvers = {text: eval(text, dict(vars(ss.solvers))) for text in SOLVERS[:: options.every]}
    for grid in options.grids.split(","):
        for process, sde in tqdm(PROCESSES.items(), desc=grid, disable=None):
            for steps in STEPS:
                for name, solver in solvers.items():
                    yield measure(solver, name, grid, process, steps)
                for predicts in ("velocity", "eps"):
                    if predicts == "velocity" or sde.alpha(sde.T) > 1e-12:  # ε does not determine the data at α = 0
                        net = ss.Denoiser(lambda x, t: x, PROCESSES["VP"], predicts=predicts)
                        rule = ss.sampling.default_solver(steps, net)
                        yield measure(rule, f"default for {predicts}", grid, process, steps)


def table(found: list[Case]) -> list[str]:
    lines = ["| solver |" + "".join(f" {n} |" for n in STEPS), "|:--|" + "--:|" * len(STEPS)]
    for solver in dict.fromkeys(case.solver for case in found):
        cells = []
        for steps in STEPS:
            here = [case for case in found if case.solver == solver and case.steps == steps]
            ratios = [r for case in here for r in case.ratios]
            warned = sum(case.warns for case in here)
            cells.append(f"{min(ratios):.2g}–{max(ratios):.2g}" + (f" ({warned})" if warned else ""))
        lines.append(f"| {solver} |" + "".join(f" {cell} |" for cell in cells))
    return lines


def main(options: Options) -> Path:
    torch.set_grad_enabled(False)
    found = list(cases(options))
    lines = ["# Standard deviations on Gaussian data, relative to exact", ""]
    for grid in options.grids.split(","):
        here = [case for case in found if case.grid == grid]
        lines += [f"## Grid: {grid}", "", *table(here), "", f"The largest ratios ({grid}):", ""]
        for case in sorted(here, key=lambda case: -max(case.ratios))[: options.worst]:
            std = STDS[case.ratios.index(max(case.ratios))]
            lines.append(f"- {case.solver}, {case.process}, {case.steps} steps: {max(case.ratios):.3g} at {std:g}")
        lines += ["", f"Defaults that warn ({grid}):", ""]
        bad = [case for case in here if case.warns and case.solver.startswith("default")]
        lines += [f"- {c.solver}, {c.process}, {c.steps} steps: {max(c.ratios):.3g}" for c in bad] or ["none"]
        lines.append("")
    print("\n".join(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "few_steps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["grid", "process", "solver", "steps", "nfe", *(f"std {s:g}" for s in STDS), "amplification", "warns"]
        )
        for c in found:
            writer.writerow([c.grid, c.process, c.solver, c.steps, c.nfe, *c.ratios, c.amplification, c.warns])
    page = options.out / "few_steps.md"
    page.write_text("\n".join(lines) + "\n")
    return page


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="a tenth of the solvers on the default grid, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(grids="default", every=10)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
