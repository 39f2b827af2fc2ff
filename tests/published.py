"""Published sampler updates, re-typed from their equations, as oracles for the tests of scoresde.

Nothing here imports scoresde. Every public function has the form

    name(D, x, t, alpha, sigma, **options) -> Tensor          # or the list of states at t with trajectory=True

`t` is a 1-D float64 tensor of n + 1 decreasing times; `alpha(t)`, `sigma(t)` are functions float -> float;
`D(x, t)` is the data prediction E[x0 | x_t] (noise prediction: (x - alpha D) / sigma); `x` is the state at t[0].
Notation: lam = log(alpha / sigma), rho = sigma / alpha, h = lam_t - lam_s, from s to t.

Common options
    z                  normals, consumed in the order in which the published algorithm draws them
    start              exact states at t[0], ..., t[k]: a multistep rule then begins at t[k] with full history
    lower_order_final  lower the order over the last steps, as public multistep code does

A leg into sigma = 0 is the first-order step (it returns alpha_t * D), as in public code, except where the public code
keeps the full formula there: lms, deis_rhoab, deis_tab, ipndm, ipndm_v (all with `denoise_last=True` for the
first-order step), pndm, plms, gradient_estimation.
Where a paper's or a public code's formula misses its order, the formula as printed and the corrected one are both
here, behind an option named in the docstring. "Order" is the one measured in tests/test_published_oracles.py, on
Gaussian data and on a mixture. Equation numbers are given where they are certain; formulas that no paper text was at
hand for were checked against two public codes, or one and an equality with another rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch

Tensor = torch.Tensor
Model = Callable[[Tensor, float], Tensor]
Scalar = Callable[[float], float]


# ---------------------------------------------------------------------------------------------------------------------
# Shared helpers
# ---------------------------------------------------------------------------------------------------------------------


class _Path:
    """The process: alpha, sigma, lam, rho as functions of time, their values on the grid, and the inverse of rho."""

    def __init__(self, t: Tensor, alpha: Scalar, sigma: Scalar):
        self.alpha: Scalar = lambda u: float(alpha(u))
        self.sigma: Scalar = lambda u: float(sigma(u))
        self.t = [float(u) for u in t]
        self.n = len(self.t) - 1
        self.a = [self.alpha(u) for u in self.t]
        self.s = [self.sigma(u) for u in self.t]
        self.rho = [s / a for a, s in zip(self.a, self.s, strict=True)]
        self.lam = [_lam(a, s) for a, s in zip(self.a, self.s, strict=True)]

    def lam_at(self, u: float) -> float:
        return _lam(self.alpha(u), self.sigma(u))

    def rho_at(self, u: float) -> float:
        a = self.alpha(u)
        return self.sigma(u) / a if a > 0 else math.inf

    def time(self, rho: float) -> float:
        """The time at which sigma / alpha = rho, by bisection to the last bit."""
        lo, hi = 0.0, self.t[0]
        while self.rho_at(hi) < rho:
            lo, hi = hi, 2 * hi
        while lo < (mid := 0.5 * (lo + hi)) < hi:
            lo, hi = (lo, mid) if self.rho_at(mid) > rho else (mid, hi)
        return mid

    def time_at_lam(self, lam: float) -> float:
        return self.time(math.exp(-lam))

    def eps(self, D: Model) -> Model:
        """Noise prediction."""
        return lambda x, u: (x - self.alpha(u) * D(x, u)) / self.sigma(u)


def _lam(a: float, s: float) -> float:
    return math.log(a) - math.log(s) if s > 0 else math.inf


def _phi(k: int, z: float) -> float:
    """phi_k(z) = int_0^1 exp((1 - u) z) u^(k-1) / (k-1)! du;  phi_0 = exp,  phi_{k+1} = (phi_k - 1/k!) / z."""
    if k == 0:
        return math.exp(z)
    if abs(z) < 2:
        term, total = 1.0 / math.factorial(k), 0.0
        for j in range(1, 40):
            total += term
            term *= z / (k + j)
            if abs(term) < 1e-18:
                break
        return total
    if k == 1:
        return math.expm1(z) / z
    return (_phi(k - 1, z) - 1 / math.factorial(k - 1)) / z


_GAUSS = np.polynomial.legendre.leggauss(32)


def _integral(f: Callable[[np.ndarray], np.ndarray], lo: float, hi: float) -> float:
    """int_lo^hi f by 32 Gauss-Legendre nodes (exact to rounding for what is integrated here)."""
    u, w = _GAUSS
    return float(0.5 * (hi - lo) * np.sum(w * f(lo + 0.5 * (hi - lo) * (u + 1))))


def _lagrange(nodes: Sequence[float], j: int, u: np.ndarray) -> np.ndarray:
    """The Lagrange basis polynomial that is 1 at nodes[j], 0 at the others."""
    out = np.ones_like(u)
    for k, c in enumerate(nodes):
        if k != j:
            out = out * (u - c) / (nodes[j] - c)
    return out


def _lagrange_coefficients(nodes: Sequence[float], j: int) -> list[float]:
    """The same polynomial by its coefficients, constant term first."""
    out = [1.0]
    for k, c in enumerate(nodes):
        if k != j:
            d = nodes[j] - c
            out = [(a - c * b) / d for a, b in zip([0.0, *out], [*out, 0.0], strict=True)]
    return out


def _lagrange_weights(nodes: Sequence[float], lo: float, hi: float, kernel=lambda u: 1.0) -> list[float]:
    """int_lo^hi kernel(u) l_j(u) du for each basis polynomial l_j."""
    return [_integral(lambda u, j=j: kernel(u) * _lagrange(nodes, j, u), lo, hi) for j in range(len(nodes))]


def _dot(weights: Iterable[float], values: Iterable[Tensor]) -> Tensor | float:
    """sum_j w_j v_j, over the shorter of the two."""
    return sum(w * v for w, v in zip(weights, values, strict=False))


def _newest(outs: list[Tensor], k: int) -> list[Tensor]:
    """The last k values, newest first."""
    return outs[: -k - 1 : -1]


def _singlestep(step, x: Tensor, n: int, trajectory: bool):
    xs = [x]
    for i in range(n):
        xs.append(step(i, xs[-1]))
    return xs if trajectory else xs[-1]


def _multistep(model, step, x, p: _Path, order: int, start, lower_order_final, trajectory, denoise_last=True):
    """The loop of public multistep code: order 1, 2, ... until `order`; one evaluation per step, at the new state.

    `step(i, k, x, outs)` is the order-k update from t[i] to t[i+1]; outs[-1] is the model at t[i].
    """
    xs = [x] if start is None else list(start)
    outs = [model(y, u) for y, u in zip(xs, p.t, strict=False)]
    for i in range(len(xs) - 1, p.n):
        k = min(order, i + 1, p.n - i) if lower_order_final else min(order, i + 1)
        xs.append(step(i, 1 if p.s[i + 1] == 0 and denoise_last else k, xs[-1], outs))
        if i + 1 < p.n:
            outs.append(model(xs[-1], p.t[i + 1]))
    return xs if trajectory else xs[-1]


# ---------------------------------------------------------------------------------------------------------------------
# 1. DDIM, DDPM
# ---------------------------------------------------------------------------------------------------------------------


def ddim(D, x, t, alpha, sigma, *, eta=0.0, z=None, trajectory=False):
    """DDIM, Song et al. arXiv:2010.02502 eq. (12) with sigma_tau of eq. (16), for any (alpha, sigma).

    x_t = alpha_t x0 + sqrt(sigma_t^2 - c^2) eps + c z,   c^2 = eta^2 sigma_t^2 / sigma_s^2 (sigma_s^2 -
    (alpha_s / alpha_t)^2 sigma_t^2); for VP this is eq. (16), eta = 1 is DDPM. eta = 0: order 1.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z or ())

    def step(i, x):
        d = D(x, p.t[i])
        eps = (x - p.a[i] * d) / p.s[i]
        forward_var = p.s[i] ** 2 - (p.a[i] / p.a[i + 1]) ** 2 * p.s[i + 1] ** 2
        c = eta * p.s[i + 1] / p.s[i] * math.sqrt(forward_var)
        mean = p.a[i + 1] * d + math.sqrt(max(p.s[i + 1] ** 2 - c**2, 0.0)) * eps
        return mean + c * next(noise) if eta else mean

    return _singlestep(step, x, p.n, trajectory)


