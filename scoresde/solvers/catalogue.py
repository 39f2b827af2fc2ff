"""Published solvers by name. Each is one function that says which pattern of nodes the paper's equations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from scoresde import _checks as check
from scoresde.plan import Plan, Weight
from scoresde.quadrature import DATA, LAM, NOISE, RHO, TAU, TIME, VELOCITY, Prediction
from scoresde.sde import SDE
from scoresde.solvers.ancestral import Posterior
from scoresde.solvers.base import Eta, Solver
from scoresde.solvers.combinations import ADAMS, NoiseCombination
from scoresde.solvers.exponential import KROGSTAD4, ExponentialRungeKutta, res3
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.singlestep import EULER, HEUN, MIDPOINT, RK4, RungeKutta, SingleStep, Tableau, second_order
from scoresde.solvers.statistics import Statistics
from scoresde.tape import Tape

_FORMS: dict[str, tuple[str | float, ...] | None] = {
    "mid": ("exact", "mid"),
    "end": ("exact", "end"),
    "exact": None,
}


def _order(order: int, *allowed: int) -> int:
    if check.integer("order", order, least=1) not in allowed:
        raise ValueError(f"`order` must be one of {', '.join(map(str, allowed))}, got {order}.")
    return order


def DDIM(eta: Eta = 0.0) -> Solver:
    r"""DDIM: exact for data concentrated in one point. Without noise it is DPM-Solver-1, with η = 1 DDPM's sampler.

    .. math:: x_t = \alpha_t d_s + \sqrt{\sigma_t^2 - c^2}\,\varepsilon_s + c z, \qquad
              c = \eta\,\sigma_t\sqrt{1 - \frac{\alpha_s^2\sigma_t^2}{\alpha_t^2\sigma_s^2}}

    Order 1, weak order 1.

    Arguments:
        eta: The noise, whose variance goes as η²: a number, or a function of the time where a leg ends.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, eqs. 12 and 16
    """
    return Multistep(1, label="DDIM") if eta == 0 else Posterior(eta, label="DDIM")


def Euler(clock: str = "t") -> Solver:
    """Euler steps on the probability flow dx/dt, or dx/dλ with ``clock="lam"``. DDIM is as cheap and more accurate."""
    return RungeKutta(EULER, None, clock, "Euler")


def Heun(clock: str = "t") -> Solver:
    """Heun steps on the probability flow dx/dt or dx/dλ; :func:`EDMHeun` is the one in σ/α."""
    return RungeKutta(HEUN, None, clock, "Heun")


def Midpoint(clock: str = "t") -> Solver:
    """Midpoint steps on the probability flow dx/dt or dx/dλ."""
    return RungeKutta(MIDPOINT, None, clock, "Midpoint")


def RungeKutta4(clock: str = "t") -> Solver:
    """The classical fourth-order method on the probability flow dx/dt or dx/dλ."""
    return RungeKutta(RK4, None, clock, "RungeKutta4")


def EDMHeun(alpha: float = 1.0) -> Solver:
    r"""EDM's deterministic sampler: Heun on :math:`d(x/\alpha)/d(\sigma/\alpha) = \varepsilon`, Euler into σ = 0.

    Arguments:
        alpha: Where the second stage is: 1 is Heun, ½ the midpoint, ⅔ Ralston.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          algorithms 1 and 3
    """
    return RungeKutta(second_order(alpha), NOISE, label="EDMHeun")


def DPM2() -> Solver:
    """Midpoint in log σ of the noise: one stage at the geometric mean of the leg's σ/α, whose noise is used alone.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          as k-diffusion has it
    """
    return SingleStep(2, NOISE, reads=(1,), label="DPM2")


def DEISRungeKutta(tableau: Tableau = HEUN) -> Solver:
    """ρRK-DEIS: a Butcher tableau on the noise in ρ = σ/α.

    Arguments:
        tableau: Any explicit tableau.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), arXiv:2204.13902
    """
    return RungeKutta(tableau, NOISE, label="DEISRungeKutta")


def _lambda_solver(
    label: str, prediction: Prediction, order: int, kind: str, form: str, r: Sequence[float], start: str
) -> Solver:
    check.choice("kind", kind, ("single", "multi", "fast"))
    check.choice("form", form, ("published", "mid", "exact"))
    if kind == "fast":
        return Mixed((), prediction, label)
    if kind == "single":
        _order(order, 1, 2, 3)
        two = None if form == "exact" else _FORMS["mid"]
        reads = (0, 1, 2) if order == 3 and form == "exact" else ()
        return SingleStep(order, prediction, r=tuple(r), reads=reads, moments=two if order == 2 else None, label=label)
    if r:
        raise ValueError("`r` places the stages of single steps; with kind='multi' there are none.")
    if form == "published" and order == 3:
        return PublishedThree(3, prediction, moments=_FORMS["mid"], start=start, label=f"{label}[published]")
    two = None if form == "exact" or (form == "published" and order > 3) else _FORMS["mid"]
    return Multistep(order, prediction, moments=two, start=start, label=label)


def DPMSolver(
    order: int = 3, kind: str = "single", form: str = "mid", r: Sequence[float] = (), start: str = "ramp"
) -> Solver:
    r"""DPM-Solver: exponential integrators in λ that interpolate the noise.

    Arguments:
        order: 1, 2 or 3; multistep any.
        kind: ``"single"`` with stages inside each leg, ``"multi"`` through earlier legs, ``"fast"`` the published
            mixture of single steps of orders 3, 2 and 1 that spends a budget exactly.
        form: Of two-node rows: ``"mid"`` as published (∫K · h/2), or ``"exact"``. ``"published"`` differs in multistep
            3 alone: it carries half of the second-derivative term, as the public code does, and is of order 2.
        r: Fractions of the stages of single steps, by default ½, or ⅓ and ⅔.
        start: Of multistep: ``"ramp"``, or ``"self"`` to start at full order.

    References:
        | DPM-Solver (Lu et al., 2022), arXiv:2206.00927, algorithms 1 and 2, eq. B.4
    """
    return _lambda_solver("DPMSolver", NOISE, order, kind, form, r, start)


def DPMSolverPP(
    order: int = 2, kind: str = "multi", form: str = "mid", r: Sequence[float] = (), start: str = "ramp"
) -> Solver:
    r"""DPM-Solver++: exponential integrators in λ that interpolate the data prediction; 2M, 3M, 2S, 3S.

    .. math:: x_t = \frac{\sigma_t}{\sigma_s} x_s - \alpha_t(e^{-h}-1)\,d_s
              - \frac{\alpha_t(e^{-h}-1)}{2}\,\frac{d_s - d_r}{r} \qquad\text{(2M)}

    Arguments:
        order: 1, 2 or 3; multistep any.
        kind: ``"multi"``, ``"single"`` or ``"fast"``, see :func:`DPMSolver`.
        form: ``"mid"`` as published, ``"exact"``, or ``"published"``, see :func:`DPMSolver`.
        r: Fractions of the stages of single steps, by default ½, or ⅓ and ⅔.
        start: Of multistep: ``"ramp"``, or ``"self"`` to start at full order.

    References:
        | DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, algorithms 1 and 2
    """
    return _lambda_solver("DPMSolverPP", DATA, order, kind, form, r, start)


def UniPC(
    order: int = 3, variant: str = "bh2", prediction: Prediction = DATA, corrector: bool = True, start: str = "ramp"
) -> Solver:
    r"""UniPC: predict with `order` nodes, correct with one more; the corrected state is not asked again.

    Two-node rows use :math:`B(h) = e^h - 1` (``"bh2"``, ∫K · h/2) or :math:`B(h) = h` (``"bh1"``, K(λ_t) h²/2); rows
    with more nodes are exact whatever B is, so ``"exact"`` (which is also ``vary_coeff`` with all of its rows) differs
    there alone.

    Arguments:
        order: Nodes of the predictor; the corrected method has one order more.
        variant: ``"bh2"``, ``"bh1"`` or ``"exact"``.
        prediction: ``DATA`` or ``NOISE``.
        corrector: Whether to correct.
        start: ``"ramp"``, or ``"self"`` to start at full order.

    References:
        | UniPC (Zhao et al., 2023), arXiv:2302.04867, algorithms 1 and 2
    """
    check.choice("variant", variant, ("bh2", "bh1", "exact"))
    moments = _FORMS[{"bh2": "mid", "bh1": "end", "exact": "exact"}[variant]]
    more = check.integer("order", order, least=1) + 1 if corrector else 0
    return Multistep(order, prediction, corrector=more, moments=moments, start=start, label="UniPC")


def with_corrector(solver: Solver, order: int | None = None, *, reevaluate: bool = False) -> Solver:
    """A multistep rule with a corrector on top: UniC for any predictor.

    Arguments:
        solver: A multistep rule.
        order: Nodes of the corrector, by default one more than the predictor's.
        reevaluate: Ask the network again at the corrected state.
    """
    if not isinstance(solver, Multistep):
        raise TypeError(f"`solver` must be a multistep rule, got {solver!r}.")
    nodes = solver.order + 1 if order is None else check.integer("order", order, least=1)
    return replace(solver, corrector=nodes, reevaluate=reevaluate)


def DEIS(order: int = 3, variable: str = "t", start: str = "ramp") -> Solver:
    r"""DEIS: Adams–Bashforth on the noise, with polynomials in t (tAB), ρ = σ/α (ρAB) or λ (λAB).

    Arguments:
        order: Nodes, one more than the polynomial's degree.
        variable: ``"t"``, ``"rho"`` or ``"lam"``.
        start: ``"ramp"``, or ``"self"`` to start at full order.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), arXiv:2204.13902
    """
    check.choice("variable", variable, ("t", "rho", "lam"))
    return Multistep(order, NOISE, {"t": TIME, "rho": RHO, "lam": LAM}[variable], start=start, label="DEIS")


def LMS(order: int = 4) -> Solver:
    """Linear multistep in σ/α, as k-diffusion has it: ρAB-DEIS under its older name, with exact integrals."""
    return Multistep(order, NOISE, RHO, label="LMS")


def RES(order: int = 3, c2: float = 0.5, c3: float = 1.0) -> Solver:
    r"""Refined exponential solver: single steps that meet the stiff order conditions.

    Order 2 is the exact form of DPM-Solver++ 2S with its stage at c2. Order 3 has
    :math:`\gamma = c_3(3c_3-2)/(c_2(2-3c_2))`; some public code has c₃³ for c₃² in it, which is of order 2 unless c₃ =
    1.

    Arguments:
        order: 2 or 3.
        c2: Fraction of the second stage.
        c3: Fraction of the third stage.

    References:
        | Improved Order Analysis and Design of Exponential Integrator for Diffusion Models Sampling (Zhang et al.,
          2023), arXiv:2308.02157
    """
    if _order(order, 2, 3) == 2:
        return SingleStep(2, DATA, r=(c2,), label="RES")
    return ExponentialRungeKutta(res3(c2, c3), label="RES")


def ETDRK4() -> Solver:
    """Krogstad's exponential Runge–Kutta method of order 4 on the data prediction.

    References:
        | Generalized integrating factor methods for stiff PDEs (Krogstad, 2005), doi:10.1016/j.jcp.2004.08.006
    """
    return ExponentialRungeKutta(KROGSTAD4, label="ETDRK4")


def VelocityAB(order: int = 3, start: str = "ramp") -> Solver:
    r"""Adams–Bashforth on the flow velocity ε − d in τ = σ/(α + σ): few calls, any process.

    Arguments:
        order: Nodes.
        start: ``"ramp"``, or ``"self"`` to start at full order.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747, for the velocity
    """
    return Multistep(order, VELOCITY, TAU, start=start, label="VelocityAB")


def DPMSolverV3(statistics: Statistics, order: int = 3, corrector: bool = True, start: str = "ramp") -> Solver:
    """DPM-Solver-v3 with one set of statistics for all entries of a state.

    Arguments:
        statistics: Tables of l, s and b, given or from :meth:`Statistics.estimate`.
        order: Nodes of the predictor.
        corrector: Whether to correct, with the same number of nodes, the new one included, plus one.
        start: ``"ramp"``, or ``"self"`` to start at full order.

    References:
        | DPM-Solver-v3 (Zheng et al., 2023), arXiv:2310.13268, algorithms 1 and 2
    """
    more = order + 1 if corrector else 0
    return Multistep(order, statistics.prediction(), corrector=more, start=start, label="DPMSolverV3")


def analytic_first_step(plan: Plan, sde: SDE, data_std: float = 1.0) -> Plan:
    r"""The same plan without its first evaluation: at high noise data looks Gaussian, and its denoiser is known.

    .. math:: D(x, T) \approx \frac{\alpha c^2}{\alpha^2 c^2 + \sigma^2}\,x

    Arguments:
        plan: A plan whose first row is evaluated.
        sde: The process it was written for.
        data_std: Standard deviation c of the data, whose mean is taken as 0.

    References:
        | Genie (Dockhorn et al., 2022), arXiv:2210.05475, appendix; AMED-Solver (Zhou et al., 2024), arXiv:2312.00094
    """
    check.number("data_std", data_std, above=0)
    t = float(plan.rows[0].t)
    alpha, sigma = sde.alpha(t), sde.sigma(t)
    gain = alpha * data_std**2 / (alpha**2 * data_std**2 + sigma**2)
    rows = [replace(plan.rows[0], evaluates=False)]
    for row in plan.rows[1:]:
        known = dict(row.d).get(0)
        if known is not None:
            x = dict(row.x)
            x[0] = x.get(0, 0.0) + gain * known
            row = replace(row, x=tuple(x.items()), d=tuple((k, w) for k, w in row.d if k))
        rows.append(row)
    return replace(plan, rows=tuple(rows), name=f"{plan.name}, analytic first step")


def PLMS() -> Solver:
    """PNDM without Runge–Kutta legs: Adams–Bashforth coefficients for equal steps on the noise, raised leg by leg.

    References:
        | Pseudo Numerical Methods for Diffusion Models on Manifolds (Liu et al., 2022), arXiv:2202.09778
    """
    return NoiseCombination(label="PLMS")


def IPNDM(order: int = 4) -> Solver:
    """iPNDM: Adams–Bashforth coefficients for equal steps, on any grid, as published. Of order 2 at most.

    With the coefficients that belong to the grid it is :func:`DEIS` in ρ.

    Arguments:
        order: Nodes, 1 to 4.

    References:
        | Fast Sampling of Diffusion Models with Exponential Integrator (Zhang & Chen, 2023), arXiv:2204.13902, appendix
    """
    rows = ADAMS[: _order(order, 1, 2, 3, 4)]
    return NoiseCombination(rows, order=1, label="IPNDM") if order == 1 else NoiseCombination(rows, label="IPNDM")


def AcceleratedDDIM(gamma: float = 2.0) -> Solver:
    r"""DDIM with extrapolated noise, :math:`\varepsilon = \gamma\varepsilon_i + (1-\gamma)\varepsilon_{i-1}`.

    References:
        | Interpreting and Improving Diffusion Models from an Optimization Perspective (Permenter & Yuan, 2024),
          arXiv:2306.04848
    """
    check.number("gamma", gamma)
    return NoiseCombination(((1.0,), (gamma, 1 - gamma)), order=1, label=f"AcceleratedDDIM[{gamma:g}]")


@dataclass(frozen=True, repr=False)
class PublishedThree(Multistep):
    """Multistep 3 of the DPM-Solver line as public code has it: half of the second-derivative term, so of order 2."""

    @property
    def declared_order(self) -> int:
        """Order of convergence."""
        return self._corrected(2)

    def _many(self, nodes: int) -> tuple[str | float, ...] | None:
        return ("exact", "exact", 0.5) if nodes == 3 else None


@dataclass(frozen=True, repr=False)
class Mixed(Solver):
    """Single steps of a given order each: the "fast" mixture that spends any budget exactly.

    Arguments:
        orders: Order of each leg.
        prediction: What is interpolated.
        label: Name of the plans.
    """

    orders: tuple[int, ...]
    prediction: Prediction = NOISE
    label: str = ""

    def __repr__(self) -> str:
        return f"{self.label or 'Mixed'}(orders={self.orders})"

    @property
    def declared_order(self) -> int:
        """Order of its lowest leg among many: the first legs' for the published mixtures."""
        return max(self.orders, default=3)

    def for_nfe(self, nfe: int, *, clean: bool = True) -> tuple[Solver, int]:
        """The published mixture: legs of order 3, then 2 and 1, or 1, or 2 to finish the budget.

        A leg into σ = 0 asks once: two legs of order 1 then stand for the one of order 2.
        """
        K = check.integer("nfe", nfe, least=1) // 3
        tail = {0: (2, 1), 1: (1,), 2: (1, 1) if clean else (2,)}[nfe % 3]
        orders = (*[3] * (K - 1 if nfe % 3 == 0 else K), *tail) if nfe >= 3 else tail
        return replace(self, orders=orders), len(orders)

    def plan(self, sde: SDE, times: Tensor | Sequence[float], *, up: str = "diffuse") -> Plan:
        """Write the table; the grid must have one leg for each order."""
        if not self.orders or len(times) != len(self.orders) + 1:
            raise ValueError(
                f"`times` must have one leg for each of the orders {self.orders}, got {len(times) - 1} legs; "
                f"`for_nfe(nfe)` gives the mixture and its number of legs."
            )
        return super().plan(sde, times, up=up)

    def _leg(self, tape: Tape, now: int, history: list[int], t: Weight, asks: bool, node: int) -> tuple[int, list[int]]:
        order = self.orders[node - 1]
        moments = _FORMS["mid"] if order == 2 else None
        return SingleStep(order, self.prediction, moments=moments)._leg(tape, now, history, t, asks, node)
