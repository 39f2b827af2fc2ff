"""Fits of universal tables: their options, the tables that they begin from, and their problems."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from _families import F64, problems, vectors
from _networks import FITTED_VECTORS, RECIPES, Recipe, network_groups

import scoresde as ss
from scoresde.fitting.universal import Group, Trajectories, descend, errors, mean_log
from scoresde.plan.matrices import unroll
from scoresde.solvers.universal import UniversalTable

NFES = (5, 8, 10, 4, 6, 7, 12, 15, 3, 9, 11)
KINDS = ("data", "noise", "gaussian")
LAST = {3: 0.5, 4: 0.35, 5: 0.25, 6: 0.15, 7: 0.12, 8: 0.1, 9: 0.085, 10: 0.07, 11: 0.063, 12: 0.055, 15: 0.04}


@dataclass
class Options:
    """Options of the command line."""

    kinds: str = ",".join(KINDS)
    nfes: str = ",".join(map(str, NFES))
    seeds: str = "0,1,2,3,4"
    trajectories: int = 10
    steps: int = 50
    penalty: float = 0.0
    workers: int = 1
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


def begin_default(n: int, kind: str) -> UniversalTable:
    """The plan of the library's rule for networks, whose levels suit data of the unit 1.4."""
    net = ss.Denoiser(torch.nn.Identity(), ss.VP(), predicts="eps" if kind == "noise" else "v")
    choice = ss.sampling.recommend(n, net)
    return table_of(choice.solver.plan(net.sde, choice.grid(net.sde, choice.solver.for_nfe(n)[1])), net.sde, 1.4)


def begin_exact(n: int) -> UniversalTable:
    """The plan of the library's rule for exact models with many evaluations."""
    sde, solver = ss.VP(), ss.solvers.with_corrector(ss.VelocityAB(3))
    return table_of(solver.plan(sde, ss.grids.flow_time(sde, solver.for_nfe(n)[1], exponent=1.5)), sde, 1.0)


def table_of(plan: ss.Plan, sde: ss.SDE, unit: float) -> UniversalTable:
    """The table of a plan that was made for data of a unit."""
    u = unroll(plan)
    times = torch.tensor([float(t) for t in u.t], dtype=F64)
    s = sde.sigma(times) / sde.alpha(times)
    weights = torch.zeros(plan.nfe + 1, plan.nfe, dtype=F64)
    weights[1:] = u.d[1:] / (sde.alpha(times)[1:] * (1 - s[1:] / s[0]))[:, None]
    return UniversalTable(s[:-1] / unit, s[:-1] / unit, weights)


SECOND = {"data": (2.5, 6.0), "noise": (5.0, 20.0), "gaussian": (2.5,)}
"""First levels of the rule after T; the best start is fitted."""

SHARES = {1: 8, 2: 24}
"""Number of problems that a trained network counts for in the fits of a seed."""

VECTORS = {3: 2, 4: 2}
"""Number of sets of low-dimensional mixtures in the fits of a seed, which begin from those of lower seeds too."""

SQUARES = 0.5  # share of the root mean square error in the loss of these


def starts_of(options: Options, n: int, kind: str, seed: int) -> list[UniversalTable]:
    """Tables of which the best is fitted."""
    rules = [begin(n, kind, second) for second in SECOND[kind]]
    if seed not in {**SHARES, **VECTORS}:
        return rules
    if kind in RECIPES:
        rules = [rules[-1], begin_default(n, kind)]
    if seed not in VECTORS:
        return rules
    exact = [begin_exact(n)] if seed > 3 and kind == "data" else []
    return [*rules, *exact, *found(options, kind, n, range(seed)).values()]


