"""What all pictures share: new axes, images side by side, and numbers as NumPy arrays."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FAINT = "0.7"  # grey of lines that only guide the eye


def axes_or_new(ax: Axes | None, size: tuple[float, float] | None = None) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is not None:
        if not hasattr(ax, "plot"):
            raise TypeError(f"`ax` must be axes of matplotlib, such as plt.gca(), got {type(ax).__name__}.")
        return ax
    pyplot = _pyplot()
    made: Axes = pyplot.subplots(figsize=size)[1]
    return made


def figure_or_new(figure: Figure | None, size: tuple[float, float]) -> Figure:
    """The given figure without its old axes, or a new one."""
    if figure is not None:
        if not hasattr(figure, "subplots"):
            raise TypeError(f"`figure` must be a figure of matplotlib, such as plt.gcf(), got {type(figure).__name__}.")
        figure.clear()
        return figure
    made: Figure = _pyplot().figure(figsize=size)
    return made


def array(x: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Numbers of a tensor for matplotlib: on the CPU, in float64, without gradients."""
    numbers: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = x.detach().to("cpu", torch.float64).numpy()
    return numbers


def is_image(event: tuple[int, ...]) -> bool:
    """Whether an event is an image: (1 or 3 channels, H, W), or (H, W)."""
    return len(event) == 2 or (len(event) == 3 and event[0] in (1, 3))


def tiles(images: Tensor, columns: int, value_range: tuple[float, float]) -> Tensor:
    """Images side by side, with a white line between them.

    Arguments:
        images: Images, (N, C, H, W) or (N, H, W).
        columns: Number of images in a line.
        value_range: Values of black and of white; values beyond them are cut.

    Returns:
        One picture, (height, width, C) with values from 0 to 1.
    """
    low, high = value_range
    x = images.detach().to("cpu", torch.float64)
    x = x[:, None] if x.ndim == 3 else x
    x = ((x - low) / (high - low)).clamp(0, 1).nan_to_num(nan=1.0)
    N, C, H, W = x.shape
    lines = math.ceil(N / columns)
    padded = torch.ones(lines * columns, C, H + 1, W + 1, dtype=x.dtype)
    padded[:N, :, :H, :W] = x
    picture = padded.reshape(lines, columns, C, H + 1, W + 1).permute(0, 3, 1, 4, 2)
    return picture.reshape(lines * (H + 1), columns * (W + 1), C)[:-1, :-1]


def show_tiles(ax: Axes, picture: Tensor) -> None:
    """Draw a picture without ticks."""
    ax.imshow(picture.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _pyplot() -> ModuleType:
    try:
        import matplotlib.pyplot as pyplot
    except ImportError:
        raise ImportError(
            "scoresde.plots needs matplotlib, which is not installed; install it with `pip install 'scoresde[plot]'`."
        ) from None
    return pyplot
