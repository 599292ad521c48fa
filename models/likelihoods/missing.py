"""Data with missing entries: NaN in x is an entry that was not observed, and its factor is left out of p(x|z).

    log p(x_seen | z) = sum_{i seen} log p(x_i | z)

for a likelihood with independent entries given z (Nazabal et al. 2020, https://arxiv.org/abs/1807.03653). This is the exact
marginal likelihood of the observed entries, if missingness does not depend on the missing value (missing at random).
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor


def entrywise(p: TorchDistribution, x: Tensor) -> Tensor:
    """Return log p of each entry of x, (..., *event), for a distribution with independent entries.

    Such a distribution is an `Independent` over scalars, or has a method `log_prob_entries`.

    Raises:
        TypeError: the entries are not independent.
    """
    if hasattr(p, "log_prob_entries"):
        entries: Tensor = p.log_prob_entries(x)
        return entries
    while isinstance(p, dist.Independent):
        p = p.base_dist
    if p.event_dim:
        raise TypeError(f"{type(p).__name__}: its entries are not independent")
    return p.log_prob(x)


class Incomplete(TorchDistribution):
    """p(x|z) of the observed entries of x; a draw has NaN at the others.

    Args:
        base: p(x|z), with independent entries.
        missing: True where an entry is missing, broadcastable to (..., *event).
        inside: a value of the support, a number or (*event), used in place of missing entries; its density is not counted.
    """

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: TorchDistribution, missing: Tensor, inside: float | Tensor) -> None:
        self.base, self.missing, self.inside = base, missing, inside
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        """The support of the base."""
        return self.base.support

    @property
    def mean(self) -> Tensor:
        """Mean of every entry, observed or not."""
        return self.base.mean

    @property
    def variance(self) -> Tensor:
        """Variance of every entry, observed or not."""
        return self.base.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> Incomplete:
        """Return the distribution with another batch shape."""
        return Incomplete(self.base.expand(batch_shape), self.missing, self.inside)

    def filled(self, x: Tensor) -> Tensor:
        """Return x with a value of the support where it is missing."""
        return torch.where(self.missing, torch.as_tensor(self.inside, dtype=x.dtype, device=x.device), x)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the sum of log p over the observed entries, (...)."""
        entries = torch.where(self.missing, 0.0, entrywise(self.base, self.filled(x)))
        n = len(self.event_shape)
        return entries.flatten(entries.dim() - n).sum(-1) if n else entries

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw x, with NaN where it is missing."""
        x = self.base.sample(torch.Size(sample_shape))
        x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
        return torch.where(self.missing, torch.nan, x)
