"""Likelihoods p(x|z), one class each; `base` defines the interface of a likelihood."""

from elbowroom.models.likelihoods.base import Likelihood

__all__ = ["Likelihood"]
