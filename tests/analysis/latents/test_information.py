"""Information against the closed forms of linear-Gaussian models, where q(z|x), q(z) and I are all normal."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.vaes import linear_vae, set_guide

from elbowroom.analysis.latents.aggregate import energy_test
from elbowroom.analysis.latents.information import information
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import FullRankNormal
from elbowroom.models.linear_gaussian import LinearGaussian

F64 = torch.float64


def logdet(matrix: torch.Tensor) -> float:
    return torch.linalg.slogdet(matrix).logabsdet.item()


def of_linear_guide(vae, oracle: LinearGaussian) -> tuple[float, float]:
    """I_q(x; z) and KL(q(z) || p(z)) in closed form, for x ~ p(x) and q(z|x) = N(G (x - mu), S)."""
    q = vae.posterior(oracle.mu[None])
    S = torch.diag(q.variance[0]) if not hasattr(q, "covariance_matrix") else q.covariance_matrix[0]
    gain = vae.posterior.encoder.body.weight[: oracle.W.shape[1]].detach()
    aggregate = gain @ (oracle.W @ oracle.W.T + torch.diag(oracle.psi)) @ gain.T + S.detach()
    kl = 0.5 * (aggregate.trace().item() - len(aggregate) - logdet(aggregate))
    return 0.5 * (logdet(aggregate) - logdet(S.detach())), kl


def test_rate_and_distortion_are_those_of_the_closed_form() -> None:
    vae, x, oracle = linear_vae(2, 6, n=300)
    set_guide(vae, oracle)
    found = information(LogJoint(vae.model, vae.guide, x), draws=400, entries=6)
    q = vae.posterior(x)
    each = 0.5 * (q.variance + q.mean.square() - 1 - q.variance.log())
    torch.testing.assert_close(torch.tensor(found["rate_coordinate"].values), each.detach(), atol=1e-9, rtol=0)
    rate = each.sum(-1).detach()
    assert (torch.tensor(found["rate"].values) - rate).abs().max() < 4.5 * 3 / 400**0.5
    assert abs(float(found["rate_mean"]) - rate.mean()) < 4.5 * 2 / (300 * 400) ** 0.5
    noise = (x - q.mean @ oracle.W.T - oracle.mu).square() + (oracle.W.square() @ q.variance.T).T
    distortion = 0.5 * (noise / oracle.psi + (2 * math.pi * oracle.psi).log()).sum(-1).mean().item()
    assert abs(float(found["distortion_mean"]) - distortion) < 0.05
    bits = (float(found["rate_mean"]) + float(found["distortion_mean"])) / (6 * math.log(2))
    assert float(found["bits_per_dimension"]) == pytest.approx(bits)
    assert found["active"].values.all()
    assert found["rate"].attrs["units"] == "nats"


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("full", [False, True])
def test_the_bounds_enclose_the_true_information(full: bool, seed: int) -> None:
    """Over data from p(x); and rate = I + KL(q(z) || p(z)) holds within them."""
    vae, x, oracle = linear_vae(3, 8, n=600, seed=seed, **({"family": FullRankNormal} if full else {}))
    set_guide(vae, oracle)
    found = information(LogJoint(vae.model, vae.guide, x))
    true, kl = of_linear_guide(vae, oracle)
    error = 4.5 * float(found["information_lower_se"])
    lower, upper = float(found["information_lower"]), float(found["information_upper"])
    assert lower - error < true < upper + error
    assert upper - lower < 0.6
    assert lower <= math.log(600)
    ends = [float(found[name]) for name in ("aggregate_kl_lower", "aggregate_kl_upper")]
    noise = 4.5 * float(found["aggregate_kl_upper_se"])
    assert ends[0] - noise < kl < ends[1] + noise
    assert abs(true + kl - float(found["rate_mean"])) < 4.5 * float(found["rate_se"])
    if full:  # the guide is the posterior: q(z) = p(z)
        assert kl == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_the_stated_errors_of_the_bounds_are_those_of_repetitions() -> None:
    """Over 100 data sets of 200: the sd of each bound against the mean of its stated error, and the order in the mean."""
    rows = []
    vae, _, oracle = linear_vae(2, 6, n=2)
    set_guide(vae, oracle)
    true, _ = of_linear_guide(vae, oracle)
    names = ("information_lower", "information_upper", "aggregate_kl_lower", "aggregate_kl_upper")
    for seed in range(100):
        x = oracle.sample(200, torch.Generator().manual_seed(seed))[1]
        found = information(LogJoint(vae.model, vae.guide, x), draws=2, seed=seed)
        rows.append([[float(found[n]), float(found[f"{n}_se"])] for n in names])
    values = torch.tensor(rows)
    spread, stated = values[..., 0].std(0), values[..., 1].mean(0)
    assert (spread / stated).min() > 0.6  # conservative where both terms are of one datum
    assert (spread / stated).max() < 1.33
    mean = values[..., 0].mean(0)
    assert mean[0] < true + 3 * spread[0] / 10
    assert mean[1] > true - 3 * spread[1] / 10


def test_sensitivity_is_the_fisher_information_of_the_decoder() -> None:
    """E (d log p(x|z) / d z_j)^2 = (W' psi^-1 W)_jj."""
    vae, x, oracle = linear_vae(3, 8, n=500)
    found = information(LogJoint(vae.model, vae.guide, x), draws=4)
    expected = oracle.precision.diagonal() - 1
    error = torch.tensor(found["sensitivity_se"].values)
    assert ((torch.tensor(found["sensitivity"].values) - expected).abs() < 4.5 * error).all()
    torch.testing.assert_close(error, expected * (2 / 4500) ** 0.5, rtol=0.15, atol=0)


def dead_vae(*, dead_decoder: bool) -> LogJoint:
    """Latent 1 is the prior for the guide; the decoder ignores it, or not."""
    vae, _, oracle = linear_vae(2, 6, n=2)
    with torch.no_grad():
        if dead_decoder:
            vae.decoder.body.weight[:, 1] = 0
        oracle = vae.linear_gaussian()
        set_guide(vae, oracle)
        body = vae.posterior.encoder.body
        body.weight[1] = 0
        body.bias[1] = 0
        body.bias[3] = math.log(math.expm1(1 - 1e-5)) - math.log(math.expm1(1))  # a standard deviation of 1
    x = oracle.sample(400, torch.Generator().manual_seed(1))[1]
    return LogJoint(vae.model, vae.guide, x)


def test_a_dead_latent_is_the_one_collapsed() -> None:
    found = information(dead_vae(dead_decoder=True), draws=8)
    assert found["collapsed"].values.tolist() == [False, True]
    assert found["ignored"].values.tolist() == [False, False]
    assert float(found["sensitivity"][1]) == pytest.approx(0, abs=1e-12)
    assert float(found["rate_coordinate_mean"][1]) < 1e-3
    assert "collapsed: z[1]" in found.attrs["sentence"]
    assert "1 of 2 latents are active" in found.attrs["sentence"]


def test_a_latent_that_only_the_guide_leaves_unused_is_not_called_collapsed() -> None:
    found = information(dead_vae(dead_decoder=False), draws=8)
    assert found["collapsed"].values.tolist() == [False, False]
    assert found["ignored"].values.tolist() == [False, True]
    assert "ignored by the guide: z[1]" in found.attrs["sentence"]


def test_a_guide_that_is_no_normal_and_a_prior_that_is_no_standard_one() -> None:
    """z ~ logistic-normal scale: a positive site; the guide is a Gamma, its moments are of log z."""

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.LogNormal(torch.tensor(0.5, dtype=F64), 0.8))
            pyro.sample("y", dist.Normal(z, 0.3), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Gamma(20 * torch.ones_like(y), 20 / y.clamp_min(0.2)))

    generator = torch.Generator().manual_seed(0)
    y = (0.5 + 0.8 * torch.randn(300, generator=generator, dtype=F64)).exp() + 0.3 * torch.randn(
        300, generator=generator, dtype=F64
    )
    found = information(LogJoint(model, guide, y), draws=64)
    # the moments of log Gamma(20, b) are digamma(20) - log b and trigamma(20)
    shape = torch.tensor(20.0, dtype=F64)
    mean = torch.digamma(shape) - (20 / y.clamp_min(0.2)).log()
    variance = torch.polygamma(1, shape)
    expected = 0.5 * ((0.64 / variance).log() + (variance + (mean - 0.5).square()) / 0.64 - 1)
    error = (torch.tensor(found["rate_coordinate"].values[:, 0]) - expected).abs()
    assert error.max() < 0.1
    assert abs(float(found["rate_coordinate_mean"][0]) - expected.mean()) < 0.02
    assert float(found["active_variance"][0]) == pytest.approx(mean.var().item() / 0.64, rel=0.03)
    rate = float(found["rate_mean"])
    assert float(found["information_lower"]) < float(found["information_upper"])
    assert rate - float(found["information_upper"]) == pytest.approx(float(found["aggregate_kl_lower"]), abs=0.1)


