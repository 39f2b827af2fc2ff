"""Quadrature: weights, transfer and noise are the formula of the design, integrated independently with 25 digits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath.calculus.quadrature import GaussLegendre
from torch import Tensor

import scoresde as ss
from scoresde.processes.sde import derivative
from scoresde.solvers.interpolants import (
    DATA,
    LAM,
    LOG1P_RHO,
    NOISE,
    RHO,
    TAU,
    TIME,
    VELOCITY,
    Prediction,
    V,
    Variable,
    edm_prediction,
)
from scoresde.solvers.quadrature import Point, noise_std, transfer, weights

F = edm_prediction(0.5)
PREDICTIONS = (DATA, NOISE, VELOCITY, V, F)
VARIABLES = (LAM, RHO, TAU, LOG1P_RHO, TIME)
ETAS = (0.0, 0.5, 1.0)
EPS = torch.finfo(torch.float64).eps
EACH_PREDICTION = pytest.mark.parametrize("prediction", PREDICTIONS, ids=str)
EACH_VARIABLE = pytest.mark.parametrize("variable", VARIABLES, ids=str)

# The reference: p and q of each prediction, and the processes as functions of λ, with 25 digits.

Real = Any  # mp.mpf
mp = mpmath.MPContext()
mp.dps = 25
HALF = mp.mpf(1) / 2


def p_and_q(prediction: Prediction) -> Callable[[Real, Real], tuple[Real, Real]]:
    def root(alpha: Real, sigma: Real, s: Real) -> Real:
        return mp.sqrt(sigma**2 + (s * alpha) ** 2)

    return {
        "data": lambda a, s: (mp.mpf(0), mp.mpf(1)),
        "noise": lambda a, s: (1 / s, -a / s),
        "velocity": lambda a, s: (1 / s, -a / s - 1),
        # α ε − σ d and EDM's (d − c_skip x)/c_out, with ε = (x − α d)/σ.
        "v": lambda a, s: (a / s / root(a, s, 1), (-(a**2) / s - s) / root(a, s, 1)),
        "edm_prediction(0.5)": lambda a, s: (
            -a * HALF**2 / root(a, s, HALF) ** 2 / (s * HALF / root(a, s, HALF)),
            root(a, s, HALF) / (s * HALF),
        ),
    }[prediction.name]


def vp_time(lam: Real) -> Real:
    integral, first, slope = mp.log1p(mp.exp(-2 * lam)), mp.mpf(0.1), mp.mpf(20.0) - mp.mpf(0.1)
    return 2 * integral / (first + mp.sqrt(first**2 + 2 * slope * integral))


def ve_time(lam: Real) -> Real:
    return mp.log1p((mp.exp(-lam) / mp.mpf(0.01)) ** 2) / (2 * mp.log(mp.mpf(50.0) / mp.mpf(0.01)))


Process = tuple[ss.SDE, Callable[[Real], tuple[Real, Real]], Callable[[Real], Real]]
PROCESSES: dict[str, Process] = {
    "VP": (ss.VP(), lambda lam: (1 / mp.sqrt(1 + mp.exp(-2 * lam)), 1 / mp.sqrt(1 + mp.exp(2 * lam))), vp_time),
    "VE": (ss.VE(), lambda lam: (mp.mpf(1), mp.exp(-lam)), ve_time),
    "EDM": (ss.EDM(), lambda lam: (mp.mpf(1), mp.exp(-lam)), lambda lam: mp.exp(-lam)),
    "Flow": (
        ss.Flow(),
        lambda lam: (1 / (1 + mp.exp(-lam)), 1 / (1 + mp.exp(lam))),
        lambda lam: 1 / (1 + mp.exp(lam)),
    ),
}

GAUSS = [((x + 1) / 2, w / 2) for x, w in GaussLegendre(mp).calc_nodes(3, 100)]


def composite(a: Real, b: Real, panel: float) -> list[tuple[Real, Real]]:
    """Nodes and weights on panels of that length, in order from b back to a."""
    n = max(1, math.ceil(abs(b - a) / panel))
    step = (b - a) / n
    nodes = [(a + step * (i + x), step * w) for i in range(n) for x, w in GAUSS]
    return sorted(nodes, key=lambda node: abs(node[0] - b))


class Leg:
    """A leg from s to t, with what the formula says about it for one prediction after another."""

    def __init__(self, process: str, s: float, t: float, nodes: Sequence[float]) -> None:
        self.sde, self.alpha_sigma, self.time = PROCESSES[process]
        lam = torch.tensor([s, t, *nodes], dtype=torch.float64)
        times = self.sde.t_of_lam(lam)
        # λ of those very times, whatever rounding did to them.
        self.point = Point(times, self.sde.lam(times), self.sde.alpha(times), self.sde.sigma(times))
        self.lam = [mp.mpf(v) for v in self.point.lam.tolist()]
        self.at = composite(self.lam[0], self.lam[1], panel=1.0)
        self._transfers: dict[str, tuple[list[Real], Real]] = {}

    def u(self, variable: Variable, lam: Real, t: Real) -> Real:
        rho = mp.exp(-lam)
        return {"lam": lam, "rho": rho, "tau": rho / (1 + rho), "log1p_rho": mp.log1p(rho), "time": t}[variable.name]

    def transfers(self, prediction: Prediction) -> tuple[list[Real], Real]:
        """∫(1 + α p/q) dλ from every quadrature node, and from s, to t."""
        form = p_and_q(prediction)

        def integrand(lam: Real) -> Real:
            alpha, sigma = self.alpha_sigma(lam)
            p, q = form(alpha, sigma)
            return 1 + alpha * p / q

        total, last, out = mp.mpf(0), self.lam[1], []
        for lam in [*(lam for lam, _ in self.at), self.lam[0]]:
            total += sum(w * integrand(x) for x, w in composite(lam, last, panel=1.0))
            last = lam
            out.append(total)
        return out[:-1], out[-1]

    def exact(self, prediction: Prediction, eta: float) -> tuple[Real, Real, list[Real]]:
        """Φ(s, t), the standard deviation, and the kernel times quadrature weights."""
        gain, form = 1 + mp.mpf(eta) ** 2, p_and_q(prediction)
        if prediction.name not in self._transfers:
            self._transfers[prediction.name] = self.transfers(prediction)
        inner, whole = self._transfers[prediction.name]
        alpha_t = self.alpha_sigma(self.lam[1])[0]
        kernel, variance = [], mp.mpf(0)
        for (lam, w), integral in zip(self.at, inner, strict=True):
            alpha, sigma = self.alpha_sigma(lam)
            phi = alpha_t / alpha * mp.exp(-gain * integral)
            kernel.append(w * phi * gain * alpha / form(alpha, sigma)[1])
            variance += w * 2 * mp.mpf(eta) ** 2 * (sigma * phi) ** 2
        phi = alpha_t / self.alpha_sigma(self.lam[0])[0] * mp.exp(-gain * whole)
        return phi, mp.sqrt(abs(variance)), kernel

    def basis(self, variable: Variable, k: int) -> list[list[Real]]:
        """Lagrange polynomials through the first k nodes, at the quadrature nodes."""
        nodes = self.nodes(variable, k)
        at = [self.u(variable, lam, self.time(lam)) for lam, _ in self.at]
        out = []
        for j, node in enumerate(nodes):
            others = [n for m, n in enumerate(nodes) if m != j]
            scale = mp.fprod(node - n for n in others)
            out.append([mp.fprod(u - n for n in others) / scale for u in at])
        return out

    def nodes(self, variable: Variable, k: int) -> list[Real]:
        times = [mp.mpf(v) for v in self.point.t.tolist()]
        return [self.u(variable, self.lam[2 + i], times[2 + i]) for i in range(k)]

    def rounding(self, variable: Variable, k: int) -> float:
        """What nodes known as float64 numbers are worth: they may be much closer than they are large."""
        u = self.nodes(variable, k)
        gaps = [abs(a - b) for i, a in enumerate(u) for b in u[:i]]
        return float(max(map(abs, u)) / min(gaps)) * EPS if gaps else 0.0

    def ours(self, prediction: Prediction, variable: Variable, eta: float, k: int) -> list[float]:
        s, t = self.point[:1], self.point[1:2]
        nodes = Point(*(getattr(self.point, name)[None, 2 : 2 + k] for name in ("t", "lam", "alpha", "sigma")))
        return weights(prediction, variable, eta, s, t, nodes, self.sde.inverse_lam)[0].tolist()


BACK = (0.0, -0.6, -1.5, -2.2)  # nodes of a leg at these multiples of its length from its start
INSIDE = (0.0, 0.2, 0.5, 0.9)
# From λ, over h, with these nodes. Legs with h < 0 go up in time: encoding.
LEGS: dict[str, tuple[str, float, float, tuple[float, ...]]] = {
    "VP": ("VP", -2.3, 0.7, BACK),
    "VE": ("VE", -2.3, 0.7, BACK),
    "EDM": ("EDM", -2.3, 0.7, BACK),
    "Flow": ("Flow", -2.3, 0.7, BACK),
    "VP, noisy, h = 1e-4": ("VP", -2.3, 1e-4, BACK),
    "VP, clean, h = 1e-4": ("VP", 3.7, 1e-4, BACK),
    "Flow, h = 1e-4": ("Flow", 0.1, 1e-4, BACK),
    "VP, h = 10": ("VP", -4.0, 10.0, INSIDE),
    "EDM, h = 10": ("EDM", -4.3, 10.0, INSIDE),
    "VP, up": ("VP", 2.0, -3.0, (*BACK[:2], 0.5, 0.9)),
    "VP, up, h = -1e-4": ("VP", 1.0, -1e-4, BACK),
    "Flow, up, h = -9": ("Flow", 5.0, -9.0, INSIDE),
}


@pytest.mark.parametrize("name", LEGS)
def test_weights_transfer_and_noise_equal_the_formula_integrated_with_25_digits(name: str) -> None:
    process, start, h, fractions = LEGS[name]
    leg = Leg(process, start, start + h, [start + h * f for f in fractions])
    bases = {(v.name, k): leg.basis(v, k) for v in VARIABLES for k in range(1, 5)}
    s, t = leg.point[:1], leg.point[1:2]
    bad = []
    for prediction in PREDICTIONS:
        for eta in ETAS if h > 0 else ETAS[:1]:
            phi, std, kernel = leg.exact(prediction, eta)
            assert transfer(prediction, eta, s, t).item() == pytest.approx(float(phi), rel=1e-12)
            assert noise_std(prediction, eta, s, t).item() == pytest.approx(float(std), rel=1e-12)
            for variable in VARIABLES:
                for k in range(1, 5):
                    want = [mp.fdot(kernel, row) for row in bases[variable.name, k]]
                    got = leg.ours(prediction, variable, eta, k)
                    size = max(map(abs, want))
                    gap = float(max(abs(a - b) for a, b in zip(got, want, strict=True)) / size)
                    if not gap < 1e-12 + 4 * leg.rounding(variable, k):
                        bad.append((prediction, variable, eta, k, gap))
                    # The sum is what makes data in one point exact: nothing cancels in it.
                    assert abs(sum(got) - mp.fsum(kernel)) < 1e-12 * sum(map(abs, got)) + 1e-15 * abs(mp.fsum(kernel))
    assert not bad, bad


def test_nodes_that_nearly_meet_cost_nothing_in_lam() -> None:
    # In λ even h = 1e-4 keeps twelve digits: no allowance for the rounding of nodes is needed.
    for start in (-2.3, 0.1, 3.7):
        leg = Leg("VP", start, start + 1e-4, [start + 1e-4 * f for f in BACK])
        for prediction in PREDICTIONS:
            kernel = leg.exact(prediction, 1.0)[2]
            want = [mp.fdot(kernel, row) for row in leg.basis(LAM, 4)]
            got = leg.ours(prediction, LAM, 1.0, 4)
            gap = max(abs(a - b) for a, b in zip(got, want, strict=True)) / max(map(abs, want))
            assert gap < 1e-12, (start, prediction)


def test_the_reference_is_right() -> None:
    # mpmath's own nested quadrature of the formula as the design prints it.
    leg = Leg("Flow", -1.0, 0.5, [-1.0, -1.8])
    form = p_and_q(V)
    gain = mp.mpf(1.25)

    def rate(lam: Real) -> Real:
        alpha, sigma = leg.alpha_sigma(lam)
        p, q = form(alpha, sigma)
        return 1 + alpha * p / q

    def kernel(lam: Real) -> Real:
        alpha, sigma = leg.alpha_sigma(lam)
        inner = mp.quad(rate, [lam, leg.lam[1]], maxdegree=4)
        phi = leg.alpha_sigma(leg.lam[1])[0] / alpha * mp.exp(-gain * inner)
        return phi * gain * alpha / form(alpha, sigma)[1]

    a, b = leg.nodes(TAU, 2)
    want = mp.quad(
        lambda lam: kernel(lam) * (leg.u(TAU, lam, None) - b) / (a - b), [leg.lam[0], leg.lam[1]], maxdegree=4
    )
    got = mp.fdot(leg.exact(V, 0.5)[2], leg.basis(TAU, 2)[0])
    assert abs(got / want - 1) < 1e-15


# Closed forms of the papers.


def legs_of(sde: ss.SDE, s: float, t: float, nodes: Sequence[float]) -> tuple[Point, Point, Point]:
    """Points of one leg by time: s (1,), t (1,) and nodes (1, k)."""
    time = torch.tensor([s, t, *nodes], dtype=torch.float64)
    point = Point(time, sde.lam(time), sde.alpha(time), sde.sigma(time))
    return point[:1], point[1:2], Point(*(getattr(point, f)[None, 2:] for f in ("t", "lam", "alpha", "sigma")))


def weigh(
    sde: ss.SDE,
    prediction: Prediction,
    variable: Variable,
    s: float,
    t: float,
    nodes: Sequence[float],
    eta: float = 0.0,
    moments: Sequence[str | float] | None = None,
) -> list[float]:
    points = legs_of(sde, s, t, nodes)
    return weights(prediction, variable, eta, *points, sde.inverse_lam, moments)[0].tolist()


SDE = ss.VP()
S, T, BEFORE, BETWEEN = 0.6, 0.45, 0.7, 0.52
ALPHA, SIGMA = SDE.alpha(T), SDE.sigma(T)
H = SDE.lam(T) - SDE.lam(S)


def test_one_node_is_ddim_and_its_stochastic_kin() -> None:
    assert weigh(SDE, DATA, LAM, S, T, [S]) == pytest.approx([ALPHA * (1 - math.exp(-H))], rel=1e-13)
    ddim = SIGMA - ALPHA * SDE.sigma(S) / SDE.alpha(S)
    assert weigh(SDE, NOISE, LAM, S, T, [S]) == pytest.approx([ddim], rel=1e-13)
    # SDE-DPM-Solver++ 1: (σ_t/σ_s) e^{−h} x + α_t (1 − e^{−2h}) d + σ_t √(1 − e^{−2h}) z, α the coefficient of data.
    assert weigh(SDE, DATA, LAM, S, T, [S], eta=1.0) == pytest.approx([ALPHA * (1 - math.exp(-2 * H))], rel=1e-13)
    s, t, _ = legs_of(SDE, S, T, [S])
    assert transfer(DATA, 1.0, s, t).item() == pytest.approx(SIGMA / SDE.sigma(S) * math.exp(-H), rel=1e-13)
    assert noise_std(DATA, 1.0, s, t).item() == pytest.approx(SIGMA * math.sqrt(1 - math.exp(-2 * H)), rel=1e-13)
    # Ancestral DDPM is the posterior q(x_t | x_s, x0).
    of_x, of_d, variance = SDE.posterior(T, S)
    assert transfer(DATA, 1.0, s, t).item() == pytest.approx(of_x, rel=1e-12)
    assert weigh(SDE, DATA, LAM, S, T, [S], eta=1.0) == pytest.approx([of_d], rel=1e-12)
    assert noise_std(DATA, 1.0, s, t).item() ** 2 == pytest.approx(variance, rel=1e-12)
    # SDE-DPM-Solver 1, of noise: α_t/α_s x − 2 σ_t (e^h − 1) ε + σ_t √(e^{2h} − 1) z.
    assert weigh(SDE, NOISE, LAM, S, T, [S], eta=1.0) == pytest.approx([-2 * SIGMA * math.expm1(H)], rel=1e-13)
    assert noise_std(NOISE, 1.0, s, t).item() == pytest.approx(SIGMA * math.sqrt(math.expm1(2 * H)), rel=1e-13)


@pytest.mark.parametrize("eta", ETAS)
def test_two_nodes_behind_are_2m(eta: float) -> None:
    r = (SDE.lam(S) - SDE.lam(BEFORE)) / H
    whole = ALPHA * -math.expm1(-(1 + eta**2) * H)
    half = whole / (2 * r)
    got = weigh(SDE, DATA, LAM, S, T, [S, BEFORE], eta, ("exact", "mid"))
    assert got == pytest.approx([whole + half, -half], rel=1e-12)
    # Exact: the second moment is α_t (h − (1 − e^{−(1+η²)h})/(1+η²)).
    gain = 1 + eta**2
    exact = ALPHA * (H + math.expm1(-gain * H) / gain) / (r * H)
    assert weigh(SDE, DATA, LAM, S, T, [S, BEFORE], eta) == pytest.approx([whole + exact, -exact], rel=1e-11)


def test_single_steps_are_dpm_solver_2_and_3() -> None:
    r = (SDE.lam(BETWEEN) - SDE.lam(S)) / H
    phi_1 = math.expm1(H)
    phi_2 = phi_1 / H - 1
    mid = SIGMA * phi_1 / (2 * r)
    got = weigh(SDE, NOISE, LAM, S, T, [S, BETWEEN], moments=("exact", "mid"))
    assert got == pytest.approx([-SIGMA * phi_1 + mid, -mid], rel=1e-12)
    third = SIGMA / r * phi_2
    got = weigh(SDE, NOISE, LAM, S, T, [S, BETWEEN])
    assert got == pytest.approx([-SIGMA * phi_1 + third, -third], rel=1e-12)
    plus = ALPHA / r * (math.expm1(-H) / H + 1)
    got = weigh(SDE, DATA, LAM, S, T, [S, BETWEEN])
    assert got == pytest.approx([-ALPHA * math.expm1(-H) - plus, plus], rel=1e-12)


@pytest.mark.parametrize(("moments", "bh"), [(("exact", "end"), H), (("exact", "mid"), -math.expm1(-H))])
def test_moments_of_unipc_are_its_b_of_h(moments: tuple[str, ...], bh: float) -> None:
    # x_t = (σ_t/σ_s) x_s − α_t (e^{−h} − 1) d_s + α_t B(h) D/(2r), with B = h (bh1) or B = 1 − e^{−h} (bh2).
    whole = -ALPHA * math.expm1(-H)
    new = ALPHA * bh / 2
    assert weigh(SDE, DATA, LAM, S, T, [T, S], moments=moments) == pytest.approx([new, whole - new], rel=1e-12)
    # Of noise, with B = h or e^h − 1.
    bh = H if moments[1] == "end" else math.expm1(H)
    whole, new = -SIGMA * math.expm1(H), -SIGMA * bh / 2
    assert weigh(SDE, NOISE, LAM, S, T, [T, S], moments=moments) == pytest.approx([new, whole - new], rel=1e-12)


def test_a_factor_scales_a_moment() -> None:
    # The published multistep 3 carries half of the exact third moment; all of it is the exact row again.
    nodes = [S, BEFORE, 0.85]
    exact, one, half, none = (
        np.array(weigh(SDE, DATA, LAM, S, T, nodes, moments=m))
        for m in (None, ("exact", "exact", 1.0), ("exact", "exact", 0.5), ("exact", "exact", 0.0))
    )
    assert one == pytest.approx(exact, rel=1e-13)
    assert half == pytest.approx((exact + none) / 2, rel=1e-12)
    offset = [SDE.lam(n) - SDE.lam(S) for n in nodes]
    second = ALPHA * (H**2 / 2 - H - math.expm1(-H)) * 2  # ∫K (λ − λ_s)² dλ
    assert np.dot(exact, np.square(offset)) == pytest.approx(second, rel=1e-11)
    assert np.dot(none, np.square(offset)) == pytest.approx(0, abs=1e-12 * second)


AB2 = {
    # Interpolation of a velocity in its own clock is Adams–Bashforth for uneven steps: N_t ∫ ℓ dc.
    "noise in rho": (NOISE, RHO, lambda sde, t: sde.sigma(t) / sde.alpha(t), lambda sde, t: sde.alpha(t)),
    "velocity in tau": (
        VELOCITY,
        TAU,
        lambda sde, t: sde.sigma(t) / (sde.alpha(t) + sde.sigma(t)),
        lambda sde, t: sde.alpha(t) + sde.sigma(t),
    ),
}


@pytest.mark.parametrize("case", AB2)
@pytest.mark.parametrize("t", [0.2, 0.0])
def test_predictions_in_their_own_clock_are_adams_bashforth(case: str, t: float) -> None:
    prediction, variable, clock, scale = AB2[case]
    for sde in (ss.VP(), ss.Flow(), ss.Cosine()):
        a, b, c = (clock(sde, v) for v in (0.5, t, 0.8))
        h, before = b - a, a - c
        want = [h + h**2 / (2 * before), -(h**2) / (2 * before)]
        got = weigh(sde, prediction, variable, 0.5, t, [0.5, 0.8])
        assert got == pytest.approx([scale(sde, t) * w for w in want], rel=1e-12)


# Infinite ends.


def test_into_no_noise_data_takes_the_interpolant_at_the_end() -> None:
    sde = ss.VP()
    assert weigh(sde, DATA, LAM, 0.5, 0.0, [0.5]) == [1.0]
    for variable in (RHO, TAU, TIME):
        for eta in ETAS:
            times = torch.tensor([0.0, 0.5, 0.8], dtype=torch.float64)
            u = variable.of(sde.lam(times), times).tolist()
            want = [(u[0] - u[2]) / (u[1] - u[2]), (u[0] - u[1]) / (u[2] - u[1])]
            assert weigh(sde, DATA, variable, 0.5, 0.0, [0.5, 0.8], eta) == pytest.approx(want, rel=1e-13)
    s, t, _ = legs_of(sde, 0.5, 0.0, [0.5])
    assert transfer(DATA, 0.0, s, t).item() == 0.0, "nothing of the state is left"


INFINITE = (DATA, VELOCITY, V, F)


@pytest.mark.parametrize("eta", [0.0, 0.25, 0.5, 1.0, 1.5])
@pytest.mark.parametrize("prediction", INFINITE, ids=str)
def test_from_no_signal_weights_equal_the_improper_integral(prediction: Prediction, eta: float) -> None:
    # On Flow from t = 1, where λ = −∞: ∫ K ℓ dλ over all λ up to λ_t.
    leg = Leg("Flow", -1.0, 0.8, [0.0])
    form, gain = p_and_q(prediction), 1 + mp.mpf(eta) ** 2
    end = leg.lam[1]
    # N per unit of α is known for each prediction; the general formula was tested above.
    scale = {"data": lambda r: r, "velocity": lambda r: 1 + r, "v": lambda r: mp.sqrt(1 + r**2)}.get(
        prediction.name, lambda r: mp.sqrt(HALF**2 + r**2)
    )
    alpha_t = leg.alpha_sigma(end)[0]
    u_end = leg.u(TAU, mp.mpf(0), None)

    def integrand(lam: Real, first: bool) -> Real:
        r = mp.exp(-lam)
        relative = (scale(mp.exp(-end)) / scale(r)) ** gain
        u = 1 / (1 + mp.exp(lam))
        basis = (u - u_end) / (1 - u_end) if first else (u - 1) / (u_end - 1)
        return alpha_t * gain / form(mp.mpf(1), r)[1] * relative * basis

    bounds = [end - 120, end - 40, end - 20, end - 10, end - 5, end - 2, end]
    want = [float(mp.quad(lambda lam, f=first: integrand(lam, f), bounds)) for first in (True, False)]
    t = leg.point.t[1].item()
    got = weigh(ss.Flow(), prediction, TAU, 1.0, t, [1.0, leg.point.t[2].item()], eta)
    assert got == pytest.approx(want, rel=1e-12, abs=1e-12 * max(map(abs, want)))
    s, t_, _ = legs_of(ss.Flow(), 1.0, t, [1.0])
    if eta:
        assert transfer(prediction, eta, s, t_).item() == 0.0, "the start is forgotten"


def test_from_no_signal_to_no_noise_in_one_leg() -> None:
    assert weigh(ss.Flow(), VELOCITY, TAU, 1.0, 0.0, [1.0]) == pytest.approx([-1.0], rel=1e-15)
    assert weigh(ss.Flow(), DATA, LAM, 1.0, 0.0, [1.0]) == [1.0]
    assert weigh(ss.Trig(), V, TAU, 1.0, 0.0, [1.0]) == pytest.approx([-math.pi / 2], rel=1e-14)


# Gradients and grids for each sample.


def of_times(sde: ss.SDE, prediction: Prediction, variable: Variable, eta: float, times: Tensor) -> Tensor:
    """Weights, transfer and noise of a leg as one vector; times are s, t and the nodes, (2 + k,) or (2 + k, B)."""
    flat = times.reshape(-1)
    point = Point(times, *(f(flat).reshape(times.shape) for f in (sde.lam, sde.alpha, sde.sigma)))
    s, t = point[:1], point[1:2]
    nodes = Point(*(getattr(point, f)[None, 2:] for f in ("t", "lam", "alpha", "sigma")))
    parts = [weights(prediction, variable, eta, s, t, nodes, sde.inverse_lam)[0], transfer(prediction, eta, s, t)]
    return torch.cat([*parts, noise_std(prediction, eta, s, t)])


@pytest.mark.parametrize("eta", [0.0, 0.7])
@EACH_VARIABLE
@EACH_PREDICTION
def test_gradients_in_the_times_equal_finite_differences(
    prediction: Prediction, variable: Variable, eta: float
) -> None:
    times = torch.tensor([0.6, 0.45, 0.6, 0.7, 0.82], dtype=torch.float64)
    for sde in (ss.VP(), ss.Flow()):
        fn = lambda t, sde=sde: of_times(sde, prediction, variable, eta, t)  # noqa: E731
        got = torch.autograd.functional.jacobian(fn, times)
        step = 1e-5 * torch.eye(5, dtype=torch.float64)
        want = torch.stack([(fn(times + e) - fn(times - e)) / 2e-5 for e in step], dim=1)
        assert float((got - want).abs().max() / want.abs().max()) < 1e-7


@EACH_VARIABLE
@EACH_PREDICTION
def test_a_grid_for_each_sample_gives_each_its_own_weights(prediction: Prediction, variable: Variable) -> None:
    times = torch.tensor([[0.6, 0.9, 0.3], [0.45, 0.2, 0.29], [0.6, 0.9, 0.3], [0.7, 0.95, 0.5]], dtype=torch.float64)
    for eta in ETAS:
        together = of_times(ss.VP(), prediction, variable, eta, times)
        for b in range(3):
            alone = of_times(ss.VP(), prediction, variable, eta, times[:, b])
            assert torch.allclose(together[:, b], alone, rtol=1e-13, atol=0)


def test_moments_and_infinite_ends_take_a_grid_for_each_sample_too() -> None:
    sde = ss.Flow()
    times = torch.tensor([[0.6, 0.9], [0.45, 0.2], [0.6, 0.9], [0.7, 0.95], [0.8, 0.97]], dtype=torch.float64)

    def go(times: Tensor, moments: Any, variable: Variable = LAM, prediction: Prediction = DATA) -> Tensor:
        flat = times.reshape(-1)
        point = Point(times, *(f(flat).reshape(times.shape) for f in (sde.lam, sde.alpha, sde.sigma)))
        nodes = Point(*(getattr(point, f)[None, 2:] for f in ("t", "lam", "alpha", "sigma")))
        return weights(prediction, variable, 0.0, point[:1], point[1:2], nodes, sde.inverse_lam, moments)[0]

    for k, moments in ((4, ("exact", "mid")), (4, ("exact", "end")), (5, ("exact", "exact", 0.5))):
        together = go(times[:k], moments)
        alone = torch.stack([go(times[:k, b], moments) for b in range(2)], dim=-1)
        assert torch.allclose(together, alone, rtol=1e-12)
    for ends in ((1.0, 0.3), (0.6, 0.0)):
        infinite = torch.tensor([[ends[0]] * 2, [ends[1], ends[1] / 2], [0.9, 0.8], [0.95, 0.99]], dtype=torch.float64)
        for prediction in (DATA, VELOCITY):
            together = go(infinite, None, TAU, prediction)
            alone = torch.stack([go(infinite[:, b], None, TAU, prediction) for b in range(2)], dim=-1)
            assert together.isfinite().all()
            assert torch.allclose(together, alone, rtol=1e-13)


@pytest.mark.parametrize("eta", ETAS)
@EACH_PREDICTION
def test_at_equal_lam_every_process_has_the_same_row_for_x_over_alpha(prediction: Prediction, eta: float) -> None:
    lam = torch.tensor([-1.1, 0.4, -1.1, -1.9, -2.8], dtype=torch.float64)
    rows = []
    for sde in (ss.VP(), ss.VE(), ss.EDM(), ss.Flow(), ss.SubVP()):
        time = sde.t_of_lam(lam)
        point = Point(time, lam, sde.alpha(time), sde.sigma(time))
        s, t, nodes = point[:1], point[1:2], point[None, 2:]
        row = []
        for variable in (LAM, RHO, TAU):
            W = weights(prediction, variable, eta, s, t, nodes, sde.inverse_lam)[0]
            row += [W * prediction.q(nodes.alpha, nodes.sigma)[0] / t.alpha]
            row += [W * (prediction.p(nodes.alpha, nodes.sigma) * nodes.alpha)[0] / t.alpha]
        row += [transfer(prediction, eta, s, t) * s.alpha / t.alpha, noise_std(prediction, eta, s, t) / t.alpha]
        rows.append(torch.cat(row))
    for row in rows[1:]:
        assert torch.allclose(row, rows[0], rtol=1e-12, atol=1e-14)


@EACH_PREDICTION
def test_eta_zero_is_the_flow_without_noise(prediction: Prediction) -> None:
    s, t, _ = legs_of(SDE, S, T, [S])
    assert noise_std(prediction, 0.0, s, t).item() == 0.0
    ratio = prediction.scale(t.alpha, t.sigma) / prediction.scale(s.alpha, s.sigma)
    assert torch.equal(transfer(prediction, 0.0, s, t), ratio)
    # The limit is continuous, in η² as everything is.
    small = weigh(SDE, prediction, LAM, S, T, [S, BEFORE], eta=1e-7)
    assert small == pytest.approx(weigh(SDE, prediction, LAM, S, T, [S, BEFORE]), rel=1e-12)


@EACH_PREDICTION
def test_p_q_and_scale_belong_together(prediction: Prediction) -> None:
    # N is what the homogeneous part of the flow keeps x in proportion to: d log N/dλ = d log α/dλ − 1 − α p/q.
    lam = torch.linspace(-4, 4, 33, dtype=torch.float64)
    for sde in (ss.VP(), ss.EDM(), ss.Flow()):

        def log_n(lam: Tensor, sde: ss.SDE = sde) -> Tensor:
            t = sde.t_of_lam(lam)
            return (prediction.scale(sde.alpha(t), sde.sigma(t)) / sde.alpha(t)).log()

        alpha, sigma = (f(sde.t_of_lam(lam)) for f in (sde.alpha, sde.sigma))
        want = -1 - alpha * prediction.p(alpha, sigma) / prediction.q(alpha, sigma)
        assert torch.allclose(derivative(log_n, lam), want, rtol=1e-9, atol=1e-9)
    c = prediction.clock(lam)
    assert torch.allclose(prediction.lam_of_clock(c), lam, atol=1e-12)
    assert torch.allclose(prediction.slope(c), derivative(prediction.clock, lam), rtol=1e-10)
