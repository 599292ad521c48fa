"""Discrete latents: their values are all listed, summed over here and by Pyro, and the evidence is the sum by hand."""

from __future__ import annotations

import itertools
import math

import pyro
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO, config_enumerate
from support.cases.priors import DISCRETE, by_name, data_of, unchecked, vae_of
from torch import Tensor

from elbowroom.inference.references.enumeration import Enumeration
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.discrete import BernoulliFamily, CategoricalFamily
from elbowroom.models.priors.discrete import Bernoulli, Binary, Categorical


def all_values(vae) -> Tensor:
    d = vae.prior.latent_dim
    rows = itertools.product([0.0, 1.0], repeat=d) if vae.prior.space == "binary" else torch.eye(d).tolist()
    return torch.tensor(list(rows), dtype=torch.float64)


def by_hand(vae, x: Tensor) -> Tensor:
    """log p(x, z) of every value, (A, N)."""
    values = all_values(vae)
    return torch.stack([vae.prior.distribution().log_prob(z) + vae.decode(z.expand(len(x), -1)).log_prob(x) for z in values])


@pytest.mark.parametrize("case", **by_name(DISCRETE))
def test_enumeration_gives_the_sum_written_by_hand(case):
    vae, data = vae_of(case), data_of(case, 6)
    vae.adapt(**data)
    log_joint = LogJoint(vae.model, vae.guide, **data)
    assert log_joint.dim == 0
    with torch.no_grad():
        table = by_hand(vae, data["x"])
    assert torch.allclose(log_joint(torch.zeros(1, 6, 0))[0], table.logsumexp(0), atol=1e-10)
    posterior = Enumeration()(log_joint, keep=200, seed=0)
    assert posterior.evidence is not None
    assert posterior.evidence.kind == "exact"
    assert torch.allclose(posterior.evidence.value, table.logsumexp(0), atol=1e-10)
    assert torch.allclose(posterior.stats["probabilities"].T, table.softmax(0), atol=1e-10)
    assert posterior.sites["z"].shape[2:] == (6, vae.prior.latent_dim)
    q = log_joint.log_guide(torch.zeros(1, 6, 0))
    assert torch.allclose(q, torch.zeros_like(q), atol=1e-10)  # the guide's own values sum to one


@pytest.mark.parametrize("case", **by_name(DISCRETE))
def test_pyros_enumeration_gives_the_exact_elbo(case):
    vae, data = vae_of(case), data_of(case, 6)
    vae.adapt(**data)
    loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(vae.model, config_enumerate(vae.guide), data["x"])
    q, values = vae.encode(data["x"]), all_values(vae)
    log_q = torch.stack([q.log_prob(z.expand(6, -1)) for z in values])
    expected = (log_q.exp() * (by_hand(vae, data["x"]) - log_q)).sum()
    assert torch.allclose(-loss, expected, atol=1e-9)
    gradients = torch.autograd.grad(loss, list(vae.parameters()))
    for found, right in zip(gradients, torch.autograd.grad(-expected, list(vae.parameters())), strict=True):
        assert torch.allclose(found, right, atol=1e-9)


def test_summed_out_the_loss_falls_to_a_good_fit():
    """Two well-separated clusters: a mixture finds them, and the guide tells them apart."""
    case = next(case for case in DISCRETE if case.name == "categorical")
    vae = vae_of(case, 2).float()
    x = torch.cat([torch.randn(40, 4) + 4, torch.randn(40, 4) - 4])
    vae.adapt(x)
    svi = SVI(vae.model, config_enumerate(vae.guide), pyro.optim.Adam({"lr": 0.02}), TraceEnum_ELBO(max_plate_nesting=1))
    with unchecked():
        losses = [svi.step(x) for _ in range(150)]
    assert losses[-1] < losses[0]
    kinds = vae.encode(x).mean.argmax(-1)
    assert len(set(kinds[:40].tolist())) == len(set(kinds[40:].tolist())) == 1
    assert kinds[0] != kinds[-1]


def test_binary_is_the_product_of_its_entries():
    logits = torch.randn(3, 4, dtype=torch.float64)
    q = Binary(logits)
    z = q.sample((5,))
    assert z.shape == (5, 3, 4)
    entries = torch.distributions.Independent(torch.distributions.Bernoulli(logits=logits), 1)
    assert torch.allclose(q.log_prob(z), entries.log_prob(z))
    assert torch.allclose(q.mean, entries.mean)
    assert torch.allclose(q.variance, entries.variance)
    assert torch.allclose(q.entropy(), entries.entropy())
    assert q.expand((2, 3)).batch_shape == (2, 3)
    assert q.expand((2, 3)).sample().shape == (2, 3, 4)
    assert q.enumerate_support().shape == (16, 3, 4)
    assert q.enumerate_support(expand=False).shape == (16, 1, 4)
    assert math.isclose(float(q.log_prob(q.enumerate_support()).exp().sum()), 3.0)


def test_binary_checks_its_values_where_asked():
    with pytest.raises(ValueError, match="support"):
        Binary(torch.zeros(2), validate_args=True).log_prob(torch.tensor([0.5, 1.0]))


def test_log_probabilities_of_sure_entries_are_finite_with_a_gradient():
    logits = torch.tensor([800.0, -800.0], requires_grad=True)
    value = Binary(logits, validate_args=False).log_prob(torch.tensor([1.0, 0.0]))
    value.backward()
    assert float(value.detach()) == 0.0
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("made", [Bernoulli, BernoulliFamily])
def test_too_many_entries_are_refused(made):
    made(12)
    with pytest.raises(ValueError, match=r"latent_dim: 13 binary latents have 2\^13 joint values.*use at most 12"):
        made(13)
    with pytest.raises(NotImplementedError, match="too many to list"):
        Binary(torch.zeros(13)).enumerate_support()


@pytest.mark.parametrize("made", [Categorical, CategoricalFamily])
def test_one_category_is_refused(made):
    with pytest.raises(ValueError, match="at least 2 categories"):
        made(1)


def test_options_of_the_priors():
    assert torch.allclose(Bernoulli(3, probability=0.2).distribution().mean, torch.full((3,), 0.2))
    assert not list(Bernoulli(3).parameters())
    assert torch.allclose(Bernoulli(3, probability=0.2, learned=True).distribution().mean, torch.full((3,), 0.2))
    assert torch.allclose(Categorical(4, learned=False).distribution().mean, torch.full((4,), 0.25))
    assert len(list(Categorical(4).parameters())) == 1


def test_draws_are_not_differentiable_and_say_so():
    for family in (BernoulliFamily(2), CategoricalFamily(2)):
        assert not family.reparametrized
        assert not family(torch.zeros(3, 2)).has_rsample
