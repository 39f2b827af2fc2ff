"""Every scheduler of diffusers beside our solver: the largest difference of the results, in one table.

    python experiments/interop/same_steps.py            # 10 s; prints the table, writes it into docs/schedulers.md
    python experiments/interop/same_steps.py --quick    # some rows, prints only

Both start at the same states, take 10 steps and get the same normals, in the same order. The network is exact for a
Gaussian mixture, in float64, at the level of the state. Where the scheduler has a table of levels in float32, the same
levels in float64 replace it; many schedulers keep their states or some levels in float32 nevertheless. A row with
"equal" has a difference that this rounding explains; the script fails if it is larger than the bound `EQUAL`.
"""

from __future__ import annotations

import argparse
import inspect
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

import scoresde as ss
from scoresde import interop
from scoresde.plan.run import run
from scoresde.solvers import NOISE, VELOCITY, Solver
from scoresde.solvers.runge_kutta import HEUN, RungeKutta

PAGE = Path(__file__).parents[2] / "docs" / "schedulers.md"
BEGIN, END = "<!-- the table of experiments/interop/same_steps.py -->", "<!-- end of the table -->"
STEPS = 10
EQUAL = 1e-5  # ten steps, each with a relative rounding of float32, 6e-8, that a step amplifies by up to 16

Grid = Callable[[ss.SDE, Any], Tensor]


@dataclass(frozen=True)
class Row:
    """A scheduler with options, and the solver and grid that take its steps.

    Arguments:
        name: Name of the class, without "Scheduler".
        solver: Our solver.
        options: Arguments of the class.
        step: Arguments of its `step`.
        grid: Grid of a process and a scheduler; None for ``grids.from_scheduler``.
        grid_name: Text for the table.
        note: Remark for the table, where the results are not equal, or need more words.
        equal: Whether the results are equal to rounding.
    """

    name: str
    solver: Solver
    options: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)
    grid: Grid | None = None
    grid_name: str = "`from_scheduler`"
    note: str = ""
    equal: bool = True


FULL = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}
OPEN = {"clip_sample": False}


def times_of(sde: ss.SDE, made: Any) -> Tensor:
    return ss.grids.from_scheduler(sde, None, made)


def ancestral(eta: float) -> tuple[Grid, str]:
    def grid(sde: ss.SDE, made: Any) -> Tensor:
        return ss.grids.ancestral(sde, times_of(sde, made), eta)

    return grid, f"`ancestral` of it, eta = {eta:g}"


def tcd(eta: float) -> Grid:
    """Times of TCD: from each label below the next one, then up to it with fresh noise."""

    def grid(sde: ss.SDE, made: Any) -> Tensor:
        labels = [*made.timesteps.tolist(), 0]
        times = [labels[0] + 1.0]
        for k in labels[1:]:
            times += [math.floor((1 - eta) * k) + 1.0, k + 1.0]
        return ss.grids.zigzag(times[:-1])

    return grid


def ltx(sde: ss.SDE, made: Any) -> Tensor:
    """Times of LTX: to σ'² / σ, then up to σ' with fresh noise."""
    times = [float(made.sigmas[0])]
    for high, low in pairwise(made.sigmas.tolist()):
        times += [low * low / high, low] if low > 0 else [0.0]
    return ss.grids.zigzag(times)


