r"""Discrete-time processes of DDPM and latent diffusion, given by a list of β and extended to continuous time.

Time is the DDPM step, t = 0 … N: x_0 is data, and x_t for t = 1 … N has :math:`\bar\alpha_t = \prod_{s\le
t}(1-\beta_s)`. Between steps log ᾱ is linear, which is the SDE with β(t) = −log(1 − β_i) on step i. Network labels
count from 0: the label of step t is t − 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.processes.sde import SDE, TimeT


@checked
def betas(
    kind: str,
    N: int = 1000,
    *,
    beta_start: float | None = None,
    beta_end: float | None = None,
    s: float = 0.008,
    max_beta: float = 0.999,
) -> Tensor:
    r"""Compute N noise rates β_1 … β_N, a float64 tensor (N,).

    ==============  ==================================================================  ==================
    kind            β_i, with u = (i − 1)/(N − 1)                                       default ends
    ==============  ==================================================================  ==================
    linear          β_start + u (β_end − β_start)                                       1e-4, 0.02
    quadratic       (√β_start + u (√β_end − √β_start))²                                 1e-4, 0.02
    scaled_linear   the same formula, as latent diffusion names it                      0.00085, 0.012
    sigmoid         β_start + (β_end − β_start) / (1 + exp(6 − 12 u))                   1e-4, 0.02
    cosine          min(1 − ᾱ_i/ᾱ_{i−1}, max_beta), ᾱ_i ∝ cos²(π/2 (i/N + s)/(1 + s))   none
    ==============  ==================================================================  ==================

    Arguments:
        kind: Schedule, a name of the table.
        N: Number of steps, default 1000.
        beta_start: First β, by default that of the table; not for ``"cosine"``.
        beta_end: Last β, by default that of the table; not for ``"cosine"``.
        s: Offset of ``"cosine"``, default 0.008.
        max_beta: Largest β of ``"cosine"``, default 0.999; without it the last β is 1.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
        | Improved Denoising Diffusion Probabilistic Models (Nichol & Dhariwal, 2021), arXiv:2102.09672
        | High-Resolution Image Synthesis with Latent Diffusion Models (Rombach et al., 2022), arXiv:2112.10752
    """
    check.choice("kind", kind, ("linear", "quadratic", "scaled_linear", "sigmoid", "cosine"))
    check.integer("N", N, at_least=1)
    check.number("s", s, above=0)
    check.number("max_beta", max_beta, above=0, at_most=1)
    if kind == "cosine":
        if beta_start is not None or beta_end is not None:
            raise ValueError("`beta_start` and `beta_end` have no meaning for kind='cosine'; drop them, and use `s`.")
        rate = math.pi / 2 / (1 + s)
        i = torch.arange(1, N + 1, dtype=torch.float64)
        # 1 − cos²a/cos²b = sin(a − b) sin(a + b) / cos²b avoids cancellation.
        a, b = rate * (i / N + s), rate * ((i - 1) / N + s)
        beta = (rate * torch.ones_like(i) / N).sin() * (a + b).sin() / b.cos() ** 2
        return beta.clamp_max(max_beta)
    ends = (0.00085, 0.012) if kind == "scaled_linear" else (1e-4, 0.02)
    first = check.number("beta_start", ends[0] if beta_start is None else beta_start, above=0, at_most=1)
    last = check.number("beta_end", ends[1] if beta_end is None else beta_end, above=0, at_most=1)
    if kind == "linear":
        return torch.linspace(first, last, N, dtype=torch.float64)
    if kind == "sigmoid":
        return first + (last - first) * torch.linspace(-6, 6, N, dtype=torch.float64).sigmoid()
    return torch.linspace(first**0.5, last**0.5, N, dtype=torch.float64) ** 2


@checked
def zero_terminal_snr(betas: Sequence[float] | Tensor) -> Tensor:
    r"""Rescale a β list to zero terminal signal: ᾱ_N = 0, and ᾱ_1 is unchanged.

    .. math:: \sqrt{\bar\alpha_t}' = (\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_N})
              \frac{\sqrt{\bar\alpha_1}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_N}}

    Arguments:
        betas: Noise rates β_1 … β_N, N ≥ 2.

    Returns:
        The new rates, a float64 tensor (N,) whose last entry is 1. A network for it predicts x0, v or the velocity.

    References:
        | Common Diffusion Noise Schedules and Sample Steps are Flawed (Lin et al., 2024), arXiv:2305.08891
    """
    beta = _beta_tensor(betas)
    if len(beta) < 2:
        raise ValueError("`betas` must have at least 2 entries, got 1; a list of one step cannot be rescaled.")
    root = (torch.log1p(-beta).cumsum(0) / 2).exp()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    ratio = root[1:] / root[:-1]
    return torch.cat([beta[:1], (1 - ratio) * (1 + ratio)])


def _beta_tensor(betas: Sequence[float] | Tensor) -> Tensor:
    beta = (
        betas.detach().cpu().double() if isinstance(betas, Tensor) else torch.as_tensor(np.asarray(betas, dtype=float))
    )
    if beta.ndim != 1 or len(beta) == 0:
        raise ValueError(f"`betas` must be a list of N numbers, got shape {tuple(beta.shape)}.")
    if len(beta) > 2 and 0.9 < beta[0] <= 1 and bool((beta.diff() < 0).all()):
        raise ValueError(
            f"`betas` must be noise rates, got numbers that fall from {beta[0]:g} to {beta[-1]:g}: these look like "
            f"alphas_cumprod; betas are 1 - ratios, 1 - torch.cat([a[:1], a[1:] / a[:-1]])."
        )
    bad = ~((beta > 0) & (beta < 1))
    bad[-1] = not 0 < beta[-1] <= 1
    if bad.any():
        i = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"`betas` must lie in (0, 1), only the last may be 1, got betas[{i}] = {beta[i].item():g}; "
            f"the signal-to-noise ratio must decrease at every step."
        )
    return beta


@checked
@dataclass(frozen=True, repr=False)
class Discrete(SDE):
    r"""The process of a β list, extended to continuous time t ∈ [0, N].

    .. math:: \log\bar\alpha_t = \sum_{s\le t}\log(1-\beta_s), \quad \alpha_t = \sqrt{\bar\alpha_t}, \quad
              \sigma_t = \sqrt{1-\bar\alpha_t}

    The DDPM quantities for integer steps t = 1 … N are methods: :meth:`alpha_bar`, :meth:`beta`,
    :meth:`q_step`, :meth:`q_sample`, :meth:`posterior_mean`, :meth:`posterior_variance`. The last β may be 1 (zero
    terminal SNR); α is then linear on the last step.

    Arguments:
        betas: Noise rates β_1 … β_N, N numbers, from :func:`betas` or from a checkpoint.

    Example:
        >>> sde = Discrete(betas("linear", 1000))
        >>> sde.T, sde.index_of_t(sde.t_of_index(999))
        (1000.0, 999.0)

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
    """

    betas: tuple[float, ...]
    T: float = field(default=1.0, init=False)

    def __init__(self, betas: Sequence[float] | Tensor, *, t_min: float = 0.0) -> None:
        beta = _beta_tensor(betas)
        table = torch.cat([beta.new_zeros(1), torch.log1p(-beta).cumsum(0) / 2])
        object.__setattr__(self, "betas", tuple(beta.tolist()))
        object.__setattr__(self, "T", float(len(beta)))
        object.__setattr__(self, "t_min", t_min)
        object.__setattr__(self, "_log_alphas", table)
        self.__post_init__()

    _log_alphas: Tensor = field(init=False, repr=False, compare=False)

    def __repr__(self) -> str:
        return f"Discrete(<{self.N} betas from {self.betas[0]:g} to {self.betas[-1]:g}>, t_min={self.t_min:g})"

    @property
    def N(self) -> int:
        """Number of steps."""
        return len(self.betas)

    def _default_t_min(self) -> float:
        return 1.0 if self.N > 1 else 0.5

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        table = self._log_alphas.to(t)
        i = t.detach().floor().long().clamp(0, self.N - 1)
        return t - i, table.take(i), table.take(i + 1)

    def _log_alpha(self, t: Tensor) -> Tensor:
        w, left, right = self._cell(t)
        if math.isinf(self._log_alphas[-1]):
            last = right == -math.inf
            return torch.where(last, left + torch.log1p(-w), left + w * (torch.where(last, left, right) - left))
        return left + w * (right - left)

    def _sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def _f(self, t: Tensor) -> Tensor:
        w, left, right = self._cell(t)
        return torch.where(right == -math.inf, -1 / (1 - w), right - left)

    def _g2(self, t: Tensor) -> Tensor:
        return -2 * self._f(t)

    def _alpha_dot(self, t: Tensor) -> Tensor:
        _, left, right = self._cell(t)
        last = right == -math.inf
        return torch.where(last, -left.exp(), torch.where(last, left, right - left) * self._alpha(t))

    def _sigma_dot(self, t: Tensor) -> Tensor:
        return -self._alpha(t) * self._alpha_dot(t) / self._sigma(t)

    def inverse_lam(self, lam: Tensor) -> Tensor:
        return self._t_of_log_alpha(-torch.logaddexp(-2 * lam, torch.zeros_like(lam)) / 2)

    def _t_of_sigma(self, sigma: Tensor) -> Tensor:
        return self._t_of_log_alpha(torch.log1p(-(sigma**2)) / 2)

    def _t_of_log_alpha(self, log_alpha: Tensor) -> Tensor:
        table = self._log_alphas.to(log_alpha)
        i = (torch.searchsorted(-table, -log_alpha.detach().contiguous(), right=True) - 1).clamp(0, self.N - 1)
        left, right = table.take(i), table.take(i + 1)
        last = right == -math.inf
        slope = torch.where(last, -torch.ones_like(left), right - left)
        return i + torch.where(last, -torch.expm1(log_alpha - left), (log_alpha - left) / slope)

    # Network labels.

    def t_of_index(self, index: int | Tensor) -> float | Tensor:
        """Time of the network label `index`, 0 … N − 1; equal to index + 1."""
        if isinstance(index, Tensor):
            if index.dtype.is_floating_point or index.is_complex():
                raise TypeError(f"`index` must be an integer tensor, got {str(index.dtype)[6:]}.")
            if index.device.type == "cpu" and bool(((index < 0) | (index >= self.N)).any()):
                raise ValueError(f"`index` must lie in 0 … {self.N - 1}, got {index.min()} … {index.max()}.")
            return (index + 1).to(torch.float32)
        if check.integer("index", index) >= self.N:
            raise ValueError(f"`index` must lie in 0 … {self.N - 1}, got {index}.")
        return float(index + 1)

    def index_of_t(self, t: TimeT) -> TimeT:
        """Network label t − 1 of time t; fractional between steps, and 0 for t < 1."""
        return self._at(self._index, t)

    def _index(self, t: Tensor) -> Tensor:
        return (t - 1).clamp_min(0)

    # DDPM quantities at integer steps t = 1 … N.

    def _step(self, t: int | Tensor) -> int | Tensor:
        first = 1
        if isinstance(t, Tensor):
            if t.dtype.is_floating_point or t.is_complex() or t.dtype == torch.bool or t.ndim > 1:
                raise TypeError(f"`t` must be an integer or an integer tensor of shape () or (B,), got {t.dtype}.")
            if t.device.type == "cpu" and bool(((t < first) | (t > self.N)).any()):
                raise ValueError(f"`t` must be a step in 1 … {self.N} (label + 1), got {t.min()} … {t.max()}.")
            return t
        if check.integer("t", t) > self.N or t < first:
            raise ValueError(f"`t` must be a step in 1 … {self.N} (label + 1), got {t}.")
        return t

    def _eval(self, t: int | Tensor, formula: Callable[[Tensor, Tensor], Tensor]) -> float | Tensor:
        """Evaluate a formula of (log ᾱ_t, log ᾱ_{t−1}) in float64."""
        step = self._step(t)
        i = step.cpu().long() if isinstance(step, Tensor) else torch.tensor(step)
        out = formula(2 * self._log_alphas[i], 2 * self._log_alphas[i - 1])
        if not isinstance(step, Tensor):
            return float(out)
        return out if step.device.type == "cpu" else out.to(torch.float32).to(step.device)

    def alpha_bar(self, t: int | Tensor) -> float | Tensor:
        r"""ᾱ_t = ∏_{s ≤ t} (1 − β_s), for a step t in 1 … N, an integer or an integer tensor (B,)."""
        return self._eval(t, lambda now, before: now.exp())

    def beta(self, t: int | Tensor) -> float | Tensor:
        """Noise rate β_t."""
        return self._eval(t, lambda now, before: -torch.expm1(now - before))

    def posterior_variance(self, t: int | Tensor) -> float | Tensor:
        r"""Variance of q(x_{t−1} | x_t, x_0).

        .. math:: \tilde\beta_t = \frac{1-\bar\alpha_{t-1}}{1-\bar\alpha_t}\beta_t
        """
        return self._eval(t, lambda now, before: torch.expm1(before) / torch.expm1(now) * -torch.expm1(now - before))

    def posterior_mean(self, x_t: Tensor, x0: Tensor, t: int | Tensor) -> Tensor:
        r"""Mean of q(x_{t−1} | x_t, x_0).

        .. math:: \tilde\mu_t = \frac{\sqrt{\bar\alpha_{t-1}}\,\beta_t}{1-\bar\alpha_t} x_0
                  + \frac{\sqrt{1-\beta_t}\,(1-\bar\alpha_{t-1})}{1-\bar\alpha_t} x_t

        Arguments:
            x_t: State, (B, *event).
            x0: Data, the shape of `x_t`.
            t: Step in 1 … N, an integer or an integer tensor (B,).
        """
        check.match("x0", x0, "x_t", check.state("x_t", x_t))
        of_x0 = self._eval(t, lambda now, before: (before / 2).exp() * torch.expm1(now - before) / torch.expm1(now))
        of_xt = self._eval(t, lambda now, before: ((now - before) / 2).exp() * torch.expm1(before) / torch.expm1(now))
        return check.expand(of_x0, x_t) * x0 + check.expand(of_xt, x_t) * x_t

    def q_step(self, x: Tensor, t: int | Tensor, eps: Tensor | None = None) -> Tensor:
        r"""Sample x_t from x_{t−1}: :math:`x_t = \sqrt{1-\beta_t}\,x_{t-1} + \sqrt{\beta_t}\,\varepsilon`.

        Arguments:
            x: State x_{t−1}, (B, *event).
            t: Step in 1 … N, an integer or an integer tensor (B,).
            eps: Standard normal noise, the shape of `x`; by default drawn from torch's global generator.
        """
        return self._add_noise("x", x, t, eps, lambda now, before: now - before)

    def q_sample(self, x0: Tensor, t: int | Tensor, eps: Tensor | None = None) -> Tensor:
        r"""Sample x_t from x_0: :math:`x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\varepsilon`.

        Arguments:
            x0: Data, (B, *event).
            t: Step in 1 … N, an integer or an integer tensor (B,).
            eps: Standard normal noise, the shape of `x0`; by default drawn from torch's global generator.
        """
        return self._add_noise("x0", x0, t, eps, lambda now, before: now)

    def _add_noise(
        self,
        name: str,
        x: Tensor,
        t: int | Tensor,
        eps: Tensor | None,
        log_signal: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        check.state(name, x)
        eps = torch.randn_like(x) if eps is None else check.match("eps", eps, name, x)
        scale = self._eval(t, lambda now, before: (log_signal(now, before) / 2).exp())
        std = self._eval(t, lambda now, before: (-torch.expm1(log_signal(now, before))).sqrt())
        return check.expand(scale, x) * x + check.expand(std, x) * eps
