"""Helpers for figures of data x: groups of `latent.nc`, images, sequences, units and labels of entries."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from elbowroom.models.columns import image_shape

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW_ROWS = 100  # with fewer rows the sd has an error of more than 7 %
NO_LATENT = "the run folder has no latent.nc, which describes the decoder: run the audit again to make it"


def group(latent: xr.DataTree | None, name: str) -> xr.Dataset | None:
    """Return one group of latent.nc, None where it is missing."""
    return latent[name].to_dataset() if latent is not None and name in latent.children else None


def event_image(latent: xr.DataTree | None) -> tuple[int, int] | None:
    """Return (height, width) where the data are images."""
    if latent is None or "event_shape" not in latent.attrs or latent.attrs.get("sequence"):
        return None
    return image_shape(np.atleast_1d(latent.attrs["event_shape"]).tolist(), latent.attrs.get("image_shape"))


def event_sequence(latent: xr.DataTree | None) -> tuple[int, int] | None:
    """Return (steps, features) where the data are sequences: two-dimensional, but not images."""
    if latent is None or "event_shape" not in latent.attrs or event_image(latent) is not None:
        return None
    event = [int(n) for n in np.atleast_1d(latent.attrs["event_shape"])]
    return (event[0], event[1]) if len(event) == 2 else None


def mean_over(x: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean over finite values; NaN where there is none."""
    seen = np.isfinite(x)
    with np.errstate(invalid="ignore"):
        return np.where(seen, x, 0.0).sum(axis) / seen.sum(axis)


def in_units(latent: xr.DataTree | None, x: np.ndarray) -> np.ndarray:
    """Return entries (N, entry) of a table in standard deviations of the audited data; other data unchanged."""
    data = group(latent, "reconstruction")
    if latent is None or data is None or "columns" not in latent.attrs:
        return x
    sd = data["x_sd"].values.ravel()
    return (x - data["x_mean"].values.ravel()) / np.where(sd > 0, sd, 1.0)


def units_of_rows(latent: xr.DataTree | None) -> str:
    """Return a sentence on the units of a table for the end of a caption; empty for other data."""
    rows = group(latent, "encoding")
    if latent is None or rows is None or "columns" not in latent.attrs:
        return ""
    n = rows.sizes["obs_id"]
    text = f" Mean and sd of each column, its units here, are those of the {n} audited rows"
    return f"{text}: so few that they are uncertain themselves." if n < FEW_ROWS else f"{text}."


def name_entries(axes: Axes, latent: xr.DataTree | None) -> None:
    """Label the entries of x by a table's column names, where they fit."""
    from matplotlib.ticker import MaxNLocator

    names = [] if latent is None else [str(name) for name in np.atleast_1d(latent.attrs.get("columns", []))]
    axes.set(xlabel="entry of x", ylabel="x (sd of the data)" if names else "x (data units)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if 0 < len(names) <= 20:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=7)
        axes.set_xlabel("")
