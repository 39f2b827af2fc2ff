"""Configurations of diffusers' schedulers, read: process, prediction and labels, or the reason why they are refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from scoresde import _checks as check
from scoresde._build import recorded
from scoresde.denoisers.base import Condition
from scoresde.denoisers.clocks import Affine, Angle, Warp
from scoresde.denoisers.network import Clock, Preconditioning
from scoresde.interop.networks import Adapted, Net
from scoresde.processes.discrete import Discrete, betas, zero_terminal_snr
from scoresde.processes.named import EDM, VP, Cosine, Flow, Trig
from scoresde.processes.sde import SDE

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Schedule:
    """What a scheduler says about a network that was trained with it.

    Arguments:
        sde: Process.
        predicts: Output of the network, as in :class:`Denoiser`.
        time: Labels that the scheduler gives to the network, as in :class:`Denoiser`.
        precondition: Scaling of the network's input and output, or None.
        sign: Factor of the network's output, 1 or −1.
        adapt: Function that wraps the network, or None.
    """

    sde: SDE
    predicts: str
    time: str | Clock | None = "index"
    precondition: Preconditioning | None = None
    sign: int = 1
    adapt: Callable[[Net], Net] | None = None


_PREDICTION = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "velocity"}

_BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}

# Keys that belong to samplers and grids: they change neither the process nor the network.
_SAMPLER_KEYS = frozenset(
    "_class_name _diffusers_version _use_default_values algorithm_type clip_sample clip_sample_range "
    "dynamic_thresholding_ratio euler_at_final final_sigmas_type interpolation_type lambda_min_clipped "
    "lower_order_final disable_corrector predict_x0 sample_max_value set_alpha_to_one skip_prk_steps solver_order "
    "solver_p solver_type steps_offset thresholding timestep_spacing use_beta_sigmas use_exponential_sigmas "
    "use_karras_sigmas use_lu_lambdas variance_type base_image_seq_len base_shift max_image_seq_len max_shift "
    "shift_terminal stochastic_sampling time_shift_type use_dynamic_shifting predictor_order corrector_order tau_func "
    "flow_shift noise_sampler_seed original_inference_steps timestep_scaling eta clip_denoised s_noise s_churn s_min "
    "s_max rho sigma_schedule correct_steps snr sampling_eps scale_factors upscale_mode".split()
)

# Keys of our own schedulers, beside those of the scheduler that they replace.
OWN_KEYS = ("solver", "plan", "grid", "seed", "clip", "scheduler_class")

# Keys of the process and of the network, for each family.
_FAMILY_KEYS = {
    "discrete": "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "rescale_betas_zero_snr snr_shift_scale timestep_type use_flow_sigmas".split(),
    "continuous": "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "rescale_betas_zero_snr timestep_type sigma_min sigma_max use_flow_sigmas".split(),
    "flow": "num_train_timesteps beta_start beta_end beta_schedule trained_betas prediction_type "
    "rescale_betas_zero_snr shift use_flow_sigmas invert_sigmas sigma_min sigma_max".split(),
    "edm": "num_train_timesteps prediction_type sigma_min sigma_max sigma_data".split(),
    "stable audio": "num_train_timesteps prediction_type sigma_min sigma_max sigma_data".split(),
    "consistency": "num_train_timesteps sigma_min sigma_max sigma_data".split(),
    "score_sde ve": "num_train_timesteps sigma_min sigma_max".split(),
    "score_sde vp": "num_train_timesteps beta_min beta_max".split(),
    "karras ve": "sigma_min sigma_max".split(),
    "wuerstchen": "scaler s".split(),
    "trigflow": "num_train_timesteps prediction_type sigma_data".split(),
    "ipndm": "num_train_timesteps trained_betas".split(),
    "minimax": ["shift"],
}

# Keys that say nothing if they have this value.
_NEUTRAL = {"invert_sigmas": False, "timestep_type": "discrete", "use_flow_sigmas": False}

_FAMILY = {  # of the class, where its name decides
    "EDMEulerScheduler": "edm",
    "EDMDPMSolverMultistepScheduler": "edm",
    "CosineDPMSolverMultistepScheduler": "stable audio",
    "CMStochasticIterativeScheduler": "consistency",
    "ScoreSdeVeScheduler": "score_sde ve",
    "ScoreSdeVpScheduler": "score_sde vp",
    "KarrasVeScheduler": "karras ve",
    "DDPMWuerstchenScheduler": "wuerstchen",
    "SCMScheduler": "trigflow",
    "IPNDMScheduler": "ipndm",
    "MiniMaxH3Scheduler": "minimax",
    "LTXEulerAncestralRFScheduler": "flow",
    "FlowMapEulerDiscreteScheduler": "flow",
}

_DISCRETE_DATA = "it samples discrete tokens, which have no Gaussian process"

_REFUSED = {
    "VQDiffusionScheduler": _DISCRETE_DATA,
    "AmusedScheduler": _DISCRETE_DATA,
    "BlockRefinementScheduler": _DISCRETE_DATA,
    "DiscreteDDIMScheduler": _DISCRETE_DATA,
    "EntropyBoundScheduler": _DISCRETE_DATA,
    "HeliosScheduler": "its pyramid has another process at each stage",
    "HeliosDMDScheduler": "its pyramid has another process at each stage",
    "PiflowScheduler": "its networks return a policy of several predictions, not one",
    "RFD4ProteinaScheduler": "its state is a protein with two clocks",
    "ConsistencyDecoderScheduler": "its network decodes latents in two fixed steps",
}
_REFUSED_BY_KEY = {
    "num_vec_classes": "VQDiffusionScheduler",
    "mask_token_id": "AmusedScheduler",
    "block_length": "BlockRefinementScheduler",
    "entropy_bound": "EntropyBoundScheduler",
    "corrector_selection": "DiscreteDDIMScheduler",
    "stage_range": "HeliosScheduler",
    "n_grid": "PiflowScheduler",
    "tsr_k": "RFD4ProteinaScheduler",
}


def read_schedule(config: Config) -> Schedule:
    """Process, prediction and labels of a scheduler's configuration.

    Arguments:
        config: Configuration; the entry ``_class_name``, if it has one, is the name of the scheduler's class.
    """
    family = _family(config)
    _check_keys(config, family)
    return _READ[family](config)


def config_of(scheduler: object) -> Config:
    """Configuration of a scheduler with the name of its class, or a configuration as it is.

    Arguments:
        scheduler: Scheduler of diffusers, or a dictionary.
    """
    if isinstance(scheduler, Mapping):
        return replaced(scheduler)
    config = getattr(scheduler, "config", None)
    if not isinstance(config, Mapping):
        raise TypeError(
            f"`scheduler` must be a scheduler of diffusers or its configuration, such as pipe.scheduler or "
            f"pipe.scheduler.config, got {type(scheduler).__name__}."
        )
    return replaced({**config, "_class_name": type(scheduler).__name__})


def replaced(config: Config) -> Config:
    """Configuration of the scheduler that one of :func:`to_diffusers` replaced; other configurations as they are.

    Arguments:
        config: Configuration.
    """
    if "scheduler_class" not in config:
        return config
    kept = {k: v for k, v in config.items() if k not in OWN_KEYS and not k.startswith("_")}
    name = config["scheduler_class"]
    return kept | ({"_class_name": name} if name else {})


def _family(config: Config) -> str:
    name = str(config.get("_class_name") or next((v for k, v in _REFUSED_BY_KEY.items() if k in config), ""))
    if name in _REFUSED:
        raise ValueError(f"`scheduler` is a {name}, which has no denoiser here: {_REFUSED[name]}.")
    if name in _FAMILY:
        return _FAMILY[name]
    if name.startswith("FlowMatch"):
        return "flow"
    if not name and (family := _family_of_keys(config)):
        return family
    flow_sigmas, prediction = config.get("use_flow_sigmas"), config.get("prediction_type")
    if flow_sigmas or prediction == "flow_prediction":
        return "flow"
    if config.get("timestep_type") == "continuous" and prediction == "v_prediction":
        return "continuous"
    return "discrete"


def _family_of_keys(config: Config) -> str:
    """Family of a configuration without the name of its class, as ``scheduler.config`` of a new scheduler is."""
    keys = set(config)
    if "sigma_schedule" in keys:
        return "edm" if "algorithm_type" in keys or "solver_order" not in keys else "stable audio"
    marks = {
        "consistency": {"sigma_data", "clip_denoised"},
        "score_sde ve": {"sigma_max", "snr"},
        "score_sde vp": {"beta_max", "sampling_eps"},
        "karras ve": {"sigma_max", "s_churn"},
        "wuerstchen": {"scaler", "s"},
    }
    for family, mark in marks.items():
        if mark <= keys:
            return family
    if config.get("prediction_type") == "trigflow":
        return "trigflow"
    if "trained_betas" in keys and "beta_schedule" not in keys and config["trained_betas"] is None:
        return "ipndm"
    if "shift" in keys or {"eta", "s_noise", "num_train_timesteps"} <= keys:
        return "flow" if "num_train_timesteps" in keys else "minimax"
    return ""


def _check_keys(config: Config, family: str) -> None:
    given = {key for key, value in config.items() if value is not None and value != _NEUTRAL.get(key)}
    if family == "discrete" and config.get("prediction_type") != "v_prediction":
        given.discard("timestep_type")  # diffusers reads it for v-prediction only
    unknown = sorted(given - set(_FAMILY_KEYS[family]) - _SAMPLER_KEYS)
    if unknown:
        raise ValueError(
            f"`config` has keys that may change the process and are not understood: {', '.join(unknown)}; remove them "
            f"if they do not change it, or build the process with Discrete(betas)."
        )


def _prediction(config: Config, default: str, allowed: tuple[str, ...]) -> str:
    name = config.get("prediction_type") or default
    if name not in allowed:
        raise ValueError(f"`prediction_type` must be one of {', '.join(allowed)}, got {name!r}.")
    return str(name)


def _steps(config: Config) -> int:
    return check.integer("num_train_timesteps", config.get("num_train_timesteps", 1000), at_least=1)


def _betas(config: Config) -> Tensor:
    N = _steps(config)
    if config.get("trained_betas") is not None:
        table = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    else:
        schedule = config.get("beta_schedule")
        if schedule not in _BETAS:
            raise ValueError(
                f"`beta_schedule` must be one of {', '.join(_BETAS)}, got {schedule!r}; give `trained_betas`."
            )
        kind = _BETAS[schedule]
        ends = () if kind == "cosine" else ("beta_start", "beta_end")
        missing = [key for key in ends if key not in config]
        if missing:
            raise ValueError(
                f"`config` must have {' and '.join(missing)}, because diffusers' schedulers have different defaults."
            )
        table = betas(kind, N, **{key: config[key] for key in ends})
    if (scale := config.get("snr_shift_scale")) is not None:
        table = _shift_snr(table, check.number("snr_shift_scale", scale, above=0))
    return zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def _shift_snr(table: Tensor, scale: float) -> Tensor:
    r"""Rates with the signal-to-noise ratio divided by a scale: :math:`\bar\alpha' = \bar\alpha/(s + (1-s)\bar\alpha)`.

    CogVideoX shifts so, before the rescaling to zero terminal signal.
    """
    log_bar = torch.log1p(-table).cumsum(0)
    shifted = log_bar - torch.log1p((scale - 1) * -torch.expm1(log_bar))
    return -torch.expm1(torch.cat([shifted[:1], shifted.diff()]))


def _discrete(config: Config) -> Schedule:
    return Schedule(Discrete(_betas(config)), _PREDICTION[_prediction(config, "epsilon", tuple(_PREDICTION)[:3])])


def _continuous(config: Config) -> Schedule:
    """Schedule of Euler's scheduler with labels ¼ log σ: EDM's process and scaling, for data of deviation 1."""
    levels = (-Discrete(_betas(config)).lam(torch.tensor([1.0, _steps(config)], dtype=torch.float64))).exp().tolist()
    low, high = (config.get(key) or level for key, level in zip(("sigma_min", "sigma_max"), levels, strict=True))
    return Schedule(EDM(T=high, t_min=low), "F", None, Preconditioning(1.0), sign=-1)


def _flow(config: Config) -> Schedule:
    name = config.get("prediction_type")
    if config.get("use_flow_sigmas", True) is False and name == "flow_prediction":
        raise ValueError(
            "`config` has use_flow_sigmas=False and prediction_type='flow_prediction', with which the scheduler of "
            "diffusers steps on another process; set use_flow_sigmas=True."
        )
    if name == "v_prediction":
        raise ValueError(
            "`config` has prediction_type='v_prediction' on a flow, where diffusers' formula α x − σ v is not the "
            "data; give 'flow_prediction', 'sample' or 'epsilon'."
        )
    predicts = _PREDICTION[_prediction(config, "flow_prediction", tuple(_PREDICTION))]
    N = _steps(config)
    if config.get("invert_sigmas"):  # its labels and its velocity run towards the data
        return Schedule(Flow(), predicts, Affine(N, -N), sign=-1 if predicts == "velocity" else 1)
    # ε says nothing about the data where no signal is left, so the flow then ends before.
    return Schedule(Flow(T=1 - 1 / N) if predicts == "eps" and N > 1 else Flow(), predicts, Affine(0.0, N))


def _edm(config: Config) -> Schedule:
    sign = {"epsilon": 1, "v_prediction": -1}[_prediction(config, "epsilon", ("epsilon", "v_prediction"))]
    scale = Preconditioning(config.get("sigma_data", 0.5))
    return Schedule(_levels(config), "F", None, scale, sign=sign)


def _stable_audio(config: Config) -> Schedule:
    return replace(_edm(config), time=Angle())


def _levels(config: Config) -> EDM:
    """EDM's process between the levels of a configuration."""
    low, high = config["sigma_min"], config["sigma_max"]
    return EDM(T=check.number("sigma_max", high, above=0), t_min=check.number("sigma_min", low, above=0))


