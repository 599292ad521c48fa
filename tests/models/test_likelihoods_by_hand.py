"""Densities against formulas written out by hand; what mixed columns add up to."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from support.cases.likelihoods import COLUMNS, F64, LEVELS, fitted, outputs, table
from torch import Tensor

from elbowroom.errors import DataError
from elbowroom.models.likelihoods.base import Likelihood
from elbowroom.models.likelihoods.binary import ContinuousBernoulli
from elbowroom.models.likelihoods.categorical import Categorical, DiscretizedLogistic
from elbowroom.models.likelihoods.counts import (
    Poisson,
)
from elbowroom.models.likelihoods.mixed import Mixed


@pytest.mark.parametrize("inner", ["poisson", "negative_binomial"])
def test_zero_inflation_by_hand(inner: str) -> None:
    likelihood, x = fitted(f"zero_inflated_{inner}")
    params = outputs(likelihood, len(x))
    rate = (likelihood.log_mean + params[:, :3]).exp()
    g = torch.sigmoid(likelihood.gate_logit + params[:, 3:])
    if inner == "poisson":
        log_p = x * rate.log() - rate - (x + 1).lgamma()
    else:
        a = likelihood.dispersion([])
        r = 1 / a
        log_p = (
            (x + r).lgamma() - r.lgamma() - (x + 1).lgamma() - r * (1 + a * rate).log() + x * (a * rate / (1 + a * rate)).log()
        )
    expected = (g * (x == 0) + (1 - g) * log_p.exp()).log().sum(-1)
    torch.testing.assert_close(likelihood(params).log_prob(x), expected)


@pytest.mark.parametrize("name", ["beta_binomial", "beta_binomial decoder"])
def test_beta_binomial_is_that_of_scipy(name: str) -> None:
    likelihood, x = fitted(name)
    params = outputs(likelihood, len(x))
    raw = params[:, 3:] if "decoder" in name else likelihood.variation.free.raw
    k = 1 / (likelihood.variation.typical * ((raw.exp() * (math.e - 1)).log1p() + 1e-3))
    m = torch.sigmoid(likelihood.logit + params[:, :3])
    n = likelihood.total_count
    expected = scipy.stats.betabinom(n, (m * k).detach(), ((1 - m) * k).detach()).logpmf(x).sum(-1)
    torch.testing.assert_close(likelihood(params).log_prob(x), torch.as_tensor(expected))


def _row(name: str) -> tuple[Likelihood, Tensor, Tensor, Tensor]:
    """A likelihood, data, outputs, and the Dirichlet's parameters by its definition."""
    likelihood, x = fitted(name)
    params = outputs(likelihood, len(x))
    raw = params[:, 3:].mean(-1, keepdim=True) if "decoder" in name else likelihood.variation.free.raw
    k = 1 / (likelihood.variation.typical * ((raw.exp() * (math.e - 1)).log1p() + 1e-3))
    return likelihood, x, params, (k * (likelihood.log_share + params[:, :3]).softmax(-1)).detach()


@pytest.mark.parametrize("name", ["dirichlet_multinomial", "dirichlet_multinomial decoder"])
def test_dirichlet_multinomial_is_that_of_scipy(name: str) -> None:
    likelihood, x, params, alpha = _row(name)
    theirs = scipy.stats.dirichlet_multinomial
    expected = [theirs(a.numpy(), int(row.sum())).logpmf(row.numpy().astype(int)) for a, row in zip(alpha, x, strict=True)]
    torch.testing.assert_close(likelihood(params).log_prob(x), torch.tensor(expected, dtype=F64))


