"""Saved models: a loaded model is the saved one to the last bit, and a folder that is not whole is refused by name."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from operator import mul, sub
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scoresde as ss
from scoresde._build import conditions, construct, describe
from scoresde.denoisers import Card
from scoresde.denoisers.saving import EXTRAS, MANIFEST, PLAN, WEIGHTS, digest
from scoresde.interop import LoadError
from scoresde.interop.diffusers_schedules import Consistency


def net(features: int = 3, **options: Any) -> ss.nn.MLP:
    made = ss.nn.MLP(features, hidden=16, depth=1, seed=0, **options)
    stirred = torch.Generator().manual_seed(1)
    for p in made.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=stirred)
    return made.eval()


def model(**options: Any) -> ss.Denoiser:
    given: dict[str, Any] = {"predicts": "eps", **options}
    return ss.Denoiser(given.pop("net", None) or net(), given.pop("sde", None) or ss.VP(), **given)


class Own(nn.Module):
    """A network that the library knows nothing of, with tied weights and a buffer that is not saved."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)
        self.b.weight = self.a.weight
        self.register_buffer("period", torch.tensor(0.3), persistent=False)
        self.register_buffer("count", torch.tensor(7))

    def forward(self, x: Tensor, time: Tensor, *, shift: float = 0.0) -> Tensor:
        out: Tensor = self.b(torch.sin(self.a(x) * self.period)) + time[:, None].to(x.dtype) + shift
        return out


def same(a: ss.Denoiser, b: ss.Denoiser, event: tuple[int, ...] = (3,), **cond: Tensor) -> None:
    """Everything that a denoiser says, and its samples, agree to the last bit."""
    for name in ("sde", "predicts", "precondition", "learned_variance", "check_finite", "shared"):
        assert getattr(a, name) == getattr(b, name), name
    assert a.net.state_dict().keys() == b.net.state_dict().keys()  # type: ignore[union-attr]
    for (name, p), q in zip(a.net.state_dict().items(), b.net.state_dict().values(), strict=True):  # type: ignore[union-attr]
        assert p.dtype == q.dtype and torch.equal(p, q), name
    x = torch.randn(4, *event, generator=torch.Generator().manual_seed(2))
    for t in (0.3 * a.sde.T, torch.linspace(0.2, 0.9, 4) * a.sde.T):
        assert torch.equal(a.x0(x, t, **cond), b.x0(x, t, **cond))
    draws = [ss.sample(m.given(**cond) if cond else m, (4, *event), steps=3, seed=0) for m in (a, b)]
    assert draws[0].isfinite().all() and torch.equal(*draws)


