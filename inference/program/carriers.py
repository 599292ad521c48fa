"""Sites of a guide that carry those of the model: a vector u with a density, and the model's sites as Deltas of its entries.

Pyro's AutoNormal, AutoDiagonalNormal and EasyGuide, and guides that unpack a vector by hand, draw an auxiliary u and then
z = T(u) as a Delta, whose `log_density` is the Jacobian of T. No integral is needed for such a guide: in the unconstrained
coordinates of z

    log q(z) + log |dz / du| = log q(u)

so the density is that of the auxiliary alone. Which entry of u is which coordinate of z is found by comparing draws.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import pyro.distributions as dist
import torch
from pyro.contrib.easyguide import EasyGuide
from pyro.infer.autoguide import AutoLaplaceApproximation
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import Transform

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.latents import auxiliary_site, continuous_site
from elbowroom.inference.program.masks import bare
from elbowroom.inference.program.sites import Site, frame_of, support_of
from elbowroom.inference.randomness import seeded

DRAWS = 4  # of the guide, to find which entry is which coordinate
CLOSE = 1e-3  # difference of an entry of u from the coordinate that it carries, by rounding, as a share of 1 + |u|
NORMAL = (dist.Normal, torch.distributions.Normal)
JOINTLY_NORMAL = (
    *(dist.MultivariateNormal, torch.distributions.MultivariateNormal),
    *(dist.LowRankMultivariateNormal, torch.distributions.LowRankMultivariateNormal),
)
ACROSS = 1e-4  # partial correlation of the entries of two data from which on a joint normal is no product over the data


@contextlib.contextmanager
def clean(guide: Callable[..., Any]) -> Iterator[None]:
    """Take from an EasyGuide the plates of a run that fails: it would open them in the next run, of other data."""
    try:
        yield
    except BaseException:
        inside = getattr(guide, "program", guide)  # as it is before it is promoted
        if isinstance(inside, EasyGuide):
            inside.plates.clear()
        raise


@dataclass(frozen=True)
class Carrier:
    """An auxiliary site inside the data plate.

    Attributes:
        name: its name.
        site: its place in the program, as of a latent whose columns are its entries.
        columns: the column of z that each entry carries, (m,).
        carried: the model's sites that are Deltas of it.
    """

    name: str
    site: Site
    columns: Tensor
    carried: frozenset[str]

    def value(self, z: Tensor) -> Tensor:
        """Return u at the coordinates z (N, d)."""
        return self.site.split(z[:, self.columns.to(z.device)])


@dataclass(frozen=True)
class JointCarrier:
    """An auxiliary vector of all data, normal and independent between data (AutoDiagonalNormal, a Laplace approximation).

    The entries that belong to global latents are held at their means; the distribution of the others is conditional on them.

    Attributes:
        name: its name.
        columns: the columns of z that it carries, (k,).
        places: where the vector holds them, (N, k).
        loc: the means of all entries, (M,).
        scale_tril: Cholesky factors of the covariance of each datum's entries, (N, k, k).
        carried: the model's local sites that are Deltas of it.
    """

    name: str
    columns: Tensor
    places: Tensor
    loc: Tensor
    scale_tril: Tensor
    carried: frozenset[str]

    def value(self, z: Tensor) -> Tensor:
        """Return the vector at the coordinates z (N, d), (M,)."""
        mine, rest = z[:, self.columns.to(z.device)].reshape(-1), self.loc.to(z)
        source = torch.arange(len(rest), device=z.device) + len(mine)
        source[self.places.reshape(-1).to(z.device)] = torch.arange(len(mine), device=z.device)
        return torch.cat([mine, rest])[source]

    def log_prob(self, z: Tensor) -> Tensor:
        """Return the density of each datum's entries at the coordinates z (N, d), (N,)."""
        return self._normal(z).log_prob(z[:, self.columns.to(z.device)])

    def draw(self, dim: int, like: Tensor, size: tuple[int, ...] = ()) -> Tensor:
        """Draw the coordinates z (*size, N, d); zero where it does not carry one."""
        z = like.new_zeros(*size, len(self.places), dim)
        z[..., self.columns.to(z.device)] = self._normal(z).sample(torch.Size(size))
        return z

    def _normal(self, like: Tensor) -> dist.MultivariateNormal:
        return dist.MultivariateNormal(self.loc.to(like)[self.places.to(like.device)], scale_tril=self.scale_tril.to(like))


