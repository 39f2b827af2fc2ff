"""A denoiser prepared for a run: all that does not depend on the state is computed before the first evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from scoresde import _checks as check
from scoresde.denoisers.base import Condition


class Coefficients(NamedTuple):
    """Numbers of a network at the times of a run, one for each evaluation.

    Arguments:
        p: Coefficient of the state in the data prediction.
        q: Coefficient of the output of the network.
        c_in: Scale of the input of the network.
        labels: Time input of the network.
    """

    p: tuple[float, ...]
    q: tuple[float, ...]
    c_in: tuple[float, ...]
    labels: tuple[float, ...]


def label_rows(labels: Sequence[float], x: Tensor) -> tuple[Tensor, ...]:
    """Time inputs of a network for a whole run, each float32 (B,): one tensor that is moved to the device once.

    Arguments:
        labels: Time input of each evaluation.
        x: State, which gives the batch size and the device.
    """
    rows = torch.tensor(labels, dtype=torch.float32, device="cpu")[:, None]
    # The copy does not block the host: CUDA copies the numbers out of pageable memory before the call returns.
    return rows.to(x.device, non_blocking=True).repeat(1, len(x)).unbind(0)


class Evaluation:
    """Evaluations of a network in a run: one cast of the input, the network, and one cast of the output.

    Arguments:
        net: Network ``net(x, time, **cond)``.
        numbers: Numbers of the network at the times of the run.
        dtype: Dtype of the input of the network, or None for that of the state.
        cond: Conditions as the network receives them.
        x: Initial state, which gives the batch size and the device.
        check_output: Function of an output and its state that raises an error if the output does not fit.
        halve: Whether the second half of the channels is a variance, which is dropped.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        numbers: Coefficients,
        dtype: torch.dtype | None,
        cond: Mapping[str, Condition],
        x: Tensor,
        check_output: Callable[[object, Tensor], None],
        halve: bool = False,
    ) -> None:
        self.net, self.dtype, self.halve = net, dtype, halve
        self.labels = label_rows(numbers.labels, x)
        self.c_in = numbers.c_in if any(c != 1 for c in numbers.c_in) else None
        self.check_output = check_output
        self.shape: torch.Size | None = None
        leaves = [leaf for tree in cond.values() for leaf in tensors_of(tree)]
        if not torch.compiler.is_compiling() and any(leaf.is_inference() for leaf in leaves):
            cond = tree_map(lambda leaf: check.protected(leaf) if isinstance(leaf, Tensor) else leaf, dict(cond))
        self.cond = dict(cond)
        self.received = [(name, leaf) for name, tree in self.cond.items() for leaf in tensors_of(tree)]

    def __call__(self, x: Tensor, n: int) -> Tensor:
        """The output of the network, in the dtype of the state.

        Arguments:
            x: State, (B, *event).
            n: Number of the evaluation.
        """
        net_x = x if self.c_in is None else x * self.c_in[n]
        if self.dtype is not None and self.dtype is not x.dtype:
            net_x = net_x.to(self.dtype)
        elif net_x is x:
            net_x = check.protected(x)
        watched = [("state", "x", x)] if net_x is x and not torch.compiler.is_compiling() else []
        watched += [(f"condition `{name}`", name, leaf) for name, leaf in self.received]
        before = [check.writes(leaf) for *_, leaf in watched]
        out = self.net(net_x, self.labels[n], **self.cond)
        if self.shape is None or not isinstance(out, Tensor) or out.shape != self.shape:
            self.check_output(out, x)
            self.shape = out.shape
        for (what, copy, leaf), count in zip(watched, before, strict=True):
            check.refuse_writes(leaf, count, "`net`", self.net, what=what, copy=copy)
        if out.dtype is not x.dtype:
            out = out.to(x.dtype)
        return out.chunk(2, dim=1)[0] if self.halve else out


def tensors_of(tree: Condition) -> list[Tensor]:
    """Tensors of a condition, which is a tensor or a tree."""
    return [tree] if isinstance(tree, Tensor) else [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
