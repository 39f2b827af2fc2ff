r"""The scale of data: standardise it, and undo that with the exact log-determinant.

Schedules and preconditioning assume a standard deviation; data on another scale trains on the wrong noise levels
without a word. Knows nothing of processes.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from scoresde import _checks as check


@dataclass(frozen=True, eq=False)
class Standardize:
    r"""An affine map of data to mean 0 and standard deviation `target`.

    .. math:: z = s\,(x - \mu)/\varsigma, \qquad \log p_X(x) = \log p_Z(z) + \log\left|\det\frac{dz}{dx}\right|

    Arguments:
        mean: μ, a tensor that broadcasts to an event.
        std: ς, likewise, positive.
        target: s, the standard deviation of what comes out: ``sigma_data`` of a preconditioned network.

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
                "`std` must be positive; an entry of the data that never varies has no scale: drop it, or fit with "
                "per='scalar'."
            )
        check.number("target", self.target, above=0)

    @classmethod
    def fit(cls, data: Tensor, per: str = "scalar", target: float = 1.0) -> Standardize:
        """Measure a data set.

        Arguments:
            data: (N, *event), N ≥ 2.
            per: ``"scalar"``, one mean and scale for all entries, which keeps their proportions (images);
                ``"channel"``, one for each index of the first event axis; ``"entry"``, one for each entry (tables).
            target: Standard deviation of what comes out.
        """
        check.state("data", data)
        check.choice("per", per, ("scalar", "channel", "entry"))
        if data.ndim < 2 or len(data) < 2 or data.numel() == 0:
            raise ValueError(f"`data` must have shape (N, *event) with N >= 2, got {tuple(data.shape)}.")
        axes = {"scalar": tuple(range(data.ndim)), "channel": (0, *range(2, data.ndim)), "entry": (0,)}[per]
        wide = _finite(data)
        mean = wide.mean(axes, keepdim=True)[0]
        std = (wide - mean).square().mean(axes, keepdim=True)[0].sqrt()
        # The mean of equal numbers is not always that number: rounding must not pass for variation.
        varies = wide.amax(axes, keepdim=True)[0] > wide.amin(axes, keepdim=True)[0]
        return cls(mean.to(data), (std * varies).to(data), target)

    def __call__(self, x: Tensor) -> Tensor:
        """Standardise `x`, (B, *event)."""
        mean, std = self._like(x)
        return (x - mean) * (self.target / std)

    def inverse(self, z: Tensor) -> Tensor:
        """Back to the data's own scale, (B, *event)."""
        mean, std = self._like(z)
        return mean + z * (std / self.target)

    def log_det(self, x: Tensor) -> float:
        """log det dz/dx of one event, in nats: add it to log p_Z(z) for log p_X(x), subtract it to go back."""
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
                f"`x` has events of shape {tuple(x.shape[1:])}, this scale was fitted to {tuple(self.std.shape)}."
            )
        return self.mean.to(x), self.std.to(x)


def suggest_sigma_max(data: Tensor, *, most: int = 2000, seed: int = 0) -> float:
    """The largest distance between two data: a noise level at which no datum is told from another.

    Arguments:
        data: (N, *event), N ≥ 2.
        most: Use at most this many data, drawn without replacement.
        seed: For which of them.

    References:
        | Improved Techniques for Training Score-Based Generative Models (Song & Ermon, 2020), arXiv:2006.09011,
          technique 1
    """
    if len(check.state("data", data)) < 2 or data.numel() == 0:
        raise ValueError(f"`data` must have shape (N, *event) with N >= 2, got {tuple(data.shape)}.")
    check.integer("most", most, least=2)
    rows = torch.randperm(len(data), generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[:most]
    x = _finite(data)[rows].reshape(len(rows), -1)
    x = x - x.mean(0)  # distances are taken from scalar products, which cancel far from the origin
    return float(torch.cdist(x, x).max())


def check_scale(data: Tensor, sigma_data: float = 1.0) -> float:
    """Standard deviation of `data` about its mean; warns when it is not within a factor 2 of `sigma_data`.

    Arguments:
        data: (N, *event).
        sigma_data: What the schedule or the preconditioning assumes.
    """
    if check.state("data", data).numel() == 0:
        raise ValueError(f"`data` must hold at least one number, got shape {tuple(data.shape)}.")
    check.number("sigma_data", sigma_data, above=0)
    std = float(_finite(data).std(correction=0))
    if not sigma_data / 2 <= std <= 2 * sigma_data:
        warnings.warn(
            f"the data has standard deviation {std:.3g}, the model assumes {sigma_data:.3g}: noise levels will be "
            f"wrong by that ratio; use Standardize.fit(data, target={sigma_data:g}) or set sigma_data={std:.3g}.",
            stacklevel=2,
        )
    return std


def _finite(data: Tensor) -> Tensor:
    """The data in float64, on the CPU since not every device has that."""
    wide = data.detach().cpu().double()
    if not bool(wide.isfinite().all()):
        row = int((~wide.isfinite()).reshape(len(wide), -1).any(1).nonzero()[0, 0])
        raise ValueError(f"`data` must be finite, but row {row} is not.")
    return wide
