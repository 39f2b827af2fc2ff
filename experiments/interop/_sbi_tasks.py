"""Four tasks of the benchmark sbibm: priors, simulators and exact posteriors, written from the paper's appendix.

The observations and the reference posteriors come from the package sbibm if it is installed; only its files are read.

References:
    | Benchmarking Simulation-Based Inference (Lueckmann et al., 2021), arXiv:2101.04653, appendix T
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor
from torch.distributions import Distribution, Independent, Normal, Uniform


@dataclass(frozen=True)
class Task:
    """A prior, a simulator and its posterior.

    Arguments:
        name: Name in the package.
        prior: Prior of θ, a distribution of torch, batch shape (), event shape (D,).
        simulate: Function of parameters (N, D) and a generator that returns observations (N, E).
        posterior: Function of an observation (E,), a number N and a generator that returns exact samples (N, D).
    """

    name: str
    prior: Distribution
    simulate: Callable[[Tensor, Generator], Tensor]
    posterior: Callable[[Tensor, int, Generator], Tensor]

    def parameters(self, n: int, generator: Generator) -> Tensor:
        """Samples of the prior, (N, D)."""
        base = self.prior.base_dist  # type: ignore[attr-defined]
        if isinstance(base, Uniform):
            return base.low + (base.high - base.low) * torch.rand(n, *self.prior.event_shape, generator=generator)
        return base.loc + base.scale * torch.randn(n, *self.prior.event_shape, generator=generator)

    def inside(self, theta: Tensor) -> Tensor:
        """Whether parameters (N, D) are in the support of the prior, (N,)."""
        return self.prior.support.check(theta)

    def simulations(self, n: int, seed: int) -> tuple[Tensor, Tensor]:
        """Parameters from the prior and their observations; the first rows do not depend on `n`."""
        generators = [torch.Generator().manual_seed(2 * seed + k) for k in (0, 1)]
        theta = self.parameters(100_000, generators[0])
        return theta[:n], self.simulate(theta, generators[1])[:n]


def box(low: float, high: float, dimension: int) -> Distribution:
    """A uniform prior."""
    return Independent(Uniform(torch.full((dimension,), low), torch.full((dimension,), high), validate_args=False), 1)


def rejected(draw: Callable[[], Tensor], n: int) -> Tensor:
    """Batches of draws, until there are `n` rows."""
    kept: list[Tensor] = []
    while sum(map(len, kept)) < n:
        kept.append(draw())
    return torch.cat(kept)[:n]


# Two moons: a crescent that the parameters move. x - crescent determines θ up to a sign.


def crescent(n: int, generator: Generator) -> Tensor:
    """Noise of the simulator, (N, 2)."""
    angle = (torch.rand(n, generator=generator) - 0.5) * math.pi
    radius = 0.1 + 0.01 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], 1)


def two_moons(theta: Tensor, generator: Generator) -> Tensor:
    """Observations of parameters, (N, 2)."""
    move = torch.stack([-(theta[:, 0] + theta[:, 1]).abs(), theta[:, 1] - theta[:, 0]], 1) / math.sqrt(2)
    return crescent(len(theta), generator) + move


def two_moons_posterior(x_o: Tensor, n: int, generator: Generator) -> Tensor:
    """Exact samples of θ given an observation, (N, 2)."""

    def draw() -> Tensor:
        p = crescent(4 * n, generator)
        u = (p[:, 0] - x_o[0]) * torch.where(torch.rand(len(p), generator=generator) < 0.5, 1.0, -1.0)
        v = x_o[1] - p[:, 1]
        theta = torch.stack([u - v, u + v], 1) / math.sqrt(2)
        return theta[(p[:, 0] >= x_o[0]) & (theta.abs() <= 1).all(1)]

    return rejected(draw, n)


# SLCP: four points of a normal distribution in the plane, whose mean and covariance are the parameters.


def slcp(theta: Tensor, generator: Generator) -> Tensor:
    """Observations of parameters, (N, 8)."""
    scale = theta[:, 2:4].square()
    rho = theta[:, 4].tanh()
    z = torch.randn(len(theta), 4, 2, generator=generator)
    second = rho[:, None] * z[..., 0] + (1 - rho.square()).sqrt()[:, None] * z[..., 1]
    noise = torch.stack([z[..., 0], second], 2) * scale[:, None]
    return (theta[:, None, :2] + noise).flatten(1)


def slcp_posterior(x_o: Tensor, n: int, generator: Generator, draws: int = 4_000_000) -> Tensor:
    """Samples of θ given an observation, (N, 5), by importance resampling in three dimensions.

    The covariance S is drawn from the prior and weighted by the likelihood, with the mean integrated over the plane:
    |S|^(-3/2) exp(-tr(S⁻¹C)/2), where C is the scatter of the four points. Then the mean is N(mean of the points, S/4),
    and what is outside of the prior is drawn again, which corrects the weight.
    """
    points = x_o.reshape(4, 2).double()
    centre = points.mean(0)
    scatter = (points - centre).mT @ (points - centre)
    raw = 6 * torch.rand(draws, 3, generator=generator, dtype=torch.float64) - 3
    first, second, rho = raw[:, 0].square(), raw[:, 1].square(), raw[:, 2].tanh()
    rest = 1 - rho.square()
    quadratic = scatter[0, 0] / first**2 + scatter[1, 1] / second**2 - 2 * rho * scatter[0, 1] / (first * second)
    log_weight = -3 * (first * second).log() - 1.5 * rest.log() - 0.5 * quadratic / rest
    edges = (log_weight - log_weight.max()).exp().cumsum(0)

    def draw() -> Tensor:
        u = torch.rand(4 * n, generator=generator, dtype=torch.float64) * edges[-1]
        row = torch.searchsorted(edges, u).clamp_max(draws - 1)
        z = torch.randn(len(row), 2, generator=generator, dtype=torch.float64)
        other = rho[row] * z[:, 0] + rest[row].sqrt() * z[:, 1]
        mean = centre + torch.stack([first[row] * z[:, 0], second[row] * other], 1) / 2
        inside = (mean.abs() <= 3).all(1)
        return torch.cat([mean, raw[row]], 1)[inside].float()

    return rejected(draw, n)


# Gaussians with a Gaussian prior, and a mixture of a wide and a narrow one with a uniform prior.


def gaussian_linear(theta: Tensor, generator: Generator) -> Tensor:
    """Observations of parameters, (N, 10), with variance 0.1."""
    return theta + math.sqrt(0.1) * torch.randn(theta.shape, generator=generator)


def gaussian_linear_posterior(x_o: Tensor, n: int, generator: Generator) -> Tensor:
    """Exact samples of θ given an observation, N(x/2, 0.05 I)."""
    return x_o / 2 + math.sqrt(0.05) * torch.randn(n, len(x_o), generator=generator)


def gaussian_mixture(theta: Tensor, generator: Generator) -> Tensor:
    """Observations of parameters, (N, 2), with standard deviation 1 or 0.1."""
    wide = torch.rand(len(theta), 1, generator=generator) < 0.5
    return theta + torch.where(wide, 1.0, 0.1) * torch.randn(theta.shape, generator=generator)


def gaussian_mixture_posterior(x_o: Tensor, n: int, generator: Generator) -> Tensor:
    """Exact samples of θ given an observation, (N, 2)."""

    def draw() -> Tensor:
        theta = gaussian_mixture(x_o.expand(2 * n, 2), generator)
        return theta[(theta.abs() <= 10).all(1)]

    return rejected(draw, n)


TASKS = (
    Task("two_moons", box(-1.0, 1.0, 2), two_moons, two_moons_posterior),
    Task("slcp", box(-3.0, 3.0, 5), slcp, slcp_posterior),
    Task(
        "gaussian_linear",
        Independent(Normal(torch.zeros(10), math.sqrt(0.1), validate_args=False), 1),
        gaussian_linear,
        gaussian_linear_posterior,
    ),
    Task("gaussian_mixture", box(-10.0, 10.0, 2), gaussian_mixture, gaussian_mixture_posterior),
)


def installed() -> bool:
    """Whether the files of the package are there."""
    return find_spec("sbibm") is not None


def observations(task: Task, count: int) -> list[tuple[Tensor, Tensor | None]]:
    """The first observations (E,), with 10,000 reference samples each; our own and None without the package.

    Arguments:
        task: Task.
        count: Number of observations, at most ten.
    """
    found = find_spec("sbibm")
    if found is None or found.origin is None:
        generator = torch.Generator().manual_seed(77)
        x = task.simulate(task.parameters(count, generator), generator)
        return [(row, None) for row in x]
    folder = Path(found.origin).parent / "tasks" / task.name / "files"
    pairs: list[tuple[Tensor, Tensor | None]] = []
    for k in range(1, count + 1):
        one = folder / f"num_observation_{k}"
        x_o, theta = (
            torch.from_numpy(np.loadtxt(one / name, delimiter=",", skiprows=1, dtype=np.float32))
            for name in ("observation.csv", "reference_posterior_samples.csv.bz2")
        )
        pairs.append((x_o, theta))
    return pairs
