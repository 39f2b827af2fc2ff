"""Cost of the loop that runs every table, compared with loops written by hand.

    python experiments/loop_overhead.py
    python experiments/loop_overhead.py --quick           # seconds, for CI
    python experiments/loop_overhead.py --against PATH    # compared with another checkout of the library

A table that runs every sampler must not be slower than a sampler written by hand. With a network of no cost, the script
times one step of our loop (``plan.run``), of ``ss.solve`` around it, and of the same arithmetic by hand: a Python loop
for one solver, with all coefficients precomputed as floats, and in place where possible. If diffusers and torchdiffeq
are installed, it also times diffusers' schedulers and torchdiffeq's Euler. Rounds are interleaved, and the table shows
the median of the ratios of CPU times within each round, so that other processes on the machine disturb all loops alike.

The script then times the same loops with a network inside :class:`ss.Denoiser`, which converts noise to data; counts
the states that are alive at each network call, and their maximum; and times the computation of a table of 1000 rows.

``--against`` runs the loops of this checkout and those of another one in two processes, in turn, and writes the ratios
of their CPU times. The rows "by hand" do not use the library, so they show the error of the measurement.

The script writes a table and a figure. Measured with --rounds 25 on two cores, of which one had other work, CPU time
divided by that of the loop by hand. State (16, 3, 32, 32): DDIM 1.4, DPM-Solver++ 2M 1.3, UniPC-3 1.1, EDM Heun 1.2,
DPM-Solver-3 1.2, VelocityAB-3 1.1; with ``overwrite=True`` 1.0, 1.0, 0.9, 1.0, 1.1, 0.9; diffusers' schedulers 13, 17,
17, 7, 5. State (1, 4): 1.2, 1.1, 0.9, 1.5, 1.0, 0.9.

With a network that predicts noise in a ``Denoiser``, ``plan.run`` against the loop by hand, in the same run. State
(16, 3, 32, 32): DDIM 1.0, DPM-Solver++ 2M 1.2, UniPC-3 1.2, DPM-Solver-3 0.8, VelocityAB-3 1.0. State (1, 4): 1.4, 1.5,
1.2, 1.0, 1.2. DPM-Solver-3 predicts noise too, so its rows need no conversion, which the loop by hand
makes.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import scoresde as ss
from scoresde.plan import run

Net = Callable[[Tensor, Any], Tensor]
Loop = Callable[[Net, Tensor], Tensor]
STATES = ((16, 3, 32, 32), (1, 4))
VP, EDM = ss.VP(), ss.EDM()
SOLVERS: dict[str, tuple[ss.SDE, ss.solvers.Solver]] = {
    "DDIM": (VP, ss.DDIM()),
    "DPM-Solver++ 2M": (VP, ss.DPMSolverPP(2)),
    "UniPC-3": (VP, ss.UniPC(3)),
    "EDM Heun": (EDM, ss.EDMHeun()),
    "DPM-Solver-3": (VP, ss.solvers.DPMSolver(3)),
    "VelocityAB-3": (VP, ss.VelocityAB(3)),
}


@dataclass
class Options:
    """Options of the command line."""

    steps: int = 20
    rounds: int = 60
    seconds: float = 0.004  # CPU time of each loop in each round
    rows: int = 1000  # number of rows of the tables that are timed
    threads: int = 1
    against: str = ""
    pairs: int = 4  # pairs of processes that share the rounds of `against`
    out: Path = Path(__file__).parent / "out"


# Loops by hand: coefficients are computed once, so that a loop contains only the arithmetic of its steps.


def by_hand(name: str, sde: ss.SDE, plan: ss.Plan) -> Loop:
    t = [float(u) for u in plan.times]
    alpha, sigma = [sde.alpha(u) for u in t], [sde.sigma(u) for u in t]
    steps = range(len(t) - 2)  # the last step ends at σ = 0 and returns the denoised state
    if name == "DDIM":
        a = [sigma[i + 1] / sigma[i] for i in steps]
        table = [(t[i], a[i], alpha[i + 1] - a[i] * alpha[i]) for i in steps]

        def ddim(net: Net, x: Tensor) -> Tensor:
            for s, a, b in table:
                d = net(x, s)
                x.mul_(a).add_(d, alpha=b)
                del d
            return net(x, t[-2])

        return ddim
    if name == "DPM-Solver++ 2M":
        lam = [sde.lam(u) for u in t[:-1]]
        rows = []
        for i in steps:
            h = lam[i + 1] - lam[i]
            full = -alpha[i + 1] * math.expm1(-h)
            back = 0.0 if i == 0 else full * h / (2 * (lam[i] - lam[i - 1]))
            rows.append((t[i], sigma[i + 1] / sigma[i], full + back, -back))

        def two_m(net: Net, x: Tensor) -> Tensor:
            s, a, b, _ = rows[0]
            last = net(x, s)
            x.mul_(a).add_(last, alpha=b)
            for s, a, b, c in rows[1:]:
                d = net(x, s)
                x.mul_(a).add_(d, alpha=b).add_(last, alpha=c)
                last = d
            return net(x, t[-2])

        return two_m
    if name == "UniPC-3":
        # The weights are the solution of a small system; taken from the table, they are floats like any other.
        weights = [[w for _, w in (*row.x, *row.d)] for row in plan.rows[1:-1]]
        pairs = list(zip(t[1:-1], weights[::2], weights[1::2], strict=True))

        def unipc(net: Net, x: Tensor) -> Tensor:
            history = [net(x, t[0])]
            for s, predict, correct in pairs:
                y = x * predict[0]
                for w, d in zip(predict[1:], history, strict=False):
                    y.add_(d, alpha=w)
                d = net(y, s)
                x.mul_(correct[0]).add_(d, alpha=correct[1])
                for w, old in zip(correct[2:], history, strict=False):
                    x.add_(old, alpha=w)
                history = [d, *history[:2]]
                del y
            return net(x, t[-2])

        return unipc
    if name == "EDM Heun":
        table = [(t[i], t[i + 1], 1 - t[i + 1] / t[i], (t[i + 1] - t[i]) / (2 * t[i + 1])) for i in steps]

        def heun(net: Net, x: Tensor) -> Tensor:
            # x + (t − s)/2 ((x − d)/s + (y − e)/t), where the Euler step y lies on the line through x and d.
            for s, end, w, half in table:
                d = net(x, s)
                y = torch.lerp(x, d, w)
                e = net(y, end)
                x.lerp_(d, w / 2).add_(y, alpha=half).sub_(e, alpha=half)
                del d, e, y
            return net(x, t[-2])

        return heun
    if name == "DPM-Solver-3":
        # In terms of data: the noise of three stages costs three passes more.
        triples = []
        for k in range(1, len(plan.rows) - 1, 3):
            rows = plan.rows[k : k + 3]
            times = [plan.rows[k - 1].t, rows[0].t, rows[1].t]
            triples.append((times, [w for row in rows for _, w in (*row.x, *row.d)]))

        def three(net: Net, x: Tensor) -> Tensor:
            for (s, s1, s2), (a, b, c0, c1, d0, d1, e0, e2, f0, f2) in triples:
                d = net(x, s)
                y = (x * a).add_(d, alpha=b)
                e = net(y, s1)
                y.mul_(c1).add_(x, alpha=c0).add_(d, alpha=d0).add_(e, alpha=d1)
                e = net(y, s2)
                x.mul_(e0).add_(y, alpha=e2).add_(d, alpha=f0).add_(e, alpha=f2)
                del d, e, y
            return net(x, t[-2])

        return three
    # Adams–Bashforth on f = σ (ε − d) = x − (α + σ) d; its 1/σ goes into the weights.
    n = len(t) - 1
    N = [a + s for a, s in zip(alpha, sigma, strict=True)]
    weights = [[-w / N[k] for k, w in row.d] for row in plan.rows[1:]]
    table = [(t[i], -N[i], N[i + 1] / N[i], weights[i]) for i in range(n)]

    def adams(net: Net, x: Tensor) -> Tensor:
        history: list[Tensor] = []
        for s, q, keep, ws in table:
            history = [torch.add(x, net(x, s), alpha=q), *history[:2]]
            x.mul_(keep)
            for w, f in zip(ws, history, strict=True):
                x.add_(f, alpha=w)
        return x

    return adams


# Other libraries.


def diffusers_loops(steps: int) -> dict[str, Loop]:
    try:
        import diffusers
    except ImportError:
        return {}
    warnings.filterwarnings("ignore", module="diffusers")
    makers = {
        "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
        "DPM-Solver++ 2M": lambda: diffusers.DPMSolverMultistepScheduler(),
        "UniPC-3": lambda: diffusers.UniPCMultistepScheduler(solver_order=3),
        "EDM Heun": lambda: diffusers.HeunDiscreteScheduler(),
        "DPM-Solver-3": lambda: diffusers.DPMSolverSinglestepScheduler(solver_order=3, algorithm_type="dpmsolver++"),
    }

    def loop(make: Callable[[], Any]) -> Loop:
        scheduler = make()
        scheduler.set_timesteps(steps)

        def go(net: Net, x: Tensor) -> Tensor:
            scheduler.set_timesteps(steps)
            for t in scheduler.timesteps:
                x = scheduler.step(net(x, t), t, x).prev_sample
            return x

        return go

    return {name: loop(make) for name, make in makers.items()}


def torchdiffeq_euler(steps: int) -> Loop:
    from torchdiffeq import odeint

    times = torch.linspace(1.0, 0.0, steps + 1)
    return lambda net, x: odeint(lambda t, y: net(y, t), x, times, method="euler")[-1]


# Times.


@dataclass
class Timing:
    """Median CPU microseconds of a step, and medians over rounds of the ratios to the first loop."""

    micro: float
    cpu: float
    wall: float


def race(loops: dict[str, Callable[[], Any]], steps: int, options: Options) -> dict[str, Timing]:
    """Time loops in turn, round after round; the ratios are those to the first loop of the same round."""
    counts = {}
    for name, loop in loops.items():
        loop()
        start = time.process_time()
        loop()
        counts[name] = max(1, round(options.seconds / max(1e-6, time.process_time() - start)))
    cpu: dict[str, list[float]] = {name: [] for name in loops}
    wall: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, loop in loops.items():
            c, w = time.process_time(), time.perf_counter()
            for _ in range(counts[name]):
                loop()
            cpu[name].append((time.process_time() - c) / counts[name])
            wall[name].append((time.perf_counter() - w) / counts[name])
    first = next(iter(loops))

    def ratio(of: dict[str, list[float]], name: str) -> float:
        return statistics.median(a / b for a, b in zip(of[name], of[first], strict=True))

    return {n: Timing(1e6 * statistics.median(cpu[n]) / steps, ratio(cpu, n), ratio(wall, n)) for n in loops}


def time_loops(options: Options) -> list[tuple[str, str, str, Timing]]:
    out = []
    peers = diffusers_loops(options.steps)
    for shape in STATES:
        x = torch.randn(shape)
        d = torch.randn(shape) / 100  # small, because loops in place are run many times

        def free(x: Tensor, t: Any, d: Tensor = d) -> Tensor:
            return d

        for name, (sde, solver) in SOLVERS.items():
            plan = solver.plan(sde, ss.grids.karras(sde, options.steps))
            hand = by_hand(name, sde, plan)
            gap = (hand(free, x.clone()) - run(plan, free, x)).abs().max() / x.abs().max()
            assert gap < 1e-3, (name, gap)
            model = Free(sde, free)
            loops = {
                "by hand": lambda hand=hand, x=x: hand(free, x.clone()),
                "plan.run": lambda plan=plan, x=x: run(plan, free, x),
                "plan.run, overwrite": lambda plan=plan, x=x: run(plan, free, x, overwrite=True),
                "ss.solve": lambda plan=plan, x=x, model=model: ss.solve(model, x, plan, seed=0),
            }
            if name in peers:
                loops["diffusers"] = lambda go=peers[name], x=x: go(free, x)
            if name == "DDIM":
                euler = torchdiffeq_euler(options.steps)
                loops["torchdiffeq Euler"] = lambda x=x, go=euler: go(free, x)
            out += [(str(shape), name, who, t) for who, t in race(loops, options.steps, options).items()]
    return out


def time_denoiser(options: Options) -> list[tuple[str, str, str, Timing]]:
    """Time loops whose network predicts noise; by hand the conversion uses floats, and labels are precomputed."""
    out = []
    for shape in STATES:
        x = torch.randn(shape) / 10
        model = ss.Denoiser(lambda x, t: x, VP, predicts="eps")
        for name, (sde, solver) in SOLVERS.items():
            if sde is not VP:
                continue
            plan = solver.plan(VP, ss.grids.karras(VP, options.steps))
            hand = by_hand(name, VP, plan)
            floats = {}
            for row in plan.rows:
                if row.evaluates:
                    a, s, t = VP.alpha(row.t), VP.sigma(row.t), float(row.t)
                    floats[t] = (1 / a, -s / a, torch.full((len(x),), t))

            def data(x: Tensor, t: float, floats: dict = floats, net: Any = model.net) -> Tensor:
                of_x, of_out, label = floats[t]
                return (x * of_x).add_(net(x, label), alpha=of_out)

            gap = (hand(data, x.clone()) - run(plan, model.x0, x)).abs().max() / x.abs().max()
            assert gap < 1e-3, (name, gap)
            loops = {
                "by hand": lambda hand=hand, x=x, data=data: hand(data, x.clone()),
                "plan.run": lambda plan=plan, x=x, model=model: run(plan, model.x0, x),
                "ss.solve": lambda plan=plan, x=x, model=model: ss.solve(model, x, plan, seed=0),
            }
            out += [(str(shape), name, who, t) for who, t in race(loops, options.steps, options).items()]
    return out


class Free(ss.denoisers.AbstractDenoiser):
    """A denoiser of no cost."""

    def __init__(self, sde: ss.SDE, net: Net) -> None:
        super().__init__(sde)
        self.net = net

    def x0(self, x: Tensor, t: Any, **cond: Any) -> Tensor:
        return self.net(x, t)


# Memory.


class Alive(TorchDispatchMode):
    """Count the storages of tensors of one size that are alive after every operation."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.largest, self.refs = numel, 0, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.numel() == self.numel:
            self.refs.append(weakref.ref(out))
            self.largest = max(self.largest, self.now())
        return out

    def now(self) -> int:
        self.refs = [ref for ref in self.refs if ref() is not None]
        return len({x.data_ptr() for ref in self.refs if (x := ref()) is not None})


