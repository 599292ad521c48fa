"""Discrete latents: one of d categories, or d binary entries; priors, and a distribution that the guide families share.

Their values can be listed, so that inference sums over them: the log joint for exact posteriors, Pyro's TraceEnum_ELBO for a
loss without the noise of draws. Draws are not differentiable in the parameters.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar

import pyro.distributions as dist
import torch
from annotated_types import Gt, Lt
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import logsigmoid

from elbowroom.models.priors.base import Prior
from elbowroom.models.spaces import Space

MAX_BITS = 12  # 4096 joint values


class Binary(TorchDistribution):
    """d independent Bernoulli entries as one joint distribution on {0, 1}^d, with 2^d values that can be listed.

    log p(z) = sum_j z_j log sigmoid(l_j) + (1 - z_j) log sigmoid(-l_j)

    An `Independent` of Bernoulli entries lists only the 2 values with all entries equal.

    Args:
        logits: l, (*batch, d).
        validate_args: whether `log_prob` checks its argument.
    """

    arg_constraints = {"logits": constraints.real_vector}
    support = constraints.independent(constraints.boolean, 1)
    has_enumerate_support = True

    def __init__(self, logits: Tensor, *, validate_args: bool | None = None) -> None:
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Binary:
        """Return the distribution with a larger batch shape."""
        return Binary(self.logits.expand(*batch_shape, *self.event_shape), validate_args=False)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z, (*sample, *batch, d), in floating point."""
        with torch.no_grad():
            return torch.bernoulli(self.mean.expand(self._extended_shape(Size(sample_shape))))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(z), (*batch)."""
        if self._validate_args:
            self._validate_sample(value)
        return (value * logsigmoid(self.logits) + (1 - value) * logsigmoid(-self.logits)).sum(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """Return all values, (2^d, *batch, d), the last entry varying fastest; with expand=False batch dimensions have size 1.

        Raises:
            NotImplementedError: more than 12 entries.
        """
        d = self.event_shape[0]
        if d > MAX_BITS:
            raise NotImplementedError(f"{d} binary entries have 2^{d} values, too many to list (at most {MAX_BITS} entries)")
        powers = torch.arange(d - 1, -1, -1, device=self.logits.device)
        values = ((torch.arange(2**d, device=self.logits.device)[:, None] >> powers) & 1).to(self.logits.dtype)
        values = values.reshape(2**d, *[1] * len(self.batch_shape), d)
        return values.expand(2**d, *self.batch_shape, d) if expand else values

    @property
    def mean(self) -> Tensor:
        """The probabilities, (*batch, d)."""
        return self.logits.sigmoid()

    @property
    def variance(self) -> Tensor:
        """Variances p (1 - p), (*batch, d)."""
        return self.mean * (-self.logits).sigmoid()

    def entropy(self) -> Tensor:
        """Return the entropy in nats, (*batch)."""
        p = self.mean
        return -(p * logsigmoid(self.logits) + (1 - p) * logsigmoid(-self.logits)).sum(-1)


class Categorical(Prior):
    """One of d categories, as a one-hot vector z: a mixture model; the decoder reads the component.

    p(z = e_k) = softmax(l)_k, learned from equal weights, or fixed at 1 / d.

    Args:
        latent_dim: number d of categories (a fact).
        learned: learn the probabilities; else all are 1 / d.

    Raises:
        ValueError: fewer than two categories.
    """

    space: ClassVar[Space] = "one_hot"
    logits: Tensor

    def __init__(self, latent_dim: int, *, learned: bool = True) -> None:
        super().__init__()
        check_categories(latent_dim)
        self.latent_dim = latent_dim
        _set_logits(self, torch.zeros(latent_dim), learned)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the one-hot categorical distribution."""
        return dist.OneHotCategorical(logits=self.logits, validate_args=False)


class Bernoulli(Prior):
    """d independent binary latents, z in {0, 1}^d with 2^d joint values; d is at most 12.

    Args:
        latent_dim: number d of entries (a fact).
        probability: p(z_j = 1), the same for every entry; where it is learned, what it starts from.
        learned: learn one probability for each entry.

    Raises:
        ValueError: more than 12 entries.
    """

    space: ClassVar[Space] = "binary"
    logits: Tensor

    def __init__(self, latent_dim: int, *, probability: Annotated[float, Gt(0), Lt(1)] = 0.5, learned: bool = False) -> None:
        super().__init__()
        check_bits(latent_dim)
        self.latent_dim = latent_dim
        _set_logits(self, torch.full((latent_dim,), math.log(probability / (1 - probability))), learned)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the joint distribution of the entries."""
        return Binary(self.logits, validate_args=False)


def _set_logits(prior: nn.Module, logits: Tensor, learned: bool) -> None:
    if learned:
        prior.register_parameter("logits", nn.Parameter(logits))
    else:
        prior.register_buffer("logits", logits, persistent=False)


def check_categories(latent_dim: int) -> None:
    """Refuse fewer than two categories."""
    if latent_dim < 2:
        raise ValueError(f"latent_dim: there must be at least 2 categories, got {latent_dim}; use 2 or more")


def check_bits(latent_dim: int) -> None:
    """Refuse more binary entries than can be summed over."""
    if latent_dim > MAX_BITS:
        raise ValueError(
            f"latent_dim: {latent_dim} binary latents have 2^{latent_dim} joint values, too many to sum over; "
            f"use at most {MAX_BITS}"
        )
