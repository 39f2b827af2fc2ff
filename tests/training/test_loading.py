"""What goes in: DataLoaders and data sets with any workers. What comes out: the averaged model, validation losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import DATA, Net, fresh_accelerator, losses, make, same  # noqa: F401 (a fixture for all tests)
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
)

import scoresde as ss
from scoresde.training import Checkpoints, Loader, TensorBoard, Trainer, Validation, times

pytest.importorskip("accelerate")

LABELS = torch.arange(100) % 3


def labelled(batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
    return batch[0], {"label": batch[1]}


class Sampled(Dataset[Tensor]):
    """Samples of an exact model, drawn where they are loaded."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        truth = ss.GaussianMixture(ss.VP(), torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), std=0.3)
        return ss.sample(truth, (1, 2), steps=3, seed=i)[0].float()


# Data.


def test_an_array_of_floats_is_its_tensor_and_one_of_bytes_needs_a_function() -> None:
    of_tensor, of_array = make(data=DATA), make(data=DATA.numpy())
    of_tensor.fit(2), of_array.fit(2)
    assert losses(of_array) == losses(of_tensor)
    raw = (DATA > 0).byte().numpy()
    with pytest.raises(TypeError, match=r"uint8 array of shape .*use torch.as_tensor\(data, dtype=torch.float32\)"):
        make(data=raw)
    made = make(data=Loader(raw, unpack=lambda batch: (2.0 * batch - 1, {})))  # type: ignore[arg-type]
    made.fit(1)
    assert made.step == 1


def test_data_sets_and_loaders_are_the_tensors_in_them() -> None:
    runs = [
        make(data=data, batch=batch)
        for data, batch in (
            (DATA, 16),
            (TensorDataset(DATA), 16),
            (DataLoader(TensorDataset(DATA), batch_size=16, shuffle=True), None),
            (DataLoader(DATA, batch_size=16, collate_fn=torch.stack), 16),  # type: ignore[arg-type]
        )
    ]
    for trainer in runs:
        trainer.fit(4)
        assert losses(trainer) == losses(runs[0]) and trainer.order.batch == 16
    assert runs[1].identity["data"] == runs[2].identity["data"] and make(batch=None).order.batch == 128
    pairs = TensorDataset(DATA, LABELS)
    named = make(data={"x": DATA, "label": LABELS})
    named.fit(3)
    for data in (pairs, DataLoader(pairs, 16, shuffle=True)):
        trainer = make(data=Loader(data, unpack=labelled))
        trainer.fit(3)
        assert losses(trainer) == losses(named)
        with pytest.raises(TypeError, match=r"`data` has 2 tensors; say what they are, as in .*unpack=lambda"):
            make(data=data)


