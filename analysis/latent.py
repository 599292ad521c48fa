"""What the report needs of the decoder, computed once and kept in `latent.nc`, so that a report needs no weights.

Every group is small (a few megabytes at most), and everything in it is an array with named dimensions: the guide's moments
at every audited datum, the decoder over a plane of latents, draws from the prior, reconstructions, and for one or two latents
the exact posterior and guide densities of the best, a typical and the worst datum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.inference.discrete import table as table_of
from elbowroom.inference.program import is_real
from elbowroom.inference.rows import Batch
from elbowroom.inference.target import LogJoint
from elbowroom.models.priors import Normal
from elbowroom.models.spaces import DISCRETE
from elbowroom.models.vae import VAE

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
    """Describe what the decoder and the guide do, for a report that has neither.

    Args:
        vae: the fitted VAE. It is not changed.
        batch: the audited data, x (N, *event), in the order of `table.obs_id`; with what stands beside it (covariates,
            exposure), by name.
        table: the audit's table (`Audit.table`), over `obs_id`; it chooses which data are shown, by `gap_total`.
        labels: one label for each datum, (N,), for colours only.
        image_shape: (height, width) when a flat datum is an image; None lets the report decide.
        columns: names of the columns, where a datum is a row of a table.
        plane_points: points per side of the plane of E[x|z].
        samples: draws from the prior.
        reconstructions: data to reconstruct, spread over the distribution of the gap.
        density_points: points per side of each density picture (d = 2); a line (d = 1) has five times as many.
        seed: seed of the draws. The global random state is left as it was.

    Returns:
        A DataTree, latents counted from 0, log densities in nats. Its attributes name the `space` that z lives in and say
        whether the prior is the `standard` normal, and whether a datum is a `sequence` (T, F).

        * `encoding`: loc, scale (obs_id, latent), moments of q(z|x); rate (latent): mean over data of the KL from the prior
          of the guide's margin, as a normal with the same moments (discrete latents: exactly); label (obs_id) where there
          are labels; prior_z (point, latent), draws from the prior
        * `plane`: expected_x (row, column, *event), E[x|z] at prior quantiles z_row, z_column of the two latents with the
          highest rate (attribute `latents`: of the columns, of the rows; the smaller index first), the others at the prior's
          median; d = 1: expected_x (column, *event). One-hot z, and z on a simplex: expected_x (column, *event) of each
          category (vertex). Given covariates, at their mean
        * `prior`: z (sample, latent), expected_x and x (sample, *event), draws from p(z) p(x|z)
        * `reconstruction`: x and expected_x (obs_id, *event), expected_x = E_q E[x|z] over 200 draws; gap (obs_id); x_mean
          and x_sd (*event) over all audited data
        * `density` (one or two unconstrained coordinates, and where there are gaps): log_posterior, log_guide (case, row,
          column), normalised, in unconstrained coordinates; axes z_row (case, row), z_column (case, column); gap, obs_id,
          log_evidence (case), the last by quadrature over the picture itself; x (case, *event); one coordinate: without row
        * `states` (all latents discrete, at most 64 joint values): posterior, guide (case, state), the probability of each
          joint value; gap, obs_id (case)

    Raises:
        ValueError: when x, table and labels differ in length.
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
            "plane": _plane(vae, rows, encoding["rate"].values, plane_points),
            "prior": _prior(vae, rows, samples),
            "reconstruction": _reconstruction(vae, rows, obs_id, gap, np.asarray(table["elbo"].values), reconstructions),
        }
        if np.isfinite(gap).any():
            cases = spread(gap, len(CASES))
            log_joint = _seam(vae, _take(rows, cases))
            if log_joint.dim == 0 and len(log_joint.program.assignments) <= MOST_STATES:
                groups["states"] = _states(log_joint, obs_id, gap, cases)
            elif log_joint.dim in (1, 2):
                groups["density"] = _density(vae, log_joint, obs_id, gap, cases, density_points)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update({"latent_dim": vae.prior.latent_dim, "event_shape": list(vae.likelihood.event_shape) or [1]})
    tree.attrs.update({"space": vae.prior.space, "standard": int(_standard(vae))})
    if any(getattr(network, "sequences", False) for network in (vae.decoder, vae.posterior.encoder)):
        tree.attrs["sequence"] = 1  # and no image, which has two axes too
    if columns:
        tree.attrs["columns"] = list(columns)
    if image_shape is not None:
        tree.attrs["image_shape"] = list(image_shape)
    return tree


def _seam(vae: VAE, batch: Batch) -> LogJoint:
    beside: dict[str, Any] = {name: value for name, value in batch.items() if name != "x"}
    return LogJoint(vae.model, vae.guide, batch["x"], **beside)


def _take(batch: Batch, index: np.ndarray) -> Batch:
    rows = torch.as_tensor(index, device=batch["x"].device)
    return {name: value[rows] for name, value in batch.items()}


def _repeated(batch: Batch, times: int) -> Batch:
    return {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in batch.items()}


