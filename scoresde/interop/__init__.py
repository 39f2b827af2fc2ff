"""Other people's networks and schedules as denoisers and processes; models as folders, and on the Hugging Face Hub."""

from scoresde.interop.diffusers import from_diffusers, sde_from_diffusers
from scoresde.interop.folder import LoadError, load
from scoresde.interop.hub import from_pretrained, push_to_hub
from scoresde.interop.pretrained import from_ddpm, from_edm, from_flow, from_score_sde
from scoresde.interop.readme import model_card

__all__ = [
    "LoadError",
    "from_ddpm",
    "from_diffusers",
    "from_edm",
    "from_flow",
    "from_pretrained",
    "from_score_sde",
    "load",
    "model_card",
    "push_to_hub",
    "sde_from_diffusers",
]
