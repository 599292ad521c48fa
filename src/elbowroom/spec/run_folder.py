"""The run folder: names of its files, and checks before it is written to."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elbowroom.components.schema import short
from elbowroom.data.dataset import Split
from elbowroom.errors import RunFolderError
from elbowroom.spec import document
from elbowroom.system.archive import read_npz
from elbowroom.system.files import atomic, is_ours, move_aside, write_text

SPEC, SPLIT, WEIGHTS = "spec.yaml", "split.npz", "weights.pt"
AUDIT, LATENT = "audit.nc", "latent.nc"
AUDITS, ANSWERS = "audits", "answers"

Use = Literal["new", "resume", "replace"]


def check(path: Path, identity: str, tree: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Use:
    """Say how a folder can be used for a fit; nothing is written.

    Args:
        path: the folder, which need not exist.
        identity: hash of everything that the fit depends on.
        tree: the resolved spec, to name the first difference from another experiment.
        overwrite: rename an existing run first.
        resume: continue an existing run.

    Raises:
        RunFolderError: the folder is used and neither option was given, is not a run folder, belongs to another experiment, or
            cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: this is a file; name a folder with --out")
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"{path}: cannot be written ({there} is not a writable folder); name another with --out")
    if not path.is_dir() or all(is_ours(entry.name) for entry in path.iterdir()):
        return "new"
    if not (path / SPEC).is_file():
        raise RunFolderError(f"{path}: is not empty and not a run folder (it has no {SPEC}); name another with --out")
    if overwrite:
        if path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise RunFolderError(f"{path}: the working folder cannot be moved aside; go elsewhere, or name another with --out")
        return "replace"
    if not resume:
        raise RunFolderError(
            f"{path}: holds a run already; use --resume to go on, --overwrite to move it aside, or another --out"
        )
    theirs = document.read(path / SPEC)
    record = theirs.get("record")
    if not isinstance(record, dict) or record.get("experiment") != identity:
        raise RunFolderError(
            f"{path}: belongs to another experiment{_difference(theirs, tree)}; "
            "use --overwrite to move it aside, or another --out"
        )
    return "resume"


def claim(path: Path, tree: Mapping[str, Any], use: Use) -> None:
    """Prepare a locked folder for a fit: rename the old run, write `spec.yaml`.

    `use` is the result of `check`. `resume` keeps the record; settings that the fit does not depend on may change.
    """
    if use == "replace":
        move_aside(path)
    if use == "resume":
        theirs = document.read(path / SPEC)
        tree = {**tree, "record": theirs["record"]}
        if tree == theirs:
            return
    write_text(path / SPEC, document.write(tree))


def name_for(path: str | Path) -> str:
    """Return a folder name for a file: its stem without leading dots, so that it cannot lead to another folder."""
    return Path(path).stem.lstrip(".") or "unnamed"


def write_split(path: Path, split: Split) -> None:
    """Write the row numbers of train, validation and test, int64, to an .npz."""
    with atomic(path) as temporary:
        np.savez(temporary, train=split.train, validation=split.validation, test=split.test)


def check_rows(path: Path, split: Split, n: int) -> None:
    """Raise a RunFolderError if a split, read from `path`, names a row that data of n rows do not have."""
    most = max((int(part.max()) for part in (split.train, split.validation, split.test) if len(part)), default=0)
    if most >= n:
        raise RunFolderError(f"{path}: damaged (it names row {most} of {n}, counted from 0); fit again with --overwrite")


def read_split(path: Path) -> Split:
    """Read `split.npz`; a RunFolderError if it is missing or damaged, names a row twice, or a negative one."""
    try:
        rows = read_npz(path, ("train", "validation", "test"))
    except FileNotFoundError:
        raise RunFolderError(f"{path}: missing; go on with `elbowroom fit SPEC --resume`") from None
    except Exception as error:
        raise RunFolderError(f"{path}: damaged ({str(error)[:80]}); fit again with --overwrite") from None
    if any(part.ndim != 1 or part.dtype.kind not in "iu" for part in rows.values()):
        raise RunFolderError(f"{path}: damaged (row numbers are whole numbers); fit again with --overwrite")
    every = np.concatenate([part.astype(np.int64) for part in rows.values()])
    if len(np.unique(every)) < len(every):
        raise RunFolderError(f"{path}: damaged (a row is named twice); fit again with --overwrite")
    if (every < 0).any():
        raise RunFolderError(f"{path}: damaged (row {every.min()}); fit again with --overwrite")
    return Split(**{name: part.astype(np.int64) for name, part in rows.items()})


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Name the first setting that differs between two specs, of those that the fit depends on."""
    parts = ("data", "model", "guide", "fit", "seed")
    old = dict(_leaves({part: theirs.get(part) for part in parts}))
    new = dict(_leaves({part: ours.get(part) for part in parts}))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key) and key not in ("fit.device", "data.path"):
            return f" ({key} is {short(old.get(key))} there, {short(new.get(key))} here)"
    return " (other data)"


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
