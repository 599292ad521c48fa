"""Elbowroom: how much room is there between your ELBO and the truth?

A VAE workbench on Pyro. Declare a prior, a likelihood, networks and a guide; fit them; then see for each datum how far the
amortized posterior q(z|x) is from the true p(z|x). `audit` makes this comparison for any Pyro model and guide.

Each name is loaded when it is first used, so that the import itself needs neither torch nor Pyro.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elbowroom import adapt
    from elbowroom.analysis.audit.auditor import Audit, audit
    from elbowroom.components.registry import register
    from elbowroom.inference.posterior import Posterior
    from elbowroom.inference.target.log_joint import LogJoint
    from elbowroom.models.vae import VAE
    from elbowroom.run import Run, fit
    from elbowroom.runs.compare import compare
    from elbowroom.spec.experiment import Experiment
    from elbowroom.system.profiling import profile
    from elbowroom.transformer import VAETransformer

    __version__: str

__all__ = [
    "VAE",
    "Audit",
    "Experiment",
    "LogJoint",
    "Posterior",
    "Run",
    "VAETransformer",
    "__version__",
    "adapt",
    "audit",
    "compare",
    "fit",
    "profile",
    "register",
]

_HOME = {
    "Audit": "elbowroom.analysis.audit.auditor",
    "audit": "elbowroom.analysis.audit.auditor",
    "register": "elbowroom.components.registry",
    "Experiment": "elbowroom.spec.experiment",
    "Run": "elbowroom.run",
    "fit": "elbowroom.run",
    "Posterior": "elbowroom.inference.posterior",
    "LogJoint": "elbowroom.inference.target.log_joint",
    "profile": "elbowroom.system.profiling",
    "VAE": "elbowroom.models.vae",
    "VAETransformer": "elbowroom.transformer",
    "compare": "elbowroom.runs.compare",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("elbowroom")
    if name == "adapt":
        return importlib.import_module("elbowroom.adapt")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elbowroom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
