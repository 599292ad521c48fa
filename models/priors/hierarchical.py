"""Two levels of latents, z_top above z: the prior, and the top-down structure of its guide family.

    p(z_top, z)   = N(z_top; 0, I)                N(z; m(z_top),    diag s(z_top)^2)
    q(z_top, z|x) = N(z_top; m_t(x), s_t(x)^2)    N(z; m(x, z_top), diag s(x, z_top)^2)

Sonderby et al. 2016, https://arxiv.org/abs/1602.02282 (top-down inference).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import softplus

from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.base import Prior

SCALE_FLOOR = 1e-5
_UNIT = math.log(math.expm1(1.0))  # softplus(_UNIT) = 1
SITES = ("z_top", "z")


class Ancestral(TorchDistribution):
    """The marginal distribution of z under z_top ~ p_top, z | z_top ~ p(z|z_top); it can only be sampled.

    Its density and moments are integrals over z_top without a closed form, and raise NotImplementedError.

    Args:
        top: distribution of z_top.
        below: z_top (..., t) -> distribution of z, event shape (d,).
        latent_dim: width d of z.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, top: TorchDistribution, below: Callable[[Tensor], TorchDistribution], latent_dim: int) -> None:
        self.top, self.below = top, below
        super().__init__(top.batch_shape, Size((latent_dim,)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Ancestral:
        """Return the distribution with a larger batch shape."""
        return Ancestral(self.top.expand(Size(batch_shape)), self.below, self.event_shape[0])

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z_top and then z, (*sample, *batch, d), differentiably."""
        return self.below(self.top.rsample(Size(sample_shape))).rsample()

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise NotImplementedError, because the density of z alone is an integral over z_top."""
        raise NotImplementedError("z of a hierarchy has no density in closed form; score z_top and z as two sites")


class Hierarchical(Prior):
    """A two-level prior: z_top ~ N(0, I), then z | z_top ~ N(m(z_top), diag s(z_top)^2) by a small network.

    Its sites are `z_top` and `z`; the decoder reads z alone. The guide family is `hierarchical` too.

    Args:
        latent_dim: width d of z (a fact).
        top_dim: width of z_top.
        hidden: widths of the hidden layers of the network from z_top to the moments of z.
    """

    sites: ClassVar[tuple[str, ...]] = SITES

    def __init__(
        self, latent_dim: int, *, top_dim: Annotated[int, Ge(1)] = 2, hidden: Sequence[Annotated[int, Ge(1)]] = (64,)
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.top_dim = top_dim
        self.below = MLP((top_dim,), 2 * latent_dim, hidden=hidden)
        self.origin: Tensor
        self.register_buffer("origin", torch.zeros(top_dim), persistent=False)

    def top(self) -> TorchDistribution:
        """Return p(z_top) = N(0, I)."""
        return dist.Normal(self.origin, torch.ones_like(self.origin)).to_event(1)

    def given(self, z_top: Tensor) -> TorchDistribution:
        """Return p(z|z_top) for z_top (..., t)."""
        return conditional_normal(self.below(z_top))

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the marginal p(z), which can be sampled but has no density in closed form."""
        return Ancestral(self.top(), self.given, self.latent_dim)

    def forward(self, covariates: Tensor | None = None) -> Tensor:
        """Draw `z_top` and `z` inside the caller's plate; return z (..., d)."""
        return pyro.sample("z", self.given(pyro.sample("z_top", self.top())))


def conditional_normal(params: Tensor) -> TorchDistribution:
    """Turn (..., 2 d) parameters [mu, s] into N(mu, diag(sigma^2)), unit scales at s = 0."""
    mu, s = params.chunk(2, -1)
    return dist.Normal(mu, softplus(s + _UNIT) + SCALE_FLOOR).to_event(1)
