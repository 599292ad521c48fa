"""Tables: which columns are x, which stand beside it, how text becomes numbers, and what kind of values a column holds.

A column arrives as `Cells`: numbers with NaN for what is missing; text as codes into its sorted levels. A `Layout` says which
columns are what; the one that a `Dataset` keeps also holds the levels, so that other rows get the same codes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np

from elbowroom.data.dataset import Dataset, rows_of
from elbowroom.errors import DataError, nearest
from elbowroom.models.columns import Column, Kind

MISSING = frozenset({"", "nan", "NaN", "NAN", "NA", "<NA>", "N/A", "null", "NULL", "?"})
"""Cells of a CSV file that say that a value is missing."""

MOST_LEVELS = 1000
FEW_LEVELS = 50
"""So many different texts are never taken for a name that hardly ever repeats."""

CODED = ("categorical", "ordinal")

_DATE = re.compile(
    r"(\d{4}[-/.]\d{1,2}([-/.]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.](\d{4}|\d{2}))"
    r"([T ]\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?\s*(Z|[+-]\d{2}:?\d{2})?)?"
)
_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}([., ']\d{3})+),\d+([eE][+-]?\d+)?|[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_MISREAD = (
    (_DATE, "dates", "convert them to numbers, such as days since the first one"),
    (_COMMA, "numbers with commas", "write them with a decimal point and without thousands separators"),
)
"""Text that is no category by nature: what it looks like, and the cure."""


@dataclass(frozen=True, eq=False)
class Cells:
    """One column as it was read.

    Attributes:
        name: of the column.
        values: numbers, (N,), NaN where missing; of text the codes.
        levels: the texts that codes 0, 1, ... stand for; None for numbers.
        ordered: the levels have an order of their own.
    """

    name: str
    values: np.ndarray
    levels: tuple[str, ...] | None = None
    ordered: bool = False

    @classmethod
    def of_text(cls, name: str, texts: Sequence[str | None], levels: Iterable[str] | None = None) -> Cells:
        """Take texts, None for missing; levels are sorted, numbers by size, unless they are given in order."""
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
    """Which columns of a table are what.

    Attributes:
        x: columns to model; None for all that have no other role.
        covariates: columns to condition on.
        exposure: the column of exposures.
        labels: the column of labels.
        kinds: column -> kind.
        levels: column -> the texts behind its codes, of the columns that are coded.
        fitted: it comes from data that were read: other rows must have the same columns, but for the labels.
    """

    x: tuple[str, ...] | None = None
    covariates: tuple[str, ...] = ()
    exposure: str | None = None
    labels: str | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    levels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    fitted: bool = False

    @classmethod
    def chosen(
        cls,
        x: Sequence[str] | None,
        covariates: Sequence[str] | None,
        exposure: str | None,
        labels: str | None,
        kinds: Mapping[str, Kind] | None,
    ) -> Layout:
        """Take the user's choice, as the options of a data set have it.

        Raises:
            ValueError: a column is named twice or has two roles.
        """
        found = cls(None if x is None else tuple(x), tuple(covariates or ()), exposure, labels, dict(kinds or {}))
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
        """Return (option, column) of everything beside x."""
        return [(f"data.{option}", name) for option in ("covariates", "exposure", "labels") for name in self._names(option)]

    @property
    def textual(self) -> frozenset[str]:
        """The columns in which numbers and text may stand together."""
        coded = [name for name, kind in self.kinds.items() if kind in CODED]
        return frozenset([*coded, *self.levels, *self._names("labels")])

    def require(self, names: Sequence[str], label: str) -> None:
        """Refuse a table that lacks a column; of other rows than those of a fit, labels may be left out.

        Raises:
            DataError: names the column.
        """
        wanted = [("data.x", name) for name in self.x or ()] + self.others() + [("data.kinds", name) for name in self.kinds]
        for option, name in wanted:
            if name not in names and not (self.fitted and option in ("data.labels", "data.kinds")):
                where = "" if self.fitted else f" {option}:"
                raise DataError(f"{label}:{where} there is no column {name!r}{nearest(name, names)}")

    def tree(self) -> dict[str, Any]:
        """Return it as a record can hold it: lists and texts; what is empty is left out."""
        plain: dict[str, Any] = {
            "x": None if self.x is None else list(self.x),
            "covariates": list(self.covariates),
            "exposure": self.exposure,
            "labels": self.labels,
            "kinds": dict(self.kinds),
            "levels": {name: list(levels) for name, levels in self.levels.items()},
        }
        return {key: value for key, value in plain.items() if value}

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Layout:
        """Read it from a record."""
        levels = {name: tuple(found) for name, found in tree.get("levels", {}).items()}
        x = None if tree.get("x") is None else tuple(tree["x"])
        covariates, kinds = tuple(tree.get("covariates", ())), dict(tree.get("kinds", {}))
        return cls(x, covariates, tree.get("exposure"), tree.get("labels"), kinds, levels, fitted=True)

    def unnamed(self, x: np.ndarray, label: str) -> Dataset:
        """Take an array whose columns have no names.

        Raises:
            DataError: columns were chosen by name.
        """
        chosen = [("data.x", name) for name in self.x or () if not self.fitted]
        needed = [(option, name) for option, name in self.others() if not (self.fitted and option == "data.labels")]
        if chosen or needed:
            option, name = (chosen + needed)[0]
            raise DataError(
                f"{label}: {option}: an array has no column {name!r}; use a table (.csv, .parquet or a frame) or an .npz"
            )
        names = self.x if self.x is not None and x.shape[1:] == (len(self.x),) else None
        categories = {name: self.levels[name] for name in names or () if name in self.levels}
        return Dataset(x, label, columns=names, kinds=self.kinds, categories=categories, layout=replace(self, fitted=True))


def assemble(cells: Sequence[Cells], layout: Layout, label: str) -> Dataset:
    """Make a data set of the columns of a table.

    Args:
        cells: the columns, all of one length.
        layout: which are what.
        label: what messages call the table.

    Raises:
        DataError: a column is not there, or cannot be what it should be; names it.
    """
    by_name = {c.name: c for c in cells}
    layout.require([c.name for c in cells], label)
    taken = {name for _, name in layout.others()}
    names = layout.x if layout.x is not None else tuple(c.name for c in cells if c.name not in taken)
    if not names:
        raise DataError(f"{label}: data.x: no column is left for x; name some")
    for name in (*names, *layout.covariates):
        _refuse_misread(by_name[name], layout, label)
    coded = {name: _coded(by_name[name], layout, label, one_hot=False) for name in names}
    coded |= {name: _coded(by_name[name], layout, label, one_hot=True) for name in layout.covariates}
    parts = [coded[name].values for name in names]
    x = np.empty((len(parts[0]), len(parts)), dtype=np.result_type(*parts))
    for i, part in enumerate(parts):
        x[:, i] = part
    kinds = dict(layout.kinds)
    for name in names:
        if coded[name].levels is not None:
            kinds.setdefault(name, "ordinal" if by_name[name].ordered else "categorical")
    levels = {name: c.levels for name, c in coded.items() if c.levels is not None}
    resolved = replace(layout, x=names, kinds=kinds, levels={**layout.levels, **levels}, fitted=True)
    dataset = Dataset(
        x,
        label,
        columns=names,
        kinds={name: kind for name, kind in kinds.items() if name in names},
        categories={name: found for name, found in levels.items() if name in names},
        layout=resolved,
    )
    others = {name: by_name[name] for _, name in layout.others() if name in by_name}
    return _beside(dataset, {**others, **{name: coded[name] for name in layout.covariates}}, layout)


def beside(x: np.ndarray, found: Mapping[str, np.ndarray], layout: Layout, label: str) -> Dataset:
    """Make a data set of named arrays.

    Args:
        x: the data.
        found: name -> the covariates (N,) or (N, C), exposures (N,) and labels (N,) that the layout names.
        layout: which are what.
        label: what messages call them.

    Raises:
        DataError: an array has another shape, or holds what it should not; names it.
    """
    if layout.x is not None and not layout.fitted:
        raise DataError(f"{label}: data.x: an array has no columns with names; choose the array with data.key")
    cells: dict[str, Cells] = {}
    names: list[str] = []
    for option, name in layout.others():
        array = found[name]
        columns = array.reshape(len(array), -1) if array.ndim in (1, 2) else None
        if columns is None or (option != "data.covariates" and columns.shape[1] != 1):
            raise DataError(f"{label}: {option}: {name!r} has shape {array.shape}; one number for each row is needed")
        width = columns.shape[1]
        parts = [name] if array.ndim == 1 or option != "data.covariates" else [f"{name}.{i}" for i in range(width)]
        names += parts if option == "data.covariates" else []
        for i, part in enumerate(parts):
            cells[part] = of_array(part, columns[:, i], label)
    roles = replace(layout, covariates=tuple(names))
    cells |= {name: _coded(cells[name], roles, label, one_hot=True) for name in names}
    levels = {name: cells[name].levels for name in names}
    kept = {name: found for name, found in levels.items() if found is not None}
    resolved = replace(layout, levels={**layout.levels, **kept}, fitted=True)
    kinds = {name: kind for name, kind in layout.kinds.items() if name not in names}
    dataset = replace(layout, covariates=(), exposure=None, labels=None, kinds=kinds).unnamed(x, label)
    return _beside(replace(dataset, layout=resolved), cells, roles)


def of_array(name: str, values: np.ndarray, label: str) -> Cells:
    """Take one column of numbers or text from an array.

    Raises:
        DataError: it holds neither.
    """
    if values.dtype.kind == "U":
        return Cells.of_text(name, [None if t.strip() in MISSING else t.strip() for t in values.tolist()])
    if values.dtype.kind not in "buif":
        raise DataError(f"{label}: {name!r} holds {values.dtype}, neither numbers nor text; convert it")
    return Cells(name, values)


def _refuse_misread(cells: Cells, layout: Layout, label: str) -> None:
    """Refuse a column of text most of whose cells are dates, or numbers with commas, unless its kind was declared.

    Raises:
        DataError: names the column, a cell and the cure.
    """
    name = cells.name
    if cells.levels is None or cells.ordered or name in layout.kinds or name in layout.levels:
        return
    codes = cells.values[np.isfinite(cells.values)].astype(np.int64)
    counts = np.bincount(codes, minlength=len(cells.levels))
    for pattern, what, cure in _MISREAD:
        found = [i for i, level in enumerate(cells.levels) if pattern.fullmatch(level.strip())]
        if found and 2 * counts[found].sum() > counts.sum():
            raise DataError(
                f"{label}: column {name!r} holds {what} as text, such as {cells.levels[found[0]]!r}; {cure}, "
                f"or keep them as categories: data.kinds: {{{name}: categorical}}"
            )


def _coded(cells: Cells, layout: Layout, label: str, *, one_hot: bool) -> Cells:
    """Give a column of x or a covariate its codes, those of the layout where it has any."""
    name, kind = cells.name, layout.kinds.get(cells.name)
    if layout.fitted and cells.levels is not None and name not in layout.levels:
        raise DataError(
            f"{label}: column {name!r} holds text, such as {cells.levels[0]!r}, where the fit had numbers; give it numbers"
        )
    if cells.levels is None and name not in layout.levels and (kind not in CODED or layout.fitted):
        return cells  # of a fit to codes without texts, numbers are these codes: of few rows the texts would get other ones
    if kind is not None and kind not in (*CODED, "binary"):
        raise DataError(
            f"{label}: data.kinds: column {name!r} is declared {kind} and holds text, such as "
            f"{cells.levels[0] if cells.levels else ''!r}; declare it categorical or ordinal"
        )
    if cells.levels is None:
        cells = Cells.of_text(name, cells.texts())
    known = layout.levels.get(name)
    assert cells.levels is not None
    if known is None:
        n, limit = len(cells.levels), max(FEW_LEVELS, len(cells.values) // 2)
        if n > min(MOST_LEVELS, limit):
            cure = "leave it out of data.covariates" if one_hot else "leave it out: name the columns to use in data.x"
            raise DataError(f"{label}: column {name!r} holds {n:,} different values in {len(cells.values):,} rows; {cure}")
        return cells
    texts = cells.texts()
    for row, text in enumerate(texts):
        if text is not None and text not in known:
            raise DataError(
                f"{label}: column {name!r}: {text!r} at row {row} was not in the data of the fit (there: "
                f"{', '.join(known[:10])}{', ...' if len(known) > 10 else ''}); remove or correct such rows"
            )
    return Cells.of_text(name, texts, known)


def _beside(dataset: Dataset, cells: Mapping[str, Cells], layout: Layout) -> Dataset:
    """Add covariates, exposure and labels."""
    label, n = dataset.name, len(dataset)
    columns: list[np.ndarray] = []
    names: list[str] = []
    for name in layout.covariates:
        found = cells[name]
        values = found.values.astype(np.float64)
        if np.isnan(values).any():
            row = int(np.isnan(values).argmax())
            raise DataError(f"{label}: covariate {name!r} is missing at row {row}; fill it in or remove the row")
        if found.levels is None:
            columns, names = [*columns, values], [*names, name]
        else:
            columns += [(values == code).astype(np.float64) for code in range(len(found.levels))]
            names += [f"{name}={level}" for level in found.levels]
    exposure = None
    if layout.exposure is not None:
        found = cells[layout.exposure]
        if found.levels is not None:
            raise DataError(
                f"{label}: exposure {found.name!r} holds text, such as {found.levels[0]!r}; give it numbers above 0"
            )
        exposure = found.values.astype(np.float64)
    labels = None
    if layout.labels is not None and layout.labels in cells:
        found = cells[layout.labels]
        numeric = found.levels is None and not np.isnan(found.values).any()
        if numeric and (found.values == np.floor(found.values)).all():
            labels = found.values.astype(np.int64)
        else:
            labels = np.array([text or "missing" for text in found.texts()])
    if labels is not None and len(labels) != n:
        raise DataError(f"{label}: {len(labels)} labels for {n} rows; both need the same number")
    covariates = np.stack(columns, 1) if columns else None
    return replace(dataset, covariates=covariates, covariate_names=tuple(names), exposure=exposure, labels=labels)


def describe_columns(
    x: np.ndarray,
    names: Sequence[str],
    kinds: Mapping[str, Kind] = {},
    categories: Mapping[str, Sequence[str]] = {},
    *,
    name: str = "data",
) -> tuple[Column, ...]:
    """Say what kind of values each column of a table holds.

    A declared kind is checked. Else only 0 and 1 are binary, other whole numbers from 0 a count, other numbers above 0
    positive, and the rest real. Proportions, ordinal and categorical numbers look like these, so they must be declared.

    Args:
        x: (N, D), NaN where missing.
        names: D names.
        kinds: column -> declared kind.
        categories: column -> the texts behind its codes.
        name: what messages call the table.

    Raises:
        DataError: values are not of the declared kind; names the first place.
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


def constant(data: Dataset) -> list[str]:
    """Return the columns of x, where these have names, that hold one value in all rows where they are not missing."""
    if data.columns is None or len(data.event_shape) != 1:
        return []
    low, high = np.full(len(data.columns), np.inf), np.full(len(data.columns), -np.inf)
    for _, part in rows_of(data.x):
        low, high = np.fmin(low, np.fmin.reduce(part, 0)), np.fmax(high, np.fmax.reduce(part, 0))
    return [name for name, one, other in zip(data.columns, low, high, strict=True) if one == other]


def _allowed(values: np.ndarray, kind: Kind) -> np.ndarray:
    """Say which values a column of a kind may hold."""
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
    """Return codes as int64 where none is missing, else as they are."""
    return values if np.isnan(values).any() else values.astype(np.int64)


def _by_size(text: str) -> tuple[int, float, str]:
    """Order numbers by size, before all other texts, which are in alphabetical order."""
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text
