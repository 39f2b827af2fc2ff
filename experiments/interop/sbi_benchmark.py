"""Four tasks of the benchmark sbibm by score matching: `ss.DSM` with our solver, beside NPSE and FMPE of sbi.

    pip install --no-deps sbibm                          # observations and reference posteriors
    python experiments/interop/sbi_benchmark.py          # an interrupted run goes on
    python experiments/interop/sbi_benchmark.py --sizes 1000 --methods exact,ours,FMPE --observations 5    # 7 minutes
    python experiments/interop/sbi_benchmark.py --quick  # seconds, for CI

Each method trains one amortised network per task and number of simulations, on the same simulations, and samples the
posteriors of the benchmark's ten observations. The table has C2ST: the accuracy of a classifier that separates
1,000 samples of the posterior from 1,000 of the reference posterior. 0.5 is equal, 1 is disjoint. The classifier is the
multilayer perceptron of the benchmark as sbi ships it, with early stopping and five folds. Seconds are those of the
processor, all tasks together for training, and one posterior of each task for sampling.

The row "exact" has samples of exact posteriors that we derived for our own simulators. Its C2ST is 0.5 within the noise
if our simulators are those of the benchmark. Without the package sbibm the observations are our own, the references are
those exact samples, and the script says so.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _judging import from_command_line
from _sbi_tasks import TASKS, Task, installed, observations
from torch import Tensor, nn

import scoresde as ss
from scoresde.training import ProgressBar, Update, Validation

OUT = Path(__file__).parents[1] / "out" / "sbi_benchmark"


@dataclass
class Options:
    """Options of the command line."""

    tasks: str = ",".join(task.name for task in TASKS)
    sizes: str = "1000,10000"
    methods: str = "exact,ours,FMPE,NPSE"
    observations: int = 10
    samples: int = 1000
    nfe: int = 40
    steps: int = 3000
    patience: int = 4  # number of validations without a lower loss, after which the training stops
    every: int = 250
    batch: int = 256
    width: int = 128
    depth: int = 4
    epochs: int = 2**31 - 1  # of sbi, which stops by itself
    threads: int = 1
    quick: bool = False


QUICK = {
    "tasks": "two_moons",
    "sizes": "200",
    "methods": "exact,ours,FMPE",
    "observations": 1,
    "samples": 100,
    "nfe": 10,
    "steps": 4,
    "every": 2,
    "width": 16,
    "depth": 1,
    "epochs": 1,
}

OURS = ["nfe", "steps", "patience", "every", "batch", "width", "depth"]

Sampler = Callable[[Tensor, int], Tensor]


# Score matching with this library.


class Conditional(nn.Module):
    """A multilayer perceptron of parameters and an observation; the observation also modulates every block."""

    def __init__(self, parameters: int, observed: int, width: int, depth: int) -> None:
        super().__init__()
        self.mlp = ss.nn.MLP(
            parameters + observed, hidden=width, depth=depth, context=observed, out_features=parameters, seed=0
        )

    def forward(self, theta: Tensor, time: Tensor, *, x_o: Tensor) -> Tensor:
        x_o = x_o.expand(len(theta), -1)
        return self.mlp(torch.cat([theta, x_o], 1), time, context=x_o)


def ours(task: Task, theta: Tensor, x: Tensor, options: Options) -> Sampler:
    """A score network on standardised parameters and observations, the best weights by the held-out loss."""
    scales = [ss.data.Standardize.fit(values, "entry") for values in (theta, x)]
    z, context = (scale(values) for scale, values in zip(scales, (theta, x), strict=True))
    held = len(z) // 10
    net = Conditional(z.shape[1], context.shape[1], options.width, options.depth)
    model = ss.Denoiser(net, ss.EDM(T=20.0, t_min=1e-3), predicts="F", precondition=ss.Preconditioning(1.0))
    loss = ss.DSM(model, "edm", ss.training.times.LogNormalSigma(-1.2, 1.6))
    validation = Validation({"x": z[:held].repeat(8, 1), "x_o": context[:held].repeat(8, 1)}, options.every, 4096)
    trainer = ss.Trainer(
        loss,
        {"x": z[held:], "x_o": context[held:]},
        torch.optim.AdamW(loss.parameters(), 1e-3, weight_decay=1e-2),
        batch=options.batch,
        ema=ss.EMA(model, 0.995),
        update=Update(warmup=100, schedule=lambda step: max(0.02, 1 - step / options.steps)),
        hooks=[validation, ProgressBar(show=False)],
    )
    best, state, since = float("inf"), copy.deepcopy(trainer.ema_model), 0
    while since < options.patience and trainer.step < options.steps:
        value = trainer.fit(trainer.step + options.every)[-1]["validation"]
        since += 1
        if value < best:
            best, state, since = value, copy.deepcopy(trainer.ema_model), 0
    print(f"  {trainer.step} steps, held-out loss {best:.4f}", flush=True)

    def draw(x_o: Tensor, n: int) -> Tensor:
        given, rows, drawn = state.given(shared={"x_o": scales[1](x_o[None])}), 0, []
        while rows < n:
            z = ss.sample(given, (n, z_size), nfe=options.nfe, seed=len(drawn))
            theta = scales[0].inverse(z)
            drawn.append(theta[task.inside(theta)])
            rows += len(drawn[-1])
        return torch.cat(drawn)[:n]

    z_size = z.shape[1]
    return draw


# Score and flow matching with sbi, and the exact posterior.


def theirs(name: str, task: Task, theta: Tensor, x: Tensor, options: Options) -> Sampler:
    """NPSE or FMPE with the defaults of sbi."""
    import sbi.inference

    torch.manual_seed(0)
    inference = getattr(sbi.inference, name)(task.prior, show_progress_bars=False)
    estimator = inference.append_simulations(theta, x).train(max_num_epochs=options.epochs)
    posterior = inference.build_posterior(estimator)
    return lambda x_o, n: posterior.sample((n,), x=x_o, show_progress_bars=False)


def train(method: str, task: Task, theta: Tensor, x: Tensor, options: Options) -> Sampler:
    """The sampler of a method."""
    if method == "exact":
        generator = torch.Generator().manual_seed(5)
        return lambda x_o, n: task.posterior(x_o, n, generator)
    if method == "ours":
        return ours(task, theta, x, options)
    return theirs(method, task, theta, x, options)


def c2st(samples: Tensor, reference: Tensor) -> float:
    """Accuracy of the benchmark's classifier in five folds."""
    from sbi.utils.metrics import c2st as accuracy

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="sklearn")
        return float(accuracy(samples, reference, classifier="mlp"))


