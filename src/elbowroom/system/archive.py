"""Archives from outside: sizes are looked at before anything is unpacked, and nothing in them is ever run.

A zip archive of a few kilobytes can claim, or truly hold, more than any machine's memory. What an archive says of itself
is compared with what it holds and with the memory of this machine, before a byte of it is read.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from elbowroom.errors import DataError

SHARE = 0.5
"""Largest share of this machine's memory that one array from a file may take."""


def memory() -> int:
    """Return the bytes of memory of this machine; 8 GB where that is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # pragma: no cover - not POSIX
        return 8 * 10**9


def too_large(size: float) -> str | None:
    """Say why something of so many bytes is not read into memory; None when it fits."""
    if size <= SHARE * memory():
        return None
    return f"unpacks to {amount(size)}, and this machine has {amount(memory())} of memory"


def amount(size: float) -> str:
    """Return a number of bytes in words, such as `3.2 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.{0 if size >= 100 * factor else 1}f} {unit}"
    return f"{int(size)} bytes"


def check_npz(source: str | Path | IO[bytes], key: str, label: str) -> None:
    """Check the size of one array of an .npz: what it says, what it holds, and what fits into memory.

    Args:
        source: the archive.
        key: the array's name.
        label: the file's name for messages.

    Raises:
        DataError: it is too large, or its header and its contents disagree.
        zipfile.BadZipFile, ValueError: it is no archive, or the array no array.
    """
    with zipfile.ZipFile(source) as archive:
        members = archive.namelist()
        info = archive.getinfo(key if key in members else f"{key}.npy")
        if problem := too_large(info.file_size):
            raise DataError(f"{label}: {key} {problem}; save it as .npy, which is read piece by piece")
        with archive.open(info) as member:
            shape, dtype = _header(member)
            if dtype.hasobject:
                return  # NumPy refuses it in its own words
            said = member.tell() + math.prod(shape) * dtype.itemsize
        if said != info.file_size:
            sizes = f"{key} should take {amount(said)}, it holds {amount(info.file_size)}"
            raise DataError(f"{label}: damaged or cut short ({sizes}); write it again")


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def read_npz(path: Path, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read arrays of an .npz into memory, sizes first, no Python objects ever.

    Args:
        path: the archive.
        names: which arrays; all by default.

    Raises:
        DataError: an array is too large, or disagrees with its header.
        Exception: whatever NumPy and zipfile say of a damaged file.
    """
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("not an .npz archive")
        found = {}
        for name in names or tuple(arrays.files):
            check_npz(path, name, path.name)
            found[name] = np.asarray(arrays[name])
        return found


def check_stored(path: Path) -> None:
    """Refuse a zip archive whose members are packed: PyTorch never packs, and what is not packed cannot swell.

    Raises:
        ValueError: a member is packed, or claims to be larger than the file.
    """
    if not zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                raise ValueError(f"{info.filename} is packed, which PyTorch never does")
