"""Large arrays in pieces, so that a memory-mapped file is never in memory as a whole."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from elbowroom.system.memory import fitting, slices

CHUNK = 2**22
"""Number of entries of an array that are processed together."""
BUDGET = 2**30
"""Bytes, in the type of the file or of the fit, above which data are read when needed and not held in memory."""


def rows_of(x: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yield (first row, rows) of an array, a few million entries at a time; pages of a memory map are released afterwards."""
    for some in slices(len(x), fitting(math.prod(x.shape[1:]), CHUNK)):
        yield some.start, x[some]
        forget(x)


def forget(x: np.ndarray) -> None:
    """Release the pages of a memory map that were read; the system may keep them in its cache."""
    pages = getattr(x, "_mmap", None)
    if isinstance(pages, mmap.mmap) and getattr(x, "mode", "") == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)
