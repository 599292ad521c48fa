"""Novelty of rows relative to the fitted data: conformal p-values, false-discovery rate, and limits of the estimator.

    p_low(x)  = (1 + #{i : v_i <= x}) / (n + 1)        v_i: the same score of n calibration rows that no fit has used
    p_high(x) = (1 + #{i : v_i >= x}) / (n + 1)
    p_two     = min(1, 2 min(p_low, p_high))

If the rows and the calibration rows are exchangeable, P(p <= a) <= a for each of the three, in finite samples, for any model
and any estimator, if both were scored in the same way (Vovk, Gammerman and Shafer 2005; Laxhammar and Falkman 2015). p_two is
the conformal p-value of the score min(r, n + 2 - r), with r the rank of x among all n + 1. It is exact because it is symmetric
in the n + 1 values; 2 min(F, 1 - F) with F of the calibration rows alone is not.

Over m rows, p-values from one calibration set are positively dependent (PRDS), so that the procedure of Benjamini and Hochberg
1995 (https://doi.org/10.1111/j.2517-6161.1995.tb02031.x) controls the false-discovery rate at q: Bates, Candes, Lei, Romano and
Sesia 2023 (https://doi.org/10.1214/22-AOS2244, https://arxiv.org/abs/2104.08279). This is proved for one tail, not for p_two.
Two-sided, each tail therefore gets q / 2: the false share of the union is at most the sum of those of its parts, so that its
expectation is at most q.

log p(x) is known only up to an interval, or has only bounds. A decision is made at both ends of the p-value that these
intervals allow; where the two differ it is `estimator-limited`.

Rows with missing cells have log p(x) of fewer cells. They are compared only with calibration rows with the same missing cells
(or the same number: also exact if rows are exchangeable together with their missing cells). The p-values hold within each kind
of row (Mondrian conformal prediction, Vovk et al. 2005, section 4.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from scipy import stats

TAILS = ("low", "high", "two_sided")
EQUAL = 1e-4  # scores that differ by less (mostly nats) are ties: equal rows can differ by rounding
INSIDE, BELOW, ABOVE, LIMITED, ALONE = "inside", "below", "above", "estimator-limited", "no comparison"
RULES = {
    "band": "log p(x) outside the percentile band of the calibration rows",
    "low": "conformal p-value of the lower tail at most the level",
    "two_sided": "two-sided conformal p-value at most the level",
    "fdr_low": "lower tail, false-discovery rate held over all rows",
    "fdr_two_sided": "both tails, false-discovery rate held over all rows",
}
SCORES: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]]] = {}
"""Novelty score -> the variable that it is, and its conformal p-value of (calibration values, values)."""


def low(calibration: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the conformal p-values of low values, (m,): (1 + #{v <= x}) / (n + 1); NaN where x is. Ties make p larger.

    Args:
        calibration: v, (n,); an unknown value (NaN) counts as the lowest, which keeps p valid.
        x: (m,).
    """
    ordered = np.sort(np.where(np.isnan(calibration), -np.inf, calibration))
    p = (1 + np.searchsorted(ordered, x + EQUAL, side="right")) / (len(ordered) + 1)
    return np.where(np.isnan(x), np.nan, p)


