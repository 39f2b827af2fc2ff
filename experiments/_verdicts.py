"""Results of samplers on trained networks: their file, and tables of the default beside the libraries."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from work_precision import cell

RESOLVED = 1.5  # smallest error that is shown, in distances between the fine solve and that of half as many steps


@dataclass(frozen=True)
class Result:
    """One sampler at one number of evaluations on one case; the distance is nan where it was not measured."""

    case: str
    who: str  # ours, default, fine, or the name of a library
    solver: str
    grid: str
    nfe: int
    spent: int
    median: float
    rmse: float
    near: float = math.nan  # Fréchet distance of the first states
    distance: float = math.nan


def ratios(rows: list[Result], n: int, measure: str, among: tuple[str, ...]) -> list[float]:
    """Error of the default over the smallest of some libraries, for each case in which the fine solve resolves both."""
    mine, fine, theirs = {}, {}, defaultdict(list)
    for row in rows:
        if row.who == "fine":
            fine[row.case] = getattr(row, measure)
        elif row.nfe == n and row.who == "default":
            mine[row.case] = getattr(row, measure)
        elif row.nfe == n and row.who in among:
            theirs[row.case].append(getattr(row, measure))
    found = [(value, min(theirs[case]), RESOLVED * fine[case]) for case, value in mine.items() if case in theirs]
    return [value / least for value, least, limit in found if min(value, least) >= limit]


def table(head: list[str], lines: Iterable[list[str]]) -> list[str]:
    """A Markdown table."""
    rule = "|:--|" + "--:|" * (len(head) - 1)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines), ""]


def by_case(rows: list[Result], budgets: tuple[int, ...], among: tuple[str, ...]) -> Iterator[list[str]]:
    """Lines with the ratios of the median and of the root mean square for each case and budget."""
    for name in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == name]
        cells = []
        for n in budgets:
            pair = [ratios(own, n, measure, among) for measure in ("median", "rmse")]
            cells.append("; ".join(f"{each[0]:.2f}" for each in pair) if all(pair) else "–")
        yield [name, *cells]


def groups(rows: list[Result]) -> dict[str, list[Result]]:
    """Results by prediction and guidance."""
    found: dict[str, list[Result]] = defaultdict(list)
    for row in rows:
        predicts, _, _, guidance = row.case.split(", ")
        found[f"{predicts}, {guidance}"].append(row)
    return dict(sorted(found.items()))


def summary(rows: list[Result], budgets: tuple[int, ...], libraries: list[str]) -> Iterator[list[str]]:
    """Lines with the geometric mean and the largest ratio of each prediction and guidance, over all cases."""
    every = [("ours",), *((library,) for library in libraries), ("ours", *libraries)]
    for name, own in groups(rows).items():
        cells = []
        for among in every:
            for measure in ("median", "rmse"):
                cells.append(cell([r for n in budgets for r in ratios(own, n, measure, among)]))
        yield [name, *cells]


def singles(rows: list[Result], n: int) -> Iterator[list[str]]:
    """Lines with the single scheduler of diffusers of the smallest mean ratio, and the default, for each prediction."""
    for name in sorted({row.case.split(", ")[0] for row in rows}):
        own = [row for row in rows if row.nfe == n and row.case.startswith(name)]
        cases = {row.case for row in own}
        floor = {
            case: min((r.median for r in own if r.case == case and r.who == "diffusers"), default=0) for case in cases
        }
        found: dict[str, list[float]] = defaultdict(list)
        for row in own:
            if row.who in ("diffusers", "default"):
                word = row.who if row.who == "default" else f"{row.solver}, {row.grid}"
                found[word].append(row.median / floor[row.case])
        mine = found.pop("default", [])
        whole = {word: each for word, each in found.items() if len(each) == len(cases)}
        if mine and whole:
            word = min(whole, key=lambda word: sum(map(math.log, whole[word])))
            yield [name, str(n), word, cell(whole[word]), cell(mine)]


def distances(rows: list[Result], budgets: tuple[int, ...], libraries: list[str]) -> Iterator[list[str]]:
    """Lines with the distance of the fine solve, and those of the default and the best of the libraries."""
    for name in dict.fromkeys(row.case for row in rows):
        own = [row for row in rows if row.case == name and math.isfinite(row.distance)]
        cells = [f"{row.distance:.1f}" for row in own if row.who == "fine"]
        for n in budgets:
            at = [row for row in own if row.nfe == n]
            mine = [row.distance for row in at if row.who == "default"]
            theirs = [row.distance for row in at if row.who in libraries]
            cells.append("; ".join(f"{min(each):.1f}" if each else "–" for each in (mine, theirs)))
        yield [name, *cells]
