"""Limits on the values of the data prediction: clipping and dynamic thresholding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde._printing import fields
from scoresde.denoisers.base import AbstractDenoiser, Condition, Wrapped


@checked
class Clamp(Wrapped):
    r"""Clipping to the range of the data: :math:`D = \mathrm{clip}(D, low, high)`.

    Arguments:
        model: Denoiser.
        low: Smallest value of the data.
        high: Largest value of the data.
    """

    def __init__(self, model: AbstractDenoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(model)
        self.low = check.number("low", low)
        self.high = check.number("high", high, above=self.low)

    def extra_repr(self) -> str:
        return fields(low=self.low, high=self.high)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        return self.model.x0(x, t, **cond).clamp(self.low, self.high)


@checked
class DynamicThreshold(Wrapped):
    r"""Dynamic thresholding: each sample is clipped at its own quantile and scaled back to the range of the data.

    .. math:: D = \frac{m}{s}\,\mathrm{clip}(D, -s, s), \qquad s = \max(m, \mathrm{quantile}_q |D|)

    The quantile is over all numbers of one sample. Use this for pixels; latents have no fixed range.

    Arguments:
        model: Denoiser.
        quantile: Quantile q, in (0, 1].
        limit: Largest absolute value m of the data.

    References:
        | Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022),
          arXiv:2205.11487, section 2.3
    """

    def __init__(self, model: AbstractDenoiser, quantile: float = 0.995, limit: float = 1.0) -> None:
        super().__init__(model)
        self.quantile = check.number("quantile", quantile, above=0, at_most=1)
        self.limit = check.number("limit", limit, above=0)

    def extra_repr(self) -> str:
        return fields(quantile=self.quantile, limit=self.limit)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Condition) -> Tensor:
        x0 = self.model.x0(x, t, **cond)
        flat = x0.flatten(1)
        rank = self.quantile * (flat.shape[1] - 1)
        low = math.floor(rank)
        # topk, because torch.quantile sorts all numbers and raises an error for more than 2²⁴ of them.
        top = flat.abs().topk(flat.shape[1] - low, dim=1).values
        s = torch.lerp(top[:, -1], top[:, -2], rank - low) if top.shape[1] > 1 else top[:, -1]
        s = s.clamp_min(self.limit)[:, None]
        return (torch.maximum(torch.minimum(flat, s), -s) * (self.limit / s)).reshape(x0.shape)
