r"""Weights of exponential solvers, predictors and correctors (UniPC's too): Lagrange polynomials times a kernel.

In λ = log(α/σ) the reverse family is :math:`dx = [\tfrac{d\log\alpha}{d\lambda} x - (1+\eta^2)(x - \alpha d)]\,d\lambda
+ \sqrt2\,\eta\,\sigma\,dW` with d = E[x_0 | x]. Interpolate a linear prediction :math:`f = p\,x + q\,d` through earlier
evaluations, the nodes, in a variable u; variation of constants from s to t then gives

.. math::
    x_t = \Phi\,x_s + \sum_j W_j f_j + \mathrm{std}\,z, \qquad W_j = \int_{\lambda_s}^{\lambda_t} K(\lambda)\,
    \ell_j(u(\lambda))\,d\lambda, \qquad K = \Phi(\lambda, t)\,(1+\eta^2)\,\frac{\alpha}{q}.

For η = 0, :math:`\Phi = N_t/N_s`, where N(α, σ) is the scale of the prediction: σ for data, α for noise, α + σ for
velocity. The kernel is analytic, so Gauss–Legendre in λ is exact to rounding: 80 nodes are enough for steps up to
h = 15 (the kernel of V has poles at Im λ = ±π/2, so 32 nodes have an error of 1e-7 at h = 10). If λ is infinite at an
end, the integral is computed in the prediction's clock c(λ), in which the kernel is constant for η = 0.

The functions are elementwise over steps, take float64 tensors, and are differentiable in the times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde._numerics import LEGENDRE_NODES, LEGENDRE_WEIGHTS, lagrange
from scoresde.processes.sde import SDE
from scoresde.solvers.interpolants import DATA, NOISE, Prediction, Variable


def transfer(prediction: Prediction, eta: float | Tensor, s: Point, t: Point) -> Tensor:
    r"""Φ(s, t), the coefficient of x_s.

    .. math:: \Phi = \left(\frac{\alpha_s}{\alpha_t}\right)^{\eta^2}\left(\frac{N_t}{N_s}\right)^{1+\eta^2}
    """
    ratio = prediction.scale(t.alpha, t.sigma) / prediction.scale(s.alpha, s.sigma)
    if not noisy(eta):
        return ratio
    no_signal = s.alpha == 0  # the gradient of 0 ** eta**2 is infinite
    ratio_of_alpha = torch.where(no_signal, t.alpha, s.alpha) / t.alpha
    return torch.where(no_signal, 0.0, ratio_of_alpha ** (eta**2) * ratio ** (1 + eta**2))


def noise_std(prediction: Prediction, eta: float | Tensor, s: Point, t: Point) -> Tensor:
    r"""Standard deviation of a step's noise, :math:`\mathrm{std}^2 = 2\eta^2\int\sigma^2\,\Phi(\lambda,t)^2 d\lambda`.

    It is σ_t √(−expm1(−2η²h)) for data and η √((α_t σ_s/α_s)² − σ_t²) for noise; others use quadrature.
    """
    if not noisy(eta):
        return torch.zeros_like(t.sigma)
    h = t.lam - s.lam
    if prediction == DATA:
        return t.sigma * (-torch.expm1(-2 * eta**2 * h)).sqrt()
    if prediction == NOISE:
        return eta * t.sigma * torch.expm1(2 * h).sqrt()
    lam = s.lam[..., None] + h[..., None] * LEGENDRE_NODES
    relative = _relative_transfer(prediction, eta, lam, t.lam[..., None])
    # relative to α_t, with σ/α = e^{−λ}
    variance = 2 * eta**2 * h * ((relative * (-lam).exp()) ** 2 @ LEGENDRE_WEIGHTS)
    return t.alpha * variance.sqrt()


def noisy(eta: float | Tensor) -> bool:
    """Whether η is not the number 0; a tensor η uses the general formulas, which have the same limit."""
    return isinstance(eta, Tensor) or eta != 0


def _gain(eta: float | Tensor) -> Tensor:
    """1 + η², with a last axis for λ."""
    return 1 + torch.as_tensor(eta, dtype=torch.float64)[..., None] ** 2


def _relative_transfer(prediction: Prediction, eta: float | Tensor, lam: Tensor, lam_t: Tensor) -> Tensor:
    """Φ(λ, t) α_λ/α_t, which depends on λ only; it is computed from N/α."""
    one = torch.ones_like(lam)
    ratio = prediction.scale(one, (-lam).exp()) / prediction.scale(one, (-lam_t).exp())
    return ratio ** (-_gain(eta))


@dataclass(frozen=True)
class Point:
    """Times with their λ, α and σ.

    Arguments:
        t: Times, float64.
        lam: Values of λ, of the shape of `t`.
        alpha: Values of α, of the shape of `t`.
        sigma: Values of σ, of the shape of `t`.
    """

    t: Tensor
    lam: Tensor
    alpha: Tensor
    sigma: Tensor

    @classmethod
    def of(cls, sde: SDE, t: Tensor) -> Point:
        """Return times of any shape with their λ, α and σ."""
        flat = t.reshape(-1)
        return cls(t, *(fn(flat).reshape(t.shape) for fn in (sde.lam, sde.alpha, sde.sigma)))

    def __getitem__(self, index: slice | Tensor | Sequence[int] | tuple[slice | Tensor | None, ...] | None) -> Point:
        return Point(self.t[index], self.lam[index], self.alpha[index], self.sigma[index])

    def unbind(self) -> list[Point]:
        """Points of the first axis."""
        return [Point(*p) for p in zip(*(v.unbind() for v in (self.t, self.lam, self.alpha, self.sigma)), strict=True)]


def weights(
    prediction: Prediction,
    variable: Variable,
    eta: float | Tensor,
    s: Point,
    t: Point,
    nodes: Point,
    t_of_lam: Callable[[Tensor], Tensor],
    moments: Sequence[str | float] | None = None,
) -> Tensor:
    r"""Quadrature weights :math:`W_j = \int K\,\ell_j\,d\lambda`.

    Arguments:
        prediction: Prediction to interpolate.
        variable: Variable of the interpolating polynomial.
        eta: Noise level η of the steps: a number, or a tensor (R,), (R, 1) or (R, B).
        s: Start points of the steps, fields (R,) or (R, B).
        t: End points of the steps, of the shape of `s`.
        nodes: Points of the earlier evaluations, fields (R, k) or (R, k, B).
        t_of_lam: Function t(λ) of the process, used if `variable` depends on t.
        moments: Replacements of the exact moments :math:`\int K (\lambda-\lambda_s)^n d\lambda`, n = 0, 1, …:
            ``"exact"``, ``"mid"`` (∫K · h/2), ``"end"`` (K(λ_t) h²/2), or a factor on the exact moment. Only for
            interpolation in λ; None by default.

    Returns:
        Weights, (R, k) or (R, k, B).
    """
    u = variable.of(nodes.lam, nodes.t)
    k = nodes.t.shape[1]
    if prediction == DATA and bool(t.lam.isinf().all()):
        lam = t.lam[..., None]
        kernel = t.alpha[..., None] * torch.ones_like(lam)
        return lagrange(variable.of(lam, t.t[..., None]), u)[..., 0] * kernel[..., 0].unsqueeze(1)
    lam, kernel = _kernel_at_nodes(prediction, eta, s, t)
    at = t_of_lam(lam) if variable.uses_t else lam
    basis = lagrange(variable.of(lam, at), u)  # (R, k, [B,] Q)
    exact = (basis * (kernel * LEGENDRE_WEIGHTS).unsqueeze(1)).sum(-1)
    if moments is None or k == 1:
        return exact
    return exact + _moment_change(prediction, eta, s, t, nodes, lam, kernel, moments)


def constant(prediction: Prediction, eta: float | Tensor, s: Point, t: Point, nodes: Point, W: Tensor) -> Tensor:
    r"""Constant term from the offset, :math:`\int K B\,d\lambda - \sum_j W_j B_j`."""
    assert prediction.offset is not None
    lam, kernel = _kernel_at_nodes(prediction, eta, s, t)
    whole = (kernel * prediction.offset(lam)) @ LEGENDRE_WEIGHTS
    return whole - (W * prediction.offset(nodes.lam)).sum(1)


def _kernel_at_nodes(prediction: Prediction, eta: float | Tensor, s: Point, t: Point) -> tuple[Tensor, Tensor]:
    """Values of λ at the nodes of the quadrature, and the kernel times dλ there, without the quadrature's weights."""
    if bool((s.lam.isfinite() & t.lam.isfinite()).all()):
        h = (t.lam - s.lam)[..., None]
        lam = s.lam[..., None] + h * LEGENDRE_NODES
        return lam, _kernel(prediction, eta, lam, t) * h
    if prediction.decays and bool(t.lam.isinf().all()):
        # In σ/α = v⁴ (σ/α)_s the kernel times a power of λ, a logarithm of v, is smooth at v = 0.
        lam = s.lam[..., None] - 4 * LEGENDRE_NODES.log()
        return lam, _kernel(prediction, eta, lam, t) * 4 / LEGENDRE_NODES
    a, b = prediction.clock(s.lam)[..., None], prediction.clock(t.lam)[..., None]
    # From α = 0 the kernel behaves like (c − a)^{η²}, so the quadrature nodes are denser near a.
    m = 4 if noisy(eta) else 1
    c = a + (b - a) * LEGENDRE_NODES**m
    lam = prediction.lam_of_clock(c)
    speed = (b - a) * m * LEGENDRE_NODES ** (m - 1) / prediction.slope(c)
    return lam, _kernel(prediction, eta, lam, t) * speed


