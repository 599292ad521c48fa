"""What a fit maximises."""

from elbowroom.inference.objectives.elbo import ELBO, Estimate, Objective

__all__ = ["ELBO", "Estimate", "Objective"]
