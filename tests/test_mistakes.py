"""What the mistakes of a new user are told: the argument, what is allowed, and the fix."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scoresde as ss
from scoresde.solvers.rule import Solver

VP = ss.VP()
MIX = ss.GaussianMixture(VP, [[-1.0, 0.0], [1.0, 0.0]], std=0.3)
DATA = MIX.sample(8, seed=0)
PLAN = ss.DDIM().plan(VP, ss.grids.uniform_lam(VP, 3))
GUIDED = ss.ClassifierFree(MIX, 2.0, null={"lable": 0.0})
FOREIGN = ss.Gaussian(ss.Flow(), torch.zeros(2), torch.ones(2))


NET = ss.Denoiser(ss.nn.MLP(2, hidden=8, depth=1, classes=3, seed=0), VP, predicts="eps")
PHOTOS = np.zeros((4, 8, 8, 3), dtype=np.uint8)


def of_diffusers(x: torch.Tensor, t: torch.Tensor) -> Any:
    """An output of a class of diffusers, which is no tensor."""
    return type("UNet2DOutput", (), {"__module__": "diffusers.models.unets.unet_2d"})()


class Unfinished(ss.solvers.Solver):
    """A solver without a step."""

    order = 1


def solve(**options: Any) -> Any:
    return ss.solve(MIX, (4, 2), **options)


def optimal(name: str, first: Any, **options: Any) -> Any:
    return getattr(ss.fitting, name)(MIX, first, 3, **options)


MISSPELLED: dict[str, Callable[[], Any]] = {
    "sample": lambda: ss.sample(MIX, (4, 2), nffe=5),
    "encode": lambda: ss.encode(MIX, DATA, sed=0),
    "log_prob": lambda: ss.log_prob(MIX, DATA, rtoll=1e-3),
    "log_prob of another function": lambda: ss.log_prob(MIX, DATA, nfe=10),
    "sample_with_log_prob": lambda: ss.solve(MIX, (4, 2), ss.likelihood.FlowDensity(n_probe=3)),
    "elbo": lambda: ss.elbo(MIX, DATA, n_time=3),
    "denoiser_error": lambda: ss.likelihood.denoiser_error(MIX, MIX, DATA, [0.5], predictions="eps"),
    "path_kl": lambda: ss.likelihood.path_kl(MIX, MIX, DATA, n_time=3),
    "fit": lambda: ss.fit(PLAN, MIX, (8, 2), step=3),
    "parallel": lambda: ss.solve(MIX, (4, 2), ss.sampling.Parallel(PLAN, toll=0.1)),
    "transitions": lambda: next(ss.sampling.transitions(PLAN, MIX, DATA, stats=[])),
    "langevin": lambda: ss.sampling.langevin(MIX, DATA, 0.5, 0.1, sed=0),
    "gits": lambda: optimal("gits", (8, 2), finer=10),
    "equal_error": lambda: optimal("equal_error", (8, 2), finer=10),
    "align_your_steps": lambda: optimal("align_your_steps", DATA, sed=0),
    "check_denoiser": lambda: ss.check_denoiser(ss.Denoiser(MIX.eps, VP, predicts="eps"), DATA, margins=1.0),
    "Gaussian.skip_errors": lambda: ss.Gaussian.estimate(VP, DATA).skip_errors(MIX, point=3),
    "Reversible": lambda: ss.solve(MIX, DATA, ss.integrators.Reversible(couplin=0.9)),
    "mean_squared_score": lambda: ss.sampling.mean_squared_score(MIX, DATA, [1.0, 0.5], sed=0),
    "torchdiffeq": lambda: ss.solve(MIX, (4, 2), ss.integrators.TorchDiffEq(cloc="t")),
    "torchsde": lambda: ss.solve(MIX, (4, 2), ss.integrators.TorchSDE(step=3)),
}


@pytest.mark.parametrize("who", MISSPELLED)
def test_a_misspelled_option_is_pythons_own_error(who: str) -> None:
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument '\w+'"):
        MISSPELLED[who]()


def test_conditions_are_let_through() -> None:
    for name in ("label", "y", "text", "class_labels", "mask", "context", "noise_level"):
        assert ss.sample(MIX.given(**{name: 1}), (1, 2), steps=2, seed=0).shape == (1, 2)
        assert ss.log_prob(
            MIX.given(**{name: 1}), DATA[:1], tolerance=ss.likelihood.Tolerance(steps=1)
        ).value.shape == (1,)


MISTAKES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "steps and rtol": (
        lambda: ss.likelihood.Tolerance(steps=3, rtol=1e-3),
        ValueError,
        "`rtol` has no meaning with `steps`",
    ),
    "steps and max_nfe": (lambda: ss.likelihood.Tolerance(steps=3, max_nfe=9), ValueError, "`max_nfe` has no meaning"),
    "probes of an exact trace": (lambda: ss.likelihood.Probes("exact", n=4), ValueError, "which takes no probes"),
    "probe of Hutch++": (
        lambda: ss.likelihood.Probes("hutch++", distribution="gaussian"),
        ValueError,
        "`distribution` has no meaning with `kind`='hutch..'",
    ),
    "reference and data_std": (
        lambda: ss.log_prob(MIX, DATA, reference=ss.GaussianMixture(VP, [[0.0, 0.0]], std=1.0), data_std=2.0),
        ValueError,
        "`data_std` has no meaning with `reference`",
    ),
    "start of another process": (
        lambda: ss.solve(MIX, (4, 2), start=FOREIGN, steps=3),
        ValueError,
        r"`start` is a Gaussian under Flow\(.*the model is on VP.*Gaussian.estimate\(model.sde, data\)",
    ),
    "the same of encode": (lambda: ss.encode(MIX, DATA, start=FOREIGN), ValueError, "`start` is a Gaussian under Flow"),
    "the same of fit": (
        lambda: ss.fit(PLAN, MIX, (8, 2), start=FOREIGN),
        ValueError,
        "`start` is a Gaussian under Flow",
    ),
    "bits without levels": (
        lambda: ss.likelihood.bits_from_nats(torch.zeros(1), 64),
        TypeError,
        "`levels` must be.*256 for bytes",
    ),
    "encode with noise": (
        lambda: ss.encode(MIX, DATA, ss.solvers.EulerAncestral()),
        ValueError,
        "`solver` must be deterministic.*EulerAncestral.*draws noise",
    ),
    "decode with noise": (lambda: ss.decode(MIX, DATA, ss.DDPM()), ValueError, "`solver` must be deterministic"),
    "steps as text": (lambda: solve(steps="10"), TypeError, r"`steps` must be an integer, got '10' \(str\)"),
    "nfe as text": (lambda: solve(nfe="10"), TypeError, r"`nfe` must be an integer, got '10' \(str\)"),
    "encode's steps as text": (lambda: ss.encode(MIX, DATA, steps="10"), TypeError, "`steps` must be an integer"),
    "dtype as text": (
        lambda: ss.Start(dtype="float32"),
        TypeError,
        "`dtype` must be torch.float32 or torch.float64, got 'float32'; write torch.float32",
    ),
    "dtype of exact samples": (lambda: MIX.sample(3, dtype="float32"), TypeError, "write torch.float32"),
    "points as a tensor": (
        lambda: ss.sampling.interpolate(MIX, DATA[:1], DATA[1:2], torch.linspace(0, 1, 5)),
        TypeError,
        r"`n` must be an integer, got a float32 tensor of shape \(5,\)",
    ),
    "a misspelled null condition": (
        lambda: ss.sample(GUIDED.given(label=torch.ones(4)), (4, 2), steps=2),
        ValueError,
        r"`null` names lable, which is not among the conditions given, label; did you mean null=\{'label'",
    ),
    "a condition that is missing": (
        lambda: ss.sample(GUIDED, (4, 2), steps=2),
        ValueError,
        r"the condition lable is missing.*guided\.given\(lable=",
    ),
    "an array for a state": (
        lambda: ss.sample(MIX, DATA.numpy(), steps=2),  # type: ignore[arg-type]
        TypeError,
        r"`shape_or_x` must be a state.*got a NumPy array of shape \(8, 2\); use torch.as_tensor\(shape_or_x, dtype=",
    ),
    "an array for data": (
        lambda: MIX.x0(DATA.numpy(), 0.5),  # type: ignore[arg-type]
        TypeError,
        r"got ndarray; use torch.as_tensor\(x, dtype=torch.float32\)",
    ),
    "bytes of images": (
        lambda: ss.DSM(NET)(torch.zeros(4, 2, dtype=torch.uint8)),
        TypeError,
        r"got uint8: use `x`.float\(\), or `x` / 127.5 - 1 for images",
    ),
    "an array of bytes": (
        lambda: ss.DSM(NET)(PHOTOS),  # type: ignore[arg-type]
        TypeError,
        r"got ndarray; use torch\.from_numpy\(x\)\.float\(\), or torch\.from_numpy\(x\) / 127\.5 - 1 for images "
        r"with values 0 … 255; channels come first: torch\.from_numpy\(x\)\.permute\(0, 3, 1, 2\)\.",
    ),
    "an array of bytes for a trainer": (
        lambda: ss.Trainer(ss.DSM(NET), PHOTOS),
        TypeError,
        r"got a uint8 array of shape \(4, 8, 8, 3\); use .*torch\.from_numpy\(data\) / 127\.5 - 1",
    ),
    "bytes with the channels last": (
        lambda: ss.DSM(NET)(torch.from_numpy(PHOTOS)),
        TypeError,
        r"0 … 255; channels come first: `x`\.permute\(0, 3, 1, 2\)\.",
    ),
    "images with the channels last": (
        lambda: ss.nn.UNet(3, seed=0)(torch.zeros(4, 16, 16, 3), torch.ones(4)),
        ValueError,
        r"must be \(B, 3, n1, n2\), got shape \(4, 16, 16, 3\); channels come first: `x`\.permute\(0, 3, 1, 2\)\.",
    ),
    "an array to be standardised": (
        lambda: ss.data.Standardize.fit(DATA.numpy()),  # type: ignore[arg-type]
        TypeError,
        r"`data` must be a torch.Tensor, got ndarray; use torch.as_tensor\(data, dtype=torch.float32\)",
    ),
    "a list to be encoded": (
        lambda: ss.encode(MIX, [[0, 1]]),  # type: ignore[arg-type]
        TypeError,
        r"; use torch.as_tensor\(x, dtype=torch.float32\)",
    ),
    "an array for a diagnosis": (
        lambda: ss.check_denoiser(NET, DATA.numpy()),  # type: ignore[arg-type]
        TypeError,
        r"got ndarray; use torch.as_tensor\(x, dtype=torch.float32\)",
    ),
    "a list for a mask": (
        lambda: ss.inverse.Mask([True, False]),  # type: ignore[arg-type]
        TypeError,
        r"`mask` must be a torch.Tensor, got \[True, False\]; use torch.as_tensor\(mask\)\.",
    ),
    "a state for a measurement": (
        lambda: ss.inverse.Measurement(ss.inverse.Mask(torch.tensor([True, False])), DATA, std=0.1),
        ValueError,
        r"`y` must have shape \(B, 1\), the output of the operator, got \(8, 2\); .*y = operator\(y\)",
    ),
    "an output of diffusers": (
        lambda: ss.sample(ss.Denoiser(of_diffusers, VP, predicts="eps"), (2, 2), steps=2),  # type: ignore[arg-type]
        TypeError,
        r"for a network of diffusers, ss\.interop\.from_diffusers\(net, scheduler\); else unpack it",
    ),
    "a list of labels": (
        lambda: ss.sample(NET.given(label=[0, 1]), (2, 2), steps=2),
        TypeError,
        r"`label` must be None, a number or a tensor, got list; use torch.as_tensor\(label\)",
    ),
    "an array among tensors": (
        lambda: ss.Trainer(ss.DSM(NET), {"x": DATA, "label": DATA[:, 0].long().numpy()}),  # type: ignore[dict-item]
        TypeError,
        r"`data`\['label'\] must be a torch.Tensor, got ndarray; use torch.as_tensor\(data\['label'\]\)",
    ),
    "a condition that the network does not have": (
        lambda: NET.given(labels=torch.tensor([0])),
        TypeError,
        "`labels` is no condition of the network, which takes label, context; did you mean label=",
    ),
    "a rule without a leg": (
        lambda: Unfinished().plan(VP, [1.0, 0.5, 0.1]),
        NotImplementedError,
        r"Unfinished must define `leg\(tape, leg\)`, which adds the rows of one step",
    ),
    "a rule without an order": (
        lambda: type("Orderless", (ss.solvers.Solver,), {}),
        TypeError,
        "Orderless must define `order`, its order of convergence: a class attribute, a field or a property",
    ),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_with_its_fix(what: str) -> None:
    go, error, said = MISTAKES[what]
    with pytest.raises(error, match=re.compile(said, re.S)):
        go()


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("v_prediction", "v"), ("epsilon", "eps"), ("noise", "eps"), ("sample", "x0"), ("flow", "velocity")],
)
def test_the_predictions_of_other_libraries_are_known(theirs: str, ours: str) -> None:
    with pytest.raises(ValueError, match=f"`predicts` must be one of .*; did you mean '{ours}'"):
        ss.Denoiser(NET.net, VP, predicts=theirs)


def test_a_network_with_open_conditions_takes_every_name() -> None:
    ss.Denoiser(lambda x, t, **cond: cond["other"] * x, VP, predicts="x0").given(other=torch.ones(1, 1))


def test_exact_denoisers_say_what_they_are() -> None:
    assert repr(MIX) == f"GaussianMixture(2 components, event=(2,), sde={VP})"
    assert repr(ss.denoisers.Empirical(VP, DATA)) == f"Empirical(8 points, event=(2,), sde={VP})"
    assert repr(FOREIGN) == f"Gaussian(event=(2,), sde={ss.Flow()})"


# What a fit, a trainer or a parallel run cannot know what to do with.


def test_a_fit_follows_only_what_it_can() -> None:
    model = ss.GaussianMixture(ss.VP(), torch.tensor([[-1.0], [1.0]]), std=0.3)
    flow, noisy, fine = (
        rule.plan(model.sde, ss.grids.karras(model.sde, n))
        for rule, n in ((ss.DDIM(), 4), (ss.SDEDPMSolverPP(2), 4), (ss.SDEDPMSolverPP(2), 20))
    )
    other = ss.DDIM().plan(ss.VP(beta_max=5.0), ss.grids.karras(ss.VP(beta_max=5.0), 20))
    for message, rule, how in (
        ("`teacher` was written for VP", flow, {"teacher": other}),
        ("`rule` was written for VP", other, {}),
        ("`teacher` draws noise that the plan does not", flow, {"teacher": fine}),
        (r"give seed=Noise\(seed, path=True\)", noisy, {"teacher": fine}),
        ("call it, grid=ss.grids.karras", ss.DDIM(), {"grid": ss.grids.karras}),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ss.fit(rule, model, (24, 1), steps=1, **how)
    blind = ss.Denoiser(lambda x, t: x * float("nan"), ss.VP(), predicts="eps")
    with pytest.raises(ValueError, match="the results of `teacher` are not all finite"):
        ss.fit(flow, blind, (24, 1), steps=1)
    ss.fit(noisy, model, (24, 1), steps=1, teacher=fine, seed=ss.Noise(0, path=True))


def test_what_is_not_finite_is_said_everywhere() -> None:
    blind = ss.Denoiser(lambda x, t: x * float("nan"), ss.VP(), predicts="eps")
    with pytest.warns(UserWarning, match="not all finite"):
        ss.solve(blind, (2, 2), ss.sampling.Parallel(ss.DDIM()), grid=ss.grids.karras, steps=4)


def test_a_trainer_wants_a_loss_and_an_optimiser_of_it() -> None:
    net, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    model = ss.Denoiser(lambda x, t: net(x), ss.VP(), predicts="eps")
    model.net = torch.nn.ModuleList([net])
    with pytest.raises(TypeError, match="`loss` must be a loss such as DSM"):
        ss.Trainer(model, torch.zeros(8, 2), batch=8)
    with pytest.raises(ValueError, match="`optimiser` has none of the parameters"):
        ss.Trainer(ss.DSM(model), torch.zeros(8, 2), torch.optim.Adam(other.parameters()), batch=8)


def test_a_rule_that_returns_nothing_is_told_what_to_return() -> None:
    class Mute(Solver):
        order = 1

        def leg(self, tape: ss.solvers.Tape, leg: ss.solvers.Leg) -> Any:
            tape.move(leg.row, leg.t, [0], evaluates=False)

    with pytest.raises(TypeError, match=r"`leg` of Mute must return \(row, history\), got None"):
        Mute().plan(ss.VP(), [1.0, 0.5])


def test_a_file_that_is_no_plan_is_named(tmp_path: Path) -> None:
    whole = tmp_path / "plan.json"
    ss.DDIM().plan(ss.VP(), [1.0, 0.5]).save(whole)
    text = whole.read_text()
    for name, content in (("cut", text[:-20]), ("row", text.replace('"t": 1.0', '"s": 1.0')), ("list", "[1]")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} is not a plan that `save` wrote"):
            ss.Plan.load(tmp_path / name)
    assert ss.Plan.load(whole).nfe == 1


def test_times_are_no_weighting() -> None:
    model = ss.Denoiser(lambda x, t: x, ss.VP(), predicts="eps")
    with pytest.raises(TypeError, match=r"did you mean times=LogitNormal\(...\)"):
        ss.DSM(model, ss.training.times.LogitNormal())


def test_an_order_is_a_number() -> None:
    with pytest.raises(TypeError, match="`order`"):
        ss.UniPC(order="2")  # type: ignore[arg-type]


# Mistakes of those who come from other libraries.

LABELLED = ss.Denoiser(ss.nn.MLP(2, classes=3, hidden=8, depth=1), VP, predicts="eps")
ALPHAS_CUMPROD = (1 - ss.processes.betas("linear", 50)).cumprod(0)
HABITS: dict[str, tuple[Callable[[], Any], str]] = {
    "text for a time": (
        lambda: ss.Denoiser(NET.net, VP, predicts="eps", time="1000t"),
        r"function such as lambda t: 1000",
    ),
    "a number for a time": (
        lambda: ss.Denoiser(NET.net, VP, predicts="eps", time=1000),  # type: ignore[arg-type]
        r"or a function such as lambda t: 1000 \* t\.$",
    ),
    "the class of a network": (
        lambda: ss.Denoiser(ss.nn.MLP, VP, predicts="eps"),
        "got the class MLP; call it first",
    ),
    "no prediction": (
        lambda: ss.Denoiser(NET.net, VP),  # type: ignore[call-arg]
        "'predicts'; give one of 'eps', .*as in predicts='eps'",
    ),
    "a prediction without its name": (
        lambda: ss.Denoiser(NET.net, VP, "eps"),  # type: ignore[call-arg, misc]
        "positional arguments but 4 were given; give the others by name, as in predicts='eps'",
    ),
    "a network for a loss": (
        lambda: ss.Trainer(ss.nn.MLP(2, hidden=8, depth=1), DATA),
        r"`loss` must be a loss such as DSM\(model\), got MLP",
    ),
    "data without x": (
        lambda: ss.Trainer(ss.DSM(LABELLED), {"images": DATA, "label": DATA[:, 0]}),
        "samples as 'x'.*it has the keys 'images', 'label'",
    ),
    "y for the label": (lambda: LABELLED.given(y=torch.zeros(8).long()), r"takes label, context; did you mean label="),
    "y in a loop": (lambda: ss.DSM(LABELLED)(DATA, y=torch.zeros(8).long()), "did you mean label="),
    "steps for a rate": (
        lambda: ss.VP(1000),
        "`beta_min` = 1000 .* looks like a number of steps.*Discrete",
    ),
    "alphas_cumprod": (lambda: ss.Discrete(ALPHAS_CUMPROD), "look like alphas_cumprod; betas are 1 - ratios"),
    "num_classes": (lambda: ss.nn.MLP(2, num_classes=3), "use `classes`"),  # type: ignore[call-arg]
    "in_channels": (lambda: ss.nn.UNet(in_channels=3), "use `channels`"),  # type: ignore[call-arg]
    "beta_start": (lambda: ss.VP(beta_start=0.1), "use `beta_min`"),  # type: ignore[call-arg]
    "solver_order": (lambda: ss.UniPC(solver_order=2), "use `order`"),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("what", HABITS)
def test_a_habit_from_elsewhere_is_told_with_its_fix(what: str) -> None:
    go, said = HABITS[what]
    with pytest.raises((TypeError, ValueError), match=re.compile(said, re.S)):
        go()


def test_the_ratios_of_alphas_cumprod_are_betas() -> None:
    a = ALPHAS_CUMPROD
    betas = 1 - torch.cat([a[:1], a[1:] / a[:-1]])
    torch.testing.assert_close(betas, ss.processes.betas("linear", 50), rtol=1e-9, atol=1e-12)
    ss.Discrete(betas)


def test_a_trainer_warns_of_a_process_that_keeps_the_data() -> None:
    net = ss.nn.MLP(2, hidden=8, depth=1)
    loss = ss.DSM(ss.Denoiser(net, ss.VP(beta_min=1e-4, beta_max=0.02), predicts="eps"))
    with pytest.warns(UserWarning, match=r"signal-to-noise ratio of VP.* is 99.*Discrete"):
        ss.Trainer(loss, torch.randn(64, 2), batch=8, ema=None).fit(1)
