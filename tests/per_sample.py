"""Denoisers with data of each sample, built for any selection of the samples without ``rows``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import scoresde as ss
from scoresde._checks import expand
from scoresde.denoisers.base import AbstractDenoiser

F64 = torch.float64
SIZE = 5
MIX = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0, 0.5], [1.0, 0.0], [0.2, -0.8]], dtype=F64), std=0.3)
SHIFT = torch.linspace(-1, 1, SIZE, dtype=F64)[:, None] * torch.tensor([1.0, -0.5], dtype=F64)
SCALE = torch.linspace(0.5, 2.0, SIZE, dtype=F64)
Y = torch.linspace(-1, 1, SIZE, dtype=F64)[:, None]
X = ss.Noise(7).normal((SIZE, 2), 0, dtype=F64)


class Shifted(AbstractDenoiser):
    """The exact denoiser of data that are moved by `shift`."""

    def x0(self, x: Tensor, t: float | Tensor, *, shift: Tensor | float = 0.0, **cond: object) -> Tensor:
        assert not isinstance(shift, Tensor) or len(shift) == len(x), "conditions follow their samples"
        return MIX.x0(x - expand(self.sde.alpha(t), x) * shift, t) + shift


def guided(rows: slice) -> AbstractDenoiser:
    return ss.ClassifierFree(Shifted(MIX.sde), SCALE[rows], null={"shift": 0.0}).given(shift=SHIFT[rows])


def measurement(rows: slice) -> ss.inverse.Measurement:
    return ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), Y[rows], std=0.3)


MODELS: dict[str, Callable[[slice], AbstractDenoiser]] = {
    "condition": lambda rows: Shifted(MIX.sde).given(shift=SHIFT[rows]),
    "guidance": guided,
    "MMPS": lambda rows: ss.inverse.MMPS(MIX, measurement(rows)),
    "PiGDM": lambda rows: ss.inverse.PiGDM(MIX, measurement(rows)),
    "DPS": lambda rows: ss.inverse.DPS(MIX, measurement(rows), scale=0.2 * SCALE[rows]),
}
