"""Denoisers from networks of flow matching."""

from __future__ import annotations

import inspect

from torch import Tensor

from scoresde._build import recorded
from scoresde._doors import checked
from scoresde.denoisers.base import Condition
from scoresde.denoisers.clocks import Affine
from scoresde.denoisers.network import Denoiser
from scoresde.interop.networks import Adapted, Net
from scoresde.processes.named import Flow
from scoresde.processes.sde import SDE


@checked
def from_flow(net: Net, *, data_at: float = 0.0, sde: SDE | None = None, time_first: bool | None = None) -> Denoiser:
    """Denoiser from a flow-matching network, which returns dx/dt along straight lines or along another process.

    ======================================  =====================================
    code base                               call
    ======================================  =====================================
    flow_matching: ``net(x, t, **extras)``  ``from_flow(net, data_at=1)``
    torchcfm: ``net(t, x, y)``              ``from_flow(net, data_at=1)``
    rectified flow, SD3: noise at t = 1     ``from_flow(net)``
    ======================================  =====================================

    Arguments:
        net: Network ``net(x, t, **cond)`` or ``net(t, x, **cond)``.
        data_at: Time of the data in the network's convention: 0 as in this library, or 1, where dx/dt changes sign.
        sde: Process with T = 1, by default :class:`Flow`; :class:`Trig` is the cosine scheduler of flow_matching.
        time_first: Whether the network takes its time first; by default it does if the first argument is named `t`,
            `time` or `timesteps`.

    References:
        | Flow Matching for Generative Modeling (Lipman et al., 2023), arXiv:2210.02747
    """
    if data_at not in (0, 1):
        raise ValueError(f"`data_at` must be 0 or 1, got {data_at}.")
    process = Flow() if sde is None else sde
    if process.T != 1 and data_at == 1:
        raise ValueError(f"`sde` must have T = 1 with `data_at`=1, got T = {process.T:g}.")
    adapted = FlowNet(net, sign=1 if data_at == 0 else -1, time_first=time_first)
    return Denoiser(adapted, process, predicts="velocity", time="t" if data_at == 0 else Affine(1.0, -1.0))


@recorded
class FlowNet(Adapted):
    """A velocity with its arguments in either order.

    Arguments:
        net: Network.
        sign: Factor of the output, 1 or −1.
        time_first: Whether the network takes its time first, or None to read it from the names of its arguments.
    """

    def __init__(self, net: Net, *, sign: int = 1, time_first: bool | None = None) -> None:
        super().__init__(net, sign=sign)
        self.time_first = _first_is_time(net) if time_first is None else time_first

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        return self.net(t, x, **cond) if self.time_first else self.net(x, t, **cond)


def _first_is_time(net: object) -> bool:
    original = getattr(net, "_orig_mod", net)
    try:
        names = list(inspect.signature(getattr(original, "forward", original)).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False
    return bool(names) and names[0] in ("t", "time", "timesteps")
