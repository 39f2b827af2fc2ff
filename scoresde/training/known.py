"""What a trainer learns about its data for the sampler: the Gaussian of vectors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn
from torch.utils.data import TensorDataset

from scoresde.denoisers.base import Wrapped
from scoresde.denoisers.card import Card
from scoresde.denoisers.gaussian import Gaussian
from scoresde.denoisers.network import Denoiser
from scoresde.training.data_order import Loader

LARGEST, SAMPLES = 1024, 10_000


def know_vectors(model: nn.Module, loader: Loader) -> None:
    """Write the Gaussian of the data into the card of a network of vectors that does not know it.

    The mean and the covariance are those of the first ten thousand samples. ``ss.sample`` takes the scale of the data
    from them, see :class:`Universal`. Nothing happens for data that are no tensor (N, D), or with D above 1024.

    Arguments:
        model: Denoiser that is trained.
        loader: Data of the run.
    """
    while isinstance(model, Wrapped):
        model = model.model
    data: object = loader.data
    if type(data) is TensorDataset:
        data = data.tensors[0]
    elif isinstance(data, Mapping):
        data = data.get("x")
    if not isinstance(model, Denoiser) or model.gaussian is not None or loader.unpack is not None:
        return
    if not isinstance(data, Tensor) or data.ndim != 2 or data.shape[1] > LARGEST or not data.is_floating_point():
        return
    known = data[:SAMPLES].detach()
    if len(known) > 1 and bool(known.isfinite().all()) and bool((known != known[:1]).any()):
        model.card = replace(model.card or Card(), gaussian=Gaussian.estimate(model.sde, known))
