"""Expectations under the guide and under a reference: E_q f(z) against E_p f(z) per datum, for any f, with errors.

    difference = (1/S) sum_s f(z_s) - (1/K) sum_k f(z'_k),   z_s ~ q(z|x), z'_k ~ p(z|x)
    error^2 = var_q f / S + MCSE_p^2                          the draws of guide and reference are independent

For Markov chains, MCSE uses their effective sample size (Vehtari et al. 2021, https://doi.org/10.1214/20-BA1221). For K draws
resampled from weighted particles, MCSE^2 = var_p f (1 / K + 1 / ESS): two draws are the same particle with probability sum w^2
= 1 / ESS, which is estimated by the share of equal pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis import idata
from elbowroom.inference.mcmc.diagnostics import mcse_mean

CHAINS = ("hmc",)
RESAMPLED = ("importance", "ais")


def expectations(f: Callable[[xr.Dataset], xr.DataArray], q_tree: Any, p_tree: Any) -> xr.Dataset:
    """Compare a function's expectation under the guide with that under a reference.

    Example:
        >>> audit = er.audit(model, guide, x)                                                             # doctest: +SKIP
        >>> expectations(lambda s: s["z"][..., 0] > 0, audit.posteriors["guide"], audit.posteriors["grid"])  # doctest: +SKIP

    Args:
        f: given the sites (`posterior` of a tree: name -> (chain, draw, obs_id, ...)), returns numbers or truth values of each
            draw, (chain, draw, obs_id, ...); such as decoded means, a contrast, a probability.
        q_tree: the guide's posterior, in ArviZ's layout (posteriors/guide.nc, or `Audit.posteriors["guide"]`), as a DataTree
            or as an InferenceData.
        p_tree: a reference's, with some of the same data.

    Returns:
        Over obs_id (the data in both trees) and f's further dimensions, in the units of f: `guide` = E_q f, `reference` = E_p
        f, each with `_se`; `difference` = E_q f - E_p f with `difference_se`; `z` = difference / difference_se. Over the
        further dimensions: `mean_difference` over the data with `mean_difference_se`. `guide_lost`, `reference_lost`: number of
        draws at which f is NaN or infinite; the expectation is then NaN and left out of the mean (`lost`: number of such data).
        Which posteriors can be trusted is not shown here: see `status` of the audit's table.

    Raises:
        ValueError: f does not keep the dimensions chain, draw and obs_id, or the two have no datum in common.
    """
    q_tree, p_tree = idata.tree_of(q_tree), idata.tree_of(p_tree)
    q, p = (_values(f, tree) for tree in (q_tree, p_tree))
    q, p = xr.align(q, p, join="inner", exclude=("chain", "draw"))
    if not q.sizes["obs_id"]:
        raise ValueError("the two posteriors have no datum in common")
    rest = [str(dim) for dim in q.dims[2:]]
    coords = {name: value for name, value in q.coords.items() if set(value.dims) <= set(rest)}
    columns: dict[str, np.ndarray] = {}
    for name, values, tree in (("guide", q, q_tree), ("reference", p, p_tree)):
        draws = torch.as_tensor(values.transpose(*q.dims).values.copy()).double()
        columns |= _moments(name, draws, tree, q["obs_id"].values)
    difference = columns["guide"] - columns["reference"]
    error = np.hypot(columns["guide_se"], columns["reference_se"])
    with np.errstate(divide="ignore", invalid="ignore"):
        columns |= {"difference": difference, "difference_se": error, "z": difference / error}
        known = np.isfinite(difference) & np.isfinite(error)
        count = known.sum(0)
        mean = np.where(known, difference, 0).sum(0) / count
        mean_error = np.sqrt(np.square(np.where(known, error, 0)).sum(0)) / count
    over = {name: (rest, value) for name, value in columns.items()}
    over |= {"mean_difference": (rest[1:], mean), "mean_difference_se": (rest[1:], mean_error)}
    over["lost"] = (rest[1:], len(known) - count)
    methods = {"guide": str(q_tree.attrs.get("method", "")), "reference": str(p_tree.attrs.get("method", ""))}
    table = xr.Dataset(over, coords=coords, attrs=methods)
    for name, words in LONG_NAMES.items():
        table[name].attrs["long_name"] = words
    return table


LONG_NAMES = {
    "guide": "E_q f(z)",
    "guide_se": "standard error of guide",
    "guide_lost": "draws of the guide at which f is not finite",
    "reference": "E_p f(z)",
    "reference_se": "Monte Carlo standard error of reference",
    "reference_lost": "draws of the reference at which f is not finite",
    "difference": "E_q f(z) - E_p f(z)",
    "difference_se": "standard error of difference",
    "z": "difference in standard errors",
    "mean_difference": "mean of difference over the data",
    "mean_difference_se": "standard error of mean_difference for these data",
    "lost": "data without a finite difference",
}


def _values(f: Callable[[xr.Dataset], xr.DataArray], tree: xr.DataTree) -> xr.DataArray:
    found = f(tree["posterior"].to_dataset())
    missing = [name for name in ("chain", "draw", "obs_id") if name not in getattr(found, "dims", ())]
    if missing:
        raise ValueError(f"f must keep the dimensions chain, draw and obs_id; its result lacks {', '.join(missing)}")
    return found.transpose("chain", "draw", "obs_id", ...)


def _moments(name: str, values: Tensor, tree: xr.DataTree, rows: np.ndarray) -> dict[str, np.ndarray]:
    """Return mean, standard error and number of non-finite values of draws (chain, draw, obs_id, ...)."""
    lost = (~values.isfinite()).sum((0, 1))
    mean = values.mean((0, 1)).masked_fill(lost > 0, torch.nan)
    total, method = values.shape[0] * values.shape[1], tree.attrs.get("method")
    spread = values.flatten(0, 1).std(0) if total > 1 else torch.full_like(mean, torch.nan)
    if method in CHAINS:
        error = mcse_mean(values)
    else:
        repeats = _repeats(tree, rows) if method in RESAMPLED else torch.zeros(len(mean), dtype=torch.float64)
        error = spread * (1 / total + repeats).sqrt().reshape(-1, *(1,) * (mean.dim() - 1))
    error = torch.where(spread == 0, 0.0, error).masked_fill(lost > 0, torch.nan)
    return {name: mean.numpy(), f"{name}_se": error.numpy(), f"{name}_lost": lost.numpy()}


def _repeats(tree: xr.DataTree, rows: np.ndarray) -> Tensor:
    """Return the share of pairs of draws that are the same particle (have the same log p(x, z)), (obs_id,)."""
    lp = tree["sample_stats"].to_dataset()["lp"].sel(obs_id=rows).transpose("chain", "draw", "obs_id")
    flat = torch.as_tensor(lp.values.copy()).flatten(0, 1).sort(0).values
    total = len(flat)
    place = torch.arange(total)[:, None].expand_as(flat)
    new = torch.ones_like(flat, dtype=torch.bool)
    new[1:] = flat[1:] != flat[:-1]
    first = torch.where(new, place, 0).cummax(0).values
    return (place - first).sum(0) / max(1.0, total * (total - 1) / 2)  # pairs: each draw with all equal ones before it
