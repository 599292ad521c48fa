"""Checkpoints of a fit: whole or absent, free of pickled code, and refused where they belong to another fit."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elbowroom.errors import RunFolderError
from elbowroom.inference.fit.rows import Rows
from elbowroom.system.archive import check_stored
from elbowroom.system.files import atomic, sha256, sha256_of
from elbowroom.system.stages import stage

KEYS = ("identity", "rows", "best_epoch", "stopped_because", "model", "optimizer", "best", "rng", "cuda_rng", "shuffle")
"""What every checkpoint of a fit holds."""


def identity(
    module: nn.Module, data: Sequence[Tensor | Rows], *, options: Mapping[str, Any], seed: int, spec: str
) -> dict[str, str]:
    """Describe what a checkpoint must share with a fit to be resumed by it: data, options, seed, module and spec.

    Args:
        module: its structure and the shapes of its state count, not the values.
        data: all that the fit sees; all their bytes count.
        options: of the fit, as plain numbers and strings.
        seed: of the fit.
        spec: whatever else tells fits apart.
    """
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    return {
        "data": sha256_of(part for x in data for part in Rows.of(x).bytes()),
        "options": json.dumps(options, sort_keys=True),
        "seed": str(seed),
        "model": sha256(repr(module).encode(), repr(shapes).encode()),
        "spec": spec,
    }


@stage("checkpoint")
def save(path: Path, value: Mapping[str, Any]) -> None:
    """Write tensors and plain values to `path` atomically; `torch.load(path, weights_only=True)` reads them."""
    with atomic(path) as temporary:
        packed = io.BytesIO()  # torch's own writer hides what the disk says
        torch.save(value, packed)
        temporary.write_bytes(packed.getbuffer())


def read(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, whosever it is.

    Raises:
        RunFolderError: it is not readable.
    """
    try:
        check_stored(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not set(KEYS) <= set(state) or not isinstance(state["identity"], dict):
            raise ValueError("it holds something else")
    except Exception as error:
        reason = str(error).split(". ")[0]
        raise RunFolderError(f"{path}: is not a readable checkpoint ({reason}); start anew with --overwrite") from error
    return state


def load(path: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """Read the checkpoint of one fit onto the CPU.

    Raises:
        RunFolderError: it is not readable, or belongs to a fit with another identity; says in what they differ.
    """
    state = read(path)
    theirs = state["identity"]
    if theirs != identity:
        difference = _difference(theirs, identity)
        raise RunFolderError(f"{path}: {difference}; start anew with --overwrite or another --out")
    return state


def _difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Say in what a checkpoint belongs to another fit."""
    kinds = [kind for kind in ours if theirs.get(kind) != ours[kind]]
    if kinds == ["options"]:
        old, new = json.loads(theirs["options"]), json.loads(ours["options"])
        changed = [f"fit.{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]]
        return f"belongs to a fit with other options ({', '.join(changed)})"
    return f"belongs to a fit with another {', '.join(kinds)}"
