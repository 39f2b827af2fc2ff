"""The processes of the literature, by name."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked, checked_with, words
from scoresde.processes.sde import SDE, TimeT

LIKE_STEPS = 100.0  # a β(0) that large is a mistake, if β falls from there

# Hints for the keywords of other libraries.
WORDS = words("""
beta_start beta_0 beta0: use `beta_min`, the rate β(0); the β of DDPM's steps belong to Discrete(betas("linear", N))
beta_end beta_1 beta1: use `beta_max`, the rate β(1); the β of DDPM's steps belong to Discrete(betas("linear", N))
N num_steps steps timesteps num_timesteps num_train_timesteps: the process has no steps; Discrete(betas) has
eps epsilon: use `t_min`
""")


@checked_with(WORDS)
@dataclass(frozen=True)
class VP(SDE):
    r"""Variance preserving, with β(t) linear in t.

    .. math:: \beta(t) = \beta_{\min} + (\beta_{\max} - \beta_{\min})\, t, \qquad
              \alpha_t = e^{-B(t)/2}, \quad \sigma_t^2 = 1 - e^{-B(t)}, \quad B = \int_0^t \beta

    Arguments:
        beta_min: Rate β(0) of the noise.
        beta_max: Rate β(1) of the noise.

    Example:
        >>> VP().f(0.5), VP().g2(0.5)
        (-5.025, 10.05)

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("beta_min", self.beta_min, above=0)
        check.number("beta_max", self.beta_max, above=0)
        if self.beta(self.T) <= 0:
            raise ValueError(f"`beta_max` = {self.beta_max} makes β negative or 0 at T = {self.T}; increase it.")
        if self.beta_min > self.beta_max and self.beta_min >= LIKE_STEPS:
            raise ValueError(
                f"`beta_min` = {self.beta_min:g} is larger than `beta_max` = {self.beta_max:g}, and looks like a "
                f"number of steps. VP has the rates β(0) and β(1), and no steps: use VP(), or for the steps of DDPM "
                f"Discrete(betas('linear', {self.beta_min:g}))."
            )

    def beta(self, t: TimeT) -> TimeT:
        """β(t)."""
        return self._at(self._beta, t)

    def _beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def _integral(self, t: Tensor) -> Tensor:
        return t * (self.beta_min + (self.beta_max - self.beta_min) / 2 * t)

    def _t_of_integral(self, b: Tensor) -> Tensor:
        slope = self.beta_max - self.beta_min
        return 2 * b / (self.beta_min + (self.beta_min**2 + 2 * slope * b).sqrt())

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -self._integral(t) / 2

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(-self._integral(t))).sqrt()

    def _f(self, t: Tensor) -> Tensor:
        return -self._beta(t) / 2

    def _g2(self, t: Tensor) -> Tensor:
        return self._beta(t)

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return self._t_of_integral(_softplus(-2 * lam))

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-(sigma**2)))


@checked
@dataclass(frozen=True)
class SubVP(VP):
    r"""Sub-VP: the drift of :class:`VP` with a smaller σ.

    .. math:: \alpha_t = e^{-B(t)/2}, \quad \sigma_t = 1 - e^{-B(t)}, \quad g^2 = \beta(t)\,(1 - e^{-2B(t)})

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, eq. 29
    """

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _g2(self, t: Tensor) -> Tensor:
        return -self._beta(t) * torch.expm1(-2 * self._integral(t))

    def inverse_lam(self, lam: Tensor) -> Tensor:
        # α solves α² + ρ α = 1 with ρ = σ/α.
        return self._t_of_integral(2 * torch.asinh((-lam).exp() / 2))

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-sigma))


