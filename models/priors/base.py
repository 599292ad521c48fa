"""Priors p(z), or p(z|c) given covariates c: small Pyro programs that draw their own sites.

A prior is called inside the data plate. It draws one or more sample sites and returns the tensor z that the decoder
reads. Positional constructor arguments are facts of the model; keyword-only ones are the user's options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.models import spaces
from elbowroom.models.spaces import Space


class Prior(nn.Module, ABC):
    """A Pyro program that draws the local latent sites of one datum.

    A prior with one site implements `distribution`; one with several also overrides `forward` and `sites`.

    Attributes:
        latent_dim: width d of the tensor that `forward` returns.
        space: the set that z lives in.
        sites: names of the sample sites, in program order.
        covariates: whether it is p(z|c); then `distribution` and `forward` get c.
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
        """Set data-dependent constants from the encoder's view of training data, (N, *feature)."""

    @property
    def free_dim(self) -> int:
        """The number of unconstrained continuous coordinates of z."""
        return spaces.free_dim(self.space, self.latent_dim)


class Located(Prior):
    """A prior on R^d around a location: the origin, or, with `covariates`, a linear map of the covariates, A c.

    The covariates are standardised and the map has no intercept, so the average datum has the same prior as without
    covariates; the decoder has its own intercept.

    Raises:
        ValueError: covariates were asked for and there are none.
    """

    def __init__(self, latent_dim: int, covariate_dim: int = 0, *, covariates: bool = False) -> None:
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
