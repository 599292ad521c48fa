"""Means over all rows from a random sample of them: the intervals hold what they promise, and a proxy makes them short."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from elbowroom.analysis.measures.population import PROXIES, QUANTITIES, population, sampled
from elbowroom.analysis.measures.table import Z95

N, REPEATS = 2_000, 400


def world(seed: int, good: bool = True) -> xr.Dataset:
    """Skew gaps of N rows with their proxies, which follow them closely or not at all."""
    rng = np.random.default_rng(seed)
    gap = rng.gamma(2.0, 1.5, N)
    like = gap if good else rng.permutation(gap)
    elbo = -90 + 20 * rng.standard_normal(N)
    return xr.Dataset(
        {
            "elbo": ("obs_id", elbo),
            "elbo_se": ("obs_id", np.full(N, 0.02)),
            "log_evidence": ("obs_id", elbo + gap),
            "log_evidence_se": ("obs_id", np.full(N, 0.04)),
            "gap_total": ("obs_id", gap),
            "gap_total_lower": ("obs_id", gap - Z95 * np.hypot(0.02, 0.04)),
            "gap_total_upper": ("obs_id", gap + Z95 * np.hypot(0.02, 0.04)),
            "gap_amortization": ("obs_id", 0.6 * gap),
            "gap_amortization_lower": ("obs_id", 0.6 * gap - Z95 * 0.3),
            "gap_amortization_upper": ("obs_id", 0.6 * gap + Z95 * 0.3),
            "proxy_iwae": ("obs_id", 0.7 * like + 0.1 * like**1.5 + 0.3 * rng.standard_normal(N)),
            "proxy_variance": ("obs_id", np.log1p(like * rng.lognormal(0.0, 0.4, N))),
            "proxy_k": ("obs_id", 0.3 + 0.1 * like + 0.2 * rng.standard_normal(N)),
        },
        coords={"obs_id": np.arange(N)},
    )


def seen(whole: xr.Dataset, rows: np.ndarray) -> xr.Dataset:
    """What an audit of these rows knows."""
    inside = np.isin(np.arange(N), rows)
    hidden = {name: whole[name].where(inside) for name in ("log_evidence", "log_evidence_se", "gap_total", "gap_amortization")}
    return whole.assign(hidden).assign(in_sample=("obs_id", inside.astype(float)))


@pytest.mark.parametrize("n", [12, 60])
@pytest.mark.parametrize("good", [True, False])
def test_intervals_cover_the_mean_of_all_rows(n: int, good: bool) -> None:
    whole, rng = world(1, good), np.random.default_rng(2)
    assert set(PROXIES) <= set(whole)
    truth = {
        "gap_total": float(whole["gap_total"].mean()),
        "gap_amortization": float(whole["gap_amortization"].mean()),
        "log_evidence": float(whole["log_evidence"].mean()),
        "gap_above_1_nat": float((whole["gap_total"] > 1).mean()),
    }
    hits = dict.fromkeys(truth, 0)
    for _ in range(REPEATS):
        found = population(seen(whole, rng.permutation(N)[:n]))
        for name, value in truth.items():
            row = found.sel(quantity=name)
            hits[name] += bool(row["lower"] <= value <= row["upper"])
    least = 0.95 - 4.5 * np.sqrt(0.95 * 0.05 / REPEATS) - (0.02 if n == 12 else 0.0)  # of a skew quantity, by 12 data
    assert min(hits.values()) / REPEATS > least, hits


def test_a_good_proxy_shortens_the_interval_and_a_bad_one_costs_nothing() -> None:
    rows = np.random.default_rng(3).permutation(N)[:80]
    width = {}
    for good in (True, False):
        whole = world(4, good)
        row = population(seen(whole, rows)).sel(quantity="gap_total")
        width[good] = float(row["se"])
        plain = float(whole["gap_total"].values[rows].std(ddof=1)) / np.sqrt(80)
    assert width[True] < 0.4 * plain
    assert width[False] < 1.15 * plain


def test_log_p_of_all_rows_rests_on_the_elbo_of_all_rows() -> None:
    """The ELBO varies by 20 nats from row to row and is known for all: the error is that of the gap."""
    found = population(seen(world(5), np.arange(0, N, 40)))
    assert float(found["se"].sel(quantity="log_evidence")) == pytest.approx(float(found["se"].sel(quantity="gap_total")))


def test_all_rows_leave_only_the_errors_of_the_values() -> None:
    whole = world(6)
    found = population(whole)
    assert found.attrs == {"rows": N, "sample": N, "without_value": 0}
    row = found.sel(quantity="gap_total")
    assert float(row["mean"]) == pytest.approx(float(whole["gap_total"].mean()))
    errors = {"gap_total": np.hypot(0.02, 0.04), "gap_amortization": 0.3, "log_evidence": 0.04}  # each quantity its own
    for name, error in errors.items():
        assert float(found["se"].sel(quantity=name)) == pytest.approx(error / np.sqrt(N)), name
    assert sampled(whole) is whole


def test_shares_near_the_end_have_an_exact_interval_and_what_is_unknown_is_counted() -> None:
    whole = world(7)
    table = seen(whole.assign(gap_total=whole["gap_total"] * 0.01), np.arange(30))
    table["gap_total"][:3] = np.nan
    found = population(table)
    assert found.attrs == {"rows": N, "sample": 30, "without_value": 3}
    row = found.sel(quantity="gap_above_1_nat")
    assert float(row["mean"]) == float(row["lower"]) == 0.0
    assert float(row["upper"]) == pytest.approx(1 - 0.025 ** (1 / 27), rel=1e-6)
    assert int(row["count"]) == 27
    assert sampled(table).sizes["obs_id"] == 30


def test_too_few_data_give_no_number() -> None:
    found = population(seen(world(8), np.arange(1)))
    assert found["mean"].isnull().all()
    assert list(found["quantity"].values) == list(QUANTITIES)
