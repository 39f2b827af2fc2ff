"""Random exact mixtures of many kinds, with errors like those of networks: the problems of ``universal.py``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde.fitting.mixtures import Bends, Mixtures, Problems, Waves, from_spectrum, merge, stack
from scoresde.solvers.universal import unit_of

F64 = torch.float64
FIRST = (24.0, 80.0, 152.0, 300.0, 2e4)  # σ/α at T, in units of the data: of scaled linear β, EDM, linear β, cosine β


def log_uniform(g: torch.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Numbers whose logarithm is uniform."""
    return (math.log(low) + math.log(high / low) * torch.rand(*shape, generator=g, dtype=F64)).exp()


def random_weights(g: torch.Generator, p: int, k: int) -> Tensor:
    a = log_uniform(g, 0.1, 1.0, p, k)
    return a / a.sum(1, keepdim=True)


def clusters(g: torch.Generator, p: int, k: int, d: int, low: float = 0.03, high: float = 0.9) -> Mixtures:
    """Clusters of unequal widths in every direction."""
    means = log_uniform(g, 0.3, 1.2, p, 1, 1) * torch.randn(p, k, d, generator=g, dtype=F64)
    narrow = log_uniform(g, low, 0.3, p, 1, 1)
    wide = torch.maximum(log_uniform(g, 0.1, high, p, 1, 1), 1.5 * narrow)
    std = narrow * (wide / narrow) ** torch.rand(p, k, d, generator=g, dtype=F64)
    return Mixtures(random_weights(g, p, k), means, std.square())


def sheet(g: torch.Generator, p: int, k: int, d: int, latent: int) -> Mixtures:
    """Many small components on a curved sheet of few dimensions."""
    z = torch.randn(p, k, latent, generator=g, dtype=F64)
    a, b = torch.randn(2, p, latent, d, generator=g, dtype=F64)
    means = torch.sin(z @ a + 0.5 * torch.randn(p, 1, d, generator=g, dtype=F64)) + 0.5 * z @ b / latent**0.5
    return Mixtures(random_weights(g, p, k), means, (log_uniform(g, 0.02, 0.25, p, 1, 1) ** 2).expand(p, k, d))


def heavy(g: torch.Generator, p: int, k: int, d: int) -> Mixtures:
    """One centre and several scales: heavy tails."""
    scale = (0.8 * torch.randn(p, k, 1, generator=g, dtype=F64)).exp()
    means = 0.1 * torch.rand(p, 1, 1, generator=g, dtype=F64) * torch.randn(p, k, d, generator=g, dtype=F64)
    return Mixtures(random_weights(g, p, k), means, scale.square().expand(p, k, d))


def few(g: torch.Generator, p: int, k: int, d: int) -> Mixtures:
    """Few separate components of one width."""
    means = torch.randn(p, k, d, generator=g, dtype=F64)
    return Mixtures(random_weights(g, p, k), means, (log_uniform(g, 0.04, 0.4, p, 1, 1) ** 2).expand(p, k, d))


def tree(g: torch.Generator, p: int, branches: int, depth: int, spectrum: Tensor) -> Mixtures:
    """Components that branch again and again: the leaves of a tree whose splits become finer."""
    problems = []
    for _ in range(p):
        means = torch.zeros(1, len(spectrum), dtype=F64)
        finer = float(0.35 + 0.4 * torch.rand(1, generator=g))
        for level in range(depth):
            # finer splits reach directions of smaller variance
            tilt = (spectrum / spectrum.max()) ** (0.5 * (1 - level / depth))
            step = (spectrum * tilt).sqrt() * finer**level
            split = torch.randn(len(means), branches, len(spectrum), generator=g, dtype=F64) * step
            means = (means[:, None] + split).flatten(0, 1)
        inside = spectrum * float(log_uniform(g, 0.002, 0.1, 1))
        k = len(means)
        weights = torch.full((1, k), 1 / k, dtype=F64)
        problems.append(Mixtures(weights, means[None], inside.expand(1, k, -1).contiguous()))
    return stack(problems)


def image_spectrum(n: int, power: float, floor: float = 1e-3, channels: int = 1) -> Tensor:
    """Variances 1/f^power of n × n images in the basis of cosines, with mean 1."""
    i = torch.arange(n, dtype=F64)
    f2 = (i[:, None] ** 2 + i**2).flatten()
    c = (0.3 + f2) ** (-power / 2)
    c = torch.cat([c * 0.3**k for k in range(channels)])
    c = c / c.mean() + floor
    return c / c.mean()


def log_spread(d: int, ratio: float) -> Tensor:
    """Variances whose logarithms are even, with mean 1."""
    c = torch.linspace(0, math.log(ratio), d, dtype=F64).exp()
    return c / c.mean()


def standardised(m: Mixtures) -> Mixtures:
    """Each problem with mean 0 and with the unit of levels of its spectrum, :func:`unit_of`, equal to 1."""
    m = m.centred()
    # the covariances of the large ones are nearly diagonal
    spectra = torch.linalg.eigvalsh(m.covariance()) if m.means.shape[-1] <= 64 else m.variance()
    return m.scaled(torch.tensor([1 / unit_of(c) for c in spectra], dtype=F64))