def ddpm(D, x, t, alpha, sigma, *, z, variance="small", trajectory=False):
    """DDPM ancestral sampling, Ho et al. arXiv:2006.11239 eq. (6)-(7), Alg. 2, for any (alpha, sigma).

    With a = alpha_s / alpha_t and beta = sigma_s^2 - a^2 sigma_t^2 (VP: 1 - a^2): posterior mean
    (alpha_t beta x0 + a sigma_t^2 x) / sigma_s^2, variance beta sigma_t^2 / sigma_s^2 ("small") or beta ("large").
    "large" adds too much noise at finite step size (first order in the step); no noise into sigma = 0.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def step(i, x):
        a = p.a[i] / p.a[i + 1]
        beta = p.s[i] ** 2 - a**2 * p.s[i + 1] ** 2
        mean = (p.a[i + 1] * beta * D(x, p.t[i]) + a * p.s[i + 1] ** 2 * x) / p.s[i] ** 2
        var = beta * p.s[i + 1] ** 2 / p.s[i] ** 2 if variance == "small" else beta
        return mean + (math.sqrt(var) if p.s[i + 1] > 0 else 0.0) * next(noise)

    return _singlestep(step, x, p.n, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 2. DPM-Solver, single step, noise prediction
# ---------------------------------------------------------------------------------------------------------------------


def _dpm_step_1(eps, p, x, s, t):
    """arXiv:2206.00927 eq. (3.7), with sigma_t (e^h - 1) = alpha_t sigma_s / alpha_s - sigma_t: sigma_t may be 0."""
    a_s, s_s, a_t, s_t = p.alpha(s), p.sigma(s), p.alpha(t), p.sigma(t)
    return a_t / a_s * x - (a_t * s_s / a_s - s_t) * eps(x, s)


def _dpm_step_2(eps, p, x, s, t, r1=0.5, solver_type="dpmsolver"):
    """arXiv:2206.00927 Alg. 1 (r1 = 1/2), App. D for any r1; "taylor" as in the public code."""
    lam_s, h = p.lam_at(s), p.lam_at(t) - p.lam_at(s)
    s1 = p.time_at_lam(lam_s + r1 * h)
    e_s = eps(x, s)
    u = p.alpha(s1) / p.alpha(s) * x - p.sigma(s1) * math.expm1(r1 * h) * e_s
    e_1 = eps(u, s1)
    base = p.alpha(t) / p.alpha(s) * x - p.sigma(t) * math.expm1(h) * e_s
    if solver_type == "dpmsolver":
        return base - p.sigma(t) / (2 * r1) * math.expm1(h) * (e_1 - e_s)
    return base - p.sigma(t) / r1 * h * _phi(2, h) * (e_1 - e_s)


def _dpm_step_3(eps, p, x, s, t, r1=1 / 3, r2=2 / 3, solver_type="dpmsolver"):
    """arXiv:2206.00927 Alg. 2, App. D; "taylor" as in the public code (there with the factor 2 in D2)."""
    lam_s, h = p.lam_at(s), p.lam_at(t) - p.lam_at(s)
    s1, s2 = p.time_at_lam(lam_s + r1 * h), p.time_at_lam(lam_s + r2 * h)
    e_s = eps(x, s)
    u1 = p.alpha(s1) / p.alpha(s) * x - p.sigma(s1) * math.expm1(r1 * h) * e_s
    D1 = eps(u1, s1) - e_s
    u2 = (
        p.alpha(s2) / p.alpha(s) * x
        - p.sigma(s2) * math.expm1(r2 * h) * e_s
        - p.sigma(s2) * r2 / r1 * (r2 * h * _phi(2, r2 * h)) * D1
    )
    D2 = eps(u2, s2) - e_s
    base = p.alpha(t) / p.alpha(s) * x - p.sigma(t) * math.expm1(h) * e_s
    if solver_type == "dpmsolver":
        return base - p.sigma(t) / r2 * (h * _phi(2, h)) * D2
    slope = (r2 * D1 / r1 - r1 * D2 / r2) / (r2 - r1)
    curve = 2 * (D2 / r2 - D1 / r1) / (r2 - r1)
    return base - p.sigma(t) * h * (_phi(2, h) * slope + _phi(3, h) * curve)


def dpm_solver_1(D, x, t, alpha, sigma, *, trajectory=False):
    """DPM-Solver-1, Lu et al. arXiv:2206.00927 eq. (3.7) = DDIM. Order 1."""
    p = _Path(t, alpha, sigma)
    return _singlestep(lambda i, x: _dpm_step_1(p.eps(D), p, x, p.t[i], p.t[i + 1]), x, p.n, trajectory)


def dpm_solver_2(D, x, t, alpha, sigma, *, r1=0.5, solver_type="dpmsolver", trajectory=False):
    """DPM-Solver-2, Lu et al. arXiv:2206.00927 Alg. 1 (r1 = 1/2), App. D. Two evaluations a step. Order 2."""
    p = _Path(t, alpha, sigma)

    def step(i, x):
        s, u = p.t[i], p.t[i + 1]
        return (
            _dpm_step_1(p.eps(D), p, x, s, u) if p.s[i + 1] == 0 else _dpm_step_2(p.eps(D), p, x, s, u, r1, solver_type)
        )

    return _singlestep(step, x, p.n, trajectory)


def dpm_solver_3(D, x, t, alpha, sigma, *, r1=1 / 3, r2=2 / 3, solver_type="dpmsolver", trajectory=False):
    """DPM-Solver-3, Lu et al. arXiv:2206.00927 Alg. 2, App. D. Three evaluations a step.

    Order 3 with r2 = 2/3 only, else 2, for both types: "dpmsolver" has one weight for the second moment, "taylor" a
    weight for the second-order stage u1 that vanishes (h -> 0) only there.
    """
    p = _Path(t, alpha, sigma)

    def step(i, x):
        s, u = p.t[i], p.t[i + 1]
        return (
            _dpm_step_1(p.eps(D), p, x, s, u)
            if p.s[i + 1] == 0
            else _dpm_step_3(p.eps(D), p, x, s, u, r1, r2, solver_type)
        )

    return _singlestep(step, x, p.n, trajectory)


def _fast_orders(steps: int, order: int) -> list[int]:
    """Orders of the steps for `steps` evaluations, arXiv:2206.00927 (order 3) and public code (order 2)."""
    if order == 1:
        return [1] * steps
    if order == 2:
        return [2] * (steps // 2) + [1] * (steps % 2)
    m = steps // 3 + 1
    return [3] * (m - 2) + [2, 1] if steps % 3 == 0 else [3] * (m - 1) + [steps % 3]


def dpm_solver_fast(
    D, x, t, alpha, sigma, *, order=3, steps=None, prediction="noise", solver_type="dpmsolver", trajectory=False
):
    """DPM-Solver-fast: single-step orders mixed so that exactly `steps` evaluations are used, arXiv:2206.00927.

    steps=None: t has steps + 1 times and every evaluation is at one of them (public code, uniform time: the r's
    come from the grid). Otherwise t holds the outer times and r1, r2 are 1/2 or (1/3, 2/3) (uniform lam; k-diffusion).
    The last steps are of lower order; one order-1 leg caps the order at 2.
    `prediction="data"` is the same mixing of DPM-Solver++ steps. Not to sigma = 0.
    """
    p = _Path(t, alpha, sigma)
    orders = _fast_orders(p.n if steps is None else steps, order)
    ends = np.cumsum([0, *orders]) if steps is None else np.arange(len(orders) + 1)
    assert ends[-1] == p.n, f"{p.n} legs given, {ends[-1]} needed"
    noise = prediction == "noise"
    model = p.eps(D) if noise else D
    step_2, step_3 = (_dpm_step_2, _dpm_step_3) if noise else (_dpmpp_step_2, _dpmpp_step_3)

    def step(j, x):
        i, k = int(ends[j]), int(ends[j + 1])
        s, u = p.t[i], p.t[k]
        r = [(p.lam[m] - p.lam[i]) / (p.lam[k] - p.lam[i]) for m in range(i + 1, k)]
        if orders[j] == 1:
            return (_dpm_step_1 if noise else _dpmpp_step_1)(model, p, x, s, u)
        if orders[j] == 2:
            return step_2(model, p, x, s, u, *(r or [0.5]), solver_type)
        return step_3(model, p, x, s, u, *(r or [1 / 3, 2 / 3]), solver_type)

    return _singlestep(step, x, len(orders), trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 3. DPM-Solver, multistep, noise prediction
# ---------------------------------------------------------------------------------------------------------------------


def dpm_solver_2m(
    D, x, t, alpha, sigma, *, solver_type="dpmsolver", start=None, lower_order_final=False, trajectory=False
):
    """Multistep DPM-Solver-2 in noise prediction, public code of arXiv:2211.01095 (dpm-solver; diffusers "dpmsolver").

    solver_type "dpmsolver" (diffusers "midpoint") or "taylor" ("heun"). Order 2.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        if k == 1:
            a = p.a[i + 1] / p.a[i]
            return a * x - (a * p.s[i] - p.s[i + 1]) * outs[-1]
        h, h0 = p.lam[i + 1] - p.lam[i], p.lam[i] - p.lam[i - 1]
        D1 = (h / h0) * (outs[-1] - outs[-2])
        x = p.a[i + 1] / p.a[i] * x - p.s[i + 1] * math.expm1(h) * outs[-1]
        if solver_type == "dpmsolver":
            return x - 0.5 * p.s[i + 1] * math.expm1(h) * D1
        return x - p.s[i + 1] * h * _phi(2, h) * D1

    return _multistep(p.eps(D), step, x, p, 2, start, lower_order_final, trajectory)


def _differences(p: _Path, i: int, outs: list[Tensor]) -> tuple[Tensor, Tensor]:
    """D1 ~ h f', D2 = h^2 f'' / 2 (a divided difference) at lam_i from three values, as in the public code."""
    h = p.lam[i + 1] - p.lam[i]
    r0, r1 = (p.lam[i] - p.lam[i - 1]) / h, (p.lam[i - 1] - p.lam[i - 2]) / h
    D1_0, D1_1 = (outs[-1] - outs[-2]) / r0, (outs[-2] - outs[-3]) / r1
    return D1_0 + r0 / (r0 + r1) * (D1_0 - D1_1), (D1_0 - D1_1) / (r0 + r1)


