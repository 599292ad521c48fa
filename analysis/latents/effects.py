"""The effect of each latent: E[x|z] as z moves, the size of the change, and which latents matter.

    plane       E[x|z] at prior quantiles of two latents, the others at the prior's median
    traversal   E[x|z] as one latent runs through the prior's quantiles, the others at a base: a datum's posterior mean, or the
                prior's median
    reach_k     root mean square, over quantiles and entries of x, of E[x|z] - its mean over the quantiles; for tables each
                column in units of its standard deviation over data
    effect      E[x_j | z_k = v, others], averaged over the others, drawn from the prior or from the aggregate posterior, with
                a band for their spread: partial dependence (Friedman 2001, https://doi.org/10.1214/aos/1013203451)
    share       var_v effect / (var_v effect + mean_v var of E[x_j | z] over the others): the part of the variance of E[x_j | z]
                due to the latent alone, its first-order Sobol index where latents are independent
    states      E[x|z] for every joint value of discrete latents, its probability, and its frequency in the data

When a coordinate on a simplex or a sphere moves, the others change in proportion, and z stays there. Latents have no meaning of
their own: a rotation of z under a normal prior leaves the model unchanged but changes these figures, which show the coordinates
of this fit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.analysis.latents.decoding import (
    DRAWS,
    array,
    beside_of,
    draw_guide,
    draw_prior,
    event_dims,
    moments,
    plane,
    quantiles,
    rates,
)
from elbowroom.analysis.latents.entries import EntryKind, pieces
from elbowroom.analysis.latents.summary import MOST_STATES
from elbowroom.errors import UserError
from elbowroom.inference.randomness import seeded
from elbowroom.inference.target.discrete import table as table_of
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.models.likelihoods.categorical import Codes
from elbowroom.models.spaces import DISCRETE
from elbowroom.models.sphere import unit
from elbowroom.models.vae import VAE, Batch
from elbowroom.system.stages import stage

BAND = (0.05, 0.95)
MOST_ENTRIES = 200  # largest number of entries of x with effect curves
Others = Literal["prior", "aggregate"]
At = Callable[[int], Batch]
STARTS = {
    (True, False): "the prior's median",
    (True, True): "the prior's mean direction",
    (False, False): "the datum's posterior mean",
    (False, True): "the direction of the datum's posterior mean",
}
"""Whether no datum is given, whether z is on a sphere -> where traversals start."""
WORDS: dict[str, tuple[str, str]] = {
    "rate": ("nats", "mean KL from the prior of the guide's margin, by latent"),
    "reach": ("units of the data", "root mean square of the change of E[x|z] along the latent; of tables in sd of the data"),
    "cell_sd": ("units of the data", "standard deviation over data of the column, or of being of the level"),
    "traversal_cell": ("units of the data", "mean of each column as one latent moves; of categories the probability"),
    "base": ("latent units", "where traversals start: the other latents stay there"),
    "traversal_z": ("latent units", "values of the latent that moves"),
    "traversal": ("units of the data", "E[x|z] as one latent moves"),
    "effect_z": ("latent units", "values of the latent"),
    "effect": ("units of the data", "mean of E[x_j|z] over the other latents; of categories the probability"),
    "effect_error": ("units of the data", "Monte Carlo standard error of effect"),
    "effect_low": ("units of the data", "5 % quantile over the other latents"),
    "effect_high": ("units of the data", "95 % quantile over the other latents"),
    "share": ("1", "part of the variance of E[x_j|z] that is the latent's alone"),
    "state_z": ("", "z of the state"),
    "state_x": ("units of the data", "E[x|z] of the state"),
    "state_cell": ("units of the data", "mean of each column in the state; of categories the probability"),
    "state_prior": ("1", "probability under the prior"),
    "state_use": ("1", "mean over data of p(z|x), exact"),
    "state_guide": ("1", "mean over data of q(z|x)"),
}


@dataclass(frozen=True)
class Cells:
    """The numbers that describe an x with independent entries: a mean per entry, for categories the probability of each.

    Attributes:
        labels: their names, such as `age` or `job=clerk`.
        entry: the entry that each belongs to.
        code: the category of a probability; -1 for means.
        kinds: of the entries.
    """

    labels: tuple[str, ...]
    entry: tuple[int, ...]
    code: tuple[int, ...]
    kinds: tuple[EntryKind, ...]

    @classmethod
    def of(
        cls, p: TorchDistribution, names: Sequence[str], kinds: Sequence[EntryKind], texts: Mapping[str, Sequence[str]]
    ) -> Cells:
        """Name the cells of p(x|z)."""
        labels: list[tuple[int, int, str]] = []
        for index, part in pieces(p):
            for j in index.tolist():
                if isinstance(part, Codes) and kinds[j] == "categorical":
                    levels = texts.get(names[j], [str(k) for k in range(part.probs.shape[-1])])
                    labels += [(j, code, f"{names[j]}={level}") for code, level in enumerate(levels)]
                else:
                    labels.append((j, -1, names[j]))
        entry, code, label = zip(*sorted(labels), strict=True)
        return cls(label, entry, code, tuple(kinds))

    def means(self, p: TorchDistribution) -> Tensor:
        """Return the cells of p(x|z), (*batch, cells)."""
        parts: dict[int, Tensor] = {}
        for index, part in pieces(p):
            for place, j in enumerate(index.tolist()):
                if isinstance(part, Codes) and self.kinds[j] == "categorical":
                    parts[j] = part.probs[..., place, :]
                else:
                    parts[j] = part.mean[..., place, None]
        return torch.cat([parts[j] for j in sorted(parts)], -1)

    def spread(self, x: Tensor) -> Tensor:
        """Return the standard deviation of each cell over data (n, D): of the column, or of the indicator of its level."""
        found = []
        for j, code in zip(self.entry, self.code, strict=True):
            column = x[:, j][~x[:, j].isnan()].double()
            sd = (column if code < 0 else (column == code).double()).std(correction=0) if len(column) else torch.zeros(())
            found.append(sd if sd > 0 else torch.ones_like(sd))
        return torch.stack(found)


def moved(z: Tensor, k: int, values: Tensor, space: str) -> Tensor:
    """Return z (..., d) with latent k at each of the values (V,), (V, ..., d); on simplex and sphere others are rescaled."""
    out = z.expand(len(values), *z.shape).clone()
    v = values.reshape(-1, *[1] * (z.dim() - 1))
    if space == "simplex":
        out = out * ((1 - v) / (1 - z[..., k]).clamp_min(1e-12))[..., None]
    if space == "sphere":
        others = torch.linalg.vector_norm(z.masked_fill(torch.arange(z.shape[-1], device=z.device) == k, 0.0), dim=-1)
        out = out * ((1 - v.square()).clamp_min(0).sqrt() / others.clamp_min(1e-12))[..., None]
    out[..., k] = v
    return out


def beginning(prior: Tensor, middle: Tensor, space: str) -> Tensor:
    """Return the z (d,) at which traversals start, from draws of the prior and their medians.

    On a sphere: the prior's mean direction, turned a little towards the point with equal coordinates, which decides where the
    prior has no direction, and keeps the others from being 0, so that they can be rescaled.
    """
    if space == "sphere":
        return unit(prior.mean(0) + 0.1 / prior.shape[-1] ** 0.5)
    return prior.mean(0) if space == "simplex" else middle


@stage("curves")
def explain(
    vae: VAE,
    batch: Batch,
    *,
    latents: Sequence[int] | None = None,
    base: Tensor | None = None,
    told: Batch | None = None,
    cells: Cells | None = None,
    others: Others = "prior",
    points: int = 13,
    steps: int = 11,
    draws: int = 400,
    seed: int = 0,
) -> xr.Dataset:
    """Compute E[x|z] over the plane, along each latent and in each state, and how much each latent matters.

    Args:
        vae: the VAE. It is not changed.
        batch: data, for the rate of latents, the aggregate posterior, and the mean of covariates and exposure.
        latents: one or two latents for the plane; by default those with the highest rate.
        base: z (d,) at which traversals start; by default the prior's median.
        told: covariates (1, C) and exposure (1,) for E[x|z]; by default the mean over the batch.
        cells: names for effect curves; None for no curves.
        others: the distribution of the other latents in effect curves.
        points: per side of the plane.
        steps: values of a traversal and of an effect curve.
        draws: of the other latents.
        seed: random seed.

    Returns:
        A Dataset as described in the module; `latent` is ordered by number, the attribute `order` lists latents by rate.

    Raises:
        UserError: there is no such latent.
    """
    d, space = vae.prior.latent_dim, vae.prior.space
    for k in latents or ():
        if not 0 <= k < d:
            near = min(max(k, 0), d - 1)
            raise UserError(f"latents: there is no latent {k}; the model has latents 0 to {d - 1}, the nearest is {near}")
    if latents is not None and len(set(latents)) not in (1, 2):
        raise UserError(f"latents: one or two different latents are needed, got {', '.join(map(str, latents))}")
    if told is None:
        told = beside_of(batch, 1, mean=True)
    at = lambda n: {name: value[:1].expand(n, *value.shape[1:]) for name, value in told.items()}
    with torch.no_grad(), seeded(seed):
        prior = draw_prior(vae, DRAWS, told)
        rate = rates(vae, *moments(vae, batch), prior)
        order = np.argsort(-array(rate), kind="stable")
        data: dict[str, tuple[tuple[Hashable, ...], np.ndarray]] = {"rate": (("latent",), array(rate))}
        coords: dict[str, object] = {"latent": np.arange(d)}
        flat = plane(vae, told, array(rate), points, latents)
        data["plane"] = (flat["expected_x"].dims, flat["expected_x"].values)
        data |= {str(name): (flat[name].dims, flat[name].values) for name in flat.coords}
        event = event_dims(vae)
        if space in DISCRETE and d <= 12:
            data |= _states(vae, batch, at, cells, event)
        if space != "one_hot":
            values, middle = quantiles(vae, prior, steps)
            start = beginning(prior, middle, space) if base is None else base.to(prior)
            start = unit(start) if space == "sphere" else start  # a posterior mean lies inside the sphere
            along = [vae.decode(z, **at(len(z))) for z in (moved(start, k, values[:, k], space) for k in range(d))]
            expected = torch.stack([vae.likelihood.centre(p) for p in along])
            reach = expected.flatten(2)
            if cells is not None:
                means = torch.stack([cells.means(p) for p in along])
                data["traversal_cell"] = (("latent", "step", "cell"), array(means))
                reach = means / cells.spread(batch["x"]).to(means)
            off = reach - reach.mean(1, keepdim=True)
            data |= {
                "base": (("latent",), array(start)),
                "traversal_z": (("latent", "step"), array(values.T)),
                "traversal": (("latent", "step", *event), array(expected)),
                "reach": (("latent",), array(off.flatten(1).double().square().mean(1).sqrt())),
            }
            if cells is not None:
                other = prior[:draws]
                if others == "aggregate":
                    other = draw_guide(vae, batch, -(-draws // len(batch["x"]))).flatten(0, 1)
                    other = other[torch.randperm(len(other), device=other.device)[:draws]]
                data |= _effects(vae, other, values, at, cells, space)
        if cells is not None:
            coords["cell"] = list(cells.labels)
            data["cell_sd"] = (("cell",), array(cells.spread(batch["x"])))
    dataset = xr.Dataset({name: (*value, _about(name)) for name, value in data.items()}, coords=coords)
    plane_of = [int(k) for k in np.atleast_1d(flat.attrs["latents"])]
    return dataset.assign_attrs(
        order=[int(k) for k in order], plane_of=plane_of, space=space, others=others, latent_dim=d,
        start=STARTS[base is None, space == "sphere"],
    )  # fmt: skip


def _about(name: str) -> dict[str, str]:
    units, words = WORDS.get(name, ("", name))
    return {"units": units, "long_name": words}


def _effects(
    vae: VAE, other: Tensor, values: Tensor, at: At, cells: Cells, space: str
) -> dict[str, tuple[tuple[Hashable, ...], np.ndarray]]:
    """Return mean, error and band of each cell along each latent, with the others as drawn."""
    names = ("effect", "effect_error", "effect_low", "effect_high")
    found: dict[str, list[Tensor]] = {name: [] for name in (*names, "share")}
    for k in range(other.shape[-1]):
        z = moved(other, k, values[:, k], space)  # (V, S, d)
        told = at(z.shape[0] * z.shape[1])
        each = cells.means(vae.decode(z.flatten(0, 1), **told)).unflatten(0, z.shape[:2]).double()
        low, high = (torch.quantile(each, q, dim=1) for q in BAND)
        summary = (each.mean(1), each.std(1) / math.sqrt(len(other)), low, high)
        for name, value in zip(names, summary, strict=True):
            found[name].append(value)
        alone = each.mean(1).var(0, correction=0)
        found["share"].append(alone / (alone + each.var(1).mean(0)).clamp_min(1e-300))
    dims = {name: ("latent", "step", "cell") if name in names else ("latent", "cell") for name in found}
    out = {name: (dims[name], array(torch.stack(value))) for name, value in found.items()}
    return {"effect_z": (("latent", "step"), array(values.T)), **out}


def _states(
    vae: VAE, batch: Batch, at: At, cells: Cells | None, event: tuple[str, ...]
) -> dict[str, tuple[tuple[Hashable, ...], np.ndarray]]:
    """Return E[x|z] of every joint value of discrete latents, and its probabilities."""
    d, one_hot = vae.prior.latent_dim, vae.prior.space == "one_hot"
    if not one_hot and 2**d > MOST_STATES:
        return {}
    like = next(vae.parameters())
    z = torch.eye(d) if one_hot else torch.tensor(list(itertools.product((0.0, 1.0), repeat=d)))
    z = z.to(like)
    p = vae.decode(z, **at(len(z)))
    beside: dict[str, Any] = {name: value for name, value in batch.items() if name != "x"}
    log_joint = LogJoint(vae.model, vae.guide, batch["x"], **beside)
    found = table_of(log_joint)
    listed = torch.stack([next(iter(one.values())).reshape(d) for one in log_joint.program.assignments]).to(z)
    place = [int((listed == row).all(1).nonzero()[0, 0]) for row in z]
    mean = lambda log_p: array(log_p.double().exp().mean(1)[place])
    out: dict[str, tuple[tuple[Hashable, ...], np.ndarray]] = {
        "state_z": (("state", "latent"), array(z)),
        "state_x": (("state", *event), array(vae.likelihood.centre(p))),
        "state_prior": (("state",), mean(found.log_prior)),
        "state_use": (("state",), mean(found.log_posterior)),
        "state_guide": (("state",), mean(found.log_guide)),
    }
    if cells is not None:
        out["state_cell"] = (("state", "cell"), array(cells.means(p)))
    return out


def curved(event: Sequence[int]) -> bool:
    """Return whether effect curves of the entries are readable: for a table, or a short vector that is no image."""
    from elbowroom.models.columns import image_shape

    return len(event) == 1 and image_shape(event) is None and event[0] <= MOST_ENTRIES
