"""The entries of a site whose density counts, after `poutine.mask`, `.mask(...)` and `obs_mask=`.

A mask around a site has the shape of its batch and removes whole events. A mask inside `.to_event` has the shape of the base
distribution's batch and removes entries of an event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor

from elbowroom.errors import UnsupportedProgram

INDEPENDENT = (dist.Independent, torch.distributions.Independent)
WRAPPERS = (*INDEPENDENT, ExpandedDistribution, dist.MaskedDistribution)


def bare(fn: Any) -> Any:
    """Return a distribution without what `.to_event`, `.expand` and `.mask` put around it."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def kept(node: Mapping[str, Any]) -> Tensor | None:
    """Return which entries of an observed site's value are in the likelihood, in the value's shape; None if all are.

    Args:
        node: the site's node of a trace.

    Raises:
        UnsupportedProgram: a mask removes only some copies of a value that the program broadcasts, or only part of the density
            of an entry.
    """
    value = node["value"]
    found = around(node["fn"], node["mask"], value.device, node["name"])
    if found is None or bool(found.all()):
        return None
    return _fitted(found, value.shape, node["name"]).reshape(value.shape)


def around(fn: Any, mask: Any, device: torch.device, name: str) -> Tensor | None:
    """Return which entries of a distribution's batch and event are kept by a mask around the site and by masks inside.

    Args:
        fn: the site's distribution.
        mask: the mask around the site, as in its node; None where there is none.
        device: where the result is wanted.
        name: the site's name.

    Returns:
        (*batch, *event), True where an entry is kept; None if there is no mask.

    Raises:
        UnsupportedProgram: a mask removes only part of the density of an entry.
    """
    inside = _inside(fn, name)
    if mask is None and inside is None:
        return None
    found = torch.ones(torch.Size([*fn.batch_shape, *fn.event_shape]), dtype=torch.bool, device=device)
    if inside is not None:
        found = found & inside
    if mask is not None:
        outer = torch.as_tensor(mask, device=device).bool()
        found = found & outer.reshape([*outer.shape, *(1,) * fn.event_dim])
    return found


def entries(fn: Any, mask: Any, device: torch.device, name: str) -> Tensor | None:
    """Return `around` without the event dimensions of one entry: (*batch, *dimensions that .to_event added)."""
    found = around(fn, mask, device, name)
    if found is None:
        return None
    width = bare(fn).event_dim
    return found.flatten(found.dim() - width).all(-1) if width else found


def coordinates(fn: Any, mask: Any, device: torch.device, name: str, free: Sequence[int]) -> Tensor | None:
    """Return which unconstrained coordinates of a latent site masks keep, (*batch, *free); None if there is no mask.

    `free` is the shape of an unconstrained event.
    """
    found = entries(fn, mask, device, name)
    if found is None:
        return None
    shape = torch.Size([*fn.batch_shape, *free])
    return found.reshape([*found.shape, *(1,) * (len(shape) - found.dim())]).expand(shape)


def masks_inside(fn: Any, name: str) -> bool:
    """Whether there is a mask inside a distribution."""
    return _inside(fn, name) is not None


def _inside(fn: Any, name: str) -> Tensor | None:
    """Return what masks inside a distribution keep, broadcastable to its batch and event; None if there are none."""
    if isinstance(fn, dist.Independent | torch.distributions.Independent | ExpandedDistribution):
        return _inside(fn.base_dist, name)
    if isinstance(fn, dist.MaskedDistribution):
        mask = torch.as_tensor(fn._mask).bool()
        mask = mask.reshape([*mask.shape, *(1,) * len(fn.event_shape)])
        below = _inside(fn.base_dist, name)
        return mask if below is None else mask & below.to(mask.device)
    base = getattr(fn, "base_dist", None)
    if base is not None and _inside(base, name) is not None:
        raise UnsupportedProgram(
            f"a mask inside {type(fn).__name__} takes part of the density of site {name!r}, not entries of it"
        )
    return None


def _fitted(found: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Bring a mask to the shape of the values, which the program may broadcast over further dimensions."""
    shape = torch.Size([*(1,) * (found.dim() - len(shape)), *shape])
    if len(shape) > found.dim():
        found = found.expand(shape)
    for i, (have, want) in enumerate(zip(found.shape, shape, strict=True)):
        if have != want and have == 1:
            found = found.expand(*found.shape[:i], want, *found.shape[i + 1 :])
        elif have != want:
            first = found.narrow(i, 0, 1)
            if not torch.equal(first.expand_as(found), found):
                raise UnsupportedProgram(
                    f"a mask takes some copies of an entry of site {name!r} out of the likelihood, not others"
                )
            found = first
    return found
