r"""What one adaptive step is: a result and an estimate of its error from the same evaluations.

On a process the probability flow is kept as :math:`y = x/N(\alpha, \sigma)`, whose slope is a prediction
f = p x + q d:

.. math:: y_t = y_s + \sum_j w_j f_j, \qquad w_j = \frac{1}{N_t}\int_{\lambda_s}^{\lambda_t} K\,\ell_j\,d\lambda,

the weights of :mod:`scoresde.quadrature`, here with a step of its own for each sample. In the prediction's own clock c
the kernel is constant, dy/dc = ±f: for velocity that is flow time, τ = σ/(α + σ), where x/(α + σ) moves with ε − x0 on
any process. Pairs know neither networks nor control.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.quadrature import LAM, NOISE, VELOCITY, Point, Prediction, weights
from scoresde.sde import SDE

State = tuple[Tensor, ...]
"""Tensors (B, ...) that are integrated together; the first one steers the error control."""

Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Weights (k, B) of slopes at `nodes` (k, B) for the step from `s` to `t`, both (B,)."""

Ask = Callable[[Tensor, State], State]
"""Slopes at u (B,) of a state."""

_NODES, _WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(8))
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2  # exact for polynomials of degree 15


def polynomial(s: Tensor, t: Tensor, nodes: Tensor) -> Tensor:
    r"""Weights :math:`\int_s^t \ell_j(u)\,du` of the polynomial through `nodes`, (B,), (B,), (k, B) to (k, B)."""
    u = s[..., None] + (t - s)[..., None] * _NODES
    rows = []
    for j in range(len(nodes)):
        basis = torch.ones_like(u)
        for m in range(len(nodes)):
            if m != j:
                basis = basis * (u - nodes[m, ..., None]) / (nodes[j] - nodes[m])[..., None]
        rows.append(basis @ _WEIGHTS * (t - s))
    return torch.stack(rows)


@dataclass(frozen=True)
class Frame:
    r"""The probability flow of a process as dy/du = rate · f, with y = x/N.

    Times are float64 tensors (B,) on the CPU.

    Arguments:
        sde: The process.
        prediction: f, and with it N and its clock.
        in_lam: Steps are counted in λ; else in the prediction's own clock, which is finite where f is.
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
        flat = self.sde._t_of_lam(lam.reshape(-1)).clamp(0.0, self.sde.T)
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
        """dy/du in units of f: ±1 in the prediction's own clock."""
        one = torch.ones((), dtype=torch.float64)
        c = self.prediction.clock(0 * one)
        kappa = 1 / (self.prediction.q(one, one) * self.prediction.scale(one, one) * self.prediction.slope(c))
        return kappa * (self.prediction.slope(self.prediction.clock(u)) if self.in_lam else torch.ones_like(u))

    def weigh(self, s: Tensor, t: Tensor, nodes: Tensor) -> Tensor:
        """The weights of a step, see :data:`Weigh`."""
        if not self.in_lam:
            return self.rate(s) * polynomial(s, t, nodes)
        # W/N is a function of λ alone, so it is taken where α = 1.
        a, b, at = (Point(lam, lam, torch.ones_like(lam), (-lam).exp()) for lam in (s[None], t[None], nodes[None]))
        W = weights(self.prediction, LAM, 0.0, a, b, at, self.sde._t_of_lam)[0]
        return W / self.prediction.scale(b.alpha, b.sigma)


class Attempt(NamedTuple):
    """An attempt at a step.

    Arguments:
        y: Where it arrives.
        f: Slopes there, or None where asking for them would be wasted on a step that fails.
        error: Estimate of the error of y[0], of its shape.
        power: The error is as the length of the step to this power, a number or (B,).
    """

    y: State
    f: State | None
    error: Tensor
    power: Tensor | float


def beside(v: Tensor, x: Tensor) -> Tensor:
    """Numbers of the host as numbers of x; nobody waits for them."""
    return v.to(device=x.device, dtype=x.dtype, non_blocking=True)


def advance(y: State, w: Tensor, slopes: Sequence[State]) -> State:
    """y + Σ w_j f_j, with weights (k, B) that go to the device once."""
    w = beside(w, y[0])
    out = list(y)
    for weight, f in zip(w, slopes, strict=True):
        for i, piece in enumerate(f):
            out[i] = torch.addcmul(out[i], weight.reshape(-1, *[1] * (piece.ndim - 1)), piece)
    return tuple(out)


