"""What makes two fits the same fit: a hash of spec, data and starting weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elbowroom.components import registry
from elbowroom.system.files import sha256


def identity(tree: Mapping[str, Any], data_sha256: str, start_sha256: str | None = None) -> str:
    """Return the SHA-256 of what a fit depends on: data, model, guide, fit (not its device) and seed of a resolved spec.

    Args:
        tree: the resolved spec.
        data_sha256: of the data.
        start_sha256: of the weights that the fit starts at; where they lie does not matter.
    """
    skip = {"data": "path", "fit": "device"}
    parts = {key: tree.get(key) for key in ("data", "model", "guide", "fit", "seed")}
    for key, dropped in skip.items():
        part = parts[key]
        if isinstance(part, Mapping):
            parts[key] = {name: value for name, value in part.items() if name != dropped}
    fitted = parts["fit"]
    if isinstance(fitted, Mapping) and "start" in fitted:
        block = fitted["start"]
        others = {name: value for name, value in fitted.items() if name != "start"}
        # without one the hash is that of specs which do not know the word
        parts["fit"] = {**others, "start": {**block, "run": start_sha256}} if isinstance(block, Mapping) else others
    return sha256(json.dumps([registry.portable(parts), data_sha256], sort_keys=True).encode())
