"""Further references for the data that the first does not settle: run on these alone, and NaN elsewhere.

A datum is settled if its posterior is exact or certified, with a value of log p(x).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

from elbowroom.analysis.audit.parts import Part
from elbowroom.analysis.measures.distances import Comparison, compare
from elbowroom.analysis.measures.evidence import sandwich
from elbowroom.analysis.measures.missed_modes import missed_mass
from elbowroom.analysis.measures.refuted import overlooked
from elbowroom.inference.posterior import Posterior, Reference, completed, rows_of, spread
from elbowroom.inference.target.log_joint import LogJoint
from elbowroom.system.stages import stage

UNNEEDED = "not needed here: {} is exact or certified, with a value"


@dataclasses.dataclass(frozen=True)
class Seeds:
    """Random seeds of a block: of the comparisons, of the first method, from one to the next, and offsets for the rest."""

    compare: int
    first: int
    step: int
    discrete: int
    sandwich: int


def leftover(
    log_joint: LogJoint,
    guide: Posterior,
    first: Posterior,
    methods: Sequence[Reference],
    seeds: Seeds,
    keep: int,
    until: float = math.inf,
) -> list[tuple[Posterior, Comparison]]:
    """Run the methods on the data that `first` does not settle, with upper bounds by all together.

    Returns:
        For each method the posterior and the guide's distances of all data; NaN and `not needed` where `first` settles it.
    """
    n = log_joint.n_obs
    rows = (~first.settled).nonzero()[:, 0]
    part, used, at = log_joint.some(rows.to(log_joint.device))
    mine, known = rows_of(guide, used.cpu()), rows_of(first, used.cpu())
    found = []
    for number, method in enumerate(methods):
        seed = seeds.first + seeds.step * number
        with stage(method.name):
            drawn = method(part, keep=keep, seed=seed, until=until)
            drawn = completed(part, drawn, seed + seeds.discrete)
        drawn = overlooked(drawn, known)
        drawn.stats["missed_mass"] = missed_mass(part, mine, drawn)
        found.append(drawn)
    found = sandwich(part, methods, found, seed=seeds.sandwich, until=until)
    out = []
    for drawn in found:
        distances = compare(part, mine, drawn, seed=seeds.compare)
        columns = {f.name: getattr(distances, f.name)[at].cpu() for f in dataclasses.fields(Comparison)}
        blank = {name: torch.full((n,), torch.nan, dtype=value.dtype) for name, value in columns.items()}
        for name, value in columns.items():
            blank[name][rows] = value
        out.append((spread(rows_of(drawn, at.cpu()), rows, n, UNNEEDED.format(first.method)), Comparison(**blank)))
    return out


def without(blank: Posterior, first: Part | None) -> Posterior:
    """Say of data that were not reached whether they were needed."""
    if first is None:
        return blank
    status, reason = list(blank.status), list(blank.reason)
    for i in first.posterior.settled.nonzero()[:, 0].tolist():
        status[i], reason[i] = "not needed", f"{blank.method}: {UNNEEDED.format(first.posterior.method)}"
    return dataclasses.replace(blank, status=status, reason=reason)
