"""Universal plans beside the rules of the default on every problem; each error is kept in a file."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

import torch
from _cases import EXACT, HELD_OUT, HELD_OUT_ERRORS, HELD_OUT_EXACT, SELECTION, Case, cases
from _networks import HELD_OUT_VECTORS, SELECTED_VECTORS

import scoresde as ss
from scoresde.solvers.universal import unit_of

GROUPS: Mapping[str, Sequence[str]] = {
    "exact mixtures": EXACT,
    "exact mixtures, held out": HELD_OUT_EXACT,
    "mixtures with errors, held out": HELD_OUT_ERRORS,
    "networks of vectors, of the selection": [r.name for r in SELECTED_VECTORS],
    "networks of vectors, held out": [r.name for r in HELD_OUT_VECTORS],
    "networks of images, of the selection": SELECTION,
    "networks of images, held out": HELD_OUT,
}
"""Problems to compare on. The held-out ones had no part in the fits or in the choice of seeds."""

PLANS = ("rule", "universal", "universal, Gaussian start")
MEASURES = ("median", "RMSE")

Errors = tuple[float, float]
Found = dict[str, list[Errors]]


def rule(model: ss.denoisers.AbstractDenoiser, nfe: int) -> ss.Plan:
    """Plan of the default for networks of images, and of that for exact models without a universal plan.

    Arguments:
        model: Denoiser.
        nfe: Number of evaluations.
    """
    if model.kind.exact:
        order, final = 2 if nfe < 15 else 3, 1 if nfe <= 6 else 0
        solver: ss.solvers.Solver = ss.solvers.with_corrector(ss.VelocityAB(order, final=final))
        times = ss.grids.flow_time(model.sde, solver.for_nfe(nfe)[1], exponent=1.5)
    else:
        choice = ss.sampling.recommend(nfe, ss.Denoiser(torch.nn.Identity(), model.sde, predicts=model.kind.predicts))
        solver = choice.solver
        times = choice.grid(model.sde, solver.for_nfe(nfe)[1])
    return solver.plan(model.sde, times)


def plan_of(name: str, case: Case, nfe: int) -> ss.Plan:
    """Plan of a column, one of `PLANS`, for a case.

    Arguments:
        name: Name of the column.
        case: Model, with the Gaussian of its data.
        nfe: Number of evaluations.
    """
    if name == "rule":
        return rule(case.model, nfe)
    carried = case.gaussian if name == PLANS[2] else None
    universal = ss.solvers.Universal(data_std=unit_of(case.gaussian.spectrum)).suited(case.model, nfe, carried)
    return universal.plan(case.model.sde, ss.grids.uniform_t(case.model.sde, nfe))


@dataclass
class Store:
    """Errors on one problem, kept in a file.

    Arguments:
        page: File.
        known: Errors by the number of evaluations and a digest of the coefficients.
    """

    page: Path
    known: dict[str, Errors] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, out: Path) -> Store:
        page = out / "compare" / f"{name.replace(', ', '-').replace(' ', '_').replace('%', 'percent')}.json"
        page.parent.mkdir(parents=True, exist_ok=True)
        return cls(page, {k: (a, b) for k, (a, b) in json.loads(page.read_text()).items()} if page.exists() else {})

    def errors(self, case: Case, plan: ss.Plan, start: ss.Gaussian | None) -> Errors:
        """Errors of a plan, from the file or measured; a measured one is written at once."""
        key = f"{plan.nfe}, {hashlib.sha256(repr([plan.rows, start is None]).encode()).hexdigest()[:16]}"
        if key not in self.known:
            self.known[key] = case.errors(plan, start=start)
            part = self.page.with_suffix(".part")
            part.write_text(json.dumps(self.known))
            part.replace(self.page)  # an interruption leaves a whole file
        return self.known[key]


def errors_of(name: str, nfes: Sequence[int], out: Path) -> Found:
    """Errors of all plans on a problem, for each number of evaluations; those in its file are not measured again.

    Arguments:
        name: Name of the problem.
        nfes: Numbers of evaluations.
        out: Folder.
    """
    torch.set_num_threads(1)
    store = Store.of(name, out)
    (case,) = cases((name,), out)
    found: Found = {}
    for column in PLANS:
        start = case.gaussian if column == PLANS[2] else None
        found[column] = [store.errors(case, plan_of(column, case, n), start) for n in nfes]
    print(name, flush=True)
    return found


def compare(nfes: Sequence[int], out: Path, workers: int, *, quick: bool = False) -> tuple[str, str]:
    """Texts of the ratios and of the errors; measures what is not in the files.

    Arguments:
        nfes: Numbers of evaluations.
        out: Folder.
        workers: Number of processes.
        quick: Whether to take one problem only.
    """
    groups = {k: v[:1] for k, v in [*GROUPS.items()][:1]} if quick else GROUPS
    names = [name for group in groups.values() for name in group]
    one = partial(errors_of, nfes=nfes, out=out)
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            found = dict(zip(names, pool.map(one, names), strict=True))
    else:
        found = {name: one(name) for name in names}
    return ratios_text(groups, found, nfes), errors_text(found, nfes)


def ratios_text(groups: Mapping[str, Sequence[str]], found: Mapping[str, Found], nfes: Sequence[int]) -> str:
    """Tables of the ratios to the rule: geometric means over the problems of a group, and the largest of one."""
    means, largest = [], []
    for group, members in groups.items():
        for column in PLANS[1:]:
            for i, measure in enumerate(MEASURES):
                pairs = [zip(found[m][column], found[m]["rule"], strict=True) for m in members]
                ratios = [*zip(*([a[i] / b[i] for a, b in p] for p in pairs), strict=True)]
                row = [group + column.removeprefix("universal"), measure]
                means.append([*row, *(f"{math.exp(fmean(map(math.log, r))):.2f}" for r in ratios)])
                largest.append([*row, *(f"{max(r):.2f}" for r in ratios)])
    head = [["problems", "error", *map(str, nfes)], [":--"] * 2 + ["--:"] * len(nfes)]
    first = "Geometric means over the problems of a group, by the number of evaluations:"
    return "\n".join(
        [first, "", *map(line, head + means), "", "The largest of a group:", "", *map(line, head + largest)]
    )


def errors_text(found: Mapping[str, Found], nfes: Sequence[int]) -> str:
    """Table of the errors themselves."""
    head = [["problem", "plan", "error", *map(str, nfes)], [":--"] * 3 + ["--:"] * len(nfes)]
    rows = [
        [name, column, measure, *(f"{e[i]:.3g}" for e in of[column])]
        for name, of in found.items()
        for column in PLANS
        for i, measure in enumerate(MEASURES)
    ]
    return "\n".join(map(line, head + rows))


def line(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"
