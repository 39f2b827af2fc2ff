"""Sphinx settings. Neither the build nor the pages need a network: MathJax is part of the pages."""

import importlib
import importlib.util
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
from _executed import execute_all

import scoresde
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
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates", "tutorials/*"]

# Some folders export a function with the name of its module, as scoresde.sampling.encode. Here that name is the module.
names = {info.name for info in pkgutil.walk_packages(scoresde.__path__, "scoresde.")}
modules = [importlib.import_module(name) for name in sorted(names - {"scoresde.plan.kernel"})]  # which needs triton
for module in modules:
    folder, _, name = module.__name__.rpartition(".")
    setattr(sys.modules[folder], name, module)

# Types that these modules import for type checkers only.
for module in (scoresde.training.hooks, scoresde.training.checkpoint):
    module.Trainer = scoresde.training.Trainer
scoresde.training.trainer.Accelerator = Accelerator

# The API, from docstrings. Autosummary writes one page for each module, autodoc fills it in the order of the source.
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
default_role = "literal"  # `x` in a docstring is the argument x
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a list, so that properties among the attributes are not documented twice
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True

# Every reference in a docstring must have a target, except types of other packages, private types and type variables.
nitpicky = True
nitpick_ignore_regex = [("py:(class|data|obj)", r"(?!scoresde\.).*|.*\.(_\w+.*|\w+T)")]

# The pages.
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_is_regexp = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
html_theme = "furo"

# The files of MathJax, which a package holds; the pages need no network.
_mathjax = importlib.util.find_spec("sphinx-mathjax-offline")
assert _mathjax is not None and _mathjax.origin is not None, "pip install sphinx-mathjax-offline"
html_static_path = [str(Path(_mathjax.origin).parent / "static")]
mathjax_path = "mathjax/tex-chtml.js"
html_title = f"scoresde {version}"


def read_naturally(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Escape the asterisks in (*shape, B, *event), and search for :func:`sample` in all modules."""
    for i, line in enumerate(lines):
        line = re.sub(r"(``.*?``)|(?:(?<=, )|(?<=\())\*(?=\w+[,)])", lambda m: m[1] or r"\*", line)
        lines[i] = re.sub(r"(:(?:attr|class|func|meth|mod):`)(?=\w)", r"\1.", line)


def sidebar(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Write the list of all pages once, and mark the current page in it; Sphinx lays it anew for each page."""

    def toctree(**options: object) -> str:
        root = app.config.root_doc
        if (key := repr(options)) not in lists:
            lists[key] = app.builder._get_local_toctree(root, **options)  # type: ignore[attr-defined]
        return mark(lists[key], page, app.builder.get_target_uri(page))

    if "toctree" in context:
        context["toctree"] = toctree


lists: dict[str, str] = {}


def mark(text: str, page: str, uri: str) -> str:
    """A list of pages as seen from one of them: relative links, and its entry and those above it are current."""
    parts = re.split(r'(<li class="toctree-l\d+">|</li>)', text)
    above: list[int] = []
    for i, part in enumerate(parts):
        if part.startswith("<li "):
            above.append(i)
        elif part == "</li>":
            above.pop()
        if above and f'href="{uri}"' in part:
            parts[i] = part.replace(f'internal" href="{uri}"', 'internal current" href="#"')
            for j in above:
                parts[j] = parts[j].replace('">', ' current">')
    return re.sub(r'(?<=href=")(?!#|\w+:)', "../" * page.count("/"), "".join(parts))


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", read_naturally)
    app.connect("html-page-context", sidebar, priority=400)  # before the theme
    app.connect("builder-inited", execute_all, priority=900)  # after the tutorials have run


# The tutorials: scripts that are run when the pages are built, with their figures, and notebooks of them.
os.environ.setdefault("MPLBACKEND", "Agg")
sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "gallery",
    "filename_pattern": r"\d\d_\w+\.py",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "write_computation_times": False,
    "thumbnail_size": (320, 220),
}
