"""Tables: roles of the columns, codes for text, and detection of text that was misread.

A column arrives as `Cells`: numbers with NaN for missing; text as codes into its sorted levels. A `Layout` gives the roles of
the columns; the layout in a `Dataset` also keeps the levels, so that other rows get the same codes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from elbowroom.data.chunks import rows_of
from elbowroom.data.columns import CODED, DATE, FEW_LEVELS, MOST_LEVELS, Cells, Layout, of_array
from elbowroom.data.dataset import Dataset
from elbowroom.errors import DataError

WHOLE = 2.0**53  # beyond it a float holds no odd numbers, and int64 not all
SHOWN = 24  # columns that a listing names
FEW_ROWS = 10  # so few may be 0, 1, 2, ... by chance
LEVELS = 4  # texts of a column that it names
_COMMA = re.compile(r"[+-]?(\d+|\d{1,3}([., ']\d{3})+),\d+([eE][+-]?\d+)?|[+-]?\d{1,3}(,\d{3})+(\.\d+)?")
_NUMBER = r"[+-]?(\d+|\d{1,3}([., ']\d{3})+)([.,]\d+)?([eE][+-]?\d+)?"
_TIME = re.compile(r"\d{1,2}:\d{2}(:\d{2}([.,]\d+)?)?\s*([aApP]\.?[mM]\.?)?")
_PERCENT = re.compile(rf"{_NUMBER}\s*%")
_MONEY = re.compile(rf"[+-]?(\(?[$€£¥]\s*{_NUMBER}\)?|{_NUMBER}\s*[$€£¥])")
_UNIT = re.compile(rf"{_NUMBER}\s*([a-zA-Zµμ°Ω]{{1,6}}([/²³^*·-]\S{{0,8}})?)")
_MISREAD = (
    (_TIME, "times", "convert them to numbers, such as hours"),
    (DATE, "dates", "convert them to numbers, such as days since the first one"),
    (_COMMA, "numbers with commas", "write them with a decimal point and without thousands separators"),
    (_PERCENT, "percentages", "write them without the %, for example as proportions"),
    (_MONEY, "amounts of money", "write them without the currency"),
    (_UNIT, "numbers with units", "write the unit into the name of the column"),
)
"""Text that should be numbers: pattern, description, remedy."""


def assemble(cells: Sequence[Cells], layout: Layout, label: str) -> Dataset:
    """Make a data set of the columns of a table.

    Raises:
        DataError: a column is missing, or cannot have its declared role or kind; names the column.
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


def unnamed(x: np.ndarray, layout: Layout, label: str) -> Dataset:
    """Make a data set of an array without column names; a DataError if the layout chooses columns by name."""
    chosen = [("data.x", name) for name in layout.x or () if not layout.fitted]
    needed = [(option, name) for option, name in layout.others() if not (layout.fitted and option == "data.labels")]
    if chosen or needed:
        option, name = (chosen + needed)[0]
        raise DataError(
            f"{label}: {option}: an array has no column {name!r}; use a table (.csv, .parquet or a frame) or an .npz"
        )
    names = layout.x if layout.x is not None and x.shape[1:] == (len(layout.x),) else None
    categories = {name: layout.levels[name] for name in names or () if name in layout.levels}
    return Dataset(x, label, columns=names, kinds=layout.kinds, categories=categories, layout=replace(layout, fitted=True))


