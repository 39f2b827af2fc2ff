"""Samplers of other libraries on any denoiser of this one, from the same states to the same end.

A sampler of diffusers runs on a list of a thousand β; the network is evaluated at the noise level that it intends, not
at the rounded label. Those of k-diffusion run in y = x/α and σ/α. Those of azula run on a schedule of the process. A
library that is not installed is skipped.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import scoresde as ss

Sampler = Callable[[Any, Tensor, int], tuple[Tensor, int] | None]  # model, states, budget -> result, evaluations


def beta_list(sde: ss.SDE, N: int = 1000) -> list[float]:
    log_alpha = sde.log_alpha(torch.linspace(0, sde.T, N + 1, dtype=torch.float64))
    return (-torch.expm1(2 * log_alpha.diff())).clamp_max(0.9999).tolist()


def vp_of(process: str, sde: ss.SDE) -> ss.SDE:
    """A variance-preserving process of the same range: of EDM one that ends at σ/α = 80."""
    return ss.VP(T=ss.VP(T=2.0).t_of_lam(-math.log(sde.T))) if process == "EDM" else sde


# diffusers.

SPACINGS = {name: {"timestep_spacing": name} for name in ("linspace", "leading", "trailing")}
SIGMAS = {**SPACINGS, **{name: {f"use_{name}_sigmas": True} for name in ("karras", "exponential", "beta")}}
SOME = {name: SIGMAS[name] for name in ("trailing", "exponential")}


def schedulers(process: str) -> Iterator[tuple[str, str, Any, dict[str, Any]]]:
    """Every deterministic scheduler, on every spacing; further options one at a time, on two spacings."""
    import diffusers as d

    multi, unipc = d.DPMSolverMultistepScheduler, d.UniPCMultistepScheduler
    deis = d.DEISMultistepScheduler
    table: list[tuple[str, Any, dict[str, Any], dict[str, dict[str, Any]]]] = [
        ("DDIM", d.DDIMScheduler, {"clip_sample": False}, SPACINGS),
        ("PNDM", d.PNDMScheduler, {"skip_prk_steps": True}, SPACINGS),
        ("Euler", d.EulerDiscreteScheduler, {}, SIGMAS),
        ("Heun", d.HeunDiscreteScheduler, {}, SIGMAS),
        ("LMS", d.LMSDiscreteScheduler, {}, SIGMAS),
        *((f"{k}M", multi, {"solver_order": k}, SIGMAS | {"lu": {"use_lu_lambdas": True}}) for k in (2, 3)),
        *((f"UniPC-{k}", unipc, {"solver_order": k}, SIGMAS) for k in (2, 3, 4)),
        *((f"DEIS-{k}", deis, {"solver_order": k}, SIGMAS) for k in (2, 3)),
        ("3S", d.DPMSolverSinglestepScheduler, {"solver_order": 3}, {"linspace": {}, "karras": SIGMAS["karras"]}),
    ]
    noise = {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}
    for k in (2, 3):
        table += [
            (f"{k}M noise", multi, {"solver_order": k, **noise}, SOME),
            (f"{k}M heun", multi, {"solver_order": k, "solver_type": "heun"}, SOME),
            (f"{k}M full last", multi, {"solver_order": k, "lower_order_final": False}, SOME),
            (f"{k}M Euler last", multi, {"solver_order": k, "euler_at_final": True}, SOME),
            (f"UniPC-{k} bh1", unipc, {"solver_order": k, "solver_type": "bh1"}, SOME),
            (f"UniPC-{k} noise", unipc, {"solver_order": k, "predict_x0": False}, SOME),
            (f"UniPC-{k} full last", unipc, {"solver_order": k, "lower_order_final": False}, SOME),
        ]
    for solver, cls, options, grids in table:
        for grid, more in grids.items():
            yield solver, grid, cls, {**options, **more}
    if process == "EDM":
        for grid in ("karras", "exponential"):
            edm = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": grid}
            yield "EDM Euler", grid, d.EDMEulerScheduler, edm
            for order in (2, 3):
                yield f"EDM {order}M", grid, d.EDMDPMSolverMultistepScheduler, {**edm, "solver_order": order}


def of_diffusers(process: str, sde: ss.SDE) -> Iterator[tuple[str, str, Sampler]]:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="diffusers")
    vp = vp_of(process, sde)
    betas = list(sde.betas) if isinstance(sde, ss.Discrete) else beta_list(vp)
    for solver, grid, cls, options in schedulers(process):
        edm = solver.startswith("EDM")
        make = partial(cls, **options) if edm else partial(cls, trained_betas=betas, **options)
        yield solver, grid, partial(scheduled, make, vp)


def scheduled(make: Callable[[], Any], vp: ss.SDE, model: Any, x: Tensor, n: int) -> tuple[Tensor, int] | None:
    scheduler = make()
    try:
        scheduler.set_timesteps((n + 1) // 2 if type(scheduler).__name__ == "HeunDiscreteScheduler" else n)
        if type(scheduler).__name__.startswith("EDM"):
            return edm_loop(scheduler, model, x)
        return vp_loop(scheduler, model.under(vp), x * (vp.alpha(vp.T) / model.sde.alpha(model.sde.T)))
    except (ValueError, IndexError, NotImplementedError, RuntimeError, AssertionError):
        return None  # the scheduler does not have this grid, or fails on it


def vp_loop(scheduler: Any, model: Any, x: Tensor) -> tuple[Tensor, int]:
    """Run a scheduler from a state at T; the state of those in σ/α is x/α."""
    sde = model.sde
    if type(scheduler).__name__ in ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"):
        x = x / sde.alpha(sde.T)
    sigmas, first, last = getattr(scheduler, "sigmas", None), sde.lam(sde.T), sde.lam(1e-6 * sde.T)
    for i, label in enumerate(scheduler.timesteps):
        if sigmas is None:
            t = (float(label) + 1) * (sde.T / scheduler.config.num_train_timesteps)
        else:
            t = sde.t_of_lam(min(last, max(first, -math.log(max(float(sigmas[i]), 1e-12)))))
        x = scheduler.step(model.eps(scheduler.scale_model_input(x, label), t), label, x).prev_sample
    return x, len(scheduler.timesteps)


def edm_loop(scheduler: Any, model: Any, x: Tensor) -> tuple[Tensor, int]:
    """Run an EDM scheduler, whose network predicts F."""
    s = 0.5
    for i, label in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        root = math.hypot(sigma, s)
        d = model.x0(x, min(sigma, model.sde.T))
        scheduler.scale_model_input(x, label)
        x = scheduler.step((d - (s / root) ** 2 * x) * (root / (sigma * s)), label, x).prev_sample
    return x, len(scheduler.timesteps)


# k-diffusion.


@cache
def k_diffusion() -> Any:
    """The samplers of k-diffusion, or None."""
    sys.path.append(str(Path(__file__).parent / "interop"))
    from same_steps_kdiffusion import samplers

    return samplers()


def of_k_diffusion(process: str, sde: ss.SDE) -> Iterator[tuple[str, str, Sampler]]:
    module = k_diffusion()
    if module is None:
        raise ImportError("k_diffusion")
    grids = {"karras": module.get_sigmas_karras, "exponential": module.get_sigmas_exponential}
    for name, stages in (("euler", 1), ("heun", 2), ("dpm_2", 2), ("lms", 1), ("dpmpp_2m", 1)):
        for grid, maker in grids.items():
            yield name, grid, partial(in_sigma, getattr(module, f"sample_{name}"), maker, stages)


def in_sigma(
    sampler: Callable[..., Tensor], maker: Callable[..., Tensor], stages: int, model: Any, x: Tensor, n: int
) -> tuple[Tensor, int]:
    sde, calls = model.sde, 0
    steps = max(1, (n - 1) // stages + 1)
    sigmas = maker(steps, math.exp(-sde.lam(sde.t_min)), math.exp(-sde.lam(sde.T))).double()

    def denoise(y: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        t = sde.t_of_lam(max(sde.lam(sde.T), -math.log(float(sigma[0]))))
        return model.x0(y * sde.alpha(t), t)

    out = sampler(denoise, x / sde.alpha(sde.T), sigmas, disable=True)
    return out, calls


# azula.


def of_azula(process: str, sde: ss.SDE) -> Iterator[tuple[str, str, Sampler]]:
    from azula import sample

    for name, stages, options in (
        ("DDIM", 1, {}),
        ("Heun", 2, {}),
        ("zAB", 1, {"order": 2}),
        ("zAB", 1, {"order": 3}),
        ("vAB", 1, {"order": 2}),
        ("vAB", 1, {"order": 3}),
        ("zEAB", 1, {"order": 2}),
        ("zEAB", 1, {"order": 3}),
    ):
        for clock in ("time", "rectified"):
            word = f"{name}-{options['order']}" if options else name
            yield word, clock, partial(azula_loop, getattr(sample, f"{name}Sampler"), options, stages, clock)


def azula_loop(
    cls: Any, options: dict[str, int], stages: int, clock: str, model: Any, x: Tensor, n: int
) -> tuple[Tensor, int] | None:
    from azula.denoise import Denoiser, DiracPosterior

    sde, calls = model.sde, 0
    rectified = clock == "rectified"
    first = 1 / (1 + math.exp(sde.lam(sde.T))) if rectified else 1.0
    scale = (1 - first) / sde.alpha(sde.T) if rectified else 1.0  # their state over ours, at T

    def levels(t: Tensor) -> tuple[Tensor, Tensor]:
        if rectified:
            return 1 - t, t.clamp_min(1e-5)
        return sde.alpha(t * sde.T), sde.sigma(t * sde.T).clamp_min(1e-5)

    class Exact(Denoiser):
        schedule = staticmethod(levels)

        def forward(self, y: Tensor, t: Tensor, **_: Any) -> Any:
            nonlocal calls
            calls += 1
            alpha, sigma = map(float, levels(t))
            u = sde.t_of_lam(min(sde.lam(1e-6 * sde.T), max(sde.lam(sde.T), math.log(alpha / sigma))))
            return DiracPosterior(model.x0(y * (sde.alpha(u) / alpha), u))

    steps = max(1, n // stages)
    sampler = cls(Exact(), start=first, stop=0.0, steps=steps, silent=True, dtype=torch.float64, **options)
    try:
        out = sampler(x * scale)
    except (ValueError, IndexError, RuntimeError):
        return None
    return out, calls


LIBRARIES = {"diffusers": of_diffusers, "k-diffusion": of_k_diffusion, "azula": of_azula}


def installed() -> list[str]:
    """Names of the libraries that can be imported; prints a line for each of the others."""
    found = []
    for name, samplers in LIBRARIES.items():
        try:
            next(iter(samplers("VP", ss.VP())))
            found.append(name)
        except ImportError:
            print(f"{name} is not installed; its samplers are left out.", flush=True)
    return found
