r"""Denoisers from networks that were trained with other code bases; each function has the conventions of one of them.

The functions load no weights and import none of those code bases: the caller provides the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import mul, sub

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._build import recorded
from scoresde.denoisers.base import Condition
from scoresde.denoisers.network import Denoiser
from scoresde.interop.networks import Net
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import EDM, VE, VP, Flow, SubVP
from scoresde.processes.sde import SDE


def from_ddpm(
    net: Net, betas: Sequence[float] | Tensor, *, predicts: str = "eps", learned_variance: bool | str = False
) -> Denoiser:
    """Denoiser from a network of DDPM, improved or guided diffusion: ``net(x, index)`` on a β list, index 0 … N − 1.

    Arguments:
        net: Network.
        betas: List of β that it was trained on.
        predicts: Output of the network, ``"eps"`` in those code bases unless configured otherwise.
        learned_variance: Whether the network returns twice the channels: ``"range"`` for their ``LEARNED_RANGE``,
            ``"log"`` for ``LEARNED``.

    References:
        | Denoising Diffusion Probabilistic Models (Ho et al., 2020), arXiv:2006.11239
    """
    return Denoiser(net, Discrete(betas), predicts=predicts, time="index", learned_variance=learned_variance)


def from_score_sde(net: Net, kind: str, **parameters: float) -> Denoiser:
    """Denoiser from a continuous-time network of score_sde.

    The networks of ``"vp"`` and ``"subvp"`` return ε at label 999 t, those of ``"ve"`` the score at label σ. The label
    σ does not depend on the parametrisation of time, so the time of :class:`VE` may differ from theirs.

    Arguments:
        net: Raw network, before that code base's ``get_score_fn``.
        kind: Process, ``"vp"``, ``"subvp"`` or ``"ve"``.
        **parameters: Parameters of the process: ``beta_min``, ``beta_max``, or ``sigma_min``, ``sigma_max``.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
    """
    check.choice("kind", kind, ("vp", "subvp", "ve"))
    if kind == "ve":
        return Denoiser(net, VE(**parameters), predicts="score", time="sigma")
    process: SDE = VP(**parameters) if kind == "vp" else SubVP(**parameters)
    return Denoiser(net, process, predicts="eps", time=partial(mul, 999))


def from_edm(net: Net, *, sigma_max: float = 80.0, sigma_min: float = 0.002) -> Denoiser:
    """Denoiser from a preconditioned network of EDM or EDM2: ``net(x, σ)`` returns the denoised state.

    Arguments:
        net: Network with its preconditioning, as in those checkpoints.
        sigma_max: Largest noise level, T.
        sigma_min: Smallest noise level, t_min.

    References:
        | Elucidating the Design Space of Diffusion-Based Generative Models (Karras et al., 2022), arXiv:2206.00364
    """
    return Denoiser(net, EDM(T=sigma_max, t_min=sigma_min), predicts="x0", time="sigma")


def from_flow(net: Net, *, data_at: float = 0.0) -> Denoiser:
    """Denoiser from a flow-matching network: ``net(x, t)`` returns dx/dt along straight lines.

    Arguments:
        net: Network.
        data_at: Time of the data in the network's convention: 0 as in this library, or 1, where dx/dt changes sign.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747
    """
    if data_at not in (0, 1):
        raise ValueError(f"`data_at` must be 0 or 1, got {data_at}.")
    if data_at == 0:
        return Denoiser(net, Flow(), predicts="velocity")
    return Denoiser(_Negated(net), Flow(), predicts="velocity", time=partial(sub, 1))


@recorded
class _Negated(torch.nn.Module):
    """A network with the opposite sign."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        return -self.net(x, t, **cond)
