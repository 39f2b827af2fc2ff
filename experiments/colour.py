"""Colour patches of photographs: sampled by class, judged, and restored from measurements, beside a Gaussian.

    python experiments/colour.py            # needs scikit-image; the trained network is kept
    python experiments/colour.py --quick    # seconds, for CI: two photographs of scikit-learn, and poor samples

The data are patches of 3 × 16 × 16 from six photographs of scikit-image (a portrait, a cat, coffee, galaxies, stained
tissue, a rocket), halved in size. A photograph is divided into tiles of 32 × 32; patches of every fifth tile are held
out, and no patch crosses a tile. The class of a patch is its photograph. The library's UNet is trained by denoising
score matching on a VP process to predict v; in one sample of ten the class is dropped.

* The default sampler draws patches of each class. A small convolutional classifier of the training patches judges them
  as in `experiments/mnist.py`: requested class, Fréchet distance in its 64 features, C2ST, precision and recall. Other
  held-out patches, training patches, and samples of one Gaussian for each class are rows of the same table.
* Held-out patches whose middle is covered, or which are reduced to a quarter of their size, with noise of standard
  deviation 0.1, are restored with the same network without classes, and by the exact posterior of a Gaussian.

In one thread, on a machine with other load, training took 13.5 minutes of CPU time and the rest two.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _restoring
import numpy as np
import torch
from _restoring import METHODS, Setting, Truth
from mnist import HEAD, row
from torch import Tensor, nn

import scoresde as ss
from scoresde import inverse
from scoresde.training import Checkpoints, Update

EVENT = (3, 16, 16)
TILE = 32
NAMES = ("astronaut", "chelsea", "coffee", "hubble_deep_field", "immunohistochemistry", "rocket")


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 6000
    batch: int = 32
    rate: float = 2e-3
    width: int = 24
    samples: int = 390
    budgets: str = "5,10,20"
    scales: str = "0,1"
    restored: int = 24
    nfe: int = 20  # number of evaluations of a restoration
    judge: int = 300  # training steps of the classifier
    c2st: int = 300  # training steps of the classifier that separates samples from patches
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Patches:
    """Patches in [-1, 1], (N, 3, 16, 16), and the numbers of their photographs; both parts are shuffled."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor
    names: tuple[str, ...]


def photographs(quick: bool) -> dict[str, np.ndarray]:
    """Photographs, (h, w, 3), bytes; two of scikit-learn if scikit-image is missing and `quick`."""
    try:
        from skimage import data
    except ImportError:
        if not quick:
            raise SystemExit("compared nothing: needs scikit-image") from None
        from sklearn.datasets import load_sample_images

        return dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    found = {name: getattr(data, name)() for name in NAMES}
    found["hubble_deep_field"] = found["hubble_deep_field"][:, :500]  # the others have about as many tiles
    return found


def load(quick: bool, seed: int = 0) -> Patches:
    """The patches."""
    parts: dict[bool, list[tuple[Tensor, Tensor]]] = {False: [], True: []}
    found, tile = photographs(quick), 0
    for label, photograph in enumerate(found.values()):
        bytes_ = torch.from_numpy(np.array(photograph)).float().permute(2, 0, 1)
        image = nn.functional.avg_pool2d(bytes_, 2) / 127.5 - 1
        for i in range(0, image.shape[1] - TILE + 1, TILE):
            for j in range(0, image.shape[2] - TILE + 1, TILE):
                tile += 1
                held = tile % 5 == 0
                step = 8 if held else 4
                cut = image[:, i : i + TILE, j : j + TILE].unfold(1, 16, step).unfold(2, 16, step)
                x = cut.permute(1, 2, 0, 3, 4).reshape(-1, *EVENT)
                parts[held].append((x, torch.full((len(x),), label)))
    generator, out = torch.Generator().manual_seed(seed), []
    for held in (False, True):
        x, y = (torch.cat(one) for one in zip(*parts[held], strict=True))
        order = torch.randperm(len(x), generator=generator)
        out += [x[order], y[order]]
    return Patches(*out, tuple(found))