def mixtures(seed: int, largest: int = 4096) -> list[Mixtures]:
    """Exact mixtures of all kinds, each standardised.

    Arguments:
        seed: Seed.
        largest: Largest number of dimensions.
    """
    g = torch.Generator().manual_seed(seed)
    steep = [image_spectrum(8, float(a)) for a in 2 + 2 * torch.rand(2, generator=g, dtype=F64)]
    found = [
        *(from_spectrum(c, 2, 3, seed + i) for i, c in enumerate(steep)),
        tree(g, 2, 3, 2, steep[1]),
        from_spectrum(log_spread(24, 1e3), 2, 8, seed + 20),
        from_spectrum(torch.ones(12, dtype=F64), 2, 8, seed + 21),
        clusters(g, 3, 10, 2),
        clusters(g, 2, 8, 24),
        sheet(g, 2, 16, 3, 2),
        heavy(g, 2, 5, 12),
        few(g, 2, 6, 2),
        from_spectrum(image_spectrum(28, 3.0), 1, 4, seed + 31),
        from_spectrum(image_spectrum(32, 2.5, channels=3), 1, 3, seed + 32),
    ]
    return [standardised(m) for m in found if m.means.shape[-1] <= largest]


def bent(seed: int, p: int = 24, d: int = 32) -> tuple[Mixtures, Bends]:
    """Gaussians with even logarithms of the variances, and smooth nonlinear parts, as networks of images have."""
    g = torch.Generator().manual_seed(seed + 77)
    ratios = log_uniform(g, 3e2, 1e5, p)
    c = torch.stack([log_spread(d, float(r)) for r in ratios])
    flat = Mixtures(torch.ones(p, 1, dtype=F64), torch.zeros(p, 1, d, dtype=F64), c[:, None])
    data = scale_jitter(standardised(flat), g)
    strength = log_uniform(g, 0.3, 1.8, p)
    reach = float(log_uniform(g, 1.2, 2.5, 1))
    return data, Bends.draw(data.variance(), strength=strength, reach=reach, drift=0.3, seed=seed + 78)


def scale_jitter(m: Mixtures, g: torch.Generator) -> Mixtures:
    """Scales that are known to some 15 per cent."""
    return m.scaled((0.15 * torch.randn(len(m.weights), generator=g, dtype=F64)).exp())


def problems(seed: int, predicts: str, largest: int = 4096, *, rough: bool = False) -> list[Problems]:
    """Exact mixtures, and Gaussians with smooth nonlinear parts, all with errors of a network, in batches.

    The errors are from 0.3 to 6 per cent of the prediction.

    Arguments:
        seed: Seed.
        predicts: ``"data"`` for x0, v and velocity networks, ``"noise"`` for ε networks, ``"any"`` for both.
        largest: Largest number of dimensions.
        rough: Whether errors change within a small part of the range of noise levels, as those of larger networks.
    """
    g = torch.Generator().manual_seed(seed + 5)
    small, large = [], []

    def batch(i: int, m: Mixtures, bends: Bends | None = None) -> Problems:
        p, _, d = m.means.shape
        size = log_uniform(g, 0.003, 0.06, p)
        drift = float(log_uniform(g, 0.2, 5.0 if rough else 1.0, 1))
        first = torch.tensor(FIRST, dtype=F64)[torch.randint(len(FIRST), (p,), generator=g)]
        kind = {"noise": "eps", "data": "v", "any": ("v", "eps")[i % 2]}[predicts]
        waves = Waves.draw(p, d, predicts=kind, size=size, drift=drift, seed=seed + 10 + i)
        return Problems.of(m, first, waves, bends)

    for i, m in enumerate(mixtures(seed, largest)):
        (large if m.means.shape[-1] > 64 else small).append(batch(i, scale_jitter(m, g)))
    return [merge(small), *(batch(100 + k, *bent(seed + k, 12)) for k in range(2)), *large]


def vectors(seed: int, predicts: str, *, exact: bool = True) -> list[Problems]:
    """Mixtures of 2 to 64 dimensions, each once exact and once with the error of a network, in batches.

    Beside :func:`mixtures` these have more kinds of heavy tails, more modes, and sheets in more directions.

    Arguments:
        seed: Seed.
        predicts: ``"data"``, ``"noise"`` or ``"any"``, as in :func:`problems`.
        exact: Whether exact ones are among them.
    """
    g = torch.Generator().manual_seed(seed + 31)
    more = [
        heavy(g, 2, 5, 12),
        heavy(g, 2, 6, 8),
        heavy(g, 2, 4, 3),
        clusters(g, 2, 25, 2),
        clusters(g, 2, 12, 6),
        few(g, 2, 3, 4),
        sheet(g, 2, 24, 8, 2),
    ]
    data = [*mixtures(seed, 64), *map(standardised, more)]
    batches = []
    for wrong in (False, True) if exact else (True,):
        g = torch.Generator().manual_seed(seed + 5 + wrong)
        parts: tuple[list[Problems], list[Problems]] = ([], [])
        for i, m in enumerate(data):
            p, _, d = m.means.shape
            m = scale_jitter(m, g)
            first = torch.tensor(FIRST, dtype=F64)[torch.randint(len(FIRST), (p,), generator=g)]
            kind = {"noise": "eps", "data": "v", "any": ("v", "eps")[i % 2]}[predicts]
            size, drift = log_uniform(g, 0.003, 0.06, p) * wrong, float(log_uniform(g, 0.2, 2.0, 1))
            waves = Waves.draw(p, d, predicts=kind, size=size, drift=drift, seed=seed + 10 + i)
            parts[d > 8].append(Problems.of(m, first, waves))
        batches += [merge(part) for part in parts]
    return batches
