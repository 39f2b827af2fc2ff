r"""What noise does to data: linear SDEs, given by α(t) and σ(t).

A process takes data at t = 0 to noise at t = T,

.. math:: x_t \mid x_0 \sim N(\alpha_t x_0, \sigma_t^2 I), \qquad \lambda_t = \log(\alpha_t / \sigma_t),

and everything else follows from α and σ. This module knows nothing of networks, solvers or numbers of steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise import Noise

TimeT = TypeVar("TimeT", float, Tensor, float | Tensor)


def derivative(fn: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Differentiate an elementwise function by automatic differentiation, also under ``no_grad``.

    Arguments:
        fn: Elementwise function of a tensor.
        t: Where, any shape. The result is differentiable in turn when `t` requires grad.
    """
    # torch.func.grad, not autograd.grad: it also works inside other transforms of torch.func.
    with torch.inference_mode(False):
        s = t if t.requires_grad and torch.is_grad_enabled() else t.detach().clone()
        dy: Tensor = torch.func.grad(lambda u: fn(u).sum())(s)
    return dy


@dataclass(frozen=True)
class Prior:
    r"""The Gaussian :math:`N(\alpha_t m, (\alpha_t^2 s^2 + \sigma_t^2) I)` that a sampler starts from at time t.

    Arguments:
        mean: Its mean, one number.
        std: Its standard deviation, one number.
        snr: What is left of the data there, :math:`\alpha_t^2 s^2 / \sigma_t^2`: the gap between this Gaussian and
            the true marginal vanishes with it.
    """

    mean: float
    std: float
    snr: float

    def sample(
        self,
        shape: tuple[int, ...],
        noise: Noise,
        draw: int = 0,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw a state of shape `shape`, (B, *event); sample i depends on the seed and on i alone."""
        return self.mean + self.std * noise.normal(shape, draw, dtype=dtype, device=device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of each row of `x`, (B, *event) to (B,)."""
        z = (check.state("x", x) - self.mean) / self.std
        per_number = 0.5 * math.log(2 * math.pi) + math.log(self.std)
        return -0.5 * (z**2).flatten(1).sum(1) - per_number * (x[0].numel() if len(x) else 0)


@dataclass(frozen=True)
class SDE:
    r"""A linear SDE, :math:`dx = f(t)\,x\,dt + g(t)\,dw`, known by α(t) and σ(t).

    .. math::
        f = \frac{d \log\alpha_t}{dt}, \qquad
        g^2 = \frac{d\sigma_t^2}{dt} - 2 f \sigma_t^2 = -2\sigma_t^2 \frac{d\lambda_t}{dt}

    Time is 0 at data and `T` at noise, everywhere in this library. Every method of time takes a number (and returns
    one, computed in float64), a scalar tensor or a tensor of shape (B,) (and returns the like, in its dtype).

    A subclass is a frozen dataclass that writes ``_alpha`` and ``_sigma``, elementwise functions of a tensor, or
    ``_log_alpha`` and ``_log_sigma`` where logarithms are better conditioned. The rest is derived, by automatic
    differentiation and root finding where no closed form is given. :meth:`from_functions` does without a class.

    Arguments:
        T: Last time of the process. The functions do not change with it.
        t_min: Smallest positive time that networks are trained at and that grids in λ or σ/α step to before the last
            step to t = 0. 0 stands for the default of the class.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
        | Variational Diffusion Models (Kingma et al., 2021), arXiv:2107.00630
    """

    T: float = field(default=1.0, kw_only=True)
    t_min: float = field(default=0.0, kw_only=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for name in ("alpha", "sigma"):
            if getattr(cls, f"_{name}") is getattr(SDE, f"_{name}") and getattr(cls, f"_log_{name}") is getattr(
                SDE, f"_log_{name}"
            ):
                raise TypeError(
                    f"{cls.__name__} must define `_{name}(self, t)` or `_log_{name}(self, t)`, a function of a tensor; "
                    f"the public `{name}`, which also takes numbers and checks them, then follows."
                )

    def __post_init__(self) -> None:
        check.number("T", self.T, above=0)
        if self.t_min == 0:
            object.__setattr__(self, "t_min", self._default_t_min())
        check.number("t_min", self.t_min, above=0, below=self.T)

    # What a subclass writes: functions of a float32 or float64 tensor with values in [0, T].

    def _alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def _sigma(self, t: Tensor) -> Tensor:
        return self._log_sigma(t).exp()

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self._alpha(t).log()

    def _log_sigma(self, t: Tensor) -> Tensor:
        return self._sigma(t).log()

    def _f(self, t: Tensor) -> Tensor:
        return derivative(self._log_alpha, self._inside(t))

    def _g2(self, t: Tensor) -> Tensor:
        s = self._inside(t)
        sigma = self._sigma(s)
        return 2 * sigma * (derivative(self._sigma, s) - derivative(self._log_alpha, s) * sigma)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return derivative(self._alpha, t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return derivative(self._sigma, t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return self._invert(lambda t: self._log_alpha(t) - self._log_sigma(t), lam, falling=True)

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._invert(self._sigma, sigma, falling=False)

    def _default_t_min(self) -> float:
        return 1e-3 * self.T

    def _inside(self, t: Tensor) -> Tensor:
        # σ may start as √t, whose derivative is infinite at 0 while g² is not: take the limit from just inside.
        return t.clamp_min(1e-8 * self.T)

    def _invert(self, fn: Callable[[Tensor], Tensor], value: Tensor, *, falling: bool) -> Tensor:
        """Solve fn(t) = value on [0, T] by bisection in log t; one Newton step carries the gradient."""
        target = value.detach()
        lo = torch.full_like(target, math.log(self.T) - 80.0)
        hi = torch.full_like(target, math.log(self.T))
        with torch.no_grad():
            for _ in range(64):
                mid = (lo + hi) / 2
                y = fn(mid.exp().clamp_max(self.T))
                later = (y > target) if falling else (y < target)
                lo, hi = torch.where(later, mid, lo), torch.where(later, hi, mid)
            t = ((lo + hi) / 2).exp().clamp_max(self.T)
            for end in (0.0, self.T):
                at_end = torch.full_like(t, end)
                t = torch.where(fn(at_end) == target, at_end, t)
        if value.requires_grad:
            t = t + (value - target) / derivative(fn, t)
        return t

    # What follows. Each takes a number, () or (B,) and returns the like.

    def _at(self, fn: Callable[[Tensor], Tensor], t: TimeT) -> TimeT:
        if isinstance(t, Tensor):
            return fn(check.time(t, self.T))
        return float(fn(check.time(t, self.T)))

    def alpha(self, t: TimeT) -> TimeT:
        """Signal scale α(t)."""
        return self._at(self._alpha, t)

    def sigma(self, t: TimeT) -> TimeT:
        """Noise scale σ(t)."""
        return self._at(self._sigma, t)

    def log_alpha(self, t: TimeT) -> TimeT:
        """log α(t); -inf where α = 0."""
        return self._at(self._log_alpha, t)

    def log_sigma(self, t: TimeT) -> TimeT:
        """log σ(t); -inf where σ = 0."""
        return self._at(self._log_sigma, t)

    def lam(self, t: TimeT) -> TimeT:
        r"""Half log signal-to-noise ratio :math:`\lambda_t = \log(\alpha_t/\sigma_t)`; falls with t."""
        return self._at(lambda s: self._log_alpha(s) - self._log_sigma(s), t)

    def f(self, t: TimeT) -> TimeT:
        r"""Drift coefficient :math:`f(t) = d\log\alpha_t/dt`."""
        return self._at(self._f, t)

    def g2(self, t: TimeT) -> TimeT:
        r"""Squared diffusion coefficient :math:`g^2(t) = d\sigma_t^2/dt - 2 f(t)\sigma_t^2`."""
        return self._at(self._g2, t)

    def g(self, t: TimeT) -> TimeT:
        """Diffusion coefficient g(t)."""
        return self._at(lambda s: self._g2(s).sqrt(), t)

    def alpha_dot(self, t: TimeT) -> TimeT:
        """dα/dt."""
        return self._at(self._alpha_dot, t)

    def sigma_dot(self, t: TimeT) -> TimeT:
        """dσ/dt; infinite where σ starts as a square root (VP at t = 0)."""
        return self._at(self._sigma_dot, t)

    def t_of_lam(self, lam: TimeT) -> TimeT:
        """Time at which λ(t) = `lam`, a number, () or (B,) in [λ(T), λ(0)]; the inverse of :meth:`lam`."""
        return self._inverse("lam", self.lam, self._t_of_lam, lam)

    def t_of_sigma(self, sigma: TimeT) -> TimeT:
        """Time at which σ(t) = `sigma`, a number, () or (B,) in [σ(0), σ(T)]; the inverse of :meth:`sigma`."""
        return self._inverse("sigma", self.sigma, self._t_of_sigma, sigma)

    def _inverse(
        self, name: str, fn: Callable[[float], float], inverse: Callable[[Tensor], Tensor], value: TimeT
    ) -> TimeT:
        v = check.real(name, value)
        if v.device.type == "cpu":
            ends = sorted((fn(0.0), fn(self.T)))
            # An end computed in float32 rounds outside; how far is a matter of its size.
            slack = (torch.finfo(v.dtype).eps * 64) * (1 + v.detach().abs())
            inside = (v == ends[0]) | (v == ends[1]) | ((v >= ends[0] - slack) & (v <= ends[1] + slack))
            if not bool(inside.all()):
                bad = v.detach().reshape(-1)[~inside.reshape(-1)][0].item()
                raise ValueError(
                    f"`{name}` must lie in [{ends[0]:.6g}, {ends[1]:.6g}], the reach of this process on "
                    f"[0, {self.T:g}], got {bad:.6g}."
                )
        t = inverse(v).clamp(0.0, self.T)
        if isinstance(value, Tensor):
            return t
        return float(t)

    def transition(self, s: TimeT, t: TimeT) -> tuple[TimeT, TimeT]:
        r"""Scale and standard deviation of the forward step, s ≤ t.

        .. math:: x_t \mid x_s \sim N\!\left(\tfrac{\alpha_t}{\alpha_s} x_s,\;
                  \sigma_t^2 \,(1 - e^{2(\lambda_t - \lambda_s)}) I\right)
        """
        a, b = self._pair(s, t)
        scale = (self._log_alpha(b) - self._log_alpha(a)).exp()
        std = self._sigma(b) * (-torch.expm1(2 * self._gap(a, b))).sqrt()
        return self._like(scale, s, t), self._like(std, s, t)

    def posterior(self, s: TimeT, t: TimeT) -> tuple[TimeT, TimeT, TimeT]:
        r"""Coefficients of :math:`q(x_s \mid x_t, x_0) = N(c_t x_t + c_0 x_0, v I)` for s ≤ t.

        .. math:: c_t = \frac{\alpha_t\sigma_s^2}{\alpha_s\sigma_t^2}, \qquad
                  c_0 = \alpha_s (1 - e^{2(\lambda_t-\lambda_s)}), \qquad
                  v = \sigma_s^2 (1 - e^{2(\lambda_t-\lambda_s)})

        Returns:
            The three numbers (c_t, c_0, v).
        """
        a, b = self._pair(s, t)
        gap = self._gap(a, b)
        left = -torch.expm1(2 * gap)
        alpha, sigma = self._alpha(a), self._sigma(a)
        c_t = gap.exp() * torch.where(gap == 0, 1.0, sigma / self._sigma(b))
        return self._like(c_t, s, t), self._like(alpha * left, s, t), self._like(sigma**2 * left, s, t)

    def _pair(self, s: TimeT, t: TimeT) -> tuple[Tensor, Tensor]:
        a, b = check.time(s, self.T, "s"), check.time(t, self.T, "t")
        if a.device.type == b.device.type == "cpu" and bool((a > b).any()):
            raise ValueError(f"`s` must not lie after `t`: noise is added forward in time; got s = {s}, t = {t}.")
        return a, b

    def _gap(self, a: Tensor, b: Tensor) -> Tensor:
        """λ(b) − λ(a), 0 where a = b and -inf where only one of them has an infinite λ."""
        gap = self._log_alpha(b) - self._log_sigma(b) - (self._log_alpha(a) - self._log_sigma(a))
        return torch.where(a == b, torch.zeros_like(gap), gap)

    @staticmethod
    def _like(value: Tensor, s: TimeT, t: TimeT) -> TimeT:
        if isinstance(s, Tensor) or isinstance(t, Tensor):
            return value
        return float(value)

    # On states of shape (B, *event).

    def perturb(self, x0: Tensor, t: float | Tensor, eps: Tensor | None = None) -> Tensor:
        r"""Noise data: :math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon`.

        Arguments:
            x0: Data, (B, *event).
            t: A number, () or (B,).
            eps: Standard normal, the shape of `x0`. By default it is drawn from torch's global generator.
        """
        check.state("x0", x0)
        eps = torch.randn_like(x0) if eps is None else check.match("eps", eps, "x0", x0)
        alpha, sigma = (check.expand(fn(t), x0) for fn in (self.alpha, self.sigma))
        return alpha * x0 + sigma * eps

    def prior(self, t: float | None = None, *, mean: float = 0.0, std: float = 1.0) -> Prior:
        r"""The Gaussian to start from at time `t` when the data has mean `mean` and standard deviation `std`.

        .. math:: N(\alpha_t m,\; (\alpha_t^2 s^2 + \sigma_t^2) I)

        Warns when the data is still visible there, :math:`\alpha_t^2 s^2 > \sigma_t^2 / 100`.

        Arguments:
            t: When to start, by default `T`.
            mean: Mean of the data, one number.
            std: Standard deviation of the data, one number; 0 gives pure noise of scale σ(t).
        """
        t = self.T if t is None else check.number("t", t, above=0, most=self.T)
        check.number("std", std, least=0)
        alpha, sigma = self.alpha(t), self.sigma(t)
        snr = (alpha * std / sigma) ** 2
        if snr > 0.01:
            warnings.warn(
                f"at t = {t:g} the data still shows (signal-to-noise ratio {snr:.2g}), so a Gaussian is a poor start; "
                f"start later, or from `perturb(x0, t)` of real data.",
                stacklevel=2,
            )
        return Prior(alpha * mean, math.hypot(alpha * std, sigma), snr)

    def forward_drift(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Drift f(t) x of the forward SDE."""
        return check.expand(self.f(t), check.state("x", x)) * x

    def forward_diffusion(self, t: TimeT) -> TimeT:
        """Diffusion g(t) of the forward SDE."""
        return self.g(t)

    def reverse_drift(self, x: Tensor, t: float | Tensor, score: Tensor, eta: float = 1.0) -> Tensor:
        r"""Drift of the family of processes that run back along the same marginals.

        .. math:: dx = \left[f x - \tfrac{1+\eta^2}{2}\, g^2 \nabla\log p_t(x)\right] dt + \eta\, g\, d\bar w

        Arguments:
            x: State, (B, *event).
            t: A number, () or (B,).
            score: ∇log p_t(x), the shape of `x`.
            eta: 1 for the reverse SDE, 0 for the probability-flow ODE, or any other number.
        """
        eta = check.number("eta", eta, least=0)
        check.match("score", score, "x", check.state("x", x))
        f, g2 = check.expand(self.f(t), x), check.expand(self.g2(t), x)
        return f * x - (1 + eta**2) / 2 * g2 * score

    def reverse_diffusion(self, t: TimeT, eta: float = 1.0) -> TimeT:
        """Diffusion η g(t) of the reverse family."""
        return check.number("eta", eta, least=0) * self.g(t)

    def flow_drift(self, x: Tensor, t: float | Tensor, score: Tensor) -> Tensor:
        r"""Probability-flow ODE, :math:`dx/dt = f x - \tfrac12 g^2 \nabla\log p_t(x)`."""
        return self.reverse_drift(x, t, score, eta=0.0)

    # Processes from functions.

    @staticmethod
    def from_functions(
        alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor], *, T: float = 1.0, t_min: float = 0.0
    ) -> SDE:
        """Make a process of two functions of time; f, g and the inverses are derived.

        Arguments:
            alpha: α(t), an elementwise function of a tensor on [0, T], not negative.
            sigma: σ(t), likewise; α/σ must fall.
            T: Last time.
            t_min: Smallest positive time, by default T/1000.

        Example:
            >>> sde = SDE.from_functions(lambda t: 1 - t, lambda t: t)
            >>> sde.g2(0.25)
            0.666...
        """
        return FromFunctions(alpha, sigma, T=T, t_min=t_min)

    @staticmethod
    def from_drift(
        f: Callable[[Tensor], Tensor], g: Callable[[Tensor], Tensor], *, T: float = 1.0, t_min: float = 0.0
    ) -> SDE:
        r"""Make a process of its drift and diffusion; α and σ come by Gauss–Legendre quadrature.

        .. math:: \log\alpha_t = \int_0^t f, \qquad \sigma_t^2 = \alpha_t^2 \int_0^t g^2/\alpha^2

        Arguments:
            f: f(t), an elementwise, smooth function of a tensor on [0, T].
            g: g(t), likewise.
            T: Last time; f and g must be finite on [0, T].
            t_min: Smallest positive time, by default T/1000.

        Example:
            >>> sde = SDE.from_drift(lambda t: -t, lambda t: (2 * t) ** 0.5)
            >>> sde.alpha(1.0)
            0.606...
        """
        return FromDrift(f, g, T=T, t_min=t_min)


@dataclass(frozen=True)
class VP(SDE):
    r"""Variance preserving, with β(t) linear in t.

    .. math:: \beta(t) = \beta_{\min} + (\beta_{\max} - \beta_{\min})\, t, \qquad
              \alpha_t = e^{-B(t)/2}, \quad \sigma_t^2 = 1 - e^{-B(t)}, \quad B = \int_0^t \beta

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
            raise ValueError(f"`beta_max` = {self.beta_max} makes β negative before T = {self.T}; raise it.")

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

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return self._t_of_integral(_softplus(-2 * lam))

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-(sigma**2)))


@dataclass(frozen=True)
class SubVP(VP):
    r"""Sub-VP: the drift of :class:`VP`, with less noise.

    .. math:: \alpha_t = e^{-B(t)/2}, \quad \sigma_t = 1 - e^{-B(t)}, \quad g^2 = \beta(t)\,(1 - e^{-2B(t)})

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, eq. 29
    """

    def _sigma(self, t: Tensor) -> Tensor:
        return -torch.expm1(-self._integral(t))

    def _g2(self, t: Tensor) -> Tensor:
        return -self._beta(t) * torch.expm1(-2 * self._integral(t))

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # α solves α² + ρ α = 1 with ρ = σ/α.
        return self._t_of_integral(2 * torch.asinh((-lam).exp() / 2))

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_integral(-torch.log1p(-sigma))


@dataclass(frozen=True)
class VE(SDE):
    r"""Variance exploding, with geometric g.

    .. math:: g(t) = \sigma_{\min} r^t \sqrt{2\log r}, \quad r = \sigma_{\max}/\sigma_{\min}, \qquad
              \alpha_t = 1, \quad \sigma_t^2 = \sigma_{\min}^2 (r^{2t} - 1)

    This σ is what the SDE does to x_0, so σ(0) = 0; the form σ_min r^t found elsewhere is larger by 1/r^{2t} of
    itself and belongs to data that was noised with σ_min first. By default ``sigma(t_min) == sigma_min``.

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

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return self._t_of_sigma((-lam).exp())

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return torch.log1p((sigma / self.sigma_min) ** 2) / (2 * self._log_r)


@dataclass(frozen=True)
class Cosine(SDE):
    r"""Cosine schedule, with the offset s.

    .. math:: \alpha_t = \frac{\cos\theta_t}{\cos\theta_0}, \quad \theta_t = \frac{\pi}{2}\,\frac{t+s}{1+s}, \qquad
              \sigma_t^2 = 1 - \alpha_t^2 = \frac{\sin(\theta_t-\theta_0)\sin(\theta_t+\theta_0)}{\cos^2\theta_0}

    α vanishes at t = 1. The default T stops just before, so that any prediction can be used; ``Cosine(T=1.0)`` has
    zero terminal signal and takes x0, v and velocity networks.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672
        | DPM-Solver (Lu et al., 2022), arXiv:2206.00927, appendix D.4 (for T = 0.9946)
    """

    s: float = 0.008
    T: float = field(default=0.9946, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("s", self.s, above=0)
        check.number("T", self.T, above=0, most=1)

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

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        # θ by its sine and cosine, then θ − θ_0 by its own, neither of which cancels.
        sin0, cos0 = math.sin(self._rate * self.s), math.cos(self._rate * self.s)
        signal, noise = (2 * lam).sigmoid(), (-2 * lam).sigmoid()
        cos, sin = cos0 * signal.sqrt(), (sin0**2 + cos0**2 * noise).sqrt()
        return torch.atan2(cos0**2 * noise / (sin * cos0 + cos * sin0), cos * cos0 + sin * sin0) / self._rate


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

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return (-lam).exp()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()


@dataclass(frozen=True)
class Polynomial(SDE):
    r"""Polynomial interpolant between data and noise; n = 1 is :class:`Flow`.

    .. math:: \alpha_t = (1-t)^n, \qquad \sigma_t = 1 - (1-t)^n

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747
    """

    n: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("n", self.n, above=0)
        check.number("T", self.T, above=0, most=1)

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

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return -torch.expm1(torch.nn.functional.logsigmoid(lam) / self.n)


@dataclass(frozen=True)
class Flow(SDE):
    r"""Straight lines between data and noise (rectified flow, flow matching with a Gaussian source).

    .. math:: \alpha_t = 1 - t, \quad \sigma_t = t, \quad f = -\frac{1}{1-t}, \quad g^2 = \frac{2t}{1-t}

    α(1) = 0: networks that predict x0, v or the velocity ε − x0.

    References:
        | Flow Straight and Fast (Liu et al., 2023), arXiv:2209.03003
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("T", self.T, above=0, most=1)

    def _alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def _sigma(self, t: Tensor) -> Tensor:
        return t.clone()

    def _f(self, t: Tensor) -> Tensor:
        return -1 / (1 - t)

    def _g2(self, t: Tensor) -> Tensor:
        return 2 * t / (1 - t)

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return (-lam).sigmoid()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.clone()


@dataclass(frozen=True)
class Trig(SDE):
    r"""A quarter of a circle: variance preserving, with unit speed in the angle.

    .. math:: \alpha_t = \cos\tfrac{\pi t}{2}, \quad \sigma_t = \sin\tfrac{\pi t}{2}, \quad
              g^2 = \pi\tan\tfrac{\pi t}{2}

    References:
        | Building Normalizing Flows with Stochastic Interpolants (Albergo & Vanden-Eijnden, 2023), arXiv:2209.15571
        | Progressive Distillation (Salimans & Ho, 2022), arXiv:2202.00512
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check.number("T", self.T, above=0, most=1)

    def _alpha(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * (1 - t)).sin()

    def _sigma(self, t: Tensor) -> Tensor:
        return (math.pi / 2 * t).sin()

    def _f(self, t: Tensor) -> Tensor:
        return -math.pi / 2 / (math.pi / 2 * (1 - t)).tan()

    def _g2(self, t: Tensor) -> Tensor:
        return math.pi / (math.pi / 2 * (1 - t)).tan()

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return (2 / math.pi) * (-lam).exp().atan()

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return (2 / math.pi) * sigma.asin()


@dataclass(frozen=True)
class FromFunctions(SDE):
    """A process given by two functions; made by :meth:`SDE.from_functions`."""

    alpha_fn: Callable[[Tensor], Tensor]
    sigma_fn: Callable[[Tensor], Tensor]

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
                    f"write it with torch functions, and a constant as torch.full_like(t, c)."
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


@dataclass(frozen=True)
class FromDrift(SDE):
    """A process given by f and g; made by :meth:`SDE.from_drift`."""

    f_fn: Callable[[Tensor], Tensor]
    g_fn: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        super().__post_init__()
        t = torch.linspace(0, self.T, 257, dtype=torch.float64)
        for name, fn in (("f", self.f_fn), ("g", self.g_fn)):
            y = fn(t)
            if not isinstance(y, Tensor) or y.shape != t.shape or not bool(y.isfinite().all()):
                raise ValueError(
                    f"`{name}` must map a tensor of times to a finite tensor of the same shape on [0, T]; end the "
                    f"process before it becomes infinite with a smaller `T`, and write a constant as full_like(t, c)."
                )

    def _log_alpha(self, t: Tensor) -> Tensor:
        node, weight = _legendre(t)
        return t * (self.f_fn(t[..., None] * node) * weight).sum(-1)  # @ is half precision under autocast

    def _sigma(self, t: Tensor) -> Tensor:
        node, weight = _legendre(t)
        s = t[..., None] * node
        gain = 2 * (self._log_alpha(t)[..., None] - self._log_alpha(s))
        return (t * (self.g_fn(s) ** 2 * gain.exp() * weight).sum(-1)).sqrt()

    def _f(self, t: Tensor) -> Tensor:
        return self.f_fn(t)

    def _g2(self, t: Tensor) -> Tensor:
        return self.g_fn(t) ** 2


@dataclass(frozen=True)
class Shifted(SDE):
    r"""A process with λ lowered by log `shift`: the base process, run on a shifted clock.

    .. math:: \lambda_t = \lambda^{base}_{u(t)} = \lambda^{base}_t - \log(\mathrm{shift}), \qquad
              (\alpha_t, \sigma_t) = (\alpha^{base}_{u(t)}, \sigma^{base}_{u(t)})

    More pixels need more noise to lose the same detail: going from 64 to d pixels a side is ``shift = d / 64``. On
    :class:`Flow` this is the time shift u = s t / (1 + (s − 1) t). The process ends where the base ends: u(T) is the
    base's T.

    Example:
        >>> Shifted(Flow(), 3.0).sigma(0.5)
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
                f"`shift` must be at least 1 for a process with α(T) > 0, got {self.shift}: it would end before "
                f"the base does, at more signal than it has there."
            )
        last = self.base.lam(self.base.T) + back
        object.__setattr__(self, "T", self.base.T if math.isinf(last) else self.base.t_of_lam(last))
        super().__post_init__()

    def _default_t_min(self) -> float:
        return self.base.t_of_lam(min(self.base.lam(self.base.t_min) + math.log(self.shift), self.base.lam(0.0)))

    def base_time(self, t: TimeT) -> TimeT:
        """Time u(t) at which the base process has the same α and σ: the time that its network knows."""
        return self._at(self._u, t)

    def _u(self, t: Tensor) -> Tensor:
        lam = self.base._log_alpha(t) - self.base._log_sigma(t) - math.log(self.shift)
        u = self.base._t_of_lam(lam).clamp(0.0, self.base.T)
        return torch.where(t == 0, t, u)

    def _log_alpha(self, t: Tensor) -> Tensor:
        return self.base._log_alpha(self._u(t))

    def _alpha(self, t: Tensor) -> Tensor:
        return self.base._alpha(self._u(t))

    def _sigma(self, t: Tensor) -> Tensor:
        return self.base._sigma(self._u(t))

    def _alpha_dot(self, t: Tensor) -> Tensor:
        return self.base._alpha_dot(self._u(t)) * self._speed(t)

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return self.base._sigma_dot(self._u(t)) * self._speed(t)

    def _speed(self, t: Tensor) -> Tensor:
        """du/dt; where λ is infinite, at an end, its limit from just inside."""
        inside = 4 * max(self.shift, 1.0) * torch.finfo(t.dtype).eps  # 1 − u is `shift` times smaller than 1 − t
        s = self._inside(t).clamp_max((1 - max(inside, 1e-7)) * self.T)
        u = self._u(s)
        lam_dot = [self.base._g2(v) / self.base._sigma(v) ** 2 for v in (s, u)]
        return lam_dot[0] / lam_dot[1]

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return self.base._t_of_lam(lam + math.log(self.shift))


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus returns x itself above 20, which is 2e-9 off in float64.
    return torch.logaddexp(x, torch.zeros_like(x))


def _legendre(like: Tensor, n: int = 64) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights on [0, 1]."""
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor((node + 1) / 2).to(like), torch.as_tensor(weight / 2).to(like)