def test_a_hole_in_a_dirichlet_multinomial_leaves_the_law_of_the_others_given_their_total() -> None:
    """p(x_1, x_2 | x_1 + x_2), summed by hand over a full row of the same total."""
    likelihood, x, params, _ = _row("dirichlet_multinomial")
    x = x.clamp_max(4)
    holed = x.clone()
    holed[:, 2] = torch.nan
    p = likelihood.incomplete(likelihood(params), holed.isnan())
    full = likelihood(params)
    for row in range(10):
        n = int(x[row, :2].sum())
        rows = x[row].expand(n + 1, 3).clone()
        rows[:, 0] = torch.arange(n + 1)
        rows[:, 1] = n - rows[:, 0]
        mass = full.log_prob(rows[:, None])[:, row]
        expected = full.log_prob(x)[row] - mass.logsumexp(0)
        torch.testing.assert_close(p.log_prob(holed)[row], expected)
    assert p.sample()[:, 2].isnan().all()


@pytest.mark.parametrize("name", ["zero_one_inflated_beta", "zero_one_inflated_beta shared"])
def test_zero_one_inflated_beta_by_hand(name: str) -> None:
    likelihood, x = fitted(name)
    params = outputs(likelihood, len(x))
    parts = params.reshape(len(x), -1, 3).unbind(1)
    if "shared" in name:  # m, k
        raw, zero, one = parts[1], likelihood.zero.raw, likelihood.one.raw
    else:  # m, zero, one
        raw, zero, one = likelihood.variation.free.raw, parts[1], parts[2]
    k = 1 / (likelihood.variation.typical * ((raw.exp() * (math.e - 1)).log1p() + 1e-3))
    m = torch.sigmoid(likelihood.logit_mean + parts[0])
    odds = (likelihood.log_odds + torch.stack(torch.broadcast_tensors(zero, one), -1)).exp()
    total = 1 + odds.sum(-1)
    density = scipy.stats.beta((m * k).detach(), ((1 - m) * k).detach()).pdf(x.clamp(1e-9, 1 - 1e-9))
    inner = torch.as_tensor(density) / total
    expected = torch.where(x == 0, odds[..., 0] / total, torch.where(x == 1, odds[..., 1] / total, inner)).log().sum(-1)
    assert (x == 0).any()
    assert (x == 1).any()
    torch.testing.assert_close(likelihood(params).log_prob(x), expected)


def test_ordinal_by_hand() -> None:
    likelihood, x = fitted("ordinal")
    c = likelihood.cutpoints()
    assert (c.diff(dim=-1) > 0).all()
    params = outputs(likelihood, len(x))
    cdf = torch.sigmoid(c - params[..., None])
    cdf = torch.cat([torch.zeros_like(cdf[..., :1]), cdf, torch.ones_like(cdf[..., :1])], -1)
    p = cdf.diff(dim=-1).gather(-1, x.long()[..., None])[..., 0]
    torch.testing.assert_close(likelihood(params).log_prob(x), p.log().sum(-1))
    theirs = dist.OrderedLogistic(params, c).log_prob(x.long()).sum(-1)
    torch.testing.assert_close(likelihood(params).log_prob(x), theirs)


def test_discretized_logistic_by_hand() -> None:
    likelihood, x = fitted("discretized_logistic")
    params = outputs(likelihood, len(x))
    m, s = likelihood.location_scale(params)
    upper = torch.where(x == LEVELS - 1, 1.0, torch.sigmoid((x + 0.5 - m) / s))
    lower = torch.where(x == 0, 0.0, torch.sigmoid((x - 0.5 - m) / s))
    torch.testing.assert_close(likelihood(params).log_prob(x), (upper - lower).log().sum(-1))


