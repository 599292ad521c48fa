"""The VAE as plain Pyro programs, and the data checks of the likelihoods."""

from __future__ import annotations

import copy

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Importance, Predictive, Trace_ELBO
from support.cases.vaes import linear_vae, mlp_vae, set_guide

from elbowroom.errors import DataError, UserError
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal
from elbowroom.models.likelihoods.binary import Bernoulli, ContinuousBernoulli
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP

F64 = torch.float64


def test_a_mini_batch_is_scaled_to_the_size_it_stands_for() -> None:
    vae = mlp_vae()
    x = torch.bernoulli(torch.full((5, 12), 0.5))
    plain = poutine.trace(vae.model).get_trace(x)
    with poutine.replay(trace=plain):
        scaled = poutine.trace(vae.model).get_trace(x, size=50)
    torch.testing.assert_close(scaled.log_prob_sum(), 10 * plain.log_prob_sum())
    guide = poutine.trace(vae.guide).get_trace(x)
    with poutine.replay(trace=guide):
        guide_scaled = poutine.trace(vae.guide).get_trace(x, size=50)
    torch.testing.assert_close(guide_scaled.log_prob_sum(), 10 * guide.log_prob_sum())


def test_log_density_of_the_trace_is_the_formula() -> None:
    vae = mlp_vae().double()
    x = torch.bernoulli(torch.full((5, 12), 0.5, dtype=F64))
    trace = poutine.trace(vae.model).get_trace(x)
    z = trace.nodes["z"]["value"]
    logits = vae.decoder(z)
    expected = (
        -0.5 * z.square().sum()
        - 0.5 * z.numel() * torch.log(torch.tensor(2 * torch.pi, dtype=F64))
        + (x * logits - torch.nn.functional.softplus(logits)).sum()
    )
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@pytest.mark.slow
def test_predictive_importance_and_nuts_run_on_the_model() -> None:
    vae, x, oracle = linear_vae(2, 6, n=3)
    set_guide(vae, oracle)
    prior = Predictive(vae.model, num_samples=2000)(n=4)
    assert prior["x"].shape == (2000, 4, 6)
    marginal = oracle.W @ oracle.W.T + torch.diag(oracle.psi)
    z_score = (prior["x"].mean(0) - oracle.mu) / (marginal.diagonal() / 2000).sqrt()
    assert z_score.abs().max() < 4.5
    # one datum: pyro's Importance gives one log weight for the whole trace
    importance = Importance(vae.model, vae.guide, num_samples=800).run(x[:1])
    ess = importance.get_ESS().item()
    log_z = importance.get_log_normalizer().item()
    assert ess > 200
    assert abs(log_z - oracle.log_evidence(x[:1]).item()) < 4.5 * (1 / ess - 1 / 800) ** 0.5
    mcmc = MCMC(NUTS(vae.model), num_samples=200, warmup_steps=100, disable_progbar=True)
    mcmc.run(x[:1])
    draws = mcmc.get_samples()["z"][:, 0]
    ess = mcmc.diagnostics()["z"]["n_eff"].flatten().clamp_max(200)
    mean, covariance = oracle.posterior(x[:1])
    assert ess.min() > 30
    assert ((draws.mean(0) - mean[0]).abs() < 4.5 * (covariance.diagonal() / ess).sqrt()).all()


def test_two_models_do_not_share_weights_through_the_parameter_store() -> None:
    """pyro.module hands a second module of the same name the weights of the first; every VAE has a name of its own."""
    first, second = mlp_vae(seed=0), mlp_vae(seed=1)
    third = copy.deepcopy(first)
    x = torch.ones(3, 12)
    kept = {id(vae): [p.detach().clone() for p in vae.parameters()] for vae in (first, second, third)}
    for vae in (first, second, third):
        Trace_ELBO().loss(vae.model, vae.guide, x)
    for vae in (first, second, third):
        assert all(torch.equal(a, b) for a, b in zip(kept[id(vae)], vae.parameters(), strict=True))
    assert len({first.name, second.name, third.name}) == 3
    with torch.no_grad():
        next(third.parameters()).add_(1.0)
    assert torch.equal(next(first.parameters()), kept[id(first)][0])


@pytest.mark.parametrize("family", [DiagonalNormal, FullRankNormal])
@pytest.mark.parametrize("dim", [1, 3])
def test_families_integrate_to_one_and_reach_every_parameter(family: type, dim: int) -> None:
    q = family(dim)
    params = torch.randn(4, q.param_dim, dtype=F64, requires_grad=True)
    distribution = q(params)
    assert distribution.event_shape == (dim,)
    assert distribution.batch_shape == (4,)
    draws = distribution.sample((4000,))
    reference = torch.distributions.StudentT(4.0, distribution.mean, 2 * distribution.variance.sqrt()).expand((4, dim))
    proposal = reference.sample((20_000,))
    log_ratio = distribution.log_prob(proposal) - reference.log_prob(proposal).sum(-1)
    total = log_ratio.exp().mean(0)
    assert ((total - 1).abs() < 4.5 * log_ratio.exp().std(0) / 20_000**0.5).all()
    z_score = (draws.mean(0) - distribution.mean) / (distribution.variance / 4000).sqrt()
    assert z_score.abs().max() < 4.5
    (gradient,) = torch.autograd.grad(distribution.log_prob(draws[:3]).sum(), params)
    assert (gradient != 0).all()


