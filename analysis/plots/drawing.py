"""Figures are drawn one by one: what one of them lacks, or breaks at, costs that figure and never the report or the answer."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from elbowroom import parts
from elbowroom.analysis.plots.style import Absent, Plot
from elbowroom.errors import UserError, first_line
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom.figures")  # which figures are lacking, and why
T = TypeVar("T")


class NotDrawn(Absent):
    """A figure that the data allow, but the libraries that are installed do not."""


def drawn(name: str, drawer: str, *given: Any) -> Plot | Absent:
    """Draw a figure with `module.function` of `plots/report`, which is imported now, and with it what it draws with."""
    module, function = drawer.split(".")
    with stage(name):
        return attempt(name, lambda: getattr(import_module(f"elbowroom.analysis.plots.report.{module}"), function)(*given))


def attempt(name: str, step: Callable[[], T]) -> T | NotDrawn:
    """Take a step of drawing a figure; where it fails, return why. Errors of the user's, and of memory, go on."""
    try:
        return step()
    except (UserError, MemoryError, OSError) as error:
        if parts.culprit(error) is None:
            raise
        return _not_drawn(name, error)
    except Exception as error:  # a library may raise anything when it is imported, and a newer one when it draws
        return _not_drawn(name, error)


def _not_drawn(name: str, error: Exception) -> NotDrawn:
    reason = parts.trouble(error) or f"drawing failed ({type(error).__name__}: {first_line(error)[: parts.LONGEST]})"
    return NotDrawn(name, f"Not drawn: {reason}.")


def tell(file: Path, items: Iterable[object]) -> None:
    """Log a line for each reason why figures were not drawn."""
    lost = defaultdict(list)
    for item in items:
        if isinstance(item, NotDrawn):
            lost[item.reason].append(item.name)
    for reason, names in lost.items():
        words = "the figure" if len(names) == 1 else "the figures"
        log.warning("elbowroom: note: %s lacks %s %s. %s", file, words, ", ".join(names), reason.rstrip("."))
