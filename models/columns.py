"""What is known of the columns of a table before any model: their names, kinds and numbers of levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["real", "positive", "proportion", "count", "binary", "ordinal", "categorical"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: its name, or its number as text.
        kind: what its values are: any real number; positive; in (0, 1); 0, 1, 2, ...; 0 or 1; ordered codes 0 .. levels - 1;
            unordered codes 0 .. levels - 1.
        levels: number of codes of a binary, ordinal or categorical column; 0 for the others.
    """

    name: str
    kind: Kind
    levels: int = 0
