"""Sphinx settings. The build downloads nothing; MathJax is fetched by the reader's browser."""

import re

from sphinx.application import Sphinx

from scoresde import __version__

project = "scoresde"
author = "the scoresde authors"
copyright = "2026, the scoresde authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]

# The API, from docstrings. Autosummary writes one page for each module, autodoc fills it in the order of the source.
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "literal"  # `x` in a docstring is the argument x
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

# A reference in a docstring must lead somewhere. Types of other packages, private ones and type variables cannot.
nitpicky = True
nitpick_ignore_regex = [("py:(class|data|obj)", r"(?!scoresde\.).*|.*\.(_\w+|\w+T)")]

# The pages.
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_is_regexp = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
html_theme = "furo"
html_title = f"scoresde {version}"


def read_naturally(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Let docstrings be written as they read: (B, *event) is no emphasis, :func:`sample` is found in any module."""
    for i, line in enumerate(lines):
        line = re.sub(r"(``.*?``)|(?<=, )\*(?=\w+\))", lambda m: m[1] or r"\*", line)
        lines[i] = re.sub(r"(:(?:attr|class|func|meth|mod):`)(?=\w)", r"\1.", line)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_naturally)