def test_outer_values_keep_their_precision_far_from_the_mean() -> None:
    p = DiscretizedLogistic((1,), 256).double()(torch.tensor([-4000.0], dtype=F64))
    x = torch.tensor([[0.0], [128.0], [255.0]], dtype=F64)
    s = 1 + 1e-3
    expected = torch.tensor([0.0, -(127.5 + 4000) / s + math.log(-math.expm1(-1 / s)), -(254.5 + 4000) / s], dtype=F64)
    torch.testing.assert_close(p.log_prob(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_continuous_bernoulli_at_every_logit(dtype: torch.dtype) -> None:
    """Where the probability of a Bernoulli has rounded to 0 or 1, too, and around zero."""
    l = torch.tensor([-300.0, -60, -5, -1e-2, -9.9e-3, -1e-6, 1e-6, 5e-3, 1e-2, 1, 60, 300], dtype=dtype)
    p = ContinuousBernoulli((1,)).to(dtype)(l[:, None])
    x = torch.linspace(0, 1, 11, dtype=dtype)[:, None, None]
    wide, at = l.double(), x[..., 0].double()
    log_norm = torch.where(wide > 0, wide + torch.log(-torch.expm1(-wide)), torch.log(-torch.expm1(wide)))
    expected = wide.abs().log() + wide * at - log_norm
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(p.log_prob(x).double(), expected, **close)
    u = torch.linspace(0, 1, 400_001, dtype=F64)[:, None]
    density = (wide.abs().log() + wide * u - log_norm).exp()
    mean = torch.trapezoid(u * density, u, dim=0)
    torch.testing.assert_close(p.mean[:, 0].double(), mean, rtol=0, atol=1e-4)
    variance = torch.trapezoid(u.square() * density, u, dim=0) - mean.square()
    torch.testing.assert_close(p.variance[:, 0].double(), variance, rtol=0, atol=2e-3 if dtype == torch.float32 else 1e-4)
    draws = p.sample((20_000,))
    assert ((draws.mean(0) - p.mean).abs() < 4.5 * draws.std(0) / 20_000**0.5).all()


def test_mixed_is_the_sum_of_its_columns() -> None:
    """Each group of columns against the likelihood of its own, with the same constants and outputs."""
    likelihood, x = fitted("mixed")
    params = outputs(likelihood, len(x))
    p = likelihood(params)
    total, start = 0.0, 0
    for index, part in zip(likelihood.groups, likelihood.parts, strict=True):
        piece = params[:, start : start + part.param_dim]
        start += part.param_dim
        total = total + part(piece).log_prob(x[:, index])
        torch.testing.assert_close(p.mean[:, index], part(piece).mean)
    torch.testing.assert_close(p.log_prob(x), total)
    torch.testing.assert_close(p.log_prob_entries(x).sum(-1), total)
    holed = torch.where(torch.rand_like(x) < 0.3, torch.nan, x)
    entries = torch.where(holed.isnan(), 0.0, p.log_prob_entries(x))
    torch.testing.assert_close(likelihood.incomplete(p, holed.isnan()).log_prob(holed), entries.sum(-1))
    kinds = {type(part).__name__ for part in likelihood.parts}
    assert kinds == {"Gaussian", "Categorical", "LogNormal", "Beta", "NegativeBinomial", "Bernoulli", "Ordinal"}


def test_mixed_takes_other_likelihoods_by_name_and_names_columns() -> None:
    likelihood = Mixed((8,), COLUMNS, override={"weight": "student_t", "grade": "binomial", "visits": "poisson"})
    assert {type(p).__name__ for p in likelihood.parts} >= {"StudentT", "Binomial", "Poisson"}
    x = table(20)
    likelihood.adapt(x)
    likelihood.check(x)
    assert likelihood(outputs(likelihood, 20, dtype=torch.float32)).log_prob(x).isfinite().all()
    assert likelihood.feature_shape == (11,)
    x[3, 4] = -2
    with pytest.raises(DataError, match=r"column 'visits': poisson .*-2 at row 3 .*override.visits = gaussian"):
        likelihood.check(x)


def test_features() -> None:
    x = torch.tensor([[0.0, 2.0], [torch.nan, 1.0]])
    seen = Categorical((2,), 3).features(x)
    assert torch.equal(seen[0], torch.tensor([1.0, 0, 0, 0, 0, 1]))  # category by category
    assert seen[1].isnan().sum() == 3
    assert Categorical((7, 1), 3).feature_shape == (7, 3)
    assert Categorical((7, 1), 3).features(torch.zeros(2, 7, 1))[..., 0].eq(1).all()
    torch.testing.assert_close(Poisson((2,)).features(x), x.log1p(), equal_nan=True)
