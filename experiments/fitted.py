"""Fitted plans against the best unfitted ones on held-out problems; parts of a plan; computed grids.

    pip install diffusers azula; pip install --no-deps k-diffusion   # each is optional, and skipped if it is missing
    python experiments/fitted.py          # 10 minutes on an idle core
    python experiments/fitted.py --parts  # parts of a plan, and grids; a quarter of an hour
    python experiments/fitted.py --effort # more iterations and trajectories, on problems of the first half; 7 minutes
    python experiments/fitted.py --quick  # seconds, for CI

The problems are those of the held-out half of ``_problems.py``: exact mixtures, and the same with the smooth error of a
v-network. The frontier is the smallest error over all solvers × grids of ``work_precision.py``, ours and those of the
other libraries, in hindsight for each problem, each number of evaluations and each of the two measures. Beside it are
the rule of the default (``rule`` of ``_comparison.py``), ``ss.fit(n, model, x)``, and the same with a Gaussian start
(mean and covariance of the data). Plans are fitted on 128 trajectories, and 64 others decide when to stop. All errors
are those of 256 further initial states: the distance per number from the same fine solve of the flow. A sample is far
if it ends more than half a standard deviation of the data from it. ``tails.py`` measures the tails of the error on more
samples.

The script writes a CSV, a figure and a table; an interrupted run continues its CSV.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch
from _comparison import rule
from _peers import installed
from _problems import CASES, PROBLEMS, Network, model_of, problem, solved
from _problems import Case as Problem
from torch import Tensor
from work_precision import Options as Budgets
from work_precision import samplers

import scoresde as ss
from scoresde import fitting

FRESH = 256
WHO = ("rule", "fitted", "fitted, Gaussian start")
PARTS = ((), ("times",), ("network_times",), ("weights",), ("times", "weights"), ("times", "network_times", "weights"))


@dataclass
class Options:
    """Options of the command line."""

    nfes: str = "5,10"
    steps: int = 300
    trajectories: int = 192
    seed: int = 7
    percent: str = "0,5,1"  # errors of the networks, in the order of the run
    out: Path = Path(__file__).parent / "out"
    parts: bool = False
    effort: bool = False
    quick: bool = False


@dataclass
class Result:
    """Errors of one plan on trajectories that no fit used."""

    problem: str
    nfe: int
    who: str
    name: str
    median: float
    rmse: float
    far: int
    iterations: int = 0
    seconds: float = 0.0


def share(ratio: float) -> str:
    """Text of a ratio; below 1 it is written as 1/n."""
    return f"1/{1 / ratio:.1f}" if ratio < 1 else f"{ratio:.1f}"


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


class Judged:
    """A problem with trajectories for fits and fresh ones."""

    def __init__(self, case: Problem, options: Options) -> None:
        self.case, self.options, self.model = case, options, model_of(case)
        n = options.trajectories
        with torch.no_grad():
            x, truth = solved(self.model, n + FRESH, options.seed)
        self.x, self.truth, self.fresh, self.target = x[:n], truth[:n], x[n:], truth[n:]
        mixture = self.model.mixture if isinstance(self.model, Network) else self.model
        self.gaussian = ss.Gaussian.of(self.model.sde, mixture.mean(), mixture.covariance())
        self.std = float((self.target - self.target.mean(0)).square().mean().sqrt())

    def result(self, n: int, who: str, name: str, x: Tensor, iterations: int = 0, seconds: float = 0.0) -> Result:
        e = (x.double() - self.target).flatten(1).square().mean(1).sqrt()
        far = int((e > 0.5 * self.std).sum())
        rmse = float(e.square().mean().sqrt())
        return Result(self.case.name, n, who, name, float(e.median()), rmse, far, iterations, seconds)

    def unfitted(self, n: int) -> Iterator[Result]:
        """All solvers on all grids."""
        budgets = Budgets(quick=self.options.quick)
        with torch.no_grad():
            for who, solver, grid, sample in samplers(self.case, self.model, installed(), budgets):
                if who in ("default", "statistics", "anchored"):  # the last two use the data
                    continue
                found = sample(self.model, self.fresh, n)
                if found is not None and bool(found[0].isfinite().all()):
                    yield self.result(n, "unfitted", f"{who}: {solver}, {grid}", found[0])

    def rule(self, n: int) -> Iterator[Result]:
        """The rule of the default, without a universal plan."""
        yield self.result(n, "rule", "rule", ss.sample(self.model, self.fresh, rule(self.model, n)))

    def fitted(self, n: int, start: bool) -> Iterator[Result]:
        """A fit that is given a number of evaluations and nothing else."""
        gaussian = self.gaussian if start else None
        began = time.process_time()
        plan = ss.fit(n, self.model, self.x, start=gaussian, teacher=self.truth, steps=self.options.steps)
        spent = time.process_time() - began
        y = ss.sample(self.model, self.fresh, plan, start=gaussian)
        yield self.result(n, WHO[1 + start], plan.meta["from"], y, plan.meta["iterations"], spent)


def problems(options: Options) -> list[Problem]:
    """Held-out problems of exact models and v-networks."""
    held_out = [c for c in CASES if c.half == "held out" and c.network in ("exact", "v")]
    if options.quick:
        return held_out[:1]
    return [c for p in options.percent.split(",") for c in held_out if c.percent == int(p)]


def collect(options: Options, page: Path) -> list[Result]:
    """All results, including those of an earlier run; each is written as soon as it is measured."""
    rows: list[Result] = []
    if page.exists() and not options.quick:
        kinds = {f.name: {"str": str, "int": int, "float": float}[str(f.type)] for f in fields(Result)}
        with page.open() as file:
            rows = [Result(**{k: kinds[k](v) for k, v in line.items()}) for line in csv.DictReader(file)]
    have = {(row.problem, row.nfe, row.who) for row in rows}
    with page.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f.name for f in fields(Result)])

        def note(results: list[Result]) -> None:
            for r in results:
                writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in vars(r).values()])
            file.flush()

        note(rows)
        for case in problems(options):
            judged: Judged | None = None
            for n in map(int, options.nfes.split(",")):
                for who in ("unfitted", *WHO):
                    if (case.name, n, who) in have:
                        continue
                    judged = judged or Judged(case, options)
                    of = {"unfitted": judged.unfitted, "rule": judged.rule}
                    found = list(of[who](n) if who in of else judged.fitted(n, who == WHO[2]))
                    note(found)
                    rows += found
                    print(f"{case.name}, {n}, {who}: {found[-1].median:.2e}, {found[-1].rmse:.2e}", flush=True)
    return rows


def report(rows: list[Result], options: Options) -> str:
    """Tables of unfitted and fitted plans."""
    columns = list(WHO)
    lines = [
        f"{options.trajectories} trajectories to fit on, {FRESH} fresh ones to measure; errors per number. Each column "
        "has the ratios of the median and of the RMSE to the frontier, and the number of far samples.",
        "",
        "| problem | NFE | frontier: median, by | RMSE, by | far | " + " | ".join(columns) + " |",
        "|:--|--:|:--|:--|--:|" + "--:|" * len(columns),
    ]
    ratios: dict[tuple[str, int, bool], list[tuple[float, float]]] = {}
    effort: dict[str, list[tuple[int, float]]] = {}
    for name in dict.fromkeys(r.problem for r in rows):
        for n in sorted({r.nfe for r in rows if r.problem == name}):
            of = [r for r in rows if (r.problem, r.nfe) == (name, n)]
            plain = [r for r in of if r.who == "unfitted" and math.isfinite(r.median)]
            low, small = min(plain, key=lambda r: r.median), min(plain, key=lambda r: r.rmse)
            cells = []
            for who in columns:
                r = next((r for r in of if r.who == who), None)
                if r is None:
                    cells.append("")
                    continue
                pair = r.median / low.median, r.rmse / small.rmse
                ratios.setdefault((who, n, "network" in name), []).append(pair)
                effort.setdefault(who, []).append((r.iterations, r.seconds))
                cells.append(f"{share(pair[0])}; {pair[1]:.2f}; {r.far}")
            found = f"{low.median:.2e}, {low.name} | {small.rmse:.2e}, {small.name} | {small.far}"
            lines.append(f"| {name} | {n} | {found} | {' | '.join(cells)} |")
    lines += [
        "",
        "Geometric mean over the problems, and the worst:",
        "",
        "| plan | NFE | problems | median | worst | RMSE | worst |",
    ]
    lines += ["|:--|--:|:--|--:|--:|--:|--:|"]
    groups: list[tuple[str, tuple[bool, ...]]] = [("exact", (False,)), ("v network", (True,)), ("all", (False, True))]
    for who in columns:
        for n in sorted({r.nfe for r in rows}):
            for word, kinds in groups:
                pairs = [pair for kind in kinds for pair in ratios.get((who, n, kind), [])]
                if pairs:
                    median, rmse = ([*map(float, v)] for v in zip(*pairs, strict=True))
                    cells = f"{share(mean(median))} | {share(max(median))} | {mean(rmse):.2f} | {max(rmse):.2f}"
                    lines.append(f"| {who} | {n} | {word} | {cells} |")
    lines.append("")
    for who in columns:
        iterations, seconds = zip(*effort.get(who, [(0, 0.0)]), strict=True)
        if any(iterations):
            lines.append(
                f"* {who}: {sum(iterations) / len(iterations):.0f} iterations, {sum(seconds) / len(seconds):.0f} s"
            )
    return "\n".join(lines)


class Case:
    """A problem of the first half, under VP, with trajectories for fits and fresh ones."""

    def __init__(self, name: str, options: Options) -> None:
        self.name, self.options = name, options
        self.model, x, truth = problem(name, "VP", options.trajectories + 128, options.seed)
        n = options.trajectories
        self.x, self.truth, self.fresh, self.target = x[:n], truth[:n], x[n:], truth[n:]
        self.gaussian = ss.Gaussian.of(self.model.sde, self.model.mean(), self.model.covariance())

    def measure(self, plan: ss.Plan, start: ss.Gaussian | None = None) -> dict[str, float]:
        e = (ss.sample(self.model, self.fresh, plan, start=start) - self.target).flatten(1).square().mean(1).sqrt()
        q = e.quantile(torch.tensor([0.5, 0.9, 0.99], dtype=e.dtype)).tolist()
        return {"median": q[0], "q90": q[1], "q99": q[2], "rmse": float(e.square().mean().sqrt())}

    def initial(self, n: int, tol: float | None) -> ss.Plan:
        """Plan to fit: from T, or from the time at which a Gaussian start has an error of `tol` per number."""
        sde = self.model.sde
        t = None if tol is None else self.gaussian.start_time(self.model, tol)
        return ss.VelocityAB(2 if n < 5 else 3).plan(sde, ss.grids.quadratic_vp(sde, n, t_start=t))


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
    names = list(PROBLEMS)[:1] if options.quick else list(PROBLEMS)
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
    """Draw the median error and the RMSE over the frontier, for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {"median": "median", "rmse": "RMSE"}
    budgets = sorted({r.nfe for r in rows})
    names = list(dict.fromkeys(r.problem for r in rows))
    figure, axes = plt.subplots(1, 2 * len(budgets), figsize=(3.1 * 2 * len(budgets), 3.6), sharey=True, squeeze=False)
    for i, ax in enumerate(axes[0]):
        n, measure = budgets[i // 2], ("median", "rmse")[i % 2]
        of = [r for r in rows if r.nfe == n]
        low: dict[str, float] = {}
        for r in of:
            if r.who == "unfitted":
                low[r.problem] = min(low.get(r.problem, math.inf), getattr(r, measure))
        for who, colour, marker in zip(WHO, ("0.55", "C1", "C3"), "so^", strict=True):
            points = [(getattr(r, measure) / low[r.problem], names.index(r.problem)) for r in of if r.who == who]
            if points:
                ax.plot(*zip(*points, strict=True), marker, color=colour, label=who)
        ax.axvline(1, color="0.3", lw=0.8)
        ax.axvline(1 / 15 if measure == "median" else 1 / 3, color="0.3", lw=0.8, ls=":")
        ticks = (0.01, 0.03, 0.1, 0.3, 1, 3) if measure == "median" else (0.1, 0.2, 0.5, 1, 2)
        ax.set(xscale="log", title=f"{titles[measure]}, {n} evaluations", xlabel="error / frontier")
        ax.set_xticks(ticks, labels=[f"{v:g}" for v in ticks])
        ax.set_xticks([], minor=True)
        ax.set_yticks(
            range(len(names)), [p.replace(" network, ", ", ").replace(" error", "") for p in names], fontsize=8
        )
        ax.grid(alpha=0.25)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.93))
    figure.savefig(page, dpi=80)
    plt.close(figure)


