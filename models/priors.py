"""Priors p(z): small Pyro programs that draw their own sites.

A prior is called inside the data plate. It draws one or more sample sites and returns the tensor z that the decoder
reads. Positional constructor arguments are facts of the model; keyword-only ones are the user's options.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn


class Prior(nn.Module, ABC):
    """A Pyro program that draws the local latent sites of one datum.

    Attributes:
        latent_dim: width d of the tensor that `forward` returns.
    """

    latent_dim: int

    @abstractmethod
    def forward(self) -> Tensor:
        """Draw the latent sites inside the caller's plate; return z of shape (..., d)."""


class Normal(Prior):
    """The standard normal prior, z ~ N(0, I_d), at site `z`.

    Log density: log p(z) = -1/2 (d log 2 pi + sum_j z_j^2).
    """

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.loc: Tensor
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self) -> Tensor:
        """Draw site `z`, shape (..., d)."""
        return pyro.sample("z", dist.Normal(self.loc, torch.ones_like(self.loc)).to_event(1))
