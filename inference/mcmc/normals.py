"""Normal and Student t distributions, one per datum: q* in unconstrained coordinates, and the metric of a posterior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
SMALL = 8  # up to this dimension, broadcasting is faster than a batched matrix product


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
        """Return normals with standard deviations multiplied by `factor`."""
        return Normals(self.loc, self.root * factor)

    def to(self, dtype: torch.dtype) -> Normals:
        """Return the normals in another precision."""
        return Normals(self.loc.to(dtype), self.root.to(dtype))

    def rows(self, index: Tensor) -> Normals:
        """Return the normals of some of the data."""
        return Normals(self.loc[index], self.root[index])


@dataclass(frozen=True)
class StudentT:
    """A multivariate Student t per datum, with tails heavier than those of any posterior with a normal prior.

        z = loc + root e sqrt(nu / c),   e ~ N(0, I),   c ~ chi^2_nu

    Attributes:
        loc: centres, (N, d).
        root: lower-triangular roots of the scale matrices, (N, d, d).
        df: degrees of freedom nu.
    """

    loc: Tensor
    root: Tensor
    df: int = 5

    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw z (S, N, d)."""
        noise = torch.randn(n_draws, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
        shape = (self.df, n_draws, len(self.loc))
        normals = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device, generator=generator)
        chi2 = normals.square().sum(0)
        return self.loc + apply(self.root, noise) * (self.df / chi2).sqrt()[..., None]

    def log_prob_grad(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log density at z (S, N, d), (S, N), and its gradient (S, N, d)."""
        d, nu = z.shape[-1], float(self.df)
        u = whiten(self.root, z - self.loc)
        squared = u.square().sum(-1)
        constant = math.lgamma((nu + d) / 2) - math.lgamma(nu / 2) - d / 2 * math.log(nu * math.pi)
        log_det = self.root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = constant - log_det - (nu + d) / 2 * torch.log1p(squared / nu)
        pull = torch.linalg.solve_triangular(self.root.mT, u.permute(1, 2, 0), upper=True).permute(2, 0, 1)
        return value, -((nu + d) / (nu + squared))[..., None] * pull

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density at z (S, N, d), (S, N), in nats."""
        return self.log_prob_grad(z)[0]

    def rows(self, index: Tensor) -> StudentT:
        """Return the distributions of some of the data."""
        return StudentT(self.loc[index], self.root[index], self.df)


def moments(z: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean (N, d) and covariance (N, d, d) of draws z (S, N, d), or of particles with normalised weights (S, N)."""
    mean = z.mean(0) if weights is None else torch.einsum("sn,snd->nd", weights, z)
    centred = z - mean
    if weights is None:
        return mean, torch.einsum("snd,sne->nde", centred, centred) / max(1, len(z) - 1)
    return mean, torch.einsum("sn,snd,sne->nde", weights, centred, centred)


Family = Literal["diagonal", "full"]


@dataclass(frozen=True)
class Refit:
    """The best normal of a family for every datum, with an estimate of what the search left to gain.

    Attributes:
        family: `diagonal` or `full`.
        q: q*, in unconstrained coordinates; `q.root` is diagonal for the diagonal family.
        elbo: L[q*] on fresh draws, not used in any choice, (N,), in nats; -inf where log p is not finite at one of them.
        elbo_se: its standard error over antithetic pairs, (N,).
        shortfall: estimated remaining gain of the family near q*, (N,), nats, >= 0: twice the Newton decrement on fresh noise,
            which includes the cost of the finite noise of the search. It is local: another mode may hold a better normal. inf
            where it is unknown.
        converged: (N,) True where the shortfall is at most the given tolerance and the score is finite.
        start: (N,) the start that won: 0 the encoder, 1.. the prior draws, then those given in `also`.
        iterations: evaluations of the objective, summed over stages by the longest climb of each.
    """

    family: Family
    q: Normals
    elbo: Tensor
    elbo_se: Tensor
    shortfall: Tensor
    converged: Tensor
    start: Tensor
    iterations: int


def joined_refits(parts: Sequence[Refit]) -> Refit:
    """Join the refits of different data."""
    q = Normals(torch.cat([p.q.loc for p in parts]), torch.cat([p.q.root for p in parts]))
    names = ("elbo", "elbo_se", "shortfall", "converged", "start")
    columns: dict[str, Any] = {name: torch.cat([getattr(p, name) for p in parts]) for name in names}
    return replace(parts[0], q=q, iterations=max(p.iterations for p in parts), **columns)