@dataclass(frozen=True)
class Pair:
    """A step and its error. A subclass writes :meth:`attempt`.

    Arguments:
        prediction: The slope that a process' flow is written with.
    """

    prediction: Prediction = field(default=VELOCITY, kw_only=True)

    @property
    def order(self) -> int:
        """Order of the result."""
        raise NotImplementedError

    @property
    def memory(self) -> int:
        """Slopes it reads: that at the step's start, and those at earlier nodes."""
        return 1

    @property
    def calls(self) -> int:
        """Evaluations that an attempt costs, the one at its end included."""
        raise NotImplementedError

    @property
    def in_lam(self) -> bool:
        """Whether it steps in λ."""
        return False

    def attempt(self, ask: Ask, weigh: Weigh, s: Tensor, t: Tensor, y: State, past: Past) -> Attempt:
        """Try the step from s to t.

        Arguments:
            ask: The slopes.
            weigh: The weights of the problem, see :data:`Weigh`.
            s: Where each sample is, (B,).
            t: Where it goes, (B,).
            y: The state at s.
            past: Slopes at s and before.
        """
        raise NotImplementedError


@dataclass
class Past:
    """Slopes at the newest nodes of each sample, newest first.

    Arguments:
        u: Where, a list of (B,).
        f: The slopes.
        count: How many are real, (B,).
    """

    u: list[Tensor]
    f: list[State]
    count: Tensor


@dataclass(frozen=True)
class Adams(Pair):
    r"""Variable-step Adams, predict–evaluate–correct: one evaluation a step, and the only one a rejection costs.

    It predicts from the slopes at :math:`u_n, \dots, u_{n-k+1}`, asks at the new node, and corrects by the polynomial
    through all k + 1 slopes. The error is the difference to the corrector without the oldest node. A sample starts at
    k = 1 and gains one with every step it takes. The corrected state is not asked again.

    Arguments:
        nodes: k, the largest number of earlier slopes; the result is of order k + 1.
        clock: ``"own"``, the prediction's, or ``"lam"``: with data prediction in λ this is UniPC with error control.
        prediction: The slope.

    References:
        | Computer Solution of Ordinary Differential Equations (Shampine & Gordon, 1975)
        | UniPC (Zhao et al., 2023), arXiv:2302.04867
    """

    nodes: int = 4
    clock: str = "own"

    def __post_init__(self) -> None:
        check.integer("nodes", self.nodes, least=1)
        check.choice("clock", self.clock, ("own", "lam"))

    @property
    def order(self) -> int:
        """Order of the corrector."""
        return self.nodes + 1

    @property
    def memory(self) -> int:
        """Slopes it reads."""
        return self.nodes

    @property
    def calls(self) -> int:
        """One."""
        return 1

    @property
    def in_lam(self) -> bool:
        """Whether it steps in λ."""
        return self.clock == "lam"

    def attempt(self, ask: Ask, weigh: Weigh, s: Tensor, t: Tensor, y: State, past: Past) -> Attempt:
        """Try a step, see :meth:`Pair.attempt`."""
        u = torch.stack([t, *past.u[: self.nodes]])
        k = past.count.clamp_max(self.nodes)
        predictor, corrector, error = torch.zeros(3, *u.shape, dtype=torch.float64)
        for n in sorted(set(k.tolist())):
            of = k == n
            at = u[: n + 1, of]
            w = weigh(s[of], t[of], at)
            # Weights that differ by one node differ by a multiple of the divided difference through all nodes.
            gaps = at[:, None] - at[None] + torch.eye(n + 1, dtype=torch.float64)[..., None]
            difference = 1 / gaps.prod(1)
            predictor[1 : n + 1, of] = (w - w[0] / difference[0] * difference)[1:]
            corrector[: n + 1, of] = w
            error[: n + 1, of] = w[-1] / difference[-1] * difference
        old = past.f[: self.nodes]
        f = ask(t, advance(y, predictor[1:], old))
        slopes = [f, *old]
        gap = advance((torch.zeros_like(y[0]),), error, [(g[0],) for g in slopes])[0]
        return Attempt(advance(y, corrector, slopes), f, gap, k.double() + 1)