def high(calibration: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the conformal p-values of high values, (m,): (1 + #{v >= x}) / (n + 1)."""
    return low(-calibration, -x)


def two_sided(p_low: np.ndarray, p_high: np.ndarray) -> np.ndarray:
    """Return min(1, 2 min(p_low, p_high)), the conformal p-value of the rank's distance from both ends."""
    return np.minimum(1.0, 2 * np.minimum(p_low, p_high))


def typicality(calibration: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return the conformal p-values (m,) of |x - mean| for calibration values (n,); the mean is that of all n + 1 values.

    With the mean of the calibration rows alone, the n + 1 values would not be exchangeable, and p would not be exact.
    """
    lost = np.isnan(calibration)
    v = np.sort(calibration[~lost])
    mean = (v.sum() + x) / (len(v) + 1)
    other = 2 * mean - x  # at the same distance from the mean, on the other side
    above = len(v) - np.searchsorted(v, np.maximum(x, other) - EQUAL, side="left")
    below = np.searchsorted(v, np.minimum(x, other) + EQUAL, side="right")
    count = np.where(np.abs(x - mean) <= EQUAL, len(v), above + below)
    return np.where(np.isnan(x), np.nan, (1 + count + lost.sum()) / (len(calibration) + 1))


SCORES |= {
    "low log p(x)": ("log_evidence", low),
    "log p(x), two-sided": ("log_evidence", lambda v, x: two_sided(low(v, x), high(v, x))),
    "typicality": ("log_evidence", typicality),
    "low ELBO": ("elbo", low),
    "reconstruction error": ("distortion", high),
    "rate": ("rate", high),
    "gap": ("gap_total", high),
    "k-hat": ("pareto_k", high),
}


def adjusted(p: np.ndarray) -> np.ndarray:
    """Return p-values adjusted by Benjamini and Hochberg, (m,): those at most q are rejected at level q; NaN is left out."""
    out = np.full(p.shape, np.nan)
    known = np.flatnonzero(~np.isnan(p))
    if known.size:
        out[known] = stats.false_discovery_control(p[known], method="bh")
    return out


def both_tails(p_low: np.ndarray, p_high: np.ndarray) -> np.ndarray:
    """Return adjusted p-values of the union of both tails at half of the level each."""
    return np.minimum(1.0, 2 * np.fmin(adjusted(p_low), adjusted(p_high)))


def enough(level: float) -> int:
    """Return the smallest number n of calibration rows whose least two-sided p-value, 2 / (n + 1), reaches a level."""
    return math.ceil(2 / level * (1 - 1e-12)) - 1


def outside(band: tuple[float, ...]) -> float:
    """Return the share outside a percentile band, which is also the level of p-values."""
    return 1 - (band[1] - band[0]) / 100


def judge(
    rows: xr.Dataset,
    calibration: xr.Dataset,
    simulated: xr.Dataset | None,
    *,
    band: tuple[float, float],
    fdr: float,
    kind: str = "pattern",
) -> xr.Dataset:
    """Compare scored rows with calibration rows that were scored in the same way.

    Args:
        rows: log_evidence with _lower and _upper, elbo, distortion, rate, gap_total, pareto_k and `kind`, over obs_id.
        calibration: the same for calibration rows.
        simulated: the same for rows simulated from the model, or None.
        band: the percentiles between which rows are expected, in percent.
        fdr: false-discovery rate to control.
        kind: the integer variable whose equal values define comparable rows: `pattern` of missing cells, or the number
            `observed`.

    Returns:
        Over obs_id: `typicality` (|log p(x) - mean| in standard deviations of the calibration rows); `p_conformal` with the
        ends that the intervals of log p(x) allow (`_lower`, `_upper`), `p_adjusted` and `p_model` (among simulated rows), each
        over `tail`; `p_score` over `score`; `decision` over `rule`, at the level outside the band; and `compared_with`, the
        number of calibration rows of the same kind. Rows with fewer than `enough` have no p-values.
    """
    m, level = rows.sizes["obs_id"], outside(band)
    parts = {name: np.full((m, 3), np.nan) for name in ("p_conformal", "p_conformal_lower", "p_conformal_upper", "p_model")}
    scores = np.full((m, len(SCORES)), np.nan)
    away, compared = np.full(m, np.nan), np.zeros(m, dtype=int)
    by_band = np.full(m, ALONE, dtype=object)
    kinds, place, numbers = np.unique(calibration[kind].values, return_inverse=True, return_counts=True)
    for number, value in enumerate(kinds):
        own, like = rows[kind].values == value, place == number
        compared[own] = numbers[number]
        if not own.any() or numbers[number] < enough(level):
            continue
        x = {name: rows[name].values[own] for name in ("log_evidence", "log_evidence_lower", "log_evidence_upper")}
        v = {name: calibration[name].values[like] for name in x}
        for name, ends in _tails(v, x).items():
            parts[name][own] = ends
        if simulated is not None and (made := simulated["log_evidence"].values[simulated[kind].values == value]).size:
            left, right = low(made, x["log_evidence"]), high(made, x["log_evidence"])
            parts["p_model"][own] = np.stack([left, right, two_sided(left, right)], -1)
        for column, (variable, conformal) in enumerate(SCORES.values()):
            scores[own, column] = conformal(calibration[variable].values[like], rows[variable].values[own])
        known = v["log_evidence"][~np.isnan(v["log_evidence"])]
        if known.size > 1 and (sd := known.std(ddof=1)) > EQUAL:
            away[own] = np.abs(x["log_evidence"] - known.mean()) / sd
        by_band[own] = _within(v, x, band)
    point, least, most = (parts[name] for name in ("p_conformal", "p_conformal_lower", "p_conformal_upper"))
    pooled = lambda p: np.stack([adjusted(p[:, 0]), adjusted(p[:, 1]), both_tails(p[:, 0], p[:, 1])], -1)
    pooled_least, pooled_most = pooled(least), pooled(most)
    decisions = {
        "band": by_band,
        "low": _decided(least[:, :1], most[:, :1], level),
        "two_sided": _decided(least[:, :2], most[:, :2], level / 2),
        "fdr_low": _decided(pooled_least[:, :1], pooled_most[:, :1], fdr),
        "fdr_two_sided": _decided(pooled_least[:, :2], pooled_most[:, :2], fdr / 2),
    }
    told = {"p_adjusted": (pooled(point), "p_conformal adjusted over all rows; at most q: flagged at false-discovery rate q")}
    told |= {name: (parts[name], words) for name, words in _WORDS.items()}
    of: dict[str, Any] = {
        name: (("obs_id", "tail"), value, {"units": "1", "long_name": words}) for name, (value, words) in told.items()
    }
    of["typicality"] = (
        "obs_id",
        away,
        {"units": "sd", "long_name": "|log p(x) - mean| in standard deviations of the calibration rows"},
    )
    of["p_score"] = (("obs_id", "score"), scores, {"units": "1", "long_name": "conformal p-value of each novelty score"})
    table = np.stack([decisions[rule] for rule in RULES], -1)
    of["decision"] = (("obs_id", "rule"), table, {"units": "", "long_name": "what each rule makes of the row"})
    of["compared_with"] = ("obs_id", compared, {"units": "1", "long_name": "calibration rows with the same holes"})
    found = xr.Dataset(of, coords={"tail": list(TAILS), "score": list(SCORES), "rule": list(RULES)})
    return found if simulated is not None else found.drop_vars("p_model")


_WORDS = {
    "p_conformal": "conformal p-value of log p(x), NaN where only a bound is known",
    "p_conformal_lower": "smallest p-value that the intervals of log p(x) of this and the calibration rows allow",
    "p_conformal_upper": "largest p-value that these allow",
    "p_model": "share of rows simulated from the model with log p(x) as low (high), with the row itself",
}


def _tails(v: dict[str, np.ndarray], x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the p-values of both tails and two-sided, (m, 3): at the values, and at the ends that the intervals allow."""
    below = lambda of: np.where(np.isnan(of["log_evidence_lower"]), -np.inf, of["log_evidence_lower"])
    above = lambda of: np.where(np.isnan(of["log_evidence_upper"]), np.inf, of["log_evidence_upper"])
    ends = {
        "p_conformal": (low(v["log_evidence"], x["log_evidence"]), high(v["log_evidence"], x["log_evidence"])),
        "p_conformal_lower": (low(above(v), below(x)), high(below(v), above(x))),
        "p_conformal_upper": (low(below(v), above(x)), high(above(v), below(x))),
    }
    return {name: np.stack([left, right, two_sided(left, right)], -1) for name, (left, right) in ends.items()}


def _within(v: dict[str, np.ndarray], x: dict[str, np.ndarray], band: tuple[float, float]) -> np.ndarray:
    """Return the side of the calibration values' percentile band on which each row lies, for all values in the intervals."""
    ends = (v["log_evidence_lower"], np.where(np.isnan(v["log_evidence_upper"]), np.inf, v["log_evidence_upper"]))
    with np.errstate(invalid="ignore"):  # NaN between infinite ends: every comparison is False
        (bottom_least, top_least), (bottom_most, top_most) = (np.percentile(end, band) for end in ends)
    least, most = x["log_evidence_lower"], x["log_evidence_upper"]
    out = np.full(len(least), LIMITED, dtype=object)
    out[(least >= bottom_most - EQUAL) & (most <= top_least + EQUAL)] = INSIDE
    out[most < bottom_least - EQUAL], out[least > top_most + EQUAL] = BELOW, ABOVE
    return out


def _decided(least: np.ndarray, most: np.ndarray, level: float) -> np.ndarray:
    """Decide by the smallest and largest possible p-values of the lower, and optionally the upper tail, (m, 1 or 2)."""
    level *= 1 + 1e-12  # rounding: p and level may be equal ratios
    sure, maybe = most <= level, least <= level
    out = np.full(len(least), INSIDE, dtype=object)
    out[(maybe & ~sure).any(-1)] = LIMITED
    for column, word in reversed(list(enumerate((BELOW, ABOVE)[: least.shape[1]]))):
        out[sure[:, column]] = word
    out[np.isnan(least).all(-1)] = ALONE
    return out