def _consistency(config: Config) -> Schedule:
    wrap = partial(Consistency, sigma_min=config["sigma_min"], sigma_data=config["sigma_data"])
    return Schedule(_levels(config), "x0", "sigma", adapt=wrap)


def _ve(config: Config) -> Schedule:
    return Schedule(_levels(config), "score", "sigma")


def _vp(config: Config) -> Schedule:
    sde = VP(beta_min=config["beta_min"], beta_max=config["beta_max"])
    return Schedule(sde, "eps", Affine(0.0, _steps(config) - 1))


def _karras_ve(config: Config) -> Schedule:
    return Schedule(_levels(config), "score", "sigma", adapt=OnUnitImages)


def _wuerstchen(config: Config) -> Schedule:
    # They clamp ᾱ to at least 1e-4, where the last time is; T is that time before their warp.
    s = config.get("s", 0.008)
    theta = math.acos(0.01 * math.cos(math.pi / 2 * s / (1 + s)))
    warp = Warp(check.number("scaler", config.get("scaler", 1.0), above=0))
    return Schedule(Cosine(s=s, T=theta * 2 / math.pi * (1 + s) - s), "eps", warp)


def _trigflow(config: Config) -> Schedule:
    scale = check.number("sigma_data", config.get("sigma_data", 0.5), above=0)
    sde = SDE.from_functions(_one_minus, partial(torch.mul, scale))
    return Schedule(sde, "velocity", "t", adapt=partial(OnUnitData, scale=scale))


