r"""Standardisation of data, z = s (x − μ)/ς, with the exact log-determinant.

Schedules and preconditioning assume a standard deviation of the data. With data on another scale, a network trains on
the wrong noise levels without an error.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.noise.keyed import Noise, as_noise
from scoresde.noise.streams import Stream


@checked
@dataclass(frozen=True, eq=False)
class Standardize:
    r"""An affine map of data to mean 0 and standard deviation `target`.

    .. math:: z = s\,(x - \mu)/\varsigma, \qquad \log p_X(x) = \log p_Z(z) + \log\left|\det\frac{dz}{dx}\right|

    Arguments:
        mean: Mean μ, a tensor that broadcasts to an event.
        std: Standard deviation ς, a positive tensor that broadcasts to an event.
        target: Standard deviation s of z, default 1; use ``sigma_data`` of a preconditioned network.

    Example:
        >>> import torch
        >>> x = 3 + 2 * torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        >>> scale = Standardize.fit(x)
        >>> z = scale(x)
        >>> torch.allclose(scale.inverse(z), x, atol=1e-5), round(float(z.std()), 2)
        (True, 1.0)
    """

    mean: Tensor
    std: Tensor
    target: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.dtype not in check.FLOATS or not bool(value.isfinite().all()):
                raise ValueError(f"`{name}` must be a finite float tensor that broadcasts to an event, got {value!r}.")
        if bool((self.std <= 0).any()):
            raise ValueError(
                "`std` must be positive; if an entry of the data is constant, drop this entry, or fit with "
                "per='scalar'."
            )
        check.number("target", self.target, above=0)

    def __repr__(self) -> str:
        return f"Standardize({fields(mean=self.mean, std=self.std, target=self.target)})"

    @classmethod
    @checked
    def fit(cls, data: Tensor, per: str = "scalar", target: float = 1.0) -> Standardize:
        """Compute the mean and the standard deviation of a data set.

        Arguments:
            data: Data set, (N, *event), N ≥ 2.
            per: Scope of each mean and scale: ``"scalar"``, all entries, which preserves their proportions (images);
                ``"channel"``, an index of the first event axis; ``"entry"``, an entry (tables).
            target: Standard deviation of the standardised data, default 1.
        """
        check.state("data", data)
        check.choice("per", per, ("scalar", "channel", "entry"))
        if data.ndim < 2 or len(data) < 2 or data.numel() == 0:
            raise ValueError(f"`data` must have shape (N, *event) with N >= 2, got {tuple(data.shape)}.")
        axes = {"scalar": tuple(range(data.ndim)), "channel": (0, *range(2, data.ndim)), "entry": (0,)}[per]
        wide = _finite(data)
        mean = wide.mean(axes, keepdim=True)[0]
        std = (wide - mean).square().mean(axes, keepdim=True)[0].sqrt()
        # Rounding in the mean can give constant entries a positive standard deviation: set it to 0.
        varies = wide.amax(axes, keepdim=True)[0] > wide.amin(axes, keepdim=True)[0]
        return cls(mean.to(data), (std * varies).to(data), target)

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise `x`, (B, *event)."""
        mean, std = self._like(x)
        return (x - mean) * (self.target / std)

    @checked
    def inverse(self, z: Tensor) -> Tensor:
        """Map `z`, (B, *event), back to the scale of the data."""
        mean, std = self._like(z)
        return mean + z * (std / self.target)

    def log_det(self, x: Tensor) -> float:
        """log det dz/dx of one event, in nats: log p_X(x) is log p_Z(z) plus this number."""
        self._like(x)
        scale = math.log(self.target) - self.std.cpu().double().log()
        return float(scale.expand(x.shape[1:]).sum())

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        check.state("x", x)
        try:
            fits = torch.broadcast_shapes(self.std.shape, self.mean.shape, x.shape[1:]) == x.shape[1:]
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"`x` has events of shape {tuple(x.shape[1:])}, but `std` has shape {tuple(self.std.shape)}; fit again."
            )
        return self.mean.to(x), self.std.to(x)


