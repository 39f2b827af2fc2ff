r"""Blocks of a convolutional network on 1-D or 2-D grids: residual blocks, attention, upsampling, initialisation.

The sum of two branches is divided by √2, so that the scale of activations does not grow with depth. Normalisation is
computed in float32 or better, whatever the dtype of the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import _checks as check


def conv(dims: int, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
    """A convolution on a `dims`-D grid; the size n of each axis becomes ⌈n / stride⌉."""
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[dims]
    return kind(inputs, outputs, kernel, stride=stride, padding=kernel // 2)


def dtype_of(net: nn.Module) -> torch.dtype:
    """Dtype of the parameters of a network."""
    return next(net.parameters()).dtype


def initialise(net: nn.Module, last: Sequence[nn.Module], seed: int | None) -> None:
    r"""Draw weights from :math:`U(\pm\sqrt{6/(n_{in} + n_{out})})`, embeddings from N(0, 1); set the rest to 0.

    Arguments:
        net: Network whose linear layers, convolutions and embeddings are initialised.
        last: Layers whose weights are set to 0: the last layer of each branch, and of the network.
        seed: Seed of the weights, which are the same on every device; None draws a seed from torch's global generator.
    """
    if seed is None:
        seed = int(torch.randint(2**62, (), device="cpu"))
    generator = torch.Generator().manual_seed(check.integer("seed", seed))
    for module in net.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or isinstance(module, GroupNorm):
            continue
        drawn = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
        if isinstance(module, nn.Embedding):
            drawn.normal_(generator=generator)
        else:
            nn.init.xavier_uniform_(drawn, generator=generator)
        with torch.no_grad():
            weight.copy_(torch.zeros_like(drawn) if any(module is layer for layer in last) else drawn)
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                bias.zero_()


class GroupNorm(nn.GroupNorm):
    """Group normalisation in float32 or better: at most 32 groups, each of at least four channels if there are four."""

    def __init__(self, channels: int) -> None:
        largest = min(32, max(1, channels // 4))
        super().__init__(next(g for g in range(largest, 0, -1) if channels % g == 0), channels)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        out = F.group_norm(x.to(wide), self.num_groups, self.weight.to(wide), self.bias.to(wide), self.eps)
        return out.to(x.dtype)


class Residual(nn.Module):
    r"""A residual block, modulated by a conditioning vector if there is one.

    .. math:: y = \tfrac{1}{\sqrt2}\bigl(W x + \mathrm{conv}(\mathrm{silu}((1 + a)\,\mathrm{norm}(h) + b))\bigr),
              \qquad h = \mathrm{conv}(\mathrm{silu}(\mathrm{norm}(x))), \quad (a, b) = \text{linear in the condition}

    Arguments:
        dims: Number of axes of space, 1 or 2.
        inputs: Number of channels of x.
        outputs: Number of channels of y; W is the identity if it equals `inputs`.
        condition: Size of the conditioning vector; 0 for none.
        dropout: Dropout probability before the last convolution.
    """

    def __init__(self, dims: int, inputs: int, outputs: int, *, condition: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm_in = GroupNorm(inputs)
        self.conv_in = conv(dims, inputs, outputs)
        self.film = nn.Linear(condition, 2 * outputs) if condition else None
        self.norm_out = GroupNorm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.last = conv(dims, outputs, outputs)
        self.skip = nn.Identity() if inputs == outputs else conv(dims, inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map `x`, (B, inputs, *space), to (B, outputs, *space)."""
        h = self.norm_out(self.conv_in(F.silu(self.norm_in(x))))
        if self.film is not None:
            film = self.film(condition).to(h.dtype)
            scale, shift = film.reshape(*film.shape, *[1] * (x.ndim - 2)).chunk(2, dim=1)
            h = torch.addcmul(shift, h, 1 + scale)
        h = self.last(self.dropout(F.silu(h)))
        out: Tensor = (self.skip(x) + h) * math.sqrt(0.5)
        return out


class Attention(nn.Module):
    """Self-attention over the positions of a grid, as a residual branch.

    Arguments:
        dims: Number of axes of space, 1 or 2.
        channels: Number of channels, a multiple of `heads`.
        heads: Number of heads.
    """

    def __init__(self, dims: int, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"`heads` must divide the {channels} channels of the attention, got {heads}.")
        self.heads = heads
        self.norm = GroupNorm(channels)
        self.qkv = conv(dims, channels, 3 * channels, 1)
        self.last = conv(dims, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map `x`, (B, C, *space), to the same shape."""
        qkv = self.qkv(self.norm(x)).flatten(2)
        q, k, v = rearrange(qkv, "b (three h c) n -> three b h n c", three=3, h=self.heads)
        h = rearrange(F.scaled_dot_product_attention(q, k, v), "b h n c -> b (h c) n")
        out: Tensor = (x + self.last(h.reshape(x.shape))) * math.sqrt(0.5)
        return out


class Upsample(nn.Module):
    """Nearest-neighbour upsampling, then a convolution."""

    def __init__(self, dims: int, channels: int) -> None:
        super().__init__()
        self.conv = conv(dims, channels, channels)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Map `x`, (B, C, *space), to (B, C, *size); the default is twice the size of `x`."""
        size = [2 * n for n in x.shape[2:]] if size is None else list(size)
        out: Tensor = self.conv(F.interpolate(x, size=size, mode="nearest"))
        return out
