"""Memory: splitting work into parts that fit, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

ARRAY = 2**22  # numbers in a working array: 32 MB in double precision; several are held at once
LARGE_ARRAY = 2**24  # numbers in the largest array of a method


def fitting(each: int, budget: int) -> int:
    """Return how many rows of `each` numbers fit into a budget of numbers; at least one."""
    return max(1, budget // max(1, each))


def slices(total: int, size: int) -> list[slice]:
    """Split 0 .. total - 1 into slices of `size`; the last may be shorter."""
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def sizes(total: int, size: int) -> list[int]:
    """Return the length of each of the `slices`."""
    return [part.stop - part.start for part in slices(total, size)]


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory of the machine, or of a GPU, was refused: NumPy's, torch's and Python's own."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


def trim() -> None:
    """Return free memory pages to the system, where the C library can (glibc).

    Computing in blocks frees large arrays and keeps small ones, which fragment the heap: the large arrays of the next block no
    longer fit into the gaps, and the heap grows with each block. See `man malloc_trim` and
    https://distributed.dask.org/en/stable/worker-memory.html
    """
    give_back = _trim()
    if give_back is not None:
        give_back(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or Windows, where CDLL(None) fails
        return None
    return found
