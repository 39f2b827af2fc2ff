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
import json
import math
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from _cases import SELECTION, Case, cases
from _comparison import compare, line
from _reasons import limit, reasons
from _starts import starts
from _table_fits import Options, begin_default, fit, found, path

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


def comparison(options: Options) -> None:
    """Write and print the tables of the page."""
    text = compare(sorted(map(int, options.nfes.split(","))), options.out, options.workers, quick=options.quick)
    if not options.quick:
        (options.out / "compare.md").write_text(text + "\n")
    print(text)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("fit", "select", "compare", "explain", "starts"), default="fit")
    parser.add_argument("--kinds", default=Options.kinds)
    parser.add_argument("--nfes", default=Options.nfes)
    parser.add_argument("--seeds", default=Options.seeds)
    parser.add_argument("--trajectories", type=int, default=Options.trajectories)
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--penalty", type=float, default=Options.penalty, help="of the sum of squared weights")
    parser.add_argument("--workers", type=int, default=Options.workers, help="processes of compare")
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
            comparison(options)
        return
    commands = {"fit": fit, "select": select, "compare": comparison, "explain": explain, "starts": gaussian_starts}
    commands[what](options)


if __name__ == "__main__":
    main()
