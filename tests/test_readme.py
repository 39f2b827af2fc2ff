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


def test_every_block_of_a_page_is_run() -> None:
    docs = Path(__file__).parents[1] / "docs"
    pages = [*docs.glob("*.md"), *docs.glob("howto/*.md")]
    blocks = [(p.name, b) for p in pages for b in re.findall(r"```(?:python|py)\n(.*?)```", p.read_text(), re.S)]
    assert len(pages) > 40 and len(blocks) > 100
    # The two of own-loop.md, which define classes for other libraries, run in tests/training/test_own_loops.py.
    assert [name for name, text in blocks if ">>>" not in text] == ["own-loop.md"] * 2
    assert [name for name, text in blocks if "+SKIP" in text] == []