def _beside(batch: Batch, n: int, *, mean: bool = False) -> Batch:
    """Return covariates and exposure for n data: those of the data in turn, or their mean."""
    found = {name: value for name, value in batch.items() if name != "x"}
    if mean:
        return {name: value.mean(0, keepdim=True).expand(n, *value.shape[1:]) for name, value in found.items()}
    index = torch.arange(n, device=batch["x"].device) % len(batch["x"])
    return {name: value[index] for name, value in found.items()}


def _standard(vae: VAE) -> bool:
    return isinstance(vae.prior, Normal) and not vae.prior.covariates


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _event(vae: VAE) -> tuple[str, ...]:
    return tuple(f"x_dim_{i}" for i in range(len(vae.likelihood.event_shape)))


def _draw_guide(vae: VAE, batch: Batch, draws: int) -> Tensor:
    """Draw z from the guide, (draws, N, d); the draws stand beside each other in the plate."""
    arguments: dict[str, Any] = {**_repeated(batch, draws)}
    return vae.guide(**arguments).unflatten(0, (draws, len(batch["x"])))


def _moments(vae: VAE, batch: Batch, draws: int = 1024) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q(z|x), (N, d), from draws where it has no formula for them."""
    q = vae.encode(**batch)
    try:
        return q.mean, q.stddev
    except (NotImplementedError, AttributeError):
        parts = []
        for rows in np.array_split(np.arange(len(batch["x"])), -(-len(batch["x"]) // 64)):
            z = _draw_guide(vae, _take(batch, rows), draws)
            parts.append((z.mean(0), z.std(0)))
        return torch.cat([mean for mean, _ in parts]), torch.cat([sd for _, sd in parts])


def _draw_prior(vae: VAE, n: int, batch: Batch) -> Tensor:
    """Draw z from the prior, (n, d), outside any handler; given covariates, at those of the data in turn."""
    arguments: dict[str, Any] = {**_beside(batch, n)}
    return vae.guide(**arguments, n=n)


def _encoding(vae: VAE, batch: Batch, obs_id: np.ndarray, labels: np.ndarray | None) -> xr.Dataset:
    """Return the guide's moments at each datum and the rate of each latent.

    rate_j = mean_n KL( N(m_nj, s_nj^2) || N(a_j, b_j^2) ), a and b the prior's mean and standard deviation: for a diagonal
    normal guide and a standard normal prior these are the shares of the rate, and they add up to it. Of discrete latents,
    whose means are probabilities m, it is sum_v m(v) log m(v) / p(v), over the values v of the latent (of a one-hot z: the
    term of its category).
    """
    loc, scale = _moments(vae, batch)
    z = _draw_prior(vae, 10_000, batch)
    a, b = (torch.zeros_like(loc[0]), torch.ones_like(loc[0])) if _standard(vae) else (z.mean(0), z.std(0))
    if vae.prior.space in DISCRETE:
        a = a.clamp(1e-6, 1 - 1e-6)
        rate = torch.xlogy(loc, loc / a)
        if vae.prior.space == "binary":
            rate = rate + torch.xlogy(1 - loc, (1 - loc) / (1 - a))
    else:
        rate = (b / scale).log() + (scale**2 + (loc - a) ** 2) / (2 * b**2) - 0.5
    encoding = xr.Dataset(
        {
            "loc": (("obs_id", "latent"), _array(loc), {"long_name": "mean of q(z|x)"}),
            "scale": (("obs_id", "latent"), _array(scale), {"long_name": "standard deviation of q(z|x)"}),
            "rate": (("latent",), _array(rate.mean(0)), {"long_name": "mean KL from the prior, by latent", "units": "nats"}),
            "prior_z": (("point", "latent"), _array(z[:1000]), {"long_name": "draws from the prior"}),
        },
        coords={"obs_id": obs_id, "latent": np.arange(loc.shape[-1])},
    )
    if labels is not None:
        encoding["label"] = ("obs_id", np.asarray(labels))
    return encoding


def _plane(vae: VAE, batch: Batch, rate: np.ndarray, points: int) -> xr.Dataset:
    """Return E[x|z] at prior quantiles of the two latents with the highest rate, the others at the prior's median.

    Of a z that is one of d categories, or on a simplex: of each category, or vertex.
    """
    example = _draw_prior(vae, 2 if _standard(vae) else 10_000, batch)
    d, space = example.shape[-1], vae.prior.space
    attrs: dict[str, Any] = {"long_name": "E[x|z] at prior quantiles"}
    if space in ("one_hot", "simplex"):
        z, latents = torch.eye(d).to(example), [0]
        if space == "simplex":  # a vertex itself has no density under many priors
            z = 0.98 * z + 0.02 / d
        columns = [torch.arange(d)]
        attrs["long_name"] = "E[x|z] of each category" if space == "one_hot" else "E[x|z] near each vertex of the simplex"
    else:
        p = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        if _standard(vae):
            quantiles = torch.special.ndtri(p).to(example).expand(d, -1).T
            middle = torch.zeros_like(example[0])
        elif space == "binary":
            quantiles, middle = torch.tensor([0.0, 1.0]).to(example).expand(d, -1).T, example.median(0).values
        else:
            quantiles, middle = torch.quantile(example, p.to(example), dim=0), example.median(0).values
        latents = sorted(int(j) for j in np.argsort(-rate, kind="stable")[:2])
        columns = [quantiles[:, j] for j in latents]
        z = middle.repeat(*(len(column) for column in reversed(columns)), 1)
        z[..., latents[0]] = columns[0]
        if len(latents) == 2:
            z[..., latents[1]] = columns[1][:, None]
    dims = ("row", "column")[-len(columns) :]
    flat = z.reshape(-1, d)
    expected = vae.centre(flat, **_beside(batch, len(flat), mean=True)).unflatten(0, z.shape[:-1])
    names = ("z_column", "z_row")
    coords = {name: (name[2:], _array(column)) for name, column in zip(names, columns, strict=False)}
    attrs["latents"] = latents
    return xr.Dataset({"expected_x": ((*dims, *_event(vae)), _array(expected))}, coords=coords, attrs=attrs)


def _prior(vae: VAE, batch: Batch, samples: int) -> xr.Dataset:
    """Draw z from the prior and x from the decoder; given covariates, at those of the data in turn."""
    z, beside = _draw_prior(vae, samples, batch), _beside(batch, samples)
    p = vae.decode(z, **beside)
    dims = ("sample", *_event(vae))
    return xr.Dataset(
        {
            "z": (("sample", "latent"), _array(z)),
            "expected_x": (dims, _array(vae.likelihood.centre(p))),
            "x": (dims, _array(p.sample())),
        }
    )


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of `count` values at evenly spaced ranks, smallest first, among those that are finite."""
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    if len(order) <= count:
        return order
    return order[np.linspace(0, len(order) - 1, count).round().astype(int)]


