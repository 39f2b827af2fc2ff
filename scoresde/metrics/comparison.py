r"""A metric beside its noise floor."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.metrics.distances import energy_by_labels, energy_distance, mmd_by_labels, mmd_rbf
from scoresde.metrics.pairs import as_pair, stream_of
from scoresde.noise.streams import Stream

__all__ = ["Comparison", "compare"]


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
    flat = as_pair(x, y)
    check.integer("n_permutations", n_permutations, at_least=1)
    n, total = len(x), len(x) + len(y)
    keys = stream_of(seed, Stream.ORDERS).uniform((n_permutations, total), draw=0, dtype=torch.float64)
    order = torch.cat([torch.arange(total)[None], keys.argsort(dim=1, stable=True)])
    call, options = metric, {}
    if isinstance(metric, functools.partial) and not metric.args:
        call, options = metric.func, metric.keywords
    if call is energy_distance or call is mmd_rbf:
        pool = torch.cat(flat)
        labels = torch.zeros(order.shape, dtype=pool.dtype).scatter_(1, order[:, :n], 1.0).to(pool.device)
        values = energy_by_labels(pool, labels) if call is energy_distance else mmd_by_labels(pool, labels, **options)
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
