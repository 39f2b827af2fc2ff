"""Fréchet distance of 8 × 8 digits in the features of a small classifier, with its floor."""

from __future__ import annotations

import statistics

import torch
from _digits import Digits
from torch import Tensor, nn

from scoresde.metrics import frechet


class Judge:
    """Fréchet distance to the 500 held-out digits in 32 features of a classifier.

    Arguments:
        digits: Digits.
        steps: Number of training steps of the classifier.
    """

    def __init__(self, digits: Digits, steps: int = 500) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU())
            net = nn.Sequential(self.body, nn.Linear(32, 10))
            optimiser = torch.optim.Adam(net.parameters(), 2e-3)
            for _ in range(steps):
                index = torch.randint(len(digits.images), (128,))
                loss = nn.functional.cross_entropy(net(digits.images[index]), digits.labels[index])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
        with torch.no_grad():
            right = net(digits.held_out).argmax(1) == digits.held_out_labels
        self.accuracy = float(right.float().mean())
        self.digits, self.reference = digits, self.features(digits.held_out)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """Features of images (N, 1, 8, 8), in float64; values outside [-1, 1] are clamped."""
        return self.body(x.float().clamp(-1, 1)).double()

    def distance(self, x: Tensor) -> float:
        """Fréchet distance of images to the held-out digits."""
        return frechet(self.features(x), self.reference)

    def floor(self, n: int) -> tuple[float, float]:
        """Distance of `n` training digits to the held-out digits: mean and standard deviation over disjoint sets."""
        sets = self.digits.images.split(n)[: max(1, len(self.digits.images) // n)]
        values = [self.distance(part) for part in sets]
        return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
