"""The oracles of published.py are themselves right: exact where they must be, of the order they are known to have,
equal to each other where two papers print the same rule, and equal to the installed diffusers.
"""

from __future__ import annotations

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
    Row(pub.dpm_solver_3m, 2, {}, 3),  # P01
    Row(pub.dpm_solver_3m, 3, {"second_derivative": 2}, 3),
    Row(pub.dpmpp_1, 1),
    Row(pub.dpmpp_2s, 2),
    Row(pub.dpmpp_2s, 2, {"r1": 0.7, **TAYLOR}),
    Row(pub.dpmpp_3s, 3),
    Row(pub.dpmpp_3s, 3, TAYLOR),
    Row(pub.dpmpp_3s, 2, {"r1": 0.4, "r2": 0.8}),
    Row(pub.dpmpp_2m, 2),
    Row(pub.dpmpp_2m, 2, TAYLOR),
    Row(pub.dpmpp_3m, 2, {}, 3),  # P01
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
    Row(pub.unipc, 1, {"order": 2, "variant": "vary_coeff", "published_bug": True, **UNI}, 2),  # P02
    Row(pub.unipc, 1, {"order": 3, "variant": "vary_coeff", "published_bug": True, **UNI}, 3),  # P02
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
    *(Row(pub.ipndm, 2, {"order": p}, alternating=1) for p in (2, 3, 4)),  # P06
    Row(pub.ipndm_v, 2, {"order": 2}, 2),
    Row(pub.ipndm_v, 3, {"order": 3}, 3, alternating=2),
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
        found = slope(*errors(row, name, "graded", on_gaussian(name)))
        assert row.order - 0.5 < found < row.order + 0.45, (name, found)


@pytest.mark.parametrize("row", ORDERS, ids=str)
def test_the_order_where_step_ratios_stay_apart(row):
    known = row.order if row.alternating == -1 else row.alternating
    found = slope(*errors(row, "VP", "alternating", on_gaussian("VP")))
    if known is None:
        assert found < 0.5
    else:
        assert known - 0.5 < found
        assert found < known + 0.45 or known == row.order  # steps equal in pairs cancel some error terms


@pytest.mark.parametrize("row", ORDERS, ids=str)
def test_the_order_on_a_model_that_is_not_linear(row):
    known = row.order if row.mixture == -1 else row.mixture
    found = slope(*errors(row, "VP", "graded", lambda n, t: (mixture(PROCESSES["VP"]), mixture_states(n))))
    assert known - 0.5 < found, found
