r"""Measurements whose noise is not Gaussian: Poisson, Laplace, Student, rounded and censored values.

The entries of y are independent given :math:`u = A(x_0)`. Each class has the log-density of an entry, and its mean over
:math:`u \sim N(m, v)`, which methods that take x₀ given x_t as Gaussian need:

.. math:: \log p(y \mid x_0) = \sum_j \log p(y_j \mid u_j), \qquad
          \log \int p(y_j \mid u)\, N(u; m_j, v)\, du
"""

from __future__ import annotations

import math
from typing import ClassVar, NoReturn

import numpy as np
import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.operators import Linear, Operator
from scoresde.noise.keyed import Noise

Scale = float | Tensor
"""A number, or a tensor that broadcasts to (1, *out) or (B, *out)."""


class EntrywiseMeasurement(Measurement):
    """Base of measurements whose entries have independent noise of any density.

    A subclass writes :meth:`log_density`, and :meth:`draw` if y is to be simulated. ``DPS``, ``red_diff`` and
    ``guidance.ClassifierGuidance`` use the likelihood. If a subclass also writes :meth:`smoothed_density` and sets
    `smooth`, ``PiGDM`` and ``TMPD`` accept the measurement too.

    Arguments:
        operator: Operator A.
        y: Observed values, (1, *out) or (B, *out).

    Example:
        >>> import torch, scoresde as ss
        >>> class Cauchy(ss.inverse.EntrywiseMeasurement):
        ...     def log_density(self, y, u):
        ...         return -(torch.pi * (1 + (y - u) ** 2)).log()
        >>> first = ss.inverse.Mask(torch.tensor([True, False]))
        >>> Cauchy(first, torch.tensor([[0.5]])).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    gaussian = False

    smooth: ClassVar[bool] = False
    """Whether :meth:`smoothed_density` is defined."""

    def __init__(self, operator: Operator, y: Tensor) -> None:
        super().__init__(operator, y, 0.0)

    def log_density(self, y: Tensor, u: Tensor) -> Tensor:
        """Log-density of each entry of y given u = A(x0), elementwise, (B, *out)."""
        raise NotImplementedError(f"{type(self).__name__} must define `log_density(y, u)`.")

    def smoothed(self, u: Tensor, variance: float | Tensor) -> Tensor:
        """Logarithm of the mean density of y over A(x0) ~ N(u, variance I), (B, *out) to (B,).

        Arguments:
            u: Mean of A(x0), (B, *out).
            variance: Variance, a number or a tensor that broadcasts to (B, *out).
        """
        if not self.smooth:
            raise TypeError(f"{type(self).__name__} has no density for u ~ N(m, v); use DPS, or a class with `smooth`.")
        return self._total(self.smoothed_density(self.data(u), u, torch.as_tensor(variance).to(u)))

    def smoothed_density(self, y: Tensor, u: Tensor, variance: Tensor) -> Tensor:
        """Logarithm of the mean density of each entry of y over N(u, variance), elementwise."""
        raise NotImplementedError(f"{type(self).__name__} must define `smoothed_density(y, u, variance)`.")

    def log_prob(self, x0: Tensor) -> Tensor:
        """log p(y | x0) in nats, (B, *event) to (B,)."""
        check.state("x0", x0)
        return self._total(self.log_density(self.data(x0), self.operator(x0)))

    def _total(self, logs: Tensor) -> Tensor:
        known = self.operator.known_entries
        if known is not None:
            logs = torch.where(known.to(logs.device), logs, 0.0)
        return logs.flatten(1).sum(1)

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} must define `draw(u, noise)` to simulate measurements.")

    def extra_repr(self) -> str:
        return f"{self.operator!r}, y={tuple(self.y.shape)}"

    @property
    def linear(self) -> Linear:
        self._refuse("this method")

    def whitened(self) -> Measurement:
        self._refuse("this method")

    def require_likelihood(self, who: str) -> None:
        pass  # the likelihood always exists

    def require_noise(self, who: str) -> float:
        self._refuse(who)

    def _refuse(self, who: str) -> NoReturn:
        name = type(self).__name__
        also = "DPS, PiGDM and TMPD" if self.smooth else "DPS"
        raise TypeError(
            f"{who} needs Gaussian noise, Measurement(operator, y, std), got {name}: its formula is a Gaussian "
            f"integral; {also}, daps, steering with Likelihood, red_diff and ClassifierGuidance accept {name}."
        )


@checked
class Counts(EntrywiseMeasurement):
    r"""Measurement with Poisson noise, :math:`y \sim \mathrm{Poisson}(A(x_0))`, such as photon counts.

    .. math:: \log p(y \mid x_0) = \sum_j y_j\log\mu_j - \mu_j - \log y_j!, \qquad \mu = A(x_0)

    The operator returns the expected counts; for data in [−1, 1] it may be ``Operator(lambda x: 50 * (x + 1), event)``.
    For :math:`\mu < \varepsilon` the tangent at ε replaces log μ, so the gradient is finite for μ ≤ 0 too.
    :class:`DPS` and ``guidance.ClassifierGuidance`` accept counts; methods that need
    Gaussian noise raise an error.

    Arguments:
        operator: Operator A, linear or not, that returns the expected counts μ.
        y: Counts, (1, *out) or (B, *out), at least 0.
        floor: Threshold ε below which log μ is linear.
    """

    def __init__(self, operator: Operator, y: Tensor, floor: float = 1e-2) -> None:
        super().__init__(operator, y)
        self.floor = check.number("floor", floor, above=0)
        if bool((y < 0).any()):
            raise ValueError(f"`y` must be counts, at least 0, got {float(y.min()):g}.")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, floor={self.floor:g}"

    def log_density(self, y: Tensor, u: Tensor) -> Tensor:
        inside = u.clamp_min(self.floor)
        log_mu = inside.log() + (u - inside) / self.floor
        return y * log_mu - u - (y + 1).lgamma()

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        return _poisson(u.clamp_min(0), noise)


class _Smooth(EntrywiseMeasurement):
    """Noise whose density is known for a Gaussian u too; a subclass writes ``smoothed_density``.

    Arguments:
        operator: Operator A.
        y: Observed values.
        scale: Scale of the noise, positive.
        name: Name of `scale` in messages.
    """

    smooth = True
    per_sample: ClassVar[tuple[str, ...]] = (*Measurement.per_sample, "scale")

    scale: Tensor

    def __init__(self, operator: Operator, y: Tensor, scale: Scale, name: str) -> None:
        super().__init__(operator, y)
        wide = torch.as_tensor(scale, dtype=torch.float64)
        if not bool(wide.isfinite().all()) or bool((wide <= 0).any()):
            raise ValueError(f"`{name}` must be finite and above 0, got {float(wide.min()):g}.")
        wide = wide if wide.ndim == len(operator.out) + 1 else wide[None]
        try:
            wide = wide.expand(len(wide), *operator.out)
        except RuntimeError:
            raise ValueError(
                f"`{name}` of shape {tuple(wide.shape[1:])} does not broadcast to the output of the operator, "
                f"{operator.out}."
            ) from None
        self.register_buffer("scale", wide.contiguous())
        self._name = name

    def extra_repr(self) -> str:
        size = f"{float(self.scale.flatten()[0]):g}" if bool((self.scale == self.scale.flatten()[0]).all()) else "each"
        return f"{super().extra_repr()}, {self._name}={size}"

    def log_density(self, y: Tensor, u: Tensor) -> Tensor:
        return self.smoothed_density(y, u, u.new_zeros(()))


@checked
class Laplace(_Smooth):
    r"""Measurement with Laplace noise, :math:`p(y \mid u) = e^{-|y - u|/b}/2b`, which outliers affect less.

    Arguments:
        operator: Operator A.
        y: Observed values, (1, *out) or (B, *out).
        scale: Scale b: a number, or a tensor that broadcasts to (*out) or (B, *out). The standard deviation is √2 b.
    """

    def __init__(self, operator: Operator, y: Tensor, scale: Scale) -> None:
        super().__init__(operator, y, scale, "scale")

    def log_density(self, y: Tensor, u: Tensor) -> Tensor:
        b = self.scale.to(u)
        return -(y - u).abs() / b - (2 * b).log()

    def smoothed_density(self, y: Tensor, u: Tensor, variance: Tensor) -> Tensor:
        b, s, r = self.scale.to(u), variance.clamp_min(torch.finfo(u.dtype).tiny).sqrt(), y - u
        sides = [sign * r / b + torch.special.log_ndtr(-sign * r / s - s / b) for sign in (1.0, -1.0)]
        return torch.logaddexp(*sides) + 0.5 * variance / b**2 - (2 * b).log()

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        w = noise.uniform(u.shape, 0, dtype=torch.float64).to(u) - 0.5
        return u - self.scale.to(u) * w.sign() * torch.log1p(-2 * w.abs().clamp_max(0.5 - 1e-9))


@checked
class StudentT(_Smooth):
    r"""Measurement with Student's t noise, whose heavy tails ignore outliers.

    .. math:: p(y \mid u) = \frac{\Gamma(\frac{\nu+1}{2})}{\Gamma(\frac\nu2)\sqrt{\pi\nu}\,s}
              \left(1 + \frac{(y-u)^2}{\nu s^2}\right)^{-\frac{\nu+1}{2}}
              = \int N(y; u, s^2/w)\,\mathrm{Gamma}(w; \tfrac\nu2, \tfrac\nu2)\, dw

    Arguments:
        operator: Operator A.
        y: Observed values, (1, *out) or (B, *out).
        scale: Scale s: a number, or a tensor that broadcasts to (*out) or (B, *out).
        df: Degrees of freedom ν; 1 is the Cauchy distribution.
    """

    def __init__(self, operator: Operator, y: Tensor, scale: Scale, df: float = 4.0) -> None:
        super().__init__(operator, y, scale, "scale")
        self.df = check.number("df", df, above=0)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, df={self.df:g}"

    def log_density(self, y: Tensor, u: Tensor) -> Tensor:
        s, nu = self.scale.to(u), self.df
        constant = math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2) - 0.5 * math.log(math.pi * nu)
        return constant - s.log() - (nu + 1) / 2 * torch.log1p(((y - u) / s) ** 2 / nu)

    def smoothed_density(self, y: Tensor, u: Tensor, variance: Tensor) -> Tensor:
        # The trapezoid rule in log w converges exponentially: the integrand decays at both ends and is analytic.
        half, h = self.df / 2, 0.5
        z = torch.arange(-math.ceil(80 / h / min(1.0, self.df)), 17, device=u.device, dtype=u.dtype) * h
        log_weight = half * z - half * z.exp() + half * math.log(half) - math.lgamma(half) + math.log(h)
        total, r = self.scale.to(u) ** 2, y - u
        out = torch.full_like(r, -math.inf)
        for w, log_w in zip(z.exp().tolist(), log_weight.tolist(), strict=True):
            v = total / w + variance
            out = torch.logaddexp(out, log_w - 0.5 * (r**2 / v + (2 * math.pi * v).log()))
        return out

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        from scipy.special import stdtrit  # here, because the import takes long

        w = stdtrit(self.df, noise.uniform(u.shape, 0, dtype=torch.float64).numpy())
        return u + self.scale.to(u) * torch.from_numpy(np.asarray(w)).to(u)


@checked
class Rounded(_Smooth):
    r"""Rounded measurement, :math:`y = \mathrm{round}(A(x_0) + \mathrm{std}\cdot n)` to multiples of a step.

    .. math:: P(y \mid u) = \Phi\!\left(\tfrac{y + \delta/2 - u}{\mathrm{std}}\right) -
              \Phi\!\left(\tfrac{y - \delta/2 - u}{\mathrm{std}}\right)

    With `low` and `high`, values outside are set to the bounds, as in a saturated sensor: the bins at the bounds are
    then open.

    Arguments:
        operator: Operator A.
        y: Rounded values, (1, *out) or (B, *out).
        step: Distance δ of two values.
        std: Standard deviation of the noise before rounding, above 0: a number or a tensor as in :class:`Measurement`.
        low: Smallest value, or None.
        high: Largest value, or None.
    """

    def __init__(
        self,
        operator: Operator,
        y: Tensor,
        step: float,
        std: Scale,
        *,
        low: float | None = None,
        high: float | None = None,
    ) -> None:
        super().__init__(operator, y, std, "std")
        self.step = check.number("step", step, above=0)
        self.low, self.high = check_bounds(low, high)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, step={self.step:g}"

    def smoothed_density(self, y: Tensor, u: Tensor, variance: Tensor) -> Tensor:
        s = (self.scale.to(u) ** 2 + variance).sqrt()
        upper = torch.where(y >= self.high - self.step / 2, torch.inf, y + self.step / 2)
        lower = torch.where(y <= self.low + self.step / 2, -torch.inf, y - self.step / 2)
        return log_interval((lower - u) / s, (upper - u) / s)

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        value = u + self.scale.to(u) * noise.like(u, 0)
        return (self.step * (value / self.step).round()).clamp(self.low, self.high)


@checked
class Censored(_Smooth):
    r"""Censored measurement: :math:`A(x_0) + \mathrm{std}\cdot n`, with values outside [low, high] set to the limit.

    An entry of y that is at most `low` means "at most low", one of at least `high` "at least high", as in an instrument
    with a detection limit, or a study that ended before an event:

    .. math:: p(y \mid u) = N(y; u, \mathrm{std}^2), \quad P(\text{low} \mid u) = \Phi((\text{low} - u)/\mathrm{std}),
              \quad P(\text{high} \mid u) = \Phi((u - \text{high})/\mathrm{std})

    Arguments:
        operator: Operator A.
        y: Observed values, (1, *out) or (B, *out).
        std: Standard deviation of the noise, above 0: a number or a tensor as in :class:`Measurement`.
        low: Lower limit, or None.
        high: Upper limit, or None.
    """

    def __init__(
        self, operator: Operator, y: Tensor, std: Scale, *, low: float | None = None, high: float | None = None
    ) -> None:
        super().__init__(operator, y, std, "std")
        self.low, self.high = check_bounds(low, high)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, low={self.low:g}, high={self.high:g}"

    def smoothed_density(self, y: Tensor, u: Tensor, variance: Tensor) -> Tensor:
        s = (self.scale.to(u) ** 2 + variance).sqrt()
        inside = -0.5 * ((y - u) / s) ** 2 - (s * math.sqrt(2 * math.pi)).log()
        # A limit that no entry has may be infinite, whose gradient would be NaN under `where`.
        low, high = (0.0 if math.isinf(v) else v for v in (self.low, self.high))
        below, above = torch.special.log_ndtr((low - u) / s), torch.special.log_ndtr((u - high) / s)
        return torch.where(y <= self.low, below, torch.where(y >= self.high, above, inside))

    def draw(self, u: Tensor, noise: Noise) -> Tensor:
        return (u + self.scale.to(u) * noise.like(u, 0)).clamp(self.low, self.high)


def check_bounds(low: float | None, high: float | None) -> tuple[float, float]:
    """Bounds as numbers, infinite for None; raise an error if they are in the wrong order."""
    a = -math.inf if low is None else check.number("low", low)
    b = math.inf if high is None else check.number("high", high)
    if a >= b:
        raise ValueError(f"`low` must be less than `high`, got {a:g} and {b:g}.")
    return a, b


def log_interval(a: Tensor, b: Tensor) -> Tensor:
    """log(Φ(b) − Φ(a)) for a < b, without cancellation in the tails; bounds may be infinite."""
    flip = a + b > 0  # both bounds are moved to the side where Φ is small
    near, far = torch.where(flip, -a, b), torch.where(flip, -b, a)
    open_ = far == -torch.inf
    whole = near == torch.inf
    large = torch.special.log_ndtr(torch.where(whole, 0.0, near))
    small = torch.special.log_ndtr(torch.where(open_, 0.0, far))
    ratio = torch.where(open_, -1.0, small - large)
    return torch.where(whole, 0.0, large) + torch.where(open_, 0.0, (-torch.expm1(ratio)).log())


def _poisson(rate: Tensor, noise: Noise) -> Tensor:
    """Poisson counts by inversion of the distribution function."""
    from scipy.special import pdtr, pdtrik  # here, because the import takes long

    u = noise.uniform(rate.shape, 0, dtype=torch.float64).numpy()
    mu = rate.double().cpu().numpy()
    k = np.ceil(pdtrik(u, np.maximum(mu, 1e-300)))
    k = np.where(pdtr(np.maximum(k - 1, 0), mu) >= u, np.maximum(k - 1, 0), np.maximum(k, 0))
    return torch.from_numpy(np.where(mu > 0, k, 0.0)).to(rate)
