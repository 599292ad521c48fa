"""A decoder of sequences that makes each step from that step's latents alone: the emission of a state-space model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from elbowroom.models.networks.base import Network
from elbowroom.models.networks.mlp import MLP, Activation


class Emission(nn.Module):
    """One network for all steps: z (..., T k), then covariates (..., C) -> flattened parameters (..., n T F)."""

    def __init__(self, network: MLP, latent_dim: int, out_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.network, self.latent_dim = network, latent_dim
        self.count, self.steps, _ = out_shape

    def forward(self, x: Tensor) -> Tensor:
        """Map z and covariates to the parameters of all entries."""
        z, c = x[..., : self.latent_dim].unflatten(-1, (self.steps, -1)), x[..., None, self.latent_dim :]
        y = self.network(torch.cat([z, c.expand(*c.shape[:-2], self.steps, -1)], -1))  # (..., T, n F)
        return y.unflatten(-1, (self.count, -1)).movedim(-2, -3).flatten(-3)


class Stepwise(Network):
    """A decoder of sequences (T, F) step by step: x_t from z_t by a multilayer perceptron that all steps share.

    z is T steps of k numbers, as the prior `markov` draws them: log p(x|z) = sum_t log p(x_t|z_t). Covariates are read at every
    step.

    Args:
        in_shape: (d + C,) for d latents and C covariates (a fact).
        out_dim: width of one output (a fact).
        out_shape: (n, T, F), with n parameters per entry (a fact).
        latent_dim: d = T k (a fact).
        hidden: widths of the hidden layers; none make it affine.
        activation: the nonlinearity after each hidden layer.

    Raises:
        ValueError: the data are no sequences, d is not a multiple of T, or it is to encode.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_dim: int,
        out_shape: tuple[int, ...],
        latent_dim: int,
        *,
        hidden: Sequence[Annotated[int, Ge(1)]] = (64,),
        activation: Activation = "silu",
    ) -> None:
        if latent_dim == 0:
            raise ValueError("stepwise is a decoder, which makes each step from its own latents; use gru to encode")
        if len(out_shape) != 3:
            raise ValueError(
                f"stepwise is for sequences, (T, F), and this network makes {tuple(out_shape[1:])}: reshape the data to "
                "sequences, or use mlp"
            )
        count, steps, features = out_shape
        if latent_dim % steps:
            near = max(1, round(latent_dim / steps)) * steps
            raise ValueError(
                f"stepwise: a latent_dim of {latent_dim} is no multiple of the {steps} steps of the data; use "
                f"latent_dim = {near}, {near // steps} for each step"
            )
        width = latent_dim // steps + in_shape[0] - latent_dim
        network = MLP((width,), count * features, hidden=hidden, activation=activation)
        super().__init__(in_shape, out_dim, Emission(network, latent_dim, (count, steps, features)))
