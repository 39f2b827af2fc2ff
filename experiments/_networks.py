"""Small networks that the fit of universal tables differentiates through; each is trained in a minute and kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from _cases import fine, kept_network
from _problems import ring
from torch import Tensor

import scoresde as ss
from scoresde.solvers.universal import UniversalTable, unit_of


@dataclass(frozen=True)
class Recipe:
    """A network: its data, its process and its prediction.

    Arguments:
        data: ``"digits"``, 8 × 8, or ``"mnist"``, averaged to 14 × 14; vectors: ``"moons"``, ``"checkerboard"``, in
            2-D, ``"swiss roll"``, in 3-D, ``"components"``, 16 principal components of the digits, ``"tabular"``, 30
            standardised measurements of cells; or ``"ring"``, for tests.
        process: ``"VP"``, ``"cosine"``, ``"flow"`` or ``"scaled linear"``.
        predicts: Prediction.
        steps: Number of optimiser steps.
    """

    data: str
    process: str
    predicts: str
    steps: int = 700

    @property
    def name(self) -> str:
        return f"{self.data}-{self.process}-{self.predicts}-{self.steps}".replace(" ", "_")


RECIPES: Mapping[str, tuple[Recipe, ...]] = {
    "data": (
        Recipe("digits", "cosine", "v"),
        Recipe("mnist", "flow", "velocity"),
        Recipe("mnist", "VP", "v"),
        Recipe("moons", "flow", "velocity", 1500),
    ),
    "noise": (
        Recipe("digits", "VP", "eps"),
        Recipe("mnist", "scaled linear", "eps"),
        Recipe("mnist", "VP", "eps"),
        Recipe("moons", "VP", "eps", 1500),
    ),
}
"""Networks of the fits of each kind. None of them is among those that ``universal.py`` selects or judges on."""

FITTED_VECTORS = {kind: recipes[-1:] for kind, recipes in RECIPES.items()}
"""Networks of vectors of the fits to low-dimensional mixtures."""

SELECTED_VECTORS = (
    Recipe("swiss roll", "VP", "v", 1500),
    Recipe("tabular", "flow", "velocity", 1500),
    Recipe("swiss roll", "scaled linear", "eps", 1500),
    Recipe("tabular", "VP", "eps", 1500),
)
"""Networks of vectors for the choice among the seeds."""

HELD_OUT_VECTORS = (
    Recipe("checkerboard", "cosine", "v", 1500),
    Recipe("components", "flow", "velocity", 1500),
    Recipe("checkerboard", "VP", "eps", 1500),
    Recipe("components", "scaled linear", "eps", 1500),
)
"""Networks of vectors that no choice has seen."""


def process(name: str) -> ss.SDE:
    if name == "scaled linear":
        return ss.Discrete(ss.processes.betas("scaled_linear", 1000))
    return {"VP": ss.VP(), "cosine": ss.Cosine(), "flow": ss.Flow()}[name]


def moons() -> Tensor:
    from sklearn.datasets import make_moons

    x = torch.from_numpy(make_moons(20_000, noise=0.05, random_state=0)[0]).float()
    return (x - x.mean(0)) / x.std()


def swiss_roll() -> Tensor:
    from sklearn.datasets import make_swiss_roll

    x = torch.from_numpy(make_swiss_roll(20_000, noise=0.2, random_state=0)[0]).float()
    return (x - x.mean(0)) / x.std()


def tabular() -> Tensor:
    from sklearn.datasets import load_breast_cancer

    x = torch.from_numpy(load_breast_cancer().data).float()
    return (x - x.mean(0)) / x.std(0)


def checkerboard() -> Tensor:
    g = torch.Generator().manual_seed(0)
    corner = torch.randint(4, (20_000, 2), generator=g)
    corner[:, 1] = 2 * (corner[:, 1] // 2) + corner[:, 0] % 2
    return (corner + torch.rand(20_000, 2, generator=g)) / 2 - 1


def components() -> Tensor:
    from _digits import load

    x = load().images.flatten(1)
    x = x - x.mean(0)
    return x @ torch.linalg.eigh(x.mT @ x)[1][:, -16:]


VECTOR_DATA = {
    "moons": moons,
    "swiss roll": swiss_roll,
    "tabular": tabular,
    "checkerboard": checkerboard,
    "components": components,
}


def data_of(name: str) -> Tensor:
    if name == "ring":
        return ring(ss.VP()).sample(500, seed=0).float()
    if name in VECTOR_DATA:
        return VECTOR_DATA[name]()
    if name == "digits":
        from _digits import load

        return load().images
    from _mnist import load as load_mnist

    return torch.nn.functional.avg_pool2d(load_mnist().images, 2)


def trained(recipe: Recipe, out: Path) -> tuple[ss.Denoiser, Tensor]:
    """The network and its data; the weights are kept in a file."""
    data = data_of(recipe.data)
    event = data.shape[1:]
    if len(event) == 1:
        net: torch.nn.Module = ss.nn.MLP(event[0], hidden=64, seed=1)
    else:
        net = ss.nn.UNet(1, width=16, multipliers=(1, 2), blocks=1, attention=(1,), seed=1)
    model = ss.Denoiser(net, process(recipe.process), predicts=recipe.predicts)
    page, batch = out / f"network-{recipe.name}.pt", 256 if len(event) == 1 else 48
    return kept_network(model, data, page, steps=recipe.steps, batch=batch, seed=1), data


@dataclass(frozen=True)
class NetworkGroup:
    """Trajectories of a network, for :func:`scoresde.fitting.universal.descend`.

    Arguments:
        model: Denoiser.
        x: Initial states at T, (B, *event).
        end: Ends of their flow, (B, *event).
        unit: Unit of the levels.
        count: Number of problems that the network counts for.
    """

    model: ss.denoisers.AbstractDenoiser
    x: Tensor
    end: Tensor
    unit: float
    count: int = 1

    def __len__(self) -> int:
        return self.count

    def errors(self, table: UniversalTable) -> Tensor:
        """Error of each sample in units of the data, (count, B)."""
        sde = self.model.sde
        sigma, alpha = float(sde.sigma(sde.T)), float(sde.alpha(sde.T))
        first = torch.tensor(min(sigma / max(alpha, 1e-9), 1e6) / self.unit, dtype=torch.float64)
        low, high = float(sde.lam(sde.T)), float(sde.lam(sde.t_min))

        def denoise(y: Tensor, level: Tensor) -> Tensor:
            lam = (-(level * self.unit).log()).clamp(low, high)
            # the inverse of λ refuses its own ends by rounding
            t = sde.t_of_lam(lam.clamp(low + 1e-9, high - 1e-9))
            x = sde.alpha(t) * self.unit * y
            return self.model.x0(x.float(), t.float()).double() / self.unit

        z = self.x.double() / sigma
        result = table.run(denoise, first * z, first)
        e = (result - self.end.double() / self.unit).flatten(1).square().mean(1)
        return (e + 1e-30).sqrt()[None].expand(self.count, -1)


def network_groups(recipes: Sequence[Recipe], n: int, seed: int, out: Path, count: int) -> Iterator[NetworkGroup]:
    """Trajectories of networks; their fine solves are kept in files.

    Arguments:
        recipes: Networks.
        n: Number of trajectories of each network.
        seed: Seed of the initial states.
        out: Folder.
        count: Number of problems that a network counts for.
    """
    for recipe in recipes:
        model, data = trained(recipe, out)
        sde = model.sde
        many = 4 * n if data.ndim == 2 else n
        x = ss.Noise(seed).normal((many, *data.shape[1:]), 0, dtype=torch.float32) * float(sde.sigma(sde.T))
        page = out / f"ends-{recipe.name}-{seed}-{many}.pt"
        if not page.exists():
            torch.save(fine(model, x, 100 if recipe.steps > 10 else 10), page)
        spectrum = ss.Gaussian.estimate(sde, data).spectrum
        yield NetworkGroup(model, x, torch.load(page), unit_of(spectrum), count)
