"""Bits per dimension from log-densities, of data on integer levels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.data import bin_width, dequantize
from scoresde.noise.keyed import Noise


@checked
def bits_from_nats(
    nats: Tensor,
    dims: int,
    levels: int | None = None,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    density: bool = True,
) -> Tensor:
    r"""Bits per dimension of data with `levels` values, from log-densities in nats.

    .. math:: b = -\frac{\log p(x) + D\log w}{D\log 2}, \qquad w = \frac{\text{high} - \text{low}}{\text{levels}}

    A bin has width w in the scale of the density, so its probability is about p w^D. For 256 bins of (−1, 1) this adds
    7 bits, a constant that code for images often contains.

    Arguments:
        nats: Log-density log p(x), (B,), in the scale where the bins divide `interval`.
        dims: Number D of entries of an event.
        levels: Number of values of an entry, 256 for bytes; required if `nats` is a density.
        interval: Interval that the bins divide; it is (−1 − 1/255, 1 + 1/255) for integers scaled as v/127.5 − 1.
        density: False if `nats` is a log-probability, as of :func:`elbo` with `levels`: nothing is added.

    Example:
        >>> import torch
        >>> bits_from_nats(torch.zeros(1), 3072, levels=256)
        tensor([7.])
    """
    check.integer("dims", dims, at_least=1)
    if not density:
        return -nats / (dims * math.log(2))
    if levels is None:
        raise TypeError(
            "`levels` must be given for a density: the number of values of an entry, 256 for bytes and 17 for "
            "scikit-learn's digits. If `nats` is already a log-probability, give `density`=False."
        )
    return -(nats / dims + math.log(bin_width(levels, interval))) / math.log(2)


@checked
def dequantized_bits(
    log_density: Callable[[Tensor], Tensor],
    images: Tensor,
    levels: int,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    n: int = 1,
    seed: int | Sequence[int] | Noise | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    r"""Bits per dimension of integers under a density: an upper bound that decreases to the exact value as n grows.

    .. math:: b_n = -\frac{1}{D\log 2}\left(\log\frac1n\sum_{k=1}^n p(x^{(k)}) + D\log w\right), \qquad
              x^{(k)} \sim U(\text{bin})

    n = 1 is uniform dequantisation; n > 1 is its importance-weighted bound, which is never looser on average.

    Arguments:
        log_density: Function from (B, *event) to log p in nats, (B,), as ``lambda x: ss.log_prob(model, x).value``.
        images: Integers, (B, *event).
        levels: Number of values.
        interval: Interval that the bins divide, in the scale of the density.
        n: Number of points in each bin.
        seed: Seed of the points.
        dtype: Dtype of the points.

    Returns:
        Bits per dimension, (B,), and their standard errors, (B,), nan for n = 1. The errors have n − 1
        degrees of freedom: an interval needs the factor ``student_quantile(0.975, n - 1)``, and not 1.96.

    References:
        | Flow++ (Ho et al., 2019), arXiv:1902.00275
        | Importance Weighted Autoencoders (Burda et al., 2016), arXiv:1509.00519
    """
    noise, dims = seed if isinstance(seed, Noise) else Noise(seed), math.prod(images.shape[1:])
    logs = torch.stack(
        [
            log_density(dequantize(images, levels, interval, seed=noise, draw=k, dtype=dtype))
            for k in range(check.integer("n", n, at_least=1))
        ]
    )
    check.warn_unless_finite(logs.T, "the log-densities")
    bits = bits_from_nats(logs.logsumexp(0) - math.log(n), dims, levels, interval)
    if n == 1:
        return bits, torch.full_like(bits, math.nan)
    relative = (logs - logs.amax(0)).exp()
    return bits, relative.std(0) / relative.mean(0) / n**0.5 / (dims * math.log(2))
