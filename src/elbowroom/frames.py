"""Tables and arrays from Python, and parquet files: rows of numbers, with the names of their columns for messages."""

from __future__ import annotations

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
