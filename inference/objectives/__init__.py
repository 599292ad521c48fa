"""The objectives that a fit can maximise."""

from elbowroom.inference.objectives.elbo import ELBO, Estimate, Objective

__all__ = ["ELBO", "Estimate", "Objective"]
