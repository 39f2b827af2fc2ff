"""Error against the number of evaluations: the default, all our solvers, and the samplers of three other libraries.

    pip install diffusers azula; pip install --no-deps k-diffusion   # each is optional, and skipped if it is missing
    python experiments/work_precision.py             # minutes; writes the tables into docs/work-precision.md
    python experiments/work_precision.py --again default,statistics  # these; the rest from the CSV of the last run
    python experiments/work_precision.py --resume    # go on after an interruption
    python experiments/work_precision.py --quick     # seconds, for CI

The problems of ``_problems.py`` are exact mixtures, alone and with the smooth error of a network that predicts v (1 and
5 %) or ε (1 %). They are in two halves: solvers and defaults may be chosen on the first half; the second half is only
printed. All samplers start from the same states at T, and each result is compared with a fine solve of the same flow to
t = 0. The error is the distance per number of a state: its median over the states, and its root mean square.

In each case, a problem with a budget, the frontier is the smallest error over all our solvers × grids and over all
samplers of the other libraries × their grids and options (``_peers.py``), chosen in hindsight for each case and for the
median and the RMSE apart. Tables show ratios to the frontier: geometric mean, and the largest. Two rules that use the
data have columns of their own and are not in the frontier: DPM-Solver-v3 with statistics of the model, and the anchored
residual with the data's standard deviation. Of both the same pair is used in all cases of a half and a budget: the best
on the first half.

A fixed choice cannot reach the frontier, whose sampler differs from case to case. The "best single" is the nearest that
one can come: for each table and budget, the solver and grid, of all ours and theirs, with the smallest geometric mean
of its ratios, chosen in hindsight on that table. A last section names them and has their ratios on the other half.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from _peers import LIBRARIES, beta_list, installed
from _problems import CASES, PROBLEMS, PROCESSES, Case, Network, anisotropic, model_of, problem, ring, solved
from _rows import read, write
from torch import Tensor

import scoresde as ss
from scoresde import grids
from scoresde.plan import run
from scoresde.solvers.interpolants import LAM, NOISE, RHO, TAU, VELOCITY, V
from scoresde.solvers.multistep import Multistep

__all__ = ["PROBLEMS", "PROCESSES", "anisotropic", "beta_list", "our_grids", "our_solvers", "problem", "ring"]

NFES = (4, 5, 6, 8, 10, 15, 20, 50)
PAGE = Path(__file__).parents[1] / "docs" / "work-precision.md"
BEGIN, END = "<!-- the tables of experiments/work_precision.py -->", "<!-- end of these tables -->"


@dataclass
class Options:
    """Options of the command line."""

    points: int = 48
    seed: int = 0
    workers: int = 2
    nfes: str = ",".join(map(str, NFES))
    out: Path = Path(__file__).parent / "out"
    percent: str = "0,1,5"
    data: str = ""
    again: str = ""
    resume: bool = False
    quick: bool = False

    @property
    def groups(self) -> list[str]:
        """Groups to run; none stands for all."""
        return self.again.split(",") if self.again else []

    @property
    def budgets(self) -> list[int]:
        return [int(n) for n in self.nfes.split(",")]


@dataclass
class Result:
    """Errors of one sampler at one budget on one problem."""

    half: str
    problem: str
    network: str
    who: str  # ours, default, statistics, anchored, or the name of a library
    solver: str
    grid: str
    nfe: int
    spent: int
    median: float
    rmse: float


# Samplers.


def our_solvers(quick: bool) -> dict[str, ss.solvers.Solver]:
    """All deterministic solvers, including combinations of prediction and variable that have no name."""
    solvers = {
        "DDIM": ss.DDIM(),
        "DPM-Solver++ 2M": ss.DPMSolverPP(2),
        "UniPC-3": ss.UniPC(3),
        "VelocityAB-3": ss.VelocityAB(3),
    }
    if quick:
        return solvers
    return solvers | {
        "Euler": ss.solvers.Euler(),
        "Heun": ss.solvers.Heun(),
        "RungeKutta4": ss.solvers.RungeKutta4(),
        "EDM Heun": ss.EDMHeun(),
        "DPM2": ss.solvers.DPM2(),
        "DPM-Solver-3": ss.solvers.DPMSolver(3),
        "DPM-Solver fast": ss.solvers.DPMSolver(kind="fast"),
        "DPM-Solver 2M": ss.solvers.DPMSolver(2, kind="multi"),
        "DPM-Solver++ 2S": ss.DPMSolverPP(2, kind="single"),
        "DPM-Solver++ 3S": ss.DPMSolverPP(3, kind="single"),
        "DPM-Solver++ 2M exact": ss.DPMSolverPP(2, form="exact"),
        "DPM-Solver++ 3M": ss.DPMSolverPP(3),
        "DPM-Solver++ 3M published": ss.DPMSolverPP(3, form="published"),
        "UniPC-2": ss.UniPC(2),
        "UniPC-2 bh1": ss.UniPC(2, "bh1"),
        "UniPC-4": ss.UniPC(4),
        "UniPC-3 noise": ss.UniPC(3, prediction=NOISE),
        "DEIS tAB-2": ss.solvers.DEIS(2),
        "DEIS tAB-3": ss.solvers.DEIS(3),
        "DEIS tAB-4": ss.solvers.DEIS(4),
        "DEIS ρAB-3": ss.solvers.DEIS(3, "rho"),
        "LMS": ss.solvers.LMS(),
        "PLMS": ss.solvers.PLMS(),
        "iPNDM": ss.solvers.IPNDM(),
        "AcceleratedDDIM": ss.solvers.AcceleratedDDIM(),
        "RES-2": ss.solvers.RES(2),
        "RES-3": ss.solvers.RES(3),
        "ETDRK4": ss.solvers.ETDRK4(),
        "VelocityAB-2": ss.VelocityAB(2),
        "VelocityAB-4": ss.VelocityAB(4),
        "VelocityAB-2 + UniC": ss.solvers.with_corrector(ss.VelocityAB(2)),
        "VelocityAB-3 + UniC": ss.solvers.with_corrector(ss.VelocityAB(3)),
        "velocity in λ, 2 + UniC": ss.solvers.with_corrector(Multistep(2, VELOCITY, LAM)),
        "velocity in λ, 3": Multistep(3, VELOCITY, LAM),
        "v in ρ, 3": Multistep(3, V, RHO),
        "v in τ, 3": Multistep(3, V, TAU),
    }


# The multistep solvers that have been the best of some case of the first half, and their neighbours.
MULTISTEP = (
    "DDIM|DPM-Solver++ 2M|UniPC-2|UniPC-3|UniPC-3 noise|DPM-Solver 2M|DEIS tAB-3|VelocityAB-2|VelocityAB-3|"
    "VelocityAB-4|VelocityAB-2 + UniC|VelocityAB-3 + UniC|velocity in λ, 3|v in ρ, 3"
).split("|")


def our_grids(process: str, quick: bool) -> dict[str, Callable[..., Tensor]]:
    makers = {"karras": grids.karras, "quadratic_vp": grids.quadratic_vp}
    if quick:
        return makers
    if process == "EDM":  # σ/α ends at 0.002 by default; with VP, and with diffusers' schedulers, at 0.01
        makers["uniform_lam to 0.01"] = partial(grids.uniform_lam, t_min=0.01)
        makers["quadratic_vp to 0.01"] = partial(grids.quadratic_vp, t_min=0.01)
    return makers | {
        "uniform_lam": grids.uniform_lam,
        "karras ρ=3": partial(grids.karras, rho=3.0),
        "uniform_t": grids.uniform_t,
        "power_t(2)": grids.power_t,
    }


def shown_grids(quick: bool) -> dict[str, Callable[..., Tensor]]:
    makers = our_grids("", quick)
    return (
        makers if quick else {name: makers[name] for name in ("quadratic_vp", "uniform_lam", "power_t(2)", "uniform_t")}
    )


Sampler = Callable[[Any, Tensor, int], tuple[Tensor, int] | None]


def planned(solver: ss.solvers.Solver, maker: Callable[..., Tensor], model: Any, x: Tensor, n: int) -> Any:
    rule, steps = solver.for_nfe(n)
    plan = rule.plan(model.sde, maker(model.sde, steps))
    return (run(plan, model.x0, x), plan.nfe) if plan.nfe <= n else None


def default(model: Any, x: Tensor, n: int) -> tuple[Tensor, int]:
    solution = ss.solve(model, x, nfe=n)
    return solution.x, solution.nfe


def unknowing(model: Any, x: Tensor, n: int) -> tuple[Tensor, int]:
    """The default of a network that does not know the Gaussian of its data."""
    return default(Network(model.mixture, model.predicts, model.size, knows=False), x, n)


def informed(case: Case, model: Any, quick: bool) -> Iterator[tuple[str, str, str, Sampler]]:
    """Rules that use the data."""
    mixture = model.mixture if isinstance(model, Network) else model
    data = mixture.sample(128, seed=1)
    tables = ss.fitting.estimate_statistics(model, data, n=12 if quick else 48)
    std = float(data.var(0).mean().sqrt())
    for grid, maker in shown_grids(quick).items():
        for order in (2, 3):
            yield (
                "statistics",
                f"DPM-Solver-v3 {order}",
                grid,
                partial(planned, ss.solvers.DPMSolverV3(tables, order), maker),
            )
        for nodes in (3, 4):
            rule = ss.solvers.AnchoredResidual(std, nodes)
            yield "anchored", f"anchored {nodes}", grid, partial(planned, rule, maker)


def samplers(case: Case, model: Any, libraries: list[str], options: Options) -> Iterator[tuple[str, str, str, Sampler]]:
    quick, groups = options.quick, options.groups
    if not groups or "default" in groups:
        yield "default", "default", "default", default
    if isinstance(model, Network) and (not groups or "unknowing" in groups):
        yield "unknowing", "default", "default", unknowing
    if groups:
        if {"statistics", "anchored"} & set(groups):
            yield from (found for found in informed(case, model, quick) if found[0] in groups)
        return
    for word, solver in our_solvers(quick).items():
        for grid, maker in shown_grids(quick).items():
            if quick or word in MULTISTEP:
                yield "ours", word, grid, partial(planned, solver, maker)
    yield from informed(case, model, quick)
    for library in libraries:
        for i, (word, grid, sampler) in enumerate(LIBRARIES[library](case.process, model.sde)):
            if not quick or i % 20 == 0:
                yield library, word, grid, sampler


def error(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Median and root mean square, over the states, of the distance per number."""
    gap = (x.double() - truth).flatten(1).norm(dim=1) / math.sqrt(x[0].numel())
    return float(gap.median()), float(gap.square().mean().sqrt())


