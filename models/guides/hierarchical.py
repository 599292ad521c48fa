"""The guide of a hierarchical prior: q(z_top, z_bottom | x), level by level."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import pyro
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.guides.base import Family
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.hierarchical import SITES, Ancestral, conditional_normal


class HierarchicalFamily(Family):
    """The guide of the hierarchical prior, top down: q(z_top|x), then q(z|x, z_top), normals with diagonal covariance.

    The encoder gives the moments of z_top and a first guess of those of z, which a small network corrects given z_top.

    Args:
        latent_dim: width d of z (a fact).
        top_dim: width of z_top (a fact).
        hidden: widths of the hidden layers of the network that reads z_top.

    Raises:
        ValueError: the prior has no upper level.
    """

    sites: ClassVar[tuple[str, ...]] = SITES

    def __init__(self, latent_dim: int, top_dim: int, *, hidden: Sequence[Annotated[int, Ge(1)]] = (64,)) -> None:
        super().__init__()
        if top_dim < 1:
            raise ValueError("hierarchical: this guide family goes with the hierarchical prior; set model.prior: hierarchical")
        self.latent_dim = latent_dim
        self.top_dim = top_dim
        self.param_dim = 2 * top_dim + 2 * latent_dim
        self.correction = MLP((top_dim + 2 * latent_dim,), 2 * latent_dim, hidden=hidden)

    def top(self, params: Tensor) -> TorchDistribution:
        """Return q(z_top|x)."""
        return conditional_normal(params[..., : 2 * self.top_dim])

    def given(self, params: Tensor, z_top: Tensor) -> TorchDistribution:
        """Return q(z|x, z_top)."""
        guess = params[..., 2 * self.top_dim :]
        batch = torch.broadcast_shapes(guess.shape[:-1], z_top.shape[:-1])
        both = torch.cat([z_top.expand(*batch, -1), guess.expand(*batch, -1)], -1)
        return conditional_normal(guess + self.correction(both))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the marginal q(z|x), which can be sampled but has no density in closed form."""
        return Ancestral(self.top(params), lambda z_top: self.given(params, z_top), self.latent_dim)

    def draw(self, params: Tensor) -> Tensor:
        """Draw `z_top` and `z` inside the caller's plate; return z (..., d)."""
        return pyro.sample("z", self.given(params, pyro.sample("z_top", self.top(params))))
