"""Masks of latents that depend on discrete latents: what they remove gets a density, the same in model and guide."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elbowroom.errors import UnsupportedProgram
from elbowroom.inference.program.masks import entries
from elbowroom.inference.program.replay import Replay
from elbowroom.inference.program.sites import Gate, Program, Site

PRIOR_DRAWS = 4096  # of a masked site, over the data, for the density that stands in for its own
QUARTILES = 1.349  # distance between the quartiles of a normal distribution, in standard deviations


def with_gates(
    program: Program, model: Callable[..., Any], guide: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Program:
    """Find the masks of latents that depend on discrete latents, and give what they remove a density.

    Masks of model and guide are compared at every joint value of the discrete sites.

    Raises:
        UnsupportedProgram: the masks of model and guide differ, depend on a continuous latent, or remove a discrete latent
            whatever the other sites are.
    """
    sites = {site.name: site for site in (*program.sites, *program.discrete)}
    first: dict[str, Tensor] = {}
    prior: Replay | None = None
    gates: dict[str, Gate] = {}
    differ: tuple[str, str] | None = None
    for i, assignment in enumerate([program.assignments[0], *program.assignments]):  # the first twice: at other draws
        runs: list[Replay] = []
        for program_of in (model, guide):
            with Replay(program, assignment) as replay:
                program_of(*args, **kwargs)
            runs.append(replay)
        prior = prior or runs[0]
        for name, site in sites.items():
            mine, theirs = (_columns(run, name, site, program.n_obs) if name in run.values else None for run in runs)
            if mine is None or (theirs is not None and not torch.equal(mine, theirs)):
                said = ", ".join(f"{key}={value.tolist()}" for key, value in assignment.items())
                differ = differ or (name, f" at {said}" if said else "")
            if mine is None:
                continue
            if torch.equal(mine, first.setdefault(name, mine)):
                continue
            if i == 1:
                raise UnsupportedProgram(
                    f"site {name!r}: its mask depends on a continuous latent or on random numbers; masks may depend on the "
                    "data and on discrete latents"
                )
            gates.setdefault(name, _gate_of(prior, site, program.n_obs))
    for site in program.discrete:
        if site.name not in gates and not bool(first[site.name].all()):
            raise UnsupportedProgram(
                f"discrete site {site.name!r} is masked out of some data: each of its values would count as having probability "
                "one; observe it, or leave those data out"
            )
    if differ is not None:
        raise UnsupportedProgram(
            f"site {differ[0]!r} is masked differently in model and guide{differ[1]}: open the same poutine.mask around it in "
            "both, by the same discrete site, drawn in both"
        )
    gates = {name: gates[name] for name in sites if name in gates}
    active = program.active
    if active is not None and gates:
        active = active.clone()
        for site in program.sites:
            if site.name in gates:
                active[:, site.columns] = True
    active = None if active is None or bool(active.all()) else active
    notes = list(program.notes)
    if active is not None:
        notes.append(f"{int((~active).sum())} of {active.numel()} latent coordinates are masked: removed for their datum")
    notes += [_gate_note(name, gate) for name, gate in gates.items()]
    return dataclasses.replace(program, active=active, gated=gates, notes=notes)


def _columns(run: Replay, name: str, site: Site, n_obs: int) -> Tensor:
    keep = run.columns(name)
    if keep is not None:
        return keep
    width = site.columns.stop - site.columns.start if site.values is None else math.prod(_entry_shape(run, name))
    return torch.ones(n_obs, width, dtype=torch.bool, device=run.values[name].device)


def _entry_shape(run: Replay, name: str) -> tuple[int, ...]:
    """Return the shape of one datum's entries of a discrete site: the dimensions that .to_event added."""
    keep = entries(run.distributions[name], True, run.values[name].device, name)
    assert keep is not None
    return tuple(keep.shape[len(run.distributions[name].batch_shape) :])


def _gate_of(prior: Replay, site: Site, n_obs: int) -> Gate:
    """Return a density of about the place and the width of the prior, which makes the joint easy to compute with."""
    if site.values is not None:
        return Gate(log_values=math.log(len(site.values)) / math.prod(_entry_shape(prior, site.name)))
    transform: Any = site.transform
    drawn = prior.distributions[site.name].sample(torch.Size([max(16, PRIOR_DRAWS // n_obs)]))
    free = transform.inv(drawn)
    columns = free.movedim(site.plate_dim - site.free_event_dim, 1).reshape(len(free) * n_obs, -1).double()
    low, loc, high = columns.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=columns.dtype, device=columns.device), 0)
    scale = (high - low) / QUARTILES
    usable = loc.isfinite() & scale.isfinite() & (scale > 0)
    return Gate(tuple(torch.where(usable, loc, 0.0).tolist()), tuple(torch.where(usable, scale, 1.0).tolist()))


def _gate_note(name: str, gate: Gate) -> str:
    stand_in = (
        "each value has the same probability there" if gate.log_values else "a normal density like its prior stands there"
    )
    return (
        f"site {name!r} is masked where a discrete site says so: {stand_in}, in model and guide, which leaves log p(x) as it "
        "is; draws and moments include it, and ELBO and gap are those with the discrete sites summed out"
    )
