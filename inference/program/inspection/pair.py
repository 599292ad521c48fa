"""Inspection of a Pyro (model, guide) pair: its data plate, its latent sites per datum, and reasons to refuse it.

The pair is RUN once, eagerly and validated, with the user's own arguments, and everything is read from the two traces. There is
no need to know which argument is data, covariate or mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.carriers import JOINTLY_NORMAL, Carrier, JointCarrier, find_carriers
from elbowroom.inference.program.densities.edges import bijection
from elbowroom.inference.program.gates import with_gates
from elbowroom.inference.program.inspection.plates import data_plate
from elbowroom.inference.program.inspection.refusals import (
    GivenRows,
    check_masks,
    factor_notes,
    refuse_auxiliary,
    refuse_other_rows,
    refuse_sequential,
    refuse_unplated,
    shapes_explained,
)
from elbowroom.inference.program.latents import (
    active_coordinates,
    check_guide_site,
    continuous_site,
    discrete_sites,
    frame_dim,
)
from elbowroom.inference.program.masks import masks_inside
from elbowroom.inference.program.observed import check_observed, moving_supports
from elbowroom.inference.program.sites import Program, Site, frame_of, support_of

log = logging.getLogger("elbowroom")

PIN_DRAWS = 1001


def inspect(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plate: str | None,
    hold: Sequence[str] = (),
) -> Program:
    """Run the pair p(x, z), q(z|x) once and describe it.

    Args:
        model: p(x, z).
        guide: q(z|x).
        args: arguments of both.
        kwargs: keyword arguments of both.
        plate: name of the data plate, if there are several candidates.
        hold: names of other plates, whose latents are held at the guide's median, as global ones are.

    Raises:
        UnsupportedProgram: per-datum inference does not apply to the pair; names the site or plate and the reason.
    """
    given = GivenRows()
    with shapes_explained():
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = poutine.trace(poutine.replay(given(model), trace=guide_trace)).get_trace(*args, **kwargs)
    refuse_sequential(model_trace, guide_trace)
    refuse_other_rows(given.rows, model_trace, guide_trace)

    latents = {name: site for name, site in _latents(model_trace).items() if not _is_unobserved_half(name, model_trace)}
    dropped = frozenset(_latents(model_trace)) - frozenset(latents)
    guide_latents = {name: site for name, site in _latents(guide_trace).items() if name not in dropped}
    extra = {name: node for name, node in guide_latents.items() if name not in latents}

    name, choice = data_plate(latents, model_trace, plate, hold)
    for trace in (model_trace, guide_trace):
        refuse_unplated(trace, name)
    local = {k: v for k, v in latents.items() if frame_of(v, name) is not None}
    carriers: dict[str, Carrier | JointCarrier] = {}
    if extra:
        carriers = find_carriers(extra, local, name, lambda: poutine.trace(guide).get_trace(*args, **kwargs))
    shared = {k: v for k, v in latents.items() if k not in local} | {
        k: v for k, v in extra.items() if k not in carriers and frame_of(v, name) is None
    }
    pinned, notes = _pin(shared, guide, guide_trace, args, kwargs, carriers, frozenset(extra))
    refuse_auxiliary(extra, frozenset({*carriers, *pinned}))
    if pinned:  # sites after a pinned global must be run at its pinned value
        guide_trace = poutine.trace(poutine.condition(guide, data=pinned)).get_trace(*args, **kwargs)
        for global_name in pinned:
            guide_trace.nodes[global_name]["is_observed"] = False  # `condition` set it; for replay it is a latent
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    index = {
        node["name"]: node["value"]
        for trace in (model_trace, guide_trace)
        for node in trace.nodes.values()
        if node["type"] == "sample" and site_is_subsample(node) and len(node["value"]) < node["fn"].size
    }
    notes = [*getattr(getattr(model, "__self__", None), "audit_notes", ()), *choice, *notes]
    notes += [f"site {half!r} is the unobserved half of obs_mask: integrated out" for half in sorted(dropped)]
    notes += factor_notes(guide_trace, model_trace)
    notes += _scale_notes(model_trace, guide_trace)
    notes += _subsample_notes(model_trace, name)
    notes += check_observed(model_trace, name, lambda: poutine.trace(model).get_trace(*args, **kwargs))
    sized = any(name in t.nodes and t.nodes[name]["fn"].subsample_size is not None for t in (model_trace, guide_trace))
    if sized and name not in index:
        notes.append(
            f"plate {name!r} says its subsample_size: the number of rows is left as it is, all data are evaluated together"
        )

    first = model_trace.nodes[next(iter(local))]
    n_obs = first["fn"].batch_shape[frame_dim(first, name)]
    sites: list[Site] = []
    of_discrete = {k: model_trace.nodes[k] for k in local if _is_discrete(model_trace.nodes[k])}
    discrete, summed, how = discrete_sites(of_discrete, name, guide_latents, len(of_discrete) == len(local))
    notes += how
    offset = 0
    for site_name in (k for k in local if k not in of_discrete):
        node = model_trace.nodes[site_name]
        guide_node = guide_trace.nodes.get(site_name)
        if guide_node is None:
            raise UnsupportedProgram(f"guide: it has no site {site_name!r}, a latent of the model inside plate {name!r}")
        check_guide_site(node, guide_node, name, any(site_name in carrier.carried for carrier in carriers.values()))
        check_masks(node, guide_node)
        site = continuous_site(node, name, offset)
        offset = site.columns.stop
        sites.append(site)
    moving = next((site for site in sites if site.transform is None), None)
    if of_discrete and moving is not None:
        raise UnsupportedProgram(
            f"site {moving.name!r}: its support depends on other sites, which is not done beside the discrete site "
            f"{next(iter(of_discrete))!r}; give it a fixed support"
        )
    active = active_coordinates([model_trace.nodes[s.name] for s in sites], sites, n_obs, offset)
    masked = [
        _has_mask(node) for trace in (model_trace, guide_trace) for node in map(trace.nodes.get, local) if node is not None
    ]
    program = Program(
        plate=name,
        n_obs=n_obs,
        sites=tuple(sites),
        discrete=tuple(discrete),
        dim=offset,
        guide_sites=frozenset(guide_latents) & frozenset(local),
        carriers=carriers,
        auxiliary=frozenset(extra),
        summed=summed,
        pinned=pinned,
        index=index,
        sized=sized,
        dropped=dropped,
        active=active,
        nesting=max(-f.dim for t in (model_trace, guide_trace) for n in t.nodes.values() for f in _frames(n)),
        observed=_observed(model_trace, name, n_obs),
        moving=moving_supports(model_trace),
        notes=notes,
    )
    return with_gates(program, model, guide, args, kwargs) if any(masked) else program


def _has_mask(node: Mapping[str, Any]) -> bool:
    return node["mask"] is not None or masks_inside(node["fn"], node["name"])


def _observed(trace: Trace, plate: str, n_obs: int) -> dict[str, Tensor]:
    found = {}
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or not node["is_observed"] or node["infer"].get("_deterministic"):
            continue
        frame, value = frame_of(node, plate), node["value"]
        if frame is not None and isinstance(value, Tensor):
            dim = frame.dim - node["fn"].event_dim
            if value.dim() >= -dim and value.shape[dim] == n_obs:
                found[name] = value.movedim(dim, 0)
    return found


def _latents(trace: Trace) -> dict[str, dict[str, Any]]:
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


def _frames(node: Mapping[str, Any]) -> list[Any]:
    return list(node["cond_indep_stack"]) if node["type"] == "sample" else []


def _is_unobserved_half(name: str, trace: Trace) -> bool:
    stem = name.removesuffix("_unobserved")
    return stem != name and f"{stem}_observed" in trace.nodes and trace.nodes[f"{stem}_observed"]["is_observed"]


def _is_discrete(node: Mapping[str, Any]) -> bool:
    support = support_of(node["fn"])
    if support is None:
        raise UnsupportedProgram(
            f"site {node['name']!r}: {type(node['fn']).__name__} declares no support, so nothing says which values z can take; "
            "give the class a `support`, such as torch.distributions.constraints.real_vector"
        )
    return bool(node["fn"].has_enumerate_support) or bool(support.is_discrete)


def _pin(
    latents: Mapping[str, Mapping[str, Any]],
    guide: Callable[..., Any],
    guide_trace: Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    carriers: Mapping[str, Carrier | JointCarrier],
    extra: frozenset[str],
) -> tuple[dict[str, Tensor], list[str]]:
    """Fix every global latent at the median of the guide's distribution, a discrete one at its mode, in program order.

    Auxiliary sites of the guide that carry global latents (`extra`) are fixed likewise, before these.
    """
    pinned: dict[str, Tensor] = {}
    vectors = {name: carrier.loc for name, carrier in carriers.items() if isinstance(carrier, JointCarrier)}
    notes = []
    for name in (n for n in guide_trace.nodes if n in latents):
        held = {**pinned, **vectors}
        trace = poutine.trace(poutine.condition(guide, data=held)).get_trace(*args, **kwargs) if held else guide_trace
        fn = trace.nodes[name]["fn"]
        listed = bool(_base(fn).has_enumerate_support)
        pinned[name] = _mode(fn) if listed else _median(fn, latents[name]["fn"])
        if name in extra:
            continue
        notes.append(
            f"global latent {name!r} is held at the guide's {'mode' if listed else 'median'}: ELBO, log p(x) and gap are those "
            "at this value, and the ELBO is not SVI's, which averages over the guide's draws of it"
        )
    missing = [name for name in latents if name not in pinned]
    if missing:
        raise UnsupportedProgram(
            f"global latent {missing[0]!r} is not drawn by the guide, so nothing says where to hold it: draw it in the guide "
            "(a Delta will do) or condition the model on it"
        )
    return pinned, notes


def _base(fn: TorchDistribution) -> Any:
    while isinstance(fn, dist.Independent):
        fn = fn.base_dist
    return fn


def _mode(fn: TorchDistribution) -> Tensor:
    """Return the most probable value of a discrete distribution with finitely many values."""
    base = _base(fn)
    values = base.enumerate_support(expand=True)
    best = base.log_prob(values).argmax(0, keepdim=True)
    return torch.take_along_dim(values, best.reshape(*best.shape, *(1,) * base.event_dim), 0)[0].detach()


def _median(fn: TorchDistribution, prior: TorchDistribution) -> Tensor:
    """Return the median of each coordinate, taken in unconstrained coordinates so that it stays in the support."""
    base = _base(fn)
    if isinstance(base, dist.Delta):
        return base.v.detach()
    if isinstance(base, JOINTLY_NORMAL):
        return base.mean.detach()
    try:
        return base.icdf(torch.full_like(base.sample(), 0.5)).detach()
    except (NotImplementedError, AttributeError, TypeError):
        support = support_of(fn) or support_of(prior)
        draws = fn.sample(torch.Size([PIN_DRAWS]))
        if support is None or support.is_discrete:
            return draws.median(0).values.detach()
        transform = bijection(support)
        return transform(transform.inv(draws).median(0).values).detach()


def _scale_notes(*traces: Trace) -> list[str]:
    notes = []
    for node in (node for trace in traces for node in trace.nodes.values() if node["type"] == "sample"):
        if site_is_subsample(node) or node["infer"].get("_deterministic"):
            continue
        expected = math.prod((frame.full_size or frame.size) / frame.size for frame in node["cond_indep_stack"])
        scale = torch.as_tensor(node["scale"], dtype=torch.float64)
        if not torch.allclose(scale, torch.full_like(scale, expected), rtol=1e-5):
            note = (
                f"site {node['name']!r} has scale {scale.flatten()[0].item():g} where its plates give {expected:g}: the scale "
                "is ignored, densities are those of the unscaled program"
            )
            if note not in notes:
                notes.append(note)
                log.warning(note)
    return notes


def _subsample_notes(trace: Trace, plate: str) -> list[str]:
    frames = {f.name: f for node in trace.nodes.values() if node["type"] == "sample" for f in node["cond_indep_stack"]}
    return [
        f"plate {name!r} is sub-sampled inside {plate!r}: log p(x_n) is that of the {frame.size} of {frame.full_size} drawn"
        for name, frame in frames.items()
        if name != plate and frame.full_size is not None and frame.full_size != frame.size
    ]
