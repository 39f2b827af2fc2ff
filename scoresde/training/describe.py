"""Short texts for objects."""

from __future__ import annotations

import re


def describe(value: object) -> str:
    """Return an object's text on one line: the name of a function, else the repr, without memory addresses.

    Arguments:
        value: Any object.
    """
    name = getattr(value, "__name__", None)
    text = name if isinstance(name, str) else repr(value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", " ".join(text.split()))
