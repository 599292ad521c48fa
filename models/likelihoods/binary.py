"""Likelihoods of pixels: black or white, and grey values."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models.likelihoods.base import Likelihood, first_bad


class Bernoulli(Likelihood):
    """Independent binary entries: log p(x|z) = sum_i x_i l_i - softplus(l_i), l the decoder's logits."""

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return Bernoulli(logits = params)."""
        return dist.Bernoulli(logits=self._shaped(params), validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries other than 0 and 1."""
        bad = (x != 0) & (x != 1)
        if not bad.any():
            return None
        return (
            f"bernoulli needs 0 or 1, found {first_bad(x, bad)}: binarize the data "
            "(data.binarize = a threshold), or use model.likelihood = continuous_bernoulli for values in [0, 1]"
        )


class Grey(dist.ContinuousBernoulli):
    """A continuous Bernoulli that is exact at any logit l, also where torch's own rounds the probability to 0 or 1."""

    def _apart(self) -> tuple[Tensor, Tensor]:
        """Return where l is too small for formulas that divide by it, and l with 1 there."""
        small = self.logits.abs() < 1e-2
        return small, torch.where(small, 1.0, self.logits)

    def _cont_bern_log_norm(self) -> Tensor:
        """Return log(l / tanh(l / 2)), the normalising constant of the density."""
        small, l = self._apart()
        square = torch.where(small, self.logits, 0.0).square()
        series = math.log(2) + square / 12 - 7 * square.square() / 1440
        return torch.where(small, series, (l / torch.tanh(l / 2)).log())

    @property
    def mean(self) -> Tensor:
        """Return 1 / (1 - e^-l) - 1 / l."""
        small, l = self._apart()
        return torch.where(small, 0.5 + self.logits / 12, 0.5 + 0.5 / torch.tanh(l / 2) - 1 / l)

    @property
    def variance(self) -> Tensor:
        """Return 1 / l^2 - 1 / (4 sinh^2(l / 2))."""
        small, l = self._apart()
        a = l.abs()
        return torch.where(small, 1 / 12 - self.logits.square() / 240, a**-2 - (-a).exp() / torch.expm1(-a).square())

    def icdf(self, u: Tensor) -> Tensor:
        """Return log(1 + u (e^l - 1)) / l."""
        small, l = self._apart()
        a = l.abs()
        v = torch.where(l > 0, u, 1 - u)
        x = (1 + (v + (1 - v) * (-a).exp()).log() / a).clamp(0.0, 1.0)
        return torch.where(small, u, torch.where(l > 0, x, 1 - x))


class ContinuousBernoulli(Likelihood):
    """Independent entries in [0, 1] (grey pixels), with the normalising constant that a Bernoulli on grey data lacks.

    p(x|l) = C(l) exp(x l), C(l) = l / (e^l - 1) (Loaiza-Ganem and Cunningham 2019, https://arxiv.org/abs/1907.06845).
    """

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return ContinuousBernoulli(logits = params)."""
        logits = self._shaped(params)
        return Grey(logits=logits, validate_args=False).to_event(len(self.event_shape))

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries outside [0, 1]."""
        bad = (x < 0) | (x > 1)
        if not bad.any():
            return None
        return (
            f"continuous_bernoulli needs values in [0, 1], found {first_bad(x, bad)}: divide the data by their largest "
            "possible value (data.scale), or use model.likelihood = gaussian"
        )
