"""Priors of independent coordinates on the real line: normal, Laplace, Student t."""

from __future__ import annotations

from typing import Annotated

import pyro.distributions as dist
import torch
from annotated_types import Gt
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.priors.base import Located


class Normal(Located):
    """The standard normal prior, z ~ N(0, I_d), at site `z`; given covariates, z ~ N(A c, I_d).

    Log density: log p(z) = -1/2 (d log 2 pi + sum_j z_j^2).

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return N(0, I_d) or N(A c, I_d)."""
        loc = self.location(covariates)
        return dist.Normal(loc, torch.ones_like(loc)).to_event(1)


class Laplace(Located):
    """Independent Laplace entries of unit scale: sparse latents.

    Log density: log p(z) = -sum_j |z_j - m_j| - d log 2, with m = 0 or A c.

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the product of Laplace densities."""
        loc = self.location(covariates)
        return dist.Laplace(loc, torch.ones_like(loc)).to_event(1)


class StudentT(Located):
    """Independent Student t entries of unit scale: latents with outliers.

    p(z_j) is proportional to (1 + (z_j - m_j)^2 / df)^(-(df + 1) / 2), with m = 0 or A c.

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        df: degrees of freedom; 1 is the Cauchy distribution, the variance is finite above 2.
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    def __init__(
        self, latent_dim: int, covariate_dim: int = 0, *, df: Annotated[float, Gt(0)] = 5.0, covariates: bool = False
    ) -> None:
        super().__init__(latent_dim, covariate_dim, covariates=covariates)
        self.df = df

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the product of Student t densities."""
        loc = self.location(covariates)
        return dist.StudentT(torch.full_like(loc, self.df), loc, torch.ones_like(loc)).to_event(1)
