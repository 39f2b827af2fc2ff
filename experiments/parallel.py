"""Plans in parallel in time: consecutive network calls until the samples agree with the sequential ones.

    python experiments/parallel.py            # 3 minutes on an idle core
    python experiments/parallel.py --quick    # seconds, for CI

The data are ten anisotropic Gaussians in 32-D; 16 samples are drawn, with plans of 50 and 200 rows. The script finds
the largest tolerance at which ``ss.sampling.Parallel`` is within 1e-3 per number, root mean square, of the sequential
run, with all rows at once and with a window of 50. It compares this with the same iteration under triangular Anderson
acceleration (Tang et al., 2024, arXiv:2402.09970) over the last one to three sweeps, which is implemented here: each
row is corrected by the combination of earlier changes that minimises the residuals of this row and of all earlier ones.
Anderson acceleration needs as many sweeps or more, so the library does not have it.

The script writes a table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from work_precision import PROBLEMS

import scoresde as ss
from scoresde.noise.streams import Stream
from scoresde.plan import unroll
from scoresde.sampling.parallel import constants, evaluate, repeat_samples

TOLERANCES = (1e-2, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 1e-5)


@dataclass
class Options:
    """Options of the command line."""

    rows: str = "50,200"
    history: str = "1,2,3"
    samples: int = 16
    equal: float = 1e-3
    out: Path = Path(__file__).parent / "out"


def anderson(
    model: ss.denoisers.AbstractDenoiser, x: Tensor, plan: ss.Plan, noise: ss.Noise, tol: float, m: int
) -> tuple[Tensor, int]:
    """Picard iteration over all rows with Anderson acceleration over m sweeps; the result and the number of sweeps."""
    table = unroll(plan)
    n = table.nfe
    affine = constants(plan, table, x, noise.fork(Stream.STEPS))
    times = torch.tensor([float(t) for t in table.t[:n]], dtype=x.dtype)
    repeated = repeat_samples(model, len(x))
    denoised = torch.zeros((n, *x.shape), dtype=x.dtype)
    first, sweeps, before = 0, 0, None
    changes: list[tuple[Tensor, Tensor]] = []  # changes of `denoised` and of the residual, from sweep to sweep
    while first < n:
        states = affine[first:n] + torch.tensordot(table.d[first:n], denoised, dims=1)
        new = denoised.clone()
        new[first:] = evaluate(repeated(n - first), states, times[first:])
        residual = new - denoised
        sweeps += 1
        moved = residual[first:].square().mean(2).sqrt().amax(1)
        settled = first + int((moved[1:] <= tol).cumprod(0).sum()) + 1
        if before is not None:
            changes = [*changes, (denoised - before[0], residual - before[1])][-m:]
        before = denoised, residual
        denoised = new.clone()
        if changes:
            by = torch.stack([r for _, r in changes])  # (m, n, B, D)
            square = torch.einsum("irbd,jrbd->rbij", by, by).cumsum(0)
            linear = torch.einsum("irbd,rbd->rbi", by, residual).cumsum(0)
            ridge = 1e-8 * square.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] + 1e-30
            best = torch.linalg.solve(square + ridge * torch.eye(len(by), dtype=x.dtype), linear[..., None])[..., 0]
            both = torch.stack([s + r for s, r in changes])
            denoised[settled:] -= torch.einsum("irbd,rbi->rbd", both, best)[settled:]
        first = settled
    return affine[n] + torch.tensordot(table.d[n], denoised, dims=1), sweeps


def cheapest(run: Callable[[float], tuple[Tensor, int, int]], done: Tensor, equal: float) -> tuple[int, int]:
    """Number of sweeps and of evaluations at the largest tolerance whose result is close enough."""
    for tol in TOLERANCES:
        x, sweeps, nfe = run(tol)
        if float((x - done).square().mean().sqrt()) <= equal:
            break
    return sweeps, nfe


def main(options: Options) -> None:
    torch.set_num_threads(1)
    history = [int(m) for m in options.history.split(",")]
    lines = [
        "# Parallel in time",
        "",
        f"{options.samples} samples of the anisotropic 32-D mixture under VP, equal to the sequential ones to "
        f"{options.equal:g}; consecutive calls.",
        "",
        "| plan | rows | calls | rows / calls | evaluations / rows | window of 50: calls | evaluations / rows | "
        + " | ".join(f"Anderson over {m}: calls" for m in history)
        + " |",
        "|:--|" + "--:|" * (6 + len(history)),
    ]
    model = PROBLEMS["anisotropic 32-D"](ss.VP())
    sde, noise = model.sde, ss.Noise(1)
    x = sde.prior().sample((options.samples, 32), ss.Noise(0), dtype=torch.float64)
    print("\n".join(lines), flush=True)
    for rows in map(int, options.rows.split(",")):
        grid = ss.grids.quadratic_vp(sde, rows)
        for plan in (
            ss.DDIM().plan(sde, grid),
            ss.DPMSolverPP(2).plan(sde, grid),
            ss.VelocityAB(3).plan(sde, grid),
            ss.SDEDPMSolverPP(2).plan(sde, grid),
            replace(ss.DDIM().plan(sde, ss.grids.ancestral(sde, grid)), name="DDPM: DDIM, η = 1"),
        ):
            done = ss.sample(model, x, plan, seed=noise)

            def picard(tol: float, window: int | None = None, plan: ss.Plan = plan) -> tuple[Tensor, int, int]:
                run = ss.solve(model, x, ss.sampling.Parallel(plan, tol, window), seed=noise)
                return run.x, run.calls, run.nfe

            def mixed(tol: float, m: int, plan: ss.Plan = plan) -> tuple[Tensor, int, int]:
                y, sweeps = anderson(model, x, plan, noise, tol, m)
                return y, sweeps, 0

            calls, nfe = cheapest(picard, done, options.equal)
            windowed, windowed_nfe = cheapest(lambda tol: picard(tol, 50), done, options.equal)
            cells = [plan.name, plan.nfe, calls, f"{plan.nfe / calls:.1f}", f"{nfe / plan.nfe:.1f}"]
            cells += [windowed, f"{windowed_nfe / plan.nfe:.1f}"]
            cells += [cheapest(lambda tol, m=m: mixed(tol, m), done, options.equal)[0] for m in history]
            lines.append(f"| {' | '.join(map(str, cells))} |")
            print(lines[-1], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "parallel.md").write_text("\n".join(lines) + "\n")


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="seconds, for CI")
    given = vars(parser.parse_args())
    if given.pop("quick"):
        given.update(rows="20", history="1", samples=4)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
