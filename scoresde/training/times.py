r"""At which times to train: densities on [t_min, T] that can be drawn from and evaluated.

A density is three functions: its quantiles t = ``icdf(sde, u)``, their inverse u = ``cdf(sde, t)``, and p(t) =
``density(sde, t)``. Drawing is one line of that, so what couples the draws of a batch (:class:`Stratified`) goes with
any density. A new one is a subclass that writes the three.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde.noise import Noise
from scoresde.sde import SDE
from scoresde.training.draws import TIMES, Source, place, source_of


class Times:
    """A density of times; a subclass writes :meth:`icdf`, :meth:`cdf` and :meth:`density`."""

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile: the time below which a share u, (B,) in [0, 1], of the draws lies."""
        raise NotImplementedError(f"{type(self).__name__} must define `icdf(sde, u)`.")

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the draws below t, (B,)."""
        raise NotImplementedError(f"{type(self).__name__} must define `cdf(sde, t)`.")

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """p(t), (B,); it integrates to 1 over [t_min, T]."""
        raise NotImplementedError(f"{type(self).__name__} must define `density(sde, t)`.")

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
            sde: The process.
            n: How many.
            noise: None (torch's global generator), a seed, a :class:`Noise` or a source.
            dtype: float32 or float64.
            device: Where.
        """
        u = self.uniforms(n, source_of(noise), dtype, device)
        return self.icdf(sde, u)

    def uniforms(self, n: int, source: Source, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The n uniform numbers that draws are made of; independent here."""
        return source.uniform((n,), TIMES, dtype=dtype, device=device)

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        """Hear the losses (B,) of samples at times (B,); for densities that learn, nothing here."""


class _OfTime(Times):
    """A density of the share of time τ = (t − t_min)/(T − t_min); a subclass writes it on [0, 1]."""

    def _icdf(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def _cdf(self, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def _density(self, tau: Tensor) -> Tensor:
        raise NotImplementedError

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile."""
        return (sde.t_min + (sde.T - sde.t_min) * self._icdf(u)).clamp(sde.t_min, sde.T)

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the draws below t."""
        return self._cdf(self._tau(sde, t))

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """p(t)."""
        return self._density(self._tau(sde, t)) / (sde.T - sde.t_min)

    @staticmethod
    def _tau(sde: SDE, t: Tensor) -> Tensor:
        return ((t - sde.t_min) / (sde.T - sde.t_min)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class Uniform(_OfTime):
    """Even on [t_min, T]."""

    def _icdf(self, u: Tensor) -> Tensor:
        return u

    def _cdf(self, tau: Tensor) -> Tensor:
        return tau

    def _density(self, tau: Tensor) -> Tensor:
        return torch.ones_like(tau)


@dataclass(frozen=True)
class Steps(Times):
    """Even on the N times T/N, 2T/N, …, T: the steps of a discrete process.

    Arguments:
        N: How many; that of a :class:`Discrete` process trains it as its paper does.
    """

    N: int

    def __post_init__(self) -> None:
        check.integer("N", self.N, least=1)

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile: the end of the step in which u T lies."""
        return ((u * self.N).floor() + 1).clamp_max(self.N) * (sde.T / self.N)

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the draws at or below t."""
        return (t * (self.N / sde.T)).round() / self.N

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """N/T times the probability of a step, to stand beside the density of another set of `N` steps."""
        return torch.full_like(t, 1 / sde.T)


@dataclass(frozen=True)
class LogitNormal(_OfTime):
    r"""logit τ is normal: the middle of the process more often than its ends.

    .. math:: \tau = \mathrm{sigmoid}(m + s z), \quad z \sim N(0, 1)

    Arguments:
        mean: m; above 0 for more noise.
        std: s.

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


@dataclass(frozen=True)
class Mode(_OfTime):
    r"""More of the middle (scale > 0) or of the ends (scale < 0), with a density that is positive everywhere.

    .. math:: \tau = u + s\,(u - \sin^2\tfrac{\pi u}{2})

    Arguments:
        scale: s, in (−1, 2/(π − 2)).

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


@dataclass(frozen=True)
class CosineTimes(_OfTime):
    r"""The signal-to-noise ratios of a cosine schedule, on straight lines.

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


@dataclass(frozen=True)
class LogNormalSigma(Times):
    r"""log(σ/α) is normal, cut off at t_min and T: EDM's, for any process.

    .. math:: \log\frac{\sigma_t}{\alpha_t} = P_{mean} + P_{std}\,z, \quad z \sim N(0, 1)

    On :class:`Flow` this is :class:`LogitNormal`, but for the cut.

    Arguments:
        P_mean: Mean of log(σ/α): −1.2 for images of 32 and 64 pixels and a standard deviation of 0.5.
        P_std: Its standard deviation.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """

    P_mean: float = -1.2
    P_std: float = 1.2

    def __post_init__(self) -> None:
        check.number("P_mean", self.P_mean)
        check.number("P_std", self.P_std, above=0)

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile."""
        low, high = self._ends(sde)
        share = low + u * (high - low)
        lam = -(self.P_mean + self.P_std * _ndtri(share))
        return _at(sde, lam)

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the draws below t."""
        low, high = self._ends(sde)
        return (_ndtr(self._z(sde, t)) - low) / (high - low)

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """p(t)."""
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
                f"`P_mean`={self.P_mean}, `P_std`={self.P_std} puts nothing in the reach of {type(sde).__name__}, "
                f"log(σ/α) in [{-sde.lam(sde.t_min):.3g}, {-sde.lam(sde.T):.3g}]."
            )
        return ends


