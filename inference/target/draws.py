"""Draws from a program, in unconstrained coordinates: all at once in an outer plate, if that is correct.

An outer plate shifts dimensions that a program counts from the left (`dim=1`, `z[:, 0]`), so a program can broadcast and yet
draw from the wrong distribution. The first batch is therefore checked: the density of its draws in the batched run must equal
their density in runs of one draw. If it does not, draws are made one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import torch
from torch import Tensor

from elbowroom.errors import UnsupportedProgram, first_line
from elbowroom.inference.program.carriers import JointCarrier
from elbowroom.inference.program.densities.edges import bijection
from elbowroom.inference.program.replay import Replay, Which
from elbowroom.inference.program.sites import Site, support_of
from elbowroom.inference.target.plain import PlainLogJoint

CHECKED = 3  # number of draws in the check


def forward(joint: PlainLogJoint, which: Which, n_draws: int) -> Tensor:
    """Draw the local latents from the model (the prior) or the guide, in the joint's scope: (S, N, d)."""
    if joint.dim == 0:  # every latent is discrete, and summed out
        return torch.zeros(n_draws, joint.n_obs, 0, dtype=joint.dtype or joint.own_dtype, device=joint.device)
    if which == "guide" and (vector := _of_all_data(joint)) is not None:
        return vector.draw(joint.dim, joint.probe_points.new_empty(0).to(joint.dtype or joint.own_dtype), (n_draws,))
    if joint.batched_draws[which] is None:
        joint.batched_draws[which] = _batches(joint, which)
    if joint.batched_draws[which]:
        values, replay = _batched(joint, which, n_draws)
        dim = -joint.program.nesting - 1
        known = {
            s.name: _in_front(replay.free[s.name][0], s, dim, s.free_event_dim) for s in joint.sites if s.name in replay.free
        }
        z = free(joint, values, which, known)
        return _through_gates(joint, z, replay) if joint.program.gated else z
    runs = [joint.run(which, {}) for _ in range(n_draws)]
    values = {name: torch.stack([run.values[name] for run in runs]) for name in runs[0].values}
    z = free(joint, values, which, {name: torch.stack([run.free[name][0] for run in runs]) for name in runs[0].free})
    if not joint.program.gated:
        return z
    kept = {name: torch.stack([torch.as_tensor(run.columns(name)) for run in runs]) for name in gates(joint)}
    return padded(joint, z, kept)


def _of_all_data(joint: PlainLogJoint) -> JointCarrier | None:
    """Return the vector of all data that holds every coordinate, where the guide draws one: draws need no run of it."""
    found = [carrier for carrier in joint.program.carriers.values() if isinstance(carrier, JointCarrier)]
    alone = len(found) == 1 and len(found[0].columns) == joint.dim and not joint.program.gated
    return found[0] if alone else None


def gates(joint: PlainLogJoint) -> list[str]:
    """Return the names of the continuous sites that discrete sites mask."""
    return [site.name for site in joint.program.sites if site.name in joint.program.gated]


def padded(joint: PlainLogJoint, z: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    """Replace draws of masked coordinates by draws of the density that stands there; `kept` is (S, N, columns) by site."""
    z = z.clone()
    for site in joint.program.sites:
        if site.name in kept:
            gate, mine = joint.program.gated[site.name], z[..., site.columns]
            loc, scale = (torch.tensor(numbers, dtype=z.dtype, device=z.device) for numbers in (gate.loc, gate.scale))
            z[..., site.columns] = torch.where(kept[site.name], mine, loc + scale * torch.randn_like(mine))
    return z


def _through_gates(joint: PlainLogJoint, z: Tensor, replay: Replay) -> Tensor:
    """Replace masked coordinates of draws that were made in an outer plate."""
    dim = -joint.program.nesting - 1
    kept = {}
    for site in joint.program.sites:
        if site.name in joint.program.gated:
            keep = torch.as_tensor(replay.kept(site.name)).movedim(dim - site.free_event_dim, 0)
            surplus = keep.dim() - site.batch_ndim - site.free_event_dim
            keep = keep.flatten(0, surplus - 1) if surplus > 1 else keep
            kept[site.name] = keep.movedim(site.plate_dim - site.free_event_dim, 1).reshape(*z.shape[:2], -1)
    return padded(joint, z, kept)


def _batched(joint: PlainLogJoint, which: Which, n_draws: int) -> tuple[dict[str, Tensor], Replay]:
    """Run once in an outer plate: values by site, (S, batch, event), and the run itself."""
    program = joint.program
    dim = -program.nesting - 1
    replay = joint.run(which, {}, pyro.plate("_draws", n_draws, dim=dim), draws_dim=dim)
    values = {}
    for site in (*program.sites, *program.discrete):
        if site.name in replay.values:
            values[site.name] = _in_front(replay.values[site.name], site, dim, site.event_dim)
    return values, replay


def _in_front(value: Tensor, site: Site, dim: int, event_dim: int) -> Tensor:
    """Move the outer plate, batch dimension `dim`, to the front: (S, batch, event)."""
    value = value.movedim(dim - event_dim, 0)
    surplus = value.dim() - site.batch_ndim - event_dim
    return value.flatten(0, surplus - 1) if surplus > 1 else value


def _batches(joint: PlainLogJoint, which: Which) -> bool:
    """Check whether a program may be drawn in an outer plate."""
    try:
        values, replay = _batched(joint, which, CHECKED)
        stated = replay.per_draw
        for s in range(CHECKED):
            given = {name: value[s] for name, value in values.items()}
            discrete = {site.name: given.pop(site.name) for site in joint.program.discrete if site.name in given}
            alone = joint.run(which, discrete, values=given).log_prior.sum()
            if not torch.allclose(alone, stated[s], rtol=1e-5, atol=1e-5):
                raise RuntimeError("an outer plate changes the distribution that is drawn from")
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AssertionError) as error:
        joint.note(f"{which}: drawn one at a time, {first_line(error)}")
        return False
    return True


def free(joint: PlainLogJoint, values: dict[str, Tensor], which: Which, known: Mapping[str, Tensor]) -> Tensor:
    """Map constrained values (S, batch, event) of all local sites to unconstrained coordinates (S, N, d).

    `known` has the coordinates of sites that were drawn in them, likewise.

    Raises:
        UnsupportedProgram: the guide drew values outside the prior's support, where the ELBO is minus infinity.
    """
    n_draws = len(next(iter(values.values()))) if values else 0
    program = joint.program
    if all(site.transform is not None for site in program.sites):
        parts = []
        for site in program.sites:
            if site.transform is None:
                continue
            value = values[site.name]
            if which == "guide" and site.support is not None and not bool(site.support.check(value).all()):
                raise UnsupportedProgram(
                    f"site {site.name!r}: the guide drew values outside the prior's support, where log p(x, z) and hence the "
                    "ELBO is minus infinity; wrap the guide's distribution in a transform onto the prior's support"
                )
            u = known[site.name] if site.name in known else site.transform.inv(value)
            parts.append(u.movedim(site.plate_dim - site.free_event_dim, 1).reshape(n_draws, joint.n_obs, -1))
        return torch.cat(parts, -1)
    runs = []
    for s in range(n_draws):
        given = {name: value[s] for name, value in values.items()}
        model = joint.run("model", {}, values=given)
        parts = []
        for site in program.sites:
            u = bijection(support_of(model.distributions[site.name])).inv(model.values[site.name])
            parts.append(site.gather(u, site.free_event_dim).reshape(joint.n_obs, -1))
        runs.append(torch.cat(parts, -1))
    return torch.stack(runs)
