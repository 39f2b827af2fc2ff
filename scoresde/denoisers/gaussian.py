r"""Gaussian approximation of the data: it is accurate at high noise, and its probability flow is known exactly.

At high noise the score of the data approaches that of the Gaussian with the same mean m and covariance C. In a
direction of variance c, with u = x/α − m and ρ = σ/α, the flow of that Gaussian is

.. math:: u_t = \sqrt{\frac{c + \varrho_t^2}{c + \varrho_s^2}}\; u_s.

So sampling may start at some t* < T without any evaluation of the network above t*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser, Condition, Kind, check_model
from scoresde.denoisers.predictions import Coefficient
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream
from scoresde.processes.sde import SDE

KINDS = ("full", "diagonal", "separable", "low rank")

_FULL = 1024  # largest event size D for which the full covariance is the default


@checked
class Gaussian(AbstractDenoiser):
    r"""Gaussian data N(m, C): its exact denoiser, flow and samples.

    The covariance is given by its variances along orthonormal axes. The axes are the columns of a matrix, or products
    of one basis for each axis of an event, or the coordinates of an event.

    Arguments:
        sde: Noising process.
        mean: Mean m, of shape event.
        spectrum: Variances along the axes: (r,) if `axes` is a matrix, otherwise of shape event.
        axes: Matrix (D, r) with orthonormal columns, D the size of an event; a list of one orthogonal matrix for each
            axis of an event; or None for the coordinates.
        rest: Variance in all directions orthogonal to a matrix `axes`.

    Example:
        >>> import torch, scoresde as ss
        >>> sde = ss.VP()
        >>> data = ss.GaussianMixture(sde, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.2).sample(1000, seed=0)
        >>> start = Gaussian.estimate(sde, data)
        >>> x = start.sample(4, sde.T, seed=1)
        >>> start.flow(x, sde.T, 0.6).shape
        torch.Size([4, 2])
    """

    _mean: Tensor
    _spectrum: Tensor

    def __init__(
        self,
        sde: SDE,
        mean: Tensor,
        spectrum: Tensor,
        axes: Tensor | Sequence[Tensor] | None = None,
        rest: float = 0.0,
    ) -> None:
        super().__init__(sde)
        m, c = (torch.as_tensor(v, dtype=torch.float64).detach().clone() for v in (mean, spectrum))
        self.event = tuple(m.shape)
        self.rest = check.number("rest", rest, at_least=0)
        if m.ndim == 0:
            raise ValueError("`mean` must have the shape of an event, got a number; for scalar events use shape (1,).")
        matrices = [axes] if isinstance(axes, Tensor) else list(axes or ())
        sizes = [m.numel()] if isinstance(axes, Tensor) else [*self.event]
        if isinstance(axes, Tensor):
            if axes.ndim != 2 or len(axes) != m.numel() or c.shape != axes.shape[1:]:
                raise ValueError(
                    f"`axes` must have shape ({m.numel()}, r) and `spectrum` (r,), got {tuple(axes.shape)} and "
                    f"{tuple(c.shape)}."
                )
        elif c.shape != m.shape:
            raise ValueError(f"`spectrum` must have the shape of `mean`, {self.event}, got {tuple(c.shape)}.")
        if (
            not isinstance(axes, Tensor)
            and axes is not None
            and [tuple(a.shape) for a in axes] != [(n, n) for n in sizes]
        ):
            raise ValueError(f"`axes` must be one square matrix for each of the axes {self.event} of an event.")
        if bool((c < 0).any()) or not bool(c.isfinite().all()):
            raise ValueError(f"`spectrum` must hold finite variances of at least 0, its minimum is {float(c.min()):g}.")
        self._flat = isinstance(axes, Tensor)
        self.register_buffer("_mean", m)
        self.register_buffer("_spectrum", c)
        for i, a in enumerate(matrices):
            self.register_buffer(f"_axes{i}", torch.as_tensor(a, dtype=torch.float64).detach().clone())
        self._matrices = len(matrices)

    @classmethod
    @checked
    def of(cls, sde: SDE, mean: Tensor, cov: Tensor) -> Gaussian:
        """Gaussian with a mean of shape event and a covariance (D, D)."""
        c, axes = torch.linalg.eigh(torch.as_tensor(cov, dtype=torch.float64))
        return cls(sde, mean, c.clamp_min(0), axes)

    @classmethod
    @checked
    def estimate(cls, sde: SDE, data: Tensor, kind: str | None = None, *, rank: int = 64) -> Gaussian:
        """Gaussian with the sample mean and an estimate of the covariance of the data.

        ``"full"`` is the sample covariance, ``"diagonal"`` its diagonal. ``"separable"`` takes the eigenvectors of the
        covariance along each axis of an event and the variances along their products. ``"low rank"`` takes the first
        principal axes, and one variance for all other directions. The default is full for D at most 1024 and N at least
        4 D, otherwise separable if an event has two or more axes, otherwise low rank.

        Arguments:
            sde: Noising process.
            data: Data, (N, *event).
            kind: Structure, ``"full"``, ``"diagonal"``, ``"separable"``, ``"low rank"``, or None for the default.
            rank: Largest number of axes of ``"low rank"``.
        """
        x = check.state("data", data).detach().double()
        N, D = len(x), x[0].numel()
        if N < 2:
            raise ValueError(f"`data` must have at least 2 samples to estimate a covariance, got {N}.")
        if kind is None:
            kind = "full" if D <= _FULL and N >= 4 * D else "separable" if x.ndim > 2 else "low rank"
        check.choice("kind", kind, KINDS)
        mean = x.mean(0)
        x = x - mean
        if kind == "full":
            return cls.of(sde, mean, x.flatten(1).mT @ x.flatten(1) / (N - 1))
        if kind == "low rank":
            _, s, v = torch.linalg.svd(x.flatten(1), full_matrices=False)
            variance = s**2 / (N - 1)
            r = min(check.integer("rank", rank, at_least=1), D, N - 1)
            rest = float(variance[r:].sum()) / (D - r) if r < D else 0.0
            return cls(sde, mean, variance[:r], v[:r].mT.contiguous(), rest)
        axes = None
        if kind == "separable":
            along = [x.movedim(i + 1, 0).flatten(1) for i in range(x.ndim - 1)]
            axes = [torch.linalg.eigh(y @ y.mT)[1] for y in along]
            x = _product(x, [a.mT for a in axes])
        return cls(sde, mean, x.square().sum(0) / (N - 1), axes)

    def extra_repr(self) -> str:
        return f"event={self.event}, sde={self.sde}"

    @property
    def mean(self) -> Tensor:
        """Mean m, of shape event."""
        return self._mean

    @property
    def spectrum(self) -> Tensor:
        """Variances in all D directions, in descending order."""
        c = self._spectrum.flatten()
        others = self._mean.numel() - len(c)
        return torch.cat([c, c.new_full((others,), self.rest)]).sort(descending=True).values

    @property
    def arguments(self) -> tuple[Tensor, Tensor, Tensor | list[Tensor] | None, float]:
        """Arguments `mean`, `spectrum`, `axes` and `rest` that make this Gaussian, on any process."""
        axes: list[Tensor] = [getattr(self, f"_axes{i}") for i in range(self._matrices)]
        return self._mean, self._spectrum, axes[0] if self._flat else axes or None, self.rest

    @property
    def gaussian(self) -> Gaussian:
        return self

    @property
    def kind(self) -> Kind:
        return Kind("x0", self.sde, exact=True)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        r"""Posterior mean, :math:`m + \alpha C(\alpha^2 C + \sigma^2)^{-1}(x - \alpha m)`."""
        alpha, sigma = self._scales(t, x)
        return self.affine(x, alpha, lambda c: alpha * c / _positive(alpha**2 * c + sigma**2), 1.0)

    def flow(self, x: Tensor, s: float | Tensor, t: float | Tensor) -> Tensor:
        """Exact probability flow from time s to t, in either direction; differentiable in the times.

        Arguments:
            x: State at time `s`, (B, *event).
            s: Initial time, a number, () or (B,).
            t: Target time, a number, () or (B,).
        """
        check.state("x", x)
        if not isinstance(s, Tensor):
            check.number("s", s, at_least=0)
        (a, b), (e, f) = self._scales(s, x), self._scales(t, x)
        return self.affine(x, a, lambda c: ((e**2 * c + f**2) / _positive(a**2 * c + b**2)).sqrt(), e)

    def carry(self, z: Tensor, t: float | Tensor) -> Tensor:
        r"""State at time `t` of standard normals `z`, :math:`\alpha m + (\alpha^2 C + \sigma^2)^{1/2} z`.

        The states of one `z` at different times lie on one trajectory of the flow.
        """
        check.state("z", z)
        alpha, sigma = self._scales(t, z)
        return self.affine(z, 0.0, lambda c: (alpha**2 * c + sigma**2).sqrt(), alpha)

    @checked
    def sample(
        self, n: int, t: float = 0.0, *, seed: int | Noise | None = None, dtype: torch.dtype = torch.float64
    ) -> Tensor:
        """Samples of the marginal at time `t`, (n, *event); sample i depends on the seed and on i alone.

        Arguments:
            n: Number of samples.
            t: Time.
            seed: Seed, a :class:`Noise`, or None for a random seed.
            dtype: Dtype of the samples, float32 or float64.
        """
        check.integer("n", n)
        noise = as_noise(seed).fork(Stream.GAUSSIAN)
        return self.carry(noise.normal((n, *self.event), 0, dtype=dtype, device=self._mean.device), t)

    @checked
    def skip_errors(
        self,
        model: AbstractDenoiser,
        *,
        points: int = 48,
        n: int = 64,
        seed: int = 0,
        max_error: float = math.inf,
    ) -> tuple[Tensor, Tensor]:
        r"""First-order error in the data that a start at t instead of T causes.

        .. math:: \delta_0(t) = \int_{\lambda_T}^{\lambda_t} \sqrt{\frac{C}{C + \varrho^2}}\,
                  \big(D(x) - D_{Gauss}(x)\big)\, d\lambda

        The integral runs along trajectories of the Gaussian's flow. The root is the linear map of that flow to t = 0.
        The result holds for a model near the Gaussian. The flow of data with separate modes contracts towards them: the
        median error is two to four times smaller. But a few samples end in another mode. They are not foretold, and
        they dominate the root mean square over thousands of samples.

        Arguments:
            model: Denoiser D to compare with, of `n` samples if it has conditions.
            points: Number of times, uniform in λ, at which `model` is evaluated.
            n: Number of trajectories.
            seed: Seed of the initial states.
            max_error: Error above which the integration stops.

        Returns:
            Times, from noise to data, and the root-mean-square error per number at each.
        """
        check_model(model)
        check.integer("points", points, at_least=2)
        sde = self.sde
        first = sde.lam(sde.T) if sde.alpha(sde.T) > 0 else sde.lam(sde.T * (1 - 1e-3))
        lam = torch.linspace(first, sde.lam(sde.t_min), points, dtype=torch.float64)
        z = Noise(seed).fork(Stream.GAUSSIAN).normal((n, *self.event), 1, dtype=torch.float64, device=self._mean.device)
        times, errors = [sde.T], [0.0]
        total, previous = torch.zeros_like(z), None
        with torch.no_grad():
            for t, rho in zip(sde.t_of_lam(lam).tolist(), (-lam).exp().tolist(), strict=True):
                x = self.carry(z, t)
                gap = model.x0(x, t) - self.x0(x, t)
                integrand = self._gain(gap, _to_data(rho))
                if previous is not None:
                    total = total + (integrand + previous) * float(lam[1] - lam[0]) / 2
                    times.append(t)
                    errors.append(float(total.square().mean().sqrt()))
                previous = integrand
                if errors[-1] > max_error:
                    break
        return torch.tensor(times, dtype=torch.float64), torch.tensor(errors, dtype=torch.float64)

    @checked
    def start_time(
        self, model: AbstractDenoiser, tol: float = 1e-2, *, points: int = 48, n: int = 64, seed: int = 0
    ) -> float:
        """Smallest start time whose error, by :meth:`skip_errors`, is at most `tol` per number of the data.

        Arguments:
            model: Denoiser to sample from, of `n` samples if it has conditions.
            tol: Root-mean-square error per number; choose a fraction of the error of the solver.
            points: Number of times, uniform in λ, at which `model` is evaluated.
            n: Number of trajectories.
            seed: Seed of the initial states.
        """
        check.number("tol", tol, above=0)
        times, errors = self.skip_errors(model, points=points, n=n, seed=seed, max_error=tol)
        return float(times[errors <= tol].min())

    def marginal(self, alpha: float | Tensor, sigma: float | Tensor) -> Marginal:
        """The marginal at given α and σ.

        Arguments:
            alpha: Signal level α, a number or (B,).
            sigma: Noise level σ, a number or (B,).
        """
        axes = 1 if self._flat else len(self.event)
        a, b = (torch.as_tensor(v).to(self._mean).reshape(-1, *[1] * axes) for v in (alpha, sigma))
        return Marginal(self, a, b)

    def log_det(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log-determinant of the matrix S of :class:`Marginal`, (B,), for α and σ that broadcast to states."""
        total = (alpha**2 * self._spectrum + sigma**2).log().flatten(1).sum(1)
        others = self._mean.numel() - self._spectrum.numel()
        if others:
            total = total + others * (alpha**2 * self.rest + sigma**2).log().flatten()
        return total / 2

    def _scales(self, t: float | Tensor, x: Tensor) -> tuple[Coefficient, Coefficient]:
        """α and σ as numbers, or as tensors that broadcast to the states."""
        check.state("x", x)
        if tuple(x.shape[1:]) != self.event:
            raise ValueError(f"`x` must have shape (B, {', '.join(map(str, self.event))}), got {tuple(x.shape)}.")
        if not isinstance(t, Tensor):
            return self.sde.alpha(t), self.sde.sigma(t)
        like = (x.flatten(1) if self._flat else x).to(self._mean)
        alpha, sigma = (check.expand(v.to(self._mean), like) for v in (self.sde.alpha(t), self.sde.sigma(t)))
        return alpha, sigma

    def affine(self, x: Tensor, a: float | Tensor, gain: Callable[[Tensor], Tensor], b: float | Tensor) -> Tensor:
        """The affine map b m + gain(C) (x − a m).

        Arguments:
            x: States, (B, *event).
            a: Factor of the mean that is subtracted.
            gain: Function of the variances.
            b: Factor of the mean that is added.
        """
        m = self._mean.flatten() if self._flat else self._mean
        y = x.to(self._mean).flatten(1) if self._flat else x.to(self._mean)
        out = self._gain_flat(y if _is_zero(a) else y - a * m, gain)
        return (out if _is_zero(b) else out + b * m).reshape(x.shape).to(x.dtype)

    def _gain(self, x: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        """The product gain(C) x."""
        y = x.to(self._mean)
        return self._gain_flat(y.flatten(1) if self._flat else y, gain).reshape(x.shape).to(x.dtype)

    def _gain_flat(self, y: Tensor, gain: Callable[[Tensor], Tensor]) -> Tensor:
        axes: list[Tensor] = [getattr(self, f"_axes{i}") for i in range(self._matrices)]
        if not self._flat:
            y = _product(y, [a.mT for a in axes])
            return _product(gain(self._spectrum) * y, axes)
        u: Tensor = axes[0]
        inner = y @ u
        if u.shape[0] == u.shape[1]:
            return (gain(self._spectrum) * inner) @ u.mT
        side = gain(self._spectrum.new_tensor(self.rest))
        return side * y + ((gain(self._spectrum) - side) * inner) @ u.mT


@dataclass(frozen=True)
class Marginal:
    r"""Marginal N(αm, S²) of Gaussian data, with :math:`S^2 = \alpha^2 C + \sigma^2`.

    The flow of the data is :math:`x = \alpha m + S z` with constant z.

    Arguments:
        gaussian: The Gaussian.
        alpha: Signal level α, broadcast to states.
        sigma: Noise level σ, broadcast to states.
    """

    gaussian: Gaussian
    alpha: Tensor
    sigma: Tensor

    def state(self, z: Tensor) -> Tensor:
        """State of standard normals z, αm + S z."""
        return self.gaussian.affine(z, 0.0, lambda c: self._variance(c).sqrt(), self.alpha)

    def whiten(self, x: Tensor) -> Tensor:
        """Standard normals of a state, S⁻¹ (x − αm)."""
        return self.gaussian.affine(x, self.alpha, lambda c: self._variance(c).rsqrt(), 0.0)

    def shrink(self, v: Tensor) -> Tensor:
        """The product S⁻¹ v."""
        return self.gaussian.affine(v, 0.0, lambda c: self._variance(c).rsqrt(), 0.0)

    def grow(self, v: Tensor) -> Tensor:
        """The product S v."""
        return self.gaussian.affine(v, 0.0, lambda c: self._variance(c).sqrt(), 0.0)

    def denoise(self, x: Tensor) -> Tensor:
        """Posterior mean of the data, m + αC S⁻² (x − αm)."""
        return self.gaussian.affine(x, self.alpha, lambda c: self.alpha * c / self._variance(c), 1.0)

    def log_det(self) -> Tensor:
        """Log-determinant of S, (B,)."""
        return self.gaussian.log_det(self.alpha, self.sigma)

    def _variance(self, c: Tensor) -> Tensor:
        return _positive(self.alpha**2 * c + self.sigma**2)


def _product(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Product of `x`, (B, *event), with one matrix along each axis of an event."""
    for i, a in enumerate(matrices):
        x = (x.movedim(i + 1, -1) @ a.mT).movedim(-1, i + 1)
    return x


def _to_data(rho: float) -> Callable[[Tensor], Tensor]:
    """Gain of the flow from noise level ρ to 0 for a difference in x/α, in a direction of variance c."""
    return lambda c: (c / _positive(c + rho**2)).sqrt()


def _is_zero(v: float | Tensor) -> bool:
    return not isinstance(v, Tensor) and v == 0


def _positive(v: Tensor) -> Tensor:
    return v.clamp_min(torch.finfo(v.dtype).tiny)


def check_gaussian(name: str, gaussian: object, sde: SDE) -> Gaussian:
    """Raise an error unless `gaussian` is a Gaussian on the process `sde`."""
    if not isinstance(gaussian, Gaussian):
        raise TypeError(f"`{name}` must be a Gaussian, as from Gaussian.estimate, got {type(gaussian).__name__}.")
    if gaussian.sde != sde:
        raise ValueError(
            f"`{name}` is a Gaussian under {gaussian.sde!r}, but the model is on {sde!r}; build the Gaussian with the "
            f"process of the model, as in Gaussian.estimate(model.sde, data)."
        )
    return gaussian
