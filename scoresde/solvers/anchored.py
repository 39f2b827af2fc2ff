r"""The anchored score residual: Gaussian data are solved exactly, and the network's difference to them is interpolated.

With y = x/α and s = σ/α, a Gaussian N(m, c I) has the denoiser m + g(s)(y − m), where g = c/(c + s²). The rule
interpolates the residual of the network's prediction D against it, times a weight w, through earlier evaluations in λ:

.. math::
    r = D - m - g\,(y - m), \qquad w = \frac{(c + s^2)^{p/2}}{s^2}, \qquad
    y_t - m = \Phi\,(y_s - m) + \int_{\lambda_s}^{\lambda_t} \sqrt{\frac{c + s_t^2}{c + s(\lambda)^2}}\;
    \frac{1}{w(\lambda)} \sum_j \ell_j(\lambda)\, w_j r_j\, d\lambda, \qquad \Phi = \sqrt{\frac{c + s_t^2}{c + s_s^2}}.

The first evaluation gives the mean: :math:`m = (D_0 - g_0 y_0)/(1 - g_0)` makes the first residual 0, for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.solvers.interpolants import LAM, Bound, Prediction
from scoresde.solvers.naming import show
from scoresde.solvers.quadrature import Point, transfer, weights
from scoresde.solvers.rule import Solver
from scoresde.solvers.tape import Leg, Tape


@checked
def residual_prediction(std: float, power: float = 2.5) -> Prediction:
    """Make the prediction w r: the residual against N(0, std² I), times its weight.

    Arguments:
        std: Standard deviation of the data, per entry.
        power: Exponent p of the weight.
    """
    c = check.number("std", std, above=0) ** 2
    p = check.number("power", power, above=1)
    name = f"residual_prediction({show(std)}{'' if p == 2.5 else f', {show(p)}'})"
    return Prediction(
        name,
        scale=Bound(_root, c),
        p=Bound(_p, (c, p)),
        q=Bound(_q, (c, p)),
        clock=Bound(_clock, (c, p)),
        lam_of_clock=Bound(_lam_of_clock, (c, p)),
        slope=Bound(_slope, (c, p)),
        needs_signal=True,
        decays=True,
    )


def _root(c: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (sigma**2 + c * alpha**2).sqrt()


def _q(cp: tuple[float, float], alpha: Tensor, sigma: Tensor) -> Tensor:
    c, p = cp
    variance = (sigma / alpha) ** 2
    return (c + variance) ** (p / 2) / variance


def _p(cp: tuple[float, float], alpha: Tensor, sigma: Tensor) -> Tensor:
    c = cp[0]
    return -_q(cp, alpha, sigma) * c * alpha / (c * alpha**2 + sigma**2)


def _clock(cp: tuple[float, float], lam: Tensor) -> Tensor:
    c, p = cp
    return (c + (-2 * lam).exp()) ** ((1 - p) / 2)


def _lam_of_clock(cp: tuple[float, float], clock: Tensor) -> Tensor:
    c, p = cp
    return -(clock ** (2 / (1 - p)) - c).log() / 2


def _slope(cp: tuple[float, float], clock: Tensor) -> Tensor:
    c, p = cp
    variance = clock ** (2 / (1 - p))
    return (p - 1) * (variance - c) * clock / variance


@checked
@dataclass(frozen=True, repr=False)
class AnchoredResidual(Solver):
    """Exponential Adams method on the residual against a Gaussian, whose mean the first evaluation gives.

    It is exact on data N(m, std² I), with any number of steps. Use it for data whose directions have similar variances,
    such as latents, with an accurate network that predicts x0, v or the velocity. On exact mixtures its median error is
    mostly smaller than that of :func:`VelocityAB` on the same grid. Errors of a network that change fast with the noise
    level take most of this gain (``experiments/anchored.py``), so it is no default. The first prediction enters all
    rows, which ε-networks, unreliable at high noise, do not bear.

    Arguments:
        std: Standard deviation of the data, the root of the mean variance of their entries.
        nodes: Number of nodes.
        power: Exponent p of the weight.
    """

    std: float
    nodes: int = 4
    power: float = 2.5

    def __post_init__(self) -> None:
        check.number("std", self.std, above=0)
        check.integer("nodes", self.nodes, at_least=1)
        check.number("power", self.power, above=1)

    @property
    def order(self) -> int:
        """Order of convergence: the number of nodes.

        The first steps have fewer nodes, and their errors of order h² exceed the others when steps are many and equal.
        """
        return self.nodes

    @property
    def prediction(self) -> Prediction:
        """The prediction that is interpolated."""
        return residual_prediction(self.std, self.power)

    def leg(self, tape: Tape, leg: Leg) -> tuple[int, list[int]]:
        nodes = [k for k in tape.distinct(leg.history[: self.nodes]) if not tape.no_signal(tape.time(k))]
        x, d = self._weights(tape, leg, nodes)
        columns = [[(k, tape.number(w)) for k, w in terms.items()] for terms in (x, d)]
        new = tape.append(leg.t, x=columns[0], d=columns[1], evaluates=leg.evaluates, node=leg.node)
        return new, [new, *leg.history]  # the last entry is the first evaluation

    def _weights(self, tape: Tape, leg: Leg, nodes: Sequence[int]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Weights of the states and of the predictions, by their rows."""
        f, c, (s, t) = self.prediction, self.std**2, tape.ends(leg)
        phi = transfer(f, 0.0, s, t)  # of x, so Φ α_t/α_s
        x, d = {leg.row: phi}, {}
        pull = t.alpha - phi * s.alpha  # weight of the mean
        if nodes:
            points = [tape.at(tape.time(k)) for k in nodes]
            fields = (torch.stack([getattr(p, name) for p in points])[None] for name in ("t", "lam", "alpha", "sigma"))
            W = weights(f, LAM, 0.0, s[None], t[None], Point(*fields), tape.sde.inverse_lam)[0]
            for k, p, w in zip(nodes, points, W, strict=True):
                x[k], d[k] = x.get(k, 0.0) + w * f.p(p.alpha, p.sigma), w * f.q(p.alpha, p.sigma)
                pull = pull - d[k] * p.sigma**2 / (c * p.alpha**2 + p.sigma**2)
        # The mean is D_0/(1 − g_0) − x_0 g_0/(α_0 (1 − g_0)), with 1 − g_0 = σ_0²/(c α_0² + σ_0²).
        first = leg.history[-1]
        o = tape.at(tape.time(first))
        d[first] = d.get(first, 0.0) + pull * (c * o.alpha**2 + o.sigma**2) / o.sigma**2
        x[first] = x.get(first, 0.0) - pull * c * o.alpha / o.sigma**2
        return x, d