def count_states(options: Options) -> list[tuple[str, str, int, int]]:
    """Number of states alive when the network is called, with its input, and their maximum at any time."""
    out = []
    for name, (sde, solver) in SOLVERS.items():
        plan = solver.plan(sde, ss.grids.karras(sde, options.steps))
        hand = by_hand(name, sde, plan)
        # Each way is one expression, so that no variable of this function refers to the initial state.
        ways: dict[str, Callable[[Net], Any]] = {
            "by hand": lambda net, hand=hand: hand(net, torch.ones(2, 3)),
            "plan.run": lambda net, plan=plan: run(plan, net, torch.ones(2, 3)),
            "plan.run, overwrite": lambda net, plan=plan: run(plan, net, torch.ones(2, 3), overwrite=True),
            "ss.solve": lambda net, plan=plan, sde=sde: ss.solve(Free(sde, net), (2, 3), plan, seed=0),
        }
        for who, go in ways.items():
            with Alive(6) as alive:
                calls: list[int] = []

                def net(x: Tensor, t: Any, calls: list[int] = calls, alive: Alive = alive) -> Tensor:
                    calls.append(alive.now())
                    return torch.zeros(2, 3)

                go(net)
            out.append((name, who, max(calls), alive.largest))
    return out


# Tables.


def time_plans(options: Options) -> list[tuple[str, int, float]]:
    grid, out = ss.grids.uniform_t(VP, options.rows), []
    for name, (_, solver) in SOLVERS.items():
        steps = options.rows // solver.stages
        spent = []
        for _ in range(5):
            start = time.process_time()
            plan = solver.plan(VP, grid[:: solver.stages] if solver.stages > 1 else grid)
            spent.append(time.process_time() - start)
        out.append((f"{name}, {steps} steps", len(plan), 1e3 * statistics.median(spent)))
    return out


