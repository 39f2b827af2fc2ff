r"""Exact posterior and evidence of a Gaussian mixture given a linear measurement with Gaussian noise.

The posterior is again a Gaussian mixture:

.. math::
    p(x_0 \mid y) = \sum_k w_k' N(\mu_k + K_k(y - A\mu_k),\; (I - K_k A) C_k), \qquad
    K_k = C_k A^T S_k^{-1}, \quad S_k = A C_k A^T + \Sigma, \quad
    w_k' \propto w_k N(y; A\mu_k, S_k)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde._doors import checked
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.inverse.measurements import Measurement
from scoresde.inverse.stacked import Seen, check_measurement


@checked
def posterior(mixture: GaussianMixture, measurement: Seen) -> GaussianMixture:
    r"""Exact posterior p(x₀ | y) as a mixture on the same process; it is the reference for the approximate methods.

    As a denoiser it returns :math:`E[x_0 \mid x_t, y]`. Sampling it simulates Doob's h-transform of the reverse process
    with :math:`h = p(y \mid x_t)`.

    Arguments:
        mixture: Prior.
        measurement: Measurement with a linear operator and one y, (1, *out), or a list of several. `std` may be 0 for
            some entries.

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
    seen = check_measurement(measurement)
    rows = max(len(seen.y), rows_of(seen))
    if rows != 1:
        raise ValueError(
            f"`y` must be one measurement, (1, *out), got {rows} rows; make one posterior for each row, as in "
            f"posterior(mixture, measurement.rows(torch.tensor([0])))."
        )
    A, S, noise, residual, logs = _joint(mixture, seen)
    C = mixture.component_covariances()
    gain = torch.linalg.solve(S, A @ C).mT  # C Aᵀ S⁻¹, because S and C are symmetric
    means = mixture.means.flatten(1) + (gain @ residual[0, ..., None])[..., 0]
    # Joseph's form is a sum of squares, so rounding leaves it positive semidefinite when `std` is small.
    left = torch.eye(C.shape[-1]).to(C) - gain @ A
    cov = left @ C @ left.mT + gain @ noise @ gain.mT
    weights = logs[0].softmax(0)
    positive = weights > torch.finfo(weights.dtype).tiny
    return GaussianMixture(
        mixture.sde,
        means[positive].reshape(-1, *mixture.event),
        weights=weights[positive],
        cov=0.5 * (cov + cov.mT)[positive],
    )


@checked
def log_evidence(mixture: GaussianMixture, measurement: Seen) -> Tensor:
    """Log-evidence log p(y) in nats, one for each row of y, (B,).

    Arguments:
        mixture: Prior.
        measurement: Measurement with a linear operator, or a list of several.
    """
    seen = check_measurement(measurement)
    if rows_of(seen) == 1:
        return _joint(mixture, seen)[4].logsumexp(1)
    each = [seen.rows(torch.tensor([i])) for i in range(max(len(seen.y), rows_of(seen)))]
    return torch.cat([_joint(mixture, one)[4].logsumexp(1) for one in each])


def rows_of(seen: Measurement) -> int:
    """Number of rows of the operator and the noise of a measurement, 1 if they hold for all samples."""
    return max(seen.operator.samples, 1 if seen.covariance is None else len(seen.covariance.scale))


def _joint(mixture: GaussianMixture, measurement: Measurement) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A, S (K, M, M), Σ, y − Aμ (B, K, M) and log w N(y; Aμ, S) (B, K), for the entries that were measured."""
    if not isinstance(mixture, GaussianMixture):
        raise TypeError(
            f"`mixture` must be a GaussianMixture, got {type(mixture).__name__}; for a network use DPS, PiGDM, MMPS or "
            f"another method of scoresde.inverse."
        )
    operator = measurement.linear
    if operator.event != mixture.event:
        raise ValueError(f"`measurement` is for states of shape {operator.event}, `mixture` has shape {mixture.event}.")
    means = mixture.means.flatten(1)
    A, y, noise = (v.to(means) for v in _dense(measurement))
    S = A @ mixture.component_covariances() @ A.mT + noise
    residual = y[:, None] - means @ A.mT
    root, info = torch.linalg.cholesky_ex(S)
    if bool((info > 0).any()):
        raise ValueError(
            f"`std` = {_smallest(measurement):g} is too small: A C Aᵀ + std² I is singular for a mixture component; "
            f"use a larger `std`."
        )
    z = torch.linalg.solve_triangular(root, residual.permute(1, 2, 0), upper=False)  # (K, M, B)
    log_det = 2 * root.diagonal(dim1=1, dim2=2).log().sum(1)
    energy = z.square().sum(1).mT + log_det + len(A) * math.log(2 * math.pi)
    return A, S, noise, residual, mixture.weights.log() - 0.5 * energy + measurement.log_volume.to(energy)[:, None]


def _dense(measurement: Measurement) -> tuple[Tensor, Tensor, Tensor]:
    """A (M, D), y (B, M) and Σ (M, M) of the entries that were measured."""
    A, y = measurement.linear.matrix(), measurement.y.flatten(1)
    noise, known = measurement.covariance, measurement.operator.known_entries
    if noise is None:
        Sigma = _smallest(measurement) ** 2 * torch.eye(len(A)).to(A)
        kept = None if known is None else known[0].flatten()
    else:
        Sigma = noise.dense()
        kept = noise.measured[0] if noise.matrix is None else None if known is None else known[0].flatten()
        if noise.matrix is not None and kept is not None:
            Sigma = Sigma[kept][:, kept]
    if kept is None:
        return A, y, Sigma
    return A[kept], y[:, kept], Sigma if noise is not None else Sigma[kept][:, kept]


def _smallest(measurement: Measurement) -> float:
    """The smallest standard deviation."""
    std = measurement.std
    return float(std.min()) if isinstance(std, Tensor) else std
