"""Calls every public function with one wrong argument at a time, and counts how the library answers.

    python tests/fuzz.py                     all calls: a table, one line for each folder
    python tests/fuzz.py --calls 500         a sample of the calls
    python tests/fuzz.py --only Tape --list  the calls of some targets, with each answer that is not clear

`tests/fuzz_calls.py` has a valid call of every public callable. Each argument of it is replaced in turn by the values
of `damages`. An answer is

- *clear*: the library refuses, by an error that it raises itself (or Python's own error of an unknown or missing
  argument), with the name of the argument in the message;
- *obscure*: any other error, such as one that comes from inside torch, or whose message names no argument;
- *silent*: no error, for a value that is clearly invalid;
- *accepted*: no error, for a value that may be valid.

Clearly invalid is a value that does not belong to the annotation of its argument (see `fits`); NaN for a number; a
negative number where the name of the argument says that there is none (a count, a time, a standard deviation: see
`SIGNED` and `POSITIVE`); and a word where only some words are allowed (see `FREE`). All other values may be valid.
NumPy's numbers must be accepted like Python's.
"""

from __future__ import annotations

import argparse
import ast
import collections.abc as abc
import functools
import inspect
import linecache
import math
import os
import random
import re
import signal
import sys
import types
import typing
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import scoresde as ss

PACKAGE = str(Path(ss.__file__).parent)
CLEAR = (TypeError, ValueError, AttributeError, NotImplementedError, ss.SolverError)
ANSWERS = ("clear", "accepted", "obscure", "silent")

# Names of integers that may be negative, and of numbers that may not.
SIGNED = "seed draw offset lap stream value k t index step row order rows node".split()
POSITIVE = """T t_min t_start t_end t s rtol atol tol data_std sigma_data sigma_min sigma_max std lr bandwidth
        first_step safety beta_start max_beta margin robust size decay drop sigma beta_min quantile
        threshold s_churn s_noise""".split()
FREE = """name note sde path folder device save_device message who limit progress prefix entry reason licence notes
        why""".split()  # texts of any words


# targets


@dataclass(frozen=True)
class Target:
    """A public callable: its name as `folder.Class.method`, and the function."""

    folder: str
    name: str
    call: Callable[..., Any]
    owner: type | None = None

    @functools.cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        signature = inspect.signature(self.call)
        skip = 1 if self.is_method else 0
        return {
            p.name: p
            for p in list(signature.parameters.values())[skip:]
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
        }

    @property
    def is_method(self) -> bool:
        if self.owner is None:
            return False
        own = inspect.getattr_static(self.owner, self.name.rsplit(".", 1)[1])
        return not isinstance(own, (classmethod, staticmethod))

    def annotation(self, name: str) -> Any:
        text = self.parameters[name].annotation
        if not isinstance(text, str):
            return text
        return evaluate(text, inspect.unwrap(self.call))


def evaluate(text: str, function: Any) -> Any:
    """The type that an annotation names; `Any` if a name of it is only known to type checkers."""
    function = inspect.unwrap(getattr(function, "__func__", function))
    modules = [sys.modules[c.__module__] for c in inspect.getmro(function)] if inspect.isclass(function) else []
    modules += [sys.modules[function.__module__]]
    names: dict[str, Any] = {}
    for module in [*folders().values(), *reversed([m for m in modules if m.__name__.startswith("scoresde")])]:
        names.update(vars(module))
    try:
        return eval(text, names)
    except (NameError, TypeError):
        return Any


@functools.cache
def folders() -> dict[str, types.ModuleType]:
    """The public modules: the folders, and the modules that they export."""
    found = {"": ss} | {n: getattr(ss, n) for n in ss.__all__ if inspect.ismodule(getattr(ss, n))}
    for name, module in list(found.items())[1:]:
        found |= {f"{name}.{n}": getattr(module, n) for n in public(module) if inspect.ismodule(getattr(module, n))}
    return found


def public(module: types.ModuleType) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is not None:
        return list(names)
    return [
        n
        for n, v in vars(module).items()
        if not n.startswith("_") and getattr(v, "__module__", None) == module.__name__
    ]


