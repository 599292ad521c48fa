"""What the report needs of the decoder, computed once and kept in `latent.nc`, so that a report needs no weights.

Every group is small (a few megabytes at most), and everything in it is an array with named dimensions: the guide's moments
at every audited datum, the decoder over a plane of latents, draws from the prior, reconstructions, and for one or two latents
the exact posterior and guide densities of the best, a typical and the worst datum.
"""

from __future__ import annotations

import numpy as np
import pyro
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.inference.target import LogJoint
from elbowroom.models.priors import Normal
from elbowroom.models.vae import VAE

CASES = ("best", "typical", "worst")
_ZOOM = 8.0  # nats below the maximum at which a density picture may end: 4 standard deviations of a normal


def describe(
    vae: VAE,
    x: Tensor,
    table: xr.Dataset,
    labels: np.ndarray | None = None,
    *,
    image_shape: tuple[int, int] | None = None,
    plane_points: int = 15,
    samples: int = 30,
    reconstructions: int = 10,
    density_points: int = 161,
    seed: int = 0,
) -> xr.DataTree:
    """Describe what the decoder and the guide do, for a report that has neither.

    Args:
        vae: the fitted VAE. It is not changed.
        x: the audited data, (N, *event), in the order of `table.obs_id`.
        table: the audit's table (`Audit.table`), over `obs_id`; it chooses which data are shown, by `gap_total`.
        labels: one label for each datum, (N,), for colours only.
        image_shape: (height, width) when a flat datum is an image; None lets the report decide.
        plane_points: points per side of the plane of E[x|z].
        samples: draws from the prior.
        reconstructions: data to reconstruct, spread over the distribution of the gap.
        density_points: points per side of each density picture (d = 2); a line (d = 1) has five times as many.
        seed: seed of the draws. The global random state is left as it was.

    Returns:
        A DataTree, latents counted from 0, z in unconstrained units, log densities in nats:

        * `encoding`: loc, scale (obs_id, latent), moments of q(z|x); rate (latent): mean over data of the KL from the prior
          of the guide's margin, as a normal with the same moments; label (obs_id) where there are labels
        * `plane`: expected_x (row, column, *event), E[x|z] at prior quantiles z_row, z_column of the two latents with the
          highest rate (attribute `latents`: of the columns, of the rows; the smaller index first), the others at the prior's
          median; d = 1: expected_x (column, *event)
        * `prior`: z (sample, latent), expected_x and x (sample, *event), draws from p(z) p(x|z)
        * `reconstruction`: x and expected_x (obs_id, *event), expected_x = E_q E[x|z] over 200 draws; gap (obs_id)
        * `density` (d = 1 or 2, and where there are gaps): log_posterior, log_guide (case, row, column), normalised; axes
          z_row (case, row), z_column (case, column); gap, obs_id, log_evidence (case), the last by quadrature over the
          picture itself; x (case, *event); d = 1: without row

    Raises:
        ValueError: when x, table and labels differ in length.
    """
    obs_id = np.asarray(table["obs_id"].values)
    if len(x) != len(obs_id) or (labels is not None and len(labels) != len(x)):
        sizes = f"x {len(x)}, table {len(obs_id)}" + ("" if labels is None else f", labels {len(labels)}")
        raise ValueError(f"describe needs one row for each datum: {sizes}")
    parameter = next(vae.parameters())
    x = x.to(device=parameter.device, dtype=parameter.dtype)
    gap = np.asarray(table["gap_total"].values, dtype=float)
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        encoding = _encoding(vae, x, obs_id, labels)
        groups = {
            "encoding": encoding,
            "plane": _plane(vae, encoding["rate"].values, plane_points),
            "prior": _prior(vae, samples),
            "reconstruction": _reconstruction(vae, x, obs_id, gap, np.asarray(table["elbo"].values), reconstructions),
        }
        if vae.prior.latent_dim <= 2 and np.isfinite(gap).any():
            groups["density"] = _density(vae, x, obs_id, gap, encoding, density_points)
    tree = xr.DataTree.from_dict(groups)
    tree.attrs.update({"latent_dim": vae.prior.latent_dim, "event_shape": list(vae.likelihood.event_shape) or [1]})
    if image_shape is not None:
        tree.attrs["image_shape"] = list(image_shape)
    return tree


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()


def _event(vae: VAE) -> tuple[str, ...]:
    return tuple(f"x_dim_{i}" for i in range(len(vae.likelihood.event_shape)))


