"""Inspection of a Pyro (model, guide) pair: its data plate, its latent sites per datum, and reasons to refuse it.

The pair is RUN once, eagerly and validated, with the user's own arguments, and everything is read from the two traces. There is
no need to know which argument is data, covariate or mask.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.edges import bijection
from elbowroom.inference.program.latents import (
    MAX_ASSIGNMENTS,
    active_coordinates,
    check_guide_site,
    continuous_site,
    discrete_site,
    frame_dim,
)
from elbowroom.inference.program.sites import Program, Site, frame_of, support_of

log = logging.getLogger("elbowroom")

PIN_DRAWS = 1001


def inspect(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    plate: str | None,
) -> Program:
    """Run the pair p(x, z), q(z|x) once and describe it; `plate` names the data plate, if there are several candidates.

    Raises:
        UnsupportedProgram: per-datum inference does not apply to the pair; names the site or plate and the reason.
    """
    _refuse_joint_guide(guide)
    guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
    model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
    _refuse_sequential(model_trace, guide_trace)

    latents = {name: site for name, site in _latents(model_trace).items() if not _is_unobserved_half(name, model_trace)}
    dropped = frozenset(_latents(model_trace)) - frozenset(latents)
    guide_latents = {name: site for name, site in _latents(guide_trace).items() if name not in dropped}
    _refuse_auxiliary(guide_latents, latents)
    _refuse_factors(guide_trace, model_trace)

    name = _data_plate(latents, model_trace, plate)
    local = {k: v for k, v in latents.items() if frame_of(v, name) is not None}
    pinned, notes = _pin({k: v for k, v in latents.items() if k not in local}, guide, guide_trace, args, kwargs)
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
    notes += [f"site {half!r} is the unobserved half of obs_mask: integrated out" for half in sorted(dropped)]
    notes += _scale_notes(model_trace, guide_trace)
    notes += _subsample_notes(model_trace, name)

    first = model_trace.nodes[next(iter(local))]
    n_obs = first["fn"].batch_shape[frame_dim(first, name)]
    sites: list[Site] = []
    discrete: list[Site] = []
    offset = 0
    for site_name in local:
        node = model_trace.nodes[site_name]
        guide_node = guide_trace.nodes.get(site_name)
        if _is_discrete(node):
            discrete.append(discrete_site(node, name))
            continue
        if guide_node is None:
            raise UnsupportedProgram(f"guide: it has no site {site_name!r}, a latent of the model inside plate {name!r}")
        check_guide_site(node, guide_node, name)
        _check_masks(node, guide_node)
        site = continuous_site(node, name, offset)
        offset = site.columns.stop
        sites.append(site)
    moving = next((site for site in sites if site.transform is None), None)
    if discrete and moving is not None:
        raise UnsupportedProgram(
            f"site {moving.name!r}: its support depends on other sites, which is not done beside the discrete site "
            f"{discrete[0].name!r}; give it a fixed support"
        )
    count = math.prod(len(site.values) for site in discrete if site.values is not None)
    if count > MAX_ASSIGNMENTS:
        names = ", ".join(repr(site.name) for site in discrete)
        raise UnsupportedProgram(f"sites {names}: {count} joint values are too many to enumerate (at most {MAX_ASSIGNMENTS})")
    active = active_coordinates([model_trace.nodes[s.name] for s in sites], sites, n_obs, offset)
    if active is not None:
        notes.append(f"{int((~active).sum())} of {active.numel()} latent coordinates are masked: removed for their datum")
    return Program(
        plate=name,
        n_obs=n_obs,
        sites=tuple(sites),
        discrete=tuple(discrete),
        dim=offset,
        guide_sites=frozenset(guide_latents) & frozenset(local),
        pinned=pinned,
        index=index,
        dropped=dropped,
        active=active,
        nesting=max(-f.dim for t in (model_trace, guide_trace) for n in t.nodes.values() for f in _frames(n)),
        observed=_observed(model_trace, name, n_obs),
        notes=notes,
    )


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
    return bool(node["fn"].has_enumerate_support) or bool(node["fn"].support.is_discrete)


def _refuse_joint_guide(guide: Callable[..., Any]) -> None:
    if isinstance(guide, AutoContinuous):
        raise UnsupportedProgram(
            f"guide: {type(guide).__name__} joins all data into one latent site; write a guide whose sites sit inside the "
            "data plate, e.g. `with pyro.plate('data', len(x)): pyro.sample('z', dist.Normal(loc, scale).to_event(1))`"
        )


def _refuse_sequential(*traces: Trace) -> None:
    for trace in traces:
        for name, node in trace.nodes.items():
            if node["type"] != "sample" or site_is_subsample(node):
                continue
            for frame in node["cond_indep_stack"]:
                if not frame.vectorized:
                    raise UnsupportedProgram(
                        f"plate {frame.name!r} is sequential (a Python loop; site {name!r}): open it as a context, "
                        f"`with pyro.plate({frame.name!r}, ...)`"
                    )


def _refuse_auxiliary(guide_latents: Mapping[str, Any], latents: Mapping[str, Any]) -> None:
    extra = [name for name in guide_latents if name not in latents]
    if extra:
        raise UnsupportedProgram(
            f"guide site {extra[0]!r} is not a latent of the model (an auxiliary variable): log q(z|x) would need an "
            "integral over it; draw the model's own sites from distributions with a density"
        )


def _refuse_factors(guide_trace: Trace, model_trace: Trace) -> None:
    for name, node in guide_trace.nodes.items():
        observed = node["type"] == "sample" and node["is_observed"] and not node["infer"].get("_deterministic")
        # a messenger guide runs the model and so has its observed sites; a site observed in the guide alone is a factor
        if observed and not site_is_subsample(node) and name not in model_trace.nodes:
            raise UnsupportedProgram(
                f"guide site {name!r} is observed (a pyro.factor or obs= in the guide): q(z|x) would not be normalised, and "
                "neither its ELBO nor its gap would mean anything; remove it"
            )


def _check_masks(node: Mapping[str, Any], guide_node: Mapping[str, Any]) -> None:
    def full(n: Mapping[str, Any]) -> Tensor:
        mask = True if n["mask"] is None else n["mask"]
        return torch.as_tensor(mask).expand(n["fn"].batch_shape)

    mine, theirs = full(node), full(guide_node)
    if mine.shape != theirs.shape or not torch.equal(mine, theirs):
        raise UnsupportedProgram(
            f"site {node['name']!r} is masked differently in model and guide: open the same poutine.mask around it in both"
        )


def _data_plate(latents: Mapping[str, Mapping[str, Any]], trace: Trace, asked: str | None) -> str:
    plates = {f.name for node in trace.nodes.values() if node["type"] == "sample" for f in node["cond_indep_stack"]}
    if not latents:
        raise UnsupportedProgram("model: it has no latent sample site")
    if asked is not None:
        if asked not in plates:
            raise UnsupportedProgram(f"plate={asked!r}: the model has no such plate; it has {sorted(plates)}")
        if not any(frame_of(node, asked) for node in latents.values()):
            raise UnsupportedProgram(f"plate={asked!r}: no latent site lies inside it")
        return asked
    stacks = [{frame.name for frame in node["cond_indep_stack"]} for node in latents.values()]
    local = [stack for stack in stacks if stack]
    if not local:
        raise UnsupportedProgram(
            f"model: no plate holds a latent site ({', '.join(map(repr, latents))}); one datum cannot be told from the "
            "next. Open `with pyro.plate('data', len(x)):` around the latent and the observed site"
        )
    common = set.intersection(*local)
    if len(common) == 1:
        return common.pop()
    if not common:
        listed = ", ".join(f"{name!r} in {sorted(stack)}" for name, stack in zip(latents, stacks, strict=True))
        raise UnsupportedProgram(f"model: its latent sites share no plate ({listed}); say which holds the data: plate=...")
    raise UnsupportedProgram(
        f"model: the data plate could be any of {sorted(common)}; say which holds the data, e.g. plate={sorted(common)[0]!r}"
    )


def _pin(
    latents: Mapping[str, Mapping[str, Any]],
    guide: Callable[..., Any],
    guide_trace: Trace,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[dict[str, Tensor], list[str]]:
    """Fix every global latent at the median of the guide's distribution, in program order."""
    pinned: dict[str, Tensor] = {}
    for name in (n for n in guide_trace.nodes if n in latents):
        trace = poutine.trace(poutine.condition(guide, data=pinned)).get_trace(*args, **kwargs) if pinned else guide_trace
        pinned[name] = _median(trace.nodes[name]["fn"])
    missing = [name for name in latents if name not in pinned]
    if missing:
        raise UnsupportedProgram(
            f"global latent {missing[0]!r} is not drawn by the guide, so nothing says where to hold it: draw it in the guide "
            "(a Delta will do) or condition the model on it"
        )
    return pinned, [f"global latent {name!r} is held at the guide's median" for name in pinned]


def _median(fn: TorchDistribution) -> Tensor:
    """Return the median of each coordinate, taken in unconstrained coordinates so that it stays in the support."""
    base = fn
    while isinstance(base, dist.Independent):
        base = base.base_dist
    if isinstance(base, dist.Delta):
        return base.v.detach()
    try:
        return base.icdf(torch.full_like(base.sample(), 0.5)).detach()
    except (NotImplementedError, AttributeError, TypeError):
        transform = bijection(support_of(fn))
        return transform(transform.inv(fn.sample(torch.Size([PIN_DRAWS]))).median(0).values).detach()


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
