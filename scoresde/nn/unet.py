r"""A U-Net for images and signals."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import _checks as check
from scoresde._build import recorded
from scoresde._doors import checked_with, words
from scoresde.nn.blocks import Attention, GroupNorm, Residual, Upsample, conv, dtype_of, initialise
from scoresde.nn.embedding import Conditioning, Label, Sinusoidal

# Hints for the keywords of other libraries.
WORDS = words("""
num_classes n_classes class_num num_class_embeds: use `classes`
in_channels image_channels: use `channels`, the channels of the state
model_channels base_channels dim: use `width`
channel_mult dim_mults channel_multipliers block_out_channels: use `multipliers`, in units of `width`
num_res_blocks layers_per_block: use `blocks`
attention_resolutions: use `attention`, a list of levels
sample_size image_size: the network accepts grids of every size
""")


class _Stage(nn.Module):
    """A residual block, followed by attention or not."""

    def __init__(self, residual: Residual, attention: Attention | None) -> None:
        super().__init__()
        self.residual, self.attention = residual, attention

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        out: Tensor = self.residual(h, condition)
        return out if self.attention is None else self.attention(out)


@checked_with(WORDS)
@recorded
class UNet(nn.Module):
    r"""The DDPM++ network: residual blocks on a pyramid of resolutions, with skip connections.

    Each level halves the resolution of the level before, to ⌈n/2⌉. The way up restores the exact sizes, so the network
    accepts grids of every size. Time and class modulate each block by a scale and a shift. The output is 0 at
    initialisation and has the dtype of `x`. The state should have a variance near 1: use a preconditioning for VE, EDM.

    Arguments:
        channels: Number C of channels of the state, (B, C, *space).
        dims: Number of axes of space: 1 for signals, 2 for images.
        width: Number of channels of the first level.
        multipliers: Number of channels of each level, in units of `width`.
        blocks: Number of residual blocks of each level on the way down; the way up has one more.
        attention: Levels whose blocks are followed by self-attention; level 0 has the full resolution. The middle of
            the network, at the coarsest level, always has one. The cost is quadratic in the number of positions.
        heads: Number of heads of each attention; a divisor of its number of channels.
        classes: Number of classes of a condition ``label``, which may be None or `classes` for no class.
        image_condition: Number of channels of a condition ``image``, which is concatenated with x; 0 for none.
        dropout: Dropout probability in each block.
        out_channels: Number of channels of the output, C by default; 2 C for a learned variance.
        seed: Seed of the initial weights; None draws from torch's global generator.

    ``UNet(1)`` has 6,946,881 parameters, ``UNet(1, width=32, blocks=1)`` has 1,195,329,
    ``UNet(3, width=128, blocks=4)`` has 45,271,427 and ``UNet(2, dims=1, width=16, classes=10)`` has 222,834.

    Example:
        >>> import torch, scoresde as ss
        >>> net = ss.nn.UNet(3, width=16, classes=10)
        >>> model = ss.Denoiser(net, ss.VP(), predicts="v")
        >>> model.x0(torch.randn(2, 3, 15, 20), 0.5, label=torch.tensor([7, 10])).shape
        torch.Size([2, 3, 15, 20])

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456, appendix H
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364,
          appendix F.3
    """

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        width: int = 64,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: Sequence[int] = (1,),
        heads: int = 4,
        classes: int | None = None,
        image_condition: int = 0,
        dropout: float = 0.0,
        out_channels: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.dims = check.integer("dims", dims, at_least=1)
        if dims > 2:
            raise ValueError(f"`dims` must be 1 for signals or 2 for images, got {dims}.")
        self.channels = check.integer("channels", channels, at_least=1)
        self.image_condition = check.integer("image_condition", image_condition)
        check.integer("width", width, at_least=2)
        check.integer("blocks", blocks, at_least=1)
        check.integer("heads", heads, at_least=1)
        check.number("dropout", dropout, at_least=0, below=1)
        widths = [width * check.integer("multipliers", m, at_least=1) for m in multipliers]
        if not widths:
            raise ValueError("`multipliers` must have an entry for each level, at least one, got none.")
        for level in attention:
            if check.integer("attention", level) >= len(widths):
                raise ValueError(
                    f"`attention` must hold levels from 0 to {len(widths) - 1}, got {level}; use () for none."
                )
        outputs = channels if out_channels is None else check.integer("out_channels", out_channels, at_least=1)
        size = 4 * width

        def stage(level: int, inputs: int, attend: bool) -> _Stage:
            residual = Residual(dims, inputs, widths[level], condition=size, dropout=dropout)
            return _Stage(residual, Attention(dims, widths[level], heads) if attend else None)

        self.condition = Conditioning(Sinusoidal(64), size, classes=classes)
        self.first = conv(dims, channels + image_condition, widths[0])
        skips = [widths[0]]
        self.down = nn.ModuleList()
        for level, outs in enumerate(widths):
            for _ in range(blocks):
                self.down.append(stage(level, skips[-1], level in attention))
                skips.append(outs)
            if level + 1 < len(widths):
                self.down.append(conv(dims, outs, outs, stride=2))
                skips.append(outs)
        deep, coarsest = widths[-1], len(widths) - 1
        self.middle = nn.ModuleList([stage(coarsest, deep, True), stage(coarsest, deep, False)])
        self.up = nn.ModuleList()
        for level in reversed(range(len(widths))):
            for _ in range(blocks + 1):
                self.up.append(stage(level, deep + skips.pop(), level in attention))
                deep = widths[level]
            if level:
                self.up.append(Upsample(dims, deep))
        self.norm = GroupNorm(deep)
        self.last = conv(dims, deep, outputs)
        initialise(self, [m.last for m in self.modules() if isinstance(m, (UNet, Residual, Attention))], seed)

    def forward(self, x: Tensor, time: float | Tensor, *, label: Label = None, image: Tensor | None = None) -> Tensor:
        """The prediction, of the shape (except for `out_channels`) and dtype of `x`.

        Arguments:
            x: State, (B, C, *space).
            time: Time label, a number, () or (B,).
            label: Class indices (B,), or None for no class.
            image: Condition to concatenate with `x`, (B, image_condition, *space); one row is used for all samples.
        """
        condition = self.condition(x, time, label)
        h = self.first(self._input(x, image).to(dtype_of(self)))
        skips = [h]
        for part in self.down:
            h = part(h, condition) if isinstance(part, _Stage) else part(h)
            skips.append(h)
        for part in self.middle:
            h = part(h, condition)
        for part in self.up:
            if isinstance(part, _Stage):
                h = part(torch.cat([h, skips.pop()], dim=1), condition)
            else:
                h = part(h, skips[-1].shape[2:])
        out: Tensor = self.last(F.silu(self.norm(h)))
        return out.to(x.dtype)

    def _input(self, x: Tensor, image: Tensor | None) -> Tensor:
        if x.ndim != self.dims + 2 or x.shape[1] != self.channels:
            space = ", ".join(f"n{i + 1}" for i in range(self.dims))
            fix = check.channels_first("`x`", tuple(x.shape), (self.channels,)) if x.ndim == self.dims + 2 else ""
            raise ValueError(f"`x` must be (B, {self.channels}, {space}), got shape {tuple(x.shape)}{fix}.")
        if image is None:
            if self.image_condition:
                raise ValueError("`image` is missing: this network needs one; use zeros for no condition.")
            return x
        if not self.image_condition:
            raise ValueError("`image` was given to a network without one; create it with `image_condition`=channels.")
        shape = (self.image_condition, *x.shape[2:])
        if tuple(image.shape[1:]) != shape or image.shape[0] not in (1, len(x)):
            raise ValueError(f"`image` must be {(len(x), *shape)} to match `x`, got shape {tuple(image.shape)}.")
        return torch.cat([x, image.to(x).expand(len(x), *shape)], dim=1)
