"""Write what the tutorials printed and drew into their notebooks, which Sphinx-Gallery writes without."""

from __future__ import annotations

import base64
import json
import re
import textwrap
import zipfile
from pathlib import Path
from typing import Any

CODE = re.compile(r"^\.\. code-block:: Python$", re.M)
PICTURE = re.compile(r"^ *\.\. image-sg:: /gallery/(\S+\.png)$", re.M)
PRINTED = re.compile(r"sphx-glr-script-out\n\n \.\. code-block:: none\n\n((?:    .*\n|\n)+)")


def outputs(page: str, folder: Path) -> list[list[dict[str, Any]]]:
    """What each block of code of a page printed and drew, as outputs of a notebook's cell."""
    found = []
    for part in CODE.split(page)[1:]:
        printed = [textwrap.dedent(text).strip() + "\n" for text in PRINTED.findall(part)]
        pictures = [base64.b64encode((folder / name).read_bytes()).decode() for name in PICTURE.findall(part)]
        cell: list[dict[str, Any]] = [{"output_type": "stream", "name": "stdout", "text": text} for text in printed]
        cell += [{"output_type": "display_data", "data": {"image/png": data}, "metadata": {}} for data in pictures]
        found.append(cell)
    return found


def execute(path: Path) -> None:
    """Write the outputs of a page into its notebook, and the notebook into the archive beside it."""
    notebook = json.loads(path.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = outputs(path.with_suffix(".rst").read_text(), path.parent)
    if len(cells) != len(found) or not any(found):
        raise ValueError(f"{path.name} has {len(cells)} cells of code and its page {len(found)} blocks.")
    for k, (cell, out) in enumerate(zip(cells, found, strict=True), start=1):
        cell.update(outputs=out, execution_count=k)
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for file in (path.with_suffix(".py"), path):
            archive.write(file, file.name)


def execute_all(app: Any) -> None:
    """Called by Sphinx when the tutorials have run and before it reads their pages."""
    for path in sorted(Path(app.srcdir, "gallery").glob("*.ipynb")):
        execute(path)
