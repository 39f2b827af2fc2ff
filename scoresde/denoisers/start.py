"""The start of a run: a sample of the prior at the first time, or a given state."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import AbstractDenoiser
from scoresde.denoisers.gaussian import Gaussian, check_gaussian
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream


@checked
@dataclass(frozen=True)
class Start:
    """Initial state of a run.

    Arguments:
        data_std: Standard deviation of the data, for the prior.
        gaussian: Gaussian whose flow carries a standard normal from T to the first time, without a network evaluation.
        dtype: Dtype of the state when a shape is given; by default float64 if the model has float64 parameters, else
            float32.
        device: Device of the state when a shape is given; by default the device of the model's parameters and buffers.

    A state of images is drawn in ``channels_last`` if the model's convolutions are.
    """

    data_std: float = 1.0
    gaussian: Gaussian | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def __post_init__(self) -> None:
        check.number("data_std", self.data_std, above=0)
        if self.dtype is not None:
            check.dtype("dtype", self.dtype)

    def draw(
        self, model: AbstractDenoiser, shape_or_x: Sequence[int] | Tensor, t: float | Tensor, noise: Noise
    ) -> Tensor:
        """The state at the first time `t`.

        Arguments:
            model: A denoiser.
            shape_or_x: Shape (B, *event) to draw from the prior, or a state: at `t`, or at T with a `gaussian`.
            t: First time: a number, or a tensor that holds one number for each sample.
            noise: Noise of the run; the start has a stream of its own.
        """
        if self.gaussian is not None:
            check_gaussian("start", self.gaussian, model.sde)
        if isinstance(shape_or_x, Tensor):
            x = check.state("x", shape_or_x)
            return x if self.gaussian is None else self.gaussian.flow(x, model.sde.T, t)
        shape = check.shape("shape_or_x", shape_or_x)
        if isinstance(t, Tensor):
            if bool((t != t.reshape(-1)[0]).any()):
                raise ValueError(
                    "samples that start at different times have no common prior; give a state, not a shape."
                )
            t = float(t.detach().reshape(-1)[0])
        if self.gaussian is not None:
            return self.gaussian.carry(self.normals(model, shape, noise), t)
        dtype, device = self.placement(model)
        source = noise.fork(Stream.START)
        x = model.sde.prior(t, std=self.data_std).sample(shape, source, dtype=dtype, device=device)
        return x.to(memory_format=torch.channels_last) if len(shape) == 4 and _is_channels_last(model) else x

    def normals(self, model: nn.Module, shape: Sequence[int], noise: Noise) -> Tensor:
        """Standard normals of a start: those that the prior is scaled from.

        Arguments:
            model: Model that the dtype and device follow.
            shape: Shape (B, *event).
            noise: Noise of the run.
        """
        dtype, device = self.placement(model)
        shape = check.shape("shape_or_x", shape)
        return noise.fork(Stream.START).normal(shape, 0, dtype=dtype, device=device)

    def placement(self, model: nn.Module) -> tuple[torch.dtype, torch.device | str]:
        """Dtype and device of a state that is drawn for a model."""
        first = next(itertools.chain(model.parameters(), model.buffers()), None)
        device = self.device or (torch.device("cpu") if first is None else first.device)
        double = any(p.dtype == torch.float64 for p in model.parameters())
        return self.dtype or (torch.float64 if double else torch.float32), device


def as_start(start: Start | Gaussian | None) -> Start:
    """A start from what users give: a :class:`Start`, a :class:`Gaussian`, or None for the default."""
    if start is None:
        return Start()
    if isinstance(start, Gaussian):
        return Start(gaussian=start)
    if not isinstance(start, Start):
        raise TypeError(f"`start` must be a Start, a Gaussian or None, got {type(start).__name__}.")
    return start


def _is_channels_last(model: nn.Module) -> bool:
    """Whether the first kernel of a convolution is in channels_last."""
    kernel = next((p for p in model.parameters() if p.ndim == 4 and p.shape[1:] != (p.shape[1], 1, 1)), None)
    return kernel is not None and not kernel.is_contiguous() and kernel.is_contiguous(memory_format=torch.channels_last)
