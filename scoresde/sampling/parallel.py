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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.integrators.method import Method, Problem, Solution
from scoresde.noise.brownian import PathNoise
from scoresde.noise.keyed import Noise
from scoresde.plan.matrices import Unrolled, unroll
from scoresde.plan.table import Plan
from scoresde.solvers.rule import Solver


@checked
@dataclass(frozen=True)
class Parallel(Method):
    """Run a plan by Picard iteration; the result equals that of a run row by row, up to the tolerance.

    ``Solution.calls`` is the number of sweeps, if a prediction of the model is one forward pass. The model is evaluated
    at a vector of times, one for each state. Its conditions are repeated for each row of a sweep.

    Arguments:
        solver: Solver, or plan with a grid of its own; by default the solver that :func:`solve` chooses.
        tol: Tolerance on the change of d in a sweep, as a root mean square over the entries of a sample. A row has
            converged if its d and all earlier ones change by at most `tol` in every sample.
        window: Number of rows in a sweep, by default all; memory and batch size grow with it.

    References:
        | Parallel Sampling of Diffusion Models (Shih et al., 2023), arXiv:2305.16317

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.2)
        >>> plan = ss.DDIM().plan(model.sde, ss.grids.uniform_lam(model.sde, 50))
        >>> run = ss.solve(model, (8, 1), ss.sampling.Parallel(plan), seed=0)
        >>> run.calls < plan.nfe / 2, bool((run.x - ss.sample(model, (8, 1), plan, seed=0)).abs().max() < 5e-3)
        (True, True)
    """

    grads = ("off",)
    grid = "plan"

    solver: Solver | Plan | None = None
    tol: float = 1e-3
    window: int | None = None

    def __post_init__(self) -> None:
        if not (self.solver is None or isinstance(self.solver, Solver | Plan)):
            got = type(self.solver).__name__
            raise TypeError(f"`solver` must be a solver such as DDIM(), a Plan or None, got {got}.")
        check.number("tol", self.tol, at_least=0)
        if self.window is not None:
            check.integer("window", self.window, at_least=1)

    def run(self, problem: Problem) -> Solution:
        plan = self.solver if problem.plan is None else problem.plan
        if not isinstance(plan, Plan):
            raise ValueError("`problem` must have a `plan`, the table of the run.")
        table = unroll(plan)
        n, model = table.nfe, problem.model
        width = n if self.window is None else min(n, self.window)
        with torch.no_grad():
            x = problem.draw(plan.rows[0].t)
            affine = constants(plan, table, x, problem.steps)
            weights = table.d.to(x)
            times = torch.tensor([float(t) for t in table.t[:n]], dtype=torch.float64).to(x)
            denoised = torch.zeros((n, *x.shape), dtype=x.dtype, device=x.device)
            started, first = 0, 0
            repeated = repeat_samples(model, len(x))
            while first < n:
                rows = slice(first, min(first + width, n))
                if rows.stop > started:  # the last d is the first guess for new rows
                    if started:
                        denoised[started : rows.stop] = denoised[started - 1]
                    started = rows.stop
                states = affine[rows] + torch.tensordot(weights[rows, :started], denoised[:started], dims=1)
                new = evaluate(repeated(len(states)), states, times[rows])
                change = (new - denoised[rows]).reshape(*new.shape[:2], -1).square().mean(2).sqrt().amax(1)
                denoised[rows] = new
                # The first row depends on converged rows only, so it is exact.
                first += 1 + int((change[1:] <= self.tol).cumprod(0).sum())
            x = affine[n] + torch.tensordot(weights[n], denoised, dims=1)
        return problem.solution(x, plan.times, plan=plan)


def constants(plan: Plan, table: Unrolled, x: Tensor, noise: Noise) -> Tensor:
    """Part of each state of a plan that does not depend on d: A x_0 + C z + e.

    Arguments:
        plan: Plan with n evaluations.
        table: The unrolled plan.
        x: Initial state, (B, *event).
        noise: Noise of the steps.

    Returns:
        The parts, (n + 1, B, *event); the last one belongs to the result.
    """
    out = torch.einsum("r,...->r...", table.x.to(x), x)
    out = out + table.one.to(x).reshape(-1, *[1] * x.ndim)
    if plan.stochastic:
        source = PathNoise(noise, plan.spans) if noise.path else noise
        for k in range(table.z.shape[1]):
            out = out + torch.einsum("r,...->r...", table.z[:, k].to(x), source.like(x, k))
    return out


def evaluate(model: AbstractDenoiser, states: Tensor, times: Tensor) -> Tensor:
    """Data predictions at states (n, B, *event) and times (n,), in one batch of n B states.

    Arguments:
        model: Denoiser for a batch of n B states, see :func:`repeat_samples`.
        states: States.
        times: Times.
    """
    n, size = states.shape[:2]
    flat = states.reshape(n * size, *states.shape[2:])
    return model.x0(flat, times.repeat_interleave(size)).reshape(states.shape)


def repeat_samples(model: AbstractDenoiser, size: int) -> Callable[[int], AbstractDenoiser]:
    """Function of n that returns the denoiser for n copies of a batch, with everything that belongs to its samples.

    Arguments:
        model: Denoiser.
        size: Number of samples of the batch.
    """
    last: tuple[int, AbstractDenoiser] = (1, model)

    def repeated(n: int) -> AbstractDenoiser:
        nonlocal last
        if last[0] != n:
            last = n, model.rows(torch.arange(size).repeat(n))
        return last[1]

    return repeated
