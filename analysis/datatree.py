"""A posterior as a DataTree in ArviZ's schema, made by ArviZ; `idata.py` says what the groups are, and needs no ArviZ."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import arviz_base
import numpy as np
import xarray as xr

from elbowroom.analysis.idata import file_names, narrowed, site_dims

if TYPE_CHECKING:
    from elbowroom.inference.posterior import Posterior

PROBABILITIES = 2**23  # largest number of data x joint values stored in a file: 64 MB


def to_datatree(
    posterior: Posterior,
    *,
    obs_id: Sequence[int],
    observed: Mapping[str, np.ndarray] | None = None,
    assignments: Mapping[str, np.ndarray] | None = None,
    attrs: Mapping[str, str] | None = None,
) -> xr.DataTree:
    """Convert a posterior to a DataTree in ArviZ's schema.

    Args:
        posterior: of N data.
        obs_id: N labels of the data.
        observed: observed sites, name -> (N, ...).
        assignments: values of the discrete sites in each of their A joint values, name -> (A, ...).
        attrs: attributes of the file.
    """
    observed = _file_names(observed or {}, 1)
    draws = {name: _compact(value.cpu().numpy()) for name, value in _file_names(posterior.sites, 3).items()}
    stats = {name: value.cpu().numpy().astype(np.float64) for name, value in posterior.sample_stats.items()}
    dims = {name: ["obs_id", *site_dims(name, value.shape[3:])] for name, value in draws.items()}
    dims |= {name: ["obs_id"] for name in stats}
    dims |= {name: ["obs_id", *(f"{name}_dim_{i}" for i in range(value.ndim - 1))] for name, value in observed.items()}
    groups: dict[str, dict[str, np.ndarray]] = {"posterior": draws, "sample_stats": stats, "observed_data": observed}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Found chain dimension", UserWarning)  # few draws are kept of very many data
        tree = arviz_base.from_dict(
            {name: group for name, group in groups.items() if group},
            dims=dims,
            coords={"obs_id": np.asarray(obs_id)},
            attrs={"/": {"method": posterior.method, **(attrs or {})}},
        )
    if posterior.mean is not None and posterior.covariance is not None:
        moments = xr.Dataset(
            {
                "mean": (("obs_id", "coordinate"), posterior.mean.cpu().numpy()),
                "covariance": (("obs_id", "coordinate", "coordinate_"), posterior.covariance.cpu().numpy()),
            },
            coords={"obs_id": np.asarray(obs_id)},
            attrs={"description": "posterior mean and covariance in unconstrained coordinates"},
        )
        tree["moments"] = xr.DataTree(moments)
    probabilities = posterior.stats.get("probabilities")
    if probabilities is not None and probabilities.numel() <= PROBABILITIES:
        values = _file_names(assignments or {}, 1)
        exact = xr.Dataset(
            {"probability": (("obs_id", "assignment"), probabilities.cpu().numpy())},
            coords={
                "obs_id": np.asarray(obs_id),
                **{name: (("assignment", *site_dims(name, value.shape[1:])), value) for name, value in values.items()},
            },
            attrs={"description": "exact probability of each joint value of the discrete sites, whose values are coordinates"},
        )
        tree["assignments"] = xr.DataTree(exact)
    return tree


def _compact(draws: np.ndarray) -> np.ndarray:
    """Halve the bytes of draws where their values allow it."""
    return narrowed(draws, np.dtype(np.int32 if np.issubdtype(draws.dtype, np.integer) else np.float32))


def _file_names(sites: Mapping[str, Any], lead: int) -> dict[str, Any]:
    """Rename sites as `file_names` says; values have `lead` dimensions before a site's own."""
    names = file_names({name: value.shape[lead:] for name, value in sites.items()})
    return {names[name]: value for name, value in sites.items()}
