"""Problems with known flows: exact mixtures, and the same with the smooth error of a network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

import scoresde as ss
from scoresde.denoisers import Kind
from scoresde.plan import run
from scoresde.solvers.interpolants import VELOCITY
from scoresde.solvers.runge_kutta import RK4, RungeKutta

PROCESSES: dict[str, ss.SDE] = {
    "VP": ss.VP(),
    "EDM": ss.EDM(),
    "cosine": ss.Discrete(ss.processes.betas("cosine", 1000)),
    "scaled linear": ss.Discrete(ss.processes.betas("scaled_linear", 1000)),
}


def ring(sde: ss.SDE) -> ss.GaussianMixture:
    angle = torch.arange(8) * (math.pi / 4)
    return ss.GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), std=0.1)


def anisotropic(sde: ss.SDE) -> ss.GaussianMixture:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    means = 0.5 * make(10, 32)
    axes = torch.linalg.qr(make(10, 32, 32))[0]
    std = torch.linspace(math.log(0.03), math.log(0.5), 32, dtype=torch.float64).exp()
    return ss.GaussianMixture(sde, means, cov=(axes * std**2) @ axes.mT)


def low_rank(sde: ss.SDE) -> ss.GaussianMixture:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ss.GaussianMixture(sde, 0.5 * make(20, 192), factor=0.15 * make(20, 192, 8), std=0.03)


def few(sde: ss.SDE) -> ss.GaussianMixture:
    """Three modes in 6-D."""
    make = partial(torch.randn, generator=torch.Generator().manual_seed(21), dtype=torch.float64)
    return ss.GaussianMixture(sde, 0.9 * make(3, 6), std=0.15)


def tree(sde: ss.SDE) -> ss.GaussianMixture:
    """Four clusters of four modes in 16-D, in directions whose standard deviations fall by two orders of magnitude."""
    make = partial(torch.randn, generator=torch.Generator().manual_seed(22), dtype=torch.float64)
    std = torch.linspace(0, math.log(1e-2), 16, dtype=torch.float64).exp()
    means = 0.7 * make(4, 1, 16) * std**0.5 + 0.3 * make(4, 4, 16) * std**0.7
    return ss.GaussianMixture(sde, means.flatten(0, 1), std=(0.25 * std).expand(16, 16))


def lattice(sde: ss.SDE) -> ss.GaussianMixture:
    """Twenty-five modes on a square lattice in 2-D."""
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    return ss.GaussianMixture(sde, torch.cartesian_prod(axis, axis), std=0.06)


def steep(sde: ss.SDE) -> ss.GaussianMixture:
    """Eight Gaussians in 24-D whose spectrum falls by three orders of magnitude, as that of images."""
    make = partial(torch.randn, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    std = torch.arange(1, 25, dtype=torch.float64) ** -1.1
    return ss.GaussianMixture(sde, 0.8 * make(8, 24) * std, std=(0.6 * std).expand(8, 24))


def heavy_tails(sde: ss.SDE) -> ss.GaussianMixture:
    """Six Gaussians of different widths around nearly one centre, in 8-D."""
    make = partial(torch.randn, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return ss.GaussianMixture(sde, 0.05 * make(6, 8), std=torch.tensor([0.05, 0.1, 0.2, 0.4, 0.8, 1.6]))


PROBLEMS: dict[str, Callable[[ss.SDE], ss.GaussianMixture]] = {
    "ring 2-D": ring,
    "anisotropic 32-D": anisotropic,
    "low rank 192-D": low_rank,
}
FOR_EPS: dict[str, Callable[[ss.SDE], ss.GaussianMixture]] = {"few 6-D": few, "tree 16-D": tree}
HELD_OUT: dict[str, Callable[[ss.SDE], ss.GaussianMixture]] = {
    "lattice 2-D": lattice,
    "steep 24-D": steep,
    "heavy tails 8-D": heavy_tails,
}


class Network(ss.denoisers.AbstractDenoiser):
    """A mixture with the error of a network: a smooth random field in what the network predicts.

    Arguments:
        mixture: Exact denoiser.
        predicts: Prediction that has the error: ``"v"`` or ``"eps"``.
        size: Root mean square of the error.
        knows: Whether it knows the Gaussian of its data, as a model does that :class:`Trainer` trained.
    """

    def __init__(self, mixture: ss.GaussianMixture, predicts: str, size: float, knows: bool = True) -> None:
        super().__init__(mixture.sde)
        self.mixture, self.predicts, self.size, self.knows = mixture, predicts, size, knows
        self.event = mixture.event
        D = math.prod(mixture.event)
        make = partial(torch.randn, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        self.waves, self.rates, self.phases = make(D, D) / math.sqrt(D), make(D), 2 * math.pi * make(D)
        self.variance = float(mixture.covariance().diagonal().mean())

    @property
    def kind(self) -> Kind:
        return Kind(self.predicts, self.sde)

    @property
    def gaussian(self) -> ss.Gaussian | None:
        return self.mixture.gaussian if self.knows else None

    def under(self, sde: ss.SDE) -> Network:
        return Network(self.mixture.under(sde), self.predicts, self.size, self.knows)

    def x0(self, x: Tensor, t: float | Tensor, **cond: object) -> Tensor:
        a, s = (torch.as_tensor(f(t), dtype=torch.float64) for f in (self.sde.alpha, self.sde.sigma))
        scaled = x.double() / (a**2 * self.variance + s**2).sqrt()
        lam = (a.clamp_min(1e-12) / s.clamp_min(1e-12)).log()
        field = math.sqrt(2) * (scaled @ self.waves.T + lam * self.rates + self.phases).cos()
        root = (a**2 + s**2).sqrt()
        gain = s / root if self.predicts == "v" else s / a.clamp_min(1e-12)
        return self.mixture.x0(x, t) - (self.size * gain * field).to(x.dtype)


@dataclass(frozen=True)
class Case:
    """One problem.

    Arguments:
        data: Name of the mixture.
        process: Name of the process.
        network: Prediction with an error, ``"exact"``, ``"v"`` or ``"eps"``.
        percent: Size of the error in percent.
        half: ``"choose"``, or ``"held out"`` if nothing was chosen on it.
    """

    data: str
    process: str
    network: str
    percent: int
    half: str

    @property
    def name(self) -> str:
        error = "exact" if self.network == "exact" else f"{self.network} network, {self.percent} % error"
        return f"{self.data}, {self.process}, {error}"


ERRORS = [("exact", 0), ("v", 1), ("v", 5), ("eps", 1)]
HALVES = {
    "choose": [("ring 2-D", "VP"), ("anisotropic 32-D", "EDM"), ("low rank 192-D", "VP")],
    "held out": [("lattice 2-D", "VP"), ("steep 24-D", "cosine"), ("heavy tails 8-D", "EDM")],
}
CASES = [
    Case(data, process, network, percent, half)
    for half, pairs in HALVES.items()
    for data, process in pairs
    for network, percent in ERRORS
    if data != "low rank 192-D" or (network, percent) in (("exact", 0), ("v", 5))  # the others take too long
] + [
    Case(data, process, "eps", percent, "choose")
    for data, process in (("few 6-D", "scaled linear"), ("tree 16-D", "VP"))
    for percent in (0, 1, 5)
]


def model_of(case: Case) -> ss.GaussianMixture | Network:
    mixture = (PROBLEMS | FOR_EPS | HELD_OUT)[case.data](PROCESSES[case.process])
    return mixture if case.network == "exact" else Network(mixture, case.network, case.percent / 100)


def solved(model: ss.GaussianMixture | Network, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """Initial states and their ends, by the classical Runge–Kutta method in flow time, uniform in λ."""
    sde = model.sde
    mixture = model.mixture if isinstance(model, Network) else model
    std = float(mixture.covariance().diagonal().mean().sqrt())
    x = sde.prior(std=std).sample((points, *model.event), ss.Noise(seed), dtype=torch.float64)
    near = sde.t_of_lam(sde.lam(sde.t_min) + 4.0)
    fine = ss.grids.uniform_lam(sde, 400, t_end=near)
    return x, model.x0(run(RungeKutta(RK4, VELOCITY).plan(sde, fine), model.x0, x), near)


@cache
def problem(name: str, process: str, points: int, seed: int) -> tuple[ss.GaussianMixture, Tensor, Tensor]:
    """Exact denoiser, initial states and their ends."""
    model = PROBLEMS[name](PROCESSES[process])
    return (model, *solved(model, points, seed))