def results_of(job: tuple[Case, list[str], Options]) -> list[Result]:
    torch.set_num_threads(1)
    case, libraries, options = job
    model, rows, started = model_of(case), [], time.monotonic()
    with torch.no_grad():
        x, truth = solved(model, options.points, options.seed)
        for who, word, grid, sampler in samplers(case, model, libraries, options):
            for n in options.budgets:
                found = sampler(model, x, n)
                if found is not None and bool(found[0].isfinite().all()):
                    rows.append(
                        Result(
                            case.half, case.name, case.network, who, word, grid, n, found[1], *error(found[0], truth)
                        )
                    )
    print(f"{case.name}: {time.monotonic() - started:.0f} s", flush=True)
    return rows


# The report.

Key = tuple[str, int]


def collect(options: Options) -> list[Result]:
    libraries = installed()
    few = [("ring 2-D", "v", 1), ("lattice 2-D", "eps", 1)]
    cases = [c for c in CASES if not options.quick or (c.data, c.network, c.percent) in few]
    sizes = [int(v) for v in options.percent.split(",")]
    cases = [c for c in cases if c.network == "eps" or c.percent in sizes]
    cases = [c for c in cases if not options.data or c.data in options.data.split(",")]
    path = options.out / "work_precision.csv"
    rows = read(Result, path) if options.again or (options.resume and path.exists()) else []
    rows = [row for row in rows if row.who not in options.groups]
    if options.resume:
        there = {row.problem for row in rows}
        cases = [case for case in cases if case.name not in there]
    jobs = [(case, libraries, options) for case in cases]
    if options.workers < 2:
        for job in jobs:
            rows += results_of(job)
            write(rows, path)
        return rows
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for found in pool.map(results_of, jobs):
            rows += found
            write(rows, path)
    return rows