CASES: dict[str, Callable[[], ss.Denoiser]] = {
    "ε on VP": model,
    "F, preconditioned": lambda: model(sde=ss.EDM(), predicts="F", precondition=ss.Preconditioning(0.7)),
    "velocity": lambda: model(sde=ss.Flow(), predicts="velocity"),
    "β list, nearest index": lambda: model(
        sde=ss.Discrete(ss.processes.betas("cosine", 50)), time="nearest_index", check_finite=True
    ),
    "learned variance": lambda: model(net=net(out_features=6), learned_variance=True),
    "learned log-variance": lambda: model(net=net(out_features=6), learned_variance="log"),
    "float64": lambda: model(net=net().double()),
    "bfloat16": lambda: model(net=net().bfloat16()),
    "time of score_sde": lambda: ss.interop.from_score_sde(net(), "vp"),
    "sign and time of flows": lambda: ss.interop.from_flow(net(), data_at=1),
    "a scheduler's network": lambda: ss.interop.from_diffusers(
        net(), {"num_train_timesteps": 1000, "shift": 3.0, "_class_name": "FlowMatchEulerDiscreteScheduler"}
    ),
    "a consistency network": lambda: model(
        net=Consistency(net(), sigma_min=0.002, sigma_data=0.5).eval(), sde=ss.EDM(), predicts="x0", time="sigma"
    ),
    "shared names": lambda: model(shared=("ids",)),
    "shifted": lambda: model(sde=ss.processes.Shifted(ss.Flow(), 3.0), predicts="v"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loaded_model_is_the_saved_one_to_the_bit(name: str, tmp_path: Path) -> None:
    first = CASES[name]()
    before = torch.random.get_rng_state()
    again = ss.load(first.save(tmp_path / "new" / "model"))
    assert torch.equal(torch.random.get_rng_state(), before), "loading draws nothing from the global generator"
    assert not again.training
    same(first, again)
    same(again, ss.load(again.save(tmp_path / "twice")))


def test_a_unet_with_conditions_and_dropout_samples_alike(tmp_path: Path) -> None:
    unet = ss.nn.UNet(1, width=8, multipliers=(1, 2), blocks=1, classes=4, dropout=0.5, seed=0)
    unet.last.weight.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    first = model(
        net=unet.eval(), sde=ss.Cosine(), predicts="v", precondition=ss.Preconditioning(0.5), time="log_sigma"
    )
    again = ss.load(first.save(tmp_path / "unet", card=Card(conditions=["label"])))  # type: ignore[arg-type]
    same(first, again, (1, 8, 8), label=torch.tensor([0, 1, 2, 4]))
    assert again.card is not None and again.card.conditions == ("label",)


def test_every_argument_of_a_denoiser_is_written(tmp_path: Path) -> None:
    written = json.loads((model().save(tmp_path / "m") / MANIFEST).read_text())
    arguments = {*inspect.signature(ss.Denoiser).parameters} - {"net", "sde"}
    assert arguments <= written.keys()


def test_a_network_of_ones_own_is_built_if_allowed_or_given(tmp_path: Path) -> None:
    own = Own()
    own.b.bias.data += 1
    first = ss.Denoiser(own, ss.VP(), predicts="x0")
    plain = first.save(tmp_path / "plain")
    with pytest.raises(LoadError, match=r"plain cannot be loaded: .*test_folder:Own.*load\(folder, net="):
        ss.load(plain)
    again = ss.load(plain, net=Own())
    same(first, again)
    assert again.card is not None and again.card.conditions == ()
    inner = again.net
    assert isinstance(inner, Own) and inner.a.weight is inner.b.weight, "weights stay tied"

    built = first.save(tmp_path / "built", build={"class": f"{Own.__module__}:Own", "arguments": {"size": 3}})
    with pytest.raises(LoadError, match=r"not in an allowed package .*importing it would run its code.*allow="):
        ss.load(built)
    same(first, ss.load(built, allow=[Own.__module__]))
    doubled = ss.Denoiser(copy.deepcopy(own).double(), ss.VP(), predicts="x0")
    same(doubled, ss.load(doubled.save(tmp_path / "double"), net=Own()))
    with pytest.raises(LoadError, match=r"weights in .*model\.safetensors do not fit <Own.*\(3,\) instead of \(5,\)"):
        ss.load(plain, net=Own(5))
    with pytest.raises(LoadError, match=r"do not fit <MLP.*a.weight is unknown.*and \d+ more; build the network"):
        ss.load(plain, net=net())


def test_a_network_of_diffusers_is_built_from_its_configuration(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet1DModel(
        sample_size=16,
        in_channels=2,
        out_channels=2,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock1DNoSkip", "DownBlock1D"),
        up_block_types=("UpBlock1D", "UpBlock1DNoSkip"),
        extra_in_channels=64,
    ).eval()
    config = {"num_train_timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2, "beta_schedule": "linear"}
    first = ss.interop.from_diffusers(unet, config)
    again = ss.load(first.save(tmp_path / "diffusers"))
    assert type(again.net.net) is type(unet)  # type: ignore[union-attr]
    same(first, again, (2, 16))


def test_the_conditions_of_a_card_are_those_that_the_network_needs() -> None:
    class Needy(nn.Module):
        def forward(self, x: Tensor, time: Tensor, text: Tensor, *, size: int, flag: bool = False) -> Tensor:
            return x

    assert conditions(Needy()) == ["text", "size"] and conditions(net()) == []


def test_a_record_is_of_the_class_itself_and_of_the_network_inside() -> None:
    class Wider(ss.nn.MLP):
        def __init__(self, size: int) -> None:
            super().__init__(size, hidden=2 * size)

    assert describe(Wider(4)) is None
    flow = ss.interop.from_flow(net(), data_at=1)
    inner = {"features": 3, "hidden": 16, "depth": 1, "seed": 0}
    assert describe(flow.net) == {  # type: ignore[arg-type]
        "class": "scoresde.interop.flow_matching:FlowNet",
        "arguments": {"net": {"class": "scoresde.nn:MLP", "arguments": inner}, "sign": -1, "time_first": None},
    }
    flow.net.net = nn.Linear(3, 3)  # type: ignore[union-attr]
    exchanged = describe(flow.net)["arguments"]["net"]  # type: ignore[arg-type, index]
    assert exchanged == {"class": "torch.nn:Linear", "arguments": None}, "it is not described as the old one"
    copied = copy.deepcopy(net())
    assert describe(copied) == describe(net())


def gaussian(kind: str, sde: ss.SDE) -> ss.Gaussian:
    data = ss.GaussianMixture(ss.VP(), torch.tensor([[1.0, 0.0, 2.0], [-1.0, 1.0, 0.0]]), std=0.3).sample(60, seed=0)
    if kind == "separable":
        data = data[:, :, None] * torch.tensor([1.0, 0.5])
    return ss.Gaussian.estimate(sde, data, kind, rank=2)


@pytest.mark.parametrize("kind", ["full", "diagonal", "separable", "low rank"])
def test_the_card_is_kept(kind: str, tmp_path: Path) -> None:
    sde = ss.VP()
    start = gaussian(kind, sde)
    event = tuple(start.mean.shape)
    first = model(net=net(start.mean.numel()), sde=sde)
    scale = ss.data.Standardize(torch.tensor([1.0]), torch.tensor([0.25], dtype=torch.float64), target=0.5)
    card = Card(ss.DPMSolverPP(2), 6, event, ("label",), scale, start, "apache-2.0", "Two moons, ε-network.")
    again = ss.load(first.save(tmp_path / "m", card=card))
    kept = again.card
    assert kept is not None and kept.scale is not None and kept.gaussian is not None
    assert (kept.solver, kept.nfe, kept.event, kept.conditions) == (card.solver, 6, event, ("label",))
    assert (kept.licence, kept.notes) == ("apache-2.0", "Two moons, ε-network.")
    x = torch.randn(5, *event, generator=torch.Generator().manual_seed(3))
    assert torch.equal(kept.scale(x), scale(x)) and kept.scale.std.dtype == torch.float64 and kept.scale.target == 0.5
    assert kept.gaussian.sde == sde
    assert torch.equal(kept.gaussian.flow(x, 1.0, 0.3), start.flow(x, 1.0, 0.3))
    draws = [
        ss.sample(m, (5, *event), c.solver, nfe=c.nfe, start=c.gaussian, t_start=0.8, seed=0)  # type: ignore[arg-type]
        for m, c in ((first, card), (again, kept))
    ]
    assert torch.equal(*draws)
    assert repr(ss.load(again.save(tmp_path / "twice")).card) == repr(kept), "the card follows the model"


def test_the_device_is_that_of_the_network_and_of_the_gaussian(tmp_path: Path) -> None:
    folder = model().save(tmp_path / "m", card=Card(gaussian=gaussian("full", ss.VP())))
    again = ss.load(folder, device="meta")
    assert again.card is not None and again.card.gaussian is not None
    assert {p.device.type for p in again.parameters()} == {again.card.gaussian.mean.device.type} == {"meta"}


def test_a_fitted_plan_is_kept(tmp_path: Path) -> None:
    first = model()
    plan = ss.UniPC(2).plan(first.sde, [1.0, 0.6, 0.2, 0.0])
    folder = first.save(tmp_path / "m", card=Card(solver=plan))
    again = ss.load(folder)
    assert again.card is not None and again.card.solver == plan
    assert torch.equal(ss.sample(first, (3, 3), plan, seed=0), ss.sample(again, (3, 3), again.card.solver, seed=0))
    with pytest.raises(ValueError, match=r"plan for VP.*on Flow"):
        model(sde=ss.Flow(), predicts="v").save(tmp_path / "other", card=Card(solver=plan))
    with pytest.raises(ValueError, match="`nfe` has no meaning with a plan"):
        Card(solver=plan, nfe=3)


CURVE = ss.SDE.from_functions(lambda t: torch.exp(-3 * t**2), lambda t: torch.sin(1.2 * t) + t**3)


def test_code_is_given_again_and_compared(tmp_path: Path) -> None:
    first = model(sde=CURVE, time=lambda t: 10 * t + 1)
    folder = first.save(tmp_path / "m")
    clock = lambda t: 1 + t * 10  # noqa: E731
    twin = ss.SDE.from_functions(lambda t: torch.exp(-3 * t**2), lambda t: torch.sin(1.2 * t) + t**3)
    again = ss.load(folder, sde=twin, time=clock)
    x = torch.ones(2, 3)
    assert torch.equal(first.x0(x, 0.4), again.x0(x, 0.4))
    for options, words in (
        ({}, r"process is defined by code.*load\(folder, sde="),
        ({"sde": twin}, r"time is a function, <lambda>.*load\(folder, time="),
        ({"sde": ss.VP(), "time": clock}, "other values of T, t_min, α or σ"),
        ({"sde": twin, "time": lambda t: t}, "`time` is another function"),
    ):
        with pytest.raises(LoadError, match=words):
            ss.load(folder, **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="`sde` must be an SDE"):
        ss.load(folder, sde=3.0, time=clock)  # type: ignore[arg-type]
    plain = model().save(tmp_path / "plain")
    assert ss.load(plain, sde=ss.VP()).sde == ss.VP()
    for options, words in (
        ({"sde": ss.Flow()}, "trained on VP.*Rescheduled"),
        ({"time": clock}, "load without `time`"),
    ):
        with pytest.raises(LoadError, match=words):
            ss.load(plain, **options)  # type: ignore[arg-type]


def test_known_operators_are_written_and_others_are_code(tmp_path: Path) -> None:
    for k, (time, known) in enumerate([(partial(mul, 999), True), (partial(sub, 1), True), (partial(max, 1.0), False)]):
        if known:
            again = ss.load(model(time=time).save(tmp_path / str(k)))
            assert torch.equal(again.time(torch.tensor([0.25])), time(torch.tensor([0.25])))  # type: ignore[operator]
    with pytest.raises(TypeError, match="`net` must be a module to be saved"):
        ss.Denoiser(lambda x, t: x, ss.VP(), predicts="x0").save(tmp_path / "function")


def test_what_is_no_network_is_refused_with_the_way_to_do_it(tmp_path: Path) -> None:
    guided = ss.ClassifierFree(model(net=net(classes=3)), 2.0, null={"label": 3})
    for wrapper, words in (
        (guided, r"ClassifierFree.*model\.model\.save\(folder\).*ClassifierFree again"),
        (model().given(), r"Given.*model\.model\.save"),
        (ss.denoisers.Rescheduled(model(), ss.Flow()), r"Rescheduled.*model\.model\.save"),
        (gaussian("full", ss.VP()), r"Gaussian.*to_dict"),
    ):
        with pytest.raises(TypeError, match=words):
            wrapper.save(tmp_path / "m")

    class Twice(ss.Denoiser):
        pass

    with pytest.raises(TypeError, match="Twice, whose code"):
        Twice(net(), ss.VP(), predicts="eps").save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_folder_is_replaced_only_on_request_and_is_whole_at_any_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "m"
    first = model()
    first.save(
        folder,
        card=Card(
            solver=ss.UniPC(2).plan(first.sde, [1.0, 0.5, 0.0]), scale=ss.data.Standardize(torch.ones(1), torch.ones(1))
        ),
    )
    (folder / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match=r"`overwrite`=True"):
        model().save(folder)
    other = model(net=ss.nn.MLP(3, hidden=8, seed=4))
    other.save(folder, overwrite=True)
    same(other.eval(), ss.load(folder))
    assert {file.name for file in folder.iterdir()} == {MANIFEST, WEIGHTS, "README.md"}, (
        "no file of the old model stays"
    )

    calls = 0
    replace = os.replace

    def dies(a: Any, b: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        first.save(folder, overwrite=True)
    with pytest.raises(LoadError, match=r"model\.safetensors does not match.*interrupted"):
        ss.load(folder)
    calls = 1
    with pytest.raises(KeyboardInterrupt):
        first.save(tmp_path / "fresh")
    assert [file.name for file in tmp_path.iterdir()] == ["m"], "a new folder is complete or does not exist"


def forge(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the dictionary of a folder, with checksums that fit."""
    body = json.loads((folder / MANIFEST).read_text())
    del body["sha256"]
    change(body)
    for name in body["files"]:
        if (folder / name).is_file():
            body["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps({**body, "sha256": digest(body)}))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a bit of the weights": (lambda f: flip(f / WEIGHTS), r"model\.safetensors does not match its checksum"),
    "weights cut short": (lambda f: os.truncate(f / WEIGHTS, 100), r"model\.safetensors does not match"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"model\.safetensors is missing"),
    "no plan": (lambda f: (f / PLAN).unlink(), r"plan\.json is missing"),
    "extras of another": (lambda f: (f / EXTRAS).write_bytes(b"{}"), r"extras\.safetensors does not match"),
    "an edited number": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"eps"', '"x0"')),
        r"scoresde\.json does not match its checksum",
    ),
    "JSON cut short": (lambda f: os.truncate(f / MANIFEST, 200), r"scoresde\.json is damaged"),
    "a list": (lambda f: (f / MANIFEST).write_text("[]"), r"scoresde\.json is damaged"),
    "nested without end": (lambda f: (f / MANIFEST).write_text("[" * 100_000), r"scoresde\.json is damaged"),
    "no dictionary": (lambda f: (f / MANIFEST).unlink(), r"no scoresde\.json \(found: extras\.safetensors, model"),
    "the future": (lambda f: forge(f, lambda b: b.update(format="scoresde model 9")), "update scoresde"),
    "forged prediction": (lambda f: forge(f, lambda b: b.update(predicts="ε")), "cannot be loaded: `predicts`"),
    "forged process": (lambda f: forge(f, lambda b: b["process"].update(beta_min=-1)), "cannot be loaded: `beta_min`"),
    "no process": (lambda f: forge(f, lambda b: b.pop("process")), "no entry 'process'"),
    "forged solver": (
        lambda f: forge(f, lambda b: b["card"].update(solver={"solver": "__import__('os').abort()"})),
        "not a call of a solver",
    ),
    "a path out of the folder": (
        lambda f: forge(f, lambda b: b["files"].update({"../secret": "0"})),
        "other files of the format",
    ),
    "weights that are no safetensors": (
        lambda f: ((f / WEIGHTS).write_bytes(b"x" * 64), forge(f, lambda b: None)),
        r"model\.safetensors is not a safetensors file",
    ),
    "a class of the system": (
        lambda f: forge(f, lambda b: b["network"].update({"class": "os:system", "arguments": {"command": "true"}})),
        "'os:system' is not in an allowed package",
    ),
    "a function of torch": (
        lambda f: forge(f, lambda b: b["network"].update({"class": "torch.nn:utils", "arguments": {}})),
        "not a class of networks",
    ),
    "a class that another package lends": (
        lambda f: forge(f, lambda b: b["network"].update({"class": "scoresde.interop.folder:Path", "arguments": {}})),
        "not a class of networks",
    ),
    "arguments that do not fit": (
        lambda f: forge(f, lambda b: b["network"]["arguments"].update(depth_of_field=2)),
        "does not accept the arguments",
    ),
    "another size": (
        lambda f: forge(f, lambda b: b["network"]["arguments"].update(hidden=32)),
        "do not fit <MLP",
    ),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", DAMAGE)
def test_a_folder_that_is_not_whole_is_refused_with_its_path(name: str, tmp_path: Path) -> None:
    first = model()
    scale = ss.data.Standardize(torch.ones(1), torch.ones(1))
    plan = ss.DDIM().plan(first.sde, [1.0, 0.5, 0.0])
    folder = first.save(tmp_path / "model of mine", card=Card(solver=plan, scale=scale))
    ss.load(folder)
    act, words = DAMAGE[name]
    act(folder)
    with pytest.raises(LoadError, match=words) as caught:
        ss.load(folder)
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"there is no folder .*nowhere.*from_pretrained"):
        ss.load(tmp_path / "nowhere")


def test_only_classes_of_allowed_packages_are_imported() -> None:
    for path in ("os:system", "subprocess:Popen", "scoresdevil:Net", "torch:nn", "torch.hub:load"):
        with pytest.raises(ValueError, match="not in an allowed package"):
            construct({"class": path, "arguments": {}})
    for path in ("os", "os:", ":system", "torch.nn:Linear.__init__", "torch.nn:Linear()", "../x:Y", 3):
        with pytest.raises(ValueError, match=r"must be 'package.module:Class'"):
            construct({"class": path, "arguments": {}})
    made = construct({"class": "torch.nn:Linear", "arguments": {"in_features": 2, "out_features": 3}})
    assert isinstance(made, nn.Linear) and made.weight.shape == (3, 2)
    for build in ({"class": "torch.nn:Linear"}, {"class": "torch.nn:Linear", "arguments": [2, 3]}, "torch.nn:Linear"):
        with pytest.raises(ValueError, match="`build` must be"):
            construct(build)  # type: ignore[arg-type]


def test_reading_needs_no_training_and_no_hub(tmp_path: Path) -> None:
    folder = model().save(tmp_path / "m")
    heavy = {"huggingface_hub", "diffusers", "accelerate"}
    code = f"import sys, scoresde as ss; ss.load({str(folder)!r}); print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"solver": "UniPC"}, TypeError, "`solver` must be a solver, a plan or None, got str"),
        ({"nfe": 0}, ValueError, "`nfe` must be at least 1"),
        ({"event": (3, 0)}, ValueError, "`event` must be at least 1"),
        ({"conditions": "label"}, TypeError, "`conditions` must be a list of words"),
        ({"scale": 2.0}, TypeError, "`scale` must be a Standardize"),
        ({"gaussian": 2.0}, TypeError, "`gaussian` must be a Gaussian"),
        ({"licence": None}, TypeError, "`licence` must be text"),
    ],
)
def test_a_wrong_card_is_refused_by_name(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Card(**options)


def test_a_card_must_belong_to_the_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Gaussian on Flow.*model is on VP"):
        model().save(tmp_path / "m", card=Card(gaussian=gaussian("full", ss.Flow())))
    with pytest.raises(TypeError, match="text cannot hold"):
        model().save(tmp_path / "m", card=Card(solver=ss.DDIM(eta=lambda t: 0.5)))
    with pytest.raises(TypeError, match="`card` must be a Card"):
        model().save(tmp_path / "m", card="mit")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"holds a dtype at 'arguments\.dtype'"):
        model().save(tmp_path / "m", build={"class": "torch.nn:Linear", "arguments": {"dtype": torch.float32}})
    assert not (tmp_path / "m").exists()
