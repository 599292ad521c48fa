"""Chains of latents by name: against the Kalman filter and the exact smoother, and what is refused."""

from __future__ import annotations

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from support.problems.state_space import StateSpace

import elbowroom as er
from elbowroom.errors import SpecError
from elbowroom.inference.target.of_vae import log_joint_of
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.markov import MarkovFamily
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.recurrent import GRU
from elbowroom.models.networks.stepwise import Stepwise
from elbowroom.models.priors.markov import SCALE_FLOOR, Markov
from elbowroom.models.vae import VAE

F64 = torch.float64
T, K = 4, 2


def raw(scale: torch.Tensor, unit: float = 0.0) -> torch.Tensor:
    """Return s with softplus(s + unit) + floor = scale."""
    return (scale - SCALE_FLOOR).expm1().log() - unit


def declared(oracle: StateSpace) -> VAE:
    """The oracle's model, built of the prior `markov`, the decoder `stepwise` and a gaussian likelihood."""
    unit = float(torch.tensor(1.0, dtype=F64).expm1().log())
    prior = Markov(T * K, (T, K)).double()
    likelihood = Gaussian((T, K), scale=1.0).double()
    decoder = Stepwise((T * K,), likelihood.param_dim, (1, T, K), T * K, hidden=()).double()
    family = MarkovFamily(T * K, T).double()
    encoder = GRU((T, 2 * K + 1), family.param_dim, family.param_shape, True, hidden=8).double()
    with torch.no_grad():
        prior.raw.copy_(raw(oracle.q, unit))
        prior.step.map.weight.copy_(oracle.a)
        prior.step.raw.copy_(raw(oracle.q))
        layer = decoder.body.network.body[-1]
        layer.weight.copy_(oracle.c / oracle.r[:, None])
        layer.bias.zero_()
    return VAE(prior, likelihood, decoder, AmortizedGuide(encoder, family, marks=True)).double().eval()


@pytest.fixture(scope="module")
def oracle() -> StateSpace:
    return StateSpace(K)


def exact(oracle: StateSpace, x: torch.Tensor) -> dist.MultivariateNormal:
    return dist.MultivariateNormal(*oracle.posterior(x))


def test_the_joint_is_the_kalman_filters_and_padding_has_no_factor(oracle):
    """log p(x, z) less the exact log p(z|x) is log p(x), at every z; unit noise in data divided by its scale."""
    lengths = [4, 2, 3]
    x, mask = oracle.data(lengths)
    unit = torch.where(mask[..., None], x / oracle.r, torch.nan)
    joint = log_joint_of(declared(oracle), {"x": unit})
    z = torch.randn(5, 3, T * K, dtype=F64, generator=torch.Generator().manual_seed(1))
    found = joint(z)
    for n, length in enumerate(lengths):
        seen, after = x[n, :length], z[:, n, length * K :].unflatten(-1, (-1, K))
        density = exact(oracle, seen).log_prob(z[:, n, : length * K])
        steps = z[:, n].unflatten(-1, (T, K))
        for t in range(length, T):
            density = density + dist.Normal(steps[:, t - 1] @ oracle.a.T, oracle.q).to_event(1).log_prob(after[:, t - length])
        evidence = oracle.log_evidence(seen) + length * oracle.r.log().sum()
        torch.testing.assert_close(found[:, n] - density, evidence.expand(5), rtol=0, atol=1e-9)


def test_the_linear_guide_holds_the_exact_smoother(oracle):
    """The posterior of a state-space model, conditioned step by step, is a member of the family; its moments agree."""
    x = oracle.data([T])[0][0]
    mean, cov = oracle.posterior(x)
    family, rows = MarkovFamily(T * K, T).double(), []
    unit = float(torch.tensor(1.0, dtype=F64).expm1().log())
    for t in range(T):
        here, before = slice(t * K, t * K + K), slice(max(t - 1, 0) * K, t * K)
        slope = torch.zeros(K, K, dtype=F64)
        loc, noise = mean[here], cov[here, here]
        if t:
            slope = torch.linalg.solve(cov[before, before], cov[before, here]).T
            loc, noise = loc - slope @ mean[before], noise - slope @ cov[before, here]
        root = torch.linalg.cholesky(noise)
        rows.append(torch.cat([slope.flatten(), loc, raw(root.diagonal(), unit), root[1:, 0]]))
    q, p = family(torch.stack(rows).flatten()[None]), exact(oracle, x)
    z = torch.randn(7, 1, T * K, dtype=F64)
    torch.testing.assert_close(q.log_prob(z), p.log_prob(z), rtol=0, atol=1e-9)
    torch.testing.assert_close(q.mean[0], p.mean)
    torch.testing.assert_close(q.variance[0], p.variance)


