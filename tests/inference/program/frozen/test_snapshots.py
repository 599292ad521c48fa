"""What the log joint takes of a program as it is, and leaves as it was: modes, weights, scales, random state."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from support.cases.pairs import normal_guide, normal_model
from torch import nn

from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64
X = torch.tensor([-1.3, 0.2, 0.9, 2.5], dtype=F64)


def test_modules_of_plain_objects_are_found_and_left_as_they_were() -> None:
    class Plain:
        def __init__(self):
            self.parts = {"net": nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))}

        def __call__(self, y):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                pyro.sample("y", dist.Normal(self.parts["net"](z)[:, 0], 0.5), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y), 1), 1.0).to_event(1))

    plain = Plain()
    before = {name: value.clone() for name, value in plain.parts["net"].state_dict().items()}
    log_joint = LogJoint(plain, guide, X.float())
    assert log_joint.dtype == F64
    assert all(torch.equal(before[name], value) for name, value in plain.parts["net"].state_dict().items())
    assert plain.parts["net"].training


def test_dropout_and_batch_norm_are_in_eval_mode_inside_and_put_back() -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    net.train()

    def model(y):
        pyro.module("net", net)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(net(z), 0.5).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y[:, :1], 1.0).to_event(1))

    y = torch.randn(6, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    log_joint = LogJoint(model, guide, y)
    assert all(module.training for module in net.modules())
    assert all(
        torch.equal(before[name], value) and before[name].dtype == value.dtype for name, value in net.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in net.parameters())
    z = torch.randn(2, 6, 1, dtype=F64)
    values = log_joint(z)
    net.double().eval()
    by_hand = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(net(z.flatten(0, 1)).unflatten(0, (2, 6)), 0.5).log_prob(
        y.double()
    ).sum(-1)
    torch.testing.assert_close(values, by_hand)


def test_weights_are_a_snapshot() -> None:
    weight = torch.tensor(1.0)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(weight.clone())

        def model(self, y):
            with pyro.plate("rows", len(y)):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
                pyro.sample("y", dist.Normal(self.w * z, 0.5), obs=y)

        def guide(self, y):
            with pyro.plate("rows", len(y)):
                pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))

    pair = Pair()
    log_joint = LogJoint(pair.model, pair.guide, X.float())
    z = torch.randn(2, 4, 1, dtype=F64)
    before = log_joint(z)
    with torch.no_grad():
        pair.w.fill_(3.0)
    torch.testing.assert_close(log_joint(z), before, atol=0, rtol=0)
    assert pair.w.item() == 3.0
    _, gradient = log_joint.grad(z)  # the backward pass reads the weights as well
    torch.testing.assert_close(gradient[..., 0], -z[..., 0] + (X.float().double() - z[..., 0]) / 0.25)


def test_a_scaled_site_is_named_and_the_scale_ignored() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            with pyro.poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    log_joint = LogJoint(model, normal_guide, X)
    assert any("site 'z' has scale 0.1 where its plates give 1" in note for note in log_joint.notes)
    z = torch.randn(1, 4, 1, dtype=F64)
    expected = dist.Normal(0.0, 1.0).log_prob(z[..., 0]) + dist.Normal(z[..., 0], 0.5).log_prob(X)
    torch.testing.assert_close(log_joint(z), expected)


def test_draws_are_reproducible_and_leave_the_random_state_alone() -> None:
    log_joint = LogJoint(normal_model, normal_guide, X)
    state = torch.random.get_rng_state()
    a, log_q = log_joint.sample_guide(50, seed=3)
    b, _ = log_joint.sample_guide(50, seed=3)
    assert torch.equal(a, b)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(a, log_joint.sample_guide(50, seed=4)[0])
    assert a.unique().numel() == a.numel()
    torch.testing.assert_close(log_q, dist.Normal(0.0, 1.0).log_prob(a[..., 0]))
    prior = log_joint.sample_prior(4000, seed=0)
    assert abs(prior.mean()) < 4.5 / prior.numel() ** 0.5
    assert abs(prior.var() - 1) < 4.5 * (2 / prior.numel()) ** 0.5


def test_gradient_is_that_of_the_value() -> None:
    log_joint = LogJoint(normal_model, normal_guide, X)
    z = torch.randn(3, 4, 1, dtype=F64)
    value, gradient = log_joint.grad(z)
    torch.testing.assert_close(value, log_joint(z))
    torch.testing.assert_close(gradient[..., 0], -z[..., 0] + (X - z[..., 0]) / 0.25)
