"""Random numbers of a training step, and random dropping of conditions.

A source has two methods, ``uniform`` and ``normal``; :class:`Noise` is one. The default source is torch's global
generator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.base import Condition, Shared
from scoresde.noise.keyed import Noise

TIMES, NORMALS, DROPS = 0, 1, 2  # numbers of the draws in a training step


class Source(Protocol):
    """A source of random numbers, (B, *event), for draw number `draw` of a step."""

    def uniform(self, shape: Sequence[int], draw: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor: ...

    def normal(self, shape: Sequence[int], draw: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor: ...


@checked
@dataclass(frozen=True)
class Draws:
    """Random numbers from a torch generator, for a whole batch or for the rows of one process.

    With `total`, every process draws the numbers of the whole batch and uses only its own rows. Generators with equal
    seeds then give the same run on any number of processes.

    Arguments:
        generator: Generator on the device of the state; None for torch's global generator.
        first: Index of the first row in the whole batch.
        total: Number of rows in the whole batch; None if there are no rows elsewhere.
    """

    generator: torch.Generator | None = None
    first: int = 0
    total: int | None = None

    def __post_init__(self) -> None:
        check.integer("first", self.first)
        if self.total is not None:
            check.integer("total", self.total, at_least=1)

    @checked
    def uniform(
        self, shape: Sequence[int], draw: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Uniform numbers in [0, 1), (B, *event); they depend on the order of the calls, not on `draw`."""
        whole, rows = self._rows(shape)
        return torch.rand(whole, generator=self.generator, dtype=dtype, device=device)[rows]

    @checked
    def normal(
        self, shape: Sequence[int], draw: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Standard normal numbers, (B, *event); they depend on the order of the calls, not on `draw`."""
        whole, rows = self._rows(shape)
        return torch.randn(whole, generator=self.generator, dtype=dtype, device=device)[rows]

    def _rows(self, shape: Sequence[int]) -> tuple[tuple[int, ...], slice]:
        n = shape[0]
        total = n if self.total is None else self.total
        if self.first + n > total:
            raise ValueError(f"`total` must cover rows {self.first} … {self.first + n - 1} of the batch, got {total}.")
        return (total, *shape[1:]), slice(self.first, self.first + n)


def source_of(noise: Noise | Source | int | None) -> Source:
    """Convert None, a seed, a :class:`Noise` or a source to a source.

    Arguments:
        noise: Source or seed. None gives torch's global generator; a seed gives ``Noise(seed)``.
    """
    if noise is None:
        return Draws()
    if isinstance(noise, Tensor):
        raise TypeError(
            "`noise` must be a seed, a Noise, Draws(generator) or None, got a tensor; conditions go to a loss by name, "
            "as in loss(x, label=label)."
        )
    return Noise(noise) if isinstance(noise, int) else noise


def place(noise: Source, n: int, total: int | None = None) -> tuple[float, int, Source]:
    """Return the index of the first of `n` rows in the whole batch, the size of that batch, and a shared source.

    Arguments:
        noise: Source of the numbers of these rows.
        n: Number of rows.
        total: Number of rows in the whole batch; by default that of :class:`Draws`, else `n`.
    """
    if isinstance(noise, Draws):
        return noise.first, total or noise.total or n, Draws(noise.generator)
    if isinstance(noise, Noise):
        if not isinstance(noise.seed, int) or noise.indices is not None:
            raise ValueError(
                "stratified times couple the rows of a batch: give a `Noise` with one seed and an `offset`, not a seed "
                "or an index for each row."
            )
        return noise.offset, total or n, Noise(noise.seed)
    return 0, total or n, noise


@checked
def drop_condition(
    cond: Mapping[str, Condition],
    p: float,
    null: Mapping[str, float | Tensor],
    noise: Noise | Source | int | None = None,
    rows: int | None = None,
) -> dict[str, Condition]:
    """Replace the conditions of random rows by null values, for training with classifier-free guidance.

    Arguments:
        cond: Conditions by name, tensors (B, …) or trees of tensors. A tensor with one row belongs to all samples, and
            is expanded if `null` has its name.
        p: Probability of dropping a row; all its conditions with a null value are dropped together.
        null: Values that mean "no condition", by name: a number or a tensor that broadcasts to a row.
        noise: Source of the random choice, as in :class:`DSM`.
        rows: Number B of samples; by default that of the conditions.

    Example:
        >>> import torch
        >>> drop_condition({"label": torch.tensor([3, 1, 4])}, 1.0, {"label": 10})
        {'label': tensor([10, 10, 10])}

    References:
        | Classifier-Free Diffusion Guidance (Ho & Salimans, 2022), arXiv:2207.12598
    """
    check.number("p", p, at_least=0, at_most=1)
    unknown = sorted(set(null) - set(cond))
    if unknown:
        raise ValueError(f"`null` names {', '.join(unknown)}, but `cond` has only {sorted(cond)}.")
    out = dict(cond)
    if p == 0 or not null:
        return out
    leaves = [leaf for name in null for leaf in tree_leaves(cond[name])]
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            fix = "; a `Shared` condition has no rows to drop" if isinstance(leaf, Shared) else ""
            raise TypeError(f"`cond` must have tensors (B, …) for the names in `null`, got {type(leaf).__name__}{fix}.")
    B = max((len(leaf) for leaf in leaves), default=1) if rows is None else check.integer("rows", rows)
    for leaf in leaves:
        if len(leaf) not in (1, B):
            raise ValueError(f"`cond` must have one row for each sample, or one row for all; got {len(leaf)} of {B}.")
    device = leaves[0].device if leaves else torch.device("cpu")
    dropped = source_of(noise).uniform((B,), DROPS, dtype=torch.float32, device=device) < p

    def replace(value: Tensor, empty: float | Tensor) -> Tensor:
        mask = dropped.to(value.device).reshape(-1, *[1] * (value.ndim - 1))
        return torch.where(mask, torch.as_tensor(empty, dtype=value.dtype, device=value.device), value)

    for name, empty in null.items():
        out[name] = tree_map(lambda leaf, empty=empty: replace(leaf, empty), cond[name])
    return out
