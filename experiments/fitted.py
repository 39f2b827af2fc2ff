"""Fitted plans against all unfitted ones, and computed grids against common ones.

    python experiments/fitted.py                              # half an hour on an idle core
    python experiments/fitted.py --process EDM --nfes 5,10    # under another process
    python experiments/fitted.py --quick                      # seconds, for CI

The problems are the three exact ones of ``work_precision.py``, under VP. At every budget the script compares the best
of all solvers × grids, a plan fitted from T, and a plan fitted together with a Gaussian start (mean and covariance of
the data, no evaluation). Plans are fitted on 128 trajectories, and 64 others decide when to stop. All errors are those
of 128 further trajectories: the distance per number from the same fine solve of the probability flow, from the same
initial states at T. ``tails.py`` measures the tails of the error on more samples.

The script then fits only some parts of a plan, and compares common grids with computed ones, which need the covariance
or a pilot run.

The script writes a CSV, a figure and a table; an interrupted run continues its CSV.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from work_precision import PROBLEMS, our_grids, our_solvers, problem

import scoresde as ss
from scoresde import fitting

NFES = (4, 5, 6, 8, 10, 15)
FRESH = 128
PARTS = ((), ("times",), ("network_times",), ("weights",), ("times", "weights"), ("times", "network_times", "weights"))


@dataclass
class Options:
    """Options of the command line."""

    process: str = "VP"
    problems: int = 3  # number of problems
    nfes: str = ",".join(map(str, NFES))
    steps: int = 300
    trajectories: int = 192
    seed: int = 7
    out: Path = Path(__file__).parent / "out"
    quick: bool = False


@dataclass
class Result:
    """Errors of one plan on trajectories that no fit used."""

    problem: str
    nfe: int
    who: str
    solver: str
    grid: str
    median: float
    rmse: float
    q90: float
    q99: float
    seconds: float = 0.0


def errors(x: Tensor, truth: Tensor) -> dict[str, float]:
    """Quantiles of the distance per number."""
    e = (x - truth).flatten(1).square().mean(1).sqrt()
    q = e.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=e.dtype)).tolist()
    return {"median": q[0], "q90": q[1], "q99": q[2], "rmse": float(e.square().mean().sqrt())}


def share(ratio: float) -> str:
    """Text of a ratio; below 1 it is written as 1/n."""
    return f"1/{1 / ratio:.1f}" if ratio < 1 else f"{ratio:.1f}"


class Case:
    """A problem with trajectories for fits and fresh ones."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.model, x, truth = problem(name, options.process, options.trajectories + FRESH, options.seed)
        n = options.trajectories
        self.x, self.truth, self.fresh, self.target = x[:n], truth[:n], x[n:], truth[n:]
        self.gaussian = ss.Gaussian.of(self.model.sde, self.model.mean(), self.model.covariance())

    def measure(self, plan: ss.Plan, start: ss.Gaussian | None = None) -> dict[str, float]:
        return errors(ss.sample(self.model, self.fresh, plan, start=start), self.target)

    def unfitted(self, n: int) -> Iterator[Result]:
        """All solvers on all grids."""
        sde = self.model.sde
        with torch.no_grad():
            for name, solver in our_solvers(self.options.quick).items():
                for grid, maker in our_grids(self.options.process, self.options.quick).items():
                    within, steps = solver.for_nfe(n)
                    plan = within.plan(sde, maker(sde, steps))
                    if plan.nfe <= n:
                        yield Result(self.name, n, "unfitted", name, grid, **self.measure(plan))

    def initial(self, n: int, tol: float | None) -> ss.Plan:
        """Plan to fit: from T, or from the time at which a Gaussian start has an error of `tol` per number."""
        sde = self.model.sde
        t = None if tol is None else self.gaussian.start_time(self.model, tol)
        return ss.VelocityAB(2 if n < 5 else 3).plan(sde, ss.grids.quadratic_vp(sde, n, t_start=t))

    def fitted(self, n: int, start: bool) -> Iterator[Result]:
        """A fit, and with a Gaussian start also its initial plan; at 4 and 5 evaluations the better of two fits."""
        gaussian = self.gaussian if start else None
        tols = (None,) if not start else (0.01, 0.05) if n < 6 else (0.01,)
        plans = [self.initial(n, tol) for tol in tols]
        if start:
            errors = self.measure(plans[0], gaussian)
            yield Result(self.name, n, "Gaussian start", plans[0].name, "quadratic_vp", **errors)
        began = time.perf_counter()
        fits = [
            ss.fit(
                plan,
                self.model,
                self.x,
                start=gaussian,
                teacher=self.truth,
                split=fitting.Split(held_out=self.options.trajectories // 3),
                steps=self.options.steps,
            )
            for plan in plans
        ]
        best = min(fits, key=lambda plan: plan.meta["held_out"]["after"]["mean_log"])
        spent = (time.perf_counter() - began) / len(fits)
        who = "fitted, Gaussian start" if start else "fitted"
        yield Result(self.name, n, who, plans[0].name, "", **self.measure(best, gaussian), seconds=spent)


def collect(options: Options, page: Path) -> list[Result]:
    """All results, including those of an earlier run; each is written as soon as it is measured."""
    rows: list[Result] = []
    if page.exists() and not options.quick:
        kinds = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Result)}
        with page.open() as file:
            rows = [Result(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]
    have = {(row.problem, row.nfe, row.who) for row in rows}
    names = list(PROBLEMS)[: options.problems]
    with page.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Result)])

        def note(results: list[Result]) -> None:
            rows.extend(r for r in results if r not in rows)
            for r in results:
                writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in vars(r).values()])
            file.flush()

        note(list(rows))
        for name in names:
            case = Case(name, options)
            for n in map(int, options.nfes.split(",")):
                for who, make in {
                    "unfitted": partial(case.unfitted, n),
                    "fitted, Gaussian start": partial(case.fitted, n, True),
                    "fitted": partial(case.fitted, n, False),
                }.items():
                    if (name, n, who) not in have:
                        note(list(make()))
    return rows


