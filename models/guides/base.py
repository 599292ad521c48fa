"""Guides q(z|x): an encoder gives the parameters, and a family turns them into a distribution.

A guide is a module that returns a distribution: `q = guide(x)`. A family sets `param_dim`, the encoder's output width.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from elbowroom.errors import UserError
from elbowroom.models import spaces
from elbowroom.models.networks.base import Network
from elbowroom.models.spaces import Space

LogDensity = Callable[[Tensor], Tensor]
"""z (..., N, d) -> (..., N), in nats; each datum's density depends on its own z alone."""

SCALE_FLOOR = 1e-5
_UNIT = math.log(math.expm1(1.0))  # softplus(_UNIT) = 1: an encoder that outputs 0 gives unit scales


def positive_scale(s: Tensor) -> Tensor:
    """Return softplus(s + c) + 1e-5, 1 at s = 0."""
    return softplus(s + _UNIT) + SCALE_FLOOR


class Family(nn.Module, ABC):
    """A map from unconstrained parameters (..., param_dim) to a distribution over z with event shape (d,).

    Attributes:
        latent_dim: width d of z.
        param_dim: width of the parameters, which is the encoder's output width.
        space: the set that z lives in.
        sites: names of the sample sites of `draw`.
        reparametrized: whether draws are differentiable in the parameters (`rsample`).
    """

    latent_dim: int
    param_dim: int
    space: ClassVar[Space] = "real"
    sites: ClassVar[tuple[str, ...]] = ("z",)
    reparametrized: ClassVar[bool] = True

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the parameters before they are flattened: (T, P) asks an encoder of sequences for P of each step."""
        return (self.param_dim,)

    @abstractmethod
    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn parameters (..., param_dim) into a distribution over z, event shape (d,)."""

    def draw(self, params: Tensor) -> Tensor:
        """Draw the family's sites inside the caller's plate; return z (..., d)."""
        return pyro.sample("z", self(params))

    def refined(self, params: Tensor, log_joint: LogDensity) -> Tensor:
        """Return improved parameters, (N, param_dim), if the family refines those of the encoder; else the same."""
        return params


class Onto(Family):
    """A family on R^m mapped to another space by that space's standard map (exp; stick breaking)."""

    def __init__(self, base: Family, space: Space, latent_dim: int) -> None:
        super().__init__()
        self.base = base
        self.latent_dim = latent_dim
        self.param_dim = base.param_dim
        self.space = space  # type: ignore[misc]
        self.reparametrized = base.reparametrized  # type: ignore[misc]

    @property
    def param_shape(self) -> tuple[int, ...]:
        """The shape of the base's parameters."""
        return self.base.param_shape

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn parameters into the mapped distribution."""
        return carried(self.base(params), self.space)

    def refined(self, params: Tensor, log_joint: LogDensity) -> Tensor:
        """Refine the base's parameters, in its own coordinates."""
        transform = spaces.onto(self.space)

        def free(u: Tensor) -> Tensor:
            z = transform(u)
            return log_joint(z) + transform.log_abs_det_jacobian(u, z)

        return self.base.refined(params, free)


def carried(base: TorchDistribution, space: Space) -> TorchDistribution:
    """Map a distribution on R^m to another space.

    The map caches its latest draw, because a draw that was rounded to the edge of the space cannot be inverted from z alone.
    """
    return dist.TransformedDistribution(base, [spaces.onto(space).with_cache(1)], validate_args=False)


class AmortizedGuide(nn.Module):
    """q(z|x, c) = family(encoder(standardised x, marks of missing entries, covariates)), the amortized guide.

    Columns of a table are standardised separately; images and sequences, where all entries share a unit, by one number.

    Args:
        encoder: network from x to `family.param_dim` numbers.
        family: the distribution family.
        marks: tell the encoder which entries are missing (NaN); else a missing entry looks like an average one.
    """

    def __init__(self, encoder: nn.Module, family: Family, *, marks: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.family = family
        self.marks = marks
        self.loc: Tensor
        self.scale: Tensor
        self.register_buffer("loc", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def adapt(self, x: Tensor) -> None:
        """Centre and scale the encoder's input by the mean and standard deviation of training data (N, *event)."""
        if not x.is_floating_point():
            raise UserError("the encoder needs floating-point data")
        wide = x.double()  # the square of 1e30 overflows in float32
        seen = ~wide.isnan()
        loc = wide.nansum(0) / seen.sum(0).clamp_min(1)
        centred = torch.where(seen, wide - (loc if x.dim() == 2 else wide.nansum() / seen.sum().clamp_min(1)), 0.0)
        over = 0 if x.dim() == 2 else tuple(range(x.dim()))
        scale = (centred.square().sum(over) / (seen.sum(over) - 1).clamp_min(1)).sqrt()
        varies = scale > 4 * torch.finfo(x.dtype).eps * (loc.abs() if x.dim() == 2 else loc.abs().max())
        self.loc = loc.to(x.dtype)
        self.scale = torch.where(varies, scale, 1.0).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)

    def params(self, x: Tensor, covariates: Tensor | None = None) -> Tensor:
        """Return the encoder's output, (N, family.param_dim), for x (N, *event), NaN where missing, and c (N, C)."""
        seen = ~x.isnan() if self.marks else None
        standard = ((x - self.loc) / self.scale).nan_to_num(nan=0.0)
        if seen is None and covariates is None:
            return self.encoder(standard)
        join = getattr(self.encoder, "join", None) or Network.join.__get__(self.encoder)
        return self.encoder(join(standard, None if seen is None else seen.to(x.dtype), covariates))

    def forward(self, x: Tensor, covariates: Tensor | None = None, log_joint: LogDensity | None = None) -> TorchDistribution:
        """Return q(z|x) with batch shape (N,) and event shape (d,) for x of shape (N, *event).

        Args:
            x: the encoder's view of the data; NaN where missing.
            covariates: (N, C), standardised.
            log_joint: z (..., N, d) -> log p(x_n, z_n), (..., N), for families that refine the encoder's parameters.
        """
        return self.family(self._refined(x, covariates, log_joint))

    def draw(self, x: Tensor, covariates: Tensor | None = None, log_joint: LogDensity | None = None) -> Tensor:
        """Draw the guide's sites inside the caller's plate; arguments as `forward`; return z (N, d)."""
        return self.family.draw(self._refined(x, covariates, log_joint))

    def variational_parameters(
        self, x: Tensor, covariates: Tensor | None = None, log_joint: LogDensity | None = None
    ) -> tuple[Tensor, Family] | None:
        """Return phi (N, P) of each datum, refined if the family does so, and the family that makes q from it.

        None if q has several sites. Arguments as in `forward`.
        """
        return (self._refined(x, covariates, log_joint), self.family) if self.family.sites == Family.sites else None

    def _refined(self, x: Tensor, covariates: Tensor | None, log_joint: LogDensity | None) -> Tensor:
        params = self.params(x, covariates)
        return params if log_joint is None else self.family.refined(params, log_joint)
