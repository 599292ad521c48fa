"""Are values uniform on [0, 1]? Simultaneous bands for the ECDF, an exact p-value, and size and direction of the deviation.

    R_k = #{n : u_n <= t_k} ~ Binomial(N, t_k)                                 under uniformity, k = 1 .. K
    level_k = 2 min(P(B_k <= R_k), P(B_k >= R_k)),  B_k ~ Binomial(N, t_k)
    gamma = min_k level_k,   p = P(gamma' <= gamma)                            gamma' of N uniform values

R_1, R_2, .. is a Markov chain, R_k+1 - R_k | R_k ~ Binomial(N - R_k, (t_k+1 - t_k) / (1 - t_k)). The probability that it stays
inside limits is a sum over its states, so that p and the bands are exact, not simulated. The bands of level 1 - a hold the ECDF
at all t_k with a probability of at least 1 - a, and the ECDF leaves them if and only if p <= a.

Saeilynoja, Buerkner and Vehtari 2022, Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation
and multiple sample comparison, https://doi.org/10.1007/s11222-022-10090-6, section 2.2; Holm 1979,
https://www.jstor.org/stable/4615733.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special

LEVEL = 0.95
FEW = 5_000  # number of values above which fewer points are used: the work grows with N x K
NEGLIGIBLE = 1e-6  # p-values below this are replaced by their upper bound K gamma, which is cheap
ROUNDING = 1e-9  # relative: levels of t and 1 - t differ only by rounding
WINDOW = 12.0  # in standard deviations of a count: values beyond have no probability
WORDS = ("", "too narrow", "too wide", "shifted up", "shifted down", "uneven")


@dataclass(frozen=True)
class Uniformity:
    """How far values are from uniform.

    Attributes:
        count: number N of finite values, on which all else is based.
        lost: number of values that are NaN or infinite, which are left out.
        p_value: exact, of the ECDF's largest deviation by pointwise level; below 1e-6 an upper bound. NaN without values.
        effect: max_u |ECDF(u) - u|; under uniformity about 0.87 / sqrt(N) on average.
        shift: sqrt(12) (mean u - 1/2), 0 +- 1 / sqrt(N) under uniformity; positive where values are high.
        spread: sqrt(180) (mean (u - 1/2)^2 - 1/12), likewise; positive where values pile up at both ends.
        points: t, (K,).
        ecdf: at the points, (K,).
        lower: lower end of the simultaneous band at the points, (K,).
        upper: upper end, (K,).
    """

    count: int
    lost: int
    p_value: float
    effect: float
    shift: float
    spread: float
    points: np.ndarray
    ecdf: np.ndarray
    lower: np.ndarray
    upper: np.ndarray

    @property
    def direction(self) -> str:
        """The error of the guide that a non-uniform PIT of the truth among its draws indicates; one of `WORDS`.

        It is given by shift or spread, whichever is the larger share of its maximum: `too narrow` (values at both ends: the
        truth is outside more often than the guide expects; errors of changing sign that are not part of the guide's width show
        the same way), `too wide` (values in the middle), `shifted down` (high values: the guide's draws lie below the truth),
        `shifted up`. `uneven` where both are within two standard errors.
        """
        if not self.count:
            return ""
        if max(abs(self.shift), abs(self.spread)) * math.sqrt(self.count) < 2:
            return "uneven"
        if abs(self.shift) / math.sqrt(3) >= abs(self.spread) / math.sqrt(5):  # sqrt(3), sqrt(5): their maxima
            return "shifted down" if self.shift > 0 else "shifted up"
        return "too narrow" if self.spread > 0 else "too wide"


def uniformity(values: Any, level: float = LEVEL) -> Uniformity:
    """Compare values with the uniform distribution.

    Args:
        values: (N,), independent; an array or a tensor on the CPU. NaN and infinite values are counted and left out.
        level: probability that the simultaneous bands hold the ECDF of uniform values.

    Raises:
        ValueError: a value lies outside [0, 1].
    """
    given = np.asarray(values, dtype=np.float64).ravel()
    u = np.sort(given[np.isfinite(given)])
    n = len(u)
    if n and not (u[0] >= 0 and u[-1] <= 1):
        raise ValueError(f"values from {u[0]:.4g} to {u[-1]:.4g}: they must lie in [0, 1]")
    points, lower, upper = bands(n, level)
    if not n:
        nothing = np.full(len(points), np.nan)
        return Uniformity(0, len(given), *(math.nan,) * 4, points, nothing, lower, upper)
    counts = np.searchsorted(u, points, side="right")
    steps = np.arange(1, n + 1) / n
    effect = float(max((steps - u).max(), (u - steps + 1 / n).max()))
    shift = math.sqrt(12) * float(u.mean() - 0.5)
    spread = math.sqrt(180) * float(np.square(u - 0.5).mean() - 1 / 12)
    return Uniformity(n, len(given) - n, p_value(counts, n), effect, shift, spread, points, counts / n, lower, upper)


def p_value(counts: np.ndarray, n: int) -> float:
    """Return the exact probability that uniform values deviate as much as these counts, see the module.

    `counts` are the numbers of the n values that are at most `points_of(n)`, (K,).
    """
    gamma = float(_levels(counts, n, points_of(n)).min())
    bound = len(counts) * gamma
    return bound if bound < NEGLIGIBLE else min(1.0, max(1 - _inside(n, gamma), gamma / 2))


@lru_cache(maxsize=64)
def bands(n: int, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return points t and the lower and upper end of a simultaneous band for the ECDF of n uniform values, (K,) each.

    The ECDF is inside at all points at once with probability `level` or more; the band is the narrowest that reaches it.
    """
    points = points_of(n)
    if not n:
        return points, np.zeros_like(points), np.ones_like(points)
    # the union bound from below, a single point from above
    low, high = math.log((1 - level) / (2 * len(points))), math.log(1 - level)
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if _inside(n, math.exp(middle)) >= level else (low, middle)
    first, last = _limits(n, math.exp(low))
    return points, first / n, last / n


def holm(p_values: Any) -> np.ndarray:
    """Return p-values adjusted by Holm's method: rejecting those at most a keeps the familywise error at most a.

    The p-values may have any shape. NaN stay NaN, and are not counted.
    """
    p = np.asarray(p_values, dtype=np.float64)
    out = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    order = np.argsort(p[known], kind="stable")
    m = len(order)
    adjusted = np.minimum(1, np.maximum.accumulate((m - np.arange(m)) * p[known][order]))
    found = np.empty(m)
    found[order] = adjusted
    out[known] = found
    return out


@lru_cache(maxsize=64)
def points_of(n: int) -> np.ndarray:
    """Return the points t at which the ECDF of n values is evaluated, (K,): evenly spaced, and closer near the ends."""
    middle = np.arange(1, 100) if n <= FEW else np.arange(4, 100, 4)
    edge = np.array([0.002, 0.005]) if n <= FEW else np.array([0.002, 0.005, 0.01, 0.02])
    return np.concatenate([edge, middle / 100, (1 - edge)[::-1]])


def _levels(counts: np.ndarray, n: int, points: np.ndarray) -> np.ndarray:
    below, above = special.bdtr(counts, n, points), special.bdtrc(counts - 1, n, points)
    return 2 * np.minimum(below, np.where(counts == 0, 1.0, above))


@lru_cache(maxsize=8)
def _window(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts that matter at each point, (K, W), and their levels."""
    points = points_of(n)
    reach = math.ceil(WINDOW * math.sqrt(n) / 2) + 20
    start = np.maximum(0, np.floor(n * points).astype(np.int64) - reach)
    counts = start[:, None] + np.arange(min(n, 2 * reach) + 1)
    inside = counts <= n
    return counts, np.where(inside, _levels(np.minimum(counts, n), n, points[:, None]), -1.0)


def _limits(n: int, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the first and the last count at each point whose level exceeds gamma; first > last where there is none."""
    counts, levels = _window(n)
    fine = levels > gamma * (1 + ROUNDING)
    some = fine.any(1)
    first = counts[:, 0] + fine.argmax(1)
    last = counts[:, -1] - fine[:, ::-1].argmax(1)
    return first, np.where(some, last, first - 1)


def _inside(n: int, gamma: float) -> float:
    """Return the probability that the level of n uniform values exceeds gamma at every point."""
    points = points_of(n)
    first, last = _limits(n, gamma)
    log_factorial = special.gammaln(np.arange(n + 1) + 1.0)
    state, mass, before = np.zeros(1, dtype=np.int64), np.ones(1), 0.0
    for t, low, high in zip(points, first, last, strict=True):
        share = (t - before) / (1 - before)
        new = np.arange(low, high + 1)
        left = n - state[:, None]
        step = new[None] - state[:, None]
        rest = left - step
        fits = (step >= 0) & (rest >= 0)
        step, rest = np.where(fits, step, 0), np.where(fits, rest, 0)
        log_p = log_factorial[left] - log_factorial[step] - log_factorial[rest]
        log_p += step * math.log(share) + rest * math.log1p(-share)
        mass = mass @ np.where(fits, np.exp(np.where(fits, log_p, 0.0)), 0.0)
        state, before = new, t
    return float(mass.sum())
