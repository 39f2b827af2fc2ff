"""Limits on the data prediction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoiser import AbstractDenoiser
from scoresde.guidance.base import Wrapped


class Clamp(Wrapped):
    r"""Data known to lie in an interval: :math:`D = \mathrm{clip}(D, low, high)`.

    Arguments:
        model: The denoiser.
        low: Least value.
        high: Largest value.
    """

    def __init__(self, model: AbstractDenoiser, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__(model)
        self.low = check.number("low", low)
        self.high = check.number("high", high, above=self.low)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The clipped data prediction."""
        return self.model.x0(x, t, **cond).clamp(self.low, self.high)


class DynamicThreshold(Wrapped):
    r"""Dynamic thresholding: each sample is clipped at its own quantile and scaled back to the range of data.

    .. math:: D = \frac{m}{s}\,\mathrm{clip}(D, -s, s), \qquad s = \max(m, \mathrm{quantile}_q |D|)

    Per sample, over all numbers of its event. It is for pixels; latents have no range.

    Arguments:
        model: The denoiser.
        quantile: q.
        limit: m, the largest absolute value of data.

    References:
        | Photorealistic Text-to-Image Diffusion Models with Deep Language Understanding (Saharia et al., 2022),
          arXiv:2205.11487, section 2.3
    """

    def __init__(self, model: AbstractDenoiser, quantile: float = 0.995, limit: float = 1.0) -> None:
        super().__init__(model)
        self.quantile = check.number("quantile", quantile, above=0, most=1)
        self.limit = check.number("limit", limit, above=0)

    def x0(self, x: Tensor, t: float | Tensor, **cond: Any) -> Tensor:
        """The thresholded data prediction."""
        x0 = self.model.x0(x, t, **cond)
        flat = x0.flatten(1)
        rank = self.quantile * (flat.shape[1] - 1)
        low = math.floor(rank)
        # By the largest values alone: torch.quantile sorts everything, and refuses more than 2²⁴ numbers.
        top = flat.abs().topk(flat.shape[1] - low, dim=1).values
        s = torch.lerp(top[:, -1], top[:, -2], rank - low) if top.shape[1] > 1 else top[:, -1]
        s = s.clamp_min(self.limit)[:, None]
        return (torch.maximum(torch.minimum(flat, s), -s) * (self.limit / s)).reshape(x0.shape)