def _moments(q: TorchDistribution, draws: int = 4096) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q, from draws where it has no formula for them."""
    try:
        return q.mean, q.stddev
    except NotImplementedError:
        z = q.sample(torch.Size([draws]))
        return z.mean(0), z.std(0)


def _draw_prior(vae: VAE, n: int) -> Tensor:
    """Draw z from the prior, (n, d), outside any handler."""
    with pyro.plate("data", n):
        return vae.prior()


def _encoding(vae: VAE, x: Tensor, obs_id: np.ndarray, labels: np.ndarray | None) -> xr.Dataset:
    """Return the guide's moments at each datum and the rate of each latent.

    rate_j = mean_n KL( N(m_nj, s_nj^2) || N(a_j, b_j^2) ), a and b the prior's mean and standard deviation: for a diagonal
    normal guide and a standard normal prior these are the shares of the rate, and they add up to it.
    """
    loc, scale = _moments(vae.encode(x))
    if isinstance(vae.prior, Normal):
        a, b = torch.zeros_like(loc[0]), torch.ones_like(loc[0])
    else:
        z = _draw_prior(vae, 10_000)
        a, b = z.mean(0), z.std(0)
    rate = ((b / scale).log() + (scale**2 + (loc - a) ** 2) / (2 * b**2) - 0.5).mean(0)
    encoding = xr.Dataset(
        {
            "loc": (("obs_id", "latent"), _array(loc), {"long_name": "mean of q(z|x)"}),
            "scale": (("obs_id", "latent"), _array(scale), {"long_name": "standard deviation of q(z|x)"}),
            "rate": (("latent",), _array(rate), {"long_name": "mean KL from the prior, by latent", "units": "nats"}),
        },
        coords={"obs_id": obs_id, "latent": np.arange(loc.shape[-1])},
    )
    if labels is not None:
        encoding["label"] = ("obs_id", np.asarray(labels))
    return encoding


def _plane(vae: VAE, rate: np.ndarray, points: int) -> xr.Dataset:
    """Return E[x|z] at prior quantiles of the two latents with the highest rate, the others at the prior's median."""
    p = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    example = _draw_prior(vae, 2 if isinstance(vae.prior, Normal) else 10_000)
    if isinstance(vae.prior, Normal):
        quantiles = torch.special.ndtri(p).to(example).expand(example.shape[-1], -1).T
        middle = torch.zeros_like(example[0])
    else:
        quantiles, middle = torch.quantile(example, p.to(example), dim=0), example.median(0).values
    latents = sorted(int(j) for j in np.argsort(-rate, kind="stable")[:2])
    attrs = {"latents": latents, "long_name": "E[x|z] at prior quantiles"}
    column = quantiles[:, latents[0]]
    if len(latents) == 1:
        z = middle.repeat(points, 1)
        z[:, latents[0]] = column
        dims: tuple[str, ...] = ("column",)
        coords = {"z_column": ("column", _array(column))}
    else:
        row = quantiles[:, latents[1]]
        z = middle.repeat(points, points, 1)
        z[..., latents[0]], z[..., latents[1]] = column[None, :], row[:, None]
        dims = ("row", "column")
        coords = {"z_row": ("row", _array(row)), "z_column": ("column", _array(column))}
    expected = _array(vae.decode(z).mean)
    return xr.Dataset({"expected_x": ((*dims, *_event(vae)), expected)}, coords=coords, attrs=attrs)


def _prior(vae: VAE, samples: int) -> xr.Dataset:
    """Draw z from the prior and x from the decoder."""
    z = _draw_prior(vae, samples)
    p = vae.decode(z)
    dims = ("sample", *_event(vae))
    return xr.Dataset(
        {"z": (("sample", "latent"), _array(z)), "expected_x": (dims, _array(p.mean)), "x": (dims, _array(p.sample()))}
    )


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """Return the positions of `count` values at evenly spaced ranks, smallest first, among those that are finite."""
    order = np.argsort(values, kind="stable")
    order = order[np.isfinite(values[order])]
    if len(order) <= count:
        return order
    return order[np.linspace(0, len(order) - 1, count).round().astype(int)]


def _reconstruction(vae: VAE, x: Tensor, obs_id: np.ndarray, gap: np.ndarray, elbo: np.ndarray, count: int) -> xr.Dataset:
    """Return data spread over the gap (over -ELBO where there is no gap) beside their E_q E[x|z], from 200 draws of q."""
    index = spread(gap if np.isfinite(gap).any() else -elbo, count)
    x = x[torch.as_tensor(index, device=x.device)]
    z = vae.encode(x).sample(torch.Size([200]))
    dims = ("obs_id", *_event(vae))
    return xr.Dataset(
        {
            "x": (dims, _array(x)),
            "expected_x": (dims, _array(vae.decode(z).mean.mean(0))),
            "gap": ("obs_id", gap[index], {"units": "nats", "long_name": "log p(x) - ELBO"}),
        },
        coords={"obs_id": obs_id[index]},
    )


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


def _density(vae: VAE, x: Tensor, obs_id: np.ndarray, gap: np.ndarray, encoding: xr.Dataset, points: int) -> xr.Dataset:
    """Return exact posterior and guide densities on a box that holds both, for the smallest, median and largest gap.

    The box starts at the whole of the prior and of the guide and closes in on what lies within 8 nats of either maximum. The
    posterior is normalised by quadrature over the final box: it borrows nothing from the audit's references.
    """
    index = spread(gap, len(CASES))
    case = CASES if len(index) == len(CASES) else tuple(CASES[-len(index) :])
    rows = torch.as_tensor(index, device=x.device)
    log_joint = LogJoint(vae.model, vae.guide, x[rows])
    d = encoding.sizes["latent"]
    loc = torch.as_tensor(encoding["loc"].values[index], device=x.device)
    scale = torch.as_tensor(encoding["scale"].values[index], device=x.device)
    extent = _draw_prior(vae, 4096).double()
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
        "x": (("case", *_event(vae)), _array(x[rows])),
        "z_column": (("case", "column"), _array(axes[..., 0].T)),
    }
    if d == 2:
        data["z_row"] = (("case", "row"), _array(axes[..., 1].T))
    return xr.Dataset(data, coords={"case": np.array(case, dtype=object)})
