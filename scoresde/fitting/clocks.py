"""Whether a fit can move times: whether autograd sees how a network depends on its time."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from scoresde.denoisers.base import AbstractDenoiser, Condition
from scoresde.denoisers.network import Denoiser

_PAIRS = 4  # largest number of pairs of times


class _Call(NamedTuple):
    """Inputs of a network in one evaluation."""

    net: Callable[..., Tensor]
    x: Tensor
    time: Tensor
    cond: dict[str, Condition]


class _Recorder(nn.Module):
    """A network that notes its inputs."""

    def __init__(self, net: Callable[..., Tensor], calls: list[_Call]) -> None:
        super().__init__()
        self.net, self.calls = net, calls

    def forward(self, x: Tensor, time: Tensor, **cond: Condition) -> Tensor:
        self.calls.append(_Call(self.net, x.detach(), time, cond))
        return self.net(x, time, **cond)


def hides_time(model: AbstractDenoiser, x: Tensor, times: Sequence[float]) -> bool:
    """Whether a network changes with its time while autograd sees no derivative: its labels are rounded or detached.

    The derivative of the network with respect to the time, at a fixed input, is compared with the change of its output
    between two times. A denoiser without a network is compared itself.

    Arguments:
        model: Denoiser.
        x: States, (B, *event), of which two are evaluated.
        times: At least two times.
    """
    index = torch.arange(min(2, len(x)))
    calls: list[_Call] = []
    probe, x = _recording(model.rows(index), calls), x[: len(index)]
    assert isinstance(probe, AbstractDenoiser)
    changes = slopes = False
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about float(time), which is what this function looks for
        for s, t in list(pairwise(times))[:_PAIRS]:
            here, there = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (s, t))
            outputs = probe.x0(x, here), probe.x0(x, there)
            if calls:
                half = len(calls) // 2
                both = list(zip(calls[:half], calls[half:], strict=True))
                pairs = [(a.net(a.x, a.time, **a.cond), a.net(a.x, b.time, **a.cond)) for a, b in both]
                calls.clear()
            else:
                pairs = [outputs]
            changes |= any(_differ(a, b) for a, b in pairs)
            slopes |= any(_slope(a, here) for a, _ in pairs)
    return changes and not slopes


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-6 * a.abs().max())


def _slope(out: Tensor, t: Tensor) -> bool:
    """Whether autograd sees that an output depends on a time."""
    if not out.requires_grad:
        return False
    weights = torch.arange(1, out.numel() + 1, dtype=out.dtype, device=out.device).cos().reshape(out.shape)
    (slope,) = torch.autograd.grad((out * weights).sum(), t, allow_unused=True)
    return slope is not None and bool(slope != 0)


def _recording(module: nn.Module, calls: list[_Call]) -> nn.Module:
    """A shallow copy of a denoiser whose networks note their inputs."""
    if not any(isinstance(part, Denoiser) for part in module.modules()):
        return module
    twin = copy.copy(module)
    if isinstance(module, Denoiser):
        twin._modules = {name: part for name, part in module._modules.items() if name != "net"}
        vars(twin).pop("net", None)
        twin.net = _Recorder(module.net, calls)
        return twin
    twin._modules = {name: part and _recording(part, calls) for name, part in module._modules.items()}
    return twin
