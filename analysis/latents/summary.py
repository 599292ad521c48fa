"""The description of the decoder that the report needs, stored in `latent.nc`, so that a report needs no weights.

Every group is small (a few megabytes at most) and consists of arrays with named dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.analysis.latents.decoding import (
    DRAWS,
    array,
    beside_of,
    draw_guide,
    draw_prior,
    event_dims,
    is_standard,
    moments,
    plane,
    rates,
    repeated,
    take,
)
from elbowroom.inference.program.sites import is_real
from elbowroom.inference.target.discrete import table as table_of
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.vae import VAE, Batch

MOST_STATES = 64
CASES = ("best", "typical", "worst")
_ZOOM = 8.0  # nats below the maximum at which a density picture may end: 4 standard deviations of a normal


def describe(
    vae: VAE,
    batch: Tensor | Mapping[str, Tensor],
    table: xr.Dataset,
    labels: np.ndarray | None = None,
    *,
    image_shape: tuple[int, int] | None = None,
    columns: Sequence[str] = (),
    plane_points: int = 15,
    samples: int = 30,
    reconstructions: int = 10,
    density_points: int = 161,
    seed: int = 0,
) -> xr.DataTree:
    """Describe the decoder and the guide, for a report that is made without them.

    Args:
        vae: the fitted VAE. It is not changed.
        batch: the audited data, x (N, *event), in the order of `table.obs_id`, with covariates and exposure by name.
        table: the audit's table (`Audit.table`), over `obs_id`; its `gap_total` determines which data are shown.
        labels: one label for each datum, (N,), used only for colours.
        image_shape: (height, width) when a flat datum is an image; None lets the report decide.
        columns: names of the columns, where a datum is a row of a table.
        plane_points: points per side of the plane of E[x|z].
        samples: draws from the prior.
        reconstructions: data to reconstruct, spread over the distribution of the gap.
        density_points: points per side of each density picture (d = 2); a line (d = 1) has five times as many.
        seed: seed of the draws. The global random state is not changed.

    Returns:
        A DataTree, latents counted from 0, log densities in nats. Its attributes: the `space` of z, whether the prior is the
        `standard` normal, and whether a datum is a `sequence` (T, F).

        * `encoding`: loc, scale (obs_id, latent), moments of q(z|x); rate (latent): mean over data of the KL from the prior of
          the guide's margin, as a normal with the same moments (discrete latents: exactly); label (obs_id) where there are
          labels; prior_z (point, latent), draws from the prior
        * `plane`: expected_x (row, column, *event), E[x|z] at prior quantiles z_row, z_column of the two latents with the
          highest rate (attribute `latents`: of the columns, of the rows; the smaller index first), the others at the prior's
          median; d = 1: expected_x (column, *event). One-hot z, and z on a simplex: expected_x (column, *event) of each
          category (vertex); on a sphere of the angle in degrees from the first of two latents to the second, d = 3: and of the
          third latent. Covariates are at their mean
        * `prior`: z (sample, latent), expected_x and x (sample, *event), draws from p(z) p(x|z)
        * `reconstruction`: x and expected_x (obs_id, *event), expected_x = E_q E[x|z] over 200 draws; gap (obs_id); x_mean and
          x_sd (*event) over all audited data
        * `density` (one or two unconstrained coordinates, if any gap is known): log_posterior, log_guide (case, row, column),
          normalised, in unconstrained coordinates; axes z_row (case, row), z_column (case, column); gap, obs_id, log_evidence
          (case), the last by quadrature over the picture itself; x (case, *event); one coordinate: without row
        * `states` (all latents discrete, at most 64 joint values): posterior, guide (case, state), the probability of each
          joint value; gap, obs_id (case)

    Raises:
        ValueError: x, table and labels differ in length.
    """
    obs_id, rows = np.asarray(table["obs_id"].values), dict(batch) if isinstance(batch, Mapping) else {"x": batch}
    n = len(rows["x"])
    if n != len(obs_id) or (labels is not None and len(labels) != n):
        sizes = f"x {n}, table {len(obs_id)}" + ("" if labels is None else f", labels {len(labels)}")
        raise ValueError(f"describe needs one row for each datum: {sizes}")
    parameter = next(vae.parameters())
    rows = {name: value.to(device=parameter.device, dtype=parameter.dtype) for name, value in rows.items()}
    gap = np.asarray(table["gap_total"].values, dtype=float)
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        encoding = _encoding(vae, rows, obs_id, labels)
        groups = {
            "encoding": encoding,
            "plane": plane(vae, rows, encoding["rate"].values, plane_points),
            "prior": _prior(vae, rows, samples),
            "reconstruction": _reconstruction(vae, rows, obs_id, gap, np.asarray(table["elbo"].values), reconstructions),
        }
        if np.isfinite(gap).any():
            cases = spread(gap, len(CASES))
            log_joint = _seam(vae, take(rows, cases))
            if log_joint.dim == 0 and len(log_joint.program.assignments) <= MOST_STATES:
                groups["states"] = _states(log_joint, obs_id, gap, cases)
            elif log_joint.dim in (1, 2):
                groups["density"] = _density(vae, log_joint, obs_id, gap, cases, density_points)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update({"latent_dim": vae.prior.latent_dim, "event_shape": list(vae.likelihood.event_shape) or [1]})
    tree.attrs.update({"space": vae.prior.space, "standard": int(is_standard(vae))})
    if any(getattr(network, "sequences", False) for network in (vae.decoder, vae.posterior.encoder)):
        tree.attrs["sequence"] = 1  # distinguishes sequences from images, which also have two axes
    if columns:
        tree.attrs["columns"] = list(columns)
    if image_shape is not None:
        tree.attrs["image_shape"] = list(image_shape)
    return tree


def _seam(vae: VAE, batch: Batch) -> LogJoint:
    beside: dict[str, Any] = {name: value for name, value in batch.items() if name != "x"}
    return LogJoint(vae.model, vae.guide, batch["x"], **beside)


def _encoding(vae: VAE, batch: Batch, obs_id: np.ndarray, labels: np.ndarray | None) -> xr.Dataset:
    loc, scale = moments(vae, batch)
    z = draw_prior(vae, DRAWS, batch)
    rate = rates(vae, loc, scale, z)
    encoding = xr.Dataset(
        {
            "loc": (("obs_id", "latent"), array(loc), {"long_name": "mean of q(z|x)"}),
            "scale": (("obs_id", "latent"), array(scale), {"long_name": "standard deviation of q(z|x)"}),
            "rate": (("latent",), array(rate), {"long_name": "mean KL from the prior, by latent", "units": "nats"}),
            "prior_z": (("point", "latent"), array(z[:1000]), {"long_name": "draws from the prior"}),
        },
        coords={"obs_id": obs_id, "latent": np.arange(loc.shape[-1])},
    )
    if labels is not None:
        encoding["label"] = ("obs_id", np.asarray(labels))
    return encoding


def _prior(vae: VAE, batch: Batch, samples: int) -> xr.Dataset:
    """Draw z from the prior and x from the decoder; with covariates, at those of the data, cyclically."""
    z, beside = draw_prior(vae, samples, batch), beside_of(batch, samples)
    p = vae.decode(z, **beside)
    dims = ("sample", *event_dims(vae))
    return xr.Dataset(
        {
            "z": (("sample", "latent"), array(z)),
            "expected_x": (dims, array(vae.likelihood.centre(p))),
            "x": (dims, array(p.sample())),
        }
    )


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of `count` finite values at evenly spaced ranks, smallest first."""
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    if len(order) <= count:
        return order
    return order[np.linspace(0, len(order) - 1, count).round().astype(int)]