@dataclass(frozen=True)
class EmbeddedRungeKutta(Pair):
    """An explicit tableau whose last stage is the result, with the weights of its error: in the prediction's own clock.

    Arguments:
        a: Rows of the lower triangle; the last one makes the result.
        error: Weights of the error, one for each stage and one for the result.
        of_order: Order of the result.
        prediction: The slope.
    """

    a: tuple[tuple[float, ...], ...] = ()
    error: tuple[float, ...] = ()
    of_order: int = 0

    def __post_init__(self) -> None:
        if [len(row) for row in self.a] != list(range(1, len(self.error))):
            raise ValueError(
                f"`a` must be a lower triangle with rows of 1 … {len(self.error) - 1} entries, one less than `error` "
                f"has, got {[len(row) for row in self.a]}."
            )

    @property
    def order(self) -> int:
        """Order of the result."""
        return self.of_order

    @property
    def calls(self) -> int:
        """Stages beyond the first, which is the last of the step before."""
        return len(self.a)

    def attempt(self, ask: Ask, weigh: Weigh, s: Tensor, t: Tensor, y: State, past: Past) -> Attempt:
        """Try a step, see :meth:`Pair.attempt`."""
        h = weigh(s, t, s[None])
        slopes = [past.f[0]]
        stage = y
        for i, row in enumerate(self.a):
            c = t if i == len(self.a) - 1 else s + sum(row) * (t - s)
            stage = advance(y, torch.tensor(row, dtype=torch.float64)[:, None] * h, slopes)
            slopes.append(ask(c, stage))
        gap = torch.tensor(self.error, dtype=torch.float64)[:, None] * h
        error = advance((torch.zeros_like(y[0]),), gap, [(f[0],) for f in slopes])[0]
        return Attempt(stage, slopes[-1], error, float(self.of_order))


def BogackiShampine(prediction: Prediction = VELOCITY) -> Pair:
    """Bogacki–Shampine 3(2): three evaluations a step.

    Arguments:
        prediction: The slope.
    """
    b = (2 / 9, 1 / 3, 4 / 9)
    return EmbeddedRungeKutta(((1 / 2,), (0.0, 3 / 4), b), (-5 / 72, 1 / 12, 1 / 9, -1 / 8), 3, prediction=prediction)


def DormandPrince(prediction: Prediction = VELOCITY) -> Pair:
    """Dormand–Prince 5(4): six evaluations a step.

    Arguments:
        prediction: The slope.
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
    error = tuple(u - v for u, v in zip((*b, 0.0), low, strict=True))
    return EmbeddedRungeKutta(a, error, 5, prediction=prediction)


@dataclass(frozen=True)
class DPMPair(Pair):
    r"""DPM-Solver's embedded pairs in λ: of order 2 with 1 inside, or 3 with 2.

    Order 2 is DPM-Solver-2 with DDIM as the lower one; order 3 is DPM-Solver-3 with r₁ = ⅓, r₂ = ⅔, whose first stage
    makes the lower one. The slope at the end is asked once the step is accepted.

    Arguments:
        of_order: 2 or 3.
        prediction: ``NOISE`` as published, ``DATA`` for DPM-Solver++.

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
        """Order of the result."""
        return self.of_order

    @property
    def calls(self) -> int:
        """As many as its order."""
        return self.of_order

    @property
    def in_lam(self) -> bool:
        """It does."""
        return True

    def attempt(self, ask: Ask, weigh: Weigh, s: Tensor, t: Tensor, y: State, past: Past) -> Attempt:
        """Try a step, see :meth:`Pair.attempt`."""
        first = past.f[0]
        u = s + (t - s) * (1 / 2 if self.of_order == 2 else 1 / 3)
        g = ask(u, advance(y, weigh(s, u, s[None]), [first]))
        low, slopes = weigh(s, t, s[None]), [first, g]
        if self.of_order == 2:
            high = weigh(s, t, torch.stack([s, u]))
            gap = high - torch.cat([low, torch.zeros_like(low)])
        else:
            v = s + (t - s) * (2 / 3)
            slopes.append(ask(v, advance(y, weigh(s, v, torch.stack([s, u])), slopes)))
            a, b = weigh(s, t, torch.stack([s, v]))
            nothing = torch.zeros_like(a)
            high = torch.stack([a, nothing, b])
            gap = high - torch.cat([weigh(s, t, torch.stack([s, u])), nothing[None]])
        error = advance((torch.zeros_like(y[0]),), gap, [(f[0],) for f in slopes])[0]
        return Attempt(advance(y, high, slopes), None, error, float(self.of_order))


def DPM12(prediction: Prediction = NOISE) -> Pair:
    """DPM-Solver-12.

    Arguments:
        prediction: ``NOISE``, or ``DATA`` for DPM-Solver++.
    """
    return DPMPair(2, prediction=prediction)


def DPM23(prediction: Prediction = NOISE) -> Pair:
    """DPM-Solver-23.

    Arguments:
        prediction: ``NOISE``, or ``DATA`` for DPM-Solver++.
    """
    return DPMPair(3, prediction=prediction)
