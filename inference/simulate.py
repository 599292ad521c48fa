"""Data simulated from the model: (z, x) from the joint as a seam of its own, and x from p(x|z) at given z.

For simulated data one exact draw of the posterior is known, which makes evidence bounds two-sided without any reference
(bidirectional Monte Carlo: Grosse, Ancha and Roy 2016, https://arxiv.org/abs/1606.02275) and calibration checkable.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.utils import _pytree as pytree

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.forward import free
from elbowroom.inference.program import Site, frame_of
from elbowroom.inference.target import LogJoint, seeded


def simulate(log_joint: LogJoint, seed: int) -> tuple[LogJoint, Tensor]:
    """Draw (z, x) from the generative program and return the seam of the new x with the z it came from.

    The observed values must be among the arguments, where the simulated ones take their place; everything else (covariates,
    masks, weights) stays, and what is missing (NaN) in the data is missing in the simulated ones too.

    Args:
        log_joint: the model and guide.
        seed: random seed.

    Returns:
        A LogJoint of as many simulated data, and z (N, d) in unconstrained coordinates.

    Raises:
        UnsupportedProgram: when an observed site's values are not an argument, or a plate is sub-sampled.
    """
    program = log_joint.program
    model = _unobserved(log_joint)
    with seeded(seed), log_joint.snapshot.scope(), torch.no_grad():
        given = _observed(log_joint)
        with _Values() as drawn:
            model(*log_joint.args, **log_joint.kwargs)
        latent = {s.name: drawn.values[s.name][None] for s in (*program.sites, *program.discrete)}
        nothing = torch.zeros(log_joint.n_obs, 0, dtype=log_joint.dtype or log_joint.own_dtype, device=log_joint.device)
        z = free(log_joint, latent, "model")[0] if program.sites else nothing
    observed, replacement = {}, {}
    for name, node in given.items():
        value = _with_holes(drawn.values[name], node["value"])
        leaf = next((t for t in _tensors(log_joint) if _same(t, node["value"])), None)
        if leaf is None:
            raise UnsupportedProgram(f"simulate: the values of observed site {name!r} are not an argument of the model")
        replacement[id(leaf)] = value.reshape(leaf.shape)
        observed[name] = _by_datum(log_joint, node, value)
    other = copy.copy(log_joint)
    swap = lambda t: replacement.get(id(t), t)
    other.args, other.kwargs = pytree.tree_map(swap, (log_joint.args, log_joint.kwargs))
    other.program = dataclasses.replace(program, observed={**program.observed, **observed})
    other.joined = dict(log_joint.joined)
    return other, z


def predict(log_joint: LogJoint, sites: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Draw x ~ p(x|z) at given latents: with draws of a posterior, replicated data of the posterior predictive.

    Args:
        log_joint: the model and guide.
        sites: constrained values of all latent sites, the discrete ones too, name -> (S, N, *shape): those of a `Posterior`,
            its chains joined.
        seed: random seed.

    Returns:
        Values of the observed sites, name -> (S, N, *event), NaN where the data are missing.

    Raises:
        UnsupportedProgram: when a latent site has no value, or a plate is sub-sampled.
    """
    program = log_joint.program
    model, latents = _unobserved(log_joint), (*program.sites, *program.discrete)
    for site in latents:
        if site.name not in sites:
            raise UnsupportedProgram(f"predict: no values of site {site.name!r} are given")
    dtype = log_joint.dtype or log_joint.own_dtype
    found: dict[str, list[Tensor]] = {}
    with seeded(seed), log_joint.snapshot.scope(), torch.no_grad():
        given = _observed(log_joint)
        for s in range(len(next(iter(sites.values())))):
            values = {}
            for site in latents:
                kind = dtype if site.values is None else site.values.dtype
                values[site.name] = _in_place(site, sites[site.name][s].to(log_joint.device, kind))
            with _Values() as drawn:
                poutine.condition(model, data=values)(*log_joint.args, **log_joint.kwargs)
            for name, node in given.items():
                value = _with_holes(drawn.values[name], node["value"])
                found.setdefault(name, []).append(_by_datum(log_joint, node, value))
    return {name: torch.stack(values) for name, values in found.items()}


class _Values(Messenger):
    """Keeps the value of every sample site, and nothing else: a trace would hold on to the run until garbage is collected."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        self.values[msg["name"]] = msg["value"]


def _unobserved(log_joint: LogJoint) -> Any:
    """Return the model with its observed sites drawn, and its global latents where they are pinned."""
    program = log_joint.program
    if program.index:
        raise UnsupportedProgram("simulate: a plate is sub-sampled; give the sub-sample as the data")
    model: Any = poutine.uncondition(log_joint.model)
    return poutine.condition(model, data=dict(program.pinned)) if program.pinned else model


def _observed(log_joint: LogJoint) -> dict[str, Any]:
    """Return the nodes of the observed sites inside the data plate, by name."""
    given = poutine.trace(log_joint.model).get_trace(*log_joint.args, **log_joint.kwargs)
    inside = lambda node: frame_of(node, log_joint.program.plate) is not None
    said = lambda node: not (node["infer"].get("_deterministic") or node["infer"].get("is_auxiliary"))
    return {
        name: node
        for name, node in given.nodes.items()
        if node["type"] == "sample" and node["is_observed"] and inside(node) and said(node)
    }


def masked(log_joint: LogJoint) -> list[str]:
    """Return the observed sites of which a mask takes entries out of the likelihood: their values there are no data."""
    with log_joint.snapshot.scope(), torch.no_grad():
        return [name for name, node in _observed(log_joint).items() if node["mask"] is not None or _has_mask(node["fn"])]


def _has_mask(fn: Any) -> bool:
    while fn is not None:
        if getattr(fn, "_mask", None) is not None:
            return True
        fn = getattr(fn, "base_dist", None)
    return False


def _with_holes(drawn: Tensor, data: Tensor) -> Tensor:
    drawn = drawn.to(data.dtype)
    return torch.where(data.isnan(), torch.nan, drawn) if data.is_floating_point() else drawn


def _by_datum(log_joint: LogJoint, node: Any, value: Tensor) -> Tensor:
    """Move the data dimension of an observed site's value to the front."""
    frame = frame_of(node, log_joint.program.plate)
    assert frame is not None
    return value.movedim(frame.dim - node["fn"].event_dim, 0)


def _in_place(site: Site, value: Tensor) -> Tensor:
    """Lay a value (N, *shape) out as the program has it."""
    return value.movedim(0, site.plate_dim - site.event_dim)


def _tensors(log_joint: LogJoint) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((log_joint.args, log_joint.kwargs)) if isinstance(t, Tensor)]


def _same(argument: Tensor, value: Tensor) -> bool:
    if argument.numel() != value.numel():
        return False
    return torch.equal(argument.flatten().to(value.dtype).nan_to_num(), value.flatten().nan_to_num())
