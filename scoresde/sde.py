r"""Linear SDEs, given by α(t) and σ(t).

A process takes data at t = 0 to noise at t = T,

.. math:: x_t \mid x_0 \sim N(\alpha_t x_0, \sigma_t^2 I), \qquad \lambda_t = \log(\alpha_t / \sigma_t),

and all other quantities of the process follow from α and σ.
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
        t: Points, a tensor of any shape. The result is differentiable if `t` requires grad and grad mode is on.
    """
    # Unlike autograd.grad, torch.func.grad also works inside other transforms of torch.func.
    with torch.inference_mode(False):
        s = t if t.requires_grad and torch.is_grad_enabled() else t.detach().clone()
        dy: Tensor = torch.func.grad(lambda u: fn(u).sum())(s)
    return dy


@dataclass(frozen=True)
class Prior:
    r"""The Gaussian :math:`N(\alpha_t m, (\alpha_t^2 s^2 + \sigma_t^2) I)` that a sampler starts from at time t.

    Arguments:
        mean: Mean, float.
        std: Standard deviation, float.
        snr: Signal-to-noise ratio at t, :math:`\alpha_t^2 s^2 / \sigma_t^2`, float. The gap between this Gaussian
            and the true marginal vanishes with this ratio.
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
        """Draw a state of shape `shape`, (B, *event). Sample i depends only on the seed, `draw` and i."""
        return self.mean + self.std * noise.normal(shape, draw, dtype=dtype, device=device)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats of each sample of `x`, (B, *event) to (B,)."""
        z = (check.state("x", x) - self.mean) / self.std
        per_number = 0.5 * math.log(2 * math.pi) + math.log(self.std)
        return -0.5 * (z**2).flatten(1).sum(1) - per_number * (x[0].numel() if len(x) else 0)


