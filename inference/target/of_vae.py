"""The log joint of a VAE and a batch of data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.vae import VAE, Batch


def log_joint_of(vae: VAE, batch: Mapping[str, Tensor] | Batch, **options: Any) -> LogJoint:
    """Return the log joint of a VAE and some data; options as `LogJoint`."""
    beside: dict[str, Any] = {name: value for name, value in batch.items() if name != "x"}
    return LogJoint(vae.model, vae.guide, batch["x"], **beside, **options)
