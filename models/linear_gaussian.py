"""The linear-Gaussian VAE in closed form, used to check every method.

    z ~ N(0, I_k),   x | z ~ N(W z + mu, diag(psi)),   r = x - mu
    M = I + W' diag(psi)^-1 W,   m = M^-1 W' diag(psi)^-1 r
    p(z|x)   = N(m, M^-1)
    log p(x) = -1/2 [ D log 2 pi + log|psi| + log|M| + r' psi^-1 r - m' M m ]

Tipping and Bishop 1999 (probabilistic PCA); Bishop, Pattern Recognition and Machine Learning, section 12.2.
All log densities are in nats, per datum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class LinearGaussian:
    """z ~ N(0, I_k), x|z ~ N(W z + mu, diag(psi)).

    Attributes:
        W: loadings, (D, k).
        mu: mean of x, (D,).
        psi: noise variances, (D,), all positive.
    """

    W: Tensor
    mu: Tensor
    psi: Tensor

    @property
    def precision(self) -> Tensor:
        """M = I + W' psi^-1 W, the posterior precision, (k, k); the same for every x."""
        return torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device) + self._Wt_psi_inv @ self.W

    @property
    def _Wt_psi_inv(self) -> Tensor:
        return (self.W / self.psi[:, None]).T

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (N, k) and covariance of p(z|x) for x (N, D), NaN where missing: (k, k), or (N, k, k) if any entry is."""
        seen = ~x.isnan()
        if bool(seen.all()):
            covariance = torch.linalg.inv(self.precision)
            return (x - self.mu) @ self._Wt_psi_inv.T @ covariance, covariance
        covariance = torch.linalg.inv(self._precision_of(seen))
        h = torch.where(seen, x - self.mu, 0.0) @ self._Wt_psi_inv.T
        return torch.einsum("nij,nj->ni", covariance, h), covariance

    def _precision_of(self, seen: Tensor, temperature: float = 1.0) -> Tensor:
        """Return I + b sum_{j seen} W_j W_j' / psi_j, (N, k, k), for seen (N, D)."""
        eye = torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device)
        return eye + temperature * torch.einsum("nj,ji,jk->nik", seen.to(self.W.dtype), self._Wt_psi_inv.T, self.W)

    def log_evidence(self, x: Tensor, temperature: float = 1.0) -> Tensor:
        """Return log Z_b = log of the integral of p(z) p(x|z)^b, (N,), in nats; b = 1 gives log p(x) of the observed entries.

        log Z_b = -1/2 [ b (D log 2 pi + log|psi| + r' psi^-1 r) + log|M_b| - m_b' M_b m_b ],
        M_b = I + b W' psi^-1 W, m_b = b M_b^-1 W' psi^-1 r.
        """
        b, seen = temperature, ~x.isnan()
        whole = bool(seen.all())
        eye = torch.eye(self.W.shape[1], dtype=self.W.dtype, device=self.W.device)
        M = eye + b * self._Wt_psi_inv @ self.W if whole else self._precision_of(seen, b)
        r = torch.where(seen, x - self.mu, 0.0)
        h = b * r @ self._Wt_psi_inv.T
        solved = torch.linalg.solve(M, h.T).T if whole else torch.linalg.solve(M, h)
        quadratic = (h * solved).sum(-1)
        noise = torch.where(seen, LOG_2PI + self.psi.log() + r.square() / self.psi, 0.0).sum(-1)
        return -0.5 * (b * noise + torch.linalg.slogdet(M).logabsdet - quadratic)

    def kl(self, loc: Tensor, covariance: Tensor, x: Tensor) -> Tensor:
        """Return KL(N(a, S) || p(z|x)), (N,), in nats, for means a (N, k), covariances S (k, k) or (N, k, k), and x (N, D).

        KL = 1/2 [ tr(M S) - k - log|M| - log|S| + (a - m)' M (a - m) ].
        """
        M = self.precision
        delta = loc - self.posterior(x)[0]
        trace = (M * covariance).sum((-2, -1))
        log_det = torch.linalg.slogdet(M).logabsdet + torch.linalg.slogdet(covariance).logabsdet
        return 0.5 * (trace - M.shape[0] - log_det + ((delta @ M) * delta).sum(-1))

    def best_diagonal(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean (N, k) and variances (k,) of the diagonal normal nearest to p(z|x) in KL(q||p): m, 1/M_jj."""
        return self.posterior(x)[0], 1 / self.precision.diagonal()

    def diagonal_gap(self) -> Tensor:
        """Return the approximation gap of the best diagonal normal, 1/2 (sum_j log M_jj - log|M|); the same for all x."""
        M = self.precision
        return 0.5 * (M.diagonal().log().sum() - torch.linalg.slogdet(M).logabsdet)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw (z, x) jointly: z (n, k), x (n, D)."""
        D, k = self.W.shape
        z = torch.randn(n, k, dtype=self.W.dtype, generator=generator)
        noise = torch.randn(n, D, dtype=self.W.dtype, generator=generator)
        return z, z @ self.W.T + self.mu + self.psi.sqrt() * noise

    @classmethod
    def maximum_likelihood(cls, x: Tensor, latent_dim: int) -> LinearGaussian:
        """Return the probabilistic-PCA maximum-likelihood fit with isotropic noise to x (N, D), with k = latent_dim < D.

        With l_1 >= ... >= l_D the eigenvalues of the biased sample covariance and U its eigenvectors:
        s2 = mean(l_{k+1..D}), W = U_k (L_k - s2 I)^{1/2}.
        """
        N, D = x.shape
        if not 0 < latent_dim < D:
            raise ValueError(f"latent_dim must lie between 1 and {D - 1}, got {latent_dim}")
        centred = x - x.mean(0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / N)
        values, vectors = values.flip(0), vectors.flip(1)
        s2 = values[latent_dim:].mean()
        W = vectors[:, :latent_dim] * (values[:latent_dim] - s2).clamp_min(0).sqrt()
        return cls(W, x.mean(0), s2.expand(D).clone())