@dataclass(frozen=True)
class SDE:
    r"""A linear SDE, :math:`dx = f(t)\,x\,dt + g(t)\,dw`, defined by α(t) and σ(t).

    .. math::
        f = \frac{d \log\alpha_t}{dt}, \qquad
        g^2 = \frac{d\sigma_t^2}{dt} - 2 f \sigma_t^2 = -2\sigma_t^2 \frac{d\lambda_t}{dt}

    Time is 0 at data and `T` at noise in the whole library. Every function of time accepts a number, a scalar tensor
    or a tensor of shape (B,). A number gives a number, computed in float64; a tensor gives a tensor of its dtype.

    A subclass is a frozen dataclass that defines ``_alpha`` and ``_sigma``, elementwise functions of a tensor, or
    ``_log_alpha`` and ``_log_sigma`` if logarithms are better conditioned. Automatic differentiation and root finding
    give all quantities without a closed form. :meth:`from_functions` needs no subclass.

    Arguments:
        T: Last time of the process. α(t) and σ(t) do not depend on `T`.
        t_min: Smallest positive time. Networks are trained on [t_min, T], and grids in λ or σ/α contain t_min before
            the last step to t = 0. The value 0 selects the default of the class.

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
                    f"the public `{name}` calls this function and also accepts numbers."
                )

    def __post_init__(self) -> None:
        check.number("T", self.T, above=0)
        if self.t_min == 0:
            object.__setattr__(self, "t_min", self._default_t_min())
        check.number("t_min", self.t_min, above=0, below=self.T)

    # Functions for subclasses to override. Their argument is a float32 or float64 tensor with values in [0, T].

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
        # If σ ∝ √t near 0, then dσ/dt is infinite at 0 but g² is finite: evaluate g² at a small positive time.
        return t.clamp_min(1e-8 * self.T)

    def _invert(self, fn: Callable[[Tensor], Tensor], value: Tensor, *, falling: bool) -> Tensor:
        """Solve fn(t) = value on [0, T] by bisection in log t; one Newton step gives the gradient."""
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

    # Derived quantities. Each accepts a number, () or (B,) and returns the same kind.

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
        r"""Half log signal-to-noise ratio :math:`\lambda_t = \log(\alpha_t/\sigma_t)`, decreasing in t."""
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
        """dσ/dt; infinite at t = 0 if σ ∝ √t there, as for VP."""
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
            # An end computed in float32 may lie outside by rounding, in proportion to its size.
            slack = (torch.finfo(v.dtype).eps * 64) * (1 + v.detach().abs())
            inside = (v == ends[0]) | (v == ends[1]) | ((v >= ends[0] - slack) & (v <= ends[1] + slack))
            if not bool(inside.all()):
                bad = v.detach().reshape(-1)[~inside.reshape(-1)][0].item()
                raise ValueError(
                    f"`{name}` must lie in [{ends[0]:.6g}, {ends[1]:.6g}], its range for times in "
                    f"[0, {self.T:g}], got {bad:.6g}."
                )
        t = inverse(v).clamp(0.0, self.T)
        if isinstance(value, Tensor):
            return t
        return float(t)

    def transition(self, s: TimeT, t: TimeT) -> tuple[TimeT, TimeT]:
        r"""Scale and standard deviation of the forward transition from s to t, s ≤ t.

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
            The tuple (c_t, c_0, v).
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

    # Functions of states of shape (B, *event).

    def perturb(self, x0: Tensor, t: float | Tensor, eps: Tensor | None = None) -> Tensor:
        r"""Add noise to data: :math:`x_t = \alpha_t x_0 + \sigma_t \varepsilon`.

        Arguments:
            x0: Data, (B, *event).
            t: Time, a number, () or (B,).
            eps: Standard normal noise, the shape of `x0`; by default drawn from torch's global generator.
        """
        check.state("x0", x0)
        eps = torch.randn_like(x0) if eps is None else check.match("eps", eps, "x0", x0)
        alpha, sigma = (check.expand(fn(t), x0) for fn in (self.alpha, self.sigma))
        return alpha * x0 + sigma * eps

    def prior(self, t: float | None = None, *, mean: float = 0.0, std: float = 1.0) -> Prior:
        r"""The Gaussian that a sampler starts from at time `t`, for data of mean m and standard deviation s.

        .. math:: N(\alpha_t m,\; (\alpha_t^2 s^2 + \sigma_t^2) I)

        Warns if the signal-to-noise ratio at `t` is too high, :math:`\alpha_t^2 s^2 > \sigma_t^2 / 100`.

        Arguments:
            t: Start time, float, by default `T`.
            mean: Mean m of the data, float.
            std: Standard deviation s of the data, float; 0 gives pure noise of scale σ(t).
        """
        t = self.T if t is None else check.number("t", t, above=0, most=self.T)
        check.number("std", std, least=0)
        alpha, sigma = self.alpha(t), self.sigma(t)
        snr = (alpha * std / sigma) ** 2
        if snr > 0.01:
            warnings.warn(
                f"at t = {t:g} the signal-to-noise ratio is {snr:.2g}, too high for a Gaussian prior; "
                f"start at a later time, or from `perturb(x0, t)` of real data.",
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
        r"""Drift of the family of reverse-time processes with the same marginals.

        .. math:: dx = \left[f x - \tfrac{1+\eta^2}{2}\, g^2 \nabla\log p_t(x)\right] dt + \eta\, g\, d\bar w

        Arguments:
            x: State, (B, *event).
            t: Time, a number, () or (B,).
            score: Score ∇log p_t(x), the shape of `x`.
            eta: Noise level, at least 0: 1 for the reverse SDE, 0 for the probability-flow ODE.
        """
        eta = check.number("eta", eta, least=0)
        check.match("score", score, "x", check.state("x", x))
        f, g2 = check.expand(self.f(t), x), check.expand(self.g2(t), x)
        return f * x - (1 + eta**2) / 2 * g2 * score

    def reverse_diffusion(self, t: TimeT, eta: float = 1.0) -> TimeT:
        """Diffusion η g(t) of the reverse-time family."""
        return check.number("eta", eta, least=0) * self.g(t)

    def flow_drift(self, x: Tensor, t: float | Tensor, score: Tensor) -> Tensor:
        r"""Drift of the probability-flow ODE, :math:`dx/dt = f x - \tfrac12 g^2 \nabla\log p_t(x)`."""
        return self.reverse_drift(x, t, score, eta=0.0)

    # Processes from functions.

    @staticmethod
    def from_functions(
        alpha: Callable[[Tensor], Tensor], sigma: Callable[[Tensor], Tensor], *, T: float = 1.0, t_min: float = 0.0
    ) -> SDE:
        """Make a process from α(t) and σ(t); f, g and the inverse functions are derived.

        Arguments:
            alpha: Function α(t), elementwise on a tensor with values in [0, T], not negative.
            sigma: Function σ(t), of the same kind. α/σ must decrease with t.
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
        r"""Make a process from f(t) and g(t); Gauss–Legendre quadrature gives α and σ.

        .. math:: \log\alpha_t = \int_0^t f, \qquad \sigma_t^2 = \alpha_t^2 \int_0^t g^2/\alpha^2

        Arguments:
            f: Drift coefficient f(t), smooth and elementwise on a tensor with values in [0, T].
            g: Diffusion coefficient g(t), of the same kind.
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
            raise ValueError(f"`beta_max` = {self.beta_max} makes β negative or 0 at T = {self.T}; increase it.")

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

    This σ is the noise that the SDE adds to x_0, so σ(0) = 0. The common form σ_min r^t has a variance larger by
    σ_min²; it assumes data with noise of scale σ_min already added. By default ``sigma(t_min) == sigma_min``.

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

    α is 0 at t = 1. The default T is smaller, so a network may predict any quantity. ``Cosine(T=1.0)`` has zero
    terminal signal and needs a network that predicts x0, v or the velocity.

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
        # The sines and cosines of θ and of θ − θ_0, written without cancellation.
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
    r"""Linear interpolation of data and noise (rectified flow, flow matching with a Gaussian source).

    .. math:: \alpha_t = 1 - t, \quad \sigma_t = t, \quad f = -\frac{1}{1-t}, \quad g^2 = \frac{2t}{1-t}

    α(1) = 0, so the network must predict x0, v or the velocity ε − x0.

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
    r"""Variance-preserving trigonometric schedule: (α, σ) moves along a quarter circle at constant speed.

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
    """A process given by α(t) and σ(t), the result of :meth:`SDE.from_functions`."""

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


@dataclass(frozen=True)
class FromDrift(SDE):
    """A process given by f(t) and g(t), the result of :meth:`SDE.from_drift`."""

    f_fn: Callable[[Tensor], Tensor]
    g_fn: Callable[[Tensor], Tensor]

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
        node, weight = _legendre(t)
        return t * (self.f_fn(t[..., None] * node) * weight).sum(-1)  # @ would use half precision under autocast

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
    r"""The base process at a shifted time u(t): λ is lower by log `shift`.

    .. math:: \lambda_t = \lambda^{base}_{u(t)} = \lambda^{base}_t - \log(\mathrm{shift}), \qquad
              (\alpha_t, \sigma_t) = (\alpha^{base}_{u(t)}, \sigma^{base}_{u(t)})

    Larger images need more noise to remove the same detail: from 64 to d pixels per side, use ``shift = d / 64``. On
    :class:`Flow` this is u = s t / (1 + (s − 1) t). The last time T satisfies u(T) = T of the base process.

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
        """Compute du/dt; at an end with infinite λ, evaluate just inside."""
        inside = 4 * max(self.shift, 1.0) * torch.finfo(t.dtype).eps  # 1 − u is `shift` times smaller than 1 − t
        s = self._inside(t).clamp_max((1 - max(inside, 1e-7)) * self.T)
        u = self._u(s)
        lam_dot = [self.base._g2(v) / self.base._sigma(v) ** 2 for v in (s, u)]
        return lam_dot[0] / lam_dot[1]

    def _t_of_lam(self, lam: Tensor) -> Tensor:
        return self.base._t_of_lam(lam + math.log(self.shift))


def _softplus(x: Tensor) -> Tensor:
    # torch's softplus returns x above 20, an error of 2e-9 in float64.
    return torch.logaddexp(x, torch.zeros_like(x))


def _legendre(like: Tensor, n: int = 64) -> tuple[Tensor, Tensor]:
    """Gauss–Legendre nodes and weights on [0, 1]."""
    import numpy as np

    node, weight = np.polynomial.legendre.leggauss(n)
    return torch.as_tensor((node + 1) / 2).to(like), torch.as_tensor(weight / 2).to(like)
