"""Tables: frames and arrays from Python, parquet and CSV files, as rows of numbers with the names of their columns."""

from __future__ import annotations

import csv
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from elbowroom.data import DEFAULT_SPLIT, Dataset, Fractions, Source
from elbowroom.errors import DataError

if TYPE_CHECKING:
    import pandas as pd


class Memory(Source):
    """Rows handed over from Python: er.Experiment.load(spec, data=frame_or_array). A spec alone cannot bring them.

    Args:
        split: fractions of train, validation and test.
    """

    def __init__(self, *, split: Fractions = DEFAULT_SPLIT) -> None:
        self.split = split

    def missing(self) -> str | None:
        """The rows themselves."""
        return "the rows come from Python"

    def load(self) -> Dataset:
        """Refuse: there is nothing to read."""
        raise DataError(
            "data: these rows came from Python and are in no file; hand them over again: er.Experiment.load(spec, data=...) "
            "or er.Run.load(run, data=...)"
        )


def from_python(given: Any, name: str = "data") -> Dataset:
    """Take rows from a NumPy array or a pandas DataFrame, without a copy where none is needed.

    Args:
        given: the array, (N, *event), or the frame.
        name: what messages call it.

    Raises:
        DataError: it is neither, or a column holds no numbers; names the column.
    """
    if isinstance(given, np.ma.MaskedArray):
        if np.ma.getmaskarray(given).any():
            index = np.argwhere(np.ma.getmaskarray(given))[0]
            place = Dataset(given.data, name).place(int(index[0]), index[1:])
            raise DataError(f"{name}: a masked value at {place}; remove or impute the rows that hold such values")
        given = given.data
    if isinstance(given, np.ndarray):
        return Dataset(given, name)
    import pandas as pd

    if isinstance(given, pd.DataFrame):
        return from_frame(given, name)
    kind = f"{type(given).__module__}.{type(given).__qualname__}".removeprefix("builtins.")
    raise DataError(f"{name}: must be a NumPy array or a pandas DataFrame, got {kind}; convert it with np.asarray(...)")


def from_frame(frame: pd.DataFrame, name: str) -> Dataset:
    """Take the rows of a frame as numbers; the names of the columns are kept.

    Raises:
        DataError: a name appears twice, or a column is not numeric or has missing values; names the column.
    """
    columns = [str(column) for column in frame.columns]
    if repeated := [column for column in columns if columns.count(column) > 1]:
        raise DataError(f"{name}: the column name {repeated[0]!r} appears twice")
    if frame.shape[1] == 0 or len(frame) == 0:
        raise DataError(f"{name}: empty, shape {frame.shape}; at least 3 rows of one number are needed")
    parts = [_numbers(frame.iloc[:, i], column, name) for i, column in enumerate(columns)]
    x = np.empty((len(frame), len(parts)), dtype=np.result_type(*parts))
    for i, part in enumerate(parts):
        x[:, i] = part
    return Dataset(x, name, columns=tuple(columns))


def _numbers(column: pd.Series[Any], label: str, name: str) -> np.ndarray:
    """Return one column as numbers."""
    import pandas as pd

    dtype = column.dtype
    numeric = pd.api.types.is_bool_dtype(dtype) or pd.api.types.is_numeric_dtype(dtype)
    if not numeric or isinstance(dtype, pd.CategoricalDtype) or pd.api.types.is_complex_dtype(dtype):
        first = column.iloc[0]
        raise DataError(
            f"{name}: column {label!r} holds {dtype}, such as {str(first)[:40]!r}, not numbers; remove the column or encode it"
        )
    if not isinstance(dtype, np.dtype):
        missing = column.isna().to_numpy()
        if missing.any():
            raise DataError(
                f"{name}: a missing value at row {int(missing.argmax())}, column {label!r}; "
                "remove or impute the rows that hold such values"
            )
        kind = "float64" if pd.api.types.is_float_dtype(dtype) else "int64" if not pd.api.types.is_bool_dtype(dtype) else "bool"
        return column.to_numpy(dtype=kind)
    return column.to_numpy()


def read_parquet(path: Path, label: str) -> Dataset:
    """Read a parquet file of numeric columns.

    Args:
        path: the file.
        label: its name for messages.

    Raises:
        DataError: pyarrow is not installed, or the file is damaged or holds other than numbers.
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
    return from_frame(frame, label)


def read_csv(path: Path, label: str) -> Dataset:
    """Read numbers separated by commas, semicolons or tabs; a first line with text in it is the header.

    Args:
        path: the file.
        label: its name for messages.

    Raises:
        DataError: names line (counted from 1) and column of the first cell that is no number, or of a ragged line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{label}: not a text file in UTF-8 (byte {error.start}); export it as UTF-8") from None
    if "\x00" in text:
        raise DataError(f"{label}: not a text file (it holds NUL characters)")
    first = next((line for line in text.splitlines() if line.strip()), None)
    if first is None:
        raise DataError(f"{label}: empty")
    delimiter = max(",;\t", key=first.count)
    cells = [cell.strip() for cell in next(csv.reader([first], delimiter=delimiter))]
    header = any(cell and not _is_number(cell) for cell in cells)
    if header and (repeated := [name for name in cells if cells.count(name) > 1]):
        raise DataError(f"{label}: the column name {repeated[0]!r} appears twice in the header")
    columns = tuple(cells) if header else None
    body = text.split(first, 1)[1] if header else text
    if not body.strip():
        raise DataError(f"{label}: a header and no rows")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = np.loadtxt(io.StringIO(body), delimiter=delimiter, ndmin=2, comments=None, quotechar='"')
        if columns is None or x.shape[1] == len(columns):
            return Dataset(x, label, columns=columns)
    except (ValueError, UserWarning, OverflowError):
        pass
    raise DataError(_csv_problem(text, label, delimiter, columns))


def _csv_problem(text: str, label: str, delimiter: str, columns: tuple[str, ...] | None) -> str:
    """Find the first cell or line that keeps a CSV file from being read."""
    width = len(columns) if columns else None
    seen_header = columns is None
    try:
        reader = csv.reader(io.StringIO(text), delimiter=delimiter)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if not seen_header:
                seen_header = True
                continue
            line = reader.line_num
            width = width or len(row)
            if len(row) != width:
                cells = f"{len(row)} cell{'s' * (len(row) != 1)}"
                return f"{label}: line {line} has {cells}, the lines before it have {width}; every line needs the same"
            for i, cell in enumerate(row):
                if not _is_number(cell.strip()):
                    column = repr(columns[i]) if columns else str(i)
                    what = f"the text {cell.strip()[:40]!r} is no number" if cell.strip() else "an empty cell"
                    cure = "fill it in or remove the row" if not cell.strip() else "remove the column or encode it"
                    return f"{label}: line {line}, column {column}: {what}; {cure}"
    except csv.Error as error:
        return f"{label}: not a CSV file: {error}"
    return f"{label}: not a CSV file of numbers"


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
