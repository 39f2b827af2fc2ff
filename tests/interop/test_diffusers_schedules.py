"""Every scheduler class of diffusers: the process is that of its own `add_noise`, and x0 is that of its own step."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import interop

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed; it comes with the extra `test`")
pytestmark = pytest.mark.filterwarnings("ignore")  # of its own deprecations

f64 = torch.float64
NEEDED = {  # arguments without a default
    "VQDiffusionScheduler": {"num_vec_classes": 8},
    "AmusedScheduler": {"mask_token_id": 5},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "log",
        "noise_mode": "1/t",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
    },
}
REFUSED = {
    "VQDiffusionScheduler": "discrete tokens",
    "AmusedScheduler": "discrete tokens",
    "BlockRefinementScheduler": "discrete tokens",
    "DiscreteDDIMScheduler": "discrete tokens",
    "EntropyBoundScheduler": "discrete tokens",
    "HeliosScheduler": "another process at each stage",
    "HeliosDMDScheduler": "another process at each stage",
    "PiflowScheduler": "a policy of several predictions",
    "RFD4ProteinaScheduler": "two clocks",
    "ConsistencyDecoderScheduler": "two fixed steps",
}


def every_class() -> list[str]:
    import diffusers.schedulers as folder

    names = {name for name in [*dir(diffusers), *dir(folder)] if name.endswith("Scheduler") and "Flax" not in name}
    out = []
    for name in sorted(names | {"ScoreSdeVpScheduler", "ConsistencyDecoderScheduler"}):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make(name)
        except ImportError:  # a part that is not installed
            continue
        out.append(name)
    return out


def made_class(name: str) -> Any:
    if name == "ScoreSdeVpScheduler":
        from diffusers.schedulers.deprecated.scheduling_sde_vp import ScoreSdeVpScheduler

        return ScoreSdeVpScheduler
    if name == "ConsistencyDecoderScheduler":
        from diffusers.schedulers.scheduling_consistency_decoder import ConsistencyDecoderScheduler

        return ConsistencyDecoderScheduler
    return getattr(diffusers, name)


def make(name: str, **config: Any) -> Any:
    return made_class(name)(**NEEDED.get(name, {}), **config)


CLASSES = every_class()


def test_the_walk_sees_the_classes() -> None:
    assert len(CLASSES) > 45 and set(REFUSED) <= set(CLASSES)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_has_no_gaussian_process_is_refused_with_the_reason(name: str) -> None:
    scheduler = make(name)
    for given in (scheduler, scheduler.config):
        if name == "ConsistencyDecoderScheduler" and given is not scheduler:
            continue  # its configuration is two numbers that say nothing
        with pytest.raises(ValueError, match=REFUSED[name]):
            interop.sde_from_diffusers(given)


def labels_of(model: ss.Denoiser, t: Tensor) -> Tensor:
    """Labels that the network gets at times t, in float64."""
    sde, time = model.sde, model.time
    if callable(time):
        return time(t)
    if time is None:
        return -sde.lam(t) / 4
    return {"index": getattr(sde, "index_of_t", None), "sigma": sde.sigma, "t": lambda t: t}[time](t)


def times_of(model: ss.Denoiser, labels: Tensor) -> Tensor:
    """Times at which the network gets some labels: label + 1 on a β list, otherwise by bisection."""
    if model.time == "index":
        return labels + 1  # the label 0 is that of all times up to 1
    low, high = (torch.full_like(labels, v) for v in (1e-9 if model.time is None else 0.0, model.sde.T))
    rises = bool(labels_of(model, high)[0] > labels_of(model, low)[0])
    for _ in range(60):
        middle = (low + high) / 2
        below = (labels_of(model, middle) < labels) == rises
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def time_of(model: ss.Denoiser, label: float) -> float:
    return float(times_of(model, torch.tensor([label], dtype=f64))[0])


def theirs(scheduler: Any) -> tuple[Tensor, Tensor, Tensor] | None:
    """Labels, α and σ of a scheduler, by its own `add_noise` at each of its labels; None if it has none."""
    labels = scheduler.timesteps
    whole = labels == labels.round()
    labels = labels[whole].long() if whole.any() and len(labels) > 20 else labels  # half labels are those of stages
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    inverse = "Inverse" in type(scheduler).__name__  # whose levels are one step from its labels

    def at_labels(a: Tensor, b: Tensor) -> Tensor:
        if hasattr(scheduler, "scale_noise"):
            return torch.cat([fresh(scheduler).scale_noise(a, t[None], b) for t in labels])
        many = (len(labels), 1, 1, 1)
        return scheduler.add_noise(a.expand(many), b.expand(many), labels)

    if not inverse and (hasattr(scheduler, "scale_noise") or hasattr(scheduler, "add_noise")):
        try:
            return labels.double(), at_labels(one, zero).flatten().double(), at_labels(zero, one).flatten().double()
        except NotImplementedError:
            pass
    bars = getattr(scheduler, "alphas_cumprod", None)
    if bars is None:
        return None
    bars = bars[labels.long()].double()
    return labels.double(), bars.sqrt(), (1 - bars).sqrt()


def fresh(scheduler: Any) -> Any:
    scheduler._step_index = None
    return scheduler


def ready(name: str, **config: Any) -> Any:
    scheduler = make(name, **config)
    if name == "DDPMWuerstchenScheduler":
        scheduler.timesteps = torch.linspace(0.99, 0.02, 50)
    elif name == "ScoreSdeVeScheduler":
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
        scheduler.set_sigmas(scheduler.config.num_train_timesteps)
        scheduler.labels = scheduler.discrete_sigmas  # its pipelines give σ to the network
        scheduler.timesteps = torch.arange(scheduler.config.num_train_timesteps)
    elif name in ("CMStochasticIterativeScheduler", "MiniMaxH3Scheduler"):
        scheduler.set_timesteps(20)
        if name.startswith("CM"):
            scheduler.labels = (scheduler.timesteps / 250).exp()  # our network is given σ
    elif name == "PNDMScheduler":
        scheduler.timesteps = torch.arange(scheduler.config.num_train_timesteps)
    elif name.startswith(("DPMSolver", "UniPC", "DEIS")):  # before, the levels of their labels run the other way
        scheduler.set_timesteps(scheduler.config.num_train_timesteps)
    return scheduler


# Without a table or `add_noise`: the networks' formulas are tested below.
FORMULAS = {"KarrasVeScheduler", "SCMScheduler", "ScoreSdeVpScheduler", "LTXEulerAncestralRFScheduler"}
OPTIONS: dict[str, dict[str, Any]] = {
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "short": {"num_train_timesteps": 40, "trained_betas": torch.linspace(0.01, 0.2, 40).tolist()},
    "zero SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "shift": {"shift": 3.0},
    "no shift of CogVideoX": {"snr_shift_scale": 1.0},
}


def walk() -> list[tuple[str, str]]:
    out = []
    for name in CLASSES:
        takes = set(inspect.signature(made_class(name)).parameters)
        out += [(name, case) for case, config in {"defaults": {}, **OPTIONS}.items() if set(config) <= takes]
    broken = {("RePaintScheduler", "short")}  # it takes no list of betas
    return [(name, case) for name, case in out if name not in {*REFUSED, *FORMULAS} and (name, case) not in broken]


@pytest.mark.parametrize(("name", "case"), walk())
def test_the_process_is_that_of_add_noise_at_every_label(name: str, case: str) -> None:
    scheduler = ready(name, **OPTIONS.get(case, {}))
    model = interop.from_diffusers(lambda x, t: x, scheduler)
    for given in (scheduler, scheduler.config, json.loads(scheduler.to_json_string())):
        assert interop.sde_from_diffusers(given) == model.sde or isinstance(model.sde, ss.processes.FromFunctions)
    N = scheduler.config.get("num_train_timesteps", 1000)
    if case == "flow":  # their `add_noise` takes the levels, and their labels are those of levels, cut to integers
        scheduler.set_timesteps(50)
        levels, labels = scheduler.sigmas[:-1].double(), scheduler.timesteps
        assert model.sde == ss.Flow() and ((labels_of(model, levels) - labels).abs() < 1).all()
        return
    if name == "IPNDMScheduler":
        scheduler.set_timesteps(20)
        labels, alpha, sigma = (v[:20].double() for v in (scheduler.timesteps, scheduler.alphas, scheduler.betas))
    else:
        found = theirs(scheduler)
        assert found is not None, f"{name} has no table of its own, so ours is a guess"
        labels, alpha, sigma = found
    times = times_of(model, getattr(scheduler, "labels", labels).double())
    ours = model.sde.alpha(times), model.sde.sigma(times)
    exploding = isinstance(model.sde, ss.EDM)
    if bool((alpha == 1).all()) and not exploding:  # its states are x/α
        alpha, sigma = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
    # Their ᾱ is a float32 product of N factors. Levels are functions of labels in float32, at σ = 500 of 1 − 0.6/σ.
    rounding = 2e-4 if exploding else 6e-8 * max(N, 1000)
    assert torch.allclose(ours[0], alpha, rtol=rounding, atol=3e-4 if case == "zero SNR" else rounding)
    assert torch.allclose(ours[1] ** 2, sigma**2, rtol=rounding, atol=0 if exploding else rounding)


# x0 of an arbitrary network, by their own step.


def network(x: Tensor, label: Tensor, **cond: Any) -> Tensor:
    """Some function of its input and of its label, so that a wrong one of either is seen."""
    return torch.tanh(0.7 * x + torch.sin(label.reshape(-1, 1, 1, 1).to(x) / 7)) + 0.2 * x


STATE = ss.Noise(0).normal((2, 3, 4, 4), 0)


def their_x0(scheduler: Any, index: int, x: Tensor) -> Tensor:
    """Prediction of the data by a scheduler at one of its labels, from its own state `x`."""
    label = scheduler.timesteps[index]
    if hasattr(scheduler, "_init_step_index"):
        scheduler._init_step_index(label)
    flow = scheduler.config.get("use_flow_sigmas")
    exact = 1000 * scheduler.sigmas[index] if flow else label  # its labels of a flow are cut to integers
    out = network(scheduler.scale_model_input(x, label), exact.expand(len(x)))
    if hasattr(scheduler, "convert_model_output"):
        converted = scheduler.convert_model_output(out, sample=x)
        if scheduler.config.get("algorithm_type") == "deis":  # it is the noise
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[index])
            return (x - sigma * converted) / alpha
        return converted
    step = scheduler.step(out, label, x)
    return step.pred_original_sample


PREDICTIONS = {
    "epsilon": "DDPM DDPMParallel DDIM DDIMParallel EulerDiscrete EulerAncestralDiscrete LMSDiscrete "
    "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver CogVideoXDDIM "
    "EDMEuler EDMDPMSolverMultistep UnCLIP",
    "sample": "DDPM DDIM DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver "
    "CogVideoXDDIM UnCLIP",
    "v_prediction": "DDPM DDIM EulerDiscrete EulerAncestralDiscrete LMSDiscrete DPMSolverMultistep DPMSolverSinglestep "
    "UniPCMultistep DEISMultistep SASolver CogVideoXDDIM EDMEuler EDMDPMSolverMultistep CosineDPMSolverMultistep",
    "flow_prediction": "DPMSolverMultistep DPMSolverSinglestep UniPCMultistep DEISMultistep SASolver",
}
CASES = [(f"{name}Scheduler", kind) for kind, names in PREDICTIONS.items() for name in names.split()]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_x0_is_that_of_the_schedulers_step(name: str, kind: str) -> None:
    config: dict[str, Any] = {"prediction_type": kind}
    takes = inspect.signature(made_class(name)).parameters
    config |= {key: False for key in ("clip_sample", "thresholding") if key in takes}
    if kind == "flow_prediction":
        config["use_flow_sigmas"] = True
    scheduler = make(name, **config)
    scheduler.set_timesteps(10)
    model = interop.from_diffusers(network, scheduler)
    for index in (2, 7):
        t = time_of(model, float(scheduler.timesteps[index]))
        if kind == "flow_prediction":
            t = float(scheduler.sigmas[index])
        scaled = float(scheduler.init_noise_sigma) != 1 and not isinstance(model.sde, ss.EDM)
        x = STATE * (3.0 if isinstance(model.sde, ss.EDM) else 1.0)
        want = their_x0(scheduler, index, x / model.sde.alpha(t) if scaled else x)
        # Theirs is 1/√ᾱ times a difference of numbers with the float32 errors of the test above.
        size = float(want.abs().max()) + 1 / model.sde.alpha(t)
        assert float((model.x0(x, t) - want).abs().max()) < 1e-4 * size


def test_labels_of_euler_may_be_continuous_as_in_video_diffusion() -> None:
    config = {"sigma_min": 0.002, "sigma_max": 700.0, "use_karras_sigmas": True, "timestep_type": "continuous"}
    scheduler = diffusers.EulerDiscreteScheduler(
        prediction_type="v_prediction", beta_schedule="scaled_linear", **config
    )
    scheduler.set_timesteps(10)
    model = interop.from_diffusers(network, scheduler)
    assert model.sde == ss.EDM(T=700.0, t_min=0.002)
    for index in (0, 5, 9):
        sigma = float(scheduler.sigmas[index])
        x = sigma * STATE
        assert torch.allclose(
            model.x0(x, min(sigma, 700.0)), their_x0(scheduler, index, x), rtol=1e-4, atol=1e-4 * sigma
        )
    plain = diffusers.EulerDiscreteScheduler(timestep_type="continuous")  # which it reads for v-prediction only
    assert isinstance(interop.sde_from_diffusers(plain), ss.Discrete)


def test_consistency_networks_of_diffusers_return_the_data() -> None:
    scheduler = diffusers.CMStochasticIterativeScheduler()
    scheduler.set_timesteps(timesteps=[30])
    label = scheduler.timesteps[0]
    sigma = float(scheduler.sigmas[0])
    x = sigma * STATE
    out = network(scheduler.scale_model_input(x, label), label.expand(2))
    want = scheduler.step(out, label, x, return_dict=False)[0]
    got = interop.from_diffusers(network, diffusers.CMStochasticIterativeScheduler(clip_denoised=False))
    scheduler.register_to_config(clip_denoised=False)
    scheduler._step_index = None
    scheduler.scale_model_input(x, label)
    want = scheduler.step(out, label, x, return_dict=False)[0]
    assert torch.allclose(got.x0(x, sigma), want, rtol=1e-4, atol=1e-4)


def test_networks_of_score_sde_in_diffusers() -> None:
    # Its pipelines: VE's network returns the score at label σ; VP's the noise at label (N − 1) t, with a sign.
    ve = interop.from_diffusers(network, diffusers.ScoreSdeVeScheduler())
    assert torch.allclose(ve.x0(STATE, 1.7), STATE + 1.7**2 * network(STATE, torch.tensor([1.7] * 2)), rtol=1e-5)
    vp = interop.from_diffusers(network, make("ScoreSdeVpScheduler"))
    t, b = 0.3, 0.1 * 0.3 + 19.9 / 2 * 0.3**2
    score = -network(STATE, torch.tensor([1999 * t] * 2)) / math.sqrt(1 - math.exp(-b))
    assert torch.allclose(vp.score(STATE, t), score, rtol=1e-4, atol=1e-5)


def test_karras_networks_of_diffusers_see_images_from_0_to_1() -> None:
    # Its pipeline: model_output = (σ/2) net((x + 1)/2, σ/2), and x0 = x + σ model_output.
    scheduler, sigma = diffusers.KarrasVeScheduler(), 1.3
    out = (sigma / 2) * network((STATE + 1) / 2, torch.tensor([sigma / 2] * 2))
    want = scheduler.step(out, sigma, 0.5, STATE).pred_original_sample
    assert torch.allclose(interop.from_diffusers(network, scheduler).x0(STATE, sigma), want, rtol=1e-5, atol=1e-5)


def test_trigflow_of_sana_sprint_is_a_flow_of_scaled_data() -> None:
    scheduler, data = diffusers.SCMScheduler(sigma_data=0.5), 0.5
    model = interop.from_diffusers(network, scheduler)
    s = 1.1  # their angle; x = σ_d (cos s · x̂0 + sin s · z)
    x = data * STATE
    tau = math.sin(s) / (math.sin(s) + math.cos(s))
    root = math.sqrt(tau**2 + (1 - tau) ** 2)
    y = x / data * root
    out = network(y, torch.tensor([tau] * 2))
    trig = data * ((1 - 2 * tau) * y + (1 - 2 * tau + 2 * tau**2) * out) / root
    want = math.cos(s) * x - math.sin(s) * trig  # the data, as its step has it
    assert torch.allclose(model.x0(data * y, tau), want, rtol=1e-4, atol=1e-5)
    assert (model.sde.alpha(tau), model.sde.sigma(tau)) == pytest.approx((1 - tau, data * tau))


def test_flows_run_the_other_way_in_mochi_and_in_minimax() -> None:
    for scheduler, label in (
        (diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), 700.0),
        (make("MiniMaxH3Scheduler"), 0.7),
    ):
        model = interop.from_diffusers(network, scheduler)
        assert model.sde == ss.Flow()
        out = network(STATE, torch.tensor([label] * 2))  # towards the data: x0 − ε
        assert torch.allclose(model.x0(STATE, 0.3), STATE + 0.3 * out, rtol=1e-5, atol=1e-5)
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    inverted.set_timesteps(10)
    x, i = STATE, 4
    inverted.set_begin_index(i)
    label, now, then = inverted.timesteps[i], float(inverted.sigmas[i]), float(inverted.sigmas[i + 1])
    want = inverted.step(network(x, label.expand(2)), label, x).prev_sample
    model = interop.from_diffusers(network, inverted)
    assert torch.allclose(x + (1 - then - (1 - now)) * model.velocity(x, 1 - now), want, rtol=1e-5, atol=1e-5)


def test_a_prediction_type_of_a_flow_is_obeyed() -> None:
    t, x = 0.4, STATE
    out = network(x, torch.tensor([400.0] * 2))
    for kind, want in (("sample", out), ("epsilon", (x - t * out) / (1 - t)), ("flow_prediction", x - t * out)):
        for config in (
            {**diffusers.FlowMatchEulerDiscreteScheduler().config, "prediction_type": kind},
            diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type=kind).config,
        ):
            assert torch.allclose(interop.from_diffusers(network, config).x0(x, t), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="'v_prediction' on a flow"):
        interop.from_diffusers(
            network, diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="v_prediction")
        )


def test_the_warp_of_wuerstchen() -> None:
    for scaler in (0.5, 1.0, 2.0):
        scheduler = diffusers.DDPMWuerstchenScheduler(scaler=scaler)
        model = interop.from_diffusers(network, scheduler)
        labels = torch.linspace(0.1, 0.9, 5)
        bars = scheduler._alpha_cumprod(labels, "cpu").double()
        times = times_of(model, labels.double())
        assert torch.allclose(model.sde.alpha(times) ** 2, bars, rtol=1e-4)
