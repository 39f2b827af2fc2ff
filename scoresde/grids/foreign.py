"""Grids of other libraries: noise levels of k-diffusion, and the times of a scheduler of diffusers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._doors import checked
from scoresde.grids.grid import check_grid, times_of_lam
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import EDM, VP, Cosine, Trig
from scoresde.processes.sde import SDE


class _Scheduler(Protocol):
    """What is read of a scheduler; its levels `sigmas` are optional."""

    config: Mapping[str, object]
    timesteps: Tensor


_ROUNDING = 1e-3  # largest relative error of a level in float32: 1 − ᾱ cancels near the data

_REMAPPED = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@checked
def from_sigmas(sde: SDE, sigmas: Tensor | Sequence[float]) -> Tensor:
    r"""Grid at given noise levels :math:`\sigma/\alpha`, which k-diffusion, EDM and ComfyUI call σ.

    A last level of 0 is t = 0. Levels beyond the process by float32 rounding are its ends. On a flow, diffusers calls
    the time σ: give such a list as the grid itself.

    Arguments:
        sde: The process.
        sigmas: Decreasing levels, N + 1 numbers; infinity where no signal is left.

    Example:
        >>> import scoresde as ss
        >>> ss.grids.from_sigmas(ss.EDM(), [80.0, 1.0, 0.0]).tolist()
        [80.0, 1.0, 0.0]
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE such as VP(), got {type(sde).__name__}.")
    levels = torch.as_tensor(sigmas).detach().cpu().double()
    if levels.ndim != 1 or len(levels) < 2 or bool((levels < 0).any() or levels.isnan().any()):
        raise ValueError("`sigmas` must be a list of at least 2 numbers, none of them negative.")
    return check_grid(sde, _times_of_levels(sde, levels))


def _times_of_levels(sde: SDE, levels: Tensor) -> Tensor:
    """Times of levels σ/α; raise an error for levels that the process does not reach."""
    largest = math.exp(-sde.lam(sde.T))
    if bool((levels > largest * (1 + _ROUNDING)).any()):
        raise ValueError(
            f"`sigmas` must be at most {largest:.6g}, the level σ/α of {type(sde).__name__} at T = {sde.T:g}, got "
            f"{float(levels.max()):g}; cut them, or use a process that reaches it, such as EDM(T=...)."
        )
    times = times_of_lam(sde, -levels.log())
    return torch.where(levels == 0, torch.zeros_like(times), times)


@checked
def from_scheduler(sde: SDE | object, steps: int | None, scheduler: object, *, mu: float | None = None) -> Tensor:
    r"""Grid of a scheduler of diffusers: the times between which it steps, in the time of this library.

    The scheduler is copied and its ``set_timesteps`` is called, so that spacings, Karras, exponential and beta levels,
    offsets and shifts are its own. A flow shift is in the grid as often as the scheduler applies it: the lowest level
    of ``FlowMatchEulerDiscreteScheduler`` is shifted twice. Repeated labels of Heun's, KDPM2's and PNDM's schedulers
    are stages of one step, so each occurs once, and stages between labels do not occur. Nor does a last step between
    equal levels, as with Karras levels and ``final_sigmas_type="sigma_min"``.

    - On a β list an integer label k is the time k + 1, and another level is the time with the same σ/α. The levels are
      those of the states: with Karras levels the scheduler rounds the labels that it gives to the network.
    - The last time is 0 if the scheduler steps to the data, or 1, that of label 0, if it does not, as with
      ``set_alpha_to_one=False``, ``final_sigmas_type="sigma_min"`` or ``TCDScheduler``.

    Arguments:
        sde: The process, or a denoiser with it, as from :func:`from_diffusers`.
        steps: Number of steps, ``num_inference_steps``; None for the times that the scheduler has, as after a call of
            its ``set_timesteps`` with levels of your own.
        scheduler: Scheduler of diffusers.
        mu: Shift of ``use_dynamic_shifting``, which pipelines compute from the resolution.

    Returns:
        Times, (N + 1,).
    """
    sde = cast(SDE, getattr(sde, "sde", sde))
    if not isinstance(sde, SDE):
        raise TypeError(f"`sde` must be an SDE or a denoiser, got {type(sde).__name__}.")
    if not hasattr(scheduler, "set_timesteps") or not isinstance(getattr(scheduler, "config", None), Mapping):
        raise TypeError(f"`scheduler` must be a scheduler of diffusers, got {type(scheduler).__name__}.")
    made = copy.deepcopy(scheduler)
    if steps is not None:
        made.set_timesteps(check.integer("steps", steps, at_least=1), **({} if mu is None else {"mu": mu}))
        if hasattr(made, "set_sigmas"):  # that of score_sde has its levels apart
            made.set_sigmas(steps)
    return check_grid(sde, _times(sde, cast(_Scheduler, made)))


