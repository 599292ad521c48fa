"""Sphinx: the pages of this folder and the docstrings of the package; `make docs` fails on any warning."""

import re
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

project = "Elbowroom"
copyright = "the Elbowroom authors, Apache-2.0"
version = release = version_of("elbowroom")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "Elbowroom"
myst_heading_anchors = 4
myst_links_external_new_tab = False
suppress_warnings = ["myst.header"]  # pages may begin at any level
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_attr_annotations = True
autodoc_preserve_defaults = True

default_role = "code"  # `names` in docstrings, which are plain text and no reStructuredText

STAR = re.compile(r"(?<![*\\\w])\*(?=\w)")  # of a shape such as (N, *event)
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]+)\)")


def outside(app: Any, page: str, source: list[str]) -> None:
    """Show links to files of the repository outside docs/ as their paths; one that leads nowhere ends the build."""
    here = (ROOT / "docs" / page).parent

    def put(match: re.Match[str]) -> str:
        words, link = match[1], match[2]
        target = (here / link).resolve()
        if not target.exists():
            raise FileNotFoundError(f"docs/{page}.md: the link {link} leads nowhere")
        if target.is_relative_to(ROOT / "docs"):
            return match[0]
        path = str(target.relative_to(ROOT))
        return f"`{path}`" if words.strip("`") == path else f"{words} (`{path}`)"

    source[0] = LINK.sub(put, source[0])


def plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the stars of shapes, which would begin an emphasis."""
    lines[:] = [line if line.lstrip().startswith(">>>") else STAR.sub(r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    """Connect the above."""
    app.connect("source-read", outside)
    app.connect("autodoc-process-docstring", plain)
