"""The oracles of published.py are themselves right: exact where they must be, of the order they are known to have,
equal to each other where two papers print the same rule, and equal to the installed diffusers.
"""

from __future__ import annotations

import inspect
import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import published as pub
import pytest
import scipy.integrate
import torch

# name: alpha, sigma, noisiest time, last time
PROCESSES = {
    "VP": (
        lambda t: math.exp(-0.05 * t - 4.975 * t**2),
        lambda t: math.sqrt(-math.expm1(-0.1 * t - 9.95 * t**2)),
        1.0,
        0.02,
    ),
    "Flow": (lambda t: 1 - t, lambda t: t, 0.99, 0.02),
    "EDM": (lambda t: 1.0, lambda t: t, 20.0, 0.05),
}
VARIANCES = torch.tensor([0.3, 1.0, 3.0], dtype=torch.float64)
X = torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64)


def grid(process, n: int, kind: str = "graded") -> torch.Tensor:
    """Times uneven in lam: smoothly graded (neighbouring steps become equal) or alternating 5 : 3 (they do not)."""
    alpha, sigma, first, last = process
    u = np.linspace(0, 1, n + 1)
    if kind == "graded":
        u = u + 0.03 * np.sin(2 * np.pi * u) + 0.1 * u * (1 - u)
    else:
        u = np.cumsum([0.0, *np.where(np.arange(n) % 2 == 0, 1.25, 0.75)])
        u /= u[-1]
    lo, hi = math.log(alpha(first) / sigma(first)), math.log(alpha(last) / sigma(last))
    time = pub._Path(torch.tensor([first]), alpha, sigma).time_at_lam
    inner = [time(lo + (hi - lo) * v) for v in u[1:-1]]
    return torch.tensor([first, *inner, last], dtype=torch.float64)


GRIDS = {(name, n, kind): grid(PROCESSES[name], n, kind) for name, n, kind in [
    *((name, n, "graded") for name in PROCESSES for n in (48, 96)),
    *(("VP", n, "alternating") for n in (48, 96)),
]}  # fmt: skip


def gaussian(process, variances=VARIANCES):
    """E[x0 | x_t] for data N(0, variances), and the exact probability flow."""
    alpha, sigma = process[:2]

    def D(x, t):
        return alpha(t) * variances / (alpha(t) ** 2 * variances + sigma(t) ** 2) * x

    def flow(x, s, t):
        return x * torch.sqrt((alpha(t) ** 2 * variances + sigma(t) ** 2) / (alpha(s) ** 2 * variances + sigma(s) ** 2))

    return D, flow


def mixture(process, mean=1.0, std=0.6):
    """E[x0 | x_t] for the mixture of N(+-mean, std^2), elementwise: a model that is not linear."""
    alpha, sigma = process[:2]

    def D(x, t):
        a, var = alpha(t), alpha(t) ** 2 * std**2 + sigma(t) ** 2
        return a * std**2 / var * x + sigma(t) ** 2 / var * mean * torch.tanh(a * mean * x / var)

    return D


def ems(lam):
    """Smooth stand-ins for DPM-Solver-v3's statistics."""
    return 0.6 + 0.2 * np.tanh(lam)


V3 = {"l": ems, "s": lambda lam: -0.3 + 0.1 * np.sin(lam), "b": lambda lam: 0.2 * np.cos(lam)}


class Row(NamedTuple):
    """A rule, the order it is known to have and, where different, those on other problems (None: no convergence)."""

    rule: Any
    order: int
    options: dict[str, Any] = {}  # noqa: RUF012
    start: int = 0  # exact states given at the first so many grid times
    alternating: int | None = -1  # where step ratios do not tend to 1
    mixture: int = -1  # where the model is not linear
    slack: float = 0.5  # how far below the order the slope from 48 to 96 steps may be

    def __str__(self):
        shown = [str(v) for k, v in self.options.items() if not callable(v) and k != "lower_order_final"]
        return " ".join([self.rule.__name__, *shown, *(["ems"] if "l" in self.options else [])])


