"""Print the oldest release that pyproject.toml allows of each dependency, as constraints; `make test-oldest` calls it.

python tests/oldest.py EXTRA [torch=VERSION]     a later release of one, where pip has not the oldest
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def requirements(project: dict[str, Any], extras: set[str]) -> Iterator[Requirement]:
    """What the project needs with some of its extras, which may name others of its own."""
    texts = [*project["dependencies"], *(line for name in extras for line in project["optional-dependencies"][name])]
    for needed in map(Requirement, texts):
        if needed.name == project["name"]:
            yield from requirements({**project, "dependencies": []}, needed.extras)
        else:
            yield needed


def lower_bound(needed: Requirement) -> str:
    bounds = [part.version for part in needed.specifier if part.operator in (">=", "==", "~=")]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml must give `{needed.name}` one lower bound, as in {needed.name}>=1.0")
    return bounds[0]


def main(extra: str, *changes: str) -> None:
    project = tomllib.loads((Path(__file__).resolve().parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    oldest = {needed.name: lower_bound(needed) for needed in requirements(project, {extra})}
    oldest.update(change.split("=") for change in changes)
    print(*(f"{name}=={version}" for name, version in sorted(oldest.items())), sep="\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
