"""Checks of arguments by their annotations, and hints for the words of other libraries.

:func:`checked` decorates what users call: a wrong argument then raises a TypeError, which names the argument, the
value, what is allowed and the fix. Functions that run at every evaluation of a network are not decorated; they use
:mod:`scoresde._checks`. A decorated function has the signature, the docstring and the types of the function.
"""

from __future__ import annotations

import collections.abc as abc
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from numbers import Real
from os import PathLike
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from scoresde import _checks as check
from scoresde import _names as others

Decorated = TypeVar("Decorated", bound=Callable[..., object])

# What to pass, by the name of the class that an argument needs.
EXAMPLES = {
    "SDE": "an SDE such as VP()",
    "Discrete": "a Discrete process, such as Discrete(betas)",
    "AbstractDenoiser": "a denoiser such as Denoiser(net, sde, predicts=...)",
    "Denoiser": "a Denoiser(net, sde, predicts=...)",
    "Solver": "a solver such as UniPC()",
    "Plan": "a Plan",
    "Method": "a Method",
    "Measurement": "a Measurement(operator, y, std)",
    "Operator": "an Operator such as Mask(mask)",
    "Potential": "a Potential such as ss.steering.Reward(fn)",
    "Gaussian": "a Gaussian",
    "GaussianMixture": "a GaussianMixture(sde, means, std=...)",
    "Noise": "a Noise(seed)",
    "Preconditioning": "Preconditioning(sigma_data)",
    "Times": "a density of times such as LogitNormal()",
    "Pair": "a pair such as DPM23()",
    "Prediction": "a prediction such as ss.solvers.DATA",
    "Variable": "a variable such as ss.solvers.LAM",
    "Tableau": "a tableau such as ss.solvers.HEUN",
    "Module": "a network, a torch.nn.Module",
    "Optimizer": "an optimiser of torch.optim",
    "dtype": "torch.float32 or torch.float64",
}

# What to pass, by the name of an argument, where the kinds alone do not help.
ARGUMENTS = {
    "grid": "times or a grid maker such as ss.grids.karras",
    "net": "a module or a function",
    "rule": "a rule such as APG(), a function",
}

STATES = ("x", "x0", "x1", "data", "z", "y", "theta")
"""Names of arguments that need floats, whatever their entries are."""

PLAIN = (float, int, bool, str, torch.dtype)
KINDS = {
    float: "a number",
    int: "an integer",
    bool: "True or False",
    str: "text",
    Tensor: "a torch.Tensor",
    type(None): "None",
}


def checked(thing: Decorated) -> Decorated:
    """Decorate a function, or a class whose constructor is meant: each argument is checked by its annotation."""
    return checked_with({})(thing)


def checked_with(
    words: Mapping[str, str], own: Sequence[str] = (), needs: Mapping[str, str] | None = None
) -> Callable[[Decorated], Decorated]:
    """Like :func:`checked`, with a hint for each keyword of another library.

    Arguments:
        words: Hint for each keyword that the function does not have.
        own: Names of arguments that the function itself checks, because it can say more.
        needs: Hint for each keyword without a default, if it is missing.
    """

    def decorate(thing: Decorated) -> Decorated:
        if inspect.isclass(thing):
            init = thing.__init__
            setattr(thing, "__init__", _guard(init, words, own, thing.__name__, thing, needs))  # noqa: B010
            return thing
        return cast(Decorated, _guard(thing, words, own, thing.__qualname__, needs=needs))

    return decorate


