"""Access to an audit's table: columns that may be missing, the best reference, and the data that it can be trusted for."""

from __future__ import annotations

import numpy as np
import xarray as xr

GOOD_K = 0.7
SMALL_GAP, LARGE_GAP = 0.1, 1.0  # nats; exp(-0.1) = 0.90 of the evidence is in the bound
Z95 = 1.959963984540054  # half width of a 95 % interval, in standard errors of a normal
FEW = 0.05  # share of the data
LEVEL = 0.005  # familywise, of the checks of the model
UNUSED = 0.01  # nats of rate, and as much of other measures, below which a latent carries nothing
MISSED = 0.05  # posterior mass above which a missed mode is reported
TRUSTED = ("exact", "certified")


def column(table: xr.Dataset, name: str) -> np.ndarray:
    """Return a per-datum variable of the audit, (N,), NaN where the audit lacks it."""
    return table[name].values.astype(float) if name in table else np.full(table.sizes["obs_id"], np.nan)


def best_reference(table: xr.Dataset) -> str | None:
    """Return the reference that is exact or certified for the most data (the first of equals), or None."""
    if "reference" not in table.dims or not table.sizes["reference"] or "status" not in table:
        return None
    trusted = np.isin(table["status"].values.astype(str), TRUSTED).sum(0)
    return str(table["reference"].values[int(np.argmax(trusted))]) if trusted.any() else None


def trusted(table: xr.Dataset, reference: str | None) -> np.ndarray:
    """Return which data the reference is exact or certified for, (N,)."""
    if reference is None:
        return np.zeros(table.sizes["obs_id"], dtype=bool)
    return np.isin(table["status"].sel(reference=reference).values.astype(str), TRUSTED)


def needed(table: xr.Dataset, reference: str) -> np.ndarray:
    """Return the data that a reference was meant for: not those for which a better one is exact, (N,)."""
    return np.asarray(table["status"].sel(reference=reference).values.astype(str) != "not needed")


def in_words(reference: str) -> str:
    """Return a reference's name as an adjective."""
    return {"closed_form": "closed-form", "grid": "exact grid"}.get(reference, reference)
