"""The run folder: what lies in it, when it may be written to, and whose it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from elbowroom import document
from elbowroom.data import Split
from elbowroom.errors import RunFolderError
from elbowroom.files import atomic
from elbowroom.schema import short

SPEC, SPLIT, WEIGHTS, LATENT, REPORT = "spec.yaml", "split.npz", "weights.pt", "latent.nc", "report.html"
POSTERIORS, AUDITS = "posteriors", "audits"

Use = Literal["new", "resume", "replace"]


def check(path: Path, identity: str, tree: Mapping[str, Any], *, overwrite: bool, resume: bool) -> Use:
    """Say how a folder may be used for a fit; nothing is written.

    Args:
        path: the folder, which may not exist yet.
        identity: hash of all that the fit depends on.
        tree: the resolved spec, to say in what another experiment differs.
        overwrite: move a run that is there aside.
        resume: go on with the run that is there.

    Raises:
        RunFolderError: it is in the way, is no run folder, belongs to another experiment, or cannot be written to.
    """
    if path.exists() and not path.is_dir():
        raise RunFolderError(f"{path}: this is a file; name a folder with --out")
    there = next((p for p in (path, *path.absolute().parents) if p.exists()), Path("/"))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RunFolderError(f"{path}: cannot be written ({there} is not a writable folder); name another with --out")
    if not path.is_dir() or not any(path.iterdir()):
        return "new"
    if not (path / SPEC).is_file():
        raise RunFolderError(f"{path}: is not empty and not a run folder (it has no {SPEC}); name another with --out")
    if overwrite:
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


def set_aside(path: Path) -> Path:
    """Move a folder to the first free name `<name>.1`, `<name>.2`, ... beside it and return that."""
    number = 1
    while (aside := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return path.rename(aside)


def write_split(path: Path, split: Split) -> None:
    """Write the row numbers of train, validation and test, int64, to an .npz."""
    with atomic(path) as temporary:
        np.savez(temporary, train=split.train, validation=split.validation, test=split.test)


def read_split(path: Path) -> Split:
    """Read `split.npz`.

    Raises:
        RunFolderError: it is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return Split(train=archive["train"], validation=archive["validation"], test=archive["test"])
    except FileNotFoundError:
        raise RunFolderError(f"{path}: missing; go on with `elbowroom fit SPEC --resume`") from None
    except Exception as error:
        raise RunFolderError(f"{path}: damaged ({str(error)[:80]}); fit again with --overwrite") from None


def _difference(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Name the first setting in which two specs differ, of those that the fit depends on."""
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