def constant(function: Decorated) -> Decorated:
    """A method whose result torch.compile takes as a constant, as ``torch.compiler.assume_constant_result`` does.

    That decorator imports the compiler, which would double the time of ``import scoresde``.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def _guard(
    function: Callable[..., object],
    words: Mapping[str, str],
    own: Sequence[str],
    called: str,
    owner: type | None = None,
    needs: Mapping[str, str] | None = None,
) -> Callable[..., object]:
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = dict(needs or {})
    by_name = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    closed = bool(by_name) and not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    # Each test is made at the first call, when all classes exist.
    tests: dict[str, Callable[[object], None] | None] = dict.fromkeys(own)

    def test(name: str, value: object) -> None:
        if name not in tests:
            tests[name] = _test_of(function, signature, name, owner)
        found = tests[name]
        if found is not None:
            found(value)

    def examine(args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if closed and len(args) > len(names):
            example = f"{by_name[0]}={args[len(names)]!r:.60}"
            raise TypeError(
                f"{called}() takes at most {len(names)} positional arguments but {len(args)} were given; give the "
                f"others by name, as in {example}."
            )
        for name, value in zip(names, args, strict=False):
            test(name, value)
        for name, value in kwargs.items():
            if name in words and name not in signature.parameters:
                raise _unknown(called, name, words[name])
            test(name, value)
        for name in required:
            if name not in kwargs:
                raise TypeError(f"{called}() missing 1 required keyword-only argument: '{name}'; {required[name]}.")

    @wraps(function)
    def door(*args: object, **kwargs: object) -> object:
        if not torch.compiler.is_compiling():  # torch.compile cannot trace the variables of `examine`
            examine(args, kwargs)
        return function(*args, **kwargs)

    return door


def _test_of(
    function: Callable[..., object], signature: inspect.Signature, name: str, owner: type | None
) -> Callable[[object], None] | None:
    """The test of one argument; None if its annotation allows everything, or names a type of type checkers only."""
    parameter = signature.parameters.get(name)
    if parameter is None or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
        return None
    annotation = parameter.annotation
    if isinstance(annotation, str):
        try:
            annotation = eval(annotation, _names(function, name, owner))
        except NameError:
            return None
    kinds = _kinds(annotation)
    if kinds is None:
        return None
    alone = [kind for kind in kinds if kind is not type(None)]
    optional = len(alone) < len(kinds)
    default = parameter.default

    # Types whose values all fit, for speed; a number may be NaN, and a list may have wrong entries.
    whole: set[object] = {kind for kind in kinds if kind in (int, bool, str, type(None))} | (
        {int} if float in kinds else set()
    )
    classes = tuple(kind for kind in alone if isinstance(kind, type) and kind not in (float, int, bool))
    number = float in kinds

    def test(value: object) -> None:
        kind_of = type(value)
        if kind_of in whole or (number and kind_of is float and value == value) or value is default:
            return
        if classes and isinstance(value, classes):
            whole.add(kind_of)
        elif not any(_fits(kind, value) for kind in alone):
            raise _refusal(name, value, alone, optional=optional)

    return test


def _names(function: Callable[..., object], name: str, owner: type | None) -> dict[str, object]:
    """The names of the module that wrote an annotation: for the constructor of a dataclass, that of the field."""
    for base in owner.__mro__ if owner is not None else ():
        if "__dataclass_fields__" in vars(base) and name in vars(base).get("__annotations__", {}):
            return dict(vars(sys.modules[base.__module__]))
    return dict(inspect.unwrap(function).__globals__)


def _kinds(annotation: object) -> list[object] | None:
    """The members of a union; None if one of them allows everything."""
    origin = typing.get_origin(annotation)
    if annotation is None:
        return [type(None)]
    if isinstance(annotation, TypeVar):
        members: tuple[object, ...] = annotation.__constraints__ or (annotation.__bound__,)
    elif origin in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
    else:
        known = annotation in KINDS or inspect.isclass(origin) or inspect.isclass(annotation)
        open_ = annotation in (object, inspect.Parameter.empty) or getattr(annotation, "_is_protocol", False)
        return [annotation] if known and not open_ else None
    out: list[object] = []
    for member in members:
        kinds = _kinds(member)
        if kinds is None:
            return None
        out += [kind for kind in kinds if kind not in out]
    return out


def _fits(kind: object, value: object) -> bool:
    """Whether a value belongs to a kind. NaN is no number; the entries of a sequence belong to its kind."""
    origin = typing.get_origin(kind)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value)
    if kind is int:
        return check.is_integer(value)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    if origin is None:
        if kind is PathLike or kind is Path:
            return isinstance(value, PathLike)
        return isinstance(value, cast(type, kind))
    if origin is abc.Callable:
        return callable(value)
    if origin in (PathLike,):
        return isinstance(value, PathLike)
    if (
        inspect.isclass(origin)
        and issubclass(origin, abc.Sequence | abc.Iterable)
        and not issubclass(origin, abc.Mapping)
    ):
        return _is_sequence(origin, value) and _entries_fit(kind, value)
    return isinstance(value, cast(type, origin))


def _is_sequence(origin: type, value: object) -> bool:
    if origin in (tuple, list, abc.Sequence):
        return isinstance(value, abc.Sequence | np.ndarray | Tensor) and not isinstance(value, str)
    return isinstance(value, origin) and not isinstance(value, str)


def _entries_fit(kind: object, value: object) -> bool:
    """Whether the entries of a list belong to the kind of the sequence; arrays are tested where they are used."""
    if not isinstance(value, tuple | list):
        return not (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)
    args = typing.get_args(kind)
    if typing.get_origin(kind) is tuple and not (len(args) == 2 and args[1] is Ellipsis):
        if args and len(args) != len(value):
            return False
        return all(_entry_fits(k, v) for k, v in zip(args, value, strict=False))
    return not args or all(_entry_fits(args[0], v) for v in value)


def _entry_fits(annotation: object, value: object) -> bool:
    kinds = _kinds(annotation) if not isinstance(annotation, typing.ForwardRef | str) else None
    if kinds is None or (isinstance(value, Tensor) and value.ndim == 0):
        return True
    return any(_fits(kind, value) for kind in kinds)


def _refusal(name: str, value: object, kinds: list[object], *, optional: bool) -> Exception:
    """The error of a value of the wrong kind; of its first wrong entry, if a list is allowed."""
    if isinstance(value, Real) and math.isnan(value) and float in kinds:
        return ValueError(f"`{name}` must be finite, got {value}.")
    if isinstance(value, tuple | list):
        for kind in kinds:
            args = typing.get_args(kind)
            if typing.get_origin(kind) in (abc.Sequence, tuple, list) and (len(args) == 1 or args[1:] == (Ellipsis,)):
                for i, entry in enumerate(value):
                    if not _entry_fits(args[0], entry):
                        return _refusal(f"{name}[{i}]", entry, _kinds(args[0]) or [], optional=False)
        if len(kinds) == 1 and typing.get_origin(kinds[0]) is tuple and len(typing.get_args(kinds[0])) != len(value):
            return ValueError(f"`{name}` must be {_phrase(kinds[0])}, got {_got(value)}.")
    if len(kinds) == 1 and kinds[0] in PLAIN:
        optional = False
    hint = f"; use float(`{name}`)" if float in kinds and isinstance(value, Tensor) and value.numel() == 1 else ""
    known = ARGUMENTS.get(name) if any(typing.get_origin(kind) is abc.Callable for kind in kinds) else None
    allowed = known or _listing([*dict.fromkeys(map(_phrase, kinds)), *(["None"] if optional else [])])
    got = repr(value) if kinds == [torch.dtype] else _got(value)
    return TypeError(f"`{name}` must be {allowed}, got {got}{hint or _fix(name, value, kinds)}.".replace("?.", "?"))


def _unknown(called: str, name: str, hint: str) -> TypeError:
    """Python's error of an unknown keyword, with a hint."""
    return TypeError(f"{called}() got an unexpected keyword argument '{name}'; {hint}.")


