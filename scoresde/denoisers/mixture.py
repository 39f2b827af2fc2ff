r"""Exact denoisers of Gaussian mixtures and of finite data sets.

If the data is a Gaussian mixture, every marginal is one:
:math:`p_t = \sum_k w_k N(\alpha\mu_k, \alpha^2 C_k + \sigma^2 I)`. Score, posterior mean, density and samples have
closed forms at any (α, σ). A finite data set is the case C = 0. Both classes can replace a trained denoiser.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, Condition, Kind, undefined_prediction
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.predictions import Coefficient, Want, as_form
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE

Numbers = float | Tensor | Sequence["Numbers"]  # a number, a tensor, or nested lists of numbers

_LARGEST = 1024  # largest number of dimensions whose covariance is computed

_CHUNK = 1 << 18  # largest number of entries of a temporary tensor of differences


def squared_distances(x: Tensor, centres: Tensor, alpha: float | Tensor = 1.0) -> Tensor:
    r"""Squared distances :math:`|x_b - \alpha_b\mu_k|^2`, (B, D) and (K, D) to (B, K).

    The code squares differences and does not expand the square, which loses digits for close points far from 0.
    """
    if isinstance(alpha, Tensor) and alpha.ndim == 1:
        alpha = alpha[:, None, None]
    step = _components_at_once(x)
    parts = [(x[:, None] - alpha * centres[k : k + step]).square().sum(-1) for k in range(0, len(centres), step)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _components_at_once(x: Tensor) -> int:
    """Number of components per chunk; on a CPU a chunk of differences fits in the cache."""
    return max(1, (_CHUNK if x.device.type == "cpu" else _CHUNK << 8) // max(1, x.numel()))


class _Exact(AbstractDenoiser):
    """A denoiser with a density; a subclass sets ``_points`` (K, D) and ``event``."""

    _points: Tensor
    event: tuple[int, ...]

    _parts: str

    def extra_repr(self) -> str:
        return f"{len(self._points)} {self._parts}, event={self.event}, sde={self.sde}"

    @property
    def kind(self) -> Kind:
        return Kind("x0", self.sde, exact=True)

    def log_prob(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Log-density of the marginal at time `t` in nats, (B, *event) to (B,)."""
        raise NotImplementedError

    def _rows(self, x: Tensor) -> Tensor:
        check.state("x", x)
        if tuple(x.shape[1:]) != self.event:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, self.event))}), got {tuple(x.shape)}.")
        return x.flatten(1).to(self._points.dtype)

    def _time(self, t: float | Tensor, rows: int) -> float | Tensor:
        """Time as a number or as a tensor, () or (B,), of the dtype in which the denoiser computes."""
        if not isinstance(t, Tensor):
            return t
        s = check.real("t", t).to(self._points)
        if s.ndim == 1:
            check.expand(s, self._points.new_empty(rows, 1))
        return s

    def _scales(self, t: float | Tensor, rows: int) -> tuple[Coefficient, Coefficient]:
        """α and σ as numbers or tensors, () or (B, 1)."""
        s = self._time(t, rows)
        return _column(self.sde.alpha(s)), _column(self.sde.sigma(s))