UNI = {"lower_order_final": False}
TAYLOR = {"solver_type": "taylor"}
ORDERS = [
    Row(pub.ddim, 1),
    Row(pub.dpm_solver_1, 1),
    Row(pub.dpm_solver_2, 2),
    Row(pub.dpm_solver_2, 2, {"r1": 0.7}),
    Row(pub.dpm_solver_2, 2, {"r1": 0.7, **TAYLOR}),
    Row(pub.dpm_solver_3, 3),
    Row(pub.dpm_solver_3, 3, TAYLOR),
    Row(pub.dpm_solver_3, 2, {"r1": 0.4, "r2": 0.8}),
    Row(pub.dpm_solver_3, 2, {"r1": 0.4, "r2": 0.8, **TAYLOR}),
    Row(pub.dpm_solver_2m, 2),
    Row(pub.dpm_solver_2m, 2, TAYLOR),
    Row(pub.dpm_solver_3m, 2, {}, 3),
    Row(pub.dpm_solver_3m, 3, {"second_derivative": 2}, 3),
    Row(pub.dpmpp_1, 1),
    Row(pub.dpmpp_2s, 2),
    Row(pub.dpmpp_2s, 2, {"r1": 0.7, **TAYLOR}),
    Row(pub.dpmpp_3s, 3),
    Row(pub.dpmpp_3s, 3, TAYLOR),
    Row(pub.dpmpp_3s, 2, {"r1": 0.4, "r2": 0.8}),
    Row(pub.dpmpp_2m, 2),
    Row(pub.dpmpp_2m, 2, TAYLOR),
    Row(pub.dpmpp_3m, 2, {}, 3),
    Row(pub.dpmpp_3m, 3, {"second_derivative": 2}, 3),
    *(
        Row(pub.unipc, p + 1, {"order": p, "variant": v, "prediction": q, **UNI}, p)
        for p in (1, 2, 3)
        for v in ("bh1", "bh2", "vary_coeff")
        for q in ("data", "noise")
    ),
    Row(pub.unipc, 5, {"order": 4, **UNI}, 4),
    Row(pub.unipc, 2, {"order": 2, "corrector": False, **UNI}, 2),
    Row(pub.unipc, 3, {"order": 3, "corrector": False, **UNI}, 3),
    Row(pub.unipc, 1, {"order": 2, "variant": "vary_coeff", "published_bug": True, **UNI}, 2),
    Row(pub.unipc, 1, {"order": 3, "variant": "vary_coeff", "published_bug": True, **UNI}, 3),
    Row(pub.edm_heun, 2),
    Row(pub.edm_heun, 2, {"step": 2 / 3}),
    Row(pub.edm_heun, 3, {"step": 0.5}, mixture=2),
    Row(pub.edm_heun_in_t, 2),
    Row(pub.dpm_2, 2),
    Row(pub.dpm_2, 2, {"r": 0.7}),
    *(Row(pub.lms, p, {"order": p}, p) for p in (1, 2, 3, 4)),
    *(Row(pub.deis_rhoab, p, {"degree": p - 1}, p) for p in (1, 2, 3, 4)),
    *(Row(pub.deis_tab, p, {"degree": p - 1}, p) for p in (1, 2, 3, 4)),
    *(Row(pub.deis_lamab, p, {"order": p}, p) for p in (2, 3, 4)),
    *(Row(pub.deis_rhork, int(m[0]), {"method": m}) for m in pub.RHO_RK),
    Row(pub.pndm, 2, alternating=1),
    Row(pub.pndm, 2, {"order": 2}, alternating=1),
    Row(pub.plms, 2, alternating=1),
    *(Row(pub.ipndm, 2, {"order": p}, alternating=1) for p in (2, 3, 4)),
    Row(pub.ipndm_v, 2, {"order": 2}, 2),
    Row(pub.ipndm_v, 3, {"order": 3}, 3, alternating=2, slack=0.7),
    Row(pub.ipndm_v, 2, {"order": 4}, 4, alternating=None),
    Row(pub.ipndm_v, 3, {"order": 3, "published": False}, 3),
    Row(pub.ipndm_v, 4, {"order": 4, "published": False}, 4),
    Row(pub.etd_rk2, 2),
    Row(pub.etd_rk2, 2, {"kind": "midpoint"}),
    Row(pub.res_2s, 2, {"c2": 0.4}),
    Row(pub.res_3s, 3),
    Row(pub.res_3s, 3, {"c2": 0.4, "c3": 0.8}),
    Row(pub.res_3s, 2, {"c2": 0.4, "c3": 0.8, "gamma_power": 3}),
    Row(pub.etd_rk4, 4),
    Row(pub.etd_rk4, 4, {"kind": "krogstad"}),
    Row(pub.gradient_estimation, 1),
    Row(pub.gradient_estimation, 2, {"gam": 1.5}, alternating=1),
    *(Row(pub.dpm_solver_v3, p, {"order": p, **V3}, p) for p in (1, 2, 3)),
    Row(pub.dpm_solver_v3, 2, {"order": 3, "p_pseudo": True}, 3),
    Row(pub.dpm_solver_v3, 2, {"order": 1, "corrector": True, "c_pseudo": True}),
]


