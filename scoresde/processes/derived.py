"""Processes derived from functions of the user, or from another process."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._numerics import legendre
from scoresde._printing import short
from scoresde.processes.sde import SDE, TimeT


@checked
@dataclass(frozen=True)
class FromFunctions(SDE):
    """A process given by α(t) and σ(t), the result of :meth:`SDE.from_functions`.

    Arguments:
        alpha_fn: Function α(t), elementwise on a tensor.
        sigma_fn: Function σ(t), elementwise on a tensor.
    """

    alpha_fn: Callable[[Tensor], Tensor]
    sigma_fn: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return _text(self, self.alpha_fn, self.sigma_fn)

    def __post_init__(self) -> None:
        super().__post_init__()
        near = torch.logspace(-6, 0, 256, dtype=torch.float64) * self.T
        t = torch.cat([near, torch.linspace(0, self.T, 257, dtype=torch.float64)]).unique()
        for name, fn in (("alpha", self.alpha_fn), ("sigma", self.sigma_fn)):
            y = fn(t)
            if not isinstance(y, Tensor) or y.shape != t.shape:
                got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
                raise ValueError(
                    f"`{name}` must map a tensor of times to a tensor of the same shape, {tuple(t.shape)}, got {got}; "
                    f"use torch functions, and torch.full_like(t, c) for a constant c."
                )
            bad = ~(y.isfinite() & (y >= 0))
            if bad.any():
                raise ValueError(f"`{name}` must be finite and not negative on [0, T], got {y[bad][0]} at {t[bad][0]}.")
        lam = self._log_alpha(t) - self._log_sigma(t)
        rises = ~(lam.diff() < 0)
        if rises.any():
            at = t[1:][rises][0].item()
            raise ValueError(
                f"`alpha`/`sigma` must fall with t on [0, {self.T:g}] (0 is data, T is noise), but does not at "
                f"t = {at:.4g}; if your convention has data at T, reverse its time."
            )

    def _alpha(self, t: Tensor) -> Tensor:
        return self.alpha_fn(t).clamp_min(0)  # cos(π/2) is −4e-8 in float32

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_fn(t)


@checked
@dataclass(frozen=True)
class FromDrift(SDE):
    """A process given by f(t) and g(t), the result of :meth:`SDE.from_drift`.

    Arguments:
        f_fn: Drift coefficient f(t), elementwise on a tensor.
        g_fn: Diffusion coefficient g(t), elementwise on a tensor.
    """

    f_fn: Callable[[Tensor], Tensor]
    g_fn: Callable[[Tensor], Tensor]

    def __repr__(self) -> str:
        return _text(self, self.f_fn, self.g_fn)

    def __post_init__(self) -> None:
        super().__post_init__()
        t = torch.linspace(0, self.T, 257, dtype=torch.float64)
        for name, fn in (("f", self.f_fn), ("g", self.g_fn)):
            y = fn(t)
            if not isinstance(y, Tensor) or y.shape != t.shape or not bool(y.isfinite().all()):
                raise ValueError(
                    f"`{name}` must map a tensor of times to a finite tensor of the same shape on [0, T]; use a "
                    f"smaller `T` if the function becomes infinite, and torch.full_like(t, c) for a constant c."
                )

    def _log_alpha(self, t: Tensor) -> Tensor:
        node, weight = (v.to(t) for v in legendre(64))
        return t * (self.f_fn(t[..., None] * node) * weight).sum(-1)  # @ would use half precision under autocast

    def _sigma(self, t: Tensor) -> Tensor:
        node, weight = (v.to(t) for v in legendre(64))
        s = t[..., None] * node
        gain = 2 * (self._log_alpha(t)[..., None] - self._log_alpha(s))
        return (t * (self.g_fn(s) ** 2 * gain.exp() * weight).sum(-1)).sqrt()

    def _f(self, t: Tensor) -> Tensor:
        return self.f_fn(t)

    def _g2(self, t: Tensor) -> Tensor:
        return self.g_fn(t) ** 2


@checked
@dataclass(frozen=True)
class Shifted(SDE):
    r"""The base process at a shifted time u(t): λ is lower by log `shift`.

    .. math:: \lambda_t = \lambda^{base}_{u(t)} = \lambda^{base}_t - \log(\mathrm{shift}), \qquad
              (\alpha_t, \sigma_t) = (\alpha^{base}_{u(t)}, \sigma^{base}_{u(t)})

    Larger images need more noise to remove the same detail: from 64 to d pixels per side, use ``shift = d / 64``. On
    :class:`Flow` this is u = s t / (1 + (s − 1) t). The last time T satisfies u(T) = T of the base process.

    Arguments:
        base: Process of the network.
        shift: Shift s > 0 of the noise level; 1 is the base process.

    Example:
        >>> import scoresde as ss
        >>> Shifted(ss.Flow(), 3.0).sigma(0.5)
        0.75

    References:
        | simple diffusion (Hoogeboom et al., 2023), arXiv:2301.11093
        | Scaling Rectified Flow Transformers (Esser et al., 2024), arXiv:2403.03206
    """

    base: SDE
    shift: float
    T: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        check.number("shift", self.shift, above=0)
        back = math.log(self.shift)
        if self.shift < 1 and self.base.alpha(self.base.T) > 0:
            raise ValueError(
                f"`shift` must be at least 1 for a `base` with α(T) > 0, got {self.shift}: a smaller shift "
                f"cannot reach the noise level of `base` at its last time."
            )
        last = self.base.lam(self.base.T) + back
        object.__setattr__(self, "T", self.base.T if math.isinf(last) else self.base.t_of_lam(last))
        super().__post_init__()

    def _default_t_min(self) -> float:
        return self.base.t_of_lam(min(self.base.lam(self.base.t_min) + math.log(self.shift), self.base.lam(0.0)))

    def base_time(self, t: TimeT) -> TimeT:
        """Time u(t) at which the base process has the same α and σ: the input time of a network trained on the base."""
        return self._at(self._u, t)

    def _u(self, t: Tensor) -> Tensor:
        lam = self.base.lam(t) - math.log(self.shift)
        u = self.base.inverse_lam(lam).clamp(0.0, self.base.T)
        return torch.where(t == 0, t, u)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self.base._log_alpha(self._u(t))

    def _alpha(self, t: Tensor) -> Tensor:
        return self.base._alpha(self._u(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return self.base._sigma(self._u(t))

    def _f(self, t: Tensor) -> Tensor:
        return self.base._f(self._u(t)) * self._speed(t)

    def _g2(self, t: Tensor) -> Tensor:
        return self.base._g2(self._u(t)) * self._speed(t)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return self.base._alpha_dot(self._u(t)) * self._speed(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self.base._sigma_dot(self._u(t)) * self._speed(t)

    def _speed(self, t: Tensor) -> Tensor:
        """Compute du/dt; at an end with infinite λ, evaluate just inside."""
        inside = 4 * max(self.shift, 1.0) * torch.finfo(t.dtype).eps  # 1 − u is `shift` times smaller than 1 − t
        s = self._inside(t).clamp_max((1 - max(inside, 1e-7)) * self.T)
        u = self._u(s)
        lam_dot = [self.base._g2(v) / self.base._sigma(v) ** 2 for v in (s, u)]
        return lam_dot[0] / lam_dot[1]

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return self.base.inverse_lam(lam + math.log(self.shift))


def _text(sde: SDE, *functions: Callable[[Tensor], Tensor]) -> str:
    """Text of a process given by functions: their names, and λ in the middle, since many functions have no name."""
    names = ", ".join(map(short, functions))
    return f"{type(sde).__name__}({names}, T={sde.T}, t_min={sde.t_min}, lam(T/2)={sde.lam(sde.T / 2):.6g})"
