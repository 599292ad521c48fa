"""Memory: how much work fits into a part of it, and what was freed but is still held by this process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

ARRAY = 2**22  # numbers in a working array, of which several are held at once: 32 MB each in double precision
LARGE_ARRAY = 2**24  # numbers in the largest array of a method


def fitting(each: int, budget: int) -> int:
    """Return how many rows of `each` numbers fit into a budget of numbers; one at least."""
    return max(1, budget // max(1, each))


def slices(total: int, size: int) -> list[slice]:
    """Split 0 .. total - 1 into parts of `size`; the last holds what is left."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def sizes(total: int, size: int) -> list[int]:
    """Return how many each of the `slices` holds."""
    return [part.stop - part.start for part in slices(total, size)]


def trim() -> None:
    """Give free pages back to the system, where the C library can (glibc).

    Work in blocks frees large arrays and keeps small ones. Small ones that come to lie in the gaps make these too short for the
    next block's arrays, so that the heap grows by a block each time, though next to nothing in it is in use.
    `man malloc_trim`; https://distributed.dask.org/en/stable/worker-memory.html
    """
    give_back = _trim()
    if give_back is not None:
        give_back(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library; Windows has no name for the process itself
        return None
    return found
