"""Heavy tails: log p(x) of stable laws in closed form, exact in one to three latents, and draws with the right quantiles."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from elbowroom.inference.posterior import Posterior
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.target.log_joint import LogJoint

F64 = torch.float64


def cauchy(d: int, noise: float, y: Tensor) -> tuple[LogJoint, Tensor]:
    """z_j ~ Cauchy(0, 1), y_j ~ Cauchy(z_j, noise): y_j ~ Cauchy(0, 1 + noise), and two modes where y is large."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Cauchy(torch.zeros(d, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Cauchy(z, noise).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y / 2, 1.0).to_event(1))

    return LogJoint(model, guide, y), dist.Cauchy(0 * y, 1 + noise).log_prob(y).sum(-1)


def students(d: int, df: float, n: int) -> tuple[LogJoint, Tensor]:
    """A prior t(df) in each latent and data that say next to nothing: the posterior is the prior, of any tail."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.StudentT(df, torch.zeros(d, dtype=F64), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(0 * z, 1.0).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(0 * y, 2.0).to_event(1))

    y = torch.linspace(-1, 1, n * d, dtype=F64).reshape(n, d)
    return LogJoint(model, guide, y), dist.Normal(0 * y, 1.0).log_prob(y).sum(-1)


def held(grid: Posterior, truth: Tensor) -> float:
    """Assert that what is exact is within its stated error; return the share that is."""
    exact = torch.tensor([status == "exact" for status in grid.status])
    assert grid.evidence is not None
    assert ((grid.evidence.value - truth).abs() <= grid.evidence.error)[exact].all()
    return float(exact.double().mean())


@pytest.mark.parametrize(("d", "noise", "y"), [(1, 0.05, 30.0), (1, 1.0, 30.0), (2, 0.05, 1.0), (2, 1.0, 3.0), (3, 1.0, 1.0)])
def test_a_cauchy_seen_through_a_cauchy(d: int, noise: float, y: float) -> None:
    log_joint, truth = cauchy(d, noise, torch.tensor([0.0, y], dtype=F64)[:, None].expand(-1, d).contiguous())
    assert held(Grid()(log_joint, keep=200, seed=0), truth) == 1.0


@pytest.mark.parametrize(("d", "df"), [(1, 0.7), (1, 2.0), (2, 1.0), (2, 3.0), (3, 2.0)])
def test_tails_of_every_power(d: int, df: float) -> None:
    log_joint, truth = students(d, df, 2)
    grid = Grid()(log_joint, keep=4000, seed=0)
    assert held(grid, truth) == 1.0
    drawn = grid.draws[..., 0, :].flatten(0, 1) / 2  # of the first datum, in scales of the prior
    below = (drawn < -2).double().mean(0)
    expected = float(stats.t(df).cdf(-2))
    assert (below - expected).abs().max() < 4.5 * (expected * (1 - expected) / 4000) ** 0.5
