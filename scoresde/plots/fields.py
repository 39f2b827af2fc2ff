"""A picture of a model in the plane: its score, and its density if it has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.plots.canvas import array, axes_or_new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["field"]


@checked
def field(
    model: AbstractDenoiser,
    t: float,
    limits: tuple[float, float] = (-3.0, 3.0),
    arrows: int = 20,
    predicts: str = "score",
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the score of a model on points (B, 2) as arrows, over the density if the model has one.

    .. math:: \nabla_x \log p_t(x)

    Arguments:
        model: Denoiser of events (2,). An exact one, such as a mixture, also shows log p_t.
        t: Time, with σ(t) > 0.
        limits: Smallest and largest coordinate.
        arrows: Number of arrows in a line.
        predicts: Prediction that the arrows show: ``"score"``, ``"velocity"`` or another.
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import torch, scoresde as ss
        >>> mix = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), std=0.3)
        >>> ss.plots.field(mix, t=0.3).get_title()
        'score at t = 0.3'
    """
    low, high = limits
    if not low < high:
        raise ValueError(f"`limits` must be (low, high) with low < high, got {limits}.")
    check.integer("arrows", arrows, at_least=2)
    ax = axes_or_new(ax, (5.0, 5.0))
    fine = torch.linspace(low, high, 120)
    log_prob: Callable[[Tensor, float], Tensor] | None = getattr(model, "log_prob", None)
    if log_prob is not None:
        with torch.no_grad():
            density = log_prob(torch.cartesian_prod(fine, fine), t).exp().reshape(len(fine), -1)
        # Rows of the picture are the second coordinate.
        ax.imshow(array(density.T), extent=(low, high, low, high), origin="lower", cmap="Blues", alpha=0.8)
    coarse = torch.linspace(low, high, arrows)
    x = torch.cartesian_prod(coarse, coarse)
    with torch.no_grad():
        arrow = model.predict(predicts, x, t)
    if arrow.shape != x.shape:
        raise ValueError(f"`model` must be a denoiser of events (2,), its output has shape {tuple(arrow.shape)}.")
    ax.quiver(*array(x.T), *array(arrow.T), color="0.2", width=0.003, angles="xy")
    ax.set(xlim=limits, ylim=limits, xlabel="$x_1$", ylabel="$x_2$", aspect="equal", title=f"{predicts} at t = {t:g}")
    return ax
