"""Small VAEs whose posterior is known, or can be integrated on a grid."""

from __future__ import annotations

import torch
from torch import Tensor

from elbowroom.models.guides.base import AmortizedGuide, Family
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal
from elbowroom.models.likelihoods.binary import Bernoulli
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.networks.mlp import MLP, Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE


def linear_vae(
    dim: int, width: int, *, family: type[Family] = DiagonalNormal, noise: float = 0.5, n: int = 40, seed: int = 0
) -> tuple[VAE, Tensor, LinearGaussian]:
    """A linear-Gaussian VAE in float64 with strongly correlated loadings, data drawn from it, and its closed form."""
    generator = torch.Generator().manual_seed(seed)
    likelihood = Gaussian((width,), scale=noise)
    q = family(dim)
    vae = VAE(Normal(dim), likelihood, Linear((dim,), width), AmortizedGuide(Linear((width,), q.param_dim), q)).double()
    with torch.no_grad():
        loadings = torch.randn(width, dim, generator=generator, dtype=torch.float64) / width**0.5
        vae.decoder.body.weight.copy_(loadings @ (torch.eye(dim) + 0.8 * torch.ones(dim, dim)).double())
        vae.decoder.body.bias.copy_(torch.randn(width, generator=generator, dtype=torch.float64))
    oracle = vae.linear_gaussian()
    assert oracle is not None
    return vae, oracle.sample(n, generator)[1], oracle


def set_guide(vae: VAE, oracle: LinearGaussian) -> None:
    """Give a linear encoder the best member of its family for every x."""
    M, k = oracle.precision, oracle.W.shape[1]
    gain = torch.linalg.inv(M) @ (oracle.W / oracle.psi[:, None]).T  # m(x) = gain (x - mu)
    body, family = vae.posterior.encoder.body, vae.posterior.family
    inverse = lambda s: (s - 1e-5).expm1().log() - torch.tensor(1.0, dtype=torch.float64).expm1().log()
    with torch.no_grad():
        body.weight.zero_()
        body.weight[:k] = gain
        body.bias[:k] = -gain @ oracle.mu
        if isinstance(family, FullRankNormal):
            root = torch.linalg.cholesky(torch.linalg.inv(M))
            body.bias[k : 2 * k] = inverse(root.diagonal())
            body.bias[2 * k :] = root[family.rows, family.columns]
        else:
            body.bias[k:] = inverse(M.diagonal().rsqrt())


def mlp_vae(dim: int = 2, width: int = 12, *, family: type[Family] = DiagonalNormal, seed: int = 0) -> VAE:
    """A small Bernoulli VAE with tanh networks and weights large enough for non-Gaussian posteriors."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        q = family(dim)
        options = {"hidden": (16,), "activation": "tanh"}
        vae = VAE(
            Normal(dim),
            Bernoulli((width,)),
            MLP((dim,), width, **options),
            AmortizedGuide(MLP((width,), q.param_dim, **options), q),
        )
        with torch.no_grad():
            for parameter in vae.decoder.parameters():
                parameter.mul_(3)
    return vae
