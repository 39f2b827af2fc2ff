"""Other people's networks and schedules, our solvers in their programs, and models as folders and on the Hub."""

from scoresde.interop.diffusers import from_diffusers, sde_from_diffusers
from scoresde.interop.folder import LoadError, load
from scoresde.interop.hub import from_pretrained, push_to_hub
from scoresde.interop.kdiffusion import kdiffusion_sampler
from scoresde.interop.pretrained import from_ddpm, from_edm, from_flow, from_score_sde
from scoresde.interop.readme import model_card
from scoresde.interop.sbi import from_sbi, sbi_posterior
from scoresde.interop.schedulers import to_diffusers

__all__ = [
    "LoadError",
    "from_ddpm",
    "from_diffusers",
    "from_edm",
    "from_flow",
    "from_pretrained",
    "from_sbi",
    "from_score_sde",
    "kdiffusion_sampler",
    "load",
    "model_card",
    "push_to_hub",
    "sbi_posterior",
    "sde_from_diffusers",
    "to_diffusers",
]
