"""The Hub, without a network: what is uploaded is a saved model with a README, and what is downloaded is loaded."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import scoresde as ss
from scoresde.denoisers import Card
from scoresde.denoisers.saving import FILES
from scoresde.interop import LoadError, from_pretrained, model_card, push_to_hub

huggingface_hub = pytest.importorskip("huggingface_hub")

CARD = Card(
    ss.UniPC(3), 8, (2,), scale=ss.data.Standardize(torch.ones(2), 3 * torch.ones(2)), licence="mit", notes="Moons."
)


def model() -> ss.Denoiser:
    net = ss.nn.MLP(2, hidden=8, depth=1, seed=0)
    net.last.weight.data.fill_(0.1)
    return ss.Denoiser(net.eval(), ss.VP(), predicts="eps")


class Hub:
    """The calls of the Hub that the library makes, on folders of this machine."""

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []  # type: ignore[var-annotated]

    def __call__(self, token: str | None = None) -> Hub:
        self.asked.append(("login", token))
        return self

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        self.asked.append(("create", repo_id, private))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: str,
        commit_message: str,
        revision: str | None,
        delete_patterns: list[str],
    ) -> Any:
        self.asked.append(("upload", commit_message, revision))
        for name in delete_patterns:
            (self.root / repo_id / name).unlink(missing_ok=True)
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub.example/{repo_id}/commit/1")

    def snapshot_download(
        self, repo_id: str, *, revision: str | None, token: str | None, allow_patterns: list[str]
    ) -> str:
        self.asked.append(("download", repo_id, revision, tuple(allow_patterns)))
        if not (self.root / repo_id).is_dir():
            raise FileNotFoundError(f"404: {repo_id}")
        return str(self.root / repo_id)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "HfApi", fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def test_a_model_goes_to_the_hub_and_comes_back_to_the_bit(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    first = model()
    address = push_to_hub(first, "lab/moons", card=CARD, private=True, message="Moons", token="secret")
    assert address == "https://hub.example/lab/moons/commit/1"
    again = from_pretrained("lab/moons", revision="v1")
    assert hub.asked == [
        ("login", "secret"),
        ("create", "lab/moons", True),
        ("upload", "Moons", None),
        ("download", "lab/moons", "v1", FILES),
    ]
    assert again.card is not None and again.card.scale is not None
    draws = [ss.sample(m, (4, 2), again.card.solver, nfe=8, seed=0) for m in (first, again)]  # type: ignore[arg-type]
    assert torch.equal(*draws)
    plan = Card(solver=ss.DDIM().plan(first.sde, [1.0, 0.5, 0.0]))
    push_to_hub(first, "lab/moons", card=plan, readme="# By hand\n")
    assert {file.name for file in (hub.root / "lab/moons").iterdir()} == {
        "README.md", "model.safetensors", "plan.json", "scoresde.json",
    }, "no file of the first model stays"  # fmt: skip
    assert (hub.root / "lab/moons/README.md").read_text() == "# By hand\n"
    assert from_pretrained("lab/moons").card.solver == plan.solver  # type: ignore[union-attr]


def test_the_readme_says_what_the_model_is_and_its_three_lines_run(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    push_to_hub(model(), "lab/moons", card=CARD)
    text = (hub.root / "lab/moons/README.md").read_text()
    header = text.split("---\n")[1]
    assert 'license: "mit"' in header and "library_name: scoresde" in header
    for fact in ("# moons", "Moons.", "VP(", "`eps`", "UniPC(order=3)", "`(2,)`", "`8`", "`mit`"):
        assert fact in text, fact
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code is not None and code[1].count("\n") == 3
    names: dict[str, Any] = {}
    exec(code[1].replace("nfe=model.card.nfe", "nfe=model.card.nfe, seed=0"), names)
    z = ss.sample(model(), (16, 2), ss.UniPC(3), nfe=8, seed=0)
    assert torch.equal(names["x"], 1 + 3 * z), "in the units of the data"


def test_the_readme_of_other_models() -> None:
    labelled = ss.Denoiser(ss.nn.MLP(2, hidden=8, classes=3), ss.VP(), predicts="eps")
    text = model_card(labelled, "lab/digits", Card(conditions=("label",), nfe=5))
    assert "ss.sample(model.given(label=...), (16, ...), nfe=model.card.nfe)" in text and "license" not in text
    plan = ss.DDIM().plan(labelled.sde, [1.0, 0.5, 0.0])
    text = model_card(labelled, "here", Card(solver=plan, event=(2,)))
    assert "ss.sample(model, (16, 2), model.card.solver)" in text and "(a plan)" in text and "| `2` |" in text


def test_a_folder_of_this_machine_needs_no_hub(tmp_path: Path, hub: Hub) -> None:
    folder = model().save(tmp_path / "m", card=CARD)
    assert from_pretrained(folder).sde == ss.VP()
    assert from_pretrained(str(folder), device="cpu").card.licence == "mit"  # type: ignore[union-attr]
    assert hub.asked == []


def test_a_name_that_is_nowhere_is_refused(hub: Hub) -> None:
    with pytest.raises(LoadError, match=r"'lab/nothing' is neither a folder of this machine nor.*404"):
        from_pretrained("lab/nothing")


def test_the_real_client_offline_is_refused_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("lab/nothing", "not a/name/at all"):
        with pytest.raises(LoadError, match="is neither a folder of this machine nor a model that the Hub gave"):
            from_pretrained(name)


def test_an_option_of_the_hub_is_still_one() -> None:
    """The fake above has the arguments of the real client."""
    import inspect

    for real, fake in (
        (huggingface_hub.HfApi.create_repo, Hub.create_repo),
        (huggingface_hub.HfApi.upload_folder, Hub.upload_folder),
        (huggingface_hub.snapshot_download, Hub.snapshot_download),
    ):
        own = inspect.signature(fake).parameters.keys() - {"self"}
        assert own <= inspect.signature(real).parameters.keys()
