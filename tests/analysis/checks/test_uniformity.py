"""Uniformity: bands with the coverage that they state, exact p-values, Holm, effect sizes, and directions in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from elbowroom.analysis.checks.uniformity import bands, holm, p_value, points_of, uniformity


def counts_of(values: np.ndarray) -> np.ndarray:
    """Values (R, N) -> counts at the points (R, K)."""
    points = points_of(values.shape[1])
    return np.stack([np.searchsorted(row, points, side="right") for row in np.sort(values, 1)])


@pytest.mark.parametrize(("n", "level"), [(1, 0.95), (7, 0.9), (50, 0.95), (400, 0.95), (6000, 0.9)])
def test_bands_hold_the_whole_ecdf_as_often_as_they_say(n, level):
    replicates = 4000 if n < 1000 else 1000
    counts = counts_of(np.random.default_rng(n).random((replicates, n))) / n
    _, lower, upper = bands(n, level)
    inside = ((counts >= lower - 1e-12) & (counts <= upper + 1e-12)).all(1).mean()
    error = math.sqrt(level * (1 - level) / replicates)
    assert inside > level - 4 * error
    if n >= 50:  # few values have few ECDFs, so that levels are coarse
        assert inside < level + 0.01 + 4 * error


@pytest.mark.parametrize(("n", "replicates"), [(3, 400), (60, 400), (1000, 150)])
def test_p_values_are_those_of_simulation(n, replicates):
    """P(p <= a) <= a, and close to it for many values."""
    rng = np.random.default_rng(5)
    null = np.array([p_value(c, n) for c in counts_of(rng.random((replicates, n)))])
    for a in (0.01, 0.05, 0.2, 0.5, 0.8):
        error = math.sqrt(a * (1 - a) / replicates)
        assert (null <= a).mean() <= a + 4 * error
        if n >= 60:
            assert (null <= a).mean() >= a - 4 * error - 0.02


def test_one_value_has_the_p_value_of_its_tails():
    """N = 1: the level at t is 2 min(t, 1 - t) on the wrong side; below the first point u = 0.001 has level 2 * 0.002."""
    assert p_value(counts_of(np.array([[0.001]]))[0], 1) == pytest.approx(2 * 0.002)
    assert p_value(counts_of(np.array([[0.999]]))[0], 1) == pytest.approx(2 * 0.002)
    assert p_value(counts_of(np.array([[0.5]]))[0], 1) > 0.9


def test_the_ecdf_leaves_the_band_if_and_only_if_p_is_small():
    rng = np.random.default_rng(2)
    seen = set()
    for power in np.linspace(0.7, 1.3, 60):
        found = uniformity(rng.random(150) ** power)
        outside = bool(((found.ecdf < found.lower - 1e-12) | (found.ecdf > found.upper + 1e-12)).any())
        assert outside == (found.p_value <= 0.05)
        seen.add(outside)
    assert seen == {True, False}


def test_p_values_of_gross_deviations_are_tiny_but_not_zero():
    found = uniformity(np.random.default_rng(0).random(1000) / 2)
    assert 0 < found.p_value < 1e-50
    both = [uniformity(np.random.default_rng(0).random(300) ** power).p_value for power in (1.45, 1.5, 1.55)]
    assert both == sorted(both, reverse=True)  # nothing jumps where the bound takes over


def test_the_effect_is_the_largest_deviation():
    values = np.random.default_rng(3).random(200)
    assert uniformity(values).effect == pytest.approx(stats.kstest(values, "uniform").statistic, abs=1e-12)
    assert uniformity(np.full(10, 0.3)).effect == pytest.approx(0.7)


def test_shift_and_spread_are_standard_under_uniformity():
    found = [uniformity(row) for row in np.random.default_rng(4).random((300, 100))]
    for name in ("shift", "spread"):
        values = np.array([getattr(one, name) for one in found]) * 10
        assert abs(values.mean()) < 4 / math.sqrt(300)
        assert abs(values.std() - 1) < 4 / math.sqrt(600)


@pytest.mark.parametrize(
    ("a", "b", "word"),
    [(0.6, 0.6, "too narrow"), (1.8, 1.8, "too wide"), (1.5, 1, "shifted down"), (1, 1.5, "shifted up")],
)
@pytest.mark.parametrize("seed", range(5))
def test_directions(a, b, word, seed):
    """Beta(a, b): at both ends, in the middle, high (the truth lies above the guide's draws: the guide is too low), low."""
    found = uniformity(np.random.default_rng(seed).beta(a, b, 400))
    assert found.direction == word
    assert found.p_value < 0.01


def test_a_deviation_that_is_neither_is_uneven():
    wave = (np.arange(2000) + 0.5) / 2000
    wave = wave + 0.03 * np.sin(8 * np.pi * wave)
    found = uniformity(wave)
    assert found.direction == "uneven"
    assert found.effect > 0.02


def test_values_that_are_no_numbers_are_counted_and_left_out():
    values = np.random.default_rng(1).random(100)
    with_holes = np.concatenate([values, [np.nan, np.inf, -np.inf]])
    found, clean = uniformity(with_holes), uniformity(values)
    assert (found.count, found.lost) == (100, 3)
    assert found.p_value == clean.p_value
    nothing = uniformity(np.array([np.nan]))
    assert nothing.count == 0
    assert math.isnan(nothing.p_value)
    assert nothing.direction == ""


def test_values_outside_are_refused():
    with pytest.raises(ValueError, match=r"values from -0.1 to 0.5: they must lie in \[0, 1\]"):
        uniformity(np.array([-0.1, 0.5]))


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]).tolist() == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.2, np.nan, 0.001, 0.9])[[0, 2, 3]].tolist() == pytest.approx([0.4, 0.003, 0.9])
    assert np.isnan(holm([0.2, np.nan])[1])
    assert holm([0.7, 0.8]).max() <= 1
    assert holm([]).size == 0


def test_holm_keeps_the_familywise_level():
    p = np.random.default_rng(0).random((4000, 8))
    share = np.mean([(holm(row) <= 0.05).any() for row in p])
    assert abs(share - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 4000)
