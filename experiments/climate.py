"""Annual air temperature over North America, restored from sparse stations: a score model beside kriging.

    python experiments/climate.py            # needs the packages iris-sample-data and h5py; five minutes of one core
    python experiments/climate.py --quick    # seconds, for CI

The data are two runs of a climate model, 240 years on 37 × 49 cells each. The run A1B trains a UNet and estimates a
covariance. Fields of the run E1 are measured at stations, each with a noise level of its own, and restored. A year in
which both runs have the same field is never used for a test. The anomaly of a field is its difference from the mean of
the training run.

Kriging is `ss.inverse.posterior` of a Gaussian with the training covariance, which is exact. `MMPS` with the exact
denoiser of this Gaussian shows the error of the sampler; with the UNet it adds that of the network. Without the
packages the script makes synthetic fields of the same shape, and says so.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

import scoresde as ss
from scoresde import inverse
from scoresde.training import Update

GRID = (37, 49)
EVENT = (1, *GRID)
START = ss.Start(data_std=1.0)


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 600
    batch: int = 12
    rate: float = 2e-3
    width: int = 16
    rank: int = 60  # principal axes of the covariance; the other directions have one variance
    stations: int = 60
    least: float = 0.2  # smallest and largest standard deviation of a station, in kelvin
    most: float = 1.5
    cases: int = 8
    samples: int = 16
    nfe: int = 20
    seed: int = 0
    quick: bool = False
    out: Path = Path(__file__).parent / "out"


QUICK = {"steps": 2, "batch": 2, "width": 4, "cases": 1, "samples": 2, "nfe": 8}


@dataclass(frozen=True)
class Climate:
    """Fields of two runs in kelvin, (N, 37, 49), with the latitudes of their rows in degrees."""

    training: Tensor
    held_out: Tensor
    latitude: Tensor
    notes: tuple[str, ...]


def load() -> Climate:
    """The two runs of the package; synthetic ones without it."""
    if find_spec("iris_sample_data") is None or find_spec("h5py") is None:
        return synthetic()
    h5py = import_module("h5py")
    folder = Path(str(import_module("iris_sample_data").__file__)).parent / "sample_data"
    runs: list[Tensor] = []
    for name in ("A1B", "E1"):
        with h5py.File(folder / f"{name}_north_america.nc") as file:
            runs.append(torch.from_numpy(file["air_temperature"][:].astype("float64")))
            times, unit = file["time"][:], file["time"].attrs["units"].decode()
            latitude = torch.from_numpy(file["latitude"][:].astype("float64"))
    step = float(times[1] - times[0])
    differs = (runs[0] - runs[1]).abs().flatten(1).amax(1) >= 1e-2
    notes = (
        f"fields {tuple(runs[0].shape)}, one every {step:g} {unit.split()[0]}",
        f"years with equal fields in both runs: {int((~differs).sum())}",
    )
    return Climate(runs[0], runs[1][differs], latitude, notes)


def synthetic() -> Climate:
    """Correlated fields with a trend, of the shape of the data."""
    generator = torch.Generator().manual_seed(0)
    roots = [
        torch.linalg.cholesky(torch.exp(-(torch.arange(n)[:, None] - torch.arange(n)).abs().double() / 8)) for n in GRID
    ]
    weather = torch.randn((2, 240, *GRID), generator=generator, dtype=torch.float64)
    trend = torch.linspace(0, 1, 240, dtype=torch.float64)[:, None, None] ** 2 * torch.linspace(2, 5, 37)[:, None]
    runs = 280 + trend + roots[0] @ weather @ roots[1].mT
    notes = ("synthetic fields, not data: the packages iris-sample-data and h5py are not installed",)
    return Climate(runs[0], runs[1, 140:], torch.linspace(15, 60, 37).double(), notes)


# The prior.


def train(x: Tensor, options: Options) -> ss.Denoiser:
    """A UNet, trained on anomalies with a standard deviation of 1."""
    net = ss.nn.UNet(1, width=options.width, multipliers=(1, 2, 2), blocks=1, attention=(), seed=options.seed)
    model = ss.Denoiser(net, ss.VP(), predicts="v")
    loss, average = ss.DSM(model), ss.EMA(model, 0.99)
    update = Update(
        warmup=max(1, options.steps // 20), schedule=lambda step: max(0.05, 1 - 0.95 * step / options.steps)
    )
    adam = torch.optim.Adam(loss.parameters(), options.rate)
    ss.Trainer(loss, x.float(), adam, batch=options.batch, ema=average, update=update, seed=options.seed).fit(
        options.steps
    )
    with average.swapped():
        state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    return model.requires_grad_(False)


# Exact answer for the Gaussian.


def kriging(gaussian: ss.Gaussian, seen: inverse.Measurement) -> tuple[Tensor, Tensor]:
    """Mean (N, *event) and standard deviation (*event) of the Gaussian posterior, given the N rows of a measurement."""
    mean, spectrum, axes, rest = gaussian.arguments
    assert isinstance(axes, Tensor)
    cov = (axes * (spectrum - rest)) @ axes.mT + rest * torch.eye(len(axes), dtype=axes.dtype)
    prior = ss.GaussianMixture(gaussian.sde, mean[None], cov=cov[None])
    exact = [inverse.posterior(prior, seen.rows(torch.tensor([k]))) for k in range(len(seen.y))]
    variance = exact[0].component_covariances()[0].diagonal()
    return torch.stack([one.mean() for one in exact]), variance.sqrt().reshape(gaussian.event)


# Scores.


def averaged(values: Tensor, weight: Tensor) -> float:
    """Mean over fields, weighted by the areas of the cells."""
    return float((values * weight).mean() / weight.mean())


def row(name: str, rmse: float, crps: float, spread: float, coverage: float, seconds: float | None = None) -> str:
    """A row of the table."""
    time_of = "" if seconds is None else f"{seconds:.0f}"
    return f"| {name} | {rmse:.3f} | {crps:.3f} | {spread:.3f} | {spread / rmse:.2f} | {coverage:.2f} | {time_of} |"


def of_gaussian(name: str, truth: Tensor, mean: Tensor, std: Tensor, weight: Tensor) -> str:
    """Scores of a Gaussian in each cell."""
    z = (truth - mean) / std
    below = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    density = (-0.5 * z.square()).exp() / math.sqrt(2 * math.pi)
    crps = std * (z * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi))
    rmse = math.sqrt(averaged((truth - mean).square(), weight))
    inside = ((below - 0.5).abs() <= 0.45).double()
    spread = math.sqrt(averaged(std.square().expand_as(truth), weight))
    return row(name, rmse, averaged(crps, weight), spread, averaged(inside, weight))


def of_samples(name: str, truth: Tensor, x: Tensor, weight: Tensor, seconds: float | None = None) -> str:
    """Scores of samples (N, M, *event); finite M is corrected for, so that M exact samples have spread = RMSE."""
    m = x.shape[1]
    rmse = math.sqrt(averaged((truth - x.mean(1)).square(), weight))
    between = (x[:, :, None] - x[:, None]).abs().sum((1, 2)) / (m * (m - 1))
    crps = averaged((x - truth[:, None]).abs().mean(1) - 0.5 * between, weight)
    spread = math.sqrt(averaged(x.var(1) * (1 + 1 / m), weight))
    inside = ((ss.metrics.ranks(truth, x) - 0.5).abs() <= 0.45).double()
    return row(name, rmse, crps, spread, averaged(inside, weight), seconds)


# The experiment.


def samplers(
    model: ss.Denoiser, gaussian: ss.Gaussian, options: Options
) -> dict[str, Callable[[inverse.Measurement, tuple[int, ...]], Tensor]]:
    """Posterior samplers by name."""

    def under(
        prior: ss.denoisers.AbstractDenoiser, solver: ss.solvers.Solver | None
    ) -> Callable[[inverse.Measurement, tuple[int, ...]], Tensor]:
        return lambda seen, shape: ss.sample(
            inverse.MMPS(prior, seen, iterations=2), shape, solver, nfe=options.nfe, seed=options.seed, start=START
        )

    return {
        "`MMPS`, Gaussian": under(gaussian, ss.DDPM()),
        "`MMPS`, flow, Gaussian": under(gaussian, None),
        "`MMPS`, UNet": under(model, ss.DDPM()),
        "`MMPS`, flow, UNet": under(model, None),
        "`PiGDM`, UNet": lambda seen, shape: ss.sample(
            inverse.PiGDM(model, seen), shape, ss.DDPM(), nfe=options.nfe, seed=options.seed, start=START
        ),
        "`daps`, UNet": lambda seen, shape: (
            inverse.daps(model, seen, shape, options.nfe, steps=3, seed=options.seed, start=START).x
        ),
    }


def draw(path: Path, panels: dict[str, Tensor], where: Tensor, scale: float) -> None:
    """A figure of fields; the stations are points in the first one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(11, 4.6), layout="constrained")
    limit = float(panels["truth and stations"].abs().max() * scale)
    for axis, (title, field) in zip(axes.flat, panels.items(), strict=True):
        spread = title.startswith("spread")
        low, high, colours = (0.0, limit / 3, "viridis") if spread else (-limit, limit, "RdBu_r")
        shown = axis.imshow(field[0] * scale, origin="lower", cmap=colours, vmin=low, vmax=high)
        figure.colorbar(shown, ax=axis, shrink=0.8)
        axis.set(title=title, xticks=[], yticks=[])
    axes.flat[0].plot(where % GRID[1], where // GRID[1], "k.", markersize=3)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def main(options: Options) -> str:
    climate = load()
    for note in climate.notes:
        print(note)
    mean = climate.training.mean(0)
    scale = float((climate.training - mean).std())
    known, unknown = (((run - mean) / scale)[:, None] for run in (climate.training, climate.held_out))
    cases = torch.linspace(0, len(unknown) - 1, options.cases).round().long()
    truth = unknown[cases]
    generator = torch.Generator().manual_seed(options.seed)
    where = torch.randperm(math.prod(GRID), generator=generator)[: options.stations].sort().values
    noise = torch.rand(options.stations, generator=generator, dtype=torch.float64)
    std = options.least * (options.most / options.least) ** noise / scale
    mask = torch.zeros(math.prod(GRID), dtype=torch.bool)
    mask[where] = True
    operator = inverse.Mask(mask.reshape(EVENT))
    y = inverse.Measurement(operator, truth.flatten(1)[:, where], std=std).simulate(truth, seed=options.seed)
    seen = inverse.Measurement(operator, y, std=std)
    gaussian = ss.Gaussian.estimate(ss.VP(), known, "low rank", rank=options.rank)
    centre, deviation = kriging(gaussian, seen)
    weight = torch.deg2rad(climate.latitude).cos()[:, None]
    print(f"training fields {len(known)}, held-out fields {len(unknown)}, of which {len(truth)} are restored")
    started = time.perf_counter()
    model = train(known, options)
    print(f"training: {options.steps} steps, {time.perf_counter() - started:.0f} s")
    lines = [
        "| method | RMSE (K) | CRPS (K) | spread (K) | spread/RMSE | coverage of 90 % | seconds |",
        "|---|---|---|---|---|---|---|",
        of_gaussian("no station: training mean", *(scale * v for v in (truth, known.mean(0), known.std(0))), weight),
        of_gaussian("kriging, exact", scale * truth, scale * centre, scale * deviation, weight),
    ]
    shape = (options.cases * options.samples, *EVENT)
    each = inverse.Measurement(operator, y.float().repeat_interleave(options.samples, 0), std=std.float())
    drawn: dict[str, Tensor] = {}
    for name, restore in samplers(model, gaussian, options).items():
        started = time.perf_counter()
        x = restore(each, shape).double().reshape(options.cases, options.samples, *EVENT)
        drawn[name] = x
        lines.append(of_samples(name, scale * truth, scale * x, weight, time.perf_counter() - started))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "climate.md").write_text(table + "\n")
    print(table)
    if not options.quick:
        last, x = options.cases - 1, drawn["`MMPS`, UNet"]
        panels = {
            "truth and stations": truth[last],
            "kriging: mean": centre[last],
            "MMPS, UNet: mean": x[last].mean(0),
            "PiGDM, UNet: mean": drawn["`PiGDM`, UNet"][last].mean(0),
            "MMPS, UNet: a sample": x[last, 0],
            "MMPS, UNet: another": x[last, 1],
            "spread of kriging": deviation,
            "spread of MMPS, UNet": x[last].std(0),
        }
        draw(options.out / "climate.png", panels, where, scale)
    return table


def from_command_line() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in fields(Options):
        if field.name != "quick":
            parser.add_argument(f"--{field.name}", type=type(getattr(Options(), field.name)))
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    return Options(**{**(QUICK if given["quick"] else {}), **given})


if __name__ == "__main__":
    main(from_command_line())
