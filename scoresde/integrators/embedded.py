r"""Embedded pairs: one adaptive step, with its result and an estimate of its error from the same evaluations.

The probability flow of a process is written in :math:`y = x/N(\alpha, \sigma)`, whose slope is a prediction
f = p x + q d:

.. math:: y_t = y_s + \sum_j w_j f_j, \qquad w_j = \frac{1}{N_t}\int_{\lambda_s}^{\lambda_t} K\,\ell_j\,d\lambda,

with the weights of :func:`weights` and a separate step for each sample. In the prediction's clock c the
kernel is constant and dy/dc = ±f. For velocity, c is the flow time τ = σ/(α + σ), and x/(α + σ) has the slope ε − x0 on
any process. :mod:`scoresde.integrators.loop` controls the step size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import lagrange, legendre
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import LAM, NOISE, VELOCITY, Prediction
from scoresde.solvers.quadrature import Point, weights

Parts = tuple[Tensor, ...]
"""Tensors (B, ...) that are integrated together; the error control uses the first one."""

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weights (k, B) of the slopes at `nodes` (k, B), for the step from `s` to `t`, both (B,)."""

Evaluate = Callable[[Tensor, Parts], Parts]
"""Slopes of a state at clock u, (B,)."""

QUADRATURE = 8  # Gauss–Legendre nodes; exact for polynomials of degree 15


def polynomial(s: Tensor, t: Tensor, nodes: Tensor) -> Tensor:
    r"""Weights :math:`\int_s^t \ell_j(u)\,du` of the polynomial through `nodes`, (B,), (B,), (k, B) to (k, B)."""
    if len(nodes) == 1:
        return (t - s)[None]
    at, weights = legendre(QUADRATURE)
    u = s[..., None] + (t - s)[..., None] * at
    return lagrange(u[None], nodes[None])[0] @ weights * (t - s)


@dataclass(frozen=True)
class Frame:
    r"""The probability flow of a process as dy/du = rate · f, with y = x/N.

    Times are float64 tensors (B,) on the CPU.

    Arguments:
        sde: The process.
        prediction: Prediction f, which determines N and the clock; default VELOCITY.
        in_lam: Whether u is λ; otherwise u is the prediction's clock, which is finite where f is. Default False.
    """

    sde: SDE
    prediction: Prediction = VELOCITY
    in_lam: bool = False

    def u(self, t: Tensor) -> Tensor:
        """Clock at time t."""
        lam = self.sde.lam(t)
        return lam if self.in_lam else self.prediction.clock(lam)

    def point(self, u: Tensor) -> Point:
        """Time, λ, α and σ at clock u."""
        lam = u if self.in_lam else self.prediction.lam_of_clock(u)
        flat = self.sde.inverse_lam(lam.reshape(-1)).clamp(0.0, self.sde.T)
        alpha, sigma = self.sde.alpha(flat), self.sde.sigma(flat)
        return Point(flat.reshape(u.shape), lam, alpha.reshape(u.shape), sigma.reshape(u.shape))

    def t(self, u: Tensor) -> Tensor:
        """Time at clock u."""
        return self.point(u).t

    def scale(self, u: Tensor) -> Tensor:
        """N at clock u."""
        at = self.point(u)
        return self.prediction.scale(at.alpha, at.sigma)

    def rate(self, u: Tensor) -> Tensor:
        """The factor of f in dy/du; it is ±1 in the prediction's clock."""
        one = torch.ones((), dtype=torch.float64)
        c = self.prediction.clock(0 * one)
        kappa = 1 / (self.prediction.q(one, one) * self.prediction.scale(one, one) * self.prediction.slope(c))
        return kappa * (self.prediction.slope(self.prediction.clock(u)) if self.in_lam else torch.ones_like(u))

    def weigh(self, s: Tensor, t: Tensor, nodes: Tensor) -> Tensor:
        """Weights of a step, see :data:`Weigh`."""
        if not self.in_lam:
            return self.rate(s) * polynomial(s, t, nodes)
        # W/N depends on λ only, so α is set to 1
        a, b, at = (Point(lam, lam, torch.ones_like(lam), (-lam).exp()) for lam in (s[None], t[None], nodes[None]))
        W = weights(self.prediction, LAM, 0.0, a, b, at, self.sde.inverse_lam)[0]
        return W / self.prediction.scale(b.alpha, b.sigma)


