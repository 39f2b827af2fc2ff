"""Universal tables: fit one for each number of evaluations, select on trained networks, and compare.

    python experiments/universal.py fit              # some hours on one core; continues where it stopped
    python experiments/universal.py select           # choose among seeds on networks; writes the package's tables
    python experiments/universal.py compare          # the table of the page, on exact problems and networks
    python experiments/universal.py explain          # roughness, amplification, and what a fit to UNets gains
    python experiments/universal.py starts           # ε-networks from a Gaussian start: error and Fréchet distance
    python experiments/universal.py --quick          # seconds, for CI: all three in small, and nothing is written

Each fit is kept in ``experiments/out/universal``: one file for each kind, number of evaluations and seed. A kind is the
prediction of the network, ``data`` (x0, v, velocity) or ``noise`` (ε, score), and the start, from T or ``gaussian``.
Seed 0 has mixtures with smooth errors alone and begins from Adams–Bashforth rules. For ``data`` and ``noise``, other
seeds have rougher errors and small trained networks too, and also begin from the plan of the default.

``select`` runs the fits on networks that diffusers trained on MNIST (ε on linear β, v on cosine β, flow; see
``interop/_trained.py``) and on a v network of the 8 × 8 digits, and keeps the seed whose error to a fine solve has the
smallest geometric mean. ``compare`` also uses networks that no choice has seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from _cases import EXACT, HELD_OUT, HELD_OUT_ERRORS, HELD_OUT_EXACT, SELECTION, Case, cases
from _families import F64
from _reasons import limit, reasons
from _starts import starts
from _table_fits import Options, begin_default, fit, found, path
from torch import Tensor

import scoresde as ss
from scoresde.solvers.universal import FOLDER, UniversalTable, unit_of, write_plan


def plan_of(table: UniversalTable, kind: str, case: Case) -> ss.Plan:
    """Plan of a table for a case, on the scale that fits the Gaussian of its data."""
    gaussian = kind == "gaussian"
    scale = unit_of(case.gaussian.spectrum)
    return write_plan(table.scaled(scale), case.model.sde, None if gaussian else case.model.sde.T)


def suits(kind: str, case: Case) -> bool:
    """Whether a model is of the kind that a table is for."""
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
            seeds = found(options, kind, n, map(int, options.seeds.split(",")))
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


GROUPS = {
    "exact mixtures": EXACT,
    "exact mixtures, held out": HELD_OUT_EXACT,
    "mixtures with errors, held out": HELD_OUT_ERRORS,
    "networks of the selection": SELECTION,
    "networks, held out": HELD_OUT,
}
"""Problems to compare on. The held-out ones had no part in the fits or in the choice of seeds."""


def compare(options: Options) -> str:
    """Errors of the default and of universal plans on every problem, and their ratios."""
    nfes = sorted(map(int, options.nfes.split(",")))
    page = options.out / "compare.json"
    known: dict[str, list[tuple[float, float]]] = json.loads(page.read_text()) if page.exists() else {}
    rows, ratios = [], []
    for group, names in [*GROUPS.items()][: 1 if options.quick else None]:
        found: list[Tensor] = []
        for case in cases(names[: 1 if options.quick else None], options.out):
            rule = ss.solvers.Universal(data_std=unit_of(case.gaussian.spectrum))
            measured: dict[str, list[tuple[float, float]]] = {}
            plans: dict[str, tuple[ss.solvers.Solver | None, ss.Gaussian | None]] = {
                "default": (None, None),
                "universal": (rule, None),
                "from a Gaussian start": (rule, case.gaussian),
            }
            for name, (solver, start) in plans.items():
                key = f"{case.name}, {name}, {options.nfes}, {versions(name, case)}"
                if key not in known:
                    known[key] = [case.errors(solver, nfe=n, start=start) for n in nfes]
                    page.write_text(json.dumps(known))
                measured[name] = known[key]
                for measure, column in zip(("median", "RMSE"), zip(*known[key], strict=True), strict=True):
                    rows.append([case.name, name, measure, *(f"{v:.3g}" for v in column)])
                    print(line(rows[-1]), flush=True)
            default, ours, carried = (measured[name] for name in plans)
            found.append(torch.tensor([ours, carried], dtype=F64) / torch.tensor(default, dtype=F64))
        means = torch.stack(found).log().mean(0).exp()  # start, evaluations, measure
        for name, of_start in zip(("", ", from a Gaussian start"), means, strict=True):
            for measure, column in zip(("median", "RMSE"), of_start.T.tolist(), strict=True):
                ratios.append([group + name, measure, *(f"{v:.2f}" for v in column)])
    head = ["problems", "error", *map(str, nfes)]
    text = "\n".join(
        [
            "Error of the universal plan over that of the default, by the number of evaluations; geometric means:\n",
            *map(line, [head, [":--"] * 2 + ["--:"] * len(nfes), *ratios]),
            "\nThe errors themselves:\n",
            *map(line, [["problem", "plan", *head[1:]], [":--"] * 3 + ["--:"] * len(nfes), *rows]),
        ]
    )
    if not options.quick:
        (options.out / "compare.md").write_text(text + "\n")
    print(text)
    return text


def versions(plan: str, case: Case) -> str:
    """Digest of the tables that a plan comes from; empty for the default."""
    kind = "noise" if case.model.kind.predicts in ("eps", "score") else "data"
    kind = {"default": "", "universal": kind}.get(plan, "gaussian")
    return hashlib.sha256((FOLDER / f"{kind}.json").read_bytes()).hexdigest()[:12] if kind else ""


def explain(options: Options) -> None:
    """Why tables gain little on UNets."""
    head = ["model", "roughness", "amplification, default", "last level", "amplification, universal", "last level"]
    report(options, "reasons", head, reasons(options.out))
    head = ["network", "trajectories", "evaluations", "default", "fitted to both networks"]
    report(options, "limit", head, chain.from_iterable(limit(begin_default(n, "data"), options.out) for n in (5, 8)))


def gaussian_starts(options: Options) -> None:
    """Samples of ε-networks from T and from Gaussian starts."""
    head = ["network", "start", "evaluations", "error to fine, from T", "from this start", "Fréchet distance"]
    report(options, "starts", head, starts())


def report(options: Options, name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, and write it to a file."""
    lines = []
    for row in chain([head, [":--", *["--:"] * (len(head) - 1)]], rows):
        lines.append(line(row))
        print(lines[-1], flush=True)
    (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("fit", "select", "compare", "explain", "starts"), default="fit")
    parser.add_argument("--kinds", default=Options.kinds)
    parser.add_argument("--nfes", default=Options.nfes)
    parser.add_argument("--seeds", default=Options.seeds)
    parser.add_argument("--trajectories", type=int, default=Options.trajectories)
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--penalty", type=float, default=Options.penalty, help="of the sum of squared weights")
    parser.add_argument("--out", type=Path, default=Options.out)
    parser.add_argument("--quick", action="store_true")
    given = vars(parser.parse_args())
    what = given.pop("what")
    options = Options(**given)
    if options.quick:
        options = replace(options, kinds="data", nfes="4", seeds="1", trajectories=4, steps=4)
        with tempfile.TemporaryDirectory() as folder:
            options.out = Path(folder)
            fit(options)
            compare(options)
        return
    commands = {"fit": fit, "select": select, "compare": compare, "explain": explain, "starts": gaussian_starts}
    commands[what](options)


if __name__ == "__main__":
    main()
