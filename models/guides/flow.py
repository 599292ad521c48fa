"""A guide with a normalizing flow as its density, conditioned by the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.guides.base import Family
from elbowroom.models.priors.flow import FlowDistribution, Kind, build_flow


class FlowFamily(Family):
    """q(z|x), a normalizing flow conditioned on a vector h(x) from the encoder: a guide of nearly any shape.

    Its transformations share their weights over the data, and it starts close to N(0, I) for every x.

    Args:
        latent_dim: width d of z (a fact).
        kind: `nsf` (autoregressive splines), `maf` (autoregressive affine maps) or `realnvp` (fast to draw; d >= 2).
        transforms: number of transformations.
        hidden: widths of the hidden layers of each transformation's network.
        context: width of h(x), the encoder's output.

    Raises:
        ValueError: the kind does not fit the number of latents.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        kind: Kind = "nsf",
        transforms: Annotated[int, Ge(1)] = 3,
        hidden: Sequence[Annotated[int, Ge(1)]] = (64, 64),
        context: Annotated[int, Ge(1)] = 32,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.param_dim = context
        self.flow = build_flow(kind, latent_dim, context, transforms, hidden)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Turn (..., context) numbers into the flow's distribution given them."""
        return FlowDistribution(self.flow(params))
