r"""Differences between an image and its restoration: PSNR and SSIM."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked

__all__ = ["psnr", "ssim"]


@checked
def psnr(x: Tensor, y: Tensor, value_range: tuple[float, float] = (-1.0, 1.0)) -> Tensor:
    r"""Peak signal-to-noise ratio of each image in decibels, (B,).

    .. math:: 10 \log_{10} \frac{(\text{high} - \text{low})^2}{\mathrm{mean}\,(x - y)^2}

    The mean over a set is the mean of these numbers, and not the number of the mean error.

    Arguments:
        x: Images, (B, *event).
        y: Images to compare with, (B, *event).
        value_range: Values of black and of white.

    Example:
        >>> import torch
        >>> psnr(torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.2))
        tensor([20.], dtype=torch.float64)
    """
    x, y, width = _images(x, y, value_range)
    error = (x - y).square().flatten(1).mean(1)
    return 10 * torch.log10(width**2 / error)


@checked
def ssim(x: Tensor, y: Tensor, value_range: tuple[float, float] = (-1.0, 1.0), size: int = 11) -> Tensor:
    r"""Structural similarity of each image, (B,); 1 for equal images.

    .. math::
        \mathrm{mean}\ \frac{(2\mu_x\mu_y + c_1)(2 c_{xy} + c_2)}{(\mu_x^2 + \mu_y^2 + c_1)(v_x + v_y + c_2)},
        \qquad c_1 = (0.01\,w)^2, \quad c_2 = (0.03\,w)^2

    Means μ, variances v and covariances c are those of a Gaussian window around a pixel, with a standard deviation of
    1.5 pixels, and w is the width of `value_range`. The mean runs over windows inside the image, and over channels.

    Arguments:
        x: Images, (B, C, H, W) or (B, H, W).
        y: Images to compare with.
        value_range: Values of black and of white.
        size: Number of pixels along a side of the window, odd.

    References:
        | Image Quality Assessment: From Error Visibility to Structural Similarity (Wang et al., 2004),
          doi:10.1109/TIP.2003.819861

    Example:
        >>> import torch
        >>> x = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)
        >>> ssim(x, x)
        tensor([1.], dtype=torch.float64)
    """
    x, y, width = _images(x, y, value_range)
    if x.ndim not in (3, 4):
        raise ValueError(f"`x` must have shape (B, C, H, W) or (B, H, W), got {tuple(x.shape)}.")
    if check.integer("size", size, at_least=1) % 2 == 0 or size > min(x.shape[-2:]):
        raise ValueError(f"`size` must be odd and at most the sides of the images, {tuple(x.shape[-2:])}, got {size}.")
    B, H, W = len(x), *x.shape[-2:]
    offsets = torch.arange(size, dtype=x.dtype, device=x.device) - size // 2
    bell = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    bell = bell / bell.sum()
    planes = torch.stack([x, y, x * x, y * y, x * y]).reshape(-1, 1, H, W)
    local = torch.nn.functional.conv2d(planes, bell[None, None, :, None])
    local = torch.nn.functional.conv2d(local, bell[None, None, None, :])
    mx, my, xx, yy, xy = local.reshape(5, B, -1)
    c1, c2 = (0.01 * width) ** 2, (0.03 * width) ** 2
    levels = (2 * mx * my + c1) / (mx**2 + my**2 + c1)
    structure = (2 * (xy - mx * my) + c2) / (xx - mx**2 + yy - my**2 + c2)
    similarity: Tensor = (levels * structure).mean(1)
    return similarity


def _images(x: Tensor, y: Tensor, value_range: tuple[float, float]) -> tuple[Tensor, Tensor, float]:
    """Check two sets of images; return them in float64 (in float32 off the CPU), and the width of the range."""
    check.match("y", y, "x", check.state("x", x))
    low, high = value_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"`value_range` must be (black, white) with black < white, got {value_range}.")
    dtype = torch.float64 if x.device.type == "cpu" else x.dtype
    return x.to(dtype), y.to(dtype), high - low
