"""Flows and hierarchies: the guide families, what Pyro asks of their distributions, and a posterior that they reach."""

from __future__ import annotations

import math
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.priors import unchecked

from elbowroom.inference.fit.svi import Step
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.base import AmortizedGuide
from elbowroom.models.guides.flow import FlowFamily
from elbowroom.models.guides.hierarchical import HierarchicalFamily
from elbowroom.models.likelihoods.continuous import Gaussian
from elbowroom.models.networks.mlp import MLP
from elbowroom.models.priors.flow import Flow
from elbowroom.models.priors.hierarchical import Ancestral, Hierarchical
from elbowroom.models.priors.standard import Normal
from elbowroom.models.vae import VAE

KINDS = ["nsf", "maf", "realnvp"]


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("kind", KINDS)
def test_draws_carry_a_gradient_and_the_density_is_theirs(kind):
    family = shaken(FlowFamily(2, kind=kind, hidden=(8,), context=3)).double()
    params = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    q = family(params)
    assert (q.batch_shape, q.event_shape) == ((4,), (2,))
    z = q.rsample((5,))
    assert z.shape == (5, 4, 2)
    inputs = [params, *family.parameters()]
    gradients = torch.autograd.grad(z.square().sum() + q.log_prob(z).sum(), inputs, allow_unused=True)
    assert all(g is not None and bool((g != 0).any()) for g in gradients)
    # the map from base to z inverts: the density of draws that zuko states beside them is log_prob
    with torch.no_grad():
        again, stated = q.flow.rsample_and_log_prob((5,))
        assert torch.allclose(q.log_prob(again), stated, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_density_integrates_to_one_given_every_context(kind):
    family = shaken(FlowFamily(2, kind=kind, hidden=(8,), context=3)).double()
    with torch.no_grad():
        q = family(torch.randn(3, 3, dtype=torch.float64))
        proposal = dist.StudentT(3.0, torch.zeros(2, dtype=torch.float64), 1.8).to_event(1)
        z = proposal.sample((100_000, 1))
        weight = (q.log_prob(z.expand(-1, 3, -1)) - proposal.log_prob(z)).exp()
        se = weight.std(0) / len(z) ** 0.5
        assert (se < 0.02).all()
        assert ((weight.mean(0) - 1).abs() < 4.5 * se).all()


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_output_zero_is_close_to_standard(kind):
    with torch.no_grad():
        z = FlowFamily(3, kind=kind)(torch.zeros(1, 32)).sample((4000,))
    assert z.mean((0, 1)).abs().max() < 0.2
    assert (z.std((0, 1)) - 1).abs().max() < 0.2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expand_broadcast_vmap_and_precision(kind, dtype):
    family = shaken(FlowFamily(2, kind=kind, hidden=(8,), context=3)).to(dtype)
    close = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-10}
    with torch.no_grad(), unchecked():
        params = torch.randn(4, 3, dtype=dtype)
        q = family(params)
        assert q.expand((6, 4)).rsample().shape == (6, 4, 2)
        z = torch.randn(6, 4, 2, dtype=dtype)
        one = torch.stack([q.log_prob(u) for u in z])
        assert one.dtype == dtype
        assert torch.allclose(q.log_prob(z), one, **close)
        assert torch.allclose(torch.func.vmap(lambda u: family(params).log_prob(u))(z), one, **close)
        shared = q.log_prob(z[:, :1])
        assert torch.allclose(shared, torch.stack([q.log_prob(u[:1].expand(4, -1)) for u in z]), **close)
        wide = family(params.expand(6, 4, 3)).log_prob(z)
        assert torch.allclose(wide, one, **close)


@pytest.mark.parametrize("made", [Flow, FlowFamily])
def test_realnvp_with_one_latent_is_refused(made):
    with pytest.raises(ValueError, match="kind: realnvp .* latent_dim >= 2; use nsf"):
        made(1, kind="realnvp")


@pytest.mark.parametrize("kind", ["nsf", "maf"])
def test_one_latent(kind):
    assert Flow(1, kind=kind).distribution().log_prob(torch.zeros(5, 1)).shape == (5,)
    assert FlowFamily(1, kind=kind)(torch.zeros(5, 32)).rsample().shape == (5, 1)


def test_a_flow_guide_in_the_seam_and_in_training():
    torch.manual_seed(0)
    family, likelihood = FlowFamily(2, hidden=(16,), context=6), Gaussian((3,))
    guide = AmortizedGuide(MLP((3,), 6, hidden=(16,)), family)
    vae = VAE(Normal(2), likelihood, MLP((2,), likelihood.param_dim, hidden=(16,)), guide).double()
    x = torch.randn(64, 3, dtype=torch.float64) @ torch.randn(3, 3, dtype=torch.float64) + 1
    vae.adapt(x)
    log_joint = LogJoint(vae.model, vae.guide, x[:5])
    assert log_joint.mode == "vmap", log_joint.notes
    z, log_q = log_joint.sample_guide(7, 0)
    with torch.no_grad():
        q = vae.encode(x[:5])
        assert torch.allclose(log_q, torch.stack([q.log_prob(u) for u in z]), atol=1e-10)
        log_joint.mode = "repeat"
        assert torch.allclose(log_joint.log_guide(z), log_q, atol=1e-10)
    step = Step(vae, size=64, learning_rate=1e-2)
    losses = [step(x)[0] for _ in range(20)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in vae.parameters())


