r"""Distances between two sets of samples, and their noise floors.

Every metric takes samples `x` of shape (N, *event) and `y` of shape (M, *event), flattens the events and returns a
number. Two finite sets from one distribution also have a nonzero distance, so it must be compared with its noise floor.
:func:`compare` measures the floor with random labels of the pooled samples; :func:`moments` returns standard errors.
A test can then state that samples are indistinguishable from exact samples,

.. math:: d(x, y) \le q_{95}\{ d(x', y') : (x', y') \text{ a random split of } x \cup y \}.

Sums are taken in float64 on the CPU and in the dtype of the samples elsewhere. The results depend only on the samples
and on `seed`; torch's global generator is not used.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import student_quantile
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream

_CHUNK = 1 << 20  # numbers in a block of distances or projections, to bound the memory

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
    x, y = _pair(x, y)
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
    x, y = _pair(x, y)
    check.integer("n_projections", n_projections, at_least=1)
    theta = _stream(seed, Stream.DIRECTIONS).normal((n_projections, x.shape[1]), draw=0, dtype=x.dtype).to(x.device)
    theta = theta / theta.norm(dim=1, keepdim=True)
    total = 0.0
    for part in theta.split(max(1, _CHUNK // (len(x) + len(y)))):
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
    x, y = _pair(x, y)
    return float(_energy(torch.cat([x, y]), _first(x, y)))


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
    x, y = _pair(x, y)
    return float(_mmd(torch.cat([x, y]), _first(x, y), bandwidth))


@checked
def frechet(x: Tensor, y: Tensor) -> float:
    r"""Fréchet distance between the Gaussians of two sets of features; with features of Inception it is the FID.

    .. math::
        d^2 = |m_x - m_y|^2 + \mathrm{tr}\left( C_x + C_y - 2 (C_x^{1/2} C_y C_x^{1/2})^{1/2} \right)

    This is the squared Wasserstein-2 distance of two Gaussians with the sample means m and covariances C. Two finite
    sets from one distribution have a distance of about :math:`c (1/N + 1/M)` with a constant c of the order of D tr C,
    so compare values of equal N and M only, and with the floor, ``compare(frechet, x, y)``.

    Arguments:
        x: Features, (N, *event); the event is flattened to D numbers.
        y: Features, (M, *event).

    References:
        | GANs Trained by a Two Time-Scale Update Rule (Heusel et al., 2017), arXiv:1706.08500

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        >>> round(frechet(x, 3 * x + 5), 9)  # means 0 and 5, standard deviations √2 and 3√2
        33.0
    """
    x, y = _pair(x, y)
    (mean_x, root_x), (mean_y, root_y) = _gaussian(x), _gaussian(y)
    # The trace of (C_x^½ C_y C_x^½)^½ is the sum of the singular values of R_x R_yᵀ, without the root of a rounding.
    cross = torch.linalg.svdvals(root_x @ root_y.T).sum()
    return max(0.0, float((mean_x - mean_y).square().sum() + root_x.square().sum() + root_y.square().sum() - 2 * cross))


def _gaussian(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of samples, and a matrix R such that RᵀR is their covariance."""
    mean = x.mean(0)
    return mean, torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R


