"""Cost of error control for each sample in flow time, compared with RK45 in t on the whole batch.

    python experiments/adaptive.py            # minutes
    python experiments/adaptive.py --quick    # seconds, for CI
    python experiments/adaptive.py --sde      # minutes: error of the standard deviation under AdaptiveSDE instead

The denoisers are exact (a ring of eight modes in 2-D; ten anisotropic Gaussians in 32-D), under VP, VE and Flow. All
runs start from the same states and end at ``sde.t_min``, where each is compared with a solve at a tolerance of 1e-9.
The baseline is scipy's RK45 on dx/dt of the flattened batch with rtol = atol = 1e-5. Each embedded pair runs at
tolerances from 1e-2 to 1e-6; its cost at the error of the baseline is interpolated, log–log.

    calls      network calls of the baseline, for the whole batch
    error      median error of the baseline, per number
    per sample evaluations per sample of the pair at that error, and their ratio to the calls of the baseline
    batch      batched calls of the pair at that error (until the last sample arrives), and their ratio

Measured with ``--points 32``: on the six problems RK45 in t makes 80 to 122 calls for errors of 4e-6 to 2e-5.
Evaluations per sample at the same error, divided by these calls, geometric mean (smallest and largest):

    Adams                      0.42  (0.34 … 0.57)     batched calls 0.54 (0.44 … 0.74)
    Adams(3)                   0.55
    Dormand-Prince             0.60
    torchdiffeq in flow time   0.90  (the whole batch, error of its worst sample)
    Bogacki-Shampine           1.01
    DPM-Solver-23              1.11
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import scoresde as ss
from scoresde import integrators
from scoresde.integrators import Adaptive, TorchDiffEq

PAIRS = {
    "Adams": integrators.Adams(),
    "Adams(3)": integrators.Adams(3),
    "Dormand-Prince": integrators.DormandPrince(),
    "Bogacki-Shampine": integrators.BogackiShampine(),
    "DPM-Solver-23": integrators.DPM23(),
}


@dataclass
class Options:
    """Options of the command line."""

    points: int = 64
    seed: int = 0
    quick: bool = False
    sde: bool = False


def problems(sde: ss.SDE) -> dict[str, ss.GaussianMixture]:
    angle = torch.arange(8) * math.pi / 4
    noise = ss.Noise(1)
    means = noise.normal((10, 32), 0, dtype=torch.float64)
    std = 0.1 + 0.4 * noise.uniform((10, 32), 1, dtype=torch.float64)
    return {
        "ring 2-D": ss.GaussianMixture(sde, 2 * torch.stack([angle.cos(), angle.sin()], 1), std=0.1),
        "mixture 32-D": ss.GaussianMixture(sde, means, std=std),
    }


def baseline(model: ss.GaussianMixture, x: Tensor) -> tuple[Tensor, int]:
    """RK45 in t on the whole batch, rtol = atol = 1e-5."""
    from scipy.integrate import solve_ivp

    sde, calls = model.sde, 0

    def field(t: float, flat: object) -> object:
        nonlocal calls
        calls += 1
        return model.velocity(torch.as_tensor(flat).reshape(x.shape), min(max(t, sde.t_min), sde.T)).flatten().numpy()

    start = 0.999 * sde.T if sde.alpha(sde.T) == 0 else sde.T
    solution = solve_ivp(field, (start, sde.t_min), x.flatten().numpy(), method="RK45", rtol=1e-5, atol=1e-5)
    return torch.as_tensor(solution.y[:, -1]).reshape(x.shape), calls


def error(x: Tensor, truth: Tensor) -> float:
    return float((x - truth).flatten(1).square().mean(1).sqrt().median())


def at_error(errors: list[float], cost: list[float], goal: float) -> float:
    """Cost at an error, interpolated log–log between the two tolerances around it."""
    points = sorted(zip(errors, cost, strict=True))
    i = next((k for k in range(1, len(points)) if points[k][0] >= goal), len(points) - 1)
    (e0, c0), (e1, c1) = points[i - 1], points[i]
    slope = math.log(c1 / c0) / math.log(e1 / e0)
    return c0 * (goal / e0) ** slope


SDES: dict[str, ss.SDE] = {cls.__name__: cls() for cls in (ss.VP, ss.SubVP, ss.VE, ss.Cosine, ss.EDM, ss.Flow, ss.Trig)}


def bias(options: Options) -> None:
    """Relative error of the standard deviation of Gaussian data in 64 dimensions, and evaluations per sample."""
    rules = {"default": integrators.AdaptiveSDE(), "longest 0.5": integrators.AdaptiveSDE(1.0, 0.05, 0.05, longest=0.5)}
    n = 2 * options.points
    print(f"standard error {1 / math.sqrt(2 * 64 * n):.3f}")
    for process, sde in SDES.items():
        for std in (1.0, 0.6, 0.1):
            model = ss.GaussianMixture(sde, torch.zeros(1, 64, dtype=torch.float64), std=std)
            start = ss.Start(data_std=std, dtype=torch.float64)
            cells = []
            for name, rule in rules.items():
                run = ss.solve(model, (n, 64), rule, seed=options.seed, start=start)
                error = float(run.x.square().mean().sqrt()) / std - 1
                cells.append(f"{name}: {error:+.3f} with {float(run.stats.nfe.double().mean()):.0f}")
            print(f"{process:7s} std {std:3.1f}   {'   '.join(cells)}", flush=True)
    print("steps of one length, exact (negative: too narrow), std 0.6:")
    for process, sde in SDES.items():
        print(f"{process:7s} " + "   ".join(f"h = {h}: {equal_steps(sde, h, 0.6):+.4f}" for h in (0.5, 0.2, 0.15)))


def equal_steps(sde: ss.SDE, h: float, std: float) -> float:
    """Exact error of the standard deviation if all steps of AdaptiveSDE have the length h in λ."""
    start = sde.T if sde.alpha(sde.T) > 0 else 0.999 * sde.T
    first, last = sde.lam(start), sde.lam(sde.t_min)
    lam = torch.linspace(first, last, math.ceil((last - first) / h) + 1, dtype=torch.float64)
    grid = torch.cat([torch.tensor([start], dtype=torch.float64), sde.t_of_lam(lam[1:]), torch.zeros(1)])
    plan = ss.solvers.SASolver(1, 2, 1.0).plan(sde, grid)  # the same step
    [(found, exact)] = ss.analysis.gaussian_stds(plan, sde, [std])
    return found / exact - 1


def main(options: Options) -> None:
    sdes: dict[str, ss.SDE] = {"VP": ss.VP(), "VE": ss.VE(), "Flow": ss.Flow()}
    tols = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    chosen = PAIRS
    if options.quick:
        sdes, tols, chosen, options.points = {"VP": ss.VP()}, (1e-3, 1e-4, 1e-5), {"Adams": PAIRS["Adams"]}, 16
    ratios: dict[str, list[float]] = {name: [] for name in [*chosen, "torchdiffeq in flow time"]}
    for process, sde in sdes.items():
        start = 0.999 * sde.T if sde.alpha(sde.T) == 0 else sde.T
        for name, model in problems(sde).items():
            x = sde.prior(start).sample((options.points, *model.event), ss.Noise(options.seed), dtype=torch.float64)
            solve = partial(ss.solve, model, x, t_start=start, t_end=sde.t_min)
            truth = solve(Adaptive(rtol=1e-9, atol=1e-9)).x
            end, calls = baseline(model, x)
            goal = error(end, truth)
            print(f"{process}, {name}: RK45 in t, {calls} calls, error {goal:.1e}")
            for label, pair in chosen.items():
                runs = [solve(Adaptive(pair, tol, tol, max_nfe=20_000)) for tol in tols]
                errors = [error(run.x, truth) for run in runs]
                each = at_error(errors, [float(run.stats.nfe.double().mean()) for run in runs], goal)
                batch = at_error(errors, [float(run.calls) for run in runs], goal)
                ratios[label].append(each / calls)
                print(
                    f"  {label:26s} per sample {each:6.1f} ({each / calls:4.2f})   batch {batch:6.1f} "
                    f"({batch / calls:4.2f})"
                )
            runs = [solve(TorchDiffEq(rtol=tol, atol=tol)) for tol in tols]
            cost = at_error([error(run.x, truth) for run in runs], [float(run.calls) for run in runs], goal)
            ratios["torchdiffeq in flow time"].append(cost / calls)
            print(f"  {'torchdiffeq in flow time':26s} batch      {cost:6.1f} ({cost / calls:4.2f})")
    print("evaluations per sample at the error of RK45 in t, divided by its calls, geometric mean:")
    for label, values in ratios.items():
        print(f"  {label:26s} {math.exp(sum(map(math.log, values)) / len(values)):.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=Options.points)
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--sde", action="store_true")
    with torch.no_grad():
        options = Options(**vars(parser.parse_args()))
        (bias if options.sde else main)(options)
