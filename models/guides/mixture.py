"""A mixture of diagonal normals with draws that are differentiable in all parameters, including the weights.

The coordinates of a draw z are taken in order. Let F_j(z; theta) be the distribution function of z_j given z_1 .. z_{j-1},

    F_j = sum_k w_kj Phi((z_j - mu_kj) / sigma_kj),    w_kj proportional to pi_k prod_{i < j} N(z_i; mu_ki, sigma_ki)

F(z; theta) is uniform on the cube for every theta. Holding it fixed while theta changes gives the derivative of the draw:

    dz / dtheta = -(dF/dz)^-1 dF/dtheta,    dF/dz lower triangular with diagonal p(z_j | z_1 .. z_{j-1})

This is implicit reparametrisation (Figurnov et al. 2018, https://arxiv.org/abs/1805.08498; Graves 2016,
https://arxiv.org/abs/1607.05690). `pyro.distributions.MixtureOfDiagNormals` also has a pathwise gradient, but not in one
dimension, and it is NaN where two components have the same centre.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class MixtureOfNormals(TorchDistribution):
    """sum_k pi_k N(mu_k, diag(sigma_k^2)), reparametrised.

    logits are log pi up to a constant, (..., K); loc mu and scale sigma are (..., K, d).
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, logits: Tensor, loc: Tensor, scale: Tensor) -> None:
        batch = torch.broadcast_shapes(logits.shape[:-1], loc.shape[:-2], scale.shape[:-2])
        self.log_weights = logits.log_softmax(-1).expand(*batch, -1)
        self.loc, self.scale = loc.expand(*batch, -1, -1), scale.expand(*batch, -1, -1)
        super().__init__(batch, loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureOfNormals:
        """Return the distribution with another batch shape."""
        batch = torch.Size(batch_shape)
        k, d = self.loc.shape[-2:]
        return MixtureOfNormals(
            self.log_weights.expand(*batch, k), self.loc.expand(*batch, k, d), self.scale.expand(*batch, k, d)
        )

    @property
    def mean(self) -> Tensor:
        """E z, (..., d)."""
        return (self.log_weights.exp()[..., None] * self.loc).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Var z_j, (..., d)."""
        apart = self.loc - self.mean[..., None, :]
        return (self.log_weights.exp()[..., None] * (self.scale.square() + apart.square())).sum(-2)

    def _log_normals(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return (z - mu_k) / sigma_k and log N(z_j; mu_kj, sigma_kj), each (..., K, d)."""
        standard = (z[..., None, :] - self.loc) / self.scale
        return standard, -0.5 * standard.square() - self.scale.log() - _HALF_LOG_2PI

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log sum_k pi_k N(z; mu_k, sigma_k)."""
        return torch.logsumexp(self.log_weights + self._log_normals(value)[1].sum(-1), -1)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw z, differentiable in logits, loc and scale."""
        z = self._drawn(torch.Size(sample_shape) + self.batch_shape).detach()
        return self.differentiable(z) if torch.is_grad_enabled() else z

    def _drawn(self, shape: torch.Size) -> Tensor:
        k, d = self.loc.shape[-2:]
        like: dict[str, Any] = {"dtype": self.loc.dtype, "device": self.loc.device}
        # the Gumbel-max trick draws k; unlike torch.multinomial it works for any batch shape
        uniform = torch.rand(*shape, k, **like).clamp_min(torch.finfo(self.loc.dtype).tiny)
        which = (self.log_weights - (-uniform.log()).log()).argmax(-1, keepdim=True)
        chosen = (which == torch.arange(k, device=self.loc.device))[..., None].to(self.loc.dtype)
        noise = torch.randn(*shape, d, **like)
        return (chosen * self.loc).sum(-2) + (chosen * self.scale).sum(-2) * noise

    def differentiable(self, z: Tensor) -> Tensor:
        """Return the draw z, given without a gradient, with dz/dtheta = -(dF/dz)^-1 dF/dtheta."""
        standard, log_normal = self._log_normals(z)
        before = log_normal.cumsum(-1) - log_normal  # over i < j
        weights = (self.log_weights[..., None] + before).softmax(-2)  # w_kj, (..., K, d)
        below = 0.5 * (1 + torch.erf(standard * math.sqrt(0.5)))
        F = (weights * below).sum(-2)
        with torch.no_grad():
            density = (weights * log_normal.exp()).sum(-2)  # > 0 at a draw, from its own component
            # for i < j, dF_j/dz_i = sum_k w_kj (score_ki - sum_l w_lj score_li) Phi_kj
            score = -standard / self.scale
            with_score = torch.einsum("...kj,...kj,...ki->...ji", weights, below, score)
            mean_score = torch.einsum("...kj,...ki->...ji", weights, score)
            slope = (with_score - F[..., None] * mean_score).tril(-1) / density[..., None]
            jacobian = slope + torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        moved = (F - F.detach()) / density.detach()
        return z - torch.linalg.solve_triangular(jacobian, moved[..., None], upper=False, unitriangular=True).squeeze(-1)