def dpm_solver_3m(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    second_derivative=1,
    solver_type="dpmsolver",
    start=None,
    lower_order_final=False,
    trajectory=False,
):
    """Multistep DPM-Solver-3 in noise prediction, public code of arXiv:2211.01095 (dpm-solver, diffusers).

    The code multiplies phi_3 by the divided difference, half the second derivative: second_derivative=1 is as
    published, order 2; second_derivative=2 is correct, order 3 (with exact `start`; the own start, one first-order
    step, gives order 2). `solver_type` is that of the order-2 start-up step.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        if k == 1:
            a = p.a[i + 1] / p.a[i]
            return a * x - (a * p.s[i] - p.s[i + 1]) * outs[-1]
        h = p.lam[i + 1] - p.lam[i]
        x = p.a[i + 1] / p.a[i] * x - p.s[i + 1] * math.expm1(h) * outs[-1]
        if k == 2:
            D1 = h / (p.lam[i] - p.lam[i - 1]) * (outs[-1] - outs[-2])
            half = 0.5 * math.expm1(h) if solver_type == "dpmsolver" else h * _phi(2, h)
            return x - p.s[i + 1] * half * D1
        D1, D2 = _differences(p, i, outs)
        return x - p.s[i + 1] * h * (_phi(2, h) * D1 + second_derivative * _phi(3, h) * D2)

    return _multistep(p.eps(D), step, x, p, 3, start, lower_order_final, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 4. DPM-Solver++, data prediction
# ---------------------------------------------------------------------------------------------------------------------


def _dpmpp_step_1(D, p, x, s, t):
    """arXiv:2211.01095 eq. (8) with k = 1."""
    h = p.lam_at(t) - p.lam_at(s)
    return p.sigma(t) / p.sigma(s) * x - p.alpha(t) * math.expm1(-h) * D(x, s)


def _dpmpp_step_2(D, p, x, s, t, r1=0.5, solver_type="dpmsolver"):
    """arXiv:2211.01095 Alg. 1."""
    lam_s, h = p.lam_at(s), p.lam_at(t) - p.lam_at(s)
    s1 = p.time_at_lam(lam_s + r1 * h)
    d_s = D(x, s)
    u = p.sigma(s1) / p.sigma(s) * x - p.alpha(s1) * math.expm1(-r1 * h) * d_s
    d_1 = D(u, s1)
    base = p.sigma(t) / p.sigma(s) * x - p.alpha(t) * math.expm1(-h) * d_s
    if solver_type == "dpmsolver":
        return base - p.alpha(t) * math.expm1(-h) / (2 * r1) * (d_1 - d_s)
    return base + p.alpha(t) / r1 * (h * _phi(2, -h)) * (d_1 - d_s)


def _dpmpp_step_3(D, p, x, s, t, r1=1 / 3, r2=2 / 3, solver_type="dpmsolver"):
    """Public code of arXiv:2211.01095; note (e^-h - 1) / h + 1 = h phi_2(-h)."""
    lam_s, h = p.lam_at(s), p.lam_at(t) - p.lam_at(s)
    s1, s2 = p.time_at_lam(lam_s + r1 * h), p.time_at_lam(lam_s + r2 * h)
    d_s = D(x, s)
    u1 = p.sigma(s1) / p.sigma(s) * x - p.alpha(s1) * math.expm1(-r1 * h) * d_s
    D1 = D(u1, s1) - d_s
    u2 = (
        p.sigma(s2) / p.sigma(s) * x
        - p.alpha(s2) * math.expm1(-r2 * h) * d_s
        + p.alpha(s2) * r2 / r1 * (r2 * h * _phi(2, -r2 * h)) * D1
    )
    D2 = D(u2, s2) - d_s
    base = p.sigma(t) / p.sigma(s) * x - p.alpha(t) * math.expm1(-h) * d_s
    if solver_type == "dpmsolver":
        return base + p.alpha(t) / r2 * (h * _phi(2, -h)) * D2
    slope = (r2 * D1 / r1 - r1 * D2 / r2) / (r2 - r1)
    curve = 2 * (D2 / r2 - D1 / r1) / (r2 - r1)
    return base + p.alpha(t) * h * (_phi(2, -h) * slope + _phi(3, -h) * curve)


def dpmpp_1(D, x, t, alpha, sigma, *, trajectory=False):
    """DPM-Solver++ of order 1 = DDIM = exponential Euler (ETD1) in lam, Lu et al. arXiv:2211.01095 eq. (8). Order 1."""
    p = _Path(t, alpha, sigma)
    return _singlestep(lambda i, x: _dpmpp_step_1(D, p, x, p.t[i], p.t[i + 1]), x, p.n, trajectory)


def dpmpp_2s(D, x, t, alpha, sigma, *, r1=0.5, solver_type="dpmsolver", trajectory=False):
    """DPM-Solver++(2S), Lu et al. arXiv:2211.01095 Alg. 1; "taylor" from the public code. Order 2."""
    p = _Path(t, alpha, sigma)

    def step(i, x):
        s, u = p.t[i], p.t[i + 1]
        return _dpmpp_step_1(D, p, x, s, u) if p.s[i + 1] == 0 else _dpmpp_step_2(D, p, x, s, u, r1, solver_type)

    return _singlestep(step, x, p.n, trajectory)


def dpmpp_3s(D, x, t, alpha, sigma, *, r1=1 / 3, r2=2 / 3, solver_type="dpmsolver", trajectory=False):
    """DPM-Solver++(3S), public code of arXiv:2211.01095. Order 3 with r2 = 2/3 only, else 2 (as dpm_solver_3).

    (diffusers' singlestep scheduler, "midpoint", uses the order-2 midpoint weight in the inner stage; "heun" is this.)
    """
    p = _Path(t, alpha, sigma)

    def step(i, x):
        s, u = p.t[i], p.t[i + 1]
        return _dpmpp_step_1(D, p, x, s, u) if p.s[i + 1] == 0 else _dpmpp_step_3(D, p, x, s, u, r1, r2, solver_type)

    return _singlestep(step, x, p.n, trajectory)


def dpmpp_2m(D, x, t, alpha, sigma, *, solver_type="dpmsolver", start=None, lower_order_final=False, trajectory=False):
    """DPM-Solver++(2M), Lu et al. arXiv:2211.01095 Alg. 2; "taylor" (diffusers "heun") from public code. Order 2."""
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        h = p.lam[i + 1] - p.lam[i]
        base = p.s[i + 1] / p.s[i] * x - p.a[i + 1] * math.expm1(-h) * outs[-1]
        if k == 1:
            return base
        D1 = h / (p.lam[i] - p.lam[i - 1]) * (outs[-1] - outs[-2])
        if solver_type == "dpmsolver":
            return base - 0.5 * p.a[i + 1] * math.expm1(-h) * D1
        return base + p.a[i + 1] * h * _phi(2, -h) * D1

    return _multistep(D, step, x, p, 2, start, lower_order_final, trajectory)


def dpmpp_3m(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    second_derivative=1,
    solver_type="dpmsolver",
    start=None,
    lower_order_final=False,
    trajectory=False,
):
    """DPM-Solver++(3M), public code of arXiv:2211.01095 (dpm-solver, diffusers, k-diffusion's 3M at eta = 0).

    second_derivative=1 as published (half the second derivative): order 2. second_derivative=2: order 3 with exact
    `start`; its own start (one first-order step) limits it to 2. `solver_type` is that of the order-2 start-up step.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        h = p.lam[i + 1] - p.lam[i]
        base = p.s[i + 1] / p.s[i] * x - p.a[i + 1] * math.expm1(-h) * outs[-1]
        if k == 1:
            return base
        if k == 2:
            D1 = h / (p.lam[i] - p.lam[i - 1]) * (outs[-1] - outs[-2])
            half = -0.5 * math.expm1(-h) if solver_type == "dpmsolver" else h * _phi(2, -h)
            return base + p.a[i + 1] * half * D1
        D1, D2 = _differences(p, i, outs)
        return base + p.a[i + 1] * h * (_phi(2, -h) * D1 + second_derivative * _phi(3, -h) * D2)

    return _multistep(D, step, x, p, 3, start, lower_order_final, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 5. UniPC
# ---------------------------------------------------------------------------------------------------------------------


def unipc(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    order=2,
    variant="bh2",
    prediction="data",
    corrector=True,
    lower_order_final=True,
    published_bug=False,
    start=None,
    trajectory=False,
):
    """UniPC-p (UniP-p, UniC-p), Zhao et al. arXiv:2302.04867; the driver is that of the public code; any order p >= 1.

    variant: "bh1" (B = h), "bh2" (B = e^h - 1) or "vary_coeff" (appendix: varying coefficients); data prediction uses
    -h. The model is not evaluated again after the correction; no correction at the last step; the p = 2 predictor and
    the p = 1 corrector of the bh variants use the weight 1/2. corrector=False is UniP-p alone.
    Order p + 1 with corrector and exact `start` (own start: at most 3), p without; lower_order_final=True (the public
    default) ends with a first-order leg and so caps the order at 2. `published_bug` (variant "vary_coeff"): the public
    corrector uses a leftover loop index and drops the last row; order 1 for p = 2, 3.
    """
    p = _Path(t, alpha, sigma)
    data = prediction == "data"
    model = D if data else p.eps(D)
    xs = [x] if start is None else list(start)
    outs = [model(y, u) for y, u in zip(xs, p.t, strict=False)]

    def base(i, x):
        if data:
            return p.s[i + 1] / p.s[i] * x - p.a[i + 1] * math.expm1(-(p.lam[i + 1] - p.lam[i])) * outs[-1]
        a = p.a[i + 1] / p.a[i]
        return a * x - (a * p.s[i] - p.s[i + 1]) * outs[-1]

    def residual(i, k, new=None):
        """sum_j rho_j D_j / B terms: predictor from k - 1 old differences, corrector with the new one (r = 1) too."""
        h = p.lam[i + 1] - p.lam[i]
        hh = -h if data else h
        r = [(p.lam[i - j] - p.lam[i]) / h for j in range(1, k)]
        diff = [(outs[-1 - j] - outs[-1]) / r[j - 1] for j in range(1, k)]
        if new is not None:
            r, diff = [*r, 1.0], [*diff, new - outs[-1]]
        q = len(r)
        if q == 0:
            return 0.0
        h_phi = [hh * _phi(m + 1, hh) for m in range(1, q + 1)]  # h phi_2, h phi_3, ...
        if variant == "vary_coeff":
            A = np.linalg.inv(np.array([[r[j] ** m / math.factorial(m + 1) for m in range(q)] for j in range(q)]))
            if published_bug and new is not None:
                leftover = max(q - 2, 0)
                rows = sum(h_phi[m] * _dot(A[m][:-1], diff[:-1]) for m in range(q - 1))
                return rows + h_phi[q - 1] * A[leftover][-1] * diff[-1]
            return sum(h_phi[m] * _dot(A[m], diff) for m in range(q))
        B = hh if variant == "bh1" else math.expm1(hh)
        R = np.array([[rj**m for rj in r] for m in range(q)])
        b = np.array([math.factorial(m + 1) * h_phi[m] / B for m in range(q)])
        weights = [0.5] if q == 1 else np.linalg.solve(R, b)
        return B * _dot(weights, diff)

    for i in range(len(xs) - 1, p.n):
        k = min(order, i + 1, p.n - i) if lower_order_final else min(order, i + 1)
        k = 1 if p.s[i + 1] == 0 else k
        scale = p.a[i + 1] if data else p.s[i + 1]
        x_base = base(i, xs[-1])
        x_new = x_base if p.s[i + 1] == 0 else x_base - scale * residual(i, k)
        if i + 1 < p.n:
            new = model(x_new, p.t[i + 1])
            if corrector:
                x_new = x_base - scale * residual(i, k, new)
            outs.append(new)
        xs.append(x_new)
    return xs if trajectory else xs[-1]


# ---------------------------------------------------------------------------------------------------------------------
# 6. Karras et al. 2022, k-diffusion
# ---------------------------------------------------------------------------------------------------------------------


def edm_heun(D, x, t, alpha, sigma, *, step=1.0, trajectory=False):
    """EDM Heun, Karras et al. arXiv:2206.00364 Alg. 1 with sigma(t) = t, s = 1, i.e. in rho on y = x / alpha.

    `step` is alpha of the 2nd-order family, App. D.2 Alg. 3: probe at rho + step * drho, weights 1 - 1 / (2 step) and
    1 / (2 step); 1 is Heun, 1/2 the midpoint, 2/3 Ralston. Euler into sigma = 0. Order 2 (step = 1/2 on Gaussian data:
    3, because there dy/drho = rho y / (c + rho^2)).
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)

    def rule(i, x):
        y, d_rho = x / p.a[i], p.rho[i + 1] - p.rho[i]
        d = eps(x, p.t[i])
        if p.s[i + 1] == 0:
            return p.a[i + 1] * (y + d_rho * d)
        u = p.t[i + 1] if step == 1 else p.time(p.rho[i] + step * d_rho)
        d_prime = eps(p.alpha(u) * (y + step * d_rho * d), u)
        return p.a[i + 1] * (y + d_rho * ((1 - 1 / (2 * step)) * d + 1 / (2 * step) * d_prime))

    return _singlestep(rule, x, p.n, trajectory)


def _derivative(f: Scalar, u: float) -> float:
    """Sixth-order central difference: 1e-12 for the schedules of the tests."""
    e = 2e-3 * u
    d1, d2, d3 = (f(u + k * e) - f(u - k * e) for k in (1, 2, 3))
    return (45 * d1 - 9 * d2 + d3) / (60 * e)


def edm_heun_in_t(D, x, t, alpha, sigma, *, step=1.0, dalpha=None, dsigma=None, trajectory=False):
    """EDM Alg. 1 for general sigma(t), s(t) (and Alg. 3 with `step`), Karras et al. arXiv:2206.00364, stepping in t.

    dx/dt = (sig'/sig + s'/s) x - sig' s / sig D with s = alpha, sig = sigma / alpha. Derivatives of alpha and sigma
    may be given, otherwise are numerical. Euler into sigma = 0. Order 2.
    """
    p = _Path(t, alpha, sigma)

    def slope(x, u):
        a, s = p.alpha(u), p.sigma(u)
        da = dalpha(u) if dalpha else _derivative(p.alpha, u)
        ds = dsigma(u) if dsigma else _derivative(p.sigma, u)
        rho, d_rho = s / a, (ds * a - s * da) / a**2
        return (d_rho / rho + da / a) * x - d_rho * a / rho * D(x, u)

    def rule(i, x):
        s, h = p.t[i], p.t[i + 1] - p.t[i]
        d = slope(x, s)
        if p.s[i + 1] == 0:
            return x + h * d
        d_prime = slope(x + step * h * d, s + step * h)
        return x + h * ((1 - 1 / (2 * step)) * d + 1 / (2 * step) * d_prime)

    return _singlestep(rule, x, p.n, trajectory)


def edm_stochastic(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    z,
    s_churn=0.0,
    s_min=0.0,
    s_max=math.inf,
    s_noise=1.0,
    second_order=True,
    trajectory=False,
):
    """EDM stochastic sampler, Karras et al. arXiv:2206.00364 Alg. 2, in rho on y = x / alpha; one normal a step.

    second_order=False is k-diffusion's / diffusers' Euler with churn. A normal is consumed also where gamma = 0.
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)
    noise = iter(z)

    def rule(i, x):
        gamma = min(s_churn / p.n, math.sqrt(2) - 1) if s_min <= p.rho[i] <= s_max else 0.0
        rho_hat = p.rho[i] * (1 + gamma)
        y = x / p.a[i] + math.sqrt(rho_hat**2 - p.rho[i] ** 2) * s_noise * next(noise)
        u = p.time(rho_hat) if gamma else p.t[i]
        d = eps(p.alpha(u) * y, u)
        y_next = y + (p.rho[i + 1] - rho_hat) * d
        if second_order and p.s[i + 1] > 0:
            d_prime = eps(p.a[i + 1] * y_next, p.t[i + 1])
            y_next = y + (p.rho[i + 1] - rho_hat) * (d + d_prime) / 2
        return p.a[i + 1] * y_next

    return _singlestep(rule, x, p.n, trajectory)


def dpm_2(D, x, t, alpha, sigma, *, r=0.5, trajectory=False):
    """KDPM2: k-diffusion `sample_dpm_2` (r = 1/2; probe at the geometric mean of the levels), r as in diff-sampler.

    Equal to dpm_solver_2 with r1 = r. (k-diffusion's first version probed at a rho = 3 Karras mean.) Order 2.
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)

    def rule(i, x):
        y, d_rho = x / p.a[i], p.rho[i + 1] - p.rho[i]
        d = eps(x, p.t[i])
        if p.s[i + 1] == 0:
            return p.a[i + 1] * (y + d_rho * d)
        rho_mid = p.rho[i + 1] ** r * p.rho[i] ** (1 - r)
        u = p.time(rho_mid)
        d_2 = eps(p.alpha(u) * (y + (rho_mid - p.rho[i]) * d), u)
        return p.a[i + 1] * (y + d_rho * (d_2 / (2 * r) + (1 - 1 / (2 * r)) * d))

    return _singlestep(rule, x, p.n, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 7. Linear multistep in rho, DEIS
# ---------------------------------------------------------------------------------------------------------------------


def lms(D, x, t, alpha, sigma, *, order=4, start=None, lower_order_final=False, denoise_last=False, trajectory=False):
    """k-diffusion `sample_lms` (diffusers LMSDiscrete): y += sum_j eps_j int l_j(rho) drho, y = x / alpha.

    The integral is exact here (k-diffusion: scipy quad, epsrel 1e-4). Order = `order` with exact `start`; the own
    start (one Euler step) limits it to 2.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        nodes = [p.rho[i - j] for j in range(k)]
        weights = _lagrange_weights(nodes, p.rho[i], p.rho[i + 1])
        return p.a[i + 1] * (x / p.a[i] + _dot(weights, _newest(outs, k)))

    return _multistep(p.eps(D), step, x, p, order, start, lower_order_final, trajectory, denoise_last)


def deis_rhoab(
    D, x, t, alpha, sigma, *, degree=3, start=None, lower_order_final=False, denoise_last=False, trajectory=False
):
    """rhoAB-DEIS, Zhang & Chen arXiv:2204.13902, interpolating in rho: `degree` 0-3; = lms(order=degree + 1).

    Written with the closed forms of the polynomial integrals. Public quadrature: left Riemann sum of 1e4 nodes.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        nodes = [p.rho[i - j] - p.rho[i] for j in range(k)]  # in u = rho - rho_i, which keeps the powers small
        d_rho = p.rho[i + 1] - p.rho[i]
        weights = [
            sum(c * d_rho ** (m + 1) / (m + 1) for m, c in enumerate(_lagrange_coefficients(nodes, j)))
            for j in range(k)
        ]
        return p.a[i + 1] * (x / p.a[i] + _dot(weights, _newest(outs, k)))

    return _multistep(p.eps(D), step, x, p, degree + 1, start, lower_order_final, trajectory, denoise_last)


def deis_tab(
    D, x, t, alpha, sigma, *, degree=3, start=None, lower_order_final=False, denoise_last=False, trajectory=False
):
    """tAB-DEIS, Zhang & Chen arXiv:2204.13902: eps interpolated in t, `degree` 0-3, weights
    C_ij = int Psi(t_{i+1}, tau) 1/2 g^2 / sigma l_j(tau) dtau = alpha_{i+1} int l_j(tau) drho(tau).

    By parts, int l drho = l(t_{i+1}) drho - int l'(tau) (rho(tau) - rho_i) dtau, 32 Gauss nodes: exact except on a leg
    ending where rho(t) is not smooth (VP at t = 0). Public codes use Riemann sums of 1e4 nodes, in diff-sampler N
    nodes spaced (end - start) / (N - 1) with dtau = (end - start) / N: relative errors near 1e-4, so their order
    stalls. Order degree + 1 with exact `start`, own start at most 2.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        if k == 1:
            return p.a[i + 1] * (x / p.a[i] + (p.rho[i + 1] - p.rho[i]) * outs[-1])
        nodes = [p.t[i - j] - p.t[i] for j in range(k)]
        dt = p.t[i + 1] - p.t[i]
        u = 0.5 * dt * (_GAUSS[0] + 1)
        rise = np.array([p.rho_at(p.t[i] + v) - p.rho[i] for v in u])
        weights = []
        for j in range(k):
            c = _lagrange_coefficients(nodes, j)
            at_end = sum(c[m] * dt**m for m in range(k))
            slope = sum(m * c[m] * u ** (m - 1) for m in range(1, k))
            by_parts = 0.5 * dt * float(np.sum(_GAUSS[1] * slope * rise))
            weights.append(at_end * (p.rho[i + 1] - p.rho[i]) - by_parts)
        return p.a[i + 1] * (x / p.a[i] + _dot(weights, _newest(outs, k)))

    return _multistep(p.eps(D), step, x, p, degree + 1, start, lower_order_final, trajectory, denoise_last)


def deis_lamab(D, x, t, alpha, sigma, *, order=3, start=None, lower_order_final=False, trajectory=False):
    """log-rho AB DEIS (diffusers DEISMultistep, 1-3; idea of arXiv:2204.13902): y += sum_j eps_j int l_j(log rho) drho.

    Not to sigma = 0 except by the first-order leg. Order = `order` with exact `start`, own start at most 2.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        if k == 1:
            return p.a[i + 1] * (x / p.a[i] + (p.rho[i + 1] - p.rho[i]) * outs[-1])
        nodes = [p.lam[i - j] for j in range(k)]
        weights = _lagrange_weights(nodes, p.lam[i], p.lam[i + 1], lambda u: -np.exp(-u))
        return p.a[i + 1] * (x / p.a[i] + _dot(weights, _newest(outs, k)))

    return _multistep(p.eps(D), step, x, p, order, start, lower_order_final, trajectory)


# c, rows of a, b: the eight tableaux of the public DEIS code (standard ones)
RHO_RK = {
    "1euler": ([0], [[]], [1]),
    "2heun": ([0, 1], [[], [1]], [1 / 2, 1 / 2]),
    "3kutta": ([0, 1 / 2, 1], [[], [1 / 2], [-1, 2]], [1 / 6, 4 / 6, 1 / 6]),
    "3ral": ([0, 1 / 2, 3 / 4], [[], [1 / 2], [0, 3 / 4]], [2 / 9, 1 / 3, 4 / 9]),
    "3heun": ([0, 1 / 3, 2 / 3], [[], [1 / 3], [0, 2 / 3]], [1 / 4, 0, 3 / 4]),
    "3vdh": ([0, 8 / 15, 2 / 3], [[], [8 / 15], [1 / 4, 5 / 12]], [1 / 4, 0, 3 / 4]),
    "3ssprk": ([0, 1, 1 / 2], [[], [1], [1 / 4, 1 / 4]], [1 / 6, 1 / 6, 2 / 3]),
    "4rk": ([0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}


def deis_rhork(D, x, t, alpha, sigma, *, method="3kutta", trajectory=False):
    """rhoRK-DEIS, Zhang & Chen arXiv:2204.13902 section 4 (tableaux RHO_RK): Runge-Kutta on dy/drho = eps, y = x/alpha.

    Order = the number in the name. A stage at sigma = 0 has no eps, so a leg into sigma = 0 is Euler.
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)

    def rule(i, x):
        c, a, b = RHO_RK["1euler" if p.s[i + 1] == 0 else method]
        y, d_rho, k = x / p.a[i], p.rho[i + 1] - p.rho[i], []
        for c_r, row in zip(c, a, strict=True):
            u = p.t[i] if c_r == 0 else p.t[i + 1] if c_r == 1 else p.time(p.rho[i] + c_r * d_rho)
            k.append(eps(p.alpha(u) * (y + d_rho * _dot(row, k)), u))
        return p.a[i + 1] * (y + d_rho * _dot(b, k))

    return _singlestep(rule, x, p.n, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 8. PNDM and its relatives
# ---------------------------------------------------------------------------------------------------------------------

ADAMS_BASHFORTH = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def _transfer(p, x, eps, s, t):
    """The transfer phi(x, eps, s, t) of arXiv:2202.09778 (= DDIM), for any (alpha, sigma)."""
    a = p.alpha(t) / p.alpha(s)
    return a * x - (a * p.sigma(s) - p.sigma(t)) * eps


def pndm(D, x, t, alpha, sigma, *, order=4, trajectory=False):
    """PNDM, Liu et al. arXiv:2202.09778: F-PNDM (order=4: three pseudo Runge-Kutta steps, then linear multistep)
    and S-PNDM (order=2: one pseudo improved Euler step, then (3 e_i - e_{i-1}) / 2).

    Half steps at (s + t) / 2 in time. The combinations assume equal steps in t and are multiplied by the DDIM
    transfer; measured order 2 for both, on smoothly graded grids (1 if step ratios do not tend to 1).
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)
    xs, ets = [x], []
    for i in range(p.n):
        x, s, u = xs[-1], p.t[i], p.t[i + 1]
        mid = 0.5 * (s + u)
        e1 = eps(x, s)
        ets.append(e1)
        if p.s[i + 1] == 0:
            e = _dot(ADAMS_BASHFORTH[order], _newest(ets, order)) if len(ets) >= order else e1
        elif order == 4 and len(ets) < 4:
            e2 = eps(_transfer(p, x, e1, s, mid), mid)
            e3 = eps(_transfer(p, x, e2, s, mid), mid)
            e4 = eps(_transfer(p, x, e3, s, u), u)
            e = (e1 + 2 * e2 + 2 * e3 + e4) / 6
        elif order == 2 and len(ets) < 2:
            e = (e1 + eps(_transfer(p, x, e1, s, u), u)) / 2
        else:
            e = _dot(ADAMS_BASHFORTH[order], _newest(ets, order))
        xs.append(_transfer(p, x, e, s, u))
    return xs if trajectory else xs[-1]


def plms(D, x, t, alpha, sigma, *, trajectory=False):
    """PLMS without Runge-Kutta (latent-diffusion; diffusers PNDM with skip_prk_steps=True): n + 1 evaluations.

    First step: pseudo improved Euler (e(x, s) + e(x', t)) / 2, of which the second is evaluated again at the corrected
    state; then Adams-Bashforth 2, 3, 4 with uniform coefficients and the DDIM transfer. Order 2 as `pndm`.
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)
    xs, ets = [x], []
    for i in range(p.n):
        x, s, u = xs[-1], p.t[i], p.t[i + 1]
        ets.append(eps(x, s))
        if i == 0:
            e = ets[0] if p.s[1] == 0 else (ets[0] + eps(_transfer(p, x, ets[0], s, u), u)) / 2
        else:
            k = min(4, i + 1)
            e = _dot(ADAMS_BASHFORTH[k], _newest(ets, k))
        xs.append(_transfer(p, x, e, s, u))
    return xs if trajectory else xs[-1]


def ipndm(D, x, t, alpha, sigma, *, order=4, start=None, denoise_last=False, trajectory=False):
    """iPNDM, Zhang & Chen arXiv:2204.13902 (public DEIS and diff-sampler code): Adams-Bashforth with uniform
    coefficients, started at order 1, 2, 3; y += drho * sum_j b_j eps_j.

    Nominal orders 3 and 4 are capped at 2 on any grid that is not uniform in rho.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        e = _dot(ADAMS_BASHFORTH[k], _newest(outs, k))
        return p.a[i + 1] * (x / p.a[i] + (p.rho[i + 1] - p.rho[i]) * e)

    return _multistep(p.eps(D), step, x, p, order, start, False, trajectory, denoise_last)


def ipndm_v(D, x, t, alpha, sigma, *, order=4, published=True, start=None, denoise_last=False, trajectory=False):
    """iPNDM-v, variable-step Adams-Bashforth in rho as in diff-sampler (gits / diff-solvers, after arXiv:2204.13902).

    published=True reproduces three slips of the printed coefficients: for 3 and 4, (1 - u v) / 2 where (1 - u) / 2 * v
    is right, u = h_n / (3 (h_n + h_{n-1})), v = h_n (h_n + h_{n-1}) / (h_{n-1} (h_{n-1} + h_{n-2})) (equal for equal
    steps); for 4, a plus for a minus (11/24 for the 9/24 of Adams-Bashforth on equal steps) and a ratio h_{n-1} /
    h_{n-2} for h_{n-2} / h_{n-3}, so that the coefficients do not sum to 1. Measured on smoothly graded grids: 3 ->
    order 3, 4 -> order 2; where step ratios do not tend to 1: 2 and none at all. published=False is exact: `lms`.
    """
    p = _Path(t, alpha, sigma)

    def step(i, k, x, outs):
        h = [p.rho[i + 1] - p.rho[i]] + [p.rho[i - j] - p.rho[i - j - 1] for j in range(k - 1)]  # h_n, h_{n-1}, ...
        c = [1.0, 0.0, 0.0, 0.0]
        if k >= 2:
            c[0] += h[0] / h[1] / 2
            c[1] -= h[0] / h[1] / 2
        if k >= 3:
            u = h[0] / (3 * (h[0] + h[1]))
            v = h[0] * (h[0] + h[1]) / (h[1] * (h[1] + h[2]))
            w = (1 - u * v) / 2 if published else (1 - u) / 2 * v
            g = h[1] / h[2]
            c = [c[0] + w, c[1] - (1 + g) * w, c[2] + g * w, 0.0]
        if k >= 4:
            w = (1 - h[0] / (3 * (h[0] + h[1]))) / 2
            w += (1 if published else -1) * (1 - h[0] / (2 * (h[0] + h[1]))) * h[0] / (6 * (h[0] + h[1] + h[2]))
            w *= h[0] * (h[0] + h[1]) * (h[0] + h[1] + h[2])
            w /= h[1] * (h[1] + h[2]) * (h[1] + h[2] + h[3])
            g, q = h[1] / h[2], h[1] * (h[1] + h[2]) / (h[2] * (h[2] + h[3]))
            last = q * h[1] / h[2] if published else q * h[2] / h[3]
            c = [c[0] + w, c[1] - (1 + g + q) * w, c[2] + (g + q * (1 + h[2] / h[3])) * w, -last * w]
        return p.a[i + 1] * (x / p.a[i] + h[0] * _dot(c[:k], _newest(outs, k)))

    return _multistep(p.eps(D), step, x, p, order, start, False, trajectory, denoise_last)


# ---------------------------------------------------------------------------------------------------------------------
# 9. Exponential Runge-Kutta in lam: dy/dlam = -y + D with y = x / alpha; exp(-h) alpha_t / alpha_s = sigma_t / sigma_s
# ---------------------------------------------------------------------------------------------------------------------


def _exponential_rk(D, x, t, alpha, sigma, tableau, trajectory):
    """One explicit exponential Runge-Kutta rule; tableau(h) -> (c, rows of a, b), the weights containing phi(-c h)."""
    p = _Path(t, alpha, sigma)

    def rule(i, x):
        s, u = p.t[i], p.t[i + 1]
        if p.s[i + 1] == 0:
            return _dpmpp_step_1(D, p, x, s, u)
        h, y, k = p.lam[i + 1] - p.lam[i], x / p.a[i], []
        c, a, b = tableau(h)
        for c_r, row in zip(c, a, strict=True):
            v = s if c_r == 0 else u if c_r == 1 else p.time_at_lam(p.lam[i] + c_r * h)
            k.append(D(p.alpha(v) * (math.exp(-c_r * h) * y + h * _dot(row, k)), v))
        return p.a[i + 1] * (math.exp(-h) * y + h * _dot(b, k))

    return _singlestep(rule, x, p.n, trajectory)


def etd_rk2(D, x, t, alpha, sigma, *, kind="endpoint", trajectory=False):
    """ETD2RK, Cox & Matthews 2002 eq. (22): b = (phi1 - phi2, phi2), probe at the end ("endpoint"; = res_2s(c2=1));
    "midpoint": probe at h/2, b = (0, phi1), the exponential midpoint rule of Hochbruck & Ostermann 2005
    (= dpmpp_2s with r1 = 1/2). Order 2.
    """

    def tableau(h):
        if kind == "midpoint":
            return [0, 1 / 2], [[], [_phi(1, -h / 2) / 2]], [0, _phi(1, -h)]
        return [0, 1], [[], [_phi(1, -h)]], [_phi(1, -h) - _phi(2, -h), _phi(2, -h)]

    return _exponential_rk(D, x, t, alpha, sigma, tableau, trajectory)


def res_2s(D, x, t, alpha, sigma, *, c2=0.5, trajectory=False):
    """RES, second order single step, Zhang et al. arXiv:2308.02157 Alg. 1 / Tab. 3. Order 2 (= dpmpp_2s "taylor")."""

    def tableau(h):
        b2 = _phi(2, -h) / c2
        return [0, c2], [[], [c2 * _phi(1, -c2 * h)]], [_phi(1, -h) - b2, b2]

    return _exponential_rk(D, x, t, alpha, sigma, tableau, trajectory)


def res_3s(D, x, t, alpha, sigma, *, c2=0.5, c3=1.0, gamma_power=2, trajectory=False):
    """RES, third order single step, Zhang et al. arXiv:2308.02157 Tab. 3 (after Hochbruck & Ostermann 2005):
    a32 = gamma c2 phi2(-c2 h) + c3^2 / c2 phi2(-c3 h), b3 = phi2 / (gamma c2 + c3), b2 = gamma b3.

    Third order needs 2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2), so gamma = (3 c3^2 - 2 c3) / (c2 (2 - 3 c2)): order 3.
    RES4LYF and its many copies print 3 c3^3 (gamma_power=3): the same for c3 = 1, otherwise order 2.
    """
    gamma = (3 * c3**gamma_power - 2 * c3) / (c2 * (2 - 3 * c2))

    def tableau(h):
        a32 = gamma * c2 * _phi(2, -c2 * h) + c3**2 / c2 * _phi(2, -c3 * h)
        b3 = _phi(2, -h) / (gamma * c2 + c3)
        a = [[], [c2 * _phi(1, -c2 * h)], [c3 * _phi(1, -c3 * h) - a32, a32]]
        return [0, c2, c3], a, [_phi(1, -h) - (1 + gamma) * b3, gamma * b3, b3]

    return _exponential_rk(D, x, t, alpha, sigma, tableau, trajectory)


def etd_rk4(D, x, t, alpha, sigma, *, kind="cox-matthews", trajectory=False):
    """ETD4RK, Cox & Matthews 2002 eq. (26)-(29), and Krogstad 2005 ETDRK4-B (kind="krogstad"). Order 4.

    (Their stiff orders are 2 and 3, which is no matter over a fixed range of lam.)
    """

    def tableau(h):
        half1, half2, p1, p2, p3 = _phi(1, -h / 2), _phi(2, -h / 2), _phi(1, -h), _phi(2, -h), _phi(3, -h)
        b = [p1 - 3 * p2 + 4 * p3, 2 * p2 - 4 * p3, 2 * p2 - 4 * p3, -p2 + 4 * p3]
        if kind == "krogstad":
            a = [[], [half1 / 2], [half1 / 2 - half2, half2], [p1 - 2 * p2, 0, 2 * p2]]
        else:
            a = [[], [half1 / 2], [0, half1 / 2], [half1 / 2 * (math.exp(-h / 2) - 1), 0, half1]]
        return [0, 1 / 2, 1 / 2, 1], a, b

    return _exponential_rk(D, x, t, alpha, sigma, tableau, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# 10. Gradient estimation
# ---------------------------------------------------------------------------------------------------------------------


def gradient_estimation(D, x, t, alpha, sigma, *, gam=2.0, mu=0.0, z=None, trajectory=False):
    """Accelerated DDIM, Permenter & Yuan arXiv:2306.04848, smalldiffusion `samples(gam, mu)`, in y = x / alpha.

    eps = gam eps_i + (1 - gam) eps_{i-1} (gam = 1 at the first step); y += (rho_p - rho_i) eps + eta z with
    rho_{i+1} = rho_i^(1 - mu) rho_p^mu, eta^2 = rho_{i+1}^2 - rho_p^2 (mu = 1/2, gam = 1: DDPM). gam = 2: order 1.
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)
    noise = iter(z or ())
    xs, old = [x], None
    for i in range(p.n):
        e = eps(xs[-1], p.t[i])
        mean = e if old is None else gam * e + (1 - gam) * old
        rho_p = p.rho[i + 1] if mu == 0 else (p.rho[i + 1] / p.rho[i] ** (1 - mu)) ** (1 / mu)
        y = xs[-1] / p.a[i] + (rho_p - p.rho[i]) * mean
        if mu:
            y = y + math.sqrt(p.rho[i + 1] ** 2 - rho_p**2) * next(noise)
        xs.append(p.a[i + 1] * y)
        old = e
    return xs if trajectory else xs[-1]


# ---------------------------------------------------------------------------------------------------------------------
# 11. DPM-Solver-v3
# ---------------------------------------------------------------------------------------------------------------------


def dpm_solver_v3(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    l=lambda u: np.ones_like(u),  # noqa: E741
    s=np.zeros_like,
    b=np.zeros_like,
    order=2,
    corrector=False,
    p_pseudo=False,
    c_pseudo=False,
    lower_order_final=False,
    start=None,
    trajectory=False,
):
    """DPM-Solver-v3, Zheng et al. arXiv:2310.13268, formulas and driver of the public code.

    l, s, b: the empirical model statistics as numpy functions of lam (defaults: the "degenerated" data prediction).
    With L, S, B integrals of l, s, e^{-S} b:  f = (sigma eps - l x) / alpha,  g = e^{-(S - S_s)} f - e^{S_s} (B - B_s),

        x_t / alpha_t = e^{L_s - L_t} x_s / alpha_s - e^{-L_t - S_s} g_s int E - e^{-L_t} int E (B - B_s)
                        - e^{L_s - L_t} sum_k g^(k) int E / E_s (lam - lam_s)^k / k!,           E = e^{L + S}.

    Integrals are exact here (public: trapezoid on the statistics' grid). Derivatives of g from all given values, or
    with *_pseudo only divided differences (second order whatever `order`). The corrector uses t and order - 1 older
    points (order + 1 points if c_pseudo), and the model's eps is not evaluated again: f is kept.
    Order: 1, 2, 3 with exact `start`; own start at most 2. Not to sigma = 0.
    """
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)

    def grow(f, i):
        """lam -> int_{lam_i}^lam f, for an array of lam."""

        def out(lam):
            lam = np.asarray(lam, dtype=float)
            u = 0.5 * (lam[..., None] - p.lam[i]) * (_GAUSS[0] + 1) + p.lam[i]
            return 0.5 * (lam - p.lam[i]) * np.sum(_GAUSS[1] * f(u), axis=-1)

        return out

    L, S, B = [0.0], [0.0], [0.0]  # at the grid times
    legs = []
    for i in range(p.n):
        dL, dS = grow(l, i), grow(s, i)
        dB = grow(lambda u, i=i, dS=dS: np.exp(-S[i] - dS(u)) * b(u), i)
        legs.append((dL, dS, dB))
        for total, part in ((L, dL), (S, dS), (B, dB)):
            total.append(total[i] + float(part(p.lam[i + 1])))

    def f(i, x, e):
        return (p.s[i] * e - float(l(np.asarray(p.lam[i]))) * x) / p.a[i]

    def g(i, j, fj):
        return math.exp(S[i] - S[j]) * fj - math.exp(S[i]) * (B[j] - B[i])

    def derivatives(i, points, pseudo):
        """g', g'', ... at lam_i from the values at points[0] = i and the others."""
        lam = [p.lam[j] for j in points]
        values = [g(i, j, fs[j]) for j in points]
        q = len(points) - 1
        if pseudo:
            table = [values]
            for k in range(1, q + 1):
                old = table[-1]
                table.append([(old[j] - old[j + 1]) / (lam[j] - lam[j + k]) for j in range(q - k + 1)])
            return [math.factorial(k) * table[k][0] for k in range(1, q + 1)]
        inverse = np.linalg.inv(np.array([[(u - lam[0]) ** k for k in range(1, q + 1)] for u in lam[1:]]))
        return [math.factorial(k + 1) * _dot(inverse[k], [v - values[0] for v in values[1:]]) for k in range(q)]

    def move(i, x, points, pseudo):
        """From t[i] to t[i + 1]."""
        dL, dS, dB = legs[i]
        lo, hi = p.lam[i], p.lam[i + 1]
        zeroth = _integral(lambda u: np.exp(L[i] + S[i] + dL(u) + dS(u)), lo, hi)
        with_b = _integral(lambda u: np.exp(L[i] + S[i] + dL(u) + dS(u)) * dB(u), lo, hi)
        y = math.exp(L[i] - L[i + 1]) * x / p.a[i]
        y = y - math.exp(-L[i + 1] - S[i]) * zeroth * g(i, i, fs[i]) - math.exp(-L[i + 1]) * with_b
        if len(points) > 1:
            for k, d in enumerate(derivatives(i, points, pseudo), start=1):
                moment = _integral(lambda u, k=k: np.exp(dL(u) + dS(u)) * (u - lo) ** k, lo, hi) / math.factorial(k)
                y = y - math.exp(L[i] - L[i + 1]) * moment * d
        return p.a[i + 1] * y

    xs = [x] if start is None else list(start)
    fs = [f(j, y, eps(y, p.t[j])) for j, y in enumerate(xs)]
    used = min(order, len(xs) - 1)
    for i in range(len(xs) - 1, p.n):
        if corrector and i >= 1 and (start is None or i >= len(start)):
            c = used + 1 if c_pseudo else used
            if c > 1:
                points = [i - 1, i] + [i - j for j in range(2, c)]
                xs[-1] = move(i - 1, xs[-2], points, c_pseudo)
        used = min(order, i + 1, p.n - i) if lower_order_final else min(order, i + 1)
        xs.append(move(i, xs[-1], [i - j for j in range(used)], p_pseudo))
        if i + 1 < p.n:
            fs.append(f(i + 1, xs[-1], eps(xs[-1], p.t[i + 1])))
    return xs if trajectory else xs[-1]


