"""Cost of the method TorchSDE and of our own loop, compared with torchsde called by hand.

    python experiments/torchsde_cost.py
    python experiments/torchsde_cost.py --quick    # seconds, for CI

A network of no cost predicts the data under VP; a run is 100 steps of the reverse SDE. "By hand" is the fastest call of
torchsde that we know: flat states, float64 times, an interval made with `dt`, and drift and diffusion with all
coefficients in Python floats. Rounds are interleaved, and the table shows the median of the ratios of CPU times within
a round. Further rows measure the same number of steps of the first-order SDE solver in our own loop, with fresh noise
and on one Brownian path; a keyed draw against ``torch.randn``; and our Brownian paths against the Brownian tree of
k-diffusion, which is one path only while its interval and its tolerance stay the same.

Measured with --rounds 7 on two cores beside other jobs, CPU time divided by that of torchsde by hand. State
(16, 3, 32, 32): TorchSDE 1.1 (euler) and 1.0 (srk), our loop 0.6, on one path 6.7. State (32, 64): TorchSDE 1.1 and
1.2, our loop 0.25, on one path 8.8. A keyed draw takes 2.5 times as long as torch.randn for the first state and 17
times for the second, 0.2 ms; the loop therefore draws the noise of small states ahead. A step of one path takes 0.65
and 0.95 times as long as with the tree.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde as ss
from scoresde.integrators import TorchSDE
from scoresde.plan import run
from scoresde.solvers.multistep import Multistep

VP = ss.VP()
STATES = ((32, 64), (16, 3, 32, 32))


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 100
    rounds: int = 15
    threads: int = 1
    out: Path = Path(__file__).parent / "out"


class Free(ss.denoisers.AbstractDenoiser):
    """A denoiser of no cost."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__(VP)
        self.d = torch.zeros(shape)

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        return self.d


def by_hand(x: Tensor, method: str, steps: int) -> Callable[[], Tensor]:
    """torchsde on s = T − t: dx = (β/2 x + β score) ds + √β dw with score = (α d − x)/σ²."""
    import torchsde

    T, end = VP.T, VP.t_min
    beta0, slope = VP.beta_min, VP.beta_max - VP.beta_min
    d = torch.zeros_like(x).flatten(1)

    class Problem:
        sde_type, noise_type = "ito", "additive"

        def f(self, s: Tensor, y: Tensor) -> Tensor:
            t = T - float(s)
            beta, B = beta0 + slope * t, beta0 * t + slope * t * t / 2
            alpha, var = math.exp(-B / 2), -math.expm1(-B)
            return (y * (beta / 2 - beta / var)).add_(d, alpha=beta * alpha / var)

        def g_prod(self, s: Tensor, y: Tensor, v: Tensor) -> Tensor:
            return v * math.sqrt(beta0 + slope * (T - float(s)))

    def go() -> Tensor:
        span, y = T - end, x.flatten(1)
        bm = torchsde.BrownianInterval(
            0.0,
            span,
            size=tuple(y.shape),
            dtype=y.dtype,
            device=y.device,
            dt=span / steps,
            levy_area_approximation="space-time" if method == "srk" else "none",
            entropy=0,
        )
        ts = torch.tensor([0.0, span], dtype=torch.float64)
        out: Tensor = torchsde.sdeint(Problem(), y, ts, bm=bm, method=method, dt=span / steps * (1 + 1e-12))
        return out[-1].reshape(x.shape)

    return go


def tree(x: Tensor) -> Any:
    """Brownian path of k-diffusion's samplers."""
    import torchsde

    return torchsde.BrownianTree(t0=0.0, w0=torch.zeros_like(x), t1=1.0, entropy=0, tol=1e-6)


def path(shape: tuple[int, ...]) -> ss.noise.BrownianPath:
    """Our Brownian path, of the same depth as those of plans."""
    return ss.noise.BrownianPath(ss.Noise(0), shape, depth=12)


def race(loops: dict[str, Callable[[], Any]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median CPU milliseconds of each loop, and median of its ratios to the first loop within rounds."""
    spent: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop()
    for _ in range(rounds):
        for name, loop in loops.items():
            start = time.process_time()
            loop()
            spent[name].append(time.process_time() - start)
    first = next(iter(loops))
    return {
        name: (
            1e3 * statistics.median(spent[name]),
            statistics.median(a / b for a, b in zip(spent[name], spent[first], strict=True)),
        )
        for name in loops
    }


def main(options: Options) -> Path:
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    lines = [f"{options.steps} steps, {options.threads} thread(s); CPU ms of a run, ratio to the first of its block"]
    for shape in STATES:
        x, model, steps = ss.Noise(0).normal(shape, 0), Free(shape), options.steps
        grid = ss.grids.uniform_t(VP, steps, t_end=VP.t_min)
        plan = Multistep(1, eta=1.0).plan(VP, grid)
        for method in ("euler", "srk"):
            loops: dict[str, Callable[[], Any]] = {
                "torchsde by hand": by_hand(x, method, steps),
                "TorchSDE": lambda x=x, model=model, method=method: ss.solve(
                    model, x, TorchSDE(method, steps=options.steps), seed=0, t_end=VP.t_min
                ),
            }
            if method == "euler":
                loops["our loop"] = lambda x=x, model=model, plan=plan: run(plan, model.x0, x, ss.Noise(0))
                loops["our loop, one path"] = lambda x=x, model=model, plan=plan: run(
                    plan, model.x0, x, ss.Noise(0, path=True)
                )
            lines += ["", f"state {shape}, {method}"]
            lines += [f"  {who:22} {ms:10.2f} {ratio:8.2f}" for who, (ms, ratio) in race(loops, options.rounds).items()]
        draws = {
            "torch.randn": lambda shape=shape: [torch.randn(shape) for _ in range(20)],
            "Noise.normal": lambda shape=shape: [ss.Noise(0).normal(shape, k) for k in range(20)],
        }
        lines += ["", f"state {shape}, 20 draws"]
        lines += [f"  {who:22} {ms:10.2f} {ratio:8.2f}" for who, (ms, ratio) in race(draws, options.rounds).items()]
        spans = [(k / 100, (k + 1) / 100) for k in range(1, 100)]
        paths = {
            "torchsde.BrownianTree": lambda spans=spans, x=x: [w(a, b) for w in [tree(x)] for a, b in spans],
            "BrownianPath": lambda spans=spans, shape=shape: [w.normal(a, b) for w in [path(shape)] for a, b in spans],
        }
        lines += ["", f"state {shape}, {len(spans)} steps of one path"]
        lines += [f"  {who:22} {ms:10.2f} {ratio:8.2f}" for who, (ms, ratio) in race(paths, options.rounds).items()]
    text = "\n".join(lines)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    page = options.out / "torchsde_cost.txt"
    page.write_text(text + "\n")
    return page


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few rounds, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(rounds=2, steps=10)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
