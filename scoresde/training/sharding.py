"""Tensors that are spread over processes, as FSDP keeps weights: whole, and spread again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

_PLAIN = (Tensor, nn.Parameter)


def whole(tree: Any) -> Any:
    """A state with whole tensors for spread ones; every process must call it, and each gets all.

    Arguments:
        tree: Dictionaries, lists and tuples of tensors and others.
    """
    return tree_map(lambda leaf: leaf.full_tensor() if _spread(leaf) else leaf, tree)


def local(x: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory.

    Arguments:
        x: Spread, or not.
    """
    return x.to_local() if _spread(x) else x  # type: ignore[attr-defined]


def spread(value: Tensor, own: Tensor) -> Tensor:
    """A tensor on the device and in the parts of another.

    Arguments:
        value: Whole and the same on every process, or spread already.
        own: The other.
    """
    if value.device != own.device:
        value = value.to(own.device)
    if not _spread(own) or _spread(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, parts = own.device_mesh, own.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, parts, src_data_rank=None)


def spread_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's state, each tensor spread as the module's own.

    Arguments:
        state: By name.
        own: The module's.
    """
    return {name: spread(value, own[name]) if name in own else value for name, value in state.items()}


def spread_optimiser(state: Mapping[str, Any], optimiser: Any) -> dict[str, Any]:
    """An optimiser's state, its tensors spread as the parameters they belong to.

    Arguments:
        state: As its ``state_dict`` gives it, with whole tensors.
        optimiser: The optimiser.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def like(value: Any, p: Tensor) -> Any:
        return spread(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    moved = {k: {name: like(v, parameters[k]) for name, v in of.items()} for k, of in state["state"].items()}
    return {**state, "state": moved}


def _spread(x: Any) -> bool:
    return type(x) not in _PLAIN and isinstance(x, Tensor) and hasattr(x, "full_tensor")
