"""Data simulated from the model: the right distribution, in the argument that held the data."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.vaes import linear_vae

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import predict, simulate


def test_simulated_data_follow_the_model() -> None:
    """A linear-Gaussian model: x has mean mu and covariance W W' + psi, and x - W z - mu has covariance psi."""
    vae, x, oracle = linear_vae(2, 5, n=4000)
    log_joint = LogJoint(vae.model, vae.guide, x)
    other, z = simulate(log_joint, seed=3)
    new = other.data()
    assert new.shape == x.shape
    assert not torch.equal(new, x)
    assert torch.equal(log_joint.data(), x)  # the original is left alone
    noise = (new - z @ oracle.W.T - oracle.mu) / oracle.psi.sqrt()
    assert (noise.mean(0).abs() < 4.5 / 4000**0.5).all()
    assert (noise.T.cov() - torch.eye(5)).abs().max() < 4.5 * (2 / 4000) ** 0.5
    assert (z.mean(0).abs() < 4.5 / 4000**0.5).all()
    torch.testing.assert_close(other.grad(z[None])[0], other(z[None]).detach())
    prior, likelihood = other.terms(z[None])
    expected = dist.Normal(z @ oracle.W.T + oracle.mu, oracle.psi.sqrt()).log_prob(new).sum(-1)
    torch.testing.assert_close(likelihood[0], expected)


def test_the_same_seed_gives_the_same_data() -> None:
    vae, x, _ = linear_vae(1, 3, n=10)
    log_joint = LogJoint(vae.model, vae.guide, x)
    first, second, third = (simulate(log_joint, seed=s)[0].data() for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_a_discrete_site_and_the_data_are_drawn_together() -> None:
    """x is near its component's mean, so z, the component and x must come from one run."""

    def model(y):
        with pyro.plate("rows", len(y)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(20 * c - 10, 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y, 0.1))

    other, z = simulate(LogJoint(model, guide, torch.full((500,), 10.0)), seed=0)
    new = other.data()
    assert (new - z[:, 0]).abs().max() < 0.6
    assert 0.4 < (new > 0).double().mean() < 0.6


def test_values_that_are_no_argument_are_refused() -> None:
    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
            pyro.sample("y", dist.Normal(z, 0.1), obs=2 * y + 1)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y, 0.1))

    with pytest.raises(UnsupportedProgram, match="site 'y' are not an argument"):
        simulate(LogJoint(model, guide, torch.linspace(0, 1, 5)), seed=0)


def test_predictions_at_given_latents_follow_the_likelihood() -> None:
    """x - W z - mu has mean 0 and covariance psi at each z, and predictions of one datum know nothing of another's z."""
    vae, x, oracle = linear_vae(2, 5, n=40)
    log_joint = LogJoint(vae.model, vae.guide, x)
    z = torch.linspace(-2, 2, 80, dtype=torch.float64).reshape(40, 2)
    new = predict(log_joint, {"z": z.expand(400, 40, 2)}, seed=1)["x"]
    assert new.shape == (400, 40, 5)
    noise = ((new - z @ oracle.W.T - oracle.mu) / oracle.psi.sqrt()).flatten(0, 1)
    assert (noise.mean(0).abs() < 4.5 / 16_000**0.5).all()
    assert (noise.T.cov() - torch.eye(5)).abs().max() < 4.5 * (2 / 16_000) ** 0.5


def test_an_inner_plate_and_a_discrete_site_are_put_where_the_program_has_them() -> None:
    def model(y):
        with pyro.plate("rows", len(y), dim=-1):
            c = pyro.sample("c", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})
            with pyro.plate("inner", 2, dim=-2):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(torch.stack([c + z[0], 10 * z[1]], -1), 0.01).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y), dim=-1), pyro.plate("inner", 2, dim=-2):
            pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))

    log_joint = LogJoint(model, guide, torch.zeros(4, 2))
    z, c = torch.arange(8.0).reshape(1, 4, 2), torch.tensor([[0, 1, 2, 0]])
    new = predict(log_joint, {"z": z, "c": c}, seed=0)["y"][0]
    torch.testing.assert_close(new, torch.stack([c[0] + z[0, :, 0], 10 * z[0, :, 1]], -1).double(), atol=0.06, rtol=0)
    with pytest.raises(UnsupportedProgram, match="no values of site 'c'"):
        predict(log_joint, {"z": z}, seed=0)


def test_what_is_missing_in_the_data_is_missing_in_simulated_ones() -> None:
    vae, x, _ = linear_vae(2, 5, n=30)
    x[::3, 1] = torch.nan
    log_joint = LogJoint(vae.model, vae.guide, x)
    other, z = simulate(log_joint, seed=2)
    assert torch.equal(other.data().isnan(), x.isnan())
    assert torch.equal(predict(log_joint, {"z": z[None]}, seed=0)["x"][0].isnan(), x.isnan())
    assert bool(other(z[None]).isfinite().all())


def test_columns_that_the_density_broadcasts_over_are_drawn_one_by_one() -> None:
    """One column of means under three of data: the density is that of three independent values, and so are the draws."""

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(z[:, None], 2.0).to_event(1), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y.mean(1) / 2, 0.7))

    log_joint = LogJoint(model, guide, torch.zeros(4000, 3))
    new, z = simulate(log_joint, seed=1)
    again = predict(log_joint, {"z": z[None, :, 0]}, seed=2)["y"][0]
    for y in (new.data(), again):
        assert y.shape == (4000, 3)
        off = (y - z) / 2
        assert (off.T.cov() - torch.eye(3)).abs().max() < 4.5 * (2 / 4000) ** 0.5
