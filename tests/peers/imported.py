"""The peers' packages, imported for a test file, which is skipped where they are missing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from benchmarks.adapters import plots_of_pyroved


def peer(name: str) -> Any:
    """Import a peer's package, whose own warnings are not ours, or skip the test file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "pyroved":
            plots_of_pyroved()
        return pytest.importorskip(name, reason="run by `make test-peers`")
