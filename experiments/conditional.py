"""Class-conditional digits by guidance, and digits restored from measurements.

    python experiments/conditional.py            # resumes an interrupted run; 2000 steps take 6 minutes on one core
    python experiments/conditional.py --quick    # seconds, for CI: the samples are poor

A class-conditional UNet is trained on scikit-learn's digits; in one sample of ten the label is dropped. Then:

* Classifier-free guidance is run at several scales. The table shows how often a classifier of real digits predicts the
  requested class, its confidence, and the variety of the samples (mean distance within a class, divided by that of the
  training digits). A larger scale increases the accuracy and decreases the variety. Sliced W2 and C2ST compare samples
  with held-out digits; the median distance to the nearest training digit shows whether they are copies.
* Held-out digits are half covered, halved in size, or blurred, and noise of standard deviation 0.1 is added. Posterior
  samplers restore them with the same network, without labels. The table shows the error per pixel, the distance of A x
  from y in units of the noise (1 is right), and how often the classifier predicts the true class. Two baselines are the
  least-squares state A⁺y and the training digit that fits y best.

Both tables have a row for held-out digits. The script writes the tables and two figures.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import _restoring
import torch
from _digits import Digits, Judge, load, small_unet
from _restoring import METHODS, Setting, Truth, draw
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.training import Checkpoints, Update

EVENT = (1, 8, 8)
NONE = 10  # the label of no class
STD = 0.75  # standard deviation of the digits' pixels
START = ss.Start(data_std=STD)


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 2000
    batch: int = 128
    rate: float = 2e-3
    a_class: int = 25  # number of samples of each class
    restored: int = 100
    nfe: int = 20
    scales: str = "0,1,1.5,2,3,5"
    std: float = 0.1
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


def train(digits: Digits, options: Options) -> ss.Trainer:
    """Train the conditional network, from its last checkpoint if there is one."""
    model = ss.Denoiser(small_unet(classes=10, seed=options.seed), ss.VP(), predicts="v")
    loss = ss.DSM(model, drop=0.1, null={"label": NONE})
    trainer = ss.Trainer(
        loss,
        {"x": digits.images, "label": digits.labels},
        torch.optim.Adam(loss.parameters(), options.rate),
        batch=options.batch,
        ema=0.995,
        update=Update(warmup=options.steps // 20, schedule=lambda step: 1 - 0.95 * step / options.steps),
        hooks=[Checkpoints(options.out / f"conditional-{options.steps}", every=250, keep=1)],
        seed=options.seed,
    )
    trainer.resume()
    trainer.fit(options.steps)
    return trainer


# Class-conditional samples.


def variety(x: Tensor, labels: Tensor) -> float:
    """Mean distance between images of one class."""
    gaps = [torch.pdist(x[labels == c].flatten(1)).mean() for c in labels.unique()]
    return float(torch.stack(gaps).mean())


def guided(model: ss.Denoiser, digits: Digits, judge: Judge, options: Options) -> tuple[str, dict[str, Tensor]]:
    """Table of guidance scales, and five samples of each class."""
    labels = torch.arange(10).repeat_interleave(options.a_class)
    half = len(digits.held_out) // 2
    held, held_labels, twin = digits.held_out[:half], digits.held_out_labels[:half], digits.held_out[half:]
    real = variety(digits.images, digits.labels)
    lines = ["| scale | class | confidence | variety | sliced W2 | C2ST | nearest |", "|---|---|---|---|---|---|---|"]

    def line(name: str, x: Tensor, requested: Tensor) -> str:
        predicted, confidence = judge.classes(x)
        right = float((predicted == requested).float().mean())
        n = min(len(x), len(twin))
        flat, other = x[:n].flatten(1), twin[:n].flatten(1)
        nearest = torch.cdist(x.flatten(1), digits.images.flatten(1)).min(1).values.median()
        return (
            f"| {name} | {right:.3f} | {float(confidence.mean()):.2f} | {variety(x, requested) / real:.2f} | "
            f"{ss.metrics.sliced_w2(flat, other):.3f} | {ss.metrics.c2st(flat, other):.2f} | {float(nearest):.2f} |"
        )

    lines.append(line("held-out digits", held, held_labels))
    pictures = {"held out": torch.stack([held[held_labels == c][:5] for c in range(10)], 1).flatten(0, 1)}
    for scale in (float(s) for s in options.scales.split(",")):
        guidance = ss.ClassifierFree(model.given(label=labels), scale, null={"label": NONE})
        x = ss.sample(guidance, (len(labels), *EVENT), nfe=options.nfe, seed=options.seed, start=START)
        lines.append(line(f"{scale:g}", x, labels))
        pictures[f"scale {scale:g}"] = x.reshape(10, options.a_class, *EVENT)[:, :5].transpose(0, 1).flatten(0, 1)
    return "\n".join(lines), pictures


# Restored digits.


def operators() -> dict[str, inverse.Linear]:
    top = torch.zeros(EVENT, dtype=torch.bool)
    top[:, :4] = True
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    return {
        "lower half covered": inverse.Mask(top),
        "half the size": inverse.Downsample(2, EVENT),
        "blurred": inverse.Blur(torch.outer(kernel, kernel), EVENT),
    }


def restored(model: ss.Denoiser, digits: Digits, judge: Judge, options: Options) -> tuple[str, dict[str, Tensor]]:
    """Table of measurements and methods, and ten restored digits of each."""
    images, labels = digits.held_out[: options.restored], digits.held_out_labels[: options.restored]
    truth = Truth(images, labels, digits.images, judge.classes)
    prior = model.given(label=torch.full((len(images),), NONE))
    return _restoring.restored(prior, truth, operators(), Setting(options.nfe, STD, options.std, options.seed))


def main(options: Options) -> str:
    digits = load()
    judge = Judge(digits)
    trainer = train(digits, options)
    assert trainer.ema is not None and isinstance(trainer.model, ss.Denoiser)
    with trainer.ema.swapped():
        model = trainer.model.eval()
        table, pictures = guided(model, digits, judge, options)
        more, others = restored(model, digits, judge, options)
    text = f"{table}\n\n{more}\n"
    print(text)
    (options.out / "conditional.md").write_text(text)
    draw(pictures, options.out / "conditional-guided.png", columns=4)
    draw(others, options.out / "conditional-restored.png", columns=3, rows=("truth", "seen", *METHODS))
    return text


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the samples are poor")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(steps=10, a_class=5, restored=10, nfe=4, scales="0,1,3")
    return Options(**given)


if __name__ == "__main__":
    main(parse())
