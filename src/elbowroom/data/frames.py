"""Tables from frames and arrays in Python, and from parquet and CSV files."""

from __future__ import annotations

import datetime
import io
import warnings
from collections.abc import Mapping
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elbowroom.data import delimited
from elbowroom.data.columns import MISSING, Cells, Layout
from elbowroom.data.dataset import DEFAULT_SPLIT, Dataset, Fractions, Names, Source
from elbowroom.data.delimited import is_number
from elbowroom.data.tables import assemble, unnamed
from elbowroom.errors import DataError
from elbowroom.models.columns import Kind

if TYPE_CHECKING:
    import pandas as pd

_OTHER: tuple[tuple[Any, str, str], ...] = (
    (datetime.date, "dates", "convert them to numbers, such as days since the first one"),
    ((datetime.timedelta, datetime.time, np.timedelta64), "durations", "convert them to numbers, such as seconds"),
    ((list, tuple, set, np.ndarray), "lists", "make a column of each of their numbers"),
    (dict, "records", "make a column of each of their fields"),
    (bytes, "bytes", "decode them to text"),
    ((complex, np.complexfloating), "complex numbers", "make columns of their real and imaginary parts"),
)
"""Cells that are neither numbers nor text: their types, what they are called, and the remedy."""

AS_IT_IS = Layout()
"""The layout in which all columns are x."""


class Memory(Source):
    """Rows handed over from Python: er.Experiment.load(spec, data=frame_or_array). A spec alone cannot bring them.

    Missing are NaN, None, <NA> and masked entries. Columns of text or categories become codes.

    Args:
        x: the columns of a frame to model; all that have no other role by default.
        covariates: columns to condition on; text and categories become one-hot.
        exposure: the column of positive numbers that rates of counts are multiplied by.
        labels: the column that colours figures; numbers or text.
        kinds: what columns hold where their values do not show it: column -> real, positive, proportion, count, binary,
            ordinal or categorical.
        split: fractions of train, validation and test.
    """

    def __init__(
        self,
        *,
        x: Names | None = None,
        covariates: Names | None = None,
        exposure: str | None = None,
        labels: str | None = None,
        kinds: Mapping[str, Kind] | None = None,
        split: Fractions = DEFAULT_SPLIT,
    ) -> None:
        self.layout = Layout.chosen(x, covariates, exposure, labels, kinds)
        self.split = split

    def missing(self) -> str | None:
        """Say that the rows must be passed from Python."""
        return "the rows come from Python"

    def load(self) -> Dataset:
        """Raise an error: the rows are not in a file."""
        raise DataError(
            "data: these rows came from Python and are in no file; hand them over again: er.Experiment.load(spec, data=...) "
            "or er.Run.load(run, data=...); from the command line name rows, DATA (and --calibration FILE of score)"
        )

    def hand_over(self, given: Any) -> Dataset:
        """Make a data set of rows from Python, by the options of this source."""
        return from_python(given, layout=self.layout)


def from_python(given: Any, name: str = "data", *, layout: Layout = AS_IT_IS) -> Dataset:
    """Make a data set of a NumPy array or a pandas DataFrame, without a copy where possible.

    Args:
        given: the array, (N, *event), or the frame.
        name: name of the data in messages.
        layout: roles of the columns.

    Raises:
        DataError: `given` is neither, or a column holds neither numbers nor text; names the column.
    """
    if isinstance(given, np.ma.MaskedArray):
        mask = np.ma.getmaskarray(given)
        given = given.data
        if mask.any() and given.dtype.kind in "buif":  # arrays of other types are refused below
            given = np.where(mask, np.nan, given.astype(given.dtype if given.dtype.kind == "f" else np.float64))
    if isinstance(given, np.ndarray):
        return unnamed(given, layout, name)
    import pandas as pd

    if isinstance(given, pd.DataFrame):
        return from_frame(given, name, layout)
    kind = f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
    if hasattr(given, "toarray"):
        raise DataError(f"{name}: this is a sparse matrix ({kind}); hand over an array: x.toarray()")
    raise DataError(f"{name}: must be a NumPy array or a pandas DataFrame, got {kind}; convert it with np.asarray(...)")


def from_frame(frame: pd.DataFrame, name: str, layout: Layout = AS_IT_IS) -> Dataset:
    """Make a data set of a frame; the names of the columns are kept.

    Raises:
        DataError: a name appears twice, or a column holds neither numbers nor text; names the column.
    """
    columns = [str(column) for column in frame.columns]
    if repeated := [column for column in columns if columns.count(column) > 1]:
        raise DataError(f"{name}: the column name {repeated[0]!r} appears twice")
    if frame.shape[1] == 0 or len(frame) == 0:
        raise DataError(f"{name}: empty, shape {frame.shape}; at least 3 rows of one number are needed")
    layout.require(columns, name)
    used = {column for _, column in layout.others()} | set(layout.x or columns) | set(layout.kinds)
    parts = [(i, column) for i, column in enumerate(columns) if column in used]
    return assemble([_cells(frame.iloc[:, i], column, name) for i, column in parts], layout, name)


