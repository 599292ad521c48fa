"""Durations as text: `90s`, `10m`, `1h`."""

from __future__ import annotations

import math
import re

from elbowroom.errors import SpecError

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
_TIME = re.compile(r"(\d+(?:\.\d+)?|\.\d+)\s*([smh]?)")
WANTED = "must be a time above 0, such as 90s, 10m or 1h, or none"
NONE = "none"
DEFAULT = "5m"
"""The budget of an audit, and of a question, for which none is given."""


def seconds(budget: float | str | None, where: str = "budget") -> float:
    """Return a budget in seconds; infinity for None and for `none`.

    Args:
        budget: a number of seconds, a number with a unit: `s`, `m`, `h`; or `none` for no limit.
        where: name of the budget in messages.

    Raises:
        SpecError: the budget is not a time above 0.
    """
    if budget is None or (isinstance(budget, str) and budget.strip().lower() == NONE):
        return math.inf
    if isinstance(budget, str):
        found = _TIME.fullmatch(budget.strip())
        value = float(found[1]) * _UNITS[found[2] or "s"] if found else math.nan
    else:
        value = math.nan if isinstance(budget, bool) else float(budget)
    if not 0 < value < 1e9:
        raise SpecError(f"{where}: {WANTED}, got {budget!r}")
    return value


def words(time: float) -> str:
    """Format a number of seconds for people: `0.4 s`, `12 s`, `3 min`, `2.5 h`."""
    if not math.isfinite(time):
        return "an unknown time"
    for size, unit in ((86400.0, "days"), (3600.0, "h"), (60.0, "min")):
        if time >= 1.5 * size:
            return f"{time / size:.{1 if time < 10 * size else 0}f} {unit}"
    return f"{time:.{1 if time < 10 else 0}f} s"
