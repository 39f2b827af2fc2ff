"""Checks of arguments by their annotations: what is refused, what passes, what they leave alone, and the hints."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import scoresde as ss
from scoresde import _names
from scoresde._doors import checked, checked_with, words

MIX = ss.GaussianMixture(ss.VP(), [[-1.0, 0.0], [1.0, 0.0]], std=0.3)
NET = torch.nn.Linear(2, 2)


@checked
def door(
    number: float = 1.0,
    count: int | None = None,
    flag: bool = False,
    word: str = "a",
    numbers: Sequence[float] = (),
    pair: tuple[float, float] = (0.0, 1.0),
    function: Callable[[float], float] | None = None,
    table: Mapping[str, float] | None = None,
    state: Tensor | None = None,
    sde: ss.SDE | None = None,
    dtype: torch.dtype = torch.float32,
    **rest: object,
) -> tuple[object, ...]:
    """Return everything."""
    return number, count, flag, word, numbers, pair, function, table, state, sde, dtype, rest


GOOD: dict[str, list[Any]] = {
    "number": [1, 0.5, np.float32(0.5), np.int64(2), float("inf"), -1.0],
    "count": [3, np.int32(3), torch.tensor(3), None],
    "flag": [True, np.bool_(True)],
    "word": ["b"],
    "numbers": [[1, 2.0], (), (np.float64(1.0),), np.ones(3), torch.ones(3), range(3)],
    "pair": [(0, 1), [0.0, 1.0]],
    "function": [abs, NET, None],
    "table": [{}, {"a": 1.0}],
    "state": [torch.ones(2), None],
    "sde": [ss.VP(), None],
    "dtype": [torch.float64],
    "rest": ["anything"],
}
BAD: dict[str, list[tuple[Any, str]]] = {
    "number": [
        ("ten", r"`number` must be a number, got 'ten' \(str\)"),
        (None, "`number` must be a number, got None"),
        (True, "`number` must be a number, got True"),
        (float("nan"), "`number` must be finite, got nan"),
        (torch.tensor(0.5), r"got a float32 tensor of shape \(\); use float\(`number`\)"),
        (NET, "got Linear"),
    ],
    "count": [
        (0.5, r"`count` must be an integer, got 0.5 \(float\)"),
        (torch.ones(2), "an integer"),
        (True, "got True"),
    ],
    "flag": [("no", r"`flag` must be True or False, got 'no' \(str\)"), (None, "got None"), (1, "got 1")],
    "word": [(3, r"`word` must be text, got 3 \(int\)")],
    "numbers": [
        ([0.5, "a"], r"`numbers\[1\]` must be a number, got 'a'"),
        ([0.5, float("nan")], r"`numbers\[1\]` must be finite, got nan"),
        (0.5, "`numbers` must be a list of numbers, got 0.5"),
        ("ab", "`numbers` must be a list of numbers, got 'ab'"),
    ],
    "pair": [((1.0,), r"`pair` must be a tuple of 2 values, got \(1.0,\)")],
    "function": [("abs", "`function` must be a function or None, got 'abs'")],
    "table": [([1], r"`table` must be a dict or None, got \[1\]")],
    "state": [([1.0], r"`state` must be a torch.Tensor or None, got \[1.0\]")],
    "sde": [
        ("VP", r"`sde` must be an SDE such as VP\(\) or None, got 'VP'"),
        (ss.VP, r"got the class VP; call it, VP\(\)"),
    ],
    "dtype": [("float64", "`dtype` must be torch.float32 or torch.float64, got 'float64'; write torch.float64")],
}


@pytest.mark.parametrize("name", GOOD)
def test_values_of_the_annotation_pass(name: str) -> None:
    for value in GOOD[name]:
        assert any(v is value for v in (*door(**{name: value}), value))


@pytest.mark.parametrize("name", BAD)
def test_other_values_are_refused_by_name(name: str) -> None:
    for value, message in BAD[name]:
        with pytest.raises((TypeError, ValueError), match=message):
            door(**{name: value})


def test_positional_arguments_and_fields_of_dataclasses_are_checked_too() -> None:
    @checked
    @dataclass(frozen=True)
    class Point:
        x: float
        y: float = 0.0

    with pytest.raises(TypeError, match="`x` must be a number, got 'a'"):
        Point("a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'x'"):
        Point()  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes from 2 to 3 positional arguments but 4 were given"):
        Point(1.0, 2.0, 3.0)  # type: ignore[call-arg]
    assert Point(1.0) == Point(1)


def test_a_default_passes_whatever_its_annotation_says() -> None:
    @checked
    def odd(x: float = None) -> object:  # type: ignore[assignment]  # noqa: RUF013
        return x

    assert odd() is None
    assert odd(None) is None  # type: ignore[arg-type]


def test_signatures_and_docstrings_stay() -> None:
    assert list(inspect.signature(ss.sample).parameters)[:4] == ["model", "shape_or_x", "solver", "steps"]
    assert inspect.signature(ss.sample).return_annotation == "Tensor"
    assert not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(ss.sample).parameters.values())
    assert list(inspect.signature(ss.VP).parameters) == ["beta_min", "beta_max", "T", "t_min"]
    assert ss.sample.__name__ == "sample"
    assert (ss.sample.__doc__ or "").startswith("Draw samples")


def test_a_checked_function_compiles_whole() -> None:
    @checked
    def double(x: Tensor, factor: float = 2.0) -> Tensor:
        return factor * x

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    x = torch.arange(3.0)
    assert torch.equal(compiled(x), 2 * x)
    assert torch.equal(compiled(x, factor=3.0), 3 * x)


def test_a_checked_function_is_transformed_by_functorch() -> None:
    @checked
    def square(x: Tensor, factor: float = 1.0) -> Tensor:
        return factor * x.square().sum()

    x = torch.arange(6.0).reshape(3, 2)
    assert torch.equal(torch.func.vmap(torch.func.grad(square))(x), 2 * x)


# Words of other libraries.

UNKNOWN: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "sample": (
        lambda **kw: ss.sample(MIX, (4, 2), **kw),
        {
            "num_steps": "use `steps`",
            "n_steps": "use `steps`",
            "num_inference_steps": "use `steps`",
            "timesteps": "use `steps`",
            "guidance_scale": "ClassifierFree",
            "cfg_scale": "ClassifierFree",
            "generator": "use `seed`",
            "sampler": "use `solver`",
            "method": "use `solver`",
            "scheduler": "use `solver`",
            "batch_size": "`shape_or_x`",
            "eps": "use `t_end`",
            "sigmas": "use `grid`",
            "device": r"start=ss.Start\(device=",
            "dtype": r"start=ss.Start\(",
            "label": "model.given",
            "class_labels": "model.given",
            "y": "model.given",
            "callback": "use `watch`",
            "eta": "belongs to the solver",
        },
    ),
    "solve": (lambda **kw: ss.solve(MIX, (4, 2), **kw), {"num_steps": "use `steps`", "rtol": "Adaptive"}),
    "encode": (
        lambda **kw: ss.encode(MIX, torch.zeros(1, 2), **kw),
        {
            "num_steps": "use `steps`",
            "generator": "nothing to draw",
            "class_labels": "model.given",
            "sampler": "`solver`",
        },
    ),
    "log_prob": (
        lambda **kw: ss.log_prob(MIX, torch.zeros(1, 2), **kw),
        {"rtol": "use `tolerance`", "method": "use `tolerance`", "hutchinson": "use `probes`", "label": "model.given"},
    ),
    "Denoiser": (
        lambda **kw: ss.Denoiser(NET, ss.VP(), predicts="eps", **kw),
        {
            "prediction_type": "use `predicts`",
            "sigma_data": "use `precondition`",
            "num_timesteps": "ss.Discrete",
            "guidance_scale": "ClassifierFree",
            "device": r"\.to\(device\)",
        },
    ),
    "Trainer": (
        lambda **kw: ss.Trainer(ss.DSM(ss.Denoiser(NET, ss.VP(), predicts="eps")), torch.zeros(8, 2), **kw),
        {
            "batch_size": "use `batch`",
            "optimizer": "use `optimiser`",
            "lr": "use `optimiser`",
            "logger": "use `hooks`",
            "callback": "use `hooks`",
            "callbacks": "use `hooks`",
            "epochs": r"Trainer.fit\(steps\)",
        },
    ),
}


@pytest.mark.parametrize("who", UNKNOWN)
def test_words_of_other_libraries_get_ours(who: str) -> None:
    call, hints = UNKNOWN[who]
    for word, hint in hints.items():
        with pytest.raises(TypeError, match=rf"{who}\(\) got an unexpected keyword argument '{word}'; .*{hint}"):
            call(**{word: 1})


def test_hints_name_arguments_that_exist() -> None:
    """A hint starts with one of our words in backquotes: the function must have it; and it has no word of the hints."""
    network, flow, encode, solve, trainer = (
        importlib.import_module(f"scoresde.{name}")
        for name in "denoisers.network likelihood.flow sampling.encode sampling.solve training.trainer".split()
    )
    for function, hints in (
        (ss.sample, solve.WORDS),
        (ss.solve, solve.WORDS),
        (ss.encode, encode.WORDS),
        (ss.decode, encode.WORDS),
        (ss.log_prob, flow.WORDS),
        (ss.Denoiser, network.WORDS),
        (ss.Trainer, trainer.WORDS),
        (ss.Trainer.fit, trainer.LENGTHS),
    ):
        names = set(inspect.signature(function).parameters)  # type: ignore[arg-type]
        for word, hint in hints.items():
            if hint.startswith("use `"):
                assert hint.split("`")[1] in names, (function, word, hint)


def test_a_trainer_without_train_says_fit() -> None:
    trainer = ss.Trainer(ss.DSM(ss.Denoiser(NET, ss.VP(), predicts="eps")), torch.zeros(8, 2), batch=4)
    with pytest.raises(AttributeError, match=r"'Trainer' object has no attribute 'train'; use fit\(steps\)"):
        trainer.train()
    with pytest.raises(AttributeError, match="'Trainer' object has no attribute 'nonsense'"):
        trainer.nonsense  # noqa: B018
    with pytest.raises(TypeError, match="unexpected keyword argument 'epochs'; use `steps`"):
        trainer.fit(epochs=3)  # type: ignore[call-arg]


def test_a_word_of_ours_gets_no_hint() -> None:
    @checked_with(words("count number: use `n`"))
    def f(n: int, count: int = 0) -> int:
        return n + count

    assert f(1, count=2) == 3
    with pytest.raises(TypeError, match="unexpected keyword argument 'number'; use `n`"):
        f(number=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'nonsense'"):
        f(1, nonsense=1)  # type: ignore[call-arg]


def test_a_bare_network_is_told_how_to_be_wrapped() -> None:
    for call in (
        lambda: ss.sample(NET, (4, 2)),  # type: ignore[arg-type]
        lambda: ss.log_prob(NET, torch.zeros(1, 2)),  # type: ignore[arg-type]
        lambda: ss.ClassifierFree(NET, 2.0, null={"label": 0.0}),  # type: ignore[arg-type]
        lambda: ss.DSM(NET),  # type: ignore[arg-type]
        lambda: ss.analysis.convergence_order(ss.DDIM(), NET),  # type: ignore[arg-type]
    ):
        with pytest.raises(TypeError, match=r"`model` must be a denoiser.*Denoiser\(net, sde, predicts=...\)"):
            call()


def test_early_errors_where_they_came_late() -> None:
    for call, message in (
        (lambda: ss.analysis.convergence_order(solver="unipc", model=MIX), r"`solver` must be a solver.*got 'unipc'"),
        (lambda: ss.VP(t_min=torch.tensor(1e-3)), r"`t_min` must be a number, got a float32 tensor.*float\(`t_min`\)"),
        (lambda: ss.grids.karras(MIX, 5), "`sde` must be an SDE such as VP"),
        (lambda: ss.solvers.Tape("VP", 1.0), "`sde` must be an SDE"),
        (lambda: ss.inverse.DPS(MIX, None), "`measurement` must be a Measurement"),
        (lambda: ss.inverse.dps_scale(MIX, [1.0, 0.5], 0.5), "`sde` must be an SDE"),
        (lambda: ss.integrators.TorchDiffEq(rtol=float("nan")), "`rtol` must be finite, got nan"),
        (lambda: ss.integrators.TorchSDE(eta=float("nan")), "`eta` must be finite, got nan"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            call()
    assert ss.grids.karras(ss.VP(), np.int64(5)).shape == (6,)  # type: ignore[arg-type]
    assert ss.sample(MIX, (np.int64(2), 2), steps=np.int32(3), seed=np.int64(0)).shape == (2, 2)  # type: ignore[arg-type]


def test_a_pipeline_and_a_trainer_are_told_what_to_give() -> None:
    Pipe = type("StableDiffusionPipeline", (), {"__module__": "diffusers.pipelines.stable_diffusion"})
    with pytest.raises(TypeError, match=r"`model` must be a denoiser.*ss.interop.from_diffusers\(pipe\)"):
        ss.sample(Pipe(), (2, 3))  # type: ignore[arg-type]
    trainer = ss.Trainer(ss.DSM(ss.Denoiser(torch.nn.Linear(3, 3), ss.VP(), predicts="eps")), torch.zeros(4, 3))
    with pytest.raises(TypeError, match=r"give its averaged model, trainer.ema_model"):
        ss.sample(trainer, (2, 3))  # type: ignore[arg-type]


def test_a_name_of_a_folder_is_found_from_the_top() -> None:
    with pytest.raises(AttributeError, match=r"'DPMSolver'; it is scoresde.solvers.DPMSolver"):
        ss.DPMSolver  # noqa: B018
    with pytest.raises(AttributeError, match=r"'from_diffusers'; it is scoresde.interop.from_diffusers"):
        ss.from_diffusers  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute 'DPMSolverr'$"):
        ss.DPMSolverr  # noqa: B018
    assert not hasattr(ss, "from_diffusers")


# Names of other libraries.


def dpmpp() -> Callable[..., Tensor]:
    """A function with the name of one of k-diffusion."""

    def sample_dpmpp_2m(model: object, x: Tensor, sigmas: Tensor) -> Tensor:
        return x

    return sample_dpmpp_2m


THEIRS: dict[str, tuple[Callable[[], Any], str]] = {
    "small letters": (lambda: "ddim", "ss.DDIM()"),
    "with hyphens": (lambda: "dpm-solver++", "ss.DPMSolverPP(2)"),
    "a word of k-diffusion": (lambda: "sample_euler_ancestral", "ss.solvers.EulerAncestral()"),
    "a scheduler": (lambda: importlib.import_module("diffusers").DDIMScheduler(), "ss.DDIM()"),
    "a class": (lambda: importlib.import_module("diffusers").UniPCMultistepScheduler, "ss.UniPC(2)"),
    "a function of k-diffusion": (dpmpp, "ss.DPMSolverPP(2)"),
}


@pytest.mark.parametrize("what", THEIRS)
@pytest.mark.parametrize("run", [ss.sample, ss.solve, ss.encode])
def test_a_solver_of_another_library_is_named_in_our_words(run: Callable[..., Any], what: str) -> None:
    make, ours = THEIRS[what]
    with pytest.raises(TypeError, match=f"(?s)`solver` must be a solver.*did you mean {re.escape(ours)}[?]$"):
        run(MIX, torch.zeros(2, 2), make())


def test_a_class_of_ours_is_called() -> None:
    with pytest.raises(TypeError, match=r"call it, DDIM\(\)"):
        ss.sample(MIX, (2, 2), ss.DDIM)  # type: ignore[arg-type]


@pytest.mark.parametrize("word", ["karras", "Karras", "log-noise", "linspace"])
def test_a_grid_by_name_is_a_function(word: str) -> None:
    with pytest.raises(TypeError, match=r"`grid` must be times.*did you mean grid=ss\.grids\.\w+[?]$"):
        ss.sample(MIX, (2, 2), grid=word)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "name", "ours"),
    [
        (ss.solvers, "unipc", "ss.UniPC()"),
        (ss.solvers, "euler_ancestral", "ss.solvers.EulerAncestral()"),
        (ss, "DPMSolverMultistepScheduler", "ss.DPMSolverPP(2)"),
        (ss, "vp", "ss.VP"),
        (ss, "ddim", "ss.DDIM"),
        (ss.grids, "Karras", "ss.grids.karras"),
    ],
)
def test_a_name_in_another_spelling_is_told(module: Any, name: str, ours: str) -> None:
    with pytest.raises(AttributeError, match=f"has no attribute '{name}'; did you mean {re.escape(ours)}[?]$"):
        getattr(module, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'nothing'$"):
        getattr(module, "nothing")  # noqa: B009


def test_every_suggested_name_exists() -> None:
    for answer in (*_names.ELSEWHERE.values(), *map(str, map(_names.meant, _names.SOLVERS.split()))):
        for code in answer.split(" or "):
            assert isinstance(eval(code), ss.solvers.Solver | ss.Adaptive), code
    for name in _names.TOP.split():
        assert hasattr(ss, name)
    for name in (*map(str, map(_names.meant_grid, _names.GRIDS.split())), *_names.GRIDS_ELSEWHERE.values()):
        assert len(eval(name)(ss.VP(), 4)) == 5
