"""Solvers in the calling form of k-diffusion, for the tools that are built on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde import solvers
from scoresde._doors import checked
from scoresde._progress import Bar
from scoresde.interop.normals import Drawn
from scoresde.interop.timetable import step_starts
from scoresde.noise.keyed import Noise
from scoresde.noise.streams import Stream
from scoresde.plan.paused import begin, tell
from scoresde.plan.rows import as_number
from scoresde.plan.run import Normals
from scoresde.plan.table import Plan
from scoresde.processes.named import EDM
from scoresde.solvers.rule import Solver

NoiseSampler = Callable[[Tensor, Tensor], Tensor]

Callback = Callable[[dict[str, object]], object]


@dataclass(frozen=True)
class KDiffusionSampler:
    """A sampler ``sample(model, x, sigmas, ...)`` that runs a solver; made by :func:`kdiffusion_sampler`.

    The signature has `eta` if the solver has it, and `s_noise` and `noise_sampler` if the solver draws noise, because
    tools look there for what a sampler accepts.

    Arguments:
        solver: Solver.
    """

    solver: Solver

    @property
    def __name__(self) -> str:
        return f"sample_{self.solver!r}"

    @property
    def __signature__(self) -> inspect.Signature:
        stochastic = self.solver.plan(EDM(), [80.0, 10.0, 1.0, 0.0]).stochastic
        absent = set() if _has_eta(self.solver) else {"eta"}
        absent |= set() if stochastic or _has_eta(self.solver) else {"s_noise", "noise_sampler"}
        whole = inspect.signature(type(self).__call__)
        return whole.replace(parameters=[p for p in whole.parameters.values() if p.name not in {"self", *absent}])

    @torch.no_grad()
    def __call__(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, object] | None = None,
        callback: Callback | None = None,
        disable: bool | None = None,
        eta: float | None = None,
        s_noise: float = 1.0,
        noise_sampler: NoiseSampler | None = None,
    ) -> Tensor:
        """Sample from noise to data.

        Arguments:
            model: Function ``model(x, sigma, **extra_args)`` of a state x_0 + σ n and its levels (B,), which returns
                the denoised state.
            x: State at the first level, (B, *event).
            sigmas: Decreasing noise levels, the last one often 0.
            extra_args: Further arguments of the model.
            callback: Function of a dictionary with ``x``, ``i``, ``sigma``, ``sigma_hat`` and ``denoised``, called at
                the first evaluation of each step.
            disable: Whether to hide the progress bar.
            eta: Stochasticity η of the solver, by default its own. ``ss.SDEDPMSolverPP`` has √η where k-diffusion's
                ``sample_dpmpp_2m_sde`` and ``sample_dpmpp_3m_sde`` have η.
            s_noise: Factor on the noise.
            noise_sampler: Function of two levels that returns standard normals of the shape of `x`. By default they
                are keyed by ``extra_args["seed"]`` if there is one, and otherwise come from torch's global generator.
        """
        arguments = dict(extra_args or {})
        times = torch.as_tensor(sigmas, dtype=torch.float64).detach().cpu()
        plan = with_options(self.solver, eta, s_noise).plan(EDM(T=float(times.max())), times)
        # These solvers have the factor in their plan.
        scale = 1.0 if _has_field(self.solver, "s_noise") else check.number("s_noise", s_noise, at_least=0)
        state = x if x.dtype in check.FLOATS else x.float()
        run = begin(plan, state, _normals(plan, noise_sampler, scale, arguments.get("seed")))
        first = {evaluation: step for evaluation, step, _ in step_starts(plan, times)}
        with Bar(not disable, len(times) - 1, repr(self.solver), "step") as bar:
            while not run.done:
                level = torch.full((len(x),), as_number(run.t), dtype=x.dtype, device=x.device)
                denoised = model(run.x.to(x.dtype), level, **arguments)
                if (i := first.get(run.nfe)) is not None:
                    if callback is not None:
                        known = {"sigma": sigmas[i], "sigma_hat": level[0]}
                        callback({"x": run.x, "i": i, **known, "denoised": denoised})
                    bar.to(i + 1)
                run = tell(run, denoised.to(state.dtype))
        return run.x.to(x.dtype)


@checked
def kdiffusion_sampler(solver: Solver) -> KDiffusionSampler:
    """A sampler in the form of k-diffusion, ``sample(model, x, sigmas, extra_args, callback, disable)``.

    The state is x_0 + σ n, whatever process the network was trained on: for a VP network it is x_t/α, and σ is σ_t/α_t,
    as the wrappers of k-diffusion have it. The times of the solver are the levels that the caller gives.

    Arguments:
        solver: Solver such as ``ss.UniPC(3)``.

    Example:
        >>> import torch, scoresde as ss
        >>> data = ss.GaussianMixture(ss.EDM(), torch.tensor([[-1.0], [1.0]]), std=0.1)
        >>> sample_unipc = ss.interop.kdiffusion_sampler(ss.UniPC(3))
        >>> sigmas = torch.tensor([80.0, 10.0, 2.0, 0.5, 0.1, 0.0])
        >>> x = sample_unipc(data.x0, 80.0 * torch.randn(4, 1), sigmas, disable=True)
        >>> bool(((x.abs() - 1).abs() < 0.5).all())
        True
    """
    if not isinstance(solver, Solver):
        raise TypeError(f"`solver` must be a solver such as UniPC(3), got {type(solver).__name__}.")
    return KDiffusionSampler(solver)


def with_options(solver: Solver, eta: float | None, s_noise: float) -> Solver:
    """The solver with another stochasticity and another factor on the noise, if it has these options.

    Arguments:
        solver: Solver.
        eta: Stochasticity, or None for that of the solver.
        s_noise: Factor on the noise; 1 leaves that of the solver.
    """
    changes: dict[str, float] = {}
    if eta is not None:
        if not _has_eta(solver):
            raise ValueError(f"`eta` has no meaning with {solver!r}, got {eta}; drop it, or use a stochastic solver.")
        changes["eta"] = check.number("eta", eta, at_least=0)
    if s_noise != 1.0 and _has_field(solver, "s_noise"):
        changes["s_noise"] = check.number("s_noise", s_noise, at_least=0)
    return replace(solver, **changes) if changes else solver  # type: ignore[arg-type]


def _has_field(solver: Solver, name: str) -> bool:
    return any(f.name == name for f in fields(solver))


def _has_eta(solver: Solver) -> bool:
    """Whether a user can choose `eta`: in the function that made the solver, or in its class."""
    if not _has_field(solver, "eta"):
        return False
    maker = getattr(solvers, solver.made_by.text.split("(")[0], None) if solver.made_by else type(solver)
    return maker is None or "eta" in inspect.signature(maker).parameters


def _normals(plan: Plan, sampler: NoiseSampler | None, scale: float, seed: object) -> Normals | None:
    if not plan.stochastic:
        return None
    if sampler is None and isinstance(seed, int):
        keyed = Noise(seed).fork(Stream.STEPS)
        return Drawn(plan, lambda x, draw, s, t: keyed.like(x, draw), scale)
    if sampler is None:
        return Drawn(plan, lambda x, draw, s, t: torch.randn_like(x), scale)
    return Drawn(plan, lambda x, draw, s, t: sampler(x.new_tensor(s), x.new_tensor(t)).to(x.dtype), scale)
