"""The arithmetic of benchmarks/counts.py and benchmarks/sequences.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from benchmarks.counts import LEVELS, bin_mass, mean_and_error
from benchmarks.sequences import lengths, marginals, per_step

VALUES = torch.arange(LEVELS, dtype=torch.float64)[:, None, None]


def test_bins_and_the_tails_outside_hold_all_of_the_mass() -> None:
    m = torch.tensor([-30.0, -0.5, 0.0, 3.2, 8.0, 16.0, 20.0], dtype=torch.float64)[:, None]
    s = torch.tensor([1e-3, 0.1, 1.0, 7.0, 100.0], dtype=torch.float64)
    total = bin_mass(m, s, VALUES).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros(7, 5, dtype=torch.float64), atol=1e-12, rtol=0)


def test_a_bin_inside_is_a_difference_of_the_distribution_function() -> None:
    normal = torch.distributions.Normal(torch.tensor(3.2, dtype=torch.float64), 7.0)
    expected = normal.cdf(VALUES + 0.5) - normal.cdf(VALUES - 0.5)
    got = bin_mass(normal.loc, normal.scale, VALUES).exp()
    torch.testing.assert_close(got[1:-1], expected[1:-1])
    torch.testing.assert_close(got[0], normal.cdf(VALUES[0] + 0.5))
    torch.testing.assert_close(got[-1], 1 - normal.cdf(VALUES[-1] - 0.5))


@pytest.mark.parametrize("side", [-1, 1])
def test_far_tails_are_no_minus_infinity_and_agree_with_the_density(side: int) -> None:
    """Far out the mass of a narrow bin is the density times what an exponential of that slope integrates to."""
    x, s, slope = torch.tensor(5.0, dtype=torch.float64), torch.tensor(10.0, dtype=torch.float64), 3.0
    m = x + side * 300.0
    expected = torch.distributions.Normal(m, s).log_prob(x) + math.log(2 * math.sinh(slope / 2) / slope)
    assert float(bin_mass(m, s, x)) == pytest.approx(float(expected), abs=1e-2)


def test_nats_per_step_weigh_long_sequences_and_averages_do_not() -> None:
    log_p, steps = np.array([-10.0, -300.0]), np.array([1, 99])
    ratio, error = per_step(log_p, steps)
    assert ratio == pytest.approx(3.1)
    assert (-log_p / steps).mean() == pytest.approx((10 + 300 / 99) / 2)
    assert error > 0
    assert per_step(-2.5 * steps, steps) == pytest.approx((2.5, 0.0))


def test_lengths_and_independent_keys_leave_the_padding_out() -> None:
    x = np.full((2, 4, 3), np.nan)
    x[0, :2] = [[1, 0, 0], [1, 0, 1]]
    x[1, :4] = [[0, 0, 0]] * 4
    assert lengths(x).tolist() == [2, 4]
    p = np.array([2.5, 0.5, 1.5]) / 7
    expected = [2 * np.log(p[0]) + 2 * np.log1p(-p[1]) + np.log(p[2]) + np.log1p(-p[2]), 4 * np.log1p(-p).sum()]
    np.testing.assert_allclose(marginals(x, x), expected)


def test_the_error_of_a_mean_over_seeds_is_not_divided_by_their_number() -> None:
    one = np.random.default_rng(0).normal(size=100)
    mean, error, seeds = mean_and_error([one, one + 1, one + 2])
    assert mean == pytest.approx(one.mean() + 1)
    assert error == pytest.approx(one.std(ddof=1) / 10)
    assert seeds == pytest.approx([one.mean(), one.mean() + 1, one.mean() + 2])
