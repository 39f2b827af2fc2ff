"""The reverse SDE family of a denoiser, and a denoiser moved to another process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, Condition, Wrapped, check_model, check_sde
from scoresde.denoisers.predictions import Coefficient, Form, form_of
from scoresde.plan.folding import Outputs
from scoresde.processes.sde import SDE


@checked
@dataclass(frozen=True)
class Reverse:
    r"""Reverse-time process of a denoiser; for every η it has the marginals of the forward SDE.

    .. math:: dx = \left[f x - \tfrac{1+\eta^2}{2}\,g^2\nabla\log p_t(x)\right]dt + \eta\,g\,d\bar w
              = \left[\dot\alpha x_0 + \left(\dot\sigma + \tfrac{\eta^2 g^2}{2\sigma}\right)\varepsilon\right]dt
              + \eta\,g\,d\bar w

    The code computes the second form: it stays finite where α = 0 or where f x and the score cancel.

    Arguments:
        denoiser: Denoiser that gives the score.
        eta: Noise level η ≥ 0: 1 for the reverse SDE, 0 for the probability-flow ODE.

    References:
        | Reverse-Time Diffusion Equation Models (Anderson, 1982)
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
    """

    denoiser: AbstractDenoiser
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_model(self.denoiser, "denoiser")
        check.number("eta", self.eta, at_least=0)

    def drift(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        """Drift, the bracket above, (B, *event); one evaluation of the network."""

        def bracket(sde: SDE, t: Coefficient, alpha: Coefficient, sigma: Coefficient) -> Form:
            velocity = form_of("velocity", sde, t, alpha, sigma)
            if self.eta == 0:
                return velocity
            return Form(velocity.a, velocity.b + self.eta**2 * sde.g2(t) / (2 * sigma))

        return self.denoiser.predict(bracket, x, t, **cond)

    def diffusion(self, t: float | Tensor) -> float | Tensor:
        """Diffusion coefficient η g(t); for η = 0 it is 0 even where g is infinite."""
        if self.eta == 0:
            return torch.zeros_like(t) if isinstance(t, Tensor) else 0.0
        return self.eta * self.denoiser.sde.g(t)


@checked
class Rescheduled(Wrapped):
    r"""A denoiser on another process than the one it was trained on.

    .. math:: D'(x, t) = D\!\left(x\,\frac{\alpha_u}{\alpha'_t},\, u\right), \qquad \lambda_u = \lambda'_t

    The data prediction depends on x/α and λ alone, so this is exact. Where λ' is outside the range of the old process,
    the denoiser is evaluated at the nearest end, T or 0.

    Arguments:
        model: Denoiser on its own process.
        sde: New process.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """

    def __init__(self, model: AbstractDenoiser, sde: SDE) -> None:
        super().__init__(model, check_sde(sde))

    def extra_repr(self) -> str:
        return f"sde={self.sde!r}"

    def x0_and_variance(self, x: Tensor, t: float | Tensor, **cond: Condition) -> tuple[Tensor, Tensor]:
        if self.kind.variance in ("log", "value"):
            raise ValueError(
                "Rescheduled has no learned variance, because the network returns the variance of a step of its own "
                "process; use the model on its own process, or a network with `learned_variance`='range'."
            )
        return super().x0_and_variance(x, t, **cond)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        check.state("x", x)
        if not isinstance(t, Tensor):
            scale, u = self._cached(("place", t), lambda: self._place_of(t))
            return self.model.x0(scale * x, u, **cond)
        factor, time = self._place(check.time(t, self.sde.T))
        return self.model.x0(check.expand(factor, x) * x, time, **cond)

    def outputs_at(self, times: tuple[float, ...], x: Tensor, **cond: Condition) -> Outputs | None:
        if not self.keeps(Rescheduled):
            return None
        places = [self._cached(("place", t), lambda t=t: self._place_of(t)) for t in times]  # type: ignore[misc]
        inner = self.model.outputs_at(tuple(u for _, u in places), x, **cond)
        if inner is None:
            return None
        scales = [scale for scale, _ in places]
        p = tuple(p * scale for p, scale in zip(inner.p, scales, strict=True))
        return Outputs(p, inner.q, lambda x, n: inner.evaluate(scales[n] * x, n))

    def _place_of(self, t: float) -> tuple[float, float]:
        scale, u = self._place(check.time(t, self.sde.T))
        return float(scale), float(u)

    def _place(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Scale of the state and time on the old process."""
        old = self.model.sde
        lam = self.sde.lam(s).clamp(old.lam(old.T), old.lam(0.0))
        u = old.inverse_lam(lam).clamp(0.0, old.T)
        # α_u/α_t = σ_u/σ_t unless λ is clamped; divide by the larger of α_t and σ_t.
        signal, noise = old.alpha(u) / self.sde.alpha(s), old.sigma(u) / self.sde.sigma(s)
        return torch.where(lam > 0, signal, noise), u