def main(options: Options) -> Path:
    options.out.mkdir(parents=True, exist_ok=True)
    if options.against:
        return against(options)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    lines = [f"time of one step, {options.steps} steps, {options.threads} thread(s); ratios to the loop by hand", ""]
    head = f"{'state':16} {'solver':16} {'loop':20} {'CPU µs':>8} {'CPU ratio':>10} {'wall ratio':>11}"
    timings = time_loops(options)
    lines += ["a network of no cost", head, *map(line_of, timings), ""]
    lines += ["a network that predicts noise, in a Denoiser", head, *map(line_of, time_denoiser(options)), ""]
    lines += [f"{'states alive':20} {'loop':20} {'at a call':>10} {'at most':>8}"]
    lines += [f"{name:20} {who:20} {at:10d} {largest:8d}" for name, who, at, largest in count_states(options)]
    lines += ["", f"{'computing a table':28} {'rows':>6} {'CPU ms':>8}"]
    lines += [f"{name:28} {rows:6d} {ms:8.1f}" for name, rows, ms in time_plans(options)]
    text = "\n".join(lines)
    print(text)
    (options.out / "loop_overhead.txt").write_text(text + "\n")
    page = options.out / "loop_overhead.png"
    draw(timings, page)
    print(f"\nfigure: {page}")
    return page


