"""Every likelihood with data that suit it: the list that the tests of likelihoods run over."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from elbowroom.models.columns import Column
from elbowroom.models.likelihoods.base import Likelihood
from elbowroom.models.likelihoods.binary import Bernoulli, ContinuousBernoulli
from elbowroom.models.likelihoods.categorical import Categorical, DiscretizedLogistic, Ordinal
from elbowroom.models.likelihoods.continuous import Beta, Gamma, Gaussian, Laplace, LogNormal, StudentT
from elbowroom.models.likelihoods.counts import (
    BetaBinomial,
    Binomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
    ZeroInflatedPoisson,
)
from elbowroom.models.likelihoods.inflated import ZeroOneInflatedBeta
from elbowroom.models.likelihoods.mixed import Mixed
from elbowroom.models.likelihoods.multinomial import DirichletMultinomial, Multinomial

F64 = torch.float64
LEVELS = 5
COLUMNS = (
    Column("height", "real"),
    Column("class", "categorical", 4),
    Column("income", "positive"),
    Column("share", "proportion"),
    Column("visits", "count"),
    Column("weight", "real"),
    Column("smokes", "binary", 2),
    Column("grade", "ordinal", 5),
)

real = lambda n, shape: 3 + 2 * torch.randn(n, *shape)
positive = lambda n, shape: (1 + 0.5 * torch.randn(n, *shape)).exp()
open_unit = lambda n, shape: 0.05 + 0.9 * torch.rand(n, *shape)
closed_unit = lambda n, shape: (0.5 + 0.3 * torch.randn(n, *shape)).clamp(0, 1)
binary = lambda n, shape: torch.bernoulli(torch.full((n, *shape), 0.4))
counts = lambda n, shape: torch.poisson(5 * torch.distributions.Gamma(2.0, 2.0).sample((n, *shape)))
codes = lambda n, shape: torch.randint(LEVELS, (n, *shape)).float()


def table(n: int, shape: tuple[int, ...] = (8,)) -> Tensor:
    makers = {"real": real, "positive": positive, "proportion": open_unit, "count": counts, "binary": binary, "ordinal": codes}
    makers["categorical"] = lambda n, shape: torch.randint(4, (n, *shape)).float()
    return torch.stack([makers[c.kind](n, ()) for c in COLUMNS], -1)


Case = tuple[Callable[[tuple[int, ...]], Likelihood], Callable[..., Tensor]]

CASES: dict[str, Case] = {
    "bernoulli": (Bernoulli, binary),
    "beta": (Beta, open_unit),
    "beta decoder": (lambda s: Beta(s, concentration="decoder"), open_unit),
    "beta_binomial": (lambda s: BetaBinomial(s, LEVELS), codes),
    "beta_binomial decoder": (lambda s: BetaBinomial(s, LEVELS, concentration="decoder"), codes),
    "binomial": (lambda s: Binomial(s, LEVELS), codes),
    "categorical": (lambda s: Categorical(s, LEVELS), codes),
    "continuous_bernoulli": (ContinuousBernoulli, open_unit),
    "dirichlet_multinomial": (DirichletMultinomial, counts),
    "dirichlet_multinomial decoder": (lambda s: DirichletMultinomial(s, concentration="decoder"), counts),
    "discretized_logistic": (lambda s: DiscretizedLogistic(s, LEVELS), codes),
    "discretized_logistic decoder": (lambda s: DiscretizedLogistic(s, LEVELS, scale="decoder"), codes),
    "gamma": (Gamma, positive),
    "gamma decoder": (lambda s: Gamma(s, shape="decoder"), positive),
    "gaussian": (lambda s: Gaussian(s, scale="per_dimension"), real),
    "laplace": (Laplace, real),
    "laplace decoder": (lambda s: Laplace(s, scale="decoder"), real),
    "log_normal": (LogNormal, positive),
    "mixed": (lambda s: Mixed(s, COLUMNS), table),
    "multinomial": (Multinomial, counts),
    "negative_binomial": (NegativeBinomial, counts),
    "negative_binomial shared": (lambda s: NegativeBinomial(s, dispersion="shared"), counts),
    "negative_binomial decoder": (lambda s: NegativeBinomial(s, dispersion="decoder"), counts),
    "ordinal": (lambda s: Ordinal(s, LEVELS), codes),
    "poisson": (Poisson, counts),
    "student_t": (lambda s: StudentT(s, df=10.0), real),
    "student_t learned": (lambda s: StudentT(s, df="learned", scale="shared"), real),
    "zero_inflated_negative_binomial": (ZeroInflatedNegativeBinomial, counts),
    "zero_inflated_poisson": (ZeroInflatedPoisson, counts),
    "zero_inflated_poisson shared": (lambda s: ZeroInflatedPoisson(s, gate="shared"), counts),
    "zero_one_inflated_beta": (ZeroOneInflatedBeta, closed_unit),
    "zero_one_inflated_beta shared": (lambda s: ZeroOneInflatedBeta(s, concentration="decoder", gate="shared"), closed_unit),
}
ROWS = ("mixed", "multinomial", "dirichlet_multinomial")  # entries that differ, or depend on each other
every = pytest.mark.parametrize("name", CASES)
alone = pytest.mark.parametrize("name", [n for n in CASES if n.split()[0] not in ROWS])
counted = pytest.mark.parametrize("name", [n for n in CASES if CASES[n][1] is counts and n.split()[0] not in ROWS])


def width(name: str) -> int:
    return len(COLUMNS) if name == "mixed" else 3


def fitted(name: str, shape: tuple[int, ...] | None = None, dtype: torch.dtype = F64, n: int = 60) -> tuple[Likelihood, Tensor]:
    """A likelihood whose constants and parameters are not those it starts with, and its training data."""
    build, data = CASES[name]
    shape = (width(name),) if shape is None else shape
    x = data(n, shape).to(dtype)
    likelihood = build(shape).to(dtype)
    likelihood.adapt(x)
    with torch.no_grad():
        for parameter in likelihood.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return likelihood, x


def outputs(likelihood: Likelihood, *batch: int, dtype: torch.dtype = F64) -> Tensor:
    return 0.5 * torch.randn(*batch, likelihood.param_dim, dtype=dtype)
