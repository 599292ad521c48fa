"""The columns of a table: their cells, the layout that a spec declares, and their kinds."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from elbowroom.data.chunks import rows_of
from elbowroom.errors import DataError, nearest
from elbowroom.models.columns import Column, Kind

_OURS = ("", "nan", "NaN", "NAN", "NA", "<NA>", "N/A", "null", "NULL", "?")
_OF_PANDAS = ("-nan", "-NaN", "n/a", "#N/A", "#N/A N/A", "#NA", "None", "1.#IND", "-1.#IND", "1.#QNAN", "-1.#QNAN")
MISSING = frozenset(_OURS + _OF_PANDAS)
"""Cells of a CSV file that count as missing: those of pandas, and ?."""
MOST_LEVELS = 1000
FEW_LEVELS = 50
"""A column with at most this many different texts counts as categorical, even if it has few rows."""
CODED = ("categorical", "ordinal")
DATE = re.compile(
    r"(\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
    r"([T ]\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?\s*(Z|[+-]\d{2}:?\d{2})?)?"
)


@dataclass(frozen=True, eq=False)
class Cells:
    """One column as it was read.

    Attributes:
        name: name of the column.
        values: numbers, (N,), NaN where missing; for text the codes.
        levels: the texts behind the codes 0, 1, ...; None for numbers.
        ordered: whether the levels have an order.
    """

    name: str
    values: np.ndarray
    levels: tuple[str, ...] | None = None
    ordered: bool = False

    @classmethod
    def of_text(cls, name: str, texts: Sequence[str | None], levels: Iterable[str] | None = None) -> Cells:
        """Make codes of texts, None for missing. Levels not given are sorted: numbers by size, then other texts."""
        known = tuple(sorted({t for t in texts if t is not None}, key=_by_size) if levels is None else levels)
        codes = {level: float(i) for i, level in enumerate(known)}
        values = np.array([np.nan if t is None else codes[t] for t in texts])
        return cls(name, whole(values), known, levels is not None)

    def texts(self) -> list[str | None]:
        """Return the cells as text, None for missing."""
        levels, values = self.levels, self.values
        if levels is not None:
            return [None if np.isnan(v) else levels[int(v)] for v in values]
        return [None if np.isnan(v) else str(int(v)) if float(v).is_integer() else repr(float(v)) for v in values]


@dataclass(frozen=True)
class Layout:
    """The roles of the columns of a table.

    Attributes:
        x: columns to model; None for all columns without another role.
        covariates: columns to condition on.
        exposure: the column of exposures.
        labels: the column of labels.
        kinds: column -> kind.
        levels: column -> the texts behind its codes, for coded columns.
        header: whether the first line of a CSV file holds names; None where that is to be found out.
        delimiter: what stands between the cells of a CSV file; None where that is to be found out. Files of other rows may
            have another one.
        fitted: it belongs to data of a fit: other rows must have the same columns, except for the labels.
    """

    x: tuple[str, ...] | None = None
    covariates: tuple[str, ...] = ()
    exposure: str | None = None
    labels: str | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    header: bool | None = None
    delimiter: str | None = None
    fitted: bool = False

    @classmethod
    def chosen(
        cls,
        x: Sequence[str] | None,
        covariates: Sequence[str] | None,
        exposure: str | None,
        labels: str | None,
        kinds: Mapping[str, Kind] | None,
        header: bool | None = None,
        delimiter: str | None = None,
    ) -> Layout:
        """Make a layout of the options of a data set; a ValueError if a column is named twice or has two roles."""
        found = cls(
            None if x is None else tuple(x), tuple(covariates or ()), exposure, labels, dict(kinds or {}), {}, header, delimiter
        )
        for option, names in (("x", found.x or ()), ("covariates", found.covariates)):
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{option}: column {repeated[0]!r} is named twice")
        for first, second in itertools.combinations(("x", "covariates", "exposure"), 2):
            both = set(found._names(first)) & set(found._names(second))
            if both:
                raise ValueError(f"{first}: column {min(both)!r} is named by {second} too; give it one role")
        return found

    def _names(self, option: str) -> tuple[str, ...]:
        given = getattr(self, option)
        return () if given is None else (given,) if isinstance(given, str) else tuple(given)

    def others(self) -> list[tuple[str, str]]:
        """Return (option, column) for every column that is not in x."""
        return [(f"data.{option}", name) for option in ("covariates", "exposure", "labels") for name in self._names(option)]

    @property
    def textual(self) -> frozenset[str]:
        """The columns that may hold both numbers and text."""
        coded = [name for name, kind in self.kinds.items() if kind in CODED]
        return frozenset([*coded, *self.levels, *self._names("labels")])

    def wanted(self) -> list[tuple[str, str]]:
        """Return (option, column) for every column that a table must have."""
        every = [("data.x", name) for name in self.x or ()] + self.others() + [("data.kinds", name) for name in self.kinds]
        return [(option, name) for option, name in every if not (self.fitted and option in ("data.labels", "data.kinds"))]

    def require(self, names: Sequence[str], label: str) -> None:
        """Raise a DataError if the table lacks a column of this layout; rows other than those of the fit need no labels."""
        for option, name in self.wanted():
            if name not in names:
                where = "" if self.fitted else f" {option}:"
                raise DataError(f"{label}:{where} there is no column {name!r}{nearest(name, names)}")

    def tree(self) -> dict[str, Any]:
        """Return the layout as lists and texts for a record; empty entries are left out."""
        plain: dict[str, Any] = {
            "x": None if self.x is None else list(self.x),
            "covariates": list(self.covariates),
            "exposure": self.exposure,
            "labels": self.labels,
            "kinds": dict(self.kinds),
            "levels": {name: list(levels) for name, levels in self.levels.items()},
        }
        read = {"header": self.header, "delimiter": self.delimiter}
        return {k: v for k, v in plain.items() if v} | {k: v for k, v in read.items() if v is not None}

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Layout:
        """Read a layout from a record."""
        levels = {name: tuple(found) for name, found in tree.get("levels", {}).items()}
        x = None if tree.get("x") is None else tuple(tree["x"])
        covariates, kinds = tuple(tree.get("covariates", ())), dict(tree.get("kinds", {}))
        read = tree.get("header"), tree.get("delimiter")
        return cls(x, covariates, tree.get("exposure"), tree.get("labels"), kinds, levels, *read, fitted=True)


def of_array(name: str, values: np.ndarray, label: str) -> Cells:
    """Make cells of one column of an array; a DataError if it holds neither numbers nor text."""
    if values.dtype.kind == "U":
        return Cells.of_text(name, [None if t.strip() in MISSING else t.strip() for t in values.tolist()])
    if values.dtype.kind not in "buif":
        raise DataError(f"{label}: {name!r} holds {values.dtype}, neither numbers nor text; convert it")
    return Cells(name, values)


def describe_columns(
    x: np.ndarray,
    names: Sequence[str],
    kinds: Mapping[str, Kind] = {},
    categories: Mapping[str, Sequence[str]] = {},
    *,
    name: str = "data",
) -> tuple[Column, ...]:
    """Return the name, kind and number of levels of each column of a table.

    A declared kind is checked. Otherwise a column of only 0 and 1 is binary, other whole numbers from 0 are a count, other
    numbers above 0 are positive, and the rest is real. Proportions, ordinal and categorical numbers must be declared.

    Args:
        x: (N, D), NaN where missing.
        names: D names.
        kinds: column -> declared kind.
        categories: column -> the texts behind its codes.
        name: name of the table in messages.

    Raises:
        DataError: a value is not of the declared kind; names the first place.
    """
    for column in kinds:
        if column not in names:
            raise DataError(f"{name}: data.kinds: there is no column {column!r}{nearest(column, names)}")
    low, high = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    integral = np.ones(len(names), dtype=bool)
    for start, part in rows_of(x):
        missing = np.isnan(part) if part.dtype.kind == "f" else np.zeros(part.shape, dtype=bool)
        low = np.minimum(low, np.where(missing, np.inf, part).min(0))
        high = np.maximum(high, np.where(missing, -np.inf, part).max(0))
        integral &= (missing | (part == np.floor(part))).all(0)
        for j, column in enumerate(names):
            if column in kinds:
                bad = ~missing[:, j] & ~_allowed(part[:, j], kinds[column])
                if bad.any():
                    row = int(bad.argmax())
                    raise DataError(
                        f"{name}: column {column!r} is declared {kinds[column]}, found {part[row, j]:g} at row {start + row}; "
                        "correct it, or declare another kind in data.kinds"
                    )
    found = []
    for j, column in enumerate(names):
        guessed: Kind = "real"
        if high[j] >= low[j]:
            if integral[j] and low[j] >= 0:
                guessed = "binary" if high[j] <= 1 else "count"
            elif low[j] > 0:
                guessed = "positive"
        kind = kinds.get(column, guessed)
        levels = 0
        if kind == "binary":
            levels = 2
        elif kind in CODED:
            levels = len(categories.get(column, ())) or int(max(high[j], 0)) + 1
        found.append(Column(column, kind, levels))
    return tuple(found)


def _allowed(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Say which values a column of this kind may hold."""
    if kind == "real":
        return np.ones(len(values), dtype=bool)
    if kind == "positive":
        return cast(np.ndarray, values > 0)
    if kind == "proportion":
        return (values > 0) & (values < 1)
    if kind == "binary":
        return (values == 0) | (values == 1)
    return (values >= 0) & (values == np.floor(values))


def whole(values: np.ndarray) -> np.ndarray:
    """Return codes as int64 if none is missing, else unchanged."""
    return values if np.isnan(values).any() else values.astype(np.int64)


def _by_size(text: str) -> tuple[int, float, str]:
    """Sort key: numbers by size, then other texts in alphabetical order."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
