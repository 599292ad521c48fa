"""Priors p(z), one class each; `base` says what a prior is."""

from elbowroom.models.priors.base import Prior

__all__ = ["Prior"]
