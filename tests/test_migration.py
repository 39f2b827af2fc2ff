"""The page of old and new names is true: old names are gone from the top, new ones and new modules are there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import scoresde as ss

PAGE = (Path(__file__).parents[1] / "docs" / "migration.md").read_text()
CELLS = {  # of each section: the names in the old cell and those in the new one
    section.splitlines()[0]: [
        tuple(re.findall(r"`([^`]*)`", cell) for cell in line.strip("| ").split(" | "))
        for line in section.splitlines()
        if line.startswith(("| `", "| a "))
    ]
    for section in PAGE.split("\n## ")[1:]
}
NAMES = [(old, folder) for names, [folder] in CELLS["Names that left the top level"] for old in names]
MODULES = sorted({module for _, modules in CELLS["Modules"] for module in modules})


@pytest.mark.parametrize(("old", "folder"), NAMES)
def test_a_name_left_the_top_for_its_folder(old: str, folder: str) -> None:
    name = old.removeprefix("ss.")
    assert name not in ss.__all__
    assert hasattr(getattr(ss, folder.removeprefix("ss.")), name)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_where_the_page_says(module: str) -> None:
    assert importlib.import_module(f"scoresde.{module}").__doc__


def test_everything_new_that_the_page_names_exists() -> None:
    new = {
        name
        for rows in CELLS.values()
        for _, *cells in rows
        for cell in cells
        for text in cell
        for name in re.findall(r"\bss(?:\.\w+)+", text)
    }
    assert len(new) > 40 and len(NAMES) > 50 and len(MODULES) > 40, "the page is read"
    for path in new:
        thing: object = ss
        for part in path.split(".")[1:]:
            thing = getattr(thing, part)
