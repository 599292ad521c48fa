"""Importance weights: against ArviZ, against the known tail index, and against closed forms."""

from __future__ import annotations

import math

import arviz_stats
import numpy as np
import pytest
import torch

from elbowroom.inference.importance import evidence, good_k, psis

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
    log_weights = correlated_weights(0.3, 1000, 2000, seed=4)
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
