"""Numerical building blocks against arithmetic of any precision."""

from __future__ import annotations

import mpmath as mp
import pytest
import torch

from scoresde._numerics import legendre


@pytest.mark.parametrize("n", [3, 8, 64, 80])
def test_gauss_legendre_keeps_its_digits_at_both_ends(n: int) -> None:
    nodes, weights = legendre(n)
    with mp.workdps(40):
        for i in sorted({0, 1, n // 2, n - 2, n - 1}):
            x = mp.findroot(lambda v: mp.legendre(n, v), 2 * mp.mpf(float(nodes[i])) - 1)
            slope = n * (x * mp.legendre(n, x) - mp.legendre(n - 1, x)) / (x**2 - 1)
            weight = 1 / ((1 - x**2) * slope**2)
            assert abs(mp.mpf(float(nodes[i])) / ((1 + x) / 2) - 1) < 1e-14, i
            assert abs(mp.mpf(float(weights[i])) / weight - 1) < 1e-14, i


def test_gauss_legendre_is_exact_for_polynomials() -> None:
    nodes, weights = legendre(8)
    for degree in range(16):
        assert float(weights @ nodes**degree) == pytest.approx(1 / (degree + 1), rel=1e-14)
    assert nodes.dtype == torch.float64 and bool((nodes.diff() > 0).all())
