"""Pictures of samples: images, points, signals, numbers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.plots.canvas import array, axes_or_new, is_image, show_tiles, tiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["samples"]

MOST_SIGNALS = 16


@checked
def samples(
    x: Tensor,
    columns: int | None = None,
    value_range: tuple[float, float] | None = None,
    contours: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Plot samples as what they are; the shape of an event decides.

    Images, (B, H, W) or (B, C, H, W) with 1 or 3 channels, become a grid of images. Points in the plane, (B, 2), become
    dots with contours of their density. Numbers, (B,) or (B, 1), become a histogram. Signals, (B, L) or (B, 1, L),
    become curves, of which the first 16 are drawn.

    Arguments:
        x: Samples.
        columns: Number of images in a line, by default about as many as lines.
        value_range: Values of black and of white, by default −1 and 1, and 0 and 255 for uint8; values beyond are cut.
        contours: Number of contours around points; 0 draws dots alone.
        ax: Axes to draw into, by default new ones.

    Example:
        >>> import torch, scoresde as ss
        >>> ss.plots.samples(torch.zeros(10, 3, 8, 8)).images[0].get_array().shape
        (26, 35, 3)
    """
    event = tuple(x.shape[1:])
    check.integer("contours", contours, at_least=0)
    if value_range is None:
        value_range = (0.0, 255.0) if x.dtype == torch.uint8 else (-1.0, 1.0)
    if not value_range[0] < value_range[1]:
        raise ValueError(f"`value_range` must be (black, white) with black < white, got {value_range}.")
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"`x` must have shape (B, *event) with at least one sample, got {tuple(x.shape)}.")
    if not bool(x.isfinite().any()):
        raise ValueError("`x` holds no finite number, so there is nothing to draw.")
    if is_image(event) and event[-2] > 1:
        wide = math.ceil(math.sqrt(len(x))) if columns is None else check.integer("columns", columns, at_least=1)
        picture = tiles(x, wide, value_range)
        ax = axes_or_new(ax, _fitting(picture))
        show_tiles(ax, picture)
        return ax
    ax = axes_or_new(ax)
    flat = array(x.reshape(len(x), -1))
    if math.prod(event) == 1:
        ax.hist(flat[:, 0], bins=max(10, min(80, round(len(x) ** 0.5))), density=True, alpha=0.7)
        ax.set(xlabel="x", ylabel="density")
    elif event == (2,):
        ax.plot(flat[:, 0], flat[:, 1], ".", ms=max(2.0, 9 - len(x) ** 0.25), alpha=0.5, mew=0)
        if contours and len(x) >= 50:
            _contour(ax, x, contours)
        ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    elif len(event) == 1 or (len(event) == 2 and event[0] == 1):
        ax.plot(flat[:MOST_SIGNALS].T, lw=1, alpha=0.8)
        ax.set(xlabel="entry", ylabel="x")
    else:
        raise ValueError(
            f"`x` must hold images with 1 or 3 channels, points, signals or numbers, got events of shape {event}; "
            "choose the channels to draw, as in x[:, :3]."
        )
    return ax


def _fitting(picture: Tensor) -> tuple[float, float]:
    """Size of a figure with the shape of a picture."""
    height, width = picture.shape[:2]
    return 6.0, max(0.6, 6.0 * height / width)


def _contour(ax: Axes, x: Tensor, count: int, bins: int = 40) -> None:
    """Contours of a density of points, from a histogram smoothed by a Gaussian of about one bin."""
    points = x.detach().to("cpu", torch.float64)
    points = points[points.isfinite().all(1)]
    low, high = points.amin(0), points.amax(0)
    room = 0.1 * (high - low).clamp_min(1e-9)
    edges = [
        torch.linspace(float(a), float(b), bins + 1, dtype=torch.float64)
        for a, b in zip(low - room, high + room, strict=True)
    ]
    counts = torch.histogramdd(points, edges).hist
    offsets = torch.arange(-4, 5, dtype=torch.float64)
    bell = torch.exp(-0.5 * (offsets / 1.3) ** 2)
    bell = bell / bell.sum()
    smooth = torch.nn.functional.conv2d(counts[None, None], torch.outer(bell, bell)[None, None], padding=4)[0, 0]
    middles = [0.5 * (edge[1:] + edge[:-1]) for edge in edges]
    levels = torch.linspace(0, float(smooth.max()), count + 2, dtype=torch.float64)[1:-1]
    ax.contour(*map(array, middles), array(smooth.T), levels=levels.tolist(), colors="black", linewidths=0.7, alpha=0.6)
