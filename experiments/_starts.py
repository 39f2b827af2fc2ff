"""A Gaussian start for ε-networks: the flow of a Gaussian takes the place of the first evaluations."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import scoresde as ss
from scoresde.solvers.universal import unit_of

sys.path.append(str(Path(__file__).parent / "interop"))

NETWORKS = ("epsilon, linear", "epsilon, scaled linear", "epsilon, sigmoid")
LEVELS = (20.0, 8.0, 3.0)  # noise levels of the start, in units of the data
FINE = 40


def starts(nfes: tuple[int, ...] = (5, 8), n: int = 64) -> Iterator[list[str]]:
    """Rows of a table: distances to fine solves of the same network, and Fréchet distance to held-out digits.

    All samples begin from the same noise. The flow of the data's Gaussian leads to the level of the start, from which
    the default continues. With `mean alone` the covariance of the Gaussian is one variance for all pixels.

    Arguments:
        nfes: Numbers of evaluations.
        n: Number of samples.
    """
    from _mnist import Judge, load
    from _trained import Recipe, diffusers_network, scheduler

    data = load()
    judge = Judge(data)
    yield ["held-out digits", "", "", "", "", f"{judge.floor(n).value:.3g}"]
    for name in NETWORKS:
        model = ss.interop.from_diffusers(diffusers_network(name, Recipe()), scheduler(name)).requires_grad_(False)
        sde = model.sde
        x = ss.Noise(11).normal((n, *data.images.shape[1:]), 0, dtype=torch.float32) * float(sde.sigma(sde.T))
        gaussian = ss.Gaussian.estimate(sde, data.images)
        unit = unit_of(gaussian.spectrum)
        white = ss.Gaussian(sde, gaussian.mean, torch.full_like(gaussian.mean, float(gaussian.spectrum.mean())))
        begins = {"T": (None, None)} | {
            label: (float(sde.t_of_lam(-math.log(level * unit))), start)
            for label, level, start in [
                *((f"{level:g}", level, gaussian) for level in LEVELS),
                ("8, mean alone", 8.0, white),
            ]
            if -math.log(level * unit) > sde.lam(sde.T)
        }
        fine_of_T: Tensor | None = None
        for label, (t, start) in begins.items():
            fine = ss.sample(model, x, nfe=FINE, t_start=t, start=start)
            fine_of_T = fine if fine_of_T is None else fine_of_T
            for nfe in (*nfes, FINE):
                y = fine if nfe == FINE else ss.sample(model, x, nfe=nfe, t_start=t, start=start)
                errors = [median(y, end) for end in (fine_of_T, fine)]
                yield [name, label, str(nfe), *(f"{e:.3g}" for e in errors), f"{judge.frechet(y.double()):.4g}"]


def median(x: Tensor, end: Tensor) -> float:
    """Median over the samples of the root mean square distance for each entry."""
    return float((x - end).flatten(1).double().square().mean(1).sqrt().median())
