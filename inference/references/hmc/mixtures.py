"""Mixtures of normals, one per datum, fitted to draws: proposals for posteriors with one mode or several."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, moments, whiten

ROUNDS = 30  # of expectation and maximisation
LEAST = 2.0  # draws per dimension that a component must hold; an emptier one takes the covariance of all draws
MOST = 2000  # draws in a fit, thinned evenly


@dataclass(frozen=True)
class Mixture:
    """sum_k weight_k N(loc_k, root_k root_k') for every datum; log weights (K, N)."""

    parts: list[Normals]
    log_weight: Tensor

    @classmethod
    def fitted(cls, z: Tensor, components: int, generator: torch.Generator) -> Mixture:
        """Fit to draws (S, N, d) by expectation-maximisation, from the draws that lie farthest apart."""
        mean, covariance = moments(z)
        whole = Normals.from_moments(mean, covariance)
        if components == 1:
            return cls([whole], torch.zeros_like(mean[:, 0]).unsqueeze(0))
        z = z[torch.linspace(0, len(z) - 1, min(len(z), MOST), device=z.device).round().long()]
        u = whiten(whole.root, z - whole.loc)
        share = _nearest(u, components)
        for _ in range(ROUNDS):
            found = cls._from(z, share, covariance)
            share = found._each(z).softmax(0)
        return cls._from(z, share, covariance)

    @classmethod
    def _from(cls, z: Tensor, share: Tensor, covariance: Tensor) -> Mixture:
        parts, d = [], z.shape[-1]
        for mine in share:  # (S, N)
            total = mine.sum(0).clamp_min(1e-9)
            mean, own = moments(z, mine / total)
            prior = LEAST * d / (LEAST * d + total)[:, None, None]
            parts.append(Normals.from_moments(mean, (1 - prior) * own + prior * covariance))
        weight = share.sum(1).clamp_min(1e-3)
        return cls(parts, (weight / weight.sum(0)).log())

    def _each(self, z: Tensor) -> Tensor:
        return torch.stack([log_w + part.log_prob(z) for log_w, part in zip(self.log_weight, self.parts, strict=True)])

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the log density at z (S, N, d), (S, N), in nats."""
        return self._each(z).logsumexp(0)

    def sample(self, n_draws: int, generator: torch.Generator) -> Tensor:
        """Draw z (S, N, d), each component as often as its weight says, up to rounding."""
        u = torch.rand(
            n_draws, self.log_weight.shape[1], dtype=self.log_weight.dtype, device=self.log_weight.device, generator=generator
        )
        which = (u.unsqueeze(0) > self.log_weight.exp().cumsum(0).unsqueeze(1)).sum(0).clamp_max(len(self.parts) - 1)
        drawn = torch.stack([part.sample(n_draws, generator) for part in self.parts])
        return drawn.gather(0, which[None, ..., None].expand(1, *drawn.shape[1:]))[0]


def _nearest(u: Tensor, components: int) -> Tensor:
    """Return each draw's share in the nearest of points that lie far apart, (K, S, N)."""
    far = u.square().sum(-1)
    centres: list[Tensor] = []
    for _ in range(components):
        place = far.argmax(0)
        centre = u.gather(0, place[None, :, None].expand(1, *u.shape[1:]))
        distance = (u - centre).square().sum(-1)
        far = distance if not centres else torch.minimum(far, distance)
        centres.append(distance)
    return torch.nn.functional.one_hot(torch.stack(centres).argmin(0), components).movedim(-1, 0).to(u.dtype)
