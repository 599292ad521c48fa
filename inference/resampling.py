"""Equally weighted draws from weighted ones, for every datum at once."""

from __future__ import annotations

import torch
from torch import Tensor


def resample(z: Tensor, weights: Tensor, n_draws: int, generator: torch.Generator) -> Tensor:
    """Draw from weighted particles by systematic resampling, in random order.

    Args:
        z: particles, (S, N, d).
        weights: normalised along the particles, (S, N).
        n_draws: number of draws K per datum; a particle of weight W is drawn floor(K W) or ceil(K W) times.
        generator: of random numbers.

    Returns:
        (K, N, d).
    """
    n = z.shape[1]
    offset = torch.rand(n, 1, dtype=z.dtype, device=z.device, generator=generator)
    place = (torch.arange(n_draws, dtype=z.dtype, device=z.device) + offset) / n_draws
    cumulative = weights.T.cumsum(1).contiguous()
    index = torch.searchsorted(cumulative / cumulative[:, -1:], place).clamp_max(len(z) - 1)
    order = torch.rand(n, n_draws, dtype=z.dtype, device=z.device, generator=generator).argsort(1)
    index = index.gather(1, order).T
    return z.gather(0, index[..., None].expand(-1, -1, z.shape[-1]))
