"""Networks trained elsewhere: each code base's conventions, compared with its own tables and formulas."""

from __future__ import annotations

import json
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde import interop

diffusers = pytest.importorskip("diffusers")
f64 = torch.float64
MEANS = torch.tensor([[-1.0, 0.5, 2.0], [1.0, -0.5, 0.0], [0.2, 2.0, -1.0]], dtype=f64)


def mixture(sde: ss.SDE) -> ss.GaussianMixture:
    return ss.GaussianMixture(sde, MEANS, std=0.3)


class Recorder:
    def __init__(self) -> None:
        self.x: Tensor
        self.label: Tensor

    def __call__(self, x: Tensor, label: Tensor, **cond: object) -> Tensor:
        self.x, self.label, self.cond = x, label, cond
        return torch.zeros_like(x)


# The code bases themselves.


@pytest.mark.parametrize("N", [1, 50, 1000])
def test_ddpm_labels_are_indices_and_its_steps_are_the_processs(N: int) -> None:
    betas = np.linspace(1e-4, 0.02, N)
    seen = Recorder()
    model = interop.from_ddpm(seen, betas.tolist())
    assert model.sde == ss.Discrete(betas) and model.predicts == "eps"
    bar = np.cumprod(1 - betas)
    x = ss.Noise(0).normal((2, 3), 0, dtype=f64)
    for i in {0, N // 2, N - 1}:
        x0 = model.x0(x, i + 1.0)
        assert seen.label.tolist() == [float(i)] * 2
        assert torch.allclose(x0, x / math.sqrt(bar[i]), rtol=1e-12), "a network that sees no noise"
    assert interop.from_ddpm(seen, betas.tolist(), predicts="v").predicts == "v"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_improved_diffusion_returns_a_variance_with_the_noise(channels: int) -> None:
    x = ss.Noise(0).normal((2, channels, 4, 4), 0)
    eps, variance = (ss.Noise(i).normal(tuple(x.shape), 0) for i in (1, 2))
    model = interop.from_ddpm(
        lambda x, i: torch.cat([eps, variance], dim=1), ss.processes.betas("cosine", 100), learned_variance=True
    )
    x0, second = model.x0_and_variance(x, 50.0)
    a, s = model.sde.alpha(50.0), model.sde.sigma(50.0)
    assert torch.allclose(x0, (x - s * eps) / a, rtol=1e-5, atol=1e-6) and torch.equal(second, variance)


@pytest.mark.parametrize("kind", ["vp", "subvp"])
def test_score_sde_networks_return_the_noise_at_label_999_t(kind: str) -> None:
    # Its get_score_fn: score = −net(x, 999 t) / std, with the std of the process.
    sde = {"vp": ss.VP(), "subvp": ss.SubVP()}[kind]
    out = ss.Noise(1).normal((4, 3), 0, dtype=f64)
    labels = []
    model = interop.from_score_sde(lambda x, label: labels.append(label) or out, kind)
    x = ss.Noise(0).normal((4, 3), 0, dtype=f64)
    for t in (1e-3, 0.4, 1.0):
        b = 0.1 * t + 19.9 / 2 * t**2
        std = math.sqrt(1 - math.exp(-b)) if kind == "vp" else 1 - math.exp(-b)
        assert torch.allclose(model.score(x, t), -out / std, rtol=1e-10)
        assert labels[-1].dtype == torch.float32 and labels[-1].tolist() == pytest.approx([999 * t] * 4, rel=1e-6)
    assert model.sde == sde
    assert interop.from_score_sde(lambda x, label: x, kind, beta_min=0.2, beta_max=10.0).sde.beta(1.0) == 10.0


def test_score_sde_ve_networks_return_the_score_at_their_noise() -> None:
    out = ss.Noise(1).normal((4, 3), 0, dtype=f64)
    seen = []
    model = interop.from_score_sde(lambda x, sigma: seen.append(sigma) or out, "ve", sigma_max=90.0)
    assert model.sde == ss.VE(sigma_max=90.0)
    x = ss.Noise(0).normal((4, 3), 0, dtype=f64)
    for t in (0.1, 0.5, 1.0):
        assert torch.equal(model.score(x, t), out)
        sigma = model.sde.sigma(t)
        assert seen[-1].tolist() == pytest.approx([sigma] * 4, rel=1e-6)
        assert torch.allclose(model.x0(x, t), x + sigma**2 * out, rtol=1e-12), (
            "Tweedie, at the noise level of its label"
        )


def test_edm_networks_return_the_data_at_their_noise() -> None:
    # A network with EDM's preconditioning inside, on an exact mixture: D(x; σ).
    exact = mixture(ss.EDM())
    model = interop.from_edm(lambda x, sigma: exact.x0(x, sigma), sigma_max=40.0, sigma_min=0.01)
    assert (model.sde.T, model.sde.t_min) == (40.0, 0.01)
    x = exact.sample(5, 1.5, seed=0)
    assert torch.equal(model.x0(x, 1.5), exact.x0(x, 1.5))
    # The ODE of that code: dx/dσ = (x − D)/σ.
    assert torch.allclose(model.velocity(x, 1.5), (x - exact.x0(x, 1.5)) / 1.5, rtol=1e-10, atol=1e-12)
    seen = Recorder()
    interop.from_edm(seen).x0(x, 80.0)
    assert seen.label.tolist() == [80.0] * 5 and torch.equal(seen.x, x)
    assert torch.equal(interop.from_edm(lambda x, s: x).x0(x, 0.0), x), "the last step asks at σ = 0"


def test_flow_networks_of_either_direction_of_time_give_the_same_data() -> None:
    exact = mixture(ss.Flow())
    x = exact.sample(6, 0.4, seed=0)
    here = interop.from_flow(lambda x, t: exact.velocity(x, t.double()))
    # Where data is at 1 the state at u is u x0 + (1 − u) ε, and the network is its derivative x0 − ε.
    there = interop.from_flow(lambda x, u: -exact.velocity(x, 1 - u.double()), data_at=1)
    t = torch.tensor([0.125, 0.25, 0.375, 0.5, 0.75, 1.0], dtype=f64)  # exact in float32, as labels are
    for s in (0.25, t):
        want = exact.x0(x, s)
        for model in (here, there):
            assert torch.allclose(model.x0(x, s), want, rtol=1e-12, atol=1e-12)
            assert torch.allclose(model.velocity(x, s), exact.velocity(x, s), rtol=1e-12, atol=1e-12)
    assert torch.equal(here.x0(x, t), there.x0(x, t))
    seen = Recorder()
    interop.from_flow(seen, data_at=1).x0(x, t, y="cat")
    assert torch.equal(seen.label.double(), 1 - t) and seen.cond == {"y": "cat"}
    interop.from_flow(seen).x0(x, t)
    assert torch.equal(seen.label.double(), t)


# diffusers: its own schedulers are the reference.

TABLES: dict[str, dict[str, object]] = {
    "linear": {"beta_schedule": "linear"},
    "linear, other ends": {"beta_schedule": "linear", "beta_start": 1e-3, "beta_end": 0.03, "num_train_timesteps": 400},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
    "trained_betas": {"trained_betas": np.linspace(0.01, 0.2, 37).tolist(), "num_train_timesteps": 37},
    "zero SNR": {"beta_schedule": "scaled_linear", "beta_end": 0.012, "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("cls", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_schedules_equal_the_schedulers_own_tables(cls: str, case: str) -> None:
    scheduler = getattr(diffusers, cls)(**TABLES[case])
    sde = interop.sde_from_diffusers(scheduler.config)
    assert isinstance(sde, ss.Discrete) and scheduler.config.num_train_timesteps == sde.N
    ours = torch.tensor([sde.alpha_bar(i + 1) for i in range(sde.N)], dtype=f64)
    theirs = scheduler.alphas_cumprod.double()
    if case == "zero SNR":
        assert ours[-1] == 0.0
        assert theirs[-1] <= 2**-24, "theirs is patched with 2⁻²⁴ in some classes"
    # Their table is a float32 product of N factors: each rounds by 6e-8 of itself.
    assert torch.allclose(ours[:-1], theirs[:-1], rtol=6e-8 * sde.N, atol=1e-7)
    assert float((ours - theirs).abs().max()) < 1e-6
    saved = json.loads(scheduler.to_json_string())  # what a scheduler_config.json holds
    assert interop.sde_from_diffusers(saved) == sde


def test_the_sigmoid_schedule_equals_ddpms() -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="sigmoid")
    sde = interop.sde_from_diffusers(scheduler.config)
    ours = torch.tensor([sde.alpha_bar(i + 1) for i in range(1000)], dtype=f64)
    assert torch.allclose(ours, scheduler.alphas_cumprod.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("index", [0, 500, 999])
def test_x0_equals_that_of_the_scheduler_at_the_label_it_gives(prediction: str, index: int) -> None:
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(1000)
    assert index in scheduler.timesteps.tolist()
    x, out = (ss.Noise(i).normal((2, 4, 8, 8), 0) for i in (0, 1))
    labels = []
    model = interop.from_diffusers(lambda x, label: labels.append(label) or out, scheduler.config)
    got = model.x0(x, model.sde.t_of_index(index))
    assert labels[-1].tolist() == [float(index)] * 2
    want = scheduler.step(out, index, x).pred_original_sample
    assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def test_add_noise_of_the_scheduler_is_perturb() -> None:
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    sde = interop.sde_from_diffusers(scheduler.config)
    x0, eps = (ss.Noise(i).normal((5, 3, 4, 4), 0) for i in (0, 1))
    index = torch.tensor([0, 10, 400, 900, 999])
    want = scheduler.add_noise(x0, eps, index)
    assert torch.allclose(sde.perturb(x0, sde.t_of_index(index), eps), want, rtol=1e-4, atol=1e-4)


FLOWS = ["FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"]


@pytest.mark.parametrize("cls", FLOWS)
def test_flow_matching_schedulers_are_the_straight_lines_at_labels_1000_t(cls: str) -> None:
    # scheduler.config does not hold the class's name; scheduler_config.json does.
    scheduler = getattr(diffusers, cls)(shift=3.0)
    for config in (scheduler.config, json.loads(scheduler.to_json_string())):
        seen = Recorder()
        model = interop.from_diffusers(seen, config)
        assert model.sde == ss.Flow() and model.predicts == "velocity"
        model.x0(torch.ones(3, 2), 0.25)
        assert seen.label.tolist() == [250.0] * 3
    # Their update is x + (σ' − σ) out, the Euler step of dx/dt = out.
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    x, out = (ss.Noise(i).normal((2, 3), 0) for i in (0, 1))
    s, t = scheduler.sigmas[1].item(), scheduler.sigmas[2].item()
    assert scheduler.timesteps[1].item() == pytest.approx(1000 * s)
    scheduler.step(out, scheduler.timesteps[0], x)
    want = scheduler.step(out, scheduler.timesteps[1], x).prev_sample
    model = interop.from_diffusers(lambda x, label: out, scheduler.config)
    assert torch.allclose(x + (t - s) * ss.denoisers.Reverse(model, 0.0).drift(x, s), want, rtol=1e-5, atol=1e-6)


def test_a_multistep_scheduler_set_to_flow_is_flow() -> None:
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    model = interop.from_diffusers(Recorder(), scheduler.config)
    assert model.sde == ss.Flow() and model.predicts == "velocity"


def test_learned_variance_of_a_configuration_is_split_off() -> None:
    x = ss.Noise(0).normal((2, 4, 4, 4), 0)
    for kind in ("learned", "learned_range"):
        scheduler = diffusers.DDPMScheduler(variance_type=kind)
        model = interop.from_diffusers(lambda x, t: torch.cat([x, 2 * x], dim=1), scheduler.config)
        assert model.learned_variance and torch.equal(model.x0_and_variance(x, 5.0)[1], 2 * x)
    fixed = interop.from_diffusers(lambda x, t: x, diffusers.DDPMScheduler(variance_type="fixed_small").config)
    assert not fixed.learned_variance


def test_outputs_of_networks_are_unwrapped() -> None:
    config = diffusers.DDPMScheduler().config
    x = torch.ones(2, 3)
    plain = interop.from_diffusers(lambda x, t, **cond: x / 2, config)
    wrapped = interop.from_diffusers(lambda x, t, **cond: SimpleNamespace(sample=x / 2), config)
    assert torch.equal(plain.x0(x, 5.0), wrapped.x0(x, 5.0))
    seen = Recorder()
    interop.from_diffusers(seen, config).x0(x, 5.0, encoder_hidden_states=x, class_labels=None)
    assert seen.cond == {"encoder_hidden_states": x, "class_labels": None}
    first = interop.from_diffusers(lambda x, t, **cond: (x / 2, "more"), config)
    assert torch.equal(plain.x0(x, 5.0), first.x0(x, 5.0))
    with pytest.raises(TypeError, match="must return a tensor, got str; unpack it"):
        interop.from_diffusers(lambda x, t: "x", config).x0(x, 5.0)


def test_zero_terminal_snr_refuses_noise_and_takes_v() -> None:
    keywords = {"rescale_betas_zero_snr": True, "beta_schedule": "scaled_linear", "beta_end": 0.012}
    with pytest.raises(ValueError, match="α = 0"):
        interop.from_diffusers(Recorder(), diffusers.DDIMScheduler(**keywords).config)
    config = diffusers.DDIMScheduler(**keywords, prediction_type="v_prediction").config
    x = torch.ones(2, 3)
    assert torch.equal(interop.from_diffusers(lambda x, t: 3 * x, config).x0(x, 1000.0), -3 * x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.linear(x) * t[:, None].to(x.dtype)


MADE = {
    "ddpm": lambda net: interop.from_ddpm(net, ss.processes.betas("linear", 10)),
    "vp": lambda net: interop.from_score_sde(net, "vp"),
    "ve": lambda net: interop.from_score_sde(net, "ve"),
    "edm": lambda net: interop.from_edm(net),
    "flow": lambda net: interop.from_flow(net),
    "flow from the other end": lambda net: interop.from_flow(net, data_at=1),
    "diffusers": lambda net: interop.from_diffusers(net, diffusers.DDPMScheduler().config),
    "diffusers flow": lambda net: interop.from_diffusers(net, diffusers.FlowMatchEulerDiscreteScheduler().config),
}


@pytest.mark.parametrize("case", MADE)
def test_the_network_stays_a_module_with_its_dtype_and_pickles(case: str) -> None:
    torch.manual_seed(0)
    net = Net()
    model = MADE[case](net)
    assert any(p is net.linear.weight for p in model.parameters()), "trained, moved and saved with the denoiser"
    x, t = ss.Noise(0).normal((2, 3), 0), 0.5 * model.sde.T
    want = model.x0(x, t)
    assert torch.equal(pickle.loads(pickle.dumps(model)).x0(x, t), want)
    half = MADE[case](Net().bfloat16())
    assert half.x0(x, t).dtype == torch.float32, "and computes in its own dtype, through any wrapper"


def config(**keywords: object) -> dict[str, object]:
    return {**diffusers.DDIMScheduler().config, **keywords}


def refuse(**keywords: object) -> object:
    return interop.sde_from_diffusers(config(**keywords))


def without(*keys: str) -> dict[str, object]:
    return {k: v for k, v in diffusers.DDIMScheduler().config.items() if k not in keys}


BAD = {
    "unknown key": (lambda: refuse(zeta=3.0), ValueError, "not understood: zeta; remove them"),
    "unknown keys": (lambda: refuse(zeta=1, omega=7.0), ValueError, "not understood: omega, zeta"),
    "unknown schedule": (
        lambda: refuse(beta_schedule="laplace"),
        ValueError,
        "`beta_schedule` must be one of linear.*'laplace'; give `trained_betas`",
    ),
    "no schedule": (lambda: interop.sde_from_diffusers({}), ValueError, "`beta_schedule`.*got None"),
    "no ends": (
        lambda: interop.sde_from_diffusers(without("beta_start", "beta_end")),
        ValueError,
        "`config` must have beta_start and beta_end",
    ),
    "unknown prediction": (
        lambda: interop.from_diffusers(Recorder(), config(prediction_type="noise")),
        ValueError,
        "`prediction_type` must be one of epsilon.*'noise'",
    ),
    "flow prediction without a flow": (
        lambda: refuse(use_flow_sigmas=False, prediction_type="flow_prediction"),
        ValueError,
        "use_flow_sigmas=False and prediction_type='flow_prediction'.*set use_flow_sigmas=True",
    ),
    "v on a flow": (
        lambda: refuse(use_flow_sigmas=True, prediction_type="v_prediction"),
        ValueError,
        "prediction_type='v_prediction' on a flow",
    ),
    "no scheduler": (lambda: interop.from_diffusers(Recorder()), TypeError, "`scheduler` must be given with a network"),
    "range of noise": (lambda: refuse(sigma_max=700.0), ValueError, "not understood: sigma_max"),
    "steps as float": (lambda: refuse(num_train_timesteps=10.5), TypeError, "`num_train_timesteps` must be an integer"),
    "no scheduler at all": (
        lambda: interop.sde_from_diffusers("DDIM"),
        TypeError,
        "`scheduler` must be a scheduler of diffusers or its configuration.*got str",
    ),
    "bad trained betas": (lambda: refuse(trained_betas=[0.1, 1.5]), ValueError, r"betas\[1\] = 1.5"),
    "unknown kind": (lambda: interop.from_score_sde(Recorder(), "vpsde"), ValueError, "`kind` must be one of 'vp'"),
    "parameter of another process": (
        lambda: interop.from_score_sde(Recorder(), "ve", beta_min=0.1),
        TypeError,
        "beta_min",
    ),
    "data nowhere": (
        lambda: interop.from_flow(Recorder(), data_at=0.5),
        ValueError,
        "`data_at` must be 0 or 1, got 0.5",
    ),
    "edm upside down": (lambda: interop.from_edm(Recorder(), sigma_max=0.001), ValueError, "`sigma_min`.*below 0.001"),
    "no network": (lambda: interop.from_edm(None), TypeError, "`net` must be a module or a function"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


def test_keys_that_are_none_change_nothing() -> None:
    assert refuse(sigma_max=None, snr_shift_scale=None) == refuse()
    assert refuse(timestep_type="discrete", use_flow_sigmas=False) == refuse()
