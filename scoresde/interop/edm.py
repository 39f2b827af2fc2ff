"""Denoisers from networks that take a noisy state and its level σ and return the data: EDM, EDM2 and k-diffusion."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from scoresde import _checks as check
from scoresde._build import recorded
from scoresde._doors import checked
from scoresde.denoisers.base import Condition
from scoresde.denoisers.network import Denoiser
from scoresde.interop.networks import Adapted, Net
from scoresde.processes.named import EDM


@checked
def from_edm(net: Net, *, sigma_max: float = 80.0, sigma_min: float = 0.002) -> Denoiser:
    """Denoiser from a preconditioned network of EDM or EDM2: ``net(x, σ, class_labels)`` returns the denoised state.

    The classes of those code bases are taken as they are: VPPrecond, VEPrecond, iDDPMPrecond and EDMPrecond of EDM,
    and Precond of EDM2, whose log-variance is dropped if it is returned. `class_labels` may be one-hot vectors, as
    there, or class numbers (B,); `augment_labels` and other conditions are passed as they are. Those classes cast their
    input themselves, so states keep their precision on the way to them.

    Arguments:
        net: Network with its preconditioning, as in those checkpoints.
        sigma_max: Largest noise level, T; at most ``net.sigma_max`` if the network has one.
        sigma_min: Smallest noise level, t_min; at least ``net.sigma_min`` if the network has one.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
        | Analyzing and Improving the Training Dynamics of Diffusion Models (Karras et al., 2024), arXiv:2312.02696
    """
    high = min(sigma_max, float(getattr(net, "sigma_max", sigma_max)))
    low = check.number("sigma_min", max(sigma_min, float(getattr(net, "sigma_min", sigma_min))), above=0, below=high)
    return Denoiser(EDMNet(net), EDM(T=high, t_min=low), predicts="x0", time="sigma")


@checked
def from_kdiffusion(model: Net, *, sigma_max: float | None = None, sigma_min: float | None = None) -> Denoiser:
    """Denoiser from a wrapped model of k-diffusion: ``model(x, sigma, **extra_args)`` returns the denoised state.

    All its wrappers have this form: ``OpenAIDenoiser``, ``CompVisDenoiser``, ``VDenoiser``, their v-forms and
    ``layers.Denoiser`` with its variants. The state is that of k-diffusion, x₀ + σ ε, whatever process the network
    inside was trained on. Give ``extra_args`` by ``model.given(name=value)``.

    Arguments:
        model: Wrapped model.
        sigma_max: Largest level, by default ``model.sigma_max``, or 80 if it has none.
        sigma_min: Smallest level, by default ``model.sigma_min``, or 0.002 if it has none.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """
    high = float(getattr(model, "sigma_max", 80.0)) if sigma_max is None else sigma_max
    low = float(getattr(model, "sigma_min", 0.002)) if sigma_min is None else sigma_min
    low = check.number("sigma_min", low, above=0, below=high)
    return Denoiser(Adapted(model), EDM(T=high, t_min=low), predicts="x0", time="sigma")


@recorded
class EDMNet(Adapted):
    """A network of EDM or EDM2, with class numbers as one-hot vectors.

    Arguments:
        net: Network.
    """

    @property
    def dtype(self) -> torch.dtype | None:
        return None if hasattr(self.net, "use_fp16") else super().dtype  # those with the flag cast for themselves

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        labels, classes = cond.get("class_labels"), getattr(self.net, "label_dim", 0)
        if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
            if not classes:
                raise ValueError("`class_labels` are class numbers, and the network is unconditional: no `label_dim`.")
            cond = {**cond, "class_labels": one_hot(labels.long(), classes).to(torch.float32)}
        out = self.net(x, t, **cond)
        return out[0] if isinstance(out, tuple) else out
