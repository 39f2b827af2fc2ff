"""Weights from files of other code bases: what fits is loaded, what does not is reported, no pickle is read."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scoresde import interop

safetensors = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.enc = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
            self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def as_parallel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module._orig_mod.{k}": v for k, v in state.items()}


@pytest.mark.parametrize("kind", ["mapping", "torch", "safetensors"])
def test_a_round_trip_through_each_kind_of_file(kind: str, tmp_path: Path) -> None:
    there, here = Net(1), Net(2)
    state = as_parallel(there.state_dict())
    source: object = state
    if kind == "torch":
        source = tmp_path / "net.pt"
        torch.save(state, source)
    elif kind == "safetensors":
        source = str(tmp_path / "net.safetensors")
        safetensors.save_file(state, source)
    report = interop.load_weights(here, source)  # type: ignore[arg-type]
    assert same(there, here) and report.fits and len(report.loaded) == len(state)
    assert str(report) == f"{len(state)} tensors loaded."


def test_entries_are_found_or_asked_for(tmp_path: Path) -> None:
    there, average, here = Net(1), Net(2), Net(3)
    path = tmp_path / "checkpoint.pt"
    torch.save({"step": 3, "state_dict": there.state_dict()}, path)
    interop.load_weights(here, path)
    assert same(there, here)
    content = {
        "step": 3,
        "first": there.state_dict(),
        "second": {"deep": average.state_dict()},
        "third": there.state_dict(),
    }
    with pytest.raises(ValueError, match="has the entries step, first, second, third; give `entry`"):
        interop.load_weights(here, content)  # type: ignore[arg-type]
    interop.load_weights(here, content, entry="second.deep")  # type: ignore[arg-type]
    assert same(average, here)
    with pytest.raises(ValueError, match="`entry` is 'fourth', which `weights` does not have"):
        interop.load_weights(here, content, entry="fourth")  # type: ignore[arg-type]


def test_averages_of_score_sde_get_the_names_of_the_parameters(tmp_path: Path) -> None:
    there, here = Net(1), Net(2)
    model = as_parallel(Net(4).state_dict())
    model |= {f"module._orig_mod.{k}": v for k, v in there.named_buffers()}
    model["module._orig_mod.frozen"] = there.frozen
    shadows = [p.detach().clone() for p in there.parameters() if p.requires_grad]
    path = tmp_path / "checkpoint.pth"
    torch.save(
        {"optimizer": {}, "model": model, "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": shadows}}, path
    )
    interop.load_weights(here, path, entry="ema")
    assert same(there, here)
    with pytest.raises(ValueError, match="a list of 1 averages, and the network 6 parameters"):
        interop.load_weights(here, {"ema": {"shadow_params": shadows[:1]}})  # type: ignore[dict-item]


def test_converters_rename() -> None:
    there, here = Net(1), Net(2)
    inner = nn.ModuleDict({"model": here})
    interop.load_weights(inner, there.state_dict(), convert=interop.with_prefix("model."))
    assert same(there, here)
    public = {k.replace("enc.0", "stem.lin"): v for k, v in Net(3).state_dict().items()}
    saved = {**{f"model.net.{k}": v for k, v in public.items()}, "vae.weight": torch.ones(2)}
    interop.load_weights(
        here, saved, convert=[interop.without_prefix("model.net."), interop.renamed({"stem.lin": "enc.0"})]
    )
    assert same(Net(3), here)
    once = interop.renamed({"a": "b", "a.1": "c"})(
        {"a.1.w": torch.ones(1), "x.a.w": torch.ones(1), "aa.w": torch.ones(1)}
    )
    assert set(once) == {"c.w", "x.b.w", "aa.w"}


def test_what_does_not_fit_is_reported_and_nothing_is_loaded() -> None:
    here, before = Net(2), Net(2)
    state = {**Net(1).state_dict(), "enc.9.bias": torch.ones(2), "enc.2.weight": torch.ones(3, 4)}
    del state["enc.0.weight"]
    message = "8 tensors loaded; 1 missing in the weights: enc.0.weight; 1 unknown to the network: enc.9.bias"
    with pytest.raises(ValueError, match=message):
        interop.load_weights(here, state)
    assert same(before, here)
    report = interop.load_weights(here, state, strict=False)
    assert (report.missing, report.unexpected) == (("enc.0.weight",), ("enc.9.bias",)) and not report.fits
    assert report.shapes == (("enc.2.weight", (2, 4), (3, 4)),)
    assert "1 of another shape: enc.2.weight [2, 4] in the network, [3, 4] in the weights" in str(report)
    assert torch.equal(here.enc[0].bias, Net(1).enc[0].bias) and torch.equal(here.enc[0].weight, before.enc[0].weight)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    for name, write in (("torch", torch.save), ("pickle", lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2)))):
        path = tmp_path / f"{name}.pkl"
        write({"net": Trap()}, path)  # type: ignore[no-untyped-call]
        with pytest.raises(ValueError, match=r"holds pickled objects, not only tensors.*save net.state_dict"):
            interop.load_weights(Net(), path)
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(FileNotFoundError, match="which is no file"):
        interop.load_weights(Net(), tmp_path / "none.pt")


def test_the_network_keeps_its_dtype() -> None:
    here = Net(2).bfloat16()
    interop.load_weights(here, Net(1).state_dict())
    assert here.frozen.dtype == torch.bfloat16 and torch.equal(here.frozen, Net(1).frozen.bfloat16())
