"""The VAE: a Pyro model p(x, z) = p(z) p(x|z) and an amortized Pyro guide q(z|x), both plain Pyro callables."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.errors import UserError
from elbowroom.models.guides.base import AmortizedGuide, Family, LogDensity
from elbowroom.models.likelihoods.base import Likelihood
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.networks.mlp import Linear
from elbowroom.models.priors.base import Prior
from elbowroom.models.priors.standard import Normal

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
        covariate_dim: number C of covariates c; with some it is the conditional VAE p(z|c) p(x|z, c).
    """

    def __init__(
        self,
        prior: Prior,
        likelihood: Likelihood,
        decoder: nn.Module,
        posterior: AmortizedGuide,
        *,
        covariate_dim: int = 0,
    ) -> None:
        super().__init__()
        self.prior = prior
        self.likelihood = likelihood
        self.decoder = decoder
        self.posterior = posterior
        self.covariate_dim = covariate_dim
        self.covariate_loc: Tensor
        self.covariate_scale: Tensor
        if covariate_dim:
            self.register_buffer("covariate_loc", torch.zeros(covariate_dim))
            self.register_buffer("covariate_scale", torch.ones(covariate_dim))

    @property
    def name(self) -> str:
        """The prefix of this instance's parameters in Pyro's store.

        It is unique, because `pyro.module` gives a second module of the same name the weights of the first.
        """
        if self not in _names:
            _names[self] = f"vae{next(_counter)}"
        return _names[self]

    def decode(self, z: Tensor, covariates: Tensor | None = None, exposure: Tensor | None = None) -> TorchDistribution:
        """Return p(x|z, c) for z of shape (..., d), covariates (N, C) in their own units and exposure (N,)."""
        c = self._standard(covariates)
        weight = next(self.decoder.parameters(), z)
        z = z.to(weight.dtype)  # a user's prior may draw in another precision
        if c is not None:
            batch = torch.broadcast_shapes(z.shape[:-1], c.shape[:-1])
            z = torch.cat([z.expand(*batch, -1), c.expand(*batch, -1)], -1)
        params = self.decoder(z)
        return self.likelihood(params) if exposure is None else self.likelihood(params, exposure)

    def encode(self, x: Tensor, covariates: Tensor | None = None, exposure: Tensor | None = None) -> TorchDistribution:
        """Return q(z|x, c), batch shape (N,), event shape (d,); arguments as in `model`."""
        return self.posterior(*self._seen(x, covariates, exposure))

    def centre(self, z: Tensor, covariates: Tensor | None = None, exposure: Tensor | None = None) -> Tensor:
        """Return E[x|z, c], (..., *event), or its substitute if x has no mean; see `Likelihood.centre`."""
        return self.likelihood.centre(self.decode(z, covariates, exposure))

    def adapt(self, x: Tensor, covariates: Tensor | None = None, exposure: Tensor | None = None) -> None:
        """Set the data-dependent constants of encoder, prior and likelihood from training data (N, *event)."""
        likelihood: Any = self.likelihood
        rates = {"exposure": exposure} if exposure is not None and likelihood.takes_exposure else {}
        likelihood.adapt(x, **rates)
        features = self.likelihood.features(x)
        self.posterior.adapt(features)
        self.prior.adapt(features)
        if covariates is not None:
            scale = covariates.std(0) if len(covariates) > 1 else torch.zeros_like(covariates[0])
            self.covariate_loc = covariates.mean(0)
            self.covariate_scale = torch.where(scale > 1e-6 * self.covariate_loc.abs(), scale, torch.ones_like(scale))

    def model(
        self,
        x: Tensor | None = None,
        covariates: Tensor | None = None,
        exposure: Tensor | None = None,
        *,
        size: int | None = None,
        n: int = 1,
    ) -> Tensor:
        """Run the generative program p(z) p(x|z), or p(z|c) p(x|z, c) given covariates.

        Args:
            x: data or a mini-batch, (B, *event), NaN where an entry is missing; None draws x from the joint.
            covariates: (B, C), in their own units.
            exposure: (B,), multiplies the rate of counts.
            size: number of data that the mini-batch stands for (default B): log densities are scaled by size / B.
            n: number of data to draw if neither x nor covariates are given.

        Returns:
            The value of site `x`, (B or n, *event).
        """
        for part in ("prior", "decoder", "likelihood"):
            pyro.module(f"{self.name}.{part}", getattr(self, part))
        with _data_plate(_length(n, x, covariates, exposure), size, x):
            z = self._prior(covariates)
            return pyro.sample("x", self._observed(z, x, covariates, exposure), obs=x)

    def guide(
        self,
        x: Tensor | None = None,
        covariates: Tensor | None = None,
        exposure: Tensor | None = None,
        *,
        size: int | None = None,
        n: int = 1,
    ) -> Tensor:
        """Run the guide q(z|x, c): it draws its sites from the encoder, or from the prior if there is no x.

        Arguments as in `model`.
        """
        if x is not None:
            pyro.module(f"{self.name}.posterior", self.posterior)
        with _data_plate(_length(n, x, covariates, exposure), size, x):
            return self._prior(covariates) if x is None else self.posterior.draw(*self._seen(x, covariates, exposure))

    def variational_parameters(
        self, x: Tensor | None = None, covariates: Tensor | None = None, exposure: Tensor | None = None, **_: int | None
    ) -> tuple[Tensor, Family] | None:
        """Return the parameters phi (N, P) of each datum's q(z|x, c) and the family that makes q from them.

        An audit uses it to refit the family to every datum (`inference.search.best_of_family`). None if q has several sites, or
        there is no x. Arguments as in `guide`.
        """
        return None if x is None else self.posterior.variational_parameters(*self._seen(x, covariates, exposure))

    def _prior(self, covariates: Tensor | None) -> Tensor:
        """Run the prior's program, given the covariates if it is conditional."""
        return self.prior(self._standard(covariates)) if self.prior.covariates else self.prior()

    def _observed(self, z: Tensor, x: Tensor | None, covariates: Tensor | None, exposure: Tensor | None) -> TorchDistribution:
        """Return p(x|z, c) of the observed entries of x."""
        p = self.decode(z, covariates, exposure)
        return self.likelihood.incomplete(p, x.isnan()) if x is not None and bool(x.isnan().any()) else p

    def _standard(self, covariates: Tensor | None) -> Tensor | None:
        """Return covariates in units of their spread in the training data."""
        if covariates is None:
            if self.covariate_dim:
                raise UserError(f"this model is conditional: it needs covariates of shape (N, {self.covariate_dim})")
            return None
        if covariates.shape[-1] != self.covariate_dim:
            raise UserError(f"the model has {self.covariate_dim} covariates, {covariates.shape[-1]} were given")
        return (covariates - self.covariate_loc) / self.covariate_scale

    def _seen(
        self, x: Tensor, covariates: Tensor | None, exposure: Tensor | None
    ) -> tuple[Tensor, Tensor | None, LogDensity | None]:
        """Return the guide's inputs: features of x, standardised covariates (and log exposure), and log p(x, z)."""
        c = self._standard(covariates)
        beside = [*(() if c is None else (c,)), *(() if exposure is None else (exposure.log()[:, None],))]

        def log_joint(z: Tensor) -> Tensor:
            p = self._observed(z, x, covariates, exposure)
            return p.log_prob(x) + self.prior.distribution(c if self.prior.covariates else None).log_prob(z)

        return self.likelihood.features(x), torch.cat(beside, -1) if beside else None, log_joint

    def linear_gaussian(self) -> LinearGaussian | None:
        """Return the closed-form model, in float64, if prior, decoder and likelihood allow it; else None.

        It needs a normal prior, a linear decoder, and a gaussian likelihood with a scale that does not depend on z.
        """
        likelihood, decoder = self.likelihood, self.decoder
        if not (
            type(self.prior) is Normal
            and not self.prior.covariates
            and not self.covariate_dim
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


def _length(n: int, *given: Tensor | None) -> int:
    return next((len(tensor) for tensor in given if tensor is not None), n)


Batch = dict[str, Tensor]
"""Arguments of model and guide for some data: `x` and, where there are any, `covariates` and `exposure`."""
