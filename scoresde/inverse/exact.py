r"""Exact posterior and evidence of a Gaussian mixture given a linear measurement with Gaussian noise.

The posterior is again a Gaussian mixture:

.. math::
    p(x_0 \mid y) = \sum_k w_k' N(\mu_k + K_k(y - A\mu_k),\; (I - K_k A) C_k), \qquad
    K_k = C_k A^T S_k^{-1}, \quad S_k = A C_k A^T + \mathrm{std}^2 I, \quad
    w_k' \propto w_k N(y; A\mu_k, S_k)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde._doors import checked
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.inverse.measurements import Measurement


@checked
def posterior(mixture: GaussianMixture, measurement: Measurement) -> GaussianMixture:
    r"""Exact posterior p(x₀ | y) as a mixture on the same process; it is the reference for the approximate methods.

    As a denoiser it returns :math:`E[x_0 \mid x_t, y]`. Sampling it simulates Doob's h-transform of the reverse process
    with :math:`h = p(y \mid x_t)`.

    Arguments:
        mixture: Prior.
        measurement: Measurement with a linear operator and one y, (1, *out).

    References:
        | DEFT: Efficient Fine-tuning of Diffusion Models by Learning the Generalised h-transform (Denker et al., 2024),
          arXiv:2406.01781

    Example:
        >>> import torch, scoresde as ss
        >>> prior = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.5)
        >>> first = ss.inverse.Mask(torch.tensor([True, False]))
        >>> measurement = ss.inverse.Measurement(first, torch.tensor([[1.0]]), std=0.5)
        >>> ss.inverse.posterior(prior, measurement).mean()
        tensor([0.9820, 0.0000], dtype=torch.float64)
    """
    A, S, residual, logs = _joint(mixture, measurement)
    if len(logs) != 1:
        raise ValueError(f"`y` must be one measurement, (1, *out), got {len(logs)} rows; make one for each row.")
    C = mixture.component_covariances()
    gain = torch.linalg.solve(S, A @ C).mT  # C Aᵀ S⁻¹, because S and C are symmetric
    means = mixture.means.flatten(1) + (gain @ residual[0, ..., None])[..., 0]
    # Joseph's form is a sum of squares, so rounding leaves it positive semidefinite when `std` is small.
    left = torch.eye(C.shape[-1]).to(C) - gain @ A
    cov = left @ C @ left.mT + measurement.std**2 * gain @ gain.mT
    weights = logs[0].softmax(0)
    positive = weights > torch.finfo(weights.dtype).tiny
    return GaussianMixture(
        mixture.sde,
        means[positive].reshape(-1, *mixture.event),
        weights=weights[positive],
        cov=0.5 * (cov + cov.mT)[positive],
    )


@checked
def log_evidence(mixture: GaussianMixture, measurement: Measurement) -> Tensor:
    """Log-evidence log p(y) in nats, one for each row of y, (B,).

    Arguments:
        mixture: Prior.
        measurement: Measurement with a linear operator.
    """
    return _joint(mixture, measurement)[3].logsumexp(1)


def _joint(mixture: GaussianMixture, measurement: Measurement) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, S (K, M, M), y − Aμ (B, K, M) and log w N(y; Aμ, S) (B, K)."""
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(
            f"`mixture` must be a GaussianMixture, got {type(mixture).__name__}; for a network use DPS, PiGDM, MMPS or "
            f"another method of scoresde.inverse."
        )
    operator = measurement.linear
    if operator.event != mixture.event:
        raise ValueError(f"`measurement` is for states of shape {operator.event}, `mixture` has shape {mixture.event}.")
    means = mixture.means.flatten(1)
    A = operator.matrix().to(means)
    S = A @ mixture.component_covariances() @ A.mT + measurement.std**2 * torch.eye(len(A)).to(A)
    residual = measurement.y.flatten(1).to(A)[:, None] - means @ A.mT
    root, info = torch.linalg.cholesky_ex(S)
    if bool((info > 0).any()):
        raise ValueError(
            f"`std` = {measurement.std:g} is too small: A C Aᵀ + std² I is singular for a mixture component; use a "
            f"larger `std`."
        )
    z = torch.linalg.solve_triangular(root, residual.permute(1, 2, 0), upper=False)  # (K, M, B)
    log_det = 2 * root.diagonal(dim1=1, dim2=2).log().sum(1)
    energy = z.square().sum(1).mT + log_det + len(A) * math.log(2 * math.pi)
    return A, S, residual, mixture.weights.log() - 0.5 * energy
