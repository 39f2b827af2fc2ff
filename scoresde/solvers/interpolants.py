"""What a solver interpolates: a prediction, as a polynomial in a variable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.solvers.naming import show

FirstT = TypeVar("FirstT")


def _constant(name: str) -> str:
    """Name of the constant: ``DATA`` for "data"; a call such as ``edm_prediction(0.5)`` stays as it is."""
    return name.upper() if name.isidentifier() else name


@checked
@dataclass(frozen=True)
class Prediction:
    r"""A linear prediction f = p x + q d to interpolate.

    Arguments:
        name: Name for printing.
        scale: Function N(α, σ), homogeneous of degree 1: the equation of x/N has no linear term if η = 0.
        p: Weight p(α, σ) of the state.
        q: Weight q(α, σ) of the data prediction; it depends on α/σ only.
        clock: Function c(λ) in which the kernel is constant if η = 0; finite wherever the prediction is defined.
        lam_of_clock: Inverse of `clock`.
        slope: Derivative dc/dλ as a function of c.
        needs_signal: Whether the prediction determines the data only where α > 0, default False.
        offset: Function B(λ), None by default: f − B is interpolated and B is integrated exactly.
        decays: Whether the kernel falls like a power of σ/α towards σ = 0, so that a step to σ = 0 can interpolate in
            λ; default False.
    """

    name: str
    scale: Callable[[Tensor, Tensor], Tensor]
    p: Callable[[Tensor, Tensor], Tensor]
    q: Callable[[Tensor, Tensor], Tensor]
    clock: Callable[[Tensor], Tensor]
    lam_of_clock: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    needs_signal: bool = False
    offset: Callable[[Tensor], Tensor] | None = None
    decays: bool = False

    def __repr__(self) -> str:
        return _constant(self.name)


# Functions with names instead of lambdas, so that solvers can be pickled.


def _first(a: Tensor, b: Tensor) -> Tensor:
    return a


def _second(a: Tensor, b: Tensor) -> Tensor:
    return b


def _zero(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.zeros_like(sigma)


def _one(alpha: Tensor, sigma: Tensor) -> Tensor:
    return torch.ones_like(sigma)


def _sum(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha + sigma


def _root(alpha: Tensor, sigma: Tensor) -> Tensor:
    return (alpha**2 + sigma**2).sqrt()


def _inverse_sigma(alpha: Tensor, sigma: Tensor) -> Tensor:
    return 1 / sigma


def _q_noise(alpha: Tensor, sigma: Tensor) -> Tensor:
    return -alpha / sigma


def _q_velocity(alpha: Tensor, sigma: Tensor) -> Tensor:
    return -(alpha + sigma) / sigma


def _p_v(alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha / (sigma * _root(alpha, sigma))


def _q_v(alpha: Tensor, sigma: Tensor) -> Tensor:
    return -_root(alpha, sigma) / sigma


def _exp(lam: Tensor) -> Tensor:
    return lam.exp()


def _log(c: Tensor) -> Tensor:
    return c.log()


def _identity(c: Tensor) -> Tensor:
    return c


def _rho(lam: Tensor) -> Tensor:
    return (-lam).exp()


def _minus_log(c: Tensor) -> Tensor:
    return -c.log()


def _negative(c: Tensor) -> Tensor:
    return -c


def _tau(lam: Tensor) -> Tensor:
    return (-lam).sigmoid()


def _lam_of_tau(c: Tensor) -> Tensor:
    return torch.log1p(-c) - c.log()


def _slope_of_tau(c: Tensor) -> Tensor:
    return -c * (1 - c)


def _angle(lam: Tensor) -> Tensor:
    return (-lam).exp().atan()


def _lam_of_angle(c: Tensor) -> Tensor:
    return -c.tan().log()


def _slope_of_angle(c: Tensor) -> Tensor:
    return -c.sin() * c.cos()


DATA = Prediction("data", scale=_second, p=_zero, q=_one, clock=_exp, lam_of_clock=_log, slope=_identity)
"""The data prediction, d: DPM-Solver++; EDM calls it the denoiser."""

NOISE = Prediction(
    "noise",
    scale=_first,
    p=_inverse_sigma,
    q=_q_noise,
    clock=_rho,
    lam_of_clock=_minus_log,
    slope=_negative,
    needs_signal=True,
)
"""ε = (x − α d)/σ: DDIM, DPM-Solver, DEIS."""

VELOCITY = Prediction(
    "velocity",
    scale=_sum,
    p=_inverse_sigma,
    q=_q_velocity,
    clock=_tau,
    lam_of_clock=_lam_of_tau,
    slope=_slope_of_tau,
)
"""ε − d, the velocity of x/(α + σ) in τ = σ/(α + σ): the flow-matching velocity, on any process."""

V = Prediction("v", scale=_root, p=_p_v, q=_q_v, clock=_angle, lam_of_clock=_lam_of_angle, slope=_slope_of_angle)
"""(α ε − σ d)/√(α² + σ²), the velocity in the angle atan(σ/α)."""


@checked
def edm_prediction(sigma_data: float) -> Prediction:
    """Make a prediction of EDM's network output F, with `sigma_data` as in :class:`Preconditioning`.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """
    s = check.number("sigma_data", sigma_data, above=0)
    return Prediction(
        f"edm_prediction({show(sigma_data)})",
        scale=Bound(_edm_root, s),
        p=Bound(_edm_p, s),
        q=Bound(_edm_q, s),
        clock=Bound(_edm_angle, s),
        lam_of_clock=Bound(_lam_of_edm_angle, s),
        slope=_slope_of_angle,
    )


