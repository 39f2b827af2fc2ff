"""Networks with other calling conventions, behind the call ``net(x, time, **cond)`` of this library."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from scoresde._build import recorded
from scoresde.denoisers.base import Condition

Net = Callable[..., Tensor]


@recorded
class Adapted(nn.Module):
    """Base of the adapters: casts conditions to the network's dtype, calls the network, and returns its tensor.

    A subclass writes :meth:`call`. A floating condition is cast, inside dictionaries, tuples and lists too; a condition
    of integers or booleans is not.

    Arguments:
        net: Network.
        sign: Factor of the output, 1 or −1.
        uncast: Names of conditions that keep their dtype, such as positions.
    """

    def __init__(self, net: Net, *, sign: int = 1, uncast: tuple[str, ...] = ()) -> None:
        if not callable(net):
            raise TypeError(f"`net` must be a module or a function net(x, time, **cond), got {type(net).__name__}.")
        super().__init__()
        self.net = net
        self.sign = sign
        self.uncast = uncast

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype in which the network computes, or None if it has no floating parameters."""
        return dtype_of(self.net)

    def forward(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        dtype = self.dtype
        if dtype is not None:
            x = x.to(dtype)
            cond = {name: c if name in self.uncast else cast_floats(c, dtype) for name, c in cond.items()}
        out = self.call(x, t, **cond)
        return out if self.sign > 0 else -out

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        """Output of the network at the state `x` and the label `t`, (B,)."""
        return self.net(x, t, **cond)


def dtype_of(net: object) -> torch.dtype | None:
    """Dtype that a network declares, as diffusers' models do, or that of its first floating parameter."""
    declared = getattr(net, "dtype", torch.dtype)
    if declared is None or isinstance(declared, torch.dtype):
        return declared if declared is not None and declared.is_floating_point else None
    parameters: Iterator[Tensor] = net.parameters() if isinstance(net, nn.Module) else iter(())
    return next((p.dtype for p in parameters if p.is_floating_point()), None)


def cast_floats(tree: Condition, dtype: torch.dtype) -> Condition:
    """A condition with its floating tensors in another dtype.

    Arguments:
        tree: Tensor, a tree of tensors, or any value.
        dtype: New dtype.
    """

    def cast(leaf: Condition) -> Condition:
        return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return cast(tree) if isinstance(tree, Tensor) else tree_map(cast, tree)