def _reconstruction(
    vae: VAE, batch: Batch, obs_id: np.ndarray, gap: np.ndarray, elbo: np.ndarray, count: int, draws: int = 200
) -> xr.Dataset:
    """Return data spread over the gap (or -ELBO) with their E_q E[x|z], from 200 draws of q."""
    index = spread(gap if np.isfinite(gap).any() else -elbo, count)
    few = take(batch, index)
    beside = {name: value for name, value in repeated(few, draws).items() if name != "x"}
    expected = vae.centre(draw_guide(vae, few, draws).flatten(0, 1), **beside).unflatten(0, (draws, len(index))).mean(0)
    x, dims = batch["x"].double(), ("obs_id", *event_dims(vae))
    centred = x - x.nanmean(0)
    return xr.Dataset(
        {
            "x_mean": (dims[1:], array(x.nanmean(0))),
            "x_sd": (dims[1:], array(centred.square().nanmean(0).sqrt())),
            "x": (dims, array(few["x"])),
            "expected_x": (dims, array(expected)),
            "gap": ("obs_id", gap[index], {"units": "nats", "long_name": "log p(x) - ELBO"}),
        },
        coords={"obs_id": obs_id[index]},
    )


def _states(log_joint: LogJoint, obs_id: np.ndarray, gap: np.ndarray, index: np.ndarray) -> xr.Dataset:
    """Return the probability of each joint value under posterior and guide, for the smallest, median and largest gap."""
    found = table_of(log_joint)
    return xr.Dataset(
        {
            "posterior": (("case", "state"), array(found.log_posterior.exp().T)),
            "guide": (("case", "state"), array(found.log_guide.exp().T)),
            "gap": (("case",), gap[index], {"units": "nats", "long_name": "log p(x) - ELBO"}),
            "obs_id": (("case",), obs_id[index]),
        },
        coords={"case": _cases(index)},
    )


