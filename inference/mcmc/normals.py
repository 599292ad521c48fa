"""One multivariate normal per datum: q* in unconstrained coordinates, and the metric that whitens a posterior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SMALL = 8  # dimensions up to which broadcasting beats a batched matrix product


def apply(root: Tensor, v: Tensor) -> Tensor:
    """Return root @ v for root (N, d, d) and v (S, N, d)."""
    if root.shape[-1] <= SMALL:
        return (root * v.unsqueeze(-2)).sum(-1)
    return torch.bmm(v.transpose(0, 1), root.mT).transpose(0, 1)


def apply_t(root: Tensor, v: Tensor) -> Tensor:
    """Return root' @ v for root (N, d, d) and v (S, N, d)."""
    return apply(root.mT, v)


def whiten(root: Tensor, v: Tensor) -> Tensor:
    """Return root^-1 @ v for lower-triangular root (N, d, d) and v (S, N, d)."""
    return torch.linalg.solve_triangular(root, v.permute(1, 2, 0), upper=False).permute(2, 0, 1)


def safe_cholesky(covariance: Tensor) -> Tensor:
    """Return the lower Cholesky factor of (N, d, d), with eigenvalues floored at 1e-10 of the largest."""
    root, info = torch.linalg.cholesky_ex(covariance)
    bad = (info > 0) | ~root.isfinite().all(-1).all(-1)
    if bool(bad.any()):
        eye = torch.eye(covariance.shape[-1], dtype=covariance.dtype, device=covariance.device)
        matrices = torch.where(covariance[bad].isfinite().all(-1).all(-1)[:, None, None], covariance[bad], eye)
        values, vectors = torch.linalg.eigh((matrices + matrices.mT) / 2)
        floor = (values.abs().amax(-1, keepdim=True) * 1e-10).clamp_min(1e-280)
        root[bad] = torch.linalg.cholesky(vectors @ torch.diag_embed(values.clamp_min(floor) * (1 + 1e-9)) @ vectors.mT)
    return root


@dataclass(frozen=True)
class Normals:
    """N(loc_n, root_n root_n') for every datum n.

    Attributes:
        loc: means, (N, d).
        root: lower-triangular Cholesky factors of the covariances, (N, d, d), with positive diagonal.
    """

    loc: Tensor
    root: Tensor

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor) -> Normals:
        """Return the normals with these means (N, d) and covariances (N, d, d)."""
        return cls(mean, safe_cholesky(covariance))

    @property
    def covariance(self) -> Tensor:
        """(N, d, d)."""
        return self.root @ self.root.mT

    @property
    def log_det(self) -> Tensor:
        """Log determinant of the root, (N,)."""
        return self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def entropy(self) -> Tensor:
        """Entropy, (N,), in nats."""
        return self.log_det + self.loc.shape[-1] * (HALF_LOG_2PI + 0.5)

    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw z (S, N, d)."""
        noise = torch.randn(n_draws, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
        return self.loc + apply(self.root, noise)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density at z (S, N, d), (S, N), in nats."""
        squared = whiten(self.root, z - self.loc).square().sum(-1)
        return -0.5 * squared - self.log_det - z.shape[-1] * HALF_LOG_2PI

    def log_prob_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density at z (S, N, d), (S, N), and its gradient (S, N, d)."""
        u = whiten(self.root, z - self.loc)
        value = -0.5 * u.square().sum(-1) - self.log_det - z.shape[-1] * HALF_LOG_2PI
        return value, -torch.linalg.solve_triangular(self.root.mT, u.permute(1, 2, 0), upper=True).permute(2, 0, 1)

    def inflated(self, factor: float) -> Normals:
        """Return the same with standard deviations multiplied by `factor`."""
        return Normals(self.loc, self.root * factor)

    def to(self, dtype: torch.dtype) -> Normals:
        """Return the same in another precision."""
        return Normals(self.loc.to(dtype), self.root.to(dtype))

    def rows(self, index: Tensor) -> Normals:
        """Return those of some of the data."""
        return Normals(self.loc[index], self.root[index])
