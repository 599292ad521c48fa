"""Each distribution of torch, and of a stand-in for scvi-tools, against the density of the one of Pyro that it becomes."""

from __future__ import annotations

from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import distributions as td

from elbowroom.adapt.distributions import SCVI, TORCH, in_pyro
from elbowroom.errors import UserError

half, one = torch.tensor([0.3, 0.6, 0.9]), torch.tensor([0.5, 1.0, 2.0])
EXAMPLES = {
    "Bernoulli": [td.Bernoulli(half), td.Bernoulli(logits=one)],
    "Beta": [td.Beta(one, half)],
    "Binomial": [td.Binomial(5, half), td.Binomial(torch.tensor([3.0, 4.0, 5.0]), logits=one)],
    "Categorical": [td.Categorical(half), td.Categorical(logits=one)],
    "Cauchy": [td.Cauchy(one, half)],
    "ContinuousBernoulli": [td.ContinuousBernoulli(half), td.ContinuousBernoulli(logits=one)],
    "Dirichlet": [td.Dirichlet(one)],
    "Exponential": [td.Exponential(one)],
    "Gamma": [td.Gamma(one, half)],
    "Geometric": [td.Geometric(half), td.Geometric(logits=one)],
    "Gumbel": [td.Gumbel(one, half)],
    "HalfCauchy": [td.HalfCauchy(one)],
    "HalfNormal": [td.HalfNormal(one)],
    "Laplace": [td.Laplace(one, half)],
    "LogNormal": [td.LogNormal(one, half)],
    "LowRankMultivariateNormal": [td.LowRankMultivariateNormal(one, half[:, None], one)],
    "MultivariateNormal": [
        td.MultivariateNormal(one, torch.diag(one)),
        td.MultivariateNormal(one, precision_matrix=torch.diag(half)),
    ],
    "NegativeBinomial": [td.NegativeBinomial(one, half), td.NegativeBinomial(one, logits=-half)],
    "Normal": [td.Normal(half, one)],
    "OneHotCategorical": [td.OneHotCategorical(half), td.OneHotCategorical(logits=one)],
    "Poisson": [td.Poisson(one)],
    "StudentT": [td.StudentT(one, half, one)],
    "Uniform": [td.Uniform(-one, one)],
    "VonMises": [td.VonMises(half, one)],
    "Weibull": [td.Weibull(one, half)],
}
WRAPPED = [
    td.Independent(td.Normal(half, one), 1),
    td.MixtureSameFamily(td.Categorical(half), td.Normal(half, one)),
    td.TransformedDistribution(td.Normal(half, one), [td.transforms.SigmoidTransform()]),
]


def test_every_distribution_of_the_table_has_an_example() -> None:
    assert set(EXAMPLES) == set(TORCH)


@pytest.mark.parametrize("d", [d for ds in EXAMPLES.values() for d in ds] + WRAPPED, ids=lambda d: type(d).__name__)
def test_the_density_is_the_same(d: td.Distribution) -> None:
    found = in_pyro(d, "here")
    x = d.sample((20,))
    assert isinstance(found, dist.torch_distribution.TorchDistributionMixin)
    assert found.batch_shape == d.batch_shape
    assert found.event_shape == d.event_shape
    torch.testing.assert_close(found.log_prob(x), d.log_prob(x))


def test_probs_and_logits_stay_what_was_given() -> None:
    by_logits, by_probs = td.Bernoulli(logits=torch.tensor(30.0)), td.Bernoulli(half)
    assert by_logits.probs == 1  # from now on it holds both; by probs, log p(0) would be that of rounded ones
    assert in_pyro(by_logits, "").log_prob(torch.tensor(0.0)) == by_logits.log_prob(torch.tensor(0.0))
    by_probs.logits  # noqa: B018
    torch.testing.assert_close(vars(in_pyro(by_probs, ""))["probs"], half)


def test_what_the_program_says_of_its_support_stays() -> None:
    grey = torch.tensor([0.2, 0.5, 0.7])
    loose = in_pyro(td.Bernoulli(half, validate_args=False), "")
    assert loose.log_prob(grey).isfinite().all()
    with pytest.raises(ValueError, match="support"):
        in_pyro(td.Bernoulli(half, validate_args=True), "").log_prob(grey)


def of_scvi(kind: str, **values: torch.Tensor) -> object:
    """A stand-in for a distribution of scvi-tools, with its attributes."""
    made = type(kind, (SimpleNamespace,), {"__module__": "scvi.distributions._negative_binomial"})
    return made(**values)


def test_scvi_counts_against_scipy() -> None:
    mu, theta, gate = torch.tensor([0.5, 3.0, 40.0]), torch.tensor([0.3, 2.0, 9.0]), torch.tensor([-1.0, 0.0, 2.0])
    x = torch.tensor([[0.0, 0.0, 0.0], [1.0, 5.0, 30.0]])
    plain = torch.tensor(scipy.stats.nbinom(theta, theta / (theta + mu)).pmf(x))
    pi = gate.sigmoid()
    gated = torch.where(x == 0, pi + (1 - pi) * plain, (1 - pi) * plain)
    nb = in_pyro(of_scvi("NegativeBinomial", mu=mu, theta=theta), "")
    zinb = in_pyro(of_scvi("ZeroInflatedNegativeBinomial", mu=mu, theta=theta, zi_logits=gate), "")
    torch.testing.assert_close(nb.log_prob(x), plain.log().float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(zinb.log_prob(x), gated.log().float(), rtol=1e-4, atol=1e-5)


def test_the_other_distributions_of_scvi() -> None:
    assert set(SCVI) == {"NegativeBinomial", "Normal", "Poisson", "ZeroInflatedNegativeBinomial"}
    x = torch.tensor([1.0, 0.0, 2.0])
    torch.testing.assert_close(in_pyro(of_scvi("Poisson", rate=one), "").log_prob(x), td.Poisson(one).log_prob(x))
    normal = in_pyro(of_scvi("Normal", loc=half, scale=one), "")
    torch.testing.assert_close(normal.log_prob(x), td.Normal(half, one).log_prob(x))


class Own(td.Normal):
    """A distribution of the user's: its density may be another."""


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (Own(half, one), r"decode: Pyro has no distribution for .*Own; return one of pyro\.distributions, or of torch"),
        (of_scvi("Categorical"), "decode: it returned a Categorical, where a distribution is needed"),
        (torch.zeros(3), "decode: it returned a Tensor, where a distribution is needed"),
        (3, "decode: it returned an int, where a distribution is needed"),
    ],
)
def test_others_are_refused(given: object, text: str) -> None:
    with pytest.raises(UserError, match=text):
        in_pyro(given, "decode")