# ---------------------------------------------------------------------------------------------------------------------
# 12. Stochastic samplers. k-diffusion's live in y = x / alpha at levels rho; eta there is eta^2 of the SDE family
#     dx = [f x - (1 + eta^2)/2 g^2 score] dt + eta g dw wherever it multiplies h (eta = 1 is the reverse SDE).
# ---------------------------------------------------------------------------------------------------------------------


def _ancestral(rho_from: float, rho_to: float, eta: float) -> tuple[float, float]:
    """k-diffusion `get_ancestral_step`: (level to step down to, noise to add there)."""
    up = min(rho_to, eta * math.sqrt(rho_to**2 * (rho_from**2 - rho_to**2) / rho_from**2))
    return math.sqrt(rho_to**2 - up**2), up


def euler_ancestral(D, x, t, alpha, sigma, *, z, eta=1.0, s_noise=1.0, trajectory=False):
    """k-diffusion `sample_euler_ancestral`: one normal per leg, none into sigma = 0. eta = 1 is DDPM. Weak order 1."""
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)
    noise = iter(z)

    def rule(i, x):
        down, up = _ancestral(p.rho[i], p.rho[i + 1], eta)
        y = x / p.a[i] + (down - p.rho[i]) * eps(x, p.t[i])
        return p.a[i + 1] * (y + s_noise * up * next(noise) if p.s[i + 1] > 0 else y)

    return _singlestep(rule, x, p.n, trajectory)


