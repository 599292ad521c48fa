"""Likelihoods p(x|z), one class each; `base` says what a likelihood is."""

from elbowroom.models.likelihoods.base import Likelihood

__all__ = ["Likelihood"]
