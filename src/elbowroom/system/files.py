"""Files that are whole or absent, and folders that one process writes to at a time.

A file is written under a temporary name in its own folder, synced, and renamed; then the folder is synced. A process that
is killed on the way leaves at most a temporary file, which the next one removes. A folder is claimed by a lock that the
kernel drops with the process, so that a dead process never leaves one behind.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elbowroom.errors import RunFolderError

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock: there, nobody is told
    fcntl = None

LOCK = ".lock"
SUBFOLDERS = ("posteriors", "figures")

_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<pid>\d{1,10})\.tmp(?P<suffix>\.[^.]+)?")
_held: dict[Path, int] = {}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure it is removed.

    Args:
        path: the file to write. Its folder is created. What a dead process left of it is removed.

    Yields:
        The temporary path to write to. It ends in the suffix of `path`, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, of=path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk; where a file system cannot, nothing is done."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_ours(name: str) -> bool:
    """Say whether a name is that of a lock or of a temporary file, which make no folder a used one."""
    return name == LOCK or _TEMPORARY.fullmatch(name) is not None


def sweep(folder: Path, *, of: Path | None = None) -> None:
    """Remove temporary files of dead processes.

    Args:
        folder: where to look, not below it.
        of: only those of this file, and only where their process is dead; None means all but this process's own, for a
            folder that this process has locked.
    """
    if not folder.is_dir():
        return
    for entry in list(os.scandir(folder)):
        found = _TEMPORARY.fullmatch(entry.name)
        if found is None or int(found["pid"]) == os.getpid() or not entry.is_file(follow_symlinks=False):
            continue
        if of is not None and ((found["stem"], found["suffix"] or "") != (of.stem, of.suffix) or _alive(int(found["pid"]))):
            continue
        Path(entry.path).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Claim a folder for this process, and remove what dead ones left half-written in it.

    Claims nest: a folder that this process holds is given again at once.

    Args:
        folder: it is created; one that was created and stays empty is removed at the end.

    Raises:
        RunFolderError: another process holds it.
    """
    folder = Path(folder)
    key = folder.resolve()
    if key in _held:
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    _held[key] = _acquire(folder)
    try:
        for place in (folder, *(folder / name for name in SUBFOLDERS)):
            sweep(place)
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink()  # whoever waits for it looks whether it is still the one in the folder
            if made and not os.listdir(folder):
                folder.rmdir()
        os.close(_held.pop(key))


def move_aside(folder: Path) -> Path:
    """Rename a folder that this process has locked to the first free `<name>.1`, `<name>.2`, ...; claim the old name anew.

    The rename is one step: at any moment the old folder is whole under one of the two names.

    Returns:
        The new path of the old folder.
    """
    key, number = folder.resolve(), 1
    while True:
        aside = folder.with_name(f"{folder.name}.{number}")
        if not aside.exists() and not aside.is_symlink():
            try:
                folder.rename(aside)
                break
            except OSError:
                if not aside.exists():
                    raise
        number += 1
    sync_folder(aside.parent)
    if key in _held:
        folder.mkdir(parents=True, exist_ok=True)
        new = _acquire(folder)
        os.close(_held[key])
        _held[key] = new
    return aside


def _acquire(folder: Path) -> int:
    """Lock the lock file of a folder and return its handle."""
    path = folder / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError:  # another process has just given the folder up
            folder.mkdir(parents=True, exist_ok=True)
            continue
        if fcntl is None:  # pragma: no cover
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            who = f" (process {owner})" if owner.isdigit() else ""
            raise RunFolderError(
                f"{folder}: another elbowroom{who} is writing to this folder; wait until it has ended, or use another folder"
            ) from None
        except OSError:  # a file system without locks
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                with suppress(OSError):
                    os.ftruncate(handle, 0)
                    os.write(handle, f"{os.getpid()}\n".encode())
                return handle
        os.close(handle)  # the folder was moved or removed in between


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` atomically, as UTF-8."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sha256(*parts: bytes) -> str:
    """Return the hexadecimal SHA-256 digest of the concatenated parts."""
    return sha256_of(parts)


def sha256_of(parts: Iterable[bytes]) -> str:
    """Return the hexadecimal SHA-256 digest of parts that are made one after the other, so that one is held at a time."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
