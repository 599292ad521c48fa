"""A Markov chain of latents, each drawn given the one before: the prior of state-space and deep Markov models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pyro.distributions as dist
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Size, Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.base import Prior
from elbowroom.models.priors.hierarchical import SCALE_FLOOR, conditional_normal

Step = Callable[[Tensor, slice], TorchDistribution]
"""z (..., n, k), and which n of the T - 1 transitions to take from there -> distributions of the next z, event shape (k,)."""


class Chain(TorchDistribution):
    """The distribution of z_1, ..., z_T side by side, (T k,): log p(z) = log p(z_1) + sum_(t > 1) log p(z_t | z_(t-1)).

    All steps are scored at once; they are drawn one after the other.

    Args:
        first: distribution of z_1, event shape (k,).
        step: distribution of z_t given z_(t-1).
        steps: T.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.independent(constraints.real, 1)
    has_rsample = True

    def __init__(self, first: TorchDistribution, step: Step, steps: int) -> None:
        self.first, self.step, self.steps = first, step, steps
        super().__init__(first.batch_shape, Size((steps * first.event_shape[0],)), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Chain:
        """Return the distribution with a larger batch shape."""
        return Chain(self.first.expand(Size(batch_shape)), self.step, self.steps)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z, (*sample, *batch, T k), differentiably."""
        z = [self.first.rsample(Size(sample_shape))]
        for t in range(self.steps - 1):
            z.append(self.step(z[-1][..., None, :], slice(t, t + 1)).rsample()[..., 0, :])
        return torch.cat(z, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density, nats."""
        z = value.unflatten(-1, (self.steps, -1))
        first = self.first.log_prob(z[..., 0, :])
        if self.steps == 1:
            return first
        return first + self.step(z[..., :-1, :], slice(0, self.steps - 1)).log_prob(z[..., 1:, :]).sum(-1)


class Transition(nn.Module, ABC):
    """The distribution of z_t given z_(t-1), the same at every step."""

    @abstractmethod
    def forward(self, z: Tensor) -> TorchDistribution:
        """Return p(z_t | z_(t-1) = z) for z (..., k)."""


class Affine(Transition):
    """z_t = A z_(t-1) + b + N(0, diag s^2); it starts at A = 0.9 I and the noise that keeps unit variance."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)
        with torch.no_grad():
            self.map.weight.copy_(0.9 * torch.eye(width))
            self.map.bias.zero_()
        self.raw = nn.Parameter(torch.full((width,), -0.6))  # softplus of it is 0.4375, nearly sqrt(1 - 0.9^2)

    def forward(self, z: Tensor) -> TorchDistribution:
        """Return N(A z + b, diag s^2)."""
        loc = self.map(z)
        return dist.Normal(loc, (softplus(self.raw) + SCALE_FLOOR).expand_as(loc)).to_event(1)


class Gated(Transition):
    """A gate g between an affine map and a network: the mean is (1 - g) (A z + b) + g h(z), the scale a function of h(z)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.proposal = (MLP((width,), width, hidden=(hidden,)) for _ in range(2))
        self.map, self.scale = nn.Linear(width, width), nn.Linear(width, width)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(width))
            self.map.bias.zero_()

    def forward(self, z: Tensor) -> TorchDistribution:
        """Return the gated normal."""
        gate, proposal = torch.sigmoid(self.gate(z)), self.proposal(z)
        return conditional_normal(torch.cat([torch.lerp(self.map(z), proposal, gate), self.scale(softplus(proposal))], -1))


class Recurrent(Transition):
    """A gated recurrent unit without input: the mean is (1 - u) c + u z, the scale an affine function of z through softplus."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gates, self.candidate, self.scale = nn.Linear(width, 2 * width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, z: Tensor) -> TorchDistribution:
        """Return the normal around the unit's next state."""
        r, u = torch.sigmoid(self.gates(z)).chunk(2, -1)
        c = torch.tanh(self.candidate(r * z))
        return conditional_normal(torch.cat([torch.lerp(c, z, u), self.scale(z)], -1))


TRANSITIONS: dict[str, type[Transition]] = {"linear": Affine, "gated": Gated, "gru": Recurrent}


class Markov(Prior):
    """A Markov chain: z is T steps of k = latent_dim / T numbers, p(z) = p(z_1) prod_(t > 1) p(z_t | z_(t-1)).

    z_1 ~ N(m, diag s^2), learned, from the standard normal on. With the decoder `stepwise`, which makes x_t from z_t, this is
    a state-space model (`linear`) or a deep Markov model (`gated`; Krishnan, Shalit and Sontag 2017,
    https://arxiv.org/abs/1609.09869); the guide `markov` has the same shape. Log density, nats: that of `Chain`.

    Args:
        latent_dim: width d = T k of z (a fact).
        feature_shape: shape of a datum as the encoder sees it (a fact).
        steps: T; by default the steps of the data where they are sequences, else d, one coordinate for each step.
        transition: how z_t depends on z_(t-1): `linear`, `gated`, or `gru`, a recurrent unit without input; with normal noise.
        hidden: width of the hidden layers of `gated`.

    Raises:
        ValueError: latent_dim is not a multiple of the steps.
    """

    def __init__(
        self,
        latent_dim: int,
        feature_shape: tuple[int, ...] = (),
        *,
        steps: Annotated[int, Ge(1)] | None = None,
        transition: Literal["linear", "gated", "gru"] = "linear",
        hidden: Annotated[int, Ge(1)] = 32,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.steps = steps or (feature_shape[0] if len(feature_shape) == 2 else latent_dim)
        if latent_dim % self.steps:
            near = max(1, round(latent_dim / self.steps)) * self.steps
            of = "of the data, (T, F) = " + str(tuple(feature_shape)) if steps is None else "asked for"
            raise ValueError(
                f"steps: a latent_dim of {latent_dim} is no multiple of the {self.steps} steps {of}; use latent_dim = {near}, "
                f"{near // self.steps} for each step, or set steps"
            )
        width = latent_dim // self.steps
        self.loc, self.raw = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.step = TRANSITIONS[transition](width, hidden)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return p(z), event shape (T k,)."""
        first = conditional_normal(torch.cat([self.loc, self.raw], -1))
        return Chain(first, lambda z, which: self.step(z), self.steps)


def steps_of(steps: int | None, feature_shape: tuple[int, ...], latent_dim: int) -> int:
    """Return the steps of a guide: the prior's, else the data's where they divide the latents, else one for each latent."""
    if steps is None and len(feature_shape) == 2:
        steps = feature_shape[0]
    return steps if steps and latent_dim % steps == 0 else latent_dim