@cache
def mixture_states(n: int) -> list[torch.Tensor]:
    """The probability flow of the mixture at the times of the VP grid: dy / drho = eps, y = x / alpha."""
    alpha, sigma = PROCESSES["VP"][:2]
    t, D = GRIDS["VP", n, "graded"], mixture(PROCESSES["VP"])
    path = pub._Path(t, alpha, sigma)
    eps = path.eps(D)

    def rate(lam, y):
        u = path.time_at_lam(lam)
        return -math.exp(-lam) * eps(alpha(u) * torch.from_numpy(y), u).numpy()

    y = scipy.integrate.solve_ivp(
        rate, (path.lam[0], path.lam[-1]), X / path.a[0], "DOP853", path.lam, rtol=1e-12, atol=1e-12
    ).y
    return [a * torch.from_numpy(y[:, i]) for i, a in enumerate(path.a)]


def slope(coarse: float, fine: float) -> float:
    return math.log2(abs(coarse) / abs(fine))


def errors(row: Row, name: str, kind: str, exact) -> list[float]:
    alpha, sigma = PROCESSES[name][:2]
    out = []
    for n in (48, 96):
        t = GRIDS[name, n, kind]
        D, states = exact(n, t)
        start = {"start": states[: row.start]} if row.start > 1 else {}
        out.append((row.rule(D, X, t, alpha, sigma, **row.options, **start) - states[-1]).abs().max().item())
    return out


def on_gaussian(name: str):
    D, flow = gaussian(PROCESSES[name])
    return lambda n, t: (D, [flow(X, t[0].item(), u.item()) for u in t])


@pytest.mark.parametrize("row", ORDERS, ids=str)
def test_the_order_on_gaussian_data_is_the_known_one(row):
    for name in PROCESSES:
        measured = slope(*errors(row, name, "graded", on_gaussian(name)))
        assert row.order - row.slack < measured < row.order + 0.45, (name, measured)


@pytest.mark.parametrize("row", ORDERS, ids=str)
def test_the_order_where_step_ratios_do_not_converge_to_one(row):
    known = row.order if row.alternating == -1 else row.alternating
    measured = slope(*errors(row, "VP", "alternating", on_gaussian("VP")))
    if known is None:
        assert measured < 0.5
    else:
        assert known - 0.5 < measured
        assert measured < known + 0.45 or known == row.order  # steps equal in pairs cancel some error terms


@pytest.mark.parametrize("row", ORDERS, ids=str)
def test_the_order_on_a_model_that_is_not_linear(row):
    known = row.order if row.mixture == -1 else row.mixture
    measured = slope(*errors(row, "VP", "graded", lambda n, t: (mixture(PROCESSES["VP"]), mixture_states(n))))
    assert known - row.slack < measured, measured


def test_a_first_order_start_or_end_caps_the_order_at_two():
    """Visible where the first step matters: EDM from sigma = 2."""
    process = (*PROCESSES["EDM"][:2], 2.0, 0.05)
    D, flow = gaussian(process)
    for rule, options, known in [
        (pub.dpmpp_3m, {"second_derivative": 2}, 2),
        (pub.dpm_solver_3m, {"second_derivative": 2}, 2),
        (pub.lms, {"order": 4}, 2),
        (pub.unipc, {"order": 3, "lower_order_final": True}, 2),
        (pub.unipc, {"order": 3, "lower_order_final": False}, 3),
        (pub.dpm_solver_fast, {}, 2),
        (pub.dpm_solver_fast, {"prediction": "data", "order": 2}, 2),
    ]:
        out = []
        for n in (241, 481):  # = 1 mod 3 and mod 2: the last step of `fast` is of order 1
            t = grid(process, n)
            x = rule(D, X, t, *process[:2], **options)
            out.append((x - flow(X, 2.0, 0.05)).abs().max().item())
        assert abs(slope(*out) - known) < 0.45, (rule.__name__, options, out)


def test_dpm_solver_v3_with_its_corrector_has_the_order_of_the_predictor():
    alpha, sigma, first, last = PROCESSES["EDM"]
    D, flow = gaussian(PROCESSES["EDM"])
    for options in ({"order": 2, "corrector": True}, {"order": 2, "corrector": True, "c_pseudo": True}):
        out = []
        for n in (200, 400):  # below that, the errors of the two nearly cancel
            t = grid(PROCESSES["EDM"], n)
            start = [flow(X, first, u.item()) for u in t[:2]]
            x = pub.dpm_solver_v3(D, X, t, alpha, sigma, start=start, **options)
            out.append((x - flow(X, first, last)).abs().max().item())
        assert abs(slope(*out) - 2) < 0.3, (options, out)


# ---------------------------------------------------------------------------------------------------------------------
# Exactness: if x0 is one point d, D = d, and every rule must keep x = alpha d + sigma e
# ---------------------------------------------------------------------------------------------------------------------

