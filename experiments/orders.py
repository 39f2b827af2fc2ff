"""Measure the order of convergence of every solver of the catalogue, and compare it with the declared order.

    python experiments/orders.py            # writes docs/orders.md; about a quarter of an hour
    python experiments/orders.py --quick    # a tenth of the solvers, writes experiments/out/orders.md; for CI

The data is a mixture of three Gaussians in three dimensions, so the denoiser is exact and not linear. Each solver runs
from λ = −2.5 to λ = 2 on steps in λ whose sizes vary smoothly by a factor of three, in float64; the reference is the
classical fourth-order method with 2000 steps. The order is the slope of the median error over 16 initial states
between two numbers of steps. If a slope differs from the declared order by more than 0.2, the script ends with an
error.

A first step of order one would reduce the order of every multistep solver above order two. These solvers therefore
start with single steps of their order where they can (``start="self"``), and otherwise with steps of Krogstad's method
of order four. The window excludes times of almost pure noise or data, where every solver is nearly exact and the slope
has no meaning.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import scoresde as ss
from scoresde.analysis.orders import Order, convergence_order, exact_flow
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.solvers import Leg, Solver, Tape

ROOT = Path(__file__).parents[1]
PROCESSES: dict[str, ss.SDE] = {"VP": ss.VP(), "VE": ss.VE(), "Cosine": ss.Cosine(), "EDM": ss.EDM(), "Flow": ss.Flow()}
WINDOW = (-2.5, 2.0)  # in λ


@dataclass
class Options:
    """Options of the command line."""

    steps: str = "160,320"
    points: int = 16
    every: int = 1
    processes: str = ",".join(PROCESSES)
    out: Path = ROOT / "docs"


@dataclass(frozen=True, repr=False)
class Started(Solver):
    """A multistep solver with first steps by Krogstad's method of order 4, so that its own order can be measured."""

    solver: Solver
    first: int

    @property
    def order(self) -> int:
        return self.solver.order

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        if leg.node is None or leg.node > self.first:
            return self.solver.leg(tape, leg)
        new, _ = ss.solvers.ETDRK4().leg(tape, leg)
        return new, [new, *leg.history]


def catalogue() -> list[str]:
    """Every solver × order × prediction, as a user writes it."""
    out = ["DDIM()"]
    for clock in ("t", "lam"):
        out += [f"{name}(clock={clock!r})" for name in ("Euler", "Heun", "Midpoint", "RungeKutta4")]
    out += ["EDMHeun()", "EDMHeun(alpha=2 / 3)", "EDMHeun(alpha=0.5)", "DPM2()"]
    tableaux = ("EULER", "HEUN", "MIDPOINT", "RALSTON", "KUTTA3", "HEUN3", "RALSTON3", "SSP3", "RK4")
    out += [f"DEISRungeKutta({name})" for name in tableaux]
    out += [f"RungeKutta({name}, VELOCITY)" for name in ("HEUN", "KUTTA3", "RK4")]
    for name in ("DPMSolver", "DPMSolverPP"):
        for form in ("mid", "exact"):
            out += [f"{name}({p}, kind='single', form={form!r})" for p in (2, 3)]
            out.append(f"{name}(2, kind='multi', form={form!r})")
        out += [f"{name}(2, kind='single', r=(0.3,))", f"{name}(3, kind='single', r=(0.4, 0.8))"]
        out += [f"{name}(3, kind='multi', form='exact', start='self')"]
        out += [f"{name}(3, kind='multi', form='published')"]
        out += [f"{name}({p}, kind='multi', form='exact')" for p in (4, 5)]
    for prediction in ("DATA", "NOISE"):
        for form in ("bh2", "bh1", "exact"):
            out += [f"UniPC({p}, {form!r}, {prediction}, start='self')" for p in (1, 2)]
        out.append(f"UniPC(3, 'exact', {prediction}, start='self')")
        out.append(f"UniPC(4, 'exact', {prediction})")
        out += [f"UniPC({p}, 'exact', {prediction}, corrector=False, start='self')" for p in (2, 3)]
    for variable in ("t", "rho", "lam"):
        out += [f"DEIS({p}, {variable!r}, start='self')" for p in (2, 3)] + [f"DEIS(4, {variable!r})"]
    out += [f"LMS({p})" for p in (1, 2, 3, 4)]
    out += [f"VelocityAB({p}, start='self')" for p in (2, 3)] + ["VelocityAB(4)"]
    for prediction in ("VELOCITY", "V", "edm_prediction(0.5)"):
        out += [f"Multistep(3, {prediction}, start='self')", f"Multistep(2, {prediction}, corrector=3, start='self')"]
        out += [f"SingleStep(2, {prediction})", f"SingleStep(3, {prediction})"]
    out += [
        "with_corrector(VelocityAB(2, start='self'))",
        "with_corrector(DPMSolverPP(2, start='self'), reevaluate=True)",
    ]
    out += ["RES(2)", "RES(3)", "RES(3, c2=0.4, c3=0.8)", "ETDRK4()"]
    out.append("DPMSolverV3(Statistics((-6.0, 6.0), (0.9, 0.1), (-0.5, -0.2), (0.1, 0.2)), 2, start='self')")
    out.append("DPMSolverV3(Statistics((-6.0, 6.0), (0.9, 0.1), (-0.5, -0.2)), 3, start='self')")
    out += ["PNDM()", "PLMS()", *(f"IPNDM({p})" for p in (1, 2, 3, 4)), "AcceleratedDDIM()"]
    return out


