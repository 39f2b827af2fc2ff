"""Interpolation between two data samples through their latent codes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.integrators.method import Method
from scoresde.sampling.encode import decode, encode
from scoresde.sampling.solve import GridMaker
from scoresde.solvers.rule import Solver


@checked
def slerp(a: Tensor, b: Tensor, w: float | Tensor) -> Tensor:
    r"""Spherical linear interpolation; for Gaussian codes it preserves the typical norm, which a linear mean reduces.

    .. math:: \frac{\sin((1-w)\theta)}{\sin\theta}\,a + \frac{\sin(w\theta)}{\sin\theta}\,b, \qquad
              \cos\theta = \frac{a\cdot b}{|a||b|}

    Arguments:
        a: First end, (B, *event).
        b: Second end, of the shape of `a`.
        w: Weight in [0, 1], a number, () or (B,); 0 gives `a` and 1 gives `b`.

    References:
        | Sampling Generative Networks (White, 2016), arXiv:1609.04468
    """
    check.match("b", b, "a", check.state("a", a))
    u, v = (x.flatten(1) / x.flatten(1).norm(dim=1, keepdim=True).clamp_min(1e-30) for x in (a, b))
    # atan2 of chords, because arccos is inaccurate at small angles.
    theta = 2 * torch.atan2((u - v).norm(dim=1), (u + v).norm(dim=1))
    s = w.to(theta) if isinstance(w, Tensor) else torch.as_tensor(float(w)).to(theta)
    collinear = theta.sin() < 1e-6
    angle = torch.where(collinear, torch.ones_like(theta), theta)
    left = torch.where(collinear, 1 - s, ((1 - s) * angle).sin() / angle.sin())
    right = torch.where(collinear, s, (s * angle).sin() / angle.sin())
    return check.expand(left, a) * a + check.expand(right, b) * b


@checked
def interpolate(
    model: AbstractDenoiser,
    x_a: Tensor,
    x_b: Tensor,
    n: int,
    solver: Solver | Method | None = None,
    *,
    steps: int | None = None,
    grid: Tensor | Sequence[float] | GridMaker | None = None,
    t_start: float | None = None,
    t_end: float | None = None,
) -> Tensor:
    """Interpolate between data samples: encode both ends, interpolate the codes by :func:`slerp`, and decode.

    Arguments:
        model: Denoiser; conditions belong to it, as in ``model.given(label=y)`` with one row for each sample of `x_a`.
        x_a: First end, (B, *event).
        x_b: Second end, of the shape of `x_a`.
        n: Number of points, at least 2; both ends are included.
        solver: Deterministic solver or method, as in :func:`encode`.
        steps: Number of steps of each solve, by default 50.
        grid: Times from noise to data that end at a positive time, or a grid maker.
        t_start: Time of the data, by default ``sde.t_min``.
        t_end: Time of the codes, by default T.

    Returns:
        Points, (n, B, *event); the first and last equal `x_a` and `x_b` up to the error of the solver.

    References:
        | Denoising Diffusion Implicit Models (Song et al., 2021), arXiv:2010.02502, section 5.3

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.zeros(1, 2), std=1.0)
        >>> path = ss.sampling.interpolate(mix, torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 5, steps=10)
        >>> path.shape, path[2].norm().item()
        (torch.Size([5, 1, 2]), 1.00)
    """
    check.integer("n", n, at_least=2)
    check.match("x_b", x_b, "x_a", check.state("x_a", x_a))
    check.window(model.sde.T, t_start, t_end)
    z_a, z_b = (encode(model, x, solver, steps=steps, grid=grid, t_start=t_start, t_end=t_end) for x in (x_a, x_b))
    codes = [slerp(z_a, z_b, w) for w in torch.linspace(0, 1, n, dtype=torch.float64).tolist()]
    return torch.stack([decode(model, z, solver, steps=steps, grid=grid, t_start=t_start, t_end=t_end) for z in codes])
