r"""A variational autoencoder: a small latent space for diffusion models, with a lower bound on the likelihood.

.. math:: \log p(x) \ge E_{q(z|x)}[\log p(x \mid z)] - \mathrm{KL}(q(z \mid x) \,\|\, N(0, I))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.nn.blocks import GroupNorm, Residual, Upsample, conv, dtype_of, initialise
from scoresde.noise.keyed import Noise, as_noise


def _sum(x: Tensor) -> Tensor:
    return x.flatten(1).sum(1)


@dataclass(frozen=True)
class Independent:
    """A Gaussian with independent entries, the form of q(z | x) and p(x | z).

    Arguments:
        mean: Mean, (B, *event).
        log_var: Logarithm of the variance, of a shape that broadcasts to that of `mean`.
    """

    mean: Tensor
    log_var: Tensor

    def sample(self, eps: Tensor | Noise | None = None) -> Tensor:
        r"""A reparametrised sample, :math:`\mu + \sigma\varepsilon`.

        Arguments:
            eps: Standard normal of the shape of `mean`, or a :class:`Noise` to draw it from; by default it is drawn
                from torch's global generator.
        """
        if eps is None:
            eps = torch.randn_like(self.mean)
        elif isinstance(eps, Noise):
            eps = eps.like(self.mean, 0)
        return self.mean + (0.5 * self.log_var).exp() * check.match("eps", eps, "mean", self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density at `x` in nats, (B, *event) to (B,)."""
        square = (x - self.mean).square() * (-self.log_var).exp()
        return -0.5 * _sum(square + self.log_var + math.log(2 * math.pi))

    def kl(self) -> Tensor:
        r"""Divergence from N(0, I) in nats, :math:`\tfrac12\sum(\mu^2 + \sigma^2 - 1 - \log\sigma^2)`, (B,)."""
        return 0.5 * _sum(self.mean.square() + torch.expm1(self.log_var) - self.log_var)


class Bound(NamedTuple):
    """The evidence lower bound of each sample and its two terms, in nats, (B,).

    Arguments:
        elbo: The bound, reconstruction − kl.
        reconstruction: Mean log-density of the data given the latent.
        kl: Divergence of the encoder's Gaussian from N(0, I).
    """

    elbo: Tensor
    reconstruction: Tensor
    kl: Tensor


