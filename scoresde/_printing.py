"""Short texts for `repr`: one line, and no address in memory."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType, MethodType

from torch import Tensor, nn

_LONGEST = 60  # characters of the text of a list


def short(value: object) -> str:
    """Text of a value on one line: functions by name, tensors by shape, modules by class and number of parameters."""
    if isinstance(value, Tensor):
        if value.numel() == 1 and value.device.type == "cpu":
            return f"{value.item():g}"
        return f"<{' × '.join(map(str, value.shape)) or 'scalar'} {str(value.dtype)[6:]}>"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, FunctionType | MethodType | BuiltinFunctionType):
        return value.__name__
    if isinstance(value, functools.partial):
        return short(value.func)
    if isinstance(value, Mapping):
        return _cut("{", ", ".join(f"{name!r}: {short(entry)}" for name, entry in value.items()), "}", len(value))
    if isinstance(value, list | tuple | nn.ModuleList):
        return _cut("[", ", ".join(map(short, value)), "]", len(value))
    if isinstance(value, nn.Module) and type(value).__repr__ is nn.Module.__repr__:
        count = sum(p.numel() for p in value.parameters())
        return f"<{type(value).__name__}, {count:,} parameters>"
    text = repr(value)
    return f"<{type(value).__name__}>" if " at 0x" in text or "\n" in text else text


def fields(**values: object) -> str:
    """Text of values by name, ``scale=3, rule=linear``; values that are None or False are left out."""
    return ", ".join(f"{k}={short(v)}" for k, v in values.items() if v is not None and v is not False)


def _cut(left: str, text: str, right: str, entries: int) -> str:
    return f"{left}{text}{right}" if len(text) <= _LONGEST or entries == 1 else f"{left}{entries} entries{right}"
