"""Published solvers by name. Each function configures the solver class for the equations of one paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE
from scoresde.solvers.ancestral import Posterior
from scoresde.solvers.entry_statistics import EntryMultistep, EntryStatistics
from scoresde.solvers.exponential import KROGSTAD4, ExponentialRungeKutta, res3
from scoresde.solvers.interpolants import DATA, LAM, LOG1P_RHO, NOISE, RHO, TAU, TIME, VELOCITY, Prediction
from scoresde.solvers.multistep import Moments, Multistep
from scoresde.solvers.naming import published
from scoresde.solvers.pndm import ADAMS, NoiseCombination
from scoresde.solvers.rule import Eta, Solver
from scoresde.solvers.runge_kutta import EULER, HEUN, MIDPOINT, RK4, RungeKutta, Tableau, second_order
from scoresde.solvers.single_step import SingleStep
from scoresde.solvers.statistics import Statistics
from scoresde.solvers.tape import Leg, Tape

FORMS: dict[str, Moments] = {
    "mid": ("exact", "mid"),
    "end": ("exact", "end"),
    "exact": None,
}


def order_of(order: int, *allowed: int) -> int:
    """Return `order` if it is one of the allowed ones, by default any of at least 1; else raise an error."""
    if check.integer("order", order, at_least=1) not in (allowed or (order,)):
        raise ValueError(f"`order` must be one of {', '.join(map(str, allowed))}, got {order}.")
    return order


@published
def DDIM(eta: Eta = 0.0) -> Solver:
    r"""DDIM, exact for data concentrated in one point; η = 0 is DPM-Solver-1, and η = 1 is DDPM's sampler.

    .. math:: x_t = \alpha_t d_s + \sqrt{\sigma_t^2 - c^2}\,\varepsilon_s + c z, \qquad
              c = \eta\,\sigma_t\sqrt{1 - \frac{\alpha_s^2\sigma_t^2}{\alpha_t^2\sigma_s^2}}

    Order 1, weak order 1.

    Arguments:
        eta: Stochasticity η: a number, or a function of the time at the end of a step. The noise has variance c² ∝ η².

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, eqs. 12 and 16
    """
    return Multistep(1) if eta == 0 else Posterior(eta)


@published
def Euler(clock: str = "t") -> Solver:
    """Euler's method on the probability flow dx/dt or dx/dλ. DDIM is more accurate at the same cost.

    Arguments:
        clock: Time variable: ``"t"`` or ``"lam"``.

    References:
        | Solving Ordinary Differential Equations I (Hairer, Nørsett and Wanner, 1993)
    """
    return RungeKutta(EULER, None, clock)


@published
def Heun(clock: str = "t") -> Solver:
    """Heun's method on the probability flow dx/dt or dx/dλ; :func:`EDMHeun` is Heun's method in σ/α.

    Arguments:
        clock: Time variable: ``"t"`` or ``"lam"``.

    References:
        | Solving Ordinary Differential Equations I (Hairer, Nørsett and Wanner, 1993)
    """
    return RungeKutta(HEUN, None, clock)


@published
def Midpoint(clock: str = "t") -> Solver:
    """The midpoint method on the probability flow dx/dt or dx/dλ.

    Arguments:
        clock: Time variable: ``"t"`` or ``"lam"``.

    References:
        | Solving Ordinary Differential Equations I (Hairer, Nørsett and Wanner, 1993)
    """
    return RungeKutta(MIDPOINT, None, clock)


@published
def RungeKutta4(clock: str = "t") -> Solver:
    """The classical fourth-order method on the probability flow dx/dt or dx/dλ.

    Arguments:
        clock: Time variable: ``"t"`` or ``"lam"``.

    References:
        | Solving Ordinary Differential Equations I (Hairer, Nørsett and Wanner, 1993)
    """
    return RungeKutta(RK4, None, clock)


@published
def EDMHeun(alpha: float = 1.0) -> Solver:
    r"""EDM's deterministic sampler: Heun on :math:`d(x/\alpha)/d(\sigma/\alpha) = \varepsilon`, Euler into σ = 0.

    Arguments:
        alpha: Fraction of the step at the second stage: 1 is Heun, ½ the midpoint method, ⅔ Ralston.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          algorithms 1 and 3
    """
    return RungeKutta(second_order(alpha), NOISE)


@published
def DPM2() -> Solver:
    """DPM-2: the noise prediction at the geometric mean of the step's two σ/α gives the whole step.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          in the form of k-diffusion
    """
    return SingleStep(2, NOISE, reads=(1,))


@published
def DEISRungeKutta(tableau: Tableau = HEUN) -> Solver:
    """ρRK-DEIS: a Runge–Kutta method on the noise prediction in ρ = σ/α.

    Arguments:
        tableau: Explicit Butcher tableau.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), arXiv:2204.13902
    """
    return RungeKutta(tableau, NOISE)


def _lambda_solver(prediction: Prediction, order: int, kind: str, form: str, r: Sequence[float], start: str) -> Solver:
    """DPM-Solver or DPM-Solver++, by the prediction."""
    check.choice("kind", kind, ("single", "multi", "fast"))
    check.choice("form", form, ("published", "mid", "exact"))
    check.choice("start", start, ("ramp", "self"))
    if kind == "fast":
        return Mixed((), prediction)
    if kind == "single":
        order_of(order, 1, 2, 3)
        moments = FORMS["mid"] if order == 2 and form != "exact" else None
        reads = (0, 1, 2) if order == 3 and form == "exact" else ()
        return SingleStep(order, prediction, r=tuple(r), reads=reads, moments=moments)
    if r:
        raise ValueError(f"`r` must be empty for `kind`='multi', got {tuple(r)}; remove it, or use `kind`='single'.")
    if form == "published" and order == 3:
        return PublishedThree(3, prediction, moments=FORMS["mid"], start=start)
    moments = None if form == "exact" or (form == "published" and order > 3) else FORMS["mid"]
    return Multistep(order_of(order), prediction, moments=moments, start=start)


@published
def DPMSolver(
    order: int = 3, kind: str = "single", form: str = "mid", r: Sequence[float] = (), start: str = "ramp"
) -> Solver:
    r"""DPM-Solver: exponential integrators in λ that interpolate the noise prediction.

    Arguments:
        order: Order of the method: 1, 2 or 3, and any order for ``kind="multi"``.
        kind: Type of steps: ``"single"`` (stages inside each step), ``"multi"`` (history of earlier steps) or
            ``"fast"`` (the published mixture of single steps of orders 3, 2 and 1 for a given `nfe`).
        form: Weights of rows with two nodes: ``"mid"`` as published (∫K · h/2), or ``"exact"``. ``"published"`` only
            differs for multistep order 3: it halves the second-derivative term, as in public code, and has order 2.
        r: Fractions of the stages if ``kind="single"``, by default ½, or ⅓ and ⅔.
        start: First steps of multistep solvers: ``"ramp"``, or ``"self"`` for full order from the start.

    References:
        | DPM-Solver (Lu et al., 2022), arXiv:2206.00927, algorithms 1 and 2, eq. B.4
    """
    return _lambda_solver(NOISE, order, kind, form, r, start)


@published
def DPMSolverPP(
    order: int = 2, kind: str = "multi", form: str = "mid", r: Sequence[float] = (), start: str = "ramp"
) -> Solver:
    r"""DPM-Solver++: exponential integrators in λ that interpolate the data prediction; 2M, 3M, 2S, 3S.

    .. math:: x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t(e^{-h}-1)\,d_s
              - \frac{\alpha_t(e^{-h}-1)}{2}\,\frac{d_s - d_r}{r} \qquad\text{(2M)}

    Arguments:
        order: Order of the method: 1, 2 or 3, and any order for ``kind="multi"``.
        kind: Type of steps: ``"multi"``, ``"single"`` or ``"fast"``, see :func:`DPMSolver`.
        form: Weights: ``"mid"`` as published, ``"exact"``, or ``"published"``, see :func:`DPMSolver`.
        r: Fractions of the stages if ``kind="single"``, by default ½, or ⅓ and ⅔.
        start: First steps of multistep solvers: ``"ramp"``, or ``"self"`` for full order from the start.

    References:
        | DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, algorithms 1 and 2
    """
    return _lambda_solver(DATA, order, kind, form, r, start)


@published
def UniPC(
    order: int = 3, form: str = "bh2", prediction: Prediction = DATA, corrector: bool = True, start: str = "ramp"
) -> Solver:
    r"""UniPC: a predictor with `order` nodes and a corrector with one more, without evaluation at the corrected state.

    Rows with two nodes use :math:`B(h) = e^h - 1` (``"bh2"``, ∫K · h/2) or :math:`B(h) = h` (``"bh1"``, K(λ_t) h²/2).
    Rows with more nodes are exact for any B. Therefore ``"exact"``, which equals ``vary_coeff`` with all of its rows,
    differs only in the rows with two nodes. :class:`Multistep` chooses the nodes, and
    :func:`scoresde.solvers.quadrature.weights` computes the weights of predictor and corrector; ``print(plan)`` shows
    them in the rows "predict" and "correct".

    Arguments:
        order: Number of nodes of the predictor; the corrector raises the order by one.
        form: Weights of rows with two nodes: ``"bh2"``, ``"bh1"`` or ``"exact"``.
        prediction: Prediction to interpolate: ``DATA`` or ``NOISE``.
        corrector: Whether to apply the corrector.
        start: First steps: ``"ramp"``, or ``"self"`` for full order from the start.

    References:
        | UniPC (Zhao et al., 2023), arXiv:2302.04867, algorithms 1 and 2
    """
    check.choice("form", form, ("bh2", "bh1", "exact"))
    moments = FORMS[{"bh2": "mid", "bh1": "end", "exact": "exact"}[form]]
    corrector_nodes = order_of(order) + 1 if corrector else 0
    return Multistep(order, prediction, corrector=corrector_nodes, moments=moments, start=start)


@published
def with_corrector(solver: Solver, order: int | None = None, *, reevaluate: bool = False) -> Solver:
    """Add a corrector (UniC) to a multistep solver.

    Arguments:
        solver: Multistep solver.
        order: Number of nodes of the corrector, by default one more than the predictor's.
        reevaluate: Whether to evaluate the network again at the corrected state.

    References:
        | UniPC: A Unified Predictor-Corrector Framework (Zhao et al., 2023), arXiv:2302.04867
    """
    if not isinstance(solver, Multistep):
        raise TypeError(f"`solver` must be a multistep solver, got {solver!r}.")
    nodes = solver.nodes + 1 if order is None else order_of(order)
    return replace(solver, corrector=nodes, reevaluate=reevaluate)


@published
def DEIS(order: int = 3, variable: str = "t", start: str = "ramp") -> Solver:
    r"""DEIS: Adams–Bashforth on the noise prediction, with polynomials in t (tAB), ρ = σ/α (ρAB) or λ (λAB).

    Arguments:
        order: Number of nodes, one more than the degree of the polynomial.
        variable: Variable of the interpolating polynomial: ``"t"``, ``"rho"`` or ``"lam"``.
        start: First steps: ``"ramp"``, or ``"self"`` for full order from the start.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), arXiv:2204.13902
    """
    check.choice("variable", variable, ("t", "rho", "lam"))
    return Multistep(order_of(order), NOISE, {"t": TIME, "rho": RHO, "lam": LAM}[variable], start=start)


@published
def LMS(order: int = 4) -> Solver:
    """The linear multistep method of k-diffusion in σ/α: ρAB-DEIS, with exact integrals.

    Arguments:
        order: Number of nodes, one more than the degree of the polynomial.

    References:
        | Solving Ordinary Differential Equations I (Hairer, Nørsett and Wanner, 1993)
    """
    return Multistep(order_of(order), NOISE, RHO)


@published
def RES(order: int = 3, c2: float = 0.5, c3: float = 1.0) -> Solver:
    r"""RES, the refined exponential solver: single steps that satisfy the stiff order conditions.

    Order 2 is the exact form of DPM-Solver++ 2S with its stage at c₂. Order 3 uses
    :math:`\gamma = c_3(3c_3-2)/(c_2(2-3c_2))`. Some public code has c₃³ in place of c₃² in γ; its order is 2 unless
    c₃ = 1.

    Arguments:
        order: Order of the method: 2 or 3.
        c2: Fraction of the second stage.
        c3: Fraction of the third stage, for order 3.

    References:
        | Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling (Zhang et al.,
          2023), arXiv:2308.02157
    """
    if order_of(order, 2, 3) == 2:
        return SingleStep(2, DATA, r=(c2,))
    return ExponentialRungeKutta(res3(c2, c3))


@published
def ETDRK4() -> Solver:
    """Krogstad's exponential Runge–Kutta method of order 4 on the data prediction.

    References:
        | Generalized integrating factor methods for stiff PDEs (Krogstad, 2005), doi:10.1016/j.jcp.2004.08.006
    """
    return ExponentialRungeKutta(KROGSTAD4)


@published
def VelocityAB(order: int = 3, start: str = "ramp", final: int = 0, variable: str = "tau") -> Solver:
    r"""Adams–Bashforth on the flow velocity ε − d in τ = σ/(α + σ), for any process.

    Arguments:
        order: Number of nodes.
        start: First steps: ``"ramp"``, or ``"self"`` for full order from the start.
        final: Number of nodes of the step into σ = 0, by default `order`; 1 returns the newest data prediction.
        variable: Variable of the interpolating polynomial: ``"tau"``; ``"lam"``, which amplifies errors of an
            ε-network less with few steps, and whose step into σ = 0 returns the newest data prediction; or
            ``"log1p_rho"``, log(1 + σ/α), which is like λ at high noise and like τ near data.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747, for the velocity
    """
    variables = {"tau": TAU, "lam": LAM, "log1p_rho": LOG1P_RHO}
    check.choice("variable", variable, tuple(variables))
    return Multistep(order_of(order), VELOCITY, variables[variable], start=start, final=final)


@published
def DPMSolverV3(
    statistics: Statistics | EntryStatistics, order: int = 3, corrector: bool = True, start: str = "ramp"
) -> Solver:
    """DPM-Solver-v3, which interpolates the nonlinear part of the prediction by statistics of the model.

    Statistics for each entry of a state make the weights of a plan tensors. On exact problems they have gained little
    over those for all entries.

    Arguments:
        statistics: Tables of l, s and b: from :func:`estimate_statistics`, :func:`estimate_entry_statistics` or
            :func:`load_statistics`.
        order: Number of nodes of the predictor.
        corrector: Whether to apply a corrector with `order` + 1 nodes, including the new one.
        start: First steps: ``"ramp"``, or ``"self"`` for full order from the start, with statistics for all entries.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, algorithms 1 and 2
    """
    corrector_nodes = order_of(order) + 1 if corrector else 0
    if isinstance(statistics, EntryStatistics):
        if check.choice("start", start, ("ramp", "self")) == "self":
            raise ValueError("`start`='self' needs statistics for all entries; use `statistics.mean()`.")
        return EntryMultistep(statistics, order, corrector_nodes)
    return Multistep(order, statistics.prediction(), corrector=corrector_nodes, start=start)


@published
def PLMS() -> Solver:
    """PLMS: Adams–Bashforth on the noise with the coefficients of equal steps; the order rises step by step.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), arXiv:2202.09778
    """
    return NoiseCombination()


@published
def IPNDM(order: int = 4) -> Solver:
    """iPNDM: Adams–Bashforth with the coefficients of equal steps on any grid, as published; order at most 2.

    :func:`DEIS` in ρ is the same method with the coefficients of the actual grid.

    Arguments:
        order: Number of nodes, 1 to 4.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), arXiv:2204.13902, appendix
    """
    rows = ADAMS[: order_of(order, 1, 2, 3, 4)]
    return NoiseCombination(rows, order=1) if order == 1 else NoiseCombination(rows)


@published
def AcceleratedDDIM(gamma: float = 2.0) -> Solver:
    r"""DDIM with extrapolated noise, :math:`\varepsilon = \gamma\varepsilon_i + (1-\gamma)\varepsilon_{i-1}`.

    Arguments:
        gamma: Weight γ of the newest noise prediction; 1 is DDIM.

    References:
        | Interpreting and Improving Diffusion Models from an Optimization Perspective (Permenter & Yuan, 2024),
          arXiv:2306.04848
    """
    check.number("gamma", gamma)
    return NoiseCombination(((1.0,), (gamma, 1 - gamma)), order=1)


@checked
@dataclass(frozen=True, repr=False)
class PublishedThree(Multistep):
    """Multistep DPM-Solver of order 3 as in public code: its second-derivative term is halved, so its order is 2.

    References:
        | DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models (Lu et al., 2022), arXiv:2211.01095
    """

    @property
    def order(self) -> int:
        return self.corrected(2)

    def moments_of(self, nodes: int) -> Moments:
        return ("exact", "exact", 0.5) if nodes == 3 else self.moments if nodes == 2 else None


@checked
@dataclass(frozen=True, repr=False)
class Mixed(Solver):
    """Single steps, each with its own order: the published "fast" mixture for a given number of evaluations.

    Arguments:
        orders: Order of each step.
        prediction: Prediction to interpolate.

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), arXiv:2206.00927
    """

    orders: tuple[int, ...]
    prediction: Prediction = NOISE

    @property
    def order(self) -> int:
        """Order of convergence: one step of order p has an error of order h^(p + 1).

        It is 2 if the budget is not known yet: only budgets of 3k + 2 evaluations that end above σ = 0 give 3.
        """
        return min(max(self.orders), min(self.orders) + 1) if self.orders else 2

    @checked
    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """Return the published mixture: steps of order 3, then (2, 1), (1) or (2), for exactly `nfe` evaluations.

        A step into σ = 0 costs one evaluation, so with `clean` two steps of order 1 replace the last one of order 2.
        """
        threes = check.integer("nfe", nfe, at_least=1) // 3
        tail = {0: (2, 1), 1: (1,), 2: (1, 1) if clean else (2,)}[nfe % 3]
        orders = (*[3] * (threes - 1 if nfe % 3 == 0 else threes), *tail)
        return replace(self, orders=orders), len(orders)

    @checked
    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Build the plan; the grid must have one step per entry of `orders`."""
        if not self.orders or len(times) != len(self.orders) + 1:
            raise ValueError(
                f"`times` must have one step for each of the orders {self.orders}, got {len(times) - 1} steps; "
                f"`for_nfe(nfe)` returns the solver and its number of steps."
            )
        return super().plan(sde, times, up=up)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        assert leg.node is not None
        order = self.orders[leg.node - 1]
        moments = FORMS["mid"] if order == 2 else None
        return SingleStep(order, self.prediction, moments=moments).leg(tape, leg)
