"""Denoisers whose networks are wrapped in ``DistributedDataParallel``.

The forward pass of this wrapper may wait for the other ranks. Where ranks make different numbers of evaluations, they
would wait forever.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from scoresde.denoisers.base import AbstractDenoiser


def unwrap_ddp(model: AbstractDenoiser) -> AbstractDenoiser:
    """The denoiser with every network taken out of ``DistributedDataParallel``; itself where there is no such network.

    Arguments:
        model: Denoiser; it is not changed.
    """

    def unwrap(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return unwrap(module.module)
        if not _wraps(module):
            return module
        twin = copy.copy(module)
        twin._modules = {name: child and unwrap(child) for name, child in module._modules.items()}
        return twin

    out = unwrap(model)
    assert isinstance(out, AbstractDenoiser)
    return out


def refuse_ddp(model: AbstractDenoiser) -> None:
    """Raise an error if there are several ranks and a network is wrapped in ``DistributedDataParallel``.

    Arguments:
        model: Denoiser of a method with error control.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1 and _wraps(model):
        raise ValueError(
            "the network is wrapped in DistributedDataParallel, and with error control the ranks make different "
            "numbers of evaluations, so ranks that wait for each other never end; make the denoiser from `net.module`."
        )


def _wraps(module: nn.Module) -> bool:
    return any(isinstance(part, nn.parallel.DistributedDataParallel) for part in module.modules())
