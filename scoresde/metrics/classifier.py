r"""The classifier two-sample test."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.metrics.pairs import as_pair, stream_of
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream

__all__ = ["c2st"]


@checked
def c2st(
    x: Tensor,
    y: Tensor,
    seed: int = 0,
    folds: int = 5,
    *,
    hidden: int = 64,
    steps: int = 400,
    batch: int = 128,
    lr: float = 3e-3,
    weight_decay: float = 1.0,
) -> float:
    r"""Classifier two-sample test: balanced accuracy of a small network on held-out samples.

    .. math:: \tfrac12 P(\hat c = x \mid x) + \tfrac12 P(\hat c = y \mid y)

    The value is 0.5 if this network cannot distinguish the sets and 1 if they do not overlap, also for N ≠ M. The
    network has two hidden layers and is trained in float32 on standardised features, once for each fold, all folds at
    the same time. Under equal distributions the standard deviation is little more than :math:`1 / 2\sqrt{N + M}`;
    :func:`compare` measures it, at the cost of one training for each permutation. A sample that occurs in both sets
    lowers the value below 0.5. In many dimensions a few thousand samples do not train the network well: a value of 0.5
    does not refute a difference that :func:`moments` or :func:`sliced_w2` shows.

    Arguments:
        x: Samples, (N, *event).
        y: Samples, (M, *event).
        seed: Seed of the folds, the weights and the batches.
        folds: Number of parts, each held out once.
        hidden: Width of the two hidden layers.
        steps: Number of steps of AdamW.
        batch: Number of samples of each set in a step.
        lr: Initial learning rate; it decreases linearly to zero.
        weight_decay: Decoupled weight decay; without it the network memorises the training samples.

    References:
        | Revisiting Classifier Two-Sample Tests (Lopez-Paz and Oquab, 2017), arXiv:1610.06545
    """
    for name, value in (("hidden", hidden), ("steps", steps), ("batch", batch)):
        check.integer(name, value, at_least=1)
    check.integer("folds", folds, at_least=2)
    check.number("lr", lr, above=0)
    check.number("weight_decay", weight_decay, at_least=0)
    noise = stream_of(seed, Stream.CLASSIFIER)
    with torch.inference_mode(False), torch.enable_grad():
        x, y = as_pair(x, y)
        if folds > min(len(x), len(y)):
            raise ValueError(
                f"`folds` must be at most {min(len(x), len(y))}, the number of samples in the smaller set, got {folds}."
            )
        std, mean = torch.std_mean(torch.cat([x, y]), 0)
        std = torch.where(std > 0, std, torch.ones_like(std))
        sets = [((v - mean) / std).float() for v in (x, y)]
        splits = [_Folds(v, folds, noise.fork(i)) for i, v in enumerate(sets)]
        net = _train(splits, noise, (x.shape[1], hidden, hidden, 1), folds, steps, batch, lr, weight_decay)
    with torch.no_grad():
        correct = [0, 0]
        for fold in range(folds):
            own = [p[fold : fold + 1] for p in net]
            correct[0] += int((_mlp(splits[0].held_out(fold)[None], own) < 0).sum())
            correct[1] += int((_mlp(splits[1].held_out(fold)[None], own) >= 0).sum())
    return 0.5 * (correct[0] / len(x) + correct[1] / len(y))


class _Folds:
    """One set of samples, shuffled and split into folds.

    Arguments:
        z: Samples, (N, D).
        folds: Number of parts; fold f holds out rows [cut[f], cut[f + 1]) of the shuffled samples.
        noise: Source of the shuffle and of the batches.
    """

    def __init__(self, z: Tensor, folds: int, noise: Noise) -> None:
        self.z = z[noise.uniform((1, len(z)), draw=0, dtype=torch.float64)[0].argsort(stable=True).to(z.device)]
        self.cut = [f * len(z) // folds for f in range(folds + 1)]
        self.noise = noise

    def held_out(self, fold: int) -> Tensor:
        """Held-out samples of a fold."""
        return self.z[self.cut[fold] : self.cut[fold + 1]]

    def batches(self, steps: int, size: int) -> Tensor:
        """Rows of the training batches, (steps, folds, size), uniform over the training samples of each fold."""
        start = torch.tensor(self.cut[1:])[:, None]
        length = len(self.z) - torch.tensor(self.cut).diff()[:, None]
        u = self.noise.uniform((steps, len(start), size), draw=1, dtype=torch.float64)
        return ((start + (u * length).long()) % len(self.z)).to(self.z.device)


def _mlp(z: Tensor, net: list[Tensor]) -> Tensor:
    """Logits of class y, (F, B), of samples (F, B, D) by F networks of weights (F, in, out), biases (F, 1, out)."""
    for weight, bias in zip(net[:-2:2], net[1:-2:2], strict=True):
        z = torch.baddbmm(bias, z, weight).relu()
    return torch.baddbmm(net[-1], z, net[-2])[..., 0]


def _train(
    splits: list[_Folds],
    noise: Noise,
    widths: tuple[int, ...],
    folds: int,
    steps: int,
    batch: int,
    lr: float,
    weight_decay: float,
) -> list[Tensor]:
    """Train one network for each fold, all at the same time, without the held-out samples of the fold."""
    device = splits[0].z.device
    net: list[Tensor] = []
    for layer, (a, b) in enumerate(itertools.pairwise(widths)):
        net += [noise.normal((folds, a, b), draw=layer) * math.sqrt(2 / a), torch.zeros(folds, 1, b)]
    net = [p.to(device).requires_grad_() for p in net]
    adam = torch.optim.AdamW(net, lr=lr, weight_decay=weight_decay)
    rows = [split.batches(steps, batch) for split in splits]
    for step in range(steps):
        adam.param_groups[0]["lr"] = lr * (1 - step / steps)
        of_x, of_y = (_mlp(split.z[row[step]], net) for split, row in zip(splits, rows, strict=True))
        softplus = torch.nn.functional.softplus
        loss = (softplus(of_x) + softplus(-of_y)).mean(1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return net
