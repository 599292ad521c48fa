"""The refitted normal: against closed forms, grids and mixtures whose best normal is known, and where it must not fail."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from support.cases.vaes import linear_vae, mlp_vae
from support.problems.catalogue import PROBLEMS
from torch import Tensor

from elbowroom.inference.mcmc.normals import Normals, Refit
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.search import best_normal as module
from elbowroom.inference.search.best_normal import refit
from elbowroom.inference.search.noise import matched_noise
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.linear_gaussian import LinearGaussian
from elbowroom.models.vae import VAE

F64 = torch.float64


def correlated(rho: float, n: int = 20, seed: int = 0) -> tuple[LogJoint, LinearGaussian, Tensor]:
    """A linear VAE whose posterior has two latents of correlation rho, and an untrained encoder far from it."""
    vae, _, oracle = linear_vae(2, 2, n=n, seed=seed)
    precision = 200 * torch.tensor([[1.0, -rho], [-rho, 1.0]], dtype=F64)
    with torch.no_grad():
        root = torch.linalg.cholesky(precision - torch.eye(2, dtype=F64))
        vae.decoder.body.weight.copy_(root.T * 0.5)  # psi = .25
    oracle = vae.linear_gaussian()
    x = oracle.sample(n, torch.Generator().manual_seed(seed))[1]
    return LogJoint(vae.model, vae.guide, x), oracle, x


def lost(found: Refit, oracle: LinearGaussian, x: Tensor) -> Tensor:
    """Nats below the best member of the family, by the closed form."""
    best = oracle.diagonal_gap() if found.family == "diagonal" else 0.0
    return oracle.kl(found.q.loc, found.q.covariance, x) - best


def bernoulli(dim: int, width: int, n: int, seed: int) -> tuple[VAE, LogJoint]:
    vae = mlp_vae(dim, width, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        logits = vae.decoder.body(torch.randn(n, dim, generator=generator))
        x = torch.bernoulli(torch.sigmoid(logits), generator=generator)
    return vae, LogJoint(vae.model, vae.guide, x)


def elbo_of_guide(joint: LogJoint, draws: int = 400) -> tuple[Tensor, Tensor]:
    z, log_q = joint.sample_guide(draws, 91)
    weight = joint(z) - log_q
    return weight.mean(0), weight.std(0) / math.sqrt(draws)


# -- closed forms --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["diagonal", "full"])
@pytest.mark.parametrize(("dim", "width"), [(1, 3), (2, 5), (5, 10), (20, 40)])
def test_linear_gaussian_reaches_the_best_of_its_family(dim: int, width: int, family: Any) -> None:
    vae, x, oracle = linear_vae(dim, width, n=20, seed=dim)
    joint = LogJoint(vae.model, vae.guide, x)
    found = refit(joint, family=family, seed=3)
    assert lost(found, oracle, x).abs().max() < (1e-6 if family == "full" else 0.01)
    assert found.converged.all()
    truth = oracle.log_evidence(x) - oracle.kl(found.q.loc, found.q.covariance, x)
    torch.testing.assert_close(found.elbo, truth, rtol=0, atol=1e-9)  # the control variate leaves no noise on a quadratic
    off_diagonal = found.q.root - torch.diag_embed(found.q.root.diagonal(dim1=-2, dim2=-1))
    assert (off_diagonal == 0).all() == (family == "diagonal" or dim == 1)


@pytest.mark.parametrize("rho", [0.5, 0.9, 0.95, 0.99])
def test_correlation_costs_the_diagonal_family_nothing_beyond_its_gap(rho: float) -> None:
    joint, oracle, x = correlated(rho)
    assert oracle.diagonal_gap().item() == pytest.approx(-0.5 * math.log(1 - rho**2), rel=1e-6)
    assert lost(refit(joint, family="diagonal"), oracle, x).abs().max() < 0.01
    assert lost(refit(joint, family="full"), oracle, x).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["diagonal", "full"])
@pytest.mark.parametrize("rho", [0.5, 0.9, 0.95, 0.99])
def test_shortfall_is_honest_when_stopped_early(rho: float, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far from the optimum it stops, the stated remainder is the true one; the gradient alone would understate it."""
    joint, oracle, x = correlated(rho)
    monkeypatch.setattr(module, "ARMIJO", 0.0)
    step = module._Search._step
    monkeypatch.setattr(module._Search, "_step", lambda self, at, size: step(self, at, 0.2 * size))  # Newton would be there
    seen = []
    for iterations in (0, 1, 2, 3):
        found = refit(joint, family=family, max_iterations=iterations, starts=iterations % 2)
        true = lost(found, oracle, x)
        decrement = found.shortfall / module.SAFETY
        assert (true <= 1.01 * decrement + 1e-6).all()
        assert (decrement <= 1.01 * true + 1e-3).all()
        assert not found.converged[true > 0.021].any()
        seen.append(true)
    assert torch.cat(seen).max() > 10  # it did stop early
    assert ((torch.cat(seen) > 0.05) & (torch.cat(seen) < 10)).any()


