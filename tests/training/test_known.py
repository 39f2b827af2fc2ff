"""What a trainer writes into the card of its model: the Gaussian of vectors."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

import scoresde as ss

DATA = torch.tensor([3.0, 0.5]) * torch.randn(500, 2, generator=torch.Generator().manual_seed(0)) + 1


def model(features: int = 2) -> ss.Denoiser:
    return ss.Denoiser(ss.nn.MLP(features, hidden=8), ss.VP(), predicts="v")


@pytest.mark.parametrize("data", [DATA, {"x": DATA}, TensorDataset(DATA)], ids=["tensor", "dictionary", "data set"])
def test_the_trainer_writes_the_gaussian_of_vectors(data: object) -> None:
    net = model()
    trainer = ss.Trainer(ss.DSM(net), data, batch=8)  # type: ignore[arg-type]
    assert net.gaussian is not None
    torch.testing.assert_close(net.gaussian.mean, DATA.double().mean(0), atol=1e-6, rtol=1e-6)
    variances = torch.linalg.eigvalsh(DATA.double().T.cov()).flip(0)
    torch.testing.assert_close(net.gaussian.spectrum, variances, atol=0.0, rtol=0.01)
    trainer.fit(1)
    assert isinstance(trainer.ema_model, ss.Denoiser) and trainer.ema_model.gaussian is not None
    found = ss.sampling.recommend(5, trainer.ema_model).solver
    assert isinstance(found, ss.solvers.Universal)
    assert found.data_std == ss.solvers.universal.unit_of(net.gaussian.spectrum)


def test_a_gaussian_that_is_there_stays_and_the_rest_of_the_card_too() -> None:
    net, own = model(), ss.Gaussian(ss.VP(), torch.zeros(2), torch.ones(2))
    net.card = ss.denoisers.Card(gaussian=own)
    ss.Trainer(ss.DSM(net), DATA, batch=8)
    assert net.gaussian is own
    net.card = ss.denoisers.Card(notes="points")
    ss.Trainer(ss.DSM(net), DATA, batch=8)
    assert net.card.notes == "points" and net.gaussian is not None


@pytest.mark.parametrize("data", [torch.ones(20, 2), DATA[:1], torch.full((20, 2), torch.nan)], ids=str)
def test_data_without_a_scale_writes_nothing(data: torch.Tensor) -> None:
    net = model()
    ss.Trainer(ss.DSM(net), data, batch=1)
    assert net.card is None


def test_images_write_nothing() -> None:
    net = ss.Denoiser(ss.nn.UNet(1, width=8, multipliers=(1,), blocks=1, attention=()), ss.VP(), predicts="v")
    ss.Trainer(ss.DSM(net), torch.randn(20, 1, 8, 8), batch=4)
    assert net.card is None