def test_draws_of_the_prior_have_the_covariance_of_the_chain(oracle):
    prior = declared(oracle).prior
    torch.manual_seed(0)
    with torch.no_grad():
        z = prior.distribution().expand([40_000]).sample()
    expected, wanted = oracle.q.square().diag(), []
    for _ in range(T):
        wanted.append(expected)
        expected = oracle.a @ expected @ oracle.a.T + oracle.q.square().diag()
    for t, cov in enumerate(wanted):
        step = z[:, t * K : t * K + K]
        error = step.square().std(0) / len(z) ** 0.5
        assert ((step.square().mean(0) - cov.diagonal()).abs() < 4.5 * error).all(), t
    both = z[:, K : 2 * K, None] * (z[:, :K] @ oracle.a.T)[:, None, :]  # E z_2 (A z_1)' = Cov(A z_1)
    error = both.std(0) / len(z) ** 0.5
    assert ((both.mean(0) - oracle.a @ wanted[0] @ oracle.a.T).abs() < 4.5 * error).all()


def test_a_step_of_the_guide_reads_no_earlier_x_and_no_padding():
    """The default encoder reads backwards: what it says of step t depends on x_t and later, and on no padded step."""
    torch.manual_seed(0)
    family = MarkovFamily(T, T)
    encoder = GRU((T, 3), family.param_dim, family.param_shape, True, hidden=6)
    guide = AmortizedGuide(encoder, family, marks=True)
    x = torch.randn(1, T, 1)
    x[0, 3] = torch.nan
    moved = x.clone()
    moved[0, 1] += 1
    before, after = (guide.params(value).unflatten(-1, family.param_shape)[0] for value in (x, moved))
    changed = (before != after).any(-1).tolist()
    assert changed == [True, True, False, False]
    shorter = GRU((3, 3), 3 * family.param_shape[1], (3, family.param_shape[1]), True, hidden=6)
    shorter.load_state_dict(encoder.state_dict())
    cut = AmortizedGuide(shorter, MarkovFamily(3, 3), marks=True).params(x[:, :3])
    torch.testing.assert_close(before[:3].flatten(), cut[0])


def test_each_step_is_made_from_its_own_latents_in_the_order_of_the_parameters():
    """Parameters lie as (n, T, F): each of both kinds, at step t, is the shared network's output at z_t and the covariates."""
    torch.manual_seed(0)
    n, steps, features, k, c = 2, 3, 4, 2, 1
    decoder = Stepwise((steps * k + c,), n * steps * features, (n, steps, features), steps * k, hidden=(5,)).double()
    x = torch.randn(6, steps * k + c, dtype=F64)
    found = decoder(x).unflatten(-1, (n, steps, features))
    for t in range(steps):
        own = torch.cat([x[:, t * k : t * k + k], x[:, steps * k :]], -1)
        torch.testing.assert_close(found[:, :, t], decoder.body.network(own).unflatten(-1, (n, features)))


def spec(**model: object) -> dict:
    return {
        "data": "memory",
        "model": {"latent_dim": 3, "prior": "markov", "likelihood": "gaussian", "decoder": "stepwise", **model},
        "guide": {"family": "markov", "encoder": "gru"},
        "fit": {"epochs": 3},
    }


def test_the_best_of_the_family_leaves_no_gap_where_the_model_is_linear_and_gaussian(tmp_path):
    """Whatever the encoder says, the family holds the posterior: the whole gap is amortization."""
    x = np.cumsum(np.random.default_rng(0).normal(size=(60, 2, 3)), 1).astype(np.float32)
    tree = spec(latent_dim=2, decoder={"name": "stepwise", "hidden": []}) | {"audit": {"observations": 3}}
    run = er.fit(er.Experiment.from_dict(tree, data=x), out=tmp_path / "run")
    table = run.audit().table
    assert bool((table["status"].values == "exact").all())
    assert bool((table["gap_total"] > 0.5).all())
    assert bool((table["gap_approximation"] <= table["gap_approximation_upper"]).all())
    assert bool((table["gap_approximation_upper"] < 1e-4).all())


@pytest.mark.parametrize(
    ("model", "guide", "shape", "said"),
    [
        (
            {"latent_dim": 4, "decoder": "gru"},
            {},
            (20, 3, 2),
            r"prior: steps: a latent_dim of 4 is no multiple of the 3 steps of the data, .*use latent_dim = 3, 1 for each",
        ),
        (
            {"latent_dim": 4, "prior": "normal"},
            {"family": "diagonal_normal"},
            (20, 3, 2),
            r"stepwise: a latent_dim of 4 .* use latent_dim = 3",
        ),
        ({}, {"encoder": "stepwise"}, (20, 3, 2), r"guide.encoder: stepwise is a decoder.*use gru to encode"),
        ({}, {"encoder": "mlp"}, (20, 6), r"stepwise is for sequences, \(T, F\).*use mlp"),
    ],
)
def test_what_does_not_fit_is_said_with_the_nearest_right_thing(model, guide, shape, said):
    tree = spec(**model)
    tree["guide"] |= guide
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with pytest.raises(SpecError, match=said):
        er.Experiment.from_dict(tree, data=x).check()
