"""A prior under which most coordinates are near zero and a few are large."""

from __future__ import annotations

import math
from typing import Annotated

import pyro.distributions as dist
import torch
from annotated_types import Ge, Gt
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.priors.base import Located


class Horseshoe(Located):
    """The regularised horseshoe with its local scales summed out at K quantiles: each coordinate a mixture of K normals.

    p(z_j) = 1/K sum_k N(z_j; m_j, s_k^2), s_k^2 = c^2 t^2 l_k^2 / (c^2 + t^2 l_k^2), l_k = tan(pi/2 (k - 1/2) / K), which are
    the quantiles of the half-Cauchy distribution of the local scales; m = 0 or A c. As K grows it becomes the regularised
    horseshoe (Piironen and Vehtari 2017, https://doi.org/10.1214/17-EJS1337SI; Carvalho et al. 2010,
    https://doi.org/10.1093/biomet/asq017), whose density is infinite at zero; this one is finite, smooth and normalised.

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        scale: t, the global scale.
        slab: c, about the largest scale of a coordinate.
        nodes: K.
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    scales: Tensor

    def __init__(
        self,
        latent_dim: int,
        covariate_dim: int = 0,
        *,
        scale: Annotated[float, Gt(0)] = 1.0,
        slab: Annotated[float, Gt(0)] = 3.0,
        nodes: Annotated[int, Ge(2)] = 12,
        covariates: bool = False,
    ) -> None:
        super().__init__(latent_dim, covariate_dim, covariates=covariates)
        local = scale * (math.pi / 2 * (torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes).tan()
        scales = (local.square().reciprocal() + slab**-2).rsqrt()
        self.register_buffer("scales", scales.to(torch.get_default_dtype()), persistent=False)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the product of mixtures."""
        loc = self.location(covariates)[..., None].expand(*self.location(covariates).shape, len(self.scales))
        weights = dist.Categorical(logits=torch.zeros_like(loc), validate_args=False)
        parts = dist.Normal(loc, self.scales.expand_as(loc), validate_args=False)
        return dist.MixtureSameFamily(weights, parts, validate_args=False).to_event(1)