UNEVEN = [1.0, 0.9, 0.75, 0.7, 0.45, 0.3, 0.12, 0.03]
POINT = torch.tensor([0.4, -1.3, 2.0], dtype=torch.float64)
NOT_TO_ZERO = (pub.dpm_solver_fast, pub.dpm_solver_v3)
NOT_EXACT = {
    "ipndm_v 4": PROCESSES,  # its coefficients do not sum to 1
    "edm_heun_in_t": ["VP"],  # elsewhere the path is straight in t
    **{f"dpm_solver_v3 {p} ems": PROCESSES for p in (1, 2, 3)},
}


@pytest.mark.parametrize("row", [*ORDERS, Row(pub.dpm_solver_fast, 3), Row(pub.unipc, 3)], ids=str)
@pytest.mark.parametrize("name", PROCESSES)
def test_a_rule_is_exact_when_the_data_are_one_point(row, name):
    alpha, sigma, first, _ = PROCESSES[name]
    times = [first * u for u in UNEVEN] + ([] if row.rule in NOT_TO_ZERO else [0.0])
    t = torch.tensor(times, dtype=torch.float64)
    x = row.rule(lambda x, t: POINT, alpha(first) * POINT + sigma(first) * X, t, alpha, sigma, **row.options)
    exact = alpha(times[-1]) * POINT + sigma(times[-1]) * X
    error = (x - exact).abs().max().item()
    assert (error < 1e-11) is (name not in NOT_EXACT.get(str(row), [])), error


