"""Checkpoints: what is written comes back to the bit, what is not whole is refused, and no moment has half a file."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from scoresde.training import checkpoint
from scoresde.training.checkpoint import CheckpointError, Checkpoints, load, save


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimiser = torch.optim.AdamW(net.parameters(), 1e-3)
    net(torch.randn(8, 3)).square().sum().backward()
    optimiser.step()
    return {
        "model": net.state_dict(),
        "optimiser": optimiser.state_dict(),
        "rng": torch.get_rng_state(),
        "step": 17,
        "loss": [0.1, math.inf, 1e-300],
        "pair": (1, "two", None, True),
        "shared": [net[0].weight, net[0].weight],
        "odd": {
            "empty": torch.zeros(0, 3),
            "half": torch.ones(3).bfloat16(),
            "scalar": torch.tensor(2.5),
            "transposed": torch.arange(6).reshape(2, 3).T,
            "truth": torch.tensor([True, False]),
        },
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_a_state_comes_back_to_the_bit(tmp_path: Path) -> None:
    there = state()
    save(tmp_path / "a.safetensors", there)
    back = load(tmp_path / "a.safetensors")
    there["model"] = dict(there["model"])
    assert same(back, there)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.safetensors"], "nothing temporary is left"
    assert "model.0.weight" in load_file(tmp_path / "a.safetensors"), "any reader of safetensors finds the weights"
    save(tmp_path / "one.safetensors", torch.ones(2))
    assert torch.equal(load(tmp_path / "one.safetensors"), torch.ones(2))


def test_every_truncation_and_every_flipped_bit_of_the_head_is_noticed(tmp_path: Path) -> None:
    there = {"w": torch.arange(12.0), "step": 3}
    path = tmp_path / "a.safetensors"
    save(path, there)
    whole = path.read_bytes()
    for cut in range(0, len(whole), 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match=r"continue from the previous checkpoint"):
            load(path)
    for byte in range(len(whole)):
        path.write_bytes(whole[:byte] + bytes([whole[byte] ^ (1 << byte % 8)]) + whole[byte + 1 :])
        try:
            assert same(load(path), there), f"byte {byte} changed what was loaded"
        except CheckpointError:
            continue
        blank = whole[byte : byte + 1] == b" "
        assert blank, f"byte {byte}, {whole[byte : byte + 1]!r}, was flipped unnoticed"
    path.write_bytes(whole)
    assert same(load(path), there)


def test_a_flipped_bit_of_the_weights_is_damage_and_the_error_has_the_fix(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save(path, state())
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 4
    path.write_bytes(bytes(whole))
    with pytest.raises(CheckpointError, match="do not match their checksum; delete it"):
        load(path)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"not written by this library.*load_state_dict"):
        load(tmp_path / "other.safetensors")

    class Bomb:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "executed"),))

    torch.save({"w": Bomb()}, tmp_path / "pickle.safetensors")
    (tmp_path / "bare.safetensors").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "text.safetensors").write_text(json.dumps({"step": 3}))
    for name in ("pickle", "bare", "text"):
        with pytest.raises(CheckpointError, match="not a safetensors file"):
            load(tmp_path / f"{name}.safetensors")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(tmp_path / "none.safetensors")


def test_objects_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    for bad, match in (({"a": {"b": nn.Linear(1, 1)}}, "Linear at 'a.b'"), ({"a": {(1, 2): 3}}, "keys at 'a'")):
        with pytest.raises(TypeError, match=match):
            save(tmp_path / "a.safetensors", bad)
    assert list(tmp_path.iterdir()) == []


def test_writing_is_synchronised_and_then_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def watch_sync(file: int) -> None:
        done.append("sync folder" if os.path.isdir(f"/proc/self/fd/{file}") else "sync file")
        fsync(file)

    def watch_rename(a: Any, b: Any) -> None:
        done.append("rename")
        replace(a, b)

    monkeypatch.setattr(os, "fsync", watch_sync)
    monkeypatch.setattr(os, "replace", watch_rename)
    save(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    assert done == ["sync file", "rename", "sync folder"]

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
    monkeypatch.undo()
    assert torch.equal(load(tmp_path / "a.safetensors")["w"], torch.ones(2)), "the old one is still whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_newest_stay_and_torn_ones_are_skipped(tmp_path: Path) -> None:
    run = Checkpoints(tmp_path / "run", keep=2)
    assert run.latest() is None
    for step in (5, 10, 100, 1000):
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / ".step-7.tmp").write_text("of a killed process")
        run.save(step, {"step": step})
    assert run.steps() == [100, 1000] and sorted(f.name for f in run.folder.iterdir()) == [
        "step-000000100.safetensors",
        "step-000001000.safetensors",
    ]
    assert run.latest() == (1000, {"step": 1000})
    torn = run.path(1000)
    torn.write_bytes(torn.read_bytes()[:-1])
    (run.folder / "step-notes.safetensors").write_text("mine")
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        assert run.latest() == (100, {"step": 100})
    Checkpoints(run.folder, keep=1).save(200, {"step": 200})
    assert run.steps() == [200, 1000], "a torn later file does not push a whole one out"
    run.path(200).unlink()
    run.save(100, {"step": 100})
    run.path(100).write_bytes(b"")
    with pytest.warns(UserWarning, match="skipped a checkpoint"):
        assert run.latest() is None
    with pytest.raises(ValueError, match="`keep` must be at least 1"):
        Checkpoints(tmp_path, keep=0)
    assert checkpoint.FORMAT.endswith("1")
