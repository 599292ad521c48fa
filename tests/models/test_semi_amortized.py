"""Guides whose parameters are refined for every datum: uphill, to the best member, the same however the data are cut."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pytest
import torch
from pyro.infer import Trace_ELBO
from support.cases.guides import SEMI, params_of, small_vae
from support.cases.vaes import linear_vae, set_guide
from torch import Tensor

from elbowroom.models import spaces
from elbowroom.models.guides.base import AmortizedGuide, Onto
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal, LowRankNormal, NormalFamily
from elbowroom.models.guides.semi_amortized import SemiAmortized
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP, Linear
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE


@pytest.mark.parametrize("make", [DiagonalNormal, FullRankNormal, LowRankNormal, lambda d: LowRankNormal(d, rank=2)])
def test_place_draws_from_the_family_and_uphill_ascends(make: Callable[[int], NormalFamily]):
    family = make(3).double()
    params = params_of(family)
    noise = torch.randn(60_000, 1, family.noise_dim, dtype=torch.float64)
    z, q = family.place(params, noise), family(params)
    error = 1 / len(z) ** 0.5
    assert ((z.mean(0) - q.mean).abs() < 4.5 * error * q.stddev).all()
    z = z - z.mean(0)
    spread = torch.einsum("sni,snj->nij", z, z) / len(z)
    scale = q.stddev[..., :, None] * q.stddev[..., None, :]
    covariance = q.covariance_matrix if hasattr(q, "covariance_matrix") else torch.diag_embed(q.variance)
    assert ((spread - covariance).abs() < 4.5 * 2**0.5 * error * scale).all()
    gradient = torch.randn_like(params)
    assert ((gradient * family.uphill(params, gradient)).sum(-1) > 0).all()
    other = torch.randn_like(params)  # P is symmetric
    torch.testing.assert_close(
        (other * family.uphill(params, gradient)).sum(-1), (gradient * family.uphill(params, other)).sum(-1)
    )


@pytest.mark.parametrize("name", [*SEMI, "semi_full onto positive", "semi_diagonal onto simplex"])
def test_refined_parameters_are_better_for_every_datum(name):
    vae, x = small_vae(name, dim=3, width=6, n=40)
    vae = vae.double()
    x = x.double()
    family, guide = vae.posterior.family, vae.posterior
    features, beside, log_joint = vae._seen(x, None, None)
    before = guide.params(features)
    after = family.refined(before, log_joint)
    semi, target = (family, log_joint)
    if isinstance(family, Onto):
        transform = spaces.onto(family.space)
        semi = family.base
        target = lambda u: log_joint(transform(u)) + transform.log_abs_det_jacobian(u, transform(u))
    gain = semi.elbo(after, target) - semi.elbo(before, target)
    assert (gain >= 0).all()
    assert (gain > 1e-3).float().mean() > 0.9

    def fresh(params: Tensor) -> Tensor:
        q = family(params)
        z = q.rsample(torch.Size([2000]))
        return log_joint(z) - q.log_prob(z)

    with torch.no_grad():
        gap = (fresh(after) - fresh(before)).mean(1)
    assert gap.mean() > 4.5 * gap.std() / len(gap) ** 0.5


@pytest.mark.parametrize("family", [DiagonalNormal, FullRankNormal])
def test_refinement_from_anywhere_reaches_the_best_member_of_a_linear_gaussian_model(family):
    vae, x, oracle = linear_vae(2, 5, family=family)
    set_guide(vae, oracle)
    name = "diagonal_normal" if family is DiagonalNormal else "full_rank_normal"
    semi = SemiAmortized(2, family=name, steps=200).double()
    _, _, log_joint = vae._seen(x, None, None)
    best = semi.elbo(vae.posterior.params(x), log_joint)
    start = torch.zeros(len(x), semi.param_dim, dtype=torch.float64)
    with torch.no_grad():
        reached = semi.elbo(semi.refined(start, log_joint), log_joint)
    torch.testing.assert_close(reached, best, rtol=0, atol=2e-3)
    if family is FullRankNormal:  # the posterior itself: the bound is tight
        torch.testing.assert_close(reached, oracle.log_evidence(x), rtol=0, atol=2e-3)


def test_refinement_is_deterministic_and_local_to_each_datum():
    vae, x = small_vae("semi_full", n=6)
    vae, x = vae.double(), x.double()
    with torch.no_grad():
        z = vae.encode(x).sample()
        value = vae.encode(x).log_prob(z)
        assert torch.equal(value, vae.encode(x).log_prob(z))
        torch.testing.assert_close(vae.encode(x[2:4]).log_prob(z[2:4]), value[2:4])
        moved = x.clone()
        moved[0] += 1
        torch.testing.assert_close(vae.encode(moved).log_prob(z)[1:], value[1:])
        assert not torch.isclose(vae.encode(moved).log_prob(z)[0], value[0])
    # with and without gradients, and the buffer in another precision, the same guide
    torch.testing.assert_close(vae.encode(x).log_prob(z).detach(), value)
    again = torch.func.vmap(lambda u: vae.encode(x).log_prob(u))(torch.stack([z, z]))
    torch.testing.assert_close(again[1].detach(), value)


def test_refinement_refuses_steps_into_nothing():
    """A density that is NaN a little way off: the encoder's own parameters stand, and the gradient stays finite."""
    semi = SemiAmortized(2, steps=4, step_size=50.0).double()
    params = torch.zeros(3, semi.param_dim, dtype=torch.float64, requires_grad=True)
    wall = torch.cat([semi.noise, semi.judges]).abs().max().item() * 1.001

    def log_joint(z: Tensor) -> Tensor:
        return torch.where((z.abs() > wall).any(-1), math.nan, 3.0 * z.sum(-1))

    refined = semi.refined(params, log_joint)
    assert refined.isfinite().all()
    assert (semi.elbo(refined, log_joint) >= semi.elbo(params, log_joint)).all()
    (gradient,) = torch.autograd.grad(refined.sum(), params)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("through", [True, False])
def test_refinement_gives_gradients_to_encoder_and_decoder(through):
    torch.manual_seed(0)
    family = SemiAmortized(2, steps=2, through=through)
    guide = AmortizedGuide(Linear((4,), family.param_dim), family)
    vae = VAE(Normal(2), Gaussian((4,), scale=0.5), MLP((2,), 4, hidden=(8,)), guide)
    x = torch.randn(7, 4)
    value = vae.encode(x).mean.square().sum()
    decoder = torch.autograd.grad(value, list(vae.decoder.parameters()), retain_graph=True, allow_unused=True)
    assert all((g is not None) == through for g in decoder)
    assert all((g != 0).any() for g in torch.autograd.grad(value, guide.encoder.parameters()))


def test_refinement_sees_missing_entries():
    vae, x = small_vae("semi_full", n=6)
    x[0, 1] = x[1, :] = math.nan
    assert vae.encode(x).sample().isfinite().all()


@pytest.mark.slow
def test_a_trace_elbo_of_the_refined_guide_is_higher_than_the_encoders():
    vae, x = small_vae("semi_full", n=64)
    vae, x = vae.double(), x.double()
    family = vae.posterior.family
    elbo = Trace_ELBO(num_particles=50, vectorize_particles=False)
    with torch.no_grad(), pyro.get_param_store().scope():
        refined = -elbo.loss(vae.model, vae.guide, x)
        family.steps = 0
        alone = -elbo.loss(vae.model, vae.guide, x)
    assert refined > alone + len(x) * 0.05
