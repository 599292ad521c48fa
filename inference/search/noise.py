"""Standard normal draws with sample moments that equal those of the distribution exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def default_draws(dim: int) -> int:
    """Return the number of noise draws for fitting a normal of d dimensions (the full family has d (d + 3) / 2 parameters)."""
    return max(64, 10 * dim)


def matched_noise(n_draws: int, dim: int, generator: torch.Generator) -> Tensor:
    """Return standard normal noise (S, d) in antithetic pairs with mean exactly 0 and second moments exactly I; S even, >= 2 d.

    Half of it is a scrambled Sobol sequence, the other half its mirror image. Batches with different scrambles are independent,
    and each integrates a smooth function far better than independent draws do.
    """
    return matched(antithetic_noise(n_draws, dim, generator))


def matched(noise: Tensor) -> Tensor:
    """Return antithetic noise (S, d) mapped so that its second moments are exactly I.

    Expectations of quadratics are then exact; fourth moments shrink by O(d / S).
    """
    half = noise.chunk(2)[0]
    values, vectors = torch.linalg.eigh(half.mT @ half / len(half))
    half = half @ (vectors * values.rsqrt()) @ vectors.mT
    return torch.cat([half, -half])


def antithetic_noise(n_draws: int, dim: int, generator: torch.Generator) -> Tensor:
    """Draw standard normal noise (S, d), S even, in antithetic pairs: a scrambled Sobol sequence, then its mirror image."""
    seed = int(torch.randint(2**31, (), device=generator.device, generator=generator))
    uniform = torch.quasirandom.SobolEngine(dim, scramble=True, seed=seed).draw(n_draws // 2, dtype=torch.float64)
    half = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9)).to(generator.device)
    return torch.cat([half, -half])


def from_eigen(values: Tensor, vectors: Tensor) -> Tensor:
    """Return V diag(values) V', from eigenvalues (..., d) and eigenvectors V (..., d, d)."""
    return (vectors * values[..., None, :]) @ vectors.mT