class Attempt(NamedTuple):
    """Result of an attempted step.

    Arguments:
        y: State at the end of the step.
        f: Slopes there, or None if they are evaluated only after the step is accepted.
        error: Estimate of the error of y[0], of the same shape.
        power: Exponent of the step length in the error, a number or (B,).
        stages: Slopes of the stages in their order, the first at the start of the step, for pairs with stages.
    """

    y: Parts
    f: Parts | None
    error: Tensor
    power: Tensor | float
    stages: Sequence[Parts] = ()


def on_device(v: Tensor, x: Tensor) -> Tensor:
    """Copy coefficients to the device and dtype of `x` without blocking."""
    return v.to(device=x.device, dtype=x.dtype, non_blocking=True)


def wide(v: Tensor, x: Tensor) -> Tensor:
    """A tensor (B,) with axes that broadcast to `x`, (B, *event)."""
    return v.reshape(-1, *[1] * (x.ndim - 1))


def advance(y: Parts, w: Tensor, slopes: Sequence[Parts]) -> Parts:
    """Compute y + Σ w_j f_j; the weights, (k, B), are copied to the device once."""
    w = on_device(w, y[0])
    out = list(y)
    for weight, f in zip(w, slopes, strict=True):
        for i, piece in enumerate(f):
            out[i] = torch.addcmul(out[i], wide(weight, piece), piece)
    return tuple(out)