@checked
class GaussianMixture(_Exact):
    r"""Exact denoiser of data from a mixture of Gaussians.

    .. math::
        p_t(x) = \sum_k w_k N(x; \alpha\mu_k, \alpha^2 C_k + \sigma^2 I), \qquad
        \nabla\log p_t = -\sum_k r_k(x)\,(\alpha^2 C_k + \sigma^2 I)^{-1}(x - \alpha\mu_k)

    Give the covariances by `std`, by `cov`, or by `factor` with an optional `std`. The module stores them as
    :math:`C_k = s_k^2 I + U_k \mathrm{diag}(l_k) U_k^T`. It computes in float64 unless it is cast with ``.to(dtype)``.

    Arguments:
        sde: Noising process.
        means: Means μ_k, (K, *event).
        weights: Weights w_k, (K,), positive; normalised to sum 1. Default: equal weights.
        std: Standard deviations, a number, (K,), or (K, *event) for one per entry.
        cov: Full covariances, (K, D, D) with D the size of an event.
        factor: Low-rank factors F_k, (K, D, r), of C_k = F_k F_kᵀ + std² I; `std` is a number or (K,), default 0.

    Example:
        >>> import torch, scoresde as ss
        >>> ring = torch.polar(torch.tensor(2.0), torch.arange(8) * torch.pi / 4)
        >>> mix = ss.GaussianMixture(ss.VP(), torch.view_as_real(ring), std=0.1)
        >>> x = mix.sample(5, t=0.5, seed=0)
        >>> mix.score(x, 0.5).shape, mix.log_prob(x, 0.5).shape
        (torch.Size([5, 2]), torch.Size([5]))
    """

    _parts = "components"

    _weights: Tensor
    isotropic: Tensor
    spectrum: Tensor
    axes: Tensor | None

    def __init__(
        self,
        sde: SDE,
        means: Numbers,
        *,
        weights: Tensor | Sequence[float] | None = None,
        std: Numbers | None = None,
        cov: Numbers | None = None,
        factor: Numbers | None = None,
    ) -> None:
        super().__init__(sde)
        mu = _float64("means", means)
        if mu.ndim < 2 or mu.numel() == 0:
            raise ValueError(f"`means` must have shape (K, *event), got {tuple(mu.shape)}; for scalar data use (K, 1).")
        self.event = tuple(mu.shape[1:])
        mu = mu.flatten(1)
        K, D = mu.shape
        w = torch.ones(K, dtype=mu.dtype) if weights is None else _float64("weights", weights)
        if w.shape != (K,) or bool((w <= 0).any()):
            raise ValueError(f"`weights` must be {K} positive numbers, one for each mean, got {w.tolist()}.")
        if (std is None) == (cov is None) and factor is None:
            raise ValueError("give the covariances in one way: `std`, `cov`, or `factor` with an optional `std`.")
        if factor is not None and cov is not None:
            raise ValueError("`cov` is the full covariance and excludes `factor`; drop `factor`.")
        iso, variances, basis = _eigen(K, D, self.event, std, cov, factor)
        self.register_buffer("_points", mu)
        self.register_buffer("_weights", (w / w.sum()).log())
        self.register_buffer("isotropic", iso)
        self.register_buffer("spectrum", variances)
        self.register_buffer("axes", basis)

    @property
    def means(self) -> Tensor:
        """Means μ_k, (K, *event)."""
        return self._points.reshape(-1, *self.event)

    @property
    def gaussian(self) -> Gaussian | None:
        """Gaussian with the mean and the covariance of the data; None above 1,024 dimensions."""
        if self._points.shape[1] > _LARGEST:
            return None
        return self._cached("gaussian", lambda: Gaussian.of(self.sde, self.mean(), self.covariance()))

    @property
    def weights(self) -> Tensor:
        """Weights w_k, (K,)."""
        return self._weights.exp()

    @checked
    def under(self, sde: SDE) -> GaussianMixture:
        """The same data under another process."""
        copy = GaussianMixture.__new__(GaussianMixture)
        AbstractDenoiser.__init__(copy, sde)
        copy.event = self.event
        for name, buffer in self.named_buffers():
            copy.register_buffer(name, buffer)
        if self.axes is None:
            copy.register_buffer("axes", None)
        return copy

    @checked
    def component(self, k: int = 0) -> Gaussian:
        """Component k as a :class:`Gaussian`."""
        c, axes = self.isotropic[k] + self.spectrum[k], self.axes
        if axes is None:
            return Gaussian(self.sde, self.means[k], c.reshape(self.event))
        return Gaussian(self.sde, self.means[k], c, axes[k], rest=0.0 if self._full else float(self.isotropic[k]))

    def component_covariances(self) -> Tensor:
        """Covariances C_k, (K, D, D)."""
        K, D = self._points.shape
        eye = torch.eye(D).to(self._points)
        iso = self.isotropic[:, None, None] * eye
        if self.axes is None:
            return iso + torch.diag_embed(self.spectrum)
        return iso + (self.axes * self.spectrum[:, None]) @ self.axes.mT

    def mean(self) -> Tensor:
        """Mean of the data, of shape event."""
        return (self.weights @ self._points).reshape(self.event)

    def covariance(self) -> Tensor:
        """Covariance of the data, (D, D)."""
        centred = self._points - self.weights @ self._points
        within = torch.einsum("k,kij->ij", self.weights, self.component_covariances())
        return within + (centred * self.weights[:, None]).mT @ centred

    def log_prob(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        return self._log_joint(x, t).logsumexp(1).to(x.dtype)

    def responsibilities(self, x: Tensor, t: float | Tensor = 0.0) -> Tensor:
        """Posterior probability of each component, (B, *event) to (B, K)."""
        return self._log_joint(x, t).softmax(1).to(x.dtype)

    @checked
    def sample(
        self, n: int, t: float = 0.0, *, seed: int | Noise | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Exact samples of the marginal at time `t`, (n, *event).

        Arguments:
            n: Number of samples.
            t: Time; 0 gives data.
            seed: Seed, a :class:`Noise`, or None for a random seed. Sample i depends on the seed and i alone.
            dtype: Dtype of the samples, float32 or float64.
        """
        check.integer("n", n)
        check.dtype("dtype", dtype)
        noise = as_noise(seed).fork(Stream.MIXTURE)
        K, D = self._points.shape
        like: dict[str, Any] = {"dtype": self._points.dtype, "device": self._points.device}
        u = noise.uniform((n, 1), 0, dtype=torch.float64, device=self._points.device)
        k = torch.searchsorted(self.weights.cumsum(0)[:-1].contiguous(), u[:, 0].to(self._points.dtype))
        x = self._points[k] + self.isotropic[k, None].sqrt() * noise.normal((n, D), 1, **like)
        z = self.spectrum[k].sqrt() * noise.normal((n, self.spectrum.shape[1]), 2, **like)
        x = x + (z if self.axes is None else _per_component(z, self.axes.mT, k))
        alpha, sigma = self.sde.alpha(t), self.sde.sigma(t)
        x = alpha * x + sigma * noise.normal((n, D), 3, **like)
        return x.reshape(n, *self.event).to(dtype)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self.predict("x0", x, t, **cond)

    def score(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r"""Score, :math:`\nabla_x\log p_t(x)`, also at t = 0 if the data has a density."""
        return self._blend(x, *self._scales(t, len(check.state("x", x))), 0.0, -1.0)

    @checked
    def flow(self, x: Tensor, s: float, t: float) -> Tensor:
        r"""Exact probability flow of a mixture with one component, from time s to t.

        .. math:: x_t = \alpha_t\mu + U \sqrt{\frac{\alpha_t^2\Lambda + \sigma_t^2}{\alpha_s^2\Lambda + \sigma_s^2}}
                  U^T (x_s - \alpha_s\mu)

        Arguments:
            x: State at time `s`, (B, *event).
            s: Initial time.
            t: Target time.
        """
        if len(self._points) != 1:
            raise ValueError(
                f"`flow` has a closed form only for 1 component, this mixture has {len(self._points)}; integrate the "
                f"probability-flow ODE on a fine grid instead."
            )
        check.number("s", s, at_least=0)
        (a, b), (c, d) = ((self.sde.alpha(r), self.sde.sigma(r)) for r in (s, t))
        iso, total = self.isotropic, self.isotropic + self.spectrum[0]
        centred = self._rows(x) - a * self._points
        side = ((c**2 * iso + d**2) / (a**2 * iso + b**2)).sqrt()
        along = ((c**2 * total + d**2) / (a**2 * total + b**2)).sqrt()
        if self.axes is None:
            moved = centred * along
        else:
            y = centred @ self.axes[0]
            rest = 0.0 if self._full else side * (centred - y @ self.axes[0].mT)
            moved = rest + (along * y) @ self.axes[0].mT
        return (c * self._points + moved).reshape(x.shape).to(x.dtype)

    def _log_joint(self, x: Tensor, t: float | Tensor) -> Tensor:
        return self._joint(self._rows(x), *self._scales(t, len(x)))[0]

    @property
    def _full(self) -> bool:
        """Whether the eigenvectors span the whole space."""
        return self.axes is None or self.axes.shape[1] == self.axes.shape[2]

    def _differences(self, x: Tensor, alpha: Coefficient) -> Iterator[tuple[slice, Tensor]]:
        """Differences x − αμ_k, (k, B, D), in chunks of components.

        Differences of squares or products would lose the directions of small variance to rounding.
        """
        step = _components_at_once(x)
        for k in range(0, len(self._points), step):
            part = slice(k, k + step)
            yield part, x - alpha * self._points[part, None]

    def _variances(self, part: slice, alpha: Coefficient, sigma: Coefficient) -> tuple[Tensor, Tensor]:
        """Variance of x orthogonal to the axes, (k, ·, 1), and along them, (k, ·, r); the dot is 1 or B."""
        floor = torch.finfo(self._points.dtype).tiny ** 0.75  # a square divided by this number is still finite
        iso = self.isotropic[part, None, None]
        side = (alpha**2 * iso + sigma**2).clamp_min(floor)
        along = (alpha**2 * (iso + self.spectrum[part, None]) + sigma**2).clamp_min(floor)
        return side, along

    def _joint(self, x: Tensor, alpha: Coefficient, sigma: Coefficient) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
        """Log of w_k N(x; αμ_k, α²C_k + σ²I), (B, K), and the coordinates U_kᵀ(x − αμ_k), (k, B, r), in chunks."""
        D = x.shape[1]
        logs, coordinates = [], []
        for part, d in self._differences(x, alpha):
            side, along = self._variances(part, alpha, sigma)
            y, rest = d, None
            if self.axes is not None:
                axes = self.axes[part]
                y = d @ axes
                if not self._full:
                    rest = torch.baddbmm(d, y, axes.mT, alpha=-1) if y.shape[2] else d
                if y.shape[2]:
                    coordinates.append((part, y))
            z = y * along.rsqrt()
            energy = torch.linalg.vecdot(z, z) + along.log().sum(-1)
            if rest is not None:
                energy = energy + torch.linalg.vecdot(rest, rest) / side[..., 0]
                energy = energy + (D - y.shape[2]) * side[..., 0].log()
            logs.append(self._weights[part, None] - 0.5 * (energy + D * math.log(2 * math.pi)))
        return torch.cat(logs).mT, coordinates

    def predict(self, want: Want, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        s = self._time(t, len(check.state("x", x)))
        alpha, sigma = self.sde.alpha(s), self.sde.sigma(s)
        try:
            form = as_form(want, self.sde, s, alpha, sigma)
            a, b = form.a / form.scale, 0.0 if want == "x0" else form.b * sigma / form.scale
        except ZeroDivisionError:
            raise undefined_prediction(t, alpha, sigma) from None
        if not isinstance(t, Tensor) and not math.isfinite(a + b):
            raise undefined_prediction(t, alpha, sigma)
        return self._blend(x, *map(_column, (alpha, sigma, a, b)))

    def _blend(self, x: Tensor, alpha: Coefficient, sigma: Coefficient, a: Coefficient, b: Coefficient) -> Tensor:
        """Sum a E[x_0 | x] + b E[ε | x] / σ = a E[x_0 | x] − b score; coefficients are numbers, () or (B, 1)."""
        rows = self._rows(x)
        joint, coordinates = self._joint(rows, alpha, sigma)
        r = joint.softmax(1)

        # The sum is a Σ_k r_k μ_k + Σ_k r_k M_k (x − αμ_k), where M_k has the eigenvectors of C_k. `gains` returns the
        # eigenvalues of M_k orthogonal to the axes and along them.
        def gains(part: slice) -> tuple[Tensor, Tensor]:
            side, along = self._variances(part, alpha, sigma)
            iso = self.isotropic[part, None, None]
            return (a * alpha * iso + b) / side, (a * alpha * (iso + self.spectrum[part, None]) + b) / along

        out: Tensor = a * (r @ self._points)
        of_data = isinstance(b, float) and b == 0
        if self.axes is None or not (self._full or of_data):
            for part, d in self._differences(rows, alpha):
                m_side, m_along = gains(part)
                d = d * (m_along if self.axes is None else m_side)
                # One component needs one kernel only.
                weight = r.mT[part, :, None]
                out = out.addcmul_(weight[0], d[0]) if len(d) == 1 else out.add_((weight * d).sum(0))
        elif not self._full:
            # The gains of E[x_0] are bounded, so a difference of sums is accurate.
            weight = r * gains(slice(None))[0][..., 0].mT
            out = out + weight.sum(1, keepdim=True) * rows - alpha * (weight @ self._points)
        for part, y in coordinates:
            assert self.axes is not None
            m_side, m_along = gains(part)
            z = r.mT[part, :, None] * (m_along if self._full else m_along - m_side) * y
            axes = self.axes[part].mT.reshape(-1, rows.shape[1])
            out = torch.addmm(out, z.transpose(0, 1).reshape(len(x), -1), axes)
        return out.reshape(x.shape).to(x.dtype)


@checked
class Empirical(_Exact):
    r"""Optimal denoiser of a finite data set, the output of a network that has memorised the data.

    .. math:: E[x_0 \mid x] = \sum_i r_i x_i, \qquad
              r = \mathrm{softmax}_i\!\left(-\frac{|x - \alpha x_i|^2}{2\sigma^2}\right)

    Arguments:
        sde: Noising process.
        data: Data, (N, *event), stored in float64 unless the module is cast.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          appendix B.3
    """

    _parts = "points"

    def __init__(self, sde: SDE, data: Numbers) -> None:
        super().__init__(sde)
        points = _float64("data", data)
        if points.ndim < 2 or points.numel() == 0:
            raise ValueError(f"`data` must have shape (N, *event) with N > 0, got {tuple(points.shape)}.")
        self.event = tuple(points.shape[1:])
        self.register_buffer("_points", points.flatten(1))

    @property
    def data(self) -> Tensor:
        """The data, (N, *event)."""
        return self._points.reshape(-1, *self.event)

    @checked
    def under(self, sde: SDE) -> Empirical:
        """The same data under another process."""
        return Empirical(sde, self.data).to(self._points)

    def log_prob(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Log-density of the marginal at time `t`, σ(t) > 0, in nats, (B, *event) to (B,)."""
        rows = self._rows(x)
        alpha, sigma = self._scales(t, len(x))
        if not isinstance(sigma, Tensor):
            if sigma == 0:
                raise ValueError(f"`t` must have σ(t) > 0, got {t}: a finite data set has no density without noise.")
            sigma = rows.new_tensor(sigma)
        N, D = self._points.shape
        energy = self._distances(rows, alpha) / (2 * sigma**2)
        log_z = D * (0.5 * math.log(2 * math.pi) + sigma.log()) + math.log(N)
        return ((-energy).logsumexp(1) - log_z.reshape(-1)).to(x.dtype)

    def responsibilities(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Posterior probability of each data point, (B, *event) to (B, N); at σ = 0 it is 1 at the nearest point."""
        rows = self._rows(x)
        alpha, sigma = self._scales(t, len(x))
        distance = self._distances(rows, alpha)
        excess = distance - distance.amin(1, keepdim=True)
        variance = sigma**2 if isinstance(sigma, Tensor) else rows.new_tensor(sigma**2)
        return (-excess / (2 * variance.clamp_min(torch.finfo(rows.dtype).tiny))).softmax(1).to(x.dtype)

    @checked
    def sample(
        self, n: int, t: float = 0.0, *, seed: int | Noise | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Exact samples of the marginal at time `t`, (n, *event); the arguments of :meth:`GaussianMixture.sample`."""
        check.integer("n", n)
        check.dtype("dtype", dtype)
        noise = as_noise(seed).fork(Stream.MIXTURE)
        N, D = self._points.shape
        u = noise.uniform((n, 1), 0, dtype=torch.float64, device=self._points.device)[:, 0]
        x = self._points[(u * N).long().clamp_max(N - 1)]
        z = noise.normal((n, D), 1, dtype=self._points.dtype, device=self._points.device)
        x = self.sde.alpha(t) * x + self.sde.sigma(t) * z
        return x.reshape(n, *self.event).to(dtype)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r = self.responsibilities(check.state("x", x).to(self._points.dtype), t)
        return (r @ self._points).reshape(x.shape).to(x.dtype)

    def _distances(self, rows: Tensor, alpha: Coefficient) -> Tensor:
        return squared_distances(rows, self._points, alpha[:, 0] if isinstance(alpha, Tensor) and alpha.ndim else alpha)


def _column(c: Coefficient) -> Coefficient:
    """The coefficient with an axis for the entries of a state, (B, 1); numbers and scalar tensors as they are."""
    return c[:, None] if isinstance(c, Tensor) and c.ndim else c


def _float64(name: str, value: Numbers) -> Tensor:
    if isinstance(value, Tensor) and (value.is_complex() or value.dtype == torch.bool):
        raise TypeError(f"`{name}` must be real numbers, got {str(value.dtype)[6:]}.")
    # Directly to float64: torch's default dtype would round the numbers of a list to float32.
    out = torch.as_tensor(value, dtype=torch.float64).detach().clone()
    if not bool(out.isfinite().all()):
        raise ValueError(f"`{name}` must be finite, got {out[~out.isfinite()][0].item()}.")
    return out


def _eigen(
    K: int, D: int, event: tuple[int, ...], std: Numbers | None, cov: Numbers | None, factor: Numbers | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Covariances of every kind as s² (K,), l (K, r) and U (K, D, r); U = None is the identity."""
    zeros = torch.zeros(K, dtype=torch.float64)
    if cov is not None:
        c = _float64("cov", cov)
        if c.shape != (K, D, D):
            raise ValueError(
                f"`cov` must have shape ({K}, {D}, {D}), one covariance for each mean, got {tuple(c.shape)}."
            )
        if not torch.allclose(c, c.mT, rtol=1e-8, atol=1e-12):
            raise ValueError("`cov` must be symmetric; give its symmetric part, (cov + cov.mT) / 2.")
        values, u = torch.linalg.eigh(c)
        if bool((values < -1e-10 * values.abs().amax()).any()):
            smallest = values.min().item()
            raise ValueError(f"`cov` must be positive semidefinite, its smallest eigenvalue is {smallest:.3g}.")
        return zeros, values.clamp_min(0), u
    s = zeros if std is None else _float64("std", std)
    if bool((s < 0).any()):
        raise ValueError(f"`std` must not be negative, got {s.min().item()}.")
    if factor is not None:
        if s.ndim > 1 or (s.ndim == 1 and len(s) != K):
            raise ValueError(f"`std` with `factor` must be a number or ({K},), got shape {tuple(s.shape)}.")
        F = _float64("factor", factor)
        if F.ndim != 3 or F.shape[:2] != (K, D) or F.shape[2] > D:
            raise ValueError(f"`factor` must have shape ({K}, {D}, r) with r <= {D}, got {tuple(F.shape)}.")
        u, singular, _ = torch.linalg.svd(F, full_matrices=False)
        return (s**2).expand(K).clone(), singular**2, u
    if s.ndim == 0 or s.shape == (K,):
        return (
            (s**2).expand(K).clone(),
            torch.zeros(K, 0, dtype=torch.float64),
            torch.zeros(K, D, 0, dtype=torch.float64),
        )
    if s.shape != (K, *event):
        raise ValueError(f"`std` must be a number, ({K},) or {(K, *event)}, got shape {tuple(s.shape)}.")
    return zeros, s.flatten(1) ** 2, None


def _per_component(z: Tensor, matrices: Tensor, k: Tensor) -> Tensor:
    """Products z_b @ matrices[k_b] of each row b, without a copy of a matrix for each row."""
    out = z.new_zeros(len(z), matrices.shape[2])
    for j in range(len(matrices)):
        rows = k == j
        out[rows] = z[rows] @ matrices[j]
    return out
