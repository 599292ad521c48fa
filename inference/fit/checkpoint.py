"""Checkpoints of a fit: written atomically, free of pickled code, and refused by any other fit."""

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
    """Return what a checkpoint and a fit must have in common for the fit to resume from it.

    The structure of the module and the shapes of its state count, not the values. Every byte of the data counts. `spec` is any
    further text that distinguishes fits.
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
        packed = io.BytesIO()  # torch's own writer hides the error of the disk
        torch.save(value, packed)
        with temporary.open("wb") as file:  # unlike `write_bytes`, which leaves the buffer in use when the disk is full
            file.write(packed.getbuffer())


def read(path: Path) -> dict[str, Any]:
    """Read the checkpoint of any fit onto the CPU.

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
    """Read a checkpoint onto the CPU, for the fit with this identity.

    Raises:
        RunFolderError: it is not readable, or belongs to a fit with another identity; names the differences.
    """
    state = read(path)
    theirs = state["identity"]
    if theirs != identity:
        difference = _difference(theirs, identity)
        raise RunFolderError(f"{path}: {difference}; start anew with --overwrite or another --out")
    return state


def _difference(theirs: Mapping[str, str], ours: Mapping[str, str]) -> str:
    """Say how the fit of a checkpoint differs from this one."""
    kinds = [kind for kind in ours if theirs.get(kind) != ours[kind]]
    if kinds == ["options"]:
        old, new = json.loads(theirs["options"]), json.loads(ours["options"])
        changed = [f"fit.{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]]
        return f"belongs to a fit with other options ({', '.join(changed)})"
    return f"belongs to a fit with another {', '.join(kinds)}"
