"""Published data sets that are not images: a mixed table with missing entries, and music of different lengths."""

from __future__ import annotations

import csv
import io
import json
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from elbowroom.data.columns import Layout
from elbowroom.data.dataset import DEFAULT_SPLIT, Dataset, Fractions, Hidden
from elbowroom.data.published import FILES, PublishedSource, content, published_split
from elbowroom.errors import DataError
from elbowroom.models.columns import Kind

ADULT = (
    "age",
    "workclass",
    "fnlwgt",
    "education_num",
    "marital_status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital_gain",
    "capital_loss",
    "hours_per_week",
)
"""Column names of the UCI repository; HI-VAE's file has none."""

_KINDS: dict[str, Kind] = {"count": "count", "cat": "categorical", "pos": "positive", "ordinal": "ordinal", "real": "real"}
LOWEST, HIGHEST = 21, 108
"""MIDI numbers of the lowest and the highest key of a piano."""


class Adult(PublishedSource):
    """Adult: 32,561 people of the US census of 1994, 12 columns of mixed kinds, as HI-VAE publishes them.

    Becker and Kohavi 1996, https://doi.org/10.24432/C5XW20; Nazabal, Olmos, Ghahramani and Valera 2020,
    https://arxiv.org/abs/1807.03653. 3,686 entries are truly missing. Codes start at 0; a positive column with zeros (the two
    capital columns) has 1 added, as HI-VAE models log(1 + x). 2 MB are downloaded once, unless `ELBOWROOM_DATA` names a
    folder with the files.

    Args:
        missing: `20%` hides the entries of HI-VAE's first list of 20 % missing at random; `Dataset.hidden` keeps them.
        split: fractions of train, validation and test.
    """

    keys = ("adult.data", "adult.types", "adult.missing")

    def __init__(self, *, missing: Literal["none", "20%"] = "none", split: Fractions = DEFAULT_SPLIT) -> None:
        self.hide = missing == "20%"
        self.split = split

    def load(self) -> Dataset:
        """Return x of shape (32561, 12), float64 with NaN where missing."""
        x = _matrix(FILES["adult.data"].name, content(FILES["adult.data"]))
        kinds, levels = _types(FILES["adult.types"].name, content(FILES["adult.types"]))
        if x.shape[1] != len(ADULT) or len(kinds) != len(ADULT):
            raise DataError(f"adult: {x.shape[1]} columns of data and {len(kinds)} of types, not {len(ADULT)}; get them again")
        categories: dict[str, tuple[str, ...]] = {}
        for j, name in enumerate(ADULT):
            if kinds[name] in ("categorical", "ordinal"):
                x[:, j] -= 1
                categories[name] = tuple(str(code + 1) for code in range(levels[name]))
            elif kinds[name] == "positive" and np.nanmin(x[:, j]) == 0:
                x[:, j] += 1
        hidden = self._hidden(x) if self.hide else None
        if hidden is not None:
            x[hidden.rows, hidden.columns] = np.nan
        layout = Layout(x=ADULT, kinds=kinds, levels=categories, fitted=True)
        return Dataset(x, "adult", columns=ADULT, kinds=kinds, categories=categories, layout=layout, hidden=hidden)

    def _hidden(self, x: np.ndarray) -> Hidden:
        """Return the entries on the list whose values are known."""
        name = FILES["adult.missing"].name
        listed = _matrix(name, content(FILES["adult.missing"]))
        if listed.shape[1] != 2 or np.isnan(listed).any() or (listed < 1).any() or (listed > x.shape).any():
            raise DataError(f"{name}: is not a list of rows and columns, counted from 1, of the data; get it again")
        rows, columns = listed.astype(np.int64).T - 1
        known = ~np.isnan(x[rows, columns])
        return Hidden(rows[known], columns[known], x[rows, columns][known])


class JSBChorales(PublishedSource):
    """JSB Chorales: Bach's 382 four-part chorales in quarter notes, which of 88 piano keys sound (0 or 1).

    Boulanger-Lewandowski, Bengio and Vincent 2012, https://arxiv.org/abs/1206.6392, as
    https://github.com/czhuang/JSB-Chorales-dataset keeps them. The published split is kept (229, 76 and 77). Shorter chorales
    are padded with NaN. 0.4 MB are downloaded once, unless `ELBOWROOM_DATA` names a folder with the file.

    Args:
        steps: keep the first so many quarter notes; all of them, up to 160, by default.
    """

    keys = ("jsb.quarter",)

    def __init__(self, *, steps: Annotated[int, Ge(1)] | None = None) -> None:
        self.steps = steps

    def load(self) -> Dataset:
        """Return x of shape (382, steps, 88), float32 of 0 and 1, NaN after the end of a chorale."""
        name = FILES["jsb.quarter"].name
        parts = _sequences(name, content(FILES["jsb.quarter"]))
        sequences = [sequence[: self.steps] for part in parts for sequence in part]
        x = np.full((len(sequences), max(map(len, sequences)), HIGHEST - LOWEST + 1), np.nan, dtype=np.float32)
        for n, sequence in enumerate(sequences):
            x[n, : len(sequence)] = 0
            for t, chord in enumerate(sequence):
                x[n, t, [note - LOWEST for note in chord]] = 1
        return Dataset(x, "jsb_chorales", split=published_split(*map(len, parts)))


def _matrix(name: str, raw: bytes) -> np.ndarray:
    try:
        return np.loadtxt(io.StringIO(raw.decode("ascii")), delimiter=",", ndmin=2, comments=None)
    except ValueError:
        raise DataError(f"{name}: is not lines of numbers") from None


def _types(name: str, raw: bytes) -> tuple[dict[str, Kind], dict[str, int]]:
    """Parse HI-VAE's types: kind of each column, and number of levels of categorical and ordinal ones."""
    try:
        rows = list(csv.DictReader(io.StringIO(raw.decode("ascii"), newline="")))
        kinds = {column: _KINDS[row["type"]] for column, row in zip(ADULT, rows, strict=False)}
        levels = {column: int(row["nclass"]) for column, row in zip(ADULT, rows, strict=False) if row["nclass"]}
    except (ValueError, KeyError, TypeError, csv.Error):
        raise DataError(f"{name}: is not a table of type, dim and nclass") from None
    return kinds, levels


def _sequences(name: str, raw: bytes) -> list[list[list[list[int]]]]:
    """Parse train, valid and test: lists of sequences of chords of MIDI numbers."""
    try:
        tree: Any = json.loads(raw)
        parts: list[list[list[list[int]]]] = [tree[part] for part in ("train", "valid", "test")]
        good = all(
            isinstance(note, int) and LOWEST <= note <= HIGHEST for part in parts for s in part for chord in s for note in chord
        )
        good = good and all(len(part) and all(map(len, part)) for part in parts)
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise DataError(f"{name}: is not train, valid and test sequences of chords of notes {LOWEST} to {HIGHEST}")
    return parts
