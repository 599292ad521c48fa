"""The log joint of a VAE and a batch of data."""

from __future__ import annotations

from typing import Any

from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.vae import VAE, Batch


def seam(vae: VAE, batch: Batch) -> LogJoint:
    """Return the seam of a VAE and some data."""
    beside: dict[str, Any] = {name: value for name, value in batch.items() if name != "x"}
    return LogJoint(vae.model, vae.guide, batch["x"], **beside)
