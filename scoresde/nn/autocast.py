"""Mixed precision around a network alone."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from scoresde._doors import checked

HALF = (torch.bfloat16, torch.float16)


@checked
class Autocast(nn.Module):
    """A network under ``torch.autocast``: float32 weights, half precision inside, and its input and output as they are.

    The solver's state stays in float32. Attributes that this module does not have are those of the network.

    Arguments:
        net: Network ``net(x, time, **cond)``.
        dtype: Dtype of the operations that autocast lowers: ``torch.bfloat16``, or ``torch.float16``.

    Example:
        >>> import torch, scoresde as ss
        >>> net = ss.nn.Autocast(ss.nn.MLP(2).eval())
        >>> model = ss.Denoiser(net, ss.VP(), predicts="v")
        >>> ss.sample(model, (4, 2), nfe=4, seed=0).dtype
        torch.float32
    """

    def __init__(self, net: nn.Module, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        if dtype not in HALF:
            raise ValueError(
                f"`dtype` must be torch.bfloat16 or torch.float16, got {dtype}; drop Autocast for float32."
            )
        self.net = net
        self.inner_dtype = dtype

    def extra_repr(self) -> str:
        return str(self.inner_dtype)

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return cast(Tensor | nn.Module, getattr(super().__getattr__("net"), name))

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Output of the network, in the dtype of `x`."""
        # The cache of autocast would keep tensors of one replay of a CUDA graph for the next.
        with torch.autocast(x.device.type, dtype=self.inner_dtype, cache_enabled=False):
            out: Tensor = self.net(x, *args, **kwargs)
        return out.to(x.dtype)
