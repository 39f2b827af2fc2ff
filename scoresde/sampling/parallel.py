r"""Parallel-in-time sampling: Picard iteration on all evaluations of a plan at once.

Each sweep takes guesses of the denoised states d in a window of rows, computes all states x from them, and evaluates
the network at these states in one batch:

.. math:: x_r = A_r x_0 + \sum_{k<r} B_{rk}\,d_k + \sum_j C_{rj} z_j, \qquad d_r \leftarrow D(x_r, t_r).

Each sweep makes at least one row exact. On smooth trajectories many rows converge, and the window moves past them. If
a batch takes no longer than one sample, the run time is proportional to the number of sweeps. This works for any plan,
deterministic or with fixed normals.

References:
    | Parallel Sampling of Diffusion Models (Shih et al., 2023), arXiv:2305.16317
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser, check_model
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.start import draw_start
from scoresde.noise.brownian import PathNoise
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.matrices import unroll
from scoresde.plan.table import Plan


@dataclass(frozen=True)
class Parallel:
    """Result of a parallel run.

    Arguments:
        x: Samples, (B, *event).
        sweeps: Number of sequential batched evaluations.
        nfe: Number of function evaluations for each sample over all sweeps; a sequential run needs ``plan.nfe``.
        plan: The plan.
        seed: Seed of the noise.
    """

    x: Tensor
    sweeps: int
    nfe: int
    plan: Plan = field(repr=False)
    seed: int | tuple[int, ...] | None


def solve(
    model: AbstractDenoiser,
    shape_or_x: Sequence[int] | Tensor,
    plan: Plan,
    *,
    tol: float = 1e-3,
    window: int | None = None,
    seed: int | Sequence[int] | Noise | None = None,
    data_std: float = 1.0,
    start: Gaussian | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    **cond: Any,
) -> Parallel:
    """Run a plan by Picard iteration; the result equals that of :func:`solve` up to the tolerance.

    Arguments:
        model: A denoiser; it is evaluated at a vector of times, one for each state.
        shape_or_x: Shape (B, *event) to start from the prior, or a state at the first time.
        plan: The plan.
        tol: Tolerance on the change of d in a sweep, as a root mean square over the entries of a sample. A row has
            converged if its d and all earlier ones change by at most `tol` in every sample.
        window: Number of rows in a sweep, by default all; memory and batch size grow with it.
        seed: Integer, one integer for each sample, :class:`Noise`, or None for a random seed.
        data_std: Standard deviation of the data, for the prior.
        start: Gaussian initial distribution, as in :func:`solve`.
        dtype: Data type of the state, if a shape is given.
        device: Device of the state, if a shape is given; by default that of the model.
        **cond: Conditions for the network; tensors with a row for each sample are repeated for each state.

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.2)
        >>> plan = ss.DDIM().plan(model.sde, ss.grids.uniform_lam(model.sde, 50))
        >>> run = solve(model, (8, 1), plan, seed=0)
        >>> run.sweeps < plan.nfe / 2, bool((run.x - ss.sample(model, (8, 1), plan, seed=0)).abs().max() < 5e-3)
        (True, True)
    """
    check_model(model)
    check.conditions(cond, solve)
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a Plan, got {type(plan).__name__}; make one with solver.plan(sde, grid).")
    check.number("tol", tol, at_least=0)
    table = unroll(plan)
    n = table.nfe
    width = n if window is None else min(n, check.integer("window", window, at_least=1))
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    with torch.no_grad():
        x = draw_start(model, shape_or_x, plan.rows[0].t, noise, data_std, dtype, device, start)
        affine = _affine(plan, table.x, table.z, table.one, x, noise)
        B = table.d.to(x)
        times = torch.tensor([float(t) for t in table.t[:n]], dtype=torch.float64).to(x)
        denoised = torch.zeros((n, *x.shape), dtype=x.dtype, device=x.device)
        known, first, sweeps, nfe = 0, 0, 0, 0
        while first < n:
            rows = slice(first, min(first + width, n))
            if rows.stop > known:  # the last known d is the first guess for new rows
                if known:
                    denoised[known : rows.stop] = denoised[known - 1]
                known = rows.stop
            states = affine[rows] + torch.tensordot(B[rows, :known], denoised[:known], dims=1)
            new = _evaluate(model, states, times[rows], cond)
            sweeps += 1
            nfe += len(new)
            change = (new - denoised[rows]).flatten(2).square().mean(2).sqrt().amax(1)
            # The first row depends on converged rows only, so it is exact.
            converged = int((change[1:] <= tol).cumprod(0).sum()) + 1
            denoised[rows] = new
            first += converged
        result = affine[n] + torch.tensordot(B[n], denoised, dims=1)
    check.warn_unless_finite(result)
    return Parallel(result, sweeps, nfe, replace(plan), noise.seed)


def _affine(plan: Plan, a: Tensor, c: Tensor, one: Tensor, x: Tensor, noise: Noise) -> Tensor:
    """Part of each state that does not depend on d: A x_0 + C z + e, (n + 1, B, *event)."""
    out = torch.einsum("r,...->r...", a.to(x), x)
    out = out + one.to(x).reshape(-1, *[1] * x.ndim)
    if plan.stochastic:
        rows = noise.fork(Stream.STEPS)
        source = PathNoise(rows, plan.spans) if rows.path else rows
        for k in range(c.shape[1]):
            out = out + torch.einsum("r,...->r...", c[:, k].to(x), source.like(x, k))
    return out


def _evaluate(model: AbstractDenoiser, states: Tensor, times: Tensor, cond: dict[str, Any]) -> Tensor:
    """Data predictions at all states, in one batch."""
    rows, size = states.shape[:2]

    def repeated(c: Any) -> Any:
        return c.repeat(rows, *[1] * (c.ndim - 1)) if isinstance(c, Tensor) and c.ndim and len(c) == size > 1 else c

    flat = states.reshape(rows * size, *states.shape[2:])
    out = model.x0(flat, times.repeat_interleave(size), **tree_map(repeated, cond))
    return out.reshape(states.shape)