def _kernel(prediction: Prediction, eta: float | Tensor, lam: Tensor, t: Point) -> Tensor:
    one = torch.ones_like(lam)
    factor = _gain(eta) / prediction.q(one, (-lam).exp())
    return t.alpha[..., None] * factor * _relative_transfer(prediction, eta, lam, t.lam[..., None])


def _moment_change(
    prediction: Prediction,
    eta: float | Tensor,
    s: Point,
    t: Point,
    nodes: Point,
    lam: Tensor,
    kernel: Tensor,
    moments: Sequence[str | float],
) -> Tensor:
    """Change of the weights when moments are replaced, by a Vandermonde system in r = (λ − λ_s)/h."""
    k = nodes.t.shape[1]
    h = t.lam - s.lam
    x = (lam - s.lam[..., None]) / h[..., None]
    mass = kernel * LEGENDRE_WEIGHTS
    total, end = mass.sum(-1), _kernel(prediction, eta, t.lam[..., None], t)[..., 0] * h
    change = []
    for n in range(k):
        moment = moments[n] if n < len(moments) else "exact"
        exact = (mass * x**n).sum(-1)
        new = {"exact": exact, "mid": total / 2, "end": end / 2}[moment] if isinstance(moment, str) else moment * exact
        change.append(new - exact)
    r = (nodes.lam - s.lam.unsqueeze(1)) / h.unsqueeze(1)  # (R, k, [B])
    powers = torch.stack([r**n for n in range(k)], dim=1)  # (R, n, k, [B])
    rhs = torch.stack(change, dim=1)
    if r.ndim == 3:
        solved: Tensor = torch.linalg.solve(powers.permute(0, 3, 1, 2), rhs.permute(0, 2, 1)[..., None])
        return solved[..., 0].permute(0, 2, 1)
    solved = torch.linalg.solve(powers, rhs[..., None])
    return solved[..., 0]