class Judge:
    """A classifier of photographs with 64 features, trained on the training patches.

    Arguments:
        data: Patches.
        steps: Number of training steps.
    """

    def __init__(self, data: Patches, steps: int) -> None:
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 24, 3, 1, 1), nn.ReLU(), nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU()]
        layers += [nn.Conv2d(48, 48, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48 * 16, 64), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(64, len(data.names))
        both = nn.Sequential(self.body, self.head)
        optimiser = torch.optim.Adam(both.parameters(), 2e-3)
        for _ in range(steps):
            index = torch.randint(len(data.images), (128,))
            loss = nn.functional.cross_entropy(both(data.images[index]), data.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        both.requires_grad_(False)
        self.accuracy = float((self.classes(data.held_out)[0] == data.held_out_labels).float().mean())

    def features(self, x: Tensor) -> Tensor:
        """Features of patches, (N, 64), in float64."""
        out: Tensor = self.body(x.float().clamp(-1, 1))
        return out.double()

    def classes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted class of each patch and its probability."""
        best = self.head(self.body(x.float().clamp(-1, 1))).softmax(1).max(1)
        return best.indices, best.values


def train(data: Patches, options: Options) -> ss.Trainer:
    """Train the conditional network, from its last checkpoint if there is one."""
    none = len(data.names)
    net = ss.nn.UNet(
        3, width=options.width, multipliers=(1, 2), blocks=1, attention=(), classes=none, seed=options.seed
    )
    loss = ss.DSM(ss.Denoiser(net, ss.VP(), predicts="v"), drop=0.1, null={"label": none})
    page = f"colour-{none}-{options.steps}x{options.batch}-{options.width}"
    trainer = ss.Trainer(
        loss,
        {"x": data.images, "label": data.labels},
        torch.optim.Adam(loss.parameters(), options.rate),
        batch=options.batch,
        ema=0.995,
        update=Update(warmup=options.steps // 20, schedule=lambda step: 1 - 0.95 * step / options.steps),
        hooks=[Checkpoints(options.out / page, every=100, keep=1)],
        seed=options.seed,
    )
    trainer.resume()
    trainer.fit(options.steps)
    return trainer


def gaussian(x: Tensor) -> ss.GaussianMixture:
    """A Gaussian with mean and covariance of patches, in float64, and a little noise."""
    flat = x.double().flatten(1)
    cov = flat.T.cov() + 1e-4 * torch.eye(flat.shape[1], dtype=torch.float64)
    mean = flat.mean(0).reshape(1, *EVENT)
    return ss.GaussianMixture(ss.VP(), mean, cov=cov[None])


def sampled(
    model: ss.Denoiser, data: Patches, judge: Judge, start: ss.Start, options: Options
) -> tuple[str, dict[str, Tensor]]:
    """Table of scales and budgets, and patches of each class at the middle budget."""
    none = len(data.names)
    n = options.samples
    twin, half = data.held_out[:n], data.held_out[-n:]
    lines = [
        HEAD,
        row("held-out patches", "", half, data.held_out_labels[-n:], twin, judge, options.c2st),
        row("training patches", "", data.images[:n], data.labels[:n], twin, judge, options.c2st),
    ]
    # As many of each class as in the held-out patches, so that a perfect conditional model would be at the floor.
    labels = data.held_out_labels[:n].sort().values

    def some(x: Tensor, given: Tensor) -> Tensor:
        return torch.cat([x[given == c][:10] for c in range(none)])

    drawn = torch.empty(n, *EVENT)
    for c in labels.unique():
        count = int((labels == c).sum())
        drawn[labels == c] = gaussian(data.images[data.labels == c]).sample(count, seed=1 + int(c)).float()
    lines.append(row("a Gaussian of each class", "", drawn, labels, twin, judge, options.c2st))
    pictures = {"held out": some(half, data.held_out_labels[-n:]), "a Gaussian of each class": some(drawn, labels)}
    budgets = [int(b) for b in options.budgets.split(",")]
    for scale in (float(s) for s in options.scales.split(",")):
        guidance = ss.ClassifierFree(model.given(label=labels), scale, null={"label": none})
        for nfe in budgets:
            x = ss.sample(guidance, (n, *EVENT), nfe=nfe, seed=options.seed, start=start)
            lines.append(row(f"{scale:g}", str(nfe), x, labels, twin, judge, options.c2st))
            if nfe == budgets[len(budgets) // 2]:
                pictures[f"scale {scale:g}, {nfe} evaluations"] = some(x, labels)
    return "\n".join(lines), pictures


def operators() -> dict[str, inverse.Linear]:
    around = torch.ones(EVENT, dtype=torch.bool)
    around[:, 4:12, 4:12] = False
    return {"middle covered": inverse.Mask(around), "a quarter of the size": inverse.Downsample(4, EVENT)}


def restored(
    model: ss.Denoiser, data: Patches, judge: Judge, std: float, options: Options
) -> tuple[str, dict[str, Tensor]]:
    """Table of measurements and methods, and ten restored patches of each."""
    normal = gaussian(data.images)

    def by_gaussian(mean: bool) -> _restoring.Restore:
        def restore(prior: Any, seen: inverse.Measurement, shape: tuple[int, ...], setting: Setting) -> Tensor:
            rows = []
            for k in range(shape[0]):
                one = seen.rows(torch.tensor([k]))
                exact = inverse.posterior(normal, inverse.Measurement(one.operator, one.y.double(), std=setting.noise))
                rows.append(exact.mean()[None] if mean else exact.sample(1, seed=k))
            return torch.cat(rows).reshape(shape).float()

        return restore

    images, labels = data.held_out[: options.restored], data.held_out_labels[: options.restored]
    truth = Truth(images, labels, data.images, judge.classes, noun="patch")
    prior = model.given(label=torch.full((len(images),), len(data.names)))
    methods = {"a Gaussian, mean": by_gaussian(True), "a Gaussian, sample": by_gaussian(False), **METHODS}
    return _restoring.restored(prior, truth, operators(), Setting(options.nfe, std, seed=options.seed), methods)


def draw(pictures: dict[str, Tensor], page: Path, columns: int, rows: tuple[str, ...] = ()) -> None:
    """Draw each set of patches, ten in a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    lines = -(-len(pictures) // columns)
    high = max(len(images) for images in pictures.values()) / 10
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.6 * columns + 1.2 * bool(rows), (0.27 * high + 0.3) * lines), squeeze=False
    )
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, (title, images) in zip(axes.flat, pictures.items(), strict=False):
        wide = nn.functional.pad(images.clamp(-1, 1) / 2 + 0.5, (1, 1, 1, 1), value=1.0)
        grid = wide.reshape(-1, 10, 3, 18, 18).permute(0, 3, 1, 4, 2).reshape(-1, 180, 3)
        ax.imshow(grid, interpolation="nearest")
        ax.set_title(title, fontsize=8)
    if rows:
        names = [name.replace("`", "") for name in rows]
        axes[0, 0].set_yticks([18 * (k + 0.5) for k in range(len(rows))], names, fontsize=6)
        axes[0, 0].tick_params(length=0)
    figure.tight_layout()
    figure.savefig(page, dpi=80)
    plt.close(figure)
    from PIL import Image

    with Image.open(page) as picture:
        few = picture.convert("RGB").quantize(128)
    few.save(page, optimize=True)


def main(options: Options, quick: bool) -> str:
    began = time.process_time()
    data = load(quick)
    std = float(data.images.std())
    print(f"{len(data.images)} training patches, {len(data.held_out)} held-out ones, standard deviation {std:.2f}")
    judge = Judge(data, options.judge)
    print(f"the classifier is right on {judge.accuracy:.1%} of the held-out patches")
    trainer = train(data, options)
    print(f"classifier and network: {time.process_time() - began:.0f} s of CPU time", flush=True)
    began = time.process_time()
    assert trainer.ema is not None and isinstance(trainer.model, ss.Denoiser)
    with trainer.ema.swapped():
        model = trainer.model.eval().requires_grad_(False)
        table, pictures = sampled(model, data, judge, ss.Start(data_std=std), options)
        print(f"\n{table}\n", flush=True)
        more, others = restored(model, data, judge, std, options)
    print(f"{more}\n\nsamples and restorations: {time.process_time() - began:.0f} s of CPU time")
    text = f"{table}\n\n{more}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "colour.md").write_text(text)
    if not quick:
        draw(pictures, options.out / "colour-sampled.png", columns=3)
        names = ("truth", "seen", "a Gaussian, mean", "a Gaussian, sample", *METHODS)
        draw(others, options.out / "colour-restored.png", columns=2, rows=names)
    return text


def parse() -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the samples are poor")
    given = vars(parser.parse_args())
    quick = given.pop("quick")
    if quick:
        small = {"steps": 2, "batch": 4, "width": 8, "judge": 10, "c2st": 10, "samples": 20}
        given.update(small, budgets="2", scales="1", restored=1, nfe=2)
    return Options(**given), quick


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parent / "interop"))
    main(*parse())
