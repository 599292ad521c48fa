"""Finished parts of an audit on disk, by block and method, so that an interrupted audit can resume.

Each part is one file, complete or absent, named by the hash of all its inputs. A part that is damaged or has other inputs is
computed again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elbowroom.analysis.measures.distances import Comparison
from elbowroom.inference.fit import checkpoint
from elbowroom.inference.posterior import Evidence, Posterior, Reference
from elbowroom.system.archive import check_stored
from elbowroom.system.files import sha256
from elbowroom.system.stages import stage

log = logging.getLogger("elbowroom")

FOLDER = "parts"


@dataclasses.dataclass(frozen=True)
class Part:
    """A method's posterior of one block of data, and the guide's comparison with it (None for the guide itself)."""

    posterior: Posterior
    comparison: Comparison | None = None


class Store:
    """Parts of an audit on disk.

    Args:
        folder: the audit's folder; parts go into its subfolder `parts/`.
        identity: all inputs of the parts other than block, method and seed: data, weights, options.
        resume: use existing parts; otherwise they are removed.
        device: where tensors are loaded.
    """

    def __init__(
        self, folder: str | Path, identity: Mapping[str, Any], *, resume: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        self.folder, self.device = Path(folder) / FOLDER, device
        self.identity = json.dumps(identity, sort_keys=True, default=repr)
        if not resume:
            self.clear()

    def key(self, name: str, *facts: object) -> str:
        """Return the hash that names a part."""
        return sha256(json.dumps([self.identity, name, *facts], default=repr).encode())

    def remember(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the stored plan of the audit; store `facts` as the plan where there is none."""
        path = self.folder / f"{self.key('plan')}.pt"
        there = self._read(path)
        if isinstance(there, dict) and set(there) == set(facts):
            return there
        self._write(path, dict(facts))
        return dict(facts)

    def known(self) -> dict[str, Any] | None:
        """Return the stored plan of the audit, or None."""
        found = self._read(self.folder / f"{self.key('plan')}.pt")
        return found if isinstance(found, dict) else None

    def get(self, key: str) -> Part | None:
        """Return a part, or None where there is no usable one."""
        path = self.folder / f"{key}.pt"
        found = self._read(path)
        if found is None:
            return None
        try:
            if found["key"] != key:
                raise ValueError("another part's contents")
            posterior, comparison = dict(found["posterior"]), found["comparison"]
            if posterior["evidence"] is not None:
                posterior["evidence"] = Evidence(**posterior["evidence"])
            return Part(Posterior(**posterior), None if comparison is None else Comparison(**comparison))
        except (KeyError, TypeError, ValueError) as error:
            self._damaged(path, error)
            return None

    @stage("parts kept")
    def put(self, key: str, part: Part) -> None:
        """Write a part."""
        posterior = _plain(part.posterior)
        if part.posterior.evidence is not None:
            posterior["evidence"] = _plain(part.posterior.evidence)
        posterior["status"], posterior["reason"] = list(part.posterior.status), list(part.posterior.reason)
        comparison = None if part.comparison is None else _plain(part.comparison)
        self._write(self.folder / f"{key}.pt", {"key": key, "posterior": posterior, "comparison": comparison})

    def clear(self) -> None:
        """Remove all parts."""
        if self.folder.is_symlink() or self.folder.is_file():
            self.folder.unlink()
        elif self.folder.is_dir():
            shutil.rmtree(self.folder)

    def _write(self, path: Path, contents: dict[str, Any]) -> None:
        checkpoint.save(path, contents)

    def _read(self, path: Path) -> Any:
        if not path.is_file():
            return None
        try:
            check_stored(path)
            return torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:  # a damaged file can raise any exception
            self._damaged(path, error)
            return None

    @staticmethod
    def _damaged(path: Path, error: Exception) -> None:
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0][:80]
        log.warning("%s: damaged (%s); this part is computed again", path, reason)


def described(method: Reference) -> dict[str, str]:
    """Return a reference's name and options, as they enter a part's key."""
    options = {key: repr(value) for key, value in sorted(vars(method).items())}
    return {"reference": method.name, **options}


def _plain(thing: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, with tensors copied out of larger storage."""
    return {f.name: _own(getattr(thing, f.name)) for f in dataclasses.fields(thing)}


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return value
