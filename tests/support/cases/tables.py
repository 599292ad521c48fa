"""Tables of audits, of certified data without a gap but for what is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

N = 40
UNKNOWN = {"gap_amortization": np.nan, "gap_covariance": np.nan, "gap_shape": np.nan}


def table(**columns: Any) -> xr.Dataset:
    """Return an audit's table of N certified data without a gap, but for what is given."""
    rng = np.random.default_rng(1)
    base: dict[str, Any] = {
        "log_evidence": np.full(N, -10.0),
        "log_evidence_se": np.full(N, 1e-6),
        "elbo_se": np.full(N, 0.002),
        "gap_amortization": 0.001 * rng.random(N),
        "gap_covariance": 0.001 * rng.random(N),
        "gap_shape": 0.001 * rng.random(N),
        "missed_mass": np.zeros(N),
    }
    base |= {name: np.broadcast_to(np.asarray(value, dtype=float), N).copy() for name, value in columns.items() if name in base}
    approximation = base["gap_covariance"] + base["gap_shape"]
    gap = np.asarray(columns.get("gap_total", base["gap_amortization"] + approximation), dtype=float)
    spread = 2 * base["elbo_se"]
    base |= {"gap_approximation": approximation, "gap_total": gap, "gap_total_lower": gap - spread}
    status = np.broadcast_to(np.asarray(columns.get("status", "exact")), N)
    return xr.Dataset(
        {**{name: ("obs_id", value) for name, value in base.items()}, "status": (("obs_id", "reference"), status[:, None])},
        coords={"obs_id": np.arange(N), "reference": ["grid"]},
    )
