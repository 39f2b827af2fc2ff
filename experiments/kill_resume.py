"""Kill a training run with SIGKILL at random times; it must always resume, and end as the undisturbed run ends.

    python experiments/kill_resume.py               # 20 kills
    python experiments/kill_resume.py --kills 200
    python experiments/kill_resume.py --quick       # seconds, for CI

Each run is a separate process, forked from this one. It saves after every second step, so that many kills happen while
a checkpoint is written. After each kill every file with a checkpoint's name must load. At the end weights, average,
optimiser, times and generators must equal those of the undisturbed run, to the bit.

Measured on two busy cores, 24 s: after 19 of 20 kills there was a checkpoint to resume from (the first came too early),
and 7 kills interrupted a write; no checkpoint was damaged, and the result was equal in every part.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde.training import Checkpoints, ProgressBar, Trainer, Update, times

STEPS = 120


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 256), nn.SiLU(), nn.Dropout(0.1), nn.Linear(256, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layers(torch.cat([x, t[:, None]], dim=1))


def trainer(folder: Path, init: int) -> Trainer:
    random.seed(init)  # a fork has seeded it from the system
    torch.manual_seed(init)  # a resumed run starts with other weights and generators, which `resume` must replace
    model = ss.Denoiser(Net(), ss.VP(), predicts="eps")
    loss = ss.DSM(model, proposal=times.Stratified(times.LossAware(bins=8)))
    data = ss.Noise(0).normal((500, 2), 0)
    hooks = [Checkpoints(folder, every=2, keep=2), ProgressBar(False)]
    return Trainer(loss, data, batch=32, ema=0.99, update=Update(warmup=10), hooks=hooks)


def run(folder: Path, init: int) -> None:
    """Resume and train to the end."""
    one = trainer(folder, init)
    one.resume()
    one.fit(STEPS)


def forked(folder: Path, init: int) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run(folder, init)
            code = 0
        finally:
            os._exit(code)
    return pid


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main(kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    draw = random.Random(seed)
    resumed = temporary = finished = 0
    with tempfile.TemporaryDirectory() as name:
        trainer(Path(name) / "none", 0)  # imports accelerate, once for all forks
        quiet, killed = Path(name) / "quiet", Path(name) / "killed"
        start = time.perf_counter()
        pid = forked(quiet, 1)
        while not Checkpoints(quiet).steps():
            time.sleep(0.005)
        begun = time.perf_counter() - start
        assert os.waitpid(pid, 0)[1] == 0
        whole = time.perf_counter() - start
        for k in range(kills):
            saved = Checkpoints(killed).latest() is not None  # a damaged file gives a warning, which is an error here
            resumed += saved
            pid = forked(killed, 100 + k if saved else 1)
            time.sleep(begun * draw.uniform(0.6, 1.2) + (whole - begun) * draw.uniform(0, 1.5 / kills))
            os.kill(pid, signal.SIGKILL)
            finished += os.waitpid(pid, 0)[1] == 0
            temporary += len(list(killed.glob(".*.tmp"))) > 0
        reached = max(Checkpoints(killed).steps(), default=0)
        assert os.waitpid(forked(killed, 999), 0)[1] == 0, "the last run did not reach the end"
        a, b = (Checkpoints(folder).latest() for folder in (quiet, killed))
        assert a is not None and b is not None and a[0] == b[0] == STEPS
        equal = {part: same(a[1][part], b[1][part]) for part in a[1]}
    print(
        f"{kills} kills: {resumed} with a checkpoint to resume from, {temporary} interrupted a write, {finished} after "
        f"the end; step {reached} of {STEPS} was reached before the last start"
    )
    print("equal to the undisturbed run, to the bit: " + ", ".join(f"{part} {ok}" for part, ok in equal.items()))
    if not all(equal.values()):
        sys.exit("the runs differ")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="5 kills, for CI")
    options = parser.parse_args()
    main(5 if options.quick else options.kills, options.seed)
