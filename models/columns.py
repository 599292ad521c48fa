"""The columns of a table: their names, kinds and numbers of levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["real", "positive", "proportion", "count", "binary", "ordinal", "categorical"]


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        name: its name, or its number as text.
        kind: its values: any real number; positive; in (0, 1); 0, 1, 2, ...; 0 or 1; ordered codes 0 .. levels - 1; unordered
            codes 0 .. levels - 1.
        levels: number of codes of a binary, ordinal or categorical column; 0 for the others.
    """

    name: str
    kind: Kind
    levels: int = 0


def image_shape(event_shape: Sequence[int], declared: Sequence[int] | None = None) -> tuple[int, int] | None:
    """Return (height, width) if one datum is an image: as declared, else two-dimensional, or flat, square and >= 8 x 8."""
    width = math.prod(event_shape)
    if declared is not None:
        shape = (int(declared[0]), int(declared[1]))
        return shape if math.prod(shape) == width else None
    sizes = [n for n in event_shape if n != 1]
    if len(sizes) == 2 and min(sizes) >= 4:
        return sizes[0], sizes[1]
    side = math.isqrt(width)
    return (side, side) if len(sizes) == 1 and side * side == width and side >= 8 else None
