"""A folder with a spec and its data, and the command line called in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from elbowroom.cli.app import main

SPEC = {
    "data": {"name": "file", "path": "x.npy"},
    "model": {"latent_dim": 1, "likelihood": "bernoulli", "decoder": {"name": "mlp", "hidden": [5]}},
    "guide": {"encoder": {"name": "mlp", "hidden": [5]}},
    "fit": {"epochs": 2, "batch_size": 16, "device": "cpu"},
    "audit": {"draws": 200, "keep": 100},
}


def listing(path: Path) -> set[str]:
    return {str(p.relative_to(path)) for p in path.rglob("*")}


def call(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code
