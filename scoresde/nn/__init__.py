"""Networks that are enough to train for real and small enough to read: MLP, UNet and VAE."""

from scoresde.nn.autocast import Autocast
from scoresde.nn.embedding import Conditioning, Fourier, Sinusoidal
from scoresde.nn.mlp import MLP
from scoresde.nn.unet import UNet
from scoresde.nn.vae import VAE, Bound, Independent

__all__ = [
    "MLP",
    "VAE",
    "Autocast",
    "Bound",
    "Conditioning",
    "Fourier",
    "Independent",
    "Sinusoidal",
    "UNet",
]
