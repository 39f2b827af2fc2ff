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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialise
from torch import nn

from scoresde._files import Owner
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


KEYS = st.one_of(st.text("ab.~2_", max_size=4), st.integers(-2, 12), st.sampled_from(["__tensor__", "__metadata__"]))
LEAVES = st.one_of(
    st.integers(0, 99).map(lambda k: torch.tensor([k])),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=3),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(KEYS, inner, max_size=5),
    ),
    max_leaves=25,
)


@settings(max_examples=60, deadline=None)
@given(tree=TREES)
def test_any_tree_comes_back(tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "tree.safetensors"
    save(path, tree)
    assert same(load(path), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {"a.b": 1, "a": {"b": 2}},
        {1: 1, "1": 2},
        {"": 1, "tensor": 2},
        {"__metadata__": 1},
        {"a.b": 1, "a": {"b": 2, "b~2": 3}, "a.b~2": 4},
        {"a": [1, {"0": 2}], "a.0": 3},
    ],
)
def test_no_two_tensors_have_one_name(tree: Any, tmp_path: Path) -> None:
    state = torch.utils._pytree.tree_map(lambda k: torch.full((k,), float(k)), tree)
    save(tmp_path / "a.safetensors", state)
    assert same(load(tmp_path / "a.safetensors"), state)


def test_conjugate_views_are_saved_as_their_values(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j, 3 - 1j])
    save(tmp_path / "a.safetensors", {"z": z.conj(), "imag": z.conj().imag})
    back = load(tmp_path / "a.safetensors")
    assert torch.equal(back["z"], z.conj().resolve_conj()) and back["imag"].tolist() == [-2, 1]


def forge(path: Path, tree: str, tensors: dict[str, torch.Tensor] | None = None) -> None:
    """A file of this format with any tree and a checksum that agrees."""
    tensors = tensors or {}
    meta = {"format": checkpoint.FORMAT, "tree": tree, "sha256": checkpoint._digest(tree, tensors)}
    path.write_bytes(serialise(tensors, meta))


def test_a_lost_tensor_of_an_old_file_is_reported(tmp_path: Path) -> None:
    """The first version gave the tensors of {"a.b": ..., "a": {"b": ...}} one name, with a checksum that agrees."""
    path, named = tmp_path / "old.safetensors", {"__tensor__": "a.b"}
    forge(path, json.dumps({"a.b": named, "a": {"b": named}}), {"a.b": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"old\.safetensors .*only one of two tensors with the name 'a\.b'"):
        load(path)
    forge(path, json.dumps({"a": {"b": named}, "step": 3}), {"a.b": torch.ones(2)})
    assert same(load(path), {"a": {"b": torch.ones(2)}, "step": 3}), "other old files load"


FORGED = {
    "deep list": "[" * 100_000 + "]" * 100_000,
    "deep tuple": '{"__tuple__": [' * 50_000 + "]}" * 50_000,
    "no JSON": "{",
    "unknown tensor": '{"__tensor__": "other"}',
    "number as a tensor": '{"__tensor__": [1]}',
    "pairs that are none": '{"__pairs__": [1, 2]}',
    "keys that are lists": '{"__pairs__": [[[1], 2]]}',
    "tuple of a number": '{"__tuple__": 3}',
    "long number": "9" * 5000,
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_trees_are_one_clear_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "forged.safetensors"
    forge(path, FORGED[kind], {"w": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"forged\.safetensors is truncated, damaged or not .*delete it"):
        load(path)


@pytest.mark.parametrize("shape", [[2**62], [2**31, 2**31, 2**31], [0, 2**63], [-1], [0] * 1000, [0, 2**40, 2**40]])
def test_forged_shapes_are_one_clear_error(shape: list[int], tmp_path: Path) -> None:
    path, tree = tmp_path / "forged.safetensors", '{"__tensor__": "w"}'
    tensor = {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
    head = json.dumps(
        {"__metadata__": {"format": checkpoint.FORMAT, "tree": tree, "sha256": "0"}, "w": tensor}
    ).encode()
    for length in (len(head), 2**60):
        path.write_bytes(length.to_bytes(8, "little") + head)
        with pytest.raises(CheckpointError, match=r"forged\.safetensors is"):
            load(path)
    path.write_bytes((20).to_bytes(8, "little") + b'\xff\xfe{"a": 1}\x80abc      ')
    with pytest.raises(CheckpointError, match=r"forged\.safetensors is"):
        load(path)


def test_a_state_that_contains_itself_is_refused(tmp_path: Path) -> None:
    loop: dict[str, Any] = {}
    loop["loop"] = loop
    with pytest.raises(ValueError, match="contains itself"):
        save(tmp_path / "a.safetensors", loop)
    assert list(tmp_path.iterdir()) == []


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
    me = Owner.current()
    torn = tmp_path / "run" / f".step-7.{me.host}.{me.space}.{2**22 + 1}.1.{'0' * 16}.tmp"  # above the largest pid
    for step in (5, 10, 100, 1000):
        (tmp_path / "run").mkdir(exist_ok=True)
        torn.write_text("of a killed process")
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
