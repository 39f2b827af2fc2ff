r"""Published stochastic solvers by name. Each function configures the solver class for the equations of one paper.

Solvers of the reverse SDE integrate its noise along the step. Ancestral solvers, churn and restart solve past the end
of a step and return to it by the exact forward transition. The arguments `eta` and `tau` are a number, or a function of
the time at the end of a step; with 0 the result equals that of the deterministic solver bit by bit. No solver adds
noise at σ = 0. The tests measure two orders of convergence: `order`, without noise, and `weak_order`, in distribution
on Gaussian data (:func:`weak_order`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from scoresde import _checks as check
from scoresde.solvers.ancestral import Ancestral, Churn, Consistency, Posterior, TwoStage
from scoresde.solvers.deterministic import DPM2, FORMS, DPMSolverPP, EDMHeun, Euler, Heun, PublishedThree, order_of
from scoresde.solvers.interpolants import DATA, NOISE, Prediction
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.naming import published
from scoresde.solvers.reverse_sde import ExtendedReverse, ReverseSDE, SongPredictor
from scoresde.solvers.rule import Eta, EtaWithin, Solver
from scoresde.solvers.single_step import SingleStep


@published
def DDPM(variance: str = "small", score_square: Callable[[Tensor], float | Tensor] | Tensor | None = None) -> Solver:
    r"""DDPM's ancestral sampler for any process and any grid: the posterior of x_t given x_s and x₀ = E[x₀ | x_s].

    .. math:: x_t = \frac{\alpha_t\beta}{\sigma_s^2}\,d_s + \frac{\alpha_s\sigma_t^2}{\alpha_t\sigma_s^2}\,x_s
              + \sqrt v\,z, \qquad \beta = \sigma_s^2 - \frac{\alpha_s^2}{\alpha_t^2}\sigma_t^2

    Learned variances depend on the state, and a plan cannot hold them; see
    :class:`LearnedVariance`. Order 1, weak order 1.

    Arguments:
        variance: Variance v: ``"small"`` is β σ_t²/σ_s². ``"large"`` is β, correct for data from N(0, I). ``"optimal"``
            is that of the best Gaussian fit to the reverse transition, exact for isotropic Gaussian data.
        score_square: E|∇log p_t|²/D for ``"optimal"``: a function of time, or one number per step of the grid; see
            :func:`mean_squared_score`.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239, eqs. 6 and 7, algorithm 2
        | Analytic-DPM (Bao et al., 2022), arXiv:2201.06503, theorem 1
    """
    if variance == "learned":
        raise ValueError(
            "`variance`='learned' depends on the state, so a plan cannot hold it; use sampling.LearnedVariance()."
        )
    given = tuple(float(v) for v in score_square) if isinstance(score_square, Tensor) else score_square
    return Posterior(1.0, variance, given)


@published
def EulerAncestral(eta: Eta = 1.0, s_noise: float = 1.0) -> Solver:
    r"""A DDIM step to a time past the end of the step, then noise: DDIM(η) with a factor on the noise.

    Order 1, weak order 1.

    Arguments:
        eta: Stochasticity: 0 for no fresh noise, 1 for as much as in DDPM.
        s_noise: Factor on the noise.

    References:
        | k-diffusion (Crowson, 2022), ``sample_euler_ancestral``
    """
    return Posterior(eta, s_noise=s_noise)


@published
def DPM2Ancestral(eta: Eta = 1.0, s_noise: float = 1.0) -> Solver:
    """A DPM-2 step to a time past the end of the step, then noise. Order 2, weak order 2.

    Arguments:
        eta: Stochasticity: 0 for no fresh noise, 1 for as much as in DDPM.
        s_noise: Factor on the noise.

    References:
        | k-diffusion (Crowson, 2022), ``sample_dpm_2_ancestral``
    """
    return Ancestral(DPM2(), eta, s_noise)


@published
def DPMPP2SAncestral(eta: Eta = 1.0, s_noise: float = 1.0) -> Solver:
    """A DPM-Solver++ 2S step to a time past the end of the step, then noise. Order 2, weak order 2.

    Arguments:
        eta: Stochasticity: 0 for no fresh noise, 1 for as much as in DDPM.
        s_noise: Factor on the noise.

    References:
        | k-diffusion (Crowson, 2022), ``sample_dpmpp_2s_ancestral``
    """
    return Ancestral(DPMSolverPP(2, kind="single"), eta, s_noise)


@published
def DPMPPSDE(eta: Eta = 1.0, r: float = 0.5, s_noise: float = 1.0, one_path: bool = True) -> Solver:
    """DPM++ SDE: DPM-Solver++ 2S with fresh noise at the stage and at the end, from one Brownian path in σ/α.

    Order 2, weak order 2; the weak order is 1 with independent noise. ``SEEDS(2, DATA)`` uses the noise of the SDE.

    Arguments:
        eta: Stochasticity: 0 for no fresh noise, 1 for as much as in DDPM.
        r: Fraction of the step in λ at which the stage is.
        s_noise: Factor on the noise.
        one_path: Whether both Gaussian increments are from one Brownian path; otherwise they are independent.

    References:
        | k-diffusion (Crowson, 2022), ``sample_dpmpp_sde``
    """
    return TwoStage(eta, r, s_noise, one_path)


@published
def EDMStochastic(
    s_churn: float = 40.0,
    s_tmin: float = 0.05,
    s_tmax: float = 50.0,
    s_noise: float = 1.003,
    solver: Solver | None = None,
) -> Solver:
    r"""EDM's stochastic sampler: noise multiplies σ/α by 1 + γ, then a Heun step follows.

    .. math:: \gamma = \min(s_{churn}/N, \sqrt2 - 1) \quad\text{where}\quad s_{tmin} \le \sigma/\alpha \le s_{tmax}

    The first state is a draw from the prior and gets no extra noise. Order 2, weak order 2.

    Arguments:
        s_churn: Amount of noise over the whole grid of N steps.
        s_tmin: Lowest σ/α at which noise is added.
        s_tmax: Highest σ/α at which noise is added.
        s_noise: Factor on the noise; a factor above 1 compensates for detail that the network removes.
        solver: Solver of the steps, by default :func:`EDMHeun`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          algorithm 2
    """
    return Churn(EDMHeun() if solver is None else solver, s_churn, s_tmin, s_tmax, s_noise)


@published
def ConsistencySampling() -> Solver:
    r"""Multistep consistency sampling: :math:`x_t = \alpha_t f(x_s, s) + \sigma_t z`, with a consistency model f.

    It is exact for a consistency model. For a denoiser, which predicts E[x₀ | x], it has no order.

    References:
        | Consistency Models (Song et al., 2023), arXiv:2303.01469, algorithm 1
    """
    return Consistency()


@published
def EulerMaruyama(eta: Eta = 1.0, clock: str = "t") -> Solver:
    r"""Euler–Maruyama on the reverse SDE in t or in λ. Order 1, weak order 1.

    .. math:: x_t = x_s + \left[f x_s - \tfrac{1+\eta^2}{2} g^2\,\frac{\alpha_s d_s - x_s}{\sigma_s^2}\right](t - s)
              + \eta\,g\sqrt{s - t}\;z

    A step into σ = 0 returns the denoised state. A step from α = 0, where the drift is infinite, is an exponential
    step.

    Arguments:
        eta: Stochasticity: 1 for the reverse SDE, 0 for :func:`Euler`.
        clock: Time variable: ``"t"`` or ``"lam"``.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, eq. 6
    """
    return Euler(clock) if eta == 0 else ReverseSDE(eta, clock)


@published
def StochasticHeun(eta: Eta = 1.0, clock: str = "t") -> Solver:
    r"""Heun on the reverse SDE, with the same noise in both stages. Order 2, weak order 2.

    .. math:: \hat x = x_s + h\,a(x_s, s) + \nu z, \qquad x_t = x_s + \tfrac h2\left[a(x_s, s) + a(\hat x, t)\right]
              + \nu z, \qquad \nu^2 = \tfrac{\eta^2}{2}\left(g_s^2 + g_t^2\right)|h|

    Arguments:
        eta: Stochasticity: 1 for the reverse SDE, 0 for :func:`Heun`.
        clock: Time variable: ``"t"`` or ``"lam"``.

    References:
        | Numerical Solution of Stochastic Differential Equations (Kloeden & Platen, 1992), section 15.1
    """
    return Heun(clock) if eta == 0 else ReverseSDE(eta, clock, heun=True)


@published
def ReverseDiffusion() -> Solver:
    r"""Song's reverse-diffusion predictor with the exact forward transition. Order 1, weak order 1.

    .. math:: x_t = (2 - A)\,x_s + G^2\,\nabla\log p_s(x_s) + G z, \qquad A = \alpha_s/\alpha_t, \quad
              G^2 = \sigma_s^2 - A^2\sigma_t^2

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, appendix E
    """
    return SongPredictor()


@published
def SDEDPMSolver(order: int = 2, form: str = "mid", eta: Eta = 1.0, start: str = "ramp") -> Solver:
    r"""SDE-DPM-Solver: multistep on the reverse SDE with the noise prediction. Order `order`, weak order at most 2.

    .. math:: x_t = \frac{\alpha_t}{\alpha_s}x_s - 2\sigma_t(e^h - 1)\,\varepsilon_s + \sigma_t\sqrt{e^{2h} - 1}\;z
              \qquad\text{(order 1)}

    Arguments:
        order: Number of nodes.
        form: Weights of rows with two nodes: ``"mid"`` as published, or ``"exact"``; ``"published"`` as in
            :func:`SDEDPMSolverPP`.
        eta: Stochasticity: 1 for the reverse SDE.
        start: First steps: ``"ramp"``, or ``"self"`` for single steps of full order.

    References:
        | DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, section 5 and appendix
    """
    return _multistep(NOISE, order, form, eta, start)


@published
def SDEDPMSolverPP(order: int = 2, form: str = "mid", eta: Eta = 1.0, start: str = "ramp") -> Solver:
    r"""SDE-DPM-Solver++: multistep on the reverse SDE with the data prediction (DPM++ 2M SDE and 3M SDE).

    .. math:: x_t = \frac{\sigma_t}{\sigma_s}e^{-h}x_s + \alpha_t(1 - e^{-2h})\Big(d_s + \frac{d_s - d_r}{2 r}\Big)
              + \sigma_t\sqrt{1 - e^{-2h}}\;z \qquad\text{(2M)}

    Order `order`, weak order at most 2. ``form="published"`` is order 3 of public code: its second-derivative term is
    halved, so its order is 2; the weak order is still 2. With the sign that diffusers uses there, the order is 1.

    Arguments:
        order: Number of nodes.
        form: Weights of rows with two nodes: ``"mid"``, or ``"exact"`` (k-diffusion's "heun"); ``"published"`` for
            order 3 only.
        eta: Stochasticity: 1 for the reverse SDE. The eta of k-diffusion is η².
        start: First steps: ``"ramp"``, or ``"self"`` for single steps of full order.

    References:
        | DPM-Solver++ (Lu et al., 2022), arXiv:2211.01095, section 5 and appendix
    """
    return _multistep(DATA, order, form, eta, start)


def _multistep(prediction: Prediction, order: int, form: str, eta: Eta, start: str) -> Solver:
    check.choice("form", form, ("mid", "exact", "published"))
    if form == "published":
        return PublishedThree(order_of(order, 3), prediction, eta=eta, start=start)
    return Multistep(order_of(order), prediction, moments=FORMS[form], eta=eta, start=start)


MIDDLE = EtaWithin(1.0, 0.5, 25.0)


@published
def SASolver(
    predictor: int = 1,
    corrector: int = 2,
    tau: Eta = MIDDLE,
    prediction: Prediction = DATA,
    pece: bool = False,
    form: str = "exact",
) -> Solver:
    r"""SA-Solver: stochastic Adams method; predictor and corrector use the same noise.

    .. math:: x_t = \frac{\sigma_t}{\sigma_s}e^{-\tau^2 h}x_s + \sum_j b_j d_j + \sigma_t\sqrt{1 - e^{-2\tau^2 h}}\;z,
              \qquad b_j = (1+\tau^2)\,\alpha_t\int e^{-(1+\tau^2)(\lambda_t-\lambda)}\,\ell_j(\lambda)\,d\lambda

    The order is min(predictor + 1, corrector), or `predictor` without a corrector. With τ > 0 the weak order is ≤ 2.

    A predictor with several nodes extrapolates the predictions over a step in λ, with weights of changing sign. If
    steps are few, those near data are long, and each is longer in λ than the step before it: the last step of the
    default grid with 10 steps on SubVP has the length 6.2, after 1.2, and weights in the ratio 22 : −47 : 25. They
    amplify the changes of the predictions, which are rough if τ > 0, as the path is. ``python
    experiments/stochastic.py --gaussian 0.6`` prints the standard deviation of Gaussian data of 0.6 under many
    solvers. With 10 steps, 3 and 4 nodes and τ = 1 give 1.2 (VP), 2.8 (Flow) and 5.7 (SubVP). The default has a
    predictor with one node, which extrapolates nothing, and a corrector with two; it has order 2 and gives 0.53 to
    0.55. The authors recommend 3 and 4 nodes, and 2 and 2 for strong guidance.

    Arguments:
        predictor: Number of nodes of the predictor, 1 to 4.
        corrector: Number of nodes of the corrector, including the new one, 1 to 4; 0 for no corrector.
        tau: Stochasticity τ = η: a number, an :class:`EtaWithin` or a function of time. The default is 1 where
            0.5 ≤ σ/α ≤ 25, and 0 elsewhere: about the interval of the authors' code (0.2 ≤ t ≤ 0.8 on VP), on every
            process. The paper chooses interval and τ for each data set, and higher τ for more steps.
        prediction: Prediction to interpolate: ``DATA`` or ``NOISE``.
        pece: Whether to evaluate the network again at the corrected state.
        form: Weights of rows with two nodes: ``"exact"``, or ``"end"`` as rescaled in the paper's appendix.

    References:
        | SA-Solver (Xue et al., 2023), arXiv:2309.05019, eqs. 14 to 18, algorithm 1
    """
    check.choice("form", form, ("exact", "end"))
    for name, nodes in (("predictor", predictor), ("corrector", corrector)):
        check.integer(name, nodes, at_least=1 if name == "predictor" else 0)
        if nodes > 4:
            raise ValueError(f"`{name}` must be at most 4, got {nodes}.")
    return Multistep(
        predictor,
        prediction,
        corrector=corrector,
        reevaluate=pece,
        eta=tau,
        moments=FORMS[form],
    )


@published
def SEEDS(
    order: int = 3, prediction: Prediction = NOISE, form: str = "mid", r: tuple[float, ...] = (), eta: Eta = 1.0
) -> Solver:
    r"""SEEDS: the stages of DPM-Solver on the reverse SDE; later stages reuse the noise of earlier ones.

    .. math:: x_1 = \Phi x_s + W d_s + \sigma_1 n_1 z_1, \qquad x_t = \Phi x_s + W_0 d_s + W_1 d_1
              + \sigma_t (n_{10} z_1 + n_2 z_2) \qquad\text{(order 2)}

    Order `order`, weak order min(order, 2). The weights are those of the paper. The public code of order 3 rescales or
    swaps the noise of its stages; for the data prediction it has a wrong weight, which reduces the order to 1.

    Arguments:
        order: Order of the method: 1, 2 or 3.
        prediction: Prediction to interpolate: ``NOISE`` as published, or ``DATA``.
        form: Weights: ``"mid"`` as published (one weight for both moments), or ``"exact"``.
        r: Fractions of the stages, by default ½, or ⅓ and ⅔.
        eta: Stochasticity: 1 for the reverse SDE.

    References:
        | SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models (Gonzalez et al., 2023),
          arXiv:2305.14267
    """
    order_of(order, 1, 2, 3)
    check.choice("form", form, ("mid", "exact"))
    reads = (0, 1, 2) if order == 3 and form == "exact" else ()
    moments = FORMS[form] if order == 2 else None
    return SingleStep(order, prediction, r=tuple(r), reads=reads, moments=moments, eta=eta)


def er_sde_scale(rho: Tensor) -> Tensor:
    r"""The noise scale that the ER-SDE paper recommends, :math:`\phi = \varrho\,(e^{\varrho^{0.3}} + 10)`."""
    return rho * ((rho**0.3).exp() + 10)


@published
def ERSDE(order: int = 3, phi: Callable[[Tensor], Tensor] = er_sde_scale, form: str = "exact") -> Solver:
    r"""ER-SDE-Solver: the data prediction is interpolated in ρ = σ/α, and φ(ρ) sets the noise scale.

    .. math:: \frac{x_t}{\alpha_t} = \frac{\phi_t}{\phi_s}\frac{x_s}{\alpha_s}
              + \left(1 - \frac{\phi_t}{\phi_s}\right)d_s
              + \sqrt{\varrho_t^2 - \left(\tfrac{\phi_t}{\phi_s}\varrho_s\right)^2}\;z \qquad\text{(order 1)}

    Order `order`; weak order min(order, 2) with noise, and `order` without noise (φ = ρ). The published order 3 takes
    the slope of D half a step too early, so its order is 2. Integrals are exact, not sums over 100 points.

    Arguments:
        order: Order of the method: 1, 2 or 3.
        phi: Function φ(ρ) of tensors; φ = ρ is the flow, φ = ρ² the reverse SDE.
        form: Weights of order 3: ``"exact"`` or ``"published"``.

    References:
        | Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models (Cui et al., 2023),
          arXiv:2309.06169
    """
    check.choice("form", form, ("exact", "published"))
    return ExtendedReverse(order_of(order, 1, 2, 3), phi, form == "published")