def rows() -> list[Row]:
    s, multi, out = ss.solvers, "DPMSolverMultistep", []
    for name in ("DDIM", "DDIMParallel"):
        out.append(Row(name, ss.DDIM(), OPEN))
        out.append(Row(name, ss.DDIM(), {**OPEN, "set_alpha_to_one": False}))
        out.append(Row(name, ss.DDIM(), OPEN, {"eta": 1.0}, *ancestral(1.0)))
    out.append(Row("CogVideoXDDIM", ss.DDIM(), {**OPEN, "prediction_type": "epsilon"}))
    for name in ("DDPM", "DDPMParallel"):
        out.append(Row(name, ss.DDPM(), OPEN))
        out.append(Row(name, ss.DDPM("large"), {**OPEN, "variance_type": "fixed_large"}))
    out.append(Row("PNDM", s.PNDM(), {"set_alpha_to_one": False}))
    out.append(Row("PNDM", replace(s.PLMS(), improved=True), {"set_alpha_to_one": False, "skip_prk_steps": True}))
    for p in (1, 2, 3):
        out.append(Row("DEISMultistep", s.DEIS(p, "lam"), {"solver_order": p, "lower_order_final": False}))
    kinds: dict[str, Any] = {
        "dpmsolver++": ss.DPMSolverPP,
        "dpmsolver": s.DPMSolver,
        "sde-dpmsolver++": ss.SDEDPMSolverPP,
        "sde-dpmsolver": s.SDEDPMSolver,
    }
    out.append(Row(multi, ss.DPMSolverPP(2), {"solver_order": 2}))
    for kind, make in kinds.items():
        more = {} if kind.startswith("sde") else {"kind": "multi"}
        first = make(1) if more == {} else ss.DDIM()
        out.append(Row(multi, first, {"algorithm_type": kind, "solver_order": 1, **FULL}))
        for theirs, form in (("midpoint", "mid"), ("heun", "exact")):
            out.append(Row(multi, make(2, form=form, **more), {"algorithm_type": kind, "solver_type": theirs, **FULL}))
        if kind == "sde-dpmsolver++":
            note = "the sign of their third term is wrong: their order is 1"
            options = {"algorithm_type": kind, "solver_order": 3, "solver_type": "heun", **FULL}
            out.append(Row(multi, make(3, form="published"), options, note=note, equal=False))
        elif kind != "sde-dpmsolver":
            options = {"algorithm_type": kind, "solver_order": 3, **FULL}
            out.append(Row(multi, make(3, form="published", **more), options))
    out.append(Row("EulerDiscrete", ss.DDIM()))
    out.append(Row("EulerAncestralDiscrete", s.EulerAncestral()))
    out.append(Row("HeunDiscrete", ss.EDMHeun()))
    out.append(Row("KDPM2Discrete", s.DPM2()))
    out.append(Row("KDPM2AncestralDiscrete", s.DPM2Ancestral()))
    out.append(Row("LMSDiscrete", s.LMS(4)))
    independent = "independent normals; theirs come from a Brownian tree, ours with `one_path=True` from a path"
    out.append(Row("DPMSolverSDE", s.DPMPPSDE(one_path=False), note=independent))
    out.append(Row("UniPCMultistep", ss.UniPC(2)))
    for p in (1, 2, 3):
        for variant in ("bh1", "bh2"):
            out.append(Row("UniPCMultistep", ss.UniPC(p, variant), {"solver_order": p, "solver_type": variant, **FULL}))
    noise = {"solver_order": 2, "predict_x0": False, **FULL}
    out.append(Row("UniPCMultistep", ss.UniPC(2, prediction=NOISE), noise))
    for p, c in ((1, 2), (2, 2), (3, 4)):
        options = {"predictor_order": p, "corrector_order": c, "tau_func": one, "lower_order_final": False}
        out.append(Row("SASolver", s.SASolver(p, c, 1.0, form="end"), options))
    out.append(Row("EDMEuler", ss.DDIM()))
    for p in (1, 2):
        solver = ss.DDIM() if p == 1 else ss.DPMSolverPP(2)
        out.append(Row("EDMDPMSolverMultistep", solver, {"solver_order": p, "final_sigmas_type": "zero"}))
    out.append(Row("FlowMatchEulerDiscrete", ss.DDIM()))
    out.append(Row("FlowMatchEulerDiscrete", ss.DDIM(), {"shift": 3.0}))
    out.append(Row("FlowMatchHeunDiscrete", RungeKutta(HEUN, VELOCITY)))
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    out.append(Row("UniPCMultistep", ss.UniPC(2), flow))
    out.append(Row(multi, ss.DPMSolverPP(2), flow))
    out.append(Row("FlowMapEulerDiscrete", ss.DDIM()))
    out.append(Row("MiniMaxH3", ss.DDIM()))
    out.append(Row("LTXEulerAncestralRF", ss.DDIM(), {}, {}, ltx, "`zigzag`: below each time, and up to it"))
    trees = "normals as above; theirs come from a Brownian tree"
    out.append(Row("CosineDPMSolverMultistep", ss.SDEDPMSolverPP(2), note=trees))
    out.append(Row("FlowMatchLCM", s.ConsistencySampling()))
    out.append(Row("LCM", s.ConsistencySampling(), OPEN))
    out.append(Row("LCM", s.ConsistencySampling(), {**OPEN, "set_alpha_to_one": False}))
    out.append(Row("TCD", ss.DDIM(), OPEN, {"eta": 0.0}))
    out.append(Row("TCD", ss.DDIM(), OPEN, {"eta": 0.3}, tcd(0.3), "`zigzag`: below each label, and up to it"))
    return out