def _reconstruction(
    vae: VAE, batch: Batch, obs_id: np.ndarray, gap: np.ndarray, elbo: np.ndarray, count: int, draws: int = 200
) -> xr.Dataset:
    """Return data spread over the gap (over -ELBO where there is no gap) beside their E_q E[x|z], from 200 draws of q."""
    index = spread(gap if np.isfinite(gap).any() else -elbo, count)
    few = _take(batch, index)
    beside = {name: value for name, value in _repeated(few, draws).items() if name != "x"}
    expected = vae.centre(_draw_guide(vae, few, draws).flatten(0, 1), **beside).unflatten(0, (draws, len(index))).mean(0)
    x, dims = batch["x"].double(), ("obs_id", *_event(vae))
    centred = x - x.nanmean(0)
    return xr.Dataset(
        {
            "x_mean": (dims[1:], _array(x.nanmean(0))),
            "x_sd": (dims[1:], _array(centred.square().nanmean(0).sqrt())),
            "x": (dims, _array(few["x"])),
            "expected_x": (dims, _array(expected)),
            "gap": ("obs_id", gap[index], {"units": "nats", "long_name": "log p(x) - ELBO"}),
        },
        coords={"obs_id": obs_id[index]},
    )


def _states(log_joint: LogJoint, obs_id: np.ndarray, gap: np.ndarray, index: np.ndarray) -> xr.Dataset:
    """Return the probability of each joint value under posterior and guide, for the smallest, median and largest gap."""
    found = table_of(log_joint)
    return xr.Dataset(
        {
            "posterior": (("case", "state"), _array(found.log_posterior.exp().T)),
            "guide": (("case", "state"), _array(found.log_guide.exp().T)),
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

    The box starts at the whole of the prior and of the guide and closes in on what lies within 8 nats of either maximum. The
    posterior is normalised by quadrature over the final box: it borrows nothing from the audit's references.
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
        return dims, _array(log_density.reshape(shape).permute(order)).clip(-1e4)

    data = {
        "log_posterior": picture(log_p - log_evidence),
        "log_guide": picture(log_q),
        "log_evidence": (("case",), _array(log_evidence), {"units": "nats", "long_name": "log p(x), by quadrature"}),
        "gap": (("case",), gap[index], {"units": "nats", "long_name": "log p(x) - ELBO"}),
        "obs_id": (("case",), obs_id[index]),
        "x": (("case", *_event(vae)), _array(log_joint.data())),
        "z_column": (("case", "column"), _array(axes[..., 0].T)),
    }
    if d == 2:
        data["z_row"] = (("case", "row"), _array(axes[..., 1].T))
    return xr.Dataset(data, coords={"case": _cases(index)}, attrs={"axes": _coordinates(vae, log_joint)})


def _coordinates(vae: VAE, log_joint: LogJoint) -> list[str]:
    """Name the unconstrained coordinates for people."""
    names = []
    for site in log_joint.sites:
        called = "latent" if site.name == "z" else site.name
        unit = "prior sd" if _standard(vae) else "" if site.transform is not None and is_real(site.support) else "unconstrained"
        for j in range(site.columns.stop - site.columns.start):
            names.append(f"{called} {j}" + (f" ({unit})" if unit else ""))
    return names
