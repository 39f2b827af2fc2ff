"""Loops without the trainer, those of the examples: a run that stops and resumes equals one that does not."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss

FOLDER = Path(__file__).parents[2] / "experiments" / "interop"
DATA = ss.Noise(0).normal((100, 2), 0)  # fewer than two batches, so that a run has several epochs

# Lightning's own: it uses what a new torch deprecates, and advises more workers.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps one state for each process of the system; every test here is a new process."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    yield
    state._reset_state(reset_partial_state=True)


def network(dropout: float = 0.5) -> nn.Module:
    """A network whose training takes numbers from torch's global generator."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.dropout = ss.nn.MLP(2, hidden=8, depth=1, seed=0), nn.Dropout(dropout)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.dropout(self.inner(x, t))

    return Net()


def everything(loss: nn.Module, ema: Any) -> dict[str, Tensor]:
    average = {f"average of {name}": w for name, w in ema.weights.items()}
    return {**loss.state_dict(), **average, "updates": torch.tensor(ema.updates)}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_an_accelerate_loop_resumes_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate_loop

    monkeypatch.setattr(accelerate_loop, "network", network)

    def run(steps: int, name: str, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)  # a new process has its own state, which the checkpoint replaces
        return everything(*accelerate_loop.train(steps, tmp_path / name, DATA, every=2))

    whole = run(6, "once", 0)
    middle = run(3, "twice", 0)
    assert not torch.equal(middle["updates"], whole["updates"])
    shutil.copytree(tmp_path / "twice/step-000000003", tmp_path / "twice/incomplete")  # a kill during a write
    assert_equal(run(6, "twice", 1), whole)
    for name in ("step-000000003", "step-000000004", "step-000000006"):
        shutil.rmtree(tmp_path / "twice" / name)
    assert_equal(run(6, "twice", 2), whole)
    assert any(name.startswith("proposal") for name in whole) and any(name.startswith("balance") for name in whole)


def lightning_run(steps: int, folder: Path, net: nn.Module, seed: int) -> dict[str, Tensor]:
    import lightning_module

    torch.manual_seed(seed)
    module = lightning_module.Diffusion(net, DATA)
    lightning_module.fit(module, steps, folder, every=3)
    return everything(module.loss, module.ema)


@pytest.mark.parametrize("stop", [3, 4], ids=["at a checkpoint", "after a checkpoint"])
def test_a_lightning_module_resumes_to_the_same_weights(stop: int, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    whole = lightning_run(6, tmp_path / "once", network(), 0)
    middle = lightning_run(stop, tmp_path / "twice", network(), 0)
    assert int(middle["updates"]) == stop and int(whole["updates"]) == 6
    assert_equal(lightning_run(6, tmp_path / "twice", network(), 1), whole)


def test_both_loops_train_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lightning")
    import accelerate_loop

    monkeypatch.setattr(accelerate_loop, "network", lambda: network(0.0))
    one = everything(*accelerate_loop.train(4, tmp_path / "accelerate", DATA))
    other = lightning_run(4, tmp_path / "lightning", network(0.0), 0)
    for name, w in one.items():  # rounding only: gradients are clipped by different code
        torch.testing.assert_close(other[name], w, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# The page.


def block(library: str) -> str:
    """The code of the page under the heading of a library."""
    page = (FOLDER.parents[1] / "docs" / "howto" / "own-loop.md").read_text()
    return page.partition(f"## With {library}")[2].partition("```python\n")[2].partition("```")[0]


def names(**more: Any) -> dict[str, Any]:
    """What the code of the page takes from above it."""
    from torch.utils.data import DataLoader, TensorDataset

    from scoresde.training.data_order import DataOrder, parts

    common = {"DataLoader": DataLoader, "TensorDataset": TensorDataset, "DataOrder": DataOrder, "parts": parts}
    return {**common, "torch": torch, "ss": ss, **more}


def test_the_accelerate_code_of_the_page_runs(tmp_path: Path) -> None:
    from accelerate import Accelerator

    model = ss.Denoiser(ss.nn.MLP(2, hidden=8, depth=1, seed=0), ss.VP(), predicts="eps")
    loss = ss.DSM(model)
    given = {"loss": loss, "model": model, "optimiser": torch.optim.Adam(loss.parameters()), "data": DATA}
    given |= {"data_set": torch.utils.data.TensorDataset(DATA), "batch": 8, "seed": 0, "step": 0, "x": DATA[:8]}
    used = names(Accelerator=lambda: Accelerator(cpu=True), folder=tmp_path, **given)
    exec(block("accelerate"), used)
    assert any(tmp_path.iterdir()) and len(next(iter(used["loader"]))[0]) == 8
    assert all(weight.grad is not None for weight in model.parameters())


def test_the_lightning_code_of_the_page_runs(tmp_path: Path) -> None:
    pl = pytest.importorskip("lightning.pytorch")
    used = names(pl=pl)
    exec(block("Lightning"), used)
    module = used["Diffusion"](ss.nn.MLP(2, hidden=8, depth=1, seed=0), DATA, batch=8)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    limits = {"max_steps": 2, "max_epochs": -1, "use_distributed_sampler": False, "default_root_dir": tmp_path}
    trainer = pl.Trainer(**quiet, **limits)
    trainer.fit(module)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert module.ema.updates == 2
    assert "ema" in torch.load(tmp_path / "one.ckpt", weights_only=True)