def best(rows: list[Result], measure: str) -> Result:
    return min(rows, key=lambda row: getattr(row, measure))


def cell(ratios: list[float]) -> str:
    if not ratios:
        return "–"
    return f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}; {max(ratios):.2f}"


NOT_FRONTIER = ("default", "unknowing", "statistics", "anchored")


def ratios(table: dict[Key, list[Result]], who: str, measure: str, pair: tuple[str, str] | None = None) -> list[float]:
    """Error of the best of a group, or of one pair of it, over the frontier, in each case."""
    out = []
    for rows in table.values():
        mine = [row for row in rows if row.who == who and pair in (None, (row.solver, row.grid))]
        if mine:
            floor = best([row for row in rows if row.who not in NOT_FRONTIER], measure)
            out.append(getattr(best(mine, measure), measure) / getattr(floor, measure))
    return out


def chosen(table: dict[Key, list[Result]], who: str) -> tuple[str, str] | None:
    """The pair of a group with the smallest mean ratio to the frontier in the median."""
    pairs = {(row.solver, row.grid) for rows in table.values() for row in rows if row.who == who}
    score = {pair: ratios(table, who, "median", pair) for pair in pairs}
    whole = {pair: sum(map(math.log, r)) for pair, r in score.items() if len(r) == len(table)}
    return min(whole, key=lambda pair: (whole[pair], pair)) if whole else None


