"""Importance weights: against ArviZ, against the known tail index, and against closed forms."""

from __future__ import annotations

import math

import arviz_stats
import numpy as np
import pytest
import torch
from support.problems.catalogue import PROBLEMS, UNIMODAL

from elbowroom.inference.posterior import sure_bound
from elbowroom.inference.references.importance.guide import evidence, split_bounds
from elbowroom.inference.references.importance.importance import ImportanceSampling, Proposal
from elbowroom.inference.references.importance.psis import good_k, psis
from elbowroom.inference.search.scout import scout

F64 = torch.float64


def correlated_weights(rho: float, n_draws: int, n_data: int, seed: int) -> torch.Tensor:
    """Log weights of the best diagonal normal for a 2-D normal with correlation rho; log p = 0."""
    generator = torch.Generator().manual_seed(seed)
    variance = 1 - rho**2  # 1 / M_jj of the precision of a unit-variance correlated normal
    z = variance**0.5 * torch.randn(n_draws, n_data, 2, dtype=F64, generator=generator)
    log_q = -0.5 * z.square().sum(-1) / variance - math.log(2 * math.pi * variance)
    quadratic = (z[..., 0] ** 2 - 2 * rho * z[..., 0] * z[..., 1] + z[..., 1] ** 2) / variance
    return -0.5 * quadratic - math.log(2 * math.pi * variance**0.5) - log_q


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("n_draws", [100, 4000])
def test_equals_arviz_on_slices(rho: float, n_draws: int) -> None:
    log_weights = correlated_weights(rho, n_draws, 5, seed=1) + 0.1 * torch.randn(n_draws, 5, dtype=F64)
    ours = psis(log_weights)
    for column in range(5):
        smoothed, k = arviz_stats.base.array_stats.psislw(-log_weights[:, column].numpy(), r_eff=1.0)
        np.testing.assert_allclose(ours.pareto_k[column].item(), float(k), atol=1e-6)
        np.testing.assert_allclose(ours.log_weights[:, column].numpy(), smoothed, atol=1e-6)


@pytest.mark.parametrize(("rho", "expected"), [(0.3, 0.31), (0.5, 0.48), (0.7, 0.65), (0.9, 0.82)])
def test_mean_k_hat_of_a_correlated_normal(rho: float, expected: float) -> None:
    k = psis(correlated_weights(rho, 10_000, 40, seed=2)).pareto_k
    assert abs(k.mean().item() - expected) < 0.04


@pytest.mark.parametrize(("n_draws", "bias"), [(1, 0.0472), (10, 0.0057), (100, 0.0007)])
def test_bias_of_the_importance_weighted_bound(n_draws: int, bias: float) -> None:
    """E[log mean of K weights] at rho = .3 lies below log p = 0 by the published amount."""
    repeats = 200_000 if n_draws < 100 else 60_000
    log_weights = correlated_weights(0.3, n_draws, repeats, seed=3)
    bound = torch.logsumexp(log_weights, 0) - math.log(n_draws)
    error = bound.std().item() / repeats**0.5
    assert abs(-bound.mean().item() - bias) < 4.5 * error + 5e-5
    assert 4.5 * error < bias


def test_standard_error_covers_at_its_level_where_k_is_small() -> None:
    """95 % intervals of 2,000 estimates at rho = .3 cover 93 to 97 %."""
    log_weights = correlated_weights(0.3, 5000, 2000, seed=4)
    smoothed = psis(log_weights)
    value, trusted = evidence(log_weights, smoothed.pareto_k, smoothed.ess_fraction)
    assert trusted.float().mean() > 0.95
    covered = (value.value.abs() < 1.96 * value.error)[trusted].float().mean().item()
    assert 0.93 < covered < 0.97


def test_bad_weights_are_not_read_as_an_estimate() -> None:
    log_weights = correlated_weights(0.95, 10_000, 50, seed=5)
    smoothed = psis(log_weights)
    _, trusted = evidence(log_weights, smoothed.pareto_k, smoothed.ess_fraction)
    assert trusted.float().mean() < 0.2


def test_equal_weights_have_no_tail() -> None:
    smoothed = psis(torch.full((1000, 3), -7.0, dtype=F64))
    assert (smoothed.pareto_k == -torch.inf).all()
    torch.testing.assert_close(smoothed.ess_fraction, torch.ones(3, dtype=F64))


def test_good_k_grows_with_the_number_of_draws() -> None:
    assert good_k(100) == pytest.approx(0.5)
    assert good_k(10_000) == 0.7


# -- bounds from weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sd", [0.1, 1.0, 3.0])
def test_sure_bounds_fail_at_most_once_in_forty(sd: float) -> None:
    """Log-normal weights of mean 1: the log of their mean lies above 0 far too often to be a bound, the sure one does not."""
    n = 20_000
    log_w = sd * torch.randn(32, n, dtype=F64, generator=torch.Generator().manual_seed(6)) - sd**2 / 2
    failed = (sure_bound(log_w) > 0).double().mean().item()
    assert failed <= 0.025 + 4.5 * (0.025 / n) ** 0.5
    plain = torch.logsumexp(log_w, 0) - math.log(32)
    assert (plain > 0).double().mean() > 0.15
    assert (plain - sure_bound(log_w)).median() < 0.3 + 2.5 * sd


