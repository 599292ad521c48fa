"""Guides q(z|x): an encoder that gives the parameters and a family that turns them into a distribution.

A guide is a module that returns a distribution: `q = guide(x)`. A family states `param_dim`, the encoder's output width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from elbowroom.errors import UserError

SCALE_FLOOR = 1e-5
_UNIT = math.log(math.expm1(1.0))  # softplus(_UNIT) = 1: an encoder that outputs 0 gives unit scales


class Family(nn.Module, ABC):
    """A map from unconstrained parameters (..., param_dim) to a distribution over z with event shape (d,).

    Attributes:
        latent_dim: width d of z.
        param_dim: width of the parameters, which is the encoder's output width.
    """

    latent_dim: int
    param_dim: int

    @abstractmethod
    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn parameters (..., param_dim) into a distribution over z, event shape (d,)."""


class DiagonalNormal(Family):
    """q(z|x) = N(mu, diag(sigma^2)), with sigma = softplus(s) + 1e-5."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.param_dim = 2 * latent_dim

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., 2 d) parameters [mu, s] into N(mu, diag(sigma^2))."""
        mu, s = params.chunk(2, -1)
        return dist.Normal(mu, softplus(s + _UNIT) + SCALE_FLOOR).to_event(1)


class FullRankNormal(Family):
    """q(z|x) = N(mu, L L'), L lower triangular with diagonal softplus(s) + 1e-5."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.param_dim = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        rows, columns = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., 2 d + d (d - 1) / 2) parameters [mu, s, strict lower triangle] into N(mu, L L')."""
        d = self.latent_dim
        mu, s, lower = params.split([d, d, params.shape[-1] - 2 * d], -1)
        # built from one-hot rows and columns, not by index assignment: that keeps it a pure function for vmap
        eye = torch.eye(d, dtype=params.dtype, device=params.device)
        strict = torch.einsum("...k,ki,kj->...ij", lower, eye[self.rows], eye[self.columns])
        scale_tril = strict + torch.diag_embed(softplus(s + _UNIT) + SCALE_FLOOR)
        return dist.MultivariateNormal(mu, scale_tril=scale_tril, validate_args=False)


class AmortizedGuide(nn.Module):
    """q(z|x) = family(encoder((x - loc) / scale)), the amortized guide.

    Args:
        encoder: network from x to `family.param_dim` numbers.
        family: the distribution family.
    """

    def __init__(self, encoder: nn.Module, family: Family) -> None:
        super().__init__()
        self.encoder = encoder
        self.family = family
        self.loc: Tensor
        self.scale: Tensor
        self.register_buffer("loc", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def adapt(self, x: Tensor) -> None:
        """Centre and scale the encoder's input by the mean and standard deviation of training data (N, *event)."""
        if not x.is_floating_point():
            raise UserError("the encoder needs floating-point data")
        wide = x.double()  # the square of 1e30 is no float32
        self.loc = wide.mean(0).to(x.dtype)
        self.scale = wide.std().to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny) if len(x) > 1 else torch.ones_like(x.mean())

    def forward(self, x: Tensor) -> TorchDistribution:
        """Return q(z|x) with batch shape (N,) and event shape (d,) for x of shape (N, *event)."""
        return self.family(self.encoder((x - self.loc) / self.scale))