def targets() -> list[Target]:
    """Every public function and class, and the public methods of these classes, each once."""
    found: dict[int, Target] = {}
    for folder, module in [*list(folders().items())[1:], ("", ss)]:
        for name in public(module):
            thing = getattr(module, name)
            if (
                not callable(thing)
                or not getattr(thing, "__module__", "").startswith("scoresde")
                or isinstance(thing, types.ModuleType)
            ):
                continue
            if not (inspect.isclass(thing) or inspect.isfunction(thing)) or id(thing) in found:
                continue
            found[id(thing)] = Target(folder, name, thing)
            if inspect.isclass(thing):
                for method in vars(thing):
                    if method.startswith("_") or not callable(getattr(thing, method)):
                        continue
                    function = getattr(thing, method)
                    if inspect.isroutine(function):
                        found[id(inspect.getattr_static(thing, method))] = Target(
                            folder, f"{name}.{method}", function, thing
                        )
    return list(found.values())


# damages


class Thing:
    """An object of no use."""


def damages(valid: dict[str, Any]) -> dict[str, Any]:
    """Wrong values of an argument by name; whether each is wrong for an argument, `fits` says."""
    return {
        "text": "ten",
        "None": None,
        "True": True,
        "a fraction": 0.5,
        "0": 0,
        "-1": -1,
        "NaN": math.nan,
        "inf": math.inf,
        "huge": 1e300,
        "NumPy integer": np.int64(2),
        "NumPy float": np.float64(0.5),
        "list of text": ["a", "b"],
        "list of NaN": [math.nan, 0.5],
        "empty list": [],
        "dict": {"a": 1},
        "object": Thing(),
        "class of networks": torch.nn.Linear,
        "scalar tensor": torch.tensor(0.5, dtype=torch.float64),
        "tensor (3, 5)": torch.full((3, 5), 0.5, dtype=torch.float64),
        "integer tensor": torch.ones(4, 2, dtype=torch.int64),
        "complex tensor": torch.ones(4, 2, dtype=torch.complex64),
        "half tensor": torch.ones(4, 2, dtype=torch.float16),
        "empty tensor": torch.empty(0, 2, dtype=torch.float64),
        "NumPy array": np.full((4, 2), 0.5),
        "bare network": torch.nn.Linear(2, 2),
        "process": valid["sde"],
        "class of processes": ss.VP,
        "denoiser": valid["model"],
        "solver": valid["solver"],
        "class of solvers": ss.solvers.Multistep,
        "function of solvers": ss.UniPC,
        "name of a grid": "karras",
    }


def fits(annotation: Any, value: Any, name: str) -> bool:
    """Whether a value may belong to an annotation. Numbers are Python's tower; what is not known fits everything."""
    if annotation is Any or annotation is inspect.Parameter.empty or annotation is object:
        return True
    if isinstance(annotation, str):
        return True
    if isinstance(annotation, typing.TypeVar):
        options = annotation.__constraints__ or ((annotation.__bound__,) if annotation.__bound__ else ())
        return not options or any(fits(a, value, name) for a in options)
    if isinstance(annotation, typing.ForwardRef):
        return True
    if annotation is None or annotation is type(None):
        return value is None
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(a, value, name) for a in args)
    if origin is abc.Callable:
        return callable(value)
    if annotation is bool:
        return isinstance(value, bool) or (isinstance(value, (int, np.integer)) and value in (0, 1))
    if annotation is int:
        negative = isinstance(value, (int, np.integer)) and value < 0 and name not in SIGNED
        return isinstance(value, (int, np.integer)) and not negative
    if annotation is float:
        number = isinstance(value, (int, float, np.number)) and not math.isnan(value)
        return (number and not (name in POSITIVE and value < 0)) or (isinstance(value, Tensor) and value.ndim == 0)
    if annotation is str:
        return isinstance(value, str) and (name in FREE or value not in ("ten", "karras"))
    if annotation in (Path, PathLike):
        return isinstance(value, PathLike)
    if annotation is torch.device:
        return isinstance(value, torch.device)
    if annotation is Tensor:
        return isinstance(value, Tensor)
    if origin is tuple or annotation is tuple:
        return isinstance(value, (tuple, list, np.ndarray, Tensor)) and elements(args[:1], value, name)
    if origin is not None and inspect.isclass(origin) and issubclass(origin, abc.Mapping):
        return isinstance(value, abc.Mapping)
    if origin in (abc.Iterable, abc.Collection) and isinstance(value, abc.Mapping):
        return True
    if origin is not None and inspect.isclass(origin) and issubclass(origin, abc.Iterable):
        return (
            isinstance(value, (abc.Sequence, np.ndarray, Tensor))
            and not isinstance(value, str)
            and elements(args[:1], value, name)
        )
    if origin is not None:
        return not inspect.isclass(origin) or isinstance(value, origin)
    if inspect.isclass(annotation):
        if getattr(annotation, "_is_protocol", False):
            return True
        return isinstance(value, annotation)
    return True


