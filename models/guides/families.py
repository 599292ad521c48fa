"""Further guide families: low rank, heavy tails, several modes, positive latents, latents on a simplex or a sphere."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import pyro.distributions as dist
import torch
from annotated_types import Ge, Gt, Le
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models import sphere
from elbowroom.models.guides.base import Family, carried, positive_scale
from elbowroom.models.guides.mixture import MixtureOfNormals
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal
from elbowroom.models.spaces import Space

DF_FLOOR, DF_RANGE = 2.0, 100.0
MOST_CONCENTRATED = 1e6  # of a power spherical distribution: a width of 0.1 degrees
_LOG_MOST = 13.815509557963774  # log(1e6 - 1): an encoder that outputs 0 gives concentration 1
_DF_ZERO = -2.4423470353692043  # logit(0.08): an encoder that outputs 0 gives 10 degrees of freedom


class StudentT(Family):
    """q(z|x) is a multivariate Student t, z = mu + L y / sqrt(g), y ~ N(0, I), g ~ Gamma(df / 2, df / 2).

    All coordinates share g: the contours are ellipses, and a draw far out in one direction is likely far out in the others, as
    in the posterior of a datum that determines z poorly. As df grows it becomes `full_rank_normal`.
    Log density, with r = |L^-1 (z - mu)|:
    lgamma((df + d) / 2) - lgamma(df / 2) - d/2 log(df pi) - log det L - (df + d)/2 log(1 + r^2 / df).

    Args:
        latent_dim: width of z (a fact).
        df: degrees of freedom, more than 2 (finite variance); `learned` gives every datum its own, between 2 and 102.
    """

    def __init__(self, latent_dim: int, *, df: Annotated[float, Gt(2), Le(1000)] | Literal["learned"] = "learned") -> None:
        super().__init__()
        self.latent_dim, self.df = latent_dim, df
        self.normal = FullRankNormal(latent_dim)
        self.param_dim = self.normal.param_dim + (df == "learned")

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn parameters [mu, s, strict lower triangle, and one for df if it is learned] into the t distribution."""
        mu, scale_tril = self.normal.parts(params[..., : self.normal.param_dim])
        if self.df == "learned":  # bounded, because lgamma differences of large numbers are only rounding error
            df = DF_FLOOR + DF_RANGE * torch.sigmoid(params[..., -1] + _DF_ZERO)
        else:
            df = torch.full_like(mu[..., 0], float(self.df))
        return dist.MultivariateStudentT(df, mu, scale_tril, validate_args=False)


class Mixture(Family):
    """q(z|x) = sum_k w_k N(mu_k, diag(sigma_k^2)), for posteriors with several modes.

    Draws are differentiable in all parameters, including the weights (`MixtureOfNormals`). The gradient is noisy when
    components lie many standard deviations apart; `gradient_clip` then helps. At an encoder output of 0 all components
    coincide.

    Args:
        latent_dim: width of z (a fact).
        components: number of components.
    """

    def __init__(self, latent_dim: int, *, components: Annotated[int, Ge(2)] = 4) -> None:
        super().__init__()
        self.latent_dim, self.components = latent_dim, components
        self.param_dim = components * (1 + 2 * latent_dim)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., K (1 + 2 d)) parameters [log weights + const, mu, s] into the mixture."""
        k, d = self.components, self.latent_dim
        logits, mu, s = params.split([k, k * d, k * d], -1)
        return MixtureOfNormals(logits, mu.unflatten(-1, (k, d)), positive_scale(s.unflatten(-1, (k, d))))


class LogNormal(Family):
    """q(z|x) = independent log-normals, log z_j ~ N(mu_j, sigma_j^2), for positive latents.

    It equals `diagonal_normal` mapped to the positive numbers.
    """

    space: ClassVar[Space] = "positive"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.param_dim = 2 * latent_dim

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., 2 d) parameters [mu, s] into LogNormal(mu, sigma)."""
        mu, s = params.chunk(2, -1)
        return dist.LogNormal(mu, positive_scale(s), validate_args=False).to_event(1)


class LogisticNormal(Family):
    """q(z|x) = logistic normal on the simplex: u ~ N(mu, diag(sigma^2)) in d - 1 coordinates, z by stick breaking.

    z_j = v_j prod_{i < j} (1 - v_i), v_j = sigmoid(u_j - log(d - j)), and z_d is the remainder; u = 0 gives equal parts.
    It equals `diagonal_normal` mapped to the simplex, and torch's LogisticNormal.

    Args:
        latent_dim: number d of parts of the simplex (a fact).
    """

    space: ClassVar[Space] = "simplex"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        if latent_dim < 2:
            raise ValueError(f"latent_dim: a simplex needs at least 2 parts, got {latent_dim}")
        self.latent_dim = latent_dim
        self.normal = DiagonalNormal(latent_dim - 1)
        self.param_dim = self.normal.param_dim

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., 2 (d - 1)) parameters [mu, s] into the logistic normal."""
        return carried(self.normal(params), self.space)


class PowerSpherical(Family):
    """q(z|x) = (1 + mu'z)^k / N on the sphere |z| = 1, the power spherical distribution: mean direction mu, concentration k.

    log N = (a + b) log 2 + b log pi + log Gamma(a) - log Gamma(a + b), b = (d - 1)/2, a = b + k. Density with respect to area.
    For a large k it is close to a normal of variance 2 / k across mu; k = 0 is uniform. A reparametrised stand-in for the
    von Mises-Fisher distribution. De Cao and Aziz 2020, https://arxiv.org/abs/2006.04437.

    Args:
        latent_dim: number d of coordinates, at least 2 (a fact).
    """

    space: ClassVar[Space] = "sphere"

    def __init__(self, latent_dim: int) -> None:
        sphere.at_least_two(latent_dim)
        super().__init__()
        self.latent_dim, self.param_dim = latent_dim, latent_dim + 1

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., d + 1) parameters [mu before it is normalised, less the last axis; log k] into the distribution."""
        axis = (torch.arange(self.latent_dim, device=params.device) == self.latent_dim - 1).to(params.dtype)
        k = MOST_CONCENTRATED * torch.sigmoid(params[..., -1] - _LOG_MOST)  # e^s, but bounded
        return sphere.PowerSpherical(sphere.unit(params[..., :-1] + axis), k)