def against(options: Options) -> Path:
    """Write the ratios of CPU times to those of another checkout."""
    from _against import compare  # at its use, because the process of a checkout imports this module too

    how = {"pairs": options.pairs, "rounds": options.rounds, "rows": options.rows}
    text = compare(Path(options.against), seconds=options.seconds, **how)
    print(text)
    page = options.out / "loop_overhead_against.txt"
    page.write_text(text + "\n")
    return page


def line_of(row: tuple[str, str, str, Timing]) -> str:
    shape, name, who, t = row
    return f"{shape:16} {name:16} {who:20} {t.micro:8.2f} {t.cpu:10.2f} {t.wall:11.2f}"


def draw(timings: list[tuple[str, str, str, Timing]], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(STATES), figsize=(11, 3.6), sharey=True)
    whos = ["plan.run", "ss.solve", "diffusers", "torchdiffeq Euler"]
    for ax, shape in zip(axes, STATES, strict=True):
        for j, who in enumerate(whos):
            points = [
                (i, t.cpu) for i, n in enumerate(SOLVERS) for s, m, w, t in timings if (s, m, w) == (str(shape), n, who)
            ]
            ax.bar([i + 0.2 * (j - 1.5) for i, _ in points], [r for _, r in points], 0.19, label=who)
        ax.axhline(1.3, color="0.3", lw=0.8, ls="--")
        ax.axhline(1.0, color="0.3", lw=0.8)
        ax.set(yscale="log", title=f"state {shape}", xticks=range(len(SOLVERS)))
        ax.set_xticklabels(list(SOLVERS), rotation=25, ha="right")
    axes[0].set_ylabel("CPU time of a step, by hand = 1")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few rounds, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(rounds=5, pairs=1, seconds=0.001, rows=200)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
