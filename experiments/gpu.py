"""What a run costs on this machine: the loop, graphs, updates, noise, training and memory, in one table.

    python experiments/gpu.py             # on a GPU: about five minutes
    python experiments/gpu.py --quick     # seconds on a CPU, for CI

The script measures, on the GPU if there is one and on the CPU otherwise:

- ``run``: time of a run divided by that of its network alone, for three sizes of a UNet, batches of 1, 16 and 64 and
  two numbers of evaluations: our loop as it is, as a CUDA graph, and diffusers' DDIM loop with the same network. On a
  GPU the network alone is also measured as a graph, and the last column divides our graph by it. Updates are kernels
  of Triton in the graph of the column ``graph, fused``.
- ``memory``: peak memory of our run and of the same arithmetic by hand (CUDA only).
- ``update``: bytes that an update reads and writes in a second, divided by those of a copy: one row of DPM-Solver++ 2M,
  eager, fused by ``torch.compile``, and as one kernel of Triton (CUDA with the extra ``scoresde[triton]`` only).
- ``noise``: time of keyed normals divided by that of ``torch.randn``, also inside the kernel of Triton.
- ``training``: samples in a second of ``DSM``, as it is and compiled, divided by those of a loop by hand, and with an
  average of the weights.

It prints the table and writes ``gpu.json`` with the machine, the versions and the date. Every time is a median of
rounds that measure all variants in turn. It has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde as ss
from scoresde.noise.keyed import Laid
from scoresde.plan import fused, run

VP = ss.VP()
SIZES = {  # width, multipliers, pixels of a side
    "small": (16, (1, 2), 16),
    "medium": (64, (1, 2, 2), 32),
    "large": (128, (1, 2, 2, 2), 64),
}


@dataclass
class Options:
    """Options of the command line."""

    rounds: int = 7
    seconds: float = 0.2  # time of each variant in each round
    out: Path = Path(__file__).parent / "out"
    quick: bool = False
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def race(variants: dict[str, Callable[[], Any]], options: Options) -> dict[str, float]:
    """Median seconds of a call of each variant; the variants take turns."""
    clock = time.perf_counter if options.device == "cuda" else time.process_time
    counts, spent = {}, {name: [] for name in variants}
    for name, call in variants.items():
        call()
        wait(options.device)
        start = clock()
        call()
        wait(options.device)
        counts[name] = max(1, round(options.seconds / max(1e-6, clock() - start)))
    for _ in range(options.rounds):
        for name, call in variants.items():
            wait(options.device)
            start = clock()
            for _ in range(counts[name]):
                call()
            wait(options.device)
            spent[name].append((clock() - start) / counts[name])
    return {name: statistics.median(times) for name, times in spent.items()}


def unet(size: str) -> ss.nn.UNet:
    width, multipliers, _ = SIZES[size]
    return ss.nn.UNet(3, width=width, multipliers=multipliers, blocks=1, attention=(), seed=0)


# Runs.


def diffusers_loop(nfe: int, net: Any, x: Tensor) -> Callable[[], Tensor] | None:
    try:
        import diffusers
    except ImportError:
        return None
    warnings.filterwarnings("ignore", module="diffusers")
    scheduler = diffusers.DDIMScheduler(clip_sample=False)

    def loop() -> Tensor:
        scheduler.set_timesteps(nfe, device=x.device)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(net(y, t.expand(len(y)).float()), t, y).prev_sample
        return y

    return loop


def time_runs(options: Options) -> list[dict[str, Any]]:
    cases = [("small", 1, 5)] if options.quick else [(s, b, n) for s in SIZES for b in (1, 16, 64) for n in (10, 50)]
    if options.device == "cpu" and not options.quick:
        cases = [(s, b, n) for s in ("small", "medium") for b in (1, 16) for n in (10,)]
    out = []
    for size, batch, nfe in cases:
        net, side = unet(size).eval().requires_grad_(False).to(options.device), SIZES[size][2]
        shape = (batch, 3, side, side)
        x, label = torch.randn(shape, device=options.device), torch.full((batch,), 0.5, device=options.device)
        model, plan = ss.Denoiser(net, VP, predicts="eps"), ss.DDIM().plan(VP, ss.grids.karras(VP, nfe))
        captured = ss.sampling.capture(model, shape, plan)

        def alone(net: Any = net, x: Tensor = x, label: Tensor = label, nfe: int = nfe) -> None:
            for _ in range(nfe):
                net(x, label)

        variants: dict[str, Callable[[], Any]] = {
            "network": alone,
            "loop": lambda plan=plan, model=model, x=x: run(plan, model, x),
        }
        theirs = diffusers_loop(nfe, net, x)
        if theirs is not None:
            variants["diffusers"] = theirs
        if captured.mode == "graph":
            variants["graph"] = lambda captured=captured, x=x: captured(0, x=x)
            variants["network as a graph"] = graph_of(alone)
            if not fused.refusal(x):
                kernels = ss.sampling.capture(model, shape, plan, fused=True)
                variants["graph, fused"] = lambda kernels=kernels, x=x: kernels(0, x=x)
        seconds = race(variants, options)
        row: dict[str, Any] = {"network": size, "batch": batch, "nfe": nfe, "ms": 1e3 * seconds["network"]}
        row |= {name: seconds[name] / seconds["network"] for name in variants if name != "network"}
        if "graph" in seconds:
            row["graph / network as a graph"] = seconds["graph"] / seconds["network as a graph"]
        else:
            row["no graph"] = captured.reason
        if options.device == "cuda":
            row |= memory(plan, model, x)
        out.append(row)
    return out


def graph_of(call: Callable[[], Any]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def memory(plan: ss.Plan, model: ss.Denoiser, x: Tensor) -> dict[str, float]:
    """Peak megabytes of our run, and of DDIM by hand."""
    weights = [
        (float(row.t), row.x[0][1] if row.x else 0.0, row.d[0][1]) for row in plan.rows[1:]
    ]  # of x and of its denoised state
    times = [float(row.t) for row in plan.rows]

    def by_hand() -> Tensor:
        y = x.clone()
        for s, (_, a, b) in zip(times, weights, strict=False):
            d = model.x0(y, s)
            y = (y * a).add_(d, alpha=b)
            del d
        return y

    out = {}
    for name, call in {"MB": lambda: run(plan, model, x), "MB by hand": by_hand}.items():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        out[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return out


# Updates and noise.


def time_updates(options: Options) -> list[dict[str, Any]]:
    shape = (4, 3, 32, 32) if options.quick else (64, 3, 256, 256) if options.device == "cuda" else (16, 3, 128, 128)
    x, d, e, to = (torch.randn(shape, device=options.device) for _ in range(4))

    def update(x: Tensor, d: Tensor, e: Tensor) -> Tensor:
        return (x * 0.9).add_(d, alpha=0.3).add_(e, alpha=-0.2)

    variants: dict[str, Callable[[], Any]] = {"copy": lambda: to.copy_(x), "eager": lambda: update(x, d, e)}
    if not options.quick:
        compiled = torch.compile(update, fullgraph=True)
        variants["compiled"] = lambda: compiled(x, d, e)
    if not fused.refusal(x):
        from scoresde.plan import kernel

        variants["triton"] = lambda: kernel.add(torch.empty_like(x), [(x, 0.9), (d, 0.3), (e, -0.2)])
    seconds = race(variants, options)
    # A copy moves two states, an update in one pass four.
    rate = {name: (2 if name == "copy" else 4) * x.nbytes / s for name, s in seconds.items()}
    ours = {name: rate[name] / rate["copy"] for name in rate if name != "copy"}
    return [{"state": list(shape), "GB/s of a copy": rate["copy"] / 1e9, **ours}]


def time_noise(options: Options) -> list[dict[str, Any]]:
    shapes = [(1, 4), (16, 3, 32, 32)] if options.device == "cpu" else [(1, 4), (16, 3, 32, 32), (64, 3, 256, 256)]
    out = []
    for shape in shapes:
        x, noise = torch.empty(shape, device=options.device), ss.Noise(0)
        variants: dict[str, Callable[[], Any]] = {
            "randn": lambda x=x: torch.randn_like(x),
            "keyed": lambda x=x, noise=noise: noise.like(x, 3),
        }
        if not fused.refusal(x):
            from scoresde.plan import kernel

            key_low, key_high, low, high = Laid(noise, len(x), x.device).words
            keys = (low, high, key_low, key_high)
            variants["triton"] = lambda x=x, keys=keys: kernel.add(torch.empty_like(x), [], 0.0, [(3, 1.0)], keys)
        seconds = race(variants, options)
        row: dict[str, Any] = {"state": list(shape), "us of randn": 1e6 * seconds["randn"]}
        row |= {name: s / seconds["randn"] for name, s in seconds.items() if name != "randn"}
        row |= {f"GB/s {name}": x.nbytes / s / 1e9 for name, s in seconds.items() if name != "randn"}
        out.append(row)
    return out


# Training.


def time_training(options: Options) -> list[dict[str, Any]]:
    size, batch = ("small", 4) if options.quick or options.device == "cpu" else ("medium", 64)
    side = SIZES[size][2]
    x = torch.randn(batch, 3, side, side, device=options.device)
    out: dict[str, Any] = {"network": size, "batch": batch}
    variants: dict[str, Callable[[], Any]] = {}

    def step(net: torch.nn.Module, value: Callable[[], Tensor], after: Callable[[], Any] = lambda: None) -> Any:
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-4)

        def go() -> None:
            optimiser.zero_grad()
            value().backward()
            optimiser.step()
            after()

        return go

    def by_hand(net: torch.nn.Module) -> Callable[[], Tensor]:
        def value() -> Tensor:
            t = torch.rand(batch, device=x.device) * (1 - VP.t_min) + VP.t_min
            eps = torch.randn_like(x)
            log_alpha = -0.25 * t**2 * (20 - 0.1) - 0.05 * t
            alpha = log_alpha.exp()[:, None, None, None]
            sigma = (-torch.expm1(2 * log_alpha)).sqrt()[:, None, None, None]
            return (net(alpha * x + sigma * eps, t) - eps).square().mean()

        return value

    base = unet(size).to(options.device)
    nets = {name: copy.deepcopy(base) for name in ("by hand", "DSM", "DSM and EMA", "DSM, bfloat16", "DSM compiled")}
    loss = {name: ss.DSM(ss.Denoiser(net, VP, predicts="eps")) for name, net in nets.items()}
    variants["by hand"] = step(nets["by hand"], by_hand(nets["by hand"]))
    variants["DSM"] = step(nets["DSM"], lambda: loss["DSM"](x))
    ema = ss.EMA(nets["DSM and EMA"])
    variants["DSM and EMA"] = step(nets["DSM and EMA"], lambda: loss["DSM and EMA"](x), ema.update)

    def half() -> Tensor:
        with torch.autocast(options.device, dtype=torch.bfloat16):
            return loss["DSM, bfloat16"](x)

    variants["DSM, bfloat16"] = step(nets["DSM, bfloat16"], half)
    if not options.quick:
        compiled = torch.compile(loss["DSM compiled"], fullgraph=True)
        variants["DSM compiled"] = step(nets["DSM compiled"], lambda: compiled(x))
    with torch.enable_grad():
        seconds = race(variants, options)
    out["samples/s by hand"] = batch / seconds["by hand"]
    return [out | {name: seconds["by hand"] / s for name, s in seconds.items() if name != "by hand"}]


# Table.


def machine() -> dict[str, Any]:
    out: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "scoresde": ss.__version__}
    out |= {"machine": platform.machine(), "date": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    if torch.cuda.is_available():
        out |= {
            "gpu": torch.cuda.get_device_name(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
        out["tf32"] = torch.backends.cuda.matmul.allow_tf32
    else:
        out |= {"threads": torch.get_num_threads()}
    return out


def text_of(sections: dict[str, list[dict[str, Any]]]) -> str:
    lines = []
    for name, rows in sections.items():
        lines += ["", name]
        for row in rows:
            cells = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
            lines.append("  " + ", ".join(cells))
    return "\n".join(lines)


def main(options: Options) -> Path:
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_grad_enabled(False)
    if options.device == "cpu":
        torch.set_num_threads(1)
    sections = {
        "run, time divided by that of the network alone": time_runs(options),
        "update, bandwidth divided by that of a copy": time_updates(options),
        "noise, time divided by that of torch.randn": time_noise(options),
        "training, samples in a second divided by those of a loop by hand": time_training(options),
    }
    about = machine()
    text = "  ".join(f"{k} {v}" for k, v in about.items()) + "\n" + text_of(sections)
    print(text)
    path = options.out / "gpu.json"
    given = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    path.write_text(json.dumps({"about": about, "options": given, **sections}, indent=1) + "\n")
    print(f"\n{path}")
    return path


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few rounds of small cases, for CI")
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(rounds=3, seconds=0.02)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
