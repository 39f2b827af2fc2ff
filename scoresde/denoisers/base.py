"""The base class of all denoisers, and denoisers that wrap another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scoresde import _checks as check
from scoresde.denoisers.predictions import Want, as_form, conversion, form_of
from scoresde.processes.sde import SDE

_MEMO = 4096  # largest number of entries in the cache of a denoiser


class AbstractDenoiser(nn.Module):
    """Base class of denoisers: a subclass sets ``sde`` and defines :meth:`x0`.

    All methods take a state `x` of shape (B, *event), a time `t` (a number, () or (B,)) and conditions by keyword. They
    return a tensor of the shape of `x`.
    """

    sde: SDE

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """Data prediction, E[x_0 | x_t = x]."""
        raise NotImplementedError(f"{type(self).__name__} must define `x0(x, t, **cond)`.")

    def forward(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """Data prediction, the same as :meth:`x0`."""
        return self.x0(x, t, **cond)

    def eps(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        r"""Noise prediction, :math:`\varepsilon = (x - \alpha x_0)/\sigma`."""
        return self._predict("eps", x, t, cond)

    def score(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        r"""Score, :math:`\nabla_x\log p_t(x) = (\alpha x_0 - x)/\sigma^2`."""
        return self._predict("score", x, t, cond)

    def v(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        r"""v-prediction, :math:`v = \alpha\varepsilon - \sigma x_0`."""
        return self._predict("v", x, t, cond)

    def velocity(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        r"""Velocity of the probability-flow ODE, :math:`dx/dt = \dot\alpha x_0 + \dot\sigma\varepsilon`."""
        return self._predict("velocity", x, t, cond)

    def _predict(self, want: Want, x: Tensor, t: float | Tensor, cond: dict[str, Any]) -> Tensor:
        return self.convert("x0", self.x0(x, t, **cond), want, x, t)

    def convert(self, kind: str, out: Tensor, want: Want, x: Tensor, t: float | Tensor, s: float = 1.0) -> Tensor:
        if want == kind:
            return out
        if not isinstance(t, Tensor):
            a, b = self._coefficients(kind, want, t, s)
            if a == 0:
                return out if b == 1 else b * out
            return torch.add(x * a, out, alpha=b)  # not in place: under vmap one of the two may have no batch axis
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        source, target = form_of(kind, self.sde, t, alpha, sigma, s), as_form(want, self.sde, t, alpha, sigma)
        of_x, of_out = conversion(source, target, alpha, sigma)
        of_out = check.expand(of_out, x)
        if isinstance(of_x, float) and of_x == 0:
            return out if isinstance(of_out, float) and of_out == 1 else of_out * out
        result: Tensor = check.expand(of_x, x) * x + of_out * out
        return result

    def _coefficients(self, kind: str, want: Want, t: float, s: float) -> tuple[float, float]:
        """Coefficients of x and of the output at a time `t` that is a number."""

        def compute() -> tuple[float, float]:
            alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
            try:
                source, target = form_of(kind, self.sde, t, alpha, sigma, s), as_form(want, self.sde, t, alpha, sigma)
                of_x, of_out = conversion(source, target, alpha, sigma)
            except ZeroDivisionError:
                raise undefined_prediction(t, alpha, sigma) from None
            if not math.isfinite(of_x + of_out):
                raise undefined_prediction(t, alpha, sigma)
            return of_x, of_out

        pair: tuple[float, float] = self._cached((kind, want, t, s), compute) if isinstance(want, str) else compute()
        return pair

    def _cached(self, key: Any, compute: Callable[[], Any]) -> Any:
        """Result of `compute`, cached under `key` until ``self.sde`` is replaced."""
        if torch.compiler.is_compiling():
            return compute()
        owner, memo = self.__dict__.get("_memo", (None, {}))
        if owner is not self.sde or len(memo) >= _MEMO:
            memo = {}
            self.__dict__["_memo"] = (self.sde, memo)
        if key not in memo:
            memo[key] = compute()
        return memo[key]


def undefined_prediction(t: float | Tensor, alpha: Any, sigma: Any) -> ValueError:
    return ValueError(
        f"this prediction is not defined at t = {t}, where alpha = {alpha} and sigma = {sigma}: the conversion divides "
        f"by zero or a coefficient is infinite; evaluate at t in [t_min, T), or evaluate `x0`."
    )


def check_sde(sde: Any) -> SDE:
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE such as VP(), got {type(sde).__name__}.")
    return sde


def check_denoiser_type(denoiser: Any) -> None:
    if not isinstance(denoiser, AbstractDenoiser):
        raise TypeError(
            f"`denoiser` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(denoiser).__name__}."
        )


def check_conditions(cond: dict[str, Any], rows: int) -> None:
    for name, tree in cond.items():
        for leaf in tree_leaves(tree):
            if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] not in (1, rows):
                raise ValueError(
                    f"condition `{name}` has {leaf.shape[0]} rows and the state has {rows}; give one row for each "
                    f"sample, or one row in all."
                )


def check_model(model: Any, name: str = "model") -> AbstractDenoiser:
    """Return `model`; raise an error unless it is a denoiser."""
    if not isinstance(model, AbstractDenoiser):
        raise TypeError(f"`{name}` must be a denoiser, Denoiser(net, sde, predicts=...), got {type(model).__name__}.")
    return model


def same_process(model: AbstractDenoiser, other: AbstractDenoiser, name: str) -> None:
    """Raise an error if `other` is on another process than `model`."""
    if repr(model.sde) != repr(other.sde):
        raise ValueError(
            f"`{name}` is on {other.sde!r} and the model on {model.sde!r}; ss.denoisers.Rescheduled({name}, "
            f"model.sde) puts it on the same process."
        )


class Wrapped(AbstractDenoiser):
    """Base class of a denoiser that changes the prediction of another one."""

    def __init__(self, model: AbstractDenoiser) -> None:
        super().__init__()
        self.model = check_model(model)
        self.sde = model.sde


class Given(Wrapped):
    """A denoiser with some of its conditions fixed.

    Arguments:
        model: Denoiser.
        **cond: Fixed conditions; a condition given at the call takes precedence.
    """

    def __init__(self, model: AbstractDenoiser, **cond: Any) -> None:
        super().__init__(model)
        self.cond = cond

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        return self.model.x0(x, t, **{**self.cond, **cond})