@pytest.mark.parametrize("row", [r for r in ORDERS if r.rule not in NOT_TO_ZERO], ids=str)
@pytest.mark.parametrize("legs", [1, 2, 3])
def test_a_rule_of_few_steps_ends_clean_at_sigma_zero(row, legs):
    alpha, sigma, first, _ = PROCESSES["EDM"]
    t = torch.tensor([*(first * u for u in UNEVEN[:legs]), 0.0], dtype=torch.float64)
    x = row.rule(lambda x, t: POINT, POINT + first * X, t, alpha, sigma, **row.options)
    torch.testing.assert_close(x, POINT, rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Stochastic rules. On linear models the state is linear in (start, normals): feed unit vectors, read off the law.
# ---------------------------------------------------------------------------------------------------------------------


def unit_normals(count: int) -> list[torch.Tensor]:
    """Normal k is the unit vector k + 1; coordinate 0 is for the start or the mean."""
    return list(torch.eye(count + 1, dtype=torch.float64)[1:])


def brownian_pairs(t, alpha, sigma, z):
    """For dpmpp_sde: normals of [t, mid] and of [t, t'] read off one Brownian path in rho, as k-diffusion does."""
    rho = [sigma(u) / alpha(u) for u in t.tolist()]
    out = []
    for i in range(len(rho) - 1):
        share = (rho[i] - math.sqrt(rho[i] * rho[i + 1])) / (rho[i] - rho[i + 1])
        out += [z[2 * i], math.sqrt(share) * z[2 * i] + math.sqrt(1 - share) * z[2 * i + 1]]
    return out


class Noisy(NamedTuple):
    """A stochastic rule, the weak order of its variance on Gaussian data, and for which points it is exact in law."""

    rule: Any
    order: float
    options: dict[str, Any] = {}  # noqa: RUF012
    per_leg: int = 1
    exact: str = "data"  # constant D, constant eps, or ""
    paths: bool = False  # normals from one Brownian path

    def __str__(self):
        return " ".join([self.rule.__name__, *(f"{k}={v}" for k, v in self.options.items()), *["paths"] * self.paths])


NOISE = {"prediction": "noise"}
DATA = {"prediction": "data"}
PC = {"predictor": 2, "corrector": 2}
NOISY = [
    Noisy(pub.ddim, 1, {"eta": 1.0}),
    Noisy(pub.ddim, 1, {"eta": 0.5}),
    Noisy(pub.ddpm, 1),
    Noisy(pub.ddpm, 1, {"variance": "large"}, exact=""),
    Noisy(pub.gradient_estimation, 1, {"gam": 1.0, "mu": 0.5}),
    Noisy(pub.edm_stochastic, 2, {"s_churn": 10.0}),
    Noisy(pub.edm_stochastic, 1, {"s_churn": 10.0, "second_order": False}),
    Noisy(pub.euler_ancestral, 1),
    Noisy(pub.euler_ancestral, 1, {"eta": 0.5}),
    Noisy(pub.dpm_2_ancestral, 2),
    Noisy(pub.dpmpp_2s_ancestral, 2),
    Noisy(pub.dpmpp_sde, 1, per_leg=2),  # normals not of one path: first order
    Noisy(pub.dpmpp_sde, 2, per_leg=2, paths=True),
    Noisy(pub.dpmpp_2m_sde, 2),
    Noisy(pub.dpmpp_2m_sde, 2, {"solver_type": "heun"}),
    Noisy(pub.dpmpp_2m_sde, 2, {"eta": 0.5}),
    Noisy(pub.dpmpp_3m_sde, 2),
    Noisy(pub.dpmpp_3m_sde, 2, {"second_derivative": 2}),
    Noisy(pub.dpmpp_3m_sde, 1, {"diffusers_sign": True}),
    Noisy(pub.sde_dpm_solver, 1, {"order": 1}, exact="noise"),
    Noisy(pub.sde_dpm_solver, 2, exact="noise"),
    Noisy(pub.sde_dpm_solver, 2, {"solver_type": "heun"}, exact="noise"),
    Noisy(pub.sa_solver, 1, {"predictor": 1, "corrector": 0}),
    Noisy(pub.sa_solver, 2, {"predictor": 2, "corrector": 0}),
    Noisy(pub.sa_solver, 2, {"predictor": 3, "corrector": 4}),
    Noisy(pub.sa_solver, 2, {"predictor": 3, "corrector": 4, "mode": "PECE"}),
    Noisy(pub.sa_solver, 2, {**PC, "rescaled": True}),
    Noisy(pub.sa_solver, 2, {**PC, **NOISE}, exact="noise"),
    Noisy(pub.sa_solver, 4, {"predictor": 3, "corrector": 4, "tau": 0.0, "lower_order_final": False}),
    Noisy(pub.seeds_1, 1, NOISE, exact="noise"),
    Noisy(pub.seeds_1, 1, DATA),
    Noisy(pub.seeds_2, 2, NOISE, 2, "noise"),
    Noisy(pub.seeds_2, 2, {**NOISE, "kind": "b"}, 2, "noise"),
    Noisy(pub.seeds_2, 2, DATA, 2),
    Noisy(pub.seeds_2, 2, {**DATA, "kind": "b"}, 2),
    Noisy(pub.seeds_3, 2, NOISE, 3, "noise"),
    Noisy(pub.seeds_3, 2, {**NOISE, "kind": "b"}, 3, "noise"),
    Noisy(pub.seeds_3, 2, DATA, 3),
    Noisy(pub.seeds_3, 2, {**DATA, "kind": "b"}, 3),
    Noisy(pub.seeds_3, 1, {**DATA, "as_code": True}, 3),  # a slip of the public code
    *(Noisy(pub.er_sde, min(p, 2), {"order": p, "scale": "sde_5"}) for p in (1, 2, 3)),
    Noisy(pub.er_sde, 3, {"order": 3, "scale": "ode", "corrected": True}),
    Noisy(pub.er_sde, 1, {"order": 1, "scale": "sde"}),
    Noisy(pub.er_sde, 2, {"order": 2, "scale": "sde"}),
    Noisy(pub.reverse_diffusion, 1, exact=""),
]


@pytest.mark.parametrize("row", [r for r in NOISY if r.exact], ids=str)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_law_is_exact_when_the_model_is_constant(row, name):
    alpha, sigma, first, _ = PROCESSES[name]
    t = torch.tensor([first * u for u in UNEVEN], dtype=torch.float64)
    last = t[-1].item()
    legs = len(t) - 1
    z = unit_normals(row.per_leg * legs)
    z = brownian_pairs(t, alpha, sigma, z) if row.paths else z
    start = torch.zeros(len(z) + 1, dtype=torch.float64)
    if row.exact == "data":  # D = d: x = alpha d + sigma e for a standard normal e, at every time
        start[0] = sigma(first)
        mean = row.rule(lambda x, t: 1.0 + 0 * x, alpha(first) + 0 * start, t, alpha, sigma, **silent(row, z))
        x = row.rule(lambda x, t: 0 * x, start, t, alpha, sigma, z=z, **row.options)
        mean_exact, variance = alpha(last), sigma(last) ** 2
    else:  # eps = e: d(x / alpha) = 2 e drho + noise of variance rho_s^2 - rho_t^2
        rho = [sigma(u) / alpha(u) for u in (first, last)]
        mean = row.rule(lambda x, t: (x - sigma(t)) / alpha(t), 0 * start, t, alpha, sigma, **silent(row, z))
        x = row.rule(lambda x, t: x / alpha(t), start, t, alpha, sigma, z=z, **row.options)
        mean_exact, variance = alpha(last) * 2 * (rho[1] - rho[0]), alpha(last) ** 2 * (rho[0] ** 2 - rho[1] ** 2)
    assert mean[0].item() == pytest.approx(mean_exact, rel=1e-11)
    assert (x**2).sum().item() == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize("row", [r for r in NOISY if r.exact == "data" and "seeds" not in str(r)], ids=str)
@pytest.mark.parametrize("legs", [1, 2, 3, 8])
def test_a_noisy_rule_ends_clean_at_sigma_zero(row, legs):
    alpha, sigma, first, _ = PROCESSES["VP"]
    t = torch.tensor([*UNEVEN[:legs], 0.0], dtype=torch.float64)
    x = row.rule(lambda x, t: POINT, X, t, alpha, sigma, z=[X] * (row.per_leg * legs), **row.options)
    torch.testing.assert_close(x, POINT, rtol=1e-12, atol=1e-12)


def silent(row, z):
    return {"z": [0 * u for u in z], **row.options}


@pytest.mark.parametrize("row", NOISY, ids=str)
def test_the_weak_order_of_the_variance_is_the_known_one(row):
    process = PROCESSES["VP"]
    alpha, sigma, first, _ = process
    variance = 2.0
    D, _ = gaussian(process, variance)
    out = []
    for n in (200, 400):
        t = GRIDS_NOISY[n]
        z = unit_normals(row.per_leg * n)
        z = brownian_pairs(t, alpha, sigma, z) if row.paths else z
        start = torch.zeros(len(z) + 1, dtype=torch.float64)
        start[0] = math.sqrt(alpha(first) ** 2 * variance + sigma(first) ** 2)
        states = row.rule(D, start, t, alpha, sigma, z=z, trajectory=True, **row.options)
        exact = [alpha(u) ** 2 * variance + sigma(u) ** 2 for u in t.tolist()]
        out.append(max(abs((x**2).sum().item() - v) for x, v in zip(states, exact, strict=True)))
    assert row.order - 0.4 < slope(*out) < row.order + 0.4, (slope(*out), out)


GRIDS_NOISY = {n: grid(PROCESSES["VP"], n) for n in (200, 400)}


# ---------------------------------------------------------------------------------------------------------------------
# Two papers, one rule: oracles typed from different formulas agree
# ---------------------------------------------------------------------------------------------------------------------

V3_NOISE = {"l": np.zeros_like, "s": lambda lam: -np.ones_like(lam)}
CORRECT = {"second_derivative": 2}
NO_CORRECTOR = {"corrector": False, **UNI}
SA = {"corrector": 0, "lower_order_final": False}
EQUAL = [
    [(pub.ddim, {}), (pub.dpm_solver_1, {}), (pub.dpmpp_1, {}), (pub.lms, {"order": 1}), (pub.deis_tab, {"degree": 0})],
    [(pub.ddim, {}), (pub.unipc, {"order": 1, **NO_CORRECTOR}), (pub.dpm_solver_v3, {"order": 1})],
    [(pub.ddim, {}), (pub.gradient_estimation, {"gam": 1.0}), (pub.dpm_solver_v3, {"order": 1, **V3_NOISE})],
    [(pub.dpm_2, {"r": 0.5}), (pub.dpm_solver_2, {})],
    [(pub.dpm_2, {"r": 0.7}), (pub.dpm_solver_2, {"r1": 0.7})],
    [(pub.edm_heun, {}), (pub.deis_rhork, {"method": "2heun"}), (pub.edm_stochastic, {"s_churn": 0.0})],
    *(
        [
            (pub.lms, {"order": p}),
            (pub.deis_rhoab, {"degree": p - 1}),
            (pub.ipndm_v, {"order": p, "published": False}),
        ]
        for p in (1, 2, 3, 4)
    ),
    [(pub.ipndm_v, {"order": 2}), (pub.lms, {"order": 2})],
    [(pub.ipndm, {"order": 2}), (pub.gradient_estimation, {"gam": 1.5})],
    [(pub.dpmpp_2s, {"r1": 0.4, **TAYLOR}), (pub.res_2s, {"c2": 0.4})],
    [(pub.dpmpp_2s, {}), (pub.etd_rk2, {"kind": "midpoint"})],
    [(pub.etd_rk2, {}), (pub.res_2s, {"c2": 1.0})],
    [(pub.dpmpp_2m, {}), (pub.unipc, {"order": 2, **NO_CORRECTOR}), (pub.dpmpp_2m_sde, {"eta": 0.0})],
    [(pub.dpm_solver_2m, {}), (pub.unipc, {"order": 2, **NO_CORRECTOR, **NOISE})],
    [
        (pub.dpmpp_2m, TAYLOR),
        (pub.dpm_solver_v3, {"order": 2}),
        (pub.sa_solver, {"tau": 0.0, "predictor": 2, **SA}),
        (pub.dpmpp_2m_sde, {"eta": 0.0, "solver_type": "heun"}),
        (pub.unipc, {"order": 2, "variant": "vary_coeff", **NO_CORRECTOR}),
    ],
    [
        (pub.dpmpp_3m, {**CORRECT, **TAYLOR}),
        (pub.dpm_solver_v3, {"order": 3}),
        (pub.sa_solver, {"tau": 0.0, "predictor": 3, **SA}),
        (pub.dpmpp_3m_sde, {"eta": 0.0, **CORRECT}),
        (pub.unipc, {"order": 3, "variant": "vary_coeff", **NO_CORRECTOR}),
    ],
    [(pub.dpmpp_3m, TAYLOR), (pub.dpmpp_3m_sde, {"eta": 0.0})],
    [
        (pub.dpm_solver_2m, TAYLOR),
        (pub.deis_lamab, {"order": 2}),
        (pub.dpm_solver_v3, {"order": 2, **V3_NOISE}),
        (pub.sa_solver, {"tau": 0.0, "predictor": 2, **SA, **NOISE}),
    ],
    [
        (pub.dpm_solver_3m, {**CORRECT, **TAYLOR}),
        (pub.deis_lamab, {"order": 3}),
        (pub.dpm_solver_v3, {"order": 3, **V3_NOISE}),
        (pub.sa_solver, {"tau": 0.0, "predictor": 3, **SA, **NOISE}),
    ],
    [
        (pub.ddim, {"eta": 1.0}),
        (pub.ddpm, {}),
        (pub.gradient_estimation, {"gam": 1.0, "mu": 0.5}),
        (pub.euler_ancestral, {}),
        (pub.er_sde, {"order": 1, "scale": "sde"}),
        (pub.seeds_1, DATA),
        (pub.sa_solver, {"predictor": 1, **SA}),
    ],
    [(pub.ddim, {"eta": 0.5}), (pub.euler_ancestral, {"eta": 0.5})],
    [(pub.ddim, {}), (pub.er_sde, {"order": 1, "scale": "ode"})],
    [(pub.dpmpp_2m_sde, {"solver_type": "heun"}), (pub.sa_solver, {"predictor": 2, **SA})],
    [(pub.dpmpp_3m_sde, CORRECT), (pub.sa_solver, {"predictor": 3, **SA})],
    [(pub.sde_dpm_solver, {"order": 1}), (pub.seeds_1, NOISE), (pub.sa_solver, {"predictor": 1, **SA, **NOISE})],
    [(pub.sde_dpm_solver, {"solver_type": "heun"}), (pub.sa_solver, {"predictor": 2, **SA, **NOISE})],
]


@pytest.mark.parametrize("family", EQUAL, ids=lambda f: f[0][0].__name__ + "-" + f[-1][0].__name__)
@pytest.mark.parametrize("name", PROCESSES)
def test_rules_printed_by_two_papers_agree(family, name):
    process = PROCESSES[name]
    alpha, sigma, first, _ = process
    t = torch.tensor([first * u for u in UNEVEN], dtype=torch.float64)
    z = [torch.sin(torch.arange(3, dtype=torch.float64) + 3 * k) for k in range(len(t))]
    results = []
    for rule, options in family:
        noisy = {"z": z} if "z" in inspect.signature(rule).parameters else {}
        results.append(rule(mixture(process), first * X, t, alpha, sigma, **noisy, **options))
    for (rule, _), x in zip(family, results, strict=True):
        assert torch.allclose(x, results[0], rtol=1e-10, atol=1e-10), (rule.__name__, x - results[0])


def test_unipc_variants_differ_only_where_the_weight_one_half_is_used():
    """From order 3 on, B(h) cancels; vary_coeff then prints the same rule."""
    alpha, sigma, first, _ = PROCESSES["VP"]
    t = torch.tensor([first * u for u in UNEVEN], dtype=torch.float64)
    D, flow = gaussian(PROCESSES["VP"])
    start = [flow(X, first, u.item()) for u in t[:3]]
    x = [
        pub.unipc(D, X, t, alpha, sigma, order=3, variant=v, start=start, lower_order_final=False)
        for v in ("bh1", "bh2", "vary_coeff")
    ]
    torch.testing.assert_close(x[1], x[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x[2], x[0], rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# The installed diffusers, given our levels for its table of sigmas (its states are float32)
# ---------------------------------------------------------------------------------------------------------------------

MULTI = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
DPM = "DPMSolverMultistep"
DIFFUSERS = [  # scheduler, its configuration, our rule, its options
    (DPM, {"algorithm_type": "dpmsolver++", "solver_order": 3, **MULTI}, pub.dpmpp_3m, {}),
    (DPM, {"algorithm_type": "dpmsolver", "solver_order": 3, **MULTI}, pub.dpm_solver_3m, {}),
    (
        DPM,
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 3, "solver_type": "heun", **MULTI},
        pub.dpmpp_3m_sde,
        {"diffusers_sign": True},
    ),
    ("EulerDiscrete", {}, pub.ddim, {}),
    ("EulerAncestralDiscrete", {}, pub.euler_ancestral, {}),
    ("HeunDiscrete", {}, pub.edm_heun, {}),
    ("LMSDiscrete", {}, pub.lms, {}),
]
for kind, rule in [
    ("dpmsolver++", pub.dpmpp_2m),
    ("dpmsolver", pub.dpm_solver_2m),
    ("sde-dpmsolver++", pub.dpmpp_2m_sde),
    ("sde-dpmsolver", pub.sde_dpm_solver),
]:
    for theirs, ours in [("midpoint", "dpmsolver"), ("heun", "taylor")]:
        config = {"algorithm_type": kind, "solver_order": 2, "solver_type": theirs, **MULTI}
        DIFFUSERS.append((DPM, config, rule, {"solver_type": theirs if kind.startswith("sde") else ours}))
for p, c in [(1, 2), (2, 2), (3, 1), (3, 4)]:
    config = {"predictor_order": p, "corrector_order": c, "tau_func": lambda t: 1.0}
    DIFFUSERS.append(("SASolver", config, pub.sa_solver, {"predictor": p, "corrector": c, "rescaled": True}))
for p, theirs, ours in [(2, "midpoint", "dpmsolver"), (2, "heun", "taylor"), (3, "heun", "taylor")]:
    config = {"solver_order": p, "solver_type": theirs, "lower_order_final": True, "final_sigmas_type": "sigma_min"}
    options = {"order": p, "solver_type": ours, "prediction": "data"}
    DIFFUSERS.append(("DPMSolverSinglestep", config, pub.dpm_solver_fast, options))
for p in (1, 2, 3):
    DIFFUSERS.append(("DEISMultistep", {"solver_order": p, "lower_order_final": False}, pub.deis_lamab, {"order": p}))
    for v in ("bh1", "bh2"):
        for prediction in ("data", "noise"):
            config = {"solver_order": p, "solver_type": v, "predict_x0": prediction == "data"}
            DIFFUSERS.append(
                ("UniPCMultistep", config, pub.unipc, {"order": p, "variant": v, "prediction": prediction})
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "row", DIFFUSERS, ids=lambda r: " ".join([r[0], *(str(v) for v in r[1].values() if not callable(v))])
)
def test_the_installed_diffusers_takes_the_same_steps(row, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    name, config, rule, options = row
    process = PROCESSES["EDM" if name.endswith("Discrete") else "VP"]
    alpha, sigma, first, _ = process
    times = [first * u for u in UNEVEN]
    z = [torch.sin(torch.arange(3.0, dtype=torch.float64) + 3 * k)[None] for k in range(len(times))]
    D, x = mixture(process), first * X[None]
    noisy = {"z": z} if "z" in inspect.signature(rule).parameters else {}
    expected = rule(D, x, torch.tensor(times, dtype=torch.float64), alpha, sigma, **noisy, **options)

    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(len(times) - 1)
    if name == "HeunDiscrete":  # its table has every inner level twice
        times = [times[0], *(u for u in times[1:] for _ in range(2))]
        scheduler.timesteps = torch.arange(len(times), 0, -1)
    scheduler.sigmas = torch.tensor([sigma(u) / alpha(u) for u in times], dtype=torch.float64)
    module = inspect.getmodule(type(scheduler))
    if hasattr(module, "randn_tensor"):
        draws = iter(z)
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: next(draws).float())
    for k, u in enumerate(times[: 2 * (len(times) // 2) if name == "HeunDiscrete" else -1]):
        eps = (x - alpha(u) * D(x, u)) / sigma(u)
        x = scheduler.step(eps, scheduler.timesteps[k], x).prev_sample.double()
    torch.testing.assert_close(x, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("skip", [False, True])
def test_pndm_and_plms_are_the_installed_ones(skip):
    diffusers = pytest.importorskip("diffusers")
    alpha, sigma, first, _ = PROCESSES["VP"]
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=skip)
    scheduler.set_timesteps(10)  # 900, 800, ..., 0, with half steps or with 800 twice
    scheduler.alphas_cumprod = torch.tensor([alpha((k + 1) / 1000) ** 2 for k in range(1000)], dtype=torch.float64)
    D, x = mixture(PROCESSES["VP"]), X
    for k in scheduler.timesteps.tolist()[:-1]:
        u = (k + 1) / 1000
        x = scheduler.step((x - alpha(u) * D(x, u)) / sigma(u), k, x).prev_sample
    t = torch.tensor([(k + 1) / 1000 for k in range(900, -1, -100)], dtype=torch.float64)
    torch.testing.assert_close(x, (pub.plms if skip else pub.pndm)(D, X, t, alpha, sigma), rtol=1e-12, atol=1e-12)
