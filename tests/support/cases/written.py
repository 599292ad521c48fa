"""Random tables as people have them, written to text as programs write it, and what pandas reads of it."""

from __future__ import annotations

import csv
import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

HOLES = ("", "NA", "nan", "NULL", "n/a", "None", "#N/A")
NAMES = ("a", "b", "depth (m)", "größe", "x.1", "Name, given", 'the "best"')
WORDS = ("rome", "oslo", "st. john's", "a, b", "x;y", "two words", "été", "B|C")
DAMAGE = ("percent", "units", "thousands", "dates", "money", "decimal comma")
"""Text that should be numbers: pandas reads text, and so nobody may model it unasked."""


@dataclass(frozen=True)
class Written:
    """A table as text.

    Attributes:
        text: the file, as bytes.
        frame: what pandas reads when it is told delimiter, header, index and encoding.
        damage: what is written as text that should be numbers, or None.
        header: whether the first line holds names.
        delimiter: what stands between cells.
    """

    text: bytes
    frame: pd.DataFrame
    damage: str | None
    header: bool
    delimiter: str

    def agrees(self, columns: Sequence[str], x: np.ndarray, levels: dict[str, tuple[str, ...]]) -> str | None:
        """Say where rows, columns, holes or values differ from those of pandas; None where they do not."""
        frame = self.frame
        if list(map(str, columns)) != list(map(str, frame.columns)):
            return f"columns {columns} for {list(frame.columns)}"
        if x.shape != frame.shape:
            return f"shape {x.shape} for {frame.shape}"
        holes = frame.isna().to_numpy()
        if (np.isnan(x.astype(float)) != holes).any():
            return f"holes at {np.argwhere(np.isnan(x.astype(float)) != holes)[:3].tolist()}"
        for i, name in enumerate(map(str, columns)):
            column, known = frame.iloc[:, i], ~holes[:, i]
            if name in levels:
                read = [levels[name][int(v)] for v in x[known, i]]
                if read != [str(v).strip() for v in column[known]]:
                    return f"texts of {name}"
            elif not np.allclose(x[known, i], column[known].to_numpy(dtype=float), rtol=1e-12, atol=0):
                return f"values of {name}"
        return None


def written(seed: int) -> Written:
    """Return the table of a seed."""
    rng = random.Random(seed)
    n, width = rng.randint(12, 40), rng.randint(2, 5)
    header = rng.choice(["text", "text", "text", "default", "years", "none"])
    names = {"text": rng.sample(NAMES, width), "years": [str(2015 + i) for i in range(width)]}.get(header)
    names = names or [str(i) for i in range(width)]
    columns = [_column(rng, n) for _ in range(width)]
    damage = rng.choice(DAMAGE) if rng.random() < 0.2 else None
    if damage is not None:
        columns[rng.randrange(width)] = [_damaged(rng, damage) for _ in range(n)]
    for column in columns:
        for i in range(n):
            if rng.random() < 0.1 and i > 1:
                column[i] = rng.choice(HOLES)
    rows = [list(row) for row in zip(*columns, strict=True)]
    for _ in range(rng.randint(0, 2)):
        rows[rng.randrange(2, n)] = [""] * width
    index = rng.choice([None, None, "count", "text"]) if header != "none" else None
    if index is not None:
        rows = [[str(i) if index == "count" else f"r{i}", *row] for i, row in enumerate(rows)]
        names = ["", *names]
    delimiter = rng.choice([",", ",", ";", "\t", "|"])
    quoting = rng.choice([csv.QUOTE_MINIMAL, csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
    end = rng.choice(["\n", "\r\n"])
    text = _text([*([names] if header != "none" else []), *rows], delimiter, quoting, end, rng)
    raw = text.encode(rng.choice(["utf-8", "utf-8-sig"]))
    how = {"header": None if header == "none" else 0, "index_col": None if index is None else 0}
    frame = _by_pandas(raw, delimiter, how)
    return Written(raw, frame, damage, header != "none", delimiter)


def _by_pandas(raw: bytes, delimiter: str, how: dict[str, int | None]) -> pd.DataFrame:
    return pd.read_csv(io.BytesIO(raw), sep=delimiter, encoding="utf-8-sig", **how)


def _column(rng: random.Random, n: int) -> list[str]:
    kind = rng.choice(["real", "real", "count", "words", "binary", "big"])
    if kind == "words":
        some = rng.sample(WORDS, 3)
        return [rng.choice(some) for _ in range(n)]
    draw = {
        "real": lambda: repr(round(rng.gauss(0, 3), rng.randint(1, 6))),
        "count": lambda: str(rng.randint(0, 30)),
        "binary": lambda: str(rng.randint(0, 1)),
        "big": lambda: f"{rng.gauss(0, 1):.3e}",
    }[kind]
    return [draw() for _ in range(n)]


def _damaged(rng: random.Random, damage: str) -> str:
    value = rng.uniform(1000, 99999)
    return {
        "percent": f"{value / 1000:.1f}%",
        "units": f"{value:.0f} km",
        "thousands": f"{value:,.0f}",
        "dates": f"2024-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}",
        "money": f"${value:.2f}",
        "decimal comma": f"{value:.2f}".replace(".", ","),
    }[damage]


def _text(rows: list[list[str]], delimiter: str, quoting: int, end: str, rng: random.Random) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting, lineterminator="\n")  # type: ignore[arg-type]
    writer.writerows(rows)
    lines = out.getvalue().splitlines(keepends=False)
    for _ in range(rng.randint(0, 2)):
        lines.insert(rng.randrange(1, len(lines)), rng.choice(["", "  "]) if delimiter != "\t" else "")
    return end.join(lines) + rng.choice([end, ""])


def save(folder: Path, seed: int) -> tuple[Path, Written]:
    """Write the table of a seed to a folder."""
    found = written(seed)
    path = folder / f"t{seed}.csv"
    path.write_bytes(found.text)
    return path, found
