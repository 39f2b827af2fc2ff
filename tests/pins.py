"""Print every package of the environment that runs this as a line of constraints.txt; `make constraints` calls it.

What has no release for an older Python that we support is pinned from the Python on that it needs, and so is what it
depends on: its own older releases may need other ones.
"""

from __future__ import annotations

import re
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
HEAD = """\
# Every package that `make` installs, direct and indirect, so that two fresh machines test the same thing.
# Written by `make constraints`, see CONTRIBUTING.md; not by hand."""


def ours(pattern: str) -> str:
    found = re.search(pattern, PROJECT, re.M)
    assert found, pattern
    return found[1]


def first_python(requires: str, oldest: int) -> tuple[int, int]:
    """Minor and micro version of the first Python from 3.oldest on that a requirement allows."""
    allowed = SpecifierSet(requires)
    return next((k, m) for k in range(oldest, 100) for m in range(100) if f"3.{k}.{m}" in allowed)


def main() -> None:
    oldest = int(ours(r'^requires-python = ">=3\.(\d+)"'))
    left_out = {canonicalize_name(ours(r'^name = "(.*)"')), "pip"}
    installed = {canonicalize_name(package.metadata["Name"]): package for package in distributions()}
    packages = {name: installed[name] for name in sorted(installed.keys() - left_out)}
    since = {
        name: first_python(package.metadata["Requires-Python"] or "", oldest) for name, package in packages.items()
    }
    needs = [
        (name, canonicalize_name(other.name))
        for name, package in packages.items()
        for other in map(Requirement, package.requires or [])
        if other.marker is None or other.marker.evaluate({"extra": ""})
    ]
    while late := [(a, b) for a, b in needs if b in since and since[b] < since[a]]:
        for a, b in late:
            since[b] = max(since[a], since[b])
    print(HEAD)
    for name, package in packages.items():
        minor, micro = since[name]
        marker = f'; python_full_version >= "3.{minor}.{micro}"' if micro else f'; python_version >= "3.{minor}"'
        if (minor, micro) == (oldest, 0):
            marker = ""
        print(f"{name}=={Version(package.version).public}{marker}")


if __name__ == "__main__":
    main()
