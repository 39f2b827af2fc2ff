r"""Densities p(t) of the training times on [t_min, T].

A density has three functions: the quantile t = ``icdf(sde, u)``, its inverse u = ``cdf(sde, t)``, and p(t) =
``density(sde, t)``. Times are quantiles of uniform numbers, so that :class:`Stratified`, which couples the uniform
numbers of a batch, works with any density. A new density is a subclass that defines the three functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.noise.keyed import Noise
from scoresde.processes.sde import SDE
from scoresde.training.draws import TIMES, Source, place, source_of


class Times:
    """A density of times; a subclass defines :meth:`icdf`, :meth:`cdf` and :meth:`density`."""

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile, (B,): the time t with P(time ≤ t) = u, for u (B,) in [0, 1]."""
        raise NotImplementedError(f"{type(self).__name__} must define `icdf(sde, u)`.")

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Cumulative probability P(time ≤ t), (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define `cdf(sde, t)`.")

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """Density p(t), (B,); it integrates to 1 over [t_min, T]."""
        raise NotImplementedError(f"{type(self).__name__} must define `density(sde, t)`.")

    @checked
    def sample(
        self,
        sde: SDE,
        n: int,
        noise: Noise | Source | int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Draw n times, (n,).

        Arguments:
            sde: Process.
            n: Number of times.
            noise: Source of the numbers: None (torch's global generator), a seed, a :class:`Noise` or a source.
            dtype: Dtype of the times, float32 or float64.
            device: Device of the times.
        """
        u = self.uniforms(n, source_of(noise), dtype, device)
        return self.icdf(sde, u)

    def uniforms(self, n: int, source: Source, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Uniform numbers, (n,), whose quantiles are the times; independent unless a subclass couples them."""
        return source.uniform((n,), TIMES, dtype=dtype, device=device)

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        """Update a learned density from losses p(t) w(t) e (B,) at times (B,); a fixed density does nothing."""


class _RelativeTime(Times):
    """A density of the relative time τ = (t − t_min)/(T − t_min); a subclass defines it on [0, 1]."""

    def _icdf(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _cdf(self, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def _density(self, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        return (sde.t_min + (sde.T - sde.t_min) * self._icdf(u)).clamp(sde.t_min, sde.T)

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        return self._cdf(self._tau(sde, t))

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        return self._density(self._tau(sde, t)) / (sde.T - sde.t_min)

    @staticmethod
    def _tau(sde: SDE, t: Tensor) -> Tensor:
        return ((t - sde.t_min) / (sde.T - sde.t_min)).clamp(0.0, 1.0)


@checked
@dataclass(frozen=True)
class Uniform(_RelativeTime):
    """The uniform density on [t_min, T]."""

    def _icdf(self, u: Tensor) -> Tensor:
        return u

    def _cdf(self, tau: Tensor) -> Tensor:
        return tau

    def _density(self, tau: Tensor) -> Tensor:
        return torch.ones_like(tau)


@checked
@dataclass(frozen=True)
class Steps(Times):
    """The uniform distribution on the N times T/N, 2T/N, …, T: the steps of a discrete process.

    Arguments:
        N: Number of steps; the published training of a :class:`Discrete` process uses its own N.
    """

    N: int

    def __post_init__(self) -> None:
        check.integer("N", self.N, at_least=1)

    @checked
    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile: the end of the step that contains u T."""
        return ((u * self.N).floor() + 1).clamp_max(self.N) * (sde.T / self.N)

    @checked
    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        return (t * (self.N / sde.T)).round() / self.N

    @checked
    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """N/T times the probability of a step; only its ratio to a density on the same steps has a meaning."""
        return torch.full_like(t, 1 / sde.T)


@checked
@dataclass(frozen=True)
class LogitNormal(_RelativeTime):
    r"""Logit-normal density of τ: by default it favours the middle of the process over its ends.

    .. math:: \tau = \mathrm{sigmoid}(m + s z), \quad z \sim N(0, 1)

    Arguments:
        mean: Mean m of logit τ; above 0 for more noise.
        std: Standard deviation s of logit τ.

    References:
        | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), arXiv:2403.03206
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        check.number("mean", self.mean)
        check.number("std", self.std, above=0)

    def _icdf(self, u: Tensor) -> Tensor:
        return (self.mean + self.std * _ndtri(u)).sigmoid()

    def _cdf(self, tau: Tensor) -> Tensor:
        return _ndtr((tau.logit() - self.mean) / self.std)

    def _density(self, tau: Tensor) -> Tensor:
        inside = tau.clamp(1e-7, 1 - 1e-7)
        z = (inside.logit() - self.mean) / self.std
        return _normal_pdf(z) / (self.std * inside * (1 - inside))


@checked
@dataclass(frozen=True)
class Mode(_RelativeTime):
    r"""Density that favours the middle (scale > 0) or the ends (scale < 0), and is positive everywhere.

    .. math:: \tau = u + s\,(u - \sin^2\tfrac{\pi u}{2})

    Arguments:
        scale: Parameter s, in (−1, 2/(π − 2)).

    References:
        | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), arXiv:2403.03206
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        check.number("scale", self.scale, above=-1, below=2 / (math.pi - 2))

    def _icdf(self, u: Tensor) -> Tensor:
        return u + self.scale * (u - (math.pi / 2 * u).sin() ** 2)

    def _cdf(self, tau: Tensor) -> Tensor:
        lo, hi = torch.zeros_like(tau), torch.ones_like(tau)
        for _ in range(26 if tau.dtype == torch.float32 else 55):
            mid = (lo + hi) / 2
            late = self._icdf(mid) > tau
            lo, hi = torch.where(late, lo, mid), torch.where(late, mid, hi)
        return (lo + hi) / 2

    def _density(self, tau: Tensor) -> Tensor:
        return 1 / (1 + self.scale - self.scale * (math.pi / 2) * (math.pi * self._cdf(tau)).sin())


@checked
@dataclass(frozen=True)
class CosineTimes(_RelativeTime):
    r"""Times at which :class:`Flow` has the signal-to-noise ratios of a cosine schedule.

    .. math:: \tau = \frac{\sin(\pi u/2)}{\sin(\pi u/2) + \cos(\pi u/2)}, \qquad
              p(\tau) = \frac{2}{\pi(1 - 2\tau + 2\tau^2)}

    References:
        | Scaling Rectified Flow Transformers for High-Resolution Image Synthesis (Esser et al., 2024), arXiv:2403.03206
    """

    def _icdf(self, u: Tensor) -> Tensor:
        sin, cos = (math.pi / 2 * u).sin(), (math.pi / 2 * (1 - u)).sin()
        return sin / (sin + cos)

    def _cdf(self, tau: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan2(tau, 1 - tau)

    def _density(self, tau: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * tau + 2 * tau**2))


@checked
@dataclass(frozen=True)
class LogNormalSigma(Times):
    r"""EDM's density for any process: log(σ/α) is normal, truncated to the times in [t_min, T].

    .. math:: \log\frac{\sigma_t}{\alpha_t} = P_{mean} + P_{std}\,z, \quad z \sim N(0, 1)

    On :class:`Flow` this is a truncated :class:`LogitNormal`.

    Arguments:
        P_mean: Mean of log(σ/α); EDM uses −1.2 for images of 32 and 64 pixels with standard deviation 0.5.
        P_std: Standard deviation of log(σ/α).

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        check.number("P_mean", self.P_mean)
        check.number("P_std", self.P_std, above=0)

    @checked
    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        low, high = self._ends(sde)
        share = low + u * (high - low)
        lam = -(self.P_mean + self.P_std * _ndtri(share))
        return _times_of_lam(sde, lam)

    @checked
    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._ends(sde)
        return (_ndtr(self._z(sde, t)) - low) / (high - low)

    @checked
    def density(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._ends(sde)
        p = _normal_pdf(self._z(sde, t)) / self.P_std * _speed(sde, t) / (high - low)
        return torch.where(sde.alpha(t) > 0, p, 0.0)

    def _z(self, sde: SDE, t: Tensor) -> Tensor:
        return (-sde.lam(t) - self.P_mean) / self.P_std

    def _ends(self, sde: SDE) -> tuple[float, float]:
        low, high = ((-sde.lam(t) - self.P_mean) / (self.P_std * math.sqrt(2)) for t in (sde.t_min, sde.T))
        ends = math.erfc(-low) / 2, math.erfc(-high) / 2
        if not ends[1] > ends[0]:
            raise ValueError(
                f"`P_mean`={self.P_mean}, `P_std`={self.P_std} has no probability inside the range of log(σ/α) of "
                f"{type(sde).__name__}, [{-sde.lam(sde.t_min):.3g}, {-sde.lam(sde.T):.3g}]; give a `P_mean` inside it."
            )
        return ends


@checked
@dataclass(frozen=True)
class LikelihoodImportance(Times):
    r"""Proposal for the likelihood weighting: proportional to the loss on Gaussian data, for low variance.

    .. math:: p(t) \propto \frac{g^2}{\sigma^2}\,\frac{\alpha^2 s^2}{\alpha^2 s^2 + \sigma^2}

    The second factor is the smallest mean squared error of ε for Gaussian data of standard deviation s. For s = ∞ the
    factor is 1; this is the density of Song et al., uniform in λ, which exists only if α(T) > 0. Pass the density as
    the `proposal` of a :class:`DSM`. For such Gaussian data and the exact denoiser, random times add no variance.

    Arguments:
        data_std: Standard deviation s of the data, or ``math.inf``.

    References:
        | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258
    """

    data_std: float = 1.0

    def __post_init__(self) -> None:
        if self.data_std != math.inf:
            check.number("data_std", self.data_std, above=0)

    # With Λ = 2(λ + log s): p dt ∝ sigmoid(Λ) dΛ, whose integral is softplus.

    @checked
    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        low, high = self._ends(sde)
        area = high - u * (high - low)
        if self.data_std == math.inf:
            lam = area
        else:
            lam = (area + torch.log(-torch.expm1(-area))) / 2 - math.log(self.data_std)
        return _times_of_lam(sde, lam)

    @checked
    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._ends(sde)
        return (high - self._area(sde.lam(t))) / (high - low)

    @checked
    def density(self, sde: SDE, t: Tensor) -> Tensor:
        low, high = self._ends(sde)
        if self.data_std == math.inf:
            return _speed(sde, t) / (high - low)
        alpha, sigma = sde.alpha(t) * self.data_std, sde.sigma(t)
        # α² |dλ/dt| = α (σ̇α − α̇σ)/σ, finite where α = 0.
        rate = sde.alpha(t) * (sde.sigma_dot(t) * sde.alpha(t) / sigma - sde.alpha_dot(t)) * self.data_std**2
        return 2 * rate / (alpha**2 + sigma**2) / (high - low)

    def _area(self, lam: Tensor) -> Tensor:
        if self.data_std == math.inf:
            return lam
        x = 2 * (lam + math.log(self.data_std))
        return torch.logaddexp(x, torch.zeros_like(x))

    def _ends(self, sde: SDE) -> tuple[float, float]:
        if self.data_std == math.inf and sde.alpha(sde.T) == 0:
            raise ValueError(
                f"`data_std`=inf is uniform in λ, but {type(sde).__name__} has λ(T) = −∞; give the standard deviation "
                f"of the data."
            )
        low, high = (float(self._area(torch.tensor(sde.lam(t), dtype=torch.float64))) for t in (sde.T, sde.t_min))
        return low, high


@checked
class LossAware(nn.Module, Times):
    r"""Learned `proposal`: times with large losses are drawn more often, for a smaller variance of the loss.

    .. math:: q_k = (1 - m)\,\frac{r_k}{\sum_j r_j} + \frac mK, \qquad r_k = \sqrt{E[\ell^2 \mid k]}

    The K bins have equal probability under `base`, a density b(t), and the density in bin k is q(t) = K q_k b(t). With
    ℓ = p w e/b, up to a constant, the loss of a sample is p w e/q = ℓ/(K q_k); for m = 0 the q_k give it the smallest
    variance. The q_k are equal until every bin has `warmup` samples. The state_dict contains the running means of ℓ².
    DDP uses those of the first process.

    Arguments:
        base: Density that defines the bins and the density within a bin; uniform by default.
        bins: Number K of bins.
        mix: Share m of equal probabilities.
        memory: Weight of the past in the running mean, per batch.
        warmup: Number of samples in every bin before the probabilities change.

    References:
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672
    """

    moment: Tensor
    count: Tensor

    def __init__(
        self, base: Times | None = None, bins: int = 32, mix: float = 0.05, memory: float = 0.95, warmup: int = 10
    ) -> None:
        super().__init__()
        self.base = Uniform() if base is None else base
        self.mix = check.number("mix", mix, above=0, at_most=1)
        self.memory = check.number("memory", memory, at_least=0, below=1)
        self.warmup = check.integer("warmup", warmup, at_least=1)
        self.register_buffer("moment", torch.zeros(check.integer("bins", bins, at_least=2)))
        self.register_buffer("count", torch.zeros(bins))

    def __repr__(self) -> str:
        return f"LossAware({self.base}, bins={len(self.moment)}, mix={self.mix:g})"

    def shares(self) -> Tensor:
        """Probability of each bin, (K,)."""
        root = self.moment.sqrt()
        equal = torch.full_like(root, 1 / len(root))
        learned = (1 - self.mix) * root / root.sum().clamp_min(torch.finfo(root.dtype).tiny) + self.mix * equal
        ready = (self.count >= self.warmup).all() & (root.sum() > 0)
        return torch.where(ready, learned, equal)

    @checked
    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        share = self._shares(u)
        edge = share.cumsum(0)
        k = torch.searchsorted(edge, u.contiguous(), right=True).clamp_max(len(share) - 1)
        inside = ((u - (edge[k] - share[k])) / share[k]).clamp(0, 1)
        return self.base.icdf(sde, (k + inside) / len(share))

    @checked
    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        share = self._shares(t)
        at = self.base.cdf(sde, t) * len(share)
        k = at.long().clamp_max(len(share) - 1)
        return (share.cumsum(0) - share)[k] + (at - k) * share[k]

    @checked
    def density(self, sde: SDE, t: Tensor) -> Tensor:
        return self.base.density(sde, t) * len(self.moment) * self._shares(t)[self._bin(sde, t)]

    @torch.no_grad()
    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        """Update the running means from losses p(t) w(t) e (B,) at times (B,); a loss that is not finite is ignored."""
        base = self.base.density(sde, t) * (sde.T - sde.t_min)  # 1 if `base` is uniform
        k, square = self._bin(sde, t), (loss.detach() / base).to(self.moment) ** 2
        finite = square.isfinite()
        zero = torch.zeros_like(self.moment)
        count = zero.index_add(0, k, finite.to(zero))
        mean = zero.index_add(0, k, square.where(finite, 0.0)) / count.clamp_min(1)
        updated = torch.where(self.count > 0, self.memory * self.moment + (1 - self.memory) * mean, mean)
        self.moment.copy_(torch.where(count > 0, updated, self.moment))
        self.count.add_(count)

    def _shares(self, like: Tensor) -> Tensor:
        share = self.shares().to(like)
        return share / share.sum()

    def _bin(self, sde: SDE, t: Tensor) -> Tensor:
        K = len(self.moment)
        return (self.base.cdf(sde, t) * K).long().clamp(0, K - 1)


@checked
@dataclass(frozen=True)
class Stratified(Times):
    r"""Stratified times: one draw in each of N equal shares of a density, for less variance without bias.

    .. math:: t_j = F^{-1}\big((U + j/N) \bmod 1\big), \qquad j = 0 \dots N - 1, \quad U \sim U(0, 1)

    Each t_j has density p, and each of N shares of equal probability contains exactly one t_j.

    Arguments:
        base: Density p.
        total: Number N of rows in the whole batch, over all processes. By default that of the :class:`Draws`, which the
            trainer sets; else the number of rows drawn.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), arXiv:2107.00630
    """

    base: Times = field(default_factory=Uniform)
    total: int | None = None

    def __post_init__(self) -> None:
        if self.total is not None:
            check.integer("total", self.total, at_least=1)

    @checked
    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        return self.base.icdf(sde, u)

    @checked
    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        return self.base.cdf(sde, t)

    @checked
    def density(self, sde: SDE, t: Tensor) -> Tensor:
        return self.base.density(sde, t)

    def uniforms(self, n: int, source: Source, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        first, total, shared = place(source, n, self.total)
        start = shared.uniform((1,), TIMES, dtype=dtype, device=device)
        return (start + (first + torch.arange(n, dtype=dtype, device=device)) / total) % 1.0

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        self.base.observe(sde, t, loss)


def _ndtr(z: Tensor) -> Tensor:
    out: Tensor = torch.special.ndtr(z)
    return out


def _ndtri(u: Tensor) -> Tensor:
    out: Tensor = torch.special.ndtri(u)
    return out


def _normal_pdf(z: Tensor) -> Tensor:
    return (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)


def _times_of_lam(sde: SDE, lam: Tensor) -> Tensor:
    """Times of given λ, clamped to [t_min, T] against rounding."""
    return sde.inverse_lam(lam.clamp(sde.lam(sde.T), sde.lam(sde.t_min))).clamp(sde.t_min, sde.T)


def _speed(sde: SDE, t: Tensor) -> Tensor:
    """|dλ/dt| = σ̇/σ − α̇/α."""
    return sde.sigma_dot(t) / sde.sigma(t) - sde.alpha_dot(t) / sde.alpha(t)