def _times(sde: SDE, made: _Scheduler) -> Tensor:
    name, config = type(made).__name__, made.config
    if "Inverse" in name or name in ("RePaintScheduler", "KarrasVeScheduler"):
        reason = {
            "RePaintScheduler": "goes up and down; use ss.grids.repaint",
            "KarrasVeScheduler": "has squares of levels as its levels; use ss.grids.uniform_lam",
        }.get(name, "runs from the data to noise; use that for sampling, and ss.encode")
        raise ValueError(f"`scheduler` is a {name}, which {reason}.")
    sigmas = getattr(made, "sigmas", None)
    if isinstance(sigmas, Tensor):
        levels = sigmas.detach().cpu().double().clone()
        if config.get("use_flow_sigmas") or not isinstance(sde, Discrete | EDM):
            return _distinct(1 - levels if config.get("invert_sigmas") else levels)
        if isinstance(sde, EDM):
            if name == "CMStochasticIterativeScheduler":  # it adds the noise of a level without that of the lowest
                levels[-1] = 0.0
            grid = _distinct(_times_of_levels(sde, levels))
            return grid if grid[-1] == 0 or config.get("final_sigmas_type") == "sigma_min" else _ending(grid, 0.0)
        return _of_labels_and_levels(sde, made, levels)
    labels = made.timesteps.detach().cpu().double()
    if isinstance(sde, Discrete):
        whole = labels[(labels >= 0) & (labels == labels.round())]
        if name == "PNDMScheduler":  # its labels with those of stages
            whole = torch.as_tensor(vars(made)["_timesteps"]).double()
        # Whatever `set_alpha_to_one` is, the last step of TCD goes to label 0, and that of LCM to the data.
        ends = {"TCDScheduler": 1.0, "LCMScheduler": 0.0}
        last = ends.get(name, 1.0 if config.get("set_alpha_to_one") is False else 0.0)
        times = whole.unique().flip(0) + 1
        return times if times[-1] == last else _ending(times, last)
    return _of_continuous_labels(sde, labels, config)


def _of_labels_and_levels(sde: Discrete, made: _Scheduler, levels: Tensor) -> Tensor:
    """Times of a scheduler on a β list that has labels and levels."""
    labels = made.timesteps.detach().cpu().double()
    paired = len(labels) + 1 == len(levels) and len(levels.unique()) == len(levels)
    remapped = any(made.config.get(key) for key in _REMAPPED)
    if paired and not remapped:
        ends = _times_of_levels(sde, levels[-1:])
        inner = [
            torch.tensor([k + 1]).double() if k == round(k) else _times_of_levels(sde, level[None])
            for k, level in zip(labels.tolist(), levels, strict=False)
            if k >= 0
        ]
        times = torch.cat([*inner, ends])
    else:
        times = _times_of_levels(sde, _distinct(levels))
    near = times.round()
    at_label = (times - near).abs() < 0.01  # float32 levels of labels
    at_label[:-1] &= not remapped
    times = torch.where(at_label, near, times)
    return _distinct(torch.where(times < 1e-9, torch.zeros_like(times), times))


def _of_continuous_labels(sde: SDE, labels: Tensor, config: Mapping[str, object]) -> Tensor:
    """Times of a scheduler whose labels are a continuous time."""
    if isinstance(sde, VP):
        return labels.clamp(max=sde.T)
    if isinstance(sde, Cosine):
        k = float(cast(float, config.get("scaler", 1.0)))
        times = 1 - (1 - labels) ** k if k > 1 else labels**k
        return _distinct(times.clamp(max=sde.T))
    if isinstance(sde, Trig):
        return labels if labels[-1] == 0 else _ending(labels, 0.0)
    return labels.sin() / (labels.sin() + labels.cos().clamp_min(0))  # angles of TrigFlow


def _ending(times: Tensor, last: float) -> Tensor:
    return torch.cat([times, times.new_tensor([last])])


def _distinct(values: Tensor) -> Tensor:
    """The values without those that are not below the value before."""
    keep = torch.cat([torch.ones(1, dtype=torch.bool), values.diff() < 0])
    return values[keep]
