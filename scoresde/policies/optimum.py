r"""Exact answers of reinforcement learning with a penalty: the optimal law of samples, and what a sampler can reach.

The maximum of E[r(x_0)] − β KL(q ‖ p) over laws q of the samples is β log Z, at

.. math:: q^*(x) = \frac1Z\,p(x)\,e^{r(x)/\beta}.

A sampler chooses its steps and not the law of its start. With a penalty on its paths it reaches this optimum if its
samples do not depend on the start. The steps of the reverse SDE with η = 1 from pure noise forget the start; those of a
smaller η remember a part of it, which :func:`start_share` measures.

References:
    | Adjoint Matching: Fine-tuning Flow and Diffusion Generative Models with Memoryless Stochastic Optimal Control
      (Domingo-Enrich et al., 2025), arXiv:2409.08861
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.mixture import GaussianMixture
from scoresde.plan.matrices import pull_back
from scoresde.plan.table import Plan
from scoresde.processes.sde import SDE


@checked
def tilted(
    mixture: GaussianMixture, linear: Tensor | None = None, quadratic: Tensor | None = None
) -> tuple[GaussianMixture, float]:
    r"""The law p(x)·exp(b·x − ½ xᵀA x)/Z of a mixture p, which is again a mixture, and log Z.

    .. math:: C_k' = C_k (I + A C_k)^{-1}, \qquad \mu_k' = \mu_k + C_k'(b - A\mu_k), \qquad
              \log w_k' = \log w_k + b\cdot\mu_k - \tfrac12\mu_k^T A\mu_k
              + \tfrac12 (b - A\mu_k)^T C_k' (b - A\mu_k) - \tfrac12\log\det(I + A C_k) - \log Z

    Arguments:
        mixture: Mixture p.
        linear: Vector b = ∇r(0)/β, of the shape of an event; by default 0.
        quadratic: Symmetric matrix A, (D, D) with D the size of an event; by default 0.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.5)
        >>> best, log_z = ss.policies.tilted(mix, torch.tensor([1.0]))
        >>> best.means[:, 0].tolist(), [round(w, 3) for w in best.weights.tolist()], round(log_z, 3)
        ([-0.75, 1.25], [0.119, 0.881], 0.559)
    """
    mu, cov = mixture.means.flatten(1), mixture.component_covariances()
    size = mu.shape[1]
    b = mu.new_zeros(size) if linear is None else linear.to(mu).flatten()
    A = mu.new_zeros(size, size) if quadratic is None else quadratic.to(mu)
    if b.shape != (size,) or A.shape != (size, size) or not torch.allclose(A, A.mT):
        raise ValueError(
            f"`linear` and `quadratic` must be {size} numbers and a symmetric matrix ({size}, {size}), got shapes "
            f"{tuple(b.shape)} and {tuple(A.shape)}."
        )
    eye = torch.eye(size).to(mu)
    inner = eye + A @ cov
    sign, log_det = torch.linalg.slogdet(inner)
    new_cov = torch.linalg.solve(inner.mT, cov)  # (I + C A)⁻¹ C = C (I + A C)⁻¹
    new_cov = (new_cov + new_cov.mT) / 2
    if bool((sign <= 0).any()) or bool((torch.linalg.eigvalsh(new_cov) < -1e-12).any()):
        raise ValueError("`quadratic` is so negative that the law has no finite integral; use a larger β.")
    pull = b - mu @ A
    new_mu = mu + (new_cov @ pull[..., None])[..., 0]
    log_w = mixture.weights.log() + mu @ b - 0.5 * ((mu @ A) * mu).sum(1)
    log_w = log_w + 0.5 * (pull * (new_mu - mu)).sum(1) - 0.5 * log_det
    weights = log_w.softmax(0)
    positive = weights > torch.finfo(weights.dtype).tiny
    means = new_mu[positive].reshape(-1, *mixture.event)
    law = GaussianMixture(mixture.sde, means, weights=weights[positive], cov=new_cov[positive])
    return law, float(log_w.logsumexp(0))


@checked
def start_share(plan: Plan, sde: SDE, spectrum: Sequence[float]) -> list[float]:
    r"""Share of the variance of the samples that comes from the start, on Gaussian data of each given variance.

    A policy cannot change this share. For a linear reward its optimum with the penalty β moves the mean of Gaussian
    data by (1 − share) times what p·exp(r/β)/Z moves it. It is 0 for a sampler without memory.

    Arguments:
        plan: Stochastic plan.
        sde: Process of the plan.
        spectrum: Variances of the data.

    Example:
        >>> import scoresde as ss
        >>> sde, grid = ss.Flow(), ss.grids.uniform_t(ss.Flow(), 20)
        >>> [round(start_share(s.plan(sde, grid), sde, [0.25])[0], 3) for s in (ss.DDPM(), ss.solvers.FlowSDE(0.7))]
        [0.0, 0.049]
    """
    start = plan.rows[0].t
    evaluated = [row.t for row in plan.rows if row.evaluates]
    if any(isinstance(t, Tensor) for t in (start, *evaluated)):
        raise ValueError("the plan has tensors of times; make it from numbers.")
    shares = []
    for c in spectrum:
        check.number("spectrum", c, above=0)
        levels = [(sde.alpha(float(t)), sde.sigma(float(t))) for t in evaluated]
        of_x, of_z = pull_back(plan, [a * c / (a**2 * c + s**2) for a, s in levels])
        a, s = sde.alpha(float(start)), sde.sigma(float(start))
        first = float(of_x) ** 2 * (a**2 * c + s**2)
        shares.append(first / (first + sum(float(w) ** 2 for w in of_z.values())))
    return shares
