"""The peers' packages, imported for a test file, which is skipped where they are missing."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
from benchmarks.adapters import import_pyroved
from torch import Tensor

import elbowroom as er


def peer(name: str) -> Any:
    """Import a peer's package, whose own warnings are not ours, or skip the test file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name == "pyroved" and importlib.util.find_spec(name) is not None:
            return import_pyroved()
        return pytest.importorskip(name, reason="run by `make test-peers`")


def estimates(pair: Iterable[Any], *args: Any, draws: int = 4000) -> tuple[Tensor, Tensor, Tensor]:
    """Return ELBO, its standard error, and log p(x) by importance sampling from the guide, (N,) each, as an audit does."""
    joint = er.LogJoint(*pair, *args)
    z, log_q = joint.sample_guide(draws, 0)
    weight = (joint(z) - log_q).detach()
    return weight.mean(0), weight.std(0) / math.sqrt(draws), weight.logsumexp(0) - math.log(draws)
