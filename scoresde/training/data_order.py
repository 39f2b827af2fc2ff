"""Order of the training data, as a function of the seed and the step, so that resuming needs only the step.

The permutations of all epochs form one sequence, and each batch is the next part of that sequence. No sample is
dropped, no batch is short, and a batch may be larger than the data.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves, tree_map
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import Condition
from scoresde.training import fingerprint
from scoresde.training.describe import describe


class DataSet(Protocol):
    """Samples with numbers, such as a torch data set with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> object: ...


Data = Tensor | Mapping[str, Tensor] | tuple[Tensor, ...] | DataSet | DataLoader[Any]

Unpack = Callable[[Any], tuple[Tensor, dict[str, Condition]]]


def stream(seed: int, name: str, k: int) -> int:
    """Return a 63-bit seed that depends on the seed of a run, a name and an index.

    Arguments:
        seed: Seed of the run.
        name: Purpose of the numbers, such as ``"noise"``.
        k: Index of the step or epoch.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {name} {k}".encode(), digest_size=8).digest(), "big") >> 1


class DataOrder:
    """Rows of the data in the batch of each step.

    Arguments:
        n: Number of samples in the data.
        batch: Number of samples in a batch.
        seed: Seed of the permutations, an integer.
    """

    def __init__(self, n: int, batch: int, seed: int) -> None:
        self.n = check.integer("n", n, at_least=1)
        self.batch = check.integer("batch", batch, at_least=1)
        self.seed = seed
        self._epoch, self._permutation = -1, torch.empty(0)

    def rows(self, step: int) -> Tensor:
        """Indices into the data for a step, (batch,)."""
        first, pieces = step * self.batch, []
        end = first + self.batch
        while first < end:
            epoch, k = divmod(first, self.n)
            taken = min(end - first, self.n - k)
            pieces.append(self._shuffled(epoch)[k : k + taken])
            first += taken
        return torch.cat(pieces)

    def _shuffled(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream(self.seed, "epoch", epoch))
            self._epoch, self._permutation = epoch, torch.randperm(self.n, generator=generator)
        return self._permutation


def parts(order: DataOrder, step: int, part: int, of: int, count: int) -> Iterator[Tensor]:
    """Yield the rows of one process from a step on, without end, in `count` parts per step.

    Arguments:
        order: Order of the whole batches.
        step: First step.
        part: Index of this process.
        of: Number of processes.
        count: Number of parts per step and process, for gradient accumulation.
    """
    n = order.batch // (of * count)
    for k in itertools.count(step):
        rows = order.rows(k)
        for m in range(count):
            first = (m * of + part) * n
            yield rows[first : first + n]


@checked
@dataclass(frozen=True, eq=False)
class Loader:
    """Data for the trainer, with options of loading.

    Arguments:
        data: Tensor (N, *event), a dictionary with the data as ``"x"`` and conditions by name, a data set with ``len``
            and integer indices, or a torch DataLoader. Of a DataLoader, everything but the order is used: the data set,
            the batch size, the function that collates, and the workers. The order is the trainer's, which is random,
            so a sampler with weights or parts is refused.
        unpack: Function that converts a batch to data and conditions, ``(x, {name: condition})``; needed if a batch is
            not a tensor, a tuple of one tensor, or a dictionary with ``"x"``.
        workers: Number of processes that load from a data set; :meth:`Trainer.resume` does not replay their random
            transforms.

    Example:
        >>> import torch
        >>> pairs = torch.utils.data.TensorDataset(torch.zeros(8, 2), torch.arange(8))
        >>> loader = Loader(pairs, unpack=lambda batch: (batch[0], {"label": batch[1]}))
        >>> x, cond = next(loader.batches(iter([torch.tensor([3, 5])]), torch.device("cpu")))
        >>> cond
        {'label': tensor([3, 5])}
    """

    data: Data
    unpack: Unpack | None = None
    workers: int = 0
    batch: int | None = field(default=None, init=False)
    options: Mapping[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.data, DataLoader):
            self._take(self.data)
        if not (self.unpack is None or callable(self.unpack)):
            raise TypeError(f"`unpack` must be a function of a batch, got {type(self.unpack).__name__}.")
        check.integer("workers", self.workers)
        _check_entries(self.data, raw=self.unpack is not None)
        if self.unpack is None and isinstance(self.data, Mapping) and "x" not in self.data and _tensors(self.data):
            raise TypeError(
                f"`data` must have the samples as 'x', as in {{'x': samples, 'label': labels}}; it has the keys "
                f"{', '.join(map(repr, self.data))}."
            )
        size(self.data)
        tensors = self.data.tensors if type(self.data) is TensorDataset else self.data
        if self.unpack is None and isinstance(tensors, tuple) and len(tensors) > 1 and _tensors(tensors):
            raise TypeError(
                f"`data` has {len(tensors)} tensors; say what they are, as in `Loader(data, unpack=lambda batch: "
                f"(batch[0], {{'label': batch[1]}}))`."
            )

    def _take(self, loader: DataLoader[object]) -> None:
        """Take the data set and the options of a DataLoader."""
        if self.workers:
            raise ValueError(
                f"`workers`={self.workers} and a DataLoader were given; give the workers to the DataLoader."
            )
        if isinstance(loader.dataset, IterableDataset):
            size(iter(()))  # type: ignore[arg-type]
        sampler = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
        if type(sampler) not in (RandomSampler, SequentialSampler):
            raise ValueError(
                f"`data` is a DataLoader with {type(sampler).__name__}, and the trainer orders the samples itself, so "
                f"that a run can resume and be divided over processes; give DataLoader(data, batch_size, shuffle=True)."
            )
        if getattr(sampler, "replacement", False) or getattr(sampler, "_num_samples", None):
            raise ValueError(
                "`data` is a DataLoader that draws with replacement or a part of the data; give shuffle=True instead."
            )
        options = {"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn, "timeout": loader.timeout}
        if loader.num_workers:
            options |= {
                "multiprocessing_context": loader.multiprocessing_context,
                "prefetch_factor": loader.prefetch_factor,
            }
        for name, value in (
            ("data", loader.dataset),
            ("workers", loader.num_workers),
            ("batch", loader.batch_size),
            ("options", options),
        ):
            object.__setattr__(self, name, value)

    def batch_size(self, given: int | None) -> int:
        """Number of samples per step.

        Arguments:
            given: Number that the user gave, or None for that of the DataLoader, else 128.
        """
        if given is None:
            return self.batch or 128
        check.integer("batch", given, at_least=1)
        if self.batch not in (None, given):
            raise ValueError(f"`batch`={given}, and the DataLoader has batch_size={self.batch}; give one of them.")
        return given

    def fingerprint(self) -> str:
        """Text that differs for other data of the same size, by its type and by what can be read quickly.

        Of tensors, up to 64 MiB are read. Of a data set, three samples are read, if this process loads them and if they
        are the same at every reading; a text ``_fingerprint`` of the data set, as in datasets, takes their place.
        """
        data = self.data.tensors if type(self.data) is TensorDataset else self.data
        if _tensors(data):
            paths = tree_flatten_with_path(data)[0]
            return fingerprint.of_tensors({keystr(path): leaf for path, leaf in paths})
        own = getattr(data, "_fingerprint", "")
        if not own and not self.workers:  # with workers, files that a data set opens here could be broken by a fork
            own = fingerprint.of_samples(data, size(self.data))
        return f"{type(data).__name__} {own}".strip()

    def __repr__(self) -> str:
        unpack = "" if self.unpack is None else f", unpack={describe(self.unpack)}"
        return f"Loader({type(self.data).__name__} with {size(self.data)} samples{unpack}, workers={self.workers})"

    def batches(self, rows: Iterator[Tensor], device: torch.device) -> Iterator[tuple[Tensor, dict[str, Condition]]]:
        """Yield the data and conditions of each batch on a device.

        Arguments:
            rows: Indices of each batch.
            device: Device of the tensors.
        """
        unpack = self.unpack or _unpack
        for batch in batches(self.data, rows, workers=self.workers, pin=device.type == "cuda", options=self.options):
            yield unpack(tree_map(lambda leaf: _to(leaf, device), batch))


def batches(
    data: Data,
    rows: Iterator[Tensor],
    *,
    workers: int = 0,
    pin: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Any]:
    """Yield batches of data.

    Arguments:
        data: Tensor (N, …), a dictionary or tuple of such tensors, or a data set with ``len`` and integer indices.
        rows: Indices of each batch.
        workers: Number of processes that load from a data set.
        pin: Whether to put batches of a data set in page-locked memory, for a GPU.
        options: More arguments of the DataLoader that loads a data set.
    """
    options = dict(options or {})
    if type(data) is TensorDataset and options.get("collate_fn", default_collate) is default_collate:
        data = data.tensors
    if _tensors(data):
        for index in rows:
            yield tree_map(lambda leaf, index=index: leaf[index.to(leaf.device)], data)
        return
    # Without a generator, a DataLoader draws a number from torch's global generator at each start.
    sampler: Sequence[Any] = _IndexLists(rows)  # type: ignore[assignment]
    samples: Dataset[object] = data  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    options |= {"num_workers": workers, "pin_memory": pin, "generator": generator}
    yield from DataLoader(samples, batch_sampler=sampler, **options)


def size(data: Data) -> int:
    """Return the number of samples.

    Arguments:
        data: Data, as in :func:`batches`.
    """
    if _tensors(data):
        sizes = {len(leaf) for leaf in tree_leaves(data)}
        if len(sizes) != 1:
            raise ValueError(f"`data` must have tensors of one length, got {sorted(sizes)}.")
        return sizes.pop()
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"`data` must be a tensor, tensors by name, or a data set with len and indices, got {type(data).__name__}; "
            f"a stream cannot be resumed, so write your own training loop for it."
        )
    return len(data)


def _tensors(data: object) -> bool:
    leaves = tree_leaves(data)
    return bool(leaves) and all(isinstance(leaf, Tensor) and leaf.ndim > 0 for leaf in leaves)


def _check_entries(data: object, *, raw: bool) -> None:
    """Raise an error if an entry of a dictionary of data is an array or a list, which no batch could be taken from.

    An array of floats alone is a data set. One of integers is `raw`, and needs a function that converts its batches.
    """
    if not raw and isinstance(data, np.ndarray) and data.dtype.kind in "iub":
        kind = f"{data.dtype} array of shape {data.shape}"
        raise TypeError(f"`data` must have floating-point numbers, got a {kind}{check.of_array('data', data)}.")
    for name, value in data.items() if isinstance(data, dict) else ():
        if isinstance(value, np.ndarray | list | tuple) and not _tensors(value):
            floats = name == "x" or (isinstance(value, np.ndarray) and value.dtype.kind == "f")
            fix = check.of_array(f"data[{name!r}]", value, indices=not floats)
            raise TypeError(f"`data`[{name!r}] must be a torch.Tensor, got {type(value).__name__}{fix}.")


def _unpack(batch: object) -> tuple[Tensor, dict[str, Condition]]:
    if isinstance(batch, (tuple, list)) and len(batch) == 1:
        (batch,) = batch
    if isinstance(batch, Tensor):
        return batch, {}
    if isinstance(batch, Mapping) and "x" in batch:
        return batch["x"], {str(name): value for name, value in batch.items() if name != "x"}
    raise TypeError(
        f"a batch must be a tensor or a dictionary with the key 'x', got {type(batch).__name__}; for other batches "
        f"give `unpack`, as in `Loader(data, unpack=lambda batch: (batch[0], {{'label': batch[1]}}))`."
    )


def _to(leaf: object, device: torch.device) -> object:
    return leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf


class _IndexLists:
    def __init__(self, rows: Iterator[Tensor]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        for index in self.rows:
            yield index.tolist()