class Scheme:
    """A step with an error estimate; a subclass implements :meth:`attempt`."""

    @property
    def order(self) -> int:
        """Order of the result."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """Number of slopes that a step uses, at its start and at earlier nodes."""
        return 1

    @property
    def calls(self) -> int:
        """Number of function evaluations per accepted step, including the one at its end."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Scheme:
        """The scheme of some samples, for schemes with data of each sample.

        Arguments:
            index: Numbers of the samples, (b,).
        """
        return self

    def attempt(self, evaluate: Evaluate, weigh: Weigh, s: Tensor, t: Tensor, y: Parts, past: Past) -> Attempt:
        """Attempt the step from s to t.

        Arguments:
            evaluate: Function that evaluates the slopes, see :data:`Evaluate`.
            weigh: Function that computes the weights, see :data:`Weigh`.
            s: Start of the step for each sample, (B,).
            t: End of the step for each sample, (B,).
            y: State at s.
            past: Slopes at s and at earlier nodes.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Pair(Scheme):
    """A scheme for the probability flow.

    Arguments:
        prediction: Prediction that is the slope of the probability flow, default VELOCITY.
    """

    prediction: Prediction = field(default=VELOCITY, kw_only=True)

    @property
    def in_lam(self) -> bool:
        """Whether the steps are in λ."""
        return False


@dataclass
class Past:
    """Slopes at the newest nodes of each sample, newest first.

    Arguments:
        u: Nodes, a list of (B,).
        f: Slopes at the nodes.
        count: Number of valid nodes of each sample, (B,).
    """

    u: list[Tensor]
    f: list[Parts]
    count: Tensor


@checked
@dataclass(frozen=True)
class Adams(Pair):
    r"""Variable-step Adams (predict, evaluate, correct): one evaluation per attempt, accepted or rejected.

    The predictor uses the slopes at :math:`u_n, \dots, u_{n-k+1}`. The slope is then evaluated at the new node, and the
    corrector uses all k + 1 slopes. The error is the difference to the corrector without the oldest node. A sample
    starts at k = 1, and k increases by one per accepted step. The slope is not evaluated again at the corrected state.

    Arguments:
        nodes: Largest number k of earlier slopes, default 4; the order of the result is k + 1.
        clock: Clock of the steps: ``"own"`` (default) is the prediction's clock, ``"lam"`` is λ. Data prediction in λ
            gives UniPC with error control.
        prediction: Prediction that is the slope, default VELOCITY.

    References:
        | Computer Solution of Ordinary Differential Equations (Shampine & Gordon, 1975)
        | UniPC (Zhao et al., 2023), arXiv:2302.04867
    """

    nodes: int = 4
    clock: str = "own"

    def __post_init__(self) -> None:
        check.integer("nodes", self.nodes, at_least=1)
        check.choice("clock", self.clock, ("own", "lam"))

    @property
    def order(self) -> int:
        return self.nodes + 1

    @property
    def memory(self) -> int:
        return self.nodes

    @property
    def calls(self) -> int:
        return 1

    @property
    def in_lam(self) -> bool:
        return self.clock == "lam"

    def attempt(self, evaluate: Evaluate, weigh: Weigh, s: Tensor, t: Tensor, y: Parts, past: Past) -> Attempt:
        u = torch.stack([t, *past.u[: self.nodes]])
        k = past.count.clamp_max(self.nodes)
        predictor, corrector, error = torch.zeros(3, *u.shape, dtype=torch.float64)
        for n in sorted(set(k.tolist())):
            mask = k == n
            at = u[: n + 1, mask]
            w = weigh(s[mask], t[mask], at)
            # Without one node, the weights change by a multiple of the divided difference through all nodes.
            gaps = at[:, None] - at[None] + torch.eye(n + 1, dtype=torch.float64)[..., None]
            difference = 1 / gaps.prod(1)
            predictor[1 : n + 1, mask] = (w - w[0] / difference[0] * difference)[1:]
            corrector[: n + 1, mask] = w
            error[: n + 1, mask] = w[-1] / difference[-1] * difference
        old = past.f[: self.nodes]
        f = evaluate(t, advance(y, predictor[1:], old))
        slopes = [f, *old]
        gap = advance((torch.zeros_like(y[0]),), error, [(g[0],) for g in slopes])[0]
        return Attempt(advance(y, corrector, slopes), f, gap, k.double() + 1)


@checked
@dataclass(frozen=True)
class EmbeddedRungeKutta(Pair):
    """An explicit Runge–Kutta pair in the prediction's clock; the last stage is the result.

    Arguments:
        a: Rows of the lower triangular tableau; the last row gives the result.
        error: Weights of the error estimate, one for each stage and one for the result.
        of_order: Order of the result.
        middle: Weights of the stages for the state in the middle of the step, of order 4, if they are known.
        prediction: Prediction that is the slope, default VELOCITY.
    """

    a: tuple[tuple[float, ...], ...] = ()
    error: tuple[float, ...] = ()
    of_order: int = 0
    middle: tuple[float, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        check.integer("of_order", self.of_order)
        if [len(row) for row in self.a] != list(range(1, len(self.error))):
            raise ValueError(
                f"`a` must have rows of 1 … {len(self.error) - 1} entries, because `error` has {len(self.error)}; "
                f"got rows of {[len(row) for row in self.a]} entries."
            )

    @property
    def order(self) -> int:
        return self.of_order

    @property
    def calls(self) -> int:
        return len(self.a)  # the first stage is the last one of the previous step

    def attempt(self, evaluate: Evaluate, weigh: Weigh, s: Tensor, t: Tensor, y: Parts, past: Past) -> Attempt:
        h = weigh(s, t, s[None])
        slopes = [past.f[0]]
        stage = y
        for i, row in enumerate(self.a):
            c = t if i == len(self.a) - 1 else s + sum(row) * (t - s)
            stage = advance(y, torch.tensor(row, dtype=torch.float64)[:, None] * h, slopes)
            slopes.append(evaluate(c, stage))
        gap = torch.tensor(self.error, dtype=torch.float64)[:, None] * h
        error = advance((torch.zeros_like(y[0]),), gap, [(f[0],) for f in slopes])[0]
        return Attempt(stage, slopes[-1], error, float(self.of_order), slopes)


@checked
def BogackiShampine(prediction: Prediction = VELOCITY) -> EmbeddedRungeKutta:
    """Bogacki–Shampine 3(2), with three evaluations per step.

    Arguments:
        prediction: Prediction that is the slope, default VELOCITY.

    References:
        | A 3(2) Pair of Runge–Kutta Formulas (Bogacki and Shampine, 1989)
    """
    b = (2 / 9, 1 / 3, 4 / 9)
    return EmbeddedRungeKutta(((1 / 2,), (0.0, 3 / 4), b), (-5 / 72, 1 / 12, 1 / 9, -1 / 8), 3, prediction=prediction)


@checked
def DormandPrince(prediction: Prediction = VELOCITY) -> EmbeddedRungeKutta:
    """Dormand–Prince 5(4), with six evaluations per step.

    Arguments:
        prediction: Prediction that is the slope, default VELOCITY.

    References:
        | A family of embedded Runge-Kutta formulae (Dormand & Prince, 1980), doi:10.1016/0771-050X(80)90013-3
        | Some practical Runge-Kutta formulas (Shampine, 1986), doi:10.1090/S0025-5718-1986-0815836-3
    """
    b = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
    low = (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)
    a = (
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        b,
    )
    middle = (
        6025192743 / 60171106304,
        0.0,
        51252292925 / 130801643596,
        -2691868925 / 90256659456,
        187940372067 / 3189068634112,
        -1776094331 / 39487288512,
        11237099 / 470086768,
    )
    error = tuple(u - v for u, v in zip((*b, 0.0), low, strict=True))
    return EmbeddedRungeKutta(a, error, 5, middle, prediction=prediction)


@checked
@dataclass(frozen=True)
class DPMPair(Pair):
    r"""Embedded pairs of DPM-Solver in λ: order 2 with an estimate of order 1, or order 3 with one of order 2.

    Order 2 is DPM-Solver-2, compared with DDIM. Order 3 is DPM-Solver-3 with r₁ = ⅓, r₂ = ⅔, compared with DPM-Solver-2
    from its first stage. The slope at the end is evaluated after the step is accepted.

    Arguments:
        of_order: Order of the result, 2 or 3 (default).
        prediction: Prediction to interpolate: NOISE (default, as published), or DATA for DPM-Solver++.

    References:
        | DPM-Solver (Lu et al., 2022), arXiv:2206.00927, appendix C
    """

    of_order: int = 3
    prediction: Prediction = field(default=NOISE, kw_only=True)

    def __post_init__(self) -> None:
        if self.of_order not in (2, 3):
            raise ValueError(f"`of_order` must be 2 or 3, got {self.of_order}.")

    @property
    def order(self) -> int:
        return self.of_order

    @property
    def calls(self) -> int:
        return self.of_order

    @property
    def in_lam(self) -> bool:
        return True

    def attempt(self, evaluate: Evaluate, weigh: Weigh, s: Tensor, t: Tensor, y: Parts, past: Past) -> Attempt:
        first = past.f[0]
        u = s + (t - s) * (1 / 2 if self.of_order == 2 else 1 / 3)
        g = evaluate(u, advance(y, weigh(s, u, s[None]), [first]))
        low, slopes = weigh(s, t, s[None]), [first, g]
        if self.of_order == 2:
            high = weigh(s, t, torch.stack([s, u]))
            gap = high - torch.cat([low, torch.zeros_like(low)])
        else:
            v = s + (t - s) * (2 / 3)
            slopes.append(evaluate(v, advance(y, weigh(s, v, torch.stack([s, u])), slopes)))
            a, b = weigh(s, t, torch.stack([s, v]))
            zero = torch.zeros_like(a)
            high = torch.stack([a, zero, b])
            gap = high - torch.cat([weigh(s, t, torch.stack([s, u])), zero[None]])
        error = advance((torch.zeros_like(y[0]),), gap, [(f[0],) for f in slopes])[0]
        return Attempt(advance(y, high, slopes), None, error, float(self.of_order))


@checked
def DPM12(prediction: Prediction = NOISE) -> Pair:
    """The pair DPM-Solver-12, of order 2.

    Arguments:
        prediction: Prediction to interpolate: NOISE (default), or DATA for DPM-Solver++.

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), arXiv:2206.00927
    """
    return DPMPair(2, prediction=prediction)


@checked
def DPM23(prediction: Prediction = NOISE) -> Pair:
    """The pair DPM-Solver-23, of order 3.

    Arguments:
        prediction: Prediction to interpolate: NOISE (default), or DATA for DPM-Solver++.

    References:
        | DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling (Lu et al., 2022), arXiv:2206.00927
    """
    return DPMPair(3, prediction=prediction)
