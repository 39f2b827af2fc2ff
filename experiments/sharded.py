"""Samples and log-densities on several processes, equal to those of one process.

    torchrun --nproc_per_node 2 experiments/sharded.py
    python experiments/sharded.py --quick                   # starts two processes by itself, for CI

Each process has its own part of the samples, by their numbers, and gives their first number to the noise. With one GPU
for each process it uses them and NCCL, otherwise the CPU and gloo. The first process gathers all parts, and prints the
largest difference to the samples and log-densities that it computes alone. The noise is equal to the bit; a network may
round a batch of another size in another way.
"""

from __future__ import annotations

import argparse
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import scoresde as ss


def part(n: int) -> tuple[int, int]:
    """First number of the samples of this process, and the first of the next."""
    rank, world = dist.get_rank(), dist.get_world_size()
    return rank * n // world, (rank + 1) * n // world


def gathered(mine: Tensor, n: int) -> Tensor | None:
    """All parts in order, on the first process."""
    world = dist.get_world_size()
    sizes = [(rank + 1) * n // world - rank * n // world for rank in range(world)]
    padded = mine.new_zeros(max(sizes), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)]) if dist.get_rank() == 0 else None


def main(n: int) -> float | None:
    """Sample and compute log-densities in parts; the largest difference to one process, on the first one."""
    gpu = torch.cuda.is_available() and torch.cuda.device_count() >= dist.get_world_size()
    device = torch.device("cuda", dist.get_rank()) if gpu else torch.device("cpu")
    net = ss.nn.MLP(2, hidden=64, classes=3, seed=0).eval().requires_grad_(False).to(device)
    base = ss.Denoiser(net, ss.VP(), predicts="v")
    label = (torch.arange(n) % 3).to(device)
    plan = ss.SDEDPMSolverPP(2).plan(base.sde, ss.grids.karras(base.sde, 6))

    def draw(first: int, last: int) -> tuple[Tensor, Tensor]:
        model = base.given(label=label[first:last])
        x = ss.sample(model, (last - first, 2), plan, seed=ss.Noise(7, offset=first))
        return x, ss.log_prob(model, x, tolerance=ss.likelihood.Tolerance(steps=6)).value

    parts = [gathered(mine, n) for mine in draw(*part(n))]
    if dist.get_rank() > 0:
        return None
    gaps = [float((a - b).abs().max()) for a, b in zip(parts, draw(0, n), strict=True) if a is not None]
    print(
        f"{n} samples on {dist.get_world_size()} processes, largest difference to one process: samples {gaps[0]:.1e}, ",
        end="",
    )
    print(f"log-densities {gaps[1]:.1e}")
    return max(gaps)


def process(rank: int, world: int, port: int, n: int) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run(n)


def run(n: int) -> None:
    gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=5))
    try:
        gap = main(n)
        assert gap is None or gap < 1e-3, gap
    finally:
        dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="two processes and seven samples, for CI")
    options = parser.parse_args()
    if "RANK" in os.environ:
        run(options.samples)
    else:
        mp.spawn(process, (2, free_port(), 7 if options.quick else options.samples), nprocs=2)
