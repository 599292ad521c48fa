"""What an interrupted command has kept, and how it goes on."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from elbowroom.cli.terminal import named
from elbowroom.system import files

INTERRUPTED = 130
RESUMED = {"run", "fit", "audit", "improve", "encode", "score", "impute", "integrate", "sample", "explain"}
COARSE = 0.1  # seconds by which the clock of a file system may be late
FIT = {"weights.pt": "the fit", "checkpoint.pt": "the fit up to its last checkpoint", "spec.yaml": "the spec"}


def kept(arguments: Sequence[str], began: float) -> str:
    """Return what a command has kept in the places that it claimed, and how to go on, as the end of a sentence.

    Args:
        arguments: those of the command line.
        began: when the command began, seconds since 1970: what is older was not written by it.
    """
    places = dict.fromkeys(files.claims)
    said = [words for place in places if (words := _file(place, began) if not place.is_dir() else _folder(place, began))]
    if not said:
        return "nothing was written"
    command = next((word for word in arguments if not word.startswith("-")), "")
    replaced = "--overwrite" in arguments and any(place.is_file() and not _new(place, began) for place in places)
    again = list(arguments)
    if command in RESUMED and not replaced:  # an answer that is to be replaced is still the old one
        again = [word for word in arguments if word not in ("--overwrite", "--resume")]
        again.insert(again.index("--") if "--" in again else len(again), "--resume")
    return f"{', '.join(said)}; go on with `{named(shlex.join(['elbowroom', *again]))}`"


def _folder(place: Path, began: float) -> str:
    """Say what a run or an audit keeps, if the command has written into its folder."""
    entries = [Path(top, name) for top, _, names in os.walk(place) for name in names if not files.is_ours(name)]
    if not any(_new(entry, began) for entry in entries):
        return ""
    things = [words for name, words in FIT.items() if (place / name).is_file()][:1]
    if count := len(list((place / "parts").glob("[!.]*.pt"))):
        things.append(f"{count} finished part{'s' * (count > 1)} of the audit")
    elif (place / "audit.nc").is_file():
        things.append("the audit")
    if (place / "report.html").is_file():
        things.append("the report")
    return f"{named(place)} keeps {' and '.join(things) or 'what was written'}"


def _file(place: Path, began: float) -> str:
    """Say what is kept of an answer or of a table: finished chunks, or the whole."""
    if count := len(list(place.with_name(f"{place.name}.parts").glob("[!.]*.nc"))):
        return f"{named(place)}.parts keeps {count} finished chunk{'s' * (count > 1)}"
    return f"{named(place)} is written" if _new(place, began) else ""


def _new(path: Path, began: float) -> bool:
    return path.is_file() and path.stat().st_mtime >= began - COARSE
