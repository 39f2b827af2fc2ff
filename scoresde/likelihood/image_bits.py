"""Bits per dimension of a model on images, in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.likelihood.bits import dequantized_bits
from scoresde.likelihood.confidence import Uncertain
from scoresde.likelihood.flow import Tolerance, log_prob
from scoresde.likelihood.trace import Probes
from scoresde.noise.keyed import Noise

__all__ = ["Bits", "bits_per_dim"]

MOST_EXACT = (
    256  # dimensions up to which the trace is exact by default: it costs one product with the Jacobian for each
)


@dataclass(frozen=True, eq=False)
class Bits(Uncertain):
    """Bits per dimension of images, and how they were computed.

    Arguments:
        value: Bits per dimension of each image, (B,).
        standard_error: Standard error of `value` from the points in a bin, (B,); NaN for one point.
        degrees: Degrees of freedom of `standard_error`.
        how: How the bits were computed.
    """

    value: Tensor
    standard_error: Tensor = field(repr=False)
    degrees: float
    how: str

    @property
    def mean(self) -> float:
        """Mean over the images."""
        return float(self.value.double().mean())

    @property
    def mean_error(self) -> float:
        """Standard error of the mean, from the scatter over the images; NaN for one image."""
        return float(self.value.double().std() / len(self.value) ** 0.5) if len(self.value) > 1 else math.nan

    def __str__(self) -> str:
        if len(self.value) == 1:
            how = self.how.replace("images", "image", 1)
            return f"{self.mean:.4f} bits per dimension, one image, so no standard error: {how}"
        return f"{self.mean:.4f} ± {self.mean_error:.4f} bits per dimension, mean of {len(self.value)} {self.how}"


@checked
def bits_per_dim(
    model: AbstractDenoiser,
    images: Tensor,
    levels: int | None = None,
    *,
    interval: tuple[float, float] | None = None,
    n: int = 1,
    batch: int | None = None,
    probes: Probes | str | None = None,
    tolerance: Tolerance | None = None,
    t_min: float | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    dtype: torch.dtype = torch.float32,
) -> Bits:
    r"""Bits per dimension of integer images under the density of the probability flow.

    .. math:: b_n = -\frac{1}{D\log 2}\left(\log\frac1n\sum_{k=1}^n p(x^{(k)}) + D\log w\right), \qquad
              x^{(k)} \sim U(\text{bin})

    Each integer becomes a point of its bin of width w. The expectation of the result is an upper bound of the bits of
    the bin's probability, and decreases to it as n grows.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)``.
        images: Integers 0 … levels − 1, (B, *event), as they were before any scaling.
        levels: Number of values of an entry, by default 256 for uint8.
        interval: Interval in the scale of the model that the bins divide. By default the integer 0 lies at −1 and the
            largest one at 1, the middles of their bins: (−1 − 1/255, 1 + 1/255) for 256 levels.
        n: Number of points in each bin; 1 is uniform dequantisation, more are its importance-weighted bound.
        batch: Number of images in a run, by default all.
        probes: Computation of the trace, as in :func:`log_prob`. By default it is exact up to 256 dimensions, and
            estimated with one Hutchinson probe beyond.
        tolerance: Steps of the state, as in :func:`log_prob`.
        t_min: Smallest time at which the network is evaluated, by default that of the process.
        seed: Seed of the points and of the probes.
        dtype: Dtype of the points.

    Returns:
        :class:`Bits`; ``print`` it for the mean over the images and how it was computed.

    References:
        | A note on the evaluation of generative models (Theis et al., 2016), arXiv:1511.01844
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, section 4.3

    Example:
        >>> import torch, scoresde as ss
        >>> coin = ss.GaussianMixture(ss.VP(), torch.tensor([[-0.5], [0.5]]), std=0.1)
        >>> bits = ss.bits_per_dim(coin, torch.tensor([[0], [1]]), levels=2, interval=(-1.0, 1.0), n=200, seed=0)
        >>> abs(bits.mean - 1) < 0.2
        True
    """
    if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex():
        signed = isinstance(images, Tensor) and images.numel() > 0 and not bool((images >= 0).all())
        how = "((x + 1) * 127.5)" if signed else "(x * 255)"
        raise TypeError(
            "`images` must be a tensor of integers, as they were before any scaling; "
            f"undo the scaling, as in {how}.round().to(torch.uint8)."
        )
    if levels is None:
        if images.dtype != torch.uint8:
            raise TypeError(f"`levels` must be given for {images.dtype}; only of uint8 is the number known, 256.")
        levels = 256
    check.integer("levels", levels, at_least=2)
    edge = 1 + 1 / (levels - 1)
    interval = (-edge, edge) if interval is None else interval
    check.integer("n", n, at_least=1)
    size = len(images) if batch is None else check.integer("batch", batch, at_least=1)
    dims = math.prod(images.shape[1:])
    if probes is None:
        probes = "exact" if dims <= MOST_EXACT else Probes("hutchinson", n=1)
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    evaluations: list[Tensor] = []
    values, errors = [], []
    for rows in torch.arange(len(images)).split(max(1, size)):
        part, own = model.rows(rows), noise[rows]

        def log_density(x: Tensor, part: AbstractDenoiser = part, own: Noise = own) -> Tensor:
            out = log_prob(part, x, probes=probes, tolerance=tolerance, t_min=t_min, seed=own)
            evaluations.append(out.nfe.double())
            return out.value

        value, error = dequantized_bits(
            log_density, images[rows.to(images.device)], levels, interval, n=n, seed=own, dtype=dtype
        )
        values.append(value)
        errors.append(error)
    trace = probes if isinstance(probes, str) else probes.kind
    trace = "exact trace" if trace == "exact" else f"trace by {probes!r}"
    points = "uniform dequantisation" if n == 1 else f"{n} points in each bin"
    calls = float(torch.cat(evaluations).mean()) if evaluations else math.nan
    how = (
        f"images with {levels} levels: {points} (an upper bound in expectation), probability flow with {trace}, "
        f"{calls:.0f} evaluations a point"
    )
    return Bits(torch.cat(values), torch.cat(errors), n - 1, how)
