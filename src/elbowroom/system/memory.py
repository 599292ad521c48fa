"""Memory: splitting work into parts that fit, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable

from elbowroom.errors import first_line

ARRAY = 2**22  # numbers in a working array: 32 MB in double precision; several are held at once
LARGE_ARRAY = 2**24  # numbers in the largest array of a method
_RAN_OUT = (
    *("can't allocate memory", "out of memory", "Storage size calculation overflowed", "integer multiplication overflow"),
    *("Maximum allowed dimension exceeded", "array is too big", "Maximum allowed size exceeded", "too large to convert to C"),
    *("too big to convert", "cannot fit 'int' into an index-sized integer", "Overflow when unpacking long"),
)
_BYTES = re.compile(r"tried to allocate (\d+) bytes")


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
    """Whether an error says that memory of the machine, or of a GPU, was refused: NumPy's, torch's and Python's own.

    So do sizes that no machine can hold, which overflow before any memory is asked for.
    """
    return isinstance(error, MemoryError) or any(said in str(error) for said in _RAN_OUT)


def asked_for(error: BaseException) -> str:
    """Return what was asked for when memory ran out, such as `7,276 GB`; the first line of the error where it does not say."""
    found = _BYTES.search(str(error))
    return f"{int(found[1]) / 1e9:,.1f} GB" if found else first_line(error)


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
