"""The grid on posteriors that are not Gaussian: modes, kinks, tails, and what it must refuse to certify."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.vaes import mlp_vae

from elbowroom.analysis.audit.auditor import audit
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.grid.lattice import lattice as _lattice
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.networks.mlp import MLP

F64 = torch.float64


def normal_guide(y, dim=1):
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(torch.zeros(len(y), dim, dtype=F64), 1.0).to_event(1))


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
@pytest.mark.slow
def test_nonlinear_decoder_against_a_fixed_fine_grid(dim: int, seed: int) -> None:
    """A second grid: fixed, fine, not whitened, in a box that holds the prior."""
    vae = mlp_vae(dim, seed=seed).double()
    x = torch.bernoulli(torch.full((20, 12), 0.5, dtype=F64))
    log_joint = LogJoint(vae.model, vae.guide, x)
    grid = Grid()(log_joint, keep=100, seed=0)
    assert set(grid.status) == {"exact"}
    assert grid.evidence is not None
    points = {1: 40_001, 2: 701}[dim]
    z = (_lattice(points, dim, x, (0.1, 0.1)) - 0.5) * 16
    log_p = log_joint.shared(z)
    other = torch.logsumexp(log_p, 0) + dim * math.log(16 / points)
    assert ((grid.evidence.value - other).abs() <= grid.evidence.error + 1e-9).all()
    torch.testing.assert_close(grid.evidence.value, other, atol=1e-4, rtol=0)
    weight = torch.softmax(log_p, 0)
    mean = torch.einsum("gn,gd->nd", weight, z)
    torch.testing.assert_close(grid.mean, mean, atol=1e-4, rtol=0)


def test_both_modes_of_a_square_are_found() -> None:
    """x = z^2 + noise, the guide on one mode: the exact posterior is symmetric and the guide misses log 2."""
    y = torch.tensor([1.0, 4.0, 9.0], dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 2.0).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0] ** 2, 0.3), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(y.sqrt().unsqueeze(-1), (0.15 / y.sqrt()).unsqueeze(-1)).to_event(1))

    result = audit(model, guide, y)
    assert set(result.table["status"].values.flatten()) == {"exact"}
    moments = result.posteriors["grid"]["moments"]
    assert abs(moments["mean"]).max() < 1e-6
    share = (result.posteriors["grid"].posterior["z"] > 0).mean(("chain", "draw"))
    assert (abs(share - 0.5) < 4.5 * 0.5 / 1000**0.5).all()
    # importance sampling from one mode says log p(x) - log 2 with excellent diagnostics; the gap tells
    assert (result.table["gap_total"] > math.log(2) - 0.01).all()
    assert (result.table["pareto_k"] < 0.7).all()


@pytest.mark.parametrize("noise", [0.3, *(pytest.param(noise, marks=pytest.mark.slow) for noise in (0.1, 0.03))])
def test_no_mirror_mode_is_lost_and_called_exact(noise: float) -> None:
    """A decoder that is even in z0: the exact mean of z0 is 0. Narrow modes may stay uncertified, never be lost silently."""
    generator = torch.Generator().manual_seed(5)
    true_z = torch.randn(20, 2, dtype=F64, generator=generator)

    def decode(z):
        return torch.stack([z[..., 0] ** 2, z[..., 1], z[..., 0] ** 2 * z[..., 1]], -1)

    y = decode(true_z) + noise * torch.randn(20, 3, dtype=F64, generator=generator)

    def model(y, start):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decode(z), noise).to_event(1), obs=y)

    def guide(y, start):  # on one mode only
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(start, noise).to_event(1))

    start = torch.stack([true_z[:, 0].abs(), true_z[:, 1]], -1)
    grid = Grid()(LogJoint(model, guide, y, start), keep=100, seed=0)
    exact = torch.tensor([status == "exact" for status in grid.status])
    assert grid.mean is not None
    assert (grid.mean[exact, 0].abs() < 1e-4).all()
    assert exact.float().mean() >= 0.8


def test_narrow_correlated_posterior_far_outside_the_coarse_spacing() -> None:
    """Posterior sd 0.002 along one direction, correlation .999: the whitened box finds it, to the closed form."""
    A = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.9]], dtype=F64)
    noise = torch.tensor([0.002, 0.5, 0.01], dtype=F64)
    y = torch.randn(3, 2, dtype=F64) @ A.T + torch.randn(3, 3, dtype=F64) * noise

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ A.T, noise).to_event(1), obs=y)

    grid = Grid()(LogJoint(model, lambda y: normal_guide(y, 2), y), keep=100, seed=0)
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=F64), A @ A.T + torch.diag(noise**2)).log_prob(y)
    assert set(grid.status) == {"exact"}, grid.reason
    assert grid.evidence is not None
    torch.testing.assert_close(grid.evidence.value, exact, atol=1e-6, rtol=0)


def test_heavy_tails_are_carried_to_the_border() -> None:
    y = torch.tensor([0.0, 6.0, -20.0], dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Laplace(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("y", dist.Laplace(z[..., 0], 2.0), obs=y)

    grid = Grid(tolerance=1e-3)(LogJoint(model, normal_guide, y), keep=100, seed=0)
    axis = torch.linspace(-80, 80, 1_600_001, dtype=F64)
    exact = torch.stack(
        [
            torch.logsumexp(dist.Laplace(0.0, 1.0).log_prob(axis) + dist.Laplace(axis, 2.0).log_prob(v), 0) + math.log(1e-4)
            for v in y
        ]
    )
    assert grid.evidence is not None
    torch.testing.assert_close(grid.evidence.value, exact, atol=2e-3, rtol=0)


def test_relu_kinks_are_refined_until_the_tolerance_or_said_to_be_uncertified() -> None:
    vae = mlp_vae(2)
    vae.decoder = MLP((2,), 12, hidden=(16,), activation="relu")
    with torch.no_grad():
        for parameter in vae.decoder.parameters():
            parameter.mul_(4)
    x = torch.bernoulli(torch.full((12, 12), 0.5))
    log_joint = LogJoint(vae.model, vae.guide, x)
    loose = Grid(tolerance=1e-12, max_points=40)(log_joint, keep=100, seed=0)
    assert "uncertified" in loose.status
    worst = loose.status.index("uncertified")
    assert "under refinement (tolerance 1e-12)" in loose.reason[worst]
    tight = Grid(tolerance=1e-3)(log_joint, keep=100, seed=0)
    assert set(tight.status) == {"exact"}
    assert loose.evidence is not None
    assert tight.evidence is not None
    error = (loose.evidence.value - tight.evidence.value).abs()
    assert (error <= 20 * (loose.evidence.error + tight.evidence.error)).all()


def test_a_peak_that_the_coarse_grid_cannot_see_is_summed_or_not_certified() -> None:
    """A spike of prior-like mass at a place between coarse points: found by climbing from the guide, or else reported."""
    y = torch.zeros(3, dtype=F64)
    spike = torch.tensor([1.2345, -0.777], dtype=F64)

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            height = 40.0 * torch.exp(-0.5 * ((z - spike) / 2e-3).square().sum(-1))
            pyro.factor("spike", height)
            pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)

    def guide(y):
        with pyro.plate("rows", len(y)):
            pyro.sample("z", dist.Normal(spike.expand(len(y), 2), 1e-3).to_event(1))

    grid = Grid()(LogJoint(model, guide, y), keep=100, seed=0)
    # the spike's own integral, in polar coordinates: the rest of the density is flat across it
    r = torch.linspace(0, 0.03, 300_001, dtype=F64)
    extra = 2 * math.pi * torch.trapezoid(r * torch.expm1(40 * torch.exp(-0.5 * (r / 2e-3) ** 2)), r)
    here = dist.Normal(0.0, 1.0).log_prob(spike).sum() + dist.Normal(0.0, 1.0).log_prob(spike[0])
    truth = torch.logaddexp(dist.Normal(0.0, 2**0.5).log_prob(torch.zeros((), dtype=F64)), here + extra.log())
    assert grid.evidence is not None
    for status, reason, value in zip(grid.status, grid.reason, grid.evidence.value, strict=True):
        assert (abs(value - truth) < 1e-4) if status == "exact" else ("it missed a mode" in reason), reason


def test_seven_dimensions_are_refused() -> None:
    vae = mlp_vae(7)
    x = torch.bernoulli(torch.full((4, 12), 0.5))
    refusal = Grid().refusal(LogJoint(vae.model, vae.guide, x))
    assert refusal == "grid needs at most 3 latent dimensions, this model has 7"


@pytest.mark.slow
def test_blocks_give_the_same_numbers_as_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = mlp_vae(2).double()
    x = torch.bernoulli(torch.full((11, 12), 0.5, dtype=F64))
    log_joint = LogJoint(vae.model, vae.guide, x)
    whole = Grid()(log_joint, keep=100, seed=0)
    for module in ("grid", "refine"):
        monkeypatch.setattr(f"elbowroom.inference.references.grid.{module}.ARRAY", 4000)
    blocks = Grid()(log_joint, keep=100, seed=0)
    assert whole.evidence is not None
    assert blocks.evidence is not None
    torch.testing.assert_close(whole.evidence.value, blocks.evidence.value, atol=1e-8, rtol=0)
    torch.testing.assert_close(whole.mean, blocks.mean, atol=1e-7, rtol=0)
