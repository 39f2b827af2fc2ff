r"""Linear SDEs, given by α(t) and σ(t).

A process takes data at t = 0 to noise at t = T,

.. math:: x_t \mid x_0 \sim N(\alpha_t x_0, \sigma_t^2 I), \qquad \lambda_t = \log(\alpha_t / \sigma_t),

and all other quantities of the process follow from α and σ.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.keyed import Noise

TimeT = TypeVar("TimeT", float, Tensor, float | Tensor)

LARGEST_SNR = 0.01
"""Largest signal-to-noise ratio of a state whose distribution counts as a Gaussian."""


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

    @checked
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

    A process of one's own is a frozen dataclass that defines ``_alpha`` and ``_sigma``, elementwise functions of a
    tensor, or ``_log_alpha`` and ``_log_sigma`` if logarithms are better conditioned. Automatic differentiation and
    root finding give all other quantities. Closed forms may be added: ``_f``, ``_g2``, ``_alpha_dot``, ``_sigma_dot``,
    ``inverse_lam`` and ``_t_of_sigma``. :meth:`from_functions` needs no subclass. :class:`Reverse`
    has the drift and the diffusion of the reverse process.

    Arguments:
        T: Last time of the process. α(t) and σ(t) do not depend on `T`.
        t_min: Smallest positive time. Networks are trained on [t_min, T], and grids in λ or σ/α contain t_min before
            the last step to t = 0. The value 0 selects the default of the class.

    Example:
        >>> from dataclasses import dataclass
        >>> import torch, scoresde as ss
        >>> @dataclass(frozen=True)
        ... class Power(ss.SDE):
        ...     n: float = 2.0
        ...     def _alpha(self, t):
        ...         return 1 - t**self.n
        ...     def _sigma(self, t):
        ...         return t
        >>> sde = Power(n=1.5)
        >>> round(sde.t_of_lam(sde.lam(0.3)), 6), sde.g2(torch.tensor([0.5]))
        (0.3, tensor([1.8204]))

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

    def inverse_lam(self, lam: Tensor) -> Tensor:
        """The time at which λ(t) = `lam`, elementwise and without checks; a subclass may write it in closed form."""
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
        return self._inverse("lam", self.lam, self.inverse_lam, lam)

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

    @checked
    def prior(self, t: float | None = None, *, mean: float = 0.0, std: float = 1.0) -> Prior:
        r"""The Gaussian that a sampler starts from at time `t`, for data of mean m and standard deviation s.

        .. math:: N(\alpha_t m,\; (\alpha_t^2 s^2 + \sigma_t^2) I)

        Warns if the signal-to-noise ratio at `t` is too high, :math:`\alpha_t^2 s^2 > \sigma_t^2 / 100`.

        Arguments:
            t: Start time, float, by default `T`.
            mean: Mean m of the data, float.
            std: Standard deviation s of the data, float; 0 gives pure noise of scale σ(t).
        """
        t = self.T if t is None else check.number("t", t, above=0, at_most=self.T)
        check.number("std", std, at_least=0)
        alpha, sigma = self.alpha(t), self.sigma(t)
        snr = (alpha * std / sigma) ** 2
        if snr > LARGEST_SNR:
            warnings.warn(
                f"at t = {t:g} the signal-to-noise ratio is {snr:.2g}, too high for a Gaussian prior; "
                f"start at a later time, or from `perturb(x0, t)` of real data.",
                stacklevel=check.levels_to_user(),
            )
        return Prior(alpha * mean, math.hypot(alpha * std, sigma), snr)

    # Processes as dictionaries, and from functions.

    def to_dict(self) -> dict[str, object]:
        """Class name and arguments, as plain numbers for JSON; :meth:`from_dict` restores an equal process.

        A process that is defined by code cannot be written: one of :meth:`from_functions`, :meth:`from_drift`, or of a
        class of one's own.

        Example:
            >>> import scoresde as ss
            >>> ss.VP(beta_max=10.0).to_dict()
            {'process': 'VP', 'T': 1.0, 't_min': 0.001, 'beta_min': 0.1, 'beta_max': 10.0}
            >>> SDE.from_dict(ss.VP().to_dict()) == ss.VP()
            True
        """
        from scoresde.processes.dictionary import to_dict

        return to_dict(self)

    @staticmethod
    def from_dict(table: Mapping[str, object]) -> SDE:
        """Make a process from a dictionary.

        Arguments:
            table: Output of :meth:`to_dict`.
        """
        from scoresde.processes.dictionary import from_dict

        return from_dict(table)

    @staticmethod
    @checked
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
        from scoresde.processes.derived import FromFunctions

        return FromFunctions(alpha, sigma, T=T, t_min=t_min)

    @staticmethod
    @checked
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
        from scoresde.processes.derived import FromDrift

        return FromDrift(f, g, T=T, t_min=t_min)