@dataclass(frozen=True)
class LikelihoodImportance(Times):
    r"""For the likelihood weighting: in proportion to what Gaussian data would lose, so that times add no variance.

    .. math:: p(t) \propto \frac{g^2}{\sigma^2}\,\frac{\alpha^2 s^2}{\alpha^2 s^2 + \sigma^2}

    The second factor is the least error of ε for Gaussian data of standard deviation s. Without it (s = ∞) this is the
    density of Song et al., even in λ, which exists where α(T) > 0 only. Give it as the `proposal` of a :class:`DSM`.

    Arguments:
        data_std: s.

    References:
        | Maximum Likelihood Training of Score-Based Diffusion Models (Song et al., 2021), arXiv:2101.09258
    """

    data_std: float = 1.0

    def __post_init__(self) -> None:
        if self.data_std != math.inf:
            check.number("data_std", self.data_std, above=0)

    # With Λ = 2(λ + log s): p dt ∝ sigmoid(Λ) dΛ, whose integral is softplus.

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile."""
        low, high = self._ends(sde)
        area = high - u * (high - low)
        if self.data_std == math.inf:
            lam = area
        else:
            lam = (area + torch.log(-torch.expm1(-area))) / 2 - math.log(self.data_std)
        return _at(sde, lam)

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the draws below t."""
        low, high = self._ends(sde)
        return (high - self._area(sde.lam(t))) / (high - low)

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """p(t)."""
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
                f"`data_std`=inf is even in λ, and {type(sde).__name__} has λ(T) = −∞; give the data's standard "
                f"deviation."
            )
        low, high = (float(self._area(torch.tensor(sde.lam(t), dtype=torch.float64))) for t in (sde.T, sde.t_min))
        return low, high