Pair = tuple[str, str, str]


def singles(table: dict[Key, list[Result]], measure: str) -> dict[Pair, list[float]]:
    """Ratios to the frontier of each solver on each grid that has a result in all cases."""
    found: dict[Pair, list[float]] = defaultdict(list)
    for rows in table.values():
        rows = [row for row in rows if row.who not in NOT_FRONTIER]
        floor = min(getattr(row, measure) for row in rows)
        for row in rows:
            found[row.who, row.solver, row.grid].append(getattr(row, measure) / floor)
    return {pair: each for pair, each in found.items() if len(each) == len(table)}


def best_single(table: dict[Key, list[Result]], measure: str) -> tuple[Pair, list[float]] | None:
    """The solver and grid with the smallest geometric mean of its ratios, and these ratios."""
    found = singles(table, measure)
    return min(found.items(), key=lambda item: (sum(map(math.log, item[1])), item[0])) if found else None


def by_case(rows: list[Result], half: str, eps: bool, n: int) -> dict[Key, list[Result]]:
    table: dict[Key, list[Result]] = defaultdict(list)
    for row in rows:
        if row.half == half and (row.network == "eps") == eps and n in (0, row.nfe):
            table[row.problem, row.nfe].append(row)
    return table


def report(rows: list[Result], options: Options) -> str:
    peers = sorted({row.who for row in rows} & set(LIBRARIES))
    lines = [
        f"{options.points} initial states. Each cell has the geometric mean and the largest ratio to the frontier, "
        f"over the problems of a table; libraries in the frontier beside ours: {', '.join(peers) or 'none'}.",
        "",
    ]
    for half in ("choose", "held out"):
        for eps in (False, True):
            problems = sorted({row.problem for row in rows if row.half == half and (row.network == "eps") == eps})
            if not problems:
                continue
            kind = "ε networks" if eps else "exact models and v networks"
            lines += [f"## {'Held out' if half == 'held out' else 'To choose on'}: {kind}", ""]
            lines += ["; ".join(problems) + ".", ""]
            head = [
                "NFE",
                "default, median",
                "default, RMSE",
                "data unknown, median",
                "best single, median",
                "best single, RMSE",
            ]
            head += ["best of ours, median", "DPM-Solver-v3, median"]
            head += ["DPM-Solver-v3, RMSE", "anchored, median", *(f"best of {peer}, median" for peer in peers)]
            lines += ["| " + " | ".join(head) + " |", "|" + "--:|" * len(head)]
            for n in [*options.budgets, 0]:
                table = by_case(rows, half, eps, n)
                first = by_case(rows, "choose", eps, n)
                cells = [str(n or "all")]
                cells += [cell(ratios(table, "default", measure)) for measure in ("median", "rmse")]
                cells.append(cell(ratios(table, "unknowing", "median")))
                for measure in ("median", "rmse"):
                    tables = [by_case(rows, half, eps, k) for k in ([n] if n else options.budgets)]
                    cells.append(cell([r for t in tables for r in (best_single(t, measure) or ("", []))[1]]))
                cells.append(cell(ratios(table, "ours", "median")))
                v3, anchor = chosen(first, "statistics"), chosen(first, "anchored")
                cells += [cell(ratios(table, "statistics", measure, v3)) for measure in ("median", "rmse")]
                cells.append(cell(ratios(table, "anchored", "median", anchor)))
                cells += [cell(ratios(table, peer, "median")) for peer in peers]
                lines.append("| " + " | ".join(cells) + " |")
            lines.append("")
    lines += singles_table(rows, options) + frontier_table(rows, options)
    return "\n".join(lines)