@pytest.mark.slow
def test_a_flow_reaches_a_posterior_that_a_normal_cannot():
    """A banana: fitted by its own ELBO, the flow comes within a tenth of a nat of log Z = 0."""
    torch.manual_seed(0)

    def log_p(z: torch.Tensor) -> torch.Tensor:
        first, second = z.unbind(-1)
        return dist.Normal(0.0, 1.0).log_prob(first) + dist.Normal(first.square() - 1, 0.3).log_prob(second)

    family = FlowFamily(2, hidden=(32,), context=2)
    params, steps = torch.zeros(128, 2), 200
    optimizer = torch.optim.Adam(family.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.03, total_steps=steps)
    with unchecked():
        for _ in range(steps):
            q = family(params)
            z = q.rsample()
            loss = (q.log_prob(z) - log_p(z)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            z = family(params).sample((40,))
            gap = float((family(params).log_prob(z) - log_p(z)).mean())
    assert -0.02 < gap < 0.1


@pytest.mark.slow
def test_importing_zuko_leaves_the_checks_of_torch_on():
    code = "import torch; d = torch.distributions; import elbowroom.models.priors.flow; d.Normal(0.0, -1.0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ValueError: Expected parameter scale" in done.stderr


# hierarchies


def test_hierarchical_guide_draws_top_down_with_the_stated_density():
    family = shaken(HierarchicalFamily(3, 2, hidden=(8,))).double()
    params = torch.randn(5, family.param_dim, dtype=torch.float64)
    with pyro.plate("data", 5):
        trace = pyro.poutine.trace(family.draw).get_trace(params)
    assert [name for name, site in trace.nodes.items() if site["type"] == "sample" and name != "data"] == ["z_top", "z"]
    top, z = trace.nodes["z_top"]["value"], trace.nodes["z"]["value"]
    assert (top.shape, z.shape) == ((5, 2), (5, 3))
    assert torch.allclose(trace.nodes["z"]["fn"].log_prob(z), family.given(params, top).log_prob(z))
    moved = family.given(params, top + 1).mean - family.given(params, top).mean
    assert (moved.abs() > 1e-6).all()  # z is not independent of z_top


def test_hierarchical_marginal_can_be_drawn_from_and_no_more():
    family = shaken(HierarchicalFamily(3, 2, hidden=(8,))).double()
    params = torch.randn(5, family.param_dim, dtype=torch.float64, requires_grad=True)
    q = family(params)
    assert isinstance(q, Ancestral)
    assert (q.batch_shape, q.event_shape) == ((5,), (3,))
    z = q.rsample((4000,))
    assert z.shape == (4000, 5, 3)
    assert q.expand((7, 5)).sample().shape == (7, 5, 3)
    assert bool((torch.autograd.grad(z.sum(), params)[0] != 0).any())
    with torch.no_grad(), pyro.plate("draws", 4000, dim=-2), pyro.plate("data", 5):
        drawn = family.draw(params.expand(4000, 5, -1))
    assert (z.mean(0) - drawn.mean(0)).abs().max() < 4.5 * math.sqrt(2 / 4000) * float(drawn.std(0).max())
    for ask in (lambda: q.log_prob(z), lambda: q.mean, lambda: q.stddev):
        with pytest.raises(NotImplementedError):
            ask()


def test_hierarchical_prior_marginal_has_the_moments_of_its_program():
    prior = shaken(Hierarchical(2, top_dim=2, hidden=(8,)))
    with torch.no_grad():
        one = prior.distribution().sample((20_000,))
        with pyro.plate("data", 20_000):
            two = prior()
        assert (one.mean(0) - two.mean(0)).abs().max() < 4.5 * math.sqrt(2 / 20_000) * float(two.std(0).max())
        assert torch.allclose(one.std(0), two.std(0), rtol=0.08)
    with pytest.raises(NotImplementedError, match="score z_top and z"):
        prior.distribution().log_prob(one)


def test_encoder_output_zero_gives_unit_scales_and_a_flat_prior_is_refused():
    family = HierarchicalFamily(2, 3)
    assert torch.allclose(family.top(torch.zeros(1, family.param_dim)).stddev, torch.ones(1, 3), atol=1e-4)
    scale = family.given(torch.zeros(1, family.param_dim), torch.zeros(1, 3)).stddev
    assert ((scale > 0.5) & (scale < 2)).all()
    with pytest.raises(ValueError, match="set model.prior: hierarchical"):
        HierarchicalFamily(2, 0)


@pytest.mark.parametrize("top_dim", [1, 2])
def test_hierarchy_in_the_seam_keeps_program_order(top_dim):
    prior, family, likelihood = Hierarchical(2, top_dim=top_dim), HierarchicalFamily(2, top_dim), Gaussian((3,))
    guide = AmortizedGuide(MLP((3,), family.param_dim, hidden=(8,)), family)
    vae = VAE(prior, likelihood, MLP((2,), likelihood.param_dim, hidden=(8,)), guide).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    log_joint = LogJoint(vae.model, vae.guide, x)
    assert [site.name for site in log_joint.sites] == ["z_top", "z"]
    assert log_joint.dim == top_dim + 2
    z, log_q = log_joint.sample_guide(4, 0)
    with torch.no_grad():
        params = guide.params(x)
        top, low = z[..., :top_dim], z[..., top_dim:]
        expected = family.top(params).log_prob(top) + family.given(params, top).log_prob(low)
    assert torch.allclose(log_q, expected, atol=1e-10)
