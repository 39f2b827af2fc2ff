"""Several processes: accelerate's object for them, and sharded tensors as in FSDP 2.

:func:`whole` gathers sharded tensors, and :func:`shard` is its inverse.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from accelerate import Accelerator

_PLAIN = (Tensor, nn.Parameter)

State = dict[str, Any]
"""State of a run or of a part of it: nested dictionaries, lists and tuples of tensors, numbers, strings and None."""

TreeT = TypeVar("TreeT")


def make_accelerator(precision: str, given: Accelerator | None) -> Accelerator:
    """Return `given`, or an accelerator for all launched processes; raise an error if it does not fit the trainer.

    Arguments:
        precision: Precision of the network, ``"no"``, ``"bf16"`` or ``"fp16"``.
        given: Accelerator of the user, or None.
    """
    if given is not None:
        if precision != "no":
            raise ValueError(f"`accelerator` sets the precision itself; remove `precision`={precision!r}.")
        if given.gradient_accumulation_steps != 1:
            raise ValueError(
                f"`accelerator` must not accumulate gradients, got {given.gradient_accumulation_steps} steps; give "
                f"the trainer `update`=Update(accumulate={given.gradient_accumulation_steps}) instead."
            )
        return given
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError("Trainer needs accelerate and safetensors: pip install 'scoresde[train]'.") from error
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    kinds = (getattr(torch, kind, None) for kind in ("cuda", "xpu", "npu", "mlu", "musa", "hpu"))
    # Without a GPU, accelerate ignores that several processes were launched, unless `cpu` is set.
    cpu = launched > 1 and not any(kind is not None and kind.is_available() for kind in kinds)
    out = Accelerator(mixed_precision=precision, cpu=cpu)
    if out.num_processes != launched:
        raise RuntimeError(
            f"{launched} processes were launched and accelerate sees {out.num_processes}: each would train separately. "
            f"Give `accelerator`=Accelerator(...), or launch one process."
        )
    return out


def prepare_sharding(accelerator: Accelerator, loss: nn.Module) -> bool:
    """Return whether the weights will be sharded (FSDP); if so, give all processes the weights of the first.

    Arguments:
        accelerator: Accelerator of the run.
        loss: Loss whose weights will be sharded.
    """
    if str(accelerator.distributed_type) != "DistributedType.FSDP":
        return False
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(
            "FSDP must be version 2, which keeps weights by name: set `fsdp_version: 2` in accelerate's configuration,"
            " `accelerate launch --use_fsdp --fsdp_version 2`, or FullyShardedDataParallelPlugin(fsdp_version=2)."
        )
    from accelerate.utils import broadcast

    for w in loss.state_dict().values():  # all processes start from the weights of the first
        w.copy_(broadcast(w.to(accelerator.device)))
    plugin.cpu_ram_efficient_loading = False
    plugin.mixed_precision_policy = None  # it would cast data and loss to half precision; autocast does not
    return True


def whole(tree: TreeT) -> TreeT:
    """Gather the sharded tensors of a state; every process must call this and gets the whole state.

    Arguments:
        tree: Nested dictionaries, lists and tuples of tensors and other values.
    """
    out: TreeT = tree_map(lambda leaf: leaf.full_tensor() if _is_sharded(leaf) else leaf, tree)
    return out


def local(x: Tensor) -> Tensor:
    """Return the shard of this process, in the same memory; a tensor that is not sharded is returned unchanged.

    Arguments:
        x: Tensor, sharded or not.
    """
    return x.to_local() if _is_sharded(x) else x  # type: ignore[attr-defined]


def shard(value: Tensor, own: Tensor) -> Tensor:
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


def shard_state(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard the tensors of a state like those of a module.

    Arguments:
        state: State to shard, by name.
        own: State of the module, by name.
    """
    return {name: shard(value, own[name]) if name in own else value for name, value in state.items()}


def shard_optimiser(state: State, optimiser: torch.optim.Optimizer) -> State:
    """Shard the tensors of an optimiser's state like their parameters.

    Arguments:
        state: State from the optimiser's ``state_dict``, with whole tensors.
        optimiser: Optimiser with the sharded parameters.
    """
    parameters = [p for group in optimiser.param_groups for p in group["params"]]

    def like(value: object, p: Tensor) -> object:
        return shard(value, p) if isinstance(value, Tensor) and value.shape == p.shape else value

    sharded = {k: {name: like(v, parameters[k]) for name, v in slots.items()} for k, slots in state["state"].items()}
    return {**state, "state": sharded}


def _is_sharded(x: object) -> bool:
    return type(x) not in _PLAIN and isinstance(x, Tensor) and hasattr(x, "full_tensor")
