"""Every guide family, with a prior on its space: the list that the tests of guides run over."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.models import spaces
from elbowroom.models.guides.base import AmortizedGuide, Family, Onto
from elbowroom.models.guides.families import LogisticNormal, LogNormal, Mixture, PowerSpherical, StudentT
from elbowroom.models.guides.markov import MarkovFamily
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal, LowRankNormal
from elbowroom.models.guides.semi_amortized import SemiAmortized
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.base import Prior
from elbowroom.models.priors.constrained import VonMisesFisher
from elbowroom.models.priors.standard import Normal
from elbowroom.models.spaces import Space
from elbowroom.models.vae import VAE

REAL: dict[str, Callable[[int], Family]] = {
    "diagonal": DiagonalNormal,
    "full": FullRankNormal,
    "low_rank": LowRankNormal,
    "t_learned": StudentT,
    "t_fixed": lambda d: StudentT(d, df=7.0),
    "mixture": lambda d: Mixture(d, components=3),
    "markov": lambda d: MarkovFamily(d, d),
    "markov_gated": lambda d: MarkovFamily(d, d, transition="gated", hidden=4),
    "semi_diagonal": lambda d: SemiAmortized(d, steps=3),
    "semi_full": lambda d: SemiAmortized(d, family="full_rank_normal", steps=3),
    "semi_low_rank": lambda d: SemiAmortized(d, family="low_rank_normal", steps=3),
    "semi_stopped": lambda d: SemiAmortized(d, steps=3, through=False),
}
OWN: dict[str, Callable[[int], Family]] = {
    "log_normal": LogNormal,
    "logistic_normal": LogisticNormal,
    "power_spherical": PowerSpherical,
}
CARRIED: dict[str, Callable[[int], Family]] = {
    f"{name} onto {space}": lambda d, make=make, space=space: Onto(make(spaces.free_dim(space, d)), space, d)
    for name, make in REAL.items()
    for space in ("positive", "simplex", "sphere")
}
FAMILIES = REAL | OWN | CARRIED
SEMI = ["semi_diagonal", "semi_full", "semi_low_rank"]
each = pytest.mark.parametrize("name", FAMILIES)
each_real = pytest.mark.parametrize("name", REAL)


class LogNormalPrior(Prior):
    """Independent standard log-normals."""

    space = "positive"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        return dist.LogNormal(self.loc, torch.ones_like(self.loc)).to_event(1)


class DirichletPrior(Prior):
    """A Dirichlet with concentration 2."""

    space = "simplex"

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.register_buffer("two", torch.full((latent_dim,), 2.0), persistent=False)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        return dist.Dirichlet(self.two)


PRIORS: dict[Space, type[Prior]] = {
    "real": Normal,
    "positive": LogNormalPrior,
    "simplex": DirichletPrior,
    "sphere": VonMisesFisher,
}


def params_of(family: Family, n: int = 5, seed: int = 0, size: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return size * torch.randn(n, family.param_dim, generator=generator, dtype=torch.float64)


def free_log_prob(q: TorchDistribution, u: Tensor, space: Space) -> Tensor:
    """Log density in unconstrained coordinates u (..., m)."""
    transform = spaces.onto(space)
    z = transform(u)
    det = transform.log_abs_det_jacobian(u, z)
    return q.log_prob(z) + (det.sum(-1) if det.dim() == u.dim() else det)


def small_vae(name: str, dim: int = 2, width: int = 4, n: int = 12, seed: int = 0) -> tuple[VAE, Tensor]:
    torch.manual_seed(seed)
    family = FAMILIES[name](dim)
    decoder = MLP((dim,), width, hidden=(8,), activation="tanh")
    guide = AmortizedGuide(MLP((width,), family.param_dim, hidden=(16,)), family)
    vae = VAE(PRIORS[family.space](dim), Gaussian((width,), scale=0.5), decoder, guide)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(2)
        x = vae.model(n=n)
    return vae, x
