"""Numerical building blocks against arithmetic of any precision."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch

from scoresde._numerics import Spline, legendre


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


def test_splines_are_exact_for_cubics_and_smooth() -> None:
    x = torch.tensor([-1.0, -0.2, 0.1, 1.3, 2.0, 2.2], dtype=torch.float64)
    c = torch.tensor([[0.5, -1.0, 0.3, 2.0], [1.0, 0.2, -0.4, 0.1]], dtype=torch.float64)
    at = torch.linspace(-1, 2.2, 41, dtype=torch.float64)

    def cubic(u: torch.Tensor) -> torch.Tensor:
        return torch.stack([u**k for k in range(4)], -1) @ c.T

    def area(u: torch.Tensor) -> torch.Tensor:
        return torch.stack([u ** (k + 1) / (k + 1) for k in range(4)], -1) @ c.T

    spline = Spline(x, cubic(x))
    assert torch.allclose(spline(at), cubic(at), atol=1e-12)
    assert torch.allclose(spline.integral(at), area(at) - area(x[:1]), atol=1e-12)
    assert torch.allclose(Spline(x[:3], x[:3] ** 2)(at[:9]), at[:9] ** 2, atol=1e-12), "three knots give a parabola"
    assert torch.allclose(Spline(x[:2], 3 * x[:2])(at[:9]), 3 * at[:9], atol=1e-12), "two knots give a line"
    rough = Spline(x, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0, 1.0], dtype=torch.float64))
    for k in range(1, 5):
        for order in range(3):  # both sides of a knot: values and derivatives
            sides = []
            for side in (-1e-9, 1e-9):
                u = (x[k] + side).requires_grad_()
                value = rough(u)
                for _ in range(order):
                    (value,) = torch.autograd.grad(value, u, create_graph=True)
                sides.append(value.item())
            assert math.isclose(*sides, rel_tol=1e-5, abs_tol=1e-5), (k, order)


def test_splines_go_on_outside_their_knots() -> None:
    x = torch.linspace(0, 2, 5, dtype=torch.float64)
    for limit in (None, torch.tensor(-1.0, dtype=torch.float64)):
        spline = Spline(x, 1 + x**2, limit)
        u = torch.linspace(-1, 6, 4001, dtype=torch.float64)
        v = spline(u)
        sums = torch.cat([v.new_zeros(1), ((v[1:] + v[:-1]) / 2 * u.diff()).cumsum(0)])
        assert torch.allclose(spline.integral(u) - spline.integral(u[:1]), sums, atol=1e-5)
        assert math.isclose(float(spline(torch.tensor(40.0, dtype=torch.float64))), 5.0 if limit is None else -1.0)
        assert float(spline(torch.tensor(-3.0, dtype=torch.float64))) == 1.0
