"""Draws docs/images/architecture.svg from the import contracts in pyproject.toml: `make docs/images/architecture.svg`.

Each band is a layer: what stands in it may import what stands below it, never what stands above, and those side by side do not
import each other. import-linter holds the code to the contracts, and a test holds the picture to them.
"""

from __future__ import annotations

import ast
import re
import sys
import textwrap
import tomllib
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
OPEN = ("elbowroom.analysis", "elbowroom.inference", "elbowroom.models")  # drawn with the layers inside them
WIDTH, EDGE, LINE, BAND = 1120, 24, 17, 8
SHELL, COLOURS = (
    "#eef2f6",
    {"analysis": "#fdebdf", "inference": "#e0eef8", "models": "#e6f3e6", "system": "#f1eef6", "errors": "#f1eef6"},
)


def contracts() -> dict[str, list[list[str]]]:
    """Return folder -> its layers from top to bottom, each a list of names that do not import each other."""
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    found = [c for c in tools["importlinter"]["contracts"] if c["type"] == "layers"]
    return {c["containers"][0]: [[n.strip() for n in re.split("[|:]", layer)] for layer in c["layers"]] for c in found}


def place(module: str) -> Path:
    """Return the folder of a package, or the file of a module without its suffix."""
    parts = module.split(".")[1:]
    return ROOT.joinpath(
        *([] if parts and parts[0] in COLOURS and parts[0] not in ("system", "errors") else ["src", "elbowroom"]), *parts
    )


def purpose(module: str) -> str:
    """Return the first sentence of a module's docstring."""
    here = place(module)
    source = (here / "__init__.py" if here.is_dir() else here.with_suffix(".py")).read_text(encoding="utf-8")
    text = " ".join((ast.get_docstring(ast.parse(source)) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.?!])\s", text.replace("`", ""))[0].rstrip(".")


def inside(module: str) -> str:
    """Return the names of what a folder holds, from its upper layers to its lower ones."""
    return ", ".join(name for layer in contracts().get(module, []) for name in layer)


def draw() -> str:
    """Return the picture as SVG."""
    out: list[str] = []
    y = EDGE + 34
    known = contracts()

    def text(x: float, at: float, words: str, style: str) -> None:
        out.append(f'<text x="{x:g}" y="{at:g}" class="{style}">{escape(words)}</text>')

    def box(x: float, at: float, width: float, height: float, colour: str) -> None:
        out.append(f'<rect x="{x:g}" y="{at:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}"/>')

    def row(package: str, names: list[str], x: float, width: float, colour: str) -> float:
        """Draw one layer side by side; return its height."""
        each = (width - BAND * (len(names) - 1)) / len(names)
        columns = []
        for name in names:
            module = f"{package}.{name}"
            letters = max(20, int((each - 20) / 6.3))
            lines = textwrap.wrap(purpose(module), letters)
            holds = textwrap.wrap(inside(module), letters) if package != "elbowroom" or module not in OPEN else []
            columns.append((name, lines, holds))
        height = 14 + LINE + LINE * max(len(lines) + len(holds) for _, lines, holds in columns)
        for k, (name, lines, holds) in enumerate(columns):
            left = x + k * (each + BAND)
            box(left, y, each, height, colour)
            text(left + 10, y + 21, name, "name")
            for i, line in enumerate([*lines, *holds]):
                text(left + 10, y + 21 + LINE * (i + 1), line, "purpose" if i < len(lines) else "holds")
        return height

    for layer in known["elbowroom"]:
        opened = [name for name in layer if f"elbowroom.{name}" in OPEN]
        if not opened:
            y += row("elbowroom", layer, EDGE, WIDTH - 2 * EDGE, COLOURS.get(layer[0], SHELL)) + BAND
            continue
        (name,) = opened
        top, module = y, f"elbowroom.{name}"
        at = len(out)
        y += 34
        for inner in known[module]:
            y += row(module, inner, EDGE + 12, WIDTH - 2 * EDGE - 24, "#ffffff") + BAND
        out.insert(
            at,
            f'<rect x="{EDGE}" y="{top:g}" width="{WIDTH - 2 * EDGE}" height="{y + 4 - top:g}" rx="6" fill="{COLOURS[name]}"/>',
        )
        text(EDGE + 10, top + 22, f"{name}/", "name")
        text(EDGE + 110, top + 22, purpose(module), "purpose")
        y += 4 + BAND
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + EDGE:g}" viewBox="0 0 {WIDTH} {y + EDGE:g}" '
        'role="img" aria-label="The layers of Elbowroom: each imports what stands below it">\n'
        "<style>text{font-family:system-ui,sans-serif;fill:#17212b}.title{font-size:15px;font-weight:600}"
        ".name{font-size:14px;font-weight:600}.purpose{font-size:12px;fill:#3c4a57}.holds{font-size:11px;fill:#6b7885}</style>\n"
        f'<rect width="{WIDTH}" height="{y + EDGE:g}" fill="#ffffff"/>\n'
        f'<text x="{EDGE}" y="{EDGE + 12}" class="title">Imports run down: a layer may import what is below it, nothing above. '
        "Side by side: independent of each other.</text>\n"
    )
    return head + "\n".join(out) + "\n</svg>\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    sys.stdout.write(f"wrote {PICTURE.relative_to(ROOT)}\n")