@pytest.mark.slow
def test_fifty_latents() -> None:
    """Plain draws lose .43 nats here (STATISTICS.md, section 3), matched ones nothing."""
    vae, x, oracle = linear_vae(50, 100, n=10)
    joint = LogJoint(vae.model, vae.guide, x)
    assert lost(refit(joint, family="diagonal"), oracle, x).abs().max() < 0.01
    assert lost(refit(joint, family="full"), oracle, x).abs().max() < 1e-6


def test_noise_is_matched() -> None:
    for n_draws, dim in ((8, 1), (8, 4), (200, 20)):
        noise = matched_noise(n_draws, dim, torch.Generator().manual_seed(1))
        assert noise.shape == (n_draws, dim)
        torch.testing.assert_close(noise.mT @ noise / n_draws, torch.eye(dim, dtype=F64), rtol=0, atol=1e-12)
        assert noise.mean(0).abs().max() < 1e-14
    other = matched_noise(200, 20, torch.Generator().manual_seed(2))
    assert (noise - other).abs().max() > 0.1


# -- posteriors that are not normal --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.slow
def test_between_the_guide_and_the_evidence(seed: int) -> None:
    joint = bernoulli(2, 16, 40, seed)[1]
    grid = Grid()(joint, keep=4, seed=0)
    assert grid.evidence is not None
    assert grid.trusted.double().mean() > 0.9
    guide, guide_error = elbo_of_guide(joint)
    diagonal = refit(joint, family="diagonal", seed=seed)
    full = refit(joint, family="full", also=[diagonal.q], seed=seed)
    for found in (diagonal, full):
        assert (found.elbo >= guide - 4.5 * (guide_error.square() + found.elbo_se.square()).sqrt()).all()
        assert (found.elbo <= grid.evidence.value + grid.evidence.error + 4.5 * found.elbo_se)[grid.trusted].all()
        assert found.converged.all()
    error = (diagonal.elbo_se.square() + full.elbo_se.square()).sqrt()
    assert (full.elbo >= diagonal.elbo - full.shortfall - 4.5 * error).all()
    assert (full.elbo - diagonal.elbo).mean() > 0.01
    gap = grid.evidence.value - full.elbo
    assert 0 < gap[grid.trusted].mean() < 0.3


def test_shortfall_covers_what_ten_times_the_work_gains() -> None:
    joint = bernoulli(2, 16, 40, 3)[1]
    noise = matched_noise(4000, 2, torch.Generator().manual_seed(9))

    def value(q: Normals) -> Tensor:
        return joint(q.loc + torch.einsum("sj,nij->sni", noise, q.root)).mean(0) + q.entropy

    for family in ("diagonal", "full"):
        found = refit(joint, family=family, draws=16, tolerance=10.0, starts=0)
        better = refit(joint, family=family, draws=640, tolerance=1e-3, starts=0, also=[found.q])
        gained = value(better.q) - value(found.q)
        assert (gained <= 1.5 * found.shortfall + 0.005).all()
        assert found.shortfall.max() > 0.05  # sixteen draws cost something, and it says so


def test_more_latents_nonlinear() -> None:
    joint = bernoulli(10, 40, 12, 0)[1]
    guide, guide_error = elbo_of_guide(joint)
    diagonal = refit(joint, family="diagonal")
    full = refit(joint, family="full", also=[diagonal.q])
    assert (diagonal.elbo > guide - 4.5 * guide_error).all()
    assert full.converged.all()
    error = (diagonal.elbo_se.square() + full.elbo_se.square()).sqrt()
    assert (full.elbo >= diagonal.elbo - full.shortfall - 4.5 * error).all()


@pytest.mark.parametrize("name", ["positive", "simplex_d2", "hierarchy", "funnel", "heavy_tails_d2", "square_idle", "discrete"])
def test_catalogue(name: str) -> None:
    problem = PROBLEMS[name](30, 1)
    guide, guide_error = elbo_of_guide(problem.log_joint)
    found = refit(problem.log_joint, seed=2)
    assert found.converged.double().mean() > 0.9
    assert (found.elbo <= problem.evidence + problem.error + 4.5 * found.elbo_se + 1e-6).all()
    assert (found.elbo >= guide - 4.5 * (guide_error.square() + found.elbo_se.square()).sqrt() - 1e-6).all()


