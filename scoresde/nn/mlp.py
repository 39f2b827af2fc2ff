r"""A residual multilayer perceptron for vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scoresde import _checks as check
from scoresde._build import recorded
from scoresde._doors import checked_with, words
from scoresde.nn.blocks import dtype_of, initialise
from scoresde.nn.embedding import Conditioning, Fourier, Label

# Hints for the keywords of other libraries.
WORDS = words("""
num_classes n_classes class_num: use `classes`
in_features input_dim dim data_dim features_in: use `features`, the number of entries of an event
hidden_dim hidden_size hidden_features width: use `hidden`
layers num_layers n_layers blocks: use `depth`
cond_dim context_dim condition_dim: use `context`
""")


class _Block(nn.Module):
    """h + W silu(V silu((1 + a) norm(h) + b)), with (a, b) linear in the conditioning vector."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.film = nn.Linear(hidden, 2 * hidden)
        self.inner = nn.Linear(hidden, hidden)
        self.last = nn.Linear(hidden, hidden)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.film(condition).chunk(2, dim=1)
        normed = F.layer_norm(h.to(torch.promote_types(h.dtype, torch.float32)), h.shape[1:]).to(shift.dtype)
        out: Tensor = h + self.last(F.silu(self.inner(F.silu(torch.addcmul(shift, normed, 1 + scale)))))
        return out


@checked_with(WORDS)
@recorded
class MLP(nn.Module):
    r"""Residual SiLU blocks, modulated by Fourier features of the time; the output is 0 at initialisation.

    .. math:: h \leftarrow h + W\,\mathrm{silu}(V\,\mathrm{silu}((1 + a)\,\mathrm{norm}(h) + b)), \qquad
              \mathrm{out} = W\,((1 + a)\,h + b), \quad (a, b) = \text{linear in the condition}

    h itself is never normalised. So the network can approximate the exact denoiser of Gaussian data, a linear map of x
    that depends on the time, at any scale of x. Norms are computed in float32 or better; the output has the dtype of x.

    Arguments:
        features: Size D of an event; the state is (B, D), or (B, *event) with D entries in an event.
        hidden: Width of the blocks.
        depth: Number of blocks.
        classes: Number of classes of a condition ``label``, which may be None or `classes` for no class.
        context: Size of a conditioning vector ``context``, (B, context); 0 for none.
        out_features: Size of an output, D by default; 2 D for a learned variance.
        seed: Seed of the initial weights; None draws from torch's global generator.

    ``MLP(2)`` has 256,642 parameters, ``MLP(32, hidden=64, classes=10)`` has 71,456.

    Example:
        >>> import torch, scoresde as ss
        >>> model = ss.Denoiser(ss.nn.MLP(2, classes=3), ss.VP(), predicts="eps")
        >>> model.x0(torch.randn(5, 2), 0.5, label=torch.tensor([0, 1, 2, 3, 3])).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        *,
        hidden: int = 128,
        depth: int = 3,
        classes: int | None = None,
        context: int = 0,
        out_features: int | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.features = check.integer("features", features, at_least=1)
        check.integer("hidden", hidden, at_least=1)
        self.outputs = features if out_features is None else check.integer("out_features", out_features, at_least=1)
        self.condition = Conditioning(Fourier(64), hidden, classes=classes, context=context)
        self.first = nn.Linear(features, hidden)
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(check.integer("depth", depth)))
        self.film = nn.Linear(hidden, 2 * hidden)
        self.last = nn.Linear(hidden, self.outputs)
        initialise(self, [m.last for m in self.modules() if isinstance(m, (MLP, _Block))], seed)

    def forward(self, x: Tensor, time: float | Tensor, *, label: Label = None, context: Tensor | None = None) -> Tensor:
        """The prediction, of the shape (except for `out_features`) and dtype of `x`.

        Arguments:
            x: State, (B, *event).
            time: Time label, a number, () or (B,).
            label: Class indices (B,), or None for no class.
            context: Conditioning vectors, (B, context).
        """
        if x.ndim < 2 or x.shape[1:].numel() != self.features:
            raise ValueError(f"`x` must be (B, {self.features}), or (B, *event) of that size, got {tuple(x.shape)}.")
        condition = self.condition(x, time, label, context)
        h = self.first(x.flatten(1).to(dtype_of(self)))
        for block in self.blocks:
            h = block(h, condition)
        scale, shift = self.film(condition).chunk(2, dim=1)
        out: Tensor = self.last(torch.addcmul(shift, h, 1 + scale))
        return out.reshape(len(x), x.shape[1] * self.outputs // self.features, *x.shape[2:]).to(x.dtype)
