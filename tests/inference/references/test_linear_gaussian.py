"""Every method against the closed form of the linear-Gaussian VAE."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.cases.vaes import linear_vae, set_guide
from torch import Tensor

from elbowroom.analysis.audit.auditor import audit
from elbowroom.inference.references.closed_form import ClosedForm
from elbowroom.inference.references.grid.grid import Grid
from elbowroom.inference.references.importance.guide import amortized
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.guides.normal import DiagonalNormal, FullRankNormal
from elbowroom.models.linear_gaussian import LinearGaussian


def joint_normal(oracle: LinearGaussian) -> torch.distributions.MultivariateNormal:
    """The marginal of x, built from its covariance and not from M: an independent route to log p(x)."""
    covariance = oracle.W @ oracle.W.T + torch.diag(oracle.psi)
    return torch.distributions.MultivariateNormal(oracle.mu, covariance)


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_evidence_and_posterior_agree_with_the_joint_normal(dim: int) -> None:
    _, x, oracle = linear_vae(dim, 8)
    torch.testing.assert_close(oracle.log_evidence(x), joint_normal(oracle).log_prob(x), atol=1e-10, rtol=0)
    marginal = torch.linalg.inv(oracle.W @ oracle.W.T + torch.diag(oracle.psi))
    mean, covariance = oracle.posterior(x)
    torch.testing.assert_close(mean, (x - oracle.mu) @ marginal @ oracle.W, atol=1e-10, rtol=0)
    expected = torch.eye(dim, dtype=x.dtype) - oracle.W.T @ marginal @ oracle.W
    torch.testing.assert_close(covariance, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dim", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_grid_agrees_with_the_closed_form(dim: int) -> None:
    vae, x, oracle = linear_vae(dim, 8)
    log_joint = LogJoint(vae.model, vae.guide, x)
    grid = Grid()(log_joint, keep=400, seed=0)
    mean, covariance = oracle.posterior(x)
    assert set(grid.status) == {"exact"}
    assert grid.evidence is not None
    torch.testing.assert_close(grid.evidence.value, oracle.log_evidence(x), atol=1e-6, rtol=0)
    torch.testing.assert_close(grid.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(grid.covariance, covariance.expand_as(grid.covariance), atol=1e-6, rtol=0)
    z_scores = (grid.draws.flatten(0, 1).mean(0) - mean) / (covariance.diagonal().sqrt() / 400**0.5)
    assert z_scores.abs().max() < 4.5


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_best_diagonal_guide_has_the_closed_form_gap(dim: int) -> None:
    vae, x, oracle = linear_vae(dim, 8, family=DiagonalNormal)
    set_guide(vae, oracle)
    q = vae.posterior(x)
    kl = oracle.kl(q.mean, torch.diag_embed(q.variance), x)
    torch.testing.assert_close(kl, oracle.diagonal_gap().expand_as(kl), atol=1e-8, rtol=0)
    guide = amortized(LogJoint(vae.model, vae.guide, x), draws=4000, keep=100, seed=1)
    error = oracle.log_evidence(x) - guide.stats["elbo"] - kl
    # one dimension: the best diagonal normal is the posterior, and the error is rounding
    assert (error.abs() < 4.5 * guide.stats["elbo_se"] + 1e-8).all()


def test_no_diagonal_normal_beats_the_best_one() -> None:
    _, x, oracle = linear_vae(3, 8)
    mean, variance = oracle.best_diagonal(x)
    best = oracle.kl(mean, torch.diag(variance), x)
    for factor in (0.9, 1.1):
        assert (oracle.kl(mean, torch.diag(factor * variance), x) > best + 1e-4).all()
    assert (oracle.kl(mean + 0.05, torch.diag(variance), x) > best + 1e-4).all()


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_guide_equal_to_the_posterior_has_constant_weights(dim: int) -> None:
    """With q = p every log weight is log p(x): zero variance, no Monte Carlo error."""
    vae, x, oracle = linear_vae(dim, 8, family=FullRankNormal)
    set_guide(vae, oracle)
    guide = amortized(LogJoint(vae.model, vae.guide, x), draws=200, keep=100, seed=0)
    torch.testing.assert_close(guide.stats["elbo"], oracle.log_evidence(x), atol=1e-8, rtol=0)
    assert guide.stats["elbo_se"].max() < 1e-8
    assert guide.evidence is not None
    torch.testing.assert_close(guide.evidence.value, oracle.log_evidence(x), atol=1e-8, rtol=0)


def test_closed_form_reference_and_the_audit_of_both_references() -> None:
    vae, x, oracle = linear_vae(2, 8)
    set_guide(vae, oracle)
    result = audit(vae.model, vae.guide, x, references=["closed_form", "grid"])
    table = result.table
    assert set(table["evidence_method"].values) == {"closed form"}
    torch.testing.assert_close(torch.tensor(table["log_evidence"].values), oracle.log_evidence(x), atol=1e-8, rtol=0)
    gap = torch.tensor(table["gap_total"].values)
    spread = torch.tensor(table["elbo_se"].values)
    assert ((gap - oracle.diagonal_gap()).abs() < 4.5 * spread).all()
    assert (table["gap_total"] > -3 * table["elbo_se"]).all()
    # best diagonal: sd_q / sd_p = 1 / sqrt(M_jj Cov_jj), the same for all x; the mean is exact
    ratio = (oracle.precision.diagonal() * oracle.posterior(x)[1].diagonal()).rsqrt().min().item()
    assert abs(table["sd_ratio"] - ratio).max() < 0.03
    assert table["mean_error"].max() < 4.5 / 100 * 1.2
    assert (table["sliced_wasserstein"] > table["noise_floor"]).mean() > 0.9


def test_closed_form_uses_the_rows_of_a_subset() -> None:
    vae, x, oracle = linear_vae(2, 8)
    part = LogJoint(vae.model, vae.guide, x).subset(torch.tensor([5, 1]))
    assert part is not None
    posterior = ClosedForm()(part, keep=100, seed=0)
    torch.testing.assert_close(posterior.mean, oracle.posterior(x[[5, 1]])[0])


def test_maximum_likelihood_is_a_stationary_maximum() -> None:
    _, x, _ = linear_vae(2, 6, n=500)
    best = LinearGaussian.maximum_likelihood(x, 2)
    values = torch.linalg.eigvalsh((x - x.mean(0)).T @ (x - x.mean(0)) / len(x)).flip(0)
    s2 = values[2:].mean()
    closed = -0.5 * (6 * torch.log(torch.tensor(2 * torch.pi)) + values[:2].log().sum() + 4 * s2.log() + 6)
    top = best.log_evidence(x).mean()
    torch.testing.assert_close(top, closed, atol=1e-6, rtol=0)
    for W, psi in [(best.W * 1.05, best.psi), (best.W, best.psi * 1.05), (best.W.roll(1, 0), best.psi)]:
        assert LinearGaussian(W, best.mu, psi).log_evidence(x).mean() < top


def test_annealed_evidence_ends_at_both_ends() -> None:
    _, x, oracle = linear_vae(2, 6)
    assert oracle.log_evidence(x, temperature=0.0).abs().max() < 1e-10
    steps = torch.linspace(0, 1, 2001, dtype=torch.float64)
    # d/db log Z_b = E_{b}[log p(x|z)]: compare the difference quotient with the exact expectation at b = 1/2
    M = torch.eye(2, dtype=x.dtype) + 0.5 * oracle._Wt_psi_inv @ oracle.W
    m = 0.5 * torch.linalg.solve(M, oracle._Wt_psi_inv @ (x - oracle.mu).T).T
    residual = x - oracle.mu - m @ oracle.W.T
    expected = -0.5 * (
        x.shape[1] * torch.log(torch.tensor(2 * torch.pi))
        + oracle.psi.log().sum()
        + (residual.square() / oracle.psi).sum(-1)
        + (oracle._Wt_psi_inv @ oracle.W * torch.linalg.inv(M)).sum()
    )
    h = steps[1].item()
    slope = (oracle.log_evidence(x, 0.5 + h) - oracle.log_evidence(x, 0.5 - h)) / (2 * h)
    torch.testing.assert_close(slope, expected, atol=1e-4, rtol=1e-4)


def kl(mean: Tensor, covariance: Tensor, of_mean: Tensor, of_covariance: Tensor) -> Tensor:
    """KL(N(mean, covariance) || N(of_mean, of_covariance)) per datum."""
    normals = (torch.distributions.MultivariateNormal(*p) for p in ((mean, covariance), (of_mean, of_covariance)))
    return torch.distributions.kl_divergence(*normals)


@pytest.mark.parametrize(
    "references", [["closed_form", "grid"], pytest.param(["hmc", "importance", "ais"], marks=pytest.mark.slow)]
)
def test_kl_both_ways_is_that_of_two_normals(references: list[str]) -> None:
    vae, x, oracle = linear_vae(2, 8, n=40)
    set_guide(vae, oracle)
    mean, covariance = oracle.posterior(x)
    narrow = torch.diag_embed(1 / oracle.precision.diagonal())
    right, gap = kl(mean, covariance, mean, narrow), kl(mean, narrow, mean, covariance)
    table = audit(vae.model, vae.guide, x, references=references).table
    for reference in references:
        if reference == "ais":  # which certifies nothing
            assert table["kl_forward"].sel(reference=reference).isnull().all()
            continue
        part = table.sel(reference=reference)
        z = (part["kl_forward"].values - right.numpy()) / part["kl_forward_se"].values
        assert np.abs(z).max() < 4.5
        assert 0.6 < z.std() < 1.5  # the stated errors are those that are made
        assert (part["kl_forward_se"] < 0.2 * right.min().item()).all()
    assert (right > gap).all()  # a narrow guide misses mass


def test_kl_forward_has_no_noise_where_the_guide_is_the_posterior() -> None:
    vae, x, oracle = linear_vae(2, 6, family=FullRankNormal)
    set_guide(vae, oracle)
    table = audit(vae.model, vae.guide, x, references=["closed_form"]).table
    assert abs(table["kl_forward"]).max() < 1e-8
    assert table["kl_forward_se"].max() < 1e-8
