"""Train on your own images: a folder of images, or a file with a tensor.

    python experiments/train.py --data photos --size 32 --out runs/photos
    python experiments/train.py --data digits.npy --labels labels.npy --conditional --recipe edm
    torchrun --nproc_per_node 4 experiments/train.py --data photos --precision bf16     # or: accelerate launch …
    python experiments/train.py --quick    # seconds, for CI: digits, with labels

The script searches a folder for images, crops them to squares and scales them to `--size`; with `--conditional`, the
subfolder of an image is its class. A file is .npy, .pt (loaded without running code from it) or .safetensors, with a
tensor (N, C, height, width), (N, height, width) or (N, D); bytes are scaled to [-1, 1], floats are not changed. Labels
are integers in a separate file, or in the same file as "label".

Checkpoints, images of samples and `weights.safetensors`, the averaged network, are written to `--out`. After an
interruption, the same command resumes from the last checkpoint; `--steps` counts from the beginning of the run. The
weights are those of a denoiser: `model.load_state_dict(safetensors.torch.load_file("weights.safetensors"))`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import scoresde as ss
from scoresde.training import Checkpoints, Hook, Loader, Preview, TensorBoard, Update, times

IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class Options:
    """Options of the command line."""

    data: Path = Path()
    labels: Path = Path()
    conditional: bool = False
    drop: float = 0.1  # fraction of labels dropped, for classifier-free guidance
    size: int = 32
    channels: int = 3  # of images in a folder: 3 or 1

    recipe: str = "vp"
    width: int = 64
    multipliers: str = "1,2,2"
    attention: str = "1"
    blocks: int = 2
    dropout: float = 0.0

    steps: int = 100_000
    batch: int = 128
    accumulate: int = 1
    rate: float = 2e-4
    warmup: int = 1000
    ema: float = 0.9999
    precision: str = "no"
    workers: int = 2  # processes that load images

    out: Path = Path(__file__).parent / "out" / "train"
    save_every: int = 1000
    preview_every: int = 1000
    samples: int = 64
    calls: int = 20
    tensorboard: bool = False
    seed: int = 0


# Process, prediction, weighting and distribution of times, for a network and the standard deviation of the data.
RECIPES: dict[str, Callable[..., ss.DSM]] = {
    "vp": lambda net, std, **drop: ss.DSM(ss.Denoiser(net, ss.VP(), predicts="v"), **drop),
    "cosine": lambda net, std, **drop: ss.DSM(ss.Denoiser(net, ss.Cosine(), predicts="v"), "min_snr", **drop),
    "ddpm": lambda net, std, **drop: ss.DSM(
        ss.Denoiser(net, ss.Discrete(ss.processes.betas("linear", 1000)), predicts="eps"), **drop
    ),
    "edm": lambda net, std, **drop: ss.DSM(
        ss.Denoiser(net, ss.EDM(), predicts="F", precondition=ss.Preconditioning(std)),
        "edm",
        times.LogNormalSigma(),
        **drop,
    ),
    "flow": lambda net, std, **drop: ss.DSM(
        ss.Denoiser(net, ss.Flow(), predicts="velocity"), times=times.LogitNormal(), **drop
    ),
}


class Folder(Dataset[dict[str, Any]]):
    """Square images of a folder, in [-1, 1]; the classes are its subfolders, in alphabetical order.

    Arguments:
        root: Folder.
        size: Height and width of the images.
        channels: Number of channels, 3 for colour or 1 for grey.
        labels: Whether to return classes.
    """

    def __init__(self, root: Path, size: int, channels: int, labels: bool) -> None:
        self.files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGES)
        if not self.files:
            raise ValueError(f"`data`={root} holds no images ({', '.join(sorted(IMAGES))}).")
        self.size, self.mode = size, {1: "L", 3: "RGB"}[channels]
        names = [p.relative_to(root).parts[0] for p in self.files]
        self.classes = sorted(set(names)) if labels else []
        self.labels = [self.classes.index(name) for name in names] if labels else None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, k: int) -> dict[str, Any]:
        from PIL import Image, ImageOps

        with Image.open(self.files[k]) as file:
            image = ImageOps.fit(file.convert(self.mode), (self.size, self.size), Image.Resampling.LANCZOS)
        x = torch.from_numpy(np.array(image)).reshape(self.size, self.size, -1).permute(2, 0, 1)
        out: dict[str, Any] = {"x": scaled(x)}
        return out if self.labels is None else {**out, "label": self.labels[k]}


def scaled(x: Tensor) -> Tensor:
    """Scale bytes to [-1, 1], and convert other numbers to float32."""
    return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()


def read(path: Path) -> dict[str, Tensor]:
    """Tensors of a file by name; a single one is named "x"."""
    if path.suffix == ".npy":
        content: Any = torch.from_numpy(np.load(path))
    elif path.suffix == ".pt":
        content = torch.load(path, map_location="cpu", weights_only=True)
    elif path.suffix == ".safetensors":
        from safetensors.torch import load_file

        content = load_file(path)
    else:
        raise ValueError(f"{path} must be a folder of images or a file .npy, .pt or .safetensors.")
    return {"x": content} if isinstance(content, Tensor) else dict(content)


def load(options: Options) -> tuple[Any, tuple[int, ...], float, int | None]:
    """Data for the trainer, shape of an event, standard deviation, and number of classes."""
    if options.data.is_dir():
        folder = Folder(options.data, options.size, options.channels, options.conditional)
        some = torch.randperm(len(folder), generator=torch.Generator().manual_seed(0))[:256]
        x = torch.stack([folder[int(k)]["x"] for k in some])
        return folder, tuple(x.shape[1:]), deviation(x, options), len(folder.classes) or None
    data = read(options.data)
    x = scaled(data["x"])
    x = x[:, None] if x.ndim == 3 else x
    out, classes = {"x": x}, None
    if options.conditional:
        if options.labels.is_file():
            data["label"] = read(options.labels)["x"]
        if "label" not in data:
            raise ValueError(f"`conditional` needs labels: give `labels`, a file, or add 'label' to {options.data}.")
        out["label"] = data["label"].long()
        classes = int(out["label"].max()) + 1
    return out, tuple(x.shape[1:]), deviation(x, options), classes


def deviation(x: Tensor, options: Options) -> float:
    """Standard deviation of the data; warns if it is far from 1, unless the recipe scales the network by it."""
    return float(x.std()) if options.recipe == "edm" else ss.data.check_scale(x)


def numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


def network(event: tuple[int, ...], classes: int | None, options: Options) -> nn.Module:
    if len(event) == 1:
        return ss.nn.MLP(event[0], hidden=options.width, classes=classes, seed=options.seed)
    return ss.nn.UNet(
        event[0],
        width=options.width,
        multipliers=numbers(options.multipliers),
        attention=numbers(options.attention),
        blocks=options.blocks,
        classes=classes,
        dropout=options.dropout,
        seed=options.seed,
    )


def make(options: Options) -> ss.Trainer:
    """Trainer of the run, before its first step."""
    data, event, std, classes = load(options)
    drop = {"drop": options.drop, "null": {"label": classes}} if classes and options.drop else {}
    loss = RECIPES[options.recipe](network(event, classes, options), std, **drop)
    label = {"label": torch.arange(options.samples) % classes} if classes else {}

    def preview(model: ss.Denoiser, step: int) -> None:
        device = next(model.parameters()).device
        cond = {name: value.to(device) for name, value in label.items()}
        start, shape = ss.Start(data_std=std), (options.samples, *event)
        x = ss.sample(model.given(**cond), shape, nfe=options.calls, seed=options.seed, start=start)
        show(x.cpu(), options.out / f"step-{step:09d}.png")

    hooks: list[Hook] = [Preview(preview, options.preview_every), Checkpoints(options.out, options.save_every)]
    if options.tensorboard:
        hooks.append(TensorBoard(options.out / "tensorboard"))
    return ss.Trainer(
        loss,
        Loader(data, workers=options.workers),
        torch.optim.Adam(loss.parameters(), options.rate),
        batch=options.batch,
        ema=options.ema,
        update=Update(warmup=options.warmup, accumulate=options.accumulate),
        precision=options.precision,
        hooks=hooks,
        seed=options.seed,
    )


def show(x: Tensor, page: Path, columns: int = 8) -> None:
    """Write images (N, C, h, w) into one PNG, and other data into an .npy file of the same name."""
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        np.save(page.with_suffix(".npy"), x.numpy())
        return
    from PIL import Image

    columns = min(columns, len(x))
    x = x[: len(x) // columns * columns].repeat(1, 3 // x.shape[1], 1, 1)
    rows = (x.clamp(-1, 1) * 127.5 + 127.5).round().byte().unflatten(0, (-1, columns))
    Image.fromarray(rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).numpy()).save(page)


def main(options: Options) -> Path:
    from safetensors.torch import save_file

    trainer = make(options)
    main_process = trainer.accelerator.is_main_process
    options.out.mkdir(parents=True, exist_ok=True)
    if trainer.resume() and main_process:
        print(f"resumed at step {trainer.step}")
    history = trainer.fit(options.steps)
    weights = options.out / "weights.safetensors"
    if main_process:
        save_file({name: w.contiguous() for name, w in trainer.ema.weights.items()}, weights)
        if history:
            print(f"step {trainer.step}, loss {history[-1]['loss']:.4f}, {history[-1]['speed']:.0f} samples a second")
        print(f"images, checkpoints, weights: {options.out}")
    return weights


def quick(out: Path) -> Options:
    """Options of a run on digits with labels, from a file, with a small network."""
    from sklearn.datasets import load_digits

    bunch, out = load_digits(), out / "quick"
    out.mkdir(parents=True, exist_ok=True)
    torch.save({"x": torch.from_numpy(bunch.images / 8 - 1), "label": torch.from_numpy(bunch.target)}, out / "data.pt")
    small = {"width": 16, "multipliers": "1,2", "blocks": 1, "warmup": 0, "batch": 32, "samples": 20, "calls": 4}
    return Options(
        data=out / "data.pt", conditional=True, steps=10, save_every=5, preview_every=10, out=out, ema=0.9, **small
    )


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        flag: dict[str, Any] = {"type": type(value)}
        if isinstance(value, bool):
            flag = {"action": argparse.BooleanOptionalAction}
        elif name == "recipe":
            flag = {"choices": tuple(RECIPES)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=value, **flag)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: digits, with labels")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        return quick(given["out"])
    if given["data"] == Path():
        parser.error("--data is needed: a folder of images, or a .npy, .pt or .safetensors file")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
