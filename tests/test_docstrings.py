"""Every public name says what it is, what its arguments are, the shape of its tensors and the paper it is from."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from enum import Enum
from types import ModuleType
from typing import Any

import scoresde as ss

# What no paper defines: parts that other parts are made of, common definitions, and what is the library's own.
WITHOUT_PAPER = {
    "solvers": "Ancestral AnchoredResidual EtaWithin ExponentialTableau GivenDiffusion Leg Point Prediction Preserving "
    "Solver Tableau Tape Universal Variable residual_prediction",
    "guidance": "Clamp linear",
    "inverse": "Blur Censored Counts Downsample EntrywiseMeasurement FourierMask Grey Laplace Likelihood Linear "
    "LinearPosteriorDenoiser Mask Matrix Measurement Operator Particles PosteriorDenoiser Rounded StudentT "
    "UniformPrior as_prior log_evidence stack",
    "metrics": "Comparison Moments PrecisionRecall psnr",
    "steering": "Composition Potential Resampling mixture power",
    "likelihood": "Bits Estimate LogProb Tolerance Uncertain bits_from_nats denoiser_error student_quantile",
    "fitting": "equal_error expansion fit_to_data gaussian_grid",
    "grids": "NoiseLevels check_grid cosine flow_time from_scheduler from_sigmas log_noise polyexponential uniform_t "
    "window zigzag",
    "processes": "FromDrift FromFunctions Prior derivative",
    "nn": "MLP Autocast Bound Independent",
}


def public_names() -> dict[str, Any]:
    """Everything that users reach as ss.name or ss.folder.name, by this name."""
    found = {}
    for space in (ss, *(thing for name in ss.__all__ if isinstance(thing := getattr(ss, name), ModuleType))):
        own = [n for n in dir(space) if getattr(getattr(space, n), "__module__", None) == space.__name__]
        for name in getattr(space, "__all__", [n for n in own if not n.startswith("_")]):
            found[f"{space.__name__}.{name}".removeprefix("scoresde.")] = getattr(space, name)
    return found


def has_arguments(thing: Any) -> bool:
    """Whether users call it; not so enums, protocols and the classes that only a function of the library makes."""
    return inspect.isfunction(thing) or (
        inspect.isclass(thing) and not issubclass(thing, Enum) and not getattr(thing, "_is_protocol", False)
    )


NAMES = public_names()
CALLED = {name: thing for name, thing in NAMES.items() if has_arguments(thing)}


def own_doc(thing: Any) -> str:
    """A docstring of its own: not inherited, not the signature that a dataclass makes for want of one."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing) or inspect.ismodule(thing)):
        return "a value, such as a type alias or a constant"
    doc = thing.__dict__.get("__doc__") if inspect.isclass(thing) else thing.__doc__
    return "" if doc is None or doc.startswith(f"{thing.__name__}(") else inspect.cleandoc(doc)


def whole_doc(thing: Any) -> str:
    """The docstring, and for a class also those of its bases."""
    return "\n".join(map(own_doc, inspect.getmro(thing))) if inspect.isclass(thing) else own_doc(thing)


def silent_methods(thing: type) -> list[str]:
    """Public methods and properties without a docstring, of their own or of a base."""
    methods = [k for k, v in vars(thing).items() if not k.startswith("_") and (callable(v) or isinstance(v, property))]
    return [k for k in methods if not inspect.getdoc(getattr(thing, k))]


def test_every_public_name_says_what_it_is() -> None:
    assert [name for name, thing in NAMES.items() if len(own_doc(thing).partition("\n")[0]) <= 10] == []
    silent = {name: silent_methods(thing) for name, thing in NAMES.items() if inspect.isclass(thing)}
    assert {name: methods for name, methods in silent.items() if methods} == {}


# Arguments.


def unmentioned(thing: Callable[..., Any]) -> list[str]:
    """Arguments of which a docstring says nothing, itself, by that of a base, or by pointing to one with the same."""
    doc = whole_doc(thing)
    names = [p.name for p in inspect.signature(thing).parameters.values() if not p.name.startswith("_")]
    mentioned = [re.search(rf"^\s*\*{{0,2}}{name}:|`{name}\b", doc, re.M) for name in names]  # listed, or in backticks
    return [] if "arguments of :" in doc else [name for name, where in zip(names, mentioned, strict=True) if not where]


def test_every_public_name_explains_its_arguments() -> None:
    assert {name: left for name, thing in CALLED.items() if (left := unmentioned(thing))} == {}


def test_silence_about_an_argument_is_noticed() -> None:
    some = {"grids.karras", "processes.betas", "data.check_scale", "solvers.UniPC", "guidance.Clamp", "VP", "sample"}
    assert some <= set(CALLED)

    def half(explained: int, forgotten: int) -> None:
        """Explains `explained` and nothing else."""

    class Half:
        """Explains `explained` and nothing else."""

        def __init__(self, explained: int, forgotten: int) -> None: ...

    class Whole(Half):
        """A class whose base explains the rest.

        Arguments:
            forgotten: Argument that the base does not explain.
        """

    assert unmentioned(half) == unmentioned(Half) == ["forgotten"]
    assert unmentioned(Whole) == []


# Shapes.

A_SHAPE = re.compile(
    r"\((\*?\w+( \+ \w+)?|\.\.\.)?,[\w\s,*.+]*\)"  # (B, *event), (N + 1,), (..., D)
    r"|\bshapes?\b|\bscalar\b|\bfor each\b|\bone more time\b|\bN \+ 1\b|\b(a|one) number\b|\bof `?x`?\b"
)


def has_tensors(thing: Callable[..., Any]) -> bool:
    """Whether an argument or the result is a tensor; functions and mappings of tensors do not count."""
    signature = inspect.signature(thing)
    texts = [str(p.annotation) for p in signature.parameters.values()] + [str(signature.return_annotation)]
    return any(re.search(r"\bTensor\b", text) and not re.search("Callable|Mapping|Iterator", text) for text in texts)


def without_shape(name: str) -> bool:
    return has_tensors(CALLED[name]) and A_SHAPE.search(whole_doc(CALLED[name])) is None


def test_every_public_name_with_tensors_says_their_shape() -> None:
    assert sum(map(has_tensors, CALLED.values())) > 150
    assert [name for name in CALLED if without_shape(name)] == []


def test_a_missing_shape_is_noticed() -> None:
    for text in ("State, (B, *event).", "Times, (N + 1,).", "Number of steps; the grid has one more time."):
        assert A_SHAPE.search(text)
    for text in ("Some state (or none).", "The state x, a tensor.", "f(x) of the state"):
        assert not A_SHAPE.search(text)


# Papers.


def cites(thing: Any) -> bool:
    """Whether the docstring, or that of its module, names a paper."""
    module = sys.modules[thing.__module__].__doc__ or ""
    return re.search(r"arXiv:|\(\D*(18|19|20)\d\d\)", own_doc(thing) + module) is not None


def test_every_method_of_a_paper_names_it() -> None:
    for folder, names in WITHOUT_PAPER.items():
        public = {name.split(".")[1]: thing for name, thing in CALLED.items() if name.startswith(folder + ".")}
        assert {name for name, thing in public.items() if not cites(thing)} == set(names.split()), folder
