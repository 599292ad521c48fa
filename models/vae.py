"""The VAE: a Pyro model p(x, z) = p(z) p(x|z) and an amortized Pyro guide q(z|x), both plain Pyro callables."""

from __future__ import annotations

import copy
import itertools
import weakref

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.models.guides import AmortizedGuide
from elbowroom.models.likelihoods import Gaussian, Likelihood
from elbowroom.models.linear import LinearGaussian
from elbowroom.models.networks import Linear
from elbowroom.models.priors import Normal, Prior

PLATE = "data"

_names: weakref.WeakKeyDictionary[VAE, str] = weakref.WeakKeyDictionary()
_counter = itertools.count()


class VAE(nn.Module):
    """A variational autoencoder as a pair of Pyro programs.

    `vae.model` and `vae.guide` are ordinary Pyro callables with a plate named `data`: SVI, Predictive, Importance, MCMC and
    poutine handlers work on them.

    Args:
        prior: the Pyro program that draws z.
        likelihood: p(x|z), from decoder outputs.
        decoder: network from z (d,) to `likelihood.param_dim`.
        posterior: the amortized guide, x -> q(z|x).
    """

    def __init__(self, prior: Prior, likelihood: Likelihood, decoder: nn.Module, posterior: AmortizedGuide) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.decoder = decoder
        self.posterior = posterior

    @property
    def name(self) -> str:
        """The prefix of this instance's parameters in Pyro's store.

        It is never used twice: `pyro.module` hands a second module of the same name the weights of the first.
        """
        if self not in _names:
            _names[self] = f"vae{next(_counter)}"
        return _names[self]

    def decode(self, z: Tensor) -> TorchDistribution:
        """Return p(x|z) for z of shape (..., d)."""
        return self.likelihood(self.decoder(z))

    def adapt(self, x: Tensor) -> None:
        """Set the data-dependent constants of encoder and likelihood from training data (N, *event)."""
        self.posterior.adapt(x)
        self.likelihood.adapt(x)

    def model(self, x: Tensor | None = None, *, size: int | None = None, n: int = 1) -> Tensor:
        """Run the generative program p(z) p(x|z).

        Args:
            x: data or a mini-batch, (B, *event); None draws x from the joint.
            size: number of data that the mini-batch stands for (default B): log densities are scaled by size / B.
            n: how many data to draw when x is None.

        Returns:
            The value of site `x`, (B or n, *event).
        """
        for part in ("prior", "decoder", "likelihood"):
            pyro.module(f"{self.name}.{part}", getattr(self, part))
        with _data_plate(n if x is None else len(x), size, x):
            return pyro.sample("x", self.decode(self.prior()), obs=x)

    def guide(self, x: Tensor | None = None, *, size: int | None = None, n: int = 1) -> Tensor:
        """Run the guide q(z|x): site `z` from the encoder, or from the prior where there is no x to condition on.

        Args:
            x: data or a mini-batch, (B, *event).
            size: as in `model`.
            n: as in `model`.
        """
        if x is None:
            with _data_plate(n, size, None):
                return self.prior()
        pyro.module(f"{self.name}.posterior", self.posterior)
        with _data_plate(len(x), size, x):
            return pyro.sample("z", self.posterior(x))

    def linear_gaussian(self) -> LinearGaussian | None:
        """Return the closed-form model when prior, decoder and likelihood make one; else None.

        That is: normal prior, linear decoder, gaussian likelihood whose scale does not depend on z. In float64.
        """
        likelihood, decoder = self.likelihood, self.decoder
        if not (
            isinstance(self.prior, Normal)
            and isinstance(decoder, Linear)
            and isinstance(likelihood, Gaussian)
            and likelihood.scale != "decoder"
        ):
            return None
        layer = decoder.body
        if not isinstance(layer, nn.Linear):
            return None
        with torch.no_grad():
            likelihood = copy.deepcopy(likelihood).double()
            unit, loc = likelihood.unit.flatten(), likelihood.loc.flatten()
            noise = likelihood.noise_scale().expand(likelihood.event_shape).flatten()
            return LinearGaussian(
                W=unit[:, None] * layer.weight.double(), mu=loc + unit * layer.bias.double(), psi=noise.square()
            )


def _data_plate(batch: int, size: int | None, like: Tensor | None) -> pyro.plate:
    """Open the data plate; a mini-batch of B out of `size` data is scaled by size / B."""
    if size is None or size == batch:
        return pyro.plate(PLATE, batch)
    device = None if like is None else like.device
    return pyro.plate(PLATE, size, subsample=torch.arange(batch, device=device))
