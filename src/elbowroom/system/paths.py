"""Reading of files that may be anything: folders, devices and pipes are refused, which could be read for ever."""

from __future__ import annotations

import stat
from pathlib import Path

MAX_BYTES = 1_000_000
"""Largest size of a spec."""


def unreadable(path: Path) -> str | None:
    """Say why a path is not a file that ends; None for a regular file.

    Raises:
        OSError: the system refuses the path, or there is nothing.
    """
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    if stat.S_ISDIR(mode):
        return "this is a folder; name a file"
    kind = "pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
    return f"this is a {kind}, not a file; write what it gives to a file first"


def limited_text(path: Path, most: int) -> str:
    """Return the text of a small file in UTF-8; a byte order mark is left out.

    Args:
        path: the file.
        most: its largest size, bytes.

    Raises:
        ValueError: it is no regular file, too large, or not in UTF-8.
        OSError: the system refuses it.
    """
    if problem := unreadable(path):
        raise ValueError(problem)
    with path.open("rb") as handle:
        raw = handle.read(most + 1)
    if len(raw) > most:
        raise ValueError(f"more than {most:,} bytes: this is not a spec")
    return raw.decode("utf-8-sig")


def located(folder: Path, path: Path) -> Path:
    """Return an absolute path; a relative one starts at `folder`, and `~` is the home folder.

    Raises:
        ValueError: it cannot be a path on this system: an unknown user, a loop of links.
    """
    try:
        return (folder / path.expanduser()).resolve()
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read: {reason[:1].lower()}{reason[1:].rstrip('.')}") from None
