"""Every prior on small facts, with a guide that suits it: the list that the tests of priors run over."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import pyro
import torch
from torch import Tensor

from elbowroom.models.guides.base import AmortizedGuide, Family, Onto
from elbowroom.models.guides.discrete import BernoulliFamily, CategoricalFamily
from elbowroom.models.guides.hierarchical import HierarchicalFamily
from elbowroom.models.guides.normal import DiagonalNormal
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.base import Prior
from elbowroom.models.priors.constrained import Dirichlet, Gamma, LogisticNormal, LogNormal, VonMisesFisher
from elbowroom.models.priors.correlated import AutoregressiveNormal
from elbowroom.models.priors.discrete import Bernoulli, Categorical
from elbowroom.models.priors.flow import Flow
from elbowroom.models.priors.hierarchical import Hierarchical
from elbowroom.models.priors.markov import Markov
from elbowroom.models.priors.mixtures import GaussianMixture, Vamp
from elbowroom.models.priors.sparse import Horseshoe
from elbowroom.models.priors.standard import Laplace, Normal, StudentT
from elbowroom.models.vae import VAE

WIDTH = 4


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[int, int, AmortizedGuide], Prior]  # latent_dim, covariate_dim, guide
    dim: int = 2  # latent_dim of the tests that do not integrate
    line: int | None = 1  # latent_dim at which there is one free dimension
    family: Callable[[int], Family] = DiagonalNormal

    def prior(self, latent_dim: int | None = None, covariate_dim: int = 0) -> Prior:
        torch.manual_seed(1)
        return vae_of(self, latent_dim, covariate_dim).prior


CASES = [
    Case("normal", lambda d, c, g: Normal(d, c)),
    Case("normal_c", lambda d, c, g: Normal(d, c, covariates=True)),
    Case("laplace", lambda d, c, g: Laplace(d, c)),
    Case("laplace_c", lambda d, c, g: Laplace(d, c, covariates=True)),
    Case("student_t", lambda d, c, g: StudentT(d, c, df=5.0)),
    Case("student_t_c", lambda d, c, g: StudentT(d, c, df=4.0, covariates=True)),
    Case("autoregressive_normal", lambda d, c, g: AutoregressiveNormal(d, c), dim=3, line=None),
    Case("autoregressive_normal_2", lambda d, c, g: AutoregressiveNormal(d, c, order=2), dim=4, line=None),
    Case("autoregressive_normal_low_rank", lambda d, c, g: AutoregressiveNormal(d, c, correlation="low_rank"), line=None),
    Case("autoregressive_normal_c", lambda d, c, g: AutoregressiveNormal(d, c, covariates=True), line=None),
    Case("markov", lambda d, c, g: Markov(d)),
    Case("markov_wide", lambda d, c, g: Markov(d, steps=2), dim=4, line=None),
    Case("markov_gated", lambda d, c, g: Markov(d, transition="gated", hidden=4), dim=3),
    Case("markov_gru", lambda d, c, g: Markov(d, transition="gru"), dim=3),
    Case("horseshoe", lambda d, c, g: Horseshoe(d, c)),
    Case("horseshoe_c", lambda d, c, g: Horseshoe(d, c, scale=0.5, covariates=True)),
    Case("gaussian_mixture", lambda d, c, g: GaussianMixture(d, c, components=3)),
    Case("gaussian_mixture_c", lambda d, c, g: GaussianMixture(d, c, components=3, covariates=True)),
    Case("vamp", lambda d, c, g: Vamp(d, c, (WIDTH,), g, components=5)),
    Case("nsf", lambda d, c, g: Flow(d, hidden=(8,))),
    Case("maf", lambda d, c, g: Flow(d, kind="maf", transforms=2, hidden=(8, 8))),
    Case("realnvp", lambda d, c, g: Flow(d, kind="realnvp", hidden=(8,)), line=None),
    Case("log_normal", lambda d, c, g: LogNormal(d)),
    Case("log_normal_learned", lambda d, c, g: LogNormal(d, learned=True)),
    Case("gamma", lambda d, c, g: Gamma(d, concentration=2.0)),
    Case("dirichlet", lambda d, c, g: Dirichlet(d, concentration=1.5), dim=3, line=2),
    Case("logistic_normal", lambda d, c, g: LogisticNormal(d), dim=3, line=2),
    Case("logistic_normal_learned", lambda d, c, g: LogisticNormal(d, learned=True), dim=3, line=2),
    Case("von_mises_fisher", lambda d, c, g: VonMisesFisher(d, c), dim=3, line=2),
    Case("von_mises_fisher_concentrated", lambda d, c, g: VonMisesFisher(d, c, concentration=8.0), dim=3, line=2),
    Case("von_mises_fisher_learned", lambda d, c, g: VonMisesFisher(d, c, concentration="learned"), dim=4, line=2),
    Case("von_mises_fisher_c", lambda d, c, g: VonMisesFisher(d, c, concentration=2.0, covariates=True), dim=3, line=2),
    Case("categorical", lambda d, c, g: Categorical(d), dim=3, line=None, family=CategoricalFamily),
    Case("categorical_uniform", lambda d, c, g: Categorical(d, learned=False), dim=3, line=None, family=CategoricalFamily),
    Case("bernoulli", lambda d, c, g: Bernoulli(d, probability=0.3), dim=3, line=None, family=BernoulliFamily),
    Case("bernoulli_learned", lambda d, c, g: Bernoulli(d, learned=True), dim=3, line=None, family=BernoulliFamily),
    Case("hierarchical", lambda d, c, g: Hierarchical(d, top_dim=1, hidden=(8,)), family=lambda d: HierarchicalFamily(d, 1)),
]

CONDITIONAL = [case for case in CASES if case.name.endswith("_c")]
CLOSED = [case for case in CASES if case.name != "hierarchical"]  # p(z) has a density
DISCRETE = [case for case in CASES if case.family in (CategoricalFamily, BernoulliFamily)]
CONTINUOUS = [case for case in CLOSED if case not in DISCRETE]


def by_name(cases: list[Case]) -> dict[str, object]:
    return {"argvalues": cases, "ids": [case.name for case in cases]}


def vae_of(case: Case, latent_dim: int | None = None, covariate_dim: int | None = None) -> VAE:
    """A VAE of this prior with a guide that suits it, its weights shaken so that nothing is at a symmetric start."""
    d = latent_dim or case.dim
    c = covariate_dim or (2 if case in CONDITIONAL else 0)
    probe = case.make(d, c, AmortizedGuide(MLP((WIDTH + c,), 2 * d, hidden=(8,)), DiagonalNormal(d)))
    family: Family = case.family(probe.free_dim or d)
    if probe.space in ("positive", "simplex", "sphere"):
        family = Onto(family, probe.space, d)
    guide = AmortizedGuide(MLP((WIDTH + c,), family.param_dim, hidden=(8,)), family)
    likelihood = Gaussian((WIDTH,))
    decoder = MLP((d + c,), likelihood.param_dim, hidden=(8,))
    vae = VAE(case.make(d, c, guide), likelihood, decoder, guide, covariate_dim=c)
    with torch.no_grad():
        for parameter in vae.prior.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return vae.double()


def data_of(case: Case, n: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    factor = torch.randn(n, 2, generator=generator, dtype=dtype)
    x = factor @ torch.randn(2, WIDTH, generator=generator, dtype=dtype)
    x = x + 0.3 * torch.randn(n, WIDTH, generator=generator, dtype=dtype) + 1
    return {"x": x, "covariates": torch.randn(n, 2, generator=generator, dtype=dtype)} if case in CONDITIONAL else {"x": x}


def joint_log_prob(prior: Prior, values: dict[str, Tensor], covariates: Tensor | None = None) -> Tensor:
    """Sum log densities of all sites of a prior at given values, (N,)."""
    n = len(next(iter(values.values())))

    def program() -> None:
        with pyro.plate("data", n):
            prior(covariates)

    trace = pyro.poutine.trace(pyro.poutine.condition(program, data=values)).get_trace()
    return sum(trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]) for name in prior.sites)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Switch the checks of distributions off, which branch on values; Pyro's own context puts another state back."""
    kept = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        torch.distributions.Distribution.set_default_validate_args(kept)