def dpm_2_ancestral(D, x, t, alpha, sigma, *, z, eta=1.0, s_noise=1.0, trajectory=False):
    """k-diffusion `sample_dpm_2_ancestral`: midpoint step in log rho down to the ancestral level, then noise."""
    p = _Path(t, alpha, sigma)
    eps = p.eps(D)
    noise = iter(z)

    def rule(i, x):
        down, up = _ancestral(p.rho[i], p.rho[i + 1], eta)
        y, d = x / p.a[i], eps(x, p.t[i])
        if down == 0:
            return p.a[i + 1] * (y + (down - p.rho[i]) * d)
        mid = math.sqrt(p.rho[i] * down)
        u = p.time(mid)
        d_2 = eps(p.alpha(u) * (y + (mid - p.rho[i]) * d), u)
        return p.a[i + 1] * (y + (down - p.rho[i]) * d_2 + s_noise * up * next(noise))

    return _singlestep(rule, x, p.n, trajectory)


def dpmpp_2s_ancestral(D, x, t, alpha, sigma, *, z, eta=1.0, s_noise=1.0, trajectory=False):
    """k-diffusion `sample_dpmpp_2s_ancestral`: DPM-Solver++(2S), r = 1/2, down to the ancestral level, then noise."""
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def rule(i, x):
        down, up = _ancestral(p.rho[i], p.rho[i + 1], eta)
        y, d = x / p.a[i], D(x, p.t[i])
        if down == 0:
            return p.a[i + 1] * d
        h = math.log(p.rho[i] / down)
        mid = p.rho[i] * math.exp(-h / 2)
        u = p.time(mid)
        d_2 = D(p.alpha(u) * (mid / p.rho[i] * y - math.expm1(-h / 2) * d), u)
        y = down / p.rho[i] * y - math.expm1(-h) * d_2
        return p.a[i + 1] * (y + s_noise * up * next(noise))

    return _singlestep(rule, x, p.n, trajectory)


