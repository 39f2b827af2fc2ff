"""Why does the anchored residual gain less on networks than on exact models? Errors of several kinds, and a network.

    python experiments/anchored.py            # seconds of one core, and half a minute to train the network once
    python experiments/anchored.py --quick    # seconds, for CI

`AnchoredResidual(std)` halves the error of `VelocityAB(3)` on many exact mixtures, and not on networks. The exact model
here is a mixture of ten Gaussians in 64 dimensions with the means and covariances of the 8 × 8 digits, so it has the
spectrum of the digits. It gets errors in v that are smooth, that change fast with the noise level, that change fast
with the state, or that are present at some noise levels only. A UNet that was trained on the digits is beside it. The
table has the median distance to a fine solve, of `VelocityAB(3)`, and of the anchored residual with four nodes divided
by it, on `quadratic_vp`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from _cases import digits
from _digits import load
from _problems import Network, solved
from torch import Tensor

import scoresde as ss
from scoresde.denoisers.base import AbstractDenoiser

BUDGETS = (5, 8, 10, 20)


@dataclass
class Options:
    """Options of the command line."""

    points: int = 32
    steps: int = 1200  # of the training
    out: Path = Path(__file__).parent / "out"
    quick: bool = False


class Banded(Network):
    """A mixture with the error of a network in v between two noise levels σ/α.

    Arguments:
        mixture: Exact denoiser.
        size: Root mean square of the error.
        in_level: Factor of the speed with which the error changes with log σ/α.
        in_state: Factor of the speed with which the error changes with the state.
        band: Noise levels of the error, the first one included.
    """

    def __init__(
        self,
        mixture: ss.GaussianMixture,
        size: float,
        in_level: float = 1.0,
        in_state: float = 1.0,
        band: tuple[float, float] = (0.0, float("inf")),
    ) -> None:
        super().__init__(mixture, "v", size)
        self.rates, self.waves, self.band = in_level * self.rates, in_state * self.waves, band

    def x0(self, x: Tensor, t: float | Tensor, **cond: object) -> Tensor:
        level = float((-torch.as_tensor(self.sde.lam(t))).exp())
        return super().x0(x, t) if self.band[0] <= level < self.band[1] else self.mixture.x0(x, t)


def digits_mixture() -> tuple[ss.GaussianMixture, float]:
    """One Gaussian for each class of the digits, and the standard deviation of the digits."""
    data = load()
    x = data.images.double().flatten(1)
    parts = [x[data.labels == k] for k in range(10)]
    noise = 1e-3 * torch.eye(64, dtype=torch.float64)
    mixture = ss.GaussianMixture(
        ss.VP(), torch.stack([p.mean(0) for p in parts]), cov=torch.stack([p.T.cov() + noise for p in parts])
    )
    return mixture, float(x.var(0).mean().sqrt())


def row(name: str, model: AbstractDenoiser, x: Tensor, end: Tensor, std: float, budgets: tuple[int, ...]) -> str:
    cells = []
    for n in budgets:
        grid, errors = ss.grids.quadratic_vp(model.sde, n), []
        for rule in (ss.VelocityAB(3), ss.solvers.AnchoredResidual(std)):
            gap = ss.plan.run(rule.plan(model.sde, grid), model.x0, x) - end
            errors.append(float(gap.flatten(1).double().square().mean(1).sqrt().median()))
        cells.append(f"{errors[0]:.4f}; {errors[1] / errors[0]:.2f}")
    return f"| {name} | " + " | ".join(cells) + " |"


def main(options: Options) -> str:
    torch.set_num_threads(1)
    budgets = BUDGETS[:1] if options.quick else BUDGETS
    mixture, std = digits_mixture()
    models: dict[str, AbstractDenoiser] = {
        "exact": mixture,
        "5 % in v, smooth": Banded(mixture, 0.05),
        "5 % in v, eight times faster in the noise level": Banded(mixture, 0.05, in_level=8),
        "5 % in v, four times faster in the state": Banded(mixture, 0.05, in_state=4),
        "10 % in v, at σ/α above 3": Banded(mixture, 0.1, band=(3.0, float("inf"))),
        "10 % in v, at σ/α from 0.3 to 3": Banded(mixture, 0.1, band=(0.3, 3.0)),
        "10 % in v, at σ/α below 0.3": Banded(mixture, 0.1, band=(0.0, 0.3)),
    }
    lines = ["| model | " + " | ".join(f"{n} evaluations" for n in budgets) + " |"]
    lines.append("| --- " + "| ---: " * len(budgets) + "|")
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, model in list(models.items())[: 1 if options.quick else None]:
            lines.append(row(name, model, *solved(model, options.points, 5), std, budgets))
    if not options.quick:
        case = digits(options.out, options.points, options.steps)
        with torch.no_grad():
            lines.append(row("UNet, trained on the digits", case.model, case.x, case.end, std, budgets))
    text = "\n".join(lines)
    (options.out / "anchored.md").write_text(text + "\n")
    print(text)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=Options.points)
    parser.add_argument("--steps", type=int, default=Options.steps)
    parser.add_argument("--out", type=Path, default=Options.out)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI: the exact model alone")
    given = parser.parse_args()
    main(Options(4 if given.quick else given.points, given.steps, given.out, given.quick))
