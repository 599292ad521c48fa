"""Normalizing flows, as a prior and for a guide family: zuko's transformations as Pyro distributions.

    z = f^-1(e),   e ~ N(0, I_d),   log p(z) = log N(f(z); 0, I) + log |det df / dz|

A density takes one pass of each transformation's network, a draw takes d (nsf, maf) or 2 (realnvp). The networks are smooth,
so densities are smooth too, and quadrature of them converges quickly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints

from elbowroom.models.priors.base import Prior

_checks = torch.distributions.Distribution._validate_args
import zuko  # noqa: E402 - importing it switches the checks of ALL torch distributions off: they are put back

torch.distributions.Distribution.set_default_validate_args(_checks)

Kind = Literal["nsf", "maf", "realnvp"]

START = 0.1  # initial size of the networks' last weights, relative to the usual: the flow starts near the identity


class FlowDistribution(TorchDistribution):
    """A `zuko.distributions.NormalizingFlow` over vectors, in the interface that Pyro's handlers expect."""

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, flow: Any) -> None:
        self.flow = flow
        super().__init__(flow.batch_shape, flow.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlowDistribution:
        """Return the distribution with a larger batch shape."""
        return FlowDistribution(self.flow.expand(Size(batch_shape)))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z, (*sample, *batch, d), differentiably."""
        return self.flow.rsample(Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(z), (*batch)."""
        # zuko's affine maps do not broadcast a value against the context
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        return self.flow.log_prob(value.expand(*batch, *self.event_shape))


class Flow(Prior):
    """A normalizing flow with learned weights: a prior of nearly any shape on R^d, which starts close to N(0, I_d).

    Durkan et al. 2019, https://arxiv.org/abs/1906.04032 (nsf); Papamakarios et al. 2017,
    https://arxiv.org/abs/1705.07057 (maf); Dinh et al. 2017, https://arxiv.org/abs/1605.08803 (realnvp).

    Args:
        latent_dim: width d of z (a fact).
        kind: `nsf` (autoregressive rational-quadratic splines on [-5, 5]), `maf` (autoregressive affine maps; with one
            latent this is a normal), or `realnvp` (affine maps of one half given the other, fast to draw; d >= 2).
        transforms: number of transformations.
        hidden: widths of the hidden layers of each transformation's network.

    Raises:
        ValueError: the kind does not go with the number of latents.
    """

    def __init__(
        self,
        latent_dim: int,
        *,
        kind: Kind = "nsf",
        transforms: Annotated[int, Ge(1)] = 3,
        hidden: Sequence[Annotated[int, Ge(1)]] = (64, 64),
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.flow = build_flow(kind, latent_dim, 0, transforms, hidden)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the flow's distribution."""
        return FlowDistribution(self.flow())


def build_flow(kind: Kind, features: int, context: int, transforms: int, hidden: Sequence[int]) -> nn.Module:
    """Build a zuko flow close to the identity."""
    if kind == "realnvp" and features < 2:
        raise ValueError("kind: realnvp maps one half of the latents given the other, and needs latent_dim >= 2; use nsf")
    kinds = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF, "realnvp": zuko.flows.RealNVP}
    flow: nn.Module = kinds[kind](features, context, transforms=transforms, hidden_features=tuple(hidden), activation=nn.SiLU)
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            last = f"hyper.{2 * len(hidden)}."  # linear layers with activations between them
            if last in name or name.rpartition(".")[0].endswith("phi"):
                parameter.mul_(START)
    return flow
