"""What does the trainer cost beside a bare PyTorch loop of the same network and loss?

    python experiments/trainer_cost.py
    python experiments/trainer_cost.py --quick    # a minute, for CI

Three ways to make the same steps of the same network, with the same loss: ``Trainer``; a loop by hand that does the
same work (draws a batch, clips, averages the weights); and the barest loop there is (one fixed batch, no clipping, no
average). Rounds of a few steps are interleaved and the ratio of times within each round is summarised by its median, so
that a busy machine disturbs all alike. Throughput is 1/time: above 0.97 is what we ask of the first ratio.

Writes a table. Measured with --rounds 21 on two busy cores, one thread, throughput of the trainer over that of the loop
(CPU time; wall time in brackets): a UNet of 1.2 M parameters at 146 ms a step, 1.00 (1.01) of the same work and 0.93
(0.91) of the barest loop; one of 6.9 M at 577 ms, 1.01 (1.06) and 0.98 (0.97). The quartiles lie 6 % to either side.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import scoresde as ss
from scoresde.training import Trainer


@dataclass
class Options:
    """What can be set from the command line."""

    rounds: int = 41
    steps: int = 4
    threads: int = 1
    quick: bool = False
    out: Path = Path(__file__).parent / "out"


def networks(quick: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]]:
    """By name: a network, the shape of an event, and the size of a batch."""
    out: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
        "UNet, 1.2 M, 8×8": (lambda: ss.nn.UNet(1, width=32, blocks=1, seed=0), (1, 8, 8), 64),
        "UNet, 6.9 M, 16×16": (lambda: ss.nn.UNet(1, seed=0), (1, 16, 16), 16),
    }
    if quick:
        out = {"UNet, 0.3 M, 8×8": (lambda: ss.nn.UNet(1, width=16, blocks=1, seed=0), (1, 8, 8), 64)}
    return out


def contestants(make: Callable[[], nn.Module], event: tuple[int, ...], batch: int) -> dict[str, Callable[[int], None]]:
    """Each a function that makes a number of steps."""
    data = ss.Noise(0).normal((1024, *event), 0)

    def loss() -> ss.DSM:
        return ss.DSM(ss.Denoiser(make(), ss.VP(), predicts="eps"))

    trainer = Trainer(loss(), data, batch=batch, progress=False)

    def trained(steps: int) -> None:
        trainer.fit(trainer.step + steps)

    by_hand, bare = loss(), loss()
    ema, adam = ss.EMA(by_hand.model), torch.optim.Adam(by_hand.parameters(), 2e-4)

    def same_work(steps: int) -> None:
        for _ in range(steps):
            x = data[torch.randint(len(data), (batch,))]
            adam.zero_grad()
            value = by_hand(x)
            value.backward()
            torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
            adam.step()
            ema.update()

    other = torch.optim.Adam(bare.parameters(), 2e-4)

    def barest(steps: int) -> None:
        for _ in range(steps):
            other.zero_grad()
            bare(data[:batch]).backward()
            other.step()

    return {"trainer": trained, "same work": same_work, "barest": barest}


def main(options: Options) -> str:
    torch.set_num_threads(options.threads)
    lines = [
        f"{'network':22} {'batch':>5} {'ms a step':>9}   throughput of the trainer over that of the loop:",
        f"{'':38}   {'same work: cpu':>14} {'wall':>6} {'quartiles of cpu':>17}   {'barest: cpu':>11} {'wall':>6}",
    ]
    for name, (make, event, batch) in networks(options.quick).items():
        runs = contestants(make, event, batch)
        for go in runs.values():
            go(2)
        times: dict[str, list[tuple[float, float]]] = {word: [] for word in runs}
        for k in range(options.rounds):
            for word in sorted(runs, key=lambda word, k=k: hash((word, k))):  # in an order that changes
                cpu, wall = time.process_time(), time.perf_counter()
                runs[word](options.steps)
                times[word].append((time.process_time() - cpu, time.perf_counter() - wall))
        ratio = {
            (word, which): [other[which] / own[which] for own, other in zip(times["trainer"], times[word], strict=True)]
            for word in ("same work", "barest")
            for which in (0, 1)
        }
        middle = {key: statistics.median(values) for key, values in ratio.items()}
        low, _, high = statistics.quantiles(ratio["same work", 0], n=4)
        ms = 1e3 * statistics.median(cpu for cpu, _ in times["trainer"]) / options.steps
        lines.append(
            f"{name:22} {batch:5d} {ms:9.1f}   {middle['same work', 0]:14.3f} {middle['same work', 1]:6.3f} "
            f"{f'{low:.3f} … {high:.3f}':>17}   {middle['barest', 0]:11.3f} {middle['barest', 1]:6.3f}"
        )
    text = "\n".join(lines)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "trainer_cost.txt").write_text(text + "\n")
    return text


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    defaults = Options()
    for name, value in vars(defaults).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="small sizes, for CI")
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(rounds=15)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