def groups(seed: int, kind: str, n: int, options: Options, *, share: int) -> list[Trajectories]:
    """Trajectories of the problems of a kind; fewer where there are many dimensions."""
    gaussian, quick = kind == "gaussian", options.quick
    largest = 64 if quick else 256 if gaussian else 4096
    batches = problems(seed, "any" if gaussian else kind, largest, rough=share > 0)
    found: list[Trajectories] = [
        Group.draw(b, n if b.data.means.shape[-1] <= 64 else max(2, n // 3), seed=seed + i, gaussian=gaussian)
        for i, b in enumerate(batches[: 1 if quick else None])
    ]
    if not share:
        return found
    recipes = [Recipe("ring", "VP", "v", 3)] if quick else RECIPES[kind]
    return found + list(network_groups(recipes, 8, seed, options.out, share))


def vector_groups(seed: int, kind: str, n: int, options: Options, sets: int) -> list[Trajectories]:
    """Trajectories of low-dimensional mixtures, and of a small network of two moons."""
    gaussian, sets = kind == "gaussian", 1 if options.quick else sets
    found: list[Trajectories] = [
        Group.draw(batch, n, seed=seed + k, gaussian=gaussian)
        for k in range(sets)
        for batch in vectors(seed + 1000 * k, "any" if gaussian else kind)
    ]
    recipes = () if options.quick else FITTED_VECTORS.get(kind, ())
    return found + list(network_groups(recipes, 8, seed, options.out, 8 * sets))


@dataclass(frozen=True)
class Training:
    """Problems of a fit and the words of its loss.

    Arguments:
        train: Groups to fit.
        held: Groups that decide.
        how: Keywords of ``descend``.
        steps: Number of iterations.
        made_of: Text of the origin of a table.
    """

    train: list[Trajectories]
    held: list[Trajectories]
    how: dict[str, float]
    steps: int
    made_of: str

    @classmethod
    def of(cls, seed: int, kind: str, options: Options) -> Training:
        n, how = options.trajectories, {"first_shift": kind == "gaussian", "penalty": options.penalty}
        steps, share = options.steps, SHARES.get(seed, 0) if kind in RECIPES else 0
        if seed in VECTORS:
            # sets of the seeds 300, 1300, 2300 … to fit on, and 20300, 21300 … to decide
            train, held = (vector_groups(100 * seed + k, kind, n, options, VECTORS[seed]) for k in (0, 20_000))
            how["squares"], steps = SQUARES, min(steps, 4) if options.quick else 4 * steps
            names = [r.name for r in FITTED_VECTORS.get(kind, ())]
        else:
            train = groups(100 * seed, kind, n, options, share=share)
            held = groups(100 * seed + 5000, kind, max(4, n // 2), options, share=share)
            names = [r.name for r in RECIPES[kind]] if share else []
        count = sum(len(g) for g in train)
        made_of = f"{count} problems of {n} trajectories, {steps} iterations"
        if names:
            made_of += f", of which {sum(len(g) for g in train[-len(names) :])} for {len(names)} networks"
        return cls(train, held, how, steps, made_of)

    def fit(self, starts: list[UniversalTable]) -> tuple[UniversalTable, float, float]:
        """The table that is best after a trial of all, fitted; its score, and that of the first."""
        trial = min(15, self.steps) if len(starts) > 1 else 1
        tries = [descend(s, self.train, self.held, steps=trial, **self.how) for s in starts]  # type: ignore[arg-type]
        best = min(tries, key=lambda pair: pair[1])[0]
        table, score = descend(best, self.train, self.held, steps=self.steps, **self.how)  # type: ignore[arg-type]
        return table, score, mean_log(errors(starts[0], self.held), self.how.get("squares", 0.0))


def fit(options: Options) -> None:
    """Fit all tables that are not there yet."""
    options.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for kind in options.kinds.split(","):
            todo = [n for n in map(int, options.nfes.split(",")) if not path(options, kind, n, seed).exists()]
            if not todo:
                continue
            began = time.monotonic()
            training = Training.of(seed, kind, options)
            print(f"{kind}, seed {seed}: {training.made_of}, {time.monotonic() - began:.0f} s", flush=True)
            for n in todo:
                began = time.monotonic()
                table, score, first = training.fit(starts_of(options, n, kind, seed))
                seconds = time.monotonic() - began
                print(f"  {n:3} {first:.3f} -> {score:.3f} {seconds:4.0f} s {summary(table)}", flush=True)
                record = {
                    **table.to_dict(),
                    "made by": f"experiments/universal.py fit, kind {kind}, seed {seed}, {training.made_of}",
                    "held out": {"before": first, "after": score},
                }
                path(options, kind, n, seed).write_text(json.dumps(record) + "\n")


def path(options: Options, kind: str, n: int, seed: int) -> Path:
    return options.out / f"{kind}-{n}-{seed}.json"


def summary(table: UniversalTable) -> str:
    return " ".join(f"{v:.3g}" for v in table.levels.tolist())


def found(options: Options, kind: str, n: int, seeds: Iterable[int]) -> dict[int, UniversalTable]:
    """Fitted tables of a kind by their seeds."""
    pages = {seed: path(options, kind, n, seed) for seed in seeds}
    return {k: UniversalTable.from_dict(json.loads(p.read_text())) for k, p in pages.items() if p.exists()}