def words(text: str) -> dict[str, str]:
    """Hints by keyword, from lines ``keyword keyword: hint``."""
    lines = [line.split(": ", 1) for line in text.strip().splitlines()]
    return {name: hint for names, hint in lines for name in names.split()}


def _listing(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + f" or {phrases[-1]}"


def _phrase(kind: object) -> str:
    """The kind in words."""
    origin = typing.get_origin(kind)
    if origin is None:
        name = getattr(kind, "__name__", str(kind))
        return KINDS.get(cast(type, kind)) or EXAMPLES.get(name) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"
    if origin is abc.Callable:
        return "a function"
    if inspect.isclass(origin) and issubclass(origin, abc.Mapping):
        return "a dict"
    args = [a for a in typing.get_args(kind) if a is not Ellipsis]
    if origin is tuple and len(args) == len(typing.get_args(kind)):
        return f"a tuple of {len(args)} values"
    names: dict[object, str] = {float: "numbers", int: "integers", str: "words", Tensor: "tensors"}
    entries = names.get(args[0] if args else None)
    return f"a list of {entries}" if entries else "a list"


def _got(value: object) -> str:
    """The value in words: its text if it is short, or its kind."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, types.FunctionType):
        return f"the function {value.__name__}"
    if isinstance(value, Tensor):
        return f"a {str(value.dtype)[6:]} tensor of shape {tuple(value.shape)}"
    if value is None or isinstance(value, bool):
        return repr(value)
    if (isinstance(value, str) and len(value) < 60) or isinstance(value, Real):
        return f"{value!r} ({type(value).__name__})"
    if isinstance(value, tuple | list | dict) and len(repr(value)) < 60:
        return repr(value)
    return type(value).__name__


def _as_tensor(name: str, value: object) -> str:
    """The fix of an array or a list: floats for states, the dtype of the entries for masks and indices."""
    entry = value
    while isinstance(entry, list | tuple) and entry:
        entry = entry[0]
    if isinstance(entry, np.ndarray):
        kind = entry.dtype.kind
    else:
        kind = "b" if isinstance(entry, bool) else "f" if isinstance(entry, Real) else ""
    if kind not in ("b", "i", "u", "f"):
        return ""  # text, tensors or nothing
    return check.of_array(name, value, indices=kind == "b" or (kind in "iu" and name not in STATES))


def _fix(name: str, value: object, kinds: list[object]) -> str:
    """What to do, where it is known."""
    wanted = [getattr(kind, "__name__", "") for kind in kinds]
    if "Solver" in wanted or name == "grid":
        known = others.meant_by(value) if "Solver" in wanted else others.meant_grid(str(value))
        if known is not None:
            return others.hint(known if "Solver" in wanted else f"grid={known}")
    if {"AbstractDenoiser", "Denoiser"} & set(wanted):
        if type(value).__module__.partition(".")[0] == "diffusers":
            return "; wrap it, ss.interop.from_diffusers(pipe), or from_diffusers(net, scheduler)"
        if hasattr(type(value), "ema_model"):
            return "; give its averaged model, trainer.ema_model"
    if isinstance(value, nn.Module | types.FunctionType) and {"AbstractDenoiser", "Denoiser"} & set(wanted):
        return "; wrap a network, Denoiser(net, sde, predicts=...)"
    if callable(value) and not isinstance(value, type) and "Potential" in wanted:
        return "; wrap the function, ss.steering.Reward(fn)"
    if isinstance(value, type | types.FunctionType) and not any(typing.get_origin(k) is abc.Callable for k in kinds):
        made = value.__name__
        return f"; call it, {f'grid=ss.grids.{made}(sde, 10)' if name == 'grid' else f'{made}()'}" * made.isidentifier()
    if Tensor in kinds and isinstance(value, np.ndarray | list | tuple):
        return _as_tensor(name, value)
    if name == "time" and any(typing.get_origin(k) is abc.Callable for k in kinds):
        return "; or a function such as lambda t: 1000 * t"
    if torch.dtype in kinds and isinstance(value, str):
        return f"; write torch.{value}"
    if isinstance(value, str) and any(typing.get_args(kind)[:1] == (str,) for kind in kinds):
        return f"; write {name}=[{value!r}]"
    return ""