@dataclass(frozen=True)
class Bound(Generic[FirstT]):
    """A function with its first argument; unlike a closure, it is equal to another with equal parts and is picklable.

    Arguments:
        function: Function of `first` and of further tensors.
        first: First argument.
    """

    function: Callable[..., Tensor]
    first: FirstT

    def __call__(self, *rest: Tensor) -> Tensor:
        return self.function(self.first, *rest)


def _edm_root(s: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    return (sigma**2 + s**2 * alpha**2).sqrt()


def _edm_p(s: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    return -alpha * s / (sigma * _edm_root(s, alpha, sigma))


def _edm_q(s: float, alpha: Tensor, sigma: Tensor) -> Tensor:
    return _edm_root(s, alpha, sigma) / (sigma * s)


def _edm_angle(s: float, lam: Tensor) -> Tensor:
    return ((-lam).exp() / s).atan()


def _lam_of_edm_angle(s: float, c: Tensor) -> Tensor:
    return -(s * c.tan()).log()


@checked
@dataclass(frozen=True)
class Variable:
    """A variable u in which predictions are interpolated.

    Arguments:
        name: Name for printing.
        of: Function u(λ, t) of two tensors; it may ignore one of them.
        uses_t: Whether `of` uses t, default False.
        infinite: Whether u is infinite where σ = 0, so that no extrapolation to σ = 0 exists; default False.
    """

    name: str
    of: Callable[[Tensor, Tensor], Tensor]
    uses_t: bool = False
    infinite: bool = False

    def __repr__(self) -> str:
        return _constant(self.name)


def _rho_of(lam: Tensor, t: Tensor) -> Tensor:
    return _rho(lam)


def _tau_of(lam: Tensor, t: Tensor) -> Tensor:
    return _tau(lam)


def _log1p_rho_of(lam: Tensor, t: Tensor) -> Tensor:
    return torch.logaddexp(-lam, torch.zeros_like(lam))  # softplus is linear from 20 on, an error of 2e-9


LAM = Variable("lam", _first, infinite=True)
"""λ = log(α/σ): the DPM-Solver family."""

RHO = Variable("rho", _rho_of)
"""ρ = σ/α: DEIS ρAB, linear multistep, EDM."""

TAU = Variable("tau", _tau_of)
"""τ = σ/(α + σ): flow time."""

LOG1P_RHO = Variable("log1p_rho", _log1p_rho_of)
"""log(1 + σ/α) = −log(1 − τ): like −λ at high noise, like ρ near data."""

TIME = Variable("time", _second, uses_t=True)
"""The time t of the process: DEIS tAB."""
