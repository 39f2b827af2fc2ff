"""Networks and schedules of the diffusers library as denoisers and processes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from operator import mul
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde.denoisers.base import Condition
from scoresde.denoisers.network import Denoiser
from scoresde.interop.pretrained import Net
from scoresde.processes.discrete import Discrete, betas, zero_terminal_snr
from scoresde.processes.named import Flow
from scoresde.processes.sde import SDE

_PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}

_SCHEDULE = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}

# Keys of diffusers' samplers, which change neither the process nor the network.
_SAMPLER_KEYS = frozenset(
    "_class_name _diffusers_version _use_default_values algorithm_type clip_sample clip_sample_range "
    "dynamic_thresholding_ratio euler_at_final final_sigmas_type interpolation_type lambda_min_clipped "
    "lower_order_final disable_corrector predict_x0 sample_max_value set_alpha_to_one skip_prk_steps solver_order "
    "solver_p solver_type steps_offset thresholding timestep_spacing use_beta_sigmas use_exponential_sigmas "
    "use_karras_sigmas use_lu_lambdas variance_type base_image_seq_len base_shift max_image_seq_len max_shift "
    "shift_terminal stochastic_sampling time_shift_type use_dynamic_shifting predictor_order corrector_order tau_func "
    "flow_shift".split()
)

# Keys that change the process or the labels unless they have this value.
_NEUTRAL = {"invert_sigmas": False, "timestep_type": "discrete"}


def sde_from_diffusers(config: Mapping[str, Any]) -> SDE:
    """Process of a diffusers scheduler configuration: :class:`Discrete`, or :class:`Flow` for flow matching.

    Arguments:
        config: Dictionary ``scheduler.config``, or that of a ``scheduler_config.json``. A key that may change the
            process and is not understood raises an error. Keys of diffusers' samplers, or equal to None, are ignored.
    """
    if not isinstance(config, Mapping):
        raise TypeError(f"`config` must be a dictionary such as `scheduler.config`, got {type(config).__name__}.")
    known = {
        "num_train_timesteps",
        "beta_start",
        "beta_end",
        "beta_schedule",
        "trained_betas",
        "prediction_type",
        "rescale_betas_zero_snr",
        "shift",
        "use_flow_sigmas",
    }
    given = {key for key, value in config.items() if value is not None and value != _NEUTRAL.get(key)}
    unknown = sorted(given - known - _SAMPLER_KEYS)
    if unknown:
        raise ValueError(
            f"`config` has keys that may change the process and are not understood: {', '.join(unknown)}; remove them "
            f"if they do not change it, or build the process with Discrete(betas)."
        )
    flow_matching = config.get("prediction_type") == "flow_prediction"
    if config.get("use_flow_sigmas", flow_matching) != flow_matching:
        raise ValueError(
            f"`config` has use_flow_sigmas={config['use_flow_sigmas']} and prediction_type="
            f"{config.get('prediction_type', 'epsilon')!r}; give use_flow_sigmas=True with 'flow_prediction' only."
        )
    # A flow-matching scheduler is recognised by its name, or, since `scheduler.config` has none, by its shift.
    name = str(config.get("_class_name", "FlowMatch" if {"num_train_timesteps", "shift"} <= set(config) else ""))
    if flow_matching or name.startswith("FlowMatch"):
        return Flow()
    N = check.integer("num_train_timesteps", config.get("num_train_timesteps", 1000), at_least=1)
    if config.get("trained_betas") is not None:
        table = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        schedule = config.get("beta_schedule")
        if schedule not in _SCHEDULE:
            raise ValueError(
                f"`beta_schedule` must be one of {', '.join(_SCHEDULE)}, got {schedule!r}; give `trained_betas`."
            )
        kind = _SCHEDULE[schedule]
        ends = () if kind == "cosine" else ("beta_start", "beta_end")
        missing = [key for key in ends if key not in config]
        if missing:
            raise ValueError(
                f"`config` must have {' and '.join(missing)}, because diffusers' schedulers have different defaults."
            )
        table = betas(kind, N, **{key: config[key] for key in ends})
    return Discrete(zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table)


def from_diffusers(net: Net, config: Mapping[str, Any]) -> Denoiser:
    """Denoiser from a diffusers network and the configuration of its scheduler.

    The network is evaluated as ``net(x, label, **cond)`` and returns a tensor or an object with ``.sample``. Labels are
    indices for discrete schedules and N t for flow matching, with N = ``num_train_timesteps``. The resolution shift of
    flow matching belongs to the grid: see :func:`shifted`.

    Arguments:
        net: UNet or transformer.
        config: Scheduler configuration, ``scheduler.config``.
    """
    sde = sde_from_diffusers(config)
    unwrapped = _Unwrapped(net)
    if isinstance(sde, Flow):
        N = config.get("num_train_timesteps", 1000)
        return Denoiser(unwrapped, sde, predicts="velocity", time=partial(mul, N))
    name = config.get("prediction_type", "epsilon")
    if name not in _PREDICTION:
        raise ValueError(f"`prediction_type` must be one of {', '.join(_PREDICTION)}, got {name!r}.")
    # DDPMScheduler takes the square root of a "learned" variance: the output is the variance, not its logarithm.
    learned = {"learned": "value", "learned_range": "range"}.get(str(config.get("variance_type")), False)
    return Denoiser(unwrapped, sde, predicts=_PREDICTION[name], time="index", learned_variance=learned)


class _Unwrapped(torch.nn.Module):
    """A network whose output may be an object with ``.sample``."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        out = self.net(x, t, **cond)
        return out if isinstance(out, Tensor) else getattr(out, "sample", out)
