"""Hooks that log elsewhere. Weights & Biases is not installed: a module with its signatures stands in for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde.training import Checkpoints, Preview, TensorBoard, WandB

pytest.importorskip("accelerate")

IMAGES = torch.stack([torch.full((1, 2, 3), value) for value in (-1.0, 0.0, 1.0, 7.0)])


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """Accelerate keeps one state for each process of the system; every test here is a new process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


class Run:
    """A run of Weights & Biases, which has one row for each step; a resumed run begins after its last step."""

    def __init__(self, id: str, config: Mapping[str, Any]) -> None:
        self.id, self.config, self.open, self.next = id, dict(config), True, 0
        self.rows: dict[int, dict[str, Any]] = {}
        self.ignored: list[int] = []

    def log(self, data: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        assert self.open and isinstance(data, dict) and type(step) is int
        assert all(isinstance(name, str) for name in data)
        if step < self.next:
            self.ignored.append(step)
        else:
            self.next = step
            self.rows.setdefault(step, {}).update(data)

    def finish(self, exit_code: int | None = None, quiet: bool | None = None) -> None:
        self.open = False


class Image:
    def __init__(self, data_or_path: Any, mode: str | None = None, caption: str | None = None, **more: Any) -> None:
        from PIL.Image import Image as Picture

        assert isinstance(data_or_path, Picture), "arrays are scaled differently by different versions"
        self.picture = data_or_path


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """Runs of the stand-in, by id."""
    runs: dict[str, Run] = {}

    def init(
        entity: str | None = None,
        project: str | None = None,
        dir: str | None = None,
        id: str | None = None,
        name: str | None = None,
        notes: str | None = None,
        tags: Sequence[str] | None = None,
        config: dict[str, Any] | str | None = None,
        allow_val_change: bool | None = None,
        group: str | None = None,
        job_type: str | None = None,
        mode: str | None = None,
        resume: bool | str | None = None,
        settings: Any = None,
    ) -> Run:
        assert project == "toys" and mode == "offline" and resume == "allow" and allow_val_change
        assert id and not set(id) & set(r"/\#?%:")
        assert isinstance(config, dict) and all(isinstance(key, str) for key in config)
        run = runs.setdefault(id, Run(id, {}))
        run.config.update(config)
        run.open, run.next = True, max(run.rows, default=-1) + 1
        return run

    module: Any = ModuleType("wandb")
    module.init, module.Image, module.Run = init, Image, Run
    monkeypatch.setitem(sys.modules, "wandb", module)
    return runs


def make(*hooks: ss.training.Hook, **options: Any) -> ss.Trainer:
    model = ss.Denoiser(ss.nn.MLP(2, hidden=8, depth=1, seed=0), ss.VP(), predicts="eps")
    data = ss.Noise(0).normal((64, 2), 0)
    return ss.Trainer(ss.DSM(model), data, batch=16, ema=0.5, hooks=hooks, **{"log_every": 1, **options})


def board(**more: Any) -> WandB:
    return WandB("toys", options={"mode": "offline"}, **more)


def test_rows_levels_and_settings_are_logged(runs: dict[str, Run]) -> None:
    trainer = make(board(), log_every=2)
    history = trainer.fit(5)
    (run,) = runs.values()
    assert sorted(run.rows) == [2, 4, 5] and not run.open
    for row in history:
        assert run.rows[int(row["step"])]["train/loss"] == row["loss"]
        assert any(name.startswith("error/lam") for name in run.rows[int(row["step"])])
        assert all(isinstance(value, (int, float)) for value in run.rows[int(row["step"])].values())
    assert run.config["batch"] == 16 and run.config == trainer.identity
    trainer.fit(6)
    assert sorted(run.rows) == [2, 4, 5, 6] and len(runs) == 1, "the same trainer goes on in its run"


def test_a_resumed_run_goes_on_with_its_id_and_one_row_for_each_step(tmp_path: Path, runs: dict[str, Run]) -> None:
    make(board(), Checkpoints(tmp_path, every=2)).fit(5)
    (run,) = runs.values()
    first = {step: dict(row) for step, row in run.rows.items()}
    for step in (4, 5):  # as if the run had been killed before step 4 was saved
        (tmp_path / f"step-{step:09d}.safetensors").unlink()
    trainer = make(board(), Checkpoints(tmp_path, every=2))
    trainer.resume()
    trainer.fit(7)
    assert list(runs) == [run.id] and sorted(run.rows) == list(range(1, 8))
    assert run.ignored == [3, 4, 5] and all(run.rows[step] == first[step] for step in first)


def test_another_run_in_the_folder_has_another_id(tmp_path: Path, runs: dict[str, Run]) -> None:
    make(board(), Checkpoints(tmp_path)).fit(1)
    with pytest.raises(FileExistsError, match="resume"):
        make(board(), Checkpoints(tmp_path)).fit(2)
    assert len(runs) == 1, "a refused run does not write into the other one"
    make(board(), Checkpoints(tmp_path, every=1, overwrite=True), log_every=2).fit(3)
    assert len(runs) == 2, "the run that replaces another one does not go on in its logs"
    make(board(id="chosen")).fit(1)
    assert "chosen" in runs


def test_previews_show_images(tmp_path: Path, runs: dict[str, Run]) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    wandb, tensorboard = board(), TensorBoard(tmp_path)

    def show(model: Any, step: int) -> None:
        wandb.images(IMAGES, step)
        tensorboard.images(IMAGES, step, "digits")

    make(Preview(show, every=2), wandb, tensorboard).fit(4)
    (run,) = runs.values()
    shown = run.rows[2]["samples"]
    assert [image.picture.getpixel((0, 0)) for image in shown] == [0, 128, 255, 255]
    assert shown[0].picture.size == (3, 2) and "train/loss" in run.rows[2]
    read = events.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [event.step for event in read.Images("digits")] == [2, 4]
    for hook in (wandb, tensorboard):
        with pytest.raises(RuntimeError, match=r"Trainer\.fit"):
            hook.images(IMAGES, 5)
    wandb._trainer = SimpleNamespace()  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"`x` must be images .* got shape \(4, 2\)"):
        wandb.images(torch.zeros(4, 2), 1)


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="pip install wandb"):
        make(board()).fit(1)
    with pytest.raises(ValueError, match="`options` has config"):
        WandB("toys", options={"config": {}})
    assert repr(board()) == "WandB(project='toys', id=None, options={'mode': 'offline'})"
