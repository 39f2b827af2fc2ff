r"""Distances between two sets of samples: transport, energy distance, kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.metrics.pairs import CHUNK, as_pair, stream_of
from scoresde.noise.streams import Stream

__all__ = ["energy_distance", "mmd_rbf", "sliced_w2", "w2_1d"]


_OCTAVES, _PER_OCTAVE = 48, 1024  # bins of the median distance: from 2⁻⁴⁸ of the largest distance, 0.07 % wide


@checked
def w2_1d(x: Tensor, y: Tensor) -> float:
    r"""Wasserstein-2 distance between two sets of numbers, by exact transport.

    .. math:: W_2^2(x, y) = \int_0^1 \left( F_x^{-1}(u) - F_y^{-1}(u) \right)^2 du

    The quantile functions are piecewise constant: the integral is a finite sum over their jumps, for any N and M.

    Arguments:
        x: Samples, (N,) or (N, 1).
        y: Samples, (M,) or (M, 1).

    References:
        | Computational Optimal Transport (Peyré and Cuturi, 2019), arXiv:1803.00567, remark 2.30

    Example:
        >>> import torch
        >>> w2_1d(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0, 1.0]))
        0.0
        >>> w2_1d(torch.tensor([0.0, 1.0]), torch.tensor([3.0, 4.0]))
        3.0
    """
    x, y = as_pair(x, y)
    if x.shape[1] != 1:
        raise ValueError(
            f"`x` and `y` must hold one number for each sample, got {x.shape[1]}; use `sliced_w2`, or one column."
        )
    return math.sqrt(float(_transport(x.T, y.T)))


@checked
def sliced_w2(x: Tensor, y: Tensor, n_projections: int = 256, seed: int = 0) -> float:
    r"""Sliced Wasserstein-2 distance: exact transport along random directions.

    .. math:: SW_2^2(x, y) = E_{\theta} \left[ W_2^2(\theta^\top x, \theta^\top y) \right], \qquad |\theta| = 1

    The distance of a set from its translate by δ is :math:`|\delta| / \sqrt{D}` on average over directions: multiply by
    :math:`\sqrt{D}` for a length in the space of the samples. The noise floor decreases like :math:`\sqrt{1/N + 1/M}`;
    more projections do not lower it, they only reduce the variance of the mean over directions.

    Arguments:
        x: Samples, (N, *event).
        y: Samples, (M, *event).
        n_projections: Number of directions.
        seed: Seed of the directions.

    References:
        | Sliced and Radon Wasserstein Barycenters of Measures (Bonneel et al., 2015), doi:10.1007/s10851-014-0506-3
    """
    x, y = as_pair(x, y)
    check.integer("n_projections", n_projections, at_least=1)
    theta = stream_of(seed, Stream.DIRECTIONS).normal((n_projections, x.shape[1]), draw=0, dtype=x.dtype).to(x.device)
    theta = theta / theta.norm(dim=1, keepdim=True)
    total = 0.0
    for part in theta.split(max(1, CHUNK // (len(x) + len(y)))):
        total += float(_transport(part @ x.T, part @ y.T).sum())
    return math.sqrt(total / n_projections)


@checked
def energy_distance(x: Tensor, y: Tensor) -> float:
    r"""Energy distance, which needs no bandwidth and no direction.

    .. math:: \mathcal{E}(x, y) = 2 E|x - y| - E|x - x'| - E|y - y'|

    This is the V-statistic: the means run over all pairs, also of a sample with itself. So it is never negative, it is
    zero only for equal sets, and for D = 1 it equals :math:`2 \int (F_x - F_y)^2` up to rounding. Under equal
    distributions its mean, the noise floor, is :math:`(1/N + 1/M) E|x - x'|`. It is the square of
    ``scipy.stats.energy_distance``.

    Arguments:
        x: Samples, (N, *event).
        y: Samples, (M, *event).

    References:
        | Energy statistics: A class of statistics based on distances (Székely and Rizzo, 2013),
          doi:10.1016/j.jspi.2013.03.018

    Example:
        >>> import torch
        >>> energy_distance(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 3.0, 3.0]))
        6.0
    """
    x, y = as_pair(x, y)
    return float(energy_by_labels(torch.cat([x, y]), _first(x, y)))


@checked
def mmd_rbf(x: Tensor, y: Tensor, bandwidth: float | Sequence[float] | None = None) -> float:
    r"""Squared maximum mean discrepancy with a Gaussian kernel, unbiased.

    .. math::
        \mathrm{MMD}^2(x, y) = E\,k(x, x') + E\,k(y, y') - 2 E\,k(x, y), \qquad k(a, b) = e^{-|a - b|^2 / 2 h^2}

    This is the U-statistic: no sample is paired with itself. So its mean is exactly zero under equal distributions,
    and about half of its values are then negative.

    Arguments:
        x: Samples, (N, *event).
        y: Samples, (M, *event).
        bandwidth: Bandwidth h, a positive number; or several, whose kernels are averaged. None uses the median distance
            between pooled samples (to 0.1 %), which does not depend on the labels.

    References:
        | A Kernel Two-Sample Test (Gretton et al., 2012), https://jmlr.org/papers/v13/gretton12a.html, eq. 3
    """
    x, y = as_pair(x, y)
    return float(mmd_by_labels(torch.cat([x, y]), _first(x, y), bandwidth))


def _transport(x: Tensor, y: Tensor) -> Tensor:
    """Squared Wasserstein-2 distance of each row of x, (P, N), to the same row of y, (P, M); (P,)."""
    n, m = x.shape[1], y.shape[1]
    x, y = x.sort(dim=1).values, y.sort(dim=1).values
    if n == m:
        return (x - y).square().mean(1)
    # Jumps of the quantile functions at i/n and j/m, in units of 1/(nm): as integers, equal jumps compare equal.
    jumps = torch.cat([torch.arange(n) * m, torch.arange(m) * n]).unique()
    width = torch.cat([jumps, torch.tensor([n * m])]).diff().to(x.dtype) / (n * m)
    i, j, width = (jumps // m).to(x.device), (jumps // n).to(x.device), width.to(x.device)
    return (x[:, i] - y[:, j]).square() @ width


def _first(x: Tensor, y: Tensor) -> Tensor:
    """Labels of the pooled samples, (1, N + M): 1 for x and 0 for y."""
    return (torch.arange(len(x) + len(y), device=x.device) < len(x)).to(x.dtype)[None]


def _distances(z: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of distances from rows [start, start + r) to rows [start, …): the first r columns are the diagonal block.

    Differences are taken before squares; the expansion :math:`|a|^2 - 2ab + |b|^2` is inaccurate for close samples.
    """
    start = 0
    while start < len(z):
        rows = max(1, CHUNK // (len(z) - start))
        yield start, torch.cdist(z[start : start + rows], z[start:], compute_mode="donot_use_mm_for_euclid_dist")
        start += rows


def _pair_sums(
    z: Tensor, labels: Tensor, kernel: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, float, float]:
    """Sums of a kernel of the distance over ordered pairs within x, from x to y and within y; and N and M.

    Arguments:
        z: Pooled samples, (Z, D).
        labels: Labels, 1 for x and 0 for y, (S, Z), with N ones in every row.
        kernel: Function of a block of distances; it may modify the block.

    Returns:
        Three (S,) tensors of float64 on the CPU and two numbers.
    """
    rows = torch.cat([labels, 1 - labels, torch.ones_like(labels[:1])])
    total = torch.zeros(len(rows), dtype=torch.float64)
    for start, d in _distances(z):
        k = kernel(d)
        k[:, len(k) :] *= 2  # pairs outside the diagonal block count in both orders
        total += ((rows[:, start:] @ k.T) * rows[:, start : start + len(k)]).sum(1).cpu().double()
    xx, yy, both = total.split([len(labels), len(labels), 1])
    n = int(labels[0].sum())
    return xx, (both - xx - yy) / 2, yy, n, len(z) - n


def energy_by_labels(z: Tensor, labels: Tensor) -> Tensor:
    """Energy distance of each labelling, (S,)."""
    xx, xy, yy, n, m = _pair_sums(z, labels, lambda d: d)
    return (2 * xy / (n * m) - xx / n**2 - yy / m**2).clamp_min(0.0)


def mmd_by_labels(z: Tensor, labels: Tensor, bandwidth: float | Sequence[float] | None = None) -> Tensor:
    """Squared MMD of each labelling, (S,)."""
    given = _median_distance(z) if bandwidth is None else bandwidth
    widths = [check.number("bandwidth", h, above=0) for h in (given if isinstance(given, Sequence) else [given])]
    if not widths:
        raise ValueError("`bandwidth` must be a number, or a sequence of at least one, got an empty sequence.")

    def kernel(d: Tensor) -> Tensor:
        k = torch.zeros_like(d)
        for h in widths:
            k += (d / h).square_().mul_(-0.5).exp_()
        return k / len(widths)

    xx, xy, yy, n, m = _pair_sums(z, labels, kernel)
    # Each pair of a sample with itself adds 1 to xx and yy.
    return (xx - n) / (n * (n - 1)) + (yy - m) / (m * (m - 1)) - 2 * xy / (n * m)


def _median_distance(z: Tensor) -> float:
    """Median distance between different samples, from a histogram of its logarithm: no pairs are stored."""
    top = 2 * float(z.norm(dim=1).max())  # by the triangle inequality, no distance is larger
    if top == 0:
        raise ValueError("`bandwidth` must be given where all samples coincide: their median distance is 0.")
    bins = _OCTAVES * _PER_OCTAVE
    counts = torch.zeros(bins + 1, dtype=torch.int64)
    for _, d in _distances(z):
        bin_of = d.div_(top).log2_().add_(_OCTAVES).mul_(_PER_OCTAVE).clamp_(0, bins).long()
        for part in (bin_of, bin_of[:, len(bin_of) :]):  # pairs outside the diagonal block count in both orders
            counts += torch.bincount(part.flatten(), minlength=bins + 1).cpu()
    counts[0] -= len(z)  # pairs of a sample with itself
    half = int((counts.cumsum(0) < counts.sum() / 2).sum())
    if half == 0:
        raise ValueError("`bandwidth` must be given where most samples coincide: their median distance is 0.")
    return float(top * 2.0 ** ((half + 0.5) / _PER_OCTAVE - _OCTAVES))
