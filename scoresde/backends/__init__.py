"""Other libraries' integrators on the processes of a denoiser; each is imported when it is used."""

from scoresde.backends import torchdiffeq, torchsde

__all__ = ["torchdiffeq", "torchsde"]
