"""Ratios of CPU times of two checkouts of the library, for ``loop_overhead.py --against PATH``.

Each checkout has a process of its own, which imports the library and ``experiments/loop_overhead.py`` of that checkout
and runs one loop at a time on request. Requests alternate between the two processes, so that both run under the same
load of the machine.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

LOOPS = ("by hand", "plan.run", "plan.run, overwrite", "ss.solve")


# In the process of a checkout.


def load(checkout: Path) -> ModuleType:
    """The module ``loop_overhead`` of a checkout."""
    spec = importlib.util.spec_from_file_location("loop_overhead", checkout / "experiments" / "loop_overhead.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look up their module
    spec.loader.exec_module(script)
    return script


def loops_of(script: ModuleType, rows: int) -> dict[str, Callable[[], Any]]:
    """Loops to time, by name; the same names in every version of the library."""
    out: dict[str, Callable[[], Any]] = {}
    race, states = script.race, script.STATES
    try:
        script.race = lambda loops, *_: loops  # return the loops without timing them
        for shape in states:
            script.STATES = (shape,)
            for net, make in (("", script.time_loops), ("Denoiser, ", script.time_denoiser)):
                for state, solver, who, loop in make(script.Options()):
                    if who in LOOPS:
                        out[f"{state}, {net}{solver}, {who}"] = loop
    finally:
        script.race, script.STATES = race, states
    for shape in states:
        out |= {f"{shape}, {name}": loop for name, loop in runs(script, shape).items()}
    return out | {f"{rows} rows, {name}": loop for name, loop in tables(rows).items()}


def runs(script: ModuleType, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """Stochastic loops, whole runs and densities of one shape."""
    import torch

    import scoresde as ss
    from scoresde.plan import run

    x, d = torch.randn(shape), torch.randn(shape) / 100
    sde = ss.VP()
    free = script.Free(sde, lambda x, t: d)
    grid = ss.grids.karras(sde, 20)
    out: dict[str, Callable[[], Any]] = {
        "default solver, ss.solve": lambda: ss.solve(free, shape, nfe=10, seed=0),
        "Adaptive, ss.solve": lambda: ss.solve(free, x, ss.Adaptive(), seed=0),
    }
    for name, solver in {"SDE-DPM-Solver++ 2M": ss.SDEDPMSolverPP(2), "Euler–Maruyama": ss.EulerMaruyama()}.items():
        plan = solver.plan(sde, grid)
        out |= {
            f"{name}, plan.run": lambda plan=plan: run(plan, free.x0, x, ss.Noise(0)),
            f"{name}, ss.solve": lambda plan=plan: ss.solve(free, x, plan, seed=0),
        }
    if len(shape) == 2:
        plan = ss.EulerMaruyama().plan(sde, grid)
        mix = ss.GaussianMixture(sde, torch.eye(shape[1]).double(), std=0.3)
        data = mix.sample(16, seed=0)
        out |= {
            "Euler–Maruyama, one path, plan.run": lambda: run(plan, free.x0, x, ss.Noise(0, path=True)),
            "log_prob of a mixture": lambda: ss.log_prob(mix, data),
            "x0 of a mixture": lambda: mix.x0(data, 0.5),
        }
    return out


def tables(rows: int) -> dict[str, Callable[[], Any]]:
    """Computations of tables."""
    import scoresde as ss

    sde, edm = ss.VP(), ss.EDM()
    solvers = {
        "DDIM": ss.DDIM(),
        "DPM-Solver++ 2M": ss.DPMSolverPP(2),
        "UniPC-3": ss.UniPC(3),
        "VelocityAB-3": ss.VelocityAB(3),
        "SDE-DPM-Solver++ 2M": ss.SDEDPMSolverPP(2),
    }
    out: dict[str, Callable[[], Any]] = {
        f"table of {name}": lambda solver=solver: solver.plan(sde, ss.grids.uniform_t(sde, rows))
        for name, solver in solvers.items()
    }
    return {**out, "table of EDM Heun": lambda: ss.EDMHeun().plan(edm, ss.grids.karras(edm, rows // 2))}


def serve(checkout: Path, rows: int) -> None:
    """Answer lines "index count" with the CPU seconds of `count` runs of a loop; first write the names of all loops."""
    import torch

    import scoresde as ss

    assert ss.__file__ is not None and Path(ss.__file__).resolve().is_relative_to(checkout), ss.__file__
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    loops = loops_of(load(checkout), rows)
    for loop in loops.values():
        loop()
    print(json.dumps(list(loops)), flush=True)
    calls = list(loops.values())
    for line in sys.stdin:
        index, count = map(int, line.split())
        start = time.process_time()
        for _ in range(count):
            calls[index]()
        print(time.process_time() - start, flush=True)


# In the process that compares.


class Checkout:
    """Process of a checkout.

    Arguments:
        path: Root of the checkout.
        rows: Number of rows of the tables.
    """

    def __init__(self, path: Path, rows: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(path), str(rows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.names: list[str] = []

    def __enter__(self) -> Checkout:
        self.names = json.loads(self.answer())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of a checkout ended with code {self.process.wait()}.")
        return line

    def time(self, name: str, count: int) -> float:
        """CPU seconds of one run of a loop, as the mean over `count` runs."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{self.names.index(name)} {count}\n")
        self.process.stdin.flush()
        return float(self.answer()) / count


def compare(before: Path, *, pairs: int, rounds: int, seconds: float, rows: int) -> str:
    """Table of the ratios of CPU times, this checkout divided by another one.

    Arguments:
        before: Root of the other checkout.
        pairs: Number of pairs of processes, because two processes of one checkout differ by some percent.
        rounds: Number of rounds, over all pairs.
        seconds: CPU time of each loop in each round.
        rows: Number of rows of the tables.
    """
    after = Path(__file__).resolve().parents[1]
    ratios: dict[str, list[list[float]]] = defaultdict(list)
    micro: dict[str, list[float]] = defaultdict(list)
    for _ in range(pairs):
        with Checkout(before.resolve(), rows) as old, Checkout(after, rows) as new:
            names = [name for name in new.names if name in old.names]
            counts = {name: max(1, round(seconds / max(1e-7, old.time(name, 2)))) for name in names}
            for name in names:
                ratios[name].append([])
            for k in range(max(1, rounds // pairs)):
                for name in names:
                    both = {who: who.time(name, counts[name]) for who in ((old, new) if k % 2 else (new, old))}
                    ratios[name][-1].append(both[new] / both[old])
                    micro[name].append(1e6 * both[new])
    width = max(map(len, ratios))
    lines = [
        f"CPU time of this checkout / that of {before}; {rounds} rounds in {pairs} pairs of processes.",
        "Ratio: median over all rounds. Pairs: smallest and largest median of a pair of processes.",
        "",
        f"{'loop':{width}} {'CPU µs':>10} {'ratio':>6}   pairs",
    ]
    for name, of in ratios.items():
        ratio = statistics.median(r for pair in of for r in pair)
        medians = sorted(map(statistics.median, of))
        numbers = f"{statistics.median(micro[name]):10.1f} {ratio:6.3f}   {medians[0]:.3f} … {medians[-1]:.3f}"
        lines.append(f"{name:{width}} {numbers}")
    return "\n".join(lines)


if __name__ == "__main__":
    serve(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