def dpmpp_sde(D, x, t, alpha, sigma, *, z, eta=1.0, s_noise=1.0, r=0.5, trajectory=False):
    """k-diffusion `sample_dpmpp_sde`: two stages, each ending with an ancestral split of its own interval.

    Normals per leg: first that of [t, s] for the stage, then that of [t, t'] for the step (k-diffusion reads both off
    one Brownian path in rho, so they are correlated: W(s)-W(t) and W(t')-W(t), each divided by its own deviation).
    Variance on Gaussian data: order 2 so, order 1 with independent normals.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def rule(i, x):
        y, d = x / p.a[i], D(x, p.t[i])
        if p.s[i + 1] == 0:
            return p.a[i + 1] * d
        h = p.lam[i + 1] - p.lam[i]
        mid = math.exp(-(p.lam[i] + r * h))
        down, up = _ancestral(p.rho[i], mid, eta)
        y_2 = down / p.rho[i] * y - (down / p.rho[i] - 1) * d + s_noise * up * next(noise)
        u = p.time(mid)
        d_2 = D(p.alpha(u) * y_2, u)
        down, up = _ancestral(p.rho[i], p.rho[i + 1], eta)
        d_mean = (1 - 1 / (2 * r)) * d + 1 / (2 * r) * d_2
        y = down / p.rho[i] * y - (down / p.rho[i] - 1) * d_mean + s_noise * up * next(noise)
        return p.a[i + 1] * y

    return _singlestep(rule, x, p.n, trajectory)


def dpmpp_2m_sde(D, x, t, alpha, sigma, *, z, eta=1.0, s_noise=1.0, solver_type="midpoint", trajectory=False):
    """k-diffusion `sample_dpmpp_2m_sde` = SDE-DPM-Solver++(2M) of arXiv:2211.01095 at eta = 1 (diffusers
    "sde-dpmsolver++", order 2; solver_type "midpoint" or "heun"). One normal per leg, none into sigma = 0.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def step(i, k, x, outs):
        if p.s[i + 1] == 0:
            return p.a[i + 1] * outs[-1]
        h = p.lam[i + 1] - p.lam[i]
        q = (1 + eta) * h
        x = p.s[i + 1] / p.s[i] * math.exp(-eta * h) * x - p.a[i + 1] * math.expm1(-q) * outs[-1]
        if k == 2:
            D1 = h / (p.lam[i] - p.lam[i - 1]) * (outs[-1] - outs[-2])
            weight = -0.5 * math.expm1(-q) if solver_type == "midpoint" else math.expm1(-q) / q + 1
            x = x + p.a[i + 1] * weight * D1
        return x + s_noise * p.s[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * next(noise) if eta else x

    return _multistep(D, step, x, p, 2, None, False, trajectory)


def dpmpp_3m_sde(
    D, x, t, alpha, sigma, *, z, eta=1.0, s_noise=1.0, second_derivative=1, diffusers_sign=False, trajectory=False
):
    """k-diffusion `sample_dpmpp_3m_sde` (start-up step: 2M "heun"). One normal per leg, none into sigma = 0.

    second_derivative=1 as published (half the second derivative, drift of order 2), 2 is right (order 3).
    diffusers_sign=True: diffusers "sde-dpmsolver++", order 3, whose D2 weight has - 0.5 for + 0.5: order 1.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def step(i, k, x, outs):
        if p.s[i + 1] == 0:
            return p.a[i + 1] * outs[-1]
        h = p.lam[i + 1] - p.lam[i]
        q = (1 + eta) * h
        x = p.s[i + 1] / p.s[i] * math.exp(-eta * h) * x - p.a[i + 1] * math.expm1(-q) * outs[-1]
        if k == 2:
            x = x + p.a[i + 1] * q * _phi(2, -q) * h / (p.lam[i] - p.lam[i - 1]) * (outs[-1] - outs[-2])
        elif k == 3:
            D1, D2 = _differences(p, i, outs)
            w2 = q * _phi(3, -q) - (1.0 if diffusers_sign else 0.0)
            x = x + p.a[i + 1] * (q * _phi(2, -q) * D1 + second_derivative * w2 * D2)
        return x + s_noise * p.s[i + 1] * math.sqrt(-math.expm1(-2 * eta * h)) * next(noise) if eta else x

    return _multistep(D, step, x, p, 3, None, False, trajectory)


def sde_dpm_solver(D, x, t, alpha, sigma, *, z, order=2, solver_type="midpoint", trajectory=False):
    """SDE-DPM-Solver-1 / -2M in noise prediction, arXiv:2211.01095, diffusers "sde-dpmsolver".

    x_t = alpha_t / alpha_s x - 2 sigma_t (e^h - 1) (eps + D1 / 2) + sigma_t sqrt(e^{2h} - 1) z. Not to sigma = 0.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def step(i, k, x, outs):
        h = p.lam[i + 1] - p.lam[i]
        x = p.a[i + 1] / p.a[i] * x - 2 * p.s[i + 1] * math.expm1(h) * outs[-1]
        if k == 2:
            D1 = h / (p.lam[i] - p.lam[i - 1]) * (outs[-1] - outs[-2])
            x = x - p.s[i + 1] * (math.expm1(h) if solver_type == "midpoint" else 2 * h * _phi(2, h)) * D1
        return x + p.s[i + 1] * math.sqrt(math.expm1(2 * h)) * next(noise)

    return _multistep(p.eps(D), step, x, p, order, None, False, trajectory)


def sa_solver(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    z,
    tau=1.0,
    predictor=3,
    corrector=4,
    prediction="data",
    mode="PEC",
    rescaled=False,
    lower_order_final=True,
    final_ode=False,
    correct_last=False,
    trajectory=False,
):
    """SA-Solver, Xue et al. arXiv:2309.05019 eq. (14)-(18): stochastic Adams, predictor, corrector orders 1-4
    (corrector=0: none). tau: number or function of the target time. The pair shares its normal; one normal per leg.

    data:  x_t = sigma_t / sigma_s e^{-tau^2 h} x + sum_j b_j D_j + sigma_t sqrt(1 - e^{-2 tau^2 h}) z,
           b_j = (1 + tau^2) alpha_t int e^{-(1 + tau^2)(lam_t - lam)} l_j(lam) dlam
    noise: x_t = alpha_t / alpha_s x - (1 + tau^2) alpha_t sum_j eps_j int e^{-lam} l_j + tau sigma_t sqrt(e^{2h} - 1) z

    `rescaled`: App. D, for order-2 rows in data prediction the first moment is (1 + tau^2) alpha_t h^2 / 2.
    Public drivers: few_steps = rescaled, final_ode (tau = 0 at the last step), no correction there; more_steps =
    not rescaled, correct_last, then denoise; diffusers = rescaled. They lower the orders at the end, but not while
    fewer than max(predictor, corrector - 1) values are there. mode "PECE" evaluates again after the correction.
    """
    p = _Path(t, alpha, sigma)
    data = prediction == "data"
    model = D if data else p.eps(D)
    noise = iter(z)
    xs, outs = [x], [model(x, p.t[0])]

    def update(i, x, nodes, values, tau_t, normal):
        c, lo, hi = 1 + tau_t**2, p.lam[i], p.lam[i + 1]
        h = hi - lo
        if p.s[i + 1] == 0:
            return p.a[i + 1] * values[0]
        if not data:
            weights = _lagrange_weights(nodes, lo, hi, lambda u: -c * p.a[i + 1] * np.exp(-u))
            x = p.a[i + 1] / p.a[i] * x + tau_t * p.s[i + 1] * math.sqrt(math.expm1(2 * h)) * normal
        else:
            weights = _lagrange_weights(nodes, lo, hi, lambda u: c * p.a[i + 1] * np.exp(-c * (hi - u)))
            if rescaled and len(nodes) == 2:  # l_j = (lam - other) / (node - other): replace int K (lam - lam_s)
                gap = c * p.a[i + 1] * h**2 / 2 - c * p.a[i + 1] * h**2 * _phi(2, -c * h)
                weights = [w + gap / (nodes[j] - nodes[1 - j]) for j, w in enumerate(weights)]
            x = p.s[i + 1] / p.s[i] * math.exp(-(tau_t**2) * h) * x
            x = x + p.s[i + 1] * math.sqrt(-math.expm1(-2 * tau_t**2 * h)) * normal
        return x + _dot(weights, values)

    full = max(predictor, corrector - 1)
    for i in range(p.n):
        step, last = i + 1, i + 1 == p.n
        k_p, k_c = min(predictor, step), min(corrector, step + 1)
        if lower_order_final and step >= full:
            k_p, k_c = min(k_p, p.n - step + 1), min(k_c, p.n - step + 2)
        tau_t = tau(p.t[i + 1]) if callable(tau) else tau
        normal = next(noise)
        tau_t = 0.0 if last and final_ode else tau_t
        x_new = update(i, xs[-1], [p.lam[i - j] for j in range(k_p)], _newest(outs, k_p), tau_t, normal)
        if not last or correct_last:
            outs.append(model(x_new, p.t[i + 1]))
            if corrector:
                x_new = update(i, xs[-1], [p.lam[step - j] for j in range(k_c)], _newest(outs, k_c), tau_t, normal)
                if mode == "PECE" and not last:
                    outs[-1] = model(x_new, p.t[i + 1])
        xs.append(x_new)
    return xs if trajectory else xs[-1]


def _seeds_noise(p, data: bool, lam: Sequence[float], normals: Sequence[Tensor], t: float) -> Tensor | float:
    """The stochastic integral from lam[0] to lam[-1] = lam_t, segment by segment: one normal per segment."""
    total = 0.0
    for lo, hi, z in zip(lam, lam[1:], normals, strict=False):
        if data:
            c = p.sigma(t) * math.sqrt(math.exp(-2 * (lam[-1] - hi)) - math.exp(-2 * (lam[-1] - lo)))
        else:
            c = p.sigma(t) * math.sqrt(math.exp(2 * (lam[-1] - lo)) - math.exp(2 * (lam[-1] - hi)))
        total = total + c * z
    return total


def _seeds_base(p, data: bool, x, out, s, t):
    """Linear part and constant-model part of the reverse SDE from s to t."""
    h = p.lam_at(t) - p.lam_at(s)
    if data:
        return p.sigma(t) / p.sigma(s) * math.exp(-h) * x - p.alpha(t) * math.expm1(-2 * h) * out
    return p.alpha(t) / p.alpha(s) * x - 2 * p.sigma(t) * math.expm1(h) * out


def seeds_1(D, x, t, alpha, sigma, *, z, prediction="noise", trajectory=False):
    """SEEDS-1, Gonzalez et al. arXiv:2305.14267 (noise) and the public code's data prediction. Weak order 1.

    All SEEDS here add noise where the paper subtracts it (the same in law): pass -z to compare. Not to sigma = 0.
    """
    p = _Path(t, alpha, sigma)
    data = prediction == "data"
    model = D if data else p.eps(D)
    noise = iter(z)

    def rule(i, x):
        s, u = p.t[i], p.t[i + 1]
        return _seeds_base(p, data, x, model(x, s), s, u) + _seeds_noise(p, data, p.lam[i : i + 2], [next(noise)], u)

    return _singlestep(rule, x, p.n, trajectory)


def seeds_2(D, x, t, alpha, sigma, *, z, prediction="noise", c2=0.5, kind="a", trajectory=False):
    """SEEDS-2, Gonzalez et al. arXiv:2305.14267 (c2 = 1/2, kind "a"); kind "b" (phi_2 weights) from public code.

    Normals per leg: z1 of [s, s1], carried to t, then z2 of [s1, t]. (Public code with c2 != 1/2 swaps the two.)
    Variance on Gaussian data: order 2.
    """
    p = _Path(t, alpha, sigma)
    data = prediction == "data"
    model = D if data else p.eps(D)
    noise = iter(z)

    def rule(i, x):
        s, u, h = p.t[i], p.t[i + 1], p.lam[i + 1] - p.lam[i]
        lam_1 = p.lam[i] + c2 * h
        s1 = p.time_at_lam(lam_1)
        normals = [next(noise), next(noise)]
        m = model(x, s)
        x_1 = _seeds_base(p, data, x, m, s, s1) + _seeds_noise(p, data, [p.lam[i], lam_1], normals, s1)
        diff = model(x_1, s1) - m
        if data:
            weight = -p.a[i + 1] * math.expm1(-2 * h) / 2 if kind == "a" else p.a[i + 1] * 2 * h * _phi(2, -2 * h)
        else:
            weight = -p.s[i + 1] * (math.expm1(h) if kind == "a" else 2 * h * _phi(2, h))
        random = _seeds_noise(p, data, [p.lam[i], lam_1, p.lam[i + 1]], normals, u)
        return _seeds_base(p, data, x, m, s, u) + weight / c2 * diff + random

    return _singlestep(rule, x, p.n, trajectory)


def seeds_3(
    D, x, t, alpha, sigma, *, z, prediction="noise", c2=1 / 3, c3=2 / 3, kind="a", as_code=False, trajectory=False
):
    """SEEDS-3, Gonzalez et al. arXiv:2305.14267: the stages of DPM-Solver-3 with doubled weights, kind "a" the
    one-weight form, "b" the "taylor" form (public code: c2, c3 = 1/3, 2/3 only). Three normals a leg, carried.
    Variance on Gaussian data: order 2.

    as_code=True: slips of the public code (c2, c3 = 1/3, 2/3). Noise prediction: the second stage's noise is scaled
    with sigma_t for sigma_{s3}, and at t the normals of the first two segments are exchanged. Data prediction: the
    second stage uses (e^{-2 c2 h} - 1) / (c2 h) + 1 -> -1 for the function of c3 that vanishes with h: order 1.
    """
    p = _Path(t, alpha, sigma)
    data = prediction == "data"
    model = D if data else p.eps(D)
    noise = iter(z)

    def phi_weight(k, scale, h):
        """Weight of h^(k-1) f^(k-1) over a leg of length h: data 2h phi_k(-2h), noise -2h phi_k(h)."""
        return scale * 2 * h * _phi(k, -2 * h) if data else -scale * 2 * h * _phi(k, h)

    def rule(i, x):
        s, u, lam_s, h = p.t[i], p.t[i + 1], p.lam[i], p.lam[i + 1] - p.lam[i]
        lam_2, lam_3 = lam_s + c2 * h, lam_s + c3 * h
        s2, s3 = p.time_at_lam(lam_2), p.time_at_lam(lam_3)
        scale_3, scale_t = (p.alpha(s3), p.a[i + 1]) if data else (p.sigma(s3), p.s[i + 1])
        normals = [next(noise), next(noise), next(noise)]
        m = model(x, s)
        x_2 = _seeds_base(p, data, x, m, s, s2) + _seeds_noise(p, data, [lam_s, lam_2], normals, s2)
        D1 = model(x_2, s2) - m
        noise_3 = _seeds_noise(p, data, [lam_s, lam_2, lam_3], normals, s3)
        noise_t = _seeds_noise(p, data, [lam_s, lam_2, lam_3, p.lam[i + 1]], normals, u)
        weight = phi_weight(2, scale_3, c3 * h)
        if as_code and data:
            weight = scale_3 * (math.expm1(-2 * c2 * h) / (c2 * h) + 1)
        elif as_code:
            noise_3 = noise_3 * p.s[i + 1] / p.sigma(s3)
            swapped = [normals[1], normals[0], normals[2]]
            noise_t = _seeds_noise(p, data, [lam_s, lam_2, lam_3, p.lam[i + 1]], swapped, u)
        x_3 = _seeds_base(p, data, x, m, s, s3) + c3 / c2 * weight * D1 + noise_3
        D2 = model(x_3, s3) - m
        base = _seeds_base(p, data, x, m, s, u) + noise_t
        if kind == "a":
            return base + phi_weight(2, scale_t, h) / c3 * D2
        slope = (c3 * D1 / c2 - c2 * D2 / c3) / (c3 - c2)
        curve = 2 * (D2 / c3 - D1 / c2) / (c3 - c2)
        return base + phi_weight(2, scale_t, h) * slope + phi_weight(3, scale_t, h) * curve

    return _singlestep(rule, x, p.n, trajectory)


ER_SDE_SCALES = {
    "ode": lambda u: u,
    "sde": lambda u: u**2,
    "sde_5": lambda u: u * (np.exp(u**0.3) + 10),  # the paper's choice
}


def er_sde(
    D,
    x,
    t,
    alpha,
    sigma,
    *,
    z,
    order=3,
    scale="sde_5",
    nodes=None,
    corrected=False,
    denoise_last=True,
    trajectory=False,
):
    """ER-SDE-Solver-1/2/3, Cui et al. arXiv:2309.06169, public code for VE and VP; one normal per leg.

    y = x / alpha, w = scale(rho), r = w_{i+1} / w_i:  y' = r y + (1 - r) D + [drho + w' I0] D' + [drho^2/2 + w' I1] D''
    + sqrt(rho'^2 - r^2 rho^2) z, I0 = int drho / w, I1 = int (rho - rho_i) / w drho over [rho', rho].
    D' is the backward difference (D_i - D_{i-1}) / (rho_i - rho_{i-1}), D'' = 2 (D'_i - D'_{i-1}) / (rho_i -
    rho_{i-2}). D' is not the slope at rho_i but half a step earlier, so the published order 3 has a drift of order 2;
    corrected=True adds (rho_i - rho_{i-1}) D'' / 2 to it: order 3.
    nodes=None: exact integrals; an int: Riemann sum over that many nodes from rho' up, as published (100; ComfyUI 200),
    where the order stalls once the error is below its 1 / nodes.
    """
    p = _Path(t, alpha, sigma)
    w = ER_SDE_SCALES[scale] if isinstance(scale, str) else scale
    noise = iter(z)

    def integral(f, lo, hi):
        if nodes is None:
            return _integral(f, lo, hi)
        return float(np.sum(f(lo + np.arange(nodes) / nodes * (hi - lo))) * (hi - lo) / nodes)

    old_slope = None

    def step(i, k, x, outs):
        nonlocal old_slope
        normal = next(noise)
        lo, hi = p.rho[i + 1], p.rho[i]
        r = float(w(lo) / w(hi))
        y = r * x / p.a[i] + (1 - r) * outs[-1] + math.sqrt(max(lo**2 - (r * hi) ** 2, 0.0)) * normal
        if k >= 2:
            slope = (outs[-1] - outs[-2]) / (hi - p.rho[i - 1])
            first = lo - hi + float(w(lo)) * integral(lambda u: 1 / w(u), lo, hi)
            y = y + first * slope
            if k >= 3:
                curve = 2 * (slope - old_slope) / (hi - p.rho[i - 2])
                if corrected:
                    y = y + first * (hi - p.rho[i - 1]) / 2 * curve
                second = (lo - hi) ** 2 / 2 + float(w(lo)) * integral(lambda u: (u - hi) / w(u), lo, hi)
                y = y + second * curve
            old_slope = slope
        return p.a[i + 1] * y

    return _multistep(D, step, x, p, order, None, False, trajectory, denoise_last)


def euler_maruyama(D, x, t, alpha, sigma, *, z, f, g2, eta=1.0, trajectory=False):
    """Euler-Maruyama on the reverse SDE, Song et al. arXiv:2011.13456 eq. (6) (eta = 0: Euler on eq. (13)):

    x += [f(t) x - (1 + eta^2) / 2 g^2(t) score] dt + eta g(t) sqrt(|dt|) z, dt < 0, score = (alpha D - x) / sigma^2.
    One normal per leg, also in the last one (score_sde returns the mean there). Weak order 1.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def rule(i, x):
        u, dt = p.t[i], p.t[i + 1] - p.t[i]
        score = (p.a[i] * D(x, u) - x) / p.s[i] ** 2
        drift = f(u) * x - 0.5 * (1 + eta**2) * g2(u) * score
        return x + drift * dt + eta * math.sqrt(g2(u) * -dt) * next(noise)

    return _singlestep(rule, x, p.n, trajectory)


def reverse_diffusion(D, x, t, alpha, sigma, *, z, trajectory=False):
    """Reverse-diffusion predictor, Song et al. arXiv:2011.13456 App. E, with the exact forward kernel.

    Forward t -> s: x_s = A x_t + G z, A = alpha_s / alpha_t, G^2 = sigma_s^2 - A^2 sigma_t^2; backward
    x_t = (2 - A) x_s + G^2 score + G z (VP: A = sqrt(1 - beta); VE: A = 1). Weak order 1.
    """
    p = _Path(t, alpha, sigma)
    noise = iter(z)

    def rule(i, x):
        A = p.a[i] / p.a[i + 1]
        G2 = p.s[i] ** 2 - (A * p.s[i + 1]) ** 2
        score = (p.a[i] * D(x, p.t[i]) - x) / p.s[i] ** 2
        return (2 - A) * x + G2 * score + math.sqrt(G2) * next(noise)

    return _singlestep(rule, x, p.n, trajectory)


# ---------------------------------------------------------------------------------------------------------------------
# Rollouts of reinforcement learning
# ---------------------------------------------------------------------------------------------------------------------


def flow_sde(D: Model, x: Tensor, t: Tensor, a: float, z: Sequence[Tensor]) -> Tensor:
    """Flow-SDE (Liu et al. 2025, arXiv:2505.05470, eq. 9) on alpha = 1 - t, sigma = t, with the velocity v = x_1 - x_0.

    s_t = a sqrt(t / (1 - t)); at t = 1 the public code evaluates s at the second time. The leg into 0 returns D.
    """
    times = [float(u) for u in t]
    for i, (s, u) in enumerate(pairwise(times)):
        v = (x - D(x, s)) / s
        if u == 0:
            return x + v * (u - s)
        at = s if s < 1 else times[1]
        std = a * math.sqrt(at / (1 - at))
        x = x + (v + std**2 / (2 * s) * (x + (1 - s) * v)) * (u - s) + std * math.sqrt(s - u) * z[i]
    return x


def cps(D: Model, x: Tensor, t: Tensor, alpha: Scalar, sigma: Scalar, eta: float, z: Sequence[Tensor]) -> Tensor:
    """Coefficients-preserving sampling (Wang & Yu 2025, arXiv:2509.05952) with alpha for 1 - t and sigma for t."""
    path = _Path(t, alpha, sigma)
    for i in range(path.n):
        d = D(x, path.t[i])
        eps = (x - path.a[i] * d) / path.s[i]
        old, new = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
        x = path.a[i + 1] * d + path.s[i + 1] * (old * eps + new * z[i])
    return x
