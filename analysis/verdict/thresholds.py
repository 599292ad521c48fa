"""The thresholds of the rules, the names of the verdicts, and helpers of the rules."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from elbowroom.analysis.measures.evidence_kinds import has_value
from elbowroom.analysis.measures.table import GOOD_K, TRUSTED, Z95, column

HALF = 0.5
CAUSE = 1 / 3  # smallest share of the gap for which a part is called a cause
EFFECTS = {"difference": 0.05, "sd": 0.1, "skewness": 0.5, "kurtosis": 1.0, "relative": 0.1, "largest": 0.25, "nats": 1.0}
"""What matters, by the kind of a check's effect, each in its own unit:

| kind         | of                                                                | matters above                            |
|--------------|-------------------------------------------------------------------|------------------------------------------|
| `difference` | probabilities (PIT values from uniform), correlations             | 0.05                                     |
| `sd`         | means of columns, in standard deviations of the column            | 0.1 sd                                   |
| `skewness`   | mean skewness of columns                                          | 0.5 (of a normal: 0, a gamma(16): 0.5)   |
| `kurtosis`   | mean kurtosis of columns                                          | 1 (of a normal: 3, Student's t of 10: 4) |
| `relative`   | shares, variances, standard deviations, relative to the model's   | 10%                                      |
| `largest`    | the largest value, relative to the geometric mean of the model's  | 25%                                      |
| `nats`       | log densities per datum                                           | 1 nat                                    |
"""
MEASURED = {
    "difference": "of probabilities or correlations",
    "sd": "of means of columns",
    "skewness": "of skewness",
    "kurtosis": "of kurtosis",
    "relative": "relative to the model's",
    "largest": "of the largest value, relative to the model's",
    "nats": "of log densities per datum",
}
EFFECT = "effect: "  # prefix of the units of an effect, which name its kind
SOUND = "sound"
UNTRUSTED = "reference not trustworthy"
MODE_MISSED = "mode missed"
COLLAPSED = "latents collapsed"
MISFIT = "model misfit"
OVERFITS = "encoder overfits"
ENCODER = "encoder falls short"
FAMILY = "family too small"
GUIDE = "guide falls short"


def certified(table: xr.Dataset) -> np.ndarray:
    """Return which data have an exact or certified reference, (N,)."""
    return np.asarray(np.isin(table["status"].values.astype(str), TRUSTED).any(1))


def bad_k(table: xr.Dataset) -> int:
    """Return the number of data whose k-hat is too large or unknown."""
    return int((~(column(table, "pareto_k") <= GOOD_K)).sum())


def known(table: xr.Dataset) -> np.ndarray:
    """Return which data have a value of log p(x) (exact or a trusted estimate) and a certified posterior, (N,)."""
    value = has_value(table) & ~np.isnan(column(table, "gap_total"))
    return value & certified(table) if table.sizes.get("reference") else value


def median(values: np.ndarray) -> tuple[float, float, float]:
    """Return the median and its distribution-free 95 % interval by order statistics; for few values, their range."""
    values = np.sort(values[~np.isnan(values)])
    n = values.size
    if not n:
        return math.nan, math.nan, math.nan
    below = max(0, math.floor(n / 2 - Z95 * math.sqrt(n) / 2))
    return float(np.median(values)), float(values[below]), float(values[n - 1 - below])


def mean_se(values: np.ndarray) -> tuple[float, float]:
    """Return the mean of the finite values and its standard error; NaN where undefined."""
    values = values[np.isfinite(values)]
    if not values.size:
        return math.nan, math.nan
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def effect_in_words(effect: float, kind: str) -> str:
    """Format a check's effect with its sign and unit."""
    if not math.isfinite(effect):
        return "not known"
    if kind in ("relative", "largest"):
        return f"{effect:+.0%}" if abs(effect) >= 0.1 else f"{effect:+.1%}"
    units = {"sd": " sd", "nats": " nat" if abs(effect) == 1 else " nats"}
    return f"{effect:+.2g}{units.get(kind, '')}"
