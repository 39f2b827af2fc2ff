"""How each class of diffusers' networks is called: labels, sign, and the form of its input and output."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from scoresde._build import recorded
from scoresde.denoisers.base import Condition
from scoresde.denoisers.clocks import Affine
from scoresde.interop.networks import Adapted, Net

# Conditions without a batch axis: positions, which all samples share.
SHARED = ("txt_ids", "img_ids", "image_rotary_emb", "rotary_embedding", "visual_rope_pos", "text_rope_pos", "cap_feats")

_TIMES = ("timestep", "timesteps", "timestep_ratio", "t")


@dataclass(frozen=True)
class Convention:
    """How the pipelines of a class call its network on a flow, whose labels are N t.

    Arguments:
        a: Constant of the label, a + b N t.
        b: Factor of the label: a number, ``"1/N"``, ``"-1/N"``, or the name of an entry of the network's configuration.
        sign: Factor of the output, 1 or −1.
        listed: Whether the network takes and returns a list of samples with an axis for frames.
    """

    a: float = 0.0
    b: float | str = 1.0
    sign: int = 1
    listed: bool = False


_UNIT = Convention(b=1 / 1000)
_OF_N = Convention(b="1/N")

CALLS = {
    "AuraFlowTransformer2DModel": _UNIT,
    "BriaFibo2Transformer2DModel": _UNIT,
    "ChromaTransformer2DModel": _UNIT,
    "Flux2Transformer2DModel": _UNIT,
    "FluxTransformer2DModel": _UNIT,
    "LongCatImageTransformer2DModel": _UNIT,
    "OvisImageTransformer2DModel": _UNIT,
    "QwenImage21Transformer2DModel": _UNIT,
    "QwenImageTransformer2DModel": _UNIT,
    "CosmosTransformer3DModel": _OF_N,
    "Krea2Transformer2DModel": _OF_N,
    "LongCatAudioDiTTransformer": _OF_N,
    "PRXTransformer2DModel": _OF_N,
    "NucleusMoEImageTransformer2DModel": Convention(b="1/N", sign=-1),
    "Lumina2Transformer2DModel": Convention(a=1, b="-1/N", sign=-1),
    "LuminaNextDiT2DModel": Convention(a=1, b="-1/N", sign=-1),
    "ZImageTransformer2DModel": Convention(a=1, b=-1 / 1000, sign=-1, listed=True),
    "HiDreamImageTransformer2DModel": Convention(sign=-1),
    "GlmImageTransformer2DModel": Convention(a=-1),
    "SanaTransformer2DModel": Convention(b="timestep_scale"),
}

_TWO_TIMES = "it takes two times, and a sampler here has one"
_JOINED = "its pipeline joins the state with other tensors before each call"

REFUSED = {
    "AceStepTransformer1DModel": _TWO_TIMES,
    "AnyFlowFARTransformer3DModel": _TWO_TIMES,
    "AnyFlowTransformer3DModel": _TWO_TIMES,
    "Cosmos3OmniTransformer": _JOINED,
    "DreamLiteUNetModel": _JOINED,
    "Ideogram4Transformer2DModel": _JOINED,
    "LTX2VideoTransformer3DModel": "its state is a pair of video and audio",
    "MiniMaxH3Transformer3DModel": "its state is a pair of video and audio",
    "RFD4ProteinaTransformer": "its state is a pair of coordinates and latents",
    "UVit2DModel": "it predicts discrete tokens",
    "UniDiffuserModel": "its state is a pair of image and text",
}


def call_of(net: object) -> Convention:
    """How the class of a network is called; the default for classes that are not in the table.

    Arguments:
        net: Network, compiled or not.
    """
    names = [kind.__name__ for kind in type(_original(net)).__mro__]
    for name in names:
        if name in REFUSED:
            raise ValueError(f"`net` is a {name}, which has no denoiser here: {REFUSED[name]}.")
    return next((CALLS[name] for name in names if name in CALLS), Convention())


def label_of(call: Convention, net: object, N: int) -> Affine:
    """Label of the network for the label N t of its scheduler."""
    if not isinstance(call.b, str):
        return Affine(call.a, call.b)
    if call.b in ("1/N", "-1/N"):
        return Affine(call.a, (1 if call.b == "1/N" else -1) / N)
    return Affine(call.a, float(network_config(net).get(call.b, 1.0)))


def network_config(net: object) -> Mapping[str, Any]:
    """Configuration of a network, empty if it has none."""
    config = getattr(_original(net), "config", None)
    return config if isinstance(config, Mapping) else {}


def doubles_channels(net: object) -> bool:
    """Whether a network's configuration says that it returns twice the channels of its input."""
    config = network_config(net)
    if isinstance(learns := config.get("learn_sigma"), bool):
        return learns
    inner, outer = config.get("in_channels"), config.get("out_channels")
    return isinstance(inner, int) and isinstance(outer, int) and outer == 2 * inner


@recorded
class DiffusersNet(Adapted):
    """A network of diffusers: its time by keyword, its output from ``.sample`` or from the first entry of a tuple.

    Arguments:
        net: UNet or transformer, or a function ``net(x, label, **cond)``.
        sign: Factor of the output, 1 or −1.
        listed: Whether the network takes and returns a list of samples with an axis for frames.
        first_half: Whether only the first half of the output's channels is the prediction.
    """

    def __init__(self, net: Net, *, sign: int = 1, listed: bool = False, first_half: bool = False) -> None:
        super().__init__(net, sign=sign, uncast=SHARED)
        self.listed = listed
        self.first_half = first_half
        self.time_name = _time_name(net)

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        state: Any = list(x.unsqueeze(2).unbind(0)) if self.listed else x
        label = (t,) if self.time_name is None else ()
        named = {} if self.time_name is None else {self.time_name: t}
        out = _tensor(self.net(state, *label, **named, **cond))
        if self.listed:
            out = torch.stack(list(out)).squeeze(2)
        return out[:, : x.shape[1]] if self.first_half and out.shape[1] == 2 * x.shape[1] else out


def _tensor(out: object) -> Tensor:
    """The prediction in an output of diffusers: ``.sample``, the first entry of a tuple, or the output itself."""
    if isinstance(out, Tensor):
        return out
    if hasattr(out, "sample"):
        return cast(Tensor, out.sample)
    if isinstance(out, Mapping):  # other classes of outputs are dictionaries, of one entry
        return cast(Tensor, next(iter(out.values())))
    return cast(Tensor, out[0] if isinstance(out, tuple) and out else out)


def _time_name(net: object) -> str | None:
    """Name of the network's argument for time, or None if it is the second by position."""
    original = _original(net)
    try:
        names = list(inspect.signature(getattr(original, "forward", original)).parameters)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    # A function of one's own, net(x, t, ...), is called by position.
    return next((name for name in _TIMES if name in names and (name != "t" or _is_model(original))), None)


def _is_model(net: object) -> bool:
    return bool(network_config(net))


def _original(net: object) -> object:
    """The network inside torch.compile's wrapper, or the network itself."""
    return getattr(net, "_orig_mod", net)