@dataclass(frozen=True)
class Effort:
    """Cost of a fit.

    Arguments:
        trajectories: Number of trajectories, held-out ones included.
        steps: Largest number of iterations.
        squares: Of these, the last ones with a loss that counts squares.
    """

    trajectories: int
    steps: int
    squares: int = 0

    def fit(self, judged: Judged, n: int) -> ss.Plan:
        x, truth = judged.x[: self.trajectories], judged.truth[: self.trajectories]
        plan = ss.fit(n, judged.model, x, teacher=truth, steps=self.steps - self.squares)
        if self.squares:
            how = fitting.Descent(robust=10)
            plan = ss.fit(plan, judged.model, x, teacher=truth, steps=self.squares, descent=how)
        return plan


EFFORTS = (Effort(192, 300), Effort(192, 900), Effort(768, 300), Effort(768, 900), Effort(768, 900, squares=300))


def effort_table(options: Options) -> list[str]:
    """Errors of fits with more effort over those of the first, on problems of the first half."""
    names = ["ring 2-D, VP, exact", "ring 2-D, VP, v network, 5 % error"]
    head = ["problem", "NFE", "trajectories", "iterations", "with squares", "median", "RMSE", "CPU s"]
    lines = [f"| {' | '.join(head)} |", "|:--|" + "--:|" * (len(head) - 1)]
    efforts = EFFORTS[:1] if options.quick else EFFORTS
    means: dict[Effort, list[list[float]]] = {e: [[], [], []] for e in efforts}
    most = replace(options, trajectories=max(e.trajectories for e in efforts))
    for case in [c for c in CASES if c.name in names]:
        judged = Judged(case, most)
        for n in map(int, options.nfes.split(",")):
            base: list[float] = []
            for effort in efforts:
                began = time.process_time()
                plan = effort.fit(judged, n)
                spent = time.process_time() - began
                found = judged.result(n, "fitted", plan.name, ss.sample(judged.model, judged.fresh, plan))
                numbers = [found.median, found.rmse, spent]
                base = base or numbers
                for total, number, first in zip(means[effort], numbers, base, strict=True):
                    total.append(number / first)
                cells = [effort.trajectories, effort.steps, effort.squares, f"{found.median:.2e}", f"{found.rmse:.2e}"]
                lines.append(f"| {case.name} | {n} | {' | '.join(map(str, cells))} | {spent:.0f} |")
                print(lines[-1], flush=True)
    for effort, ratios in means.items():
        cells = [effort.trajectories, effort.steps, effort.squares, *(f"{mean(r):.2f}" for r in ratios)]
        lines.append(f"| all / the first | | {' | '.join(map(str, cells))} |")
    return lines


def main(options: Options) -> None:
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "fitted" + "_parts" * options.parts + "_effort" * options.effort + "_quick" * options.quick
    if options.parts:
        text = "\n".join([*parts_table(options), *grid_table(options)])
    elif options.effort:
        text = "\n".join(effort_table(options))
    else:
        rows = collect(options, options.out / f"{stem}.csv")
        text = report(rows, options)
        draw(rows, options.out / f"{stem}.png")
    (options.out / f"{stem}.md").write_text(text + "\n")
    print(text)


HELP = {
    "parts": "parts of a plan, and grids",
    "effort": "more iterations and trajectories",
    "quick": "seconds, for CI",
}


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if isinstance(value, bool):
            parser.add_argument(f"--{name}", action="store_true", help=HELP[name])
        else:
            parser.add_argument(f"--{name}", type=type(value), default=value)
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(nfes="5", steps=10, trajectories=24)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
