"""Sharded tensors, as in FSDP 2: gather them to whole tensors, and shard whole tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

_PLAIN = (Tensor, nn.Parameter)


def whole(tree: Any) -> Any:
    """Gather the sharded tensors of a state; every process must call this and gets the whole state.

    Arguments:
        tree: Nested dictionaries, lists and tuples of tensors and other values.
    """
    return tree_map(lambda leaf: leaf.full_tensor() if _is_sharded(leaf) else leaf, tree)


def local(x: Tensor) -> Tensor:
    """Return the shard of this process, in the same memory; a tensor that is not sharded is returned unchanged.

    Arguments:
        x: Tensor, sharded or not.
    """
    return x.to_local() if _is_sharded(x) else x  # type: ignore[attr-defined]


def spread(value: Tensor, own: Tensor) -> Tensor:
    """Move a tensor to the device of another and shard it in the same way.

    Arguments:
        value: Tensor that is whole and equal on every process, or already sharded.
        own: Tensor with the device and sharding of the result.
    """
    if value.device != own.device:
        value = value.to(own.device)
    if not _is_sharded(own) or _is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, parts = own.device_mesh, own.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, parts, src_data_rank=None)


def spread_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard the tensors of a state like those of a module.

    Arguments:
        state: State to shard, by name.
        own: State of the module, by name.
    """
    return {name: spread(value, own[name]) if name in own else value for name, value in state.items()}


def spread_optimiser(state: Mapping[str, Any], optimiser: Any) -> dict[str, Any]:
    """Shard the tensors of an optimiser's state like their parameters.

    Arguments:
        state: State from the optimiser's ``state_dict``, with whole tensors.
        optimiser: Optimiser with the sharded parameters.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def like(value: Any, p: Tensor) -> Any:
        return spread(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    sharded = {k: {name: like(v, parameters[k]) for name, v in slots.items()} for k, slots in state["state"].items()}
    return {**state, "state": sharded}


def _is_sharded(x: Any) -> bool:
    return type(x) not in _PLAIN and isinstance(x, Tensor) and hasattr(x, "full_tensor")