def test_a_loader_keeps_its_own_way_of_collating() -> None:
    def double(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {"x": 2 * torch.stack([row[0] for row in rows])}

    trainer = make(data=DataLoader(TensorDataset(DATA), 16, shuffle=True, collate_fn=double), batch=None)
    twice = make(data=2 * DATA)
    trainer.fit(3)
    twice.fit(3)
    assert losses(trainer) == losses(twice)


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Any:
        return iter(DATA)


def test_loaders_with_an_order_of_their_own_are_refused() -> None:
    data = TensorDataset(DATA)
    for match, loader in (
        (
            "DataLoader with WeightedRandomSampler",
            DataLoader(data, 16, sampler=WeightedRandomSampler(DATA[:, 0].abs(), 9)),
        ),
        ("DataLoader with DistributedSampler", DataLoader(data, 16, sampler=DistributedSampler(data, 2, 0))),
        ("DataLoader with list", DataLoader(data, batch_sampler=[[0, 1], [2]])),
        ("with replacement", DataLoader(data, 16, sampler=torch.utils.data.RandomSampler(data, replacement=True))),
        ("a part of the data", DataLoader(data, 16, sampler=torch.utils.data.RandomSampler(data, num_samples=7))),
        ("`batch`=16, and the DataLoader has batch_size=8", DataLoader(data, 8, shuffle=True)),
    ):
        with pytest.raises(ValueError, match=match):
            make(data=loader)
    with pytest.raises(TypeError, match="a stream cannot be resumed"):
        make(data=DataLoader(Stream(), 16))
    with pytest.raises(ValueError, match="give the workers to the DataLoader"):
        Loader(DataLoader(data, 16), workers=2)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_any_kind_load_the_same_samples(start: str) -> None:
    here = make(data=Sampled(), batch=4)
    here.fit(4)
    loader = DataLoader(Sampled(), 4, shuffle=True, num_workers=1, multiprocessing_context=start, timeout=100)
    there = make(data=loader, batch=None)
    there.fit(4)
    assert losses(there) == losses(here)


# The averaged model.


def test_the_averaged_model_is_one_call_away_and_ones_own() -> None:
    trainer = make(0, net={"dropout": 0.2}, ema=0.5)
    trainer.fit(3)
    before = {name: w.clone() for name, w in trainer.model.state_dict().items()}
    model = trainer.ema_model
    assert same(dict(model.state_dict()), dict(trainer.ema.weights))  # type: ignore[union-attr]
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    with trainer.averaged() as lent:
        assert torch.equal(ss.sample(model, (4, 2), steps=3, seed=0), ss.sample(lent, (4, 2), steps=3, seed=0))  # type: ignore[arg-type]
    for p in model.parameters():
        p.zero_()
    assert same(dict(trainer.model.state_dict()), before) and trainer.model.training
    trainer.fit(4)
    assert not any(bool((w == 0).all()) for w in trainer.ema.weights.values())  # type: ignore[union-attr]
    raw = make(0, ema=None)
    assert same(dict(raw.ema_model.state_dict()), dict(raw.model.state_dict()))


# Validation.

OTHERS = ss.Noise(5).normal((50, 2), 0)


def test_the_validation_loss_is_that_of_the_average_at_fixed_times_and_noise() -> None:
    trainer = make(0, net={"dropout": 0.3}, ema=0.5, hooks=[Validation(OTHERS, every=3, batch=16, seed=4)])
    history = trainer.fit(4)
    assert [row["step"] for row in history if "validation" in row] == [3, 4]
    loss = ss.DSM(trainer.ema_model).eval()  # type: ignore[arg-type]
    assert history[-1]["validation"] == pytest.approx(float(loss(OTHERS, ss.Noise(4))), rel=1e-5)
    whole = Validation(OTHERS, batch=50, seed=4).loss(trainer)
    assert history[-1]["validation"] == pytest.approx(whole, rel=1e-5), "batches do not matter"
    assert Validation(OTHERS, batch=16, seed=5).loss(trainer) != pytest.approx(whole, rel=1e-3)
    assert Validation(OTHERS, batch=50, seed=4).loss(trainer) == whole


def test_validation_leaves_the_run_as_it_was() -> None:
    def learned(model: ss.Denoiser) -> ss.DSM:
        return ss.DSM(model, proposal=times.Stratified(times.LossAware(bins=4, warmup=2)), drop=0.3, null={"label": -1})

    data = {"x": DATA, "label": LABELS}
    options = {"data": data, "loss": learned, "net": {"dropout": 0.2, "norm": True}, "log_every": 2}
    plain = make(0, **options)
    plain.fit(6)
    state = plain.state_dict()
    watched = make(0, **options, hooks=[Validation({**data}, every=3, batch=30)])
    watched.fit(6)
    assert all(same(state[part], watched.state_dict()[part]) for part in ("loss", "ema", "optimiser", "rng"))
    assert [row["step"] for row in watched.history] == [2, 3, 4, 6]
    assert watched.loss.training and watched.loss.proposal is not None
    uniform = ss.DSM(watched.ema_model, drop=0.3, null={"label": -1}).eval()  # type: ignore[arg-type]
    expected = float(uniform(DATA, ss.Noise(0), label=LABELS))
    assert watched.history[-1]["validation"] == pytest.approx(expected, rel=1e-5), (
        "the times of the loss, not the proposal"
    )


def test_any_loss_can_be_validated_and_tensorboard_shows_it(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def forward(self, x: Tensor, noise: Any) -> Tensor:
            t = noise.uniform((len(x),), 0, dtype=x.dtype, device=x.device)
            return (self.net(x, t) ** 2).mean() + 1

    trainer = Trainer(Own(), DATA, batch=16, ema=0.5, hooks=[TensorBoard(tmp_path), Validation(OTHERS, every=2)])
    history = trainer.fit(5)
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("validation/loss")] == [
        (row["step"], pytest.approx(row["validation"])) for row in history if "validation" in row
    ]
    assert "train/validation" not in read.Tags()["scalars"] and "validation" in repr(trainer).lower()


def test_validation_does_not_change_what_is_resumed(tmp_path: Path) -> None:
    make(hooks=[Checkpoints(tmp_path), Validation(OTHERS, every=2)]).fit(3)
    again = make(3, hooks=[Checkpoints(tmp_path)])
    assert again.resume()
    with pytest.raises(ValueError, match="`every` must be at least 1"):
        Validation(OTHERS, every=0)
    with pytest.raises(TypeError, match="a stream cannot be resumed"):
        Validation(iter([1]))  # type: ignore[arg-type]
