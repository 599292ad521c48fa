"""The guide of a Markov chain: the structured inference network, q(z_1, ..., z_T | x) = q(z_1|x) prod_t q(z_t | z_(t-1), x)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pyro.distributions as dist
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.models.guides.base import Family
from elbowroom.models.guides.normal import FullRankNormal
from elbowroom.models.priors.hierarchical import conditional_normal
from elbowroom.models.priors.markov import Chain


class MarkovFamily(Family):
    """A Markov chain of normals whose steps read x: z_t given z_(t-1) and what the encoder says about step t.

    `linear`: z_t ~ N(A_t z_(t-1) + b_t, L_t L_t'), with A_t, b_t and L_t from the encoder: all normals whose precision is block
    tridiagonal, thus also the exact posterior of a linear-Gaussian state-space model. `gated`: the encoder gives h_t, and the
    mean and scale are affine in (tanh(W z_(t-1) + w) + h_t) / 2, the combiner of Krishnan, Shalit and Sontag 2017
    (https://arxiv.org/abs/1609.09869). The encoder's output is (T, P), step by step: a `gru` gives it from its states, read
    backwards, or both ways with `bidirectional`.

    Args:
        latent_dim: width d = T k of z (a fact).
        steps: T, of the prior `markov`; else d, one coordinate for each step (a fact).
        transition: `linear` or `gated`.
        hidden: width of h_t, of `gated`.

    Raises:
        ValueError: latent_dim is not a multiple of the steps.
    """

    def __init__(
        self,
        latent_dim: int,
        steps: int,
        *,
        transition: Literal["linear", "gated"] = "linear",
        hidden: Annotated[int, Ge(1)] = 32,
    ) -> None:
        super().__init__()
        if latent_dim % steps:
            raise ValueError(f"markov: a latent_dim of {latent_dim} is no multiple of {steps} steps")
        self.latent_dim, self.steps, self.width = latent_dim, steps, latent_dim // steps
        self.linear = transition == "linear"
        if self.linear:
            self.normal = FullRankNormal(self.width)
            self.param_dim = steps * (self.width**2 + self.normal.param_dim)
        else:
            self.param_dim = steps * hidden
            self.before, self.head = nn.Linear(self.width, hidden), nn.Linear(hidden, 2 * self.width)
            self.start = nn.Parameter(torch.ones(self.width))
            with torch.no_grad():  # so that it starts as the standard normal
                self.before.weight.zero_()
                self.before.bias.zero_()
                self.head.bias.zero_()

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the parameters, (T, P)."""
        return (self.steps, self.param_dim // self.steps)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., T P) parameters into the chain."""
        by_step = params.unflatten(-1, (self.steps, -1))
        first, rest = by_step[..., 0, :], by_step[..., 1:, :]
        if not self.linear:
            return Chain(self._gated(first, self.start), lambda z, which: self._gated(rest[..., which, :], z), self.steps)
        k = self.width
        loc, scale_tril = self.normal.parts(rest[..., k * k :])
        return NormalChain(self.normal(first[..., k * k :]), rest[..., : k * k].unflatten(-1, (k, k)), loc, scale_tril)

    def _gated(self, h: Tensor, z: Tensor) -> TorchDistribution:
        return conditional_normal(self.head(0.5 * (torch.tanh(self.before(z)) + h)))


class NormalChain(Chain):
    """A chain of normals, z_t ~ N(A_t z_(t-1) + b_t, L_t L_t'), whose mean and variance are known.

    Args:
        first: the normal z_1, event shape (k,).
        slope: A_t, (..., T - 1, k, k).
        loc: b_t, (..., T - 1, k).
        scale_tril: L_t, (..., T - 1, k, k), lower triangular.
    """

    def __init__(self, first: Any, slope: Tensor, loc: Tensor, scale_tril: Tensor) -> None:
        self.slope, self.loc, self.scale_tril = slope, loc, scale_tril

        def step(z: Tensor, which: slice) -> TorchDistribution:
            mean = loc[..., which, :] + (slope[..., which, :, :] @ z[..., None]).squeeze(-1)
            return dist.MultivariateNormal(mean, scale_tril=scale_tril[..., which, :, :], validate_args=False)

        super().__init__(first, step, slope.shape[-3] + 1)

    @property
    def mean(self) -> Tensor:
        """The mean of z, (..., T k)."""
        means = [self.first.mean]
        for t in range(self.steps - 1):
            means.append((self.slope[..., t, :, :] @ means[-1][..., None]).squeeze(-1) + self.loc[..., t, :])
        return torch.cat(means, -1)

    @property
    def variance(self) -> Tensor:
        """The variances of the coordinates of z, (..., T k)."""
        covariances = [self.first.covariance_matrix]
        for t in range(self.steps - 1):
            slope, scale_tril = self.slope[..., t, :, :], self.scale_tril[..., t, :, :]
            covariances.append(slope @ covariances[-1] @ slope.mT + scale_tril @ scale_tril.mT)
        return torch.cat([covariance.diagonal(dim1=-2, dim2=-1) for covariance in covariances], -1)