@checked
class VAE(nn.Module):
    r"""Gaussian encoder and decoder, :math:`q(z|x) = N(\mu(x), \sigma^2(x))` and :math:`p(x|z) = N(m(z), s^2)`.

    Images (B, C, *space) are encoded as latents (B, latent, *space) that are 2^(levels − 1) times shorter along each
    axis of space; vectors (B, C) as (B, latent). The attributes `encoder` (x to mean and log-variance, joined along the
    second axis) and `decoder` (z to m) are plain modules and may be replaced. Densities and divergences have the dtype
    of the data, float32 or float64. A call of the module computes :meth:`elbo`.

    Arguments:
        channels: Number C of channels of the data.
        latent: Number of channels of the latent.
        dims: Number of axes of space: 2 for images, 1 for signals, 0 for vectors.
        width: Number of channels of the first level.
        multipliers: Number of channels of each level, in units of `width`; each further level halves the resolution.
        blocks: Number of residual blocks of each level; for vectors, of plain layers.
        std: Standard deviation s of the decoder; None learns one number, which starts at 1.
        seed: Seed of the initial weights; None draws from torch's global generator.

    ``VAE(1, 4)`` has 1,658,954 parameters, ``VAE(32, 2, dims=0)`` has 63,013.

    Example:
        >>> import torch, scoresde as ss
        >>> vae = ss.nn.VAE(1, 4, width=16, seed=0)
        >>> x = torch.randn(5, 1, 8, 8)
        >>> vae.encode(x).mean.shape, vae.elbo(x).elbo.shape
        (torch.Size([5, 4, 4, 4]), torch.Size([5]))

    References:
        | Auto-Encoding Variational Bayes (Kingma and Welling, 2014), arXiv:1312.6114
        | High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), arXiv:2112.10752
    """

    def __init__(
        self,
        channels: int,
        latent: int,
        *,
        dims: int = 2,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2),
        blocks: int = 2,
        std: float | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        if check.integer("dims", dims) > 2:
            raise ValueError(f"`dims` must be 0 for vectors, 1 for signals or 2 for images, got {dims}.")
        self.channels = check.integer("channels", channels, at_least=1)
        self.latent = check.integer("latent", latent, at_least=1)
        check.integer("width", width, at_least=2)
        check.integer("blocks", blocks, at_least=1)
        widths = [width * check.integer("multipliers", m, at_least=1) for m in multipliers]
        if not widths:
            raise ValueError("`multipliers` must have an entry for each level, at least one, got none.")
        self.dims = dims
        self.factor = 2 ** (len(widths) - 1) if dims else 1
        self.log_std = nn.Parameter(torch.zeros(())) if std is None else math.log(check.number("std", std, above=0))
        if dims:
            self.encoder = _pyramid(dims, channels, 2 * latent, widths, blocks, down=True)
            self.decoder = _pyramid(dims, latent, channels, widths[::-1], blocks, down=False)
        else:
            self.encoder = _layers(channels, 2 * latent, widths, blocks)
            self.decoder = _layers(latent, channels, widths[::-1], blocks)
        ends = [self.encoder[-1], self.decoder[-1]]
        initialise(self, [*ends, *(m.last for m in self.modules() if isinstance(m, Residual))], seed)

    @checked
    def latent_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the latents of data of this `shape`, (B, C, *space)."""
        rows, channels, *space = shape
        if channels != self.channels or len(space) != self.dims or any(n % self.factor for n in space):
            raise ValueError(
                f"the data must have {self.channels} channels and {self.dims} axes of space, each a multiple of "
                f"{self.factor}, got shape {tuple(shape)}; pad the data, or use fewer `multipliers`."
            )
        return (rows, self.latent, *(n // self.factor for n in space))

    def encode(self, x: Tensor) -> Independent:
        """The posterior q(z | x) of data `x`, (B, C, *space)."""
        self.latent_shape(check.state("x", x).shape)
        mean, log_var = self.encoder(x.to(dtype_of(self.encoder))).to(x.dtype).chunk(2, dim=1)
        return Independent(mean, log_var)

    def decode(self, z: Tensor) -> Tensor:
        """The mean of p(x | z) for latents `z`, (B, latent, ...)."""
        out: Tensor = self.decoder(check.state("z", z).to(dtype_of(self.decoder))).to(z.dtype)
        return out

    def forward(self, x: Tensor, eps: Tensor | Noise | None = None) -> Bound:
        """The evidence lower bound, as :meth:`elbo`: wrappers for parallel training need a call."""
        return self.elbo(x, eps)

    @property
    def std(self) -> float:
        """Standard deviation of p(x | z)."""
        return math.exp(self.log_std.item() if isinstance(self.log_std, Tensor) else self.log_std)

    def likelihood(self, z: Tensor) -> Independent:
        """The distribution p(x | z) of data with latents `z`."""
        return Independent(self.decode(z), torch.as_tensor(2 * self.log_std, dtype=z.dtype, device=z.device))

    def elbo(self, x: Tensor, eps: Tensor | Noise | None = None) -> Bound:
        """The evidence lower bound from one latent for each sample; the loss is minus its mean over the batch.

        Arguments:
            x: Data, (B, C, *space).
            eps: Noise of the latents, as in :meth:`Independent.sample`.
        """
        q = self.encode(x)
        reconstruction, kl = self.likelihood(q.sample(eps)).log_prob(x), q.kl()
        return Bound(reconstruction - kl, reconstruction, kl)

    @checked
    def importance_bound(self, x: Tensor, samples: int = 64, noise: Noise | None = None) -> Tensor:
        r"""A tighter bound, :math:`\log\tfrac1K\sum_k p(x, z_k) / q(z_k | x)`, in nats, (B,).

        Its mean increases with K, from the evidence lower bound at K = 1 towards log p(x).

        Arguments:
            x: Data, (B, C, *space).
            samples: Number K of latents, evaluated one after the other.
            noise: Keyed noise of the latents; by default it comes from torch's global generator.
        """
        q = self.encode(x)
        logs = []
        for k in range(check.integer("samples", samples, at_least=1)):
            z = q.sample(None if noise is None else noise.like(q.mean, k))
            prior = Independent(torch.zeros_like(z), z.new_zeros(()))
            logs.append(self.likelihood(z).log_prob(x) + prior.log_prob(z) - q.log_prob(z))
        return torch.stack(logs).logsumexp(0) - math.log(samples)

    @checked
    def sample(self, shape: Sequence[int], *, seed: int | Noise | None = None, noisy: bool = False) -> Tensor:
        """Generate data: the decoder's mean at latents from N(0, I).

        Arguments:
            shape: Shape of the data, (B, C, *space).
            seed: Seed, a :class:`Noise`, or None for a fresh seed.
            noisy: True to add the decoder's noise, for exact samples of the model; means look cleaner.
        """
        noise = as_noise(seed)
        device = next(self.decoder.parameters()).device
        p = self.likelihood(noise.normal(self.latent_shape(shape), 0, device=device))
        return p.sample(noise.normal(shape, 1, device=device)) if noisy else p.mean


def _pyramid(dims: int, inputs: int, outputs: int, widths: list[int], blocks: int, *, down: bool) -> nn.Sequential:
    """Residual blocks on levels of these widths; between two levels the resolution is halved or doubled."""
    parts: list[nn.Module] = [conv(dims, inputs, widths[0])]
    for level, width in enumerate(widths):
        before = widths[max(0, level - 1)]
        if level:
            parts.append(conv(dims, before, before, stride=2) if down else Upsample(dims, before))
        parts += [Residual(dims, width if i else before, width) for i in range(blocks)]
    return nn.Sequential(*parts, GroupNorm(widths[-1]), nn.SiLU(), conv(dims, widths[-1], outputs))


def _layers(inputs: int, outputs: int, widths: list[int], blocks: int) -> nn.Sequential:
    """A fully connected network for vectors: `blocks` layers of each width."""
    parts: list[nn.Module] = []
    for width in widths:
        for _ in range(blocks):
            parts += [nn.Linear(inputs, width), nn.SiLU()]
            inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, outputs))
