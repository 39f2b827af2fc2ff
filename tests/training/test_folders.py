"""A folder of checkpoints has one run and one writer, and a run continues only as what it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_trainer import fresh_accelerator, make, same  # noqa: F401 (a fixture for all tests)

from scoresde._files import SILENT
from scoresde.training import Checkpoints, Hook, Record, Trainer
from scoresde.training.checkpoint import load

pytest.importorskip("accelerate")


class At(Hook):
    """A function that is called after a step."""

    def __init__(self, step: int, function: Callable[[], object]) -> None:
        self.step, self.function = step, function

    def on_step(self, trainer: Trainer, record: Record) -> None:
        if record.step == self.step:
            self.function()


def contents(folder: Path) -> list[int]:
    """Steps of the checkpoints, if nothing else is in the folder."""
    steps = Checkpoints(folder).steps()
    assert sorted(file.name for file in folder.iterdir()) == [f"step-{step:09d}.safetensors" for step in steps]
    return steps


def test_a_new_run_in_the_folder_of_a_longer_one_is_refused(tmp_path: Path) -> None:
    old = make(0, folder=tmp_path)
    old.fit(6)
    before = (tmp_path / "step-000000006.safetensors").read_bytes()
    new = make(1, folder=tmp_path)
    for act in (lambda: new.fit(2), new.save):
        with pytest.raises(
            FileExistsError, match=r"up to step 6; continue it with trainer.resume\(\), .*overwrite=True"
        ):
            act()
    assert new.step == 0 and contents(tmp_path) == [6]
    assert (tmp_path / "step-000000006.safetensors").read_bytes() == before
    old.fit(8)
    assert new.resume() and new.step == 8
    new.fit(9)
    assert contents(tmp_path) == [6, 8, 9]


@pytest.mark.parametrize("by_hand", [False, True])
def test_overwriting_deletes_the_other_run_at_the_first_save(by_hand: bool, tmp_path: Path) -> None:
    make(0, folder=tmp_path).fit(6)
    hook, stops = Checkpoints(tmp_path, every=2, overwrite=True), [not by_hand]

    def stop() -> None:
        if stops[0]:
            raise KeyboardInterrupt

    new = make(1, hooks=[At(1, stop), hook])
    if by_hand:
        new.save()
        assert contents(tmp_path) == [0]
    else:
        with pytest.raises(KeyboardInterrupt):
            new.fit(4)
        assert contents(tmp_path) == [6], "nothing was saved, nothing is lost"
        stops[0] = False
    new.fit(5)
    assert contents(tmp_path) == ([0, 2, 4, 5][-3:] if by_hand else [2, 4, 5])
    again = make(2, hooks=[hook])
    assert again.resume() and again.step == 5
    again.fit(6)
    assert contents(tmp_path) == [4, 5, 6], "a run that resumes keeps its files"
    assert "overwrite=True" in repr(hook) and "overwrite" not in repr(Checkpoints(tmp_path))


def test_a_trainer_whose_folder_has_a_new_run_is_refused(tmp_path: Path) -> None:
    first = make(0, folder=tmp_path)
    first.fit(4)
    make(1, hooks=[Checkpoints(tmp_path, overwrite=True)]).fit(2)
    for act in (lambda: first.fit(6), first.save):
        with pytest.raises(FileExistsError, match=r"another run wrote to .* after this one.*trainer\.resume\(\)"):
            act()
    assert contents(tmp_path) == [2] and first.step == 4
    assert first.resume() and first.step == 2
    first.fit(3)
    first.save()
    (tmp_path / "step-000000002.safetensors").unlink()
    first.fit(4)
    for file in tmp_path.iterdir():
        file.unlink()
    first.fit(5)
    assert contents(tmp_path) == [5]


def test_two_trainers_at_once_are_refused(tmp_path: Path) -> None:
    first = make(0, hooks=[Checkpoints(tmp_path, every=2)])
    first.checkpoints.on_start(first, 4)  # as if it were in `fit`
    second = make(0, hooks=[Checkpoints(tmp_path, every=2)])
    for act in (lambda: second.fit(2), second.save):
        with pytest.raises(RuntimeError, match=rf"process {os.getpid()} on .* is writing to "):
            act()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    first.fit(4)
    assert contents(tmp_path) == [2, 4]
    assert second.resume()
    second.fit(6)
    assert contents(tmp_path) == [2, 4, 6]


def test_a_run_whose_folder_was_taken_over_stops_and_writes_nothing(tmp_path: Path) -> None:
    def take_over() -> None:
        (tmp_path / ".lock").write_text(json.dumps({"host": "node7", "space": 1, "pid": 12, "started": 3}))

    trainer = make(0, hooks=[Checkpoints(tmp_path, every=2), At(3, take_over)])
    with pytest.raises(RuntimeError, match="process 12 on node7 took over"):
        trainer.fit(4)
    assert Checkpoints(tmp_path).steps() == [2] and (tmp_path / ".lock").exists()
    os.utime(tmp_path / ".lock", (time.time() - 2 * SILENT,) * 2)
    again = make(1, folder=tmp_path)
    assert again.resume()
    again.fit(4)
    assert contents(tmp_path) == [2, 4]


def test_an_error_and_the_end_of_a_fit_give_the_folder_back(tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    trainer = make(0, hooks=[Checkpoints(tmp_path, every=2), At(3, stop)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(4)
    assert contents(tmp_path) == [2]


def test_a_folder_that_cannot_be_written_is_noticed_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and str(path).startswith(str(tmp_path)):
            raise PermissionError(13, "Permission denied", str(path))  # root may write anywhere
        return create(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", read_only)
    trainer = make(0, folder=tmp_path)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        trainer.fit(2)
    assert trainer.step == 0


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make(0, hooks=[Checkpoints(tmp_path, every=2)])
    trainer.fit(2)
    synchronise = os.fsync

    def full(file: int) -> None:
        if not os.path.isdir(f"/proc/self/fd/{file}"):
            raise OSError(28, "No space left on device")
        synchronise(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device; nothing was written: .*step-000000004"):
        trainer.fit(6)
    monkeypatch.undo()
    assert contents(tmp_path) == [2]
    assert same(load(Checkpoints(tmp_path).path(2))["step"], 2) and trainer.step == 4
    trainer.fit(6)
    whole = make(0)
    whole.fit(6)
    assert contents(tmp_path) == [2, 6] and same(trainer.state_dict()["loss"], whole.state_dict()["loss"])
    assert torch.isfinite(torch.tensor([row["loss"] for row in trainer.history])).all()