def elements(kinds: tuple[Any, ...], value: Any, name: str) -> bool:
    """Whether the entries of a list may belong to one of the kinds."""
    if not kinds or isinstance(value, (Tensor, np.ndarray)):
        return True
    return all(any(fits(kind, v, name) for kind in kinds) for v in value)


# answers


@dataclass(frozen=True)
class Answer:
    """What a call answered: its target, argument and damage, the kind of the answer, and the error."""

    target: Target
    argument: str
    damage: str
    kind: str
    invalid: bool
    text: str = ""

    @property
    def folder(self) -> str:
        return self.target.folder.split(".")[0] or "top"


ALIASES = {
    "shape_or_x": ("shape", "x"),
    "spectrum": ("variance",),
}


def names_argument(message: str, argument: str) -> bool:
    return any(re.search(rf"(?<!\w){re.escape(n)}(?!\w)", message) for n in (argument, *ALIASES.get(argument, ())))


def is_clear(error: BaseException, argument: str) -> bool:
    """Whether the library itself raised the error, or Python at the door, and the message names the argument."""
    message = str(error)
    if not isinstance(error, CLEAR) or not names_argument(message, argument):
        return False
    if "unexpected keyword argument" in message:  # Python's own error of a call
        return True
    trace = error.__traceback__
    frames = []
    while trace is not None:
        frames.append((trace.tb_frame.f_code.co_filename, trace.tb_lineno))
        trace = trace.tb_next
    inner, line = frames[-1]
    if not inner.startswith(PACKAGE):
        return False
    return raises_at(inner, line)


@functools.cache
def raised_lines(path: str) -> frozenset[int]:
    """The lines of the `raise` statements of a file."""
    tree = ast.parse("".join(linecache.getlines(path)))
    return frozenset(
        n
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise)
        for n in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    )


def raises_at(path: str, line: int) -> bool:
    return line in raised_lines(path)


class TooSlow(Exception):
    """A call takes too long."""


@typing.no_type_check
def limited(call: Callable[[], Any], seconds: float = 5) -> Any:
    """The result of a call, which may take some seconds of the processor."""

    def stop(*_: Any) -> None:
        raise TooSlow

    signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        out = call()
        if inspect.isgenerator(out):
            list(out)
        elif hasattr(out, "__enter__") and hasattr(out, "__exit__") and not isinstance(out, torch.nn.Module):
            with out:
                pass
        return out
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


@dataclass(frozen=True)
class Case:
    """One damaged call."""

    target: Target
    argument: str
    damage: str


def cases(found: list[Target]) -> Iterator[Case]:
    import fuzz_calls

    values = damages(fuzz_calls.values())
    for target in found:
        for argument in target.parameters:
            if f"{target.name}.{argument}" in fuzz_calls.SKIPPED:
                continue
            for damage in values:
                yield Case(target, argument, damage)
        if not any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target.call).parameters.values()):
            yield Case(target, "nonsense", "unknown keyword")