@checked
def c2st(
    x: Tensor,
    y: Tensor,
    seed: int = 0,
    folds: int = 5,
    *,
    hidden: int = 64,
    steps: int = 400,
    batch: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 1.0,
) -> float:
    r"""Classifier two-sample test: balanced accuracy of a small network on held-out samples.

    .. math:: \tfrac12 P(\hat c = x \mid x) + \tfrac12 P(\hat c = y \mid y)

    The value is 0.5 if this network cannot distinguish the sets and 1 if they do not overlap, also for N ≠ M. The
    network has two hidden layers and is trained in float32 on standardised features, once for each fold, all folds at
    the same time. Under equal distributions the standard deviation is little more than :math:`1 / 2\sqrt{N + M}`;
    :func:`compare` measures it, at the cost of one training for each permutation. A sample that occurs in both sets
    lowers the value below 0.5. In many dimensions a few thousand samples do not train the network well: a value of 0.5
    does not refute a difference that :func:`moments` or :func:`sliced_w2` shows.

    Arguments:
        x: Samples, (N, *event).
        y: Samples, (M, *event).
        seed: Seed of the folds, the weights and the batches.
        folds: Number of parts, each held out once.
        hidden: Width of the two hidden layers.
        steps: Number of steps of AdamW.
        batch: Number of samples of each set in a step.
        lr: Initial learning rate; it decreases linearly to zero.
        weight_decay: Decoupled weight decay; without it the network memorises the training samples.

    References:
        | Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017), arXiv:1610.06545
    """
    for name, value in (("hidden", hidden), ("steps", steps), ("batch", batch)):
        check.integer(name, value, at_least=1)
    check.integer("folds", folds, at_least=2)
    check.number("lr", lr, above=0)
    check.number("weight_decay", weight_decay, at_least=0)
    noise = _stream(seed, Stream.CLASSIFIER)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = _pair(x, y)
        if folds > min(len(x), len(y)):
            raise ValueError(
                f"`folds` must be at most {min(len(x), len(y))}, the number of samples in the smaller set, got {folds}."
            )
        std, mean = torch.std_mean(torch.cat([x, y]), 0)
        std = torch.where(std > 0, std, torch.ones_like(std))
        sets = [((v - mean) / std).float() for v in (x, y)]
        splits = [_Folds(v, folds, noise.fork(i)) for i, v in enumerate(sets)]
        net = _train(splits, noise, (x.shape[1], hidden, hidden, 1), folds, steps, batch, lr, weight_decay)
    with torch.no_grad():
        correct = [0, 0]
        for fold in range(folds):
            own = [p[fold : fold + 1] for p in net]
            correct[0] += int((_mlp(splits[0].held_out(fold)[None], own) < 0).sum())
            correct[1] += int((_mlp(splits[1].held_out(fold)[None], own) >= 0).sum())
    return 0.5 * (correct[0] / len(x) + correct[1] / len(y))


