"""Observed values outside the support: of every distribution of Pyro one is refused by name, and one inside is taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import transforms

from elbowroom.errors import DataError
from elbowroom.inference.program.observed import check_observed, widened
from elbowroom.inference.target.log_joint import LogJoint

T = torch.tensor
EYE = torch.eye(2)
HALF = T([0.5, 0.5])
HMM = (torch.zeros(2), torch.zeros(2, 2))  # logits of the first state and of the moves
GAUSSIAN_HMM = (
    dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
    torch.eye(1),
    dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
    torch.eye(1),
    dist.MultivariateNormal(torch.zeros(1), torch.eye(1)),
)

# name: how it is made, a value inside, a value outside (None: every real value is inside)
MADE: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "AffineBeta": (lambda: dist.AffineBeta(T(2.0), T(2.0), T(1.0), T(3.0)), 2.0, 0.5),
    "AsymmetricLaplace": (lambda: dist.AsymmetricLaplace(0.0, 1.0, 2.0), -3.0, None),
    "AVFMultivariateNormal": (lambda: dist.AVFMultivariateNormal(torch.zeros(2), EYE, torch.ones(2, 1, 2)), [0.0, 1.0], None),
    "Bernoulli": (lambda: dist.Bernoulli(0.3), 1.0, 0.3),
    "Beta": (lambda: dist.Beta(2.0, 2.0), 0.4, 1.2),
    "BetaBinomial": (lambda: dist.BetaBinomial(2.0, 2.0, 5), 5.0, 6.0),
    "Binomial": (lambda: dist.Binomial(5, 0.3), 5.0, 9.0),
    "Categorical": (lambda: dist.Categorical(torch.ones(3)), 2, 3),
    "Cauchy": (lambda: dist.Cauchy(0.0, 1.0), -9.0, None),
    "Chi2": (lambda: dist.Chi2(3.0), 2.0, -1.0),
    "ContinuousBernoulli": (lambda: dist.ContinuousBernoulli(0.3), 0.3, 1.01),
    "Delta": (lambda: dist.Delta(T(1.0)), 1.0, None),
    "Dirichlet": (lambda: dist.Dirichlet(torch.ones(2)), [0.25, 0.75], [2.0, 3.0]),
    "DirichletMultinomial": (lambda: dist.DirichletMultinomial(torch.ones(2), 5), [2.0, 3.0], [4.0, 3.0]),
    "DiscreteHMM": (lambda: dist.DiscreteHMM(*HMM, dist.Poisson(T([1.0, 2.0])), duration=2), [1.0, 4.0], [1.0, 0.5]),
    "Empirical": (lambda: dist.Empirical(torch.zeros(3), torch.zeros(3)), 0.0, None),
    "Exponential": (lambda: dist.Exponential(1.0), 0.5, -0.5),
    "ExtendedBetaBinomial": (lambda: dist.ExtendedBetaBinomial(2.0, 2.0, T(5.0)), 4.0, 0.5),
    "ExtendedBinomial": (lambda: dist.ExtendedBinomial(T(5.0), T(0.3)), 5.0, 0.5),
    "FisherSnedecor": (lambda: dist.FisherSnedecor(2.0, 3.0), 1.0, -1.0),
    "FoldedDistribution": (lambda: dist.FoldedDistribution(dist.Normal(0.0, 1.0)), 1.0, -1.0),
    "Gamma": (lambda: dist.Gamma(2.0, 1.0), 1.0, -1.0),
    "GammaGaussianHMM": (lambda: dist.GammaGaussianHMM(dist.Gamma(1.0, 1.0), *GAUSSIAN_HMM, duration=2), [[0.0], [1.0]], None),
    "GammaPoisson": (lambda: dist.GammaPoisson(2.0, 1.0), 3.0, 2.5),
    "GaussianHMM": (lambda: dist.GaussianHMM(*GAUSSIAN_HMM, duration=2), [[0.0], [1.0]], None),
    "GaussianScaleMixture": (lambda: dist.GaussianScaleMixture(torch.ones(2), torch.ones(2), torch.ones(2)), [0.0, 1.0], None),
    "GeneralizedPareto": (lambda: dist.GeneralizedPareto(T(1.0), T(1.0), T(0.5)), 2.0, 0.5),
    "Geometric": (lambda: dist.Geometric(0.3), 2.0, 1.2),
    "Gumbel": (lambda: dist.Gumbel(0.0, 1.0), -2.0, None),
    "HalfCauchy": (lambda: dist.HalfCauchy(1.0), 1.0, -1.0),
    "HalfNormal": (lambda: dist.HalfNormal(1.0), 1.0, -1.0),
    "ImproperUniform": (lambda: dist.ImproperUniform(dist.constraints.positive, (), ()), 1.0, -1.0),
    "InverseGamma": (lambda: dist.InverseGamma(2.0, 1.0), 1.0, -1.0),
    "Kumaraswamy": (lambda: dist.Kumaraswamy(2.0, 2.0), 0.4, 1.2),
    "LKJ": (lambda: dist.LKJ(2, T(1.0)), [[1.0, 0.5], [0.5, 1.0]], [[1.0, 2.0], [2.0, 1.0]]),
    "LKJCholesky": (lambda: dist.LKJCholesky(2, T(1.0)), [[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [3.0, 4.0]]),
    "Laplace": (lambda: dist.Laplace(0.0, 1.0), -2.0, None),
    "LogNormal": (lambda: dist.LogNormal(0.0, 1.0), 2.0, 0.0),
    "LogNormalNegativeBinomial": (lambda: dist.LogNormalNegativeBinomial(5.0, T(0.0), T(1.0)), 3.0, 2.5),
    "Logistic": (lambda: dist.Logistic(0.0, 1.0), -2.0, None),
    "LogisticNormal": (lambda: dist.LogisticNormal(torch.zeros(1), torch.ones(1)), [0.25, 0.75], [2.0, 3.0]),
    "LowRankMultivariateNormal": (
        lambda: dist.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
        [0.0, 1.0],
        None,
    ),
    "MaskedMixture": (
        lambda: dist.MaskedMixture(T(True), dist.LogNormal(T(0.0), 1.0), dist.LogNormal(T(1.0), 1.0)),
        1.0,
        -1.0,
    ),
    "MixtureOfDiagNormals": (lambda: dist.MixtureOfDiagNormals(torch.ones(2, 2), torch.ones(2, 2), HALF), [0.0, 1.0], None),
    "MixtureOfDiagNormalsSharedCovariance": (
        lambda: dist.MixtureOfDiagNormalsSharedCovariance(torch.ones(2, 2), torch.ones(2), HALF),
        [0.0, 1.0],
        None,
    ),
    "MixtureSameFamily": (
        lambda: dist.MixtureSameFamily(dist.Categorical(HALF), dist.Gamma(T([1.0, 3.0]), 1.0)),
        1.0,
        -1.0,
    ),
    "Multinomial": (lambda: dist.Multinomial(5, HALF), [2.0, 3.0], [2.5, 2.5]),
    "MultivariateNormal": (lambda: dist.MultivariateNormal(torch.zeros(2), EYE), [0.0, 1.0], None),
    "MultivariateStudentT": (lambda: dist.MultivariateStudentT(T(3.0), torch.zeros(2), EYE), [0.0, 1.0], None),
    "NanMaskedMultivariateNormal": (lambda: dist.NanMaskedMultivariateNormal(torch.zeros(2), EYE), [0.0, torch.nan], None),
    "NanMaskedNormal": (lambda: dist.NanMaskedNormal(0.0, 1.0), torch.nan, None),
    "NegativeBinomial": (lambda: dist.NegativeBinomial(5.0, 0.3), 3.0, -1.0),
    "Normal": (lambda: dist.Normal(0.0, 1.0), -2.0, None),
    "OMTMultivariateNormal": (lambda: dist.OMTMultivariateNormal(torch.zeros(2), EYE), [0.0, 1.0], None),
    "OneHotCategorical": (lambda: dist.OneHotCategorical(HALF), [0.0, 1.0], [0.5, 0.5]),
    "OneHotCategoricalStraightThrough": (lambda: dist.OneHotCategoricalStraightThrough(HALF), [0.0, 1.0], [1.0, 1.0]),
    "OrderedLogistic": (lambda: dist.OrderedLogistic(T(0.0), T([-1.0, 1.0])), 2, 3),
    "Pareto": (lambda: dist.Pareto(1.0, 2.0), 1.5, 0.5),
    "Poisson": (lambda: dist.Poisson(2.0), 3.0, 2.5),
    "ProjectedNormal": (lambda: dist.ProjectedNormal(torch.ones(2)), [0.6, 0.8], [3.0, 4.0]),
    "RelaxedBernoulli": (lambda: dist.RelaxedBernoulli(T(0.5), T(0.3)), 0.4, 1.2),
    "RelaxedBernoulliStraightThrough": (lambda: dist.RelaxedBernoulliStraightThrough(T(0.5), T(0.3)), 0.4, 1.2),
    "RelaxedOneHotCategorical": (lambda: dist.RelaxedOneHotCategorical(T(0.5), HALF), [0.25, 0.75], [2.0, 3.0]),
    "RelaxedOneHotCategoricalStraightThrough": (
        lambda: dist.RelaxedOneHotCategoricalStraightThrough(T(0.5), HALF),
        [0.25, 0.75],
        [2.0, 3.0],
    ),
    "SineBivariateVonMises": (lambda: dist.SineBivariateVonMises(0.0, 0.0, 1.0, 1.0, 0.1), [0.0, 1.0], None),
    "SineSkewed": (lambda: dist.SineSkewed(dist.VonMises(T([0.0]), 1.0).to_event(1), T([0.1])), [1.0], None),
    "SkewLogistic": (lambda: dist.SkewLogistic(0.0, 1.0), -2.0, None),
    "SoftAsymmetricLaplace": (lambda: dist.SoftAsymmetricLaplace(0.0, 1.0), -2.0, None),
    "SoftLaplace": (lambda: dist.SoftLaplace(0.0, 1.0), -2.0, None),
    "Stable": (lambda: dist.Stable(1.5, 0.0), -2.0, None),
    "StableWithLogProb": (lambda: dist.StableWithLogProb(1.5, 0.0), -2.0, None),
    "StudentT": (lambda: dist.StudentT(3.0), -2.0, None),
    "TransformedDistribution": (
        lambda: dist.TransformedDistribution(dist.Normal(0.0, 1.0), [transforms.SigmoidTransform(), *_affine()]),
        1.9,
        0.05,
    ),
    "TruncatedPolyaGamma": (lambda: dist.TruncatedPolyaGamma(T(1.0)), 0.5, 3.0),
    "Uniform": (lambda: dist.Uniform(0.0, 1.0), 0.5, 1.5),
    "Unit": (lambda: dist.Unit(T(1.0)), [], None),
    "VonMises": (lambda: dist.VonMises(0.0, 1.0), 4.0, None),
    "VonMises3D": (lambda: dist.VonMises3D(torch.ones(3)), [0.0, 0.6, 0.8], [0.0, 3.0, 4.0]),
    "Weibull": (lambda: dist.Weibull(1.0, 2.0), 0.5, -0.5),
    "Wishart": (lambda: dist.Wishart(T(3.0), EYE), [[1.0, 0.5], [0.5, 1.0]], [[1.0, 2.0], [2.0, 1.0]]),
    "ZeroInflatedDistribution": (lambda: dist.ZeroInflatedDistribution(dist.Poisson(2.0), gate=T(0.3)), 0.0, 0.5),
    "ZeroInflatedNegativeBinomial": (lambda: dist.ZeroInflatedNegativeBinomial(5.0, probs=T(0.3), gate=T(0.3)), 3.0, 0.5),
    "ZeroInflatedPoisson": (lambda: dist.ZeroInflatedPoisson(T(2.0), gate=T(0.3)), 3.0, 0.5),
}

WITHOUT = {  # why they are not above
    "base classes": ["ExponentialFamily", "TorchDistribution", "Rejector"],
    "wrappers, which have the support of what they wrap": ["ExpandedDistribution", "Independent", "MaskedDistribution"],
    "no support is declared, or none that takes part in a plate of data": [
        "CoalescentTimes",
        "CoalescentTimesWithRate",
        "GaussianMRF",
        "GroupedNormalNormal",
        "IndependentHMM",
        "LinearHMM",
        "OneOneMatching",
        "OneTwoMatching",
        "SpanningTree",
    ],
    "an old name of LKJCholesky, which is there": ["LKJCorrCholesky"],
}


NOT_EXPANDED = {"AVFMultivariateNormal", "LKJ", "OMTMultivariateNormal", "SoftAsymmetricLaplace"}  # Pyro cannot


def _affine() -> list[Any]:
    """The last transform maps the real line to itself: its image is not what such a distribution can give."""
    return [transforms.AffineTransform(0.1, 2.0)]


def notes(fn: Any, value: Any, *, alone: bool = False) -> list[str]:
    """Observe a value twice, in a plate of two data, or alone without a plate, and return the notes of the check."""
    x = torch.as_tensor(value)

    def model() -> None:
        if alone:
            pyro.sample("x", fn, obs=x)
        else:
            with pyro.plate("rows", 2):
                pyro.sample("x", fn.expand((2,)), obs=torch.stack([x, x]))

    run = poutine.trace(model).get_trace
    return check_observed(run(), "rows", run)


def test_the_walk_leaves_out_no_distribution() -> None:
    every = {
        name
        for name in dir(dist)
        if isinstance(getattr(dist, name), type) and issubclass(getattr(dist, name), torch.distributions.Distribution)
    }
    left = {name for names in WITHOUT.values() for name in names}
    assert every == set(MADE) | left
    assert not set(MADE) & left


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_value_inside_is_taken_and_one_outside_is_named(name: str) -> None:
    make, inside, outside = MADE[name]
    alone = name in NOT_EXPANDED
    with pyro.validation_enabled(True):
        assert notes(make(), inside, alone=alone) == []
        if outside is None:
            return
        place = "" if alone else "at datum 0.* "
        with pytest.raises(DataError, match=rf"site 'x': the observed value .* {place}is outside the support of {name} \("):
            notes(make(), outside, alone=alone)
        masked = dist.MaskedDistribution(make(), False)
        assert notes(masked, outside, alone=alone) == []  # nothing is said of an entry that is masked out
        with poutine.mask(mask=False):
            assert notes(make(), outside, alone=alone) == []


def joint(make: Callable[[Tensor], Any], x: Tensor, *more: Any) -> LogJoint:
    """Observe x under a distribution made from z (N, 1)."""

    def model(x: Tensor, *more: Any) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
            pyro.sample("x", make(z, *more), obs=x)

    def guide(x: Tensor, *more: Any) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))

    return LogJoint(model, guide, x, *more)


GREY = T([[0.0, 1.0, 1.0], [0.0, 0.25, 1.0]])


def test_site_datum_entry_and_value_are_named_in_one_line_with_the_cure() -> None:
    with pytest.raises(DataError) as caught:
        joint(lambda z: dist.Bernoulli(logits=z.expand(-1, 3)).to_event(1), GREY)
    said = str(caught.value)
    assert "site 'x': the observed value 0.25 at datum 1, entry 1 is outside the support of Bernoulli (0 and 1)" in said
    assert "(x > 0.5)" in said
    assert "ContinuousBernoulli" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("make", "x", "cure"),
    [
        (lambda z: dist.Poisson(z.exp()), [[2.5]], "round"),
        (lambda z: dist.Poisson(z.exp()), [[-1.0]], "Normal"),
        (lambda z: dist.Binomial(5, logits=z), [[9.0]], "total_count"),
        (lambda z: dist.Bernoulli(logits=z), [[3.0]], "counts"),
        (lambda z: dist.LogNormal(z, 1.0), [[0.0]], "mask"),
        (lambda z: dist.Beta(z.exp(), 1.0), [[2.0]], "limits"),
    ],
)
def test_the_cure_suits_the_value(make: Callable[[Tensor], Any], x: list[list[float]], cure: str) -> None:
    with pytest.raises(DataError, match=cure):
        joint(lambda z: make(z).to_event(1), T(x))


def test_validate_args_false_makes_it_a_note() -> None:
    found = joint(lambda z: dist.Bernoulli(logits=z.expand(-1, 3), validate_args=False).to_event(1), GREY)
    assert ["1 of 6 values" in note and "0.25 at datum 1" in note for note in found.notes if "validate_args" in note] == [True]
    fine = joint(lambda z: dist.Bernoulli(logits=z.expand(-1, 3), validate_args=False).to_event(1), GREY.round())
    assert not [note for note in fine.notes if "validate_args" in note]


def test_masked_and_missing_entries_are_not_checked() -> None:
    whole = GREY.round() == GREY
    spellings: list[Callable[..., Any]] = [
        lambda z, m: dist.Bernoulli(logits=z.expand(-1, 3)).mask(m).to_event(1),
        lambda z, m: dist.Bernoulli(logits=z.expand(-1, 3)).to_event(1).mask(m.all(-1)),
    ]
    values = [joint(make, GREY, whole)(torch.zeros(1, 2, 1, dtype=torch.float64)) for make in spellings]
    log_half = torch.log(T(0.5, dtype=torch.float64))
    prior = dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).log_prob(torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(values[0][0], prior + T([3, 2]) * log_half)
    torch.testing.assert_close(values[1][0], prior + T([3, 0]) * log_half)

    def by_obs_mask(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z), obs=x, obs_mask=seen)

    def guide(x: Tensor, seen: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))

    LogJoint(by_obs_mask, guide, T([1.0, 0.5]), T([True, False]))
    with pytest.raises(DataError, match=r"0\.5 at datum 1"):
        LogJoint(by_obs_mask, guide, T([1.0, 0.5]), T([False, True]))


def test_a_support_that_depends_on_latents_is_judged_where_they_are() -> None:
    x = T([[0.3], [0.6]])
    assert joint(lambda z: dist.Uniform(-1.0, 1.0 + z.exp()).to_event(1), x).n_obs == 2
    with pytest.raises(DataError, match=r"-2 at datum 1, entry 0 is outside the support of Uniform"):
        joint(lambda z: dist.Uniform(-1.0, 1.0 + z.exp()).to_event(1), T([[0.3], [-2.0]]))


def test_the_density_is_zero_at_latents_whose_support_excludes_the_value() -> None:
    """x > e^z: the formulas of Pareto and of a shifted Exponential are positive on both sides of their limit."""

    def shifted(z: Tensor) -> Any:
        return dist.TransformedDistribution(dist.Exponential(torch.ones_like(z)), [transforms.AffineTransform(z.exp(), 1.0)])

    z = T([[[-1.0], [0.5]], [[0.9], [3.0]]], dtype=torch.float64)
    x = T([[2.0], [12.0]])
    prior = dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).log_prob(z)[..., 0]
    for make, density in (
        (lambda z: dist.Pareto(z.exp(), 1.0), z.exp() / x.double() ** 2),
        (shifted, (z.exp() - x.double()).exp()),
    ):

        def model(x: Tensor, make: Callable[[Tensor], Any] = make) -> None:
            with pyro.plate("rows", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(len(x), 1), 1.0).to_event(1))
                pyro.sample("x", make(z).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("rows", len(x)):
                pyro.sample("z", dist.Normal(torch.full((len(x), 1), -1.0), 0.1).to_event(1))

        expected = torch.where(z.exp() < x.double(), density.log(), -torch.inf)[..., 0]
        torch.testing.assert_close(LogJoint(model, guide, x)(z), prior + expected)


def test_vectors_of_single_precision_may_be_rounded() -> None:
    x = torch.rand(20, 500, generator=torch.Generator().manual_seed(0))
    x = x / x.sum(-1, keepdim=True)
    assert notes(dist.Dirichlet(torch.ones(500)), x[0]) == []
    with pytest.raises(DataError, match="divide each vector by its sum"):
        notes(dist.Dirichlet(torch.ones(500)), x[0] * 1.01)


def test_draws_have_the_shape_of_the_data_over_which_the_density_broadcasts() -> None:
    fn = dist.Normal(torch.zeros(4, 1), 1.0).to_event(1)
    wide = widened(fn, torch.Size([4, 3]), "x")
    x = wide.sample()
    assert x.shape == (4, 3)
    assert len(x.unique()) == 12
    torch.testing.assert_close(wide.log_prob(x), fn.log_prob(x))
    assert widened(fn, torch.Size([4, 1]), "x") is fn
    assert widened(dist.Normal(torch.zeros(4), 1.0), torch.Size([2, 4]), "x").batch_shape == (2, 4)


def test_a_value_that_few_latents_allow_is_not_refused() -> None:
    """y ~ U(0, e^z + 1): 6 is possible where z > log 5, at 5 % of the prior; -3 nowhere."""

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Uniform(torch.zeros_like(z), z.exp() + 1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.full((len(y),), 3.0), 0.1))

    log_joint = LogJoint(model, guide, torch.tensor([1.0, 6.0]))
    z = torch.tensor([[[1.0], [1.0]], [[2.0], [2.0]]], dtype=log_joint.probe_points.dtype)
    prior, width = dist.Normal(0.0, 1.0).log_prob(z[..., 0]), (z[..., 0].exp() + 1).log()
    expected = prior - width
    expected[0, 1] = -torch.inf  # e + 1 < 6
    torch.testing.assert_close(log_joint(z), expected)
    with pytest.raises(DataError, match="site 'y': the observed value -3 at datum 1 is outside the support of Uniform"):
        LogJoint(model, guide, torch.tensor([1.0, -3.0]))