class LossAware(nn.Module, Times):
    r"""Times in proportion to the losses seen there, for the least variance of the gradient; a `proposal`.

    .. math:: q_k \propto (1 - m)\sqrt{E[\ell^2 \mid k]} + m, \qquad k = 1 \dots K

    on K bins of equal share under `base`; even until each bin has been seen `warmup` times. What it has learned is in
    its state_dict. Across processes DDP keeps that of the first.

    Arguments:
        base: The density whose bins are reweighted.
        bins: K.
        mix: m, the share that is spread evenly.
        memory: Weight of the past in the running mean, at each batch.
        warmup: Samples in every bin before anything is reweighted.

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
        self.mix = check.number("mix", mix, above=0, most=1)
        self.memory = check.number("memory", memory, least=0, below=1)
        self.warmup = check.integer("warmup", warmup, least=1)
        self.register_buffer("moment", torch.zeros(check.integer("bins", bins, least=2)))
        self.register_buffer("count", torch.zeros(bins))

    def shares(self) -> Tensor:
        """Probability of each bin, (K,)."""
        root = self.moment.sqrt()
        even = torch.full_like(root, 1 / len(root))
        learned = (1 - self.mix) * root / root.sum().clamp_min(torch.finfo(root.dtype).tiny) + self.mix * even
        ready = (self.count >= self.warmup).all() & (root.sum() > 0)
        return torch.where(ready, learned, even)

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile."""
        share = self._shares(u)
        edge = share.cumsum(0)
        k = torch.searchsorted(edge, u.contiguous(), right=True).clamp_max(len(share) - 1)
        inside = ((u - (edge[k] - share[k])) / share[k]).clamp(0, 1)
        return self.base.icdf(sde, (k + inside) / len(share))

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the draws below t."""
        share = self._shares(t)
        at = self.base.cdf(sde, t) * len(share)
        k = at.long().clamp_max(len(share) - 1)
        return (share.cumsum(0) - share)[k] + (at - k) * share[k]

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """p(t)."""
        return self.base.density(sde, t) * len(self.moment) * self._shares(t)[self._bin(sde, t)]

    @torch.no_grad()
    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        """Take in the losses (B,) of samples at times (B,); losses that are not finite are passed over."""
        k, square = self._bin(sde, t), loss.detach().to(self.moment) ** 2
        fine = square.isfinite()
        zero = torch.zeros_like(self.moment)
        seen = zero.index_add(0, k, fine.to(zero))
        mean = zero.index_add(0, k, square.where(fine, 0.0)) / seen.clamp_min(1)
        moved = torch.where(self.count > 0, self.memory * self.moment + (1 - self.memory) * mean, mean)
        self.moment.copy_(torch.where(seen > 0, moved, self.moment))
        self.count.add_(seen)

    def _shares(self, like: Tensor) -> Tensor:
        share = self.shares().to(like)
        return share / share.sum()

    def _bin(self, sde: SDE, t: Tensor) -> Tensor:
        K = len(self.moment)
        return (self.base.cdf(sde, t) * K).long().clamp(0, K - 1)


@dataclass(frozen=True)
class Stratified(Times):
    r"""Spread the times of a batch evenly over a density: low discrepancy, less variance, no bias.

    .. math:: t_j = F^{-1}\big((U + j/N) \bmod 1\big), \qquad j = 0 \dots N - 1, \quad U \sim U(0, 1)

    Every t_j alone has density p, and each of N equal shares holds exactly one. Where the noise knows the place of its
    rows in a batch that is spread over processes (:class:`Draws`, as the trainer gives), N is the whole batch.

    Arguments:
        base: The density.
        total: N, where the noise does not know it; by default the rows at hand.

    References:
        | Variational Diffusion Models (Kingma et al., 2021), arXiv:2107.00630
    """

    base: Times = field(default_factory=Uniform)
    total: int | None = None

    def icdf(self, sde: SDE, u: Tensor) -> Tensor:
        """Quantile of the base."""
        return self.base.icdf(sde, u)

    def cdf(self, sde: SDE, t: Tensor) -> Tensor:
        """Share of the base's draws below t."""
        return self.base.cdf(sde, t)

    def density(self, sde: SDE, t: Tensor) -> Tensor:
        """p(t) of the base."""
        return self.base.density(sde, t)

    def uniforms(self, n: int, source: Source, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """The n uniform numbers that draws are made of; even here."""
        first, total, shared = place(source, n, self.total)
        start = shared.uniform((1,), TIMES, dtype=dtype, device=device)
        return (start + (first + torch.arange(n, dtype=dtype, device=device)) / total) % 1.0

    def observe(self, sde: SDE, t: Tensor, loss: Tensor) -> None:
        """Tell the base."""
        self.base.observe(sde, t, loss)


def _ndtr(z: Tensor) -> Tensor:
    out: Tensor = torch.special.ndtr(z)
    return out


def _ndtri(u: Tensor) -> Tensor:
    out: Tensor = torch.special.ndtri(u)
    return out


def _normal_pdf(z: Tensor) -> Tensor:
    return (-(z**2) / 2).exp() / math.sqrt(2 * math.pi)


def _at(sde: SDE, lam: Tensor) -> Tensor:
    """Times of λ, whose rounding stays inside [t_min, T]."""
    return sde._t_of_lam(lam.clamp(sde.lam(sde.T), sde.lam(sde.t_min))).clamp(sde.t_min, sde.T)


def _speed(sde: SDE, t: Tensor) -> Tensor:
    """|dλ/dt| = σ̇/σ − α̇/α."""
    return sde.sigma_dot(t) / sde.sigma(t) - sde.alpha_dot(t) / sde.alpha(t)
