"""The likelihood of a whole row of counts given its total: multinomial, with dependent entries."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor

from elbowroom.models.likelihoods.base import Likelihood, refusal

NEVER = -1e30  # the logit of a missing entry


class Composition(TorchDistribution):
    """p(x | sum x) of a row of counts: multinomial over the observed entries.

    Args:
        logits: (..., *event), not normalised.
        total: the total of a draw, ().
        event_dim: number of dimensions of the event.
        missing: True where an entry is missing, broadcastable to (..., *event); None for none.
    """

    arg_constraints = {"logits": constraints.real}

    def __init__(self, logits: Tensor, total: Tensor, event_dim: int, missing: Tensor | None = None) -> None:
        self.logits, self.total, self.missing = logits, total, missing
        super().__init__(
            logits.shape[: logits.dim() - event_dim], logits.shape[logits.dim() - event_dim :], validate_args=False
        )

    @property
    def support(self) -> Any:
        """Rows of whole numbers."""
        return constraints.independent(constraints.nonnegative_integer, self.event_dim)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Composition:
        """Return the distribution with another batch shape."""
        logits = self.logits.expand(torch.Size(batch_shape) + self.event_shape)
        return Composition(logits, self.total, self.event_dim, self.missing)

    def log_shares(self) -> Tensor:
        """Return the log probabilities of the observed entries, flat: (..., width)."""
        logits = self.logits if self.missing is None else torch.where(self.missing, NEVER, self.logits)
        return logits.flatten(logits.dim() - self.event_dim).log_softmax(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return log n! - sum_i log x_i! + sum_i x_i log p_i over the observed entries; n is their total."""
        x = x if self.missing is None else torch.where(self.missing, 0.0, x)
        x = x.flatten(x.dim() - self.event_dim)
        return (x.sum(-1) + 1).lgamma() - (x + 1).lgamma().sum(-1) + (x * self.log_shares()).sum(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw rows with the total `total`, NaN where an entry is missing."""
        logits = self.logits.flatten(self.logits.dim() - self.event_dim)
        counts = dist.Multinomial(max(1, int(self.total.round())), logits=logits, validate_args=False)
        x = counts.sample(torch.Size(sample_shape)).reshape(*sample_shape, *self.logits.shape)
        return x if self.missing is None else torch.where(self.missing, torch.nan, x)

    @property
    def mean(self) -> Tensor:
        """Mean of a row with the total `total`."""
        flat = self.logits.flatten(self.logits.dim() - self.event_dim)
        return (self.total * flat.softmax(-1)).reshape(self.logits.shape)

    @property
    def variance(self) -> Tensor:
        """Variance of each entry of a row with the total `total`."""
        return self.mean * (1 - self.mean / self.total)


class Multinomial(Likelihood):
    """A whole row of counts given its total n: p(x|z, n) = n! / (x_1! ... x_D!) q_1^x_1 ... q_D^x_D.

    q = softmax(log share in the training data + output), over all entries of a datum of any shape. The total carries no
    information about z. If entries are missing, the others are multinomial given their own total, with q renormalised over
    them. Draws and means use the mean total of the training data (Liang et al. 2018, https://arxiv.org/abs/1802.05814).
    """

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__(event_shape)
        self.log_share: Tensor
        self.total: Tensor
        self.register_buffer("log_share", torch.zeros(self.event_shape))
        self.register_buffer("total", torch.tensor(float(self.width)))

    def adapt(self, x: Tensor) -> None:
        """Set the share of each entry, with half a count added to its total, and the mean total of a row.

        A column with missing entries contributes its mean.
        """
        wide = x.double()
        n = (~wide.isnan()).sum(0).clamp_min(1)
        mean = wide.nansum(0) / n
        self.log_share = ((wide.nansum(0) + 0.5) / n).log().to(self.log_share)
        self.total = mean.sum().round().clamp_min(1).to(self.total)

    def forward(self, params: Tensor) -> TorchDistribution:
        """Return the multinomial distribution."""
        return Composition(self.log_share + self._shaped(params), self.total, len(self.event_shape))

    def incomplete(self, p: TorchDistribution, missing: Tensor) -> TorchDistribution:
        """Return the multinomial distribution of the observed entries, given their own total."""
        return Composition(p.logits, p.total, p.event_dim, missing)

    def problem(self, x: Tensor) -> str | None:
        """Refuse entries other than whole numbers >= 0."""
        return refusal("multinomial", "whole numbers >= 0", x, (x < 0) | (x != x.round()))

    def features(self, x: Tensor) -> Tensor:
        """Return log(1 + x)."""
        return x.log1p()
