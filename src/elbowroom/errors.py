"""All errors that Elbowroom raises on purpose.

The user can correct the cause of a `UserError`: the command line prints its one line and exits with code 2. Any other exception
is a bug in Elbowroom (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

LONGEST = 300  # characters of a message


class ElbowroomError(Exception):
    """Base class of all errors of Elbowroom."""


class UserError(ElbowroomError):
    """The user's input cannot be used.

    Args:
        message: one line that names the place (file, dotted path, site), what is wrong, and how to correct it. White space
            becomes one space, and characters that steer a terminal become escapes.
    """

    def __init__(self, message: str) -> None:
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split())))


class SpecError(UserError):
    """A spec, a `--set` or an option is wrong."""


class DataError(UserError):
    """Data are missing, unreadable, or outside the likelihood's support."""


class MissingFile(DataError):
    """The file of the data is not where it was looked for."""


class RunFolderError(UserError):
    """A run folder is missing or incomplete, was not made by Elbowroom, or would be overwritten."""


class UnsupportedProgram(UserError):
    """A Pyro (model, guide) pair does not have the form that per-datum inference needs."""


class NonFiniteLoss(UserError):
    """The loss was not finite during training."""


@contextmanager
def damaged(place: object, cure: str) -> Iterator[None]:
    """Turn what Python raises on numbers and names that do not belong together into a RunFolderError that names the place.

    Args:
        place: the file or folder that they were read from.
        cure: what to do about it.
    """
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{place}: damaged ({type(error).__name__}: {first_line(error)[:120]}); {cure}") from error


def shortened(message: str) -> str:
    """Return a message of at most `LONGEST` characters: its begin, which names the place, and its end, which holds the cure."""
    if len(message) <= LONGEST:
        return message
    kept = LONGEST - len(" ... ")
    return f"{message[: kept // 2]} ... {message[-(kept - kept // 2) :]}"


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the most similar allowed word; where none is similar, the list of allowed words."""
    options = sorted(allowed)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed: {', '.join(options)}" if options else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut at 200 characters; the error's type where there is no message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
