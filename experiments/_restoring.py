"""Images restored from measurements by posterior samplers: the methods, their table, and the figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _digits import tiles
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.inverse import Measurement


@dataclass(frozen=True)
class Setting:
    """How samplers of a posterior are run.

    Arguments:
        nfe: Number of evaluations; DPS takes five times as many.
        data_std: Standard deviation of the pixels.
        noise: Standard deviation of the noise of a measurement.
        seed: Seed of the samplers.
    """

    nfe: int
    data_std: float
    noise: float = 0.1
    seed: int = 0

    @property
    def start(self) -> ss.Start:
        """Distribution of the initial state."""
        return ss.Start(data_std=self.data_std)


Restore = Callable[[Any, Measurement, tuple[int, ...], Setting], Tensor]


def under(solver: Any, make: Callable[..., ss.denoisers.AbstractDenoiser]) -> Restore:
    """Sample a posterior denoiser with a solver."""
    return lambda prior, seen, shape, s: ss.sample(
        make(prior, seen), shape, solver, nfe=s.nfe, seed=s.seed, start=s.start
    )


def pigdm(prior: Any, seen: Measurement, shape: tuple[int, ...], setting: Setting) -> Tensor:
    """ΠGDM with the standard deviation of the data."""
    model = inverse.PiGDM(prior, seen, data_std=setting.data_std)
    return ss.sample(model, shape, ss.DDPM(), nfe=setting.nfe, seed=setting.seed, start=setting.start)


def dps(prior: Any, seen: Measurement, shape: tuple[int, ...], setting: Setting) -> Tensor:
    """DPS as published: DDPM steps, each followed by a gradient step, with five times the evaluations."""
    grid = ss.grids.quadratic_vp(prior.sde, 5 * setting.nfe)
    model = inverse.DPS(prior, seen, inverse.dps_scale(prior.sde, grid, 0.3), norm=True)
    return ss.sample(model, shape, ss.DDPM(), grid=grid, seed=setting.seed, start=setting.start)


METHODS: dict[str, Restore] = {
    "`MMPS`": under(ss.DDPM(), inverse.MMPS),
    "`MMPS`, flow": under(ss.DPMSolverPP(2), inverse.MMPS),
    "`PiGDM`": pigdm,
    "`DiffPIR`": under(ss.DDPM(), inverse.DiffPIR),
    "`DPS`, published step": dps,
    "`ddrm`": lambda prior, seen, shape, s: inverse.ddrm(prior, seen, shape, s.nfe, seed=s.seed).x,
}


@dataclass(frozen=True)
class Truth:
    """Images to restore, and what the results are compared with.

    Arguments:
        images: Images, (N, 1, h, w).
        labels: Their classes, (N,).
        train: Training images, for the baseline of the nearest one.
        classes: Function from images to predicted classes and their probabilities.
        noun: Name of an image in the table.
    """

    images: Tensor
    labels: Tensor
    train: Tensor
    classes: Callable[[Tensor], tuple[Tensor, Tensor]]
    noun: str = "digit"


def restored(
    prior: Any,
    truth: Truth,
    operators: Mapping[str, inverse.Linear],
    setting: Setting,
    methods: Mapping[str, Restore] = METHODS,
) -> tuple[str, dict[str, Tensor]]:
    """Table of measurements and methods, and ten restored images of each.

    Arguments:
        prior: Denoiser of the images, without labels.
        truth: Images to restore.
        operators: Operators of the measurements, by name.
        setting: How the samplers are run.
        methods: Samplers, by name.
    """
    lines = ["| measurement | method | RMSE | misfit | class | confidence |", "|---|---|---|---|---|---|"]
    pictures = {}
    event = tuple(truth.images.shape[1:])
    for word, A in operators.items():
        clean = A(truth.images)
        y = clean + setting.noise * ss.Noise(setting.seed + 1).like(clean, 0)
        seen = Measurement(A, y, std=setting.noise)
        shown = [truth.images[:10]]

        def line(name: str, x: Tensor, A: inverse.Linear = A, y: Tensor = y, word: str = word) -> str:
            rmse = float((x - truth.images).square().mean().sqrt())
            misfit = float((A(x) - y).square().mean().sqrt()) / setting.noise
            label, confidence = truth.classes(x)
            right = float((label == truth.labels).float().mean())
            return f"| {word} | {name} | {rmse:.3f} | {misfit:.2f} | {right:.2f} | {float(confidence.mean()):.2f} |"

        nearest = torch.cdist(y.flatten(1), A(truth.train).flatten(1)).argmin(1)
        lines += [
            line("the truth", truth.images),
            line("A⁺y", A.pinv(y)),
            line(f"nearest training {truth.noun}", truth.train[nearest]),
        ]
        shown.append(A.adjoint(y)[:10] / float(A.adjoint(A(torch.ones(1, *event))).max()))
        for name, method in methods.items():
            x = method(prior, seen, tuple(truth.images.shape), setting)
            lines.append(line(name, x))
            shown.append(x[:10])
        pictures[word] = torch.cat(shown)
    return "\n".join(lines), pictures


def draw(pictures: dict[str, Tensor], page: Path, columns: int, rows: tuple[str, ...] = ()) -> None:
    """Draw each set of images, ten in a row, with the names of the rows at the left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    lines = -(-len(pictures) // columns)
    high = max(len(images) for images in pictures.values()) / 10
    size = (3.2 * columns + bool(rows), (0.33 * high + 0.3) * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for ax, (title, images) in zip(axes.flat, pictures.items(), strict=False):
        ax.imshow(-tiles(images), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        ax.set_title(title, fontsize=8)
    if rows:
        step = next(iter(pictures.values())).shape[-2] + 2
        names = [name.replace("`", "") for name in rows]
        axes[0, 0].set_yticks([step * (k + 0.5) for k in range(len(rows))], names, fontsize=7)
        axes[0, 0].tick_params(length=0)
    figure.tight_layout()
    figure.savefig(page, dpi=90)
    plt.close(figure)
    with Image.open(page) as picture:
        few = picture.convert("L").quantize(
            16
        )  # the figure is grey; in colour the file is three to five times as large
    few.save(page, optimize=True)
