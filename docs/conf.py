"""The documentation site: `make docs` builds it into docs/_build/html."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import ulysses_dp

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "ulysses_dp"
author = copyright = "The ulysses_dp developers"  # noqa: A001
release = version = importlib.metadata.version("ulysses_dp")

missing = set(ulysses_dp.__all__) - set((Path(__file__).parent / "reference.md").read_text(encoding="utf-8").split())
if missing:
    raise RuntimeError(f"docs/reference.md has no place for {', '.join(sorted(missing))}")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "sphinx_copybutton",
    "sphinx_design",
    "gallery",
]
exclude_patterns = ["_build", "_ext", "_static"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # the docstrings say `name` for code, and for names of this package alike
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections say more
numpydoc_show_class_members = False
numpydoc_class_members_toctree = False

linkcheck_anchors = False

html_theme = "pydata_sphinx_theme"
html_title = "ulysses_dp"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "show_toc_level": 2,
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "show_prev_next": True,
    "navbar_align": "left",
}
html_sidebars = {"index": []}
html_show_sourcelink = False
