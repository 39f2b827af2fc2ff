"""The default on networks of vectors: small networks of points, of tables and of digits, beside all other samplers.

    python experiments/vectors.py            # a quarter of an hour on one core; a second run reads the weights
    python experiments/vectors.py --quick    # seconds, for CI

Sixteen multilayer perceptrons are trained on sets in the plane, on two tables of scikit-learn and on its digits in 32
principal components, on several processes, for v, x₀, the velocity and ε. The defaults of vectors were chosen on the
first nine of them and on the first half of the mixtures of ``_problems.py``; nothing was chosen on the other seven. In
each case the error is the distance per number to a fine solve of the same network, which ends with the data prediction
at the smallest time of the process, and the frontier is the smallest error of all deterministic solvers of this library
on four grids, those of ``work_precision.py``, in hindsight.

The script prints the geometric mean and the largest ratio to the frontier: of the default; of the default of images on
the same network; and of the best single solver and grid of all, in hindsight for each table and number of evaluations.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _cases import kept_network
from torch import Tensor
from work_precision import error, our_solvers, planned, shown_grids

import scoresde as ss
from scoresde.plan import run
from scoresde.solvers.interpolants import VELOCITY
from scoresde.solvers.runge_kutta import RK4, RungeKutta

sys.path.append(str(Path(__file__).parent / "interop"))
from _judging import from_command_line

NFES = (3, 4, 5, 6, 8, 10, 12, 15, 20, 50)
OUT = Path(__file__).parent / "out" / "vectors"
Recipe = tuple[str, str, str]  # data, process, prediction
CHOSEN: tuple[Recipe, ...] = (
    ("moons", "VP", "v"),
    ("checkerboard", "Flow", "velocity"),
    ("digits", "cosine", "x0"),
    ("wine", "VP", "v"),
    ("moons", "VP", "eps"),
    ("checkerboard", "scaled linear", "eps"),
    ("digits", "linear", "eps"),
    ("spiral", "EDM", "eps"),
    ("spiral", "EDM", "x0"),
)
HELD_OUT: tuple[Recipe, ...] = (
    ("pinwheel", "VP", "v"),
    ("circles", "Flow", "velocity"),
    ("tumours", "cosine", "v"),
    ("circles", "VP", "x0"),
    ("pinwheel", "linear", "eps"),
    ("tumours", "VP", "eps"),
    ("circles", "scaled linear", "eps"),
)


@dataclass
class Options:
    """Options of the command line."""

    points: int = 128
    steps: int = 2000
    quick: bool = False


def data_of(name: str) -> Tensor:
    """Data with mean 0 and standard deviation 1 in each coordinate; the components of digits have one scale."""
    import sklearn.datasets as sets

    g = torch.Generator().manual_seed(0)
    if name == "checkerboard":
        x = 4 * torch.rand(40_000, 2, generator=g)
        x = x[x.floor().sum(1) % 2 == 0]
    elif name == "pinwheel":
        arm = torch.randint(0, 5, (20_000,), generator=g)
        r = torch.randn(20_000, 2, generator=g) * torch.tensor([0.3, 0.05]) + torch.tensor([1.0, 0.0])
        angle = 2 * math.pi / 5 * arm + 0.25 * r[:, 0].exp()
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        x = torch.einsum("nij,nj->ni", turn, r)
    elif name == "digits":
        x = torch.from_numpy(sets.load_digits().data).float()
        x = x - x.mean(0)
        x = x @ torch.linalg.svd(x, full_matrices=False).Vh[:32].T
        return x / x.std()
    else:
        x = torch.from_numpy(
            {
                "moons": lambda: sets.make_moons(20_000, noise=0.05, random_state=0)[0],
                "circles": lambda: sets.make_circles(20_000, noise=0.03, factor=0.5, random_state=0)[0],
                "spiral": lambda: sets.make_swiss_roll(20_000, noise=0.3, random_state=0)[0][:, [0, 2]],
                "wine": lambda: sets.load_wine().data,
                "tumours": lambda: sets.load_breast_cancer().data,
            }[name]()
        ).float()
    return (x - x.mean(0)) / x.std(0)


def process(name: str) -> ss.SDE:
    if name in ("linear", "scaled linear"):
        return ss.Discrete(ss.processes.betas(name.replace(" ", "_"), 1000))
    return {"VP": ss.VP(), "Flow": ss.Flow(), "cosine": ss.Cosine(), "EDM": ss.EDM()}[name]


def trained(recipe: Recipe, steps: int) -> ss.Denoiser:
    """The network of a recipe; it does not know the Gaussian of its data."""
    name, place, predicts = recipe
    data = data_of(name)
    model = ss.Denoiser(ss.nn.MLP(data.shape[1], hidden=128, seed=1), process(place), predicts=predicts)
    page = OUT / f"{'-'.join(recipe).replace(' ', '_')}-{steps}.pt"
    return kept_network(model, data, page, steps=steps, batch=256, seed=0)


def fine(model: ss.Denoiser, x: Tensor, steps: int) -> Tensor:
    """Ends by the classical Runge–Kutta method in flow time, uniform in λ, and the data prediction at t_min."""
    sde = model.sde

    def x0(x: Tensor, t: float | Tensor) -> Tensor:
        return model.x0(x.float(), t).double()

    grid = ss.grids.uniform_lam(sde, steps, t_end=sde.t_min)
    return x0(run(RungeKutta(RK4, VELOCITY).plan(sde, grid), x0, x.double()), sde.t_min)


def of_images(model: ss.Denoiser, x: Tensor, n: int) -> tuple[Tensor, int]:
    """The default of images."""
    choice = ss.sampling.recommend(n, model, event=(1, 8, 8))
    solution = ss.solve(model, x, choice.solver, grid=choice.grid, nfe=n)
    return solution.x, solution.nfe


def samplers(quick: bool) -> Iterator[Any]:
    yield "default", "", "", lambda model, x, n: (ss.sample(model, x, nfe=n), n)
    yield "images", "", "", of_images
    for word, solver in our_solvers(quick).items():
        for grid, maker in shown_grids(quick).items():
            yield "ours", word, grid, partial(planned, solver, maker)


Errors = dict[tuple[str, str, str, int], tuple[float, float]]


def judged(recipe: Recipe, options: Options) -> Errors:
    """Median and root mean square of the error of every sampler at every number of evaluations; kept in a file."""
    page = OUT / f"errors-{'-'.join(recipe).replace(' ', '_')}-{options.steps}-{options.points}.pt"
    model = trained(recipe, options.steps)
    x = ss.Noise(7).normal((options.points, model.net.features), 0, dtype=torch.float32) * float(
        model.sde.sigma(model.sde.T)
    )
    kept: Errors = torch.load(page) if page.exists() else {}
    started, truth = time.monotonic(), fine(model, x, 40 if options.quick else 400)
    for who, word, grid, sampler in samplers(options.quick):
        for n in NFES[1:3] if options.quick else NFES:
            if who in ("default", "images") or (who, word, grid, n) not in kept:
                found = sampler(model, x, n)
                ends = found is not None and found[1] <= n and bool(found[0].isfinite().all())
                kept[who, word, grid, n] = error(found[0], truth) if ends else (math.inf, math.inf)
    if not options.quick:
        torch.save(kept, page)
    print(f"{', '.join(recipe)}: {time.monotonic() - started:.0f} s", flush=True)
    return kept


def cell(ratios: Sequence[float]) -> str:
    return f"{math.exp(statistics.fmean(map(math.log, ratios))):.2f}; {max(ratios):.2f}"


def ratios(found: Sequence[Errors], who: str, n: int, i: int) -> list[float]:
    """Errors over the frontier of each network, of a default or of the best single sampler; i = 1 is the RMSE."""
    own = ("default", "images")
    others = [{key: v for key, v in errors.items() if key[3] == n and key[0] not in own} for errors in found]
    frontier = [min(v[i] for v in errors.values()) for errors in others]
    if who in own:
        return [errors[who, "", "", n][i] / f for errors, f in zip(found, frontier, strict=True)]
    shared = [key for key in others[0] if all(math.isfinite(errors.get(key, (math.inf,))[0]) for errors in others)]
    every = [[errors[key][i] / f for errors, f in zip(others, frontier, strict=True)] for key in shared]
    return min(every, key=lambda each: sum(map(math.log, each)))


def table(title: str, found: Sequence[Errors]) -> list[str]:
    """Ratios to the frontier over some networks."""
    nfes = sorted({key[3] for key in found[0]})
    lines = [f"### {title}", "", "| sampler | error | " + " | ".join(map(str, nfes)) + " |"]
    lines.append("|:--|:--|" + "--:|" * len(nfes))
    for who in ("default", "images", "best single"):
        for i, measure in enumerate(("median", "RMSE")):
            cells = [cell(ratios(found, who, n, i)) for n in nfes]
            name = {"images": "default of images"}.get(who, who)
            lines.append(f"| {name} | {measure} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def main(options: Options) -> str:
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    groups = {
        "Chosen on: x₀, v, velocity": [r for r in CHOSEN if r[2] != "eps"],
        "Chosen on: ε": [r for r in CHOSEN if r[2] == "eps"],
        "Held out: x₀, v, velocity": [r for r in HELD_OUT if r[2] != "eps"],
        "Held out: ε": [r for r in HELD_OUT if r[2] == "eps"],
    }
    with torch.no_grad():
        for title, recipes in groups.items():
            some = recipes[:1] if options.quick else recipes
            with torch.enable_grad():
                for recipe in some:
                    trained(recipe, options.steps)
            lines += table(title, [judged(recipe, options) for recipe in some])
            if options.quick and len(lines) > 15:
                break
    text = "\n".join(lines)
    if not options.quick:
        (OUT.parent / "vectors.md").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    main(from_command_line(Options, __doc__.splitlines()[0], {"points": 8, "steps": 10}))