# The table.


def folder(options: Options) -> Path:
    """Folder of the results."""
    return OUT / "quick" if options.quick else OUT


def cell(method: str, task: Task, size: int, options: Options) -> dict[str, object]:
    """C2ST of each observation, and seconds of training and of one posterior; read from a file if it was measured."""
    path = folder(options) / f"{task.name}-{0 if method == 'exact' else size}-{method}.json"
    used = ["samples", *{"exact": [], "ours": OURS}.get(method, ["epochs"])]
    settings = {name: getattr(options, name) for name in used} | {"package": installed()}
    if path.exists():
        before = json.loads(path.read_text())
        if before["settings"] == settings and len(before["c2st"]) >= options.observations:
            return {**before, "c2st": before["c2st"][: options.observations]}
    theta, x = task.simulations(size, seed=TASKS.index(task))
    print(f"{task.name}, {size} simulations, {method}", flush=True)
    started = time.process_time()
    draw = train(method, task, theta, x, options)
    training, sampling, values = time.process_time() - started, 0.0, []
    generator = torch.Generator().manual_seed(11)
    for x_o, reference in observations(task, options.observations):
        if reference is None:
            reference = task.posterior(x_o, options.samples, generator)
        torch.manual_seed(1)
        started = time.process_time()
        samples = draw(x_o, options.samples)
        sampling += time.process_time() - started
        values.append(c2st(samples, reference[: options.samples]))
    result = {
        "settings": settings,
        "c2st": values,
        "training": training,
        "sampling": sampling / options.observations,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    print(f"  C2ST {statistics.mean(values):.3f}, training {training:.0f} s, a posterior {result['sampling']:.1f} s")
    return result


def main(options: Options) -> str:
    torch.set_num_threads(options.threads)
    if not installed():
        print("The package sbibm is not installed: observations and references are our own, not the benchmark's.")
    names, methods = options.tasks.split(","), options.methods.split(",")
    tasks = [task for task in TASKS if task.name in names]
    sizes = [int(size) for size in options.sizes.split(",")]
    cells = {
        (task.name, size, method): cell(method, task, size, options)
        for size in sizes
        for method in methods
        for task in tasks
    }
    lines = ["| simulations | method | " + " | ".join(task.name for task in tasks) + " | training (s) | sampling (s) |"]
    lines.append("|---:|---|" + "---:|" * (len(tasks) + 2))
    for size in sizes:
        for method in methods:
            row = [cells[task.name, size, method] for task in tasks]
            text = [average(one["c2st"]) for one in row]
            seconds = [f"{sum(one[key] for one in row):.1f}" for key in ("training", "sampling")]
            text += ["", ""] if method == "exact" else seconds
            lines.append(f"| {size} | {method} | {' | '.join(text)} |")
    table = "\n".join(lines)
    folder(options).mkdir(parents=True, exist_ok=True)
    (folder(options) / "table.md").write_text(table + "\n")
    print(table)
    if not options.quick:
        draw(folder(options) / "sbi_benchmark.png", cells, sizes, methods, tasks)
    return table


def average(values: list[float]) -> str:
    """Mean over the observations, with its standard error."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def draw(path: Path, cells: dict[tuple[str, int, str], dict], sizes: list[int], methods: list[str], tasks: list[Task]):
    """A point for each observation, in one panel for each number of simulations."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(sizes), figsize=(5.5 * len(sizes), 3.2), squeeze=False, layout="constrained")
    for axis, size in zip(axes[0], sizes, strict=True):
        for k, method in enumerate(methods):
            values = [(i + 0.15 * k, v) for i, task in enumerate(tasks) for v in cells[task.name, size, method]["c2st"]]
            axis.scatter(*zip(*values, strict=True), s=14, label=method)
        axis.axhline(0.5, color="0.7", lw=0.8)
        axis.set(title=f"{size} simulations", ylabel="C2ST", ylim=(0.45, 1.0))
        axis.set_xticks([i + 0.15 for i in range(len(tasks))], [task.name for task in tasks], fontsize=8)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


if __name__ == "__main__":
    main(from_command_line(Options, __doc__.splitlines()[0], QUICK))
