"""Networks and schedules of the diffusers library as denoisers and processes; diffusers itself is never imported."""

from __future__ import annotations

from typing import cast

from scoresde._doors import checked
from scoresde.denoisers.clocks import Affine
from scoresde.denoisers.network import Denoiser
from scoresde.interop.diffusers_networks import SHARED, DiffusersNet, call_of, doubles_channels, label_of
from scoresde.interop.diffusers_schedules import Config, config_of, read_schedule
from scoresde.interop.networks import Net
from scoresde.processes.discrete import Discrete
from scoresde.processes.named import Flow
from scoresde.processes.sde import SDE


@checked
def sde_from_diffusers(scheduler: object) -> SDE:
    r"""Process of a scheduler of diffusers.

    =========================================================  ==================================================
    scheduler                                                  process
    =========================================================  ==================================================
    DDPM, DDIM, DPM-Solver, UniPC, Euler, PNDM, LCM, TCD, …    :class:`Discrete`, with CogVideoX's shift
    ``FlowMatch…``, and all with ``use_flow_sigmas``           :class:`Flow`; the shift belongs to the grid
    EDMEuler, EDMDPM, CosineDPM, CMStochasticIterative,        :class:`EDM` from sigma_min to sigma_max
    ScoreSdeVe, KarrasVe, Euler with continuous labels
    ScoreSdeVp; DDPMWuerstchen; IPNDM                          :class:`VP`; :class:`Cosine`; :class:`Trig`
    SCM                                                        α = 1 − t, σ = t · sigma_data
    =========================================================  ==================================================

    Schedulers of discrete tokens and of two-part states are refused with the reason. A key that may change the process
    and is not understood raises an error; keys of samplers, or equal to None, are ignored.

    Arguments:
        scheduler: Scheduler, or its configuration: ``scheduler.config`` or that of a ``scheduler_config.json``.
    """
    return read_schedule(config_of(scheduler)).sde


@checked
def from_diffusers(net: object, scheduler: object = None) -> Denoiser:
    """Denoiser from a network of diffusers and its scheduler, or from a whole pipeline.

    Labels, sign and form of the output are those of the pipelines of the network's class: for example Flux gets t where
    Stable Diffusion 3 gets 1000 t, and Lumina gets 1 − t and returns the opposite sign. A network of another class gets
    the label of the scheduler, by keyword if it has an argument `timestep`. Floating conditions are cast to the
    network's dtype. Conditions without a batch axis, such as `img_ids` or `image_rotary_emb`, are recognised by name.

    A network that returns twice the channels gives a denoiser with `learned_variance` on a discrete process, whatever
    ``variance_type`` the scheduler has. On a flow the second half is dropped.

    The resolution shift of a flow belongs to the grid: see :func:`from_scheduler`. The boundary
    condition of LCM and TCD at the last labels belongs to their samplers and is ignored.

    Arguments:
        net: UNet or transformer, compiled or not; or a pipeline with its network and its scheduler.
        scheduler: Scheduler or its configuration; not with a pipeline, unless another scheduler is meant.

    Example:
        >>> import torch, scoresde as ss
        >>> unet = lambda x, label: torch.zeros_like(x)
        >>> config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "prediction_type": "epsilon"}
        >>> ss.interop.from_diffusers(unet, config).sde
        Discrete(<1000 betas from 0.0001 to 0.02>, t_min=1)
    """
    its_own = getattr(net, "scheduler", None)
    if its_own is not None:
        net, scheduler = _network_of(net), its_own if scheduler is None else scheduler
    if scheduler is None:
        raise TypeError("`scheduler` must be given with a network: the scheduler that it was trained with.")
    config = config_of(scheduler)
    schedule = read_schedule(config)
    call, discrete = call_of(net), isinstance(schedule.sde, Discrete)
    twice = doubles_channels(net)
    first_half = twice and not discrete
    made = DiffusersNet(cast(Net, net), sign=schedule.sign * call.sign, listed=call.listed, first_half=first_half)
    time = schedule.time
    if isinstance(schedule.sde, Flow) and isinstance(time, Affine):
        time = time.then(label_of(call, net, config.get("num_train_timesteps", 1000)))
    return Denoiser(
        made if schedule.adapt is None else schedule.adapt(made),
        schedule.sde,
        predicts=schedule.predicts,
        precondition=schedule.precondition,
        time=time,
        learned_variance=_variance(config, twice) if discrete else False,
        shared=SHARED,
    )


def _variance(config: Config, twice: bool) -> str | bool:
    """Meaning of the second half of the channels, as ``learned_variance``; that of improved DDPM if none is given."""
    # DDPMScheduler takes the square root of a "learned" variance: the output is the variance, not its logarithm.
    return {"learned": "value", "learned_range": "range"}.get(
        str(config.get("variance_type")), "range" if twice else False
    )


def _network_of(pipeline: object) -> Net:
    """The network of a pipeline: its UNet, transformer, prior or decoder."""
    found = [name for name in ("unet", "transformer", "prior", "decoder") if callable(getattr(pipeline, name, None))]
    if not found:
        raise TypeError(
            f"`net` is a {type(pipeline).__name__} without a unet, transformer, prior or decoder; give its network and "
            f"its scheduler, from_diffusers(net, scheduler)."
        )
    second = getattr(pipeline, "transformer_2", None)
    if second is not None:
        raise ValueError(
            f"`net` is a {type(pipeline).__name__} with two networks for two ranges of noise; make a denoiser from "
            f"each, from_diffusers(pipe.transformer, pipe.scheduler), and switch between them in one of your own."
        )
    return cast(Net, getattr(pipeline, found[0]))
