"""A small VAE, its data, and what two fits of it are compared by."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

D, K = 6, 2
NOTHING = torch.zeros(0, D)


def data(n: int = 47, *, binary: bool = False, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, K, generator=generator, dtype=torch.float64)
    x = z @ torch.randn(K, D, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = x + 0.3 * torch.randn(n, D, generator=generator, dtype=torch.float64)
    return (x > 0).to(dtype) if binary else x.to(dtype)


def make(*, binary: bool = False, decoder: nn.Module | None = None, seed: int = 0) -> VAE:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        likelihood = Bernoulli((D,)) if binary else Gaussian((D,))
        family = DiagonalNormal(K)
        return VAE(
            Normal(K),
            likelihood,
            decoder or MLP((K,), likelihood.param_dim, hidden=(8,)),
            AmortizedGuide(MLP((D,), family.param_dim, hidden=(8,)), family),
        )


def parameters(vae: VAE) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in vae.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all((a[name] - b[name]).abs().max() <= tolerance for name in a)
