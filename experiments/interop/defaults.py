"""Our default beside the best of diffusers' schedulers on networks that diffusers' code trained.

    python experiments/interop/defaults.py --samples 24     # an hour on two cores; a second run reads its cache
    python experiments/interop/defaults.py --quick          # seconds, for CI

Six UNets are trained on MNIST by the loops of diffusers' examples. The defaults were chosen on the first three of
them, on exact problems and on 8 × 8 digits, that for ε later on both ε-networks and on a seventh, `--kinds "epsilon,
sigmoid"`. An eighth, "epsilon, quadratic", has 500 betas and no
part in a choice up to 24 evaluations. A labelled network takes the
scale of classifier-free guidance behind its name: `--kinds "velocity, labelled flow @ 2;velocity, labelled flow @ 4"`
guides it as the pipelines of diffusers do; each evaluation is then two forward passes. At each number of evaluations
the script runs, from the same states, our default and the schedulers of diffusers with their spacings and the options
that matter (`_schedulers.py`). All of them run at 5 and 10 evaluations; at the other budgets run those that were
among the best there. The tables show the error of each to a fine solve of the same network (median over the samples,
and root mean square), the Fréchet distance to held-out digits in the features of a classifier, and our default over
the best of diffusers in hindsight, for each measure by itself. The figure shows the median errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from _judging import from_command_line, write
from _mnist import Judge, load
from _schedulers import Peer, peers, run
from _trained import NO_LABEL, OUT, QUICK, SCHEDULES, Recipe, diffusers_network, scheduler
from torch import Tensor

import scoresde as ss

BUDGETS = (4, 5, 6, 8, 10, 15, 20, 50)
QUICK_BUDGETS = (4, 5, 10)
LABELLED = "velocity, labelled flow"
HELD_OUT = ("velocity, shifted flow", "x0, cosine", "epsilon, quadratic")


@dataclass
class Options:
    """Options of the command line."""

    samples: int = 24
    fine: int = 400
    kinds: str = ";".join(list(SCHEDULES)[:6])
    quick: bool = False


@dataclass(frozen=True)
class Result:
    """Samples of one sampler at one budget.

    Arguments:
        name: Name of the sampler.
        calls: Number of evaluations.
        median: Median over the samples of the root mean square distance to the fine solve, per pixel.
        rmse: Root mean square of the same distance.
        frechet: Fréchet distance to held-out digits.
    """

    name: str
    calls: int
    median: float
    rmse: float
    frechet: float


class Cache:
    """Tensors by name in a file, so that each sampler runs once.

    Arguments:
        path: Path of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kept: dict[str, tuple[Tensor, int]] = torch.load(path) if path.exists() else {}

    def get(self, name: str, make: Callable[[], tuple[Tensor, int]]) -> tuple[Tensor, int]:
        """The tensor and the number of evaluations of this name, computed if they are new."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(self.kept, self.path)


class Guided(torch.nn.Module):
    """A labelled network with classifier-free guidance as in the pipelines of diffusers: one output for two forwards.

    Arguments:
        net: Network.
        labels: Labels of the samples.
        scale: Scale of the guidance; 0 is the network without labels.
    """

    def __init__(self, net: torch.nn.Module, labels: Tensor, scale: float) -> None:
        super().__init__()
        self.net, self.labels, self.scale = net, labels, scale

    def forward(self, x: Tensor, t: Tensor) -> SimpleNamespace:
        none = torch.full_like(self.labels, NO_LABEL)
        if self.scale == 0:
            return self.net(x, t, class_labels=none)
        both = self.net(torch.cat([x, x]), t, class_labels=torch.cat([none, self.labels])).sample
        without, given = both.chunk(2)
        return SimpleNamespace(sample=without + self.scale * (given - without))


class Network:
    """A trained network with the fine solve from its starts.

    Arguments:
        kind: Name of the network's schedule; a labelled one is followed by "@" and the scale of its guidance.
        options: Options of the command line.
        jury: Judge of images.
    """

    def __init__(self, kind: str, options: Options, jury: Judge) -> None:
        self.kind, _, scale = kind.partition(" @ ")
        self.jury = jury
        self.net = diffusers_network(self.kind, QUICK if options.quick else Recipe())
        self.model = ss.interop.from_diffusers(self.net, scheduler(self.kind))
        self.x = torch.randn(64, 1, 28, 28, generator=torch.Generator().manual_seed(0))[: options.samples]
        if scale:
            labels = torch.arange(len(self.x)) % NO_LABEL
            given = self.model.given(class_labels=labels)
            null = {"class_labels": torch.tensor([NO_LABEL])}
            self.model = ss.ClassifierFree(given, float(scale), null=null, one_forward=True)
            self.net = Guided(self.net, labels, float(scale))
        size = "quick" if options.quick else options.samples
        name = kind.replace(", ", "-").replace(" @ ", "-").replace(" ", "_")
        self.cache = Cache(OUT.parent / "defaults" / f"{name}-{size}.pt")
        grid = ss.grids.power_t(self.model.sde, options.fine, 1.5)
        fine = lambda: (ss.sample(self.model, self.x, ss.VelocityAB(2), grid=grid), options.fine)  # noqa: E731
        self.fine = self.cache.get(f"fine {options.fine}", fine)[0].double()
        self.cache.save()

    def default(self, budget: int) -> Result:
        """Our default."""
        made = ss.sampling.recommend(budget, self.model)
        times = made.grid(self.model.sde, budget)
        name = f"{made.solver!r} {[round(t, 4) for t in times.tolist()]}"
        return self.judged("default", *self.cache.get(name, lambda: self.solved(budget)))

    def solved(self, budget: int) -> tuple[Tensor, int]:
        """Samples of our default, and its number of evaluations."""
        solution = ss.solve(self.model, self.x, nfe=budget)
        return solution.x, solution.calls

    def peer(self, peer: Peer, budget: int) -> Result:
        """A scheduler of diffusers; one that fails has an infinite error."""

        def samples() -> tuple[Tensor, int]:
            try:
                return run(self.net, peer.made(self.kind), peer.calls(budget), self.x)
            except (IndexError, AssertionError, ValueError, RuntimeError):  # too few steps for this scheduler
                return torch.full_like(self.x, math.inf), budget

        return self.judged(str(peer), *self.cache.get(f"{peer}, {budget}", samples))

    def judged(self, name: str, x: Tensor, calls: int) -> Result:
        """Measures of samples."""
        gap = (x.double() - self.fine).flatten(1).square().mean(1).sqrt().nan_to_num(nan=math.inf)
        finite = bool(x.isfinite().all())
        frechet = self.jury.frechet(x) if finite else math.inf
        return Result(name, calls, float(gap.median()), float(gap.square().mean().sqrt()), frechet)

    def theirs(self, quick: bool) -> dict[int, list[Result]]:
        """Schedulers by budget; those that need more evaluations than the budget are left out."""
        every = list(peers(self.kind))[:: 40 if quick else 1]
        at = {n: {peer: self.peer(peer, n) for peer in every} for n in (5, 10)}
        self.cache.save()
        few, some, many = _best(at[5], 14) | _best(at[10], 10), _best(at[10], 12), _best(at[10], 5)
        for budget in QUICK_BUDGETS if quick else BUDGETS:
            if budget not in at:
                chosen = few if budget < 10 else some if budget < 50 else many | _best(at[20], 5)
                at[budget] = {peer: self.peer(peer, budget) for peer in chosen}
        self.cache.save()
        return {n: [r for r in found.values() if r.calls <= n] for n, found in at.items()}


def _best(results: dict[Peer, Result], count: int) -> set[Peer]:
    """Samplers with the smallest errors, by the median and by the root mean square."""
    by = [sorted(results, key=lambda peer, k=key: getattr(results[peer], k))[:count] for key in ("median", "rmse")]
    return set(by[0]) | set(by[1])


Curves = tuple[list[int], list[float], list[float]]


def table(network: Network, options: Options) -> tuple[list[str], list[tuple[float, ...]], Curves]:
    """Rows of a Markdown table, the ratios of our default to the best scheduler in each measure, and the errors.

    The errors are lists: numbers of evaluations, median errors of the default, and those of the best scheduler.
    """
    theirs = network.theirs(options.quick)
    lines = [
        "| evaluations | best of diffusers (median error) | median | RMSE | Fréchet | default: median | RMSE | Fréchet "
        "| default / best: median | RMSE | Fréchet |",
        "| ---: | --- | " + " | ".join(["---:"] * 9) + " |",
    ]
    ratios = []
    curves: Curves = ([], [], [])
    for budget in QUICK_BUDGETS if options.quick else BUDGETS:
        found, ours = theirs[budget], network.default(budget)
        assert ours.calls == budget
        best = {key: min(found, key=lambda r, k=key: getattr(r, k)) for key in ("median", "rmse", "frechet")}
        ratio = tuple(getattr(ours, key) / getattr(best[key], key) for key in best)
        low = [f"{best[key].__getattribute__(key):.3g}" for key in best]
        mine = [f"{getattr(ours, key):.3g}" for key in best]
        shown = [f"{r:.2f}" for r in ratio]
        lines.append(f"| {budget} | {best['median'].name} | " + " | ".join([*low, *mine, *shown]) + " |")
        ratios.append(ratio)
        for curve, value in zip(curves, (budget, ours.median, best["median"].median), strict=True):
            curve.append(value)
    network.cache.save()
    return lines, ratios, curves


def picture(found: dict[str, Curves]) -> None:
    """Draw the errors of all networks into a file among the results."""
    import matplotlib.pyplot as plt

    columns = min(3, len(found))
    lines = math.ceil(len(found) / columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 2.7 * lines), sharex=True, squeeze=False)
    for ax, (kind, (counts, ours, theirs)) in zip(axes.flat, found.items(), strict=False):
        ax.plot(counts, theirs, marker="s", ms=4, color="0.55", label="best scheduler of diffusers, in hindsight")
        ax.plot(counts, ours, marker="o", ms=4, color="C0", label="scoresde, no option given")
        ax.set(xscale="log", yscale="log", title=kind + (" (held out)" if kind in HELD_OUT else ""))
        ax.title.set_fontsize(9)
        ax.set_xticks(counts, [str(n) for n in counts])
        ax.minorticks_off()
        ax.grid(alpha=0.25)
    for ax in axes[-1]:
        ax.set_xlabel("evaluations of the network")
    for row in axes:
        row[0].set_ylabel("error")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=2, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(OUT / "defaults.png", dpi=95)
    plt.close(figure)


def mean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def main(options: Options) -> str:
    jury = Judge(load(), steps=20 if options.quick else 600)
    lines: list[str] = []
    found: dict[str, Curves] = {}
    for kind in options.kinds.split(";")[: 1 if options.quick else None]:
        rows, ratios, found[kind] = table(Network(kind, options, jury), options)
        median, rmse, frechet = (list(column) for column in zip(*ratios, strict=True))
        lines += ["", f"{kind}{' (not looked at before the choice)' if kind in HELD_OUT else ''}:", "", *rows, ""]
        lines += [
            f"default / best, geometric mean and largest: median {mean(median):.2f}; {max(median):.2f}, "
            f"RMSE {mean(rmse):.2f}; {max(rmse):.2f}, Fréchet {mean(frechet):.2f}; {max(frechet):.2f}"
        ]
    picture(found)
    floor = f"floor of the Fréchet distance at {options.samples} samples: {jury.floor(options.samples)}"
    return write("defaults", [*lines, "", floor])


if __name__ == "__main__":
    small = {"samples": 4, "fine": 8}
    main(from_command_line(Options, __doc__.splitlines()[0], small))
