"""Large arrays in pieces, so that no more of a file is in memory than is looked at."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np

from elbowroom.system.memory import fitting, slices

CHUNK = 2**22
"""Entries looked at together, so that a memory-mapped array is never read as a whole."""
BUDGET = 2**30
"""Bytes of data, as they are or in the precision of the fit, above which they are read as needed and not held in memory."""


def rows_of(x: np.ndarray) -> Iterator[tuple[int, Any]]:
    """Yield (first row, rows) of an array, a few million entries at a time; of a memory map nothing else stays in memory."""
    for some in slices(len(x), fitting(math.prod(x.shape[1:]), CHUNK)):
        yield some.start, x[some]
        forget(x)


def forget(x: np.ndarray) -> None:
    """Let go of the pages of a memory map that were read; the system may still have them cached."""
    pages = getattr(x, "_mmap", None)
    if isinstance(pages, mmap.mmap) and getattr(x, "mode", "") == "r" and hasattr(mmap, "MADV_DONTNEED"):
        pages.madvise(mmap.MADV_DONTNEED)
