"""What an audit has found so far, block by block and method by method, so that one that was killed can go on.

Each part is one file, whole or absent, named by the hash of everything that it depends on. A part that is damaged, or of
anything else, is not used: it is computed again.
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
    """A method's posterior of one block of data, and what the guide is beside it (None for the guide itself)."""

    posterior: Posterior
    comparison: Comparison | None = None


class Store:
    """Parts of an audit on disk.

    Args:
        folder: the audit's folder; parts go into `parts/` in it.
        identity: everything that the parts depend on beside block, method and seed: data, weights, options.
        resume: use parts that are there; else they are removed.
        device: where tensors are loaded to.
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
        """Return the plan of the audit that is continued; keep this one where there is none."""
        path = self.folder / f"{self.key('plan')}.pt"
        there = self._read(path)
        if isinstance(there, dict) and set(there) == set(facts):
            return there
        self._write(path, dict(facts))
        return dict(facts)

    def known(self) -> dict[str, Any] | None:
        """Return the plan of the audit that is continued, if there is one."""
        found = self._read(self.folder / f"{self.key('plan')}.pt")
        return found if isinstance(found, dict) else None

    def get(self, key: str) -> Part | None:
        """Return a part, or None where there is none that can be used."""
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
        except Exception as error:  # what a damaged file raises is anyone's guess
            self._damaged(path, error)
            return None

    @staticmethod
    def _damaged(path: Path, error: Exception) -> None:
        reason = (str(error).split(". ")[0].splitlines() or [type(error).__name__])[0][:80]
        log.warning("%s: damaged (%s); this part is computed again", path, reason)


def described(method: Reference) -> dict[str, str]:
    """Return a reference's name and options, as a part's key holds them."""
    options = {key: repr(value) for key, value in sorted(vars(method).items())}
    return {"reference": method.name, **options}


def _plain(thing: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, tensors without what they were cut from."""
    return {f.name: _own(getattr(thing, f.name)) for f in dataclasses.fields(thing)}


def _own(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone(memory_format=torch.contiguous_format)
    if isinstance(value, dict):
        return {key: _own(item) for key, item in value.items()}
    return value