def test_sits_on_the_heavier_of_two_modes() -> None:
    problem = PROBLEMS["bimodal_unequal_d2"](60, 0)
    found = refit(problem.log_joint)
    mode = problem.mode_of(found.q.loc[None])[0]
    mass = problem.masses.gather(1, mode[:, None])[:, 0]
    unequal = problem.masses.amax(-1) > 0.52
    assert unequal.sum() > 20
    assert (mass == problem.masses.amax(-1))[unequal].all()
    assert (problem.evidence - found.elbo + mass.log()).abs().max() < 0.1  # the other mode's share is what is missing


def test_prior_starts_find_the_mode_that_the_encoder_misses() -> None:
    """80 % of the mass at 3, 20 % at -3, and a guide that knows the lighter mode only."""
    x = torch.zeros(30, dtype=F64)

    def model(x: Tensor) -> None:
        mixture = dist.MixtureSameFamily(
            dist.Categorical(torch.tensor([0.8, 0.2], dtype=F64)),
            dist.Normal(torch.tensor([3.0, -3.0], dtype=F64), torch.tensor(0.5, dtype=F64)),
        )
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", mixture)
            pyro.sample("x", dist.Normal(0.0 * z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(-3.0 + 0 * x, 0.5))

    joint = LogJoint(model, guide, x)
    base = -0.5 * math.log(2 * math.pi)
    alone, three = refit(joint, starts=0), refit(joint, starts=6)
    torch.testing.assert_close(alone.elbo, torch.full_like(alone.elbo, base + math.log(0.2)), rtol=0, atol=1e-3)
    assert (alone.start == 0).all()
    assert alone.converged.all()  # converged where it is: the shortfall is local
    torch.testing.assert_close(three.elbo, torch.full_like(three.elbo, base + math.log(0.8)), rtol=0, atol=1e-3)
    assert (three.start > 0).all()


# -- what must not fail --------------------------------------------------------------------------------------------------------


def spoiled(x: Tensor, scale: float = 0.1) -> LogJoint:
    """x = z + noise; log p is NaN for the first datum away from its guide, and -inf for the second below zero."""

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            first, second = torch.arange(len(x)) == 0, torch.arange(len(x)) == 1
            bad = torch.where(first & ((z - x).abs() > 0.7), torch.nan, 0.0)
            hard = torch.where(second & (z < 0), -torch.inf, 0.0)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.factor("trouble", bad + hard)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(x, scale))

    return LogJoint(model, guide, x)


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_one_datum_does_not_spoil_another(family: Any) -> None:
    x = torch.linspace(1.0, 2.0, 8, dtype=F64)
    found = refit(spoiled(x), family=family)
    torch.testing.assert_close(found.q.loc[2:, 0], x[2:] / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.q.covariance[2:, 0, 0], torch.full_like(x[2:], 0.5), rtol=0, atol=1e-6)
    assert found.converged[2:].all()
    for value in (found.q.loc, found.q.root, found.elbo_se, found.shortfall):
        assert not value.isnan().any()
    assert found.q.root.isfinite().all()
    assert (found.q.root[:, 0, 0] > 0).all()
    # a normal reaches where log p is not finite: either it is so narrow that no draw did, or it says so
    said = (found.elbo == -torch.inf) & ~found.converged & (found.shortfall == torch.inf)
    assert (said | found.elbo.isfinite()).all()