def with_density(guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """Return the guide, or its normal approximation at the mode if it is an AutoLaplaceApproximation, a point mass itself."""
    if not isinstance(guide, AutoLaplaceApproximation):
        return guide
    try:
        with seeded(0):
            found: Callable[..., Any] = guide.laplace_approximation(*args, **kwargs)
    except RuntimeError as error:  # torch's LinAlgError
        if "positive-definite" not in str(error):
            raise
        raise UnsupportedProgram(
            "guide: log p(x, z) is not concave where AutoLaplaceApproximation stands, so it has no normal approximation there: "
            "train it until its loss no longer falls"
        ) from error
    return found


def match(entries: Tensor, coordinates: Tensor) -> Tensor:
    """Return which coordinate each entry equals, (m,), -1 for none, from draws of both: (S, m) and (S, k)."""
    if coordinates.shape[1] == 0:
        return torch.full((entries.shape[1],), -1, device=entries.device)
    order = coordinates[0].argsort()
    at = torch.searchsorted(coordinates[0, order], entries[0].contiguous())
    found = torch.full((entries.shape[1],), -1, device=entries.device)
    for beside in (at - 1, at, at + 1):  # neighbours may have rounded past each other
        candidate = order[beside.clamp(0, len(order) - 1)]
        near = (coordinates[:, candidate] - entries).abs() <= CLOSE * (1 + entries.abs())
        found = torch.where((found < 0) & near.all(0), candidate, found)
    return found


def plated(name: str, site: Site, drawn: Tensor, z: Tensor, deltas: Sequence[Site]) -> Carrier | None:
    """Return the carrier that a site inside the plate is, if it is one; (S, N, m) and (S, N, d) are draws of it and of z.

    Raises:
        UnsupportedProgram: an entry of it carries no coordinate, though others do.
    """
    wanted = _columns(deltas, z.device)
    index = match(drawn.flatten(0, 1), z[..., wanted].flatten(0, 1))
    if bool((index < 0).all()):
        return None
    if bool((index < 0).any()) or len(index.unique()) < len(index):
        raise UnsupportedProgram(
            f"guide site {name!r}: {int((index < 0).sum())} of its {len(index)} entries per datum are not, as they are, "
            "coordinates of a site of the model: log q(z|x) would need an integral over them, or the inverse of what is done "
            "with them; draw values with their own location and scale, and make each an unconstrained coordinate of a site"
        )
    columns = wanted[index]
    return Carrier(name, site, columns, _owners(deltas, columns))


def joint(name: str, fn: Any, drawn: Tensor, z: Tensor, deltas: Sequence[Site]) -> JointCarrier | None:
    """Return the carrier that a site outside the plate is, if it is one; (S, M) and (S, N, d) are draws of it and of z.

    Raises:
        UnsupportedProgram: its density is no product over the data.
    """
    wanted = _columns(deltas, z.device)
    if drawn.dim() != 2 or not len(wanted):
        return None
    n = z.shape[1]
    places = match(z[..., wanted].flatten(1), drawn).reshape(n, len(wanted))  # of each coordinate in the vector
    whole = (places >= 0).all(0)
    wanted, places = wanted[whole], places[:, whole]
    if not len(wanted) or len(places.unique()) < places.numel():
        return None
    factors = _factors(fn, places)
    if factors is None:
        raise UnsupportedProgram(
            f"guide: {name!r} joins all data into one vector whose entries depend on each other, so q(z|x) is no product over "
            "the data and no datum has a gap of its own; take pyro.infer.autoguide.AutoNormal, or write a guide whose sites "
            "sit inside the data plate, e.g. `with pyro.plate('data', len(x)): pyro.sample('z', "
            "dist.Normal(loc, scale).to_event(1))`"
        )
    return JointCarrier(name, wanted, places, fn.mean.detach(), factors, _owners(deltas, wanted))


def _factors(fn: Any, places: Tensor) -> Tensor | None:
    """Return Cholesky factors of each datum's entries given all others, (N, k, k); None if data depend on each other."""
    base = bare(fn)
    if isinstance(base, NORMAL):
        return torch.diag_embed(fn.stddev.detach()[places])
    if not isinstance(base, JOINTLY_NORMAL):
        return None
    precision = torch.linalg.inv(base.covariance_matrix.detach().double())
    sd = precision.diagonal().sqrt()
    owner = torch.full((len(sd),), -1, device=sd.device)
    owner[places] = torch.arange(len(places), device=sd.device)[:, None].expand_as(places)
    apart = (owner[:, None] != owner) & (owner[:, None] >= 0) & (owner >= 0)
    if bool(((precision / (sd[:, None] * sd)).abs()[apart] > ACROSS).any()):
        return None
    return torch.linalg.cholesky(torch.linalg.inv(precision[places[:, :, None], places[:, None, :]]))


def _columns(deltas: Sequence[Site], device: torch.device) -> Tensor:
    found = [torch.arange(site.columns.start, site.columns.stop, device=device) for site in deltas]
    return torch.cat(found) if found else torch.empty(0, dtype=torch.long, device=device)


def _owners(deltas: Sequence[Site], columns: Tensor) -> frozenset[str]:
    held = set(columns.tolist())
    return frozenset(site.name for site in deltas if held & set(range(site.columns.start, site.columns.stop)))


def incomplete(carriers: Sequence[Carrier | JointCarrier], deltas: Sequence[Site]) -> Site | None:
    """Return a Delta site some coordinate of which no carrier holds; None if there is none."""
    held = {column for carrier in carriers for column in carrier.columns.tolist()}
    return next((site for site in deltas if not set(range(site.columns.start, site.columns.stop)) <= held), None)


def find_carriers(
    extra: Mapping[str, Any], local: Mapping[str, Any], plate: str, run: Callable[[], Trace]
) -> dict[str, Carrier | JointCarrier]:
    """Return those among the guide's sites `extra` that carry the model's sites inside the plate.

    Args:
        extra: nodes of the guide's sites that are no latents of the model.
        local: nodes of the model's latents inside the plate.
        plate: name of the data plate.
        run: runs the guide and returns a new trace.

    Raises:
        UnsupportedProgram: an auxiliary site carries a site in part, or couples the data; names it.
    """
    traces = [run() for _ in range(DRAWS)]
    first = traces[0]
    deltas: list[Site] = []
    width = 0
    for name, node in local.items():
        if node["fn"].has_enumerate_support or support_of(node["fn"]).is_discrete:
            continue
        site = continuous_site(node, plate, width)
        width = site.columns.stop
        mine = first.nodes.get(name)
        if mine is None or not isinstance(bare(mine["fn"]), dist.Delta) or frame_of(mine, plate) is None:
            continue
        if site.transform is None:
            raise UnsupportedProgram(
                f"guide site {name!r} is a Delta, and the support of the model's depends on other sites: give it a fixed one"
            )
        deltas.append(site)
    if not deltas:
        return {}
    z = torch.stack([_coordinates(trace, deltas, width) for trace in traces])
    found: dict[str, Carrier | JointCarrier] = {}
    for name, node in extra.items():
        drawn = torch.stack([trace.nodes[name]["value"] for trace in traces])
        carrier: Carrier | JointCarrier | None
        if frame_of(node, plate) is None:
            carrier = joint(name, node["fn"], drawn, z, deltas)
        else:
            site = auxiliary_site(node, plate)
            drawn = torch.stack([_entries(trace.nodes[name], site) for trace in traces])
            carrier = plated(name, site, drawn, z, deltas)
        if carrier is not None:
            found[name] = carrier
    partly = incomplete(list(found.values()), deltas)
    if partly is not None:
        raise UnsupportedProgram(
            f"guide site {partly.name!r} is a Delta, and not of the map from entries of one of the guide's own sites "
            f"({', '.join(map(repr, extra))}) onto its support, so nothing gives log q(z|x); draw it from a distribution, such "
            "as dist.Normal(loc, scale), or from dist.TransformedDistribution"
        )
    return found


def _coordinates(trace: Trace, deltas: Sequence[Site], width: int) -> Tensor:
    """Return the coordinates (N, width) of the Delta sites at their values in a trace."""
    z = None
    for site in deltas:
        node, transform = trace.nodes[site.name], cast(Transform, site.transform)
        value = node["value"]
        value = value.expand(*node["fn"].batch_shape, *value.shape[value.dim() - site.event_dim :])
        free = site.gather(transform.inv(value), site.free_event_dim)
        z = free.new_zeros(len(free), width) if z is None else z
        z[:, site.columns] = free.reshape(len(free), -1)
    assert z is not None
    return z


def _entries(node: Mapping[str, Any], site: Site) -> Tensor:
    """Return the value of an auxiliary site by datum, (N, m)."""
    value = node["value"]
    value = value.expand(*node["fn"].batch_shape, *value.shape[value.dim() - site.event_dim :])
    rows = site.gather(value, site.event_dim)
    return rows.reshape(len(rows), -1)


def carriers_by_site(carriers: Mapping[str, Carrier | JointCarrier]) -> dict[str, Carrier | JointCarrier]:
    """Return the carrier of each site that is a Delta of one."""
    return {site: carrier for carrier in carriers.values() for site in carrier.carried}
