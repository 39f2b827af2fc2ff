"""What depends on the batch: normals, the arithmetic of a plan, and the kernels of networks.

    python experiments/invariance.py           # 64 samples
    python experiments/invariance.py --quick   # 8 samples, for CI

Samples are computed in one batch, and again in parts of 1, 7 and 32 with ``noise[rows]``. The table has the
largest difference of any element, relative to the largest element. The first rows have no network; the next ones are
one evaluation of a network; the last ones are runs of 20 steps, whose samples differ only because the network does.
Everything runs on the CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _digits import small_unet
from torch import Tensor

import scoresde as ss

PARTS = (1, 7, 32)
EVENT = (1, 8, 8)
Part = Callable[[ss.Noise, int], Tensor]


def gap(whole: Tensor, parts: list[Tensor]) -> float:
    """Largest difference relative to the largest element."""
    return float((torch.cat(parts) - whole).abs().max() / whole.abs().max())


def in_parts(compute: Part, noise: ss.Noise, n: int, size: int) -> list[Tensor]:
    return [compute(noise[range(i, min(i + size, n))], min(size, n - i)) for i in range(0, n, size)]


def row(name: str, compute: Part, n: int) -> str:
    noise = ss.Noise(3)
    with torch.no_grad():
        whole = compute(noise, n)
        gaps = [gap(whole, in_parts(compute, noise, n, size)) for size in PARTS]
    return f"| {name} | " + " | ".join("equal" if g == 0 else f"{g:.0e}" for g in gaps) + " |"


def evaluated(model: ss.Denoiser, dtype: torch.dtype, event: tuple[int, ...]) -> Part:
    return lambda noise, n: model.x0(noise.normal((n, *event), 0, dtype=dtype), 0.4)


def run(
    model: ss.denoisers.AbstractDenoiser, dtype: torch.dtype, event: tuple[int, ...], solver: ss.solvers.Solver
) -> Part:
    start = ss.Start(dtype=dtype)
    return lambda noise, n: ss.sample(model, (n, *event), solver, steps=20, seed=noise, start=start)


def main(n: int) -> list[str]:
    torch.manual_seed(0)
    sde = ss.VP()
    plain = ss.Denoiser(lambda x, t: 0.3 * x.tanh(), sde, predicts="x0")
    lines = ["| 64 samples in parts of | 1 | 7 | 32 |".replace("64", str(n)), "|---|---|---|---|"]
    lines.append(row("normals, `Noise(3)[rows]`", lambda noise, m: noise.normal((m, *EVENT), 5), n))
    lines.append(row("20 steps of DDPM, elementwise network", run(plain, torch.float32, EVENT, ss.DDPM()), n))
    for dtype in (torch.float32, torch.float64):
        kind = str(dtype)[6:]
        mlp = ss.Denoiser(ss.nn.MLP(64, hidden=256, depth=3).to(dtype), sde, predicts="eps").eval()
        unet = ss.Denoiser(small_unet().to(dtype), sde, predicts="v").eval()
        for p in unet.parameters():  # the last layer starts at zero
            torch.nn.init.normal_(p, std=0.05)
        lines.append(row(f"one evaluation, MLP, {kind}", evaluated(mlp, dtype, (64,)), n))
        lines.append(row(f"one evaluation, UNet, {kind}", evaluated(unet, dtype, EVENT), n))
        lines.append(row(f"20 steps of DDPM, UNet, {kind}", run(unet, dtype, EVENT, ss.DDPM()), n))
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    text = "\n".join(main(8 if quick else 64))
    print(text)
    out = Path(__file__).parent / "out"
    out.mkdir(exist_ok=True)
    (out / "invariance.txt").write_text(text + "\n")
