"""Every error that Elbowroom raises on purpose.

A `UserError` is the user's to mend: the command line prints its one line and exits with code 2. Anything else that
escapes is our fault (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ElbowroomError(Exception):
    """Base class of all of Elbowroom's errors."""


class UserError(ElbowroomError):
    """Something the user gave cannot be used.

    Args:
        message: one line that names the place (file, dotted path, site), what was wrong, and the cure.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class SpecError(UserError):
    """A spec, a `--set` or an option is wrong."""


class DataError(UserError):
    """Data are missing, unreadable, or outside the likelihood's support."""


class RunFolderError(UserError):
    """A run folder is missing, foreign, incomplete or in the way."""


class UnsupportedProgram(UserError):
    """A Pyro (model, guide) pair does not have the form that per-datum inference needs."""


class NonFiniteLoss(UserError):
    """Training met a loss that is not finite."""


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest allowed word, or the list of the allowed ones."""
    options = sorted(allowed)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed: {', '.join(options)}" if options else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it; its type where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
