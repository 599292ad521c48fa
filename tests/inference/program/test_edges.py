"""Latents next to the edge of their support: densities and draws in unconstrained coordinates, and what is said of rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import AffineTransform, SigmoidTransform, StickBreakingTransform, biject_to

from elbowroom.inference.program.densities.edges import LogStickBreaking, bijection, density, draw
from elbowroom.inference.program.sites import support_of
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.hmc.hmc import HMC
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.references.importance.importance import ImportanceSampling
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.inference.target.simulate import simulate

F64 = torch.float64


def f64(*values: float) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=F64)


def normal(*shape: int) -> dist.Normal:
    return dist.Normal(torch.full(shape, 0.3, dtype=F64), f64(0.8))


FAMILIES = {
    "beta": lambda: dist.Beta(f64(0.4, 2.0), f64(1.0, 0.3)),
    "beta, event": lambda: dist.Beta(f64(0.4, 2.0), f64(1.0, 0.3)).to_event(1),
    "kumaraswamy": lambda: dist.Kumaraswamy(f64(0.4, 2.0), f64(1.5, 0.3)),
    "gamma": lambda: dist.Gamma(f64(0.4, 2.0), f64(1.0, 3.0)),
    "dirichlet": lambda: dist.Dirichlet(f64(0.4, 2.0, 0.7)),
    "dirichlets": lambda: dist.Dirichlet(torch.rand(2, 4, dtype=F64) + 0.1).to_event(1),
    "logit-normal": lambda: dist.TransformedDistribution(normal(2), [SigmoidTransform()]).to_event(1),
    "moved logit-normal": lambda: dist.TransformedDistribution(normal(2), [AffineTransform(1.0, 2.0), SigmoidTransform()]),
    "logistic normal": lambda: dist.TransformedDistribution(normal(3).to_event(1), [StickBreakingTransform()]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_density_is_that_of_the_value_with_its_jacobian(name: str) -> None:
    torch.manual_seed(0)
    fn = FAMILIES[name]()
    to, torchs = bijection(support_of(fn)), biject_to(support_of(fn))
    u = to.inv(fn.sample(torch.Size((50,))))
    value = torchs(u)
    det = torchs.log_abs_det_jacobian(u, value)
    expected = fn.log_prob(value) + det.reshape(50, *fn.batch_shape, -1).sum(-1)
    found = density(fn, to, u)
    assert found is not None
    inside = u.abs().reshape(50, *fn.batch_shape, -1).amax(-1) < 12  # farther out the value has lost digits
    assert inside.double().mean() > 0.5
    torch.testing.assert_close(found[inside], expected[inside], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("fn", [dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), dist.HalfNormal(1.0), dist.Uniform(0.0, 1.0)])
def test_other_families_are_left_as_they_were(fn: Any) -> None:
    to = bijection(support_of(fn))
    assert density(fn, to, torch.zeros(())) is None
    assert draw(fn, to) is None


SPARSE = {
    "beta": lambda a: dist.Beta(a, 2 * a),
    "kumaraswamy": lambda a: dist.Kumaraswamy(a, 2 * a),
    "gamma": lambda a: dist.Gamma(a, torch.ones_like(a)),
    "dirichlet": lambda a: dist.Dirichlet(torch.stack([a, 2 * a])),
}


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("alpha", [0.02, 0.3])
def test_sparse_densities_integrate_to_one_and_draws_follow_them(name: str, alpha: float) -> None:
    """Most of the mass lies where the values round to 0 or 1."""
    torch.manual_seed(1)
    for dtype in (F64, torch.float32):
        fn = SPARSE[name](torch.tensor(alpha, dtype=dtype))
        to = bijection(support_of(fn))
        u = torch.linspace(-40 / alpha, 40 / alpha, 400_001, dtype=dtype)
        column = u[:, None] if name == "dirichlet" else u
        log_p = density(fn, to, column)
        assert log_p is not None
        weight = log_p.double().nan_to_num(-torch.inf).exp() * (80 / alpha / 400_000)
        assert abs(float(weight.sum()) - 1) < 2e-3
        drawn = draw(fn, to, torch.Size((40_000,)))
        assert drawn is not None
        assert drawn.dtype == dtype
        mean = (weight * u.double()).sum() / weight.sum()
        sd = ((weight * (u.double() - mean).square()).sum() / weight.sum()).sqrt()
        assert abs(float(drawn.double().mean() - mean)) < 4.5 * float(sd) / 200
        assert abs(float(drawn.double().std() / sd) - 1) < 0.05


def test_sticks_are_broken_without_loss() -> None:
    torch.manual_seed(2)
    u = 60 * torch.randn(500, 4, dtype=F64)
    u = u[(u.abs().sum(-1) < 300)]
    ours, theirs = LogStickBreaking(), StickBreakingTransform()
    value = ours(u)
    torch.testing.assert_close(value.sum(-1), torch.ones(len(u), dtype=F64))
    torch.testing.assert_close(ours.log(u).exp(), value)
    torch.testing.assert_close(value, theirs(u), rtol=0, atol=1e-14)
    near = torch.randn(100, 4, dtype=F64)
    torch.testing.assert_close(ours.inv(ours(near)), near)
    torch.testing.assert_close(ours.log_abs_det_jacobian(near, ours(near)), theirs.log_abs_det_jacobian(near, theirs(near)))
    low = -70 * torch.rand(100, 4, dtype=F64)  # each stick takes almost nothing: torch's own map keeps 36 of it
    torch.testing.assert_close(ours.inv(ours(low)), low)
    high = f64(0.0, 200.0, 5.0)  # the last two parts are e-87 of the whole
    torch.testing.assert_close(ours.inv(ours(high)), high)


# -- programs -----------------------------------------------------------------------------------------------------------------


class Own(dist.Beta):
    """A family that the tool does not know: its density can only be had from the value."""


def pair(prior: Callable[[], Any], likelihood: Callable[[Tensor], Any]) -> tuple[Callable[..., None], Callable[..., None]]:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("share", prior())
            pyro.sample("x", likelihood(z), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("share", prior())

    return model, guide


X = torch.full((3,), -1.0, dtype=F64)
SENSITIVE = {
    "a logarithm of the distance to the edge": pair(
        lambda: dist.Beta(f64(0.1), f64(0.1)), lambda z: dist.Normal(0.02 * torch.log1p(-z), f64(1.0))
    ),
    "a family of the user's": pair(lambda: Own(f64(0.1), f64(0.1)), lambda z: dist.Normal(0.1 * z, f64(1.0))),
}
INSENSITIVE = {
    "beta": pair(lambda: dist.Beta(f64(0.1), f64(0.1)), lambda z: dist.Normal(z, f64(1.0))),
    "kumaraswamy": pair(lambda: dist.Kumaraswamy(f64(0.1), f64(0.1)), lambda z: dist.Normal(z, f64(1.0))),
    "uniform": pair(lambda: dist.Uniform(f64(2.0), f64(3.0)), lambda z: dist.Normal(z, f64(1.0))),
    "half-normal": pair(lambda: dist.HalfNormal(f64(1.0)), lambda z: dist.Normal(z, f64(1.0))),
}


@pytest.mark.parametrize("name", SENSITIVE)
def test_where_rounding_matters_nothing_is_certified_and_the_site_is_named(name: str) -> None:
    log_joint = LogJoint(*SENSITIVE[name], X)
    guide = amortized(log_joint, draws=4000, keep=400, seed=0)
    assert not guide.stats["importance_trusted"].any()
    for posterior in (Grid()(log_joint, keep=2000, seed=0), ImportanceSampling()(log_joint, keep=400, seed=0), guide):
        assert not posterior.trusted.any()
        for reason in posterior.reason:
            assert "of the mass lies where 'share' rounds to the edge of its support" in reason
            assert "a larger concentration" in reason


@pytest.mark.slow
@pytest.mark.parametrize("name", SENSITIVE)
def test_chains_are_not_certified_where_rounding_matters(name: str) -> None:
    assert not HMC(tempering=False)(LogJoint(*SENSITIVE[name], X), keep=2000, seed=0).trusted.any()


def test_in_single_precision_the_cure_is_double() -> None:
    single = lambda value: torch.tensor(value, dtype=torch.float32)
    programs = pair(lambda: dist.Beta(single(0.1), single(0.1)), lambda z: dist.Normal(0.02 * torch.log1p(-z), single(1.0)))
    guide = amortized(LogJoint(*programs, X.float(), dtype=None), draws=2000, keep=400, seed=0)
    assert all("compute in float64" in reason for reason in guide.reason)


@pytest.mark.parametrize("name", INSENSITIVE)
def test_where_rounding_does_not_matter_nothing_is_said(name: str) -> None:
    """Beta and Kumaraswamy have 1 to 2 % of their mass beyond the last number below 1."""
    log_joint = LogJoint(*INSENSITIVE[name], X)
    guide = amortized(log_joint, draws=4000, keep=400, seed=0)
    assert (guide.stats["rounded_share"] == 0).all()
    exact = Grid(tolerance=1e-3)(log_joint, keep=400, seed=0)
    assert exact.trusted.all()
    assert exact.evidence is not None
    assert guide.evidence is not None
    assert ((guide.evidence.value - exact.evidence.value).abs() < 4.5 * guide.evidence.error).all()


def test_evidence_under_a_sparse_kumaraswamy_is_that_of_its_quantiles() -> None:
    """Its own log density is NaN at the edge, where it has 2 % of the mass: the grid lost it and called itself exact."""
    exact = Grid(tolerance=1e-3)(LogJoint(*INSENSITIVE["kumaraswamy"], X), keep=400, seed=0)
    v = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000
    z = (1 - (1 - v) ** 10) ** 10
    truth = torch.logsumexp(-0.5 * (-1 - z).square() - 0.5 * math.log(2 * math.pi), 0) - math.log(200_000)
    assert exact.evidence is not None
    torch.testing.assert_close(exact.evidence.value, truth.expand(3), rtol=0, atol=1e-3)


def test_simulated_latents_keep_their_coordinates() -> None:
    """Rounded values gave 36.04 to all beyond: not draws of the prior."""
    log_joint = LogJoint(*INSENSITIVE["beta"], torch.zeros(2000, dtype=F64))
    _, z = simulate(log_joint, 3)
    assert float(z.max()) > 45
    assert len(z.unique()) == 2000
