"""Priors p(z), one class each; `base` defines the interface of a prior."""

from elbowroom.models.priors.base import Prior

__all__ = ["Prior"]
