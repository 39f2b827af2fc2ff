"""The start of a run: a sample of the prior at the first time, or a given state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian, check_gaussian
from scoresde.noise.keyed import Noise

_START, _ROWS = 0, 1  # streams of a seed: the start, and the normals of the rows


def draw_start(
    model: AbstractDenoiser,
    shape_or_x: Any,
    t: Any,
    noise: Noise,
    std: float,
    dtype: torch.dtype,
    device: torch.device | str | None,
    gaussian: Gaussian | None = None,
) -> Tensor:
    if gaussian is not None:
        check_gaussian("start", gaussian, model.sde)
    if isinstance(shape_or_x, Tensor):
        x = check.state("x", shape_or_x)
        return x if gaussian is None else gaussian.flow(x, model.sde.T, t)
    if not isinstance(shape_or_x, Sequence) or not len(shape_or_x):
        raise ValueError(f"`shape_or_x` must be a state or a shape (B, *event), got {shape_or_x!r}.")
    shape = tuple(check.integer("shape", n) for n in shape_or_x)
    if isinstance(t, Tensor):
        if bool((t != t.reshape(-1)[0]).any()):
            raise ValueError("samples that start at different times have no common prior; give a state, not a shape.")
        t = float(t.detach().reshape(-1)[0])
    where = device_of(model) if device is None else device
    if gaussian is not None:
        return gaussian.carry(noise.fork(_START).normal(shape, 0, dtype=dtype, device=where), t)
    return model.sde.prior(t, std=std).sample(shape, noise.fork(_START), dtype=dtype, device=where)


def device_of(model: AbstractDenoiser) -> torch.device:
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device