def test_a_score_that_is_not_finite_is_not_called_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search met no such draw, the score did."""
    x = torch.linspace(1.0, 2.0, 6, dtype=F64)
    value = LogJoint.__call__
    mine = (torch.arange(6) == 4) & (torch.arange(66)[:, None] == 40)  # 66 draws: the score alone has so many

    def scored(self: LogJoint, z: Tensor) -> Tensor:
        return value(self, z).masked_fill(mine, -torch.inf) if z.shape[:2] == mine.shape else value(self, z)

    joint = spoiled(x)
    monkeypatch.setattr(LogJoint, "__call__", scored)
    found = refit(joint, score_draws=66)
    assert found.elbo[4] == -torch.inf
    assert found.shortfall[4] == torch.inf
    assert not found.converged[4]
    assert found.converged[[2, 3, 5]].all()


@pytest.mark.parametrize("family", [pytest.param("diagonal", marks=pytest.mark.slow), "full"])
def test_gradients_that_are_not_finite(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite log p with a NaN gradient (torch.where over a square root) moves nothing, and nothing is claimed."""
    x = torch.linspace(1.0, 2.0, 6, dtype=F64)
    grad = LogJoint.grad

    def partly(self: LogJoint, z: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = grad(self, z)
        return value, gradient.masked_fill((self.args[0] == x[3])[:, None], torch.nan)

    monkeypatch.setattr(LogJoint, "grad", partly)
    found = refit(spoiled(x), family=family, max_iterations=12)  # the spoiled program runs one draw at a time
    assert found.shortfall[3] == torch.inf
    assert not found.converged[3]
    assert abs(found.q.loc[3, 0] - x[3]) < 0.1
    assert found.q.root.isfinite().all()
    assert found.converged[4:].all()


def test_falls_back_to_the_encoder_where_nothing_is_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.linspace(1.0, 2.0, 6, dtype=F64)
    joint = spoiled(x)
    value, grad = LogJoint.__call__, LogJoint.grad

    def hopeless(joint: LogJoint, log_p: Tensor) -> Tensor:
        mine = joint.args[0] == x[3]
        return log_p.masked_fill(mine, torch.nan)

    monkeypatch.setattr(LogJoint, "__call__", lambda self, z: hopeless(self, value(self, z)))
    monkeypatch.setattr(LogJoint, "grad", lambda self, z: (hopeless(self, grad(self, z)[0]), grad(self, z)[1]))
    found = refit(joint)
    assert found.elbo[3] == -torch.inf
    assert found.shortfall[3] == found.elbo_se[3] == torch.inf
    assert not found.converged[3]
    assert found.start[3] == 0
    assert abs(found.q.loc[3, 0] - x[3]) < 0.1
    assert 0.05 < found.q.root[3, 0, 0] < 0.2
    assert found.converged[4:].all()


@pytest.mark.parametrize(("loc", "scale"), [(200.0, 1e-3), (-50.0, 1e3), (0.0, 1e-9)])
def test_guides_far_off(loc: float, scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.full((10,), 4.0, dtype=F64), g)

    def model(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(2 * z[..., 0], 0.5), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            pyro.sample("z", dist.Normal(torch.full((2,), loc, dtype=F64), scale).to_event(1))

    found = refit(LogJoint(model, guide, x), starts=0)
    mean = 2 * x / 0.25 / 17
    torch.testing.assert_close(found.q.loc, torch.stack([mean, 0 * mean], -1), rtol=0, atol=1e-5)
    variances = torch.tensor([1 / 17, 1.0], dtype=F64)  # the second latent is idle
    torch.testing.assert_close(found.q.covariance, torch.diag(variances).expand(10, 2, 2), rtol=0, atol=1e-5)


def test_single_precision() -> None:
    vae, x, oracle = linear_vae(2, 5, n=20)
    joint = LogJoint(vae.float().model, vae.guide, x.float(), dtype=None)
    found = refit(joint)
    assert found.q.loc.dtype == F64
    assert found.converged.all()
    assert lost(found, oracle, x).abs().max() < 1e-3


# -- options and layouts -------------------------------------------------------------------------------------------------------


def test_seeds() -> None:
    joint = bernoulli(2, 16, 20, 0)[1]
    one, again, other = refit(joint, seed=1), refit(joint, seed=1), refit(joint, seed=2)
    assert torch.equal(one.elbo, again.elbo)
    assert torch.equal(one.q.root, again.q.root)
    assert not torch.equal(one.elbo, other.elbo)
    error = (one.elbo_se.square() + other.elbo_se.square()).sqrt()
    assert ((one.elbo - other.elbo).abs() < 4.5 * error + one.shortfall + other.shortfall).all()


def test_programs_that_cannot_be_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    joint = bernoulli(2, 16, 20, 0)[1]
    usual = refit(joint)
    monkeypatch.setattr(LogJoint, "separable", lambda self: False)
    whole = refit(joint)
    torch.testing.assert_close(whole.q.loc, usual.q.loc, rtol=0, atol=1e-8)
    torch.testing.assert_close(whole.elbo, usual.elbo, rtol=0, atol=1e-8)
    monkeypatch.setattr(module, "LARGE_ARRAY", 64)  # blocks of data cannot be had either
    torch.testing.assert_close(refit(joint).elbo, usual.elbo, rtol=0, atol=1e-8)


def test_blocks_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    joint, oracle, x = correlated(0.8)
    first = refit(joint, family="diagonal")
    monkeypatch.setattr(module, "LARGE_ARRAY", 200)
    found = refit(joint, also=[first.q])
    assert found.q.loc.shape == (20, 2)
    assert found.start.shape == (20,)
    assert lost(found, oracle, x).abs().max() < 1e-6


def test_refusals() -> None:
    joint = correlated(0.5)[0]
    with pytest.raises(ValueError, match="family"):
        refit(joint, family="banded")  # type: ignore[arg-type]
