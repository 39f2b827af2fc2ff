"""The notebooks of the tutorials have what the pages printed and drew."""

from __future__ import annotations

import base64
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "docs"))

from _executed import execute

PAGE = """
Title
=====

.. code-block:: Python

    print(1)




.. rst-class:: sphx-glr-script-out

 .. code-block:: none

    1
      indented




.. code-block:: Python

    plot()

.. image-sg:: /gallery/images/one.png
   :alt: one
"""


def written(folder: Path, page: str) -> Path:
    """A tutorial as Sphinx-Gallery writes it, with two cells of code."""
    cells: list[dict[str, Any]] = [{"cell_type": "markdown", "metadata": {}, "source": ["# Title"]}]
    for text in ("print(1)", "plot()"):
        cells += [{"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": [], "source": [text]}]
    (folder / "images").mkdir()
    (folder / "images/one.png").write_bytes(b"a picture")
    (folder / "page.py").write_text("print(1)")
    (folder / "page.rst").write_text(page)
    (folder / "page.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4}))
    return folder / "page.ipynb"


def test_outputs_are_those_of_the_page(tmp_path: Path) -> None:
    path = written(tmp_path, PAGE)
    execute(path)
    execute(path)  # a second build changes nothing
    notebook = json.loads(path.read_text())
    _, first, second = notebook["cells"]
    assert [first["execution_count"], second["execution_count"]] == [1, 2]
    assert first["outputs"] == [{"output_type": "stream", "name": "stdout", "text": "1\n  indented\n"}]
    assert base64.b64decode(second["outputs"][0]["data"]["image/png"]) == b"a picture"
    with zipfile.ZipFile(tmp_path / "page.zip") as archive:
        assert archive.namelist() == ["page.py", "page.ipynb"]
        assert json.loads(archive.read("page.ipynb")) == notebook


def test_a_page_of_another_form_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 cells of code and its page 1 blocks"):
        execute(written(tmp_path, PAGE.replace("block:: Python\n\n    plot()", "block:: python\n\n    plot()")))
