"""Priors with exact denoisers, also from distributions of torch: uniform, normal, and mixtures of normals."""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributions

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde.denoisers.base import AbstractDenoiser, Condition, Kind, check_sde, same_process
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.inverse.likelihoods import log_interval
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE


@checked
class UniformPrior(AbstractDenoiser):
    r"""Exact denoiser of data that are uniform in a box.

    .. math:: p_t(x) = \prod_i \frac{\Phi(\frac{x_i - \alpha a_i}{\sigma}) - \Phi(\frac{x_i - \alpha b_i}{\sigma})}
              {\alpha (b_i - a_i)}

    E[x₀ | x_t] is the mean of a normal distribution truncated to the box. It is computed by quadrature in the part of
    the box that has probability, so that it is finite and inside the box for every x, also far outside, and at every
    noise level.

    Arguments:
        sde: Noising process.
        low: Lower bounds a, of shape event.
        high: Upper bounds b, of shape event.

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.inverse.UniformPrior(ss.VP(), torch.zeros(2), torch.ones(2))
        >>> prior.x0(torch.tensor([[0.5, 90.0]], dtype=torch.float64), 1.0).round(decimals=2)
        tensor([[0.5000, 0.5500]], dtype=torch.float64)
    """

    low: Tensor
    high: Tensor

    def __init__(self, sde: SDE, low: Tensor, high: Tensor) -> None:
        super().__init__(sde)
        a, b = (torch.as_tensor(v, dtype=torch.float64).detach().clone() for v in (low, high))
        if a.ndim == 0 or a.shape != b.shape or not bool((a < b).all()) or not bool((b - a).isfinite().all()):
            raise ValueError(
                f"`low` and `high` must have the shape of an event, with low < high, got {tuple(a.shape)} and "
                f"{tuple(b.shape)}."
            )
        self.event = tuple(a.shape)
        self.register_buffer("low", a)
        self.register_buffer("high", b)

    @property
    def kind(self) -> Kind:
        return Kind("x0", self.sde, exact=True)

    def extra_repr(self) -> str:
        return f"event={self.event}, sde={self.sde}"

    def mean(self) -> Tensor:
        """Mean of the data, of shape event."""
        return (self.low + self.high) / 2

    def covariance(self) -> Tensor:
        """Covariance of the data, (D, D)."""
        return ((self.high - self.low).flatten() ** 2 / 12).diag()

    @checked
    def sample(self, n: int, *, seed: int | Noise | None = None) -> Tensor:
        """Samples of the data, (n, *event); sample i depends on the seed and on i alone.

        Arguments:
            n: Number of samples.
            seed: Seed, a :class:`Noise`, or None for a random seed.
        """
        source = as_noise(seed).fork(Stream.MIXTURE)
        shape = (check.integer("n", n), *self.event)
        u = source.uniform(shape, 0, dtype=torch.float64, device=self.low.device)
        return self.low + (self.high - self.low) * u.to(self.low)

    def log_prob(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        """Log-density of the marginal at time `t` in nats, (B, *event) to (B,)."""
        z, alpha, sigma = self._scales(x, t)
        if not isinstance(t, Tensor) and t == 0:
            inside = ((z >= self.low) & (z <= self.high)).flatten(1).all(1)
            return torch.where(inside, -(self.high - self.low).log().sum(), -torch.inf).to(x.dtype)
        logs = log_interval((z - alpha * self.high) / sigma, (z - alpha * self.low) / sigma)
        return (logs - (alpha * (self.high - self.low)).log()).flatten(1).sum(1).to(x.dtype)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        z, alpha, sigma = self._scales(x, t)
        floor = 1e-150  # its square is still a number
        rho, variance = sigma / alpha.clamp_min(floor), sigma.square().clamp_min(floor)
        peak = torch.minimum(torch.maximum(z / alpha.clamp_min(floor), self.low), self.high)
        slope = alpha * (alpha * peak - z) / variance  # of the log-density at its peak, 0 unless the peak is a bound
        reach = torch.minimum(9 * rho, 40 / slope.abs().clamp_min(floor)).clamp_min(floor)
        first, last = torch.maximum(self.low - peak, -reach), torch.minimum(self.high - peak, reach)
        nodes, weights = (v.to(z) for v in legendre())
        d = first[..., None] + (last - first)[..., None] * nodes
        logs = -0.5 * (alpha**2 / variance)[..., None] * d**2 - slope[..., None] * d + weights.log()
        return (peak + (logs.softmax(-1) * d).sum(-1)).to(x.dtype)

    def _scales(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The state in the dtype of the bounds, and α and σ that broadcast to it."""
        check.state("x", x)
        if tuple(x.shape[1:]) != self.event:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, self.event))}), got {tuple(x.shape)}.")
        z = x.to(self.low)
        scales = (
            torch.as_tensor(check.expand(fn(t), z), dtype=z.dtype, device=z.device)
            for fn in (self.sde.alpha, self.sde.sigma)
        )
        alpha, sigma = scales
        return z, alpha, sigma


Prior = AbstractDenoiser | distributions.Distribution
"""A denoiser, or a distribution of torch whose denoiser is known."""


@checked
def as_prior(sde: SDE, prior: Prior) -> AbstractDenoiser:
    """Denoiser of a prior on the process `sde`.

    Arguments:
        sde: Process of the states.
        prior: Denoiser on this process; or a distribution of torch over events of one axis: ``MultivariateNormal``,
            ``Independent`` normals or uniforms (such as sbi's ``BoxUniform``), or a mixture of these normals.
    """
    check_sde(sde)
    if isinstance(prior, AbstractDenoiser):
        if prior.sde != sde:
            same_process(_On(sde), prior, "prior")
        return prior
    law: object = prior
    if isinstance(law, distributions.MixtureSameFamily):
        parts = _normals(law.component_distribution)
        if parts is not None:
            mean, cov = parts
            return GaussianMixture(sde, mean, weights=law.mixture_distribution.probs, cov=cov)
    elif isinstance(law, distributions.Distribution):
        base = law.base_dist if isinstance(law, distributions.Independent) else law
        if isinstance(base, distributions.Uniform) and base.low.ndim == 1:
            return UniformPrior(sde, base.low, base.high)
        parts = _normals(law)
        if parts is not None:
            mean, cov = parts
            return GaussianMixture(sde, mean[None], cov=cov[None])
    raise TypeError(
        f"`prior` must be a denoiser, or a torch distribution over vectors that is uniform in a box, normal, or a "
        f"mixture of normals, got {type(prior).__name__}; for another one give a denoiser that was trained on samples."
    )


def covariance_of(prior: AbstractDenoiser) -> Tensor | None:
    """Covariance of the data of an exact denoiser, (D, D); None for a network."""
    if isinstance(prior, Gaussian):
        eye = torch.eye(math.prod(prior.event), dtype=torch.float64).reshape(-1, *prior.event).to(prior.mean)
        return prior.affine(eye, 0.0, lambda c: c, 0.0).flatten(1)
    return prior.covariance() if isinstance(prior, GaussianMixture | UniformPrior) else None


class _On(AbstractDenoiser):
    """A stand-in for the process of the states in the message of an error."""


def _normals(law: object) -> tuple[Tensor, Tensor] | None:
    """Mean and covariance of a normal distribution over vectors, float64, also of a batch of them."""
    if isinstance(law, distributions.MultivariateNormal):
        return law.mean.double(), law.covariance_matrix.double()
    if isinstance(law, distributions.Independent) and isinstance(law.base_dist, distributions.Normal):
        return law.base_dist.loc.double(), torch.diag_embed(law.base_dist.scale.double() ** 2)
    if isinstance(law, distributions.Normal) and law.loc.ndim == 1:
        return law.loc.double(), law.scale.double().square().diag()
    return None
