"""Kernel distance, precision and recall against sums over pairs that are written out."""

from __future__ import annotations

import itertools

import pytest
import torch

import scoresde as ss
from scoresde.metrics import kid, precision_recall

X = ss.Noise(1).normal((23, 3), draw=0, dtype=torch.float64)
Y = ss.Noise(2).normal((31, 3), draw=0, dtype=torch.float64) + 0.7


def test_kid_is_the_mean_over_pairs() -> None:
    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [sum(k(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (X, Y)]
    across = sum(k(a, b) for a in X for b in Y) / (len(X) * len(Y))
    assert kid(X, Y) == pytest.approx(sum(within) - 2 * across, rel=1e-12)
    assert kid(X + 5, Y + 5) != pytest.approx(kid(X, Y)), "the kernel has an origin, the features must not be moved"


def test_kid_has_no_bias() -> None:
    draws = ss.Noise(3).normal((400, 2, 8, 2), draw=0, dtype=torch.float64)
    values = torch.tensor([kid(x, y) for x, y in draws])
    assert abs(float(values.mean())) < 4 * float(values.std()) / 20
    assert bool((values < 0).any())


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_shares_of_neighbourhoods(k: int) -> None:
    def radius(z: torch.Tensor, i: int) -> float:
        return sorted(float((z[i] - z[j]).norm()) for j in range(len(z)) if j != i)[k - 1]

    in_data = [[float((y - x).norm()) <= radius(X, i) for i, x in enumerate(X)] for y in Y]
    in_samples = [[float((y - x).norm()) <= radius(Y, j) for j, y in enumerate(Y)] for x in X]
    got = precision_recall(X, Y, k)
    assert got.precision == pytest.approx(sum(map(any, in_data)) / len(Y))
    assert got.recall == pytest.approx(sum(map(any, in_samples)) / len(X))
    assert got.density == pytest.approx(sum(map(sum, in_data)) / (k * len(Y)))
    assert got.coverage == pytest.approx(sum(any(row[i] for row in in_data) for i in range(len(X))) / len(X))


def test_equal_sets_overlap_and_distant_ones_do_not() -> None:
    x, y = (ss.Noise(s).normal((2000, 2), draw=0) for s in (4, 5))
    same, far = precision_recall(x, y), precision_recall(x, y + 100)
    assert min(same.precision, same.recall) > 0.95
    assert same.density == pytest.approx(1, abs=0.05)
    assert same.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_a_dropped_mode_costs_recall_and_a_stray_one_precision() -> None:
    two = torch.cat([X, X + 100])
    assert precision_recall(two, X + 0.01, k=3).recall == pytest.approx(0.5, abs=0.05)
    assert precision_recall(X + 0.01, two, k=3).precision == pytest.approx(0.5, abs=0.05)


def test_k_must_leave_a_neighbour() -> None:
    with pytest.raises(ValueError, match="`k` must be less than"):
        precision_recall(X[:4], Y, k=4)