def test_a_zero_encoder_gives_unit_scales() -> None:
    for family in (DiagonalNormal(3), FullRankNormal(3)):
        variance = family(torch.zeros(family.param_dim)).variance
        torch.testing.assert_close(variance, torch.ones(3), atol=1e-4, rtol=0)


@pytest.mark.parametrize("scale", [0.7, "shared", "per_dimension", "decoder"])
def test_gaussian_scales_are_floored_and_in_the_units_of_the_data(scale: float | str) -> None:
    x = torch.tensor([[0.0, 100.0, 5.0], [2.0, 300.0, 5.0], [4.0, 500.0, 5.0]], dtype=F64)
    likelihood = Gaussian((3,), scale=scale, floor=0.01).double()
    likelihood.adapt(x)
    params = torch.full((1, likelihood.param_dim), -1000.0, dtype=F64)
    params[:, :3] = 0
    if hasattr(likelihood, "raw_scale"):
        with torch.no_grad():
            likelihood.raw_scale.fill_(-1000.0)
    p = likelihood(params)
    torch.testing.assert_close(p.mean[0], x.mean(0))
    sd = x.std(0)
    overall = sd.square().mean().sqrt()
    unit = torch.stack([sd[0], sd[1], overall])  # a constant column takes the overall unit
    expected = {
        0.7: torch.full((3,), 0.7, dtype=F64),
        "shared": (0.01 * unit.square().mean().sqrt()).expand(3),
        "per_dimension": 0.01 * unit,
        "decoder": 0.01 * unit,
    }[scale]
    torch.testing.assert_close(p.variance.sqrt()[0], expected)


BAD_DATA = {
    "grey pixels": (
        Bernoulli,
        [[0.0, 1.0], [0.25, 1.0]],
        "data: bernoulli needs 0 or 1, found 0.25 at row 1, column 0 (1 such entries): binarize the data (data.binarize = a "
        "threshold), or use model.likelihood = continuous_bernoulli for values in [0, 1]",
    ),
    "counts": (
        ContinuousBernoulli,
        [[0.0, 3.0], [0.25, 1.0]],
        "data: continuous_bernoulli needs values in [0, 1], found 3 at row 0, column 1 (1 such entries): divide the data by "
        "their largest possible value (data.scale), or use model.likelihood = gaussian",
    ),
    "infinite": (
        Gaussian,
        [[0.0, 1.0], [float("inf"), 1.0]],
        "data: inf at row 1, column 0 (1 such entries): remove it, or make it NaN to treat it as missing",
    ),
    "wrong width": (Gaussian, [[0.0, 1.0, 2.0]], "data: each datum has shape (3,), the model expects (2,)"),
}


@pytest.mark.parametrize("case", list(BAD_DATA))
def test_data_outside_the_support_are_named_with_the_remedy(case: str) -> None:
    likelihood, x, message = BAD_DATA[case]
    with pytest.raises(DataError) as caught:
        likelihood((2,)).check(torch.tensor(x))
    assert str(caught.value).startswith(message)


def test_good_data_pass() -> None:
    Bernoulli((2,)).check(torch.tensor([[0.0, 1.0]]))
    ContinuousBernoulli((2,)).check(torch.tensor([[0.0, 0.3]]))
    Gaussian((2,)).check(torch.tensor([[-1e9, 1e9]]))
    Bernoulli((2,)).check(torch.tensor([[0.0, float("nan")]]))


def test_continuous_bernoulli_is_normalised_and_bernoulli_on_grey_data_is_not() -> None:
    x = (torch.arange(20_000, dtype=F64) + 0.5) / 20_000
    for logit in (-3.0, 0.0, 0.4, 2.0):
        params = torch.full((20_000, 1), logit, dtype=F64)
        assert ContinuousBernoulli((1,))(params).log_prob(x[:, None]).exp().mean().item() == pytest.approx(1, abs=1e-6)
        assert abs(Bernoulli((1,))(params).log_prob(x[:, None]).exp().mean().item() - 1) > 0.3


def test_encoder_input_is_centred_and_scaled_by_training_data() -> None:
    guide = AmortizedGuide(MLP((2,), 4), DiagonalNormal(2))
    x = torch.tensor([[1e6, -3e6], [2e6, 5e6]])
    guide.adapt(x)
    seen: list[torch.Tensor] = []
    guide.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    guide(x)
    assert seen[0].abs().max() < 3
    torch.testing.assert_close(seen[0].mean(0), torch.zeros(2), atol=1e-6, rtol=0)


def test_mlp_refuses_a_width_of_zero() -> None:
    with pytest.raises((ValueError, UserError), match="hidden"):
        MLP((2,), 3, hidden=(4, 0))


def test_model_without_data_draws_from_the_joint() -> None:
    vae = mlp_vae()
    with pyro.poutine.seed(rng_seed=0):
        x = vae.model(n=7)
    assert x.shape == (7, 12)
    assert set(x.unique().tolist()) <= {0.0, 1.0}