UNMATCHED = {
    "DDIMInverse": "it evaluates the network at the label to which it goes, not at that of the state; use `ss.encode`",
    "DPMSolverMultistepInverse": "it runs to noise; use `ss.encode`, with single steps, which can be inverted",
    "DPMSolverSinglestep": "its stages are labels, so each step has other fractions; joined plans of "
    "`solvers.SingleStep` are equal (`tests/interop/test_diffusers.py`)",
    "IPNDM": "its first step, from α = 0, leaves the data out; from the second label on `solvers.IPNDM(4)` is equal "
    "(`tests/interop/test_diffusers.py`)",
    "CogVideoXDPM": "not measured: its step needs the data prediction of the step before",
    "CMStochasticIterative": "the noise of its states is √(σ² − σ_min²) at σ; see `solvers.ConsistencySampling`",
    "SCM": "not measured: for consistency networks of TrigFlow; see `solvers.ConsistencySampling`",
    "DDPMWuerstchen": "not measured: DDPM on a continuous cosine",
    "UnCLIP": "not measured: DDPM with learned variances; see `sampling.LearnedVariance`",
    "ScoreSdeVe": "its corrector's step depends on the norms of the states, so no plan can hold it",
    "KarrasVe": "not measured: churn; see `solvers.EDMStochastic`",
    "RePaint": "it needs an image with a mask; see `grids.repaint` and `inverse.Replacement`",
    "Piflow": "a policy of several predictions, not a solver",
    "RFD4Proteina": "two clocks",
    "Helios": "another process at each stage",
    "HeliosDMD": "another process at each stage",
    **dict.fromkeys(
        ("Amused", "BlockRefinement", "DiscreteDDIM", "EntropyBound", "VQDiffusion"),
        "discrete tokens, no Gaussian process",
    ),
}


def one(t: Tensor) -> float:
    return 1.0


class Normals:
    """The same normals for both: the k-th draw of a run is number k."""

    path = False

    def __init__(self, x: Tensor) -> None:
        self.x, self.k = x, 0
        self.drawn: dict[int, Tensor] = {}

    def next(self) -> Tensor:
        self.k += 1
        return ss.Noise(1).normal(self.x.shape, self.k, dtype=torch.float64)

    def like(self, x: Tensor, draw: int) -> Tensor:
        if draw not in self.drawn:  # a corrector reads the normal of its predictor again
            self.drawn[draw] = self.next()
        return self.drawn[draw]


def measure(row: Row) -> float:
    """Largest difference of the two results, divided by the root mean square of ours."""
    made = getattr(diffusers, f"{row.name}Scheduler")(**row.options)
    sde = interop.sde_from_diffusers(made)
    made.set_timesteps(STEPS)
    grid = (row.grid or times_of)(sde, made)
    sharpen(made, sde)
    model = ss.GaussianMixture(
        sde, [[1.0, -0.5], [-1.2, 0.3], [0.2, 1.1]], std=[0.5, 0.4, 0.6], weights=[1.0, 2.0, 1.5]
    )
    x = sde.sigma(float(grid[0])) * ss.Noise(0).normal((8, 2), 0, dtype=torch.float64)
    normals: Any = Normals(x)
    ours = run(row.solver.plan(sde, grid), model.x0, x, normals)
    other = follow(made, model, x, Normals(x), row.step)
    if over_alpha(made, sde):
        other = sde.alpha(float(grid[-1])) * other
    return float((other - ours).abs().max() / ours.square().mean().sqrt())


def sharpen(made: Any, sde: ss.SDE) -> None:
    """Replace levels in float32 by the same levels in float64."""
    if isinstance(sde, ss.Discrete):
        made.alphas_cumprod = sde.alpha(torch.arange(sde.N).double() + 1) ** 2
        if hasattr(made, "final_alpha_cumprod") and not made.config.get("set_alpha_to_one", True):
            made.final_alpha_cumprod = made.alphas_cumprod[0]
        if isinstance(getattr(made, "sigmas", None), Tensor):
            levels = torch.cat([(1 / made.alphas_cumprod - 1).sqrt().flip(0), torch.zeros(1).double()])
            nearest = (levels - made.sigmas.double()[:, None]).abs().argmin(1)
            close = (levels[nearest] - made.sigmas).abs() <= 1e-3 * made.sigmas
            made.sigmas = torch.where(close, levels[nearest], made.sigmas.double())
    elif isinstance(getattr(made, "sigmas", None), Tensor):
        made.sigmas = made.sigmas.double()


