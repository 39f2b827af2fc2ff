"""A run resumes as what it was; what differs has a name, and may differ on purpose only."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import DATA, fresh_accelerator, make, same  # noqa: F401 (a fixture for all tests)

import scoresde as ss
from scoresde.training import EMA, Loader, PowerEMA, Trainer, Update, checkpoint, fingerprint, times, weightings

pytest.importorskip("accelerate")


def adam(trainer: Trainer, **options: Any) -> Trainer:
    """The same trainer with another optimiser."""
    optimiser = torch.optim.Adam(trainer.loss.parameters(), **{"lr": 2e-4, **options})
    return Trainer(trainer.loss, DATA, optimiser, batch=16, folder=trainer.checkpoints.folder)


class Sheared(ss.VP):
    """A process with another name."""


def powered(folder: Path, *stds: float) -> Trainer:
    trainer = make(folder=folder, ema=None)
    trainer.ema = PowerEMA(trainer.model, stds)
    return trainer


OTHER = DATA.clone()
OTHER[57, 1] += 1e-6

CHANGES: dict[str, tuple[Any, str]] = {
    "decay": (lambda folder: make(folder=folder, ema=0.9), r"ema\.decay 0\.9999 \(here 0\.9\)"),
    "no warm-up of the average": (
        lambda folder: make_ema(folder, warmup=False),
        r"ema\.warmup True \(here False\)",
    ),
    "clip": (lambda folder: make(folder=folder, update=Update(clip=2.0)), r"update\.clip 1\.0 \(here 2\.0\)"),
    "warm-up": (lambda folder: make(folder=folder, update=Update(warmup=9)), r"update\.warmup 0 \(here 9\)"),
    "schedule": (
        lambda folder: make(folder=folder, update=Update(schedule=lambda k: 0.5)),
        r"update\.schedule None \(here \[0\.5,",
    ),
    "weighting": (
        lambda folder: make(folder=folder, loss=lambda m: ss.DSM(m, "min_snr")),
        r"loss DSM\(.*On.*here DSM\(.*MinSNR.*loss\.weights",
    ),
    "times": (lambda folder: make(folder=folder, loss=lambda m: ss.DSM(m, times=times.LogitNormal())), "loss DSM"),
    "dropout": (
        lambda folder: make(folder=folder, net={"dropout": 0.1}),
        r"network .*\(p=0\.0.*\(p=0\.1",
    ),
    "one number of the data": (lambda folder: make(folder=folder, data=OTHER), r"data \w+ \(here \w+\)"),
    "order of the data": (lambda folder: make(folder=folder, data=DATA.flip(0)), r"data \w+ \(here \w+\)"),
    "precision of the data": (lambda folder: make(folder=folder, data=DATA.double()), r"data \w+ \(here \w+\)"),
    "learning rate": (lambda folder: adam(make(folder=folder), lr=1e-3), r"optimiser\.lr 0\.0002 \(here 0\.001\)"),
    "betas": (lambda folder: adam(make(folder=folder), betas=(0.5, 0.9)), r"optimiser\.betas \[0\.9, 0\.999\]"),
}


def make_ema(folder: Path, **options: Any) -> Trainer:
    trainer = make(folder=folder, ema=None)
    trainer.ema = EMA(trainer.model, **options)
    return trainer


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_named(change: str, tmp_path: Path) -> None:
    other, match = CHANGES[change]
    first = make(folder=tmp_path)
    first.fit(2)
    again = other(tmp_path)
    before = {name: w.clone() for name, w in again.loss.state_dict().items()}
    with pytest.raises(ValueError, match=f"another run, with {match}.*" + r"trainer\.resume\(changes=\["):
        again.resume()
    assert same(dict(again.loss.state_dict()), before) and again.step == 0, "nothing was loaded"
    names = sorted(name for name in again.identity if again.identity[name] != first.identity[name])
    assert again.resume(changes=names) and again.step == 2
    again.fit(4)
    assert make(folder=tmp_path).checkpoints.latest()[0] == 4  # type: ignore[index, union-attr]


def test_functions_are_told_apart_by_their_values(tmp_path: Path) -> None:
    def trainer(rate: float, weight: float, init: int = 0) -> Trainer:
        loss = lambda model: ss.DSM(model, lambda sde, t: weight + t)  # noqa: E731
        return make(init, folder=tmp_path, loss=loss, update=Update(schedule=lambda step: rate**step))

    trainer(0.99, 1.0).fit(2)
    with pytest.raises(ValueError, match=r"with update\.schedule 0\.99 \(here 0\.98\); "):
        trainer(0.98, 1.0).resume()
    with pytest.raises(ValueError, match=r"with loss\.weights \d.* \(here \d.*\); "):
        trainer(0.99, 2.0).resume()
    assert trainer(0.99, 1.0, init=5).resume()


def test_changes_on_purpose_are_the_new_settings(tmp_path: Path) -> None:
    first = adam(make(folder=tmp_path), betas=(0.9, 0.99))
    first.fit(3)
    again = adam(make(folder=tmp_path), lr=1e-3, betas=(0.5, 0.9))
    assert again.resume(changes=["optimiser"])
    group = again.optimiser.param_groups[0]
    assert tuple(group["betas"]) == (0.5, 0.9) and again.rates == [1e-3]
    moments = [p["exp_avg"] for p in again.optimiser.state_dict()["state"].values()]
    assert all(bool(m.abs().sum() > 0) for m in moments), "the moments go on"
    other = make(folder=tmp_path, ema=0.5)
    sgd = torch.optim.SGD(other.loss.parameters(), 1e-3)
    other = Trainer(other.loss, DATA, sgd, batch=16, ema=0.5, folder=tmp_path)
    assert other.resume(changes=["ema.decay", "optimiser"])
    assert other.ema.decay == 0.5 and other.ema.updates == 3  # type: ignore[union-attr]


def test_an_average_of_another_kind_starts_from_the_loaded_weights(tmp_path: Path) -> None:
    make(folder=tmp_path, ema=None).fit(3)
    again = make(7, folder=tmp_path, ema=0.5)
    assert again.resume(changes=["average", "ema"])
    assert again.ema.updates == 0  # type: ignore[union-attr]
    assert all(torch.equal(w, again.ema.weights[k]) for k, w in again.model.state_dict().items())  # type: ignore[union-attr]
    again.fit(4)
    other = powered(tmp_path, 0.1, 0.05)
    assert other.resume(changes=["average", "ema"]) and other.ema.updates == 0  # type: ignore[union-attr]
    none = make(folder=tmp_path, ema=None)
    assert none.resume(changes=["average", "ema"]) and none.step == 4


def test_a_new_loss_keeps_the_network(tmp_path: Path) -> None:
    make(folder=tmp_path).fit(2)
    changes = ["loss", "loss.weights", "network"]
    other = make(5, folder=tmp_path, loss=lambda m: ss.DSM(m, weightings.Uncertainty("simple")))
    with pytest.raises(ValueError, match=r"doesn't match the size|parameter group"):
        other.resume(changes=changes)  # the optimiser has new parameters
    learned = lambda m: ss.DSM(m, proposal=times.Stratified(times.LossAware(bins=4)))  # noqa: E731
    other = make(5, folder=tmp_path, loss=learned)
    assert other.resume(changes=changes)
    other.fit(3)


def test_settings_are_those_of_the_moment(tmp_path: Path) -> None:
    first = make(folder=tmp_path)
    first.fit(1)
    first.rates = [1e-3]
    first.fit(2)
    with pytest.raises(ValueError, match=r"with optimiser\.lr 0\.001 \(here 0\.0002\); "):
        make(folder=tmp_path).resume()


def test_names_of_changes_are_checked(tmp_path: Path) -> None:
    make(folder=tmp_path).fit(2)
    with pytest.raises(ValueError, match=r"`changes` has 'clip'; the settings are .*update\.clip"):
        make(folder=tmp_path).resume(changes=["clip"])
    with pytest.raises(TypeError, match=r"write changes=\['update'\]"):
        make(folder=tmp_path).resume(changes="update")
    assert make(folder=tmp_path).resume(changes=["update", "seed"]), "what may differ need not"


def test_a_checkpoint_of_the_first_version_loads_with_a_warning(tmp_path: Path) -> None:
    first = make(folder=tmp_path)
    first.fit(2)
    path, old = first.checkpoints.path(2), "seed batch samples processes average precision process predicts".split()  # type: ignore[union-attr]
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "run": {name: state["run"][name] for name in old}})
    again = make(5, folder=tmp_path)
    with pytest.warns(UserWarning, match=r"did not store .*ema\.decay.*update\.clip"):
        assert again.resume()
    assert same(dict(again.loss.state_dict()), dict(first.loss.state_dict()))
    with pytest.warns(UserWarning, match="did not store"), pytest.raises(ValueError, match=r"with seed 0 \(here 1\)"):
        make(folder=tmp_path, seed=1).resume()


# Fingerprints.


class Pictures(torch.utils.data.Dataset):
    """Samples with a random transform: of the global generators, of one's own, or none."""

    def __init__(self, shift: float = 0.0, transform: str = "none") -> None:
        self.shift, self.transform, self.calls = shift, transform, 0
        self.own = np.random.default_rng()

    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.calls += 1
        numpy = np.random.rand()  # noqa: NPY002 (as many transforms do)
        noise = {"none": 0.0, "torch": torch.rand(1).item(), "numpy": numpy, "own": self.own.random()}
        return {"x": np.full(3, i + self.shift + noise[self.transform]), "label": i}


