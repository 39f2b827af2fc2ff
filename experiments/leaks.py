"""Count what stays alive after many calls with many models, plans and trainers.

    python experiments/leaks.py               # 1,000 calls
    python experiments/leaks.py --calls 5000
    python experiments/leaks.py --quick       # seconds, for CI

Each call makes a new model and whatever belongs to it, uses it once and lets go of it. Afterwards no object of a call
may be alive, and Python's collector may not track more objects than before.

Measured with 1,001 calls, 143 of each kind: none of 3,718 objects was alive, and at most 2 more objects were tracked.
"""

from __future__ import annotations

import argparse
import gc
import resource
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import scoresde as ss


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        return self.linear(x)


def network() -> ss.Denoiser:
    return ss.Denoiser(Net(), ss.VP(), predicts="eps")


def sampled(k: int) -> list[Any]:
    model = network()
    plan = ss.UniPC(2).plan(model.sde, ss.grids.karras(model.sde, 2))
    run = ss.solve(model, (2, 2), plan, seed=k, watch=ss.Watch(save_at="all"))
    return [model, plan, run.x, run]


def guided(k: int) -> list[Any]:
    model = network()
    both = ss.ClassifierFree(model, 2.0, null={"label": 0}).given(label=torch.ones(2))
    return [model, both, ss.sample(both, (2, 2), steps=2, seed=k), ss.encode(model, torch.zeros(2, 2), steps=2)]


def controlled(k: int) -> list[Any]:
    model = network()
    return [model, ss.sample(model, (2, 2), ss.Adaptive(rtol=0.3, atol=0.3), seed=k)]


def stochastic(k: int) -> list[Any]:
    model, noise = network(), ss.Noise(k, path=True)
    return [model, noise, ss.sample(model, (2, 2), ss.SDEDPMSolverPP(order=2), steps=6, seed=noise)]


def exact(k: int) -> list[Any]:
    truth = ss.GaussianMixture(ss.VP(), torch.randn(3, 2), std=0.5)
    return [truth, ss.elbo(truth, torch.zeros(2, 2)), truth.sample(2, seed=k)]


def averaged(k: int) -> list[Any]:
    model = network()
    loss, ema = ss.DSM(model), ss.EMA(model, 0.9)
    optimiser = torch.optim.Adam(loss.parameters())
    loss(torch.randn(4, 2)).backward()
    optimiser.step()
    ema.update()
    return [model, loss, ema, optimiser]


def trained(k: int) -> list[Any]:
    model = network()
    hooks = [ss.training.Validation(torch.randn(4, 2), every=1), ss.training.ProgressBar(False)]
    trainer = ss.Trainer(ss.DSM(model), torch.randn(8, 2), batch=4, hooks=hooks)
    trainer.fit(1)
    return [model, trainer, trainer.loss, trainer.ema, trainer.ema_model, next(model.parameters())]


CALLS: dict[str, Callable[[int], list[Any]]] = {
    "sample": sampled,
    "guidance and encoding": guided,
    "error control": controlled,
    "Brownian paths": stochastic,
    "exact answers": exact,
    "loss and average": averaged,
    "trainer": trained,
}


def measure(make: Callable[[int], list[Any]], calls: int) -> tuple[int, list[str], int]:
    """Number of objects of all calls, the classes of those that are alive, and the growth of tracked objects."""
    for k in range(2):
        make(k)  # imports, and caches of a first call
    gc.collect()
    before = len(gc.get_objects())
    made: list[weakref.ref[Any]] = []
    for k in range(calls):
        made.extend([weakref.ref(thing) for thing in make(k)])
    gc.collect()
    alive = [type(thing).__name__ for ref in made if (thing := ref()) is not None]
    return len(made), alive, len(gc.get_objects()) - before - len(made)


def main(calls: int) -> None:
    torch.set_num_threads(1)
    failed = False
    for name, make in CALLS.items():
        n = calls // len(CALLS) + 1
        made, alive, growth = measure(make, n)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{name}: {n} calls, {len(alive)} of {made} objects alive, {growth} more tracked, {memory:.0f} MB at most"
        )
        failed |= bool(alive) or growth > max(20, n // 10)
    if failed:
        sys.exit("objects stay alive")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="35 calls, for CI")
    options = parser.parse_args()
    main(35 if options.quick else options.calls)