def over_alpha(made: Any, sde: ss.SDE) -> bool:
    """Whether its states are x/α."""
    return isinstance(sde, ss.Discrete) and float(made.init_noise_sigma) != 1


def level_of(made: Any, index: int) -> float | None:
    """Level σ/α of the state before a step, if the scheduler has a table of levels; stages are between its entries."""
    if not isinstance(getattr(made, "sigmas", None), Tensor):
        return None
    if not getattr(made, "state_in_first_order", True) and hasattr(made, "sigmas_interpol"):
        inner = made.sigmas_interpol
        return float(inner[made.step_index - (len(inner) < len(made.sigmas) or "Ancestral" in type(made).__name__)])
    if not getattr(made, "state_in_first_order", True) and hasattr(made, "mid_point_sigma"):
        return float(made.mid_point_sigma)
    return float(made.sigmas[index])


def follow(made: Any, model: ss.GaussianMixture, x: Tensor, normals: Normals, step: dict[str, Any]) -> Tensor:
    """Run a scheduler on the exact prediction of a model."""
    sde, module = model.sde, inspect.getmodule(type(made))
    drawn = getattr(module, "randn_tensor", None)
    if drawn is not None:
        module.randn_tensor = lambda *args, **kwargs: normals.next()  # type: ignore[union-attr]
    if hasattr(made, "noise_sampler"):
        made.noise_sampler = lambda *args: normals.next()
    if over := over_alpha(made, sde):
        x = x / sde.alpha(sde.t_of_lam(-math.log(float(made.sigmas[0]))))
    try:
        for index, label in enumerate(made.timesteps):
            t = time_of(made, sde, level_of(made, index), label)
            state = sde.alpha(t) * x if over else x
            x0 = model.x0(state, t)
            x = made.step(output(made, sde, state, x0, t), label, x, **step).prev_sample.double()
    finally:
        if drawn is not None:
            module.randn_tensor = drawn  # type: ignore[union-attr]
    return x


def time_of(made: Any, sde: ss.SDE, level: float | None, label: Tensor) -> float:
    if level is None:
        return float(label) + 1
    return level if isinstance(sde, ss.Flow | ss.EDM) else float(sde.t_of_lam(-math.log(level)))


def output(made: Any, sde: ss.SDE, x: Tensor, x0: Tensor, t: float) -> Tensor:
    """What a network of the scheduler returns, if its data prediction is x0."""
    if isinstance(sde, ss.EDM):
        data, sign = made.config.sigma_data, -1 if made.config.prediction_type == "v_prediction" else 1
        return sign * (x0 - data**2 / (t**2 + data**2) * x) / (t * data / math.hypot(t, data))
    if isinstance(sde, ss.Flow):
        return (x - x0) / t * (-1 if isinstance(made, diffusers.MiniMaxH3Scheduler) else 1)
    return (x - sde.alpha(t) * x0) / sde.sigma(t)


def columns(row: Row) -> list[str]:
    """First columns of the table: scheduler, its options, our solver, our grid."""
    shown = {name: one.__name__ if value is one else repr(value) for name, value in {**row.options, **row.step}.items()}
    options = ", ".join(f"{name}={value}" for name, value in shown.items())
    return [row.name, f"`{options}`" if options else "", f"`{row.solver!r}`", row.grid_name]


def lines(chosen: list[Row]) -> Iterator[str]:
    yield "| scheduler | its options | our solver | our grid | difference | |"
    yield "|---|---|---|---|---|---|"
    for row in chosen:
        value = measure(row)
        if row.equal and not value < EQUAL:
            raise AssertionError(f"{row} differs by {value:.1e}, which rounding does not explain.")
        remark = "; ".join(filter(None, ["equal" if row.equal else "", row.note]))
        yield f"| {' | '.join(columns(row))} | {value:.0e} | {remark} |"


def main(quick: bool) -> None:
    warnings.filterwarnings("ignore")  # deprecations of diffusers, and few steps
    diffusers.utils.logging.set_verbosity_error()
    chosen = rows()[::9] if quick else rows()
    table = "\n".join(lines(chosen))
    others = "\n".join(f"| {name} | {reason} |" for name, reason in sorted(UNMATCHED.items()))
    text = f"{table}\n\nNot in the table:\n\n| scheduler | reason |\n|---|---|\n{others}"
    print(text)
    if not quick:
        page = PAGE.read_text()
        PAGE.write_text(page[: page.index(BEGIN)] + f"{BEGIN}\n\n{text}\n\n" + page[page.index(END) :])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    main(parser.parse_args().quick)
