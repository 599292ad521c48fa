"""A normal prior whose coordinates are correlated: in a band, or by a few common factors."""

from __future__ import annotations

from typing import Annotated, Literal

import pyro.distributions as dist
import torch
from annotated_types import Ge
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from elbowroom.models.priors.base import Located


class AutoregressiveNormal(Located):
    """Normal coordinates of unit variance that are correlated along their order, z ~ N(m, R), m = 0 or A c.

    `banded`: a stationary autoregression of order p, z_j - m_j = sum_(i <= p) a_i (z_(j-i) - m_(j-i)) + e_j, so that the
    precision R^-1 is zero outside of p diagonals on each side. Learned are the p partial autocorrelations r_i = tanh(raw_i),
    for which every value gives a valid R (Barndorff-Nielsen and Schou 1973, https://doi.org/10.1016/0047-259X(73)90030-4).
    They start at 1/2, 0, ..., 0. `low_rank`: R is the correlation matrix of I + W W', W (d, k) learned.
    Log density: -1/2 (d log 2 pi + log det R + (z - m)' R^-1 (z - m)). One coordinate has nothing to be correlated with: it is
    N(m, 1).

    Args:
        latent_dim: width d of z (a fact).
        covariate_dim: number of covariates (a fact).
        correlation: `banded` or `low_rank`.
        order: p, of `banded`; at most d - 1 of them are used.
        rank: k, of `low_rank`.
        covariates: condition on the covariates of the data: location from c by a linear map.
    """

    def __init__(
        self,
        latent_dim: int,
        covariate_dim: int = 0,
        *,
        correlation: Literal["banded", "low_rank"] = "banded",
        order: Annotated[int, Ge(1)] = 1,
        rank: Annotated[int, Ge(1)] = 1,
        covariates: bool = False,
    ) -> None:
        super().__init__(latent_dim, covariate_dim, covariates=covariates)
        self.correlation = correlation
        if correlation == "banded":
            self.raw = nn.Parameter(torch.zeros(min(order, latent_dim - 1)))
            with torch.no_grad():
                self.raw[:1] = 0.5493  # tanh of it is 1/2
        else:
            self.raw = nn.Parameter(0.3 * torch.randn(latent_dim, rank))

    def scale_tril(self) -> Tensor:
        """Return L (d, d), lower triangular, with L L' = R."""
        if self.correlation == "low_rank":
            covariance = torch.eye(self.latent_dim).to(self.raw) + self.raw @ self.raw.mT
            unit = covariance.diagonal().rsqrt()
            return torch.linalg.cholesky(unit[:, None] * covariance * unit)
        r = torch.tanh(self.raw)
        a, variance = r[:0], torch.ones_like(self.origin[0])
        rows: list[Tensor] = []  # of L, by Durbin and Levinson's recursion: the best prediction of z_j by the p before it
        for j in range(self.latent_dim):
            if 0 < j <= len(r):
                a = torch.cat([a - r[j - 1] * a.flip(0), r[j - 1 : j]])
                variance = variance * (1 - r[j - 1].square())
            noise = (torch.arange(self.latent_dim, device=r.device) == j).to(variance) * variance.sqrt()
            rows.append(noise + sum(a[i] * rows[j - 1 - i] for i in range(len(a))))
        return torch.stack(rows)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return N(m, R)."""
        return dist.MultivariateNormal(self.location(covariates), scale_tril=self.scale_tril(), validate_args=False)
