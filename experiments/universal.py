"""Universal tables: fit one for each number of evaluations, select on trained networks, and compare.

    python experiments/universal.py fit              # some hours on one core; continues where it stopped
    python experiments/universal.py select           # choose among seeds on networks; writes the package's tables
    python experiments/universal.py compare          # the table of the page, on exact problems and networks
    python experiments/universal.py --quick          # seconds, for CI: all three in small, and nothing is written

Each fit is kept in ``experiments/out/universal``: one file for each kind, number of evaluations and seed. A kind is the
prediction of the network, ``data`` (x0, v, velocity) or ``noise`` (ε, score), and the start, from T or ``gaussian``.

``select`` runs the fits on networks that diffusers trained on MNIST (ε on linear β, v on cosine β, flow; see
``interop/_trained.py``) and on a v network of the 8 × 8 digits, and keeps the seed whose error to a fine solve has the
smallest geometric mean. ``compare`` also uses networks that no choice has seen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _cases import EXACT, HELD_OUT, SELECTION, Case, cases
from _families import F64, problems
from torch import Tensor

import scoresde as ss
from scoresde.fitting.universal import Group, descend, errors, mean_log
from scoresde.plan.matrices import unroll
from scoresde.solvers.universal import FOLDER, UniversalTable, unit_of, write_plan

NFES = (5, 8, 10, 4, 6, 7, 12, 15, 3, 9, 11)
KINDS = ("data", "noise", "gaussian")
LAST = {3: 0.5, 4: 0.35, 5: 0.25, 6: 0.15, 7: 0.12, 8: 0.1, 9: 0.085, 10: 0.07, 11: 0.063, 12: 0.055, 15: 0.04}


@dataclass
class Options:
    """Options of the command line."""

    kinds: str = ",".join(KINDS)
    nfes: str = ",".join(map(str, NFES))
    seeds: str = "0,1"
    trajectories: int = 10
    steps: int = 50
    out: Path = Path(__file__).parent / "out" / "universal"
    quick: bool = False


def begin(n: int, kind: str, second: float) -> UniversalTable:
    """Velocity Adams–Bashforth of order 2 on levels even in their logarithm, from which a fit begins."""
    sde = ss.VP()
    if kind == "gaussian":
        levels = torch.linspace(math.log(second), math.log(LAST[n]), n, dtype=F64).exp()
    else:
        levels = torch.linspace(math.log(second), math.log(LAST[n]), n - 1, dtype=F64).exp()
        levels = torch.cat([torch.tensor([80.0], dtype=F64), levels])
    times = torch.cat([sde.t_of_lam(-levels.log()), torch.zeros(1, dtype=F64)])
    u = unroll(ss.VelocityAB(2).plan(sde, times))
    s = torch.cat([levels, torch.zeros(1, dtype=F64)])
    weights = torch.zeros(n + 1, n, dtype=F64)
    weights[1:] = u.d[1:] / (sde.alpha(times)[1:] * (1 - s[1:] / s[0]))[:, None]
    return UniversalTable(levels, levels.clone(), weights)


SECOND = {"data": (2.5, 6.0), "noise": (5.0, 20.0), "gaussian": (2.5,)}
"""First levels of the rule after T, of which the better one is fitted."""


def groups(seed: int, kind: str, n: int, quick: bool) -> list[Group]:
    """Trajectories of the problems of a kind; half as many where there are many dimensions."""
    gaussian = kind == "gaussian"
    batches = problems(seed, "any" if gaussian else kind, 64 if quick else 256 if gaussian else 4096)
    return [
        Group.draw(b, n if b.data.means.shape[-1] <= 64 else max(2, n // 3), seed=seed + i, gaussian=gaussian)
        for i, b in enumerate(batches[: 1 if quick else None])
    ]


def fit(options: Options) -> None:
    """Fit all tables that are not there yet."""
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for kind in options.kinds.split(","):
            todo = [n for n in map(int, options.nfes.split(",")) if not path(options, kind, n, seed).exists()]
            if not todo:
                continue
            began = time.monotonic()
            train = groups(100 * seed, kind, options.trajectories, options.quick)
            held = groups(100 * seed + 5000, kind, max(4, options.trajectories // 2), options.quick)
            count = sum(len(g.y) for g in train)
            print(f"{kind}, seed {seed}: {count} problems, {time.monotonic() - began:.0f} s", flush=True)
            for n in todo:
                began = time.monotonic()
                starts = [begin(n, kind, second) for second in SECOND[kind]]
                how = {"first_shift": kind == "gaussian"}
                tries = [descend(s, train, held, steps=15 if len(starts) > 1 else 1, **how) for s in starts]
                table, score = min(tries, key=lambda pair: pair[1])
                table, score = descend(table, train, held, steps=options.steps, **how)
                first = mean_log(errors(starts[0], held))
                seconds = time.monotonic() - began
                print(f"  {n:3} {first:.3f} -> {score:.3f} {seconds:4.0f} s {summary(table)}", flush=True)
                record = {
                    **table.to_dict(),
                    "made by": f"experiments/universal.py fit, kind {kind}, seed {seed}, {count} problems of "
                    f"{options.trajectories} trajectories, {options.steps} iterations",
                    "held out": {"before": first, "after": score},
                }
                path(options, kind, n, seed).write_text(json.dumps(record) + "\n")


def path(options: Options, kind: str, n: int, seed: int) -> Path:
    return options.out / f"{kind}-{n}-{seed}.json"


def summary(table: UniversalTable) -> str:
    return " ".join(f"{v:.3g}" for v in table.levels.tolist())


def found(options: Options, kind: str, n: int) -> dict[int, UniversalTable]:
    """Fitted tables of a kind by their seeds."""
    tables = {}
    for seed in map(int, options.seeds.split(",")):
        page = path(options, kind, n, seed)
        if page.exists():
            tables[seed] = UniversalTable.from_dict(json.loads(page.read_text()))
    return tables


def plan_of(table: UniversalTable, kind: str, case: Case) -> ss.Plan:
    """Plan of a table for a case, on the scale that fits the Gaussian of its data."""
    gaussian = kind == "gaussian"
    scale = unit_of(case.gaussian.spectrum)
    return write_plan(table.scaled(scale), case.model.sde, None if gaussian else case.model.sde.T)


def suits(kind: str, case: Case) -> bool:
    """Whether a network is of the kind that a table is for."""
    return kind == "gaussian" or (kind == "noise") == (case.model.kind.predicts in ("eps", "score"))


def score(table: UniversalTable, kind: str, judged: Sequence[Case]) -> float:
    """Geometric mean of the errors of a table on the networks that it is for."""
    start = {c.name: c.gaussian if kind == "gaussian" else None for c in judged}
    found = [c.error(plan_of(table, kind, c), start=start[c.name]) for c in judged if suits(kind, c)]
    return math.exp(statistics.fmean(map(math.log, found)))


def select(options: Options) -> None:
    """Choose one seed for each kind and number of evaluations, and write the tables of the package."""
    judged: list[Case] = []
    for kind in options.kinds.split(","):
        chosen: dict[str, object] = {}
        for n in sorted(map(int, options.nfes.split(","))):
            seeds = found(options, kind, n)
            if len(seeds) > 1:  # one alone needs no choice
                judged = judged or list(cases(SELECTION, options.out))
                scores = {seed: score(table, kind, judged) for seed, table in seeds.items()}
                print(f"{kind} {n}: " + ", ".join(f"seed {k} {v:.4g}" for k, v in scores.items()), flush=True)
                seeds = {k: seeds[k] for k in sorted(seeds, key=lambda seed: scores[seed])}
            for seed in [*seeds][:1]:
                chosen[str(n)] = json.loads(path(options, kind, n, seed).read_text())
        if chosen and not options.quick:
            FOLDER.mkdir(exist_ok=True)
            lines = ",\n".join(f' "{n}": {json.dumps(table)}' for n, table in chosen.items())
            (FOLDER / f"{kind}.json").write_text(f'{{"tables": {{\n{lines}\n}}}}\n')


CORRECTED = ss.solvers.with_corrector(ss.VelocityAB(2))
PAIRS: dict[str, tuple[ss.solvers.Solver, Callable[..., Tensor]]] = {
    "UniPC-2, even in t": (ss.UniPC(2), ss.grids.uniform_t),
    "UniPC-2, power_t(2)": (ss.UniPC(2), ss.grids.power_t),
    "VelocityAB-2 + UniC, even in t": (CORRECTED, ss.grids.uniform_t),
    "VelocityAB-2 + UniC, power_t(2)": (CORRECTED, ss.grids.power_t),
    "VelocityAB-3, power_t(2)": (ss.VelocityAB(3), ss.grids.power_t),
}


def compare(options: Options) -> str:
    """Universal plans beside the default and the best unfitted pair, of every case."""
    lines = [
        "| problem | evaluations | default | best unfitted pair | universal | Gaussian start | universal / default | "
        "universal / best pair |",
        "|:--|--:|--:|:--|--:|--:|--:|--:|",
    ]
    ratios: dict[tuple[str, int], list[tuple[float, float]]] = {}
    sets = {"exact": EXACT, "selection": SELECTION, "held out": HELD_OUT}
    for group, names in {"exact": EXACT[:1]}.items() if options.quick else sets.items():
        for case in cases(names, options.out):
            for n in sorted(map(int, options.nfes.split(","))):
                default = case.errors(None, nfe=n)
                pairs = {name: case.errors(rule, steps=n, grid=maker) for name, (rule, maker) in PAIRS.items()}
                best = min(pairs, key=lambda name: pairs[name][0])
                unit = unit_of(case.gaussian.spectrum)
                ours = case.errors(ss.solvers.Universal(data_std=unit), nfe=n)
                start = ss.solvers.Universal(data_std=unit)
                carried = case.errors(start, nfe=n, start=case.gaussian)
                over = ours[0] / default[0], ours[0] / pairs[best][0]
                ratios.setdefault((group, n), []).append(over)
                cells = [f"{m:.3g} ({r:.3g})" for m, r in (default, pairs[best], ours, carried)]
                cells[1] += f" {best}"
                lines.append(f"| {case.name} | {n} | {' | '.join(cells)} | {over[0]:.2f} | {over[1]:.2f} |")
                print(lines[-1], flush=True)
    lines += ["", "Geometric means of the medians' ratios:", ""]
    lines += ["| problems | evaluations | universal / default | universal / best pair |", "|:--|--:|--:|--:|"]
    for (group, n), pairs_ in ratios.items():
        a, b = (math.exp(statistics.fmean(map(math.log, column))) for column in zip(*pairs_, strict=True))
        lines.append(f"| {group} | {n} | {a:.2f} | {b:.2f} |")
    text = "\n".join(lines)
    if not options.quick:
        (options.out / "compare.md").write_text(text + "\n")
    print(text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("fit", "select", "compare"), default="fit")
    parser.add_argument("--kinds", default=Options.kinds)
    parser.add_argument("--nfes", default=Options.nfes)
    parser.add_argument("--seeds", default=Options.seeds)
    parser.add_argument("--trajectories", type=int, default=Options.trajectories)
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--out", type=Path, default=Options.out)
    parser.add_argument("--quick", action="store_true")
    given = vars(parser.parse_args())
    what = given.pop("what")
    options = Options(**given)
    if options.quick:
        options = replace(options, kinds="data", nfes="4", seeds="0", trajectories=4, steps=4)
        with tempfile.TemporaryDirectory() as folder:
            options.out = Path(folder)
            fit(options)
            compare(options)
        return
    {"fit": fit, "select": select, "compare": compare}[what](options)


if __name__ == "__main__":
    main()
