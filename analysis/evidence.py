"""Which number stands for log p(x_n), and what kind of number it is.

The ladder, per datum: closed form, grid, then importance sampling from the guide where its weights can be trusted and a grid
that could not be certified does not contradict it (a guide on one of two modes has excellent weights). Where none applies there
is no value of log p(x): only a probabilistic lower bound, labelled as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from elbowroom.inference.posterior import Posterior

Z95 = 1.959963984540054
MOST = 0.25  # nats: an uncertified reference farther off than this contradicts, however large its error
LOWER_BOUND = "importance-weighted lower bound"


@dataclass(frozen=True)
class Ladder:
    """The evidence per datum, (N,) each, in nats.

    Attributes:
        value: log p(x_n), NaN where nothing gives a value.
        error: its numerical or standard error, NaN likewise.
        lower: value - error (exact), value - 1.96 error (estimate), or the probabilistic lower bound.
        upper: likewise above; NaN where there is only a lower bound.
        method: in words.
        is_exact: True where the value is exact up to its numerical error.
    """

    value: np.ndarray
    error: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    method: np.ndarray
    is_exact: np.ndarray


def climb(guide: Posterior, references: Sequence[Posterior]) -> Ladder:
    """Take, for each datum, the first of references (in order) and importance sampling that can be trusted.

    Args:
        guide: the amortized posterior, with its importance-sampling evidence.
        references: exact posteriors, best first.
    """
    n = guide.draws.shape[2]
    value, error, lower, upper = (np.full(n, np.nan) for _ in range(4))
    method = np.full(n, LOWER_BOUND, dtype=object)
    is_exact = np.zeros(n, dtype=bool)
    open_ = np.ones(n, dtype=bool)
    for posterior in references:
        if posterior.evidence is None:
            continue
        take = open_ & posterior.trusted.numpy()
        v, e = posterior.evidence.value.cpu().numpy(), posterior.evidence.error.cpu().numpy()
        value[take], error[take] = v[take], e[take]
        lower[take], upper[take] = (v - e)[take], (v + e)[take]
        method[take], is_exact[take] = posterior.evidence.method, True
        open_ &= ~take
    if guide.evidence is not None:
        v, e = guide.evidence.value.cpu().numpy(), guide.evidence.error.cpu().numpy()
        take = open_ & (guide.stats["importance_trusted"].cpu().numpy() > 0) & ~_contradicted(v, e, references)
        value[take], error[take] = v[take], e[take]
        lower[take], upper[take] = (v - Z95 * e)[take], (v + Z95 * e)[take]
        method[take] = f"{guide.evidence.method} estimate"
        open_ &= ~take
        lower[open_] = v[open_]
    return Ladder(value, error, lower, upper, method.astype(str), is_exact)


def _contradicted(value: np.ndarray, error: np.ndarray, references: Sequence[Posterior]) -> np.ndarray:
    """Where an uncertified reference lies outside importance sampling's error and its own."""
    against = np.zeros(len(value), dtype=bool)
    for posterior in references:
        if posterior.evidence is None:
            continue
        theirs, spread = posterior.evidence.value.cpu().numpy(), posterior.evidence.error.cpu().numpy()
        allowed = 4.5 * error + np.nan_to_num(spread, nan=np.inf, posinf=np.inf)
        agrees = np.abs(theirs - value) <= np.minimum(allowed, MOST)
        against |= ~agrees & ~posterior.trusted.numpy()
    return against
