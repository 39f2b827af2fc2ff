"""Digits on request, and digits from what is left of them.

    python experiments/conditional.py
    python experiments/conditional.py --quick    # seconds, for CI: the samples are no good

A class-conditional UNet is trained on scikit-learn's digits, one label in ten replaced by none. Then:

* classifier-free guidance over a range of scales: how often a classifier trained on real digits sees the class that was
  asked for, how sure it is, and how much samples of a class differ (mean distance within a class, over that of real
  digits): what is gained in accuracy is paid in variety.
* held-out digits are half covered, halved in size, or blurred, with noise of 0.1, and restored by four posterior
  samplers through the same network without labels: distance to the truth per pixel, distance of A x from y in units of
  the noise (1 is right), and how often the classifier sees the true class.

Writes a table and a figure.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _digits import Digits, Judge, load, small_unet, tiles
from torch import Tensor

import scoresde as ss
from scoresde import inverse

EVENT = (1, 8, 8)
NONE = 10  # the label of no class


@dataclass
class Options:
    """What can be set from the command line."""

    steps: int = 1000
    batch: int = 128
    rate: float = 2e-3
    a_class: int = 30  # samples of each class
    restored: int = 40
    nfe: int = 20
    scales: str = "0,1,1.5,2,3,5"
    std: float = 0.1
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


def train(digits: Digits, options: Options) -> ss.Trainer:
    model = ss.Denoiser(small_unet(classes=10, seed=options.seed), ss.VP(), predicts="v")
    loss = ss.DSM(model, drop=0.1, null={"label": NONE})
    trainer = ss.Trainer(
        loss,
        {"x": digits.images, "label": digits.labels},
        torch.optim.Adam(loss.parameters(), options.rate),
        batch=options.batch,
        ema=0.995,
        warmup=options.steps // 20,
        schedule=lambda step: 1 - 0.95 * step / options.steps,
        seed=options.seed,
    )
    trainer.fit(options.steps)
    return trainer


def variety(x: Tensor, labels: Tensor) -> float:
    """Mean distance between images of one class."""
    gaps = []
    for c in labels.unique():
        flat = x[labels == c].flatten(1)
        gaps.append(torch.pdist(flat).mean())
    return float(torch.stack(gaps).mean())


def guided(model: ss.Denoiser, digits: Digits, judge: Judge, options: Options) -> tuple[list[str], dict[str, Tensor]]:
    labels = torch.arange(10).repeat_interleave(options.a_class)
    real = variety(digits.images, digits.labels)
    lines = [f"{'scale':>6} {'accuracy':>9} {'confidence':>11} {'variety':>8}"]
    pictures = {}
    for scale in (float(s) for s in options.scales.split(",")):
        guidance = ss.ClassifierFree(model, scale, null={"label": NONE})
        x = ss.sample(guidance, (len(labels), *EVENT), nfe=options.nfe, seed=options.seed, data_std=0.75, label=labels)
        seen, confidence = judge.classes(x)
        accuracy = float((seen == labels).float().mean())
        lines.append(f"{scale:6.1f} {accuracy:9.3f} {float(confidence.mean()):11.3f} {variety(x, labels) / real:8.3f}")
        pictures[f"scale {scale:g}"] = x.reshape(10, options.a_class, *EVENT)[:, :5].transpose(0, 1).flatten(0, 1)
    return lines, pictures


def operators() -> dict[str, inverse.Linear]:
    top = torch.zeros(EVENT, dtype=torch.bool)
    top[:, :4] = True
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    return {
        "lower half covered": inverse.Mask(top),
        "half the size": inverse.Downsample(2, EVENT),
        "blurred": inverse.Blur(torch.outer(kernel, kernel), EVENT),
    }


def methods(prior: Any, seen: inverse.Measurement) -> dict[str, Any]:
    return {
        "DPS": inverse.DPS(prior, seen),
        "PiGDM": inverse.PiGDM(prior, seen, data_std=0.75),
        "MMPS": inverse.MMPS(prior, seen),
        "DiffPIR": inverse.DiffPIR(prior, seen),
    }


def restored(model: ss.Denoiser, digits: Digits, judge: Judge, options: Options) -> tuple[list[str], dict[str, Tensor]]:
    n = options.restored
    truth, labels = digits.held_out[:n], digits.held_out_labels[:n]
    prior = ss.guidance.Given(model, label=torch.full((n,), NONE))
    right = float((judge.classes(truth)[0] == labels).float().mean())
    head = f"{'measurement':20} {'method':10} {'RMSE':>7} {'|Ax−y|/std':>11} {'class':>7}"
    lines = [f"{head}   (class of the truth: {right:.3f})"]
    pictures = {}
    for word, operator in operators().items():
        clean = operator(truth)
        y = clean + options.std * ss.Noise(options.seed + 1).like(clean, 0)
        seen = inverse.Measurement(operator, y, std=options.std)
        shown = [truth[:10], operator.adjoint(y)[:10]]
        for name, method in methods(prior, seen).items():
            x = ss.sample(method, (n, *EVENT), nfe=options.nfe, seed=options.seed, data_std=0.75)
            rmse = float((x - truth).square().mean().sqrt())
            gap = float((operator(x) - y).square().mean().sqrt()) / options.std
            hit = float((judge.classes(x)[0] == labels).float().mean())
            lines.append(f"{word:20} {name:10} {rmse:7.3f} {gap:11.2f} {hit:7.3f}")
            shown.append(x[:10])
        pictures[f"{word}: truth, seen, DPS, PiGDM, MMPS, DiffPIR"] = torch.cat(shown)
    return lines, pictures


def main(options: Options) -> Path:
    digits = load()
    judge = Judge(digits)
    trainer = train(digits, options)
    assert trainer.ema is not None
    with trainer.ema.swapped():
        model = trainer.model.eval()
        table, pictures = guided(model, digits, judge, options)
        more, others = restored(model, digits, judge, options)
    text = "\n".join([*table, "", *more])
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "conditional.txt").write_text(text + "\n")
    page = options.out / "conditional.png"
    draw({**pictures, **others}, page)
    print(f"\nfigure: {page}")
    return page


def draw(pictures: dict[str, Tensor], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(13, 9))
    for ax in axes.flat:
        ax.axis("off")
    for ax, (title, images) in zip(axes.flat, pictures.items(), strict=False):
        ax.imshow(-tiles(images), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(page, dpi=90)
    plt.close(figure)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the samples are no good")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(steps=10, a_class=5, restored=10, nfe=4, scales="0,1,3")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