def beside(x: np.ndarray, found: Mapping[str, np.ndarray], layout: Layout, label: str) -> Dataset:
    """Make a data set of named arrays.

    Args:
        x: the data.
        found: name -> the covariates (N,) or (N, C), exposures (N,) and labels (N,) that the layout names.
        layout: their roles.
        label: name of the data in messages.

    Raises:
        DataError: an array has the wrong shape or type; names the array.
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
    dataset = unnamed(x, replace(layout, covariates=(), exposure=None, labels=None, kinds=kinds), label)
    return _beside(replace(dataset, layout=resolved), cells, roles)


def _refuse_misread(cells: Cells, layout: Layout, label: str) -> None:
    """Raise a DataError for a text column with mostly dates or numbers with commas, unless its kind was declared."""
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
    """Return a column of x or a covariate with codes, those of the layout if it has any."""
    name, kind = cells.name, layout.kinds.get(cells.name)
    if layout.fitted and cells.levels is not None and name not in layout.levels:
        raise DataError(
            f"{label}: column {name!r} holds text, such as {cells.levels[0]!r}, where the fit had numbers; give it numbers"
        )
    if cells.levels is None and name not in layout.levels and (kind not in CODED or layout.fitted):
        return cells  # the fit had numbers as codes, and these are the same codes: coding them anew could change them
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
        cure = "leave it out of data.covariates" if one_hot else "leave it out: name the columns to use in data.x"
        each_another = kind is None and n == np.isfinite(cells.values).sum() >= FEW_ROWS
        if n > min(MOST_LEVELS, limit) or each_another:
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
        if numeric and (found.values == np.floor(found.values)).all() and (np.abs(found.values) < WHOLE).all():
            labels = found.values.astype(np.int64)
        else:
            labels = np.array([text or "missing" for text in found.texts()])
    if labels is not None and len(labels) != n:
        raise DataError(f"{label}: {len(labels)} labels for {n} rows; both need the same number")
    covariates = np.stack(columns, 1) if columns else None
    return replace(dataset, covariates=covariates, covariate_names=tuple(names), exposure=exposure, labels=labels)


def listing(data: Dataset) -> list[list[str]]:
    """Return name, kind, values and holes of the columns of x, as text; the last line sums up what is beyond SHOWN columns.

    Empty for images and sequences, and for data on disk that are too large to be read at once.
    """
    columns = None if data.mapped else data.described
    if columns is None:
        return []
    low, high, holes = _spread(data)
    lines = []
    for i, column in enumerate(columns[:SHOWN]):
        texts = data.categories.get(column.name)
        if texts is not None:
            values = f"{len(texts):,} levels: {', '.join(texts[:LEVELS])}{', ...' if len(texts) > LEVELS else ''}"
        else:
            values = f"{low[i]:.6g} to {high[i]:.6g}"
        lines.append([column.name, column.kind, values, f"{holes[i]:,}"])
    if rest := columns[SHOWN:]:
        kinds = ", ".join(sorted({column.kind for column in rest}))
        values = f"{np.nanmin(low[SHOWN:]):.6g} to {np.nanmax(high[SHOWN:]):.6g}"
        lines.append([f"and {len(rest):,} more", kinds, values, f"{holes[SHOWN:].sum():,}"])
    return lines


def row_numbers(data: Dataset) -> list[str]:
    """Return the named columns of x that count the rows, from 0 or 1."""
    if data.columns is None or len(data.event_shape) != 1 or len(data) < FEW_ROWS or data.mapped:
        return []
    first = data.x[0]
    counts = (first == 0) | (first == 1)
    for start, part in rows_of(data.x):
        counts &= (part == first + np.arange(start, start + len(part))[:, None]).all(0)
    return [name for name, counted in zip(data.columns, counts, strict=True) if counted]


def constant(data: Dataset) -> list[str]:
    """Return the named columns of x that hold a single value in all rows where they are observed."""
    if data.columns is None or len(data.event_shape) != 1:
        return []
    low, high, _ = _spread(data)
    return [name for name, one, other in zip(data.columns, low, high, strict=True) if one == other]


def _spread(data: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the smallest and largest value and the number of holes of every column, each (D,)."""
    width = data.event_shape[0]
    low, high, holes = np.full(width, np.inf), np.full(width, -np.inf), np.zeros(width, dtype=np.int64)
    for _, part in rows_of(data.x):
        low, high = np.fmin(low, np.fmin.reduce(part, 0)), np.fmax(high, np.fmax.reduce(part, 0))
        holes += np.isnan(part).sum(0) if part.dtype.kind == "f" else 0
    return low, high, holes