@pytest.mark.parametrize("transform", ["none", "torch", "numpy"])
def test_a_data_set_is_told_by_its_samples(transform: str) -> None:
    before = torch.get_rng_state()
    one, same_again, other = (Loader(Pictures(shift, transform)).fingerprint() for shift in (0, 0, 1))
    assert one == same_again != other and one.startswith("Pictures ")
    assert torch.equal(before, torch.get_rng_state())


def test_a_data_set_that_cannot_be_told_is_not_read_in_vain() -> None:
    assert Loader(Pictures(transform="own")).fingerprint() == "Pictures", "it differs at every reading"
    data = Pictures()
    assert Loader(data, workers=2).fingerprint() == "Pictures" and data.calls == 0, "a fork may break open files"
    data._fingerprint = "abc"  # type: ignore[attr-defined]
    assert Loader(data).fingerprint() == "Pictures abc" and data.calls == 0


def test_other_workers_do_not_make_other_data(tmp_path: Path) -> None:
    def trainer(shift: float, workers: int) -> Trainer:
        return make(
            folder=tmp_path, data=Loader(Pictures(shift), unpack=lambda b: (b["x"][:, :2].float(), {}), workers=workers)
        )

    trainer(0.0, 0).fit(1)
    assert trainer(0.0, 2).resume()
    with pytest.raises(ValueError, match=r"with data Pictures \w+ \(here Pictures \w+\)"):
        trainer(1.0, 0).resume()


