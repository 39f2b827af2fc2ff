"""The default on networks of digits, with and without guidance, beside the samplers of other libraries.

    pip install diffusers azula; pip install --no-deps k-diffusion   # each is optional, and skipped if it is missing
    python experiments/trained.py                   # minutes; a second run goes on where the first one ended
    python experiments/trained.py --networks "v, VP, UNet;ε, scaled linear, MLP"   # other networks; any combination
    python experiments/trained.py --again default   # the default anew, the rest from the CSV of the last run
    python experiments/trained.py --report          # the tables from the CSV
    python experiments/trained.py --quick           # seconds, for CI

Class-conditional networks, MLPs and UNets, are trained on the 8 × 8 digits of scikit-learn: they predict v or ε, on the
continuous VP process, on cosine and on scaled linear β. In one sample of ten the label is dropped. Each runs without
labels, and with labels under classifier-free guidance of scale 2 and 4, where one evaluation is two forward passes.
Nothing in the library was chosen on them, but for the default of ε with 8 to 17 evaluations, which the first choice of
networks has seen.

All samplers start from the same states and get the same denoiser: ours, the deterministic schedulers of diffusers on
all spacings and with the options of ``_peers.py``, and the samplers of k-diffusion and azula. All of them run with 5
and 10 evaluations; with other numbers, those of each library that were among its best there (with 50: at 20). The error
of a sample is its distance per pixel to a fine solve of the same network. The tables have the median and the root mean
square of this error over the samples.

The second measure is the Fréchet distance to held-out digits in the features of a classifier. It is measured on other
states for the default, for the fine solve, and for two samplers of each library: that with the smallest median error,
and that with the smallest distance on the first states. Its floor is the distance of real digits to the held-out ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _cases import kept_network
from _digits import load, small_unet
from _judging_digits import Judge
from _peers import LIBRARIES, Sampler, installed
from _rows import read, write
from _verdicts import Result, by_case, distances, singles, summary, table
from torch import Tensor
from work_precision import error, our_solvers, planned, shown_grids

import scoresde as ss

NFES = (4, 5, 6, 8, 10, 15, 20, 50)
WHOLE = (5, 10)  # numbers of evaluations at which all samplers run
JUDGED = (4, 5, 6, 8, 10, 20)  # those at which the Fréchet distance is measured; with more, all are at the fine solve's
SCALES = (2, 4)
NONE = 10  # label of no class
EVENT = (1, 8, 8)
DISCRETE = {name: ss.Discrete(ss.processes.betas(name, 1000)) for name in ("cosine", "scaled_linear")}
PROCESSES: dict[str, ss.SDE] = {
    "VP": ss.VP(),
    "cosine": DISCRETE["cosine"],
    "scaled linear": DISCRETE["scaled_linear"],
}
OURS = ("DDIM", "DPM-Solver++ 2M", "UniPC-2", "UniPC-3", "DEIS tAB-3", "VelocityAB-2", "VelocityAB-2 + UniC")
OUR_GRIDS = ("uniform_t", "power_t(2)", "uniform_lam", "quadratic_vp")
TOP = {"ours": 4, "diffusers": 8, "k-diffusion": 3, "azula": 3}  # samplers that run at the other numbers
PAGE = Path(__file__).parents[1] / "docs" / "work-precision.md"
BEGIN, END = "<!-- the tables of experiments/trained.py -->", "<!-- end of the tables of trained networks -->"


@dataclass
class Options:
    """Options of the command line."""

    states: int = 48
    judged: int = 256
    steps: int = 3000
    fine: int = 240
    out: Path = Path(__file__).parent / "out" / "trained"
    networks: str = "ε, VP, MLP;v, cosine, MLP"
    again: str = ""
    report: bool = False
    quick: bool = False

    @property
    def cases(self) -> list[Case]:
        """Networks with each scale of guidance."""
        words = ["unguided", *(f"guidance {scale}" for scale in SCALES)]
        return [Case.named(f"{name}, {word}") for name in self.networks.split(";") for word in words]

    @property
    def budgets(self) -> tuple[int, ...]:
        """Numbers of evaluations."""
        return (4, 5) if self.quick else NFES


@dataclass(frozen=True)
class Case:
    """A network with a scale of guidance.

    Arguments:
        predicts: Prediction, ``"v"`` or ``"ε"``.
        process: Name of the process.
        body: ``"MLP"`` or ``"UNet"``.
        scale: Scale of classifier-free guidance; 0 is the network without labels.
    """

    predicts: str
    process: str
    body: str
    scale: int

    @property
    def name(self) -> str:
        guidance = f"guidance {self.scale}" if self.scale else "unguided"
        return f"{self.predicts}, {self.process}, {self.body}, {guidance}"

    @classmethod
    def named(cls, name: str) -> Case:
        """The case of this name."""
        predicts, process, body, guidance = name.split(", ")
        return cls(predicts, process, body, int(guidance.removeprefix("guidance ")) if "guidance" in guidance else 0)


# Networks.


@cache
def network(predicts: str, process: str, body: str, out: Path, steps: int) -> ss.Denoiser:
    """A class-conditional network of the digits; its weights are kept in a file."""
    digits, kind = load(), {"ε": "eps"}.get(predicts, predicts)
    if body == "UNet":
        steps = max(1, steps // 5)
        net: torch.nn.Module = small_unet(16, classes=10, seed=5)
    else:
        net = ss.nn.MLP(64, hidden=160, classes=10, seed=5)
    model = ss.Denoiser(net, PROCESSES[process], predicts=kind)
    page = out / f"{body}-{kind}-{process.replace(' ', '_')}-{steps}.pt"
    torch.manual_seed(5)
    with torch.enable_grad():
        return kept_network(model, digits.images, page, steps=steps, batch=64, seed=5, labels=digits.labels, null=NONE)


class Guided:
    """A denoiser as the samplers of ``_peers.py`` expect it: under no process but its own.

    Arguments:
        case: Network and scale.
        n: Number of samples; their labels repeat 0 to 9.
        options: Options of the command line.
    """

    def __init__(self, case: Case, n: int, options: Options) -> None:
        net = network(case.predicts, case.process, case.body, options.out, options.steps)
        labels = torch.arange(n) % 10
        if case.scale:
            null = {"label": NONE}
            self.model: Any = ss.ClassifierFree(net.given(label=labels), float(case.scale), null=null, one_forward=True)
        else:
            self.model = net.given(label=torch.full((n,), NONE))
        self.sde, self.x0, self.eps = self.model.sde, self.model.x0, self.model.eps

    def under(self, sde: ss.SDE) -> Guided:
        assert sde == self.sde
        return self


# Samplers.

Word = tuple[str, str, str]  # who, solver, grid


def all_samplers(process: str, sde: ss.SDE, libraries: list[str], quick: bool) -> dict[Word, Sampler]:
    """All samplers of all libraries by name."""
    found: dict[Word, Sampler] = {}
    makers = shown_grids(False)
    for word in OURS[-1:] if quick else OURS:
        for grid in OUR_GRIDS[:1] if quick else OUR_GRIDS:
            found["ours", word, grid] = _ours(our_solvers(False)[word], makers[grid])
    for library in libraries:
        for i, (word, grid, sampler) in enumerate(LIBRARIES[library](process, sde)):
            if not quick or i % 40 == 0:
                found[library, word, grid] = sampler
    return found


def _ours(solver: ss.solvers.Solver, maker: Callable[..., Tensor]) -> Sampler:
    return lambda model, x, n: planned(solver, maker, model, x, n)


class Bench:
    """States of a case with their fine solve; it measures samplers.

    Arguments:
        case: Network and scale.
        options: Options of the command line.
        judge: Judge of digits.
    """

    def __init__(self, case: Case, options: Options, judge: Judge) -> None:
        self.case, self.options, self.judge = case, options, judge
        self.near, self.far = (Guided(case, n, options) for n in (options.states, options.judged))
        sde = self.near.sde
        normals = ss.Noise(31).normal((options.states + options.judged, *EVENT), 0, dtype=torch.float32)
        self.x, self.others = (normals * float(sde.sigma(sde.T))).split([options.states, options.judged])
        self.fine = finely(self.near, self.x, options.fine)
        self.rows: dict[tuple[Word, int], Result] = {}

    def run(self, word: Word, sampler: Sampler, n: int) -> None:
        """Measure a sampler at `n` evaluations, unless it fails or needs more."""
        if (word, n) in self.rows:
            return
        found = sampler(self.near, self.x, n)
        if found is not None and found[1] <= n and bool(found[0].isfinite().all()):
            near = self.judge.distance(found[0])
            row = Result(self.case.name, *word, n, found[1], *error(found[0], self.fine), near)
            self.rows[word, n] = row

    def judged(self, word: Word, sampler: Sampler, n: int) -> None:
        """Measure the Fréchet distance of a sampler on the other states."""
        found = sampler(self.far, self.others, n)
        if found is not None and (word, n) in self.rows:
            row = self.rows[word, n]
            self.rows[word, n] = replace(row, distance=self.judge.distance(found[0]))

    def best(self, who: str, nfes: Iterable[int], count: int, keys: tuple[str, ...]) -> list[Word]:
        """Samplers of a library that are among its best by one of some measures."""
        words: dict[Word, None] = {}
        for n in nfes:
            rows = [(word, row) for (word, m), row in self.rows.items() if m == n and word[0] == who]
            for key in keys:
                top = sorted(rows, key=lambda item, key=key: getattr(item[1], key))[:count]
                words |= dict.fromkeys(word for word, _ in top)
        return list(words)


def finely(model: Guided, x: Tensor, steps: int) -> Tensor:
    """Ends of the trajectories by a fine solve."""
    return ss.sample(model.model, x, ss.VelocityAB(2), grid=ss.grids.quadratic_vp(model.sde, steps))


DEFAULT: Word = ("default", "default", "default")


def default_of(model: Guided, x: Tensor, n: int) -> tuple[Tensor, int]:
    solution = ss.solve(model.model, x, nfe=n)
    return solution.x, solution.calls


@torch.no_grad()
def results_of(case: Case, libraries: list[str], options: Options, judge: Judge) -> list[Result]:
    """All results of a case."""
    bench = Bench(case, options, judge)
    if not options.again:
        measure_others(bench, libraries)
        half = finely(bench.near, bench.x, options.fine // 2)
        median, rmse = error(half, bench.fine)  # of half the steps: what the fine solve's error is below
        distance = judge.distance(finely(bench.far, bench.others, options.fine // 4))
        near = judge.distance(bench.fine)
        fine = Result(case.name, "fine", "fine", "fine", options.fine, options.fine, median, rmse, near, distance)
        bench.rows[("fine", "fine", "fine"), options.fine] = fine
    for n in options.budgets:
        bench.run(DEFAULT, default_of, n)
        if n in JUDGED:
            bench.judged(DEFAULT, default_of, n)
    return list(bench.rows.values())


def measure_others(bench: Bench, libraries: list[str]) -> None:
    """Run our solvers and the samplers of the libraries: all at 5 and 10 evaluations, then the best of each."""
    options, errors = bench.options, ("median", "rmse")
    samplers = all_samplers(bench.case.process, bench.near.sde, libraries, options.quick)
    whole = [n for n in WHOLE if n in options.budgets]
    for n in whole:
        for word, sampler in samplers.items():
            bench.run(word, sampler, n)
    for n in options.budgets:
        for who in ("ours", *libraries):
            where = whole if n < 10 else [20] if n == 50 else [10]
            for word in bench.best(who, where, TOP[who], errors) if n not in whole else []:
                bench.run(word, samplers[word], n)
            for word in bench.best(who, [n], 1, ("median", "near")) if n in JUDGED else []:
                bench.judged(word, samplers[word], n)


# The report.


def report(rows: list[Result], options: Options, libraries: list[str], judge: Judge) -> str:
    budgets = options.budgets
    names = [str(n) for n in budgets]
    lines = [
        f"{options.states} states for the errors, {options.judged} others for the Fréchet distance. Libraries beside "
        f"ours: {', '.join(libraries) or 'none'}.",
        "",
        "Error of the default over that of the best scheduler of diffusers in hindsight, median; root mean square:",
        "",
        *table(["network", *names], by_case(rows, budgets, ("diffusers",))),
        "The same over the best of all libraries, ours among them:",
        "",
        *table(["network", *names], by_case(rows, budgets, ("ours", *libraries))),
        "The same, geometric mean; largest over the networks and all numbers of evaluations:",
        "",
    ]
    every = ["ours", *libraries, "all"]
    head = ["networks", *(f"{who}, {measure}" for who in every for measure in ("median", "RMSE"))]
    lines += table(head, summary(rows, budgets, libraries))
    lines += [
        "The single scheduler of diffusers with the smallest mean of its ratios to the best of diffusers, over the "
        "cases of a prediction:",
        "",
    ]
    head = ["networks", "evaluations", "scheduler", "its median error over the best", "that of the default"]
    lines += table(head, [line for n in budgets if n in WHOLE for line in singles(rows, n)])
    mean, spread = judge.floor(options.judged)
    lines += [
        "Fréchet distance of the default; the smallest of the other libraries' samplers that were measured. Real "
        f"digits have {mean:.1f} ± {spread:.1f}. The classifier knows {judge.accuracy:.1%} of the held-out digits:",
        "",
        *table(
            ["network", "fine solve", *map(str, JUDGED)],
            distances(rows, JUDGED, libraries),
        ),
    ]
    floors = [row.median for row in rows if row.who == "fine"]
    if floors:
        lines += [
            f"A fine solve has {options.fine} evaluations. Its distance to that of half as many is at most "
            f"{max(floors):.2g} in the median, {statistics.median(floors):.2g} in the middle of the networks; a dash "
            "stands for a ratio of errors that are smaller than 1.5 times this distance on the same network."
        ]
    return "\n".join(lines)


def main(options: Options) -> str:
    torch.set_num_threads(1)
    if options.quick:
        options = replace(options, states=6, judged=16, steps=3, fine=12, out=options.out / "quick")
    digits = load()
    judge = Judge(digits, 20 if options.quick else 500)
    path = options.out / "trained.csv"
    rows = [] if options.quick or not path.exists() else read(Result, path)
    done = dict.fromkeys(row.case for row in rows)
    cases = options.cases[1:2] if options.quick else [] if options.report else options.cases
    libraries = installed() if cases else [who for who in LIBRARIES if any(row.who == who for row in rows)]
    if options.again:
        cases, done = [Case.named(name) for name in done], {}
        rows = [row for row in rows if row.who != options.again]
    for case in cases:
        if case.name not in done:
            started = time.monotonic()
            rows += results_of(case, libraries, options, judge)
            write(rows, path)
            print(f"{case.name}: {time.monotonic() - started:.0f} s", flush=True)
    text = report(rows, options, libraries, judge)
    (options.out / "trained.md").write_text(text + "\n")
    print(text)
    if not options.quick:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--states", type=int, default=Options.states, help="number of states for the errors")
    parser.add_argument("--judged", type=int, default=Options.judged, help="number of states for the Fréchet distance")
    parser.add_argument("--steps", type=int, default=Options.steps, help="training steps of each network")
    parser.add_argument("--fine", type=int, default=Options.fine, help="evaluations of the fine solve")
    parser.add_argument("--out", type=Path, default=Options.out, help="folder of the results")
    parser.add_argument("--networks", default=Options.networks, help="prediction, process, MLP or UNet; ...")
    parser.add_argument("--again", default=Options.again, help="default: measure it anew; the rest from the CSV")
    parser.add_argument("--report", action="store_true", help="write the tables from the CSV of the last run")
    parser.add_argument("--quick", action="store_true", help="a small run for CI")
    main(Options(**vars(parser.parse_args())))