@checked
def suggest_sigma_max(data: Tensor, *, max_samples: int = 2000, seed: int = 0) -> float:
    """Compute the largest distance between two samples, a noise level at which all samples overlap.

    Arguments:
        data: Data set, (N, *event), N ≥ 2.
        max_samples: Largest number of samples to use, default 2000, drawn without replacement.
        seed: Seed of the draw of these samples, default 0.

    References:
        | Improved Techniques for Training Score-Based Generative Models (Song & Ermon, 2020), arXiv:2006.09011,
          technique 1
    """
    if len(check.state("data", data)) < 2 or data.numel() == 0:
        raise ValueError(f"`data` must have shape (N, *event) with N >= 2, got {tuple(data.shape)}.")
    check.integer("max_samples", max_samples, at_least=2)
    rows = torch.randperm(len(data), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:max_samples]
    x = _finite(data)[rows].reshape(len(rows), -1)
    x = x - x.mean(0)  # cdist may use scalar products, which cancel far from the origin
    return float(torch.cdist(x, x).max())


@checked
def check_scale(data: Tensor, sigma_data: float = 1.0) -> float:
    """Compute the standard deviation of `data`; warn if it is not within a factor 2 of `sigma_data`.

    Images from −1 to 1, (N, 1 or 3, H, W), pass whatever their standard deviation, which
    is small for dark or pale ones. Images from 0 to 1 or to 255 raise a warning that says how to scale them.

    Arguments:
        data: Data set, (N, *event).
        sigma_data: Standard deviation that the schedule or the preconditioning assumes, default 1.
    """
    if check.state("data", data).numel() == 0:
        raise ValueError(f"`data` must hold at least one number, got shape {tuple(data.shape)}.")
    check.number("sigma_data", sigma_data, above=0)
    std = float(_finite(data).std(correction=0))
    if fix := check.unscaled_images(data):
        warnings.warn(f"`data` {fix}.", stacklevel=check.levels_to_user())
    elif not sigma_data / 2 <= std <= 2 * sigma_data and not check.looks_like_images(data):
        warnings.warn(
            f"`data` has standard deviation {std:.3g}, the model assumes {sigma_data:.3g}: the noise levels are "
            f"wrong by that ratio; use Standardize.fit(data, target={sigma_data:g}) or set sigma_data={std:.3g}.",
            stacklevel=check.levels_to_user(),
        )
    return std


def _finite(data: Tensor) -> Tensor:
    """Return finite data in float64, on the CPU because some devices have no float64."""
    wide = data.detach().cpu().double()
    if not bool(wide.isfinite().all()):
        row = int((~wide.isfinite()).reshape(len(wide), -1).any(1).nonzero()[0, 0])
        raise ValueError(f"`data` must be finite, but row {row} is not.")
    return wide


@checked
def bin_width(levels: int, interval: tuple[float, float]) -> float:
    """Width of one of `levels` equal bins of `interval`."""
    low, high = (check.number("interval", edge) for edge in interval)
    if high <= low:
        raise ValueError(f"`interval` must be (low, high) with low < high, got {interval}.")
    return (high - low) / check.integer("levels", levels, at_least=2)


@checked
def dequantize(
    images: Tensor,
    levels: int,
    interval: tuple[float, float] = (-1.0, 1.0),
    *,
    seed: int | Sequence[int] | Noise | None = None,
    draw: int = 0,
    middle: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Integers 0 … levels − 1 as numbers drawn uniformly from their bins of `interval`.

    Arguments:
        images: Integers, (B, *event).
        levels: Number of values.
        interval: Interval that the bins divide.
        seed: Seed: an integer, one for each sample, or a :class:`Noise`.
        draw: Number of the draw of this seed.
        middle: True for the middle of each bin, without noise.
        dtype: Dtype of the result, float32 or float64.
    """
    if not isinstance(images, Tensor) or images.is_floating_point() or images.is_complex():
        raise TypeError("`images` must be a tensor of integers 0 … levels − 1.")
    width = bin_width(levels, interval)
    if images.device.type == "cpu" and images.numel() and not 0 <= int(images.min()) <= int(images.max()) < levels:
        raise ValueError(f"`images` must lie in 0 … {levels - 1}, got {int(images.min())} … {int(images.max())}.")
    noise = as_noise(seed).fork(Stream.DEQUANTIZE)
    shape = tuple(images.shape)
    offset = 0.5 if middle else noise.uniform(shape, draw, dtype=dtype, device=images.device)
    return interval[0] + width * (images.to(dtype) + offset)
