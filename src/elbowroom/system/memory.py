"""Memory that was freed but is still held by this process."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


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