@dataclass(frozen=True, eq=False)
class Moments:
    """Differences of means and covariances of two sets of samples, with their standard errors.

    Arguments:
        mean: Mean of y minus mean of x, (D,).
        mean_se: Standard errors of `mean`, (D,).
        cov: Covariance of y minus covariance of x, (D, D).
        cov_se: Standard errors of `cov`, (D, D).
        degrees: Degrees of freedom of the standard errors: the number of samples of the smaller set minus 1.
    """

    mean: Tensor
    mean_se: Tensor
    cov: Tensor
    cov_se: Tensor
    degrees: float = math.inf

    @property
    def mean_z(self) -> float:
        """Largest difference of means, in standard errors."""
        return _largest_z(self.mean, self.mean_se)

    @property
    def cov_z(self) -> float:
        """Largest difference of covariances, in standard errors."""
        return _largest_z(self.cov, self.cov_se)

    @property
    def max_z(self) -> float:
        """Largest difference of means and covariances, in standard errors."""
        return max(self.mean_z, self.cov_z)

    @property
    def z_floor(self) -> float:
        """95 % quantile of `max_z` under equal distributions, for D + D(D + 1)/2 independent Student t variables.

        Dependence makes the true quantile smaller; heavy tails make it larger.
        """
        d = len(self.mean)
        each = 0.95 ** (1 / (d + d * (d + 1) // 2))
        return student_quantile((1 + each) / 2, self.degrees)

    def __str__(self) -> str:
        return (
            f"means within {self.mean_z:.2f} and covariances within {self.cov_z:.2f} standard errors "
            f"({self.z_floor:.2f} at 95 % if equal)"
        )


@checked
def moments(x: Tensor, y: Tensor) -> Moments:
    r"""Compare means and covariances: "equal within k standard errors" is ``moments(x, y).max_z < k``.

    .. math::
        \mathrm{Var}(\bar x_i) = \frac{c_{ii}}{N}, \qquad
        \mathrm{Var}(\hat c_{ij}) = \frac{m_{ij} - c_{ij}^2}{N} + \frac{c_{ii} c_{jj} + c_{ij}^2}{N (N - 1)}, \qquad
        m_{ij} = E\left[ (x_i - \bar x_i)^2 (x_j - \bar x_j)^2 \right]

    for each set; exact for any distribution, except that c and m are estimated from the samples. The memory is O(D²).

    Arguments:
        x: Samples, (N, *event), with D numbers in each event.
        y: Samples, (M, *event).

    Returns:
        The differences, y minus x, and their standard errors.

    References:
        | The Advanced Theory of Statistics, vol. 1 (Kendall and Stuart, 1977), chapter 13

    Example:
        >>> import torch
        >>> x = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
        >>> moments(x, x + 1).mean
        tensor([1.], dtype=torch.float64)
        >>> moments(x, x + 1).cov_z
        0.0
    """
    x, y = _pair(x, y)
    (mean_x, mean_var_x, cov_x, cov_var_x), (mean_y, mean_var_y, cov_y, cov_var_y) = _moments(x), _moments(y)
    return Moments(
        mean=mean_y - mean_x,
        mean_se=(mean_var_x + mean_var_y).sqrt(),
        cov=cov_y - cov_x,
        cov_se=(cov_var_x + cov_var_y).sqrt(),
        degrees=min(len(x), len(y)) - 1,
    )


@dataclass(frozen=True)
class Comparison:
    """A metric between two sets of samples, and its distribution for two sets from one distribution.

    Arguments:
        value: Value of the metric.
        floor: Median of the metric under equal distributions.
        floor_high: 95 % quantile of the metric under equal distributions.
        p_value: Probability under equal distributions that the metric is at least `value`.
    """

    value: float
    floor: float
    floor_high: float
    p_value: float

    def __str__(self) -> str:
        return f"{self.value:.4g} (floor {self.floor:.4g}, 95 % below {self.floor_high:.4g}; p = {self.p_value:.3g})"


@checked
def compare(
    metric: Callable[[Tensor, Tensor], float], x: Tensor, y: Tensor, n_permutations: int = 100, seed: int = 0
) -> Comparison:
    r"""Measure a metric and its noise floor by a permutation test.

    If x and y come from one distribution, the labels of the samples are arbitrary. So random labels give further values
    :math:`d_1, \ldots, d_n` of the metric, and

    .. math:: p = \frac{1 + \#\{i : d_i \ge d\}}{1 + n}

    is a valid p-value, :math:`P(p \le a) \le a`, for any N, any M and any metric.

    :func:`energy_distance` and :func:`mmd_rbf` (also in a ``functools.partial`` with keywords) compute all pairs once;
    any other metric is called n + 1 times.

    Arguments:
        metric: Function of two sets of samples that returns a number, large if they differ.
        x: Samples, (N, *event).
        y: Samples, (M, *event).
        n_permutations: Number n of permutations; the smallest possible p-value is 1 / (1 + n).
        seed: Seed of the labels.

    References:
        | Permutation P-values Should Never Be Zero (Phipson and Smyth, 2010), arXiv:1603.05766

    Example:
        >>> from scoresde.noise.keyed import Noise
        >>> x, y = Noise(1).normal((200, 2), draw=0), Noise(2).normal((200, 2), draw=0)
        >>> compare(energy_distance, x, y).p_value > 0.05
        True
        >>> compare(energy_distance, x, y + 1).p_value < 0.05
        True
    """
    flat = _pair(x, y)
    check.integer("n_permutations", n_permutations, at_least=1)
    n, total = len(x), len(x) + len(y)
    keys = _stream(seed, Stream.ORDERS).uniform((n_permutations, total), draw=0, dtype=torch.float64)
    order = torch.cat([torch.arange(total)[None], keys.argsort(dim=1, stable=True)])
    call, options = metric, {}
    if isinstance(metric, functools.partial) and not metric.args:
        call, options = metric.func, metric.keywords
    if call is energy_distance or call is mmd_rbf:
        pool = torch.cat(flat)
        labels = torch.zeros(order.shape, dtype=pool.dtype).scatter_(1, order[:, :n], 1.0).to(pool.device)
        values = _energy(pool, labels) if call is energy_distance else _mmd(pool, labels, **options)
    else:
        pool, order = torch.cat([x, y]), order.to(x.device)
        values = torch.tensor([float(metric(pool[o[:n]], pool[o[n:]])) for o in order], dtype=torch.float64)
    if bool(values.isnan().any()):
        raise ValueError("`metric` must return a number for every labelling of the samples, got nan.")
    value, others = values[0], values[1:]
    slack = 1e-9 * values.abs().max()  # rounding: a labelling that only swaps the sets has the same value
    floor, high = others.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    p = (1 + int((others >= value - slack).sum())) / (1 + n_permutations)
    return Comparison(float(value), floor, high, p)


def _pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Check two sets of samples; return matrices (N, D) and (M, D), translated so that their midrange is 0.

    The metrics are invariant to the translation, and sums and products of numbers near 0 lose fewer digits.
    """
    for name, value in (("x", x), ("y", y)):
        check.state(name, value)
        if len(value) < 2:
            raise ValueError(f"`{name}` must hold at least 2 samples, got {len(value)}, of shape {tuple(value.shape)}.")
        if value.numel() == 0:
            raise ValueError(f"`{name}` must have events of at least one number, got shape {tuple(value.shape)}.")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"`y` must have the event shape of `x`, {tuple(x.shape[1:])}, got {tuple(y.shape[1:])}; "
            f"only the number of samples may differ."
        )
    if x.device != y.device:
        raise ValueError(f"`x` is on {x.device} and `y` on {y.device}; move one of them.")
    for name, value in (("x", x), ("y", y)):
        bad = ~value.detach().isfinite()
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"`{name}` must be finite, got {value[at].item()} at index {at}, one of {int(bad.sum())} such numbers; "
                f"remove these samples."
            )
    dtype = torch.float64 if x.device.type == "cpu" else torch.promote_types(x.dtype, y.dtype)
    x, y = (value.detach().to(dtype).reshape(len(value), -1) for value in (x, y))
    # The midrange of a constant column is exactly that constant, so the column becomes exactly 0.
    middle = torch.minimum(x.amin(0), y.amin(0)) / 2 + torch.maximum(x.amax(0), y.amax(0)) / 2
    return x - middle, y - middle


def _stream(seed: int, stream: int) -> Noise:
    return Noise(check.integer("seed", seed)).fork(stream)


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
        rows = max(1, _CHUNK // (len(z) - start))
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


def _energy(z: Tensor, labels: Tensor) -> Tensor:
    """Energy distance of each labelling, (S,)."""
    xx, xy, yy, n, m = _pair_sums(z, labels, lambda d: d)
    return (2 * xy / (n * m) - xx / n**2 - yy / m**2).clamp_min(0.0)


def _mmd(z: Tensor, labels: Tensor, bandwidth: float | Sequence[float] | None = None) -> Tensor:
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


class _Folds:
    """One set of samples, shuffled and split into folds.

    Arguments:
        z: Samples, (N, D).
        folds: Number of parts; fold f holds out rows [cut[f], cut[f + 1]) of the shuffled samples.
        noise: Source of the shuffle and of the batches.
    """

    def __init__(self, z: Tensor, folds: int, noise: Noise) -> None:
        self.z = z[noise.uniform((1, len(z)), draw=0, dtype=torch.float64)[0].argsort(stable=True).to(z.device)]
        self.cut = [f * len(z) // folds for f in range(folds + 1)]
        self.noise = noise

    def held_out(self, fold: int) -> Tensor:
        """Held-out samples of a fold."""
        return self.z[self.cut[fold] : self.cut[fold + 1]]

    def batches(self, steps: int, size: int) -> Tensor:
        """Rows of the training batches, (steps, folds, size), uniform over the training samples of each fold."""
        start = torch.tensor(self.cut[1:])[:, None]
        length = len(self.z) - torch.tensor(self.cut).diff()[:, None]
        u = self.noise.uniform((steps, len(start), size), draw=1, dtype=torch.float64)
        return ((start + (u * length).long()) % len(self.z)).to(self.z.device)


def _mlp(z: Tensor, net: list[Tensor]) -> Tensor:
    """Logits of class y, (F, B), of samples (F, B, D) by F networks of weights (F, in, out), biases (F, 1, out)."""
    for weight, bias in zip(net[:-2:2], net[1:-2:2], strict=True):
        z = torch.baddbmm(bias, z, weight).relu()
    return torch.baddbmm(net[-1], z, net[-2])[..., 0]


def _train(
    splits: list[_Folds],
    noise: Noise,
    widths: tuple[int, ...],
    folds: int,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
) -> list[Tensor]:
    """Train one network for each fold, all at the same time, without the held-out samples of the fold."""
    device = splits[0].z.device
    net: list[Tensor] = []
    for layer, (a, b) in enumerate(itertools.pairwise(widths)):
        net += [noise.normal((folds, a, b), draw=layer) * math.sqrt(2 / a), torch.zeros(folds, 1, b)]
    net = [p.to(device).requires_grad_() for p in net]
    adam = torch.optim.AdamW(net, lr=lr, weight_decay=weight_decay)
    rows = [split.batches(steps, batch) for split in splits]
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        of_x, of_y = (_mlp(split.z[row[step]], net) for split, row in zip(splits, rows, strict=True))
        softplus = torch.nn.functional.softplus
        loss = (softplus(of_x) + softplus(-of_y)).mean(1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of samples (N, D), each followed by its variance."""
    n = len(x)
    middle = x.amin(0) / 2 + x.amax(0) / 2  # a constant column becomes exactly 0; its mean would round
    x = x - middle
    mean = x.mean(0)
    x = x - mean
    cov = x.T @ x / (n - 1)
    var = cov.diagonal()
    square = x.square()
    leading = (square.T @ square / n - cov.square()).clamp_min(0.0) / n
    return middle + mean, var / n, cov, leading + (var[:, None] * var + cov.square()) / (n * (n - 1))


def _largest_z(difference: Tensor, se: Tensor) -> float:
    """Largest |difference| / se; a difference of 0 counts as 0, also where se = 0."""
    return float(torch.where(difference == 0, 0.0, difference.abs() / se).max())