def test_large_tensors_are_read_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "_READ", 400)
    x = torch.arange(3000.0).reshape(1000, 3)
    one = fingerprint.of_tensors({"x": x})
    for row in (0, 999):
        other = x.clone()
        other[row] += 1
        assert fingerprint.of_tensors({"x": other}) != one
    assert fingerprint.of_tensors({"x": x + 1}) != one != fingerprint.of_tensors({"x": x[:999]})
    assert fingerprint.of_tensors({"x": x.clone()}) == one
    for kind in (torch.bfloat16, torch.bool, torch.complex64, torch.int64):
        assert fingerprint.of_tensors({"x": x.to(kind)}) != one
    assert fingerprint.of_tensors({"x": torch.zeros(5, 0)}) != fingerprint.of_tensors({"x": torch.zeros(6, 0)})


# The schedule of the learning rate.


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, -1e-9])
def test_a_bad_rate_is_noticed_before_the_step(bad: float) -> None:
    rates = [1.0, 0.0, 0.5, bad]
    trainer = make(update=Update(schedule=lambda step: rates[step]))
    with pytest.raises(
        ValueError, match=r"`schedule` must return .* at least 0, got .* at step 3; the weights are unch"
    ):
        trainer.fit(5)
    twin = make(update=Update(schedule=lambda step: rates[step]))
    twin.fit(3)
    assert trainer.step == 3 and same(dict(trainer.loss.state_dict()), dict(twin.loss.state_dict()))
    for nothing in (None, "1e-3x", [1, 2]):
        with pytest.raises(TypeError, match=r"must return a number, got .* at step 0"):
            Update(schedule=lambda step, nothing=nothing: nothing).factor(0)  # type: ignore[misc]
    assert Update(schedule=lambda step: torch.tensor(0.5)).factor(3) == 0.5  # type: ignore[arg-type, return-value]
    assert Update(schedule=lambda step: np.float32(0.25)).factor(3) == 0.25  # type: ignore[arg-type, return-value]
