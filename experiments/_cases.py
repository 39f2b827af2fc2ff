"""Problems to select and to judge universal tables on: trained networks and exact mixtures, with fine solves."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from _problems import CASES, PROBLEMS, PROCESSES, Network, model_of, solved
from torch import Tensor

import scoresde as ss

sys.path.append(str(Path(__file__).parent / "interop"))

SELECTION = ("epsilon, linear", "v, cosine", "velocity, flow", "digits")
HELD_OUT = ("epsilon, scaled linear", "epsilon, sigmoid", "velocity, shifted flow", "x0, cosine")
EXACT = ("ring 2-D", "anisotropic 32-D", "low rank 192-D")
HELD_OUT_EXACT = tuple(case.name for case in CASES if case.half == "held out" and case.network == "exact")
HELD_OUT_ERRORS = tuple(case.name for case in CASES if case.half == "held out" and case.network != "exact")


@dataclass(frozen=True)
class Case:
    """A model with initial states at T and the ends of their trajectories.

    Arguments:
        name: Name.
        model: Denoiser.
        x: Initial states, (B, *event).
        end: Ends of a fine solve, (B, *event).
        gaussian: Gaussian of the data.
    """

    name: str
    model: ss.denoisers.AbstractDenoiser
    x: Tensor
    end: Tensor
    gaussian: ss.Gaussian

    def error(self, solver: ss.solvers.Solver | ss.Plan, *, start: ss.Gaussian | None = None, **how: object) -> float:
        """Root mean square distance to the fine solve for each sample, per entry; its median over the samples."""
        return self.errors(solver, start=start, **how)[0]

    def errors(
        self, solver: ss.solvers.Solver | ss.Plan | None, *, start: ss.Gaussian | None = None, **how: object
    ) -> tuple[float, float]:
        """Median over the samples of the distance to the fine solve, and its root mean square, per entry."""
        x = ss.sample(self.model, self.x, solver, start=start, **how)  # type: ignore[arg-type]
        e = (x - self.end).flatten(1).double().square().mean(1).sqrt()
        return float(e.median()), float(e.square().mean().sqrt())


def fine(model: ss.denoisers.AbstractDenoiser, x: Tensor, nfe: int = 150) -> Tensor:
    """Ends of trajectories by a fine solve."""
    return ss.sample(model, x, ss.VelocityAB(3), grid=ss.grids.power_t(model.sde, nfe, 2.0))


def network(name: str, out: Path, n: int) -> Case:
    """A network that diffusers trained on MNIST; the fine solve is kept in a file."""
    from _mnist import load
    from _trained import Recipe, diffusers_network, scheduler

    model = ss.interop.from_diffusers(diffusers_network(name, Recipe()), scheduler(name))
    model.requires_grad_(False)
    x = ss.Noise(11).normal((n, 1, 28, 28), 0, dtype=torch.float32) * model.sde.sigma(model.sde.T)
    return kept(name, model, x, ss.Gaussian.estimate(model.sde, load().images), out)


def kept_network(
    model: ss.Denoiser,
    data: Tensor,
    page: Path,
    *,
    steps: int,
    batch: int,
    seed: int,
    labels: Tensor | None = None,
    null: int = 10,
) -> ss.Denoiser:
    """The model, trained by score matching; its weights are kept in a file.

    Arguments:
        model: Denoiser with its first weights.
        data: Data, (N, *event).
        page: File of the weights.
        steps: Number of optimiser steps.
        batch: Number of samples of a step.
        seed: Seed of the batches.
        labels: Labels of the data, (N,), for a network with classes; a tenth of them is dropped.
        null: Label of no class.
    """
    if page.exists():
        model.load_state_dict(torch.load(page))
    else:
        g = torch.Generator().manual_seed(seed)
        drop = {} if labels is None else {"drop": 0.1, "null": {"label": null}}
        loss, optimiser = ss.DSM(model, **drop), torch.optim.Adam(model.parameters(), 2e-3)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
        for _ in range(steps):
            optimiser.zero_grad()
            index = torch.randint(len(data), (batch,), generator=g)
            cond = {} if labels is None else {"label": labels[index]}
            loss(data[index], **cond).backward()
            optimiser.step()
            decay.step()
        page.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), page)
    return model.eval().requires_grad_(False)


def digits_network(out: Path, steps: int = 1200) -> ss.Denoiser:
    """A v network of 8 × 8 digits; its weights are kept in a file."""
    from _digits import load, small_unet

    model = ss.Denoiser(small_unet(), ss.VP(), predicts="v")
    return kept_network(model, load().images, out / f"digits-{steps}.pt", steps=steps, batch=64, seed=0)


def digits(out: Path, n: int, steps: int = 1200) -> Case:
    """A v network of 8 × 8 digits; its fine solve is kept in a file too."""
    from _digits import load

    model = digits_network(out, steps)
    x = ss.Noise(12).normal((n, 1, 8, 8), 0, dtype=torch.float32)
    return kept("digits", model, x, ss.Gaussian.estimate(model.sde, load().images), out)


def exact(name: str, n: int, out: Path) -> Case:
    """An exact mixture of ``work_precision.py`` under VP."""
    model = PROBLEMS[name](PROCESSES["VP"])
    x, end = solved_once(name, model, n, 3, out)
    gaussian = model.gaussian
    assert gaussian is not None
    return Case(name, model, x, end, gaussian)


def known(name: str, n: int, out: Path) -> Case:
    """An exact mixture of ``_problems.py``, with the error of a network or without, that nothing was chosen on."""
    model = model_of(next(case for case in CASES if case.name == name))
    x, end = solved_once(name, model, n, 5, out)
    mixture = model if isinstance(model, ss.GaussianMixture) else model.mixture
    assert mixture.gaussian is not None
    return Case(name, model, x, end, mixture.gaussian)


def solved_once(name: str, model: ss.GaussianMixture | Network, n: int, seed: int, out: Path) -> tuple[Tensor, Tensor]:
    """Initial states and their ends, kept in a file."""
    page = out / f"solved-{name.replace(', ', '-').replace(' ', '_').replace('%', 'percent')}-{n}-{seed}.pt"
    if not page.exists():
        page.parent.mkdir(parents=True, exist_ok=True)
        torch.save(solved(model, n, seed), page)
    x, end = torch.load(page)
    return x, end


def vector_network(recipe_name: str, out: Path, n: int) -> Case:
    """A network of vectors of ``_networks.py``."""
    from _networks import HELD_OUT_VECTORS, SELECTED_VECTORS, trained

    recipe = next(r for r in SELECTED_VECTORS + HELD_OUT_VECTORS if r.name == recipe_name)
    model, data = trained(recipe, out)
    x = ss.Noise(13).normal((n, data.shape[1]), 0, dtype=torch.float32) * float(model.sde.sigma(model.sde.T))
    return kept(recipe_name, model, x, ss.Gaussian.estimate(model.sde, data), out)


def kept(name: str, model: ss.denoisers.AbstractDenoiser, x: Tensor, gaussian: ss.Gaussian, out: Path) -> Case:
    page = out / f"ends-{name.replace(', ', '-').replace(' ', '_')}-{len(x)}.pt"
    if page.exists():
        end = torch.load(page)
    else:
        end = fine(model, x)
        torch.save(end, page)
    return Case(name, model, x, end, gaussian)


def cases(names: tuple[str, ...], out: Path, n: int = 24) -> Iterator[Case]:
    """Cases by their names."""
    for name in names:
        if name in EXACT:
            yield exact(name, 4 * n, out)
        elif name in HELD_OUT_EXACT + HELD_OUT_ERRORS:
            yield known(name, 4 * n, out)
        elif "-" in name:
            yield vector_network(name, out, 4 * n)
        else:
            yield digits(out, n) if name == "digits" else network(name, out, n)
