"""Universal tables: fit one for each number of evaluations, select on trained networks, and compare.

    python experiments/universal.py fit              # some hours on one core; continues where it stopped
    python experiments/universal.py select           # choose among seeds on networks; writes the package's tables
    python experiments/universal.py compare          # the table of the page, on exact problems and networks
    python experiments/universal.py explain          # roughness, amplification, and what a fit to UNets gains
    python experiments/universal.py starts           # ε-networks from a Gaussian start: error and Fréchet distance
    python experiments/universal.py penalty          # fits with a penalty on the squares of the weights
    python experiments/universal.py --quick          # seconds, for CI: all three in small, and nothing is written

Each fit is kept in ``experiments/out/universal``: one file for each kind, number of evaluations and seed. A kind is the
prediction of the network, ``data`` (x0, v, velocity) or ``noise`` (ε, score), and the start, from T or ``gaussian``.
Seed 0 has mixtures with smooth errors alone and begins from Adams–Bashforth rules. For ``data`` and ``noise``, seeds 1
and 2 have rougher errors and small trained networks too, and also begin from the plan of the default. Seeds 3 and 4
have low-dimensional mixtures, each with an error and exact, and a network of two moons; half of their loss is the root
mean square error of each problem, and they also begin from the tables of the lower seeds.

``select`` runs the fits on mixtures that no fit has seen, exact and with errors, on networks of vectors (a swiss roll,
a table of measurements), and on networks of images: those that diffusers trained on MNIST (ε on linear β, v on cosine
β, flow; see ``interop/_trained.py``) and a v network of the 8 × 8 digits. It keeps the seed with the smallest error to
a fine solve: the geometric mean over these four groups of the median and of the root mean square error. ``compare`` has
problems and networks that no choice has seen. It keeps each error in a file, so it continues where it stopped; several
processes share the problems with ``--workers``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from _cases import SELECTION, Case, cases
from _comparison import Store, compare, line
from _families import vectors
from _networks import SELECTED_VECTORS
from _penalty import penalties
from _reasons import limit, reasons
from _starts import starts
from _table_fits import Options, begin_default, fit, found, path

from scoresde.fitting.universal import Group, Trajectories, errors
from scoresde.solvers.universal import FOLDER, UniversalTable, unit_of, write_plan


def suits(kind: str, case: Case) -> bool:
    """Whether a model is of the kind that a table is for."""
    return kind == "gaussian" or (kind == "noise") == (case.model.kind.predicts in ("eps", "score"))


def mixture_score(table: UniversalTable, groups: Sequence[Trajectories]) -> float:
    """Mean logarithm of the median error and of its root mean square, half each, over problems of no fit."""
    found = [0.5 * (e.median(1).values.log() + 0.5 * e.square().mean(1).log()) for e in errors(table, groups)]
    return float(torch.cat(found).mean())


def network_score(table: UniversalTable, kind: str, judged: Sequence[Case], out: Path) -> float:
    """The same over networks, each error kept in a file."""
    found = []
    for case in judged:
        if suits(kind, case):
            start, scaled = case.gaussian if kind == "gaussian" else None, table.scaled(unit_of(case.gaussian.spectrum))
            plan = write_plan(scaled, case.model.sde, None if start else case.model.sde.T)
            median, rmse = Store.of(case.name, out).errors(case, plan, start)
            found.append(0.5 * math.log(median * rmse))
    return statistics.fmean(found)


def scores(options: Options, kind: str) -> Callable[[UniversalTable], tuple[float, ...]]:
    """Function that returns the scores of a table: exact mixtures, with errors, networks of vectors, of images.

    The tables for noise predictions have no score on exact mixtures: an exact model predicts the data.
    """
    predicts = "any" if kind == "gaussian" else kind
    drawn: list[list[Group]] = [[], []]
    for seed in (90_000, 91_000):
        batches = vectors(seed, predicts)  # the first half is exact
        for i, batch in enumerate(batches):
            drawn[i >= len(batches) // 2].append(Group.draw(batch, 48, seed=seed, gaussian=kind == "gaussian"))
    judged = [[*cases(names, options.out)] for names in (tuple(r.name for r in SELECTED_VECTORS), SELECTION)]

    def of(table: UniversalTable) -> tuple[float, ...]:
        mixtures = (mixture_score(table, groups) for groups in drawn[kind == "noise" :])
        return *mixtures, *(network_score(table, kind, networks, options.out) for networks in judged)

    return of


def select(options: Options) -> None:
    """Choose one seed for each kind and number of evaluations, and write the tables of the package."""
    for kind in options.kinds.split(","):
        chosen: dict[str, object] = {}
        score: Callable[[UniversalTable], tuple[float, ...]] | None = None
        for n in sorted(map(int, options.nfes.split(","))):
            seeds = found(options, kind, n, map(int, options.seeds.split(",")))
            if len(seeds) > 1:  # one alone needs no choice
                score = score or scores(options, kind)
                of = {seed: score(table) for seed, table in seeds.items()}
                for seed, values in of.items():
                    print(f"{kind} {n} seed {seed}: " + " ".join(f"{math.exp(v):.4g}" for v in values), flush=True)
                seeds = {k: seeds[k] for k in sorted(seeds, key=lambda seed: sum(of[seed]))}
            for seed in [*seeds][:1]:
                chosen[str(n)] = json.loads(path(options, kind, n, seed).read_text())
        if chosen and not options.quick:
            FOLDER.mkdir(exist_ok=True)
            lines = ",\n".join(f' "{n}": {json.dumps(table)}' for n, table in chosen.items())
            (FOLDER / f"{kind}.json").write_text(f'{{"tables": {{\n{lines}\n}}}}\n')


PAGE = Path(__file__).parents[1] / "docs" / "universal.md"


def comparison(options: Options) -> None:
    """Print the tables of the page, and write them into it if they have all numbers of evaluations."""
    nfes = sorted(map(int, options.nfes.split(",")))
    texts = dict(
        zip(("ratios", "errors"), compare(nfes, options.out, options.workers, quick=options.quick), strict=True)
    )
    whole = nfes == sorted(map(int, Options.nfes.split(","))) and not options.quick
    page = PAGE.read_text()
    for name, text in texts.items():
        print(text, end="\n\n")
        begin, end = f"<!-- {name}: experiments/universal.py compare -->", f"<!-- end of {name} -->"
        page = page[: page.index(begin) + len(begin)] + f"\n\n{text}\n\n" + page[page.index(end) :]
    if whole:
        PAGE.write_text(page)


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


def penalised(options: Options) -> None:
    """Errors of tables that were fitted with penalties on their weights."""
    head = [
        "evaluations",
        "penalty",
        "sum of squares in a row",
        "mixtures",
        "networks of vectors",
        "networks of images",
    ]
    report(options, "penalties", head, penalties(options))


def report(options: Options, name: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, and write it to a file."""
    lines = []
    for row in chain([head, [":--", *["--:"] * (len(head) - 1)]], rows):
        lines.append(line(row))
        print(lines[-1], flush=True)
    (options.out / f"{name}.md").write_text("\n".join(lines) + "\n")


COMMANDS: dict[str, Callable[[Options], None]] = {
    "fit": fit,
    "select": select,
    "compare": comparison,
    "explain": explain,
    "starts": gaussian_starts,
    "penalty": penalised,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=[*COMMANDS], default="fit")
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
    COMMANDS[what](options)


if __name__ == "__main__":
    main()
