"""Fingerprints: short texts that differ if data, schedules, weightings or networks differ."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from scoresde.training.describe import describe
from scoresde.training.losses import DSM
from scoresde.training.sharding import State

_READ = 1 << 26  # bytes of each tensor that are read, at most

_STEPS = [0, 1, 2, 5] + [k * 10**n for n in range(1, 7) for k in (1, 2, 5)]


def of_tensors(tensors: dict[str, Tensor]) -> str:
    """Fingerprint of tensors: all bytes up to 64 MiB each, else evenly spaced rows with the first and the last.

    Arguments:
        tensors: Tensors (N, ...) by name.
    """
    total = hashlib.blake2b(digest_size=8)
    for name, x in tensors.items():
        n, row = len(x), x[:1].numel() * x.element_size()
        count = min(n, max(2, _READ // max(1, row)))
        rows = torch.linspace(0, n - 1, count, dtype=torch.float64).round().long()
        total.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        for part in rows.split(max(1, (1 << 22) // max(1, row))):
            total.update(_bytes(x[part.to(x.device)]))
    return total.hexdigest()


def of_samples(data: object, n: int) -> str:
    """Fingerprint of three samples of a data set; empty if a sample differs at the second reading.

    Random transforms get the same numbers at every call, and the global generators stay as they are.

    Arguments:
        data: Data set with integer indices.
        n: Number of samples.
    """

    def read() -> str:
        total = hashlib.blake2b(digest_size=8)
        with _fixed_generators():
            for k in sorted({0, n // 2, n - 1}):
                for leaf in tree_leaves(data[k]):  # type: ignore[index]
                    total.update(_bytes(leaf))
        return total.hexdigest()

    first = read()
    return first if first == read() else ""


def of_schedule(schedule: Callable[[int], float] | None) -> list[float | str] | None:
    """Values of a schedule at 22 steps between 0 and 5,000,000.

    Arguments:
        schedule: Function of the step, or None.
    """
    if schedule is None:
        return None
    out: list[float | str] = []
    for step in _STEPS:
        try:
            out.append(float(schedule(step)))
        except Exception as error:  # a table of rates may end
            out.append(type(error).__name__)
    return out


def of_weighting(loss: nn.Module) -> list[float] | None:
    """Weight of the error of x0, and density of the times, at nine times; None for a loss of another class.

    Arguments:
        loss: Loss.
    """
    if not isinstance(loss, DSM):
        return None
    sde = loss.sde
    t = torch.linspace(0, 1, 11, dtype=torch.float64)[1:-1] * (sde.T - sde.t_min) + sde.t_min
    try:
        with torch.no_grad():
            both = [loss.weighting(sde, t), loss.times.density(sde, t)]
        return torch.cat([part.double().cpu() for part in both]).tolist()
    except Exception:  # a weighting of one's own that needs a device or float32
        return None


def of_network(loss: nn.Module) -> list[str]:
    """Class and settings of each module, one line each; wrappers of torch.compile are left out.

    Arguments:
        loss: Loss with its network.
    """
    lines = []
    for name, module in loss.named_modules():
        if type(module).__name__ != "OptimizedModule":
            settings = describe(_Text(module.extra_repr()))
            lines.append(
                f"{name.replace('_orig_mod.', '').removesuffix('._orig_mod')}: {type(module).__name__}({settings})"
            )
    return lines


def rng_state() -> State:
    """States of the global generators of torch, numpy and Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002 (data transforms may use it)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
    }


def set_rng_state(state: State) -> None:
    """Set the states of the global generators.

    Arguments:
        state: Output of :func:`rng_state`.
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])


@contextmanager
def _fixed_generators() -> Iterator[None]:
    before = rng_state()
    try:
        torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
        np.random.set_state(np.random.RandomState(0).get_state())  # noqa: NPY002
        random.setstate(random.Random(0).getstate())
        yield
    finally:
        set_rng_state(before)


class _Text:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _bytes(leaf: object) -> bytes:
    if isinstance(leaf, Tensor):
        return (
            leaf.detach()
            .cpu()
            .resolve_conj()
            .resolve_neg()
            .contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
    if leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
        return repr(leaf).encode()
    try:
        return np.asarray(leaf).tobytes()  # arrays and images
    except Exception:
        return type(leaf).__name__.encode()
