"""In which order data is seen: a function of seed and step, so that resuming needs no more than the step.

Epochs are laid end to end, each in an order of its own, and a batch is the next rows of that line: none is dropped,
none is short, and a batch may be larger than the data.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader

from scoresde import _checks as check


def stream(seed: int, name: str, k: int) -> int:
    """A 63-bit seed of its own for the k-th use of a name.

    Arguments:
        seed: The seed of a run.
        name: For what.
        k: Which.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {name} {k}".encode(), digest_size=8).digest(), "big") >> 1


class DataOrder:
    """Rows of each step's batch.

    Arguments:
        n: Size of the data.
        batch: Size of a batch.
        seed: An integer.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n = check.integer("n", n, least=1)
        self.batch = check.integer("batch", batch, least=1)
        self.seed = seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def rows(self, step: int) -> Tensor:
        """Indices into the data, (batch,)."""
        first, parts = step * self.batch, []
        end = first + self.batch
        while first < end:
            epoch, k = divmod(first, self.n)
            taken = min(end - first, self.n - k)
            parts.append(self._of(epoch)[k : k + taken])
            first += taken
        return torch.cat(parts)

    def _of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream(self.seed, "epoch", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=generator)
        return self._permutation


def parts(order: DataOrder, step: int, part: int, of: int, count: int) -> Iterator[Tensor]:
    """From a step on, without end: the rows of this process, in `count` parts a step.

    Arguments:
        order: Whose rows.
        step: The first step.
        part: Number of this process.
        of: How many processes there are.
        count: Parts of each process' share, for gradient accumulation.
    """
    n = order.batch // (of * count)
    for k in itertools.count(step):
        rows = order.rows(k)
        for m in range(count):
            first = (m * of + part) * n
            yield rows[first : first + n]


def batches(data: Any, rows: Iterator[Tensor], *, workers: int = 0, pin: bool = False) -> Iterator[Any]:
    """Data at rows.

    Arguments:
        data: A tensor (N, …), a dictionary or tuple of them, or a data set with ``len`` and integer indices.
        rows: Indices, batch by batch.
        workers: Processes that fetch from a data set.
        pin: Whether to page-lock what a data set returns, for a GPU.
    """
    if _tensors(data):
        for index in rows:
            yield tree_map(lambda leaf, index=index: leaf[index.to(leaf.device)], data)
        return
    # A generator of its own: a DataLoader takes a number from torch's global one each time it is started.
    sampler: Sequence[Any] = _Lists(rows)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    yield from DataLoader(data, batch_sampler=sampler, num_workers=workers, pin_memory=pin, generator=generator)


def size(data: Any) -> int:
    """How many samples there are.

    Arguments:
        data: As in :func:`batches`.
    """
    if _tensors(data):
        sizes = {len(leaf) for leaf in tree_leaves(data)}
        if len(sizes) != 1:
            raise ValueError(f"`data` must have tensors of one length, got {sorted(sizes)}.")
        return sizes.pop()
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"`data` must be a tensor, tensors by name, or a data set with len and indices, got {type(data).__name__}; "
            f"a stream has no order to resume: train on it with a loop of your own."
        )
    return len(data)


def _tensors(data: Any) -> bool:
    leaves = tree_leaves(data)
    return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves)


class _Lists:
    def __init__(self, rows: Iterator[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.rows:
            yield index.tolist()
