"""ArviZ's schema: the only module that touches ArviZ's data structures.

A posterior becomes a DataTree with groups posterior (sites in constrained space; dims chain, draw, obs_id, then the site's
own), sample_stats, observed_data, and moments (unconstrained mean and covariance, where known better than from the draws).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import arviz_base
import numpy as np
import xarray as xr

from elbowroom.files import atomic
from elbowroom.inference.posterior import Posterior


def to_datatree(
    posterior: Posterior,
    *,
    obs_id: Sequence[int],
    observed: Mapping[str, np.ndarray] | None = None,
    attrs: Mapping[str, str] | None = None,
) -> xr.DataTree:
    """Convert a posterior to ArviZ's schema.

    Args:
        posterior: of N data.
        obs_id: N labels of the data.
        observed: observed sites, name -> (N, ...).
        attrs: attributes of the file.

    Returns:
        A DataTree that every ArviZ function reads.
    """
    observed = dict(observed or {})
    draws = {name: value.cpu().numpy().astype(np.float32) for name, value in posterior.sites.items()}
    stats = {name: value.cpu().numpy().astype(np.float64) for name, value in posterior.sample_stats.items()}
    dims = {name: ["obs_id", *_site_dims(name, value.shape[3:])] for name, value in draws.items()}
    dims |= {name: ["obs_id"] for name in stats}
    dims |= {name: ["obs_id", *(f"{name}_dim_{i}" for i in range(value.ndim - 1))] for name, value in observed.items()}
    groups: dict[str, dict[str, np.ndarray]] = {"posterior": draws, "sample_stats": stats, "observed_data": observed}
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
    return tree


def _site_dims(name: str, shape: tuple[int, ...]) -> list[str]:
    return ["latent"] if name == "z" and len(shape) == 1 else [f"{name}_dim_{i}" for i in range(len(shape))]


def write(tree: xr.DataTree | xr.Dataset, path: str | Path) -> None:
    """Write a DataTree or Dataset to a netCDF file, whole or not at all."""
    with atomic(path) as temporary:
        tree.to_netcdf(temporary, engine="h5netcdf")


def read(path: str | Path) -> xr.DataTree:
    """Read a DataTree into memory and close the file."""
    with xr.open_datatree(path, engine="h5netcdf") as tree:
        return tree.load()