def test_the_sure_bound_is_nearly_attained_by_the_worst_weights() -> None:
    """Weights that are exp(b) with probability exp(-b), else 0, are those of Markov's inequality: it fails about that often."""
    b = math.log(40) / 16
    heavy = torch.rand(16, 200_000, dtype=F64, generator=torch.Generator().manual_seed(7)) < math.exp(-b)
    log_w = torch.where(heavy, torch.tensor(b + 1e-9, dtype=F64), -torch.inf)
    failed = (sure_bound(log_w) > 0).double().mean().item()
    assert abs(failed - 0.025) < 4.5 * (0.025 / 200_000) ** 0.5


def test_halves_are_of_different_draws() -> None:
    log_w = torch.cat([torch.full((50, 2), 3.0, dtype=F64), torch.full((50, 2), 1.0, dtype=F64)])
    found = split_bounds(log_w)
    torch.testing.assert_close(found["bound_first"], torch.full((2,), 3.0, dtype=F64))
    torch.testing.assert_close(found["bound_sure"], torch.full((2,), 1 - math.log(40) / 16, dtype=F64))


# -- the reference ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=() if n in ("linear_gaussian_d5", "banana", "mlp_poisson", "square") else pytest.mark.slow)
        for n in (*UNIMODAL, "square")
        if n not in ("linear_gaussian_d20", "heavy_tails_d2")
    ],
)
def test_certified_data_are_right(name: str) -> None:
    problem = PROBLEMS[name](20, 37)
    found = ImportanceSampling()(problem.log_joint, keep=400, seed=5)
    sure = found.trusted
    assert found.evidence is not None
    assert found.evidence.kind == "estimate"
    error = (found.evidence.value - problem.evidence).abs() / (found.evidence.error + problem.error)
    assert (error[sure] < 4.5).all()
    sd = problem.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    shift = ((found.mean - problem.mean) / sd).abs() * found.stats["weights_ess"].sqrt()[:, None]
    assert (shift[sure] < 6).all()  # in errors of equally many independent draws: weights that differ make it a little larger
    drawn = (found.draws.flatten(0, 1).mean(0) - problem.mean).abs() / sd * 400**0.5
    assert (drawn[sure] < 6).all()
    if name not in ("banana", "hierarchy", "square"):
        assert sure.double().mean() >= 0.85
    assert "rhat_max" not in found.stats


@pytest.mark.slow
def test_intervals_cover_at_their_level() -> None:
    """95 % intervals; the slow test has 2,000 of them."""
    inside = []
    for name in ("mlp_gaussian", "simplex_d2"):
        problem = PROBLEMS[name](100, 41)
        found = ImportanceSampling(draws=2000)(problem.log_joint, keep=100, seed=6)
        assert found.evidence is not None
        z = (found.evidence.value - problem.evidence) / found.evidence.error
        inside.append((z.abs() < 1.96)[found.trusted])
    covered = torch.cat(inside)
    assert abs(covered.double().mean() - 0.95) < 4 * (0.95 * 0.05 / len(covered)) ** 0.5


@pytest.mark.slow
def test_intervals_cover_at_their_level_over_every_kind() -> None:
    inside = []
    for name in UNIMODAL:
        problem = PROBLEMS[name](300, 43)
        found = ImportanceSampling()(problem.log_joint, keep=100, seed=6)
        assert found.evidence is not None
        z = (found.evidence.value - problem.evidence) / found.evidence.error
        inside.append((z.abs() < 1.96)[found.trusted])
        print(name, len(inside[-1]), inside[-1].double().mean().item())
    covered = torch.cat(inside)
    assert len(covered) >= 2000
    assert 0.93 < covered.double().mean() < 0.97


@pytest.mark.parametrize(
    "name",
    ["square_idle", "bimodal_unequal_d1", *(pytest.param(n, marks=pytest.mark.slow) for n in ("square", "bimodal_unequal_d7"))],
)
def test_no_certified_datum_misses_a_mode(name: str) -> None:
    problem = PROBLEMS[name](42, 47)
    found = ImportanceSampling(draws=4000)(problem.log_joint, keep=2000, seed=5)
    label = problem.mode_of(found.draws.flatten(0, 1))
    seen = torch.stack([(label == k).any(0) for k in range(2)], -1)
    missed = torch.where(seen, 0, problem.masses).sum(-1)
    assert (missed[found.trusted] < 0.05).all()
    far = (problem.masses > 0.05).all(-1) & (missed > 0.05)
    assert far.sum() >= 3
    assert all("found a mode" in reason or "k-hat" in reason for reason, m in zip(found.reason, far, strict=True) if m)


def test_the_proposal_is_normalised_and_drawn_from_what_it_says() -> None:
    """The mean of N(0, 1)/r over draws of r is 1; one with the density of another proposal is not."""
    log_joint = PROBLEMS["linear_gaussian_d2"](5, 51).log_joint
    proposal = Proposal.around(scout(log_joint).refit.q)
    z, log_r = proposal.sample(40_000, torch.Generator().manual_seed(8))
    for density in (proposal.narrow, proposal.wide):
        w = (density.log_prob(z) - log_r).exp()
        assert ((w.mean(0) - 1).abs() < 4.5 * w.std(0) / 200).all()


def test_what_the_budget_left_out_is_said() -> None:
    problem = PROBLEMS["mlp_gaussian"](4, 53)
    found = ImportanceSampling()(problem.log_joint, keep=100, seed=5, until=0.0)
    assert set(found.status) == {"uncertified"}
    assert set(found.reason) == {"importance: the budget ended before this datum was reached"}
    assert found.draws.isnan().all()
