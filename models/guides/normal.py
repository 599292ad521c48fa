"""Normal guides: diagonal, low-rank and full covariance."""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated

import pyro.distributions as dist
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.guides.base import Family, positive_scale


class NormalFamily(Family):
    """A family of normals; draws are smooth functions of standard normal noise.

    Attributes:
        noise_dim: width of the noise.
    """

    noise_dim: int

    @abstractmethod
    def place(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return the draws (..., N, d) for noise (..., 1 or N, noise_dim) and parameters (N, param_dim)."""

    @abstractmethod
    def uphill(self, params: Tensor, gradient: Tensor) -> Tensor:
        """Return the direction P g of steepest ascent in the family's own units, (N, param_dim), for a gradient g.

        P is positive definite, and g' P g does not depend on the units of z.
        """


class DiagonalNormal(NormalFamily):
    """q(z|x) = N(mu, diag(sigma^2)), with sigma = softplus(s) + 1e-5."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.param_dim = 2 * latent_dim
        self.noise_dim = latent_dim

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., 2 d) parameters [mu, s] into N(mu, diag(sigma^2))."""
        mu, s = params.chunk(2, -1)
        return dist.Normal(mu, positive_scale(s)).to_event(1)

    def place(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return mu + sigma * noise."""
        mu, s = params.chunk(2, -1)
        return mu + positive_scale(s) * noise

    def uphill(self, params: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient, with the part of mu times sigma^2."""
        scale = positive_scale(params.chunk(2, -1)[1])
        of_mu, of_s = gradient.chunk(2, -1)
        return torch.cat([scale.square() * of_mu, of_s], -1)


class FullRankNormal(NormalFamily):
    """q(z|x) = N(mu, L L'), L lower triangular with diagonal softplus(s) + 1e-5."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.param_dim = 2 * latent_dim + latent_dim * (latent_dim - 1) // 2
        self.noise_dim = latent_dim
        rows, columns = torch.tril_indices(latent_dim, latent_dim, offset=-1)
        self.rows: Tensor
        self.columns: Tensor
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., 2 d + d (d - 1) / 2) parameters [mu, s, strict lower triangle] into N(mu, L L')."""
        mu, scale_tril = self.parts(params)
        return dist.MultivariateNormal(mu, scale_tril=scale_tril, validate_args=False)

    def parts(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu (..., d) and L (..., d, d)."""
        d = self.latent_dim
        mu, s, lower = params.split([d, d, params.shape[-1] - 2 * d], -1)
        return mu, self._triangle(lower) + torch.diag_embed(positive_scale(s))

    def _triangle(self, lower: Tensor) -> Tensor:
        # built from one-hot rows and columns: index assignment is not a pure function, which vmap needs
        eye = torch.eye(self.latent_dim, dtype=lower.dtype, device=lower.device)
        return torch.einsum("...k,ki,kj->...ij", lower, eye[self.rows], eye[self.columns])

    def place(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return mu + L noise."""
        mu, scale_tril = self.parts(params)
        return mu + (scale_tril @ noise[..., None]).squeeze(-1)

    def uphill(self, params: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient in units of L: the part of mu times L L', that of L's strict triangle as that of A in L A."""
        d = self.latent_dim
        scale_tril = self.parts(params)[1]
        of_mu, of_s, of_lower = gradient.split([d, d, gradient.shape[-1] - 2 * d], -1)
        mu = (scale_tril @ (scale_tril.mT @ of_mu[..., None])).squeeze(-1)
        lower = scale_tril @ (scale_tril.mT @ self._triangle(of_lower)).tril(-1)
        return torch.cat([mu, of_s, lower[..., self.rows, self.columns]], -1)


class LowRankNormal(NormalFamily):
    """q(z|x) = N(mu, S (I + V V') S) with S = diag(sigma) and V of shape (d, rank): a few directions of correlation.

    V is in units of sigma, so that the conditioning of I + V' V, which is factorised, does not worsen as the posterior narrows.
    Its density costs O(d rank^2). A full covariance costs O(d^2) and d (d - 1) / 2 more encoder outputs.

    Args:
        latent_dim: width of z (a fact).
        rank: number of directions, at most the width of z.
    """

    def __init__(self, latent_dim: int, *, rank: Annotated[int, Ge(1)] = 1) -> None:
        super().__init__()
        if rank > latent_dim:
            raise ValueError(f"rank: {rank} directions in {latent_dim} latents; use at most {latent_dim}")
        self.latent_dim, self.rank = latent_dim, rank
        self.param_dim = (2 + rank) * latent_dim
        self.noise_dim = rank + latent_dim

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = self.latent_dim
        mu, s, v = params.split([d, d, self.rank * d], -1)
        return mu, positive_scale(s), v.unflatten(-1, (d, self.rank))

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., (2 + rank) d) parameters [mu, s, V] into N(mu, S (I + V V') S)."""
        mu, scale, v = self._split(params)
        return dist.LowRankMultivariateNormal(mu, scale[..., None] * v, scale.square(), validate_args=False)

    def place(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return mu + sigma * (V noise_1 + noise_2)."""
        mu, scale, v = self._split(params)
        along, own = noise.split([self.rank, self.latent_dim], -1)
        return mu + scale * ((v @ along[..., None]).squeeze(-1) + own)

    def uphill(self, params: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient, with the part of mu times the covariance."""
        _, scale, v = self._split(params)
        of_mu, rest = gradient.split([self.latent_dim, gradient.shape[-1] - self.latent_dim], -1)
        whitened = scale * of_mu
        return torch.cat([scale * (whitened + (v @ (v.mT @ whitened[..., None])).squeeze(-1)), rest], -1)
