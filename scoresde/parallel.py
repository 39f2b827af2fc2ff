r"""A plan run in parallel in time: its rows are unknowns of one lower triangular system around the network.

Picard iteration guesses all denoised states of a window of rows, computes all states from them, asks the network at all
of them in one batch, and repeats:

.. math:: x_r = A_r x_0 + \sum_{k<r} B_{rk}\,d_k + \sum_j C_{rj} z_j, \qquad d_r \leftarrow D(x_r, t_r).

Each sweep settles at least one row exactly, so that nothing is lost but work; on smooth trajectories it settles many,
and the window slides past those that have stopped moving. Where a batch costs no more time than a sample, the time is
the number of sweeps. Any plan can be run so, deterministic or with its fixed normals.

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
from scoresde.denoiser import AbstractDenoiser, _check_denoiser
from scoresde.gaussian import Gaussian
from scoresde.noise import Noise
from scoresde.paths import PathNoise
from scoresde.plan import Plan
from scoresde.sampling import _ROWS, _start
from scoresde.unrolled import unroll


@dataclass(frozen=True)
class Parallel:
    """What a run in parallel returns.

    Arguments:
        x: The result, (B, *event).
        sweeps: Calls of the network one after another.
        nfe: Evaluations of a state, all rows and sweeps together; a sequential run has ``plan.nfe``.
        plan: The table that was run.
        seed: The seed of its noise.
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
    """Run a plan by Picard iteration; it returns what :func:`scoresde.sampling.solve` returns, to the tolerance.

    Arguments:
        model: A denoiser; it is asked at a vector of times, one for each state.
        shape_or_x: As for :func:`scoresde.sampling.solve`.
        plan: The table.
        tol: A row is settled once its denoised state and all before it move less than this, root mean square over the
            numbers of a sample, in every sample. 0 goes on until nothing moves.
        window: How many rows to hold at once, all by default; memory and the size of the batch grow with it.
        seed: As for :func:`scoresde.sampling.solve`.
        data_std: As for :func:`scoresde.sampling.solve`.
        start: As for :func:`scoresde.sampling.solve`.
        dtype: Of the state, when a shape is given.
        device: Of the state, when a shape is given.
        **cond: Conditions, handed to the network; tensors with a row for each sample are repeated for each state.

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.2)
        >>> plan = ss.DDIM().plan(model.sde, ss.uniform_lam(model.sde, 50))
        >>> run = solve(model, (8, 1), plan, seed=0)
        >>> run.sweeps < plan.nfe / 2, bool((run.x - ss.sample(model, (8, 1), plan, seed=0)).abs().max() < 5e-3)
        (True, True)
    """
    _check_denoiser(model)
    check.conditions(cond, solve)
    if not isinstance(plan, Plan):
        raise TypeError(f"`plan` must be a Plan, as solver.plan(sde, grid) gives, got {type(plan).__name__}.")
    check.number("tol", tol, least=0)
    table = unroll(plan)
    n = table.nfe
    width = n if window is None else min(n, check.integer("window", window, least=1))
    noise = seed if isinstance(seed, Noise) else Noise(seed)
    with torch.no_grad():
        x = _start(model, shape_or_x, plan.rows[0].t, noise, data_std, dtype, device, start)
        given = _given(plan, table.x, table.z, table.one, x, noise)
        B = table.d.to(x)
        times = torch.tensor([float(t) for t in table.t[:n]], dtype=torch.float64).to(x)
        said = torch.zeros((n, *x.shape), dtype=x.dtype, device=x.device)
        known, first, sweeps, asked = 0, 0, 0, 0
        while first < n:
            rows = slice(first, min(first + width, n))
            if rows.stop > known:  # new rows are guessed to be told what the last known one was
                if known:
                    said[known : rows.stop] = said[known - 1]
                known = rows.stop
            states = given[rows] + torch.tensordot(B[rows, :known], said[:known], dims=1)
            new = _ask(model, states, times[rows], cond)
            sweeps += 1
            asked += len(new)
            moved = (new - said[rows]).flatten(2).square().mean(2).sqrt().amax(1)
            # what the first row is told depends on settled rows alone
            still = int((moved[1:] <= tol).cumprod(0).sum()) + 1
            said[rows] = new
            first += still
        result = given[n] + torch.tensordot(B[n], said, dims=1)
    check.warn_unless_finite(result)
    return Parallel(result, sweeps, asked, replace(plan), noise.seed)


def _given(plan: Plan, a: Tensor, c: Tensor, one: Tensor, x: Tensor, noise: Noise) -> Tensor:
    """What each state has of the start and of the normals, (n + 1, B, *event)."""
    out = torch.einsum("r,...->r...", a.to(x), x)
    out = out + one.to(x).reshape(-1, *[1] * x.ndim)
    if plan.stochastic:
        rows = noise.fork(_ROWS)
        source = PathNoise(rows, plan.spans) if rows.path else rows
        for k in range(c.shape[1]):
            out = out + torch.einsum("r,...->r...", c[:, k].to(x), source.like(x, k))
    return out


def _ask(model: AbstractDenoiser, states: Tensor, times: Tensor, cond: dict[str, Any]) -> Tensor:
    """The network at all states in one batch."""
    rows, size = states.shape[:2]

    def repeated(c: Any) -> Any:
        return c.repeat(rows, *[1] * (c.ndim - 1)) if isinstance(c, Tensor) and c.ndim and len(c) == size > 1 else c

    flat = states.reshape(rows * size, *states.shape[2:])
    out = model.x0(flat, times.repeat_interleave(size), **tree_map(repeated, cond))
    return out.reshape(states.shape)


__all__ = ["Parallel", "solve"]