def _cells(column: pd.Series[Any], label: str, name: str) -> Cells:
    """Return one column as numbers or as codes."""
    import pandas as pd

    dtype = column.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        texts = [None if pd.isna(v) else str(v) for v in column]
        return Cells.of_text(label, texts, map(str, dtype.categories) if dtype.ordered else None)
    if pd.api.types.is_object_dtype(dtype) or isinstance(dtype, pd.StringDtype):
        known = [v for v in column if not _is_missing(v)]
        if known and all(isinstance(v, str) for v in known):
            return Cells.of_text(label, [None if _is_missing(v) else v.strip() for v in column])
        if all(isinstance(v, bool | int | float | np.number | np.bool_ | Decimal) for v in known):
            return Cells(label, np.array([np.nan if _is_missing(v) else float(v) for v in column]))
        words = [v for v in known if isinstance(v, str)]
        if words and all(isinstance(v, str | bool | int | float | np.number | np.bool_ | Decimal) for v in known):
            raise DataError(
                f"{name}: column {label!r} holds both numbers and text, such as {words[0][:40]!r}; "
                "make all of its cells one or the other, or leave it out of data.x"
            )
    numeric = pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype)
    if not numeric or pd.api.types.is_complex_dtype(dtype):
        first = next((v for v in column if not isinstance(v, str) and not _is_missing(v)), column.iloc[0])
        what, cure = next(
            ((what, cure) for kinds, what, cure in _OTHER if isinstance(first, kinds)), (f"{dtype}", "convert it to numbers")
        )
        raise DataError(
            f"{name}: column {label!r} holds {what}, such as {str(first)[:40]!r}, neither numbers nor text; "
            f"{cure}, or leave it out of data.x"
        )
    if not isinstance(dtype, np.dtype):
        if column.isna().any():
            return Cells(label, column.to_numpy(dtype="float64", na_value=np.nan))
        kind = "float64" if pd.api.types.is_float_dtype(dtype) else "int64" if not pd.api.types.is_bool_dtype(dtype) else "bool"
        return Cells(label, column.to_numpy(dtype=kind))
    return Cells(label, column.to_numpy())


def _is_missing(value: Any) -> bool:
    """Say whether a cell of a frame is None, NaN, <NA> or a text in `MISSING`."""
    import pandas as pd

    if isinstance(value, str):
        return value.strip() in MISSING
    return value is None or value is pd.NA or (isinstance(value, float | Decimal) and value != value)


def read_parquet(path: Path, label: str, layout: Layout = AS_IT_IS) -> Dataset:
    """Read a parquet file of numbers and text; `label` is its name in messages.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged or holds columns of other types.
    """
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(f"{label}: parquet files need pyarrow; install it with: pip install 'elbowroom[parquet]'") from None
    try:
        with path.open("rb") as handle:
            frame = parquet.read_table(handle).to_pandas()
    except FileNotFoundError:
        raise
    except Exception as error:  # pyarrow's errors share no base class
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:80]
        raise DataError(f"{label}: damaged or no parquet file ({reason}); write it again") from None
    return from_frame(frame, label, layout)


def read_csv(path: Path, label: str, layout: Layout = AS_IT_IS) -> Dataset:
    """Read the cells of a CSV file; see `delimited`. Without a header the columns are called 0, 1, ...

    Args:
        path: the file.
        label: its name in messages.
        layout: roles of the columns.

    Raises:
        DataError: delimiter, header or index can be understood in two ways; a line has another number of cells (lines are
            counted from 1); or a column of numbers contains text.
    """
    table = delimited.read(path, label, layout)
    columns, header = table.columns, table.names is not None
    if layout.fitted and layout.x is not None and not header and len(layout.x) == len(columns):
        columns = layout.x  # columns are named by their positions
    x = _numbers(table)
    if x is not None:
        found = [Cells(name, x[:, i + table.index]) for i, name in enumerate(columns)]
    else:
        rows, lines = table.rows()
        found = [
            _column(name, [row[i + table.index] for row in rows], label, lines, name in layout.textual)
            for i, name in enumerate(columns)
        ]
    dataset = assemble(found, layout, label)
    named = replace(dataset.layout or layout, header=header, delimiter=table.delimiter)
    if header or layout.x is not None:
        return replace(dataset, layout=named, notes=table.notes())
    return replace(dataset, columns=None, layout=replace(named, x=None))


def csv_frame(path: Path, label: str, layout: Layout = AS_IT_IS) -> pd.DataFrame:
    """Return the cells of a CSV file, or of a .tsv, as a frame: numbers where all are numbers, else text."""
    import pandas as pd

    table = delimited.read(path, label, layout)
    rows, lines = table.rows()
    cells = [
        _column(name, [row[i + table.index] for row in rows], label, lines, name in layout.textual)
        for i, name in enumerate(table.columns)
    ]
    return pd.DataFrame({one.name: one.values if one.levels is None else one.texts() for one in cells})


def _numbers(table: delimited.Table) -> np.ndarray | None:
    """Read a table that holds only numbers, fast; None for other tables."""
    how: dict[str, Any] = {"delimiter": table.delimiter, "skiprows": table.skipped, "quotechar": '"'}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = np.loadtxt(io.StringIO(table.text), ndmin=2, comments=None, **how)
    except (ValueError, UserWarning, OverflowError):
        return None
    return x if x.shape[1] == table.width else None


def _column(name: str, cells: list[str], label: str, lines: list[int], textual: bool) -> Cells:
    """Return a column as numbers if all cells are numbers; as text if none is, or if `textual` allows both."""
    known = [cell not in MISSING for cell in cells]
    numeric = [is_known and is_number(cell) for cell, is_known in zip(cells, known, strict=True)]
    if numeric == known:
        return Cells(name, np.array([float(c) if k else np.nan for c, k in zip(cells, known, strict=True)]))
    if any(numeric) and not textual:
        at = next(i for i, cell in enumerate(cells) if known[i] and not numeric[i])
        raise DataError(
            f"{label}: line {lines[at]}, column {name!r}: the text {cells[at][:40]!r} is no number, and other cells of the "
            "column are; correct it, or declare the column categorical in data.kinds"
        )
    return Cells.of_text(name, [cell if k else None for cell, k in zip(cells, known, strict=True)])
