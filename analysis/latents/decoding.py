"""The decoder as a function of z: draws, moments and quantiles of latents, and E[x|z] on a plane of two latents.

Used for the report (`latents.summary`) and for the answer to `explain` (`latents.effects`). All functions run a VAE outside any
handler; callers set the seed and disable gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from elbowroom.models.priors.standard import Normal
from elbowroom.models.spaces import DISCRETE
from elbowroom.models.sphere import unit
from elbowroom.models.vae import VAE, Batch

DRAWS = 10_000  # of the prior, for its quantiles and moments


def take(batch: Batch, index: np.ndarray) -> Batch:
    """Return some rows of a batch."""
    rows = torch.as_tensor(index, device=batch["x"].device)
    return {name: value[rows] for name, value in batch.items()}


def repeated(batch: Batch, times: int) -> Batch:
    """Return the rows of a batch `times` times, one copy after the other."""
    return {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in batch.items()}


def beside_of(batch: Batch, n: int, *, mean: bool = False) -> Batch:
    """Return covariates and exposure for n data: those of the data, cyclically, or their mean."""
    found = {name: value for name, value in batch.items() if name != "x"}
    if mean:
        return {name: value.mean(0, keepdim=True).expand(n, *value.shape[1:]) for name, value in found.items()}
    return {name: value[torch.arange(n, device=value.device) % len(value)] for name, value in found.items()}


def is_standard(vae: VAE) -> bool:
    """Return whether the prior is the standard normal."""
    return isinstance(vae.prior, Normal) and not vae.prior.covariates


def array(x: Tensor) -> np.ndarray:
    """Return a tensor as float64 numpy."""
    return x.detach().double().cpu().numpy()


def event_dims(vae: VAE) -> tuple[str, ...]:
    """Return the names of the dimensions of one datum."""
    return tuple(f"x_dim_{i}" for i in range(len(vae.likelihood.event_shape)))


def draw_guide(vae: VAE, batch: Batch, draws: int) -> Tensor:
    """Draw z from the guide, (draws, N, d); the draws run as repeated rows of the plate."""
    arguments: dict[str, Any] = {**repeated(batch, draws)}
    return vae.guide(**arguments).unflatten(0, (draws, len(batch["x"])))


def moments(vae: VAE, batch: Batch, draws: int = 1024) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of q(z|x), (N, d), from draws where they have no formula."""
    q = vae.encode(**batch)
    try:
        return q.mean, q.stddev
    except (NotImplementedError, AttributeError):
        parts = []
        for rows in np.array_split(np.arange(len(batch["x"])), -(-len(batch["x"]) // 64)):
            z = draw_guide(vae, take(batch, rows), draws)
            parts.append((z.mean(0), z.std(0)))
        return torch.cat([mean for mean, _ in parts]), torch.cat([sd for _, sd in parts])


def draw_prior(vae: VAE, n: int, batch: Batch) -> Tensor:
    """Draw z from the prior, (n, d), outside any handler; with covariates, at those of the batch, cyclically."""
    arguments: dict[str, Any] = {**beside_of(batch, n)}
    return vae.guide(**arguments, n=n)


def rates(vae: VAE, loc: Tensor, scale: Tensor, prior: Tensor) -> Tensor:
    """Return the rate of each latent, (d,) nats, from the guide's moments (N, d) and draws of the prior.

    rate_j = mean_n KL( N(m_nj, s_nj^2) || N(a_j, b_j^2) ), a and b the prior's mean and standard deviation. For a diagonal
    normal guide and a standard normal prior these add up to the rate. For discrete latents, whose means are probabilities m, it
    is sum_v m(v) log m(v) / p(v) over the values v of the latent (for a one-hot z: the term of its category).
    """
    a, b = (torch.zeros_like(loc[0]), torch.ones_like(loc[0])) if is_standard(vae) else (prior.mean(0), prior.std(0))
    if vae.prior.space in DISCRETE:
        a = a.clamp(1e-6, 1 - 1e-6)
        rate = torch.xlogy(loc, loc / a)
        if vae.prior.space == "binary":
            rate = rate + torch.xlogy(1 - loc, (1 - loc) / (1 - a))
    else:
        rate = (b / scale).log() + (scale**2 + (loc - a) ** 2) / (2 * b**2) - 0.5
    return rate.mean(0)


def quantiles(vae: VAE, prior: Tensor, points: int) -> tuple[Tensor, Tensor]:
    """Return values of each latent at the prior's quantiles (i + 1/2) / points, (points, d), and the prior's medians, (d,).

    Binary latents have the values 0 and 1, (2, d); z must not be one-hot or on a simplex. `prior` are draws from the prior, (S,
    d).
    """
    if vae.prior.space == "binary":
        return torch.tensor([0.0, 1.0]).to(prior).expand(prior.shape[-1], -1).T, prior.median(0).values
    p = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    if is_standard(vae):
        return torch.special.ndtri(p).to(prior).expand(prior.shape[-1], -1).T, torch.zeros_like(prior[0])
    return torch.quantile(prior, p.to(prior), dim=0), prior.median(0).values


def vertices(vae: VAE, like: Tensor) -> Tensor:
    """Return each category of a one-hot z, or a point near each vertex of the simplex, (d, d)."""
    d = vae.prior.latent_dim
    z = torch.eye(d).to(like)
    return z if vae.prior.space == "one_hot" else 0.98 * z + 0.02 / d  # a vertex itself has no density under many priors


def around(like: Tensor, latents: tuple[int, int], points: int) -> tuple[Tensor, list[Tensor]]:
    """Return points of the sphere, (P, d) or for d = 3 (P, P, d), and the angles in degrees and heights of columns and rows.

    The angle runs around the circle of two latents, the others being 0; for d = 3 rows have equal areas, by the third latent.
    """
    d = like.shape[-1]
    middle = (torch.arange(points, device=like.device) + 0.5) / points * 2 - 1
    angle = math.pi * middle
    z = torch.zeros(points, d).to(like)
    z[:, latents[0]], z[:, latents[1]] = angle.cos().to(like), angle.sin().to(like)
    if d != 3:
        return unit(z), [180 * middle]
    z = z * (1 - middle.square()).sqrt().to(like)[:, None, None]
    z[..., 3 - sum(latents)] = middle.to(like)[:, None]
    return unit(z), [180 * middle, middle]


def plane(vae: VAE, batch: Batch, rate: np.ndarray, points: int, latents: Sequence[int] | None = None) -> xr.Dataset:
    """Return E[x|z] at prior quantiles of two latents, the others at the prior's median.

    For a z that is one of d categories or on a simplex: at each category, or vertex. On a sphere: `around` it.

    Args:
        vae: the VAE.
        batch: data, for covariates and exposure: E[x|z] is computed at their mean.
        rate: of each latent, (d,); the two latents with the highest rate are used by default.
        points: per side.
        latents: one or two latents instead: of the columns, of the rows.
    """
    example = draw_prior(vae, 2 if is_standard(vae) else DRAWS, batch)
    d, space = example.shape[-1], vae.prior.space
    attrs: dict[str, Any] = {"long_name": "E[x|z] at prior quantiles"}
    if space in ("one_hot", "simplex"):
        z, chosen = vertices(vae, example), [0]
        columns = [torch.arange(d)]
        attrs["long_name"] = "E[x|z] of each category" if space == "one_hot" else "E[x|z] near each vertex of the simplex"
    elif space == "sphere":
        ranked = [int(j) for j in np.argsort(-rate, kind="stable")]
        first = list(dict.fromkeys([*(latents or ()), *ranked]))[:2]
        chosen = sorted(first) if latents is None else first
        z, columns = around(example, (chosen[0], chosen[1]), points)
        attrs["long_name"] = "E[x|z] around the sphere"
    else:
        values, middle = quantiles(vae, example, points)
        chosen = sorted(int(j) for j in np.argsort(-rate, kind="stable")[:2]) if latents is None else list(latents)
        columns = [values[:, j] for j in chosen]
        z = middle.repeat(*(len(column) for column in reversed(columns)), 1)
        z[..., chosen[0]] = columns[0]
        if len(chosen) == 2:
            z[..., chosen[1]] = columns[1][:, None]
    dims = ("row", "column")[-len(columns) :]
    flat = z.reshape(-1, d)
    expected = vae.centre(flat, **beside_of(batch, len(flat), mean=True)).unflatten(0, z.shape[:-1])
    names = ("z_column", "z_row")
    coords = {name: (name[2:], array(column)) for name, column in zip(names, columns, strict=False)}
    attrs["latents"] = chosen
    return xr.Dataset({"expected_x": ((*dims, *event_dims(vae)), array(expected))}, coords=coords, attrs=attrs)
