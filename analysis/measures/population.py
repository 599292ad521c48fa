"""Means over all rows of the data, where only a random part of them was audited: two-phase sampling.

A cheap proxy of the gap is known for all N rows (first phase), the gap itself for n of them, drawn at random (second phase).
With x the proxies, y the quantity, b the least-squares slope in the sample and bars for means,

    estimate = mean_n y + b (mean_N x - mean_n x) = sum_i w_i y_i

    variance = (1 - n / N) sum_i w_i^2 e_i^2 / (1 - h_i)^2 + (n / N) sum_i w_i^2 s_i^2

e_i are residuals, h_i their leverages, s_i the standard errors of y_i themselves (Saerndal, Swensson and Wretman 1992, Model
Assisted Survey Sampling, chapters 6 and 9; the residuals' weights are those of the jackknife). The estimator is unbiased up to
terms of order 1 / n whatever the relation of x and y; a good proxy makes it precise. The proxies are

    IWAE_S - ELBO,   log(1 + var(log w) / 2),   k-hat of w,      w = p(x, z) / q(z|x),  z ~ q

The second is the gap where log w is normal; the third says where the first, a lower bound, falls short of it. The interval is
about the rows of this file, N of them.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from scipy import stats

from elbowroom.analysis.measures.table import LARGE_GAP, Z95, column

PROXIES = ("proxy_iwae", "proxy_variance", "proxy_k")
QUANTITIES = {
    "gap_total": ("nats", "mean gap log p(x) - ELBO"),
    "gap_amortization": ("nats", "mean of what the encoder misses of its own family"),
    "gap_approximation": ("nats", "mean of what the guide's family cannot reach"),
    "gap_covariance": ("nats", "mean of what a full covariance would close"),
    "gap_shape": ("nats", "mean of what no normal can reach"),
    "log_evidence": ("nats", "mean log p(x)"),
    "gap_above_1_nat": ("1", "share of the data whose gap exceeds 1 nat"),
}
PER_PROXY = 8  # data in the sample for each proxy; with fewer, the plain mean
LEVEL = 0.95
SAMPLED = "in_sample"


def sampled(table: xr.Dataset) -> xr.Dataset:
    """Return the rows of an audit's table that are a random sample of the data: all, unless a budget cut the audit short.

    All of them too where the budget did not even suffice for a sample: the guide's own numbers are known for them.
    """
    rows = random_rows(table)
    return table if rows.all() else table.isel(obs_id=rows)


def random_rows(table: xr.Dataset) -> np.ndarray:
    """Return which rows `sampled` keeps, (N,)."""
    if SAMPLED not in table or not table[SAMPLED].values.any():
        return np.ones(table.sizes["obs_id"], dtype=bool)
    return np.asarray(table[SAMPLED].values.astype(bool))


def population(table: xr.Dataset) -> xr.Dataset:
    """Estimate means over all rows of an audit's table from those that were audited.

    Returns:
        Per `quantity`: `mean`, `se`, `lower` and `upper` of a 95 % interval, `count` of data that it rests on; attributes
        `rows` (N), `sample` (n) and `without_value`: sampled data that have no value of log p(x), for which the interval does
        not speak. NaN where fewer than two data have a value.
    """
    n = table.sizes["obs_id"]
    inside = table[SAMPLED].values.astype(bool) if SAMPLED in table else np.ones(n, dtype=bool)
    proxies = np.stack([column(table, name) for name in PROXIES], 1)
    gap, elbo = column(table, "gap_total"), column(table, "elbo")
    columns = {name: column(table, name) for name in QUANTITIES if name in table}
    columns["gap_above_1_nat"] = np.where(np.isfinite(gap), gap > LARGE_GAP, np.nan)
    found = []
    for name in QUANTITIES:
        value = columns.get(name, np.full(n, np.nan))
        if name == "log_evidence" and not inside.all() and np.isfinite(elbo).all():
            # the ELBO of all rows is known: only the gap is estimated
            found.append(_shifted(_mean(gap, proxies, inside, _error(table, "gap_total")), elbo))
        elif name == "gap_above_1_nat":
            found.append(_share(value, proxies, inside))
        else:
            found.append(_mean(value, proxies, inside, _error(table, name)))
    known = inside & np.isfinite(gap)
    names = ("mean", "se", "lower", "upper", "count")
    data = {name: ("quantity", np.array([row[k] for row in found])) for k, name in enumerate(names)}
    out = xr.Dataset(data, coords={"quantity": list(QUANTITIES)})
    out["count"] = out["count"].astype(int)
    out.attrs |= {"rows": n, "sample": int(inside.sum()), "without_value": int(inside.sum() - known.sum())}
    return out


def _error(table: xr.Dataset, name: str) -> np.ndarray:
    """Return the standard error of each datum's own value, (N,): half of its 95 % interval, which also holds a shortfall."""
    if name == "log_evidence":
        return column(table, "log_evidence_se")
    return (column(table, f"{name}_upper") - column(table, f"{name}_lower")) / (2 * Z95)


def _mean(y: np.ndarray, x: np.ndarray, inside: np.ndarray, error: np.ndarray) -> tuple[float, ...]:
    """Return mean, standard error, interval and count by the regression estimator, with as many proxies as the sample bears."""
    rows = inside & np.isfinite(y)
    n, total = int(rows.sum()), len(y)
    if n < 2:
        return (np.nan, np.nan, np.nan, np.nan, n)
    x = x[:, np.isfinite(x).all(0)][:, : n // PER_PROXY]
    centre = x[rows].mean(0)
    design = np.column_stack([np.ones(n), x[rows] - centre])
    pseudo = np.linalg.pinv(design)
    weight = np.concatenate([[1.0], x.mean(0) - centre]) @ pseudo
    leverage = np.minimum(np.einsum("ij,ji->i", design, pseudo), 0.99)
    residual = y[rows] - design @ (pseudo @ y[rows])
    own = np.nan_to_num(error[rows])
    # what is unknown of the rows outside the sample, and the errors of the values inside
    share = n / total
    variance = (1 - share) * np.sum((weight * residual / (1 - leverage)) ** 2) + share * np.sum((weight * own) ** 2)
    mean, se = float(weight @ y[rows]), float(np.sqrt(variance))
    width = Z95 if n == total else float(stats.t.ppf(0.5 + LEVEL / 2, max(n - design.shape[1], 1)))
    return (mean, se, mean - width * se, mean + width * se, n)


def _shifted(found: tuple[float, ...], elbo: np.ndarray) -> tuple[float, ...]:
    by = float(elbo.mean())
    mean, se, lower, upper, n = found
    return (mean + by, se, lower + by, upper + by, n)


def _share(y: np.ndarray, x: np.ndarray, inside: np.ndarray) -> tuple[float, ...]:
    """Return a share; where it is near 0 or 1, with the interval of Clopper and Pearson instead of the regression's."""
    mean, se, lower, upper, n = _mean(y, x, inside, np.zeros_like(y))
    if n < 2 or n == len(y):
        return (mean, se, lower, upper, n)
    few = int(np.nansum(y[inside]))
    if min(few, n - few) < PER_PROXY:
        exact = stats.binomtest(few, int(n)).proportion_ci(LEVEL, method="exact")
        return (few / n, float(np.sqrt(few * (n - few) / n) / n), float(exact.low), float(exact.high), n)
    return (min(max(mean, 0.0), 1.0), se, max(lower, 0.0), min(upper, 1.0), n)
