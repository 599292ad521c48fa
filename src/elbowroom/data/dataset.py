"""Data sets: the `Dataset` itself, its checks, and its split.

A data set is a component of kind `data`: a class whose `load()` returns a `Dataset`. This module uses NumPy; the experiment
makes tensors in the precision of the fit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge, Len

from elbowroom.data.chunks import BUDGET, rows_of
from elbowroom.data.columns import Layout, describe_columns
from elbowroom.errors import DataError, SpecError
from elbowroom.models.columns import Column, Kind
from elbowroom.system.files import sha256_of

if TYPE_CHECKING:
    from elbowroom.models.linear_gaussian import LinearGaussian


DEFAULT_SPLIT = (0.6, 0.2, 0.2)

Names = Annotated[Sequence[str], Len(1)]
Fraction = Annotated[float, Ge(0)]
Fractions = Annotated[Sequence[Fraction], Len(3, 3)]


@dataclass(frozen=True, eq=False)
class Hidden:
    """Known entries of x that were removed, to measure the quality of imputation.

    Attributes:
        rows: row numbers in x, (M,), counted from 0.
        columns: column numbers in x, (M,).
        values: the removed values, (M,).
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Dataset:
    """Observed data.

    Attributes:
        x: real numbers, (N, *event); may be memory-mapped. NaN marks missing entries and the padding of sequences.
        name: name of the data in messages.
        labels: one label per datum, (N,), whole numbers or text; only used to colour figures.
        truth: the program that simulated the data, where it is known.
        columns: names of the columns of x, where they have names.
        split: the training, validation and test rows, where the publisher defines them.
        grey: where x is one draw from Bernoulli(grey / 255), the grey values, (N, *event) uint8; training draws x anew.
        covariates: the c in p(z|c), (N, C) float64, in the units of the file; text is one-hot.
        covariate_names: C names; for text such as `batch=a`.
        exposure: factor on the rate of counts, (N,) float64, positive.
        kinds: column -> kind, where it was declared or follows from the column's type.
        categories: column of x -> the texts behind its codes 0, 1, ...
        layout: the roles of the columns, so that other tables are read in the same way.
        hidden: removed entries with their true values.
        notes: sentences about what was read otherwise than it may have been meant.
    """

    x: np.ndarray
    name: str
    labels: np.ndarray | None = None
    truth: LinearGaussian | None = None
    columns: tuple[str, ...] | None = None
    split: Split | None = None
    grey: np.ndarray | None = None
    covariates: np.ndarray | None = None
    covariate_names: tuple[str, ...] = ()
    exposure: np.ndarray | None = None
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    categories: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    layout: Layout | None = None
    hidden: Hidden | None = None
    notes: tuple[str, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one datum."""
        return tuple(int(n) for n in self.x.shape[1:])

    def __len__(self) -> int:
        return len(self.x)

    @cached_property
    def missing(self) -> bool:
        """Whether any entry of x is missing."""
        return self.x.dtype.kind == "f" and any(bool(np.isnan(part).any()) for _, part in rows_of(self.x))

    @cached_property
    def levels(self) -> int | None:
        """1 + the largest value if all observed values are whole numbers from 0, else None."""
        largest = 0
        for _, part in rows_of(self.x):
            if part.dtype.kind == "f":
                part = part[~np.isnan(part)]
                if (part != np.floor(part)).any():
                    return None
            if part.size:
                if part.min() < 0:
                    return None
                largest = max(largest, int(part.max()))
        return largest + 1

    @cached_property
    def described(self) -> tuple[Column, ...] | None:
        """Name, kind and number of levels of every column of a table; None for images and sequences.

        Raises:
            DataError: the values of a column are not of its declared kind.
        """
        if len(self.event_shape) != 1:
            return None
        names = self.columns or tuple(str(i) for i in range(self.event_shape[0]))
        return describe_columns(self.x, names, self.kinds, self.categories, name=self.name)

    def take(self, index: np.ndarray | slice) -> Dataset:
        """Return some of the rows, with covariates, exposure, labels and grey values, but without split and hidden entries."""
        beside = {name: getattr(self, name) for name in ("labels", "grey", "covariates", "exposure")}
        some: dict[str, Any] = {name: None if value is None else value[index] for name, value in beside.items()}
        return replace(self, x=self.x[index], split=None, hidden=None, **some)

    def fingerprint(self) -> str:
        """Return the SHA-256 of shape, type and values of x, and of grey values, covariates and exposure."""

        def parts() -> Iterator[bytes]:
            yield f"{self.x.shape} {self.x.dtype.str}".encode()
            for array in (self.x, self.grey, self.covariates, self.exposure):
                for _, part in () if array is None else rows_of(array):
                    yield np.ascontiguousarray(part).tobytes()

        return sha256_of(parts())

    def large(self, itemsize: int) -> bool:
        """Say whether x takes more than BUDGET bytes, at `itemsize` bytes per number."""
        return self.x.size * itemsize > BUDGET

    @property
    def mapped(self) -> bool:
        """Whether x is a memory map that is too large to be read as a whole."""
        return isinstance(self.x, np.memmap) and self.large(self.x.itemsize)

    def stamp(self) -> str | None:
        """Return size and modification time of the file behind a large memory map; None for other data."""
        filename = self.x.filename if isinstance(self.x, np.memmap) and self.mapped else None
        if filename is None:
            return None
        stat = Path(filename).stat()
        return f"{stat.st_size} {stat.st_mtime_ns}"

    def check(self, *, values: bool = True, whole: bool = True) -> None:
        """Refuse data that no model can use.

        Args:
            values: check every number; else only shape and type.
            whole: these are all the data: every column of a table needs an observed value. Else they are some rows, which may
                have no observed value: their posterior is the prior.

        Raises:
            DataError: x has the wrong type or shape, infinite values, or a column without observed values; or covariates or
                exposures are missing. Names the first place.
        """
        x = self.x
        if x.dtype.kind not in "buif":
            raise DataError(f"{self.name}: numbers are needed, this array holds {_kind(x)}; convert it to float first")
        if x.ndim == 1:
            raise DataError(f"{self.name}: rows and columns are needed, this array is flat; reshape it to ({len(x)}, 1)")
        if x.ndim == 0 or x.size == 0:
            raise DataError(f"{self.name}: empty, shape {tuple(x.shape)}; at least 3 rows of one number are needed")
        self._check_beside()
        if not values or x.dtype.kind != "f":
            return
        observed = np.zeros(self.event_shape, dtype=bool)
        for start, part in rows_of(x):
            finite = np.isfinite(part)
            observed |= finite.any(0)
            if not finite.all() and np.isinf(part).any():
                index = np.argwhere(np.isinf(part))[0]
                raise DataError(
                    f"{self.name}: an infinite value at {self.place(start + index[0], index[1:])}; "
                    "correct it, or make it NaN, which is read as missing"
                )
        if whole and not observed.any():
            raise DataError(f"{self.name}: every value is missing; at least one of each column is needed")
        if whole and observed.ndim == 1 and not observed.all():
            column = self.column(int(np.argmin(observed)))
            cure = "remove the column" if self.columns is None else "leave it out of data.x, or remove it"
            raise DataError(f"{self.name}: column {column} has no observed value; {cure}")

    def _check_beside(self) -> None:
        """Check labels, covariates and exposures: as many rows as x, finite, exposures positive."""
        exposure = None if self.exposure is None else self.exposure[:, None]
        names = {"covariates": self.covariate_names, "exposure": ((self.layout and self.layout.exposure) or "exposure",)}
        for kind, values in (("covariates", self.covariates), ("exposure", exposure)):
            if values is None:
                continue
            if len(values) != len(self):
                raise DataError(f"{self.name}: {len(values)} rows of {kind} for {len(self)} of x; both need the same number")
            bad = ~np.isfinite(values) if kind == "covariates" else ~((values > 0) & (values < np.inf))
            if bad.any():
                row, column = (int(i) for i in np.argwhere(bad)[0])
                value = values[row, column]
                what = "missing" if np.isnan(value) else f"{value:g}"
                needed = "a covariate must be a finite number" if kind == "covariates" else "an exposure must be above 0"
                cure = "fill it in or remove the row" if np.isnan(value) else "correct it or remove the row"
                raise DataError(f"{self.name}: {needed}, it is {what} at row {row}, column {names[kind][column]!r}; {cure}")

    def column(self, number: int) -> str:
        """Name one column of x in a message."""
        return repr(self.columns[number]) if self.columns else str(number)

    def place(self, row: int, index: np.ndarray) -> str:
        """Name one entry of x in a message; rows and columns are counted from 0."""
        if len(index) != 1:
            return f"row {row}, position {tuple(int(i) for i in index)}"
        return f"row {row}, column {self.column(int(index[0]))}"


@dataclass(frozen=True, eq=False)
class Split:
    """Row numbers for training, for choosing the best weights, and for the audit: int64, disjoint.

    The test rows are in random order, so that the first k of them are a random sample; the others are sorted.
    """

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_rows(n: int, fractions: Sequence[float], seed: int, name: str = "data") -> Split:
    """Split n rows at random; the same n, fractions and seed always give the same split.

    The test rows come first in the permutation, so that they do not depend on how the rest is divided.

    Args:
        n: number of rows.
        fractions: of train, validation and test; they sum to 1. Each part with a positive fraction gets a row.
        seed: seed of the permutation.
        name: name of the data in messages.

    Raises:
        SpecError: the fractions do not sum to 1, or leave no rows for training or for the audit.
        DataError: there are too few rows.
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
        """Say what `load` needs that is missing on this machine; None if it can read or make the data."""
        return None

    @abstractmethod
    def load(self) -> Dataset:
        """Read or make the data.

        Raises:
            DataError: one line that names file, row and column, and the remedy.
        """


def _kind(x: np.ndarray) -> str:
    kinds = {"c": "complex numbers", "U": "text", "S": "bytes", "M": "dates", "m": "durations", "O": "Python objects"}
    return kinds.get(x.dtype.kind, f"values of type {x.dtype}")
