"""Guides of discrete latents: q(z|x) as a table of probabilities."""

from __future__ import annotations

from typing import ClassVar

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.guides.base import Family
from elbowroom.models.priors.discrete import Binary, check_bits, check_categories
from elbowroom.models.spaces import Space


class CategoricalFamily(Family):
    """q(z|x) over d categories: one-hot z with probabilities softmax(params). For the categorical prior."""

    space: ClassVar[Space] = "one_hot"
    reparametrized: ClassVar[bool] = False

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_categories(latent_dim)
        self.latent_dim = latent_dim
        self.param_dim = latent_dim

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., d) logits into a distribution over one-hot z."""
        return dist.OneHotCategorical(logits=params, validate_args=False)


class BernoulliFamily(Family):
    """q(z|x) over d independent binary entries with probabilities sigmoid(params). For the bernoulli prior."""

    space: ClassVar[Space] = "binary"
    reparametrized: ClassVar[bool] = False

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        check_bits(latent_dim)
        self.latent_dim = latent_dim
        self.param_dim = latent_dim

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., d) logits into a joint distribution over {0, 1}^d."""
        return Binary(params, validate_args=False)