def answer(case: Case) -> Answer | None:
    """Make a damaged call; None if the value is the valid one."""
    import fuzz_calls

    target, argument, damage = case.target, case.argument, case.damage
    valid = fuzz_calls.values()
    kwargs = fuzz_calls.valid_call(target, valid)
    if damage == "unknown keyword":
        kwargs, invalid, required = {**kwargs, "nonsense": 1}, True, False
    else:
        value = damages(valid)[damage]
        annotation = fuzz_calls.ANNOTATIONS.get(f"{target.name}.{argument}") or target.annotation(argument)
        if (
            damage == "NumPy integer"
            and isinstance(kwargs.get(argument), int)
            and not isinstance(kwargs[argument], bool)
        ):
            value, required = np.int64(kwargs[argument]), True
        elif damage == "NumPy float" and isinstance(kwargs.get(argument), float):
            value, required = np.float64(kwargs[argument]), True
        else:
            required = False
        invalid = not fits(annotation, value, argument)
        kwargs = {**kwargs, argument: value}
    try:
        limited(lambda: fuzz_calls.invoke(target, kwargs, valid))
    except TooSlow:
        return Answer(target, argument, damage, "obscure", invalid, "does not end")
    except Exception as error:
        kind = "clear" if is_clear(error, argument) and not required else "obscure"
        return Answer(target, argument, damage, kind, invalid, f"{type(error).__name__}: {str(error)[:160]}")
    return Answer(target, argument, damage, "silent" if invalid else "accepted", invalid)


def fuzz(calls: int | None = None, seed: int = 0, only: str = "") -> list[Answer]:
    """Make all the damaged calls, or a sample of them."""
    import fuzz_calls

    every = [
        t for t in targets() if t.name not in fuzz_calls.REASONS and only.lower() in f"{t.folder}.{t.name}".lower()
    ]
    todo = list(cases(every))
    torch.func.grad(torch.sum)(torch.ones(1))  # loads the compiler, which takes seconds and must not be interrupted
    if calls is not None and calls < len(todo):
        todo = random.Random(seed).sample(todo, calls)
    here = Path.cwd()
    os.chdir(fuzz_calls.folder())  # some calls write a file named "ten"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return [a for a in map(answer, todo) if a is not None]
    finally:
        os.chdir(here)


def table(answers: list[Answer]) -> str:
    """Counts by folder: of the clearly invalid calls, then of those that may be valid."""
    by_folder: dict[str, Counter[tuple[bool, str]]] = defaultdict(Counter)
    for a in answers:
        by_folder[a.folder][a.invalid, a.kind] += 1
    lines = [
        f"{'':12} {'clearly invalid':>31}   {'may be valid':>23}",
        f"{'folder':12} {'calls':>7}{'clear':>8}{'obscure':>8}{'silent':>8}   "
        f"{'clear':>7}{'accepted':>9}{'obscure':>8}",
    ]
    total: Counter[tuple[bool, str]] = Counter()
    for folder, count in sorted(by_folder.items()):
        total += count
        lines.append(line(folder, count))
    return "\n".join([*lines, line("all", total)])


def line(name: str, count: Counter[tuple[bool, str]]) -> str:
    invalid = sum(n for (bad, _), n in count.items() if bad)
    bad = "".join(f"{count[True, k]:8}" for k in ("clear", "obscure", "silent"))
    good = f"{count[False, 'clear']:7}{count[False, 'accepted']:9}{count[False, 'obscure']:8}"
    return f"{name:12} {invalid:7}{bad}   {good}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, help="number of calls; all without it")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample of calls")
    parser.add_argument("--only", default="", help="part of the names of the targets")
    parser.add_argument("--list", action="store_true", help="list every obscure and silent answer")
    options = parser.parse_args()
    torch.set_num_threads(1)
    answers = fuzz(options.calls, options.seed, options.only)
    if options.list:
        for a in answers:
            if a.kind in ("obscure", "silent"):
                name = f"{a.target.folder}.{a.target.name}"
                print("\t".join([a.kind + "?" * (not a.invalid), name, a.argument, a.damage, a.text]))
    print(table(answers))


if __name__ == "__main__":
    main()
