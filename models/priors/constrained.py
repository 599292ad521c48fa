"""Priors on positive latents, simplex and sphere. A guide family on R^m is mapped to the same set (`guides.base.Onto`)."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import pyro.distributions as dist
import torch
from annotated_types import Ge, Gt, Le
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.nn.functional import softplus

from elbowroom.models import spaces, sphere
from elbowroom.models.priors.base import Located, Prior
from elbowroom.models.spaces import Space

SCALE_FLOOR = 1e-5
_UNIT = math.log(math.expm1(1.0))  # softplus(_UNIT) = 1


class _Carried(Prior):
    """A normal with independent entries on R^m, standard or learned, to be mapped to another space."""

    loc: Tensor
    scale: Tensor

    def __init__(self, latent_dim: int, learned: bool) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        for name in ("loc", "scale"):
            value = torch.zeros(self.free_dim)
            if learned:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value, persistent=False)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return location and scale on R^m, (m,) each."""
        return self.loc, softplus(self.scale + _UNIT) + SCALE_FLOOR * self.learned

    @property
    def learned(self) -> bool:
        """Whether location and scale are parameters."""
        return "loc" in self._parameters


class LogNormal(_Carried):
    """Positive latents with normal logarithms: log z ~ N(0, I_d), or with learned location and scale.

    Log density: log p(z) = sum_j log N(log z_j; m_j, s_j^2) - log z_j.

    Args:
        latent_dim: width d of z (a fact).
        learned: learn the location m and scale s of log z; else 0 and 1.
    """

    space: ClassVar[Space] = "positive"

    def __init__(self, latent_dim: int, *, learned: bool = False) -> None:
        super().__init__(latent_dim, learned)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the product of log-normal densities."""
        return dist.LogNormal(*self.moments()).to_event(1)


class LogisticNormal(_Carried):
    """A point of the simplex, stick breaking of a normal on R^(d-1): standard, or with learned location and scale.

    z_j = s_j prod_{i<j} (1 - s_i), s_j = sigmoid(u_j - log(d - j)), j = 1 .. d - 1, and z_d the rest; u ~ N(m, diag(s^2)).
    u = 0 is the centre of the simplex. This is torch's definition (`torch.distributions.LogisticNormal`); Aitchison and
    Shen 1980 take log ratios to z_d instead, https://doi.org/10.2307/2335470.

    Args:
        latent_dim: number d of components of the simplex, at least 2 (a fact).
        learned: learn the location m and scale s of u; else 0 and 1.

    Raises:
        ValueError: fewer than two components.
    """

    space: ClassVar[Space] = "simplex"

    def __init__(self, latent_dim: int, *, learned: bool = False) -> None:
        _at_least_two(latent_dim)
        super().__init__(latent_dim, learned)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the mapped normal, event shape (d,)."""
        base = dist.Normal(*self.moments()).to_event(1)
        return dist.TransformedDistribution(base, [spaces.onto("simplex")], validate_args=False)


class Gamma(Prior):
    """Independent positive latents, z_j ~ Gamma(a, 1).

    Log density: log p(z) = sum_j (a - 1) log z_j - z_j - log Gamma(a).

    Args:
        latent_dim: width d of z (a fact).
        concentration: a, the mean of each latent; 1 is the exponential distribution, less makes latents sparse.
    """

    space: ClassVar[Space] = "positive"

    def __init__(self, latent_dim: int, *, concentration: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        self.concentration: Tensor
        self.register_buffer("concentration", torch.full((latent_dim,), float(concentration)), persistent=False)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the product of gamma densities."""
        return dist.Gamma(self.concentration, torch.ones_like(self.concentration)).to_event(1)


class Dirichlet(Prior):
    """A point of the simplex, z ~ Dirichlet(a, ..., a): topic proportions, mixture memberships.

    Log density: log p(z) = sum_j (a - 1) log z_j + log Gamma(d a) - d log Gamma(a).

    Args:
        latent_dim: number d of components of the simplex, at least 2 (a fact).
        concentration: a; 1 is uniform on the simplex, less prefers corners, more the centre.

    Raises:
        ValueError: fewer than two components.
    """

    space: ClassVar[Space] = "simplex"

    def __init__(self, latent_dim: int, *, concentration: Annotated[float, Gt(0)] = 1.0) -> None:
        super().__init__()
        _at_least_two(latent_dim)
        self.latent_dim = latent_dim
        self.concentration: Tensor
        self.register_buffer("concentration", torch.full((latent_dim,), float(concentration)), persistent=False)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the Dirichlet distribution."""
        return dist.Dirichlet(self.concentration, validate_args=False)


class VonMisesFisher(Located):
    """A point of the sphere |z| = 1 in R^d, von Mises-Fisher, p(z) = exp(eta'z) / C(|eta|); by default uniform.

    eta = k (0, .., 0, 1), or k (0, .., 0, 1) + A c: mean direction eta / |eta|, concentration |eta|. A decoder can turn the
    sphere, so the direction need not be learned. Density with respect to area;
    log C(k) = d/2 log 2 pi + log I_(d/2-1)(k) - (d/2 - 1) log k, I a modified Bessel function.
    Davidson et al. 2018, https://arxiv.org/abs/1804.00891.

    Args:
        latent_dim: number d of coordinates, at least 2; z has d - 1 degrees of freedom (a fact).
        covariate_dim: number of covariates (a fact).
        concentration: k, 0 is uniform, at most 1000; `learned` starts at 1.
        covariates: condition on the covariates of the data: A c is added to eta, whose length is then bounded by 1000 smoothly.

    Raises:
        ValueError: fewer than two coordinates.
    """

    space: ClassVar[Space] = "sphere"

    def __init__(
        self,
        latent_dim: int,
        covariate_dim: int = 0,
        *,
        concentration: Annotated[float, Ge(0), Le(1000)] | Literal["learned"] = 0.0,
        covariates: bool = False,
    ) -> None:
        sphere.at_least_two(latent_dim)
        super().__init__(latent_dim, covariate_dim, covariates=covariates)
        self.bounded = covariates or concentration == "learned"
        if concentration == "learned":
            self.raw = nn.Parameter(torch.zeros(()))
        self.axis: Tensor
        axis = torch.zeros(latent_dim)
        axis[-1] = 1.0 if concentration == "learned" else float(concentration)
        self.register_buffer("axis", axis, persistent=False)

    def distribution(self, covariates: Tensor | None = None) -> TorchDistribution:
        """Return the von Mises-Fisher distribution."""
        eta = self.location(covariates) + (softplus(self.raw + _UNIT) * self.axis if "raw" in self._parameters else self.axis)
        if self.bounded:
            eta = eta / (1 + (eta / sphere.MOST_CONCENTRATED).square().sum(-1, keepdim=True)).sqrt()
        return sphere.VonMisesFisher(eta)


def _at_least_two(latent_dim: int) -> None:
    if latent_dim < 2:
        raise ValueError(f"latent_dim: a point of the simplex has at least 2 components, got {latent_dim}; use 2 or more")
