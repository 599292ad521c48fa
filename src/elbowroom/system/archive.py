"""Safe reading of archives: sizes are checked before anything is unpacked, and nothing in an archive is executed.

A small zip archive can declare, or unpack to, more bytes than a machine has memory. The declared size, the size of the contents
and the memory of this machine are compared before any data are read.
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from elbowroom.errors import DataError
from elbowroom.system.paths import unreadable

if TYPE_CHECKING:
    import numpy as np  # imported where it is needed: `elbowroom --help` is quick

SHARE = 0.5
"""Largest share of this machine's memory that one array of a file may take."""


def memory() -> int:
    """Return the bytes of memory of this machine; 8 GB where that is unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # pragma: no cover - not POSIX
        return 8 * 10**9


def too_large(size: float) -> str | None:
    """Say why so many bytes cannot be read into memory; None if they fit."""
    if size <= SHARE * memory():
        return None
    return f"unpacks to {amount(size)}, and this machine has {amount(memory())} of memory"


def amount(size: float) -> str:
    """Format a number of bytes, such as `3.2 GB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:,.{0 if size >= 100 * factor else 1}f} {unit}"
    return f"{int(size)} bytes"


def check_npz(source: str | Path | IO[bytes], key: str, label: str) -> None:
    """Check that one array of an .npz fits into memory, and that its header agrees with its contents.

    `label` is the name of the file in messages.

    Raises:
        DataError: it is too large, or its header and its contents disagree.
        zipfile.BadZipFile, ValueError: the file is not an archive, or its entry is not an array.
    """
    with zipfile.ZipFile(source) as archive:
        members = archive.namelist()
        info = archive.getinfo(key if key in members else f"{key}.npy")
        if problem := too_large(info.file_size):
            raise DataError(f"{label}: {key} {problem}; save it as .npy, which is read piece by piece")
        with archive.open(info) as member:
            shape, dtype = _header(member)
            if dtype.hasobject:
                return  # NumPy raises its own error
            said = member.tell() + math.prod(shape) * dtype.itemsize
        if said != info.file_size or min(shape, default=0) < 0:
            sizes = f"{key} should take {amount(said)}, it holds {amount(info.file_size)}"
            raise DataError(f"{label}: damaged or cut short ({sizes}); write it again")


def check_npy(path: Path, label: str) -> None:
    """Check that an .npy file holds all numbers that its header promises; `label` names it in messages.

    Raises:
        DataError: it does not.
        ValueError: it has no such header.
    """
    with path.open("rb") as file:
        shape, dtype = _header(file)
        said = file.tell() + math.prod(shape) * dtype.itemsize
    if (said > path.stat().st_size or min(shape, default=0) < 0) and not dtype.hasobject:
        raise DataError(
            f"{label}: damaged or cut short (shape {shape}, it holds {amount(path.stat().st_size)}); write it again"
        )


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    import numpy as np

    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(member)
    if not all(isinstance(n, int) for n in shape):
        raise ValueError(f"shape {shape}")
    return shape, dtype


def read_npz(path: Path, names: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Read arrays of an .npz (all if `names` is empty); sizes are checked first, Python objects are refused.

    Raises:
        DataError: an array is too large, or disagrees with its header.
        Exception: any error that NumPy and zipfile raise on a damaged file.
    """
    if problem := unreadable(path):
        raise ValueError(problem)
    import numpy as np

    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as arrays:
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("not an .npz archive")
        found = {}
        for name in names or tuple(arrays.files):
            check_npz(path, name, path.name)
            found[name] = np.asarray(arrays[name])
        return found


def check_stored(path: Path) -> None:
    """Refuse a zip archive with compressed members; PyTorch writes none, and only compressed members can grow when read.

    Raises:
        ValueError: it is no regular file, a member is compressed, or declares more bytes than the file has.
    """
    if problem := unreadable(path):
        raise ValueError(problem)
    if not zipfile.is_zipfile(path):
        return
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
                raise ValueError(f"{info.filename} is packed, which PyTorch never does")
