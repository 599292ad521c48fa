"""The latent sites of a program: the dimension of their plate, their values, and their columns in one vector."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.densities.edges import bijection
from elbowroom.inference.program.masks import bare, coordinates
from elbowroom.inference.program.sites import Site, frame_of, is_static, support_of

MAX_ASSIGNMENTS = 4096


def frame_dim(node: Mapping[str, Any], plate: str) -> int:
    """Return the batch dimension of the data plate at a site that lies inside it."""
    frame = frame_of(node, plate)
    if frame is None:  # pragma: no cover - callers pass local sites only
        raise KeyError(plate)
    return int(frame.dim)


def check_guide_site(node: Mapping[str, Any], guide_node: Mapping[str, Any], plate: str, carried: bool) -> None:
    """Refuse a guide site that lies outside the data plate, is a point mass, or has another support than the model's site.

    A site that is carried by an auxiliary one is a Delta of it, and has its density: see `carriers`.

    Raises:
        UnsupportedProgram: names the site.
    """
    name = node["name"]
    if frame_of(guide_node, plate) is None:
        raise UnsupportedProgram(f"guide site {name!r} lies outside plate {plate!r}: open the same plate in the guide")
    if carried:
        return
    if isinstance(bare(guide_node["fn"]), dist.Delta):
        raise UnsupportedProgram(
            f"guide site {name!r} is a point mass (Delta, as AutoDelta's, a MAP estimate): it is no posterior and has no "
            "density, so there is no ELBO and no gap to measure. Audit the normal approximation at the mode: train "
            "pyro.infer.autoguide.AutoLaplaceApproximation(model) in its place and pass it as the guide"
        )
    prior, posterior = support_of(node["fn"]), support_of(guide_node["fn"]) or support_of(node["fn"])
    value = guide_node["value"]
    if not bool(prior.check(value).all()):
        raise UnsupportedProgram(
            f"site {name!r}: the guide drew values outside the prior's support (guide support {posterior}, prior support "
            f"{prior}); wrap the guide's distribution in a transform onto the prior's support"
        )
    if _kind(prior) != _kind(posterior):
        raise UnsupportedProgram(
            f"site {name!r}: guide support {_kind(posterior)}, prior support {_kind(prior)}; wrap the guide's distribution in "
            "a transform onto the prior's support, so that both densities live on the same set"
        )


def _kind(constraint: Any) -> str:
    base = constraint
    while hasattr(base, "base_constraint"):
        base = base.base_constraint
    name = type(base).__name__.lstrip("_")
    # different names for the same set
    if name in ("GreaterThan", "GreaterThanEq") and getattr(base, "lower_bound", None) == 0:
        return "Positive"
    if name in ("RealVector", "Real"):
        return "Real"
    return {"HalfOpenInterval": "Interval", "GreaterThanEq": "GreaterThan"}.get(name, name)


def _layout(node: Mapping[str, Any], plate: str) -> tuple[int, int, Tensor]:
    """Return the data dimension, the number of batch dimensions, and the value expanded to the full batch shape."""
    fn = node["fn"]
    value = node["value"].expand(*fn.batch_shape, *node["value"].shape[node["value"].dim() - fn.event_dim :])
    return frame_dim(node, plate), len(fn.batch_shape), value


def continuous_site(node: Mapping[str, Any], plate: str, offset: int) -> Site:
    """Describe a continuous latent site with columns of z that begin at `offset`."""
    fn = node["fn"]
    dim, batch_ndim, value = _layout(node, plate)
    support = support_of(fn)
    try:
        transform = bijection(support)
    except NotImplementedError:
        raise UnsupportedProgram(
            f"site {node['name']!r}: no transform onto the support of {type(fn).__name__} ({support}) is known"
        ) from None
    free = transform.inv(value)
    free_event_dim = free.dim() - batch_ndim
    shape = tuple(value.movedim(dim - fn.event_dim, 0).shape[1:])
    free_shape = tuple(free.movedim(dim - free_event_dim, 0).shape[1:])
    return Site(
        name=node["name"],
        plate_dim=dim,
        event_dim=fn.event_dim,
        batch_ndim=batch_ndim,
        shape=shape,
        free_shape=free_shape,
        free_event_dim=free_event_dim,
        columns=slice(offset, offset + math.prod(free_shape)),
        support=support if is_static(support) else None,
        transform=transform if is_static(support) else None,
    )


def auxiliary_site(node: Mapping[str, Any], plate: str) -> Site:
    """Describe a site of the guide whose entries are unconstrained coordinates, with columns of its own."""
    fn = node["fn"]
    dim, batch_ndim, value = _layout(node, plate)
    shape = tuple(value.movedim(dim - fn.event_dim, 0).shape[1:])
    return Site(
        name=node["name"],
        plate_dim=dim,
        event_dim=fn.event_dim,
        batch_ndim=batch_ndim,
        shape=shape,
        free_shape=shape,
        free_event_dim=fn.event_dim,
        columns=slice(0, math.prod(shape)),
    )


def discrete_sites(
    nodes: Mapping[str, Mapping[str, Any]], plate: str, drawn: Collection[str], alone: bool
) -> tuple[list[Site], frozenset[str], list[str]]:
    """Describe the discrete latents of a program.

    Args:
        nodes: their nodes in the model's trace, by name.
        plate: name of the data plate.
        drawn: names of the sites that the guide draws.
        alone: whether there is no continuous latent.

    Returns:
        Those whose joint values are listed, the names of those that variable elimination sums out (in a plate within the
        data plate, or of too many joint values and not drawn by the guide), and sentences about these.

    Raises:
        UnsupportedProgram: a site has no finite list of values, or a list too long; names it.
    """
    inner = [name for name, node in nodes.items() if _entries(node, plate) > 1]
    listed = {name: _listed(node, plate) for name, node in nodes.items() if name not in inner}
    count = math.prod(len(site.values) for site in listed.values() if site.values is not None)
    too_many = count > MAX_ASSIGNMENTS
    if too_many and (alone or set(listed) & set(drawn)):
        names = ", ".join(repr(name) for name in listed)
        cure = "" if alone else "; leave them out of the guide, so that they are summed out one by one"
        raise UnsupportedProgram(
            f"sites {names}: {count} joint values are too many to enumerate (at most {MAX_ASSIGNMENTS}){cure}"
        )
    if inner and alone and not listed:
        raise UnsupportedProgram(
            f"every latent is discrete and lies in a plate within plate {plate!r}: all of them are summed out, and no "
            "posterior is left to audit"
        )
    summed = [name for name in nodes if too_many or name in inner]
    for name in summed:
        _check_enumerable(nodes[name])
    notes = [
        f"discrete site {name!r} is summed out of log p(x, z) exactly, by variable elimination"
        + (": the guide's draws of it are ignored, the ELBO is the tighter one without them" if name in drawn else "")
        for name in summed
    ]
    notes += [
        f"discrete site {name!r} is summed out in model and guide: ELBO and gap are those of the continuous latents, and the "
        "ELBO is SVI's or more"
        for name in listed
        if name in drawn and not alone
    ]
    return [site for name, site in listed.items() if name not in summed], frozenset(summed), notes


def _entries(node: Mapping[str, Any], plate: str) -> int:
    """Return how many batch entries one datum has at a site."""
    fn = node["fn"]
    return math.prod(fn.batch_shape) // int(fn.batch_shape[frame_dim(node, plate)])


def _check_enumerable(node: Mapping[str, Any]) -> None:
    try:
        node["fn"].enumerate_support(expand=False)
    except NotImplementedError:
        raise UnsupportedProgram(
            f"discrete site {node['name']!r} ({type(bare(node['fn'])).__name__}) has no finite list of values to sum over; "
            "where .to_event makes a vector of its entries, open a plate over them instead"
        ) from None


def _listed(node: Mapping[str, Any], plate: str) -> Site:
    """Describe a discrete latent site, with the table of its values."""
    name, fn = node["name"], node["fn"]
    dim, batch_ndim, value = _layout(node, plate)
    return Site(
        name=name,
        plate_dim=dim,
        event_dim=fn.event_dim,
        batch_ndim=batch_ndim,
        shape=tuple(value.movedim(dim - fn.event_dim, 0).shape[1:]),
        free_shape=(),
        free_event_dim=0,
        columns=slice(0, 0),
        values=_values(name, fn),
    )


def _values(name: str, fn: TorchDistribution) -> Tensor:
    """List the values of a finite discrete distribution, (K, *event)."""
    base, factors = fn, 1
    while isinstance(base, dist.Independent | dist.MaskedDistribution):
        base = base.base_dist
    try:
        table = base.enumerate_support(expand=False)
    except NotImplementedError:
        raise UnsupportedProgram(
            f"discrete site {name!r} ({type(base).__name__}) has no finite list of values to sum over"
        ) from None
    table = table.reshape(len(table), *base.event_shape)
    factors = math.prod(fn.event_shape[: fn.event_dim - base.event_dim])
    if factors == 1:
        return table.reshape(len(table), *fn.event_shape)
    if len(table) ** factors > MAX_ASSIGNMENTS:
        raise UnsupportedProgram(
            f"discrete site {name!r} has {len(table)}^{factors} values, too many to enumerate (at most {MAX_ASSIGNMENTS})"
        )
    combos = torch.cartesian_prod(*[torch.arange(len(table), device=table.device)] * factors)
    return table[combos].reshape(len(combos), *fn.event_shape)


def active_coordinates(nodes: list[Any], sites: list[Site], n_obs: int, dim: int) -> Tensor | None:
    """Return (N, d), False where a mask removes a latent coordinate of a datum; None if no mask does."""
    active: Tensor | None = None
    for node, site in zip(nodes, sites, strict=True):
        event = site.free_shape[len(site.free_shape) - site.free_event_dim :]
        mask = coordinates(node["fn"], node["mask"], node["value"].device, site.name, event)
        if mask is None:
            continue
        if active is None:
            active = torch.ones(n_obs, dim, dtype=torch.bool, device=mask.device)
        active[:, site.columns] = site.gather(mask, site.free_event_dim).reshape(n_obs, -1)
    return active if active is not None and not active.all() else None


def log_sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the log of the sum of exponentials over a list of tensors."""
    return parts[0] if len(parts) == 1 else torch.logsumexp(torch.stack(list(parts)), 0)


def summed_out(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Sum discrete assignments out of pairs log p(z, c), log p(x|z, c): log p(z) and log p(x|z)."""
    if len(pairs) == 1:
        return pairs[0]
    priors = torch.stack([prior for prior, _ in pairs])
    joints = torch.stack([prior + likelihood for prior, likelihood in pairs])
    prior = torch.logsumexp(priors, 0)
    return prior, torch.logsumexp(joints, 0) - prior
