"""Error against the number of evaluations: all solvers on all grids, on problems with known flows, and diffusers.

    python experiments/work_precision.py            # two processes
    python experiments/work_precision.py --quick    # seconds, for CI

The problems are three exact denoisers (a ring of eight modes in 2-D; ten anisotropic Gaussians in 32-D; twenty of low
rank in 192-D), each under VP and EDM. All samplers start from the same states at T, and each result is compared with
the same fine solve of the probability flow to t = 0. The error is the distance per number of a state: its median over
the states, and its root mean square, to which the states between modes contribute most. At every budget the frontier is
the smallest error over all our solvers × grids that use no statistics of the data. The table shows the ratio of the
default to the frontier, as its geometric mean and its maximum. DPM-Solver-v3, whose weights use statistics of the
model, has a column of its own.

diffusers' schedulers run on the same processes as lists of a thousand β, from the same states to the same end, with all
their grids. The exact network is evaluated at the noise level that a scheduler intends, not at the rounded label.

The script writes a CSV of all results, a figure and a table.
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde as ss
from scoresde import grids
from scoresde.analysis.work import work_precision
from scoresde.plan import run
from scoresde.solvers.interpolants import LAM, NOISE, RHO, TAU, VELOCITY, V
from scoresde.solvers.multistep import Multistep
from scoresde.solvers.runge_kutta import RK4, RungeKutta

PROCESSES: dict[str, ss.SDE] = {"VP": ss.VP(), "EDM": ss.EDM()}
NFES = (5, 6, 8, 10, 12, 15, 20, 30, 50)


@dataclass
class Options:
    """Options of the command line."""

    points: int = 128
    seed: int = 0
    workers: int = 2
    nfes: str = ",".join(map(str, NFES))
    out: Path = Path(__file__).parent / "out"
    quick: bool = False


# Problems.


def ring(sde: ss.SDE) -> ss.GaussianMixture:
    angle = torch.arange(8) * (math.pi / 4)
    return ss.GaussianMixture(sde, torch.stack([angle.cos(), angle.sin()], dim=1), std=0.1)


def anisotropic(sde: ss.SDE) -> ss.GaussianMixture:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    means = 0.5 * make(10, 32)
    axes = torch.linalg.qr(make(10, 32, 32))[0]
    std = torch.linspace(math.log(0.03), math.log(0.5), 32, dtype=torch.float64).exp()
    return ss.GaussianMixture(sde, means, cov=(axes * std**2) @ axes.mT)


def low_rank(sde: ss.SDE) -> ss.GaussianMixture:
    make = partial(torch.randn, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ss.GaussianMixture(sde, 0.5 * make(20, 192), factor=0.15 * make(20, 192, 8), std=0.03)


PROBLEMS = {"ring 2-D": ring, "anisotropic 32-D": anisotropic, "low rank 192-D": low_rank}


@cache
def problem(name: str, process: str, points: int, seed: int) -> tuple[ss.GaussianMixture, Tensor, Tensor]:
    """Denoiser, initial states and their ends, by the classical Runge–Kutta method in flow time, uniform in λ."""
    sde = PROCESSES[process]
    model = PROBLEMS[name](sde)
    std = float(model.covariance().diagonal().mean().sqrt())
    x = sde.prior(std=std).sample((points, *model.event), ss.Noise(seed), dtype=torch.float64)
    near = sde.t_of_lam(sde.lam(sde.t_min) + 4.0)
    fine = ss.grids.uniform_lam(sde, 400, t_end=near)
    return model, x, model.x0(run(RungeKutta(RK4, VELOCITY).plan(sde, fine), model.x0, x), near)


# Solvers of this library.


def our_solvers(quick: bool) -> dict[str, ss.solvers.Solver]:
    """All deterministic solvers, including combinations of prediction and variable that have no name."""
    solvers = {
        "DDIM": ss.DDIM(),
        "DPM-Solver++ 2M": ss.DPMSolverPP(2),
        "UniPC-3": ss.UniPC(3),
        "VelocityAB-3": ss.VelocityAB(3),
    }
    if quick:
        return solvers
    return solvers | {
        "Euler": ss.solvers.Euler(),
        "Heun": ss.solvers.Heun(),
        "RungeKutta4": ss.solvers.RungeKutta4(),
        "EDM Heun": ss.EDMHeun(),
        "DPM2": ss.solvers.DPM2(),
        "DPM-Solver-3": ss.solvers.DPMSolver(3),
        "DPM-Solver fast": ss.solvers.DPMSolver(kind="fast"),
        "DPM-Solver 2M": ss.solvers.DPMSolver(2, kind="multi"),
        "DPM-Solver++ 2S": ss.DPMSolverPP(2, kind="single"),
        "DPM-Solver++ 3S": ss.DPMSolverPP(3, kind="single"),
        "DPM-Solver++ 2M exact": ss.DPMSolverPP(2, form="exact"),
        "DPM-Solver++ 3M": ss.DPMSolverPP(3),
        "DPM-Solver++ 3M published": ss.DPMSolverPP(3, form="published"),
        "UniPC-2": ss.UniPC(2),
        "UniPC-2 bh1": ss.UniPC(2, "bh1"),
        "UniPC-4": ss.UniPC(4),
        "UniPC-3 noise": ss.UniPC(3, prediction=NOISE),
        "DEIS tAB-2": ss.solvers.DEIS(2),
        "DEIS tAB-3": ss.solvers.DEIS(3),
        "DEIS tAB-4": ss.solvers.DEIS(4),
        "DEIS ρAB-3": ss.solvers.DEIS(3, "rho"),
        "LMS": ss.solvers.LMS(),
        "PLMS": ss.solvers.PLMS(),
        "iPNDM": ss.solvers.IPNDM(),
        "AcceleratedDDIM": ss.solvers.AcceleratedDDIM(),
        "RES-2": ss.solvers.RES(2),
        "RES-3": ss.solvers.RES(3),
        "ETDRK4": ss.solvers.ETDRK4(),
        "VelocityAB-2": ss.VelocityAB(2),
        "VelocityAB-4": ss.VelocityAB(4),
        "VelocityAB-2 + UniC": ss.solvers.with_corrector(ss.VelocityAB(2)),
        "VelocityAB-3 + UniC": ss.solvers.with_corrector(ss.VelocityAB(3)),
        "velocity in λ, 2 + UniC": ss.solvers.with_corrector(Multistep(2, VELOCITY, LAM)),
        "velocity in λ, 3": Multistep(3, VELOCITY, LAM),
        "v in ρ, 3": Multistep(3, V, RHO),
        "v in τ, 3": Multistep(3, V, TAU),
    }


def our_grids(process: str, quick: bool) -> dict[str, Callable[..., Tensor]]:
    makers = {"karras": grids.karras, "quadratic_vp": grids.quadratic_vp}
    if quick:
        return makers
    if process == "EDM":  # σ/α ends at 0.002 by default; with VP, and with diffusers' schedulers, at 0.01
        makers["uniform_lam to 0.01"] = partial(grids.uniform_lam, t_min=0.01)
        makers["quadratic_vp to 0.01"] = partial(grids.quadratic_vp, t_min=0.01)
    return makers | {
        "uniform_lam": grids.uniform_lam,
        "karras ρ=3": partial(grids.karras, rho=3.0),
        "uniform_t": grids.uniform_t,
        "power_t(2)": grids.power_t,
    }


@dataclass
class Result:
    """Errors of one solver at one budget on one problem."""

    problem: str
    process: str
    who: str  # ours, default or diffusers
    solver: str
    grid: str
    nfe: int
    spent: int
    median: float
    rmse: float


def ours(name: str, process: str, options: Options) -> Iterator[Result]:
    model, x, truth = problem(name, process, options.points, options.seed)
    size = math.sqrt(x[0].numel())
    nfes = [int(n) for n in options.nfes.split(",")]
    for grid, maker in our_grids(process, options.quick).items():
        for word, solver in our_solvers(options.quick).items():
            for n in nfes:
                for work in work_precision([solver], model, [maker], [n], x=x, truth=truth):
                    yield Result(name, process, "ours", word, grid, n, work.nfe, work.median / size, work.rmse / size)
    for n in nfes:
        solution = ss.solve(model, x, nfe=n)
        yield Result(name, process, "default", "default", "default", n, solution.nfe, *error(solution.x, truth))
    statistics = ss.fitting.estimate_statistics(model, model.sample(256, seed=options.seed + 1))
    orders = (3,) if options.quick else (2, 3)
    informed = {f"DPM-Solver-v3 {p}": ss.solvers.DPMSolverV3(statistics, p) for p in orders}
    for grid, maker in our_grids(process, options.quick).items():
        for word, solver in informed.items():
            for work in work_precision([solver], model, [maker], nfes, x=x, truth=truth):
                errors = work.median / size, work.rmse / size
                yield Result(name, process, "statistics", word, grid, work.nfe, work.nfe, *errors)


def error(x: Tensor, truth: Tensor) -> tuple[float, float]:
    """Median and root mean square, over the states, of the distance per number."""
    gap = (x.double() - truth).flatten(1).norm(dim=1) / math.sqrt(x[0].numel())
    return float(gap.median()), float(gap.square().mean().sqrt())


# diffusers, on VP as a list of a thousand β. States of EDM are those of a VP that ends at σ/α = 80, divided by α.


def vp_of(process: str) -> ss.SDE:
    return ss.VP() if process == "VP" else ss.VP(T=ss.VP(T=2.0).t_of_lam(-math.log(ss.EDM().T)))


def beta_list(sde: ss.SDE, N: int = 1000) -> list[float]:
    log_alpha = sde.log_alpha(torch.linspace(0, sde.T, N + 1, dtype=torch.float64))
    return (-torch.expm1(2 * log_alpha.diff())).tolist()


def their_schedulers(process: str, betas: list[float]) -> Iterator[tuple[str, str, Callable[[], Any]]]:
    import diffusers as d

    spacing = {"linspace": {"timestep_spacing": "linspace"}, "trailing": {"timestep_spacing": "trailing"}}
    sigmas = {**spacing, "karras": {"use_karras_sigmas": True}, "exponential": {"use_exponential_sigmas": True}}
    every = {**sigmas, "lu": {"use_lu_lambdas": True}}
    single = {"linspace": {}, **{grid: sigmas[grid] for grid in ("karras", "exponential")}}
    table: list[tuple[str, Any, dict[str, Any], dict[str, dict[str, Any]]]] = [
        ("DDIM", d.DDIMScheduler, {"clip_sample": False}, spacing),
        ("PNDM", d.PNDMScheduler, {"skip_prk_steps": True}, {"trailing": spacing["trailing"]}),
        ("Euler", d.EulerDiscreteScheduler, {}, sigmas),
        ("Heun", d.HeunDiscreteScheduler, {}, sigmas),
        ("LMS", d.LMSDiscreteScheduler, {}, sigmas),
        ("2M", d.DPMSolverMultistepScheduler, {"solver_order": 2}, every),
        ("3M", d.DPMSolverMultistepScheduler, {"solver_order": 3}, every),
        ("2M noise", d.DPMSolverMultistepScheduler, {"solver_order": 2, "algorithm_type": "dpmsolver"}, sigmas),
        ("3S", d.DPMSolverSinglestepScheduler, {"solver_order": 3}, single),
        ("UniPC-2", d.UniPCMultistepScheduler, {"solver_order": 2}, sigmas),
        ("UniPC-3", d.UniPCMultistepScheduler, {"solver_order": 3}, sigmas),
        ("UniPC-3 bh1", d.UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh1"}, sigmas),
        ("DEIS-2", d.DEISMultistepScheduler, {"solver_order": 2}, sigmas),
        ("DEIS-3", d.DEISMultistepScheduler, {"solver_order": 3}, sigmas),
    ]
    for solver, cls, settings, grid_table in table:
        for grid, more in grid_table.items():
            if solver == "2M noise":
                more = {**more, "final_sigmas_type": "sigma_min"}
            yield solver, grid, partial(cls, trained_betas=betas, **settings, **more)
    if process == "EDM":
        for grid in ("karras", "exponential"):
            edm = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": grid}
            yield "EDM Euler", grid, partial(d.EDMEulerScheduler, **edm)
            for order in (2, 3):
                make = partial(d.EDMDPMSolverMultistepScheduler, solver_order=order, **edm)
                yield f"EDM {order}M", grid, make


def theirs(name: str, process: str, options: Options) -> Iterator[Result]:
    try:
        import diffusers
    except ImportError:
        return
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")
    model, x, truth = problem(name, process, options.points, options.seed)
    vp = vp_of(process)
    for solver, grid, make in their_schedulers(process, beta_list(vp)):
        if options.quick and (solver, grid) not in {("DDIM", "trailing"), ("2M", "karras"), ("EDM 2M", "karras")}:
            continue
        for n in (int(n) for n in options.nfes.split(",")):
            scheduler = make()
            try:
                scheduler.set_timesteps((n + 1) // 2 if solver == "Heun" else n)
                if solver.startswith("EDM"):
                    out, spent = edm_loop(scheduler, model, x)
                else:
                    out, spent = vp_loop(scheduler, model.under(vp), x * vp.alpha(vp.T) / model.sde.alpha(model.sde.T))
            except (ValueError, IndexError, NotImplementedError):
                continue  # the scheduler does not have this grid, or fails on it
            yield Result(name, process, "diffusers", solver, grid, n, spent, *error(out, truth))


def vp_loop(scheduler: Any, model: ss.GaussianMixture, x: Tensor) -> tuple[Tensor, int]:
    """Run a scheduler from a state at T; the state of those in σ/α is x/α."""
    sde = model.sde
    if type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"):
        x = x / sde.alpha(sde.T)
    sigmas = getattr(scheduler, "sigmas", None)
    for i, label in enumerate(scheduler.timesteps):
        if sigmas is None:
            t = (float(label) + 1) * (sde.T / scheduler.config.num_train_timesteps)
        else:
            t = sde.t_of_lam(min(sde.lam(1e-6), max(sde.lam(sde.T), -math.log(sigmas[i]))))
        x = scheduler.step(model.eps(scheduler.scale_model_input(x, label), t), label, x).prev_sample
    return x, len(scheduler.timesteps)


def edm_loop(scheduler: Any, model: ss.GaussianMixture, x: Tensor) -> tuple[Tensor, int]:
    """Run an EDM scheduler, whose network predicts F."""
    s = 0.5
    for i, label in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        root = math.hypot(sigma, s)
        d = model.x0(x, min(sigma, model.sde.T))
        scheduler.scale_model_input(x, label)
        x = scheduler.step((d - (s / root) ** 2 * x) * (root / (sigma * s)), label, x).prev_sample
    return x, len(scheduler.timesteps)


# Results.


def collect(options: Options) -> list[Result]:
    jobs = [(fn, name, process, options) for name in PROBLEMS for process in PROCESSES for fn in (ours, theirs)]
    if options.quick:
        jobs = [job for job in jobs if job[1] != "low rank 192-D"]
    if options.workers < 2:
        return [row for job in jobs for row in results_of(job)]
    jobs.sort(key=lambda job: job[1], reverse=True)  # longest first: low rank, ring, anisotropic
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        return [row for rows in pool.map(results_of, jobs) for row in rows]


def results_of(job: tuple[Any, ...]) -> list[Result]:
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    fn, *rest = job
    return list(fn(*rest))


Case = tuple[str, str, int]


def by_case(rows: list[Result], who: str) -> dict[Case, dict[tuple[str, str], Result]]:
    out: dict[Case, dict[tuple[str, str], Result]] = defaultdict(dict)
    for row in rows:
        if row.who == who and math.isfinite(row.median):
            out[row.problem, row.process, row.nfe][row.solver, row.grid] = row
    return out


def best(of: dict[tuple[str, str], Result], measure: str) -> Result:
    return min(of.values(), key=lambda row: getattr(row, measure))


def mean(ratios: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(r) for r in ratios))


def report(rows: list[Result], options: Options) -> str:
    mine, default, informed, peers = (by_case(rows, who) for who in ("ours", "default", "statistics", "diffusers"))
    nfes = sorted({case[2] for case in mine})
    lines = [
        "# Work and precision",
        "",
        f"{options.points} initial states; error per number, median over the states.",
        "",
    ]
    for case_of in sorted({case[:2] for case in mine}):
        lines += [f"## {case_of[0]}, {case_of[1]}", ""]
        lines += [
            "| NFE | best of ours | median | RMSE | default / best | statistics / best | best of diffusers "
            "| diffusers / best |"
        ]
        lines += ["|--:|:--|--:|--:|--:|--:|:--|--:|"]
        for n in nfes:
            case = (*case_of, n)
            top, used, other = (best(table[case], "median") for table in (mine, default, informed))
            line = (
                f"| {n} | {top.solver}, {top.grid} | {top.median:.2e} | {top.rmse:.2e} "
                f"| {used.median / top.median:.2f} | {other.median / top.median:.2f} |"
            )
            if case in peers:
                peer = best(peers[case], "median")
                line += f" {peer.solver}, {peer.grid} | {peer.median / top.median:.2f} |"
            lines.append(line)
        lines.append("")
    lines += ["## Over all problems and processes (geometric mean; worst)", ""]
    lines += [
        "| NFE | best single pair | its ratio | default | default, RMSE | diffusers' best | default / diffusers |"
    ]
    lines += ["|--:|:--|--:|--:|--:|--:|--:|"]
    for n in [*nfes, 0]:
        cases = [case for case in mine if n in (0, case[2])]
        rank = ranking(mine, cases, "median")
        pair, (average, worst) = rank[0]
        line = f"| {n or 'all'} | {', '.join(pair)} | {average:.2f}; {worst:.2f} |"
        for measure in ("median", "rmse"):
            r = [getattr(best(default[c], measure), measure) / getattr(best(mine[c], measure), measure) for c in cases]
            line += f" {mean(r):.2f}; {max(r):.2f} |"
        shared = [case for case in cases if case in peers]
        if shared:
            r = [best(peers[c], "median").median / best(mine[c], "median").median for c in shared]
            q = [best(default[c], "median").median / best(peers[c], "median").median for c in shared]
            line += f" {mean(r):.2f}; {min(r):.2f} at least | {mean(q):.2f}; {max(q):.2f} |"
        lines.append(line)
    lines += ["", "Pairs by their mean ratio to the frontier, over all budgets:", ""]
    lines += [f"* {', '.join(pair)}: {a:.2f}; {w:.2f}" for pair, (a, w) in ranking(mine, list(mine), "median")[:12]]
    return "\n".join(lines)


def ranking(
    table: dict[Case, dict[tuple[str, str], Result]], cases: list[Case], measure: str
) -> list[tuple[tuple[str, str], tuple[float, float]]]:
    """Pairs of a solver and a grid that have every budget, by their mean ratio to the frontier."""
    pairs = set.intersection(*(set(table[case]) for case in cases))
    floor = {case: getattr(best(table[case], measure), measure) for case in cases}
    scores = {}
    for pair in pairs:
        ratios = [getattr(table[case][pair], measure) / floor[case] for case in cases]
        scores[pair] = (mean(ratios), max(ratios))
    return sorted(scores.items(), key=lambda item: item[1])


def draw(rows: list[Result], page: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tables = {who: by_case(rows, who) for who in ("ours", "statistics", "diffusers", "default")}
    panels = sorted({case[:2] for case in tables["ours"]}, key=lambda c: (c[1], c[0]))
    columns = len({name for name, _ in panels})
    shape = (-(-len(panels) // columns), columns)
    figure, axes = plt.subplots(*shape, figsize=(4.2 * shape[1], 3.4 * shape[0]), squeeze=False)
    styles = {
        "ours": ("C0", "-", "best of ours"),
        "statistics": ("C2", "-.", "with statistics of the data"),
        "diffusers": ("C3", "--", "best of diffusers"),
        "default": ("k", ":", "default"),
    }
    for ax, panel in zip(axes.flat, panels, strict=False):
        for pair in sorted({pair for case in tables["ours"] for pair in tables["ours"][case]}):
            points = [(c[2], of[pair].median) for c, of in tables["ours"].items() if c[:2] == panel and pair in of]
            ax.plot(*zip(*sorted(points), strict=True), color="0.85", lw=0.5, zorder=0)
        for who, (colour, line, label) in styles.items():
            points = sorted((c[2], best(of, "median").median) for c, of in tables[who].items() if c[:2] == panel)
            if points:
                ax.plot(*zip(*points, strict=True), color=colour, ls=line, marker=".", label=label)
        ax.set(xscale="log", yscale="log", title=", ".join(panel), xlabel="evaluations", xticks=NFES)
        ax.set_xticks([], minor=True)
        ax.set_xticklabels(NFES)
        low = min(best(of, "median").median for c, of in tables["ours"].items() if c[:2] == panel)
        ax.set_ylim(low / 2, 1)
    axes[0, 0].legend(fontsize=8)
    for row in axes:
        row[0].set_ylabel("median error per number")
    figure.tight_layout()
    figure.savefig(page, dpi=110)
    plt.close(figure)


def main(options: Options) -> Path:
    rows = collect(options)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "work_precision.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Result.__dataclass_fields__)
        writer.writerows([f"{v:.6g}" if isinstance(v, float) else v for v in vars(row).values()] for row in rows)
    text = report(rows, options)
    (options.out / "work_precision.md").write_text(text + "\n")
    print(text)
    page = options.out / "work_precision.png"
    draw(rows, page)
    print(f"\nfigure: {page}")
    return page


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in vars(Options()).items():
        if name != "quick":
            parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--quick", action="store_true", help="few solvers, budgets and states, for CI")
    given = vars(parser.parse_args())
    if given["quick"]:
        given.update(points=32, nfes="5,10", workers=1)
    return Options(**given)


if __name__ == "__main__":
    main(parse())
