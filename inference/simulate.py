"""Data simulated from the model: the same seam with x drawn from p(x|z), and the z that it was drawn from.

For these data one exact draw of the posterior is known, which makes evidence bounds two-sided without any reference
(bidirectional Monte Carlo: Grosse, Ancha and Roy 2016, https://arxiv.org/abs/1606.02275) and calibration checkable.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.utils import _pytree as pytree

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.forward import free
from elbowroom.inference.program import frame_of
from elbowroom.inference.target import LogJoint, seeded


def simulate(log_joint: LogJoint, seed: int) -> tuple[LogJoint, Tensor]:
    """Draw (z, x) from the generative program and return the seam of the new x with the z it came from.

    The observed values must be among the arguments, where the simulated ones take their place; everything else (covariates,
    masks, weights) stays.

    Args:
        log_joint: the model and guide.
        seed: random seed.

    Returns:
        A LogJoint of as many simulated data, and z (N, d) in unconstrained coordinates.

    Raises:
        UnsupportedProgram: when an observed site's values are not an argument, or a plate is sub-sampled.
    """
    program = log_joint.program
    if program.index:
        raise UnsupportedProgram("simulate: a plate is sub-sampled; give the sub-sample as the data")
    with seeded(seed), log_joint.snapshot.scope(), torch.no_grad():
        given = poutine.trace(log_joint.model).get_trace(*log_joint.args, **log_joint.kwargs)
        model: Any = poutine.uncondition(log_joint.model)
        if program.pinned:
            model = poutine.condition(model, data=dict(program.pinned))
        drawn = poutine.trace(model).get_trace(*log_joint.args, **log_joint.kwargs)
        latent = {s.name: drawn.nodes[s.name]["value"][None] for s in (*program.sites, *program.discrete)}
        z = free(log_joint, latent, "model")[0]
    observed, replacement = {}, {}
    for name, node in given.nodes.items():
        inside = node["type"] == "sample" and node["is_observed"] and frame_of(node, program.plate) is not None
        if not inside or node["infer"].get("_deterministic") or node["infer"].get("is_auxiliary"):
            continue
        value = drawn.nodes[name]["value"].to(node["value"].dtype)
        leaf = next((t for t in _tensors(log_joint) if _same(t, node["value"])), None)
        if leaf is None:
            raise UnsupportedProgram(f"simulate: the values of observed site {name!r} are not an argument of the model")
        replacement[id(leaf)] = value.reshape(leaf.shape)
        site_dim = next(f.dim for f in node["cond_indep_stack"] if f.name == program.plate) - node["fn"].event_dim
        observed[name] = value.movedim(site_dim, 0)
    other = copy.copy(log_joint)
    swap = lambda t: replacement.get(id(t), t)
    other.args, other.kwargs = pytree.tree_map(swap, (log_joint.args, log_joint.kwargs))
    other.program = dataclasses.replace(program, observed={**program.observed, **observed})
    other.joined = dict(log_joint.joined)
    return other, z


def _tensors(log_joint: LogJoint) -> list[Tensor]:
    return [t for t in pytree.tree_leaves((log_joint.args, log_joint.kwargs)) if isinstance(t, Tensor)]


def _same(argument: Tensor, value: Tensor) -> bool:
    if argument.numel() != value.numel():
        return False
    return torch.equal(argument.flatten().to(value.dtype).nan_to_num(), value.flatten().nan_to_num())
