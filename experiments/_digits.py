"""Handwritten digits, 8 × 8, that come with scikit-learn, and the evaluation of samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import scoresde as ss
from scoresde import metrics

HELD_OUT = 500


@dataclass(frozen=True)
class Digits:
    """1797 images in [-1, 1], (N, 1, 8, 8), with their labels 0 to 9; the last 500 of a fixed shuffle are held out."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


def load(seed: int = 0) -> Digits:
    """The digits, shuffled."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, held = order[:-HELD_OUT], order[-HELD_OUT:]
    return Digits(images[train], labels[train], images[held], labels[held])


@dataclass(frozen=True)
class Verdict:
    """Measures of a set of images.

    Arguments:
        confidence: Mean probability of the predicted class, 0.1 far from all digits.
        balance: Total variation distance between the shares of classes and those of the real digits.
        nearest: Median distance to the nearest training image; 0 would be copies.
        sliced_w2: Sliced Wasserstein-2 distance to the held-out digits.
        c2st: Accuracy of a classifier that is trained to separate them from held-out digits; ½ is indistinguishable.
        shares: Share of each class.
    """

    confidence: float
    balance: float
    nearest: float
    sliced_w2: float
    c2st: float
    shares: tuple[float, ...]


class Judge:
    r"""Evaluation of images by a classifier of the real training digits.

    The classifier counts the digits near an image, class by class, with a small prior on every class:

    .. math:: p_k(x) = \frac{a/10 + \sum_{i \in k} e^{-|x - x_i|^2/2}}{a + \sum_i e^{-|x - x_i|^2/2}}, \qquad a = 0.01,

    Among digits, whose nearest neighbour is at a distance of about 2.1, it is confident. Far from all digits it gives
    a tenth to each class, where a classifier that draws borders between classes would stay confident.

    Arguments:
        digits: Real digits.
    """

    def __init__(self, digits: Digits) -> None:
        self.digits = digits
        self.accuracy = float((self.classes(digits.held_out)[0] == digits.held_out_labels).float().mean())

    def classes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted class of each image and its probability."""
        near = (-0.5 * torch.cdist(x.flatten(1), self.digits.images.flatten(1)) ** 2).exp()
        counts = near @ torch.nn.functional.one_hot(self.digits.labels, 10).to(near)
        p = (0.001 + counts) / (0.01 + counts.sum(1, keepdim=True))
        best = p.max(1)
        return best.indices, best.values

    def yardsticks(self) -> list[str]:
        """Lines to compare samples with: held-out digits, and the same digits with shuffled pixels."""
        held = self.digits.held_out
        half, other = held.split(len(held) // 2)
        where = torch.rand(half.flatten(1).shape, generator=torch.Generator().manual_seed(0)).argsort(1)
        garbage = half.flatten(1).gather(1, where).reshape(half.shape)
        return [
            line("held-out digits", "", self(half, against=other)),
            line("the same, pixels shuffled", "", self(garbage, against=other)),
        ]

    def __call__(self, x: Tensor, against: Tensor | None = None) -> Verdict:
        """Measures of images (N, 1, 8, 8).

        Images are first rounded to the seventeen grey levels of the digits, because a classifier would otherwise
        separate samples from digits by their grey levels alone.

        Arguments:
            x: Images.
            against: Images to compare with; by default the held-out digits.
        """
        x = ((x.float() + 1) * 8).round().clamp(0, 16) / 8 - 1
        twin = self.digits.held_out if against is None else against
        label, confidence = self.classes(x)
        real = torch.bincount(self.digits.labels, minlength=10) / len(self.digits.labels)
        shares = torch.bincount(label, minlength=10) / len(label)
        nearest = torch.cdist(x.flatten(1), self.digits.images.flatten(1)).min(1).values
        n = min(len(x), len(twin))
        distance = partial(metrics.sliced_w2, n_projections=256)
        return Verdict(
            confidence=float(confidence.mean()),
            balance=float((shares - real).abs().sum() / 2),
            nearest=float(nearest.median()),
            sliced_w2=distance(x[:n].flatten(1), twin[:n].flatten(1)),
            c2st=metrics.c2st(x[:n].flatten(1), twin[:n].flatten(1)),
            shares=tuple(shares.tolist()),
        )


HEAD = f"{'what':28} {'NFE':>5} {'confidence':>10} {'balance':>8} {'nearest':>8} {'sliced W2':>10} {'C2ST':>6}"


def line(name: str, nfe: int | str, v: Verdict) -> str:
    """A row of the table under :data:`HEAD`."""
    return (
        f"{name:28} {nfe:>5} {v.confidence:10.3f} {v.balance:8.3f} {v.nearest:8.3f} {v.sliced_w2:10.4f} {v.c2st:6.3f}"
    )


def tiles(x: Tensor, columns: int = 10) -> Tensor:
    """One picture of images (N, 1, h, w), row by row."""
    n, _, h, w = x.shape
    rows = n // columns
    padded = torch.nn.functional.pad(x[: rows * columns, 0].clamp(-1, 1), (1, 1, 1, 1), value=1.0)
    return padded.reshape(rows, columns, h + 2, w + 2).permute(0, 2, 1, 3).reshape(rows * (h + 2), columns * (w + 2))


def small_unet(width: int = 24, classes: int | None = None, seed: int = 0, **options: int) -> ss.nn.UNet:
    """Network for 8 × 8 images that trains in minutes on two cores."""
    return ss.nn.UNet(
        1, width=width, multipliers=(1, 2), blocks=1, attention=(1,), classes=classes, seed=seed, **options
    )
