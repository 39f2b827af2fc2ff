r"""What all metrics share: two checked sets of samples as matrices, and their random numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.noise.keyed import Noise

CHUNK = 1 << 20  # numbers in a block of distances or projections, to bound the memory


def as_pair(x: Tensor, y: Tensor, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Check two sets of samples; return matrices (N, D) and (M, D).

    With `centred` they are translated so that their midrange is 0: most metrics are invariant to the translation, and
    sums and products of numbers near 0 lose fewer digits.
    """
    for name, value in (("x", x), ("y", y)):
        check.state(name, value)
        if len(value) < 2:
            raise ValueError(f"`{name}` must hold at least 2 samples, got {len(value)}, of shape {tuple(value.shape)}.")
        if value.numel() == 0:
            raise ValueError(f"`{name}` must have events of at least one number, got shape {tuple(value.shape)}.")
    if x.shape[1:] != y.shape[1:]:
        raise ValueError(
            f"`y` must have the event shape of `x`, {tuple(x.shape[1:])}, got {tuple(y.shape[1:])}; "
            f"only the number of samples may differ."
        )
    if x.device != y.device:
        raise ValueError(f"`x` is on {x.device} and `y` on {y.device}; move one of them.")
    for name, value in (("x", x), ("y", y)):
        bad = ~value.detach().isfinite()
        if bool(bad.any()):
            at = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"`{name}` must be finite, got {value[at].item()} at index {at}, one of {int(bad.sum())} such numbers; "
                f"remove these samples."
            )
    dtype = torch.float64 if x.device.type == "cpu" else torch.promote_types(x.dtype, y.dtype)
    x, y = (value.detach().to(dtype).reshape(len(value), -1) for value in (x, y))
    if not centred:
        return x, y
    # The midrange of a constant column is exactly that constant, so the column becomes exactly 0.
    middle = torch.minimum(x.amin(0), y.amin(0)) / 2 + torch.maximum(x.amax(0), y.amax(0)) / 2
    return x - middle, y - middle


def stream_of(seed: int, stream: int) -> Noise:
    """The random numbers of a metric."""
    return Noise(check.integer("seed", seed)).fork(stream)
