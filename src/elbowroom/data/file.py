"""The user's own data: a file of rows (.npz, .npy, .csv, .tsv, .parquet)."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elbowroom.data.columns import Layout
from elbowroom.data.dataset import DEFAULT_SPLIT, Dataset, Fractions, Names, Source
from elbowroom.data.frames import AS_IT_IS, from_python, read_csv, read_parquet
from elbowroom.data.tables import beside, unnamed
from elbowroom.errors import DataError, MissingFile, SpecError, nearest
from elbowroom.models.columns import Kind
from elbowroom.system.archive import check_npy, check_npz
from elbowroom.system.paths import located, unreadable

SPARSE = {"format", "shape", "data"}
"""Arrays that scipy.sparse.save_npz writes for every kind of matrix."""
DAMAGED = (ValueError, EOFError, OverflowError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What NumPy and zipfile raise on a damaged archive."""
MAGIC = {".npy": b"\x93NUMPY", ".npz": b"PK"}


class File(Source):
    """Your own data: .npz, .npy (memory-mapped), .csv and .tsv (with or without a header) or .parquet (extra `parquet`).

    Missing are NaN and, in a table, cells that are empty or say nan, NA, N/A, None, null or ?. Columns of text become codes.

    Args:
        folder: the folder that relative paths start from: that of the spec (a fact).
        path: the file; a relative path starts at the folder of the spec.
        key: which array of an .npz is x; not needed where there is only one, or one called `x`.
        x: the columns of a table to model; all that have no other role by default.
        covariates: columns (arrays of an .npz) to condition on; text, and columns declared categorical, become one-hot.
        exposure: the column (array of an .npz) of positive numbers that rates of counts are multiplied by.
        labels: the column (array of an .npz) that colours figures; numbers or text.
        kinds: what columns hold where their values do not show it: column -> real, positive, proportion, count, binary,
            ordinal or categorical.
        header: whether the first line of a CSV file holds names; needed only where that is not evident.
        delimiter: what stands between the cells of a CSV file; needed only where that is not evident.
        split: fractions of train, validation and test.
    """

    def __init__(
        self,
        folder: Path,
        *,
        path: Path,
        key: str | None = None,
        x: Names | None = None,
        covariates: Names | None = None,
        exposure: str | None = None,
        labels: str | None = None,
        kinds: Mapping[str, Kind] | None = None,
        header: bool | None = None,
        delimiter: Literal[",", ";", "\t", "|"] | None = None,
        split: Fractions = DEFAULT_SPLIT,
    ) -> None:
        try:
            self.path = located(Path(folder), Path(path))
        except ValueError as error:
            raise DataError(str(error)) from None
        self.label = str(path)
        self.key = key
        self.layout = Layout.chosen(x, covariates, exposure, labels, kinds, header, delimiter)
        self.split = split

    def load(self) -> Dataset:
        """Read the file."""
        dataset = self.read(self.layout)
        dataset.check(values=not dataset.mapped)
        if dataset.kinds and not dataset.mapped:
            _ = dataset.described
        return dataset

    def read(self, layout: Layout) -> Dataset:
        """Read the file with a given layout, for example `Dataset.layout` of another table; values are not checked."""
        path, label = self.path, self.label
        readers = {
            ".npz": self._npz,
            ".npy": self._npy,
            ".csv": lambda layout: read_csv(path, label, layout),
            ".tsv": lambda layout: read_csv(path, label, layout),
            ".parquet": lambda layout: read_parquet(path, label, layout),
        }
        if path.suffix.lower() not in readers:
            allowed = ", ".join(readers)
            raise DataError(f"{label}: files of type {path.suffix or 'no suffix'!r} are not read; allowed: {allowed}")
        if self.key is not None and path.suffix.lower() != ".npz":
            raise SpecError(f"data.key: {label} holds one array only; leave the key out")
        try:
            if problem := unreadable(path):
                raise DataError(f"{label}: {problem}")
            if path.stat().st_size == 0:
                raise DataError(f"{label}: empty")
            return readers[path.suffix.lower()](layout)
        except FileNotFoundError:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = nearest(path.name, siblings) if siblings else ""
            hint = hint if hint.startswith("; did") else ""
            where = "" if label == str(path) else f" (looked for {path})"
            raise MissingFile(f"{label}: no such file{where}{hint}") from None
        except OSError as error:
            raise DataError(f"{label}: cannot be read: {error.strerror or error}") from None

    def _npy(self, layout: Layout) -> Dataset:
        self._check_begin(".npy")
        try:
            check_npy(self.path, self.label)
            x = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OverflowError, MemoryError) as error:
            raise DataError(f"{self.label}: {_numpy_problem(error)}") from None
        return unnamed(x, layout, self.label)

    def _check_begin(self, suffix: str) -> None:
        """Refuse a file that is of another type than its name says."""
        with self.path.open("rb") as handle:
            begin = handle.read(6)
        if begin.startswith(MAGIC[suffix]):
            return
        other = next((name for name, magic in MAGIC.items() if begin.startswith(magic)), None)
        if other is None:
            raise DataError(f"{self.label}: damaged or cut short (it does not begin like an {suffix} file); write it again")
        what = "one array" if other == ".npy" else "an archive of arrays"
        raise DataError(f"{self.label}: not an {suffix} file: it is {what}, call it {other}")

    def _npz(self, layout: Layout) -> Dataset:
        def read(archive: Any, key: str, option: str) -> np.ndarray:
            if key not in archive.files:
                raise DataError(f"{self.label}: {option}: there is no array {key!r}{nearest(key, archive.files)}")
            check_npz(self.path, key, self.label)
            return np.asarray(archive[key])

        self._check_begin(".npz")
        try:
            with self.path.open("rb") as handle:
                archive = np.load(handle, allow_pickle=False)
                if {*archive.files} >= SPARSE:
                    raise DataError(
                        f"{self.label}: holds a sparse matrix; write its numbers: "
                        f"np.save('x.npy', scipy.sparse.load_npz({self.path.name!r}).toarray())"
                    )
                others = [name for _, name in layout.others()]
                x = read(archive, self._choose([k for k in archive.files if k not in others]), "data.key")
                found = {name: read(archive, name, option) for option, name in layout.others()}
        except DAMAGED as error:
            raise DataError(f"{self.label}: {_numpy_problem(error)}") from None
        return beside(x, found, layout, self.label if self.key is None else f"{self.label}[{self.key}]")

    def _choose(self, keys: list[str]) -> str:
        """Choose the array of an archive."""
        if self.key is not None:
            return self.key
        if len(keys) != 1 and "x" not in keys:
            raise DataError(f"{self.label}: holds {', '.join(keys) or 'nothing'}; say which with data.key")
        return "x" if "x" in keys else keys[0]


def _numpy_problem(error: Exception) -> str:
    text = " ".join(str(error).split())
    if any(word in text for word in ("Object arrays", "Python objects", "allow_pickle")):
        return "holds Python objects, which are never loaded; save numbers: np.save(file, x.astype(float))"
    return f"damaged or cut short ({text[:80] or type(error).__name__}); write it again"


def read_like(given: Any, layout: Layout | None, folder: Path) -> Dataset:
    """Read new rows with the layout of the data of a fit: the same columns in the same roles, the same codes for text.

    Args:
        given: a path, an array or a frame.
        layout: `Dataset.layout` of the data of the fit; None where they had no named columns.
        folder: the folder that relative paths start from.

    Raises:
        DataError: a column of the fit is missing, or holds a text that did not occur in the fit.
    """
    layout = layout or AS_IT_IS
    if isinstance(given, str | Path):
        return File(folder, path=Path(given)).read(layout)
    return from_python(given, layout=layout)
