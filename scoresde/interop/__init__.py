"""Other people's networks and schedules, our solvers in their programs, and models as folders and on the Hub."""

from scoresde.interop.diffusers import from_diffusers, sde_from_diffusers
from scoresde.interop.edm import from_edm, from_kdiffusion
from scoresde.interop.flow_matching import from_flow
from scoresde.interop.folder import LoadError, load
from scoresde.interop.guided_diffusion import Classifier, from_ddpm, from_guided_diffusion, respaced
from scoresde.interop.hub import from_pretrained, push_to_hub
from scoresde.interop.kdiffusion import kdiffusion_sampler
from scoresde.interop.readme import model_card
from scoresde.interop.sbi import from_sbi, sbi_posterior
from scoresde.interop.schedulers import to_diffusers
from scoresde.interop.score_sde import from_score_sde
from scoresde.interop.weights import LoadReport, load_weights, renamed, with_prefix, without_prefix

__all__ = [
    "Classifier",
    "LoadError",
    "LoadReport",
    "from_ddpm",
    "from_diffusers",
    "from_edm",
    "from_flow",
    "from_guided_diffusion",
    "from_kdiffusion",
    "from_pretrained",
    "from_sbi",
    "from_score_sde",
    "kdiffusion_sampler",
    "load",
    "load_weights",
    "model_card",
    "push_to_hub",
    "renamed",
    "respaced",
    "sbi_posterior",
    "sde_from_diffusers",
    "to_diffusers",
    "with_prefix",
    "without_prefix",
]
