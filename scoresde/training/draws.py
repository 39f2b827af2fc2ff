"""Where a training step's random numbers come from, and dropping conditions with them.

A source has two methods, ``uniform`` and ``normal``, as :class:`Noise` has. By default it is torch's global
generator, as in any training loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from scoresde import _checks as check
from scoresde.noise import Noise

TIMES, NORMALS, DROPS = 0, 1, 2  # draws of a training step


class Source(Protocol):
    """Random numbers of shape (B, *event) for draw number `draw` of a step."""

    def uniform(self, shape: Sequence[int], draw: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor: ...  # noqa: D102

    def normal(self, shape: Sequence[int], draw: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor: ...  # noqa: D102


@dataclass(frozen=True)
class Draws:
    """Numbers from a torch generator; of a batch that is spread over processes, one process' rows.

    With `total`, every process draws the numbers of the whole batch and keeps its own rows, so that generators with
    equal seeds give the same run on any number of processes.

    Arguments:
        generator: A generator on the device of the state; None for torch's global one.
        first: Index of the first row in the whole batch.
        total: Rows of the whole batch; None where this is all of it.
    """

    generator: torch.Generator | None = None
    first: int = 0
    total: int | None = None

    def __post_init__(self) -> None:
        check.integer("first", self.first)
        if self.total is not None:
            check.integer("total", self.total, least=1)

    def uniform(
        self, shape: Sequence[int], draw: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Uniform numbers in [0, 1), (B, *event); the order of calls counts, `draw` does not."""
        whole, rows = self._rows(shape)
        return torch.rand(whole, generator=self.generator, dtype=dtype, device=device)[rows]

    def normal(
        self, shape: Sequence[int], draw: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normal numbers, (B, *event); the order of calls counts, `draw` does not."""
        whole, rows = self._rows(shape)
        return torch.randn(whole, generator=self.generator, dtype=dtype, device=device)[rows]

    def _rows(self, shape: Sequence[int]) -> tuple[tuple[int, ...], slice]:
        n = shape[0]
        total = n if self.total is None else self.total
        if self.first + n > total:
            raise ValueError(f"`total` must cover rows {self.first} … {self.first + n - 1} of the batch, got {total}.")
        return (total, *shape[1:]), slice(self.first, self.first + n)


def source_of(noise: Noise | Source | int | None) -> Source:
    """A source from what a user gives: None, a seed, a :class:`Noise` or a source.

    Arguments:
        noise: None is torch's global generator; a seed is ``Noise(seed)``.
    """
    if noise is None:
        return Draws()
    return Noise(noise) if isinstance(noise, int) else noise


def place(noise: Source, n: int, total: int | None = None) -> tuple[float, int, Source]:
    """Where a batch of `n` rows lies in the whole batch: first row, rows in all, and a source that all rows share.

    Arguments:
        noise: The source.
        n: Rows here.
        total: Rows in all, where the source does not know; by default `n`.
    """
    if isinstance(noise, Draws):
        return noise.first, total or noise.total or n, Draws(noise.generator)
    if isinstance(noise, Noise):
        if not isinstance(noise.seed, int) or noise.indices is not None:
            raise ValueError(
                "stratified times belong to a batch: give a `Noise` with one seed and an `offset`, not a seed or an "
                "index for each row."
            )
        return noise.offset, total or n, Noise(noise.seed)
    return 0, total or n, noise


def drop_condition(
    cond: Mapping[str, Any], p: float, null: Mapping[str, Any], noise: Noise | Source | int | None = None
) -> dict[str, Any]:
    """Replace the conditions of some rows by their null values: training for classifier-free guidance.

    Arguments:
        cond: Conditions by name, tensors (B, …), or trees of them.
        p: Probability that a row is dropped; all its conditions that have a null value go together.
        null: What stands for "no condition", by name: a number or a tensor that broadcasts to a row.
        noise: Where the choice comes from, as in :class:`DSM`.

    Example:
        >>> import torch
        >>> drop_condition({"label": torch.tensor([3, 1, 4])}, 1.0, {"label": 10})
        {'label': tensor([10, 10, 10])}

    References:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), arXiv:2207.12598
    """
    check.number("p", p, least=0, most=1)
    unknown = sorted(set(null) - set(cond))
    if unknown:
        raise ValueError(f"`null` names {', '.join(unknown)}, which is not a condition; `cond` has {sorted(cond)}.")
    out = dict(cond)
    if p == 0 or not null:
        return out
    source = source_of(noise)
    dropped: dict[torch.device, Tensor] = {}

    def replace(value: Any, empty: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise TypeError(f"a condition to drop must be a tensor (B, …), got {value!r}.")
        if not dropped:
            u = source.uniform((len(value),), DROPS, dtype=torch.float32, device=value.device)
            dropped[value.device] = u < p
        mask = next(iter(dropped.values())).to(value.device)
        if len(mask) != len(value):
            raise ValueError(f"conditions must have one row for each sample, got {len(mask)} and {len(value)} rows.")
        empty = torch.as_tensor(empty, dtype=value.dtype, device=value.device)
        return torch.where(mask.reshape(-1, *[1] * (value.ndim - 1)), empty, value)

    for name, empty in null.items():
        out[name] = (
            replace(cond[name], empty)
            if isinstance(cond[name], Tensor)
            else tree_map(lambda leaf, empty=empty: replace(leaf, empty), cond[name])
        )
    return out
