"""Data sets: where x comes from, what can be wrong with it, and how it is split.

A data set is a component of kind `data`: a class whose `load()` returns a `Dataset`. Everything here is NumPy; tensors
are made by the experiment, in its own precision.
"""

from __future__ import annotations

import math
import mmap
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Len

from elbowroom.archive import check_npz, too_large
from elbowroom.errors import DataError, SpecError, nearest
from elbowroom.files import sha256_of

if TYPE_CHECKING:
    from elbowroom.models.linear import LinearGaussian

CHUNK = 2**22
"""Entries looked at together, so that a memory-mapped array is never read as a whole."""

BUDGET = 2**30
"""Bytes of data, as they are or in the precision of the fit, above which they are read as needed and not held in memory."""

DEFAULT_SPLIT = (0.6, 0.2, 0.2)

Fraction = Annotated[float, Ge(0)]
Fractions = Annotated[Sequence[Fraction], Len(3, 3)]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Observed data.

    Attributes:
        x: real numbers, (N, *event); perhaps memory-mapped.
        name: what to call it in messages.
        labels: one label per datum, (N,), for colours in figures only.
        truth: the program that made them, where it is known.
        columns: the names of the columns of x, where it has any.
        split: the rows that train, validate and test, where whoever published the data says so.
        grey: where x is one draw from Bernoulli(grey / 255), the grey values, (N, *event) uint8: training draws anew.
    """

    x: np.ndarray
    name: str
    labels: np.ndarray | None = None
    truth: LinearGaussian | None = None
    columns: tuple[str, ...] | None = None
    split: Split | None = None
    grey: np.ndarray | None = None

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(int(n) for n in self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    def fingerprint(self) -> str:
        """Return the SHA-256 of shape, type and values."""

        def parts() -> Iterator[bytes]:
            yield f"{self.x.shape} {self.x.dtype.str}".encode()
            for array in (self.x,) if self.grey is None else (self.x, self.grey):
                for _, part in rows_of(array):
                    yield np.ascontiguousarray(part).tobytes()

        return sha256_of(parts())

    def large(self, itemsize: int) -> bool:
        """Say whether x takes more than BUDGET bytes at so many bytes per number."""
        return self.x.size * itemsize > BUDGET

    @property
    def mapped(self) -> bool:
        """Whether x is a memory map too large to be read without need."""
        return isinstance(self.x, np.memmap) and self.large(self.x.itemsize)

    def stamp(self) -> str | None:
        """Return size and time of change of the file behind a large memory map: while they stay, its content is taken to."""
        filename = self.x.filename if isinstance(self.x, np.memmap) and self.mapped else None
        if filename is None:
            return None
        stat = Path(filename).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def check(self, *, values: bool = True) -> None:
        """Refuse what no model can use.

        Args:
            values: look at every number; else at shape and type alone.

        Raises:
            DataError: for an array of the wrong kind or shape, or for NaN and infinities; names the first place.
        """
        x = self.x
        if x.dtype.kind not in "buif":
            raise DataError(f"{self.name}: numbers are needed, this array holds {_kind(x)}; convert it to float first")
        if x.ndim == 1:
            raise DataError(f"{self.name}: rows and columns are needed, this array is flat; reshape it to ({len(x)}, 1)")
        if x.ndim == 0 or x.size == 0:
            raise DataError(f"{self.name}: empty, shape {tuple(x.shape)}; at least 3 rows of one number are needed")
        for start, part in rows_of(x) if values else ():
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                index = np.argwhere(~np.isfinite(part))[0]
                value = part[tuple(index)]
                what = "NaN" if np.isnan(value) else "an infinite value"
                raise DataError(
                    f"{self.name}: {what} at {self.place(start + index[0], index[1:])}; "
                    "remove or impute the rows that hold such values"
                )

    def place(self, row: int, index: np.ndarray) -> str:
        """Name one entry of x for people; rows and columns are counted from 0."""
        if len(index) != 1:
            return f"row {row}, position {tuple(int(i) for i in index)}"
        column = int(index[0])
        return f"row {row}, column {repr(self.columns[column]) if self.columns else column}"


@dataclass(frozen=True, eq=False)
class Split:
    """Which rows train, which choose the best weights, and which are audited: int64 row numbers, disjoint.

    The test rows are in random order, so that the first k of them are a random sample; the others are sorted.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_rows(n: int, fractions: Sequence[float], seed: int, name: str = "data") -> Split:
    """Split n rows at random; the same n, fractions and seed always give the same split.

    The test rows come first from the permutation: other fractions of training and validation leave them alone.

    Args:
        n: number of rows.
        fractions: of train, validation and test; they sum to 1. Each part with a positive fraction gets a row.
        seed: of the permutation.
        name: of the data, for messages.

    Raises:
        SpecError: if the fractions do not sum to 1 or leave nothing to train on or to audit.
        DataError: if there are too few rows.
    """
    if not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise SpecError(f"data.split: train, validation and test must sum to 1, got {sum(fractions):g}")
    if fractions[0] <= 0 or fractions[2] <= 0:
        raise SpecError("data.split: train and test must be positive, such as [0.6, 0.2, 0.2]")
    parts = sum(f > 0 for f in fractions)
    if n < max(3, parts):
        raise DataError(f"{name}: {n} row{'s' * (n != 1)}; at least 3 are needed for train, validation and test")
    order = np.random.default_rng([seed, n]).permutation(n)
    n_test = max(1, round(n * fractions[2]))
    n_validation = max(1, round(n * fractions[1])) if fractions[1] > 0 else 0
    n_test = min(n_test, n - n_validation - 1)
    test, validation, train = np.split(order, [n_test, n_test + n_validation])
    return Split(train=np.sort(train), validation=np.sort(validation), test=test)