def _cases(index: np.ndarray) -> np.ndarray:
    return np.array(CASES if len(index) == len(CASES) else CASES[-len(index) :], dtype=object)


def _grid(low: Tensor, high: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Return axes (points, case, d) of a regular box for each case, and the product grid (points**d, case, d)."""
    t = torch.linspace(0, 1, points, dtype=low.dtype, device=low.device)
    axes = low + t[:, None, None] * (high - low)
    if axes.shape[-1] == 1:
        return axes, axes
    column = axes[None, :, :, 0].expand(points, points, -1)
    row = axes[:, None, :, 1].expand(points, points, -1)
    return axes, torch.stack([column, row], -1).flatten(0, 1)


def _shrink(z: Tensor, log_density: Tensor, step: Tensor, depth: float) -> tuple[Tensor, Tensor]:
    """Return, for each case, the box (case, d) of the points within `depth` nats of the maximum, one step wider."""
    inside = (log_density > log_density.max(0).values - depth)[..., None]
    low = torch.where(inside, z, torch.inf).amin(0) - step
    high = torch.where(inside, z, -torch.inf).amax(0) + step
    return low, high


def _density(vae: VAE, log_joint: LogJoint, obs_id: np.ndarray, gap: np.ndarray, index: np.ndarray, points: int) -> xr.Dataset:
    """Return exact posterior and guide densities on a box that holds both, for the smallest, median and largest gap.

    The box starts at the ranges of prior and guide and shrinks to the points within 12 nats of the posterior's maximum, or near
    the guide. The posterior is normalised by quadrature over the final box, independently of the audit's references.
    """
    d = log_joint.dim
    q, extent = log_joint.sample_guide(4096, 0)[0], log_joint.sample_prior(4096, 1).flatten(0, 1)
    loc, scale = q.mean(0), q.std(0)
    low = torch.minimum(loc - 6 * scale, extent.amin(0) - 1)
    high = torch.maximum(loc + 6 * scale, extent.amax(0) + 1)
    coarse = 121 if d == 2 else 2001
    for _ in range(3):
        _, z = _grid(low, high, coarse)
        low, high = _shrink(z, log_joint(z), (high - low) / (coarse - 1), 1.5 * _ZOOM)
    low, high = torch.minimum(low, loc - 4.5 * scale), torch.maximum(high, loc + 4.5 * scale)
    points = points if d == 2 else 5 * points
    axes, z = _grid(low, high, points)
    log_p, log_q = log_joint(z), log_joint.log_guide(z)
    cell = ((high - low) / (points - 1)).log().sum(-1)
    log_evidence = torch.logsumexp(log_p, 0) + cell
    shape = (points,) * d + (len(index),)
    dims = ("case", "row", "column")[:: 2 if d == 1 else 1]
    order = (-1, *range(d))

    def picture(log_density: Tensor) -> tuple[tuple[str, ...], np.ndarray]:
        return dims, array(log_density.reshape(shape).permute(order)).clip(-1e4)

    data = {
        "log_posterior": picture(log_p - log_evidence),
        "log_guide": picture(log_q),
        "log_evidence": (("case",), array(log_evidence), {"units": "nats", "long_name": "log p(x), by quadrature"}),
        "gap": (("case",), gap[index], {"units": "nats", "long_name": "log p(x) - ELBO"}),
        "obs_id": (("case",), obs_id[index]),
        "x": (("case", *event_dims(vae)), array(log_joint.data())),
        "z_column": (("case", "column"), array(axes[..., 0].T)),
    }
    if d == 2:
        data["z_row"] = (("case", "row"), array(axes[..., 1].T))
    return xr.Dataset(data, coords={"case": _cases(index)}, attrs={"axes": _coordinates(vae, log_joint)})


def _coordinates(vae: VAE, log_joint: LogJoint) -> list[str]:
    """Return readable names of the unconstrained coordinates."""
    names = []
    for site in log_joint.sites:
        called = "latent" if site.name == "z" else site.name
        unit = (
            "prior sd" if is_standard(vae) else "" if site.transform is not None and is_real(site.support) else "unconstrained"
        )
        for j in range(site.columns.stop - site.columns.start):
            names.append(f"{called} {j}" + (f" ({unit})" if unit else ""))
    return names