NAMES = vars(ss.solvers)


def rule(text: str) -> Solver:
    """Evaluate the text of a solver."""
    return eval(text, dict(NAMES))


def at_full_order(solver: Solver) -> Solver:
    """Return the solver, with first steps by Krogstad's method if it raises its order step by step above two."""
    ramps = isinstance(solver, ss.solvers.Multistep) and solver.start == "ramp" and solver.nodes > 2
    return Started(solver, solver.nodes - 1) if ramps else solver


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    means = [[1.0, -0.5, 0.3], [-1.2, 0.3, 1.0], [0.2, 1.1, -0.8]]
    return ss.GaussianMixture(sde, means, std=[0.4, 0.6, 0.8], weights=[1.0, 2.0, 1.5])


def once(reference: Callable[[Tensor, float, float], Tensor]) -> Callable[[Tensor, float, float], Tensor]:
    """Cache a reference: all measurements on a model have the same initial states and window."""
    known: list[Tensor] = []

    def flow(x: Tensor, s: float, t: float) -> Tensor:
        if not known:
            known.append(reference(x, s, t))
        return known[0]

    return flow


def measure(solver: Solver, model: AbstractDenoiser, reference, steps: tuple[int, ...], points: int = 16) -> Order:
    """Measure the order of a solver, started at full order, in the window."""
    first, last = (model.sde.t_of_lam(lam) for lam in WINDOW)
    return convergence_order(
        at_full_order(solver), model, steps=steps, t_start=first, t_end=last, reference=reference, n=points
    )


def main(options: Options) -> Path:
    torch.set_num_threads(1)  # states are tiny: a second thread costs more than it saves
    steps = tuple(int(n) for n in options.steps.split(","))
    models = {name: mixture(PROCESSES[name]) for name in options.processes.split(",")}
    flows = {name: once(exact_flow(model)) for name, model in models.items()}
    rows, wrong = [], []
    for text in tqdm(catalogue()[:: options.every], desc="solvers", disable=None):
        solver = rule(text)
        measured = {name: measure(solver, model, flows[name], steps, options.points) for name, model in models.items()}
        slopes = [order.slope for order in measured.values()]
        if any(abs(slope - solver.order) > 0.2 for slope in slopes):
            wrong.append(f"{text}: declared {solver.order}, measured {[round(slope, 2) for slope in slopes]}")
        started = "†" if at_full_order(solver) is not solver else ""
        error = next(iter(measured.values())).errors[0]
        cells = [f"`{text}`{started}", str(solver.order), *(f"{s:.2f}" for s in slopes)]
        rows.append([*cells, str(solver.stages), f"{error:.0e}"])
    head = ["solver", "declared", *models, "evaluations per step", f"error at {steps[0]} steps"]
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    page = options.out / "orders.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(PAGE.format(steps=" and ".join(map(str, steps)), points=options.points, table="\n".join(table)))
    print("\n".join(table), f"\npage: {page}", sep="\n")
    if wrong:
        sys.exit("not of their declared order:\n" + "\n".join(wrong))
    return page


PAGE = """# Orders

This page lists every solver with its declared order and its measured order. `python experiments/orders.py` measures
them and writes this page.

The data is a mixture of three Gaussians, whose denoiser is exact and not linear. The measured order is the slope of
the median error over {points} initial states between {steps} steps, in float64, from $\\lambda = -2.5$ to
$\\lambda = 2$, with steps in $\\lambda$ whose sizes vary smoothly by a factor of three. All slopes lie within 0.2 of
the declared order. Solvers that use λ alone have the same slope on all processes, because their states differ by the
factor α only.

A first step of order one does not lower the order of solvers of order one and two. A multistep solver of higher order
has its order only if the first steps have it too: single steps of the same order (`start='self'`) or, where marked †,
steps of a single-step method of order four. With `start='ramp'`, as published, it is more accurate than order two but
does not reach its own order. `form='published'` is the formula that public code calls order three. PNDM, PLMS and
iPNDM use the coefficients of equal steps, which give order two on other grids.

On one Gaussian the methods with a stage at the middle of a step (`EDMHeun(alpha=0.5)`, `DEISRungeKutta(MIDPOINT)`)
have order three instead of two, because their leading error vanishes for a linear denoiser. The last column is the
median error on the coarser grid under the first process; it compares solvers at equal numbers of steps, not of
evaluations.

{table}

† first steps by a single-step method of order four
"""


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="a tenth of the solvers on two processes, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(every=10, processes="VP,EDM", points=4, out=ROOT / "experiments" / "out")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