def test_a_prior_that_covariates_move_is_that_of_each_datum() -> None:
    """The guide is the prior p(z|c): no rate, whatever the covariate."""

    def model(y, c):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(c, 0.5))
            pyro.sample("y", dist.Normal(0 * z, 1.0), obs=y)

    def guide(y, c):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(c, 0.5))

    c = torch.linspace(-3, 3, 200, dtype=F64)
    found = information(LogJoint(model, guide, torch.zeros(200, dtype=F64), c), draws=8)
    assert float(found["rate_coordinate_mean"][0]) < 0.005
    assert float(found["active_variance"][0]) < 0.005
    assert found["collapsed"].values.all()
    assert float(found["aggregate_p_value"]) > 0.01
    assert math.isnan(float(found["aggregate_kl_upper"]))
    assert found.attrs["aggregate_kl"] == "not available: the prior differs between data"


def test_discrete_latents_are_summed_exactly() -> None:
    """c in {0, 1, 2}: rate and information by hand from the guide's table."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    means = torch.tensor([-2.0, 0.0, 2.0], dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            c = pyro.sample("c", dist.Categorical(p))
            pyro.sample("y", dist.Normal(means[c], 1.0), obs=y)

    logits = lambda y: -0.5 * (y[:, None] - means).square()

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("c", dist.Categorical(logits=logits(y)))

    generator = torch.Generator().manual_seed(0)
    y = means[torch.multinomial(p, 200, replacement=True, generator=generator)] + torch.randn(
        200, generator=generator, dtype=F64
    )
    found = information(LogJoint(model, guide, y))
    q = torch.softmax(logits(y), -1)
    rate = (q * (q / p).log()).sum(-1)
    torch.testing.assert_close(torch.tensor(found["rate"].values), rate, atol=1e-8, rtol=0)
    plug_in = (q * (q / q.mean(0)).log()).sum(-1).mean().item()
    assert float(found["information_lower"]) == pytest.approx(plug_in, abs=1e-8)
    assert plug_in < float(found["information_upper"]) < plug_in + 0.05
    assert "coordinate" not in found.dims


def test_a_model_that_cannot_be_simulated_says_so_and_judges_by_the_guide_alone() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0], 0.5), obs=2 * y + 1)

    def guide(y):
        with pyro.plate("rows", len(y)):
            loc = torch.stack([0.8 * (2 * y + 1), 0 * y], -1)
            pyro.sample("z", dist.Normal(loc, torch.tensor([0.45, 1.0], dtype=F64)).to_event(1))

    found = information(LogJoint(model, guide, torch.linspace(-1, 1, 50, dtype=F64)), draws=8)
    assert "not available: simulate" in found.attrs["sensitivity"]
    assert found["collapsed"].values.tolist() == [False, True]


def test_one_datum_has_no_information() -> None:
    vae, x, _ = linear_vae(1, 3, n=1)
    found = information(LogJoint(vae.model, vae.guide, x), draws=8)
    assert math.isnan(float(found["information_lower"]))
    assert math.isfinite(float(found["rate_mean"]))


def test_the_two_sample_test_has_its_level_and_finds_a_shift() -> None:
    generator = torch.Generator().manual_seed(3)
    normal = lambda: torch.randn(60, 3, generator=generator)
    p_values = torch.tensor([energy_test(normal(), normal(), permutations=99, seed=s)[0] for s in range(150)])
    for level in (0.05, 0.2, 0.5):
        assert abs((p_values <= level).double().mean() - level) < 3.5 * (level * (1 - level) / 150) ** 0.5
    a, b = (torch.randn(300, 3, generator=generator) for _ in range(2))
    p, effect, null = energy_test(a, b + torch.tensor([0.5, 0, 0]), seed=0)
    assert p <= 0.005
    assert effect > 3 * null
    p, wide, null = energy_test(a, 2 * b, seed=0)
    assert p <= 0.005
    with pytest.raises(ValueError, match="differ in shape"):
        energy_test(a, b[:5])


def test_the_aggregate_posterior_is_tested_against_the_prior() -> None:
    """The exact guide on data from the model passes; on data from elsewhere it does not."""
    vae, x, oracle = linear_vae(2, 6, n=600, family=FullRankNormal)
    set_guide(vae, oracle)
    assert float(information(LogJoint(vae.model, vae.guide, x), draws=2)["aggregate_p_value"]) > 0.02
    found = information(LogJoint(vae.model, vae.guide, x + oracle.W[:, 0]), draws=2)
    assert float(found["aggregate_p_value"]) <= 0.002
    assert float(found["aggregate_effect"]) > 0.05
