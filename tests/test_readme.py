"""The README's Python runs as it stands, and the table it prints is the one it shows."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_readme_runs_and_prints_what_it_shows() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    shown = re.search(r"```\n(DPMSolverPP.*?)```", README, re.S)
    assert len(blocks) >= 2 and shown
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec("\n".join(blocks), {})
    assert shown[1].strip() in out.getvalue()