class Source(ABC):
    """A data set that a spec can name.

    Attributes:
        split: fractions of train, validation and test.
    """

    split: Sequence[float]

    def missing(self) -> str | None:
        """Say what `load` needs that this machine does not have; None where it can read or make the data."""
        return None

    @abstractmethod
    def load(self) -> Dataset:
        """Read or make the data.

        Raises:
            DataError: one line that names file, row and column, and the cure.
        """


class Digits(Source):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels of 0 to 16 (embedded; no download).

    Alpaydin and Kaynak 1998, https://archive.ics.uci.edu/dataset/80.

    Args:
        binarize: make a pixel 1 where it is at least this threshold (on the scale 0 to 16), else 0; null keeps grey.
        scale: what grey pixels are divided by: 16 gives values in [0, 1]. It does not matter when binarized.
        split: fractions of train, validation and test.
    """

    def __init__(
        self,
        *,
        binarize: Annotated[float, Gt(0)] | None = None,
        scale: Annotated[float, Gt(0)] = 16.0,
        split: Fractions = DEFAULT_SPLIT,
    ) -> None:
        self.binarize = binarize
        self.scale = scale
        self.split = split

    def load(self) -> Dataset:
        """Return x of shape (1797, 8, 8), with the digits as labels."""
        from sklearn.datasets import load_digits

        bunch = load_digits()
        grey = bunch.images
        if self.binarize is not None and self.binarize > grey.max():
            raise SpecError(f"data.binarize: {self.binarize:g} leaves every pixel 0: pixels go from 0 to {grey.max():g}")
        x = grey / self.scale if self.binarize is None else grey >= self.binarize
        return Dataset(x.astype(np.float32), "digits", labels=bunch.target.astype(np.int64))


class LinearGaussianData(Source):
    """Data simulated from z ~ N(0, I), x|z ~ N(W z + mu, noise^2 I), where everything is known in closed form.

    W and mu are standard normal draws. `Dataset.truth` is the program.

    Args:
        n: number of data.
        dim: length of x.
        latent_dim: length of z.
        noise: standard deviation of the noise.
        seed: of the simulation (the spec's own seed does not change the data).
        split: fractions of train, validation and test.
    """

    def __init__(
        self,
        *,
        n: Annotated[int, Ge(3)] = 2000,
        dim: Annotated[int, Ge(1)] = 8,
        latent_dim: Annotated[int, Ge(1)] = 2,
        noise: Annotated[float, Gt(0)] = 0.5,
        seed: Annotated[int, Ge(0)] = 0,
        split: Fractions = DEFAULT_SPLIT,
    ) -> None:
        self.n, self.dim, self.latent_dim, self.noise, self.seed = n, dim, latent_dim, noise, seed
        self.split = split

    def load(self) -> Dataset:
        """Return x of shape (n, dim) in float64, with its truth."""
        import torch

        from elbowroom.models.linear import LinearGaussian

        if problem := too_large(24.0 * (self.n + self.latent_dim) * (self.dim + self.latent_dim)):
            raise SpecError(f"data: linear_gaussian {problem}; make n or dim smaller")
        generator = torch.Generator().manual_seed(self.seed)
        W = torch.randn(self.dim, self.latent_dim, dtype=torch.float64, generator=generator)
        mu = torch.randn(self.dim, dtype=torch.float64, generator=generator)
        truth = LinearGaussian(W, mu, torch.full_like(mu, self.noise**2))
        _, x = truth.sample(self.n, generator)
        return Dataset(x.numpy(), "linear_gaussian", truth=truth)


class File(Source):
    """Your own data: .npz, .npy (memory-mapped), .csv (with or without a header) or .parquet (extra `parquet`).

    Args:
        folder: the folder that relative paths start from: that of the spec (a fact).
        path: the file; a relative path starts at the folder of the spec.
        key: which array of an .npz to use; not needed where there is only one, or one called `x`.
        split: fractions of train, validation and test.
    """

    def __init__(self, folder: Path, *, path: Path, key: str | None = None, split: Fractions = DEFAULT_SPLIT) -> None:
        self.path = (Path(folder) / Path(path).expanduser()).resolve()
        self.label = str(path)
        self.key = key
        self.split = split

    def load(self) -> Dataset:
        """Read the file."""
        from elbowroom.frames import read_csv, read_parquet

        path, label = self.path, self.label
        readers = {
            ".npz": self._npz,
            ".npy": self._npy,
            ".csv": lambda: read_csv(path, label),
            ".parquet": lambda: read_parquet(path, label),
        }
        if path.suffix.lower() not in readers:
            allowed = ", ".join(readers)
            raise DataError(f"{label}: files of type {path.suffix or 'no suffix'!r} are not read; allowed: {allowed}")
        if self.key is not None and path.suffix.lower() != ".npz":
            raise SpecError(f"data.key: {label} holds one array only; leave the key out")
        try:
            if path.is_dir():
                raise DataError(f"{label}: this is a folder; name a file")
            if path.stat().st_size == 0:
                raise DataError(f"{label}: empty")
            dataset = readers[path.suffix.lower()]()
        except FileNotFoundError:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = nearest(path.name, siblings) if siblings else ""
            hint = hint if hint.startswith("; did") else ""
            raise DataError(f"{label}: no such file (looked for {path}){hint}") from None
        except OSError as error:
            raise DataError(f"{label}: cannot be read: {error.strerror or error}") from None
        dataset.check(values=not dataset.mapped)
        return dataset

    def _npy(self) -> Dataset:
        try:
            x = np.load(self.path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise DataError(f"{self.label}: {_numpy_problem(error)}") from None
        return Dataset(x, self.label)

    def _npz(self) -> Dataset:
        try:
            with self.path.open("rb") as handle:
                archive = np.load(handle, allow_pickle=False)
                if not isinstance(archive, np.lib.npyio.NpzFile):
                    raise DataError(f"{self.label}: not an .npz archive; if it is one array, call it .npy")
                key = self._choose(list(archive.files))
                check_npz(self.path, key, self.label)
                x = np.asarray(archive[key])
        except (ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
            raise DataError(f"{self.label}: {_numpy_problem(error)}") from None
        return Dataset(x, self.label if self.key is None else f"{self.label}[{key}]")

    def _choose(self, keys: list[str]) -> str:
        """Name the array of an archive to use."""
        if self.key is None:
            if len(keys) != 1 and "x" not in keys:
                raise DataError(f"{self.label}: holds {', '.join(keys) or 'nothing'}; say which with data.key")
            return "x" if "x" in keys else keys[0]
        if self.key not in keys:
            raise DataError(f"{self.label}: data.key: there is no array {self.key!r}{nearest(self.key, keys)}")
        return self.key


def _numpy_problem(error: Exception) -> str:
    text = " ".join(str(error).split())
    if any(word in text for word in ("Object arrays", "Python objects", "allow_pickle")):
        return "holds Python objects, which are never loaded; save numbers: np.save(file, x.astype(float))"
    return f"damaged or cut short ({text[:80] or type(error).__name__}); write it again"


def _kind(x: np.ndarray) -> str:
    kinds = {"c": "complex numbers", "U": "text", "S": "bytes", "M": "dates", "m": "durations", "O": "Python objects"}
    return kinds.get(x.dtype.kind, f"values of type {x.dtype}")


def rows_of(x: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yield (first row, rows) of an array, a few million entries at a time; of a memory map nothing else stays in memory."""
    rows = max(1, CHUNK // max(1, math.prod(x.shape[1:])))
    for start in range(0, len(x), rows):
        yield start, x[start : start + rows]
        forget(x)


def forget(x: np.ndarray) -> None:
    """Let go of the pages of a memory map that were read; the system may still have them cached."""
    pages = getattr(x, "_mmap", None)
    if isinstance(pages, mmap.mmap) and getattr(x, "mode", "") == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)
