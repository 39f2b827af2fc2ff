r"""Embeddings of the conditions of a network: time, class and context.

The time label of a network may be t in [0, 1], an index in [0, 1000), ¼ log σ/α in ±3, or σ up to 100. One set of
frequencies cannot resolve all of them: frequencies that resolve t alias on indices. So every embedding first maps c to

.. math:: w = \operatorname{asinh}(32\,c),

which is linear near 0 and logarithmic beyond. All of these labels then lie within ±11 and need one resolution. A linear
fit of λ on 64 features has an error below 0.5 % of its range for each label; with the usual frequencies for indices the
error is 8 % for t. Prefer ¼ log σ/α, the label of :class:`Preconditioning`: it spaces the noise levels evenly.

References:
    | Fourier Features Let Networks Learn High Frequency Functions (Tancik et al., 2020), arXiv:2006.10739
    | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde._doors import checked

Label = int | Tensor | None
"""Class of the samples: None, a number, or a tensor, () or (B,)."""

_LOWEST, _HIGHEST = -3, 4  # log2 of the angular frequencies: 0.4 and 56 periods over w in ±11


def times(time: float | Tensor, x: Tensor) -> Tensor:
    """Expand a time label, a number, () or (B,), to float32 (B,) on the device of the state `x`, (B, *event)."""
    c = time if isinstance(time, Tensor) else torch.full((), time, device=x.device)
    if c.ndim > 1 or (c.ndim == 1 and c.shape[0] not in (1, len(x))):
        raise ValueError(f"`time` must be a number or of shape () or ({len(x)},), got shape {tuple(c.shape)}.")
    return c.to(device=x.device, dtype=torch.float32).expand(len(x))


def _waves(time: Tensor, omega: Tensor) -> Tensor:
    """(sin ωw, cos ωw) of labels (B,); infinite labels, such as log σ/α at σ = 0, are clamped."""
    w = torch.asinh(32 * time.float()).clamp(-16, 16)
    phase = w[:, None] * omega
    return torch.cat([phase.sin(), phase.cos()], dim=1)


def _even(features: int) -> int:
    if check.integer("features", features, at_least=2) % 2:
        raise ValueError(f"`features` must be even (a sine and a cosine for each frequency), got {features}.")
    return features


@checked
class Sinusoidal(nn.Module):
    r"""Sinusoidal embedding of time: :math:`(\sin\omega_k w, \cos\omega_k w)`, with geometric ω from 1/8 to 16.

    The embedding is computed in float32, whatever the network's dtype, and has no parameters.

    Arguments:
        features: Number of features, even.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = _even(features)

    def forward(self, time: Tensor) -> Tensor:
        """Features (B, features) of the labels `time`, (B,)."""
        return _waves(time, torch.exp2(torch.linspace(_LOWEST, _HIGHEST, self.features // 2, device=time.device)))


@checked
class Fourier(nn.Module):
    r"""Random Fourier features of time: :math:`(\sin\omega_k w, \cos\omega_k w)`, ω drawn once from N(0, scale²).

    The frequencies are a buffer: they are saved with the network and not trained.

    Arguments:
        features: Number of features, even.
        scale: Standard deviation of the angular frequencies.
        seed: Seed of the frequencies.
    """

    omega: Tensor

    def __init__(self, features: int, *, scale: float = 2.0, seed: int = 0) -> None:
        super().__init__()
        self.features = _even(features)
        check.number("scale", scale, above=0)
        generator = torch.Generator().manual_seed(check.integer("seed", seed))
        omega = scale * torch.randn(features // 2, generator=generator, dtype=torch.float32, device="cpu")
        # Rounded to eight bits, so that a cast of the network to half precision does not change them.
        self.register_buffer("omega", omega.bfloat16().to(torch.get_default_device(), torch.float32))

    def forward(self, time: Tensor) -> Tensor:
        """Features (B, features) of the labels `time`, (B,)."""
        return _waves(time, self.omega.float())


@checked
class Conditioning(nn.Module):
    """Embedding of time, class and context in one vector (B, width), which modulates every block of a network.

    The index `classes`, one beyond the last class, means "no class". Condition dropout trains it, and it is used if no
    `label` is given.

    Arguments:
        time: Embedding of the time, such as :class:`Sinusoidal`.
        width: Size of the vector.
        classes: Number of classes; None for a network without `label`.
        context: Size of the condition ``context``, (B, context); 0 for none.
    """

    def __init__(self, time: Sinusoidal | Fourier, width: int, *, classes: int | None = None, context: int = 0) -> None:
        super().__init__()
        self.time = time
        check.integer("width", width, at_least=1)
        self.classes = None if classes is None else check.integer("classes", classes, at_least=1)
        self.hidden = nn.Linear(time.features, width)
        self.label = None if classes is None else nn.Embedding(classes + 1, width)
        self.context = nn.Linear(context, width) if check.integer("context", context) else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, time: float | Tensor, label: Label = None, context: Tensor | None = None) -> Tensor:
        """Conditioning vectors, (B, width), for the samples of the state `x`, (B, *event)."""
        weight = self.hidden.weight
        h = self.hidden(self.time(times(time, x)).to(weight.dtype))
        if self.label is not None:
            h = h + self.label(self._labels(label, x))
        elif label is not None:
            raise ValueError("`label` was given to a network without classes; create it with their number, `classes`.")
        if (context is None) != (self.context is None):
            raise ValueError(
                "`context` is missing: this network needs one vector for each sample."
                if context is None
                else "`context` was given to a network without one; create it with `context`=size of a vector."
            )
        if context is not None and self.context is not None:
            h = h + self.context(context.to(weight))
        silu = nn.functional.silu
        out: Tensor = silu(self.out(silu(h)))
        return out

    def _labels(self, label: Label, x: Tensor) -> Tensor:
        assert self.classes is not None
        if label is None:
            label = self.classes
        if fix := check.of_array("label", label, indices=True):
            raise TypeError(f"`label` must be None, a number or a tensor, got {type(label).__name__}{fix}.")
        given = label if isinstance(label, Tensor) else torch.full((), check.integer("label", label), device=x.device)
        if given.is_floating_point() or given.is_complex() or given.dtype == torch.bool:
            raise TypeError(
                f"`label` must be class indices, int64, got {str(given.dtype)[6:]}; use label.long(), "
                f"or label.argmax(1) for rows that are one-hot."
            )
        if given.ndim > 1 or (given.ndim == 1 and given.shape[0] not in (1, len(x))):
            raise ValueError(f"`label` must be None, a number, () or ({len(x)},), got shape {tuple(given.shape)}.")
        if given.device.type == "cpu" and not torch.compiler.is_compiling():  # no synchronisation
            outside = (given < 0) | (given > self.classes)
            if bool(outside.any()):
                raise ValueError(
                    f"`label` must lie in [0, {self.classes}], where {self.classes} means no class, "
                    f"got {given.reshape(-1)[outside.reshape(-1)][0].item()}."
                )
        return given.to(device=x.device, dtype=torch.long).expand(len(x))