def report(rows: list[Result], options: Options) -> str:
    """Tables of unfitted and fitted plans."""
    lines = [
        "# Fitted plans",
        "",
        f"{options.trajectories} trajectories to fit on, {FRESH} fresh ones to measure; {options.process}; error per "
        "number.",
        "",
    ]
    gains: dict[str, list[float]] = {}
    for name in dict.fromkeys(row.problem for row in rows):
        lines += [f"## {name}", ""]
        lines += ["| NFE | best unfitted | median | RMSE | | median | q90 | q99 | RMSE | median / best unfitted's |"]
        lines += ["|--:|:--|--:|--:|:--|--:|--:|--:|--:|--:|"]
        of = [row for row in rows if row.problem == name]
        for n in sorted({row.nfe for row in of}):
            plain = [r for r in of if r.nfe == n and r.who == "unfitted" and math.isfinite(r.median)]
            if not plain:
                continue
            best, rmse = min(plain, key=lambda r: r.median), min(r.rmse for r in plain)
            for who in ("fitted", "Gaussian start", "fitted, Gaussian start"):
                for r in of:
                    if (r.nfe, r.who) == (n, who):
                        ratio = r.median / best.median
                        if n <= 10:
                            gains.setdefault(who, []).append(ratio)
                        lines.append(
                            f"| {n} | {best.solver}, {best.grid} | {best.median:.2e} | {rmse:.2e} | {who} | "
                            f"{r.median:.2e} | {r.q90:.2e} | {r.q99:.2e} | {r.rmse:.2e} | {share(ratio)} |"
                        )
        lines.append("")
    lines += ["## Over all problems, 4 to 10 evaluations: median error / that of the best unfitted plan", ""]
    for who, ratios in gains.items():
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"* {who}: {share(mean)} in the geometric mean, {share(max(ratios))} at worst")
    for name in dict.fromkeys(row.problem for row in rows):
        four, ten = (
            [r.median for r in rows if (r.problem, r.nfe, r.who) == (name, n, who)]
            for n, who in ((4, "fitted, Gaussian start"), (10, "unfitted"))
        )
        if four and ten:
            lines.append(f"* {name}, 4 fitted with a Gaussian start / the best 10 unfitted: {min(four) / min(ten):.2f}")
    return "\n".join(lines)


def parts_table(options: Options) -> list[str]:
    """Errors after fits of some parts of a plan."""
    name, n = list(PROBLEMS)[0 if options.quick else 1], 5
    lines = [f"## Parts of a plan: {name}, {n} evaluations", "", "| fitted | start | median | q90 | q99 | RMSE |"]
    lines.append("|:--|:--|--:|--:|--:|--:|")
    case = Case(name, options)
    for start, tol in (("T", None), ("Gaussian", 0.01)):
        gaussian, initial = (case.gaussian if tol else None), case.initial(n, tol)
        fit = partial(ss.fit, initial, case.model, case.x, start=gaussian, teacher=case.truth, steps=options.steps)
        for what in PARTS:
            values = case.measure(fit(what=what) if what else initial, gaussian)
            cells = " | ".join(f"{values[k]:.2e}" for k in ("median", "q90", "q99", "rmse"))
            lines.append(f"| {', '.join(what) or 'nothing'} | {start} | {cells} |")
    return [*lines, ""]