@checked
@dataclass(frozen=True)
class VE(SDE):
    r"""Variance exploding, with geometric g.

    .. math:: g(t) = \sigma_{\min} r^t \sqrt{2\log r}, \quad r = \sigma_{\max}/\sigma_{\min}, \qquad
              \alpha_t = 1, \quad \sigma_t^2 = \sigma_{\min}^2 (r^{2t} - 1)

    This σ is the noise that the SDE adds to x_0, so σ(0) = 0. The common form σ_min r^t has a variance larger by
    σ_min²; it assumes data with noise of scale σ_min already added. By default ``sigma(t_min) == sigma_min``.

    Arguments:
        sigma_min: Scale σ_min.
        sigma_max: Scale σ_max at t = 1.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, eq. 30
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    def __post_init__(self) -> None:
        check.number("sigma_min", self.sigma_min, above=0)
        check.number("sigma_max", self.sigma_max, above=self.sigma_min)
        super().__post_init__()

    def _default_t_min(self) -> float:
        return min(math.log(2) / (2 * self._log_r), self.T / 2)

    @property
    def _log_r(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * torch.expm1(2 * self._log_r * t).sqrt()

    def _f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        return self.sigma_min**2 * (2 * self._log_r) * (2 * self._log_r * t).exp()

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return self._t_of_sigma((-lam).exp())

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log1p((sigma / self.sigma_min) ** 2) / (2 * self._log_r)


@checked
@dataclass(frozen=True)
class Cosine(SDE):
    r"""Cosine schedule, with the offset s.

    .. math:: \alpha_t = \frac{\cos\theta_t}{\cos\theta_0}, \quad \theta_t = \frac{\pi}{2}\,\frac{t+s}{1+s}, \qquad
              \sigma_t^2 = 1 - \alpha_t^2 = \frac{\sin(\theta_t-\theta_0)\sin(\theta_t+\theta_0)}{\cos^2\theta_0}

    α is 0 at t = 1. The default T is smaller, so a network may predict any quantity. ``Cosine(T=1.0)`` has zero
    terminal signal and needs a network that predicts x0, v or the velocity.

    Arguments:
        s: Offset s > 0, which keeps the noise at the first steps from being too small.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672
        | DPM-Solver (Lu et al., 2022), arXiv:2206.00927, appendix D.4 (for T = 0.9946)
    """

    s: float = 0.008
    T: float = field(default=0.9946, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("s", self.s, above=0)
        check.number("T", self.T, above=0, at_most=1)

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.s)

    def _alpha(self, t: Tensor) -> Tensor:
        return (self._rate * (1 - t)).sin() / math.cos(self._rate * self.s)

    def _sigma(self, t: Tensor) -> Tensor:
        return ((self._rate * t).sin() * (self._rate * (t + 2 * self.s)).sin()).sqrt() / math.cos(self._rate * self.s)

    def _f(self, t: Tensor) -> Tensor:
        return -self._rate / (self._rate * (1 - t)).tan()

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * self._rate / (self._rate * (1 - t)).tan()

    def inverse_lam(self, lam: Tensor) -> Tensor:
        # The sines and cosines of θ and of θ − θ_0, written without cancellation.
        sin0, cos0 = math.sin(self._rate * self.s), math.cos(self._rate * self.s)
        signal, noise = (2 * lam).sigmoid(), (-2 * lam).sigmoid()
        cos, sin = cos0 * signal.sqrt(), (sin0**2 + cos0**2 * noise).sqrt()
        return torch.atan2(cos0**2 * noise / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0) / self._rate


@checked
@dataclass(frozen=True)
class EDM(SDE):
    r"""α = 1 and σ = t: time is the noise level.

    .. math:: \alpha_t = 1, \quad \sigma_t = t, \quad f = 0, \quad g^2 = 2t

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """

    T: float = field(default=80.0, kw_only=True)

    def _default_t_min(self) -> float:
        return min(0.002, 1e-3 * self.T)

    def _alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _f(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * t

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return (-lam).exp()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()


@checked
@dataclass(frozen=True)
class Polynomial(SDE):
    r"""Polynomial interpolant between data and noise; n = 1 is :class:`Flow`.

    .. math:: \alpha_t = (1-t)^n, \qquad \sigma_t = 1 - (1-t)^n

    Arguments:
        n: Exponent n > 0.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747
    """

    n: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("n", self.n, above=0)
        check.number("T", self.T, above=0, at_most=1)

    def _alpha(self, t: Tensor) -> Tensor:
        return (1 - t) ** self.n

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.n * torch.log1p(-t))

    def _f(self, t: Tensor) -> Tensor:
        return -self.n / (1 - t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * self.n / (1 - t) * self._sigma(t)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return -self.n * (1 - t) ** (self.n - 1)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self.n * (1 - t) ** (self.n - 1)

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return -torch.expm1(torch.log1p(-sigma) / self.n)

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return -torch.expm1(torch.nn.functional.logsigmoid(lam) / self.n)


@checked
@dataclass(frozen=True)
class Flow(SDE):
    r"""Linear interpolation of data and noise (rectified flow, flow matching with a Gaussian source).

    .. math:: \alpha_t = 1 - t, \quad \sigma_t = t, \quad f = -\frac{1}{1-t}, \quad g^2 = \frac{2t}{1-t}

    α(1) = 0, so the network must predict x0, v or the velocity ε − x0.

    References:
        | Flow Straight and Fast (Liu et al., 2023), arXiv:2209.03003
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("T", self.T, above=0, at_most=1)

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return (-lam).sigmoid()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()


@checked
@dataclass(frozen=True)
class Trig(SDE):
    r"""Variance-preserving trigonometric schedule: (α, σ) moves along a quarter circle at constant speed.

    .. math:: \alpha_t = \cos\tfrac{\pi t}{2}, \quad \sigma_t = \sin\tfrac{\pi t}{2}, \quad
              g^2 = \pi\tan\tfrac{\pi t}{2}

    References:
        | Building Normalizing Flows with Stochastic Interpolants (Albergo & Vanden-Eijnden, 2023), arXiv:2209.15571
        | Progressive Distillation (Salimans & Ho, 2022), arXiv:2202.00512
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("T", self.T, above=0, at_most=1)

    def _alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * (1 - t)).sin()

    def _sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def _f(self, t: Tensor) -> Tensor:
        return -math.pi / 2 / (math.pi / 2 * (1 - t)).tan()

    def _g2(self, t: Tensor) -> Tensor:
        return math.pi / (math.pi / 2 * (1 - t)).tan()

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return (2 / math.pi) * (-lam).exp().atan()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return (2 / math.pi) * sigma.asin()


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus returns x above 20, an error of 2e-9 in float64.
    return torch.logaddexp(x, torch.zeros_like(x))
