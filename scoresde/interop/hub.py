"""Saved models on the Hugging Face Hub; needs the package huggingface_hub, which is imported at the first call."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from scoresde._build import Build
from scoresde._doors import checked
from scoresde.denoisers.card import Card
from scoresde.denoisers.network import Clock, Denoiser
from scoresde.denoisers.saving import FILES, contents
from scoresde.interop.folder import LoadError, load
from scoresde.interop.readme import model_card
from scoresde.processes.sde import SDE


@checked
def push_to_hub(
    model: Denoiser,
    repo_id: str,
    *,
    card: Card | None = None,
    build: Build | None = None,
    readme: str | None = None,
    private: bool = False,
    revision: str | None = None,
    message: str = "Add a model",
    token: str | None = None,
) -> str:
    """Upload a model to the Hub: the files of ``model.save`` and a README, in one commit.

    Arguments:
        model: Denoiser, a network with its process.
        repo_id: Name ``"org/name"``; the repository is created if it does not exist.
        card: Facts that a user of the weights needs beside them; by default ``model.card``.
        build: Import path and arguments of the network's class; by default as recorded.
        readme: Text of the README, by default :func:`model_card`. A README that is there is replaced.
        private: Whether a new repository is private.
        revision: Branch, by default the main one.
        message: Message of the commit.
        token: Token of the Hub; by default that of the machine's login.

    Returns:
        Address of the commit.
    """
    from huggingface_hub import HfApi

    files = contents(model, card=card, build=build)
    files["README.md"] = (model_card(model, repo_id, card) if readme is None else readme).encode()
    api = HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            (Path(folder) / name).write_bytes(data)
        info = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            revision=revision,
            delete_patterns=[name for name in FILES if name not in files],  # of an earlier model
        )
    return str(info.commit_url)


@checked
def from_pretrained(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    net: Callable[..., Tensor] | None = None,
    sde: SDE | None = None,
    time: Clock | None = None,
    allow: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Denoiser:
    """Load a model from the Hub, or from a folder of this machine; files of the Hub are downloaded once and kept.

    With ``HF_HUB_OFFLINE=1`` in the environment nothing is downloaded, and a model that was loaded before still loads.

    Arguments:
        name: Name ``"org/name"`` on the Hub, or path of a folder; a folder that exists has precedence.
        revision: Branch, tag or commit on the Hub; give a commit for a model that cannot change.
        token: Token of the Hub, for private models.
        net: Network that receives the weights; by default it is built as the folder says.
        sde: Process, for a folder whose process is defined by code.
        time: Time input of the network, for a folder whose time is a function.
        allow: Packages, in addition to ``scoresde``, ``diffusers`` and ``torch.nn``, whose networks may be imported.
        device: Device of the model.
    """
    folder = Path(name)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(
                snapshot_download(os.fspath(name), revision=revision, token=token, allow_patterns=list(FILES))
            )
        except (OSError, ValueError) as error:
            raise LoadError(
                f"{os.fspath(name)!r} is neither a folder of this machine nor a model that the Hub gave: {error}"
            ) from error
    return load(folder, net=net, sde=sde, time=time, allow=allow, device=device)