def singles_table(rows: list[Result], options: Options) -> list[str]:
    """The best single solver and grid of each table and budget, in the median."""
    lines = ["## The best single solver and grid in hindsight", ""]
    lines += ["| table | NFE | solver, grid | over the frontier, median | the same on the other half |"]
    lines += ["|:--|--:|:--|--:|--:|"]
    for half, other in (("choose", "held out"), ("held out", "choose")):
        for eps in (False, True):
            for n in options.budgets:
                found = best_single(by_case(rows, half, eps, n), "median")
                if found is None:
                    continue
                (who, solver, grid), mine = found
                theirs = singles(by_case(rows, other, eps, n), "median").get((who, solver, grid), [])
                name = f"{half}, {'ε' if eps else 'exact and v'}"
                lines.append(f"| {name} | {n} | {who}: {solver}, {grid} | {cell(mine)} | {cell(theirs)} |")
    return [*lines, ""]


def frontier_table(rows: list[Result], options: Options) -> list[str]:
    """The frontier itself, on the held-out half."""
    lines = ["## The frontier on the held-out half", ""]
    lines += ["| problem | NFE | frontier | by | default / frontier, median | RMSE |", "|:--|--:|--:|:--|--:|--:|"]
    table: dict[Key, list[Result]] = defaultdict(list)
    for row in rows:
        if row.half == "held out":
            table[row.problem, row.nfe].append(row)
    for (name, n), found in sorted(table.items()):
        top = best([row for row in found if row.who not in NOT_FRONTIER], "median")
        own = [cell(ratios({(name, n): found}, "default", measure)).split(";")[0] for measure in ("median", "rmse")]
        lines.append(f"| {name} | {n} | {top.median:.2e} | {top.who}: {top.solver}, {top.grid} | {own[0]} | {own[1]} |")
    return [*lines, ""]


def draw(rows: list[Result], page: Path) -> None:
    """Ratio of each group to the frontier against the budget, on the held-out half."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [who for who in ("default", "ours", "statistics", *LIBRARIES) if any(row.who == who for row in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
    budgets = sorted({row.nfe for row in rows if row.half == "held out"})
    for ax, eps in zip(axes, (False, True), strict=True):
        for who in names:
            points = [(n, ratios(by_case(rows, "held out", eps, n), who, "median")) for n in budgets]
            means = [(n, math.exp(statistics.fmean(map(math.log, r)))) for n, r in points if r]
            if means:
                label = {"ours": "best of ours", "statistics": "with statistics, best"}.get(who, who)
                ax.plot(*zip(*means, strict=True), marker=".", label=label, color="k" if who == "default" else None)
        ax.set(
            xscale="log", yscale="log", xlabel="evaluations", title="ε networks" if eps else "exact models, v networks"
        )
        ax.set_xticks(budgets, [str(n) for n in budgets])
        ax.set_xticks([], minor=True)
    axes[0].set_ylabel("median error / frontier")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def main(options: Options) -> Path:
    if options.quick:
        options.points, options.nfes, options.workers = min(options.points, 8), "4,8", 1
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    rows = collect(options)
    write(rows, options.out / "work_precision.csv")
    page = options.out / "work_precision.png"
    draw(rows, page)
    text = report(rows, options)
    (options.out / "work_precision.md").write_text(text + "\n")
    print(text)
    print(f"{time.monotonic() - started:.0f} s")
    if not options.quick:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}")
        (PAGE.parent / page.name.replace("_", "-")).write_bytes(page.read_bytes())
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=Options.points, help="number of initial states")
    parser.add_argument("--seed", type=int, default=Options.seed, help="seed of the initial states")
    parser.add_argument("--workers", type=int, default=Options.workers, help="number of processes")
    parser.add_argument("--nfes", default=Options.nfes, help="budgets of evaluations, separated by commas")
    parser.add_argument("--out", type=Path, default=Options.out, help="folder of the results")
    parser.add_argument("--percent", default=Options.percent, help="sizes of the errors of v networks; 0 is exact")
    parser.add_argument("--data", default=Options.data, help="names of mixtures, separated by commas; all by default")
    parser.add_argument("--again", default=Options.again, help="groups to run; the others from the last run's CSV")
    parser.add_argument("--resume", action="store_true", help="take the problems that the CSV has from there")
    parser.add_argument("--quick", action="store_true", help="a small run for CI")
    main(Options(**vars(parser.parse_args())))