def grid_table(options: Options) -> list[str]:
    """Median errors of three solvers on computed and on common grids."""
    caption = "Median error on fresh trajectories; the last row is the geometric mean of its ratio to the better of "
    lines = ["## Grids", "", caption + "uniform_lam and karras.", ""]
    names = list(PROBLEMS)[:1] if options.quick else list(PROBLEMS)[: options.problems]
    columns = ("uniform_lam", "karras", "quadratic_vp", "gaussian_grid", "gits", "equal_error", "align_your_steps")
    lines += [f"| problem | solver | NFE | {' | '.join(columns)} |", f"|:--|:--|--:|{'--:|' * len(columns)}"]
    against: dict[str, list[float]] = {column: [] for column in columns}
    for name in names:
        case = Case(name, options)
        model, sde = case.model, case.model.sde
        spectrum, pilot = case.gaussian.spectrum, case.x[:32]
        for solver in (ss.DDIM(), ss.DPMSolverPP(2), ss.VelocityAB(3)):
            for n in (6,) if options.quick else (6, 10, 15):
                grids = {
                    "uniform_lam": ss.grids.uniform_lam(sde, n),
                    "karras": ss.grids.karras(sde, n),
                    "quadratic_vp": ss.grids.quadratic_vp(sde, n),
                    "gaussian_grid": fitting.gaussian_grid(sde, n, spectrum, solver=solver),
                    "gits": fitting.gits(model, pilot, n),
                    "equal_error": fitting.equal_error(model, pilot, n),
                    "align_your_steps": fitting.align_your_steps(model, case.truth[:32], n),
                }
                medians = [case.measure(solver.plan(sde, grids[column]))["median"] for column in columns]
                cells = [f"**{m:.2e}**" if m == min(medians) else f"{m:.2e}" for m in medians]
                lines.append(f"| {name} | {solver} | {n} | {' | '.join(cells)} |")
                common = min(medians[:2])
                for column, m in zip(columns, medians, strict=True):
                    against[column].append(m / common)
    means = (math.exp(sum(map(math.log, against[column])) / len(against[column])) for column in columns)
    lines.append(f"| all / better of two | | | {' | '.join(f'{m:.2f}' for m in means)} |")
    return [*lines, ""]


def draw(rows: list[Result], page: Path) -> None:
    """Draw the median error against the number of evaluations."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row.problem for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        of = [row for row in rows if row.problem == name]
        for pair in {(r.solver, r.grid) for r in of if r.who == "unfitted"}:
            line = sorted((r.nfe, r.median) for r in of if r.who == "unfitted" and (r.solver, r.grid) == pair)
            ax.plot(*zip(*line, strict=True), color="0.85", lw=0.5, zorder=0)
        for who, colour in {
            "unfitted": "C0",
            "Gaussian start": "C2",
            "fitted": "C1",
            "fitted, Gaussian start": "C3",
        }.items():
            best = {
                n: min(r.median for r in of if r.nfe == n and r.who == who) for n in {r.nfe for r in of if r.who == who}
            }
            if best:
                label = "best unfitted" if who == "unfitted" else who
                ax.plot(*zip(*sorted(best.items()), strict=True), color=colour, marker=".", label=label)
        shown = [r.median for r in of if r.who != "unfitted"]
        ax.set(xscale="log", yscale="log", title=name, xlabel="evaluations", ylim=(min(shown) / 6, 4 * max(shown)))
        ax.set_xticks(sorted({r.nfe for r in of}), labels=map(str, sorted({r.nfe for r in of})))
        ax.set_xticks([], minor=True)
    axes[0, 0].set_ylabel("median error per number")
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def main(options: Options) -> None:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "fitted_quick" if options.quick else "fitted" if options.process == "VP" else f"fitted_{options.process}"
    rows = collect(options, options.out / f"{stem}.csv")
    text = "\n".join([report(rows, options), "", *parts_table(options), *grid_table(options)])
    (options.out / f"{stem}.md").write_text(text + "\n")
    print(text)
    draw(rows, options.out / f"{stem}.png")


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="one budget, few iterations, for CI")
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(nfes="5", steps=25, trajectories=96, problems=2)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
