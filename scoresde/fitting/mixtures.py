r"""Batches of exact mixtures for fits that need no network, in the frame y = x/α with noise level s = σ/α.

All components of a problem have diagonal covariances, so that a problem of some thousand dimensions costs no more than
its entries. The coordinates may be those of the eigenvectors of the data: a plan has one weight for all directions, so
its errors do not depend on the basis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

KINDS = ("eps", "v", "x0")

_PHASES = 24  # waves of the error of a network


@dataclass(frozen=True)
class Mixtures:
    r"""P mixtures :math:`\sum_k w_k N(\mu_k, \mathrm{diag}(v_k))` and their posterior means.

    Arguments:
        weights: Weights w, (P, K), with sum 1.
        means: Means μ, (P, K, D).
        variances: Variances v, (P, K, D).
    """

    weights: Tensor
    means: Tensor
    variances: Tensor

    def x0(self, y: Tensor, s: Tensor) -> Tensor:
        r"""Posterior mean :math:`\sum_k r_k(y)\,\big(\mu_k + \tfrac{v_k}{v_k + s^2}(y - \mu_k)\big)`.

        Arguments:
            y: States, (P, B, D).
            s: Noise level, () or (P, 1, 1).
        """
        total = self.variances + s.square()
        inverse = 1 / total
        scaled = self.means * inverse
        far = y.square() @ inverse.mT - 2 * y @ scaled.mT + (self.means * scaled).sum(-1)[:, None]
        log = self.weights.log()[:, None] - 0.5 * (far + total.log().sum(-1)[:, None])
        r = log.softmax(-1)
        gain = self.variances * inverse
        return (r @ gain) * y + r @ (self.means * (1 - gain))

    def mean(self) -> Tensor:
        """Means of the data, (P, D)."""
        return (self.weights[..., None] * self.means).sum(1)

    def variance(self) -> Tensor:
        """Variances of the entries of the data, (P, D)."""
        centred = self.means - self.mean()[:, None]
        return (self.weights[..., None] * (self.variances + centred.square())).sum(1)

    def covariance(self) -> Tensor:
        """Covariances of the data, (P, D, D)."""
        centred = (self.means - self.mean()[:, None]) * self.weights.sqrt()[..., None]
        return torch.diag_embed((self.weights[..., None] * self.variances).sum(1)) + centred.mT @ centred

    def scaled(self, factor: Tensor) -> Mixtures:
        """The data of each problem times a factor.

        Arguments:
            factor: Factors, (P,).
        """
        f = factor[:, None, None]
        return replace(self, means=self.means * f, variances=self.variances * f.square())

    def centred(self) -> Mixtures:
        """The data of each problem with mean 0."""
        return replace(self, means=self.means - self.mean()[:, None])


@dataclass(frozen=True)
class Waves:
    r"""Smooth errors of networks.

    The error of a prediction has the size η in each entry. That of the denoised state is

    .. math:: \delta(y, s) = \eta\,h(s) \sum_j a_j \cos\!\Big(b_j^T \frac{y}{\sqrt{1 + s^2}} + \nu_j \log s + c_j\Big)

    with h = s for ε, s/√(1 + s²) for v and velocity, and 1 for x0.

    Arguments:
        height: Sizes η of the errors of ε, of v and of x0, (P, 3).
        directions: Directions b, (P, D, J).
        drifts: Frequencies ν, (P, 1, J).
        phases: Phases c, (P, 1, J).
        outputs: Directions a, (P, J, D).
    """

    height: Tensor
    directions: Tensor
    drifts: Tensor
    phases: Tensor
    outputs: Tensor

    @classmethod
    def draw(cls, p: int, d: int, *, predicts: str, size: Tensor, drift: float, seed: int) -> Waves:
        """Random errors.

        Arguments:
            p: Number of problems.
            d: Number of dimensions.
            predicts: Prediction, ``"eps"``, ``"v"`` or ``"x0"``.
            size: Errors η, (P,).
            drift: Standard deviation of ν, the change of the error with the logarithm of the noise level.
            seed: Seed.
        """
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=torch.float64)

        height = size[:, None] * torch.tensor([[float(predicts == kind) for kind in KINDS]], dtype=torch.float64)
        phases = 2 * torch.pi * torch.rand(p, 1, _PHASES, generator=g, dtype=torch.float64)
        directions = 1.5 * normal(p, d, _PHASES) / d**0.5
        return cls(
            height, directions, drift * normal(p, 1, _PHASES), phases, normal(p, _PHASES, d) * (2 / _PHASES) ** 0.5
        )

    def __call__(self, y: Tensor, s: Tensor) -> Tensor:
        """Error of the data prediction.

        Arguments:
            y: States, (P, B, D).
            s: Noise levels, () or (P, 1, 1).
        """
        norm = (1 + s.square()).sqrt()
        eps, v, x0 = self.height[:, :, None, None].unbind(1)
        wrong = torch.cos((y / norm) @ self.directions + self.drifts * s.log() + self.phases) @ self.outputs
        return (eps * s + v * (s / norm) + x0) * wrong


@dataclass(frozen=True)
class Bends:
    r"""Smooth nonlinear parts of the denoised state, for data whose linear part is Gaussian with variances c.

    .. math:: \delta_i(y, s) = \kappa\,\frac{c_i\,s}{c_i + s^2} \sum_j a_{ji}
              \cos\!\Big(b_j^T \frac{y}{\sqrt{c + s^2}} + \nu_j \log s + \varphi_j\Big)

    The factor has the size of the posterior's standard deviation at low noise and vanishes at high noise, as what a
    network that generalises adds to the linear part. Every direction weighs by its share of the variance.

    Arguments:
        variances: Variances c, (P, 1, D).
        strength: Sizes κ, (P, 1, 1).
        waves: Directions b, frequencies ν, phases φ and directions a.
    """

    variances: Tensor
    strength: Tensor
    waves: Waves

    @classmethod
    def draw(cls, variances: Tensor, *, strength: Tensor, reach: float, drift: float, seed: int) -> Bends:
        """Random nonlinear parts.

        Arguments:
            variances: Variances of the data, (P, D).
            strength: Sizes κ, (P,).
            reach: Standard deviation of the phase over the states.
            drift: Standard deviation of ν.
            seed: Seed.
        """
        p, d = variances.shape
        waves = Waves.draw(p, d, predicts="x0", size=strength, drift=drift, seed=seed)
        share = (variances / variances.sum(1, keepdim=True)).sqrt() * (reach / 1.5 * d**0.5)
        waves = replace(waves, directions=waves.directions * share[..., None])
        return cls(variances[:, None], strength[:, None, None], waves)

    def __call__(self, y: Tensor, s: Tensor) -> Tensor:
        """Nonlinear part of the denoised state.

        Arguments:
            y: States, (P, B, D).
            s: Noise levels, () or (P, 1, 1).
        """
        total, w = self.variances + s.square(), self.waves
        wave = torch.cos((y / total.sqrt()) @ w.directions + w.drifts * s.log() + w.phases) @ w.outputs
        return self.strength * (self.variances * s / total) * wave


@dataclass(frozen=True)
class Problems:
    """A batch of mixtures, with errors of networks or without, whose flows begin at given noise levels.

    Arguments:
        data: Exact mixtures, padded to a common number of components and of dimensions.
        first: Noise levels at T, (P, 1, 1).
        dimensions: Numbers of dimensions before the padding, (P,).
        waves: Errors of the networks.
        bends: Nonlinear parts that are added to the exact posterior means.
    """

    data: Mixtures
    first: Tensor
    dimensions: Tensor
    waves: Waves | None = None
    bends: Bends | None = None

    @classmethod
    def of(
        cls, data: Mixtures, first: float | Tensor, waves: Waves | None = None, bends: Bends | None = None
    ) -> Problems:
        """Problems of equal shapes.

        Arguments:
            data: Exact mixtures.
            first: Noise level at T, of all problems or of each.
            waves: Errors of the networks.
            bends: Nonlinear parts that are added to the exact posterior means.
        """
        p, _, d = data.means.shape
        levels = torch.as_tensor(first, dtype=torch.float64).expand(p).reshape(p, 1, 1)
        return cls(data, levels, torch.full((p,), float(d), dtype=torch.float64), waves, bends)

    def __len__(self) -> int:
        return len(self.dimensions)

    def x0(self, y: Tensor, s: Tensor) -> Tensor:
        """Data prediction of the network.

        Arguments:
            y: States, (P, B, D).
            s: Noise levels, () or (P, 1, 1).
        """
        out = self.data.x0(y, s)
        for part in (self.waves, self.bends):
            out = out if part is None else out + part(y, s)
        return out

    def draw(self, n: int, seed: int) -> Tensor:
        """Initial states of pure noise, (P, n, D); 0 in dimensions of the padding.

        Arguments:
            n: Number of states of each problem.
            seed: Seed.
        """
        p, _, d = self.data.means.shape
        z = torch.randn(p, n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.first * z * (torch.arange(d) < self.dimensions[:, None])[:, None]

    def error(self, x: Tensor, end: Tensor) -> Tensor:
        """Root mean square difference over the entries of each state, (P, B)."""
        return ((x - end).square().sum(-1) / self.dimensions[:, None] + 1e-30).sqrt()

    def end(self, y: Tensor, last: float = 0.004, steps: int = 110) -> Tensor:
        """Data at the end of the flow dy/ds = (y − D)/s, by the classical Runge–Kutta method in log s.

        Arguments:
            y: States at the first level, (P, B, D).
            last: Level whose denoised state is the result.
            steps: Number of steps.
        """
        begin, stop = self.first.log(), math.log(last)
        h = (stop - begin) / steps

        def slope(y: Tensor, log_s: Tensor) -> Tensor:
            return y - self.x0(y, log_s.exp())

        for i in range(steps):
            a = begin + i * h
            k1 = slope(y, a)
            k2 = slope(y + h / 2 * k1, a + h / 2)
            k3 = slope(y + h / 2 * k2, a + h / 2)
            k4 = slope(y + h * k3, a + h)
            y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.x0(y, torch.tensor(last, dtype=torch.float64))


def merge(parts: Sequence[Problems]) -> Problems:
    """Several batches without bends as one, padded to the largest numbers of components and of dimensions.

    Either all have errors of networks, or none has.

    Arguments:
        parts: Batches.
    """
    k, d = (max(p.data.means.shape[i] for p in parts) for i in (1, 2))

    def padded(v: Tensor, *sizes: int, value: float = 0.0) -> Tensor:
        pad = [n for size, have in zip(reversed(sizes), reversed(v.shape[1:]), strict=True) for n in (0, size - have)]
        return torch.nn.functional.pad(v, pad, value=value)

    data = Mixtures(
        torch.cat([padded(p.data.weights, k, value=1e-300) for p in parts]),
        torch.cat([padded(p.data.means, k, d) for p in parts]),
        torch.cat([padded(p.data.variances, k, d) for p in parts]),
    )
    waves = None
    if all(p.waves is not None for p in parts):
        w = [p.waves for p in parts if p.waves is not None]
        waves = Waves(
            torch.cat([v.height for v in w]),
            torch.cat([padded(v.directions, d, _PHASES) for v in w]),
            torch.cat([v.drifts for v in w]),
            torch.cat([v.phases for v in w]),
            torch.cat([padded(v.outputs, _PHASES, d) for v in w]),
        )
    return Problems(data, torch.cat([p.first for p in parts]), torch.cat([p.dimensions for p in parts]), waves)


def from_spectrum(variances: Tensor, n: int = 8, components: int = 12, seed: int = 0) -> Mixtures:
    """Random mixtures whose entries have about the given variances.

    The share of the variance between the components differs between the problems, and is larger in the directions of
    large variance. Every other problem has components with unequal spectra.

    Arguments:
        variances: Variances of the data along its directions, (D,).
        n: Number of mixtures.
        components: Number of components.
        seed: Seed.
    """
    g = torch.Generator().manual_seed(seed)
    c, d = variances.to(torch.float64), len(variances)
    means, spreads = [], []
    for i in range(n):
        share, tilt = (0.2 + 0.77 * torch.rand(2, generator=g, dtype=torch.float64)).tolist()
        between = share * (c / c.max()) ** (0.5 * tilt)
        mu = torch.randn(components, d, generator=g, dtype=torch.float64)
        mu = mu - mu.mean(0)
        mu = mu * (between * c / mu.square().mean(0).clamp_min(1e-12)).sqrt()
        unequal = (torch.randn(components, d, generator=g, dtype=torch.float64) * (i % 2)).exp()
        means.append(mu)
        spreads.append(((1 - between) * c * unequal / unequal.mean(0)).clamp_min(1e-6 * float(c.mean())))
    weights = torch.full((n, components), 1 / components, dtype=torch.float64)
    return Mixtures(weights, torch.stack(means), torch.stack(spreads))


def stack(parts: Sequence[Mixtures]) -> Mixtures:
    """Several mixtures with equal numbers of components and of dimensions as one batch."""
    return Mixtures(
        torch.cat([p.weights for p in parts]),
        torch.cat([p.means for p in parts]),
        torch.cat([p.variances for p in parts]),
    )
