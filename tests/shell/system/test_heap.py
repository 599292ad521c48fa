"""Memory that blocks of work leave behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from elbowroom.system import memory

# what is freed lies between what is kept
GAPS = """
import ctypes, sys
from elbowroom.system import memory as heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.mallopt(-3, 1 << 30)  # on the heap, as large arrays come to be after some were freed; else each is a map of its own
places = [libc.malloc(1 << 20) for _ in range(200)]
for place in places:
    ctypes.memset(place, 1, 1 << 20)
for place in places[::2]:
    libc.free(place)
if sys.argv[1] == "trim":
    heap.trim()
status = open("/proc/self/status").read()
print(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
"""


def resident(trimmed: str) -> float:
    """Return the resident memory after 100 of 200 MiB were freed, in MiB."""
    command = [sys.executable, "-c", GAPS, trimmed]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024


@pytest.mark.skipif(memory._trim() is None or not Path("/proc/self/status").exists(), reason="the C library cannot")
def test_gaps_are_given_back():
    held, given = resident("not"), resident("trim")
    assert held > 200  # or this shows nothing
    assert given < held - 90


def test_without_such_a_c_library_nothing_happens(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_trim", lambda: None)
    memory.trim()
