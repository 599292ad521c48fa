"""Priors p(z), or p(z|c) given covariates c: small Pyro programs that draw their own sites.

A prior is called inside the data plate. It draws one or more sample sites and returns the tensor z that the decoder
reads. Positional constructor arguments are facts of the model; keyword-only ones are the user's options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, ClassVar

import pyro
import pyro.distributions as dist
import torch
from annotated_types import Gt
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.models import spaces
from elbowroom.models.spaces import Space


class Prior(nn.Module, ABC):
    """A Pyro program that draws the local latent sites of one datum.

    A prior of one site says its `distribution`; one of several overrides `forward` and `sites` as well.

    Attributes:
        latent_dim: width d of the tensor that `forward` returns.
        space: the set that z lives in.
        sites: names of the sample sites, in program order.
        covariates: whether it is p(z|c): `distribution` and `forward` are then given c.
    """

    latent_dim: int
    space: ClassVar[Space] = "real"
    sites: ClassVar[tuple[str, ...]] = ("z",)
    covariates: bool = False

    @abstractmethod
    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return p(z), event shape (d,); for p(z|c) with c of shape (N, C), batch shape (N,)."""

    def forward(self, covariates: Tensor | None = None) -> Tensor:
        """Draw the latent sites inside the caller's plate; return z of shape (..., d)."""
        return pyro.sample("z", self.distribution(covariates))

    def adapt(self, features: Tensor) -> None:
        """Set data-dependent constants from what the encoder sees of training data, (N, *feature)."""

    @property
    def free_dim(self) -> int:
        """The number of unconstrained continuous coordinates of z."""
        return spaces.free_dim(self.space, self.latent_dim)


class Located(Prior):
    """A prior on R^d around a location: the origin, or a linear map of the covariates, A c.

    The covariates arrive standardised and the map has no intercept, so that the average datum has the prior that there is
    without covariates; the decoder has an intercept of its own.

    Args:
        latent_dim: width d of z.
        covariate_dim: number C of covariates that the data have.
        covariates: whether the location is A c.

    Raises:
        ValueError: covariates were asked for and there are none.
    """

    def __init__(self, latent_dim: int, covariate_dim: int, covariates: bool) -> None:
        super().__init__()
        if covariates and covariate_dim == 0:
            raise ValueError("covariates: needs data with covariates; leave it false, or name some in data")
        self.latent_dim = latent_dim
        self.covariates = covariates
        if covariates:
            self.map = nn.Linear(covariate_dim, latent_dim, bias=False)
        self.origin: Tensor
        self.register_buffer("origin", torch.zeros(latent_dim), persistent=False)

    def location(self, covariates: Tensor | None) -> Tensor:
        """Return the location, (d,), or (N, d) given c (N, C)."""
        if not self.covariates:
            return self.origin
        if covariates is None:
            raise ValueError("this prior is p(z|c): it needs the covariates")
        return self.map(covariates)


class Normal(Located):
    """The standard normal prior, z ~ N(0, I_d), at site `z`; given covariates, z ~ N(A c, I_d).

    Log density: log p(z) = -1/2 (d log 2 pi + sum_j z_j^2).

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    def __init__(self, latent_dim: int, covariate_dim: int = 0, *, covariates: bool = False) -> None:
        super().__init__(latent_dim, covariate_dim, covariates)

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

    def __init__(self, latent_dim: int, covariate_dim: int = 0, *, covariates: bool = False) -> None:
        super().__init__(latent_dim, covariate_dim, covariates)

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
        super().__init__(latent_dim, covariate_dim, covariates)
        self.df = df

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the product of Student t densities."""
        loc = self.location(covariates)
        return dist.StudentT(torch.full_like(loc, self.df), loc, torch.ones_like(loc)).to_event(1)