def _one_minus(t: Tensor) -> Tensor:
    return 1 - t


def _ipndm(config: Config) -> Schedule:
    return Schedule(Trig(), "v", "t")


def _minimax(config: Config) -> Schedule:
    return Schedule(Flow(), "velocity", Affine(1.0, -1.0), sign=-1)


_READ: dict[str, Callable[[Config], Schedule]] = {
    "discrete": _discrete,
    "continuous": _continuous,
    "flow": _flow,
    "edm": _edm,
    "stable audio": _stable_audio,
    "consistency": _consistency,
    "score_sde ve": _ve,
    "score_sde vp": _vp,
    "karras ve": _karras_ve,
    "wuerstchen": _wuerstchen,
    "trigflow": _trigflow,
    "ipndm": _ipndm,
    "minimax": _minimax,
}


class _OfStates(Adapted):
    """An adapter that computes in the dtype of the state; the network inside casts for itself."""

    @property
    def dtype(self) -> None:
        return None


@recorded
class Consistency(_OfStates):
    r"""Consistency network of diffusers: :math:`x_0 = c_{skip} x + c_{out} F(c_{in} x, 250\log\sigma)`.

    Arguments:
        net: Network F.
        sigma_min: Level at which the result is the state itself.
        sigma_data: Standard deviation of the data.

    References:
        | Consistency Models (Song et al., 2023), arXiv:2303.01469, appendix C
    """

    def __init__(self, net: Net, *, sigma_min: float, sigma_data: float) -> None:
        super().__init__(net)
        self.sigma_min, self.sigma_data = sigma_min, sigma_data

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        sigma = t.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
        size, gap = (sigma**2 + self.sigma_data**2).sqrt(), sigma - self.sigma_min
        out = self.net(x / size, 250 * t.log(), **cond)
        return self.sigma_data**2 / (gap**2 + self.sigma_data**2) * x + gap * self.sigma_data / size * out.to(x.dtype)


@recorded
class OnUnitImages(_OfStates):
    """Score of images in [−1, 1] from a network for images in [0, 1], as in diffusers' pipeline of Karras's VE.

    Arguments:
        net: Network that returns the score of (x + 1)/2 at the level σ/2.
    """

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        return self.net((x + 1) / 2, t / 2, **cond).to(x.dtype) / 2


@recorded
class OnUnitData(_OfStates):
    """Velocity of data of deviation `scale` from a network for data of deviation 1.

    Arguments:
        net: Network.
        scale: Standard deviation of the data.
    """

    def __init__(self, net: Net, *, scale: float) -> None:
        super().__init__(net)
        self.scale = scale

    def call(self, x: Tensor, t: Tensor, **cond: Condition) -> Tensor:
        return self.scale * self.net(x / self.scale, t, **cond).to(x.dtype)
