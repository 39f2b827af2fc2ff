"""How a network is built: the class and the arguments of its constructor, in a form that JSON files can hold."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TypeGuard, TypeVar

import torch
from torch import nn

Build = Mapping[str, object]
"""Dictionary with the import path ``"class"``, such as ``"package.module:Class"``, and the ``"arguments"`` of it."""

TRUSTED = ("scoresde", "diffusers", "torch.nn")
"""Packages whose modules may be built without the consent of the caller."""

_KEYS = {"class", "arguments"}

Network = TypeVar("Network", bound=type[nn.Module])


def recorded(cls: Network) -> Network:
    """Decorate a class of networks: an object remembers the arguments of its constructor, for :func:`describe`."""
    construct = cls.__init__
    parameters = inspect.signature(construct)

    @functools.wraps(construct)
    def init(self: nn.Module, *args: object, **kwargs: object) -> None:
        construct(self, *args, **kwargs)
        if type(self) is cls:  # a subclass has arguments of its own
            given = parameters.bind(self, *args, **kwargs).arguments
            vars(self)["_built_with"] = dict(list(given.items())[1:])

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


def path_of(cls: type) -> str:
    """Import path of a class, by the shortest package that exports it."""
    parts = cls.__module__.split(".")
    for n in range(1, len(parts) + 1):
        module = sys.modules.get(".".join(parts[:n]))
        if module is not None and vars(module).get(cls.__name__) is cls:
            return f"{'.'.join(parts[:n])}:{cls.__name__}"
    return f"{cls.__module__}:{cls.__qualname__}"


def describe(net: nn.Module) -> dict[str, object] | None:
    """Class and arguments of a network, or None if they are not known.

    They are known for the networks of this library and for those of diffusers, which hold their configuration. Those of
    a network inside are None if they are not known.

    Arguments:
        net: Network, compiled or not.
    """
    net = getattr(net, "_orig_mod", net)
    config = getattr(net, "config", None)
    if type(net).__module__.split(".")[0] == "diffusers" and isinstance(config, Mapping):
        given: Mapping[str, object] = {name: value for name, value in config.items() if not name.startswith("_")}
    elif "_built_with" in vars(net):
        built: Mapping[str, object] = vars(net)["_built_with"]
        # A network inside is described as it is now.
        given = {name: getattr(net, name) if isinstance(v, nn.Module) else v for name, v in built.items()}
    else:
        return None
    arguments: dict[str, object] = {}
    for name, value in given.items():
        if isinstance(value, nn.Module):
            value = describe(value) or {"class": path_of(type(getattr(value, "_orig_mod", value))), "arguments": None}
        arguments[name] = value
    try:
        return {"class": path_of(type(net)), "arguments": plain(arguments)}
    except TypeError:
        return None


def conditions(net: nn.Module) -> list[str]:
    """Names of the arguments of a network's ``forward`` that it cannot do without, after the state and the time.

    Arguments:
        net: Network.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in inspect.signature(net.forward).parameters.values() if p.kind in kinds]
    return [p.name for p in named[2:] if p.default is inspect.Parameter.empty]


def check_build(build: Build) -> dict[str, object]:
    """Return `build` as JSON holds it; raise an error if it is not of the form of :data:`Build`."""
    if not isinstance(build, Mapping) or set(build) != _KEYS or not isinstance(build["arguments"], Mapping):
        raise ValueError(f"`build` must be {{'class': 'package.module:Class', 'arguments': {{...}}}}, got {build!r}.")
    _parts(build["class"])
    return {"class": build["class"], "arguments": plain(build["arguments"])}


def plain(value: object, name: str = "arguments") -> object:
    """The value with tuples as lists; a TypeError if JSON cannot hold it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(entry, f"{name}.{key}") for key, entry in value.items()}
    if isinstance(value, Sequence):
        return [plain(entry, f"{name}.{k}") for k, entry in enumerate(value)]
    raise TypeError(
        f"`build` holds a {type(value).__name__} at {name!r}; JSON holds numbers, strings, lists and dictionaries only."
    )


def unknown(build: Build) -> str | None:
    """Import path of the first network of a description whose arguments are not known, or None if all are.

    Arguments:
        build: Class and arguments.
    """
    arguments = build.get("arguments")
    if not isinstance(arguments, Mapping):
        return str(build["class"])
    return next((name for v in arguments.values() if _is_build(v) and (name := unknown(v)) is not None), None)


def construct(build: Build, allow: Sequence[str] = (), given: nn.Module | None = None) -> nn.Module:
    """Build a network, with freshly drawn weights; torch's global generator stays as it was.

    Only a class of an allowed package is imported, and only a subclass of ``nn.Module`` is called.

    Arguments:
        build: Class and arguments.
        allow: Packages or modules that are allowed in addition to ``TRUSTED``.
        given: Network to use: the whole one, or the one inside an adapter of this library.
    """
    if given is not None and not _goes_inside(given, build):
        return given
    build = check_build(build)
    module_name, class_name = _parts(build["class"])
    allowed = (*TRUSTED, *allow)
    if not _inside(module_name, allowed):
        raise ValueError(
            f"the class {build['class']!r} is not in an allowed package ({', '.join(allowed)}), and importing it would "
            f"run its code; if you trust this code, allow it with allow=[{module_name.split('.')[0]!r}]."
        )
    try:
        cls = getattr(import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"the class {build['class']!r} cannot be imported: {error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and _inside(cls.__module__, allowed)):
        raise ValueError(f"{build['class']!r} is not a class of networks of an allowed package ({', '.join(allowed)}).")
    arguments = build["arguments"]
    assert isinstance(arguments, dict)
    values = {name: construct(v, allow, given) if _is_build(v) else v for name, v in arguments.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            made: nn.Module = cls(**values)
        except TypeError as error:
            raise ValueError(f"{build['class']!r} does not accept the arguments {arguments!r}: {error}.") from error
    return made


def _is_build(value: object) -> TypeGuard[Build]:
    return isinstance(value, Mapping) and set(value) == _KEYS


def _goes_inside(given: nn.Module, build: Build) -> bool:
    """Whether a description is of an adapter of this library around one network, and `given` is not such an adapter."""
    arguments = build.get("arguments")
    inside = [v for v in arguments.values() if _is_build(v)] if isinstance(arguments, Mapping) else []
    if len(inside) != 1 or path_of(type(getattr(given, "_orig_mod", given))) == build["class"]:
        return False
    return _inside(_parts(build["class"])[0], ("scoresde",))


def _inside(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _parts(path: object) -> tuple[str, str]:
    module, _, name = str(path).partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise ValueError(f"the class of a build must be 'package.module:Class', got {path!r}.")
    return module, name
