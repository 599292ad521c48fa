"""The identity of a fit: a hash of spec, data and starting weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from elbowroom.components import registry
from elbowroom.system.files import sha256


def identity(tree: Mapping[str, Any], data_sha256: str, start_sha256: str | None = None) -> str:
    """Return the SHA-256 of everything that a fit depends on: data, model, guide, fit (without its device) and seed.

    The weights that the fit starts from count by their hash, not by their path.
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
        # without a start the entry is removed, so that the hash equals that of specs without this field
        parts["fit"] = {**others, "start": {**block, "run": start_sha256}} if isinstance(block, Mapping) else others
    return sha256(json.dumps([registry.portable(parts), data_sha256], sort_keys=True).encode())
