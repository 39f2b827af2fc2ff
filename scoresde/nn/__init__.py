"""Small reference networks: MLP, UNet and VAE, and embeddings of the time and of conditions."""

from scoresde.nn.embedding import Conditioning, Fourier, Sinusoidal
from scoresde.nn.mlp import MLP
from scoresde.nn.unet import UNet
from scoresde.nn.vae import VAE, Bound, Independent

__all__ = ["MLP", "VAE", "Bound", "Conditioning", "Fourier", "Independent", "Sinusoidal", "UNet"]
