"""Atomic writing of files, and locks of folders and of files.

A file is written under a temporary name in its own folder, synced, and renamed; then the folder is synced. A process that is
killed before that leaves at most a temporary file, which the next process removes. The kernel releases a lock when its
process ends, so that a dead process never leaves one. Links inside a locked folder are refused, since what is written or
removed through them is not Elbowroom's.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from elbowroom.errors import RunFolderError, first_line
from elbowroom.system.paths import unreadable

fcntl: Any
try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock: folders are not locked there
    fcntl = None

LOCK = ".lock"
SUBFOLDERS = ("posteriors", "figures")
ENTRIES = {
    *("spec.yaml", "split.npz", "weights.pt", "checkpoint.pt", "history.csv", "precision.json", "report.html"),
    *("audit.nc", "audit.csv", "latent.nc", "diagnosis.nc", *SUBFOLDERS, "parts", "answers", "audits", "profile", LOCK),
}
"""What Elbowroom writes into a run folder; other entries are the user's."""

claims: list[Path] = []
"""The folders and files that this process has locked, in order: where it may have written."""

_TEMPORARY = re.compile(r"\.(?P<stem>.+)\.(?P<pid>\d{1,10})\.tmp(?P<suffix>\.[^.]+)?")
_FILE_LOCK = re.compile(r"\..+\.lock")
_held: dict[Path, int] = {}


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path` in one step, on failure it is removed.

    Args:
        path: the file to write. Its folder is created, and temporary files of dead processes for it are removed.

    Yields:
        The temporary path to write to, with the suffix of `path`.

    Raises:
        OSError: the system refuses it, or `path` is a folder, a device or a pipe; it names `path`.
    """
    path = Path(path)
    if path.exists() and unreadable(path):
        raise FileExistsError(errno.EEXIST, "this is no regular file; name another", str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, of=path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with temporary.open("rb+") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or first_line(error), str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk; does nothing where the file system cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def is_ours(name: str) -> bool:
    """Say whether a name is that of a lock or a temporary file; a folder with only these counts as empty."""
    return name == LOCK or any(pattern.fullmatch(name) for pattern in (_TEMPORARY, _FILE_LOCK))


def sweep(folder: Path, *, of: Path | None = None) -> None:
    """Remove temporary files of dead processes from a folder, not from its subfolders.

    Args:
        folder: the folder.
        of: only temporary files of this file whose process is dead. None removes all but those of this process, for a folder
            that this process has locked.
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


def refuse_links(folder: str | Path) -> None:
    """Raise a RunFolderError at the first link, at any depth, among what Elbowroom writes into a folder."""
    waiting = [entry for entry in _entries(folder) if entry.name in ENTRIES]
    while waiting:
        entry = waiting.pop()
        if entry.is_symlink():
            refuse_link(Path(entry.path))
        if entry.is_dir(follow_symlinks=False):
            waiting += _entries(entry.path)


def refuse_link(path: Path) -> None:
    """Raise a RunFolderError if a path is a link."""
    if path.is_symlink():
        raise RunFolderError(
            f"{path}: is a link (to {os.readlink(path)}), and links are not written through; remove it, or put there what it "
            "leads to"
        )


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    try:
        return sorted(os.scandir(folder), key=lambda entry: entry.name, reverse=True)
    except OSError:  # it is not there, or not for us: then nothing is written into it either
        return []


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Lock a folder for this process, and remove temporary files that dead processes left in it.

    Locks nest: a process can lock a folder again that it holds.

    Args:
        folder: it is created if needed; a folder that was created here and stays empty is removed at the end.

    Raises:
        RunFolderError: another process holds the lock, or something of Elbowroom's in the folder is a link.
    """
    folder = Path(folder)
    if _real(folder) not in _held:
        refuse_links(folder)
    other = f"{folder}: another elbowroom%s is writing to this folder; wait until it has ended, or use another folder"
    with _hold(_real(folder), folder / LOCK, other) as new:
        if new:
            for place in (folder, *(folder / name for name in SUBFOLDERS)):
                sweep(place)
        yield


@contextmanager
def claimed(path: str | Path) -> Iterator[None]:
    """Lock a file that this process will write, by a lock file beside it; nests as `locked` does.

    Args:
        path: the file. Its folder is created if needed; if it was created here and stays empty, it is removed at the end.

    Raises:
        RunFolderError: another process holds the lock.
    """
    path = Path(path)
    other = f"{path}: another elbowroom%s is writing this file; wait until it has ended, or name another with --out"
    with _hold(_real(path.parent) / path.name, path.with_name(f".{path.name}{LOCK}"), other, named=path):
        yield


def _real(path: Path) -> Path:
    """Return a path without links; where they lead in a circle, the system refuses it when it is used."""
    return Path(os.path.realpath(path))


@contextmanager
def _hold(key: Path, lock: Path, other: str, named: Path | None = None) -> Iterator[bool]:
    """Hold a lock file while the context is open; yield whether this process did not hold it already.

    Where the system refuses the lock of a file, its error names the file.
    """
    if key in _held:
        yield False
        return
    made = not lock.parent.exists()
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        _held[key] = _acquire(lock, other)
    except OSError as error:
        error.filename = error.filename if named is None else str(named)
        raise
    claims.append(lock.parent if lock.name == LOCK else lock.with_name(lock.name[1 : -len(LOCK)]))
    try:
        yield True
    finally:
        with suppress(OSError):
            lock.unlink()  # a waiting process checks that its lock file is still the one in the folder
            if made and not os.listdir(lock.parent):
                lock.parent.rmdir()
        os.close(_held.pop(key))


def move_aside(folder: Path) -> Path:
    """Rename a folder that this process has locked to the first free `<name>.1`, `<name>.2`, ...; lock the old name again.

    The rename is one step: at any moment the old folder is complete under one of the two names. Returns its new path.
    """
    key, number = _real(folder), 1
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
        new = _acquire(folder / LOCK, f"{folder}: another elbowroom%s has taken this folder; use another")
        os.close(_held[key])
        _held[key] = new
    return aside


def _acquire(path: Path, other: str) -> int:
    """Lock a lock file; where another process holds it, raise a RunFolderError that says `other`, with who it is for %s."""
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0), 0o644)
        except FileNotFoundError:  # another process has just removed the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        if fcntl is None:  # pragma: no cover
            return handle
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(handle, 20).decode("ascii", "replace").strip()
            os.close(handle)
            who = f" (process {owner})" if owner.isdigit() else ""
            raise RunFolderError(who.join(other.rsplit("%s", 1))) from None
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
    """Return the hexadecimal SHA-256 digest of the concatenated parts, which an iterator may produce one at a time."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
