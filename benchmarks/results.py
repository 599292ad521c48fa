"""Sections of RESULTS.md, each written by its own benchmark and replaced as a whole."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def replaced(document: str, section: str) -> str:
    """Return the document with the section of the same heading (the section's first line) replaced, or appended.

    A section runs from its heading to the next heading, of whatever level, or to the end.
    """
    lines, new = document.splitlines(), section.strip().splitlines()
    if new[0] not in lines:
        return "\n".join([*lines, *([""] if lines else []), *new]) + "\n"
    start = lines.index(new[0])
    end = next((i for i, line in enumerate(lines) if i > start and line.startswith("#")), len(lines))
    return "\n".join([*lines[:start], *new, *([""] if lines[end:] else []), *lines[end:]]) + "\n"


def write(section: str, path: Path = RESULTS) -> None:
    """Replace or append one section of RESULTS.md."""
    document = path.read_text(encoding="utf-8") if path.exists() else ""
    path.write_text(replaced(document, section), encoding="utf-8")
