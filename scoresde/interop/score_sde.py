"""Denoisers from networks of score_sde."""

from __future__ import annotations

import torch

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.denoisers.clocks import Affine, NearestLevel
from scoresde.denoisers.network import Denoiser
from scoresde.interop.networks import Adapted, Net
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import VE, VP, SubVP
from scoresde.processes.sde import SDE


@checked
def from_score_sde(net: Net, kind: str, *, discrete: int | None = None, **parameters: float) -> Denoiser:
    """Denoiser from a network of score_sde, NCSN++ or DDPM++.

    ==========  ==========================  ===========================================
    kind        trained on all times        `discrete` = N, trained on N levels
    ==========  ==========================  ===========================================
    vp          ε at label 999 t            ε at the label of the β list, 0 … N − 1
    subvp       ε at label 999 t            –
    ve          score at label σ            score at label N − 1 − i, with σ_i ascending
    ==========  ==========================  ===========================================

    The label σ does not depend on the parametrisation of time, so the time of :class:`VE` may differ from theirs.

    Arguments:
        net: Raw network, before that code base's ``get_score_fn``.
        kind: Process, ``"vp"``, ``"subvp"`` or ``"ve"``.
        discrete: Number of levels N, for configurations with ``training.continuous = False``.
        **parameters: Parameters of the process: ``beta_min``, ``beta_max``, or ``sigma_min``, ``sigma_max``.

    References:
        | Score-Based Generative Modeling through Stochastic Differential Equations (Song et al., 2021),
          arXiv:2011.13456
    """
    check.choice("kind", kind, ("vp", "subvp", "ve"))
    adapted = Adapted(net)
    if kind == "ve":
        ve = VE(**parameters)
        if discrete is None:
            return Denoiser(adapted, ve, predicts="score", time="sigma")
        return Denoiser(
            adapted, ve, predicts="score", time=NearestLevel(ve, check.integer("discrete", discrete, at_least=2))
        )
    if discrete is not None:
        if kind == "subvp":
            raise ValueError("`discrete` has no meaning for kind='subvp', which is trained on all times; drop it.")
        N, vp = check.integer("discrete", discrete, at_least=2), VP(**parameters)
        rates = torch.linspace(vp.beta_min / N, vp.beta_max / N, N, dtype=torch.float64)
        return Denoiser(adapted, Discrete(rates), predicts="eps", time="nearest_index")
    process: SDE = VP(**parameters) if kind == "vp" else SubVP(**parameters)
    return Denoiser(adapted, process, predicts="eps", time=Affine(0.0, 999.0))
