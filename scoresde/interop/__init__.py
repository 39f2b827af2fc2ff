"""Other people's networks and schedules as denoisers and processes."""

from scoresde.interop.diffusers import from_diffusers, sde_from_diffusers
from scoresde.interop.pretrained import from_ddpm, from_edm, from_flow, from_score_sde

__all__ = [
    "from_ddpm",
    "from_diffusers",
    "from_edm",
    "from_flow",
    "from_score_sde",
    "sde_from_diffusers",
]
